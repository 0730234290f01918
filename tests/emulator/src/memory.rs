//! Device memory: exact allocations, poison, initialised bytes, and the shadow for races.

use crate::races::{GlobalCell, poison};

/// Device addresses begin where no host address can be, so that a host access faults at once.
const START: u64 = 0x0000_a000_0000_0000;
/// Distance between allocations, at least.
pub const GAP: u64 = 1 << 16;
/// Alignment that `cuMemAlloc` promises.
const ALIGNMENT: u64 = 256;
/// Words per page of the race shadow.
const PAGE: usize = 256;

/// One allocation.
pub struct Allocation {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// What it is, for reports.
    pub name: String,
    /// Belongs to a graph, whose nodes allocate and free it.
    of_graph: bool,
    /// Belongs to a graph, and is not allocated now.
    dead: bool,
    data: Vec<u8>,
    /// One bit per byte; empty once everything has been written.
    init: Vec<u8>,
    missing: u64,
    shadow: Vec<Option<Box<[GlobalCell; PAGE]>>>,
}

impl Allocation {
    /// The bytes from `offset`.
    pub fn bytes(&self, offset: u64, len: u64) -> &[u8] {
        &self.data[offset as usize..(offset + len) as usize]
    }

    /// The bytes from `offset`, which count as written.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.data[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        self.set_init(offset, bytes.len() as u64);
    }

    /// Whether all of these bytes have been written.
    #[inline]
    pub fn initialised(&self, offset: u64, len: u64) -> bool {
        self.missing == 0
            || (offset..offset + len).all(|i| self.init[i as usize / 8] >> (i % 8) & 1 == 1)
    }

    fn set_init(&mut self, offset: u64, len: u64) {
        if self.missing == 0 {
            return;
        }
        let end = offset + len;
        let mut i = offset;
        while i < end {
            let byte = &mut self.init[i as usize / 8];
            if i.is_multiple_of(8) && end - i >= 8 {
                self.missing -= u64::from(byte.count_zeros());
                *byte = 0xff;
                i += 8;
            } else {
                self.missing -= u64::from(*byte >> (i % 8) & 1 == 0);
                *byte |= 1 << (i % 8);
                i += 1;
            }
        }
    }

    /// The shadow of the word that holds `offset`.
    #[inline]
    pub fn cell(&mut self, offset: u64) -> &mut GlobalCell {
        let word = offset as usize / 4;
        if self.shadow.is_empty() {
            self.shadow.resize_with((self.size as usize).div_ceil(4 * PAGE), || None);
        }
        let page =
            self.shadow[word / PAGE].get_or_insert_with(|| Box::new([GlobalCell::default(); PAGE]));
        &mut page[word % PAGE]
    }
}

/// The memory of one device.
pub struct DeviceMemory {
    /// Live allocations by address.
    allocations: Vec<Allocation>,
    freed: Vec<(u64, u64)>,
    next: u64,
    gap: u64,
    used: u64,
    total: u64,
}

impl DeviceMemory {
    /// Empty memory of `total` bytes for the device with this number, its allocations `gap` apart.
    pub fn new(device: usize, total: u64, gap: u64) -> Self {
        let next = START + ((device as u64) << 42);
        DeviceMemory { allocations: Vec::new(), freed: Vec::new(), next, gap, used: 0, total }
    }

    /// Allocates poisoned bytes, or `None` when the device is full.
    pub fn allocate(&mut self, size: u64, name: String) -> Option<u64> {
        // A driver hands out pages of 512 bytes; counting them makes "nearly full" realistic.
        let cost = size.next_multiple_of(512);
        if cost > self.total - self.used {
            return None;
        }
        self.used += cost;
        let base = self.next;
        // 256-byte aligned and no more, so that code which assumes more shows it.
        self.next = (base + size + self.gap).next_multiple_of(2 * ALIGNMENT) + ALIGNMENT;
        let mut data = Vec::with_capacity(size as usize);
        data.extend((0..size).map(poison));
        let init = vec![0; (size as usize).div_ceil(8)];
        let shadow = Vec::new();
        self.allocations.push(Allocation {
            base,
            size,
            name,
            of_graph: false,
            dead: false,
            data,
            init,
            missing: size,
            shadow,
        });
        Some(base)
    }

