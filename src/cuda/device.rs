//! A CUDA device as layers and tensors hold it: context, kernels, one stream.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{self, CUcontext, CUstream, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, result};

use super::driver::{self, failed};
use super::facts::Facts;
use super::image;
use super::plan::{Family, Helper, KERNELS, Training};
use super::scratch::Scratch;
use super::staging::Staging;
use crate::error::{Error, Result};
use crate::tensor::Place;

/// `CU_STREAM_PER_THREAD`.
const PER_THREAD: usize = 2;

/// The oldest chip that the kernels are written for.
const OLDEST: (u32, u32) = (7, 5);

/// What is loaded once per context.
struct Context {
    context: Arc<CudaContext>,
    /// In the order of [`KERNELS`], then of [`Helper`], of [`Training`] and of
    /// [`INT8_KERNELS`](super::plan::INT8_KERNELS); `None` is for other chips.
    functions: Vec<Option<CudaFunction>>,
    /// Of [`FP8_KERNELS`](super::plan::FP8_KERNELS), once they are asked for.
    fp8: OnceLock<Vec<CudaFunction>>,
    facts: Facts,
    /// The stream of [`CudaDevice::open`]; non-blocking, so that it is independent of others.
    lane: Arc<Lane>,
    /// Orders one stream behind another; held from its record to its wait.
    event: Mutex<Event>,
    /// The first fault that cannot be mended.
    fault: OnceLock<Fault>,
    /// What calls on host tensors use, kept for the next ones.
    staging: Mutex<Vec<Staging>>,
}

struct Fault {
    call: &'static str,
    code: u32,
}

/// A CUDA device and the stream on which everything given this handle runs.
///
/// Cheap to clone; `Send + Sync`. Handles of one device share its primary context (that of the
/// CUDA runtime, of cudarc and of the frameworks) and the loaded kernels. Calls leave the calling
/// thread's current context as it was.
///
/// # Host tensors
/// A layer takes host tensors of any size: they pass through pinned memory in slices over batch and
/// positions, copied in and out on streams of their own while this handle's stream computes. What a
/// slice may take is [`PrepareOptions::slice_bytes`](crate::PrepareOptions::slice_bytes), or less if
/// the device has no room; the result does not depend on it. The call returns when the result is
/// there. Memory is kept for the next call ([`trim`](Self::trim)).
///
/// # CUDA graphs
/// A call on device tensors can be captured in a graph by
/// [`Prepared::forward_into`](crate::Prepared::forward_into), or by `run_into` of a call with more
/// tensors: these wait for nothing, and allocate nothing of which the graph is not the owner. What
/// the graph's owner has to see to:
///
/// - Where several blocks share a sum or a layer norm takes all positions (`explain` says so), the
///   graph has memory nodes for what blocks leave for one another, with which CUDA lets a graph be
///   instantiated once at a time, and not be cloned. It has none if the call is given
///   [`scratch`](crate::Call::scratch), unless a concatenation has more than 16 sources or a layer
///   norm is one of 16-bit tensors, whose values lie in f32 beside dst until they are normalised.
/// - A graph keeps neither weights nor tensors alive. Keep the layer, not [updated], and every
///   tensor of the captured calls until the graph is destroyed and its last run is done.
///
///   [updated]: crate::Prepared::update
/// - Layer and tensors belong to the stream that is captured. Tensors of another stream would have
///   to be waited for, and make the capture fail ([`Error::Cuda`] with code 905).
/// - While the stream is being captured, neither drop tensors or layers of it, nor copy to the host
///   or from it: freeing would become part of the graph, and waiting ends the capture. Calls on host
///   tensors are refused ([`Error::Unsupported`]).
/// - Capture in the mode `THREAD_LOCAL` or `RELAXED` where other threads make calls on host tensors:
///   these may allocate pinned memory, which ends a `GLOBAL` capture.
/// - The stream of [`open`](Self::open) is shared by the whole process: another thread's call would
///   be captured too. Capture on a stream of your own, from
///   [`with_new_stream`](Self::with_new_stream).
#[derive(Clone)]
pub struct CudaDevice {
    shared: Arc<Context>,
    /// Dropped while the context is bound: cudarc binds it too, and leaves it so.
    lane: ManuallyDrop<Arc<Lane>>,
}

