//! What a description lowers to: `dst = steps(W'·src' + b')`.
//!
//! Affine stages before anything else fold into `W'` and `b'`, computed in f64 and rounded once,
//! unless tensors have 16 bits: such a weight stays as it is, and the affine a step of its own.
//! Neighbouring affine stages merge; what remains is a short list of elementwise steps, with at
//! most one normalisation between them that computes statistics at run time.
//!
//! Everything per channel is in the order of the convolution's **rows** (its output channels
//! before any channel shuffle); a map says in which channel of dst a row ends up.

use crate::dtype::DType;
use crate::layer::Pointwise;
use crate::stages::{Activation, BatchNorm, NormOver, SourceStage, Stage};

/// One elementwise operation on the accumulators, in the order in which they run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// `x * scale[row] + shift[row]`.
    Affine { scale: Vec<f32>, shift: Vec<f32> },
    /// A function of the value alone.
    Activation(Activation),
    /// `x` where `x >= 0`, else `slope[row] * x`.
    PRelu { slope: Vec<f32> },
    /// Adds the residual tensor at this position.
    Residual,
}

/// One operation on src while it is read, per input channel of the convolution.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum SourceStep {
    /// `x * scale[channel] + shift[channel]`.
    Affine { scale: Vec<f32>, shift: Vec<f32> },
    /// A function of the value alone.
    Activation(Activation),
    /// Multiplies by `gate[n, channel]`.
    Gate,
}

/// A normalisation with statistics of the values at hand.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Norm {
    pub over: NormOver,
    pub gamma: Vec<f32>,
    pub beta: Vec<f32>,
    pub eps: f32,
}

/// A description after folding; the form that every backend packs and runs.
#[derive(Clone, Debug)]
pub(crate) struct Lowered {
    /// `W' [rows, c_in / groups]`, row-major; values that the tensors' type has.
    pub weight: Vec<f32>,
    /// `b' [rows]`.
    pub bias: Vec<f32>,
    pub source_steps: Vec<SourceStep>,
    /// Steps up to the normalisation, or all of them.
    pub steps: Vec<Step>,
    pub norm: Option<Norm>,
    /// Steps after the normalisation.
    pub after_norm: Vec<Step>,
    /// The channel of dst in which each row ends up; `None` where that is the row itself.
    pub dst_map: Option<Vec<u32>>,
    /// The channel of the residual that each row adds; `None` where that is the row itself.
    pub residual_map: Option<Vec<u32>>,
}

/// A per-channel affine in f64, waiting to be merged with its neighbours.
struct Affine {
    scale: Vec<f64>,
    shift: Vec<f64>,
}

impl Affine {
    fn identity(channels: usize) -> Self {
        Affine { scale: vec![1.0; channels], shift: vec![0.0; channels] }
    }

    /// `self` followed by one more affine, given per channel.
    fn then(&mut self, next: impl Fn(usize) -> (f64, f64)) {
        for (i, (scale, shift)) in self.scale.iter_mut().zip(&mut self.shift).enumerate() {
            let (s, t) = next(i);
            *scale *= s;
            *shift = *shift * s + t;
        }
    }

    fn scale_f32(&self) -> Vec<f32> {
        self.scale.iter().map(|&s| s as f32).collect()
    }

    fn shift_f32(&self) -> Vec<f32> {
        self.shift.iter().map(|&s| s as f32).collect()
    }
}

impl Lowered {
    /// A convolution with nothing behind it.
    pub(crate) fn bare(weight: Vec<f32>, rows: usize, source_steps: Vec<SourceStep>) -> Self {
        Lowered {
            weight,
            bias: vec![0.0; rows],
            source_steps,
            steps: Vec::new(),
            norm: None,
            after_norm: Vec::new(),
            dst_map: None,
            residual_map: None,
        }
    }

