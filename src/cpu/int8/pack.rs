//! The weight, and src where it is not read in place, as the words that tiles multiply.

use std::ops::Range;

use super::adjacent;
use super::quantize::{Element, PerPosition};

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Words that start on a cache line. Grows, never shrinks.
#[derive(Default)]
pub(crate) struct Words {
    lines: Vec<Line>,
}

impl Words {
    /// The first `len` words; what a grown part holds is unspecified.
    pub(crate) fn get(&mut self, len: usize) -> &mut [u32] {
        let lines = len.div_ceil(16);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 16]));
        }
        // SAFETY: a `Line` is sixteen words without padding, and there are enough lines.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }

    pub(crate) fn as_ptr(&self) -> *const u32 {
        self.lines.as_ptr().cast()
    }
}

/// A group of channels as a word: 4 bytes, or 2 integers of 16 bits that `value` has extended.
#[inline(always)]
fn word<const GROUP: usize>(value: impl Fn(usize) -> u32) -> u32 {
    let bits = 32 / GROUP as u32;
    (0..GROUP).fold(0, |word, i| word | (value(i) & (u32::MAX >> (32 - bits))) << (i as u32 * bits))
}

/// A packed weight: per group of the convolution, panels of [`PANEL`] rows, each panel
/// `[words][rows]`; the last panel of a group holds what is left, rounded up to whole vectors with
/// zeros. Rows are as well the lanes of B as the rows of A.
pub(crate) struct Weights {
    words: Words,
    /// Words of a row.
    pub k_words: usize,
    /// Rows of a group of the convolution, and as they are stored.
    rows: usize,
    stored: usize,
}

/// Rows of a panel: the lanes of the widest tile of every instruction set.
pub(crate) const PANEL: usize = 64;

impl Weights {
    /// Packs `weight [groups * rows, k]`, `group` channels to a word.
    pub(crate) fn pack(weight: &[i8], rows: usize, k: usize, group: usize, lanes: usize) -> Self {
        let (k_words, stored) = (k.div_ceil(group), rows.next_multiple_of(lanes));
        let mut weights = Weights { words: Words::default(), k_words, rows, stored };
        let mut words = Words::default();
        let groups = weight.len() / (rows * k);
        let packed = words.get(groups * stored * k_words);
        for (g, weight) in weight.chunks_exact(rows * k).enumerate() {
            for (row, values) in weight.chunks_exact(k).enumerate() {
                for (w, values) in values.chunks(group).enumerate() {
                    let value = |i: usize| values.get(i).map_or(0, |&v| i32::from(v) as u32);
                    let word = if group == 4 { word::<4>(value) } else { word::<2>(value) };
                    let (panel, lane) = (row / PANEL, row % PANEL);
                    let at = panel * PANEL * k_words + w * weights.stride(panel) + lane;
                    packed[g * stored * k_words + at] = word;
                }
            }
        }
        weights.words = words;
        weights
    }

    /// From word to word of a panel, in words.
    pub(crate) fn stride(&self, panel: usize) -> usize {
        (self.stored - panel * PANEL).min(PANEL)
    }

    /// The rows of a panel that a range of a group's rows has.
    pub(crate) fn rows_of(&self, panel: usize, range: &Range<usize>) -> Range<usize> {
        let first = panel * PANEL;
        let last = (first + PANEL).min(self.rows);
        range.start.max(first)..range.end.min(last)
    }

    /// A row's first word.
    pub(crate) fn row(&self, group: usize, row: usize) -> *const u32 {
        let panel = row / PANEL;
        let panel = group * self.stored * self.k_words + panel * PANEL * self.k_words;
        self.words.as_ptr().wrapping_add(panel + row % PANEL)
    }
}

/// Values of src to be packed: a block of positions of one group.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a, S> {
    /// Channel 0 of the group.
    pub ptr: *const S,
    /// From channel to channel, in elements.
    pub channel: isize,
    /// Where the block's positions are.
    pub positions: &'a [isize],
    /// Channels.
    pub k: usize,
    /// Of bytes: what makes them unsigned, by exclusive or.
    pub flip: u8,
    /// Of real numbers: their quantisation at each of the positions.
    pub quantization: PerPosition<'a>,
}

/// Packs a block into rows, `[positions][words]`.
///
/// # Safety
/// The source is readable at every channel and position, and has a quantisation for each if it is real.
#[inline(always)]
pub(super) unsafe fn rows<S: Element, const GROUP: usize>(source: &Source<'_, S>, out: &mut [u32]) {
    let &Source { ptr, channel, positions, k, .. } = source;
    let (whole, k_words) = (k / GROUP, k.div_ceil(GROUP));
    let rows = positions.iter().zip(out.chunks_exact_mut(k_words)).enumerate();
    for (p, (&position, out)) in rows {
        let quantizer = S::quantizer(source, p);
        // SAFETY: the caller's promise: the channels are readable, and adjacent in the first case.
        unsafe {
            let row = ptr.wrapping_offset(position);
            let at =
                |c: usize| u32::from((*row.wrapping_offset(c as isize * channel)).byte(quantizer));
            // A word's first channel is in its lowest bits, and thus first in memory.
            if channel == 1 && cfg!(target_endian = "little") {
                let row = std::slice::from_raw_parts(row, whole * GROUP);
                if GROUP == 4 {
                    let out = out.as_mut_ptr().cast::<u8>();
                    let out = std::slice::from_raw_parts_mut(out, row.len());
                    out.iter_mut().zip(row).for_each(|(out, x)| *out = x.byte(quantizer));
                } else {
                    let out = out.as_mut_ptr().cast::<u16>();
                    let out = std::slice::from_raw_parts_mut(out, row.len());
                    out.iter_mut().zip(row).for_each(|(out, x)| *out = x.byte(quantizer).into());
                }
            } else {
                for (w, out) in out[..whole].iter_mut().enumerate() {
                    *out = word::<GROUP>(|i| at(w * GROUP + i));
                }
            }
            if whole < k_words {
                let left = k - whole * GROUP;
                out[whole] = word::<GROUP>(|i| if i < left { at(whole * GROUP + i) } else { 0 });
            }
        }
    }
}

