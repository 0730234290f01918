//! The threads of a call: the caller is one of them, helpers come from a rayon pool.
//!
//! A helper that has done its part lingers for some microseconds, ready for the next layer: handing
//! work to a thread that spins costs a tenth of a microsecond, waking one that sleeps costs as much
//! as a small layer. While it lingers it runs whatever else the pool has to do.

use std::cell::{RefCell, UnsafeCell};
use std::fmt;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::thread::LocalKey;
use std::time::{Duration, Instant};

use crate::cpu::isa::Isa;

/// Work below which a call stays on its caller, in the units of [`CpuDevice::for_each`]: some 15 µs
/// of one core.
const SERIAL_WORK: usize = 1_000_000;
/// Work below which nobody is woken, unless calls follow one another within [`LINGER`], and only
/// helpers that are awake take part: some 50 µs.
const WAKING_WORK: usize = 3_000_000;
/// How long a helper waits for the next call.
const LINGER: Duration = Duration::from_micros(200);
/// Units beyond which claims could overflow.
const MOST_UNITS: usize = u32::MAX as usize / 4;
/// Calls of one team that can be helped at a time; a further one runs on its caller alone.
const CALLS: usize = 8;

/// The CPU as a device: which pool helps, and how many threads may work on a call.
#[derive(Clone, Debug, Default)]
pub(crate) struct CpuDevice {
    pool: Option<Arc<Pool>>,
    limit: Option<NonZeroUsize>,
}

/// A caller's pool.
#[derive(Debug)]
struct Pool {
    threads: Arc<rayon::ThreadPool>,
    team: Arc<Team>,
}

impl CpuDevice {
    /// Whether calls on either have the same helpers, and as many.
    pub(crate) fn is_same(&self, other: &CpuDevice) -> bool {
        let same_pool = match (&self.pool, &other.pool) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(&a.threads, &b.threads),
            _ => false,
        };
        same_pool && self.limit == other.limit
    }

    /// Helpers come from the caller's pool.
    pub(crate) fn with_pool(threads: Arc<rayon::ThreadPool>) -> Self {
        let pool = Pool { threads, team: Arc::default() };
        CpuDevice { pool: Some(Arc::new(pool)), limit: None }
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
            Some(pool) => pool.threads.current_num_threads(),
            None => rayon::current_num_threads(),
        };
        self.limit.map_or(pool, |limit| pool.min(limit.get()))
    }

    /// Threads that so much work is worth (a multiply-accumulate or four moved bytes count one).
    pub(crate) fn threads_for(&self, work: usize) -> usize {
        if work < SERIAL_WORK { 1 } else { self.threads() }
    }

    /// Calls `f(0), …, f(units - 1)`, each once, in any order, on the caller and on as many
    /// helpers as `work` is worth.
    ///
    /// The caller claims units from the front, helpers from the back, so that in a chain of layers
    /// each tends to find in its cache what it wrote before. What is waited for is units, not
    /// helpers: one that the pool starts late, or not at all while the call runs, costs nothing but
    /// its share.
    ///
    /// # Panics
    /// If `f` does.
    pub(crate) fn for_each(&self, units: usize, work: usize, f: &(dyn Fn(usize) + Sync)) {
        let threads = if units < 2 { 1 } else { self.threads_for(work).min(units) };
        if threads < 2 || units > MOST_UNITS {
            return (0..units).for_each(f);
        }
        let own;
        let team = match &self.pool {
            Some(pool) => &pool.team,
            // Whoever is inside a pool is helped by that pool.
            None if rayon::current_thread_index().is_some() => {
                own = WORKERS_TEAM.with(Arc::clone);
                &own
            }
            None => GLOBAL_TEAM.get_or_init(Arc::default),
        };
        let Some(call) = team.calls.iter().find(|call| call.reserve()) else {
            return (0..units).for_each(f);
        };
        // SAFETY: this thread has reserved the call, and ends it before `f` does, on every path.
        unsafe { call.open(f, units as u32, threads - 1) };
        team.opened.fetch_add(1, Ordering::Release);
        let trusted = (team.is_in_use() || work >= WAKING_WORK)
            && team.wake(threads - 1, self.pool.as_deref());
        let outcome = catch_unwind(AssertUnwindSafe(|| call.work(Side::Front)));
        let Ended { free, panicked } = call.end();
        if trusted && free == threads - 1 && work >= WAKING_WORK {
            team.missed.store(true, Ordering::Relaxed);
        }
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        assert!(!panicked, "a unit of work panicked");
    }
}

