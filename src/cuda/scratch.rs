//! What launches of one stream use in between and leave behind: the sums of tiles that several blocks
//! share, how many of these have arrived, and the moments of a layer norm.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result};

use super::device::CudaDevice;
use super::memory::{allocate, free};
use crate::error::{Error, Result};
use crate::problem::same_place;
use crate::tensor::{Place, TensorMut};

/// What one launch needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Need {
    /// Sums of all splits of all tiles, or as much of something else.
    pub sums: usize,
    /// Tiles, each with a counter.
    pub tiles: usize,
}

impl Need {
    /// Room for either of two uses, one after the other.
    pub(super) fn or(self, other: Need) -> Need {
        Need { sums: self.sums.max(other.sums), tiles: self.tiles.max(other.tiles) }
    }

    /// Sums begin at a multiple of this.
    const ALIGN: usize = 256;

    /// The counters come first.
    fn sums_offset(self) -> usize {
        (self.tiles * size_of::<u32>()).next_multiple_of(Need::ALIGN)
    }

    pub(super) fn bytes(self) -> usize {
        self.sums_offset() + self.sums * size_of::<f32>()
    }
}

/// Memory of the caller's, aligned to 16 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Given {
    pub address: u64,
    pub bytes: usize,
}

impl Given {
    /// # Errors
    /// [`Error::WrongDevice`], [`Error::Misaligned`], [`Error::Shape`] if it has gaps.
    pub(super) fn new(memory: &TensorMut<'_>, place: Place) -> Result<Self> {
        let view = memory.view();
        same_place("scratch", place, view.place())?;
        let (address, shape) = (view.as_ptr().addr(), view.shape());
        let values: usize = shape.iter().product();
        if values > 0 && view.reach() != Some((0, values as isize - 1)) {
            let (expected, got) = (vec![values], shape.to_vec());
            return Err(Error::Shape { tensor: "dense scratch", expected, got });
        }
        if !address.is_multiple_of(16) {
            return Err(Error::Misaligned { tensor: "scratch", address, alignment: 16 });
        }
        Ok(Given { address: address as u64, bytes: values * size_of::<f32>() })
    }
}

/// Device addresses for one launch: `[sums]` of f32 and `[tiles]` of u32, all of these zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub sums: u64,
    pub arrived: u64,
}

impl Room {
    fn new(address: u64, capacity: Need) -> Self {
        Room { sums: address + capacity.sums_offset() as u64, arrived: address }
    }
}

/// The scratch of a stream. It grows to what the largest launch needs and stays: launches on one
/// stream follow one another, and each leaves its counters zero.
pub(super) struct Scratch {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    address: u64,
    capacity: Need,
}

impl Scratch {
    pub(super) fn new(context: &Arc<CudaContext>, stream: &Arc<CudaStream>) -> Self {
        let (context, stream) = (context.clone(), stream.clone());
        Scratch { context, stream, address: 0, capacity: Need::default() }
    }

    /// Room for the next launch on the stream. The context is bound.
    pub(super) fn room(&mut self, device: &CudaDevice, need: Need) -> Result<Room> {
        if need.sums > self.capacity.sums || need.tiles > self.capacity.tiles {
            let capacity = Need {
                sums: need.sums.max(self.capacity.sums).next_power_of_two(),
                tiles: need.tiles.max(self.capacity.tiles).next_power_of_two(),
            };
            self.release();
            self.address = zeroed(device, capacity)?;
            self.capacity = capacity;
        }
        Ok(Room::new(self.address, self.capacity))
    }

    fn release(&mut self) {
        self.capacity = Need::default();
        let address = std::mem::take(&mut self.address);
        if address != 0 {
            // SAFETY: ours; what uses it is queued.
            unsafe { free(&self.context, &self.stream, address) };
        }
    }
}

impl Drop for Scratch {
    /// The context is bound: see `CudaDevice`.
    fn drop(&mut self) {
        self.release();
    }
}

/// The caller's memory as room for one launch. The context is bound.
pub(super) fn given(device: &CudaDevice, memory: Given, need: Need) -> Result<Room> {
    if memory.bytes < need.bytes() {
        let [expected, got] = [need.bytes(), memory.bytes].map(|bytes| vec![bytes / 4]);
        return Err(Error::Shape { tensor: "scratch", expected, got });
    }
    clear(device, memory.address, need)?;
    Ok(Room::new(memory.address, need))
}

/// Room that belongs to the graph that the stream captures, since it may run beside other work of
/// the stream. `queue` queues what uses it. The context is bound.
pub(super) fn in_graph(
    device: &CudaDevice,
    need: Need,
    queue: impl FnOnce(Room) -> Result<()>,
) -> Result<()> {
    let (context, stream) = (device.stream().context(), device.stream());
    let address = zeroed(device, need)?;
    let queued = queue(Room::new(address, need));
    // SAFETY: allocated above, and used by what was queued in between only.
    unsafe { free(context, stream, address) };
    queued
}

/// Memory of which the counters are zero.
fn zeroed(device: &CudaDevice, capacity: Need) -> Result<u64> {
    let what = "what the blocks of a call leave for one another";
    let address = allocate(device, what, capacity.bytes())?;
    let cleared = clear(device, address, capacity);
    if cleared.is_err() {
        // SAFETY: ours, and nothing uses it.
        unsafe { free(device.stream().context(), device.stream(), address) };
    }
    cleared.map(|()| address)
}

/// Sets the counters to 0, in stream order.
fn clear(device: &CudaDevice, address: u64, capacity: Need) -> Result<()> {
    if capacity.tiles == 0 {
        return Ok(());
    }
    let stream = device.stream().cu_stream();
    // SAFETY: within the memory, of which nothing else is in use.
    unsafe { result::memset_d8_async(address, 0, capacity.sums_offset(), stream) }
        .map_err(device.failed("cuMemsetD8Async"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_lie_behind_the_counters_and_aligned() {
        for (sums, tiles) in [(0, 0), (1, 1), (100, 64), (7, 65)] {
            let need = Need { sums, tiles };
            let place = Room::new(1 << 20, need);
            assert_eq!((place.arrived, place.sums % 256), (1 << 20, 0));
            assert!(place.sums >= place.arrived + 4 * tiles as u64);
            assert_eq!(place.sums + 4 * sums as u64, (1 << 20) + need.bytes() as u64);
        }
    }
}
