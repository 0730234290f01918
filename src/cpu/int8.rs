//! Layers of 8-bit integers: how a call is cut into units, and a unit into tiles.
//!
//! As in f32, one operand of a tile is broadcast and the other one read in vectors. Where the
//! channels of dst are adjacent, vectors run along them and src is broadcast, in place if it can be;
//! otherwise they run along positions and the weight is broadcast. `pack` makes words of what is
//! not read in place, `quantize` bytes of sources that are real, `sums` multiplies, `bytes` and `finish`
//! make dst of the sums, `kernels` has the code of all that for each instruction set.

mod bytes;
mod finish;
mod kernels;
mod pack;
mod quantize;
mod sums;

use std::cell::{Cell, RefCell, UnsafeCell};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use bytes::{Bytes, Strip};
pub(crate) use finish::{Added, Clip, Scaling};
use finish::{CHUNK, Finish, Operand, Stored};
use kernels::{FinishFn, KERNELS, Kernel};
use pack::{Source, Weights, Words};
use quantize::{Element, PerPosition, Reach, Table};
use sums::{MOST_ROWS, SUMS_STRIDE, Tile};

use crate::cpu::isa::{Isa, Supported};
use crate::cpu::plan::{Run, even, pieces_of, vectors_and_tail};
use crate::cpu::threads::{CpuDevice, with_scratch};
use crate::dtype::{bf16, f16};
use crate::error::{Error, Result};
use crate::plan::{Candidate, forced_kernel};
use crate::problem::{DstShape, LayerShape, Positions};
use crate::quantized::Per;
use crate::tensor::{MAX_RANK, TensorMut, TensorRef};

/// Bytes of src that a unit works on: they stay in the second cache level while the weights pass.
const BLOCK_BYTES: usize = 192 << 10;

/// Independent chains of an instruction set's fastest products of bytes; gives how many operations so
/// many rounds are, two per product.
pub(crate) fn peak_rounds(isa: Supported, rounds: usize) -> usize {
    let kernel = Kernel::of(isa);
    // SAFETY: the CPU has the kernel's instructions.
    let products = unsafe { (kernel.chains)(rounds) };
    2 * kernel.group * products
}

/// A prepared layer of 8-bit integers on the CPU.
#[derive(Clone)]
pub(crate) struct Layer {
    device: CpuDevice,
    kernel: &'static Kernel,
    packed: Arc<Packed>,
}

/// What all clones of a layer share.
struct Packed {
    weights: Weights,
    offset: Vec<i32>,
    scale: Vec<f32>,
    shift: Vec<f32>,
    per: Option<Per>,
    scaling: Scaling,
    /// Of a dst of bytes that the sums alone make.
    bytes: Option<Bytes>,
    src_flip: u8,
    shape: LayerShape,
}

/// A layer as the backend takes it. Of bytes: `dst = finish((Σ w · (src ^ src_flip) + offset) · scale)`,
/// where the sums are over unsigned bytes. Of real numbers, which `s` and `z` quantise:
/// `dst = finish((Σ w · byte(src) - z · offset) · (s · scale) + shift)`.
pub(crate) struct Lowered<'a> {
    pub shape: LayerShape,
    /// `[c_out, c_in / groups]`, row-major.
    pub weight: &'a [i8],
    /// One per output channel.
    pub offset: Vec<i32>,
    /// One per output channel.
    pub scale: Vec<f32>,
    /// One per output channel; of real numbers only.
    pub shift: Vec<f32>,
    /// What shares a quantisation, if src is real.
    pub per: Option<Per>,
    pub scaling: Scaling,
    pub src_flip: u8,
}

/// The tensors of one call, which have been checked against the layer: bytes of either sign, or real
/// numbers.
pub(crate) struct Call<'a, T, R: Added> {
    pub shape: DstShape,
    pub src: TensorRef<'a, R::Source>,
    pub residual: Option<TensorRef<'a, R>>,
    pub dst: TensorMut<'a, T>,
}

/// A result's element, and which of a kernel's functions makes it beside residuals of `R`.
pub(crate) trait Output<R: Added>: Stored {
    fn finish(kernel: &Kernel) -> FinishFn<Self, R>;
}

