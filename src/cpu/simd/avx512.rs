//! Sixteen lanes: AVX-512 F, VL, DQ and BW.

use super::{Simd, operators};
use std::arch::x86_64::*;

/// Sixteen f32 lanes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32x16(__m512);

operators!(F32x16:
    add |a: Self, b: Self| Self(_mm512_add_ps(a.0, b.0)),
    sub |a: Self, b: Self| Self(_mm512_sub_ps(a.0, b.0)),
    mul |a: Self, b: Self| Self(_mm512_mul_ps(a.0, b.0)),
    div |a: Self, b: Self| Self(_mm512_div_ps(a.0, b.0)),
    neg |a: Self| Self(_mm512_xor_ps(a.0, _mm512_set1_ps(-0.0)))
);

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

// SAFETY: masked moves touch the lanes of their mask only; safe methods are given a value.
unsafe impl Simd for F32x16 {
    const LANES: usize = 16;
    const TAILS_ARE_FREE: bool = true;
    type Mask = __mmask16;
    type Tail = __mmask16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has the instruction set.
        Self(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn tail(lanes: usize) -> __mmask16 {
        debug_assert!((1..=16).contains(&lanes));
        u16::MAX >> (16 - lanes)
    }

    #[inline(always)]
    unsafe fn load(src: *const f32) -> Self {
        // SAFETY: the caller has the instruction set and gives sixteen readable values.
        Self(unsafe { _mm512_loadu_ps(src) })
    }

    #[inline(always)]
    unsafe fn load_tail(src: *const f32, tail: __mmask16) -> Self {
        // SAFETY: the caller has the instruction set; only the lanes of `tail` are read.
        Self(unsafe { _mm512_maskz_loadu_ps(tail, src) })
    }

    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller gives sixteen writable values.
        unsafe { _mm512_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn store_tail(self, dst: *mut f32, tail: __mmask16) {
        // SAFETY: only the lanes of `tail` are written.
        unsafe { _mm512_mask_storeu_ps(dst, tail, self.0) }
    }

    #[inline(always)]
    unsafe fn load_columns(src: *const f32, stride: usize) -> [Self; 4] {
        // Gathering rows 0, 4, 8, 12 into the four quarters while loading leaves only 4x4
        // transposes inside each quarter: half the shuffles of a 16x16 transpose.
        // SAFETY: four values of each row are readable; the instruction set is the caller's
        // promise.
        unsafe {
            let r0 = four_rows(src, stride);
            let r1 = four_rows(src.add(stride), stride);
            let r2 = four_rows(src.add(2 * stride), stride);
            let r3 = four_rows(src.add(3 * stride), stride);
            let (a, b) = (_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
            let (c, d) = (_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
            [
                Self(_mm512_shuffle_ps::<0b01_00_01_00>(a, c)),
                Self(_mm512_shuffle_ps::<0b11_10_11_10>(a, c)),
                Self(_mm512_shuffle_ps::<0b01_00_01_00>(b, d)),
                Self(_mm512_shuffle_ps::<0b11_10_11_10>(b, d)),
            ]
        }
    }

    #[inline(always)]
    fn like(self, x: f32) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn mul_exact(self, b: Self) -> (Self, Self) {
        let product = self * b;
        // SAFETY: `self` proves the instruction set.
        (product, Self(unsafe { _mm512_fmsub_ps(self.0, b.0, product.0) }))
    }

    #[inline(always)]
    fn max(self, bound: Self) -> Self {
        // The instruction returns its second operand where either is NaN.
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm512_max_ps(bound.0, self.0) })
    }

    #[inline(always)]
    fn min(self, bound: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm512_min_ps(bound.0, self.0) })
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm512_abs_ps(self.0) })
    }

    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe {
            let bit = _mm512_set1_ps(-0.0);
            _mm512_or_ps(_mm512_andnot_ps(bit, self.0), _mm512_and_ps(bit, sign.0))
        })
    }

    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)
        })
    }

    #[inline(always)]
    fn scale_exp2(self, n: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }

    #[inline(always)]
    fn gt(self, b: Self) -> __mmask16 {
        // SAFETY: `self` proves the instruction set.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, b.0) }
    }

    #[inline(always)]
    fn ge(self, b: Self) -> __mmask16 {
        // SAFETY: `self` proves the instruction set.
        unsafe { _mm512_cmp_ps_mask::<_CMP_GE_OQ>(self.0, b.0) }
    }

    #[inline(always)]
    fn select(mask: __mmask16, a: Self, b: Self) -> Self {
        // SAFETY: `a` proves the instruction set.
        Self(unsafe { _mm512_mask_blend_ps(mask, b.0, a.0) })
    }
}
