//! The forward pass: statistics of the chain's barriers, then its result.

use std::ops::Range;

use super::{Axis, Own, Scratch, Sweep, slot, with_scratch};
use crate::cpu::train::fused;
use crate::cpu::train::lanes::{self, LineMoments};
use crate::cpu::train::view::{At, View};
use crate::moments::Moments;
use crate::train::Accumulate;
use crate::train::chain::{Linear, Op, reduce_moments};

/// What a unit has found out.
enum Found {
    Row(Moments),
    Lines(LineMoments),
    Sample(Moments),
}

impl Sweep<'_> {
    /// Packs where the chain's result lies between two bounds; puts the result to `dst`, if there is
    /// one.
    pub(in crate::cpu::train) fn keep_bits(
        &self,
        dst: Option<&View<'_>>,
        [lo, hi]: [f32; 2],
    ) -> Vec<u8> {
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
    pub(in crate::cpu::train) fn forward(
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
    pub(in crate::cpu::train) fn statistics_again(&mut self) -> crate::Result<()> {
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
    pub(in crate::cpu::train) fn result(&self, positions: Range<usize>, out: &mut [f32]) {
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
