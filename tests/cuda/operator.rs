//! The whole operator: source stages, gates, concatenations, partial convolutions, layer norms. Exact
//! on integers for every kernel, against PyTorch's results, and the same bits however a call is cut.

use std::ops::Range;

use ndarray::{Array2, Array3, Array5, ArrayD, Axis};
use pointwise::cudarc::driver::sys;
use pointwise::{
    Activation, BatchNorm, CudaDevice, CudaTensor, DType, Device, Element, Error, LayerNorm, Math,
    Pointwise, PrepareOptions, Prepared, Sequence, SourceStage, Stage, TensorRef, bf16, f16,
    reference,
};

use super::cases::{
    Case, LAYOUTS, Layout, Placed, Value, close, force, kernels, kernels_of, rounded, same_bits,
};
use super::fixtures::{Case as Fixture, Fixtures, channels_last, difference};
use super::numbers::Random;
use super::tensor_cores;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("integers_are_exact_in_every_operator_and_kernel", integers::<f32>),
    ("integers_are_exact_in_every_operator_and_kernel_of_f16", integers::<f16>),
    ("integers_are_exact_in_every_operator_and_kernel_of_bf16", integers::<bf16>),
    ("layers_of_pytorch_on_device_tensors", fixtures_on_device),
    ("layers_of_pytorch_on_host_tensors_in_slices", fixtures_in_slices),
    ("every_activation_of_src", source_activations),
    ("more_sources_than_a_launch_takes", many_sources),
    ("layer_norms_have_the_same_bits_in_every_layout_and_slice", norms),
    ("layer_norms_are_stable_and_keep_special_values", norm_values),
    ("calls_of_several_launches_are_captured", graphs),
    ("sequences_of_partial_and_normalised_layers", sequences),
    ("calls_of_the_whole_operator_allocate_as_little", allocations),
    ("plans_and_explain_know_the_operator", plans),
    ("calls_take_scratch_of_the_caller_s", given_scratch),
];

/// Stages around a convolution with this many channels in and out.
type Stages = fn(Pointwise, &mut Random, usize, usize) -> Pointwise;

struct Operator {
    /// Its channels in are those that are convolved.
    case: Case,
    /// Of each source.
    channels: &'static [usize],
    partial: Option<Range<usize>>,
    stages: Stages,
}

/// The tensors of one call.
struct Inputs {
    sources: Vec<Array5<f32>>,
    residual: Array5<f32>,
    gate: Array5<f32>,
}

impl Operator {
    fn layer(&self, random: &mut Random) -> Pointwise {
        let case = &self.case;
        let layer = case.layer(random.integers(case.c_out * case.c_in / case.groups));
        let layer = (self.stages)(layer, random, case.c_in, case.c_out);
        match &self.partial {
            Some(range) => layer.partial(range.clone()),
            None => layer,
        }
    }

    fn dst_shape(&self) -> [usize; 5] {
        let [n, _, d, h, w] = self.case.dst_shape();
        let all: usize = self.channels.iter().sum();
        [n, all - self.case.c_in + self.case.c_out, d, h, w]
    }

    fn inputs(&self, mut value: impl FnMut() -> f32) -> Inputs {
        let [n, _, d, h, w] = self.case.src_shape();
        let mut tensor = |shape: [usize; 5]| Array5::from_shape_simple_fn(shape, &mut value);
        Inputs {
            sources: self.channels.iter().map(|&c| tensor([n, c, d, h, w])).collect(),
            residual: tensor(self.dst_shape()),
            gate: tensor([n, self.case.c_in, 1, 1, 1]),
        }
    }
}

/// Whether a layer takes a residual, and a gate.
fn takes(layer: &Pointwise) -> (bool, bool) {
    (layer.stages().contains(&Stage::Residual), layer.source_stages().contains(&SourceStage::Gate))
}

fn on_cpu(layer: &Pointwise, inputs: &Inputs) -> Result<Array5<f32>, Error> {
    on_host(&layer.prepare(&Device::cpu())?, layer, inputs)
}

