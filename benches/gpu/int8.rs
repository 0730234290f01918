//! Layers of 8-bit integers: u8 in and out, a scale per output channel.

use ndarray::Array4;
use pointwise::{CudaTensor, Device, Layout, PrepareOptions};

use crate::layers::Layer;
use crate::tensors::{compare, random};
use crate::{LAYOUTS, Options, Result, Timer, print};

pub fn run(layer: &Layer, options: &Options, timer: &Timer) -> Result<()> {
    let byte = |x: f32| (x * 128.0).floor() as i8;
    let weight =
        random(Layout::ChannelsFirst, [layer.c_out, layer.c_in / layer.groups, 1, 1], 1, byte);
    let weight = weight.into_shape_with_order((layer.c_out, layer.c_in / layer.groups))?;
    let description = layer.quantized(weight)?;
    let gpu = Device::from(timer.device.clone());
    let on_cpu = description.prepare(&Device::cpu())?;
    let shape = [layer.n, layer.c_in, layer.h, layer.w];
    let flops = on_cpu.cost(&shape)?.flops();
    let plans = description.prepare(&gpu)?.plans(&shape)?;
    let limit = if options.chosen { 1 } else { plans.len() };

    for layout in LAYOUTS {
        let src = random(layout, shape, 3, |x| byte(x) as u8 ^ 0x80);
        let expected: Array4<u8> = on_cpu.forward(&src)?;
        let src = CudaTensor::from_host(&timer.device, src.view())?;
        for (rank, plan) in plans.iter().take(limit).enumerate() {
            let kernel = Some(plan.kernel.into());
            let prepared = description
                .prepare_with(&gpu, PrepareOptions { kernel, ..PrepareOptions::default() })?;
            let mut dst: CudaTensor<u8> = prepared.forward_cuda(&src)?;
            timer.blank(&mut dst)?;
            prepared.forward_into(&src, &mut dst)?;
            let close = |got, want| got == want;
            compare(dst.to_host()?.view(), expected.view().into_dyn(), close)
                .map_err(|why| format!("{}: {why}", plan.kernel))?;
            let times = timer.time(|| Ok(prepared.forward_into(&src, &mut dst)?))?;
            let contender = if rank == 0 { "pointwise_int8" } else { "pointwise_forced" };
            print(layer, layout, (contender, plan.kernel), times, flops);
        }
    }
    Ok(())
}
