//! Layers of 8-bit numbers. First of integers, as ONNX's `QLinearConv` and PyTorch's quantised convolution define
//! them.
//!
//! An integer `q` stands for the real number `scale · (q − zero_point)`. A layer computes
//!
//! ```text
//! sum = Σ_k weight[c, k] · (src[k] − src.zero_point) + bias[c]             exact, in i32
//! x   = f32(sum) · (src.scale · weight_scale[c] / dst.scale)               in f32
//! x   = clip(x) + f32(residual − residual.zero_point) · (residual.scale / dst.scale)
//! dst = saturate(round(clip(x)) + dst.zero_point)                          ties to even
//! ```
//!
//! where each operation of the last three lines rounds once to f32, in the order of the
//! parentheses; the bounds of a clip are divided by `dst.scale`. Without a quantisation of its own,
//! `dst` is the real number, in f32 or rounded once to f16 or bf16, as the call asks: `dst.scale` is
//! one, and nothing is rounded to integers or saturated. Results are the same bits on every instruction
//! set, for any number of threads, and on CUDA.
//!
//! [`DynamicQuantized`] takes sources of f32, and finds their scales in each call. [`QuantizedFp8`] is a
//! layer of 8-bit floats instead.
//!
//! ```
//! use ndarray::{Array4, array};
//! use pointwise::{Device, Quantization, Quantized};
//!
//! let layer = Quantized::new(array![[1i8, 2], [3, -4]], vec![0.5, 0.25], Quantization::u8(0.1, 128))
//!     .bias(vec![10, -20])
//!     .relu()
//!     .dst(Quantization::u8(0.2, 0))
//!     .prepare(&Device::cpu())?;
//! let src = Array4::<u8>::from_elem((1, 2, 5, 5), 138);
//! let dst: Array4<u8> = layer.forward(&src)?;
//! // 1·10 + 2·10 + 10 = 40, times 0.1 · 0.5 / 0.2
//! assert_eq!(dst[[0, 0, 0, 0]], 10);
//! # Ok::<(), pointwise::Error>(())
//! ```

mod calibrate;
mod dynamic;
mod fp8;
mod prepared;

use std::fmt;

pub use float8::{F8E4M3, F8E5M2};
use ndarray::{Array1, Array2, ArrayView1};

pub use calibrate::{Calibration, Range};
pub use dynamic::{DynamicQuantized, Per};
pub use fp8::{Fp8, Fp8Element, Fp8Quantization, QuantizedFp8};
pub use prepared::{PreparedQuantized, QuantizedCall};

use crate::dtype::{DType, bf16, f16};
use crate::error::{Error, Result};
use crate::problem::LayerShape;
use crate::tensor::checked_product;

/// An 8-bit integer type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Int8 {
    /// 0 to 255.
    U8,
    /// −128 to 127.
    I8,
}

impl Int8 {
    /// The least value.
    pub const fn min(self) -> i32 {
        match self {
            Int8::U8 => 0,
            Int8::I8 => -128,
        }
    }

    /// The greatest value.
    pub const fn max(self) -> i32 {
        self.min() + 255
    }

    /// `u8` or `i8`.
    pub const fn name(self) -> &'static str {
        match self {
            Int8::U8 => "u8",
            Int8::I8 => "i8",
        }
    }

    /// What makes a byte of this type unsigned, by exclusive or.
    fn flip(self) -> u8 {
        self.min().unsigned_abs() as u8
    }
}

impl fmt::Display for Int8 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a tensor of a quantised layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// Integers, which a [`Quantization`] gives a meaning.
    Int8(Int8),
    /// Floats, which an [`Fp8Quantization`] gives a meaning.
    Fp8(Fp8),
    /// Real numbers.
    Real(DType),
}

impl ElementType {
    /// `u8`, `i8`, `e4m3`, `e5m2`, `f32`, `f16` or `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            ElementType::Int8(int8) => int8.name(),
            ElementType::Fp8(fp8) => fp8.name(),
            ElementType::Real(dtype) => dtype.name(),
        }
    }

    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            ElementType::Int8(_) | ElementType::Fp8(_) => 1,
            ElementType::Real(dtype) => dtype.size(),
        }
    }
}

