//! How a problem is cut and read, and which kernel runs it: a pure function of the layer, the
//! problem and the number of threads.
//!
//! No sum is ever split, and moments are merged in blocks that depend on the problem alone, so
//! results are bitwise the same for any number of threads.

use std::ops::Range;

use crate::cpu::epilogue::ChannelAxis;
use crate::cpu::isa::{Isa, Supported};
use crate::cpu::microkernel::{KERNELS, Kernel, Sizes, TermKind};
use crate::cpu::pack::{Read, Weights};
use crate::cpu::threads::CpuDevice;
use crate::cpu::tune::Choices;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::plan::forced_kernel;
use crate::problem::{Operand, Positions, Problem};
use crate::stages::NormOver;

/// The part of src that a unit works on, in values: an eighth of a common L2.
const BLOCK_VALUES: usize = 32 << 10;
/// A dst of more bytes is not in the second cache level when it is written.
const FAR_BYTES: usize = 2 << 20;
/// Multiply-accumulates that are worth a unit of their own: some microseconds.
const UNIT_MACS: usize = 200_000;
/// Units for each thread, so that one that comes late, or is slower, finds less to do.
const UNITS_PER_THREAD: usize = 4;
/// What every thread may read of src or of the weight, in bytes: half of a common L2.
const MOST_SHARED_BYTES: usize = 512 << 10;
/// Input and output channels of a group from which on a copy pays that only aligns src.
const COPIED_DEPTH: usize = 64;
/// The fewest output channels that are worth a unit of their own, and the fewest where each thread
/// copies src for them.
const SPLIT_ROWS: usize = 32;
const COPIED_SPLIT_ROWS: usize = 192;
/// Parts of so few can be of different lengths; of more each one is short.
const MOST_TAPERED: usize = 256;
/// Units of a problem whose result depends on how it is cut.
const FIXED_UNITS: usize = 8;
/// Multiply-accumulates below which choosing costs more than it gains.
const SMALL_MACS: usize = 20_000;

/// The instruction set of a layer, what its terms are, and the kernel that the user forces, if any.
///
/// `staged` says that src has stages: what they give is not rounded to 16 bits, so that terms are f32.
pub(crate) fn choose_isa(
    best: Supported,
    dtype: DType,
    staged: bool,
    option: Option<&str>,
) -> Result<(Supported, TermKind, Option<&'static Kernel>)> {
    let kernels = || KERNELS.iter().filter(|kernel| kernel.dtype == dtype);
    let names: Vec<_> = kernels().map(|kernel| kernel.name).collect();
    let Some(name) = forced_kernel(option, &names)? else {
        let pairs = dtype == DType::Bf16 && best.isa().multiplies_pairs() && !staged;
        return Ok((best, if pairs { TermKind::Bf16Pair } else { TermKind::F32 }, None));
    };
    let kernel = kernels().find(|kernel| kernel.name == name).expect("it is one of the names");
    match (refusal(kernel, staged), kernel.sizes.isa.supported()) {
        (None, Some(isa)) => Ok((isa, kernel.sizes.terms, Some(kernel))),
        (reason, _) => {
            Err(Error::Kernel { kernel: kernel.name.into(), reason: reason.unwrap_or_default() })
        }
    }
}

/// Why a kernel cannot run a layer on this CPU, if it cannot.
pub(crate) fn refusal(kernel: &Kernel, staged: bool) -> Option<String> {
    kernel.sizes.unavailable().or_else(|| {
        let rounds = kernel.sizes.terms == TermKind::Bf16Pair && staged;
        rounds.then(|| "it would round what the source's stages give to bf16".into())
    })
}

/// What a plan needs to know of its layer.
pub(crate) struct Facts<'a> {
    pub isa: Isa,
    pub terms: TermKind,
    pub forced: Option<&'static Kernel>,
    /// What was measured; a forced kernel goes first.
    pub choices: &'a Choices,
    pub weights: &'a Weights,
    /// Whether the source has steps of its own.
    pub source_steps: bool,
    pub norm_over: Option<NormOver>,
    /// Where it runs.
    pub device: &'a CpuDevice,
}

/// The kernels that agree bitwise.
pub(crate) fn kernels(
    isa: Isa,
    dtype: DType,
    terms: TermKind,
) -> impl Iterator<Item = &'static Kernel> {
    KERNELS.iter().filter(move |kernel| {
        kernel.dtype == dtype && kernel.sizes.isa == isa && kernel.sizes.terms == terms
    })
}

