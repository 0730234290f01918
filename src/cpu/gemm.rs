//! The blocked loops: a plan cuts a problem into units (a block of positions of one sample, a
//! group, a range of panels), a unit is covered by grids of tiles.

use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cost::{Cost, Roof};
use crate::cpu::area::Area;
use crate::cpu::epilogue::{self, ChannelAxis, Steps};
use crate::cpu::isa::{Isa, Supported};
use crate::cpu::microkernel::{KERNELS, Kernel, Segment, Sizes, TermKind};
use crate::cpu::norm::{self, Finish, Slot};
use crate::cpu::pack::{self, Buffer, Panels, Part, Read, Unpacked, Weights};
use crate::cpu::plan::{
    self, Facts, Order, Plan, Run, choose_isa, even, pieces_of, refusal, vectors_of,
};
use crate::cpu::roof;
use crate::cpu::runs::Spaced;
use crate::cpu::threads::{self, CpuDevice};
use crate::cpu::tune::Choices;
use crate::dtype::{DType, Element};
use crate::epilogue::{Lowered, Norm, SourceStep, Step};
use crate::error::Result;
use crate::moments::Moments;
use crate::plan::Candidate;
use crate::prepared::PrepareOptions;
use crate::problem::{LayerShape, Operand, Positions, Problem};
use crate::stages::NormOver;
use crate::tuning::Tuning;

/// A prepared layer on the CPU.
pub(crate) struct Layer {
    device: CpuDevice,
    isa: Supported,
    dtype: DType,
    terms: TermKind,
    /// The kernel that is forced.
    kernel: Option<&'static Kernel>,
    choices: Choices,
    packed: Arc<Packed>,
}

/// What all handles of a layer share.
pub(crate) struct Packed {
    weights: Weights,
    /// Of each channel; empty if the tensors hold f32, or if there is a normalisation.
    scale: Vec<f32>,
    bias: Vec<f32>,
    source_steps: Vec<SourceStep>,
    steps: Steps,
    norm: Option<Norm>,
    after_norm: Vec<Step>,
    dst_map: Option<Vec<u32>>,
    residual_map: Option<Vec<u32>>,
}

impl Deref for Layer {
    type Target = Packed;

