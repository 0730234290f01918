//! What each wrapper of `kernels/ptx.cuh` returned on a GPU, which every other device must return too.
//!
//! `POINTWISE_GOLDEN_TO=FILE` writes what this device returns into FILE, to be committed as
//! [`RECORDED`] if it is a GPU of the kind that the file's name says. The kernels are those of
//! `golden/wrappers.cu`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use pointwise::CudaDevice;
use pointwise::cudarc::driver::{CudaModule, DriverError, LaunchConfig, PushKernelArg};
use pointwise::cudarc::nvrtc::Ptx;
use pointwise::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::numbers::Random;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[("instructions_return_what_a_gpu_returned", golden)];

const RECORDED: &str = "tests/fixtures/golden_sm_90.safetensors";
/// What tensor cores of this chip do to a sum of products is part of the recording.
const RECORDED_ON: (u32, u32) = (9, 0);

/// The wrappers that every chip has, and those from sm_80 on.
const SM_75: [&str; 8] = [
    "copy_async_4",
    "copy_async_8",
    "copy_async_16",
    "convert",
    "halves",
    "mma_f16",
    "mma_s8",
    "mma_u8",
];
const SM_80: [&str; 3] = ["round_tf32", "mma_tf32", "mma_bf16"];

/// The wrappers as they are compiled from a chip on.
struct Image {
    chip: (u32, u32),
    ptx: &'static str,
    wrappers: &'static [&'static [&'static str]],
}

const IMAGES: [Image; 2] = [
    Image { chip: (7, 5), ptx: include_str!("golden/wrappers_75.ptx"), wrappers: &[&SM_75] },
    Image {
        chip: (8, 0),
        ptx: include_str!("golden/wrappers_80.ptx"),
        wrappers: &[&SM_75, &SM_80],
    },
];

const LANES: usize = 32;
/// Words that a lane returns.
const RESULT: usize = 4;

/// What a product's operands are made of.
#[derive(Clone, Copy)]
enum Format {
    F16,
    Bf16,
    Tf32,
}

impl Format {
    /// Of the products that are rounded.
    fn of(wrapper: &str) -> Option<Self> {
        Some(match wrapper {
            "mma_f16" => Format::F16,
            "mma_bf16" => Format::Bf16,
            "mma_tf32" => Format::Tf32,
            _ => return None,
        })
    }

    /// The elements that a register holds.
    fn elements(self, word: u32) -> Vec<f32> {
        let halves = [word as u16, (word >> 16) as u16];
        match self {
            Format::F16 => halves.map(|bits| f16::from_bits(bits).to_f32()).to_vec(),
            Format::Bf16 => halves.map(|bits| bf16::from_bits(bits).to_f32()).to_vec(),
            Format::Tf32 => vec![f32::from_bits(word & !0x1fff)],
        }
    }
}

fn golden(device: &CudaDevice) -> Outcome {
    let mut results = BTreeMap::new();
    for Image { chip, ptx, wrappers } in IMAGES {
        if device.compute_capability() < chip {
            continue;
        }
        let module = device.stream().context().load_module(Ptx::from_src(ptx))?;
        for name in wrappers.iter().copied().flatten() {
            let got = run(device, &module, name, &records(name))?;
            results.insert(format!("sm_{}{}/{name}", chip.0, chip.1), got);
        }
    }
    if let Some(file) = std::env::var_os("POINTWISE_GOLDEN_TO") {
        let bytes: BTreeMap<&str, Vec<u8>> = results
            .iter()
            .map(|(name, words)| (&name[..], words.iter().flat_map(|w| w.to_le_bytes()).collect()))
            .collect();
        let views = bytes.iter().map(|(name, bytes)| {
            let shape = vec![bytes.len() / 4 / RESULT, RESULT];
            (*name, TensorView::new(Dtype::U32, shape, bytes).expect("as long as its shape says"))
        });
        let about = [("device".into(), device.to_string())].into();
        fs::write(file, safetensors::serialize(views, Some(about))?)?;
        return Ok(());
    }

    let file = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(RECORDED))?;
    let recorded = SafeTensors::deserialize(&file)?;
    for (name, got) in &results {
        let words = recorded.tensor(name)?;
        let words: Vec<u32> = words
            .data()
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
            .collect();
        if words.len() != got.len() {
            return Err(
                format!("{name}: {} words, recorded were {}", got.len(), words.len()).into()
            );
        }
        let wrapper = name.split('/').next_back().unwrap_or_default();
        let sizes = match Format::of(wrapper) {
            Some(format) if device.compute_capability() != RECORDED_ON => {
                Some(sizes(format, &records(wrapper)))
            }
            _ => None,
        };
        let same = |at: usize| match &sizes {
            Some(sizes) => close(got[at], words[at], sizes[at]),
            None => got[at] == words[at],
        };
        let wrong: Vec<usize> = (0..got.len()).filter(|&at| !same(at)).collect();
        if let Some(&at) = wrong.first() {
            return Err(format!(
                "{name}: {} of {} words differ, first word {} of record {}: {:#010x}, recorded \
                 was {:#010x}",
                wrong.len(),
                got.len(),
                at % RESULT,
                at / RESULT,
                got[at],
                words[at]
            )
            .into());
        }
    }
    Ok(())
}

