//! A chain over the positions of its input, block by block: what its passes, [`forward`] and
//! [`backward`], share.
//!
//! A block is cut along the tensor's memory: a run of one row's positions ([`Axis::Rows`]), or
//! lines of all rows ([`Axis::Lanes`]). Units of work are the rows, or ranges of positions that
//! depend on the problem alone, and what they sum up is merged in their order: results do not
//! depend on the number of threads.

mod backward;
mod forward;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;

use crate::cpu::isa::Supported;
use crate::cpu::runs;
use crate::cpu::threads::{self, CpuDevice};
use crate::cpu::train::lanes::{self, Per};
use crate::cpu::train::view::{At, View};
use crate::dtype::{DType, Element, bf16, f16};
use crate::moments::Moments;
use crate::problem::Operand;
use crate::stages::{Activation, NormOver};
use crate::train::chain::{Chain, Linear, Op};
use crate::train::reduce::Reduce;

pub(super) use backward::{Backward, Kept};

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

/// What a unit of rows knows of its own row before all rows are known.
#[derive(Clone, Copy, Default)]
struct Own {
    linear: Option<[f32; 3]>,
    combine: Option<[f32; 3]>,
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

    fn block_len(&self, at: &At) -> usize {
        at.positions.len() * if at.row.is_some() { 1 } else { self.rows() }
    }
}
