//! The elementwise stages before or after the convolution, as the passes of every device replay them.
//!
//! Nothing between the stages is kept: what a derivative needs is computed again from the chain's
//! input, while a part of it is at hand. A normalisation over more than a position is a
//! *barrier*: what follows it can only run when its sums over the whole batch (or sample) are
//! known, which takes a pass of its own.

use crate::dtype::DType;
use crate::epilogue::{Lowered, SourceStep};
use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::moments::Moments;
use crate::stages::{Activation, BatchNorm, NormOver, SourceStage, Stage};
use crate::train::{Accumulate, Grads, Statistics, name};

/// One stage; parameters are per row of the convolution's result (or per input channel).
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// `(x - hi) * scale + shift`.
    Linear(Linear),
    Activation(Activation),
    PRelu {
        slope: Vec<f32>,
    },
    Residual,
    Gate,
    LayerNorm {
        over: NormOver,
        affine: Option<(Vec<f32>, Vec<f32>)>,
        eps: f32,
    },
}

/// Bias, affine and batch norm. The gradients are `Σ d` by the shift's parameter and
/// `(Σ d (x - hi) - lo Σ d) * inv` by the scale's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Linear {
    /// What is subtracted first: the mean, rounded, or zero.
    pub hi: Vec<f32>,
    /// What rounding the mean took away.
    pub lo: Vec<f32>,
    /// `1 / sqrt(var + eps)`, or one.
    pub inv: Vec<f32>,
    pub gamma: Vec<f32>,
    pub beta: Vec<f32>,
    /// `gamma * inv` and `beta - lo * gamma * inv`.
    pub scale: Vec<f32>,
    pub shift: Vec<f32>,
    /// Whether the mean and the variance are the batch's.
    pub batch: Option<Batch>,
    /// The parameters whose gradients it has: the scale's, the shift's.
    pub names: [Option<&'static str>; 2],
}

/// What a batch norm is called, and its `eps`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    pub eps: f32,
    pub mean: &'static str,
    pub var: &'static str,
}

impl Linear {
    /// Scale and shift of a row, once mean and inverse deviation are known.
    pub(crate) fn settle(&mut self, row: usize, mean: f64, inv: f64) {
        let hi = mean as f32;
        let lo = mean - f64::from(hi);
        let scale = f64::from(self.gamma[row]) * inv;
        self.hi[row] = hi;
        self.lo[row] = lo as f32;
        self.inv[row] = inv as f32;
        self.scale[row] = scale as f32;
        self.shift[row] = (f64::from(self.beta[row]) - lo * scale) as f32;
    }

    /// The same as `x * scale + shift`.
    fn affine(&self) -> (Vec<f32>, Vec<f32>) {
        let shift = self.scale.iter().zip(&self.hi).zip(&self.shift);
        let shift = shift
            .map(|((&scale, &hi), &t)| (f64::from(t) - f64::from(scale) * f64::from(hi)) as f32);
        (self.scale.clone(), shift.collect())
    }