/// A stream, and the scratch of what runs on it: calls of one stream follow one another, and so can
/// share it.
struct Lane {
    // Dropped in this order: scratch is freed on the stream.
    scratch: Mutex<Scratch>,
    stream: Arc<CudaStream>,
}

impl Lane {
    fn new(context: &Arc<CudaContext>, stream: Arc<CudaStream>) -> Arc<Self> {
        Arc::new(Lane { scratch: Mutex::new(Scratch::new(context, &stream)), stream })
    }
}

/// A device's context as the calling thread's; when this goes, the one before is back.
#[must_use]
pub(super) struct Bound {
    /// Null is none.
    previous: CUcontext,
    changed: bool,
}

impl Bound {
    /// Notes the current context for code that may change it.
    pub(super) fn keep() -> Result<Self> {
        let previous = result::ctx::get_current().map_err(failed("cuCtxGetCurrent"))?;
        Ok(Bound { previous: previous.unwrap_or(std::ptr::null_mut()), changed: true })
    }

    fn to(context: &CudaContext) -> Result<Self> {
        let mut bound = Bound::keep()?;
        bound.changed = false;
        if bound.previous != context.cu_ctx() {
            // SAFETY: a context that its owner keeps alive.
            unsafe { result::ctx::set_current(context.cu_ctx()) }
                .map_err(failed("cuCtxSetCurrent"))?;
            bound.changed = true;
        }
        Ok(bound)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if self.changed {
            // SAFETY: it was this thread's context just before; whoever destroys it meanwhile
            // gets an error, which has nobody to tell.
            let _ = unsafe { result::ctx::set_current(self.previous) };
        }
    }
}

impl CudaDevice {
    /// The device with this ordinal, on a stream that all such handles share.
    ///
    /// # Errors
    /// [`Error::NoDevice`] with the reason: no driver, one that does not start or is too old for
    /// the kernels, no such device, or a chip older than compute capability 7.5. [`Error::Cuda`] if
    /// the driver fails to describe the device or to make a stream. [`Error::DeviceLost`] after a
    /// fault, from here and from every call on the device.
    pub fn open(ordinal: usize) -> Result<Self> {
        let shared = Context::of(ordinal)?;
        let lane = ManuallyDrop::new(shared.lane.clone());
        Ok(CudaDevice { shared, lane })
    }

    /// This device on a new stream of its own, for work that may overlap with other handles'.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the driver makes no stream.
    pub fn with_new_stream(&self) -> Result<Self> {
        let _bound = self.bind()?;
        let stream = self.shared.context.new_stream().map_err(self.failed("cuStreamCreate"))?;
        Ok(CudaDevice::on(self.shared.clone(), stream))
    }

    /// The device of a stream that cudarc (or candle through it) made, on that stream.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::Unsupported`] for the per-thread default stream, and for
    /// a stream of another context than the device's primary one.
    pub fn from_stream(stream: Arc<CudaStream>) -> Result<Self> {
        let context = stream.context();
        let ordinal = context.ordinal();
        one_for_all_threads(ordinal, stream.cu_stream())?;
        let shared = Context::of(ordinal)?;
        shared.expect_own(context.cu_ctx(), "a stream")?;
        Ok(CudaDevice::on(shared, stream))
    }

