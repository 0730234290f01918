//! `mma.sync`: fragment layouts and products.
//!
//! Products of 8- to 19-bit inputs are exact in f64. How tensor cores add them is documented nowhere;
//! on sm_90 this is what an H100 was seen to do (`tests/cuda/golden.rs` compares with it bit by bit):
//! the products of one instruction and the accumulator are aligned to the largest exponent among
//! them, cut two bits below an f32's last one there, added exactly, and cut to an f32. For other
//! devices, and for fp8, they are summed in f64 and rounded once.

use crate::alu::{Regs, Row, Ty};
use crate::decode::Decoder;
use crate::float::{self, F16, F32, Fp8, Round};
use crate::parse::Operand;

/// What A or B holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Factor {
    Plain(Ty),
    Fp8(Fp8),
}

impl Factor {
    fn parse(name: &str) -> Option<Factor> {
        Fp8::parse(name).map(Factor::Fp8).or_else(|| Ty::parse(name).map(Factor::Plain))
    }

    /// Elements of a 32-bit fragment register.
    fn per_register(self) -> usize {
        match self {
            Factor::Plain(ty) => per_register(ty),
            Factor::Fp8(_) => 4,
        }
    }

    fn is(self, types: &[Ty]) -> bool {
        matches!(self, Factor::Plain(ty) if types.contains(&ty))
    }
}

/// A decoded `mma.sync`.
#[derive(Clone, Debug)]
pub struct Mma {
    rows: usize,
    depth: usize,
    a_ty: Factor,
    b_ty: Factor,
    c_ty: Ty,
    d_ty: Ty,
    saturate: bool,
    /// Whether terms are cut as sm_90 does.
    cuts: bool,
    d: Vec<u32>,
    a: Vec<u32>,
    b: Vec<u32>,
    c: Vec<u32>,
}

/// Elements of a 32-bit fragment register.
fn per_register(ty: Ty) -> usize {
    32 / ty.bits() as usize
}

impl Mma {
    /// Decodes the modifiers and operands.
    pub fn decode(decoder: &mut Decoder, operands: &[Operand]) -> Result<Mma, String> {
        let mods = &mut decoder.mods;
        if !mods.take("sync") || !mods.take("aligned") {
            return Err(String::from("only .sync.aligned exists"));
        }
        const SHAPES: [&str; 6] =
            ["m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m8n8k16", "m8n8k32"];
        let shape = mods.one_of(&SHAPES).ok_or("unknown shape")?;
        if !mods.take("row") || !mods.take("col") {
            return Err(String::from("only .row.col is modelled"));
        }
        let saturate = mods.take("satfinite");
        let d_ty = mods.ty()?;
        let mut factor = || mods.take_as(Factor::parse).ok_or("a type is missing");
        let (a_ty, b_ty) = (factor()?, factor()?);
        let c_ty = mods.ty()?;
        let (rows, depth) = match shape {
            "m16n8k4" => (16, 4),
            "m16n8k8" => (16, 8),
            "m16n8k16" => (16, 16),
            "m16n8k32" => (16, 32),
            "m8n8k16" => (8, 16),
            _ => (8, 32),
        };
        let byte = |ty: Factor| ty.is(&[Ty::U(8), Ty::S(8)]);
        let both = |ty: Ty| a_ty.is(&[ty]) && b_ty.is(&[ty]);
        let arch = match shape {
            "m16n8k8" if both(Ty::F16) => 75,
            "m16n8k16" if both(Ty::F16) => 80,
            "m16n8k8" | "m16n8k16" if both(Ty::BF16) => 80,
            "m16n8k4" | "m16n8k8" if both(Ty::TF32) => 80,
            "m8n8k16" if byte(a_ty) && byte(b_ty) => 75,
            "m16n8k16" | "m16n8k32" if byte(a_ty) && byte(b_ty) => 80,
            "m16n8k32" if matches!((a_ty, b_ty), (Factor::Fp8(_), Factor::Fp8(_))) => 89,
            _ => return Err(format!("{shape} on {a_ty:?} and {b_ty:?} is not modelled")),
        };
        decoder.need(arch)?;
        let integer = byte(a_ty);
        let accumulators = if integer {
            c_ty == Ty::S(32) && d_ty == Ty::S(32)
        } else if a_ty.is(&[Ty::F16]) {
            matches!(c_ty, Ty::F16 | Ty::F32) && matches!(d_ty, Ty::F16 | Ty::F32)
        } else {
            c_ty == Ty::F32 && d_ty == Ty::F32
        };
        if !accumulators || saturate && !integer {
            return Err(format!("accumulators {d_ty:?} and {c_ty:?} are not modelled"));
        }
        let [d, a, b, c] = operands else {
            return Err(String::from("4 operands expected"));
        };
        let fp8 = matches!(a_ty, Factor::Fp8(_));
        let cuts = decoder.device() == 90 && d_ty == Ty::F32 && !fp8;
        let mut fragment = |operand: &Operand, count: usize, dst: bool| {
            let items = match operand {
                Operand::Vector(items) => items.clone(),
                other => vec![other.clone()],
            };
            if items.len() != count {
                return Err(format!("{count} fragment registers expected, {} found", items.len()));
            }
            let one = |i: &Operand| match dst {
                true => decoder.dst(i, Ty::U(32)),
                false => decoder.src(i, Ty::U(32)),
            };
            items.iter().map(one).collect::<Result<Vec<u32>, String>>()
        };
        let chunks = depth / (4 * a_ty.per_register());
        let halves = rows / 8;
        let results = |ty: Ty| halves * 2 / per_register(ty);
        Ok(Mma {
            cuts,
            rows,
            depth,
            a_ty,
            b_ty,
            c_ty,
            d_ty,
            saturate,
            d: fragment(d, results(d_ty), true)?,
            a: fragment(a, halves * chunks, false)?,
            b: fragment(b, chunks, false)?,
            c: fragment(c, results(c_ty), false)?,
        })
    }

