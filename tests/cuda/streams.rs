//! Streams, threads, graphs, raw pointers: what a service does around a layer.

use ndarray::{Array2, Array3, s};
use pointwise::cudarc::driver::{CudaContext, CudaGraph, result, sys};
use pointwise::{
    CudaDevice, CudaSliceMut, CudaSliceRef, CudaTensor, Device, Error, LayerNorm, Place, Pointwise,
    PrepareOptions, TensorMut, TensorRef, f16,
};

use super::cases::Value;
use super::numbers::Random;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("tensors_cross_streams_by_themselves", across_streams),
    ("threads_share_a_layer", threads),
    ("a_stream_of_the_callers_and_raw_pointers", raw_pointers),
    ("slices_of_cudarc_are_tensors", borrowed_slices),
    ("slices_of_the_per_thread_stream_are_read_in_its_order", per_thread_slices),
    ("the_memory_pool_keeps_what_it_is_told_to", kept_memory),
    ("streams_that_would_mix_are_refused", refused_streams),
    ("a_raw_handle_of_the_primary_context_is_the_primary_context", raw_context),
    ("a_call_can_be_captured_in_a_graph", graph),
    ("layers_write_into_channel_ranges", channel_ranges),
    ("plans_name_every_kernel_and_explain_the_first", plans),
    ("tensors_of_another_device_are_refused", wrong_device),
];

fn layer(random: &mut Random, c_out: usize, c_in: usize) -> Pointwise {
    let weight = Array2::from_shape_vec((c_out, c_in), random.integers(c_out * c_in)).unwrap();
    Pointwise::new(weight).bias(random.integers(c_out)).relu()
}

fn source(random: &mut Random, c: usize) -> Array3<f32> {
    Array3::from_shape_vec((2, c, 21), random.integers(42 * c)).unwrap()
}

fn across_streams(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(21);
    let (first, second) = (layer(&mut random, 8, 12), layer(&mut random, 6, 8));
    let src = source(&mut random, 12);
    let expected =
        second.prepare(&Device::cpu())?.forward(&first.prepare(&Device::cpu())?.forward(&src)?)?;
    let other = device.with_new_stream()?;
    let first = first.prepare(&device.clone().into())?;
    let second = second.prepare(&device.clone().into())?.on(&other)?;
    for _ in 0..3 {
        let src = CudaTensor::from_host(device, src.view())?;
        let between = first.forward(&src)?;
        drop(src);
        // Made on one stream, read on the other, dropped while that may still run.
        let mut dst = CudaTensor::zeros(&other, &[2, 6, 21])?;
        second.forward_into(&between, &mut dst)?;
        drop(between);
        let reused = CudaTensor::<f32>::zeros(device, &[2, 8, 21])?;
        assert_eq!(dst.to_host()?, expected.clone().into_dyn());
        drop(reused);
    }
    Ok(())
}

fn threads(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(22);
    let layer = layer(&mut random, 10, 7);
    let sources: Vec<_> = (0..4).map(|_| source(&mut random, 7)).collect();
    let cpu = layer.prepare(&Device::cpu())?;
    let gpu = layer.prepare(&device.clone().into())?;
    std::thread::scope(|scope| {
        for (i, src) in sources.iter().enumerate() {
            let (cpu, gpu, device) = (&cpu, &gpu, &device);
            scope.spawn(move || {
                let own = device.with_new_stream().unwrap();
                let mine = if i % 2 == 0 { gpu.clone() } else { gpu.on(&own).unwrap() };
                for _ in 0..3 {
                    assert_eq!(mine.forward(src).unwrap(), cpu.forward(src).unwrap());
                }
            });
        }
    });
    Ok(())
}

