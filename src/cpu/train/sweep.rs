//! Passes over the positions of a chain's input: forward, its statistics, backward, its sums.
//!
//! A block is cut along the tensor's memory: a run of one row's positions ([`Axis::Rows`]), or
//! lines of all rows ([`Axis::Lanes`]). Units of work are the rows, or ranges of positions that
//! depend on the problem alone, and what they sum up is merged in their order: results do not
//! depend on the number of threads.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;

use crate::cpu::isa::Supported;
use crate::cpu::runs;
use crate::cpu::threads::{self, CpuDevice};
use crate::cpu::train::fused;
use crate::cpu::train::lanes::{self, LineMoments, Per, Sums};
use crate::cpu::train::view::{At, View};
use crate::dtype::{DType, Element, bf16, f16};
use crate::moments::Moments;
use crate::problem::Operand;
use crate::stages::{Activation, NormOver};
use crate::train::Accumulate;
use crate::train::chain::{Chain, Linear, Op, reduce_moments};
use crate::train::reduce::Reduce;

/// Values of a block of one row.
const ROW_BLOCK: usize = 2048;
/// Values of a block of lines, about.
const LINES_BLOCK: usize = 8192;
/// The most units of lines.
const UNITS: usize = 64;

/// Which way blocks are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    Rows,
    Lanes,
}

/// The gate `[n, c_in]`.
#[derive(Clone, Copy)]
pub(super) struct Gate {
    ptr: *const (),
    dtype: DType,
    sample: isize,
    channel: isize,
}

// SAFETY: only read, and borrowed by the caller of a pass.
unsafe impl Sync for Gate {}
// SAFETY: as above.
unsafe impl Send for Gate {}

impl Gate {
    pub(super) fn new<T: Element>(operand: &Operand<T>) -> Self {
        let Operand { ptr, sample, channel, .. } = *operand;
        Gate { ptr: ptr.cast(), dtype: T::DTYPE, sample, channel }
    }

    /// # Safety
    /// It is a sample and a channel of the gate.
    unsafe fn value(&self, sample: usize, channel: usize) -> f32 {
        let at = sample as isize * self.sample + channel as isize * self.channel;
        // SAFETY: the caller's promise; only one type has each dtype.
        unsafe {
            match self.dtype {
                DType::F32 => *self.ptr.cast::<f32>().offset(at),
                DType::F16 => (*self.ptr.cast::<f16>().offset(at)).to_f32(),
                DType::Bf16 => (*self.ptr.cast::<bf16>().offset(at)).to_f32(),
            }
        }
    }
}

/// A chain and the tensors that it is replayed on.
pub(super) struct Sweep<'a> {
    pub isa: Supported,
    pub device: &'a CpuDevice,
    pub chain: Chain,
    pub axis: Axis,
    pub samples: usize,
    /// Positions of one sample.
    pub positions: usize,
    pub input: View<'a>,
    /// Whether the input is [`View::contiguous`].
    pub input_is_contiguous: bool,
    pub residual: Option<View<'a>>,
    pub gate: Option<Gate>,
    /// Mean and `1 / std` of each sample, for a layer norm over all.
    pub of_samples: Vec<[f64; 2]>,
    pub reduce: Reduce<'a>,
}

/// What a backward pass reads and writes beside the input.
pub(super) struct Backward<'a> {
    pub d_dst: View<'a>,
    /// The gradient by the input; may be where the input is.
    pub d_input: View<'a>,
    pub d_residual: Option<View<'a>>,
    /// What happens to `d_input` and `d_residual`.
    pub accumulate: [Accumulate; 2],
    pub kept: Kept<'a>,
    /// Whether `d_input` is where the input is.
    pub in_place: bool,
}

/// What of the forward pass a backward pass has.
#[derive(Clone, Copy)]
pub(super) enum Kept<'a> {
    /// The chain's input.
    Input,
    /// Bits of a last activation, whose slope is this where a bit is clear; nothing else has a
    /// derivative that depends on a value.
    Bits(&'a [u8], f32),
    /// No derivative depends on a value.
    Nothing,
}

/// What a backward pass sums up.
#[derive(Default)]
pub(super) struct Sum {
    /// Two per op and row: `Σ d` and `Σ d (x - hi)`.
    pub ops: Vec<[Vec<f64>; 2]>,
    /// `[n, rows]`.
    pub gate: Vec<f64>,
}

/// Coefficients of a normalisation's gradient, once its sums are known.
#[derive(Default)]
struct Coefficients {
    /// `d * a + (x - hi) * b + c`, per row.
    rows: [Vec<f32>; 3],
    /// The means of `g` and of `g x̂`, per sample.
    samples: Vec<[f64; 2]>,
}

/// What a unit of rows knows of its own row before all rows are known.
#[derive(Clone, Copy, Default)]
struct Own {
    linear: Option<[f32; 3]>,
    combine: Option<[f32; 3]>,
}