/// Packs a block into panels of `width` positions, each `[words][width]`; a panel with fewer
/// positions has unspecified words in the place of those that are missing.
///
/// # Safety
/// As [`rows`].
#[inline(always)]
pub(super) unsafe fn panels<S: Element, const GROUP: usize>(
    source: &Source<'_, S>,
    width: usize,
    out: &mut [u32],
) {
    let &Source { ptr, channel, positions, k, .. } = source;
    let k_words = k.div_ceil(GROUP);
    let panels = positions.chunks(width).zip(out.chunks_exact_mut(k_words * width)).enumerate();
    for (panel, (positions, out)) in panels {
        let quantizer = |p: usize| S::quantizer(source, panel * width + p);
        let dense = adjacent(positions);
        for (w, out) in out.chunks_exact_mut(width).enumerate() {
            let left = (k - w * GROUP).min(GROUP);
            let rows: [*const S; GROUP] = std::array::from_fn(|i| {
                // A channel that is missing meets a zero of the weight: any byte will do.
                ptr.wrapping_offset((w * GROUP + i.min(left - 1)) as isize * channel)
            });
            // SAFETY: the caller's promise: every row is readable at every position, which are
            // adjacent in the first case.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                if let (true, 4, Some(rows)) = (dense, GROUP, S::bytes(&rows)) {
                    interleave(rows, positions[0], source.flip, positions.len(), out);
                    continue;
                }
                let out = &mut out[..positions.len()];
                if dense {
                    let rows: [&[S]; GROUP] = std::array::from_fn(|i| {
                        let row = rows[i].wrapping_offset(positions[0]);
                        std::slice::from_raw_parts(row, positions.len())
                    });
                    for (p, out) in out.iter_mut().enumerate() {
                        let quantizer = quantizer(p);
                        *out = word::<GROUP>(|i| {
                            u32::from((*rows[i].get_unchecked(p)).byte(quantizer))
                        });
                    }
                } else if channel == 1 && left == GROUP {
                    for (p, (&position, out)) in positions.iter().zip(out).enumerate() {
                        let values = rows[0].wrapping_offset(position).cast::<[S; GROUP]>();
                        let (values, quantizer) = (values.read_unaligned(), quantizer(p));
                        *out = word::<GROUP>(|i| values[i].byte(quantizer).into());
                    }
                } else {
                    for (p, (&position, out)) in positions.iter().zip(out).enumerate() {
                        let quantizer = quantizer(p);
                        *out = word::<GROUP>(|i| {
                            (*rows[i].wrapping_offset(position)).byte(quantizer).into()
                        });
                    }
                }
            }
        }
    }
}

/// Words of four rows of bytes at `count` adjacent positions, by the vector of 64: there is room for whole
/// ones.
///
/// # Safety
/// The CPU has AVX-512 BW, as all with words of four bytes have; rows are readable at all positions.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn interleave(rows: &[*const u8], first: isize, flip: u8, count: usize, out: &mut [u32]) {
    use std::arch::x86_64::*;
    for done in (0..count).step_by(64) {
        let mask = u64::MAX >> (64 - (count - done).min(64));
        // SAFETY: the caller's promises.
        unsafe {
            // Fours of positions, so that pairs within quarters of vectors come out in order.
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let mut bytes = [_mm512_set1_epi8(flip as i8); 4];
            for (bytes, row) in bytes.iter_mut().zip(rows) {
                let from = row.wrapping_offset(first).wrapping_add(done).cast();
                // A load without a mask is the faster one.
                let row = match mask {
                    u64::MAX => _mm512_loadu_epi8(from),
                    _ => _mm512_maskz_loadu_epi8(mask, from),
                };
                *bytes = _mm512_permutexvar_epi32(order, _mm512_xor_si512(row, *bytes));
            }
            let [a, b, c, d] = bytes;
            let (low, high) = (_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b));
            let (low_2, high_2) = (_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d));
            let to = out[done..][..64].as_mut_ptr();
            let words = [
                _mm512_unpacklo_epi16(low, low_2),
                _mm512_unpackhi_epi16(low, low_2),
                _mm512_unpacklo_epi16(high, high_2),
                _mm512_unpackhi_epi16(high, high_2),
            ];
            for (i, words) in words.into_iter().enumerate() {
                _mm512_storeu_si512(to.add(16 * i).cast(), words);
            }
        }
    }
}