/// Runs a call on tensors that lie as the layouts say: sources in turn, the rest by the last.
fn on_device<T: Value>(
    device: &CudaDevice,
    prepared: &Prepared<T>,
    (residual, gate): (bool, bool),
    inputs: &Inputs,
    dst_shape: [usize; 5],
    layouts: &[Layout],
) -> Result<Array5<f32>, Error> {
    let last = *layouts.last().unwrap();
    let placed = inputs.sources.iter().zip(layouts.iter().cycle());
    let placed: Vec<Placed<T>> =
        placed.map(|(source, &layout)| Placed::filled(device, source.view(), layout)).collect();
    let beside = Placed::<T>::filled(device, inputs.residual.view(), last);
    let gates = Placed::<T>::filled(device, inputs.gate.view(), last);
    let mut dst = Placed::<T>::blank(device, dst_shape, last);
    let views: Vec<TensorRef<'_, T>> = placed.iter().map(Placed::view).collect();
    let (beside, gates) = (beside.view(), gates.view());
    let mut call = prepared.call(&views[0]);
    for view in &views[1..] {
        call = call.concat(view);
    }
    if residual {
        call = call.residual(&beside);
    }
    if gate {
        call = call.gate(&gates);
    }
    call.run_into(&mut dst.view_mut())?;
    Ok(dst.read())
}

fn halves(random: &mut Random, len: usize) -> Vec<f32> {
    random.integers(len).iter().map(|x| (x / 2.0).trunc()).collect()
}

type Build = fn() -> Operator;

/// Small integers everywhere, so that all sums are exact.
const OPERATORS: &[(&str, Build)] = &[
    ("concat of aligned sources", || Operator {
        case: Case::new(2, 48, 36, [1, 4, 8]),
        channels: &[16, 32],
        partial: None,
        stages: |layer, random, _, c_out| layer.bias(random.integers(c_out)).relu(),
    }),
    ("concat of any sources", || Operator {
        case: Case::new(2, 41, 33, [1, 5, 7]),
        channels: &[3, 17, 1, 20],
        partial: None,
        stages: |layer, random, _, c_out| layer.bias(random.integers(c_out)).residual(),
    }),
    ("concat across groups", || Operator {
        case: Case { groups: 3, ..Case::new(2, 3 * 12, 3 * 8, [1, 3, 5]) },
        channels: &[20, 8, 8],
        partial: None,
        stages: |layer, _, _, _| layer.relu(),
    }),
    ("partial, strided", || Operator {
        case: Case { stride: 2, ..Case::new(2, 16, 24, [1, 9, 6]) },
        channels: &[40],
        partial: Some(5..21),
        stages: |layer, random, _, c_out| layer.bias(random.integers(c_out)).residual().relu(),
    }),
    ("partial concat with everything passing", || Operator {
        case: Case { groups: 2, stride: 2, ..Case::new(1, 24, 20, [2, 3, 7]) },
        channels: &[9, 31, 4, 70],
        partial: Some(7..31),
        stages: |layer, random, c_in, _| {
            let (scale, shift) = (halves(random, c_in), halves(random, c_in));
            layer.source_affine(scale, shift).source_activation(Activation::Relu)
        },
    }),
    ("bn, relu", || Operator {
        case: Case::new(2, 40, 36, [1, 6, 6]),
        channels: &[40],
        partial: None,
        stages: |layer, random, c_in, c_out| {
            let (scale, shift) = (halves(random, c_in), halves(random, c_in));
            layer
                .source_affine(scale, shift)
                .source_activation(Activation::Relu)
                .bias(random.integers(c_out))
        },
    }),
    ("gate, groups", || Operator {
        case: Case { groups: 2, ..Case::new(3, 2 * 20, 2 * 34, [1, 3, 11]) },
        channels: &[40],
        partial: None,
        stages: |layer, random, _, c_out| {
            let layer = layer.gate();
            layer.bias(random.integers(c_out)).clip(-90.0, 90.0)
        },
    }),
    ("seven source steps, concat", || Operator {
        case: Case { stride: 2, ..Case::new(2, 35, 20, [1, 5, 9]) },
        channels: &[4, 31],
        partial: None,
        stages: |layer, random, c_in, _| {
            let mut vector = || halves(random, c_in);
            let clip = |lo, hi| SourceStage::Activation(Activation::Clip { lo, hi });
            let layer = layer.source_affine(vector(), vector()).source_stage(clip(-5.0, 7.0));
            let layer = layer.gate().source_activation(Activation::Relu);
            let layer = layer.source_stage(clip(1.0, 6.0));
            layer.source_stage(SourceStage::Activation(Activation::LeakyRelu { alpha: 0.5 }))
        },
    }),
];

