//! The epilogue of a tile in registers: bias, a clip and a residual, stored straight to dst.

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
        Self {
            ptr: operand.ptr.cast_mut().cast(),
            offsets: operand.row_offsets(epilogue.axis, epilogue.channel).map(bytes),
            step: [0, 1].map(|i| {
                bytes(offset(
                    [grid.channel_step[i], grid.position_step[i]],
                    [operand.channel_stride, operand.position_stride],
                ))
            }),
        }
    }

    /// Lane 0 of each row of a tile.
    #[inline(always)]
    fn of<T>(&self, at: At) -> impl Iterator<Item = *mut T> {
        let ptr = self.ptr.wrapping_byte_offset(offset(at, self.step));
        self.offsets.iter().map(move |&offset| ptr.wrapping_byte_offset(offset).cast())
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
        debug_assert_eq!(scale.is_empty(), T::DTYPE == DType::F32);
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
        for row in self.dst.of::<u8>(at) {
            for v in 0..NV {
                // SAFETY: the caller's promise.
                unsafe { V::fetch_mut(row.wrapping_add(v * V::LANES * dtype.size()).cast()) }
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
        for (v, x) in row.iter_mut().enumerate() {
            let src = src.add(v * V::LANES);
            *x = match TAIL && v == NV - 1 {
                true => simd::load_tail(src, tail),
                false => simd::load(src),
            };
        }
        row
    }
}

#[inline(always)]
fn add_row<V: Simd, const NV: usize>(mut x: [V; NV], y: [V; NV]) -> [V; NV] {
    for (x, y) in x.iter_mut().zip(y) {
        *x = *x + y;
    }
    x
}

#[inline(always)]
fn mul_add_row<V: Simd, const NV: usize>(mut x: [V; NV], y: [V; NV], z: [V; NV]) -> [V; NV] {
    for (x, (y, z)) in x.iter_mut().zip(y.into_iter().zip(z)) {
        *x = x.mul_add(y, z);
    }
    x
}

#[inline(always)]
fn max_row<V: Simd, const NV: usize>(mut x: [V; NV], bound: V) -> [V; NV] {
    for x in &mut x {
        *x = x.max(bound);
    }
    x
}

#[inline(always)]
fn clip_row<V: Simd, const NV: usize>(x: [V; NV], low: V, high: V) -> [V; NV] {
    let mut x = max_row(x, low);
    for x in &mut x {
        *x = x.min(high);
    }
    x
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
    let Simple { lower, upper, residual } = direct.simple;
    // Bias, then the body, then the store, row by row: sums are complete in that order, and what
    // waits in the CPU's queues for a sum that is not there yet keeps the next tile's
    // multiplications out of them. Each body is straight code.
    macro_rules! each_row {
        (|$x:ident, $residual:ident| $body:expr) => {{
            let [i, j] = at;
            let &Direct { channel, scale, bias, .. } = direct;
            let [down, right] = grid.channel_step;
            let channel =
                channel.wrapping_add(i.wrapping_mul(down)).wrapping_add(j.wrapping_mul(right));
            let scaled = T::DTYPE != DType::F32;
            // SAFETY: the parameters cover rows and lanes of the tile, tails cut the rest; the
            // rows of dst and of the residual are valid for every lane of the tile.
            unsafe {
                let (scale, bias) =
                    (scale.as_ptr().wrapping_add(channel), bias.as_ptr().add(channel));
                let none = [V::splat(0.0); NV];
                let lanes = if ROWS { none } else { load_row::<V, f32, NV, TAIL>(bias, tail) };
                let scales = match ROWS || !scaled {
                    true => none,
                    false => load_row::<V, f32, NV, TAIL>(scale, tail),
                };
                let rows = acc.iter().zip(direct.dst.of::<T>(at)).zip(direct.residual.of::<T>(at));
                for (row, ((sums, dst), $residual)) in rows.enumerate() {
                    let bias = if ROWS { [V::splat(*bias.add(row)); NV] } else { lanes };
                    let $x = if scaled {
                        let scale = if ROWS { [V::splat(*scale.add(row)); NV] } else { scales };
                        mul_add_row(*sums, scale, bias)
                    } else {
                        add_row(*sums, bias)
                    };
                    let row: [V; NV] = $body;
                    for (v, x) in row.iter().enumerate() {
                        let dst = dst.add(v * V::LANES);
                        match TAIL && v == NV - 1 {
                            true => P::store_tail(*x, dst, tail),
                            false => P::store(*x, dst),
                        }
                    }
                }
            }
        }};
    }
    let none = [f32::NEG_INFINITY, f32::INFINITY];
    let clip = [lower, upper];
    // SAFETY: the CPU has V's instruction set, here and below.
    let (low, high) = unsafe { (V::splat(clip[0]), V::splat(clip[1])) };
    match ([lower > none[0], upper < none[1]], residual) {
        ([false, false], None) if T::DTYPE == DType::F32 => each_row!(|x, _residual| x),
        ([true, false], None) if T::DTYPE == DType::F32 => {
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
