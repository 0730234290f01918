//! Runs one pointwise layer from a checkpoint on a tensor: `apply --help` says how.

mod layer;
mod npy;
mod options;
mod quantized;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use ndarray::{ArrayD, ArrayViewD};
use pointwise::safetensors::SafeTensors;
use pointwise::{Device, Layout, nhwc, nhwc_mut};

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
    let last = options.layout == Layout::ChannelsLast;
    let weights = options.weights.as_ref().ok_or("no --weights")?;
    let bytes =
        std::fs::read(weights).map_err(|error| format!("{}: {error}", weights.display()))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| format!("{}: {error}", weights.display()))?;
    let device: Device = options.device.parse()?;
    let device = options.threads.into_iter().fold(device, Device::threads);
    let layer = layer::read(options, &file)?.prepare(&device)?;
    let gate = layer::gate(options, &file)?;

    let inputs = options.input.iter().map(|path| npy::read(path)).collect::<Result<Vec<_>>>()?;
    let residual = options.residual.as_ref().map(|path| npy::read(path)).transpose()?;
    let logical = |file| view(file, last);
    let sources: Vec<_> = inputs.iter().map(logical).collect();
    let residual = residual.as_ref().map(logical);

    let (first, more) = sources.split_first().ok_or("no --input")?;
    let mut shape = first.shape().to_vec();
    shape[1] = sources.iter().map(|source| source.shape()[1]).fold(0, usize::saturating_add);
    let mut dst_shape = layer.dst_shape(&shape)?;
    if last {
        dst_shape[1..].rotate_left(1);
    }
    let mut dst = npy::zeros(&dst_shape)?;

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
    npy::write(&options.output, &dst)?;
    let inputs: Vec<_> = inputs.iter().map(|input| format!("{:?}", input.shape())).collect();
    let (inputs, device) = (inputs.join(" + "), layer.device());
    writeln!(io::stdout(), "{inputs} -> {dst_shape:?}, {kernel} on {device}, {time:.1?}")?;
    Ok(())
}

/// A file's array with the logical axes `[n, c, …spatial]`.
fn view<T>(file: &ArrayD<T>, last: bool) -> ArrayViewD<'_, T> {
    if last { nhwc(file.view()) } else { file.view() }
}
