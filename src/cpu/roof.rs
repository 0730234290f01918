//! The machine's ceilings, measured with the threads of a device.
//!
//! They are the machine's, not a kernel's: whatever instruction set is forced, the strongest one is
//! measured.

use std::array;
use std::collections::BTreeMap;
use std::fmt;
use std::hint::{black_box, spin_loop};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::cost::Roof;
use crate::cpu::int8;
use crate::cpu::isa::Supported;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::avx512::{DotBf16, F32x16};
use crate::cpu::simd::{Simd, per_isa};
use crate::cpu::threads::CpuDevice;
use crate::dtype::DType;

/// What each thread reads at least; on any CPU it stays in the first cache.
const LEAST_BYTES: usize = 8 << 10;
/// What all threads read at most: no cache holds it.
const MOST_BYTES: usize = 256 << 20;
/// What a thread reads in one pass, in as many turns as that takes, so that the clock's own time
/// does not count: about 100 µs from L1.
const PASS_BYTES: usize = 20 << 20;
/// Rounds of [`fma_rounds`] in one pass: about 100 µs.
const PASS_ROUNDS: usize = 30_000;
/// How long a thread waits for the others before it lets them have its core.
const SPIN: Duration = Duration::from_micros(100);
/// How long threads wait until each has a core.
const PATIENCE: Duration = Duration::from_millis(50);
/// Passes of a sample, of which the fastest counts: the first finds its values out of cache.
const PASSES: usize = 3;

/// The ceilings of a device for a problem of `bytes` bytes; measured once per size, in steps of a
/// quarter of an octave.
pub(crate) fn measure(device: &CpuDevice, dtype: DType, bytes: usize) -> Roof {
    static KNOWN: Mutex<BTreeMap<(usize, usize, bool), Roof>> = Mutex::new(BTreeMap::new());
    let size = bytes.clamp(16 << 10, 128 << 20);
    let size = size.next_multiple_of(size.next_power_of_two() / 8);
    let products = Products::of(dtype);
    let key = (size, device.threads(), products == Products::Pairs);
    // A poisoned map is still a map of finished measurements.
    let known = || KNOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(roof) = known().get(&key) {
        return *roof;
    }
    let meter = Meter::new(device, products, size);
    let begin = Instant::now();
    let mut roof = meter.sample();
    for i in 1.. {
        roof = roof.max(meter.sample());
        if i >= 2 && begin.elapsed() > Duration::from_millis(5) {
            break;
        }
    }
    known().insert(key, roof);
    roof
}

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Products {
    F32,
    /// Pairs of bf16, which the CPU has instructions for.
    Pairs,
    /// Bytes.
    Int8,
}

impl Products {
    /// The fastest of a type's that the machine has.
    pub(crate) fn of(dtype: DType) -> Self {
        let pairs = dtype == DType::Bf16 && strongest().isa().multiplies_pairs();
        if pairs { Products::Pairs } else { Products::F32 }
    }
}

/// What is needed to measure the ceilings for one size again and again.
pub(crate) struct Meter {
    isa: Supported,
    products: Products,
    threads: usize,
    /// What the threads read, a part each, from `first` on: whole cache lines.
    data: Vec<f32>,
    first: usize,
    part: usize,
}

impl Meter {
    pub(crate) fn new(device: &CpuDevice, products: Products, bytes: usize) -> Self {
        let threads = device.threads().max(1);
        let part = (bytes.min(MOST_BYTES) / threads).max(LEAST_BYTES) / size_of::<f32>();
        let part = part.next_multiple_of(VECTORS * MOST_LANES);
        let isa = strongest();
        // Not zeros: a page of zeros may be shared, and sit in the first cache.
        let data = vec![1.0; threads * part + MOST_LANES];
        // Where it cannot be aligned, reading is a little slower.
        let first = data.as_ptr().align_offset(MOST_LANES * size_of::<f32>()).min(MOST_LANES);
        Meter { isa, products, threads, data, first, part }
    }

    /// Measures both ceilings now, in some milliseconds.
    pub(crate) fn sample(&self) -> Roof {
        let Meter { isa, products, threads, part, .. } = *self;
        let rounds = |rounds: usize| match products {
            Products::F32 => fma_rounds(isa, rounds),
            Products::Pairs => pair_rounds(isa, rounds),
            Products::Int8 => int8::peak_rounds(isa, rounds),
        };
        let flops = rounds(1) * PASS_ROUNDS;
        let multiply = |_| {
            black_box(rounds(black_box(PASS_ROUNDS)));
        };
        let turns = (PASS_BYTES / size_of::<f32>()).div_ceil(part);
        let bytes = turns * part * size_of::<f32>();
        let read = |run: fn(Supported, &[f32]) -> f32, thread: usize| {
            let mine = &self.data[self.first + thread * part..][..part];
            for _ in 0..turns {
                black_box(run(isa, black_box(mine)));
            }
        };
        // Caches give most to few streams, memory to many.
        let (two, eight) = (|thread| read(read_two, thread), |thread| read(read_eight, thread));
        let works: [Work<'_>; 3] = [(flops, &multiply), (bytes, &two), (bytes, &eight)];
        let [flops_per_second, two, eight] = rates(threads, works);
        Roof { flops_per_second, bytes_per_second: two.max(eight) }
    }
}

/// Without the data.
impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.threads * self.part * size_of::<f32>();
        write!(f, "cpu::Meter({bytes} bytes, {} threads)", self.threads)
    }
}

