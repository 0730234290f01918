//! The 1x1 ("pointwise") convolution and all that surrounds it in one pass over memory.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "safetensors")]
pub mod checkpoint;
mod compose;
mod cost;
mod cpu;
mod device;
mod epilogue;
mod error;
pub mod init;
mod layer;
mod plan;
mod prepared;
mod problem;
pub mod reference;
mod stages;
mod tensor;

pub use compose::{Branches, BranchesCall, Sequence};
pub use cost::{Cost, Roof};
pub use device::Device;
pub use error::{Error, Result};
pub use layer::Pointwise;
pub use plan::{Candidate, Explanation};
pub use prepared::{Call, Layout, Math, PrepareOptions, Prepared};
#[cfg(feature = "safetensors")]
pub use safetensors;
pub use stages::{Activation, BatchNorm, LayerNorm, NormOver, SourceStage, Stage};
pub use tensor::{AsTensor, AsTensorMut, Place, Source, TensorMut, TensorRef, nhwc, nhwc_mut};
