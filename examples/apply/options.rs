//! The command line.

use std::ops::Range;
use std::path::PathBuf;

use clap::Parser;
use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use pointwise::quantized::{Fp8, Per};
use pointwise::{DType, Layout};

/// Runs one pointwise (1x1) convolution layer from a checkpoint on a tensor:
/// stages(conv(source_stages(input))).
#[derive(Parser, Debug)]
#[command(name = "apply", version, next_line_help = true, after_help = NAMES)]
pub struct Options {
    /// The checkpoint with the layer's tensors (listed below)
    #[arg(long, value_name = "W.safetensors", required_unless_present = "quantized")]
    pub weights: Option<PathBuf>,

    /// Instead of --weights: a layer of 8-bit integers or floats (its tensors, and what input and
    /// output hold, are listed below)
    #[arg(
        long,
        value_name = "Q.safetensors",
        conflicts_with_all = [
            "weights", "stages", "source_stages", "residual", "alpha", "clip", "partial", "shuffle",
            "layer", "norm", "dtype", "train",
        ]
    )]
    pub quantized: Option<PathBuf>,

    /// What shares a scale that the call finds, in a layer of integers without src_scale (default
    /// position): the channels at each position, a sample or the tensor
    #[arg(long, value_name = "position|sample|tensor", requires = "quantized", value_parser = per)]
    pub per: Option<Per>,

    /// What the source of a layer of 8-bit floats is rounded to, and its result if that is quantised
    /// (default e4m3)
    #[arg(long, value_name = "e4m3|e5m2", requires = "quantized", value_parser = fp8)]
    pub activations: Option<Fp8>,

    /// Take weight and bias from NAME.weight and NAME.bias, as PyTorch calls them in a network
    #[arg(long, value_name = "NAME")]
    pub layer: Option<String>,

    /// Take running_mean, running_var, gamma and beta from NAME.running_mean, NAME.running_var,
    /// NAME.weight and NAME.bias
    #[arg(long, value_name = "NAME")]
    pub norm: Option<String>,

    /// The source: f32, rank 2 ([n, c]) to 5, C or Fortran order; given several times: the files'
    /// concatenation along the channels
    #[arg(long, required = true, value_name = "X.npy")]
    pub input: Vec<PathBuf>,

    /// The result: f32, C order. Appears complete or not at all
    #[arg(long, value_name = "Y.npy")]
    pub output: PathBuf,

    /// What follows the convolution, in this order (names below); none is the bare convolution
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub stages: Vec<String>,

    /// What the source goes through before the convolution, in this order (names below)
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub source_stages: Vec<String>,

    /// Order of axes in every file: nchw is [n, c, …spatial], nhwc is [n, …spatial, c]
    #[arg(long, default_value = "nchw", value_parser = layout)]
    pub layout: Layout,

    /// What the layer's tensors hold while it runs, weight included (but with --train, where
    /// parameters and their gradients are f32). Files are f32 all the same: what is read is rounded to
    /// it, to the nearest
    #[arg(
        long,
        default_value = "f32",
        value_parser = PossibleValuesParser::new(DType::ALL.iter().map(|dtype| dtype.name()))
            .try_map(|name| name.parse::<DType>())
    )]
    pub dtype: DType,

    /// Groups of the convolution
    #[arg(long, default_value_t = 1, value_name = "G")]
    pub groups: usize,

    /// Keep every S-th position of each spatial axis
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub stride: usize,

    /// What the stage residual adds; of the result's shape
    #[arg(long, value_name = "R.npy")]
    pub residual: Option<PathBuf>,

    /// What batch_norm and layer norms add to the variance
    #[arg(long, default_value = "1e-5", allow_negative_numbers = true, value_parser = eps)]
    pub eps: f32,

    /// Negative side of leaky_relu (default 0.01) and elu (default 1)
    #[arg(long, allow_negative_numbers = true, value_name = "A")]
    pub alpha: Option<f32>,

    /// Bounds of the stage clip; inf or -inf for none
    #[arg(long, allow_hyphen_values = true, value_name = "LO,HI", value_parser = clip)]
    pub clip: Option<(f32, f32)>,

    /// Convolve the channels A..B of the source only, and pass the others through beside the result
    #[arg(long, value_name = "A:B", value_parser = range)]
    pub partial: Option<Range<usize>>,

    /// Shuffle the output channels between G groups (ShuffleNet), after all stages
    #[arg(long, value_name = "G")]
    pub shuffle: Option<usize>,

    /// At most T threads; the result does not depend on it
    #[arg(long, value_name = "T", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub threads: Option<usize>,

    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: String,

    /// A forward pass with batch statistics, then a backward pass with the gradient of the loss by
    /// the result; on CUDA not for a layer norm
    #[arg(long, requires_all = ["d_output", "gradients"])]
    pub train: bool,

    /// The gradient by the result: f32, of the result's shape
    #[arg(long, value_name = "DY.npy", requires = "train")]
    pub d_output: Option<PathBuf>,

    /// Where the gradients and the new running statistics go (listed below)
    #[arg(long, value_name = "G.safetensors", requires = "train")]
    pub gradients: Option<PathBuf>,

    /// The batch's share in the new running statistics
    #[arg(long, value_name = "M", default_value_t = 0.1, requires = "train")]
    pub momentum: f64,
}

