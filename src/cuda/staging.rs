//! Calls on host tensors: cut into slices that pass through pinned memory, copied in and out on
//! streams of their own while the device computes on the slice between.

use cudarc::driver::result;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::call::Tensor;
use super::device::{CudaDevice, Event};
use super::memory::Buffer;
use crate::error::{Error, Result};
use crate::problem::Operand;
use crate::tensor::{MAX_RANK, MAX_SPATIAL};

/// What a slice takes on the device, where the layer's options do not say. Copies of this size run
/// at the bus's full rate, and a launch costs little beside them.
pub(super) const SLICE_BYTES: usize = 16 << 20;

/// Every tensor of a slice begins at a multiple of this.
pub(super) const ALIGNMENT: usize = 256;

/// Elements of tensors, which are copied by several threads.
pub(crate) trait Moved: Copy + Send + Sync {}
impl<T: Copy + Send + Sync> Moved for T {}

/// A call's tensors in host memory: sources and gate of `T`.
#[derive(Clone, Copy)]
pub(super) struct HostCall<'a, T, R = T, O = T> {
    /// They stand for their concatenation, which a slice has in one piece.
    pub sources: &'a [Operand<T>],
    /// Read beside them.
    pub residual: Option<&'a Operand<R>>,
    pub gate: Option<&'a Operand<T>>,
    pub dst: &'a Operand<O>,
    /// Whether nobody wants what is in dst.
    pub discard: bool,
    /// Channels of the largest tensor that is computed on the way.
    pub between: usize,
    /// Bytes that a layer takes for each position while it computes.
    pub bytes_beside: usize,
    /// Batch and the three spatial axes; none is empty.
    pub extents: [usize; 1 + MAX_SPATIAL],
    /// The most that a slice may take on the device, unless the least takes more.
    pub slice_bytes: usize,
    /// Whether the least is a whole sample, instead of one position.
    pub whole_samples: bool,
}

/// A slice's tensors on the device, dense in the host's order of axes.
pub(super) struct Slice {
    /// Where it begins among the call's positions.
    pub start: [u64; 1 + MAX_SPATIAL],
    pub extents: [u64; 1 + MAX_SPATIAL],
    pub src: Tensor,
    pub residual: Option<Tensor>,
    pub gate: Option<Tensor>,
    pub dst: Tensor,
    /// Twice the room for what is computed on the way.
    pub between: [u64; 2],
}

impl<T: Moved, R: Moved, O: Moved> HostCall<'_, T, R, O> {
    /// The call in one slice, at no address: what a kernel is chosen by, so that the choice and
    /// with it the result do not depend on how the call is cut.
    pub(super) fn undivided(&self) -> Slice {
        self.layout(&Piece { start: [0; 1 + MAX_SPATIAL], extents: self.extents }).slice(0)
    }

    fn channels(&self) -> usize {
        self.sources.iter().map(|source| source.channels).fold(0, usize::saturating_add)
    }

    /// Positions of one sample.
    fn sample(&self) -> usize {
        self.extents[1..].iter().product()
    }

    /// Of a sample's gate.
    fn gate_bytes(&self) -> usize {
        self.gate.map_or(0, |gate| gate.channels.saturating_mul(size_of::<T>()))
    }

    /// Bytes of all tensors at one position, and of what a layer takes beside them.
    fn position_bytes(&self) -> usize {
        let of = |channels: usize, size: usize| channels.saturating_mul(size);
        let bytes = of(self.channels().saturating_add(2 * self.between), size_of::<T>());
        let residual = self.residual.map_or(0, |residual| of(residual.channels, size_of::<R>()));
        let dst = of(self.dst.channels, size_of::<O>());
        let bytes = bytes.saturating_add(residual).saturating_add(dst);
        let bytes = bytes.saturating_add(self.bytes_beside);
        bytes.saturating_add(self.gate_bytes().div_ceil(self.sample()))
    }

    /// Positions of the smallest slice.
    fn least(&self) -> usize {
        if self.whole_samples { self.sample() } else { 1 }
    }

    /// Whether the smallest slice keeps to the call's limit.
    pub(super) fn fits(&self) -> bool {
        self.position_bytes().saturating_mul(self.least()) <= self.slice_bytes
    }

    fn layout(&self, piece: &Piece) -> Layout {
        let src = Dense::of(self.sources, piece);
        let mut read = src.bytes();
        let residual = self.residual.map(|r| Dense::of(std::slice::from_ref(r), piece));
        let gate = self.gate.map(|gate| Dense::of(std::slice::from_ref(gate), piece));
        let beside = [residual, gate].map(|dense| {
            let at = read.next_multiple_of(ALIGNMENT);
            read = at + dense?.bytes();
            Some((dense?, at))
        });
        let dst = Dense::of(std::slice::from_ref(self.dst), piece);
        let dst_at = read.next_multiple_of(ALIGNMENT);
        let host = dst_at + dst.bytes();
        let half = piece.positions() * self.between * size_of::<T>();
        let first = host.next_multiple_of(ALIGNMENT);
        let between = [first, (first + half).next_multiple_of(ALIGNMENT)];
        let device = if half > 0 { between[1] + half } else { host };
        Layout { piece: *piece, src, beside, read, dst, dst_at, host, between, device }
    }
}

