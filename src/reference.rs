//! The operator in f64, one scalar at a time: the specification that every kernel is tested
//! against. Obvious rather than fast.
//!
//! It interprets the description as it is written: nothing is folded, merged or reordered.

use std::iter::Sum;
use std::ops::{Mul, Range};

use ndarray::{
    Array2, Array3, ArrayD, ArrayView2, ArrayViewD, ArrayViewMut3, Axis, IxDyn, Slice, concatenate,
};

use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::problem::{LayerShape, dst_shape, expect_shape, without_trailing_ones};
use crate::quantized::{DynamicQuantized, Per, Quantized, QuantizedFp8};
use crate::stages::{Activation, BatchNorm, NormOver, SourceStage, Stage};
use crate::train::Statistics;

mod gradients;

pub use gradients::{Gradients, backward, slope};

/// The tensors of one call, each `[n, c, …spatial]`.
#[derive(Clone, Debug, Default)]
pub struct Inputs<'a> {
    /// The source, or several that stand for their concatenation along the channels.
    pub sources: Vec<ArrayViewD<'a, f32>>,
    /// dst's shape; needed by a residual stage.
    pub residual: Option<ArrayViewD<'a, f32>>,
    /// `[n, c_in]`, or with further axes of length 1; needed by a gate source stage.
    pub gate: Option<ArrayViewD<'a, f32>>,
}

/// Runs a layer in f64.
///
/// # Shapes
/// Sources `[n, c, …spatial]`, result `[n, c_out, …ceil(spatial / stride)]` (with the channels
/// that a partial convolution passes through beside the convolved ones), row-major.
///
/// # Errors
/// As the prepared layer's `forward`.
///
/// ```
/// use ndarray::{Array3, array};
/// use pointwise::{Pointwise, reference};
/// let src = Array3::from_elem((1, 2, 5), 3.0f32).into_dyn();
/// let inputs = reference::Inputs { sources: vec![src.view()], ..Default::default() };
/// let dst = reference::forward(&Pointwise::new(array![[1.0, 2.0]]).bias(vec![-4.0]).relu(), &inputs)?;
/// assert_eq!(dst, ndarray::Array3::from_elem((1, 1, 5), 5.0f64).into_dyn());
/// # Ok::<(), pointwise::Error>(())
/// ```
pub fn forward(layer: &Pointwise, inputs: &Inputs<'_>) -> Result<ArrayD<f64>> {
    let call = Call::new(layer, inputs)?;
    let tape = call.run(layer, Statistics::Frozen);
    Ok(call.dst(layer, &tape.dst))
}

/// The tensors of one call in f64, positions in a row: `[n, c, positions]`.
struct Call {
    /// Every channel of src at the positions that the stride keeps.
    src: Array3<f64>,
    gate: Option<Array2<f64>>,
    residual: Option<Array3<f64>>,
    /// dst's.
    shape: Vec<usize>,
    /// The channels of src that are convolved.
    convolved: Range<usize>,
}

/// What a call computes on its way: the input of every stage, in order, and the last result.
struct Tape {
    source: Vec<Array3<f64>>,
    /// The convolution's input and result.
    src: Array3<f64>,
    stages: Vec<Array3<f64>>,
    dst: Array3<f64>,
}

