//! From an f32 layer to a quantised one: ranges of values that were seen, and what they make of it.

use ndarray::{Array2, ArrayViewD};

use super::{Fp8, Fp8Quantization, Int8, Quantization, Quantized, QuantizedFp8};
use crate::device::Device;
use crate::dtype::DType;
use crate::epilogue::{self, Lowered};
use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::stages::Activation;

/// Which of the values that were seen a quantisation covers; the others saturate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Range {
    /// All of them.
    #[default]
    MinMax,
    /// All but the least and the greatest: `Percentile(99.9)` leaves one in a thousand out at each
    /// end. Above 50 and at most 100.
    Percentile(f32),
}

/// The values of a layer's tensors on sources that are like those that it will meet.
///
/// It keeps all values that it sees, 4 bytes each.
#[derive(Clone, Debug, Default)]
pub struct Calibration {
    src: Vec<f32>,
    dst: Vec<f32>,
    residual: Vec<f32>,
}

impl Calibration {
    /// Nothing seen.
    pub fn new() -> Self {
        Calibration::default()
    }

    /// Runs the layer on a source `[n, c_in, …spatial]` (and its residual, if it has one) in f32,
    /// and keeps what goes in and comes out.
    ///
    /// # Errors
    /// As the layer's `forward`.
    pub fn observe(
        &mut self,
        layer: &Pointwise,
        src: ArrayViewD<'_, f32>,
        residual: Option<ArrayViewD<'_, f32>>,
    ) -> Result<()> {
        let prepared = layer.prepare(&Device::cpu())?;
        let mut call = prepared.call(&src);
        if let Some(residual) = &residual {
            call = call.residual(residual);
        }
        let dst = call.run()?;
        self.src.extend(&src);
        self.dst.extend(&dst);
        self.residual.extend(residual.iter().flatten());
        Ok(())
    }

    /// The least and the greatest of the values that were seen and that are covered, zero among them.
    ///
    /// # Errors
    /// [`Error::ParameterValue`] if there are none, or some are not finite, or for a percentile out
    /// of range.
    fn covered(tensor: &'static str, values: &[f32], range: Range) -> Result<(f64, f64)> {
        let refused = |value: String, expected| {
            let parameter = format!("the calibration of {tensor}");
            Err(Error::ParameterValue { parameter, value, expected })
        };
        if values.is_empty() {
            return refused("empty".into(), "values that a run has shown");
        }
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return refused(value.to_string(), "finite values");
        }
        let last = values.len() - 1;
        let left_out = match range {
            Range::MinMax => 0,
            Range::Percentile(p) if p > 50.0 && p <= 100.0 => {
                ((1.0 - f64::from(p) / 100.0) * last as f64).round() as usize
            }
            Range::Percentile(p) => {
                return refused(format!("percentile {p}"), "above 50 and at most 100");
            }
        };
        let mut values = values.to_vec();
        let mut nth = |n| *values.select_nth_unstable_by(n, f32::total_cmp).1;
        // Zero stands for itself, as padding and ReLU want it.
        Ok((f64::from(nth(left_out)).min(0.0), f64::from(nth(last - left_out)).max(0.0)))
    }

    /// The quantisation of values that were seen.
    ///
    /// # Errors
    /// As [`covered`](Self::covered).
    fn quantization(
        tensor: &'static str,
        values: &[f32],
        range: Range,
        int8: Int8,
    ) -> Result<Quantization> {
        let (lo, hi) = Calibration::covered(tensor, values, range)?;
        if lo == hi {
            return Ok(Quantization {
                int8,
                scale: 1.0,
                zero_point: int8.min().midpoint(int8.max()),
            });
        }
        // The smallest f32 with all its bits, so that reciprocals are finite.
        let scale = (((hi - lo) / 255.0) as f32).max(f32::MIN_POSITIVE);
        let zero_point = f64::from(int8.min()) - (lo / f64::from(scale)).round_ties_even();
        let zero_point = zero_point.clamp(int8.min().into(), int8.max().into()) as i32;
        Ok(Quantization { int8, scale, zero_point })
    }

    /// The same in fp8: the largest magnitude becomes the greatest number.
    fn fp8_quantization(
        tensor: &'static str,
        values: &[f32],
        range: Range,
        fp8: Fp8,
    ) -> Result<Fp8Quantization> {
        let (lo, hi) = Calibration::covered(tensor, values, range)?;
        Ok(Fp8Quantization { fp8, scale: fp8_scale(hi.max(-lo), fp8) })
    }
}

