//! Layers of 8-bit integers: the CPU's bits, by every kernel, in every layout and type.

use ndarray::{Array2, Array4, Array5};
use pointwise::cudarc::driver::sys;
use pointwise::quantized::{DynamicQuantized, Int8, Per, PreparedQuantized, QuantizedElement};
use pointwise::{CudaDevice, CudaTensor, Device, Error, PrepareOptions, Quantization, Quantized};
use pointwise::{bf16, f16};

use super::cases::{Case, Held, LAYOUTS, Layout, Placed, Value, force};
use super::numbers::Random;
use super::streams::nodes;
use super::tensor_cores;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("int8_kernels_give_the_cpus_bits", every_kernel),
    ("int8_kernels_give_the_cpus_real_numbers", real_results),
    ("int8_sums_and_results_reach_the_ends", extremes),
    ("sources_that_are_quantised_in_the_call_give_the_cpus_bits", dynamic),
    ("ranges_of_values_that_are_not_finite_are_the_cpus", not_finite),
    ("int8_layers_on_host_arrays_go_through_in_slices", host_arrays),
    ("int8_layers_of_networks_give_the_cpus_bits", networks),
    ("calls_on_int8_are_captured", captured),
    ("plans_and_explain_know_int8", plans),
    ("bad_calls_on_int8_are_errors_with_their_values", bad_calls),
];

/// Bytes of either sign.
trait Byte: Held + QuantizedElement + PartialEq + std::fmt::Debug {
    const INT8: Int8;

    fn of(random: u8) -> Self;
}

impl Byte for u8 {
    const INT8: Int8 = Int8::U8;

    fn of(random: u8) -> u8 {
        random
    }
}

impl Byte for i8 {
    const INT8: Int8 = Int8::I8;

    fn of(random: u8) -> i8 {
        random as i8
    }
}

fn byte(random: &mut Random) -> u8 {
    (random.uniform() * 256.0) as u8
}

fn bytes<T: Byte>(random: &mut Random, shape: [usize; 5]) -> Array5<T> {
    Array5::from_shape_simple_fn(shape, || T::of(byte(random)))
}

fn quantization<T: Byte>(random: &mut Random, scale: f32) -> Quantization {
    let zero_point = T::INT8.min() + i32::from(byte(random));
    Quantization { int8: T::INT8, scale, zero_point }
}

/// A layer whose results spread over the range of a byte. Where it takes a residual, that has the
/// other sign of dst's, and a clip of its own lies before it.
fn layer<S: Byte>(random: &mut Random, case: &Case, residual: Option<Quantization>) -> Quantized {
    let k = case.c_in / case.groups;
    let weight = Array2::from_shape_simple_fn((case.c_out, k), || byte(random) as i8);
    let scale: Vec<f32> = (0..case.c_out).map(|_| 1e-3 * (0.5 + random.uniform())).collect();
    let bias: Vec<i32> = (0..case.c_out).map(|_| i32::from(byte(random)) * 77 - 9000).collect();
    let src = quantization::<S>(random, 0.1 / (k as f32).sqrt());
    let layer = Quantized::new(weight, scale, src).bias(bias).groups(case.groups);
    let layer = layer.stride(case.stride);
    match residual {
        Some(residual) => layer.clip(-0.4, 0.7).residual(residual).relu(),
        None => layer.clip(-0.9, 0.8),
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let more = [
        Case::new(1, 336, 40, [1, 1, 97]),
        Case { groups: 2, ..Case::new(1, 2 * 20, 2 * 6, [1, 8, 9]) },
        Case { stride: 2, ..Case::new(1, 16, 70, [3, 5, 8]) },
    ];
    tensor_cores::cases().into_iter().chain(more)
}

pub fn kernels(gpu: &Device) -> Result<Vec<&'static str>, Error> {
    let layer = Quantized::new(Array2::ones((1, 1)), vec![1.0], Quantization::u8(1.0, 0));
    let plans = layer.prepare(gpu)?.plans(&[1, 1])?;
    Ok(plans.into_iter().map(|plan| plan.kernel).collect())
}

