//! Forward and backward passes on the CPU.
//!
//! The convolution, its gradient by src (the transposed weight) and its gradient by the weight are
//! the microkernels' ([`wgrad`]); the stages around it are a [chain](crate::train::chain) that [`sweep`] replays over
//! blocks of a [`view`], forward and backward, by the operations of [`lanes`]; [`fused`] has the chain that
//! most layers have.
//!
//! Everything is computed in f32. Tensors of 16 bits are widened where a product or a view reads them,
//! and rounded where one writes them; what is in between is f32 values in memory of a [`Pool`].

mod fused;
mod lanes;
mod sweep;
mod view;
mod wgrad;

use std::sync::{Mutex, PoisonError};

use crate::cpu::gemm::{self, Layer};
use crate::cpu::isa::{Isa, Supported};
use crate::cpu::pack::Unpacked;
use crate::cpu::threads::{CpuDevice, Disjoint};
use crate::cpu::train::sweep::{Axis, Backward, Gate, Kept, Sweep};
use crate::cpu::train::view::{Part, View};
use crate::cpu::train::wgrad::{Gradient, Src, Wgrad};
use crate::dtype::{DType, Element};
use crate::epilogue::{Lowered, SourceStep};
use crate::error::Result;
use crate::layer::Pointwise;
use crate::problem::{LayerShape, Operand, Operands, Positions, Problem};
use crate::tensor::{MAX_RANK, Place, TensorMut, TensorRef, checked_product, try_zeros};
use crate::train::chain::{BatchStatistics, Chain, Need, Op, checked, lowered, need};
use crate::train::reduce::Reduce;
use crate::train::{Accumulate, Grads, Outputs, Statistics, name};

/// Why a parameter is a slice.
const CONTIGUOUS: &str = "made contiguous when the layer was taken";
/// Positions of a plane below which its rows are too short to run along.
const SHORT_PLANE: usize = 16;

/// A layer in training, as a pass sees it.
pub(crate) struct Training<'a> {
    pub device: &'a CpuDevice,
    pub layer: &'a Pointwise,
    pub shape: &'a LayerShape,
    pub statistics: Statistics,
    /// Whether a parameter's gradient is wanted.
    pub wants: &'a dyn Fn(&str) -> bool,
    /// Sums statistics over all processes.
    pub reduce: Reduce<'a>,
    pub pool: &'a Pool,
}

/// Memory that passes have used and others may use again: fresh pages cost more than what is
/// computed in them.
#[derive(Debug, Default)]
pub(crate) struct Pool(Mutex<Vec<Vec<f32>>>);

impl Pool {
    /// So many values, whatever they are.
    fn take(&self, what: &'static str, sizes: &[usize]) -> Result<Vec<f32>> {
        let len = checked_product(what, sizes)?;
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fit = (0..buffers.len())
            .filter(|&i| buffers[i].len() >= len && buffers[i].len() <= 2 * len.max(1 << 16))
            .min_by_key(|&i| buffers[i].len());
        match fit {
            Some(i) => {
                let mut buffer = buffers.swap_remove(i);
                buffer.truncate(len);
                Ok(buffer)
            }
            None => {
                drop(buffers);
                try_zeros(what, sizes)
            }
        }
    }

    fn put(&self, buffer: Vec<f32>) {
        const MOST: usize = 4;
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() == MOST {
            buffers.remove(0);
        }
        buffers.push(buffer);
    }
}

/// What a forward pass keeps for the backward pass.
#[derive(Debug)]
pub(crate) enum Saved {
    /// The convolution's result.
    Values(Vec<f32>),
    /// Which values of dst lie inside the bounds of the last activation.
    Bits(Vec<u8>),
    Nothing,
}

/// Everything that a forward pass keeps.
pub(crate) struct State {
    saved: Saved,
    axis: Axis,
    /// The statistics of batch norms: of the source's, of the other one.
    pub statistics: [Option<BatchStatistics>; 2],
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "State({:?}, {} bytes)", self.axis, self.bytes())
    }
}

impl State {
    /// Bytes that it holds, beside some per channel.
    pub(crate) fn bytes(&self) -> usize {
        match &self.saved {
            Saved::Values(values) => size_of_val(&values[..]),
            Saved::Bits(bits) => bits.len(),
            Saved::Nothing => 0,
        }
    }
}

