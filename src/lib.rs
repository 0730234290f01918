//! The 1x1 ("pointwise") convolution and all that surrounds it in one pass over memory.
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "safetensors")]
pub mod checkpoint;
mod epilogue;
mod error;
mod layer;
mod problem;
pub mod reference;
mod stages;
mod tensor;

pub use error::{Error, Result};
pub use layer::Pointwise;
#[cfg(feature = "safetensors")]
pub use safetensors;
pub use stages::{Activation, BatchNorm, LayerNorm, NormOver, SourceStage, Stage};
pub use tensor::{AsTensor, AsTensorMut, Place, Source, TensorMut, TensorRef, nhwc, nhwc_mut};
