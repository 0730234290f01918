//! A layer in training: its parameters, and what is done with them between two batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::{Array1, Array2};

use crate::cpu::train::Pool;
use crate::device::{Device, Kind};
use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::prepared::{PrepareOptions, Prepared};
use crate::problem::LayerShape;
use crate::stages::{SourceStage, Stage};
use crate::train::{AllReduce, Grads, Options, name};

/// Gives every [`Params`] a number of its own.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The parameters and running statistics of a layer in training.
///
/// It begins with the values of a description, and is itself one ([`layer`](Self::layer)) after
/// every step.
#[derive(Debug)]
pub struct Params {
    pub(super) id: u64,
    /// Counts changes of the parameters.
    pub(super) generation: u64,
    pub(super) layer: Pointwise,
    pub(super) shape: LayerShape,
    pub(super) device: Device,
    pub(super) options: Options,
    pub(super) num_batches_tracked: u64,
    pub(super) all_reduce: Option<Arc<dyn AllReduce>>,
    pub(super) pool: Pool,
}

impl Params {
    /// Takes the values of a description.
    ///
    /// # Errors
    /// The first thing in the description that does not fit, with its values;
    /// [`Error::Unsupported`] on CUDA for more than 16 stages or source stages.
    pub fn new(layer: &Pointwise, device: &Device) -> Result<Params> {
        Self::with_options(layer, device, Options::default())
    }

    /// As [`new`](Self::new), with options.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::ParameterValue`] for options that do not fit the layer.
    pub fn with_options(layer: &Pointwise, device: &Device, options: Options) -> Result<Params> {
        layer.check()?;
        match device.kind()? {
            Kind::Cpu(_) => {}
            #[cfg(feature = "cuda")]
            Kind::Cuda(device) => crate::cuda::train::check(layer, device)?,
            Kind::Unknown(_) => unreachable!("Device::kind reports it"),
        }
        let mut layer = layer.clone();
        make_contiguous(&mut layer);
        let mut params = Params {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            generation: 0,
            shape: LayerShape::new(&layer),
            layer,
            device: device.clone(),
            options: Options::default(),
            num_batches_tracked: 0,
            all_reduce: None,
            pool: Pool::default(),
        };
        params.set_options(options)?;
        Ok(params)
    }

    /// How the layer is trained.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Trains differently from now on; workspaces that are still around become useless.
    ///
    /// # Errors
    /// [`Error::ParameterValue`] for a momentum outside of 0 to 1, a name that is no parameter of
    /// the layer, or rows that the weight does not have.
    pub fn set_options(&mut self, options: Options) -> Result<()> {
        let refuse = |parameter: &str, value: String, expected| {
            Err(Error::ParameterValue { parameter: parameter.into(), value, expected })
        };
        if let Some(momentum) = options.momentum
            && !(0.0..=1.0).contains(&momentum)
        {
            return refuse("momentum", momentum.to_string(), "0 to 1");
        }
        for name in &options.frozen {
            if !self.shapes().iter().any(|(other, _)| other == name) {
                return refuse("a frozen parameter", format!("{name:?}"), "a parameter's name");
            }
        }
        for rows in &options.frozen_rows {
            if rows.start > rows.end || rows.end > self.layer.c_out() {
                return refuse("frozen rows", format!("{rows:?}"), "rows of the weight");
            }
        }
        self.options = options;
        self.generation += 1;
        Ok(())
    }

