//! Host tensors: cut into slices, whatever their size and layout, with the same result.

use ndarray::{Array2, Array3, ArrayD, Axis, IxDyn, ShapeBuilder};
use pointwise::cudarc::driver::sys;
use pointwise::{CudaDevice, CudaTensor, Device, Error, Math, Pointwise, PrepareOptions};

use super::cases::kernels;
use super::counting::allocated;
use super::numbers::Random;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("slices_give_the_bits_of_the_undivided_call", slices),
    ("slices_of_every_kernel_have_its_bits", slices_of_kernels),
    ("threads_share_a_layer_for_sliced_calls", sliced_threads),
    ("what_is_broadcast_on_the_host_is_read_as_such", broadcast),
    ("calls_allocate_nothing_after_the_first", allocations),
    ("host_tensors_cannot_be_captured", captured),
];

fn sliced(slice_bytes: usize) -> PrepareOptions {
    PrepareOptions { slice_bytes: Some(slice_bytes), ..PrepareOptions::default() }
}

fn same_bits(got: &ArrayD<f32>, expected: &ArrayD<f32>, what: &str) -> Outcome {
    assert_eq!(got.shape(), expected.shape());
    let wrong = got.indexed_iter().find(|(index, x)| x.to_bits() != expected[index].to_bits());
    match wrong {
        Some((index, x)) => {
            Err(format!("{what}: at {index:?} got {x}, expected {}", expected[&index]).into())
        }
        None => Ok(()),
    }
}

fn filled(random: &mut Random, shape: &[usize], fortran: bool) -> ArrayD<f32> {
    let mut array = ArrayD::zeros(IxDyn(shape).set_f(fortran));
    array.mapv_inplace(|_: f32| random.uniform() - 0.5);
    array
}

fn slices(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let mut random = Random::new(31);
    for (shape, stride) in [
        (&[9, 6][..], 1),
        (&[2, 6, 101], 1),
        (&[1, 6, 64], 1),
        (&[3, 6, 7, 5], 1),
        (&[2, 6, 9, 8], 2),
        (&[2, 6, 3, 4, 5], 1),
    ] {
        let weight = Array2::from_shape_vec((10, 3), random.normal(30)).unwrap();
        let layer = Pointwise::new(weight).groups(2).stride(stride);
        let layer = layer.bias(random.normal(10)).residual().silu();
        let undivided = layer.prepare(&gpu)?;
        let dst_shape = undivided.dst_shape(shape)?;
        for (i, fortran) in [false, true].into_iter().enumerate() {
            let mut src = filled(&mut random, shape, fortran);
            let residual = filled(&mut random, &dst_shape, i == 0);
            if src.ndim() > 2 {
                src.invert_axis(Axis(2));
            }
            let expected = undivided.call(&src).residual(&residual).run()?;
            // One position takes 104 bytes.
            for bytes in [0, 700, 1500, 6000] {
                let cut = layer.prepare_with(&gpu, sliced(bytes))?;
                let what = format!("{shape:?} in slices of {bytes}");
                let got = cut.call(&src).residual(&residual).run()?;
                same_bits(&got, &expected, &what)?;
                // Into every second element of the host's.
                let wide = [dst_shape.clone(), vec![2]].concat();
                let mut wide = ArrayD::from_elem(IxDyn(&wide), -9.0f32);
                let mut half = wide.index_axis_mut(Axis(dst_shape.len()), 1);
                cut.call(&src).residual(&residual).run_into(&mut half)?;
                same_bits(&half.to_owned(), &expected, &what)?;
                assert!(wide.index_axis(Axis(dst_shape.len()), 0).iter().all(|&x| x == -9.0));
            }
        }
    }
    Ok(())
}

fn slices_of_kernels(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let mut random = Random::new(32);
    let weight = Array2::from_shape_vec((36, 40), random.normal(1440)).unwrap();
    let layer = Pointwise::new(weight).bias(random.normal(36)).relu();
    let (first, last) = (
        filled(&mut random, &[2, 40, 9, 8], false),
        filled(&mut random, &[2, 9, 8, 40], false).permuted_axes(IxDyn(&[0, 3, 1, 2])),
    );
    for kernel in kernels(device).into_iter().map(Some).chain([None]) {
        for src in [&first, &last] {
            let prepare = |slice_bytes| {
                let kernel = kernel.map(String::from);
                layer.prepare_with(&gpu, PrepareOptions { kernel, slice_bytes, ..sliced(0) })
            };
            let expected = prepare(None)?.forward(src)?;
            let got = prepare(Some(10_000))?.forward(src)?;
            same_bits(&got, &expected, &format!("{kernel:?}"))?;
            // As the same call is on the device.
            let on_device = CudaTensor::from_host(device, src.view())?;
            let queued = prepare(None)?.forward(&on_device)?.to_host()?;
            same_bits(&queued, &expected, &format!("{kernel:?} on the device"))?;
        }
    }
    // So few positions that blocks share the channels of a tile, more of them than in a slice.
    let weight = Array2::from_shape_vec((8, 700), random.normal(5600)).unwrap();
    let layer = Pointwise::new(weight).relu();
    let src = filled(&mut random, &[2, 700, 5, 4], false);
    for math in [Math::F32, Math::Tf32] {
        let run = |slice_bytes| {
            let options = PrepareOptions { math, slice_bytes, ..Default::default() };
            layer.prepare_with(&gpu, options)?.forward(&src)
        };
        let expected = run(None)?;
        for bytes in [0, 10_000, 50_000] {
            same_bits(&run(Some(bytes))?, &expected, &format!("{math:?} in slices of {bytes}"))?;
        }
    }
    Ok(())
}

