//! Training on tensors of f16 and bf16, and its products of TF32: exact where the arithmetic is, else
//! against the f64 reference.

use std::ops::Range;

use ndarray::{Array2, Array5, ArrayD, Axis, Ix5, Slice};
use pointwise::reference::{self, Gradients, Inputs};
use pointwise::train::{Accumulate, Options, Params, Statistics, name};
use pointwise::{BatchNorm, CudaDevice, DType, Device, Math, Pointwise, bf16, f16};

use super::cases::{Case, LAYOUTS, Layout, Placed, Value, chain, rounded, same_bits};
use super::fixtures::Fixtures;
use super::half::unit;
use super::numbers::Random;
use super::tensor_cores::ALMOST_TF32;
use super::training::{
    Got, Tensors, d_dst, large_tensors, largest, named, terms, trainable, with_statistics,
};
use super::{OnDevice, Outcome, tensor_cores, train};

pub const TRIALS: &[OnDevice] = &[
    ("training_in_f16_sums_integers_exactly", integers::<f16>),
    ("training_in_bf16_sums_integers_exactly", integers::<bf16>),
    ("training_in_tf32_sums_integers_exactly", integers::<f32>),
    ("training_in_f16_on_every_case_of_the_fixtures_has_the_references_gradients", fixtures::<f16>),
    (
        "training_in_bf16_on_every_case_of_the_fixtures_has_the_references_gradients",
        fixtures::<bf16>,
    ),
    ("training_in_f16_runs_inferences_pass_with_its_own_rounding", one_pass::<f16>),
    ("training_in_bf16_runs_inferences_pass_with_its_own_rounding", one_pass::<bf16>),
    ("training_in_f16_on_several_chunks_and_tiles_has_the_references_gradients", chunks::<f16>),
    ("training_in_bf16_on_several_chunks_and_tiles_has_the_references_gradients", chunks::<bf16>),
    ("training_in_f16_reads_and_writes_any_strides", strides::<f16>),
    ("training_in_bf16_reads_and_writes_any_strides", strides::<bf16>),
    ("training_in_f16_on_host_arrays_equals_that_on_device_tensors", host::<f16>),
    ("training_in_bf16_on_host_arrays_equals_that_on_device_tensors", host::<bf16>),
    ("training_in_f16_adds_to_gradients_and_repeats_its_bits", accumulation::<f16>),
    ("training_in_bf16_adds_to_gradients_and_repeats_its_bits", accumulation::<bf16>),
];

fn nearest<T: Value>(tensor: &ArrayD<f32>) -> ArrayD<f32> {
    tensor.mapv(|x| T::from_f32(x).to_f32())
}

/// The tensors with five axes, and all that T does not hold rounded.
fn held<T: Value>(tensors: &Tensors) -> Tensors {
    let five = |tensor: &ArrayD<f32>| nearest::<T>(&five(tensor).into_dyn());
    Tensors {
        sources: tensors.sources.iter().map(five).collect(),
        residual: tensors.residual.as_ref().map(five),
        gate: tensors.gate.as_ref().map(five),
    }
}

fn five(tensor: &ArrayD<f32>) -> Array5<f32> {
    let mut shape = tensor.shape().to_vec();
    shape.resize(5, 1);
    tensor.to_shape(shape).unwrap().into_owned().into_dimensionality::<Ix5>().unwrap()
}

/// The layer with the nearest weight that products in T take.
fn with_weight_of<T: Value>(layer: &Pointwise) -> Pointwise {
    let mut params = Params::new(layer, &Device::cpu()).unwrap();
    params.visit_mut(|name, _, values| {
        if name == name::WEIGHT {
            values.iter_mut().for_each(|x| *x = T::from_f32(*x).to_f32());
        }
    });
    params.layer().clone()
}

