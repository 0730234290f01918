//! The description of a layer: plain data, no device in it.

use std::ops::Range;

use ndarray::{Array1, Array2};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::stages::{Activation, BatchNorm, LayerNorm, SourceStage, Stage};
use crate::tensor::checked_product;

/// A pointwise convolution with all that surrounds it: `dst = stages(W · source_stages(src))`.
///
/// Stages apply in the order in which they are written. The description checks nothing by itself:
/// [`prepare`](Self::prepare) does, once, and reports the first thing that does not fit.
///
/// ```
/// use ndarray::{Array4, array};
/// use pointwise::{BatchNorm, Device, Pointwise};
///
/// let layer = Pointwise::new(array![[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]]) // [c_out, c_in]
///     .bias(vec![0.0, 1.0])
///     .batch_norm(BatchNorm::new(vec![0.0, 0.0], vec![1.0, 1.0]))
///     .relu()
///     .prepare(&Device::cpu())?;
/// let dst = layer.forward(&Array4::ones((1, 3, 8, 8)))?;
/// assert_eq!(dst.shape(), [1, 2, 8, 8]);
/// # Ok::<(), pointwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Pointwise {
    pub(crate) weight: Array2<f32>,
    pub(crate) groups: usize,
    pub(crate) stride: usize,
    pub(crate) source_stages: Vec<SourceStage>,
    pub(crate) stages: Vec<Stage>,
    pub(crate) partial: Option<Range<usize>>,
}

impl Pointwise {
    /// A bare convolution with `weight [c_out, c_in / groups]`.
    pub fn new(weight: impl Into<Array2<f32>>) -> Self {
        Pointwise {
            weight: weight.into(),
            groups: 1,
            stride: 1,
            source_stages: Vec::new(),
            stages: Vec::new(),
            partial: None,
        }
    }

    /// Splits input and output channels into `groups` equal parts; part `g` of the output sees
    /// part `g` of the input only.
    pub fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// Keeps every `stride`-th position of each spatial axis: `spatial' = ceil(spatial / stride)`.
    pub fn stride(mut self, stride: usize) -> Self {
        self.stride = stride;
        self
    }

    /// Convolves only `channels` of src:
    /// `dst = [src[..a], stages(conv(src[a..b])), src[b..]]` along the channel axis.
    ///
    /// The weight's input channels are the range's. What passes through is subsampled by the
    /// stride and otherwise untouched. A residual has the shape of the whole dst; its channels
    /// beside the convolved ones are not read.
    pub fn partial(mut self, channels: Range<usize>) -> Self {
        self.partial = Some(channels);
        self
    }

    /// Appends a stage.
    pub fn stage(mut self, stage: Stage) -> Self {
        self.stages.push(stage);
        self
    }

    /// Adds `bias [c_out]`.
    pub fn bias(self, bias: impl Into<Array1<f32>>) -> Self {
        self.stage(Stage::Bias(bias.into()))
    }

    /// Batch norm over `c_out` channels with running statistics.
    pub fn batch_norm(self, norm: BatchNorm) -> Self {
        self.stage(Stage::BatchNorm(norm))
    }

    /// An activation given as a value.
    pub fn activation(self, activation: Activation) -> Self {
        self.stage(Stage::Activation(activation))
    }

    /// `max(x, 0)`.
    pub fn relu(self) -> Self {
        self.activation(Activation::Relu)
    }

    /// `min(max(x, 0), 6)`.
    pub fn relu6(self) -> Self {
        self.activation(Activation::Relu6)
    }

    /// `min(max(x, lo), hi)`.
    pub fn clip(self, lo: f32, hi: f32) -> Self {
        self.activation(Activation::Clip { lo, hi })
    }

    /// `x` where `x >= 0`, else `alpha * x`.
    pub fn leaky_relu(self, alpha: f32) -> Self {
        self.activation(Activation::LeakyRelu { alpha })
    }

    /// As [`leaky_relu`](Self::leaky_relu), with `slope [c_out]` (or one value for all channels).
    pub fn prelu(self, slope: impl Into<Array1<f32>>) -> Self {
        self.stage(Stage::PRelu(slope.into()))
    }

    /// `x` where `x > 0`, else `alpha * (exp(x) - 1)`.
    pub fn elu(self, alpha: f32) -> Self {
        self.activation(Activation::Elu { alpha })
    }

    /// `1 / (1 + exp(-x))`.
    pub fn sigmoid(self) -> Self {
        self.activation(Activation::Sigmoid)
    }

    /// `tanh(x)`.
    pub fn tanh(self) -> Self {
        self.activation(Activation::Tanh)
    }

    /// `x * sigmoid(x)`.
    pub fn silu(self) -> Self {
        self.activation(Activation::Silu)
    }

    /// GELU in its exact (erf) form.
    pub fn gelu(self) -> Self {
        self.activation(Activation::Gelu)
    }

    /// GELU in its tanh form.
    pub fn gelu_tanh(self) -> Self {
        self.activation(Activation::GeluTanh)
    }

    /// `min(max(x + 3, 0), 6) / 6`.
    pub fn hard_sigmoid(self) -> Self {
        self.activation(Activation::HardSigmoid)
    }

    /// `x * hard_sigmoid(x)`.
    pub fn hard_swish(self) -> Self {
        self.activation(Activation::HardSwish)
    }

    /// `ln(1 + exp(x))`.
    pub fn softplus(self) -> Self {
        self.activation(Activation::Softplus)
    }