fn sliced_threads(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(33);
    let weight = Array2::from_shape_vec((10, 7), random.integers(70)).unwrap();
    let layer = Pointwise::new(weight).relu();
    let cpu = layer.prepare(&Device::cpu())?;
    let gpu = layer.prepare_with(&device.clone().into(), sliced(1200))?;
    let sources: Vec<Array3<f32>> =
        (0..4).map(|_| Array3::from_shape_vec((2, 7, 63), random.integers(882)).unwrap()).collect();
    std::thread::scope(|scope| {
        for (i, src) in sources.iter().enumerate() {
            let (cpu, gpu) = (&cpu, &gpu);
            scope.spawn(move || {
                let own = device.with_new_stream().unwrap();
                let mine = if i % 2 == 0 { gpu.clone() } else { gpu.on(&own).unwrap() };
                for _ in 0..3 {
                    assert_eq!(mine.forward(src).unwrap(), cpu.forward(src).unwrap());
                    own.trim();
                }
            });
        }
    });
    Ok(())
}

fn broadcast(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(34);
    let weight = Array2::from_shape_vec((5, 4), random.integers(20)).unwrap();
    let layer = Pointwise::new(weight).residual();
    let one = Array3::from_shape_vec((1, 4, 33), random.integers(132)).unwrap();
    let src = one.broadcast((3, 4, 33)).unwrap();
    let beside = Array3::from_shape_vec((3, 5, 1), random.integers(15)).unwrap();
    let residual = beside.broadcast((3, 5, 33)).unwrap();
    let expected = layer.prepare(&Device::cpu())?.call(&src).residual(&residual).run()?;
    for bytes in [0, 1000, 1 << 20] {
        let gpu = layer.prepare_with(&device.clone().into(), sliced(bytes))?;
        assert_eq!(gpu.call(&src).residual(&residual).run()?, expected, "{bytes}");
    }
    Ok(())
}

/// Fails if a call allocates when it runs for the third time: on the host; a real driver's own are not
/// seen.
pub fn counted(what: &str, call: &mut dyn FnMut() -> Outcome) -> Outcome {
    call()?;
    call()?;
    let before = allocated();
    call()?;
    call()?;
    match allocated() - before {
        0 => Ok(()),
        count => Err(format!("{what}: {count} allocations in two calls").into()),
    }
}

fn allocations(device: &CudaDevice) -> Outcome {
    let mut boxed = || {
        drop(std::hint::black_box(Box::new(1)));
        Ok(())
    };
    assert!(counted("a box", &mut boxed).is_err());
    let other = device.with_new_stream()?;
    let layer = Pointwise::new(Array2::from_elem((6, 5), 1.0f32)).residual().relu();
    let gpu = layer.prepare(&device.clone().into())?;
    let cut = layer.prepare_with(&device.clone().into(), sliced(1000))?;
    let elsewhere = gpu.on(&other)?;
    let (host, beside) = (Array3::<f32>::ones((2, 5, 40)), Array3::<f32>::ones((2, 6, 40)));
    let mut host_dst = Array3::<f32>::zeros((2, 6, 40));
    let (src, residual) = (
        CudaTensor::from_host(device, host.view())?,
        CudaTensor::from_host(device, beside.view())?,
    );
    let mut dst = CudaTensor::<f32>::zeros(device, &[2, 6, 40])?;
    counted("device tensors", &mut || {
        Ok(gpu.call(&src).residual(&residual).run_into(&mut dst)?)
    })?;
    counted("device tensors of another stream", &mut || {
        Ok(elsewhere.call(&src).residual(&residual).run_into(&mut dst)?)
    })?;
    for (what, layer) in [("host tensors", &gpu), ("host tensors in slices", &cut)] {
        let mut call = || Ok(layer.call(&host).residual(&beside).run_into(&mut host_dst)?);
        // What such calls keep for the next one, a trial beside this one may have taken.
        let mut tried = counted(what, &mut call);
        for _ in 0..50 {
            if tried.is_ok() {
                break;
            }
            tried = counted(what, &mut call);
        }
        tried?;
    }
    assert!(host_dst.iter().all(|&x| x == 6.0));
    assert_eq!(dst.to_host()?, host_dst.into_dyn());
    Ok(())
}

fn captured(device: &CudaDevice) -> Outcome {
    let own = device.with_new_stream()?;
    let layer = Pointwise::new(Array2::from_elem((3, 2), 1.0f32)).prepare(&own.clone().into())?;
    let host = Array3::<f32>::ones((1, 2, 5));
    let src = CudaTensor::from_host(&own, host.view())?;
    let mut dst = CudaTensor::<f32>::zeros(&own, &[1, 3, 5])?;
    own.synchronize()?;
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    own.stream().begin_capture(mode).map_err(code)?;
    let refused = layer.forward(&host);
    layer.forward_into(&src, &mut dst)?;
    let flags = sys::CUgraphInstantiate_flags(0);
    let graph = own.stream().end_capture(flags).map_err(code)?.ok_or("nothing was captured")?;
    let error = refused.unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { what, .. } if what.contains("captured")),
        "{error}"
    );
    // The refusal has not spoiled the capture.
    graph.launch().map_err(code)?;
    assert!(dst.to_host()?.iter().all(|&x| x == 2.0));
    Ok(())
}
