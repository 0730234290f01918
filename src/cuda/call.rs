//! One convolution as its launches see it: addresses and strides, and how its axes are merged.

use std::ffi::c_void;

use super::params::{
    PW_MAX_AXES, PW_MAX_SOURCES, pw_epilogue, pw_flags, pw_fprop, pw_norm_job, pw_read, pw_source,
};
use super::plan::{Kernel, Letters};
use super::scratch::Given;
use crate::dtype::DType;

pub(super) const MAX_AXES: usize = PW_MAX_AXES as usize;

/// The most sources that one launch reads.
pub(super) const MAX_SOURCES: usize = PW_MAX_SOURCES as usize;

/// One tensor of a launch: a device address and strides in elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub address: u64,
    pub channel: i64,
    /// Of the batch and the three spatial axes.
    pub axes: [i64; MAX_AXES],
}

impl Tensor {
    /// Without its first channels, of a tensor of this dtype.
    pub(super) fn skip_channels(self, channel: usize, dtype: DType) -> Tensor {
        let offset = self.channel.wrapping_mul(channel as i64).wrapping_mul(dtype.size() as i64);
        Tensor { address: self.address.wrapping_add_signed(offset), ..self }
    }

    /// A dense tensor at an address, with the axes in the order that they have in this one.
    pub(super) fn dense_like(
        &self,
        extents: &[u64; MAX_AXES],
        channels: u64,
        address: u64,
    ) -> Tensor {
        let [n, d, h, w] = *extents;
        let [sample, along_d, along_h, along_w] = self.axes;
        // An axis that this has no stride for is the outermost, but for the channels, of which
        // there is one.
        let outer = |stride: i64| if stride == 0 { u64::MAX } else { stride.unsigned_abs() };
        let mut axes = [
            (outer(sample), n, 0),
            (self.channel.unsigned_abs(), channels, 1),
            (outer(along_d), d, 2),
            (outer(along_h), h, 3),
            (outer(along_w), w, 4),
        ];
        axes.sort_by_key(|&(stride, ..)| stride);
        let (mut strides, mut next) = ([0; MAX_AXES + 1], 1);
        for (_, len, axis) in axes {
            strides[axis] = next;
            next *= len as i64;
        }
        let [sample, channel, d, h, w] = strides;
        Tensor { address, channel, axes: [sample, d, h, w] }
    }

    /// Every `s`-th position of each spatial axis.
    pub(super) fn subsampled(self, s: usize) -> Tensor {
        let [sample, spatial @ ..] = self.axes;
        let [d, h, w] = spatial.map(|stride: i64| stride.wrapping_mul(s as i64));
        Tensor { axes: [sample, d, h, w], ..self }
    }
}

/// The tensors that src is the concatenation of, and the channels of each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sources {
    list: [(Tensor, u32); MAX_SOURCES],
    count: usize,
}

impl Sources {
    pub(crate) fn new() -> Self {
        Sources { list: [(Tensor::default(), 0); MAX_SOURCES], count: 0 }
    }

    pub(crate) fn one(tensor: Tensor, channels: u32) -> Self {
        let mut sources = Sources::new();
        sources.push(tensor, channels);
        sources
    }

    /// Beyond [`MAX_SOURCES`] one is left out: see `Layer::put_together`.
    pub(crate) fn push(&mut self, tensor: Tensor, channels: u32) {
        if let Some(slot) = self.list.get_mut(self.count) {
            *slot = (tensor, channels);
            self.count += 1;
        }
    }

    pub(crate) fn as_slice(&self) -> &[(Tensor, u32)] {
        &self.list[..self.count]
    }
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
    pub sources: Sources,
    pub dst: Tensor,
    pub residual: Option<Tensor>,
    pub gate: Option<Tensor>,
    pub moments: Moments,
    /// Of the caller, in place of the stream's.
    pub scratch: Option<Given>,
}

