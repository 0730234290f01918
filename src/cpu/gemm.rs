//! The blocked loops: a problem is cut into units (a block of positions of one sample, a group, a
//! range of panels), a unit into tiles.
//!
//! No sum is ever split, and how a problem is cut does not depend on the number of threads, so
//! results are bitwise the same for any number of them.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

use crate::cost::{Cost, Roof};
use crate::cpu::epilogue::{self, ChannelAxis, Steps, TileEpilogue};
use crate::cpu::isa::{ISA_VARIABLE, Isa, Supported};
use crate::cpu::microkernel::{KERNELS, Kernel, Segment, Tile};
use crate::cpu::norm::{self, Finish, Moments, Slot};
use crate::cpu::pack::{self, Buffer, Part, Read, Weights};
use crate::cpu::roof;
use crate::cpu::threads::CpuDevice;
use crate::epilogue::{Lowered, Norm, SourceStep, Step};
use crate::error::{Error, Result};
use crate::plan::{Candidate, forced_kernel};
use crate::prepared::PrepareOptions;
use crate::problem::{LayerShape, Operand, Problem};
use crate::stages::NormOver;

/// The part of src that a unit works on, in values: an eighth of a common L2.
const BLOCK_VALUES: usize = 32 << 10;
/// Units that a problem is cut into at least, where it has that many tiles.
const MIN_UNITS: usize = 8;

/// A prepared layer on the CPU.
pub(crate) struct Layer {
    device: CpuDevice,
    isa: Supported,
    kernel: &'static Kernel,
    forced: bool,
    weights: Weights,
    bias: Vec<f32>,
    source_steps: Vec<SourceStep>,
    steps: Steps,
    norm: Option<Norm>,
    after_norm: Vec<Step>,
    dst_map: Option<Vec<u32>>,
    residual_map: Option<Vec<u32>>,
}

impl Layer {
    /// Packs a lowered description.
    ///
    /// # Errors
    /// [`Error::Environment`] for an instruction set that is unknown or not there,
    /// [`Error::Kernel`] for a kernel that is.
    pub(crate) fn new(
        device: &CpuDevice,
        shape: &LayerShape,
        lowered: Lowered,
        options: &PrepareOptions,
    ) -> Result<Self> {
        let best = Isa::detect().map_err(|reason| Error::Environment {
            variable: ISA_VARIABLE,
            value: std::env::var_os(ISA_VARIABLE).unwrap_or_default().to_string_lossy().into(),
            reason,
        })?;
        let (isa, kernel, forced) = choose_kernel(best, options.kernel.as_deref())?;
        Ok(Layer {
            device: device.clone(),
            isa,
            kernel,
            forced,
            weights: Weights::pack(&lowered.weight, shape.groups, shape.k(), kernel.nr),
            bias: lowered.bias,
            source_steps: lowered.source_steps,
            steps: Steps::new(lowered.steps),
            norm: lowered.norm,
            after_norm: lowered.after_norm,
            dst_map: lowered.dst_map,
            residual_map: lowered.residual_map,
        })
    }

    /// The kernel that would run a problem, and how.
    pub(crate) fn explain(&self, problem: &Problem<'_>) -> (&'static str, String) {
        let why = if self.forced { "forced" } else { "the widest instruction set of this CPU" };
        (self.kernel.name, format!("{}; {why}", Plan::new(self, problem).describe()))
    }

    /// Every kernel, the chosen one first.
    pub(crate) fn plans(&self, problem: &Problem<'_>) -> Vec<Candidate> {
        let how = Plan::new(self, problem).describe();
        let mut candidates = vec![Candidate { kernel: self.kernel.name, verdict: Ok(how) }];
        let others = KERNELS.iter().rev().filter(|kernel| kernel.name != self.kernel.name);
        candidates.extend(others.map(|kernel| Candidate {
            kernel: kernel.name,
            verdict: match kernel.isa.supported() {
                Some(_) => Ok("accepts every problem".into()),
                None => Err(format!("this CPU has no {}", kernel.isa.name())),
            },
        }));
        candidates
    }