/// Names that force each of these kernels on sums of so many channels, where these are more than a slab
/// also with several blocks to a tile, by turns.
pub fn ways(kernels: Vec<&str>, k: usize, turn: usize) -> Vec<String> {
    let shared = |kernel: &str| format!("{kernel}/{}", [2, 3, 1000][turn % 3]);
    let ways = kernels.into_iter().map(|kernel| match k > 64 {
        true => vec![kernel.into(), shared(kernel)],
        false => vec![kernel.into()],
    });
    ways.flatten().collect()
}

/// Runs a layer in the common layouts and in others, every one of which `at` reaches in some case.
fn in_layouts<S: Byte, R: Byte, O: Held + QuantizedElement>(
    device: &CudaDevice,
    prepared: &PreparedQuantized,
    (src, residual, expected): (&Array5<S>, Option<&Array5<R>>, &Array5<O>),
    at: usize,
    what: &str,
) -> Outcome {
    let (first, last) = (Layout::First, Layout::Last);
    let other = (LAYOUTS[at % 8], LAYOUTS[(3 * at + 1) % 8]);
    for (i, (from, to)) in
        [(first, first), (last, last), (first, last), (last, first), other, other]
            .into_iter()
            .enumerate()
    {
        let src = Placed::holding(device, src.view(), from);
        // At last one that does not lie as dst does.
        let beside = if i < 5 { to } else { LAYOUTS[(5 * at + 2) % 8] };
        let residual = residual.map(|residual| Placed::holding(device, residual.view(), beside));
        let shape = expected.shape().try_into().unwrap();
        let mut dst = Placed::<O>::blank(device, shape, to);
        let (src, residual) = (src.view(), residual.as_ref().map(Placed::view));
        let mut call = prepared.call(&src);
        if let Some(residual) = &residual {
            call = call.residual(residual);
        }
        call.run_into(&mut dst.view_mut())?;
        let got = dst.held();
        let wrong = got.indexed_iter().find(|&(index, value)| !value.same(expected[index]));
        if let Some((index, _)) = wrong {
            return Err(format!("{what}, {from:?} to {to:?}: wrong at {index:?}").into());
        }
    }
    Ok(())
}

fn check<S: Byte, R: Byte, O: Held + QuantizedElement>(
    device: &CudaDevice,
    random: &mut Random,
    (case, dst): (&Case, Option<Quantization>),
    (residual, at): (bool, usize),
) -> Outcome {
    let gpu = Device::from(device.clone());
    let residual = residual.then(|| quantization::<R>(random, 3e-3));
    let mut layer = layer::<S>(random, case, residual);
    if let Some(dst) = dst {
        layer = layer.dst(dst);
    }
    let src = bytes::<S>(random, case.src_shape());
    let residual = residual.map(|_| bytes::<R>(random, case.dst_shape()));
    let on_cpu = layer.prepare(&Device::cpu())?;
    let mut call = on_cpu.call(&src);
    if let Some(residual) = &residual {
        call = call.residual(residual);
    }
    let expected = call.run::<O>()?.into_dimensionality()?;
    for way in ways(kernels(&gpu)?, case.c_in / case.groups, at) {
        let prepared = layer.prepare_with(&gpu, force(&way))?;
        let what = format!("{way}, {case:?}, {} to {}", S::TYPE.name(), O::TYPE.name());
        in_layouts(device, &prepared, (&src, residual.as_ref(), &expected), at, &what)?;
    }
    Ok(())
}

fn every_kernel(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(91);
    for (i, case) in cases().enumerate() {
        let residual = (i % 3 != 0, i);
        let r = &mut random;
        let u8_dst = Some(quantization::<u8>(r, 8e-3));
        let i8_dst = Some(quantization::<i8>(r, 8e-3));
        match i % 4 {
            0 => check::<u8, u8, i8>(device, r, (&case, i8_dst), residual)?,
            1 => check::<u8, i8, u8>(device, r, (&case, u8_dst), residual)?,
            2 => check::<i8, u8, u8>(device, r, (&case, u8_dst), residual)?,
            _ => check::<i8, i8, i8>(device, r, (&case, i8_dst), residual)?,
        }
    }
    Ok(())
}

