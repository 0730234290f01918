//! Floating-point formats and roundings that the host's types do not have.
//!
//! Everything is derived from one routine, [`round_to`], which rounds an exact value given as
//! the sum of two f64 (a result and its rounding error) to any binary format.

use std::sync::LazyLock;

/// Rounding modes of PTX arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// To nearest, ties to even.
    Nearest,
    /// To nearest, ties away from zero.
    Away,
    /// Towards zero.
    Zero,
    /// Towards minus infinity.
    Down,
    /// Towards plus infinity.
    Up,
}

/// A binary floating-point format: exponent and stored mantissa bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    exponent: u32,
    mantissa: u32,
}

/// IEEE half.
pub const F16: Format = Format { exponent: 5, mantissa: 10 };
/// The upper half of an f32.
pub const BF16: Format = Format { exponent: 8, mantissa: 7 };
/// 19 bits of an f32.
pub const TF32: Format = Format { exponent: 8, mantissa: 10 };
/// IEEE single.
pub const F32: Format = Format { exponent: 8, mantissa: 23 };

/// Rounds `x` with the rest `rest` (|rest| at most half an ulp of x) so that the lost part shows
/// in the last bit: a later rounding to a shorter format is then correct ("round to odd").
fn to_odd(x: f64, rest: f64) -> f64 {
    if rest == 0.0 || !x.is_finite() || x.to_bits() & 1 == 1 {
        return x;
    }
    if (rest > 0.0) == (x > 0.0 || x == 0.0 && rest > 0.0) {
        f64::from_bits(x.to_bits() + 1)
    } else {
        f64::from_bits(x.to_bits() - 1)
    }
}

/// The sum of two f64 and its exact rounding error.
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let s = a + b;
    if !s.is_finite() {
        return (s, 0.0);
    }
    let bb = s - a;
    (s, (a - (s - bb)) + (b - bb))
}

/// `a * b + c` of values with at most 24 significant bits, rounded to odd in f64.
pub fn fma_odd(a: f64, b: f64, c: f64) -> f64 {
    let (s, e) = two_sum(a * b, c);
    to_odd(s, e)
}

/// `2^exponent`, of those that a normal f64 has.
pub fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// Rounds `x` to `format` and returns the bits, right-aligned.
pub fn round_to(x: f64, format: Format, mode: Round) -> u32 {
    let Format { exponent, mantissa } = format;
    let sign = u32::from(x.is_sign_negative()) << (exponent + mantissa);
    let infinity = ((1 << exponent) - 1) << mantissa;
    if x.is_nan() {
        // The canonical NaN of PTX has no sign and all mantissa bits.
        return infinity | ((1 << mantissa) - 1);
    }
    if x.is_infinite() {
        return sign | infinity;
    }
    if x == 0.0 {
        return sign;
    }
    let bias = (1_i32 << (exponent - 1)) - 1;
    let bits = x.to_bits();
    // f64 subnormals are far below every target format.
    let e = (((bits >> 52) & 0x7ff) as i32).max(1) - 1023;
    let significand = (bits & ((1 << 52) - 1)) | (u64::from((bits >> 52) & 0x7ff != 0) << 52);
    let lowest = 1 - bias;
    // Bits of the f64 significand that the format cannot hold.
    let drop = (52 - mantissa as i32) + (lowest - e).max(0);
    let (kept, rest, half) = if drop > 60 {
        (0, 1, 2)
    } else {
        (significand >> drop, significand & ((1 << drop) - 1), 1_u64 << (drop - 1))
    };
    let up = match mode {
        Round::Nearest => rest > half || rest == half && kept & 1 == 1,
        Round::Away => rest >= half,
        Round::Zero => false,
        Round::Down => rest != 0 && sign != 0,
        Round::Up => rest != 0 && sign == 0,
    };
    let kept = kept + u64::from(up);
    // Adding the significand (hidden bit included) to the biased exponent minus one carries
    // correctly both out of the subnormals and into the next binade.
    let biased = (e.max(lowest) + bias - 1) as u64;
    let out = (biased << mantissa) + kept;
    if out >= u64::from(infinity) {
        let to_infinity = match mode {
            Round::Nearest | Round::Away => true,
            Round::Zero => false,
            Round::Down => sign != 0,
            Round::Up => sign == 0,
        };
        return sign | if to_infinity { infinity } else { infinity - 1 };
    }
    sign | out as u32
}

/// The value of `bits` in `format`.
pub fn widen(bits: u32, format: Format) -> f64 {
    let Format { exponent, mantissa } = format;
    let negative = bits >> (exponent + mantissa) & 1 == 1;
    let e = bits >> mantissa & ((1 << exponent) - 1);
    let m = f64::from(bits & ((1 << mantissa) - 1));
    let bias = (1_i32 << (exponent - 1)) - 1;
    let scale = |e: i32| f64::from_bits(((e + 1023) as u64) << 52);
    let magnitude = if e == (1 << exponent) - 1 {
        if m == 0.0 { f64::INFINITY } else { f64::NAN }
    } else if e == 0 {
        m * scale(1 - bias - mantissa as i32)
    } else {
        (m + f64::from(1_u32 << mantissa)) * scale(e as i32 - bias - mantissa as i32)
    };
    if negative { -magnitude } else { magnitude }
}

