//! From a call to the parameters of one launch, and the launch.

use std::ffi::c_void;

use cudarc::driver::result;

use super::device::CudaDevice;
use super::driver::failed;
use super::params::{PW_MAX_AXES, pw_axis, pw_epilogue, pw_flags, pw_fprop, pw_read};
use super::plan::{KERNELS, Kernel, Letters};
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
    kernel: usize,
    call: &Call,
    mut params: pw_fprop,
) -> Result<()> {
    let letters = call.letters();
    if letters.positions == 0 {
        return Ok(());
    }
    call.describe(&KERNELS[kernel], &mut params);
    let (x, y) = Kernel::grid(KERNELS[kernel].tiles(&letters)).ok_or(Error::TooLarge {
        what: "the grid of a launch",
        sizes: vec![letters.groups as usize, letters.rows as usize, letters.positions as usize],
    })?;
    device.bind()?;
    let mut arguments = [(&raw mut params).cast::<c_void>()];
    // SAFETY: the kernel takes one pw_fprop by value, which the driver copies now; what it points
    // to is the caller's promise, and `describe` keeps the promises of params.h.
    unsafe {
        result::launch_kernel(
            device.function(kernel).cu_function(),
            (x, y, 1),
            (KERNELS[kernel].threads, 1, 1),
            0,
            device.stream().cu_stream(),
            &mut arguments,
        )
    }
    .map_err(failed("cuLaunchKernel"))
}
