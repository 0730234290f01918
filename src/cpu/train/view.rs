//! Tensors as rows at all positions of all samples: blocks of them to and from memory in a row, which
//! holds f32 whatever the tensors do.

use std::ops::Range;

use crate::cpu::isa::Supported;
use crate::cpu::runs;
use crate::cpu::train::sweep::Axis;
use crate::dtype::{DType, Element, bf16, f16};
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
    /// Elements of this type.
    ptr: *mut (),
    dtype: DType,
    /// Distances are in elements.
    pub channel: isize,
    pub rows: usize,
    pub walk: Positions,
}

/// Evaluates an expression with a part's pointer as one to its elements.
macro_rules! typed {
    ($part:expr, |$ptr:ident| $body:expr) => {
        match $part.dtype {
            DType::F32 => {
                let $ptr = $part.ptr.cast::<f32>();
                $body
            }
            DType::F16 => {
                let $ptr = $part.ptr.cast::<f16>();
                $body
            }
            DType::Bf16 => {
                let $ptr = $part.ptr.cast::<bf16>();
                $body
            }
        }
    };
}

impl Part {
    /// A tensor, walked by a call's positions over all samples.
    pub(super) fn new<T: Element>(operand: &Operand<T>, walk: Positions) -> Self {
        Part {
            ptr: operand.ptr.cast_mut().cast(),
            dtype: T::DTYPE,
            channel: operand.channel,
            rows: operand.channels,
            walk,
        }
    }
}

// SAFETY: a view is of tensors that the caller of a pass has borrowed; units use disjoint parts of
// those that are written.
unsafe impl Sync for View<'_> {}
// SAFETY: as above.
unsafe impl Send for View<'_> {}

impl<'a> View<'a> {
    /// One tensor, walked by a call's positions over all samples.
    pub(super) fn new<T: Element>(
        operand: &Operand<T>,
        walk: Positions,
        map: Option<&'a [u32]>,
    ) -> Self {
        View { parts: vec![Part::new(operand, walk)], map }
    }

    /// Contiguous values, in the order that blocks are cut along.
    pub(super) fn contiguous(ptr: *mut f32, axis: Axis, rows: usize, positions: usize) -> Self {
        let (channel, position) = match axis {
            Axis::Rows => (positions as isize, 1),
            Axis::Lanes => (1, rows as isize),
        };
        let walk = Positions::new(&[(positions, position)]);
        let part = Part { ptr: ptr.cast(), dtype: DType::F32, channel, rows, walk };
        View { parts: vec![part], map: None }
    }

    pub(super) fn channel(&self, row: usize) -> isize {
        self.map.map_or(row, |map| map[row] as usize) as isize
    }

