//! Sixteen lanes, and eight with masks and thirty-two registers: AVX-512 F, VL, DQ and BW.

use super::{Simd, operators};
use crate::dtype::{bf16, f16};
use std::arch::x86_64::*;

/// Sixteen f32 lanes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32x16(__m512);

/// Eight f32 lanes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32x8(__m256);

/// The instructions of [`F32x16`].
mod wide {
    /// Words of every other half of thirty-one, and of zero.
    ///
    /// # Safety
    /// The CPU has AVX-512; those halves are readable.
    #[inline(always)]
    pub(super) unsafe fn load_even_16(src: *const i16) -> super::__m512i {
        // SAFETY: only what the mask names is read.
        unsafe { super::_mm512_maskz_loadu_epi16(0x5555_5555, src) }
    }

    pub(super) use std::arch::x86_64::{
        _mm256_loadu_si256 as loadu_16, _mm256_mask_storeu_epi16 as mask_storeu_16,
        _mm256_maskz_loadu_epi16 as maskz_loadu_16, _mm256_storeu_si256 as storeu_16,
        _mm512_add_epi32 as add_32, _mm512_and_si512 as and_32, _mm512_castps_si512 as to_bits,
        _mm512_castsi512_ps as from_bits, _mm512_cvtepi32_epi16 as low_16,
        _mm512_cvtepu16_epi32 as cvtepu16, _mm512_cvtph_ps as cvtph, _mm512_cvtps_ph as cvtps_ph,
        _mm512_mask_blend_epi32 as blend_32, _mm512_or_si512 as or_32,
        _mm512_set1_epi32 as set1_32, _mm512_slli_epi32 as slli, _mm512_srli_epi32 as srli,
    };
    pub(super) use std::arch::x86_64::{
        _mm512_add_ps as add, _mm512_and_ps as and, _mm512_andnot_ps as andnot,
        _mm512_cmp_ps_mask as cmp, _mm512_div_ps as div, _mm512_fmadd_ps as fmadd,
        _mm512_fmsub_ps as fmsub, _mm512_loadu_ps as loadu, _mm512_mask_blend_ps as blend,
        _mm512_mask_storeu_ps as mask_storeu, _mm512_maskz_loadu_ps as maskz_loadu,
        _mm512_max_ps as max, _mm512_min_ps as min, _mm512_mul_ps as mul, _mm512_or_ps as or,
        _mm512_permutex2var_ps as permutex2var, _mm512_roundscale_ps as roundscale,
        _mm512_scalef_ps as scalef, _mm512_set1_ps as set1, _mm512_shuffle_ps as shuffle,
        _mm512_storeu_ps as storeu, _mm512_sub_ps as sub, _mm512_unpackhi_ps as unpackhi,
        _mm512_unpacklo_ps as unpacklo, _mm512_xor_ps as xor,
    };
}

/// The instructions of [`F32x8`].
mod half {
    /// Words of every other half of fifteen, and of zero.
    ///
    /// # Safety
    /// The CPU has AVX-512; those halves are readable.
    #[inline(always)]
    pub(super) unsafe fn load_even_16(src: *const i16) -> super::__m256i {
        // SAFETY: only what the mask names is read.
        unsafe { super::_mm256_maskz_loadu_epi16(0x5555, src) }
    }

    pub(super) use std::arch::x86_64::{
        _mm_loadu_si128 as loadu_16, _mm_mask_storeu_epi16 as mask_storeu_16,
        _mm_maskz_loadu_epi16 as maskz_loadu_16, _mm_storeu_si128 as storeu_16,
        _mm256_add_epi32 as add_32, _mm256_and_si256 as and_32, _mm256_castps_si256 as to_bits,
        _mm256_castsi256_ps as from_bits, _mm256_cvtepi32_epi16 as low_16,
        _mm256_cvtepu16_epi32 as cvtepu16, _mm256_cvtph_ps as cvtph, _mm256_cvtps_ph as cvtps_ph,
        _mm256_mask_blend_epi32 as blend_32, _mm256_or_si256 as or_32,
        _mm256_set1_epi32 as set1_32, _mm256_slli_epi32 as slli, _mm256_srli_epi32 as srli,
    };
    pub(super) use std::arch::x86_64::{
        _mm256_add_ps as add, _mm256_and_ps as and, _mm256_andnot_ps as andnot,
        _mm256_cmp_ps_mask as cmp, _mm256_div_ps as div, _mm256_fmadd_ps as fmadd,
        _mm256_fmsub_ps as fmsub, _mm256_loadu_ps as loadu, _mm256_mask_blend_ps as blend,
        _mm256_mask_storeu_ps as mask_storeu, _mm256_maskz_loadu_ps as maskz_loadu,
        _mm256_max_ps as max, _mm256_min_ps as min, _mm256_mul_ps as mul, _mm256_or_ps as or,
        _mm256_permutex2var_ps as permutex2var, _mm256_roundscale_ps as roundscale,
        _mm256_scalef_ps as scalef, _mm256_set1_ps as set1, _mm256_shuffle_ps as shuffle,
        _mm256_storeu_ps as storeu, _mm256_sub_ps as sub, _mm256_unpackhi_ps as unpackhi,
        _mm256_unpacklo_ps as unpacklo, _mm256_xor_ps as xor,
    };
}

