//! What happens to a tile of sums before its only store: bias, steps, residual, placement.
//!
//! A tile has *rows* (one accumulator register row each) and *lanes*; either may run along the
//! output channels. Lists of steps that networks use are recognised when the layer is prepared
//! and run on the accumulators in registers; every other list, and every dst whose lanes are not
//! contiguous, goes through a buffer of one tile that stays in L1.

use crate::cpu::simd::Simd;
use crate::epilogue::Step;
use crate::stages::Activation;
use std::mem::MaybeUninit;
use std::ptr;

mod buffered;

pub(crate) use buffered::finish_buffered;

/// Which direction of a tile runs along the output channels; positions run along the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChannelAxis {
    /// Each row is a channel, lanes are positions.
    Rows,
    /// Each row is a position, lanes are channels.
    Lanes,
}

impl ChannelAxis {
    /// The other direction.
    pub(crate) fn flipped(self) -> Self {
        match self {
            ChannelAxis::Rows => ChannelAxis::Lanes,
            ChannelAxis::Lanes => ChannelAxis::Rows,
        }
    }
}

/// A tensor that a tile reads (`P = *const f32`) or writes (`P = *mut f32`), placed by channel
/// and position. Strides and tables are in elements.
///
/// Channel `c` of the layer at position `j` of the tile lies at
/// `ptr + map(c) * channel_stride + position(j)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand<'a, P> {
    /// Channel 0 of the layer at position 0 of the tile (before `positions` is added).
    pub ptr: P,
    /// Distance of neighbouring channels.
    pub channel_stride: isize,
    /// Distance of neighbouring positions, unless `positions` gives them.
    pub position_stride: isize,
    /// `map(c)` for every channel of the layer: a channel shuffle. `None` is the identity.
    pub channels: Option<&'a [u32]>,
    /// Offset of each position of the tile. `None` is `j * position_stride`.
    pub positions: Option<&'a [isize]>,
}

/// A pointer to move.
pub(crate) trait Offset {
    /// `elements` further on.
    fn by(self, elements: isize) -> Self;
}

impl Offset for *const f32 {
    fn by(self, elements: isize) -> Self {
        self.wrapping_offset(elements)
    }
}

impl Offset for *mut f32 {
    fn by(self, elements: isize) -> Self {
        self.wrapping_offset(elements)
    }
}

impl<P> Operand<'_, P> {
    #[inline(always)]
    fn channel_offset(&self, channel: usize) -> isize {
        self.channels.map_or(channel, |map| map[channel] as usize) as isize * self.channel_stride
    }

    #[inline(always)]
    fn position_offset(&self, position: usize) -> isize {
        match self.positions {
            Some(table) => table[position],
            None => position as isize * self.position_stride,
        }
    }

    /// This operand for the `len` positions of the tile from `first` on.
    pub(crate) fn at_positions(self, first: usize, len: usize) -> Self
    where
        P: Offset,
    {
        match self.positions {
            Some(table) => Operand { positions: Some(&table[first..first + len]), ..self },
            None => Operand { ptr: self.ptr.by(first as isize * self.position_stride), ..self },
        }
    }

    /// Offset of a channel of the layer at a position of the tile.
    pub(crate) fn at(&self, channel: usize, position: usize) -> isize {
        self.channel_offset(channel) + self.position_offset(position)
    }

    /// Offset of row `row` and lane `lane` of a tile whose first channel is `channel`.
    #[inline(always)]
    fn offset(&self, axis: ChannelAxis, channel: usize, row: usize, lane: usize) -> isize {
        match axis {
            ChannelAxis::Rows => self.channel_offset(channel + row) + self.position_offset(lane),
            ChannelAxis::Lanes => self.channel_offset(channel + lane) + self.position_offset(row),
        }
    }

    /// Offset of lane 0 of row `row`, where the lanes are contiguous.
    #[inline(always)]
    fn row_offset(&self, axis: ChannelAxis, channel: usize, row: usize) -> isize {
        if self.channels.is_some() || self.positions.is_some() {
            return self.offset(axis, channel, row, 0);
        }
        let stride = match axis {
            ChannelAxis::Rows => self.channel_stride,
            ChannelAxis::Lanes => self.position_stride,
        };
        channel as isize * self.channel_stride + row as isize * stride
    }

    /// [`Self::row_offset`] of every row.
    #[inline(always)]
    fn row_offsets<const R: usize>(&self, axis: ChannelAxis, channel: usize) -> [isize; R] {
        let mut offsets = [0; R];
        if self.channels.is_some() || self.positions.is_some() {
            self.look_up_rows(axis, channel, &mut offsets);
        } else {
            for (row, offset) in offsets.iter_mut().enumerate() {
                *offset = self.row_offset(axis, channel, row);
            }
        }
        offsets
    }

    /// [`Self::row_offsets`] by map and table; out of line, since unrolled it is larger than a
    /// kernel.
    #[cold]
    #[inline(never)]
    fn look_up_rows(&self, axis: ChannelAxis, channel: usize, offsets: &mut [isize]) {
        for (row, offset) in offsets.iter_mut().enumerate() {
            *offset = self.offset(axis, channel, row, 0);
        }
    }

    /// Whether neighbouring lanes are neighbours in memory.
    #[inline(always)]
    fn lanes_are_contiguous(&self, axis: ChannelAxis) -> bool {
        match axis {
            ChannelAxis::Rows => self.positions.is_none() && self.position_stride == 1,
            ChannelAxis::Lanes => self.channels.is_none() && self.channel_stride == 1,
        }
    }
}

