//! The epilogue of a tile in registers: bias, a clip and a residual, stored straight to dst.
//!
//! It is compiled for every size of every instruction set, so that what it is written in tells in the
//! time that the crate takes to compile: loops over indices, not iterators.
#![expect(clippy::needless_range_loop, reason = "as said above")]

use super::{AnyEpilogue, Operand, ResidualOrder, Simple, TileEpilogue};
use crate::cpu::microkernel::{At, Grid, Product, offset};
use crate::cpu::simd::{self, Simd};
use crate::dtype::{DType, Element};
use std::ptr;

/// What [`finish`](super::finish) needs to know of a grid's tiles where the epilogue runs in registers, worked out
/// before the sums are computed, while no register is taken.
///
/// It is whole where they go through memory, too: the compiler looks at parts of it before it asks.
pub(crate) struct Direct<'a, const R: usize> {
    /// What tensors hold; `None` is through memory.
    pub(super) stored: Option<DType>,
    simple: Simple,
    channel: usize,
    scale: &'a [f32],
    bias: &'a [f32],
    dst: Rows<R>,
    residual: Rows<R>,
}

/// The rows of an operand: the first tile's, and how far the next tile's are, in bytes.
struct Rows<const R: usize> {
    ptr: *mut (),
    offsets: [isize; R],
    step: [isize; 2],
}

impl<const R: usize> Rows<R> {
    const NONE: Self = Self { ptr: ptr::null_mut(), offsets: [0; R], step: [0; 2] };

    #[inline(always)]
    fn new<T>(
        operand: &Operand<'_, *const T>,
        grid: &Grid<'_>,
        epilogue: &TileEpilogue<'_, T>,
    ) -> Self {
        let bytes = |elements: isize| elements.wrapping_mul(size_of::<T>() as isize);
        let mut offsets = operand.row_offsets(epilogue.axis, epilogue.channel);
        for offset in &mut offsets {
            *offset = bytes(*offset);
        }
        let strides = [operand.channel_stride, operand.position_stride];
        let step = |i: usize| [grid.channel_step[i], grid.position_step[i]];
        let step = [bytes(offset(step(0), strides)), bytes(offset(step(1), strides))];
        Self { ptr: operand.ptr.cast_mut().cast(), offsets, step }
    }

    /// What the offsets of a tile's rows count from.
    #[inline(always)]
    fn tile(&self, at: At) -> *mut () {
        self.ptr.wrapping_byte_offset(offset(at, self.step))
    }
}

impl<'a, const R: usize> Direct<'a, R> {
    /// Tiles go through memory where their epilogue does not run in registers, and all of those types
    /// that [`registers`] leaves out.
    #[inline(always)]
    pub(crate) fn new<V: Simd, P: Product<V>, const TAIL: bool>(grid: &Grid<'a>) -> Self {
        let [stores_f32, stores_f16, stores_bf16] = const { registers::<V, P, TAIL>() };
        let direct = match grid.epilogue {
            AnyEpilogue::F32(epilogue) if stores_f32 => Self::of(grid, epilogue),
            AnyEpilogue::F16(epilogue) if stores_f16 => Self::of(grid, epilogue),
            AnyEpilogue::Bf16(epilogue) if stores_bf16 => Self::of(grid, epilogue),
            _ => None,
        };
        direct.unwrap_or(Self {
            stored: None,
            simple: Simple { lower: 0.0, upper: 0.0, residual: None },
            channel: 0,
            scale: &[],
            bias: &[],
            dst: Rows::NONE,
            residual: Rows::NONE,
        })
    }

    #[inline(always)]
    fn of<T: Element>(grid: &Grid<'a>, epilogue: &TileEpilogue<'a, T>) -> Option<Self> {
        let simple = epilogue.direct()?;
        let residual = match simple.residual {
            Some(_) => Rows::new(&epilogue.residual(), grid, epilogue),
            None => Rows::NONE,
        };
        let &TileEpilogue { channel, scale, bias, dst, .. } = epilogue;
        debug_assert_eq!(scale.is_empty(), !scaled::<T>());
        let dst = Rows::new(&dst.read(), grid, epilogue);
        Some(Self { stored: Some(T::DTYPE), simple, channel, scale, bias, dst, residual })
    }

