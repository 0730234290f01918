//! Times layers against the machine's roof: `bench --help` says how.

mod layers;
mod measure;
mod options;
mod plot;
mod quantized;
mod report;
mod tensor;
mod train;
mod verify;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use layers::Table;
use measure::Bench;
use options::{Numbers, Options, Pass};

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
        // Whoever reads has seen enough: `bench | head`.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            let message = error.to_string();
            let words: Vec<_> = message.trim_start_matches("error: ").split_whitespace().collect();
            eprintln!("error: {}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn create(path: &Path) -> Result<File> {
    File::create(path).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// Says how far every layer's results are from the reference's.
fn verify(bench: &Bench, table: &Table) -> Result<()> {
    let mut stdout = io::stdout();
    let mut all = Vec::new();
    for layer in &table.layers {
        let errors = bench
            .verify(layer)
            .map_err(|error| format!("{}:{}: {layer}: {error}", table.name, layer.line))?;
        writeln!(stdout, "{layer}: {}", report::errors(&errors, bench.numbers))?;
        all.extend(errors);
    }
    writeln!(stdout, "{} layers: {}", table.layers.len(), report::errors(&all, bench.numbers))?;
    Ok(())
}

fn run(options: &Options) -> Result<()> {
    let table = match &options.layers {
        Some(path) => Table::read(path, options.batch)?,
        None => Table::built_in(options.batch)?,
    };
    if options.pass == Pass::Train {
        if options.dtype == Numbers::Int8 {
            Err("--pass train takes f32, f16 and bf16, not --dtype int8")?;
        }
        if !options.kernel.is_empty() || options.verify {
            Err("--pass train takes no --kernel and no --verify")?;
        }
    }
    let bench = Bench::new(options)?;
    if options.verify {
        return verify(&bench, &table);
    }
    // Before minutes are spent on what cannot be kept.
    let mut csv: Box<dyn Write> = match options.csv.as_deref() {
        Some(path) if path != Path::new("-") => Box::new(create(path)?),
        _ => Box::new(io::stdout()),
    };
    let plot = match options.plot.as_deref() {
        Some(path) => Some((path, create(path)?)),
        None => None,
    };
    if cfg!(debug_assertions) {
        eprintln!("note: built for debugging; `cargo run --release` gives figures to quote");
    }

    csv.write_all(report::header()?.as_bytes())?;
    // Drawn on stderr if that is a terminal.
    let bar = ProgressBar::new(table.layers.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} ({eta} left)")?);
    let mut rows = Vec::new();
    let mut wrong = Vec::new();
    for layer in &table.layers {
        bar.set_message(layer.to_string());
        bar.tick();
        let outcome = match options.pass {
            Pass::Forward => bench.measure(layer),
            Pass::Train => bench.measure_step(layer),
        };
        let outcome =
            outcome.map_err(|error| format!("{}:{}: {layer}: {error}", table.name, layer.line))?;
        for note in outcome.notes {
            bar.suspend(|| eprintln!("note: {layer}: {note}"));
        }
        for row in outcome.rows {
            let line = report::line(layer, &row, &bench)?;
            bar.suspend(|| csv.write_all(line.as_bytes()).and_then(|()| csv.flush()))?;
            wrong.extend(row.wrong_roof().map(|why| format!("{layer}: {why}")));
            rows.push((layer, row));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    if let Some((path, mut file)) = plot {
        let picture = plot::draw(&rows, &format!("{} on {}", table.name, bench.device()))?;
        file.write_all(picture.as_bytes())
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let separator = if io::stdout().is_terminal() { "\n" } else { "" };
    eprint!("{separator}{}", report::summary(&rows, &bench));
    if rows.is_empty() {
        Err("no layer of the table was run")?;
    }
    match wrong.as_slice() {
        [] => Ok(()),
        wrong => Err(format!("the roof is wrong: {}", wrong.join("; ")))?,
    }
}
