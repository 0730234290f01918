//! The Rust contenders. Each does what its user would: the weight is prepared beforehand where
//! the library can, and what it cannot fuse is a pass of its own.

use candle_core::{Device as CandleDevice, Tensor};
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView4, ArrayViewMut4};
use pointwise::{
    Activation, Device, Element, Pointwise, PrepareOptions, Quantization, Quantized, bf16, nhwc,
    nhwc_mut,
};
use rayon::prelude::*;

use crate::Result;
use crate::layer::{Buffer, Inputs, Layer};

/// A layer, loaded.
pub trait Contender {
    fn call(&mut self) -> Result<()>;
    /// The last call's result, in the contender's own layout.
    fn dst(&self) -> Result<Vec<f32>>;
}

pub struct Kind {
    name: &'static str,
    pub layout: &'static str,
    /// As `Cargo.toml` pins it.
    pub version: &'static str,
    pub load: fn(Layer, Inputs, usize) -> Result<Box<dyn Contender>>,
}

const KINDS: [Kind; 5] = [
    Kind {
        name: "pointwise-nchw",
        layout: "nchw",
        version: "pointwise",
        load: |layer, inputs, threads| ours(layer, inputs, threads, false),
    },
    Kind {
        name: "pointwise-nhwc",
        layout: "nhwc",
        version: "pointwise",
        load: |layer, inputs, threads| ours(layer, inputs, threads, true),
    },
    Kind {
        name: "gemm",
        layout: "nchw",
        version: "gemm 0.19.0",
        load: |layer, inputs, threads| {
            Ok(Box::new(Product::new(layer, inputs, threads, gemm_multiply)))
        },
    },
    Kind {
        name: "faer",
        layout: "nchw",
        version: "faer 0.24.4",
        load: |layer, inputs, threads| {
            Ok(Box::new(Product::new(layer, inputs, threads, faer_multiply)))
        },
    },
    Kind {
        name: "candle",
        layout: "nchw",
        version: "candle-core 0.11.1",
        load: |layer, inputs, _| Ok(Box::new(Candle::new(layer, inputs)?)),
    },
];

pub fn find(name: &str) -> Result<&'static Kind> {
    let names = || KINDS.map(|kind| kind.name).join(", ");
    let kind = KINDS.iter().find(|kind| kind.name == name);
    kind.ok_or_else(|| format!("no contender {name}, there are {}", names()).into())
}

/// This repository's crate, on tensors of `T`.
struct Ours<T> {
    layer: Layer,
    prepared: Ready<T>,
    src: Buffer<T>,
    dst: Buffer<T>,
    last: bool,
}

/// Runs a prepared layer.
type Ready<T> = Box<dyn Fn(ArrayView4<'_, T>, ArrayViewMut4<'_, T>) -> pointwise::Result<()>>;

fn ours(layer: Layer, inputs: Inputs, threads: usize, last: bool) -> Result<Box<dyn Contender>> {
    let device = Device::cpu().threads(threads);
    Ok(match inputs.dtype.as_str() {
        "int8" => Box::new(integers(layer, inputs, &device, last)?),
        "bf16" => Box::new(real::<bf16>(layer, inputs, &device, last)?),
        _ => Box::new(real::<f32>(layer, inputs, &device, last)?),
    })
}

fn real<T: Element>(layer: Layer, inputs: Inputs, device: &Device, last: bool) -> Result<Ours<T>> {
    let columns = layer.c_in / layer.groups;
    let weight = Array2::from_shape_vec((layer.c_out, columns), inputs.weight)?;
    let mut description =
        Pointwise::new(weight).groups(layer.groups).stride(layer.stride).bias(inputs.bias);
    if layer.relu {
        description = description.activation(Activation::Relu);
    }
    let prepared = description.prepare_as::<T>(device, PrepareOptions::default())?;
    let src = if last { &inputs.nhwc } else { &inputs.nchw };
    Ok(Ours {
        layer,
        prepared: Box::new(move |src, mut dst| prepared.forward_into(&src, &mut dst)),
        src: Buffer::of(src, inputs.offset, T::from_f32),
        dst: Buffer::new(layer.dst_len(), inputs.offset, T::from_f32(f32::NAN)),
        last,
    })
}

