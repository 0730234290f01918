//! What the kernels move, beside what they must, as the stand-in driver counts it: sectors as they
//! leave a warp, before any cache, and wavefronts of shared memory.

use libtest_mimic::Failed;
use ndarray::{Array2, Array5};
use pointwise::{
    CudaDevice, DType, Device, Error, LayerNorm, Layout as Order, Math, Pointwise, PrepareOptions,
    Quantization, Quantized, SourceStage, bf16, f16,
};

use super::cases::{Case, GROUPS, Layout, Placed, Value, force, groups, kernels, kernels_of};
use super::driver::expect;
use super::{OnDevice, Outcome, int8, tensor_cores};

pub const STAND_IN_TRIALS: &[OnDevice] = &[
    ("every_kernel_moves_little_more_than_it_must", of_every_kernel),
    ("large_layers_of_networks_move_little_more_than_they_must", of_layers),
    ("groups_run_in_one_launch", of_groups),
];

/// The positions that are interpreted; the channels are the layers' own, and planes of 7x7, which no
/// vector divides.
const PLANE: [usize; 3] = [1, 16, 16];
const ODD: [usize; 3] = [1, 7, 7];

/// One call whose launches are counted, on whole tiles and aligned tensors.
struct Counted {
    name: String,
    /// With how many blocks share a sum.
    kernel: String,
    on: On,
    case: Case,
    layout: Layout,
    stages: Stages,
}

#[derive(Clone, Copy, PartialEq)]
enum On {
    Real(DType, Math),
    Bytes,
}

impl On {
    fn size(self) -> usize {
        match self {
            On::Real(dtype, _) => dtype.size(),
            On::Bytes => 1,
        }
    }
}

const F32: On = On::Real(DType::F32, Math::F32);

#[derive(Clone, Copy, PartialEq)]
enum Stages {
    None,
    BatchNormRelu,
    Gate,
    LayerNorm,
}

impl Counted {
    fn layer(&self) -> Pointwise {
        let Case { c_in, c_out, stride, .. } = self.case;
        let layer = Pointwise::new(Array2::ones((c_out, c_in))).stride(stride);
        match self.stages {
            Stages::None => layer.relu(),
            Stages::BatchNormRelu => layer
                .source_affine(vec![1.0; c_in], vec![0.0; c_in])
                .source_activation(pointwise::Activation::Relu),
            Stages::Gate => layer.source_stage(SourceStage::Gate),
            Stages::LayerNorm => layer.layer_norm(LayerNorm::over_channels()),
        }
    }

    fn run(&self, device: &CudaDevice) -> Result<(), Error> {
        match self.on {
            On::Real(DType::F16, math) => self.run_as::<f16>(device, math),
            On::Real(DType::Bf16, math) => self.run_as::<bf16>(device, math),
            On::Real(_, math) => self.run_as::<f32>(device, math),
            On::Bytes => self.run_on_bytes(device),
        }
    }

    fn run_on_bytes(&self, device: &CudaDevice) -> Result<(), Error> {
        let Counted { kernel, case, layout, .. } = self;
        let one = Quantization::u8(1.0, 0);
        let weight = Array2::ones((case.c_out, case.c_in));
        let layer = Quantized::new(weight, vec![1.0; case.c_out], one).dst(one).stride(case.stride);
        let prepared = layer.prepare_with(&device.clone().into(), force(kernel))?;
        let src = Placed::<u8>::holding(device, Array5::zeros(case.src_shape()).view(), *layout);
        let mut dst = Placed::<u8>::blank(device, case.dst_shape(), *layout);
        prepared.call(&src.view()).run_into(&mut dst.view_mut())?;
        device.synchronize()
    }

    fn run_as<T: Value>(&self, device: &CudaDevice, math: Math) -> Result<(), Error> {
        let &Counted { ref kernel, ref case, layout, .. } = self;
        let options = PrepareOptions { math, ..force(kernel) };
        let src = Placed::<T>::filled(device, Array5::zeros(case.src_shape()).view(), layout);
        let gate = Array5::zeros([case.n, case.c_in, 1, 1, 1]);
        let gate = Placed::<T>::filled(device, gate.view(), Layout::First);
        let mut dst = Placed::<T>::blank(device, case.dst_shape(), layout);
        let prepared = self.layer().prepare_as::<T>(&device.clone().into(), options)?;
        let (src, gate) = (src.view(), gate.view());
        let call = prepared.call(&src);
        let call = if self.stages == Stages::Gate { call.gate(&gate) } else { call };
        call.run_into(&mut dst.view_mut())?;
        device.synchronize()
    }

    /// How many blocks share a sum.
    fn splits(&self) -> usize {
        self.kernel.split_once('/').map_or(1, |(_, splits)| splits.parse().unwrap())
    }

