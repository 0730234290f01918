//! What becomes of a tile's sums: scaled, added to the residual, clipped, rounded and stored.
//!
//! Plain code over vectors of sixteen, which the compiler turns into each instruction set's. No
//! operation is fused, so that every instruction set gives the same bits.

use super::quantize::{self, PerPosition};
use super::sums::SUMS_STRIDE;
use crate::cpu::simd::{Simd, load, store};
use crate::dtype::{bf16, f16};

/// Values that are finished together.
pub(crate) const CHUNK: usize = 16;

/// The nearest integer, ties to even, of an f32 that an i16 holds; right modulo 256. (Rounding by
/// name is a call of a function where the CPU has no instruction for it.)
#[inline(always)]
pub(super) fn round(x: f32) -> u32 {
    // `1.5 * 2^23`: the sum of it and a small f32 has the integer in its lowest bits, and its own bits
    // leave the lowest two bytes alone.
    (x + 12_582_912.0).to_bits()
}

/// The range that values are cut down to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Clip {
    pub lo: f32,
    pub hi: f32,
}

impl Clip {
    /// Bounds keep NaN, which only a real src brings.
    #[inline(always)]
    pub(crate) fn cut(self, x: f32) -> f32 {
        let x = if self.lo > x { self.lo } else { x };
        if self.hi < x { self.hi } else { x }
    }
}

/// No bounds.
impl Default for Clip {
    fn default() -> Self {
        Clip { lo: f32::NEG_INFINITY, hi: f32::INFINITY }
    }
}

/// How sums become values: the same for every tile of a layer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scaling {
    /// Before the residual is added.
    pub before: Clip,
    /// At the end; within what `dst`'s type holds where it is a byte.
    pub clip: Clip,
    /// Of dst, where it is a byte.
    pub zero_point: i32,
    /// What makes a byte of dst unsigned, by exclusive or.
    pub flip: u8,
    /// What makes a byte of the residual unsigned, by exclusive or.
    pub residual_flip: u8,
    /// Of the residual as an unsigned byte.
    pub residual_zero_point: i32,
    /// From the residual to dst.
    pub residual_scale: f32,
}

/// A tensor at the channels of a tile, the first of which it points to.
#[derive(Clone, Copy)]
pub(crate) struct Operand<T> {
    pub ptr: *mut T,
    /// From channel to channel, in elements.
    pub channel: isize,
    /// How far each of the tile's positions is from `ptr`, in elements.
    pub positions: *const isize,
    /// Whether they are known to be adjacent.
    pub adjacent: bool,
}

/// A tile to finish.
#[derive(Clone, Copy)]
pub(crate) struct Finish<'a, T, R> {
    pub sums: *const i32,
    pub rows: usize,
    pub lanes: usize,
    pub lanes_are_channels: bool,
    /// One per channel, readable up to a whole [`CHUNK`]: added to the sums, or the weights' sum where
    /// zero points are those of positions.
    pub offset: *const i32,
    /// Then they are multiplied: as above.
    pub scale: *const f32,
    /// And this is added, as above, where scales are those of positions.
    pub shift: *const f32,
    /// Of the tile's positions, if `R` is [real](Added::REAL).
    pub quantization: PerPosition<'a>,
    pub scaling: Scaling,
    pub dst: Operand<T>,
    pub residual: Option<Operand<R>>,
}

/// A result's element: a byte of either sign, or a real number.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    /// Whether it is a byte.
    const BYTE: bool = false;

    /// # Safety
    /// The CPU has V's instructions.
    unsafe fn of<V: Simd>(values: [f32; CHUNK], zero_point: i32) -> [Self; CHUNK];
}

impl Stored for u8 {
    const BYTE: bool = true;

    #[inline(always)]
    unsafe fn of<V: Simd>(values: [f32; CHUNK], zero_point: i32) -> [u8; CHUNK] {
        values.map(|value| round(value).wrapping_add(zero_point as u32) as u8)
    }
}

/// What a layer adds: bytes with a scale beside sources of bytes, real numbers of dst's type beside
/// real ones.
pub(crate) trait Added: Copy + Default + Send + Sync + 'static {
    /// What src holds beside it.
    type Source: quantize::Element;
    /// Whether it is real, and so is src, whose positions then have quantisations of their own.
    const REAL: bool;

    /// # Safety
    /// The CPU has V's instructions.
    unsafe fn real<V: Simd>(values: [Self; CHUNK], scaling: &Scaling) -> [f32; CHUNK];
}

impl Added for u8 {
    type Source = u8;
    const REAL: bool = false;

