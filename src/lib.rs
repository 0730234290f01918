//! The 1x1 ("pointwise") convolution and all that surrounds it in one pass over memory.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod cpu;
mod epilogue;
mod stages;

pub use stages::Activation;
