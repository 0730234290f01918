//! Arithmetic on rows of 32 lanes: everything that touches registers only.
//!
//! An operation is a plain function pointer, made from a closure on scalars by one of the `lift`
//! functions below, which contain the loop over lanes that the compiler vectorises.

use crate::float::{self, BF16, F16, F32, Format, Round, TF32};
use crate::isa::Inst;

/// One 32-bit register of a warp.
pub type Row = [u32; 32];
/// One 64-bit register of a warp.
pub type LongRow = [u64; 32];

/// The registers of a warp.
#[derive(Debug, Default)]
pub struct Regs {
    /// 8-, 16- and 32-bit registers, constants and special registers.
    pub w: Vec<Row>,
    /// 64-bit registers and constants.
    pub l: Vec<LongRow>,
    /// Predicates: one bit per lane.
    pub p: Vec<u32>,
}

/// An operation: registers, operands, and the mask of lanes that take part.
pub type Alu = fn(&mut Regs, &Inst, u32);

/// Writes the lanes in `mask` of a 32-bit row.
#[inline(always)]
pub fn put(row: &mut Row, out: &Row, mask: u32) {
    if mask == u32::MAX {
        *row = *out;
    } else {
        for lane in 0..32 {
            row[lane] = if mask >> lane & 1 == 1 { out[lane] } else { row[lane] };
        }
    }
}

/// Writes the lanes in `mask` of a 64-bit row.
#[inline(always)]
pub fn put_long(row: &mut LongRow, out: &LongRow, mask: u32) {
    if mask == u32::MAX {
        *row = *out;
    } else {
        for lane in 0..32 {
            row[lane] = if mask >> lane & 1 == 1 { out[lane] } else { row[lane] };
        }
    }
}

/// Writes the lanes in `mask` of a predicate.
#[inline(always)]
pub fn put_pred(row: &mut u32, out: u32, mask: u32) {
    *row = *row & !mask | out & mask;
}

/// A value of a closure type without captures, which is all that its function needs.
#[inline(always)]
fn instance<F: Copy>() -> F {
    const { assert!(size_of::<F>() == 0, "operations must not capture") };
    // SAFETY: F has no size, so there are no bytes to be read or invalid, and the caller proved
    // that a value exists by passing one to the lifting function.
    unsafe { std::ptr::NonNull::<F>::dangling().read() }
}

macro_rules! lift {
    ($name:ident, $doc:literal, ($($arg:ident : $ty:ty = $row:ident . $field:ident),*), $imm:ident, $out:ident -> $to:ty, $dst:ident, $put:ident) => {
        #[doc = $doc]
        pub fn $name<F>(_: F) -> Alu
        where
            F: Fn($($ty,)* u64) -> $to + Copy + 'static,
        {
            fn run<F: Fn($($ty,)* u64) -> $to + Copy>(r: &mut Regs, i: &Inst, mask: u32) {
                let f: F = instance();
                let $imm = i.imm;
                let mut $out = [0; 32];
                {
                    $(let $arg = &r.$row[i.$field as usize];)*
                    for lane in 0..32 {
                        $out[lane] = f($($arg[lane],)* $imm);
                    }
                }
                $put(&mut r.$dst[i.d as usize], &$out, mask);
            }
            run::<F>
        }
    };
}

