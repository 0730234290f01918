//! Four lanes in plain Rust, shaped so that LLVM keeps them in one vector register.

use super::{Simd, operators};
use std::array::from_fn;

/// Four f32 lanes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub(crate) struct F32x4([f32; 4]);

#[inline(always)]
fn map(a: F32x4, f: impl Fn(f32) -> f32) -> F32x4 {
    F32x4(from_fn(|lane| f(a.0[lane])))
}

#[inline(always)]
fn zip(a: F32x4, b: F32x4, f: impl Fn(f32, f32) -> f32) -> F32x4 {
    F32x4(from_fn(|lane| f(a.0[lane], b.0[lane])))
}

operators!(F32x4:
    add |a, b| zip(a, b, |a, b| a + b),
    sub |a, b| zip(a, b, |a, b| a - b),
    mul |a, b| zip(a, b, |a, b| a * b),
    div |a, b| zip(a, b, |a, b| a / b),
    neg |a| map(a, |a| -a)
);

/// Adding and subtracting this rounds to an integer, and leaves the integer in the low bits.
const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23

// SAFETY: tails copy `lanes` values, and the type needs no instruction set.
unsafe impl Simd for F32x4 {
    const LANES: usize = 4;
    const TAILS_ARE_FREE: bool = false;
    const NARROWS: bool = false;
    type Mask = [bool; 4];
    type Tail = usize;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 4])
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
        // SAFETY: the caller gives four readable values.
        Self(unsafe { src.cast::<[f32; 4]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_tail(src: *const f32, lanes: usize) -> Self {
        // SAFETY: only lanes below `lanes` are read.
        unsafe {
            match lanes {
                1 => Self([*src, 0.0, 0.0, 0.0]),
                2 => Self([*src, *src.add(1), 0.0, 0.0]),
                3 => Self([*src, *src.add(1), *src.add(2), 0.0]),
                _ => Self::load(src),
            }
        }
    }

    #[inline(always)]
    unsafe fn load_even(src: *const f32) -> Self {
        // SAFETY: seven values are readable.
        Self(unsafe { [0, 2, 4, 6].map(|i| *src.add(i)) })
    }

    #[inline(always)]
    unsafe fn fetch(_: *const f32) {}

    #[inline(always)]
    unsafe fn fetch_mut(_: *mut f32) {}

    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller gives four writable values.
        unsafe { dst.cast::<[f32; 4]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_tail(self, dst: *mut f32, lanes: usize) {
        // SAFETY: only lanes below `lanes` are written.
        unsafe {
            match lanes {
                1 => *dst = self.0[0],
                2 => dst.cast::<[f32; 2]>().write_unaligned([self.0[0], self.0[1]]),
                3 => dst.cast::<[f32; 3]>().write_unaligned([self.0[0], self.0[1], self.0[2]]),
                _ => self.store(dst),
            }
        }
    }

    #[inline(always)]
    unsafe fn load_columns(src: *const f32, stride: usize) -> [Self; 4] {
        // SAFETY: four values of four rows are readable.
        let rows: [Self; 4] = from_fn(|row| unsafe { Self::load(src.add(row * stride)) });
        from_fn(|column| Self(from_fn(|row| rows[row].0[column])))
    }

    #[inline(always)]
    fn like(self, x: f32) -> Self {
        Self([x; 4])
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        self * b + c
    }

    #[inline(always)]
    fn mul_exact(self, b: Self) -> (Self, Self) {
        // Halves of 12 bits have exact products (Dekker 1971); masking makes them here, since it
        // cannot overflow.
        let high = |x: Self| map(x, |x| f32::from_bits(x.to_bits() & 0xffff_f000));
        let product = self * b;
        let (ah, bh) = (high(self), high(b));
        let (al, bl) = (self - ah, b - bh);
        (product, ((ah * bh - product) + ah * bl + al * bh) + al * bl)
    }

    #[inline(always)]
    fn max(self, bound: Self) -> Self {
        zip(self, bound, |x, bound| if bound > x { bound } else { x })
    }

    #[inline(always)]
    fn min(self, bound: Self) -> Self {
        zip(self, bound, |x, bound| if bound < x { bound } else { x })
    }

    #[inline(always)]
    fn abs(self) -> Self {
        map(self, f32::abs)
    }

    #[inline(always)]
    fn copysign(self, sign: Self) -> Self {
        zip(self, sign, f32::copysign)
    }

    #[inline(always)]
    fn round(self) -> Self {
        map(self, |x| (x + ROUNDER) - ROUNDER)
    }

    #[inline(always)]
    fn scale_exp2(self, n: Self) -> Self {
        // Two factors, because one power of two does not span n; rounding happens in the last.
        let n: [i32; 4] =
            n.0.map(|n| ((n + ROUNDER).to_bits() as i32).wrapping_sub(ROUNDER.to_bits() as i32));
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
        let half = n.map(|n| n >> 1);
        let first = Self(half.map(power));
        let second = Self(from_fn(|lane| power(n[lane].wrapping_sub(half[lane]))));
        self * first * second
    }

    #[inline(always)]
    fn gt(self, b: Self) -> [bool; 4] {
        from_fn(|lane| self.0[lane] > b.0[lane])
    }

    #[inline(always)]
    fn ge(self, b: Self) -> [bool; 4] {
        from_fn(|lane| self.0[lane] >= b.0[lane])
    }

    #[inline(always)]
    fn select(mask: [bool; 4], a: Self, b: Self) -> Self {
        F32x4(from_fn(|lane| if mask[lane] { a.0[lane] } else { b.0[lane] }))
    }
}