fn integers<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(61);
    let mut all: Vec<(&str, Math)> =
        kernels_of::<T>(device).iter().map(|&k| (k, Math::F32)).collect();
    if T::DTYPE == DType::F32 {
        all.extend(tensor_cores::all(device));
    }
    for (i, (name, operator)) in OPERATORS.iter().enumerate() {
        let operator = operator();
        let layer = operator.layer(&mut random);
        let inputs = operator.inputs(|| random.integer());
        let expected = rounded::<T>(&on_cpu(&layer, &inputs)?);
        for (j, &(kernel, math)) in all.iter().enumerate() {
            let splits = ["", "/2", "/3"][(i + j) % 3];
            let kernel = Some(format!("{kernel}{splits}"));
            let options = PrepareOptions { math, kernel, ..PrepareOptions::default() };
            let prepared = layer.prepare_as::<T>(&device.clone().into(), options)?;
            let (a, b) = (LAYOUTS[(i + j) % 8], LAYOUTS[(i + 3 * j + 1) % 8]);
            for layouts in [&[Layout::First][..], &[Layout::Last], &[a, Layout::Last, b]] {
                let shape = operator.dst_shape();
                let got = on_device(device, &prepared, takes(&layer), &inputs, shape, layouts)?;
                let what = format!("{name}, {:?}{splits}, {layouts:?}", all[j].0);
                same_bits(&got, &expected, &what)?;
            }
        }
        // Host tensors, whole and in slices.
        for slice_bytes in [None, Some(0), Some(3000)] {
            let options = PrepareOptions { slice_bytes, ..PrepareOptions::default() };
            let prepared = layer.prepare_as::<T>(&device.clone().into(), options)?;
            let got = on_host(&prepared, &layer, &inputs)?;
            same_bits(&got, &expected, &format!("{name}, in slices of {slice_bytes:?}"))?;
        }
    }
    Ok(())
}

fn on_host<T: Value>(
    prepared: &Prepared<T>,
    layer: &Pointwise,
    inputs: &Inputs,
) -> Result<Array5<f32>, Error> {
    let (takes_residual, takes_gate) = takes(layer);
    let rounded = |values: &Array5<f32>| values.mapv(T::from_f32);
    let sources: Vec<Array5<T>> = inputs.sources.iter().map(rounded).collect();
    let (residual, gate) = (rounded(&inputs.residual), rounded(&inputs.gate));
    let mut call = prepared.call(&sources[0]);
    for source in &sources[1..] {
        call = call.concat(source);
    }
    if takes_residual {
        call = call.residual(&residual);
    }
    if takes_gate {
        call = call.gate(&gate);
    }
    Ok(call.run()?.mapv(Element::to_f32))
}

/// All cases that are layers, and what a result may be off.
fn layers_of_pytorch() -> impl Iterator<Item = (Fixture, f64)> {
    let cases = Fixtures::load().cases_and_embedded().into_iter();
    let cases = cases.filter(|case| case.repeated_stage().is_none() && !case.dst.is_empty());
    cases.map(|case| {
        let tolerance = case.tolerance();
        (case, tolerance)
    })
}

fn compare(case: &Fixture, got: &ArrayD<f32>, tolerance: f64, what: &str) -> Outcome {
    let exact = |index: &[usize]| case.passes_through(index[1]);
    let found = difference(got, &case.dst, |at, _| if exact(at) { 0.0 } else { tolerance });
    match found {
        Some(found) => Err(format!("{}, {what}: {found}", case.name).into()),
        None => Ok(()),
    }
}

