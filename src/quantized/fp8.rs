//! Layers of 8-bit floats: what they are.

use std::fmt;

use float8::{F8E4M3, F8E5M2};
use ndarray::{Array1, Array2};

use super::{QuantizedElement, UNBOUNDED, check_layer, check_scale, cut, finite, shape};
use crate::cpu::fp8::{Lowered, Scaling};
use crate::cpu::int8::Clip;
use crate::error::Result;
use crate::problem::LayerShape;

/// An 8-bit floating-point type of the Open Compute Project's specification (OFP8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Fp8 {
    /// 4 bits of exponent, 3 of mantissa: up to 448, down to 2^-9, no infinities. PyTorch's
    /// `float8_e4m3fn`.
    E4M3,
    /// 5 bits of exponent, 2 of mantissa: up to 57344, down to 2^-16, with infinities. PyTorch's
    /// `float8_e5m2`.
    E5M2,
}

impl Fp8 {
    /// The greatest finite number.
    pub const fn max(self) -> f32 {
        match self {
            Fp8::E4M3 => 448.0,
            Fp8::E5M2 => 57344.0,
        }
    }

    /// `e4m3` or `e5m2`.
    pub const fn name(self) -> &'static str {
        match self {
            Fp8::E4M3 => "e4m3",
            Fp8::E5M2 => "e5m2",
        }
    }

    /// What all bits stand for.
    pub(crate) fn values(self) -> &'static [f32; 256] {
        static E4M3: [f32; 256] = {
            let (mut values, mut bits) = ([0.0; 256], 0);
            while bits < 256 {
                values[bits] = F8E4M3::from_bits(bits as u8).to_f32();
                bits += 1;
            }
            values
        };
        static E5M2: [f32; 256] = {
            let (mut values, mut bits) = ([0.0; 256], 0);
            while bits < 256 {
                values[bits] = F8E5M2::from_bits(bits as u8).to_f32();
                bits += 1;
            }
            values
        };
        match self {
            Fp8::E4M3 => &E4M3,
            Fp8::E5M2 => &E5M2,
        }
    }
}

impl fmt::Display for Fp8 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// [`F8E4M3`] or [`F8E5M2`].
pub trait Fp8Element: QuantizedElement {
    /// The type as a value.
    const FP8: Fp8;

    /// The bits.
    fn bits(self) -> u8;
}

impl Fp8Element for F8E4M3 {
    const FP8: Fp8 = Fp8::E4M3;

    fn bits(self) -> u8 {
        self.to_bits()
    }
}

impl Fp8Element for F8E5M2 {
    const FP8: Fp8 = Fp8::E5M2;

    fn bits(self) -> u8 {
        self.to_bits()
    }
}

/// Which real numbers the 8-bit floats of a tensor stand for: `scale · q`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Fp8Quantization {
    /// The floats' type.
    pub fp8: Fp8,
    /// Finite and positive.
    pub scale: f32,
}

impl Fp8Quantization {
    /// Of a tensor of [`F8E4M3`]. The layer that uses it checks the scale.
    pub const fn e4m3(scale: f32) -> Self {
        Fp8Quantization { fp8: Fp8::E4M3, scale }
    }

    /// Of a tensor of [`F8E5M2`]. The layer that uses it checks the scale.
    pub const fn e5m2(scale: f32) -> Self {
        Fp8Quantization { fp8: Fp8::E5M2, scale }
    }

    /// The bits for a real number: the nearest, ties to even; saturating, infinities too; NaN stays NaN.
    pub fn quantize(&self, x: f32) -> u8 {
        match self.fp8 {
            Fp8::E4M3 => F8E4M3::from_f32(x / self.scale).to_bits(),
            Fp8::E5M2 => F8E5M2::from_f32(x / self.scale).to_bits(),
        }
    }

    /// The real number that some bits stand for.
    pub fn dequantize(&self, bits: u8) -> f32 {
        self.scale * self.fp8.values()[usize::from(bits)]
    }
}

