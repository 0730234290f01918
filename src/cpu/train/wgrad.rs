//! The gradient by the weight: `d_weight[row, i] = Σ_p d[row, p] · src[i, p]`, by the microkernels,
//! with positions as the axis of the sum.
//!
//! Lanes run along src's channels, out of panels `[positions][lanes]` of a block of positions. The
//! gradient by the convolution's result is read in place where its rows are neighbours (channels
//! last), else from a copy `[positions][rows]` of some rows. The sum is split over positions where the
//! weight is small, by the problem alone, and the parts are added up in order.

use std::ops::Range;

use crate::cpu::epilogue::{self, AnyEpilogue, ChannelAxis, Steps, TileEpilogue};
use crate::cpu::isa::{Isa, Supported};
use crate::cpu::microkernel::{Grid, Segment, Sizes, TermKind};
use crate::cpu::pack::Buffer;
use crate::cpu::plan::{Run, even, pieces_of};
use crate::cpu::runs;
use crate::cpu::threads::{CpuDevice, Disjoint};
use crate::cpu::train::view::View;
use crate::epilogue::Step;
use crate::train::Accumulate;

/// Values of a block of src, at most: half of a common L2.
const BLOCK_VALUES: usize = 128 << 10;
/// Positions of a block, and input channels that are multiplied at a time.
const MOST_POSITIONS: usize = 512;
const MOST_CHANNELS: usize = BLOCK_VALUES / MOST_POSITIONS;
/// Values of all parts of a sum that is split.
const PARTS_VALUES: usize = 2 << 20;
/// Units that rows and parts of a sum should make, if there are so many rows.
const UNITS: usize = 16;
/// The same for each thread, if there are several.
const UNITS_PER_THREAD: usize = 4;
/// Tiles of rows of a copy of the gradient.
const TURNED_TILES: usize = 8;
/// Rows that are worth a unit of their own, which packs src again.
const UNIT_ROWS: usize = 128;

/// The gradient by the convolution's result: rows at all positions.
#[derive(Clone, Copy)]
pub(super) struct Gradient {
    pub ptr: *const f32,
    /// Distance of neighbouring rows, and of neighbouring positions; one of them is 1.
    pub row: isize,
    pub position: isize,
}

// SAFETY: only read, and borrowed by the caller of a pass.
unsafe impl Sync for Gradient {}

/// What is multiplied.
pub(super) struct Wgrad<'a> {
    pub isa: Supported,
    pub device: &'a CpuDevice,
    pub groups: usize,
    /// Rows of all groups, and input channels of one.
    pub rows: usize,
    pub k: usize,
    pub positions: usize,
    pub d: Gradient,
    pub src: Src<'a>,
}

/// Src at the positions that the stride keeps.
pub(super) enum Src<'a> {
    InPlace(&'a View<'a>),
    /// Source stages: writes lines of all channels at some positions.
    Computed(&'a (dyn Fn(Range<usize>, &mut [f32]) + Sync)),
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default();
}

#[derive(Default)]
struct Scratch {
    panels: Buffer,
    lines: Vec<f32>,
    turned: Buffer,
}

/// The most lanes of a tile.
fn tile_lanes(isa: Isa) -> usize {
    match isa {
        Isa::Avx512 => 32,
        Isa::Avx2 => 16,
        Isa::Portable => 8,
    }
}