lift!(w1, "One word to a word; the last argument of every closure is the immediate.", (a: u32 = w.a), imm, out -> u32, w, put);
lift!(w2, "Two words to a word.", (a: u32 = w.a, b: u32 = w.b), imm, out -> u32, w, put);
lift!(w3, "Three words to a word.", (a: u32 = w.a, b: u32 = w.b, c: u32 = w.c), imm, out -> u32, w, put);
lift!(l1, "One long to a long.", (a: u64 = l.a), imm, out -> u64, l, put_long);
lift!(l2, "Two longs to a long.", (a: u64 = l.a, b: u64 = l.b), imm, out -> u64, l, put_long);
lift!(l3, "Three longs to a long.", (a: u64 = l.a, b: u64 = l.b, c: u64 = l.c), imm, out -> u64, l, put_long);
lift!(w_to_l, "A word to a long.", (a: u32 = w.a), imm, out -> u64, l, put_long);
lift!(l_to_w, "A long to a word.", (a: u64 = l.a), imm, out -> u32, w, put);
lift!(ww_to_l, "Two words to a long.", (a: u32 = w.a, b: u32 = w.b), imm, out -> u64, l, put_long);
lift!(wwl_to_l, "Two words and a long to a long.", (a: u32 = w.a, b: u32 = w.b, c: u64 = l.c), imm, out -> u64, l, put_long);
lift!(lw_to_l, "A long and a word to a long.", (a: u64 = l.a, b: u32 = w.b), imm, out -> u64, l, put_long);
lift!(lww_to_l, "A long and two words to a long.", (a: u64 = l.a, b: u32 = w.b, c: u32 = w.c), imm, out -> u64, l, put_long);

/// Bits of `imm` of a comparison: how its result combines with a third predicate.
pub mod setp {
    /// `result AND c`.
    pub const AND: u64 = 1;
    /// `result OR c`.
    pub const OR: u64 = 2;
    /// `result XOR c`.
    pub const XOR: u64 = 3;
    /// The third predicate is negated.
    pub const NOT_C: u64 = 4;
}

/// Stores the result of a comparison, and its complement, combined with predicate `c`.
#[inline(always)]
fn put_compare(r: &mut Regs, i: &Inst, result: u32, mask: u32) {
    let c = r.p[i.c as usize] ^ if i.imm & setp::NOT_C != 0 { u32::MAX } else { 0 };
    let combine = |x: u32| match i.imm & 3 {
        setp::AND => x & c,
        setp::OR => x | c,
        setp::XOR => x ^ c,
        _ => x,
    };
    put_pred(&mut r.p[i.d as usize], combine(result), mask);
    put_pred(&mut r.p[i.d2 as usize], combine(!result), mask);
}

/// A comparison of two words.
pub fn compare<F: Fn(u32, u32) -> bool + Copy + 'static>(_: F) -> Alu {
    fn run<F: Fn(u32, u32) -> bool + Copy>(r: &mut Regs, i: &Inst, mask: u32) {
        let f: F = instance();
        let (a, b) = (&r.w[i.a as usize], &r.w[i.b as usize]);
        let result = (0..32).fold(0, |m, lane| m | u32::from(f(a[lane], b[lane])) << lane);
        put_compare(r, i, result, mask);
    }
    run::<F>
}

/// A comparison of two longs.
pub fn compare_long<F: Fn(u64, u64) -> bool + Copy + 'static>(_: F) -> Alu {
    fn run<F: Fn(u64, u64) -> bool + Copy>(r: &mut Regs, i: &Inst, mask: u32) {
        let f: F = instance();
        let (a, b) = (&r.l[i.a as usize], &r.l[i.b as usize]);
        let result = (0..32).fold(0, |m, lane| m | u32::from(f(a[lane], b[lane])) << lane);
        put_compare(r, i, result, mask);
    }
    run::<F>
}

/// `selp` on words: predicate `c` chooses between `a` and `b`.
pub fn select(r: &mut Regs, i: &Inst, mask: u32) {
    let (c, a, b) = (r.p[i.c as usize], &r.w[i.a as usize], &r.w[i.b as usize]);
    let out = std::array::from_fn(|lane| if c >> lane & 1 == 1 { a[lane] } else { b[lane] });
    put(&mut r.w[i.d as usize], &out, mask);
}

/// `selp` on longs.
pub fn select_long(r: &mut Regs, i: &Inst, mask: u32) {
    let (c, a, b) = (r.p[i.c as usize], &r.l[i.a as usize], &r.l[i.b as usize]);
    let out = std::array::from_fn(|lane| if c >> lane & 1 == 1 { a[lane] } else { b[lane] });
    put_long(&mut r.l[i.d as usize], &out, mask);
}

