//! Tensors as rows at all positions of all samples: blocks of them to and from memory in a row.

use std::ops::Range;

use crate::cpu::isa::Supported;
use crate::cpu::runs;
use crate::cpu::train::sweep::Axis;
use crate::problem::{Operand, Positions};
use crate::train::Accumulate;

/// A tensor's rows at all positions of all samples. Rows may come from several tensors.
#[derive(Clone)]
pub(super) struct View<'a> {
    pub parts: Vec<Part>,
    /// The channel of each row.
    pub map: Option<&'a [u32]>,
}

/// Rows of a [`View`] that one tensor has.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub ptr: *mut f32,
    pub channel: isize,
    pub rows: usize,
    pub walk: Positions,
}

// SAFETY: a view is of tensors that the caller of a pass has borrowed; units use disjoint parts of
// those that are written.
unsafe impl Sync for View<'_> {}
// SAFETY: as above.
unsafe impl Send for View<'_> {}

impl<'a> View<'a> {
    /// One tensor, walked by a call's positions over all samples.
    pub(super) fn new(operand: &Operand, walk: Positions, map: Option<&'a [u32]>) -> Self {
        let part = Part {
            ptr: operand.ptr.cast_mut(),
            channel: operand.channel,
            rows: operand.channels,
            walk,
        };
        View { parts: vec![part], map }
    }

    /// Contiguous values, in the order that blocks are cut along.
    pub(super) fn contiguous(ptr: *mut f32, axis: Axis, rows: usize, positions: usize) -> Self {
        let (channel, position) = match axis {
            Axis::Rows => (positions as isize, 1),
            Axis::Lanes => (1, rows as isize),
        };
        let walk = Positions::new(&[(positions, position)]);
        View { parts: vec![Part { ptr, channel, rows, walk }], map: None }
    }

    pub(super) fn channel(&self, row: usize) -> isize {
        self.map.map_or(row, |map| map[row] as usize) as isize
    }

    /// Copies a block out of the tensor.
    ///
    /// # Safety
    /// The tensors are readable at every row and position.
    pub(super) unsafe fn load(&self, isa: Supported, at: &At, out: &mut [f32]) {
        let positions = at.positions.clone();
        // SAFETY: the caller's promise.
        unsafe {
            match at.row {
                Some(row) => {
                    let (part, first) = self.part(row);
                    let from = part.ptr.offset(self.channel(row - first) * part.channel);
                    let mut out = out;
                    for (offset, stride, len) in part.walk.runs(positions.start, positions.len()) {
                        let (now, later) = out.split_at_mut(len);
                        let from = from.offset(offset);
                        match stride {
                            1 => from.copy_to_nonoverlapping(now.as_mut_ptr(), len),
                            _ => (0..len as isize)
                                .zip(now)
                                .for_each(|(i, x)| *x = *from.offset(i * stride)),
                        }
                        out = later;
                    }
                }
                None => self.load_lines(isa, 0..self.rows(), positions, self.rows(), out),
            }
        }
    }

    /// Copies some rows at some positions to lines of these rows, `line` apart.
    ///
    /// # Safety
    /// The tensors are readable at these rows and positions.
    pub(super) unsafe fn load_lines(
        &self,
        isa: Supported,
        rows: Range<usize>,
        positions: Range<usize>,
        line: usize,
        out: &mut [f32],
    ) {
        let mut before = 0;
        for part in &self.parts {
            let lo = rows.start.max(before) - before;
            let hi = rows.end.clamp(before, before + part.rows) - before;
            let first = (before + lo).wrapping_sub(rows.start);
            before += part.rows;
            if lo >= hi {
                continue;
            }
            let runs = |from: usize, len: usize| part.walk.runs(positions.start + from, len);
            let adjoining = runs(0, 1).next().is_some_and(|(_, stride, _)| stride == 1);
            // SAFETY: the caller's promise.
            unsafe {
                if part.channel == 1 && self.map.is_none() {
                    let mut lines = out[first..].chunks_mut(line);
                    for (offset, stride, len) in runs(0, positions.len()) {
                        let from = part.ptr.offset(offset).add(lo);
                        for (i, to) in lines.by_ref().take(len).enumerate() {
                            let from = from.offset(i as isize * stride);
                            from.copy_to_nonoverlapping(to[..hi - lo].as_mut_ptr(), hi - lo);
                        }
                    }
                } else if adjoining && part.channel > 0 && self.map.is_none() {
                    let (channel, mut q) = (part.channel as usize, 0);
                    for (offset, _, len) in runs(0, positions.len()) {
                        let from = part.ptr.offset(offset + lo as isize * part.channel);
                        let to = &mut out[q * line + first..];
                        runs::turn(isa, from, channel, hi - lo, len, line, to);
                        q += len;
                    }
                } else {
                    // Made contiguous first: lines are far apart, and written in whole vectors.
                    const ROWS: usize = 16;
                    const POSITIONS: usize = 64;
                    let mut block = [[0.0f32; POSITIONS]; ROWS];
                    for q in (0..positions.len()).step_by(POSITIONS) {
                        let count = POSITIONS.min(positions.len() - q);
                        for low in (lo..hi).step_by(ROWS) {
                            let high = hi.min(low + ROWS);
                            for (row, values) in (low..high).zip(&mut block) {
                                let from = part.ptr.offset(self.channel(row) * part.channel);
                                let mut values = values.iter_mut();
                                for (offset, stride, len) in runs(q, count) {
                                    let from = from.offset(offset);
                                    for (i, x) in values.by_ref().take(len).enumerate() {
                                        *x = *from.offset(i as isize * stride);
                                    }
                                }
                            }
                            let to = &mut out[q * line + first + low - lo..];
                            let from = block.as_ptr().cast();
                            runs::turn(isa, from, POSITIONS, high - low, count, line, to);
                        }
                    }
                }
            }
        }
    }