fn fixtures_on_device(device: &CudaDevice) -> Outcome {
    // Those that compute in f32.
    let kernels = [kernels(device), tensor_cores::in_parts(device)].concat();
    let mut count = 0;
    for (i, (case, tolerance)) in layers_of_pytorch().enumerate() {
        count += 1;
        let forced = kernels[i % kernels.len()];
        for (last, options) in [(false, PrepareOptions::default()), (true, force(forced))] {
            let order = |t: &ArrayD<f32>| if last { channels_last(t) } else { t.clone() };
            let upload = |t: &ArrayD<f32>| CudaTensor::from_host(device, order(t).view());
            let sources = case.sources.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
            let residual = case.residual().map(upload).transpose()?;
            let gate = case.gate().map(upload).transpose()?;
            let layer = case.layer().prepare_with(&device.clone().into(), options)?;
            let mut call = layer.call(&sources[0]);
            for more in &sources[1..] {
                call = call.concat(more);
            }
            if let Some(residual) = &residual {
                call = call.residual(residual);
            }
            if let Some(gate) = &gate {
                call = call.gate(gate);
            }
            compare(&case, &call.run()?.to_host()?, tolerance, &format!("last {last}"))?;
        }
    }
    assert!(count > 150, "only {count} cases");
    Ok(())
}

fn fixtures_in_slices(device: &CudaDevice) -> Outcome {
    for (i, (case, tolerance)) in layers_of_pytorch().enumerate() {
        let run = |slice_bytes: Option<usize>| -> Result<ArrayD<f32>, Error> {
            let order = |t: &ArrayD<f32>| if i % 2 == 0 { channels_last(t) } else { t.clone() };
            let sources: Vec<_> = case.sources.iter().map(order).collect();
            let (residual, gate) = (case.residual().map(order), case.gate());
            let options = PrepareOptions { slice_bytes, ..PrepareOptions::default() };
            let layer = case.layer().prepare_with(&device.clone().into(), options)?;
            let mut call = layer.call(&sources[0]);
            for more in &sources[1..] {
                call = call.concat(more);
            }
            if let Some(residual) = &residual {
                call = call.residual(residual);
            }
            if let Some(gate) = gate {
                call = call.gate(gate);
            }
            call.run()
        };
        let whole = run(None)?;
        compare(&case, &whole, tolerance, "whole")?;
        let cut = run(Some([0, 2500, 6000][i % 3]))?;
        let bits = |t: &ArrayD<f32>| t.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&cut) == bits(&whole), "{} in slices", case.name);
    }
    Ok(())
}

fn source_activations(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(62);
    let mut all: Vec<(&str, Math)> = kernels(device).iter().map(|&k| (k, Math::F32)).collect();
    all.extend(tensor_cores::all(device).into_iter().filter(|(_, math)| *math == Math::F32));
    for (i, &activation) in super::training::ACTIVATIONS.iter().enumerate() {
        let case = Case::new(2, 21, 20, [1, 3, 7]);
        let layer = case.layer(random.normal(21 * 20)).gate();
        let layer = layer.source_stage(SourceStage::Activation(activation));
        let layer = layer.source_affine(random.normal(21), random.normal(21));
        let layer = layer.source_stage(SourceStage::Activation(Activation::Tanh));
        let inputs = Inputs {
            sources: vec![random.tensor(case.src_shape())],
            residual: Array5::zeros(case.dst_shape()),
            gate: random.tensor([2, 21, 1, 1, 1]),
        };
        let expected = reference::forward(
            &layer,
            &reference::Inputs {
                sources: vec![inputs.sources[0].view().into_dyn()],
                residual: None,
                gate: Some(inputs.gate.view().into_dyn()),
            },
        )?;
        for j in 0..3 {
            let (kernel, math) = all[(3 * i + j) % all.len()];
            let kernel = Some(kernel.to_string());
            let options = PrepareOptions { math, kernel, ..PrepareOptions::default() };
            let prepared = layer.prepare_with(&device.clone().into(), options)?;
            let layout = [LAYOUTS[(i + j) % 8]];
            let shape = case.dst_shape();
            let got = on_device(device, &prepared, (false, true), &inputs, shape, &layout)?;
            close(&got.into_dyn(), &expected, 2e-5, &format!("{activation:?}, {:?}", all[j]))?;
        }
    }
    Ok(())
}

