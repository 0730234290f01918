//! What the kernels move, beside what they must, as the stand-in driver counts it: sectors as they
//! leave a warp, before any cache, and wavefronts of shared memory.

use libtest_mimic::Failed;
use ndarray::{Array2, Array5};
use pointwise::{
    CudaDevice, DType, Error, LayerNorm, Layout as Order, Math, Pointwise, PrepareOptions,
    SourceStage, bf16, f16,
};

use super::cases::{Case, GROUPS, Layout, Placed, Value, groups, kernels, kernels_of};
use super::driver::expect;
use super::tensor_cores;
use super::{OnDevice, Outcome};

pub const STAND_IN_TRIALS: &[OnDevice] = &[
    ("every_kernel_moves_little_more_than_it_must", of_every_kernel),
    ("large_layers_of_networks_move_little_more_than_they_must", of_layers),
    ("groups_run_in_one_launch", of_groups),
];

/// The positions that are interpreted; the channels are the layers' own.
const PLANE: [usize; 3] = [1, 16, 16];
/// And of planes that no vector divides.
const ODD: [usize; 3] = [1, 7, 7];

/// One call whose launches are counted, on whole tiles and aligned tensors.
struct Counted {
    name: String,
    kernel: String,
    dtype: DType,
    math: Math,
    case: Case,
    stages: Stages,
}

#[derive(Clone, Copy, PartialEq)]
enum Stages {
    None,
    BatchNormRelu,
    Gate,
    LayerNorm,
}

impl Counted {
    fn layer(&self) -> Pointwise {
        let Case { c_in, c_out, .. } = self.case;
        let layer = Pointwise::new(Array2::ones((c_out, c_in)));
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
        match self.dtype {
            DType::F16 => self.run_as::<f16>(device),
            DType::Bf16 => self.run_as::<bf16>(device),
            _ => self.run_as::<f32>(device),
        }
    }

    fn run_as<T: Value>(&self, device: &CudaDevice) -> Result<(), Error> {
        let Counted { kernel, math, case, .. } = self;
        let options =
            PrepareOptions { math: *math, kernel: Some(kernel.clone()), ..Default::default() };
        let layout = if kernel.contains("nhwc") { Layout::Last } else { Layout::First };
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

    /// What each launch must load and store, in bytes, if every tile reads its rows of the weight and
    /// its positions of src once.
    fn least(&self) -> Vec<(f64, f64)> {
        let Case { n, c_in, c_out, spatial, .. } = self.case;
        let positions = n * spatial.iter().product::<usize>();
        let tile = self.kernel.split(['_', '/']).find(|part| part.matches('x').count() == 2);
        let tile: Vec<usize> = tile.unwrap().split('x').map(|size| size.parse().unwrap()).collect();
        let weight = positions.div_ceil(tile[1]) * c_in * c_out;
        let src = c_out.div_ceil(tile[0]) * c_in * positions;
        let dst = (c_out * positions) as f64;
        let size = self.dtype.size() as f64;
        let mut launches = vec![(size * (weight + src) as f64, size * dst)];
        if self.stages == Stages::LayerNorm {
            // For the mean, for the deviations, for the values.
            launches.push((3.0 * 4.0 * dst, 4.0 * dst));
        }
        launches
    }
}

fn every_kernel(device: &CudaDevice) -> Vec<Counted> {
    let plain = |dtype, kernels: Vec<&'static str>| {
        kernels.into_iter().map(move |kernel| (kernel, dtype, Math::F32))
    };
    let all = plain(DType::F32, kernels(device))
        .chain(tensor_cores::all(device).into_iter().map(|(k, math)| (k, DType::F32, math)))
        .chain(plain(DType::F16, kernels_of::<f16>(device)))
        .chain(plain(DType::Bf16, kernels_of::<bf16>(device)));
    let counted = |(kernel, dtype, math): (&str, DType, Math)| Counted {
        name: "a layer".into(),
        kernel: format!("{kernel}/1"),
        dtype,
        math,
        // 16 bits: sums four times as long, beside which what is read at the end weighs little.
        case: Case::new(2, if dtype == DType::F32 { 512 } else { 2048 }, 256, PLANE),
        stages: Stages::None,
    };
    all.map(counted).collect()
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
        let (c_in, c_out, h, w) = (size(3), size(4), size(5), size(6));
        if c_in * c_out * h * w < 50_000_000 || size(7) * size(8) > 1 {
            continue;
        }
        let name = format!("{} {}", fields[0], fields[1]);
        let order = [Order::ChannelsFirst, Order::ChannelsLast][i % 2];
        let shape = [32, c_in, h, w];
        for (dtype, math) in [(DType::F32, Math::F32), (DType::F32, Math::Tf32), (half, Math::F32)]
        {
            let kernel = chosen_of(dtype, device, math, shape, (c_out, order));
            let (name, kernel) = (name.clone(), format!("{kernel}/1"));
            let case = Case::new(1, c_in, c_out, PLANE);
            all.push(Counted { name, kernel, dtype, math, case, stages: Stages::None });
        }
    }
    // Planes of 49 positions channels first: no vector of them is aligned.
    for (dtype, kernel) in [
        (DType::F32, "fprop_f32_simt_64x64x16_nchw"),
        (half, chosen_of(half, device, Math::F32, [32, 512, 7, 7], (2048, Order::ChannelsFirst))),
    ] {
        let case = Case::new(8, 512, 256, ODD);
        let (name, kernel) = ("planes of 7x7".into(), format!("{kernel}/1"));
        all.push(Counted { name, kernel, dtype, math: Math::F32, case, stages: Stages::None });
    }
    // Stages of src cost no traffic worth the name; layer norm reads dst again.
    for (name, c_in, c_out, stages) in [
        ("densenet b2.bottleneck", 256, 128, Stages::BatchNormRelu),
        ("efficientnet_b0 b15.proj, gated", 1152, 192, Stages::Gate),
        ("convnext_t s1.pw2, normalised", 384, 96, Stages::LayerNorm),
    ] {
        for tile in ["64x64x16_nchw", "128x128x8_nhwc"] {
            let kernel = format!("fprop_f32_simt_{tile}/1");
            let case = Case::new(1, c_in, c_out, PLANE);
            let (name, dtype, math) = (name.into(), DType::F32, Math::F32);
            all.push(Counted { name, kernel, dtype, math, case, stages });
        }
    }
    all
}

