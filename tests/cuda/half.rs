//! Tensors of f16 and bf16: exact where the arithmetic is, and one rounding of what f32 gives.

use ndarray::{Array2, Array3, Array5};
use pointwise::cudarc::driver::{DeviceRepr, sys};
use pointwise::{
    BatchNorm, Branches, CudaDevice, CudaSliceMut, CudaSliceRef, CudaTensor, DType, Device, Error,
    LayerNorm, Pointwise, PrepareOptions, Sequence, bf16, f16, reference,
};

use super::cases::{
    Case, Layout, Placed, Value, chain, close, force, in_layouts, kernels_of, rounded, same_bits,
};
use super::numbers::Random;
use super::tensor_cores;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("f16_kernels_round_exact_sums_once", exact_sums::<f16>),
    ("bf16_kernels_round_exact_sums_once", exact_sums::<bf16>),
    ("random_layers_of_f16_are_within_the_bound", random_layers::<f16>),
    ("random_layers_of_bf16_are_within_the_bound", random_layers::<bf16>),
    ("f16_keeps_special_values_in_their_place", special_values::<f16>),
    ("bf16_keeps_special_values_in_their_place", special_values::<bf16>),
    ("layer_norms_of_f16_round_once", norms::<f16>),
    ("layer_norms_of_bf16_round_once", norms::<bf16>),
    ("layers_of_f16_compose", compositions::<f16>),
    ("layers_of_bf16_compose", compositions::<bf16>),
    ("calls_on_f16_are_captured", captured::<f16>),
    ("calls_on_bf16_are_captured", captured::<bf16>),
    ("plans_and_explain_know_f16", plans::<f16>),
    ("plans_and_explain_know_bf16", plans::<bf16>),
];

/// The largest relative error of a rounding.
pub fn unit<T: Value>() -> f64 {
    match T::DTYPE {
        DType::F16 => 2f64.powi(-11),
        DType::Bf16 => 2f64.powi(-8),
        _ => 0.0, // Part of what sums are allowed.
    }
}

fn nearest<T: Value>(values: Vec<f32>) -> Vec<f32> {
    values.into_iter().map(|x| T::from_f32(x).to_f32()).collect()
}

fn exact_sums<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(81);
    let kernels = kernels_of::<T>(device);
    assert!(kernels.len() >= 4, "{kernels:?}");
    for (i, case) in tensor_cores::cases().iter().enumerate() {
        let weight = random.integers(case.c_out * case.c_in / case.groups);
        // Beyond the integers that 16 bits hold, so that results are rounded, and ties too.
        let bias: Vec<f32> = random.integers(case.c_out).iter().map(|x| x * 777.0).collect();
        let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
        let expected = rounded::<T>(&chain(case, &weight, &bias, &src));
        let layer = case.layer(weight).bias(bias);
        for (j, kernel) in kernels.iter().enumerate() {
            let forced = format!("{kernel}/{}", 1 + (i + j) % 3);
            let prepared = layer.prepare_as::<T>(&device.clone().into(), force(&forced))?;
            in_layouts(device, &prepared, (case, &src, &expected), (i, j), &forced)?;
        }
    }
    Ok(())
}

