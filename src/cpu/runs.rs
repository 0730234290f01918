//! Elementwise operations and reductions over contiguous runs of values.
//!
//! Reductions accumulate in a fixed order for a given instruction set.

use crate::cpu::math;
use crate::cpu::simd::{self, Simd, per_isa};
use crate::dtype::{Element, bf16};
use crate::stages::Activation;

per_isa! {
    /// Copies runs of positions of `channels` channels, which are `channel` apart, to where each run
    /// belongs in `out`.
    ///
    /// # Safety
    /// Every channel is readable at the positions of every run, and between them where it says so.
    pub(crate) [unsafe] fn gather<T: Element>(src: *const T, channel: isize, channels: usize, runs: &[Spaced], out: &mut [f32]) = gather_runs;

    /// As [`gather`], two channels to each of `out`'s values: channel 0 is the second of its pair if
    /// `odd`, and a first one whose second is not there has a zero beside it.
    ///
    /// # Safety
    /// As for [`gather`].
    pub(crate) [unsafe] fn gather_pairs(src: *const bf16, channel: isize, channels: usize, odd: bool, runs: &[Spaced], out: &mut [f32]) = gather_paired_runs;

    /// `out[p * row + c] = src[c * channel + p]`, for positions and channels below the given numbers.
    ///
    /// # Safety
    /// `src` is readable at every channel and position.
    pub(crate) [unsafe] fn turn(src: *const f32, channel: usize, channels: usize, positions: usize, row: usize, out: &mut [f32]) = turn_block;

    /// Copies `rows` rows of `len` values, widened: row `r` from `src + r * from` to `out[r * to..]`.
    ///
    /// # Safety
    /// `src` is readable at every value of every row.
    pub(crate) [unsafe] fn widen_rows<T: Element>(src: *const T, from: isize, rows: usize, len: usize, to: usize, out: &mut [f32]) = widen_all_rows;

    /// Copies values, rounded to the nearest. The slices have one length.
    pub(crate) fn narrow<T: Element>(x: &[f32], out: &mut [T]) = narrow_run;

    /// `x = activation(x)`.
    pub(crate) fn apply_activation(activation: Activation, x: &mut [f32]) = activation_run;

    /// `x = x * scale + shift`.
    pub(crate) fn apply_affine(scale: f32, shift: f32, x: &mut [f32]) = affine_run;

    /// `x[i] = x[i] * scale[i] + shift[i]`. The slices have one length.
    pub(crate) fn apply_affine_lanes(scale: &[f32], shift: &[f32], x: &mut [f32]) = affine_lanes;

    /// `x = x * factor`: the gate of one channel.
    pub(crate) fn scale(factor: f32, x: &mut [f32]) = scale_run;

    /// `x[i] = x[i] * factor[i]`: the gates of neighbouring channels. The slices have one length.
    pub(crate) fn scale_lanes(factor: &[f32], x: &mut [f32]) = scale_lanes_run;

    /// `x[i] = x[i] + y[i]`. The slices have one length.
    pub(crate) fn add_lanes(y: &[f32], x: &mut [f32]) = add_lanes_run;

    /// `x[i] = x[i] >= 0 ? x[i] : slope[i] * x[i]`. The slices have one length.
    pub(crate) fn apply_prelu_lanes(slope: &[f32], x: &mut [f32]) = prelu_lanes;

    /// `x = (x - mean) * scale`: a normalisation, without the cancellation of
    /// `x * scale - mean * scale`.
    pub(crate) fn normalize(mean: f32, scale: f32, x: &mut [f32]) = normalize_run;

    /// The sum of `x`: f32 in short blocks, f64 across them.
    pub(crate) fn sum(x: &[f32]) -> f64 = sum_run;

    /// The sums of `x - mean` and of `(x - mean)²`: f32 in short blocks, f64 across them.
    pub(crate) fn sum_deviations(mean: f32, x: &[f32]) -> [f64; 2] = sum_deviations_run;
}

/// Positions that are evenly spaced in memory, and where they are copied to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spaced {
    /// Of the first one.
    pub offset: isize,
    pub stride: isize,
    pub len: usize,
    /// Whether what lies between them may be read too.
    pub gaps: bool,
    /// The copy of the first channel, and the distance of the next channel's.
    pub to: usize,
    pub row: usize,
}

#[inline(always)]
unsafe fn gather_runs<V: Simd, T: Element>(
    src: *const T,
    channel: isize,
    channels: usize,
    runs: &[Spaced],
    out: &mut [f32],
) {
    for c in 0..channels {
        let src = src.wrapping_offset(c as isize * channel);
        for run in runs {
            let to = &mut out[run.to + c * run.row..][..run.len];
            // SAFETY: the CPU has V's instruction set; the caller's promise.
            unsafe {
                gather_run::<V, T>(src.wrapping_offset(run.offset), run.stride, run.gaps, to)
            };
        }
    }
}