impl Call {
    fn new(layer: &Pointwise, inputs: &Inputs<'_>) -> Result<Call> {
        layer.check()?;
        let Some((first, more)) = inputs.sources.split_first() else {
            return Err(Error::MissingInput { input: "src" });
        };
        let shape =
            dst_shape(&LayerShape::new(layer), first.shape(), more.iter().map(|s| s.shape()))?;
        let shape = shape.as_slice();
        let (n, channels) = (shape[0], shape[1]);

        let views: Vec<_> = inputs.sources.iter().map(|s| s.mapv(f64::from)).collect();
        let views: Vec<_> = views.iter().map(|s| s.view()).collect();
        let src = concatenate(Axis(1), &views).expect("shapes were compared above");
        let src = kept(src.view(), layer.stride).to_owned();
        let positions: usize = shape[2..].iter().product();
        let total = src.shape()[1];
        let src = src.to_shape((n, total, positions)).expect("axes are kept in order").to_owned();

        let optional = [
            ("residual", &inputs.residual, layer.has_residual(), shape),
            ("gate", &inputs.gate, layer.has_gate(), &[n, layer.c_in()]),
        ];
        for (input, tensor, wanted, expected) in optional {
            let got = tensor.as_ref().map(|tensor| match input {
                "gate" => without_trailing_ones(tensor.shape()),
                _ => tensor.shape(),
            });
            match got {
                None if wanted => return Err(Error::MissingInput { input }),
                Some(_) if !wanted => return Err(Error::UnexpectedInput { input }),
                Some(got) if got != expected => {
                    let (expected, got) = (expected.to_vec(), got.to_vec());
                    return Err(Error::Shape { tensor: input, expected, got });
                }
                _ => {}
            }
        }
        let convolved = layer.partial.clone().unwrap_or(0..total);
        let rows = convolved.start..convolved.start + layer.c_out();
        let gate = inputs.gate.as_ref().map(|gate| {
            let gate = gate.to_shape((n, layer.c_in())).expect("compared above");
            gate.mapv(f64::from)
        });
        let residual = inputs.residual.as_ref().map(|residual| {
            let residual = residual.to_shape((n, channels, positions)).expect("the same axes");
            residual.slice_axis(Axis(1), Slice::from(rows.clone())).mapv(f64::from)
        });
        Ok(Call { src, gate, residual, shape: shape.to_vec(), convolved })
    }

    fn run(&self, layer: &Pointwise, statistics: Statistics) -> Tape {
        let mut x = self.src.slice_axis(Axis(1), Slice::from(self.convolved.clone())).to_owned();
        let mut source = Vec::new();
        for stage in &layer.source_stages {
            let input = x.clone();
            match stage {
                SourceStage::Affine { scale, shift } => {
                    each(&mut x, |_, c, _, x| x * f64::from(scale[c]) + f64::from(shift[c]));
                }
                SourceStage::BatchNorm(norm) => batch_norm(norm, statistics, &mut x),
                SourceStage::Activation(a) => each(&mut x, |_, _, _, x| activate(*a, x)),
                SourceStage::Gate => {
                    let gate = self.gate.as_ref().expect("checked above");
                    each(&mut x, |n, c, _, x| x * gate[[n, c]]);
                }
            }
            source.push(input);
        }
        let src = x;
        let (c_out, k) = layer.weight.dim();
        let rows = c_out / layer.groups;
        let (n, _, positions) = src.dim();
        let mut x = Array3::from_shape_fn((n, c_out, positions), |(n, row, p)| {
            let first = row / rows * k;
            (0..k).map(|i| f64::from(layer.weight[[row, i]]) * src[[n, first + i, p]]).sum()
        });
        let mut stages = Vec::new();
        for stage in &layer.stages {
            let input = x.clone();
            match stage {
                Stage::Bias(bias) => each(&mut x, |_, c, _, x| x + f64::from(bias[c])),
                Stage::BatchNorm(norm) => batch_norm(norm, statistics, &mut x),
                Stage::Activation(a) => each(&mut x, |_, _, _, x| activate(*a, x)),
                Stage::PRelu(slope) => each(&mut x, |_, c, _, x| {
                    let slope = f64::from(slope[if slope.len() == 1 { 0 } else { c }]);
                    if x < 0.0 { slope * x } else { x }
                }),
                Stage::Residual => x += self.residual.as_ref().expect("checked above"),
                Stage::LayerNorm(norm) => {
                    for mut values in normalised_together(norm.over, &mut x) {
                        let moments = Moments::of(values.iter(), norm.eps);
                        values.mapv_inplace(|x| (x - moments.mean) / moments.std);
                    }
                    if let Some((gamma, beta)) = &norm.affine {
                        each(&mut x, |_, c, _, x| x * f64::from(gamma[c]) + f64::from(beta[c]));
                    }
                }
                Stage::ChannelShuffle { groups } => {
                    let per_group = c_out / groups;
                    let from = |c: usize| c % groups * per_group + c / groups;
                    each(&mut x, |n, c, p, _| input[[n, from(c), p]]);
                }
            }
            stages.push(input);
        }
        Tape { source, src, stages, dst: x }
    }