mod sealed {
    pub trait Sealed: Copy + Default + Send + Sync + 'static {}
}

/// An element of such a tensor: `u8`, `i8`, [`F8E4M3`], [`F8E5M2`], `f32`, [`f16`](struct@f16) or
/// [`bf16`].
pub trait QuantizedElement: sealed::Sealed {
    /// The type as a value.
    const TYPE: ElementType;
}

macro_rules! elements {
    ($($element:ty: $type:expr;)*) => {$(
        impl sealed::Sealed for $element {}
        impl QuantizedElement for $element {
            const TYPE: ElementType = $type;
        }
    )*};
}
elements! {
    u8: ElementType::Int8(Int8::U8);
    i8: ElementType::Int8(Int8::I8);
    F8E4M3: ElementType::Fp8(Fp8::E4M3);
    F8E5M2: ElementType::Fp8(Fp8::E5M2);
    f32: ElementType::Real(DType::F32);
    f16: ElementType::Real(DType::F16);
    bf16: ElementType::Real(DType::Bf16);
}

/// Which real numbers the integers of a tensor stand for: `scale · (q − zero_point)`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Quantization {
    /// The integers' type.
    pub int8: Int8,
    /// Finite and positive.
    pub scale: f32,
    /// The integer that stands for zero, within the type.
    pub zero_point: i32,
}

impl Quantization {
    /// Of a tensor of `u8`. The layer that uses it checks the values.
    pub const fn u8(scale: f32, zero_point: i32) -> Self {
        Quantization { int8: Int8::U8, scale, zero_point }
    }

    /// Of a tensor of `i8`. The layer that uses it checks the values.
    pub const fn i8(scale: f32, zero_point: i32) -> Self {
        Quantization { int8: Int8::I8, scale, zero_point }
    }

    /// The integer for a real number: ties to even, saturating; NaN gives the zero point.
    pub fn quantize(&self, x: f32) -> i32 {
        let steps = (x / self.scale).round_ties_even();
        let steps = if steps.is_nan() { 0.0 } else { f64::from(steps) };
        let (min, max) = (self.int8.min(), self.int8.max());
        (steps + f64::from(self.zero_point)).clamp(min.into(), max.into()) as i32
    }

    /// The real number that an integer stands for.
    pub fn dequantize(&self, q: i32) -> f32 {
        self.scale * (f64::from(q) - f64::from(self.zero_point)) as f32
    }

    fn check(&self, tensor: &str) -> Result<()> {
        check_scale(|| format!("{tensor}'s scale"), self.scale)?;
        if (self.int8.min()..=self.int8.max()).contains(&self.zero_point) {
            return Ok(());
        }
        Err(Error::ParameterValue {
            parameter: format!("{tensor}'s zero point"),
            value: self.zero_point.to_string(),
            expected: match self.int8 {
                Int8::U8 => "0 to 255 (u8)",
                Int8::I8 => "-128 to 127 (i8)",
            },
        })
    }
}

fn finite(parameter: impl Fn() -> String, value: f32) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let (value, expected) = (value.to_string(), "a finite number");
    Err(Error::ParameterValue { parameter: parameter(), value, expected })
}

fn check_scale(parameter: impl Fn() -> String, scale: f32) -> Result<()> {
    if scale.is_finite() && scale > 0.0 {
        return Ok(());
    }
    Err(Error::ParameterValue {
        parameter: parameter(),
        value: scale.to_string(),
        expected: "a finite and positive number",
    })
}

/// A layer of 8-bit integers as a description: plain data. What it computes is in
/// [the module's page](self).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Quantized {
    pub(crate) weight: Array2<i8>,
    pub(crate) weight_scale: Array1<f32>,
    pub(crate) src: Quantization,
    pub(crate) bias: Option<Array1<i32>>,
    pub(crate) dst: Option<Quantization>,
    pub(crate) residual: Option<Quantization>,
    /// Before the residual is added, and after it; at the end where there is none.
    #[cfg_attr(feature = "serde", serde(with = "bounds"))]
    pub(crate) clips: [(f32, f32); 2],
    pub(crate) groups: usize,
    pub(crate) stride: usize,
}

