//! A vector of f32 lanes, written once for every instruction set.
//!
//! A *value* of a vector type proves that the CPU has its instructions: only the unsafe
//! constructors ([`Simd::splat`], the loads) make one from nothing. Arithmetic is therefore safe.
//! Every method is `#[inline(always)]` and is meant to be inlined into a function that carries
//! the matching `#[target_feature]`; [`per_isa`] writes such functions. Whatever lies between the
//! two must be `#[inline(always)]` too, or a macro: a closure or a function passed as a value may
//! stay out of line, without the features, and then every operation in it is a call.

use crate::dtype::{bf16, f16};
use std::ops::{Add, Div, Mul, Neg, Sub};

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod element;
#[cfg(any(test, not(target_arch = "x86_64")))]
pub(crate) mod portable;
#[cfg(target_arch = "x86_64")]
pub(crate) mod sse2;

pub(crate) use element::{load, load_even, load_tail, store, store_tail};

/// The vector of [`Isa::Portable`](crate::cpu::isa::Isa::Portable): what the target guarantees.
#[cfg(target_arch = "x86_64")]
pub(crate) type Baseline = sse2::F32x4;
/// The vector of [`Isa::Portable`](crate::cpu::isa::Isa::Portable): plain Rust.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) type Baseline = portable::F32x4;