/// Operations on predicates; bit 0 and 1 of `imm` negate the operands.
pub fn pred2<F: Fn(u32, u32) -> u32 + Copy + 'static>(_: F) -> Alu {
    fn run<F: Fn(u32, u32) -> u32 + Copy>(r: &mut Regs, i: &Inst, mask: u32) {
        let f: F = instance();
        let flip = |bit: u64| if i.imm & bit != 0 { u32::MAX } else { 0 };
        let out = f(r.p[i.a as usize] ^ flip(1), r.p[i.b as usize] ^ flip(2));
        put_pred(&mut r.p[i.d as usize], out, mask);
    }
    run::<F>
}

/// Additions with the carry flag, which is predicate `c`; `imm` says what takes part.
pub mod carry {
    /// Adds the carry (or subtracts the borrow) flag.
    pub const IN: u64 = 1;
    /// Sets the flag.
    pub const OUT: u64 = 2;
    /// Subtracts.
    pub const SUB: u64 = 4;
}

/// `add.cc`, `addc`, `sub.cc`, `subc` on words.
pub fn add_carry(r: &mut Regs, i: &Inst, mask: u32) {
    let flag = r.p[i.c as usize];
    let mut out = [0; 32];
    let mut carry = 0;
    for (lane, out) in out.iter_mut().enumerate() {
        let (a, b) = (u64::from(r.w[i.a as usize][lane]), u64::from(r.w[i.b as usize][lane]));
        let c = if i.imm & carry::IN != 0 { u64::from(flag >> lane & 1) } else { 0 };
        let wide =
            if i.imm & carry::SUB != 0 { a.wrapping_sub(b).wrapping_sub(c) } else { a + b + c };
        *out = wide as u32;
        carry |= u32::from(wide >> 32 != 0) << lane;
    }
    put(&mut r.w[i.d as usize], &out, mask);
    if i.imm & carry::OUT != 0 {
        put_pred(&mut r.p[i.c as usize], carry, mask);
    }
}

/// `add.cc`, `addc`, `sub.cc`, `subc` on longs.
pub fn add_carry_long(r: &mut Regs, i: &Inst, mask: u32) {
    let flag = r.p[i.c as usize];
    let mut out = [0; 32];
    let mut carry = 0;
    for (lane, out) in out.iter_mut().enumerate() {
        let (a, b) = (u128::from(r.l[i.a as usize][lane]), u128::from(r.l[i.b as usize][lane]));
        let c = if i.imm & carry::IN != 0 { u128::from(flag >> lane & 1) } else { 0 };
        let wide =
            if i.imm & carry::SUB != 0 { a.wrapping_sub(b).wrapping_sub(c) } else { a + b + c };
        *out = wide as u64;
        carry |= u32::from(wide >> 64 != 0) << lane;
    }
    put_long(&mut r.l[i.d as usize], &out, mask);
    if i.imm & carry::OUT != 0 {
        put_pred(&mut r.p[i.c as usize], carry, mask);
    }
}

/// Value types of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ty {
    /// Unsigned or untyped integer of so many bits.
    U(u8),
    /// Signed integer of so many bits.
    S(u8),
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// TensorFloat-32, kept in the upper 19 bits of a word.
    TF32,
    /// IEEE single.
    F32,
    /// IEEE double.
    F64,
    /// Two halves.
    F16x2,
    /// Two bfloat16.
    BF16x2,
    /// A predicate.
    Pred,
}

impl Ty {
    /// The type that a PTX suffix names.
    pub fn parse(name: &str) -> Option<Ty> {
        Some(match name {
            "b8" | "u8" => Ty::U(8),
            "b16" | "u16" => Ty::U(16),
            "b32" | "u32" => Ty::U(32),
            "b64" | "u64" => Ty::U(64),
            "s8" => Ty::S(8),
            "s16" => Ty::S(16),
            "s32" => Ty::S(32),
            "s64" => Ty::S(64),
            "f16" => Ty::F16,
            "bf16" => Ty::BF16,
            "tf32" => Ty::TF32,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            "f16x2" => Ty::F16x2,
            "bf16x2" => Ty::BF16x2,
            "pred" => Ty::Pred,
            _ => return None,
        })
    }

