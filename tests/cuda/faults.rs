//! What goes wrong on a device: memory that runs out, streams that are not the device's, faults
//! that end a context. Each in a process of its own.

use ndarray::{Array2, Array3};
use pointwise::cudarc::driver::{CudaContext, result};
use pointwise::{
    CudaDevice, CudaTensor, Device, Error, Place, Pointwise, PrepareOptions, TensorMut,
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
        "fault" => fault(),
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
    let parts = [
        "first: cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)",
        "forward: cuda:0 (",
        "is lost to this process since cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)",
        "6 of 6 say so",
        "cpu: right",
        "second: right",
    ];
    expect("fault", &[("PW_EMULATOR_DEVICES", "2")], &parts)
}

fn fault() -> Result<String, Error> {
    let gpu = CudaDevice::open(0)?;
    let second = CudaDevice::open(1)?;
    let layer = Pointwise::new(Array2::from_elem((2, 3), 2.0f32)).relu();
    let src = Array3::<f32>::ones((1, 3, 40));
    let right = |dst: Array3<f32>| if dst.iter().all(|&x| x == 6.0) { "right" } else { "wrong" };
    let on_first = layer.prepare(&gpu.clone().into())?;
    let on_second = layer.prepare(&second.clone().into())?;
    on_first.forward(&src)?;
    let theirs = CudaTensor::from_host(&gpu, src.view())?;
    // SAFETY: none; nothing is at this address, which is what the test is about.
    let mut nowhere = unsafe {
        let address = std::ptr::without_provenance_mut::<f32>(0x1000);
        TensorMut::from_raw_parts(address, Place::Cuda(0), &[1, 2, 40], &[80, 40, 1])?
    };
    on_first.forward_into(&theirs, &mut nowhere)?;
    let first = gpu.synchronize().unwrap_err();
    let mut dst = Array3::zeros((1, 2, 40));
    let forward = on_first.forward(&src).unwrap_err();
    let later = [
        gpu.synchronize().unwrap_err(),
        on_first.forward_into(&src, &mut dst).unwrap_err(),
        theirs.to_host().unwrap_err(),
        CudaTensor::<f32>::zeros(&gpu, &[1, 2]).unwrap_err(),
        layer.prepare(&gpu.clone().into()).unwrap_err(),
        CudaDevice::open(0).unwrap_err(),
    ];
    let lost = later.iter().filter(|error| matches!(error, Error::DeviceLost { code: 700, .. }));
    let lost = lost.count();
    let cpu = right(layer.prepare(&Device::best())?.forward(&src)?);
    let second = right(on_second.forward(&src)?);
    gpu.trim();
    drop((theirs, on_first, gpu));
    Ok(format!(
        "first: {first}; forward: {forward}; {lost} of {} say so; cpu: {cpu}; second: {second}",
        later.len()
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