fn real_results(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(92);
    for (i, case) in cases().enumerate() {
        let (residual, r) = ((i % 2 == 0, i + 3), &mut random);
        match i % 3 {
            0 => check::<u8, i8, f32>(device, r, (&case, None), residual)?,
            1 => check::<i8, u8, f16>(device, r, (&case, None), residual)?,
            _ => check::<u8, u8, bf16>(device, r, (&case, None), residual)?,
        }
    }
    Ok(())
}

/// A layer of f32 sources, in f32 or in the type of its residual.
fn dynamic_layer(random: &mut Random, case: &Case, per: Per, residual: bool) -> DynamicQuantized {
    let weight =
        Array2::from_shape_simple_fn((case.c_out, case.c_in / case.groups), || byte(random) as i8);
    let scale: Vec<f32> = (0..case.c_out).map(|_| 1e-3 * (0.5 + random.uniform())).collect();
    let layer = DynamicQuantized::new(weight, scale, per).bias(random.normal(case.c_out));
    let layer = layer.groups(case.groups).stride(case.stride);
    if residual { layer.clip(-0.5, 0.9).residual().relu() } else { layer.clip(-1.5, 1.5) }
}

fn dynamic(device: &CudaDevice) -> Outcome {
    fn check<O: Value + QuantizedElement>(
        device: &CudaDevice,
        random: &mut Random,
        (case, i): (&Case, usize),
    ) -> Outcome {
        let gpu = Device::from(device.clone());
        let per = [Per::Position, Per::Sample, Per::Tensor][i % 3];
        let layer = dynamic_layer(random, case, per, i % 2 == 0);
        let src = random.tensor(case.src_shape());
        let residual = random.tensor(case.dst_shape()).mapv(O::from_f32);
        let on_cpu = layer.prepare(&Device::cpu())?;
        let call = on_cpu.call(&src);
        let call = if i % 2 == 0 { call.residual(&residual) } else { call };
        let expected = call.run::<O>()?;
        let shape = case.dst_shape();
        for way in ways(kernels(&gpu)?, case.c_in / case.groups, i) {
            let prepared = layer.prepare_with(&gpu, force(&way))?;
            for j in [0, 1, i % 8] {
                let (from, to) = (LAYOUTS[j], LAYOUTS[(j + i) % 8]);
                let src = Placed::<f32>::holding(device, src.view(), from);
                let residual = Placed::holding(device, residual.view(), to);
                let mut dst = Placed::<O>::blank(device, shape, to);
                let (src, residual) = (src.view(), residual.view());
                let call = prepared.call(&src);
                let call = if i % 2 == 0 { call.residual(&residual) } else { call };
                call.run_into(&mut dst.view_mut())?;
                let got = dst.held().into_dyn();
                let same = got.iter().zip(&expected).all(|(got, &expected)| got.same(expected));
                assert!(same, "{way}, {case:?}, {per:?}, {from:?} to {to:?}");
            }
        }
        // Host arrays in slices: ranges are those of all that they are of.
        for slice_bytes in [1 << 24, 3000] {
            let slice_bytes = Some(slice_bytes);
            let options = PrepareOptions { slice_bytes, ..PrepareOptions::default() };
            let prepared = layer.prepare_with(&gpu, options)?;
            let call = prepared.call(&src);
            let call = if i % 2 == 0 { call.residual(&residual) } else { call };
            let got = call.run::<O>()?;
            let same = got.iter().zip(&expected).all(|(got, &expected)| got.same(expected));
            assert!(same, "{case:?}, {per:?} in slices of {slice_bytes:?} bytes");
        }
        Ok(())
    }
    let mut random = Random::new(96);
    for (i, case) in cases().enumerate() {
        match i % 4 {
            0 => check::<f16>(device, &mut random, (&case, i))?,
            1 => check::<bf16>(device, &mut random, (&case, i))?,
            _ => check::<f32>(device, &mut random, (&case, i))?,
        }
    }
    Ok(())
}

