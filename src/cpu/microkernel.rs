//! The register-level kernels: tiles of sums of products, and the epilogue that stores them.
//!
//! There is one microkernel, *broadcast A, vector B*: `sum[m, j] = Σ_k A(m, k) · B(k, j)`, where
//! B's lanes `j` are contiguous. Lanes along positions: A is the packed weight and B the rows of
//! src. Lanes along channels: A is src, and B the packed weight. Src is read in place or from a copy.
//! Either way a value is a sum strictly in the order of `k`, whatever the tile, so tilings agree
//! bitwise.
//!
//! A call is a *grid* of tiles of one size, so that what is the same for all of them is worked out
//! once, and the stores of one tile drain while the next one's sums begin. Each size that fits
//! into registers is compiled by itself, so that the sums of a partial tile stay in registers too.

use crate::cpu::epilogue::{self, AnyEpilogue, ChannelAxis, Direct, FinishBuffered};
use crate::cpu::isa::Isa;
use crate::cpu::math;
use crate::cpu::simd::{self, Simd};
use crate::dtype::{DType, Element};
use crate::stages::Activation;
use std::hint::black_box;

/// A range of `k` that A and B hold at fixed strides: one source of a channel concatenation.
///
/// Strides are in elements. In tile `(i, j)` of the grid A's value for row `m` is at
/// `a + i * a_step[0] + j * a_step[1] + m * a_row + k * a_k`; B's lanes start at
/// `b + i * b_step[0] + j * b_step[1] + k * b_k`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// Number of terms.
    pub k: usize,
    /// A at row 0, `k = 0`.
    pub a: *const f32,
    /// Distance of A's rows; 1 where A is the packed weight.
    pub a_row: isize,
    /// Distance of A's terms.
    pub a_k: isize,
    /// Distances of A from tile to tile.
    pub a_step: [isize; 2],
    /// B at lane 0, `k = 0`.
    pub b: *const f32,
    /// Distance of B's terms.
    pub b_k: isize,
    /// Distances of B from tile to tile.
    pub b_step: [isize; 2],
}

/// One call of a kernel: tiles of one size, `tiles[0]` times `tiles[1]`, the second index running
/// faster.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid<'a> {
    /// Rows of each tile.
    pub rows: usize,
    /// Lanes of each tile. B and dst are not touched beyond them.
    pub cols: usize,
    /// Tiles in each direction; one where the epilogue places channels or positions by a table.
    pub tiles: [usize; 2],
    /// Distance in elements from src to what of it is fetched into cache meanwhile, since it is read
    /// next; 0 is nothing where lanes run along the channels.
    pub ahead: isize,
    /// Whether dst is likely not in cache: its lines are fetched while the sums are computed.
    pub far_dst: bool,
    /// The terms to sum, in order.
    pub segments: &'a [Segment],
    /// What happens to the sums of tile `(0, 0)`.
    pub epilogue: AnyEpilogue<'a>,
    /// Channels from tile to tile.
    pub channel_step: [usize; 2],
    /// Positions from tile to tile.
    pub position_step: [usize; 2],
}

/// The place of a tile in its grid.
pub(crate) type At = [usize; 2];

/// `at[0] * step[0] + at[1] * step[1]`. Like all distances from a pointer in here it wraps, so that checked
/// builds do not check it in every kernel.
#[inline(always)]
pub(crate) fn offset(at: At, step: [isize; 2]) -> isize {
    (at[0] as isize).wrapping_mul(step[0]).wrapping_add((at[1] as isize).wrapping_mul(step[1]))
}