    /// Width in bits.
    pub fn bits(self) -> u32 {
        match self {
            Ty::U(n) | Ty::S(n) => u32::from(n),
            Ty::F16 | Ty::BF16 => 16,
            Ty::TF32 | Ty::F32 | Ty::F16x2 | Ty::BF16x2 => 32,
            Ty::F64 => 64,
            Ty::Pred => 1,
        }
    }

    /// Lives in a 64-bit register.
    pub fn long(self) -> bool {
        self.bits() == 64
    }

    /// A scalar floating-point type.
    pub fn float(self) -> bool {
        matches!(self, Ty::F16 | Ty::BF16 | Ty::TF32 | Ty::F32 | Ty::F64)
    }

    fn format(self) -> Format {
        match self {
            Ty::F16 | Ty::F16x2 => F16,
            Ty::BF16 | Ty::BF16x2 => BF16,
            Ty::TF32 => TF32,
            _ => F32,
        }
    }

    /// The value of floating-point bits.
    fn value(self, bits: u64) -> f64 {
        match self {
            Ty::F64 => f64::from_bits(bits),
            Ty::F32 | Ty::TF32 => f64::from(f32::from_bits(bits as u32)),
            _ => float::widen(bits as u32 & 0xffff, self.format()),
        }
    }

    /// Rounds to the bits of this floating-point type.
    fn bits_of(self, x: f64, mode: Round) -> u64 {
        match self {
            Ty::F64 => x.to_bits(),
            Ty::TF32 => u64::from(float::round_to(x, TF32, mode)) << 13,
            _ => u64::from(float::round_to(x, self.format(), mode)),
        }
    }
}

/// How an operation on floats rounds and clamps; packed into `imm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags {
    /// Rounding mode.
    pub round: Round,
    /// Subnormal inputs and results become zero.
    pub ftz: bool,
    /// Clamps to [0, 1] (floats) or to the target's range (integers).
    pub sat: bool,
    /// Clamps negative results to zero.
    pub relu: bool,
    /// Rounds to an integral value (`.rni` and its like).
    pub integral: bool,
}

impl Flags {
    /// To nearest, nothing else.
    pub const PLAIN: Flags =
        Flags { round: Round::Nearest, ftz: false, sat: false, relu: false, integral: false };

    /// As an immediate.
    pub fn pack(self) -> u64 {
        self.round as u64
            | u64::from(self.ftz) << 3
            | u64::from(self.sat) << 4
            | u64::from(self.relu) << 5
            | u64::from(self.integral) << 6
    }

    /// From an immediate.
    #[inline]
    pub fn unpack(imm: u64) -> Flags {
        let round = match imm & 7 {
            0 => Round::Nearest,
            1 => Round::Away,
            2 => Round::Zero,
            3 => Round::Down,
            _ => Round::Up,
        };
        let bit = |n: u32| imm >> n & 1 == 1;
        Flags { round, ftz: bit(3), sat: bit(4), relu: bit(5), integral: bit(6) }
    }
}

/// Applies `f` to f32 operands under `imm`'s flags.
#[inline(always)]
pub fn with_flags<const N: usize>(
    bits: [u32; N],
    imm: u64,
    f: impl Fn([f32; N], Round) -> f32,
) -> u32 {
    let flags = Flags::unpack(imm);
    let fl = |x: f32| if flags.ftz { float::flush(x) } else { x };
    let mut out = fl(f(bits.map(|b| fl(f32::from_bits(b))), flags.round));
    if flags.sat {
        // NaN becomes zero, and so does -0.
        out = if out > 0.0 { out.min(1.0) } else { 0.0 };
    }
    canonical(out)
}

/// The bits of `x`, with every NaN as PTX's canonical one.
#[inline(always)]
pub fn canonical(x: f32) -> u32 {
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits() }
}

/// `min` (or `max`) of PTX: a NaN loses unless `nan` asks for it, and -0 is below +0.
#[inline(always)]
pub fn min_max(a: f32, b: f32, max: bool, nan: bool) -> u32 {
    if a.is_nan() || b.is_nan() {
        if nan || a.is_nan() && b.is_nan() {
            return 0x7fff_ffff;
        }
        return if a.is_nan() { b.to_bits() } else { a.to_bits() };
    }
    let (ka, kb) = (total_order(a), total_order(b));
    if (ka < kb) != max { a.to_bits() } else { b.to_bits() }
}