/// Runs a call: `compute` queues the work of one slice on the device's stream, and is called for
/// one after another. Results are in dst when this returns.
///
/// # Safety
/// src and residual must be readable, dst writable and nobody else's, all in host memory.
///
/// # Errors
/// [`Error::Unsupported`] while the stream is captured, [`Error::DeviceMemory`] if not even one
/// position fits, [`Error::Cuda`], those of `compute`.
pub(super) unsafe fn run<T: Moved, R: Moved, O: Moved>(
    device: &CudaDevice,
    call: &HostCall<'_, T, R, O>,
    compute: impl FnMut(&Slice) -> Result<()>,
) -> Result<()> {
    check_capture(device)?;
    let kept = device.idle_staging().pop();
    let mut staging = match kept {
        Some(staging) => staging,
        None => Staging::new(device)?,
    };
    // SAFETY: the caller's promise.
    let outcome = unsafe { staging.run(device, call, compute) };
    if outcome.is_err() {
        staging.settle(device);
    }
    device.idle_staging().push(staging);
    outcome
}

/// # Errors
/// [`Error::Unsupported`] while the stream is captured.
pub(super) fn check_capture(device: &CudaDevice) -> Result<()> {
    if !device.is_capturing()? {
        return Ok(());
    }
    Err(Error::Unsupported {
        device: device.to_string(),
        what: "a call on host tensors while its stream is captured in a graph: it waits for its \
               result; use device tensors"
            .into(),
    })
}

/// Two slices' memory, and the streams that copy beside the one that computes. One call at a time
/// has it; nothing of it is in flight between calls.
pub(super) struct Staging {
    input: CudaDevice,
    output: CudaDevice,
    slots: [Slot; 2],
}

impl Staging {
    fn new(device: &CudaDevice) -> Result<Self> {
        let (input, output) = (device.with_new_stream()?, device.with_new_stream()?);
        let slots = [Slot::new(&input)?, Slot::new(&input)?];
        Ok(Staging { input, output, slots })
    }

    unsafe fn run<T: Moved, R: Moved, O: Moved>(
        &mut self,
        device: &CudaDevice,
        call: &HostCall<'_, T, R, O>,
        mut compute: impl FnMut(&Slice) -> Result<()>,
    ) -> Result<()> {
        let pieces = self.reserve(call)?;
        let alone = pieces.total() == 1;
        let (input, output) = if alone { (device, device) } else { (&self.input, &self.output) };
        let [mut next, mut other] = {
            let [first, second] = &mut self.slots;
            [first, second]
        };
        for piece in pieces {
            // SAFETY: the caller's promise.
            unsafe {
                next.finish(call)?;
                next.start(call, piece, [input, device, output], &mut compute)?;
            }
            std::mem::swap(&mut next, &mut other);
        }
        // SAFETY: as above.
        unsafe {
            next.finish(call)?;
            other.finish(call)
        }
    }

