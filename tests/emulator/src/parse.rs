//! PTX text to a syntax tree, with registers resolved and scopes kept.
//!
//! Nothing here knows what an instruction means: an opcode is a string and its operands are
//! trees. What the text says about CUDA source lines (`.file`, `.loc`) is kept per instruction.
//! Names, opcodes and instructions are borrowed from the text: it has megabytes, and every process
//! reads it.

use std::collections::HashMap;

/// A failure to read the text, with the line on which it happened.
pub type ParseResult<T> = Result<T, String>;

/// Where an instruction comes from in the CUDA source.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loc {
    /// Index into [`Module::files`]; 0 when unknown.
    pub file: u32,
    /// Line in that file.
    pub line: u32,
    /// File and line of the call, when the instruction was inlined.
    pub inlined_at: Option<(u32, u32)>,
}

/// The width class that decides where a register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// One bit per lane.
    Pred,
    /// 8, 16 and 32 bits: a row of 32-bit words.
    Word,
    /// 64 bits: a row of 64-bit words.
    Long,
}

/// A register of one function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reg {
    /// Which register file.
    pub class: Class,
    /// Declared width in bits (1 for predicates).
    pub bits: u8,
    /// Number within its class and function.
    pub index: u32,
}

/// State spaces in which variables are declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Device memory.
    Global,
    /// Read-only device memory.
    Const,
    /// Memory of a block.
    Shared,
    /// Memory of a thread.
    Local,
    /// Parameters of kernels and functions.
    Param,
}