macro_rules! outputs {
    ($($t:ty, $r:ty: $finish:ident;)*) => {$(
        impl Output<$r> for $t {
            fn finish(kernel: &Kernel) -> FinishFn<$t, $r> {
                kernel.$finish
            }
        }
    )*};
}
outputs! {
    u8, u8: finish_u8;
    f32, u8: finish_f32;
    f16, u8: finish_f16;
    bf16, u8: finish_bf16;
    f32, f32: finish_real_f32;
    f16, f16: finish_real_f16;
    bf16, bf16: finish_real_bf16;
}

impl Layer {
    /// Packs a layer.
    ///
    /// # Errors
    /// [`Error::Environment`] for an instruction set that is unknown or not there, [`Error::Kernel`] for
    /// a forced kernel that is.
    pub(crate) fn new(
        device: &CpuDevice,
        kernel: Option<&str>,
        lowered: Lowered<'_>,
    ) -> Result<Self> {
        let isa = Isa::detect()?;
        let names: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
        let kernel = match forced_kernel(kernel, &names)? {
            None => Kernel::of(isa),
            Some(name) => {
                let kernel = KERNELS.iter().find(|kernel| kernel.name == name);
                let kernel = kernel.expect("it is one of the names");
                if !kernel.supported() {
                    let reason = "this CPU does not have its instructions".into();
                    return Err(Error::Kernel { kernel: name.into(), reason });
                }
                kernel
            }
        };
        Ok(Layer::with_kernel(device, kernel, lowered))
    }

    fn with_kernel(device: &CpuDevice, kernel: &'static Kernel, lowered: Lowered<'_>) -> Self {
        let Lowered { shape, weight, mut offset, mut scale, mut shift, per, scaling, src_flip } =
            lowered;
        let rows = shape.c_out / shape.groups;
        let weights = Weights::pack(weight, rows, shape.k(), kernel.group, kernel.lanes);
        let small = !shape.residual && scale.iter().all(|&scale| scale < 1.0);
        let Scaling { clip, zero_point, flip, .. } = scaling;
        let bytes = small.then(|| Bytes::new(clip, zero_point, flip));
        // They are read a whole chunk at a time.
        offset.resize(shape.c_out + CHUNK, 0);
        scale.resize(shape.c_out + CHUNK, 0.0);
        shift.resize(shape.c_out + CHUNK, 0.0);
        let packed = Packed { weights, offset, scale, shift, per, scaling, bytes, src_flip, shape };
        Layer { device: device.clone(), kernel, packed: Arc::new(packed) }
    }

    /// The kernel that runs it.
    pub(crate) fn kernel(&self) -> &'static str {
        self.kernel.name
    }

    /// Every kernel, the one that runs it first.
    pub(crate) fn plans(&self) -> Vec<Candidate> {
        let mut kernels: Vec<_> = KERNELS.iter().collect();
        kernels.sort_by_key(|kernel| kernel.name != self.kernel.name);
        let candidate = |kernel: &Kernel| Candidate {
            kernel: kernel.name,
            verdict: match kernel.supported() {
                true => Ok("any layer".into()),
                false => Err("this CPU does not have its instructions".into()),
            },
        };
        kernels.into_iter().map(|kernel| candidate(kernel)).collect()
    }

    /// Which values of a source share a quantisation that a call finds, if one does.
    pub(crate) fn per(&self) -> Option<Per> {
        self.packed.per
    }

    /// Runs a call.
    pub(crate) fn run<T: Output<R>, R: Added>(&self, call: &Call<'_, T, R>) {
        // Taken, so that nothing is borrowed while units run.
        let mut reaches = SAMPLES.take();
        let pass = Pass::new(self, call, &mut reaches);
        if !pass.samples.is_empty() {
            let (units, work) = pass.reading(call);
            self.device.for_each(units, work, &|unit| {
                with_scratch(&SCRATCH, |scratch| pass.read_ranges(unit, call, scratch));
            });
        }
        let work = pass.macs / 4 + pass.bytes / 4;
        self.device.for_each(pass.units(), work, &|unit| {
            with_scratch(&SCRATCH, |scratch| pass.run_unit(unit, scratch));
        });
        SAMPLES.set(reaches);
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cpu::int8::Layer({} on {})", self.kernel.name, self.device)
    }
}