    /// The ceilings for a problem of this cost.
    pub(crate) fn roof(&self, cost: &Cost) -> Roof {
        roof::measure(&self.device, self.isa, cost.bytes())
    }

    /// Whether the whole of a position must be at hand before it is stored.
    fn norm_over(&self) -> Option<NormOver> {
        self.norm.as_ref().map(|norm| norm.over)
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cpu::Layer({} rows, {} on {})", self.bias.len(), self.kernel.name, self.device)
    }
}

fn choose_kernel(
    best: Supported,
    option: Option<&str>,
) -> Result<(Supported, &'static Kernel, bool)> {
    let names: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
    let forced = forced_kernel(option, &names)?;
    let wanted = |kernel: &&Kernel| match forced {
        Some(name) => kernel.name == name,
        None => kernel.isa == best.isa(),
    };
    let kernel = KERNELS.iter().find(wanted).expect("every instruction set has a kernel");
    match kernel.isa.supported() {
        Some(isa) => Ok((isa, kernel, forced.is_some())),
        None => Err(Error::Kernel {
            kernel: kernel.name.into(),
            reason: format!("this CPU has no {}", kernel.isa.name()),
        }),
    }
}

/// How one problem is cut and read: a pure function of layer and problem.
#[derive(Clone, Debug)]
struct Plan {
    axis: ChannelAxis,
    read: Read,
    /// Whether positions run over all samples.
    with_batch: bool,
    samples: usize,
    positions: usize,
    /// Positions of a unit.
    block: usize,
    /// Ranges that the panels of a group are cut into.
    splits: usize,
    /// Groups that are units of their own.
    groups: usize,
}

impl Plan {
    fn new(layer: &Layer, problem: &Problem<'_>) -> Self {
        let walks = |with_batch: bool| {
            let dst = problem.walk(&problem.dst, with_batch).uniform();
            let residual =
                problem.residual.map_or(Some(0), |r| problem.walk(&r, with_batch).uniform());
            let src = problem
                .sources()
                .try_fold(None, |_, s| problem.walk(&s, with_batch).uniform().map(Some));
            (src.is_some(), dst, residual.is_some())
        };
        // Samples that lie behind one another are one run of positions, unless something differs
        // between them.
        let separate = problem.gate.is_some() || layer.norm_over() == Some(NormOver::All);
        let folds =
            |(src, dst, residual): (bool, Option<isize>, bool)| src && dst.is_some() && residual;
        let with_batch = !separate && problem.n > 1 && folds(walks(true));
        let (samples, positions) = match with_batch {
            true => (1, problem.n * problem.positions()),
            false => (problem.n, problem.positions()),
        };
        let (src_uniform, dst_position, _) = walks(with_batch);
        let src_lanes =
            problem.sources().all(|s| problem.walk(&s, with_batch).uniform() == Some(1));
        let src_channels_last = problem.sources().all(|s| s.channel == 1);

        let (k, rows) = (problem.k(), problem.c_out / problem.groups);
        let nr = layer.kernel.nr;
        let in_place = layer.source_steps.is_empty() && src_uniform;
        let lanes_filled = positions % (nr / 2) == 0 || (positions >= nr && (k < 96 || rows < nr));
        let dst_channels_last = problem.dst.channel == 1 && dst_position != Some(1);
        let axis = if layer.norm.is_some()
            || dst_channels_last
            || !lanes_filled
            || (in_place && !src_lanes)
        {
            ChannelAxis::Lanes
        } else {
            ChannelAxis::Rows
        };
        let read = match (in_place, axis) {
            (true, _) => Read::InPlace,
            (_, ChannelAxis::Lanes) if src_channels_last => Read::ByPosition,
            _ => Read::ByChannel,
        };

        let tile = match axis {
            ChannelAxis::Rows => nr,
            ChannelAxis::Lanes => layer.kernel.mr,
        };
        // A normalisation needs every channel of a position: one unit does all groups.
        let (groups, per_position) = if layer.norm.is_some() {
            (1, problem.c_in + problem.c_out)
        } else {
            (problem.groups, k)
        };
        let mut tiles = (BLOCK_VALUES / per_position.max(1) / tile).max(1);
        let most = positions.div_ceil(tile).max(1);
        // Moments are merged block by block, so that blocks must not depend on the batch.
        let batch = if layer.norm_over() == Some(NormOver::All) { 1 } else { samples.max(1) };
        let wanted = MIN_UNITS.div_ceil(batch * groups).max(1);
        tiles = tiles.min(most.div_ceil(wanted)).max(1);
        let blocks = most.div_ceil(tiles);
        // What is copied serves all panels of a group, so only a single block is worth splitting.
        let splits = if layer.norm.is_some() || (read != Read::InPlace && blocks > 1) {
            1
        } else {
            MIN_UNITS.div_ceil(samples.max(1) * groups * blocks).min(layer.weights.panels())
        };
        Plan { axis, read, with_batch, samples, positions, block: tiles * tile, splits, groups }
    }

