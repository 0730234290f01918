//! Who may see whose memory accesses: logical time per block, barriers, and what was seen.
//!
//! A block's time advances when a barrier completes or a fence runs. Every access is stamped with
//! it, and each warp knows, for every other warp of the block, up to which time that warp's
//! accesses are ordered before its own. Two accesses of different warps conflict if neither is
//! known to the other; two lanes of one warp are ordered by `bar.warp.sync` and barriers only.
//! Blocks order each other by atomics on the same address with fences around them: a fence is of one
//! lane, and covers what other lanes of its warp had done when the warp last was synchronised.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

/// Something wrong with an access; the interpreter adds where it happened.
#[derive(Debug)]
pub struct Problem {
    /// CUDA error code that a driver would report.
    pub code: u32,
    /// What is wrong.
    pub text: String,
}

impl Problem {
    /// An illegal address or a race: anything that a driver can only call a launch failure.
    pub fn new(code: u32, text: String) -> Self {
        Problem { code, text }
    }
}

/// Who accesses memory.
#[derive(Clone, Copy, Debug)]
pub struct Who {
    /// Thread number in its block.
    pub thread: u16,
    /// Instruction.
    pub pc: u32,
}

impl Who {
    fn warp(self) -> usize {
        usize::from(self.thread) / 32
    }
}

/// How memory is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A load.
    Read,
    /// A store.
    Write,
    /// A read-modify-write.
    Atomic,
    /// A load through a cache that sees no store of the same launch (`ld.global.nc`).
    ReadOnly,
    /// A volatile, relaxed or acquire load.
    StrongRead,
    /// A volatile, relaxed or release store.
    StrongWrite,
}

impl Mode {
    fn reads(self) -> bool {
        matches!(self, Mode::Read | Mode::ReadOnly | Mode::Atomic | Mode::StrongRead)
    }

    fn writes(self) -> bool {
        matches!(self, Mode::Write | Mode::Atomic | Mode::StrongWrite)
    }

    /// Strong accesses do not race with each other.
    fn strong(self) -> bool {
        !matches!(self, Mode::Read | Mode::ReadOnly | Mode::Write)
    }
}

/// Knowledge of one warp about the others.
pub type Known = [u32; 32];

/// Which accesses of a block others may rely on, once they have learnt of it.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// Per warp: up to which time, by all its lanes.
    known: Known,
    /// Per warp: what its lanes did before they were synchronised so often.
    syncs: Known,
    /// Per thread: up to which time beyond that.
    threads: BTreeMap<u16, u32>,
}

impl Published {
    fn join(&mut self, from: &Published) {
        join(&mut self.known, &from.known);
        join(&mut self.syncs, &from.syncs);
        for (&thread, &stamp) in &from.threads {
            let latest = self.threads.entry(thread).or_insert(0);
            *latest = stamp.max(*latest);
        }
    }

    fn covers(&self, thread: u16, stamp: u32, sync: u32) -> bool {
        let warp = usize::from(thread) / 32;
        stamp < self.known[warp]
            || sync < self.syncs[warp]
            || self.threads.get(&thread).is_some_and(|&until| stamp < until)
    }

    /// Whether some lane of `warp` is covered at this time.
    fn reaches(&self, warp: usize, stamp: u32) -> bool {
        let first = warp as u16 * 32;
        stamp < self.known[warp]
            || self.threads.range(first..first + 32).any(|(_, &until)| stamp < until)
    }
}

/// What is known of blocks, by their number.
pub type Blocks = HashMap<u32, Published>;

/// A fence that lanes of a warp have run.
#[derive(Clone, Debug)]
struct Fence {
    lanes: u32,
    stamp: u32,
    sync: u32,
    known: Known,
}

/// A warp that does not wait for the barrier at which it has arrived, with what it knew then.
#[derive(Clone, Debug)]
pub struct Arrival {
    warp: usize,
    stamp: u32,
    known: Known,
    acquired: Rc<Blocks>,
}

/// A block's logical time.
#[derive(Clone, Debug)]
pub struct Order {
    /// Number of the block.
    block: u32,
    /// Time now.
    pub now: u32,
    /// Per warp: up to which time it knows each other warp.
    known: Vec<Known>,
    /// Per warp: how often its lanes were synchronised.
    pub sync: Vec<u32>,
    /// Every warp knows every other one up to here.
    floor: u32,
    /// Per warp: its fences, but those that a later one of the same lanes stands for.
    fences: Vec<Vec<Fence>>,
    /// Per warp: what strong reads have told it, also of lanes of its own block.
    acquired: Vec<Rc<Blocks>>,
}