    /// Copies a block out of the tensor, widened.
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
                    let channel = self.channel(row - first) * part.channel;
                    typed!(part, |ptr| load_row(isa, ptr.offset(channel), part, &positions, out));
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
                        for (i, to) in lines.by_ref().take(len).enumerate() {
                            let offset = offset + i as isize * stride;
                            let to = &mut to[..hi - lo];
                            typed!(part, |ptr| widen(isa, ptr.offset(offset).add(lo), to));
                        }
                    }
                } else if adjoining
                    && part.channel > 0
                    && self.map.is_none()
                    && part.dtype == DType::F32
                {
                    let (channel, mut q) = (part.channel as usize, 0);
                    for (offset, _, len) in runs(0, positions.len()) {
                        let from = part.ptr.cast::<f32>();
                        let from = from.offset(offset + lo as isize * part.channel);
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
                                let channel = self.channel(row) * part.channel;
                                let first = positions.start + q;
                                let (range, to) = (first..first + count, &mut values[..count]);
                                typed!(part, |ptr| {
                                    load_row(isa, ptr.offset(channel), part, &range, to);
                                });
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

    /// Copies a block into the tensor, or adds it; what is stored is rounded once, to the nearest.
    ///
    /// # Safety
    /// The tensors are writable at every row and position, and nobody else uses those of the block.
    pub(super) unsafe fn store(
        &self,
        isa: Supported,
        at: &At,
        values: &[f32],
        accumulate: Accumulate,
    ) {
        let positions = at.positions.clone();
        // SAFETY: the caller's promise.
        unsafe {
            match at.row {
                Some(row) => {
                    let (part, first) = self.part(row);
                    let channel = self.channel(row - first) * part.channel;
                    let mut values = values;
                    for (offset, stride, len) in part.walk.runs(positions.start, positions.len()) {
                        let (now, later) = values.split_at(len);
                        typed!(part, |ptr| {
                            store_run(isa, now, ptr.offset(channel + offset), stride, accumulate);
                        });
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
                                let offset = offset + i as isize * stride;
                                typed!(part, |ptr| {
                                    let to = ptr.offset(offset);
                                    if self.map.is_none() {
                                        store_run(isa, values, to, part.channel, accumulate);
                                    } else {
                                        for (row, &x) in values.iter().enumerate() {
                                            let to = to.offset(self.channel(row) * part.channel);
                                            put(x, to, accumulate);
                                        }
                                    }
                                });
                            }
                            q += len;
                        }
                        first += part.rows;
                    }
                }
            }
        }
    }

    /// Whether blocks of it can be used where they are: f32, and contiguous.
    pub(super) fn is_direct(&self, axis: Axis) -> bool {
        let [part] = &self.parts[..] else { return false };
        self.map.is_none()
            && part.dtype == DType::F32
            && match axis {
                Axis::Rows => part.walk.runs(0, 1).next().is_some_and(|(_, stride, _)| stride == 1),
                Axis::Lanes => part.channel == 1,
            }
    }

    /// Calls `f(values, first, len)` for each part of a block of a direct view that is contiguous:
    /// `len` values from `first` on, counted as in a copy of the block.
    pub(super) fn pieces(&self, at: &At, mut f: impl FnMut(*mut f32, usize, usize)) {
        let [part] = &self.parts[..] else { unreachable!("a direct view") };
        debug_assert_eq!(part.dtype, DType::F32, "a direct view");
        let ptr = part.ptr.cast::<f32>();
        let positions = at.positions.clone();
        let runs = part.walk.runs(positions.start, positions.len());
        let mut first = 0;
        match at.row {
            Some(row) => {
                let from = ptr.wrapping_offset(row as isize * part.channel);
                for (offset, _, len) in runs {
                    f(from.wrapping_offset(offset), first, len);
                    first += len;
                }
            }
            None => {
                for (offset, stride, len) in runs {
                    let from = ptr.wrapping_offset(offset);
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

/// Widens neighbouring elements.
///
/// # Safety
/// `from` is readable at as many elements as `to` has.
#[inline(always)]
unsafe fn widen<T: Element>(isa: Supported, from: *const T, to: &mut [f32]) {
    // SAFETY: the caller's promise; only one type has each dtype.
    unsafe {
        match T::DTYPE {
            DType::F32 => from.cast::<f32>().copy_to_nonoverlapping(to.as_mut_ptr(), to.len()),
            _ => runs::widen_rows(isa, from, 0, 1, to.len(), 0, to),
        }
    }
}

/// Widens a row at some positions; `from` is its element `[0, …, 0]`.
///
/// # Safety
/// The row is readable at these positions.
#[inline(always)]
unsafe fn load_row<T: Element>(
    isa: Supported,
    from: *const T,
    part: &Part,
    positions: &Range<usize>,
    out: &mut [f32],
) {
    let mut out = out;
    for (offset, stride, len) in part.walk.runs(positions.start, positions.len()) {
        let (now, later) = out.split_at_mut(len);
        // SAFETY: the caller's promise.
        unsafe {
            let from = from.offset(offset);
            match stride {
                1 => widen(isa, from, now),
                _ => (0..len as isize)
                    .zip(now)
                    .for_each(|(i, x)| *x = (*from.offset(i * stride)).to_f32()),
            }
        }
        out = later;
    }
}

/// Stores evenly spaced elements, or adds to them.
///
/// # Safety
/// `to` is writable at as many elements as there are values, `stride` apart, and nobody else uses
/// them.
#[inline(always)]
unsafe fn store_run<T: Element>(
    isa: Supported,
    values: &[f32],
    to: *mut T,
    stride: isize,
    accumulate: Accumulate,
) {
    // SAFETY: the caller's promise; only one type has each dtype.
    unsafe {
        match (stride, accumulate, T::DTYPE) {
            (1, Accumulate::Set, DType::F32) => {
                to.cast::<f32>().copy_from_nonoverlapping(values.as_ptr(), values.len());
            }
            (1, Accumulate::Set, _) => {
                runs::narrow(isa, values, std::slice::from_raw_parts_mut(to, values.len()));
            }
            _ => (0..values.len() as isize)
                .zip(values)
                .for_each(|(i, &x)| put(x, to.offset(i * stride), accumulate)),
        }
    }
}

/// Stores a value, or adds it.
///
/// # Safety
/// `to` is writable, and nobody else uses it.
#[inline(always)]
unsafe fn put<T: Element>(x: f32, to: *mut T, accumulate: Accumulate) {
    // SAFETY: the caller's promise.
    unsafe {
        *to = T::from_f32(match accumulate {
            Accumulate::Set => x,
            Accumulate::Add => (*to).to_f32() + x,
        });
    }
}

/// A block: one row's positions, or all rows' if there is none.
#[derive(Clone, Debug)]
pub(super) struct At {
    pub row: Option<usize>,
    pub positions: Range<usize>,
}