/// Where the gradient by the convolution's input goes.
enum Target<'o, 't> {
    /// Contiguous values, in this order.
    Values(Axis, &'o mut [f32]),
    /// The positions of a tensor that the stride keeps.
    Tensor(&'o mut TensorMut<'t>),
}

impl Training<'_> {
    /// Bytes that the state of a forward pass will hold, beside some per channel.
    pub(crate) fn bytes(&self, n: usize, positions: usize) -> usize {
        let (rows, total) = (self.shape.c_out, n.saturating_mul(positions));
        match self.need() {
            Need::Values => rows.saturating_mul(total).saturating_mul(size_of::<f32>()),
            Need::Bits(..) => Sweep::bits_len(Axis::Rows, rows, total),
            Need::Nothing => 0,
        }
    }

    fn need(&self) -> Need {
        need(self.layer, self.statistics, self.wants)
    }

    fn isa(&self) -> Result<Supported> {
        Isa::detect()
    }

    /// Runs forward into `dst`.
    pub(crate) fn forward<T: Element>(
        &self,
        operands: &Operands<'_, T>,
        dst: &mut TensorMut<'_, T>,
    ) -> Result<State> {
        let isa = self.isa()?;
        let problem = Problem::new(self.shape, operands, dst)?;
        let (n, positions) = (problem.n, problem.positions());
        let mut chain = Chain::of_stages(self.layer, self.statistics);
        let axis = axis_of(&problem.dst, &problem, &chain);
        let mut state = State { saved: Saved::Nothing, axis, statistics: [None, None] };
        if n * positions == 0 && self.reduce.is_none() {
            return Ok(state);
        }

        // The source's own batch norm.
        let mut source_chain = Chain::of_source(self.layer, self.statistics);
        if let Some((op, batch)) = source_chain.batch_norm() {
            let mut sweep = self.source_sweep(isa, &problem, source_chain);
            let moments = sweep.forward(None)?;
            source_chain = sweep.chain;
            let channels = &source_chain.channels[op];
            state.statistics[0] =
                checked(moments, channels, [batch.mean, batch.var], operands.src.shape())?;
        }

        let need = self.need();
        // Bits are those of f32 values.
        let in_one_pass = match need {
            Need::Values => false,
            Need::Bits(..) => T::DTYPE == DType::F32,
            Need::Nothing => true,
        };
        if in_one_pass {
            // As in inference.
            let mut lowered = lowered(self.layer, &source_chain, DType::F32);
            let weight = std::mem::take(&mut lowered.weight);
            let weight = Unpacked::new(&weight, self.shape.groups, self.shape.k());
            let layer = Layer::of_f32(self.device, self.shape, weight, lowered, T::DTYPE)?;
            gemm::run(&[(&layer, &problem)]);
            if let Need::Bits(bounds, _) = need {
                let view = self.dst_view(&problem, &chain);
                let sweep = self.sweep(isa, chain_of(chain.rows), axis, &problem, view);
                state.saved = Saved::Bits(sweep.keep_bits(None, bounds));
            }
            return Ok(state);
        }

        let rows = self.shape.c_out;
        let mut values = self.pool.take("the workspace", &[rows, n, positions])?;
        match T::DTYPE {
            // SAFETY: T is f32.
            DType::F32 => unsafe {
                let more: Vec<_> = operands.more.iter().map(|source| source.cast()).collect();
                let operands = Operands {
                    src: operands.src.cast(),
                    more: &more,
                    residual: None,
                    gate: operands.gate.map(|gate| gate.cast()),
                };
                self.multiply(&source_chain, &operands, &problem, axis, &mut values)?;
            },
            _ => self.multiply_widened(isa, &source_chain, &problem, axis, &mut values)?,
        }
        let input = View::contiguous(values.as_mut_ptr(), axis, rows, n * positions);
        let batch = chain.batch_norm();
        let (dst_map, residual_map) = (chain.dst_map.take(), chain.residual_map.take());
        let walk = problem.walk(&problem.dst, true);
        let dst_view = View::new(&rows_of(&problem.dst, rows), walk, dst_map.as_deref());
        let mut sweep = self.sweep(isa, chain, axis, &problem, input);
        sweep.input_is_contiguous = true;
        sweep.residual = problem.residual.as_ref().map(|residual| {
            let walk = problem.walk(residual, true);
            View::new(&rows_of(residual, rows), walk, residual_map.as_deref())
        });
        if let Need::Bits(bounds, _) = need {
            state.saved = Saved::Bits(sweep.keep_bits(Some(&dst_view), bounds));
            self.pass_through(isa, &problem)?;
            self.pool.put(values);
            return Ok(state);
        }
        let moments = sweep.forward(Some((&dst_view, Accumulate::Set)))?;
        if let Some((op, batch)) = batch {
            let channels = &sweep.chain.channels[op];
            state.statistics[1] =
                checked(moments, channels, [batch.mean, batch.var], operands.src.shape())?;
        }
        self.pass_through(isa, &problem)?;
        state.saved = Saved::Values(values);
        Ok(state)
    }

