//! Says what is on a picture: EfficientNet-Lite0, its 1x1 convolutions run by this crate.

mod network;
mod picture;
mod spatial;

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use network::{CLASSES, Network};
use pointwise::safetensors::SafeTensors;
use pointwise::{DType, Device, Layout};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Says what is on a picture, with EfficientNet-Lite0 pretrained on ImageNet.
///
/// Prints the five likeliest of ImageNet's 1000 classes (rank, probability, label), in 16 or 8 bits how
/// far the logits are from those of f32, then the time per picture and what each pointwise convolution of
/// the network took of it.
#[derive(Parser)]
#[command(name = "classify", version)]
struct Args {
    /// A PNG or JPEG file [default: the bundled cat]
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Where pointwise convolutions run: cpu, cuda, or cuda:N [default: the best there is]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// CPU threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// What the tensors of pointwise layers hold, weights included: f32, f16, bf16 or int8.
    /// Everything else stays f32, and is rounded at their edges. The ranges of int8 are those of
    /// the bundled pictures
    #[arg(long, default_value = "f32", value_parser = parse_numbers)]
    dtype: Numbers,
    /// Memory order of the activations: nchw or nhwc
    #[arg(long, default_value = "nchw", value_parser = parse_layout)]
    layout: Layout,
    /// Timed passes after the one that gives the answer; 0 prints the answer only
    #[arg(long, value_name = "N", default_value_t = 20)]
    runs: u32,
    /// The network's weights, safetensors with PyTorch's names [default: the bundled ones]
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
}

fn parse_layout(name: &str) -> std::result::Result<Layout, &'static str> {
    match name {
        "nchw" => Ok(Layout::ChannelsFirst),
        "nhwc" => Ok(Layout::ChannelsLast),
        _ => Err("expected nchw or nhwc"),
    }
}

/// What the tensors of pointwise layers hold.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Numbers {
    Real(DType),
    Int8,
}

impl Numbers {
    fn name(self) -> &'static str {
        match self {
            Numbers::Real(dtype) => dtype.name(),
            Numbers::Int8 => "int8",
        }
    }
}

fn parse_numbers(name: &str) -> std::result::Result<Numbers, &'static str> {
    match name {
        "int8" => Ok(Numbers::Int8),
        _ => name.parse().map(Numbers::Real).map_err(|_| "expected f32, f16, bf16 or int8"),
    }
}

/// The pictures that say how far the values of 8-bit layers reach.
const CALIBRATION: [&str; 2] = ["chelsea.png", "coffee.png"];

