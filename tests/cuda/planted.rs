//! Faults planted in the kernels that ship, in what they do with tensors of 16 bits: the stand-in
//! driver reports each, or numbers are wrong. A slip in the CUDA source is an edit of its PTX here.

use std::collections::HashMap;
use std::path::PathBuf;

use ndarray::Array5;
use pointwise::{CudaDevice, Error, bf16, f16};

use super::cases::{Case, Layout, Placed, Value, chain, force, kernels_of, rounded};
use super::driver::{ask, expect};
use super::numbers::Random;
use super::{OnDevice, Outcome};

pub const STAND_IN_TRIALS: &[OnDevice] =
    &[("faults_planted_in_kernels_of_16_bits_are_found", all_are_found)];

/// Which kernel the started processes run, on which dtype and layout.
const KERNEL: &str = "POINTWISE_TEST_PLANTED";

const FPROP: &str = include_str!("../../kernels/fprop.cu");
const MMA: &str = include_str!("../../kernels/mainloops/mma.cuh");
const PTX: &str = include_str!("../../kernels/ptx.cuh");
const SPLITS: &str = include_str!("../../kernels/splits.cuh");

struct Plant {
    what: &'static str,
    /// Of which lines the instructions are, as the compiler says: the file, its text, and what begins
    /// them.
    lines: (&'static str, &'static str, &'static str),
    /// How many of them, from the first on, take the edit.
    most: usize,
    /// What becomes of an instruction; `None` leaves it.
    edit: fn(&str) -> Option<String>,
    /// One of these is in what the process says or the stand-in driver reports.
    found: &'static [&'static str],
}

const ALL: usize = usize::MAX;
const ANYWHERE: (&str, &str, &str) = ("", "", "");
/// What another thread has not written yet, or still reads, or a copy under way.
const TOO_EARLY: &[&str] = &["a race: ", "uninitialised", "in flight"];
const WRONG: &[&str] = &["wrong"];

const PLANTS: &[Plant] = &[
    Plant {
        what: "no wait for copies",
        lines: ("ptx.cuh", PTX, "asm volatile(\"cp.async.wait_group"),
        most: ALL,
        edit: |line| line.starts_with("cp.async.wait_group").then(String::new),
        found: &["in flight"],
    },
    Plant {
        what: "a wait for one copy too few",
        lines: ("ptx.cuh", PTX, "asm volatile(\"cp.async.wait_group"),
        most: ALL,
        edit: |line| (line == "cp.async.wait_group 2;").then(|| "cp.async.wait_group 3;".into()),
        found: &["in flight"],
    },
    Plant {
        what: "no barrier between slabs",
        lines: ("mma.cuh", MMA, "__syncthreads();"),
        most: ALL,
        edit: |line| line.starts_with("bar.sync").then(String::new),
        found: TOO_EARLY,
    },
    Plant {
        what: "no barrier behind the table of positions",
        lines: ("fprop.cu", FPROP, "__syncthreads();"),
        most: ALL,
        edit: |line| line.starts_with("bar.sync").then(String::new),
        found: TOO_EARLY,
    },
    Plant {
        what: "fragments of the weight swapped",
        lines: ANYWHERE,
        most: ALL,
        edit: |line| with_swapped(line, 1),
        found: WRONG,
    },
    Plant {
        what: "fragments of src swapped",
        lines: ANYWHERE,
        most: ALL,
        edit: |line| with_swapped(line, 2),
        found: WRONG,
    },
    Plant {
        what: "halves of words swapped",
        lines: ("ptx.cuh", PTX, "return __byte_perm(first, second, 0x5410);"),
        most: ALL,
        edit: |line| {
            let [to, first, second, halves] = operands(line, "prmt.b32")?;
            Some(format!("prmt.b32 {to}, {second}, {first}, {halves};"))
        },
        found: WRONG,
    },
    Plant {
        what: "the weight swizzled on one side only",
        lines: ANYWHERE,
        // The compiler computes the swizzle of reads once, ahead of all else.
        most: 1,
        edit: |line| {
            let [to, from, "48"] = operands(line, "and.b32")? else { return None };
            Some(format!("and.b32 {to}, {from}, 16;"))
        },
        found: WRONG,
    },
    Plant {
        what: "src stored without its swizzle",
        lines: ("mma.cuh", MMA, "to = "),
        most: ALL,
        edit: without_swizzle,
        // Where the compiler keeps a part of it, copies lie on one another.
        found: &["wrong", "in flight"],
    },
    Plant {
        what: "no fences around the arrival of a block",
        lines: ("splits.cuh", SPLITS, "__threadfence();"),
        most: ALL,
        edit: |line| line.starts_with("membar.gl").then(String::new),
        found: &["race: written in this launch by block #"],
    },
];