    /// Asks for the lines of dst that a tile of `NV` vectors will be stored to.
    ///
    /// # Safety
    /// The CPU has `V`'s instruction set.
    #[inline(always)]
    pub(crate) unsafe fn fetch<V: Simd, const NV: usize>(&self, at: At) {
        let Some(dtype) = self.stored else { return };
        let dst = self.dst.tile(at);
        for &offset in &self.dst.offsets {
            let row = dst.wrapping_byte_offset(offset).cast::<f32>();
            for v in 0..NV {
                // SAFETY: the caller's promise.
                unsafe { V::fetch_mut(row.wrapping_byte_add(v * V::LANES * dtype.size())) }
            }
        }
    }
}

/// Which types' tiles are stored from registers: f32, f16, bf16. Tails of 16 bits are not where they
/// would be stored lane by lane.
pub(super) const fn registers<V: Simd, P: Product<V>, const TAIL: bool>() -> [bool; 3] {
    let [f32, f16, bf16] = P::STORES;
    let narrow = V::TAILS_ARE_FREE || !TAIL;
    [f32, f16 && narrow, bf16 && narrow]
}

/// A row's vectors, the last one cut to `tail` if `TAIL`.
///
/// # Safety
/// As [`Simd::load`] and [`Simd::load_tail`].
#[inline(always)]
pub(crate) unsafe fn load_row<V: Simd, T: Element, const NV: usize, const TAIL: bool>(
    src: *const T,
    tail: V::Tail,
) -> [V; NV] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [V::splat(0.0); NV];
        for v in 0..NV {
            let src = src.wrapping_add(v * V::LANES);
            row[v] = if TAIL && v == NV - 1 { simd::load_tail(src, tail) } else { simd::load(src) };
        }
        row
    }
}

/// A row of one value.
///
/// # Safety
/// The CPU has `V`'s instruction set; the value is readable.
#[inline(always)]
unsafe fn splat_row<V: Simd, const NV: usize>(value: *const f32) -> [V; NV] {
    // SAFETY: the caller's promises. A read that demands no alignment is not checked for it.
    unsafe { [V::splat(value.read_unaligned()); NV] }
}

/// Stores a row's vectors, the last one cut to `tail` if `TAIL`.
///
/// # Safety
/// As [`Simd::store`] and [`Simd::store_tail`].
#[inline(always)]
unsafe fn store_row<V: Simd, P: Product<V>, T: Element, const NV: usize, const TAIL: bool>(
    row: [V; NV],
    dst: *mut T,
    tail: V::Tail,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for v in 0..NV {
            let dst = dst.wrapping_add(v * V::LANES);
            if TAIL && v == NV - 1 {
                P::store_tail(row[v], dst, tail);
            } else {
                P::store(row[v], dst);
            }
        }
    }
}

#[inline(always)]
fn add_row<V: Simd, const NV: usize>(mut x: [V; NV], y: [V; NV]) -> [V; NV] {
    for v in 0..NV {
        x[v] = x[v] + y[v];
    }
    x
}

#[inline(always)]
fn mul_add_row<V: Simd, const NV: usize>(mut x: [V; NV], y: [V; NV], z: [V; NV]) -> [V; NV] {
    for v in 0..NV {
        x[v] = x[v].mul_add(y[v], z[v]);
    }
    x
}

#[inline(always)]
fn max_row<V: Simd, const NV: usize>(mut x: [V; NV], bound: V) -> [V; NV] {
    for v in 0..NV {
        x[v] = x[v].max(bound);
    }
    x
}

#[inline(always)]
fn clip_row<V: Simd, const NV: usize>(x: [V; NV], low: V, high: V) -> [V; NV] {
    let mut x = max_row(x, low);
    for v in 0..NV {
        x[v] = x[v].min(high);
    }
    x
}

/// Whether the sums of tensors of this type are scaled: a weight of 16 bits stays as it is.
const fn scaled<T: Element>() -> bool {
    !matches!(T::DTYPE, DType::F32)
}

