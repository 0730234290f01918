//! Forward and backward passes on a CUDA device, a mirror of the CPU's.
//!
//! The convolution and its gradient by src (the transposed weight) are the inference kernels', that by
//! the weight is [`wgrad`]'s; the stages around it are a [chain](crate::train::chain) that [`sweep`]
//! runs over their values. [`host`] brings tensors of the host there and back.
//!
//! The tensors of a call hold f32, f16 or bf16. Products take the weight and the gradient by their
//! result rounded to that, and give f32; what is between them is f32.
//!
//! What is per channel goes through the host: statistics, which are checked and move the running
//! ones, and sums, which other processes may have a part in.

mod host;
mod sweep;
mod wgrad;

use super::Layer;
use super::call::Tensor;
use super::device::CudaDevice;
use super::memory::Buffer;
use crate::cuda::train::sweep::{Backward, MAX_PARTS, MAX_STAGES, Parts, Sweep, Typed, bits_bytes};
use crate::cuda::train::wgrad::Wgrad;
use crate::dtype::{DType, Element};
use crate::epilogue::Lowered;
use crate::error::{Error, Result};
use crate::layer::Pointwise;
use crate::prepared::{Math, PrepareOptions};
use crate::problem::{LayerShape, Operand, Operands, Problem};
use crate::stages::Stage;
use crate::tensor::{MAX_RANK, Place, TensorMut, TensorRef, checked_product};
use crate::train::chain::{BatchStatistics, Chain, Need, Op, lowered, need};
use crate::train::reduce::Reduce;
use crate::train::{Accumulate, Grads, Outputs, Statistics, name};

/// Why a parameter is a slice.
const CONTIGUOUS: &str = "made contiguous when the layer was taken";

/// A layer in training, as a pass sees it.
pub(crate) struct Training<'a> {
    pub device: &'a CudaDevice,
    pub layer: &'a Pointwise,
    pub shape: &'a LayerShape,
    pub statistics: Statistics,
    pub math: Math,
    /// Whether a parameter's gradient is wanted.
    pub wants: &'a dyn Fn(&str) -> bool,
    /// Sums statistics over all processes.
    pub reduce: Reduce<'a>,
}

/// What a forward pass keeps for the backward pass, on the device.
enum Saved {
    /// The convolution's result.
    Values(Buffer),
    /// Which values of dst lie inside the bounds of the last activation.
    Bits(Buffer),
    Nothing,
}

/// Everything that a forward pass keeps.
pub(crate) struct State {
    saved: Saved,
    /// The statistics of a layer norm.
    norm: Option<Buffer>,
    channels_fast: bool,
    /// The statistics of batch norms: of the source's, of the other one.
    pub statistics: [Option<BatchStatistics>; 2],
}

impl State {
    /// Bytes that it holds, beside some per channel.
    pub(crate) fn bytes(&self) -> usize {
        let norm = self.norm.as_ref().map_or(0, Buffer::bytes);
        norm + match &self.saved {
            Saved::Values(memory) | Saved::Bits(memory) => memory.bytes(),
            Saved::Nothing => 0,
        }
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "State({} bytes on a CUDA device)", self.bytes())
    }
}

/// Refuses what cannot be trained on CUDA.
///
/// # Errors
/// [`Error::Unsupported`], which names it.
pub(crate) fn check(layer: &Pointwise, device: &CudaDevice) -> Result<()> {
    let refuse = |what: String| Err(Error::Unsupported { device: device.to_string(), what });
    let stages = |count: usize, what: &str| match count > MAX_STAGES {
        true => refuse(format!("training {count} {what}: there may be {MAX_STAGES}")),
        false => Ok(()),
    };
    stages(layer.stages.len(), "stages")?;
    stages(layer.source_stages.len(), "source stages")
}

