//! What the user writes around the convolution: activations, batch norm, layer norm.

/// An elementwise activation function.
///
/// NaN in gives NaN out through every one of them; ±Inf follows PyTorch's formula.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, 0), 6)`.
    Relu6,
    /// `min(max(x, lo), hi)`, PyTorch's `hardtanh` and `clamp`.
    Clip {
        /// Lower bound; `-inf` for none.
        lo: f32,
        /// Upper bound, at least `lo`; `inf` for none.
        hi: f32,
    },
    /// `x` where `x >= 0`, else `alpha * x`.
    LeakyRelu {
        /// Slope of the negative side.
        alpha: f32,
    },
    /// `x` where `x > 0`, else `alpha * (exp(x) - 1)`.
    Elu {
        /// Scale of the negative side.
        alpha: f32,
    },
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
    /// `tanh(x)`.
    Tanh,
    /// `x * sigmoid(x)`, also known as swish.
    Silu,
    /// `x * Φ(x) = x/2 * (1 + erf(x/√2))`.
    Gelu,
    /// `x/2 * (1 + tanh(√(2/π) * (x + 0.044715 x³)))`.
    GeluTanh,
    /// `min(max(x + 3, 0), 6) / 6`.
    HardSigmoid,
    /// `x * min(max(x + 3, 0), 6) / 6`.
    HardSwish,
    /// `ln(1 + exp(x))`, and `x` itself where `x > 20`, as PyTorch.
    Softplus,
    /// `x * tanh(softplus(x))`.
    Mish,
}
