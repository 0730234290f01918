//! Training: forward with batch statistics, the gradient of everything, parameters to update. On
//! tensors of f32, f16 or bf16, on the CPU and on CUDA. Parameters, their gradients and statistics are
//! f32 and on the host; tensors of a call on the host or on the device, where a workspace stays.
//!
//! ```
//! use ndarray::{Array3, Array2};
//! use pointwise::train::{Accumulate, Params};
//! use pointwise::{BatchNorm, Device, Pointwise};
//!
//! let norm = BatchNorm::new(vec![0.0; 4], vec![1.0; 4]).affine(vec![1.0; 4], vec![0.0; 4]);
//! let layer = Pointwise::new(Array2::from_elem((4, 3), 0.5)).batch_norm(norm).relu();
//! let mut params = Params::new(&layer, &Device::cpu())?;
//! let mut grads = params.grads();
//!
//! let src = Array3::from_shape_fn((2, 3, 10), |(n, c, p)| (n + c * p) as f32);
//! let (dst, workspace) = params.forward(&src)?;
//! let d_dst = dst.mapv(|y| y - 1.0); // of the loss (y - 1)² / 2
//! let d_src = params.backward(&src, workspace, &d_dst, &mut grads, Accumulate::Set)?;
//! # assert_eq!(d_src.shape(), src.shape());
//!
//! // An optimiser is a loop over the parameters and their gradients.
//! params.update(&grads, |_name, values, grads| {
//!     values.iter_mut().zip(grads).for_each(|(w, d)| *w -= 0.1 * d);
//! })?;
//! let ready = params.prepare()?; // for inference, with the running statistics
//! # let _ = ready.forward(&src)?;
//! # Ok::<(), pointwise::Error>(())
//! ```
//!
//! # What is computed
//!
//! [`reference::backward`](crate::reference::backward) says it in f64. Every stage and source stage
//! has a gradient, in any order, with groups, stride, partial and concatenation; layers that read one
//! source can be trained as [`Branches`], with one gradient by it. Where an activation has a kink, the
//! derivative is PyTorch's ([`reference::slope`](crate::reference::slope)).
//!
//! A batch norm, at the place where it stands, normalises with the mean and the biased variance of
//! the batch, and moves the running statistics as PyTorch does: by `momentum` towards the batch's
//! mean and unbiased variance. With [`Statistics::Frozen`] it uses the running ones and leaves them.
//!
//! # 16 bits
//!
//! All tensors of a pass hold elements of one type, which is that of src. What is computed between
//! them is f32 (but for the operands of products on CUDA, which tensor cores take in that type), and so
//! are parameters, their gradients, running statistics and the workspace; a result is rounded once, to
//! the nearest, and beyond the range of f16 it is infinite. The gradients of a loss
//! that is multiplied by a scale, so that few of them are subnormal in f16, are
//! [finite](Grads::is_finite) or the step is left out, and [scaled back](Grads::scale).
//!
//! ```
//! # use ndarray::{Array2, Array3};
//! # use pointwise::train::{Accumulate, Params};
//! # use pointwise::{Device, Pointwise, f16};
//! # let layer = Pointwise::new(Array2::ones((4, 3))).relu();
//! # let mut params = Params::new(&layer, &Device::cpu())?;
//! # let mut grads = params.grads();
//! let scale = 1024.0;
//! let src = Array3::from_elem((2, 3, 10), f16::from_f32(0.25));
//! let (dst, workspace) = params.forward(&src)?;
//! let d_dst = dst.mapv(|y| f16::from_f32(scale * (y.to_f32() - 1.0)));
//! params.backward(&src, workspace, &d_dst, &mut grads, Accumulate::Set)?;
//! if grads.is_finite() {
//!     grads.scale(1.0 / scale);
//!     params.update(&grads, |_name, values, grads| {
//!         values.iter_mut().zip(grads).for_each(|(w, d)| *w -= 0.1 * d);
//!     })?;
//! }
//! # assert!(params.get("weight").unwrap().iter().all(|&w| w == 1.125));
//! # Ok::<(), pointwise::Error>(())
//! ```
//!
//! # Several workers
//!
//! Workers that each train on their own samples do what one does on all of them together: through
//! [`AllReduce`] batch norms take the statistics of all samples ([`Params::set_all_reduce`]), and
//! gradients are summed ([`all_reduce`], or [`Reducer`], while other backward passes run). [`ThreadWorker`] is a thread of one process; with the feature
//! `nccl`, `NcclWorker` is one of several processes, on one machine or on several, each with a GPU, and
//! `Launch` is what torchrun, mpirun or srun tell it.
//!
//! # Names
//!
//! Parameters are called as in a PyTorch module whose convolution is the module itself and whose
//! other stages are children: `weight`, `bias`; `bn.weight`, `bn.bias`, `bn.running_mean`,
//! `bn.running_var`; `ln.weight`, `ln.bias`; `prelu.weight`; before the convolution `src_bn.…`,
//! `src_affine.weight` and `src_affine.bias`. [`name`] has them as constants.