/// Applies the epilogue to a tile in registers, and stores it.
///
/// # Safety
/// As [`finish`](super::finish).
#[inline(always)]
pub(super) unsafe fn finish_direct<
    V: Simd,
    P: Product<V>,
    T: Element,
    const R: usize,
    const NV: usize,
    const TAIL: bool,
    const ROWS: bool,
>(
    acc: [[V; NV]; R],
    tail: V::Tail,
    grid: &Grid<'_>,
    at: At,
    direct: &Direct<'_, R>,
) {
    let &Direct { simple: Simple { lower, upper, residual }, channel, scale, bias, .. } = direct;
    let [[i, j], [down, right]] = [at, grid.channel_step];
    let channel = channel.wrapping_add(i.wrapping_mul(down)).wrapping_add(j.wrapping_mul(right));
    let (scale, bias) = (scale.as_ptr().wrapping_add(channel), bias.as_ptr().wrapping_add(channel));
    let (dst, added) = (direct.dst.tile(at), direct.residual.tile(at));
    // SAFETY: the CPU has V's instruction set; the parameters cover the lanes of the tile.
    let (lanes, scales) = unsafe {
        let none = [V::splat(0.0); NV];
        let lanes = if ROWS { none } else { load_row::<V, f32, NV, TAIL>(bias, tail) };
        let scales = match ROWS || const { !scaled::<T>() } {
            true => none,
            false => load_row::<V, f32, NV, TAIL>(scale, tail),
        };
        (lanes, scales)
    };
    // Bias, then the body, then the store, row by row: sums are complete in that order, and what
    // waits in the CPU's queues for a sum that is not there yet keeps the next tile's
    // multiplications out of them. Each body is straight code.
    macro_rules! each_row {
        (|$x:ident, $residual:ident| $body:expr) => {{
            for row in 0..R {
                // SAFETY: as above; they cover its rows, too, and tails cut the rest; the rows of dst
                // and of the residual are valid for every lane of the tile.
                unsafe {
                    let bias = if ROWS { splat_row(bias.wrapping_add(row)) } else { lanes };
                    let $x = if const { scaled::<T>() } {
                        let scale = if ROWS { splat_row(scale.wrapping_add(row)) } else { scales };
                        mul_add_row(acc[row], scale, bias)
                    } else {
                        add_row(acc[row], bias)
                    };
                    let $residual =
                        added.wrapping_byte_offset(direct.residual.offsets[row]).cast::<T>();
                    let x: [V; NV] = $body;
                    let dst = dst.wrapping_byte_offset(direct.dst.offsets[row]).cast::<T>();
                    store_row::<V, P, T, NV, TAIL>(x, dst, tail);
                }
            }
        }};
    }
    let none = [f32::NEG_INFINITY, f32::INFINITY];
    let clip = [lower, upper];
    // SAFETY: the CPU has V's instruction set, here and below.
    let (low, high) = unsafe { (V::splat(clip[0]), V::splat(clip[1])) };
    // What a constant excludes is not even compiled.
    match ([lower > none[0], upper < none[1]], residual) {
        ([false, false], None) if const { !scaled::<T>() } => each_row!(|x, _residual| x),
        ([true, false], None) if const { !scaled::<T>() } => {
            each_row!(|x, _residual| max_row(x, low))
        }
        (_, None) => each_row!(|x, _residual| clip_row(x, low, high)),
        // One body for both orders: bounds that are infinite change nothing.
        (_, Some(order)) => {
            let (before, after) = match order {
                ResidualOrder::BeforeClip => (none, clip),
                ResidualOrder::AfterClip => (clip, none),
            };
            // SAFETY: as above.
            let (low, high, lowest, highest) = unsafe {
                let (low, high) = (V::splat(before[0]), V::splat(before[1]));
                (low, high, V::splat(after[0]), V::splat(after[1]))
            };
            each_row!(|x, residual| {
                let x = clip_row(x, low, high);
                let x = add_row(x, load_row::<V, T, NV, TAIL>(residual, tail));
                clip_row(x, lowest, highest)
            })
        }
    }
}