    fn of_norm(
        norm: &BatchNorm,
        rows: &[usize],
        statistics: Statistics,
        names: [&'static str; 4],
    ) -> Linear {
        let [gamma_name, beta_name, mean, var] = names;
        let n = rows.len();
        let pick = |values: &ndarray::Array1<f32>| rows.iter().map(|&c| values[c]).collect();
        let (gamma, beta) = match &norm.affine {
            Some((gamma, beta)) => (pick(gamma), pick(beta)),
            None => (vec![1.0; n], vec![0.0; n]),
        };
        let affine = norm.affine.is_some();
        let zeros = || vec![0.0; n];
        let mut linear = Linear {
            hi: zeros(),
            lo: zeros(),
            inv: zeros(),
            gamma,
            beta,
            scale: zeros(),
            shift: zeros(),
            batch: (statistics == Statistics::Batch).then_some(Batch { eps: norm.eps, mean, var }),
            names: [affine.then_some(gamma_name), affine.then_some(beta_name)],
        };
        if statistics == Statistics::Frozen {
            for (row, &c) in rows.iter().enumerate() {
                let inv = 1.0 / (f64::from(norm.running_var[c]) + f64::from(norm.eps)).sqrt();
                linear.settle(row, f64::from(norm.running_mean[c]), inv);
            }
        }
        linear
    }

    fn of_affine(scale: Vec<f32>, shift: Vec<f32>, names: [Option<&'static str>; 2]) -> Linear {
        let n = scale.len();
        Linear {
            hi: vec![0.0; n],
            lo: vec![0.0; n],
            inv: vec![1.0; n],
            gamma: scale.clone(),
            beta: shift.clone(),
            scale,
            shift,
            batch: None,
            names,
        }
    }
}

/// A list of stages, in order.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub ops: Vec<Op>,
    /// The parameter's index for each row, at each op: channels are shuffled between.
    pub channels: Vec<Vec<usize>>,
    /// The channel of the result in which each row ends up, where it is not the row itself.
    pub dst_map: Option<Vec<u32>>,
    /// The channel of the residual that each row adds.
    pub residual_map: Option<Vec<u32>>,
    pub rows: usize,
}

impl Chain {
    /// What stands before the convolution.
    pub(crate) fn of_source(layer: &Pointwise, statistics: Statistics) -> Chain {
        let rows: Vec<usize> = (0..layer.c_in()).collect();
        let ops: Vec<Op> = layer
            .source_stages
            .iter()
            .map(|stage| match stage {
                SourceStage::Affine { scale, shift } => Op::Linear(Linear::of_affine(
                    scale.to_vec(),
                    shift.to_vec(),
                    [Some(name::SRC_SCALE), Some(name::SRC_SHIFT)],
                )),
                SourceStage::BatchNorm(norm) => {
                    let names = [
                        name::SRC_GAMMA,
                        name::SRC_BETA,
                        name::SRC_RUNNING_MEAN,
                        name::SRC_RUNNING_VAR,
                    ];
                    Op::Linear(Linear::of_norm(norm, &rows, statistics, names))
                }
                SourceStage::Activation(a) => Op::Activation(*a),
                SourceStage::Gate => Op::Gate,
            })
            .collect();
        let channels = vec![rows.clone(); ops.len()];
        Chain { ops, channels, dst_map: None, residual_map: None, rows: rows.len() }
    }

    /// What stands behind the convolution.
    pub(crate) fn of_stages(layer: &Pointwise, statistics: Statistics) -> Chain {
        let rows = layer.c_out();
        let mut channel: Vec<usize> = (0..rows).collect();
        let mut residual_map = None;
        let (mut ops, mut channels) = (Vec::new(), Vec::new());
        for stage in &layer.stages {
            let pick = |values: &ndarray::Array1<f32>| {
                let value = |&c: &usize| values[if values.len() == 1 { 0 } else { c }];
                channel.iter().map(value).collect::<Vec<f32>>()
            };
            let op = match stage {
                Stage::Bias(bias) => Op::Linear(Linear::of_affine(
                    vec![1.0; rows],
                    pick(bias),
                    [None, Some(name::BIAS)],
                )),
                Stage::BatchNorm(norm) => {
                    let names = [name::GAMMA, name::BETA, name::RUNNING_MEAN, name::RUNNING_VAR];
                    Op::Linear(Linear::of_norm(norm, &channel, statistics, names))
                }
                Stage::Activation(a) => Op::Activation(*a),
                Stage::PRelu(slope) => Op::PRelu { slope: pick(slope) },
                Stage::Residual => {
                    residual_map = map(&channel);
                    Op::Residual
                }
                Stage::LayerNorm(norm) => Op::LayerNorm {
                    over: norm.over,
                    affine: norm.affine.as_ref().map(|(gamma, beta)| (pick(gamma), pick(beta))),
                    eps: norm.eps,
                },
                Stage::ChannelShuffle { groups } => {
                    let per_group = rows / groups;
                    for c in &mut channel {
                        *c = *c % per_group * groups + *c / per_group;
                    }
                    continue;
                }
            };
            ops.push(op);
            channels.push(channel.clone());
        }
        Chain { ops, channels, dst_map: map(&channel), residual_map, rows }
    }

    /// Ops that need sums over more than a position, in order.
    pub(crate) fn barriers(&self) -> Vec<usize> {
        let barrier = |op: &Op| match op {
            Op::Linear(linear) => linear.batch.is_some(),
            Op::LayerNorm { over, .. } => *over == NormOver::All,
            _ => false,
        };
        (0..self.ops.len()).filter(|&i| barrier(&self.ops[i])).collect()
    }