    /// Memory for as large slices as the call and the device allow.
    fn reserve<T: Moved, R: Moved, O: Moved>(
        &mut self,
        call: &HostCall<'_, T, R, O>,
    ) -> Result<Pieces> {
        // Each of the tensors begins aligned.
        let room = call.slice_bytes.saturating_sub(4 * ALIGNMENT).saturating_sub(call.gate_bytes());
        let mut most = room / call.position_bytes().max(1);
        loop {
            let pieces = Pieces::new(call.extents, most.max(call.least()));
            let Layout { host, device: bytes, .. } = call.layout(&pieces.largest());
            let slots = if pieces.total() == 1 { 1 } else { 2 };
            let mut slots = self.slots[..slots].iter_mut();
            let room = slots.try_for_each(|slot| slot.reserve(bytes, host));
            match room {
                Ok(()) => return Ok(pieces),
                Err(Error::DeviceMemory { .. }) if pieces.largest().positions() > call.least() => {
                    // Together the slots may have held what one of them now needs.
                    self.slots.iter_mut().try_for_each(Slot::release)?;
                    most = pieces.largest().positions() / 2;
                }
                Err(Error::DeviceMemory { device, .. }) => {
                    let what = match call.whole_samples {
                        false => "the smallest slice of a call on host tensors, one position",
                        true => "the smallest slice of a call on host tensors, one sample",
                    };
                    return Err(Error::DeviceMemory { device, what, bytes });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until nothing of a call that failed is in flight. What fails here has been told.
    fn settle(&mut self, device: &CudaDevice) {
        for stream in [&self.input, device, &self.output] {
            let _ = stream.synchronize();
        }
        for slot in &mut self.slots {
            slot.pending = None;
        }
    }
}

/// One slice's memory on the device and, laid out alike, on the host.
struct Slot {
    device: Buffer,
    host: Pinned,
    copied: Event,
    computed: Event,
    done: Event,
    /// What is in flight.
    pending: Option<Layout>,
}

impl Slot {
    fn new(stream: &CudaDevice) -> Result<Self> {
        let event = || stream.new_event();
        Ok(Slot {
            device: Buffer::new(stream, "", 0)?,
            host: Pinned::new(stream, 0)?,
            copied: event()?,
            computed: event()?,
            done: event()?,
            pending: None,
        })
    }

    /// Memory for this many bytes at least; a bit more saves the next call from asking again.
    fn reserve(&mut self, device: usize, host: usize) -> Result<()> {
        if self.device.bytes() >= device && self.host.bytes >= host {
            return Ok(());
        }
        let stream = self.device.device().clone();
        self.release()?;
        let allocate = |device: usize, host: usize| {
            let device = Buffer::new(&stream, "a slice of a call on host tensors", device)?;
            Ok((device, Pinned::new(&stream, host)?))
        };
        (self.device, self.host) =
            match allocate(device.next_power_of_two(), host.next_power_of_two()) {
                Err(Error::DeviceMemory { .. }) => allocate(device, host)?,
                other => other?,
            };
        // Other streams use it without waiting for this one.
        stream.synchronize()
    }

    fn release(&mut self) -> Result<()> {
        let stream = self.device.device().clone();
        (self.device, self.host) = (Buffer::new(&stream, "", 0)?, Pinned::new(&stream, 0)?);
        stream.synchronize()
    }

    /// Queues a slice on streams that copy in, compute and copy out.
    unsafe fn start<T: Moved, R: Moved, O: Moved>(
        &mut self,
        call: &HostCall<'_, T, R, O>,
        piece: Piece,
        [input, device, output]: [&CudaDevice; 3],
        compute: &mut impl FnMut(&Slice) -> Result<()>,
    ) -> Result<()> {
        let layout = call.layout(&piece);
        let host = self.host.values::<T>();
        // SAFETY: the caller vouches for the operands; the pinned memory has room for the layout,
        // and nothing in flight uses it.
        unsafe {
            let mut channel = 0;
            for source in call.sources {
                layout.src.copy_in(source, &piece, channel, host);
                channel += source.channels;
            }
            let [residual, gate] = layout.beside;
            if let (Some((dense, at)), Some(operand)) = (residual, call.residual) {
                dense.copy_in(operand, &piece, 0, host.byte_add(at).cast::<R>());
            }
            if let (Some((dense, at)), Some(operand)) = (gate, call.gate) {
                dense.copy_in(operand, &piece, 0, host.byte_add(at));
            }
        }
        let _bound = device.bind()?;
        let address = self.device.address();
        // SAFETY: both have room for the layout, and stay until `finish` has waited for `done`.
        unsafe {
            let read = std::slice::from_raw_parts(host.cast::<u8>(), layout.read);
            result::memcpy_htod_async(address, read, input.stream().cu_stream())
                .map_err(device.failed("cuMemcpyHtoDAsync"))?;
            self.copied.between(input, device)?;
            compute(&layout.slice(address))?;
            self.computed.between(device, output)?;
            if call.discard {
                self.done.after(output)?;
                self.pending = Some(layout);
                return Ok(());
            }
            let written = host.byte_add(layout.dst_at).cast::<u8>();
            let written = std::slice::from_raw_parts_mut(written, layout.dst.bytes());
            let from = address + layout.dst_at as u64;
            result::memcpy_dtoh_async(written, from, output.stream().cu_stream())
                .map_err(device.failed("cuMemcpyDtoHAsync"))?;
            self.done.after(output)?;
        }
        self.pending = Some(layout);
        Ok(())
    }

    /// Waits for the slice in flight, if there is one, and hands its result out.
    unsafe fn finish<T: Moved, R: Moved, O: Moved>(
        &mut self,
        call: &HostCall<'_, T, R, O>,
    ) -> Result<()> {
        let Some(layout) = &self.pending else { return Ok(()) };
        let stream = self.device.device();
        let bound = stream.bind()?;
        // SAFETY: the event was recorded when the slice was queued.
        unsafe { self.done.wait() }.map_err(stream.failed("cuEventSynchronize"))?;
        drop(bound);
        if !call.discard {
            // SAFETY: the caller vouches for dst; the pinned memory holds the layout.
            unsafe {
                let from = self.host.values::<O>().byte_add(layout.dst_at);
                layout.dst.copy_out(from, call.dst, &layout.piece);
            }
        }
        self.pending = None;
        Ok(())
    }
}

/// Host memory that the device copies from and to by itself.
struct Pinned {
    memory: *mut u8,
    bytes: usize,
    device: CudaDevice,
}

// SAFETY: plain memory, owned.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let mut memory: *mut u8 = std::ptr::without_provenance_mut(ALIGNMENT);
        if bytes > 0 {
            let what = "pinned host memory for a slice of a call on host tensors";
            let _bound = device.bind()?;
            // SAFETY: a plain allocation, freed in `drop`.
            memory = unsafe { result::malloc_host(bytes, 0) }
                .map_err(device.no_memory("cuMemHostAlloc", what, bytes))?
                .cast();
        }
        Ok(Pinned { memory, bytes, device: device.clone() })
    }

    /// Its first element; pages are aligned to more than that.
    fn values<T>(&self) -> *mut T {
        self.memory.cast()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        if let Ok(_bound) = self.device.bind() {
            // SAFETY: allocated by `new`; the driver waits for what still uses it. There is nobody
            // to tell of a failure, which is the echo of an earlier one.
            let _ = unsafe { result::free_host(self.memory.cast()) };
        }
    }
}

impl Event {
    /// Lets `second` wait for what is queued on `first`; the caller has bound the context.
    unsafe fn between(&self, first: &CudaDevice, second: &CudaDevice) -> Result<()> {
        let (from, to) = (first.stream().cu_stream(), second.stream().cu_stream());
        if from == to {
            return Ok(());
        }
        // SAFETY: the handles keep their streams alive, or their makers do.
        unsafe { self.record(from).and_then(|()| self.hold(to)) }
            .map_err(first.failed("cuStreamWaitEvent"))
    }

    /// Marks what is queued on a stream; the caller has bound the context.
    unsafe fn after(&self, device: &CudaDevice) -> Result<()> {
        // SAFETY: the handle keeps its stream alive, or its maker does.
        unsafe { self.record(device.stream().cu_stream()) }.map_err(device.failed("cuEventRecord"))
    }
}

/// A box of positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: [usize; 1 + MAX_SPATIAL],
    extents: [usize; 1 + MAX_SPATIAL],
}

impl Piece {
    fn positions(&self) -> usize {
        self.extents.iter().product()
    }