/// Memory of which the units of a call write disjoint parts.
pub(crate) struct Disjoint<T>(*mut T);

// SAFETY: see the type: whoever writes through `at` answers for it.
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    pub(crate) fn new(ptr: *mut T) -> Self {
        Disjoint(ptr)
    }

    /// The element `index` further on.
    pub(crate) fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

/// Serves callers outside of any pool, with helpers from the global one.
static GLOBAL_TEAM: OnceLock<Arc<Team>> = OnceLock::new();

thread_local! {
    /// Serves a caller that is itself a worker of a pool, with helpers from that pool.
    static WORKERS_TEAM: Arc<Team> = Arc::default();
}

/// Where callers and the helpers of one pool meet.
#[derive(Debug, Default)]
struct Team {
    calls: [Call; CALLS],
    /// Calls that have been opened so far.
    opened: AtomicUsize,
    /// Helpers that work on one or wait for one.
    awake: AtomicUsize,
    /// Helpers that the pool has been asked for and that have not started.
    coming: AtomicUsize,
    /// Whether those that are awake let a call wait: they may be at the pool's other work.
    missed: AtomicBool,
    /// When the last call began, in microseconds of this process.
    last: AtomicU64,
    /// The CPU that the last caller who asked for them was on.
    caller_cpu: AtomicUsize,
}

impl Team {
    /// Whether another call began a short while ago. Remembers that one begins now.
    fn is_in_use(&self) -> bool {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        let now = START.elapsed().as_micros() as u64;
        let last = self.last.swap(now, Ordering::Relaxed);
        u128::from(now.saturating_sub(last)) < LINGER.as_micros()
    }

    /// Asks the pool for helpers, if fewer than `wanted` are awake or on their way; whether some are
    /// awake.
    fn wake(self: &Arc<Self>, wanted: usize, pool: Option<&Pool>) -> bool {
        let missed = self.missed.load(Ordering::Relaxed);
        let awake = if missed { 0 } else { self.awake.load(Ordering::Relaxed) };
        let there = awake + self.coming.load(Ordering::Relaxed);
        if there >= wanted {
            return awake > 0;
        }
        if missed {
            self.missed.store(false, Ordering::Relaxed);
        }
        self.caller_cpu.store(cpu::current(), Ordering::Relaxed);
        for _ in there..wanted {
            self.coming.fetch_add(1, Ordering::Relaxed);
            let team = self.clone();
            let help = move || team.help();
            match pool {
                Some(pool) => pool.threads.spawn(help),
                None => rayon::spawn(help),
            }
        }
        awake > 0
    }

    /// Works on open calls until there is none for a while.
    fn help(&self) {
        self.awake.fetch_add(1, Ordering::Relaxed);
        self.coming.fetch_sub(1, Ordering::Relaxed);
        cpu::leave(self.caller_cpu.load(Ordering::Relaxed));
        // A call that is over before its helper is awake is often followed by another.
        let mut next = Some(self.opened.load(Ordering::Acquire));
        while let Some(opened) = next {
            self.calls.iter().for_each(|call| call.help());
            next = self.linger(opened);
        }
        self.awake.fetch_sub(1, Ordering::Relaxed);
    }

    /// Waits until more than `seen` calls have been opened; `None` if none is in time.
    fn linger(&self, seen: usize) -> Option<usize> {
        let begin = Instant::now();
        loop {
            for _ in 0..64 {
                let opened = self.opened.load(Ordering::Acquire);
                if opened != seen {
                    return Some(opened);
                }
                std::hint::spin_loop();
            }
            if begin.elapsed() > LINGER {
                return None;
            }
            // The pool's other work goes first.
            rayon::yield_now();
        }
    }
}

/// Where units are claimed.
#[derive(Clone, Copy)]
enum Side {
    Front,
    Back,
}

/// What runs a unit, and how many units there are.
type Task = (&'static (dyn Fn(usize) + Sync), u32);

/// One call's units, shared by its caller and its helpers.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Call {
    /// Whether a caller uses it.
    reserved: AtomicBool,
    /// Helpers inside (low half) and seats that are free (high half); no seats once the call is
    /// over.
    gate: AtomicU32,
    /// Units claimed from the front (low half) and from the back (high half).
    claims: AtomicU64,
    panicked: AtomicBool,
    /// What to do, and how many units: written by the caller while nobody is inside.
    task: UnsafeCell<Option<Task>>,
}

