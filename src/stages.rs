//! What the user writes around the convolution, in the order in which it applies.

use ndarray::Array1;

use crate::error::{Error, Result};

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
        #[cfg_attr(feature = "serde", serde(with = "bounds::lower"))]
        lo: f32,
        /// Upper bound, at least `lo`; `inf` for none.
        #[cfg_attr(feature = "serde", serde(with = "bounds::upper"))]
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

/// Bounds as data: one that bounds nothing is left out, since JSON has no word for it.
#[cfg(feature = "serde")]
mod bounds {
    macro_rules! bound {
        ($name:ident, $none:expr) => {
            pub(super) mod $name {
                use serde::{Deserialize, Deserializer, Serialize, Serializer};

                pub fn serialize<S: Serializer>(
                    bound: &f32,
                    serializer: S,
                ) -> Result<S::Ok, S::Error> {
                    (*bound != $none).then_some(*bound).serialize(serializer)
                }

                pub fn deserialize<'de, D: Deserializer<'de>>(
                    deserializer: D,
                ) -> Result<f32, D::Error> {
                    Ok(Option::deserialize(deserializer)?.unwrap_or($none))
                }
            }
        };
    }
    bound!(lower, f32::NEG_INFINITY);
    bound!(upper, f32::INFINITY);
}

impl Activation {
    /// The name in snake case, as `examples/apply` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Relu => "relu",
            Activation::Relu6 => "relu6",
            Activation::Clip { .. } => "clip",
            Activation::LeakyRelu { .. } => "leaky_relu",
            Activation::Elu { .. } => "elu",
            Activation::Sigmoid => "sigmoid",
            Activation::Tanh => "tanh",
            Activation::Silu => "silu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::HardSigmoid => "hard_sigmoid",
            Activation::HardSwish => "hard_swish",
            Activation::Softplus => "softplus",
            Activation::Mish => "mish",
        }
    }

    pub(crate) fn check(self) -> Result<()> {
        let finite = |parameter: &str, alpha: f32| {
            if alpha.is_finite() { Ok(()) } else { Err(value(parameter, alpha, "a finite number")) }
        };
        match self {
            Activation::Clip { lo, hi } if lo.is_nan() || hi.is_nan() || lo > hi => {
                Err(Error::ParameterValue {
                    parameter: "clip".into(),
                    value: format!("lo {lo}, hi {hi}"),
                    expected: "lo <= hi",
                })
            }
            Activation::LeakyRelu { alpha } => finite("leaky_relu's alpha", alpha),
            Activation::Elu { alpha } => finite("elu's alpha", alpha),
            _ => Ok(()),
        }
    }
}

/// Batch norm at inference: `gamma * (x - mean) / sqrt(var + eps) + beta` per channel, with
/// running statistics. <https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html>
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct BatchNorm {
    pub(crate) running_mean: Array1<f32>,
    pub(crate) running_var: Array1<f32>,
    pub(crate) affine: Option<(Array1<f32>, Array1<f32>)>,
    pub(crate) eps: f32,
}

impl BatchNorm {
    /// Running statistics, one value per channel; no affine, `eps` 1e-5.
    pub fn new(running_mean: impl Into<Array1<f32>>, running_var: impl Into<Array1<f32>>) -> Self {
        BatchNorm {
            running_mean: running_mean.into(),
            running_var: running_var.into(),
            affine: None,
            eps: 1e-5,
        }
    }

    /// Scale and shift after the normalisation, one value per channel.
    pub fn affine(mut self, gamma: impl Into<Array1<f32>>, beta: impl Into<Array1<f32>>) -> Self {
        self.affine = Some((gamma.into(), beta.into()));
        self
    }

    /// What is added to the variance; finite and positive.
    pub fn eps(mut self, eps: f32) -> Self {
        self.eps = eps;
        self
    }

    pub(crate) fn check(&self, channels: usize) -> Result<()> {
        length("running_mean", &self.running_mean, channels)?;
        length("running_var", &self.running_var, channels)?;
        if let Some((gamma, beta)) = &self.affine {
            length("gamma", gamma, channels)?;
            length("beta", beta, channels)?;
        }
        check_eps("batch_norm's eps", self.eps)?;
        match self.running_var.iter().position(|v| v.is_nan() || *v < 0.0) {
            Some(c) => Err(Error::ParameterValue {
                parameter: format!("running_var of channel {c}"),
                value: self.running_var[c].to_string(),
                expected: "a variance, at least 0",
            }),
            None => Ok(()),
        }
    }

    /// The affine `(scale, shift)` of one channel, in f64.
    pub(crate) fn fold(&self, channel: usize) -> (f64, f64) {
        let (gamma, beta) = match &self.affine {
            Some((gamma, beta)) => (f64::from(gamma[channel]), f64::from(beta[channel])),
            None => (1.0, 0.0),
        };
        let scale = gamma / (f64::from(self.running_var[channel]) + f64::from(self.eps)).sqrt();
        (scale, beta - f64::from(self.running_mean[channel]) * scale)
    }
}

/// Which values share a mean and a variance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum NormOver {
    /// All channels of one position of one sample (ConvNeXt, transformers).
    Channels,
    /// All channels and positions of one sample (PyTorch's `GroupNorm(1, c)`).
    All,
}

