//! A worker process of the comparison: one contender, driven by lines on stdin (see
//! `../worker.py`, which speaks the same protocol for Python libraries).
//!
//! `pointwise-peers CONTENDER THREADS OFFSET DTYPE` greets with `hello LAYOUT VERSION`, then answers
//! `load LAYER… DIR`, `result FILE` and `time SECONDS` until stdin ends. `pointwise-peers peak THREADS 0 f32`
//! is no contender: it answers each line with the machine's FMA peak at that moment, in flop/s.

mod contenders;
mod layer;

use std::error::Error;
use std::io::{self, BufRead, Write};
use std::time::{Duration, Instant};

use contenders::Contender;
use layer::{Inputs, Layer};
use pointwise::Device;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, threads, offset, dtype] = args.as_slice() else {
        return Err("usage: pointwise-peers CONTENDER THREADS OFFSET DTYPE".into());
    };
    let (threads, offset) = (threads.parse()?, offset.parse()?);
    if name == "peak" {
        let meter = Device::cpu().threads(threads).roof_meter(0)?;
        reply("hello none peak")?;
        for line in io::stdin().lock().lines() {
            line?;
            reply(&format!("peak {}", meter.sample().flops_per_second))?;
        }
        return Ok(());
    }
    let kind = contenders::find(name)?;
    reply(&format!("hello {} {}", kind.layout, kind.version))?;
    let mut loaded = None;
    for line in io::stdin().lock().lines() {
        match answer(
            &line?,
            &mut loaded,
            |layer, inputs| (kind.load)(layer, inputs, threads),
            offset,
            dtype,
        ) {
            Ok(text) => reply(&text)?,
            Err(error) => reply(&format!("error {}", error.to_string().replace('\n', " ")))?,
        }
    }
    Ok(())
}

fn reply(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

fn answer(
    line: &str,
    loaded: &mut Option<Box<dyn Contender>>,
    load: impl Fn(Layer, Inputs) -> Result<Box<dyn Contender>>,
    offset: usize,
    dtype: &str,
) -> Result<String> {
    let (verb, rest) = line.split_once(' ').ok_or_else(|| format!("not a request: {line}"))?;
    if verb == "load" {
        // The previous layer's memory goes first: batches are large.
        *loaded = None;
        let (layer, dir) = Layer::parse(rest)?;
        *loaded = Some(load(layer, Inputs::read(&layer, dir.as_ref(), offset, dtype)?)?);
        return Ok("ready".into());
    }
    let contender = loaded.as_mut().ok_or("no layer is loaded")?;
    match verb {
        "result" => {
            contender.call()?;
            let bytes: Vec<u8> = contender.dst()?.iter().flat_map(|x| x.to_le_bytes()).collect();
            std::fs::write(rest, bytes)?;
            Ok("done".into())
        }
        "time" => {
            let (calls, median, min) = time(&mut **contender, rest.parse()?)?;
            Ok(format!("times {calls} {median} {min}"))
        }
        _ => Err(format!("not a request: {line}").into()),
    }
}

/// Calls are repeated for this part of the time before they count: caches and clocks warm up.
const WARM_UP: f64 = 0.1;
/// The fewest calls that are timed, unless they would take [`PATIENCE`] times as long as asked.
const CALLS: usize = 20;
const PATIENCE: f64 = 4.0;

/// How many calls, their median and their minimum in nanoseconds.
fn time(contender: &mut dyn Contender, seconds: f64) -> Result<(usize, f64, f64)> {
    let begin = Instant::now();
    while begin.elapsed().as_secs_f64() < WARM_UP * seconds {
        contender.call()?;
    }
    let mut times: Vec<Duration> = Vec::with_capacity(1 << 16);
    let begin = Instant::now();
    loop {
        let start = Instant::now();
        contender.call()?;
        times.push(start.elapsed());
        let elapsed = begin.elapsed().as_secs_f64();
        let enough = if times.len() >= CALLS { seconds } else { PATIENCE * seconds };
        if elapsed >= enough {
            break;
        }
    }
    times.sort_unstable();
    let nanoseconds = |i: usize| times[i].as_secs_f64() * 1e9;
    let count = times.len();
    let median = (nanoseconds(count / 2) + nanoseconds((count - 1) / 2)) / 2.0;
    Ok((count, median, nanoseconds(0)))
}
