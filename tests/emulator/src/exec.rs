//! Running a grid: blocks, warps, divergence, barriers, and every memory instruction.
//!
//! A warp's lanes are kept in groups that share a program counter. The group with the lowest one
//! runs, groups that meet merge, and a group that reaches an instruction which needs other lanes
//! waits for them; so results do not depend on where lanes reconverge. Warps of a block are
//! scheduled in seeded random order, blocks one after the other in seeded random order. A block
//! that runs for very long makes room for others, as blocks that wait for each other need.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use crate::alu::{self, Regs, Ty};
use crate::async_copy::Copies;
use crate::counters::Counters;
use crate::isa::{
    Access, Address, AtomOp, Atomic, BarKind, Barrier, Base, Inst, Kernel, LOCAL_WINDOW, Matrix,
    Op, PARAM_WINDOW, Redux, SHARED_START, SHARED_WINDOW, Shuffle, Special, Target, Vote, WINDOW,
};
use crate::memory::DeviceMemory;
use crate::races::{self, Arrival, Blocks, Mode, Order, Problem, Shared, Who, poison};
use crate::rng::Rng;

/// A launch that failed.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The CUDA error that the context reports from now on.
    pub code: u32,
    /// The whole report.
    pub text: String,
}

/// What the interpreter needs to know about the machine that it pretends to be.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Seeds every random choice.
    pub seed: u64,
    /// Races and uninitialised reads are faults.
    pub checks: bool,
    /// Counts memory transactions.
    pub counters: bool,
    /// Multiprocessors: as many blocks can be resident.
    pub processors: u32,
    /// Warp instructions without a finished block after which a launch is called hung.
    pub watchdog: u64,
}

impl Default for Machine {
    fn default() -> Self {
        Machine { seed: 1, checks: true, counters: false, processors: 132, watchdog: 1_000_000_000 }
    }
}

/// A kernel with its arguments.
pub struct Launch<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub dynamic_shared: u32,
    /// The bytes of all parameters.
    pub params: &'a [u8],
    /// Number of the launch on its device, for the race shadow.
    pub number: u32,
}

/// What a register holds before the kernel sets it: a NaN in every floating-point type, like memory.
const POISON: u32 = 0x7fff_7fff;
/// The same of a predicate: neither true nor false in all lanes.
const POISON_PREDICATE: u32 = 0x5555_5555;
/// Warp instructions after which a block yields to another one.
const QUANTUM: u64 = 4_000_000;
/// Warp instructions after which a group of lanes yields to another group of its warp.
const PATIENCE: u32 = 100_000;

/// Registers of finished launches: megabytes, which a system takes longer to hand out than a short block
/// takes to run.
static SPARE_REGISTERS: Mutex<Vec<Regs>> = Mutex::new(Vec::new());
/// For as many warps as a block has.
const MOST_SPARE: usize = 32;

struct Group {
    pc: u32,
    mask: u32,
    /// Waits for other lanes at its instruction.
    blocked: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Ready,
    AtBarrier,
    Done,
}

struct Warp {
    regs: Regs,
    pc: u32,
    active: u32,
    groups: Vec<Group>,
    live: u32,
    state: State,
    /// Runs at most so long before another group gets its turn; counts down while diverged.
    patience: u32,
    /// Turns of a group that is not the lowest.
    detour: u32,
    local: Vec<u8>,
    local_init: Vec<bool>,
    copies: Copies,
    /// Allocation that was used last.
    hint: usize,
}

#[derive(Clone, Default)]
struct BarState {
    waiting: Vec<usize>,
    arrived: Vec<Arrival>,
    count: Option<u32>,
    pc: u32,
    /// Sum, conjunction and disjunction of the predicates of a reduction, and who gets them.
    votes: (u32, bool, bool),
    results: Vec<(usize, u32, u32, BarKind)>,
}

impl BarState {
    fn busy(&self) -> bool {
        !self.waiting.is_empty() || !self.arrived.is_empty()
    }
}

struct Block {
    number: u32,
    index: [u32; 3],
    warps: Vec<Warp>,
    shared: Shared,
    order: Order,
    barriers: Vec<BarState>,
}

/// What all blocks of a launch share.
struct Grid<'a> {
    launch: &'a Launch<'a>,
    kernel: &'a Kernel,
    memory: &'a mut DeviceMemory,
    machine: Machine,
    rng: Rng,
    counters: Counters,
    steps: u64,
    /// What fences and atomics have published, by address.
    published: HashMap<u64, Blocks>,
    threads: u32,
}

/// Who faulted, and how.
struct Stop {
    lane: Option<usize>,
    address: Option<u64>,
    problem: Problem,
}

impl From<Problem> for Stop {
    fn from(problem: Problem) -> Self {
        Stop { lane: None, address: None, problem }
    }
}

fn stop<T>(code: u32, text: impl Into<String>) -> Result<T, Stop> {
    Err(Problem::new(code, text.into()).into())
}

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        Some(lane)
    })
}

/// Runs a launch to its end.
pub fn run(
    launch: &Launch,
    memory: &mut DeviceMemory,
    machine: Machine,
) -> Result<Counters, Fault> {
    let blocks = launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
    let mut grid = Grid {
        kernel: launch.kernel,
        launch,
        memory,
        machine,
        rng: Rng::new(machine.seed ^ u64::from(launch.number) << 20),
        counters: Counters::default(),
        steps: 0,
        published: HashMap::new(),
        threads: launch.block.iter().product(),
    };
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    grid.rng.shuffle(&mut order);
    let mut queue: VecDeque<u32> = order.into();
    let mut resident: VecDeque<Block> = VecDeque::new();
    let mut spare: Option<Block> = None;
    let mut last_finish = 0;
    loop {
        // A new block starts when there is none, or when the running ones have had their turn.
        let mut block = match resident.pop_front() {
            Some(block) => block,
            None => match queue.pop_front() {
                Some(number) => grid.begin(number, spare.take()),
                None => break,
            },
        };
        let finished = grid.run_block(&mut block)?;
        if finished {
            last_finish = grid.steps;
            spare = Some(block);
            continue;
        }
        if grid.steps - last_finish > machine.watchdog {
            let text = format!(
                "pointwise emulator: error 702 (launch timeout): no block of kernel '{}' finished \
                 in {} warp instructions\n{}",
                grid.kernel.name,
                machine.watchdog,
                grid.list_warps(&block)
            );
            return Err(Fault { code: 702, text });
        }
        resident.push_back(block);
        if (resident.len() as u32) < machine.processors
            && let Some(number) = queue.pop_front()
        {
            resident.push_front(grid.begin(number, spare.take()));
        }
    }
    let mut pool = SPARE_REGISTERS.lock().unwrap_or_else(PoisonError::into_inner);
    pool.extend(spare.into_iter().flat_map(|block| block.warps).map(|warp| warp.regs));
    pool.truncate(MOST_SPARE);
    grid.counters.steps = grid.steps;
    grid.memory.trim();
    Ok(grid.counters)
}

