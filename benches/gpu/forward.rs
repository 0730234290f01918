//! Layers of real numbers, as in inference.

use ndarray::Array4;
use pointwise::{CudaTensor, DType, Device, DeviceElement, Element, Layout, Math, PrepareOptions};

use crate::layers::Layer;
use crate::tensors::{compare, random};
use crate::{LAYOUTS, Options, Result, Timer, print};

/// How many blocks share a sum, where `--splits` asks.
const SPLITS: [u32; 8] = [1, 2, 3, 4, 6, 8, 12, 16];

pub fn run<T: Element + DeviceElement>(
    layer: &Layer,
    options: &Options,
    timer: &Timer,
) -> Result<()> {
    let math = options.math();
    let description = layer.description::<T>()?;
    let (cpu, gpu) = (Device::cpu(), Device::from(timer.device.clone()));
    let on_cpu = description.prepare(&cpu)?;
    let prepare = |kernel| {
        let options = PrepareOptions { math, kernel, ..PrepareOptions::default() };
        description.prepare_as::<T>(&gpu, options)
    };
    let planner = prepare(None)?;
    let shape = [layer.n, layer.c_in, layer.h, layer.w];
    let flops = on_cpu.cost(&shape)?.flops();

    // Results are of the size of 1/3; products of operands with 10 bits err by 2^-11 each.
    let tolerance = if math == Math::Tf32 { 2e-3 } else { 1e-4 };
    let unit = match T::DTYPE {
        DType::F16 => 2f32.powi(-11),
        DType::Bf16 => 2f32.powi(-8),
        _ => 0.0,
    };
    let close = |got: T, expected: f32| {
        (got.to_f32() - expected).abs() <= tolerance + unit * expected.abs()
    };
    let chosen = match (T::DTYPE, math) {
        (DType::F32, Math::Tf32) => "pointwise_tf32".into(),
        (DType::F32, _) => "pointwise".into(),
        (dtype, _) => format!("pointwise_{dtype}"),
    };

    for layout in LAYOUTS {
        let rounded = |x: f32| T::from_f32(x).to_f32();
        let expected: Array4<f32> = on_cpu.forward(&random(layout, shape, 3, rounded))?;
        let src = random(layout, shape, 3, T::from_f32);
        let src = CudaTensor::from_host(&timer.device, src.view())?;
        let plans = planner.plans_in(&shape, layout)?;
        let limit = if options.chosen { 1 } else { plans.len() };
        let ranked = plans.iter().take(limit).map(|plan| plan.kernel.to_string()).enumerate();
        let along = if layout == Layout::ChannelsLast { "nhwc" } else { "nchw" };
        let shared = plans.iter().filter(|plan| options.splits && plan.kernel.ends_with(along));
        let shared = shared.flat_map(|plan| SPLITS.map(|n| format!("{}/{n}", plan.kernel)));
        for (rank, kernel) in ranked.chain(shared.map(|kernel| (usize::MAX, kernel))) {
            // Some kernels run by name only; others not at all.
            let prepared = match prepare(Some(kernel.clone())) {
                Err(pointwise::Error::Kernel { .. }) => continue,
                prepared => prepared?,
            };
            let mut dst = prepared.forward(&src)?;
            timer.blank(&mut dst)?;
            prepared.forward_into(&src, &mut dst)?;
            compare(dst.to_host()?.view(), expected.view().into_dyn(), close)
                .map_err(|why| format!("{kernel}: {why}"))?;
            let times = timer.time(|| Ok(prepared.forward_into(&src, &mut dst)?))?;
            let contender = if rank == 0 { &chosen } else { "pointwise_forced" };
            print(layer, layout, (contender, &kernel), times, flops);
        }
    }
    Ok(())
}
