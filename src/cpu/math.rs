//! Activation functions over vectors.
//!
//! Each is within 4 ulp of the exact value of its formula at every f32, tails included; results
//! below the smallest normal number may be off by as many subnormal steps. NaN in gives NaN out,
//! infinities follow PyTorch's formulas (`x * 0` at `-inf` is NaN). The worst errors that
//! sweeps of up to every eleventh f32 found, in ulp: Mish 3.8, GELU 3.3, GELU (tanh) 2.8, SiLU 2.7,
//! softplus 2.6, tanh 2.5, hard-swish 2.5, sigmoid 2.3, ELU 1.5, hard-sigmoid 1.4, the others half
//! an ulp at most.
//!
//! Polynomials are minimax fits of our own (Remez). The tails keep their relative precision by
//! two means: what enters an exponential carries its rounding error along, and powers of two are
//! multiplied in last, so that no intermediate value is subnormal where the result is not.

use crate::cpu::simd::Simd;
use crate::stages::Activation;

mod slopes;

pub(crate) use slopes::{apply_slope, leaky};

/// Replaces `vectors` whole vectors at `data` by their activation.
///
/// # Safety
/// The CPU has `V`'s instruction set; `data` is valid for reads and writes of `vectors * LANES`
/// values.
#[inline(always)]
pub(crate) unsafe fn apply<V: Simd>(activation: Activation, data: *mut f32, vectors: usize) {
    macro_rules! sweep {
        (|$x:ident| $value:expr) => {
            for v in 0..vectors {
                let at = data.add(v * V::LANES);
                let $x = V::load(at);
                let value: V = $value;
                value.store(at);
            }
        };
    }
    // SAFETY: the vectors are inside the data.
    unsafe {
        match activation {
            Activation::Relu => sweep!(|x| x.max(x.like(0.0))),
            Activation::Relu6 => sweep!(|x| clip(x, 0.0, 6.0)),
            Activation::Clip { lo, hi } => sweep!(|x| clip(x, lo, hi)),
            Activation::LeakyRelu { alpha } => sweep!(|x| leaky_relu(x, x.like(alpha))),
            Activation::Elu { alpha } => sweep!(|x| elu(x, alpha)),
            Activation::Sigmoid => sweep!(|x| sigmoid(x)),
            Activation::Tanh => sweep!(|x| tanh(x)),
            Activation::Silu => sweep!(|x| times_sigmoid(x, x, x.like(0.0))),
            Activation::Gelu => sweep!(|x| gelu(x)),
            Activation::GeluTanh => sweep!(|x| gelu_tanh(x)),
            Activation::HardSigmoid => sweep!(|x| hard_sigmoid(x)),
            Activation::HardSwish => sweep!(|x| x * hard_sigmoid(x)),
            Activation::Softplus => sweep!(|x| softplus(x)),
            Activation::Mish => sweep!(|x| mish(x)),
        }
    }
}

/// `x` where `x >= 0`, else `alpha * x`.
#[inline(always)]
pub(crate) fn leaky_relu<V: Simd>(x: V, alpha: V) -> V {
    V::select(x.ge(x.like(0.0)), x, x * alpha)
}

#[inline(always)]
fn clip<V: Simd>(x: V, lo: f32, hi: f32) -> V {
    x.max(x.like(lo)).min(x.like(hi))
}

/// `Σ coefficients[i] * x^i`.
#[inline(always)]
fn polynomial<V: Simd, const N: usize>(x: V, coefficients: [f32; N]) -> V {
    let mut sum = x.like(coefficients[N - 1]);
    for &coefficient in coefficients[..N - 1].iter().rev() {
        sum = sum.mul_add(x, x.like(coefficient));
    }
    sum
}

/// `n` and `r` with `x + low = n * ln 2 + r` and `|r| <= ln 2 / 2`, rounding aside.
///
/// Cody and Waite's reduction: the high part of ln 2 has 15 bits, so that its product with `n`
/// is exact with and without a fused multiply-add.
#[inline(always)]
fn reduce<V: Simd>(x: V, low: V) -> (V, V) {
    const LN_2_HIGH: f32 = 0.693_145_75;
    const LN_2_LOW: f32 = (std::f64::consts::LN_2 - LN_2_HIGH as f64) as f32;
    let n = (x * std::f32::consts::LOG2_E).round();
    let r = n.mul_add(x.like(-LN_2_HIGH), x);
    (n, r + n.mul_add(x.like(-LN_2_LOW), low))
}

