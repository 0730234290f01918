//! The command line.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use pointwise::DType;

/// Times the layers of a table and compares each with the machine's roof, measured in the same run.
///
/// Every result is verified against the reference in f64 before it is timed, and again after.
/// Layouts and kernels of a layer take turns.
#[derive(Parser, Debug)]
#[command(name = "bench", version, after_help = COLUMNS)]
pub struct Options {
    /// The table of layers: CSV with the columns model,layer,n,cin,cout,h,w,stride,groups,act in
    /// any order, among others [default: benches/layers.csv]
    #[arg(long, value_name = "FILE.csv")]
    pub layers: Option<PathBuf>,

    /// The batch of every layer, instead of the table's
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub batch: Option<usize>,

    /// What is timed: a forward pass as in inference, or a step of training, forward with a batch
    /// norm in place of the bias and backward for everything
    #[arg(long, value_enum, default_value = "forward")]
    pub pass: Pass,

    /// Verify only: a line for each layer, and nothing is timed
    #[arg(long, conflicts_with_all = ["csv", "plot"])]
    pub verify: bool,

    /// The type of the tensors' values; the roof is that of the fastest products of it (bf16, int8)
    /// that the CPU has. int8: u8 in and out, i8 weights, on the CPU, none, relu or relu6 as act, no
    /// --pass train
    #[arg(
        long,
        default_value = "f32",
        value_parser = PossibleValuesParser::new(Numbers::ALL.map(Numbers::name))
            .map(|name| Numbers::ALL.into_iter().find(|numbers| numbers.name() == name))
            .try_map(|numbers| numbers.ok_or("one of the names"))
    )]
    pub dtype: Numbers,

    /// The memory order of the tensors [default: both]
    #[arg(long)]
    pub layout: Option<Order>,

    /// CPU threads, of the layers and of the roof
    #[arg(
        long,
        value_name = "T",
        default_value_t = 1,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024)
    )]
    pub threads: usize,

    /// cpu, cuda or cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    pub device: String,

    /// Forces a kernel; given several times: each of them. A layer that a kernel refuses is skipped
    #[arg(long, value_name = "NAME")]
    pub kernel: Vec<String>,

    /// Where the results go [default: stdout]
    #[arg(long, value_name = "OUT")]
    pub csv: Option<PathBuf>,

    /// A picture: the roofs, and a point for each result
    #[arg(long, value_name = "OUT.svg")]
    pub plot: Option<PathBuf>,
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pass {
    Forward,
    Train,
}

/// What tensors hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    Real(DType),
    Int8,
}

impl Numbers {
    const ALL: [Numbers; 4] = [
        Numbers::Real(DType::F32),
        Numbers::Real(DType::F16),
        Numbers::Real(DType::Bf16),
        Numbers::Int8,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Numbers::Real(dtype) => dtype.name(),
            Numbers::Int8 => "int8",
        }
    }
}

/// A memory order by its usual name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    Nchw,
    Nhwc,
}

impl Order {
    pub fn name(self) -> &'static str {
        match self {
            Order::Nchw => "nchw",
            Order::Nhwc => "nhwc",
        }
    }
}

const COLUMNS: &str = "\
Activations of a table (act): none, relu, relu6, sigmoid, tanh, silu, gelu, gelu_tanh,
hard_sigmoid, hard_swish, softplus, mish. Every layer has a bias.

Columns of the results, beside the table's:
  threads        CPU threads of the layer and of the roof; 1 on a GPU
  kernel         the kernel that ran
  median_us      time of a call, µs: the median of all that were timed
  min_us         the fastest
  gflops         GFLOP/s by the median; a multiply-add is two
  gbps           GB/s by the median, src, weight and dst counted once
  fma_peak       GFLOP/s of multiply-adds in registers, the highest of five samples that were taken
                 in between the timings of this layer
  roof_bw        GB/s of reading as many bytes as the layer touches over and over, likewise
  peak_fraction  gflops as a fraction of the roof, the lower of fma_peak and
                 roof_bw x gflops / gbps
  max_err        the largest error, as a multiple of the tolerance
                 max|weight| max|src| K 2^-23 + eps_out max|result|, where K is cin / groups and
                 eps_out 2^-23 (f16 2^-10, bf16 2^-7), in f32 four times that where act is a smooth
                 function; weight and src as the type holds them. Of int8, a multiple of one step,
                 or of a step in one of 1000 values, whichever is larger

A step of training counts three products, of f32 in fma_peak; src and weight, which is f32, thrice
each, dst twice and the f32 result of the convolution. Its kernel is `train`, and its max_err, of
everything that it gives, a multiple of (positions + cin + cout) 2^-23 max(1, max|result|); in 16 bits
of dst and the gradient by src half a step of the result more, and on a GPU of the gradients by weight
and src half a step of max|result|, as the gradient by the convolution's result is rounded in between.

On a GPU fma_peak and roof_bw are computed from clocks and widths. The exit code is 1 if an error is
above 1 or, on the CPU, a fraction above 1.02 in a second measurement too: then the roof is wrong.

  bench --threads 2 --plot roofline.svg > results.csv
  (head -n 1 benches/layers.csv; grep mobilenet benches/layers.csv) | bench --layers /dev/stdin";