fn integers(layer: Layer, inputs: Inputs, device: &Device, last: bool) -> Result<Ours<u8>> {
    let &[src_scale, src_zero, dst_scale, dst_zero, ref weight_scale @ ..] =
        inputs.quantization.as_slice()
    else {
        return Err("no quantization".into());
    };
    let columns = layer.c_in / layer.groups;
    let weight = Array2::from_shape_vec((layer.c_out, columns), inputs.weight)?;
    let bias: Vec<i32> = inputs.bias.iter().map(|&bias| bias as i32).collect();
    let src = Quantization::u8(src_scale, src_zero as i32);
    let mut description = Quantized::new(weight.mapv(|w| w as i8), weight_scale.to_vec(), src)
        .bias(bias)
        .groups(layer.groups)
        .stride(layer.stride)
        .dst(Quantization::u8(dst_scale, dst_zero as i32));
    if layer.relu {
        description = description.relu();
    }
    let prepared = description.prepare(device)?;
    let src = if last { &inputs.nhwc } else { &inputs.nchw };
    Ok(Ours {
        layer,
        prepared: Box::new(move |src, mut dst| prepared.forward_into(&src, &mut dst)),
        src: Buffer::of(src, inputs.offset, |x| x as u8),
        dst: Buffer::new(layer.dst_len(), inputs.offset, 255),
        last,
    })
}

impl<T: Copy + Into<f32>> Contender for Ours<T> {
    fn call(&mut self) -> Result<()> {
        let Layer { n, c_in, c_out, h, w, .. } = self.layer;
        let (oh, ow) = self.layer.out();
        let (src, dst) = (self.src.get(), self.dst.get_mut());
        if self.last {
            let src = nhwc(ArrayView4::from_shape((n, h, w, c_in), src)?);
            let dst = nhwc_mut(ArrayViewMut4::from_shape((n, oh, ow, c_out), dst)?);
            (self.prepared)(src, dst)?;
        } else {
            let src = ArrayView4::from_shape((n, c_in, h, w), src)?;
            let dst = ArrayViewMut4::from_shape((n, c_out, oh, ow), dst)?;
            (self.prepared)(src, dst)?;
        }
        Ok(())
    }

    fn dst(&self) -> Result<Vec<f32>> {
        Ok(self.dst.get().iter().map(|&x| x.into()).collect())
    }
}

/// `dst [m, n] = lhs [m, k] · rhs [k, n]` in C order, on so many threads.
type Multiply = fn(&mut [f32], &[f32], &[f32], [usize; 3], usize);