/// What a thread needs while it works on a unit.
#[derive(Default)]
struct Scratch {
    packed: Words,
    /// What `packed` holds: pass, block, group.
    held: Option<(u64, usize, usize)>,
    src: Offsets,
    dst: Offsets,
    residual: Offsets,
    reaches: Vec<Reach>,
    /// The quantisations of a block's positions, and which pass and block that is.
    quantization: Table,
    quantized: Option<(u64, usize)>,
}

/// Where the positions of a block are in a tensor.
#[derive(Default)]
struct Offsets {
    /// Each one's distance from the block's base.
    values: Vec<isize>,
    /// The step between values, if it is the same between all: then they serve the next block, too.
    step: Option<isize>,
}

impl Offsets {
    /// Those of some positions, and their base.
    fn of(&mut self, positions: &Positions, range: Range<usize>) -> (isize, &[isize]) {
        let count = range.len();
        let Some(step) = positions.uniform() else {
            self.step = None;
            self.values.resize(count, 0);
            positions.fill(range.start, 0, &mut self.values);
            return (0, &self.values);
        };
        if self.step != Some(step) || self.values.len() < count {
            self.step = Some(step);
            self.values.clear();
            self.values.extend((0..count as isize).map(|i| i.wrapping_mul(step)));
        }
        (step.wrapping_mul(range.start as isize), &self.values[..count])
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// Those of a call's samples.
    static SAMPLES: Cell<Vec<SharedReach>> = const { Cell::new(Vec::new()) };
}

/// A [`Reach`] that units widen together.
#[derive(Default)]
struct SharedReach {
    above: AtomicI32,
    below: AtomicI32,
}

impl SharedReach {
    fn widen(&self, reach: Reach) {
        self.above.fetch_max(reach.above, Ordering::Relaxed);
        self.below.fetch_max(reach.below, Ordering::Relaxed);
    }

    fn get(&self) -> Reach {
        let [above, below] = [&self.above, &self.below].map(|bits| bits.load(Ordering::Relaxed));
        Reach { above, below }
    }
}

static PASSES: AtomicU64 = AtomicU64::new(1);

/// A tensor of a call: positions run over all samples.
struct Walked<T> {
    ptr: *mut T,
    channel: isize,
    positions: Positions,
}

impl<T> Walked<T> {
    /// So many positions along each axis, every `stride`-th one of the spatial ones.
    fn new(tensor: &TensorRef<'_, T>, lengths: &[usize], stride: usize) -> Self {
        let strides = tensor.strides();
        let mut axes = [(1, 0); MAX_RANK - 1];
        axes[0] = (lengths[0], strides[0]);
        for axis in 2..lengths.len() {
            axes[axis - 1] = (lengths[axis], strides[axis].wrapping_mul(stride as isize));
        }
        Walked {
            ptr: tensor.as_ptr().cast_mut(),
            channel: strides[1],
            positions: Positions::new(&axes),
        }
    }

    /// Some channels at a block's positions, from the `first` on.
    fn at(&self, channel: usize, (base, table): (isize, &[isize]), first: usize) -> Operand<T> {
        Operand {
            ptr: self.ptr.wrapping_offset(base + channel as isize * self.channel),
            channel: self.channel,
            positions: table[first..].as_ptr(),
            adjacent: self.positions.uniform() == Some(1),
        }
    }
}

/// How src is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    /// Where it is, with this distance between positions.
    InPlace(isize),
    /// Copied, a row of words per position.
    Rows,
    /// Copied into panels of so many positions, in which words of neighbours are adjacent.
    Panels(usize),
}

/// One call, and how it is cut.
struct Pass<'a, T, R: Added> {
    layer: &'a Layer,
    src: Walked<R::Source>,
    dst: Walked<T>,
    residual: Option<Walked<R>>,
    /// How far values of src reach, where more than a position's share a quantisation: one for all
    /// samples, or one for each.
    samples: &'a [SharedReach],
    lanes_are_channels: bool,
    read: Read,
    /// Positions over all samples, and how many a block has.
    positions: usize,
    block: usize,
    /// Output channels of a group that a unit has.
    rows: usize,
    macs: usize,
    bytes: usize,
    id: u64,
}