    /// Where it begins in a host tensor, in elements.
    fn offset<T>(&self, operand: &Operand<T>) -> isize {
        let [n, d, h, w] = self.start.map(|start| start as isize);
        let [along_d, along_h, along_w] = operand.spatial;
        n * operand.sample + d * along_d + h * along_h + w * along_w
    }
}

/// The pieces of a call: as many whole inner axes as fit, and a part of the next one out.
#[derive(Clone, Debug)]
struct Pieces {
    extents: [usize; 1 + MAX_SPATIAL],
    /// The axis that is cut into lengths of `chunk`; those before it are cut into single indices.
    axis: usize,
    chunk: usize,
    next: usize,
}

impl Pieces {
    /// Of at most so many positions each, and one at least.
    fn new(extents: [usize; 1 + MAX_SPATIAL], most: usize) -> Self {
        let (mut axis, mut inner) = (MAX_SPATIAL, 1usize);
        while axis > 0 && inner.saturating_mul(extents[axis]) <= most {
            inner *= extents[axis];
            axis -= 1;
        }
        let mut chunk = (most / inner).clamp(1, extents[axis]);
        if chunk < extents[axis] && inner == 1 && chunk > 4 {
            // Vectors of four are not cut.
            chunk -= chunk % 4;
        }
        Pieces { extents, axis, chunk, next: 0 }
    }

