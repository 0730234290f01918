//! The gradient by the weight.

use crate::cuda::device::{Buffer, CudaDevice};
use crate::cuda::launch::{Tensor, start_training};
use crate::cuda::params::{PW_WGRAD_SLAB, PW_WGRAD_THREADS, PW_WGRAD_TILE, pw_wgrad, pw_wgrad_sum};
use crate::cuda::plan::Training as Kernel;
use crate::cuda::train::sweep::{Axes, grid, positions_of};
use crate::error::Result;
use crate::tensor::checked_product;

/// Rows and columns of a block's tile.
const TILE: usize = PW_WGRAD_TILE as usize;
/// Positions that are multiplied at a time.
const SLAB: usize = PW_WGRAD_SLAB as usize;
/// Positions that are worth a block of their own.
const LEAST: usize = 256;

/// `[groups * rows, depth]` sums over positions of `d [groups * rows]` by `src [groups * depth]`.
pub(super) struct Wgrad<'a> {
    pub device: &'a CudaDevice,
    pub groups: usize,
    pub rows: usize,
    pub depth: usize,
    /// Batch and spatial axes; none is empty.
    pub extents: [usize; 4],
    pub d: Tensor,
    pub src: Tensor,
    /// Whether the channels of `d` and of `src` lie closer together than their positions.
    pub channels_fast: [bool; 2],
}

impl Wgrad<'_> {
    /// How many blocks share the positions of a tile: a pure function of the problem and the device.
    fn splits(&self, tiles: usize, positions: usize) -> (usize, usize) {
        let wanted = (4 * self.device.facts().multiprocessors as usize).div_ceil(tiles);
        let splits = wanted.min(positions.div_ceil(LEAST)).max(1);
        let chunk = positions.div_ceil(splits).next_multiple_of(SLAB);
        (positions.div_ceil(chunk), chunk)
    }

    /// # Errors
    /// [`Error::Cuda`], [`Error::DeviceMemory`], [`Error::TooLarge`].
    pub(super) fn run(&self) -> Result<Vec<f32>> {
        let Wgrad { device, groups, rows, depth, .. } = *self;
        let positions = positions_of(&self.extents)?;
        let sizes = [groups, rows.div_ceil(TILE), depth.div_ceil(TILE)];
        let tiles = checked_product("the tiles of a weight", &sizes)?;
        let (splits, chunk) = self.splits(tiles, positions);
        let axes = Axes::new(self.extents, &[self.d.axes, self.src.axes])?;
        let what = "the gradient by the weight";
        let values = checked_product(what, &[groups, rows, depth])?;
        let parts = Buffer::new(device, what, checked_product(what, &[splits, values, 4])?)?;
        let mut params = pw_wgrad {
            extents: axes.extents,
            d: axes.part(0, &self.d, 0, groups * rows),
            src: axes.part(1, &self.src, 0, groups * depth),
            to: parts.address() as *mut f32,
            positions: positions as u32,
            chunk: chunk as u32,
            axis_count: axes.count,
            groups: groups as u32,
            rows: rows as u32,
            depth: depth as u32,
            splits: splits as u32,
            d_channels_fast: self.channels_fast[0].into(),
            src_channels_fast: self.channels_fast[1].into(),
            ..pw_wgrad::default()
        };
        let blocks = grid(tiles * splits, || vec![tiles, splits])?;
        // SAFETY: the tensors are those of the call, the sums have room for all splits.
        unsafe { start_training(device, Kernel::Wgrad, blocks, &mut params)? };
        let mut out = vec![0.0f32; values];
        if splits == 1 {
            parts.download(&mut out)?;
            return Ok(out);
        }
        let sum = Buffer::new(device, what, 4 * values)?;
        let mut params = pw_wgrad_sum {
            from: parts.address() as *const f32,
            to: sum.address() as *mut f32,
            values: values as i64,
            splits: splits as u32,
            ..pw_wgrad_sum::default()
        };
        let blocks = grid(values.div_ceil(PW_WGRAD_THREADS as usize), || vec![values])?;
        // SAFETY: memory of these sizes, freed in stream order.
        unsafe { start_training(device, Kernel::WgradSum, blocks, &mut params)? };
        sum.download(&mut out)?;
        Ok(out)
    }
}
