//! Branches and sequences.

use ndarray::{Array2, Array3, ArrayD, IxDyn, ShapeBuilder, s};
use pointwise::cudarc::driver::sys;
use pointwise::{
    Branches, CudaDevice, CudaTensor, Device, Error, Place, Pointwise, PrepareOptions, Prepared,
    Sequence, TensorMut, TensorRef,
};

use super::numbers::Random;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("sequences_equal_the_cpu_s", sequences),
    ("sequences_of_host_tensors_in_slices_have_the_same_bits", sliced_sequences),
    ("sequences_cross_streams_by_themselves", sequences_across_streams),
    ("a_sequence_can_be_captured_as_one_graph", captured_sequence),
    ("what_does_not_fit_a_sequence_is_an_error", refused_sequences),
    ("branches_write_their_parts_in_place", branches),
];

/// Small weights, so that sums of a few layers stay exact.
fn layer(random: &mut Random, c_out: usize, c_in: usize) -> Pointwise {
    let weight = random.integers(c_out * c_in).iter().map(|x| (x / 3.0).round()).collect();
    let weight = Array2::from_shape_vec((c_out, c_in), weight).unwrap();
    Pointwise::new(weight).bias(random.integers(c_out)).clip(-9.0, 9.0)
}

fn chain(random: &mut Random) -> Vec<Pointwise> {
    vec![
        layer(random, 12, 6),
        layer(random, 40, 12).stride(2),
        layer(random, 5, 40).leaky_relu(0.5),
        layer(random, 9, 5).stride(3),
    ]
}

fn prepared(layers: &[Pointwise], device: &Device) -> Result<Vec<Prepared>, Error> {
    layers.iter().map(|layer| layer.prepare(device)).collect()
}

fn sequences(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(41);
    let layers = chain(&mut random);
    for count in 1..=4 {
        let cpu = Sequence::new(prepared(&layers[..count], &Device::cpu())?)?;
        let gpu = Sequence::new(prepared(&layers[..count], &device.clone().into())?)?;
        for (shape, fortran) in [
            (&[5, 6][..], false),
            (&[2, 6, 40], false),
            (&[2, 6, 13, 8], true),
            (&[1, 6, 5, 7, 4], false),
            (&[0, 6, 3], false),
        ] {
            let mut src = ArrayD::zeros(IxDyn(shape).set_f(fortran));
            src.mapv_inplace(|_: f32| random.integer());
            let expected = cpu.forward(&src)?;
            let got = gpu.forward(&src)?;
            assert_eq!(got, expected, "{count} layers, {shape:?} on the host");
            assert_eq!(got.strides(), expected.strides());
            let on_device = gpu.forward(&CudaTensor::from_host(device, src.view())?)?;
            assert_eq!(on_device.to_host()?, expected, "{count} layers, {shape:?}");
        }
    }
    // One sample for all, broadcast on the host.
    let (cpu, gpu) = (
        Sequence::new(prepared(&layers, &Device::cpu())?)?,
        Sequence::new(prepared(&layers, &device.clone().into())?)?,
    );
    let one = Array3::from_shape_vec((1, 6, 30), random.integers(180)).unwrap();
    let src = one.broadcast((3, 6, 30)).unwrap();
    assert_eq!(gpu.forward(&src)?, cpu.forward(&src)?);
    Ok(())
}