/// A vector of [`Simd::LANES`] f32 values.
///
/// The `f32` operands of the operators are splatted.
///
/// # Safety
///
/// `load_tail` and `store_tail` must not touch memory outside of their lanes, and no safe method
/// may make a value without being given one.
pub(crate) unsafe trait Simd:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + Add<f32, Output = Self>
    + Sub<f32, Output = Self>
    + Mul<f32, Output = Self>
{
    /// Number of lanes, a power of two, at most 16.
    const LANES: usize;
    /// Whether `load_tail` is as cheap as `load`, so that kernels need no variant without it.
    const TAILS_ARE_FREE: bool;
    /// Whether whole vectors are stored as f16 and bf16 without a loop over their lanes.
    const NARROWS: bool;
    /// The result of a comparison.
    type Mask: Copy;
    /// The first `n` lanes.
    type Tail: Copy;

    /// Every lane `x`.
    ///
    /// # Safety
    /// The CPU has the instruction set of this type.
    unsafe fn splat(x: f32) -> Self;

    /// The first `lanes` lanes, `1..=LANES`.
    ///
    /// # Safety
    /// The CPU has the instruction set of this type.
    unsafe fn tail(lanes: usize) -> Self::Tail;

    /// How many lanes a tail has.
    fn lanes(tail: Self::Tail) -> usize;

    /// Loads `LANES` values.
    ///
    /// # Safety
    /// The CPU has the instruction set of this type; `src` is valid for `LANES` reads. No
    /// alignment is needed.
    unsafe fn load(src: *const f32) -> Self;

    /// Loads the lanes of `tail`, the others are zero.
    ///
    /// # Safety
    /// As for `load`, for the lanes of `tail` only.
    unsafe fn load_tail(src: *const f32, tail: Self::Tail) -> Self;

    /// As [`load`](Self::load), widened.
    ///
    /// # Safety
    /// As for `load`.
    #[inline(always)]
    unsafe fn load_f16(src: *const f16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { element::load_each(src, 1) }
    }

    /// As [`load`](Self::load), widened.
    ///
    /// # Safety
    /// As for `load`.
    #[inline(always)]
    unsafe fn load_bf16(src: *const bf16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { element::load_each(src, 1) }
    }

    /// As [`load_tail`](Self::load_tail), widened.
    ///
    /// # Safety
    /// As for `load_tail`.
    #[inline(always)]
    unsafe fn load_tail_f16(src: *const f16, tail: Self::Tail) -> Self {
        // SAFETY: the caller's promise.
        unsafe { element::load_tail_whole(src, tail) }
    }

    /// As [`load_tail`](Self::load_tail), widened.
    ///
    /// # Safety
    /// As for `load_tail`.
    #[inline(always)]
    unsafe fn load_tail_bf16(src: *const bf16, tail: Self::Tail) -> Self {
        // SAFETY: the caller's promise.
        unsafe { element::load_tail_whole(src, tail) }
    }

    /// As [`store`](Self::store), rounded to the nearest, ties to even; NaN stays NaN.
    ///
    /// # Safety
    /// As for `store`.
    #[inline(always)]
    unsafe fn store_f16(self, dst: *mut f16) {
        // SAFETY: the caller's promise.
        unsafe { element::store_each(self, dst) }
    }

    /// As [`store`](Self::store), rounded to the nearest, ties to even; NaN stays NaN.
    ///
    /// # Safety
    /// As for `store`.
    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut bf16) {
        // SAFETY: the caller's promise.
        unsafe { element::store_each(self, dst) }
    }

    /// As [`store_tail`](Self::store_tail), rounded to the nearest, ties to even; NaN stays NaN.
    ///
    /// # Safety
    /// As for `store_tail`.
    #[inline(always)]
    unsafe fn store_tail_f16(self, dst: *mut f16, tail: Self::Tail) {
        // SAFETY: the caller's promise.
        unsafe { element::store_tail_whole(self, dst, tail) }
    }

    /// As [`store_tail`](Self::store_tail), rounded to the nearest, ties to even; NaN stays NaN.
    ///
    /// # Safety
    /// As for `store_tail`.
    #[inline(always)]
    unsafe fn store_tail_bf16(self, dst: *mut bf16, tail: Self::Tail) {
        // SAFETY: the caller's promise.
        unsafe { element::store_tail_whole(self, dst, tail) }
    }

    /// Lanes whose low halves are `LANES` values from `first` on, and whose high halves from `second`.
    ///
    /// # Safety
    /// As for `load`, of both.
    #[inline(always)]
    unsafe fn load_pairs(first: *const bf16, second: *const bf16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { element::load_each_pair(first, second, 1) }
    }

    /// Every other one of `2 * LANES - 1` values, from the first to the last.
    ///
    /// # Safety
    /// The CPU has the instruction set of this type; `src` is valid for `2 * LANES - 1` reads.
    unsafe fn load_even(src: *const f32) -> Self;

    /// As [`load_even`](Self::load_even), widened.
    ///
    /// # Safety
    /// As for `load_even`.
    #[inline(always)]
    unsafe fn load_even_f16(src: *const f16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { element::load_each(src, 2) }
    }

    /// As [`load_even`](Self::load_even), widened.
    ///
    /// # Safety
    /// As for `load_even`.
    #[inline(always)]
    unsafe fn load_even_bf16(src: *const bf16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { element::load_each(src, 2) }
    }

    /// As [`load_pairs`](Self::load_pairs), of every other value.
    ///
    /// # Safety
    /// As for `load_even`, of both.
    #[inline(always)]
    unsafe fn load_even_pairs(first: *const bf16, second: *const bf16) -> Self {
        // SAFETY: the caller's promise.
        unsafe { element::load_each_pair(first, second, 2) }
    }

    /// Asks for a cache line to be fetched, where the CPU can be asked; never faults.
    ///
    /// # Safety
    /// The CPU has the instruction set of this type.
    unsafe fn fetch(src: *const f32);

    /// As [`fetch`](Self::fetch), for a line that will be written.
    ///
    /// # Safety
    /// The CPU has the instruction set of this type.
    unsafe fn fetch_mut(dst: *mut f32);

    /// Stores `LANES` values.
    ///
    /// # Safety
    /// `dst` is valid for `LANES` writes. No alignment is needed.
    unsafe fn store(self, dst: *mut f32);

    /// Stores the lanes of `tail` and touches nothing else.
    ///
    /// # Safety
    /// As for `store`, for the lanes of `tail` only.
    unsafe fn store_tail(self, dst: *mut f32, tail: Self::Tail);

    /// Loads four columns of `LANES` rows: lane `r` of result `c` is `src[r * stride + c]`.
    ///
    /// # Safety
    /// The CPU has the instruction set of this type; the first four values of each of the
    /// `LANES` rows are readable.
    unsafe fn load_columns(src: *const f32, stride: usize) -> [Self; 4];

    /// Every lane `x`, in the instruction set that `self` proves.
    fn like(self, x: f32) -> Self;

    /// `self * b + c`: rounded once where the instruction set has a fused multiply-add, twice
    /// on the portable one, which never calls libm for it.
    fn mul_add(self, b: Self, c: Self) -> Self;

    /// The product as an unevaluated sum: the rounded product and what rounding lost.
    ///
    /// Exact unless something overflows, or the product's low half underflows.
    fn mul_exact(self, b: Self) -> (Self, Self);

    /// The larger of `self` and `bound`; a NaN in `self` stays, `bound` is not NaN.
    fn max(self, bound: Self) -> Self;

    /// The smaller of `self` and `bound`; a NaN in `self` stays, `bound` is not NaN.
    fn min(self, bound: Self) -> Self;

    /// The absolute value.
    fn abs(self) -> Self;

    /// `self` with the sign of `sign`.
    fn copysign(self, sign: Self) -> Self;

    /// The nearest integer, halves to even. `|self| < 2^22`, or NaN.
    fn round(self) -> Self;

    /// `self * 2^n`, rounded once, for integers `n` in `-252..=254`. Where `n` is NaN the result
    /// is anything, but NaN if `self` is.
    fn scale_exp2(self, n: Self) -> Self;

    /// Where `self > b`; false for NaN.
    fn gt(self, b: Self) -> Self::Mask;

    /// Where `self >= b`; false for NaN.
    fn ge(self, b: Self) -> Self::Mask;

    /// `a` where the mask is set, else `b`.
    fn select(mask: Self::Mask, a: Self, b: Self) -> Self;
}