/// `exp(r) - 1` for `|r| <= ln 2 / 2`.
#[inline(always)]
fn expm1_reduced<V: Simd>(r: V) -> V {
    let tail = polynomial(r, [0.5, 0.166_665_43, 0.041_666_284, 0.008_366_611, 0.001_394_642_2]);
    (r * r).mul_add(tail, r)
}

/// `exp(x + low)` as `(1 + m) * 2^n`, for `x` at most 88; below -160 it is `exp(-160)`, which is
/// zero even times `2^80`.
#[inline(always)]
fn expm1_parts<V: Simd>(x: V, low: V) -> (V, V) {
    let (n, r) = reduce(x.max(x.like(-160.0)), low);
    (expm1_reduced(r), n)
}

/// [`expm1_parts`] as `m * 2^n`.
#[inline(always)]
fn exp_parts<V: Simd>(x: V, low: V) -> (V, V) {
    let (m, n) = expm1_parts(x, low);
    (m + 1.0, n)
}

/// `exp(x)` for `x` at most 88.
#[inline(always)]
fn exp<V: Simd>(x: V) -> V {
    let (m, n) = exp_parts(x, x.like(0.0));
    m.scale_exp2(n)
}

/// `exp(x) - 1` for `x` at most 88, -1 below -20.
#[inline(always)]
fn expm1<V: Simd>(x: V) -> V {
    let (n, r) = reduce(x.max(x.like(-20.0)), x.like(0.0));
    let power = x.like(1.0).scale_exp2(n);
    power.mul_add(expm1_reduced(r), power - 1.0)
}

#[inline(always)]
fn elu<V: Simd>(x: V, alpha: f32) -> V {
    let zero = x.like(0.0);
    V::select(x.gt(zero), x, expm1(x.min(zero)) * alpha)
}

/// `1 / (1 + e)` or `e / (1 + e)` with `e = exp(-|x|)`, which never overflows.
#[inline(always)]
fn sigmoid<V: Simd>(x: V) -> V {
    let e = exp(-x.abs());
    V::select(x.ge(x.like(0.0)), x.like(1.0), e) / (e + 1.0)
}

/// `t / (t + 2)` with `t = exp(2|x|) - 1`, which is 1 in f32 long before `|x| = 10`.
#[inline(always)]
fn tanh<V: Simd>(x: V) -> V {
    let t = expm1(x.abs().min(x.like(10.0)) * 2.0);
    (t / (t + 2.0)).copysign(x)
}

/// `x * sigmoid(v + low)`, where `v` has the sign of `x`.
#[inline(always)]
fn times_sigmoid<V: Simd>(x: V, v: V, low: V) -> V {
    let positive = v.ge(x.like(0.0));
    let (m, n) = expm1_parts(-v.abs(), V::select(positive, -low, low));
    let e = (m + 1.0).scale_exp2(n);
    let quotient = x.max(x.like(FLOOR)) / (e + 1.0);
    V::select(positive, quotient, times_exp(x, quotient, m, n))
}

/// A factor in place of `x` below it, where the exponential beside it has long made the product
/// zero: it keeps the product of `x` and an exponential that stopped falling at zero too.
const FLOOR: f32 = -160.0;

/// `factor * (1 + m) * 2^n` for negative `x`. The power of two comes last, since the exponential
/// alone may be subnormal; at -inf the result is NaN as in PyTorch, which multiplies by zero.
#[inline(always)]
fn times_exp<V: Simd>(x: V, factor: V, m: V, n: V) -> V {
    x.mul_add(x.like(0.0), factor.mul_add(m, factor).scale_exp2(n))
}

/// The Mills ratio's `a`, and `P`: see [`gelu`].
const MILLS_A: f32 = 2.5;
const MILLS_P: [f32; 10] = [
    0.706_656_63,
    -0.433_692_13,
    0.131_987_29,
    0.009_238_114,
    -0.016_389_929,
    -0.001_614_106_5,
    0.002_537_497_3,
    0.000_713_609_5,
    -0.000_326_298_03,
    -0.000_179_171_53,
];