    /// dst with what a partial convolution passes through.
    fn dst(&self, layer: &Pointwise, convolved: &Array3<f64>) -> ArrayD<f64> {
        let (start, c_out) = (self.convolved.start, layer.c_out());
        let (n, positions) = (self.shape[0], self.src.dim().2);
        let dst = Array3::from_shape_fn((n, self.shape[1], positions), |(n, c, p)| {
            if c < start {
                self.src[[n, c, p]]
            } else if c < start + c_out {
                convolved[[n, c - start, p]]
            } else {
                self.src[[n, c - c_out + self.convolved.len(), p]]
            }
        });
        dst.into_shape_with_order(IxDyn(&self.shape)).expect("the same number of elements")
    }
}

/// The positions that a stride keeps.
fn kept<T>(mut tensor: ArrayViewD<'_, T>, stride: usize) -> ArrayViewD<'_, T> {
    let step = stride.min(isize::MAX as usize) as isize;
    for axis in 2..tensor.ndim() {
        tensor.slice_axis_inplace(Axis(axis), Slice::new(0, None, step));
    }
    tensor
}

fn each(values: &mut Array3<f64>, f: impl Fn(usize, usize, usize, f64) -> f64) {
    values.indexed_iter_mut().for_each(|((n, c, p), x)| *x = f(n, c, p, *x));
}

fn batch_norm(norm: &BatchNorm, statistics: Statistics, x: &mut Array3<f64>) {
    for (c, mut values) in x.axis_iter_mut(Axis(1)).enumerate() {
        let moments = Moments::of_channel(norm, c, statistics, values.view());
        let (gamma, beta) = match &norm.affine {
            Some((gamma, beta)) => (f64::from(gamma[c]), f64::from(beta[c])),
            None => (1.0, 0.0),
        };
        values.mapv_inplace(|x| (x - moments.mean) / moments.std * gamma + beta);
    }
}

/// What a normalisation subtracts, and what it divides by.
struct Moments {
    mean: f64,
    std: f64,
    /// Without `eps`, biased.
    var: f64,
}

impl Moments {
    fn of<'v>(values: impl Iterator<Item = &'v f64> + Clone, eps: f32) -> Moments {
        let count = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / count;
        let var = values.map(|x| (x - mean).powi(2)).sum::<f64>() / count;
        Moments { mean, var, std: (var + f64::from(eps)).sqrt() }
    }

    /// A channel's, of the values at hand or running ones.
    fn of_channel(
        norm: &BatchNorm,
        channel: usize,
        statistics: Statistics,
        values: ArrayView2<'_, f64>,
    ) -> Moments {
        match statistics {
            Statistics::Batch => Moments::of(values.iter(), norm.eps),
            Statistics::Frozen => {
                let mean = f64::from(norm.running_mean[channel]);
                let var = f64::from(norm.running_var[channel]);
                Moments { mean, var, std: (var + f64::from(norm.eps)).sqrt() }
            }
        }
    }
}

/// The sets of values of a layer norm that share a mean and a variance.
fn normalised_together(over: NormOver, x: &mut Array3<f64>) -> Vec<ArrayViewMut3<'_, f64>> {
    let positions = x.dim().2;
    let mut sets = Vec::new();
    for sample in x.axis_chunks_iter_mut(Axis(0), 1) {
        match over {
            NormOver::All => sets.push(sample),
            NormOver::Channels => {
                let mut rest = sample;
                for _ in 0..positions {
                    let (position, later) = rest.split_at(Axis(2), 1);
                    sets.push(position);
                    rest = later;
                }
            }
        }
    }
    sets
}