    /// The device with this ordinal on a stream that the caller owns; null is the legacy default
    /// stream.
    ///
    /// # Safety
    /// `stream` must outlive this handle and every layer and tensor that was made with it.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::Unsupported`] for the per-thread default stream, and for
    /// a stream of another context than the device's primary one; [`Error::Cuda`] for one that
    /// the driver does not know.
    pub unsafe fn from_raw_stream(ordinal: usize, stream: CUstream) -> Result<Self> {
        one_for_all_threads(ordinal, stream)?;
        let shared = Context::of(ordinal)?;
        // SAFETY: alive, as the caller vouches.
        let stream = unsafe { shared.context.wrap_borrowed_stream(stream) };
        let device = CudaDevice::on(shared, stream);
        let bound = device.bind()?;
        let mut context = std::ptr::null_mut();
        // SAFETY: alive, as the caller vouches; the context is written to a local.
        unsafe { sys::cuStreamGetCtx(device.stream().cu_stream(), &mut context) }
            .result()
            .map_err(device.failed("cuStreamGetCtx"))?;
        drop(bound);
        device.shared.expect_own(context, "a stream")?;
        Ok(device)
    }

    fn on(shared: Arc<Context>, stream: Arc<CudaStream>) -> Self {
        let lane = ManuallyDrop::new(Lane::new(&shared.context, stream));
        CudaDevice { shared, lane }
    }

    /// The device's number among those that the driver shows.
    pub fn ordinal(&self) -> usize {
        self.shared.context.ordinal()
    }

    /// The product's name.
    pub fn name(&self) -> &str {
        &self.shared.facts.name
    }

