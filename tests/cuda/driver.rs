//! Machines on which something is missing, each in a process of its own.

use std::process::{Command, ExitCode};

use ndarray::{Array2, Array3};
use pointwise::{CudaDevice, CudaTensor, Device, Error, Layout, Pointwise};

use super::{OnDevice, Outcome, far, faults, planted, streams, traffic};

/// Set in the processes that these tests start.
pub const CHILD: &str = "POINTWISE_TEST_CHILD";

pub const TRIALS: &[OnDevice] = &[("the_environment_steers_the_choice", environment)];

/// For the stand-in driver, which plays every part; a real one plays none.
pub const STAND_IN_TRIALS: &[OnDevice] = &[
    ("drivers_that_do_not_start_are_errors", broken_drivers),
    ("devices_without_memory_pools_work", no_pools),
    ("two_devices_do_not_mix", two_devices),
    ("strides_beyond_32_bits_reach_their_elements", far_apart),
];

/// What the started processes do: say what they find, on one line.
pub fn child(what: &str) -> ExitCode {
    let layer = Pointwise::new(Array2::from_elem((2, 3), 2.0f32)).relu();
    let src = Array3::<f32>::ones((1, 3, 40));
    let answer = match what {
        "open" => CudaDevice::open(0).map(|device| device.to_string()),
        "open fp8" => planted::open_fp8(),
        "best" => Ok(Device::best().to_string()),
        "forward" => layer
            .prepare(&Device::best())
            .and_then(|layer| layer.forward(&src))
            .map(|dst| if dst.iter().all(|&x| x == 6.0) { "right".into() } else { "wrong".into() }),
        "two" => CudaDevice::open(1).and_then(|second| {
            let first = CudaDevice::open(0)?;
            let on_second = layer.prepare(&second.clone().into())?;
            let theirs = CudaTensor::from_host(&second, src.view())?;
            let result = on_second.forward(&theirs)?.to_host()?;
            let ours = CudaTensor::from_host(&first, src.view())?;
            let mixed = on_second.forward(&ours).unwrap_err();
            let moved = on_second.on(&first).unwrap_err();
            Ok(format!("{}; {mixed}; {moved}", result.iter().all(|&x| x == 6.0)))
        }),
        "current" => current_contexts(&layer, &src),
        "far" => CudaDevice::open(0).and_then(|device| far::far_apart(&device)),
        "counted kernels" | "counted layers" | "counted groups" => {
            CudaDevice::open(0).and_then(|device| traffic::child(what, &device))
        }
        "refused in captures" => {
            CudaDevice::open(0).and_then(|device| streams::refused_in_captures(&device))
        }
        "planted" => CudaDevice::open(0).and_then(|device| planted::child(&device)),
        other => faults::child(other),
    };
    match answer {
        Ok(text) => println!("{text}"),
        Err(error) => println!("error: {error}"),
    }
    ExitCode::SUCCESS
}

/// What a thread's current context is after every kind of call on device 0.
fn current_contexts(layer: &Pointwise, src: &Array3<f32>) -> Result<String, Error> {
    use pointwise::cudarc::driver::{CudaContext, result::ctx};

    CudaDevice::open(1)?;
    let now = || ctx::get_current().expect("the driver has started").map(|context| context.addr());
    let steps = || -> Result<Vec<&'static str>, Error> {
        let before = now();
        let mut changed = Vec::new();
        let mut check = |what| {
            if now() != before {
                changed.push(what);
            }
        };
        let first = CudaDevice::open(0)?;
        check("open");
        let own = first.with_new_stream()?;
        check("with_new_stream");
        let prepared = layer.prepare(&first.clone().into())?;
        check("prepare");
        let theirs = CudaTensor::from_host(&own, src.view())?;
        check("from_host");
        let result = prepared.forward(&theirs)?;
        check("forward");
        result.to_host()?;
        check("to_host");
        prepared.forward(src)?;
        check("forward of a host array");
        prepared.tune(&[(src.shape(), Layout::ChannelsFirst)])?;
        check("tune");
        own.synchronize()?;
        check("synchronize");
        drop((theirs, result));
        check("drop of tensors");
        drop(prepared);
        check("drop of a layer");
        drop(own);
        check("drop of a stream");
        Ok(changed)
    };
    let none = steps()?;
    let second = CudaContext::new(1).expect("there are two devices");
    let bound = now();
    let other = steps()?;
    drop(second);
    Ok(format!("without: {none:?}, with: {other:?}, bound: {}", bound.is_some()))
}

