//! The threads of a call: the caller is one of them, helpers come from a rayon pool.

use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Thread;

use crate::cpu::isa::Isa;

/// Work below which waking a helper costs more than it saves, in the units of
/// [`CpuDevice::for_each`]: about 100 µs of one core.
const SERIAL_WORK: usize = 4_000_000;

/// The CPU as a device: which pool helps, and how many threads may work on a call.
#[derive(Clone, Debug, Default)]
pub(crate) struct CpuDevice {
    pool: Option<Arc<rayon::ThreadPool>>,
    limit: Option<NonZeroUsize>,
}

impl CpuDevice {
    /// Helpers come from the caller's pool.
    pub(crate) fn with_pool(pool: Arc<rayon::ThreadPool>) -> Self {
        CpuDevice { pool: Some(pool), limit: None }
    }

    /// At most this many threads, the caller among them; zero counts as one.
    pub(crate) fn limit_threads(&mut self, threads: usize) {
        self.limit = NonZeroUsize::new(threads.max(1));
    }

    /// Threads that may work on a call, the caller among them.
    pub(crate) fn threads(&self) -> usize {
        if self.limit.is_some_and(|limit| limit.get() == 1) {
            return 1;
        }
        let pool = match &self.pool {
            Some(pool) => pool.current_num_threads(),
            None => rayon::current_num_threads(),
        };
        self.limit.map_or(pool, |limit| pool.min(limit.get()))
    }

    /// Calls `f(0), …, f(units - 1)`, each once, in any order, on the caller and on as many
    /// helpers as `work` is worth (a multiply-accumulate or a moved byte counts one).
    ///
    /// Units are claimed in order from a counter, and what is waited for is units, not helpers: one
    /// that the pool starts late, or not at all while the call runs, costs nothing but its share.
    ///
    /// # Panics
    /// If `f` does.
    pub(crate) fn for_each(&self, units: usize, work: usize, f: &(dyn Fn(usize) + Sync)) {
        let worth = work / (SERIAL_WORK / 2);
        let threads = if units < 2 || worth < 2 { 1 } else { self.threads().min(units).min(worth) };
        if threads <= 1 {
            return (0..units).for_each(f);
        }
        // SAFETY: only the lifetime changes. `Shared::work` calls `f` for claimed units only, and
        // `Shared::finish` returns, on every path, when all units are claimed and nobody works any
        // more; a helper that starts later claims nothing.
        let f = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f)
        };
        let shared = Arc::new(Shared {
            f,
            units,
            next: AtomicUsize::new(0),
            working: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            caller: std::thread::current(),
        });
        for _ in 1..threads {
            let shared = shared.clone();
            let help = move || shared.work();
            match &self.pool {
                Some(pool) => pool.spawn(help),
                None => rayon::spawn(help),
            }
        }
        shared.work();
        shared.finish();
    }
}

/// One call's units, shared by the caller and its helpers.
struct Shared {
    f: &'static (dyn Fn(usize) + Sync),
    units: usize,
    /// The next unit to claim; at least `units` once all are.
    next: AtomicUsize,
    /// Threads that may be inside `f`.
    working: AtomicUsize,
    panicked: AtomicBool,
    caller: Thread,
}

impl Shared {
    /// Claims and runs units until there are none.
    fn work(&self) {
        // Counted before the first claim: whoever sees all units claimed sees who claimed them.
        self.working.fetch_add(1, Ordering::AcqRel);
        let run = || {
            loop {
                let unit = self.next.fetch_add(1, Ordering::AcqRel);
                if unit >= self.units {
                    break;
                }
                (self.f)(unit);
            }
        };
        if catch_unwind(AssertUnwindSafe(run)).is_err() {
            self.panicked.store(true, Ordering::Release);
            self.next.fetch_max(self.units, Ordering::AcqRel);
        }
        if self.working.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.caller.unpark();
        }
    }

    /// Waits for the units that helpers still run.
    fn finish(&self) {
        let mut spins = 0;
        while self.working.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < 1000 { std::hint::spin_loop() } else { std::thread::park() }
        }
        assert!(!self.panicked.load(Ordering::Acquire), "a unit of work panicked");
    }
}

impl fmt::Display for CpuDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let isa = Isa::detect().map_or("no instruction set", |isa| isa.isa().name());
        let threads = self.threads();
        write!(f, "cpu ({isa}, {threads} thread{})", if threads == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_pool_holds_nobody_up() {
        let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
        let release = Arc::new(std::sync::Barrier::new(3));
        for _ in 0..2 {
            let release = release.clone();
            pool.spawn(move || {
                release.wait();
            });
        }
        let count = AtomicUsize::new(0);
        CpuDevice::with_pool(pool).for_each(100, usize::MAX, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 100);
        release.wait();
    }

    #[test]
    fn a_panic_in_a_unit_reaches_the_caller_and_nothing_hangs() {
        let run = || {
            CpuDevice::default().for_each(100, usize::MAX, &|unit| assert_ne!(unit, 50));
        };
        assert!(catch_unwind(run).is_err());
    }

    #[test]
    fn every_unit_runs_once_on_any_pool() {
        let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap());
        let mut limited = CpuDevice::default();
        limited.limit_threads(0);
        for device in [CpuDevice::default(), CpuDevice::with_pool(pool), limited] {
            for (units, work) in [(0, 0), (1, usize::MAX), (1000, 0), (1000, usize::MAX)] {
                let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
                device.for_each(units, work, &|unit| {
                    counts[unit].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }
}
