//! Sums that become bytes without leaving their registers: results whose lanes are adjacent, and which
//! nothing is added to. The bits are those of `finish`, which serves everything else.
//!
//! Bounds are applied to the bytes: what is rounded keeps its order, so that the nearest integers of a
//! range's ends cut it down as the ends do.
#![expect(clippy::needless_range_loop, reason = "as in `sums`")]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::finish::Clip;
use super::sums::{self, Dot, Rows, Tile};

/// How steps, which are integers, become bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bytes {
    /// Of unsigned bytes, as those below.
    zero_point: i16,
    lo: u8,
    hi: u8,
    /// What makes the type's bytes of unsigned ones, by exclusive or.
    flip: u8,
}

impl Bytes {
    /// `clip` is what dst's type holds, or a part of that, and `zero_point` is its own.
    pub(crate) fn new(clip: Clip, zero_point: i32, flip: u8) -> Self {
        // Signed bytes begin at -128.
        let zero_point = zero_point + i32::from(flip);
        let [lo, hi] = [clip.lo, clip.hi].map(|bound| {
            (bound.round_ties_even() as i32).saturating_add(zero_point).clamp(0, 255) as u8
        });
        Bytes { zero_point: zero_point as i16, lo, hi, flip }
    }
}

/// Tiles that follow one another by their rows, and where they go.
#[derive(Clone, Copy)]
pub(crate) struct Strip {
    /// The first.
    pub tile: Tile,
    pub tiles: usize,
    /// Lanes that exist.
    pub lanes: usize,
    /// One per channel, readable up to a whole vector: added to the sums.
    pub offset: *const i32,
    /// Then they are multiplied: as above, each below 1, so that no product leaves the range of i32.
    pub scale: *const f32,
    /// Lane 0 of channel 0, of the position that the first row is, or all of them begin at.
    pub dst: *mut u8,
    /// From channel to channel of dst, where rows are channels.
    pub channel: isize,
    /// Where positions of dst are, where rows are positions.
    pub positions: *const isize,
    pub bytes: Bytes,
}

/// Sums of a vector, on their way to bytes.
///
/// # Safety of all methods
/// The CPU has the type's instructions.
pub(super) trait Requantize: Dot {
    /// The integers nearest to `self * scale`, whose lanes are bits of f32; ties go to even ones.
    unsafe fn steps(self, scale: Self) -> Self;

    /// Stores the bytes of the first `lanes` lanes, of which the last vector has some; `dst` is writable
    /// there.
    unsafe fn store_bytes<const NV: usize>(
        steps: [Self; NV],
        bytes: &Bytes,
        dst: *mut u8,
        lanes: usize,
    );
}

/// Computes tiles of `R` rows and `NV` vectors.
///
/// # Safety
/// As [`sums::add`] for every tile; offsets and scales are as they say, and dst is writable at every row
/// and lane.
#[inline(always)]
pub(super) unsafe fn strip<
    D: Requantize,
    const R: usize,
    const NV: usize,
    const WEIGHT_IS_A: bool,
>(
    strip: &Strip,
) {
    let &Strip { mut tile, tiles, lanes, offset, scale, dst, channel, positions, bytes } = strip;
    let rows = Rows::new(tile.a_row);
    let (offset, scale) = (offset.cast::<u32>(), scale.cast::<u32>());
    // SAFETY: the caller's promises.
    unsafe {
        let vectors = |from: *const u32| {
            let mut vectors = [D::zero(); NV];
            for v in 0..NV {
                vectors[v] = D::load(from.wrapping_add(v * D::LANES));
            }
            vectors
        };
        for t in 0..tiles {
            let first = t * R;
            let mut sums = [[D::zero(); NV]; R];
            for r in 0..R {
                sums[r] = match WEIGHT_IS_A {
                    true => [D::splat(offset.wrapping_add(first + r).cast()); NV],
                    false => vectors(offset),
                };
            }
            sums::add::<D, R, NV, WEIGHT_IS_A>(&tile, rows, &mut sums);
            for r in 0..R {
                let (scale, to) = match WEIGHT_IS_A {
                    true => {
                        let scale = [D::splat(scale.wrapping_add(first + r).cast()); NV];
                        (scale, dst.wrapping_offset((first + r) as isize * channel))
                    }
                    false => (vectors(scale), dst.wrapping_offset(*positions.add(first + r))),
                };
                let mut steps = sums[r];
                for v in 0..NV {
                    steps[v] = steps[v].steps(scale[v]);
                }
                D::store_bytes(steps, &bytes, to, lanes);
            }
            tile.a = tile.a.wrapping_offset(R as isize * tile.a_row);
        }
    }
}