/// Four values of a row, and of the fourth, eighth and twelfth rows after it.
///
/// # Safety
/// The CPU has AVX-512; the values are readable.
#[inline(always)]
unsafe fn four_rows(src: *const f32, stride: usize) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let v = _mm512_castps128_ps512(_mm_loadu_ps(src));
        let v = _mm512_insertf32x4::<1>(v, _mm_loadu_ps(src.add(4 * stride)));
        let v = _mm512_insertf32x4::<2>(v, _mm_loadu_ps(src.add(8 * stride)));
        _mm512_insertf32x4::<3>(v, _mm_loadu_ps(src.add(12 * stride)))
    }
}

/// Four values of a row, and of the fourth row after it.
///
/// # Safety
/// The CPU has AVX-512; the values are readable.
#[inline(always)]
unsafe fn two_rows(src: *const f32, stride: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_castps128_ps256(_mm_loadu_ps(src));
        _mm256_insertf32x4::<1>(low, _mm_loadu_ps(src.add(4 * stride)))
    }
}

/// Where [`Simd::load_even`] finds its values: the even ones of a first vector, the odd ones of a
/// second.
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn sixteen_evens() -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31) }
}

/// As [`sixteen_evens`].
///
/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn eight_evens() -> __m256i {
    // SAFETY: the caller's promise.
    unsafe { _mm256_setr_epi32(0, 2, 4, 6, 9, 11, 13, 15) }
}

/// A vector as bf16: to the nearest, ties to even.
macro_rules! rounded {
    ($vector:expr, $ops:ident) => {{
        let bits = $ops::to_bits($vector.0);
        // Half of the last bit that stays, less one if that bit is even: ties go there.
        let odd = $ops::and_32($ops::srli::<16>(bits), $ops::set1_32(1));
        let rounded = $ops::add_32(bits, $ops::add_32(odd, $ops::set1_32(0x7fff)));
        let quiet = $ops::or_32(bits, $ops::set1_32(1 << 22));
        let nan = $ops::cmp::<_CMP_UNORD_Q>($vector.0, $vector.0);
        $ops::low_16($ops::srli::<16>($ops::blend_32(nan, rounded, quiet)))
    }};
}

/// Vectors of f32, each holding two bf16, that AVX512-BF16 multiplies.
pub(crate) trait DotBf16: Simd {
    /// The two bf16 of `pair` in every lane. (As integers: LLVM does not fold a broadcast of f32 into
    /// the multiplication, and by itself it takes a third of one's time.)
    ///
    /// # Safety
    /// As [`Simd::splat`].
    unsafe fn splat_pair(pair: i32) -> Self;

    /// `self + x.second * y.second + x.first * y.first`, in that order, subnormals taken for zero.
    ///
    /// # Safety
    /// The CPU has AVX512-BF16 and VL.
    unsafe fn dot_bf16(self, x: Self, y: Self) -> Self;

    /// As [`Simd::store_bf16`], in one instruction, which takes subnormals for zero.
    ///
    /// # Safety
    /// As there; the CPU has AVX512-BF16 and VL.
    unsafe fn store_normal_bf16(self, dst: *mut bf16);

    /// As [`store_normal_bf16`](Self::store_normal_bf16), of the lanes of a tail.
    ///
    /// # Safety
    /// As there, for the lanes of `tail` only.
    unsafe fn store_tail_normal_bf16(self, dst: *mut bf16, tail: Self::Tail);
}

