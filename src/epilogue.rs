//! What a list of stages lowers to: a folded affine, then a few elementwise steps on the
//! accumulators.

use crate::stages::Activation;

/// One elementwise operation on the accumulators, in the order in which they run.
///
/// Per-channel parameters are indexed by the *row* of the convolution (its output channel
/// before any channel shuffle).
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// `x * scale[row] + shift[row]`.
    Affine { scale: Vec<f32>, shift: Vec<f32> },
    /// A function of the value alone.
    Activation(Activation),
    /// `x` where `x >= 0`, else `slope[row] * x`.
    PRelu { slope: Vec<f32> },
    /// Adds the residual tensor at this position.
    Residual,
}