    /// Lowers a description that has been checked, for tensors of a type.
    pub(crate) fn new(layer: &Pointwise, dtype: DType) -> Self {
        let (rows, k) = layer.weight.dim();
        let c_in = layer.c_in();
        let rows_per_group = rows / layer.groups;

        let mut weight: Vec<f64> = layer.weight.iter().map(|&w| f64::from(w)).collect();
        let mut bias = vec![0.0f64; rows];

        let (mut source_steps, last_affine) = lower_source(&layer.source_stages, c_in);
        if let Some(affine) = last_affine {
            // W·(s∘x + t) = (W∘s)·x + W·t
            let mut folded = weight.clone();
            for (row, (w, b)) in folded.chunks_exact_mut(k).zip(&mut bias).enumerate() {
                let first = row / rows_per_group * k;
                *b = (0..k).map(|i| w[i] * affine.shift[first + i]).sum();
                w.iter_mut().zip(&affine.scale[first..]).for_each(|(w, s)| *w *= s);
            }
            if dtype == DType::F32 && fits_f32(&folded) && fits_f32(&bias) {
                weight = folded;
            } else {
                bias.fill(0.0);
                source_steps.push(SourceStep::Affine {
                    scale: affine.scale_f32(),
                    shift: affine.shift_f32(),
                });
            }
        }

        // The channel that each row is at this point of the list; parameters are indexed by it.
        let mut channel: Vec<usize> = (0..rows).collect();
        let mut residual_channel = channel.clone();
        let mut pending: Option<Affine> = None;
        let mut started = false;
        let mut lowered = Lowered::bare(Vec::new(), 0, source_steps);
        for stage in &layer.stages {
            let affine = |c: usize| match stage {
                Stage::Bias(bias) => (1.0, f64::from(bias[c])),
                Stage::BatchNorm(norm) => norm.fold(c),
                _ => (1.0, 0.0),
            };
            if let Stage::Bias(_) | Stage::BatchNorm(_) = stage {
                pending
                    .get_or_insert_with(|| Affine::identity(rows))
                    .then(|row| affine(channel[row]));
                continue;
            }
            if let Stage::ChannelShuffle { groups } = stage {
                let per_group = rows / groups;
                for c in &mut channel {
                    *c = *c % per_group * groups + *c / per_group;
                }
                continue;
            }
            lowered.flush(&mut pending, &mut started, &mut weight, &mut bias, dtype);
            started = true;
            let step = match stage {
                Stage::Activation(activation) => Step::Activation(*activation),
                Stage::PRelu(slope) => {
                    let slope_of = |&c: &usize| if slope.len() == 1 { slope[0] } else { slope[c] };
                    Step::PRelu { slope: channel.iter().map(slope_of).collect() }
                }
                Stage::Residual => {
                    residual_channel.clone_from(&channel);
                    Step::Residual
                }
                Stage::LayerNorm(norm) => {
                    let (gamma, beta) = match &norm.affine {
                        Some((gamma, beta)) => (
                            channel.iter().map(|&c| gamma[c]).collect(),
                            channel.iter().map(|&c| beta[c]).collect(),
                        ),
                        None => (vec![1.0; rows], vec![0.0; rows]),
                    };
                    lowered.norm = Some(Norm { over: norm.over, gamma, beta, eps: norm.eps });
                    continue;
                }
                Stage::Bias(_) | Stage::BatchNorm(_) | Stage::ChannelShuffle { .. } => continue,
            };
            lowered.current().push(step);
        }
        lowered.flush(&mut pending, &mut started, &mut weight, &mut bias, dtype);

        lowered.weight = weight.iter().map(|&w| dtype.round(w as f32)).collect();
        lowered.bias = bias.iter().map(|&b| b as f32).collect();
        if layer.groups == 1 && !is_identity(&channel) {
            // Rows of one group may stand in any order: in dst's, the shuffle is free.
            let mut order = vec![0; rows];
            for (row, &c) in channel.iter().enumerate() {
                order[c] = row;
            }
            lowered.permute_rows(&order, k);
            residual_channel = order.iter().map(|&row| residual_channel[row]).collect();
        } else {
            lowered.dst_map = map(&channel);
        }
        lowered.residual_map = map(&residual_channel);
        lowered
    }

    /// Values that the folded layer uses.
    pub(crate) fn parameters(&self) -> usize {
        let steps = self.steps.iter().chain(&self.after_norm).map(|step| match step {
            Step::Affine { scale, shift } => scale.len() + shift.len(),
            Step::PRelu { slope } => slope.len(),
            Step::Activation(_) | Step::Residual => 0,
        });
        let source = self.source_steps.iter().map(|step| match step {
            SourceStep::Affine { scale, shift } => scale.len() + shift.len(),
            SourceStep::Activation(_) | SourceStep::Gate => 0,
        });
        let norm = self.norm.as_ref().map_or(0, |norm| norm.gamma.len() + norm.beta.len());
        self.weight.len() + self.bias.len() + norm + steps.chain(source).sum::<usize>()
    }