    /// Runs on all 32 lanes.
    pub fn run(&self, regs: &mut Regs) {
        if self.c_ty == Ty::S(32) { self.integer(regs) } else { self.float(regs) }
    }

    /// Row and column of the element in A that a lane's register holds at `part`.
    #[inline(always)]
    fn place_a(&self, register: usize, lane: usize, part: usize, each: usize) -> (usize, usize) {
        let halves = self.rows / 8;
        let row = lane / 4 + 8 * (register % halves);
        (row, lane % 4 * each + part + 4 * each * (register / halves))
    }

    /// Row and column of the element in B that a lane's register holds at `part`.
    #[inline(always)]
    fn place_b(register: usize, lane: usize, part: usize, each: usize) -> (usize, usize) {
        (lane % 4 * each + part + 4 * each * register, lane / 4)
    }

    fn float(&self, regs: &mut Regs) {
        match (self.a_ty, self.b_ty) {
            (Factor::Fp8(a), Factor::Fp8(b)) => {
                let of = |fp8: Fp8| {
                    let values = fp8.values();
                    move |word: u32, part: usize| values[(word >> (8 * part) & 0xff) as usize]
                };
                self.product::<4, 32>(regs, of(a), of(b));
            }
            // The low 13 bits are not looked at.
            (Factor::Plain(Ty::TF32), _) => {
                let element = |word: u32, _| f32::from_bits(word & !0x1fff);
                self.product::<1, 16>(regs, element, element);
            }
            (Factor::Plain(Ty::BF16), _) => {
                let element = |word: u32, part| {
                    f32::from_bits(if part == 0 { word << 16 } else { word & 0xffff_0000 })
                };
                self.product::<2, 16>(regs, element, element);
            }
            _ => {
                let element =
                    |word: u32, part: usize| float::f16_to_f32(word >> (16 * part) & 0xffff);
                self.product::<2, 16>(regs, element, element);
            }
        }
    }

    /// The product of fragments with `EACH` elements per register, at most `DEPTH` deep.
    #[inline(always)]
    fn product<const EACH: usize, const DEPTH: usize>(
        &self,
        regs: &mut Regs,
        of_a: impl Fn(u32, usize) -> f32,
        of_b: impl Fn(u32, usize) -> f32,
    ) {
        let mut a = [[0_f64; DEPTH]; 16];
        let mut b = [[0_f64; 8]; DEPTH];
        for (register, &row) in self.a.iter().enumerate() {
            let words = &regs.w[row as usize];
            for lane in 0..32 {
                for part in 0..EACH {
                    let (row, column) = self.place_a(register, lane, part, EACH);
                    a[row % 16][column % DEPTH] = of_a(words[lane], part).into();
                }
            }
        }
        for (register, &row) in self.b.iter().enumerate() {
            let words = &regs.w[row as usize];
            for lane in 0..32 {
                for part in 0..EACH {
                    let (row, column) = Mma::place_b(register, lane, part, EACH);
                    b[row % DEPTH][column % 8] = of_b(words[lane], part).into();
                }
            }
        }
        let c: Vec<Row> = self.c.iter().map(|&r| regs.w[r as usize]).collect();
        let mut sums = [[0_f64; 8]; 16];
        for lane in 0..32 {
            for i in 0..4 {
                let (row, column) = (lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2);
                sums[row][column] = match self.c_ty {
                    Ty::F16 => float::f16_to_f32(c[i / 2][lane] >> (16 * (i % 2)) & 0xffff).into(),
                    _ => f32::from_bits(c[i][lane]).into(),
                };
            }
        }
        if self.cuts {
            self.add_and_cut(&a, &b, &mut sums);
        } else {
            for (sums, a) in sums.iter_mut().zip(&a) {
                for (&a, b) in a[..self.depth].iter().zip(&b) {
                    for (sum, &b) in sums.iter_mut().zip(b) {
                        *sum = a.mul_add(b, *sum);
                    }
                }
            }
        }
        for lane in 0..32 {
            for half in 0..2 {
                let row = lane / 4 + 8 * half;
                let pair = [sums[row][lane % 4 * 2], sums[row][lane % 4 * 2 + 1]];
                if self.d_ty == Ty::F16 {
                    let [low, high] = pair.map(|x| float::round_to(x, F16, Round::Nearest));
                    regs.w[self.d[half] as usize][lane] = low | high << 16;
                } else {
                    let mode = if self.cuts { Round::Zero } else { Round::Nearest };
                    for (i, x) in pair.into_iter().enumerate() {
                        // Cut, but not to the largest number.
                        let beyond = self.cuts && x.abs() >= 2_f64.powi(128);
                        let x = if beyond { f64::INFINITY.copysign(x) } else { x };
                        let bits = float::round_to(x, F32, mode);
                        regs.w[self.d[half * 2 + i] as usize][lane] = bits;
                    }
                }
            }
        }
    }

