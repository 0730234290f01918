//! Every activation of every instruction set against its formula in f64, over all of f32.

use super::*;
use crate::cpu::isa::Supported;
use crate::cpu::runs::apply_activation;
use crate::cpu::simd::portable::F32x4;

const ACTIVATIONS: [Activation; 16] = [
    Activation::Relu,
    Activation::Relu6,
    Activation::Clip { lo: -1.5, hi: f32::INFINITY },
    Activation::LeakyRelu { alpha: 0.01 },
    Activation::Elu { alpha: 1.0 },
    Activation::Elu { alpha: 0.3 },
    Activation::Sigmoid,
    Activation::Tanh,
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::HardSigmoid,
    Activation::HardSwish,
    Activation::Softplus,
    Activation::Mish,
    Activation::Clip { lo: f32::NEG_INFINITY, hi: 2.5 },
];

/// `2/√π ∫₀^z exp(-t²) dt` subtracted from 1, for `z >= 0`: the series of positive terms
/// (Abramowitz and Stegun 7.1.6) where it loses little to the subtraction, else the continued
/// fraction (7.1.14).
fn erfc(z: f64) -> f64 {
    let scale = (-z * z).exp() / std::f64::consts::PI.sqrt();
    if z < 2.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..80 {
            term *= 2.0 * z * z / f64::from(2 * n + 1);
            sum += term;
        }
        1.0 - 2.0 * scale * sum
    } else {
        scale / (1..=150).rev().fold(z, |tail, n| z + f64::from(n) * 0.5 / tail)
    }
}

/// The formula, as PyTorch writes it.
fn exact(activation: Activation, x: f32) -> f64 {
    let x = f64::from(x);
    let clip = |x: f64, lo: f64, hi: f64| if x.is_nan() { x } else { x.max(lo).min(hi) };
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Relu => clip(x, 0.0, f64::INFINITY),
        Activation::Relu6 => clip(x, 0.0, 6.0),
        Activation::Clip { lo, hi } => clip(x, lo.into(), hi.into()),
        Activation::LeakyRelu { alpha } => {
            if x >= 0.0 {
                x
            } else {
                x * f64::from(alpha)
            }
        }
        Activation::Elu { alpha } => {
            if x > 0.0 {
                x
            } else {
                x.exp_m1() * f64::from(alpha)
            }
        }
        Activation::Sigmoid => sigmoid(x),
        Activation::Tanh => x.tanh(),
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu => {
            let half = 0.5 * erfc(x.abs() / std::f64::consts::SQRT_2);
            x * if x > 0.0 { 1.0 - half } else { half }
        }
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            x * sigmoid(2.0 * u)
        }
        Activation::HardSigmoid => clip(x + 3.0, 0.0, 6.0) / 6.0,
        Activation::HardSwish => x * clip(x + 3.0, 0.0, 6.0) / 6.0,
        Activation::Softplus => {
            if x > 20.0 {
                x
            } else {
                x.exp().ln_1p()
            }
        }
        Activation::Mish => x * x.exp().ln_1p().tanh(),
    }
}

/// The distance in units of the last place of `want`, the smallest subnormal at least.
fn ulps(got: f32, want: f64) -> f64 {
    if want.is_nan() || got.is_nan() {
        return if want.is_nan() && got.is_nan() { 0.0 } else { f64::INFINITY };
    }
    let rounded = want as f32;
    if f64::from(got) == want || (rounded.is_infinite() && got == rounded) {
        return 0.0;
    }
    let exponent = ((want.abs().to_bits() >> 52) as i32 - 1023).clamp(-126, 127);
    (f64::from(got) - want).abs() / f64::from(exponent - 23).exp2()
}

fn specials() -> Vec<f32> {
    let mut all = vec![f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)];
    let mut magnitudes = vec![0.0, f32::from_bits(1), f32::MIN_POSITIVE, f32::MAX, f32::INFINITY];
    magnitudes.extend([1e-30, 1e-10, 0.5, 1.0, 1.5, 2.5, 3.0, 6.0, 9.0, 10.0, 13.0, 14.0, 15.0]);
    magnitudes.extend([16.0, 20.0, 60.0, 87.0, 88.0, 89.0, 100.0, 103.0, 104.0, 110.0, 150.0]);
    for x in magnitudes {
        for x in [x.next_down(), x, x.next_up()] {
            all.extend([x, -x]);
        }
    }
    all
}

/// Applies an activation to a run, in one way among several.
type Apply = Box<dyn Fn(Activation, &mut [f32])>;