/// Which loop over tiles is the outer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// A tile of channels meets all positions of a unit.
    ChannelsOuter,
    /// A tile of positions meets all channels of a unit.
    PositionsOuter,
}

/// How one problem is cut and read.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub kernel: &'static Kernel,
    pub axis: ChannelAxis,
    pub order: Order,
    /// Whether kernel and order were measured to be the best.
    pub tuned: bool,
    pub read: Read,
    /// Whether positions run over all samples.
    pub with_batch: bool,
    pub samples: usize,
    pub positions: usize,
    /// Positions of a tile, and how many of those a sample has (the few behind the last vector are
    /// none).
    tile: usize,
    tiles: usize,
    /// Blocks that the positions of a sample are cut into.
    per_sample: usize,
    /// Ranges that the channels of a group are cut into.
    pub splits: usize,
    /// Whether the units that threads claim last are short.
    tapered: bool,
    /// Groups that are units of their own.
    pub groups: usize,
    /// How dst and the residual walk the positions.
    pub dst: Positions,
    pub residual: Option<Positions>,
    /// Whether dst is too large to be in cache when it is written.
    pub far_dst: bool,
}

impl Plan {
    pub(crate) fn new<T: Element>(layer: &Facts<'_>, problem: &Problem<'_, T>) -> Self {
        // Samples that lie behind one another are one run of positions, unless something differs
        // between them.
        let uniform = |operand: &Operand<T>| problem.walk(operand, true).uniform().is_some();
        let with_batch = problem.n > 1
            && problem.gate.is_none()
            && layer.norm_over != Some(NormOver::All)
            && uniform(&problem.dst)
            && problem.residual.as_ref().is_none_or(uniform)
            && problem.sources().all(|source| uniform(&source));
        let (samples, positions) = match with_batch {
            true => (1, problem.n * problem.positions()),
            false => (problem.n, problem.positions()),
        };
        let dst = problem.walk(&problem.dst, with_batch);
        let residual = problem.residual.as_ref().map(|r| problem.walk(r, with_batch));
        let terms = layer.forced.map_or(layer.terms, |kernel| kernel.sizes.terms);
        let k = terms.of_channels(problem.k());
        let (mut in_place, mut lanes, mut channels_last) = (!layer.source_steps, true, true);
        let mut row_bytes = 0;
        for source in problem.sources() {
            let step = problem.walk(&source, with_batch).uniform();
            in_place &= step.is_some();
            lanes &= step == Some(1);
            channels_last &= source.channel == 1;
            row_bytes = step.unwrap_or(0).unsigned_abs().saturating_mul(size_of::<T>());
            // In 16 bits only whole pairs can be read where they are.
            in_place &= match terms {
                TermKind::F32 => T::DTYPE == DType::F32,
                TermKind::Bf16Pair => {
                    let even = |x: usize| x.is_multiple_of(2);
                    let steps = step.is_some_and(|step| even(step.unsigned_abs()));
                    source.channel == 1
                        && even(source.channels)
                        && even(problem.k())
                        && (steps || positions == 1)
                }
            };
        }

        let isa = layer.forced.map_or(layer.isa, |kernel| kernel.sizes.isa);
        let vector = Sizes::of(isa, TermKind::F32).vector;
        let dst_channels_last = problem.dst.channel == 1 && dst.uniform() != Some(1);
        let axis = if layer.norm_over.is_some()
            || dst_channels_last
            || positions < vector
            || (in_place && !lanes)
        {
            ChannelAxis::Lanes
        } else {
            ChannelAxis::Rows
        };
        // Rows that begin anywhere in a cache line: short tiles read up to twice the lines that they
        // hold, more than the second cache level delivers meanwhile.
        let align = axis == ChannelAxis::Rows
            && T::DTYPE == DType::F32
            && isa == Isa::Avx2
            && problem.k() >= COPIED_DEPTH
            && problem.c_out / problem.groups >= COPIED_DEPTH;
        let read = match (in_place, axis) {
            (true, _) if !align => Read::InPlace,
            (_, ChannelAxis::Lanes) if channels_last => Read::ByPosition,
            _ => Read::ByChannel,
        };
        // A normalised layer's tiles go to a block in cache first, channels last.
        let dst_bytes = if layer.norm_over.is_some() { 0 } else { problem.cost(0).dst_bytes };
        let estimate = Estimate {
            axis,
            vector,
            dtype: T::DTYPE,
            terms,
            k,
            positions,
            channels: problem.c_out,
            weights: layer.weights,
            channel_bytes: problem.dst.channel.unsigned_abs().saturating_mul(size_of::<T>()),
            row_bytes: if read == Read::InPlace { row_bytes } else { 0 },
            dst_bytes,
            turned: axis == ChannelAxis::Lanes
                && layer.norm_over.is_none()
                && !dst_channels_last
                && positions > 1,
        };
        let tuned = match layer.forced {
            None => layer.choices.find((positions, samples, axis, read)),
            Some(_) => None,
        };
        let (kernel, order) = if let Some(choice) = tuned {
            (choice.kernel, choice.order)
        } else if problem.macs() < SMALL_MACS {
            let smallest = kernels(isa, T::DTYPE, terms).next();
            let kernel = layer.forced.or(smallest).expect("every instruction set has a kernel");
            (kernel, Order::ChannelsOuter)
        } else {
            estimate.best(isa, layer.forced)
        };

        // A normalisation needs every channel of a position: one unit does all groups.
        let (groups, per_position) = match layer.norm_over {
            Some(_) => (1, problem.c_in + problem.c_out),
            None => (problem.groups, k),
        };
        let threads = layer.device.threads_for(problem.macs());
        let others = samples.max(1).saturating_mul(groups);
        let units = match (layer.norm_over, threads) {
            // Moments are merged block by block, which must depend on the problem alone.
            (Some(NormOver::All), _) => FIXED_UNITS,
            (_, 1) => 1,
            _ => (problem.macs() / UNIT_MACS)
                .clamp(1, threads.saturating_mul(UNITS_PER_THREAD))
                .div_ceil(others),
        };
        let (tile, tiles) = match axis {
            _ if layer.norm_over == Some(NormOver::All) => (1, positions),
            ChannelAxis::Rows => {
                (kernel.nr, vectors_of(positions, kernel).0.map(|run| run.tiles).sum())
            }
            ChannelAxis::Lanes => (kernel.mr, positions.div_ceil(kernel.mr)),
        };
        let tiles = tiles.max(1);
        let rows = problem.c_out / problem.groups;
        // A weight that is larger than src, and than what every thread can keep in cache, is read by
        // one thread rather than by all.
        let src_bytes = positions.saturating_mul(problem.k()).saturating_mul(size_of::<T>());
        let by_channels = units > 1
            && read == Read::InPlace
            && layer.norm_over.is_none()
            && src_bytes < MOST_SHARED_BYTES
            && layer.weights.group_bytes() > MOST_SHARED_BYTES;
        let most_splits = match read {
            _ if layer.norm_over.is_some() => 1,
            Read::InPlace => rows / SPLIT_ROWS,
            // Every thread copies a block of src, which must stay little beside what it computes.
            _ => rows / COPIED_SPLIT_ROWS,
        }
        .max(1);
        let (first, cached) = match by_channels {
            true => (units.min(most_splits), tiles),
            false => (1, (BLOCK_VALUES / per_position.max(1) / tile).max(1)),
        };
        let mut per_sample = units.div_ceil(first).max(tiles.div_ceil(cached)).min(tiles);
        let wanted = units.div_ceil(per_sample).clamp(first, most_splits);
        let whole = |splits: &usize| layer.weights.panels().is_multiple_of(*splits);
        let mut splits = (first..=wanted).rev().find(whole).unwrap_or(wanted);
        // Threads of one speed should end together.
        let uneven = !(per_sample * splits).saturating_mul(others).is_multiple_of(threads);
        if units > 1 && layer.norm_over != Some(NormOver::All) && uneven {
            let (more, fewer) = (per_sample.next_multiple_of(threads), wanted / threads * threads);
            if more <= tiles {
                per_sample = more;
            } else if fewer > 0 {
                splits = fewer;
            } else if threads <= most_splits {
                splits = threads;
            }
        }
        Plan {
            kernel,
            axis,
            order,
            tuned: tuned.is_some(),
            read,
            with_batch,
            samples,
            positions,
            tile,
            tiles,
            per_sample,
            splits,
            tapered: threads > 1 && others == 1 && layer.norm_over != Some(NormOver::All),
            groups,
            dst,
            residual,
            far_dst: dst_bytes > FAR_BYTES,
        }
    }