    /// Runs backward.
    pub(crate) fn backward<T: Element>(
        &self,
        operands: &Operands<'_, T>,
        mut state: State,
        d_dst: &TensorRef<'_, T>,
        outputs: &mut Outputs<'_, T>,
        grads: &mut Grads,
        accumulate: Accumulate,
    ) -> Result<()> {
        let isa = self.isa()?;
        let problem = Problem::reading(self.shape, operands, "d_dst", d_dst)?;
        let (n, positions) = (problem.n, problem.positions());
        let total = n * positions;
        let rows = self.shape.c_out;
        let axis = state.axis;

        // The stages, down to the convolution's result.
        let mut chain = Chain::of_stages(self.layer, self.statistics);
        chain.settle(&state.statistics[1]);
        let (dst_map, residual_map) = (chain.dst_map.take(), chain.residual_map.take());
        let walk = problem.walk(&problem.dst, true);
        let d_dst_view = View::new(&rows_of(&problem.dst, rows), walk, dst_map.as_deref());
        // The gradient by the convolution's result takes the place of the result.
        let mut buffer = match &mut state.saved {
            Saved::Values(values) => std::mem::take(values),
            _ => self.pool.take("the gradient by the convolution", &[rows, total])?,
        };
        let d = buffer.as_mut_ptr();
        let kept = match (&state.saved, self.need()) {
            (Saved::Values(_), _) => Kept::Input,
            (Saved::Bits(bits), Need::Bits(_, alpha)) => Kept::Bits(bits, alpha),
            _ => Kept::Nothing,
        };
        let d_view = View::contiguous(d, axis, rows, total);
        let mut sweep = self.sweep(isa, chain, axis, &problem, d_view.clone());
        sweep.input_is_contiguous = true;
        sweep.residual = problem.residual.as_ref().map(|residual| {
            let walk = problem.walk(residual, true);
            View::new(&rows_of(residual, rows), walk, residual_map.as_deref())
        });
        let d_residual = match &mut outputs.d_residual {
            None => None,
            Some(tensor) => {
                let start = self.shape.partial.as_ref().map_or(0, |range| range.start);
                if self.shape.partial.is_some() && outputs.accumulate == Accumulate::Set {
                    fill_zero(self.device, tensor);
                }
                let view = tensor.view().channels(start, start + rows);
                let operand = Operand::new(&view);
                let walk = problem.walk(&operand, true);
                Some(View::new(&operand, walk, residual_map.as_deref()))
            }
        };
        // Layer norms over all need their forward statistics again.
        if sweep
            .chain
            .barriers()
            .iter()
            .any(|&i| matches!(sweep.chain.ops[i], Op::LayerNorm { .. }))
        {
            sweep.statistics_again()?;
        }
        let sum = sweep.backward(&Backward {
            d_dst: d_dst_view,
            d_input: d_view.clone(),
            d_residual,
            accumulate: [Accumulate::Set, outputs.accumulate],
            kept,
            in_place: true,
        })?;
        sweep.chain.put(self.wants, &sum.ops, grads, accumulate);

        // Through the convolution.
        let mut source_chain = Chain::of_source(self.layer, self.statistics);
        source_chain.settle(&state.statistics[0]);
        let source_grads = source_chain.ops.iter().any(|op| match op {
            Op::Linear(linear) => linear.names.iter().flatten().any(|name| (self.wants)(name)),
            _ => false,
        });
        let c_in = self.shape.c_in;
        let plain = source_chain.ops.is_empty();
        let src_axis = match problem.sources().next() {
            Some(source) => axis_of(&source, &problem, &source_chain),
            None => axis,
        };
        let mut source_sweep = self.source_sweep(isa, &problem, source_chain);
        source_sweep.axis = Axis::Lanes;
        if (self.wants)(name::WEIGHT)
            && let Some(out) = grads.get_mut(name::WEIGHT)
        {
            let d = match axis {
                Axis::Rows => Gradient { ptr: d, row: total as isize, position: 1 },
                Axis::Lanes => Gradient { ptr: d, row: 1, position: rows as isize },
            };
            let view = source_sweep.input.clone();
            let compute = |range: std::ops::Range<usize>, out: &mut [f32]| {
                source_sweep.result(range, out);
            };
            let wgrad = Wgrad {
                isa,
                device: self.device,
                groups: self.shape.groups,
                rows,
                k: self.shape.k(),
                positions: total,
                d,
                src: if plain { Src::InPlace(&view) } else { Src::Computed(&compute) },
            };
            // SAFETY: `d` and src are readable at every row, channel and position.
            unsafe { wgrad.run(out, accumulate) };
        }

        let d_sources_wanted = !outputs.d_sources.is_empty();
        if !(d_sources_wanted || source_grads || outputs.d_gate.is_some()) {
            self.pool.put(buffer);
            return Ok(());
        }
        let add = outputs.accumulate_sources;
        let direct = plain && T::DTYPE == DType::F32 && total > 0;
        if let ([d_src], true, None, Accumulate::Set) =
            (&mut outputs.d_sources[..], direct, &self.shape.partial, add)
        {
            // Straight to where it belongs.
            if self.shape.stride > 1 {
                fill_zero(self.device, d_src);
            }
            // SAFETY: T is f32.
            let mut d_src = unsafe { d_src.reborrow().cast() };
            self.multiply_back(axis, d, &problem, Target::Tensor(&mut d_src))?;
            self.pool.put(buffer);
            return Ok(());
        }
        let mut d_src = self.pool.take("the gradient by src", &[c_in, total])?;
        self.multiply_back(axis, d, &problem, Target::Values(src_axis, &mut d_src))?;
        self.pool.put(buffer);
        let d_src_view = View::contiguous(d_src.as_mut_ptr(), src_axis, c_in, total);
        source_sweep.axis = src_axis;
        // Without a tensor for it, the gradient stays where it is.
        let mut d_input = d_src_view.clone();
        if d_sources_wanted {
            let (start, end) = match &self.shape.partial {
                Some(range) => (range.start, range.end),
                None => (0, c_in),
            };
            if self.shape.stride > 1 && add == Accumulate::Set {
                outputs.d_sources.iter_mut().for_each(|d| fill_zero(self.device, d));
            }
            let parts = |lo: usize, hi: usize| {
                let mut first = 0;
                let mut parts = Vec::new();
                for tensor in outputs.d_sources.iter() {
                    let view = tensor.view();
                    let channels = view.shape()[1];
                    let (a, b) = (lo.max(first), hi.min(first + channels));
                    if a < b {
                        let cut = view.channels(a - first, b - first);
                        parts.push(Operand::new(&cut).subsampled(self.shape.stride));
                    }
                    first += channels;
                }
                parts
            };
            d_input = View { parts: self.parts(&problem, parts(start, end)), map: None };
            // What passed through.
            let total_channels: usize = outputs.d_sources.iter().map(|d| d.shape()[1]).sum();
            let ranges = [(0, start, -(start as isize)), (end, total_channels, rows as isize)];
            for (lo, hi, first) in ranges {
                let mut channel = first;
                for d in parts(lo, hi) {
                    let ptr =
                        problem.dst.ptr.wrapping_offset(channel.wrapping_mul(problem.dst.channel));
                    channel += d.channels as isize;
                    let from = Operand { ptr, channels: d.channels, ..problem.dst };
                    self.copy(isa, &problem, &from, &d, add)?;
                }
            }
        }
        let accumulate_src = if d_sources_wanted { add } else { Accumulate::Set };
        let sum = source_sweep.backward(&Backward {
            d_dst: d_src_view,
            d_input,
            d_residual: None,
            accumulate: [accumulate_src, Accumulate::Set],
            kept: if plain { Kept::Nothing } else { Kept::Input },
            in_place: false,
        })?;
        source_sweep.chain.put(self.wants, &sum.ops, grads, accumulate);
        self.pool.put(d_src);
        if let Some(d_gate) = &mut outputs.d_gate {
            let (sample, channel) = (d_gate.strides()[0], d_gate.strides()[1]);
            let ptr = d_gate.as_mut_ptr();
            for (i, &x) in sum.gate.iter().enumerate() {
                let (n, c) = ((i / c_in) as isize, (i % c_in) as isize);
                // SAFETY: the gradient by the gate has the gate's shape.
                unsafe {
                    let to = ptr.offset(n * sample + c * channel);
                    *to = T::from_f32(match outputs.accumulate {
                        Accumulate::Set => x as f32,
                        Accumulate::Add => (*to).to_f32() + x as f32,
                    });
                }
            }
        }
        Ok(())
    }