fn total_order(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// `min` or `max` on f64.
pub fn min_max_f64(a: f64, b: f64, max: bool) -> u64 {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => return 0x7fff_ffff_ffff_ffff,
        (true, false) => return b.to_bits(),
        (false, true) => return a.to_bits(),
        _ => {}
    }
    let less = a.total_cmp(&b).is_lt();
    if less != max { a.to_bits() } else { b.to_bits() }
}

/// Operations on 16-bit floats, alone or in pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HalfOp {
    /// a + b
    Add,
    /// a - b
    Sub,
    /// a * b
    Mul,
    /// a * b + c
    Fma,
    /// smaller
    Min,
    /// larger
    Max,
    /// smaller, NaN wins
    MinNan,
    /// larger, NaN wins
    MaxNan,
    /// -a
    Neg,
    /// |a|
    Abs,
    /// hyperbolic tangent
    Tanh,
    /// power of two
    Ex2,
}

/// Packs a 16-bit operation into an immediate.
pub fn pack_half(op: HalfOp, ty: Ty, flags: Flags) -> u64 {
    let bf16 = matches!(ty, Ty::BF16 | Ty::BF16x2);
    let pair = matches!(ty, Ty::F16x2 | Ty::BF16x2);
    flags.pack() | (op as u64) << 8 | u64::from(bf16) << 16 | u64::from(pair) << 17
}

/// Runs a packed 16-bit operation on one lane.
pub fn half(a: u32, b: u32, c: u32, imm: u64) -> u32 {
    let ty = if imm >> 16 & 1 == 1 { Ty::BF16 } else { Ty::F16 };
    let one = |shift: u32| {
        let [a, b, c] = [a, b, c].map(|x| x >> shift & 0xffff);
        half_scalar(ty, (imm >> 8 & 0xff) as u8, [a, b, c], Flags::unpack(imm)) << shift
    };
    if imm >> 17 & 1 == 1 { one(0) | one(16) } else { one(0) }
}

fn half_scalar(ty: Ty, op: u8, bits: [u32; 3], flags: Flags) -> u32 {
    const OPS: [HalfOp; 12] = [
        HalfOp::Add,
        HalfOp::Sub,
        HalfOp::Mul,
        HalfOp::Fma,
        HalfOp::Min,
        HalfOp::Max,
        HalfOp::MinNan,
        HalfOp::MaxNan,
        HalfOp::Neg,
        HalfOp::Abs,
        HalfOp::Tanh,
        HalfOp::Ex2,
    ];
    let op = OPS[op as usize];
    // Sign operations keep NaN payloads.
    match op {
        HalfOp::Neg => return bits[0] ^ 0x8000,
        HalfOp::Abs => return bits[0] & 0x7fff,
        _ => {}
    }
    let smallest = if ty == Ty::F16 { 2_f64.powi(-14) } else { 2_f64.powi(-126) };
    let fl = |x: f64| if flags.ftz && x.abs() < smallest { 0.0_f64.copysign(x) } else { x };
    let [a, b, c] = bits.map(|x| fl(ty.value(u64::from(x))));
    // Sums of two 16-bit floats may need more than 53 bits (bf16), so they are rounded to odd.
    let x = match op {
        HalfOp::Add => float::fma_odd(1.0, a, b),
        HalfOp::Sub => float::fma_odd(1.0, a, -b),
        HalfOp::Mul => a * b,
        HalfOp::Fma => float::fma_odd(a, b, c),
        HalfOp::Tanh => a.tanh(),
        HalfOp::Ex2 => a.exp2(),
        HalfOp::Min | HalfOp::Max | HalfOp::MinNan | HalfOp::MaxNan => {
            let nan = matches!(op, HalfOp::MinNan | HalfOp::MaxNan);
            let max = matches!(op, HalfOp::Max | HalfOp::MaxNan);
            f64::from(f32::from_bits(min_max(a as f32, b as f32, max, nan)))
        }
        HalfOp::Neg | HalfOp::Abs => a,
    };
    let x = if flags.sat { if x > 0.0 { x.min(1.0) } else { 0.0 } } else { x };
    let x = if flags.relu && x < 0.0 { 0.0 } else { x };
    ty.bits_of(fl(x), Round::Nearest) as u32
}

