//! Decoding: one PTX statement to one compact instruction with preresolved registers.
//!
//! All functions that a kernel can reach are laid out one after the other, immediates and special
//! registers become rows of the register file, and every modifier must be understood: what is not
//! known here is an error with its text and line, never a guess.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crate::alu::{self, Alu, Approx, Flags, HalfOp, Ty, carry, setp};
use crate::float::{self, F16, Fp8, Round};
use crate::isa::{
    Access, Address, AtomOp, Atomic, BarKind, Barrier, Base, Call, CpAsync, Inst, Kernel, Kind,
    LOCAL_WINDOW, Matrix, Op, Origin, PARAM_WINDOW, Redux, SHARED_START, SHARED_WINDOW, SharedVar,
    Shuffle, Special, Target, Touch, Vote,
};
use crate::mma::Mma;
use crate::parse::{Class, Function, Module, Operand, Reg, Space, Statement};

/// What `assert` calls when it fails.
const ASSERT: &str = "__assertfail";
/// Predicate row that is always true.
const ALWAYS: u32 = 0;
/// Predicate row that swallows results.
const SINK: u32 = 1;
/// The carry flag.
const CARRY: u32 = 2;

type Decode<T> = Result<T, String>;

#[derive(Clone, Copy)]
enum Place {
    Param(u32),
    Local(u32),
    Shared(u32),
}

struct Frame {
    first: u32,
    /// Instruction of each statement, and one past the last.
    at: Vec<u32>,
    base: [u32; 3],
    places: Vec<Place>,
    link: u32,
}

struct Linker<'m> {
    /// The device's architecture, as 90.
    device: u32,
    text: &'m Arc<str>,
    module: &'m Module<'m>,
    globals: &'m dyn Fn(&str) -> Option<u64>,
    kernel: Kernel,
    /// Of each function, in the order of their numbers.
    frames: Vec<(&'m str, Frame)>,
    words: HashMap<u32, u32>,
    longs: HashMap<u64, u32>,
    specials: HashMap<Special, u32>,
    next_shared: u32,
}

/// Decodes the kernel `entry` of `module`, which was parsed from `text`, for a device of architecture
/// `device` (as 90); `globals` gives the addresses of module variables.
pub fn link<'m>(
    device: u32,
    text: &'m Arc<str>,
    module: &'m Module<'m>,
    entry: &'m Function<'m>,
    globals: &'m dyn Fn(&str) -> Option<u64>,
) -> Decode<Kernel> {
    let mut linker = Linker {
        device,
        text,
        module,
        globals,
        kernel: Kernel {
            name: entry.name.to_string(),
            insts: Vec::new(),
            origins: Vec::new(),
            rows: [1, 1, 3],
            words: Vec::new(),
            longs: Vec::new(),
            specials: Vec::new(),
            touches: Vec::new(),
            unset: OnceLock::new(),
            shared: Vec::new(),
            static_shared: 0,
            local: 0,
            params: Vec::new(),
            param_bytes: 0,
            max_threads: entry.max_threads,
            required_threads: entry.required_threads,
            text: text.clone(),
            files: module.files.clone(),
            version: (module.version, module.target),
        },
        frames: Vec::new(),
        words: HashMap::new(),
        longs: HashMap::new(),
        specials: HashMap::new(),
        next_shared: SHARED_START,
    };
    let mut order = Vec::new();
    linker.collect(entry, &mut Vec::new(), &mut order)?;
    for function in &order {
        linker.place(function)?;
    }
    linker.place_shared(&order)?;
    for (number, function) in order.iter().enumerate() {
        linker.function(number, function)?;
    }
    Ok(linker.kernel)
}

fn align(x: u32, to: u32) -> u32 {
    x.div_ceil(to.max(1)) * to.max(1)
}

impl<'m> Linker<'m> {
    fn collect(
        &self,
        function: &'m Function<'m>,
        path: &mut Vec<&'m str>,
        order: &mut Vec<&'m Function<'m>>,
    ) -> Decode<()> {
        if path.contains(&function.name) {
            return Err(format!("recursion in '{}' is not supported", function.name));
        }
        if order.iter().any(|f| f.name == function.name) {
            return Ok(());
        }
        order.push(function);
        path.push(function.name);
        for statement in &function.body {
            if statement.opcode == "call" || statement.opcode.starts_with("call.") {
                let name = callee(statement).map_err(|e| self.describe(statement, &e))?;
                let Some(next) = self.module.functions.iter().find(|f| f.name == name) else {
                    return Err(self.describe(statement, &format!("no function '{name}'")));
                };
                if next.name == ASSERT {
                    continue;
                }
                if !next.defined {
                    let what = format!("'{name}' is a library function that is not modelled");
                    return Err(self.describe(statement, &what));
                }
                self.collect(next, path, order)?;
            }
        }
        path.pop();
        Ok(())
    }

    /// Gives a function its registers, its frame and the numbers of its instructions.
    fn place(&mut self, function: &'m Function<'m>) -> Decode<()> {
        let first = self.kernel.insts_reserved();
        let mut at = Vec::with_capacity(function.body.len() + 1);
        let mut next = first;
        for statement in &function.body {
            at.push(next);
            next += 1 + u32::from(statement.opcode.starts_with("call"));
        }
        at.push(next);
        self.kernel.origins.resize(next as usize + 1, Origin::default());
        let base: [u32; 3] = [self.kernel.rows[2], self.kernel.rows[0], self.kernel.rows[1]];
        self.kernel.rows[2] += function.regs[Class::Pred as usize];
        self.kernel.rows[0] += function.regs[Class::Word as usize];
        self.kernel.rows[1] += function.regs[Class::Long as usize];
        let link = self.kernel.rows[0];
        self.kernel.rows[0] += 1;
        let mut places = Vec::new();
        for (i, var) in function.vars.iter().enumerate() {
            let size = var.size as u32;
            places.push(match var.space {
                Space::Param if function.entry && function.params.contains(&i) => {
                    let offset = align(self.kernel.param_bytes, var.align);
                    self.kernel.param_bytes = offset + size;
                    self.kernel.params.push((offset, size));
                    Place::Param(offset)
                }
                Space::Param | Space::Local => {
                    // Distance between variables makes an overrun visible as uninitialised.
                    let offset = align(self.kernel.local + 16, var.align);
                    self.kernel.local = offset + size;
                    Place::Local(offset)
                }
                Space::Shared => Place::Shared(0),
                Space::Global | Space::Const => {
                    return Err(format!("'{}': device variables inside functions", var.name));
                }
            });
        }
        self.frames.push((function.name, Frame { first, at, base, places, link }));
        Ok(())
    }

    /// Static variables first, then the dynamic ones, which all share one address. Each gets
    /// exactly its alignment, an odd multiple of it, so that code which needs more shows it.
    fn place_shared(&mut self, order: &[&Function]) -> Decode<()> {
        let mut used: Vec<&str> = Vec::new();
        for function in order {
            for statement in &function.body {
                names(&statement.operands, &mut used);
            }
        }
        for (number, function) in order.iter().enumerate() {
            for (i, var) in function.vars.iter().enumerate() {
                if var.space == Space::Shared {
                    let address = self.shared_var(var.name, var.align, var.size as u32);
                    self.frames[number].1.places[i] = Place::Shared(address);
                }
            }
        }
        let module = self.module;
        let wanted = |v: &&crate::parse::Var| v.space == Space::Shared && used.contains(&v.name);
        for var in module.vars.iter().filter(wanted).filter(|v| v.size > 0) {
            self.shared_var(var.name, var.align, var.size as u32);
        }
        let dynamic: Vec<_> = module.vars.iter().filter(wanted).filter(|v| v.size == 0).collect();
        if let Some(strictest) = dynamic.iter().map(|v| v.align).max() {
            let address = odd_multiple(self.next_shared, strictest);
            for var in dynamic {
                let name = var.name.to_string();
                self.kernel.shared.push(SharedVar { name, address, size: 0, dynamic: true });
            }
        }
        Ok(())
    }

    fn shared_var(&mut self, name: &str, alignment: u32, size: u32) -> u32 {
        let address = odd_multiple(self.next_shared, alignment);
        // A gap after each variable catches small overruns.
        self.next_shared = address + size + 16;
        self.kernel.static_shared = align(self.kernel.static_shared, alignment) + size;
        let name = name.to_string();
        self.kernel.shared.push(SharedVar { name, address, size, dynamic: false });
        address
    }

    fn function(&mut self, number: usize, function: &'m Function<'m>) -> Decode<()> {
        for (i, statement) in function.body.iter().enumerate() {
            let index = self.frames[number].1.at[i] as usize;
            let origin = Origin { span: statement.span, line: statement.line, loc: statement.loc };
            self.kernel.origins[index] = origin;
            let mut decoder = Decoder {
                linker: self,
                function,
                number,
                mods: Mods::new(statement.opcode),
                inst: Inst {
                    op: Op::Nop,
                    kind: Kind::Integer,
                    guard: ALWAYS,
                    guard_flip: 0,
                    d: 0,
                    d2: 0,
                    a: 0,
                    b: 0,
                    c: 0,
                    imm: 0,
                },
            };
            if let Some((reg, negated)) = statement.guard {
                decoder.inst.guard = decoder.pred_row(reg);
                decoder.inst.guard_flip = if negated { u32::MAX } else { 0 };
            }
            let more = decoder.statement(statement).and_then(|more| match decoder.mods.unused() {
                Some(unknown) => Err(format!("unknown modifier '.{unknown}'")),
                None => Ok(more),
            });
            let inst = decoder.inst;
            let more = more.map_err(|e| self.describe(statement, &e))?;
            self.kernel.insts.push(inst.clone());
            if let Some(op) = more {
                self.kernel.origins[index + 1] = origin;
                self.kernel.insts.push(Inst { op, ..inst });
            }
        }
        // Falling off the end returns.
        let op = if function.entry { Op::Exit } else { Op::Ret(self.frames[number].1.link) };
        self.kernel.insts.push(Inst {
            op,
            kind: Kind::Control,
            guard: ALWAYS,
            guard_flip: 0,
            d: 0,
            d2: 0,
            a: 0,
            b: 0,
            c: 0,
            imm: 0,
        });
        Ok(())
    }

    fn describe(&self, statement: &Statement, what: &str) -> String {
        format!("PTX line {}: {what}: {}", statement.line, statement.span.of(self.text))
    }

    fn frame_of(&self, name: &str) -> Decode<&Frame> {
        let found = self.frames.iter().find(|(of, _)| *of == name);
        found.map(|(_, frame)| frame).ok_or_else(|| format!("no function '{name}'"))
    }

    fn word(&mut self, value: u32) -> u32 {
        let next = self.kernel.rows[0];
        let row = *self.words.entry(value).or_insert(next);
        if row == next {
            self.kernel.rows[0] += 1;
            self.kernel.words.push((row, value));
        }
        row
    }

    fn long(&mut self, value: u64) -> u32 {
        let next = self.kernel.rows[1];
        let row = *self.longs.entry(value).or_insert(next);
        if row == next {
            self.kernel.rows[1] += 1;
            self.kernel.longs.push((row, value));
        }
        row
    }

    fn special(&mut self, special: Special) -> u32 {
        let next = self.kernel.rows[0];
        let row = *self.specials.entry(special).or_insert(next);
        if row == next {
            self.kernel.rows[0] += 1;
            self.kernel.specials.push((row, special));
        }
        row
    }
}

fn odd_multiple(from: u32, alignment: u32) -> u32 {
    let address = align(from, alignment);
    if alignment > 0 && (address / alignment).is_multiple_of(2) {
        address + alignment
    } else {
        address
    }
}

fn names<'t>(operands: &[Operand<'t>], out: &mut Vec<&'t str>) {
    for operand in operands {
        match operand {
            Operand::Name(name, ..) => out.push(name),
            Operand::Mem(base, _) => names(std::slice::from_ref(&**base), out),
            Operand::Vector(items) | Operand::List(items) => names(items, out),
            _ => {}
        }
    }
}

fn callee<'t>(statement: &Statement<'t>) -> Decode<&'t str> {
    let name = statement.operands.iter().find_map(|o| match o {
        Operand::Name(name, ..) => Some(*name),
        _ => None,
    });
    name.ok_or_else(|| String::from("indirect calls are not supported"))
}

/// An opcode's modifiers, each of which must be taken by somebody.
pub struct Mods<'a> {
    parts: Vec<(&'a str, bool)>,
}

impl<'a> Mods<'a> {
    fn new(opcode: &'a str) -> Self {
        Mods { parts: opcode.split('.').map(|p| (p, false)).collect() }
    }