/// A step on tensors of five axes, each in the layout of its number. Gradients are added to those of
/// `before`.
fn run<T: Value>(
    device: &CudaDevice,
    layer: &Pointwise,
    tensors: &Tensors,
    statistics: Statistics,
    layout: impl Fn(usize) -> Layout,
    before: Option<&Got>,
) -> pointwise::Result<Got> {
    let filled =
        |values: &ArrayD<f32>, i| Placed::<T>::filled(device, five(values).view(), layout(i));
    // What a gradient that is added to holds, or else nothing that could be taken for one.
    let begun = |like: &ArrayD<f32>, before: Option<&ArrayD<f32>>, i| match before {
        Some(before) => filled(before, i),
        None => Placed::<T>::blank(device, five(like).shape().try_into().unwrap(), layout(i)),
    };
    let sources: Vec<_> = tensors.sources.iter().map(|t| filled(t, 0)).collect();
    let residual = tensors.residual.as_ref().map(|t| filled(t, 1));
    let gate = tensors.gate.as_ref().map(|t| filled(t, 2));
    let views: Vec<_> = sources.iter().map(Placed::view).collect();
    let (residual, gate) = (residual.as_ref().map(Placed::view), gate.as_ref().map(Placed::view));

    let on = Device::from(device.clone());
    let mut params =
        Params::with_options(layer, &on, Options { statistics, ..Options::default() })?;
    let mut shape = tensors.sources[0].shape().to_vec();
    shape[1] = tensors.sources.iter().map(|t| t.shape()[1]).sum();
    let dst_shape = params.prepare()?.dst_shape(&shape)?;
    let mut dst = Placed::<T>::blank(device, dst_shape[..].try_into().unwrap(), layout(3));
    let mut call = params.call(&views[0]);
    for view in &views[1..] {
        call = call.concat(view);
    }
    if let Some(residual) = &residual {
        call = call.residual(residual);
    }
    if let Some(gate) = &gate {
        call = call.gate(gate);
    }
    let workspace = call.run_into(&mut dst.view_mut())?;
    assert_eq!(workspace.bytes(), params.workspace_bytes(&shape)?);

    let d = filled(&nearest::<T>(&d_dst(&dst_shape)), 4);
    let d = d.view();
    let before_of = |of: fn(&Got) -> &Option<ArrayD<f32>>| before.and_then(|got| of(got).as_ref());
    let d_sources = tensors.sources.iter().enumerate();
    let mut d_sources: Vec<_> =
        d_sources.map(|(i, t)| begun(t, before.map(|got| &got.d_sources[i]), 5)).collect();
    let before_residual = before_of(|got| &got.d_residual);
    let mut d_residual = tensors.residual.as_ref().map(|t| begun(t, before_residual, 6));
    let before_gate = before_of(|got| &got.d_gate);
    let mut d_gate = tensors.gate.as_ref().map(|t| begun(t, before_gate, 7));
    let mut grads = params.grads();
    match before {
        Some(before) => grads = before.grads.clone(),
        None => grads.visit_mut(|_, _, values| values.fill(f32::NAN)),
    }
    let accumulate = if before.is_some() { Accumulate::Add } else { Accumulate::Set };
    let mut to_sources: Vec<_> = d_sources.iter_mut().map(Placed::view_mut).collect();
    let mut to_residual = d_residual.as_mut().map(Placed::view_mut);
    let mut to_gate = d_gate.as_mut().map(Placed::view_mut);
    let mut call = params.backward_call(&views[0], workspace, &d);
    for view in &views[1..] {
        call = call.concat(view);
    }
    for to in &mut to_sources {
        call = call.d_src(to);
    }
    if let (Some(residual), Some(d)) = (&residual, &mut to_residual) {
        call = call.residual(residual).d_residual(d);
    }
    if let (Some(gate), Some(d)) = (&gate, &mut to_gate) {
        call = call.gate(gate).d_gate(d);
    }
    call.accumulate(accumulate).accumulate_inputs(accumulate).run(&mut grads)?;
    let read = |placed: &Placed<T>| placed.read().into_dyn();
    Ok(Got {
        dst: read(&dst),
        d_sources: d_sources.iter().map(read).collect(),
        d_residual: d_residual.as_ref().map(read),
        d_gate: d_gate.as_ref().map(read),
        grads,
        params,
    })
}