/// The scale that takes a magnitude to the greatest number of fp8; one of zero.
fn fp8_scale(largest: f64, fp8: Fp8) -> f32 {
    if largest == 0.0 {
        return 1.0;
    }
    // The smallest f32 with all its bits, so that reciprocals are finite.
    ((largest / f64::from(fp8.max())) as f32).max(f32::MIN_POSITIVE)
}

impl QuantizedFp8 {
    /// Quantises an f32 layer: bias, batch norm and a source affine are folded into the weight first,
    /// each output channel gets the scale that takes its largest weight to `weight`'s greatest number,
    /// and activations are scaled to `activations` as the calibration saw them.
    ///
    /// # Errors
    /// As [`Quantized::from_layer`].
    pub fn from_layer(
        layer: &Pointwise,
        calibration: &Calibration,
        range: Range,
        weight: Fp8,
        activations: Fp8,
    ) -> Result<QuantizedFp8> {
        let quantization = |tensor, values: &[f32]| {
            Calibration::fp8_quantization(tensor, values, range, activations)
        };
        let Folded { weight: values, bias, steps } = Folded::new(layer, "a layer of fp8")?;
        let mut bits = Array2::zeros(values.dim());
        let mut scales = Vec::with_capacity(bits.nrows());
        for (row, mut bits) in values.outer_iter().zip(bits.outer_iter_mut()) {
            let largest = row.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
            let scale = fp8_scale(largest.into(), weight);
            let quantization = Fp8Quantization { fp8: weight, scale };
            bits.iter_mut().zip(row).for_each(|(bits, &w)| *bits = quantization.quantize(w));
            scales.push(scale);
        }
        let src = quantization("src", &calibration.src)?;
        let mut quantized = QuantizedFp8::of_bits(weight, bits, scales, src)
            .bias(bias)
            .dst(quantization("dst", &calibration.dst)?)
            .groups(layer.groups)
            .stride(layer.stride);
        for step in steps {
            quantized = match step {
                Step::Clip(lo, hi) => quantized.clip(lo, hi),
                Step::Residual => {
                    quantized.residual(quantization("residual", &calibration.residual)?)
                }
            };
        }
        Ok(quantized)
    }
}

impl Quantized {
    /// Quantises an f32 layer: bias, batch norm and a source affine are folded into the weight first,
    /// each output channel gets the scale that takes its largest weight to 127, and activations are
    /// quantised to `int8` as the calibration saw them.
    ///
    /// # Errors
    /// As [`Pointwise::check`]; [`Error::Unsupported`] for a stage that is none of bias, batch norm,
    /// ReLU, ReLU6, clip and residual, and for a partial convolution; [`Error::ParameterValue`] for
    /// a calibration that saw nothing or values that are not finite, and for such weights.
    pub fn from_layer(
        layer: &Pointwise,
        calibration: &Calibration,
        range: Range,
        int8: Int8,
    ) -> Result<Quantized> {
        let quantization =
            |tensor, values: &[f32]| Calibration::quantization(tensor, values, range, int8);
        layer.check()?;
        let src = quantization("src", &calibration.src)?;
        // A bias that is large beside the weights must fit its i32.
        let least = |bias: f32| f64::from(bias.abs()) / f64::from(src.scale) / f64::from(1 << 30);
        let Int8Weight { weight, scale, bias, steps } = Int8Weight::new(layer, least)?;
        let bias = bias.iter().zip(&scale).map(|(&bias, &scale)| {
            let scale = f64::from(src.scale) * f64::from(scale);
            (f64::from(bias) / scale).round_ties_even() as i32
        });
        let bias: Vec<i32> = bias.collect();
        let mut quantized = Quantized::new(weight, scale, src)
            .bias(bias)
            .dst(quantization("dst", &calibration.dst)?)
            .groups(layer.groups)
            .stride(layer.stride);
        for step in steps {
            quantized = match step {
                Step::Clip(lo, hi) => quantized.clip(lo, hi),
                Step::Residual => {
                    quantized.residual(quantization("residual", &calibration.residual)?)
                }
            };
        }
        Ok(quantized)
    }
}

