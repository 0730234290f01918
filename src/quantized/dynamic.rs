//! Layers whose sources are quantised in each call.

use ndarray::{Array1, Array2};

use super::calibrate::{Int8Weight, Step};
use super::{UNBOUNDED, check_layer, check_sums, cut, finite, shape};
use crate::cpu::int8::{Clip, Lowered, Scaling};
use crate::error::Result;
use crate::layer::Pointwise;
use crate::problem::LayerShape;

/// Which values share a quantisation that each call finds for itself: that of the least range which
/// holds them and zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Per {
    /// The whole source, as in ONNX's `DynamicQuantizeLinear`. A sample's result depends on the
    /// others in its batch.
    Tensor,
    /// Each sample.
    Sample,
    /// The channels at each position of each sample: each row of a matrix product.
    #[default]
    Position,
}

/// A layer with 8-bit weights whose source is f32 and quantised while it is read, as ONNX's
/// `DynamicQuantizeLinear` in front of a `ConvInteger` or `MatMulInteger`, and PyTorch's dynamic
/// quantisation. Plain data.
///
/// The values that share a quantisation ([`Per`]) and zero span a range from `min` to `max`, of all input
/// channels, whatever their group; of a whole source or sample, also of positions that the stride skips.
///
/// ```text
/// scale      = (max − min) / 255                                one if max = min
/// zero_point = round(min(−min / scale, 255))                    ties to even
/// q[k]       = saturate(round(src[k] / scale) + zero_point)     0 to 255
/// sum        = Σ_k weight[c, k] · (q[k] − zero_point)           exact, in i32
/// x          = f32(sum) · (scale · weight_scale[c]) + bias[c]
/// dst        = clip(clip(x) + residual)
/// ```
///
/// where each operation rounds once to f32, in the order of the parentheses. A scale below the least
/// normal f32 is that; where `max − min` overflows, scale is `max / 255 − min / 255`. Results are f32, or
/// rounded once to f16 or bf16, as the call asks. A value that is infinite or NaN makes NaN of all results
/// whose range it is in; `scale · weight_scale[c]` beyond f32 is infinite, and makes NaN of a sum of zero. Results are the same bits on every instruction set, for any number of threads, and on CUDA (of a NaN,
/// the bits are the device's).
///
/// ```
/// use ndarray::{Array2, array};
/// use pointwise::Device;
/// use pointwise::quantized::{DynamicQuantized, Per};
///
/// let layer = DynamicQuantized::new(array![[1i8, 2], [3, -4]], vec![0.5, 0.25], Per::Position)
///     .bias(vec![10.0, -20.0])
///     .prepare(&Device::cpu())?;
/// let src = array![[255.0f32, 51.0], [0.0, 2.55]];
/// let dst: Array2<f32> = layer.forward(&src)?;
/// assert_eq!(dst.row(0), array![188.5, 120.25]);
/// # Ok::<(), pointwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DynamicQuantized {
    pub(crate) weight: Array2<i8>,
    pub(crate) weight_scale: Array1<f32>,
    pub(crate) per: Per,
    pub(crate) bias: Option<Array1<f32>>,
    pub(crate) residual: bool,
    /// Before the residual is added, and after it; at the end where there is none.
    #[cfg_attr(feature = "serde", serde(with = "super::bounds"))]
    pub(crate) clips: [(f32, f32); 2],
    pub(crate) groups: usize,
    pub(crate) stride: usize,
}

impl DynamicQuantized {
    /// A bare convolution.
    ///
    /// # Shapes
    /// `weight [c_out, c_in / groups]`, symmetric (its zero points are zero); `weight_scale [c_out]`.
    pub fn new(
        weight: impl Into<Array2<i8>>,
        weight_scale: impl Into<Array1<f32>>,
        per: Per,
    ) -> Self {
        DynamicQuantized {
            weight: weight.into(),
            weight_scale: weight_scale.into(),
            per,
            bias: None,
            residual: false,
            clips: UNBOUNDED,
            groups: 1,
            stride: 1,
        }
    }