    /// As `(9, 0)`.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.shared.facts.compute_capability
    }

    /// The stream that work of this handle runs on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.lane.stream
    }

    /// Waits until all work on this handle's stream is done.
    ///
    /// # Errors
    /// [`Error::Cuda`] if any of it failed.
    pub fn synchronize(&self) -> Result<()> {
        let _bound = self.bind()?;
        // SAFETY: this handle keeps its stream alive, or its maker does.
        unsafe { result::stream::synchronize(self.stream().cu_stream()) }
            .map_err(self.failed("cuStreamSynchronize"))
    }

    /// Frees the memory that calls on host tensors keep on this device, and in pinned host memory,
    /// for the next ones: for each thread that was inside such a call at the same time, two slices
    /// ([`PrepareOptions::slice_bytes`](crate::PrepareOptions::slice_bytes)), rounded up to a power
    /// of two. Calls under way keep theirs.
    pub fn trim(&self) {
        // Freed after the lock, as that takes its time.
        let idle = std::mem::take(&mut *self.idle_staging());
        drop(idle);
    }

    /// Lets the device's memory pool keep up to so many bytes that are free when a stream is waited
    /// for, which would go back to the system and be slow to come again; the driver's default is 0.
    /// Of use to a service that makes tensors per call. It is the whole process's pool; a device
    /// without one has nothing to keep.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn keep_memory(&self, bytes: u64) -> Result<()> {
        if !self.has_pools() {
            return Ok(());
        }
        let _bound = self.bind()?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let mut bytes = bytes;
        // SAFETY: the device is one, the attribute a 64-bit number.
        unsafe {
            let pool = result::device::get_mem_pool(self.shared.context.cu_device())
                .map_err(self.failed("cuDeviceGetMemPool"))?;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut bytes).cast())
                .map_err(self.failed("cuMemPoolSetAttribute"))
        }
    }

    /// The scratch of this handle's stream. Whoever holds it queues what uses it before letting go.
    pub(super) fn scratch(&self) -> MutexGuard<'_, Scratch> {
        lock(&self.lane.scratch)
    }

    /// Whether the stream is being captured in a graph.
    pub(super) fn is_capturing(&self) -> Result<bool> {
        let _bound = self.bind()?;
        // SAFETY: this handle keeps its stream alive, or its maker does.
        let status = unsafe { result::stream::is_capturing(self.stream().cu_stream()) }
            .map_err(self.failed("cuStreamIsCapturing"))?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Whether memory can be allocated in stream order, in a capture too.
    pub(super) fn has_pools(&self) -> bool {
        self.shared.context.has_async_alloc()
    }

    /// # Errors
    /// [`Error::Unsupported`] while a graph is captured that could not take `memory` for `what`: the device
    /// has no pools.
    pub(super) fn check_capture(&self, what: impl fmt::Display, memory: &str) -> Result<()> {
        if self.has_pools() || !self.is_capturing()? {
            return Ok(());
        }
        Err(Error::Unsupported {
            device: self.to_string(),
            what: format!(
                "capturing {what} in a graph: the device has no memory pools, from which the graph would \
                 take {memory}"
            ),
        })
    }

    pub(super) fn context(&self) -> &CudaContext {
        &self.shared.context
    }

    pub(crate) fn facts(&self) -> &Facts {
        &self.shared.facts
    }

    /// The function of a row of [`KERNELS`], or behind them of a [`Helper`] and so on, if it runs on this
    /// device; behind all others, those of [`FP8_KERNELS`](super::plan::FP8_KERNELS).
    pub(super) fn function(&self, kernel: usize) -> Option<&CudaFunction> {
        let Context { functions, fp8, .. } = &*self.shared;
        match kernel.checked_sub(functions.len()) {
            None => functions[kernel].as_ref(),
            Some(kernel) => fp8.get()?.get(kernel),
        }
    }

    /// Whether a kernel of training runs on this device.
    pub(super) fn has_training(&self, kernel: Training) -> bool {
        self.function(KERNELS.len() + Helper::ALL.len() + kernel as usize).is_some()
    }

    /// Loads the kernels of fp8, unless they are.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason: the chip is too old, the build has none, or the driver does
    /// not load them.
    pub(super) fn load_fp8(&self) -> Result<()> {
        let Context { context, facts, fp8, .. } = &*self.shared;
        if fp8.get().is_some() {
            return Ok(());
        }
        let unsupported = |reason: String| Error::Unsupported {
            device: self.to_string(),
            what: format!("layers of fp8: {reason}"),
        };
        image::check_fp8(facts).map_err(unsupported)?;
        let _bound = self.bind()?;
        let functions = image::load_fp8(context, facts).map_err(unsupported)?;
        // Another thread may have been faster.
        let _ = fp8.set(functions);
        Ok(())
    }

    /// Makes this device's context the calling thread's for as long as the result lives. Every
    /// call of the driver is behind this.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] after a fault.
    pub(super) fn bind(&self) -> Result<Bound> {
        self.shared.check()?;
        Bound::to(&self.shared.context)
    }

    /// What calls on host tensors use between two of them.
    pub(super) fn idle_staging(&self) -> MutexGuard<'_, Vec<Staging>> {
        lock(&self.shared.staging)
    }

    pub(super) fn new_event(&self) -> Result<Event> {
        let _bound = self.bind()?;
        Event::new(&self.shared.context)
    }

    /// Turns a failed call into an error, and remembers a fault that ends the context.
    pub(super) fn failed(
        &self,
        call: &'static str,
    ) -> impl Fn(result::DriverError) -> Error + use<'_> {
        let shared = &self.shared;
        move |error| {
            let code = error.0 as u32;
            if driver::is_final(code) && shared.fault.set(Fault { call, code }).is_err() {
                // Another thread was told the cause.
                shared.check().err().unwrap_or_else(|| failed(call)(error))
            } else {
                failed(call)(error)
            }
        }
    }

    /// As [`failed`](Self::failed), for a call that asks for memory.
    pub(super) fn no_memory(
        &self,
        call: &'static str,
        what: &'static str,
        bytes: usize,
    ) -> impl Fn(result::DriverError) -> Error + use<'_> {
        move |error| match error.0 as u32 {
            driver::OUT_OF_MEMORY => Error::DeviceMemory { device: self.to_string(), what, bytes },
            _ => self.failed(call)(error),
        }
    }

    /// Lets this handle's stream wait for what is queued on another.
    ///
    /// # Safety
    /// `other` must be a stream of this device's context, and alive.
    pub(super) unsafe fn wait_for(&self, other: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.order(other, self.stream().cu_stream().addr()) }
    }

    /// Lets another stream wait for what is queued on this handle's.
    ///
    /// # Safety
    /// As [`wait_for`](Self::wait_for).
    pub(super) unsafe fn make_wait(&self, other: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.order(self.stream().cu_stream().addr(), other) }
    }

    /// Queues work behind that of its tensors' streams, and theirs behind it. The tensors that named
    /// these streams are borrowed for the call, and keep them alive.
    pub(super) fn ordered<T>(
        &self,
        streams: impl Iterator<Item = usize> + Clone,
        queue: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        // SAFETY: alive, see above.
        streams.clone().try_for_each(|stream| unsafe { self.wait_for(stream) })?;
        let queued = queue();
        // What was queued before a failure uses the tensors, too.
        // SAFETY: as above.
        let ordered = { streams }.try_for_each(|stream| unsafe { self.make_wait(stream) });
        if ordered.is_err() {
            // The caller may free the tensors on streams that do not wait for this one.
            let _ = self.synchronize();
        }
        queued.and_then(|queued| ordered.map(|()| queued))
    }

    /// Lets `second` wait for what is queued on `first`: raw handles, as they may be borrowed.
    unsafe fn order(&self, first: usize, second: usize) -> Result<()> {
        if first == second {
            return Ok(());
        }
        let _bound = self.bind()?;
        let event = lock(&self.shared.event);
        // SAFETY: alive, as the caller vouches.
        unsafe {
            event
                .record(std::ptr::without_provenance_mut(first))
                .map_err(self.failed("cuEventRecord"))?;
            event
                .hold(std::ptr::without_provenance_mut(second))
                .map_err(self.failed("cuStreamWaitEvent"))
        }
    }
}

