//! Elementwise operations and reductions over blocks, with parameters per channel.
//!
//! A block is a run of one channel's values, or lines of one value per channel. Sums are in f32
//! within a block and go to f64 from there, in an order that the block alone decides.

use crate::cpu::math;
use crate::cpu::simd::{Simd, per_isa};
use crate::moments::Moments;
use crate::stages::Activation;

/// Parameters of a block: of its one channel, or of each channel of a line.
#[derive(Clone, Copy)]
pub(super) enum Per<'a, const N: usize> {
    One([f32; N]),
    Each([&'a [f32]; N]),
}

impl<const N: usize> Per<'_, N> {
    /// Values of a line of a block of so many.
    fn line(&self, block: usize) -> usize {
        match self {
            Per::One(_) => block,
            Per::Each(values) => values[0].len(),
        }
    }
}

/// Where the sums of a block's channels are added to.
pub(super) enum Sums<'a, const N: usize> {
    One(&'a mut [f64; N]),
    Each([&'a mut [f64]; N]),
}

per_isa! {
    /// `x = (x - hi) * scale + shift`; parameters `[hi, scale, shift]`.
    pub(super) fn linear(per: Per<'_, 3>, x: &mut [f32]) = linear_block;

    /// `d = d * scale`.
    pub(super) fn scale(per: Per<'_, 1>, d: &mut [f32]) = scale_block;

    /// `d = d * a + (x - hi) * b + c`; parameters `[hi, a, b, c]`.
    pub(super) fn combine(per: Per<'_, 4>, x: &[f32], d: &mut [f32]) = combine_block;

    /// `x = x >= 0 ? x : slope * x`.
    pub(super) fn prelu(per: Per<'_, 1>, x: &mut [f32]) = prelu_block;

    /// `d = x > 0 ? d : slope * d`.
    pub(super) fn prelu_slope(per: Per<'_, 1>, x: &[f32], d: &mut [f32]) = prelu_slope_block;

    /// `x = x > 0 ? 0 : x`.
    pub(super) fn keep_negative(x: &mut [f32]) = keep_negative_block;

    /// `d = d * activation'(x)`.
    pub(super) fn activation_slope(activation: Activation, x: &[f32], d: &mut [f32]) = activation_slope_block;

    /// Adds the sums of `d` and of `d * (x - hi)` per channel.
    pub(super) fn sums(hi: Per<'_, 1>, x: &[f32], d: &[f32], sums: Sums<'_, 2>) = sums_block;

    /// Means, what rounding them took away, and sums of squared deviations from the rounded means,
    /// of lines of as many channels, in two passes.
    pub(super) fn moments(x: &[f32], moments: [&mut [f32]; 3]) = moments_block;

    /// Packs bits, set where `lo < x < hi` or x is NaN, the first in the lowest.
    pub(super) fn pack_bits(lo: f32, hi: f32, x: &[f32], bits: &mut [u8]) = pack_bits_block;

    /// `d = d` where the bit is set, else `d * alpha`.
    pub(super) fn apply_bits(alpha: f32, bits: &[u8], d: &mut [f32]) = apply_bits_block;
}

/// Writes functions that replace each value of a block by an expression of it, of the channel's
/// parameters, and of the value at the same place of another block.
macro_rules! per_channel {
    ($($name:ident($($per:ident),*; $($other:ident)?) |$x:ident| $value:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name<V: Simd>(
            per: Per<'_, { [$(stringify!($per)),*].len() }>,
            $($other: &[f32],)?
            data: &mut [f32],
        ) {
            let line = per.line(data.len());
            if data.is_empty() {
                return;
            }
            $(assert_eq!($other.len(), data.len(), "blocks of different lengths");)?
            assert!(data.len().is_multiple_of(line), "a block holds whole lines");
            let whole = line / V::LANES * V::LANES;
            let rest = line - whole;
            // SAFETY: the CPU has V's instruction set; vectors and tails end with their line.
            unsafe {
                match per {
                    Per::One([$($per),*]) => {
                        $(let $per = V::splat($per);)*
                        let data = data.as_mut_ptr();
                        for i in (0..whole).step_by(V::LANES) {
                            $(let $other = V::load($other.as_ptr().add(i));)?
                            let $x = V::load(data.add(i));
                            let value: V = $value;
                            value.store(data.add(i));
                        }
                        if rest > 0 {
                            let tail = V::tail(rest);
                            $(let $other = V::load_tail($other.as_ptr().add(whole), tail);)?
                            let $x = V::load_tail(data.add(whole), tail);
                            let value: V = $value;
                            value.store_tail(data.add(whole), tail);
                        }
                    }
                    Per::Each([$($per),*]) => {
                        $(assert!($per.len() == line, "one value per channel");)*
                        for first in (0..data.len()).step_by(line) {
                            let data = data.as_mut_ptr().add(first);
                            for i in (0..whole).step_by(V::LANES) {
                                $(let $per = V::load($per.as_ptr().add(i));)*
                                $(let $other = V::load($other.as_ptr().add(first + i));)?
                                let $x = V::load(data.add(i));
                                let value: V = $value;
                                value.store(data.add(i));
                            }
                            if rest > 0 {
                                let tail = V::tail(rest);
                                $(let $per = V::load_tail($per.as_ptr().add(whole), tail);)*
                                $(let $other = V::load_tail($other.as_ptr().add(first + whole), tail);)?
                                let $x = V::load_tail(data.add(whole), tail);
                                let value: V = $value;
                                value.store_tail(data.add(whole), tail);
                            }
                        }
                    }
                }
            }
        }
    )*};
}

per_channel! {
    linear_block(hi, scale, shift;) |x| (x - hi).mul_add(scale, shift);
    scale_block(scale;) |d| d * scale;
    combine_block(hi, a, b, c; x) |d| d.mul_add(a, (x - hi).mul_add(b, c));
    prelu_block(slope;) |x| math::leaky_relu(x, slope);
    prelu_slope_block(slope; x) |d| math::leaky(x, slope, d);
}

#[inline(always)]
unsafe fn keep_negative_block<V: Simd>(x: &mut [f32]) {
    x.iter_mut().for_each(|x| *x = if *x > 0.0 { 0.0 } else { *x });
}

#[inline(always)]
unsafe fn activation_slope_block<V: Simd>(activation: Activation, x: &[f32], d: &mut [f32]) {
    assert_eq!(x.len(), d.len(), "blocks of different lengths");
    let whole = x.len() / V::LANES;
    // SAFETY: the CPU has V's instruction set; the last vector is padded in a copy.
    unsafe {
        math::apply_slope::<V>(activation, x.as_ptr(), d.as_mut_ptr(), whole);
        let first = whole * V::LANES;
        let (x, d) = (&x[first..], &mut d[first..]);
        if !x.is_empty() {
            let (mut padded_x, mut padded_d) = ([0.0f32; 16], [0.0f32; 16]);
            padded_x[..x.len()].copy_from_slice(x);
            padded_d[..x.len()].copy_from_slice(d);
            math::apply_slope::<V>(activation, padded_x.as_ptr(), padded_d.as_mut_ptr(), 1);
            d.copy_from_slice(&padded_d[..x.len()]);
        }
    }
}

#[inline(always)]
unsafe fn sums_block<V: Simd>(hi: Per<'_, 1>, x: &[f32], d: &[f32], sums: Sums<'_, 2>) {
    assert_eq!(x.len(), d.len(), "blocks of different lengths");
    let (x_ptr, d_ptr) = (x.as_ptr(), d.as_ptr());
    // SAFETY: the CPU has V's instruction set; vectors and tails end with the block, or with the
    // line.
    unsafe {
        match (hi, sums) {
            (Per::One([hi]), Sums::One(sums)) => {
                // Two vectors of each sum: a chain of additions is longer than the loads.
                let mut ones = [V::splat(0.0); 2];
                let mut products = ones;
                let hi = V::splat(hi);
                let whole = x.len() / V::LANES;
                for v in 0..whole {
                    let d = V::load(d_ptr.add(v * V::LANES));
                    let x = V::load(x_ptr.add(v * V::LANES)) - hi;
                    ones[v % 2] = ones[v % 2] + d;
                    products[v % 2] = d.mul_add(x, products[v % 2]);
                }
                let rest = x.len() - whole * V::LANES;
                if rest > 0 {
                    // The other lanes of d are zero.
                    let tail = V::tail(rest);
                    let d = V::load_tail(d_ptr.add(whole * V::LANES), tail);
                    let x = V::load_tail(x_ptr.add(whole * V::LANES), tail) - hi;
                    ones[0] = ones[0] + d;
                    products[0] = d.mul_add(x, products[0]);
                }
                for (sum, vectors) in sums.iter_mut().zip([ones, products]) {
                    let mut lanes = [0.0f32; 16];
                    (vectors[0] + vectors[1]).store(lanes.as_mut_ptr());
                    *sum += lanes[..V::LANES].iter().map(|&lane| f64::from(lane)).sum::<f64>();
                }
            }
            (Per::Each([hi]), Sums::Each([ones_to, products_to])) => {
                let line = hi.len();
                assert!(x.len().is_multiple_of(line), "a block holds whole lines");
                let lines = x.len() / line;
                for first in (0..line).step_by(V::LANES) {
                    let lanes = V::LANES.min(line - first);
                    let tail = V::tail(lanes);
                    let hi = V::load_tail(hi.as_ptr().add(first), tail);
                    let (mut ones, mut products) = (V::splat(0.0), V::splat(0.0));
                    for at in (0..lines).map(|i| i * line + first) {
                        let d = V::load_tail(d_ptr.add(at), tail);
                        let x = V::load_tail(x_ptr.add(at), tail) - hi;
                        ones = ones + d;
                        products = d.mul_add(x, products);
                    }
                    for (to, vector) in [(&mut *ones_to, ones), (&mut *products_to, products)] {
                        let mut values = [0.0f32; 16];
                        vector.store(values.as_mut_ptr());
                        let to = &mut to[first..first + lanes];
                        to.iter_mut().zip(values).for_each(|(to, x)| *to += f64::from(x));
                    }
                }
            }
            _ => unreachable!("sums are placed like the parameters"),
        }
    }
}

#[inline(always)]
unsafe fn moments_block<V: Simd>(x: &[f32], [means, rests, deviations]: [&mut [f32]; 3]) {
    let line = means.len();
    assert!(rests.len() == line && deviations.len() == line, "one value per channel");
    assert!(x.len().is_multiple_of(line), "whole lines");
    let lines = x.len() / line;
    let x = x.as_ptr();
    let (means, rests) = (means.as_mut_ptr(), rests.as_mut_ptr());
    let deviations = deviations.as_mut_ptr();
    // Line by line, as memory delivers them; sums are in cache. Values are taken relative to the
    // first line, so that a large mean costs no digits.
    // SAFETY: the CPU has V's instruction set; vectors end with the line.
    unsafe {
        let share = V::splat(1.0 / lines as f32);
        let each = (0..line).step_by(V::LANES);
        for at in each.clone() {
            V::splat(0.0).store_tail(means.add(at), V::tail(V::LANES.min(line - at)));
            V::splat(0.0).store_tail(rests.add(at), V::tail(V::LANES.min(line - at)));
            V::splat(0.0).store_tail(deviations.add(at), V::tail(V::LANES.min(line - at)));
        }
        for i in 1..lines {
            for at in each.clone() {
                let tail = V::tail(V::LANES.min(line - at));
                let value =
                    V::load_tail(x.add(i * line + at), tail) - V::load_tail(x.add(at), tail);
                (V::load_tail(means.add(at), tail) + value).store_tail(means.add(at), tail);
            }
        }
        for at in each.clone() {
            let tail = V::tail(V::LANES.min(line - at));
            let sum = V::load_tail(means.add(at), tail);
            let mean = sum.mul_add(share, V::load_tail(x.add(at), tail));
            mean.store_tail(means.add(at), tail);
        }
        for i in 0..lines {
            for at in each.clone() {
                let tail = V::tail(V::LANES.min(line - at));
                let value =
                    V::load_tail(x.add(i * line + at), tail) - V::load_tail(means.add(at), tail);
                let squares = value.mul_add(value, V::load_tail(deviations.add(at), tail));
                squares.store_tail(deviations.add(at), tail);
                (V::load_tail(rests.add(at), tail) + value).store_tail(rests.add(at), tail);
            }
        }
        for at in each {
            let tail = V::tail(V::LANES.min(line - at));
            (V::load_tail(rests.add(at), tail) * share).store_tail(rests.add(at), tail);
        }
    }
}

#[inline(always)]
unsafe fn pack_bits_block<V: Simd>(lo: f32, hi: f32, x: &[f32], bits: &mut [u8]) {
    for (bits, x) in bits.iter_mut().zip(x.chunks(8)) {
        let bit = |(i, &x): (usize, &f32)| u8::from(!(x <= lo || x >= hi)) << i;
        *bits = x.iter().enumerate().map(bit).fold(0, |a, b| a | b);
    }
}

#[inline(always)]
unsafe fn apply_bits_block<V: Simd>(alpha: f32, bits: &[u8], d: &mut [f32]) {
    for (&bits, d) in bits.iter().zip(d.chunks_mut(8)) {
        for (i, d) in d.iter_mut().enumerate() {
            // As a product, a gradient that is not finite would come through a slope of zero.
            *d = match bits >> i & 1 == 1 {
                true => *d,
                false if alpha == 0.0 => 0.0,
                false => *d * alpha,
            };
        }
    }
}

/// Moments of lines of channels, block after block.
pub(super) struct LineMoments {
    pub count: f64,
    pub mean: Vec<f64>,
    pub deviations: Vec<f64>,
}

impl LineMoments {
    pub(super) fn new(channels: usize) -> Self {
        LineMoments { count: 0.0, mean: vec![0.0; channels], deviations: vec![0.0; channels] }
    }

    /// Merges a block of `lines` lines.
    pub(super) fn merge(&mut self, lines: usize, [means, rests, deviations]: [&[f32]; 3]) {
        let lines = lines as f64;
        let count = self.count + lines;
        let (share, product) = (lines / count, self.count * lines / count);
        let new = means.iter().zip(rests).zip(deviations);
        for ((mean, all), ((&m, &r), &d)) in self.mean.iter_mut().zip(&mut self.deviations).zip(new)
        {
            let rest = f64::from(r);
            let delta = f64::from(m) + rest - *mean;
            *mean += delta * share;
            *all += f64::from(d) - lines * rest * rest + delta * delta * product;
        }
        self.count = count;
    }

    pub(super) fn of(&self, channel: usize) -> Moments {
        let (mean, deviations) = (self.mean[channel], self.deviations[channel]);
        Moments { count: self.count, mean, deviations }
    }
}