    /// Copies a block into the tensor, or adds it.
    ///
    /// # Safety
    /// The tensors are writable at every row and position, and nobody else uses those of the block.
    pub(super) unsafe fn store(&self, at: &At, values: &[f32], accumulate: Accumulate) {
        let add = accumulate == Accumulate::Add;
        let positions = at.positions.clone();
        let put = |to: *mut f32, x: f32| {
            // SAFETY: the caller's promise.
            unsafe { *to = if add { *to + x } else { x } }
        };
        // SAFETY: the caller's promise.
        unsafe {
            match at.row {
                Some(row) => {
                    let (part, first) = self.part(row);
                    let to = part.ptr.offset(self.channel(row - first) * part.channel);
                    let mut values = values;
                    for (offset, stride, len) in part.walk.runs(positions.start, positions.len()) {
                        let (now, later) = values.split_at(len);
                        let to = to.offset(offset);
                        match stride {
                            1 if !add => to.copy_from_nonoverlapping(now.as_ptr(), len),
                            _ => (0..len as isize)
                                .zip(now)
                                .for_each(|(i, &x)| put(to.offset(i * stride), x)),
                        }
                        values = later;
                    }
                }
                None => {
                    let line = self.rows();
                    let mut first = 0;
                    for part in &self.parts {
                        let mut q = 0;
                        for (offset, stride, len) in
                            part.walk.runs(positions.start, positions.len())
                        {
                            for i in 0..len {
                                let values = &values[(q + i) * line + first..][..part.rows];
                                let to = part.ptr.offset(offset + i as isize * stride);
                                if part.channel == 1 && self.map.is_none() && !add {
                                    to.copy_from_nonoverlapping(values.as_ptr(), part.rows);
                                } else {
                                    for (row, &x) in values.iter().enumerate() {
                                        put(to.offset(self.channel(row) * part.channel), x);
                                    }
                                }
                            }
                            q += len;
                        }
                        first += part.rows;
                    }
                }
            }
        }
    }

    /// Whether blocks of it can be used where they are.
    pub(super) fn is_direct(&self, axis: Axis) -> bool {
        let [part] = &self.parts[..] else { return false };
        self.map.is_none()
            && match axis {
                Axis::Rows => part.walk.runs(0, 1).next().is_some_and(|(_, stride, _)| stride == 1),
                Axis::Lanes => part.channel == 1,
            }
    }

    /// Calls `f(values, first, len)` for each part of a block of a direct view that is contiguous:
    /// `len` values from `first` on, counted as in a copy of the block.
    pub(super) fn pieces(&self, at: &At, mut f: impl FnMut(*mut f32, usize, usize)) {
        let [part] = &self.parts[..] else { unreachable!("a direct view") };
        let positions = at.positions.clone();
        let runs = part.walk.runs(positions.start, positions.len());
        let mut first = 0;
        match at.row {
            Some(row) => {
                let from = part.ptr.wrapping_offset(row as isize * part.channel);
                for (offset, _, len) in runs {
                    f(from.wrapping_offset(offset), first, len);
                    first += len;
                }
            }
            None => {
                for (offset, stride, len) in runs {
                    let from = part.ptr.wrapping_offset(offset);
                    if stride == part.rows as isize {
                        f(from, first, len * part.rows);
                        first += len * part.rows;
                        continue;
                    }
                    for i in 0..len as isize {
                        f(from.wrapping_offset(i * stride), first, part.rows);
                        first += part.rows;
                    }
                }
            }
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// The tensor that has a row, and its first row. A mapped view has one tensor.
    pub(super) fn part(&self, row: usize) -> (&Part, usize) {
        let mut first = 0;
        for part in &self.parts {
            if row < first + part.rows {
                return (part, first);
            }
            first += part.rows;
        }
        unreachable!("a row of the view")
    }
}

/// A block: one row's positions, or all rows' if there is none.
#[derive(Clone, Debug)]
pub(super) struct At {
    pub row: Option<usize>,
    pub positions: Range<usize>,
}