    fn deref(&self) -> &Packed {
        &self.packed
    }
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
        mut lowered: Lowered,
        dtype: DType,
        options: &PrepareOptions,
    ) -> Result<Self> {
        let weight = std::mem::take(&mut lowered.weight);
        let weight = Unpacked::new(&weight, shape.groups, shape.k());
        let staged = !lowered.source_steps.is_empty();
        let chosen = choose_isa(Isa::detect()?, dtype, staged, options.kernel.as_deref())?;
        Ok(Self::with_kernels(device, shape, weight, lowered, dtype, chosen))
    }

    /// A layer on tensors of `dtype` whose weight is f32, and beside the description.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn of_f32(
        device: &CpuDevice,
        shape: &LayerShape,
        weight: Unpacked<'_>,
        lowered: Lowered,
        dtype: DType,
    ) -> Result<Self> {
        let chosen = choose_isa(Isa::detect()?, DType::F32, false, None)?;
        Ok(Self::with_kernels(device, shape, weight, lowered, dtype, chosen))
    }

    fn with_kernels(
        device: &CpuDevice,
        shape: &LayerShape,
        weight: Unpacked<'_>,
        mut lowered: Lowered,
        dtype: DType,
        (isa, terms, kernel): (Supported, TermKind, Option<&'static Kernel>),
    ) -> Self {
        // What does not fold into a weight of 16 bits, and what the epilogue of such results takes in
        // any case: see `TileEpilogue::scale`. A normalised layer's tiles are f32.
        let mut scale = Vec::new();
        if dtype != DType::F32 && lowered.norm.is_none() {
            scale.resize(shape.c_out, 1.0);
            let leads = matches!(lowered.steps.first(), Some(Step::Affine { .. }));
            if leads
                && lowered.bias.iter().all(|&b| b == 0.0)
                && let Step::Affine { scale: by, shift } = lowered.steps.remove(0)
            {
                (scale, lowered.bias) = (by, shift);
            }
        }
        Layer {
            device: device.clone(),
            isa,
            dtype,
            terms,
            kernel,
            choices: Choices::default(),
            packed: Arc::new(Packed {
                weights: Weights::pack(
                    device,
                    isa,
                    weight,
                    terms,
                    Sizes::of(isa.isa(), terms).panel_widths,
                ),
                scale,
                bias: lowered.bias,
                source_steps: lowered.source_steps,
                steps: Steps::new(lowered.steps),
                norm: lowered.norm,
                after_norm: lowered.after_norm,
                dst_map: lowered.dst_map,
                residual_map: lowered.residual_map,
            }),
        }
    }

    /// This layer, with what of a tuning is about it.
    pub(crate) fn with_tuning(&self, shape: &LayerShape, tuning: &Tuning) -> Self {
        self.with(self.kernel, Choices::of(self, shape, tuning))
    }

    /// This layer, with a kernel that is forced, or choices that were measured.
    pub(crate) fn with(&self, kernel: Option<&'static Kernel>, choices: Choices) -> Self {
        let (device, packed) = (self.device.clone(), self.packed.clone());
        Layer { device, kernel, choices, packed, ..*self }
    }

    /// Another layer of this shape, with this one's choices.
    pub(crate) fn choices_for(&self, other: Layer) -> Self {
        // The environment may have changed since this one was prepared.
        if (self.isa.isa(), self.terms) != (other.isa.isa(), other.terms) {
            return other;
        }
        let kernel = other.kernel;
        other.with(kernel, self.choices.clone())
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa.isa()
    }

    /// The kernels that its weight is packed for.
    pub(crate) fn kernels(&self) -> impl Iterator<Item = &'static Kernel> {
        plan::kernels(self.isa(), self.dtype, self.terms)
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(crate) fn threads(&self) -> usize {
        self.device.threads()
    }

    /// The kernel that would run a problem, and how.
    pub(crate) fn explain<T: Element>(&self, problem: &Problem<'_, T>) -> (&'static str, String) {
        let plan = self.plan(problem, self.kernel);
        let why = match self.kernel {
            Some(_) => "; forced",
            None if plan.tuned => "; tuned",
            None => "",
        };
        (plan.kernel.name, format!("{}{why}", plan.describe()))
    }

    /// Every kernel for its tensors' type, the chosen one first.
    pub(crate) fn plans<T: Element>(&self, problem: &Problem<'_, T>) -> Vec<Candidate> {
        let chosen = self.plan(problem, self.kernel);
        let others = KERNELS
            .iter()
            .rev()
            .filter(|kernel| kernel.dtype == self.dtype && kernel.name != chosen.kernel.name);
        let others = others.map(|kernel| Candidate {
            kernel: kernel.name,
            verdict: match refusal(kernel, !self.source_steps.is_empty()) {
                None => Ok(self.plan(problem, Some(kernel)).describe()),
                Some(reason) => Err(reason),
            },
        });
        let first = Candidate { kernel: chosen.kernel.name, verdict: Ok(chosen.describe()) };
        std::iter::once(first).chain(others).collect()
    }

    /// How a problem is cut, for the best kernel or a given one.
    pub(crate) fn plan<T: Element>(
        &self,
        problem: &Problem<'_, T>,
        kernel: Option<&'static Kernel>,
    ) -> Plan {
        let facts = Facts {
            isa: self.isa.isa(),
            terms: self.terms,
            forced: kernel,
            choices: &self.choices,
            weights: &self.weights,
            source_steps: !self.source_steps.is_empty(),
            norm_over: self.norm_over(),
            device: &self.device,
        };
        Plan::new(&facts, problem)
    }

    /// The ceilings for a problem of this cost.
    pub(crate) fn roof(&self, cost: &Cost) -> Roof {
        roof::measure(&self.device, self.dtype, cost.bytes())
    }

    /// Whether the whole of a position must be at hand before it is stored.
    fn norm_over(&self) -> Option<NormOver> {
        self.norm.as_ref().map(|norm| norm.over)
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cpu::Layer({} on {})", self.isa.isa().name(), self.device)
    }
}

/// One layer's share of a call.
struct Pass<'a, T> {
    layer: &'a Layer,
    problem: &'a Problem<'a, T>,
    plan: Plan,
    /// Moments of each block, for a normalisation over all positions.
    slots: Vec<Slot>,
    /// Of a pass whose units share copies: no other one has it. Otherwise 0.
    id: u64,
}

