//! Kernels as nvcc compiled them, run as they are: right results, no false alarm.

mod common;

use common::{GEMM, GEMM_BF16, Gpu, MIXED, gemm, gemm_bf16, integers};
use cuda::exec::Machine;

#[test]
fn f32_products_are_exact_at_ragged_sizes_and_any_seed() {
    for (m, n, k) in [(64, 64, 16), (1, 1, 1), (97, 131, 83), (65, 63, 17), (7, 200, 33)] {
        for seed in 1..4 {
            gemm(GEMM, m, n, k, Machine { seed, ..Machine::default() })
                .unwrap_or_else(|f| panic!("{}", f.text));
        }
    }
}

#[test]
fn bf16_products_are_exact_at_ragged_sizes_and_any_seed() {
    for (m, n, k) in [(64, 64, 32), (1, 8, 8), (97, 136, 88), (65, 64, 40), (7, 200, 264)] {
        for seed in 1..4 {
            gemm_bf16(GEMM_BF16, m, n, k, Machine { seed, ..Machine::default() })
                .unwrap_or_else(|f| panic!("{}", f.text));
        }
    }
}

#[test]
fn activations_agree_with_the_host() {
    let mut gpu = Gpu::new(MIXED);
    let n = 77_usize;
    let src: Vec<f32> = (0..n).map(|i| (i as f32 - 38.0) / 7.0).collect();
    let (ps, pd) = (gpu.upload(&src), gpu.empty(n * 40));
    let alpha = 0.7_f32;
    let mut params = Vec::new();
    params.extend(ps.to_le_bytes());
    params.extend(pd.to_le_bytes());
    params.extend((n as i32).to_le_bytes());
    params.extend(alpha.to_le_bytes());
    params.extend([1_i32, 0, 0, 0].iter().flat_map(|x| x.to_le_bytes()));
    gpu.launch_bytes("activations", [3, 1, 1], [32, 1, 1], 0, &params)
        .unwrap_or_else(|f| panic!("{}", f.text));
    let found = gpu.floats(pd, n * 10);
    for kind in 0..10 {
        for (i, &x) in src.iter().enumerate() {
            let x = f64::from(x);
            let a = f64::from(alpha);
            let want = match (kind + 1) % 10 {
                0 => x.max(0.0),
                1 => x / (1.0 + (-x).exp()),
                2 => x.tanh(),
                3 => 0.5 * x * (1.0 + erf(x * 0.5_f64.sqrt())),
                4 => {
                    if x > 0.0 {
                        x
                    } else {
                        a * x.exp_m1()
                    }
                }
                5 => x.exp().ln_1p(),
                6 => (x + 3.0).clamp(0.0, 6.0) / 6.0 * x,
                7 => x.abs().sqrt() + 1.0 / (x.abs() + 1.0).sqrt(),
                8 => 2.0 * x,
                _ => x.abs().powf(a),
            };
            let found = f64::from(found[kind * n + i]);
            let tolerance = if (kind + 1) % 10 == 8 { 0.006 } else { 2e-6 };
            let fits = (found - want).abs() <= tolerance * want.abs().max(0.1);
            assert!(fits, "kind {} of {x}: {found} instead of {want}", (kind + 1) % 10);
        }
    }
}

/// Abramowitz and Stegun 7.1.6: a series that converges everywhere.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= 2.0 * x * x / (2.0 * f64::from(n) + 1.0);
        sum += term;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp()
}

#[test]
fn blocks_meet_through_fences_and_atomics() {
    let mut gpu = Gpu::new(MIXED);
    let src = integers(5000, 3);
    let (ps, pp, pd) = (gpu.upload(&src), gpu.empty(4 * 9), gpu.empty(4));
    for seed in 1..5 {
        gpu.machine.seed = seed;
        gpu.launch("reduce", [9, 1, 1], [256, 1, 1], 0, &[(8, ps), (8, pp), (8, pd), (4, 5000)])
            .unwrap_or_else(|f| panic!("{}", f.text));
        assert_eq!(gpu.floats(pd, 1)[0], src.iter().sum::<f32>());
    }
}

#[test]
fn blocks_that_wait_for_each_other_finish() {
    let mut gpu = Gpu::new(MIXED);
    let (turn, dst) = (gpu.upload(&[0_i32]), gpu.upload(&[1_i32; 4]));
    gpu.launch("turnstile", [5, 1, 1], [64, 1, 1], 0, &[(8, turn), (8, dst)])
        .unwrap_or_else(|f| panic!("{}", f.text));
    let want = (0..5).fold(1_i32, |x, b| x * 3 + b);
    assert_eq!(gpu.words(dst, 4), vec![want as u32; 4]);
}

#[test]
#[ignore = "prints speeds; run it alone with --nocapture"]
fn speed() {
    for (name, checks) in [("checked", true), ("unchecked", false)] {
        let machine = Machine { checks, ..Machine::default() };
        for (kernel, run) in
            [("f32", gemm as fn(&str, usize, usize, usize, Machine) -> _), ("bf16", gemm_bf16)]
        {
            let ptx = if kernel == "f32" { GEMM } else { GEMM_BF16 };
            for size in [(256, 256, 256), (200, 264, 328)] {
                let (counters, time) = run(ptx, size.0, size.1, size.2, machine)
                    .unwrap_or_else(|f| panic!("{}", f.text));
                let macs = (size.0 * size.1 * size.2) as f64;
                println!(
                    "{kernel} {size:?} {name}: {:.1} M warp instructions/s, {:.0} MMAC/s, {time:.3} s",
                    counters.steps as f64 / time / 1e6,
                    macs / time / 1e6
                );
            }
        }
    }
}