/// # Safety
/// The CPU has `V`'s instruction set; `src` is readable at `x.len()` elements, `stride` apart, and
/// between them if `gaps`.
#[inline(always)]
unsafe fn gather_run<V: Simd, T: Element>(src: *const T, stride: isize, gaps: bool, x: &mut [f32]) {
    let len = x.len();
    let vectors = (stride == 1 || stride == 2 && gaps) && len >= V::LANES;
    if !vectors {
        for (i, value) in x.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *value = unsafe { *src.offset(i as isize * stride) }.to_f32();
        }
        return;
    }
    // The last vector overlaps the one before.
    for at in (0..len - V::LANES).step_by(V::LANES).chain([len - V::LANES]) {
        // SAFETY: the CPU has V's instruction set; the first element that is read and the last one
        // are the caller's, and so are the gaps; LANES values of `x` follow `at`.
        unsafe {
            let values = match stride {
                1 => simd::load(src.add(at)),
                _ => simd::load_even(src.add(2 * at)),
            };
            V::store(values, x.as_mut_ptr().add(at));
        }
    }
}

#[inline(always)]
unsafe fn turn_block<V: Simd>(
    src: *const f32,
    channel: usize,
    channels: usize,
    positions: usize,
    row: usize,
    out: &mut [f32],
) {
    assert!(positions == 0 || (positions - 1) * row + channels <= out.len(), "out holds it all");
    let (whole_c, whole_p) = (channels / V::LANES * V::LANES, positions / 4 * 4);
    let out = out.as_mut_ptr();
    // SAFETY: the CPU has V's instruction set; whole vectors of channels and whole fours of
    // positions are inside both; the rest is copied by itself.
    unsafe {
        for c in (0..whole_c).step_by(V::LANES) {
            let src = src.add(c * channel);
            for p in (0..whole_p).step_by(4) {
                for (i, column) in V::load_columns(src.add(p), channel).into_iter().enumerate() {
                    column.store(out.add((p + i) * row + c));
                }
            }
        }
        for c in 0..channels {
            for p in (if c < whole_c { whole_p } else { 0 })..positions {
                *out.add(p * row + c) = *src.add(c * channel + p);
            }
        }
    }
}

#[inline(always)]
unsafe fn gather_paired_runs<V: Simd>(
    src: *const bf16,
    channel: isize,
    channels: usize,
    odd: bool,
    runs: &[Spaced],
    out: &mut [f32],
) {
    let pair = |first: u16, second: u16| f32::from_bits(u32::from(first) | u32::from(second) << 16);
    let start = usize::from(odd);
    let mut c = 0;
    while c < channels {
        let (row, second) = ((start + c) / 2, (start + c) % 2 == 1);
        let both = !second && c + 1 < channels;
        for run in runs {
            let to = &mut out[run.to + row * run.row..][..run.len];
            let src = src.wrapping_offset(c as isize * channel + run.offset).cast::<u16>();
            // SAFETY: the CPU has V's instruction set; the caller's promise; a vector that lies in the run
            // lies in what it is copied to.
            unsafe {
                let vectors = run.stride == 1 || run.stride == 2 && run.gaps;
                if both && vectors && run.len >= V::LANES {
                    let (first, second) = (src.cast::<bf16>(), src.offset(channel).cast::<bf16>());
                    // The last vector overlaps the one before.
                    let last = run.len - V::LANES;
                    for at in (0..last).step_by(V::LANES).chain([last]) {
                        let pairs = match run.stride {
                            1 => V::load_pairs(first.add(at), second.add(at)),
                            _ => V::load_even_pairs(first.add(2 * at), second.add(2 * at)),
                        };
                        pairs.store(to.as_mut_ptr().add(at));
                    }
                    continue;
                }
                for (i, to) in to.iter_mut().enumerate() {
                    let x = src.offset(i as isize * run.stride);
                    *to = match (both, second) {
                        (true, _) => pair(*x, *x.offset(channel)),
                        (false, false) => pair(*x, 0),
                        (false, true) => pair(to.to_bits() as u16, *x),
                    };
                }
            }
        }
        c += if both { 2 } else { 1 };
    }
}