// SAFETY: the pointers are to tensors that the caller of a run has borrowed for its duration; units
// write to disjoint parts of dst.
unsafe impl<T, R: Added> Sync for Pass<'_, T, R> {}

impl<'a, T: Output<R>, R: Added> Pass<'a, T, R> {
    fn new(layer: &'a Layer, call: &Call<'_, T, R>, reaches: &'a mut Vec<SharedReach>) -> Self {
        let Layer { device, kernel, packed } = layer;
        let LayerShape { c_in, c_out, groups, stride, .. } = packed.shape;
        let k = packed.shape.k();
        let lengths = call.shape.as_slice();
        let src = Walked::new(&call.src, lengths, stride);
        let dst = Walked::new(call.dst.view(), lengths, 1);
        let residual = call.residual.as_ref().map(|residual| Walked::new(residual, lengths, 1));
        let samples = match packed.per {
            Some(Per::Tensor) => 1,
            Some(Per::Sample) => lengths[0],
            Some(Per::Position) | None => 0,
        };
        reaches.clear();
        reaches.resize_with(samples, SharedReach::default);
        let positions = lengths[0] * lengths[2..].iter().product::<usize>();

        let adjacent_positions =
            positions > 1 && dst.positions.runs(0, 2).next().is_some_and(|(_, step, _)| step == 1);
        let lanes_are_channels = dst.channel == 1 || !adjacent_positions;
        let in_place = !R::REAL && kernel.group == 4 && k.is_multiple_of(4) && packed.src_flip == 0;
        let read = match src.positions.uniform() {
            Some(step) if lanes_are_channels && src.channel == 1 && in_place => Read::InPlace(step),
            _ if lanes_are_channels && (src.channel == 1 || k == 1) => Read::Rows,
            _ => Read::Panels(kernel.widest()),
        };

        let macs = [positions, c_out, k].into_iter().fold(1usize, usize::saturating_mul);
        let bytes = c_in * size_of::<R::Source>() + c_out * size_of::<T>();
        let bytes = positions.saturating_mul(bytes);
        let threads = device.threads_for(macs / 4 + bytes / 4);
        let tile =
            if lanes_are_channels { kernel.rows[kernel.rows.len() - 1] } else { kernel.widest() };
        let per_group = c_out / groups;
        let wanted = if threads < 2 { 1 } else { (4 * threads).div_ceil(groups) };
        // Blocks for the cache; more of them for threads, as long as each has some tiles; where
        // that does not do, the channels are split too.
        let blocks = positions.div_ceil((BLOCK_BYTES / k).max(4 * tile));
        let blocks = blocks.max(wanted.min(positions / (4 * tile))).max(1);
        let block = positions.div_ceil(blocks).max(1);
        let block = if lanes_are_channels { block } else { block.next_multiple_of(tile) };
        let blocks = positions.div_ceil(block).max(1);
        let splits = if blocks * groups < 2 * threads && threads > 1 {
            wanted.div_ceil(blocks).min(per_group.div_ceil(kernel.widest().max(kernel.lanes)))
        } else {
            1
        };
        let rows = per_group.div_ceil(splits.max(1)).next_multiple_of(kernel.lanes);
        let id = PASSES.fetch_add(1, Ordering::Relaxed);
        Pass {
            layer,
            src,
            dst,
            residual,
            samples: reaches,
            lanes_are_channels,
            read,
            positions,
            block,
            rows,
            macs,
            bytes,
            id,
        }
    }

    /// Units per block and group.
    fn splits(&self) -> usize {
        self.rows_per_group().div_ceil(self.rows)
    }

    fn rows_per_group(&self) -> usize {
        self.layer.packed.shape.c_out / self.layer.packed.shape.groups
    }

    fn units(&self) -> usize {
        self.positions.div_ceil(self.block) * self.layer.packed.shape.groups * self.splits()
    }

    /// Units that find the ranges of src, and how much work that is: blocks of all its positions,
    /// those too that the stride skips.
    fn reading(&self, call: &Call<'_, T, R>) -> (usize, usize) {
        let values = call.src.shape().iter().product::<usize>();
        (self.positions_of(call).div_ceil(self.reading_block()), values / 4)
    }

    fn positions_of(&self, call: &Call<'_, T, R>) -> usize {
        let shape = call.src.shape();
        shape[0] * shape[2..].iter().product::<usize>()
    }