impl Order {
    /// The beginning of block number `block`, of `warps` warps.
    pub fn new(block: u32, warps: usize) -> Self {
        Order {
            block,
            now: 1,
            known: vec![[0; 32]; warps],
            sync: vec![1; warps],
            floor: 0,
            fences: vec![Vec::new(); warps],
            acquired: vec![Rc::default(); warps],
        }
    }

    /// An access by `thread` at `stamp` (its warp's lanes synchronised `sync` times) happened
    /// before what `who` does now.
    #[inline(always)]
    fn before(&self, thread: u16, stamp: u32, sync: u32, who: Who) -> bool {
        let warp = usize::from(thread) / 32;
        if warp == who.warp() {
            thread == who.thread || sync != self.sync[warp]
        } else {
            stamp < self.known[who.warp()][warp]
                || self.learnt(who, self.block).is_some_and(|seen| seen.covers(thread, stamp, sync))
        }
    }

    /// What the warp of `who` has been told of a block.
    #[inline]
    fn learnt(&self, who: Who, block: u32) -> Option<&Published> {
        let acquired = &self.acquired[who.warp()];
        if acquired.is_empty() { None } else { acquired.get(&block) }
    }

    /// A barrier completes: `waiting` warps learn what all of them, and those which only
    /// `arrived` (with what they knew then), did before.
    pub fn barrier(&mut self, waiting: &[usize], arrived: &[Arrival]) {
        self.now += 1;
        let mut joint = [0; 32];
        for &warp in waiting {
            join(&mut joint, &self.known[warp]);
        }
        for arrival in arrived {
            join(&mut joint, &arrival.known);
        }
        for arrival in arrived {
            joint[arrival.warp] = joint[arrival.warp].max(arrival.stamp);
        }
        for &warp in waiting {
            joint[warp] = self.now;
        }
        let mut acquired: Rc<Blocks> = Rc::default();
        let told = waiting.iter().map(|&warp| &self.acquired[warp]);
        for from in told.chain(arrived.iter().map(|arrival| &arrival.acquired)) {
            if acquired.is_empty() {
                acquired = from.clone();
            } else if !Rc::ptr_eq(&acquired, from) {
                let blocks = Rc::make_mut(&mut acquired);
                for (&number, published) in &**from {
                    blocks.entry(number).or_default().join(published);
                }
            }
        }
        for &warp in waiting {
            self.known[warp] = joint;
            self.sync[warp] += 1;
            self.acquired[warp] = acquired.clone();
        }
        let warps = self.known.len();
        self.floor = self.known.iter().flat_map(|k| &k[..warps]).copied().min().unwrap_or(0);
    }

    /// What a warp that only arrives passes on.
    pub fn arrive(&mut self, warp: usize) -> Arrival {
        self.now += 1;
        let (known, acquired) = (self.known[warp], self.acquired[warp].clone());
        Arrival { warp, stamp: self.now, known, acquired }
    }

    /// Lanes of `warp` run a fence.
    pub fn fence(&mut self, warp: usize, lanes: u32) {
        self.now += 1;
        let (stamp, sync, known) = (self.now, self.sync[warp], self.known[warp]);
        self.fences[warp].retain(|fence| fence.lanes & !lanes != 0);
        self.fences[warp].push(Fence { lanes, stamp, sync, known });
    }

    /// Whether a strong write of `warp` could publish anything.
    pub fn fenced(&self, warp: usize) -> bool {
        !self.fences[warp].is_empty()
    }

    /// A strong write of `who` publishes what its fences cover, and those which other lanes ran before
    /// the warp was synchronised.
    pub fn release(&self, who: Who, to: &mut Blocks) {
        let (warp, lane) = (who.warp(), who.thread % 32);
        let mut any = false;
        for fence in &self.fences[warp] {
            let lanes =
                if fence.sync < self.sync[warp] { fence.lanes } else { fence.lanes & 1 << lane };
            if lanes == 0 {
                continue;
            }
            any = true;
            let mine = to.entry(self.block).or_default();
            join(&mut mine.known, &fence.known);
            mine.syncs[warp] = mine.syncs[warp].max(fence.sync);
            for lane in (0..32).filter(|lane| lanes >> lane & 1 == 1) {
                let until = mine.threads.entry(warp as u16 * 32 + lane).or_insert(0);
                *until = fence.stamp.max(*until);
            }
        }
        if any {
            for (&number, published) in &*self.acquired[warp] {
                to.entry(number).or_default().join(published);
            }
        }
    }