/// What follows the convolution of a quantised layer.
pub(super) enum Step {
    Clip(f32, f32),
    Residual,
}

/// The weight of an f32 layer with all that can be folded into it, and what is left.
struct Folded {
    weight: Array2<f32>,
    bias: Vec<f32>,
    steps: Vec<Step>,
}

impl Folded {
    /// # Errors
    /// As [`Quantized::from_layer`]; `kind` is what the layer shall become.
    fn new(layer: &Pointwise, kind: &str) -> Result<Self> {
        layer.check()?;
        let unsupported =
            |what: &str| Err(Error::Unsupported { device: kind.into(), what: what.into() });
        let lowered = Lowered::new(layer, DType::F32);
        if layer.partial.is_some() {
            return unsupported("a partial convolution");
        }
        if !lowered.source_steps.is_empty() {
            return unsupported("source stages beside an affine");
        }
        if lowered.norm.is_some() {
            return unsupported("layer norm");
        }
        if lowered.dst_map.is_some() || lowered.residual_map.is_some() {
            return unsupported("a channel shuffle");
        }
        let (weight, bias) = (lowered.weight, lowered.bias);
        let weight = Array2::from_shape_vec(layer.weight.dim(), weight);
        let weight = weight.expect("as many as the layer's");
        for (channel, (row, bias)) in weight.outer_iter().zip(&bias).enumerate() {
            if let Some(value) = row.iter().chain([bias]).find(|value| !value.is_finite()) {
                return Err(Error::ParameterValue {
                    parameter: format!("weight and bias of output channel {channel}"),
                    value: value.to_string(),
                    expected: "finite numbers",
                });
            }
        }
        let mut steps = Vec::new();
        for step in &lowered.steps {
            steps.push(match step {
                epilogue::Step::Activation(Activation::Relu) => Step::Clip(0.0, f32::INFINITY),
                epilogue::Step::Activation(Activation::Relu6) => Step::Clip(0.0, 6.0),
                epilogue::Step::Activation(Activation::Clip { lo, hi }) => Step::Clip(*lo, *hi),
                epilogue::Step::Activation(activation) => return unsupported(activation.name()),
                epilogue::Step::Residual => Step::Residual,
                epilogue::Step::PRelu { .. } => return unsupported("prelu"),
                epilogue::Step::Affine { .. } => {
                    return unsupported("an affine behind an activation");
                }
            });
        }
        Ok(Folded { weight, bias, steps })
    }
}

/// The same in 8-bit integers.
pub(super) struct Int8Weight {
    pub weight: Array2<i8>,
    pub scale: Vec<f32>,
    pub bias: Vec<f32>,
    pub steps: Vec<Step>,
}

impl Int8Weight {
    /// With scales of at least what `least` says of a channel's bias.
    ///
    /// # Errors
    /// As [`Quantized::from_layer`].
    pub(super) fn new(layer: &Pointwise, least: impl Fn(f32) -> f64) -> Result<Self> {
        let Folded { weight: values, bias, steps } =
            Folded::new(layer, "a layer of 8-bit integers")?;
        let mut weight = Array2::zeros(values.dim());
        let mut scales = Vec::with_capacity(bias.len());
        for ((row, mut weight), &bias) in
            values.outer_iter().zip(weight.outer_iter_mut()).zip(&bias)
        {
            let largest = row.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
            let scale = (f64::from(largest) / 127.0).max(least(bias));
            let scale = if scale > 0.0 { (scale as f32).max(f32::MIN_POSITIVE) } else { 1.0 };
            let steps = |w: f32| (f64::from(w) / f64::from(scale)).round_ties_even();
            weight.iter_mut().zip(row).for_each(|(q, &w)| *q = steps(w).clamp(-127.0, 127.0) as i8);
            scales.push(scale);
        }
        Ok(Int8Weight { weight, scale: scales, bias, steps })
    }
}