    /// As [`multiply`](Self::multiply), for tensors of 16 bits: by way of what source stages make of src,
    /// in f32.
    fn multiply_widened<T: Element>(
        &self,
        isa: Supported,
        source_chain: &Chain,
        problem: &Problem<'_, T>,
        axis: Axis,
        values: &mut [f32],
    ) -> Result<()> {
        // Positions that a thread widens at a time.
        const BLOCK: usize = 64;
        let (c_in, total) = (self.shape.c_in, problem.n * problem.positions());
        let mut widened = self.pool.take("src in f32", &[c_in, total])?;
        let mut sweep = self.source_sweep(isa, problem, source_chain.clone());
        sweep.axis = Axis::Lanes;
        let to = Disjoint::new(widened.as_mut_ptr());
        self.device.for_each(total.div_ceil(BLOCK), c_in.saturating_mul(total), &|block| {
            let positions = block * BLOCK..total.min((block + 1) * BLOCK);
            let (first, len) = (positions.start * c_in, positions.len() * c_in);
            // SAFETY: no other block has these positions.
            let out = unsafe { std::slice::from_raw_parts_mut(to.at(first), len) };
            sweep.result(positions, out);
        });
        let (src_shape, strides) = contiguous(problem, MAX_RANK, c_in, Axis::Lanes);
        // SAFETY: as many values as the shape has.
        let src = unsafe {
            TensorRef::from_raw_parts(widened.as_ptr(), Place::Host, &src_shape, &strides)?
        };
        let shape = LayerShape {
            stride: 1,
            partial: None,
            residual: false,
            gate: false,
            norm_over_all: false,
            ..self.shape.clone()
        };
        let operands = Operands { src, more: &[], residual: None, gate: None };
        self.product(&shape, Vec::new(), &operands, problem, axis, values)?;
        self.pool.put(widened);
        Ok(())
    }