const NAMES: &str = "\
Stages with tensors, at most one of each:
  bias, batch_norm, prelu, residual, layer_norm (over the channels of each position) or
    layer_norm_all (over the channels and positions of each sample)
Activations, which stand as often as you like and share --alpha and --clip:
  relu, relu6, clip, leaky_relu, elu, sigmoid, tanh, silu, gelu (erf), gelu_tanh, hard_sigmoid,
    hard_swish, softplus, mish
Source stages, at most one of each:
  affine, gate; and every activation

Tensors of the checkpoint, F32, F16 or BF16; others are ignored:
  weight                      [c_out, c_in / groups], trailing axes of length 1 accepted
  bias                        [c_out], for the stage bias
  running_mean, running_var   [c_out], for the stage batch_norm
  gamma, beta                 [c_out], its affine; both or neither
  slope                       [c_out] or [1], for the stage prelu
  ln_gamma, ln_beta           [c_out], the affine of a layer norm; both or neither
  src_scale, src_shift        [c_in], for the source stage affine
  gate                        [n, c_in], for the source stage gate (squeeze and excitation)

Tensors of --gradients, F32, for what the layer has:
  d_src (d_src0, d_src1, … for several inputs), d_residual, d_gate; d_weight, d_bias, d_gamma,
  d_beta, d_slope, d_ln_gamma, d_ln_beta, d_src_scale, d_src_shift; running_mean, running_var

Tensors of a layer of 8-bit numbers (--quantized); weight and src_scale tell which of three it is:
  weight                      [c_out, c_in / groups], trailing axes of length 1 accepted
  weight_scale                F32 [c_out]
of integers (weight is I8), from u8 or i8 to u8 or i8, or to f32 without dst_scale and dst_zero_point:
  bias                        I32 [c_out], optional
  src_scale, dst_scale        F32, one element
  src_zero_point, dst_zero_point
                              U8 or I8, one element, of the type of the input and of the output;
                                where they are I32 or I64, both have the input's type
of integers that the call makes of its source (weight is I8, no src_scale), from f32 to f32:
  bias                        F32 [c_out], optional
of floats (weight is F8_E4M3 or F8_E5M2), from f32 to f32: what is read is divided by src_scale and
rounded to --activations, and a result with dst_scale is written as the numbers that it stands for:
  weight_scale                or one element for all channels
  bias                        F32 [c_out], optional
  src_scale                   F32, one element
  dst_scale                   F32, one element, optional

An error is one line on stderr and exit code 1.

  apply --weights layer.safetensors --input x.npy --output y.npy --stages batch_norm,relu";

fn layout(text: &str) -> Result<Layout, String> {
    match text {
        "nchw" => Ok(Layout::ChannelsFirst),
        "nhwc" => Ok(Layout::ChannelsLast),
        _ => Err("expected nchw or nhwc".into()),
    }
}

fn eps(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(eps) if eps.is_finite() && eps > 0.0 => Ok(eps),
        _ => Err("expected a finite and positive number".into()),
    }
}

fn clip(text: &str) -> Result<(f32, f32), String> {
    let bounds = text.split_once(',').and_then(|(lo, hi)| {
        Some((lo.trim().parse::<f32>().ok()?, hi.trim().parse::<f32>().ok()?))
    });
    match bounds {
        Some((lo, hi)) if lo <= hi => Ok((lo, hi)),
        _ => Err("expected LO,HI with LO <= HI".into()),
    }
}

fn per(text: &str) -> Result<Per, String> {
    match text {
        "position" => Ok(Per::Position),
        "sample" => Ok(Per::Sample),
        "tensor" => Ok(Per::Tensor),
        _ => Err("expected position, sample or tensor".into()),
    }
}

fn fp8(text: &str) -> Result<Fp8, String> {
    match text {
        "e4m3" => Ok(Fp8::E4M3),
        "e5m2" => Ok(Fp8::E5M2),
        _ => Err("expected e4m3 or e5m2".into()),
    }
}

fn range(text: &str) -> Result<Range<usize>, String> {
    text.split_once(':')
        .and_then(|(a, b)| Some(a.trim().parse().ok()?..b.trim().parse().ok()?))
        .filter(|range: &Range<usize>| !range.is_empty())
        .ok_or_else(|| "expected A:B with A < B".into())
}