/// Where the moments of a layer norm over whole samples are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Moments {
    /// In the stream's scratch: the call has every position of its samples.
    #[default]
    Scratch,
    /// At the addresses of this tensor the call leaves those of its positions, and no result.
    Leave(Tensor),
    /// Those of the sample, of so many positions, are at this address.
    At(u64, u64),
}

/// The axes of the positions, innermost first: in the order of the first tensor's strides, since the
/// order in which positions are numbered is ours to choose, and merged where all tensors allow it.
/// On the stack, as a launch allocates nothing.
pub(super) struct Axes {
    count: usize,
    extents: [i64; MAX_AXES],
    /// Of each tensor.
    strides: [[i64; MAX_AXES]; MAX_SOURCES + 4],
}

impl Axes {
    fn new(extents: &[u64; MAX_AXES], tensors: impl Iterator<Item = [i64; MAX_AXES]>) -> Axes {
        let mut merged =
            Axes { count: 0, extents: [1; MAX_AXES], strides: [[0; MAX_AXES]; MAX_SOURCES + 4] };
        let (mut all, mut used) = (merged.strides, 0);
        for (slot, strides) in all.iter_mut().zip(tensors) {
            *slot = strides;
            used += 1;
        }
        let all = &all[..used];
        // Ties keep the logical order: the last axis is the innermost.
        let mut order = [3, 2, 1, 0];
        order.sort_by_key(|&axis| all[0][axis].unsigned_abs());
        for axis in order.into_iter().filter(|&axis| extents[axis] != 1) {
            let extent = extents[axis] as i64;
            let last = merged.count.checked_sub(1);
            let behind = |last: usize| {
                all.iter().zip(&merged.strides).all(|(strides, inner)| {
                    inner[last].checked_mul(merged.extents[last]) == Some(strides[axis])
                })
            };
            match last {
                Some(last) if behind(last) => merged.extents[last] *= extent,
                _ => {
                    merged.extents[merged.count] = extent;
                    for (strides, slot) in all.iter().zip(&mut merged.strides) {
                        slot[merged.count] = strides[axis];
                    }
                    merged.count += 1;
                }
            }
        }
        merged
    }

    fn positions(&self) -> i64 {
        self.extents.iter().product()
    }

    /// Whether so many positions of a tensor can be read or written at once: a vector must never be
    /// cut by the end of an axis, and every step along any other axis must keep it aligned.
    fn vectors_along_positions(&self, tensor: usize, at: &Tensor, vector: Vector) -> bool {
        let (width, channel) = (vector.width, at.channel);
        let strides = &self.strides[tensor][..self.count];
        let (inner, outer) = strides.split_first().map_or((0, &[][..]), |(i, outer)| (*i, outer));
        vector.aligned(at)
            && inner == 1
            && self.extents[0] % width == 0
            && channel % width == 0
            && outer.iter().all(|stride| stride % width == 0)
    }

    /// Whether so many channels of a tensor can.
    fn vectors_along_channels(&self, tensor: usize, at: &Tensor, vector: Vector) -> bool {
        let strides = &self.strides[tensor][..self.count];
        vector.aligned(at)
            && at.channel == 1
            && strides.iter().all(|stride| stride % vector.width == 0)
    }

    /// How a source of elements of this size is read, at most so many at once; `channels` are those
    /// within which vectors of channels must lie: its own and its groups'.
    fn read(
        &self,
        tensor: usize,
        source: &Tensor,
        (size, most): (usize, i64),
        channels: [u32; 3],
    ) -> pw_read {
        let widths = [
            (16, pw_read::PW_READ_CHANNELS_VEC16, pw_read::PW_READ_POSITIONS_VEC16),
            (8, pw_read::PW_READ_CHANNELS_VEC8, pw_read::PW_READ_POSITIONS_VEC8),
            (4, pw_read::PW_READ_CHANNELS_VEC4, pw_read::PW_READ_POSITIONS_VEC4),
        ];
        for (width, of_channels, of_positions) in widths {
            let vector = Vector { width, size };
            if width > most {
                continue;
            }
            let whole = channels.iter().all(|channel| i64::from(*channel) % width == 0);
            if whole && self.vectors_along_channels(tensor, source, vector) {
                return of_channels;
            }
            if self.vectors_along_positions(tensor, source, vector) {
                return of_positions;
            }
        }
        let channel = source.channel;
        if self.count == 0 || channel.unsigned_abs() < self.strides[tensor][0].unsigned_abs() {
            pw_read::PW_READ_CHANNELS
        } else {
            pw_read::PW_READ_POSITIONS
        }
    }
}

