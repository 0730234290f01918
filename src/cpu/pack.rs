//! Weights in the order in which the microkernels read them, and src where it is not read in
//! place.

use std::ops::Range;

use crate::cpu::isa::Supported;
use crate::cpu::microkernel::TermKind;
use crate::cpu::runs::{self, Spaced};
use crate::cpu::threads::{CpuDevice, Disjoint};
use crate::dtype::{DType, Element, bf16};
use crate::epilogue::SourceStep;
use crate::problem::{Operand, Positions};

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// f32 values that start on a cache line. Grows, never shrinks.
#[derive(Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// The first `len` values; what a grown part holds is unspecified.
    pub(crate) fn get(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0.0; 16]));
        }
        // SAFETY: a `Line` is sixteen f32 without padding, and there are enough lines.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }

    fn as_ptr(&self) -> *const f32 {
        self.lines.as_ptr().cast()
    }
}

/// Panels are as wide as a whole number of so many rows, so that their lines are aligned.
pub(crate) const PANEL_QUANTUM: usize = 8;

/// A packed weight, as terms: per group, panels of [`width`](Self::width) rows, each panel `[k][rows]`; the
/// last panel of a group holds what is left, rounded up with zeros to [`PANEL_QUANTUM`].
///
/// The one packing serves every tile in both directions: any lanes of a panel are B where lanes run
/// along the channels, and any rows of it are A where lanes run along positions.
pub(crate) struct Weights {
    data: Buffer,
    k: usize,
    width: usize,
    rows_per_group: usize,
}

impl Weights {
    /// Packs a weight into panels of one of `widths`, the first one if there are rows left whichever
    /// is taken.
    pub(crate) fn pack(
        device: &CpuDevice,
        isa: Supported,
        weight: Unpacked<'_>,
        terms: TermKind,
        widths: &[usize],
    ) -> Self {
        let Unpacked { values, groups, rows: rows_per_group, channels, .. } = weight;
        let k = terms.of_channels(channels);
        // Whole panels where a width gives them.
        let whole = widths.iter().find(|&&width| rows_per_group.is_multiple_of(width));
        let width = *whole.unwrap_or(&widths[0]);
        let mut weights = Weights { data: Buffer::default(), k, width, rows_per_group };
        let mut data = Buffer::default();
        let packed = Disjoint::new(data.get(groups * weights.group_len()).as_mut_ptr());
        let panels = weights.panels();
        device.for_each(groups * panels, values.len(), &|unit| {
            let (group, panel) = (unit / panels, unit % panels);
            let (stride, rows) = (weights.stride(panel), weights.rows(panel));
            let at = group * weights.group_len() + panel * width * k;
            // SAFETY: panels do not overlap, and each is one unit's.
            let out = unsafe { std::slice::from_raw_parts_mut(packed.at(at), stride * k) };
            weight.pack_panel(isa, terms, group, panel * width..panel * width + rows, stride, out);
        });
        weights.data = data;
        weights
    }

    /// Rows of one group.
    pub(crate) fn rows_per_group(&self) -> usize {
        self.rows_per_group
    }

    /// Rows of the last panel.
    pub(crate) fn last_rows(&self) -> usize {
        self.rows(self.panels() - 1)
    }

    /// Bytes of one group.
    pub(crate) fn group_bytes(&self) -> usize {
        self.group_len() * size_of::<f32>()
    }

    /// Values of one group.
    fn group_len(&self) -> usize {
        let panels = self.panels();
        ((panels - 1) * self.width + self.stride(panels - 1)) * self.k
    }

    /// Values of a panel that has all rows.
    pub(crate) fn panel_len(&self) -> usize {
        self.width * self.k
    }

    /// The most rows of a panel.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Panels of one group that have all rows.
    pub(crate) fn full_panels(&self) -> usize {
        self.rows_per_group / self.width
    }

    /// Panels of one group.
    pub(crate) fn panels(&self) -> usize {
        self.rows_per_group.div_ceil(self.width)
    }

    /// Rows that panel `panel` holds, without padding.
    pub(crate) fn rows(&self, panel: usize) -> usize {
        self.width.min(self.rows_per_group - panel * self.width)
    }

