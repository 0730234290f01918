//! From a call to the parameters of its launches, and the launches.

use std::ffi::c_void;

use cudarc::driver::result;

use super::device::CudaDevice;
use super::memory::Buffer;
use super::params::{
    PW_MAX_AXES, PW_MAX_SOURCES, PW_MERGED, pw_bytes, pw_epilogue, pw_flags, pw_fprop, pw_merge,
    pw_norm_job, pw_read, pw_source,
};
use super::plan::{
    ByteKernel, Choice, FP8_KERNELS, Helper, INT8_KERNELS, KERNELS, Kernel, Letters, Tile, Training,
};
use super::scratch::{Given, Need, Room, given, in_graph};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stages::NormOver;
use crate::tensor::checked_product;

const MAX_AXES: usize = PW_MAX_AXES as usize;
const MERGED: u64 = PW_MERGED as u64;

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

/// A layer's part of the parameters of its launches.
pub(super) struct Program {
    /// What the tensors hold.
    pub dtype: DType,
    /// What dst holds: the same, or f32 where nothing is normalised.
    pub dst_dtype: DType,
    pub fprop: pw_fprop,
    /// The normalisation and the steps behind it, for all rows as one group.
    pub norm: Option<(NormOver, pw_fprop)>,
}

impl Program {
    /// Whether f32 values lie beside dst before they are normalised: a result is rounded once.
    pub(super) fn has_sums_beside(&self) -> bool {
        self.norm.is_some() && self.dtype != DType::F32
    }
}

/// The axes of the positions, innermost first: in the order of the first tensor's strides, since the
/// order in which positions are numbered is ours to choose, and merged where all tensors allow it.
/// On the stack, as a launch allocates nothing.
struct Axes {
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
    fn sample(&self) -> u64 {
        self.extents[1..].iter().product()
    }