fn many_sources(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(63);
    let channels: Vec<usize> = (0..23).map(|i| 1 + i % 5).collect();
    let c_in: usize = channels.iter().sum();
    for layout in [Layout::First, Layout::Last, Layout::Reversed] {
        let case = Case { stride: 2, ..Case::new(2, c_in, 12, [1, 5, 6]) };
        let layer = case.layer(random.integers(c_in * 12)).source_activation(Activation::Relu);
        let [n, _, d, h, w] = case.src_shape();
        let tensor =
            |&c: &usize| Array5::from_shape_simple_fn([n, c, d, h, w], || random.integer());
        let inputs = Inputs {
            sources: channels.iter().map(tensor).collect(),
            residual: Array5::zeros(case.dst_shape()),
            gate: Array5::zeros([n, c_in, 1, 1, 1]),
        };
        let expected = on_cpu(&layer, &inputs)?;
        let prepared = layer.prepare(&device.clone().into())?;
        let shape = case.dst_shape();
        let got = on_device(device, &prepared, (false, false), &inputs, shape, &[layout])?;
        same_bits(&got, &expected, &format!("{layout:?}"))?;
        same_bits(&on_host(&prepared, &layer, &inputs)?, &expected, "on the host")?;
    }
    Ok(())
}

/// A layer norm between steps.
fn normalised(random: &mut Random, case: &Case, norm: LayerNorm, around: usize) -> Pointwise {
    let c = case.c_out;
    let norm = norm.affine(random.normal(c), random.normal(c)).eps(1e-3);
    let layer = case.layer(random.normal(c * case.c_in / case.groups));
    let biased = |random: &mut Random| layer.clone().bias(random.normal(c));
    match around {
        0 => biased(random).layer_norm(norm),
        1 => biased(random).residual().gelu().layer_norm(norm).prelu(random.normal(c)),
        2 => layer.relu().layer_norm(norm).bias(random.normal(c)).silu().residual().relu(),
        _ => biased(random).layer_norm(norm).residual().channel_shuffle(2),
    }
}

fn norms(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(64);
    let cases = [
        Case::new(2, 10, 36, [1, 4, 9]),
        Case { groups: 3, ..Case::new(3, 21, 66, [2, 3, 5]) },
        Case { stride: 2, ..Case::new(2, 12, 14, [1, 9, 70]) },
        Case::new(4, 17, 1, [1, 1, 3]),
        Case::new(2, 8, 132, [1, 1, 1]),
        Case::new(1, 5, 4, [1, 40, 60]),
    ];
    let kernels = kernels(device);
    for (i, case) in cases.iter().enumerate() {
        for (j, norm) in [LayerNorm::over_channels(), LayerNorm::over_all()].iter().enumerate() {
            let around = if case.c_out % 2 == 0 { i + j } else { 0 } % 4;
            let layer = normalised(&mut random, case, norm.clone(), around);
            let (residual, _) = takes(&layer);
            let inputs = Inputs {
                sources: vec![random.tensor(case.src_shape())],
                residual: random.tensor(case.dst_shape()),
                gate: Array5::zeros([case.n, case.c_in, 1, 1, 1]),
            };
            let expected = reference::forward(
                &layer,
                &reference::Inputs {
                    sources: vec![inputs.sources[0].view().into_dyn()],
                    residual: residual.then(|| inputs.residual.view().into_dyn()),
                    gate: None,
                },
            )?;
            // The sums of a SIMT kernel do not depend on the tile, nor do those of the norm.
            let mut bits = None::<Array5<f32>>;
            let mut same = |got: Array5<f32>, what: &str| -> Outcome {
                let what = format!("{case:?}, {norm:?} {around}, {what}");
                match &bits {
                    Some(bits) => same_bits(&got, bits, &what),
                    None => {
                        close(&got.clone().into_dyn(), &expected, 3e-5, &what)?;
                        bits = Some(got);
                        Ok(())
                    }
                }
            };
            for (k, layout) in LAYOUTS.into_iter().enumerate() {
                let kernel = format!("{}/1", kernels[(i + j + k) % kernels.len()]);
                let prepared = layer.prepare_with(&device.clone().into(), force(&kernel))?;
                let shape = case.dst_shape();
                let takes = (residual, false);
                let got = on_device(device, &prepared, takes, &inputs, shape, &[layout])?;
                same(got, &format!("{layout:?}, {kernel}"))?;
            }
            for slice_bytes in [0, 3000, 20_000, 1 << 24] {
                let kernel = Some(format!("{}/1", kernels[(i + j) % kernels.len()]));
                let slice_bytes = Some(slice_bytes);
                let options = PrepareOptions { kernel, slice_bytes, ..Default::default() };
                let prepared = layer.prepare_with(&device.clone().into(), options)?;
                let got = on_host(&prepared, &layer, &inputs)?;
                same(got, &format!("in slices of {slice_bytes:?}"))?;
            }
        }
    }
    Ok(())
}