/// The approximate functions: computed in f64 and rounded once, which is closer to the truth
/// than hardware is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Approx {
    /// 2^x
    Ex2,
    /// log2
    Lg2,
    /// sine
    Sin,
    /// cosine
    Cos,
    /// hyperbolic tangent
    Tanh,
    /// 1 / x
    Rcp,
    /// 1 / sqrt(x)
    Rsqrt,
    /// square root
    Sqrt,
}

/// Runs an approximate function on one lane; the operation is in bits 8 and up of `imm`.
pub fn approx(a: u32, imm: u64) -> u32 {
    with_flags([a], imm, |[x], mode| {
        let x = f64::from(x);
        let y = match imm >> 8 {
            0 => x.exp2(),
            1 => x.log2(),
            2 => x.sin(),
            3 => x.cos(),
            4 => x.tanh(),
            5 => 1.0 / x,
            6 => 1.0 / x.sqrt(),
            _ => x.sqrt(),
        };
        f32::from_bits(float::round_to(y, F32, mode))
    })
}

/// A division of f32 rounded in any direction: the f64 quotient of two f32 is never close
/// enough to a rounding boundary to land on it unless it is exact.
pub fn div_f32(a: f32, b: f32, mode: Round) -> f32 {
    if mode == Round::Nearest {
        return a / b;
    }
    f32::from_bits(float::round_to(f64::from(a) / f64::from(b), F32, mode))
}

/// `div.approx`: as the ISA says, a divisor above 2^126 gives zero, or NaN for an infinity.
pub fn div_approx(a: f32, b: f32) -> f32 {
    if b.is_finite() && b.abs() > 2_f32.powi(126) {
        return if a.is_infinite() || a.is_nan() {
            f32::NAN
        } else {
            0.0_f32.copysign(a * b.signum())
        };
    }
    a / b
}

/// Comparison operators in the order in which immediates number them.
pub const COMPARISONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu",
    "geu", "num", "nan",
];

/// `set` on one lane: types as for a conversion, the comparison in bits 24 and up of `imm`.
pub fn set(a: u32, b: u32, imm: u64) -> u32 {
    let (from, to) = (unpack_ty(imm >> 8), unpack_ty(imm >> 16));
    let yes = |a: u32, b: u32| {
        let value = |x: u32| match from {
            Ty::S(bits) => extend(x.into(), bits.into(), true) as i64 as f64,
            Ty::U(bits) => extend(x.into(), bits.into(), false) as f64,
            Ty::F16x2 => Ty::F16.value(x.into()),
            Ty::BF16x2 => Ty::BF16.value(x.into()),
            _ => from.value(x.into()),
        };
        let fl = |x: f64| {
            let tiny = Flags::unpack(imm).ftz && x.abs() < 2_f64.powi(-126);
            if tiny { 0.0 } else { x }
        };
        let (a, b) = (fl(value(a)), fl(value(b)));
        let unordered = a.is_nan() || b.is_nan();
        match COMPARISONS[(imm >> 24 & 0x1f) as usize % COMPARISONS.len()] {
            "eq" => a == b,
            "ne" => !unordered && a != b,
            "lt" | "lo" => a < b,
            "le" | "ls" => a <= b,
            "gt" | "hi" => a > b,
            "ge" | "hs" => a >= b,
            "equ" => unordered || a == b,
            "neu" => a != b,
            "ltu" => unordered || a < b,
            "leu" => unordered || a <= b,
            "gtu" => unordered || a > b,
            "geu" => unordered || a >= b,
            "num" => !unordered,
            _ => unordered,
        }
    };
    let pair = matches!(from, Ty::F16x2 | Ty::BF16x2);
    let low = yes(a, b);
    let high = pair && yes(a >> 16, b >> 16);
    match to {
        Ty::F32 => {
            if low {
                1.0_f32.to_bits()
            } else {
                0
            }
        }
        Ty::F16 => u32::from(low) * 0x3c00,
        Ty::BF16 => u32::from(low) * 0x3f80,
        Ty::F16x2 => (u32::from(low) * 0x3c00) | (u32::from(high) * 0x3c00_0000),
        Ty::BF16x2 => (u32::from(low) * 0x3f80) | (u32::from(high) * 0x3f80_0000),
        // Integer results of pairs have a mask per half.
        _ if pair => (u32::from(low) * 0xffff) | (u32::from(high) * 0xffff_0000),
        _ => extend(u64::from(low) * u64::MAX, to.bits(), false) as u32,
    }
}

