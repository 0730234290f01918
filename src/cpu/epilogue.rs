//! What happens to a tile of sums before its only store: bias, steps, residual, placement.
//!
//! A tile has *rows* (one accumulator register row each) and *lanes*; either may run along the
//! output channels. Lists of steps that networks use are recognised when the layer is prepared
//! and run on the accumulators in registers; every other list, and every dst whose lanes are not
//! contiguous, goes through a buffer of one tile that stays in L1.

use crate::cpu::microkernel::{At, Grid, Product, offset};
use crate::cpu::simd::{self, Simd};
use crate::dtype::{DType, Element, bf16, f16};
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

/// What [`finish`] needs to know of a grid's tiles where the epilogue runs in registers, worked out
/// before the sums are computed, while no register is taken.
///
/// It is whole where they go through memory, too: the compiler looks at parts of it before it asks.
pub(crate) struct Direct<'a, const R: usize> {
    /// What tensors hold; `None` is through memory.
    stored: Option<DType>,
    simple: Simple,
    channel: usize,
    scale: &'a [f32],
    bias: &'a [f32],
    dst: Rows<R>,
    residual: Rows<R>,
}

/// The rows of an operand: the first tile's, and how far the next tile's are, in bytes.
struct Rows<const R: usize> {
    ptr: *mut (),
    offsets: [isize; R],
    step: [isize; 2],
}

impl<const R: usize> Rows<R> {
    const NONE: Self = Self { ptr: ptr::null_mut(), offsets: [0; R], step: [0; 2] };

    #[inline(always)]
    fn new<T>(
        operand: &Operand<'_, *const T>,
        grid: &Grid<'_>,
        epilogue: &TileEpilogue<'_, T>,
    ) -> Self {
        let bytes = |elements: isize| elements.wrapping_mul(size_of::<T>() as isize);
        Self {
            ptr: operand.ptr.cast_mut().cast(),
            offsets: operand.row_offsets(epilogue.axis, epilogue.channel).map(bytes),
            step: [0, 1].map(|i| {
                bytes(offset(
                    [grid.channel_step[i], grid.position_step[i]],
                    [operand.channel_stride, operand.position_stride],
                ))
            }),
        }
    }

    /// Lane 0 of each row of a tile.
    #[inline(always)]
    fn of<T>(&self, at: At) -> impl Iterator<Item = *mut T> {
        let ptr = self.ptr.wrapping_byte_offset(offset(at, self.step));
        self.offsets.iter().map(move |&offset| ptr.wrapping_byte_offset(offset).cast())
    }
}

impl<'a, const R: usize> Direct<'a, R> {
    /// Tiles go through memory where their epilogue does not run in registers, and all of those types
    /// that `stores` does not say.
    #[inline(always)]
    pub(crate) fn new(grid: &Grid<'a>, stores: [bool; 3]) -> Self {
        let [stores_f32, stores_f16, stores_bf16] = stores;
        let direct = match grid.epilogue {
            AnyEpilogue::F32(epilogue) if stores_f32 => Self::of(grid, epilogue),
            AnyEpilogue::F16(epilogue) if stores_f16 => Self::of(grid, epilogue),
            AnyEpilogue::Bf16(epilogue) if stores_bf16 => Self::of(grid, epilogue),
            _ => None,
        };
        direct.unwrap_or(Self {
            stored: None,
            simple: Simple { lower: 0.0, upper: 0.0, residual: None },
            channel: 0,
            scale: &[],
            bias: &[],
            dst: Rows::NONE,
            residual: Rows::NONE,
        })
    }

    #[inline(always)]
    fn of<T: Element>(grid: &Grid<'a>, epilogue: &TileEpilogue<'a, T>) -> Option<Self> {
        let simple = epilogue.direct()?;
        let residual = match simple.residual {
            Some(_) => Rows::new(&epilogue.residual(), grid, epilogue),
            None => Rows::NONE,
        };
        let &TileEpilogue { channel, scale, bias, dst, .. } = epilogue;
        debug_assert_eq!(scale.is_empty(), T::DTYPE == DType::F32);
        let dst = Rows::new(&dst.read(), grid, epilogue);
        Some(Self { stored: Some(T::DTYPE), simple, channel, scale, bias, dst, residual })
    }

    /// Asks for the lines of dst that a tile of `NV` vectors will be stored to.
    ///
    /// # Safety
    /// The CPU has `V`'s instruction set.
    #[inline(always)]
    pub(crate) unsafe fn fetch<V: Simd, const NV: usize>(&self, at: At) {
        let Some(dtype) = self.stored else { return };
        for row in self.dst.of::<u8>(at) {
            for v in 0..NV {
                // SAFETY: the caller's promise.
                unsafe { V::fetch_mut(row.wrapping_add(v * V::LANES * dtype.size()).cast()) }
            }
        }
    }
}

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

/// Which types' tiles are stored from registers: f32, f16, bf16. Tails of 16 bits are not where they
/// would be stored lane by lane.
pub(crate) const fn registers<V: Simd, P: Product<V>, const TAIL: bool>() -> [bool; 3] {
    let [f32, f16, bf16] = P::STORES;
    let narrow = V::TAILS_ARE_FREE || !TAIL;
    [f32, f16 && narrow, bf16 && narrow]
}

