//! A batch norm, and a clip behind it, in one pass each over tensors where they are: what most
//! layers in training are.

use std::ptr;

use crate::cpu::simd::{Simd, per_isa};
use crate::cpu::train::lanes::Per;

per_isa! {
    /// `out = clip((x - hi) * scale + shift)`; parameters `[hi, scale, shift]`.
    ///
    /// # Safety
    /// `x` is readable and `out` writable for `len` values, whole lines.
    pub(super) [unsafe] fn forward(per: Per<'_, 3>, clip: [f32; 2], x: *const f32, out: *mut f32, len: usize) = forward_block;

    /// Adds the sums of `g` and of `g * (x - hi)` of one channel, where `g` is `d` where the clip's
    /// input lies inside its bounds, else zero; parameters as in [`forward`].
    ///
    /// # Safety
    /// `x` and `d` are readable for `len` values.
    pub(super) [unsafe] fn sums_of_row(per: [f32; 3], clip: Option<[f32; 2]>, x: *const f32, d: *const f32, len: usize, sums: &mut [f64; 2]) = sums_row;

    /// As [`sums_of_row`], of lines of every channel, added in f32.
    ///
    /// # Safety
    /// As there.
    pub(super) [unsafe] fn sums_of_lines(per: [&[f32]; 3], clip: Option<[f32; 2]>, x: *const f32, d: *const f32, len: usize, sums: [&mut [f32]; 2]) = sums_lines;

    /// `out = g * a + (x - hi) * b + c`; parameters `[hi, scale, shift, a, b, c]`.
    ///
    /// # Safety
    /// `x` and `d` are readable and `out` writable for `len` values, whole lines; `out` may be `x`.
    pub(super) [unsafe] fn backward(per: Per<'_, 6>, clip: Option<[f32; 2]>, x: *const f32, d: *const f32, out: *mut f32, len: usize) = backward_block;
}

/// Runs `body` for each vector of some lines: with the vectors of the parameters there, the place,
/// and whether it is a line's last, which is cut to its tail.
macro_rules! vectors {
    ($per:ident, $n:literal, $len:ident, |$values:ident, $at:ident, $tail:ident| $body:expr) => {
        match $per {
            Per::One(values) => {
                let $values = values.map(|value| V::splat(value));
                let whole = $len / V::LANES * V::LANES;
                for $at in (0..whole).step_by(V::LANES) {
                    let $tail: Option<V::Tail> = None;
                    $body
                }
                if whole < $len {
                    let ($at, $tail) = (whole, Some(V::tail($len - whole)));
                    $body
                }
            }
            Per::Each(values) => {
                let line = values[0].len();
                assert!(values.iter().all(|v| v.len() == line), "one value per channel");
                assert!($len.is_multiple_of(line), "whole lines");
                let values = values.map(|values| values.as_ptr());
                let whole = line / V::LANES * V::LANES;
                for first in (0..$len).step_by(line) {
                    for i in (0..whole).step_by(V::LANES) {
                        let mut $values = [V::splat(0.0); $n];
                        for (to, from) in $values.iter_mut().zip(values) {
                            *to = V::load(from.add(i));
                        }
                        let $at = first + i;
                        let $tail: Option<V::Tail> = None;
                        $body
                    }
                    if whole < line {
                        let tail = V::tail(line - whole);
                        let mut $values = [V::splat(0.0); $n];
                        for (to, from) in $values.iter_mut().zip(values) {
                            *to = V::load_tail(from.add(whole), tail);
                        }
                        let ($at, $tail) = (first + whole, Some(tail));
                        $body
                    }
                }
            }
        }
    };
}

/// # Safety
/// As [`Simd::load`] or [`Simd::load_tail`].
#[inline(always)]
unsafe fn load<V: Simd>(from: *const f32, tail: Option<V::Tail>) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        match tail {
            None => V::load(from),
            Some(tail) => V::load_tail(from, tail),
        }
    }
}

/// # Safety
/// As [`Simd::store`] or [`Simd::store_tail`].
#[inline(always)]
unsafe fn store<V: Simd>(x: V, to: *mut f32, tail: Option<V::Tail>) {
    // SAFETY: the caller's promise.
    unsafe {
        match tail {
            None => x.store(to),
            Some(tail) => x.store_tail(to, tail),
        }
    }
}

/// How far ahead of its use memory is fetched, in values.
const AHEAD: usize = 256;