// SAFETY: the pointers of a problem are to tensors that the caller of a run has borrowed for its
// duration; units write to disjoint parts of dst.
unsafe impl<T> Sync for Pass<'_, T> {}

static PASSES: AtomicU64 = AtomicU64::new(1);

/// What a thread needs while it works on a unit.
#[derive(Default)]
struct Scratch {
    packed: Buffer,
    /// What `packed` and `parts` hold: pass, sample, first position, group.
    held: Option<(u64, usize, usize, usize)>,
    runs: Vec<Spaced>,
    rows: Buffer,
    /// The residual of `rows`, where it is not f32.
    added: Buffer,
    spare: Vec<f32>,
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
pub(crate) fn run<T: Element>(calls: &[(&Layer, &Problem<'_, T>)]) {
    match calls {
        [] => {}
        [(layer, problem)] => run_passes(&mut [Pass::new(layer, problem)]),
        // One pass has one device's threads.
        calls if !calls.iter().all(|(layer, _)| layer.device.is_same(&calls[0].0.device)) => {
            calls.chunks(1).for_each(run);
        }
        calls => {
            let mut passes: Vec<_> =
                calls.iter().map(|(layer, problem)| Pass::new(layer, problem)).collect();
            let shared = passes.iter().all(|pass| {
                (pass.plan.samples, pass.plan.positions)
                    == (passes[0].plan.samples, passes[0].plan.positions)
            });
            if shared {
                let blocks = passes.iter().map(|pass| pass.plan.per_sample()).max().unwrap_or(1);
                // Moments that are merged in other blocks would round otherwise.
                passes
                    .iter_mut()
                    .filter(|pass| pass.layer.norm_over() != Some(NormOver::All))
                    .for_each(|pass| pass.plan.cut_finer(blocks));
            }
            run_passes(&mut passes);
        }
    }
}

fn run_passes<T: Element>(passes: &mut [Pass<'_, T>]) {
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

fn run_units<T: Element>(passes: &[Pass<'_, T>]) {
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
        let passed = pass.problem.passed_channels();
        if passed > 0 && pass.problem.positions() > 0 {
            let work =
                pass.problem.n.saturating_mul(passed).saturating_mul(pass.problem.positions());
            device.for_each(pass.problem.n, work, &|sample| pass.copy_through(sample));
        }
    }
}

fn with_scratch(f: impl FnOnce(&mut Scratch)) {
    threads::with_scratch(&SCRATCH, f);
}

impl<'a, T: Element> Pass<'a, T> {
    fn new(layer: &'a Layer, problem: &'a Problem<'a, T>) -> Self {
        let plan = layer.plan(problem, layer.kernel);
        let id = if plan.copies_again() { PASSES.fetch_add(1, Ordering::Relaxed) } else { 0 };
        Pass { layer, problem, plan, slots: Vec::new(), id }
    }

    fn run_unit(&self, block: usize, unit: usize, scratch: &mut Scratch) {
        let (sample, positions) = self.plan.block(block);
        match self.layer.norm_over() {
            Some(over) => self.run_normalised(block, over, scratch),
            None => {
                let (group, split) = (unit / self.plan.splits, unit % self.plan.splits);
                let channels = self.plan.channels(&self.layer.weights, split);
                let Scratch { dst_offsets, residual_offsets, .. } = scratch;
                let (mut dst_table, mut residual_table) =
                    (std::mem::take(dst_offsets), std::mem::take(residual_offsets));
                let dst = self.dst(sample, &positions, &mut dst_table);
                let residual = self.residual(sample, &positions, &mut residual_table);
                self.multiply(sample, &positions, group, channels, dst, residual, scratch);
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
    ) -> epilogue::Operand<'t, *mut T> {
        let at = self.operand(
            &self.problem.dst,
            &self.plan.dst,
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
    ) -> Option<epilogue::Operand<'t, *const T>> {
        let (residual, walk) = self.problem.residual.as_ref().zip(self.plan.residual.as_ref())?;
        let map = self.layer.residual_map.as_deref();
        Some(self.operand(residual, walk, map, sample, positions, table))
    }

    fn operand<'t>(
        &self,
        operand: &Operand<T>,
        walk: &Positions,
        channels: Option<&'t [u32]>,
        sample: usize,
        positions: &Range<usize>,
        table: &'t mut Vec<isize>,
    ) -> epilogue::Operand<'t, *const T> {
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
        let copy = self.plan.copies_again().then_some((self.id, sample, positions.start, group));
        if copy.is_some() && copy == scratch.held {
            return;
        }
        scratch.held = copy;
        scratch.parts.clear();
        if self.plan.read != Read::InPlace {
            let block = pack::Block {
                isa: self.layer.isa,
                terms: self.layer.terms,
                steps: &self.layer.source_steps,
                gate: self.problem.gate.as_ref().map(|gate| {
                    (gate.ptr.wrapping_offset(sample as isize * gate.sample), gate.channel)
                }),
                channels: (start, k),
                positions: positions.len(),
                panels: Panels::new(self.plan.panel(positions.len()), positions.len()),
                gaps: self.problem.stride() == 2 && !self.plan.with_batch,
            };
            let out = scratch.packed.get(block.len(self.plan.read));
            // SAFETY: the problem is validated, and the block lies inside it.
            let part = unsafe {
                block.pack(self.plan.read, positions.start, sources, &mut scratch.runs, out)
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
                // A pair's position and channels lie in whole pairs, which is why it is read in place.
                let (k, position) = match self.layer.terms {
                    TermKind::F32 => (hi - lo, position),
                    TermKind::Bf16Pair => ((hi - lo) / 2, position / 2),
                };
                scratch.parts.push(Part {
                    k,
                    ptr: source.ptr.wrapping_offset(offset).cast(),
                    position,
                    channel: source.channel,
                    panels: None,
                });
            }
            channel += source.channels;
        }
    }

    /// Computes and stores channels of a group at a block of positions.
    #[expect(clippy::too_many_arguments, reason = "a unit is that many coordinates")]
    fn multiply<D: Element>(
        &self,
        sample: usize,
        positions: &Range<usize>,
        group: usize,
        channels: Range<usize>,
        dst: epilogue::Operand<'_, *mut D>,
        residual: Option<epilogue::Operand<'_, *const D>>,
        scratch: &mut Scratch,
    ) {
        self.source(sample, positions, group, scratch);
        let Scratch { parts, segments, .. } = scratch;
        let Plan { kernel, axis, order, .. } = self.plan;
        let weights = &self.layer.weights;
        let mut area = Area {
            weights,
            scale: &self.layer.scale,
            bias: &self.layer.bias,
            steps: &self.layer.steps,
            sizes: kernel.sizes,
            group,
            first_channel: group * (self.problem.c_out / self.problem.groups),
            parts,
            segments,
            dst,
            far_dst: self.plan.far_dst,
            residual,
        };
        let count = positions.len();
        // Panels of which the same rows are wanted are computed alike.
        let windows = weights.windows(channels);
        let each = || {
            let panels = |(panels, rows): (Range<usize>, Range<usize>)| {
                panels.map(move |panel| (panel..panel + 1, rows.clone()))
            };
            windows.clone().flat_map(panels)
        };
        match (axis, order) {
            (ChannelAxis::Rows, _) => {
                let (pieces, tail) = vectors_of(count, kernel);
                for piece in pieces {
                    let most = kernel.rows(piece.len);
                    match order {
                        Order::ChannelsOuter => {
                            for (panel, rows) in each() {
                                for rows in even(rows.clone(), most) {
                                    area.grid(axis, panel.clone(), rows, piece);
                                }
                            }
                        }
                        Order::PositionsOuter => {
                            for lanes in piece.each() {
                                for (panels, rows) in windows.clone() {
                                    for rows in even(rows.clone(), most) {
                                        area.grid(axis, panels.clone(), rows, lanes);
                                    }
                                }
                            }
                        }
                    }
                }
                // A few positions behind the last vector: lanes run along the channels instead.
                if let Some(tail) = tail {
                    let widest = kernel.sizes.widest(tail.len);
                    for (panels, rows) in windows {
                        for lanes in pieces_of(rows.clone(), widest) {
                            area.grid(axis.flipped(), panels.clone(), lanes, tail);
                        }
                    }
                }
            }
            (ChannelAxis::Lanes, Order::ChannelsOuter) => {
                for (panel, rows) in each() {
                    for lanes in pieces_of(rows.clone(), kernel.nr) {
                        for positions in even(0..count, kernel.rows(lanes.len)) {
                            area.grid(axis, panel.clone(), lanes, positions);
                        }
                    }
                }
            }
            (ChannelAxis::Lanes, Order::PositionsOuter) => {
                let widths = windows.clone().flat_map(|(_, rows)| pieces_of(rows, kernel.nr));
                let most = widths.map(|lanes| kernel.rows(lanes.len)).min().unwrap_or(1);
                for positions in even(0..count, most).flat_map(Run::each) {
                    for (panels, rows) in windows.clone() {
                        for lanes in pieces_of(rows.clone(), kernel.nr) {
                            area.grid(axis, panels.clone(), lanes, positions);
                        }
                    }
                }
            }
        }
    }

    /// A block of positions of a normalised layer: every channel into a block in cache, then to dst
    /// normalised, if a position's moments are those of its channels. Otherwise the block's moments
    /// are kept, and an f32 dst keeps its values.
    fn run_normalised(&self, block: usize, over: NormOver, scratch: &mut Scratch) {
        self.with_rows(block, scratch, |rows, residual, dst, spare| {
            let isa = self.layer.isa;
            match over {
                NormOver::Channels => {
                    self.finish(rows, |row| Moments::of(isa, row), residual, spare);
                }
                NormOver::All => self.slots[block].set(Moments::of(isa, rows)),
            }
            if over == NormOver::Channels || T::DTYPE == DType::F32 {
                // SAFETY: dst holds every channel and position of the block, and no other unit has
                // it.
                unsafe { norm::store(isa, rows, self.problem.c_out, &dst) };
            }
        });
    }

    /// Normalises a block with the moments of its whole sample. It is in dst; where dst would have
    /// rounded it, it is computed once more.
    fn normalise_block(&self, block: usize, scratch: &mut Scratch) {
        let (sample, positions) = self.plan.block(block);
        let channels = self.problem.c_out;
        let per_sample = self.plan.per_sample();
        let slots = &self.slots[sample * per_sample..][..per_sample];
        let moments = slots.iter().map(Slot::get).fold(Moments::default(), Moments::merge);
        let finish = |rows: &mut [f32],
                      residual: Option<epilogue::Operand<'_, *const f32>>,
                      dst: epilogue::Operand<'_, *mut T>,
                      spare: &mut Vec<f32>| {
            self.finish(rows, |_| moments, residual, spare);
            // SAFETY: dst holds every channel and position of the block, and no other unit has it.
            unsafe { norm::store(self.layer.isa, rows, channels, &dst) };
        };
        if T::DTYPE != DType::F32 {
            return self.with_rows(block, scratch, finish);
        }
        let dst = self.dst(sample, &positions, &mut scratch.dst_offsets);
        let residual = self.residual(sample, &positions, &mut scratch.residual_offsets);
        let residual = residual.map(|residual| residual.cast());
        let rows = scratch.rows.get(positions.len() * channels);
        // SAFETY: dst holds every channel and position of the block, and no other unit has it.
        unsafe { norm::load(rows, channels, &dst.read()) };
        finish(rows, residual, dst, &mut scratch.spare);
    }

    /// Computes a block of positions of a normalised layer up to the normalisation,
    /// `[positions][channels]`, and gives it to `f`, with the residual in f32, dst and memory to work
    /// in.
    fn with_rows(
        &self,
        block: usize,
        scratch: &mut Scratch,
        f: impl FnOnce(
            &mut [f32],
            Option<epilogue::Operand<'_, *const f32>>,
            epilogue::Operand<'_, *mut T>,
            &mut Vec<f32>,
        ),
    ) {
        let (sample, positions) = self.plan.block(block);
        let channels = self.problem.c_out;
        let (mut rows, mut added) =
            (std::mem::take(&mut scratch.rows), std::mem::take(&mut scratch.added));
        let (mut dst_table, mut residual_table) = (
            std::mem::take(&mut scratch.dst_offsets),
            std::mem::take(&mut scratch.residual_offsets),
        );
        fn by_row<P>(ptr: P, channels: usize) -> epilogue::Operand<'static, P> {
            let position_stride = channels as isize;
            let (channel_stride, channels, positions) = (1, None, None);
            epilogue::Operand { ptr, channel_stride, position_stride, channels, positions }
        }
        let values = rows.get(positions.len() * channels);
        let residual = self.residual(sample, &positions, &mut residual_table).map(|residual| {
            if T::DTYPE == DType::F32 {
                return residual.cast();
            }
            let added = added.get(positions.len() * channels);
            // SAFETY: the residual holds every channel and position of the block.
            unsafe { norm::load(added, channels, &residual) };
            by_row(added.as_ptr(), channels)
        });
        for group in 0..self.problem.groups {
            let rows = 0..self.layer.weights.rows_per_group();
            let into = by_row(values.as_mut_ptr(), channels);
            self.multiply(sample, &positions, group, rows, into, residual, scratch);
        }
        let dst = self.dst(sample, &positions, &mut dst_table);
        f(values, residual, dst, &mut scratch.spare);
        (scratch.rows, scratch.added) = (rows, added);
        (scratch.dst_offsets, scratch.residual_offsets) = (dst_table, residual_table);
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
                let at = |operand: &Operand<T>| {
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

#[cfg(test)]
mod tests {
    use ndarray::{Array2, ArrayView4};

    use super::*;
    use crate::Pointwise;
    use crate::problem::Operands;
    use crate::tensor::{AsTensor, AsTensorMut, nhwc, nhwc_mut};

    /// The units of a plan, as (positions, channels) of one sample and group.
    fn units(layer: &Layer, plan: &Plan) -> Vec<(Range<usize>, Range<usize>)> {
        let splits = |block| {
            (0..plan.splits)
                .map(move |split| (plan.block(block).1, plan.channels(&layer.weights, split)))
        };
        (0..plan.blocks()).flat_map(splits).collect()
    }

    #[test]
    fn units_cover_a_problem_once() {
        for (rows, k, stride) in [(192, 960, 1), (160, 1152, 1), (2048, 1024, 2), (24, 144, 1)] {
            for threads in [1, 2, 3, 16] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let device = CpuDevice::with_pool(Arc::new(pool));
                let layer = Pointwise::new(Array2::<f32>::zeros((rows, k))).stride(stride);
                let shape = LayerShape::new(&layer);
                let layer = Layer::new(
                    &device,
                    &shape,
                    Lowered::new(&layer, DType::F32),
                    DType::F32,
                    &Default::default(),
                )
                .unwrap();
                for side in [1usize, 7, 13, 28] {
                    let small = side.div_ceil(stride);
                    let (src, mut dst) =
                        (vec![0.0; side * side * k], vec![0.0; small * small * rows]);
                    for last in [false, true] {
                        let (src, dst) = (
                            ArrayView4::from_shape(
                                if last { [1, side, side, k] } else { [1, k, side, side] },
                                &src,
                            ),
                            ndarray::ArrayViewMut4::from_shape(
                                if last {
                                    [1, small, small, rows]
                                } else {
                                    [1, rows, small, small]
                                },
                                &mut dst,
                            ),
                        );
                        let (src, mut dst) = match last {
                            true => (nhwc(src.unwrap()), nhwc_mut(dst.unwrap())),
                            false => (src.unwrap(), dst.unwrap()),
                        };
                        let operands = Operands {
                            src: src.as_tensor().unwrap(),
                            more: &[],
                            residual: None,
                            gate: None,
                        };
                        let mut dst = dst.as_tensor_mut().unwrap();
                        let problem = Problem::new(&shape, &operands, &mut dst).unwrap();
                        let plan = layer.plan(&problem, None);
                        let units = units(&layer, &plan);
                        let count = small * small;
                        let mut seen = vec![0u8; count * rows];
                        for (positions, channels) in &units {
                            assert!(!positions.is_empty() && !channels.is_empty());
                            for p in positions.clone() {
                                for (panels, window) in layer.weights.windows(channels.clone()) {
                                    for panel in panels {
                                        let first = panel * layer.weights.width();
                                        (window.clone())
                                            .for_each(|row| seen[p * rows + first + row] += 1);
                                    }
                                }
                            }
                        }
                        assert!(seen.iter().all(|&times| times == 1), "{rows} {k} {side} {plan:?}");
                    }
                }
            }
        }
    }
}