/// One operand as written.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand<'t> {
    /// A register.
    Reg(Reg),
    /// `!%p`.
    Not(Reg),
    /// An integer.
    Int(i128),
    /// `0f…`: the bits of an f32.
    F32(u32),
    /// `0d…` or a decimal fraction: an f64.
    F64(f64),
    /// A label, variable or function, plus an offset; with the scope in which it was used.
    Name(&'t str, i64, usize),
    /// `%tid.x` and its like.
    Special(&'t str),
    /// `{a, b}`.
    Vector(Vec<Operand<'t>>),
    /// `[base + offset]`.
    Mem(Box<Operand<'t>>, i64),
    /// `d | p`.
    Pair(Box<Operand<'t>>, Box<Operand<'t>>),
    /// `(a, b)` of a call.
    List(Vec<Operand<'t>>),
    /// `_`.
    Sink,
}

/// An instruction as written.
#[derive(Clone, Debug)]
pub struct Statement<'t> {
    /// The opcode with all its modifiers.
    pub opcode: &'t str,
    /// `@p` or `@!p`.
    pub guard: Option<(Reg, bool)>,
    /// Operands in order.
    pub operands: Vec<Operand<'t>>,
    /// Line in the PTX text.
    pub line: u32,
    /// CUDA source position.
    pub loc: Loc,
    /// Where the instruction stands in the text, for messages.
    pub span: Span,
}

/// A part of a PTX text: its first byte, and the one behind its last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Span(pub u32, pub u32);

impl Span {
    /// What stands there, on one line.
    pub fn of(self, text: &str) -> String {
        let words = text.get(self.0 as usize..self.1 as usize).unwrap_or_default();
        words.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// A variable.
#[derive(Clone, Debug)]
pub struct Var<'t> {
    /// Name as declared.
    pub name: &'t str,
    /// Where it lives.
    pub space: Space,
    /// Alignment in bytes.
    pub align: u32,
    /// Size in bytes; 0 for `extern` arrays.
    pub size: u64,
    /// Declared `extern`.
    pub external: bool,
    /// Initial bytes (shorter than `size` when the tail is zero).
    pub init: Vec<u8>,
    /// Addresses to store into the initial bytes: (offset, variable, addend).
    pub relocations: Vec<(usize, &'t str, i64)>,
}

/// A lexical scope of a function: inline assembly opens its own.
#[derive(Debug, Default)]
pub struct Scope<'t> {
    parent: Option<usize>,
    regs: HashMap<&'t str, Reg>,
    /// `%r<9>` families: prefix to (class, bits, first index, count).
    families: Vec<(&'t str, Class, u8, u32, u32)>,
    labels: HashMap<&'t str, usize>,
    vars: HashMap<&'t str, usize>,
    tables: HashMap<&'t str, Vec<&'t str>>,
}

/// A kernel or a device function.
#[derive(Debug, Default)]
pub struct Function<'t> {
    /// Its symbol.
    pub name: &'t str,
    /// A kernel, launchable from the host.
    pub entry: bool,
    /// Has a body here.
    pub defined: bool,
    /// Formal parameters (indices into `vars`).
    pub params: Vec<usize>,
    /// Return parameters (indices into `vars`).
    pub returns: Vec<usize>,
    /// Parameters, locals and shared variables declared inside.
    pub vars: Vec<Var<'t>>,
    /// The instructions.
    pub body: Vec<Statement<'t>>,
    /// Scopes; 0 is the function's own.
    pub scopes: Vec<Scope<'t>>,
    /// Registers used per class: predicates, words, longs.
    pub regs: [u32; 3],
    /// `.maxntid` or `.reqntid` as a product, if given.
    pub max_threads: Option<u32>,
    /// `.reqntid`, if given.
    pub required_threads: Option<[u32; 3]>,
    /// `.minnctapersm`, if given.
    pub min_blocks: Option<u32>,
}

impl<'t> Function<'t> {
    /// The instruction index that `label` stands for when used in `scope`.
    pub fn label(&self, label: &str, scope: usize) -> Option<usize> {
        self.walk(scope).find_map(|s| s.labels.get(label).copied())
    }

    /// The variable (index into `vars`) that `name` stands for in `scope`.
    pub fn var(&self, name: &str, scope: usize) -> Option<usize> {
        self.walk(scope).find_map(|s| s.vars.get(name).copied())
    }

    /// The labels of a `.branchtargets` table.
    pub fn table(&self, name: &str, scope: usize) -> Option<&[&'t str]> {
        self.walk(scope).find_map(|s| s.tables.get(name).map(Vec::as_slice))
    }

    fn walk(&self, scope: usize) -> impl Iterator<Item = &Scope<'t>> {
        let mut at = Some(scope);
        std::iter::from_fn(move || {
            let scope = &self.scopes[at?];
            at = scope.parent;
            Some(scope)
        })
    }

    fn reg(&self, name: &str, scope: usize) -> Option<Reg> {
        self.walk(scope).find_map(|s| {
            if !s.regs.is_empty()
                && let Some(&r) = s.regs.get(name)
            {
                return Some(r);
            }
            s.families.iter().find_map(|&(prefix, class, bits, first, count)| {
                let tail = name.strip_prefix(prefix)?;
                // `%r01` is not a member of `%r<9>`.
                if !tail.starts_with(|c: char| c.is_ascii_digit())
                    || tail.len() > 1 && tail.starts_with('0')
                {
                    return None;
                }
                let number: u32 = tail.parse().ok()?;
                (number < count).then_some(Reg { class, bits, index: first + number })
            })
        })
    }
}

/// A whole PTX text.
#[derive(Debug, Default)]
pub struct Module<'t> {
    /// `.version`, as major * 10 + minor.
    pub version: u32,
    /// `.target` architecture, e.g. 80.
    pub target: u32,
    /// The target was `sm_90a` or another architecture-specific one.
    pub target_specific: bool,
    /// `.file` table.
    pub files: HashMap<u32, String>,
    /// Module-level variables.
    pub vars: Vec<Var<'t>>,
    /// Kernels and functions.
    pub functions: Vec<Function<'t>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Tok<'t> {
    Word(&'t str),
    Str(&'t str),
    Punct(char),
    /// A byte that PTX does not have.
    Strange(u8),
    End,
}

#[derive(Clone, Copy)]
struct Token<'t> {
    tok: Tok<'t>,
    line: u32,
    start: usize,
    end: usize,
}

#[derive(Clone, Copy)]
struct Lexer<'t> {
    text: &'t str,
    at: usize,
    line: u32,
}

impl<'t> Lexer<'t> {
    /// The byte `ahead` of this one; 0 behind the end.
    fn byte(&self, ahead: usize) -> u8 {
        self.text.as_bytes().get(self.at + ahead).copied().unwrap_or(0)
    }

    /// White space and comments.
    fn skip(&mut self) {
        let bytes = self.text.as_bytes();
        while let Some(&c) = bytes.get(self.at) {
            if c == b'/' && self.byte(1) == b'/' {
                while bytes.get(self.at).is_some_and(|&c| c != b'\n') {
                    self.at += 1;
                }
            } else if c == b'/' && self.byte(1) == b'*' {
                while self.at < bytes.len() && !bytes[self.at..].starts_with(b"*/") {
                    self.line += u32::from(bytes[self.at] == b'\n');
                    self.at += 1;
                }
                self.at = (self.at + 2).min(bytes.len());
            } else if c.is_ascii_whitespace() || c == 0 {
                self.line += u32::from(c == b'\n');
                self.at += 1;
            } else {
                return;
            }
        }
    }

    fn next(&mut self) -> Token<'t> {
        self.skip();
        let (text, line, start) = (self.text, self.line, self.at);
        let bytes = text.as_bytes();
        let is_word = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.');
        let tok = match bytes.get(start) {
            None => Tok::End,
            Some(b'"') => {
                self.at += 1;
                while bytes.get(self.at).is_some_and(|&c| c != b'"') {
                    self.at += 1 + usize::from(bytes[self.at] == b'\\');
                }
                let inner = text.get(start + 1..self.at).unwrap_or_default();
                self.at = (self.at + 1).min(bytes.len());
                Tok::Str(inner)
            }
            Some(&first) if is_word(first) => {
                self.at += 1;
                loop {
                    let c = self.byte(0);
                    if is_word(c) && !(first == b'.' && c == b'.') {
                        // `.reg.b16` is two directives.
                        self.at += 1;
                    } else if c == b':' && self.byte(1) == b':' && is_word(self.byte(2)) {
                        // `.L2::128B` is one modifier.
                        self.at += 2;
                    } else {
                        break;
                    }
                }
                Tok::Word(&text[start..self.at])
            }
            Some(&c) => {
                self.at += 1;
                if c.is_ascii() { Tok::Punct(c.into()) } else { Tok::Strange(c) }
            }
        };
        Token { tok, line, start, end: self.at }
    }
}

struct Parser<'t> {
    /// Behind `now`.
    lexer: Lexer<'t>,
    now: Token<'t>,
    module: Module<'t>,
    loc: Loc,
}

/// Reads one PTX text.
pub fn parse(text: &str) -> ParseResult<Module<'_>> {
    if u32::try_from(text.len()).is_err() {
        return Err(format!("a PTX text of {} bytes; at most 4 GB are read", text.len()));
    }
    let mut lexer = Lexer { text, at: 0, line: 1 };
    let now = lexer.next();
    let mut parser = Parser { lexer, now, module: Module::default(), loc: Loc::default() };
    parser.module()?;
    Ok(parser.module)
}