impl Training<'_> {
    /// Bytes that the state of a forward pass will hold, beside some per channel.
    pub(crate) fn bytes(&self, n: usize, positions: usize) -> usize {
        let values = self.shape.c_out.saturating_mul(n).saturating_mul(positions);
        let over = self.layer.stages.iter().find_map(|stage| match stage {
            Stage::LayerNorm(norm) => Some(norm.over),
            _ => None,
        });
        let norm = sweep::norm_bytes(over, n, positions);
        norm.saturating_add(match self.need() {
            Need::Values => values.saturating_mul(size_of::<f32>()),
            Need::Bits(..) => bits_bytes(values),
            Need::Nothing => 0,
        })
    }

    fn need(&self) -> Need {
        need(self.layer, self.statistics, self.wants)
    }

    fn place(&self) -> Place {
        Place::Cuda(self.device.ordinal())
    }

    /// Runs forward into `dst`; on host tensors it is done when this returns.
    pub(crate) fn forward<T: Element>(
        &self,
        operands: &Operands<'_, T>,
        dst: &mut TensorMut<'_, T>,
    ) -> Result<State> {
        let problem = Problem::new(self.shape, operands, dst)?;
        self.check_sources(operands)?;
        self.layer.check_weight(T::DTYPE)?;
        if operands.src.place() == Place::Host {
            return host::forward(self, operands, dst);
        }
        self.device.ordered(problem.streams(), || self.forward_on_device(operands, &problem, dst))
    }

    fn check_sources<T>(&self, operands: &Operands<'_, T>) -> Result<()> {
        let count = 1 + operands.more.len();
        match count > MAX_PARTS {
            true => Err(Error::Unsupported {
                device: self.device.to_string(),
                what: format!("training on {count} sources: there may be {MAX_PARTS}"),
            }),
            false => Ok(()),
        }
    }

    fn forward_on_device<T: Element>(
        &self,
        operands: &Operands<'_, T>,
        problem: &Problem<'_, T>,
        dst: &mut TensorMut<'_, T>,
    ) -> Result<State> {
        let extents = extents_of(problem);
        let total = sweep::positions_of(&extents)?;
        let chain = Chain::of_stages(self.layer, self.statistics);
        let channels_fast = problem.dst.channel.unsigned_abs() < nearest(&problem.dst, &extents);
        let statistics = [None, None];
        let mut state = State { saved: Saved::Nothing, norm: None, channels_fast, statistics };
        if total == 0 && self.reduce.is_none() {
            return Ok(state);
        }

        // The source's own batch norm.
        let mut source_chain = Chain::of_source(self.layer, self.statistics);
        if source_chain.batch_norm().is_some() {
            let mut sweep = self.source_sweep(problem, source_chain);
            state.statistics[0] = sweep.settle(operands.src.shape())?;
            source_chain = sweep.chain;
        }

        let need = self.need();
        if need != Need::Values {
            // As in inference: everything in one pass.
            if total == 0 {
                return Ok(state);
            }
            self.product::<T>(self.shape, lowered(self.layer, &source_chain, T::DTYPE))?
                .run(&Problem::new(self.shape, operands, dst)?, None)?;
            if let Need::Bits(bounds, _) = need {
                let map = chain.dst_map.clone();
                let rows = self.shape.c_out;
                let mut nothing = nothing(rows);
                nothing.dst_map = map;
                let input = vec![(Typed::of(&problem.dst), rows)];
                let sweep = self.sweep(nothing, channels_fast, extents, input, None);
                // A value that is clipped is the bound as T has it.
                let bounds = bounds.map(|bound| T::DTYPE.round(bound));
                state.saved = Saved::Bits(sweep.keep_bits(bounds)?);
            }
            return Ok(state);
        }

        let rows = self.shape.c_out;
        let bytes = checked_product("the workspace", &[rows, total, 4])?;
        let values = Buffer::new(self.device, "the workspace", bytes)?;
        let of_values = dense(&values, DType::F32, &extents, rows, channels_fast);
        if total > 0 {
            self.multiply(&source_chain, operands, &extents, &of_values)?;
        }
        let second = problem.residual.as_ref().map(Typed::of);
        let input = vec![(of_values, rows)];
        let mut sweep = self.sweep(chain, channels_fast, extents, input, second);
        state.statistics[1] = sweep.settle(operands.src.shape())?;
        sweep.forward(&vec![(Typed::of(&problem.dst), rows)], Accumulate::Set)?;
        for (src, dst) in problem.passed_through() {
            self.copy(&extents, &src, &dst, Accumulate::Set)?;
        }
        state.saved = Saved::Values(values);
        state.norm = sweep.norm;
        Ok(state)
    }

    /// Runs backward; on host tensors it is done when this returns. `grads` are there in any case.
    pub(crate) fn backward<T: Element>(
        &self,
        operands: &Operands<'_, T>,
        state: State,
        d_dst: &TensorRef<'_, T>,
        outputs: &mut Outputs<'_, T>,
        grads: &mut Grads,
        accumulate: Accumulate,
    ) -> Result<()> {
        if operands.src.place() == Place::Host {
            return host::backward(self, operands, state, d_dst, outputs, grads, accumulate);
        }
        let problem = Problem::reading(self.shape, operands, "d_dst", d_dst)?;
        let written = outputs.d_sources.iter().map(TensorMut::view);
        let written = written.chain(outputs.d_residual.iter().map(|d| d.view()));
        let written = written.chain(outputs.d_gate.iter().map(|d| d.view()));
        let written: Vec<usize> = written.filter_map(TensorRef::stream).collect();
        self.device.ordered(problem.streams().chain(written.iter().copied()), || {
            self.backward_on_device(&problem, state, outputs, grads, accumulate)
        })
    }

    fn backward_on_device<T: Element>(
        &self,
        problem: &Problem<'_, T>,
        mut state: State,
        outputs: &mut Outputs<'_, T>,
        grads: &mut Grads,
        accumulate_grads: Accumulate,
    ) -> Result<()> {
        let extents = extents_of(problem);
        let total = sweep::positions_of(&extents)?;
        let (rows, c_in) = (self.shape.c_out, self.shape.c_in);
        let channels_fast = state.channels_fast;
        let Outputs { d_sources, d_residual, d_gate, accumulate_sources: add, accumulate } =
            outputs;
        let (add, add_others) = (*add, *accumulate);

        // The stages, down to the convolution's result.
        let mut chain = Chain::of_stages(self.layer, self.statistics);
        chain.settle(&state.statistics[1]);
        let saved = std::mem::replace(&mut state.saved, Saved::Nothing);
        let values = |values| dense(values, DType::F32, &extents, rows, channels_fast);
        let (input, bits) = match (&saved, self.need()) {
            (Saved::Bits(bits), Need::Bits(_, outside)) => {
                (Parts::new(), Some((bits.address(), outside)))
            }
            (Saved::Values(memory), Need::Values) => (vec![(values(memory), rows)], None),
            _ => (Parts::new(), None),
        };
        // The gradient by the convolution's result takes the place of the result where it is of the
        // same size.
        let (d_memory, kept) = match saved {
            Saved::Values(values) if T::DTYPE == DType::F32 => (values, Saved::Nothing),
            other => {
                let what = "the gradient by the convolution";
                let bytes = checked_product(what, &[rows, total, size_of::<T>()])?;
                (Buffer::new(self.device, what, bytes)?, other)
            }
        };
        let of_d = dense(&d_memory, T::DTYPE, &extents, rows, channels_fast);
        let d_second = match d_residual {
            None => None,
            Some(tensor) => {
                let start = self.shape.partial.as_ref().map_or(0, |range| range.start);
                if self.shape.partial.is_some() && add_others == Accumulate::Set {
                    self.fill_zero(tensor)?;
                }
                let view = tensor.view().channels(start, start + rows);
                Some(Typed::of(&Operand::new(&view)))
            }
        };
        let second = problem.residual.as_ref().map(Typed::of);
        let mut sweep = self.sweep(chain, channels_fast, extents, input, second);
        sweep.norm = state.norm.take();
        let sums = sweep.backward(&Backward {
            d: Typed::of(&problem.dst),
            outputs: vec![(of_d, rows)],
            d_second,
            accumulate: [Accumulate::Set, add_others],
            bits,
        })?;
        sweep.chain.put(self.wants, &sums.ops, grads, accumulate_grads);
        drop(kept);

        // Through the convolution.
        let mut source_chain = Chain::of_source(self.layer, self.statistics);
        source_chain.settle(&state.statistics[0]);
        let source_grads = source_chain.ops.iter().any(|op| match op {
            Op::Linear(linear) => linear.names.iter().flatten().any(|name| (self.wants)(name)),
            _ => false,
        });
        let plain = source_chain.ops.is_empty();
        let source_sweep = self.source_sweep(problem, source_chain);
        if (self.wants)(name::WEIGHT) {
            let d_weight = match total {
                0 => vec![0.0; rows * self.shape.k()],
                _ => self.wgrad(&source_sweep, plain, of_d, channels_fast)?,
            };
            grads.put(name::WEIGHT, d_weight, accumulate_grads);
        }

        if d_sources.is_empty() && !source_grads && d_gate.is_none() {
            return Ok(());
        }
        if self.shape.stride > 1 && add == Accumulate::Set {
            d_sources.iter_mut().try_for_each(|d| self.fill_zero(d))?;
        }
        if let ([d_src], true, None, Accumulate::Set) =
            (&mut d_sources[..], plain, &self.shape.partial, add)
        {
            // Straight to where it belongs.
            let operand = Operand::new(d_src.view()).subsampled(self.shape.stride);
            return self.multiply_back::<T>(&extents, of_d, Typed::of(&operand));
        }
        let what = "the gradient by src";
        let d_src = Buffer::new(self.device, what, checked_product(what, &[c_in, total, 4])?)?;
        let of_src = dense(&d_src, DType::F32, &extents, c_in, source_sweep.channels_fast);
        self.multiply_back::<T>(&extents, of_d, of_src)?;
        let mut d_inputs = Parts::new();
        if !d_sources.is_empty() {
            let (start, end) = match &self.shape.partial {
                Some(range) => (range.start, range.end),
                None => (0, c_in),
            };
            let stride = self.shape.stride;
            let parts = |lo: usize, hi: usize| {
                let mut first = 0;
                let mut parts = Vec::new();
                for tensor in d_sources.iter() {
                    let view = tensor.view();
                    let channels = view.shape()[1];
                    let (a, b) = (lo.max(first), hi.min(first + channels));
                    if a < b {
                        let cut = view.channels(a - first, b - first);
                        parts.push(Operand::new(&cut).subsampled(stride));
                    }
                    first += channels;
                }
                parts
            };
            d_inputs = as_parts(parts(start, end));
            // What passed through.
            let channels: usize = d_sources.iter().map(|d| d.shape()[1]).sum();
            for (lo, hi, first) in [(0, start, -(start as isize)), (end, channels, rows as isize)] {
                let mut channel = first;
                for d in parts(lo, hi) {
                    let offset = channel.wrapping_mul(problem.dst.channel);
                    channel += d.channels as isize;
                    let ptr = problem.dst.ptr.wrapping_offset(offset);
                    let from = Operand { ptr, channels: d.channels, ..problem.dst };
                    self.copy(&extents, &from, &d, add)?;
                }
            }
        }
        let sums = source_sweep.backward(&Backward {
            d: of_src,
            outputs: d_inputs,
            d_second: None,
            accumulate: [add, Accumulate::Set],
            bits: None,
        })?;
        source_sweep.chain.put(self.wants, &sums.ops, grads, accumulate_grads);
        if let Some(d_gate) = d_gate {
            match &sums.gate {
                Some((from, _memory)) => {
                    let to = Operand { spatial: [0; 3], ..Operand::new(d_gate.view()) };
                    let input = vec![(*from, c_in)];
                    let extents = [problem.n, 1, 1, 1];
                    let sweep = self.sweep(nothing(c_in), false, extents, input, None);
                    sweep.forward(&vec![(Typed::of(&to), c_in)], add_others)?;
                }
                // There are no positions.
                None if add_others == Accumulate::Set => self.fill_zero(d_gate)?,
                None => {}
            }
        }
        Ok(())
    }

    /// The convolution alone, into dense values of f32.
    fn multiply<T: Element>(
        &self,
        source_chain: &Chain,
        operands: &Operands<'_, T>,
        extents: &[usize; 4],
        values: &Typed,
    ) -> Result<()> {
        let weight = self.layer.weight.as_slice().expect(CONTIGUOUS).to_vec();
        let shape = LayerShape {
            partial: None,
            residual: false,
            norm_over_all: false,
            ..self.shape.clone()
        };
        // The channels that are convolved.
        let (start, end) = match &self.shape.partial {
            Some(range) => (range.start, range.end),
            None => (0, self.shape.c_in),
        };
        let mut first = 0;
        let mut sources = Vec::new();
        for source in std::iter::once(&operands.src).chain(operands.more) {
            let channels = source.shape()[1];
            let (lo, hi) = (start.max(first), end.min(first + channels));
            if lo < hi {
                sources.push(source.channels(lo - first, hi - first));
            }
            first += channels;
        }
        let operands =
            Operands { src: sources[0], more: &sources[1..], residual: None, gate: operands.gate };
        let rank = operands.src.shape().len();
        let mut dst = self.view_mut::<T>(values, extents, self.shape.c_out, rank)?;
        let lowered = Lowered::bare(weight, self.shape.c_out, source_chain.source_steps());
        let product = self.product::<T>(&shape, lowered)?.with_results_of_f32();
        product.run(&Problem::new(&shape, &operands, &mut dst)?, None)
    }

    /// The gradient by the convolution's input, of T or of f32: the transposed weight.
    fn multiply_back<T: Element>(
        &self,
        extents: &[usize; 4],
        from: Typed,
        to: Typed,
    ) -> Result<()> {
        let LayerShape { c_in, c_out, groups, .. } = *self.shape;
        if extents.contains(&0) {
            return Ok(());
        }
        let weight = self.layer.weight.as_slice().expect(CONTIGUOUS);
        let shape = LayerShape {
            c_in: c_out,
            c_out: c_in,
            groups,
            stride: 1,
            partial: None,
            residual: false,
            gate: false,
            norm_over_all: false,
        };
        let weight = turned(weight, groups, c_out / groups, c_in / groups);
        let src = self.view_mut::<T>(&from, extents, c_out, MAX_RANK)?;
        let mut dst = self.view_mut::<T>(&to, extents, c_in, MAX_RANK)?;
        let operands = Operands { src: *src.view(), more: &[], residual: None, gate: None };
        let mut product = self.product::<T>(&shape, Lowered::bare(weight, c_in, Vec::new()))?;
        if to.dtype == DType::F32 {
            product = product.with_results_of_f32();
        }
        product.run(&Problem::new(&shape, &operands, &mut dst)?, None)
    }

    /// An inference layer on tensors of T.
    fn product<T: Element>(&self, shape: &LayerShape, lowered: Lowered) -> Result<Layer> {
        let options = PrepareOptions { math: self.math, ..PrepareOptions::default() };
        Layer::new(self.device, shape, lowered, T::DTYPE, &options)
    }

    fn wgrad(
        &self,
        source: &Sweep<'_>,
        plain: bool,
        d: Typed,
        channels_fast: bool,
    ) -> Result<Vec<f32>> {
        let LayerShape { c_in, c_out, groups, .. } = *self.shape;
        // What the stages make of src, or the sources together, where it is not one tensor as it is.
        let computed;
        let src = match &source.input[..] {
            [(src, _)] if plain => *src,
            _ => {
                let what = "what source stages make of src";
                let positions: usize = source.extents.iter().product();
                let bytes = checked_product(what, &[c_in, positions, d.dtype.size()])?;
                computed = Buffer::new(self.device, what, bytes)?;
                let to = dense(&computed, d.dtype, &source.extents, c_in, source.channels_fast);
                source.forward(&vec![(to, c_in)], Accumulate::Set)?;
                to
            }
        };
        let wgrad = Wgrad {
            device: self.device,
            groups,
            rows: c_out / groups,
            depth: c_in / groups,
            extents: source.extents,
            d,
            src,
            math: self.math,
            channels_fast: [channels_fast, source.channels_fast],
        };
        wgrad.run()
    }

    fn sweep(
        &self,
        chain: Chain,
        channels_fast: bool,
        extents: [usize; 4],
        input: Parts,
        second: Option<Typed>,
    ) -> Sweep<'_> {
        let (device, reduce) = (self.device, self.reduce);
        Sweep { device, chain, channels_fast, extents, input, second, norm: None, reduce }
    }

    fn source_sweep<T: Element>(&self, problem: &Problem<'_, T>, chain: Chain) -> Sweep<'_> {
        let extents = extents_of(problem);
        let sources: Vec<Operand<T>> = problem.sources().collect();
        let channels_fast =
            sources.first().is_some_and(|s| s.channel.unsigned_abs() < nearest(s, &extents));
        let gate = problem.gate.as_ref().map(Typed::of);
        self.sweep(chain, channels_fast, extents, as_parts(sources), gate)
    }

    /// Copies one tensor's channels to another's, or adds them.
    fn copy<T: Element>(
        &self,
        extents: &[usize; 4],
        from: &Operand<T>,
        to: &Operand<T>,
        accumulate: Accumulate,
    ) -> Result<()> {
        let channels_fast = to.channel.unsigned_abs() < nearest(to, extents);
        let input = vec![(Typed::of(from), to.channels)];
        let sweep = self.sweep(nothing(to.channels), channels_fast, *extents, input, None);
        sweep.forward(&vec![(Typed::of(to), to.channels)], accumulate)
    }

    /// Sets every element to zero.
    fn fill_zero<T: Element>(&self, tensor: &mut TensorMut<'_, T>) -> Result<()> {
        let to = Operand::new(tensor.view());
        let [d, h, w] = crate::problem::spatial(tensor.shape(), 1);
        let extents = [tensor.shape()[0], d, h, w];
        let channels_fast = to.channel.unsigned_abs() < nearest(&to, &extents);
        let sweep = self.sweep(nothing(to.channels), channels_fast, extents, Parts::new(), None);
        sweep.forward(&vec![(Typed::of(&to), to.channels)], Accumulate::Set)
    }

    /// A view of device memory as a tensor `[n, channels, …spatial]` of some rank. It says T of f32
    /// too, which a [product](Layer::with_results_of_f32) takes so.
    fn view_mut<T: Element>(
        &self,
        &Typed { at: tensor, .. }: &Typed,
        extents: &[usize; 4],
        channels: usize,
        rank: usize,
    ) -> Result<TensorMut<'static, T>> {
        let [n, d, h, w] = *extents;
        let [sample, along_d, along_h, along_w] = tensor.axes;
        let pick = |all: [usize; MAX_RANK]| {
            let spatial = &all[MAX_RANK - (rank - 2)..];
            [&all[..2], spatial].concat()
        };
        let shape = pick([n, channels, d, h, w]);
        let strides =
            pick([sample, tensor.channel, along_d, along_h, along_w].map(|stride| stride as usize));
        let strides: Vec<isize> = strides.into_iter().map(|stride| stride as isize).collect();
        let ptr = std::ptr::without_provenance_mut(tensor.address as usize);
        // SAFETY: memory that a pass owns or has borrowed, until what uses it is queued; what frees
        // it is queued later.
        unsafe { TensorMut::from_raw_parts(ptr, self.place(), &shape, &strides) }
    }
}