    /// Whether lines of channels are needed: a layer norm takes them together.
    pub(crate) fn wants_lines(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::LayerNorm { .. }))
    }

    /// Whether units must not share a sample.
    pub(crate) fn by_sample(&self) -> bool {
        let by_sample = |op: &Op| match op {
            Op::Gate => true,
            Op::LayerNorm { over, .. } => *over == NormOver::All,
            _ => false,
        };
        self.ops.iter().any(by_sample)
    }

    /// The batch norm whose statistics are the batch's.
    pub(crate) fn batch_norm(&self) -> Option<(usize, Batch)> {
        self.ops.iter().enumerate().find_map(|(i, op)| match op {
            Op::Linear(Linear { batch: Some(batch), .. }) => Some((i, *batch)),
            _ => None,
        })
    }

    /// Puts the statistics of a batch in its batch norm.
    pub(crate) fn settle(&mut self, statistics: &Option<BatchStatistics>) {
        let Some((i, batch)) = self.batch_norm() else { return };
        let (Op::Linear(linear), Some(statistics)) = (&mut self.ops[i], statistics) else { return };
        for (row, moments) in statistics.moments.iter().enumerate() {
            let var = moments.deviations / moments.count;
            linear.settle(row, moments.mean, 1.0 / (var + f64::from(batch.eps)).sqrt());
        }
    }

    /// Puts the sums of a chain's ops where the gradients of its parameters are.
    pub(crate) fn put(
        &self,
        wants: &dyn Fn(&str) -> bool,
        sums: &[[Vec<f64>; 2]],
        grads: &mut Grads,
        accumulate: Accumulate,
    ) {
        for ((op, channels), sums) in self.ops.iter().zip(&self.channels).zip(sums) {
            let [ones, products] = sums;
            let mut put = |name: Option<&'static str>, value: &dyn Fn(usize) -> f64| {
                let Some(name) = name.filter(|name| wants(name)) else { return };
                let len = grads.get(name).map_or(0, <[f32]>::len);
                let mut values = vec![0.0f64; len];
                for (row, &c) in channels.iter().enumerate() {
                    values[if len == 1 { 0 } else { c }] += value(row);
                }
                grads.put(name, values.into_iter().map(|x| x as f32), accumulate);
            };
            match op {
                Op::Linear(linear) => {
                    let [lo, inv] = [&linear.lo, &linear.inv];
                    put(linear.names[0], &|row| {
                        (products[row] - f64::from(lo[row]) * ones[row]) * f64::from(inv[row])
                    });
                    put(linear.names[1], &|row| ones[row]);
                }
                Op::PRelu { .. } => put(Some(name::SLOPE), &|row| products[row]),
                Op::LayerNorm { affine: Some(_), .. } => {
                    put(Some(name::LN_GAMMA), &|row| products[row]);
                    put(Some(name::LN_BETA), &|row| ones[row]);
                }
                _ => {}
            }
        }
    }

    /// The source's chain, with its statistics settled, as steps of a forward pass.
    pub(crate) fn source_steps(&self) -> Vec<SourceStep> {
        let step = |op: &Op| match op {
            Op::Linear(linear) => {
                let (scale, shift) = linear.affine();
                SourceStep::Affine { scale, shift }
            }
            Op::Activation(activation) => SourceStep::Activation(*activation),
            Op::Gate => SourceStep::Gate,
            Op::PRelu { .. } | Op::Residual | Op::LayerNorm { .. } => {
                unreachable!("no source stage")
            }
        };
        self.ops.iter().map(step).collect()
    }
}

/// What of the forward pass the backward pass needs.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Need {
    Values,
    /// Where dst lies between two bounds; the slope elsewhere.
    Bits([f32; 2], f32),
    Nothing,
}

