//! Times every layer of `layers.csv` on a GPU, in both layouts, and prints CSV: `--help` says how.
//! `peers/gpu.py` times PyTorch in the same way.

mod forward;
mod int8;
#[path = "../../examples/bench/layers.rs"]
mod layers;
mod tensors;
mod timer;
mod train;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use pointwise::{CudaDevice, Layout, Math, bf16, f16};

use layers::{Layer, Table};
use timer::Timer;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const LAYOUTS: [Layout; 2] = [Layout::ChannelsFirst, Layout::ChannelsLast];

/// Times layers on a GPU in both layouts, and prints CSV.
///
/// Results are verified against the CPU's before they are timed. Times are the GPU's own, between
/// events, and L2 is flushed before each call.
#[derive(Parser)]
struct Options {
    /// The batch of every layer [default: 32, or that of FILE]
    #[arg(long)]
    batch: Option<usize>,

    /// A table of layers instead of `layers.csv` and a square product
    #[arg(long, value_name = "FILE")]
    layers: Option<PathBuf>,

    /// Only layers whose `model,layer` contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,

    /// Of all kernels only the one that the planner takes
    #[arg(long)]
    chosen: bool,

    /// Kernels whose stores follow the layout, each with its sums shared by several numbers of blocks
    #[arg(long, conflicts_with = "chosen")]
    splits: bool,

    /// Allows products of f32 on tensor cores
    #[arg(long)]
    tf32: bool,

    /// What tensors hold; int8: u8 in and out, weights of i8
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Numbers,

    /// train: convolution, batch norm of the batch's statistics and activation, then all gradients
    #[arg(long, value_enum, default_value = "forward")]
    pass: Pass,

    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn math(&self) -> Math {
        if self.tf32 { Math::Tf32 } else { Math::F32 }
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Numbers {
    F32,
    F16,
    Bf16,
    Int8,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Pass {
    Forward,
    Train,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every layer was right.
fn run(options: &Options) -> Result<bool> {
    let table = match &options.layers {
        Some(path) => Table::read(path, options.batch)?,
        None => {
            let mut table = Table::built_in(options.batch.or(Some(32)))?;
            table.layers.push(square());
            table
        }
    };
    if options.tf32 && options.dtype != Numbers::F32 {
        Err("--tf32 is for f32")?;
    }
    let measure = match (options.pass, options.dtype) {
        (Pass::Forward, Numbers::F32) => forward::run::<f32>,
        (Pass::Forward, Numbers::F16) => forward::run::<f16>,
        (Pass::Forward, Numbers::Bf16) => forward::run::<bf16>,
        (Pass::Forward, Numbers::Int8) => int8::run,
        (Pass::Train, Numbers::F32) => train::run,
        (Pass::Train, _) => Err("--pass train takes f32")?,
    };
    let timer = Timer::new(&CudaDevice::open(0)?)?;
    eprintln!(
        "{}, an empty call takes {:.2} us, and queueing a layer the host's thread {:.2} us",
        timer.device,
        timer.time(|| Ok(()))?.0,
        timer::host_time(&timer.device)?
    );

    println!(
        "model,layer,n,cin,cout,h,w,stride,groups,act,layout,contender,kernel,median_us,min_us,gflops"
    );
    let mut all_right = true;
    for layer in &table.layers {
        if format!("{},{}", layer.model, layer.layer).contains(&options.only)
            && let Err(error) = measure(layer, options, &timer)
        {
            eprintln!("{}:{}: {layer}: {error}", table.name, layer.line);
            all_right = false;
        }
    }
    Ok(all_right)
}

/// A product large and square enough that only arithmetic counts.
fn square() -> Layer {
    Layer {
        line: 0,
        model: "square".into(),
        layer: "4096".into(),
        n: 1,
        c_in: 4096,
        c_out: 4096,
        h: 64,
        w: 64,
        stride: 1,
        groups: 1,
        activation: None,
    }
}

/// A line of the CSV; median and minimum in microseconds.
fn print(
    layer: &Layer,
    layout: Layout,
    (contender, kernel): (&str, &str),
    (median, min): (f64, f64),
    flops: f64,
) {
    let Layer { model, layer: name, n, c_in, c_out, h, w, stride, groups, .. } = layer;
    let act = layer.act();
    let layout = match layout {
        Layout::ChannelsFirst => "nchw",
        Layout::ChannelsLast => "nhwc",
    };
    let gflops = flops / median / 1e3;
    println!(
        "{model},{name},{n},{c_in},{c_out},{h},{w},{stride},{groups},{act},{layout},{contender},\
         {kernel},{median:.2},{min:.2},{gflops:.1}"
    );
}
