//! NCCL: sums over the GPUs of several processes.
//!
//! Its library is looked for when the first communicator is made, by us: cudarc, whose types these are,
//! does not know the name under which NCCL is installed to run, panics where it finds none, and holds
//! codes in an enum, which a newer NCCL may have more of. Communicators do not block, so that a worker
//! that is gone is an error in time.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUstream, cuStreamQuery, cudaError_enum};
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use crate::cuda::device::CudaDevice;
use crate::cuda::memory::{Buffer, Plain};
use crate::error::{Error, Result};
use crate::train::{AllReduce, Launch};

/// As it is installed to run, and to be linked with.
const LIBRARIES: [&str; 2] =
    if cfg!(windows) { ["nccl.dll", "nccl64_2.dll"] } else { ["libnccl.so.2", "libnccl.so"] };

/// `ncclSuccess` and `ncclInProgress`.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

/// The most bytes that lie on the device at a time.
const PIECE: usize = 32 << 20;

/// `ncclConfig_t` of NCCL 2.14, the first that does not block; later ones read as much of a configuration
/// as it says that it has.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    padding: c_int,
}

impl Config {
    const NON_BLOCKING: Config = Config {
        size: size_of::<Config>(),
        magic: 0xcafe_beef,
        version: 21400,
        blocking: 0,
        padding: 0,
    };
}

/// What of NCCL this crate calls. Any code may come back, so it is read as an integer.
#[derive(Clone, Copy)]
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    init: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config) -> c_int,
    async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        ncclComm_t,
        CUstream,
    ) -> c_int,
    finalize: unsafe extern "C" fn(ncclComm_t) -> c_int,
    destroy: unsafe extern "C" fn(ncclComm_t) -> c_int,
    abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
}

impl Functions {
    /// NCCL, or why there is none that can be used. Asked once per process.
    fn get() -> Result<Functions> {
        static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
        let functions = FUNCTIONS.get_or_init(|| Functions::load(&LIBRARIES));
        functions.clone().map_err(|reason| Error::AllReduce { reason })
    }

    fn load(names: &[&str]) -> Result<Functions, String> {
        let mut refusals = Vec::new();
        let opened = names.iter().find_map(|&name| {
            // SAFETY: NCCL's library runs its initialisers, as for every program that uses it.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => Some((name, library)),
                Err(error) => {
                    let cause = std::error::Error::source(&error);
                    refusals
                        .push(cause.map_or_else(|| error.to_string(), |cause| cause.to_string()));
                    None
                }
            }
        });
        let Some((name, library)) = opened else {
            let why = refusals.join("; ");
            return Err(format!(
                "no NCCL: {why} (NCCL 2.14 or later must be on the loader's path, as LD_LIBRARY_PATH)"
            ));
        };
        // Resident for good: communicators and what they call live as long as the process.
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($symbol:literal) => {
                // SAFETY: the function has this signature in every NCCL from 2.14 on.
                *unsafe { library.get($symbol.as_bytes()) }
                    .map_err(|_| format!("{name} lacks {}: NCCL is older than 2.14", $symbol))?
            };
        }
        Ok(Functions {
            get_unique_id: function!("ncclGetUniqueId"),
            init: function!("ncclCommInitRankConfig"),
            async_error: function!("ncclCommGetAsyncError"),
            all_reduce: function!("ncclAllReduce"),
            finalize: function!("ncclCommFinalize"),
            destroy: function!("ncclCommDestroy"),
            abort: function!("ncclCommAbort"),
        })
    }
}

/// What the workers of one group must all have: made by one of them, and brought to the others by
/// whatever connects them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NcclId([u8; 128]);