fn raw_pointers(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(23);
    let layer = layer(&mut random, 9, 5);
    let src = source(&mut random, 5);
    let expected = layer.prepare(&Device::cpu())?.forward(&src)?;

    // A framework's context, stream and memory, as it would hand them over.
    let context = CudaContext::new(device.ordinal()).map_err(|e| format!("{:?}", e.0))?;
    let stream = context.new_stream().map_err(|e| format!("{:?}", e.0))?;
    let theirs = stream.clone_htod(src.as_slice().unwrap()).map_err(|e| format!("{:?}", e.0))?;
    let mut result = stream.alloc_zeros::<f32>(2 * 9 * 21).map_err(|e| format!("{:?}", e.0))?;
    {
        use pointwise::cudarc::driver::{DevicePtr, DevicePtrMut};
        let (from, _from) = theirs.device_ptr(&stream);
        let (to, _to) = result.device_ptr_mut(&stream);
        let place = Place::Cuda(device.ordinal());
        // SAFETY: the slices live to the end of the block, the stream to the end of the function.
        let (mine, src, mut dst) = unsafe {
            (
                CudaDevice::from_raw_stream(device.ordinal(), stream.cu_stream())?,
                TensorRef::<f32>::from_raw_parts(
                    std::ptr::without_provenance(from as usize),
                    place,
                    &[2, 5, 21],
                    &[105, 21, 1],
                )?,
                TensorMut::<f32>::from_raw_parts(
                    std::ptr::without_provenance_mut(to as usize),
                    place,
                    &[2, 9, 21],
                    &[189, 21, 1],
                )?,
            )
        };
        layer.prepare(&mine.into())?.forward_into(&src, &mut dst)?;
    }
    let got = stream.clone_dtoh(&result).map_err(|e| format!("{:?}", e.0))?;
    assert_eq!(got, expected.as_slice().unwrap());

    let shared = CudaDevice::from_stream(stream.clone())?;
    assert_eq!(layer.prepare(&shared.into())?.forward(&src)?, expected);
    Ok(())
}

fn borrowed_slices(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(26);
    let layer = layer(&mut random, 9, 5);
    let src = source(&mut random, 5);
    let expected = layer.prepare(&Device::cpu())?.forward(&src)?;
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    // Two streams of theirs, in a context that tracks who reads and writes.
    let context = CudaContext::new(device.ordinal()).map_err(code)?;
    let (stream, copies) =
        (context.new_stream().map_err(code)?, context.new_stream().map_err(code)?);
    // The layer on a third stream.
    let prepared = layer.prepare(&device.clone().into())?;
    let mut theirs = stream.alloc_zeros::<f32>(2 * 5 * 21 + 3).map_err(code)?;
    let mut result = stream.alloc_zeros::<f32>(2 * 9 * 21 + 40).map_err(code)?;
    for _ in 0..2 {
        copies.memcpy_htod(src.as_slice().unwrap(), &mut theirs.slice_mut(3..)).map_err(code)?;
        let shape = [2, 5, 21];
        let from = CudaSliceRef::new(theirs.as_view(), 3, &shape, &[105, 21, 1])?;
        let to = result.slice_mut(20..);
        let mut to = CudaSliceMut::new(to, 0, &[2, 9, 21], &[189, 21, 1])?;
        prepared.forward_into(&from, &mut to)?;
        assert_eq!(prepared.forward(&from)?.to_host()?, expected.clone().into_dyn());
        drop((from, to));
        // They overwrite what was read, and read what was written, on a stream of their choice.
        let got = copies.clone_dtoh(&result).map_err(code)?;
        copies.memset_zeros(&mut theirs).map_err(code)?;
        assert_eq!(got[20..398], *expected.as_slice().unwrap());
        assert!(got[..20].iter().chain(&got[398..]).all(|&x| x == 0.0));
    }
    let error = CudaSliceRef::new(theirs.slice(..212), 3, &[2, 5, 21], &[105, 21, 1]);
    assert!(matches!(error, Err(Error::OutOfBounds { last: 212, len: 212, .. })), "{error:?}");
    drop(error);
    let error = CudaSliceMut::new(theirs.as_view_mut(), 0, &[2, 5, 21], &[105, 21, 0]);
    assert!(matches!(error, Err(Error::Overlap { .. })), "{error:?}");
    context.check_err().map_err(code)?;
    Ok(())
}