    /// Addresses of a graph, which hold nothing until [`begin`](Self::begin).
    pub fn allocate_in_graph(&mut self, size: u64) -> Option<u64> {
        let base = self.allocate(size, String::from("memory of a graph"))?;
        let own = self.allocations.last_mut()?;
        (own.of_graph, own.dead) = (true, true);
        Some(base)
    }

    /// A graph's allocation node runs: nothing has written the memory.
    pub fn begin(&mut self, base: u64) {
        if let Some(own) = self.beginning(base) {
            own.dead = false;
            (0..own.size).for_each(|offset| own.forget(offset));
        }
    }

    /// A graph's memory is freed; false if it was not allocated.
    pub fn end(&mut self, base: u64) -> bool {
        self.beginning(base).is_some_and(|own| !std::mem::replace(&mut own.dead, true))
    }

    /// Whether the allocation that begins at `base` is a graph's.
    pub fn of_graph(&mut self, base: u64) -> bool {
        self.beginning(base).is_some_and(|own| own.of_graph)
    }

    /// A graph goes: its memory, too, unless the program has yet to free it.
    pub fn drop_graph(&mut self, base: u64) {
        match self.beginning(base) {
            Some(own) if !own.dead => own.of_graph = false,
            _ => {
                self.remove(base);
            }
        }
    }

    fn beginning(&mut self, base: u64) -> Option<&mut Allocation> {
        let index = self.allocations.binary_search_by_key(&base, |a| a.base).ok()?;
        self.allocations.get_mut(index)
    }

    /// Frees the allocation that begins at `base`; a graph's keeps its addresses.
    pub fn free(&mut self, base: u64) -> bool {
        if self.of_graph(base) { self.end(base) } else { self.remove(base) }
    }

    fn remove(&mut self, base: u64) -> bool {
        let Ok(index) = self.allocations.binary_search_by_key(&base, |a| a.base) else {
            return false;
        };
        let gone = self.allocations.remove(index);
        self.used -= gone.size.next_multiple_of(512);
        self.freed.push((gone.base, gone.size));
        true
    }

    /// Free and total bytes.
    pub fn info(&self) -> (u64, u64) {
        (self.total - self.used, self.total)
    }

    /// The allocation (by index) that holds all of `len` bytes at `address`.
    #[inline]
    pub fn find(&self, address: u64, len: u64) -> Option<usize> {
        let index = self.allocations.partition_point(|a| a.base <= address).checked_sub(1)?;
        self.holds(index, address, len).then_some(index)
    }

    /// Whether allocation `index` holds these bytes.
    #[inline]
    pub fn holds(&self, index: usize, address: u64, len: u64) -> bool {
        self.allocations.get(index).is_some_and(|a| {
            !a.dead
                && address >= a.base
                && address - a.base <= a.size
                && a.size - (address - a.base) >= len
        })
    }

    /// An allocation by index.
    pub fn at(&mut self, index: usize) -> &mut Allocation {
        &mut self.allocations[index]
    }

    /// The first address and size of the allocation around `address`, used now or not.
    pub fn range(&self, address: u64) -> Option<(u64, u64)> {
        let index = self.allocations.partition_point(|a| a.base <= address).checked_sub(1)?;
        let around = &self.allocations[index];
        (address - around.base < around.size).then_some((around.base, around.size))
    }

    /// Copies out, uninitialised bytes included: they are poison.
    pub fn read(&self, address: u64, len: u64) -> Result<Vec<u8>, String> {
        if len == 0 {
            return Ok(Vec::new());
        }
        match self.find(address, len) {
            Some(i) => {
                let a = &self.allocations[i];
                Ok(a.bytes(address - a.base, len).to_vec())
            }
            None => Err(self.describe(address, len)),
        }
    }