/// Bounds as data: an infinite one is left out, since JSON has no word for it.
#[cfg(feature = "serde")]
mod bounds {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        clips: &[(f32, f32); 2],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let finite = |bound: f32| (!bound.is_infinite()).then_some(bound);
        clips.map(|(lo, hi)| (finite(lo), finite(hi))).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<[(f32, f32); 2], D::Error> {
        let clips = <[(Option<f32>, Option<f32>); 2]>::deserialize(deserializer)?;
        let bound = |(lo, hi): (Option<f32>, Option<f32>)| {
            (lo.unwrap_or(f32::NEG_INFINITY), hi.unwrap_or(f32::INFINITY))
        };
        Ok(clips.map(bound))
    }
}

impl Quantized {
    /// A bare convolution with results that are real numbers.
    ///
    /// # Shapes
    /// `weight [c_out, c_in / groups]`, symmetric (its zero points are zero); `weight_scale [c_out]`.
    pub fn new(
        weight: impl Into<Array2<i8>>,
        weight_scale: impl Into<Array1<f32>>,
        src: Quantization,
    ) -> Self {
        Quantized {
            weight: weight.into(),
            weight_scale: weight_scale.into(),
            src,
            bias: None,
            dst: None,
            residual: None,
            clips: UNBOUNDED,
            groups: 1,
            stride: 1,
        }
    }