/// A gross approximation on f64, of which only the upper 32 bits count.
pub fn approx_f64(a: u64, f: impl Fn(f64) -> f64) -> u64 {
    let flush = |x: f64| if x.is_subnormal() { 0.0_f64.copysign(x) } else { x };
    let y = flush(f(flush(f64::from_bits(a & !0xffff_ffff))));
    y.to_bits() & !0xffff_ffff
}

/// Packs a conversion into an immediate.
pub fn pack_cvt(from: Ty, to: Ty, flags: Flags) -> u64 {
    let code = |ty: Ty| -> u64 {
        match ty {
            Ty::U(n) => u64::from(n),
            Ty::S(n) => u64::from(n) | 1,
            Ty::F16 => 2,
            Ty::BF16 => 3,
            Ty::TF32 => 4,
            Ty::F32 => 5,
            Ty::F64 => 6,
            Ty::F16x2 => 10,
            Ty::BF16x2 => 11,
            Ty::Pred => 12,
        }
    };
    flags.pack() | code(from) << 8 | code(to) << 16
}

fn unpack_ty(code: u64) -> Ty {
    match code & 0xff {
        2 => Ty::F16,
        3 => Ty::BF16,
        4 => Ty::TF32,
        5 => Ty::F32,
        6 => Ty::F64,
        10 => Ty::F16x2,
        11 => Ty::BF16x2,
        12 => Ty::Pred,
        n if n & 1 == 1 => Ty::S((n - 1) as u8),
        n => Ty::U(n as u8),
    }
}

/// Sign- or zero-extends the low `bits` of `x`.
pub fn extend(x: u64, bits: u32, signed: bool) -> u64 {
    if bits == 64 {
        return x;
    }
    let x = x & ((1 << bits) - 1);
    if signed && x >> (bits - 1) & 1 == 1 { x | u64::MAX << bits } else { x }
}

/// `cvt` on one lane. The result is extended to 64 bits as its type says.
pub fn convert(x: u64, imm: u64) -> u64 {
    let (from, to, flags) = (unpack_ty(imm >> 8), unpack_ty(imm >> 16), Flags::unpack(imm));
    let signed = matches!(to, Ty::S(_));
    match (from.float(), to.float()) {
        (false, false) => {
            let x = extend(x, from.bits(), matches!(from, Ty::S(_)));
            let value = if matches!(from, Ty::S(_)) { i128::from(x as i64) } else { i128::from(x) };
            let value = if flags.sat {
                let (low, high) = range(to);
                value.clamp(low, high)
            } else {
                value
            };
            extend(value as u64, to.bits(), signed)
        }
        (true, false) => {
            let mut v = from.value(x);
            if v.is_nan() {
                // Zero, unless one of the two types has 64 bits: then the highest bit alone.
                let zero = from != Ty::F64 && to.bits() != 64;
                let bits = if zero { 0 } else { 1 << (to.bits() - 1) };
                return extend(bits, to.bits(), signed);
            }
            if flags.ftz && from == Ty::F32 && (v as f32).is_subnormal() {
                v = 0.0;
            }
            let v = float::integral(v, flags.round);
            let (low, high) = range(to);
            // Casts saturate, as PTX asks.
            let v = (v as i128).clamp(low, high);
            extend(v as u64, to.bits(), signed)
        }
        (false, true) => {
            let x = extend(x, from.bits(), matches!(from, Ty::S(_)));
            let (high, low) = if matches!(from, Ty::S(_)) {
                ((x as i64 >> 32) as f64, (x & 0xffff_ffff) as f64)
            } else {
                ((x >> 32) as f64, (x & 0xffff_ffff) as f64)
            };
            if to == Ty::F64 {
                return (high * 4_294_967_296.0 + low).to_bits();
            }
            to.bits_of(float::fma_odd(high, 4_294_967_296.0, low), flags.round)
        }
        // As an H100 does, which leaves an infinity of a NaN with no other bits.
        (true, true) if to == Ty::TF32 && from.value(x).is_nan() => x & 0xffff_e000,
        (true, true) => {
            let mut v = from.value(x);
            if flags.ftz && v.abs() < 2_f64.powi(-126) {
                v = 0.0_f64.copysign(v);
            }
            if flags.integral {
                v = float::integral(v, flags.round);
            }
            if flags.sat {
                v = if v > 0.0 { v.min(1.0) } else { 0.0 };
            }
            if flags.relu && v < 0.0 {
                v = 0.0;
            }
            let bits = to.bits_of(v, flags.round);
            if flags.ftz && to == Ty::F32 {
                return u64::from(float::flush(f32::from_bits(bits as u32)).to_bits());
            }
            bits
        }
    }
}

