//! NCCL's library, as C has it, and a communicator of it.
//!
//! It is looked for when the first communicator is made, by us: cudarc, whose types these are, does not
//! know the name under which NCCL is installed to run, panics where it finds none, and holds codes in an
//! enum, which a newer NCCL may have more of. Communicators do not block, so that a worker that is gone is
//! an error in time.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use super::NcclId;
use crate::error::{Error, Result};

/// As it is installed to run, and to be linked with.
const LIBRARIES: [&str; 2] =
    if cfg!(windows) { ["nccl.dll", "nccl64_2.dll"] } else { ["libnccl.so.2", "libnccl.so"] };

/// `ncclSuccess` and `ncclInProgress`.
pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;

/// `ncclConfig_t` of NCCL 2.14, the first that does not block; later ones read as much of a configuration
/// as it says that it has.
#[repr(C)]
pub(super) struct Config {
    pub size: usize,
    magic: u32,
    version: u32,
    pub blocking: c_int,
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
pub(super) struct Functions {
    pub get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    pub init:
        unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config) -> c_int,
    pub async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    pub all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        ncclComm_t,
        CUstream,
    ) -> c_int,
    pub finalize: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub destroy: unsafe extern "C" fn(ncclComm_t) -> c_int,
    pub abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
}

impl Functions {
    /// NCCL, or why there is none that can be used. Asked once per process.
    pub(super) fn get() -> Result<Functions> {
        static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
        let functions = FUNCTIONS.get_or_init(|| Functions::load(&LIBRARIES));
        functions.clone().map_err(|reason| Error::AllReduce { reason })
    }

    pub(super) fn load(names: &[&str]) -> Result<Functions, String> {
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

/// NCCL's communicator, one of a group's.
pub(super) struct Communicator {
    functions: Functions,
    comm: ncclComm_t,
    timeout: Duration,
    /// Why there will be no more sums.
    pub broken: Option<String>,
}

// SAFETY: a communicator may be used by any thread, one at a time.
unsafe impl Send for Communicator {}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Communicator({:?}, broken: {:?})", self.timeout, self.broken)
    }
}

impl Communicator {
    pub(super) fn new(
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

    pub(super) fn usable(&self) -> Result<()> {
        match &self.broken {
            None => Ok(()),
            Some(reason) => Err(Error::AllReduce { reason: reason.clone() }),
        }
    }

    /// Reduces so many values in memory of the device; done when this returns, as `done` tells.
    pub(super) fn all_reduce(
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
    pub(super) fn give_up(&mut self, error: &Error) {
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
pub(super) fn check(call: &'static str, code: c_int) -> Result<()> {
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