    pub(crate) fn describe(&self) -> String {
        let axis = match self.axis {
            ChannelAxis::Rows => "lanes along positions",
            ChannelAxis::Lanes => "lanes along channels",
        };
        let src = match self.read {
            Read::InPlace => "read in place",
            Read::ByChannel => "copied block by block, channels first",
            Read::ByPosition => "copied block by block, channels last",
        };
        let order = match self.order {
            Order::ChannelsOuter => "channels outside positions",
            Order::PositionsOuter => "positions outside channels",
        };
        let units = self.blocks() * self.units_per_block();
        format!("{axis}, {order}, src {src}, {units} unit{}", if units == 1 { "" } else { "s" })
    }

    /// Blocks of positions, over all samples.
    pub(crate) fn blocks(&self) -> usize {
        self.samples * self.per_sample()
    }

    /// Blocks of positions of one sample.
    pub(crate) fn per_sample(&self) -> usize {
        if self.positions == 0 { 0 } else { self.per_sample }
    }

    /// Cuts the positions of a sample into at least so many blocks, if there are as many tiles.
    pub(crate) fn cut_finer(&mut self, per_sample: usize) {
        self.per_sample = self.per_sample.max(per_sample.min(self.tiles));
    }

    /// Sample and positions of a block.
    pub(crate) fn block(&self, index: usize) -> (usize, Range<usize>) {
        let (sample, block) = (index / self.per_sample, index % self.per_sample);
        let at = |block: usize| {
            if block == self.per_sample {
                self.positions
            } else if self.axis == ChannelAxis::Lanes
                && self.tiles.is_multiple_of(self.per_sample)
                && !self.tapers(self.tiles, self.per_sample)
            {
                // As many tiles each, so they can be of any length.
                self.positions * block / self.per_sample
            } else {
                self.cut(self.tiles, self.per_sample, block) * self.tile
            }
        };
        (sample, at(block)..at(block + 1))
    }