/// Runs a quantised layer on integers: sums in i64, the rest in f64, with multipliers that are
/// rounded to f32 as the [specification](crate::quantized) says. Within one step of it, and equal
/// where no value lies beside a half.
///
/// # Shapes
/// `src [n, c_in, …spatial]` and `residual`, of the result's shape, hold the integers of their
/// tensors; the result `[n, c_out, …ceil(spatial / stride)]` holds those of dst, or real numbers
/// where the layer has no quantisation for it.
///
/// # Errors
/// As the prepared layer's `forward`; its types are not checked.
pub fn forward_quantized(
    layer: &Quantized,
    src: ArrayViewD<'_, i32>,
    residual: Option<ArrayViewD<'_, i32>>,
) -> Result<ArrayD<f64>> {
    layer.check()?;
    let shape = dst_shape(&layer.shape(), src.shape(), std::iter::empty())?;
    let got = residual.as_ref().map(|residual| residual.shape());
    check_residual(layer.residual.is_some(), got, shape.as_slice())?;
    let steps = src.mapv(|q| i64::from(q) - i64::from(layer.src.zero_point));
    let weight = layer.weight.mapv(i64::from);
    let sums = sums(&weight, layer.groups, layer.stride, steps.view(), shape.as_slice());
    let scale = f64::from(layer.dst_scale());
    let clip =
        |x: f64, (lo, hi): (f32, f32)| x.max(f64::from(lo) / scale).min(f64::from(hi) / scale);
    let mut dst = sums.mapv(|sum| sum as f64);
    for (at, x) in dst.indexed_iter_mut() {
        let sum = *x + f64::from(layer.bias_of(at[1]));
        *x = clip(sum * f64::from(layer.multiplier(at[1])), layer.clips[0]);
        if let (Some(residual), Some(quantization)) = (&residual, layer.residual) {
            let steps = f64::from(residual[&at]) - f64::from(quantization.zero_point);
            *x = clip(*x + steps * f64::from(layer.residual_multiplier()), layer.clips[1]);
        }
        if let Some(dst) = layer.dst {
            *x = (x.round_ties_even() + f64::from(dst.zero_point))
                .clamp(dst.int8.min().into(), dst.int8.max().into());
        }
    }
    Ok(dst)
}

/// Whether a residual is there if it is wanted, and of dst's shape.
fn check_residual(wanted: bool, got: Option<&[usize]>, shape: &[usize]) -> Result<()> {
    match (wanted, got) {
        (true, None) => Err(Error::MissingInput { input: "residual" }),
        (false, Some(_)) => Err(Error::UnexpectedInput { input: "residual" }),
        (_, Some(got)) => expect_shape("residual", got, shape),
        (false, None) => Ok(()),
    }
}

/// `Σ_k weight[c, k] · steps[k]` at the positions that the stride keeps.
fn sums<T: Copy + Mul<Output = T> + Sum>(
    weight: &Array2<T>,
    groups: usize,
    stride: usize,
    steps: ArrayViewD<'_, T>,
    shape: &[usize],
) -> ArrayD<T> {
    let (c_out, k) = weight.dim();
    let (rows, positions) = (c_out / groups, shape[2..].iter().product());
    let steps = kept(steps, stride).to_owned();
    let steps = steps.to_shape((shape[0], k * groups, positions)).expect("axes are kept in order");
    let sums = Array3::from_shape_fn((shape[0], c_out, positions), |(n, row, p)| {
        let first = row / rows * k;
        (0..k).map(|i| weight[[row, i]] * steps[[n, first + i, p]]).sum()
    });
    sums.into_shape_with_order(IxDyn(shape)).expect("the same number of elements")
}

