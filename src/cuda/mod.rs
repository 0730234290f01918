//! The CUDA backend, a mirror of the CPU's: `driver` asks what is there, `device` holds context,
//! kernels and stream, `facts` is what the planner knows of a device, `image` has the kernels as nvcc made
//! them, `memory` is the device's, `plan` chooses a kernel, `pack` lays a layer out and uploads it, `layer`
//! runs its calls, `call` describes each to the kernels, `launch` is the one place where a kernel starts,
//! `scratch` what a stream's launches may use in between, `tensor` owns device memory, `slice` borrows
//! cudarc's, `staging` brings host tensors there and back, `chain` runs layers one after another, `train`
//! has the passes of training, `nccl` sums over processes, `bytes` runs layers of 8-bit integers and of
//! fp8, `tune` measures what `plan` only estimates.

pub(crate) mod bytes;
mod call;
pub(crate) mod chain;
mod device;
mod driver;
mod facts;
mod image;
mod launch;
mod layer;
mod memory;
#[cfg(feature = "nccl")]
pub(crate) mod nccl;
mod pack;
mod plan;
mod scratch;
mod slice;
mod staging;
mod tensor;
pub(crate) mod train;
mod tune;

/// What crosses to the kernels, as bindgen makes it of `kernels/params.h`.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    dead_code,
    clippy::undocumented_unsafe_blocks
)]
mod params {
    include!(concat!(env!("OUT_DIR"), "/params.rs"));
}

pub use device::CudaDevice;
pub(crate) use layer::Layer;
pub use slice::{CudaSliceMut, CudaSliceRef};
pub use tensor::{CudaTensor, DeviceElement};
pub(crate) use tune::{Room, tune};

#[cfg(test)]
mod tests {
    #[test]
    fn the_checked_in_parameters_are_those_that_bindgen_makes() {
        // Equal by construction where libclang is missing; formatting may differ with rustfmt.
        let squeeze = |text: &str| text.replace(|c: char| c.is_whitespace() || c == ',', "");
        let made = include_str!(concat!(env!("OUT_DIR"), "/params.rs"));
        assert!(
            squeeze(made) == squeeze(include_str!("params_generated.rs")),
            "copy {}/params.rs to src/cuda/params_generated.rs",
            env!("OUT_DIR")
        );
    }
}