fn random_layers<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(82);
    for (n, c_in, c_out, plane, layout) in [
        (2, 200, 70, [1, 4, 13], Layout::Last),
        (1, 511, 33, [1, 1, 97], Layout::First),
        (2, 64, 136, [1, 8, 16], Layout::First),
        (1, 96, 128, [1, 8, 16], Layout::Last),
    ] {
        let case = Case::new(n, c_in, c_out, plane);
        let weight = nearest::<T>(random.normal(c_out * c_in));
        let scale = random.normal(c_out);
        let norm = BatchNorm::new(random.normal(c_out), vec![1.0; c_out]);
        let norm = norm.affine(scale.clone(), random.normal(c_out)).eps(1e-5);
        let layer = case.layer(weight.clone()).batch_norm(norm).residual().relu();
        let src = rounded::<T>(&random.tensor(case.src_shape()));
        let residual = rounded::<T>(&random.tensor(case.dst_shape()));
        let inputs = reference::Inputs {
            sources: vec![src.view().into_dyn()],
            residual: Some(residual.view().into_dyn()),
            gate: None,
        };
        let expected = reference::forward(&layer, &inputs)?;
        let largest = |values: &mut dyn Iterator<Item = &f32>| {
            values.fold(0.0f64, |most, x| most.max(f64::from(x.abs())))
        };
        let products = largest(&mut weight.iter()) * largest(&mut src.iter());
        let scale = largest(&mut scale.iter()).max(1.0);
        let bound = scale * products * c_in as f64 * f64::from(f32::EPSILON)
            + unit::<T>() * expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        let (src, residual) = (
            Placed::<T>::filled(device, src.view(), layout),
            Placed::<T>::filled(device, residual.view(), layout),
        );
        for kernel in kernels_of::<T>(device) {
            for splits in ["/1", "/2"] {
                let options = force(&format!("{kernel}{splits}"));
                let prepared = layer.prepare_as::<T>(&device.clone().into(), options)?;
                let mut dst = Placed::<T>::blank(device, case.dst_shape(), layout);
                let (src, residual) = (src.view(), residual.view());
                prepared.call(&src).residual(&residual).run_into(&mut dst.view_mut())?;
                for (index, &got) in dst.read().into_dyn().indexed_iter() {
                    if !((f64::from(got) - expected[&index]).abs() <= bound) {
                        let expected = expected[&index];
                        let what = format!("{kernel}{splits}, {case:?}, {index:?}");
                        return Err(format!("{what}: {got}, expected {expected}").into());
                    }
                }
            }
        }
    }
    Ok(())
}

fn special_values<T: Value>(device: &CudaDevice) -> Outcome {
    for kernel in kernels_of::<T>(device) {
        let layer = Pointwise::new(Array2::ones((5, 3))).relu();
        let layer = layer.prepare_as::<T>(&device.clone().into(), force(kernel))?;
        let mut src = Array3::from_elem((1, 3, 70), T::from_f32(1.0));
        src[[0, 1, 33]] = T::CANARY;
        src[[0, 2, 69]] = T::from_f32(f32::INFINITY);
        // Two of the largest values: beyond f16, and beyond f32 if they are bf16.
        let most = if T::DTYPE == DType::F16 { 65504.0 } else { 3.38e38 };
        src[[0, 0, 40]] = T::from_f32(most);
        src[[0, 1, 40]] = T::from_f32(most);
        for ((_, c, p), &value) in layer.forward(&src)?.indexed_iter() {
            let value = value.to_f32();
            let fits = match p {
                33 => value.is_nan(),
                40 | 69 => value == f32::INFINITY,
                _ => value == 3.0,
            };
            assert!(fits, "{kernel}: channel {c}, position {p}: {value}");
        }
    }
    Ok(())
}

fn norms<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(83);
    for (i, norm) in [LayerNorm::over_channels(), LayerNorm::over_all()].into_iter().enumerate() {
        for (j, (c, plane, layout)) in [
            (40, [1, 4, 9], Layout::Last),
            (36, [1, 8, 8], Layout::First),
            (35, [1, 3, 5], Layout::LastOdd),
        ]
        .into_iter()
        .enumerate()
        {
            // Sums of a large value and a small one, which 16 bits would not hold.
            let case = Case::new(2, 2 * c, c, plane);
            let twice = (0..c * 2 * c).map(|i| if i / (2 * c) == i % c { 1.0 } else { 0.0 });
            let layer = case.layer(twice.collect()).residual();
            let norm = norm.clone().affine(random.normal(c), random.normal(c)).eps(1e-3);
            let layer = layer.layer_norm(norm).silu();
            let src = Array5::from_shape_fn(case.src_shape(), |(n, k, _, h, w)| match k < c {
                true => 4096.0,
                false => (n + 1) as f32 * ((k * 37 + h * 11 + w) % 16) as f32 / 4.0,
            });
            let residual = Array5::from_shape_fn(case.dst_shape(), |_| random.integer());
            let inputs = reference::Inputs {
                sources: vec![src.view().into_dyn()],
                residual: Some(residual.view().into_dyn()),
                gate: None,
            };
            let expected = reference::forward(&layer, &inputs)?;
            let tolerance = unit::<T>() + 1e-5;
            // Every kernel meets both norms.
            for kernel in kernels_of::<T>(device).into_iter().skip((i + j) % 3).step_by(3) {
                let prepared = layer.prepare_as::<T>(&device.clone().into(), force(kernel))?;
                let src = Placed::<T>::filled(device, src.view(), layout);
                let residual = Placed::<T>::filled(device, residual.view(), layout);
                let mut dst = Placed::<T>::blank(device, case.dst_shape(), layout);
                let (src, residual) = (src.view(), residual.view());
                prepared.call(&src).residual(&residual).run_into(&mut dst.view_mut())?;
                let what = format!("{kernel}, {c} channels");
                close(&dst.read().into_dyn(), &expected, tolerance, &what)?;
            }
            // Host tensors in slices, also a sample that no slice holds.
            let halves = |values: &Array5<f32>| values.mapv(T::from_f32);
            let (src, residual) = (halves(&src), halves(&residual));
            let mut whole = None;
            for slice_bytes in [1 << 24, 3000, 0] {
                let kernel = Some(format!("{}/1", kernels_of::<T>(device)[0]));
                let slice_bytes = Some(slice_bytes);
                let options = PrepareOptions { kernel, slice_bytes, ..Default::default() };
                let prepared = layer.prepare_as::<T>(&device.clone().into(), options)?;
                let got = prepared.call(&src).residual(&residual).run()?.mapv(T::to_f32);
                close(&got.clone().into_dyn(), &expected, tolerance, "on the host")?;
                same_bits(&got, whole.get_or_insert_with(|| got.clone()), "in slices")?;
            }
        }
    }
    Ok(())
}

