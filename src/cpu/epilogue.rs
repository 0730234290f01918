//! What happens to a tile of sums before its only store: bias, steps, residual, placement.
//!
//! A tile has *rows* (one accumulator register row each) and *lanes*; either may run along the
//! output channels. Lists of steps that networks use are recognised when the layer is prepared
//! and run on the accumulators in registers; every other list, and every dst whose lanes are not
//! contiguous, goes through a buffer of one tile that stays in L1.

use crate::cpu::microkernel::{At, Grid, Product, offset};
use crate::cpu::simd::Simd;
use crate::dtype::{DType, bf16, f16};
use crate::epilogue::Step;
use crate::stages::Activation;
use std::mem::MaybeUninit;

mod buffered;
mod direct;

pub(crate) use buffered::finish_buffered;
pub(crate) use direct::{Direct, load_row};
use direct::{finish_direct, registers};

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

/// A tensor that a tile reads (`P = *const T`) or writes (`P = *mut T`), placed by channel
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

impl<T> Offset for *const T {
    fn by(self, elements: isize) -> Self {
        self.wrapping_offset(elements)
    }
}

impl<T> Offset for *mut T {
    fn by(self, elements: isize) -> Self {
        self.wrapping_offset(elements)
    }
}

impl<'a, T> Operand<'a, *const T> {
    /// The same tensor, of another type of the same size.
    pub(crate) fn cast<U>(self) -> Operand<'a, *const U> {
        let Operand { ptr, channel_stride, position_stride, channels, positions } = self;
        Operand { ptr: ptr.cast(), channel_stride, position_stride, channels, positions }
    }
}

impl<'a, T> Operand<'a, *mut T> {
    /// The same tensor, to read.
    pub(crate) fn read(self) -> Operand<'a, *const T> {
        let Operand { ptr, channel_stride, position_stride, channels, positions } = self;
        Operand { ptr: ptr.cast_const(), channel_stride, position_stride, channels, positions }
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

    /// Whether a map or a table places its elements.
    #[inline(always)]
    pub(crate) fn is_tabled(&self) -> bool {
        self.channels.is_some() || self.positions.is_some()
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
        if self.is_tabled() {
            return self.offset(axis, channel, row, 0);
        }
        let stride = match axis {
            ChannelAxis::Rows => self.channel_stride,
            ChannelAxis::Lanes => self.position_stride,
        };
        offset([channel, row], [self.channel_stride, stride])
    }

    /// [`Self::row_offset`] of every row.
    #[inline(always)]
    fn row_offsets<const R: usize>(&self, axis: ChannelAxis, channel: usize) -> [isize; R] {
        let mut offsets = [0; R];
        if self.is_tabled() {
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
    /// Infinite where there is none.
    lower: f32,
    upper: f32,
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
        Some(Self { lower, upper, residual })
    }
}

/// What happens to a tile after its sums are complete: `dst = steps(sum * scale + bias)`, rounded to
/// `T`, which the residual holds too.
#[derive(Debug)]
pub(crate) struct TileEpilogue<'a, T = f32> {
    /// Which direction of the tile runs along the channels.
    pub axis: ChannelAxis,
    /// The layer's index of the tile's first channel.
    pub channel: usize,
    /// The scale of every channel of the layer; empty where there is none, as always in f32.
    pub scale: &'a [f32],
    /// The bias of every channel of the layer.
    pub bias: &'a [f32],
    /// The layer's steps; their parameters cover every channel of the layer.
    pub steps: &'a Steps,
    /// Where [`Step::Residual`] reads.
    pub residual: Option<Operand<'a, *const T>>,
    /// Where the tile is stored.
    pub dst: Operand<'a, *mut T>,
}

impl<T> Clone for TileEpilogue<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for TileEpilogue<'_, T> {}

/// The epilogue of a tile, for tensors of some type.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AnyEpilogue<'a> {
    F32(&'a TileEpilogue<'a>),
    F16(&'a TileEpilogue<'a, f16>),
    Bf16(&'a TileEpilogue<'a, bf16>),
}

impl AnyEpilogue<'_> {
    #[inline(always)]
    pub(crate) fn axis(&self) -> ChannelAxis {
        match self {
            AnyEpilogue::F32(epilogue) => epilogue.axis,
            AnyEpilogue::F16(epilogue) => epilogue.axis,
            AnyEpilogue::Bf16(epilogue) => epilogue.axis,
        }
    }
}