    /// Positions of a unit of [`reading`](Self::reading).
    fn reading_block(&self) -> usize {
        (BLOCK_BYTES / size_of::<f32>() / self.layer.packed.shape.c_in).max(16)
    }

    fn read_ranges(&self, unit: usize, call: &Call<'_, T, R>, scratch: &mut Scratch) {
        let Scratch { src: offsets, reaches, .. } = scratch;
        let (all, first) = (self.positions_of(call), unit * self.reading_block());
        let per_sample = all / call.src.shape()[0];
        let src = Walked::new(&call.src, call.src.shape(), 1);
        self.reaches(&src, first..all.min(first + self.reading_block()), offsets, reaches);
        let (mut rest, mut first) = (&reaches[..], first);
        while !rest.is_empty() {
            // One step per sample, or all at once where they share a range.
            let (sample, last) = match self.samples.len() {
                1 => (0, all),
                _ => (first / per_sample, (first / per_sample + 1) * per_sample),
            };
            let (now, later) = rest.split_at(rest.len().min(last - first));
            self.samples[sample].widen(now.iter().copied().fold(Reach::default(), Reach::and));
            (rest, first) = (later, first + now.len());
        }
    }

    /// How far the channels of src reach at each of some positions.
    fn reaches(
        &self,
        src: &Walked<R::Source>,
        range: Range<usize>,
        offsets: &mut Offsets,
        reaches: &mut Vec<Reach>,
    ) {
        reaches.clear();
        reaches.resize(range.len(), Reach::default());
        let (base, positions) = offsets.of(&src.positions, range);
        let source = Source {
            ptr: src.ptr.cast_const().wrapping_offset(base),
            channel: src.channel,
            positions,
            k: self.layer.packed.shape.c_in,
            flip: 0,
            quantization: PerPosition::default(),
        };
        // SAFETY: the CPU has the kernel's instructions, and the call was checked: all channels lie in
        // src at every position.
        unsafe { (R::Source::packing(self.layer.kernel).ranges)(&source, reaches) }
    }

    /// The quantisations of a block of src.
    fn quantize(&self, block: usize, positions: Range<usize>, scratch: &mut Scratch) {
        let Scratch { src, reaches, quantization, quantized, .. } = scratch;
        if *quantized == Some((self.id, block)) {
            return;
        }
        if self.samples.is_empty() {
            self.reaches(&self.src, positions, src, reaches);
            quantization.fill(reaches.iter().copied());
        } else {
            let per_sample = self.positions / self.samples.len();
            quantization.fill(positions.map(|p| self.samples[p / per_sample].get()));
        }
        *quantized = Some((self.id, block));
    }

    fn run_unit(&self, unit: usize, scratch: &mut Scratch) {
        let Packed { shape, src_flip, weights, .. } = &*self.layer.packed;
        let kernel = self.layer.kernel;
        let (rest, split) = (unit / self.splits(), unit % self.splits());
        let (block, group) = (rest / shape.groups, rest % shape.groups);
        let first = block * self.block;
        let count = (self.positions - first).min(self.block);
        if R::REAL {
            self.quantize(block, first..first + count, scratch);
        }
        let Scratch { packed, held, src, dst, residual, quantization, .. } = scratch;
        let quantization = if R::REAL { quantization.get() } else { PerPosition::default() };
        let dst = dst.of(&self.dst.positions, first..first + count);
        let residual = match &self.residual {
            Some(walked) => residual.of(&walked.positions, first..first + count),
            None => (0, &[][..]),
        };

        let k = shape.k();
        let ptr = self.src.ptr.wrapping_offset((group * k) as isize * self.src.channel);
        let a_or_b = match self.read {
            Read::InPlace(step) => ptr.cast_const().wrapping_offset(first as isize * step).cast(),
            Read::Rows | Read::Panels(_) => {
                if *held != Some((self.id, block, group)) {
                    let (base, positions) = src.of(&self.src.positions, first..first + count);
                    let ptr = ptr.wrapping_offset(base);
                    let (channel, flip) = (self.src.channel, *src_flip);
                    let source = Source { ptr, channel, positions, k, flip, quantization };
                    let packing = R::Source::packing(kernel);
                    // SAFETY: the CPU has the kernel's instructions, and the call was checked: the
                    // channels of the group lie in src at every position.
                    unsafe {
                        match self.read {
                            Read::Panels(width) => {
                                let len = count.next_multiple_of(width) * weights.k_words;
                                (packing.panels)(&source, width, packed.get(len));
                            }
                            _ => (packing.rows)(&source, packed.get(count * weights.k_words)),
                        }
                    }
                    *held = Some((self.id, block, group));
                }
                packed.as_ptr().cast()
            }
        };
        let rows = split * self.rows..((split + 1) * self.rows).min(self.rows_per_group());
        let sums = Sums(UnsafeCell::new([0; MOST_ROWS * SUMS_STRIDE]));
        let area = Area { pass: self, group, src: a_or_b, dst, residual, quantization, sums };
        if self.lanes_are_channels {
            area.channels(rows, count)
        } else {
            area.positions(rows, count)
        }
    }
}

