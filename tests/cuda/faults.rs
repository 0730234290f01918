//! What goes wrong on a device: memory that runs out, streams that are not the device's, faults
//! that end a context. Each in a process of its own.

use ndarray::{Array2, Array3};
use pointwise::cudarc::driver::{CudaContext, DevicePtr, result};
use pointwise::train::{Accumulate, Params};
use pointwise::{
    Branches, CudaDevice, CudaTensor, Device, Error, Place, Pointwise, PrepareOptions,
    Quantization, Quantized, Sequence, TensorMut, TensorRef,
};

use super::driver::expect;
use super::{OnDevice, Outcome};

/// For the stand-in driver, whose size and number can be chosen and whose faults harm nobody.
pub const STAND_IN_TRIALS: &[OnDevice] = &[
    ("memory_that_runs_out_is_an_error", out_of_memory),
    ("host_tensors_larger_than_the_device_go_through", larger_than_the_device),
    ("a_device_without_room_for_one_position_says_so", no_room),
    ("a_lost_device_says_so_and_the_rest_goes_on", lost),
    ("streams_that_are_not_the_device_s_are_refused", foreign_streams),
];

/// What the started processes do.
pub fn child(what: &str) -> Result<String, Error> {
    match what {
        "full" => full(),
        "larger" => larger(),
        "no room" => fill_up(),
        "fault" => fault(700),
        "failed launch" => fault(719),
        "foreign" => foreign(),
        other => Err(Error::Checkpoint(format!("no such child: {other}"))),
    }
}

fn out_of_memory(_: &CudaDevice) -> Outcome {
    let parts = [
        "cuda:0 (",
        "out of memory: no 33554432 bytes for a tensor",
        "bytes for a layer's weights",
        "then 4096 values",
    ];
    expect("full", &[("PW_EMULATOR_MEMORY", "16M")], &parts)
}

fn full() -> Result<String, Error> {
    let gpu = CudaDevice::open(0)?;
    let tensor = CudaTensor::<f32>::zeros(&gpu, &[1 << 11, 1 << 12]).unwrap_err();
    let weight = Array2::from_elem((1 << 11, 1 << 11), 2.0f32);
    let layer = Pointwise::new(weight).prepare(&gpu.clone().into()).unwrap_err();
    let small = Pointwise::new(Array2::from_elem((1 << 12, 3), 2.0f32)).prepare(&gpu.into())?;
    let after = small.forward(&Array2::<f32>::ones((1, 3)))?;
    assert!(after.iter().all(|&x| x == 6.0));
    Ok(format!("{tensor}; {layer}; then {} values", after.len()))
}

fn larger_than_the_device(_: &CudaDevice) -> Outcome {
    let report = std::env::temp_dir().join(format!("pointwise-slices-{}", std::process::id()));
    let path = report.to_string_lossy().into_owned();
    // 72 MiB of src in slices of 16 MiB, and with less memory in smaller ones.
    for (memory, slices) in [("64M", 5), ("8M", 30)] {
        let _ = std::fs::remove_file(&report);
        let variables = [
            ("PW_EMULATOR_MEMORY", memory),
            ("PW_EMULATOR_CHECKS", "0"),
            ("PW_EMULATOR_REPORT", &path),
        ];
        expect("larger", &variables, &["right"])?;
        let launches = std::fs::read_to_string(&report)?.lines().count();
        assert!((slices..slices * 2).contains(&launches), "{memory}: {launches} launches");
    }
    Ok(std::fs::remove_file(&report)?)
}

fn larger() -> Result<String, Error> {
    let (c_in, positions) = (64, 72 << 12);
    let mut weight = Array2::zeros((2, c_in));
    (weight[[0, 3]], weight[[1, 60]]) = (1.0, 2.0);
    let layer = Pointwise::new(weight).relu().prepare(&Device::cuda(0)?)?;
    // One map, channels first: the position in the fourth channel, and minus it further down.
    let mut src = Array3::<f32>::zeros((1, c_in, positions));
    for position in 0..positions {
        src[[0, 3, position]] = position as f32;
        src[[0, 60, position]] = -(position as f32) + 7.0;
    }
    let dst = layer.forward(&src)?;
    let right = dst.indexed_iter().all(|((_, c, position), &value)| {
        let expected = if c == 0 { position as f32 } else { 14.0 - 2.0 * position as f32 };
        value == expected.max(0.0)
    });
    Ok(if right { "right".into() } else { "wrong".into() })
}