fn norm_values(device: &CudaDevice) -> Outcome {
    let (channels, positions) = (70, 1100);
    for norm in [LayerNorm::over_channels(), LayerNorm::over_all()] {
        let over_all = format!("{norm:?}").contains("All");
        let layer = Pointwise::new(Array2::eye(channels)).layer_norm(norm);
        let prepared = layer.prepare(&device.clone().into())?;
        // A mean that is a thousand times the deviation and more.
        let mut src = Array3::from_shape_fn((2, channels, positions), |(n, c, p)| {
            4096.0 + (n + 1) as f32 * ((c * 37 + p * 11) % 16) as f32 / 4.0
        });
        let inputs =
            reference::Inputs { sources: vec![src.view().into_dyn()], ..Default::default() };
        let expected = reference::forward(&layer, &inputs)?;
        close(&prepared.forward(&src)?.into_dyn(), &expected, 2e-6, "a large mean")?;
        // What is no number spoils what shares its moments, and nothing else.
        src[[0, 3, 7]] = f32::NAN;
        src[[1, 69, 1099]] = f32::INFINITY;
        for ((n, _, p), x) in prepared.forward(&src)?.indexed_iter() {
            let spoilt = over_all || (n, p) == (0, 7) || (n, p) == (1, 1099);
            assert_eq!(x.is_nan(), spoilt, "over all {over_all}: {n}, {p}: {x}");
        }
        // Equal values have no deviation.
        let equal = prepared.forward(&Array3::from_elem((1, channels, 33), 1e6f32))?;
        assert!(equal.iter().all(|&x| x == 0.0), "{equal:?}");
    }
    Ok(())
}