    /// A strong read tells `warp` what was published.
    pub fn acquire(&mut self, warp: usize, published: &Blocks) {
        if published.is_empty() {
            return;
        }
        let acquired = Rc::make_mut(&mut self.acquired[warp]);
        for (&number, published) in published {
            if number == self.block {
                join(&mut self.known[warp], &published.known);
            }
            acquired.entry(number).or_default().join(published);
        }
    }
}

/// Takes the later of each pair of times.
fn join(into: &mut Known, from: &Known) {
    for (a, b) in into.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

/// The bytes of either half of a word.
const HALVES: [u8; 2] = [0x3, 0xc];

/// Which halves of a word some of its bytes lie in.
#[inline(always)]
fn halves(mask: u8) -> impl Iterator<Item = usize> {
    (0..2).filter(move |&half| mask & HALVES[half] != 0)
}

/// Shadow of four bytes of shared memory.
#[derive(Clone, Copy, Default)]
struct Cell {
    /// Bytes that belong to a variable, that were written, that a copy in flight will write.
    valid: u8,
    init: u8,
    pending: u8,
    /// Bytes of the last write, and whether it was strong.
    w_mask: u8,
    w_strong: bool,
    more_readers: bool,
    w_thread: u16,
    /// The last reader of either half.
    r_thread: [u16; 2],
    r_mask: u8,
    w_stamp: u32,
    w_sync: u32,
    w_pc: u32,
    r_stamp: u32,
    r_sync: [u32; 2],
    r_pc: [u32; 2],
    /// Warps that have read at `r_stamp`.
    r_warps: u32,
}

/// The first 1, 2, 4, 8 or 16 of some bytes as a number.
#[inline(always)]
pub fn value(bytes: &[u8], len: u32) -> u128 {
    match len {
        1 => bytes[0].into(),
        2 => u16::from_le_bytes([bytes[0], bytes[1]]).into(),
        4 => bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b).into()),
        8 => bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b).into()),
        _ => bytes.first_chunk().map_or(0, |b| u128::from_le_bytes(*b)),
    }
}

/// Shared memory of a block with its shadow.
#[derive(Default)]
pub struct Shared {
    start: u32,
    data: Vec<u8>,
    cells: Vec<Cell>,
    /// Readers of earlier times that are not settled by a barrier of the whole block.
    readers: HashMap<usize, Vec<(u16, u32, u32, u32)>>,
}

/// The bytes that a fresh byte at this address holds: a NaN in every floating-point type.
pub fn poison(address: u64) -> u8 {
    if address.is_multiple_of(2) { 0xff } else { 0x7f }
}

impl Shared {
    /// Forgets everything; `variables` are (address, size) pairs.
    pub fn reset(&mut self, start: u32, variables: &[(u32, u32)]) {
        let end = variables.iter().map(|&(a, s)| a + s).max().unwrap_or(start).next_multiple_of(16);
        self.start = start;
        self.data.clear();
        self.data.extend((0..end - start).map(|i| poison(i.into())));
        self.cells.clear();
        self.cells.resize((end - start) as usize / 4, Cell::default());
        self.readers.clear();
        for &(address, size) in variables {
            for byte in address - start..address - start + size {
                self.cells[byte as usize / 4].valid |= 1 << (byte % 4);
            }
        }
    }

    /// The bytes at an address that was checked before.
    pub fn bytes(&self, address: u32, len: u32) -> &[u8] {
        let at = (address - self.start) as usize;
        &self.data[at..at + len as usize]
    }

    /// The bytes at an address that was checked before.
    pub fn bytes_mut(&mut self, address: u32, len: u32) -> &mut [u8] {
        let at = (address - self.start) as usize;
        &mut self.data[at..at + len as usize]
    }

    /// Whether all bytes belong to variables; the address is a multiple of the length.
    #[inline(always)]
    pub fn contains(&self, address: u64, len: u32) -> bool {
        let Some(at) = address.checked_sub(self.start.into()) else { return false };
        let (first, words) = (at as usize / 4, (len as usize).div_ceil(4));
        if at >= self.data.len() as u64 || first + words > self.cells.len() {
            return false;
        }
        let mask = if len >= 4 { 0xf } else { ((1_u8 << len) - 1) << (at % 4) };
        self.cells[first..first + words].iter().all(|c| c.valid & mask == mask)
    }