    fn total(&self) -> usize {
        let outer: usize = self.extents[..self.axis].iter().product();
        outer * self.extents[self.axis].div_ceil(self.chunk)
    }

    fn largest(&self) -> Piece {
        let mut extents = self.extents;
        extents[..self.axis].fill(1);
        extents[self.axis] = self.chunk;
        Piece { start: [0; 1 + MAX_SPATIAL], extents }
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.next >= self.total() {
            return None;
        }
        let mut piece = Piece { start: [0; 1 + MAX_SPATIAL], extents: self.extents };
        let parts = self.extents[self.axis].div_ceil(self.chunk);
        let start = self.next % parts * self.chunk;
        piece.start[self.axis] = start;
        piece.extents[self.axis] = self.chunk.min(self.extents[self.axis] - start);
        let mut rest = self.next / parts;
        for axis in (0..self.axis).rev() {
            (piece.start[axis], piece.extents[axis]) = (rest % self.extents[axis], 1);
            rest /= self.extents[axis];
        }
        self.next += 1;
        Some(piece)
    }
}

/// Where the tensors of a slice lie in its memory: src, residual, gate, dst, what is between.
struct Layout {
    piece: Piece,
    src: Dense,
    /// Residual and gate.
    beside: [Option<(Dense, usize)>; 2],
    /// The end of what is copied in.
    read: usize,
    dst: Dense,
    dst_at: usize,
    /// The end of what the host has a copy of.
    host: usize,
    between: [usize; 2],
    /// The end of all.
    device: usize,
}

impl Layout {
    fn slice(&self, address: u64) -> Slice {
        let tensor = |(dense, at): (Dense, usize)| dense.tensor(address + at as u64);
        let [residual, gate] = self.beside.map(|part| part.map(tensor));
        Slice {
            start: self.piece.start.map(|start| start as u64),
            extents: self.piece.extents.map(|extent| extent as u64),
            src: self.src.tensor(address),
            residual,
            gate,
            dst: self.dst.tensor(address + self.dst_at as u64),
            between: self.between.map(|at| address + at as u64),
        }
    }
}

/// How a box of a strided host tensor, or of several that stand for their concatenation, is laid out
/// without gaps.
#[derive(Clone, Copy)]
struct Dense {
    /// The axes, outermost first in memory.
    order: [usize; MAX_RANK],
    lengths: [usize; MAX_RANK],
    /// Of `[n, c, d, h, w]`; 0 for an axis along which all is the same.
    strides: [i64; MAX_RANK],
    len: usize,
    /// Bytes of an element.
    size: usize,
}

impl Dense {
    /// In the first tensor's order of axes.
    fn of<T>(hosts: &[Operand<T>], piece: &Piece) -> Self {
        let [n, d, h, w] = piece.extents;
        let channels = hosts.iter().map(|host| host.channels).sum();
        let lengths = [n, channels, d, h, w];
        let mut order = [0, 1, 2, 3, 4];
        if let Some(host) = hosts.first() {
            let from = host_strides(host);
            order.sort_by_key(|&axis| std::cmp::Reverse(from[axis].unsigned_abs()));
        }
        let mut strides = [0; MAX_RANK];
        let mut next = 1;
        for &axis in order.iter().rev() {
            // What is broadcast on the host needs to be there once.
            let same = hosts.iter().all(|host| host_strides(host)[axis] == 0);
            if same && (axis != 1 || hosts.len() == 1) {
                continue;
            }
            strides[axis] = next as i64;
            next *= lengths[axis];
        }
        Dense { order, lengths, strides, len: next, size: size_of::<T>() }
    }

    fn bytes(&self) -> usize {
        self.len * self.size
    }

    fn tensor(&self, address: u64) -> Tensor {
        let [sample, channel, d, h, w] = self.strides;
        Tensor { address, channel, axes: [sample, d, h, w] }
    }