impl NcclId {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::AllReduce`] without an NCCL that can be used.
    pub fn new() -> Result<Self> {
        Self::by(&Functions::get()?)
    }

    fn by(functions: &Functions) -> Result<Self> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: it writes an id.
        check("ncclGetUniqueId", unsafe { (functions.get_unique_id)(&mut id) })?;
        Ok(NcclId(id.internal.map(|c| c as u8)))
    }

    /// As bytes, to bring it to others.
    pub fn to_bytes(self) -> [u8; 128] {
        self.0
    }

    /// Of the bytes that another worker's has.
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        NcclId(bytes)
    }
}

impl fmt::Debug for NcclId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NcclId")
    }
}

/// One of several processes, each with a GPU of its own, that train together: [`AllReduce`] by NCCL, which
/// is looked for on the loader's path when the first one is made.
///
/// Values come from the host and go back there, in pieces through memory of the device. Sums are taken in
/// NCCL's order, which depends on the group and its machines, and are the same on every worker.
///
/// Before each sum the workers compare, by a small one of its own, how many values of which type they
/// bring. A worker that is gone, brings others, fails on its device, or does not come within the timeout
/// is an error to all, and so is every sum after that.
///
/// ```no_run
/// use std::sync::Arc;
/// use std::time::Duration;
/// use pointwise::train::{self, Launch, NcclWorker, Params};
/// # use pointwise::Pointwise;
/// # let layer = Pointwise::new(ndarray::Array2::<f32>::ones((4, 4)));
///
/// let launch = Launch::from_env()?; // of torchrun, mpirun or srun
/// let device = launch.device()?;
/// let worker = Arc::new(NcclWorker::launched(&launch, &device, Duration::from_secs(60))?);
/// let mut params = Params::new(&layer, &device.into())?;
/// params.set_all_reduce(Some(worker.clone())); // statistics of all workers' samples
/// let mut grads = params.grads();
/// // … forward, backward …
/// train::all_reduce([&mut grads], &*worker, train::BUCKET)?;
/// # Ok::<(), pointwise::Error>(())
/// ```
#[derive(Debug)]
pub struct NcclWorker {
    rank: usize,
    workers: usize,
    group: Mutex<Group<OnDevice>>,
}

impl NcclWorker {
    /// Joins a group of `workers`, as the one with the number `rank`; returns when all are there. Sums run
    /// on a stream of their own of the device.
    ///
    /// # Errors
    /// [`Error::AllReduce`] without an NCCL that can be used, or if not all of them come within
    /// `timeout`; [`Error::ParameterValue`] for a number that is none of the group; a device's own.
    pub fn new(
        device: &CudaDevice,
        id: NcclId,
        rank: usize,
        workers: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let functions = Functions::get()?;
        let device = device.with_new_stream()?;
        let communicator = {
            // A communicator belongs to the device that is current.
            let _bound = device.bind()?;
            Communicator::new(functions, id, rank, workers, timeout)?
        };
        let group = Group { communicator, values: OnDevice { memory: None, device } };
        Ok(NcclWorker { rank, workers, group: Mutex::new(group) })
    }

    /// Joins the group of all processes of a launch, whose worker 0 hands out the id. Both may take as long
    /// as `timeout`.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::AllReduce`] if worker 0 is not reached within `timeout`.
    pub fn launched(launch: &Launch, device: &CudaDevice, timeout: Duration) -> Result<Self> {
        // Also found missing where the id is not made.
        Functions::get()?;
        let own = if launch.rank == 0 { Some(NcclId::new()?.to_bytes()) } else { None };
        let id = NcclId::from_bytes(launch.share(own, timeout)?);
        Self::new(device, id, launch.rank, launch.workers, timeout)
    }

    /// The number of this worker, from zero.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers
    }

    fn group(&self) -> MutexGuard<'_, Group<OnDevice>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where NCCL finds values.
trait Values {
    /// Copies values there; their address.
    fn upload<T: Plain>(&mut self, values: &[T]) -> Result<u64>;
    /// Makes the device current that they are on, until the result is dropped.
    fn bind(&self) -> Result<impl Sized>;
    /// The stream on which NCCL reads and writes them.
    fn stream(&self) -> CUstream;
    /// Whether all is done that was queued on the stream.
    fn done(&self) -> Result<bool>;
    /// Copies back what was uploaded last.
    fn download<T: Plain>(&self, values: &mut [T]) -> Result<()>;
}

struct OnDevice {
    memory: Option<Buffer>,
    device: CudaDevice,
}

impl fmt::Debug for OnDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.device)
    }
}

impl Values for OnDevice {
    fn upload<T: Plain>(&mut self, values: &[T]) -> Result<u64> {
        let OnDevice { memory, device } = self;
        let bytes = size_of_val(values);
        let buffer = match memory {
            Some(buffer) if buffer.bytes() >= bytes => buffer,
            _ => {
                memory.insert(Buffer::new(device, "sums over workers", bytes.next_power_of_two())?)
            }
        };
        buffer.upload(values)?;
        Ok(buffer.address())
    }

    fn bind(&self) -> Result<impl Sized> {
        self.device.bind()
    }

