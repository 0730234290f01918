//! The 1x1 ("pointwise") convolution and all that surrounds it in one pass over memory:
//! `dst = act(BN(W · src + b))`, on the CPU (rayon + SIMD) and on NVIDIA GPUs (feature `cuda`).
//!
//! ```
//! use ndarray::{Array2, Array4};
//! use pointwise::{BatchNorm, Device, Pointwise};
//!
//! let (weight, bias) = (Array2::from_elem((16, 8), 0.5), vec![0.1; 16]);
//! let (mean, var) = (vec![0.0; 16], vec![1.0; 16]);
//! let (gamma, beta) = (vec![1.0; 16], vec![0.0; 16]);
//!
//! let layer = Pointwise::new(weight)                                       // [c_out, c_in]
//!     .bias(bias)
//!     .batch_norm(BatchNorm::new(mean, var).affine(gamma, beta).eps(1e-5)) // in the order written
//!     .relu()
//!     .prepare(&Device::best())?;                                          // once
//! let src = Array4::<f32>::ones((1, 8, 14, 14));
//! let dst: Array4<f32> = layer.forward(&src)?;
//! println!("{}", layer.explain(src.shape())?);
//! # assert_eq!(dst.shape(), [1, 16, 14, 14]);
//! # Ok::<(), pointwise::Error>(())
//! ```
//!
//! # Concepts
//!
//! - [`Pointwise`] describes a layer: weight, groups, stride, [`Stage`]s after the convolution and
//!   [`SourceStage`]s before it. Plain data.
//! - [`Pointwise::prepare`] checks it, folds affine stages into the weights, packs them for a
//!   [`Device`] and gives a [`Prepared`] layer, shared by any number of threads.
//! - Tensors are borrowed views with axes `[n, c, …spatial]` and any strides ([`TensorRef`]); ndarray
//!   arrays are taken as they are, channels last through [`nhwc`].
//! - [`Prepared::call`] takes further tensors: sources of a concatenation, a residual, a gate.
//! - [`Branches`] and [`Sequence`] compose prepared layers.
//! - [`train`] has forward and backward passes for training.
//! - [`Quantized`] describes a layer of 8-bit integers, [`quantized::QuantizedFp8`] one of 8-bit floats;
//!   [`quantized`] says what they compute.
//! - [`reference::forward`] says in f64 what all of this means.
//!
//! | feature | |
//! | --- | --- |
//! | `safetensors` (default) | layers from checkpoints with PyTorch's names |
//! | `serde` | descriptions as data |
//! | `cuda` | NVIDIA GPUs; needs nvcc to build, nothing to run |
//! | `nccl` | training on the GPUs of several processes; needs `cuda`, and NCCL 2.14 or later to run |
//! | `tracing` | a span per call of a layer ([`Prepared`], [`PreparedQuantized`](quantized::PreparedQuantized), each of those in [`Branches`] or a [`Sequence`]) and per pass of [training](train), whose `kernel` is `forward` or `backward`; level `DEBUG`, target `pointwise`, with `kernel`, `problem`, `macs` and `bytes` |
//! | `nvtx` | a range per such call for Nsight and other NVTX tools, domain `pointwise`, whose message says the same; needs libclang and a C compiler to build, nothing to run, and without a tool a call asks one pointer |
#![cfg_attr(docsrs, feature(doc_cfg))]

mod alias;
#[cfg(feature = "safetensors")]
pub mod checkpoint;
mod compiled;
mod compose;
mod cost;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod dtype;
mod epilogue;
mod error;
pub mod init;
mod layer;
mod moments;
mod plan;
mod prepared;
mod problem;
pub mod quantized;
pub mod reference;
mod stages;
mod tensor;
mod trace;
pub mod train;
mod tuning;

pub use compose::{Branches, BranchesCall, Sequence};
pub use cost::{Cost, Roof, RoofMeter};
#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub use cuda::{CudaDevice, CudaSliceMut, CudaSliceRef, CudaTensor, DeviceElement};
/// The CUDA bindings whose streams [`CudaDevice`] takes, and whose memory [`CudaSliceRef`] does.
#[cfg(feature = "cuda")]
#[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
pub use cudarc;
pub use device::Device;
pub use dtype::{DType, Element, bf16, f16};
pub use error::{Error, Result};
pub use layer::Pointwise;
pub use plan::{Candidate, Explanation};
pub use prepared::{Call, Layout, Math, PrepareOptions, Prepared};
pub use quantized::{Quantization, Quantized};
#[cfg(feature = "safetensors")]
pub use safetensors;
pub use stages::{Activation, BatchNorm, LayerNorm, NormOver, SourceStage, Stage};
pub use tensor::{AsTensor, AsTensorMut, Place, Source, TensorMut, TensorRef, nhwc, nhwc_mut};
pub use tuning::Tuning;