/// Floats of eight bits, which saturate: of their NaNs, arithmetic makes `0x7f`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8 {
    /// No infinities; all bits but the sign's set are the only NaN. At most 448.
    E4M3,
    /// As IEEE formats are. Finite up to 57344.
    E5M2,
}

impl Fp8 {
    /// `e4m3` or `e5m2`.
    pub fn parse(name: &str) -> Option<Fp8> {
        match name {
            "e4m3" => Some(Fp8::E4M3),
            "e5m2" => Some(Fp8::E5M2),
            _ => None,
        }
    }

    /// Exponent of the least normal number, bits of the mantissa, the greatest number.
    fn format(self) -> (i32, i32, f64) {
        match self {
            Fp8::E4M3 => (-6, 3, 448.0),
            Fp8::E5M2 => (-14, 2, 57344.0),
        }
    }

    /// The value of some bits.
    pub fn widen(self, bits: u8) -> f64 {
        let (lowest, mantissa, _) = self.format();
        let magnitude = i32::from(bits & 0x7f);
        let (e, m) = (magnitude >> mantissa, magnitude & ((1 << mantissa) - 1));
        let value = match self {
            Fp8::E4M3 if magnitude == 0x7f => f64::NAN,
            Fp8::E5M2 if magnitude == 0x7c => f64::INFINITY,
            Fp8::E5M2 if magnitude > 0x7c => f64::NAN,
            _ if e == 0 => f64::from(m) * 2_f64.powi(lowest - mantissa),
            _ => f64::from(m + (1 << mantissa)) * 2_f64.powi(e - 1 + lowest - mantissa),
        };
        if bits > 0x7f { -value } else { value }
    }

    /// The values of all bits.
    pub fn values(self) -> &'static [f32; 256] {
        static VALUES: [LazyLock<[f32; 256]>; 2] = [
            LazyLock::new(|| std::array::from_fn(|bits| Fp8::E4M3.widen(bits as u8) as f32)),
            LazyLock::new(|| std::array::from_fn(|bits| Fp8::E5M2.widen(bits as u8) as f32)),
        ];
        &VALUES[self as usize]
    }

    /// The bits of the nearest value, ties to even; what is beyond the greatest becomes that.
    pub fn narrow(self, x: f64) -> u8 {
        let (lowest, mantissa, greatest) = self.format();
        if x.is_nan() {
            return 0x7f;
        }
        let sign = u8::from(x.is_sign_negative()) << 7;
        let magnitude = x.abs().min(greatest);
        // f64 subnormals are far below.
        let e = ((magnitude.to_bits() >> 52) as i32 - 1023).max(lowest);
        let steps = (magnitude * 2_f64.powi(mantissa - e)).round_ties_even() as i32;
        // The hidden bit, or a carry, goes into the exponent.
        sign | (((e - lowest) << mantissa) + steps) as u8
    }
}

/// f16 bits to f32.
#[inline(always)]
pub fn f16_to_f32(bits: u32) -> f32 {
    let sign = (bits & 0x8000) << 16;
    let magnitude = (bits & 0x7fff) << 13;
    if magnitude >= 0x0f80_0000 {
        // Infinities and NaNs.
        return f32::from_bits(sign | 0x7f80_0000 | magnitude);
    }
    // The exponent's bias differs by 112; the product also normalises subnormals, exactly.
    let scale = f32::from_bits((127 + 112) << 23);
    f32::from_bits((f32::from_bits(magnitude) * scale).to_bits() | sign)
}

/// bf16 bits to f32.
pub fn bf16_to_f32(bits: u32) -> f32 {
    f32::from_bits(bits << 16)
}

