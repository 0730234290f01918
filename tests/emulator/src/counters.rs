//! What a launch did: instructions by class, memory sectors, shared-memory wavefronts.

use crate::isa::KINDS;

/// Counts of one launch. Memory counts are requests as they leave a warp, before any cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Warp instructions.
    pub steps: u64,
    /// Warp instructions per class, in the order of [`KINDS`].
    pub classes: [u64; 8],
    /// 32-byte sectors loaded from device memory.
    pub load_sectors: u64,
    /// Bytes that the lanes asked for.
    pub load_bytes: u64,
    /// 32-byte sectors stored to device memory.
    pub store_sectors: u64,
    /// Bytes that the lanes stored.
    pub store_bytes: u64,
    /// Wavefronts of shared memory.
    pub wavefronts: u64,
    /// Wavefronts that only bank conflicts caused.
    pub conflicts: u64,
}

impl Counters {
    /// Counts an access of a warp to device memory; `span` gives a lane's address and size.
    pub fn global(&mut self, mask: u32, span: &dyn Fn(usize) -> (u64, u64), store: bool) {
        let mut sectors = Vec::with_capacity(64);
        let mut bytes = 0;
        for lane in (0..32).filter(|l| mask >> l & 1 == 1) {
            let (address, size) = span(lane);
            bytes += size;
            sectors.extend(address / 32..=(address + size - 1) / 32);
        }
        sectors.sort_unstable();
        sectors.dedup();
        if store {
            self.store_sectors += sectors.len() as u64;
            self.store_bytes += bytes;
        } else {
            self.load_sectors += sectors.len() as u64;
            self.load_bytes += bytes;
        }
    }

    /// Counts an access of a warp to shared memory. Lanes are served 32 at a time for up to four
    /// bytes, 16 for eight and 8 for sixteen; in each such phase a bank gives one word at a time.
    pub fn shared(&mut self, mask: u32, span: &dyn Fn(usize) -> (u64, u64), size: u32) {
        let lanes_per_phase = match size {
            0..=4 => 32,
            8 => 16,
            _ => 8,
        };
        for first in (0..32).step_by(lanes_per_phase) {
            let mut words = Vec::with_capacity(64);
            for lane in (first..first + lanes_per_phase).filter(|l| mask >> l & 1 == 1) {
                let (address, size) = span(lane);
                words.extend(address / 4..=(address + size - 1) / 4);
            }
            if words.is_empty() {
                continue;
            }
            words.sort_unstable();
            words.dedup();
            let mut banks = [0_u64; 32];
            for word in &words {
                banks[(word % 32) as usize] += 1;
            }
            let wavefronts = banks.into_iter().max().unwrap_or(0);
            self.wavefronts += wavefronts;
            self.conflicts += wavefronts - 1;
        }
    }

    /// One line per launch: a kernel's name, its geometry and all counts.
    pub fn line(&self, kernel: &str, grid: [u32; 3], block: [u32; 3], shared: u32) -> String {
        let classes: Vec<String> =
            KINDS.iter().zip(self.classes).map(|(name, n)| format!("{name}={n}")).collect();
        format!(
            "kernel={kernel} grid={}x{}x{} block={}x{}x{} shared_bytes={shared} instructions={} {} \
             global_load_sectors={} global_load_bytes={} global_store_sectors={} \
             global_store_bytes={} shared_wavefronts={} bank_conflicts={}\n",
            grid[0],
            grid[1],
            grid[2],
            block[0],
            block[1],
            block[2],
            self.steps,
            classes.join(" "),
            self.load_sectors,
            self.load_bytes,
            self.store_sectors,
            self.store_bytes,
            self.wavefronts,
            self.conflicts
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_and_wavefronts_of_known_patterns() {
        let mut c = Counters::default();
        c.global(u32::MAX, &|lane| (lane as u64 * 4, 4), false);
        assert_eq!((c.load_sectors, c.load_bytes), (4, 128));
        c.global(u32::MAX, &|lane| (lane as u64 * 32, 4), true);
        assert_eq!((c.store_sectors, c.store_bytes), (32, 128));
        c.shared(u32::MAX, &|lane| (lane as u64 * 4, 4), 4);
        assert_eq!((c.wavefronts, c.conflicts), (1, 0));
        c.shared(u32::MAX, &|lane| (lane as u64 * 64, 4), 4);
        assert_eq!((c.wavefronts, c.conflicts), (17, 15));
        c.shared(u32::MAX, &|lane| (lane as u64 * 16, 16), 16);
        assert_eq!((c.wavefronts, c.conflicts), (21, 15));
        c.shared(u32::MAX, &|_| (0, 4), 4);
        assert_eq!((c.wavefronts, c.conflicts), (22, 15));
    }
}