// SAFETY: `task` is written between `reserve` and the release of the gate's seats, when no helper
// is inside, and read by the caller and by helpers that have acquired a seat.
unsafe impl Sync for Call {}

const SEAT: u32 = 1 << 16;

/// How a call went.
struct Ended {
    /// Seats that nobody took.
    free: usize,
    /// Whether a helper panicked.
    panicked: bool,
}

impl Call {
    /// Takes the call for a caller, if nobody has it.
    fn reserve(&self) -> bool {
        !self.reserved.load(Ordering::Relaxed)
            && self
                .reserved
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }

    /// Lets up to `helpers` helpers in.
    ///
    /// # Safety
    /// The caller has reserved the call, and [`end`](Self::end)s it while `f` still lives.
    unsafe fn open(&self, f: &(dyn Fn(usize) + Sync), units: u32, helpers: usize) {
        // SAFETY: only the lifetime changes; nobody calls `f` after `end` has returned.
        let f = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f)
        };
        // SAFETY: the call is reserved and not open, so that nobody reads it.
        unsafe { *self.task.get() = Some((f, units)) };
        self.claims.store(0, Ordering::Relaxed);
        self.panicked.store(false, Ordering::Relaxed);
        let seats = helpers.min(usize::from(u16::MAX)) as u32;
        self.gate.store(seats * SEAT, Ordering::Release);
    }

    /// Closes the call, waits for the helpers inside and gives it back.
    fn end(&self) -> Ended {
        let inside = |gate: u32| gate % SEAT;
        let mut gate = self.gate.fetch_and(SEAT - 1, Ordering::AcqRel);
        let free = (gate / SEAT) as usize;
        let mut spins = 0u32;
        while inside(gate) > 0 {
            spins += 1;
            // A helper's last unit takes microseconds, unless the system runs something else.
            match spins {
                0..2000 => std::hint::spin_loop(),
                2000..2100 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
            gate = self.gate.load(Ordering::Acquire);
        }
        let panicked = self.panicked.load(Ordering::Relaxed);
        self.reserved.store(false, Ordering::Release);
        Ended { free, panicked }
    }

    /// Takes a seat and works, if there is one.
    fn help(&self) {
        let mut gate = self.gate.load(Ordering::Relaxed);
        loop {
            if gate < SEAT {
                return;
            }
            let taken = gate - SEAT + 1;
            match self.gate.compare_exchange_weak(gate, taken, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => break,
                Err(now) => gate = now,
            }
        }
        if catch_unwind(AssertUnwindSafe(|| self.work(Side::Back))).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        self.gate.fetch_sub(1, Ordering::Release);
    }

    /// Claims and runs units until there are none. A panic leaves none to claim.
    fn work(&self, side: Side) {
        // SAFETY: the caller, or a helper with a seat; the task does not change while it is inside.
        let Some((f, units)) = (unsafe { *self.task.get() }) else { return };
        let step = match side {
            Side::Front => 1u64,
            Side::Back => 1 << 32,
        };
        let end = EndOnPanic(self, units);
        loop {
            let claims = self.claims.fetch_add(step, Ordering::Relaxed);
            let (front, back) = (claims as u32, (claims >> 32) as u32);
            if front.checked_add(back).is_none_or(|claimed| claimed >= units) {
                break;
            }
            f(match side {
                Side::Front => front,
                Side::Back => units - 1 - back,
            } as usize);
        }
        std::mem::forget(end);
    }
}

/// Claims all units of a call if it is dropped.
struct EndOnPanic<'a>(&'a Call, u32);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        self.0.claims.fetch_add(u64::from(self.1), Ordering::Relaxed);
    }
}

/// Which CPU a thread is on. Schedulers wake a thread where its waker is, and some leave it there
/// though other CPUs are idle: a helper that shares its caller's CPU is worse than none.
#[cfg(target_os = "linux")]
mod cpu {
    use std::mem::MaybeUninit;

    /// The CPU that runs this thread.
    pub(super) fn current() -> usize {
        // SAFETY: takes nothing.
        usize::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(usize::MAX)
    }