    /// The value of 1, 2, 4, 8 or 16 bytes at an address that was checked before.
    #[inline(always)]
    pub fn value(&self, address: u32, len: u32) -> u128 {
        value(&self.data[(address - self.start) as usize..], len)
    }

    /// Marks bytes that a copy in flight will write; they are poison until then.
    pub fn set_pending(&mut self, address: u32, len: u32, pending: bool) {
        let at = address - self.start;
        for byte in at..at + len {
            let cell = &mut self.cells[byte as usize / 4];
            let bit = 1 << (byte % 4);
            if pending {
                cell.pending |= bit;
                cell.init &= !bit;
                self.data[byte as usize] = poison(byte.into());
            } else {
                cell.pending &= !bit;
            }
        }
    }

    /// The common load: `N` whole words that the lane may read without a question. `None` when
    /// anything needs a closer look; then nothing has been recorded.
    #[inline(always)]
    pub fn read_words<const N: usize>(
        &mut self,
        order: &Order,
        who: Who,
        address: u64,
    ) -> Option<[u32; N]> {
        let at = address.checked_sub(self.start.into())? as usize;
        if !at.is_multiple_of(4 * N) {
            return None;
        }
        let cells = self.cells.get_mut(at / 4..at / 4 + N)?;
        let warp = who.warp();
        let ready = cells.iter().all(|c| {
            let settled = c.r_stamp == order.now || c.r_warps == 0 || c.r_stamp < order.floor;
            c.valid & c.init == 0xf
                && c.pending == 0
                && settled
                && order.before(c.w_thread, c.w_stamp, c.w_sync, who)
        });
        if !ready {
            return None;
        }
        for cell in cells {
            cell.r_warps =
                if cell.r_stamp == order.now { cell.r_warps | 1 << warp } else { 1 << warp };
            cell.r_stamp = order.now;
            cell.r_mask = 0xf;
            cell.r_thread = [who.thread; 2];
            cell.r_sync = [order.sync[warp]; 2];
            cell.r_pc = [who.pc; 2];
        }
        let bytes = self.data.get(at..at + 4 * N)?;
        Some(std::array::from_fn(|i| {
            u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        }))
    }

    /// Checks and records an access to bytes that belong to variables. `settles` is false for the
    /// issue of an asynchronous copy, which conflicts like a write but initialises nothing yet.
    #[inline]
    pub fn access(
        &mut self,
        order: &Order,
        who: Who,
        address: u32,
        len: u32,
        mode: Mode,
        settles: bool,
        name: &dyn Fn(u32) -> String,
    ) -> Result<(), Problem> {
        let at = address - self.start;
        let (first, last) = (at / 4, (at + len - 1) / 4);
        for index in first..=last {
            let mask = if len >= 4 { 0xf } else { ((1_u8 << len) - 1) << (at % 4) };
            let cell = &mut self.cells[index as usize];
            if cell.pending & mask != 0 {
                let line = name(cell.w_pc);
                return Err(Problem::new(
                    719,
                    format!(
                        "bytes that an asynchronous copy has in flight (issued by thread {} at {line})",
                        cell.w_thread
                    ),
                ));
            }
            let reads = mode.reads();
            if reads && cell.init & mask != mask {
                return Err(Problem::new(
                    719,
                    String::from("uninitialised bytes (nothing in this block has written them)"),
                ));
            }
            let strong = mode.strong();
            if cell.w_mask & mask != 0
                && !(strong && cell.w_strong)
                && !order.before(cell.w_thread, cell.w_stamp, cell.w_sync, who)
            {
                let what = if reads { "written" } else { "also written" };
                return Err(Problem::new(
                    719,
                    format!(
                        "a race: {what} by thread {} without a barrier in between, at {}",
                        cell.w_thread,
                        name(cell.w_pc)
                    ),
                ));
            }
            if mode.writes() {
                if let Some((thread, pc)) =
                    unordered_reader(cell, order, who, mask, self.readers.get(&(index as usize)))
                {
                    return Err(Problem::new(
                        719,
                        format!(
                            "a race: read by thread {thread} without a barrier in between, at {}",
                            name(pc)
                        ),
                    ));
                }
                cell.w_mask = mask;
                cell.w_strong = strong;
                cell.w_thread = who.thread;
                cell.w_stamp = order.now;
                cell.w_sync = order.sync[who.warp()];
                cell.w_pc = who.pc;
                if settles {
                    cell.init |= mask;
                }
                // Whoever comes after this write comes after the readers that were before it.
                if mask == 0xf {
                    cell.r_warps = 0;
                    if std::mem::take(&mut cell.more_readers) {
                        self.readers.remove(&(index as usize));
                    }
                }
            } else if mode == Mode::Read {
                let bit = 1 << who.warp();
                if cell.r_stamp == order.now && cell.r_warps != 0 {
                    cell.r_warps |= bit;
                    cell.r_mask |= mask;
                } else {
                    if cell.r_warps != 0 && cell.r_stamp >= order.floor {
                        cell.more_readers = true;
                        let half = usize::from(cell.r_mask & HALVES[0] == 0);
                        let (thread, pc) = (cell.r_thread[half], cell.r_pc[half]);
                        let old = (thread, cell.r_stamp, cell.r_warps, pc);
                        self.readers.entry(index as usize).or_default().push(old);
                    }
                    cell.r_warps = bit;
                    cell.r_stamp = order.now;
                    cell.r_mask = mask;
                }
                for half in halves(mask) {
                    cell.r_thread[half] = who.thread;
                    cell.r_sync[half] = order.sync[who.warp()];
                    cell.r_pc[half] = who.pc;
                }
            }
        }
        Ok(())
    }