fn range(ty: Ty) -> (i128, i128) {
    match ty {
        Ty::S(n) => (-(1 << (n - 1)), (1 << (n - 1)) - 1),
        other => (0, (1 << other.bits()) - 1),
    }
}

/// `bfe` on up to 64 bits.
pub fn bit_field_extract(a: u64, pos: u32, len: u32, bits: u32, signed: bool) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let msb = bits - 1;
    let sign = if !signed || len == 0 { 0 } else { a >> (pos + len - 1).min(msb) & 1 };
    let fill = if sign == 1 { u64::MAX } else { 0 };
    let mut out = fill;
    for i in 0..=msb {
        let bit = if i < len && pos + i <= msb { a >> (pos + i) & 1 } else { fill & 1 };
        out = out & !(1 << i) | bit << i;
    }
    extend(out, bits, false)
}

/// `bfi` on up to 64 bits: puts the low `len` bits of `a` into `b` at `pos`.
pub fn bit_field_insert(a: u64, b: u64, pos: u32, len: u32, bits: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let mut out = b;
    for i in 0..len {
        if pos + i < bits {
            out = out & !(1 << (pos + i)) | (a >> i & 1) << (pos + i);
        }
    }
    out
}

/// Selector modes of `prmt`.
pub fn permute(a: u32, b: u32, selector: u32, mode: u64) -> u32 {
    let bytes = u64::from(a) | u64::from(b) << 32;
    let n = selector & 3;
    let pick: [u32; 4] = match mode {
        1 => [0, 1, 2, 3].map(|i| n + i),
        2 => [0, 1, 2, 3].map(|i| n.wrapping_sub(i) & 7),
        3 => [n; 4],
        4 => [0, 1, 2, 3].map(|i| i.max(n)),
        5 => [0, 1, 2, 3].map(|i: u32| i.min(n)),
        6 => [0, 1, 0, 1].map(|i| (n & 1) * 2 + i),
        _ => [0, 1, 2, 3].map(|i| selector >> (4 * i) & 0xf),
    };
    pick.iter().enumerate().fold(0, |out, (i, &p)| {
        let byte = (bytes >> (8 * (p & 7)) & 0xff) as u32;
        // Bit 3 of a nibble replicates the byte's sign.
        let byte = if mode == 0 && p & 8 != 0 { (byte >> 7) * 0xff } else { byte };
        out | byte << (8 * i)
    })
}

/// `lop3`: a function of three bits given by its truth table.
pub fn lop3(a: u32, b: u32, c: u32, table: u64) -> u32 {
    (0..8).filter(|i| table >> i & 1 == 1).fold(0, |out, i| {
        let term = |x: u32, bit: u32| if i >> bit & 1 == 1 { x } else { !x };
        out | term(a, 2) & term(b, 1) & term(c, 0)
    })
}
