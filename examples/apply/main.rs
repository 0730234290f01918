//! Runs one pointwise layer from a checkpoint on a tensor: `apply --help` says how.

mod layer;
mod npy;
mod options;
mod quantized;
mod train;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use ndarray::{Array2, ArrayD, ArrayViewD};
use pointwise::safetensors::SafeTensors;
use pointwise::{DType, Device, Element, Layout, Pointwise, bf16, f16, nhwc, nhwc_mut};

use options::Options;

/// Whatever goes wrong is told to the user in one line.
type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if !error.use_stderr() => {
            return match error.print() {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Err(error) => {
            // The first paragraph says what is wrong, the others how to go on.
            let text = error.to_string();
            return fail(
                text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: "),
            );
        }
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

fn fail(message: &str) -> ExitCode {
    let words: Vec<_> = message.split_whitespace().collect();
    // Nobody is left to hear that stderr is closed.
    let _ = writeln!(io::stderr(), "error: {}", words.join(" "));
    ExitCode::FAILURE
}

fn run(options: &Options) -> Result<()> {
    if let Some(path) = &options.quantized {
        return quantized::run(options, path);
    }
    let weights = options.weights.as_ref().ok_or("no --weights")?;
    let bytes = read(weights)?;
    let file = checkpoint(weights, &bytes)?;
    let device: Device = options.device.parse()?;
    let device = options.threads.into_iter().fold(device, Device::threads);
    let layer = layer::read(options, &file)?;
    let gate = layer::gate(options, &file)?;

    let run = match (options.train, options.dtype) {
        (false, DType::F16) => run_as::<f16>,
        (false, DType::Bf16) => run_as::<bf16>,
        (false, _) => run_as::<f32>,
        (true, DType::F16) => run_training::<f16>,
        (true, DType::Bf16) => run_training::<bf16>,
        (true, _) => run_training::<f32>,
    };
    run(options, &device, &layer, gate)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn checkpoint<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Runs the layer on tensors of a type, to which the files' values are rounded.
fn run_as<T: Element>(
    options: &Options,
    device: &Device,
    layer: &Pointwise,
    gate: Option<Array2<f32>>,
) -> Result<()> {
    let last = options.layout == Layout::ChannelsLast;
    let layer = layer.prepare_as::<T>(device, Default::default())?;
    let tensor = |path: &PathBuf| Ok(npy::read(path)?.mapv(T::from_f32));
    let inputs = options.input.iter().map(tensor).collect::<Result<Vec<_>>>()?;
    let residual = options.residual.as_ref().map(tensor).transpose()?;
    let gate = gate.map(|gate| gate.mapv(T::from_f32));
    let logical = |file| view(file, last);
    let sources: Vec<_> = inputs.iter().map(logical).collect();
    let residual = residual.as_ref().map(logical);

    let (first, more) = sources.split_first().ok_or("no --input")?;
    let shape = joined(&sources);
    let dst_shape = in_file(layer.dst_shape(&shape)?, last);
    let mut dst = npy::zeros(&dst_shape)?.mapv(T::from_f32);

    let mut call = layer.call(first);
    for source in more {
        call = call.concat(source);
    }
    if let Some(residual) = &residual {
        call = call.residual(residual);
    }
    if let Some(gate) = &gate {
        call = call.gate(gate);
    }
    let start = Instant::now();
    match last {
        true => call.run_into(&mut nhwc_mut(dst.view_mut()))?,
        false => call.run_into(&mut dst)?,
    }
    let time = start.elapsed();

    let kernel = layer.plans_in(&shape, options.layout)?.first().map_or("no kernel", |c| c.kernel);
    npy::write(&options.output, &dst.mapv(T::to_f32))?;
    let inputs: Vec<_> = inputs.iter().map(|input| format!("{:?}", input.shape())).collect();
    let (inputs, device) = (inputs.join(" + "), layer.device());
    writeln!(io::stdout(), "{inputs} -> {dst_shape:?}, {kernel} on {device}, {time:.1?}")?;
    Ok(())
}

/// Runs the layer and its gradients with batch statistics on tensors of a type, to which the files'
/// values are rounded.
fn run_training<T: Element>(
    options: &Options,
    device: &Device,
    layer: &Pointwise,
    gate: Option<Array2<f32>>,
) -> Result<()> {
    let (Some(d_output), Some(gradients)) = (&options.d_output, &options.gradients) else {
        return Err("--train takes --d-output and --gradients".into());
    };
    let last = options.layout == Layout::ChannelsLast;
    let tensor = |path: &PathBuf| Ok(npy::read(path)?.mapv(T::from_f32));
    let inputs = options.input.iter().map(tensor).collect::<Result<Vec<_>>>()?;
    let residual = options.residual.as_ref().map(tensor).transpose()?;
    let gate = gate.map(|gate| gate.mapv(T::from_f32));
    let d_dst = tensor(d_output)?;
    let logical = |file| view(file, last);
    let sources: Vec<_> = inputs.iter().map(logical).collect();
    let prepared = layer.prepare(device)?;
    let dst_shape = in_file(prepared.dst_shape(&joined(&sources))?, last);
    let mut dst = npy::zeros(&dst_shape)?.mapv(T::from_f32);
    let residual = residual.as_ref().map(logical);
    let tensors = train::Tensors { sources, residual, gate, d_dst: logical(&d_dst), last };
    train::run(layer, device, options.momentum, &tensors, &mut dst, gradients)?;
    npy::write(&options.output, &dst.mapv(T::to_f32))?;
    let gradients = gradients.display();
    writeln!(io::stdout(), "-> {dst_shape:?}, gradients in {gradients}, on {device}")?;
    Ok(())
}

/// The shape of the sources' concatenation along the channels, logical; empty without any.
fn joined<T>(sources: &[ArrayViewD<'_, T>]) -> Vec<usize> {
    let mut shape = sources.first().map_or(Vec::new(), |source| source.shape().to_vec());
    if let Some(channels) = shape.get_mut(1) {
        let all = sources.iter().map(|source| source.shape().get(1).copied().unwrap_or(0));
        *channels = all.fold(0, usize::saturating_add);
    }
    shape
}

/// A logical shape in the order of the files' axes.
fn in_file(mut shape: Vec<usize>, last: bool) -> Vec<usize> {
    if last {
        shape[1..].rotate_left(1);
    }
    shape
}

/// A file's array with the logical axes `[n, c, …spatial]`.
fn view<T>(file: &ArrayD<T>, last: bool) -> ArrayViewD<'_, T> {
    if last { nhwc(file.view()) } else { file.view() }
}
