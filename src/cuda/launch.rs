//! From a call to the parameters of one launch, and the launch.

use std::ffi::c_void;

use cudarc::driver::result;

use super::device::CudaDevice;
use super::params::{PW_MAX_AXES, pw_axis, pw_epilogue, pw_flags, pw_fprop, pw_read};
use super::plan::{Choice, KERNELS, Kernel, Letters};
use super::scratch::{Room, in_graph};
use crate::error::{Error, Result};

const MAX_AXES: usize = PW_MAX_AXES as usize;

/// One tensor of a launch: a device address and strides in elements.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tensor {
    pub address: u64,
    pub channel: i64,
    /// Of the batch and the three spatial axes.
    pub axes: [i64; MAX_AXES],
}

/// One convolution, all its tensors on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub groups: u32,
    /// Output channels per group.
    pub rows: u32,
    /// Input channels per group.
    pub depth: u32,
    /// Batch and the three spatial axes; none is empty.
    pub extents: [u64; MAX_AXES],
    pub src: Tensor,
    pub dst: Tensor,
    pub residual: Option<Tensor>,
}

/// The axes of the positions; on the stack, as a launch allocates nothing.
#[derive(Clone, Copy, Default)]
struct Axes {
    axes: [pw_axis; MAX_AXES],
    count: usize,
}

impl Axes {
    fn as_slice(&self) -> &[pw_axis] {
        &self.axes[..self.count]
    }
}

impl Call {
    /// The problem as the planner sees it.
    pub(crate) fn letters(&self) -> Letters {
        let nearest =
            self.axes().as_slice().first().map_or(u64::MAX, |axis| axis.dst.unsigned_abs());
        Letters {
            groups: self.groups,
            rows: self.rows,
            depth: self.depth,
            positions: self.extents.iter().product(),
            channels_fast: self.dst.channel.unsigned_abs() < nearest,
        }
    }

    /// The axes of the positions, innermost first: ordered by dst's strides, since the order in
    /// which positions are numbered is ours to choose, and merged where all tensors allow it.
    fn axes(&self) -> Axes {
        let residual = self.residual.unwrap_or_default();
        let mut all = [pw_axis::default(); MAX_AXES];
        for (axis, slot) in all.iter_mut().enumerate() {
            *slot = pw_axis {
                extent: self.extents[axis] as i64,
                src: self.src.axes[axis],
                dst: self.dst.axes[axis],
                residual: residual.axes[axis],
            };
        }
        // Ties keep the logical order: the last axis is the innermost.
        all.reverse();
        all.sort_by_key(|axis| axis.dst.unsigned_abs());
        let mut merged = Axes::default();
        for outer in all.into_iter().filter(|axis| axis.extent != 1) {
            let end = merged.count;
            let inner = merged.axes[..end].last_mut();
            let behind = |inner: &pw_axis| {
                let follows = |inner_stride: i64, outer_stride: i64| {
                    inner_stride.checked_mul(inner.extent) == Some(outer_stride)
                };
                follows(inner.src, outer.src)
                    && follows(inner.dst, outer.dst)
                    && follows(inner.residual, outer.residual)
            };
            match inner {
                Some(inner) if behind(inner) => inner.extent *= outer.extent,
                _ => {
                    merged.axes[end] = outer;
                    merged.count += 1;
                }
            }
        }
        merged
    }