    /// Checks an access of a lane whose neighbour has just passed the same check: only a writer
    /// in the own warp could make a difference.
    #[inline]
    pub fn written_by_warp(&self, address: u32, len: u32, warp: usize) -> bool {
        let at = address - self.start;
        (at / 4..=(at + len - 1) / 4)
            .any(|i| usize::from(self.cells[i as usize].w_thread) / 32 == warp)
    }
}

/// A reader of the cell that is not ordered before `who`'s write.
fn unordered_reader(
    cell: &Cell,
    order: &Order,
    who: Who,
    mask: u8,
    more: Option<&Vec<(u16, u32, u32, u32)>>,
) -> Option<(u16, u32)> {
    let warps_conflict = |warps: u32, stamp: u32| {
        let mut others = warps & !(1 << who.warp());
        while others != 0 {
            let warp = others.trailing_zeros() as usize;
            if stamp >= order.known[who.warp()][warp]
                && !order.learnt(who, order.block).is_some_and(|seen| seen.reaches(warp, stamp))
            {
                return Some(warp);
            }
            others &= others - 1;
        }
        None
    };
    if cell.r_warps == 0 || cell.r_mask & mask == 0 {
        return None;
    }
    let mut pc = 0;
    for half in halves(cell.r_mask & mask) {
        pc = cell.r_pc[half];
        if !order.before(cell.r_thread[half], cell.r_stamp, cell.r_sync[half], who) {
            return Some((cell.r_thread[half], pc));
        }
    }
    if let Some(warp) = warps_conflict(cell.r_warps, cell.r_stamp) {
        return Some(((warp * 32) as u16, pc));
    }
    if cell.more_readers {
        for &(thread, stamp, warps, pc) in more.into_iter().flatten() {
            if warps_conflict(warps, stamp).is_some() {
                return Some((thread, pc));
            }
        }
    }
    None
}

/// One access of a thread.
#[derive(Clone, Copy, Default)]
struct Seen {
    block: u32,
    stamp: u32,
    sync: u32,
    pc: u32,
}

/// Shadow of four bytes of device memory, valid for one launch: the last writer, and the last two
/// readers, so that a thread which reads and then writes does not hide the reader before it.
#[derive(Clone, Copy, Default)]
pub struct GlobalCell {
    w_launch: u32,
    r_launch: u32,
    writer: Seen,
    /// The last reader, and the last one before it that was another thread.
    readers: [Seen; 2],
    w_thread: u16,
    r_threads: [u16; 2],
    /// Bytes that were written, and whether that was strong.
    w_mask: u8,
    /// Bytes that each reader has read, four bits each.
    r_masks: u8,
}

/// The bit of `w_mask` that says "strong".
const STRONG: u8 = 0x10;
const _: () = assert!(size_of::<GlobalCell>() == 64, "one cache line");

