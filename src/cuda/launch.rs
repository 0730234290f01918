//! From a call and the choice of its kernel to launches, and the launches.

use std::ffi::c_void;

use cudarc::driver::result;

use super::call::{Call, MAX_AXES, Moments, Sources, Tensor};
use super::device::CudaDevice;
use super::memory::Buffer;
use super::params::{
    PW_MERGED, PW_NORM_TURN, PW_NORM_TURN_BYTES, pw_bytes, pw_flags, pw_fprop, pw_merge,
    pw_norm_job,
};
use super::plan::{
    ByteKernel, Choice, FP8_KERNELS, Helper, INT8_KERNELS, KERNELS, Kernel, Letters, Tile, Training,
};
use super::scratch::{Given, Need, Room, given, in_graph};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stages::NormOver;
use crate::tensor::checked_product;

const MERGED: u64 = PW_MERGED as u64;

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
        let mut launch = Launch::helper(norm);
        // One pass over the values needs no room for them.
        if job != pw_norm_job::PW_NORM_APPLY {
            let bytes = params.rows.div_ceil(PW_NORM_TURN).saturating_mul(PW_NORM_TURN_BYTES);
            if bytes <= device.facts().norm_room() {
                (params.norm.held, launch.shared_bytes) = (1, bytes);
            }
        }
        // SAFETY: the caller's promise.
        unsafe { start(device, launch, grid, &mut params) }
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
