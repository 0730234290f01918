//! Sums of products of 8-bit integers, exact in i32, a tile at a time.
//!
//! Operands are words of 32 bits that hold a group of adjacent input channels: four bytes where the
//! CPU multiplies bytes (VNNI), elsewhere two 16-bit integers. One side is unsigned (src), the other
//! one signed (the weight). Sums wrap, so that whatever is added to them, before or afterwards, is
//! exact as long as the result fits an i32.
//!
//! Tiles are compiled in every size, so that what they are written in tells in the time that the crate
//! takes to compile: loops over indices, not iterators.
#![expect(clippy::needless_range_loop, reason = "as said above")]

use std::hint::black_box;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// The distance from row to row of a finished tile, in sums: the lanes of the widest tile.
pub(crate) const SUMS_STRIDE: usize = 64;
/// The most rows of any tile.
pub(crate) const MOST_ROWS: usize = 14;

/// One tile: `out[r][l] = Σ_w a[r][w] · b[w][l]`, each product that of a group.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Read a word at a time, at any alignment, and given to all lanes.
    pub a: *const u8,
    /// From row to row, in bytes.
    pub a_row: isize,
    /// From word to word, in bytes.
    pub a_word: isize,
    /// Read a vector at a time.
    pub b: *const u32,
    /// From word to word, in words.
    pub b_word: usize,
    /// Words to sum.
    pub words: usize,
    pub rows: usize,
    pub vectors: usize,
    /// Whether A is the weight, the signed side; otherwise B is.
    pub weight_is_a: bool,
}

/// A vector of sums, and of words to multiply.
///
/// # Safety of all methods
/// The CPU has the type's instructions, and pointers are to as many elements as there are lanes.
pub(super) trait Dot: Copy {
    const LANES: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(words: *const u32) -> Self;
    /// The word at any address, in every lane.
    unsafe fn splat(word: *const u8) -> Self;
    /// `self` plus the products of each lane's group.
    unsafe fn dot(self, unsigned: Self, signed: Self) -> Self;
    unsafe fn store(self, out: *mut i32);
}

/// Pairs of 16-bit integers in plain code.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[derive(Clone, Copy)]
pub(super) struct Pairs8(pub(super) [u32; 8]);