/// What the planner takes.
fn chosen_of(
    dtype: DType,
    device: &CudaDevice,
    math: Math,
    src: [usize; 4],
    dst: (usize, Order),
) -> &'static str {
    match dtype {
        DType::F16 => chosen::<f16>(device, math, src, dst),
        DType::Bf16 => chosen::<bf16>(device, math, src, dst),
        _ => chosen::<f32>(device, math, src, dst),
    }
}

fn chosen<T: Value>(
    device: &CudaDevice,
    math: Math,
    src: [usize; 4],
    (c_out, order): (usize, Order),
) -> &'static str {
    let options = PrepareOptions { math, ..PrepareOptions::default() };
    let layer = Pointwise::new(Array2::ones((c_out, src[1])));
    let layer = layer.prepare_as::<T>(&device.clone().into(), options).unwrap();
    layer.explain_in(&src, order).unwrap().kernel
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
            // Stages of src and norms look up values per channel again and again, in L1, and a gate
            // its sample per position, outside of the products' loop.
            let odd = counted.case.spatial == ODD;
            let (least, most, most_conflicts) = match counted.stages {
                // Rows of scalars begin and end within sectors.
                Stages::None if odd => (1.0, 1.5, 0.001),
                // Of 16 bits, slabs have half the wavefronts, beside which what is outside of the loop
                // weighs twice as much.
                Stages::None if counted.dtype == DType::F32 => (1.0, 1.15, conflicts_of_f32),
                Stages::None => (1.0, 1.15, conflicts_of_16_bits),
                _ => (0.99, 1.35, 0.08),
            };
            // Scalars of lanes that have four or eight positions each.
            let most_stores = match odd {
                true if counted.dtype == DType::F32 => 5.0,
                true => 11.5,
                false => 1.15,
            };
            // A tile begins with a look-up of the positions that a warp reads, every eighth at most, and
            // nothing else conflicts.
            let warps = product("grid") * (product("block") / 32.0);
            let elsewhere = count("bank_conflicts") - 14.0 * warps;
            let fits = (least..=most).contains(&loads)
                && (least..=most_stores).contains(&stores)
                && (counted.stages != Stages::None || elsewhere <= 0.0)
                && conflicts <= most_conflicts;
            if !fits {
                wrong.push(found);
            }
        }
    }
    assert!(lines.next().is_none(), "more launches than expected");
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}