#[inline(always)]
unsafe fn widen_all_rows<V: Simd, T: Element>(
    src: *const T,
    from: isize,
    rows: usize,
    len: usize,
    to: usize,
    out: &mut [f32],
) {
    // Rows without gaps are one.
    let (rows, len) = match from == len as isize && to == len {
        true => (1, rows * len),
        false => (rows, len),
    };
    for row in 0..rows {
        let out = &mut out[row * to..][..len];
        // SAFETY: the CPU has V's instruction set; the caller's promise.
        unsafe { gather_run::<V, T>(src.wrapping_offset(row as isize * from), 1, false, out) };
    }
}

#[inline(always)]
unsafe fn narrow_run<V: Simd, T: Element>(x: &[f32], out: &mut [T]) {
    let out = &mut out[..x.len()];
    let whole = x.len() / V::LANES * V::LANES;
    for at in (0..whole).step_by(V::LANES) {
        // SAFETY: the CPU has V's instruction set; a whole vector follows `at` in both.
        unsafe { simd::store(V::load(x.as_ptr().add(at)), out.as_mut_ptr().add(at)) };
    }
    for (x, out) in x[whole..].iter().zip(&mut out[whole..]) {
        *out = T::from_f32(*x);
    }
}

#[inline(always)]
unsafe fn activation_run<V: Simd>(activation: Activation, x: &mut [f32]) {
    let whole = x.len() / V::LANES;
    // SAFETY: the CPU has V's instruction set; the last vector is padded in a copy, so that the
    // functions are compiled once.
    unsafe {
        math::apply::<V>(activation, x.as_mut_ptr(), whole);
        let rest = &mut x[whole * V::LANES..];
        if !rest.is_empty() {
            let mut padded = [0.0f32; 16];
            padded[..rest.len()].copy_from_slice(rest);
            math::apply::<V>(activation, padded.as_mut_ptr(), 1);
            rest.copy_from_slice(&padded[..rest.len()]);
        }
    }
}

/// Writes functions that replace each value by an expression of it, of splatted scalars, and of
/// the values at the same place of other runs.
macro_rules! elementwise {
    ($($name:ident($($splat:ident),*; $($lanes:ident),*) |$x:ident| $value:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name<V: Simd>($($splat: f32,)* $($lanes: &[f32],)* data: &mut [f32]) {
            $(assert_eq!($lanes.len(), data.len(), "runs of different lengths");)*
            let whole = data.len() / V::LANES * V::LANES;
            let rest = data.len() - whole;
            let data = data.as_mut_ptr();
            // SAFETY: the CPU has V's instruction set; whole vectors end at `whole`, the tail
            // covers the rest, in every run.
            unsafe {
                $(let $splat = V::splat($splat);)*
                for i in (0..whole).step_by(V::LANES) {
                    $(let $lanes = V::load($lanes.as_ptr().add(i));)*
                    let $x = V::load(data.add(i));
                    let value: V = $value;
                    value.store(data.add(i));
                }
                if rest > 0 {
                    let tail = V::tail(rest);
                    $(let $lanes = V::load_tail($lanes.as_ptr().add(whole), tail);)*
                    let $x = V::load_tail(data.add(whole), tail);
                    let value: V = $value;
                    value.store_tail(data.add(whole), tail);
                }
            }
        }
    )*};
}

elementwise! {
    affine_run(scale, shift;) |x| x.mul_add(scale, shift);
    affine_lanes(; scale, shift) |x| x.mul_add(scale, shift);
    scale_run(factor;) |x| x * factor;
    scale_lanes_run(; factor) |x| x * factor;
    add_lanes_run(; y) |x| x + y;
    prelu_lanes(; slope) |x| math::leaky_relu(x, slope);
    normalize_run(mean, scale;) |x| (x - mean) * scale;
}

/// Values that are summed in f32 before f64 takes over: rounding grows with the block, not with
/// the run.
const BLOCK: usize = 2048;

#[inline(always)]
unsafe fn sum_run<V: Simd>(x: &[f32]) -> f64 {
    // SAFETY: the CPU has V's instruction set.
    unsafe { reduce::<V, false>(x, 0.0)[0] }
}

#[inline(always)]
unsafe fn sum_deviations_run<V: Simd>(mean: f32, x: &[f32]) -> [f64; 2] {
    // SAFETY: the CPU has V's instruction set.
    unsafe { reduce::<V, true>(x, mean) }
}

