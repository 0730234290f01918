//! The epilogue of a tile that lies in memory: any list of steps, any placement of dst.

use super::{Activate, AnyEpilogue, Buffer, ChannelAxis, ResidualOrder, Simple, TileEpilogue};
use crate::cpu::math;
use crate::cpu::microkernel::{At, Grid};
use crate::cpu::simd::{self, Simd};
use crate::dtype::Element;
use crate::epilogue::Step;

/// Applies the epilogue to a tile of a grid that lies in memory, each row padded to whole vectors, and
/// stores it.
///
/// # Safety
/// The CPU has `V`'s instruction set; `tile` is a [`Buffer`] that holds the tile; the grid's epilogue
/// is as [`super::finish`] wants it.
#[inline(always)]
pub(crate) unsafe fn finish_buffered<V: Simd>(
    grid: &Grid<'_>,
    at: At,
    tile: *mut f32,
    activate: Activate,
) {
    let &Grid { rows, cols, epilogue, .. } = grid;
    // SAFETY: the caller's promises.
    unsafe {
        match epilogue {
            AnyEpilogue::F32(epilogue) => {
                finish_tile::<V, _>(rows, cols, tile, epilogue.of_tile(grid, at), activate)
            }
            AnyEpilogue::F16(epilogue) => {
                finish_tile::<V, _>(rows, cols, tile, epilogue.of_tile(grid, at), activate)
            }
            AnyEpilogue::Bf16(epilogue) => {
                finish_tile::<V, _>(rows, cols, tile, epilogue.of_tile(grid, at), activate)
            }
        }
    }
}

/// # Safety
/// As [`finish_buffered`].
#[inline(always)]
unsafe fn finish_tile<V: Simd, T: Element>(
    rows: usize,
    cols: usize,
    tile: *mut f32,
    mut epilogue: TileEpilogue<'_, T>,
    activate: Activate,
) {
    let mut turned = Buffer::uninit();
    // SAFETY: the caller's promises; turning the tile turns the meaning of its rows with it.
    unsafe {
        let mut tile = Tile::<V>::new(rows, cols, tile);
        if !epilogue.dst.lanes_are_contiguous(epilogue.axis)
            && epilogue.dst.lanes_are_contiguous(epilogue.axis.flipped())
        {
            epilogue.axis = epilogue.axis.flipped();
            if let Some(simple) = epilogue.direct() {
                return tile.transpose_and_finish(&epilogue, simple);
            }
            tile = tile.transpose(turned.as_mut_ptr());
        }
        if let Some(simple) = epilogue.direct() {
            for row in 0..rows {
                for v in 0..tile.vectors {
                    tile.finish_simple(V::load(tile.at(row, v)), row, v, &epilogue, simple);
                }
            }
            return;
        }
        tile.add_bias(&epilogue);
        for step in epilogue.steps.list() {
            tile.apply(step, &epilogue, activate);
        }
        tile.store(&epilogue);
    }
}

/// Replaces each vector of a tile by an expression of it, its row and its index in the row.
macro_rules! update {
    ($tile:ident, |$x:ident, $row:ident, $v:ident| $value:expr) => {
        for $row in 0..$tile.rows {
            for $v in 0..$tile.vectors {
                let at = $tile.at($row, $v);
                let $x = V::load(at);
                let value: V = $value;
                value.store(at);
            }
        }
    };
}

/// `rows` rows of `vectors` whole vectors, of which the first `cols` lanes are real; the others
/// hold anything. `tail` selects the real lanes of a row's last vector.
struct Tile<V: Simd> {
    rows: usize,
    cols: usize,
    vectors: usize,
    tail: V::Tail,
    data: *mut f32,
}

/// A per-channel parameter of the tile, or one value for all of it.
type Parameter = *const f32;

// Every method is unsafe for the same reasons: the CPU has V's instruction set, `data` holds the
// tile, and the operands and parameters given cover the tile's rows and real lanes.
impl<V: Simd> Tile<V> {
    #[inline(always)]
    unsafe fn new(rows: usize, cols: usize, data: *mut f32) -> Self {
        let vectors = cols.div_ceil(V::LANES);
        // SAFETY: the CPU has V's instruction set.
        let tail = unsafe { V::tail(cols - (vectors - 1) * V::LANES) };
        Self { rows, cols, vectors, tail, data }
    }

    /// The first value of vector `v` of row `row`.
    #[inline(always)]
    unsafe fn at(&self, row: usize, v: usize) -> *mut f32 {
        // SAFETY: the vector is inside the buffer.
        unsafe { self.data.add((row * self.vectors + v) * V::LANES) }
    }