    /// The channels of a group that are unit `split` of a block: whole panels where those come out
    /// even, else whole vectors.
    pub(crate) fn channels(&self, weights: &Weights, split: usize) -> Range<usize> {
        let panels = weights.panels();
        let quantum = match panels.is_multiple_of(self.splits) {
            true => weights.width(),
            false => self.kernel.sizes.vector,
        };
        let rows = weights.rows_per_group();
        let quanta = rows.div_ceil(quantum);
        let tapered = self.per_sample == 1;
        let at = |split: usize| {
            let quanta = match tapered {
                true => self.cut(quanta, self.splits, split),
                false => quanta * split / self.splits,
            };
            rows.min(quanta * quantum)
        };
        at(split)..at(split + 1)
    }

    /// Where part `index` of `parts` of `count` begins.
    fn cut(&self, count: usize, parts: usize, index: usize) -> usize {
        if !self.tapers(count, parts) {
            return count * index / parts;
        }
        // x + x(1 − x)(1 − 2x) for x = index / parts: twice the mean at the ends, half in the middle.
        let x = index as f64 / parts as f64;
        (count as f64 * x * (2.0 + x * (2.0 * x - 3.0))) as usize
    }

    /// Whether parts in the middle are shorter. The caller claims units from the front and helpers from
    /// the back, so that those come last: they leave less to wait for when a thread is late or slow.
    fn tapers(&self, count: usize, parts: usize) -> bool {
        self.tapered && (4..=MOST_TAPERED).contains(&parts) && count >= 2 * parts
    }

    /// Whether several units need the same copy of src.
    pub(crate) fn copies_again(&self) -> bool {
        self.read != Read::InPlace && self.splits > 1
    }

    /// Positions of a panel of a copy by channel, of a block of so many: of a tile whose lanes run
    /// along them.
    pub(crate) fn panel(&self, block: usize) -> usize {
        match self.axis {
            ChannelAxis::Rows => self.kernel.nr,
            ChannelAxis::Lanes => block,
        }
    }

    pub(crate) fn units_per_block(&self) -> usize {
        self.groups * self.splits
    }
}

