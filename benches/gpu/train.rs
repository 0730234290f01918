//! Steps of training: forward with a batch norm's batch statistics, and backward for everything.

use ndarray::{Array4, ArrayView1, ArrayViewD};
use pointwise::train::{Grads, Options as TrainOptions, Params, name};
use pointwise::{AsTensor, AsTensorMut, CudaTensor, Device, Math};

use crate::layers::Layer;
use crate::tensors::{compare, random};
use crate::{LAYOUTS, Options, Result, Timer, print};

pub fn run(layer: &Layer, options: &Options, timer: &Timer) -> Result<()> {
    let math = options.math();
    // Half of the channels lie above zero, and half below: an activation cuts the same values on
    // both devices, whatever they round.
    let beta = (0..layer.c_out).map(|channel| if channel % 2 == 0 { 8.0 } else { -8.0 });
    let description = layer.trained::<f32>(beta.collect())?;
    let gpu = Device::from(timer.device.clone());
    let shape = [layer.n, layer.c_in, layer.h, layer.w];
    let prepared = description.prepare(&Device::cpu())?;
    let dst_shape: [usize; 4] = prepared.dst_shape(&shape)?.as_slice().try_into()?;
    let flops = 3.0 * prepared.cost(&shape)?.flops();
    let (contender, tolerance) = match math {
        Math::Tf32 => ("pointwise_train_tf32", 2e-3),
        _ => ("pointwise_train", 5e-5),
    };

    for layout in LAYOUTS {
        let src = random(layout, shape, 3, |x| x);
        let d_dst = random(layout, dst_shape, 4, |x| x);
        let like = |shape| random(layout, shape, 0, |_| f32::NAN);
        let mut params = Params::new(&description, &Device::cpu())?;
        let mut expected = (like(dst_shape), like(shape), params.grads());
        step(&mut params, (&src, &d_dst), (&mut expected.0, &mut expected.1), &mut expected.2)?;

        let on_gpu = |host: &Array4<f32>| CudaTensor::from_host(&timer.device, host.view());
        let (src, d_dst) = (on_gpu(&src)?, on_gpu(&d_dst)?);
        let mut params = Params::with_options(
            &description,
            &gpu,
            TrainOptions { math, ..TrainOptions::default() },
        )?;
        let (mut dst, mut d_src) = (on_gpu(&expected.0)?, on_gpu(&expected.1)?);
        let mut grads = params.grads();
        timer.blank(&mut dst)?;
        timer.blank(&mut d_src)?;
        grads.visit_mut(|_, _, values| values.fill(f32::NAN));
        step(&mut params, (&src, &d_dst), (&mut dst, &mut d_src), &mut grads)?;

        let check = |what: &str, got: ArrayViewD<'_, f32>, expected: ArrayViewD<'_, f32>| {
            let largest = expected.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            compare(got, expected, |got, want| (got - want).abs() <= tolerance * largest)
                .map_err(|why| format!("{what}: {why}, where the largest is {largest}"))
        };
        check("dst", dst.to_host()?.view(), expected.0.view().into_dyn())?;
        check("d_src", d_src.to_host()?.view(), expected.1.view().into_dyn())?;
        for name in [name::WEIGHT, name::GAMMA, name::BETA] {
            check(name, view(&grads, name)?, view(&expected.2, name)?)?;
        }

        params.visit_mut(|name, _, values| {
            if name == name::BETA {
                values.fill(0.0);
            }
        });
        let times =
            timer.time(|| step(&mut params, (&src, &d_dst), (&mut dst, &mut d_src), &mut grads))?;
        print(layer, layout, (contender, "train"), times, flops);
    }
    Ok(())
}

fn step<S: AsTensor, D: AsTensorMut>(
    params: &mut Params,
    (src, d_dst): (&S, &S),
    (dst, d_src): (&mut D, &mut D),
    grads: &mut Grads,
) -> Result<()> {
    let workspace = params.call(src).run_into(dst)?;
    Ok(params.backward_call(src, workspace, d_dst).d_src(d_src).run(grads)?)
}

fn view<'a>(grads: &'a Grads, name: &'static str) -> Result<ArrayViewD<'a, f32>> {
    Ok(ArrayView1::from(grads.get(name).ok_or(name)?).into_dyn())
}