    /// Quantises the weight of an f32 layer: bias, batch norm and a source affine are folded into it
    /// first, and each output channel gets the scale that takes its largest weight to 127.
    ///
    /// # Errors
    /// As [`Quantized::from_layer`](super::Quantized::from_layer), but for the calibration.
    pub fn from_layer(layer: &Pointwise, per: Per) -> Result<Self> {
        let Int8Weight { weight, scale, bias, steps } = Int8Weight::new(layer, |_| 0.0)?;
        let mut quantized = DynamicQuantized::new(weight, scale, per)
            .bias(bias)
            .groups(layer.groups)
            .stride(layer.stride);
        for step in steps {
            quantized = match step {
                Step::Clip(lo, hi) => quantized.clip(lo, hi),
                Step::Residual => quantized.residual(),
            };
        }
        Ok(quantized)
    }

    /// Adds `bias [c_out]`.
    pub fn bias(mut self, bias: impl Into<Array1<f32>>) -> Self {
        self.bias = Some(bias.into());
        self
    }

    /// `max(x, 0)`; before or after the residual, as it is written.
    pub fn relu(self) -> Self {
        self.clip(0.0, f32::INFINITY)
    }

    /// `min(max(x, 0), 6)`, likewise.
    pub fn relu6(self) -> Self {
        self.clip(0.0, 6.0)
    }

    /// `min(max(x, lo), hi)`, likewise. Infinite bounds are none.
    pub fn clip(mut self, lo: f32, hi: f32) -> Self {
        cut(&mut self.clips[usize::from(self.residual)], lo, hi);
        self
    }

    /// Adds a tensor of dst's shape and type, which each call brings.
    pub fn residual(mut self) -> Self {
        self.residual = true;
        self
    }

    /// Splits the channels into groups.
    pub fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// Keeps every `stride`-th position of each spatial axis.
    pub fn stride(mut self, stride: usize) -> Self {
        self.stride = stride;
        self
    }

    /// `weight [c_out, c_in / groups]`.
    pub fn weight(&self) -> &Array2<i8> {
        &self.weight
    }

    /// The weight's scale, one per output channel.
    pub fn weight_scale(&self) -> &Array1<f32> {
        &self.weight_scale
    }

    /// Everything that can be checked without a source.
    ///
    /// # Errors
    /// The first thing that does not fit, with its values: shapes; scales that are not finite and
    /// positive; a bias that is not finite; bounds of a clip;
    /// [`Error::SumOverflow`](crate::Error::SumOverflow) where a source could take a sum beyond an i32.
    pub fn check(&self) -> Result<()> {
        let DynamicQuantized { weight, weight_scale, groups, stride, .. } = self;
        let bias = self.bias.as_ref().map(|bias| bias.len());
        check_layer(weight.dim(), weight_scale, bias, *groups, *stride, self.clips)?;
        for (channel, value) in self.bias.iter().flatten().enumerate() {
            finite(|| format!("bias[{channel}]"), *value)?;
        }
        for (channel, row) in weight.outer_iter().enumerate() {
            // Whatever the zero point: sums are largest where it is at either end.
            check_sums(channel, row, 0, [(0, 255), (-255, 0)])?;
        }
        Ok(())
    }

    pub(crate) fn shape(&self) -> LayerShape {
        shape(self.weight.dim(), self.groups, self.stride, self.residual)
    }

    /// The layer as the backend takes it, for weights in row-major order.
    pub(crate) fn lower<'a>(&self, weight: &'a [i8]) -> Lowered<'a> {
        let shape = self.shape();
        let [mut before, mut clip] = self.clips.map(|(lo, hi)| Clip { lo, hi });
        if !self.residual {
            clip = std::mem::replace(&mut before, clip);
        }
        let sum = |row: &[i8]| row.iter().map(|&w| i32::from(w)).sum();
        Lowered {
            offset: weight.chunks_exact(shape.k()).map(sum).collect(),
            scale: self.weight_scale.to_vec(),
            shift: self.bias.as_ref().map_or(vec![0.0; shape.c_out], |bias| bias.to_vec()),
            per: Some(self.per),
            scaling: Scaling { before, clip, ..Scaling::default() },
            src_flip: 0,
            weight,
            shape,
        }
    }
}