fn per_thread_slices(device: &CudaDevice) -> Outcome {
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let layer = Pointwise::new(Array2::from_elem((3, 2), 1.0f32));
    let layer = layer.prepare(&device.clone().into())?;
    let context = CudaContext::new(device.ordinal()).map_err(code)?;
    let stream = context.per_thread_stream();
    let src = stream.clone_htod(&[1.0f32; 20]).map_err(code)?;
    let mut dst = stream.alloc_zeros::<f32>(30).map_err(code)?;
    for expected in [2.0, 2.0] {
        let src = CudaSliceRef::new(src.as_view(), 0, &[2, 2, 5], &[10, 5, 1])?;
        let mut to = CudaSliceMut::new(dst.as_view_mut(), 0, &[2, 3, 5], &[15, 5, 1])?;
        layer.forward_into(&src, &mut to)?;
        drop(to);
        assert_eq!(stream.clone_dtoh(&dst).map_err(code)?, [expected; 30]);
        // A result would have no stream of its own.
        assert!(matches!(layer.forward(&src), Err(Error::Unsupported { .. })));
    }
    Ok(())
}

fn kept_memory(device: &CudaDevice) -> Outcome {
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let context = CudaContext::new(device.ordinal()).map_err(code)?;
    for bytes in [3u64 << 30, 0] {
        device.keep_memory(bytes)?;
        if !context.has_async_alloc() {
            continue;
        }
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let mut kept = u64::MAX;
        // SAFETY: the device's own pool, and a 64-bit number.
        unsafe {
            let pool = result::device::get_mem_pool(context.cu_device()).map_err(code)?;
            result::mem_pool::get_attribute(pool, attribute, (&raw mut kept).cast())
                .map_err(code)?;
        }
        assert_eq!(kept, bytes);
    }
    Ok(())
}

fn refused_streams(device: &CudaDevice) -> Outcome {
    let ordinal = device.ordinal();
    let context = CudaContext::new(ordinal).map_err(|e| format!("{:?}", e.0))?;
    let per_thread = context.per_thread_stream();
    // SAFETY: it is refused before it is used.
    let raw = unsafe { CudaDevice::from_raw_stream(ordinal, per_thread.cu_stream()) };
    for refused in [CudaDevice::from_stream(per_thread), raw] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("per-thread") && error.contains("create a stream"), "{error}");
    }
    let legacy = CudaDevice::from_stream(context.default_stream())?;
    let src = Array3::<f32>::ones((1, 2, 5));
    let layer = Pointwise::new(Array2::from_elem((3, 2), 1.0f32)).prepare(&legacy.into())?;
    assert!(layer.forward(&src)?.iter().all(|&x| x == 2.0));

    // No context at all is another than the primary one, and one that every driver knows.
    let none = std::ptr::null_mut();
    // SAFETY: nothing is done in it.
    let foreign = unsafe { CudaContext::from_raw_context(ordinal, context.cu_device(), none) };
    let foreign = foreign.map_err(|e| format!("{:?}", e.0))?;
    let error = CudaDevice::from_stream(foreign.default_stream()).unwrap_err().to_string();
    assert!(error.contains("a stream of a context other than the primary one"), "{error}");
    Ok(())
}

/// A context that a program brings as a raw handle is what it is, not what its object says.
fn raw_context(device: &CudaDevice) -> Outcome {
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let ordinal = device.ordinal();
    let primary = CudaContext::new(ordinal).map_err(code)?;
    let number = primary.cu_device();
    // SAFETY: alive; this object, which would destroy it, stays.
    let theirs = unsafe { CudaContext::from_raw_context(ordinal, number, primary.cu_ctx()) };
    let theirs = theirs.map_err(code)?;
    std::mem::forget(theirs.clone());
    assert!(!theirs.is_primary());

    let stream = theirs.new_stream().map_err(code)?;
    let src = stream.clone_htod(&[1.0f32; 20]).map_err(code)?;
    let mut dst = stream.alloc_zeros::<f32>(30).map_err(code)?;
    let gpu = CudaDevice::from_stream(stream.clone())?;
    let layer = Pointwise::new(Array2::from_elem((3, 2), 1.0f32)).prepare(&gpu.into())?;
    let from = CudaSliceRef::new(src.as_view(), 0, &[2, 2, 5], &[10, 5, 1])?;
    let mut to = CudaSliceMut::new(dst.as_view_mut(), 0, &[2, 3, 5], &[15, 5, 1])?;
    layer.forward_into(&from, &mut to)?;
    drop(to);
    assert_eq!(
        layer.forward(&from)?.to_host()?,
        Array3::<f32>::from_elem((2, 3, 5), 2.0).into_dyn()
    );
    assert_eq!(stream.clone_dtoh(&dst).map_err(code)?, [2.0; 30]);
    Ok(())
}