/// A type that kernels store.
pub(crate) trait Stored: Sized {
    fn any<'a>(epilogue: &'a TileEpilogue<'a, Self>) -> AnyEpilogue<'a>;
}

macro_rules! stored {
    ($($element:ty: $variant:ident),*) => {$(
        impl Stored for $element {
            #[inline(always)]
            fn any<'a>(epilogue: &'a TileEpilogue<'a, Self>) -> AnyEpilogue<'a> {
                AnyEpilogue::$variant(epilogue)
            }
        }
    )*};
}

stored!(f32: F32, f16: F16, bf16: Bf16);

impl<'a, T> TileEpilogue<'a, T> {
    /// The epilogue of a tile of a grid, whose first tile's this is.
    #[inline(always)]
    fn of_tile(&self, grid: &Grid<'_>, at: At) -> TileEpilogue<'a, T> {
        if at == [0, 0] {
            return *self;
        }
        let [i, j] = at;
        let position = i * grid.position_step[0] + j * grid.position_step[1];
        let moved = |stride: isize| position as isize * stride;
        TileEpilogue {
            channel: self.channel + i * grid.channel_step[0] + j * grid.channel_step[1],
            dst: Operand { ptr: self.dst.ptr.by(moved(self.dst.position_stride)), ..self.dst },
            residual: self
                .residual
                .map(|r| Operand { ptr: r.ptr.by(moved(r.position_stride)), ..r }),
            ..*self
        }
    }

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
    fn residual(&self) -> Operand<'_, *const T> {
        self.residual.expect("a residual step comes with a residual tensor")
    }
}

/// The largest tile of any kernel, its rows rounded up to whole vectors.
const BUFFER_LEN: usize = 16 * 64;

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

/// The part of [`finish`] that goes through memory, compiled once per instruction set: a grid, the place
/// in it of the tile, and the buffer that holds that.
pub(crate) type FinishBuffered = unsafe fn(&Grid<'_>, At, *mut f32);

/// Applies an activation to so many vectors, out of line, since every type calls it.
pub(crate) type Activate = unsafe fn(Activation, *mut f32, usize);

/// Applies the epilogue to a tile of a grid: `R` rows of accumulators, of which `grid.cols`
/// lanes are real, and stores them.
///
/// # Safety
/// The CPU has `V`'s instruction set, and `buffered` is [`finish_buffered`] for `V`;
/// `(NV - 1) * LANES < cols <= NV * LANES`; `tail` selects the lanes of the last vector, which is
/// whole unless `TAIL`; `ROWS` says that channels run along the rows. For every row and lane of the
/// tile, `dst` is writable, and `residual` readable if a step asks for it; the layer's parameters
/// cover every channel of the tile. `direct` is made of this grid.
#[inline(always)]
pub(crate) unsafe fn finish<
    V: Simd,
    P: Product<V>,
    const R: usize,
    const NV: usize,
    const TAIL: bool,
    const ROWS: bool,
>(
    acc: [[V; NV]; R],
    tail: V::Tail,
    grid: &Grid<'_>,
    at: At,
    direct: &Direct<'_, R>,
    buffered: FinishBuffered,
) {
    // SAFETY: the caller's promises are those of the callees; the buffer has room for `R` rows
    // of `NV` vectors.
    unsafe {
        // What a constant excludes is not even compiled.
        match direct.stored {
            Some(DType::F32) if const { registers::<V, P, TAIL>()[0] } => {
                return finish_direct::<V, P, f32, R, NV, TAIL, ROWS>(acc, tail, grid, at, direct);
            }
            Some(DType::F16) if const { registers::<V, P, TAIL>()[1] } => {
                return finish_direct::<V, P, f16, R, NV, TAIL, ROWS>(acc, tail, grid, at, direct);
            }
            Some(DType::Bf16) if const { registers::<V, P, TAIL>()[2] } => {
                return finish_direct::<V, P, bf16, R, NV, TAIL, ROWS>(acc, tail, grid, at, direct);
            }
            _ => {}
        }
        const { assert!(R.next_multiple_of(V::LANES) * NV * V::LANES <= BUFFER_LEN) };
        let mut buffer = Buffer::uninit();
        let ptr = buffer.as_mut_ptr();
        for (i, x) in acc.as_flattened().iter().enumerate() {
            x.store(ptr.add(i * V::LANES));
        }
        buffered(grid, at, ptr);
    }
}