/// Bytes and register class of a fundamental type such as `.b32`.
fn fundamental(name: &str) -> Option<(Class, u8)> {
    Some(match name {
        ".pred" => (Class::Pred, 1),
        ".b8" | ".u8" | ".s8" => (Class::Word, 8),
        ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => (Class::Word, 16),
        ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" | ".tf32" => (Class::Word, 32),
        ".b64" | ".u64" | ".s64" | ".f64" => (Class::Long, 64),
        _ => return None,
    })
}

fn integer(word: &str) -> Option<i128> {
    let word = word.strip_suffix('U').unwrap_or(word);
    if let Some(hex) = word.strip_prefix("0x").or(word.strip_prefix("0X")) {
        return i128::from_str_radix(hex, 16).ok();
    }
    if let Some(bin) = word.strip_prefix("0b").or(word.strip_prefix("0B")) {
        return i128::from_str_radix(bin, 2).ok();
    }
    if word.len() > 1 && word.starts_with('0') {
        return i128::from_str_radix(&word[1..], 8).ok();
    }
    word.parse().ok()
}

impl<'t> Parser<'t> {
    fn fail<T>(&self, what: impl std::fmt::Display) -> ParseResult<T> {
        let near = match self.now.tok {
            Tok::End => String::from("the end"),
            tok => format!("{tok:?}"),
        };
        Err(format!("PTX line {}: {what} at {near}", self.now.line))
    }

