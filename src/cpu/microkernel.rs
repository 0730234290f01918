//! The register-level kernels: a tile of sums of products, and the epilogue that stores it.
//!
//! There is one microkernel, *broadcast A, vector B*: `sum[m, j] = Σ_k A(m, k) · B(k, j)`, where
//! B's lanes `j` are contiguous. Channels first, A is the packed weight and B the rows of src,
//! read in place; channels last, A is src, read in place, and B the packed weight. Either way a
//! value is a sum strictly in the order of `k`, whatever the tile, so tilings agree bitwise.
//!
//! A kernel is compiled for each number of rows and of vectors, so that the sums of a partial
//! tile stay in registers too.

use crate::cpu::epilogue::{self, Direct, FinishBuffered, TileEpilogue};
use crate::cpu::isa::Isa;
use crate::cpu::simd::Simd;
use std::hint::black_box;

/// A range of `k` that A and B hold at fixed strides: one source of a channel concatenation.
///
/// Strides are in elements. A's value for row `m` is at `a + m * a_row + k * a_k`; B's lanes
/// start at `b + k * b_k`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// Number of terms.
    pub k: usize,
    /// A at row 0, `k = 0`.
    pub a: *const f32,
    /// Distance of A's rows.
    pub a_row: isize,
    /// Distance of A's terms.
    pub a_k: isize,
    /// B at lane 0, `k = 0`.
    pub b: *const f32,
    /// Distance of B's terms.
    pub b_k: isize,
}

/// One call of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile<'a> {
    /// Rows of the tile, `1..=mr`.
    pub rows: usize,
    /// Lanes of the tile, `1..=nr`. B and dst are not touched beyond them.
    pub cols: usize,
    /// The terms to sum, in order.
    pub segments: &'a [Segment],
    /// What happens to the sums.
    pub epilogue: &'a TileEpilogue<'a>,
}

/// A microkernel: a row of [`KERNELS`].
#[derive(Debug)]
pub(crate) struct Kernel {
    /// `{pass}_{dtype}_{isa}_{mr}x{nr}`.
    pub name: &'static str,
    /// What the CPU must have.
    pub isa: Isa,
    /// The most rows of a tile.
    pub mr: usize,
    /// The most lanes of a tile.
    pub nr: usize,
    /// Computes and stores one tile.
    ///
    /// # Safety
    /// The CPU has `isa`; `rows` is in `1..=mr` and `cols` in `1..=nr`; A is readable at every
    /// row and B at every lane of the tile, for every `k` of every segment; the epilogue's `dst`
    /// is writable, and its `residual` readable if its steps ask for it, at every row and lane of
    /// the tile; its bias (unless empty) and its steps' parameters cover the tile's channels, its
    /// maps and tables the tile's channels and positions; dst overlaps nothing that is read,
    /// other than a residual at the same place.
    pub run: unsafe fn(&Tile<'_>),
}

/// Computes the sums of one tile and hands them to its epilogue.
///
/// # Safety
/// As [`Kernel::run`], where `rows` is `R` and `cols` needs `NV` vectors.
#[inline(always)]
unsafe fn run<V: Simd, const R: usize, const NV: usize>(tile: &Tile<'_>, buffered: FinishBuffered) {
    let Tile { rows, cols, segments, epilogue } = *tile;
    debug_assert!(rows == R && cols.div_ceil(V::LANES) == NV);
    // SAFETY: the caller's promises.
    unsafe {
        let direct = Direct::new(epilogue);
        let tail = V::tail(cols - (NV - 1) * V::LANES);
        let acc = if V::TAILS_ARE_FREE || cols < NV * V::LANES {
            sums::<V, R, NV, true>(segments, tail)
        } else {
            sums::<V, R, NV, false>(segments, tail)
        };
        epilogue::finish(acc, cols, tail, epilogue, direct, buffered);
    }
}

/// The sums of a tile, in registers.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn sums<V: Simd, const R: usize, const NV: usize, const TAIL: bool>(
    segments: &[Segment],
    tail: V::Tail,
) -> [[V; NV]; R] {
    // SAFETY: the CPU has V's instruction set; the segments are the caller's.
    unsafe {
        let mut acc = [[V::splat(0.0); NV]; R];
        // In a loop over the segments, LLVM would keep the sums in memory between them, and so
        // around a single one too.
        if let [first, rest @ ..] = segments {
            acc = add_segment::<V, R, NV, TAIL>(acc, first, tail);
            for segment in rest {
                acc = add_segment::<V, R, NV, TAIL>(acc, segment, tail);
            }
        }
        acc
    }
}

/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn add_segment<V: Simd, const R: usize, const NV: usize, const TAIL: bool>(
    acc: [[V; NV]; R],
    segment: &Segment,
    tail: V::Tail,
) -> [[V; NV]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        if segment.a_row == 1 {
            add_terms::<V, R, NV, TAIL, true>(acc, segment, tail)
        } else {
            add_terms::<V, R, NV, TAIL, false>(acc, segment, tail)
        }
    }
}

/// `PACKED` says that A's rows are neighbours, which saves the loop their addresses.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn add_terms<
    V: Simd,
    const R: usize,
    const NV: usize,
    const TAIL: bool,
    const PACKED: bool,
