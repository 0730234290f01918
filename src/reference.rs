//! The operator in f64, one scalar at a time: the specification that every kernel is tested
//! against. Obvious rather than fast.
//!
//! It interprets the description as it is written: nothing is folded, merged or reordered.

use ndarray::{ArrayD, ArrayViewD, Axis, IxDyn, concatenate};

use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::problem::{LayerShape, dst_shape, without_trailing_ones};
use crate::quantized::Quantized;
use crate::stages::{Activation, NormOver, SourceStage, Stage};

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
    layer.check()?;
    let Some((first, more)) = inputs.sources.split_first() else {
        return Err(Error::MissingInput { input: "src" });
    };
    let shape = dst_shape(&LayerShape::new(layer), first.shape(), more.iter().map(|s| s.shape()))?;
    let shape = shape.as_slice();
    let (n, channels) = (shape[0], shape[1]);

    let views: Vec<_> = inputs.sources.iter().map(|s| s.mapv(f64::from)).collect();
    let views: Vec<_> = views.iter().map(|s| s.view()).collect();
    let mut src = concatenate(Axis(1), &views).expect("shapes were compared above");
    for axis in 2..src.ndim() {
        let step = layer.stride.min(isize::MAX as usize) as isize;
        let step = ndarray::Slice::new(0, None, step);
        src = src.slice_axis(Axis(axis), step).to_owned();
    }
    let positions: usize = shape[2..].iter().product();
    let total = src.shape()[1];
    let src = src.to_shape((n, total, positions)).expect("axes are kept in order").to_owned();

    let (start, end) = layer.partial.as_ref().map_or((0, total), |range| (range.start, range.end));
    let (c_in, c_out) = (layer.c_in(), layer.c_out());
    let (k, rows) = (c_in / layer.groups, c_out / layer.groups);
    let optional = [
        ("residual", &inputs.residual, layer.has_residual(), shape),
        ("gate", &inputs.gate, layer.has_gate(), &[n, c_in]),
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
    let gate = inputs.gate.as_ref().map(|gate| gate.to_shape((n, c_in)).expect("compared above"));
    let residual = inputs
        .residual
        .as_ref()
        .map(|r| r.to_shape((n, channels, positions)).expect("the same axes").to_owned());

    let mut dst = ndarray::Array3::<f64>::zeros((n, channels, positions));
    for sample in 0..n {
        // values[c][p], first of src, then of dst.
        let mut values: Vec<Vec<f64>> =
            (start..end).map(|c| (0..positions).map(|p| src[[sample, c, p]]).collect()).collect();
        for stage in &layer.source_stages {
            for (c, row) in values.iter_mut().enumerate() {
                for x in row {
                    *x = match stage {
                        SourceStage::Affine { scale, shift } => {
                            *x * f64::from(scale[c]) + f64::from(shift[c])
                        }
                        SourceStage::BatchNorm(norm) => {
                            let (scale, shift) = norm.fold(c);
                            *x * scale + shift
                        }
                        SourceStage::Activation(a) => activate(*a, *x),
                        SourceStage::Gate => {
                            *x * gate.as_ref().map_or(f64::NAN, |gate| f64::from(gate[[sample, c]]))
                        }
                    };
                }
            }
        }
        let mut values: Vec<Vec<f64>> = (0..c_out)
            .map(|row| {
                let first = row / rows * k;
                let dot = |p: usize| {
                    (0..k).map(|i| f64::from(layer.weight[[row, i]]) * values[first + i][p]).sum()
                };
                (0..positions).map(dot).collect()
            })
            .collect();
        for stage in &layer.stages {
            match stage {
                Stage::Bias(bias) => each(&mut values, |c, _, x| x + f64::from(bias[c])),
                Stage::BatchNorm(norm) => each(&mut values, |c, _, x| {
                    let (scale, shift) = norm.fold(c);
                    x * scale + shift
                }),
                Stage::Activation(a) => each(&mut values, |_, _, x| activate(*a, x)),
                Stage::PRelu(slope) => each(&mut values, |c, _, x| {
                    let slope = f64::from(slope[if slope.len() == 1 { 0 } else { c }]);
                    if x < 0.0 { slope * x } else { x }
                }),
                Stage::Residual => each(&mut values, |c, p, x| {
                    x + residual.as_ref().map_or(f64::NAN, |r| f64::from(r[[sample, start + c, p]]))
                }),
                Stage::LayerNorm(norm) => {
                    match norm.over {
                        NormOver::Channels => {
                            for p in 0..positions {
                                let column: Vec<f64> = values.iter().map(|row| row[p]).collect();
                                let (mean, std) = mean_and_std(&column, norm.eps);
                                values.iter_mut().for_each(|row| row[p] = (row[p] - mean) / std);
                            }
                        }
                        NormOver::All => {
                            let (mean, std) = mean_and_std(&values.concat(), norm.eps);
                            each(&mut values, |_, _, x| (x - mean) / std);
                        }
                    }
                    if let Some((gamma, beta)) = &norm.affine {
                        each(&mut values, |c, _, x| x * f64::from(gamma[c]) + f64::from(beta[c]));
                    }
                }
                Stage::ChannelShuffle { groups } => {
                    let per_group = c_out / groups;
                    values = (0..c_out)
                        .map(|c| values[c % groups * per_group + c / groups].clone())
                        .collect();
                }
            }
        }
        for c in 0..channels {
            for p in 0..positions {
                dst[[sample, c, p]] = if c < start {
                    src[[sample, c, p]]
                } else if c < start + c_out {
                    values[c - start][p]
                } else {
                    src[[sample, c - c_out + (end - start), p]]
                };
            }
        }
    }
    Ok(dst.into_shape_with_order(IxDyn(shape)).expect("the same number of elements"))
}

