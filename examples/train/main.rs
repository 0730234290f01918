//! Trains PointNet on handwritten digits: `train --help` says how.

mod adam;
mod checkpoint;
mod data;
mod loss;
mod network;
mod options;
mod plot;
mod pool;
mod training;

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use pointwise::Device;

use data::Digits;
use options::Options;
use training::Training;

/// Whatever goes wrong is told to the user in one line.
type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let result = match Options::try_parse() {
        Ok(options) => run(&options),
        Err(error) if !error.use_stderr() => error.exit(),
        // The first paragraph says what is wrong; usage follows it.
        Err(error) => Err(error.to_string().split("\n\n").next().unwrap_or_default().into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let message = error.to_string();
            let words: Vec<_> = message.trim_start_matches("error: ").split_whitespace().collect();
            // Nobody is left to hear that stderr is closed.
            let _ = writeln!(io::stderr(), "error: {}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let bundled = root.join("examples/train/digits.safetensors");
    let digits = Digits::read(options.data.as_deref().unwrap_or(&bundled))?;
    let device: Device = options.device.parse()?;
    let device = options.threads.into_iter().fold(device, Device::threads);
    let mut training = match &options.resume {
        Some(path) => checkpoint::resume(path, &device)?,
        None => Training::new(options.seed.unwrap_or(0), &device)?,
    };
    let done = training.history.len();
    if let Some(path) = options.resume.as_ref().filter(|_| done >= options.epochs) {
        let (path, epochs) = (path.display(), options.epochs);
        Err(format!("{path} has {done} epochs already; --epochs {epochs} leaves nothing to do"))?;
    }
    let out = options.out.clone().unwrap_or_else(|| root.join("target/train"));
    fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;

    let mut say = Output { stdout: io::stdout(), open: true };
    say.line(format_args!(
        "PointNet with {} parameters on {device}, {} digits to train on, {} held out",
        training.network.trainable().iter().map(|(_, len)| len).sum::<usize>(),
        digits.training().len(),
        digits.test().len(),
    ))?;
    // Drawn on stderr if that is a terminal.
    let bar = ProgressBar::new(((options.epochs - done) * Training::steps(&digits)) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} steps ({eta} left)")?);
    for number in done + 1..=options.epochs {
        let start = Instant::now();
        let epoch = training.epoch(&digits, || bar.inc(1))?;
        checkpoint::save_network(&out.join("pointnet.safetensors"), &training.network)?;
        checkpoint::save(&out.join("resume.safetensors"), &training)?;
        let curves = out.join("curves.svg");
        fs::write(&curves, plot::draw(&training.history)?)
            .map_err(|error| format!("{}: {error}", curves.display()))?;
        bar.suspend(|| {
            say.line(format_args!(
                "epoch {number:3}: loss {:.4}, training accuracy {:5.1} %, held out {:5.1} %, {:.2} s",
                epoch.loss,
                epoch.training,
                epoch.test,
                start.elapsed().as_secs_f64()
            ))
        })?;
    }
    bar.finish_and_clear();
    say.line(format_args!("wrote pointnet.safetensors and curves.svg to {}", out.display()))?;
    say.line(format_args!("test accuracy {:.1} %", training.test(&digits)?))
}

/// Stdout, until nobody reads it any more: a training goes on without.
struct Output {
    stdout: io::Stdout,
    open: bool,
}

impl Output {
    fn line(&mut self, line: std::fmt::Arguments<'_>) -> Result<()> {
        if self.open {
            match writeln!(self.stdout, "{line}") {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.open = false,
                written => written?,
            }
        }
        Ok(())
    }
}