/// Neighbours that are read or written at once.
#[derive(Clone, Copy)]
struct Vector {
    width: i64,
    /// Bytes of one.
    size: usize,
}

impl Vector {
    fn aligned(self, tensor: &Tensor) -> bool {
        tensor.address.is_multiple_of(self.width as u64 * self.size as u64)
    }
}

// What the tensors of a launch are in `Axes`: dst, residual, gate, moments, then the sources.
const DST: usize = 0;
const RESIDUAL: usize = 1;
const SOURCE: usize = 4;

impl Call {
    /// The problem as the planner sees it.
    pub(crate) fn letters(&self) -> Letters {
        let axes = self.extents.iter().zip(&self.dst.axes).filter(|&(&extent, _)| extent != 1);
        let nearest = axes.map(|(_, stride)| stride.unsigned_abs()).min().unwrap_or(u64::MAX);
        Letters {
            groups: self.groups,
            rows: self.rows,
            depth: self.depth,
            positions: self.positions(),
            channels_fast: self.dst.channel.unsigned_abs() < nearest,
        }
    }

    /// Of all samples.
    fn positions(&self) -> u64 {
        self.extents.iter().product()
    }

    /// Of one sample.
    pub(super) fn sample(&self) -> u64 {
        self.extents[1..].iter().product()
    }

    /// Fills in what depends on this call's tensors; the rest is the layer's (see
    /// [`super::pack::Weights`]). `reads` is the size of the sources' elements, and the most of them
    /// that the kernel reads at once.
    pub(super) fn describe(
        &self,
        params: &mut pw_fprop,
        sources: &Sources,
        reads: (usize, i64),
        moments: [i64; MAX_AXES],
    ) -> Axes {
        let residual = self.residual.unwrap_or_default();
        let gate = self.gate.unwrap_or_default();
        let sources = sources.as_slice();
        let beside = [self.dst.axes, residual.axes, gate.axes, moments];
        let tensors = beside.into_iter().chain(sources.iter().map(|(source, _)| source.axes));
        let axes = Axes::new(&self.extents, tensors);
        params.axis_count = axes.count as u32;
        for (i, axis) in params.axes.iter_mut().enumerate() {
            axis.extent = axes.extents[i];
            [axis.dst, axis.residual, axis.gate, axis.moments] =
                [0, 1, 2, 3].map(|tensor: usize| axes.strides[tensor][i]);
        }
        params.positions = axes.positions();
        params.dst = self.dst.address as *mut c_void;
        params.dst_channel = self.dst.channel;
        params.residual = residual.address as *const c_void;
        params.residual_channel = residual.channel;
        params.gate = gate.address as *const c_void;
        params.gate_channel = gate.channel;

        params.source_count = sources.len() as u32;
        let mut begin = 0;
        for (i, (slot, (source, channels))) in params.sources.iter_mut().zip(sources).enumerate() {
            let end = begin + channels;
            *slot = pw_source {
                data: source.address as *const c_void,
                channel: source.channel,
                axes: axes.strides[SOURCE + i],
                begin,
                end,
                read: axes.read(SOURCE + i, source, reads, [self.depth, begin, end]),
                reserved: 0,
            };
            begin = end;
        }
        axes
    }

