//! Times every layer of `layers.csv` on the CPU, in both layouts, and prints CSV.
//!
//! `cargo bench --bench layers -- [--threads N] [--only TEXT]`. Each result is verified against the
//! f64 reference before it is timed; layouts alternate; the roof is measured in the same run.

use std::error::Error;
use std::time::{Duration, Instant};

use ndarray::{Array2, Array4, ArrayView4};
use pointwise::init::Init;
use pointwise::{Activation, Device, Layout, Pointwise, Prepared, nhwc, reference};

/// How long a layer is timed in each layout, in as many rounds as fit.
const BUDGET: Duration = Duration::from_millis(150);

struct Row<'a> {
    line: &'a str,
    sizes: [usize; 7],
    relu: bool,
}

fn parse(line: &str) -> Result<Row<'_>, Box<dyn Error>> {
    let fields: Vec<_> = line.split(',').collect();
    let [_, _, sizes @ .., act] = fields.as_slice() else {
        return Err(format!("not a layer: {line}").into());
    };
    let sizes: Vec<usize> = sizes.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
    let sizes =
        sizes.try_into().map_err(|_| format!("not nine columns and an activation: {line}"))?;
    Ok(Row { line, sizes, relu: *act == "relu" })
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let option = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1).cloned();
    let threads: usize = option("--threads").map_or(Ok(1), |n| n.parse())?;
    let only = option("--only").unwrap_or_default();
    let device = Device::cpu().threads(threads);

    println!(
        "model,layer,n,cin,cout,h,w,stride,groups,act,layout,threads,kernel,median_us,min_us,gflops,roof_fraction"
    );
    let mut logs = [0.0f64; 2];
    let mut count = 0;
    for line in include_str!("layers.csv").lines().skip(1).filter(|line| line.contains(&only)) {
        let row = parse(line)?;
        let fractions = time(&row, &device, threads)?;
        logs.iter_mut().zip(fractions).for_each(|(log, fraction)| *log += fraction.ln());
        count += 1;
    }
    let [first, last] = logs.map(|log| (log / f64::from(count.max(1))).exp());
    eprintln!(
        "geometric mean of the roof over {count} layers: {first:.3} channels first, {last:.3} channels last"
    );
    Ok(())
}

/// The fraction of the roof in each layout.
fn time(row: &Row<'_>, device: &Device, threads: usize) -> Result<[f64; 2], Box<dyn Error>> {
    let [n, c_in, c_out, h, w, stride, groups] = row.sizes;
    let weight = Init::pytorch_default().weight(c_out, c_in / groups, 1)?;
    let bias = pointwise::init::bias(c_out, c_in / groups, 2)?;
    let mut layer = Pointwise::new(weight).groups(groups).stride(stride).bias(bias);
    if row.relu {
        layer = layer.activation(Activation::Relu);
    }
    let prepared = layer.prepare(device)?;
    let values = Array2::from_shape_fn((n * h * w, c_in), |(p, c)| {
        ((p * 31 + c * 17) % 29) as f32 / 29.0 - 0.4
    });
    let last = values.into_shape_with_order((n, h, w, c_in))?;
    let last = nhwc(last.view());
    let first: Array4<f32> = last.as_standard_layout().into_owned();

    let layouts = [(Layout::ChannelsFirst, first.view()), (Layout::ChannelsLast, last)];
    let mut results = Vec::new();
    for (_, src) in &layouts {
        results.push(prepared.forward(src)?);
    }
    verify(&layer, layouts[0].1, &results)?;

    let mut times = [Vec::new(), Vec::new()];
    let begin = Instant::now();
    while begin.elapsed() < 2 * BUDGET {
        for (i, (_, src)) in layouts.iter().enumerate() {
            let start = Instant::now();
            while start.elapsed() < BUDGET / 8 {
                let call = Instant::now();
                prepared.forward_into(src, &mut results[i])?;
                times[i].push(call.elapsed().as_secs_f64());
            }
        }
    }
    let mut fractions = [0.0; 2];
    for (i, (layout, src)) in layouts.iter().enumerate() {
        times[i].sort_by(f64::total_cmp);
        let (median, min) = (times[i][times[i].len() / 2], times[i][0]);
        fractions[i] = report(row, &prepared, *layout, src.shape(), threads, median, min)?;
    }
    Ok(fractions)
}

fn verify(
    layer: &Pointwise,
    src: ArrayView4<'_, f32>,
    results: &[Array4<f32>],
) -> Result<(), Box<dyn Error>> {
    let inputs = reference::Inputs { sources: vec![src.into_dyn()], ..Default::default() };
    let expected = reference::forward(layer, &inputs)?;
    for result in results {
        let err = expected.iter().zip(result).fold(0.0f64, |m, (a, b)| {
            let err = (a - f64::from(*b)).abs();
            if err.is_nan() { f64::INFINITY } else { m.max(err) }
        });
        if err > 1e-4 {
            return Err(format!("wrong result: off by {err}").into());
        }
    }
    Ok(())
}

fn report(
    row: &Row<'_>,
    prepared: &Prepared,
    layout: Layout,
    shape: &[usize],
    threads: usize,
    median: f64,
    min: f64,
) -> Result<f64, Box<dyn Error>> {
    let explanation = prepared.explain_in(shape, layout)?;
    let fraction = explanation.roof.seconds(&explanation.cost) / median;
    let layout = match layout {
        Layout::ChannelsFirst => "nchw",
        Layout::ChannelsLast => "nhwc",
    };
    println!(
        "{},{layout},{threads},{},{:.1},{:.1},{:.1},{fraction:.3}",
        row.line,
        explanation.kernel,
        median * 1e6,
        min * 1e6,
        explanation.cost.flops() / median / 1e9
    );
    Ok(fraction)
}
