//! The threads of a call: the caller is one of them, helpers come from a rayon pool.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// Units are claimed in order from a counter, so a helper that wakes late costs nothing but
    /// its share.
    pub(crate) fn for_each(&self, units: usize, work: usize, f: &(dyn Fn(usize) + Sync)) {
        let worth = work / (SERIAL_WORK / 2);
        let threads = if units < 2 || worth < 2 { 1 } else { self.threads().min(units).min(worth) };
        if threads <= 1 {
            return (0..units).for_each(f);
        }
        let next = AtomicUsize::new(0);
        let claim = || {
            loop {
                let unit = next.fetch_add(1, Ordering::Relaxed);
                if unit >= units {
                    break;
                }
                f(unit);
            }
        };
        let claim: &(dyn Fn() + Sync) = &claim;
        match &self.pool {
            Some(pool) => pool.in_place_scope(|scope| {
                (1..threads).for_each(|_| scope.spawn(move |_| claim()));
                claim();
            }),
            None => rayon::in_place_scope(|scope| {
                (1..threads).for_each(|_| scope.spawn(move |_| claim()));
                claim();
            }),
        }
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
