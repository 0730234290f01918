//! Faults planted in the kernels that ship, one of each family and layout: the stand-in driver reports
//! each, or numbers are wrong. A slip in the CUDA source is an edit of its PTX here.

use std::collections::HashMap;
use std::path::PathBuf;

use ndarray::{Array2, Array5, ArrayD};
use pointwise::quantized::{F8E4M3, Fp8Quantization, QuantizedFp8};
use pointwise::train::{Options, Params};
use pointwise::{
    CudaDevice, DType, Device, Error, Math, PrepareOptions, Quantization, Quantized, bf16, f16,
    reference,
};

use super::cases::{Case, Layout, Placed, Value, chain, force, kernels_of, rounded};
use super::driver::{ask, expect};
use super::fp8::on_fp8;
use super::numbers::Random;
use super::tensor_cores::{ALMOST_TF32, nearest};
use super::{OnDevice, Outcome};

pub const STAND_IN_TRIALS: &[OnDevice] = &[
    ("faults_planted_in_kernels_of_16_bits_are_found", in_16_bits),
    ("faults_planted_in_kernels_of_f32_and_int8_are_found", in_others),
    ("faults_planted_in_kernels_of_the_weights_gradient_are_found", in_wgrad),
    ("faults_planted_in_kernels_of_fp8_are_found", |device| on_fp8(device, in_fp8)),
];

/// Which kernel the started processes run: its name says on which dtype and layout.
const KERNEL: &str = "POINTWISE_TEST_PLANTED";

const FPROP: &str = include_str!("../../kernels/fprop.cu");
const MMA: &str = include_str!("../../kernels/mainloops/mma.cuh");
const PTX: &str = include_str!("../../kernels/ptx.cuh");
const SPLITS: &str = include_str!("../../kernels/splits.cuh");
const SIMT: &str = include_str!("../../kernels/mainloops/simt.cuh");
const WGRAD: &str = include_str!("../../kernels/train/wgrad_mma.cuh");
const BYTES: &str = include_str!("../../kernels/mainloops/bytes.cuh");
const BYTES_STORE: &str = include_str!("../../kernels/epilogues/bytes.cuh");