fn compositions<T: Value + DeviceRepr>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(84);
    let gpu = Device::from(device.clone());
    let mut layer = |c_out: usize, c_in: usize| {
        let weight = random.normal(c_out * c_in);
        Pointwise::new(Array2::from_shape_vec((c_out, c_in), weight).unwrap())
    };
    let layers = [
        layer(12, 6).relu(),
        layer(7, 4).partial(2..6).stride(2).silu(),
        layer(20, 15).layer_norm(LayerNorm::over_channels()),
        layer(9, 20).gelu(),
    ];
    let options = || PrepareOptions { batch_invariant: true, ..PrepareOptions::default() };
    let prepare = |layer: &Pointwise| layer.prepare_as::<T>(&gpu, options());
    let src = Array3::from_shape_fn((2, 6, 41), |_| T::from_f32(random.uniform() - 0.5));
    let bits = |values: &[T]| values.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
    let mut expected = src.clone();
    for layer in &layers {
        expected = prepare(layer)?.forward(&expected)?;
    }
    let expected = bits(expected.as_slice().unwrap());
    let prepared = layers.iter().map(prepare).collect::<Result<Vec<_>, Error>>()?;
    let sequence = Sequence::new(prepared)?;
    let on_host = sequence.forward(&src)?;
    assert!(bits(on_host.as_slice().unwrap()) == expected, "a sequence on the host");
    let on_device = sequence.forward(&CudaTensor::from_host(device, src.view())?)?.to_host()?;
    assert!(bits(on_device.as_slice().unwrap()) == expected, "a sequence on the device");

    // More sources than a launch takes: integers, as slabs of other channels are summed otherwise.
    let weight = Array2::from_shape_vec((10, 6 * 20), random.integers(10 * 6 * 20)).unwrap();
    let wide = prepare(&Pointwise::new(weight))?;
    let whole = Array3::from_shape_simple_fn((2, 6, 41), || T::from_f32(random.integer()));
    let all = ndarray::concatenate(ndarray::Axis(1), &vec![whole.view(); 20]).unwrap();
    let all = all.as_standard_layout();
    let expected = wide.forward(&CudaTensor::from_host(device, all.view())?)?.to_host()?;
    let source = CudaTensor::from_host(device, whole.view())?;
    let call = (1..20).fold(wide.call(&source), |call, _| call.concat(&source));
    let got = call.run()?.to_host()?;
    assert!(bits(got.as_slice().unwrap()) == bits(expected.as_slice().unwrap()), "20 sources");
    let source = CudaTensor::from_host(device, src.view())?;

    let parts = [prepare(&layer_of(&mut random, 5, 6))?, prepare(&layer_of(&mut random, 11, 6))?];
    let alone = [parts[0].forward(&source)?.to_host()?, parts[1].forward(&source)?.to_host()?];
    let branches = Branches::new(parts.to_vec())?;
    for (part, got) in alone.iter().zip(branches.forward(&source)?) {
        let got = got.to_host()?;
        assert!(got.iter().zip(part).all(|(a, b)| a.to_f32() == b.to_f32()), "branches");
    }

    // cudarc's own memory, read and written in place.
    let failed = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let stream = device.stream().clone();
    let memory = stream.clone_htod(src.as_slice().unwrap()).map_err(failed)?;
    let mut result = stream.clone_htod(&vec![T::CANARY; 2 * 5 * 41]).map_err(failed)?;
    parts[0].forward_into(
        &CudaSliceRef::new(memory.as_view(), 0, &[2, 6, 41], &[6 * 41, 41, 1])?,
        &mut CudaSliceMut::new(result.as_view_mut(), 0, &[2, 5, 41], &[5 * 41, 41, 1])?,
    )?;
    let result = stream.clone_dtoh(&result).map_err(failed)?;
    assert!(bits(&result) == bits(alone[0].as_slice().unwrap()), "slices of cudarc's");
    Ok(())
}

