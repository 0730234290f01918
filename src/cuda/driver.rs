//! The CUDA driver: whether there is one, and what its codes mean.
//!
//! cudarc opens the driver's library at the first call and panics if it cannot, and again if one
//! of its errors is printed without a driver. So nothing of cudarc is called before [`probe`] has
//! opened the same library and found it fit, and its errors are turned into ours by code.

use std::ffi::c_int;
use std::sync::OnceLock;

use cudarc::driver::result::DriverError;

use crate::error::Error;

/// A driver that started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver {
    /// As `13000` for 13.0; `None` if it would not say.
    version: Option<c_int>,
    pub devices: usize,
}

/// cudarc's own order, so that the probe's verdict is about the library that cudarc will use.
const LIBRARIES: &[&str] = if cfg!(windows) {
    &["cuda.dll", "nvcuda.dll"]
} else {
    &["libcuda.so", "libcuda.so.13", "libcuda.so.12", "libcuda.so.11", "libcuda.so.1"]
};

/// What this crate calls, by cudarc or itself. A function that a driver lacks would be a panic.
const FUNCTIONS: &[&str] = &[
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetMemPool",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAllocAsync",
    "cuMemAlloc_v2",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemPoolSetAttribute",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamGetCtx",
    "cuStreamIsCapturing",
    "cuStreamQuery",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// The driver, or why there is none that can be used. Asked once per process.
pub(crate) fn probe() -> Result<Driver, &'static str> {
    static PROBE: OnceLock<Result<Driver, String>> = OnceLock::new();
    PROBE.get_or_init(start).as_ref().map(|driver| *driver).map_err(String::as_str)
}

fn start() -> Result<Driver, String> {
    let mut refusal = String::new();
    let opened = LIBRARIES.iter().find_map(|&name| {
        // SAFETY: the driver's library runs its initialisers, as for every CUDA program.
        match unsafe { libloading::Library::new(name) } {
            Ok(library) => Some((name, library)),
            Err(error) => {
                // The loader's own words, such as which library is missing.
                let cause = std::error::Error::source(&error);
                refusal = cause.map_or_else(|| error.to_string(), |cause| cause.to_string());
                None
            }
        }
    });
    let Some((name, library)) = opened else {
        return Err(format!("no CUDA driver: {refusal}"));
    };
    // Resident for good: cudarc's handle and ours must stay the same library.
    let library: &'static libloading::Library = Box::leak(Box::new(library));
    if let Some(missing) = FUNCTIONS.iter().find(|function| {
        // SAFETY: only the symbol's presence is asked for.
        unsafe { library.get::<unsafe extern "C" fn()>(function.as_bytes()) }.is_err()
    }) {
        return Err(format!(
            "{name} lacks {missing}: the driver is older than this build needs (CUDA 11.4), or \
             no driver at all"
        ));
    }
    // SAFETY: cuInit has this signature; any code may come back, so it is read as an integer.
    let code = unsafe {
        let init = library.get::<unsafe extern "C" fn(u32) -> c_int>(b"cuInit");
        init.map_or(-1, |init| init(0))
    };
    if code != 0 {
        let advice = match code {
            34 => {
                ": this is the toolkit's stub for linking, not a driver; take its folder off the \
                 library path"
            }
            _ => "",
        };
        return Err(format!("cuInit of {name} failed: {}{advice}", Code(code as u32)));
    }
    let mut version = 0;
    // SAFETY: cuDriverGetVersion has this signature and writes one integer.
    let asked = unsafe {
        library
            .get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion")
            .is_ok_and(|ask| ask(&mut version) == 0)
    };
    let mut devices = 0;
    // SAFETY: cuDeviceGetCount has this signature and writes one integer.
    let code = unsafe {
        library
            .get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDeviceGetCount")
            .map_or(-1, |count| count(&mut devices))
    };
    if code != 0 {
        return Err(format!("cuDeviceGetCount of {name} failed: {}", Code(code as u32)));
    }
    let devices = usize::try_from(devices).unwrap_or(0);
    Ok(Driver { version: asked.then_some(version), devices })
}