/// The sizes that an instruction set's registers hold, and the code for them.
#[derive(Debug)]
pub(crate) struct Sizes {
    /// What the CPU must have.
    pub isa: Isa,
    /// What a term is; the CPU must have that too.
    pub terms: TermKind,
    /// Lanes of its widest vector.
    pub vector: usize,
    /// How many rows of the weight a panel may have, the best first.
    pub panel_widths: &'static [usize],
    /// `(lanes, rows)`: the most rows of a tile of up to so many lanes, ascending.
    pub most_rows: &'static [(usize, usize)],
    /// Computes and stores a grid.
    ///
    /// # Safety
    /// The CPU has `isa`; `rows` is at most what `most_rows` gives for `cols`, neither is zero; A
    /// is readable at every row and B at every lane of each tile, for every `k` of every segment;
    /// the epilogue's `dst` is writable, and its `residual` readable if its steps ask for it, at
    /// every row and lane of each tile; its bias and its steps' parameters cover the tiles'
    /// channels, its maps and tables the tile's channels and positions; dst overlaps nothing that
    /// is read, other than a residual at the same place.
    pub run: unsafe fn(&Grid<'_>),
}

impl Sizes {
    /// Those of an instruction set and a kind of terms.
    pub(crate) fn of(isa: Isa, terms: TermKind) -> &'static Sizes {
        let mut sizes = KERNELS.iter().map(|kernel| kernel.sizes);
        let sizes = sizes.find(|sizes| sizes.isa == isa && sizes.terms == terms);
        sizes.expect("every instruction set has kernels of f32 terms, and AVX-512 of pairs")
    }

    /// Why this CPU cannot run them, if it cannot.
    pub(crate) fn unavailable(&self) -> Option<String> {
        if self.isa.supported().is_none() {
            return Some(format!("this CPU has no {}", self.isa.name()));
        }
        let runs = self.terms == TermKind::F32 || self.isa.multiplies_pairs();
        (!runs).then(|| "this CPU has no AVX512-BF16".into())
    }

    /// The most lanes of a tile of so many rows.
    pub(crate) fn widest(&self, rows: usize) -> usize {
        let fits = |&&(_, most): &&(usize, usize)| rows <= most;
        self.most_rows.iter().rev().find(fits).map_or(0, |&(lanes, _)| lanes)
    }

    /// The most rows of a tile of so many lanes.
    pub(crate) fn rows(&self, lanes: usize) -> usize {
        let fits = |&&(most, _): &&(usize, usize)| lanes <= most;
        self.most_rows.iter().find(fits).map_or(0, |&(_, rows)| rows)
    }
}

/// A microkernel: a row of [`KERNELS`].
#[derive(Debug)]
pub(crate) struct Kernel {
    /// `{pass}_{dtype}_{isa}_{mr}x{nr}`.
    pub name: &'static str,
    /// What tensors hold.
    pub dtype: DType,
    /// The most rows of a tile of `nr` lanes.
    pub mr: usize,
    /// The most lanes of a tile.
    pub nr: usize,
    /// The instruction set, and what runs.
    pub sizes: &'static Sizes,
}

impl Kernel {
    /// The most rows of a tile of so many lanes.
    pub(crate) fn rows(&self, lanes: usize) -> usize {
        if lanes == self.nr { self.mr } else { self.sizes.rows(lanes) }
    }
}

/// What A and B hold for one `k`, in 32 bits whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TermKind {
    /// An f32.
    F32,
    /// Two values of bf16, of neighbouring channels: the first one in the low half.
    Bf16Pair,
}

impl TermKind {
    /// How many terms so many channels are.
    pub(crate) fn of_channels(self, channels: usize) -> usize {
        match self {
            TermKind::F32 => channels,
            TermKind::Bf16Pair => channels.div_ceil(2),
        }
    }
}

/// How terms are multiplied and added.
pub(crate) trait Product<V: Simd> {
    /// Whether tiles of f32, f16 and bf16 are stored from registers; others go through memory.
    const STORES: [bool; 3];

    /// A term of A in every lane.
    ///
    /// # Safety
    /// The CPU has `V`'s instruction set; the term is readable, at any address.
    unsafe fn splat(term: *const f32) -> V;

    /// `x * lanes + sum`.
    fn mul_add(x: V, lanes: V, sum: V) -> V;

    /// Stores `LANES` values, rounded.
    ///
    /// # Safety
    /// As [`Simd::store`].
    #[inline(always)]
    unsafe fn store<T: Element>(x: V, dst: *mut T) {
        // SAFETY: the caller's promise.
        unsafe { simd::store(x, dst) }
    }

    /// Stores the lanes of a tail, rounded.
    ///
    /// # Safety
    /// As [`Simd::store_tail`].
    #[inline(always)]
    unsafe fn store_tail<T: Element>(x: V, dst: *mut T, tail: V::Tail) {
        // SAFETY: the caller's promise.
        unsafe { simd::store_tail(x, dst, tail) }
    }
}

/// Products of f32.
struct F32;

