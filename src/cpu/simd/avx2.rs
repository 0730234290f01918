//! Eight lanes: AVX2 and FMA.

use super::{Simd, operators};
use crate::dtype::{bf16, f16};
use std::arch::x86_64::*;

/// Eight f32 lanes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32x8(__m256);

operators!(F32x8:
    add |a: Self, b: Self| Self(_mm256_add_ps(a.0, b.0)),
    sub |a: Self, b: Self| Self(_mm256_sub_ps(a.0, b.0)),
    mul |a: Self, b: Self| Self(_mm256_mul_ps(a.0, b.0)),
    div |a: Self, b: Self| Self(_mm256_div_ps(a.0, b.0)),
    neg |a: Self| Self(_mm256_xor_ps(a.0, _mm256_set1_ps(-0.0)))
);

/// Eight set words, then eight clear ones: a window into it is a mask of the first lanes.
static TAILS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// Four values of a row, and four of the fourth row after it.
///
/// # Safety
/// The CPU has AVX; the values are readable.
#[inline(always)]
unsafe fn two_rows(src: *const f32, stride: usize) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm256_castps128_ps256(_mm_loadu_ps(src));
        _mm256_insertf128_ps::<1>(low, _mm_loadu_ps(src.add(4 * stride)))
    }
}

/// Eight values of bf16.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn widened(x: __m128i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x))) }
}

/// Every other one of fifteen halves, from the first to the last.
///
/// # Safety
/// The CPU has AVX; the fifteen are readable.
#[inline(always)]
unsafe fn even_halves(src: *const __m128i) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe {
        // The low halves of the first words, the high ones of those that end with the last half.
        let low = _mm_and_si128(_mm_loadu_si128(src), _mm_set1_epi32(0xffff));
        let high = _mm_srli_epi32::<16>(_mm_loadu_si128(src.byte_add(14)));
        _mm_packus_epi32(low, high)
    }
}