/// That everything a step gave is near the reference.
///
/// Beside the sums' rounding (see `training::worst`) there are at most three to T on the way of a
/// term: of what source stages make of src, of the gradient by the convolution, and of the result. The
/// first is one of products, whose sums may be smaller: see [`cancellation`]. It moves the mean and the
/// deviation of a batch as well, each by as much as a value.
fn check<T: Value>(
    got: &Got,
    layer: &Pointwise,
    tensors: &Tensors,
    statistics: Statistics,
    partial: Option<&Range<usize>>,
) -> Result<(), String> {
    let inputs = tensors.inputs();
    let d = nearest::<T>(&d_dst(got.dst.shape()));
    let want = reference::backward(layer, &inputs, statistics, d.view()).unwrap();
    let frozen = with_statistics(layer, &want);
    let uncancelled: Gradients =
        reference::backward(&frozen, &inputs, Statistics::Frozen, d.view()).unwrap();
    let (want, uncancelled, got_of) = (named(&want), named(&uncancelled), got.named());
    assert_eq!(got_of.len(), want.len(), "everything is compared");
    let find = |all: &[(String, Vec<f64>)], name: &str| {
        all.iter().find(|(other, _)| other == name).map(|(_, values)| values.clone())
    };
    let of_sums = f64::from(f32::EPSILON) * terms(layer, got.dst.shape()) as f64;
    let of_source = match layer.source_stages() {
        [] => 1.0,
        _ if statistics == Statistics::Batch => 3.0 * cancellation(&frozen, tensors, partial),
        _ => cancellation(&frozen, tensors, partial),
    };
    for (name, got) in &got_of {
        let want = find(&want, name).unwrap();
        assert_eq!(got.len(), want.len(), "{name}");
        let scale = largest(&want).max(largest(&find(&uncancelled, name).unwrap_or_default()));
        let share = of_sums + (2.0 + of_source) * unit::<T>();
        assert!(share < 0.1, "{name}: a bound of {share} of the largest value checks nothing");
        let bound = share * scale;
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            if got != want && !((got - want).abs() <= bound) {
                return Err(format!("{name}[{i}] = {got} instead of {want}, may be {bound} off"));
            }
        }
    }
    Ok(())
}

/// How much larger the terms of the convolution's sums are than what is left of them: of every channel,
/// the largest sum of magnitudes by the largest deviation from the mean, which a batch norm may take
/// away.
fn cancellation(layer: &Pointwise, tensors: &Tensors, partial: Option<&Range<usize>>) -> f64 {
    let sources: Vec<_> = tensors.sources.iter().map(|t| t.view()).collect();
    let src = ndarray::concatenate(Axis(1), &sources).unwrap();
    let convolved = partial.cloned().unwrap_or(0..src.shape()[1]);
    let src = src.slice_axis(Axis(1), Slice::from(convolved));
    let mut alone = Pointwise::new(Array2::ones((src.shape()[1], 1))).groups(src.shape()[1]);
    for stage in layer.source_stages() {
        alone = alone.source_stage(stage.clone());
    }
    let gate = tensors.gate.as_ref().map(|gate| gate.view());
    let inputs = Inputs { sources: vec![src], residual: None, gate };
    let x = reference::forward(&alone, &inputs).unwrap().mapv(|x| x as f32);
    let weight = layer.weight().to_owned();
    let convolved = |weight: Array2<f32>, x: ArrayD<f32>| {
        let layer = Pointwise::new(weight).groups(layer.c_in() / layer.weight().ncols());
        let inputs = Inputs { sources: vec![x.view()], ..Inputs::default() };
        reference::forward(&layer, &inputs).unwrap()
    };
    let magnitudes = convolved(weight.mapv(f32::abs), x.mapv(f32::abs));
    let sums = convolved(weight, x);
    let channels = magnitudes.axis_iter(Axis(1)).zip(sums.axis_iter(Axis(1)));
    let ratios = channels.map(|(magnitudes, sums)| {
        let mean = sums.mean().unwrap();
        largest(&magnitudes) / largest(&sums.mapv(|x| x - mean))
    });
    ratios.fold(1.0, f64::max)
}