/// Replaces a subnormal by a zero of the same sign.
pub fn flush(x: f32) -> f32 {
    if x.is_subnormal() { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}

/// f16 bits to f32, subnormals to a zero of the same sign.
pub fn flush_f16(bits: u32) -> f32 {
    let subnormal = bits & 0x7c00 == 0;
    f16_to_f32(if subnormal { bits & 0x8000 } else { bits })
}

/// `a + b` with a directed rounding.
pub fn add_f32(a: f32, b: f32, mode: Round) -> f32 {
    directed(1.0, a, b, mode)
}

/// `a * b` with a directed rounding.
pub fn mul_f32(a: f32, b: f32, mode: Round) -> f32 {
    // The product of two f32 is exact in f64 (apart from its underflow, which cannot happen:
    // the smallest is 2^-298).
    f32::from_bits(round_to(f64::from(a) * f64::from(b), F32, mode))
}

/// `a * b + c` with a directed rounding.
pub fn fma_f32(a: f32, b: f32, c: f32, mode: Round) -> f32 {
    directed(a, b, c, mode)
}

fn directed(a: f32, b: f32, c: f32, mode: Round) -> f32 {
    let product = f64::from(a) * f64::from(b);
    let x = fma_odd(f64::from(a), f64::from(b), f64::from(c));
    if x == 0.0 {
        // An exact zero from opposite signs is negative only when rounding down.
        let same = product.is_sign_negative() == c.is_sign_negative();
        return match (same, mode) {
            (true, _) => x as f32,
            (false, Round::Down) => -0.0,
            (false, _) => 0.0,
        };
    }
    f32::from_bits(round_to(x, F32, mode))
}

/// Rounds to an integral value.
pub fn integral(x: f64, mode: Round) -> f64 {
    match mode {
        Round::Nearest => x.round_ties_even(),
        Round::Away => x.round(),
        Round::Zero => x.trunc(),
        Round::Down => x.floor(),
        Round::Up => x.ceil(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_round_trips() {
        for format in [F16, BF16] {
            for bits in 0..=0xffff_u32 {
                let x = widen(bits, format);
                if !x.is_nan() {
                    assert_eq!(round_to(x, format, Round::Nearest), bits, "{format:?} {bits:#x}");
                }
            }
        }
    }

    #[test]
    fn every_float_of_eight_bits_round_trips() {
        for (fp8, nans) in [(Fp8::E4M3, 2), (Fp8::E5M2, 6)] {
            let mut found = 0;
            for bits in 0..=0xff_u8 {
                let x = fp8.widen(bits);
                if x.is_nan() {
                    found += 1;
                } else if x.is_finite() {
                    assert_eq!(fp8.narrow(x), bits, "{fp8:?} {bits:#x}");
                }
            }
            assert_eq!(found, nans);
        }
        // Of E5M2, the upper half of an f16.
        for bits in 0..=0xff_u8 {
            let (x, half) = (Fp8::E5M2.widen(bits), widen(u32::from(bits) << 8, F16));
            assert!(x == half || x.is_nan() && half.is_nan(), "{bits:#x}");
        }
        assert_eq!(
            [0x7e, 0x38, 0x08, 0x01].map(|bits| Fp8::E4M3.widen(bits)),
            [448.0, 1.0, 2_f64.powi(-6), 2_f64.powi(-9)]
        );
    }

    #[test]
    fn the_fast_widening_of_halves_agrees() {
        for bits in 0..=0xffff_u32 {
            let (fast, slow) = (f16_to_f32(bits), widen(bits, F16));
            assert!(f64::from(fast) == slow || fast.is_nan() && slow.is_nan(), "{bits:#x}");
            assert!(fast.is_nan() || fast.is_sign_negative() == slow.is_sign_negative());
        }
    }

    #[test]
    fn nearest_agrees_with_the_host() {
        let mut state = 1_u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let x = f64::from_bits(state ^ (state >> 29));
            if !x.is_nan() {
                assert_eq!(round_to(x, F32, Round::Nearest), (x as f32).to_bits(), "{x:e}");
            }
        }
    }

    #[test]
    fn directed_modes_bracket() {
        assert_eq!(add_f32(1.0, 1e-20, Round::Up), 1.0 + f32::EPSILON);
        assert_eq!(add_f32(1.0, 1e-20, Round::Down), 1.0);
        assert_eq!(add_f32(1.0, -1e-20, Round::Zero), 1.0 - f32::EPSILON / 2.0);
        assert_eq!(mul_f32(f32::MAX, 2.0, Round::Zero), f32::MAX);
        assert_eq!(fma_f32(f32::MAX, 2.0, 0.0, Round::Nearest), f32::INFINITY);
        assert!(add_f32(1.0, -1.0, Round::Down).is_sign_negative());
        assert!(fma_f32(1.0, 1.0, -1.0, Round::Nearest).is_sign_positive());
    }

    #[test]
    fn ties() {
        // 1 + 2^-11 lies halfway between two halves, 1 + 3 * 2^-11 too.
        assert_eq!(round_to(1.0 + 2_f64.powi(-11), F16, Round::Nearest), 0x3c00);
        assert_eq!(round_to(1.0 + 3.0 * 2_f64.powi(-11), F16, Round::Nearest), 0x3c02);
        assert_eq!(round_to(1.0 + 2_f64.powi(-11), F16, Round::Away), 0x3c01);
        assert_eq!(round_to(65520.0, F16, Round::Nearest), 0x7c00);
        assert_eq!(round_to(65520.0, F16, Round::Zero), 0x7bff);
        assert_eq!(round_to(2_f64.powi(-25), F16, Round::Nearest), 0);
        assert_eq!(round_to(1.5 * 2_f64.powi(-25), F16, Round::Nearest), 1);
    }
}