/// A row's vectors, the last one cut to `tail` if `TAIL`.
///
/// # Safety
/// As [`Simd::load`] and [`Simd::load_tail`].
#[inline(always)]
pub(crate) unsafe fn load_row<V: Simd, T: Element, const NV: usize, const TAIL: bool>(
    src: *const T,
    tail: V::Tail,
) -> [V; NV] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [V::splat(0.0); NV];
        for (v, x) in row.iter_mut().enumerate() {
            let src = src.add(v * V::LANES);
            *x = match TAIL && v == NV - 1 {
                true => simd::load_tail(src, tail),
                false => simd::load(src),
            };
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

#[inline(always)]
fn mul_add_row<V: Simd, const NV: usize>(mut x: [V; NV], y: [V; NV], z: [V; NV]) -> [V; NV] {
    for (x, (y, z)) in x.iter_mut().zip(y.into_iter().zip(z)) {
        *x = x.mul_add(y, z);
    }
    x
}

#[inline(always)]
fn max_row<V: Simd, const NV: usize>(mut x: [V; NV], bound: V) -> [V; NV] {
    for x in &mut x {
        *x = x.max(bound);
    }
    x
}

#[inline(always)]
fn clip_row<V: Simd, const NV: usize>(x: [V; NV], low: V, high: V) -> [V; NV] {
    let mut x = max_row(x, low);
    for x in &mut x {
        *x = x.min(high);
    }
    x
}

/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn finish_direct<
    V: Simd,
    P: Product<V>,
    T: Element,
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
) {
    let Simple { lower, upper, residual } = direct.simple;
    // Bias, then the body, then the store, row by row: sums are complete in that order, and what
    // waits in the CPU's queues for a sum that is not there yet keeps the next tile's
    // multiplications out of them. Each body is straight code.
    macro_rules! each_row {
        (|$x:ident, $residual:ident| $body:expr) => {{
            let [i, j] = at;
            let &Direct { channel, scale, bias, .. } = direct;
            let [down, right] = grid.channel_step;
            let channel =
                channel.wrapping_add(i.wrapping_mul(down)).wrapping_add(j.wrapping_mul(right));
            let scaled = T::DTYPE != DType::F32;
            // SAFETY: the parameters cover rows and lanes of the tile, tails cut the rest; the
            // rows of dst and of the residual are valid for every lane of the tile.
            unsafe {
                let (scale, bias) =
                    (scale.as_ptr().wrapping_add(channel), bias.as_ptr().add(channel));
                let none = [V::splat(0.0); NV];
                let lanes = if ROWS { none } else { load_row::<V, f32, NV, TAIL>(bias, tail) };
                let scales = match ROWS || !scaled {
                    true => none,
                    false => load_row::<V, f32, NV, TAIL>(scale, tail),
                };
                let rows = acc.iter().zip(direct.dst.of::<T>(at)).zip(direct.residual.of::<T>(at));
                for (row, ((sums, dst), $residual)) in rows.enumerate() {
                    let bias = if ROWS { [V::splat(*bias.add(row)); NV] } else { lanes };
                    let $x = if scaled {
                        let scale = if ROWS { [V::splat(*scale.add(row)); NV] } else { scales };
                        mul_add_row(*sums, scale, bias)
                    } else {
                        add_row(*sums, bias)
                    };
                    let row: [V; NV] = $body;
                    for (v, x) in row.iter().enumerate() {
                        let dst = dst.add(v * V::LANES);
                        match TAIL && v == NV - 1 {
                            true => P::store_tail(*x, dst, tail),
                            false => P::store(*x, dst),
                        }
                    }
                }
            }
        }};
    }
    let none = [f32::NEG_INFINITY, f32::INFINITY];
    let clip = [lower, upper];
    // SAFETY: the CPU has V's instruction set, here and below.
    let (low, high) = unsafe { (V::splat(clip[0]), V::splat(clip[1])) };
    match ([lower > none[0], upper < none[1]], residual) {
        ([false, false], None) if T::DTYPE == DType::F32 => each_row!(|x, _residual| x),
        ([true, false], None) if T::DTYPE == DType::F32 => {
            each_row!(|x, _residual| max_row(x, low))
        }
        (_, None) => each_row!(|x, _residual| clip_row(x, low, high)),
        // One body for both orders: bounds that are infinite change nothing.
        (_, Some(order)) => {
            let (before, after) = match order {
                ResidualOrder::BeforeClip => (none, clip),
                ResidualOrder::AfterClip => (clip, none),
            };
            // SAFETY: as above.
            let (low, high, lowest, highest) = unsafe {
                let (low, high) = (V::splat(before[0]), V::splat(before[1]));
                (low, high, V::splat(after[0]), V::splat(after[1]))
            };
            each_row!(|x, residual| {
                let x = clip_row(x, low, high);
                let x = add_row(x, load_row::<V, T, NV, TAIL>(residual, tail));
                clip_row(x, lowest, highest)
            })
        }
    }
}