impl Wgrad<'_> {
    /// Positions of a block.
    fn block(&self) -> usize {
        match self.src {
            Src::InPlace(_) => MOST_POSITIONS,
            // Every channel is computed.
            Src::Computed(_) => (BLOCK_VALUES / (self.k * self.groups)).clamp(32, MOST_POSITIONS),
        }
    }

    /// Parts of the sum, which depend on the problem alone, and ranges that a group's rows are cut
    /// into: each packs src again, so that there are no more than the threads need.
    fn cut(&self) -> (usize, usize) {
        let blocks = self.positions.div_ceil(self.block()).max(1);
        let ranges = (self.rows / self.groups).div_ceil(UNIT_ROWS).min(UNITS);
        let parts = UNITS.div_ceil(ranges * self.groups);
        let most = PARTS_VALUES / (self.rows * self.k);
        let parts = parts.min(most).min(blocks).max(1);
        let wanted = match self.device.threads_for(self.work()) {
            1 => 1,
            threads => (threads * UNITS_PER_THREAD).div_ceil(parts * self.groups),
        };
        (parts, ranges.min(wanted))
    }

    /// Multiply-accumulates.
    fn work(&self) -> usize {
        (self.rows * self.k).saturating_mul(self.positions)
    }

    /// Computes the gradient into `out [rows, k]`.
    ///
    /// # Safety
    /// `d` is readable at every row and position, src at every channel and position.
    pub(super) unsafe fn run(&self, out: &mut [f32], accumulate: Accumulate) {
        let len = self.rows * self.k;
        assert_eq!(out.len(), len, "a gradient of the weight's shape");
        if self.positions == 0 {
            if accumulate == Accumulate::Set {
                out.fill(0.0);
            }
            return;
        }
        let (parts, ranges) = self.cut();
        // A single part goes where it belongs.
        let mut buffer = Buffer::default();
        let to = match parts {
            1 => out.as_mut_ptr(),
            _ => buffer.get(parts * len).as_mut_ptr(),
        };
        let to = Disjoint::new(to);
        let add = parts == 1 && accumulate == Accumulate::Add;
        let units = parts * self.groups * ranges;
        let blocks = self.positions.div_ceil(self.block());
        self.device.for_each(units, self.work(), &|unit| {
            let (part, rest) = (unit / (self.groups * ranges), unit % (self.groups * ranges));
            let (group, range) = (rest / ranges, rest % ranges);
            let of_group = self.rows / self.groups;
            let rows = of_group * range / ranges..of_group * (range + 1) / ranges;
            let at = |part: usize| (blocks * part / parts * self.block()).min(self.positions);
            SCRATCH.with(|scratch| {
                let out = to.at(part * len);
                let positions = at(part)..at(part + 1);
                match scratch.try_borrow_mut() {
                    // SAFETY: the caller's promise; no other unit has these rows of this part.
                    Ok(mut s) => unsafe { self.unit(group, rows, positions, out, add, &mut s) },
                    // SAFETY: as above.
                    Err(_) => unsafe {
                        self.unit(group, rows, positions, out, add, &mut Scratch::default());
                    },
                }
            });
        });
        if parts > 1 {
            let sums = buffer.get(parts * len);
            const CHUNK: usize = 4096;
            let out = Disjoint::new(out.as_mut_ptr());
            let sums = &*sums;
            self.device.for_each(len.div_ceil(CHUNK), parts * len, &|chunk| {
                let range = chunk * CHUNK..len.min((chunk + 1) * CHUNK);
                // SAFETY: no other chunk has these values.
                let out =
                    unsafe { std::slice::from_raw_parts_mut(out.at(range.start), range.len()) };
                if accumulate == Accumulate::Set {
                    out.copy_from_slice(&sums[range.clone()]);
                }
                let first = usize::from(accumulate == Accumulate::Set);
                for part in first..parts {
                    let part = &sums[part * len..][range.clone()];
                    crate::cpu::runs::add_lanes(self.isa, part, out);
                }
            });
        }
    }

    /// Some rows of a group at some positions.
    ///
    /// # Safety
    /// As [`run`](Self::run); nobody else uses these rows of `out`.
    unsafe fn unit(
        &self,
        group: usize,
        rows: Range<usize>,
        positions: Range<usize>,
        out: *mut f32,
        add: bool,
        scratch: &mut Scratch,
    ) {
        let sizes = Sizes::of(self.isa.isa(), TermKind::F32);
        let tile_lanes = tile_lanes(self.isa.isa());
        let first_row = group * (self.rows / self.groups) + rows.start;
        // The bias of every row of a unit: none.
        let zeros = vec![0.0; rows.len()];
        let (plain, adding) = (Steps::new(Vec::new()), Steps::new(vec![Step::Residual]));
        let out = out.wrapping_add(first_row * self.k);
        let most = if self.d.row == 1 { rows.len() } else { sizes.rows(tile_lanes) * TURNED_TILES };
        for (channels, block) in self.blocks(&positions) {
            self.pack(group, channels.clone(), block.clone(), tile_lanes, scratch);
            let count = block.len();
            let steps = if block.start > positions.start || add { &adding } else { &plain };
            let out = out.wrapping_add(channels.start);
            for chunk in pieces_of(0..rows.len(), most).flat_map(Run::each) {
                // SAFETY: rows and positions of the gradient.
                let (d, d_position) = unsafe {
                    self.turned(first_row + chunk.first, chunk.len, block.clone(), scratch)
                };
                let panel = scratch.panels.get(0).as_ptr();
                for lanes in pieces_of(0..channels.len(), tile_lanes) {
                    for run in even(0..chunk.len, sizes.rows(lanes.len)) {
                        let width = lanes.len.next_multiple_of(8);
                        let segment = Segment {
                            k: count,
                            a: d.wrapping_add(run.first),
                            a_row: 1,
                            a_k: d_position,
                            a_step: [run.len as isize, 0],
                            b: panel.wrapping_add(lanes.first * count),
                            b_k: width as isize,
                            b_step: [0, (width * count) as isize],
                        };
                        let to = (chunk.first + run.first) * self.k + lanes.first;
                        let at = epilogue::Operand {
                            ptr: out.wrapping_add(to),
                            channel_stride: self.k as isize,
                            position_stride: 1,
                            channels: None,
                            positions: None,
                        };
                        let before = epilogue::Operand {
                            ptr: at.ptr.cast_const(),
                            channel_stride: at.channel_stride,
                            position_stride: 1,
                            channels: None,
                            positions: None,
                        };
                        let epilogue = TileEpilogue {
                            axis: ChannelAxis::Rows,
                            channel: 0,
                            scale: &[],
                            bias: &zeros,
                            steps,
                            residual: Some(before),
                            dst: at,
                        };
                        let grid = Grid {
                            rows: run.len,
                            cols: lanes.len,
                            tiles: [run.tiles, lanes.tiles],
                            ahead: 8 * width as isize,
                            far_dst: false,
                            segments: &[segment],
                            epilogue: AnyEpilogue::F32(&epilogue),
                            channel_step: [run.len, 0],
                            position_step: [0, lanes.len],
                        };
                        // SAFETY: the CPU has the instruction set; A is the gradient at rows and
                        // positions of the block, B the packed panels; the caller's promise for
                        // `out`, which is also what is added.
                        unsafe { (sizes.run)(&grid) };
                    }
                }
            }
        }
    }

    /// Ranges of a group's channels, and of positions; positions run faster.
    fn blocks(
        &self,
        positions: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<> {
        let (k, block, positions) = (self.k, self.block(), positions.clone());
        (0..k).step_by(MOST_CHANNELS).flat_map(move |channel| {
            let channels = channel..k.min(channel + MOST_CHANNELS);
            let end = positions.end;
            positions
                .clone()
                .step_by(block)
                .map(move |first| (channels.clone(), first..end.min(first + block)))
        })
    }

    /// Where some rows of the gradient are as neighbours, at a block of positions, and the distance
    /// of positions there.
    ///
    /// # Safety
    /// The gradient is readable at these rows and positions.
    unsafe fn turned(
        &self,
        row: usize,
        rows: usize,
        block: Range<usize>,
        scratch: &mut Scratch,
    ) -> (*const f32, isize) {
        let Gradient { ptr, row: row_stride, position } = self.d;
        let from = ptr
            .wrapping_offset(row as isize * row_stride)
            .wrapping_offset(block.start as isize * position);
        if row_stride == 1 {
            return (from, position);
        }
        // An odd number of cache lines, so that positions do not share few sets of a cache.
        let line = (rows.div_ceil(16) | 1) * 16;
        let out = scratch.turned.get(block.len() * line);
        // SAFETY: the caller's promise; positions are neighbours.
        unsafe {
            let stride = row_stride as usize;
            runs::turn(self.isa, from, stride, rows, block.len(), line, out);
        }
        (out.as_ptr(), line as isize)
    }

    /// Packs some of a group's channels at a block of positions: panels of `lanes` channels, each
    /// `[positions][lanes]`.
    fn pack(
        &self,
        group: usize,
        channels: Range<usize>,
        block: Range<usize>,
        lanes: usize,
        scratch: &mut Scratch,
    ) {
        let count = block.len();
        let Scratch { panels, lines, .. } = scratch;
        let out = panels.get(count * channels.len().next_multiple_of(8));
        let start = group * self.k + channels.start;
        let all = self.k * self.groups;
        if let Src::Computed(compute) = &self.src {
            if lines.len() < count * all {
                lines.resize(count * all, 0.0);
            }
            compute(block.clone(), &mut lines[..count * all]);
        }
        for piece in pieces_of(0..channels.len(), lanes).flat_map(Run::each) {
            let width = piece.len.next_multiple_of(8);
            let out = &mut out[piece.first * count..][..width * count];
            let channels = start + piece.first..start + piece.first + piece.len;
            match &self.src {
                // SAFETY: src is readable at every channel and position.
                Src::InPlace(view) => unsafe {
                    view.load_lines(self.isa, channels, block.clone(), width, out);
                },
                Src::Computed(_) => {
                    for (line, to) in lines.chunks_exact(all).zip(out.chunks_exact_mut(width)) {
                        to[..piece.len].copy_from_slice(&line[channels.clone()]);
                    }
                }
            }
        }
    }
}