    fn current(&mut self) -> &mut Vec<Step> {
        if self.norm.is_some() { &mut self.after_norm } else { &mut self.steps }
    }

    /// Ends a run of affine stages: folds it if nothing stands before it, else makes it a step.
    fn flush(
        &mut self,
        pending: &mut Option<Affine>,
        started: &mut bool,
        weight: &mut [f64],
        bias: &mut [f64],
        dtype: DType,
    ) {
        let Some(affine) = pending.take() else { return };
        if !*started {
            *started = true;
            let k = weight.len() / bias.len();
            let scaled = weight
                .chunks_exact(k)
                .zip(&affine.scale)
                .flat_map(|(w, s)| w.iter().map(move |w| w * s));
            let scaled: Vec<f64> = scaled.collect();
            let shifted: Vec<f64> = bias
                .iter()
                .zip(affine.scale.iter().zip(&affine.shift))
                .map(|(b, (s, t))| b * s + t)
                .collect();
            let folds = dtype == DType::F32 || affine.scale.iter().all(|&scale| scale == 1.0);
            if folds && fits_f32(&scaled) && fits_f32(&shifted) {
                weight.copy_from_slice(&scaled);
                bias.copy_from_slice(&shifted);
                return;
            }
        }
        let step = Step::Affine { scale: affine.scale_f32(), shift: affine.shift_f32() };
        self.current().push(step);
    }

    /// Puts row `order[i]` in place `i`, with everything that belongs to it.
    fn permute_rows(&mut self, order: &[usize], k: usize) {
        let pick = |values: &[f32]| order.iter().map(|&row| values[row]).collect::<Vec<_>>();
        self.weight =
            order.iter().flat_map(|&row| &self.weight[row * k..(row + 1) * k]).copied().collect();
        self.bias = pick(&self.bias);
        for step in self.steps.iter_mut().chain(&mut self.after_norm) {
            match step {
                Step::Affine { scale, shift } => {
                    *scale = pick(scale);
                    *shift = pick(shift);
                }
                Step::PRelu { slope } => *slope = pick(slope),
                Step::Activation(_) | Step::Residual => {}
            }
        }
        if let Some(norm) = &mut self.norm {
            norm.gamma = pick(&norm.gamma);
            norm.beta = pick(&norm.beta);
        }
    }
}

/// The source's steps, and the affine that stands directly before the convolution, if one does.
fn lower_source(stages: &[SourceStage], c_in: usize) -> (Vec<SourceStep>, Option<Affine>) {
    let mut steps = Vec::new();
    let mut pending: Option<Affine> = None;
    for stage in stages {
        let mut then = |next: &dyn Fn(usize) -> (f64, f64)| {
            pending.get_or_insert_with(|| Affine::identity(c_in)).then(next);
        };
        match stage {
            SourceStage::Affine { scale, shift } => {
                then(&|c| (f64::from(scale[c]), f64::from(shift[c])))
            }
            SourceStage::BatchNorm(norm) => then(&|c| BatchNorm::fold(norm, c)),
            SourceStage::Activation(_) | SourceStage::Gate => {
                if let Some(affine) = pending.take() {
                    steps.push(SourceStep::Affine {
                        scale: affine.scale_f32(),
                        shift: affine.shift_f32(),
                    });
                }
                steps.push(match stage {
                    SourceStage::Activation(activation) => SourceStep::Activation(*activation),
                    _ => SourceStep::Gate,
                });
            }
        }
    }
    (steps, pending)
}

/// Whether folding has left every value representable; a layer with infinite or NaN weights folds
/// like any other as long as no finite value is lost.
fn fits_f32(values: &[f64]) -> bool {
    values.iter().all(|&v| !v.is_finite() || (v as f32).is_finite())
}

fn is_identity(channels: &[usize]) -> bool {
    channels.iter().enumerate().all(|(row, &c)| row == c)
}