/// Sums the distances of values from `from`, and their squares if those are asked for, in four
/// interleaved vectors per block, and merges them in order.
///
/// # Safety
/// The CPU has `V`'s instruction set.
#[inline(always)]
unsafe fn reduce<V: Simd, const SQUARES: bool>(x: &[f32], from: f32) -> [f64; 2] {
    let mut totals = [0.0; 2];
    for block in x.chunks(BLOCK) {
        // SAFETY: whole groups of four vectors are inside the block; the rest goes through a
        // copy, padded with what adds nothing.
        unsafe {
            let mut sums = [[V::splat(0.0); 4]; 2];
            let mut groups = block.chunks_exact(4 * V::LANES);
            for group in &mut groups {
                add_group::<V, SQUARES>(&mut sums, group, from);
            }
            let rest = groups.remainder();
            let mut padded = [from; 64];
            padded[..rest.len()].copy_from_slice(rest);
            add_group::<V, SQUARES>(&mut sums, &padded, from);
            let mut lanes = [0.0f32; 16];
            for (total, sums) in totals.iter_mut().zip(&sums).take(1 + usize::from(SQUARES)) {
                ((sums[0] + sums[1]) + (sums[2] + sums[3])).store(lanes.as_mut_ptr());
                *total += lanes[..V::LANES].iter().map(|&lane| f64::from(lane)).sum::<f64>();
            }
        }
    }
    totals
}

/// # Safety
/// The CPU has `V`'s instruction set; `group` has four vectors.
#[inline(always)]
unsafe fn add_group<V: Simd, const SQUARES: bool>(
    [sums, squares]: &mut [[V; 4]; 2],
    group: &[f32],
    from: f32,
) {
    for (v, (sum, square)) in sums.iter_mut().zip(squares).enumerate() {
        // SAFETY: the caller's promise.
        let x = unsafe { V::load(group.as_ptr().add(v * V::LANES)) } - from;
        *sum = *sum + x;
        if SQUARES {
            *square = x.mul_add(x, *square);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Supported;

    fn run(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.25).collect()
    }

    #[test]
    fn elementwise_runs_agree_with_scalars_at_every_length() {
        for isa in Supported::all() {
            for len in (0..70).chain([1000]) {
                let (x, y, z) = (run(len), run(len + 1)[1..].to_vec(), run(len + 2)[2..].to_vec());
                let check = |what: &str, got: &[f32], want: &dyn Fn(usize) -> f32| {
                    for (i, &got) in got.iter().enumerate() {
                        assert_eq!(got, want(i), "{what} {isa:?} [{i}] of {len}");
                    }
                };
                let edit = |f: &dyn Fn(&mut [f32])| {
                    let mut copy = x.clone();
                    f(&mut copy);
                    copy
                };
                let got = edit(&|x| apply_affine(isa, 2.0, -1.0, x));
                check("affine", &got, &|i| x[i] * 2.0 - 1.0);
                let got = edit(&|x| apply_affine_lanes(isa, &y, &z, x));
                check("affine lanes", &got, &|i| x[i] * y[i] + z[i]);
                check("scale", &edit(&|x| scale(isa, 0.5, x)), &|i| x[i] * 0.5);
                check("scale lanes", &edit(&|x| scale_lanes(isa, &y, x)), &|i| x[i] * y[i]);
                check("add", &edit(&|x| add_lanes(isa, &y, x)), &|i| x[i] + y[i]);
                let leaky = |x: f32, slope: f32| if x >= 0.0 { x } else { x * slope };
                let got = edit(&|x| apply_prelu_lanes(isa, &y, x));
                check("prelu lanes", &got, &|i| leaky(x[i], y[i]));
                let got = edit(&|x| normalize(isa, 1.0, 4.0, x));
                check("normalize", &got, &|i| (x[i] - 1.0) * 4.0);
                let got = edit(&|x| apply_activation(isa, Activation::Relu, x));
                check("relu", &got, &|i| x[i].max(0.0));
            }
        }
    }

    #[test]
    fn reductions_are_exact_on_small_integers_and_close_on_long_runs() {
        for isa in Supported::all() {
            for len in (0..200).chain([BLOCK - 1, BLOCK, BLOCK + 65]) {
                let x = run(len);
                let want: f64 = x.iter().map(|&x| f64::from(x)).sum();
                assert_eq!(sum(isa, &x), want, "{isa:?} {len}");
                let want: f64 = x.iter().map(|&x| f64::from(x - 2.0).powi(2)).sum();
                let around: f64 = x.iter().map(|&x| f64::from(x - 2.0)).sum();
                assert_eq!(sum_deviations(isa, 2.0, &x), [around, want], "{isa:?} {len}");
            }
            let long = vec![0.1f32; 3_000_001];
            let want = f64::from(0.1f32) * long.len() as f64;
            let err = (sum(isa, &long) / want - 1.0).abs();
            assert!(err <= 1e-6, "{isa:?}: {err}");
        }
    }
}