/// What a unit has found out.
enum Found {
    Row(Moments),
    Lines(LineMoments),
    Sample(Moments),
}

/// What a unit has summed up: two per op, each of one row or of all; the gate's; a sample's.
struct UnitSums {
    ops: Vec<[Vec<f64>; 2]>,
    gate: Vec<f64>,
    sample: [f64; 2],
}

#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    d: Vec<f32>,
    spare: Vec<f32>,
    saved: Vec<Vec<f32>>,
    inverse: Vec<f32>,
    gate: Vec<f32>,
    moments: [Vec<f32>; 3],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    threads::with_scratch(&SCRATCH, f)
}

fn slot(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl<'a> Sweep<'a> {
    fn total(&self) -> usize {
        self.samples * self.positions
    }

    fn rows(&self) -> usize {
        self.chain.rows
    }

    /// Lines of a block.
    fn lines(&self) -> usize {
        (LINES_BLOCK / self.rows()).clamp(8, 256).next_multiple_of(8)
    }

    fn units(&self) -> usize {
        match self.axis {
            Axis::Rows => self.rows(),
            Axis::Lanes if self.chain.by_sample() => self.samples,
            Axis::Lanes => self.total().div_ceil(self.lines()).min(UNITS),
        }
    }

    /// The blocks of a unit, in order.
    fn blocks(&self, unit: usize) -> impl Iterator<Item = At> + use<> {
        let (row, range, most, sample) = match self.axis {
            Axis::Rows => {
                let sample = if self.chain.by_sample() { self.positions } else { self.total() };
                (Some(unit), 0..self.total(), ROW_BLOCK, sample)
            }
            Axis::Lanes if self.chain.by_sample() => {
                let first = unit * self.positions;
                (None, first..first + self.positions, self.lines(), self.positions)
            }
            Axis::Lanes => {
                let blocks = self.total().div_ceil(self.lines());
                let at =
                    |unit: usize| (blocks * unit / self.units() * self.lines()).min(self.total());
                (None, at(unit)..at(unit + 1), self.lines(), self.total())
            }
        };
        let mut next = range.start;
        std::iter::from_fn(move || {
            let end = (next + most).min(range.end).min((next / sample.max(1) + 1) * sample.max(1));
            let positions = next..end;
            next = end;
            (!positions.is_empty()).then_some(At { row, positions })
        })
    }

    /// Runs units and collects what they give, in order.
    fn each<R: Send + Sync>(&self, f: impl Fn(usize) -> R + Sync) -> Vec<R> {
        let slots: Vec<OnceLock<R>> = (0..self.units()).map(|_| OnceLock::new()).collect();
        let work = self.total().saturating_mul(self.rows());
        self.device.for_each(slots.len(), work, &|unit| {
            let _ = slots[unit].set(f(unit));
        });
        slots.into_iter().map(|slot| slot.into_inner().expect("every unit ran")).collect()
    }

    fn linear<'l>(&self, linear: &'l Linear, at: &At, own: &Own) -> Per<'l, 3> {
        match at.row {
            Some(row) => Per::One(match own.linear {
                Some(values) if linear.batch.is_some() => values,
                _ => [linear.hi[row], linear.scale[row], linear.shift[row]],
            }),
            None => Per::Each([&linear.hi, &linear.scale, &linear.shift]),
        }
    }

    fn hi<'l>(&self, linear: &'l Linear, at: &At, own: &Own) -> Per<'l, 1> {
        match self.linear(linear, at, own) {
            Per::One([hi, ..]) => Per::One([hi]),
            Per::Each([hi, ..]) => Per::Each([hi]),
        }
    }

    fn sample(&self, at: &At) -> usize {
        at.positions.start / self.positions.max(1)
    }

    /// The gates of a block, which lies in one sample.
    fn gates<'g>(&self, at: &At, buffer: &'g mut Vec<f32>) -> Per<'g, 1> {
        let gate = self.gate.expect("a gate stage comes with a gate tensor");
        let sample = self.sample(at);
        // SAFETY: a block's sample, a row.
        let value = |row: usize| unsafe { gate.value(sample, row) };
        match at.row {
            Some(row) => Per::One([value(row)]),
            None => {
                let rows = self.rows();
                let gates = slot(buffer, rows);
                gates.iter_mut().enumerate().for_each(|(row, gate)| *gate = value(row));
                Per::Each([gates])
            }
        }
    }

    /// Loads a block of the input and runs the first ops on it; keeps what their gradients need.
    fn replay(&self, at: &At, until: usize, keep: bool, own: &Own, scratch: &mut Scratch) {
        let isa = self.isa;
        let len = self.block_len(at);
        let Scratch { x, spare, saved, inverse, gate, .. } = scratch;
        let x = slot(x, len);
        // SAFETY: the input is readable at every row and position.
        unsafe { self.input.load(isa, at, x) };
        if saved.len() < self.chain.ops.len() {
            saved.resize_with(self.chain.ops.len(), Vec::new);
        }
        for (op, saved) in self.chain.ops[..until].iter().zip(saved) {
            let needed = !matches!(op, Op::Residual | Op::LayerNorm { .. });
            if keep && needed {
                slot(saved, len).copy_from_slice(x);
            }
            match op {
                Op::Linear(linear) => lanes::linear(isa, self.linear(linear, at, own), x),
                Op::Activation(activation) => runs::apply_activation(isa, *activation, x),
                Op::PRelu { slope } => {
                    let per = match at.row {
                        Some(row) => Per::One([slope[row]]),
                        None => Per::Each([slope]),
                    };
                    lanes::prelu(isa, per, x);
                }
                Op::Residual => {
                    let residual = self.residual.as_ref().expect("a residual stage has a tensor");
                    let spare = slot(spare, len);
                    // SAFETY: the residual is readable at every row and position.
                    unsafe { residual.load(isa, at, spare) };
                    runs::add_lanes(isa, spare, x);
                }
                Op::Gate => lanes::scale(isa, self.gates(at, gate), x),
                Op::LayerNorm { over, affine, eps } => {
                    inverse.clear();
                    for line in x.chunks_exact_mut(self.rows()) {
                        let (mean, inv) = match over {
                            NormOver::Channels => {
                                let moments = Moments::of(isa, line);
                                (moments.mean, f64::from(moments.scale(*eps)))
                            }
                            NormOver::All => {
                                let [mean, inv] = self.of_samples[self.sample(at)];
                                (mean, inv)
                            }
                        };
                        let hi = mean as f32;
                        let lo = (mean - f64::from(hi)) as f32;
                        let inv = inv as f32;
                        lanes::linear(isa, Per::One([hi, inv, -lo * inv]), line);
                        inverse.push(inv);
                    }
                    if keep {
                        slot(saved, len).copy_from_slice(x);
                    }
                    if let Some((gamma, beta)) = affine {
                        let zero = slot(spare, self.rows());
                        zero.fill(0.0);
                        lanes::linear(isa, Per::Each([zero, gamma, beta]), x);
                    }
                }
            }
        }
    }

    /// Bytes of the bits of all blocks.
    pub(super) fn bits_len(axis: Axis, rows: usize, total: usize) -> usize {
        match axis {
            Axis::Rows => rows * total.div_ceil(8),
            Axis::Lanes => (rows * total).div_ceil(8),
        }
    }

    /// Where the bits of a block are: blocks begin with a whole byte.
    fn bits(&self, at: &At) -> Range<usize> {
        let first = match at.row {
            Some(row) => row * self.total().div_ceil(8) + at.positions.start / 8,
            None => at.positions.start * self.rows() / 8,
        };
        first..first + self.block_len(at).div_ceil(8)
    }

    /// Packs where the chain's result lies between two bounds; puts the result to `dst`, if there is
    /// one.
    pub(super) fn keep_bits(&self, dst: Option<&View<'_>>, [lo, hi]: [f32; 2]) -> Vec<u8> {
        let of_units = self.each(|unit| {
            with_scratch(|scratch| {
                let mut all = Vec::new();
                for at in self.blocks(unit) {
                    self.replay(&at, self.chain.ops.len(), false, &Own::default(), scratch);
                    let x = &scratch.x[..self.block_len(&at)];
                    if let Some(dst) = dst {
                        // SAFETY: dst is writable at every row and position, and no other unit has
                        // these.
                        unsafe { dst.store(self.isa, &at, x, Accumulate::Set) };
                    }
                    let first = all.len();
                    all.resize(first + x.len().div_ceil(8), 0);
                    lanes::pack_bits(self.isa, lo, hi, x, &mut all[first..]);
                }
                all
            })
        });
        of_units.concat()
    }

    /// The chain as a batch norm and the bounds of a clip behind it, if that is what it is.
    fn fused(&self) -> Option<(&Linear, Option<[f32; 2]>)> {
        let (Op::Linear(linear), rest) = self.chain.ops.split_first()? else { return None };
        linear.batch?;
        let clip = match rest {
            [] => None,
            [Op::Activation(activation)] => Some(match *activation {
                Activation::Relu => [0.0, f32::INFINITY],
                Activation::Relu6 => [0.0, 6.0],
                Activation::Clip { lo, hi } => [lo, hi],
                _ => return None,
            }),
            _ => return None,
        };
        self.input.is_direct(self.axis).then_some((linear, clip))
    }

    /// [`store`](Self::store) for a [fused](Self::fused) chain and a direct dst.
    fn store_fused(
        &self,
        unit: usize,
        own: &Own,
        (linear, clip): (&Linear, Option<[f32; 2]>),
        dst: &View<'_>,
    ) {
        let clip = clip.unwrap_or([f32::NEG_INFINITY, f32::INFINITY]);
        for at in self.blocks(unit) {
            let per = self.linear(linear, &at, own);
            self.input.pieces(&at, |x, begin, count| {
                dst.pieces(&at, |to, first, len| {
                    let (start, end) = (begin.max(first), (begin + count).min(first + len));
                    if start < end {
                        let (x, to) =
                            (x.wrapping_add(start - begin), to.wrapping_add(start - first));
                        // SAFETY: parts of the block in both tensors; no other unit has it.
                        unsafe { fused::forward(self.isa, per, clip, x, to, end - start) };
                    }
                });
            });
        }
    }

    /// [`unit`](Self::unit) for a [fused](Self::fused) chain and direct gradients: the sums of its
    /// batch norm, or the gradient by the input.
    fn unit_fused(
        &self,
        unit: usize,
        (linear, clip): (&Linear, Option<[f32; 2]>),
        sums: Option<&mut [Vec<f64>; 2]>,
        coefficients: &Coefficients,
        own: &Own,
        tensors: &Backward<'_>,
    ) {
        let isa = self.isa;
        let mut sums = sums;
        with_scratch(|scratch| {
            let [ones, products, _] = scratch.moments.each_mut().map(|b| slot(b, self.rows()));
            for at in self.blocks(unit) {
                let params = self.linear(linear, &at, own);
                let all = match (params, at.row) {
                    (Per::One([hi, scale, shift]), Some(row)) => {
                        let [a, b, c] = match (own.combine, sums.is_some()) {
                            (Some(values), _) => values,
                            (None, true) => [0.0; 3],
                            (None, false) => [0, 1, 2].map(|j| coefficients.rows[j][row]),
                        };
                        Per::One([hi, scale, shift, a, b, c])
                    }
                    (Per::Each([hi, scale, shift]), _) => {
                        let [a, b, c] = match sums.is_some() {
                            true => [hi; 3],
                            false => coefficients.rows.each_ref().map(|values| &values[..]),
                        };
                        Per::Each([hi, scale, shift, a, b, c])
                    }
                    _ => unreachable!("a row has one value of each"),
                };
                ones.fill(0.0);
                products.fill(0.0);
                self.input.pieces(&at, |x, begin, count| {
                    tensors.d_dst.pieces(&at, |d, first, len| {
                        let (start, end) = (begin.max(first), (begin + count).min(first + len));
                        if start >= end {
                            return;
                        }
                        let len = end - start;
                        let (x, d) = (x.wrapping_add(start - begin), d.wrapping_add(start - first));
                        // SAFETY: parts of the block in both tensors; the input is what its
                        // gradient replaces, and no other unit has it.
                        unsafe {
                            match (&mut sums, params) {
                                (None, _) => fused::backward(isa, all, clip, x, d, x, len),
                                (Some(sums), Per::One(per)) => {
                                    let mut of_piece = [0.0; 2];
                                    fused::sums_of_row(isa, per, clip, x, d, len, &mut of_piece);
                                    sums[0][0] += of_piece[0];
                                    sums[1][0] += of_piece[1];
                                }
                                (Some(_), Per::Each(per)) => {
                                    let to = [&mut *ones, &mut *products];
                                    fused::sums_of_lines(isa, per, clip, x, d, len, to);
                                }
                            }
                        }
                    });
                });
                if let (Some(sums), None) = (&mut sums, at.row) {
                    for (to, from) in sums.iter_mut().zip([&*ones, &*products]) {
                        to.iter_mut().zip(from).for_each(|(to, &x)| *to += f64::from(x));
                    }
                }
            }
        });
    }

    fn block_len(&self, at: &At) -> usize {
        at.positions.len() * if at.row.is_some() { 1 } else { self.rows() }
    }

    /// The moments of a barrier's input.
    fn find(&self, unit: usize, barrier: usize) -> Found {
        let over_channels = matches!(self.chain.ops[barrier], Op::Linear(_));
        // Contiguous values that nothing happens to before are used where they are.
        let direct = barrier == 0 && self.input_is_contiguous;
        with_scratch(|scratch| {
            let mut lines = LineMoments::new(match self.axis {
                Axis::Lanes if over_channels => self.rows(),
                _ => 0,
            });
            let mut all = Moments::default();
            for at in self.blocks(unit) {
                let len = self.block_len(&at);
                if !direct {
                    self.replay(&at, barrier, false, &Own::default(), scratch);
                }
                let Scratch { x, moments, .. } = &mut *scratch;
                let mut x = x.get(..len).unwrap_or_default();
                if direct {
                    let mut there = std::ptr::null();
                    self.input.pieces(&at, |values, _, _| there = values.cast_const());
                    // SAFETY: a block of the input, which nobody writes to meanwhile.
                    x = unsafe { std::slice::from_raw_parts(there, len) };
                }
                if self.axis == Axis::Lanes && over_channels {
                    let [means, rests, deviations] =
                        moments.each_mut().map(|buffer| slot(buffer, self.rows()));
                    lanes::moments(self.isa, x, [means, rests, deviations]);
                    lines.merge(at.positions.len(), [means, rests, deviations]);
                } else {
                    all = all.merge(Moments::of(self.isa, x));
                }
            }
            match (self.axis, over_channels) {
                (Axis::Rows, _) => Found::Row(all),
                (Axis::Lanes, true) => Found::Lines(lines),
                (Axis::Lanes, false) => Found::Sample(all),
            }
        })
    }

    /// Runs the chain forward: statistics of its barriers, then `dst` if there is one. The batch's
    /// moments, where it has a batch norm.
    pub(super) fn forward(
        &mut self,
        dst: Option<(&View<'_>, Accumulate)>,
    ) -> crate::Result<Vec<Moments>> {
        let mut of_batch = Vec::new();
        let barriers = self.chain.barriers();
        let alone = self.axis == Axis::Rows && self.reduce.is_none() && barriers.len() == 1;
        if alone {
            let barrier = barriers[0];
            let (index, batch) = self.chain.batch_norm().expect("layer norms take lines");
            debug_assert_eq!(index, barrier);
            let found = self.each(|row| {
                let Found::Row(moments) = self.find(row, barrier) else { unreachable!("a row") };
                if let Some(dst) = dst {
                    let own = Own {
                        linear: Some(self.settled(row, barrier, &moments, batch.eps)),
                        combine: None,
                    };
                    self.store(row, &own, dst);
                }
                moments
            });
            self.settle_batch(barrier, batch.eps, &found);
            return Ok(found);
        }
        for barrier in barriers {
            let found = self.each(|unit| self.find(unit, barrier));
            match &self.chain.ops[barrier] {
                Op::Linear(linear) => {
                    let batch = linear.batch.expect("it is a barrier");
                    let mut moments = merge(found, self.rows());
                    if let Some(reduce) = self.reduce {
                        reduce_moments(&mut moments, reduce)?;
                    }
                    self.settle_batch(barrier, batch.eps, &moments);
                    of_batch = moments;
                }
                Op::LayerNorm { .. } => self.settle_samples(barrier, found),
                _ => unreachable!("no barrier"),
            }
        }
        if let Some(dst) = dst {
            self.each(|unit| self.store(unit, &Own::default(), dst));
        }
        Ok(of_batch)
    }

    fn settled(&self, row: usize, barrier: usize, moments: &Moments, eps: f32) -> [f32; 3] {
        let Op::Linear(linear) = &self.chain.ops[barrier] else { unreachable!("a batch norm") };
        let mut one = Linear {
            hi: vec![0.0],
            lo: vec![0.0],
            inv: vec![0.0],
            gamma: vec![linear.gamma[row]],
            beta: vec![linear.beta[row]],
            scale: vec![0.0],
            shift: vec![0.0],
            batch: None,
            names: [None; 2],
        };
        one.settle(0, moments.mean, inverse(moments, eps));
        [one.hi[0], one.scale[0], one.shift[0]]
    }

    fn settle_batch(&mut self, barrier: usize, eps: f32, moments: &[Moments]) {
        let Op::Linear(linear) = &mut self.chain.ops[barrier] else { return };
        for (row, moments) in moments.iter().enumerate() {
            linear.settle(row, moments.mean, inverse(moments, eps));
        }
    }

    fn store(&self, unit: usize, own: &Own, (dst, accumulate): (&View<'_>, Accumulate)) {
        if let Some(fused) = self.fused()
            && dst.is_direct(self.axis)
            && accumulate == Accumulate::Set
        {
            return self.store_fused(unit, own, fused, dst);
        }
        with_scratch(|scratch| {
            for at in self.blocks(unit) {
                self.replay(&at, self.chain.ops.len(), false, own, scratch);
                // SAFETY: dst is writable at every row and position, and no other unit has these.
                unsafe { dst.store(self.isa, &at, &scratch.x[..self.block_len(&at)], accumulate) };
            }
        });
    }

    /// Finds the statistics of layer norms again, which are not kept; a batch norm's are settled.
    pub(super) fn statistics_again(&mut self) -> crate::Result<()> {
        let Some(barrier) = self
            .chain
            .barriers()
            .into_iter()
            .find(|&i| matches!(self.chain.ops[i], Op::LayerNorm { .. }))
        else {
            return Ok(());
        };
        let found = self.each(|unit| self.find(unit, barrier));
        self.settle_samples(barrier, found);
        Ok(())
    }

    fn settle_samples(&mut self, barrier: usize, found: Vec<Found>) {
        let Op::LayerNorm { eps, .. } = self.chain.ops[barrier] else { return };
        let of_sample = |found: Found| match found {
            Found::Sample(moments) => [moments.mean, inverse(&moments, eps)],
            _ => unreachable!("units are samples"),
        };
        self.of_samples = found.into_iter().map(of_sample).collect();
    }

    /// The chain's result at some positions, in lines of all rows.
    pub(super) fn result(&self, positions: Range<usize>, out: &mut [f32]) {
        with_scratch(|scratch| {
            let mut next = positions.start;
            while next < positions.end {
                // A gate is one sample's.
                let end = match self.chain.by_sample() {
                    true => (next / self.positions + 1) * self.positions,
                    false => positions.end,
                };
                let at = At { row: None, positions: next..end.min(positions.end) };
                self.replay(&at, self.chain.ops.len(), false, &Own::default(), scratch);
                let len = self.block_len(&at);
                let first = (next - positions.start) * self.rows();
                out[first..first + len].copy_from_slice(&scratch.x[..len]);
                next = at.positions.end;
            }
        });
    }

    /// Runs the chain backward, whose statistics are settled.
    pub(super) fn backward(&self, tensors: &Backward<'_>) -> crate::Result<Sum> {
        let count = self.total() as f64;
        let mut coefficients = Coefficients::default();
        let mut barriers = self.chain.barriers();
        let mut sum =
            Sum { ops: vec![[const { Vec::new() }; 2]; self.chain.ops.len()], gate: Vec::new() };
        let alone = self.axis == Axis::Rows && self.reduce.is_none() && barriers.len() == 1;
        if alone {
            let (barrier, ops) = (barriers[0], self.chain.ops.len());
            let found = self.each(|row| {
                let none = Own::default();
                let mut first =
                    self.unit(row, barrier..ops, Some(barrier), &coefficients, &none, tensors);
                let own = Own {
                    linear: None,
                    combine: Some(self.combined(
                        row,
                        barrier,
                        [first.ops[barrier][0][0], first.ops[barrier][1][0]],
                        count,
                    )),
                };
                let second = self.unit(row, 0..barrier, None, &coefficients, &own, tensors);
                for (i, sums) in second.ops.into_iter().enumerate().take(barrier) {
                    first.ops[i] = sums;
                }
                if !second.gate.is_empty() {
                    first.gate = second.gate;
                }
                first
            });
            self.gather(found, 0..ops, &mut sum);
            return Ok(sum);
        }
        let mut high = self.chain.ops.len();
        while let Some(barrier) = barriers.pop() {
            let none = Own::default();
            let found = self.each(|unit| {
                self.unit(unit, barrier..high, Some(barrier), &coefficients, &none, tensors)
            });
            let samples: Vec<[f64; 2]> = found.iter().map(|unit| unit.sample).collect();
            self.gather(found, barrier..high, &mut sum);
            match &self.chain.ops[barrier] {
                Op::Linear(_) => {
                    let mut sums: Vec<f64> = sum.ops[barrier].concat();
                    let mut count = [count];
                    if let Some(reduce) = self.reduce {
                        reduce(&mut sums)?;
                        reduce(&mut count)?;
                    }
                    let rows = self.rows();
                    coefficients.rows = std::array::from_fn(|_| Vec::with_capacity(rows));
                    for row in 0..rows {
                        let of_row =
                            self.combined(row, barrier, [sums[row], sums[rows + row]], count[0]);
                        for (to, x) in coefficients.rows.iter_mut().zip(of_row) {
                            to.push(x);
                        }
                    }
                }
                _ => {
                    let count = (self.positions * self.rows()) as f64;
                    coefficients.samples =
                        samples.iter().map(|sums| sums.map(|sum| sum / count)).collect();
                }
            }
            high = barrier;
        }
        let none = Own::default();
        let found = self.each(|unit| self.unit(unit, 0..high, None, &coefficients, &none, tensors));
        self.gather(found, 0..high, &mut sum);
        Ok(sum)
    }

    /// `[a, b, c]` of a batch norm's gradient `d * a + (x - hi) * b + c` in a row.
    fn combined(&self, row: usize, barrier: usize, sums: [f64; 2], count: f64) -> [f32; 3] {
        let Op::Linear(linear) = &self.chain.ops[barrier] else { unreachable!("a batch norm") };
        let [lo, inv] = [&linear.lo, &linear.inv].map(|values| f64::from(values[row]));
        let a = f64::from(linear.scale[row]);
        let along = (sums[1] - lo * sums[0]) * inv / count;
        let b = -a * along * inv;
        let c = -a * sums[0] / count - b * lo;
        [a as f32, b as f32, c as f32]
    }

    /// Merges what units have summed up for a range of ops.
    fn gather(&self, found: Vec<UnitSums>, ops: Range<usize>, sum: &mut Sum) {
        for i in ops {
            for which in 0..2 {
                let of_unit = found.iter().map(|unit| &unit.ops[i][which]);
                let to = &mut sum.ops[i][which];
                match self.axis {
                    Axis::Rows => to.extend(of_unit.flatten()),
                    Axis::Lanes => {
                        to.resize(self.rows(), 0.0);
                        for values in of_unit {
                            to.iter_mut().zip(values).for_each(|(to, x)| *to += x);
                        }
                    }
                }
            }
        }
        // A row's gates of all samples, or a sample's of all rows.
        if found.iter().any(|unit| !unit.gate.is_empty()) {
            sum.gate = match self.axis {
                Axis::Lanes => found.into_iter().flat_map(|unit| unit.gate).collect(),
                Axis::Rows => (0..self.samples)
                    .flat_map(|sample| found.iter().map(move |unit| unit.gate[sample]))
                    .collect(),
            };
        }
    }

    /// One unit of a backward pass: sums of the ops in `range`; it ends before a barrier, whose
    /// sums it takes, or with the gradient by the input.
    fn unit(
        &self,
        unit: usize,
        range: Range<usize>,
        barrier: Option<usize>,
        coefficients: &Coefficients,
        own: &Own,
        tensors: &Backward<'_>,
    ) -> UnitSums {
        let isa = self.isa;
        let per_op = if self.axis == Axis::Rows { 1 } else { self.rows() };
        let mut sums = UnitSums {
            ops: vec![[const { Vec::new() }; 2]; self.chain.ops.len()],
            gate: Vec::new(),
            sample: [0.0; 2],
        };
        for i in range.clone() {
            if !matches!(self.chain.ops[i], Op::Activation(_) | Op::Residual | Op::Gate) {
                sums.ops[i] = [vec![0.0; per_op], vec![0.0; per_op]];
            }
            if let (Op::Gate, Axis::Rows) = (&self.chain.ops[i], self.axis) {
                sums.gate = vec![0.0; self.samples];
            }
            if let (Op::Gate, Axis::Lanes) = (&self.chain.ops[i], self.axis) {
                sums.gate = vec![0.0; self.rows()];
            }
        }
        if let Some(fused) = self.fused()
            && self.input_is_contiguous
            && matches!(tensors.kept, Kept::Input)
            && tensors.d_dst.is_direct(self.axis)
            && tensors.in_place
        {
            let to = barrier.map(|_| &mut sums.ops[0]);
            self.unit_fused(unit, fused, to, coefficients, own, tensors);
            return sums;
        }
        with_scratch(|scratch| {
            for at in self.blocks(unit) {
                let len = self.block_len(&at);
                if let Kept::Input = tensors.kept {
                    self.replay(&at, self.chain.ops.len(), true, own, scratch);
                }
                let Scratch { d, spare, saved, inverse, gate, .. } = &mut *scratch;
                let d = slot(d, len);
                // SAFETY: d_dst is readable at every row and position.
                unsafe { tensors.d_dst.load(isa, &at, d) };
                if let Kept::Bits(bits, alpha) = tensors.kept {
                    lanes::apply_bits(isa, alpha, &bits[self.bits(&at)], d);
                }
                let last = barrier.unwrap_or(0);
                for i in (last..self.chain.ops.len()).rev() {
                    let counted = range.contains(&i);
                    let x = saved.get(i).map_or(&[][..], |x| x.get(..len).unwrap_or(&[]));
                    match &self.chain.ops[i] {
                        Op::Linear(linear) => {
                            if counted {
                                add_sums(isa, self.hi(linear, &at, own), x, d, &mut sums.ops[i]);
                            }
                            if barrier == Some(i) {
                                continue;
                            }
                            if linear.batch.is_some() {
                                let per = match at.row {
                                    Some(row) => {
                                        let [a, b, c] = own.combine.unwrap_or_else(|| {
                                            [0, 1, 2].map(|j| coefficients.rows[j][row])
                                        });
                                        Per::One([linear.hi[row], a, b, c])
                                    }
                                    None => {
                                        let [a, b, c] = &coefficients.rows;
                                        Per::Each([&linear.hi, a, b, c])
                                    }
                                };
                                lanes::combine(isa, per, x, d);
                            } else if linear.names[0].is_some() || linear.names[1].is_none() {
                                let per = match at.row {
                                    Some(row) => Per::One([linear.scale[row]]),
                                    None => Per::Each([&linear.scale[..]]),
                                };
                                lanes::scale(isa, per, d);
                            }
                        }
                        Op::Activation(_) if !matches!(tensors.kept, Kept::Input) => {}
                        Op::Activation(activation) => {
                            lanes::activation_slope(isa, *activation, x, d);
                        }
                        Op::PRelu { slope } => {
                            if counted {
                                let negative = slot(spare, len);
                                negative.copy_from_slice(x);
                                lanes::keep_negative(isa, negative);
                                self.add_plain(&at, negative, d, &mut sums.ops[i]);
                            }
                            let per = match at.row {
                                Some(row) => Per::One([slope[row]]),
                                None => Per::Each([&slope[..]]),
                            };
                            lanes::prelu_slope(isa, per, x, d);
                        }
                        Op::Residual => {
                            if let Some(d_residual) =
                                tensors.d_residual.as_ref().filter(|_| counted)
                            {
                                // SAFETY: writable at every row and position, and no other unit
                                // has these.
                                unsafe { d_residual.store(isa, &at, d, tensors.accumulate[1]) };
                            }
                        }
                        Op::Gate => {
                            if counted {
                                let mut of_block = [vec![0.0; per_op], vec![0.0; per_op]];
                                self.add_plain(&at, x, d, &mut of_block);
                                let first = if at.row.is_some() { self.sample(&at) } else { 0 };
                                let to = sums.gate[first..].iter_mut();
                                to.zip(&of_block[1]).for_each(|(to, x)| *to += x);
                            }
                            lanes::scale(isa, self.gates(&at, gate), d);
                        }
                        Op::LayerNorm { over, affine, .. } => {
                            if counted {
                                self.add_plain(&at, x, d, &mut sums.ops[i]);
                            }
                            if let Some((gamma, _)) = affine {
                                lanes::scale(isa, Per::Each([&gamma[..]]), d);
                            }
                            if barrier == Some(i) {
                                let zero = Per::One([0.0]);
                                lanes::sums(isa, zero, x, d, Sums::One(&mut sums.sample));
                                continue;
                            }
                            let lines = d.chunks_exact_mut(self.rows());
                            let lines = lines.zip(x.chunks_exact(self.rows())).zip(&*inverse);
                            for ((d, x), &inv) in lines {
                                let [mean, along] = match over {
                                    NormOver::All => coefficients.samples[self.sample(&at)],
                                    NormOver::Channels => {
                                        let mut sums = [0.0; 2];
                                        let zero = Per::One([0.0]);
                                        lanes::sums(isa, zero, x, d, Sums::One(&mut sums));
                                        sums.map(|sum| sum / self.rows() as f64)
                                    }
                                };
                                // Not `d * inv - mean * inv`, which cancels less exactly.
                                let [mean, along] = [mean, along].map(|m| -(m as f32));
                                lanes::combine(isa, Per::One([0.0, 1.0, along, mean]), x, d);
                                lanes::scale(isa, Per::One([inv]), d);
                            }
                        }
                    }
                }
                if barrier.is_none() {
                    // SAFETY: writable at every row and position, and no other unit has these.
                    unsafe { tensors.d_input.store(isa, &at, d, tensors.accumulate[0]) };
                }
            }
        });
        sums
    }

    /// Sums of `d` and `d x` per row.
    fn add_plain(&self, at: &At, x: &[f32], d: &[f32], sums: &mut [Vec<f64>; 2]) {
        if at.row.is_some() {
            return add_sums(self.isa, Per::One([0.0]), x, d, sums);
        }
        let zeros = vec![0.0; self.rows()];
        add_sums(self.isa, Per::Each([&zeros]), x, d, sums);
    }
}

fn add_sums(isa: Supported, hi: Per<'_, 1>, x: &[f32], d: &[f32], sums: &mut [Vec<f64>; 2]) {
    // An op without values of its own to multiply with (a bias) sums d twice.
    let x = if x.is_empty() { d } else { x };
    let [ones, products] = sums;
    match hi {
        Per::One(_) => {
            let mut of_block = [0.0; 2];
            lanes::sums(isa, hi, x, d, Sums::One(&mut of_block));
            ones[0] += of_block[0];
            products[0] += of_block[1];
        }
        Per::Each(_) => lanes::sums(isa, hi, x, d, Sums::Each([ones, products])),
    }
}

fn inverse(moments: &Moments, eps: f32) -> f64 {
    1.0 / (moments.deviations / moments.count + f64::from(eps)).sqrt()
}

/// Of each row, from what the units have found.
fn merge(found: Vec<Found>, rows: usize) -> Vec<Moments> {
    let mut all = vec![Moments::default(); rows];
    for (unit, found) in found.into_iter().enumerate() {
        match found {
            Found::Row(moments) => all[unit] = moments,
            Found::Lines(lines) => {
                for (row, all) in all.iter_mut().enumerate() {
                    *all = all.merge(lines.of(row));
                }
            }
            Found::Sample(_) => unreachable!("a batch norm's are per row"),
        }
    }
    all
}
