//! The gradient by the weight.

use crate::cuda::device::CudaDevice;
use crate::cuda::launch::start_training;
use crate::cuda::memory::Buffer;
use crate::cuda::params::{
    PW_WGRAD_SLAB, PW_WGRAD_THREADS, PW_WGRAD_TILE, pw_read, pw_wgrad, pw_wgrad_sum,
};
use crate::cuda::plan::Training as Kernel;
use crate::cuda::train::sweep::{Axes, Typed, grid, positions_of};
use crate::dtype::DType;
use crate::error::Result;
use crate::prepared::Math;
use crate::tensor::checked_product;

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
    /// Of one dtype.
    pub d: Typed,
    pub src: Typed,
    /// What products of f32 may round.
    pub math: Math,
    /// Whether the channels of `d` and of `src` lie closer together than their positions.
    pub channels_fast: [bool; 2],
}

impl Wgrad<'_> {
    /// The kernel, the side of its tiles, and how many positions it multiplies at a time.
    fn kernel(&self) -> (Kernel, usize, usize) {
        let large = self.rows > 64 && self.depth > 64;
        let [small_tile, large_tile] = match (self.d.dtype, self.math) {
            (DType::F16, _) => [Kernel::WgradF16, Kernel::WgradF16Large],
            (DType::Bf16, _) => [Kernel::WgradBf16, Kernel::WgradBf16Large],
            (DType::F32, Math::Tf32) => [Kernel::WgradTf32, Kernel::WgradTf32Large],
            (DType::F32, Math::F32) => [Kernel::Wgrad; 2],
        };
        let kernel = if large { large_tile } else { small_tile };
        if kernel == Kernel::Wgrad || !self.device.has_training(kernel) {
            return (Kernel::Wgrad, PW_WGRAD_TILE as usize, PW_WGRAD_SLAB as usize);
        }
        // Two instructions, of words of two positions or of one.
        let slab = if self.d.dtype == DType::F32 { 16 } else { 32 };
        (kernel, if large { 128 } else { 64 }, slab)
    }

    /// How many blocks share the positions of a tile: a pure function of the problem and the device.
    fn splits(&self, tiles: usize, positions: usize, slab: usize) -> (usize, usize) {
        let wanted = (4 * self.device.facts().multiprocessors as usize).div_ceil(tiles);
        let splits = wanted.min(positions.div_ceil(LEAST)).max(1);
        let chunk = positions.div_ceil(splits).next_multiple_of(slab);
        (positions.div_ceil(chunk), chunk)
    }

    /// How an operand is read: several neighbours at once, at most 16 bytes, where a vector is never cut
    /// by the end of an axis or of a group and is always aligned.
    fn read(&self, axes: &Axes, index: usize, operand: &Typed, channels: usize) -> pw_read {
        let channels_fast = self.channels_fast[index];
        let one = match channels_fast {
            true => pw_read::PW_READ_CHANNELS,
            false => pw_read::PW_READ_POSITIONS,
        };
        let strides = &axes.strides[index][..axes.count as usize];
        let vectors = |width: i64| {
            let whole = |n: i64| n % width == 0;
            let bytes = width as usize * operand.dtype.size();
            let aligned = bytes <= 16 && operand.at.address.is_multiple_of(bytes as u64);
            let rest = match (channels_fast, strides.split_first()) {
                (true, _) => {
                    operand.at.channel == 1
                        && whole(channels as i64)
                        && strides.iter().all(|&stride| whole(stride))
                }
                (false, Some((1, outer))) => {
                    whole(i64::from(axes.extents[0]))
                        && whole(operand.at.channel)
                        && outer.iter().all(|&stride| whole(stride))
                }
                (false, _) => false,
            };
            aligned && rest
        };
        match (channels_fast, vectors(8), vectors(4)) {
            (true, true, _) => pw_read::PW_READ_CHANNELS_VEC8,
            (true, _, true) => pw_read::PW_READ_CHANNELS_VEC4,
            (false, true, _) => pw_read::PW_READ_POSITIONS_VEC8,
            (false, _, true) => pw_read::PW_READ_POSITIONS_VEC4,
            _ => one,
        }
    }

    /// # Errors
    /// [`Error::Cuda`], [`Error::DeviceMemory`], [`Error::TooLarge`].
    pub(super) fn run(&self) -> Result<Vec<f32>> {
        let Wgrad { device, groups, rows, depth, .. } = *self;
        let positions = positions_of(&self.extents)?;
        let (kernel, tile, slab) = self.kernel();
        let sizes = [groups, rows.div_ceil(tile), depth.div_ceil(tile)];
        let tiles = checked_product("the tiles of a weight", &sizes)?;
        let (splits, chunk) = self.splits(tiles, positions, slab);
        let axes = Axes::new(self.extents, &[self.d.at.axes, self.src.at.axes])?;
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
            d_read: self.read(&axes, 0, &self.d, rows),
            src_read: self.read(&axes, 1, &self.src, depth),
            ..pw_wgrad::default()
        };
        let blocks = grid(tiles * splits, || vec![tiles, splits])?;
        // SAFETY: the tensors are those of the call, the sums have room for all splits.
        unsafe { start_training(device, kernel, blocks, &mut params)? };
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
