//! PointNet (Qi et al. 2017) in the small: three layers that all points share, the maximum over the
//! points of each cloud, two fully connected layers. Every layer is a pointwise one.

use ndarray::{Array, Array2, Dimension};
use pointwise::init::{self, Init};
use pointwise::safetensors::SafeTensors;
use pointwise::train::{Accumulate, Grads, Params, Workspace};
use pointwise::{BatchNorm, Device, Pointwise, Sequence, Source};

use crate::Result;
use crate::adam::Adam;
use crate::data::{Batch, CLASSES};
use crate::loss::CrossEntropy;
use crate::pool::Maxima;

/// The channels after each layer but the last.
pub const CHANNELS: [usize; 4] = [64, 128, 256, 128];
/// PyTorch's names of the layers, and of the batch norms that follow them.
const NAMES: [(&str, Option<&str>); 5] = [
    ("conv1", Some("bn1")),
    ("conv2", Some("bn2")),
    ("conv3", Some("bn3")),
    ("fc1", Some("bn4")),
    ("fc2", None),
];
/// How many of them all points share.
const SHARED: usize = 3;

/// A network in training.
pub struct Network {
    layers: Vec<Layer>,
}

struct Layer {
    name: &'static str,
    norm: Option<&'static str>,
    params: Params,
    grads: Grads,
}

impl Network {
    /// With PyTorch's default initial values, drawn with `seed`.
    pub fn new(channels: [usize; 4], seed: u64, device: &Device) -> Result<Network> {
        let [c1, c2, c3, hidden] = channels;
        let sizes = [(3, c1), (c1, c2), (c2, c3), (c3, hidden), (hidden, CLASSES)];
        Self::build(device, |i| {
            let (c_in, c_out) = sizes[i];
            // Layers draw with seeds of their own.
            let seed = seed.wrapping_mul(NAMES.len() as u64).wrapping_add(i as u64);
            let layer = Pointwise::new(Init::pytorch_default().weight(c_out, c_in, seed)?);
            Ok(match NAMES[i].1 {
                Some(_) => {
                    let norm = BatchNorm::new(vec![0.0; c_out], vec![1.0; c_out]);
                    layer.batch_norm(norm.affine(vec![1.0; c_out], vec![0.0; c_out]))
                }
                None => layer.bias(init::bias(c_out, c_in, seed)?),
            })
        })
    }

    /// Reads a state dict of `reference.py`'s module; `prefix` stands before every name.
    pub fn read(file: &SafeTensors<'_>, prefix: &str, device: &Device) -> Result<Network> {
        let full = |name: &str| format!("{prefix}{name}");
        let mut network = Self::build(device, |i| {
            let (name, norm) = NAMES[i];
            let layer = Pointwise::from_safetensors(file, &full(name), norm.map(full).as_deref())?;
            if i == NAMES.len() - 1 && layer.c_out() != CLASSES {
                Err(format!("{prefix}{name} has {} outputs, expected {CLASSES}", layer.c_out()))?;
            }
            Ok(layer)
        })?;
        for layer in &mut network.layers {
            if let Some(norm) = layer.norm {
                let name = full(&format!("{norm}.num_batches_tracked"));
                layer.params.set_num_batches_tracked(crate::checkpoint::count(file, &name)?);
            }
        }
        Ok(network)
    }

    fn build(device: &Device, layer: impl Fn(usize) -> Result<Pointwise>) -> Result<Network> {
        let layers = NAMES.iter().enumerate().map(|(i, &(name, norm))| {
            let layer = layer(i)?;
            let layer = if norm.is_some() { layer.relu() } else { layer };
            let params = Params::new(&layer, device)?;
            let grads = params.grads();
            Ok(Layer { name, norm, params, grads })
        });
        Ok(Network { layers: layers.collect::<Result<_>>()? })
    }