    /// Fills in what depends on this call's tensors; the rest is the layer's (see
    /// [`super::layer::Weights`]). `reads` is the size of the sources' elements, and the most of them
    /// that the kernel reads at once.
    fn describe(
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
    fn convolution(&self, kernel: &Kernel, dst_dtype: DType, params: &mut pw_fprop) {
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
    fn normalisation(
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

/// # Errors
/// [`Error::Unsupported`] if the stream is captured in a graph that cannot hold what [`launch`] takes
/// beside the call's tensors and scratch.
pub(super) fn check_capture(device: &CudaDevice, call: &Call, program: &Program) -> Result<()> {
    if program.has_sums_beside() {
        let memory = "the values before they are normalised";
        device.check_capture("a layer norm of 16-bit tensors", memory)?;
    }
    if leaves_moments(call, program) && call.scratch.is_none() {
        device.check_capture("a layer norm over all positions", "the moments")?;
    }
    Ok(())
}

/// Queues one convolution on the device's stream, and the normalisation that may follow it.
///
/// # Safety
/// Every element that `call` describes must be on `device` and, in stream order, readable (sources,
/// residual, gate, weights) or writable and nobody else's (dst, moments). dst's positions do not
/// overlap.
pub(super) unsafe fn launch(
    device: &CudaDevice,
    choice: Choice,
    call: &Call,
    program: &Program,
) -> Result<()> {
    let letters = call.letters();
    if letters.positions == 0 {
        return Ok(());
    }
    let kernel = &KERNELS[choice.kernel];
    check_capture(device, call, program)?;
    let mut params = program.fprop;
    // Freed in stream order.
    let beside = match program.has_sums_beside() {
        true => Some(sums_beside(device, call)?),
        false => None,
    };
    let sums = beside.as_ref().map_or(call.dst, |(sums, _)| *sums);
    let sums_dtype = if beside.is_some() { DType::F32 } else { program.dst_dtype };
    Call { dst: sums, ..*call }.convolution(kernel, sums_dtype, &mut params);
    let _bound = device.bind()?;
    let queue = |splits: u32, scratch: Option<Room>| {
        let grid = share(&kernel.tile, &letters, (splits, scratch), &mut params)?;
        // SAFETY: the caller's promises; `describe` keeps those of params.h. The sums of splits are
        // read before what comes next in stream order writes moments in their place.
        unsafe {
            start(device, Launch::fprop(choice.kernel), grid, &mut params)?;
            normalise(device, call, program, sums, scratch)
        }
    };
    let [sums, moments] = needs(choice, call, program)?;
    let need = sums.or(moments);
    with_room(device, (need, call.scratch), choice.splits, moments == Need::default(), queue)
}

/// Queues a launch of so many blocks to a tile, with room for what it needs: the caller's, the stream's,
/// or a graph's own. Where nothing can be allocated for the graph alone, one block has a tile, if that
/// needs no room.
fn with_room(
    device: &CudaDevice,
    (need, caller): (Need, Option<Given>),
    splits: u32,
    one_needs_none: bool,
    queue: impl FnOnce(u32, Option<Room>) -> Result<()>,
) -> Result<()> {
    if need == Need::default() {
        return queue(1, None);
    }
    if let Some(memory) = caller {
        return queue(splits, Some(given(device, memory, need)?));
    }
    if !device.is_capturing()? {
        let mut scratch = device.scratch();
        let place = scratch.room(device, need)?;
        return queue(splits, Some(place));
    }
    if one_needs_none && !device.has_pools() {
        return queue(1, None);
    }
    in_graph(device, need, |place| queue(splits, Some(place)))
}

/// The part of a launch's parameters that says how blocks share tiles, and the grid of them.
fn share(
    tile: &Tile,
    letters: &Letters,
    (splits, scratch): (u32, Option<Room>),
    params: &mut pw_fprop,
) -> Result<(u32, u32)> {
    params.splits = splits;
    params.partial = scratch.map_or(0, |place| place.sums) as *mut f32;
    params.arrived = scratch.map_or(0, |place| place.arrived) as *mut u32;
    let blocks = tile.count(letters).saturating_mul(u64::from(splits));
    Kernel::grid(blocks).ok_or_else(|| too_large(letters))
}

/// Memory for the f32 values of a call's dst, with its order of axes.
fn sums_beside(device: &CudaDevice, call: &Call) -> Result<(Tensor, Buffer)> {
    let channels = u64::from(call.groups) * u64::from(call.rows);
    let extents = call.extents.map(|extent| extent as usize);
    let positions = checked_product("positions", &extents)?;
    let bytes = checked_product("values before a layer norm", &[positions, channels as usize, 4])?;
    let memory = Buffer::new(device, "the values before a layer norm", bytes)?;
    Ok((call.dst.dense_like(&call.extents, channels, memory.address()), memory))
}

/// Whether a launch leaves the moments of positions in scratch.
fn leaves_moments(call: &Call, program: &Program) -> bool {
    let over_all = matches!(program.norm, Some((NormOver::All, _)));
    over_all && matches!(call.moments, Moments::Scratch)
}

/// What a launch needs for sums that blocks share, and then for moments.
fn needs(choice: Choice, call: &Call, program: &Program) -> Result<[Need; 2]> {
    let letters = call.letters();
    let sums = KERNELS[choice.kernel].tile.scratch(&letters, choice.splits);
    let moments = match leaves_moments(call, program) {
        true => moments_need(call)?,
        false => Need::default(),
    };
    Ok([sums.ok_or_else(|| too_large(&letters))?, moments])
}

/// The bytes of [`needs`] together.
pub(super) fn scratch_bytes(choice: Choice, call: &Call, program: &Program) -> Result<usize> {
    let [sums, moments] = needs(choice, call, program)?;
    Ok(sums.or(moments).bytes())
}

/// # Safety
/// As [`launch`], for what the convolution has left.
unsafe fn normalise(
    device: &CudaDevice,
    call: &Call,
    program: &Program,
    sums: Tensor,
    scratch: Option<Room>,
) -> Result<()> {
    let Some((over, params)) = &program.norm else { return Ok(()) };
    let run = |job: pw_norm_job, moments: &Tensor| {
        let mut params = *params;
        call.normalisation(job, (sums, program.dtype), moments, &mut params);
        let letters = call.letters();
        let norm = Helper::norm(program.dtype);
        let grid = Kernel::grid(letters.positions.div_ceil(norm.positions()));
        let grid = grid.ok_or_else(|| too_large(&letters))?;
        // SAFETY: the caller's promise.
        unsafe { start(device, Launch::helper(norm), grid, &mut params) }
    };
    let of_samples = |address| Tensor { address, channel: 0, axes: [1, 0, 0, 0] };
    match (over, call.moments) {
        (NormOver::Channels, _) => run(pw_norm_job::PW_NORM_CHANNELS, &Tensor::default()),
        (NormOver::All, Moments::Leave(at)) => run(pw_norm_job::PW_NORM_MOMENTS, &at),
        (NormOver::All, Moments::At(address, _)) => {
            run(pw_norm_job::PW_NORM_APPLY, &of_samples(address))
        }
        (NormOver::All, Moments::Scratch) => {
            let address = scratch.map_or(0, |place| place.sums);
            run(pw_norm_job::PW_NORM_MOMENTS, &moments_at(address, &call.extents))?;
            let rows = u64::from(call.groups) * u64::from(call.rows);
            let samples = (call.extents[0], call.sample());
            // SAFETY: the moments were queued above, in memory for all of them.
            let merged = unsafe { merge(device, address, samples, rows)? };
            run(pw_norm_job::PW_NORM_APPLY, &of_samples(merged))
        }
    }
}

/// Where the moments of each position are: in the logical order of positions, in pairs.
pub(super) fn moments_at(address: u64, extents: &[u64; MAX_AXES]) -> Tensor {
    let [_, d, h, w] = extents.map(|extent| extent as i64);
    Tensor { address, channel: 0, axes: [d * h * w, h * w, w, 1] }
}

/// Bytes of the moments of so many positions of each of so many samples, and of what is merged of
/// them.
pub(super) fn moments_bytes(samples: u64, positions: u64) -> Option<u64> {
    let (mut pairs, mut items) = (positions, positions);
    while items > 1 {
        items = items.div_ceil(MERGED);
        pairs = pairs.checked_add(items)?;
    }
    pairs.checked_mul(samples)?.checked_mul(16).filter(|&bytes| bytes < u64::MAX / 16)
}

fn moments_need(call: &Call) -> Result<Need> {
    let bytes = moments_bytes(call.extents[0], call.sample());
    let sums = bytes.and_then(|bytes| usize::try_from(bytes / 4).ok());
    Ok(Need { sums: sums.ok_or_else(|| too_large(&call.letters()))?, tiles: 0 })
}

/// Merges the moments of the positions of each sample, `(samples, positions)`, each of so many values;
/// gives the address of the samples'.
///
/// # Safety
/// There are [`moments_bytes`] from the address on, the first of them the positions' moments.
pub(super) unsafe fn merge(
    device: &CudaDevice,
    address: u64,
    (samples, positions): (u64, u64),
    values: u64,
) -> Result<u64> {
    let (mut from, mut items, mut unit) = (address, positions, values);
    while items > 1 {
        let (next, to) = (items.div_ceil(MERGED), from + 16 * samples * items);
        let mut params = pw_merge {
            from: from as *const f64,
            to: to as *mut f64,
            items: items as i64,
            unit: unit as i64,
            values: (positions * values) as i64,
        };
        let blocks = samples * next;
        let too_large = || Error::TooLarge {
            what: "the grid of a launch",
            sizes: vec![samples as usize, items as usize],
        };
        // The kernel counts blocks along one axis.
        let grid = Kernel::grid(blocks).filter(|grid| grid.1 == 1).ok_or_else(too_large)?;
        // SAFETY: the caller's promise.
        unsafe { start(device, Launch::helper(Helper::Merge), grid, &mut params)? };
        (from, items, unit) = (to, next, unit.saturating_mul(MERGED));
    }
    Ok(from)
}

/// Queues a copy of some channels of a dtype at all positions.
///
/// # Safety
/// As [`launch`].
pub(super) unsafe fn copy(
    device: &CudaDevice,
    dtype: DType,
    extents: &[u64; MAX_AXES],
    (source, channels): (Tensor, u32),
    dst: Tensor,
) -> Result<()> {
    let call = Call {
        groups: 1,
        rows: channels,
        depth: channels,
        extents: *extents,
        sources: Sources::one(source, channels),
        dst,
        residual: None,
        gate: None,
        moments: Moments::Scratch,
        scratch: None,
    };
    let letters = call.letters();
    if letters.positions == 0 || channels == 0 {
        return Ok(());
    }
    let mut params = pw_fprop::default();
    call.describe(&mut params, &call.sources, (dtype.size(), 4), [0; MAX_AXES]);
    (params.groups, params.rows) = (1, channels);
    if letters.channels_fast {
        params.flags = pw_flags::PW_FLAG_CHANNELS_FAST.0;
    }
    let helper = Helper::copy(dtype);
    let columns = letters.positions.div_ceil(helper.positions());
    let tiles = columns.saturating_mul(u64::from(channels).div_ceil(Helper::COPY_CHANNELS));
    let grid = Kernel::grid(tiles).ok_or_else(|| too_large(&letters))?;
    let _bound = device.bind()?;
    // SAFETY: the caller's promise.
    unsafe { start(device, Launch::helper(helper), grid, &mut params) }
}

fn too_large(letters: &Letters) -> Error {
    Error::TooLarge {
        what: "the grid of a launch",
        sizes: vec![letters.groups as usize, letters.rows as usize, letters.positions as usize],
    }
}

/// A kernel as its launch needs it.
struct Launch {
    /// Of the device's functions.
    function: usize,
    name: &'static str,
    threads: u32,
    shared_bytes: u32,
}

impl Launch {
    fn fprop(kernel: usize) -> Launch {
        let Kernel { name, threads, .. } = KERNELS[kernel];
        Launch { function: kernel, name, threads, shared_bytes: KERNELS[kernel].brought_bytes() }
    }

    fn helper(helper: Helper) -> Launch {
        let function = KERNELS.len() + helper as usize;
        Launch { function, name: helper.name(), threads: Helper::THREADS, shared_bytes: 0 }
    }

    fn int8(kernel: usize) -> Launch {
        let before = KERNELS.len() + Helper::ALL.len() + Training::ALL.len();
        Launch::bytes(&INT8_KERNELS[kernel], before + kernel)
    }

    fn fp8(kernel: usize) -> Launch {
        let before = Launch::int8(0).function + INT8_KERNELS.len();
        Launch::bytes(&FP8_KERNELS[kernel], before + kernel)
    }

    fn bytes(kernel: &ByteKernel, function: usize) -> Launch {
        let &ByteKernel { name, threads, tile } = kernel;
        Launch { function, name, threads, shared_bytes: tile.shared_bytes }
    }

    fn training(kernel: Training) -> Launch {
        let function = KERNELS.len() + Helper::ALL.len() + kernel as usize;
        let (threads, shared_bytes) = (kernel.threads(), kernel.shared_bytes());
        Launch { function, name: kernel.name(), threads, shared_bytes }
    }
}

/// Queues a kernel of training on so many blocks.
///
/// # Safety
/// As [`launch`]; what the parameters say must be true, and they are what the kernel takes.
pub(super) unsafe fn start_training<P>(
    device: &CudaDevice,
    kernel: Training,
    blocks: u32,
    params: &mut P,
) -> Result<()> {
    let _bound = device.bind()?;
    // SAFETY: the caller's promise.
    unsafe { start(device, Launch::training(kernel), (blocks, 1), params) }
}

/// Queues [`Helper::Reach`] or [`Helper::Quantize`] on the f32 source of a call, which has so many
/// channels; what the call's tensors are, `kernels/quantize.cuh` says.
///
/// # Safety
/// As [`launch`]; the residual is written to as well, and the gate.
pub(super) unsafe fn start_quantization(
    device: &CudaDevice,
    helper: Helper,
    call: &Call,
) -> Result<()> {
    let mut params = pw_fprop::default();
    call.describe(&mut params, &call.sources, (size_of::<f32>(), 1), [0; MAX_AXES]);
    (params.groups, params.rows) = (1, call.rows);
    let letters = call.letters();
    let grid = Kernel::grid(letters.positions.div_ceil(helper.positions()));
    let grid = grid.ok_or_else(|| too_large(&letters))?;
    let _bound = device.bind()?;
    // SAFETY: the caller's promise.
    unsafe { start(device, Launch::helper(helper), grid, &mut params) }
}

/// The kernels for bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bytes {
    /// [`INT8_KERNELS`].
    Integers,
    /// [`FP8_KERNELS`].
    Floats,
}

impl Bytes {
    pub(super) fn kernels(self) -> &'static [ByteKernel] {
        match self {
            Bytes::Integers => INT8_KERNELS,
            Bytes::Floats => FP8_KERNELS,
        }
    }
}

/// Queues a convolution of bytes by one of these kernels.
///
/// # Safety
/// As [`launch`], for what the parameters point to.
pub(super) unsafe fn start_bytes(
    device: &CudaDevice,
    (bytes, choice): (Bytes, Choice),
    call: &Call,
    params: &mut pw_bytes,
) -> Result<()> {
    let letters = call.letters();
    let tile = &bytes.kernels()[choice.kernel].tile;
    let need = tile.scratch(&letters, choice.splits).ok_or_else(|| too_large(&letters))?;
    let _bound = device.bind()?;
    let launch = match bytes {
        Bytes::Integers => Launch::int8(choice.kernel),
        Bytes::Floats => Launch::fp8(choice.kernel),
    };
    with_room(device, (need, call.scratch), choice.splits, true, |splits, scratch| {
        let grid = share(tile, &letters, (splits, scratch), &mut params.fprop)?;
        // SAFETY: the caller's promise; the room is for the sums of all splits.
        unsafe { start(device, launch, grid, params) }
    })
}

/// Queues the merge of the moments of so many samples, each of at most `PW_MERGED` items.
///
/// # Safety
/// As [`start_training`].
pub(super) unsafe fn start_merge(
    device: &CudaDevice,
    samples: u32,
    params: &mut pw_merge,
) -> Result<()> {
    let _bound = device.bind()?;
    // SAFETY: the caller's promise.
    unsafe { start(device, Launch::helper(Helper::Merge), (samples, 1), params) }
}

/// The only launch of this crate.
///
/// # Safety
/// As [`launch`]; what the parameters say must be true, and they are what the kernel takes.
unsafe fn start<P>(
    device: &CudaDevice,
    kernel: Launch,
    (x, y): (u32, u32),
    params: &mut P,
) -> Result<()> {
    let function = device.function(kernel.function).ok_or_else(|| Error::Kernel {
        kernel: kernel.name.into(),
        reason: format!("{device} does not run it"),
    })?;
    let mut arguments = [(&raw mut *params).cast::<c_void>()];
    // SAFETY: the kernel takes one P by value, which the driver copies now; what it points to is
    // the caller's promise.
    unsafe {
        result::launch_kernel(
            function.cu_function(),
            (x, y, 1),
            (kernel.threads, 1, 1),
            kernel.shared_bytes,
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