fn gemm_multiply(dst: &mut [f32], lhs: &[f32], rhs: &[f32], [m, k, n]: [usize; 3], threads: usize) {
    assert_eq!([dst.len(), lhs.len(), rhs.len()], [m * n, m * k, k * n]);
    let parallelism = match threads {
        1 => gemm::Parallelism::None,
        _ => gemm::Parallelism::Rayon(threads),
    };
    // SAFETY: the slices have the sizes that the strides (column, then row) span, checked above;
    // dst is borrowed mutably, so it overlaps neither factor.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            n as isize,
            false,
            lhs.as_ptr(),
            1,
            k as isize,
            rhs.as_ptr(),
            1,
            n as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn faer_multiply(dst: &mut [f32], lhs: &[f32], rhs: &[f32], [m, k, n]: [usize; 3], threads: usize) {
    let par = if threads == 1 { Par::Seq } else { Par::rayon(threads) };
    let dst = MatMut::from_row_major_slice_mut(dst, m, n);
    let lhs = MatRef::from_row_major_slice(lhs, m, k);
    let rhs = MatRef::from_row_major_slice(rhs, k, n);
    faer::linalg::matmul::matmul(dst, Accum::Replace, lhs, rhs, 1.0, par);
}

/// A library that multiplies matrices: one product per sample and group, after a pass that
/// gathers what the stride keeps, before one that adds the bias and applies ReLU.
struct Product {
    layer: Layer,
    threads: usize,
    multiply: Multiply,
    src: Buffer,
    /// What the stride keeps, `[n, c_in, h', w']`.
    gathered: Buffer,
    weight: Vec<f32>,
    bias: Vec<f32>,
    dst: Buffer,
}

impl Product {
    fn new(layer: Layer, inputs: Inputs, threads: usize, multiply: Multiply) -> Self {
        let (h, w) = layer.out();
        let kept = if layer.stride == 1 { 0 } else { layer.n * layer.c_in * h * w };
        Product {
            layer,
            threads,
            multiply,
            src: inputs.nchw,
            gathered: Buffer::new(kept, inputs.offset, f32::NAN),
            weight: inputs.weight,
            bias: inputs.bias,
            dst: Buffer::new(layer.dst_len(), inputs.offset, f32::NAN),
        }
    }
}

/// Passes over fewer values than this are not worth waking a thread for.
const PARALLEL: usize = 1 << 17;

impl Contender for Product {
    fn call(&mut self) -> Result<()> {
        let Layer { n, c_in, c_out, h, w, stride, groups, relu } = self.layer;
        let (oh, ow) = self.layer.out();
        let positions = oh * ow;
        let is_parallel = |len: usize| self.threads > 1 && len >= PARALLEL;
        let src = if stride == 1 {
            self.src.get()
        } else {
            let gather = |(dst, src): (&mut [f32], &[f32])| {
                for (dst, src) in dst.chunks_exact_mut(ow).zip(src.chunks(stride * w)) {
                    dst.iter_mut().zip(src.iter().step_by(stride)).for_each(|(d, s)| *d = *s);
                }
            };
            let (dst, src) = (self.gathered.get_mut(), self.src.get());
            if is_parallel(dst.len()) {
                let planes = dst.par_chunks_exact_mut(positions).zip(src.par_chunks_exact(h * w));
                planes.for_each(gather);
            } else {
                dst.chunks_exact_mut(positions).zip(src.chunks_exact(h * w)).for_each(gather);
            }
            self.gathered.get()
        };

        let (m, k) = (c_out / groups, c_in / groups);
        let dst = self.dst.get_mut();
        let products = dst.chunks_exact_mut(m * positions).zip(src.chunks_exact(k * positions));
        for (i, (dst, src)) in products.enumerate() {
            let weight = &self.weight[i % groups * m * k..][..m * k];
            (self.multiply)(dst, weight, src, [m, k, positions], self.threads);
        }

        let lo = if relu { 0.0 } else { f32::NEG_INFINITY };
        let bias = &self.bias;
        let finish = |(row, dst): (usize, &mut [f32])| {
            let bias = bias[row % c_out];
            dst.iter_mut().for_each(|x| *x = (*x + bias).max(lo));
        };
        if is_parallel(n * c_out * positions) {
            dst.par_chunks_exact_mut(positions).enumerate().for_each(finish);
        } else {
            dst.chunks_exact_mut(positions).enumerate().for_each(finish);
        }
        Ok(())
    }

    fn dst(&self) -> Result<Vec<f32>> {
        Ok(self.dst.get().to_vec())
    }
}

/// As `candle_nn::Conv2d` runs it, then ReLU. Threads: `RAYON_NUM_THREADS`, set by the driver.
struct Candle {
    layer: Layer,
    src: Tensor,
    weight: Tensor,
    bias: Tensor,
    dst: Tensor,
}

impl Candle {
    fn new(layer: Layer, inputs: Inputs) -> Result<Self> {
        let Layer { n, c_in, c_out, h, w, groups, .. } = layer;
        let tensor = |values: Vec<f32>, shape: [usize; 4]| {
            Tensor::from_vec(values, &shape, &CandleDevice::Cpu)
        };
        Ok(Candle {
            layer,
            src: tensor(inputs.nchw.get().to_vec(), [n, c_in, h, w])?,
            weight: tensor(inputs.weight, [c_out, c_in / groups, 1, 1])?,
            bias: tensor(inputs.bias, [1, c_out, 1, 1])?,
            dst: Tensor::zeros(1, candle_core::DType::F32, &CandleDevice::Cpu)?,
        })
    }
}

impl Contender for Candle {
    fn call(&mut self) -> Result<()> {
        let Layer { stride, groups, relu, .. } = self.layer;
        let dst = self.src.conv2d(&self.weight, 0, stride, 1, groups)?;
        let dst = dst.broadcast_add(&self.bias)?;
        self.dst = if relu { dst.relu()? } else { dst };
        Ok(())
    }

    fn dst(&self) -> Result<Vec<f32>> {
        Ok(self.dst.flatten_all()?.to_vec1()?)
    }
}