#[cfg(any(test, not(target_arch = "x86_64")))]
impl Dot for Pairs8 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Pairs8([0; 8])
    }

    #[inline(always)]
    unsafe fn load(words: *const u32) -> Self {
        // SAFETY: the caller's promise.
        Pairs8(unsafe { words.cast::<[u32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn splat(word: *const u8) -> Self {
        // SAFETY: the caller's promise.
        Pairs8([unsafe { word.cast::<u32>().read_unaligned() }; 8])
    }

    #[inline(always)]
    unsafe fn dot(self, unsigned: Self, signed: Self) -> Self {
        // In the form that compilers know as one instruction.
        let halves = |words: [u32; 8]| -> [i16; 16] {
            std::array::from_fn(|i| (words[i / 2] >> (i % 2 * 16)) as i16)
        };
        let (a, b) = (halves(unsigned.0), halves(signed.0));
        let mut products = [0i32; 16];
        for i in 0..16 {
            products[i] = i32::from(a[i]) * i32::from(b[i]);
        }
        Pairs8(std::array::from_fn(|lane| {
            self.0[lane].wrapping_add((products[2 * lane] + products[2 * lane + 1]) as u32)
        }))
    }

    #[inline(always)]
    unsafe fn store(self, out: *mut i32) {
        // SAFETY: the caller's promise.
        unsafe { out.cast::<[u32; 8]>().write_unaligned(self.0) }
    }
}

/// An x86 vector: its type, its lanes, and what it is made of.
#[cfg(target_arch = "x86_64")]
macro_rules! vectors {
    ($($(#[$doc:meta])* $name:ident($register:ty), $lanes:literal lanes: $zero:ident, $load:ident, $store:ident, $splat:ident, |$sum:ident, $unsigned:ident, $signed:ident| $dot:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(super) struct $name(pub(super) $register);

        impl Dot for $name {
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: the caller's promises, here and below.
                $name(unsafe { $zero() })
            }

            #[inline(always)]
            unsafe fn load(words: *const u32) -> Self {
                // SAFETY: as above.
                $name(unsafe { $load(words.cast()) })
            }

            #[inline(always)]
            unsafe fn splat(word: *const u8) -> Self {
                // SAFETY: as above.
                $name(unsafe { $splat(word.cast::<i32>().read_unaligned()) })
            }

            #[inline(always)]
            unsafe fn dot(self, unsigned: Self, signed: Self) -> Self {
                let ($sum, $unsigned, $signed) = (self.0, unsigned.0, signed.0);
                // SAFETY: as above.
                $name(unsafe { $dot })
            }

            #[inline(always)]
            unsafe fn store(self, out: *mut i32) {
                // SAFETY: as above.
                unsafe { $store(out.cast(), self.0) }
            }
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
vectors! {
    /// As [`Pairs8`], in what every CPU of the target has.
    Sse2Pairs(__m128i), 4 lanes: _mm_setzero_si128, _mm_loadu_si128, _mm_storeu_si128, _mm_set1_epi32,
        |sum, unsigned, signed| _mm_add_epi32(sum, _mm_madd_epi16(unsigned, signed));
    /// Pairs of 16-bit integers: no sum of two products overflows, which those of bytes could.
    Avx2Pairs(__m256i), 8 lanes: _mm256_setzero_si256, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_set1_epi32,
        |sum, unsigned, signed| _mm256_add_epi32(sum, _mm256_madd_epi16(unsigned, signed));
    /// As [`Avx2Pairs`].
    Avx512Pairs(__m512i), 16 lanes: _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_set1_epi32,
        |sum, unsigned, signed| _mm512_add_epi32(sum, _mm512_madd_epi16(unsigned, signed));
    /// Groups of four bytes.
    Vnni(__m512i), 16 lanes: _mm512_setzero_si512, _mm512_loadu_si512, _mm512_storeu_si512, _mm512_set1_epi32,
        |sum, unsigned, signed| _mm512_dpbusd_epi32(sum, unsigned, signed);
}

/// The distances of a tile's rows, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    one: isize,
    three: isize,
    five: isize,
    seven: isize,
}

impl Rows {
    /// Rows are reached by addresses of the form `base + stride * {1, 2, 4}`, whose strides are hidden
    /// from the optimiser, which would make one long chain of additions of them.
    #[inline(always)]
    pub(super) fn new(one: isize) -> Self {
        let [three, five, seven] = [black_box(3 * one), black_box(5 * one), black_box(7 * one)];
        Rows { one, three, five, seven }
    }
}

/// Adds the products of a tile of `R` rows and `NV` vectors to sums.
///
/// # Safety
/// The CPU has D's instructions; A is readable at every row and word, B at every word and lane.
#[inline(always)]
pub(super) unsafe fn add<D: Dot, const R: usize, const NV: usize, const WEIGHT_IS_A: bool>(
    tile: &Tile,
    Rows { one, three, five, seven }: Rows,
    sums: &mut [[D; NV]; R],
) {
    debug_assert!(tile.rows == R && tile.vectors == NV);
    let mut bases = [tile.a, tile.a.wrapping_offset(seven)];
    let mut b = tile.b;
    // SAFETY: the caller's promises; addresses past the last word are not used.
    unsafe {
        for _ in 0..tile.words {
            let mut lanes = [D::zero(); NV];
            for v in 0..NV {
                lanes[v] = D::load(b.wrapping_add(v * D::LANES));
            }
            for row in 0..R {
                let word = D::splat(bases[row / 7].wrapping_offset(match row % 7 {
                    0 => 0,
                    1 => one,
                    2 => one * 2,
                    3 => three,
                    4 => one * 4,
                    5 => five,
                    _ => three * 2,
                }));
                for v in 0..NV {
                    let sum = sums[row][v];
                    sums[row][v] =
                        if WEIGHT_IS_A { sum.dot(lanes[v], word) } else { sum.dot(word, lanes[v]) };
                }
            }
            bases = [bases[0].wrapping_offset(tile.a_word), bases[1].wrapping_offset(tile.a_word)];
            b = b.wrapping_add(tile.b_word);
        }
    }
}

/// Computes a tile of `R` rows and `NV` vectors into rows of [`SUMS_STRIDE`] sums.
///
/// # Safety
/// As [`add`], and `out` is writable at every row and lane.
#[inline(always)]
pub(super) unsafe fn tile<D: Dot, const R: usize, const NV: usize, const WEIGHT_IS_A: bool>(
    tile: &Tile,
    out: *mut i32,
) {
    // SAFETY: the caller's promises.
    unsafe {
        let mut sums = [[D::zero(); NV]; R];
        add::<D, R, NV, WEIGHT_IS_A>(tile, Rows::new(tile.a_row), &mut sums);
        for row in 0..R {
            for v in 0..NV {
                sums[row][v].store(out.wrapping_add(row * SUMS_STRIDE + v * D::LANES));
            }
        }
    }
}

/// Runs independent chains of products; gives how many groups were multiplied.
///
/// # Safety
/// The CPU has D's instructions.
#[inline(always)]
pub(super) unsafe fn chains<D: Dot>(rounds: usize) -> usize {
    // Enough for two units with a latency of up to six cycles.
    const CHAINS: usize = 12;
    // SAFETY: the caller's promise; no vector has more than sixteen lanes.
    unsafe {
        let unsigned = D::load(black_box([0x0102_0304u32; 16]).as_ptr());
        let mut sums = [D::load(black_box([0x0403_0201u32; 16]).as_ptr()); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                // Each product depends on the one before: none of them can be left out.
                *sum = sum.dot(unsigned, *sum);
            }
        }
        let mut out = [0i32; 16];
        for sum in sums {
            sum.store(out.as_mut_ptr());
            black_box(&out);
        }
    }
    rounds * CHAINS * D::LANES
}
