//! A layer of 8-bit integers.

use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use ndarray::ArrayD;
use pointwise::quantized::{Int8, PreparedQuantized, QuantizedElement};
use pointwise::{Device, Layout, Quantized, nhwc_mut};

use crate::npy::{self, Integers, Value};
use crate::options::Options;
use crate::{Result, checkpoint, in_file, read, view};

/// Runs the layer of a checkpoint on the only input.
pub fn run(options: &Options, path: &Path) -> Result<()> {
    let [input] = options.input.as_slice() else {
        Err(format!("{} inputs; a layer of 8-bit integers takes one", options.input.len()))?
    };
    let input = npy::integers(input)?;
    let otherwise = match input {
        Integers::U8(_) => Int8::U8,
        Integers::I8(_) => Int8::I8,
    };
    let bytes = read(path)?;
    let file = checkpoint(path, &bytes)?;
    let layer = Quantized::from_safetensors(&file, otherwise)?;
    let layer = layer.groups(options.groups).stride(options.stride);
    let device: Device = options.device.parse()?;
    let prepared = layer.prepare(&options.threads.into_iter().fold(device, Device::threads))?;
    let dst = layer.dst_quantization().map(|dst| dst.int8);
    match (input, dst) {
        (Integers::U8(src), Some(Int8::I8)) => apply::<u8, i8>(options, &prepared, &src),
        (Integers::U8(src), _) => apply::<u8, u8>(options, &prepared, &src),
        (Integers::I8(src), Some(Int8::U8)) => apply::<i8, u8>(options, &prepared, &src),
        (Integers::I8(src), _) => apply::<i8, i8>(options, &prepared, &src),
    }
}

fn apply<T: QuantizedElement, O: QuantizedElement + Value>(
    options: &Options,
    layer: &PreparedQuantized,
    src: &ArrayD<T>,
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
    npy::write(&options.output, &dst)?;
    let kernel = layer.plans(logical.shape())?[0].kernel;
    let (src, device) = (src.shape(), layer.device());
    writeln!(io::stdout(), "{src:?} -> {dst_shape:?}, {kernel} on {device}, {time:.1?}")?;
    Ok(())
}