    /// Moves this thread to another CPU if it is on `cpu` and may run elsewhere; which CPUs it may
    /// run on is afterwards as it was.
    pub(super) fn leave(cpu: usize) {
        if current() != cpu || cpu >= libc::CPU_SETSIZE as usize {
            return;
        }
        let size = size_of::<libc::cpu_set_t>();
        let mut allowed = MaybeUninit::<libc::cpu_set_t>::zeroed();
        // SAFETY: the sets are as large as the calls are told; zero bits are a valid set.
        unsafe {
            if libc::sched_getaffinity(0, size, allowed.as_mut_ptr()) != 0 {
                return;
            }
            let allowed = allowed.assume_init();
            let mut others = allowed;
            libc::CPU_CLR(cpu, &mut others);
            if libc::CPU_COUNT(&others) > 0 && libc::sched_setaffinity(0, size, &others) == 0 {
                libc::sched_setaffinity(0, size, &allowed);
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod cpu {
    pub(super) fn current() -> usize {
        usize::MAX
    }

    pub(super) fn leave(_: usize) {}
}

impl fmt::Display for CpuDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let isa = Isa::detect().map_or("no instruction set", |isa| isa.isa().name());
        let threads = self.threads();
        write!(f, "cpu ({isa}, {threads} thread{})", if threads == 1 { "" } else { "s" })
    }
}

/// What a thread keeps for the units that it runs. A unit never runs inside another one, so the borrow is
/// free; a fresh scratch keeps that from being a promise.
pub(crate) fn with_scratch<S: Default, R>(
    scratch: &'static LocalKey<RefCell<S>>,
    f: impl FnOnce(&mut S) -> R,
) -> R {
    scratch.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => f(&mut scratch),
        Err(_) => f(&mut S::default()),
    })
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
    fn devices_are_the_same_by_pool_and_limit() {
        let pool = || Arc::new(rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap());
        let (a, b) = (pool(), pool());
        let limited = CpuDevice { limit: NonZeroUsize::new(1), ..CpuDevice::default() };
        let devices = [
            CpuDevice::default(),
            limited,
            CpuDevice::with_pool(a.clone()),
            CpuDevice::with_pool(b),
        ];
        for (i, one) in devices.iter().enumerate() {
            for (j, other) in devices.iter().enumerate() {
                assert_eq!(one.is_same(other), i == j, "{i}, {j}");
            }
        }
        assert!(devices[2].is_same(&CpuDevice::with_pool(a)));
    }

    #[test]
    fn helpers_that_are_at_other_work_are_replaced() {
        let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap());
        let device = CpuDevice::with_pool(pool);
        let helped = || {
            let caller = std::thread::current().id();
            let by_others = AtomicUsize::new(0);
            device.for_each(8, usize::MAX, &|_| {
                std::thread::sleep(Duration::from_millis(5));
                if std::thread::current().id() != caller {
                    by_others.fetch_add(1, Ordering::Relaxed);
                }
            });
            by_others.into_inner() > 0
        };
        // Enough of them are awake, and none comes.
        device.pool.as_ref().unwrap().team.awake.store(2, Ordering::Relaxed);
        assert!(!helped());
        assert!(helped());
    }

    #[test]
    fn a_device_is_shared_by_many_callers() {
        let device = CpuDevice::default();
        let sums: Vec<usize> = std::thread::scope(|scope| {
            let run = || {
                let mut total = 0;
                for _ in 0..200 {
                    let sum = AtomicUsize::new(0);
                    device.for_each(37, usize::MAX, &|unit| {
                        sum.fetch_add(unit, Ordering::Relaxed);
                    });
                    total += sum.into_inner();
                }
                total
            };
            let threads: Vec<_> = (0..2 * CALLS).map(|_| scope.spawn(run)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(sums.iter().all(|&sum| sum == 200 * 36 * 37 / 2), "{sums:?}");
    }

    #[test]
    fn calls_inside_calls_and_pools_run() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let count = AtomicUsize::new(0);
        let device = CpuDevice::default();
        let nested = || {
            device.for_each(5, usize::MAX, &|_| {
                device.for_each(7, usize::MAX, &|_| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
            });
        };
        nested();
        pool.install(nested);
        pool.scope(|scope| (0..4).for_each(|_| scope.spawn(|_| nested())));
        assert_eq!(count.into_inner(), 6 * 35);
    }

    #[test]
    fn a_panic_in_a_unit_reaches_the_caller_and_nothing_hangs() {
        for bad in [0, 50, 99] {
            let run = || {
                CpuDevice::default().for_each(100, usize::MAX, &|unit| assert_ne!(unit, bad));
            };
            assert!(catch_unwind(run).is_err());
        }
        every_unit_runs_once_on_any_pool();
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