/// Runs a layer of 8-bit floats in f64, with multipliers that are rounded to f32 as the
/// [specification](QuantizedFp8) says, up to the last step: dst is not yet rounded to fp8, nor saturated.
///
/// # Shapes
/// `src [n, c_in, …spatial]` and `residual`, of the result's shape, hold the numbers of their tensors; the
/// result `[n, c_out, …ceil(spatial / stride)]` holds what the layer rounds to those of dst, or real
/// numbers where it has no quantisation for it.
///
/// # Errors
/// As the prepared layer's `forward`; its types are not checked.
pub fn forward_fp8(
    layer: &QuantizedFp8,
    src: ArrayViewD<'_, f64>,
    residual: Option<ArrayViewD<'_, f64>>,
) -> Result<ArrayD<f64>> {
    layer.check()?;
    let shape = dst_shape(&layer.shape(), src.shape(), std::iter::empty())?;
    let got = residual.as_ref().map(|residual| residual.shape());
    check_residual(layer.residual.is_some(), got, shape.as_slice())?;
    let values = layer.weight_type.values();
    let weight = layer.weight.mapv(|bits| f64::from(values[usize::from(bits)]));
    let mut dst = sums(&weight, layer.groups, layer.stride, src, shape.as_slice());
    let scale = f64::from(layer.dst_scale());
    let clip = |x: f64, (lo, hi): (f32, f32)| {
        if x.is_nan() { x } else { x.max(f64::from(lo) / scale).min(f64::from(hi) / scale) }
    };
    for (at, x) in dst.indexed_iter_mut() {
        let (multiplier, shift) = (layer.multiplier(at[1]), layer.shift(at[1]));
        *x = clip(*x * f64::from(multiplier) + f64::from(shift), layer.clips[0]);
        if let Some(residual) = &residual {
            *x = clip(*x + residual[&at] * f64::from(layer.residual_multiplier()), layer.clips[1]);
        }
    }
    Ok(dst)
}

/// Runs a layer whose sources are quantised in each call: the source's scales, zero points and integers
/// as the [specification](DynamicQuantized) says, sums exact, and then in f64.
///
/// # Shapes
/// `src [n, c_in, …spatial]` and `residual`, of the result's shape; the result
/// `[n, c_out, …ceil(spatial / stride)]`.
///
/// # Errors
/// As the prepared layer's `forward`.
pub fn forward_dynamic(
    layer: &DynamicQuantized,
    src: ArrayViewD<'_, f32>,
    residual: Option<ArrayViewD<'_, f32>>,
) -> Result<ArrayD<f64>> {
    layer.check()?;
    let shape = dst_shape(&layer.shape(), src.shape(), std::iter::empty())?;
    let got = residual.as_ref().map(|residual| residual.shape());
    check_residual(layer.residual, got, shape.as_slice())?;
    // The index of a value's range among as many as the source has.
    let at = |index: &IxDyn| {
        let mut at = index.clone();
        let from = match layer.per {
            Per::Tensor => 0,
            Per::Sample => 1,
            Per::Position => {
                at[1] = 0;
                src.ndim()
            }
        };
        (from..src.ndim()).for_each(|axis| at[axis] = 0);
        at
    };
    let mut ranges = ArrayD::from_elem(src.raw_dim(), (0.0f32, 0.0f32, true));
    for (index, &x) in src.indexed_iter() {
        let (min, max, finite) = &mut ranges[at(&index)];
        (*min, *max, *finite) = (min.min(x), max.max(x), *finite && x.is_finite());
    }
    let quantizations = ranges.mapv(|(min, max, finite)| {
        let scale = match (max - min) / 255.0 {
            _ if !finite => f32::NAN,
            _ if min == max => 1.0,
            f32::INFINITY => max / 255.0 - min / 255.0,
            scale => scale.max(f32::MIN_POSITIVE),
        };
        (scale, (-min / scale).min(255.0).round_ties_even())
    });
    let mut steps = ArrayD::zeros(src.raw_dim());
    for ((index, &x), steps) in src.indexed_iter().zip(&mut steps) {
        let (scale, zero_point) = quantizations[at(&index)];
        let q = ((x / scale).round_ties_even() + zero_point).clamp(0.0, 255.0);
        *steps = (q - zero_point) as i64;
    }
    let weight = layer.weight.mapv(i64::from);
    let sums = sums(&weight, layer.groups, layer.stride, steps.view(), shape.as_slice());
    let clip = |x: f64, (lo, hi): (f32, f32)| {
        if x.is_nan() { x } else { x.max(lo.into()).min(hi.into()) }
    };
    let mut dst = sums.mapv(|sum| sum as f64);
    for (index, x) in dst.indexed_iter_mut() {
        let (channel, mut from) = (index[1], index.clone());
        (2..src.ndim()).for_each(|axis| from[axis] *= layer.stride);
        let (scale, _) = quantizations[at(&from)];
        let bias = layer.bias.as_ref().map_or(0.0, |bias| bias[channel]);
        let scale = scale * layer.weight_scale[channel];
        *x = clip(*x * f64::from(scale) + f64::from(bias), layer.clips[0]);
        if let Some(residual) = &residual {
            *x = clip(*x + f64::from(residual[&index]), layer.clips[1]);
        }
    }
    Ok(dst)
}