    /// Loads vector `v` of a row outside of the tile, without its padding.
    #[inline(always)]
    unsafe fn load<T: Element>(&self, row: *const T, v: usize) -> V {
        // SAFETY: the row has `cols` readable values.
        unsafe {
            let src = row.add(v * V::LANES);
            match v + 1 == self.vectors {
                true => simd::load_tail(src, self.tail),
                false => simd::load(src),
            }
        }
    }

    /// Stores vector `v` of a row outside of the tile, without its padding.
    #[inline(always)]
    unsafe fn store_vector<T: Element>(&self, x: V, row: *mut T, v: usize) {
        // SAFETY: the row has `cols` writable values.
        unsafe {
            let dst = row.add(v * V::LANES);
            match v + 1 == self.vectors {
                true => simd::store_tail(x, dst, self.tail),
                false => simd::store(x, dst),
            }
        }
    }

    /// The values of a per-channel parameter for vector `v` of row `row`.
    #[inline(always)]
    unsafe fn parameter(&self, axis: ChannelAxis, first: Parameter, row: usize, v: usize) -> V {
        // SAFETY: the parameter covers the tile's channels.
        unsafe {
            match axis {
                ChannelAxis::Rows => V::splat(*first.add(row)),
                ChannelAxis::Lanes => self.load(first, v),
            }
        }
    }

    /// Makes rows up to whole vectors readable, so that blocks of the tile can be turned.
    #[inline(always)]
    unsafe fn pad_rows(&self) {
        for row in self.rows..self.rows.next_multiple_of(V::LANES) {
            for v in 0..self.vectors {
                // SAFETY: the buffer has room for rows rounded up to whole vectors.
                unsafe { V::splat(0.0).store(self.at(row, v)) };
            }
        }
    }

    /// Four columns from `column`, of the `block`-th `LANES` rows.
    #[inline(always)]
    unsafe fn load_columns(&self, block: usize, column: usize) -> [V; 4] {
        let stride = self.vectors * V::LANES;
        // SAFETY: rows and columns up to whole vectors are inside the buffer.
        unsafe { V::load_columns(self.data.add(block * V::LANES * stride + column), stride) }
    }

    /// Turns rows into lanes. `into` is a [`Buffer`].
    #[inline(always)]
    unsafe fn transpose(&self, into: *mut f32) -> Self {
        // SAFETY: the buffers have room for rows and columns up to whole vectors.
        unsafe {
            self.pad_rows();
            let turned = Self::new(self.cols, self.rows, into);
            for block in 0..turned.vectors {
                for column in (0..self.cols).step_by(4) {
                    for (c, x) in self.load_columns(block, column).into_iter().enumerate() {
                        x.store(turned.at(column + c, block));
                    }
                }
            }
            turned
        }
    }

    /// Turns rows into lanes, then adds bias and residual, clips and stores, in one sweep.
    /// `epilogue` describes the turned tile.
    #[inline(always)]
    unsafe fn transpose_and_finish<T: Element>(
        &self,
        epilogue: &TileEpilogue<'_, T>,
        simple: Simple,
    ) {
        // SAFETY: the turned tile has the rows that are stored; its lanes are contiguous in dst
        // and in the residual.
        unsafe {
            self.pad_rows();
            let turned = Self::new(self.cols, self.rows, self.data);
            for block in 0..turned.vectors {
                for column in (0..self.cols).step_by(4) {
                    let columns = self.load_columns(block, column);
                    for (c, x) in columns.into_iter().enumerate() {
                        if column + c < self.cols {
                            turned.finish_simple(x, column + c, block, epilogue, simple);
                        }
                    }
                }
            }
        }
    }

    /// Bias, residual and clip for vector `v` of row `row`, and its store.
    #[inline(always)]
    unsafe fn finish_simple<T: Element>(
        &self,
        mut x: V,
        row: usize,
        v: usize,
        epilogue: &TileEpilogue<'_, T>,
        simple: Simple,
    ) {
        let TileEpilogue { axis, channel, scale, bias, dst, .. } = *epilogue;
        // SAFETY: lanes of dst and of the residual are contiguous.
        unsafe {
            let bias = self.parameter(axis, bias.as_ptr().add(channel), row, v);
            x = match scale.is_empty() {
                true => x + bias,
                false => {
                    let scale = self.parameter(axis, scale.as_ptr().add(channel), row, v);
                    x.mul_add(scale, bias)
                }
            };
            if simple.residual == Some(ResidualOrder::BeforeClip) {
                x = x + self.residual_vector(row, v, epilogue);
            }
            if simple.lower > f32::NEG_INFINITY {
                x = x.max(x.like(simple.lower));
            }
            if simple.upper < f32::INFINITY {
                x = x.min(x.like(simple.upper));
            }
            if simple.residual == Some(ResidualOrder::AfterClip) {
                x = x + self.residual_vector(row, v, epilogue);
            }
            self.store_vector(x, dst.ptr.offset(dst.row_offset(axis, channel, row)), v);
        }
    }