    fn advance(&mut self) {
        self.now = self.lexer.next();
    }

    fn is(&self, c: char) -> bool {
        self.now.tok == Tok::Punct(c)
    }

    fn eat(&mut self, c: char) -> bool {
        let found = self.is(c);
        if found {
            self.advance();
        }
        found
    }

    fn expect(&mut self, c: char) -> ParseResult<()> {
        if self.eat(c) {
            return Ok(());
        }
        self.fail(format!("expected '{c}'"))
    }

    fn peek_word(&self) -> Option<&'t str> {
        match self.now.tok {
            Tok::Word(w) => Some(w),
            _ => None,
        }
    }

    fn word(&mut self) -> ParseResult<&'t str> {
        let Tok::Word(w) = self.now.tok else {
            return self.fail("expected a word");
        };
        self.advance();
        Ok(w)
    }

    fn string(&mut self) -> ParseResult<&'t str> {
        let Tok::Str(s) = self.now.tok else {
            return self.fail("expected a string");
        };
        self.advance();
        Ok(s)
    }

    fn number(&mut self) -> ParseResult<i128> {
        let negative = self.eat('-');
        let word = self.word()?;
        match integer(word) {
            Some(n) => Ok(if negative { -n } else { n }),
            None => self.fail(format!("'{word}' is not an integer")),
        }
    }

    fn module(&mut self) -> ParseResult<()> {
        while self.now.tok != Tok::End {
            let Some(word) = self.peek_word() else {
                return self.fail("expected a directive");
            };
            let before = (self.lexer, self.now);
            self.advance();
            match word {
                ".version" => {
                    let version = self.word()?;
                    let (major, minor) = version.split_once('.').unwrap_or((version, "0"));
                    let (Ok(major), Ok(minor)) = (major.parse::<u32>(), minor.parse::<u32>())
                    else {
                        return self.fail("bad .version");
                    };
                    self.module.version = major * 10 + minor;
                }
                ".target" => {
                    let target = self.word()?;
                    let digits = target.trim_start_matches("sm_");
                    self.module.target_specific = digits.ends_with(['a', 'f']);
                    match digits.trim_end_matches(['a', 'f']).parse() {
                        Ok(n) => self.module.target = n,
                        Err(_) => return self.fail("bad .target"),
                    }
                    while self.eat(',') {
                        self.word()?;
                    }
                }
                ".address_size" => {
                    if self.number()? != 64 {
                        return self.fail("only 64-bit addresses are supported");
                    }
                }
                ".file" => self.file()?,
                ".section" => self.section()?,
                ".loc" => self.loc_directive()?,
                ".pragma" => {
                    self.string()?;
                    self.expect(';')?;
                }
                ".visible" | ".extern" | ".weak" | ".common" => {
                    self.definition(word == ".extern")?;
                }
                _ => {
                    (self.lexer, self.now) = before;
                    self.definition(false)?;
                }
            }
        }
        Ok(())
    }

    /// Debug information, which nobody needs.
    fn section(&mut self) -> ParseResult<()> {
        self.word()?;
        self.expect('{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.now.tok {
                Tok::Punct('{') => depth += 1,
                Tok::Punct('}') => depth -= 1,
                Tok::End => return self.fail("unclosed .section"),
                _ => {}
            }
            self.advance();
        }
        Ok(())
    }

    fn file(&mut self) -> ParseResult<()> {
        let number = self.number()? as u32;
        let name = self.string()?;
        self.module.files.insert(number, name.to_string());
        while self.eat(',') {
            self.number()?;
        }
        Ok(())
    }

    fn loc_directive(&mut self) -> ParseResult<()> {
        let line = self.now.line;
        let (file, source_line) = (self.number()? as u32, self.number()? as u32);
        self.number()?;
        let mut inlined_at = None;
        while self.is(',') && self.now.line == line {
            self.advance();
            match self.word()? {
                "function_name" => {
                    self.word()?;
                    if self.eat('+') {
                        self.number()?;
                    }
                }
                "inlined_at" => {
                    inlined_at = Some((self.number()? as u32, self.number()? as u32));
                    self.number()?;
                }
                _ => return self.fail("unknown .loc attribute"),
            }
        }
        self.loc = Loc { file, line: source_line, inlined_at };
        Ok(())
    }

    fn definition(&mut self, external: bool) -> ParseResult<()> {
        match self.peek_word() {
            Some(".entry") => {
                self.advance();
                self.function(true)
            }
            Some(".func") => {
                self.advance();
                self.function(false)
            }
            _ => {
                let vars = self.variables(external)?;
                self.module.vars.extend(vars);
                self.expect(';')
            }
        }
    }

    /// `.shared .align 16 .b8 a[64], b[4] = {…}`.
    fn variables(&mut self, external: bool) -> ParseResult<Vec<Var<'t>>> {
        let space = match self.peek_word() {
            Some(".global") => Space::Global,
            Some(".const") => Space::Const,
            Some(".shared") => Space::Shared,
            Some(".local") => Space::Local,
            Some(".param") => Space::Param,
            _ => return self.fail("unknown directive"),
        };
        self.advance();
        let (mut align, mut elem, mut vector) = (None, None, 1);
        while let Some(word) = self.peek_word() {
            match word {
                ".align" => {
                    self.advance();
                    align = Some(self.number()? as u32);
                    continue;
                }
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                ".ptr" | ".global" | ".shared" | ".const" | ".local" | ".managed" => {}
                _ => match fundamental(word) {
                    Some((_, bits)) => elem = Some(u64::from(bits / 8) * vector),
                    None => break,
                },
            }
            self.advance();
        }
        let Some(elem) = elem else {
            return self.fail("a variable without a type");
        };
        let mut vars = Vec::new();
        loop {
            let name = self.word()?;
            let mut size = elem;
            while self.eat('[') {
                if self.eat(']') {
                    size = 0;
                } else {
                    size *= self.number()? as u64;
                    self.expect(']')?;
                }
            }
            let mut var = Var {
                name,
                space,
                align: align.unwrap_or(elem as u32),
                size,
                external,
                init: Vec::new(),
                relocations: Vec::new(),
            };
            if self.eat('=') {
                self.initialiser(&mut var, (elem / vector) as usize)?;
                var.size = var.size.max(var.init.len() as u64);
            }
            vars.push(var);
            // In parameter lists the comma separates parameters.
            if space == Space::Param || !self.eat(',') {
                return Ok(vars);
            }
        }
    }

    fn initialiser(&mut self, var: &mut Var<'t>, elem: usize) -> ParseResult<()> {
        if self.eat('{') {
            while !self.eat('}') {
                self.initialiser(var, elem)?;
                self.eat(',');
            }
            return Ok(());
        }
        let operand = self.operand(&Function::default(), 0)?;
        let bytes = match operand {
            Operand::Int(n) => n.to_le_bytes(),
            Operand::F32(bits) => u128::from(bits).to_le_bytes(),
            Operand::F64(x) if elem == 8 => u128::from(x.to_bits()).to_le_bytes(),
            Operand::F64(x) if elem == 4 => u128::from((x as f32).to_bits()).to_le_bytes(),
            Operand::Name(name, offset, _) => {
                let mut name = name;
                let mut offset = offset;
                // `generic(symbol)`
                if name == "generic"
                    && let Operand::List(list) = self.operand(&Function::default(), 0)?
                    && let [Operand::Name(inner, off, _)] = &list[..]
                {
                    (name, offset) = (*inner, *off);
                }
                var.relocations.push((var.init.len(), name, offset));
                [0; 16]
            }
            _ => return self.fail("unsupported initialiser"),
        };
        var.init.extend_from_slice(&bytes[..elem]);
        Ok(())
    }

    fn parameter_list(&mut self, function: &mut Function<'t>) -> ParseResult<Vec<usize>> {
        let mut out = Vec::new();
        self.expect('(')?;
        while !self.eat(')') {
            for var in self.variables(false)? {
                out.push(function.vars.len());
                function.scopes[0].vars.insert(var.name, function.vars.len());
                function.vars.push(var);
            }
            self.eat(',');
        }
        Ok(out)
    }

    fn function(&mut self, entry: bool) -> ParseResult<()> {
        let mut function =
            Function { entry, scopes: vec![Scope::default()], ..Function::default() };
        if !entry && self.is('(') {
            function.returns = self.parameter_list(&mut function)?;
        }
        function.name = self.word()?;
        if self.is('(') {
            function.params = self.parameter_list(&mut function)?;
        }
        while let Some(word) = self.peek_word() {
            self.advance();
            match word {
                ".maxntid" | ".reqntid" => {
                    let mut dims = [1_u32; 3];
                    for (i, dim) in dims.iter_mut().enumerate() {
                        if i == 0 || self.eat(',') {
                            *dim = self.number()? as u32;
                        }
                    }
                    function.max_threads = Some(dims.iter().product());
                    if word == ".reqntid" {
                        function.required_threads = Some(dims);
                    }
                }
                ".minnctapersm" => function.min_blocks = Some(self.number()? as u32),
                ".maxnreg" => {
                    self.number()?;
                }
                ".noreturn" => {}
                other => {
                    let message = format!("unknown function directive '{other}'");
                    return self.fail(message);
                }
            }
        }
        if !self.eat(';') {
            self.expect('{')?;
            function.defined = true;
            self.loc = Loc::default();
            self.body(&mut function, 0)?;
        }
        // A definition replaces an earlier declaration.
        let name = function.name;
        match self.module.functions.iter_mut().find(|f| f.name == name) {
            Some(old) if !old.defined => *old = function,
            Some(_) if !function.defined => {}
            _ => self.module.functions.push(function),
        }
        Ok(())
    }

    fn body(&mut self, function: &mut Function<'t>, scope: usize) -> ParseResult<()> {
        loop {
            if self.eat('}') {
                return Ok(());
            }
            if self.eat('{') {
                function.scopes.push(Scope { parent: Some(scope), ..Scope::default() });
                self.body(function, function.scopes.len() - 1)?;
                continue;
            }
            if self.eat(';') {
                continue;
            }
            if self.is('@') {
                self.statement(function, scope)?;
                continue;
            }
            let Some(word) = self.peek_word() else {
                return self.fail("expected a statement");
            };
            let mut ahead = self.lexer;
            ahead.skip();
            if ahead.byte(0) == b':' {
                self.advance();
                self.advance();
                self.label(function, scope, word)?;
                continue;
            }
            match word {
                ".reg" => {
                    self.advance();
                    self.registers(function, scope)?;
                }
                ".loc" => {
                    self.advance();
                    self.loc_directive()?;
                }
                ".file" => {
                    self.advance();
                    self.file()?;
                }
                ".pragma" => {
                    self.advance();
                    self.string()?;
                    self.expect(';')?;
                }
                ".shared" | ".local" | ".param" | ".global" | ".const" => {
                    for var in self.variables(false)? {
                        function.scopes[scope].vars.insert(var.name, function.vars.len());
                        function.vars.push(var);
                    }
                    self.expect(';')?;
                }
                _ if word.starts_with('.') => {
                    return self.fail(format!("unknown directive '{word}'"));
                }
                _ => self.statement(function, scope)?,
            }
        }
    }

    fn label(
        &mut self,
        function: &mut Function<'t>,
        scope: usize,
        name: &'t str,
    ) -> ParseResult<()> {
        match self.peek_word() {
            Some(".branchtargets") => {
                self.advance();
                let mut targets = Vec::new();
                while !self.eat(';') {
                    targets.push(self.word()?);
                    self.eat(',');
                }
                function.scopes[scope].tables.insert(name, targets);
            }
            Some(".callprototype" | ".calltargets") => {
                return self.fail("indirect calls are not supported");
            }
            _ => {
                let here = function.body.len();
                if function.scopes[scope].labels.insert(name, here).is_some() {
                    return self.fail(format!("label '{name}' is defined twice"));
                }
            }
        }
        Ok(())
    }

    fn registers(&mut self, function: &mut Function<'t>, scope: usize) -> ParseResult<()> {
        let ty = self.word()?;
        let Some((class, bits)) = fundamental(ty) else {
            return self.fail(format!("unsupported register type '{ty}'"));
        };
        loop {
            let name = self.word()?;
            let known = &function.scopes[scope];
            if known.regs.contains_key(name) || known.families.iter().any(|f| f.0 == name) {
                return self.fail(format!("'{name}' is declared twice"));
            }
            let slot = class as usize;
            let first = function.regs[slot];
            if self.eat('<') {
                let count = self.number()? as u32;
                self.expect('>')?;
                function.regs[slot] += count;
                function.scopes[scope].families.push((name, class, bits, first, count));
            } else {
                function.regs[slot] += 1;
                let reg = Reg { class, bits, index: first };
                function.scopes[scope].regs.insert(name, reg);
            }
            if self.eat(';') {
                return Ok(());
            }
            self.expect(',')?;
        }
    }

    fn statement(&mut self, function: &mut Function<'t>, scope: usize) -> ParseResult<()> {
        let (line, start) = (self.now.line, self.now.start);
        let mut guard = None;
        if self.eat('@') {
            let negated = self.eat('!');
            let name = self.word()?;
            match function.reg(name, scope) {
                Some(reg) if reg.class == Class::Pred => guard = Some((reg, negated)),
                _ => return self.fail(format!("guard '{name}' is not a predicate")),
            }
        }
        let opcode = self.word()?;
        let mut operands = Vec::with_capacity(4);
        while !self.is(';') {
            operands.push(self.operand(function, scope)?);
            if !self.eat(',') && !self.is(';') {
                return self.fail("expected ',' or ';'");
            }
        }
        let span = Span(start as u32, self.now.end as u32);
        self.advance();
        function.body.push(Statement { opcode, guard, operands, line, loc: self.loc, span });
        Ok(())
    }

    fn operand(&mut self, function: &Function<'t>, scope: usize) -> ParseResult<Operand<'t>> {
        if self.eat('{') {
            let mut items = Vec::new();
            while !self.eat('}') {
                items.push(self.operand(function, scope)?);
                self.eat(',');
            }
            return Ok(Operand::Vector(items));
        }
        if self.eat('(') {
            let mut items = Vec::new();
            while !self.eat(')') {
                items.push(self.operand(function, scope)?);
                self.eat(',');
            }
            return Ok(Operand::List(items));
        }
        if self.eat('[') {
            let base = self.operand(function, scope)?;
            let (base, mut offset) = match base {
                Operand::Name(name, offset, scope) => (Operand::Name(name, 0, scope), offset),
                other => (other, 0),
            };
            if self.eat('+') || self.is('-') {
                offset += self.number()? as i64;
            }
            self.expect(']')?;
            return Ok(Operand::Mem(Box::new(base), offset));
        }
        if self.eat('!') {
            let name = self.word()?;
            return match function.reg(name, scope) {
                Some(reg) if reg.class == Class::Pred => Ok(Operand::Not(reg)),
                _ => self.fail(format!("'!{name}' is not a predicate")),
            };
        }
        let negative = self.eat('-');
        let word = self.word()?;
        if word == "_" {
            return Ok(Operand::Sink);
        }
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            return self.literal(word, negative);
        }
        if word == "WARP_SZ" {
            return Ok(Operand::Int(32));
        }
        let first = match function.reg(word, scope) {
            Some(reg) => Operand::Reg(reg),
            None if word.starts_with('%') => Operand::Special(word),
            None => {
                let mut offset = 0;
                if self.is('+') || self.is('-') {
                    self.eat('+');
                    offset = self.number()? as i64;
                }
                Operand::Name(word, offset, scope)
            }
        };
        if self.eat('|') {
            let second = self.operand(function, scope)?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn literal(&self, word: &str, negative: bool) -> ParseResult<Operand<'t>> {
        let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
        if let Some(bits) = word.strip_prefix("0f").or(word.strip_prefix("0F"))
            && bits.len() == 8
            && let Some(bits) = hex(bits)
        {
            return Ok(Operand::F32(bits as u32));
        }
        if let Some(bits) = word.strip_prefix("0d").or(word.strip_prefix("0D"))
            && bits.len() == 16
            && let Some(bits) = hex(bits)
        {
            return Ok(Operand::F64(f64::from_bits(bits)));
        }
        if let Some(n) = integer(word) {
            return Ok(Operand::Int(if negative { -n } else { n }));
        }
        match word.parse::<f64>() {
            Ok(x) => Ok(Operand::F64(if negative { -x } else { x })),
            Err(_) => self.fail(format!("'{word}' is not a number")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_of_inline_assembly_hide_labels_and_registers() {
        let module = parse(
            ".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{\n\
             .reg .b32 %r<4>;\n{ .reg .b32 t; L: mov.u32 t, %r1; bra L; }\n\
             { .reg .b64 t; L: mov.u64 t, 5; bra L; }\nret;\n}\n",
        )
        .unwrap();
        let f = &module.functions[0];
        assert_eq!(f.body.len(), 5);
        assert_eq!(f.label("L", 1), Some(0));
        assert_eq!(f.label("L", 2), Some(2));
        assert!(matches!(f.body[2].operands[0], Operand::Reg(r) if r.class == Class::Long));
        assert_eq!(f.body[2].line, 8);
    }

    #[test]
    fn source_positions_survive() {
        let module = parse(
            ".version 9.0\n.target sm_90a\n.visible .entry k()\n{\n.loc 1 7 3\nbar.sync 0;\n\
             .loc 2 9 1, function_name $s+4, inlined_at 1 8 5\nret;\n}\n.file 1 \"a.cu\"\n",
        )
        .unwrap();
        assert!(module.target_specific);
        assert_eq!(module.files[&1], "a.cu");
        assert_eq!(module.functions[0].body[0].loc.line, 7);
        assert_eq!(module.functions[0].body[1].loc.inlined_at, Some((1, 8)));
    }

    #[test]
    fn errors_name_the_line() {
        let error = parse(".version 9.0\n.target sm_80\n.entry k()\n{\n@q ret;\n}").unwrap_err();
        assert!(error.contains("line 5"), "{error}");
    }
}