impl<V: Simd> Product<V> for F32 {
    const STORES: [bool; 3] = [true, V::NARROWS, V::NARROWS];

    #[inline(always)]
    unsafe fn splat(term: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::splat(term.read_unaligned()) }
    }

    #[inline(always)]
    fn mul_add(x: V, lanes: V, sum: V) -> V {
        x.mul_add(lanes, sum)
    }
}

/// Sums of two products of bf16, of the second ones first, each added to an f32.
#[cfg(target_arch = "x86_64")]
struct Bf16Pairs;

#[cfg(target_arch = "x86_64")]
impl<V: crate::cpu::simd::avx512::DotBf16> Product<V> for Bf16Pairs {
    const STORES: [bool; 3] = [false, false, true];

    #[inline(always)]
    unsafe fn splat(term: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::splat_pair(term.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    fn mul_add(x: V, lanes: V, sum: V) -> V {
        // SAFETY: only kernels that need AVX512-BF16 multiply pairs.
        unsafe { sum.dot_bf16(lanes, x) }
    }

    #[inline(always)]
    unsafe fn store<T: Element>(x: V, dst: *mut T) {
        debug_assert_eq!(T::DTYPE, DType::Bf16);
        // SAFETY: the caller's promise; only kernels that need AVX512-BF16 multiply pairs.
        unsafe { x.store_normal_bf16(dst.cast()) }
    }

    #[inline(always)]
    unsafe fn store_tail<T: Element>(x: V, dst: *mut T, tail: V::Tail) {
        debug_assert_eq!(T::DTYPE, DType::Bf16);
        // SAFETY: as above.
        unsafe { x.store_tail_normal_bf16(dst.cast(), tail) }
    }
}

/// Computes a grid of tiles of `R` rows and `NV` vectors.
///
/// # Safety
/// As [`Sizes::run`], where `rows` is `R` and `cols` needs `NV` vectors.
#[inline(always)]
unsafe fn run<V: Simd, P: Product<V>, const R: usize, const NV: usize>(
    grid: &Grid<'_>,
    buffered: FinishBuffered,
) {
    debug_assert!(grid.rows == R && grid.cols.div_ceil(V::LANES) == NV);
    let axis = grid.epilogue.axis();
    // SAFETY: the caller's promises.
    unsafe {
        // Alone in its condition, so that what it excludes is not even compiled.
        if V::TAILS_ARE_FREE {
            match axis {
                ChannelAxis::Rows => tiles::<V, P, R, NV, true, true>(grid, buffered),
                ChannelAxis::Lanes => tiles::<V, P, R, NV, true, false>(grid, buffered),
            }
        } else {
            match (axis, grid.cols == NV * V::LANES) {
                (ChannelAxis::Rows, false) => tiles::<V, P, R, NV, true, true>(grid, buffered),
                (ChannelAxis::Rows, true) => tiles::<V, P, R, NV, false, true>(grid, buffered),
                (ChannelAxis::Lanes, false) => tiles::<V, P, R, NV, true, false>(grid, buffered),
                (ChannelAxis::Lanes, true) => tiles::<V, P, R, NV, false, false>(grid, buffered),
            }
        }
    }
}

/// `TAIL` says that the last vector may have fewer lanes, `PACKED` that A is the packed weight.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn tiles<
    V: Simd,
    P: Product<V>,
    const R: usize,
    const NV: usize,
    const TAIL: bool,
    const PACKED: bool,
>(
    grid: &Grid<'_>,
    buffered: FinishBuffered,
) {
    // SAFETY: the caller's promises.
    unsafe {
        let tail = V::tail(grid.cols - (NV - 1) * V::LANES);
        let direct = Direct::<R>::new::<V, P, TAIL>(grid);
        let mut segments = grid.segments;
        while let [Segment { k: 0, .. }, rest @ ..] = segments {
            segments = rest;
        }
        const { assert!(NV * V::LANES <= ZEROS.len() && R <= ZEROS.len()) };
        // A path of its own for nothing to sum would compile every epilogue once more.
        let nothing;
        let (first, rest) = match segments.split_first() {
            Some(first_and_rest) => first_and_rest,
            None => {
                nothing = zero();
                (&nothing, segments)
            }
        };
        // Where the first terms of a tile are does not wait for anything at the tile's start: the
        // multiplications of a tile begin while those of the last one are under way.
        let strides = Strides::new(first);
        let mut outer = Terms::new(first, strides, [0, 0]);
        for i in 0..grid.tiles[0] {
            let mut terms = outer;
            for j in 0..grid.tiles[1] {
                let at = [i, j];
                if grid.far_dst {
                    direct.fetch::<V, NV>(at);
                }
                let acc =
                    sums::<V, P, R, NV, TAIL, PACKED>(terms, first.k, rest, at, grid.ahead, tail);
                epilogue::finish::<V, P, R, NV, TAIL, PACKED>(
                    acc, tail, grid, at, &direct, buffered,
                );
                terms = terms.moved(first.a_step[1], first.b_step[1]);
            }
            outer = outer.moved(first.a_step[0], first.b_step[0]);
        }
    }
}

/// Zeros for the rows of any tile, and its lanes.
static ZEROS: [f32; 64] = [0.0; 64];

/// The one term of a sum of nothing.
#[cold]
#[inline(never)]
fn zero() -> Segment {
    let zeros = ZEROS.as_ptr();
    Segment { k: 1, a: zeros, a_row: 0, a_k: 0, a_step: [0; 2], b: zeros, b_k: 0, b_step: [0; 2] }
}

/// How many terms ahead the weight is fetched where it is A: a tile takes a part of each row of its
/// panel, which the CPU does not foresee, and in a network it comes from the third cache level.
const WEIGHT_AHEAD: isize = 16;

/// The sums of a tile, in registers: `k` terms of the first segment, then those of `rest`.
///
/// # Safety
/// As [`run`]; `k` is not zero.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "iterators take the compiler longer, every time")]
unsafe fn sums<
    V: Simd,
    P: Product<V>,
    const R: usize,
    const NV: usize,
    const TAIL: bool,
    const PACKED: bool,
>(
    mut terms: Terms,
    k: usize,
    mut rest: &[Segment],
    at: At,
    ahead: isize,
    tail: V::Tail,
) -> [[V; NV]; R] {
    // SAFETY: the CPU has V's instruction set; A and B are readable at every row, lane and k of
    // the tile; the pointers past the last k are not used, and fetching never faults.
    unsafe {
        let mut acc = [[V::splat(0.0); NV]; R];
        let mut left = k;
        // Rows of a channels-last src that follow one another are walked as one run of memory.
        let mut next = terms.a[0].wrapping_offset(ahead);
        let row_part = if ahead == 0 { 0 } else { R };
        // One loop over the terms of all segments, since LLVM would keep the sums in memory
        // between several.
        loop {
            let lanes = epilogue::load_row::<V, f32, NV, TAIL>(terms.b, tail);
            // Shorter vectors, or rows of a single one, leave no load to spare.
            if PACKED && V::LANES == 16 {
                let weight = terms.a[0].wrapping_offset(WEIGHT_AHEAD * terms.strides.a_k);
                V::fetch(weight);
                V::fetch(weight.wrapping_add(R - 1));
                for v in 0..NV {
                    V::fetch(terms.b.wrapping_offset(ahead).wrapping_add(v * V::LANES));
                }
            }
            if !PACKED && V::LANES * NV > 8 {
                V::fetch(next);
                next = next.wrapping_add(row_part);
            }
            for row in 0..R {
                // Pairs of a src that is read in place may begin at any of its values.
                let x =
                    P::splat(if PACKED { terms.a[0].wrapping_add(row) } else { terms.row(row) });
                for v in 0..NV {
                    acc[row][v] = P::mul_add(x, lanes[v], acc[row][v]);
                }
            }
            left -= 1;
            if left > 0 {
                terms = terms.next();
                continue;
            }
            let segment = loop {
                let Some((segment, others)) = rest.split_first() else { return acc };
                rest = others;
                if segment.k > 0 {
                    break segment;
                }
            };
            left = segment.k;
            terms = Terms::new(segment, Strides::new(segment), at);
        }
    }
}

/// The distances in A and B within a segment: see [`Terms`].
#[derive(Clone, Copy)]
struct Strides {
    a_k: isize,
    b_k: isize,
    /// Of so many rows, in bytes.
    one: isize,
    three: isize,
    five: isize,
    seven: isize,
}

impl Strides {
    #[inline(always)]
    fn new(segment: &Segment) -> Self {
        let one = segment.a_row * size_of::<f32>() as isize;
        Self {
            a_k: segment.a_k,
            b_k: segment.b_k,
            one,
            three: black_box(3 * one),
            five: black_box(5 * one),
            seven: black_box(7 * one),
        }
    }
}

/// Where A and B are at one `k`. A's rows, up to 14 of them, are each reached by one address of
/// the form `base + stride * {1, 2, 4}`.
///
/// The strides are hidden from the optimiser: knowing that they are multiples of each other, LLVM
/// steps one pointer from row to row, and the chain of additions is longer than the
/// multiplications.
#[derive(Clone, Copy)]
struct Terms {
    /// Row 0 and row 7.
    a: [*const f32; 2],
    b: *const f32,
    strides: Strides,
}

impl Terms {
    const ROWS_PER_BASE: usize = 7;

    /// The first term of a tile.
    #[inline(always)]
    fn new(segment: &Segment, strides: Strides, at: At) -> Self {
        let a = segment.a.wrapping_offset(offset(at, segment.a_step));
        Self {
            a: [a, a.wrapping_byte_offset(strides.seven)],
            b: segment.b.wrapping_offset(offset(at, segment.b_step)),
            strides,
        }
    }

    #[inline(always)]
    fn moved(self, a: isize, b: isize) -> Self {
        let [first, eighth] = self.a;
        Self {
            a: [first.wrapping_offset(a), eighth.wrapping_offset(a)],
            b: self.b.wrapping_offset(b),
            ..self
        }
    }

    /// The next term.
    #[inline(always)]
    fn next(self) -> Self {
        self.moved(self.strides.a_k, self.strides.b_k)
    }

    /// `row` is a constant wherever this is inlined.
    #[inline(always)]
    fn row(&self, row: usize) -> *const f32 {
        let Strides { one, three, five, .. } = self.strides;
        self.a[row / Self::ROWS_PER_BASE].wrapping_byte_offset(match row % Self::ROWS_PER_BASE {
            0 => 0,
            1 => one,
            2 => one * 2,
            3 => three,
            4 => one * 4,
            5 => five,
            _ => three * 2,
        })
    }
}

/// Compiles an instruction set's tiles. Each line names a number of lanes, the vector type that
/// they fill, how many of it, and every number of rows that fits; lines ascend in lanes. They are a module,
/// since the compiler works on several at once.
macro_rules! sizes {
    ($(#[$features:meta])? mod $module:ident: $isa:expr, $terms:ident in $product:ty, $widest:literal lanes, panels of $widths:expr, {
        $($lanes:literal: $vector:ty, $nv:literal, [$($rows:literal)*];)*
    }) => {
        mod $module {
            use super::*;

            $(#[$features])?
            unsafe fn buffered<V: Simd>(grid: &Grid<'_>, at: At, tile: *mut f32) {
                // SAFETY: the caller's promises; this function has the target features.
                unsafe { epilogue::finish_buffered::<V>(grid, at, tile, activate::<V>) }
            }

            $(#[$features])?
            unsafe fn activate<V: Simd>(activation: Activation, x: *mut f32, vectors: usize) {
                // SAFETY: the caller's promises; this function has the target features.
                unsafe { math::apply::<V>(activation, x, vectors) }
            }

            $(#[$features])?
            unsafe fn instance<V: Simd, const R: usize, const NV: usize>(grid: &Grid<'_>)
            where
                $product: Product<V>,
            {
                // SAFETY: the caller's promises; this function has the target features.
                unsafe { super::run::<V, $product, R, NV>(grid, buffered::<V>) }
            }

            static INSTANCES: &[(usize, &[unsafe fn(&Grid<'_>)])] = &[
                $(($lanes, &[$(instance::<$vector, $rows, $nv>),*])),*
            ];

            unsafe fn run(grid: &Grid<'_>) {
                for &(lanes, rows) in INSTANCES {
                    if grid.cols <= lanes {
                        // SAFETY: the caller's promises.
                        return unsafe { rows[grid.rows - 1](grid) };
                    }
                }
                unreachable!("the tile has more lanes than any instance");
            }

            pub(super) static SIZES: Sizes = Sizes {
                isa: $isa,
                terms: TermKind::$terms,
                vector: $widest,
                panel_widths: &$widths,
                most_rows: &[$(($lanes, [$($rows),*].len())),*],
                run,
            };
        }
    };
}

sizes! {
    mod portable: Isa::Portable, F32 in F32, 4 lanes, panels of [8], {
        4: simd::Baseline, 1, [1 2 3 4];
        8: simd::Baseline, 2, [1 2 3 4];
    }
}

#[cfg(target_arch = "x86_64")]
sizes! {
    #[target_feature(enable = "avx2,fma,f16c")]
    mod avx2: Isa::Avx2, F32 in F32, 8 lanes, panels of [24, 16], {
        8: simd::avx2::F32x8, 1, [1 2 3 4 5 6];
        16: simd::avx2::F32x8, 2, [1 2 3 4 5 6];
        24: simd::avx2::F32x8, 3, [1 2 3 4];
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! avx512_sizes {
    ($features:literal, mod $module:ident: $terms:ident in $product:ty) => {
        sizes! {
            #[target_feature(enable = $features)]
            mod $module: Isa::Avx512, $terms in $product, 16 lanes, panels of [64, 48], {
                8: simd::avx512::F32x8, 1, [1 2 3 4 5 6 7 8 9 10 11 12 13 14];
                16: simd::avx512::F32x16, 1, [1 2 3 4 5 6 7 8 9 10 11 12 13 14];
                24: simd::avx512::F32x8, 3, [1 2 3 4 5 6 7 8 9];
                32: simd::avx512::F32x16, 2, [1 2 3 4 5 6 7 8 9 10 11 12 13 14];
                48: simd::avx512::F32x16, 3, [1 2 3 4 5 6 7 8 9];
                64: simd::avx512::F32x16, 4, [1 2 3 4 5 6];
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
avx512_sizes!("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw", mod avx512: F32 in F32);

#[cfg(target_arch = "x86_64")]
avx512_sizes!("avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512bf16", mod avx512_bf16: Bf16Pair in Bf16Pairs);

/// Every microkernel. A new kernel is a row here; tests and benches iterate over this table.
///
/// Those of 16 bits named `avx512f`, `avx2` and `portable` multiply in f32.
pub(crate) static KERNELS: &[Kernel] = &[
    kernel("fprop_f32_portable_4x8", DType::F32, 4, 8, &portable::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f32_avx2_6x16", DType::F32, 6, 16, &avx2::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f32_avx2_4x24", DType::F32, 4, 24, &avx2::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f32_avx512_14x16", DType::F32, 14, 16, &avx512::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f32_avx512_9x48", DType::F32, 9, 48, &avx512::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f32_avx512_6x64", DType::F32, 6, 64, &avx512::SIZES),
    kernel("fprop_f16_portable_4x8", DType::F16, 4, 8, &portable::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f16_avx2_6x16", DType::F16, 6, 16, &avx2::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f16_avx2_4x24", DType::F16, 4, 24, &avx2::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f16_avx512f_14x16", DType::F16, 14, 16, &avx512::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f16_avx512f_9x48", DType::F16, 9, 48, &avx512::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_f16_avx512f_6x64", DType::F16, 6, 64, &avx512::SIZES),
    kernel("fprop_bf16_portable_4x8", DType::Bf16, 4, 8, &portable::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_bf16_avx2_6x16", DType::Bf16, 6, 16, &avx2::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_bf16_avx2_4x24", DType::Bf16, 4, 24, &avx2::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_bf16_avx512f_14x16", DType::Bf16, 14, 16, &avx512::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_bf16_avx512f_9x48", DType::Bf16, 9, 48, &avx512::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_bf16_avx512f_6x64", DType::Bf16, 6, 64, &avx512::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_bf16_avx512_14x16", DType::Bf16, 14, 16, &avx512_bf16::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_bf16_avx512_9x48", DType::Bf16, 9, 48, &avx512_bf16::SIZES),
    #[cfg(target_arch = "x86_64")]
    kernel("fprop_bf16_avx512_6x64", DType::Bf16, 6, 64, &avx512_bf16::SIZES),
];

/// A row of [`KERNELS`].
const fn kernel(
    name: &'static str,
    dtype: DType,
    mr: usize,
    nr: usize,
    sizes: &'static Sizes,
) -> Kernel {
    Kernel { name, dtype, mr, nr, sizes }
}

#[cfg(test)]
mod tests;