fn not_finite(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let mut random = Random::new(97);
    let case = Case::new(3, 10, 5, [1, 1, 40]);
    let mut src = random.tensor(case.src_shape());
    src[[0, 3, 0, 0, 7]] = f32::NAN;
    src[[1, 4, 0, 0, 9]] = f32::NEG_INFINITY;
    // Ranges beyond f32, the least one, and none.
    (src[[2, 0, 0, 0, 1]], src[[2, 1, 0, 0, 1]]) = (3e38, -3e38);
    for c in 0..10 {
        (src[[2, c, 0, 0, 2]], src[[2, c, 0, 0, 3]]) = (0.0, if c == 4 { 1e-45 } else { 0.0 });
        src[[2, c, 0, 0, 4]] = -1.5;
    }
    for per in [Per::Position, Per::Sample, Per::Tensor] {
        let layer = dynamic_layer(&mut random, &case, per, false);
        let expected = layer.prepare(&Device::cpu())?.forward::<f32, f32, _>(&src)?;
        let prepared = layer.prepare(&gpu)?;
        let on_device = CudaTensor::from_host(device, src.view())?;
        let got = prepared.forward_cuda::<f32, f32>(&on_device)?.to_host()?;
        let nans = expected.iter().filter(|x| x.is_nan()).count();
        let positions = if per == Per::Position {
            2
        } else if per == Per::Sample {
            80
        } else {
            120
        };
        assert_eq!(nans, 5 * positions, "{per:?}");
        for (got, expected) in got.iter().zip(&expected) {
            let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
            assert!(same, "{per:?}: {got}, expected {expected}");
        }
    }
    Ok(())
}

/// Sums as large as an i32 nearly holds, and results far beyond a byte.
fn extremes(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let k = 400;
    let weight = Array2::from_shape_fn((3, k), |(c, _)| [127i8, -128, -1][c]);
    let bias = vec![i32::MAX - 127 * 255 * k as i32, i32::MIN + 128 * 255 * k as i32, 0];
    for scale in [1e-9, 1e-4, 1.0] {
        let layer = Quantized::new(weight.clone(), vec![1.0; 3], Quantization::u8(1.0, 0));
        let layer = layer.bias(bias.clone()).dst(Quantization::i8(1.0 / scale, 5));
        let src = Array5::from_shape_fn((1, k, 1, 2, 70), |(_, _, _, h, _)| [255u8, 0][h]);
        let expected = layer.prepare(&Device::cpu())?.forward::<u8, i8, _>(&src)?;
        for way in ways(kernels(&gpu)?, k, 1) {
            let prepared = layer.prepare_with(&gpu, force(&way))?;
            in_layouts::<u8, u8, i8>(device, &prepared, (&src, None, &expected), 2, &way)?;
        }
    }
    Ok(())
}

fn host_arrays(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(93);
    let gpu = Device::from(device.clone());
    for case in [
        Case::new(3, 40, 24, [1, 6, 11]),
        Case { stride: 2, ..Case::new(2, 24, 12, [1, 9, 7]) },
        Case::new(2, 12, 7, [1, 1, 1]),
    ] {
        let q = quantization::<i8>(&mut random, 4e-3);
        let layer = layer::<u8>(&mut random, &case, Some(q));
        let src = bytes::<u8>(&mut random, case.src_shape());
        let residual = bytes::<i8>(&mut random, case.dst_shape());
        let expected =
            layer.prepare(&Device::cpu())?.call(&src).residual(&residual).run::<f32>()?;
        for slice_bytes in [1 << 24, 2000, 0] {
            let slice_bytes = Some(slice_bytes);
            let options = PrepareOptions { slice_bytes, ..PrepareOptions::default() };
            let prepared = layer.prepare_with(&gpu, options)?;
            let got = prepared.call(&src).residual(&residual).run::<f32>()?;
            assert!(got == expected, "{case:?} in slices of {slice_bytes:?} bytes");
        }
    }
    Ok(())
}