/// `x * Φ(x)`. Near zero, `Φ(x) = 1/2 + x S(x²)`. Elsewhere `Φ(-t) = exp(-t²/2) R(t)`, where the
/// Mills ratio `R` is `P((t - a) / (t + a)) / (t + a)`: the form of Shepherd and Laframboise (1981)
/// for erfcx.
#[inline(always)]
fn gelu<V: Simd>(x: V) -> V {
    const S: [f32; 4] = [0.398_942_3, -0.066_489_94, 0.009_964_83, -0.001_131_108_6];
    // Beyond 15, Φ(-t) * t is zero.
    let t = x.abs().min(x.like(15.0));
    let (square, square_low) = t.mul_exact(t);
    let near_zero = x.mul_add(polynomial(square, S), x.like(0.5));

    // The quotient in two floats, since its error would count twice.
    let sum = t + MILLS_A;
    let inverse = x.like(1.0) / sum;
    let (one, one_low) = sum.mul_exact(inverse);
    let lost = (x.like(1.0) - one) - one_low - (t - (sum - MILLS_A)) * inverse;
    let inverse_low = inverse * lost;
    let q = (t - MILLS_A).mul_add(inverse_low, (t - MILLS_A) * inverse);
    let p = polynomial(q, MILLS_P);
    // t R(t), in two floats again.
    let (share, share_low) = t.mul_exact(inverse);
    let (product, product_low) = p.mul_exact(share);
    let product_low = p.mul_add(t.mul_add(inverse_low, share_low), product_low);
    let (m, n) = expm1_parts(square * -0.5, square_low * -0.5);
    let other_side = (product + product.mul_add(m, product_low)).scale_exp2(n);
    // `x * 0` is NaN at -inf, as in PyTorch.
    let elsewhere = V::select(x.ge(x.like(0.0)), x, x * 0.0) - other_side;
    V::select(x.like(0.5).gt(t), x * near_zero, elsewhere)
}

/// `x * sigmoid(2u)`, `u = √(2/π) (x + 0.044715 x³)`: the same function as with tanh. The
/// exponent is computed in two floats, since its absolute error is the result's relative error.
#[inline(always)]
fn gelu_tanh<V: Simd>(x: V) -> V {
    const LINEAR: f64 = 1.595_769_121_605_730_8; // 2 √(2/π)
    const CUBIC: f64 = LINEAR * 0.044_715;
    const fn halves(c: f64) -> (f32, f32) {
        (c as f32, (c - (c as f32) as f64) as f32)
    }
    let (linear, linear_low) = const { halves(LINEAR) };
    let (cubic, cubic_low) = const { halves(CUBIC) };
    // Beyond ±15 the sigmoid is 0 or 1.
    let t = clip(x, -15.0, 15.0);
    let (square, square_low) = t.mul_exact(t);
    let (scaled, scaled_low) = square.mul_exact(x.like(cubic));
    // Knuth's two-sum: either term may be the larger.
    let factor = scaled + linear;
    let part = factor - scaled;
    let lost = (scaled - (factor - part)) + (x.like(linear) - part);
    let factor_low =
        square.mul_add(x.like(cubic_low), square_low * cubic) + (scaled_low + linear_low) + lost;
    let (v, v_low) = t.mul_exact(factor);
    times_sigmoid(x, v, t.mul_add(factor_low, v_low))
}

#[inline(always)]
fn hard_sigmoid<V: Simd>(x: V) -> V {
    clip(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
}

/// `max(x, 0) + ln(1 + e)` with `e = exp(-|x|)` and `ln(1 + e) = 2 atanh(e / (2 + e))`. Above 20
/// the logarithm is below half an ulp of `x`, as PyTorch's threshold wants it.
#[inline(always)]
fn softplus<V: Simd>(x: V) -> V {
    let e = exp(-x.abs());
    let s = e / (e + 2.0);
    let y = s * s;
    let tail = polynomial(y, [0.666_664_1, 0.400_217_7, 0.279_978_63, 0.280_312_78]);
    let log = (s * y).mul_add(tail, s + s);
    x.max(x.like(0.0)) + log
}

/// `x * w / (w + 2)` with `w = u (u + 2)`, `u = exp(x)`: `tanh(ln(1 + u))` without the logarithm.
#[inline(always)]
fn mish<V: Simd>(x: V) -> V {
    // Beyond 20 the quotient is 1.
    let floored = x.max(x.like(FLOOR));
    let (m, n) = expm1_parts(floored.min(x.like(20.0)), x.like(0.0));
    let u = (m + 1.0).scale_exp2(n);
    let plus_two = u + 2.0;
    let w = u * plus_two;
    let positive = x.gt(x.like(0.0));
    let quotient = V::select(positive, w, plus_two) / (w + 2.0);
    V::select(positive, x * quotient, times_exp(x, floored * quotient, m, n))
}

#[cfg(test)]
mod tests;