/// What a thread gets done, and what does it, given the thread's number.
type Work<'a> = (usize, &'a (dyn Fn(usize) + Sync));

/// What `threads` threads do of each work in a second, all at once: from the first start to the last
/// end, in the fastest of some passes.
///
/// The threads are made for it: helpers of a pool may sleep, and would be timed waking up.
fn rates<const N: usize>(threads: usize, works: [Work<'_>; N]) -> [f64; N] {
    let team = Team::default();
    let passes = |thread: usize| -> [[(Instant, Instant); PASSES]; N] {
        let mut meetings = 0;
        team.spread(thread == 0, &mut meetings);
        works.map(|(_, work)| {
            array::from_fn(|_| {
                team.meet(&mut meetings);
                let start = Instant::now();
                work(thread);
                (start, Instant::now())
            })
        })
    };
    let passes = &passes;
    let times = thread::scope(|scope| {
        let mut helpers = Vec::new();
        for helper in 1..threads {
            // The machine may have no more threads to give: fewer are measured.
            match thread::Builder::new().spawn_scoped(scope, move || passes(helper)) {
                Ok(helper) => helpers.push(helper),
                Err(_) => break,
            }
        }
        team.size.store(helpers.len() + 1, Ordering::Release);
        let mut times = vec![passes(0)];
        times.extend(helpers.into_iter().map(|helper| helper.join().expect("nothing panics")));
        times
    });
    array::from_fn(|work| {
        let seconds = |pass: usize| {
            let start = times.iter().map(|times| times[work][pass].0).min();
            let end = times.iter().map(|times| times[work][pass].1).max();
            start.zip(end).map_or(f64::INFINITY, |(start, end)| (end - start).as_secs_f64())
        };
        let fastest = (0..PASSES).map(seconds).fold(f64::INFINITY, f64::min);
        (times.len() * works[work].0) as f64 / fastest.max(1e-9)
    })
}

/// Threads that start together.
#[derive(Default)]
struct Team {
    /// Zero until it is known.
    size: AtomicUsize,
    /// Arrivals at all meetings so far.
    arrived: AtomicUsize,
    spread: AtomicBool,
}

impl Team {
    /// Waits for everybody; `meetings` counts those of the calling thread.
    fn meet(&self, meetings: &mut usize) {
        *meetings += 1;
        self.arrived.fetch_add(1, Ordering::AcqRel);
        let waiting = || {
            let size = self.size.load(Ordering::Acquire);
            size == 0 || self.arrived.load(Ordering::Acquire) < size * *meetings
        };
        let begin = Instant::now();
        while waiting() {
            spin_loop();
            // With fewer cores than threads, one that spins keeps another from arriving.
            if begin.elapsed() > SPIN {
                thread::yield_now();
            }
        }
    }

    /// Waits until every thread has a core to itself, or patience ends. A scheduler may start two
    /// threads on one core and leave them there for as long as a sample takes, with another idle.
    /// Threads that share a core meet no sooner than one of them has spun long enough to yield.
    fn spread(&self, leads: bool, meetings: &mut usize) {
        const MEETINGS: u32 = 20;
        let start = Instant::now();
        while !self.spread.load(Ordering::Acquire) {
            let begin = Instant::now();
            (0..MEETINGS).for_each(|_| self.meet(meetings));
            if leads && (begin.elapsed() < MEETINGS * SPIN / 4 || start.elapsed() > PATIENCE) {
                self.spread.store(true, Ordering::Release);
            }
            // Nobody looks before the leader has decided.
            self.meet(meetings);
        }
    }
}

fn strongest() -> Supported {
    Supported::all().last().expect("the portable instruction set is always there")
}

/// As [`fma_rounds`], of products of pairs of bf16. The CPU has them.
fn pair_rounds(isa: Supported, rounds: usize) -> usize {
    debug_assert!(isa.isa().multiplies_pairs());
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the caller's promise.
        unsafe { pair_chains(rounds) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    fma_rounds(isa, rounds)
}

/// # Safety
/// The CPU has AVX512-BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16")]
unsafe fn pair_chains(rounds: usize) -> usize {
    const CHAINS: usize = 12;
    // SAFETY: this function has the target features.
    unsafe {
        // Ones in both halves: what is added stays small beside what an f32 can hold.
        let ones = f32::from_bits(0x3f80_3f80);
        let (a, b) = (F32x16::splat(black_box(ones)), F32x16::splat(black_box(ones)));
        let mut x = [F32x16::splat(1.0); CHAINS];
        for _ in 0..rounds {
            for x in &mut x {
                *x = x.dot_bf16(a, b);
            }
        }
        let mut out = [0.0f32; MOST_LANES];
        x.into_iter().reduce(|x, y| x + y).unwrap_or(a).store(out.as_mut_ptr());
        black_box(out);
    }
    4 * CHAINS * F32x16::LANES
}

per_isa! {
    /// Runs independent chains of fused multiply-adds; gives the flops of one round.
    fn fma_rounds(rounds: usize) -> usize = chains;
}

#[inline(always)]
unsafe fn chains<V: Simd>(rounds: usize) -> usize {
    // Enough for two units with a latency of up to six cycles, and with two operands still within
    // the sixteen registers of AVX2.
    const CHAINS: usize = 12;
    // SAFETY: the caller has V's instruction set.
    unsafe {
        let (a, b) = (V::splat(black_box(0.999)), V::splat(black_box(1e-3)));
        let mut x = [V::splat(1.0); CHAINS];
        for _ in 0..rounds {
            for x in &mut x {
                *x = x.mul_add(a, b);
            }
        }
        let mut out = [0.0f32; MOST_LANES];
        x.into_iter().reduce(|x, y| x + y).unwrap_or(a).store(out.as_mut_ptr());
        black_box(out);
    }
    2 * CHAINS * V::LANES
}

/// Lanes of the widest vector.
const MOST_LANES: usize = 16;
/// Vectors that are read in one step, over all streams.
const VECTORS: usize = 8;

per_isa! {
    /// Reads a run once, in two places at a time.
    fn read_two(x: &[f32]) -> f32 = two_streams;
    /// Reads a run once, in eight places at a time.
    fn read_eight(x: &[f32]) -> f32 = eight_streams;
}

#[inline(always)]
unsafe fn two_streams<V: Simd>(x: &[f32]) -> f32 {
    // SAFETY: the caller has V's instruction set.
    unsafe { streams::<V, 2, { VECTORS / 2 }>(x) }
}

#[inline(always)]
unsafe fn eight_streams<V: Simd>(x: &[f32]) -> f32 {
    // SAFETY: the caller has V's instruction set.
    unsafe { streams::<V, 8, { VECTORS / 8 }>(x) }
}

/// Reads whole steps only: all of a length that [`VECTORS`] vectors divide.
#[inline(always)]
unsafe fn streams<V: Simd, const STREAMS: usize, const RUN: usize>(x: &[f32]) -> f32 {
    let step = RUN * V::LANES;
    let stream = x.len() / STREAMS / step * step;
    // SAFETY: the caller has V's instruction set; every read lies inside its stream.
    unsafe {
        let mut sums = [[V::splat(0.0); RUN]; STREAMS];
        for i in (0..stream).step_by(step) {
            for (s, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = *sum + V::load(x.as_ptr().add(s * stream + i + v * V::LANES));
                }
            }
        }
        let mut out = [0.0f32; MOST_LANES];
        sums.into_iter().flatten().fold(V::splat(0.0), |x, y| x + y).store(out.as_mut_ptr());
        out[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_starts_when_all_threads_are_there() {
        for threads in [1, 2, 5] {
            let calls: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            // A thread that panicked would keep the others waiting.
            let early = AtomicUsize::new(0);
            let work = |thread: usize| {
                let pass = calls[thread].fetch_add(1, Ordering::AcqRel);
                if calls.iter().any(|calls| calls.load(Ordering::Acquire) < pass) {
                    early.fetch_add(1, Ordering::AcqRel);
                }
            };
            let [rate] = rates(threads, [(1, &work)]);
            assert_eq!(early.into_inner(), 0);
            assert!(rate.is_finite() && rate > 0.0, "{rate}");
            assert!(calls.iter().all(|calls| calls.load(Ordering::Acquire) == PASSES));
        }
    }

    #[test]
    fn all_that_is_counted_is_read() {
        for isa in Supported::all() {
            let len = 3 * VECTORS * MOST_LANES;
            for read in [read_two, read_eight] {
                // Lane 0 of the sum has its share of every vector, whatever the width.
                let ones = read(isa, &vec![1.0; len]);
                assert_eq!(len as f32 % ones, 0.0);
                assert!([4.0, 8.0, 16.0].contains(&(len as f32 / ones)), "{isa:?}: {ones}");
            }
        }
    }

    #[test]
    fn tiny_and_empty_problems_have_a_roof() {
        let mut device = CpuDevice::default();
        device.limit_threads(2);
        for bytes in [0, 1, 100_000] {
            for products in [Products::of(DType::Bf16), Products::F32, Products::Int8] {
                let Roof { flops_per_second, bytes_per_second } =
                    Meter::new(&device, products, bytes).sample();
                assert!(flops_per_second > 0.0 && bytes_per_second > 0.0);
            }
        }
    }
}