fn graph(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(24);
    let layer = layer(&mut random, 9, 5);
    let own = device.with_new_stream()?;
    let prepared = layer.prepare(&own.clone().into())?;
    let expected = layer.prepare(&Device::cpu())?;
    let src = CudaTensor::from_host(&own, source(&mut random, 5).view())?;
    let mut dst = CudaTensor::<f32>::zeros(&own, &[2, 9, 21])?;
    own.synchronize()?;
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    own.stream().begin_capture(mode).map_err(code)?;
    prepared.forward_into(&src, &mut dst)?;
    let flags = sys::CUgraphInstantiate_flags(0);
    let graph = own.stream().end_capture(flags).map_err(code)?.ok_or("nothing was captured")?;
    assert!(dst.to_host()?.iter().all(|&x| x == 0.0), "a captured call does not run");
    for _ in 0..2 {
        graph.launch().map_err(code)?;
    }
    let src = src.to_host()?;
    assert_eq!(dst.to_host()?, expected.forward(&src)?);
    Ok(())
}

/// Calls that a graph cannot take where there are no pools leave nothing of theirs in it, what passes
/// their convolution by not either, and a call that it can take goes on.
pub fn refused_in_captures(device: &CudaDevice) -> Result<String, Error> {
    let partial = |norm| Pointwise::new(Array2::ones((7, 4))).partial(2..6).layer_norm(norm);
    refused_in_capture::<f32>(device, &partial(LayerNorm::over_all()))?;
    refused_in_capture::<f16>(device, &partial(LayerNorm::over_channels()))?;
    Ok("refused, and captured".into())
}

fn refused_in_capture<T: Value>(device: &CudaDevice, layer: &Pointwise) -> Result<(), Error> {
    let own = device.with_new_stream()?;
    let prepare =
        |layer: &Pointwise| layer.prepare_as::<T>(&own.clone().into(), PrepareOptions::default());
    let (layer, plain) = (prepare(layer)?, prepare(&Pointwise::new(Array2::ones((3, 10))))?);
    let src = Array3::from_elem((2, 10, 21), T::from_f32(1.0));
    let src = CudaTensor::from_host(&own, src.view())?;
    let mut untouched = CudaTensor::<T>::zeros(&own, &[2, 13, 21])?;
    let mut dst = CudaTensor::<T>::zeros(&own, &[2, 3, 21])?;
    own.synchronize()?;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    own.stream().begin_capture(mode).expect("nothing is captured yet");
    let refused = layer.forward_into(&src, &mut untouched);
    plain.forward_into(&src, &mut dst)?;
    let graph = own.stream().end_capture(sys::CUgraphInstantiate_flags(0));
    let graph = graph.expect("the capture is valid").expect("a call was captured");
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
    assert_eq!(nodes(&graph), 1);
    graph.launch().expect("the graph is whole");
    assert!(untouched.to_host()?.iter().all(|x| x.to_f32() == 0.0));
    assert!(dst.to_host()?.iter().all(|x| x.to_f32() == 10.0));
    Ok(())
}

/// How many a graph has.
pub fn nodes(graph: &CudaGraph) -> usize {
    let mut count = 0;
    // SAFETY: the graph is one; without room for nodes only their number is asked for.
    let code =
        unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &raw mut count) };
    assert_eq!(code, sys::cudaError_enum::CUDA_SUCCESS);
    count
}

