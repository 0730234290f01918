//! The machine's ceilings, measured on one thread and scaled by the threads of a device.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::cost::Roof;
use crate::cpu::isa::Supported;
use crate::cpu::runs;
use crate::cpu::simd::{Simd, per_isa};

/// One thread's ceilings for a problem of `bytes` bytes. Measured once per power of two.
pub(crate) fn measure(isa: Supported, bytes: usize) -> Roof {
    static KNOWN: Mutex<BTreeMap<(&'static str, usize), Roof>> = Mutex::new(BTreeMap::new());
    let class = bytes.clamp(16 << 10, 128 << 20).next_power_of_two();
    let key = (isa.isa().name(), class);
    // A poisoned map is still a map of finished measurements.
    let mut known = KNOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    *known.entry(key).or_insert_with(|| {
        let rounds = 20_000;
        let flops = fma_rounds(isa, 1) as f64;
        let seconds = best(|| {
            black_box(fma_rounds(isa, black_box(rounds)));
        });
        let data = vec![1.0f32; class / size_of::<f32>()];
        let read = best(|| {
            black_box(runs::sum(isa, black_box(&data)));
        });
        Roof {
            flops_per_second: flops * rounds as f64 / seconds,
            bytes_per_second: class as f64 / read,
        }
    })
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