fn layer_of(random: &mut Random, c_out: usize, c_in: usize) -> Pointwise {
    Pointwise::new(Array2::from_shape_vec((c_out, c_in), random.normal(c_out * c_in)).unwrap())
}

fn captured<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(85);
    let own = device.with_new_stream()?;
    let layer = layer_of(&mut random, 24, 300).layer_norm(LayerNorm::over_channels());
    let prepared = layer.prepare_as::<T>(&own.clone().into(), PrepareOptions::default())?;
    let src = Array3::from_shape_fn((2, 300, 9), |_| T::from_f32(random.uniform()));
    let src = CudaTensor::from_host(&own, src.view())?;
    let mut dst = CudaTensor::<T>::zeros(&own, &[2, 24, 9])?;
    let expected = prepared.forward(&src)?.to_host()?;
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    own.stream().begin_capture(mode).map_err(code)?;
    let queued = prepared.forward_into(&src, &mut dst);
    let flags = sys::CUgraphInstantiate_flags(0);
    let graph = own.stream().end_capture(flags).map_err(code)?;
    if !own.stream().context().has_async_alloc() {
        assert!(matches!(queued, Err(Error::Unsupported { .. })), "{queued:?}");
        return Ok(());
    }
    queued?;
    let graph = graph.ok_or("nothing was captured")?;
    for _ in 0..2 {
        graph.launch().map_err(code)?;
        let got = dst.to_host()?;
        assert!(got.iter().zip(&expected).all(|(a, b)| a.to_f32() == b.to_f32()));
    }
    Ok(())
}

fn plans<T: Value>(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let layer = Pointwise::new(Array2::<f32>::ones((512, 512)));
    let prepared = layer.prepare_as::<T>(&gpu, PrepareOptions::default())?;
    let prefix = format!("fprop_{}_", T::DTYPE);
    let shape = [32, 512, 28, 28];
    let plans = prepared.plans(&shape)?;
    assert!(plans.iter().all(|plan| plan.kernel.starts_with(&prefix)), "{plans:?}");
    let chosen = prepared.explain(&shape)?.kernel;
    assert_eq!(plans[0].kernel, chosen);
    let on_tensor_cores = match (device.compute_capability(), T::DTYPE) {
        ((7, _), DType::F16) => "sm75",
        ((7, _), _) => "simt",
        _ => "sm80",
    };
    assert!(chosen.starts_with(&format!("{prefix}{on_tensor_cores}_")), "{chosen}");
    for plan in plans.iter().filter(|plan| plan.verdict.is_err()) {
        let error = layer.prepare_as::<T>(&gpu, force(plan.kernel)).unwrap_err();
        assert!(matches!(error, Error::Kernel { .. }), "{error}");
    }
    let error = layer.prepare_as::<T>(&gpu, force("fprop_f32_simt_64x64x16_nchw")).unwrap_err();
    assert!(error.to_string().contains("it takes tensors of f32"), "{error}");
    let error = layer.prepare_with(&gpu, force(chosen)).unwrap_err().to_string();
    assert!(error.contains(&format!("it takes tensors of {}", T::DTYPE)), "{error}");
    let layer = layer.layer_norm(LayerNorm::over_channels());
    let layer = layer.prepare_as::<T>(&gpu, PrepareOptions::default())?;
    let text = layer.explain(&shape)?.to_string();
    assert!(text.contains("in a launch of its own, from f32 values beside dst"), "{text}");
    Ok(())
}