fn networks(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(94);
    let gpu = Device::from(device.clone());
    for (i, case) in [
        Case::new(1, 256, 64, [1, 14, 14]),
        Case::new(1, 96, 24, [1, 28, 28]),
        Case::new(2, 512, 130, [1, 7, 7]),
    ]
    .iter()
    .enumerate()
    {
        let dst = quantization::<u8>(&mut random, 8e-3);
        let layer = layer::<u8>(&mut random, case, None).dst(dst);
        let src = bytes::<u8>(&mut random, case.src_shape());
        let expected = layer.prepare(&Device::cpu())?.forward::<u8, u8, _>(&src)?;
        let prepared = layer.prepare(&gpu)?;
        in_layouts::<u8, u8, u8>(device, &prepared, (&src, None, &expected), i, "chosen")?;
        let src = CudaTensor::from_host(device, src.view())?;
        let got: CudaTensor<u8> = prepared.forward_cuda(&src)?;
        assert!(got.to_host()? == expected.into_dyn(), "a device tensor's result is one");
    }
    Ok(())
}

fn captured(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(95);
    let own = device.with_new_stream()?;
    let case = Case::new(2, 70, 24, [1, 1, 9]);
    let layer = layer::<i8>(&mut random, &case, None).dst(quantization::<i8>(&mut random, 8e-3));
    // Two blocks share a tile: the graph has memory of its own for that, where there are pools.
    let prepared = layer.prepare_with(&own.clone().into(), force("fprop_i8_mma_64x64x64/2"))?;
    let src = CudaTensor::from_host(&own, bytes::<i8>(&mut random, case.src_shape()).view())?;
    let expected = prepared.forward_cuda::<i8, i8>(&src)?.to_host()?;
    let mut dst = CudaTensor::<i8>::zeros(&own, &case.dst_shape())?;
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    own.stream().begin_capture(mode).map_err(code)?;
    let queued = prepared.forward_into(&src, &mut dst);
    let graph = own.stream().end_capture(sys::CUgraphInstantiate_flags(0)).map_err(code)?;
    queued?;
    let graph = graph.ok_or("nothing was captured")?;
    assert!(dst.to_host()?.iter().all(|&x| x == 0), "a capture runs nothing");
    assert_eq!(nodes(&graph), if own.stream().context().has_async_alloc() { 4 } else { 1 });
    for _ in 0..2 {
        graph.launch().map_err(code)?;
        assert!(dst.to_host()? == expected);
    }

    // What is quantised in the call takes memory nodes; a call on host tensors is refused before it
    // queues any.
    let layer =
        dynamic_layer(&mut random, &case, Per::Sample, false).prepare(&own.clone().into())?;
    let on_host = random.tensor(case.src_shape());
    own.stream().begin_capture(mode).map_err(code)?;
    let refused = layer.forward::<f32, f32, _>(&on_host);
    let graph = own.stream().end_capture(sys::CUgraphInstantiate_flags(0)).map_err(code)?;
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
    assert_eq!(graph.map_or(0, |graph| nodes(&graph)), 0);
    let src = CudaTensor::from_host(&own, on_host.view())?;
    let expected = layer.forward_cuda::<f32, f32>(&src)?.to_host()?;
    let mut dst = CudaTensor::<f32>::zeros(&own, &case.dst_shape())?;
    own.stream().begin_capture(mode).map_err(code)?;
    let queued = layer.forward_into(&src, &mut dst);
    let graph = own.stream().end_capture(sys::CUgraphInstantiate_flags(0)).map_err(code)?;
    if !own.stream().context().has_async_alloc() {
        assert!(matches!(queued, Err(Error::Unsupported { .. })), "{queued:?}");
        assert_eq!(graph.map_or(0, |graph| nodes(&graph)), 0);
        return Ok(());
    }
    queued?;
    let graph = graph.ok_or("nothing was captured")?;
    assert!(nodes(&graph) > 0);
    for _ in 0..2 {
        graph.launch().map_err(code)?;
        assert!(dst.to_host()? == expected);
    }
    Ok(())
}