    /// Adds `bias [c_out]`, integers of scale `src.scale · weight_scale[c]`.
    pub fn bias(mut self, bias: impl Into<Array1<i32>>) -> Self {
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
    pub fn residual(mut self, quantization: Quantization) -> Self {
        self.residual = Some(quantization);
        self
    }

    /// The result is quantised.
    pub fn dst(mut self, quantization: Quantization) -> Self {
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

    /// `weight [c_out, c_in / groups]`.
    pub fn weight(&self) -> &Array2<i8> {
        &self.weight
    }

    /// The weight's scale, one per output channel.
    pub fn weight_scale(&self) -> &Array1<f32> {
        &self.weight_scale
    }

    /// The source's quantisation.
    pub fn src_quantization(&self) -> Quantization {
        self.src
    }

    /// The residual's quantisation, if the layer takes one.
    pub fn residual_quantization(&self) -> Option<Quantization> {
        self.residual
    }

    /// The result's quantisation; `None` is real numbers.
    pub fn dst_quantization(&self) -> Option<Quantization> {
        self.dst
    }

    /// The bias of a channel.
    pub(crate) fn bias_of(&self, channel: usize) -> i32 {
        self.bias.as_ref().map_or(0, |bias| bias[channel])
    }

    /// dst's scale, one if it is real.
    pub(crate) fn dst_scale(&self) -> f32 {
        self.dst.map_or(1.0, |dst| dst.scale)
    }

    /// From sums to dst, of each channel: the order of operations is ONNX Runtime's.
    pub(crate) fn multiplier(&self, channel: usize) -> f32 {
        self.src.scale * self.weight_scale[channel] / self.dst_scale()
    }

    /// From the residual to dst.
    pub(crate) fn residual_multiplier(&self) -> f32 {
        self.residual.map_or(0.0, |residual| residual.scale / self.dst_scale())
    }

    /// Everything that can be checked without a source.
    ///
    /// # Errors
    /// The first thing that does not fit, with its values: shapes; scales that are not finite and
    /// positive, or whose quotient is not finite; zero points outside of their type; bounds of a
    /// clip; [`Error::SumOverflow`] where a source could take a sum beyond an i32.
    pub fn check(&self) -> Result<()> {
        let Quantized { weight, weight_scale, groups, stride, .. } = self;
        let bias = self.bias.as_ref().map(|bias| bias.len());
        check_layer(weight.dim(), weight_scale, bias, *groups, *stride, self.clips)?;
        self.src.check("src")?;
        self.dst.map_or(Ok(()), |dst| dst.check("dst"))?;
        self.residual.map_or(Ok(()), |residual| residual.check("residual"))?;
        // Differences from a zero point are of at most 255.
        let what = || "255 times the residual's scale over dst's".into();
        finite(what, self.residual_multiplier() * 255.0)?;
        let src = [self.src.int8.min(), self.src.int8.max()];
        let [least, greatest] = src.map(|q| i64::from(q - self.src.zero_point));
        for (channel, row) in self.weight.outer_iter().enumerate() {
            let what = || format!("src's scale times weight_scale[{channel}] over dst's scale");
            finite(what, self.multiplier(channel))?;
            let bias = self.bias_of(channel);
            check_sums(channel, row, bias, [(least, greatest)])?;
        }
        Ok(())
    }

    pub(crate) fn shape(&self) -> LayerShape {
        shape(self.weight.dim(), self.groups, self.stride, self.residual.is_some())
    }
}

fn shape((c_out, k): (usize, usize), groups: usize, stride: usize, residual: bool) -> LayerShape {
    LayerShape {
        c_in: k * groups,
        c_out,
        groups,
        stride,
        partial: None,
        residual,
        gate: false,
        norm_over_all: false,
    }
}

/// One clip after another: the bounds of the first are cut down to those of the second. What is no
/// clip stays as it is, for a check to tell.
fn cut(clip: &mut (f32, f32), lo: f32, hi: f32) {
    if clip.0 <= clip.1 {
        let cut = |x: f32| if x < lo { lo } else { x.min(hi) };
        *clip = if lo <= hi { (cut(clip.0), cut(clip.1)) } else { (lo, hi) };
    }
}

/// No clip, before a residual and after it.
const UNBOUNDED: [(f32, f32); 2] = [(f32::NEG_INFINITY, f32::INFINITY); 2];

/// What every layer must fulfil, with so many values in its bias.
fn check_layer(
    (c_out, k): (usize, usize),
    weight_scale: &Array1<f32>,
    bias: Option<usize>,
    groups: usize,
    stride: usize,
    clips: [(f32, f32); 2],
) -> Result<()> {
    if c_out == 0 || k == 0 {
        let shape = vec![c_out, k];
        return Err(Error::NoChannels { tensor: "weight", shape });
    }
    if groups == 0 || c_out % groups != 0 {
        return Err(Error::Groups { groups, channels: c_out, what: "output channels" });
    }
    checked_product("the number of input channels", &[k, groups])?;
    if stride == 0 {
        return Err(Error::ParameterValue {
            parameter: "stride".into(),
            value: "0".into(),
            expected: "at least 1",
        });
    }
    for (parameter, got) in [("weight_scale", weight_scale.len()), ("bias", bias.unwrap_or(c_out))]
    {
        if got != c_out {
            return Err(Error::ParameterLength { parameter, expected: c_out, got });
        }
    }
    for (lo, hi) in clips {
        if lo.is_nan() || hi.is_nan() || lo > hi {
            return Err(Error::ParameterValue {
                parameter: "clip".into(),
                value: format!("{lo}, {hi}"),
                expected: "two numbers, the lower one first",
            });
        }
    }
    for (channel, &scale) in weight_scale.iter().enumerate() {
        check_scale(|| format!("weight_scale[{channel}]"), scale)?;
    }
    Ok(())
}

/// Whether all sums of a channel fit an i32, with its bias and without, where values of src minus their
/// zero point lie between any of these bounds.
fn check_sums<const N: usize>(
    channel: usize,
    row: ArrayView1<'_, i8>,
    bias: i32,
    bounds: [(i64, i64); N],
) -> Result<()> {
    for (least, greatest) in bounds {
        // Zero points lie within their type, so that zero is between the bounds.
        let (mut low, mut high) = (0i64, 0i64);
        for &w in row {
            let (a, b) = (i64::from(w) * least, i64::from(w) * greatest);
            low += a.min(b);
            high += a.max(b);
        }
        let sums = [low, high, low + i64::from(bias), high + i64::from(bias)];
        let beyond = sums.into_iter().filter(|&sum| i32::try_from(sum).is_err());
        if let Some(sum) = beyond.max_by_key(|sum| sum.unsigned_abs()) {
            return Err(Error::SumOverflow { channel, sum, terms: row.len(), bias });
        }
    }
    Ok(())
}
