//! The backward pass: sums of the chain's ops, and the gradient by its input.

use std::ops::Range;

use super::{Axis, Own, Scratch, Sweep, slot, with_scratch};
use crate::cpu::isa::Supported;
use crate::cpu::train::fused;
use crate::cpu::train::lanes::{self, Per, Sums};
use crate::cpu::train::view::{At, View};
use crate::stages::NormOver;
use crate::train::Accumulate;
use crate::train::chain::{Linear, Op};

/// What a backward pass reads and writes beside the input.
pub(in crate::cpu::train) struct Backward<'a> {
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
pub(in crate::cpu::train) enum Kept<'a> {
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
pub(in crate::cpu::train) struct Sum {
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

/// What a unit has summed up: two per op, each of one row or of all; the gate's; a sample's.
struct UnitSums {
    ops: Vec<[Vec<f64>; 2]>,
    gate: Vec<f64>,
    sample: [f64; 2],
}

impl Sweep<'_> {
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

    /// Runs the chain backward, whose statistics are settled.
    pub(in crate::cpu::train) fn backward(&self, tensors: &Backward<'_>) -> crate::Result<Sum> {
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