/// One line from a process with other variables, and what it has logged; a panic or a crash fails the
/// test.
pub fn ask(what: &str, variables: &[(&str, &str)]) -> Result<(String, String), String> {
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new(exe);
    command.env_remove("POINTWISE_DEVICE").env_remove("POINTWISE_KERNEL");
    command.env(CHILD, what).envs(variables.iter().copied());
    let output = command.output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        return Err(format!("{what} {variables:?}: {}: {log}", output.status));
    }
    Ok((text, log))
}

/// Parts of what a process says.
pub fn expect(what: &str, variables: &[(&str, &str)], parts: &[&str]) -> Outcome {
    let (text, _) = ask(what, variables)?;
    match parts.iter().find(|part| !text.contains(**part)) {
        Some(part) => Err(format!("{what} {variables:?}: no {part:?} in: {text}").into()),
        None => Ok(()),
    }
}

pub fn is_stand_in(device: &CudaDevice) -> bool {
    device.name().contains("emulator")
}

/// Runs with whatever this machine has, which may be nothing.
pub fn no_driver() -> Outcome {
    match CudaDevice::open(0) {
        Ok(_) => expect("forward", &[("POINTWISE_DEVICE", "cpu")], &["right"]),
        Err(Error::NoDevice { reason, .. }) if !reason.is_empty() => {
            expect("best", &[], &["cpu"])?;
            expect("best", &[("POINTWISE_DEVICE", "cuda")], &["cpu"])?;
            expect("forward", &[], &["right"])
        }
        Err(error) => Err(format!("not NoDevice with a reason: {error}").into()),
    }
}

fn broken_drivers(_: &CudaDevice) -> Outcome {
    for (code, name) in
        [("34", "stub"), ("100", "CUDA_ERROR_NO_DEVICE"), ("803", "MISMATCH"), ("7777", "7777")]
    {
        let variables = [("PW_EMULATOR_INIT", code)];
        expect("open", &variables, &["error: no device cuda:0", name])?;
        expect("forward", &variables, &["right"])?;
    }
    expect(
        "open",
        &[("PW_EMULATOR_DEVICES", "0")],
        &["error: no device cuda:0", "CUDA_ERROR_NO_DEVICE"],
    )?;
    let old_chip = [("PW_EMULATOR_ARCH", "sm_70")];
    expect("open", &old_chip, &["error: no device cuda:0", "7.0", "7.5"])?;
    let old_driver = [("PW_EMULATOR_DRIVER", "11040")];
    expect("open", &old_driver, &["error: no device cuda:0", "CUDA 11.4", "built by nvcc"])?;
    expect("forward", &old_driver, &["right"])
}

fn no_pools(_: &CudaDevice) -> Outcome {
    let without = ("PW_EMULATOR_POOLS", "0");
    expect("forward", &[without, ("POINTWISE_DEVICE", "cuda")], &["right"])?;
    expect("refused in captures", &[without], &["refused, and captured"])
}

fn two_devices(_: &CudaDevice) -> Outcome {
    let parts = ["true", "src is on cuda:0, expected on cuda:1", "weight is on cuda:1"];
    expect("two", &[("PW_EMULATOR_DEVICES", "2")], &parts)?;
    let parts = ["without: [], with: [], bound: true"];
    expect("current", &[("PW_EMULATOR_DEVICES", "2")], &parts)
}

fn far_apart(_: &CudaDevice) -> Outcome {
    expect("far", &[("PW_EMULATOR_GAP", "16G")], &["right, at least 2^32 elements apart"])
}

fn environment(device: &CudaDevice) -> Outcome {
    let name = format!("cuda:0 ({})", device.name());
    expect("best", &[], &[&name])?;
    expect("best", &[("POINTWISE_DEVICE", "cuda:0")], &[&name])?;
    expect("best", &[("POINTWISE_DEVICE", "cpu")], &["cpu ("])?;
    expect("best", &[("POINTWISE_DEVICE", "cuda:99")], &["cpu ("])?;
    expect("forward", &[("POINTWISE_DEVICE", "tpu")], &["error: POINTWISE_DEVICE=tpu"])
}