impl GlobalCell {
    /// Checks and records an access of `mask`'s bytes.
    #[inline]
    pub fn access(
        &mut self,
        launch: u32,
        order: &Order,
        who: Who,
        mask: u8,
        mode: Mode,
        name: &dyn Fn(u32) -> String,
    ) -> Result<(), Problem> {
        let before = |thread: u16, seen: &Seen| {
            if seen.block == order.block {
                return order.before(thread, seen.stamp, seen.sync, who);
            }
            order
                .learnt(who, seen.block)
                .is_some_and(|known| known.covers(thread, seen.stamp, seen.sync))
        };
        let strong = mode.strong();
        let written = self.w_launch == launch && self.w_mask & mask != 0;
        if written && !(strong && self.w_mask & STRONG != 0) && !before(self.w_thread, &self.writer)
        {
            let what = if mode.reads() { "written" } else { "also written" };
            return Err(Problem::new(
                719,
                format!(
                    "a race: {what} in this launch by block #{} thread {} without an order between \
                     the two, at {}",
                    self.writer.block,
                    self.w_thread,
                    name(self.writer.pc)
                ),
            ));
        }
        if written && mode == Mode::ReadOnly {
            return Err(Problem::new(
                719,
                format!(
                    "ld.global.nc of bytes that this launch has written, whose result is undefined \
                     however the two are ordered: written by block #{} thread {} at {}",
                    self.writer.block,
                    self.w_thread,
                    name(self.writer.pc)
                ),
            ));
        }
        let sync = order.sync[who.warp()];
        let now = Seen { block: order.block, stamp: order.now, sync, pc: who.pc };
        if matches!(mode, Mode::Read | Mode::ReadOnly) {
            self.read(launch, who.thread, mask, now);
        }
        if !mode.writes() {
            return Ok(());
        }
        if self.r_launch == launch {
            for (i, (seen, &thread)) in self.readers.iter().zip(&self.r_threads).enumerate() {
                if self.r_masks >> (4 * i) & mask != 0 && !before(thread, seen) {
                    return Err(Problem::new(
                        719,
                        format!(
                            "a race: read in this launch by block #{} thread {thread} without an \
                             order between the two, at {}",
                            seen.block,
                            name(seen.pc)
                        ),
                    ));
                }
            }
        }
        self.w_launch = launch;
        self.writer = now;
        self.w_thread = who.thread;
        self.w_mask = mask | if strong { STRONG } else { 0 };
        Ok(())
    }