/// A list of steps, with the form that runs in registers where there is one.
#[derive(Clone, Debug)]
pub(crate) struct Steps {
    list: Vec<Step>,
    simple: Option<Simple>,
}

/// `clip(v)`, with the residual added before or after: what runs in registers.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Simple {
    lower: Option<f32>,
    upper: Option<f32>,
    residual: Option<ResidualOrder>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResidualOrder {
    BeforeClip,
    AfterClip,
}

impl Steps {
    /// Takes a layer's steps and recognises those that run in registers.
    pub(crate) fn new(list: Vec<Step>) -> Self {
        let simple = Simple::recognise(&list);
        Self { list, simple }
    }

    /// The steps as they were given.
    pub(crate) fn list(&self) -> &[Step] {
        &self.list
    }
}

impl Simple {
    fn recognise(list: &[Step]) -> Option<Self> {
        let bounds = |step: &Step| match step {
            Step::Activation(Activation::Relu) => Some((0.0, f32::INFINITY)),
            Step::Activation(Activation::Relu6) => Some((0.0, 6.0)),
            Step::Activation(Activation::Clip { lo, hi }) => Some((*lo, *hi)),
            _ => None,
        };
        let (clip, residual) = match list {
            [] => (None, None),
            [Step::Residual] => (None, Some(ResidualOrder::BeforeClip)),
            [clip] => (Some(clip), None),
            [Step::Residual, clip] => (Some(clip), Some(ResidualOrder::BeforeClip)),
            [clip, Step::Residual] => (Some(clip), Some(ResidualOrder::AfterClip)),
            _ => return None,
        };
        let (lower, upper) = match clip {
            Some(clip) => bounds(clip)?,
            None => (f32::NEG_INFINITY, f32::INFINITY),
        };
        Some(Self {
            lower: (lower != f32::NEG_INFINITY).then_some(lower),
            upper: (upper != f32::INFINITY).then_some(upper),
            residual,
        })
    }
}

/// What happens to a tile after its sums are complete: `dst = steps(sum + bias)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileEpilogue<'a> {
    /// Which direction of the tile runs along the channels.
    pub axis: ChannelAxis,
    /// The layer's index of the tile's first channel.
    pub channel: usize,
    /// The bias of every channel of the layer; empty for none.
    pub bias: &'a [f32],
    /// The layer's steps; their parameters cover every channel of the layer.
    pub steps: &'a Steps,
    /// Where [`Step::Residual`] reads.
    pub residual: Option<Operand<'a, *const f32>>,
    /// Where the tile is stored.
    pub dst: Operand<'a, *mut f32>,
}