    /// The convolution alone, into contiguous values.
    fn multiply<T: Element>(
        &self,
        source_chain: &Chain,
        operands: &Operands<'_>,
        problem: &Problem<'_, T>,
        axis: Axis,
        values: &mut [f32],
    ) -> Result<()> {
        let shape = LayerShape {
            partial: None,
            residual: false,
            norm_over_all: false,
            ..self.shape.clone()
        };
        // The channels that are convolved.
        let convolved = match &self.shape.partial {
            Some(range) => (range.start, range.end),
            None => (0, self.shape.c_in),
        };
        let mut first = 0;
        let mut sources = Vec::new();
        for source in std::iter::once(&operands.src).chain(operands.more) {
            let channels = source.shape()[1];
            let (lo, hi) = (convolved.0.max(first), convolved.1.min(first + channels));
            if lo < hi {
                sources.push(source.channels(lo - first, hi - first));
            }
            first += channels;
        }
        let operands =
            Operands { src: sources[0], more: &sources[1..], residual: None, gate: operands.gate };
        self.product(&shape, source_chain.source_steps(), &operands, problem, axis, values)
    }

    /// The convolution of a layer of this shape, into contiguous values.
    fn product<T: Element>(
        &self,
        shape: &LayerShape,
        source_steps: Vec<SourceStep>,
        operands: &Operands<'_>,
        problem: &Problem<'_, T>,
        axis: Axis,
        values: &mut [f32],
    ) -> Result<()> {
        let lowered = Lowered::bare(Vec::new(), self.shape.c_out, source_steps);
        let layer = Layer::of_f32(self.device, shape, self.weight(), lowered, DType::F32)?;
        let rank = operands.src.shape().len();
        let (dst_shape, strides) = contiguous(problem, rank, self.shape.c_out, axis);
        // SAFETY: as many values as the shape has.
        let mut dst = unsafe {
            TensorMut::from_raw_parts(
                values.as_mut_ptr(),
                Place::Host,
                &dst_shape[..rank],
                &strides[..rank],
            )?
        };
        let problem = Problem::new(shape, operands, &mut dst)?;
        gemm::run(&[(&layer, &problem)]);
        Ok(())
    }