/// What a layer's backward pass needs of its forward pass.
pub(crate) fn need(
    layer: &Pointwise,
    statistics: Statistics,
    wants: &dyn Fn(&str) -> bool,
) -> Need {
    let chain = Chain::of_stages(layer, statistics);
    let mut need = Need::Nothing;
    for (i, op) in chain.ops.iter().enumerate() {
        let last = i + 1 == chain.ops.len();
        match op {
            Op::Residual => {}
            Op::Linear(linear) if linear.batch.is_none() => {
                if linear.names[0].is_some_and(wants) {
                    return Need::Values;
                }
            }
            Op::Activation(activation) if last => {
                let infinite = f32::INFINITY;
                need = match *activation {
                    Activation::Relu => Need::Bits([0.0, infinite], 0.0),
                    Activation::Relu6 => Need::Bits([0.0, 6.0], 0.0),
                    Activation::Clip { lo, hi } => Need::Bits([lo, hi], 0.0),
                    Activation::LeakyRelu { alpha } if alpha > 0.0 => {
                        Need::Bits([0.0, infinite], alpha)
                    }
                    _ => return Need::Values,
                };
            }
            _ => return Need::Values,
        }
    }
    need
}

/// A batch norm's statistics of a batch: under the names of the running mean and variance.
pub(crate) struct BatchStatistics {
    pub names: [&'static str; 2],
    /// Of each row of the convolution's result, or of each of its input channels.
    pub moments: Vec<Moments>,
    /// The channel that each of them is in the running statistics.
    pub channels: Vec<usize>,
}

/// Statistics must be finite, and of more than one value; of none there are none. `channels` says
/// which channel each row is.
pub(crate) fn checked(
    moments: Vec<Moments>,
    channels: &[usize],
    names: [&'static str; 2],
    src: &[usize],
) -> Result<Option<BatchStatistics>> {
    match moments.first().map_or(0.0, |m| m.count) {
        0.0 => return Ok(None),
        1.0 => return Err(Error::BatchTooSmall { shape: src.to_vec() }),
        _ => {}
    }
    let finite = |m: &Moments| m.mean.is_finite() && m.deviations.is_finite();
    if let Some(row) = moments.iter().position(|m| !finite(m)) {
        let (what, value) = match moments[row].mean.is_finite() {
            true => ("variance", moments[row].deviations),
            false => ("mean", moments[row].mean),
        };
        let of = names[0].trim_end_matches(".running_mean");
        return Err(Error::NonFinite {
            what: format!("the {what} of the batch at {of}"),
            channel: channels[row],
            value: value as f32,
        });
    }
    Ok(Some(BatchStatistics { names, moments, channels: channels.to_vec() }))
}

/// The layer as inference with a weight of some dtype has it, with the batch's statistics in its source's
/// batch norm.
pub(crate) fn lowered(layer: &Pointwise, source_chain: &Chain, weight: DType) -> Lowered {
    let mut layer = layer.clone();
    for (stage, op) in layer.source_stages.iter_mut().zip(&source_chain.ops) {
        if let (SourceStage::BatchNorm(_), Op::Linear(linear)) = (&*stage, op) {
            let (scale, shift) = linear.affine();
            *stage = SourceStage::Affine { scale: scale.into(), shift: shift.into() };
        }
    }
    Lowered::new(&layer, weight)
}

fn map(channels: &[usize]) -> Option<Vec<u32>> {
    let identity = channels.iter().enumerate().all(|(row, &c)| row == c);
    (!identity).then(|| channels.iter().map(|&c| c as u32).collect())
}

/// Merges the moments of all processes: first the means, then the deviations from the common one.
pub(crate) fn reduce_moments(
    moments: &mut [Moments],
    reduce: &dyn Fn(&mut [f64]) -> Result<()>,
) -> Result<()> {
    let own: Vec<Moments> = moments.to_vec();
    let mut sums: Vec<f64> = own.iter().map(|m| m.mean * m.count).collect();
    sums.push(own.first().map_or(0.0, |m| m.count));
    reduce(&mut sums)?;
    let count = sums.pop().unwrap_or(0.0);
    let means: Vec<f64> = sums.iter().map(|sum| sum / count).collect();
    let mut deviations: Vec<f64> = own
        .iter()
        .zip(&means)
        .map(|(m, mean)| m.deviations + m.count * (m.mean - mean).powi(2))
        .collect();
    reduce(&mut deviations)?;
    for ((to, mean), deviations) in moments.iter_mut().zip(means).zip(deviations) {
        *to = Moments { count, mean, deviations };
    }
    Ok(())
}