/// A model of what a group's channels at its positions cost, in cycles that a vector
/// multiplication takes: sums, what each tile costs besides, and what comes from the second cache
/// level, of which some cannot be hidden. Its constants are fitted to measurements of every tile
/// on the layers of `benches/layers.csv` (Zen 4); only their proportions matter.
struct Estimate<'a> {
    dtype: DType,
    terms: TermKind,
    axis: ChannelAxis,
    vector: usize,
    /// Terms of a sum.
    k: usize,
    positions: usize,
    /// Output channels of all groups.
    channels: usize,
    weights: &'a Weights,
    /// Distance of neighbouring channels of dst.
    channel_bytes: usize,
    /// Distance of neighbouring positions of src.
    row_bytes: usize,
    dst_bytes: usize,
    /// Whether dst's lanes run across those of tiles.
    turned: bool,
}

impl Estimate<'_> {
    /// What of the first cache level a tile can count on.
    const L1: f32 = 24.0 * 1024.0;
    /// A streamed operand beyond this leaves too little of the second cache level to the other.
    const LARGE: f32 = 200.0 * 1024.0;
    /// Of a weight of more bytes the rest has left the second cache level when it is read again, at
    /// the latest when another layer has run in between.
    const NEAR_WEIGHT: usize = 128 << 10;
    const PER_FAR_LINE: f32 = 1.0;
    const PAGE: usize = 4096;
    /// As many broadcasts as multiplications slow them a little, more where there are few.
    const BROADCASTS: f32 = 1.01;
    const FEW_BROADCASTS: f32 = 1.08;
    const PER_TILE: f32 = 8.0;
    const PER_GRID: f32 = 120.0;
    /// Sums beyond this fill the CPU's queues while they are stored.
    const FREE_SUMS: f32 = 12.0;
    const PER_SUM_SQUARED: f32 = 0.3;
    const PER_LINE: f32 = 0.06;
    /// A lane of a tile that is stored across.
    const PER_TURNED_LANE: f32 = 5.0;
    /// A row of dst on a page of its own.
    const PER_PAGE: f32 = 4.0;
    /// Rows of src that share a set of the first cache level, beyond its ways.
    const PER_ALIAS: f32 = 0.03;
    /// So many rows of dst that share a set of the first cache level can stay there until their
    /// lines are full; with more, a store takes so long. (From 0 to 24 were seen, depending on where
    /// src and dst lie.)
    const ALIASED_ROWS: f32 = 9.0;
    const PER_ALIASED_STORE: f32 = 12.0;
    /// A piece of a position's channels, where dst lies beyond the second cache level, or with more
    /// than these bytes beyond the third.
    const DISTANT_BYTES: usize = 16 << 20;
    const PER_FAR_RUN: f32 = 3.0;
    const PER_DISTANT_RUN: f32 = 17.0;

    /// The cheapest kernel and order, of a forced kernel the cheapest order.
    fn best(&self, isa: Isa, forced: Option<&'static Kernel>) -> (&'static Kernel, Order) {
        let mut best = (f32::INFINITY, None);
        let kernels = kernels(isa, self.dtype, self.terms);
        for kernel in
            kernels.filter(|&kernel| forced.is_none_or(|forced| std::ptr::eq(kernel, forced)))
        {
            for order in [Order::ChannelsOuter, Order::PositionsOuter] {
                let cycles = self.cycles(kernel, order);
                if cycles < best.0 {
                    best = (cycles, Some((kernel, order)));
                }
            }
        }
        best.1.expect("every instruction set has a kernel, and no estimate is infinite")
    }

    fn cycles(&self, kernel: &Kernel, order: Order) -> f32 {
        let weights = self.weights;
        let full = weights.full_panels();
        let classes = [(full, weights.width()), (weights.panels() - full, weights.last_rows())];
        let mut cycles = 0.0;
        for (panels, width) in classes.into_iter().filter(|(panels, _)| *panels > 0) {
            match self.axis {
                ChannelAxis::Rows => {
                    let (pieces, tail) = vectors_of(self.positions, kernel);
                    for piece in pieces {
                        let tiles = width.div_ceil(kernel.rows(piece.len));
                        cycles += self.grids(piece, width, tiles, panels, order);
                    }
                    if let Some(tail) = tail {
                        for lanes in pieces_of(0..width, kernel.sizes.widest(tail.len)) {
                            let streamed = (lanes.len * self.k * size_of::<f32>()) as f32;
                            let tile = self.tile(tail.len as f32, lanes.len, streamed);
                            let turned = Self::PER_TURNED_LANE * lanes.len as f32;
                            cycles += (panels * lanes.tiles) as f32 * (tile + turned);
                        }
                    }
                }
                ChannelAxis::Lanes => {
                    for lanes in pieces_of(0..width, kernel.nr) {
                        let tiles = self.positions.div_ceil(kernel.rows(lanes.len)).max(1);
                        cycles += self.grids(lanes, self.positions, tiles, panels, order);
                    }
                }
            }
        }
        cycles
    }

    /// The tiles of `lanes` in each of `panels`, where `count` rows are cut into `tiles`.
    fn grids(&self, lanes: Run, count: usize, tiles: usize, panels: usize, order: Order) -> f32 {
        let rows = count as f32 / tiles as f32;
        let bytes = (self.k * size_of::<f32>()) as f32;
        let (a, b) = (rows * bytes, lanes.len as f32 * bytes);
        let beyond = |bytes: f32| if bytes <= Self::L1 { 0.0 } else { bytes };
        let (streamed, grids) = match (self.axis, order) {
            (ChannelAxis::Rows, Order::ChannelsOuter) => {
                let block =
                    self.positions.saturating_mul(self.k).min(BLOCK_VALUES) * size_of::<f32>();
                (if block as f32 > Self::L1 { b / 2.0 } else { 0.0 }, 1.5 * panels as f32)
            }
            (ChannelAxis::Rows, Order::PositionsOuter) => (a + beyond(b), 1.5 * lanes.tiles as f32),
            (ChannelAxis::Lanes, Order::ChannelsOuter) => {
                (a + beyond(b), 1.5 * panels as f32 * lanes.tiles as f32)
            }
            (ChannelAxis::Lanes, Order::PositionsOuter) => {
                let all = self.weights.group_bytes() as f32 > Self::L1;
                (beyond(a) + if all { b } else { 0.0 }, tiles as f32)
            }
        };
        let mut tile = self.tile(rows, lanes.len, streamed);
        if self.axis == ChannelAxis::Rows
            && order == Order::PositionsOuter
            && self.channel_bytes >= Self::PAGE
        {
            tile += rows * Self::PER_PAGE;
        }
        if self.axis == ChannelAxis::Lanes
            && self.row_bytes.is_multiple_of(Self::PAGE)
            && self.row_bytes > 0
        {
            let sums = rows * self.vectors(lanes.len);
            tile += (rows - 8.0).max(0.0) * Self::PER_ALIAS * self.k as f32 * sums;
        }
        if self.axis == ChannelAxis::Lanes && self.turned {
            tile += Self::PER_TURNED_LANE * lanes.len as f32;
        } else if self.axis == ChannelAxis::Lanes && lanes.len < self.channels {
            tile += rows
                * match self.dst_bytes {
                    bytes if bytes > Self::DISTANT_BYTES => Self::PER_DISTANT_RUN,
                    bytes if bytes > FAR_BYTES => Self::PER_FAR_RUN,
                    _ => 0.0,
                };
        }
        if self.axis == ChannelAxis::Rows
            && self.channel_bytes.is_multiple_of(Self::PAGE)
            && self.channel_bytes > 0
            && rows > Self::ALIASED_ROWS
        {
            tile += rows * self.vectors(lanes.len) * Self::PER_ALIASED_STORE;
        }
        // Positions outside read the weight once more for each further tile of positions.
        let again = match (order, self.axis) {
            (Order::ChannelsOuter, _) => 0,
            (_, ChannelAxis::Rows) => lanes.tiles - 1,
            (_, ChannelAxis::Lanes) => tiles - 1,
        };
        let far = self.weights.group_bytes().saturating_sub(Self::NEAR_WEIGHT) as f32 / 64.0;
        panels as f32 * lanes.tiles as f32 * tiles as f32 * tile
            + grids * Self::PER_GRID
            + again as f32 * far * Self::PER_FAR_LINE
    }

    /// One tile that reads so many bytes from beyond the first cache level.
    fn tile(&self, rows: f32, lanes: usize, streamed: f32) -> f32 {
        let vectors = self.vectors(lanes);
        let sums = rows * vectors;
        // A vector load a cycle, two broadcasts a cycle; four cycles from sum to sum.
        let loads = match vectors == 1.0 {
            true if rows < 12.0 => Self::FEW_BROADCASTS * sums,
            true => Self::BROADCASTS * sums,
            false => vectors + rows / 2.0,
        };
        let term = sums.max(loads).max(4.0);
        let crowded = lanes * self.k * size_of::<f32>();
        let lines = streamed / 64.0 * (crowded as f32 / Self::LARGE).max(1.0);
        let queued = (sums - Self::FREE_SUMS).max(0.0);
        self.k as f32 * term
            + Self::PER_TILE
            + Self::PER_SUM_SQUARED * queued * queued
            + Self::PER_LINE * lines
    }

    /// Vectors that so many lanes fill; half vectors count half.
    fn vectors(&self, lanes: usize) -> f32 {
        let half = self.vector / 2;
        match lanes.is_multiple_of(half) {
            true if lanes == half || lanes == 3 * half => lanes as f32 / self.vector as f32,
            _ => lanes.div_ceil(self.vector) as f32,
        }
    }
}