fn operands<'a, const N: usize>(line: &'a str, instruction: &str) -> Option<[&'a str; N]> {
    let list = line.strip_prefix(instruction)?.trim_start().strip_suffix(';')?;
    list.split(", ").collect::<Vec<_>>().try_into().ok()
}

/// The exclusive-or of a swizzle and a column is the column alone.
fn without_swizzle(line: &str) -> Option<String> {
    let [to, _, column] = operands(line, "xor.b32")?;
    Some(format!("mov.b32 {to}, {column};"))
}

/// An `mma` whose operand `which` (the weight's is 1, src's is 2) has two registers in each other's
/// place: of four, which are halves of rows and of depth, the middle ones.
fn with_swapped(line: &str, which: usize) -> Option<String> {
    let mut parts: Vec<String> = line.split('{').map(String::from).collect();
    let operand = line.starts_with("mma.sync").then(|| &mut parts[which + 1])?;
    let (list, rest) = operand.split_once('}')?;
    let mut registers: Vec<&str> = list.split(", ").collect();
    match registers.len() {
        4 => registers.swap(1, 2),
        2 => registers.swap(0, 1),
        _ => return None,
    }
    *operand = format!("{}}}{rest}", registers.join(", "));
    Some(parts.join("{"))
}

/// The PTX of a module of which only one kernel is left whole.
struct Kernel {
    before: String,
    body: String,
    after: String,
    /// The names of source files by their number.
    files: HashMap<String, String>,
}

impl Kernel {
    fn new(module: &str, name: &str) -> Kernel {
        // Kernels end in a line of their own, and what follows the last one begins with `.file`.
        let entry = "\n.visible .entry ";
        let (header, rest) = module.split_once(entry).expect("a module has kernels");
        let (kernels, tables) = rest.split_once("\n.file").expect("compiled with line numbers");
        let (mut before, mut body, mut after) = (header.to_string(), String::new(), String::new());
        for kernel in kernels.split(entry) {
            let text = if body.is_empty() { &mut before } else { &mut after };
            if kernel.starts_with(&format!("{name}(")) {
                body = format!("{entry}{kernel}");
            } else {
                let (signature, _) = kernel.split_once("\n{").expect("a kernel has a body");
                *text += &format!("{entry}{signature}\n{{\nret;\n}}\n");
            }
        }
        assert!(!body.is_empty(), "no {name}");
        after += &format!("\n.file{tables}");
        let files = after.lines().filter_map(|line| line.strip_prefix(".file"));
        let files = files.filter_map(|file| file.trim().split_once(char::is_whitespace));
        let files = files.map(|(number, path)| {
            (number.into(), path.trim().trim_matches('"').rsplit('/').next().unwrap().into())
        });
        let files = files.collect();
        Kernel { before, body, after, files }
    }

    /// The module with the fault in it, and how many instructions were edited.
    fn with(&self, plant: &Plant) -> (String, usize) {
        let (file, source, begins) = plant.lines;
        let numbered = (1..).zip(source.lines());
        let lines: Vec<String> = numbered
            .filter(|(_, line)| line.trim_start().starts_with(begins))
            .map(|(number, _)| number.to_string())
            .collect();
        let anywhere = plant.lines == ANYWHERE;
        assert!(anywhere || !lines.is_empty(), "{file} has no line that begins with {begins:?}");
        let (mut text, mut here, mut edited) = (self.before.clone(), false, 0);
        for line in self.body.lines() {
            if let Some(at) = line.trim_start().strip_prefix(".loc") {
                let mut fields = at.split_whitespace();
                let (number, line) = (fields.next().unwrap(), fields.next().unwrap());
                here = self.files.get(number).is_some_and(|name| name == file)
                    && lines.iter().any(|wanted| wanted == line);
            }
            let may = (anywhere || here) && edited < plant.most;
            match may.then(|| (plant.edit)(line.trim())).flatten() {
                Some(instead) => {
                    edited += 1;
                    text += &instead;
                }
                None => text += line,
            }
            text += "\n";
        }
        (text + &self.after, edited)
    }