    #[inline(always)]
    unsafe fn real<V: Simd>(bytes: [u8; CHUNK], scaling: &Scaling) -> [f32; CHUNK] {
        bytes.map(|byte| {
            let steps = i32::from(byte ^ scaling.residual_flip) - scaling.residual_zero_point;
            steps as f32 * scaling.residual_scale
        })
    }
}

macro_rules! real {
    ($($real:ty)*) => {$(
        impl Stored for $real {
            #[inline(always)]
            unsafe fn of<V: Simd>(values: [f32; CHUNK], _: i32) -> [$real; CHUNK] {
                let mut out = [<$real>::default(); CHUNK];
                for i in (0..CHUNK).step_by(V::LANES) {
                    // SAFETY: the caller's promise; lanes divide a chunk.
                    unsafe { store(V::load(values[i..].as_ptr()), out[i..].as_mut_ptr()) }
                }
                out
            }
        }

        impl Added for $real {
            type Source = f32;
            const REAL: bool = true;

            #[inline(always)]
            unsafe fn real<V: Simd>(values: [$real; CHUNK], _: &Scaling) -> [f32; CHUNK] {
                let mut out = [0.0; CHUNK];
                for i in (0..CHUNK).step_by(V::LANES) {
                    // SAFETY: as above.
                    unsafe { load::<V, $real>(values[i..].as_ptr()).store(out[i..].as_mut_ptr()) }
                }
                out
            }
        }
    )*};
}
real!(f32 f16 bf16);

/// Finishes a tile.
///
/// # Safety
/// The CPU has V's instructions. `sums` is readable in rows of [`SUMS_STRIDE`], parameters are as they
/// say; dst is writable, and the residual readable, at every channel and position of the tile, and their
/// position tables are readable at every position of it.
#[inline(always)]
pub(super) unsafe fn finish<V: Simd, T: Stored, R: Added>(tile: &Finish<'_, T, R>) {
    for lane in (0..tile.lanes).step_by(CHUNK) {
        // SAFETY: the caller's promises.
        unsafe {
            match (tile.lanes_are_channels, tile.residual.is_some()) {
                (true, true) => chunks::<V, T, R, true, true>(tile, lane),
                (true, false) => chunks::<V, T, R, false, true>(tile, lane),
                (false, true) => chunks::<V, T, R, true, false>(tile, lane),
                (false, false) => chunks::<V, T, R, false, false>(tile, lane),
            }
        }
    }
}

/// Finishes a chunk of each row.
///
/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn chunks<V: Simd, T: Stored, R: Added, const RESIDUAL: bool, const CHANNELS: bool>(
    tile: &Finish<'_, T, R>,
    lane: usize,
) {
    let count = (tile.lanes - lane).min(CHUNK);
    let (channels, positions) = if CHANNELS { (lane, 0) } else { (0, lane) };
    // SAFETY: the caller's promises; a chunk of sums lies in its row, whatever the lanes, and
    // parameters are readable up to a whole chunk.
    unsafe {
        let read = |from: *const f32| from.cast::<[f32; CHUNK]>().read_unaligned();
        let mut factors = Factors {
            offset: tile.offset.add(channels).cast::<[i32; CHUNK]>().read_unaligned(),
            scale: read(tile.scale.add(channels)),
            ..Factors::default()
        };
        let PerPosition { scale, zero_point } = tile.quantization;
        if R::REAL {
            factors.shift = read(tile.shift.add(channels));
            factors.src_scale = read(scale[positions..][..CHUNK].as_ptr());
            let zero_point = zero_point[positions..][..CHUNK].as_ptr();
            factors.src_zero_point = zero_point.cast::<[i32; CHUNK]>().read_unaligned();
        }
        let dst = Lanes::<T>::new::<CHANNELS>(&tile.dst, lane, count);
        let residual = tile.residual.as_ref().filter(|_| RESIDUAL);
        let residual = residual.map(|residual| Lanes::new::<CHANNELS>(residual, lane, count));
        let dense = count == CHUNK && dst.dense && residual.as_ref().is_none_or(|r| r.dense);
        for row in 0..tile.rows {
            let sums =
                tile.sums.add(row * SUMS_STRIDE + lane).cast::<[i32; CHUNK]>().read_unaligned();
            if !CHANNELS {
                factors.offset = [*tile.offset.add(row); CHUNK];
                factors.scale = [*tile.scale.add(row); CHUNK];
            }
            match (R::REAL, CHANNELS) {
                (true, true) => {
                    factors.src_scale = [scale[row]; CHUNK];
                    factors.src_zero_point = [zero_point[row]; CHUNK];
                }
                (true, false) => factors.shift = [*tile.shift.add(row); CHUNK],
                (false, _) => {}
            }
            let to = dst.row::<CHANNELS>(row);
            let from = residual.as_ref().map(|residual| (residual, residual.row::<CHANNELS>(row)));
            let added = from.map(|(residual, ptr)| {
                if dense {
                    return ptr.cast::<[R; CHUNK]>().read_unaligned();
                }
                let mut added = [R::default(); CHUNK];
                for (l, added) in added[..count].iter_mut().enumerate() {
                    *added = *ptr.wrapping_offset(residual.step(l));
                }
                added
            });
            let values = values::<V, T, R>(sums, &factors, added, &tile.scaling);
            if dense {
                to.cast::<[T; CHUNK]>().write_unaligned(values);
            } else {
                for (l, &value) in values[..count].iter().enumerate() {
                    *to.wrapping_offset(dst.step(l)) = value;
                }
            }
        }
    }
}