/// Layers whose forward pass is one of inference.
fn one_pass<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(93);
    let case = Case::new(2, 8, 6, [1, 5, 9]);
    let train = |layer: &Pointwise, src: Array5<f32>, statistics| -> Outcome {
        let tensors = Tensors { sources: vec![src.into_dyn()], residual: None, gate: None };
        let tensors = held::<T>(&tensors);
        let layer = with_weight_of::<T>(layer);
        for layout in [Layout::First, Layout::Last] {
            let got = run::<T>(device, &layer, &tensors, statistics, |_| layout, None)?;
            check::<T>(&got, &layer, &tensors, statistics, None)?;
        }
        Ok(())
    };
    // A clip, one of whose bounds both types have as something smaller, of integers, none of which is
    // near it.
    let layer = case.layer(random.integers(48)).bias(random.integers(6)).clip(-0.75, 2.1);
    assert!(T::from_f32(2.1).to_f32() < 2.1);
    let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
    train(&layer, src, Statistics::Batch)?;
    // A source's norm that takes a large mean away, or multiplies by much: neither folds into such a weight.
    let mut src = random.tensor(case.src_shape());
    let most = 0.5 / unit::<T>() as f32;
    src.index_axis_mut(Axis(1), 0).mapv_inplace(|x| most + x);
    src.index_axis_mut(Axis(1), 1).mapv_inplace(|x| 1e-3 * x);
    let (mut mean, mut var, mut gamma) = (vec![0.0; 8], vec![1.0; 8], vec![1.0; 8]);
    (mean[0], var[1], gamma[1]) = (most, 1e-6, 10.0);
    let norm = BatchNorm::new(mean, var).affine(gamma, random.normal(8)).eps(1e-9);
    let mut weight = random.normal(48);
    // So that the gradient by src does not overflow f16.
    (0..6).for_each(|row| weight[8 * row + 1] *= 0.5);
    let layer = case.layer(weight).source_batch_norm(norm).bias(random.normal(6));
    train(&layer, src.clone(), Statistics::Batch)?;
    train(&layer, src, Statistics::Frozen)
}

/// Of the kinds that the kernel of the weight's gradient reads, at the edges of its tiles and slabs.
fn cases() -> Vec<Case> {
    let mut cases = tensor_cores::cases().to_vec();
    cases.extend([
        // Several splits, of vectors of eight and of four, and of none.
        Case::new(2, 24, 40, [1, 20, 32]),
        Case::new(3, 20, 12, [1, 14, 14]),
        Case::new(2, 33, 17, [1, 23, 21]),
        // Large tiles.
        Case::new(1, 72, 136, [1, 16, 24]),
        Case::new(2, 130, 200, [1, 7, 7]),
        Case { groups: 2, ..Case::new(2, 144, 160, [1, 8, 9]) },
        Case { groups: 3, ..Case::new(2, 24, 12, [1, 9, 8]) },
        Case { stride: 2, ..Case::new(2, 24, 16, [1, 12, 17]) },
    ]);
    cases
}

