//! A tuning chooses among the kernels that the planner may choose, and nothing else.

use ndarray::Array4;
use pointwise::cudarc::driver::sys;
use pointwise::{
    CudaDevice, CudaTensor, Device, DeviceElement, Element, Error, Layout, Pointwise,
    PrepareOptions, Prepared, Tuning, bf16,
};

use super::cases::force;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("a_tuning_says_which_kernel_runs", chooses),
    ("a_batch_invariant_layer_keeps_its_bits_with_any_tuning", same_bits),
    ("a_tuning_of_something_else_is_passed_over", passed_over),
    ("a_captured_stream_is_not_tuned", captured),
];

const C_IN: usize = 72;
const SHAPE: [usize; 4] = [2, C_IN, 3, 5];
const LAYOUTS: [Layout; 2] = [Layout::ChannelsFirst, Layout::ChannelsLast];

/// Small integers, so that every sum is exact in any order.
fn layer() -> Pointwise {
    let weight = |(row, k): (usize, usize)| ((row * 7 + k * 3) % 5) as f32 - 2.0;
    Pointwise::new(ndarray::Array2::from_shape_fn((24, C_IN), weight)).residual().relu()
}

fn value(seed: usize) -> impl Fn((usize, usize, usize, usize)) -> f32 {
    move |(n, c, y, x)| ((n * 3 + c * 5 + y * 7 + x * 11 + seed) % 4) as f32 - 1.0
}

/// What a layer makes of integers, or of multiples of something else, in a memory order.
fn run<T: Element + DeviceElement>(
    device: &CudaDevice,
    layer: &Prepared<T>,
    layout: Layout,
    unit: f32,
) -> Result<Vec<f32>, Error> {
    let [n, _, h, w] = SHAPE;
    let tensor = |seed: usize, c: usize| {
        let at = |index| unit * value(seed)(index);
        let array = match layout {
            Layout::ChannelsFirst => Array4::from_shape_fn((n, c, h, w), at),
            Layout::ChannelsLast => {
                Array4::from_shape_fn((n, h, w, c), |(n, y, x, c)| at((n, c, y, x)))
                    .permuted_axes([0, 3, 1, 2])
            }
        };
        CudaTensor::from_host(device, array.map(|&x| T::from_f32(x)).view())
    };
    let (src, residual) = (tensor(0, C_IN)?, tensor(1, 24)?);
    let dst = layer.call(&src).residual(&residual).run()?;
    Ok(dst.to_host()?.iter().map(|x| x.to_f32()).collect())
}

/// A tuning with a column of its one entry replaced.
fn replaced(tuning: &Tuning, column: usize, value: &str) -> Result<Tuning, Error> {
    let text = tuning.to_string();
    let line = text.lines().nth(1).unwrap_or_default();
    let mut columns: Vec<_> = line.split('\t').collect();
    columns[column] = value;
    columns.join("\t").parse()
}
const DEVICE: usize = 0;
const PROBLEM: usize = 1;
const KERNEL: usize = 2;
const ORDER: usize = 3;

fn is_tuned<T: Element>(layer: &Prepared<T>, layout: Layout) -> Result<bool, Error> {
    Ok(layer.explain_in(&SHAPE, layout)?.reason.ends_with("; tuned"))
}

fn chooses(device: &CudaDevice) -> Outcome {
    every_choice::<f32>(device)?;
    every_choice::<bf16>(device)
}

fn every_choice<T: Element + DeviceElement>(device: &CudaDevice) -> Outcome {
    let layer = layer().prepare_as::<T>(&device.clone().into(), PrepareOptions::default())?;
    for layout in LAYOUTS {
        let expected = run(device, &layer, layout, 1.0)?;
        assert!(expected.iter().any(|&x| x > 0.0));
        let tuning = layer.tune(&[(&SHAPE, layout), (&[0, C_IN, 3, 5], layout)])?;
        assert_eq!(tuning.len(), 1);
        assert!(is_tuned(&layer.with_tuning(&tuning), layout)?, "{tuning}");
        let mut shared = 0;
        for candidate in layer.plans_in(&SHAPE, layout)? {
            for splits in 1..=3 {
                let choice = replaced(&tuning, KERNEL, candidate.kernel)?;
                let choice = replaced(&choice, ORDER, &format!("splits={splits}"))?;
                let tuned = layer.with_tuning(&choice);
                let explanation = tuned.explain_in(&SHAPE, layout)?;
                // What refuses the layer, or has not so many slabs, is passed over.
                if explanation.reason.ends_with("; tuned") {
                    assert!(candidate.verdict.is_ok(), "{explanation}");
                    assert_eq!(explanation.kernel, candidate.kernel);
                    assert_eq!(tuned.plans_in(&SHAPE, layout)?[0].kernel, candidate.kernel);
                    shared += usize::from(splits > 1);
                } else {
                    assert!(candidate.verdict.is_err() || splits > 1, "{}", candidate.kernel);
                }
                assert!(run(device, &tuned, layout, 1.0)? == expected, "{explanation}");
            }
        }
        assert!(shared > 0, "{tuning}");
    }
    Ok(())
}