impl DotBf16 for F32x16 {
    #[inline(always)]
    unsafe fn splat_pair(pair: i32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self(_mm512_castsi512_ps(_mm512_set1_epi32(pair))) }
    }

    #[inline(always)]
    unsafe fn dot_bf16(self, x: Self, y: Self) -> Self {
        // SAFETY: the caller's promise; any bits are a vector of bf16.
        unsafe {
            let x = std::mem::transmute::<__m512, __m512bh>(x.0);
            let y = std::mem::transmute::<__m512, __m512bh>(y.0);
            Self(_mm512_dpbf16_ps(self.0, x, y))
        }
    }

    #[inline(always)]
    unsafe fn store_normal_bf16(self, dst: *mut bf16) {
        // SAFETY: the caller gives sixteen writable values and the instruction set.
        unsafe {
            let x = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0));
            _mm256_storeu_si256(dst.cast(), x);
        }
    }

    #[inline(always)]
    unsafe fn store_tail_normal_bf16(self, dst: *mut bf16, tail: __mmask16) {
        // SAFETY: only the lanes of `tail` are written; the instruction set is the caller's promise.
        unsafe {
            if tail == __mmask16::MAX {
                return self.store_normal_bf16(dst);
            }
            let x = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0));
            _mm256_mask_storeu_epi16(dst.cast(), tail, x);
        }
    }
}

impl DotBf16 for F32x8 {
    #[inline(always)]
    unsafe fn splat_pair(pair: i32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self(_mm256_castsi256_ps(_mm256_set1_epi32(pair))) }
    }

    #[inline(always)]
    unsafe fn dot_bf16(self, x: Self, y: Self) -> Self {
        // SAFETY: the caller's promise; any bits are a vector of bf16.
        unsafe {
            let x = std::mem::transmute::<__m256, __m256bh>(x.0);
            let y = std::mem::transmute::<__m256, __m256bh>(y.0);
            Self(_mm256_dpbf16_ps(self.0, x, y))
        }
    }

    #[inline(always)]
    unsafe fn store_normal_bf16(self, dst: *mut bf16) {
        // SAFETY: the caller gives eight writable values and the instruction set.
        unsafe {
            let x = std::mem::transmute::<__m128bh, __m128i>(_mm256_cvtneps_pbh(self.0));
            _mm_storeu_si128(dst.cast(), x);
        }
    }

    #[inline(always)]
    unsafe fn store_tail_normal_bf16(self, dst: *mut bf16, tail: __mmask8) {
        // SAFETY: only the lanes of `tail` are written; the instruction set is the caller's promise.
        unsafe {
            if tail == __mmask8::MAX {
                return self.store_normal_bf16(dst);
            }
            let x = std::mem::transmute::<__m128bh, __m128i>(_mm256_cvtneps_pbh(self.0));
            _mm_mask_storeu_epi16(dst.cast(), tail, x);
        }
    }
}

