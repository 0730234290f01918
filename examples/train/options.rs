//! The command line.

use std::path::PathBuf;

use clap::Parser;
use clap::builder::RangedU64ValueParser;

/// Trains PointNet to read handwritten digits, given as clouds of their inked pixels.
///
/// A fifth of the digits is held out. After each epoch it prints the loss and the accuracy in
/// training, and the accuracy on the held-out fifth; the last line is `test accuracy NN.N %`.
#[derive(Parser, Debug)]
#[command(name = "train", version, next_line_help = true, after_help = FILES)]
pub struct Options {
    /// Epochs in all, those before a resumption included
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = RangedU64ValueParser::<usize>::new().range(1..=10_000))]
    pub epochs: usize,

    /// Of initial weights, the digits' order and their distortion [default: 0]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    pub seed: Option<u64>,

    /// Where the layers run: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: String,

    /// At most T threads; the result does not depend on it
    #[arg(long, value_name = "T", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub threads: Option<usize>,

    /// The digits [default: the bundled 1797]
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,

    /// A folder for what is written (below); made if it is not there [default: target/train in the
    /// repository]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Go on from a resume.safetensors; ends bit for bit as an uninterrupted run
    #[arg(long, value_name = "FILE")]
    pub resume: Option<PathBuf>,
}

const FILES: &str = "\
Digits: a safetensors file with `images` U8 [n, 8, 8], ink from 0 to 16, and `labels` U8 [n].

Written after each epoch:
  pointnet.safetensors  the network, under the names of PyTorch's state dict
  resume.safetensors    all that --resume needs
  curves.svg            loss and accuracy

An error is one line on stderr and exit code 1.";