    fn weight(&self) -> Unpacked<'_> {
        let weight = self.layer.weight.as_slice().expect(CONTIGUOUS);
        Unpacked::new(weight, self.shape.groups, self.shape.k())
    }

    /// The gradient by the convolution's input: the transposed weight.
    fn multiply_back<T: Element>(
        &self,
        axis: Axis,
        d: *mut f32,
        problem: &Problem<'_, T>,
        into: Target<'_, '_>,
    ) -> Result<()> {
        let LayerShape { c_in, c_out, groups, .. } = *self.shape;
        let lowered = Lowered::bare(Vec::new(), c_in, Vec::new());
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
        let weight = self.weight().transposed();
        let layer = Layer::of_f32(self.device, &shape, weight, lowered, DType::F32)?;
        let rank = MAX_RANK;
        let (from_shape, from_strides) = contiguous(problem, rank, c_out, axis);
        let (to_shape, mut to_strides) = contiguous(problem, rank, c_in, axis);
        let to = match into {
            Target::Values(axis, values) => {
                to_strides = contiguous(problem, rank, c_in, axis).1;
                values.as_mut_ptr()
            }
            Target::Tensor(tensor) => {
                let operand = Operand::new(tensor.view()).subsampled(self.shape.stride);
                to_strides[0] = operand.sample;
                to_strides[1] = operand.channel;
                to_strides[2..].copy_from_slice(&operand.spatial);
                tensor.as_mut_ptr()
            }
        };
        // SAFETY: values or a tensor of these shapes.
        let (src, mut dst) = unsafe {
            (
                TensorRef::from_raw_parts(d, Place::Host, &from_shape, &from_strides)?,
                TensorMut::from_raw_parts(to, Place::Host, &to_shape, &to_strides)?,
            )
        };
        let operands = Operands { src, more: &[], residual: None, gate: None };
        let problem = Problem::new(&shape, &operands, &mut dst)?;
        gemm::run(&[(&layer, &problem)]);
        Ok(())
    }

    fn sweep<'s, T: Element>(
        &'s self,
        isa: Supported,
        chain: Chain,
        axis: Axis,
        problem: &Problem<'_, T>,
        input: View<'s>,
    ) -> Sweep<'s> {
        Sweep {
            isa,
            device: self.device,
            chain,
            axis,
            samples: problem.n,
            positions: problem.positions(),
            input,
            input_is_contiguous: false,
            residual: None,
            gate: problem.gate.as_ref().map(Gate::new),
            of_samples: Vec::new(),
            reduce: self.reduce,
        }
    }

    fn source_sweep<'s, T: Element>(
        &'s self,
        isa: Supported,
        problem: &Problem<'_, T>,
        chain: Chain,
    ) -> Sweep<'s> {
        let sources: Vec<Operand<T>> = problem.sources().collect();
        let axis = axis_of(&sources[0], problem, &chain);
        let input = View { parts: self.parts(problem, sources), map: None };
        self.sweep(isa, chain, axis, problem, input)
    }

    fn parts<T: Element>(&self, problem: &Problem<'_, T>, operands: Vec<Operand<T>>) -> Vec<Part> {
        let part = |operand: &Operand<T>| Part::new(operand, problem.walk(operand, true));
        operands.iter().map(part).collect()
    }

    fn dst_view<'s, T: Element>(&self, problem: &Problem<'_, T>, chain: &'s Chain) -> View<'s> {
        let walk = problem.walk(&problem.dst, true);
        View::new(&rows_of(&problem.dst, self.shape.c_out), walk, chain.dst_map.as_deref())
    }

    /// Copies what a partial convolution passes through.
    fn pass_through<T: Element>(&self, isa: Supported, problem: &Problem<'_, T>) -> Result<()> {
        let mut pairs = problem.passed_through();
        pairs.try_for_each(|(src, dst)| self.copy(isa, problem, &src, &dst, Accumulate::Set))
    }

    /// Copies one tensor's rows to another's, or adds them.
    fn copy<T: Element>(
        &self,
        isa: Supported,
        problem: &Problem<'_, T>,
        from: &Operand<T>,
        to: &Operand<T>,
        accumulate: Accumulate,
    ) -> Result<()> {
        let axis = if to.channel == 1 { Axis::Lanes } else { Axis::Rows };
        let from = View::new(from, problem.walk(from, true), None);
        let to = View::new(to, problem.walk(to, true), None);
        let mut sweep = self.sweep(isa, chain_of(to.parts[0].rows), axis, problem, from);
        sweep.forward(Some((&to, accumulate)))?;
        Ok(())
    }
}