    /// sums += a * b as on sm_90.
    fn add_and_cut<const DEPTH: usize>(
        &self,
        a: &[[f64; DEPTH]; 16],
        b: &[[f64; 8]; DEPTH],
        sums: &mut [[f64; 8]; 16],
    ) {
        // Of operands' exponents: an f16's subnormal numbers have that of the least normal one.
        let least = if self.a_ty.is(&[Ty::F16]) { -14 } else { -126 };
        let exponent = |x: f64, least: i32| match x {
            0.0 => i32::MIN / 4,
            _ => (((x.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(least),
        };
        let of_b = b.map(|row| row.map(|x| exponent(x, least)));
        for (sums, a) in sums.iter_mut().zip(a) {
            // A column after the other, which is a lane of a vector.
            let mut largest = sums.map(|sum| exponent(sum, -126));
            let mut plain = *sums;
            for k in 0..self.depth {
                let of_a = exponent(a[k], least);
                for column in 0..8 {
                    largest[column] = largest[column].max(of_a + of_b[k][column]);
                    plain[column] += a[k] * b[k][column];
                }
            }
            // Whole numbers of what the last bit kept is worth, exact in f64.
            let scale = largest.map(|largest| float::power_of_two(25 - largest));
            let mut whole = [0_f64; 8];
            for k in 0..self.depth {
                for column in 0..8 {
                    whole[column] += (a[k] * b[k][column] * scale[column]).trunc();
                }
            }
            for column in 0..8 {
                let sum = &mut sums[column];
                *sum = if !plain[column].is_finite() || largest[column] < -2000 {
                    plain[column]
                } else {
                    let whole = whole[column] + (*sum * scale[column]).trunc();
                    whole * float::power_of_two(largest[column] - 25)
                };
            }
        }
    }

    fn integer(&self, regs: &mut Regs) {
        let element = |word: u32, part: usize, ty: Factor| {
            let byte = (word >> (8 * part)) as u8;
            if ty == Factor::Plain(Ty::S(8)) { i64::from(byte as i8) } else { i64::from(byte) }
        };
        let mut a = [[0_i64; 32]; 16];
        let mut b = [[0_i64; 8]; 32];
        for lane in 0..32 {
            for part in 0..4 {
                for (register, &word) in self.a.iter().enumerate() {
                    let (row, column) = self.place_a(register, lane, part, 4);
                    a[row][column] = element(regs.w[word as usize][lane], part, self.a_ty);
                }
                for (register, &word) in self.b.iter().enumerate() {
                    let (row, column) = Mma::place_b(register, lane, part, 4);
                    b[row][column] = element(regs.w[word as usize][lane], part, self.b_ty);
                }
            }
        }
        let c: Vec<Row> = self.c.iter().map(|&r| regs.w[r as usize]).collect();
        for lane in 0..32 {
            for i in 0..self.c.len() {
                let (row, column) = (lane / 4 + 8 * (i / 2), lane % 4 * 2 + i % 2);
                let products: i64 = (0..self.depth).map(|k| a[row][k] * b[k][column]).sum();
                let sum = products + i64::from(c[i][lane] as i32);
                let clamped = sum.clamp(i32::MIN.into(), i32::MAX.into());
                regs.w[self.d[i] as usize][lane] =
                    if self.saturate { clamped as u32 } else { sum as u32 };
            }
        }
    }
}
