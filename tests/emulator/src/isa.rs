//! What an instruction is once it is decoded, and what a kernel is made of.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crate::alu::{Alu, Ty};
use crate::liveness;
use crate::mma::Mma;
use crate::parse::{Loc, Span};

/// Where a memory instruction looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Device memory.
    Global,
    /// Memory of the block.
    Shared,
    /// Memory of the thread.
    Local,
    /// Kernel parameters.
    Param,
    /// Decided by each address.
    Generic,
}

/// The register part of an address.
#[derive(Clone, Copy, Debug)]
pub enum Base {
    /// A constant address.
    None,
    /// A 32-bit register.
    Word(u32),
    /// A 64-bit register.
    Long(u32),
}

/// An address operand.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    /// The register.
    pub base: Base,
    /// What is added to it.
    pub offset: i64,
}

/// A load or a store.
#[derive(Clone, Debug)]
pub struct Access {
    /// State space.
    pub target: Target,
    /// Address.
    pub address: Address,
    /// Bytes per element.
    pub size: u32,
    /// Sign-extends.
    pub signed: bool,
    /// Data registers; `None` is the sink.
    pub regs: Vec<Option<u32>>,
    /// The registers are 64 bits wide.
    pub long: bool,
    /// Bits that a loaded value may occupy in its 32-bit row.
    pub reg_bits: u32,
    /// Volatile, relaxed, acquire or release: takes part in synchronisation.
    pub strong: bool,
    /// `.nc`: through a cache that sees no store of the same launch.
    pub nc: bool,
}

/// Read-modify-write operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomOp {
    /// Sum.
    Add,
    /// Smaller.
    Min,
    /// Larger.
    Max,
    /// Bitwise and.
    And,
    /// Bitwise or.
    Or,
    /// Bitwise exclusive or.
    Xor,
    /// Replacement.
    Exch,
    /// Replacement if equal.
    Cas,
    /// Increment with wrap.
    Inc,
    /// Decrement with wrap.
    Dec,
}

/// `atom` and `red`.
#[derive(Clone, Debug)]
pub struct Atomic {
    /// State space.
    pub target: Target,
    /// Address.
    pub address: Address,
    /// What is done.
    pub op: AtomOp,
    /// On what.
    pub ty: Ty,
    /// Row of the old value.
    pub dst: Option<u32>,
    /// Operand rows.
    pub b: u32,
    /// Second operand of `cas`.
    pub c: u32,
    /// Carries release and acquire semantics of its own.
    pub fenced: bool,
}

/// Modes of `shfl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    /// From a lower lane.
    Up,
    /// From a higher lane.
    Down,
    /// From the lane whose number differs in some bits.
    Bfly,
    /// From a given lane.
    Idx,
}

/// Modes of `vote`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    /// True in all lanes.
    All,
    /// True in one.
    Any,
    /// The same in all.
    Uni,
    /// As a mask.
    Ballot,
}

/// Warp reductions of `redux`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redux {
    /// Sum.
    Add,
    /// Smallest.
    Min(bool),
    /// Largest.
    Max(bool),
    /// Bitwise.
    And,
    /// Bitwise.
    Or,
    /// Bitwise.
    Xor,
}

/// What `bar` does beside waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Waits.
    Sync,
    /// Only arrives.
    Arrive,
    /// Waits and counts true predicates.
    Popc,
    /// Waits and ands predicates.
    And,
    /// Waits and ors predicates.
    Or,
}

/// `bar` and `barrier`.
#[derive(Clone, Copy, Debug)]
pub struct Barrier {
    /// What it does.
    pub kind: BarKind,
    /// Row of the barrier's number.
    pub id: u32,
    /// Row of the thread count.
    pub count: Option<u32>,
    /// Result row (predicate or word) of a reduction.
    pub dst: u32,
    /// Predicate that is reduced, and whether it is negated.
    pub pred: (u32, bool),
}

/// `cp.async`.
#[derive(Clone, Copy, Debug)]
pub struct CpAsync {
    /// Destination in shared memory.
    pub dst: Address,
    /// Source in device memory.
    pub src: Address,
    /// Bytes written.
    pub size: u32,
    /// Row of the bytes read; the rest is zero.
    pub src_size: Option<u32>,
    /// Predicate that makes the source size zero, and whether it is negated.
    pub ignore: Option<(u32, bool)>,
}