fn each(values: &mut [Vec<f64>], f: impl Fn(usize, usize, f64) -> f64) {
    for (c, row) in values.iter_mut().enumerate() {
        for (p, x) in row.iter_mut().enumerate() {
            *x = f(c, p, *x);
        }
    }
}

fn mean_and_std(values: &[f64], eps: f32) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let var = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    (mean, (var + f64::from(eps)).sqrt())
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
    match (layer.residual, &residual) {
        (Some(_), None) => return Err(Error::MissingInput { input: "residual" }),
        (None, Some(_)) => return Err(Error::UnexpectedInput { input: "residual" }),
        (_, Some(residual)) if residual.shape() != shape.as_slice() => {
            let (expected, got) = (shape.as_slice().to_vec(), residual.shape().to_vec());
            return Err(Error::Shape { tensor: "residual", expected, got });
        }
        _ => {}
    }
    let (c_out, k) = layer.weight.dim();
    let rows = c_out / layer.groups;
    let scale = f64::from(layer.dst_scale());
    let clip =
        |x: f64, (lo, hi): (f32, f32)| x.max(f64::from(lo) / scale).min(f64::from(hi) / scale);
    Ok(ArrayD::from_shape_fn(shape.as_slice(), |at| {
        let channel = at[1];
        let mut from = at.clone();
        for axis in 2..shape.as_slice().len() {
            from[axis] *= layer.stride;
        }
        let products = (0..k).map(|i| {
            from[1] = channel / rows * k + i;
            i64::from(layer.weight[[channel, i]]) * i64::from(src[&from] - layer.src.zero_point)
        });
        let sum = products.sum::<i64>() + i64::from(layer.bias_of(channel));
        let mut x = clip(sum as f64 * f64::from(layer.multiplier(channel)), layer.clips[0]);
        if let (Some(residual), Some(quantization)) = (&residual, layer.residual) {
            let steps = f64::from(residual[&at] - quantization.zero_point);
            x = clip(x + steps * f64::from(layer.residual_multiplier()), layer.clips[1]);
        }
        match layer.dst {
            Some(dst) => (x.round_ties_even() + f64::from(dst.zero_point))
                .clamp(dst.int8.min().into(), dst.int8.max().into()),
            None => x,
        }
    }))
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