    /// Takes a modifier if it is there.
    pub fn take(&mut self, name: &str) -> bool {
        match self.parts.iter_mut().find(|(p, used)| !used && *p == name) {
            Some(part) => {
                part.1 = true;
                true
            }
            None => false,
        }
    }

    /// Takes whichever of some modifiers is there.
    pub fn one_of(&mut self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().copied().find(|name| self.take(name))
    }

    /// Takes the next type.
    pub fn ty(&mut self) -> Result<Ty, String> {
        for (part, used) in &mut self.parts {
            if !*used && let Some(ty) = Ty::parse(part) {
                *used = true;
                return Ok(ty);
            }
        }
        Err(String::from("a type is missing"))
    }

    /// Takes the next modifier if `parse` knows it.
    pub fn take_as<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (part, used) = self.parts.iter_mut().find(|(_, used)| !used)?;
        let parsed = parse(part);
        *used = parsed.is_some();
        parsed
    }

    fn take_prefix(&mut self, prefix: &str) -> bool {
        match self.parts.iter_mut().find(|(p, used)| !used && p.starts_with(prefix)) {
            Some(part) => {
                part.1 = true;
                true
            }
            None => false,
        }
    }

    fn unused(&self) -> Option<&'a str> {
        self.parts.iter().find(|(_, used)| !used).map(|(p, _)| *p)
    }
}

/// Decodes one statement.
pub struct Decoder<'l, 'm, 's> {
    linker: &'l mut Linker<'m>,
    function: &'m Function<'m>,
    /// The function's number.
    number: usize,
    /// Modifiers that nobody has taken yet.
    pub mods: Mods<'s>,
    inst: Inst,
}

/// Integer operations on all widths: the body sees two (or three) values of the type itself.
macro_rules! int2 {
    ($ty:expr, $a:ident, $b:ident, $body:expr) => {
        match $ty {
            Ty::U(16) => alu::w2(|a, b, _| {
                let ($a, $b) = (a as u16, b as u16);
                u32::from(($body) as u16)
            }),
            Ty::S(16) => alu::w2(|a, b, _| {
                let ($a, $b) = (a as i16, b as i16);
                u32::from(($body) as u16)
            }),
            Ty::U(32) => alu::w2(|$a, $b, _| $body),
            Ty::S(32) => alu::w2(|a, b, _| {
                let ($a, $b) = (a as i32, b as i32);
                ($body) as u32
            }),
            Ty::U(64) => alu::l2(|$a, $b, _| $body),
            Ty::S(64) => alu::l2(|a, b, _| {
                let ($a, $b) = (a as i64, b as i64);
                ($body) as u64
            }),
            other => return Err(format!("unsupported type {other:?}")),
        }
    };
}

macro_rules! int1 {
    ($ty:expr, $a:ident, $body:expr) => {
        match $ty {
            Ty::U(16) => alu::w1(|a, _| {
                let $a = a as u16;
                u32::from(($body) as u16)
            }),
            Ty::S(16) => alu::w1(|a, _| {
                let $a = a as i16;
                u32::from(($body) as u16)
            }),
            Ty::U(32) => alu::w1(|$a, _| $body),
            Ty::S(32) => alu::w1(|a, _| {
                let $a = a as i32;
                ($body) as u32
            }),
            Ty::U(64) => alu::l1(|$a, _| $body),
            Ty::S(64) => alu::l1(|a, _| {
                let $a = a as i64;
                ($body) as u64
            }),
            other => return Err(format!("unsupported type {other:?}")),
        }
    };
}

macro_rules! int_compare {
    ($ty:expr, $a:ident, $b:ident, $body:expr) => {
        match $ty {
            Ty::U(16) => alu::compare(|a, b| {
                let ($a, $b) = (a as u16, b as u16);
                $body
            }),
            Ty::S(16) => alu::compare(|a, b| {
                let ($a, $b) = (a as i16, b as i16);
                $body
            }),
            Ty::U(32) => alu::compare(|$a, $b| $body),
            Ty::S(32) => alu::compare(|a, b| {
                let ($a, $b) = (a as i32, b as i32);
                $body
            }),
            Ty::U(64) => alu::compare_long(|$a, $b| $body),
            Ty::S(64) => alu::compare_long(|a, b| {
                let ($a, $b) = (a as i64, b as i64);
                $body
            }),
            other => return Err(format!("unsupported comparison of {other:?}")),
        }
    };
}

/// Comparisons of floats; `$when_nan` is the result when an operand is NaN, `$ftz` takes subnormal
/// operands for zeros.
macro_rules! float_compare {
    ($ty:expr, $ftz:expr, $a:ident, $b:ident, $when_nan:expr, $body:expr) => {
        match $ty {
            Ty::F32 if $ftz => alu::compare(|a, b| {
                let ($a, $b) = (float::flush(f32::from_bits(a)), float::flush(f32::from_bits(b)));
                if $a.is_nan() || $b.is_nan() { $when_nan } else { $body }
            }),
            Ty::F16 if $ftz => alu::compare(|a, b| {
                let ($a, $b) = (float::flush_f16(a), float::flush_f16(b));
                if $a.is_nan() || $b.is_nan() { $when_nan } else { $body }
            }),
            _ if $ftz => return Err(String::from(".ftz needs f32 or f16")),
            Ty::F32 => alu::compare(|a, b| {
                let ($a, $b) = (f32::from_bits(a), f32::from_bits(b));
                if $a.is_nan() || $b.is_nan() { $when_nan } else { $body }
            }),
            Ty::F64 => alu::compare_long(|a, b| {
                let ($a, $b) = (f64::from_bits(a), f64::from_bits(b));
                if $a.is_nan() || $b.is_nan() { $when_nan } else { $body }
            }),
            Ty::F16 => alu::compare(|a, b| {
                let ($a, $b) = (float::f16_to_f32(a), float::f16_to_f32(b));
                if $a.is_nan() || $b.is_nan() { $when_nan } else { $body }
            }),
            Ty::BF16 => alu::compare(|a, b| {
                let ($a, $b) = (float::bf16_to_f32(a), float::bf16_to_f32(b));
                if $a.is_nan() || $b.is_nan() { $when_nan } else { $body }
            }),
            other => return Err(format!("unsupported comparison of {other:?}")),
        }
    };
}