    fn whole(&self) -> String {
        [&*self.before, &self.body, &self.after].concat()
    }
}

fn all_are_found(device: &CudaDevice) -> Outcome {
    let file = |what: &str| -> PathBuf {
        std::env::temp_dir().join(format!("pointwise-{what}-{}.ptx", std::process::id()))
    };
    let (whole, edited) = (file("whole"), file("planted"));
    let (whole, edited) = (whole.to_string_lossy(), edited.to_string_lossy());
    expect("open", &[("PW_EMULATOR_PTX_TO", &whole)], &["cuda:0"])?;
    let module = std::fs::read_to_string(&*whole)?;
    std::fs::remove_file(&*whole)?;

    let mut missed = Vec::new();
    let mut planted = [0; PLANTS.len()];
    for name in kernels(device) {
        let kernel = Kernel::new(&module, name);
        let run = |text: String| {
            std::fs::write(&*edited, text)?;
            let variables = [(KERNEL, name), ("PW_EMULATOR_PTX_FROM", &*edited)];
            Ok::<_, libtest_mimic::Failed>(ask("planted", &variables)?)
        };
        let (text, log) = run(kernel.whole())?;
        assert_eq!(text, "right", "{name}, nothing planted: {log}");
        for (plant, planted) in PLANTS.iter().zip(&mut planted) {
            let (text, count) = kernel.with(plant);
            if count == 0 {
                continue;
            }
            *planted += 1;
            let (text, log) = run(text)?;
            // A report names what goes on where.
            let found = plant.found.iter().any(|part| {
                text.contains(part) || log.contains(part) && log.contains(&format!("'{name}'"))
            });
            if !found {
                missed.push(format!("{name}, {} ({count} times): {text}; {log}", plant.what));
            }
        }
    }
    std::fs::remove_file(&*edited)?;
    let none = PLANTS.iter().zip(planted).filter(|(_, planted)| *planted == 0);
    let none: Vec<_> = none.map(|(plant, _)| plant.what).collect();
    // Before sm_80 no copy is asynchronous, and src is one register of an `mma`.
    let expected: &[&str] = match device.compute_capability() {
        (8.., _) => &[],
        _ => &["no wait for copies", "a wait for one copy too few", "fragments of src swapped"],
    };
    assert_eq!(none, expected, "planted nowhere");
    if missed.is_empty() { Ok(()) } else { Err(missed.join("\n").into()) }
}

/// Of each dtype and layout of dst, the kernel on tensor cores with the smallest tile.
fn kernels(device: &CudaDevice) -> Vec<&'static str> {
    let all = [kernels_of::<f16>(device), kernels_of::<bf16>(device)].concat();
    let all = all.into_iter().filter(|name| name.contains("16_sm") && name.contains("_64x64x"));
    let all: Vec<_> = all.collect();
    assert!(all.len() >= 2, "{all:?}");
    all
}

/// What the started processes do.
pub fn child(device: &CudaDevice) -> Result<String, Error> {
    let kernel = std::env::var(KERNEL).expect("the test says which kernel");
    match kernel.contains("bf16") {
        true => of::<bf16>(device, &kernel),
        false => of::<f16>(device, &kernel),
    }
}

/// Eight slabs of aligned tensors, which blocks share, and of others.
fn of<T: Value>(device: &CudaDevice, kernel: &str) -> Result<String, Error> {
    let layout = if kernel.ends_with("nhwc") { Layout::Last } else { Layout::First };
    let mut random = Random::new(83);
    for (width, splits) in [(16, 1), (16, 2), (15, 1)] {
        let case = Case::new(1, 256, 64, [1, 4, width]);
        let weight = random.integers(case.c_out * case.c_in);
        let bias = vec![0.0; case.c_out];
        let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
        let expected = rounded::<T>(&chain(&case, &weight, &bias, &src));
        let layer = case.layer(weight).bias(bias);
        let options = force(&format!("{kernel}/{splits}"));
        let layer = layer.prepare_as::<T>(&device.clone().into(), options)?;
        let src = Placed::<T>::filled(device, src.view(), layout);
        let mut dst = Placed::<T>::blank(device, case.dst_shape(), layout);
        layer.forward_into(&src.view(), &mut dst.view_mut())?;
        device.synchronize()?;
        let dst = dst.read();
        if !dst.iter().zip(&expected).all(|(got, expected)| got == expected) {
            return Ok(format!("wrong: width {width}, {splits} splits"));
        }
    }
    Ok("right".into())
}