/// A layer of 8-bit floats as a description: plain data. Source, weight, residual and result are of either
/// type each.
///
/// A float `q` stands for the real number `scale · q`. A layer computes
///
/// ```text
/// sum = Σ_k weight[c, k] · src[k]                                        products exact, sums f32
/// x   = sum · (src.scale · weight_scale[c] / dst.scale) + bias[c] / dst.scale
/// x   = clip(x) + residual · (residual.scale / dst.scale)
/// dst = saturate(round(clip(x)))                                         ties to even
/// ```
///
/// where each operation of the last three lines rounds once to f32, in the order of the parentheses; the
/// bounds of a clip are divided by `dst.scale`. What is beyond the greatest number of dst's type becomes
/// that, infinities too; NaN stays NaN. Without a quantisation of its own, `dst` is the real number, in f32
/// or rounded once to f16 or bf16, as the call asks: `dst.scale` is one.
///
/// These are the semantics of PyTorch's `torch._scaled_mm` and of cuBLAS's fp8 matmul, with scales that
/// are multiplied to get real numbers, dst's too. On CUDA it takes compute capability 8.9.
///
/// ```
/// use ndarray::{Array4, array};
/// use pointwise::quantized::{F8E4M3, Fp8Quantization, QuantizedFp8};
/// use pointwise::Device;
///
/// let weight = array![[1.0, 2.0], [3.0, -4.0]].mapv(F8E4M3::from_f32);
/// let layer = QuantizedFp8::new(weight, vec![0.5, 0.25], Fp8Quantization::e4m3(0.125))
///     .bias(vec![0.25, -0.25])
///     .relu()
///     .dst(Fp8Quantization::e4m3(0.5))
///     .prepare(&Device::cpu())?;
/// let src = Array4::from_elem((1, 2, 5, 5), F8E4M3::from_f32(16.0));
/// let dst: Array4<F8E4M3> = layer.forward(&src)?;
/// // (1·16 + 2·16) · 0.125 · 0.5 + 0.25 = 3.25, over 0.5
/// assert_eq!(dst[[0, 0, 0, 0]].to_f32(), 6.5);
/// # Ok::<(), pointwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct QuantizedFp8 {
    pub(crate) weight_type: Fp8,
    /// Bits.
    pub(crate) weight: Array2<u8>,
    pub(crate) weight_scale: Array1<f32>,
    pub(crate) src: Fp8Quantization,
    pub(crate) bias: Option<Array1<f32>>,
    pub(crate) dst: Option<Fp8Quantization>,
    pub(crate) residual: Option<Fp8Quantization>,
    /// Before the residual is added, and after it; at the end where there is none.
    #[cfg_attr(feature = "serde", serde(with = "super::bounds"))]
    pub(crate) clips: [(f32, f32); 2],
    pub(crate) groups: usize,
    pub(crate) stride: usize,
}

impl QuantizedFp8 {
    /// A bare convolution with results that are real numbers.
    ///
    /// # Shapes
    /// `weight [c_out, c_in / groups]`; `weight_scale [c_out]`, or one for all.
    pub fn new<W: Fp8Element>(
        weight: impl Into<Array2<W>>,
        weight_scale: impl Into<Array1<f32>>,
        src: Fp8Quantization,
    ) -> Self {
        let weight: Array2<W> = weight.into();
        QuantizedFp8::of_bits(W::FP8, weight.mapv(W::bits), weight_scale, src)
    }

    /// The same of a weight's bits.
    pub(crate) fn of_bits(
        weight_type: Fp8,
        weight: Array2<u8>,
        weight_scale: impl Into<Array1<f32>>,
        src: Fp8Quantization,
    ) -> Self {
        let mut weight_scale: Array1<f32> = weight_scale.into();
        if weight_scale.len() == 1 {
            weight_scale = Array1::from_elem(weight.nrows(), weight_scale[0]);
        }
        QuantizedFp8 {
            weight_type,
            weight,
            weight_scale,
            src,
            bias: None,
            dst: None,
            residual: None,
            clips: UNBOUNDED,
            groups: 1,
            stride: 1,
        }
    }

    /// Adds `bias [c_out]`, real numbers.
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

    /// `min(max(x, lo), hi)`, likewise; of real numbers. Infinite bounds are none.
    pub fn clip(mut self, lo: f32, hi: f32) -> Self {
        cut(&mut self.clips[usize::from(self.residual.is_some())], lo, hi);
        self
    }

    /// Adds a tensor of dst's shape, which each call brings.
    pub fn residual(mut self, quantization: Fp8Quantization) -> Self {
        self.residual = Some(quantization);
        self
    }

