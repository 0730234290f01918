//! The derivatives of the activations, multiplied onto a gradient.
//!
//! Where there is none, PyTorch's choice: [`crate::reference::slope`], and NaN at an infinity where its
//! formula has 0 times it. Each factor is within some 1e-6 of the exact one, relative to 1.

use super::{clip, exp, polynomial, sigmoid};
use crate::cpu::simd::Simd;
use crate::stages::Activation;

/// `d = d * activation'(x)` for `vectors` whole vectors.
///
/// # Safety
/// The CPU has `V`'s instruction set; `x` is valid for reads, `d` for reads and writes of
/// `vectors * LANES` values.
#[inline(always)]
pub(crate) unsafe fn apply_slope<V: Simd>(
    activation: Activation,
    x: *const f32,
    d: *mut f32,
    vectors: usize,
) {
    macro_rules! sweep {
        (|$x:ident, $d:ident| $value:expr) => {
            for v in 0..vectors {
                let at = d.add(v * V::LANES);
                let ($x, $d) = (V::load(x.add(v * V::LANES)), V::load(at));
                let value: V = $value;
                value.store(at);
            }
        };
    }
    // SAFETY: the vectors are inside the data.
    unsafe {
        match activation {
            Activation::Relu => sweep!(|x, d| above(x, x.like(0.0), d)),
            Activation::Relu6 => sweep!(|x, d| inside(x, 0.0, 6.0, d)),
            Activation::Clip { lo, hi } => sweep!(|x, d| inside(x, lo, hi, d)),
            Activation::LeakyRelu { alpha } => sweep!(|x, d| leaky(x, x.like(alpha), d)),
            Activation::Elu { alpha } => sweep!(|x, d| {
                let zero = x.like(0.0);
                V::select(zero.ge(x), exp(x.min(zero)) * alpha * d, d)
            }),
            Activation::Sigmoid => sweep!(|x, d| sigmoid_slope(x) * d),
            Activation::Tanh => sweep!(|x, d| sigmoid_slope(x + x) * 4.0 * d),
            Activation::Silu => {
                sweep!(|x, d| sigmoid(x) * x.mul_add(sigmoid(-x), x.like(1.0)) * d)
            }
            Activation::Gelu => sweep!(|x, d| gelu(x) * d),
            Activation::GeluTanh => sweep!(|x, d| gelu_tanh(x) * d),
            Activation::HardSigmoid => sweep!(|x, d| inside(x, -3.0, 3.0, d * (1.0 / 6.0))),
            Activation::HardSwish => sweep!(|x, d| {
                let within = x.mul_add(x.like(1.0 / 3.0), x.like(0.5)) * d;
                above(x, x.like(-3.0), V::select(x.like(3.0).gt(x), within, d))
            }),
            Activation::Softplus => {
                sweep!(|x, d| V::select(x.gt(x.like(20.0)), d, sigmoid(x) * d))
            }
            Activation::Mish => sweep!(|x, d| mish(x) * d),
        }
    }
}

/// `d` where `x > low` or is NaN, else zero.
#[inline(always)]
fn above<V: Simd>(x: V, low: V, d: V) -> V {
    V::select(low.ge(x), x.like(0.0), d)
}

#[inline(always)]
fn inside<V: Simd>(x: V, lo: f32, hi: f32, d: V) -> V {
    V::select(x.ge(x.like(hi)), x.like(0.0), above(x, x.like(lo), d))
}

/// `d` where `x > 0`, else `alpha * d`.
#[inline(always)]
pub(crate) fn leaky<V: Simd>(x: V, alpha: V, d: V) -> V {
    V::select(x.gt(x.like(0.0)), d, d * alpha)
}

/// What a formula that multiplies x by 0 has of it: a zero, or NaN.
#[inline(always)]
fn nan_if_infinite<V: Simd>(x: V) -> V {
    x * 0.0
}

/// `e / (1 + e)²` with `e = exp(-|x|)`.
#[inline(always)]
fn sigmoid_slope<V: Simd>(x: V) -> V {
    let e = exp(-x.abs());
    let sum = e + 1.0;
    e / (sum * sum)
}

/// `Φ(x) + x φ(x)`; Φ as in [`super::gelu`].
#[inline(always)]
fn gelu<V: Simd>(x: V) -> V {
    const S: [f32; 4] = [0.398_942_3, -0.066_489_94, 0.009_964_83, -0.001_131_108_6];
    let t = x.abs().min(x.like(15.0));
    let square = t * t;
    let power = exp(square * -0.5);
    let inverse = x.like(1.0) / (t + super::MILLS_A);
    let tail = polynomial((t - super::MILLS_A) * inverse, super::MILLS_P) * inverse * power;
    let beyond = V::select(x.ge(x.like(0.0)), x.like(1.0) - tail, tail);
    let near = x.mul_add(polynomial(square, S), x.like(0.5));
    let share = V::select(x.like(0.5).gt(t), near, beyond);
    (clip(x, -15.0, 15.0) * 0.398_942_3).mul_add(power, share) + nan_if_infinite(x)
}

/// `s + x s (1 - s) v'` with `s = sigmoid(v)`, `v = 2 √(2/π) (x + 0.044715 x³)`.
#[inline(always)]
fn gelu_tanh<V: Simd>(x: V) -> V {
    const LINEAR: f32 = 1.595_769;
    let infinite = nan_if_infinite(x);
    let x = clip(x, -15.0, 15.0);
    let square = x * x;
    let v = x * LINEAR * square.mul_add(x.like(0.044_715), x.like(1.0));
    let steepness = square.mul_add(x.like(3.0 * 0.044_715), x.like(1.0)) * LINEAR;
    (x * steepness).mul_add(sigmoid_slope(v), sigmoid(v)) + infinite
}

/// `t + x (1 - t²) sigmoid(x)` with `t = tanh(softplus(x)) = w / (w + 2)`, `w = u (u + 2)`,
/// `u = exp(x)`.
#[inline(always)]
fn mish<V: Simd>(x: V) -> V {
    // Beyond 20 the slope is 1.
    let infinite = nan_if_infinite(x);
    let x = x.min(x.like(20.0));
    let u = exp(x);
    let w = u * (u + 2.0);
    let sum = w + 2.0;
    let slope = (w + 1.0) * 4.0 / (sum * sum) * (u / (u + 1.0));
    x.mul_add(slope, w / sum) + infinite
}