    /// Distance of neighbouring `k` in a panel.
    pub(crate) fn stride(&self, panel: usize) -> usize {
        self.rows(panel).next_multiple_of(PANEL_QUANTUM)
    }

    /// Where rows `rows` of a group are: ranges of panels, and which rows of each of these.
    pub(crate) fn windows(
        &self,
        rows: Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + Clone + use<> {
        let width = self.width;
        let whole = rows.start.div_ceil(width)..rows.end / width;
        let (head, tail) = match whole.start <= whole.end {
            true => (rows.start..whole.start * width, whole.end * width..rows.end),
            false => (rows.clone(), rows.end..rows.end),
        };
        let part = move |rows: Range<usize>| {
            let panel = rows.start / width;
            (panel..panel + 1, rows.start - panel * width..rows.end - panel * width)
        };
        let head = (!head.is_empty()).then(|| part(head));
        let tail = (!tail.is_empty()).then(|| part(tail));
        let middle = (!whole.is_empty()).then_some((whole, 0..width));
        [head, middle, tail].into_iter().flatten()
    }

    /// A panel's first value: row 0, `k` 0.
    pub(crate) fn panel(&self, group: usize, panel: usize) -> *const f32 {
        assert!(panel < self.panels());
        let index = group * self.group_len() + panel * self.width * self.k;
        debug_assert!(index + self.stride(panel) * self.k <= self.data.lines.len() * 16);
        self.data.as_ptr().wrapping_add(index)
    }
}

/// A weight as it is described: `[groups][rows][channels]`, or each group turned.
#[derive(Clone, Copy)]
pub(crate) struct Unpacked<'a> {
    values: &'a [f32],
    groups: usize,
    /// Output and input channels of a group.
    rows: usize,
    channels: usize,
    /// Whether groups are `[channels][rows]`.
    turned: bool,
}

impl<'a> Unpacked<'a> {
    /// `values [groups * rows, channels]`, row-major.
    pub(crate) fn new(values: &'a [f32], groups: usize, channels: usize) -> Self {
        let rows = values.len() / channels / groups;
        Unpacked { values, groups, rows, channels, turned: false }
    }

    /// The weight of the product with each group's transpose.
    pub(crate) fn transposed(self) -> Self {
        let Unpacked { rows, channels, .. } = self;
        Unpacked { rows: channels, channels: rows, turned: !self.turned, ..self }
    }

    /// Writes `out[i * stride + row - rows.start]` for the terms `i` of some rows of a group.
    fn pack_panel(
        self,
        isa: Supported,
        terms: TermKind,
        group: usize,
        rows: Range<usize>,
        stride: usize,
        out: &mut [f32],
    ) {
        let len = self.rows * self.channels;
        let values = &self.values[group * len..][..len];
        let at = |row: usize, channel: usize| match self.turned {
            true => values[channel * self.rows + row],
            false => values[row * self.channels + channel],
        };
        match terms {
            TermKind::F32 if self.turned => {
                for (from, to) in values.chunks_exact(self.rows).zip(out.chunks_exact_mut(stride)) {
                    to[..rows.len()].copy_from_slice(&from[rows.clone()]);
                }
            }
            TermKind::F32 => {
                let (from, k) = (&values[rows.start * self.channels..], self.channels);
                assert!(rows.len() * k <= from.len(), "the weight has these rows");
                // SAFETY: so many rows of so many values follow.
                unsafe { runs::turn(isa, from.as_ptr(), k, rows.len(), k, stride, out) };
            }
            TermKind::Bf16Pair => {
                let bits = |row, channel| match channel < self.channels {
                    true => u32::from(bf16::from_f32(at(row, channel)).to_bits()),
                    false => 0,
                };
                for (i, to) in out.chunks_exact_mut(stride).enumerate() {
                    for (row, to) in rows.clone().zip(to) {
                        *to = f32::from_bits(bits(row, 2 * i) | bits(row, 2 * i + 1) << 16);
                    }
                }
            }
        }
    }
}

/// How src is given to the microkernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// Where it is.
    InPlace,
    /// Copied to panels of positions, each `[k][positions]`, as terms.
    ByChannel,
    /// Copied to `[positions][k]`, as terms, rows not a multiple of half a page apart.
    ByPosition,
}