fn graphs(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(65);
    let case = Case::new(2, 60, 12, [1, 5, 6]);
    let layer = case
        .layer(random.integers(720))
        .source_activation(Activation::Relu)
        .layer_norm(LayerNorm::over_all());
    let own = device.with_new_stream()?;
    let prepared = layer.prepare(&own.clone().into())?;
    let sources: Vec<CudaTensor> = (0..20)
        .map(|_| CudaTensor::from_host(&own, random.tensor([2, 3, 1, 5, 6]).view()))
        .collect::<Result<_, _>>()?;
    let mut dst = CudaTensor::<f32>::zeros(&own, &case.dst_shape())?;
    let mut direct = CudaTensor::<f32>::zeros(&own, &case.dst_shape())?;
    let call = || sources[1..].iter().fold(prepared.call(&sources[0]), |call, s| call.concat(s));
    own.synchronize()?;
    let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    own.stream().begin_capture(mode).map_err(code)?;
    let queued = call().run_into(&mut dst);
    let flags = sys::CUgraphInstantiate_flags(0);
    let graph = own.stream().end_capture(flags).map_err(code)?;
    if !own.stream().context().has_async_alloc() {
        assert!(matches!(queued, Err(Error::Unsupported { .. })), "{queued:?}");
        return Ok(());
    }
    queued?;
    let graph = graph.ok_or("nothing was captured")?;
    assert!(dst.to_host()?.iter().all(|&x| x == 0.0), "a captured call does not run");
    for _ in 0..2 {
        graph.launch().map_err(code)?;
        call().run_into(&mut direct)?;
        let (dst, direct) = (dst.to_host()?, direct.to_host()?);
        assert!(dst.iter().zip(&direct).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
    Ok(())
}

fn sequences(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(66);
    let mut weight = |c_out: usize, c_in: usize| {
        Array2::from_shape_vec((c_out, c_in), random.normal(c_out * c_in)).unwrap()
    };
    let over_all = || LayerNorm::over_all().eps(1e-3);
    let partial = Pointwise::new(weight(7, 4))
        .partial(2..6)
        .stride(2)
        .source_activation(Activation::Relu)
        .silu();
    let narrow = Pointwise::new(weight(6, 13)).layer_norm(LayerNorm::over_channels());
    let whole = Pointwise::new(weight(8, 10)).layer_norm(over_all()).relu();
    let strided = Pointwise::new(weight(5, 8)).stride(2);
    let deep = Pointwise::new(weight(9, 5)).layer_norm(over_all());
    let ten = Pointwise::new(weight(10, 6)).gelu();
    let again = Pointwise::new(weight(3, 5)).stride(2).layer_norm(over_all());
    // Strides before and behind what needs every position.
    let chains = [
        vec![&partial, &narrow],
        vec![&partial, &narrow, &ten, &whole],
        vec![&whole, &strided, &deep],
        vec![&ten, &whole, &strided, &again],
    ];
    for (i, layers) in chains.iter().enumerate() {
        let channels = [10, 10, 10, 6][i];
        let src = random.tensor([3, channels, 1, 7, 9]).remove_axis(Axis(2));
        let mut steps: ArrayD<f32> = src.clone().into_dyn();
        let gpu = Device::from(device.clone());
        for layer in layers {
            steps = layer.prepare(&gpu)?.forward(&steps)?;
        }
        let cpu = layers.iter().map(|layer| layer.prepare(&Device::cpu()));
        let cpu = Sequence::new(cpu.collect::<Result<_, _>>()?)?.forward(&src)?;
        close(&steps, &cpu.mapv(f64::from).into_dyn(), 5e-5, &format!("chain {i}"))?;
        for slice_bytes in [None, Some(0), Some(4000)] {
            let options = PrepareOptions { slice_bytes, ..PrepareOptions::default() };
            let prepare = |layer: &&Pointwise| layer.prepare_with(&gpu, options.clone());
            let chain = Sequence::new(layers.iter().map(prepare).collect::<Result<Vec<_>, _>>()?)?;
            let on_device = chain.forward(&CudaTensor::from_host(device, src.view())?)?;
            for got in [on_device.to_host()?, chain.forward(&src)?.into_dyn()] {
                let same = got.iter().zip(&steps).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(got.shape() == steps.shape() && same, "chain {i}, {slice_bytes:?}");
            }
        }
    }
    Ok(())
}

fn allocations(device: &CudaDevice) -> Outcome {
    let case = Case::new(2, 6, 8, [1, 4, 5]);
    let layer = case.layer(vec![1.0; 48]).source_activation(Activation::Relu).gate();
    let layer = layer.partial(1..7).residual().layer_norm(LayerNorm::over_all()).relu();
    let prepared = layer.prepare(&device.clone().into())?;
    let tensor = |shape: &[usize]| CudaTensor::<f32>::zeros(device, shape);
    let (src, gate) = (tensor(&[2, 9, 1, 4, 5])?, tensor(&[2, 6])?);
    let (residual, mut dst) = (tensor(&[2, 11, 1, 4, 5])?, tensor(&[2, 11, 1, 4, 5])?);
    super::host::counted("the whole operator", &mut || {
        Ok(prepared.call(&src).gate(&gate).residual(&residual).run_into(&mut dst)?)
    })
}

fn plans(device: &CudaDevice) -> Outcome {
    let norm = BatchNorm::new(vec![0.0; 8], vec![1.0; 8]);
    let layer = Pointwise::new(Array2::ones((6, 8)))
        .source_batch_norm(norm)
        .source_activation(Activation::Relu);
    let over = |norm| layer.clone().layer_norm(norm).prepare(&device.clone().into());
    for (norm, words) in [
        (LayerNorm::over_channels(), "layer norm in a launch"),
        (LayerNorm::over_all(), "moments, then the values"),
    ] {
        let prepared = over(norm)?;
        let text = prepared.explain(&[2, 8, 5, 5])?.to_string();
        assert!(text.contains("source stages") && text.contains(words), "{text}");
        let plans = prepared.plans(&[2, 8, 5, 5])?;
        let usable: Vec<_> =
            plans.iter().filter(|p| p.verdict.is_ok()).map(|plan| plan.kernel).collect();
        for kernel in kernels(device) {
            assert!(usable.contains(&kernel), "{kernel} refuses: {plans:?}");
        }
    }
    Ok(())
}

fn given_scratch(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(67);
    let own = device.with_new_stream()?;
    let (src_shape, dst_shape) = ([2, 300, 1, 4, 5], [2, 24, 1, 4, 5]);
    let src = random.tensor(src_shape);
    let layer = Case::new(2, 300, 24, [1, 4, 5]).layer(random.normal(300 * 24));
    for (norm, splits) in [(false, 6), (true, 1), (true, 6)] {
        let norm = norm.then(LayerNorm::over_all);
        let layer = norm.into_iter().fold(layer.clone(), Pointwise::layer_norm);
        let kernel = format!("fprop_f32_simt_32x32x16_nchw/{splits}");
        let prepared = layer.prepare_with(&own.clone().into(), force(&kernel))?;
        let bytes = prepared.scratch_bytes(&src_shape)?;
        assert!(bytes > 0 && bytes % 4 == 0, "{bytes}");
        let on_device = CudaTensor::from_host(&own, src.view())?;
        let expected = prepared.forward(&on_device)?.to_host()?;
        // On a stream of its own, holding what is no number.
        let other = device.with_new_stream()?;
        let garbage = ndarray::Array1::from_elem(bytes / 4, f32::NAN);
        let mut scratch = CudaTensor::from_host(&other, garbage.insert_axis(Axis(0)).view())?;
        let mut dst = CudaTensor::<f32>::zeros(&own, &dst_shape)?;
        for _ in 0..2 {
            prepared.call(&on_device).scratch(&mut scratch).run_into(&mut dst)?;
            let got = dst.to_host()?;
            assert!(got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
        let mut small = CudaTensor::<f32>::zeros(&own, &[1, bytes / 4 - 1])?;
        let error = prepared.call(&on_device).scratch(&mut small).run_into(&mut dst).unwrap_err();
        assert!(matches!(&error, Error::Shape { tensor: "scratch", .. }), "{error}");
        let mut odd = CudaTensor::<f32>::zeros(&own, &[1, bytes])?;
        let mut odd = odd.channels_mut(1..bytes)?;
        let error = prepared.call(&on_device).scratch(&mut odd).run_into(&mut dst).unwrap_err();
        assert!(matches!(&error, Error::Misaligned { tensor: "scratch", .. }), "{error}");
        let error = prepared.call(&src).scratch(&mut scratch).run().unwrap_err();
        assert!(matches!(&error, Error::WrongDevice { tensor: "scratch", .. }), "{error}");

        // A graph that owns nothing, so that it may run as often as one likes, pools or none.
        let mut scratch = CudaTensor::<f32>::zeros(&own, &[1, bytes / 4])?;
        own.synchronize()?;
        let code = |error: pointwise::cudarc::driver::DriverError| format!("{:?}", error.0);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        own.stream().begin_capture(mode).map_err(code)?;
        let queued = prepared.call(&on_device).scratch(&mut scratch).run_into(&mut dst);
        let flags = sys::CUgraphInstantiate_flags(0);
        let graph = own.stream().end_capture(flags).map_err(code)?.ok_or("nothing captured")?;
        queued?;
        for _ in 0..2 {
            graph.launch().map_err(code)?;
            assert!(dst.to_host()? == expected);
        }
    }
    let plain = layer.prepare_with(&own.into(), force("fprop_f32_simt_32x32x16_nchw/1"))?;
    assert_eq!(plain.scratch_bytes(&src_shape)?, 0);
    assert_eq!(layer.prepare(&Device::cpu())?.scratch_bytes(&src_shape)?, 0);
    Ok(())
}