    /// Copies in.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), String> {
        if bytes.is_empty() {
            return Ok(());
        }
        match self.find(address, bytes.len() as u64) {
            Some(i) => {
                let a = &mut self.allocations[i];
                let offset = address - a.base;
                a.write(offset, bytes);
                Ok(())
            }
            None => Err(self.describe(address, bytes.len() as u64)),
        }
    }

    /// Copies inside the device; what was not initialised stays so.
    pub fn copy(&mut self, to: u64, from: u64, len: u64) -> Result<(), String> {
        if len == 0 {
            return Ok(());
        }
        let (Some(source), Some(target)) = (self.find(from, len), self.find(to, len)) else {
            let bad = if self.find(from, len).is_none() { from } else { to };
            return Err(self.describe(bad, len));
        };
        let a = &self.allocations[source];
        let offset = from - a.base;
        let bytes = a.bytes(offset, len).to_vec();
        let written: Option<Vec<bool>> =
            (a.missing > 0).then(|| (offset..offset + len).map(|i| a.initialised(i, 1)).collect());
        let b = &mut self.allocations[target];
        let base = to - b.base;
        match written {
            None => b.write(base, &bytes),
            Some(written) => {
                for (i, (&byte, written)) in bytes.iter().zip(written).enumerate() {
                    if written {
                        b.write(base + i as u64, &[byte]);
                    } else {
                        b.forget(base + i as u64);
                    }
                }
            }
        }
        Ok(())
    }

    /// Says what `len` bytes at `address` belong to.
    pub fn describe(&self, address: u64, len: u64) -> String {
        let within = |base: u64, size: u64| address >= base && address < base + size;
        if let Some(&(base, size)) = self.freed.iter().rev().find(|&&(b, s)| within(b, s)) {
            return format!(
                "byte {} of an allocation of {size} bytes at {base:#x} that has been freed",
                address - base
            );
        }
        if let Some(own) = self.allocations.iter().find(|a| a.dead && within(a.base, a.size)) {
            return format!(
                "byte {} of memory of a graph, {} bytes at {:#x}, which the graph has freed or not \
                 yet allocated",
                address - own.base,
                own.size,
                own.base
            );
        }
        let near = self
            .allocations
            .iter()
            .filter(|a| address + GAP >= a.base && address < a.base + a.size + GAP)
            .min_by_key(|a| {
                if address < a.base {
                    a.base - address
                } else {
                    (address - a.base).saturating_sub(a.size)
                }
            });
        match near {
            Some(a) if address < a.base => format!(
                "{len} bytes, {} bytes before {} of {} bytes at {:#x}",
                a.base - address,
                a.name,
                a.size,
                a.base
            ),
            Some(a) => format!(
                "{len} bytes at offset {} of {} of {} bytes at {:#x}",
                address - a.base,
                a.name,
                a.size,
                a.base
            ),
            None => format!("{len} bytes at an address near no allocation"),
        }
    }

    /// Drops large race shadows between launches.
    pub fn trim(&mut self) {
        for a in &mut self.allocations {
            if a.shadow.len() > (16 << 20) / (4 * PAGE) {
                a.shadow = Vec::new();
            }
        }
    }
}

impl Allocation {
    fn forget(&mut self, offset: u64) {
        if self.missing == 0 {
            self.init = vec![0xff; (self.size as usize).div_ceil(8)];
        }
        let byte = &mut self.init[offset as usize / 8];
        if *byte >> (offset % 8) & 1 == 1 {
            *byte &= !(1 << (offset % 8));
            self.missing += 1;
        }
        self.data[offset as usize] = poison(offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_exact_and_addresses_are_not_reused() {
        let mut memory = DeviceMemory::new(0, 1 << 20, GAP);
        let a = memory.allocate(100, "a".into()).unwrap();
        assert!(memory.find(a + 99, 1).is_some());
        assert!(memory.find(a + 97, 4).is_none());
        assert!(memory.describe(a + 97, 4).contains("offset 97"));
        assert!(memory.free(a));
        assert!(!memory.free(a));
        assert!(memory.describe(a, 4).contains("freed"));
        let b = memory.allocate(100, "b".into()).unwrap();
        assert_ne!(a, b);
        assert!(memory.allocate(1 << 20, "c".into()).is_none());
    }

    #[test]
    fn copies_keep_what_is_uninitialised() {
        let mut memory = DeviceMemory::new(0, 1 << 20, GAP);
        let a = memory.allocate(64, "a".into()).unwrap();
        let b = memory.allocate(64, "b".into()).unwrap();
        memory.write(b, &[1; 64]).unwrap();
        memory.write(a + 3, &[2; 30]).unwrap();
        memory.copy(b, a, 64).unwrap();
        let i = memory.find(b, 64).unwrap();
        let b = memory.at(i);
        assert!(!b.initialised(0, 4) && b.initialised(3, 30) && !b.initialised(33, 1));
        assert!(
            f32::from_le_bytes(b.bytes(0, 4)[..].try_into().unwrap()).is_nan()
                || b.bytes(3, 1) == [2]
        );
    }
}