/// Layer norm: `gamma * (x - mean) / sqrt(var + eps) + beta`, with statistics (biased variance)
/// computed from the values at hand; the affine is per channel.
/// <https://pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html>
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LayerNorm {
    pub(crate) over: NormOver,
    pub(crate) affine: Option<(Array1<f32>, Array1<f32>)>,
    pub(crate) eps: f32,
}

impl LayerNorm {
    /// Over the channels of each position; no affine, `eps` 1e-5.
    pub fn over_channels() -> Self {
        LayerNorm { over: NormOver::Channels, affine: None, eps: 1e-5 }
    }

    /// Over all channels and positions of each sample; no affine, `eps` 1e-5.
    pub fn over_all() -> Self {
        LayerNorm { over: NormOver::All, affine: None, eps: 1e-5 }
    }

    /// Scale and shift after the normalisation, one value per channel.
    pub fn affine(mut self, gamma: impl Into<Array1<f32>>, beta: impl Into<Array1<f32>>) -> Self {
        self.affine = Some((gamma.into(), beta.into()));
        self
    }

    /// What is added to the variance; finite and positive.
    pub fn eps(mut self, eps: f32) -> Self {
        self.eps = eps;
        self
    }

    pub(crate) fn check(&self, channels: usize) -> Result<()> {
        if let Some((gamma, beta)) = &self.affine {
            length("layer_norm's gamma", gamma, channels)?;
            length("layer_norm's beta", beta, channels)?;
        }
        check_eps("layer_norm's eps", self.eps)
    }
}

/// One stage after the convolution.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Stage {
    /// Adds one value per channel.
    Bias(Array1<f32>),
    /// Normalises with running statistics.
    BatchNorm(BatchNorm),
    /// An elementwise function.
    Activation(Activation),
    /// `x` where `x >= 0`, else `slope * x`; one slope per channel, or one for all.
    PRelu(Array1<f32>),
    /// Adds the call's residual tensor, which has dst's shape.
    Residual,
    /// Normalises with statistics of the values themselves.
    LayerNorm(LayerNorm),
    /// Channel `g * (c / groups) + k` becomes channel `k * groups + g`: PyTorch's
    /// `ChannelShuffle`.
    ChannelShuffle {
        /// The groups between which channels are dealt out.
        groups: usize,
    },
}

impl Stage {
    /// The name in snake case.
    pub fn name(&self) -> &'static str {
        match self {
            Stage::Bias(_) => "bias",
            Stage::BatchNorm(_) => "batch_norm",
            Stage::Activation(activation) => activation.name(),
            Stage::PRelu(_) => "prelu",
            Stage::Residual => "residual",
            Stage::LayerNorm(_) => "layer_norm",
            Stage::ChannelShuffle { .. } => "channel_shuffle",
        }
    }

    pub(crate) fn check(&self, channels: usize) -> Result<()> {
        match self {
            Stage::Bias(bias) => length("bias", bias, channels),
            Stage::BatchNorm(norm) => norm.check(channels),
            Stage::Activation(activation) => activation.check(),
            Stage::PRelu(slope) if slope.len() == 1 => Ok(()),
            Stage::PRelu(slope) => length("prelu's slope", slope, channels),
            Stage::Residual => Ok(()),
            Stage::LayerNorm(norm) => norm.check(channels),
            Stage::ChannelShuffle { groups } => {
                if *groups == 0 || !channels.is_multiple_of(*groups) {
                    return Err(Error::Groups {
                        groups: *groups,
                        channels,
                        what: "output channels of a channel shuffle",
                    });
                }
                Ok(())
            }
        }
    }
}

/// One stage that is applied to src while it is read.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum SourceStage {
    /// `x * scale + shift`, one value of each per input channel.
    Affine {
        /// Factor per input channel.
        scale: Array1<f32>,
        /// Summand per input channel.
        shift: Array1<f32>,
    },
    /// Batch norm with running statistics over the input channels.
    BatchNorm(BatchNorm),
    /// An elementwise function.
    Activation(Activation),
    /// Multiplies by the call's gate tensor, `[n, c_in]` (squeeze and excitation).
    Gate,
}

impl SourceStage {
    /// The name in snake case.
    pub fn name(&self) -> &'static str {
        match self {
            SourceStage::Affine { .. } => "affine",
            SourceStage::BatchNorm(_) => "batch_norm",
            SourceStage::Activation(activation) => activation.name(),
            SourceStage::Gate => "gate",
        }
    }

    pub(crate) fn check(&self, channels: usize) -> Result<()> {
        match self {
            SourceStage::Affine { scale, shift } => {
                length("src_scale", scale, channels)?;
                length("src_shift", shift, channels)
            }
            SourceStage::BatchNorm(norm) => norm.check(channels),
            SourceStage::Activation(activation) => activation.check(),
            SourceStage::Gate => Ok(()),
        }
    }
}

fn value(parameter: &str, value: f32, expected: &'static str) -> Error {
    Error::ParameterValue { parameter: parameter.into(), value: value.to_string(), expected }
}

fn check_eps(parameter: &str, eps: f32) -> Result<()> {
    if eps.is_finite() && eps > 0.0 {
        Ok(())
    } else {
        Err(value(parameter, eps, "finite and positive"))
    }
}

fn length(parameter: &'static str, values: &Array1<f32>, expected: usize) -> Result<()> {
    if values.len() == expected {
        Ok(())
    } else {
        Err(Error::ParameterLength { parameter, expected, got: values.len() })
    }
}