fn same_bits(device: &CudaDevice) -> Outcome {
    invariant::<f32>(device)?;
    invariant::<bf16>(device)
}

fn invariant<T: Element + DeviceElement>(device: &CudaDevice) -> Outcome {
    // Sums of which every order rounds in its own way.
    let weight = |(row, k): (usize, usize)| ((row * 31 + k * 17) % 23) as f32 / 7.0 - 1.5;
    let weight = ndarray::Array2::from_shape_fn((24, C_IN), weight);
    let options = PrepareOptions { batch_invariant: true, ..PrepareOptions::default() };
    let layer =
        Pointwise::new(weight).residual().prepare_as::<T>(&device.clone().into(), options)?;
    let layout = Layout::ChannelsLast;
    let expected = run(device, &layer, layout, 0.3)?;
    let tuning = layer.tune(&[(&SHAPE, layout)])?;
    assert!(tuning.to_string().contains("splits=1"), "{tuning}");
    let mut tuned = 0;
    for candidate in layer.plans_in(&SHAPE, layout)? {
        let layer = layer.with_tuning(&replaced(&tuning, KERNEL, candidate.kernel)?);
        tuned += usize::from(is_tuned(&layer, layout)?);
        assert!(run(device, &layer, layout, 0.3)? == expected, "{}", candidate.kernel);
    }
    assert!(tuned > 1, "{tuning}");
    Ok(())
}

fn passed_over(device: &CudaDevice) -> Outcome {
    let on = Device::from(device.clone());
    let (description, layout) = (layer(), Layout::ChannelsFirst);
    let layer = description.prepare(&on)?;
    let tuning = layer.tune(&[(&SHAPE, layout)])?;
    let tuned = layer.with_tuning(&tuning);
    assert!(is_tuned(&tuned, layout)?);
    assert!(!is_tuned(&tuned, Layout::ChannelsLast)?);
    assert!(!is_tuned(&tuned.with_tuning(&Tuning::default()), layout)?);
    assert!(!is_tuned(&layer, layout)?);
    for (column, value) in [
        (DEVICE, "cuda another sm_90 multiprocessors=1"),
        (PROBLEM, "groups=1"),
        (KERNEL, "fprop_f32_simt_1x1x1_nchw"),
        (ORDER, "splits=77"),
        (ORDER, "channels_outer"),
    ] {
        let other = replaced(&tuning, column, value)?;
        assert!(!is_tuned(&layer.with_tuning(&other), layout)?, "{value}");
    }
    let halves = description.prepare_as::<bf16>(&on, PrepareOptions::default())?;
    assert!(!is_tuned(&halves.with_tuning(&tuning), layout)?);
    // A handle on another stream keeps it; a forced kernel goes first.
    assert!(is_tuned(&tuned.on(&device.with_new_stream()?)?, layout)?);
    let plans = layer.plans_in(&SHAPE, layout)?;
    let kernel = plans.iter().rfind(|candidate| candidate.verdict.is_ok()).unwrap().kernel;
    assert_ne!(kernel, plans[0].kernel);
    let forced = description.prepare_with(&on, force(kernel))?.with_tuning(&tuning);
    assert_eq!(forced.explain_in(&SHAPE, layout)?.kernel, kernel);
    assert!(!is_tuned(&forced, layout)?);
    Ok(())
}

fn captured(device: &CudaDevice) -> Outcome {
    let device = device.with_new_stream()?;
    let layer = layer().prepare(&device.clone().into())?;
    let stream = device.stream();
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(code)?;
    let refused = layer.tune(&[(&SHAPE, Layout::ChannelsFirst)]);
    let flags = sys::CUgraphInstantiate_flags(0);
    drop(stream.end_capture(flags).map_err(code)?);
    match refused {
        Err(Error::Unsupported { what, .. }) => assert!(what.contains("captured"), "{what}"),
        other => return Err(format!("{other:?}").into()),
    }
    assert_eq!(layer.tune(&[(&SHAPE, Layout::ChannelsFirst)])?.len(), 1);
    Ok(())
}