fn no_room(_: &CudaDevice) -> Outcome {
    let parts = ["no 2080 bytes for the smallest slice", "then right", "and right again"];
    expect("no room", &[("PW_EMULATOR_MEMORY", "1M")], &parts)
}

fn fill_up() -> Result<String, Error> {
    let gpu = CudaDevice::open(0)?;
    // Sums that depend on nothing else need no memory of their own either.
    let options = PrepareOptions { batch_invariant: true, ..Default::default() };
    let layer = Pointwise::new(Array2::ones((200, 300)));
    let layer = layer.prepare_with(&gpu.clone().into(), options)?;
    let src = Array3::<f32>::ones((1, 300, 40));
    let forward = || {
        let dst = layer.forward(&src)?;
        Ok::<_, Error>(if dst.iter().all(|&x| x == 300.0) { "right" } else { "wrong" })
    };
    let mut tensors = Vec::new();
    for size in [1 << 18, 1 << 14, 1 << 10, 1 << 7] {
        while let Ok(tensor) = CudaTensor::<f32>::zeros(&gpu, &[1, size]) {
            tensors.push(tensor);
        }
    }
    let error = forward().unwrap_err();
    // Room for a few positions, then for all.
    tensors.truncate(tensors.len() - 14);
    gpu.synchronize()?;
    let few = forward()?;
    drop(tensors);
    gpu.synchronize()?;
    gpu.trim();
    Ok(format!("{error}; then {few} and {} again", forward()?))
}