fn sliced_sequences(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(42);
    let normal = |random: &mut Random, c_out: usize, c_in: usize| {
        let weight = Array2::from_shape_vec((c_out, c_in), random.normal(c_out * c_in)).unwrap();
        Pointwise::new(weight).bias(random.normal(c_out)).silu()
    };
    let layers = [
        normal(&mut random, 20, 6).stride(2),
        normal(&mut random, 33, 20),
        normal(&mut random, 7, 33),
    ];
    let src = Array3::from_shape_vec((3, 6, 150), random.normal(2700)).unwrap();
    let run = |slice_bytes| {
        let options = PrepareOptions { slice_bytes, ..Default::default() };
        let prepare =
            |layer: &Pointwise| layer.prepare_with(&device.clone().into(), options.clone());
        Sequence::new(layers.iter().map(prepare).collect::<Result<_, _>>()?)?.forward(&src)
    };
    let expected = run(None)?;
    let on_device = Sequence::new(prepared(&layers, &device.clone().into())?)?
        .forward(&CudaTensor::from_host(device, src.view())?)?
        .to_host()?;
    let mut one_by_one = src.clone();
    for layer in prepared(&layers, &device.clone().into())? {
        one_by_one = layer.forward(&one_by_one)?;
    }
    let bits =
        |array: &mut dyn Iterator<Item = &f32>| array.map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&mut on_device.iter()), bits(&mut expected.iter()), "on the device");
    assert_eq!(bits(&mut one_by_one.iter()), bits(&mut expected.iter()), "one by one");
    // One position takes 316 bytes.
    for bytes in [0, 2_000, 10_000] {
        assert_eq!(bits(&mut run(Some(bytes))?.iter()), bits(&mut expected.iter()), "{bytes}");
    }
    Ok(())
}

fn sequences_across_streams(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(43);
    let layers = chain(&mut random);
    let cpu = Sequence::new(prepared(&layers, &Device::cpu())?)?;
    // Every layer on a stream of its own, the tensors on two more.
    let own = || Ok::<Device, Error>(device.with_new_stream()?.into());
    let streams = layers.iter().map(|layer| layer.prepare(&own()?)).collect::<Result<_, _>>()?;
    let gpu = Sequence::new(streams)?;
    let (from, to) = (device.with_new_stream()?, device.with_new_stream()?);
    for _ in 0..3 {
        let host = Array3::from_shape_vec((2, 6, 40), random.integers(480)).unwrap();
        let src = CudaTensor::from_host(&from, host.view())?;
        let mut dst = CudaTensor::zeros(&to, &[2, 9, 7])?;
        gpu.forward_into(&src, &mut dst)?;
        drop(src);
        assert_eq!(dst.to_host()?, cpu.forward(&host)?.into_dyn());
        // The same weights on a stream per request.
        let request = device.with_new_stream()?;
        let src = CudaTensor::from_host(&request, host.view())?;
        let result = gpu.on(&request)?.forward(&src)?;
        assert_eq!(result.to_host()?, cpu.forward(&host)?.into_dyn());
    }
    assert!(matches!(cpu.on(device), Err(Error::WrongDevice { .. })));
    Ok(())
}

fn captured_sequence(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(44);
    let layers = chain(&mut random);
    let cpu = Sequence::new(prepared(&layers, &Device::cpu())?)?;
    let own = device.with_new_stream()?;
    let gpu = Sequence::new(prepared(&layers, &own.clone().into())?)?;
    let host = Array3::from_shape_vec((2, 6, 40), random.integers(480)).unwrap();
    let src = CudaTensor::from_host(&own, host.view())?;
    let mut dst = CudaTensor::<f32>::zeros(&own, &[2, 9, 7])?;
    own.synchronize()?;
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    own.stream().begin_capture(mode).map_err(code)?;
    let queued = gpu.forward_into(&src, &mut dst);
    let flags = sys::CUgraphInstantiate_flags(0);
    let graph = own.stream().end_capture(flags).map_err(code)?;
    if !own.stream().context().has_async_alloc() {
        assert!(matches!(queued, Err(Error::Unsupported { .. })), "{queued:?}");
        return Ok(());
    }
    queued?;
    let graph = graph.ok_or("nothing was captured")?;
    assert!(dst.to_host()?.iter().all(|&x| x == 0.0), "a captured call does not run");
    for _ in 0..3 {
        graph.launch().map_err(code)?;
        assert_eq!(dst.to_host()?, cpu.forward(&host)?.into_dyn());
        // What the graph does not own is somebody else's.
        CudaTensor::<f32>::zeros(&own, &[2, 40, 20])?;
    }
    Ok(())
}

