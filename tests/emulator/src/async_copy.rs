//! Copies in flight: `cp.async` and its groups.
//!
//! A copy poisons its destination when it is issued and lands, in seeded random order, no earlier
//! than a wait of its own thread asks for. Later engines (bulk copies with barriers) are meant to
//! keep their pending landings here too.

use crate::rng::Rng;

/// A copy in flight.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// Lane that issued it.
    pub lane: usize,
    /// Number of the lane's group that it belongs to.
    group: u32,
    /// Shared address.
    pub dst: u32,
    /// Device address.
    pub src: u64,
    /// Bytes written.
    pub size: u32,
    /// Bytes read; the rest is zero.
    pub src_size: u32,
    /// Instruction that issued it.
    pub pc: u32,
}

/// The copies of a warp.
#[derive(Debug, Default)]
pub struct Copies {
    pending: Vec<Copy>,
    /// Groups that each lane has closed.
    closed: [u32; 32],
}

impl Copies {
    /// Issues a copy into the lane's open group.
    pub fn issue(&mut self, lane: usize, dst: u32, src: u64, size: u32, src_size: u32, pc: u32) {
        let group = self.closed[lane];
        self.pending.push(Copy { lane, group, dst, src, size, src_size, pc });
    }

    /// Closes the open group of some lanes.
    pub fn commit(&mut self, mask: u32) {
        for lane in (0..32).filter(|lane| mask >> lane & 1 == 1) {
            self.closed[lane] += 1;
        }
    }

    /// The copies that must land before `mask`'s lanes go on: all but the latest `allowed` groups,
    /// or every one when `allowed` is `None`.
    pub fn due(&mut self, mask: u32, allowed: Option<u32>, rng: &mut Rng) -> Vec<Copy> {
        let closed = self.closed;
        let (mut due, rest) = self.pending.drain(..).partition::<Vec<_>, _>(|copy| {
            mask >> copy.lane & 1 == 1
                && allowed.is_none_or(|n| copy.group.saturating_add(n) < closed[copy.lane])
        });
        self.pending = rest;
        rng.shuffle(&mut due);
        due
    }

    /// A copy of one of these lanes that is still in flight, and how many there are.
    pub fn in_flight(&self, mask: u32) -> Option<(Copy, usize)> {
        let mut of_mask = self.pending.iter().filter(|c| mask >> c.lane & 1 == 1);
        let first = *of_mask.next()?;
        Some((first, 1 + of_mask.count()))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.pending.clear();
        self.closed = [0; 32];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_counted_per_lane() {
        let mut copies = Copies::default();
        let mut rng = Rng::new(1);
        copies.issue(0, 0, 0, 16, 16, 0);
        copies.issue(1, 16, 0, 16, 16, 0);
        copies.commit(0b01);
        copies.issue(0, 32, 0, 16, 16, 0);
        copies.commit(0b11);
        // Lane 0 closed two groups, lane 1 one.
        assert_eq!(copies.due(0b11, Some(1), &mut rng).len(), 1);
        assert_eq!(copies.due(0b10, Some(0), &mut rng).len(), 1);
        assert_eq!(copies.in_flight(u32::MAX).map(|(c, n)| (c.dst, n)), Some((32, 1)));
        copies.issue(5, 64, 0, 4, 4, 0);
        assert_eq!(copies.due(u32::MAX, Some(0), &mut rng).len(), 1);
        assert_eq!(copies.due(u32::MAX, None, &mut rng).len(), 1);
    }
}
