//! What is written about the results.

use std::collections::BTreeMap;
use std::fmt::Write;

use csv::Writer;

use crate::Result;
use crate::layers::Layer;
use crate::measure::{Bench, Row};
use crate::options::Numbers;
use crate::verify::Errors;

const COLUMNS: [&str; 23] = [
    "model",
    "layer",
    "n",
    "cin",
    "cout",
    "h",
    "w",
    "stride",
    "groups",
    "act",
    "dtype",
    "layout",
    "threads",
    "device",
    "kernel",
    "median_us",
    "min_us",
    "gflops",
    "gbps",
    "fma_peak",
    "roof_bw",
    "peak_fraction",
    "max_err",
];

/// The results' first line.
pub fn header() -> Result<String> {
    csv_line(&COLUMNS)
}

/// A result's line.
pub fn line(layer: &Layer, row: &Row, bench: &Bench) -> Result<String> {
    let sizes = [layer.n, layer.c_in, layer.c_out, layer.h, layer.w, layer.stride, layer.groups];
    let [n, c_in, c_out, h, w, stride, groups] = sizes.map(|size| size.to_string());
    let threads = bench.threads.to_string();
    let flops = row.cost.flops();
    let numbers = [
        format!("{:.3}", row.median * 1e6),
        format!("{:.3}", row.min * 1e6),
        format!("{:.2}", flops / row.median / 1e9),
        format!("{:.2}", row.cost.bytes() as f64 / row.median / 1e9),
        format!("{:.2}", row.roof.flops_per_second / 1e9),
        format!("{:.2}", row.roof.bytes_per_second / 1e9),
        format!("{:.4}", row.peak_fraction()),
        format!("{:.4}", row.errors.max),
    ];
    let [median, min, gflops, gbps, fma_peak, roof_bw, fraction, max_err] =
        numbers.each_ref().map(String::as_str);
    let fields: [&str; COLUMNS.len()] = [
        &layer.model,
        &layer.layer,
        &n,
        &c_in,
        &c_out,
        &h,
        &w,
        &stride,
        &groups,
        layer.act(),
        bench.numbers.name(),
        row.order.name(),
        &threads,
        &bench.device_name,
        row.kernel,
        median,
        min,
        gflops,
        gbps,
        fma_peak,
        roof_bw,
        fraction,
        max_err,
    ];
    csv_line(&fields)
}

fn csv_line(fields: &[&str]) -> Result<String> {
    let mut writer = Writer::from_writer(Vec::new());
    writer.write_record(fields)?;
    Ok(String::from_utf8(writer.into_inner()?)?)
}

/// A short table for the eye: fractions of the roof by layout and forced kernel, the largest error.
pub fn summary(rows: &[(&Layer, Row)], bench: &Bench) -> String {
    let mut parts: BTreeMap<(&str, &str), Vec<(f64, &Layer)>> = BTreeMap::new();
    for (layer, row) in rows {
        let kernel = if row.forced { row.kernel } else { "as planned" };
        let part = parts.entry((row.order.name(), kernel)).or_default();
        part.push((row.peak_fraction(), layer));
    }
    let peak = rows.iter().map(|(_, row)| row.roof.flops_per_second).fold(0.0, f64::max);
    let mut out = format!("{}, FMA peak {:.1} GFLOP/s\n", bench.device(), peak / 1e9);
    let width = parts.keys().map(|(_, kernel)| kernel.len()).max().unwrap_or(0);
    let names = rows.iter().map(|(layer, _)| layer.to_string().len()).max().unwrap_or(0);
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "of the roof  {:width$}  layers  geomean  worst  {:names$}  best",
        "kernel", ""
    );
    for ((order, kernel), mut part) in parts {
        part.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mean = (part.iter().map(|(x, _)| x.ln()).sum::<f64>() / part.len() as f64).exp();
        if let [(worst, low), ..] = part[..]
            && let [.., (best, high)] = part[..]
        {
            let _ = writeln!(
                out,
                "{order:11}  {kernel:width$}  {:6}  {mean:7.3}  {worst:.3}  {:names$}  {best:.3}  {high}",
                part.len(),
                low.to_string()
            );
        }
    }
    let worst = rows.iter().max_by(|a, b| a.1.errors.max.total_cmp(&b.1.errors.max));
    if let Some((layer, _)) = worst {
        let all: Vec<_> = rows.iter().map(|(_, row)| row.errors).collect();
        let _ = writeln!(out, "{}; the largest in {layer}", errors(&all, bench.numbers));
    }
    out
}

/// The errors of some results in words.
pub fn errors(all: &[Errors], numbers: Numbers) -> String {
    let Errors { max, sum, unequal, values } = Errors::of_all(all.iter().copied());
    let largest = format!("largest error {max:.3} of the tolerance");
    match numbers {
        // A step of training counts no values.
        _ if values == 0 => largest,
        Numbers::Real(_) => format!("{largest}, mean {:.5}, {values} values", sum / values as f64),
        Numbers::Int8 => format!("{largest}, {unequal} of {values} values are a step off"),
    }
}