    /// One tensor's part, outermost first: length, host stride, dense stride.
    fn axes<T>(&self, host: &Operand<T>) -> [Axis; MAX_RANK] {
        let from = host_strides(host);
        self.order.map(|axis| match self.strides[axis] {
            0 => (1, 0, 0),
            stride if axis == 1 => (host.channels, from[axis], stride as isize),
            stride => (self.lengths[axis], from[axis], stride as isize),
        })
    }

    /// Copies a tensor's part of the piece, from channel `first` of the dense form on.
    ///
    /// # Safety
    /// Every element of the piece must be readable, and `len` elements from `dense` on writable and
    /// nobody else's.
    unsafe fn copy_in<T: Moved>(
        &self,
        host: &Operand<T>,
        piece: &Piece,
        first: usize,
        dense: *mut T,
    ) {
        let (axes, count) = merged(self.axes(host));
        let from = host.ptr.wrapping_offset(piece.offset(host));
        let to = dense.wrapping_offset(first as isize * self.strides[1] as isize);
        // SAFETY: the caller's promise.
        unsafe { copy_in_parts(&axes[..count], from, to, part::<T>()) };
    }

    /// # Safety
    /// As [`copy_in`](Self::copy_in), the other way round.
    unsafe fn copy_out<T: Moved>(&self, dense: *const T, host: &Operand<T>, piece: &Piece) {
        let (axes, count) = merged(self.axes(host).map(|(len, host, dense)| (len, dense, host)));
        let to = host.ptr.cast_mut().wrapping_offset(piece.offset(host));
        // SAFETY: the caller's promise.
        unsafe { copy_in_parts(&axes[..count], dense, to, part::<T>()) };
    }
}

fn host_strides<T>(host: &Operand<T>) -> [isize; MAX_RANK] {
    let [d, h, w] = host.spatial;
    [host.sample, host.channel, d, h, w]
}

/// Copies one host tensor to another of the same channels, both with these positions.
///
/// # Safety
/// Every element of the one must be readable, of the other writable and nobody else's.
pub(super) unsafe fn copy_on_host<T: Moved>(
    extents: [usize; 1 + MAX_SPATIAL],
    from: &Operand<T>,
    to: &Operand<T>,
) {
    if from.channels == 0 || extents.contains(&0) {
        return;
    }
    let [n, d, h, w] = extents;
    let lengths = [n, to.channels, d, h, w];
    let (source, target) = (host_strides(from), host_strides(to));
    let mut axes = [0, 1, 2, 3, 4].map(|axis: usize| (lengths[axis], source[axis], target[axis]));
    axes.sort_by_key(|&(_, _, stride)| std::cmp::Reverse(stride.unsigned_abs()));
    let (axes, count) = merged(axes);
    // SAFETY: the caller's promise.
    unsafe { copy_in_parts(&axes[..count], from.ptr, to.ptr.cast_mut(), part::<T>()) };
}

type Axis = (usize, isize, isize);

/// Axes that lie behind one another on both sides as one, and how many are left; those of length 1
/// are left out.
fn merged(axes: [Axis; MAX_RANK]) -> ([Axis; MAX_RANK], usize) {
    let (mut merged, mut count) = ([(1, 0, 0); MAX_RANK], 0);
    for inner in axes.into_iter().filter(|&(len, ..)| len != 1) {
        let (len, from, to) = inner;
        match merged[..count].last_mut() {
            Some(outer) if outer.1 == from * len as isize && outer.2 == to * len as isize => {
                *outer = (outer.0 * len, from, to);
            }
            _ => {
                merged[count] = inner;
                count += 1;
            }
        }
    }
    (merged, count)
}

/// The least that a thread copies by itself: one is slower than the bus to the device.
const fn part<T>() -> usize {
    (1 << 20) / size_of::<T>()
}

/// As [`copy`], in parts of so many elements or more, on threads of rayon's current pool.
///
/// # Safety
/// As [`copy`].
unsafe fn copy_in_parts<T: Moved>(axes: &[Axis], from: *const T, to: *mut T, part: usize) {
    let len: usize = axes.iter().map(|&(len, ..)| len).product();
    let parts = (len / part).min(rayon::current_num_threads());
    let Some((&(outer, along_from, along_to), inner)) = axes.split_first() else {
        // SAFETY: the caller's promise.
        return unsafe { copy(axes, from, to) };
    };
    if parts < 2 || outer < parts {
        // SAFETY: the caller's promise.
        return unsafe { copy(axes, from, to) };
    }
    let ends = Ends { from, to };
    (0..parts).into_par_iter().for_each(|i| {
        let (start, end) = (outer * i / parts, outer * (i + 1) / parts);
        let mut axes = [(1, 0, 0); MAX_RANK];
        axes[0] = (end - start, along_from, along_to);
        axes[1..=inner.len()].copy_from_slice(inner);
        let start = start as isize;
        let Ends { from, to } = ends.moved(start * along_from, start * along_to);
        // SAFETY: the caller's promise, for a part of the elements that is this turn's alone.
        unsafe { copy(&axes[..=inner.len()], from, to) };
    });
}

/// Where a copy begins.
#[derive(Clone, Copy)]
struct Ends<T> {
    from: *const T,
    to: *mut T,
}

impl<T> Ends<T> {
    fn moved(self, from: isize, to: isize) -> Ends<T> {
        Ends { from: self.from.wrapping_offset(from), to: self.to.wrapping_offset(to) }
    }
}

// SAFETY: threads use elements of their own.
unsafe impl<T: Send> Send for Ends<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Ends<T> {}

/// Copies along axes with strides in elements, outermost first.
///
/// # Safety
/// Every element that is reached must be readable or writable, and no two are the same.
unsafe fn copy<T: Copy>(axes: &[Axis], from: *const T, to: *mut T) {
    match axes {
        // SAFETY: the caller's promise, for one element.
        [] => unsafe { to.write(from.read()) },
        // SAFETY: the caller's promise, for elements without gaps.
        &[(len, 1, 1)] => unsafe { to.copy_from_nonoverlapping(from, len) },
        &[(len, along_from, along_to), ref rest @ ..] => {
            for i in 0..len as isize {
                let (from, to) =
                    (from.wrapping_offset(i * along_from), to.wrapping_offset(i * along_to));
                // SAFETY: the caller's promise, for a part of the elements.
                unsafe { copy(rest, from, to) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operand(data: &[f32], channels: usize, strides: [isize; 5]) -> Operand {
        let [sample, channel, d, h, w] = strides;
        let spatial = [d, h, w];
        Operand { ptr: data.as_ptr(), sample, channel, channels, spatial, stream: None }
    }

    fn whole(extents: [usize; 4]) -> Piece {
        Piece { start: [0; 4], extents }
    }

    fn at(host: Operand, offset: usize) -> Operand {
        Operand { ptr: host.ptr.wrapping_add(offset), ..host }
    }

    fn gathered(host: &Operand, dense: &Dense) -> Vec<f32> {
        let mut values = vec![f32::NAN; dense.len];
        // SAFETY: the tests' strides stay within their data.
        unsafe { dense.copy_in(host, &whole([1; 4]), 0, values.as_mut_ptr()) };
        values
    }

    #[test]
    fn host_tensors_keep_their_own_order() {
        // Channels last, dense: one run.
        let data: Vec<f32> = (0..120).map(|i| i as f32).collect();
        let host = operand(&data, 3, [60, 1, 60, 15, 3]);
        let dense = Dense::of(&[host], &whole([2, 1, 4, 5]));
        assert_eq!(dense.strides, [60, 1, 60, 15, 3]);
        let (axes, count) = merged(dense.axes(&host));
        assert_eq!(axes[..count], [(120, 1, 1)]);
        assert_eq!(gathered(&host, &dense), data);
    }

    #[test]
    fn gaps_and_negative_strides_are_gathered_and_scattered() {
        let data: Vec<f32> = (0..64).map(|i| i as f32).collect();
        let host = at(operand(&data, 3, [64, 20, 64, -5, 2]), 12);
        let dense = Dense::of(&[host], &whole([1, 1, 3, 2]));
        assert_eq!([dense.strides[1], dense.strides[3], dense.strides[4]], [6, 2, 1]);
        let values = gathered(&host, &dense);
        let expected = (0..18).map(|i| (12 + i / 6 * 20 - i % 6 / 2 * 5 + i % 2 * 2) as f32);
        assert_eq!(values, expected.collect::<Vec<_>>());
        let mut back = vec![-1.0; 64];
        let target = Operand { ptr: back.as_mut_ptr().wrapping_add(12), ..host };
        // SAFETY: the same elements.
        unsafe { dense.copy_out(values.as_ptr(), &target, &whole([1; 4])) };
        let touched: Vec<f32> = back.into_iter().filter(|&x| x != -1.0).collect();
        let mut sorted = values;
        sorted.sort_by(f32::total_cmp);
        assert_eq!(touched, sorted);
    }

    #[test]
    fn parts_make_the_whole() {
        let data: Vec<f32> = (0..4096).map(|i| i as f32).collect();
        for axes in [
            &[(4096, 1, 1)][..],
            &[(7, 500, 21), (21, 2, 1)],
            &[(2, 2000, 1000), (10, 100, 100), (50, -1, 2)],
            &[(900, 3, 4)],
            &[],
        ] {
            let at = if axes.len() == 3 { 50 } else { 0 };
            let [mut expected, mut got] = [vec![-1.0; 4096], vec![-1.0; 4096]];
            let from = data[at..].as_ptr();
            // SAFETY: the axes stay within both.
            unsafe { copy(axes, from, expected.as_mut_ptr()) };
            for part in [1, 10, 1000, 5000] {
                got.fill(-1.0);
                let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
                let to = Ends { from, to: got.as_mut_ptr() };
                // SAFETY: as above.
                pool.install(|| unsafe { copy_in_parts(axes, { to }.from, { to }.to, part) });
                assert!(got == expected, "{axes:?} in parts of {part}");
            }
        }
    }

    #[test]
    fn what_is_broadcast_is_copied_once() {
        let data = [1.0, 2.0, 3.0, 4.0];
        let host = operand(&data, 2, [0, 2, 0, 0, 1]);
        let dense = Dense::of(&[host], &whole([5, 1, 3, 2]));
        assert_eq!((dense.len, dense.strides), (4, [0, 2, 0, 0, 1]));
        assert_eq!(gathered(&host, &dense), data);
    }

    #[test]
    fn sources_lie_behind_one_another_in_the_order_of_the_first() {
        // Channels last, then channels first: [n, c, w] of 2 x (2, 1) x 3.
        let data: Vec<f32> = (0..18).map(|i| i as f32).collect();
        let hosts =
            [operand(&data, 2, [6, 1, 0, 0, 2]), at(operand(&data, 1, [3, 3, 0, 0, 1]), 12)];
        let dense = Dense::of(&hosts, &whole([2, 1, 1, 3]));
        assert_eq!((dense.len, dense.strides), (18, [9, 1, 0, 0, 3]));
        let mut values = vec![f32::NAN; 18];
        // SAFETY: within `data` and `values`.
        unsafe {
            dense.copy_in(&hosts[0], &whole([1; 4]), 0, values.as_mut_ptr());
            dense.copy_in(&hosts[1], &whole([1; 4]), 2, values.as_mut_ptr());
        }
        let expected = (0..6).flat_map(|p| [2 * p, 2 * p + 1, 12 + p]).map(|i| i as f32);
        assert_eq!(values, expected.collect::<Vec<_>>());
    }

    #[test]
    fn pieces_cover_every_position_once_and_keep_to_their_size() {
        for extents in [[1, 1, 1, 1], [3, 1, 1, 7], [2, 3, 4, 5], [1, 2, 1, 100], [7, 1, 1, 1]] {
            let all: usize = extents.iter().product();
            for most in [1, 2, 3, 4, 5, 6, 7, 19, 20, 21, 60, 119, 120, 1000] {
                let mut seen = vec![0; all];
                let pieces = Pieces::new(extents, most);
                let mut count = 0;
                for Piece { start, extents: part } in pieces.clone() {
                    count += 1;
                    assert!(part.iter().product::<usize>() <= most.max(1), "{extents:?} {most}");
                    assert!(part.iter().product::<usize>() <= pieces.largest().positions());
                    for i in 0..part.iter().product::<usize>() {
                        let [_, b, c, d] = part;
                        let at = [i / d / c / b, i / d / c % b, i / d % c, i % d];
                        let index = (0..4).fold(0, |index, axis| {
                            assert!(at[axis] < part[axis]);
                            index * extents[axis] + start[axis] + at[axis]
                        });
                        seen[index] += 1;
                    }
                }
                assert_eq!(count, pieces.total());
                assert!(seen.iter().all(|&times| times == 1), "{extents:?} {most}: {seen:?}");
                assert!(most < all || count == 1);
            }
        }
    }
}