    /// Takes the statistics of batch norms over the samples of several workers from now on, or of
    /// this one alone.
    pub fn set_all_reduce(&mut self, workers: Option<Arc<dyn AllReduce>>) {
        self.all_reduce = workers;
        self.generation += 1;
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The layer as it is now: the description of the same layer for inference.
    pub fn layer(&self) -> &Pointwise {
        &self.layer
    }

    /// The layer as it is now, ready for inference on its device.
    ///
    /// # Errors
    /// As [`Pointwise::prepare`]: a variance that has become NaN.
    pub fn prepare(&self) -> Result<Prepared> {
        self.layer.prepare(&self.device)
    }

    /// As [`prepare`](Self::prepare), with options.
    ///
    /// # Errors
    /// As [`Pointwise::prepare_with`].
    pub fn prepare_with(&self, options: PrepareOptions) -> Result<Prepared> {
        self.layer.prepare_with(&self.device, options)
    }

    /// Batches that have moved the running statistics: PyTorch's `num_batches_tracked`.
    pub fn num_batches_tracked(&self) -> u64 {
        self.num_batches_tracked
    }

    /// Continues to count from a checkpoint's number.
    pub fn set_num_batches_tracked(&mut self, batches: u64) {
        self.num_batches_tracked = batches;
    }

    /// Gradients for this layer's parameters, zero.
    pub fn grads(&self) -> Grads {
        Grads::new(self.shapes().into_iter())
    }

    /// Calls `f(name, shape, values)` for every parameter and running statistic: of the source stages,
    /// of the convolution, of the stages, each in order. Values are row-major.
    pub fn visit(&self, mut f: impl FnMut(&'static str, &[usize], &[f32])) {
        visit(&self.layer, &mut f);
    }

    /// As [`visit`](Self::visit), with values to change: to load a checkpoint, to clamp weights.
    /// Workspaces that are still around become useless.
    pub fn visit_mut(&mut self, mut f: impl FnMut(&'static str, &[usize], &mut [f32])) {
        self.generation += 1;
        visit_mut(&mut self.layer, &mut f);
    }

    /// The values of a parameter or running statistic, if the layer has it.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        get(&self.layer, name)
    }

    /// One step of an optimiser: calls `f(name, values, gradients)` for every parameter that is not
    /// frozen. Frozen rows of the weight are as before afterwards, whatever `f` does.
    ///
    /// # Errors
    /// [`Error::Shape`] for gradients of another layer.
    pub fn update(
        &mut self,
        grads: &Grads,
        mut f: impl FnMut(&'static str, &mut [f32], &[f32]),
    ) -> Result<()> {
        grads.check(self.shapes().into_iter())?;
        let Options { frozen, frozen_rows, .. } = &self.options;
        self.generation += 1;
        visit_mut(&mut self.layer, &mut |name, shape, values| {
            let Some(grads) = grads.get(name) else { return };
            if frozen.iter().any(|frozen| frozen == name) {
                return;
            }
            let kept: Vec<(usize, Vec<f32>)> = match name {
                name::WEIGHT => frozen_rows
                    .iter()
                    .map(|rows| {
                        let start = rows.start * shape[1];
                        (start, values[start..rows.end * shape[1]].to_vec())
                    })
                    .collect(),
                _ => Vec::new(),
            };
            f(name, values, grads);
            for (start, kept) in kept {
                values[start..start + kept.len()].copy_from_slice(&kept);
            }
        });
        Ok(())
    }

    /// Names and shapes of what has a gradient.
    pub(super) fn shapes(&self) -> Vec<(&'static str, Vec<usize>)> {
        let mut shapes = Vec::new();
        visit(&self.layer, &mut |name, shape, _| {
            if !is_statistic(name) {
                shapes.push((name, shape.to_vec()));
            }
        });
        shapes
    }

    /// Whether a parameter's gradient is to be computed.
    pub(super) fn wants(&self, name: &str) -> bool {
        !self.options.frozen.iter().any(|frozen| frozen == name)
    }
}

fn is_statistic(name: &str) -> bool {
    name.ends_with("running_mean") || name.ends_with("running_var")
}

/// Writes a visitor of a layer's tensors, shared or exclusive.
macro_rules! visitor {
    ($visit:ident, $as_slice:ident, $iter:ident $(, $mut:ident)?) => {
        fn $visit<'a>(
            layer: &'a $($mut)? Pointwise,
            f: &mut dyn FnMut(&'static str, &[usize], &'a $($mut)? [f32]),
        ) {
            const CONTIGUOUS: &str = "made contiguous when the layer was taken";
            let mut vector = |name, values: &'a $($mut)? Array1<f32>| {
                let shape = [values.len()];
                f(name, &shape, values.$as_slice().expect(CONTIGUOUS));
            };
            for stage in layer.source_stages.$iter() {
                match stage {
                    SourceStage::Affine { scale, shift } => {
                        vector(name::SRC_SCALE, scale);
                        vector(name::SRC_SHIFT, shift);
                    }
                    SourceStage::BatchNorm(norm) => {
                        if let Some((gamma, beta)) = &$($mut)? norm.affine {
                            vector(name::SRC_GAMMA, gamma);
                            vector(name::SRC_BETA, beta);
                        }
                        vector(name::SRC_RUNNING_MEAN, &$($mut)? norm.running_mean);
                        vector(name::SRC_RUNNING_VAR, &$($mut)? norm.running_var);
                    }
                    SourceStage::Activation(_) | SourceStage::Gate => {}
                }
            }
            let shape = [layer.weight.nrows(), layer.weight.ncols()];
            f(name::WEIGHT, &shape, layer.weight.$as_slice().expect(CONTIGUOUS));
            let mut vector = |name, values: &'a $($mut)? Array1<f32>| {
                let shape = [values.len()];
                f(name, &shape, values.$as_slice().expect(CONTIGUOUS));
            };
            for stage in layer.stages.$iter() {
                match stage {
                    Stage::Bias(bias) => vector(name::BIAS, bias),
                    Stage::BatchNorm(norm) => {
                        if let Some((gamma, beta)) = &$($mut)? norm.affine {
                            vector(name::GAMMA, gamma);
                            vector(name::BETA, beta);
                        }
                        vector(name::RUNNING_MEAN, &$($mut)? norm.running_mean);
                        vector(name::RUNNING_VAR, &$($mut)? norm.running_var);
                    }
                    Stage::PRelu(slope) => vector(name::SLOPE, slope),
                    Stage::LayerNorm(norm) => {
                        if let Some((gamma, beta)) = &$($mut)? norm.affine {
                            vector(name::LN_GAMMA, gamma);
                            vector(name::LN_BETA, beta);
                        }
                    }
                    Stage::Activation(_) | Stage::Residual | Stage::ChannelShuffle { .. } => {}
                }
            }
        }
    };
}