fn channel_ranges(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(25);
    let (a, b) = (layer(&mut random, 4, 6), layer(&mut random, 8, 6));
    let src = source(&mut random, 6);
    let on_device = CudaTensor::from_host(device, src.view())?;
    let mut dst = CudaTensor::<f32>::zeros(device, &[2, 12, 21])?;
    let gpu = Device::from(device.clone());
    a.prepare(&gpu)?.forward_into(&on_device, &mut dst.channels_mut(0..4)?)?;
    b.prepare(&gpu)?.forward_into(&on_device, &mut dst.channels_mut(4..12)?)?;
    let dst = dst.to_host()?;
    for (layer, range) in [(a, 0..4), (b, 4..12)] {
        let expected = layer.prepare(&Device::cpu())?.forward(&src)?;
        assert_eq!(dst.slice(s![.., range, ..]), expected);
    }
    assert!(matches!(on_device.channels(3..7), Err(Error::ChannelRange { start: 3, end: 7, .. })));
    let (start, end) = (3, 1);
    let text = on_device.channels(start..end).unwrap_err().to_string();
    assert_eq!(text, "channels 3..1 of a tensor of 6");
    let flat = CudaTensor::<f32>::zeros(device, &[4])?;
    assert!(matches!(flat.channels(start..end), Err(Error::Rank { got: 1, .. })));
    Ok(())
}

fn plans(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let layer = Pointwise::new(Array2::ones((256, 64))).prepare(&gpu)?;
    let plans = layer.plans(&[32, 64, 56, 56])?;
    let usable: Vec<_> = plans.iter().filter(|plan| plan.verdict.is_ok()).collect();
    assert!(usable.len() >= 8 && plans.iter().take(usable.len()).all(|plan| plan.verdict.is_ok()));
    let explanation = layer.explain(&[32, 64, 56, 56])?;
    assert_eq!(explanation.kernel, plans[0].kernel);
    assert!(explanation.kernel.starts_with("fprop_f32_simt_"), "{explanation}");
    assert!(explanation.device.starts_with("cuda:0 ("), "{explanation}");
    for kernel in usable.iter().map(|plan| plan.kernel) {
        let options =
            pointwise::PrepareOptions { kernel: Some(kernel.into()), ..Default::default() };
        let forced = Pointwise::new(Array2::ones((3, 2))).prepare_with(&gpu, options)?;
        assert_eq!(forced.explain(&[1, 2])?.kernel, kernel);
    }
    let options = pointwise::PrepareOptions {
        kernel: Some("fprop_f32_simt_1x1x1".into()),
        ..Default::default()
    };
    let error = Pointwise::new(Array2::ones((3, 2))).prepare_with(&gpu, options).unwrap_err();
    assert!(matches!(&error, Error::Kernel { kernel, .. } if kernel == "fprop_f32_simt_1x1x1"));
    Ok(())
}

fn wrong_device(device: &CudaDevice) -> Outcome {
    let src = CudaTensor::<f32>::zeros(device, &[1, 2, 5])?;
    let layer = Pointwise::new(Array2::ones((3, 2)));
    let error = layer.prepare(&Device::cpu())?.forward(&src).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { .. }), "{error}");
    let mut host = Array3::<f32>::zeros((1, 3, 5));
    let error = layer.prepare(&device.clone().into())?.forward_into(&src, &mut host).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { .. }), "{error}");
    // Also where there is nothing to do.
    let place = Place::Cuda(device.ordinal() + 1);
    // SAFETY: no elements.
    let (src, mut dst) = unsafe {
        (
            TensorRef::<f32>::from_raw_parts(std::ptr::null(), place, &[0, 2, 5], &[10, 5, 1])?,
            TensorMut::<f32>::from_raw_parts(std::ptr::null_mut(), place, &[0, 3, 5], &[15, 5, 1])?,
        )
    };
    let error = layer.prepare(&device.clone().into())?.forward_into(&src, &mut dst).unwrap_err();
    assert!(matches!(error, Error::WrongDevice { .. }), "{error}");
    Ok(())
}