    fn stream(&self) -> CUstream {
        self.device.stream().cu_stream()
    }

    fn done(&self) -> Result<bool> {
        // SAFETY: the device keeps its stream alive.
        match unsafe { cuStreamQuery(self.stream()) } {
            cudaError_enum::CUDA_SUCCESS => Ok(true),
            cudaError_enum::CUDA_ERROR_NOT_READY => Ok(false),
            code => Err(self.device.failed("cuStreamQuery")(cudarc::driver::DriverError(code))),
        }
    }

    fn download<T: Plain>(&self, values: &mut [T]) -> Result<()> {
        self.memory.as_ref().map_or(Ok(()), |buffer| buffer.download(values))
    }
}

/// A worker's part of a group.
#[derive(Debug)]
struct Group<V> {
    /// Dropped first: it uses what follows.
    communicator: Communicator,
    values: V,
}

impl<V: Values> Group<V> {
    /// Replaces values of `dtype` by their sums over the group. After an error there are no more: the next
    /// sum would meet what the others have begun.
    fn sum<T: Plain>(&mut self, values: &mut [T], dtype: ncclDataType_t) -> Result<()> {
        self.communicator.usable()?;
        let double = dtype == ncclDataType_t::ncclFloat64;
        self.agree(Brought { count: values.len(), double })?;
        let mut pieces = values.chunks_mut(PIECE / size_of::<T>());
        pieces.try_for_each(|piece| self.reduce(piece, dtype, ncclRedOp_t::ncclSum))
    }

    /// That all workers bring the same: of the least and the most, each knows both.
    fn agree(&mut self, own: Brought) -> Result<()> {
        let number = own.number();
        // The complement of the largest complement is the least.
        let mut numbers = [number, !number];
        self.reduce(&mut numbers, ncclDataType_t::ncclUint64, ncclRedOp_t::ncclMax)?;
        let (least, most) = (!numbers[1], numbers[0]);
        if (least, most) == (number, number) {
            return Ok(());
        }
        let [least, most] = [least, most].map(Brought::of_number);
        let reason = format!(
            "workers bring different values to a sum: this one {own}, all of them from {least} to {most}"
        );
        // Not aborted: all of them are to read the numbers, and begin nothing more.
        self.communicator.broken = Some(reason.clone());
        Err(Error::AllReduce { reason })
    }

    /// Replaces values by what they are reduced to over the group; aborts if that fails.
    fn reduce<T: Plain>(
        &mut self,
        values: &mut [T],
        dtype: ncclDataType_t,
        op: ncclRedOp_t,
    ) -> Result<()> {
        let Group { communicator, values: on } = self;
        let mut reduce = || {
            let address = on.upload(values)?;
            let _bound = on.bind()?;
            let of = (values.len(), dtype, op);
            communicator.all_reduce(address, of, on.stream(), || on.done())?;
            on.download(values)
        };
        reduce().inspect_err(|error| communicator.give_up(error))
    }
}

/// What a worker brings to a sum.
#[derive(Clone, Copy)]
struct Brought {
    count: usize,
    /// Values of f64, not f32.
    double: bool,
}

impl Brought {
    /// No slice has so many values that this overflows.
    fn number(self) -> u64 {
        2 * self.count as u64 + u64::from(self.double)
    }

    fn of_number(number: u64) -> Self {
        Brought { count: (number / 2) as usize, double: number % 2 == 1 }
    }
}

impl fmt::Display for Brought {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.count, if self.double { "f64" } else { "f32" })
    }
}

impl AllReduce for NcclWorker {
    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.group().sum(values, ncclDataType_t::ncclFloat64)
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        self.group().sum(values, ncclDataType_t::ncclFloat32)
    }
}

/// NCCL's communicator, one of a group's.
struct Communicator {
    functions: Functions,
    comm: ncclComm_t,
    timeout: Duration,
    /// Why there will be no more sums.
    broken: Option<String>,
}

// SAFETY: a communicator may be used by any thread, one at a time.
unsafe impl Send for Communicator {}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicator({:?}, broken: {:?})", self.timeout, self.broken)
    }
}