/// `ldmatrix` and `stmatrix`.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Stores instead of loading.
    pub store: bool,
    /// Transposes each 8x8 block.
    pub trans: bool,
    /// Row address of each lane.
    pub address: Address,
    /// One row of registers per block.
    pub regs: Vec<u32>,
    /// The address is generic.
    pub generic: bool,
}

/// A call: parameters are copied between frames, which are static because recursion is refused.
#[derive(Clone, Debug)]
pub struct Call {
    /// First instruction of the callee.
    pub target: u32,
    /// Row that holds the return address.
    pub link: u32,
    /// (from, to, bytes) in local memory.
    pub copies: Vec<(u32, u32, u32)>,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub enum Op {
    /// Registers only.
    Alu(Alu),
    /// Jumps.
    Bra(u32),
    /// Jumps through a table by row `a`.
    Brx(Vec<u32>),
    /// Calls a function.
    Call(Box<Call>),
    /// Copies results back after a call.
    CopyBack(Vec<(u32, u32, u32)>),
    /// Returns to the address in this row.
    Ret(u32),
    /// Ends the lanes.
    Exit,
    /// Faults.
    Trap,
    /// Waits for a barrier.
    Bar(Barrier),
    /// Waits for the lanes of the mask in row `a`.
    WarpSync,
    /// Loads.
    Load(Box<Access>),
    /// Stores.
    Store(Box<Access>),
    /// Reads, modifies and writes.
    Atomic(Box<Atomic>),
    /// Exchanges registers between lanes: d|d2 = a[b], c, imm = row of the mask.
    Shuffle(Shuffle),
    /// d = vote of predicate a; imm = row of the mask.
    Vote(Vote, bool),
    /// Lanes with equal values: `.all` or `.any`; the flag says 64-bit values.
    Match(bool, bool),
    /// d = lanes that execute together.
    ActiveMask,
    /// d = reduction of a over the mask in row b.
    Redux(Redux),
    /// Elects a leader: d = its lane, d2 = predicate.
    Elect,
    /// Copies asynchronously to shared memory.
    CpAsync(Box<CpAsync>),
    /// Closes a group of copies.
    CommitGroup,
    /// Waits until at most so many groups are in flight.
    WaitGroup(u32),
    /// Waits for all copies.
    WaitAll,
    /// Moves matrix fragments.
    Matrix(Box<Matrix>),
    /// Multiplies matrix fragments.
    Mma(Box<Mma>),
    /// Orders memory.
    Fence,
    /// Reads a counter into word (false) or long (true) d.
    Clock(bool),
    /// d (predicate) = address in row a (long) lies in a space.
    IsSpace(Target),
    /// Nothing that is modelled.
    Nop,
}

/// Classes of the instruction counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// f32 fused multiply-add, add and multiply.
    Float,
    /// Integer, logic, conversions and moves.
    Integer,
    /// Special functions.
    Special,
    /// Tensor cores.
    Mma,
    /// Device memory.
    Global,
    /// Shared memory.
    Shared,
    /// Local memory and parameters.
    Local,
    /// Branches, barriers, votes, shuffles.
    Control,
}

/// Names of [`Kind`], in order.
pub const KINDS: [&str; 8] =
    ["float", "integer", "special", "mma", "global", "shared", "local", "control"];

/// A decoded instruction.
#[derive(Clone, Debug)]
pub struct Inst {
    /// What it does.
    pub op: Op,
    /// Counter class.
    pub kind: Kind,
    /// Predicate row that guards it; row 0 is always true.
    pub guard: u32,
    /// Flips the guard.
    pub guard_flip: u32,
    /// Destination.
    pub d: u32,
    /// Second destination.
    pub d2: u32,
    /// Sources.
    pub a: u32,
    /// Second source.
    pub b: u32,
    /// Third source.
    pub c: u32,
    /// Flags.
    pub imm: u64,
}

/// Special registers that are rows of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    /// `%tid`
    Tid(u8),
    /// `%ntid`
    Ntid(u8),
    /// `%ctaid`
    Ctaid(u8),
    /// `%nctaid`
    Nctaid(u8),
    /// `%laneid`
    Lane,
    /// `%warpid`
    Warp,
    /// `%nwarpid`
    Warps,
    /// `%smid`
    Sm,
    /// `%nsmid`
    Sms,
    /// `%lanemask_eq`, `le`, `lt`, `ge`, `gt`
    LaneMask(u8),
    /// `%dynamic_smem_size`
    DynamicShared,
    /// `%total_smem_size`
    TotalShared,
    /// Cluster registers of a cluster of one block.
    Zero,
    /// Cluster registers of a cluster of one block.
    One,
}

