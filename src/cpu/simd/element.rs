//! Vectors of f32 in and out of memory that holds another type.

use super::Simd;
use crate::dtype::{DType, Element, bf16};

/// As [`Simd::load`].
///
/// # Safety
/// As [`Simd::load`], for values of `T`.
#[inline(always)]
pub(crate) unsafe fn load<V: Simd, T: Element>(src: *const T) -> V {
    // SAFETY: the caller's promises; only one type has each dtype.
    unsafe {
        match T::DTYPE {
            DType::F32 => V::load(src.cast()),
            DType::F16 => V::load_f16(src.cast()),
            DType::Bf16 => V::load_bf16(src.cast()),
        }
    }
}

/// As [`Simd::load_even`].
///
/// # Safety
/// As [`Simd::load_even`], for values of `T`.
#[inline(always)]
pub(crate) unsafe fn load_even<V: Simd, T: Element>(src: *const T) -> V {
    // SAFETY: as in `load`.
    unsafe {
        match T::DTYPE {
            DType::F32 => V::load_even(src.cast()),
            DType::F16 => V::load_even_f16(src.cast()),
            DType::Bf16 => V::load_even_bf16(src.cast()),
        }
    }
}

/// As [`Simd::load_tail`].
///
/// # Safety
/// As [`Simd::load_tail`], for values of `T`.
#[inline(always)]
pub(crate) unsafe fn load_tail<V: Simd, T: Element>(src: *const T, tail: V::Tail) -> V {
    // SAFETY: as in `load`.
    unsafe {
        match T::DTYPE {
            DType::F32 => V::load_tail(src.cast(), tail),
            DType::F16 => V::load_tail_f16(src.cast(), tail),
            DType::Bf16 => V::load_tail_bf16(src.cast(), tail),
        }
    }
}

/// As [`Simd::store`], rounded to the nearest, ties to even.
///
/// # Safety
/// As [`Simd::store`], for values of `T`.
#[inline(always)]
pub(crate) unsafe fn store<V: Simd, T: Element>(x: V, dst: *mut T) {
    // SAFETY: as in `load`.
    unsafe {
        match T::DTYPE {
            DType::F32 => x.store(dst.cast()),
            DType::F16 => x.store_f16(dst.cast()),
            DType::Bf16 => x.store_bf16(dst.cast()),
        }
    }
}

/// As [`Simd::store_tail`], rounded to the nearest, ties to even.
///
/// # Safety
/// As [`Simd::store_tail`], for values of `T`.
#[inline(always)]
pub(crate) unsafe fn store_tail<V: Simd, T: Element>(x: V, dst: *mut T, tail: V::Tail) {
    // SAFETY: as in `load`.
    unsafe {
        match T::DTYPE {
            DType::F32 => x.store_tail(dst.cast(), tail),
            DType::F16 => x.store_tail_f16(dst.cast(), tail),
            DType::Bf16 => x.store_tail_bf16(dst.cast(), tail),
        }
    }
}

/// [`load`], value by value, of values that are `step` apart.
///
/// # Safety
/// As [`load`], for those values.
#[inline(always)]
pub(super) unsafe fn load_each<V: Simd, T: Element>(src: *const T, step: usize) -> V {
    let mut lanes = [0.0f32; 16];
    for (i, lane) in lanes[..V::LANES].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *lane = unsafe { *src.add(i * step) }.to_f32();
    }
    // SAFETY: the caller's promise; no vector has more than 16 lanes.
    unsafe { V::load(lanes.as_ptr()) }
}

/// [`Simd::load_pairs`], pair by pair, of values that are `step` apart.
///
/// # Safety
/// As [`Simd::load_pairs`], for those values.
#[inline(always)]
pub(super) unsafe fn load_each_pair<V: Simd>(
    first: *const bf16,
    second: *const bf16,
    step: usize,
) -> V {
    let mut lanes = [0.0f32; 16];
    for (i, lane) in lanes[..V::LANES].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let [low, high] = unsafe { [*first.add(i * step), *second.add(i * step)] };
        *lane = f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16);
    }
    // SAFETY: the caller's promise; no vector has more than 16 lanes.
    unsafe { V::load(lanes.as_ptr()) }
}

/// [`store`], value by value.
///
/// # Safety
/// As [`store`].
#[inline(always)]
pub(super) unsafe fn store_each<V: Simd, T: Element>(x: V, dst: *mut T) {
    let mut lanes = [0.0f32; 16];
    // SAFETY: no vector has more than 16 lanes; the caller's promise.
    unsafe {
        x.store(lanes.as_mut_ptr());
        for (i, &lane) in lanes[..V::LANES].iter().enumerate() {
            *dst.add(i) = T::from_f32(lane);
        }
    }
}

/// [`load_tail`] through a whole vector.
///
/// # Safety
/// As [`load_tail`].
#[inline(always)]
pub(super) unsafe fn load_tail_whole<V: Simd, T: Element>(src: *const T, tail: V::Tail) -> V {
    let mut lanes = [T::default(); 16];
    for (i, lane) in lanes[..V::lanes(tail)].iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *lane = unsafe { *src.add(i) };
    }
    // SAFETY: no vector has more than 16 lanes.
    unsafe { load(lanes.as_ptr()) }
}

