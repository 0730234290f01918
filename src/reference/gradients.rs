//! The gradients of the operator in f64, stage by stage.

use ndarray::{Array1, Array2, Array3, ArrayD, ArrayViewD, Axis, IxDyn, Slice};

use super::{Call, Inputs, Moments, activate, each, erfc, kept, normalised_together};
use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::stages::{Activation, BatchNorm, LayerNorm, SourceStage, Stage};
use crate::train::{Statistics, name};

/// Everything that a forward and a backward pass of a layer in training give.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// The forward pass' result.
    pub dst: ArrayD<f64>,
    /// One per source, of its shape.
    pub d_sources: Vec<ArrayD<f64>>,
    /// dst's shape; zero in the channels that a partial convolution passes through.
    pub d_residual: Option<ArrayD<f64>>,
    /// `[n, c_in]`.
    pub d_gate: Option<Array2<f64>>,
    /// Of each parameter, by its [`name`](crate::train::name), row-major.
    pub parameters: Vec<(&'static str, Vec<f64>)>,
    /// The mean and the biased variance of the batch at each batch norm, under the names of the
    /// running statistics; none where statistics are frozen.
    pub statistics: Vec<(&'static str, Vec<f64>)>,
}

impl Gradients {
    /// The gradient of a parameter.
    pub fn parameter(&self, name: &str) -> Option<&[f64]> {
        self.parameters.iter().find(|(other, _)| *other == name).map(|(_, values)| &values[..])
    }

    /// The statistics of the batch under the name of a running statistic.
    pub fn statistic(&self, name: &str) -> Option<&[f64]> {
        self.statistics.iter().find(|(other, _)| *other == name).map(|(_, values)| &values[..])
    }

    fn keep(&mut self, name: &'static str, values: impl IntoIterator<Item = f64>) {
        self.parameters.push((name, values.into_iter().collect()));
    }
}

/// Runs a layer forward and backward in f64, with the gradient `d_dst` of a loss by dst.
///
/// # Errors
/// As [`forward`](super::forward), and [`Error::Shape`] if `d_dst` does not have dst's shape.
pub fn backward(
    layer: &Pointwise,
    inputs: &Inputs<'_>,
    statistics: Statistics,
    d_dst: ArrayViewD<'_, f32>,
) -> Result<Gradients> {
    let call = Call::new(layer, inputs)?;
    if d_dst.shape() != call.shape {
        let (expected, got) = (call.shape.clone(), d_dst.shape().to_vec());
        return Err(Error::Shape { tensor: "d_dst", expected, got });
    }
    let tape = call.run(layer, statistics);
    let mut out = Gradients {
        dst: call.dst(layer, &tape.dst),
        d_sources: Vec::new(),
        d_residual: None,
        d_gate: None,
        parameters: Vec::new(),
        statistics: Vec::new(),
    };
    let (n, total, positions) = call.src.dim();
    let c_out = layer.c_out();
    let (start, end) = (call.convolved.start, call.convolved.end);
    let d_dst = d_dst.to_shape((n, call.shape[1], positions)).expect("compared above");
    let d_dst = d_dst.mapv(f64::from);

    let mut d = d_dst.slice_axis(Axis(1), Slice::from(start..start + c_out)).to_owned();
    for (stage, x) in layer.stages.iter().zip(&tape.stages).rev() {
        match stage {
            Stage::Bias(_) => out.keep(name::BIAS, per_channel(&d, |_, _, _, d| d)),
            Stage::BatchNorm(norm) => {
                let names = [name::GAMMA, name::BETA, name::RUNNING_MEAN, name::RUNNING_VAR];
                batch_norm(norm, statistics, x, &mut d, names, &mut out);
            }
            Stage::Activation(a) => each(&mut d, |n, c, p, d| d * slope(*a, x[[n, c, p]])),
            Stage::PRelu(slopes) => {
                let negative = |n, c, p, d: f64| {
                    let x: f64 = x[[n, c, p]];
                    if x > 0.0 { 0.0 } else { d * x }
                };
                let sums = per_channel(&d, negative);
                match slopes.len() == 1 {
                    true => out.keep(name::SLOPE, [sums.iter().sum()]),
                    false => out.keep(name::SLOPE, sums),
                }
                each(&mut d, |n, c, p, d| {
                    let slope = f64::from(slopes[if slopes.len() == 1 { 0 } else { c }]);
                    if x[[n, c, p]] > 0.0 { d } else { d * slope }
                });
            }
            Stage::Residual => {
                let mut whole = Array3::zeros(d_dst.dim());
                whole.slice_axis_mut(Axis(1), Slice::from(start..start + c_out)).assign(&d);
                let shape = IxDyn(&call.shape);
                out.d_residual = Some(whole.into_shape_with_order(shape).expect("dst's shape"));
            }
            Stage::LayerNorm(norm) => layer_norm(norm, x, &mut d, &mut out),
            Stage::ChannelShuffle { groups } => {
                let (after, per_group) = (d.clone(), c_out / groups);
                let to = |c: usize| c % per_group * groups + c / per_group;
                each(&mut d, |n, c, p, _| after[[n, to(c), p]]);
            }
        }
    }

    // The convolution.
    let k = layer.weight.ncols();
    let rows = c_out / layer.groups;
    let d_weight = Array2::from_shape_fn((c_out, k), |(row, i)| {
        let channel = row / rows * k + i;
        let of_sample = |n| (0..positions).map(move |p| (n, p));
        let terms = (0..n).flat_map(of_sample);
        terms.map(|(n, p)| d[[n, row, p]] * tape.src[[n, channel, p]]).sum::<f64>()
    });
    out.keep(name::WEIGHT, d_weight);
    let mut d = Array3::from_shape_fn(tape.src.dim(), |(n, channel, p)| {
        let (group, i) = (channel / k, channel % k);
        let of_group = group * rows..(group + 1) * rows;
        of_group.map(|row| f64::from(layer.weight[[row, i]]) * d[[n, row, p]]).sum()
    });

    for (stage, x) in layer.source_stages.iter().zip(&tape.source).rev() {
        match stage {
            SourceStage::Affine { scale, .. } => {
                out.keep(name::SRC_SCALE, per_channel(&d, |n, c, p, d| d * x[[n, c, p]]));
                out.keep(name::SRC_SHIFT, per_channel(&d, |_, _, _, d| d));
                each(&mut d, |_, c, _, d| d * f64::from(scale[c]));
            }
            SourceStage::BatchNorm(norm) => {
                let names = [
                    name::SRC_GAMMA,
                    name::SRC_BETA,
                    name::SRC_RUNNING_MEAN,
                    name::SRC_RUNNING_VAR,
                ];
                batch_norm(norm, statistics, x, &mut d, names, &mut out);
            }
            SourceStage::Activation(a) => each(&mut d, |n, c, p, d| d * slope(*a, x[[n, c, p]])),
            SourceStage::Gate => {
                let gate = call.gate.as_ref().expect("checked by the call");
                let mut d_gate = Array2::zeros(gate.dim());
                d.indexed_iter().for_each(|((n, c, p), d)| d_gate[[n, c]] += d * x[[n, c, p]]);
                out.d_gate = Some(d_gate);
                each(&mut d, |n, c, _, d| d * gate[[n, c]]);
            }
        }
    }

    // What is passed through, and the positions that the stride skips.
    let d_src = Array3::from_shape_fn((n, total, positions), |(n, c, p)| {
        if c < start {
            d_dst[[n, c, p]]
        } else if c < end {
            d[[n, c - start, p]]
        } else {
            d_dst[[n, c - (end - start) + c_out, p]]
        }
    });
    let mut first = 0;
    for source in &inputs.sources {
        let channels = source.shape()[1];
        let mut d_source = ArrayD::<f64>::zeros(source.shape());
        let part = d_src.slice_axis(Axis(1), Slice::from(first..first + channels));
        let mut shape = call.shape.clone();
        shape[1] = channels;
        let part = part.to_shape(IxDyn(&shape)).expect("the same positions");
        let mut to = d_source.view_mut();
        for axis in 2..to.ndim() {
            let step = layer.stride.min(isize::MAX as usize) as isize;
            to.slice_axis_inplace(Axis(axis), Slice::new(0, None, step));
        }
        debug_assert_eq!(to.shape(), kept(source.view(), layer.stride).shape());
        to.assign(&part);
        out.d_sources.push(d_source);
        first += channels;
    }
    Ok(out)
}

/// The sum of `f` over samples and positions.
fn per_channel(d: &Array3<f64>, f: impl Fn(usize, usize, usize, f64) -> f64) -> Array1<f64> {
    let mut sums = Array1::zeros(d.dim().1);
    d.indexed_iter().for_each(|((n, c, p), &d)| sums[c] += f(n, c, p, d));
    sums
}

/// `d` by the normalisation's input. With `x̂ = (x − mean) / std` and `g = d · gamma`, over the
/// values of a channel: `(g − mean(g) − x̂ · mean(g x̂)) / std`; with frozen statistics `g / std`.
fn batch_norm(
    norm: &BatchNorm,
    statistics: Statistics,
    x: &Array3<f64>,
    d: &mut Array3<f64>,
    [gamma_name, beta_name, mean_name, var_name]: [&'static str; 4],
    out: &mut Gradients,
) {
    let channels = x.dim().1;
    let [mut d_gamma, mut d_beta, mut mean, mut var] =
        std::array::from_fn(|_| Vec::with_capacity(channels));
    for (c, mut d) in d.axis_iter_mut(Axis(1)).enumerate() {
        let x = x.index_axis(Axis(1), c);
        let moments = Moments::of_channel(norm, c, statistics, x);
        let normalised = x.mapv(|x| (x - moments.mean) / moments.std);
        d_gamma.push((&d * &normalised).sum());
        d_beta.push(d.sum());
        mean.push(moments.mean);
        var.push(moments.var);
        let gamma = norm.affine.as_ref().map_or(1.0, |(gamma, _)| f64::from(gamma[c]));
        d.mapv_inplace(|d| d * gamma);
        if statistics == Statistics::Batch {
            let count = d.len() as f64;
            let (mean, along) = (d.sum() / count, (&d * &normalised).sum() / count);
            d.zip_mut_with(&normalised, |d, x| *d = *d - mean - x * along);
        }
        d.mapv_inplace(|d| d / moments.std);
    }
    if norm.affine.is_some() {
        out.keep(gamma_name, d_gamma);
        out.keep(beta_name, d_beta);
    }
    if statistics == Statistics::Batch {
        out.statistics.push((mean_name, mean));
        out.statistics.push((var_name, var));
    }
}

/// As [`batch_norm`], over the values that share statistics.
fn layer_norm(norm: &LayerNorm, x: &Array3<f64>, d: &mut Array3<f64>, out: &mut Gradients) {
    let mut normalised = x.clone();
    let mut stds = Vec::new();
    for mut values in normalised_together(norm.over, &mut normalised) {
        let moments = Moments::of(values.iter(), norm.eps);
        values.mapv_inplace(|x| (x - moments.mean) / moments.std);
        stds.push(moments.std);
    }
    if let Some((gamma, _)) = &norm.affine {
        out.keep(name::LN_GAMMA, per_channel(d, |n, c, p, d| d * normalised[[n, c, p]]));
        out.keep(name::LN_BETA, per_channel(d, |_, _, _, d| d));
        each(d, |_, c, _, d| d * f64::from(gamma[c]));
    }
    let normalised = normalised_together(norm.over, &mut normalised);
    let sets = normalised_together(norm.over, d);
    for ((mut d, x), std) in sets.into_iter().zip(normalised).zip(stds) {
        let count = d.len() as f64;
        let (mean, along) = (d.sum() / count, (&d * &x).sum() / count);
        d.zip_mut_with(&x, |d, x| *d = (*d - mean - x * along) / std);
    }
}

/// The derivative of an activation in f64, PyTorch's choice where there is none: zero at the bounds
/// of ReLU, ReLU6, clip (as `hardtanh`), hard-sigmoid and at -3 of hard-swish; `alpha` at zero.
pub fn slope(activation: Activation, x: f64) -> f64 {
    // NaN passes a gradient on, as in PyTorch's comparisons.
    let inside = |lo: f64, hi: f64| if x <= lo || x >= hi { 0.0 } else { 1.0 };
    let sigmoid = |x: f64| activate(Activation::Sigmoid, x);
    match activation {
        Activation::Relu => inside(0.0, f64::INFINITY),
        Activation::Relu6 => inside(0.0, 6.0),
        Activation::Clip { lo, hi } => inside(f64::from(lo), f64::from(hi)),
        Activation::LeakyRelu { alpha } => {
            if x > 0.0 {
                1.0
            } else {
                f64::from(alpha)
            }
        }
        Activation::Elu { alpha } => {
            if x <= 0.0 {
                f64::from(alpha) * x.exp()
            } else {
                1.0
            }
        }
        Activation::Sigmoid => sigmoid(x) * sigmoid(-x),
        Activation::Tanh => 1.0 - x.tanh().powi(2),
        Activation::Silu => sigmoid(x) * (1.0 + x * sigmoid(-x)),
        Activation::Gelu => {
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            0.5 * erfc(-x / std::f64::consts::SQRT_2) + x * density
        }
        Activation::GeluTanh => {
            let scale = (2.0 / std::f64::consts::PI).sqrt();
            let inner = scale * (x + 0.044715 * x * x * x);
            let d_inner = scale * (1.0 + 3.0 * 0.044715 * x * x);
            let tanh = inner.tanh();
            0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * d_inner
        }
        Activation::HardSigmoid => inside(-3.0, 3.0) / 6.0,
        Activation::HardSwish => {
            if x <= -3.0 {
                0.0
            } else if x < 3.0 {
                x / 3.0 + 0.5
            } else {
                1.0
            }
        }
        Activation::Softplus => {
            if x > 20.0 {
                1.0
            } else {
                sigmoid(x)
            }
        }
        Activation::Mish => {
            let tanh = activate(Activation::Softplus, x).tanh();
            tanh + x * (1.0 - tanh * tanh) * sigmoid(x)
        }
    }
}