    /// The result is quantised.
    pub fn dst(mut self, quantization: Fp8Quantization) -> Self {
        self.dst = Some(quantization);
        self
    }

    /// The result is real numbers, whatever it was.
    pub fn dequantized(mut self) -> Self {
        self.dst = None;
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

    /// The weight's type, and its bits `[c_out, c_in / groups]`.
    pub fn weight(&self) -> (Fp8, &Array2<u8>) {
        (self.weight_type, &self.weight)
    }

    /// The weight's scale, one per output channel.
    pub fn weight_scale(&self) -> &Array1<f32> {
        &self.weight_scale
    }

    /// The source's quantisation.
    pub fn src_quantization(&self) -> Fp8Quantization {
        self.src
    }

    /// The residual's quantisation, if the layer takes one.
    pub fn residual_quantization(&self) -> Option<Fp8Quantization> {
        self.residual
    }

    /// The result's quantisation; `None` is real numbers.
    pub fn dst_quantization(&self) -> Option<Fp8Quantization> {
        self.dst
    }

    /// dst's scale, one if it is real.
    pub(crate) fn dst_scale(&self) -> f32 {
        self.dst.map_or(1.0, |dst| dst.scale)
    }

    /// From sums to dst, of each channel.
    pub(crate) fn multiplier(&self, channel: usize) -> f32 {
        self.src.scale * self.weight_scale[channel] / self.dst_scale()
    }

    /// What is added then.
    pub(crate) fn shift(&self, channel: usize) -> f32 {
        self.bias.as_ref().map_or(0.0, |bias| bias[channel] / self.dst_scale())
    }

    /// From the residual to dst.
    pub(crate) fn residual_multiplier(&self) -> f32 {
        self.residual.map_or(0.0, |residual| residual.scale / self.dst_scale())
    }

    /// Everything that can be checked without a source.
    ///
    /// # Errors
    /// The first thing that does not fit, with its values: shapes; scales that are not finite and
    /// positive, or whose quotient is not finite; a bias that is not finite, or not over dst's scale;
    /// bounds of a clip.
    pub fn check(&self) -> Result<()> {
        let QuantizedFp8 { weight, weight_scale, groups, stride, .. } = self;
        let bias = self.bias.as_ref().map(|bias| bias.len());
        check_layer(weight.dim(), weight_scale, bias, *groups, *stride, self.clips)?;
        for (tensor, quantization) in
            [("src", Some(self.src)), ("dst", self.dst), ("residual", self.residual)]
        {
            if let Some(Fp8Quantization { scale, .. }) = quantization {
                check_scale(|| format!("{tensor}'s scale"), scale)?;
            }
        }
        if let Some(residual) = self.residual {
            let what = || format!("{} times the residual's scale over dst's", residual.fp8.max());
            finite(what, self.residual_multiplier() * residual.fp8.max())?;
        }
        for channel in 0..weight.nrows() {
            let what = || format!("src's scale times weight_scale[{channel}] over dst's scale");
            finite(what, self.multiplier(channel))?;
            if let Some(bias) = &self.bias {
                finite(|| format!("bias[{channel}]"), bias[channel])?;
                finite(|| format!("bias[{channel}] over dst's scale"), self.shift(channel))?;
            }
        }
        Ok(())
    }

    pub(crate) fn shape(&self) -> LayerShape {
        shape(self.weight.dim(), self.groups, self.stride, self.residual.is_some())
    }

    /// The layer as the backend takes it, for a weight in row-major order.
    pub(crate) fn lower<'a>(&self, weight: &'a [u8]) -> Lowered<'a> {
        let (shape, scale) = (self.shape(), self.dst_scale());
        let [mut before, mut clip] =
            self.clips.map(|(lo, hi)| Clip { lo: lo / scale, hi: hi / scale });
        if self.residual.is_none() {
            clip = std::mem::replace(&mut before, clip);
        }
        let scaling = Scaling {
            scale: (0..shape.c_out).map(|channel| self.multiplier(channel)).collect(),
            shift: (0..shape.c_out).map(|channel| self.shift(channel)).collect(),
            before,
            clip,
            residual_scale: self.residual_multiplier(),
        };
        Lowered {
            weight,
            weight_type: self.weight_type,
            src: self.src.fp8,
            residual: self.residual.map(|residual| residual.fp8),
            scaling,
            shape,
        }
    }
}