impl Decoder<'_, '_, '_> {
    fn pred_row(&self, reg: Reg) -> u32 {
        self.frame().base[0] + reg.index
    }

    fn frame(&self) -> &Frame {
        &self.linker.frames[self.number].1
    }

    /// The architecture of the device that is to run it.
    pub fn device(&self) -> u32 {
        self.linker.device
    }

    /// Fails unless the module targets at least this architecture.
    pub fn need(&self, arch: u32) -> Decode<()> {
        let target = self.linker.module.target;
        if target >= arch {
            return Ok(());
        }
        Err(format!("needs .target sm_{arch} or higher, the module has sm_{target}"))
    }

    /// The row of a register that the instruction reads or writes, which is noted. What a guard may
    /// leave out is no write.
    fn reg_row(&mut self, reg: Reg, write: bool) -> u32 {
        let row = self.frame().base[reg.class as usize] + reg.index;
        let always = self.inst.guard == ALWAYS && self.inst.guard_flip == 0;
        if reg.class != Class::Pred && (always || !write) {
            let inst = self.linker.kernel.insts.len() as u32;
            let long = reg.class == Class::Long;
            self.linker.kernel.touches.push(Touch { inst, row, long, write });
        }
        row
    }

    /// The same of a register that holds a `ty`.
    fn reg_row_as(&mut self, reg: Reg, ty: Ty, write: bool) -> Decode<u32> {
        match (reg.class, ty.long()) {
            (Class::Word, false) | (Class::Long, true) => Ok(self.reg_row(reg, write)),
            _ => Err(format!("a register of {} bits where {ty:?} is needed", reg.bits)),
        }
    }

    /// The row of a source of type `ty`.
    pub fn src(&mut self, operand: &Operand, ty: Ty) -> Decode<u32> {
        let long = ty.long();
        match operand {
            Operand::Reg(reg) => self.reg_row_as(*reg, ty, false),
            Operand::Int(n) => {
                let bits = match ty {
                    Ty::F32 => (*n as f32).to_bits().into(),
                    Ty::F64 => (*n as f64).to_bits(),
                    _ => alu::extend(*n as u64, ty.bits(), false),
                };
                Ok(if long { self.linker.long(bits) } else { self.linker.word(bits as u32) })
            }
            Operand::F32(bits) if !long => Ok(self.linker.word(*bits)),
            Operand::F64(x) if long => Ok(self.linker.long(x.to_bits())),
            Operand::F64(x) if ty == Ty::F32 => Ok(self.linker.word((*x as f32).to_bits())),
            Operand::Special(name) if !long => {
                let special = special_register(name)
                    .ok_or_else(|| format!("unknown special register '{name}'"))?;
                Ok(self.linker.special(special))
            }
            Operand::Name(name, offset, scope) => {
                let (_, address) = self.symbol(name, *scope)?;
                let address = address.wrapping_add(*offset as u64);
                Ok(if long { self.linker.long(address) } else { self.linker.word(address as u32) })
            }
            other => Err(format!("unsupported operand {other:?}")),
        }
    }

    /// The row of a destination of type `ty`.
    pub fn dst(&mut self, operand: &Operand, ty: Ty) -> Decode<u32> {
        match operand {
            Operand::Reg(reg) => self.reg_row_as(*reg, ty, true),
            Operand::Sink => Ok(0),
            other => Err(format!("{other:?} cannot be written")),
        }
    }

    /// The row of a predicate, and whether it is negated.
    fn pred(&mut self, operand: &Operand) -> Decode<(u32, bool)> {
        match operand {
            Operand::Reg(reg) if reg.class == Class::Pred => Ok((self.pred_row(*reg), false)),
            Operand::Not(reg) => Ok((self.pred_row(*reg), true)),
            // Row 0 is true.
            Operand::Int(n) => Ok((ALWAYS, *n == 0)),
            other => Err(format!("{other:?} is not a predicate")),
        }
    }

    fn pred_dst(&mut self, operand: &Operand) -> Decode<u32> {
        match operand {
            Operand::Reg(reg) if reg.class == Class::Pred => Ok(self.pred_row(*reg)),
            Operand::Sink => Ok(SINK),
            other => Err(format!("{other:?} is not a predicate")),
        }
    }

    /// A variable's space and address in that space.
    fn symbol(&self, name: &str, scope: usize) -> Decode<(Target, u64)> {
        if let Some(var) = self.function.var(name, scope) {
            return Ok(match self.frame().places[var] {
                Place::Param(offset) => (Target::Param, PARAM_WINDOW + u64::from(offset)),
                Place::Local(offset) => (Target::Local, u64::from(offset)),
                Place::Shared(address) => (Target::Shared, u64::from(address)),
            });
        }
        // Variables of the module; those of other functions have no frame place here.
        if let Some(var) = self.linker.kernel.shared.iter().find(|v| v.name == name) {
            return Ok((Target::Shared, u64::from(var.address)));
        }
        match (self.linker.globals)(name) {
            Some(address) => Ok((Target::Global, address)),
            None => Err(format!("unknown symbol '{name}'")),
        }
    }

    fn address(&mut self, operand: &Operand) -> Decode<(Address, Option<Target>)> {
        let Operand::Mem(base, offset) = operand else {
            return Err(format!("{operand:?} is not an address"));
        };
        let offset = *offset;
        match &**base {
            Operand::Reg(reg) => {
                let row = self.reg_row(*reg, false);
                let base = match reg.class {
                    Class::Word => Base::Word(row),
                    Class::Long => Base::Long(row),
                    Class::Pred => return Err(String::from("a predicate is no address")),
                };
                Ok((Address { base, offset }, None))
            }
            Operand::Name(name, plus, scope) => {
                let (target, address) = self.symbol(name, *scope)?;
                let offset = (address as i64).wrapping_add(offset).wrapping_add(*plus);
                Ok((Address { base: Base::None, offset }, Some(target)))
            }
            Operand::Int(n) => {
                Ok((Address { base: Base::None, offset: (*n as i64).wrapping_add(offset) }, None))
            }
            other => Err(format!("unsupported address {other:?}")),
        }
    }

    fn operands<'t, const N: usize>(&self, statement: &Statement<'t>) -> Decode<[Operand<'t>; N]> {
        let found = statement.operands.len();
        statement
            .operands
            .clone()
            .try_into()
            .map_err(|_| format!("{N} operands expected, {found} found"))
    }

    fn rounding(&mut self) -> Option<Round> {
        Some(match self.mods.one_of(&["rn", "rz", "rm", "rp", "rna"])? {
            "rn" => Round::Nearest,
            "rz" => Round::Zero,
            "rm" => Round::Down,
            "rp" => Round::Up,
            _ => Round::Away,
        })
    }

    /// Decodes into `self.inst`; a second operation follows a call.
    fn statement(&mut self, s: &Statement) -> Decode<Option<Op>> {
        let base = self.mods.parts[0].0;
        self.mods.parts[0].1 = true;
        let op = match base {
            "mov" => self.mov(s)?,
            "add" | "sub" | "addc" | "subc" | "mul" | "mad" | "fma" | "div" | "rem" | "min"
            | "max" | "neg" | "abs" | "mul24" => self.arithmetic(base, s)?,
            "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "shf" | "lop3" | "bfe"
            | "bfi" | "bfind" | "brev" | "clz" | "popc" | "prmt" | "dp4a" | "dp2a" | "sad"
            | "copysign" => self.bits(base, s)?,
            "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => {
                self.inst.kind = Kind::Special;
                self.special_function(base, s)?
            }
            "setp" | "set" | "selp" | "slct" | "testp" => self.comparison(base, s)?,
            "cvt" => self.cvt(s)?,
            "cvta" => self.cvta(s)?,
            "isspacep" => {
                let [d, a] = self.operands(s)?;
                let target = self.space().ok_or("isspacep needs a space")?;
                self.inst.d = self.pred_dst(&d)?;
                self.inst.a = self.src(&a, Ty::U(64))?;
                Op::IsSpace(target)
            }
            "ld" | "ldu" => self.load_store(s, false)?,
            "st" => self.load_store(s, true)?,
            "atom" | "red" => self.atomic(base == "red", s)?,
            "prefetch" | "prefetchu" | "applypriority" | "discard" => {
                self.mods.one_of(&["global", "local"]);
                if !self.mods.take_prefix("L1") && !self.mods.take_prefix("L2") {
                    return Err(String::from("a cache level is missing"));
                }
                if base == "discard" {
                    return Err(String::from("discard is not modelled"));
                }
                self.inst.kind = Kind::Global;
                Op::Nop
            }
            "createpolicy" => {
                self.mods.one_of(&["fractional", "range"]);
                self.mods.take("b64");
                while self.mods.take_prefix("L2::") {}
                self.mods.take("global");
                let d = s.operands.first().ok_or("a destination is missing")?;
                self.inst.d = self.dst(d, Ty::U(64))?;
                self.inst.a = self.linker.long(0);
                Op::Alu(alu::l1(|a, _| a))
            }
            "bra" | "brx" | "call" | "ret" | "exit" | "trap" | "brkpt" => {
                self.inst.kind = Kind::Control;
                return self.control(base, s);
            }
            "bar" | "barrier" => {
                self.inst.kind = Kind::Control;
                self.barrier(s)?
            }
            "membar" | "fence" => {
                self.inst.kind = Kind::Control;
                self.mods.one_of(&["sc", "acq_rel", "acquire", "release"]);
                if self.mods.one_of(&["cta", "gl", "gpu", "sys", "cluster"]).is_none() {
                    return Err(String::from("a scope is missing"));
                }
                Op::Fence
            }
            "shfl" | "vote" | "match" | "activemask" | "redux" | "elect" => {
                self.inst.kind = Kind::Control;
                self.warp(base, s)?
            }
            "nanosleep" | "pmevent" => {
                self.mods.one_of(&["u32", "mask"]);
                Op::Nop
            }
            "griddepcontrol" => {
                self.need(90)?;
                self.mods.one_of(&["wait", "launch_dependents"]);
                Op::Nop
            }
            "cp" => self.cp_async(s)?,
            "ldmatrix" | "stmatrix" => self.matrix(base == "stmatrix", s)?,
            "mma" => {
                self.inst.kind = Kind::Mma;
                Op::Mma(Box::new(Mma::decode(self, &s.operands)?))
            }
            other => return Err(format!("unknown instruction '{other}'")),
        };
        self.inst.op = op;
        Ok(None)
    }

    fn alu(&mut self, kind: Kind, op: Alu) -> Op {
        self.inst.kind = kind;
        Op::Alu(op)
    }

    fn mov(&mut self, s: &Statement) -> Decode<Op> {
        let ty = self.mods.ty()?;
        let [d, a] = self.operands(s)?;
        if ty == Ty::Pred {
            self.inst.d = self.pred_dst(&d)?;
            let (row, negated) = self.pred(&a)?;
            (self.inst.a, self.inst.b, self.inst.imm) = (row, row, u64::from(negated) * 3);
            return Ok(self.alu(Kind::Integer, alu::pred2(|a, _| a)));
        }
        if let Operand::Special(name) = &a {
            let long = match *name {
                "%clock" | "%clock_hi" | "%globaltimer_lo" => Some(false),
                "%clock64" | "%globaltimer" => Some(true),
                _ => None,
            };
            if let Some(long) = long {
                if long != ty.long() {
                    return Err(format!("'{name}' does not fit {ty:?}"));
                }
                self.inst.d = self.dst(&d, ty)?;
                return Ok(Op::Clock(long));
            }
        }
        let part = |n: usize| -> Decode<Ty> {
            match ty.bits() as usize / n {
                8 => Ok(Ty::U(8)),
                16 => Ok(Ty::U(16)),
                32 => Ok(Ty::U(32)),
                _ => Err(format!("{n} parts of {ty:?}")),
            }
        };
        match (&d, &a) {
            (_, Operand::Vector(parts)) => {
                let part_ty = part(parts.len())?;
                let rows =
                    parts.iter().map(|p| self.src(p, part_ty)).collect::<Decode<Vec<u32>>>()?;
                self.inst.d = self.dst(&d, ty)?;
                (self.inst.a, self.inst.b) = (rows[0], rows[1 % rows.len()]);
                let op = match (ty.bits(), parts.len()) {
                    (64, 2) => alu::ww_to_l(|a, b, _| u64::from(a) | u64::from(b) << 32),
                    (32, 2) => alu::w2(|a, b, _| a & 0xffff | b << 16),
                    (16, 2) => alu::w2(|a, b, _| a & 0xff | (b & 0xff) << 8),
                    (_, 4) => {
                        // Two more rows travel in the immediate.
                        self.inst.imm = u64::from(rows[2]) | u64::from(rows[3]) << 32;
                        if ty.bits() == 64 { pack4_long } else { pack4 }
                    }
                    _ => return Err(String::from("unsupported vector move")),
                };
                Ok(self.alu(Kind::Integer, op))
            }
            (Operand::Vector(parts), _) => {
                let part_ty = part(parts.len())?;
                let rows =
                    parts.iter().map(|p| self.dst(p, part_ty)).collect::<Decode<Vec<u32>>>()?;
                self.inst.a = self.src(&a, ty)?;
                // Up to four destinations: d, d2, b, c.
                let row = |i: usize| rows.get(i).copied().unwrap_or(0);
                (self.inst.d, self.inst.d2) = (row(0), row(1));
                (self.inst.b, self.inst.c) = (row(2), row(3));
                self.inst.imm = u64::from(part_ty.bits());
                Ok(self.alu(Kind::Integer, if ty.long() { unpack_long } else { unpack }))
            }
            _ => {
                self.inst.d = self.dst(&d, ty)?;
                self.inst.a = self.src(&a, ty)?;
                let op = if ty.long() { alu::l1(|a, _| a) } else { alu::w1(|a, _| a) };
                Ok(self.alu(Kind::Integer, op))
            }
        }
    }

    fn float_flags(&mut self) -> Flags {
        let round = self.rounding().unwrap_or(Round::Nearest);
        let ftz = self.mods.take("ftz");
        let sat = self.mods.take("sat");
        let relu = self.mods.take("relu");
        Flags { round, ftz, sat, relu, integral: false }
    }

    fn arithmetic(&mut self, base: &str, s: &Statement) -> Decode<Op> {
        let wide = self.mods.take("wide");
        let high = self.mods.take("hi");
        let low = self.mods.take("lo");
        let carry_out = self.mods.take("cc");
        let approx = self.mods.take("approx");
        let full = self.mods.take("full");
        let nan = self.mods.take("NaN");
        let flags = self.float_flags();
        let ty = self.mods.ty()?;
        if ty.float() || matches!(ty, Ty::F16x2 | Ty::BF16x2) {
            if (wide || high || low || carry_out) || (approx || full) && base != "div" {
                return Err(String::from("an integer modifier on a float"));
            }
            let bf16 = matches!(ty, Ty::BF16 | Ty::BF16x2);
            let least =
                matches!(base, "min" | "max") && (nan || ty.bits() == 16 || ty == Ty::F16x2);
            if bf16 && matches!(base, "add" | "sub" | "mul") {
                self.need(90)?;
            } else if bf16 || least || flags.relu {
                self.need(80)?;
            }
            return self.float_arithmetic(base, s, ty, flags, approx || full, nan, full);
        }
        if flags.relu || flags.ftz || flags.round != Round::Nearest || nan || approx || full {
            return Err(String::from("a float modifier on an integer"));
        }
        let integer_kind = Kind::Integer;
        match base {
            "add" | "sub" | "addc" | "subc" => {
                let [d, a, b] = self.operands(s)?;
                self.inst.d = self.dst(&d, ty)?;
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.src(&b, ty)?;
                let sub = base.starts_with("sub");
                if carry_out || base.ends_with('c') {
                    self.inst.c = CARRY;
                    self.inst.imm = if base.ends_with('c') { carry::IN } else { 0 }
                        | if carry_out { carry::OUT } else { 0 }
                        | if sub { carry::SUB } else { 0 };
                    let op = match ty.bits() {
                        32 => alu::add_carry,
                        64 => alu::add_carry_long,
                        _ => return Err(String::from("carry needs 32 or 64 bits")),
                    };
                    return Ok(self.alu(integer_kind, op));
                }
                let op = match (sub, flags.sat) {
                    (false, false) => int2!(ty, a, b, a.wrapping_add(b)),
                    (true, false) => int2!(ty, a, b, a.wrapping_sub(b)),
                    (false, true) if ty == Ty::S(32) => int2!(ty, a, b, a.saturating_add(b)),
                    (true, true) if ty == Ty::S(32) => int2!(ty, a, b, a.saturating_sub(b)),
                    _ => return Err(String::from(".sat needs .s32")),
                };
                Ok(self.alu(integer_kind, op))
            }
            "mul" | "mul24" if wide => {
                let [d, a, b] = self.operands(s)?;
                let to = wider(ty)?;
                self.inst.d = self.dst(&d, to)?;
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.src(&b, ty)?;
                let op = match ty {
                    Ty::U(16) => alu::w2(|a, b, _| (a & 0xffff) * (b & 0xffff)),
                    Ty::S(16) => {
                        alu::w2(|a, b, _| (i32::from(a as i16) * i32::from(b as i16)) as u32)
                    }
                    Ty::U(32) => alu::ww_to_l(|a, b, _| u64::from(a) * u64::from(b)),
                    _ => alu::ww_to_l(|a, b, _| (i64::from(a as i32) * i64::from(b as i32)) as u64),
                };
                Ok(self.alu(integer_kind, op))
            }
            "mul" => {
                let [d, a, b] = self.operands(s)?;
                self.inst.d = self.dst(&d, ty)?;
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.src(&b, ty)?;
                let op = if high {
                    int2!(ty, a, b, multiply_high(a, b))
                } else if low {
                    int2!(ty, a, b, a.wrapping_mul(b))
                } else {
                    return Err(String::from("mul needs .lo, .hi or .wide"));
                };
                Ok(self.alu(integer_kind, op))
            }
            "mad" if wide => {
                let [d, a, b, c] = self.operands(s)?;
                let to = wider(ty)?;
                self.inst.d = self.dst(&d, to)?;
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.src(&b, ty)?;
                self.inst.c = self.src(&c, to)?;
                let op = match ty {
                    Ty::U(16) => {
                        alu::w3(|a, b, c, _| ((a & 0xffff) * (b & 0xffff)).wrapping_add(c))
                    }
                    Ty::S(16) => alu::w3(|a, b, c, _| {
                        ((i32::from(a as i16) * i32::from(b as i16)) as u32).wrapping_add(c)
                    }),
                    Ty::U(32) => {
                        alu::wwl_to_l(|a, b, c, _| (u64::from(a) * u64::from(b)).wrapping_add(c))
                    }
                    _ => alu::wwl_to_l(|a, b, c, _| {
                        ((i64::from(a as i32) * i64::from(b as i32)) as u64).wrapping_add(c)
                    }),
                };
                Ok(self.alu(integer_kind, op))
            }
            "mad" => {
                let [d, a, b, c] = self.operands(s)?;
                self.inst.d = self.dst(&d, ty)?;
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.src(&b, ty)?;
                self.inst.c = self.src(&c, ty)?;
                if carry_out || flags.sat {
                    return Err(String::from("mad.cc and mad.sat are not modelled"));
                }
                let op = match (ty, high) {
                    (Ty::U(16) | Ty::S(16), false) => {
                        alu::w3(|a, b, c, _| a.wrapping_mul(b).wrapping_add(c) & 0xffff)
                    }
                    (Ty::U(32) | Ty::S(32), false) => {
                        alu::w3(|a, b, c, _| a.wrapping_mul(b).wrapping_add(c))
                    }
                    (Ty::U(64) | Ty::S(64), false) => {
                        alu::l3(|a, b, c, _| a.wrapping_mul(b).wrapping_add(c))
                    }
                    (Ty::U(32), true) => alu::w3(|a, b, c, _| multiply_high(a, b).wrapping_add(c)),
                    (Ty::S(32), true) => alu::w3(|a, b, c, _| {
                        (multiply_high(a as i32, b as i32) as u32).wrapping_add(c)
                    }),
                    (Ty::U(64), true) => alu::l3(|a, b, c, _| multiply_high(a, b).wrapping_add(c)),
                    (Ty::S(64), true) => alu::l3(|a, b, c, _| {
                        (multiply_high(a as i64, b as i64) as u64).wrapping_add(c)
                    }),
                    _ => return Err(format!("unsupported mad on {ty:?}")),
                };
                Ok(self.alu(integer_kind, op))
            }
            "div" | "rem" | "min" | "max" => {
                let [d, a, b] = self.operands(s)?;
                self.inst.d = self.dst(&d, ty)?;
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.src(&b, ty)?;
                let op = match base {
                    // The ISA leaves a division by zero open; hardware gives all ones.
                    "div" => int2!(ty, a, b, if b == 0 { !0 } else { a.wrapping_div(b) }),
                    "rem" => int2!(ty, a, b, if b == 0 { a } else { a.wrapping_rem(b) }),
                    "min" => int2!(ty, a, b, a.min(b)),
                    _ => int2!(ty, a, b, a.max(b)),
                };
                Ok(self.alu(integer_kind, op))
            }
            "neg" | "abs" => {
                let [d, a] = self.operands(s)?;
                self.inst.d = self.dst(&d, ty)?;
                self.inst.a = self.src(&a, ty)?;
                let op = match (base, ty) {
                    ("abs", Ty::S(16)) => {
                        alu::w1(|a, _| u32::from((a as i16).wrapping_abs() as u16))
                    }
                    ("abs", Ty::S(32)) => alu::w1(|a, _| (a as i32).wrapping_abs() as u32),
                    ("abs", Ty::S(64)) => alu::l1(|a, _| (a as i64).wrapping_abs() as u64),
                    ("neg", _) => int1!(ty, a, a.wrapping_neg()),
                    _ => return Err(format!("unsupported type {ty:?}")),
                };
                Ok(self.alu(integer_kind, op))
            }
            _ => Err(format!("unsupported '{base}' on {ty:?}")),
        }
    }

    fn float_arithmetic(
        &mut self,
        base: &str,
        s: &Statement,
        ty: Ty,
        flags: Flags,
        approx: bool,
        nan: bool,
        full: bool,
    ) -> Decode<Op> {
        let count = match base {
            "neg" | "abs" => 2,
            "fma" | "mad" => 4,
            _ => 3,
        };
        if s.operands.len() != count {
            return Err(format!("{count} operands expected"));
        }
        self.inst.d = self.dst(&s.operands[0], ty)?;
        self.inst.a = self.src(&s.operands[1], ty)?;
        // Unused operands alias the first, so that lifting functions of three read valid rows.
        self.inst.b = self.inst.a;
        self.inst.c = self.inst.a;
        if count > 2 {
            self.inst.b = self.src(&s.operands[2], ty)?;
        }
        if count > 3 {
            self.inst.c = self.src(&s.operands[3], ty)?;
        }
        let plain = flags == Flags::PLAIN;
        self.inst.imm = flags.pack();
        let op: Alu = match ty {
            Ty::F32 => match (base, plain) {
                ("add", true) => {
                    alu::w2(|a, b, _| alu::canonical(f32::from_bits(a) + f32::from_bits(b)))
                }
                ("sub", true) => {
                    alu::w2(|a, b, _| alu::canonical(f32::from_bits(a) - f32::from_bits(b)))
                }
                ("mul", true) => {
                    alu::w2(|a, b, _| alu::canonical(f32::from_bits(a) * f32::from_bits(b)))
                }
                ("fma" | "mad", true) => alu::w3(|a, b, c, _| {
                    alu::canonical(f32::from_bits(a).mul_add(f32::from_bits(b), f32::from_bits(c)))
                }),
                ("add", false) => alu::w2(|a, b, i| {
                    alu::with_flags([a, b], i, |[a, b], m| float::add_f32(a, b, m))
                }),
                ("sub", false) => alu::w2(|a, b, i| {
                    alu::with_flags([a, b], i, |[a, b], m| float::add_f32(a, -b, m))
                }),
                ("mul", false) => alu::w2(|a, b, i| {
                    alu::with_flags([a, b], i, |[a, b], m| float::mul_f32(a, b, m))
                }),
                ("fma" | "mad", false) => alu::w3(|a, b, c, i| {
                    alu::with_flags([a, b, c], i, |[a, b, c], m| float::fma_f32(a, b, c, m))
                }),
                ("div", _) if approx && !full => {
                    self.inst.kind = Kind::Special;
                    alu::w2(|a, b, i| alu::with_flags([a, b], i, |[a, b], _| alu::div_approx(a, b)))
                }
                ("div", _) => {
                    alu::w2(|a, b, i| alu::with_flags([a, b], i, |[a, b], m| alu::div_f32(a, b, m)))
                }
                ("min" | "max", _) => {
                    if flags.sat || flags.relu {
                        return Err(String::from("unsupported modifier"));
                    }
                    self.inst.imm |= u64::from(base == "max") << 8 | u64::from(nan) << 9;
                    alu::w2(|a, b, i| {
                        let fl = |x: u32| {
                            let x = f32::from_bits(x);
                            if Flags::unpack(i).ftz { float::flush(x) } else { x }
                        };
                        alu::min_max(fl(a), fl(b), i >> 8 & 1 == 1, i >> 9 & 1 == 1)
                    })
                }
                ("neg", _) => alu::w1(|a, i| sign_op(a, i) ^ 0x8000_0000),
                ("abs", _) => alu::w1(|a, i| sign_op(a, i) & 0x7fff_ffff),
                _ => return Err(format!("unsupported '{base}.f32'")),
            },
            Ty::F64 => {
                if !plain {
                    return Err(String::from("f64 arithmetic rounds to nearest here"));
                }
                match base {
                    "add" => alu::l2(|a, b, _| (f64::from_bits(a) + f64::from_bits(b)).to_bits()),
                    "sub" => alu::l2(|a, b, _| (f64::from_bits(a) - f64::from_bits(b)).to_bits()),
                    "mul" => alu::l2(|a, b, _| (f64::from_bits(a) * f64::from_bits(b)).to_bits()),
                    "div" => alu::l2(|a, b, _| (f64::from_bits(a) / f64::from_bits(b)).to_bits()),
                    "fma" | "mad" => alu::l3(|a, b, c, _| {
                        f64::from_bits(a).mul_add(f64::from_bits(b), f64::from_bits(c)).to_bits()
                    }),
                    "min" => alu::l2(|a, b, _| {
                        alu::min_max_f64(f64::from_bits(a), f64::from_bits(b), false)
                    }),
                    "max" => alu::l2(|a, b, _| {
                        alu::min_max_f64(f64::from_bits(a), f64::from_bits(b), true)
                    }),
                    "neg" => alu::l1(|a, _| a ^ 1 << 63),
                    "abs" => alu::l1(|a, _| a & !(1 << 63)),
                    _ => return Err(format!("unsupported '{base}.f64'")),
                }
            }
            _ => {
                let op = match (base, nan) {
                    ("add", _) => HalfOp::Add,
                    ("sub", _) => HalfOp::Sub,
                    ("mul", _) => HalfOp::Mul,
                    ("fma", _) => HalfOp::Fma,
                    ("min", false) => HalfOp::Min,
                    ("max", false) => HalfOp::Max,
                    ("min", true) => HalfOp::MinNan,
                    ("max", true) => HalfOp::MaxNan,
                    ("neg", _) => HalfOp::Neg,
                    ("abs", _) => HalfOp::Abs,
                    _ => return Err(format!("unsupported '{base}' on {ty:?}")),
                };
                if flags.round != Round::Nearest {
                    return Err(String::from("16-bit floats round to nearest"));
                }
                self.inst.imm = alu::pack_half(op, ty, flags);
                alu::w3(alu::half)
            }
        };
        if self.inst.kind == Kind::Integer {
            self.inst.kind = Kind::Float;
        }
        Ok(Op::Alu(op))
    }

    fn bits(&mut self, base: &str, s: &Statement) -> Decode<Op> {
        let mode = self.mods.one_of(&["wrap", "clamp"]);
        let left = self.mods.take("l");
        let right = self.mods.take("r");
        let shift_amount = self.mods.take("shiftamt");
        let prmt = self.mods.one_of(&["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]);
        let dp2_high = self.mods.take("hi");
        self.mods.take("lo");
        let ty = self.mods.ty()?;
        if ty == Ty::Pred {
            let n = s.operands.len();
            if n < 2 {
                return Err(String::from("operands are missing"));
            }
            self.inst.d = self.pred_dst(&s.operands[0])?;
            let (a, not_a) = self.pred(&s.operands[1])?;
            let (b, not_b) = self.pred(&s.operands[n - 1])?;
            (self.inst.a, self.inst.b) = (a, b);
            self.inst.imm = u64::from(not_a) | u64::from(not_b) << 1;
            let op = match base {
                "and" => alu::pred2(|a, b| a & b),
                "or" => alu::pred2(|a, b| a | b),
                "xor" => alu::pred2(|a, b| a ^ b),
                "not" => alu::pred2(|a, _| !a),
                _ => return Err(format!("unsupported '{base}.pred'")),
            };
            return Ok(self.alu(Kind::Integer, op));
        }
        let word = Ty::U(32);
        let mut rows = Vec::new();
        let types: Vec<Ty> = match base {
            "and" | "or" | "xor" => vec![ty, ty, ty],
            "not" | "cnot" | "brev" => vec![ty, ty],
            "clz" | "popc" | "bfind" => vec![word, ty],
            "shl" | "shr" => vec![ty, ty, word],
            "shf" | "prmt" => vec![word; 4],
            "lop3" => vec![word; 5],
            "bfe" => vec![ty, ty, word, word],
            "bfi" => vec![ty, ty, ty, word, word],
            "sad" => vec![ty; 4],
            "copysign" => vec![ty; 3],
            "dp4a" | "dp2a" => {
                let b = self.mods.ty()?;
                self.inst.imm = u64::from(ty == Ty::S(32))
                    | u64::from(b == Ty::S(32)) << 1
                    | u64::from(dp2_high) << 2;
                vec![word; 4]
            }
            _ => return Err(format!("unsupported '{base}'")),
        };
        if types.len() != s.operands.len() {
            return Err(format!("{} operands expected", types.len()));
        }
        for (i, (operand, &ty)) in s.operands.iter().zip(&types).enumerate() {
            rows.push(if i == 0 { self.dst(operand, ty)? } else { self.src(operand, ty)? });
        }
        let row = |i: usize| rows.get(i).copied().unwrap_or(0);
        (self.inst.d, self.inst.a, self.inst.b, self.inst.c) = (row(0), row(1), row(2), row(3));
        let bits = ty.bits();
        let op: Alu = match base {
            "and" => int2!(ty, a, b, a & b),
            "or" => int2!(ty, a, b, a | b),
            "xor" => int2!(ty, a, b, a ^ b),
            "not" => int1!(ty, a, !a),
            "cnot" => int1!(ty, a, if a == 0 { 1 } else { 0 }),
            "shl" => match bits {
                16 => alu::w2(|a, b, _| if b > 15 { 0 } else { a << b & 0xffff }),
                32 => alu::w2(|a, b, _| if b > 31 { 0 } else { a << b }),
                _ => alu::lw_to_l(|a, b, _| if b > 63 { 0 } else { a << b }),
            },
            "shr" => match ty {
                Ty::S(16) => alu::w2(|a, b, _| u32::from((a as i16 >> b.min(15)) as u16)),
                Ty::U(16) => alu::w2(|a, b, _| if b > 15 { 0 } else { (a & 0xffff) >> b }),
                Ty::S(32) => alu::w2(|a, b, _| (a as i32 >> b.min(31)) as u32),
                Ty::U(32) => alu::w2(|a, b, _| if b > 31 { 0 } else { a >> b }),
                Ty::S(64) => alu::lw_to_l(|a, b, _| (a as i64 >> b.min(63)) as u64),
                _ => alu::lw_to_l(|a, b, _| if b > 63 { 0 } else { a >> b }),
            },
            "shf" => {
                // a is the low word, b the high one.
                let Some(mode) = mode else {
                    return Err(String::from("shf needs .wrap or .clamp"));
                };
                match (left, right, mode) {
                    (true, _, "wrap") => alu::w3(|a, b, c, _| funnel_left(a, b, c & 31)),
                    (true, _, _) => alu::w3(|a, b, c, _| funnel_left(a, b, c.min(32))),
                    (_, true, "wrap") => alu::w3(|a, b, c, _| funnel_right(a, b, c & 31)),
                    (_, true, _) => alu::w3(|a, b, c, _| funnel_right(a, b, c.min(32))),
                    _ => return Err(String::from("shf needs .l or .r")),
                }
            }
            "prmt" => {
                self.inst.imm = match prmt {
                    None => 0,
                    Some("f4e") => 1,
                    Some("b4e") => 2,
                    Some("rc8") => 3,
                    Some("ecl") => 4,
                    Some("ecr") => 5,
                    Some(_) => 6,
                };
                alu::w3(alu::permute)
            }
            "lop3" => {
                let Operand::Int(table) = s.operands[4] else {
                    return Err(String::from("lop3 needs a constant table"));
                };
                self.inst.imm = table as u64;
                alu::w3(alu::lop3)
            }
            "bfe" => match ty {
                Ty::U(32) => {
                    alu::w3(|a, b, c, _| alu::bit_field_extract(a.into(), b, c, 32, false) as u32)
                }
                Ty::S(32) => {
                    alu::w3(|a, b, c, _| alu::bit_field_extract(a.into(), b, c, 32, true) as u32)
                }
                Ty::U(64) => alu::lww_to_l(|a, b, c, _| alu::bit_field_extract(a, b, c, 64, false)),
                Ty::S(64) => alu::lww_to_l(|a, b, c, _| alu::bit_field_extract(a, b, c, 64, true)),
                _ => return Err(format!("unsupported bfe on {ty:?}")),
            },
            "bfi" => {
                self.inst.imm = u64::from(row(4));
                if bits == 64 { insert_long } else { insert }
            }
            "brev" => match bits {
                32 => alu::w1(|a, _| a.reverse_bits()),
                _ => alu::l1(|a, _| a.reverse_bits()),
            },
            "clz" => match bits {
                32 => alu::w1(|a, _| a.leading_zeros()),
                _ => alu::l_to_w(|a, _| a.leading_zeros()),
            },
            "popc" => match bits {
                32 => alu::w1(|a, _| a.count_ones()),
                _ => alu::l_to_w(|a, _| a.count_ones()),
            },
            "bfind" => {
                self.inst.imm = u64::from(shift_amount);
                match ty {
                    Ty::U(32) => alu::w1(|a, i| find_bit(a.into(), 32, i)),
                    Ty::S(32) => {
                        alu::w1(|a, i| find_bit((a ^ (a as i32 >> 31) as u32).into(), 32, i))
                    }
                    Ty::U(64) => alu::l_to_w(|a, i| find_bit(a, 64, i)),
                    _ => alu::l_to_w(|a, i| find_bit(a ^ (a as i64 >> 63) as u64, 64, i)),
                }
            }
            "sad" => match ty {
                Ty::U(32) => alu::w3(|a, b, c, _| a.abs_diff(b).wrapping_add(c)),
                Ty::S(32) => alu::w3(|a, b, c, _| (a as i32).abs_diff(b as i32).wrapping_add(c)),
                _ => return Err(format!("unsupported sad on {ty:?}")),
            },
            "copysign" => match ty {
                // The sign comes from the first operand.
                Ty::F32 => alu::w2(|a, b, _| b & 0x7fff_ffff | a & 0x8000_0000),
                _ => alu::l2(|a, b, _| b & !(1 << 63) | a & 1 << 63),
            },
            "dp4a" => alu::w3(dot4),
            _ => alu::w3(dot2),
        };
        Ok(self.alu(Kind::Integer, op))
    }

    fn special_function(&mut self, base: &str, s: &Statement) -> Decode<Op> {
        let approx = self.mods.take("approx");
        let flags = self.float_flags();
        let ty = self.mods.ty()?;
        let [d, a] = self.operands(s)?;
        self.inst.d = self.dst(&d, ty)?;
        self.inst.a = self.src(&a, ty)?;
        (self.inst.b, self.inst.c) = (self.inst.a, self.inst.a);
        if ty == Ty::F64 {
            if approx {
                // Only the upper halves of argument and result count; code refines the rest.
                return Ok(Op::Alu(match base {
                    "rcp" => alu::l1(|a, _| alu::approx_f64(a, |x| 1.0 / x)),
                    "rsqrt" => alu::l1(|a, _| alu::approx_f64(a, |x| 1.0 / x.sqrt())),
                    _ => return Err(format!("unsupported '{base}.approx.f64'")),
                }));
            }
            return Ok(Op::Alu(match base {
                "rcp" => alu::l1(|a, _| (1.0 / f64::from_bits(a)).to_bits()),
                "sqrt" => alu::l1(|a, _| f64::from_bits(a).sqrt().to_bits()),
                _ => return Err(format!("unsupported '{base}.f64'")),
            }));
        }
        if base == "tanh" {
            self.need(75)?;
        }
        if ty != Ty::F32 {
            self.need(if matches!(ty, Ty::BF16 | Ty::BF16x2) { 90 } else { 75 })?;
            let op = match base {
                "tanh" => HalfOp::Tanh,
                "ex2" => HalfOp::Ex2,
                _ => return Err(format!("unsupported '{base}' on {ty:?}")),
            };
            self.inst.imm = alu::pack_half(op, ty, flags);
            return Ok(Op::Alu(alu::w3(alu::half)));
        }
        let which = match base {
            "ex2" => Approx::Ex2,
            "lg2" => Approx::Lg2,
            "sin" => Approx::Sin,
            "cos" => Approx::Cos,
            "tanh" => Approx::Tanh,
            "rcp" => Approx::Rcp,
            "rsqrt" => Approx::Rsqrt,
            _ => Approx::Sqrt,
        };
        if !approx && !matches!(which, Approx::Rcp | Approx::Sqrt) {
            return Err(format!("'{base}' needs .approx"));
        }
        self.inst.imm = flags.pack() | (which as u64) << 8;
        Ok(Op::Alu(alu::w1(alu::approx)))
    }

    fn comparison(&mut self, base: &str, s: &Statement) -> Decode<Op> {
        match base {
            "selp" => {
                let ty = self.mods.ty()?;
                let [d, a, b, c] = self.operands(s)?;
                self.inst.d = self.dst(&d, ty)?;
                let (row, negated) = self.pred(&c)?;
                let (a, b) = if negated { (b, a) } else { (a, b) };
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.src(&b, ty)?;
                self.inst.c = row;
                let op = if ty.long() { alu::select_long } else { alu::select };
                return Ok(self.alu(Kind::Integer, op));
            }
            "slct" => {
                let ftz = self.mods.take("ftz");
                let ty = self.mods.ty()?;
                let by = self.mods.ty()?;
                let [d, a, b, c] = self.operands(s)?;
                if ty.bits() != 32 || by.bits() != 32 {
                    return Err(String::from("slct is modelled on 32 bits"));
                }
                self.inst.d = self.dst(&d, ty)?;
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.src(&b, ty)?;
                self.inst.c = self.src(&c, by)?;
                let op = match (by, ftz) {
                    (Ty::F32, true) => {
                        alu::w3(
                            |a, b, c, _| {
                                if float::flush(f32::from_bits(c)) >= 0.0 { a } else { b }
                            },
                        )
                    }
                    (Ty::F32, false) => {
                        alu::w3(|a, b, c, _| if f32::from_bits(c) >= 0.0 { a } else { b })
                    }
                    (Ty::S(32), false) => alu::w3(|a, b, c, _| if c as i32 >= 0 { a } else { b }),
                    _ => return Err(format!("unsupported slct by {by:?}")),
                };
                return Ok(self.alu(Kind::Integer, op));
            }
            "testp" => {
                let what = self
                    .mods
                    .one_of(&["finite", "infinite", "number", "notanumber", "normal", "subnormal"])
                    .ok_or("testp needs a property")?;
                let ty = self.mods.ty()?;
                if ty != Ty::F32 {
                    return Err(String::from("testp is modelled on f32"));
                }
                let [d, a] = self.operands(s)?;
                self.inst.d = self.pred_dst(&d)?;
                self.inst.d2 = SINK;
                self.inst.a = self.src(&a, ty)?;
                self.inst.b = self.inst.a;
                let op = match what {
                    "finite" => alu::compare(|a, _| f32::from_bits(a).is_finite()),
                    "infinite" => alu::compare(|a, _| f32::from_bits(a).is_infinite()),
                    "number" => alu::compare(|a, _| !f32::from_bits(a).is_nan()),
                    "notanumber" => alu::compare(|a, _| f32::from_bits(a).is_nan()),
                    "normal" => alu::compare(|a, _| f32::from_bits(a).is_normal()),
                    _ => alu::compare(|a, _| f32::from_bits(a).is_subnormal()),
                };
                return Ok(self.alu(Kind::Integer, op));
            }
            "set" => return self.set(s),
            _ => {}
        }
        let cmp = self.mods.one_of(&alu::COMPARISONS).ok_or("setp needs a comparison")?;
        let bool_op = self.mods.one_of(&["and", "or", "xor"]);
        let ftz = self.mods.take("ftz");
        let ty = self.mods.ty()?;
        if ftz && !ty.float() {
            return Err(String::from("a float modifier on an integer"));
        }
        if ty == Ty::BF16 {
            self.need(90)?;
        }
        let n = s.operands.len();
        if n != 3 + usize::from(bool_op.is_some()) {
            return Err(String::from("wrong number of operands"));
        }
        (self.inst.d, self.inst.d2) = match &s.operands[0] {
            Operand::Pair(p, q) => (self.pred_dst(p)?, self.pred_dst(q)?),
            p => (self.pred_dst(p)?, SINK),
        };
        self.inst.a = self.src(&s.operands[1], ty)?;
        self.inst.b = self.src(&s.operands[2], ty)?;
        if let Some(bool_op) = bool_op {
            let (row, negated) = self.pred(&s.operands[3])?;
            self.inst.c = row;
            self.inst.imm = match bool_op {
                "and" => setp::AND,
                "or" => setp::OR,
                _ => setp::XOR,
            } | if negated { setp::NOT_C } else { 0 };
        }
        let op = if ty.float() {
            match cmp {
                "eq" => float_compare!(ty, ftz, a, b, false, a == b),
                "ne" => float_compare!(ty, ftz, a, b, false, a != b),
                "lt" => float_compare!(ty, ftz, a, b, false, a < b),
                "le" => float_compare!(ty, ftz, a, b, false, a <= b),
                "gt" => float_compare!(ty, ftz, a, b, false, a > b),
                "ge" => float_compare!(ty, ftz, a, b, false, a >= b),
                "equ" => float_compare!(ty, ftz, a, b, true, a == b),
                "neu" => float_compare!(ty, ftz, a, b, true, a != b),
                "ltu" => float_compare!(ty, ftz, a, b, true, a < b),
                "leu" => float_compare!(ty, ftz, a, b, true, a <= b),
                "gtu" => float_compare!(ty, ftz, a, b, true, a > b),
                "geu" => float_compare!(ty, ftz, a, b, true, a >= b),
                "num" => float_compare!(ty, ftz, a, b, false, true),
                "nan" => float_compare!(ty, ftz, a, b, true, false),
                _ => return Err(format!("'.{cmp}' does not compare floats")),
            }
        } else {
            let unsigned = Ty::U(ty.bits() as u8);
            match cmp {
                "eq" => int_compare!(ty, a, b, a == b),
                "ne" => int_compare!(ty, a, b, a != b),
                "lt" => int_compare!(ty, a, b, a < b),
                "le" => int_compare!(ty, a, b, a <= b),
                "gt" => int_compare!(ty, a, b, a > b),
                "ge" => int_compare!(ty, a, b, a >= b),
                "lo" => int_compare!(unsigned, a, b, a < b),
                "ls" => int_compare!(unsigned, a, b, a <= b),
                "hi" => int_compare!(unsigned, a, b, a > b),
                "hs" => int_compare!(unsigned, a, b, a >= b),
                _ => return Err(format!("'.{cmp}' does not compare integers")),
            }
        };
        Ok(self.alu(Kind::Integer, op))
    }

    /// `set`: a comparison whose result is a number (or two, for pairs).
    fn set(&mut self, s: &Statement) -> Decode<Op> {
        let cmp = self.mods.one_of(&alu::COMPARISONS).ok_or("set needs a comparison")?;
        let index = alu::COMPARISONS.iter().position(|c| *c == cmp).unwrap_or(0);
        if self.mods.one_of(&["and", "or", "xor"]).is_some() {
            return Err(String::from("set with a predicate is not modelled"));
        }
        let ftz = self.mods.take("ftz");
        let (to, from) = (self.mods.ty()?, self.mods.ty()?);
        if to.long() || from.long() {
            return Err(String::from("set is modelled on up to 32 bits"));
        }
        if [to, from].iter().any(|ty| matches!(ty, Ty::BF16 | Ty::BF16x2)) {
            self.need(90)?;
        }
        let [d, a, b] = self.operands(s)?;
        self.inst.d = self.dst(&d, to)?;
        self.inst.a = self.src(&a, from)?;
        self.inst.b = self.src(&b, from)?;
        self.inst.imm =
            alu::pack_cvt(from, to, Flags { ftz, ..Flags::PLAIN }) | (index as u64) << 24;
        Ok(self.alu(Kind::Integer, alu::w2(alu::set)))
    }

    fn cvt(&mut self, s: &Statement) -> Decode<Op> {
        let integral = self.mods.one_of(&["rni", "rzi", "rmi", "rpi"]);
        let mut flags = self.float_flags();
        let pair = |name: &str| Fp8::parse(name.strip_suffix("x2")?);
        if self.mods.take("satfinite") {
            let to =
                self.mods.take_as(pair).ok_or(".satfinite is modelled to floats of 8 bits only")?;
            return self.narrow_fp8(s, to, flags);
        }
        let to = self.mods.ty()?;
        if let Some(from) = self.mods.take_as(pair) {
            return self.widen_fp8(s, (to, from), flags);
        }
        let from = self.mods.ty()?;
        if let Some(mode) = integral {
            flags.integral = true;
            flags.round = match mode {
                "rni" => Round::Nearest,
                "rzi" => Round::Zero,
                "rmi" => Round::Down,
                _ => Round::Up,
            };
        }
        // To, from, and from f32 to a short format: see "Target ISA Notes" of the instruction.
        let brain = to == Ty::BF16 && from != Ty::F32 || from == Ty::BF16 && to != Ty::F32;
        if brain || from == Ty::BF16 && flags.ftz || to == Ty::TF32 && flags.round != Round::Away {
            self.need(90)?;
        } else if matches!(to, Ty::F16x2 | Ty::BF16 | Ty::BF16x2 | Ty::TF32)
            || from == Ty::BF16
            || flags.relu
        {
            self.need(80)?;
        }
        if matches!(to, Ty::F16x2 | Ty::BF16x2) {
            if from != Ty::F32 || s.operands.len() != 3 {
                return Err(String::from("a pair is converted from two f32"));
            }
            let [d, a, b] = self.operands(s)?;
            let one = if to == Ty::F16x2 { Ty::F16 } else { Ty::BF16 };
            self.inst.d = self.dst(&d, to)?;
            self.inst.a = self.src(&a, from)?;
            self.inst.b = self.src(&b, from)?;
            self.inst.imm = alu::pack_cvt(from, one, flags);
            // The first source becomes the upper half.
            let op = alu::w2(|a, b, i| {
                (alu::convert(a.into(), i) as u32) << 16 | alu::convert(b.into(), i) as u32
            });
            return Ok(self.alu(Kind::Integer, op));
        }
        if matches!(from, Ty::F16x2 | Ty::BF16x2 | Ty::Pred) || to == Ty::Pred {
            return Err(format!("unsupported conversion from {from:?} to {to:?}"));
        }
        if from.float() && !to.float() && !flags.integral {
            return Err(String::from("a conversion to an integer needs a rounding"));
        }
        let [d, a] = self.operands(s)?;
        // Registers may be wider than the types: the instruction's class is the register's.
        let (d_long, d_bits) = match &d {
            Operand::Reg(reg) => (reg.class == Class::Long, u32::from(reg.bits)),
            _ => (to.long(), to.bits()),
        };
        let a_long = match &a {
            Operand::Reg(reg) => reg.class == Class::Long,
            _ => from.long(),
        };
        let register = |long: bool| if long { Ty::U(64) } else { Ty::U(32) };
        self.inst.d = self.dst(&d, register(d_long))?;
        self.inst.a = match &a {
            Operand::Reg(_) => self.src(&a, register(a_long))?,
            _ => self.src(&a, from)?,
        };
        self.inst.imm = alu::pack_cvt(from, to, flags) | u64::from(d_bits) << 32;
        let plain = flags == Flags::PLAIN;
        let integers =
            matches!((from, to), (Ty::U(_) | Ty::S(_), Ty::U(_) | Ty::S(_))) && !flags.sat;
        let op: Alu = match (from, to, a_long, d_long) {
            (Ty::U(32), _, false, true) if integers => alu::w_to_l(|a, _| a.into()),
            (Ty::S(32), _, false, true) if integers && to.bits() == 64 => {
                alu::w_to_l(|a, _| a as i32 as u64)
            }
            (_, Ty::U(32) | Ty::S(32), true, false) if integers && from.bits() == 64 => {
                alu::l_to_w(|a, _| a as u32)
            }
            (Ty::U(16), Ty::U(32) | Ty::S(32), false, false) if integers => {
                alu::w1(|a, _| a & 0xffff)
            }
            (Ty::S(32), Ty::F32, false, false) if plain => {
                alu::w1(|a, _| (a as i32 as f32).to_bits())
            }
            (Ty::U(32), Ty::F32, false, false) if plain => alu::w1(|a, _| (a as f32).to_bits()),
            (Ty::BF16, Ty::F32, false, false) if plain => alu::w1(|a, _| a << 16),
            (_, _, false, false) => alu::w1(|a, i| {
                alu::extend(alu::convert(a.into(), i), (i >> 32) as u32, false) as u32
            }),
            (_, _, false, true) => alu::w_to_l(|a, i| alu::convert(a.into(), i)),
            (_, _, true, false) => {
                alu::l_to_w(|a, i| alu::extend(alu::convert(a, i), (i >> 32) as u32, false) as u32)
            }
            (_, _, true, true) => alu::l1(alu::convert),
        };
        Ok(self.alu(Kind::Integer, op))
    }

    /// Two floats of eight bits, of f32 or of the halves of a word.
    fn narrow_fp8(&mut self, s: &Statement, to: Fp8, flags: Flags) -> Decode<Op> {
        self.need(89)?;
        let from = self.mods.ty()?;
        if flags != (Flags { relu: flags.relu, ..Flags::PLAIN }) {
            return Err(String::from("only .rn and .relu are modelled beside .satfinite"));
        }
        self.inst.imm = u64::from(to == Fp8::E5M2) | u64::from(flags.relu) << 1;
        fn pair(upper: f64, lower: f64, imm: u64) -> u32 {
            let to = if imm & 1 == 0 { Fp8::E4M3 } else { Fp8::E5M2 };
            let cut = |x: f64| if imm & 2 != 0 && x < 0.0 { 0.0 } else { x };
            u32::from(to.narrow(cut(upper))) << 8 | u32::from(to.narrow(cut(lower)))
        }
        let op = match from {
            Ty::F32 => {
                let [d, a, b] = self.operands(s)?;
                self.inst.d = self.dst(&d, Ty::U(16))?;
                self.inst.a = self.src(&a, from)?;
                self.inst.b = self.src(&b, from)?;
                alu::w2(|a, b, i| pair(f32::from_bits(a).into(), f32::from_bits(b).into(), i))
            }
            Ty::F16x2 => {
                let [d, a] = self.operands(s)?;
                self.inst.d = self.dst(&d, Ty::U(16))?;
                self.inst.a = self.src(&a, from)?;
                alu::w1(|a, i| pair(float::widen(a >> 16, F16), float::widen(a & 0xffff, F16), i))
            }
            _ => return Err(format!("unsupported conversion from {from:?} to {to:?}")),
        };
        Ok(self.alu(Kind::Integer, op))
    }

    /// Two halves of two floats of eight bits.
    fn widen_fp8(&mut self, s: &Statement, (to, from): (Ty, Fp8), flags: Flags) -> Decode<Op> {
        self.need(89)?;
        if to != Ty::F16x2 || flags != (Flags { relu: flags.relu, ..Flags::PLAIN }) {
            return Err(format!("unsupported conversion from {from:?} to {to:?}"));
        }
        let [d, a] = self.operands(s)?;
        self.inst.d = self.dst(&d, to)?;
        self.inst.a = self.src(&a, Ty::U(16))?;
        self.inst.imm = u64::from(from == Fp8::E5M2) | u64::from(flags.relu) << 1;
        let op = alu::w1(|a, imm| {
            let from = if imm & 1 == 0 { Fp8::E4M3 } else { Fp8::E5M2 };
            let half = |byte: u32| {
                let x = from.widen(byte as u8);
                let x = if imm & 2 != 0 && x < 0.0 { 0.0 } else { x };
                float::round_to(x, F16, Round::Nearest)
            };
            half(a >> 8) << 16 | half(a)
        });
        Ok(self.alu(Kind::Integer, op))
    }

    fn space(&mut self) -> Option<Target> {
        Some(
            match self.mods.one_of(&[
                "global",
                "shared",
                "shared::cta",
                "local",
                "param",
                "param::func",
                "param::entry",
                "const",
            ])? {
                "global" | "const" => Target::Global,
                "shared" | "shared::cta" => Target::Shared,
                "local" => Target::Local,
                _ => Target::Param,
            },
        )
    }

    fn cvta(&mut self, s: &Statement) -> Decode<Op> {
        let to = self.mods.take("to");
        let target = self.space().ok_or("cvta needs a space")?;
        let ty = self.mods.ty()?;
        if !ty.long() {
            return Err(String::from("addresses have 64 bits"));
        }
        let [d, a] = self.operands(s)?;
        self.inst.d = self.dst(&d, ty)?;
        self.inst.a = self.src(&a, ty)?;
        self.inst.imm = match target {
            Target::Shared => SHARED_WINDOW,
            Target::Local => LOCAL_WINDOW,
            // Addresses of device memory and parameters are generic ones.
            _ => 0,
        };
        let op = if to {
            alu::l1(|a, window| a.wrapping_sub(window))
        } else {
            alu::l1(|a, window| a.wrapping_add(window))
        };
        Ok(self.alu(Kind::Integer, op))
    }

    /// Takes the modifiers that only concern caches; `true` when a policy operand follows.
    fn cache_modifiers(&mut self) -> bool {
        let hint = self.mods.take("L2::cache_hint");
        self.mods.take_prefix("L1::");
        while self.mods.take_prefix("L2::") {}
        self.mods.one_of(&["ca", "cg", "cs", "lu", "cv", "wb", "wt"]);
        hint
    }

    fn load_store(&mut self, s: &Statement, store: bool) -> Decode<Op> {
        let volatile = self.mods.take("volatile");
        let ordered = self.mods.one_of(&["relaxed", "acquire", "release"]);
        self.mods.take("weak");
        self.mods.take("mmio");
        self.mods.one_of(&["cta", "cluster", "gpu", "sys"]);
        let space = self.space();
        let nc = self.mods.take("nc");
        if nc && (store || space != Some(Target::Global)) {
            return Err(String::from(".nc needs a load from global memory"));
        }
        let hint = self.cache_modifiers();
        let count = match self.mods.one_of(&["v2", "v4"]) {
            None => 1,
            Some("v2") => 2,
            Some(_) => 4,
        };
        let ty = self.mods.ty()?;
        let expected = 2 + usize::from(hint);
        if s.operands.len() != expected {
            return Err(format!("{expected} operands expected"));
        }
        let (mem, data) = if store { (0, 1) } else { (1, 0) };
        let (address, symbol) = self.address(&s.operands[mem])?;
        let target = match (space, symbol) {
            // Parameters of functions live in the frame.
            (Some(Target::Param), Some(found)) => found,
            (Some(space), Some(found)) if space != found => {
                return Err(format!("the symbol is in {found:?} memory"));
            }
            (Some(space), _) => space,
            // A generic access to a symbol uses its generic address.
            (None, Some(found)) => found,
            (None, None) => Target::Generic,
        };
        if store && target == Target::Param {
            return Err(String::from("kernel parameters are read-only"));
        }
        let size = ty.bits() / 8;
        if size * count > 16 {
            return Err(String::from("an access of more than 16 bytes"));
        }
        let items = match &s.operands[data] {
            Operand::Vector(items) => items.clone(),
            other => vec![other.clone()],
        };
        if items.len() != count as usize {
            return Err(format!("{count} registers expected"));
        }
        let long = ty.long()
            || items.iter().any(|i| matches!(i, Operand::Reg(r) if r.class == Class::Long));
        let register = if long { Ty::U(64) } else { ty };
        let mut regs = Vec::new();
        let mut reg_bits = 32;
        for item in &items {
            if let Operand::Reg(reg) = item {
                reg_bits = u32::from(reg.bits);
            }
            regs.push(match item {
                Operand::Sink if !store => None,
                // Narrow types fit wide registers.
                Operand::Reg(reg) if reg.class != Class::Pred => Some(self.reg_row(*reg, !store)),
                _ if store => Some(self.src(item, register)?),
                other => return Err(format!("{other:?} cannot be loaded")),
            });
        }
        let mixed =
            items.iter().any(|i| matches!(i, Operand::Reg(r) if (r.class == Class::Long) != long));
        if mixed {
            return Err(String::from("register widths do not fit the access"));
        }
        self.inst.kind = match target {
            Target::Shared => Kind::Shared,
            Target::Global | Target::Generic => Kind::Global,
            Target::Local | Target::Param => Kind::Local,
        };
        let access = Box::new(Access {
            target,
            address,
            size,
            signed: matches!(ty, Ty::S(_)),
            regs,
            long,
            reg_bits,
            strong: volatile || ordered.is_some(),
            nc,
        });
        Ok(if store { Op::Store(access) } else { Op::Load(access) })
    }

    fn atomic(&mut self, reduction: bool, s: &Statement) -> Decode<Op> {
        let semantics = self.mods.one_of(&["relaxed", "acquire", "release", "acq_rel"]);
        self.mods.one_of(&["cta", "cluster", "gpu", "sys"]);
        let target = self.space().unwrap_or(Target::Generic);
        let op = self
            .mods
            .one_of(&["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"])
            .ok_or("an operation is missing")?;
        self.mods.take("noftz");
        let hint = self.cache_modifiers();
        let ty = self.mods.ty()?;
        let op = match op {
            "add" => AtomOp::Add,
            "min" => AtomOp::Min,
            "max" => AtomOp::Max,
            "and" => AtomOp::And,
            "or" => AtomOp::Or,
            "xor" => AtomOp::Xor,
            "exch" => AtomOp::Exch,
            "cas" => AtomOp::Cas,
            "inc" => AtomOp::Inc,
            _ => AtomOp::Dec,
        };
        let supported = match op {
            AtomOp::Add => ty != Ty::Pred && ty.bits() >= 16,
            AtomOp::Min | AtomOp::Max => matches!(ty, Ty::U(32 | 64) | Ty::S(32 | 64)),
            AtomOp::Inc | AtomOp::Dec => ty == Ty::U(32),
            AtomOp::Cas => matches!(ty, Ty::U(16 | 32 | 64)),
            _ => matches!(ty, Ty::U(32 | 64)),
        };
        if !supported {
            return Err(format!("unsupported atomic {op:?} on {ty:?}"));
        }
        if matches!(ty, Ty::BF16 | Ty::BF16x2) {
            self.need(90)?;
        } else if ty == Ty::F16 {
            self.need(70)?;
        }
        let first = usize::from(!reduction);
        let expected = first + 2 + usize::from(op == AtomOp::Cas) + usize::from(hint);
        if s.operands.len() != expected {
            return Err(format!("{expected} operands expected"));
        }
        let (address, symbol) = self.address(&s.operands[first])?;
        let target = if target == Target::Generic { symbol.unwrap_or(target) } else { target };
        let dst = match reduction {
            true => None,
            false if s.operands[0] == Operand::Sink => None,
            false => Some(self.dst(&s.operands[0], ty)?),
        };
        let b = self.src(&s.operands[first + 1], ty)?;
        let c = if op == AtomOp::Cas { self.src(&s.operands[first + 2], ty)? } else { b };
        self.inst.kind = if target == Target::Shared { Kind::Shared } else { Kind::Global };
        let fenced = matches!(semantics, Some("acquire" | "release" | "acq_rel"));
        Ok(Op::Atomic(Box::new(Atomic { target, address, op, ty, dst, b, c, fenced })))
    }

    fn target_of(&mut self, operand: &Operand) -> Decode<u32> {
        let Operand::Name(name, 0, scope) = operand else {
            return Err(format!("{operand:?} is not a label"));
        };
        self.label(name, *scope)
    }

    fn label(&self, name: &str, scope: usize) -> Decode<u32> {
        let statement =
            self.function.label(name, scope).ok_or_else(|| format!("unknown label '{name}'"))?;
        Ok(self.frame().at[statement])
    }

    fn control(&mut self, base: &str, s: &Statement) -> Decode<Option<Op>> {
        self.mods.take("uni");
        let mut more = None;
        self.inst.op = match base {
            "bra" => {
                let [label] = self.operands(s)?;
                Op::Bra(self.target_of(&label)?)
            }
            "brx" => {
                self.mods.take("idx");
                let [index, table] = self.operands(s)?;
                self.inst.a = self.src(&index, Ty::U(32))?;
                let Operand::Name(name, _, scope) = &table else {
                    return Err(String::from("a branch table is missing"));
                };
                let labels = self.function.table(name, *scope).ok_or("unknown branch table")?;
                let targets: Decode<Vec<u32>> =
                    labels.iter().map(|l| self.label(l, *scope)).collect();
                Op::Brx(targets?)
            }
            "call" => {
                let name = callee(s)?;
                let module = self.linker.module;
                let function =
                    module.functions.iter().find(|f| f.name == name).ok_or("unknown function")?;
                if name == ASSERT {
                    // A call is two instructions; the second is never reached.
                    self.inst.op = Op::Trap;
                    return Ok(Some(Op::Nop));
                }
                let at = s
                    .operands
                    .iter()
                    .position(|o| matches!(o, Operand::Name(..)))
                    .ok_or("no function")?;
                let list = |at: Option<usize>| match at.and_then(|at| s.operands.get(at)) {
                    Some(Operand::List(items)) => items.as_slice(),
                    _ => &[],
                };
                let results = list(at.checked_sub(1));
                let arguments = list(Some(at + 1));
                if results.len() != function.returns.len()
                    || arguments.len() != function.params.len()
                {
                    return Err(String::from("the arguments do not fit the function"));
                }
                let mut back = self.copies(results, function, &function.returns)?;
                for copy in &mut back {
                    *copy = (copy.1, copy.0, copy.2);
                }
                let copies = self.copies(arguments, function, &function.params)?;
                let callee = self.linker.frame_of(name)?;
                more = Some(Op::CopyBack(back));
                Op::Call(Box::new(Call { target: callee.first, link: callee.link, copies }))
            }
            "ret" if self.function.entry => Op::Exit,
            "ret" => Op::Ret(self.frame().link),
            "exit" => Op::Exit,
            _ => Op::Trap,
        };
        Ok(more)
    }

    /// (address in this frame, address in the callee's frame, bytes) of each parameter.
    fn copies(
        &self,
        items: &[Operand],
        callee: &Function,
        formals: &[usize],
    ) -> Decode<Vec<(u32, u32, u32)>> {
        let mut out = Vec::new();
        for (item, &formal) in items.iter().zip(formals) {
            let Operand::Name(name, 0, scope) = item else {
                return Err(String::from("call parameters must be .param variables"));
            };
            let (Target::Local, mine) = self.symbol(name, *scope)? else {
                return Err(format!("'{name}' is not a local parameter"));
            };
            let Place::Local(theirs) = self.linker.frame_of(callee.name)?.places[formal] else {
                return Err(String::from("a kernel cannot be called"));
            };
            out.push((mine as u32, theirs, callee.vars[formal].size as u32));
        }
        Ok(out)
    }

    fn barrier(&mut self, s: &Statement) -> Decode<Op> {
        if self.mods.take("warp") {
            self.mods.take("sync");
            let [mask] = self.operands(s)?;
            self.inst.a = self.src(&mask, Ty::U(32))?;
            return Ok(Op::WarpSync);
        }
        if self.mods.one_of(&["cluster", "cluster::cta"]).is_some() {
            return Err(String::from("cluster barriers are not modelled"));
        }
        self.mods.take("cta");
        let what = self.mods.one_of(&["sync", "arrive", "red"]).ok_or("bar needs an action")?;
        self.mods.take("aligned");
        let ops = &s.operands;
        let word = Ty::U(32);
        if what == "red" {
            let reduction = self.mods.one_of(&["popc", "and", "or"]).ok_or("no reduction")?;
            let ty = self.mods.ty()?;
            let n = ops.len();
            if n < 3 {
                return Err(String::from("operands are missing"));
            }
            let kind = match reduction {
                "popc" => BarKind::Popc,
                "and" => BarKind::And,
                _ => BarKind::Or,
            };
            let dst = if ty == Ty::Pred { self.pred_dst(&ops[0])? } else { self.dst(&ops[0], ty)? };
            let id = self.src(&ops[1], word)?;
            let count = if n == 4 { Some(self.src(&ops[2], word)?) } else { None };
            let pred = self.pred(&ops[n - 1])?;
            return Ok(Op::Bar(Barrier { kind, id, count, dst, pred }));
        }
        let kind = if what == "sync" { BarKind::Sync } else { BarKind::Arrive };
        let id = self.src(ops.first().ok_or("a barrier is missing")?, word)?;
        let count = match ops.get(1) {
            Some(count) => Some(self.src(count, word)?),
            None => None,
        };
        if kind == BarKind::Arrive && count.is_none() {
            return Err(String::from("bar.arrive needs a thread count"));
        }
        Ok(Op::Bar(Barrier { kind, id, count, dst: 0, pred: (ALWAYS, false) }))
    }

    fn warp(&mut self, base: &str, s: &Statement) -> Decode<Op> {
        let word = Ty::U(32);
        if base != "activemask" && !self.mods.take("sync") {
            return Err(String::from("only the .sync form exists on these architectures"));
        }
        match base {
            "activemask" => {
                self.mods.ty()?;
                let [d] = self.operands(s)?;
                self.inst.d = self.dst(&d, word)?;
                Ok(Op::ActiveMask)
            }
            "shfl" => {
                let mode = match self.mods.one_of(&["up", "down", "bfly", "idx"]) {
                    Some("up") => Shuffle::Up,
                    Some("down") => Shuffle::Down,
                    Some("bfly") => Shuffle::Bfly,
                    Some(_) => Shuffle::Idx,
                    None => return Err(String::from("shfl needs a mode")),
                };
                self.mods.ty()?;
                let [d, a, b, c, mask] = self.operands(s)?;
                (self.inst.d, self.inst.d2) = match &d {
                    Operand::Pair(d, p) => (self.dst(d, word)?, self.pred_dst(p)?),
                    d => (self.dst(d, word)?, SINK),
                };
                self.inst.a = self.src(&a, word)?;
                self.inst.b = self.src(&b, word)?;
                self.inst.c = self.src(&c, word)?;
                self.inst.imm = self.src(&mask, word)?.into();
                Ok(Op::Shuffle(mode))
            }
            "vote" => {
                let mode = match self.mods.one_of(&["all", "any", "uni", "ballot"]) {
                    Some("all") => Vote::All,
                    Some("any") => Vote::Any,
                    Some("uni") => Vote::Uni,
                    Some(_) => Vote::Ballot,
                    None => return Err(String::from("vote needs a mode")),
                };
                self.mods.ty()?;
                let [d, a, mask] = self.operands(s)?;
                self.inst.d =
                    if mode == Vote::Ballot { self.dst(&d, word)? } else { self.pred_dst(&d)? };
                let (row, negated) = self.pred(&a)?;
                self.inst.a = row;
                self.inst.imm = self.src(&mask, word)?.into();
                Ok(Op::Vote(mode, negated))
            }
            "match" => {
                self.need(70)?;
                let all = self.mods.one_of(&["any", "all"]) == Some("all");
                let ty = self.mods.ty()?;
                let [d, a, mask] = self.operands(s)?;
                (self.inst.d, self.inst.d2) = match &d {
                    Operand::Pair(d, p) => (self.dst(d, word)?, self.pred_dst(p)?),
                    d => (self.dst(d, word)?, SINK),
                };
                self.inst.a = self.src(&a, ty)?;
                self.inst.imm = self.src(&mask, word)?.into();
                Ok(Op::Match(all, ty.long()))
            }
            "redux" => {
                self.need(80)?;
                let op = self
                    .mods
                    .one_of(&["add", "min", "max", "and", "or", "xor"])
                    .ok_or("redux needs an operation")?;
                let ty = self.mods.ty()?;
                let signed = match ty {
                    Ty::S(32) => true,
                    Ty::U(32) => false,
                    _ => return Err(format!("redux on {ty:?} is not modelled")),
                };
                let [d, a, mask] = self.operands(s)?;
                self.inst.d = self.dst(&d, word)?;
                self.inst.a = self.src(&a, word)?;
                self.inst.imm = self.src(&mask, word)?.into();
                Ok(Op::Redux(match op {
                    "add" => Redux::Add,
                    "min" => Redux::Min(signed),
                    "max" => Redux::Max(signed),
                    "and" => Redux::And,
                    "or" => Redux::Or,
                    _ => Redux::Xor,
                }))
            }
            _ => {
                self.need(90)?;
                let [d, mask] = self.operands(s)?;
                let Operand::Pair(d, p) = &d else {
                    return Err(String::from("elect needs d|p"));
                };
                self.inst.d = self.dst(d, word)?;
                self.inst.d2 = self.pred_dst(p)?;
                self.inst.imm = self.src(&mask, word)?.into();
                Ok(Op::Elect)
            }
        }
    }

    fn cp_async(&mut self, s: &Statement) -> Decode<Op> {
        if !self.mods.take("async") {
            return Err(String::from("unknown instruction"));
        }
        self.need(80)?;
        self.inst.kind = Kind::Global;
        if self.mods.take("commit_group") {
            return Ok(Op::CommitGroup);
        }
        if self.mods.take("wait_all") {
            return Ok(Op::WaitAll);
        }
        if self.mods.take("wait_group") {
            let [Operand::Int(n)] = self.operands(s)? else {
                return Err(String::from("wait_group needs a constant"));
            };
            return Ok(Op::WaitGroup(n as u32));
        }
        let cache_global = match self.mods.one_of(&["ca", "cg"]) {
            Some(level) => level == "cg",
            None => return Err(String::from("not modelled")),
        };
        if self.mods.one_of(&["shared", "shared::cta"]).is_none() || !self.mods.take("global") {
            return Err(String::from("cp.async copies from .global to .shared"));
        }
        let hint = self.cache_modifiers();
        let n = s.operands.len() - usize::from(hint);
        if !(3..=4).contains(&n) {
            return Err(String::from("wrong number of operands"));
        }
        let (dst, _) = self.address(&s.operands[0])?;
        let (src, _) = self.address(&s.operands[1])?;
        let Operand::Int(size) = s.operands[2] else {
            return Err(String::from("the copy size must be a constant"));
        };
        if !matches!((size, cache_global), (4 | 8 | 16, false) | (16, true)) {
            return Err(format!("a copy of {size} bytes"));
        }
        let (mut src_size, mut ignore) = (None, None);
        if n == 4 {
            match &s.operands[3] {
                Operand::Reg(reg) if reg.class == Class::Pred => {
                    ignore = Some(self.pred(&s.operands[3])?);
                }
                Operand::Not(_) => ignore = Some(self.pred(&s.operands[3])?),
                other => src_size = Some(self.src(other, Ty::U(32))?),
            }
        }
        Ok(Op::CpAsync(Box::new(CpAsync { dst, src, size: size as u32, src_size, ignore })))
    }

    fn matrix(&mut self, store: bool, s: &Statement) -> Decode<Op> {
        self.need(if store { 90 } else { 75 })?;
        self.inst.kind = Kind::Shared;
        if !self.mods.take("sync") || !self.mods.take("aligned") || !self.mods.take("m8n8") {
            return Err(String::from("only .sync.aligned.m8n8 is modelled"));
        }
        let count = match self.mods.one_of(&["x1", "x2", "x4"]) {
            Some("x1") => 1,
            Some("x2") => 2,
            Some(_) => 4,
            None => return Err(String::from(".x1, .x2 or .x4 is missing")),
        };
        let trans = self.mods.take("trans");
        let generic = self.space().is_none();
        if self.mods.ty()? != Ty::U(16) {
            return Err(String::from("only .b16 is modelled"));
        }
        let [first, second] = self.operands(s)?;
        let (mem, data) = if store { (first, second) } else { (second, first) };
        let (address, _) = self.address(&mem)?;
        let items = match data {
            Operand::Vector(items) => items,
            other => vec![other],
        };
        if items.len() != count {
            return Err(format!("{count} registers expected"));
        }
        let regs: Decode<Vec<u32>> = items
            .iter()
            .map(|i| if store { self.src(i, Ty::U(32)) } else { self.dst(i, Ty::U(32)) })
            .collect();
        Ok(Op::Matrix(Box::new(Matrix { store, trans, address, regs: regs?, generic })))
    }
}

fn wider(ty: Ty) -> Decode<Ty> {
    Ok(match ty {
        Ty::U(n @ (16 | 32)) => Ty::U(n * 2),
        Ty::S(n @ (16 | 32)) => Ty::S(n * 2),
        other => return Err(format!("{other:?} cannot be widened")),
    })
}

trait MultiplyHigh {
    fn high(self, other: Self) -> Self;
}

macro_rules! multiply_high {
    ($($ty:ty, $wide:ty);*) => {$(
        impl MultiplyHigh for $ty {
            #[inline(always)]
            fn high(self, other: Self) -> Self {
                (<$wide>::from(self).wrapping_mul(<$wide>::from(other)) >> <$ty>::BITS) as $ty
            }
        }
    )*};
}
multiply_high!(u16, u32; i16, i32; u32, u64; i32, i64; u64, u128; i64, i128);

#[inline(always)]
fn multiply_high<T: MultiplyHigh>(a: T, b: T) -> T {
    a.high(b)
}

/// The operand of `neg.f32` and `abs.f32`, flushed if asked.
#[inline(always)]
fn sign_op(a: u32, imm: u64) -> u32 {
    if imm >> 3 & 1 == 1 { float::flush(f32::from_bits(a)).to_bits() } else { a }
}

fn funnel_left(low: u32, high: u32, n: u32) -> u32 {
    ((u64::from(high) << 32 | u64::from(low)) << n >> 32) as u32
}

fn funnel_right(low: u32, high: u32, n: u32) -> u32 {
    ((u64::from(high) << 32 | u64::from(low)) >> n) as u32
}

fn find_bit(a: u64, bits: u32, shift_amount: u64) -> u32 {
    if a == 0 {
        return u32::MAX;
    }
    let position = 63 - a.leading_zeros();
    if shift_amount == 1 { bits - 1 - position } else { position }
}

fn dot4(a: u32, b: u32, c: u32, imm: u64) -> u32 {
    let byte = |x: u32, i: u32, signed: bool| {
        let x = (x >> (8 * i)) as u8;
        if signed { i32::from(x as i8) } else { i32::from(x) }
    };
    (0..4).fold(c, |sum, i| {
        sum.wrapping_add((byte(a, i, imm & 1 == 1) * byte(b, i, imm & 2 == 2)) as u32)
    })
}

fn dot2(a: u32, b: u32, c: u32, imm: u64) -> u32 {
    let half = |x: u32, i: u32, signed: bool| {
        let x = (x >> (16 * i)) as u16;
        if signed { i32::from(x as i16) } else { i32::from(x) }
    };
    let byte = |x: u32, i: u32, signed: bool| {
        let x = (x >> (8 * i)) as u8;
        if signed { i32::from(x as i8) } else { i32::from(x) }
    };
    let first = if imm & 4 == 4 { 2 } else { 0 };
    (0..2).fold(c, |sum, i| {
        let product = half(a, i, imm & 1 == 1).wrapping_mul(byte(b, i + first, imm & 2 == 2));
        sum.wrapping_add(product as u32)
    })
}

fn pack4(r: &mut alu::Regs, i: &Inst, mask: u32) {
    let rows = [i.a, i.b, i.imm as u32, (i.imm >> 32) as u32].map(|row| &r.w[row as usize]);
    let out = std::array::from_fn(|lane| {
        rows.iter().rev().fold(0, |out, row| out << 8 | row[lane] & 0xff)
    });
    alu::put(&mut r.w[i.d as usize], &out, mask);
}

fn pack4_long(r: &mut alu::Regs, i: &Inst, mask: u32) {
    let rows = [i.a, i.b, i.imm as u32, (i.imm >> 32) as u32].map(|row| &r.w[row as usize]);
    let out = std::array::from_fn(|lane| {
        rows.iter().rev().fold(0, |out, row| out << 16 | u64::from(row[lane] & 0xffff))
    });
    alu::put_long(&mut r.l[i.d as usize], &out, mask);
}

fn unpack(r: &mut alu::Regs, i: &Inst, mask: u32) {
    let a = r.w[i.a as usize];
    let bits = i.imm as u32;
    for (part, row) in (0..32 / bits).zip([i.d, i.d2, i.b, i.c]) {
        let out = a.map(|a| alu::extend(u64::from(a >> (bits * part)), bits, false) as u32);
        alu::put(&mut r.w[row as usize], &out, mask);
    }
}

fn unpack_long(r: &mut alu::Regs, i: &Inst, mask: u32) {
    let a = r.l[i.a as usize];
    let bits = i.imm as u32;
    for (part, row) in (0..64 / bits).zip([i.d, i.d2, i.b, i.c]) {
        let out = a.map(|a| alu::extend(a >> (bits * part), bits, false) as u32);
        alu::put(&mut r.w[row as usize], &out, mask);
    }
}

fn insert(r: &mut alu::Regs, i: &Inst, mask: u32) {
    let [a, b, pos, len] = [i.a, i.b, i.c, i.imm as u32].map(|row| &r.w[row as usize]);
    let out = std::array::from_fn(|l| {
        alu::bit_field_insert(a[l].into(), b[l].into(), pos[l], len[l], 32) as u32
    });
    alu::put(&mut r.w[i.d as usize], &out, mask);
}

fn insert_long(r: &mut alu::Regs, i: &Inst, mask: u32) {
    let (a, b) = (&r.l[i.a as usize], &r.l[i.b as usize]);
    let (pos, len) = (&r.w[i.c as usize], &r.w[i.imm as usize]);
    let out = std::array::from_fn(|l| alu::bit_field_insert(a[l], b[l], pos[l], len[l], 64));
    alu::put_long(&mut r.l[i.d as usize], &out, mask);
}

fn special_register(name: &str) -> Option<Special> {
    let name = name.strip_prefix('%')?;
    let axis = |axis: &str| match axis {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    if let Some((base, component)) = name.split_once('.') {
        let component = axis(component)?;
        return Some(match base {
            "tid" => Special::Tid(component),
            "ntid" => Special::Ntid(component),
            "ctaid" | "clusterid" => Special::Ctaid(component),
            "nctaid" | "nclusterid" => Special::Nctaid(component),
            "cluster_ctaid" => Special::Zero,
            "cluster_nctaid" => Special::One,
            _ => return None,
        });
    }
    Some(match name {
        "laneid" => Special::Lane,
        "warpid" => Special::Warp,
        "nwarpid" => Special::Warps,
        "smid" => Special::Sm,
        "nsmid" => Special::Sms,
        "lanemask_eq" => Special::LaneMask(0),
        "lanemask_le" => Special::LaneMask(1),
        "lanemask_lt" => Special::LaneMask(2),
        "lanemask_ge" => Special::LaneMask(3),
        "lanemask_gt" => Special::LaneMask(4),
        "dynamic_smem_size" => Special::DynamicShared,
        "total_smem_size" => Special::TotalShared,
        "cluster_ctarank" => Special::Zero,
        "cluster_nctarank" | "is_explicit_cluster" => Special::One,
        _ => return None,
    })
}
