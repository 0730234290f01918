//! What becomes of a tile's sums: scaled, added to the residual, clipped, rounded and stored.
//!
//! Plain code over vectors of sixteen, which the compiler turns into each instruction set's. No
//! operation is fused, so that every instruction set gives the same bits.

use super::sums::SUMS_STRIDE;

/// Values that are finished together.
pub(crate) const CHUNK: usize = 16;

/// `1.5 * 2^23`: the sum of it and a small f32 has the nearest integer, ties to even, in its lowest
/// bits. (Rounding by name is a call of a function where the CPU has no instruction for it.)
const ROUND: f32 = 12_582_912.0;

/// The range that values are cut down to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Clip {
    pub lo: f32,
    pub hi: f32,
}

/// How sums become values: the same for every tile of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scaling {
    /// Before the residual is added.
    pub before: Clip,
    /// At the end; within what `dst`'s type holds where it is a byte.
    pub clip: Clip,
    /// Of dst, where it is a byte.
    pub zero_point: i32,
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
pub(crate) struct Finish<T> {
    pub sums: *const i32,
    pub rows: usize,
    pub lanes: usize,
    pub lanes_are_channels: bool,
    /// Added to the sums: one per channel, readable up to a whole [`CHUNK`].
    pub offset: *const i32,
    /// Then they are multiplied: as above.
    pub scale: *const f32,
    pub scaling: Scaling,
    pub dst: Operand<T>,
    pub residual: Option<Operand<u8>>,
}

/// A result's element: a byte of either sign, or an f32.
pub(crate) trait Stored: Copy + 'static {
    fn of(values: [f32; CHUNK], zero_point: i32) -> [Self; CHUNK];
}

impl Stored for u8 {
    #[inline(always)]
    fn of(values: [f32; CHUNK], zero_point: i32) -> [u8; CHUNK] {
        // The constant's own bits leave the lowest byte alone.
        values.map(|value| (value + ROUND).to_bits().wrapping_add(zero_point as u32) as u8)
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn of(values: [f32; CHUNK], _: i32) -> [f32; CHUNK] {
        values
    }
}

#[inline(always)]
fn clip(x: f32, Clip { lo, hi }: Clip) -> f32 {
    let x = if x > lo { x } else { lo };
    if x < hi { x } else { hi }
}

/// Finishes a tile.
///
/// # Safety
/// `sums` is readable in rows of [`SUMS_STRIDE`], offsets and scales are as they say; dst is
/// writable, and the residual readable, at every channel and position of the tile, and their
/// position tables are readable at every position of it.
#[inline(always)]
pub(super) unsafe fn finish<T: Stored, const RESIDUAL: bool>(tile: &Finish<T>) {
    for lane in (0..tile.lanes).step_by(CHUNK) {
        // SAFETY: the caller's promises.
        unsafe {
            match tile.lanes_are_channels {
                true => chunks::<T, RESIDUAL, true>(tile, lane),
                false => chunks::<T, RESIDUAL, false>(tile, lane),
            }
        }
    }
}

/// Finishes a chunk of each row.
///
/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn chunks<T: Stored, const RESIDUAL: bool, const CHANNELS: bool>(
    tile: &Finish<T>,
    lane: usize,
) {
    let count = (tile.lanes - lane).min(CHUNK);
    let channels = if CHANNELS { lane } else { 0 };
    // SAFETY: the caller's promises; a chunk of sums lies in its row, whatever the lanes, and
    // parameters are readable up to a whole chunk.
    unsafe {
        let mut offset = tile.offset.add(channels).cast::<[i32; CHUNK]>().read_unaligned();
        let mut scale = tile.scale.add(channels).cast::<[f32; CHUNK]>().read_unaligned();
        let dst = Lanes::<T>::new::<CHANNELS>(&tile.dst, lane, count);
        let residual =
            tile.residual.as_ref().map(|residual| Lanes::new::<CHANNELS>(residual, lane, count));
        let dense = count == CHUNK && dst.dense && residual.as_ref().is_none_or(|r| r.dense);
        for row in 0..tile.rows {
            let sums =
                tile.sums.add(row * SUMS_STRIDE + lane).cast::<[i32; CHUNK]>().read_unaligned();
            if !CHANNELS {
                (offset, scale) = ([*tile.offset.add(row); CHUNK], [*tile.scale.add(row); CHUNK]);
            }
            let to = dst.row::<CHANNELS>(row);
            let from = residual.as_ref().filter(|_| RESIDUAL);
            let from = from.map(|residual| (residual, residual.row::<CHANNELS>(row)));
            if dense {
                let bytes = from.map(|(_, ptr)| ptr.cast::<[u8; CHUNK]>().read_unaligned());
                let values = values::<T>(sums, offset, scale, bytes, &tile.scaling);
                to.cast::<[T; CHUNK]>().write_unaligned(values);
            } else {
                let bytes = from.map(|(residual, ptr)| {
                    let mut bytes = [0; CHUNK];
                    for (l, byte) in bytes[..count].iter_mut().enumerate() {
                        *byte = *ptr.wrapping_offset(residual.step(l));
                    }
                    bytes
                });
                let values = values::<T>(sums, offset, scale, bytes, &tile.scaling);
                for (l, &value) in values[..count].iter().enumerate() {
                    *to.wrapping_offset(dst.step(l)) = value;
                }
            }
        }
    }
}

#[inline(always)]
fn values<T: Stored>(
    sums: [i32; CHUNK],
    offset: [i32; CHUNK],
    scale: [f32; CHUNK],
    residual: Option<[u8; CHUNK]>,
    scaling: &Scaling,
) -> [T; CHUNK] {
    let mut values = [0.0; CHUNK];
    for l in 0..CHUNK {
        values[l] = sums[l].wrapping_add(offset[l]) as f32 * scale[l];
    }
    if let Some(bytes) = residual {
        for l in 0..CHUNK {
            let byte = i32::from(bytes[l] ^ scaling.residual_flip) - scaling.residual_zero_point;
            values[l] = clip(values[l], scaling.before) + byte as f32 * scaling.residual_scale;
        }
    }
    T::of(values.map(|value| clip(value, scaling.clip)), scaling.zero_point)
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
            let dense = adjacent || table.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1));
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