fn main() -> ExitCode {
    let result = match Args::try_parse() {
        Ok(args) => run(&args),
        Err(error) if !error.use_stderr() => error.exit(),
        // The first paragraph says what is wrong; usage follows it.
        Err(error) => {
            Err(error.to_string().split("\n\n").next().unwrap_or_default().to_owned().into())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads has seen enough: `classify | head -n 1`.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            let message = error.to_string();
            let message = message.trim_start_matches("error: ");
            let words: Vec<_> = message.split_whitespace().collect();
            eprintln!("error: {}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// An error with the file that it is about.
fn about<E: Display>(path: &Path) -> impl FnOnce(E) -> Box<dyn Error + Send + Sync> {
    move |error| format!("{}: {error}", path.display()).into()
}

/// A file of `examples/data`.
fn bundled(name: &str) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data").join(name);
    if path.exists() {
        return Ok(path);
    }
    let path = path.display();
    Err(format!("{path} is missing: the published package leaves it out, the repository has it")
        .into())
}

fn run(args: &Args) -> Result<()> {
    let image = args.image.clone().map_or_else(|| bundled("chelsea.png"), Ok)?;
    let pixels = picture::read(&image).map_err(about(&image))?;
    let labels = bundled("imagenet_classes.txt")?;
    let text = std::fs::read_to_string(&labels).map_err(about(&labels))?;
    let labels: Vec<String> = text.lines().map(str::to_owned).collect();
    if labels.len() != CLASSES {
        return Err(format!("{} labels, expected {CLASSES}", labels.len()).into());
    }
    let weights =
        args.weights.clone().map_or_else(|| bundled("efficientnet_lite0.safetensors"), Ok)?;
    let bytes = std::fs::read(&weights).map_err(about(&weights))?;
    let file = SafeTensors::deserialize(&bytes).map_err(about(&weights))?;

    let device = args.device.as_deref().map_or_else(|| Ok(Device::best()), str::parse)?;
    let threads = args.threads.map_or(0, usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    pool.install(|| {
        let network =
            |dtype| Network::new(&file, &device, args.layout, dtype).map_err(about(&weights));
        let mut reference = match args.dtype {
            Numbers::Real(DType::F32) => None,
            _ => Some(network(DType::F32)?),
        };
        let mut network = match args.dtype {
            Numbers::Real(dtype) => network(dtype)?,
            Numbers::Int8 => {
                let picture = |name| -> Result<Vec<f32>> {
                    let path = bundled(name)?;
                    let pixels = picture::read(&path).map_err(about(&path))?;
                    Ok(picture::normalise(&pixels, args.layout))
                };
                let pictures = CALIBRATION.into_iter().map(picture).collect::<Result<Vec<_>>>()?;
                network(DType::F32)?.quantized(&pictures, &device)?
            }
        };
        let picture = picture::normalise(&pixels, args.layout);
        let logits = network.forward(&picture)?;
        let mut out = io::stdout().lock();
        for (rank, (label, probability)) in picture::top(logits, &labels, 5).iter().enumerate() {
            writeln!(out, "{} {probability:.4} {label}", rank + 1)?;
        }
        if let Some(reference) = &mut reference {
            let exact = reference.forward(&picture)?;
            writeln!(out, "{}", agreement(args.dtype, logits, exact))?;
        }
        if args.runs > 0 {
            let times = Times::measure(&mut network, &picture, args.runs)?;
            writeln!(out)?;
            times.report(&mut out, &network, args.layout, &device)?;
        }
        Ok(())
    })
}

/// How far logits are from those of f32.
fn agreement(numbers: Numbers, logits: &[f32], exact: &[f32]) -> String {
    let pairs = || logits.iter().zip(exact).map(|(&x, &y)| (f64::from(x), f64::from(y)));
    // A maximum would pass over NaN.
    let larger = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
    let largest = pairs().map(|(x, y)| (x - y).abs()).fold(0.0, larger);
    let range = pairs().map(|(_, y)| y.abs()).fold(0.0, f64::max);
    let dot = |f: fn((f64, f64)) -> f64| pairs().map(f).sum::<f64>();
    let cosine = dot(|(x, y)| x * y) / (dot(|(x, _)| x * x) * dot(|(_, y)| y * y)).sqrt();
    format!(
        "logits in {} beside f32: largest difference {largest:.4} of at most {range:.2}, \
         cosine {cosine:.6}",
        numbers.name()
    )
}

/// Everything that is not a pointwise layer.
const REST: &str = "stem, depthwise and mean";

/// What the timed passes took.
struct Times {
    passes: Vec<Duration>,
    /// For each step, one time per pass.
    steps: Vec<Vec<Duration>>,
}

impl Times {
    fn measure(network: &mut Network, picture: &[f32], runs: u32) -> Result<Times> {
        let runs = runs as usize;
        let mut times = Times {
            passes: Vec::with_capacity(runs),
            steps: vec![Vec::with_capacity(runs); network.steps().len()],
        };
        // Shows nothing unless stderr is a terminal.
        let bar = ProgressBar::new(runs as u64);
        bar.set_style(ProgressStyle::with_template("timing {bar:40} {pos}/{len}")?);
        for _ in 0..runs {
            let start = Instant::now();
            network.forward(picture)?;
            times.passes.push(start.elapsed());
            for (step, &time) in times.steps.iter_mut().zip(network.times()) {
                step.push(time);
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(times)
    }

    fn report(
        mut self,
        out: &mut impl Write,
        network: &Network,
        layout: Layout,
        device: &Device,
    ) -> Result<()> {
        let order = match layout {
            Layout::ChannelsFirst => "NCHW",
            Layout::ChannelsLast => "NHWC",
        };
        let (runs, threads) = (self.passes.len(), rayon::current_num_threads());
        let pass = median(&mut self.passes);
        let fastest = self.passes[0].as_secs_f64() * 1e3;
        writeln!(
            out,
            "{:.2} ms per picture (median of {runs}; fastest {fastest:.2} ms), {order}, \
             {threads} CPU thread{}, pointwise layers on {device}",
            pass * 1e3,
            if threads == 1 { "" } else { "s" }
        )?;

        let mut rows = Vec::new();
        let (mut rest, mut pointwise, mut flops) = (0.0, 0.0, 0.0);
        for (step, times) in network.steps().iter().zip(&mut self.steps) {
            let seconds = median(times);
            let Some((work, kernel)) = step.pointwise(layout)? else {
                rest += seconds;
                continue;
            };
            let ([c_in, h, w], [c_out, ..]) = (step.src, step.dst);
            rows.push((
                step.name.as_str(),
                format!("{c_in}->{c_out}, {h}x{w}, stride 1"),
                kernel,
                seconds,
                work,
            ));
            pointwise += seconds;
            flops += work;
        }
        let total = pointwise + rest;
        let width = |column: fn(&(&str, String, &str, f64, f64)) -> usize, least: &str| {
            rows.iter().map(column).max().unwrap_or(0).max(least.len())
        };
        let names = width(|row| row.0.len(), REST);
        let shapes = width(|row| row.1.len(), "shape");
        let kernels = width(|row| row.2.len(), "kernel");
        writeln!(
            out,
            "{:names$}  {:shapes$}  {:kernels$}  {:>8}  GFLOP/s  {:>6}",
            "layer", "shape", "kernel", "µs", "share"
        )?;
        let mut line = |name: &str, shape: &str, kernel: &str, seconds: f64, flops: Option<f64>| {
            let speed = flops.map_or("".into(), |flops| format!("{:.1}", flops / seconds / 1e9));
            writeln!(
                out,
                "{name:names$}  {shape:shapes$}  {kernel:kernels$}  {:8.1}  {speed:>7}  {:4.1} %",
                seconds * 1e6,
                100.0 * seconds / total
            )
        };
        for (name, shape, kernel, seconds, work) in &rows {
            line(name, shape, kernel, *seconds, Some(*work))?;
        }
        line(&format!("{} pointwise layers", rows.len()), "", "", pointwise, Some(flops))?;
        line(REST, "", "", rest, None)?;
        Ok(())
    }
}

/// In seconds; sorts the times.
fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    let upper = times[times.len() / 2];
    let lower = times[(times.len() - 1) / 2];
    (lower + upper).as_secs_f64() / 2.0
}
