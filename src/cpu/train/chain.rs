//! The elementwise stages before or after the convolution, replayed block by block.
//!
//! Nothing between the stages is kept: what a derivative needs is computed again from the chain's
//! input, while a block of it is in cache. A normalisation over more than a position is a
//! *barrier*: what follows it can only run when its sums over the whole batch (or sample) are
//! known, which takes a pass of its own.

use crate::layer::Pointwise;
use crate::stages::{Activation, BatchNorm, NormOver, SourceStage, Stage};
use crate::train::{Statistics, name};

/// One stage; parameters are per row of the convolution's result (or per input channel).
#[derive(Clone, Debug)]
pub(super) enum Op {
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
pub(super) struct Linear {
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
pub(super) struct Batch {
    pub eps: f32,
    pub mean: &'static str,
    pub var: &'static str,
}

impl Linear {
    /// Scale and shift of a row, once mean and inverse deviation are known.
    pub(super) fn settle(&mut self, row: usize, mean: f64, inv: f64) {
        let hi = mean as f32;
        let lo = mean - f64::from(hi);
        let scale = f64::from(self.gamma[row]) * inv;
        self.hi[row] = hi;
        self.lo[row] = lo as f32;
        self.inv[row] = inv as f32;
        self.scale[row] = scale as f32;
        self.shift[row] = (f64::from(self.beta[row]) - lo * scale) as f32;
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
pub(super) struct Chain {
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
    pub(super) fn of_source(layer: &Pointwise, statistics: Statistics) -> Chain {
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
    pub(super) fn of_stages(layer: &Pointwise, statistics: Statistics) -> Chain {
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
    pub(super) fn barriers(&self) -> Vec<usize> {
        let barrier = |op: &Op| match op {
            Op::Linear(linear) => linear.batch.is_some(),
            Op::LayerNorm { over, .. } => *over == NormOver::All,
            _ => false,
        };
        (0..self.ops.len()).filter(|&i| barrier(&self.ops[i])).collect()
    }

    /// Whether lines of channels are needed: a layer norm takes them together.
    pub(super) fn wants_lines(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::LayerNorm { .. }))
    }

    /// Whether units must not share a sample.
    pub(super) fn by_sample(&self) -> bool {
        let by_sample = |op: &Op| match op {
            Op::Gate => true,
            Op::LayerNorm { over, .. } => *over == NormOver::All,
            _ => false,
        };
        self.ops.iter().any(by_sample)
    }

    /// The batch norm whose statistics are the batch's.
    pub(super) fn batch_norm(&self) -> Option<(usize, Batch)> {
        self.ops.iter().enumerate().find_map(|(i, op)| match op {
            Op::Linear(Linear { batch: Some(batch), .. }) => Some((i, *batch)),
            _ => None,
        })
    }
}

fn map(channels: &[usize]) -> Option<Vec<u32>> {
    let identity = channels.iter().enumerate().all(|(row, &c)| row == c);
    (!identity).then(|| channels.iter().map(|&c| c as u32).collect())
}