/// A unit's tiles.
struct Area<'a, T, R: Added> {
    pass: &'a Pass<'a, T, R>,
    group: usize,
    /// The block's src, as [`Read`] says.
    src: *const u8,
    /// Where the block's positions are in dst and in the residual: their base, and how far from it.
    dst: (isize, &'a [isize]),
    residual: (isize, &'a [isize]),
    /// Of the block's positions, if src is real.
    quantization: PerPosition<'a>,
    /// Those of the tile at hand.
    sums: Sums,
}

/// The sums of a tile, on cache lines.
#[repr(align(64))]
struct Sums(UnsafeCell<[i32; MOST_ROWS * SUMS_STRIDE]>);

impl<T: Output<R>, R: Added> Area<'_, T, R> {
    /// Vectors run along the channels.
    fn channels(&self, rows: Range<usize>, count: usize) {
        let kernel = self.pass.layer.kernel;
        // Positions of one tile lie in one panel.
        let width = match self.pass.read {
            Read::Panels(width) => width,
            _ => count.max(1),
        };
        for panel in self.panels(&rows) {
            for lanes in pieces_of(panel, kernel.widest()).flat_map(Run::each) {
                for panel in pieces_of(0..count, width).flat_map(Run::each) {
                    let positions = panel.first..panel.first + panel.len;
                    for positions in even(positions, kernel.most_rows(lanes.len)) {
                        self.across(lanes.first..lanes.first + lanes.len, positions);
                    }
                }
            }
        }
    }

    /// Vectors run along the positions, but for a few behind the last vector.
    fn positions(&self, rows: Range<usize>, count: usize) {
        let kernel = self.pass.layer.kernel;
        let (pieces, tail) = vectors_and_tail(count, kernel.lanes, kernel.widest());
        for piece in pieces.flat_map(Run::each) {
            for panel in self.panels(&rows) {
                for rows in even(panel, kernel.most_rows(piece.len)) {
                    self.along(rows, piece.first..piece.first + piece.len);
                }
            }
        }
        if let Some(tail) = tail {
            for panel in self.panels(&rows) {
                for lanes in pieces_of(panel, kernel.widest()).flat_map(Run::each) {
                    self.across(lanes.first..lanes.first + lanes.len, tail);
                }
            }
        }
    }

    /// The weight's panels, cut down to some rows.
    fn panels(&self, rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<'_, T, R> {
        let weights = &self.pass.layer.packed.weights;
        let rows = rows.clone();
        let panels = rows.start / pack::PANEL..rows.end.div_ceil(pack::PANEL);
        panels.map(move |panel| weights.rows_of(panel, &rows))
    }

    /// Tiles with lanes along the channels.
    fn across(&self, channels: Range<usize>, positions: Run) {
        let Pass { layer, read, .. } = self.pass;
        let weights = &layer.packed.weights;
        let k_words = weights.k_words;
        let first = positions.first;
        let (a, a_row, a_word) = match *read {
            Read::InPlace(step) => (first as isize * step, step, 4),
            Read::Rows => {
                let row = 4 * k_words as isize;
                (first as isize * row, row, 4)
            }
            Read::Panels(width) => {
                let (panel, within) = (first / width, first % width);
                (4 * (panel * width * k_words + within) as isize, 4, 4 * width as isize)
            }
        };
        let tile = Tile {
            a: self.src.wrapping_offset(a),
            a_row,
            a_word,
            b: weights.row(self.group, channels.start),
            b_word: weights.stride(channels.start / pack::PANEL),
            words: k_words,
            rows: positions.len,
            vectors: channels.len().div_ceil(layer.kernel.lanes),
            weight_is_a: false,
        };
        self.run(tile, positions, channels);
    }

    /// Tiles with lanes along the positions.
    fn along(&self, channels: Run, positions: Range<usize>) {
        let Pass { layer, read, .. } = self.pass;
        let weights = &layer.packed.weights;
        let Read::Panels(width) = *read else { unreachable!("src is packed into panels") };
        let (panel, within) = (positions.start / width, positions.start % width);
        let b = panel * width * weights.k_words + within;
        let tile = Tile {
            a: weights.row(self.group, channels.first).cast(),
            a_row: 4,
            a_word: 4 * weights.stride(channels.first / pack::PANEL) as isize,
            b: self.src.cast::<u32>().wrapping_add(b),
            b_word: width,
            words: weights.k_words,
            rows: channels.len,
            vectors: positions.len().div_ceil(layer.kernel.lanes),
            weight_is_a: true,
        };
        self.run(tile, channels, positions);
    }

    /// Tiles one after another along their rows, of which the first is given.
    fn run(&self, tile: Tile, rows: Run, lanes: Range<usize>) {
        let Pass { layer, dst, residual, .. } = self.pass;
        let Packed { offset, scale, shift, scaling, bytes, .. } = &*layer.packed;
        let before = self.group * self.pass.rows_per_group();
        let lanes_are_channels = !tile.weight_is_a;
        // Channel and position of a tile's first element.
        let at = |row: usize| match lanes_are_channels {
            true => (before + lanes.start, row),
            false => (before + row, lanes.start),
        };
        let (channel, position) = at(rows.first);
        if let (true, &Some(bytes)) = (T::BYTE, bytes) {
            let to = dst.at(channel, self.dst, position);
            let adjacent = match lanes_are_channels {
                true => to.channel == 1,
                false => to.adjacent || adjacent(&self.dst.1[lanes.clone()]),
            };
            if adjacent {
                let first = if lanes_are_channels { 0 } else { self.dst.1[position] };
                let strip = Strip {
                    tile,
                    tiles: rows.tiles,
                    lanes: lanes.len(),
                    offset: offset[channel..].as_ptr(),
                    scale: scale[channel..].as_ptr(),
                    dst: to.ptr.wrapping_offset(first).cast(),
                    channel: to.channel,
                    positions: to.positions,
                    bytes,
                };
                // SAFETY: as below; lanes of dst are adjacent, and its elements are bytes.
                return unsafe { (layer.kernel.strip)(&strip) };
            }
        }
        for (t, rows) in rows.each().enumerate() {
            let (channel, position) = at(rows.first);
            let tile =
                Tile { a: tile.a.wrapping_offset((t * rows.len) as isize * tile.a_row), ..tile };
            let finish = Finish {
                sums: self.sums.0.get().cast(),
                rows: rows.len,
                lanes: lanes.len(),
                lanes_are_channels,
                offset: offset[channel..].as_ptr(),
                scale: scale[channel..].as_ptr(),
                shift: shift[channel..].as_ptr(),
                quantization: match R::REAL {
                    true => self.quantization.from(position),
                    false => PerPosition::default(),
                },
                scaling: *scaling,
                dst: dst.at(channel, self.dst, position),
                residual: residual.as_ref().map(|r| r.at(channel, self.residual, position)),
            };
            // SAFETY: the CPU has the kernel's instructions; the block lies inside src or its copy, the
            // rows and lanes inside the packed weight, which is as wide as whole vectors (and so are
            // the copy's panels); the call was checked, and the tables have the block's positions.
            // Nobody else uses the sums.
            unsafe {
                (layer.kernel.sum)(&tile, self.sums.0.get().cast());
                T::finish(layer.kernel)(&finish);
            }
        }
    }
}

/// Whether positions lie side by side.
fn adjacent(positions: &[isize]) -> bool {
    positions.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1))
}

#[cfg(test)]
mod tests;