    /// One step of training.
    pub fn step(&mut self, batch: &Batch, adam: &mut Adam) -> Result<CrossEntropy> {
        let (shared, head) = self.layers.split_at_mut(SHARED);
        let (features, points_tape) = forward(shared, batch.points.clone())?;
        let maxima = Maxima::of(&features, &batch.lengths);
        let (logits, head_tape) = forward(head, maxima.values.clone())?;

        let outcome = CrossEntropy::of(&logits, &batch.labels);

        let d_maxima = backward(head, head_tape, outcome.d_logits.clone())?;
        backward(shared, points_tape, maxima.backward(&d_maxima))?;

        adam.begin_step();
        for layer in &mut self.layers {
            let Layer { name, norm, params, grads } = layer;
            params.update(grads, |parameter, values, gradient| {
                adam.update(&full_name(name, *norm, parameter), values, gradient);
            })?;
        }
        Ok(outcome)
    }

    /// The network for inference, with running statistics.
    pub fn prepare(&self) -> Result<Classifier> {
        let prepare = |layers: &[Layer]| {
            let layers = layers.iter().map(|layer| layer.params.prepare());
            Sequence::new(layers.collect::<pointwise::Result<_>>()?)
        };
        let (shared, head) = self.layers.split_at(SHARED);
        Ok(Classifier { shared: prepare(shared)?, head: prepare(head)? })
    }

    /// Calls `f(name, shape, values)` for every parameter and running statistic, under the names and
    /// with the shapes of PyTorch's state dict.
    pub fn visit(&self, mut f: impl FnMut(&str, &[usize], &[f32])) {
        for (i, Layer { name, norm, params, .. }) in self.layers.iter().enumerate() {
            params.visit(|parameter, shape, values| {
                // `nn.Conv1d` has a kernel axis.
                let kernel: &[usize] = if i < SHARED && shape.len() == 2 { &[1] } else { &[] };
                f(&full_name(name, *norm, parameter), &[shape, kernel].concat(), values);
            });
        }
    }

    /// Name and size of every parameter that an optimiser changes.
    pub fn trainable(&self) -> Vec<(String, usize)> {
        let mut all = Vec::new();
        for Layer { name, norm, grads, .. } in &self.layers {
            grads.visit(|parameter, _, values| {
                all.push((full_name(name, *norm, parameter), values.len()));
            });
        }
        all
    }

    /// PyTorch's counters of batches, one per batch norm, by name.
    pub fn batches_tracked(&self) -> impl Iterator<Item = (String, u64)> {
        self.layers.iter().filter_map(|layer| {
            let name = format!("{}.num_batches_tracked", layer.norm?);
            Some((name, layer.params.num_batches_tracked()))
        })
    }
}

/// `bn.weight` of `conv1` is `bn1.weight`.
fn full_name(name: &str, norm: Option<&str>, parameter: &str) -> String {
    match (parameter.strip_prefix("bn."), norm) {
        (Some(parameter), Some(norm)) => format!("{norm}.{parameter}"),
        _ => format!("{name}.{parameter}"),
    }
}

/// What each layer read, and what else its backward pass needs.
type Tape<D> = Vec<(Array<f32, D>, Workspace)>;

fn forward<D: Dimension>(
    layers: &mut [Layer],
    src: Array<f32, D>,
) -> Result<(Array<f32, D>, Tape<D>)>
where
    Array<f32, D>: Source<Output = Array<f32, D>>,
{
    let (mut src, mut tape) = (src, Vec::new());
    for layer in layers {
        let (dst, workspace) = layer.params.forward(&src)?;
        tape.push((std::mem::replace(&mut src, dst), workspace));
    }
    Ok((src, tape))
}

/// Fills the layers' gradients, and returns the one by what the first of them read.
fn backward<D: Dimension>(
    layers: &mut [Layer],
    tape: Tape<D>,
    d_dst: Array<f32, D>,
) -> Result<Array<f32, D>>
where
    Array<f32, D>: Source<Output = Array<f32, D>>,
{
    let mut d = d_dst;
    for (Layer { params, grads, .. }, (src, workspace)) in layers.iter_mut().zip(tape).rev() {
        d = params.backward(&src, workspace, &d, grads, Accumulate::Set)?;
    }
    Ok(d)
}

/// A trained network.
pub struct Classifier {
    shared: Sequence,
    head: Sequence,
}

impl Classifier {
    /// The logits `[clouds, 10]` of a batch.
    pub fn forward(&self, batch: &Batch) -> Result<Array2<f32>> {
        let features = self.shared.forward(&batch.points)?;
        Ok(self.head.forward(&Maxima::of(&features, &batch.lengths).values)?)
    }
}