/// A range of input channels of one group, in memory, as terms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Terms.
    pub k: usize,
    pub ptr: *const f32,
    /// Distance of neighbouring positions, of a panel if there are panels.
    pub position: isize,
    /// Distance of neighbouring terms, where there are no panels.
    pub channel: isize,
    pub panels: Option<Panels>,
}

/// How positions are cut into panels `[k][positions]`: all of one length, but for the last one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panels {
    len: usize,
    positions: usize,
    /// Distance of neighbouring channels of the last panel.
    last: usize,
}

impl Panels {
    /// For tiles of `len` positions, a multiple of 8, or of any length in a single panel.
    pub(crate) fn new(len: usize, positions: usize) -> Self {
        let last = match positions <= len {
            // Rows of a single panel may be long: an odd number of cache lines, so that they do not
            // share few sets of a cache.
            true => (positions.div_ceil(16) | 1) * 16,
            false => ((positions - 1) % len + 1).next_multiple_of(8),
        };
        Panels { len, positions, last }
    }

    fn count(self) -> usize {
        self.positions.div_ceil(self.len)
    }

    /// Distance of neighbouring channels of a panel.
    fn stride(self, panel: usize) -> usize {
        if panel + 1 < self.count() { self.len } else { self.last }
    }

    /// Values of a channel, of all panels.
    fn values(self) -> usize {
        self.count().saturating_sub(1) * self.len + self.last
    }

    /// First position of each panel, number of positions, distance of neighbouring channels.
    fn each(self) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..self.count()).map(move |panel| {
            let first = panel * self.len;
            (first, self.len.min(self.positions - first), self.stride(panel))
        })
    }
}

impl Part {
    /// Where tiles of `len` positions from `first` on are: channel 0 of the first one, the distance
    /// of channels, and of tiles. If there are panels, a tile is a whole one or in one with all
    /// others.
    pub(crate) fn tiles(&self, first: usize, len: usize) -> (*const f32, isize, isize) {
        match self.panels {
            None => {
                let ptr = self.ptr.wrapping_offset(first as isize * self.position);
                (ptr, self.channel, len as isize * self.position)
            }
            Some(panels) => {
                let (panel, at) = (first / panels.len, first % panels.len);
                let (stride, panel_len) = (panels.stride(panel), panels.len * self.k);
                debug_assert!(at + len <= stride, "a tile lies in one panel");
                let step = if len == panels.len { panel_len } else { len };
                (self.ptr.wrapping_add(panel * panel_len + at), stride as isize, step as isize)
            }
        }
    }
}

/// A block of positions of one sample and a range of input channels, to be packed.
pub(crate) struct Block<'a, T> {
    pub isa: Supported,
    /// What the copy holds: values widened to f32, or pairs of them as they are.
    pub terms: TermKind,
    pub steps: &'a [SourceStep],
    /// The gate of the sample: its channel 0, and the distance of channels.
    pub gate: Option<(*const T, isize)>,
    /// First input channel of the layer, and how many.
    pub channels: (usize, usize),
    pub positions: usize,
    /// The panels of a copy by channel.
    pub panels: Panels,
    /// Whether what lies between positions two apart belongs to the source: the layer's stride
    /// skips it. Otherwise somebody else may be writing it.
    pub gaps: bool,
}