fn map(channels: &[usize]) -> Option<Vec<u32>> {
    if is_identity(channels) { None } else { Some(channels.iter().map(|&c| c as u32).collect()) }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::stages::LayerNorm;

    #[test]
    fn affine_stages_before_anything_else_fold_away() {
        let norm = BatchNorm::new(vec![1.0, -1.0], vec![3.0, 0.25])
            .affine(vec![2.0, 4.0], vec![0.5, 0.0])
            .eps(1.0);
        let layer = Pointwise::new(array![[1.0, 2.0], [3.0, 4.0]])
            .bias(vec![1.0, 2.0])
            .batch_norm(norm)
            .relu6();
        let lowered = Lowered::new(&layer, DType::F32);
        assert_eq!(lowered.weight[..2], [1.0, 2.0]);
        assert_eq!(lowered.bias[0], 0.5);
        assert_eq!(lowered.steps, [Step::Activation(Activation::Relu6)]);
    }

    #[test]
    fn later_affine_stages_merge_into_one_step() {
        let layer = Pointwise::new(array![[1.0]])
            .relu()
            .bias(vec![2.0])
            .batch_norm(BatchNorm::new(vec![0.0], vec![3.0]).affine(vec![4.0], vec![1.0]).eps(1.0));
        let lowered = Lowered::new(&layer, DType::F32);
        let affine = Step::Affine { scale: vec![2.0], shift: vec![5.0] };
        assert_eq!(lowered.steps, [Step::Activation(Activation::Relu), affine]);
        assert_eq!(lowered.weight, [1.0]);
    }

    #[test]
    fn an_affine_after_a_layer_norm_stays_after_it() {
        let layer =
            Pointwise::new(array![[1.0]]).layer_norm(LayerNorm::over_channels()).bias(vec![2.0]);
        let lowered = Lowered::new(&layer, DType::F32);
        assert!(lowered.steps.is_empty() && lowered.norm.is_some());
        assert_eq!(lowered.after_norm, [Step::Affine { scale: vec![1.0], shift: vec![2.0] }]);
        assert_eq!(lowered.bias, [0.0]);
    }

    #[test]
    fn a_source_affine_next_to_the_convolution_folds_into_the_weights() {
        let layer = Pointwise::new(array![[1.0], [2.0]])
            .groups(2)
            .source_affine(vec![3.0, 5.0], vec![7.0, 11.0]);
        let lowered = Lowered::new(&layer, DType::F32);
        assert_eq!((lowered.weight, lowered.bias), (vec![3.0, 10.0], vec![7.0, 22.0]));
        assert!(lowered.source_steps.is_empty());
    }

    #[test]
    fn a_shuffle_without_groups_permutes_rows_and_leaves_no_map() {
        let layer = Pointwise::new(array![[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
            .residual()
            .channel_shuffle(2)
            .prelu(vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let lowered = Lowered::new(&layer, DType::F32);
        assert_eq!(lowered.weight, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(lowered.dst_map, None);
        assert_eq!(lowered.residual_map, Some(vec![0, 3, 1, 4, 2, 5]));
        assert_eq!(lowered.steps[1], Step::PRelu { slope: vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0] });
    }

    #[test]
    fn folding_never_loses_a_finite_value() {
        let norm = BatchNorm::new(vec![0.0], vec![0.0]).affine(vec![1e30], vec![0.0]).eps(1e-20);
        let lowered = Lowered::new(&Pointwise::new(array![[1e10]]).batch_norm(norm), DType::F32);
        assert_eq!(lowered.weight, [1e10]);
        assert_eq!(lowered.steps.len(), 1);
    }

    #[test]
    fn a_weight_of_16_bits_is_rounded_and_nothing_folds_into_it() {
        let norm = || BatchNorm::new(vec![0.0], vec![3.0]).affine(vec![4.0], vec![1.0]).eps(1.0);
        let layer = Pointwise::new(array![[1.0 + 1.0 / 256.0]]).bias(vec![2.0]);
        let lowered = Lowered::new(&layer.clone().batch_norm(norm()), DType::Bf16);
        assert_eq!((lowered.weight, lowered.bias), (vec![1.0], vec![0.0]));
        assert_eq!(lowered.steps, [Step::Affine { scale: vec![2.0], shift: vec![5.0] }]);

        let lowered = Lowered::new(&layer.source_batch_norm(norm()), DType::F16);
        assert_eq!((lowered.weight, lowered.bias), (vec![1.0 + 1.0 / 256.0], vec![2.0]));
        assert_eq!(lowered.source_steps.len(), 1);
        assert!(lowered.steps.is_empty());
    }
}