    /// Records a reader. Bytes of a word may have readers of their own, so each has its mask.
    fn read(&mut self, launch: u32, thread: u16, mask: u8, now: Seen) {
        if self.r_launch != launch {
            self.r_launch = launch;
            self.r_masks = 0;
        }
        let last = self.readers[0];
        let old = self.r_masks & 0xf;
        let own = (last.block, self.r_threads[0]) == (now.block, thread);
        if own && (last.stamp, last.sync) == (now.stamp, now.sync) {
            self.r_masks |= mask;
        } else if old == 0 || own && old & !mask == 0 {
            // A later read of the same bytes by the same thread stands for the earlier one.
            self.r_masks = self.r_masks & 0xf0 | mask;
        } else {
            self.readers[1] = last;
            self.r_threads[1] = self.r_threads[0];
            self.r_masks = old << 4 | mask;
        }
        self.readers[0] = now;
        self.r_threads[0] = thread;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(thread: u16) -> Who {
        Who { thread, pc: 0 }
    }

    fn name(_: u32) -> String {
        String::new()
    }

    #[test]
    fn a_barrier_orders_and_its_absence_does_not() {
        let mut shared = Shared::default();
        shared.reset(1024, &[(1024, 64)]);
        let mut order = Order::new(0, 2);
        shared.access(&order, who(0), 1024, 4, Mode::Write, true, &name).unwrap();
        assert!(shared.access(&order, who(32), 1024, 4, Mode::Read, true, &name).is_err());
        // Lanes of a warp are not ordered by running in step.
        assert!(shared.access(&order, who(1), 1024, 4, Mode::Read, true, &name).is_err());
        order.barrier(&[0, 1], &[]);
        shared.access(&order, who(32), 1024, 4, Mode::Read, true, &name).unwrap();
        assert!(shared.access(&order, who(0), 1024, 4, Mode::Write, true, &name).is_err());
        order.barrier(&[0, 1], &[]);
        shared.access(&order, who(0), 1024, 4, Mode::Write, true, &name).unwrap();
    }

    #[test]
    fn a_barrier_of_some_warps_orders_only_those() {
        let mut shared = Shared::default();
        shared.reset(1024, &[(1024, 64)]);
        let mut order = Order::new(0, 3);
        shared.access(&order, who(0), 1024, 4, Mode::Write, true, &name).unwrap();
        order.barrier(&[0, 1], &[]);
        shared.access(&order, who(40), 1024, 4, Mode::Read, true, &name).unwrap();
        assert!(shared.access(&order, who(70), 1024, 4, Mode::Read, true, &name).is_err());
        // A reader before a partial barrier is remembered after later readers came.
        order.barrier(&[0, 2], &[]);
        shared.access(&order, who(70), 1024, 4, Mode::Read, true, &name).unwrap();
        order.barrier(&[0, 2], &[]);
        assert!(shared.access(&order, who(0), 1024, 4, Mode::Write, true, &name).is_err());
    }

    #[test]
    fn arriving_publishes_without_learning() {
        let mut shared = Shared::default();
        shared.reset(1024, &[(1024, 64)]);
        let mut order = Order::new(0, 2);
        shared.access(&order, who(0), 1024, 4, Mode::Write, true, &name).unwrap();
        let arrival = order.arrive(0);
        shared.access(&order, who(0), 1028, 4, Mode::Write, true, &name).unwrap();
        order.barrier(&[1], &[arrival]);
        shared.access(&order, who(32), 1024, 4, Mode::Read, true, &name).unwrap();
        assert!(shared.access(&order, who(32), 1028, 4, Mode::Read, true, &name).is_err());
    }

    #[test]
    fn a_writer_that_has_read_does_not_hide_another_reader() {
        let order = Order::new(0, 1);
        let access = |cell: &mut GlobalCell, thread: u16, mask: u8, mode: Mode| {
            cell.access(1, &order, who(thread), mask, mode, &name)
        };
        let mut cell = GlobalCell::default();
        access(&mut cell, 3, 0xf, Mode::Read).unwrap();
        access(&mut cell, 4, 0xf, Mode::Read).unwrap();
        let problem = access(&mut cell, 4, 0xf, Mode::Write).unwrap_err();
        assert!(problem.text.contains("read in this launch by block #0 thread 3"));
        // A thread's own reads are no race, nor are those of an earlier launch.
        let mut cell = GlobalCell::default();
        access(&mut cell, 4, 0xf, Mode::Read).unwrap();
        access(&mut cell, 4, 0x3, Mode::Read).unwrap();
        access(&mut cell, 4, 0xf, Mode::Write).unwrap();
        cell.access(2, &order, who(9), 0xf, Mode::Write, &name).unwrap();
    }

    #[test]
    fn halves_of_a_shared_word_have_readers_of_their_own() {
        let (mut shared, mut order) = (Shared::default(), Order::new(0, 1));
        shared.reset(1024, &[(1024, 64)]);
        shared.access(&order, who(0), 1024, 4, Mode::Write, true, &name).unwrap();
        order.barrier(&[0], &[]);
        for thread in [0, 1] {
            let at = 1024 + 2 * u32::from(thread);
            shared.access(&order, who(thread), at, 2, Mode::Read, true, &name).unwrap();
        }
        shared.access(&order, who(0), 1024, 2, Mode::Write, true, &name).unwrap();
        assert!(shared.access(&order, who(0), 1026, 2, Mode::Write, true, &name).is_err());
        shared.access(&order, who(1), 1026, 2, Mode::Write, true, &name).unwrap();
    }

    #[test]
    fn bytes_of_a_word_have_readers_of_their_own() {
        let order = Order::new(0, 1);
        let mut cell = GlobalCell::default();
        for mode in [Mode::Read, Mode::Write] {
            for thread in 0..4 {
                cell.access(1, &order, who(thread), 1 << thread, mode, &name).unwrap();
            }
        }
        let mut cell = GlobalCell::default();
        cell.access(1, &order, who(0), 0x3, Mode::Read, &name).unwrap();
        cell.access(1, &order, who(1), 0xc, Mode::Read, &name).unwrap();
        assert!(cell.access(1, &order, who(1), 0x6, Mode::Write, &name).is_err());
    }
}