fn plans(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let layer = Quantized::new(Array2::ones((512, 512)), vec![1.0; 512], Quantization::u8(1.0, 0));
    let prepared = layer.prepare(&gpu)?;
    for shape in [[32, 512, 28, 28], [1, 512, 1, 1]] {
        let plans = prepared.plans(&shape)?;
        assert!(plans.len() >= 2 && plans.iter().all(|plan| plan.kernel.starts_with("fprop_i8_")));
        let explanation = prepared.explain(&shape)?;
        assert_eq!(plans[0].kernel, explanation.kernel);
        assert_eq!(explanation.cost, prepared.cost(&shape)?);
        for plan in plans {
            let forced = layer.prepare_with(&gpu, force(plan.kernel))?.explain(&shape)?;
            assert_eq!(forced.kernel, plan.kernel);
            assert!(forced.reason.starts_with("forced; "), "{forced}");
        }
    }
    let large = prepared.explain(&[32, 512, 28, 28])?;
    assert_eq!(large.kernel, "fprop_i8_mma_128x128x64");
    assert!(large.reason.starts_with("784 tiles of 128 channels x 128 positions"), "{large}");
    assert_eq!(prepared.kernel(), large.kernel);
    assert_eq!(prepared.explain(&[1, 512, 1, 1])?.kernel, "fprop_i8_mma_64x64x64");
    let weight = Array2::ones((512, 2048));
    let deep = Quantized::new(weight, vec![1.0; 512], Quantization::u8(1.0, 0)).prepare(&gpu)?;
    let few = deep.explain(&[1, 2048, 7, 7])?;
    assert!(few.reason.contains(" positions, each shared by "), "{few}");
    Ok(())
}

fn bad_calls(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let layer = Quantized::new(Array2::ones((3, 2)), vec![1.0; 3], Quantization::u8(1.0, 0));
    for (wrong, reason) in [
        ("fprop_f32_simt_64x64x16_nchw", "this device has fprop_i8_mma_128x128x64, "),
        ("fprop_i8_mma_64x64x64/0", "how many blocks share a sum"),
    ] {
        let error = layer.prepare_with(&gpu, force(wrong)).unwrap_err().to_string();
        assert!(error.contains(wrong) && error.contains(reason), "{error}");
    }
    let prepared = layer.prepare(&gpu)?;
    let src = Array4::<u8>::zeros((1, 2, 3, 3));
    let on_device = CudaTensor::from_host(device, src.view())?;
    let mut on_host = Array4::<f32>::zeros((1, 3, 3, 3));
    let error = prepared.forward_into(&on_device, &mut on_host).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { tensor: "dst", .. }), "{error}");
    let error = prepared.forward_cuda::<u8, u8>(&on_device).unwrap_err();
    assert!(matches!(error, Error::ElementType { tensor: "dst", .. }), "{error}");
    let signed = CudaTensor::<i8>::zeros(device, &[1, 2, 3, 3])?;
    let error = prepared.forward_cuda::<i8, f32>(&signed).unwrap_err();
    assert!(matches!(error, Error::ElementType { tensor: "src", .. }), "{error}");
    let on_cpu = layer.prepare(&Device::cpu())?;
    let error = on_cpu.forward_cuda::<u8, f32>(&on_device).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { tensor: "src", .. }), "{error}");
    assert!(matches!(on_cpu.on(device).unwrap_err(), Error::WrongDevice { .. }));
    // On a stream of its own, which outlives the layer that it is of.
    let beside = layer.prepare(&gpu)?.on(&device.with_new_stream()?)?;
    let ones = CudaTensor::from_host(device, Array4::<u8>::ones((1, 2, 3, 3)).view())?;
    let sums = beside.forward_cuda::<u8, f32>(&ones)?.to_host()?;
    assert!(sums.iter().all(|&x| x == 2.0), "{sums}");
    // Nothing to do.
    let none = prepared.forward::<u8, f32, _>(&Array4::zeros((0, 2, 3, 3)))?;
    assert_eq!(none.shape(), [0, 3, 3, 3]);
    Ok(())
}