    fn describe(&self) -> String {
        let axis = match self.axis {
            ChannelAxis::Rows => "lanes along positions",
            ChannelAxis::Lanes => "lanes along channels",
        };
        let src = match self.read {
            Read::InPlace => "read in place",
            Read::ByChannel => "copied block by block, channels first",
            Read::ByPosition => "copied block by block, channels last",
        };
        format!("{axis}, src {src}, {} units", self.blocks() * self.units_per_block())
    }

    /// Blocks of positions, over all samples.
    fn blocks(&self) -> usize {
        self.samples * self.positions.div_ceil(self.block)
    }

    /// Sample and positions of a block.
    fn block(&self, index: usize) -> (usize, Range<usize>) {
        let per_sample = self.positions.div_ceil(self.block);
        let first = index % per_sample * self.block;
        (index / per_sample, first..self.positions.min(first + self.block))
    }

    fn units_per_block(&self) -> usize {
        self.groups * self.splits
    }
}

/// One layer's share of a call.
struct Pass<'a> {
    layer: &'a Layer,
    problem: &'a Problem<'a>,
    plan: Plan,
    /// Moments of each block, for a normalisation over all positions.
    slots: Vec<Slot>,
}

// SAFETY: the pointers of a problem are to tensors that the caller of a run has borrowed for its
// duration; units write to disjoint parts of dst.
unsafe impl Sync for Pass<'_> {}

/// What a thread needs while it works on a unit.
#[derive(Default)]
struct Scratch {
    packed: Buffer,
    rows: Buffer,
    spare: Vec<f32>,
    offsets: Vec<isize>,
    dst_offsets: Vec<isize>,
    residual_offsets: Vec<isize>,
    parts: Vec<Part>,
    segments: Vec<Segment>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// A caller's moments, kept for its next call.
    static SLOTS: RefCell<Vec<Slot>> = RefCell::default();
}