fn implementations() -> Vec<(String, Apply)> {
    let mut all: Vec<(String, Apply)> = Supported::all()
        .map(|isa| {
            let apply: Apply = Box::new(move |f, x: &mut [f32]| apply_activation(isa, f, x));
            (isa.isa().name().to_string(), apply)
        })
        .collect();
    let plain: Apply = Box::new(|f, x: &mut [f32]| {
        for x in x.chunks_mut(4) {
            let mut vector = [0.0; 4];
            vector[..x.len()].copy_from_slice(x);
            // SAFETY: one whole vector; plain Rust needs no instruction set.
            unsafe { apply::<F32x4>(f, vector.as_mut_ptr(), 1) };
            x.copy_from_slice(&vector[..x.len()]);
        }
    });
    all.push(("plain Rust".to_string(), plain));
    all
}

/// The worst error of each activation and implementation over every `stride`-th f32.
fn sweep(stride: usize) -> Vec<String> {
    let mut failures = Vec::new();
    let mut inputs = specials();
    inputs.extend((0..=u32::MAX).step_by(stride).map(f32::from_bits));
    for activation in ACTIVATIONS {
        let want: Vec<f64> = inputs.iter().map(|&x| exact(activation, x)).collect();
        for (name, apply) in implementations() {
            let mut got = inputs.clone();
            apply(activation, &mut got);
            let (mut normal, mut subnormal) = ((0.0, 0.0), (0.0, 0.0));
            for ((&x, &got), &want) in inputs.iter().zip(&got).zip(&want) {
                let err = ulps(got, want);
                let small = want.abs() < f64::from(f32::MIN_POSITIVE);
                let worst = if small { &mut subnormal } else { &mut normal };
                if err.is_nan() || err > worst.0 {
                    *worst = (err, x);
                }
            }
            let line = format!(
                "{activation:?} {name}: {:.2} ulp at {:e}; subnormal results {:.2} at {:e}",
                normal.0, normal.1, subnormal.0, subnormal.1
            );
            eprintln!("{line}");
            if !(normal.0 <= 4.0 && subnormal.0 <= 4.0) {
                failures.push(line);
            }
        }
    }
    failures
}

#[test]
fn activations_are_within_4_ulp() {
    let failures = sweep(8209);
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
#[ignore = "takes a minute: the bounds in the documentation come from it"]
fn activations_are_within_4_ulp_densely() {
    let failures = sweep(509);
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn infinities_follow_pytorch() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for (activation, low, high) in [
        (Activation::Relu, 0.0, inf),
        (Activation::Relu6, 0.0, 6.0),
        (Activation::LeakyRelu { alpha: 0.1 }, -inf, inf),
        (Activation::LeakyRelu { alpha: 0.0 }, nan, inf),
        (Activation::Elu { alpha: 0.5 }, -0.5, inf),
        (Activation::Sigmoid, 0.0, 1.0),
        (Activation::Tanh, -1.0, 1.0),
        (Activation::Silu, nan, inf),
        (Activation::Gelu, nan, inf),
        (Activation::GeluTanh, nan, inf),
        (Activation::HardSigmoid, 0.0, 1.0),
        (Activation::HardSwish, nan, inf),
        (Activation::Softplus, 0.0, inf),
        (Activation::Mish, nan, inf),
    ] {
        for (name, apply) in implementations() {
            let mut got = [-inf, inf, nan];
            apply(activation, &mut got);
            for (got, want) in got.into_iter().zip([low, high, nan]) {
                let same = got == want || (got.is_nan() && want.is_nan());
                assert!(same, "{activation:?} {name}: {got}, not {want}");
            }
        }
    }
}

#[test]
fn signed_zeros_pass() {
    for activation in [Activation::Tanh, Activation::Silu, Activation::Gelu, Activation::Relu] {
        for (name, apply) in implementations() {
            let mut got = [0.0, -0.0];
            apply(activation, &mut got);
            let bits = got.map(f32::to_bits);
            assert_eq!(bits, [0.0f32.to_bits(), (-0.0f32).to_bits()], "{activation:?} {name}");
        }
    }
}

#[test]
fn the_reference_erfc_is_right() {
    // Abramowitz and Stegun, table 7.1 and 7.3.
    for (z, want) in [
        (0.0, 1.0),
        (0.5, 0.479_500_122_186_953_5),
        (1.0, 0.157_299_207_050_285_13),
        (2.0, 0.004_677_734_981_047_266),
        (3.0, 2.209_049_699_858_544e-5),
        (5.0, 1.537_459_794_428_034_8e-12),
    ] {
        let err = (erfc(z) / want - 1.0).abs();
        assert!(err <= 1e-13, "erfc({z}): {err:e}");
    }
}