impl TileEpilogue<'_> {
    /// The epilogue that can run on vectors of lanes and store them straight to dst, if this one
    /// can.
    #[inline(always)]
    fn direct(&self) -> Option<Simple> {
        let simple = self.steps.simple?;
        let reachable = self.dst.lanes_are_contiguous(self.axis)
            && (simple.residual.is_none()
                || self.residual.is_some_and(|r| r.lanes_are_contiguous(self.axis)));
        reachable.then_some(simple)
    }

    /// The residual operand, which exists whenever a step asks for it.
    #[inline(always)]
    fn residual(&self) -> Operand<'_, *const f32> {
        self.residual.expect("a residual step comes with a residual tensor")
    }
}

/// The largest tile of any kernel, its rows rounded up to whole vectors.
const BUFFER_LEN: usize = 16 * 32;

/// One tile in memory, row by row.
#[repr(align(64))]
struct Buffer(MaybeUninit<[f32; BUFFER_LEN]>);

impl Buffer {
    #[inline(always)]
    fn uninit() -> Self {
        Self(MaybeUninit::uninit())
    }

    #[inline(always)]
    fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }
}

/// The part of [`finish`] that goes through memory, compiled once per instruction set:
/// rows, lanes, the buffer that holds them, what to do.
pub(crate) type FinishBuffered = unsafe fn(usize, usize, *mut f32, &TileEpilogue<'_>);

/// What [`finish`] looks up before the sums are computed, while no register is taken: the
/// epilogue that runs in registers, and where the rows of dst and of the residual begin.
pub(crate) struct Direct<const R: usize> {
    simple: Simple,
    dst: [*mut f32; R],
    residual: [*const f32; R],
}

impl<const R: usize> Direct<R> {
    /// `None` where the tile must go through memory.
    #[inline(always)]
    pub(crate) fn new(epilogue: &TileEpilogue<'_>) -> Option<Self> {
        let simple = epilogue.direct()?;
        let TileEpilogue { axis, channel, dst, .. } = epilogue;
        let rows = dst.row_offsets::<R>(*axis, *channel);
        let dst = rows.map(|offset| dst.ptr.wrapping_offset(offset));
        let mut src = [ptr::null(); R];
        if simple.residual.is_some() {
            let residual = epilogue.residual();
            let rows = residual.row_offsets::<R>(*axis, *channel);
            src = rows.map(|offset| residual.ptr.wrapping_offset(offset));
        }
        Some(Self { simple, dst, residual: src })
    }
}

/// Applies the epilogue to the `R` rows of accumulators, of which `cols` lanes are real, and
/// stores them.
///
/// # Safety
/// The CPU has `V`'s instruction set, and `buffered` is [`finish_buffered`] for `V`;
/// `(NV - 1) * LANES < cols <= NV * LANES`; `tail` selects the lanes of the last vector.
/// For every row and lane of the tile, `dst` is writable, and `residual` readable if a step asks
/// for it; the layer's parameters cover every channel of the tile. `direct` is made of this
/// epilogue.
#[inline(always)]
pub(crate) unsafe fn finish<V: Simd, const R: usize, const NV: usize>(
    acc: [[V; NV]; R],
    cols: usize,
    tail: V::Tail,
    epilogue: &TileEpilogue<'_>,
    direct: Option<Direct<R>>,
    buffered: FinishBuffered,
) {
    // SAFETY: the caller's promises are those of the callees; the buffer has room for `R` rows
    // of `NV` vectors.
    unsafe {
        match direct {
            Some(direct) if V::TAILS_ARE_FREE || cols < NV * V::LANES => {
                finish_direct::<V, R, NV, true>(acc, tail, epilogue, &direct);
            }
            Some(direct) => finish_direct::<V, R, NV, false>(acc, tail, epilogue, &direct),
            None => {
                const { assert!(R.next_multiple_of(V::LANES) * NV * V::LANES <= BUFFER_LEN) };
                let mut buffer = Buffer::uninit();
                let ptr = buffer.as_mut_ptr();
                for (i, x) in acc.as_flattened().iter().enumerate() {
                    x.store(ptr.add(i * V::LANES));
                }
                buffered(R, cols, ptr, epilogue);
            }
        }
    }
}

/// A row's vectors, the last one cut to `tail` if `TAIL`.
///
/// # Safety
/// As [`Simd::load`] and [`Simd::load_tail`].
#[inline(always)]
pub(crate) unsafe fn load_row<V: Simd, const NV: usize, const TAIL: bool>(
    src: *const f32,
    tail: V::Tail,
) -> [V; NV] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [V::splat(0.0); NV];
        for (v, x) in row.iter_mut().enumerate() {
            let src = src.add(v * V::LANES);
            *x = if TAIL && v == NV - 1 { V::load_tail(src, tail) } else { V::load(src) };
        }
        row
    }
}