/// Each group's `[rows, k]` as `[k, rows]`.
fn turned(weight: &[f32], groups: usize, rows: usize, k: usize) -> Vec<f32> {
    // Squares, so that the lines of both are used whole.
    const SIDE: usize = 16;
    let mut turned = vec![0.0f32; weight.len()];
    for group in 0..groups {
        let range = group * rows * k..(group + 1) * rows * k;
        let (from, to) = (&weight[range.clone()], &mut turned[range]);
        for first_row in (0..rows).step_by(SIDE) {
            for first in (0..k).step_by(SIDE) {
                for i in first..k.min(first + SIDE) {
                    for row in first_row..rows.min(first_row + SIDE) {
                        to[i * rows + row] = from[row * k + i];
                    }
                }
            }
        }
    }
    turned
}

/// A chain of nothing.
fn nothing(rows: usize) -> Chain {
    Chain { ops: Vec::new(), channels: Vec::new(), dst_map: None, residual_map: None, rows }
}

fn as_parts<T: Element>(operands: Vec<Operand<T>>) -> Parts {
    operands.iter().map(|operand| (Typed::of(operand), operand.channels)).collect()
}

fn extents_of<T>(problem: &Problem<'_, T>) -> [usize; 4] {
    let [d, h, w] = problem.spatial;
    [problem.n, d, h, w]
}

/// The smallest stride between positions.
fn nearest<T>(operand: &Operand<T>, extents: &[usize; 4]) -> usize {
    let [d, h, w] = operand.spatial;
    let axes = [operand.sample, d, h, w].into_iter().zip(extents).filter(|(_, n)| **n > 1);
    axes.map(|(stride, _)| stride.unsigned_abs()).min().unwrap_or(usize::MAX)
}

/// Dense values `[channels, n, …spatial]` or `[n, …spatial, channels]` in some memory.
fn dense(
    memory: &Buffer,
    dtype: DType,
    extents: &[usize; 4],
    channels: usize,
    channels_fast: bool,
) -> Typed {
    let total: usize = extents.iter().product();
    let (mut next, channel) = match channels_fast {
        true => (channels as i64, 1),
        false => (1, total as i64),
    };
    let mut axes = [0; 4];
    for (stride, &extent) in axes.iter_mut().zip(extents).rev() {
        *stride = next;
        next *= extent as i64;
    }
    Typed { at: Tensor { address: memory.address(), channel, axes }, dtype }
}