#[inline(always)]
unsafe fn forward_block<V: Simd>(
    per: Per<'_, 3>,
    [lo, hi]: [f32; 2],
    x: *const f32,
    out: *mut f32,
    len: usize,
) {
    // SAFETY: the CPU has V's instruction set; vectors and tails end with their lines.
    unsafe {
        let (lo, high) = (V::splat(lo), V::splat(hi));
        vectors!(per, 3, len, |p, at, tail| {
            V::fetch(x.wrapping_add(at + AHEAD));
            let y = (load::<V>(x.add(at), tail) - p[0]).mul_add(p[1], p[2]);
            store(y.max(lo).min(high), out.add(at), tail);
        });
    }
}

/// `d` where `lo < y < hi` or y is NaN, else zero.
#[inline(always)]
fn inside<V: Simd>(y: V, bounds: Option<[V; 2]>, d: V) -> V {
    match bounds {
        None => d,
        Some([lo, hi]) => {
            let zero = d.like(0.0);
            V::select(lo.ge(y), zero, V::select(y.ge(hi), zero, d))
        }
    }
}

/// # Safety
/// The CPU has `V`'s instruction set.
#[inline(always)]
unsafe fn bounds<V: Simd>(clip: Option<[f32; 2]>) -> Option<[V; 2]> {
    // SAFETY: the caller's promise.
    clip.map(|[lo, hi]| unsafe { [V::splat(lo), V::splat(hi)] })
}

#[inline(always)]
unsafe fn sums_row<V: Simd>(
    per: [f32; 3],
    clip: Option<[f32; 2]>,
    x: *const f32,
    d: *const f32,
    len: usize,
    sums: &mut [f64; 2],
) {
    let per: Per<'_, 3> = Per::One(per);
    // SAFETY: the CPU has V's instruction set; vectors and the tail end with the row.
    unsafe {
        let bounds = bounds::<V>(clip);
        // Two of each take turns, since a chain of additions is longer than the loads.
        let (mut ones, mut products) = ([V::splat(0.0); 2], [V::splat(0.0); 2]);
        vectors!(per, 3, len, |p, at, tail| {
            let x = load::<V>(x.add(at), tail) - p[0];
            let g = inside(x.mul_add(p[1], p[2]), bounds, load::<V>(d.add(at), tail));
            ones = [ones[1], ones[0] + g];
            products = [products[1], g.mul_add(x, products[0])];
        });
        for (sum, vectors) in sums.iter_mut().zip([ones, products]) {
            let mut lanes = [0.0f32; 16];
            (vectors[0] + vectors[1]).store(lanes.as_mut_ptr());
            *sum += lanes[..V::LANES].iter().map(|&lane| f64::from(lane)).sum::<f64>();
        }
    }
}

#[inline(always)]
unsafe fn sums_lines<V: Simd>(
    per: [&[f32]; 3],
    clip: Option<[f32; 2]>,
    x: *const f32,
    d: *const f32,
    len: usize,
    [ones, products]: [&mut [f32]; 2],
) {
    let line = per[0].len();
    assert!(ones.len() == line && products.len() == line, "one sum per channel");
    let per: Per<'_, 3> = Per::Each(per);
    // SAFETY: the CPU has V's instruction set; vectors and tails end with their lines.
    unsafe {
        let bounds = bounds::<V>(clip);
        let (ones, products) = (ones.as_mut_ptr(), products.as_mut_ptr());
        let mut first = 0;
        vectors!(per, 3, len, |p, at, tail| {
            if at >= first + line {
                first += line;
            }
            let i = at - first;
            V::fetch(x.wrapping_add(at + AHEAD));
            V::fetch(d.wrapping_add(at + AHEAD));
            let x = load::<V>(x.add(at), tail) - p[0];
            let g = inside(x.mul_add(p[1], p[2]), bounds, load::<V>(d.add(at), tail));
            let sum = load::<V>(ones.add(i), tail) + g;
            store(sum, ones.add(i), tail);
            let product = g.mul_add(x, load::<V>(products.add(i), tail));
            store(product, products.add(i), tail);
        });
    }
}

#[inline(always)]
unsafe fn backward_block<V: Simd>(
    per: Per<'_, 6>,
    clip: Option<[f32; 2]>,
    x: *const f32,
    d: *const f32,
    out: *mut f32,
    len: usize,
) {
    debug_assert!(!ptr::eq(d, out), "the gradient by dst is only read");
    // SAFETY: the CPU has V's instruction set; vectors and tails end with their lines.
    unsafe {
        let bounds = bounds::<V>(clip);
        vectors!(per, 6, len, |p, at, tail| {
            V::fetch(x.wrapping_add(at + AHEAD));
            V::fetch(d.wrapping_add(at + AHEAD));
            let x = load::<V>(x.add(at), tail) - p[0];
            let g = inside(x.mul_add(p[1], p[2]), bounds, load::<V>(d.add(at), tail));
            store(g.mul_add(p[3], x.mul_add(p[4], p[5])), out.add(at), tail);
        });
    }
}
