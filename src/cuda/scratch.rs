//! What launches of one stream use in between and leave behind: the sums of tiles that several blocks
//! share, how many of these have arrived, and the moments of a layer norm.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, result};

use super::device::{CudaDevice, allocate, free};
use crate::error::Result;

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

    fn bytes(self) -> usize {
        self.sums_offset() + self.sums * size_of::<f32>()
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
    let (context, stream) = (device.stream().context(), device.stream());
    let address =
        allocate(device, "what the blocks of a call leave for one another", capacity.bytes())?;
    // SAFETY: within the allocation.
    let cleared =
        unsafe { result::memset_d8_async(address, 0, capacity.sums_offset(), stream.cu_stream()) };
    if cleared.is_err() {
        // SAFETY: ours, and nothing uses it.
        unsafe { free(context, stream, address) };
    }
    cleared.map(|()| address).map_err(device.failed("cuMemsetD8Async"))
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