/// What a chunk of sums meets.
#[derive(Default)]
struct Factors {
    offset: [i32; CHUNK],
    scale: [f32; CHUNK],
    shift: [f32; CHUNK],
    src_scale: [f32; CHUNK],
    src_zero_point: [i32; CHUNK],
}

/// # Safety
/// The CPU has V's instructions.
#[inline(always)]
unsafe fn values<V: Simd, T: Stored, R: Added>(
    sums: [i32; CHUNK],
    factors: &Factors,
    added: Option<[R; CHUNK]>,
    scaling: &Scaling,
) -> [T; CHUNK] {
    let Factors { offset, scale, shift, src_scale, src_zero_point } = factors;
    let mut values = [0.0; CHUNK];
    for l in 0..CHUNK {
        values[l] = if R::REAL {
            let sum = sums[l].wrapping_sub(src_zero_point[l].wrapping_mul(offset[l]));
            sum as f32 * (src_scale[l] * scale[l]) + shift[l]
        } else {
            sums[l].wrapping_add(offset[l]) as f32 * scale[l]
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        if let Some(added) = added {
            let added = R::real::<V>(added, scaling);
            for l in 0..CHUNK {
                values[l] = scaling.before.cut(values[l]) + added[l];
            }
        }
        T::of::<V>(values.map(|value| scaling.clip.cut(value)), scaling.zero_point)
    }
}

/// The lanes of a chunk in memory.
struct Lanes<T> {
    /// Lane 0 of channel 0 or of position offset 0, whichever rows are.
    ptr: *mut T,
    channel: isize,
    /// At the first row, or the first lane.
    positions: *const isize,
    /// Of lanes that are channels.
    spacing: Option<isize>,
    /// Whether lanes are adjacent.
    dense: bool,
}

impl<T> Lanes<T> {
    /// # Safety
    /// As [`finish`].
    #[inline(always)]
    unsafe fn new<const CHANNELS: bool>(operand: &Operand<T>, lane: usize, count: usize) -> Self {
        let &Operand { ptr, channel, positions, adjacent } = operand;
        if CHANNELS {
            let ptr = ptr.wrapping_offset(lane as isize * channel);
            return Lanes { ptr, channel, positions, spacing: Some(channel), dense: channel == 1 };
        }
        // SAFETY: the caller's promise.
        unsafe {
            let positions = operand.positions.add(lane);
            let table = std::slice::from_raw_parts(positions, count);
            let dense = adjacent || super::adjacent(table);
            let ptr = ptr.wrapping_offset(table[0]);
            Lanes { ptr, channel, positions, spacing: None, dense }
        }
    }

    /// Lane 0 of a row.
    ///
    /// # Safety
    /// As [`finish`].
    #[inline(always)]
    unsafe fn row<const CHANNELS: bool>(&self, row: usize) -> *mut T {
        if CHANNELS {
            // SAFETY: the caller's promise.
            return self.ptr.wrapping_offset(unsafe { *self.positions.add(row) });
        }
        self.ptr.wrapping_offset(row as isize * self.channel)
    }

    /// The distance of a lane from its row's first.
    ///
    /// # Safety
    /// As [`finish`].
    #[inline(always)]
    unsafe fn step(&self, lane: usize) -> isize {
        match self.spacing {
            Some(spacing) => lane as isize * spacing,
            // SAFETY: the caller's promise.
            None => unsafe { *self.positions.add(lane) - *self.positions },
        }
    }
}