/// A register that an instruction reads, or writes in every lane that runs it.
#[derive(Clone, Copy, Debug)]
pub struct Touch {
    /// The instruction's number.
    pub inst: u32,
    /// The register's row.
    pub row: u32,
    /// A row of longs.
    pub long: bool,
    /// Writes it; its reads come before.
    pub write: bool,
}

/// A shared variable of a kernel.
#[derive(Clone, Debug)]
pub struct SharedVar {
    /// Its name.
    pub name: String,
    /// Its address in the shared window.
    pub address: u32,
    /// Its size; the launch decides for dynamic ones.
    pub size: u32,
    /// `extern`: sized by the launch.
    pub dynamic: bool,
}

/// Text and position of an instruction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Origin {
    /// PTX text.
    pub span: Span,
    /// PTX line.
    pub line: u32,
    /// CUDA source.
    pub loc: Loc,
}

/// A kernel ready to run.
#[derive(Debug)]
pub struct Kernel {
    /// Its symbol.
    pub name: String,
    /// All instructions that it can reach.
    pub insts: Vec<Inst>,
    /// Where each comes from.
    pub origins: Vec<Origin>,
    /// Rows of words, longs and predicates.
    pub rows: [u32; 3],
    /// Constant words.
    pub words: Vec<(u32, u32)>,
    /// Constant longs.
    pub longs: Vec<(u32, u64)>,
    /// Special registers.
    pub specials: Vec<(u32, Special)>,
    /// What each instruction reads and writes, in their order.
    pub touches: Vec<Touch>,
    /// See [`Kernel::unset`].
    pub unset: OnceLock<Option<[Vec<u32>; 2]>>,
    /// Shared variables.
    pub shared: Vec<SharedVar>,
    /// Bytes of static shared memory that a launch pays for.
    pub static_shared: u32,
    /// Bytes of local memory per thread.
    pub local: u32,
    /// Offset and size of each parameter.
    pub params: Vec<(u32, u32)>,
    /// Bytes of all parameters.
    pub param_bytes: u32,
    /// `.maxntid`.
    pub max_threads: Option<u32>,
    /// `.reqntid`.
    pub required_threads: Option<[u32; 3]>,
    /// The PTX that it was made of.
    pub text: Arc<str>,
    /// `.file` table.
    pub files: HashMap<u32, String>,
    /// PTX version and target.
    pub version: (u32, u32),
}

/// Shared addresses begin here, so that a null pointer is no variable.
pub const SHARED_START: u32 = 1024;
/// Generic addresses of the shared window.
pub const SHARED_WINDOW: u64 = 0x0000_9100_0000_0000;
/// Generic addresses of the local window.
pub const LOCAL_WINDOW: u64 = 0x0000_9200_0000_0000;
/// Generic addresses of kernel parameters.
pub const PARAM_WINDOW: u64 = 0x0000_9300_0000_0000;
/// Size of each window.
pub const WINDOW: u64 = 0x0000_0001_0000_0000;

impl Kernel {
    /// Instructions that have been given a number so far.
    pub(crate) fn insts_reserved(&self) -> u32 {
        self.origins.len() as u32
    }

    /// The rows of words and of longs that some path from the kernel's begin reads before it writes
    /// them, as a compiler's output hardly has any; nobody can tell what others hold at first. `None`
    /// is all of them: nobody has looked through a kernel that calls functions.
    pub fn unset(&self) -> Option<&[Vec<u32>; 2]> {
        self.unset.get_or_init(|| liveness::unset(self)).as_ref()
    }

    /// Where an instruction stands, for people.
    pub fn position(&self, pc: u32) -> String {
        let Some(origin) = self.origins.get(pc as usize) else {
            return format!("instruction {pc}");
        };
        let file = |n: u32| self.files.get(&n).map_or("?", String::as_str);
        let mut out = match origin.loc.line {
            0 => String::from("(no CUDA source line)"),
            line => format!("{}:{line}", file(origin.loc.file)),
        };
        if let Some((at, line)) = origin.loc.inlined_at {
            out += &format!(" (inlined at {}:{line})", file(at));
        }
        match origin.line {
            0 => format!("{out}, (end of function)"),
            line => format!("{out}, PTX line {line}: {}", origin.span.of(&self.text)),
        }
    }
}