    /// Vector `v` of row `row` of the residual, whose lanes are contiguous.
    #[inline(always)]
    unsafe fn residual_vector<T: Element>(
        &self,
        row: usize,
        v: usize,
        epilogue: &TileEpilogue<'_, T>,
    ) -> V {
        let residual = epilogue.residual();
        // SAFETY: the residual is readable for every row and real lane of the tile.
        unsafe {
            let offset = residual.row_offset(epilogue.axis, epilogue.channel, row);
            self.load(residual.ptr.offset(offset), v)
        }
    }

    #[inline(always)]
    unsafe fn add_bias<T: Element>(&self, epilogue: &TileEpilogue<'_, T>) {
        let TileEpilogue { axis, channel, scale, bias, .. } = *epilogue;
        // SAFETY: scale and bias cover the tile's channels.
        unsafe {
            let bias = bias.as_ptr().add(channel);
            if scale.is_empty() {
                update!(self, |x, row, v| x + self.parameter(axis, bias, row, v));
            } else {
                let scale = scale.as_ptr().add(channel);
                update!(self, |x, row, v| {
                    let scale = self.parameter(axis, scale, row, v);
                    x.mul_add(scale, self.parameter(axis, bias, row, v))
                });
            }
        }
    }

    #[inline(always)]
    unsafe fn apply<T: Element>(
        &self,
        step: &Step,
        epilogue: &TileEpilogue<'_, T>,
        activate: Activate,
    ) {
        let TileEpilogue { axis, channel, .. } = *epilogue;
        // SAFETY: the step's parameters cover the tile's channels.
        unsafe {
            match step {
                Step::Affine { scale, shift } => {
                    let (scale, shift) = (scale.as_ptr().add(channel), shift.as_ptr().add(channel));
                    update!(self, |x, row, v| {
                        let scale = self.parameter(axis, scale, row, v);
                        x.mul_add(scale, self.parameter(axis, shift, row, v))
                    });
                }
                Step::Activation(activation) => {
                    activate(*activation, self.data, self.rows * self.vectors);
                }
                Step::PRelu { slope } => {
                    let slope = slope.as_ptr().add(channel);
                    update!(self, |x, row, v| {
                        math::leaky_relu(x, self.parameter(axis, slope, row, v))
                    });
                }
                Step::Residual => self.add_residual(epilogue),
            }
        }
    }

    #[inline(always)]
    unsafe fn add_residual<T: Element>(&self, epilogue: &TileEpilogue<'_, T>) {
        let TileEpilogue { axis, channel, .. } = *epilogue;
        let residual = epilogue.residual();
        // SAFETY: the residual is readable for every row and real lane of the tile.
        unsafe {
            if residual.lanes_are_contiguous(axis) {
                update!(self, |x, row, v| x + self.residual_vector(row, v, epilogue));
            } else {
                for row in 0..self.rows {
                    for lane in 0..self.cols {
                        let offset = residual.offset(axis, channel, row, lane);
                        *self.at(row, 0).add(lane) += (*residual.ptr.offset(offset)).to_f32();
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn store<T: Element>(&self, epilogue: &TileEpilogue<'_, T>) {
        let TileEpilogue { axis, channel, dst, .. } = *epilogue;
        // SAFETY: dst is writable for every row and real lane of the tile.
        unsafe {
            for row in 0..self.rows {
                if dst.lanes_are_contiguous(axis) {
                    let dst_row = dst.ptr.offset(dst.row_offset(axis, channel, row));
                    for v in 0..self.vectors {
                        self.store_vector(V::load(self.at(row, v)), dst_row, v);
                    }
                } else {
                    for lane in 0..self.cols {
                        let offset = dst.offset(axis, channel, row, lane);
                        *dst.ptr.offset(offset) = T::from_f32(*self.at(row, 0).add(lane));
                    }
                }
            }
        }
    }
}
