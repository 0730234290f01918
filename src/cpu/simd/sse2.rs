//! Four lanes: SSE2, which every x86-64 has. It is the portable vector there, because LLVM does
//! not keep four floats of an array in one register through code as long as a kernel.

use super::{Simd, operators};
use std::arch::x86_64::*;
use std::array::from_fn;

/// Four f32 lanes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32x4(__m128);

operators!(F32x4:
    add |a: Self, b: Self| Self(_mm_add_ps(a.0, b.0)),
    sub |a: Self, b: Self| Self(_mm_sub_ps(a.0, b.0)),
    mul |a: Self, b: Self| Self(_mm_mul_ps(a.0, b.0)),
    div |a: Self, b: Self| Self(_mm_div_ps(a.0, b.0)),
    neg |a: Self| Self(_mm_xor_ps(a.0, _mm_set1_ps(-0.0)))
);

/// Adding and subtracting this rounds to an integer.
const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23

// SAFETY: tails touch the first `lanes` values only; every x86-64 has SSE2.
unsafe impl Simd for F32x4 {
    const LANES: usize = 4;
    const TAILS_ARE_FREE: bool = false;
    const NARROWS: bool = false;
    type Mask = __m128;
    type Tail = usize;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller has the instruction set.
        Self(unsafe { _mm_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn tail(lanes: usize) -> usize {
        lanes
    }

    #[inline(always)]
    fn lanes(tail: usize) -> usize {
        tail
    }

    #[inline(always)]
    unsafe fn load(src: *const f32) -> Self {
        // SAFETY: the caller has the instruction set and gives four readable values.
        Self(unsafe { _mm_loadu_ps(src) })
    }

    #[inline(always)]
    unsafe fn load_tail(src: *const f32, lanes: usize) -> Self {
        // SAFETY: only values below `lanes` are read.
        unsafe {
            Self(match lanes {
                1 => _mm_load_ss(src),
                2 => _mm_castpd_ps(_mm_load_sd(src.cast())),
                3 => _mm_movelh_ps(_mm_castpd_ps(_mm_load_sd(src.cast())), _mm_load_ss(src.add(2))),
                _ => _mm_loadu_ps(src),
            })
        }
    }

    #[inline(always)]
    unsafe fn load_even(src: *const f32) -> Self {
        // SAFETY: seven values are readable.
        unsafe {
            let (a, b) = (_mm_loadu_ps(src), _mm_loadu_ps(src.add(3)));
            Self(_mm_shuffle_ps::<0b11_01_10_00>(a, b))
        }
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
        // SAFETY: the caller gives four writable values.
        unsafe { _mm_storeu_ps(dst, self.0) }
    }

    #[inline(always)]
    unsafe fn store_tail(self, dst: *mut f32, lanes: usize) {
        // SAFETY: only values below `lanes` are written.
        unsafe {
            match lanes {
                1 => _mm_store_ss(dst, self.0),
                2 => _mm_store_sd(dst.cast(), _mm_castps_pd(self.0)),
                3 => {
                    _mm_store_sd(dst.cast(), _mm_castps_pd(self.0));
                    _mm_store_ss(dst.add(2), _mm_movehl_ps(self.0, self.0));
                }
                _ => _mm_storeu_ps(dst, self.0),
            }
        }
    }

    #[inline(always)]
    unsafe fn load_columns(src: *const f32, stride: usize) -> [Self; 4] {
        // SAFETY: four values of four rows are readable.
        unsafe {
            let [r0, r1, r2, r3]: [__m128; 4] = from_fn(|row| _mm_loadu_ps(src.add(row * stride)));
            let (a, b) = (_mm_unpacklo_ps(r0, r1), _mm_unpackhi_ps(r0, r1));
            let (c, d) = (_mm_unpacklo_ps(r2, r3), _mm_unpackhi_ps(r2, r3));
            [
                Self(_mm_movelh_ps(a, c)),
                Self(_mm_movehl_ps(c, a)),
                Self(_mm_movelh_ps(b, d)),
                Self(_mm_movehl_ps(d, b)),
            ]
        }
    }

    #[inline(always)]
    fn like(self, x: f32) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm_set1_ps(x) })
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self * b + c
    }

    #[inline(always)]
    fn mul_exact(self, b: Self) -> (Self, Self) {
        // Halves of 12 bits have exact products (Dekker 1971); masking makes them here, since it
        // cannot overflow.
        // SAFETY: every x86-64 has SSE2.
        let high = |x: Self| unsafe {
            Self(_mm_and_ps(x.0, _mm_castsi128_ps(_mm_set1_epi32(0xffff_f000_u32 as i32))))
        };
        let product = self * b;
        let (ah, bh) = (high(self), high(b));
        let (al, bl) = (self - ah, b - bh);
        (product, ((ah * bh - product) + ah * bl + al * bh) + al * bl)
    }

    #[inline(always)]
    fn max(self, bound: Self) -> Self {
        // The instruction returns its second operand where either is NaN.
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm_max_ps(bound.0, self.0) })
    }

    #[inline(always)]
    fn min(self, bound: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm_min_ps(bound.0, self.0) })
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe { _mm_andnot_ps(_mm_set1_ps(-0.0), self.0) })
    }

    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        // SAFETY: `self` proves the instruction set.
        Self(unsafe {
            let bit = _mm_set1_ps(-0.0);
            _mm_or_ps(_mm_andnot_ps(bit, self.0), _mm_and_ps(bit, sign.0))
        })
    }

    #[inline(always)]
    fn round(self) -> Self {
        (self + ROUNDER) - ROUNDER
    }

    #[inline(always)]
    fn scale_exp2(self, n: Self) -> Self {
        // Two factors, because one power of two does not span n; rounding happens in the last.
        // SAFETY: `self` proves the instruction set.
        unsafe {
            let n = _mm_cvtps_epi32(n.0);
            let half = _mm_srai_epi32::<1>(n);
            let bias = _mm_set1_epi32(127);
            let first = _mm_slli_epi32::<23>(_mm_add_epi32(half, bias));
            let rest = _mm_add_epi32(_mm_sub_epi32(n, half), bias);
            let second = _mm_slli_epi32::<23>(rest);
            self * Self(_mm_castsi128_ps(first)) * Self(_mm_castsi128_ps(second))
        }
    }

    #[inline(always)]
    fn gt(self, b: Self) -> __m128 {
        // SAFETY: `self` proves the instruction set.
        unsafe { _mm_cmpgt_ps(self.0, b.0) }
    }

    #[inline(always)]
    fn ge(self, b: Self) -> __m128 {
        // SAFETY: `self` proves the instruction set.
        unsafe { _mm_cmpge_ps(self.0, b.0) }
    }

    #[inline(always)]
    fn select(mask: __m128, a: Self, b: Self) -> Self {
        // SAFETY: `a` proves the instruction set.
        Self(unsafe { _mm_or_ps(_mm_and_ps(mask, a.0), _mm_andnot_ps(mask, b.0)) })
    }
}