/// Tiles of one size that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Where the first tile begins.
    pub first: usize,
    /// Length of each tile.
    pub len: usize,
    pub tiles: usize,
}

impl Run {
    /// Each tile by itself.
    pub(crate) fn each(self) -> impl Iterator<Item = Run> {
        (0..self.tiles).map(move |t| Run { first: self.first + t * self.len, tiles: 1, ..self })
    }

    fn end(&self) -> usize {
        self.first + self.len * self.tiles
    }
}

/// Cuts a range into the fewest tiles of at most `most`, as even as can be, the longer ones first.
pub(crate) fn even(range: Range<usize>, most: usize) -> impl Iterator<Item = Run> + Clone {
    let tiles = range.len().div_ceil(most).max(1);
    let (short, long) = (range.len() / tiles, range.len() % tiles);
    let long = Run { first: range.start, len: short + 1, tiles: long };
    let short = Run { first: long.end(), len: short, tiles: tiles - long.tiles };
    [long, short].into_iter().filter(|run| run.tiles > 0 && run.len > 0)
}

/// Cuts a range into tiles of `len`, and one of what is left.
pub(crate) fn pieces_of(range: Range<usize>, len: usize) -> impl Iterator<Item = Run> + Clone {
    let whole = Run { first: range.start, len, tiles: range.len() / len };
    let rest = Run { first: whole.end(), len: range.len() % len, tiles: 1 };
    [whole, rest].into_iter().filter(|run| run.tiles > 0 && run.len > 0)
}

