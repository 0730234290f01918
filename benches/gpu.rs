//! Times every layer of `layers.csv` on a GPU, in both layouts, and prints CSV. `peers/gpu.py`
//! times PyTorch in the same way.
//!
//! `cargo bench --features cuda --bench gpu -- [--batch N] [--only TEXT] [--chosen] [--tf32]
//! [--dtype f32|f16|bf16]`.
//! Each kernel's result is verified against the CPU's before it is timed; `--chosen` times only the
//! kernel that the planner takes, `--tf32` allows those on tensor cores for tensors of f32, and `--dtype` says
//! what tensors hold. Times are the GPU's own, between events, and L2 is flushed before each call.

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use ndarray::{Array4, ArrayD};
use pointwise::cudarc::driver::{CudaEvent, DriverError, result, sys};
use pointwise::init::{Init, bias};
use pointwise::{
    CudaDevice, CudaTensor, DType, Device, DeviceElement, Element, Layout, Math, Pointwise,
    PrepareOptions, bf16, f16, nhwc,
};

/// A product large and square enough that only arithmetic counts.
const SQUARE: &str = "square,4096,1,4096,4096,64,64,1,1,none";
const RUNS: usize = 30;
/// Overwriting this many times L2 leaves nothing of the tensors in it. It also keeps the GPU busy
/// for longer than the host needs to queue the call.
const FLUSH: i32 = 8;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome<bool> {
    let args: Vec<String> = std::env::args().collect();
    let option = |name: &str| args.iter().skip_while(|arg| *arg != name).nth(1).cloned();
    let batch: usize = option("--batch").map_or(Ok(32), |n| n.parse())?;
    let only = option("--only").unwrap_or_default();
    let chosen = args.iter().any(|arg| arg == "--chosen");
    let math = match args.iter().any(|arg| arg == "--tf32") {
        true => Math::Tf32,
        false => Math::F32,
    };
    let dtype: DType = option("--dtype").map_or(Ok(DType::F32), |name| name.parse())?;
    let measure = match dtype {
        DType::F16 => layer::<f16>,
        DType::Bf16 => layer::<bf16>,
        _ => layer::<f32>,
    };
    let timer = Timer::new(&CudaDevice::open(0)?)?;
    eprintln!(
        "{}, an empty call takes {:.2} us, and queueing a layer the host's thread {:.2} us",
        timer.device,
        timer.time(|| Ok(()))?.0,
        host_time(&timer.device)?
    );

    println!(
        "model,layer,n,cin,cout,h,w,stride,groups,act,layout,contender,kernel,median_us,min_us,gflops"
    );
    let mut all_right = true;
    for line in include_str!("layers.csv").lines().skip(1).chain([SQUARE]) {
        if line.contains(&only)
            && let Err(error) = measure(line, batch, chosen, math, &timer)
        {
            eprintln!("{line}: {error}");
            all_right = false;
        }
    }
    Ok(all_right)
}

fn layer<T: Element + DeviceElement>(
    line: &str,
    batch: usize,
    chosen: bool,
    math: Math,
    timer: &Timer,
) -> Outcome {
    let fields: Vec<_> = line.split(',').collect();
    let [model, name, sizes @ .., act] = fields.as_slice() else {
        return Err("not a layer".into());
    };
    let sizes: Vec<usize> = sizes.iter().map(|s| s.parse()).collect::<Result<_, _>>()?;
    let &[_, c_in, c_out, h, w, stride, groups] = sizes.as_slice() else {
        return Err("not a layer".into());
    };
    let n = if *model == "square" { 1 } else { batch };
    let nearest = |x: f32| T::from_f32(x).to_f32();
    let weight = Init::pytorch_default().weight(c_out, c_in / groups, 1)?.mapv(nearest);
    let mut layer = Pointwise::new(weight).groups(groups).stride(stride);
    layer = layer.bias(bias(c_out, c_in / groups, 2)?);
    if *act == "relu" {
        layer = layer.relu();
    }
    let mut state = 3u32;
    let last = Array4::from_shape_simple_fn((n, h, w, c_in), || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        nearest((state >> 8) as f32 / 8_388_608.0 - 1.0)
    });
    let last = nhwc(last.view());
    let first = last.as_standard_layout();
    let cpu = layer.prepare(&Device::cpu())?;
    let flops = cpu.cost(last.shape())?.flops();
    let gpu = Device::from(timer.device.clone());

    for (layout, src) in [("nchw", first.view()), ("nhwc", last)] {
        let expected = cpu.forward(&src)?.into_dyn();
        let src = CudaTensor::from_host(&timer.device, src.mapv(T::from_f32).view())?;
        let order = match layout {
            "nchw" => Layout::ChannelsFirst,
            _ => Layout::ChannelsLast,
        };
        let options = |kernel| PrepareOptions { math, kernel, ..PrepareOptions::default() };
        let plans = layer.prepare_as::<T>(&gpu, options(None))?.plans_in(src.shape(), order)?;
        let limit = if chosen { 1 } else { plans.len() };
        for (rank, plan) in plans.iter().take(limit).enumerate() {
            // Some kernels run by name only; others not at all.
            let prepared = match layer.prepare_as::<T>(&gpu, options(Some(plan.kernel.into()))) {
                Err(pointwise::Error::Kernel { .. }) => continue,
                prepared => prepared?,
            };
            let mut dst = prepared.forward(&src)?;
            verify(&dst.to_host()?.mapv(T::to_f32), &expected, T::DTYPE, math)
                .map_err(|why| format!("{}: {why}", plan.kernel))?;
            let (median, min) = timer.time(|| Ok(prepared.forward_into(&src, &mut dst)?))?;
            let contender: String = match (rank, math) {
                (0, Math::Tf32) if T::DTYPE == DType::F32 => "pointwise_tf32".into(),
                (0, _) if T::DTYPE == DType::F32 => "pointwise".into(),
                (0, _) => format!("pointwise_{}", T::DTYPE),
                _ => "pointwise_forced".into(),
            };
            println!(
                "{model},{name},{n},{c_in},{c_out},{h},{w},{stride},{groups},{act},{layout},\
                 {contender},{},{median:.2},{min:.2},{:.1}",
                plan.kernel,
                flops / median / 1e3
            );
        }
    }
    Ok(())
}