/// Implements the operators that [`Simd`] asks for, from functions of one instruction set.
macro_rules! operators {
    ($vector:ident: add $add:expr, sub $sub:expr, mul $mul:expr, div $div:expr, neg $neg:expr) => {
        operators!(@binary $vector, Add::add, $add);
        operators!(@binary $vector, Sub::sub, $sub);
        operators!(@binary $vector, Mul::mul, $mul);
        operators!(@binary $vector, Div::div, $div);
        operators!(@scalar $vector, Add::add);
        operators!(@scalar $vector, Sub::sub);
        operators!(@scalar $vector, Mul::mul);
        impl std::ops::Neg for $vector {
            type Output = Self;
            #[inline(always)]
            fn neg(self) -> Self {
                // SAFETY: `self` proves the instruction set.
                #[allow(unused_unsafe, reason = "the portable vector needs no instruction set")]
                unsafe {
                    $neg(self)
                }
            }
        }
    };
    (@binary $vector:ident, $trait:ident::$method:ident, $function:expr) => {
        impl std::ops::$trait for $vector {
            type Output = Self;
            #[inline(always)]
            fn $method(self, b: Self) -> Self {
                // SAFETY: `self` proves the instruction set.
                #[allow(unused_unsafe, reason = "the portable vector needs no instruction set")]
                unsafe {
                    $function(self, b)
                }
            }
        }
    };
    (@scalar $vector:ident, $trait:ident::$method:ident) => {
        impl std::ops::$trait<f32> for $vector {
            type Output = Self;
            #[inline(always)]
            fn $method(self, b: f32) -> Self {
                std::ops::$trait::$method(self, self.like(b))
            }
        }
    };
}
use operators;

/// Writes a safe function over every instruction set from an unsafe generic one, whose only
/// requirement is that the CPU has the vector's instructions.
///
/// `per_isa! { pub(crate) fn scale(x: &mut [f32], by: f32) = scale_lanes; }` makes
/// `scale(isa: Supported, x, by)`, which calls `scale_lanes::<V>(x, by)`. `[unsafe] fn` makes it
/// unsafe, for what the generic one requires besides.
macro_rules! per_isa {
    ($($(#[$doc:meta])* $vis:vis $([$unsafe:tt])? fn $name:ident$(<$type:ident: $bound:path>)?($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $generic:ident;)*) => {$(
        $(#[$doc])*
        $vis $($unsafe)? fn $name$(<$type: $bound>)?(isa: $crate::cpu::isa::Supported, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            $($unsafe)? fn avx2$(<$type: $bound>)?($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function has the target features.
                unsafe { $generic::<$crate::cpu::simd::avx2::F32x8 $(, $type)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw")]
            $($unsafe)? fn avx512$(<$type: $bound>)?($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function has the target features.
                unsafe { $generic::<$crate::cpu::simd::avx512::F32x16 $(, $type)?>($($arg),*) }
            }
            match isa.isa() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `isa` proves that the CPU has these features.
                $crate::cpu::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `isa` proves that the CPU has these features.
                $crate::cpu::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: every CPU of this target has the baseline.
                _ => unsafe { $generic::<$crate::cpu::simd::Baseline $(, $type)?>($($arg),*) },
            }
        }
    )*};
}
pub(crate) use per_isa;

/// Asks for a cache line that will be written. (The intrinsic becomes a plain prefetch unless the
/// whole program is compiled for a CPU that has this one; others take it for a NOP.)
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetchw(dst: *mut f32) {
    #[cfg(not(miri))]
    // SAFETY: the instruction changes no value, and never faults.
    unsafe {
        let line = dst.addr();
        std::arch::asm!("prefetchw [{}]", in(reg) line, options(nomem, nostack, preserves_flags))
    }
    #[cfg(miri)]
    let _ = dst;
}