/// Products of f32 may be TF32's: then also of numbers that take rounding to be integers.
fn integers<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(91);
    let since_80 = device.compute_capability() >= (8, 0);
    // Without tensor cores one kernel takes all weights' gradients, and the stand-in takes long for it.
    let step = if T::DTYPE == DType::F16 || since_80 { 1 } else { 4 };
    let rounds = T::DTYPE == DType::F32 && since_80;
    let options = Options { math: Math::Tf32, ..Options::default() };
    for (i, case) in cases().iter().enumerate().step_by(step) {
        let weight = random.integers(case.c_out * case.c_in / case.groups);
        let bias = random.integers(case.c_out);
        let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
        let d = Array5::from_shape_fn(case.dst_shape(), |_| random.integer());
        let layer = case.layer(weight.clone()).bias(bias.clone());
        let dst = rounded::<T>(&chain(case, &weight, &bias, &src));
        let (rows, k, s) = (case.c_out / case.groups, case.c_in / case.groups, case.stride);
        let mut d_src = Array5::<f32>::zeros(case.src_shape());
        let mut d_weight = vec![0.0f32; weight.len()];
        let mut d_bias = vec![0.0f32; case.c_out];
        for ((n, c, z, y, x), &d) in d.indexed_iter() {
            d_bias[c] += d;
            for i in 0..k {
                let at = [n, c / rows * k + i, z * s, y * s, x * s];
                d_weight[c * k + i] += d * src[at];
                d_src[at] += d * weight[c * k + i];
            }
        }
        let d_src = rounded::<T>(&d_src);
        let (first, last) = (Layout::First, Layout::Last);
        let other = (LAYOUTS[(2 + i) % 8], LAYOUTS[(3 * i + 1) % 8]);
        let pairs = [(first, first), (last, last), (first, last), (last, first)];
        for layouts in [pairs[i % 4], pairs[(i + 1 + i / 4) % 4], other] {
            let what = format!("{case:?}, {layouts:?}");
            let values = (&src, &d);
            let (src, d) = (
                Placed::<T>::filled(device, src.view(), layouts.0),
                Placed::<T>::filled(device, d.view(), layouts.1),
            );
            let (src, d) = (src.view(), d.view());
            let on = Device::from(device.clone());
            let mut params = Params::with_options(&layer, &on, options.clone())?;
            let mut to = Placed::<T>::blank(device, case.dst_shape(), layouts.1);
            let workspace = params.call(&src).run_into(&mut to.view_mut())?;
            same_bits(&to.read(), &dst, &format!("{what}: dst"))?;
            let mut to = Placed::<T>::blank(device, case.src_shape(), layouts.0);
            let mut grads = params.grads();
            grads.visit_mut(|_, _, values| values.fill(f32::NAN));
            let mut view = to.view_mut();
            params.backward_call(&src, workspace, &d).d_src(&mut view).run(&mut grads)?;
            same_bits(&to.read(), &d_src, &format!("{what}: d_src"))?;
            for (name, want) in [(name::WEIGHT, &d_weight), ("bias", &d_bias)] {
                let got = grads.get(name).unwrap();
                let wrong = got.iter().zip(want).position(|(got, want)| got != want);
                if let Some(at) = wrong {
                    let (got, want) = (got[at], want[at]);
                    return Err(format!("{what}: {name}[{at}] = {got}, expected {want}").into());
                }
            }
            if !rounds {
                continue;
            }
            let almost = |values: &Array5<f32>, layout| {
                Placed::<T>::filled(device, (values * ALMOST_TF32).view(), layout)
            };
            let (src, d) = (almost(values.0, layouts.0), almost(values.1, layouts.1));
            let (src, d) = (src.view(), d.view());
            let mut to = Placed::<T>::blank(device, case.dst_shape(), layouts.1);
            let workspace = params.call(&src).run_into(&mut to.view_mut())?;
            params.backward_call(&src, workspace, &d).run(&mut grads)?;
            assert!(grads.get(name::WEIGHT) == Some(&d_weight), "{what}: rounded to TF32");
        }
    }
    Ok(())
}

fn fixtures<T: Value>(device: &CudaDevice) -> Outcome {
    let (mut failures, mut seen) = (Vec::new(), 0);
    for (i, case) in Fixtures::load().cases_and_embedded().iter().enumerate() {
        if !trainable(case) {
            continue;
        }
        let layer = with_weight_of::<T>(&case.layer());
        let tensors = held::<T>(&Tensors::of(case, false));
        let layout = [Layout::First, Layout::Last][i % 2];
        for statistics in [Statistics::Batch, Statistics::Frozen] {
            let got = run::<T>(device, &layer, &tensors, statistics, |_| layout, None);
            let checked = got.map_err(|error| error.to_string());
            let partial = case.partial.as_ref();
            match checked.and_then(|got| check::<T>(&got, &layer, &tensors, statistics, partial)) {
                Ok(()) => seen += 1,
                Err(error) => failures.push(format!("{}, {statistics:?}: {error}", case.name)),
            }
        }
    }
    if !failures.is_empty() {
        let (count, all) = (failures.len(), failures.len() + seen);
        return Err(format!("{count} of {all}:\n{}", failures.join("\n")).into());
    }
    assert!(seen > 130, "only {seen} runs");
    Ok(())
}

fn chunks<T: Value>(device: &CudaDevice) -> Outcome {
    for (i, (what, layer, shape)) in train::layers().into_iter().enumerate() {
        let layer = with_weight_of::<T>(&layer);
        let tensors = held::<T>(&large_tensors(&layer, &shape, false));
        let layout = [Layout::First, Layout::Last][i % 2];
        let got = run::<T>(device, &layer, &tensors, Statistics::Batch, |_| layout, None)?;
        check::<T>(&got, &layer, &tensors, Statistics::Batch, None)
            .map_err(|error| format!("{what}, {layout:?}: {error}"))?;
    }
    Ok(())
}

