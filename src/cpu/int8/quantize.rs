//! Sources of real numbers: how far their values reach, the scales and zero points that follow, and
//! the bytes that these make of them.

use super::finish::{CHUNK, round};
use super::kernels::{Kernel, Packing};
use super::pack::Source;

/// The quantisation of each of some positions, and room for a whole [`CHUNK`] behind them.
#[derive(Clone, Copy, Default)]
pub(crate) struct PerPosition<'a> {
    pub scale: &'a [f32],
    pub zero_point: &'a [i32],
}

impl<'a> PerPosition<'a> {
    /// From some position on.
    pub(crate) fn from(self, first: usize) -> PerPosition<'a> {
        PerPosition { scale: &self.scale[first..], zero_point: &self.zero_point[first..] }
    }
}

/// The table that [`PerPosition`] looks into.
#[derive(Default)]
pub(crate) struct Table {
    scale: Vec<f32>,
    zero_point: Vec<i32>,
}

impl Table {
    /// The quantisations of ranges, one per position.
    pub(crate) fn fill(&mut self, ranges: impl ExactSizeIterator<Item = Reach>) {
        self.scale.clear();
        self.zero_point.clear();
        let chunk = [(1.0, 0); CHUNK];
        for (scale, zero_point) in ranges.map(Reach::quantization).chain(chunk) {
            self.scale.push(scale);
            self.zero_point.push(zero_point);
        }
    }

    pub(crate) fn get(&self) -> PerPosition<'_> {
        PerPosition { scale: &self.scale, zero_point: &self.zero_point }
    }
}

/// How far values reach from zero: the bits of the greatest, and of the negated least, both as f32 and
/// not below zero. Bits are in the order of the numbers, and those of NaN above all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    pub above: i32,
    pub below: i32,
}

impl Reach {
    /// The range of both.
    #[inline(always)]
    pub(crate) fn and(self, other: Reach) -> Reach {
        Reach { above: self.above.max(other.above), below: self.below.max(other.below) }
    }

    /// Scale and zero point, as [`DynamicQuantized`](crate::quantized::DynamicQuantized) defines them.
    pub(crate) fn quantization(self) -> (f32, i32) {
        let [above, below] = [self.above, self.below].map(|bits| f32::from_bits(bits as u32));
        let scale = match (above + below) / 255.0 {
            f32::INFINITY => above / 255.0 + below / 255.0,
            scale => scale,
        };
        let scale = match scale {
            0.0 if above + below == 0.0 => 1.0,
            scale if scale < f32::INFINITY => scale.max(f32::MIN_POSITIVE),
            // Of values that are not finite.
            _ => f32::NAN,
        };
        let zero_point = below / scale;
        let zero_point = if zero_point < 255.0 { zero_point } else { 255.0 };
        (scale, (round(zero_point) & 0xff) as i32)
    }
}

/// What src holds: bytes of either sign, or f32.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// What makes unsigned bytes of a position's values.
    type Quantizer: Copy;

    fn quantizer(source: &Source<'_, Self>, position: usize) -> Self::Quantizer;
    fn byte(self, quantizer: Self::Quantizer) -> u8;
    /// Rows, if they are of bytes.
    fn bytes(_rows: &[*const Self]) -> Option<&[*const u8]> {
        None
    }
    /// How far it reaches from zero; nowhere if it is a byte.
    fn reach(self) -> Reach;
    /// Which of a kernel's functions read it.
    fn packing(kernel: &Kernel) -> &Packing<Self>;
}

impl Element for u8 {
    type Quantizer = u8;

    #[inline(always)]
    fn quantizer(source: &Source<'_, u8>, _: usize) -> u8 {
        source.flip
    }

    #[inline(always)]
    fn byte(self, flip: u8) -> u8 {
        self ^ flip
    }

    #[inline(always)]
    fn bytes(rows: &[*const u8]) -> Option<&[*const u8]> {
        Some(rows)
    }

    #[inline(always)]
    fn reach(self) -> Reach {
        Reach::default()
    }

    fn packing(kernel: &Kernel) -> &Packing<u8> {
        &kernel.pack_u8
    }
}

impl Element for f32 {
    /// Scale and zero point.
    type Quantizer = (f32, i32);

    #[inline(always)]
    fn quantizer(source: &Source<'_, f32>, position: usize) -> (f32, i32) {
        let PerPosition { scale, zero_point } = source.quantization;
        (scale[position], zero_point[position])
    }

    #[inline(always)]
    fn byte(self, (scale, zero_point): (f32, i32)) -> u8 {
        let (steps, zero) = (self / scale, zero_point as f32);
        let steps = if steps > -zero { steps } else { -zero };
        let steps = if steps < 255.0 - zero { steps } else { 255.0 - zero };
        round(steps).wrapping_add(zero_point as u32) as u8
    }

    #[inline(always)]
    fn reach(self) -> Reach {
        Reach { above: self.to_bits() as i32, below: (-self).to_bits() as i32 }
    }

    fn packing(kernel: &Kernel) -> &Packing<f32> {
        &kernel.pack_f32
    }
}

/// Widens ranges, one per position, by the values of a block.
///
/// # Safety
/// The source is readable at every channel and position.
#[inline(always)]
pub(super) unsafe fn ranges<S: Element>(source: &Source<'_, S>, ranges: &mut [Reach]) {
    let &Source { ptr, channel, positions, k, .. } = source;
    // SAFETY: the caller's promise; channels are adjacent in the first case, positions in the second.
    unsafe {
        if channel == 1 {
            for (&position, range) in positions.iter().zip(ranges) {
                let row = std::slice::from_raw_parts(ptr.wrapping_offset(position), k);
                let (whole, rest) = row.as_chunks::<32>();
                let mut lanes = [Reach::default(); 32];
                for values in whole.iter().map(|values| &values[..]).chain([rest]) {
                    for (lane, &x) in lanes.iter_mut().zip(values) {
                        *lane = lane.and(x.reach());
                    }
                }
                *range = lanes.into_iter().fold(*range, Reach::and);
            }
            return;
        }
        let dense = super::adjacent(positions);
        for c in 0..k as isize {
            let row = ptr.wrapping_offset(c * channel);
            if dense && !positions.is_empty() {
                let row = row.wrapping_offset(positions[0]);
                let row = std::slice::from_raw_parts(row, positions.len());
                for (range, &x) in ranges.iter_mut().zip(row) {
                    *range = range.and(x.reach());
                }
            } else {
                for (range, &position) in ranges.iter_mut().zip(positions) {
                    *range = range.and((*row.wrapping_offset(position)).reach());
                }
            }
        }
    }
}