/// What a call on device tensors takes of the thread that makes it, in microseconds: queued, not run.
fn host_time(device: &CudaDevice) -> Outcome<f64> {
    /// Fewer than wait in a stream before a call blocks.
    const CALLS: usize = 100;
    let layer = Pointwise::new(Init::pytorch_default().weight(64, 64, 1)?).relu();
    let layer = layer.prepare(&device.clone().into())?;
    let src = CudaTensor::<f32>::zeros(device, &[1, 64, 7, 7])?;
    let mut dst = layer.forward(&src)?;
    let mut times = Vec::new();
    for _ in 0..10 {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            layer.forward_into(&src, &mut dst)?;
        }
        times.push(start.elapsed().as_secs_f64() * 1e6 / CALLS as f64);
    }
    device.synchronize()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn verify(
    got: &ArrayD<f32>,
    expected: &ArrayD<f32>,
    dtype: DType,
    math: Math,
) -> Result<(), String> {
    let layout = |array: &ArrayD<f32>| (array.shape().to_vec(), array.strides().to_vec());
    // Both follow the source, so memory can be compared as it lies.
    let (Some(values), Some(right)) =
        (got.as_slice_memory_order(), expected.as_slice_memory_order())
    else {
        return Err("the result has gaps".into());
    };
    if layout(got) != layout(expected) {
        return Err(format!("laid out as {:?}, expected {:?}", layout(got), layout(expected)));
    }
    // Results are of the size of 1/3; products of operands with 10 bits err by 2^-11 each.
    let tolerance = if math == Math::Tf32 { 2e-3 } else { 1e-4 };
    let unit = match dtype {
        DType::F16 => 2f32.powi(-11),
        DType::Bf16 => 2f32.powi(-8),
        _ => 0.0,
    };
    let close =
        |(got, expected): (&f32, &f32)| (got - expected).abs() <= tolerance + unit * expected.abs();
    match values.iter().zip(right).find(|&pair| !close(pair)) {
        Some((got, expected)) => Err(format!("{got}, expected {expected}")),
        None => Ok(()),
    }
}

/// Times calls on a device's stream.
struct Timer {
    device: CudaDevice,
    flush: CudaTensor<f32>,
}

impl Timer {
    fn new(device: &CudaDevice) -> Outcome<Self> {
        let l2 = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        let l2 = device.stream().context().attribute(l2).map_err(code)?;
        let flush = CudaTensor::zeros(device, &[(FLUSH * l2) as usize / size_of::<f32>()])?;
        Ok(Timer { device: device.clone(), flush })
    }

    /// Median and minimum in microseconds.
    fn time(&self, mut call: impl FnMut() -> Outcome) -> Outcome<(f64, f64)> {
        let stream = self.device.stream();
        let event = || {
            let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
            stream.context().new_event(Some(timed)).map_err(code)
        };
        (0..3).try_for_each(|_| call())?;
        let mut pairs = Vec::new();
        for _ in 0..RUNS {
            pairs.push((event()?, event()?));
        }
        for (begin, end) in &pairs {
            // SAFETY: the whole of a tensor that nobody reads.
            unsafe {
                result::memset_d8_async(
                    self.flush.address(),
                    0,
                    size_of::<f32>() * self.flush.shape()[0],
                    stream.cu_stream(),
                )
            }
            .map_err(code)?;
            begin.record(stream).map_err(code)?;
            call()?;
            end.record(stream).map_err(code)?;
        }
        let elapsed = |(begin, end): &(_, _)| CudaEvent::elapsed_ms(begin, end).map_err(code);
        let mut times = pairs.iter().map(elapsed).collect::<Result<Vec<f32>, _>>()?;
        times.sort_by(f32::total_cmp);
        Ok((f64::from(times[RUNS / 2]) * 1e3, f64::from(times[0]) * 1e3))
    }
}

fn code(error: DriverError) -> String {
    format!("{:?}", error.0)
}