impl Driver {
    /// As `the driver (CUDA 13.0)`.
    pub(crate) fn describe(&self) -> String {
        match self.version {
            Some(v) => format!("the driver (CUDA {}.{})", v / 1000, v % 1000 / 10),
            None => "the driver (version unknown)".into(),
        }
    }
}

/// Turns a failed driver call into [`Error::Cuda`].
pub(crate) fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Cuda { call, code: error.0 as u32, name: name(error.0 as u32) }
}

/// Whether a code means that the context, and all that is in it, has failed for good.
pub(crate) fn is_final(code: u32) -> bool {
    matches!(code, 4 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721)
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(crate) const OUT_OF_MEMORY: u32 = 2;

/// A code with its name.
pub(crate) struct Code(pub u32);

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", name(self.0), self.0)
    }
}

/// What a module says of a function that it has not.
pub(super) const NOT_FOUND: u32 = 500;

/// The driver's name for a code; it is not asked, because the answer must not depend on it.
pub(crate) fn name(code: u32) -> &'static str {
    match code {
        1 => "CUDA_ERROR_INVALID_VALUE",
        2 => "CUDA_ERROR_OUT_OF_MEMORY",
        3 => "CUDA_ERROR_NOT_INITIALIZED",
        4 => "CUDA_ERROR_DEINITIALIZED",
        34 => "CUDA_ERROR_STUB_LIBRARY",
        46 => "CUDA_ERROR_DEVICE_UNAVAILABLE",
        100 => "CUDA_ERROR_NO_DEVICE",
        101 => "CUDA_ERROR_INVALID_DEVICE",
        102 => "CUDA_ERROR_DEVICE_NOT_LICENSED",
        200 => "CUDA_ERROR_INVALID_IMAGE",
        201 => "CUDA_ERROR_INVALID_CONTEXT",
        209 => "CUDA_ERROR_NO_BINARY_FOR_GPU",
        214 => "CUDA_ERROR_ECC_UNCORRECTABLE",
        218 => "CUDA_ERROR_INVALID_PTX",
        220 => "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        221 => "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
        222 => "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        223 => "CUDA_ERROR_JIT_COMPILATION_DISABLED",
        226 => "CUDA_ERROR_CONTAINED",
        300 => "CUDA_ERROR_INVALID_SOURCE",
        303 => "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED",
        304 => "CUDA_ERROR_OPERATING_SYSTEM",
        400 => "CUDA_ERROR_INVALID_HANDLE",
        401 => "CUDA_ERROR_ILLEGAL_STATE",
        NOT_FOUND => "CUDA_ERROR_NOT_FOUND",
        600 => "CUDA_ERROR_NOT_READY",
        700 => "CUDA_ERROR_ILLEGAL_ADDRESS",
        701 => "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        702 => "CUDA_ERROR_LAUNCH_TIMEOUT",
        709 => "CUDA_ERROR_CONTEXT_IS_DESTROYED",
        710 => "CUDA_ERROR_ASSERT",
        714 => "CUDA_ERROR_HARDWARE_STACK_ERROR",
        715 => "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        716 => "CUDA_ERROR_MISALIGNED_ADDRESS",
        717 => "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        718 => "CUDA_ERROR_INVALID_PC",
        719 => "CUDA_ERROR_LAUNCH_FAILED",
        721 => "CUDA_ERROR_TENSOR_MEMORY_LEAK",
        800 => "CUDA_ERROR_NOT_PERMITTED",
        801 => "CUDA_ERROR_NOT_SUPPORTED",
        802 => "CUDA_ERROR_SYSTEM_NOT_READY",
        803 => "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        804 => "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
        900 => "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        901 => "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        905 => "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
        906 => "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
        999 => "CUDA_ERROR_UNKNOWN",
        _ => "an error without a name here",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_so_without_a_panic() {
        // Whatever this machine has: an answer, the same one each time, and no panic.
        let first = probe();
        assert_eq!(first.is_ok(), probe().is_ok());
        if let Err(reason) = first {
            assert!(!reason.is_empty());
        }
    }

    #[test]
    fn errors_print_without_a_driver() {
        let error = DriverError(cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        let error = failed("cuMemAllocAsync")(error);
        assert_eq!(error.to_string(), "cuMemAllocAsync failed: CUDA_ERROR_OUT_OF_MEMORY (2)");
    }
}