struct Plant {
    what: &'static str,
    /// Of which lines the instructions are, as the compiler says: the end of the file's path, its text,
    /// and what begins them.
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
        edit: |line| {
            let pending: u32 =
                line.strip_prefix("cp.async.wait_group ")?.strip_suffix(';')?.parse().ok()?;
            Some(format!("cp.async.wait_group {};", pending + 1))
        },
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
        what: ONE_SWIZZLE,
        lines: ANYWHERE,
        // The compiler computes the swizzle of reads once, ahead of all else.
        most: 1,
        edit: |line| {
            let [to, from, mask] = operands(line, "and.b32")?;
            // Eight elements a step, of 16 bits; of 32 bits four.
            let less = ["48", "24"].iter().position(|&whole| whole == mask)?;
            Some(format!("and.b32 {to}, {from}, {};", [16, 8][less]))
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
    Plant {
        what: "one operand not rounded to TF32",
        lines: ("ptx.cuh", PTX, "asm(\"cvt.rna.tf32.f32"),
        // The first is of src along channels; in kernels that compute in parts, of the larger part.
        most: 1,
        edit: |line| {
            let [to, from] = operands(line, "cvt.rna.tf32.f32")?;
            Some(format!("mov.b32 {to}, {from};"))
        },
        found: WRONG,
    },
    Plant {
        what: "no barrier between slabs, without tensor cores",
        lines: ("simt.cuh", SIMT, "__syncthreads();"),
        most: ALL,
        edit: |line| line.starts_with("bar.sync").then(String::new),
        found: TOO_EARLY,
    },
    Plant {
        what: "elements of a vector swapped",
        lines: ("simt.cuh", SIMT, "const float4 v = *reinterpret_cast<const float4*>(row"),
        most: ALL,
        edit: |line| {
            let (list, from) = line.strip_prefix("ld.shared.v4.f32 {")?.split_once('}')?;
            let [a, b, rest @ ..] = &list.split(", ").collect::<Vec<_>>()[..] else { return None };
            Some(format!("ld.shared.v4.f32 {{{b}, {a}, {}}}{from}", rest.join(", ")))
        },
        found: WRONG,
    },
    Plant {
        what: "src stored without its swizzle, without tensor cores",
        lines: ("simt.cuh", SIMT, "to = "),
        most: ALL,
        edit: without_swizzle,
        found: WRONG,
    },
    Plant {
        what: NO_BARRIER_OF_WGRAD,
        lines: ("wgrad_mma.cuh", WGRAD, "__syncthreads();"),
        most: ALL,
        edit: |line| line.starts_with("bar.sync").then(String::new),
        found: TOO_EARLY,
    },
    Plant {
        what: COPIES_OF_WGRAD,
        lines: ("wgrad_mma.cuh", WGRAD, "static __device__ int swizzle(int q)"),
        most: ALL,
        edit: |line| {
            let [to, from, mask] = operands(line, "and.b32")?;
            (mask == "48").then(|| format!("and.b32 {to}, {from}, 16;"))
        },
        // Copies then lie on one another.
        found: &["wrong", "in flight"],
    },
    Plant {
        what: "no barrier between slabs of bytes",
        lines: ("mainloops/bytes.cuh", BYTES, "__syncthreads();"),
        most: ALL,
        edit: |line| line.starts_with("bar.sync").then(String::new),
        found: TOO_EARLY,
    },
    Plant {
        what: "the first vector of bytes copied without its swizzle",
        lines: ("mainloops/bytes.cuh", BYTES, "return (i ^ (i >> 2 & 1)) * 4"),
        most: 2,
        edit: without_swizzle,
        found: &["wrong", "in flight", "a race: "],
    },
    Plant {
        what: "no barrier around the sums of bytes",
        lines: ("epilogues/bytes.cuh", BYTES_STORE, "__syncthreads();"),
        most: ALL,
        edit: |line| line.starts_with("bar.sync").then(String::new),
        found: TOO_EARLY,
    },
    Plant {
        what: "no upper bound of a clip",
        lines: ("epilogues/bytes.cuh", BYTES_STORE, "return hi < x ? hi : x;"),
        most: ALL,
        edit: |line| {
            let [to, _, x, _] = operands(line, "selp.f32")?;
            Some(format!("mov.f32 {to}, {x};"))
        },
        found: WRONG,
    },
    Plant {
        what: NO_SCALE,
        lines: (
            "epilogues/bytes.cuh",
            BYTES_STORE,
            "for (int n = 0; n < kWidth; ++n) v[n] = __fadd_rn(__fmul_rn(sum[n], scale[n])",
        ),
        most: ALL,
        edit: |line| {
            let [to, sum, _] = operands(line, "mul.rn.f32")?;
            Some(format!("mov.f32 {to}, {sum};"))
        },
        found: WRONG,
    },
    Plant {
        what: SATURATED_EARLY,
        lines: ("ptx.cuh", PTX, "asm(\"cvt.rn.satfinite.e4m3x2.f32"),
        most: ALL,
        // At the greatest value of the e4m3 without infinities that other makers have.
        edit: |line| {
            let [_, second, first] = operands(line, "cvt.rn.satfinite.e4m3x2.f32")?;
            let bound = |x: &str| format!("min.f32 {x}, {x}, 0f43700000;\n");
            Some(bound(second) + &bound(first) + line)
        },
        found: WRONG,
    },
    Plant {
        what: PAIRS_SWAPPED,
        lines: ("ptx.cuh", PTX, "asm(\"cvt.rn.satfinite.e4m3x2.f32"),
        most: ALL,
        edit: |line| {
            let [to, second, first] = operands(line, "cvt.rn.satfinite.e4m3x2.f32")?;
            Some(format!("cvt.rn.satfinite.e4m3x2.f32 {to}, {first}, {second};"))
        },
        found: WRONG,
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

/// The PTX of a module of which only one kernel is left whole; with one of the weight's gradient, that
/// which writes what it reads.
struct Kernel {
    before: String,
    body: String,
    after: String,
    /// The paths of source files by their number.
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
            } else if name.starts_with("wgrad_") && kernel.starts_with("train_backward_") {
                *text += &format!("{entry}{kernel}");
            } else {
                let (signature, _) = kernel.split_once("\n{").expect("a kernel has a body");
                *text += &format!("{entry}{signature}\n{{\nret;\n}}\n");
            }
        }
        assert!(!body.is_empty(), "no {name}");
        after += &format!("\n.file{tables}");
        let files = after.lines().filter_map(|line| line.strip_prefix(".file"));
        let files = files.filter_map(|file| file.trim().split_once(char::is_whitespace));
        let files =
            files.map(|(number, path)| (number.into(), path.trim().trim_matches('"').into()));
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
        let is = |path: &str, end: &str| {
            path.strip_suffix(end).is_some_and(|folder| folder.is_empty() || folder.ends_with('/'))
        };
        let anywhere = plant.lines == ANYWHERE;
        assert!(anywhere || !lines.is_empty(), "{file} has no line that begins with {begins:?}");
        let (mut text, mut here, mut edited) = (self.before.clone(), false, 0);
        for line in self.body.lines() {
            if let Some(at) = line.trim_start().strip_prefix(".loc") {
                let mut fields = at.split_whitespace();
                let (number, line) = (fields.next().unwrap(), fields.next().unwrap());
                here = self.files.get(number).is_some_and(|path| is(path, file))
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

/// Plants every fault in every one of these kernels that has a place for it; all but `nowhere` are
/// planted somewhere. `open` is what loads their module, after all others.
fn all_are_found(
    device: &CudaDevice,
    open: &str,
    kernels: &[&'static str],
    nowhere: impl Fn(&str) -> bool,
) -> Outcome {
    let file = |what: &str| -> PathBuf {
        let of = kernels[0];
        std::env::temp_dir().join(format!("pointwise-{what}-{of}-{}.ptx", std::process::id()))
    };
    let (whole, edited) = (file("whole"), file("planted"));
    let (whole, edited) = (whole.to_string_lossy(), edited.to_string_lossy());
    let name = device.to_string();
    expect(open, &[("PW_EMULATOR_PTX_TO", &whole)], &[&name])?;
    let module = std::fs::read_to_string(&*whole)?;
    std::fs::remove_file(&*whole)?;

    let mut missed = Vec::new();
    let mut planted = [0; PLANTS.len()];
    for &name in kernels {
        let kernel = Kernel::new(&module, name);
        let run = |text: String| {
            std::fs::write(&*edited, text)?;
            let variables = [(KERNEL, name), ("PW_EMULATOR_PTX_FROM", &*edited)];
            Ok::<_, libtest_mimic::Failed>(ask("planted", &variables)?)
        };
        let (text, log) = run(kernel.whole())?;
        assert_eq!(text, "right", "{name}, nothing planted: {log}");
        for (plant, planted) in PLANTS.iter().zip(&mut planted) {
            // Of the weight's gradient it is one of many copies, for a width that may not be run.
            if plant.what == ONE_SWIZZLE && name.starts_with("wgrad_") {
                continue;
            }
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
    for (plant, planted) in PLANTS.iter().zip(planted) {
        assert_eq!(planted == 0, nowhere(plant.what), "{}: planted {planted} times", plant.what);
    }
    if missed.is_empty() { Ok(()) } else { Err(missed.join("\n").into()) }
}

/// Of each dtype and layout of dst, the kernel on tensor cores with the smallest tile.
fn in_16_bits(device: &CudaDevice) -> Outcome {
    let all = [kernels_of::<f16>(device), kernels_of::<bf16>(device)].concat();
    let all = all.into_iter().filter(|name| name.contains("16_sm") && name.contains("_64x64x"));
    let all: Vec<_> = all.collect();
    assert!(all.len() >= 2, "{all:?}");
    all_are_found(device, "open", &all, |what| {
        // Before sm_80 no copy is asynchronous, and src is one register of an `mma`.
        let since_80 =
            ["no wait for copies", "a wait for one copy too few", "fragments of src swapped"];
        OF_OTHERS.contains(&what)
            || device.compute_capability() < (8, 0) && since_80.contains(&what)
    })
}

/// Faults that kernels of 16 bits have no place for.
const OF_OTHERS: [&str; 13] = [
    "one operand not rounded to TF32",
    "no barrier between slabs, without tensor cores",
    "elements of a vector swapped",
    "src stored without its swizzle, without tensor cores",
    "no barrier between slabs of bytes",
    "the first vector of bytes copied without its swizzle",
    "no barrier around the sums of bytes",
    "no upper bound of a clip",
    NO_BARRIER_OF_WGRAD,
    COPIES_OF_WGRAD,
    NO_SCALE,
    SATURATED_EARLY,
    PAIRS_SWAPPED,
];
const ONE_SWIZZLE: &str = "the weight swizzled on one side only";
const COPIES_OF_WGRAD: &str = "slabs of the weight's gradient copied with half of the swizzle";
const NO_BARRIER_OF_WGRAD: &str = "no barrier around the tables and slabs of the weight's gradient";
const NO_SCALE: &str = "sums of fp8 not scaled";
const SATURATED_EARLY: &str = "e4m3 saturated at 240";
const PAIRS_SWAPPED: &str = "a pair of e4m3 stored in the wrong order";

/// TF32 and f32 in parts of TF32, f32 without tensor cores, bytes: one kernel of each that there is.
fn in_others(device: &CudaDevice) -> Outcome {
    let mut all = vec!["fprop_f32_simt_32x32x16_nchw"];
    let tensor_cores = device.compute_capability() >= (8, 0);
    if tensor_cores {
        all.extend(["fprop_tf32_sm80_64x64x16_nhwc", "fprop_f32_sm80_64x64x16_nhwc"]);
        all.push("fprop_i8_mma_64x64x64");
    }
    all_are_found(device, "open", &all, |what| {
        let of_others =
            [NO_BARRIER_OF_WGRAD, COPIES_OF_WGRAD, NO_SCALE, SATURATED_EARLY, PAIRS_SWAPPED];
        if of_others.contains(&what) {
            return true;
        }
        let without_tensor_cores = [
            "no barrier behind the table of positions",
            "no fences around the arrival of a block",
            "no barrier between slabs, without tensor cores",
            "elements of a vector swapped",
            "src stored without its swizzle, without tensor cores",
        ];
        !tensor_cores && !without_tensor_cores.contains(&what)
    })
}

/// The small tile of each dtype, which has code of its own for every pair of layouts.
fn in_wgrad(device: &CudaDevice) -> Outcome {
    let mut all = vec!["wgrad_f16_mma_64x64x32"];
    let since_80 = device.compute_capability() >= (8, 0);
    if since_80 {
        all.extend(["wgrad_bf16_mma_64x64x32", "wgrad_tf32_mma_64x64x16"]);
    }
    all_are_found(device, "open", &all, |what| {
        let of_80 = [
            "no wait for copies",
            "a wait for one copy too few",
            "fragments of src swapped",
            "one operand not rounded to TF32",
        ];
        let anywhere =
            ["fragments of the weight swapped", "halves of words swapped", COPIES_OF_WGRAD];
        let planted = what == NO_BARRIER_OF_WGRAD
            || anywhere.contains(&what)
            || since_80 && of_80.contains(&what);
        !planted
    })
}

/// The small tile, which stores either layout of dst.
fn in_fp8(device: &CudaDevice) -> Outcome {
    all_are_found(device, "open fp8", &["fprop_fp8_sm89_64x64x64"], |what| {
        let anywhere = [
            "no wait for copies",
            "a wait for one copy too few",
            "no fences around the arrival of a block",
            "fragments of the weight swapped",
            "fragments of src swapped",
            "halves of words swapped",
            "no barrier between slabs of bytes",
            "the first vector of bytes copied without its swizzle",
            "no barrier around the sums of bytes",
            "no upper bound of a clip",
            NO_SCALE,
            SATURATED_EARLY,
            PAIRS_SWAPPED,
        ];
        !anywhere.contains(&what)
    })
}

/// Opens a device and loads its kernels of fp8.
pub fn open_fp8() -> Result<String, Error> {
    let device = CudaDevice::open(0)?;
    let one = Array2::from_elem((1, 1), F8E4M3::ONE);
    QuantizedFp8::new(one, vec![1.0], Fp8Quantization::e4m3(1.0))
        .prepare(&device.clone().into())?;
    Ok(device.to_string())
}

/// What the started processes do.
pub fn child(device: &CudaDevice) -> Result<String, Error> {
    let kernel = std::env::var(KERNEL).expect("the test says which kernel");
    match kernel.split('_').nth(1) {
        Some("bf16") if kernel.starts_with("wgrad") => of_wgrad::<bf16>(device),
        Some("f16") if kernel.starts_with("wgrad") => of_wgrad::<f16>(device),
        Some("tf32") if kernel.starts_with("wgrad") => of_wgrad::<f32>(device),
        Some("bf16") => of::<bf16>(device, &kernel),
        Some("f16") => of::<f16>(device, &kernel),
        Some("i8") => of_bytes(device, &kernel),
        Some("fp8") => of_fp8(device, &kernel),
        _ => of_f32(device, &kernel),
    }
}

fn layout_of(kernel: &str) -> Layout {
    if kernel.ends_with("nhwc") { Layout::Last } else { Layout::First }
}

/// Eight slabs of aligned tensors, which blocks share, and of others.
fn of<T: Value>(device: &CudaDevice, kernel: &str) -> Result<String, Error> {
    let layout = layout_of(kernel);
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

/// A backward pass in every pair of layouts, aligned and not, of eight slabs, or of sixteen of numbers that
/// take rounding to be TF32.
fn of_wgrad<T: Value>(device: &CudaDevice) -> Result<String, Error> {
    let mut random = Random::new(86);
    for width in [64, 61] {
        let case = Case::new(1, 64, 64, [1, 4, width]);
        let layer = case.layer(random.integers(case.c_out * case.c_in));
        let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
        let d = Array5::from_shape_fn(case.dst_shape(), |_| random.integer());
        let mut expected = vec![0.0f32; case.c_out * case.c_in];
        for ((_, c, _, y, x), d) in d.indexed_iter() {
            for k in 0..case.c_in {
                expected[c * case.c_in + k] += d * src[[0, k, 0, y, x]];
            }
        }
        let (first, last) = (Layout::First, Layout::Last);
        let almost = if T::DTYPE == DType::F32 { ALMOST_TF32 } else { 1.0 };
        let (src, d) = (src * almost, d * almost);
        for layouts in [(first, first), (last, last), (first, last), (last, first)] {
            let src = Placed::<T>::filled(device, src.view(), layouts.0);
            let d = Placed::<T>::filled(device, d.view(), layouts.1);
            let (src, d) = (src.view(), d.view());
            let options = Options { math: Math::Tf32, ..Options::default() };
            let mut params = Params::with_options(&layer, &device.clone().into(), options)?;
            let mut grads = params.grads();
            let mut dst = Placed::<T>::blank(device, case.dst_shape(), layouts.1);
            let workspace = params.call(&src).run_into(&mut dst.view_mut())?;
            params.backward_call(&src, workspace, &d).run(&mut grads)?;
            if grads.get("weight") != Some(&expected) {
                return Ok(format!("wrong: width {width}, {layouts:?}"));
            }
        }
    }
    Ok("right".into())
}

/// As [`of`], of numbers that take rounding to be TF32.
fn of_f32(device: &CudaDevice, kernel: &str) -> Result<String, Error> {
    let layout = layout_of(kernel);
    let tf32 = kernel.contains("_tf32_");
    let math = if tf32 { Math::Tf32 } else { Math::F32 };
    let mut random = Random::new(84);
    for (width, splits) in [(16, 1), (16, 2), (15, 1)] {
        let case = Case::new(1, 128, 64, [1, 4, width]);
        let weight = random.normal(case.c_out * case.c_in);
        let src = random.tensor(case.src_shape());
        let as_used = |x: f32| if tf32 { nearest(x) } else { x };
        let rounded = src.mapv(as_used).into_dyn();
        let inputs = reference::Inputs { sources: vec![rounded.view()], ..Default::default() };
        let of_rounded = case.layer(weight.iter().map(|&x| as_used(x)).collect());
        let expected = reference::forward(&of_rounded, &inputs)?;
        let options = PrepareOptions { math, ..force(&format!("{kernel}/{splits}")) };
        let layer = case.layer(weight).prepare_with(&Device::from(device.clone()), options)?;
        let src = Placed::<f32>::filled(device, src.view(), layout);
        let mut dst = Placed::<f32>::blank(device, case.dst_shape(), layout);
        layer.forward_into(&src.view(), &mut dst.view_mut())?;
        device.synchronize()?;
        // An operand that is not rounded is off by up to 5e-4 of itself.
        let near = |(&got, &expected): (&f32, &f64)| {
            (f64::from(got) - expected).abs() <= 2e-5 * expected.abs().max(1.0)
        };
        if !dst.read().iter().zip(&expected).all(near) {
            return Ok(format!("wrong: width {width}, {splits} splits"));
        }
    }
    Ok("right".into())
}

/// Four slabs of bytes of either sign, in either layout, and shared by blocks: the CPU's bytes, of which
/// some are beyond both ends.
fn of_bytes(device: &CudaDevice, kernel: &str) -> Result<String, Error> {
    let mut random = Random::new(85);
    for (layout, splits) in [(Layout::First, 1), (Layout::Last, 1), (Layout::First, 2)] {
        let case = Case::new(1, 256, 64, [1, 4, 16]);
        let weight = Array2::from_shape_simple_fn((64, 256), || random.integer() as i8);
        let quantization = Quantization::u8(0.05, 128);
        let layer =
            Quantized::new(weight, vec![0.02; 64], quantization).dst(Quantization::u8(0.03, 99));
        let src =
            Array5::from_shape_simple_fn(case.src_shape(), || (random.uniform() * 256.0) as u8);
        let expected: ArrayD<u8> = layer.prepare(&Device::cpu())?.call(&src).run()?.into_dyn();
        let options = force(&format!("{kernel}/{splits}"));
        let layer = layer.prepare_with(&Device::from(device.clone()), options)?;
        let src = Placed::holding(device, src.view(), layout);
        let mut dst = Placed::<u8>::blank(device, case.dst_shape(), layout);
        layer.call(&src.view()).run_into(&mut dst.view_mut())?;
        device.synchronize()?;
        if dst.held().into_dyn() != expected {
            return Ok(format!("wrong: {layout:?}, {splits} splits"));
        }
    }
    Ok("right".into())
}

/// Four slabs of integers, in either layout, and shared by blocks: the CPU's results, of which some are
/// clipped above and some beyond e4m3 below.
fn of_fp8(device: &CudaDevice, kernel: &str) -> Result<String, Error> {
    let mut random = Random::new(87);
    for (layout, splits) in [(Layout::First, 1), (Layout::Last, 1), (Layout::First, 2)] {
        let case = Case::new(1, 256, 64, [1, 4, 16]);
        let weight = Array2::from_shape_simple_fn((64, 256), || F8E4M3::from_f32(random.integer()));
        let scale: Vec<f32> = (0..64).map(|c| 2f32.powi(c % 4 - 1)).collect();
        let layer = QuantizedFp8::new(weight, scale, Fp8Quantization::e4m3(1.0))
            .clip(-400.0, 200.0)
            .dst(Fp8Quantization::e4m3(0.5));
        let src =
            Array5::from_shape_simple_fn(case.src_shape(), || F8E4M3::from_f32(random.integer()));
        let expected: ArrayD<F8E4M3> = layer.prepare(&Device::cpu())?.call(&src).run()?.into_dyn();
        let options = force(&format!("{kernel}/{splits}"));
        let layer = layer.prepare_with(&Device::from(device.clone()), options)?;
        let src = Placed::holding(device, src.view(), layout);
        let mut dst = Placed::<F8E4M3>::blank(device, case.dst_shape(), layout);
        layer.call(&src.view()).run_into(&mut dst.view_mut())?;
        device.synchronize()?;
        if !dst.held().iter().zip(&expected).all(|(got, want)| got.to_bits() == want.to_bits()) {
            return Ok(format!("wrong: {layout:?}, {splits} splits"));
        }
    }
    Ok("right".into())
}