/// Implements [`Simd`] with the instructions of one width.
macro_rules! vector {
    ($vector:ident of $lanes:literal, $ops:ident, $mask:ty, $rows:ident, $evens:ident) => {
        operators!($vector:
            add |a: Self, b: Self| Self($ops::add(a.0, b.0)),
            sub |a: Self, b: Self| Self($ops::sub(a.0, b.0)),
            mul |a: Self, b: Self| Self($ops::mul(a.0, b.0)),
            div |a: Self, b: Self| Self($ops::div(a.0, b.0)),
            neg |a: Self| Self($ops::xor(a.0, $ops::set1(-0.0)))
        );

        // SAFETY: masked moves touch the lanes of their mask only; safe methods are given a value.
        unsafe impl Simd for $vector {
            const LANES: usize = $lanes;
            const TAILS_ARE_FREE: bool = true;
            const NARROWS: bool = true;
            type Mask = $mask;
            type Tail = $mask;

            #[inline(always)]
            unsafe fn splat(x: f32) -> Self {
                // SAFETY: the caller has the instruction set.
                Self(unsafe { $ops::set1(x) })
            }

            #[inline(always)]
            unsafe fn tail(lanes: usize) -> $mask {
                debug_assert!((1..=$lanes).contains(&lanes));
                <$mask>::MAX >> ($lanes - lanes)
            }

            #[inline(always)]
            fn lanes(tail: $mask) -> usize {
                tail.count_ones() as usize
            }

            #[inline(always)]
            unsafe fn load_f16(src: *const f16) -> Self {
                // SAFETY: the caller has the instruction set and gives $lanes readable values.
                Self(unsafe { $ops::cvtph($ops::loadu_16(src.cast())) })
            }

            #[inline(always)]
            unsafe fn load_tail_f16(src: *const f16, tail: $mask) -> Self {
                // SAFETY: the caller has the instruction set; only the lanes of `tail` are read.
                Self(unsafe { $ops::cvtph($ops::maskz_loadu_16(tail, src.cast())) })
            }

            #[inline(always)]
            unsafe fn load_bf16(src: *const bf16) -> Self {
                // SAFETY: the caller has the instruction set and gives $lanes readable values.
                Self(unsafe {
                    let bits = $ops::cvtepu16($ops::loadu_16(src.cast()));
                    $ops::from_bits($ops::slli::<16>(bits))
                })
            }

            #[inline(always)]
            unsafe fn load_tail_bf16(src: *const bf16, tail: $mask) -> Self {
                // SAFETY: the caller has the instruction set; only the lanes of `tail` are read.
                Self(unsafe {
                    let bits = $ops::cvtepu16($ops::maskz_loadu_16(tail, src.cast()));
                    $ops::from_bits($ops::slli::<16>(bits))
                })
            }

            #[inline(always)]
            unsafe fn load_pairs(first: *const bf16, second: *const bf16) -> Self {
                // SAFETY: the caller has the instruction set and gives $lanes readable values twice.
                Self(unsafe {
                    let low = $ops::cvtepu16($ops::loadu_16(first.cast()));
                    let high = $ops::cvtepu16($ops::loadu_16(second.cast()));
                    $ops::from_bits($ops::or_32(low, $ops::slli::<16>(high)))
                })
            }

            #[inline(always)]
            unsafe fn store_f16(self, dst: *mut f16) {
                // SAFETY: the caller gives $lanes writable values.
                unsafe {
                    let x = $ops::cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
                    $ops::storeu_16(dst.cast(), x);
                }
            }

            #[inline(always)]
            unsafe fn store_tail_f16(self, dst: *mut f16, tail: $mask) {
                // SAFETY: only the lanes of `tail` are written.
                unsafe {
                    // A masked store takes up to 2.7 times as long on Zen 4.
                    if tail == <$mask>::MAX {
                        return self.store_f16(dst);
                    }
                    let x = $ops::cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
                    $ops::mask_storeu_16(dst.cast(), tail, x);
                }
            }

            #[inline(always)]
            unsafe fn store_bf16(self, dst: *mut bf16) {
                // SAFETY: the caller gives $lanes writable values.
                unsafe { $ops::storeu_16(dst.cast(), rounded!(self, $ops)) }
            }

            #[inline(always)]
            unsafe fn store_tail_bf16(self, dst: *mut bf16, tail: $mask) {
                // SAFETY: only the lanes of `tail` are written.
                unsafe {
                    if tail == <$mask>::MAX {
                        return self.store_bf16(dst);
                    }
                    $ops::mask_storeu_16(dst.cast(), tail, rounded!(self, $ops));
                }
            }

            #[inline(always)]
            unsafe fn load(src: *const f32) -> Self {
                // SAFETY: the caller has the instruction set and gives $lanes readable values.
                Self(unsafe { $ops::loadu(src) })
            }

            #[inline(always)]
            unsafe fn load_tail(src: *const f32, tail: $mask) -> Self {
                // SAFETY: the caller has the instruction set; only the lanes of `tail` are read.
                Self(unsafe { $ops::maskz_loadu(tail, src) })
            }

            #[inline(always)]
            unsafe fn load_even(src: *const f32) -> Self {
                // SAFETY: twice as many values but one are readable; the instruction set is the
                // caller's promise.
                unsafe {
                    let (a, b) = ($ops::loadu(src), $ops::loadu(src.add($lanes - 1)));
                    Self($ops::permutex2var(a, $evens(), b))
                }
            }

            #[inline(always)]
            unsafe fn load_even_f16(src: *const f16) -> Self {
                // SAFETY: the caller has the instruction set; only even values are read.
                Self(unsafe { $ops::cvtph($ops::low_16($ops::load_even_16(src.cast()))) })
            }

            #[inline(always)]
            unsafe fn load_even_bf16(src: *const bf16) -> Self {
                // SAFETY: the caller has the instruction set; only even values are read.
                Self(unsafe {
                    $ops::from_bits($ops::slli::<16>($ops::load_even_16(src.cast())))
                })
            }

            #[inline(always)]
            unsafe fn load_even_pairs(first: *const bf16, second: *const bf16) -> Self {
                // SAFETY: the caller has the instruction set; only even values are read.
                Self(unsafe {
                    let low = $ops::load_even_16(first.cast());
                    let high = $ops::load_even_16(second.cast());
                    $ops::from_bits($ops::or_32(low, $ops::slli::<16>(high)))
                })
            }

            #[inline(always)]
            unsafe fn fetch(src: *const f32) {
                // SAFETY: every CPU of this target has the instruction, which reads nothing.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(src.cast()) }
            }

            #[inline(always)]
            unsafe fn fetch_mut(dst: *mut f32) {
                super::prefetchw(dst)
            }

            #[inline(always)]
            unsafe fn store(self, dst: *mut f32) {
                // SAFETY: the caller gives $lanes writable values.
                unsafe { $ops::storeu(dst, self.0) }
            }

            #[inline(always)]
            unsafe fn store_tail(self, dst: *mut f32, tail: $mask) {
                // SAFETY: only the lanes of `tail` are written.
                unsafe { $ops::mask_storeu(dst, tail, self.0) }
            }

            #[inline(always)]
            unsafe fn load_columns(src: *const f32, stride: usize) -> [Self; 4] {
                // Gathering every fourth row into the quarters while loading leaves only 4x4 transposes
                // inside each quarter: half the shuffles of a whole transpose.
                // SAFETY: four values of each row are readable; the instruction set is the caller's
                // promise.
                unsafe {
                    let r0 = $rows(src, stride);
                    let r1 = $rows(src.add(stride), stride);
                    let r2 = $rows(src.add(2 * stride), stride);
                    let r3 = $rows(src.add(3 * stride), stride);
                    let (a, b) = ($ops::unpacklo(r0, r1), $ops::unpackhi(r0, r1));
                    let (c, d) = ($ops::unpacklo(r2, r3), $ops::unpackhi(r2, r3));
                    [
                        Self($ops::shuffle::<0b01_00_01_00>(a, c)),
                        Self($ops::shuffle::<0b11_10_11_10>(a, c)),
                        Self($ops::shuffle::<0b01_00_01_00>(b, d)),
                        Self($ops::shuffle::<0b11_10_11_10>(b, d)),
                    ]
                }
            }

            #[inline(always)]
            fn like(self, x: f32) -> Self {
                // SAFETY: `self` proves the instruction set.
                Self(unsafe { $ops::set1(x) })
            }

            #[inline(always)]
            fn mul_add(self, b: Self, c: Self) -> Self {
                // SAFETY: `self` proves the instruction set.
                Self(unsafe { $ops::fmadd(self.0, b.0, c.0) })
            }

            #[inline(always)]
            fn mul_exact(self, b: Self) -> (Self, Self) {
                let product = self * b;
                // SAFETY: `self` proves the instruction set.
                (product, Self(unsafe { $ops::fmsub(self.0, b.0, product.0) }))
            }

            #[inline(always)]
            fn max(self, bound: Self) -> Self {
                // The instruction returns its second operand where either is NaN.
                // SAFETY: `self` proves the instruction set.
                Self(unsafe { $ops::max(bound.0, self.0) })
            }

            #[inline(always)]
            fn min(self, bound: Self) -> Self {
                // SAFETY: `self` proves the instruction set.
                Self(unsafe { $ops::min(bound.0, self.0) })
            }

            #[inline(always)]
            fn abs(self) -> Self {
                // SAFETY: `self` proves the instruction set.
                Self(unsafe { $ops::andnot($ops::set1(-0.0), self.0) })
            }

            #[inline(always)]
            fn copysign(self, sign: Self) -> Self {
                // SAFETY: `self` proves the instruction set.
                Self(unsafe {
                    let bit = $ops::set1(-0.0);
                    $ops::or($ops::andnot(bit, self.0), $ops::and(bit, sign.0))
                })
            }

            #[inline(always)]
            fn round(self) -> Self {
                // SAFETY: `self` proves the instruction set.
                Self(unsafe {
                    $ops::roundscale::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)
                })
            }

            #[inline(always)]
            fn scale_exp2(self, n: Self) -> Self {
                // SAFETY: `self` proves the instruction set.
                Self(unsafe { $ops::scalef(self.0, n.0) })
            }

            #[inline(always)]
            fn gt(self, b: Self) -> $mask {
                // SAFETY: `self` proves the instruction set.
                unsafe { $ops::cmp::<_CMP_GT_OQ>(self.0, b.0) }
            }

            #[inline(always)]
            fn ge(self, b: Self) -> $mask {
                // SAFETY: `self` proves the instruction set.
                unsafe { $ops::cmp::<_CMP_GE_OQ>(self.0, b.0) }
            }

            #[inline(always)]
            fn select(mask: $mask, a: Self, b: Self) -> Self {
                // SAFETY: `a` proves the instruction set.
                Self(unsafe { $ops::blend(mask, b.0, a.0) })
            }
        }
    };
}

vector!(F32x16 of 16, wide, __mmask16, four_rows, sixteen_evens);
vector!(F32x8 of 8, half, __mmask8, two_rows, eight_evens);