    /// What each launch must load and store, in bytes, if every tile reads its rows of the weight and
    /// its positions of src once; and if blocks share a sum, each of them leaves its part of a tile,
    /// and one reads them all. Positions that a stride skips share sectors with those that it keeps. A
    /// sum of bytes takes a scale and an offset of 4 bytes each, which are looked up, in L1, for 16
    /// positions of a channel at once; of channels last for two in tiles of 128 rows, for four in those of 64.
    fn least(&self) -> Vec<(f64, f64)> {
        let Case { n, c_in, c_out, stride, .. } = self.case;
        let [.., d, h, w] = self.case.dst_shape();
        let positions = n * d * h * w;
        let tile = self.kernel.split(['_', '/']).find(|part| part.matches('x').count() == 2);
        let tile: Vec<usize> = tile.unwrap().split('x').map(|size| size.parse().unwrap()).collect();
        let (rows, across) = (c_out.div_ceil(tile[0]), positions.div_ceil(tile[1]));
        let beside = if self.layout == Layout::First { stride } else { 1 };
        let (weight, src) = (across * c_in * c_out, rows * c_in * positions * beside);
        let dst = (c_out * positions) as f64;
        let splits = self.splits();
        let shared = if splits > 1 { 4 * splits * rows * tile[0] * across * tile[1] } else { 0 };
        let looked_up = match (self.on, self.layout) {
            (On::Bytes, Layout::Last) => 8.0 * tile[0] as f64 / 256.0 * dst,
            (On::Bytes, _) => 0.5 * dst,
            _ => 0.0,
        };
        let (size, shared) = (self.on.size() as f64, shared as f64);
        let loads = size * (weight + src) as f64 + shared + looked_up;
        let mut launches = vec![(loads, size * dst + shared)];
        if self.stages == Stages::LayerNorm {
            // Beside the values gamma and beta, of which a warp's lanes ask for one vector, or channels last
            // for eight per four positions.
            let looked_up = if self.layout == Layout::Last { 0.5 } else { 0.125 };
            launches.push((4.0 * (1.0 + looked_up) * dst, 4.0 * dst));
        }
        launches
    }
}

/// What is allowed of it, beside the least.
impl Counted {
    /// Planes that no vector of channels first divides: one element at a time.
    fn odd(&self) -> bool {
        self.layout == Layout::First && self.case.dst_shape()[3] == ODD[1]
    }

    fn strided(&self) -> bool {
        self.layout == Layout::First && self.case.stride > 1
    }

    fn loads(&self) -> (f64, f64) {
        match (self.stages, self.on) {
            // A byte at a time, of sectors of 32.
            (_, On::Bytes) if self.odd() && self.strided() => (1.0, 6.1),
            (_, On::Bytes) if self.odd() => (1.0, 4.7),
            (_, On::Bytes) if self.strided() => (1.0, 3.0),
            (_, On::Bytes) => (1.0, 1.01),
            // Rows of scalars begin and end within sectors, and every other of 14 the more so.
            (Stages::None, _) if self.odd() && self.strided() => (1.0, 1.8),
            (Stages::None, _) if self.odd() => (1.0, 1.5),
            (Stages::None, _) => (1.0, 1.15),
            // Stages of src and norms look up values per channel again and again, in L1, and a gate
            // its sample per position, outside of the products' loop.
            _ => (0.99, 1.35),
        }
    }

    fn stores(&self) -> f64 {
        // Scalars of lanes that have four or eight positions each.
        match self.on.size() {
            4 if self.odd() => 5.3,
            2 if self.odd() => 11.5,
            1 if self.odd() => 2.7,
            _ => 1.15,
        }
    }

    /// By wavefront; of real numbers on whole planes the given ones.
    fn conflicts(&self, of_f32: f64, of_16_bits: f64) -> f64 {
        match (self.stages, self.on.size()) {
            (Stages::None, 1) if self.layout == Layout::Last => 0.0,
            // Src is turned byte by byte.
            (Stages::None, 1) if self.odd() || self.strided() => 0.35,
            (Stages::None, 1) => 0.08,
            (Stages::None, _) if self.odd() => 0.001,
            // A block that has a part of the sums begins as one that has them all.
            (Stages::None, _) if self.splits() > 1 => 0.03,
            (Stages::None, 4) => of_f32,
            // Slabs have half the wavefronts, beside which what is outside of the loop weighs twice
            // as much.
            (Stages::None, _) => of_16_bits,
            _ => 0.08,
        }
    }
}

fn layout_of(kernel: &str) -> Layout {
    if kernel.contains("nhwc") { Layout::Last } else { Layout::First }
}

