//! From stage names and a checkpoint to a layer.

use ndarray::{Array1, Array2, Ix2};
use pointwise::checkpoint::{matrix, optional, tensor, vector};
use pointwise::safetensors::SafeTensors;
use pointwise::{Activation, BatchNorm, LayerNorm, Pointwise, SourceStage, Stage};

use crate::Result;
use crate::options::Options;

/// The layer that the options describe, unchecked: preparing it checks.
pub fn read(options: &Options, file: &SafeTensors<'_>) -> Result<Pointwise> {
    let weight = matrix(file, &stored("weight", options))?;
    let mut layer = Pointwise::new(weight).groups(options.groups).stride(options.stride);
    if let Some(range) = &options.partial {
        layer = layer.partial(range.clone());
    }
    for name in names(&options.source_stages) {
        layer = layer.source_stage(source_stage(name, options, file)?);
    }
    for name in names(&options.stages) {
        layer = layer.stage(stage(name, options, file)?);
    }
    if let Some(groups) = options.shuffle {
        layer = layer.channel_shuffle(groups);
    }
    unused(options)?;
    Ok(layer)
}

/// The gate `[n, c_in]` if there is such a stage.
pub fn gate(options: &Options, file: &SafeTensors<'_>) -> Result<Option<Array2<f32>>> {
    if !names(&options.source_stages).any(|name| name == "gate") {
        return Ok(None);
    }
    let gate = needed("gate", tensor(file, "gate"))?;
    let ones = gate.shape().iter().skip(2).all(|&len| len == 1);
    let shape = gate.shape().to_vec();
    let mut gate = gate;
    while ones && gate.ndim() > 2 {
        gate = gate.remove_axis(ndarray::Axis(2));
    }
    let gate = gate.into_dimensionality::<Ix2>();
    Ok(Some(gate.map_err(|_| format!("tensor gate has shape {shape:?}, expected [n, c_in]"))?))
}

/// What the checkpoint calls a tensor: by a PyTorch module's name where the options give one.
fn stored(tensor: &str, options: &Options) -> String {
    let (module, part) = match tensor {
        "weight" | "bias" => (&options.layer, tensor),
        "running_mean" | "running_var" => (&options.norm, tensor),
        "gamma" => (&options.norm, "weight"),
        "beta" => (&options.norm, "bias"),
        _ => (&None, tensor),
    };
    module.as_ref().map_or_else(|| tensor.to_owned(), |module| format!("{module}.{part}"))
}

/// The names of a list; an empty argument is an empty list.
fn names(list: &[String]) -> impl Iterator<Item = &str> {
    let names = if matches!(list, [only] if only.trim().is_empty()) { &[] } else { list };
    names.iter().map(|name| name.trim())
}

fn stage(name: &str, options: &Options, file: &SafeTensors<'_>) -> Result<Stage> {
    let read = |tensor| needed(name, vector(file, &stored(tensor, options)));
    let layer_norm = |norm: LayerNorm| -> Result<Stage> {
        let norm = norm.eps(options.eps);
        Ok(Stage::LayerNorm(match affine(file, "ln_gamma", "ln_beta")? {
            Some((gamma, beta)) => norm.affine(gamma, beta),
            None => norm,
        }))
    };
    Ok(match name {
        "bias" => Stage::Bias(read("bias")?),
        "batch_norm" => {
            let norm = BatchNorm::new(read("running_mean")?, read("running_var")?);
            let norm = norm.eps(options.eps);
            Stage::BatchNorm(
                match affine(file, &stored("gamma", options), &stored("beta", options))? {
                    Some((gamma, beta)) => norm.affine(gamma, beta),
                    None => norm,
                },
            )
        }
        "prelu" => Stage::PRelu(read("slope")?),
        "residual" if options.residual.is_none() => Err("stage residual needs --residual R.npy")?,
        "residual" => Stage::Residual,
        "layer_norm" => layer_norm(LayerNorm::over_channels())?,
        "layer_norm_all" => layer_norm(LayerNorm::over_all())?,
        _ => Stage::Activation(activation(name, "--stages", options)?),
    })
}

fn source_stage(name: &str, options: &Options, file: &SafeTensors<'_>) -> Result<SourceStage> {
    let read = |tensor| needed(name, vector(file, tensor));
    Ok(match name {
        "affine" => SourceStage::Affine { scale: read("src_scale")?, shift: read("src_shift")? },
        "gate" => SourceStage::Gate,
        _ => SourceStage::Activation(activation(name, "--source-stages", options)?),
    })
}

fn activation(name: &str, list: &str, options: &Options) -> Result<Activation> {
    Ok(match name {
        "relu" => Activation::Relu,
        "relu6" => Activation::Relu6,
        "clip" => {
            let (lo, hi) = options.clip.ok_or("stage clip needs --clip LO,HI")?;
            Activation::Clip { lo, hi }
        }
        "leaky_relu" => Activation::LeakyRelu { alpha: options.alpha.unwrap_or(0.01) },
        "elu" => Activation::Elu { alpha: options.alpha.unwrap_or(1.0) },
        "sigmoid" => Activation::Sigmoid,
        "tanh" => Activation::Tanh,
        "silu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluTanh,
        "hard_sigmoid" => Activation::HardSigmoid,
        "hard_swish" => Activation::HardSwish,
        "softplus" => Activation::Softplus,
        "mish" => Activation::Mish,
        _ => Err(format!("unknown stage {name:?} in {list}; --help lists the stages"))?,
    })
}

/// An operand that no stage uses is a stage forgotten.
fn unused(options: &Options) -> Result<()> {
    let has = |stage| {
        names(&options.stages).chain(names(&options.source_stages)).any(|name| name == stage)
    };
    if let Some((lo, hi)) = options.clip.filter(|_| !has("clip")) {
        Err(format!("--clip {lo},{hi} without a stage clip"))?;
    }
    if let Some(alpha) = options.alpha.filter(|_| !has("leaky_relu") && !has("elu")) {
        Err(format!("--alpha {alpha} without a stage leaky_relu or elu"))?;
    }
    if let Some(norm) = options.norm.as_ref().filter(|_| !has("batch_norm")) {
        Err(format!("--norm {norm} without a stage batch_norm"))?;
    }
    if let Some(path) = options.residual.as_ref().filter(|_| !has("residual")) {
        Err(format!("--residual {} without a stage residual", path.display()))?;
    }
    Ok(())
}

/// Says which stage wanted the tensor that is missing.
fn needed<T>(stage: &str, read: pointwise::Result<T>) -> Result<T> {
    Ok(read.map_err(|error| format!("stage {stage}: {error}"))?)
}

/// A scale and a shift that come together or not at all.
fn affine(
    file: &SafeTensors<'_>,
    gamma: &str,
    beta: &str,
) -> Result<Option<(Array1<f32>, Array1<f32>)>> {
    match (optional(vector(file, gamma))?, optional(vector(file, beta))?) {
        (None, None) => Ok(None),
        (Some(gamma), Some(beta)) => Ok(Some((gamma, beta))),
        (Some(_), None) => Err(format!("the checkpoint has {gamma}, but no {beta}"))?,
        (None, Some(_)) => Err(format!("the checkpoint has {beta}, but no {gamma}"))?,
    }
}