/// Stores the first `lanes` of some bytes.
///
/// # Safety
/// `dst` is writable there.
#[inline(always)]
unsafe fn store_some<const N: usize>(bytes: [u8; N], dst: *mut u8, lanes: usize) {
    for (lane, &byte) in bytes[..lanes].iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { *dst.wrapping_add(lane) = byte }
    }
}

#[cfg(any(test, not(target_arch = "x86_64")))]
impl Requantize for sums::Pairs8 {
    #[inline(always)]
    unsafe fn steps(self, scale: Self) -> Self {
        sums::Pairs8(std::array::from_fn(|lane| {
            let product = self.0[lane] as i32 as f32 * f32::from_bits(scale.0[lane]);
            product.round_ties_even() as i32 as u32
        }))
    }

    #[inline(always)]
    unsafe fn store_bytes<const NV: usize>(
        steps: [Self; NV],
        bytes: &Bytes,
        dst: *mut u8,
        lanes: usize,
    ) {
        for (v, steps) in steps.into_iter().enumerate() {
            let all = steps.0.map(|step| {
                let byte =
                    (step as i32).saturating_add(bytes.zero_point.into()).clamp(0, 255) as u8;
                byte.max(bytes.lo).min(bytes.hi) ^ bytes.flip
            });
            // SAFETY: the caller's promise.
            unsafe { store_some(all, dst.wrapping_add(8 * v), (lanes - 8 * v).min(8)) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Requantize for sums::Sse2Pairs {
    #[inline(always)]
    unsafe fn steps(self, scale: Self) -> Self {
        // SAFETY: every CPU of the target has these.
        sums::Sse2Pairs(unsafe {
            _mm_cvtps_epi32(_mm_mul_ps(_mm_cvtepi32_ps(self.0), _mm_castsi128_ps(scale.0)))
        })
    }

    #[inline(always)]
    unsafe fn store_bytes<const NV: usize>(
        steps: [Self; NV],
        bytes: &Bytes,
        dst: *mut u8,
        lanes: usize,
    ) {
        // SAFETY: as above, and the caller's promise.
        unsafe {
            let at = |v: usize| if v < NV { steps[v].0 } else { _mm_setzero_si128() };
            let halves = _mm_packs_epi32(at(0), at(1));
            let halves = _mm_adds_epi16(halves, _mm_set1_epi16(bytes.zero_point));
            let all = _mm_packus_epi16(halves, halves);
            let all = _mm_max_epu8(all, _mm_set1_epi8(bytes.lo as i8));
            let all = _mm_min_epu8(all, _mm_set1_epi8(bytes.hi as i8));
            let all = _mm_xor_si128(all, _mm_set1_epi8(bytes.flip as i8));
            if lanes == 8 {
                return _mm_storel_epi64(dst.cast(), all);
            }
            let mut some = [0; 16];
            _mm_storeu_si128(some.as_mut_ptr().cast(), all);
            store_some(some, dst, lanes);
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Requantize for sums::Avx2Pairs {
    #[inline(always)]
    unsafe fn steps(self, scale: Self) -> Self {
        // SAFETY: the caller's promise.
        sums::Avx2Pairs(unsafe {
            let product = _mm256_mul_ps(_mm256_cvtepi32_ps(self.0), _mm256_castsi256_ps(scale.0));
            _mm256_cvtps_epi32(product)
        })
    }

    #[inline(always)]
    unsafe fn store_bytes<const NV: usize>(
        steps: [Self; NV],
        bytes: &Bytes,
        dst: *mut u8,
        lanes: usize,
    ) {
        // SAFETY: the caller's promises.
        unsafe {
            let at = |v: usize| if v < NV { steps[v].0 } else { _mm256_setzero_si256() };
            // Both packings are of halves of vectors.
            let halves = _mm256_packs_epi32(at(0), at(1));
            let halves = _mm256_adds_epi16(halves, _mm256_set1_epi16(bytes.zero_point));
            let all = _mm256_packus_epi16(halves, halves);
            let order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
            let all = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(all, order));
            let all = _mm_max_epu8(all, _mm_set1_epi8(bytes.lo as i8));
            let all = _mm_min_epu8(all, _mm_set1_epi8(bytes.hi as i8));
            let all = _mm_xor_si128(all, _mm_set1_epi8(bytes.flip as i8));
            match lanes {
                16 => _mm_storeu_si128(dst.cast(), all),
                8 => _mm_storel_epi64(dst.cast(), all),
                _ => {
                    let mut some = [0; 16];
                    _mm_storeu_si128(some.as_mut_ptr().cast(), all);
                    store_some(some, dst, lanes);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! avx512 {
    ($($name:ident)*) => {$(
        impl Requantize for sums::$name {
            #[inline(always)]
            unsafe fn steps(self, scale: Self) -> Self {
                // SAFETY: the caller's promise.
                sums::$name(unsafe {
                    let sum = _mm512_cvtepi32_ps(self.0);
                    _mm512_cvtps_epi32(_mm512_mul_ps(sum, _mm512_castsi512_ps(scale.0)))
                })
            }

            #[inline(always)]
            unsafe fn store_bytes<const NV: usize>(
                steps: [Self; NV],
                bytes: &Bytes,
                dst: *mut u8,
                lanes: usize,
            ) {
                // SAFETY: the caller's promises.
                unsafe {
                    let mut registers = [_mm512_setzero_si512(); NV];
                    for v in 0..NV {
                        registers[v] = steps[v].0;
                    }
                    store_avx512(registers, bytes, dst, lanes)
                }
            }
        }
    )*};
}
#[cfg(target_arch = "x86_64")]
avx512!(Avx512Pairs Vnni);

/// # Safety
/// As [`Requantize::store_bytes`]; the CPU has AVX-512 F, VL and BW.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn store_avx512<const NV: usize>(
    steps: [__m512i; NV],
    bytes: &Bytes,
    dst: *mut u8,
    lanes: usize,
) {
    // SAFETY: the caller's promises.
    unsafe {
        let zero_point = _mm512_set1_epi16(bytes.zero_point);
        let pair = |v: usize| {
            let at = |v: usize| if v < NV { steps[v] } else { _mm512_setzero_si512() };
            _mm512_adds_epi16(_mm512_packs_epi32(at(v), at(v + 1)), zero_point)
        };
        let low = pair(0);
        let all = _mm512_packus_epi16(low, if NV > 2 { pair(2) } else { low });
        // Both packings are of quarters of vectors.
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let all = _mm512_permutexvar_epi32(order, all);
        let all = _mm512_max_epu8(all, _mm512_set1_epi8(bytes.lo as i8));
        let all = _mm512_min_epu8(all, _mm512_set1_epi8(bytes.hi as i8));
        let all = _mm512_xor_si512(all, _mm512_set1_epi8(bytes.flip as i8));
        if lanes == 16 * NV {
            match NV {
                1 => return _mm_storeu_si128(dst.cast(), _mm512_castsi512_si128(all)),
                2 => return _mm256_storeu_si256(dst.cast(), _mm512_castsi512_si256(all)),
                4 => return _mm512_storeu_si512(dst.cast(), all),
                _ => {}
            }
        }
        _mm512_mask_storeu_epi8(dst.cast(), u64::MAX >> (64 - lanes), all);
    }
}