fn every_kernel(device: &CudaDevice) -> Vec<Counted> {
    let plain = |dtype, kernels: Vec<&'static str>| {
        kernels.into_iter().map(move |kernel| (kernel, On::Real(dtype, Math::F32)))
    };
    let f32s = tensor_cores::all(device).into_iter();
    let all = plain(DType::F32, kernels(device))
        .chain(f32s.map(|(kernel, math)| (kernel, On::Real(DType::F32, math))))
        .chain(plain(DType::F16, kernels_of::<f16>(device)))
        .chain(plain(DType::Bf16, kernels_of::<bf16>(device)));
    let bytes = int8::kernels(&Device::from(device.clone())).expect("the device is there");
    let bytes = [Layout::First, Layout::Last]
        .into_iter()
        .flat_map(|layout| bytes.iter().map(move |&kernel| (kernel, On::Bytes, layout)));
    let all = all.map(|(kernel, on)| (kernel, on, layout_of(kernel))).chain(bytes);
    let mut counted = Vec::new();
    for (i, (kernel, on, layout)) in all.enumerate() {
        // 16 bits: sums four times as long, beside which what is read at the end weighs little.
        let c_in = if on.size() == 4 { 512 } else { 2048 };
        let of = |kernel: String, n, positions| Counted {
            name: "a layer".into(),
            kernel,
            on,
            case: Case::new(n, c_in, 256, positions),
            layout,
            stages: Stages::None,
        };
        counted.push(of(format!("{kernel}/1"), 2, PLANE));
        // Blocks that share sums, of a few positions.
        counted.push(of(format!("{kernel}/{}", 2 + i % 3), 1, [1, 8, 8]));
    }
    counted
}

/// The layers of `benches/layers.csv` with 50 million products and more that are one product of whole
/// tensors, each with the kernel that the planner takes for 32 samples of the real size.
fn layers(device: &CudaDevice) -> Vec<Counted> {
    let table = include_str!("../../benches/layers.csv");
    // Of 16 bits, what the chip has tensor cores for.
    let half = if device.compute_capability() < (8, 0) { DType::F16 } else { DType::Bf16 };
    let mut all = Vec::new();
    for (i, row) in table.lines().skip(1).enumerate() {
        let fields: Vec<&str> = row.split(',').collect();
        let size = |column: usize| fields[column].parse::<usize>().unwrap();
        let (c_in, c_out, h, w, stride) = (size(3), size(4), size(5), size(6), size(7));
        if c_in * c_out * h * w < 50_000_000 || size(8) > 1 {
            continue;
        }
        let name = format!("{} {}", fields[0], fields[1]);
        let layout = [Layout::First, Layout::Last][i % 2];
        let (n, [d, ph, pw]) = if h.div_ceil(stride) == 7 { (4, ODD) } else { (1, PLANE) };
        let case = Case { stride, ..Case::new(n, c_in, c_out, [d, ph * stride, pw * stride]) };
        let of_real = |on| chosen_of(on, device, [32, c_in, h, w], (c_out, stride, layout));
        for on in [F32, On::Real(DType::F32, Math::Tf32), On::Real(half, Math::F32), On::Bytes] {
            let (kernel, case) = (of_real(on), case.clone());
            all.push(Counted {
                name: name.clone(),
                kernel,
                on,
                case,
                layout,
                stages: Stages::None,
            });
        }
    }
    // Stages of src cost no traffic worth the name; layer norm reads dst once more.
    for (name, c_in, c_out, stages) in [
        ("densenet b2.bottleneck", 256, 128, Stages::BatchNormRelu),
        ("efficientnet_b0 b15.proj, gated", 1152, 192, Stages::Gate),
        ("convnext_t s1.pw2, normalised", 384, 96, Stages::LayerNorm),
    ] {
        for tile in ["64x64x16_nchw", "128x128x8_nhwc"] {
            let kernel = format!("fprop_f32_simt_{tile}/1");
            let (case, layout) = (Case::new(1, c_in, c_out, PLANE), layout_of(tile));
            all.push(Counted { name: name.into(), kernel, on: F32, case, layout, stages });
        }
    }
    all
}

/// What the planner takes, in blocks of their own.
fn chosen_of(on: On, device: &CudaDevice, src: [usize; 4], dst: (usize, usize, Layout)) -> String {
    match on {
        On::Real(DType::F16, math) => chosen::<f16>(device, math, src, dst),
        On::Real(DType::Bf16, math) => chosen::<bf16>(device, math, src, dst),
        On::Real(_, math) => chosen::<f32>(device, math, src, dst),
        On::Bytes => {
            let (c_out, stride, _) = dst;
            let one = Quantization::u8(1.0, 0);
            let layer =
                Quantized::new(Array2::ones((c_out, src[1])), vec![1.0; c_out], one).dst(one);
            let layer = layer.stride(stride).prepare(&device.clone().into()).unwrap();
            format!("{}/1", layer.explain(&src).unwrap().kernel)
        }
    }
}