mod branches;
mod call;
pub(crate) mod chain;
mod grads;
#[cfg(feature = "nccl")]
mod launch;
mod params;
pub(crate) mod reduce;
mod reducer;

use std::ops::Range;

use crate::prepared::Math;

#[cfg(feature = "nccl")]
#[cfg_attr(docsrs, doc(cfg(feature = "nccl")))]
pub use crate::cuda::nccl::{NcclId, NcclWorker};
pub use branches::{Branches, BranchesBackwardCall, BranchesCall};
pub(crate) use call::Outputs;
pub use call::{BackwardCall, Call, Workspace};
pub use grads::Grads;
#[cfg(feature = "nccl")]
#[cfg_attr(docsrs, doc(cfg(feature = "nccl")))]
pub use launch::Launch;
pub use params::Params;
pub use reduce::{AllReduce, BUCKET, ThreadWorker, all_reduce};
pub use reducer::Reducer;

/// The names of parameters and running statistics.
pub mod name {
    /// `[c_out, c_in / groups]`.
    pub const WEIGHT: &str = "weight";
    /// `[c_out]`, of the stage bias.
    pub const BIAS: &str = "bias";
    /// `[c_out]`, of the stage batch norm.
    pub const GAMMA: &str = "bn.weight";
    /// `[c_out]`, of the stage batch norm.
    pub const BETA: &str = "bn.bias";
    /// `[c_out]`, of the stage batch norm; a statistic.
    pub const RUNNING_MEAN: &str = "bn.running_mean";
    /// `[c_out]`, of the stage batch norm; a statistic.
    pub const RUNNING_VAR: &str = "bn.running_var";
    /// `[c_out]`, or one value.
    pub const SLOPE: &str = "prelu.weight";
    /// `[c_out]`, of the stage layer norm.
    pub const LN_GAMMA: &str = "ln.weight";
    /// `[c_out]`, of the stage layer norm.
    pub const LN_BETA: &str = "ln.bias";
    /// `[c_in]`, of the source stage affine.
    pub const SRC_SCALE: &str = "src_affine.weight";
    /// `[c_in]`, of the source stage affine.
    pub const SRC_SHIFT: &str = "src_affine.bias";
    /// `[c_in]`, of the source stage batch norm.
    pub const SRC_GAMMA: &str = "src_bn.weight";
    /// `[c_in]`, of the source stage batch norm.
    pub const SRC_BETA: &str = "src_bn.bias";
    /// `[c_in]`, of the source stage batch norm; a statistic.
    pub const SRC_RUNNING_MEAN: &str = "src_bn.running_mean";
    /// `[c_in]`, of the source stage batch norm; a statistic.
    pub const SRC_RUNNING_VAR: &str = "src_bn.running_var";
}

/// What a batch norm normalises with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Statistics {
    /// Those of the batch; the running statistics follow.
    #[default]
    Batch,
    /// The running ones, which stay as they are.
    Frozen,
}

/// What happens to what a gradient holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accumulate {
    /// It is replaced.
    #[default]
    Set,
    /// The new gradient is added to it.
    Add,
}

/// How a layer is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// What batch norms normalise with.
    pub statistics: Statistics,
    /// The share of a batch in the running statistics, 0 to 1; `None` gives every batch so far the
    /// same share. 0.1 by default.
    pub momentum: Option<f64>,
    /// [`name`]s of parameters whose gradients are not wanted: not computed, left as they are, and
    /// not visited by [`Params::update`].
    pub frozen: Vec<String>,
    /// Rows of the weight (output channels) that keep their values: their gradients are zero, and
    /// [`Params::update`] does not change them.
    pub frozen_rows: Vec<Range<usize>>,
    /// What the products of the convolution and of its gradients by src and by the weight may round.
    /// No effect on the CPU, nor on tensors of 16 bits on CUDA, whose products are of that type.
    pub math: Math,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            statistics: Statistics::Batch,
            momentum: Some(0.1),
            frozen: Vec::new(),
            frozen_rows: Vec::new(),
            math: Math::default(),
        }
    }
}
