//! A layer of 8-bit numbers.

use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use ndarray::ArrayD;
use pointwise::quantized::{
    DynamicQuantized, F8E4M3, F8E5M2, Fp8, Fp8Element, Int8, PreparedQuantized, QuantizedElement,
    QuantizedFp8,
};
use pointwise::safetensors::{Dtype, SafeTensors};
use pointwise::{Device, Layout, Quantized, nhwc_mut};

use crate::npy::{self, Integers, Value};
use crate::options::Options;
use crate::{Result, checkpoint, in_file, read, view};

/// Runs the layer of a checkpoint on the only input.
pub fn run(options: &Options, path: &Path) -> Result<()> {
    let [input] = options.input.as_slice() else {
        Err(format!("{} inputs; a layer of 8-bit numbers takes one", options.input.len()))?
    };
    let bytes = read(path)?;
    let file = checkpoint(path, &bytes)?;
    let kind = kind(&file)?;
    if let (Kind::Integers | Kind::Fp8, Some(_)) = (&kind, options.per) {
        Err("--per without a layer of I8 weights whose sources have no src_scale")?;
    }
    if let (Kind::Integers | Kind::Dynamic, Some(fp8)) = (&kind, options.activations) {
        Err(format!("--activations {fp8} without a weight of F8_E4M3 or F8_E5M2"))?;
    }
    let device: Device = options.device.parse()?;
    let device = options.threads.into_iter().fold(device, Device::threads);
    match kind {
        Kind::Integers => integers(options, &file, &device, input),
        Kind::Dynamic => {
            let layer = DynamicQuantized::from_safetensors(&file, options.per.unwrap_or_default())?;
            let layer = layer.groups(options.groups).stride(options.stride).prepare(&device)?;
            apply(options, &layer, &npy::read(input)?, |x: f32| x)
        }
        Kind::Fp8 => {
            let activations = options.activations.unwrap_or(Fp8::E4M3);
            let layer = QuantizedFp8::from_safetensors(&file, activations)?;
            let layer = layer.groups(options.groups).stride(options.stride);
            let src = npy::read(input)?;
            match activations {
                Fp8::E4M3 => floats(options, &layer, &device, &src, F8E4M3::from_bits),
                Fp8::E5M2 => floats(options, &layer, &device, &src, F8E5M2::from_bits),
            }
        }
    }
}

/// What a checkpoint holds.
enum Kind {
    Integers,
    /// Integers that each call makes of its source.
    Dynamic,
    Fp8,
}

/// Looks only at what tells one kind from another: reading the layer finds what is missing.
fn kind(file: &SafeTensors<'_>) -> Result<Kind> {
    match file.tensor("weight").map_err(pointwise::Error::from)?.dtype() {
        Dtype::F8_E4M3 | Dtype::F8_E5M2 => return Ok(Kind::Fp8),
        Dtype::I8 => {}
        other => Err(format!("tensor weight is {other}, expected I8, F8_E4M3 or F8_E5M2"))?,
    }
    let has = |name: &&str| file.tensor(name).is_ok();
    let of_integers =
        ["src_scale", "src_zero_point", "dst_scale", "dst_zero_point"].iter().any(has);
    let bias_of_integers = file.tensor("bias").is_ok_and(|bias| bias.dtype() == Dtype::I32);
    Ok(if of_integers || bias_of_integers { Kind::Integers } else { Kind::Dynamic })
}

fn integers(
    options: &Options,
    file: &SafeTensors<'_>,
    device: &Device,
    input: &Path,
) -> Result<()> {
    let input = npy::integers(input)?;
    let otherwise = match input {
        Integers::U8(_) => Int8::U8,
        Integers::I8(_) => Int8::I8,
    };
    let layer = Quantized::from_safetensors(file, otherwise)?;
    let layer = layer.groups(options.groups).stride(options.stride);
    let prepared = layer.prepare(device)?;
    let dst = layer.dst_quantization().map(|dst| dst.int8);
    match input {
        Integers::U8(src) => to_integers_or_reals(options, &prepared, &src, dst),
        Integers::I8(src) => to_integers_or_reals(options, &prepared, &src, dst),
    }
}

fn to_integers_or_reals<T: QuantizedElement>(
    options: &Options,
    layer: &PreparedQuantized,
    src: &ArrayD<T>,
    dst: Option<Int8>,
) -> Result<()> {
    match dst {
        Some(Int8::U8) => apply(options, layer, src, |q: u8| q),
        Some(Int8::I8) => apply(options, layer, src, |q: i8| q),
        None => apply(options, layer, src, |x: f32| x),
    }
}

/// Files hold the real numbers that the tensors' floats stand for.
fn floats<T: Fp8Element>(
    options: &Options,
    layer: &QuantizedFp8,
    device: &Device,
    src: &ArrayD<f32>,
    of_bits: fn(u8) -> T,
) -> Result<()> {
    let prepared = layer.prepare(device)?;
    let quantization = layer.src_quantization();
    let src = src.mapv(|x| of_bits(quantization.quantize(x)));
    match layer.dst_quantization() {
        Some(dst) => apply(options, &prepared, &src, |q: T| dst.dequantize(q.bits())),
        None => apply(options, &prepared, &src, |x: f32| x),
    }
}

/// Runs the layer, and writes what the file is to hold of its results.
fn apply<T: QuantizedElement, O: QuantizedElement, V: Value>(
    options: &Options,
    layer: &PreparedQuantized,
    src: &ArrayD<T>,
    in_files: impl Fn(O) -> V,
) -> Result<()> {
    let last = options.layout == Layout::ChannelsLast;
    let logical = view(src, last);
    let dst_shape = in_file(layer.dst_shape(logical.shape())?, last);
    let mut dst = npy::zeros::<O>(&dst_shape)?;
    let start = Instant::now();
    match last {
        true => layer.forward_into(&logical, &mut nhwc_mut(dst.view_mut()))?,
        false => layer.forward_into(&logical, &mut dst)?,
    }
    let time = start.elapsed();
    npy::write(&options.output, &dst.mapv(in_files))?;
    let kernel = layer.plans(logical.shape())?[0].kernel;
    let (src, device) = (src.shape(), layer.device());
    writeln!(io::stdout(), "{src:?} -> {dst_shape:?}, {kernel} on {device}, {time:.1?}")?;
    Ok(())
}