fn chosen<T: Value>(
    device: &CudaDevice,
    math: Math,
    src: [usize; 4],
    (c_out, stride, layout): (usize, usize, Layout),
) -> String {
    let options = PrepareOptions { math, ..PrepareOptions::default() };
    let layer = Pointwise::new(Array2::ones((c_out, src[1]))).stride(stride);
    let layer = layer.prepare_as::<T>(&device.clone().into(), options).unwrap();
    let order = match layout {
        Layout::First => Order::ChannelsFirst,
        _ => Order::ChannelsLast,
    };
    format!("{}/1", layer.explain_in(&src, order).unwrap().kernel)
}

/// What the started processes do.
pub fn child(what: &str, device: &CudaDevice) -> Result<String, Error> {
    let all = match what {
        "counted groups" => match groups(device) {
            Ok(()) => return Ok(format!("{} calls", 2 * GROUPS.len())),
            Err(failed) => return Ok(failed.message().unwrap_or("failed").into()),
        },
        "counted kernels" => every_kernel(device),
        _ => layers(device),
    };
    all.iter().try_for_each(|counted| counted.run(device))?;
    Ok(format!("{} calls", all.len()))
}

fn of_every_kernel(device: &CudaDevice) -> Outcome {
    compare("counted kernels", &every_kernel(device), (0.01, 0.012))
}

fn of_layers(device: &CudaDevice) -> Outcome {
    let all = layers(device);
    assert!(all.len() > 30, "only {}", all.len());
    compare("counted layers", &all, (0.03, 0.06))
}

fn of_groups(_: &CudaDevice) -> Outcome {
    let calls = 2 * GROUPS.len();
    let launches = report_of("counted groups", calls)?;
    assert_eq!(launches.lines().count(), calls, "{launches}");
    Ok(())
}

/// What the driver counts of the launches of a started process that makes so many calls.
fn report_of(what: &str, calls: usize) -> Result<String, Failed> {
    let file = format!("pointwise-{}-{}.txt", what.replace(' ', "-"), std::process::id());
    let report = std::env::temp_dir().join(file);
    let path = report.to_string_lossy().into_owned();
    let variables = [("PW_EMULATOR_REPORT", &*path), ("PW_EMULATOR_CHECKS", "0")];
    expect(what, &variables, &[&format!("{calls} calls")])?;
    let text = std::fs::read_to_string(&report)?;
    std::fs::remove_file(&report)?;
    Ok(text)
}

/// The last are what launches without stages of src and norms may have of bank conflicts, by
/// wavefront.
fn compare(
    what: &str,
    all: &[Counted],
    (conflicts_of_f32, conflicts_of_16_bits): (f64, f64),
) -> Outcome {
    let text = report_of(what, all.len())?;
    let mut lines = text.lines();
    let mut wrong = Vec::new();
    for counted in all {
        for (load, store) in counted.least() {
            let line = lines.next().ok_or("a launch is not in the report")?;
            let field = |key: &str| -> &str {
                line.split(' ').find_map(|f| f.strip_prefix(&format!("{key}="))).unwrap()
            };
            let count = |key: &str| -> f64 { field(key).parse().unwrap() };
            let product = |key: &str| -> f64 {
                field(key).split(['x', ',']).map(|n| n.parse::<f64>().unwrap()).product()
            };
            let kernel = line.split(' ').next().unwrap();
            let loads = 32.0 * count("global_load_sectors") / load;
            let stores = 32.0 * count("global_store_sectors") / store;
            let conflicts = count("bank_conflicts") / count("shared_wavefronts").max(1.0);
            let found = format!(
                "{}: {kernel}: loads {loads:.3}, stores {stores:.3}, conflicts {conflicts:.4}, \
                 instructions {}",
                counted.name,
                count("instructions")
            );
            if std::env::var_os("POINTWISE_SHOW_TRAFFIC").is_some() {
                println!("{found}");
            }
            let (least, most) = counted.loads();
            // A tile begins with a look-up of the positions that a warp reads, every eighth at most, and
            // nothing else conflicts, but where bytes of channels first are turned.
            let warps = product("grid") * (product("block") / 32.0);
            let elsewhere = count("bank_conflicts") - 14.0 * warps;
            let may = counted.stages != Stages::None || counted.on == On::Bytes;
            let most_conflicts = counted.conflicts(conflicts_of_f32, conflicts_of_16_bits);
            let fits = (least..=most).contains(&loads)
                && (least..=counted.stores()).contains(&stores)
                && (may || elsewhere <= 0.0)
                && conflicts <= most_conflicts;
            if !fits {
                wrong.push(found);
            }
        }
    }
    assert!(lines.next().is_none(), "more launches than expected");
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}