    /// The parameters of the convolution itself, to a dst of this dtype.
    pub(super) fn convolution(&self, kernel: &Kernel, dst_dtype: DType, params: &mut pw_fprop) {
        let most = if kernel.reads_eight() { 8 } else { 4 };
        let axes = self.describe(params, &self.sources, (kernel.dtype.size(), most), [0; MAX_AXES]);
        (params.groups, params.rows, params.depth) = (self.groups, self.rows, self.depth);
        let along = (kernel.channels_fast, i64::from(kernel.vector));
        self.set_vectors(&axes, along, (dst_dtype.size(), kernel.dtype.size()), params);
        if dst_dtype != kernel.dtype {
            params.flags |= pw_flags::PW_FLAG_DST_F32.0;
            params.epilogue = pw_epilogue::PW_EPILOGUE_STEPS;
        }
        let (dst, residual) = (pw_flags::PW_FLAG_DST_VEC4.0, pw_flags::PW_FLAG_RESIDUAL_VEC4.0);
        let needed = if self.residual.is_some() { dst | residual } else { dst };
        let mapped =
            !params.dst_map.is_null() || self.residual.is_some() && !params.residual_map.is_null();
        if params.flags & needed != needed || mapped {
            params.epilogue = pw_epilogue::PW_EPILOGUE_STEPS;
        }
    }

    /// The same of bytes, to a dst and with a residual of elements of these sizes.
    pub(super) fn convolution_of_bytes(&self, sizes: (usize, usize), params: &mut pw_fprop) {
        let axes = self.describe(params, &self.sources, (1, 16), [0; MAX_AXES]);
        (params.groups, params.rows, params.depth) = (self.groups, self.rows, self.depth);
        let channels_fast = self.letters().channels_fast;
        self.set_vectors(&axes, (channels_fast, 4), sizes, params);
        if channels_fast {
            params.flags |= pw_flags::PW_FLAG_CHANNELS_FAST.0;
        }
    }

    /// The parameters of the normalisation of what the convolution has left in `sums`, to dst.
    pub(super) fn normalisation(
        &self,
        job: pw_norm_job,
        (sums, dtype): (Tensor, DType),
        moments: &Tensor,
        params: &mut pw_fprop,
    ) {
        let rows = self.groups * self.rows;
        let source = Sources::one(sums, rows);
        let axes = self.describe(params, &source, (size_of::<f32>(), 4), moments.axes);
        (params.groups, params.rows) = (1, rows);
        // The kernel goes along channels, to those of dst.
        let vector = Vector { width: 4, size: size_of::<f32>() };
        let vectors = params.dst_map.is_null()
            && rows.is_multiple_of(4)
            && axes.vectors_along_channels(SOURCE, &sums, vector);
        params.sources[0].read = match vectors {
            true => pw_read::PW_READ_CHANNELS_VEC4,
            false => pw_read::PW_READ_CHANNELS,
        };
        params.norm_job = job;
        params.norm.moments = moments.address as *mut f64;
        let positions = match self.moments {
            Moments::At(_, positions) => positions,
            _ => self.sample(),
        };
        params.norm.values = positions as f64 * f64::from(params.rows);
        let channels_fast = self.letters().channels_fast;
        self.set_vectors(&axes, (true, 4), (dtype.size(), dtype.size()), params);
        if channels_fast {
            params.flags |= pw_flags::PW_FLAG_CHANNELS_FAST.0;
        }
    }