/// Runs layers that share a source as one pass over it (one layer alone, usually): for each block
/// of positions the units of all layers follow one another, so that src is fetched from memory
/// once.
///
/// The problems have been validated, are on the host, and their dsts do not overlap.
pub(crate) fn run(calls: &[(&Layer, &Problem<'_>)]) {
    match calls {
        [] => {}
        [(layer, problem)] => run_passes(&mut [Pass::new(layer, problem)]),
        calls => {
            let mut passes: Vec<_> =
                calls.iter().map(|(layer, problem)| Pass::new(layer, problem)).collect();
            let shared = passes.iter().all(|pass| {
                (pass.plan.samples, pass.plan.positions)
                    == (passes[0].plan.samples, passes[0].plan.positions)
            });
            if shared {
                let block = passes.iter().map(|pass| pass.plan.block).min().unwrap_or(1);
                // Moments that are merged in other blocks would round otherwise.
                passes
                    .iter_mut()
                    .filter(|pass| pass.layer.norm_over() != Some(NormOver::All))
                    .for_each(|pass| pass.plan.block = block);
            }
            run_passes(&mut passes);
        }
    }
}

fn run_passes(passes: &mut [Pass<'_>]) {
    for pass in passes.iter_mut() {
        if pass.layer.norm_over() == Some(NormOver::All) {
            pass.slots = SLOTS.take();
            pass.slots.resize_with(pass.plan.blocks(), Slot::default);
        }
    }
    run_units(passes);
    for pass in passes.iter_mut() {
        if pass.slots.capacity() > 0 {
            SLOTS.set(std::mem::take(&mut pass.slots));
        }
    }
}

fn run_units(passes: &[Pass<'_>]) {
    let Some(device) = passes.first().map(|pass| &pass.layer.device) else { return };
    let blocks = passes.iter().map(|pass| pass.plan.blocks()).max().unwrap_or(0);
    let per_block: usize = passes.iter().map(|pass| pass.plan.units_per_block()).sum();
    let work = passes.iter().fold(0usize, |work, pass| {
        let cost = pass.problem.cost(0);
        work.saturating_add(cost.macs).saturating_add(cost.bytes() / 4)
    });
    device.for_each(blocks * per_block, work, &|unit| {
        let (block, mut rest) = (unit / per_block, unit % per_block);
        for pass in passes {
            if rest < pass.plan.units_per_block() {
                if block < pass.plan.blocks() {
                    with_scratch(|scratch| pass.run_unit(block, rest, scratch));
                }
                return;
            }
            rest -= pass.plan.units_per_block();
        }
    });
    for pass in passes {
        if pass.layer.norm_over() == Some(NormOver::All) {
            let work = pass.problem.cost(0).dst_bytes;
            device.for_each(pass.plan.blocks(), work, &|block| {
                with_scratch(|scratch| pass.normalise_block(block, scratch));
            });
        }
        let passed: usize = pass.problem.passed_through().map(|(src, _)| src.channels).sum();
        if passed > 0 && pass.problem.positions() > 0 {
            let work =
                pass.problem.n.saturating_mul(passed).saturating_mul(pass.problem.positions());
            device.for_each(pass.problem.n, work, &|sample| pass.copy_through(sample));
        }
    }
}

/// A unit never runs inside another one, so the borrow is free; a fresh scratch keeps that from
/// being a promise.
fn with_scratch(f: impl FnOnce(&mut Scratch)) {
    SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => f(&mut scratch),
        Err(_) => f(&mut Scratch::default()),
    });
}

impl<'a> Pass<'a> {
    fn new(layer: &'a Layer, problem: &'a Problem<'a>) -> Self {
        Pass { layer, problem, plan: Plan::new(layer, problem), slots: Vec::new() }
    }

    fn run_unit(&self, block: usize, unit: usize, scratch: &mut Scratch) {
        let (sample, positions) = self.plan.block(block);
        match self.layer.norm_over() {
            Some(over) => self.run_normalised(block, over, scratch),
            None => {
                let (group, split) = (unit / self.plan.splits, unit % self.plan.splits);
                let panels = self.layer.weights.panels();
                let range = |i: usize| panels * i / self.plan.splits;
                let Scratch { dst_offsets, residual_offsets, .. } = scratch;
                let (mut dst_table, mut residual_table) =
                    (std::mem::take(dst_offsets), std::mem::take(residual_offsets));
                let dst = self.dst(sample, &positions, &mut dst_table);
                let residual = self.residual(sample, &positions, &mut residual_table);
                self.multiply(
                    sample,
                    &positions,
                    group,
                    range(split)..range(split + 1),
                    dst,
                    residual,
                    scratch,
                );
                (scratch.dst_offsets, scratch.residual_offsets) = (dst_table, residual_table);
            }
        }
    }

    /// dst at a block of positions.
    fn dst<'t>(
        &'t self,
        sample: usize,
        positions: &Range<usize>,
        table: &'t mut Vec<isize>,
    ) -> epilogue::Operand<'t, *mut f32> {
        let at = self.operand(
            &self.problem.dst,
            self.layer.dst_map.as_deref(),
            sample,
            positions,
            table,
        );
        epilogue::Operand {
            ptr: at.ptr.cast_mut(),
            channel_stride: at.channel_stride,
            position_stride: at.position_stride,
            channels: at.channels,
            positions: at.positions,
        }
    }

    /// The residual at a block of positions.
    fn residual<'t>(
        &'t self,
        sample: usize,
        positions: &Range<usize>,
        table: &'t mut Vec<isize>,
    ) -> Option<epilogue::Operand<'t, *const f32>> {
        let residual = self.problem.residual.as_ref()?;
        Some(self.operand(residual, self.layer.residual_map.as_deref(), sample, positions, table))
    }

    fn operand<'t>(
        &self,
        operand: &Operand,
        channels: Option<&'t [u32]>,
        sample: usize,
        positions: &Range<usize>,
        table: &'t mut Vec<isize>,
    ) -> epilogue::Operand<'t, *const f32> {
        let walk = self.problem.walk(operand, self.plan.with_batch);
        let ptr = operand.ptr.wrapping_offset(sample as isize * operand.sample);
        let channel_stride = operand.channel;
        match walk.uniform() {
            Some(stride) => epilogue::Operand {
                ptr: ptr.wrapping_offset(positions.start as isize * stride),
                channel_stride,
                position_stride: stride,
                channels,
                positions: None,
            },
            None => {
                table.resize(positions.len(), 0);
                walk.fill(positions.start, 0, table);
                epilogue::Operand {
                    ptr,
                    channel_stride,
                    position_stride: 0,
                    channels,
                    positions: Some(table),
                }
            }
        }
    }

    /// Where the microkernels find a group's input channels at a block of positions.
    fn source(&self, sample: usize, positions: &Range<usize>, group: usize, scratch: &mut Scratch) {
        let k = self.problem.k();
        let start = group * k;
        let sources = self.problem.sources().map(|mut source| {
            source.ptr = source.ptr.wrapping_offset(sample as isize * source.sample);
            let walk = self.problem.walk(&source, self.plan.with_batch);
            (source, walk)
        });
        scratch.parts.clear();
        if self.plan.read != Read::InPlace {
            let block = pack::Block {
                isa: self.layer.isa,
                steps: &self.layer.source_steps,
                gate: self.problem.gate.as_ref().map(|gate| {
                    (gate.ptr.wrapping_offset(sample as isize * gate.sample), gate.channel)
                }),
                channels: (start, k),
                positions: positions.len(),
            };
            let out = scratch.packed.get(k * positions.len());
            // SAFETY: the problem is validated, and the block lies inside it.
            let part = unsafe {
                block.pack(self.plan.read, positions.start, sources, &mut scratch.offsets, out)
            };
            scratch.parts.push(part);
            return;
        }
        let mut channel = 0;
        for (source, walk) in sources {
            let (lo, hi) = (start.max(channel), (start + k).min(channel + source.channels));
            if lo < hi {
                let position = walk.uniform().unwrap_or(0);
                let offset =
                    (lo - channel) as isize * source.channel + positions.start as isize * position;
                scratch.parts.push(Part {
                    k: hi - lo,
                    ptr: source.ptr.wrapping_offset(offset),
                    position,
                    channel: source.channel,
                });
            }
            channel += source.channels;
        }
    }

    /// Computes and stores a group's panels at a block of positions.
    #[expect(clippy::too_many_arguments, reason = "a unit is that many coordinates")]
    fn multiply(
        &self,
        sample: usize,
        positions: &Range<usize>,
        group: usize,
        panels: Range<usize>,
        dst: epilogue::Operand<'_, *mut f32>,
        residual: Option<epilogue::Operand<'_, *const f32>>,
        scratch: &mut Scratch,
    ) {
        self.source(sample, positions, group, scratch);
        let Scratch { parts, segments, .. } = scratch;
        let Layer { kernel, weights, bias, steps, .. } = self.layer;
        let nr = kernel.nr;
        let first_channel = group * (self.problem.c_out / self.problem.groups);
        let count = positions.len();

        // A tile at rows `r..r + rows` of a panel and positions `j..j + len` of the block.
        let mut tile = |panel: usize, r: usize, rows: usize, j: usize, len: usize| {
            let mut a = weights.panel(group, panel).wrapping_add(r);
            segments.clear();
            for part in parts.iter() {
                let src = part.ptr.wrapping_offset(j as isize * part.position);
                segments.push(match self.plan.axis {
                    ChannelAxis::Rows => Segment {
                        k: part.k,
                        a,
                        a_row: 1,
                        a_k: nr as isize,
                        b: src,
                        b_k: part.channel,
                    },
                    ChannelAxis::Lanes => Segment {
                        k: part.k,
                        a: src,
                        a_row: part.position,
                        a_k: part.channel,
                        b: a,
                        b_k: nr as isize,
                    },
                });
                a = a.wrapping_add(part.k * nr);
            }
            let epilogue = TileEpilogue {
                axis: self.plan.axis,
                channel: first_channel + panel * nr + r,
                bias,
                steps,
                residual: residual.map(|residual| residual.at_positions(j, len)),
                dst: dst.at_positions(j, len),
            };
            let (rows, cols) = match self.plan.axis {
                ChannelAxis::Rows => (rows, len),
                ChannelAxis::Lanes => (len, rows),
            };
            // SAFETY: the layer was prepared for an instruction set that this CPU has; the problem
            // is validated, so that its tensors hold every channel and position of the tile; dst
            // aliases nothing that is read, and no other unit has this tile.
            unsafe { (kernel.run)(&Tile { rows, cols, segments, epilogue: &epilogue }) };
        };
        match self.plan.axis {
            ChannelAxis::Rows => {
                for j in (0..count).step_by(nr) {
                    for panel in panels.clone() {
                        for rows in even(weights.rows(panel), kernel.mr) {
                            tile(panel, rows.start, rows.len(), j, nr.min(count - j));
                        }
                    }
                }
            }
            ChannelAxis::Lanes => {
                for panel in panels {
                    for j in even(count, kernel.mr) {
                        tile(panel, 0, weights.rows(panel), j.start, j.len());
                    }
                }
            }
        }
    }

    /// A block of positions of a normalised layer: every channel into a block in cache, then
    /// either to dst normalised, or to dst as it is with its moments kept.
    fn run_normalised(&self, block: usize, over: NormOver, scratch: &mut Scratch) {
        let (sample, positions) = self.plan.block(block);
        let channels = self.problem.c_out;
        let isa = self.layer.isa;
        let mut rows = std::mem::take(&mut scratch.rows);
        let (mut dst_table, mut residual_table) = (
            std::mem::take(&mut scratch.dst_offsets),
            std::mem::take(&mut scratch.residual_offsets),
        );
        let values = rows.get(positions.len() * channels);
        let into = epilogue::Operand {
            ptr: values.as_mut_ptr(),
            channel_stride: 1,
            position_stride: channels as isize,
            channels: None,
            positions: None,
        };
        let residual = self.residual(sample, &positions, &mut residual_table);
        for group in 0..self.problem.groups {
            let panels = 0..self.layer.weights.panels();
            self.multiply(sample, &positions, group, panels, into, residual, scratch);
        }
        match over {
            NormOver::Channels => {
                self.finish(values, |row| Moments::of(isa, row), residual, &mut scratch.spare)
            }
            NormOver::All => self.slots[block].set(Moments::of(isa, values)),
        }
        let dst = self.dst(sample, &positions, &mut dst_table);
        // SAFETY: dst holds every channel and position of the block, and no other unit has it.
        unsafe { norm::store(values, channels, &dst) };
        scratch.rows = rows;
        (scratch.dst_offsets, scratch.residual_offsets) = (dst_table, residual_table);
    }

    /// Normalises a block that is already in dst with the moments of its whole sample.
    fn normalise_block(&self, block: usize, scratch: &mut Scratch) {
        let (sample, positions) = self.plan.block(block);
        let channels = self.problem.c_out;
        let per_sample = self.plan.blocks() / self.plan.samples;
        let slots = &self.slots[sample * per_sample..][..per_sample];
        let moments = slots.iter().map(Slot::get).fold(Moments::default(), Moments::merge);
        let dst = self.dst(sample, &positions, &mut scratch.dst_offsets);
        let residual = self.residual(sample, &positions, &mut scratch.residual_offsets);
        let values = scratch.rows.get(positions.len() * channels);
        // SAFETY: dst holds every channel and position of the block, and no other unit has it.
        unsafe { norm::load(values, channels, &dst) };
        self.finish(values, |_| moments, residual, &mut scratch.spare);
        // SAFETY: as above.
        unsafe { norm::store(values, channels, &dst) };
    }

    fn finish(
        &self,
        values: &mut [f32],
        moments: impl Fn(&[f32]) -> Moments,
        residual: Option<epilogue::Operand<'_, *const f32>>,
        spare: &mut Vec<f32>,
    ) {
        let Some(norm) = &self.layer.norm else { return };
        let finish = Finish { isa: self.layer.isa, norm, steps: &self.layer.after_norm, residual };
        spare.resize(self.problem.c_out, 0.0);
        for (position, row) in values.chunks_exact_mut(self.problem.c_out).enumerate() {
            // SAFETY: the residual holds every channel and position of the block.
            unsafe { finish.run(moments(row), position, row, spare) };
        }
    }

    /// Copies one sample of what a partial convolution passes through.
    fn copy_through(&self, sample: usize) {
        let count = self.problem.positions();
        for (src, dst) in self.problem.passed_through() {
            let (from, to) = (self.problem.walk(&src, false), self.problem.walk(&dst, false));
            for channel in 0..src.channels as isize {
                let at = |operand: &Operand| {
                    operand.ptr.wrapping_offset(
                        sample as isize * operand.sample + channel * operand.channel,
                    )
                };
                let (src, dst) = (at(&src), at(&dst).cast_mut());
                // SAFETY: the problem is validated: both hold every channel and position, and do
                // not overlap.
                unsafe {
                    match (from.uniform(), to.uniform()) {
                        (Some(1), Some(1)) => dst.copy_from_nonoverlapping(src, count),
                        (Some(s), Some(t)) => {
                            for p in 0..count as isize {
                                *dst.offset(p * t) = *src.offset(p * s);
                            }
                        }
                        _ => {
                            for p in 0..count {
                                *dst.offset(to.offset(p)) = *src.offset(from.offset(p));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Cuts `0..count` into the fewest ranges of at most `most`, as even as can be.
fn even(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = count.div_ceil(most);
    (0..parts).map(move |i| count * i / parts..count * (i + 1) / parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_ranges_cover_everything() {
        for count in 0..100 {
            for most in 1..20 {
                let ranges: Vec<_> = even(count, most).collect();
                assert!(ranges.iter().all(|r| !r.is_empty() && r.len() <= most));
                assert_eq!(ranges.iter().map(|r| r.len()).sum::<usize>(), count);
                assert!(ranges.windows(2).all(|w| w[0].end == w[1].start));
            }
        }
    }
}