/// One activation in f64, by PyTorch's formula: NaN in gives NaN out.
pub fn activate(activation: Activation, x: f64) -> f64 {
    let clip = |x: f64, lo: f64, hi: f64| {
        if x.is_nan() { x } else { x.max(lo).min(hi) }
    };
    let softplus = |x: f64| if x > 20.0 { x } else { x.exp().ln_1p() };
    match activation {
        Activation::Relu => clip(x, 0.0, f64::INFINITY),
        Activation::Relu6 => clip(x, 0.0, 6.0),
        Activation::Clip { lo, hi } => clip(x, f64::from(lo), f64::from(hi)),
        Activation::LeakyRelu { alpha } => {
            if x < 0.0 {
                x * f64::from(alpha)
            } else {
                x
            }
        }
        Activation::Elu { alpha } => {
            if x > 0.0 {
                x
            } else {
                f64::from(alpha) * x.exp_m1()
            }
        }
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Tanh => x.tanh(),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * erfc(-x / std::f64::consts::SQRT_2),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::HardSigmoid => clip(x + 3.0, 0.0, 6.0) / 6.0,
        Activation::HardSwish => x * clip(x + 3.0, 0.0, 6.0) / 6.0,
        Activation::Softplus => softplus(x),
        Activation::Mish => x * softplus(x).tanh(),
    }
}

/// The complementary error function to f64 accuracy: the Taylor series of erf near zero
/// (Abramowitz & Stegun 7.1.6), the continued fraction of erfc (7.1.14) beyond.
fn erfc(x: f64) -> f64 {
    let z = x.abs();
    if x.is_nan() {
        return x;
    }
    if z < 2.5 {
        // erf(z) = 2/√π · e^(−z²) · Σ 2^n z^(2n+1) / (1·3·5…(2n+1))
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * z * z / (2.0 * n + 1.0);
            sum += term;
        }
        let erf = sum * (-z * z).exp() * std::f64::consts::FRAC_2_SQRT_PI;
        return if x < 0.0 { 1.0 + erf } else { 1.0 - erf };
    }
    // √π e^(z²) erfc(z) = 1/(z + (1/2)/(z + 1/(z + (3/2)/(z + …))))
    let mut fraction = z;
    for i in (1..=120).rev() {
        fraction = z + f64::from(i) / 2.0 / fraction;
    }
    let tail = if z.is_infinite() {
        0.0
    } else {
        (-z * z).exp() / fraction * (std::f64::consts::FRAC_2_SQRT_PI / 2.0)
    };
    if x < 0.0 { 2.0 - tail } else { tail }
}
