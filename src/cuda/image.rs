//! The kernels as nvcc made them, and the loading of their functions.

use std::sync::Arc;

use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, result};
use cudarc::nvrtc::Ptx;

use super::driver;
use super::facts::Facts;
use super::plan::{
    ByteKernel, FP8_KERNELS, Family, Helper, INT8_KERNELS, KERNELS, Kernel, Training,
};

/// The kernels' machine code and PTX, as nvcc made it.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pointwise.fatbin"));
/// The kernels of fp8; empty where the build has none.
static FP8_FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pointwise-fp8.fatbin"));
/// The first compute capability whose tensor cores multiply fp8.
const FP8: (u32, u32) = (8, 9);

/// `CUDA_ERROR_INVALID_IMAGE`.
const INVALID_IMAGE: u32 = 200;

pub(super) fn load(
    context: &Arc<CudaContext>,
    facts: &Facts,
) -> Result<Vec<Option<CudaFunction>>, u32> {
    let code = |error: result::DriverError| error.0 as u32;
    if FATBIN.is_empty() {
        // Built under DOCS_RS, to be read and not to be run.
        return Err(INVALID_IMAGE);
    }
    let module: Arc<CudaModule> =
        context.load_module(Ptx::from_binary(FATBIN.to_vec())).map_err(code)?;
    let mut later = false;
    let function = |kernel: &Kernel| {
        // What is for older chips is of use where there is nothing else; kernels.def lists it last.
        let older = later && kernel.family == Family::PairsSm75;
        if facts.compute_capability < kernel.family.oldest() || older {
            return Ok(None);
        }
        let function = match module.load_function(kernel.name).map_err(code) {
            // Not compiled for this chip, or for older ones only, which every chip since them runs.
            Err(driver::NOT_FOUND) if kernel.family != Family::Simt => return Ok(None),
            function => function?,
        };
        if kernel.brought_bytes() > 0 {
            allow_shared(&function, kernel.brought_bytes()).map_err(code)?;
        }
        later |= kernel.family == Family::Pairs;
        Ok(Some(function))
    };
    let helper = |helper: Helper| {
        let function = module.load_function(helper.name()).map_err(code)?;
        if helper.is_norm() {
            allow_shared(&function, facts.norm_room()).map_err(code)?;
        }
        Ok(Some(function))
    };
    let helpers = Helper::ALL.into_iter().map(helper);
    let training = |kernel: Training| {
        if facts.compute_capability < kernel.oldest() {
            return Ok(None);
        }
        let function = match module.load_function(kernel.name()).map_err(code) {
            // An image for older chips only, which has those of every chip.
            Err(driver::NOT_FOUND) if kernel.oldest() > (0, 0) => return Ok(None),
            function => function?,
        };
        if kernel.shared_bytes() > 0 {
            allow_shared(&function, kernel.shared_bytes()).map_err(code)?;
        }
        Ok(Some(function))
    };
    let helpers = helpers.chain(Training::ALL.into_iter().map(training));
    let int8 = INT8_KERNELS.iter();
    let int8 = int8.map(|kernel| byte_function(&module, kernel).map(Some).map_err(code));
    KERNELS.iter().map(function).chain(helpers).chain(int8).collect()
}

/// # Errors
/// Why the kernels of fp8 are not to be loaded: the chip is too old, or the build has none.
pub(super) fn check_fp8(facts: &Facts) -> Result<(), String> {
    let (major, minor) = facts.compute_capability;
    if facts.compute_capability < FP8 {
        return Err(format!(
            "it has compute capability {major}.{minor}, tensor cores multiply fp8 from {}.{} on",
            FP8.0, FP8.1
        ));
    }
    if FP8_FATBIN.is_empty() {
        return Err(format!(
            "the kernels of this build, by nvcc {} for {}, have none; these take nvcc 12.4 or later \
             and a chip from 8.0 on among POINTWISE_CUDA_ARCHS",
            env!("POINTWISE_BUILT_NVCC"),
            env!("POINTWISE_BUILT_ARCHS"),
        ));
    }
    Ok(())
}

/// The functions of [`FP8_KERNELS`]. The context is bound.
///
/// # Errors
/// Why the driver does not load them.
pub(super) fn load_fp8(
    context: &Arc<CudaContext>,
    facts: &Facts,
) -> Result<Vec<CudaFunction>, String> {
    context
        .load_module(Ptx::from_binary(FP8_FATBIN.to_vec()))
        .and_then(|module| FP8_KERNELS.iter().map(|k| byte_function(&module, k)).collect())
        .map_err(|error| match driver::probe() {
            Ok(driver) => cannot_load(&driver, facts, error.0 as u32),
            Err(reason) => reason.into(),
        })
}

fn byte_function(
    module: &Arc<CudaModule>,
    kernel: &ByteKernel,
) -> Result<CudaFunction, result::DriverError> {
    let function = module.load_function(kernel.name)?;
    allow_shared(&function, kernel.tile.shared_bytes)?;
    Ok(function)
}

/// Lets launches of a function bring so much shared memory.
fn allow_shared(function: &CudaFunction, bytes: u32) -> Result<(), result::DriverError> {
    let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    function.set_attribute(most, bytes as i32)
}

pub(super) fn cannot_load(driver: &driver::Driver, facts: &Facts, code: u32) -> String {
    let (major, minor) = facts.compute_capability;
    format!(
        "{} cannot load the kernels for {} (compute capability {major}.{minor}): {}; they were \
         built by nvcc {} for {}. A newer driver, an older nvcc or other POINTWISE_CUDA_ARCHS help",
        driver.describe(),
        facts.name,
        driver::Code(code),
        env!("POINTWISE_BUILT_NVCC"),
        env!("POINTWISE_BUILT_ARCHS"),
    )
}
