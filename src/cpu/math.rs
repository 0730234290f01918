//! Activation functions over vectors.
//!
//! Each is within 4 ulp of the exact value of its formula at every f32, tails included; results
//! below the smallest normal number may be off by as many subnormal steps. NaN in gives NaN out,
//! infinities follow PyTorch's formulas (`x * 0` at `-inf` is NaN).
//!
//! Polynomials are minimax fits of our own (Remez). The tails keep their relative precision by
//! two means: what enters an exponential carries its rounding error along, and powers of two are
//! multiplied in last, so that no intermediate value is subnormal where the result is not.

use crate::cpu::simd::{Baseline, Simd};
use crate::stages::Activation;

/// Replaces `vectors` whole vectors at `data` by their activation.
///
/// # Safety
/// The CPU has `V`'s instruction set; `data` is valid for reads and writes of `vectors * LANES`
/// values.
#[inline(always)]
pub(crate) unsafe fn apply<V: Simd>(activation: Activation, data: *mut f32, vectors: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match activation {
            Activation::Relu => sweep(data, vectors, |x: V| x.max(x.like(0.0))),
            Activation::Relu6 => sweep(data, vectors, |x: V| clip(x, 0.0, 6.0)),
            Activation::Clip { lo, hi } => sweep(data, vectors, |x: V| clip(x, lo, hi)),
            Activation::LeakyRelu { alpha } => {
                sweep(data, vectors, |x: V| leaky_relu(x, x.like(alpha)));
            }
            Activation::Elu { alpha } => sweep(data, vectors, |x: V| elu(x, alpha)),
            Activation::Sigmoid => sweep(data, vectors, sigmoid::<V>),
            Activation::Tanh => sweep(data, vectors, tanh::<V>),
            Activation::Silu => sweep(data, vectors, |x: V| times_sigmoid(x, x, x.like(0.0))),
            Activation::Gelu => sweep(data, vectors, gelu::<V>),
            Activation::GeluTanh => sweep(data, vectors, gelu_tanh::<V>),
            Activation::HardSigmoid => sweep(data, vectors, hard_sigmoid::<V>),
            Activation::HardSwish => sweep(data, vectors, |x: V| x * hard_sigmoid(x)),
            Activation::Softplus => sweep(data, vectors, softplus::<V>),
            Activation::Mish => sweep(data, vectors, mish::<V>),
        }
    }
}

/// One value through the portable vector.
pub(crate) fn activate(activation: Activation, x: f32) -> f32 {
    let mut lanes = [x; Baseline::LANES];
    // SAFETY: every CPU of this target has the baseline; `lanes` is one vector.
    unsafe { apply::<Baseline>(activation, lanes.as_mut_ptr(), 1) };
    lanes[0]
}

/// `x` where `x >= 0`, else `alpha * x`.
#[inline(always)]
pub(crate) fn leaky_relu<V: Simd>(x: V, alpha: V) -> V {
    V::select(x.ge(x.like(0.0)), x, x * alpha)
}

/// # Safety
/// As [`apply`].
#[inline(always)]
unsafe fn sweep<V: Simd>(data: *mut f32, vectors: usize, f: impl Fn(V) -> V) {
    for v in 0..vectors {
        // SAFETY: the vector is inside the data.
        unsafe {
            let at = data.add(v * V::LANES);
            f(V::load(at)).store(at);
        }
    }
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
    (n, n.mul_add(x.like(-LN_2_LOW), r + low))
}

/// `exp(r) - 1` for `|r| <= ln 2 / 2`.
#[inline(always)]
fn expm1_reduced<V: Simd>(r: V) -> V {
    let tail = polynomial(r, [0.5, 0.166_665_43, 0.041_666_284, 0.008_366_611, 0.001_394_642_2]);
    (r * r).mul_add(tail, r)
}

/// `exp(x + low)` as `m * 2^n`, for `x` at most 88; below -160 it is `exp(-160)`, which is zero
/// even times `2^80`.
#[inline(always)]
fn exp_parts<V: Simd>(x: V, low: V) -> (V, V) {
    let (n, r) = reduce(x.max(x.like(-160.0)), low);
    (expm1_reduced(r) + 1.0, n)
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

/// Exponentials are kept larger by this factor where they would be subnormal before they are
/// multiplied by a large `x`.
const LIFT_BITS: f32 = 24.0;
const LIFT: f32 = 16_777_216.0;

/// `x * sigmoid(v + low)`.
#[inline(always)]
fn times_sigmoid<V: Simd>(x: V, v: V, low: V) -> V {
    let positive = v.ge(x.like(0.0));
    let (m, n) = exp_parts(-v.abs(), V::select(positive, -low, low));
    let lifted = m.scale_exp2(n + LIFT_BITS);
    let e = lifted * (1.0 / LIFT);
    let one = x.like(1.0);
    let quotient = V::select(positive, one, lifted) / (e + 1.0);
    x * quotient * V::select(positive, one, x.like(1.0 / LIFT))
}

/// `x * Φ(x)`, where `Φ(-t) = exp(-t²/2) * R(t)` and `R`, the Mills ratio, is
/// `P((t - a) / (t + a)) / (t + a)`: the form of Shepherd and Laframboise (1981) for erfcx.
#[inline(always)]
fn gelu<V: Simd>(x: V) -> V {
    const A: f32 = 3.5;
    // Beyond 15, Φ(-t) * t is zero.
    let t = x.abs().min(x.like(15.0));
    let inverse = x.like(1.0) / (t + A);
    let p = polynomial(
        (t - A) * inverse,
        [
            0.744_416_06,
            -0.565_561_8,
            0.315_425_07,
            -0.116_053_07,
            0.017_406_27,
            0.006_493_246_6,
            -0.003_174_814_2,
            -0.000_494_978_3,
            0.000_421_169_16,
            0.000_110_286_94,
        ],
    );
    let ratio = p * inverse;
    let (square, low) = t.mul_exact(t);
    let (m, n) = exp_parts(square * -0.5, low * -0.5);
    let density = m.scale_exp2(n);
    let positive = x.ge(x.like(0.0));
    // The negative side multiplies by the density last, since the density alone is subnormal.
    let other = V::select(positive, x.like(1.0) - ratio * density, ratio);
    x * other * V::select(positive, x.like(1.0), density)
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
    let (m, n) = exp_parts(x.min(x.like(20.0)), x.like(0.0));
    let lifted = m.scale_exp2(n + LIFT_BITS);
    let u = lifted * (1.0 / LIFT);
    let plus_two = u + 2.0;
    let w = u * plus_two;
    let positive = x.gt(x.like(0.0));
    let quotient = V::select(positive, w, lifted * plus_two) / (w + 2.0);
    x * quotient * V::select(positive, x.like(1.0), x.like(1.0 / LIFT))
}