    /// Which of dst and residual, whose elements have these sizes, are accessed in vectors along the
    /// fast axis, of at most so many.
    fn set_vectors(
        &self,
        axes: &Axes,
        (channels_fast, most): (bool, i64),
        (of_dst, of_residual): (usize, usize),
        params: &mut pw_fprop,
    ) {
        let rows = params.rows;
        let vectors = |tensor: usize, at: &Tensor, map: *const u32, vector: Vector| {
            if channels_fast {
                map.is_null()
                    && i64::from(rows) % vector.width == 0
                    && axes.vectors_along_channels(tensor, at, vector)
            } else {
                axes.vectors_along_positions(tensor, at, vector)
            }
        };
        params.flags = 0;
        for (width, dst, residual) in [
            (4, pw_flags::PW_FLAG_DST_VEC4, pw_flags::PW_FLAG_RESIDUAL_VEC4),
            (8, pw_flags::PW_FLAG_DST_VEC8, pw_flags::PW_FLAG_RESIDUAL_VEC8),
        ] {
            if width > most {
                continue;
            }
            let vector = |size| Vector { width, size };
            if vectors(DST, &self.dst, params.dst_map, vector(of_dst)) {
                params.flags |= dst.0;
            }
            if let Some(at) = &self.residual
                && vectors(RESIDUAL, at, params.residual_map, vector(of_residual))
            {
                params.flags |= residual.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::plan::KERNELS;

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
        Call {
            groups: 1,
            rows,
            depth,
            extents: [n, d, h, w],
            sources: Sources::one(src, depth),
            dst,
            residual: None,
            gate: None,
            moments: Moments::Scratch,
            scratch: None,
        }
    }

    fn described(call: &Call, channels_fast: bool) -> pw_fprop {
        let kernel = KERNELS.iter().find(|kernel| kernel.channels_fast == channels_fast).unwrap();
        let mut params =
            pw_fprop { epilogue: pw_epilogue::PW_EPILOGUE_CLIP, ..pw_fprop::default() };
        call.convolution(kernel, DType::F32, &mut params);
        params
    }

    /// The offsets that the kernel computes (`kernels/tiles.cuh`).
    fn offsets(params: &pw_fprop, mut position: i64) -> [i64; 3] {
        let mut offsets = [0; 3];
        let count = params.axis_count as usize;
        for (i, axis) in params.axes[..count].iter().enumerate() {
            let at = if i + 1 < count { position % axis.extent } else { position };
            position /= axis.extent;
            offsets[0] += at * params.sources[0].axes[i];
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
                    expected.push([
                        offset(&call.sources.list[0].0),
                        offset(&call.dst),
                        offset(&residual),
                    ]);
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
        assert_eq!(params.sources[0].read, pw_read::PW_READ_CHANNELS_VEC4);
        assert_eq!(params.flags, pw_flags::PW_FLAG_DST_VEC4.0);
        assert_eq!(params.epilogue, pw_epilogue::PW_EPILOGUE_CLIP);
        let nchw = call(2, 32, 16, [1, 14, 14], [false, false]);
        let params = described(&nchw, false);
        assert_eq!(params.sources[0].read, pw_read::PW_READ_POSITIONS_VEC4);
        assert_eq!(params.flags, pw_flags::PW_FLAG_DST_VEC4.0);

        // An odd plane, an odd number of channels, an address off by one element.
        let params = described(&call(2, 32, 16, [1, 7, 7], [false, false]), false);
        assert_eq!((params.sources[0].read, params.flags), (pw_read::PW_READ_POSITIONS, 0));
        assert_eq!(params.epilogue, pw_epilogue::PW_EPILOGUE_STEPS);
        let params = described(&call(2, 30, 18, [1, 8, 8], [true, true]), true);
        assert_eq!((params.sources[0].read, params.flags), (pw_read::PW_READ_CHANNELS, 0));
        let mut shifted = nhwc;
        shifted.sources.list[0].0.address += 4;
        shifted.dst.address += 4;
        let params = described(&shifted, true);
        assert_eq!((params.sources[0].read, params.flags), (pw_read::PW_READ_CHANNELS, 0));
        // A row that no vector divides, although the plane is divisible.
        let mut row = call(1, 32, 16, [1, 4, 6], [false, false]);
        row.sources.list[0].0.axes[2] = 8;
        assert_eq!(described(&row, false).sources[0].read, pw_read::PW_READ_POSITIONS);
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