/// [`store_tail`] through a whole vector.
///
/// # Safety
/// As [`store_tail`].
#[inline(always)]
pub(super) unsafe fn store_tail_whole<V: Simd, T: Element>(x: V, dst: *mut T, tail: V::Tail) {
    let mut lanes = [T::default(); 16];
    // SAFETY: no vector has more than 16 lanes; the caller's promise.
    unsafe {
        store(x, lanes.as_mut_ptr());
        for (i, &lane) in lanes[..V::lanes(tail)].iter().enumerate() {
            *dst.add(i) = lane;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Supported;
    use crate::cpu::simd::per_isa;
    use crate::dtype::f16;

    per_isa! {
        fn widened<T: Element>(x: &[T], out: &mut [f32]) = widen;
        fn narrowed<T: Element>(x: &[f32], out: &mut [T]) = narrow;
    }

    #[inline(always)]
    unsafe fn widen<V: Simd, T: Element>(x: &[T], out: &mut [f32]) {
        let whole = x.len() / V::LANES * V::LANES;
        // SAFETY: the CPU has V's instruction set; both slices are as long.
        unsafe {
            for i in (0..whole).step_by(V::LANES) {
                load::<V, T>(x.as_ptr().add(i)).store(out.as_mut_ptr().add(i));
            }
            if whole < x.len() {
                let tail = V::tail(x.len() - whole);
                load_tail::<V, T>(x.as_ptr().add(whole), tail)
                    .store_tail(out.as_mut_ptr().add(whole), tail);
            }
        }
    }

    #[inline(always)]
    unsafe fn narrow<V: Simd, T: Element>(x: &[f32], out: &mut [T]) {
        let whole = x.len() / V::LANES * V::LANES;
        // SAFETY: the CPU has V's instruction set; both slices are as long.
        unsafe {
            for i in (0..whole).step_by(V::LANES) {
                store(V::load(x.as_ptr().add(i)), out.as_mut_ptr().add(i));
            }
            if whole < x.len() {
                let tail = V::tail(x.len() - whole);
                let x = V::load_tail(x.as_ptr().add(whole), tail);
                store_tail(x, out.as_mut_ptr().add(whole), tail);
            }
        }
    }

    /// The values of a type, by its definition, and the nearest to a value, by search.
    fn check<T: Element>(bits: impl Fn(u16) -> T, of: impl Fn(T) -> u16, mantissa: u32) {
        let bias = (1 << (14 - mantissa)) - 1;
        let exact = |b: u16| {
            let (sign, e, m) =
                (b >> 15, i32::from(b >> mantissa) & (2 * bias + 1), b & ((1 << mantissa) - 1));
            let m = f64::from(m) / f64::from(1 << mantissa);
            let magnitude = match e {
                0 => m * 2f64.powi(1 - bias),
                e if e == 2 * bias + 1 && m == 0.0 => f64::INFINITY,
                e if e == 2 * bias + 1 => f64::NAN,
                e => (1.0 + m) * 2f64.powi(e - bias),
            };
            if sign == 1 { -magnitude } else { magnitude }
        };
        let all: Vec<T> = (0..=u16::MAX).map(bits).collect();
        for isa in Supported::all() {
            for len in [all.len(), 1, 2, 3, 7, 13] {
                let mut wide = vec![f32::INFINITY; len];
                widened(isa, &all[..len], &mut wide);
                for (b, &x) in wide.iter().enumerate() {
                    let want = exact(b as u16);
                    assert!(f64::from(x) == want || x.is_nan() && want.is_nan(), "{b:#x}: {x}");
                }
            }
            // Each finite value, what lies halfway to the next one, and one ulp to either side.
            let mut x = Vec::new();
            for b in (0..=u16::MAX).filter(|b| exact(b & 0x7fff).is_finite()) {
                let next = exact((b & 0x7fff) + 1);
                let next = if next.is_finite() { next } else { 2f64.powi(bias + 1) };
                let half = (exact(b & 0x7fff) + next) / 2.0;
                let half = half.copysign(exact(b)) as f32;
                x.extend([exact(b) as f32, half, half.next_up(), half.next_down()]);
            }
            x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::MAX, f32::MIN]);
            for cut in [0, 1, 2, 3, 5, 11] {
                let x = &x[..x.len() - cut];
                let mut narrow = vec![T::default(); x.len()];
                narrowed(isa, x, &mut narrow);
                for (&x, &got) in x.iter().zip(&narrow) {
                    let got = of(got);
                    if x.is_nan() {
                        assert!(exact(got).is_nan(), "{x}: {got:#x}");
                        continue;
                    }
                    assert_eq!(got >> 15, u16::from(x.is_sign_negative()), "{x}");
                    // Nobody is nearer, and of two as near the even one is it.
                    let largest = 2f64.powi(bias + 1);
                    let value = |b: u16| exact(b & 0x7fff).min(largest);
                    let distance = |b: u16| (value(b) - f64::from(x.abs()).min(largest)).abs();
                    let magnitude = got & 0x7fff;
                    for other in [magnitude.wrapping_sub(1), magnitude + 1] {
                        if other <= 0x7fff && !exact(other).is_nan() {
                            let (mine, theirs) = (distance(magnitude), distance(other));
                            let nearest =
                                mine < theirs || mine == theirs && magnitude.is_multiple_of(2);
                            assert!(nearest, "{x}: {got:#x}, {isa:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_value_is_widened_exactly_and_every_rounding_goes_to_the_nearest() {
        check(f16::from_bits, f16::to_bits, 10);
        check(bf16::from_bits, bf16::to_bits, 7);
    }
}