#[inline(always)]
fn add_row<V: Simd, const NV: usize>(mut x: [V; NV], y: [V; NV]) -> [V; NV] {
    for (x, y) in x.iter_mut().zip(y) {
        *x = *x + y;
    }
    x
}

/// # Safety
/// The rows of `src` are readable at every lane of the tile.
#[inline(always)]
unsafe fn add_rows<V: Simd, const R: usize, const NV: usize, const TAIL: bool>(
    mut acc: [[V; NV]; R],
    src: [*const f32; R],
    tail: V::Tail,
) -> [[V; NV]; R] {
    for (sums, src) in acc.iter_mut().zip(src) {
        // SAFETY: the caller's promise.
        *sums = add_row(*sums, unsafe { load_row::<V, NV, TAIL>(src, tail) });
    }
    acc
}

/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn finish_direct<V: Simd, const R: usize, const NV: usize, const TAIL: bool>(
    mut acc: [[V; NV]; R],
    tail: V::Tail,
    epilogue: &TileEpilogue<'_>,
    direct: &Direct<R>,
) {
    let TileEpilogue { axis, channel, bias, .. } = *epilogue;
    let simple = direct.simple;
    // SAFETY: the parameters cover rows and lanes of the tile, tails cut the rest; the rows of dst
    // and of the residual are valid for every lane of the tile.
    unsafe {
        if !bias.is_empty() {
            let bias = bias.as_ptr().add(channel);
            match axis {
                ChannelAxis::Rows => {
                    for (row, sums) in acc.iter_mut().enumerate() {
                        *sums = add_row(*sums, [V::splat(*bias.add(row)); NV]);
                    }
                }
                ChannelAxis::Lanes => {
                    let bias = load_row::<V, NV, TAIL>(bias, tail);
                    for sums in &mut acc {
                        *sums = add_row(*sums, bias);
                    }
                }
            }
        }
        if simple.residual == Some(ResidualOrder::BeforeClip) {
            acc = add_rows::<V, R, NV, TAIL>(acc, direct.residual, tail);
        }
        if let Some(lower) = simple.lower {
            let lower = V::splat(lower);
            for x in acc.as_flattened_mut() {
                *x = x.max(lower);
            }
        }
        if let Some(upper) = simple.upper {
            let upper = V::splat(upper);
            for x in acc.as_flattened_mut() {
                *x = x.min(upper);
            }
        }
        if simple.residual == Some(ResidualOrder::AfterClip) {
            acc = add_rows::<V, R, NV, TAIL>(acc, direct.residual, tail);
        }
        for (sums, dst) in acc.iter().zip(direct.dst) {
            for (v, x) in sums.iter().enumerate() {
                let dst = dst.add(v * V::LANES);
                if TAIL && v == NV - 1 { x.store_tail(dst, tail) } else { x.store(dst) }
            }
        }
    }
}