/// One warp per 32 records.
fn run(
    device: &CudaDevice,
    module: &std::sync::Arc<CudaModule>,
    name: &str,
    records: &[Vec<u32>],
) -> Result<Vec<u32>, DriverError> {
    let stream = device.stream();
    let kernel = module.load_function(name)?;
    let src = stream.clone_htod(&records.concat())?;
    let mut dst = stream.alloc_zeros::<u32>(records.len() * RESULT)?;
    let shape = LaunchConfig {
        grid_dim: ((records.len() / LANES) as u32, 1, 1),
        block_dim: (LANES as u32, 1, 1),
        shared_mem_bytes: 0,
    };
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&src).arg(&mut dst);
    // SAFETY: both arrays have a record for each thread, of the sizes that wrappers.cu gives.
    unsafe { launch.launch(shape) }?;
    stream.clone_dtoh(&dst)
}

/// What each lane is given.
fn records(name: &str) -> Vec<Vec<u32>> {
    let random = &mut Random::new(name.bytes().map(u64::from).sum());
    if let Some(format) = Format::of(name) {
        return (0..40 * LANES).map(|lane| fragments(random, format, lane / LANES)).collect();
    }
    match name {
        "mma_s8" | "mma_u8" => words(random, 12, 10),
        "convert" => conversions(random),
        "round_tf32" => words(random, 12, 8),
        _ => words(random, 2, 8),
    }
}

fn words(random: &mut Random, warps: usize, len: usize) -> Vec<Vec<u32>> {
    (0..warps * LANES).map(|_| (0..len).map(|_| random.word()).collect()).collect()
}

/// Numbers at which roundings turn, and others of every size.
fn conversions(random: &mut Random) -> Vec<Vec<u32>> {
    const CORNERS: [f32; 16] = [
        0.0,
        -0.0,
        1.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        65504.0,
        65519.996,
        65520.0,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-45,
        5.9604645e-8,
        2.9802322e-8,
        2.980233e-8,
        6.097555e-5,
    ];
    let number = |random: &mut Random| match random.word() % 8 {
        0 => CORNERS[random.word() as usize % CORNERS.len()].to_bits(),
        // Halfway between two f16, or two bf16, or next to it.
        1 => (random.word() & !0x1fff | 0x1000).wrapping_add(random.word() % 3).wrapping_sub(1),
        2 => (random.word() & !0xffff | 0x8000).wrapping_add(random.word() % 3).wrapping_sub(1),
        // Of the exponents that f16 has.
        3 | 4 => (0x3300_0000 + random.word() % 0x1500_0000) | random.word() & 1 << 31,
        _ => random.word(),
    };
    // An odd factor: every 16-bit pattern class comes up.
    let record = |i: u32| vec![number(random), number(random), i * 33, 0, 0, 0, 0, 0];
    (0..64 * LANES as u32).map(record).collect()
}

/// A lane's part of `a`, `b` and `c` in warp `warp`, whose remainder by 5 says what kind of numbers.
fn fragments(random: &mut Random, format: Format, warp: usize) -> Vec<u32> {
    let kind = warp % 5;
    let mut number = |wide: i32| match kind {
        // Exact whatever is rounded.
        0 => random.integer(),
        1 => random.normal(1)[0],
        // Of many sizes.
        2 => random.normal(1)[0] * 2f32.powi((random.word() % 18) as i32 - 12),
        3 => random.normal(1)[0] * 2f32.powi(wide),
        _ => f32::from_bits(random.word()),
    };
    let bits = |x: f32| match format {
        // Bits of any kind, where the number is any.
        Format::F16 if kind == 4 => x.to_bits() >> 16,
        Format::F16 => f16::from_f32(x).to_bits().into(),
        Format::Bf16 => bf16::from_f32(x).to_bits().into(),
        Format::Tf32 => x.to_bits(),
    };
    let mut operand = || match format {
        Format::Tf32 => bits(number(0)),
        _ => bits(number(0)) | bits(number(0)) << 16,
    };
    let mut record: Vec<u32> = (0..6).map(|_| operand()).collect();
    record.extend((0..4).map(|_| number(10).to_bits()));
    record
}

/// For each word that a product returns: the sum of the sizes of what is summed there.
fn sizes(format: Format, records: &[Vec<u32>]) -> Vec<f64> {
    let size = |x: f32| f64::from(x).abs();
    let warp = |lanes: &[Vec<u32>]| -> Vec<f64> {
        // Rows and columns lie as kernels/ptx.cuh says: four lanes share a row.
        let of = |row: usize, registers: &[usize]| -> Vec<f64> {
            let lane = |register: &usize, t: usize| lanes[4 * row + t][*register];
            let words = registers.iter().flat_map(|r| (0..4).map(move |t| (r, t)));
            words.flat_map(|(r, t)| format.elements(lane(r, t))).map(size).collect()
        };
        let result = |lane: usize, i: usize| {
            let a = of(lane / 4, if i < 2 { &[0, 2] } else { &[1, 3] });
            let b = of(lane % 4 * 2 + i % 2, &[4, 5]);
            let products: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            products + size(f32::from_bits(lanes[lane][6 + i]))
        };
        (0..LANES)
            .flat_map(|lane| (0..RESULT).map(move |i| (lane, i)))
            .map(|(l, i)| result(l, i))
            .collect()
    };
    records.chunks(LANES).flat_map(warp).collect()
}

/// Chips align the terms of a sum to the largest and cut what lies below one of its last bits: up to
/// 17 terms, each by less than 2^-23 of the largest. Infinities and NaN among them leave one result;
/// where finite ones reach beyond f32, whether it overflows depends on their order.
fn close(got: u32, recorded: u32, size: f64) -> bool {
    let [got, recorded] = [got, recorded].map(f32::from_bits).map(f64::from);
    if !size.is_finite() {
        return got == recorded || got.is_nan() && recorded.is_nan();
    }
    let overflows = size > f64::from(f32::MAX) && (got.is_infinite() || recorded.is_infinite());
    (got - recorded).abs() <= 17.0 * 2f64.powi(-23) * size || overflows
}