/// A point in a stream's work. Its calls need the context bound, and streams that are alive.
pub(super) struct Event {
    event: sys::CUevent,
    context: Arc<CudaContext>,
}

// SAFETY: a handle, which the driver lets any thread use.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(failed("cuEventCreate"))?;
        Ok(Event { event, context: context.clone() })
    }

    pub(super) unsafe fn record(&self, stream: CUstream) -> Result<(), result::DriverError> {
        // SAFETY: the event lives, the caller vouches for the rest.
        unsafe { result::event::record(self.event, stream) }
    }

    /// Lets a stream wait for the last record; later records do not matter to it.
    pub(super) unsafe fn hold(&self, stream: CUstream) -> Result<(), result::DriverError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: the event lives, the caller vouches for the rest.
        unsafe { result::stream::wait_event(stream, self.event, flags) }
    }

    /// Waits for the last record.
    pub(super) unsafe fn wait(&self) -> Result<(), result::DriverError> {
        // SAFETY: the event lives, the caller vouches for the rest.
        unsafe { result::event::synchronize(self.event) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _bound = Bound::to(&self.context);
        // SAFETY: made by `new`, and not used after this. A failure is the echo of an earlier one.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let _bound = self.bind();
        // SAFETY: nobody uses it after this.
        unsafe { ManuallyDrop::drop(&mut self.lane) };
    }
}

/// Refuses the handle that is another stream in every thread: what one thread queues, another
/// would neither wait for nor free in order.
fn one_for_all_threads(ordinal: usize, stream: CUstream) -> Result<()> {
    if stream.addr() != PER_THREAD {
        return Ok(());
    }
    Err(Error::Unsupported {
        device: Place::Cuda(ordinal).to_string(),
        what: "the per-thread default stream (CU_STREAM_PER_THREAD), which is another stream in \
               every thread, so that work of several threads would not be ordered; create a \
               stream (`CudaContext::new_stream`, `CudaDevice::with_new_stream`), or pass the \
               legacy default stream"
            .into(),
    })
}

/// Refuses a context of cudarc's that is not its device's primary one. One that cudarc was given as a
/// raw handle may be, and does not say so.
pub(super) fn expect_primary(context: &CudaContext, what: &str) -> Result<()> {
    if context.is_primary() {
        return Ok(());
    }
    Context::of(context.ordinal())?.expect_own(context.cu_ctx(), what)
}