impl Communicator {
    fn new(
        functions: Functions,
        NcclId(id): NcclId,
        rank: usize,
        workers: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let (Ok(number), Ok(count), true) =
            (c_int::try_from(rank), c_int::try_from(workers), rank < workers)
        else {
            return Err(Error::ParameterValue {
                parameter: "rank".into(),
                value: format!("{rank} of {workers} workers"),
                expected: "the number of a worker",
            });
        };
        let id = ncclUniqueId { internal: id.map(|byte| byte as _) };
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::NON_BLOCKING);
        // SAFETY: it writes a communicator, and reads the configuration before it returns.
        let code = unsafe { (functions.init)(&mut comm, count, id, number, &mut config) };
        let mut communicator = Communicator { functions, comm, timeout, broken: None };
        communicator.wait("ncclCommInitRankConfig", code, || Ok(true))?;
        Ok(communicator)
    }

    fn usable(&self) -> Result<()> {
        match &self.broken {
            None => Ok(()),
            Some(reason) => Err(Error::AllReduce { reason: reason.clone() }),
        }
    }

    /// Reduces so many values in memory of the device; done when this returns, as `done` tells.
    fn all_reduce(
        &mut self,
        address: u64,
        (count, dtype, op): (usize, ncclDataType_t, ncclRedOp_t),
        stream: CUstream,
        done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        self.usable()?;
        let memory: *mut c_void = std::ptr::without_provenance_mut(address as usize);
        let (dtype, op) = (dtype as c_int, op as c_int);
        // SAFETY: the caller's memory has so many values, and lives until `done` says so or the
        // communicator is aborted.
        let code = unsafe {
            (self.functions.all_reduce)(memory, memory, count, dtype, op, self.comm, stream)
        };
        self.wait("ncclAllReduce", code, done)
    }

    /// Waits until NCCL is done with what a call has begun, and `done` too; after a failure the
    /// communicator is aborted, so that nothing of it still runs.
    fn wait(
        &mut self,
        call: &'static str,
        code: c_int,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let begin = Instant::now();
        let mut code = code;
        let mut poll = || {
            loop {
                if !matches!(code, SUCCESS | IN_PROGRESS) {
                    return check(call, code);
                }
                if self.comm.is_null() {
                    let reason = format!("{call} has made no communicator");
                    return Err(Error::AllReduce { reason });
                }
                let mut state = SUCCESS;
                // SAFETY: a communicator that is not destroyed; it writes a code.
                code = match unsafe { (self.functions.async_error)(self.comm, &mut state) } {
                    SUCCESS => state,
                    failed => failed,
                };
                if code == SUCCESS && done()? {
                    return Ok(());
                }
                let waited = begin.elapsed();
                if waited >= self.timeout {
                    let timeout = self.timeout;
                    let reason = format!("{call}: a worker did not come within {timeout:?}");
                    return Err(Error::AllReduce { reason });
                }
                // Short sums are done in microseconds.
                match waited < Duration::from_millis(1) {
                    true => std::hint::spin_loop(),
                    false => std::thread::sleep(Duration::from_micros(50)),
                }
            }
        };
        poll().inspect_err(|error| self.give_up(error))
    }

    /// Aborts after a failure, the first of which is why there are no more sums.
    fn give_up(&mut self, error: &Error) {
        self.broken.get_or_insert_with(|| match error {
            Error::AllReduce { reason } => reason.clone(),
            other => other.to_string(),
        });
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        if !comm.is_null() {
            // SAFETY: nobody uses it any more. A failure has nobody to tell.
            let _ = unsafe { (self.functions.abort)(comm) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.comm.is_null() {
            return;
        }
        // What others still have to receive of this one is sent first.
        // SAFETY: a communicator that is not destroyed.
        let code = unsafe { (self.functions.finalize)(self.comm) };
        if self.wait("ncclCommFinalize", code, || Ok(true)).is_ok() {
            // SAFETY: as above; nobody uses it afterwards.
            let _ = unsafe { (self.functions.destroy)(self.comm) };
        }
    }
}

/// A code of NCCL's as a result.
fn check(call: &'static str, code: c_int) -> Result<()> {
    let name = match code {
        SUCCESS => return Ok(()),
        1 => "ncclUnhandledCudaError",
        2 => "ncclSystemError",
        3 => "ncclInternalError",
        4 => "ncclInvalidArgument",
        5 => "ncclInvalidUsage",
        6 => "ncclRemoteError: a worker is gone",
        IN_PROGRESS => "ncclInProgress",
        _ => "an error without a name here",
    };
    let reason = format!("{call} failed: {name} ({code}); NCCL_DEBUG=WARN makes NCCL say more");
    Err(Error::AllReduce { reason })
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    thread_local! {
        /// How often NCCL is asked before it is done, and the code with which it is.
        static BUSY: Cell<(u32, c_int)> = const { Cell::new((0, SUCCESS)) };
        static ABORTED: Cell<u32> = const { Cell::new(0) };
        static DESTROYED: Cell<u32> = const { Cell::new(0) };
        /// What the other worker of a group of two brings, if not the same as this one.
        static OTHER: Cell<Option<Brought>> = const { Cell::new(None) };
        /// The type and the number of values of every reduction.
        static REDUCED: RefCell<Vec<(c_int, usize)>> = const { RefCell::new(Vec::new()) };
    }

    /// An NCCL of two workers with the same values, done after a while.
    const STAND_IN: Functions = Functions {
        get_unique_id: {
            unsafe extern "C" fn get(id: *mut ncclUniqueId) -> c_int {
                // SAFETY: as NCCL's.
                unsafe { (*id).internal = [-3; 128] };
                SUCCESS
            }
            get
        },
        init: {
            unsafe extern "C" fn init(
                comm: *mut ncclComm_t,
                _: c_int,
                _: ncclUniqueId,
                _: c_int,
                config: *mut Config,
            ) -> c_int {
                // SAFETY: as NCCL's; nobody looks into the communicator.
                unsafe {
                    assert_eq!(((*config).size, (*config).blocking), (24, 0));
                    *comm = std::ptr::without_provenance_mut(64);
                }
                IN_PROGRESS
            }
            init
        },
        async_error: {
            unsafe extern "C" fn ask(_: ncclComm_t, state: *mut c_int) -> c_int {
                let (left, end) = BUSY.get();
                BUSY.set((left.saturating_sub(1), end));
                // SAFETY: as NCCL's.
                unsafe { *state = if left == 0 { end } else { IN_PROGRESS } };
                SUCCESS
            }
            ask
        },
        all_reduce: {
            unsafe extern "C" fn reduce(
                _: *const c_void,
                values: *mut c_void,
                count: usize,
                dtype: c_int,
                op: c_int,
                _: ncclComm_t,
                _: CUstream,
            ) -> c_int {
                REDUCED.with_borrow_mut(|reduced| reduced.push((dtype, count)));
                if values.is_null() {
                    return IN_PROGRESS;
                }
                let values: *mut c_void = std::ptr::with_exposed_provenance_mut(values.addr());
                // nccl.h's numbers of types, of sums (0) and of maxima (2).
                // SAFETY: so many values of the type, as for NCCL.
                unsafe {
                    match (dtype, op) {
                        (7, 0) => std::slice::from_raw_parts_mut(values.cast::<f32>(), count)
                            .iter_mut()
                            .for_each(|x| *x *= 2.0),
                        (8, 0) => std::slice::from_raw_parts_mut(values.cast::<f64>(), count)
                            .iter_mut()
                            .for_each(|x| *x *= 2.0),
                        (5, 2) => {
                            let own = std::slice::from_raw_parts_mut(values.cast::<u64>(), count);
                            let other = OTHER.get().map_or(own[0], Brought::number);
                            own[0] = own[0].max(other);
                            own[1] = own[1].max(!other);
                        }
                        other => panic!("{other:?} is none of this crate's reductions"),
                    }
                }
                IN_PROGRESS
            }
            reduce
        },
        finalize: {
            unsafe extern "C" fn finalize(_: ncclComm_t) -> c_int {
                IN_PROGRESS
            }
            finalize
        },
        destroy: {
            unsafe extern "C" fn destroy(_: ncclComm_t) -> c_int {
                DESTROYED.set(DESTROYED.get() + 1);
                SUCCESS
            }
            destroy
        },
        abort: {
            unsafe extern "C" fn abort(_: ncclComm_t) -> c_int {
                ABORTED.set(ABORTED.get() + 1);
                SUCCESS
            }
            abort
        },
    };

    /// Tests may run on one thread.
    fn reset(busy: u32) {
        BUSY.set((busy, SUCCESS));
        ABORTED.set(0);
        DESTROYED.set(0);
        OTHER.set(None);
        REDUCED.take();
    }

    /// Values where they are, and the step that fails, if one does, when it is its turn.
    #[derive(Default)]
    struct OnHost {
        memory: Vec<u64>,
        fails: Option<(&'static str, u32)>,
        steps: RefCell<Vec<&'static str>>,
    }

    impl OnHost {
        fn step(&self, step: &'static str) -> Result<()> {
            let mut steps = self.steps.borrow_mut();
            steps.push(step);
            let times = steps.iter().filter(|&&s| s == step).count() as u32;
            match self.fails == Some((step, times)) {
                true => Err(Error::NoDevice { device: "cuda:9".into(), reason: step.into() }),
                false => Ok(()),
            }
        }
    }

    impl Values for OnHost {
        fn upload<T: Plain>(&mut self, values: &[T]) -> Result<u64> {
            self.step("upload")?;
            self.memory = vec![0; size_of_val(values).div_ceil(8).max(1)];
            // SAFETY: as many bytes, which any type may be copied to.
            unsafe {
                let to = self.memory.as_mut_ptr().cast();
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
            }
            Ok(self.memory.as_mut_ptr().expose_provenance() as u64)
        }

        fn bind(&self) -> Result<impl Sized> {
            self.step("bind")
        }

        fn stream(&self) -> CUstream {
            std::ptr::null_mut()
        }

        fn done(&self) -> Result<bool> {
            self.step("done").map(|()| true)
        }

        fn download<T: Plain>(&self, values: &mut [T]) -> Result<()> {
            self.step("download")?;
            // SAFETY: as many values were uploaded, of which any bits are one.
            unsafe {
                let from = self.memory.as_ptr().cast();
                std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), values.len());
            }
            Ok(())
        }
    }

    fn group(fails: Option<(&'static str, u32)>) -> Group<OnHost> {
        reset(0);
        let communicator = open(Duration::from_secs(60)).unwrap();
        Group { communicator, values: OnHost { fails, ..OnHost::default() } }
    }

    fn open(timeout: Duration) -> Result<Communicator> {
        let id = NcclId::by(&STAND_IN).unwrap();
        assert_eq!(id.to_bytes(), [253; 128]);
        Communicator::new(STAND_IN, id, 1, 2, timeout)
    }

    fn sum(communicator: &mut Communicator, done: impl FnMut() -> Result<bool>) -> Result<()> {
        let of = (4, ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
        communicator.all_reduce(0, of, std::ptr::null_mut(), done)
    }

    fn says(result: Result<impl fmt::Debug>, says: &str) {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::AllReduce { .. }), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    }

    #[test]
    fn a_missing_library_is_an_error_that_says_what_to_do() {
        says(
            Functions::load(&["libpointwise_has_no_such.so"])
                .map(|_| ())
                .map_err(|reason| Error::AllReduce { reason }),
            "no NCCL",
        );
        // This machine may have one: an answer in any case, and no panic.
        match NcclId::new() {
            Ok(_) => {}
            Err(error) => says(Err::<(), _>(error), "LD_LIBRARY_PATH"),
        }
        // Another library is no NCCL.
        if cfg!(target_os = "linux") {
            let error = Functions::load(&["libc.so.6"]).map(|_| ()).unwrap_err();
            assert!(error.contains("lacks ncclGetUniqueId"), "{error}");
        }
    }

    #[test]
    fn a_group_that_is_complete_sums() {
        reset(3);
        let mut communicator = open(Duration::from_secs(60)).unwrap();
        assert_eq!(BUSY.get().0, 0, "the group is waited for");
        BUSY.set((3, SUCCESS));
        let mut asked = 0;
        sum(&mut communicator, || {
            asked += 1;
            Ok(asked == 5)
        })
        .unwrap();
        assert_eq!((asked, BUSY.get().0), (5, 0), "NCCL and the stream are waited for");
        BUSY.set((3, SUCCESS));
        drop(communicator);
        assert_eq!((BUSY.get().0, DESTROYED.get(), ABORTED.get()), (0, 1, 0));
    }

    #[test]
    fn workers_that_bring_the_same_sum_it_in_pieces() {
        const F32: ncclDataType_t = ncclDataType_t::ncclFloat32;
        let mut group = group(None);
        let most = PIECE / 4;
        let mut values: Vec<f32> = (0..most + 3).map(|i| i as f32).collect();
        group.sum(&mut values, F32).unwrap();
        assert!(values.iter().enumerate().all(|(i, &x)| x == 2.0 * i as f32));
        assert_eq!(REDUCED.take(), [(5, 2), (7, most), (7, 3)]);
        let mut values = [1.5, -0.25];
        group.sum(&mut values, ncclDataType_t::ncclFloat64).unwrap();
        assert_eq!(values, [3.0, -0.5]);
        assert_eq!(REDUCED.take(), [(5, 2), (8, 2)]);
        // Nothing is something that workers may differ in.
        group.sum::<f32>(&mut [], F32).unwrap();
        assert_eq!(REDUCED.take(), [(5, 2)]);
        drop(group);
        assert_eq!((ABORTED.get(), DESTROYED.get()), (0, 1));
    }

    #[test]
    fn workers_that_bring_different_values_are_told_and_sum_no_more() {
        const F32: ncclDataType_t = ncclDataType_t::ncclFloat32;
        for (count, double, range) in [
            (3, false, "from 3 of f32 to 4 of f32"),
            (5, false, "from 4 of f32 to 5 of f32"),
            (0, false, "from 0 of f32 to 4 of f32"),
            (4, true, "from 4 of f32 to 4 of f64"),
            (usize::MAX / 8, true, "from 4 of f32 to 2305843009213693951 of f64"),
        ] {
            let mut group = group(None);
            OTHER.set(Some(Brought { count, double }));
            let mut values = [1.0f32, 2.0, 3.0, 4.0];
            let says_so = format!("this one 4 of f32, all of them {range}");
            says(group.sum(&mut values, F32), &says_so);
            assert_eq!(values, [1.0, 2.0, 3.0, 4.0]);
            assert_eq!(REDUCED.take(), [(5, 2)], "nothing more is begun");
            OTHER.set(None);
            says(group.sum(&mut values, F32), &says_so);
            assert_eq!(REDUCED.take(), []);
            drop(group);
            assert_eq!((ABORTED.get(), DESTROYED.get()), (0, 1), "the others may still read");
        }
    }

    #[test]
    fn after_any_failure_of_the_device_there_are_no_more_sums() {
        for step in ["upload", "bind", "done", "download"] {
            for turn in 1..3 {
                let mut group = group(Some((step, turn)));
                let mut sum = || group.sum(&mut [1.0f32], ncclDataType_t::ncclFloat32);
                let error = sum().unwrap_err();
                assert!(matches!(error, Error::NoDevice { .. }), "{step} {turn}: {error:?}");
                assert_eq!(ABORTED.get(), 1, "{step} {turn}");
                REDUCED.take();
                says(sum(), step);
                assert_eq!(REDUCED.take(), [], "{step} {turn}");
                drop(group);
                assert_eq!((ABORTED.get(), DESTROYED.get()), (1, 0), "{step} {turn}");
            }
        }
    }

    #[test]
    fn a_worker_that_stays_away_is_an_error_in_time() {
        let short = Duration::from_millis(30);
        reset(u32::MAX);
        says(open(short), "ncclCommInitRankConfig: a worker did not come within 30ms");
        assert_eq!(ABORTED.get(), 1);
        // It came, and then did not take part in a sum.
        BUSY.set((0, SUCCESS));
        let mut communicator = open(short).unwrap();
        says(sum(&mut communicator, || Ok(false)), "ncclAllReduce: a worker did not come");
        assert_eq!(ABORTED.get(), 2);
        says(sum(&mut communicator, || Ok(true)), "ncclAllReduce: a worker did not come");
        drop(communicator);
        assert_eq!((ABORTED.get(), DESTROYED.get()), (2, 0), "aborted once");
    }

    #[test]
    fn errors_of_nccl_are_named() {
        BUSY.set((2, 6));
        says(open(Duration::from_secs(60)), "ncclRemoteError: a worker is gone (6)");
        BUSY.set((0, SUCCESS));
        let mut communicator = open(Duration::from_secs(60)).unwrap();
        BUSY.set((1, 77));
        says(sum(&mut communicator, || Ok(true)), "an error without a name here (77)");
        let lost = || Err(Error::NoDevice { device: "cuda:9".into(), reason: "lost".into() });
        BUSY.set((0, SUCCESS));
        let mut communicator = open(Duration::from_secs(60)).unwrap();
        assert!(matches!(sum(&mut communicator, lost), Err(Error::NoDevice { .. })));
        says(sum(&mut communicator, || Ok(true)), "cuda:9");
        let id = NcclId::from_bytes([1; 128]);
        let error = Communicator::new(STAND_IN, id, 2, 2, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("2 of 2 workers"), "{error}");
    }
}