visitor!(visit, as_slice, iter);
visitor!(visit_mut, as_slice_mut, iter_mut, mut);

/// A parameter or a running statistic of a layer that [`Params`] has taken.
pub(super) fn get<'a>(layer: &'a Pointwise, name: &str) -> Option<&'a [f32]> {
    let mut found = None;
    visit(layer, &mut |other, _, values| {
        if other == name {
            found = Some(values);
        }
    });
    found
}

pub(super) fn get_mut<'a>(layer: &'a mut Pointwise, name: &str) -> Option<&'a mut [f32]> {
    let mut found = None;
    visit_mut(layer, &mut |other, _, values| {
        if other == name {
            found = Some(values);
        }
    });
    found
}

/// Arrays may have any strides; parameters are slices.
fn make_contiguous(layer: &mut Pointwise) {
    fn vector(values: &mut Array1<f32>) {
        *values = values.iter().copied().collect();
    }
    fn affine(affine: &mut Option<(Array1<f32>, Array1<f32>)>) {
        if let Some((gamma, beta)) = affine {
            vector(gamma);
            vector(beta);
        }
    }
    let weight: &mut Array2<f32> = &mut layer.weight;
    *weight = weight.as_standard_layout().into_owned();
    for stage in &mut layer.source_stages {
        match stage {
            SourceStage::Affine { scale, shift } => {
                vector(scale);
                vector(shift);
            }
            SourceStage::BatchNorm(norm) => {
                affine(&mut norm.affine);
                vector(&mut norm.running_mean);
                vector(&mut norm.running_var);
            }
            SourceStage::Activation(_) | SourceStage::Gate => {}
        }
    }
    for stage in &mut layer.stages {
        match stage {
            Stage::Bias(values) | Stage::PRelu(values) => vector(values),
            Stage::BatchNorm(norm) => {
                affine(&mut norm.affine);
                vector(&mut norm.running_mean);
                vector(&mut norm.running_var);
            }
            Stage::LayerNorm(norm) => affine(&mut norm.affine),
            Stage::Activation(_) | Stage::Residual | Stage::ChannelShuffle { .. } => {}
        }
    }
}