    /// Fills in what depends on this call's tensors; the rest is the layer's (see
    /// [`super::layer::Weights`]).
    fn describe(&self, kernel: &Kernel, params: &mut pw_fprop) {
        let axes = self.axes();
        params.axis_count = axes.count as u32;
        params.axes = axes.axes;
        let axes = axes.as_slice();
        params.positions = self.extents.iter().map(|&n| n as i64).product();
        params.groups = self.groups;
        params.rows = self.rows;
        params.depth = self.depth;
        let residual = self.residual.unwrap_or_default();
        params.src = self.src.address as *const f32;
        params.dst = self.dst.address as *mut f32;
        params.residual = residual.address as *const f32;
        params.src_channel = self.src.channel;
        params.dst_channel = self.dst.channel;
        params.residual_channel = residual.channel;

        // A vector of four must never be cut by the end of an axis, and every step along any other
        // axis must keep it aligned.
        let inner = axes.first().copied().unwrap_or(pw_axis { extent: 1, ..pw_axis::default() });
        let outer = axes.get(1..).unwrap_or_default();
        let along_positions = |tensor: &Tensor, stride: fn(&pw_axis) -> i64| {
            tensor.address.is_multiple_of(16)
                && stride(&inner) == 1
                && inner.extent % 4 == 0
                && tensor.channel % 4 == 0
                && outer.iter().all(|axis| stride(axis) % 4 == 0)
        };
        let along_channels = |tensor: &Tensor, stride: fn(&pw_axis) -> i64, channels: u32| {
            tensor.address.is_multiple_of(16)
                && tensor.channel == 1
                && channels.is_multiple_of(4)
                && axes.iter().all(|axis| stride(axis) % 4 == 0)
        };
        params.read = if along_channels(&self.src, |axis| axis.src, self.depth) {
            pw_read::PW_READ_CHANNELS_VEC4
        } else if along_positions(&self.src, |axis| axis.src) {
            pw_read::PW_READ_POSITIONS_VEC4
        } else if inner.extent == 1 || self.src.channel.unsigned_abs() < inner.src.unsigned_abs() {
            pw_read::PW_READ_CHANNELS
        } else {
            pw_read::PW_READ_POSITIONS
        };
        let vectors = |tensor: &Tensor, stride: fn(&pw_axis) -> i64, mapped: bool| {
            if kernel.channels_fast {
                !mapped && along_channels(tensor, stride, self.rows)
            } else {
                along_positions(tensor, stride)
            }
        };
        let dst = vectors(&self.dst, |axis| axis.dst, !params.dst_map.is_null());
        let residual = self.residual.is_some_and(|residual| {
            vectors(&residual, |axis| axis.residual, !params.residual_map.is_null())
        });
        params.flags = if dst { pw_flags::PW_FLAG_DST_VEC4.0 } else { 0 }
            | if residual { pw_flags::PW_FLAG_RESIDUAL_VEC4.0 } else { 0 };
        let short_cut = dst
            && params.dst_map.is_null()
            && (self.residual.is_none() || residual && params.residual_map.is_null());
        if !short_cut {
            params.epilogue = pw_epilogue::PW_EPILOGUE_STEPS;
        }
    }
}

/// Queues one convolution on the device's stream. The only launch of this crate.
///
/// `params` brings the layer's part: weights, bias, steps, maps, and the short cut that its steps
/// allow.
///
/// # Safety
/// Every element that `call` describes must be on `device` and, in stream order, readable (src,
/// residual, weights) or writable and nobody else's (dst). dst's positions do not overlap.
pub(crate) unsafe fn launch(
    device: &CudaDevice,
    choice: Choice,
    call: &Call,
    mut params: pw_fprop,
) -> Result<()> {
    let letters = call.letters();
    if letters.positions == 0 {
        return Ok(());
    }
    let kernel = &KERNELS[choice.kernel];
    call.describe(kernel, &mut params);
    let _bound = device.bind()?;
    let mut queue = |splits: u32, scratch: Option<Room>| {
        params.splits = splits;
        params.partial = scratch.map_or(0, |place| place.sums) as *mut f32;
        params.arrived = scratch.map_or(0, |place| place.arrived) as *mut u32;
        let blocks = kernel.tiles(&letters).saturating_mul(u64::from(splits));
        let grid = Kernel::grid(blocks).ok_or_else(|| too_large(&letters))?;
        // SAFETY: the caller's promises; `describe` keeps those of params.h.
        unsafe { start(device, choice.kernel, grid, &mut params) }
    };
    if choice.splits == 1 {
        return queue(1, None);
    }
    let need = kernel.scratch(&letters, choice.splits).ok_or_else(|| too_large(&letters))?;
    if !device.is_capturing()? {
        let mut scratch = device.scratch();
        let place = scratch.room(device, need)?;
        return queue(choice.splits, Some(place));
    }
    match device.has_pools() {
        true => in_graph(device, need, |place| queue(choice.splits, Some(place))),
        // Nothing can be allocated for the graph alone.
        false => queue(1, None),
    }
}