fn lost(_: &CudaDevice) -> Outcome {
    for (what, code) in [
        ("fault", "CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
        ("failed launch", "CUDA_ERROR_LAUNCH_FAILED (719)"),
    ] {
        let parts = [
            &format!("first: cuStreamSynchronize failed: {code}"),
            "forward: cuda:0 (",
            &format!("is lost to this process since cuStreamSynchronize failed: {code}"),
            "others: []",
            "cpu: right",
            "second: right",
        ];
        expect(what, &[("PW_EMULATOR_DEVICES", "2")], &parts)?;
    }
    Ok(())
}

/// A fault that ends the context: an access to nothing, or a read of what nobody has written.
fn fault(code: u32) -> Result<String, Error> {
    let gpu = CudaDevice::open(0)?;
    let device = Device::from(gpu.clone());
    let second = CudaDevice::open(1)?;
    let layer = Pointwise::new(Array2::from_elem((2, 3), 2.0f32)).relu();
    let src = Array3::<f32>::ones((1, 3, 40));
    let right = |dst: Array3<f32>| if dst.iter().all(|&x| x == 6.0) { "right" } else { "wrong" };
    let on_first = layer.prepare(&device)?;
    let on_second = layer.prepare(&second.clone().into())?;
    on_first.forward(&src)?;
    let theirs = CudaTensor::from_host(&gpu, src.view())?;
    let wide = Pointwise::new(Array2::from_elem((3, 2), 1.0f32)).prepare(&device)?;
    let sequence = Sequence::new(vec![on_first.clone(), wide])?;
    let branches = Branches::new(vec![on_first.clone(), on_first.clone()])?;
    let quantized = Quantized::new(Array2::ones((2, 3)), vec![1.0; 2], Quantization::u8(1.0, 0));
    let quantized = quantized.dst(Quantization::u8(1.0, 0)).prepare(&device)?;
    let bytes = Array3::<u8>::ones((1, 3, 40));
    let their_bytes = CudaTensor::from_host(&gpu, bytes.view())?;
    let mut to_bytes = CudaTensor::<u8>::zeros(&gpu, &[1, 2, 40])?;
    let mut params = Params::new(&layer, &device)?;
    let mut grads = params.grads();
    let (dst, workspace) = params.forward(&src)?;
    let (their_dst, their_workspace) = params.forward(&theirs)?;

    // SAFETY: none; nothing is at the first address, and at the second nothing has been written,
    // which is what the test is about.
    unsafe {
        let place = Place::Cuda(0);
        let unwritten = gpu.stream().alloc::<f32>(120).expect("there is memory");
        if code == 700 {
            let address = std::ptr::without_provenance_mut::<f32>(0x1000);
            let mut to = TensorMut::from_raw_parts(address, place, &[1, 2, 40], &[80, 40, 1])?;
            on_first.forward_into(&theirs, &mut to)?;
        } else {
            let mut to = CudaTensor::zeros(&gpu, &[1, 2, 40])?;
            let (address, _used) = unwritten.device_ptr(gpu.stream());
            let address = std::ptr::without_provenance::<f32>(address as usize);
            let from = TensorRef::from_raw_parts(address, place, &[1, 3, 40], &[120, 40, 1])?;
            on_first.forward_into(&from, &mut to)?;
        }
    }
    let first = gpu.synchronize().unwrap_err();
    let mut to = Array3::zeros((1, 2, 40));
    let forward = on_first.forward(&src).unwrap_err();
    let set = Accumulate::Set;
    let later = [
        ("synchronize", gpu.synchronize().err()),
        ("forward_into", on_first.forward_into(&src, &mut to).err()),
        ("forward", on_first.forward(&theirs).err()),
        ("to_host", theirs.to_host().err()),
        ("zeros", CudaTensor::<f32>::zeros(&gpu, &[1, 2]).err()),
        ("prepare", layer.prepare(&device).err()),
        ("open", CudaDevice::open(0).err()),
        ("sequence", sequence.forward(&src).err()),
        ("sequence on the device", sequence.forward(&theirs).err()),
        ("branches", branches.forward(&src).err()),
        ("branches on the device", branches.forward(&theirs).err()),
        ("int8", quantized.call(&bytes).run::<u8>().err()),
        ("int8 on the device", quantized.call(&their_bytes).run_into(&mut to_bytes).err()),
        ("backward", params.backward(&src, workspace, &dst, &mut grads, set).err()),
        (
            "backward on the device",
            params.backward(&theirs, their_workspace, &their_dst, &mut grads, set).err(),
        ),
        ("train", params.forward(&src).err()),
        ("train on the device", params.forward(&theirs).err()),
        ("prepare of trained", params.prepare().err()),
        ("update", on_first.update(&params).err()),
    ];
    let says = |error: &Option<Error>| matches!(error, Some(Error::DeviceLost { code: c, .. }) if *c == code);
    let others: Vec<_> = later.iter().filter(|(_, error)| !says(error)).collect();
    let cpu = right(layer.prepare(&Device::best())?.forward(&src)?);
    let second = right(on_second.forward(&src)?);
    gpu.trim();
    Ok(format!(
        "first: {first}; forward: {forward}; others: {others:?}; cpu: {cpu}; second: {second}"
    ))
}

fn foreign_streams(_: &CudaDevice) -> Outcome {
    let parts = ["other: cuda:0 does not support a stream of a context", "gone: cuStreamGetCtx"];
    expect("foreign", &[("PW_EMULATOR_DEVICES", "2")], &parts)?;
    expect("foreign", &[("PW_EMULATOR_DEVICES", "2")], &["then right"])
}

fn foreign() -> Result<String, Error> {
    let failed = |error: result::DriverError| Error::Checkpoint(format!("{:?}", error.0));
    let context = CudaContext::new(1).map_err(failed)?;
    let other = context.new_stream().map_err(failed)?;
    let gone = CudaDevice::open(0)?.with_new_stream()?.stream().cu_stream();
    // SAFETY: both are refused before they are used.
    let (other, gone) = unsafe {
        (
            CudaDevice::from_raw_stream(0, other.cu_stream()).unwrap_err(),
            CudaDevice::from_raw_stream(0, gone).unwrap_err(),
        )
    };
    let layer = Pointwise::new(Array2::from_elem((2, 3), 2.0f32)).prepare(&Device::cuda(0)?)?;
    let after = layer.forward(&Array2::<f32>::ones((4, 3)))?;
    let after = if after.iter().all(|&x| x == 6.0) { "right" } else { "wrong" };
    Ok(format!("other: {other}; gone: {gone}; then {after}"))
}