>(
    mut acc: [[V; NV]; R],
    segment: &Segment,
    tail: V::Tail,
) -> [[V; NV]; R] {
    let mut a = RowPointers::new(segment);
    let mut b = segment.b;
    for _ in 0..segment.k {
        // SAFETY: A and B are readable at every row, lane and k of the tile; the pointers past
        // the last k are not used.
        unsafe {
            let lanes = epilogue::load_row::<V, NV, TAIL>(b, tail);
            for (row, sums) in acc.iter_mut().enumerate() {
                let x = V::splat(if PACKED { *a.bases[0].add(row) } else { *a.row(row) });
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = x.mul_add(lanes, *sum);
                }
            }
        }
        a.advance(segment.a_k);
        b = b.wrapping_offset(segment.b_k);
    }
    acc
}

/// A's rows at one `k`, up to 14 of them, each reached by one address of the form
/// `base + stride * {1, 2, 4}`.
///
/// Bases and strides are hidden from the optimiser: knowing that they are multiples of each
/// other, LLVM steps one pointer from row to row, and the chain of additions is longer than the
/// multiplications.
struct RowPointers {
    bases: [*const f32; 2],
    one: isize,
    three: isize,
    five: isize,
}

impl RowPointers {
    const ROWS_PER_BASE: usize = 7;

    #[inline(always)]
    fn new(segment: &Segment) -> Self {
        let one = segment.a_row * size_of::<f32>() as isize;
        let second = segment.a.wrapping_byte_offset(one * Self::ROWS_PER_BASE as isize);
        Self {
            bases: [segment.a, black_box(second)],
            one,
            three: black_box(3 * one),
            five: black_box(5 * one),
        }
    }

    /// `row` is a constant wherever this is inlined.
    #[inline(always)]
    fn row(&self, row: usize) -> *const f32 {
        let base = self.bases[row / Self::ROWS_PER_BASE];
        base.wrapping_byte_offset(match row % Self::ROWS_PER_BASE {
            0 => 0,
            1 => self.one,
            2 => self.one * 2,
            3 => self.three,
            4 => self.one * 4,
            5 => self.five,
            _ => self.three * 2,
        })
    }

    #[inline(always)]
    fn advance(&mut self, a_k: isize) {
        self.bases = self.bases.map(|base| base.wrapping_offset(a_k));
    }
}

/// Compiles a kernel of one vector type for every number of rows and vectors.
macro_rules! kernel {
    ($(#[$features:meta])? $name:ident = $vector:ty, rows $rows:tt, vectors $vectors:tt) => {
        unsafe fn $name(tile: &Tile<'_>) {
            use crate::cpu::epilogue::{TileEpilogue, finish_buffered};

            $(#[$features])?
            unsafe fn buffered(rows: usize, cols: usize, tile: *mut f32, epilogue: &TileEpilogue<'_>) {
                // SAFETY: the caller's promises; this function has the target features.
                unsafe { finish_buffered::<$vector>(rows, cols, tile, epilogue) }
            }

            $(#[$features])?
            unsafe fn instance<const R: usize, const NV: usize>(tile: &Tile<'_>) {
                // SAFETY: the caller's promises; this function has the target features.
                unsafe { run::<$vector, R, NV>(tile, buffered) }
            }

            static INSTANCES: &[&[unsafe fn(&Tile<'_>)]] = kernel!(@rows $rows $vectors);
            let vectors = tile.cols.div_ceil(<$vector as Simd>::LANES);
            // SAFETY: the caller's promises.
            unsafe { INSTANCES[tile.rows - 1][vectors - 1](tile) }
        }
    };
    (@rows [$($row:literal)*] $vectors:tt) => { &[$(kernel!(@row $row $vectors)),*] };
    (@row $row:literal [$($vectors:literal)*]) => { &[$(instance::<$row, $vectors>),*] };
}

kernel! {
    fprop_f32_portable_4x8 = crate::cpu::simd::Baseline,
    rows [1 2 3 4], vectors [1 2]
}

#[cfg(target_arch = "x86_64")]
kernel! {
    #[target_feature(enable = "avx2,fma")]
    fprop_f32_avx2_6x16 = crate::cpu::simd::avx2::F32x8,
    rows [1 2 3 4 5 6], vectors [1 2]
}

#[cfg(target_arch = "x86_64")]
kernel! {
    #[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512dq,avx512bw")]
    fprop_f32_avx512_14x32 = crate::cpu::simd::avx512::F32x16,
    rows [1 2 3 4 5 6 7 8 9 10 11 12 13 14], vectors [1 2]
}

/// Every microkernel. A new kernel is a row here; tests and benches iterate over this table.
pub(crate) static KERNELS: &[Kernel] = &[
    Kernel {
        name: "fprop_f32_portable_4x8",
        isa: Isa::Portable,
        mr: 4,
        nr: 8,
        run: fprop_f32_portable_4x8,
    },
    #[cfg(target_arch = "x86_64")]
    Kernel { name: "fprop_f32_avx2_6x16", isa: Isa::Avx2, mr: 6, nr: 16, run: fprop_f32_avx2_6x16 },
    #[cfg(target_arch = "x86_64")]
    Kernel {
        name: "fprop_f32_avx512_14x32",
        isa: Isa::Avx512,
        mr: 14,
        nr: 32,
        run: fprop_f32_avx512_14x32,
    },
];

#[cfg(test)]
mod tests;