fn refused_sequences(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let prepare = |c_out, c_in| Pointwise::new(Array2::ones((c_out, c_in))).prepare(&gpu);
    let refused = Sequence::new(vec![prepare(3, 2)?, prepare(2, 4)?]);
    assert!(matches!(refused, Err(Error::Channels { weight: 4, src: 3, .. })), "{refused:?}");
    let on_cpu = Pointwise::new(Array2::ones((4, 3))).prepare(&Device::cpu())?;
    let refused = Sequence::new(vec![prepare(3, 2)?, on_cpu.clone()]);
    assert!(matches!(refused, Err(Error::WrongDevice { .. })), "{refused:?}");
    let refused = Branches::new(vec![on_cpu, prepare(4, 3)?]);
    assert!(matches!(refused, Err(Error::WrongDevice { .. })), "{refused:?}");

    let sequence = Sequence::new(vec![prepare(3, 2)?, prepare(4, 3)?])?;
    let (host, mut small) = (Array3::<f32>::ones((1, 2, 5)), Array3::<f32>::ones((1, 4, 4)));
    let error = sequence.forward_into(&host, &mut small).unwrap_err();
    assert!(matches!(&error, Error::Shape { got, .. } if got == &[1, 4, 4]), "{error}");
    let mut on_device = CudaTensor::<f32>::zeros(device, &[1, 4, 5])?;
    let error = sequence.forward_into(&host, &mut on_device).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { tensor: "dst", .. }), "{error}");
    let place = Place::Cuda(device.ordinal() + 1);
    // SAFETY: refused before they are used.
    let (src, mut dst) = unsafe {
        let at = std::ptr::without_provenance_mut::<f32>;
        (
            TensorRef::from_raw_parts(at(1 << 20), place, &[1, 2, 5], &[10, 5, 1])?,
            TensorMut::from_raw_parts(at(2 << 20), place, &[1, 4, 5], &[20, 5, 1])?,
        )
    };
    let error = sequence.forward_into(&src, &mut dst).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { tensor: "src", .. }), "{error}");
    let error = sequence.forward(&Array3::<f32>::ones((1, 3, 5))).unwrap_err();
    assert!(matches!(error, Error::Channels { .. }), "{error}");
    Ok(())
}

fn branches(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(45);
    let layers = [layer(&mut random, 4, 6), layer(&mut random, 8, 6).residual()];
    let gpu = Device::from(device.clone());
    // The second on a stream of its own.
    let own = device.with_new_stream()?;
    let on_gpu = vec![layers[0].prepare(&gpu)?, layers[1].prepare(&own.into())?];
    let (cpu, gpu) = (Branches::new(prepared(&layers, &Device::cpu())?)?, Branches::new(on_gpu)?);
    let src = Array3::from_shape_vec((2, 6, 21), random.integers(252)).unwrap();
    let residual = Array3::from_shape_vec((2, 8, 21), random.integers(336)).unwrap();
    let expected = cpu.call(&src).residual(1, &residual).run()?;
    assert_eq!(gpu.call(&src).residual(1, &residual).run()?, expected);
    let elsewhere = gpu.on(&device.with_new_stream()?)?;
    assert_eq!(elsewhere.call(&src).residual(1, &residual).run()?, expected);

    let on_device = CudaTensor::from_host(device, src.view())?;
    let beside = CudaTensor::from_host(device, residual.view())?;
    let results = gpu.call(&on_device).residual(1, &beside).run()?;
    let (mut a, mut b) = (
        CudaTensor::<f32>::zeros(device, &[2, 4, 21])?,
        CudaTensor::<f32>::zeros(device, &[2, 20, 21])?,
    );
    let call = gpu.call(&on_device).residual(1, &beside);
    call.run_into(&mut [&mut a, &mut b.channels_mut(5..13)?])?;
    let b = b.to_host()?;
    assert_eq!(b.slice(s![.., 5..13, ..]), expected[1]);
    assert!(b.slice(s![.., ..5, ..]).iter().chain(&b.slice(s![.., 13.., ..])).all(|&x| x == 0.0));
    for (result, branch) in [(&results[0], 0), (&a, 0), (&results[1], 1)] {
        assert_eq!(result.to_host()?, expected[branch].clone().into_dyn());
    }
    Ok(())
}