impl Grid<'_> {
    fn begin(&mut self, number: u32, spare: Option<Block>) -> Block {
        let [gx, gy, _] = self.launch.grid;
        let index = [number % gx, number / gx % gy, number / gx / gy];
        let warps = self.threads.div_ceil(32) as usize;
        let fresh = spare.is_none();
        let mut block = spare.unwrap_or_else(|| Block {
            number,
            index,
            warps: (0..warps).map(|_| self.new_warp()).collect(),
            shared: Shared::default(),
            order: Order::new(number, warps),
            barriers: vec![BarState::default(); 16],
        });
        block.number = number;
        block.index = index;
        block.order = Order::new(number, warps);
        block.barriers.fill(BarState::default());
        let variables: Vec<(u32, u32)> = self
            .kernel
            .shared
            .iter()
            .map(|v| (v.address, if v.dynamic { self.launch.dynamic_shared } else { v.size }))
            .collect();
        block.shared.reset(SHARED_START, &variables);
        for (w, warp) in block.warps.iter_mut().enumerate() {
            let mine = (self.threads - w as u32 * 32).min(32);
            warp.live = if mine == 32 { u32::MAX } else { (1 << mine) - 1 };
            warp.active = warp.live;
            warp.pc = 0;
            warp.groups.clear();
            warp.state = State::Ready;
            warp.patience = PATIENCE;
            warp.detour = 0;
            warp.copies.clear();
            if !fresh {
                warp.local_init.fill(false);
            }
            self.reset_registers(&mut warp.regs, w, index);
        }
        block
    }

    /// Poisons registers, then sets those that hold constants and special values.
    fn reset_registers(&self, regs: &mut Regs, w: usize, index: [u32; 3]) {
        let kernel = self.kernel;
        let (word, long) = ([POISON; 32], [u64::from(POISON) << 32 | u64::from(POISON); 32]);
        match kernel.unset() {
            // A kernel has thousands of registers: to set all of them takes longer than a short block.
            Some([words, longs]) => {
                words.iter().for_each(|&row| regs.w[row as usize] = word);
                longs.iter().for_each(|&row| regs.l[row as usize] = long);
            }
            None => {
                regs.w.fill(word);
                regs.l.fill(long);
            }
        }
        regs.p.fill(POISON_PREDICATE);
        regs.p[0] = u32::MAX;
        for &(row, value) in &kernel.words {
            regs.w[row as usize] = [value; 32];
        }
        for &(row, value) in &kernel.longs {
            regs.l[row as usize] = [value; 32];
        }
        let [bx, by, _] = self.launch.block;
        let warps = self.threads.div_ceil(32);
        for &(row, special) in &kernel.specials {
            regs.w[row as usize] = std::array::from_fn(|lane| {
                let thread = (w * 32 + lane) as u32;
                let bit = 1_u32 << lane;
                match special {
                    Special::Tid(0) => thread % bx,
                    Special::Tid(1) => thread / bx % by,
                    Special::Tid(_) => thread / bx / by,
                    Special::Ntid(axis) => self.launch.block[usize::from(axis)],
                    Special::Nctaid(axis) => self.launch.grid[usize::from(axis)],
                    Special::Lane => lane as u32,
                    Special::Warp => w as u32,
                    Special::Warps => warps,
                    Special::Sms => self.machine.processors,
                    Special::LaneMask(0) => bit,
                    Special::LaneMask(1) => bit | (bit - 1),
                    Special::LaneMask(2) => bit - 1,
                    Special::LaneMask(3) => !(bit - 1),
                    Special::LaneMask(_) => !(bit - 1) & !bit,
                    Special::DynamicShared => self.launch.dynamic_shared,
                    Special::TotalShared => kernel.static_shared + self.launch.dynamic_shared,
                    Special::One => 1,
                    Special::Ctaid(axis) => index[usize::from(axis)],
                    Special::Sm | Special::Zero => 0,
                }
            });
        }
    }

    /// Registers hold anything: [`Grid::reset_registers`] sets those that could be read before they are
    /// written.
    fn new_warp(&self) -> Warp {
        let kernel = self.kernel;
        let local = kernel.local as usize * 32;
        let spare = SPARE_REGISTERS.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut regs = spare.unwrap_or_default();
        regs.w.resize(kernel.rows[0] as usize, [0; 32]);
        regs.l.resize(kernel.rows[1] as usize, [0; 32]);
        regs.p.resize(kernel.rows[2] as usize, 0);
        Warp {
            regs,
            pc: 0,
            active: 0,
            groups: Vec::new(),
            live: 0,
            state: State::Ready,
            patience: PATIENCE,
            detour: 0,
            local: (0..local as u64).map(poison).collect(),
            local_init: vec![false; local],
            copies: Copies::default(),
            hint: 0,
        }
    }

    /// Runs a block until it ends (true) or has used its turn.
    fn run_block(&mut self, block: &mut Block) -> Result<bool, Fault> {
        let begin = self.steps;
        loop {
            let ready = block.warps.iter().filter(|w| w.state == State::Ready).count();
            if ready == 0 {
                if block.warps.iter().all(|w| w.state == State::Done) {
                    return Ok(true);
                }
                let text = format!(
                    "pointwise emulator: error 719 (launch failure) in kernel '{}': deadlock in \
                     block ({}, {}, {})\n{}",
                    self.kernel.name,
                    block.index[0],
                    block.index[1],
                    block.index[2],
                    self.list_warps(block)
                );
                return Err(Fault { code: 719, text });
            }
            if self.steps - begin > QUANTUM {
                return Ok(false);
            }
            let pick = self.rng.below(ready);
            let chosen = block
                .warps
                .iter()
                .enumerate()
                .filter(|(_, w)| w.state == State::Ready)
                .nth(pick)
                .map_or(0, |(i, _)| i);
            let turn = 64 << self.rng.below(8);
            if let Err(stop) = self.run_warp(block, chosen, turn) {
                return Err(self.report(block, chosen, stop));
            }
        }
    }

    fn list_warps(&self, block: &Block) -> String {
        let mut out = String::new();
        for (w, warp) in block.warps.iter().enumerate() {
            if warp.state == State::Done {
                out += &format!("  warp {w}: has exited\n");
                continue;
            }
            let what =
                if warp.state == State::AtBarrier { "waits at the barrier at" } else { "at" };
            out += &format!(
                "  warp {w}, lanes {:#010x}: {what} {}\n",
                warp.active,
                self.kernel.position(warp.pc)
            );
            for group in &warp.groups {
                let what = if group.blocked { "wait for other lanes at" } else { "at" };
                out += &format!(
                    "  warp {w}, lanes {:#010x}: {what} {}\n",
                    group.mask,
                    self.kernel.position(group.pc)
                );
            }
        }
        out
    }

    fn report(&self, block: &Block, w: usize, stop: Stop) -> Fault {
        let code = stop.problem.code;
        let meaning = match code {
            700 => "illegal address",
            716 => "misaligned address",
            _ => "launch failure",
        };
        let warp = &block.warps[w];
        let lane = stop.lane.unwrap_or(warp.active.trailing_zeros().min(31) as usize);
        let thread = (w * 32 + lane) as u32;
        let [bx, by, _] = self.launch.block;
        let mut text = format!(
            "pointwise emulator: error {code} ({meaning}) in kernel '{}'\n  block ({}, {}, {}) \
             thread ({}, {}, {}), warp {w} lane {lane}\n  at {}\n  ",
            self.kernel.name,
            block.index[0],
            block.index[1],
            block.index[2],
            thread % bx,
            thread / bx % by,
            thread / bx / by,
            self.kernel.position(warp.pc),
        );
        if let Some(address) = stop.address {
            text += &format!("address {address:#x}");
            if let (Target::Local, at) = classify(address) {
                text += &format!(" (local memory: byte {at} of {})", self.kernel.local);
            } else if let Some(var) = self.shared_variable(address) {
                text += &format!(" ({var})");
            } else if self.memory.find(address, 1).is_some() {
                let place = self.memory.describe(address, 0);
                text += &format!(" (device memory: {})", place.replacen("0 bytes at", "at", 1));
            }
            text += ": ";
        }
        text += &stop.problem.text;
        Fault { code, text }
    }

    fn shared_variable(&self, address: u64) -> Option<String> {
        let address = address.checked_sub(SHARED_WINDOW).filter(|a| *a < WINDOW).unwrap_or(address);
        if address >= WINDOW {
            return None;
        }
        let size = |v: &crate::isa::SharedVar| {
            u64::from(if v.dynamic { self.launch.dynamic_shared } else { v.size })
        };
        let inside =
            self.kernel.shared.iter().find(|v| {
                address >= u64::from(v.address) && address < u64::from(v.address) + size(v)
            });
        if let Some(v) = inside {
            let at = address - u64::from(v.address);
            return Some(format!("shared memory: byte {at} of '{}', {} bytes", v.name, size(v)));
        }
        let near = self
            .kernel
            .shared
            .iter()
            .filter(|v| u64::from(v.address) <= address)
            .max_by_key(|v| v.address);
        Some(match near {
            Some(v) => format!(
                "shared memory: offset {} of '{}', which has {} bytes",
                address - u64::from(v.address),
                v.name,
                size(v)
            ),
            None => String::from("shared memory: outside every variable"),
        })
    }

    fn run_warp(&mut self, block: &mut Block, w: usize, turn: u64) -> Result<(), Stop> {
        let kernel = self.kernel;
        let end = self.steps + turn;
        let count = self.machine.counters;
        loop {
            let warp = &mut block.warps[w];
            if !warp.groups.is_empty() && !warp.regroup() {
                return match warp.live {
                    0 => Ok(()),
                    _ => stop(
                        719,
                        format!("lanes wait for lanes that never come\n{}", self.list_warps(block)),
                    ),
                };
            }
            if self.steps >= end {
                return Ok(());
            }
            self.steps += 1;
            let inst = &kernel.insts[warp.pc as usize];
            let mask = warp.active & (warp.regs.p[inst.guard as usize] ^ inst.guard_flip);
            if count {
                self.counters.classes[inst.kind as usize] += 1;
            }
            match &inst.op {
                Op::Alu(run) => {
                    run(&mut warp.regs, inst, mask);
                    warp.pc += 1;
                }
                Op::Bra(target) => warp.branch(mask, *target),
                _ if mask == 0 => warp.pc += 1,
                Op::Load(access) => {
                    self.load(block, w, access, mask)?;
                    block.warps[w].pc += 1;
                }
                Op::Store(access) => {
                    self.store(block, w, access, mask)?;
                    block.warps[w].pc += 1;
                }
                Op::Nop => warp.pc += 1,
                _ => {
                    if self.other(block, w, inst, mask)? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Runs an uncommon instruction; true when the warp cannot go on now.
    fn other(&mut self, block: &mut Block, w: usize, inst: &Inst, mask: u32) -> Result<bool, Stop> {
        let warp = &mut block.warps[w];
        // Lanes that the guard leaves out go on alone.
        let collective = matches!(
            inst.op,
            Op::Bar(_)
                | Op::WarpSync
                | Op::Shuffle(_)
                | Op::Vote(..)
                | Op::Match(..)
                | Op::Redux(_)
                | Op::Elect
                | Op::Matrix(_)
                | Op::Mma(_)
        );
        if mask != warp.active && (collective || matches!(inst.op, Op::Call(_) | Op::CopyBack(_))) {
            let rest = warp.active & !mask;
            warp.groups.push(Group { pc: warp.pc + 1, mask: rest, blocked: false });
            warp.active = mask;
        }
        if collective {
            let need = match inst.op {
                Op::Bar(_) | Op::Matrix(_) | Op::Mma(_) => u32::MAX,
                Op::WarpSync => warp.members(inst.a)?,
                _ => warp.members(inst.imm as u32)?,
            };
            // Barriers do without lanes that have left; these need every one, also of the last warp
            // of a block.
            if matches!(inst.op, Op::Matrix(_) | Op::Mma(_)) && warp.live != u32::MAX {
                let lane = warp.live.trailing_ones();
                let why = if w as u32 * 32 + lane < self.threads {
                    String::from("has exited")
                } else {
                    format!("does not exist in a block of {} threads", self.threads)
                };
                return stop(
                    719,
                    format!("an instruction of all 32 lanes of a warp, of which lane {lane} {why}"),
                );
            }
            if need & warp.live & !warp.active != 0 {
                let group = Group { pc: warp.pc, mask: warp.active, blocked: true };
                warp.groups.push(group);
                warp.active = 0;
                return Ok(false);
            }
        }
        match &inst.op {
            Op::Brx(targets) => {
                let row = warp.regs.w[inst.a as usize];
                if mask != warp.active {
                    let rest = warp.active & !mask;
                    warp.groups.push(Group { pc: warp.pc + 1, mask: rest, blocked: false });
                }
                for lane in lanes(mask) {
                    let Some(&pc) = targets.get(row[lane] as usize) else {
                        return stop(
                            719,
                            format!("branch index {} of {}", row[lane], targets.len()),
                        );
                    };
                    warp.groups.push(Group { pc, mask: 1 << lane, blocked: false });
                }
                warp.active = 0;
            }
            Op::Call(call) => {
                alu::put(&mut warp.regs.w[call.link as usize], &[warp.pc + 1; 32], mask);
                warp.copy_frames(&call.copies, mask, self.kernel.local);
                warp.pc = call.target;
            }
            Op::CopyBack(copies) => {
                warp.copy_frames(copies, mask, self.kernel.local);
                warp.pc += 1;
            }
            Op::Ret(link) => {
                let row = warp.regs.w[*link as usize];
                let rest = warp.active & !mask;
                if rest != 0 {
                    warp.groups.push(Group { pc: warp.pc + 1, mask: rest, blocked: false });
                }
                for lane in lanes(mask) {
                    warp.groups.push(Group { pc: row[lane], mask: 1 << lane, blocked: false });
                }
                warp.active = 0;
            }
            Op::Exit => {
                if let Some((copy, n)) = warp.copies.in_flight(mask) {
                    return Err(Stop {
                        lane: Some(copy.lane),
                        address: Some(copy.dst.into()),
                        problem: Problem::new(
                            719,
                            format!(
                                "exited with {n} asynchronous copies never waited for; the first was \
                             issued at {}",
                                self.kernel.position(copy.pc)
                            ),
                        ),
                    });
                }
                warp.live &= !mask;
                warp.active &= !mask;
                for group in &mut warp.groups {
                    group.blocked = false;
                }
                if warp.live == 0 {
                    warp.state = State::Done;
                    for id in 0..16 {
                        if block.barriers[id].busy() && block.barriers[id].count.is_none() {
                            complete(block, id)?;
                        }
                    }
                    return Ok(true);
                }
                if warp.active != 0 {
                    warp.pc += 1;
                } else if warp.groups.is_empty() {
                    return stop(719, "no lanes left");
                }
            }
            Op::Trap => return stop(719, "trap"),
            Op::Bar(bar) => return self.barrier(block, w, bar, mask),
            Op::WarpSync => {
                block.order.sync[w] += 1;
                warp.pc += 1;
            }
            Op::Shuffle(mode) => {
                shuffle(&mut warp.regs, inst, *mode, mask);
                warp.pc += 1;
            }
            Op::Vote(mode, negated) => {
                let members = warp.member_rows(inst.imm as u32, mask);
                let p = warp.regs.p[inst.a as usize] ^ if *negated { u32::MAX } else { 0 };
                for (group, _) in members {
                    let yes = p & group;
                    let result = match mode {
                        Vote::All => yes == group,
                        Vote::Any => yes != 0,
                        Vote::Uni => yes == group || yes == 0,
                        Vote::Ballot => {
                            alu::put(&mut warp.regs.w[inst.d as usize], &[yes; 32], group);
                            continue;
                        }
                    };
                    let bits = if result { u32::MAX } else { 0 };
                    alu::put_pred(&mut warp.regs.p[inst.d as usize], bits, group);
                }
                warp.pc += 1;
            }
            Op::Match(all, long) => {
                for (group, _) in warp.member_rows(inst.imm as u32, mask) {
                    let value = |lane: usize| match long {
                        true => warp.regs.l[inst.a as usize][lane],
                        false => warp.regs.w[inst.a as usize][lane].into(),
                    };
                    let mut out = [0; 32];
                    for lane in lanes(group) {
                        out[lane] = lanes(group)
                            .filter(|&other| value(other) == value(lane))
                            .fold(0, |m, other| m | 1 << other);
                    }
                    let uniform = lanes(group).all(|lane| out[lane] == group);
                    if *all {
                        out = [if uniform { group } else { 0 }; 32];
                    }
                    alu::put(&mut warp.regs.w[inst.d as usize], &out, group);
                    let bits = if uniform { u32::MAX } else { 0 };
                    alu::put_pred(&mut warp.regs.p[inst.d2 as usize], bits, group);
                }
                warp.pc += 1;
            }
            Op::ActiveMask => {
                alu::put(&mut warp.regs.w[inst.d as usize], &[mask; 32], mask);
                warp.pc += 1;
            }
            Op::Redux(op) => {
                for (group, _) in warp.member_rows(inst.imm as u32, mask) {
                    let row = warp.regs.w[inst.a as usize];
                    let value = lanes(group)
                        .map(|lane| row[lane])
                        .reduce(|a, b| match op {
                            Redux::Add => a.wrapping_add(b),
                            Redux::Min(true) => (a as i32).min(b as i32) as u32,
                            Redux::Max(true) => (a as i32).max(b as i32) as u32,
                            Redux::Min(false) => a.min(b),
                            Redux::Max(false) => a.max(b),
                            Redux::And => a & b,
                            Redux::Or => a | b,
                            Redux::Xor => a ^ b,
                        })
                        .unwrap_or(0);
                    alu::put(&mut warp.regs.w[inst.d as usize], &[value; 32], group);
                }
                warp.pc += 1;
            }
            Op::Elect => {
                for (group, _) in warp.member_rows(inst.imm as u32, mask) {
                    let leader = group.trailing_zeros();
                    alu::put(&mut warp.regs.w[inst.d as usize], &[leader; 32], group);
                    alu::put_pred(&mut warp.regs.p[inst.d2 as usize], 1 << leader, group);
                }
                warp.pc += 1;
            }
            Op::Fence => {
                block.order.fence(w, mask);
                warp.pc += 1;
            }
            Op::Clock(long) => {
                let now = self.steps;
                if *long {
                    alu::put_long(&mut warp.regs.l[inst.d as usize], &[now; 32], mask);
                } else {
                    alu::put(&mut warp.regs.w[inst.d as usize], &[now as u32; 32], mask);
                }
                warp.pc += 1;
            }
            Op::IsSpace(target) => {
                let row = warp.regs.l[inst.a as usize];
                let bits =
                    (0..32).fold(0, |m, l| m | u32::from(classify(row[l]).0 == *target) << l);
                alu::put_pred(&mut warp.regs.p[inst.d as usize], bits, mask);
                warp.pc += 1;
            }
            Op::Mma(mma) => {
                mma.run(&mut warp.regs);
                warp.pc += 1;
            }
            Op::Matrix(matrix) => {
                self.matrix(block, w, matrix)?;
                block.warps[w].pc += 1;
            }
            Op::Atomic(atomic) => {
                self.atomic(block, w, atomic, mask)?;
                block.warps[w].pc += 1;
            }
            Op::CpAsync(copy) => {
                let (dst, src) = (warp.addresses(copy.dst), warp.addresses(copy.src));
                let sizes = copy.src_size.map(|row| warp.regs.w[row as usize]);
                let ignored = copy.ignore.map_or(0, |(row, negated)| {
                    warp.regs.p[row as usize] ^ if negated { u32::MAX } else { 0 }
                });
                let size = copy.size;
                let read = |lane: usize| match ignored >> lane & 1 {
                    1 => 0,
                    _ => sizes.map_or(size, |row| row[lane]),
                };
                if self.machine.counters {
                    let from = |lane: usize| (src[lane], u64::from(read(lane)));
                    let reading = lanes(mask).filter(|&lane| read(lane) > 0);
                    let mask = reading.fold(0, |mask, lane| mask | 1 << lane);
                    self.counters.global(mask, &from, false);
                }
                for lane in lanes(mask) {
                    let src_size = read(lane);
                    let at = |address: u64, problem: Problem| Stop {
                        lane: Some(lane),
                        address: Some(address),
                        problem,
                    };
                    if src_size > size {
                        let text = format!("source size {src_size} of a copy of {size} bytes");
                        return Err(at(src[lane], Problem::new(719, text)));
                    }
                    let (target, _) = classify(dst[lane]);
                    let to = if target == Target::Shared {
                        dst[lane] - SHARED_WINDOW
                    } else {
                        dst[lane]
                    };
                    self.check_shared(block, lane, to, size)?;
                    let who = self.who(block, w, lane);
                    let kernel = self.kernel;
                    if self.machine.checks {
                        block
                            .shared
                            .access(&block.order, who, to as u32, size, Mode::Write, false, &|pc| {
                                kernel.position(pc)
                            })
                            .map_err(|p| at(to, p))?;
                    }
                    block.shared.set_pending(to as u32, size, true);
                    // Also of an address from which nothing is read.
                    if src[lane] % u64::from(size) != 0 {
                        let text = format!("a copy of {size} bytes must be aligned to {size}");
                        return Err(at(src[lane], Problem::new(716, text)));
                    }
                    if src_size > 0 {
                        self.global(block, w, lane, src[lane], src_size, src_size, Mode::Read)?;
                    }
                    block.warps[w].copies.issue(lane, to as u32, src[lane], size, src_size, who.pc);
                }
                block.warps[w].pc += 1;
            }
            Op::CommitGroup => {
                warp.copies.commit(mask);
                warp.pc += 1;
            }
            Op::WaitGroup(n) => {
                self.land(block, w, mask, Some(*n))?;
                block.warps[w].pc += 1;
            }
            Op::WaitAll => {
                self.land(block, w, mask, None)?;
                block.warps[w].pc += 1;
            }
            Op::Alu(_) | Op::Bra(_) | Op::Load(_) | Op::Store(_) | Op::Nop => {}
        }
        Ok(false)
    }

    fn who(&self, block: &Block, w: usize, lane: usize) -> Who {
        Who { thread: (w * 32 + lane) as u16, pc: block.warps[w].pc }
    }

    fn land(
        &mut self,
        block: &mut Block,
        w: usize,
        mask: u32,
        allowed: Option<u32>,
    ) -> Result<(), Stop> {
        let due = block.warps[w].copies.due(mask, allowed, &mut self.rng);
        let kernel = self.kernel;
        for copy in due {
            let stop =
                |problem| Stop { lane: Some(copy.lane), address: Some(copy.dst.into()), problem };
            // The source is read as late as the ISA allows.
            let bytes = self
                .memory
                .read(copy.src, copy.src_size.into())
                .map_err(|text| stop(Problem::new(700, text)))?;
            block.shared.set_pending(copy.dst, copy.size, false);
            let who = Who { thread: (w * 32 + copy.lane) as u16, pc: copy.pc };
            if self.machine.checks {
                block
                    .shared
                    .access(&block.order, who, copy.dst, copy.size, Mode::Write, true, &|pc| {
                        kernel.position(pc)
                    })
                    .map_err(stop)?;
            }
            let to = block.shared.bytes_mut(copy.dst, copy.size);
            to.fill(0);
            to[..bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn barrier(
        &mut self,
        block: &mut Block,
        w: usize,
        bar: &Barrier,
        mask: u32,
    ) -> Result<bool, Stop> {
        let Block { warps, barriers, order, .. } = block;
        let warp = &mut warps[w];
        let uniform = |row: u32, what: &str| -> Result<u32, Stop> {
            let values = &warp.regs.w[row as usize];
            let first = values[mask.trailing_zeros() as usize];
            if lanes(mask).any(|lane| values[lane] != first) {
                return stop(719, format!("lanes of one warp give different barrier {what}"));
            }
            Ok(first)
        };
        let id = uniform(bar.id, "numbers")? as usize;
        if id >= 16 {
            return stop(719, format!("barrier {id} does not exist"));
        }
        let count = bar.count.map(|row| uniform(row, "thread counts")).transpose()?;
        if let Some(count) = count
            && (count == 0
                || count % 32 != 0
                || count.div_ceil(32) as usize > warps_of(self.threads))
        {
            return stop(719, format!("a barrier of {count} threads"));
        }
        let state = &mut barriers[id];
        if state.busy() {
            if state.count != count {
                return stop(
                    719,
                    format!(
                        "barrier {id} expects {:?} threads here and {count:?} at {}",
                        state.count,
                        self.kernel.position(state.pc)
                    ),
                );
            }
            // Without a count, one barrier instruction stands for the whole block.
            if count.is_none() && state.pc != warp.pc {
                return stop(
                    719,
                    format!(
                        "barrier divergence: other warps of the block wait at {}",
                        self.kernel.position(state.pc)
                    ),
                );
            }
        } else {
            state.count = count;
            state.pc = warp.pc;
            state.votes = (0, true, false);
            state.results.clear();
        }
        if !matches!(bar.kind, BarKind::Sync | BarKind::Arrive) {
            let (row, negated) = bar.pred;
            let p = warp.regs.p[row as usize] ^ if negated { u32::MAX } else { 0 };
            state.votes.0 += (p & mask).count_ones();
            state.votes.1 &= p & mask == mask;
            state.votes.2 |= p & mask != 0;
            state.results.push((w, mask, bar.dst, bar.kind));
        }
        if bar.kind == BarKind::Arrive {
            let arrival = order.arrive(w);
            state.arrived.push(arrival);
            warp.pc += 1;
        } else {
            state.waiting.push(w);
            warp.state = State::AtBarrier;
        }
        complete(block, id)?;
        Ok(block.warps[w].state == State::AtBarrier)
    }

    fn load(
        &mut self,
        block: &mut Block,
        w: usize,
        access: &Access,
        mask: u32,
    ) -> Result<(), Stop> {
        let size = access.size;
        let total = size * access.regs.len() as u32;
        let addresses = block.warps[w].addresses(access.address);
        let mode = match (access.nc, access.strong) {
            (true, _) => Mode::ReadOnly,
            (_, true) => Mode::StrongRead,
            _ => Mode::Read,
        };
        if self.machine.counters {
            self.count(access.target, mask, &addresses, total, false);
        }
        let mut mask = mask;
        if access.target == Target::Shared && access.size == 4 && mode == Mode::Read && !access.long
        {
            mask = match access.regs[..] {
                [Some(a)] => self.load_shared(block, w, &addresses, mask, [a]),
                [Some(a), Some(b)] => self.load_shared(block, w, &addresses, mask, [a, b]),
                [Some(a), Some(b), Some(c), Some(d)] => {
                    self.load_shared(block, w, &addresses, mask, [a, b, c, d])
                }
                _ => mask,
            };
        }
        // The lane before, when its address is the same and its check covers this one.
        let mut last: Option<(u64, u128)> = None;
        for lane in lanes(mask) {
            let address = addresses[lane];
            if let Some((same, value)) = last
                && same == address
            {
                scatter(&mut block.warps[w].regs, access, lane, value);
                continue;
            }
            last = None;
            let (target, at) = match access.target {
                Target::Generic => classify(address),
                other => (other, address),
            };
            let fail = |code: u32, text: String| Stop {
                lane: Some(lane),
                address: Some(address),
                problem: Problem::new(code, text),
            };
            let value = match target {
                Target::Shared => {
                    self.check_shared(block, lane, at, total)?;
                    let at = at as u32;
                    if self.machine.checks {
                        self.check_order(block, w, lane, at, total, mode)?;
                    }
                    let value = block.shared.value(at, total);
                    if !self.machine.checks || !block.shared.written_by_warp(at, total, w) {
                        last = Some((address, value));
                    }
                    value
                }
                Target::Local => {
                    let warp = &block.warps[w];
                    let range = warp.local_range(lane, at, total, self.kernel.local)?;
                    if self.machine.checks && !warp.local_init[range.clone()].iter().all(|&b| b) {
                        let text = String::from("uninitialised bytes of local memory");
                        return Err(Stop { address: Some(LOCAL_WINDOW + at), ..fail(719, text) });
                    }
                    races::value(&warp.local[range], total)
                }
                Target::Param => {
                    let at = at.wrapping_sub(PARAM_WINDOW);
                    let end = at.saturating_add(total.into());
                    if end > self.launch.params.len() as u64 {
                        let size = self.launch.params.len();
                        return Err(fail(700, format!("byte {at} of {size} bytes of parameters")));
                    }
                    if at % u64::from(total) != 0 {
                        let text = format!("an access of {total} bytes must be aligned to {total}");
                        return Err(fail(716, text));
                    }
                    let value = races::value(&self.launch.params[at as usize..], total);
                    last = Some((address, value));
                    value
                }
                Target::Global | Target::Generic => {
                    let (index, offset) = self.global(block, w, lane, at, total, size, mode)?;
                    if access.strong {
                        self.acquire(block, w, at);
                    }
                    races::value(self.memory.at(index).bytes(offset, total.into()), total)
                }
            };
            scatter(&mut block.warps[w].regs, access, lane, value);
        }
        Ok(())
    }

    /// Loads words for all lanes that need no closer look; gives the lanes that do.
    fn load_shared<const N: usize>(
        &self,
        block: &mut Block,
        w: usize,
        addresses: &[u64; 32],
        mask: u32,
        rows: [u32; N],
    ) -> u32 {
        if !self.machine.checks {
            return mask;
        }
        let Block { warps, shared, order, .. } = block;
        let Warp { regs, pc, .. } = &mut warps[w];
        let mut out = [[0; 32]; N];
        let mut done = 0;
        let mut last = (u64::MAX, [0; N]);
        for lane in lanes(mask) {
            let who = Who { thread: (w * 32 + lane) as u16, pc: *pc };
            // A neighbour's words, unless a lane of this warp wrote them.
            let same = last.0 == addresses[lane]
                && !shared.written_by_warp(last.0 as u32, 4 * N as u32, w);
            if !same {
                match shared.read_words::<N>(order, who, addresses[lane]) {
                    Some(words) => last = (addresses[lane], words),
                    None => continue,
                }
            }
            done |= 1 << lane;
            for (out, word) in out.iter_mut().zip(last.1) {
                out[lane] = word;
            }
        }
        for (row, out) in rows.iter().zip(&out) {
            alu::put(&mut regs.w[*row as usize], out, done);
        }
        mask & !done
    }

    fn store(
        &mut self,
        block: &mut Block,
        w: usize,
        access: &Access,
        mask: u32,
    ) -> Result<(), Stop> {
        let size = access.size;
        let total = size * access.regs.len() as u32;
        let addresses = block.warps[w].addresses(access.address);
        let mode = if access.strong { Mode::StrongWrite } else { Mode::Write };
        if self.machine.counters {
            self.count(access.target, mask, &addresses, total, true);
        }
        for lane in lanes(mask) {
            let address = addresses[lane];
            let regs = &block.warps[w].regs;
            let value = access.regs.iter().rev().fold(0_u128, |value, row| {
                let row = row.unwrap_or(0) as usize;
                let item = if access.long { regs.l[row][lane] } else { regs.w[row][lane].into() };
                // The first item of one is not shifted, so 64-bit items never lose bits.
                value << (size * 8) | u128::from(alu::extend(item, size * 8, false))
            });
            let bytes = &value.to_le_bytes()[..total as usize];
            let (target, at) = match access.target {
                Target::Generic => classify(address),
                other => (other, address),
            };
            match target {
                Target::Shared => {
                    self.check_shared(block, lane, at, total)?;
                    let at = at as u32;
                    if self.machine.checks {
                        self.check_order(block, w, lane, at, total, mode)?;
                    }
                    block.shared.bytes_mut(at, total).copy_from_slice(bytes);
                }
                Target::Local => {
                    let warp = &mut block.warps[w];
                    let range = warp.local_range(lane, at, total, self.kernel.local)?;
                    warp.local[range.clone()].copy_from_slice(bytes);
                    warp.local_init[range].fill(true);
                }
                Target::Param => {
                    return Err(Stop {
                        lane: Some(lane),
                        address: Some(address),
                        problem: Problem::new(700, String::from("a store to kernel parameters")),
                    });
                }
                Target::Global | Target::Generic => {
                    let (index, offset) = self.global(block, w, lane, at, total, size, mode)?;
                    if access.strong {
                        self.release(block, w, lane, at);
                    }
                    self.memory.at(index).write(offset, bytes);
                }
            }
        }
        Ok(())
    }

    /// Checks an access to shared memory for races and initialisation, and records it.
    #[inline]
    fn check_order(
        &self,
        block: &mut Block,
        w: usize,
        lane: usize,
        address: u32,
        len: u32,
        mode: Mode,
    ) -> Result<(), Stop> {
        let who = self.who(block, w, lane);
        let kernel = self.kernel;
        block
            .shared
            .access(&block.order, who, address, len, mode, true, &|pc| kernel.position(pc))
            .map_err(|problem| Stop { lane: Some(lane), address: Some(address.into()), problem })
    }

    /// Checks an access to device memory and records it; gives allocation and offset. Bytes are
    /// checked for initialisation `element` at a time, so that the report is exact.
    fn global(
        &mut self,
        block: &mut Block,
        w: usize,
        lane: usize,
        address: u64,
        total: u32,
        element: u32,
        mode: Mode,
    ) -> Result<(usize, u64), Stop> {
        let at = |address: u64, problem: Problem| Stop {
            lane: Some(lane),
            address: Some(address),
            problem,
        };
        let len = u64::from(total);
        // Copies of odd sizes were checked for the alignment of the whole by their issuer.
        if total.is_power_of_two() && address & (len - 1) != 0 {
            let text = format!("an access of {total} bytes must be aligned to {total}");
            return Err(at(address, Problem::new(716, text)));
        }
        let warp = &mut block.warps[w];
        let index = if self.memory.holds(warp.hint, address, len) {
            warp.hint
        } else {
            match self.memory.find(address, len) {
                Some(index) => {
                    warp.hint = index;
                    index
                }
                None => {
                    let text = self.memory.describe(address, len);
                    return Err(at(address, Problem::new(700, text)));
                }
            }
        };
        let who = Who { thread: (w * 32 + lane) as u16, pc: warp.pc };
        let kernel = self.kernel;
        let allocation = self.memory.at(index);
        let offset = address - allocation.base;
        if self.machine.checks {
            let reads = !matches!(mode, Mode::Write | Mode::StrongWrite);
            if reads && !allocation.initialised(offset, len) {
                let bad = (offset..offset + len)
                    .step_by(element as usize)
                    .find(|&o| {
                        !allocation.initialised(o, element.min((offset + len - o) as u32).into())
                    })
                    .unwrap_or(offset);
                let text = format!(
                    "uninitialised bytes: nothing has written byte {bad} of {}, {} bytes",
                    allocation.name, allocation.size
                );
                let address = allocation.base + bad;
                return Err(at(address, Problem::new(719, text)));
            }
            let end = offset + len;
            let mut word = offset & !3;
            while word < end {
                let first = offset.max(word) - word;
                let last = end.min(word + 4) - word;
                let bytes = ((1_u32 << last) - (1 << first)) as u8;
                allocation
                    .cell(word)
                    .access(self.launch.number, &block.order, who, bytes, mode, &|pc| {
                        kernel.position(pc)
                    })
                    .map_err(|p| Stop { lane: Some(lane), address: Some(address), problem: p })?;
                word += 4;
            }
        }
        Ok((index, offset))
    }

    #[inline(always)]
    fn check_shared(&self, block: &Block, lane: usize, address: u64, len: u32) -> Result<(), Stop> {
        let problem = if address & u64::from(len - 1) != 0 {
            Problem::new(716, format!("an access of {len} bytes must be aligned to {len}"))
        } else if !block.shared.contains(address, len) {
            Problem::new(700, format!("{len} bytes outside every shared variable"))
        } else {
            return Ok(());
        };
        Err(Stop { lane: Some(lane), address: Some(address), problem })
    }

    fn atomic(
        &mut self,
        block: &mut Block,
        w: usize,
        atomic: &Atomic,
        mask: u32,
    ) -> Result<(), Stop> {
        let size = atomic.ty.bits() / 8;
        let addresses = block.warps[w].addresses(atomic.address);
        if self.machine.counters {
            self.count(atomic.target, mask, &addresses, size, true);
        }
        // Lanes come in any order: sums of floats must not depend on it.
        let mut order: Vec<usize> = lanes(mask).collect();
        self.rng.shuffle(&mut order);
        for lane in order {
            let address = addresses[lane];
            let (target, at) = match atomic.target {
                Target::Generic => classify(address),
                other => (other, address),
            };
            let long = atomic.ty.long();
            let regs = &block.warps[w].regs;
            let operand = |row: u32| match long {
                true => regs.l[row as usize][lane],
                false => regs.w[row as usize][lane].into(),
            };
            let (b, c) = (operand(atomic.b), operand(atomic.c));
            let update = |old: u64| modify(atomic.op, atomic.ty, old, b, c);
            let read = |bytes: &[u8]| {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(word)
            };
            let old = match target {
                Target::Shared => {
                    self.check_shared(block, lane, at, size)?;
                    let at = at as u32;
                    if self.machine.checks {
                        self.check_order(block, w, lane, at, size, Mode::Atomic)?;
                    }
                    let bytes = block.shared.bytes_mut(at, size);
                    let old = read(bytes);
                    bytes.copy_from_slice(&update(old).to_le_bytes()[..size as usize]);
                    old
                }
                Target::Global => {
                    let (index, offset) =
                        self.global(block, w, lane, at, size, size, Mode::Atomic)?;
                    self.acquire(block, w, at);
                    if atomic.fenced {
                        block.order.fence(w, 1 << lane);
                    }
                    self.release(block, w, lane, at);
                    let allocation = self.memory.at(index);
                    let old = read(allocation.bytes(offset, size.into()));
                    allocation.write(offset, &update(old).to_le_bytes()[..size as usize]);
                    old
                }
                other => {
                    return Err(Stop {
                        lane: Some(lane),
                        address: Some(address),
                        problem: Problem::new(700, format!("an atomic on {other:?} memory")),
                    });
                }
            };
            if let Some(row) = atomic.dst {
                let regs = &mut block.warps[w].regs;
                if long {
                    regs.l[row as usize][lane] = old;
                } else {
                    regs.w[row as usize][lane] = old as u32;
                }
            }
        }
        Ok(())
    }

    /// A strong read learns what was published at its address.
    fn acquire(&mut self, block: &mut Block, w: usize, address: u64) {
        if let Some(published) = self.published.get(&address) {
            block.order.acquire(w, published);
        }
    }

    /// A strong write publishes what the fences before it cover.
    fn release(&mut self, block: &Block, w: usize, lane: usize, address: u64) {
        if block.order.fenced(w) {
            let who = self.who(block, w, lane);
            block.order.release(who, self.published.entry(address).or_default());
        }
    }

    fn matrix(&mut self, block: &mut Block, w: usize, matrix: &Matrix) -> Result<(), Stop> {
        let addresses = block.warps[w].addresses(matrix.address);
        let local = |address: u64| match matrix.generic {
            true => address.wrapping_sub(SHARED_WINDOW),
            false => address,
        };
        let blocks = matrix.regs.len();
        if self.kernel.version.1 < 80 {
            // Before sm_80 every lane needs a valid address, used or not.
            for (lane, &address) in addresses.iter().enumerate() {
                self.check_shared(block, lane, local(address), 16)?;
            }
        }
        if self.machine.counters {
            for i in 0..blocks {
                let row = |lane: usize| (local(addresses[i * 8 + lane]), 16);
                self.counters.shared(0xff, &row, 16);
            }
        }
        let mut words = [[[0_u8; 16]; 8]; 4];
        if matrix.store {
            for (block_words, &row) in words.iter_mut().zip(&matrix.regs) {
                let row = block.warps[w].regs.w[row as usize];
                for (lane, word) in row.iter().enumerate() {
                    for half in 0..2 {
                        let (r, c) = place(lane, half, matrix.trans);
                        let value = (word >> (16 * half)) as u16;
                        block_words[r][2 * c..2 * c + 2].copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
        }
        for i in 0..blocks {
            for r in 0..8 {
                let lane = i * 8 + r;
                let address = local(addresses[lane]);
                self.check_shared(block, lane, address, 16)?;
                let at = address as u32;
                if self.machine.checks {
                    let mode = if matrix.store { Mode::Write } else { Mode::Read };
                    self.check_order(block, w, lane, at, 16, mode)?;
                }
                if matrix.store {
                    block.shared.bytes_mut(at, 16).copy_from_slice(&words[i][r]);
                } else {
                    words[i][r].copy_from_slice(block.shared.bytes(at, 16));
                }
            }
        }
        if !matrix.store {
            for (block_words, &row) in words.iter().zip(&matrix.regs) {
                let out = std::array::from_fn(|lane| {
                    (0..2).fold(0, |word, half| {
                        let (r, c) = place(lane, half, matrix.trans);
                        let bytes = [block_words[r][2 * c], block_words[r][2 * c + 1]];
                        word | u32::from(u16::from_le_bytes(bytes)) << (16 * half)
                    })
                });
                block.warps[w].regs.w[row as usize] = out;
            }
        }
        Ok(())
    }

    fn count(&mut self, target: Target, mask: u32, addresses: &[u64; 32], size: u32, store: bool) {
        let (mut shared, mut global) = (0, 0);
        for lane in lanes(mask) {
            let target = match target {
                Target::Generic => classify(addresses[lane]).0,
                other => other,
            };
            match target {
                Target::Shared => shared |= 1 << lane,
                Target::Global => global |= 1 << lane,
                _ => {}
            }
        }
        let span = |lane: usize| (addresses[lane], u64::from(size));
        if shared != 0 {
            self.counters.shared(shared, &span, size);
        }
        if global != 0 {
            self.counters.global(global, &span, store);
        }
    }
}

/// Spreads a loaded value over the lane's registers.
#[inline(always)]
fn scatter(regs: &mut Regs, access: &Access, lane: usize, value: u128) {
    if access.size == 4 && !access.long {
        for (i, row) in access.regs.iter().enumerate() {
            if let Some(row) = *row {
                regs.w[row as usize][lane] = (value >> (32 * i)) as u32;
            }
        }
        return;
    }
    for (i, row) in access.regs.iter().enumerate() {
        let Some(row) = *row else { continue };
        let bits = access.size * 8;
        let item = alu::extend((value >> (bits * i as u32)) as u64, bits, access.signed);
        if access.long {
            regs.l[row as usize][lane] = item;
        } else {
            regs.w[row as usize][lane] = alu::extend(item, access.reg_bits, false) as u32;
        }
    }
}

/// Row and column of a lane's low or high half in an 8x8 block of 16-bit elements.
fn place(lane: usize, half: usize, trans: bool) -> (usize, usize) {
    let (row, column) = (lane / 4, lane % 4 * 2 + half);
    if trans { (column, row) } else { (row, column) }
}

fn warps_of(threads: u32) -> usize {
    threads.div_ceil(32) as usize
}

/// Lets the warps at barrier `id` go when all have come.
fn complete(block: &mut Block, id: usize) -> Result<(), Stop> {
    let Block { warps, barriers, order, .. } = block;
    let state = &mut barriers[id];
    let here = state.waiting.len() + state.arrived.len();
    let expected = match state.count {
        Some(threads) => threads as usize / 32,
        None => warps.iter().filter(|w| w.state != State::Done).count(),
    };
    if here < expected {
        return Ok(());
    }
    order.barrier(&state.waiting, &state.arrived);
    for &w in &state.waiting {
        warps[w].state = State::Ready;
        warps[w].pc += 1;
    }
    let (sum, and, or) = state.votes;
    for &(w, mask, row, kind) in &state.results {
        let regs = &mut warps[w].regs;
        let bits = |yes: bool| if yes { u32::MAX } else { 0 };
        match kind {
            BarKind::Popc => alu::put(&mut regs.w[row as usize], &[sum; 32], mask),
            BarKind::And => alu::put_pred(&mut regs.p[row as usize], bits(and), mask),
            _ => alu::put_pred(&mut regs.p[row as usize], bits(or), mask),
        }
    }
    *state = BarState::default();
    Ok(())
}

/// The space and the address in it of a generic address.
fn classify(address: u64) -> (Target, u64) {
    let within = |window: u64| address >= window && address < window + WINDOW;
    if within(SHARED_WINDOW) {
        (Target::Shared, address - SHARED_WINDOW)
    } else if within(LOCAL_WINDOW) {
        (Target::Local, address - LOCAL_WINDOW)
    } else if within(PARAM_WINDOW) {
        (Target::Param, address)
    } else {
        (Target::Global, address)
    }
}

impl Warp {
    fn addresses(&self, address: Address) -> [u64; 32] {
        match address.base {
            Base::None => [address.offset as u64; 32],
            Base::Long(row) => {
                self.regs.l[row as usize].map(|a| a.wrapping_add(address.offset as u64))
            }
            // 32-bit addresses wrap in their window.
            Base::Word(row) => {
                self.regs.w[row as usize].map(|a| u64::from(a.wrapping_add(address.offset as u32)))
            }
        }
    }

    fn branch(&mut self, taken: u32, target: u32) {
        if taken == self.active {
            self.pc = target;
        } else if taken == 0 {
            self.pc += 1;
        } else {
            self.groups.push(Group { pc: target, mask: taken, blocked: false });
            self.active &= !taken;
            self.pc += 1;
        }
    }

    /// Merges groups that have met and chooses the one to run; false if none can.
    fn regroup(&mut self) -> bool {
        let pc = self.pc;
        let lowest = |g: &Group| !g.blocked && g.pc < pc;
        if self.active != 0 && self.detour == 0 {
            // The common case: nobody has met us and we are still the lowest.
            self.patience = self.patience.saturating_sub(1);
            if self.patience > 0 && !self.groups.iter().any(|g| g.pc == pc || lowest(g)) {
                return true;
            }
        } else if self.active != 0 {
            self.detour -= 1;
            if !self.groups.iter().any(|g| g.pc == pc) {
                return true;
            }
        }
        let impatient = self.patience == 0;
        if self.active != 0 {
            self.groups.push(Group { pc, mask: self.active, blocked: false });
            self.active = 0;
        }
        self.groups.sort_by_key(|g| g.pc);
        self.groups.dedup_by(|later, first| {
            let same = later.pc == first.pc;
            if same {
                first.mask |= later.mask;
                // New lanes may complete what a group waits for.
                first.blocked = false;
            }
            same
        });
        let runnable: Vec<usize> =
            (0..self.groups.len()).filter(|&i| !self.groups[i].blocked).collect();
        // Another group gets a turn now and then: the lowest may be waiting for it in a loop.
        let pick = match &runnable[..] {
            [] => return false,
            [.., last] if impatient && runnable.len() > 1 => {
                self.detour = PATIENCE;
                *last
            }
            [first, ..] => *first,
        };
        if impatient {
            self.patience = PATIENCE;
        }
        let group = self.groups.remove(pick);
        self.pc = group.pc;
        self.active = group.mask;
        true
    }

    /// The lanes that a collective instruction names, checked against those that run it.
    fn members(&self, row: u32) -> Result<u32, Stop> {
        let row = &self.regs.w[row as usize];
        let mut all = 0;
        for lane in lanes(self.active) {
            if row[lane] >> lane & 1 == 0 {
                return Err(Stop {
                    lane: Some(lane),
                    address: None,
                    problem: Problem::new(
                        719,
                        format!("the lane is not in its own member mask {:#010x}", row[lane]),
                    ),
                });
            }
            all |= row[lane];
        }
        Ok(all)
    }

    /// The running lanes by member mask: (lanes that run, mask).
    fn member_rows(&self, row: u32, mask: u32) -> Vec<(u32, u32)> {
        let row = &self.regs.w[row as usize];
        let mut rest = mask;
        let mut out = Vec::new();
        while rest != 0 {
            let members = row[rest.trailing_zeros() as usize];
            let group = lanes(rest).filter(|&l| row[l] == members).fold(0, |m, l| m | 1 << l);
            out.push((group, members));
            rest &= !group;
        }
        out
    }

    fn local_range(
        &self,
        lane: usize,
        address: u64,
        len: u32,
        size: u32,
    ) -> Result<std::ops::Range<usize>, Stop> {
        let problem = if !address.is_multiple_of(u64::from(len)) {
            Problem::new(716, format!("an access of {len} bytes must be aligned to {len}"))
        } else if address + u64::from(len) > size.into() {
            Problem::new(700, format!("byte {address} of {size} bytes of local memory"))
        } else {
            let first = lane * size as usize + address as usize;
            return Ok(first..first + len as usize);
        };
        Err(Stop { lane: Some(lane), address: Some(LOCAL_WINDOW + address), problem })
    }

    fn copy_frames(&mut self, copies: &[(u32, u32, u32)], mask: u32, local: u32) {
        for lane in lanes(mask) {
            let base = lane * local as usize;
            for &(from, to, len) in copies {
                let from = base + from as usize..base + (from + len) as usize;
                self.local.copy_within(from.clone(), base + to as usize);
                self.local_init.copy_within(from, base + to as usize);
            }
        }
    }
}

fn shuffle(regs: &mut Regs, inst: &Inst, mode: Shuffle, mask: u32) {
    let (a, b, c) = (regs.w[inst.a as usize], &regs.w[inst.b as usize], &regs.w[inst.c as usize]);
    let mut out = [0; 32];
    let mut valid = 0;
    for lane in 0..32_u32 {
        let (b, c) = (b[lane as usize] & 31, c[lane as usize]);
        let (clamp, segment) = (c & 31, c >> 8 & 31);
        let max = lane & segment | clamp & !segment;
        let min = lane & segment;
        let (source, inside) = match mode {
            Shuffle::Up => (lane.wrapping_sub(b), lane as i32 - b as i32 >= max as i32),
            Shuffle::Down => (lane + b, lane + b <= max),
            Shuffle::Bfly => (lane ^ b, lane ^ b <= max),
            Shuffle::Idx => (min | b & !segment, min | b & !segment <= max),
        };
        let source = if inside { source & 31 } else { lane };
        valid |= u32::from(inside) << lane;
        // A source lane that does not take part has no value: poison.
        out[lane as usize] = if mask >> source & 1 == 1 { a[source as usize] } else { 0x7fff_7fff };
    }
    alu::put(&mut regs.w[inst.d as usize], &out, mask);
    alu::put_pred(&mut regs.p[inst.d2 as usize], valid, mask);
}

fn modify(op: AtomOp, ty: Ty, old: u64, b: u64, c: u64) -> u64 {
    let (old32, b32) = (old as u32, b as u32);
    match (op, ty) {
        (AtomOp::Add, Ty::F32) => {
            alu::canonical(f32::from_bits(old32) + f32::from_bits(b32)).into()
        }
        (AtomOp::Add, Ty::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (AtomOp::Add, Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2) => {
            let imm = alu::pack_half(alu::HalfOp::Add, ty, alu::Flags::PLAIN);
            alu::half(old32, b32, 0, imm).into()
        }
        (AtomOp::Add, _) => old.wrapping_add(b),
        (AtomOp::Min, Ty::S(32)) => (old32 as i32).min(b32 as i32) as u32 as u64,
        (AtomOp::Max, Ty::S(32)) => (old32 as i32).max(b32 as i32) as u32 as u64,
        (AtomOp::Min, Ty::S(_)) => (old as i64).min(b as i64) as u64,
        (AtomOp::Max, Ty::S(_)) => (old as i64).max(b as i64) as u64,
        (AtomOp::Min, _) => old.min(b),
        (AtomOp::Max, _) => old.max(b),
        (AtomOp::And, _) => old & b,
        (AtomOp::Or, _) => old | b,
        (AtomOp::Xor, _) => old ^ b,
        (AtomOp::Exch, _) => b,
        (AtomOp::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (AtomOp::Inc, _) => {
            if old32 >= b32 {
                0
            } else {
                (old32 + 1).into()
            }
        }
        (AtomOp::Dec, _) => {
            if old32 == 0 || old32 > b32 {
                b
            } else {
                (old32 - 1).into()
            }
        }
    }
}