/// Cuts `0..count` positions into tiles that lanes run along, and those too few for a vector.
pub(crate) fn vectors_of(
    count: usize,
    kernel: &Kernel,
) -> (impl Iterator<Item = Run> + Clone, Option<Run>) {
    vectors_and_tail(count, kernel.sizes.vector, kernel.nr)
}

/// As [`vectors_of`], for vectors of so many lanes, and so many lanes in a tile at most.
pub(crate) fn vectors_and_tail(
    count: usize,
    vector: usize,
    widest: usize,
) -> (impl Iterator<Item = Run> + Clone, Option<Run>) {
    let tail = count % vector;
    // With more, a masked vector throws away less than a tile of so few rows costs.
    let tail = if tail * 3 <= vector { tail } else { 0 };
    let pieces = pieces_of(0..count - tail, widest);
    (pieces, (tail > 0).then_some(Run { first: count - tail, len: tail, tiles: 1 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_everything_in_order() {
        let check = |runs: Vec<Run>, count: usize, most: usize| {
            let mut next = 0;
            for run in runs {
                assert!(run.first == next && (1..=most).contains(&run.len) && run.tiles > 0);
                assert!(run.each().all(|tile| tile.tiles == 1 && tile.len == run.len));
                next = run.end();
            }
            assert_eq!(next, count);
        };
        for count in 0..200 {
            for most in 1..70 {
                check(even(0..count, most).collect(), count, most);
                check(pieces_of(0..count, most).collect(), count, most);
            }
            for kernel in KERNELS {
                let (pieces, tail) = vectors_of(count, kernel);
                check(pieces.chain(tail).collect(), count, kernel.nr);
            }
        }
    }
}