fn strides<T: Value>(device: &CudaDevice) -> Outcome {
    for (i, (what, layer, shape)) in train::small_layers().into_iter().enumerate() {
        let layer = with_weight_of::<T>(&layer);
        let tensors = held::<T>(&large_tensors(&layer, &shape, false));
        // All of them for one tensor or another.
        for j in [0, 2, 5] {
            let layout = |tensor: usize| LAYOUTS[(i + j + 3 * tensor) % LAYOUTS.len()];
            let got = run::<T>(device, &layer, &tensors, Statistics::Batch, layout, None)?;
            check::<T>(&got, &layer, &tensors, Statistics::Batch, None)
                .map_err(|error| format!("{what}, src {:?}: {error}", layout(0)))?;
        }
    }
    Ok(())
}

fn host<T: Value>(device: &CudaDevice) -> Outcome {
    for (what, layer, shape) in train::small_layers() {
        let layer = with_weight_of::<T>(&layer);
        let tensors = held::<T>(&large_tensors(&layer, &shape, false));
        let first = |_| Layout::First;
        let want = run::<T>(device, &layer, &tensors, Statistics::Batch, first, None)?;
        let of = |t: &ArrayD<f32>| t.mapv(T::from_f32);
        let nans = |t: &ArrayD<f32>| t.mapv(|_| T::from_f32(f32::NAN));
        let src = of(&tensors.sources[0]);
        let (residual, gate) = (tensors.residual.as_ref().map(of), tensors.gate.as_ref().map(of));
        let mut params = Params::new(&layer, &device.clone().into())?;
        let mut call = params.call(&src);
        if let Some(residual) = &residual {
            call = call.residual(residual);
        }
        if let Some(gate) = &gate {
            call = call.gate(gate);
        }
        let (dst, workspace) = call.run()?;
        let d = of(&d_dst(dst.shape()));
        let mut d_src = nans(&tensors.sources[0]);
        let mut d_residual = tensors.residual.as_ref().map(nans);
        let mut d_gate = tensors.gate.as_ref().map(nans);
        let mut grads = params.grads();
        let mut call = params.backward_call(&src, workspace, &d).d_src(&mut d_src);
        if let (Some(residual), Some(d)) = (&residual, &mut d_residual) {
            call = call.residual(residual).d_residual(d);
        }
        if let (Some(gate), Some(d)) = (&gate, &mut d_gate) {
            call = call.gate(gate).d_gate(d);
        }
        call.run(&mut grads)?;
        let back = |t: &ArrayD<T>| t.mapv(T::to_f32);
        assert!(back(&dst) == want.dst, "{what}: dst");
        assert!(back(&d_src) == want.d_sources[0], "{what}: d_src");
        assert!(d_residual.as_ref().map(back) == want.d_residual, "{what}: d_residual");
        assert!(d_gate.as_ref().map(back) == want.d_gate, "{what}: d_gate");
        assert!(grads == want.grads && params.layer() == want.params.layer(), "{what}");
    }
    Ok(())
}

fn accumulation<T: Value>(device: &CudaDevice) -> Outcome {
    for (i, (what, layer, shape)) in train::small_layers().into_iter().enumerate() {
        let tensors = held::<T>(&large_tensors(&layer, &shape, false));
        let layout = |_| [Layout::First, Layout::Last][i % 2];
        let once = run::<T>(device, &layer, &tensors, Statistics::Batch, layout, None)?;
        let again = run::<T>(device, &layer, &tensors, Statistics::Batch, layout, None)?;
        assert!(once.named() == again.named(), "{what}: the same bits");
        assert!(once.params.layer() == again.params.layer(), "{what}: the same statistics");
        let twice = run::<T>(device, &layer, &tensors, Statistics::Batch, layout, Some(&once))?;
        let before = once.named();
        for ((name, twice), (_, once)) in twice.named().into_iter().zip(before) {
            // What is added is the gradient of f32, which once was rounded to what the tensor holds.
            let of_tensor = name.starts_with("d_");
            let apart = if of_tensor { 2.0 * unit::<T>() } else { 0.0 };
            let most = largest(&once);
            let fits = |(twice, once): (&f64, &f64)| {
                let times = if name == "dst" { 1.0 } else { 2.0 };
                (twice - times * once).abs() <= apart * most.max(2.0 * once.abs())
            };
            assert!(twice.iter().zip(&once).all(fits), "{what}: {name}");
        }
    }
    Ok(())
}
