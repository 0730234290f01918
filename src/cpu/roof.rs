//! The machine's ceilings, measured with the threads of a device.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::cost::Roof;
use crate::cpu::isa::Supported;
use crate::cpu::simd::{Simd, per_isa};
use crate::cpu::threads::CpuDevice;

/// Reads that run side by side in one thread: a single stream does not fill a core's share of the
/// memory's bandwidth.
const STREAMS: usize = 8;

/// The ceilings of a device for a problem of `bytes` bytes; measured once per size, in steps of a
/// quarter of an octave.
pub(crate) fn measure(device: &CpuDevice, isa: Supported, bytes: usize) -> Roof {
    static KNOWN: Mutex<BTreeMap<(&'static str, usize, usize), Roof>> = Mutex::new(BTreeMap::new());
    let threads = device.threads();
    let size = bytes.clamp(16 << 10, 128 << 20);
    let size = size.next_multiple_of(size.next_power_of_two() / 8);
    let key = (isa.isa().name(), size, threads);
    // A poisoned map is still a map of finished measurements.
    let known = || KNOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(roof) = known().get(&key) {
        return *roof;
    }
    let rounds = 20_000;
    let flops = (fma_rounds(isa, 1) * rounds * threads) as f64;
    let seconds = best(|| {
        device.for_each(threads, usize::MAX, &|_| {
            black_box(fma_rounds(isa, black_box(rounds)));
        });
    });
    let data = vec![1.0f32; size / size_of::<f32>()];
    let parts: Vec<&[f32]> = data.chunks(data.len().div_ceil(threads)).collect();
    let read = best(|| {
        device.for_each(parts.len(), usize::MAX, &|part| {
            black_box(read_streams(isa, black_box(parts[part])));
        });
    });
    let roof = Roof { flops_per_second: flops / seconds, bytes_per_second: size as f64 / read };
    known().insert(key, roof);
    roof
}

/// The best of as many runs as fit into some milliseconds.
fn best(mut run: impl FnMut()) -> f64 {
    run();
    let mut best = Duration::MAX;
    let begin = Instant::now();
    for i in 0.. {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
        if i >= 4 && begin.elapsed() > Duration::from_millis(5) {
            break;
        }
    }
    best.as_secs_f64().max(1e-9)
}

per_isa! {
    /// Runs independent chains of fused multiply-adds; gives the flops of one round.
    fn fma_rounds(rounds: usize) -> usize = chains;
}

#[inline(always)]
unsafe fn chains<V: Simd>(rounds: usize) -> usize {
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
        let mut out = [0.0f32; 16];
        x.into_iter().reduce(|x, y| x + y).unwrap_or(a).store(out.as_mut_ptr());
        black_box(out);
    }
    2 * CHAINS * V::LANES
}

per_isa! {
    /// Reads a run once, in several places at a time.
    fn read_streams(x: &[f32]) -> f32 = streams;
}

#[inline(always)]
unsafe fn streams<V: Simd>(x: &[f32]) -> f32 {
    let stream = x.len() / (STREAMS * V::LANES) * V::LANES;
    // SAFETY: the caller has V's instruction set; every read lies inside its stream.
    unsafe {
        let mut sums = [V::splat(0.0); STREAMS];
        for i in (0..stream).step_by(V::LANES) {
            for (s, sum) in sums.iter_mut().enumerate() {
                *sum = *sum + V::load(x.as_ptr().add(s * stream + i));
            }
        }
        let mut out = [0.0f32; 16];
        sums.into_iter().reduce(|x, y| x + y).unwrap_or(sums[0]).store(out.as_mut_ptr());
        out[0]
    }
}