// SAFETY: masked moves touch the lanes of their mask only; safe methods are given a value.
unsafe impl Simd for F32x8 {
    const LANES: usize = 8;
    const TAILS_ARE_FREE: bool = false;
    const NARROWS: bool = true;
    type Mask = __m256;
    type Tail = __m256i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has the instruction set.
        Self(unsafe { _mm256_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn tail(lanes: usize) -> __m256i {
        debug_assert!((1..=8).contains(&lanes));
        // SAFETY: eight words from `8 - lanes`, at most 7, lie inside the table.
        unsafe { _mm256_loadu_si256(TAILS.as_ptr().add(8 - lanes).cast()) }
    }

    #[inline(always)]
    fn lanes(tail: __m256i) -> usize {
        // SAFETY: a tail exists where the instruction set does.
        unsafe { _mm256_movemask_ps(_mm256_castsi256_ps(tail)) as usize }.count_ones() as usize
    }

    #[inline(always)]
    unsafe fn load_f16(src: *const f16) -> Self {
        // SAFETY: the caller has the instruction set and gives eight readable values.
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.cast())) })
    }

    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        // SAFETY: the caller has the instruction set and gives eight readable values.
        Self(unsafe { widened(_mm_loadu_si128(src.cast())) })
    }

    #[inline(always)]
    unsafe fn store_f16(self, dst: *mut f16) {
        // SAFETY: the caller gives eight writable values.
        unsafe {
            let x = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm_storeu_si128(dst.cast(), x);
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut bf16) {
        // SAFETY: the caller gives eight writable values.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            // Half of the last bit that stays, less one if that bit is even: ties go there.
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_add_epi32(bits, half);
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(1 << 22));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let bits = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let (low, high) = (_mm256_castsi256_si128(bits), _mm256_extracti128_si256::<1>(bits));
            _mm_storeu_si128(dst.cast(), _mm_packus_epi32(low, high));
        }
    }

    #[inline(always)]
    unsafe fn load(src: *const f32) -> Self {
        // SAFETY: the caller has the instruction set and gives eight readable values.
        Self(unsafe { _mm256_loadu_ps(src) })
    }

    #[inline(always)]
    unsafe fn load_tail(src: *const f32, tail: __m256i) -> Self {
        // SAFETY: the caller has the instruction set; only the lanes of `tail` are read.
        Self(unsafe { _mm256_maskload_ps(src, tail) })
    }

    #[inline(always)]
    unsafe fn load_even(src: *const f32) -> Self {
        // SAFETY: fifteen values are readable; the instruction set is the caller's promise.
        unsafe {
            let (a, b) = (_mm256_loadu_ps(src), _mm256_loadu_ps(src.add(7)));
            // Pairs of each half of a, of b, of a, of b: the middle ones change places.
            let pairs = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_10_00>(a, b));
            Self(_mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(pairs)))
        }
    }

    #[inline(always)]
    unsafe fn load_even_f16(src: *const f16) -> Self {
        // SAFETY: fifteen values are readable; the instruction set is the caller's promise.
        Self(unsafe { _mm256_cvtph_ps(even_halves(src.cast())) })
    }

    #[inline(always)]
    unsafe fn load_even_bf16(src: *const bf16) -> Self {
        // SAFETY: fifteen values are readable; the instruction set is the caller's promise.
        Self(unsafe { widened(even_halves(src.cast())) })
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
        // SAFETY: the caller gives eight writable values.
        unsafe { _mm256_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn store_tail(self, dst: *mut f32, tail: __m256i) {
        // SAFETY: only the lanes of `tail` are written.
        unsafe { _mm256_maskstore_ps(dst, tail, self.0) }
    }

    #[inline(always)]
    unsafe fn load_columns(src: *const f32, stride: usize) -> [Self; 4] {
        // SAFETY: four values of rows `row` and `row + 4` are readable; the instruction set is
        // the caller's promise.
        unsafe {
            let r0 = two_rows(src, stride);
            let r1 = two_rows(src.add(stride), stride);
            let r2 = two_rows(src.add(2 * stride), stride);
            let r3 = two_rows(src.add(3 * stride), stride);
            let (a, b) = (_mm256_unpacklo_ps(r0, r1), _mm256_unpackhi_ps(r0, r1));
            let (c, d) = (_mm256_unpacklo_ps(r2, r3), _mm256_unpackhi_ps(r2, r3));
            [
                Self(_mm256_shuffle_ps::<0b01_00_01_00>(a, c)),
                Self(_mm256_shuffle_ps::<0b11_10_11_10>(a, c)),
                Self(_mm256_shuffle_ps::<0b01_00_01_00>(b, d)),
                Self(_mm256_shuffle_ps::<0b11_10_11_10>(b, d)),
            ]
        }
    }

    #[inline(always)]
    fn like(self, x: f32) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm256_set1_ps(x) })
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn mul_exact(self, b: Self) -> (Self, Self) {
        let product = self * b;
        // SAFETY: `self` proves the instruction set.
        (product, Self(unsafe { _mm256_fmsub_ps(self.0, b.0, product.0) }))
    }

    #[inline(always)]
    fn max(self, bound: Self) -> Self {
        // The instruction returns its second operand where either is NaN.
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm256_max_ps(bound.0, self.0) })
    }

    #[inline(always)]
    fn min(self, bound: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm256_min_ps(bound.0, self.0) })
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0) })
    }

    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe {
            let bit = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(bit, self.0), _mm256_and_ps(bit, sign.0))
        })
    }

    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)
        })
    }

    #[inline(always)]
    fn scale_exp2(self, n: Self) -> Self {
        // Two factors, because one power of two does not span n; rounding happens in the last.
        // SAFETY: `self` proves the instruction set.
        unsafe {
            let n = _mm256_cvtps_epi32(n.0);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let rest = _mm256_add_epi32(_mm256_sub_epi32(n, half), bias);
            let second = _mm256_slli_epi32::<23>(rest);
            self * Self(_mm256_castsi256_ps(first)) * Self(_mm256_castsi256_ps(second))
        }
    }

    #[inline(always)]
    fn gt(self, b: Self) -> __m256 {
        // SAFETY: `self` proves the instruction set.
        unsafe { _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, b.0) }
    }

    #[inline(always)]
    fn ge(self, b: Self) -> __m256 {
        // SAFETY: `self` proves the instruction set.
        unsafe { _mm256_cmp_ps::<_CMP_GE_OQ>(self.0, b.0) }
    }

    #[inline(always)]
    fn select(mask: __m256, a: Self, b: Self) -> Self {
        // SAFETY: `a` proves the instruction set.
        Self(unsafe { _mm256_blendv_ps(b.0, a.0, mask) })
    }
}