    /// `x * tanh(softplus(x))`.
    pub fn mish(self) -> Self {
        self.activation(Activation::Mish)
    }

    /// Adds the call's residual tensor, which has dst's shape.
    pub fn residual(self) -> Self {
        self.stage(Stage::Residual)
    }

    /// Layer norm over the `c_out` channels, or over channels and positions; once per layer.
    pub fn layer_norm(self, norm: LayerNorm) -> Self {
        self.stage(Stage::LayerNorm(norm))
    }

    /// Deals output channels out between groups, as ShuffleNet: PyTorch's `ChannelShuffle`.
    pub fn channel_shuffle(self, groups: usize) -> Self {
        self.stage(Stage::ChannelShuffle { groups })
    }

    /// Appends a source stage.
    pub fn source_stage(mut self, stage: SourceStage) -> Self {
        self.source_stages.push(stage);
        self
    }

    /// Applies `x * scale + shift` (both `[c_in]`) to src while it is read.
    pub fn source_affine(
        self,
        scale: impl Into<Array1<f32>>,
        shift: impl Into<Array1<f32>>,
    ) -> Self {
        self.source_stage(SourceStage::Affine { scale: scale.into(), shift: shift.into() })
    }

    /// Applies batch norm (over `c_in` channels) to src while it is read.
    pub fn source_batch_norm(self, norm: BatchNorm) -> Self {
        self.source_stage(SourceStage::BatchNorm(norm))
    }

    /// Applies an activation to src while it is read.
    pub fn source_activation(self, activation: Activation) -> Self {
        self.source_stage(SourceStage::Activation(activation))
    }

    /// Multiplies src by the call's gate `[n, c_in]` while it is read.
    pub fn gate(self) -> Self {
        self.source_stage(SourceStage::Gate)
    }

    /// Output channels of the convolution, without what a partial convolution passes through.
    pub fn c_out(&self) -> usize {
        self.weight.nrows()
    }

    /// Input channels of the convolution, over all groups.
    pub fn c_in(&self) -> usize {
        self.weight.ncols().saturating_mul(self.groups)
    }

    /// `weight [c_out, c_in / groups]`.
    pub fn weight(&self) -> &Array2<f32> {
        &self.weight
    }

    /// The stages after the convolution, in order.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The stages before the convolution, in order.
    pub fn source_stages(&self) -> &[SourceStage] {
        &self.source_stages
    }

    /// Whether a call must bring a residual tensor.
    pub(crate) fn has_residual(&self) -> bool {
        self.stages.iter().any(|stage| matches!(stage, Stage::Residual))
    }

    /// Whether a call must bring a gate tensor.
    pub(crate) fn has_gate(&self) -> bool {
        self.source_stages.iter().any(|stage| matches!(stage, SourceStage::Gate))
    }

    /// Whether a type has a finite value for every finite weight.
    pub(crate) fn check_weight(&self, dtype: DType) -> Result<()> {
        let lost = |w: f32| w.is_finite() && !dtype.round(w).is_finite();
        match self.weight.indexed_iter().find(|&(_, &w)| lost(w)) {
            Some(((row, column), w)) => Err(Error::ParameterValue {
                parameter: format!("weight [{row}, {column}]"),
                value: w.to_string(),
                expected: "a value that does not overflow the layer's dtype",
            }),
            None => Ok(()),
        }
    }

    /// Everything that can be checked without a source.
    ///
    /// # Errors
    /// The first thing in the description that does not fit, with its values.
    pub fn check(&self) -> Result<()> {
        let (c_out, c_in_per_group) = self.weight.dim();
        if c_out == 0 || c_in_per_group == 0 {
            return Err(Error::NoChannels {
                tensor: "weight",
                shape: self.weight.shape().to_vec(),
            });
        }
        if self.groups == 0 || c_out % self.groups != 0 {
            return Err(Error::Groups {
                groups: self.groups,
                channels: c_out,
                what: "output channels",
            });
        }
        let c_in = checked_product("the number of input channels", &[c_in_per_group, self.groups])?;
        if self.stride == 0 {
            return Err(Error::ParameterValue {
                parameter: "stride".into(),
                value: "0".into(),
                expected: "at least 1",
            });
        }
        if let Some(range) = &self.partial
            && range.end.checked_sub(range.start) != Some(c_in)
        {
            return Err(Error::PartialRange {
                start: range.start,
                end: range.end,
                reason: format!("the weight has {c_in} input channels"),
            });
        }
        for stage in &self.source_stages {
            stage.check(c_in)?;
        }
        for stage in &self.stages {
            stage.check(c_out)?;
        }
        // Parameters are addressed by their stage's name (checkpoints, training), so a stage that
        // has some stands once.
        fn repeated<'a>(
            mut names: impl Iterator<Item = &'a &'static str> + Clone,
        ) -> Option<&'static str> {
            while let Some(name) = names.next() {
                if names.clone().any(|other| other == name) {
                    return Some(name);
                }
            }
            None
        }
        let after: Vec<_> = self
            .stages
            .iter()
            .filter(|stage| !matches!(stage, Stage::Activation(_)))
            .map(Stage::name)
            .collect();
        let before: Vec<_> = self
            .source_stages
            .iter()
            .filter(|stage| !matches!(stage, SourceStage::Activation(_)))
            .map(SourceStage::name)
            .collect();
        match repeated(after.iter()).or(repeated(before.iter())) {
            Some(stage) => Err(Error::RepeatedStage { stage }),
            None => Ok(()),
        }
    }
}