/// `cuda:0 (NVIDIA H200)`.
impl fmt::Display for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({})", self.ordinal(), self.name())
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaDevice({self}, stream {:?})", self.stream().cu_stream())
    }
}

impl Context {
    /// # Errors
    /// [`Error::Unsupported`] for another context than this, the primary one.
    fn expect_own(&self, context: CUcontext, what: &str) -> Result<()> {
        if context == self.context.cu_ctx() {
            return Ok(());
        }
        Err(Error::Unsupported {
            device: Place::Cuda(self.context.ordinal()).to_string(),
            what: format!(
                "{what} of a context other than the primary one, whose memory and kernels the \
                 device's other handles could not use; take that of `CudaContext::new`"
            ),
        })
    }

    /// The loaded kernels of a device's primary context.
    ///
    /// They stay loaded until the process ends: unloading would have to wait for every kernel in
    /// flight, on streams that may be gone.
    fn of(ordinal: usize) -> Result<Arc<Context>> {
        static LOADED: Mutex<Vec<Arc<Context>>> = Mutex::new(Vec::new());

        let missing =
            |reason: String| Error::NoDevice { device: format!("cuda:{ordinal}"), reason };
        let driver = driver::probe().map_err(|reason| missing(reason.into()))?;
        if ordinal >= driver.devices {
            return Err(missing(format!("the driver shows {} CUDA devices", driver.devices)));
        }
        let mut loaded = lock(&LOADED);
        if let Some(known) = loaded.iter().find(|known| known.context.ordinal() == ordinal) {
            known.check()?;
            return Ok(known.clone());
        }
        // Making a context binds it.
        let _kept = Bound::keep()?;
        // Our own handle of the primary context, so that what we set on it is ours alone.
        let context = CudaContext::new(ordinal).map_err(|error| {
            let code = driver::Code(error.0 as u32);
            missing(format!("{} gave no context: {code}", driver.describe()))
        })?;
        // Events for every tensor of a launch would cost more than the launch, and end a graph
        // capture: this crate orders its streams itself.
        // SAFETY: nothing here relies on cudarc's tracking.
        unsafe { context.disable_event_tracking() };
        let mut facts = Facts::of(&context)?;
        if facts.compute_capability < OLDEST {
            let (major, minor) = facts.compute_capability;
            return Err(missing(format!(
                "{} has compute capability {major}.{minor}; {}.{} or later is needed",
                facts.name, OLDEST.0, OLDEST.1
            )));
        }
        let functions = image::load(&context, &facts)
            .map_err(|code| missing(image::cannot_load(&driver, &facts, code)))?;
        let loaded_for = |oldest: (u32, u32)| {
            let all = KERNELS.iter().zip(&functions);
            let mut all = all.filter(|(kernel, _)| {
                kernel.family != Family::Simt && kernel.family.oldest() == oldest
            });
            all.all(|(_, function)| function.is_some())
        };
        (facts.sm75, facts.sm80) = (loaded_for((7, 5)), loaded_for((8, 0)));
        let stream = context.new_stream().map_err(failed("cuStreamCreate"))?;
        let lane = Lane::new(&context, stream);
        let event = Mutex::new(Event::new(&context)?);
        let (fp8, fault, staging) = (OnceLock::new(), OnceLock::new(), Mutex::default());
        let new = Arc::new(Context { context, functions, fp8, facts, lane, event, fault, staging });
        loaded.push(new.clone());
        Ok(new)
    }

    /// # Errors
    /// [`Error::DeviceLost`] after a fault.
    fn check(&self) -> Result<()> {
        let Some(&Fault { call, code }) = self.fault.get() else { return Ok(()) };
        let device = format!("cuda:{} ({})", self.context.ordinal(), self.facts.name);
        Err(Error::DeviceLost { device, call, code, name: driver::name(code) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinal_that_is_not_there_is_an_error_with_a_reason() {
        let error = CudaDevice::open(usize::MAX).unwrap_err();
        assert!(matches!(&error, Error::NoDevice { reason, .. } if !reason.is_empty()), "{error}");
    }
}