/// A chain of nothing.
fn chain_of(rows: usize) -> Chain {
    Chain { ops: Vec::new(), channels: Vec::new(), dst_map: None, residual_map: None, rows }
}

fn rows_of<T>(operand: &Operand<T>, rows: usize) -> Operand<T> {
    Operand { channels: rows, ..*operand }
}

/// Which way to cut a tensor: along its memory.
fn axis_of<T: Element>(operand: &Operand<T>, problem: &Problem<'_, T>, chain: &Chain) -> Axis {
    let along = problem.walk(operand, false).uniform() == Some(1);
    if chain.wants_lines() || problem.positions() < SHORT_PLANE || (operand.channel == 1 && !along)
    {
        Axis::Lanes
    } else {
        Axis::Rows
    }
}

/// Shape and strides of contiguous values `[channels, n, positions]` or `[n, positions, channels]`.
fn contiguous<T: Element>(
    problem: &Problem<'_, T>,
    rank: usize,
    channels: usize,
    axis: Axis,
) -> ([usize; MAX_RANK], [isize; MAX_RANK]) {
    let mut shape = [1; MAX_RANK];
    let mut strides = [0; MAX_RANK];
    shape[0] = problem.n;
    shape[1] = channels;
    let spatial = rank - 2;
    shape[2..rank].copy_from_slice(&problem.spatial[problem.spatial.len() - spatial..]);
    let (mut next, channel) = match axis {
        Axis::Rows => (1, (problem.n * problem.positions()) as isize),
        Axis::Lanes => (channels as isize, 1),
    };
    for i in (2..rank).rev() {
        strides[i] = next;
        next *= shape[i] as isize;
    }
    strides[0] = next;
    strides[1] = channel;
    (shape, strides)
}

/// Sets every element to zero.
fn fill_zero<T: Element>(device: &CpuDevice, tensor: &mut TensorMut<'_, T>) {
    /// Shared by the units, each of which has samples of its own.
    struct To<T>(Operand<T>);
    // SAFETY: units write to disjoint samples.
    unsafe impl<T> Sync for To<T> {}

    let to = To(Operand::new(tensor.view()));
    let shape = tensor.view().shape();
    let missing = MAX_RANK - shape.len();
    let mut axes = [(1, 0); MAX_RANK - 1];
    for i in 2..shape.len() {
        axes[i - 2 + missing] = (shape[i], to.0.spatial[i - 2 + missing]);
    }
    // Channels innermost joins the axes of channels last, channels outermost those of channels first.
    axes[MAX_RANK - 2] = (shape[1], to.0.channel);
    if to.0.channel != 1 {
        axes.rotate_right(1);
    }
    let walk = Positions::new(&axes);
    let count: usize = shape[1..].iter().product();
    device.for_each(shape[0], shape[0].saturating_mul(count) / 4, &|n| {
        let to = &to;
        let ptr = to.0.ptr.cast_mut().wrapping_offset(n as isize * to.0.sample);
        for (offset, stride, len) in walk.runs(0, count) {
            let ptr = ptr.wrapping_offset(offset);
            // SAFETY: elements of this sample.
            unsafe {
                match stride {
                    1 => ptr.write_bytes(0, len),
                    _ => (0..len as isize).for_each(|i| *ptr.offset(i * stride) = T::default()),
                }
            }
        }
    });
}