fn too_large(letters: &Letters) -> Error {
    Error::TooLarge {
        what: "the grid of a launch",
        sizes: vec![letters.groups as usize, letters.rows as usize, letters.positions as usize],
    }
}

/// # Safety
/// As [`launch`]; what the parameters say must be true.
unsafe fn start(
    device: &CudaDevice,
    kernel: usize,
    (x, y): (u32, u32),
    params: &mut pw_fprop,
) -> Result<()> {
    let function = device.function(kernel).ok_or_else(|| Error::Kernel {
        kernel: KERNELS[kernel].name.into(),
        reason: format!("{device} does not run it"),
    })?;
    let mut arguments = [(&raw mut *params).cast::<c_void>()];
    // SAFETY: the kernel takes one pw_fprop by value, which the driver copies now; what it points
    // to is the caller's promise.
    unsafe {
        result::launch_kernel(
            function.cu_function(),
            (x, y, 1),
            (KERNELS[kernel].threads, 1, 1),
            KERNELS[kernel].shared_bytes,
            device.stream().cu_stream(),
            &mut arguments,
        )
    }
    .map_err(device.failed("cuLaunchKernel"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[n, c, d, h, w]` without gaps, channels first or last.
    fn dense(address: u64, c: i64, [d, h, w]: [u64; 3], last: bool) -> Tensor {
        let (h, w, d) = (h as i64, w as i64, d as i64);
        if last {
            Tensor { address, channel: 1, axes: [d * h * w * c, h * w * c, w * c, c] }
        } else {
            Tensor { address, channel: d * h * w, axes: [d * h * w * c, h * w, w, 1] }
        }
    }

    fn call(n: u64, rows: u32, depth: u32, spatial: [u64; 3], last: [bool; 2]) -> Call {
        let [d, h, w] = spatial;
        let src = dense(1 << 20, i64::from(depth), spatial, last[0]);
        let dst = dense(1 << 30, i64::from(rows), spatial, last[1]);
        Call { groups: 1, rows, depth, extents: [n, d, h, w], src, dst, residual: None }
    }

    fn described(call: &Call, channels_fast: bool) -> pw_fprop {
        let kernel = KERNELS.iter().find(|kernel| kernel.channels_fast == channels_fast).unwrap();
        let mut params =
            pw_fprop { epilogue: pw_epilogue::PW_EPILOGUE_CLIP, ..pw_fprop::default() };
        call.describe(kernel, &mut params);
        params
    }

    /// The offsets that the kernel computes (`kernels/tiles.cuh`).
    fn offsets(params: &pw_fprop, mut position: i64) -> [i64; 3] {
        let mut offsets = [0; 3];
        let count = params.axis_count as usize;
        for (i, axis) in params.axes[..count].iter().enumerate() {
            let at = if i + 1 < count { position % axis.extent } else { position };
            position /= axis.extent;
            offsets[0] += at * axis.src;
            offsets[1] += at * axis.dst;
            offsets[2] += at * axis.residual;
        }
        offsets
    }

    #[test]
    fn merged_axes_reach_every_position_once() {
        let residual = Tensor { address: 0, channel: 5, axes: [-1000, 7, 140, -20] };
        for (spatial, last) in [
            ([1, 1, 1], [false, false]),
            ([2, 3, 4], [false, true]),
            ([1, 3, 5], [true, true]),
            ([4, 1, 7], [true, false]),
        ] {
            for residual in [None, Some(residual)] {
                let call = Call { residual, ..call(3, 6, 4, spatial, last) };
                let params = described(&call, last[1]);
                let mut found: Vec<_> =
                    (0..params.positions).map(|p| offsets(&params, p)).collect();
                let mut expected = Vec::new();
                let [n, d, h, w] = call.extents.map(|extent| extent as i64);
                for index in 0..n * d * h * w {
                    let at = [index / w / h / d, index / w / h % d, index / w % h, index % w];
                    let offset = |t: &Tensor| (0..4).map(|i| at[i] * t.axes[i]).sum::<i64>();
                    let residual = residual.unwrap_or_default();
                    expected.push([offset(&call.src), offset(&call.dst), offset(&residual)]);
                }
                found.sort_unstable();
                expected.sort_unstable();
                assert_eq!(found, expected, "{spatial:?} {last:?}");
            }
        }
    }

    #[test]
    fn dense_tensors_need_few_axes() {
        assert_eq!(described(&call(8, 32, 32, [1, 14, 14], [true, true]), true).axis_count, 1);
        assert_eq!(described(&call(8, 32, 32, [2, 14, 14], [false, false]), false).axis_count, 2);
        assert_eq!(described(&call(1, 32, 32, [2, 14, 14], [false, false]), false).axis_count, 1);
        assert_eq!(described(&call(1, 32, 32, [1, 1, 1], [false, false]), false).axis_count, 0);
    }

    #[test]
    fn vectors_are_used_only_where_they_are_aligned_and_whole() {
        let nhwc = call(2, 32, 16, [1, 7, 7], [true, true]);
        let params = described(&nhwc, true);
        assert_eq!(params.read, pw_read::PW_READ_CHANNELS_VEC4);
        assert_eq!(params.flags, pw_flags::PW_FLAG_DST_VEC4.0);
        assert_eq!(params.epilogue, pw_epilogue::PW_EPILOGUE_CLIP);
        let nchw = call(2, 32, 16, [1, 14, 14], [false, false]);
        let params = described(&nchw, false);
        assert_eq!(params.read, pw_read::PW_READ_POSITIONS_VEC4);
        assert_eq!(params.flags, pw_flags::PW_FLAG_DST_VEC4.0);

        // An odd plane, an odd number of channels, an address off by one element.
        let params = described(&call(2, 32, 16, [1, 7, 7], [false, false]), false);
        assert_eq!((params.read, params.flags), (pw_read::PW_READ_POSITIONS, 0));
        assert_eq!(params.epilogue, pw_epilogue::PW_EPILOGUE_STEPS);
        let params = described(&call(2, 30, 18, [1, 8, 8], [true, true]), true);
        assert_eq!((params.read, params.flags), (pw_read::PW_READ_CHANNELS, 0));
        let mut shifted = nhwc;
        shifted.src.address += 4;
        shifted.dst.address += 4;
        let params = described(&shifted, true);
        assert_eq!((params.read, params.flags), (pw_read::PW_READ_CHANNELS, 0));
        // A row that no vector divides, although the plane is divisible.
        let mut row = call(1, 32, 16, [1, 4, 6], [false, false]);
        row.src.axes[2] = 8;
        assert_eq!(described(&row, false).read, pw_read::PW_READ_POSITIONS);
    }

    #[test]
    fn a_residual_that_is_not_aligned_takes_the_general_epilogue() {
        let mut call = call(2, 32, 16, [1, 8, 8], [false, false]);
        call.residual = Some(call.dst);
        let params = described(&call, false);
        let both = pw_flags::PW_FLAG_DST_VEC4.0 | pw_flags::PW_FLAG_RESIDUAL_VEC4.0;
        assert_eq!((params.flags, params.epilogue), (both, pw_epilogue::PW_EPILOGUE_CLIP));
        call.residual = Some(Tensor { address: call.dst.address + 8, ..call.dst });
        let params = described(&call, false);
        assert_eq!(params.flags, pw_flags::PW_FLAG_DST_VEC4.0);
        assert_eq!(params.epilogue, pw_epilogue::PW_EPILOGUE_STEPS);
    }
}