impl<T: Element> Block<'_, T> {
    /// Values that a copy needs.
    pub(crate) fn len(&self, read: Read) -> usize {
        match read {
            Read::ByPosition => self.positions * self.position_row(),
            _ => self.k() * self.panels.values(),
        }
    }

    /// Terms.
    fn k(&self) -> usize {
        self.terms.of_channels(self.channels.1)
    }

    /// Distance of the rows of a copy by position: such that they do not share few sets of a cache.
    fn position_row(&self) -> usize {
        let k = self.k();
        k + if k.is_multiple_of(512) { 16 } else { 0 }
    }

    /// Copies the block out of `sources` (pairs of an operand at its sample, and its walk of
    /// positions) and applies the source steps; `runs` is memory to work in.
    ///
    /// # Safety
    /// The sources are readable at their channels and at positions `first..first + positions`, in
    /// the gaps too if there are; the gate at every channel.
    pub(crate) unsafe fn pack(
        &self,
        read: Read,
        first: usize,
        sources: impl Iterator<Item = (Operand<T>, Positions)>,
        runs: &mut Vec<Spaced>,
        out: &mut [f32],
    ) -> Part {
        let ((start, channels), positions) = (self.channels, self.positions);
        let mut channel = 0;
        for (source, walk) in sources {
            let (lo, hi) = (start.max(channel), (start + channels).min(channel + source.channels));
            if lo < hi {
                let src = source.ptr.wrapping_offset((lo - channel) as isize * source.channel);
                // SAFETY: the caller's promise; `lo..hi` lies in the source's channels.
                unsafe {
                    if read == Read::ByPosition {
                        debug_assert_eq!(source.channel, 1);
                        let mut rows = &mut out[..positions * self.position_row()];
                        for (offset, stride, len) in walk.runs(first, positions) {
                            let (now, later) = rows.split_at_mut(len * self.position_row());
                            self.copy_rows(src.offset(offset), stride, lo - start..hi - start, now);
                            rows = later;
                        }
                    } else {
                        runs.clear();
                        let mut panel = 0;
                        for (position, count, row) in self.panels.each() {
                            let mut to = panel + self.first_term(lo - start) * row;
                            for (offset, stride, len) in walk.runs(first + position, count) {
                                runs.push(Spaced { offset, stride, len, gaps: self.gaps, to, row });
                                to += len;
                            }
                            panel += self.k() * row;
                        }
                        let (isa, channel) = (self.isa, source.channel);
                        match self.terms {
                            TermKind::F32 => {
                                runs::gather(isa, src, channel, hi - lo, runs, out);
                            }
                            TermKind::Bf16Pair => {
                                let odd = (lo - start) % 2 == 1;
                                runs::gather_pairs(
                                    isa,
                                    src.cast(),
                                    channel,
                                    hi - lo,
                                    odd,
                                    runs,
                                    out,
                                );
                            }
                        }
                    }
                }
            }
            channel += source.channels;
        }
        match read {
            Read::ByPosition => self.apply_by_position(out),
            _ => self.apply_by_channel(out),
        }
        let (position, channel, panels) = match read {
            Read::ByPosition => (self.position_row() as isize, 1, None),
            _ => (1, 0, Some(self.panels)),
        };
        Part { k: self.k(), ptr: out.as_ptr(), position, channel, panels }
    }

    /// The term that a channel of the block is in.
    fn first_term(&self, channel: usize) -> usize {
        match self.terms {
            TermKind::F32 => channel,
            TermKind::Bf16Pair => channel / 2,
        }
    }

    /// Copies some of the block's channels at positions that are `stride` apart, one for each of the rows.
    ///
    /// # Safety
    /// `src`, the first of the channels, is readable at all of them at every position.
    unsafe fn copy_rows(
        &self,
        src: *const T,
        stride: isize,
        channels: Range<usize>,
        rows: &mut [f32],
    ) {
        let row_len = self.position_row();
        match self.terms {
            TermKind::F32 => {
                let (count, out) = (rows.len() / row_len, &mut rows[channels.start..]);
                // SAFETY: the caller's promise.
                unsafe {
                    runs::widen_rows(self.isa, src, stride, count, channels.len(), row_len, out);
                }
            }
            TermKind::Bf16Pair => {
                for (p, row) in rows.chunks_exact_mut(row_len).enumerate() {
                    let row = &mut row[..self.k()];
                    // SAFETY: the caller's promise; a term is two values of T, which is bf16.
                    let (src, row) = unsafe {
                        let src = src.offset(p as isize * stride);
                        let values = row.as_mut_ptr().cast::<T>();
                        (
                            std::slice::from_raw_parts(src, channels.len()),
                            std::slice::from_raw_parts_mut(values, 2 * row.len()),
                        )
                    };
                    row[channels.clone()].copy_from_slice(src);
                    // What is behind the last channel of an odd number of them.
                    if channels.end == self.channels.1 {
                        row[self.channels.1..].fill(T::default());
                    }
                }
            }
        }
    }

    fn gate_of(&self, channel: usize) -> f32 {
        let (gate, stride) = self.gate.expect("a gate step comes with a gate tensor");
        // SAFETY: readable at every channel, as the caller of `pack` promises.
        unsafe { *gate.offset(channel as isize * stride) }.to_f32()
    }

    fn apply_by_channel(&self, out: &mut [f32]) {
        let (start, k) = self.channels;
        for step in self.steps {
            let mut rest = &mut *out;
            for (_, count, row) in self.panels.each() {
                let (panel, later) = rest.split_at_mut(k * row);
                rest = later;
                for (channel, row) in (start..start + k).zip(panel.chunks_exact_mut(row)) {
                    let row = &mut row[..count];
                    match step {
                        SourceStep::Affine { scale, shift } => {
                            runs::apply_affine(self.isa, scale[channel], shift[channel], row);
                        }
                        SourceStep::Activation(activation) => {
                            runs::apply_activation(self.isa, *activation, row);
                        }
                        SourceStep::Gate => runs::scale(self.isa, self.gate_of(channel), row),
                    }
                }
            }
        }
    }

    fn apply_by_position(&self, out: &mut [f32]) {
        let ((start, k), stride) = (self.channels, self.position_row());
        let out = &mut out[..stride * self.positions];
        for step in self.steps {
            match step {
                SourceStep::Affine { scale, shift } => {
                    let (scale, shift) = (&scale[start..start + k], &shift[start..start + k]);
                    for row in out.chunks_exact_mut(stride) {
                        runs::apply_affine_lanes(self.isa, scale, shift, &mut row[..k]);
                    }
                }
                SourceStep::Activation(activation) => {
                    for row in out.chunks_exact_mut(stride) {
                        runs::apply_activation(self.isa, *activation, &mut row[..k]);
                    }
                }
                SourceStep::Gate => match self.gate {
                    Some((gate, 1)) if T::DTYPE == DType::F32 => {
                        // SAFETY: contiguous, readable at every channel, and of f32.
                        let gate = unsafe { std::slice::from_raw_parts(gate.add(start).cast(), k) };
                        for row in out.chunks_exact_mut(stride) {
                            runs::scale_lanes(self.isa, gate, &mut row[..k]);
                        }
                    }
                    _ => {
                        for channel in 0..k {
                            let gate = self.gate_of(start + channel);
                            out[channel..].iter_mut().step_by(stride).for_each(|x| *x *= gate);
                        }
                    }
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use crate::dtype::f16;

    /// Copies of a source of integers below `distinct` hold `want` of a term's channels; `None` is one
    /// beyond the last.
    fn check_copies<T: Element, const N: usize>(
        distinct: usize,
        terms: TermKind,
        steps: &[SourceStep],
        want: impl Fn([Option<f32>; N]) -> f32,
    ) {
        // Two samples of nothing else: rows of `width` positions, every `stride`-th of them kept.
        for (width, stride, first, positions) in [
            (7, 1, 0, 49),
            (9, 2, 0, 25),
            (14, 2, 3, 40),
            (30, 1, 17, 131),
            (63, 2, 40, 130),
            (5, 3, 1, 3),
        ] {
            let kept = usize::div_ceil(width, stride);
            let plane = width * width;
            let (channels, start, k) = (7, 2, 5);
            let src: Vec<T> =
                (0..channels * plane).map(|i| T::from_f32((i % distinct) as f32)).collect();
            let walk =
                Positions::new(&[(kept, (width * stride) as isize), (kept, stride as isize)]);
            // The group's channels lie in two sources.
            let source = |from: usize, to: usize| Operand {
                ptr: src[from * plane..].as_ptr(),
                sample: 0,
                channel: plane as isize,
                channels: to - from,
                spatial: [0; 3],
                stream: None,
            };
            for isa in Supported::all() {
                for len in [8, 16, 24, 48, 64, positions] {
                    let block = Block {
                        isa,
                        terms,
                        steps,
                        gate: None,
                        channels: (start, k),
                        positions,
                        panels: Panels::new(len, positions),
                        gaps: stride == 2,
                    };
                    let mut out = vec![f32::NAN; block.len(Read::ByChannel)];
                    let sources = [(source(0, 4), walk), (source(4, channels), walk)];
                    // SAFETY: the sources hold every position of every channel.
                    let part = unsafe {
                        let sources = sources.into_iter();
                        block.pack(Read::ByChannel, first, sources, &mut Vec::new(), &mut out)
                    };
                    for tile in (0..positions).step_by(len) {
                        let count = len.min(positions - tile);
                        let (ptr, term, step) = part.tiles(tile, count);
                        if count == len && tile + len < positions {
                            let (next, ..) = part.tiles(tile + len, 1);
                            assert_eq!(ptr.wrapping_offset(step), next);
                        }
                        for (t, p) in (0..block.k()).flat_map(|t| (0..count).map(move |p| (t, p))) {
                            let at = first + tile + p;
                            let at = at / kept * stride * width + at % kept * stride;
                            let value = |c: usize| src[(start + c) * plane + at].to_f32();
                            let of_term = std::array::from_fn(|i| Some(N * t + i));
                            let want = want(of_term.map(|c| c.filter(|&c| c < k).map(value)));
                            // SAFETY: inside the copy.
                            let got = unsafe { *ptr.offset(t as isize * term).add(p) };
                            let place = format!("{isa:?} {width} {stride} {len}: {t} {p}");
                            assert_eq!(got.to_bits(), want.to_bits(), "{place}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_copy_by_channel_holds_every_value_where_tiles_look_for_it() {
        let steps = [SourceStep::Affine { scale: vec![2.0; 7], shift: vec![1.0; 7] }];
        let want = |[x]: [Option<f32>; 1]| x.expect("k terms") * 2.0 + 1.0;
        // As many integers as each type holds exactly, and prime to every distance.
        check_copies::<f32, 1>(1 << 20, TermKind::F32, &steps, want);
        check_copies::<f16, 1>(2039, TermKind::F32, &steps, want);
        check_copies::<bf16, 1>(251, TermKind::F32, &steps, want);
        check_copies::<bf16, 2>(251, TermKind::Bf16Pair, &[], |pair| {
            let [low, high] = pair.map(|x| u32::from(bf16::from_f32(x.unwrap_or(0.0)).to_bits()));
            f32::from_bits(low | high << 16)
        });
    }

    #[test]
    fn panels_hold_every_row_once_and_zeros_beyond() {
        for (groups, rows, k) in [(2, 5, 3), (1, 64, 2), (3, 96, 1), (2, 150, 4), (1, 48, 5)] {
            let weight: Vec<f32> = (1..=groups * rows * k).map(|i| i as f32).collect();
            let unpacked = Unpacked::new(&weight, groups, k);
            let isa = Isa::detect().unwrap();
            let device = CpuDevice::default();
            let packed = Weights::pack(&device, isa, unpacked, TermKind::F32, &[64, 48]);
            // Each group turned, and packed as its transpose's transpose.
            let mut turned = Vec::new();
            for group in weight.chunks_exact(rows * k) {
                turned.extend((0..k).flat_map(|i| (0..rows).map(move |row| group[row * k + i])));
            }
            let again = Unpacked::new(&turned, groups, rows).transposed();
            for terms in [TermKind::F32, TermKind::Bf16Pair] {
                let [one, other] = [unpacked, again]
                    .map(|weight| Weights::pack(&device, isa, weight, terms, &[64, 48]));
                let bits = |weights: &Weights| -> Vec<u32> {
                    let lines = weights.data.lines.iter();
                    lines.flat_map(|line| line.0.map(f32::to_bits)).collect()
                };
                assert_eq!(bits(&one), bits(&other), "{groups} x {rows} x {k}, turned");
            }
            let all = (0..packed.panels()).map(|panel| packed.rows(panel)).sum::<usize>();
            assert_eq!(all, rows);
            for (group, panel) in
                (0..groups).flat_map(|g| (0..packed.panels()).map(move |panel| (g, panel)))
            {
                let stride = packed.stride(panel);
                for (i, lane) in (0..k).flat_map(|i| (0..stride).map(move |lane| (i, lane))) {
                    let row = panel * packed.width() + lane;
                    let expected =
                        if row < rows { weight[(group * rows + row) * k + i] } else { 0.0 };
                    // SAFETY: inside the panel.
                    let got = unsafe { *packed.panel(group, panel).add(i * stride + lane) };
                    assert_eq!(got, expected, "{groups} x {rows} x {k}");
                }
            }
        }
    }
}
