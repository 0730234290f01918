//! Training on the device, against the f64 reference's gradients and the CPU.

use std::sync::Arc;
use std::time::Duration;

use ndarray::{Array2, ArrayD, ArrayView5, Axis, Ix5, IxDyn, Slice};
use pointwise::reference::{self, Inputs};
use pointwise::train::{
    Accumulate, AllReduce, Branches, Options, Params, Statistics, ThreadWorker, name,
};
use pointwise::{
    Activation, BatchNorm, CudaDevice, CudaTensor, Device, Error, LayerNorm, Math, Pointwise,
    Sequence,
};

use super::cases::{LAYOUTS, Placed};
use super::fixtures::Fixtures;
use super::training::{
    Got, SumOfBranches, Tensors, branches, branches_tensors, check_branches, check_slopes, compare,
    d_dst, error_of, large_tensors, norm, random, run, trainable, vector, weight,
};
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("training_every_case_of_the_fixtures_has_the_references_gradients", fixtures),
    ("training_on_several_chunks_and_tiles_has_the_references_gradients", several_chunks),
    ("training_is_the_same_bits_from_run_to_run", same_bits),
    ("training_on_device_tensors_equals_that_on_host_arrays", device_tensors),
    ("training_reads_and_writes_any_strides", placed_tensors),
    ("training_adds_to_gradients_or_replaces_them", accumulation),
    ("training_on_shards_is_that_on_the_whole_batch", shards),
    ("training_leaves_what_is_frozen", frozen),
    ("training_computes_the_same_without_gradients_by_tensors", without_inputs),
    ("training_keeps_variances_of_large_means", large_means),
    ("training_normalises_channels_of_large_means", large_means_of_channels),
    ("training_keeps_what_its_workspace_says", workspaces),
    ("training_refuses_what_it_has_not", refusals),
    ("training_has_the_slopes_of_large_and_infinite_values", |device| {
        Ok(check_slopes(&device.clone().into())?)
    }),
    ("training_branches_is_training_each_of_them", branches_together),
    ("training_branches_writes_any_strides", placed_branches),
    #[cfg(feature = "nccl")]
    ("training_without_nccl_is_an_error", without_nccl),
    ("training_updates_a_prepared_layer_while_it_runs", updates),
];

fn fixtures(device: &CudaDevice) -> Outcome {
    let device: Device = device.clone().into();
    let mut failures = Vec::new();
    let mut seen = 0;
    for (i, case) in Fixtures::load().cases_and_embedded().iter().enumerate() {
        let layer = case.layer();
        if !trainable(case) {
            continue;
        }
        // Every case with the batch's statistics, every other one with frozen ones, in both orders.
        for (statistics, last) in [
            (Statistics::Batch, false),
            (Statistics::Batch, true),
            (Statistics::Frozen, i % 2 == 0),
        ] {
            let what = format!("{}, {statistics:?}, channels last {last}", case.name);
            match compare(&layer, &Tensors::of(case, last), statistics, &device) {
                Ok((err, _)) if err <= 1.0 => seen += 1,
                Ok((err, at)) => failures.push(format!("{what}: {err:.1}: {at}")),
                Err(error) => failures.push(format!("{what}: {error}")),
            }
        }
    }
    if !failures.is_empty() {
        return Err(format!(
            "{} of {}:\n{}",
            failures.len(),
            failures.len() + seen,
            failures.join("\n")
        )
        .into());
    }
    assert!(seen > 200, "only {seen} runs");
    Ok(())
}

/// Layers on shapes that need several blocks, chunks and splits of every pass.
pub fn layers() -> Vec<(&'static str, Pointwise, Vec<usize>)> {
    let plain = |c_out, c_in| Pointwise::new(weight(c_out, c_in));
    vec![
        ("bn relu", plain(70, 35).batch_norm(norm(70)).relu(), vec![3, 35, 17, 13]),
        ("rank 0", plain(40, 30).bias(vector(40, 2)).batch_norm(norm(40)).silu(), vec![600, 30]),
        ("rank 1", plain(33, 17).batch_norm(norm(33)).relu(), vec![1, 17, 1001]),
        ("rank 3", plain(9, 5).bias(vector(9, 1)).gelu(), vec![2, 5, 3, 4, 50]),
        ("bits", plain(35, 20).bias(vector(35, 2)).relu6(), vec![3, 20, 11, 13]),
        (
            "groups, stride, shuffle, residual",
            plain(24, 6)
                .groups(4)
                .stride(2)
                .batch_norm(norm(24))
                .channel_shuffle(4)
                .residual()
                .leaky_relu(0.1),
            vec![3, 24, 21, 27],
        ),
        (
            "source, gate",
            plain(24, 20).source_batch_norm(norm(20)).source_activation(Activation::Relu).gate(),
            vec![3, 20, 20, 15],
        ),
        (
            "every stage",
            plain(12, 10)
                .bias(vector(12, 2))
                .activation(Activation::Mish)
                .batch_norm(norm(12))
                .residual()
                .prelu(vector(12, 5))
                .activation(Activation::Tanh),
            vec![2, 10, 16, 17],
        ),
        (
            "layer norm over channels",
            plain(70, 12).bias(vector(70, 2)).layer_norm(affine(70)).gelu(),
            vec![3, 12, 17, 9],
        ),
        (
            "layer norm over all, after a batch norm",
            plain(24, 10).gelu().batch_norm(norm(24)).layer_norm(LayerNorm::over_all()).relu(),
            vec![3, 10, 30, 41],
        ),
        (
            "a batch norm and more after a layer norm",
            plain(36, 10)
                .groups(2)
                .channel_shuffle(3)
                .bias(vector(36, 2))
                .layer_norm(affine(36))
                .prelu(vector(36, 5))
                .residual()
                .batch_norm(norm(36))
                .silu(),
            vec![2, 20, 19, 17],
        ),
    ]
}

fn affine(channels: usize) -> LayerNorm {
    let gamma: Vec<f32> = vector(channels, 8).iter().map(|x| x + 1.5).collect();
    LayerNorm::over_channels().affine(gamma, vector(channels, 9))
}

fn several_chunks(device: &CudaDevice) -> Outcome {
    let device: Device = device.clone().into();
    for (what, layer, shape) in layers() {
        for last in [false, true] {
            let tensors = large_tensors(&layer, &shape, last);
            let (err, at) = compare(&layer, &tensors, Statistics::Batch, &device)?;
            assert!(err <= 1.0, "{what}, channels last {last}: {err}: {at}");
        }
    }
    Ok(())
}

fn same_bits(device: &CudaDevice) -> Outcome {
    let device: Device = device.clone().into();
    for (what, layer, shape) in layers() {
        let tensors = large_tensors(&layer, &shape, false);
        let bits = || {
            let got = run(&layer, &tensors, Options::default(), &device).unwrap();
            let mut values = got.named();
            got.params.visit(|name, _, x| {
                values.push((name.into(), x.iter().map(|&x| f64::from(x)).collect()));
            });
            values
        };
        assert!(bits() == bits(), "{what}");
    }
    Ok(())
}

fn device_tensors(device: &CudaDevice) -> Outcome {
    let on: Device = device.clone().into();
    for (what, layer, shape) in layers() {
        let tensors = large_tensors(&layer, &shape, true);
        let host = run(&layer, &tensors, Options::default(), &on)?;
        let mut params = Params::new(&layer, &on)?;
        let mut grads = params.grads();
        let copy = |tensor: &ArrayD<f32>| CudaTensor::from_host(device, tensor.view());
        let src = copy(&tensors.sources[0])?;
        let residual = tensors.residual.as_ref().map(copy).transpose()?;
        let gate = tensors.gate.as_ref().map(copy).transpose()?;
        let mut call = params.call(&src);
        if let Some(residual) = &residual {
            call = call.residual(residual);
        }
        if let Some(gate) = &gate {
            call = call.gate(gate);
        }
        let (dst, workspace) = call.run()?;
        let d = copy(&d_dst(dst.shape()))?;
        let nans = |tensor: &ArrayD<f32>| copy(&tensor.mapv(|_| f32::NAN));
        let mut d_src = nans(&tensors.sources[0])?;
        let mut d_residual = tensors.residual.as_ref().map(nans).transpose()?;
        let mut d_gate = tensors.gate.as_ref().map(nans).transpose()?;
        let mut call = params.backward_call(&src, workspace, &d).d_src(&mut d_src);
        if let (Some(residual), Some(d)) = (&residual, &mut d_residual) {
            call = call.residual(residual).d_residual(d);
        }
        if let (Some(gate), Some(d)) = (&gate, &mut d_gate) {
            call = call.gate(gate).d_gate(d);
        }
        call.run(&mut grads)?;
        assert!(dst.to_host()? == host.dst, "{what}: dst");
        assert!(d_src.to_host()? == host.d_sources[0], "{what}: d_src");
        for (of, got, want) in
            [("d_residual", d_residual, host.d_residual), ("d_gate", d_gate, host.d_gate)]
        {
            assert!(got.map(|d| d.to_host()).transpose()? == want, "{what}: {of}");
        }
        assert!(grads == host.grads && params.layer() == host.params.layer(), "{what}");
    }
    Ok(())
}

/// Layers of every way that a gradient takes, on small shapes.
pub fn small_layers() -> [(&'static str, Pointwise, [usize; 5]); 7] {
    let plain = |c_out, c_in| Pointwise::new(weight(c_out, c_in));
    [
        (
            "layer norm over all, residual, shuffle",
            plain(12, 6)
                .bias(vector(12, 2))
                .channel_shuffle(3)
                .layer_norm(LayerNorm::over_all())
                .residual()
                .relu(),
            [3, 6, 1, 5, 7],
        ),
        (
            "layer norm over channels, partial, stride",
            plain(6, 6).partial(2..8).layer_norm(affine(6)).stride(2),
            [2, 11, 1, 7, 9],
        ),
        ("gradient by src in place", plain(9, 5).bias(vector(9, 1)).gelu(), [2, 5, 3, 4, 7]),
        ("bits", plain(9, 5).stride(2).relu(), [2, 5, 3, 4, 7]),
        (
            "groups, stride, shuffle, residual",
            plain(24, 6)
                .groups(4)
                .stride(2)
                .batch_norm(norm(24))
                .channel_shuffle(4)
                .residual()
                .leaky_relu(0.1),
            [3, 24, 1, 9, 11],
        ),
        (
            "source, gate",
            plain(12, 20).source_batch_norm(norm(20)).source_activation(Activation::Relu).gate(),
            [3, 20, 2, 5, 7],
        ),
        (
            "partial, residual",
            plain(6, 6).partial(2..8).batch_norm(norm(6)).residual().relu(),
            [2, 11, 1, 6, 7],
        ),
    ]
}

/// Tensors in the middle of others, with gaps, and backwards; nothing around them is written.
fn placed_tensors(device: &CudaDevice) -> Outcome {
    let on: Device = device.clone().into();
    for (i, (what, layer, shape)) in small_layers().into_iter().enumerate() {
        let tensors = large_tensors(&layer, &shape, false);
        for j in 0..LAYOUTS.len() {
            // All of them in turn, beside others.
            let layout = |tensor: usize| LAYOUTS[(i + j + 3 * tensor) % LAYOUTS.len()];
            let five = |tensor: &ArrayD<f32>| {
                let mut shape = tensor.shape().to_vec();
                shape.resize(5, 1);
                tensor.to_shape(shape).unwrap().into_owned().into_dimensionality::<Ix5>().unwrap()
            };
            let filled = |values: ArrayView5<'_, f32>, tensor: usize| {
                Placed::<f32>::filled(device, values, layout(tensor))
            };
            let blank = |like: &ArrayD<f32>, tensor: usize| {
                let shape = five(like).raw_dim();
                Placed::<f32>::blank(device, std::array::from_fn(|k| shape[k]), layout(tensor))
            };
            let src = filled(five(&tensors.sources[0]).view(), 0);
            let residual = tensors.residual.as_ref().map(|t| filled(five(t).view(), 1));
            let gate = tensors.gate.as_ref().map(|t| filled(five(t).view(), 2));
            let (src, residual, gate) = (
                src.view(),
                residual.as_ref().map(|placed| placed.view()),
                gate.as_ref().map(|placed| placed.view()),
            );
            let mut params = Params::new(&layer, &on)?;
            let dst_shape = params.prepare()?.dst_shape(&shape)?;
            let d = d_dst(&dst_shape);
            let mut dst = blank(&d, 3);
            let mut call = params.call(&src);
            if let Some(residual) = &residual {
                call = call.residual(residual);
            }
            if let Some(gate) = &gate {
                call = call.gate(gate);
            }
            let workspace = call.run_into(&mut dst.view_mut())?;

            let d = filled(five(&d).view(), 4);
            let mut d_src = blank(&tensors.sources[0], 5);
            let mut d_residual = tensors.residual.as_ref().map(|t| blank(t, 6));
            let mut d_gate = tensors.gate.as_ref().map(|t| blank(t, 7));
            let mut grads = params.grads();
            grads.visit_mut(|_, _, values| values.fill(f32::NAN));
            let mut to_src = d_src.view_mut();
            let mut to_residual = d_residual.as_mut().map(|placed| placed.view_mut());
            let mut to_gate = d_gate.as_mut().map(|placed| placed.view_mut());
            let d = d.view();
            let mut call = params.backward_call(&src, workspace, &d).d_src(&mut to_src);
            if let (Some(residual), Some(d)) = (&residual, &mut to_residual) {
                call = call.residual(residual).d_residual(d);
            }
            if let (Some(gate), Some(d)) = (&gate, &mut to_gate) {
                call = call.gate(gate).d_gate(d);
            }
            call.run(&mut grads)?;
            let read = |placed: &Placed| placed.read().into_dyn();
            let got = Got {
                dst: read(&dst),
                d_sources: vec![read(&d_src)],
                d_residual: d_residual.as_ref().map(read),
                d_gate: d_gate.as_ref().map(read),
                grads,
                params,
            };
            let (err, at) = error_of(&got, &layer, &tensors, Statistics::Batch, &on)?;
            assert!(err <= 1.0, "{what}, src {:?}: {err}: {at}", layout(0));
        }
    }
    Ok(())
}

/// Two workers that share the sums of batch norms; one of them may have nothing.
fn shards(device: &CudaDevice) -> Outcome {
    let device: Device = device.clone().into();
    let layer = Pointwise::new(weight(20, 10))
        .source_batch_norm(norm(10))
        .source_activation(Activation::Relu)
        .batch_norm(norm(20))
        .silu();
    let src = random(&[9, 10, 6, 5], 1);
    let d_dst = random(&[9, 20, 6, 5], 2);
    let mut one = Params::new(&layer, &device)?;
    let mut grads = one.grads();
    let (dst, workspace) = one.forward(&src)?;
    let d_src = one.backward(&src, workspace, &d_dst, &mut grads, Accumulate::Set)?;

    for first in [4, 0, 9] {
        let work = |shard: Slice, worker: ThreadWorker| {
            let src = src.slice_axis(Axis(0), shard);
            let d_dst = d_dst.slice_axis(Axis(0), shard);
            let worker: Arc<dyn AllReduce> = Arc::new(worker);
            let mut params = Params::new(&layer, &device)?;
            params.set_all_reduce(Some(worker.clone()));
            let mut grads = params.grads();
            grads.visit_mut(|_, _, values| values.fill(f32::NAN));
            let (dst, workspace) = params.forward(&src)?;
            let d_src = params.backward(&src, workspace, &d_dst, &mut grads, Accumulate::Set)?;
            grads.all_reduce(&*worker)?;
            Ok::<_, Error>((dst, d_src, grads, params))
        };
        let mut group = ThreadWorker::group(2, Duration::from_secs(60)).into_iter();
        let mut next = || group.next().unwrap();
        let (a, b) = (next(), next());
        let runs = std::thread::scope(|scope| {
            let other = scope.spawn(|| work(Slice::from(0..first), a));
            let own = work(Slice::from(first..9), b);
            [other.join().unwrap(), own]
        });
        let [a, b] = runs;
        let runs = [a?, b?];
        // Sums of other terms in another order: a few ulp of the largest value.
        let close = |a: f32, b: f32| (a - b).abs() <= 2e-5 * b.abs().max(1.0);
        let joined = |shards: [&ArrayD<f32>; 2]| {
            ndarray::concatenate(Axis(0), &shards.map(|shard| shard.view())).unwrap()
        };
        for (what, got, want) in [
            ("dst", joined([&runs[0].0, &runs[1].0]), &dst),
            ("d_src", joined([&runs[0].1, &runs[1].1]), &d_src),
        ] {
            assert!(got.iter().zip(want).all(|(&a, &b)| close(a, b)), "{first} first: {what}");
        }
        for (_, _, of_worker, after) in &runs {
            of_worker.visit(|name, _, values| {
                let want = grads.get(name).unwrap();
                let largest = want.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                for (&a, &b) in values.iter().zip(want) {
                    let err = (a - b).abs();
                    assert!(err <= 5e-6 * largest, "{first} first: {name}: {a}, {b} of {largest}");
                }
            });
            assert!(after.layer() == runs[0].3.layer(), "all workers have the same statistics");
            for name in [name::RUNNING_MEAN, name::SRC_RUNNING_VAR] {
                let pairs = after.get(name).unwrap().iter().zip(one.get(name).unwrap());
                pairs.for_each(|(&a, &b)| assert!(close(a, b), "{first} first: {name}: {a}, {b}"));
            }
        }
    }
    Ok(())
}

fn frozen(device: &CudaDevice) -> Outcome {
    let on: Device = device.clone().into();
    let rows = [1, 2, 5];
    for (what, layer, shape) in layers() {
        let tensors = large_tensors(&layer, &shape, false);
        let whole = run(&layer, &tensors, Options::default(), &on)?;
        let mut names = Vec::new();
        whole.grads.visit(|name, _, _| names.push(name));
        // Rows of the weight and every other parameter, then the rest of them.
        for odd in [false, true] {
            let frozen = names.iter().skip(usize::from(!odd)).step_by(2);
            let frozen: Vec<String> = frozen.map(|name| name.to_string()).collect();
            let options = Options {
                frozen: frozen.clone(),
                frozen_rows: vec![1..3, 5..6],
                ..Options::default()
            };
            let got = run(&layer, &tensors, options, &on)?;
            assert!(got.dst == whole.dst && got.d_sources == whole.d_sources, "{what}");
            assert!(got.d_residual == whole.d_residual && got.d_gate == whole.d_gate, "{what}");
            got.grads.visit(|name, shape, values| {
                let want = whole.grads.get(name).unwrap();
                let is_frozen = frozen.iter().any(|frozen| frozen == name);
                if name != name::WEIGHT {
                    let as_it_was = values.iter().all(|x| x.is_nan());
                    assert!(if is_frozen { as_it_was } else { values == want }, "{what}: {name}");
                    return;
                }
                let pairs = values.chunks(shape[1]).zip(want.chunks(shape[1]));
                for (i, (row, want)) in pairs.enumerate() {
                    let fits = match (rows.contains(&i), is_frozen) {
                        (true, _) => row.iter().all(|&x| x == 0.0),
                        (false, true) => row.iter().all(|x| x.is_nan()),
                        (false, false) => row == want,
                    };
                    assert!(fits, "{what}: row {i} of the weight");
                }
            });
        }
    }
    Ok(())
}

/// Only the parameters' gradients.
fn without_inputs(device: &CudaDevice) -> Outcome {
    let on: Device = device.clone().into();
    for (what, layer, shape) in layers() {
        let tensors = large_tensors(&layer, &shape, true);
        let with = run(&layer, &tensors, Options::default(), &on)?;
        let mut params = Params::new(&layer, &on)?;
        let src = &tensors.sources[0];
        let mut call = params.call(src);
        if let Some(residual) = &tensors.residual {
            call = call.residual(residual);
        }
        if let Some(gate) = &tensors.gate {
            call = call.gate(gate);
        }
        let (dst, workspace) = call.run()?;
        let d = d_dst(dst.shape());
        let mut grads = params.grads();
        grads.visit_mut(|_, _, values| values.fill(f32::NAN));
        let mut call = params.backward_call(src, workspace, &d);
        if let Some(residual) = &tensors.residual {
            call = call.residual(residual);
        }
        if let Some(gate) = &tensors.gate {
            call = call.gate(gate);
        }
        call.run(&mut grads)?;
        assert!(grads == with.grads, "{what}");
    }
    Ok(())
}

fn accumulation(device: &CudaDevice) -> Outcome {
    let device: Device = device.clone().into();
    for (what, layer, shape) in layers() {
        let tensors = large_tensors(&layer, &shape, false);
        let once = run(&layer, &tensors, Options::default(), &device)?;
        let mut params = Params::new(&layer, &device)?;
        let mut grads = once.grads.clone();
        let mut call = params.call(&tensors.sources[0]);
        if let Some(residual) = &tensors.residual {
            call = call.residual(residual);
        }
        if let Some(gate) = &tensors.gate {
            call = call.gate(gate);
        }
        let (dst, workspace) = call.run()?;
        let d = d_dst(dst.shape());
        let mut d_src = once.d_sources[0].clone();
        let (mut d_residual, mut d_gate) = (once.d_residual.clone(), once.d_gate.clone());
        let mut call = params.backward_call(&tensors.sources[0], workspace, &d);
        if let (Some(residual), Some(d)) = (&tensors.residual, &mut d_residual) {
            call = call.residual(residual).d_residual(d);
        }
        if let (Some(gate), Some(d)) = (&tensors.gate, &mut d_gate) {
            call = call.gate(gate).d_gate(d);
        }
        call.d_src(&mut d_src)
            .accumulate(Accumulate::Add)
            .accumulate_inputs(Accumulate::Add)
            .run(&mut grads)?;
        let doubled = |got: &ArrayD<f32>, once: &ArrayD<f32>, of: &str| {
            assert!(*got == once.mapv(|x| 2.0 * x), "{what}: {of}");
        };
        doubled(&d_src, &once.d_sources[0], "d_src");
        if let (Some(got), Some(once)) = (&d_residual, &once.d_residual) {
            doubled(got, once, "d_residual");
        }
        if let (Some(got), Some(once)) = (&d_gate, &once.d_gate) {
            doubled(got, once, "d_gate");
        }
        let mut twice = once.grads.clone();
        twice.scale(2.0);
        assert!(grads == twice, "{what}: parameters");
    }
    Ok(())
}

/// A mean of ten thousand deviations.
fn large_means(device: &CudaDevice) -> Outcome {
    let layer =
        Pointwise::new(Array2::eye(3)).batch_norm(BatchNorm::new(vec![0.0; 3], vec![1.0; 3]));
    let src = random(&[4, 3, 23, 29], 9).mapv(|x| 1e4 + x);
    let options = Options { momentum: Some(1.0), ..Options::default() };
    let mut params = Params::with_options(&layer, &device.clone().into(), options)?;
    let _ = params.forward(&src)?;
    let var = params.get("bn.running_var").unwrap();
    for (c, &var) in var.iter().enumerate() {
        let values: Vec<f64> =
            src.index_axis(ndarray::Axis(1), c).iter().map(|&x| f64::from(x)).collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let expected = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let err = (f64::from(var) - expected).abs() / expected;
        assert!(err <= 1e-3, "channel {c}: {var}, {expected}");
    }
    Ok(())
}

fn large_means_of_channels(device: &CudaDevice) -> Outcome {
    let src = random(&[3, 24, 11, 5], 9).mapv(|x| 1e4 + x);
    for norm in [LayerNorm::over_channels(), LayerNorm::over_all()] {
        let layer = Pointwise::new(Array2::eye(24)).layer_norm(norm);
        let inputs = Inputs { sources: vec![src.view()], ..Inputs::default() };
        let want = reference::forward(&layer, &inputs)?;
        let (dst, _workspace) = Params::new(&layer, &device.clone().into())?.forward(&src)?;
        for (got, want) in dst.iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() <= 1e-5, "{:?}: {got}, {want}", layer.stages());
        }
    }
    Ok(())
}

fn workspaces(device: &CudaDevice) -> Outcome {
    for (what, layer, shape) in layers() {
        let tensors = large_tensors(&layer, &shape, false);
        let mut params = Params::new(&layer, &device.clone().into())?;
        let said = params.workspace_bytes(&shape)?;
        let mut call = params.call(&tensors.sources[0]);
        if let Some(residual) = &tensors.residual {
            call = call.residual(residual);
        }
        if let Some(gate) = &tensors.gate {
            call = call.gate(gate);
        }
        let (dst, workspace) = call.run()?;
        assert_eq!(workspace.bytes(), said, "{what}");
        if what == "bits" {
            assert_eq!(said, dst.len().div_ceil(32) * 4);
        }
    }
    Ok(())
}

fn branches_together(device: &CudaDevice) -> Outcome {
    for (last, shape) in [(false, vec![2, 20, 9, 7]), (true, vec![2, 20, 19, 17])] {
        check_branches(&branches_tensors(&shape, last), &device.clone().into())?;
    }
    Ok(())
}

/// Two of them on device tensors, and one gradient by src in the middle of others.
fn placed_branches(device: &CudaDevice) -> Outcome {
    let on: Device = device.clone().into();
    let shape = [2, 20, 1, 9, 7];
    let layers: Vec<_> = branches().into_iter().take(2).collect();
    let tensors: Vec<_> = layers.iter().map(|l| large_tensors(l, &shape, false)).collect();
    let src = tensors[0].sources[0].clone().into_dimensionality::<Ix5>()?;
    let want = SumOfBranches::of(&layers, &tensors)?;
    let alone = layers.iter().zip(&tensors);
    let alone = alone.map(|(layer, tensors)| run(layer, tensors, Options::default(), &on));
    let alone = alone.collect::<Result<Vec<_>, _>>()?;
    for (i, layout) in LAYOUTS.into_iter().enumerate() {
        let src = Placed::<f32>::filled(device, src.view(), LAYOUTS[(i + 3) % LAYOUTS.len()]);
        let mut d_src = Placed::<f32>::blank(device, shape, layout);
        let params = layers.iter().map(|layer| Params::new(layer, &on));
        let mut branches = Branches::new(params.collect::<Result<_, _>>()?)?;
        let mut grads = branches.grads();
        for grads in &mut grads {
            grads.visit_mut(|_, _, values| values.fill(f32::NAN));
        }
        let src = src.view();
        let mut dsts: Vec<_> = [[2, 24, 1, 9, 7], [2, 12, 1, 5, 4]]
            .map(|shape| Placed::<f32>::blank(device, shape, layout))
            .into();
        let [a, b] = &mut dsts[..] else { unreachable!("two") };
        let (mut a, mut b) = (a.view_mut(), b.view_mut());
        let workspaces = branches.call(&src).run_into(&mut [&mut a, &mut b])?;
        let d_dsts: Vec<_> = dsts
            .iter()
            .map(|dst| {
                let d = d_dst(dst.read().shape()).into_dimensionality::<Ix5>().unwrap();
                Placed::<f32>::filled(device, d.view(), LAYOUTS[(i + 5) % LAYOUTS.len()])
            })
            .collect();
        let mut to = d_src.view_mut();
        let (a, b) = (d_dsts[0].view(), d_dsts[1].view());
        let call = branches.backward_call(&src, workspaces, &[&a, &b]);
        call.d_src(&mut to).run(&mut grads)?;
        want.check(&format!("{layout:?}: d_src"), &d_src.read().into_dyn(), 1.0);
        let of_layers = dsts.iter().zip(grads).zip(branches.into_layers());
        for (j, ((dst, grads), params)) in of_layers.enumerate() {
            let got = Got {
                dst: dst.read().into_dyn(),
                // Of which only the sum above is known.
                d_sources: alone[j].d_sources.clone(),
                d_residual: None,
                d_gate: None,
                grads,
                params,
            };
            let (err, at) = error_of(&got, &layers[j], &tensors[j], Statistics::Batch, &on)?;
            assert!(err <= 1.0, "{layout:?}, branch {j}: {err}: {at}");
        }
    }
    Ok(())
}

/// Where NCCL is, a group of one sums; where it is not, the error says so.
#[cfg(feature = "nccl")]
fn without_nccl(device: &CudaDevice) -> Outcome {
    use pointwise::train::{Launch, NcclId, NcclWorker};
    let launch = Launch {
        rank: 0,
        workers: 1,
        local_rank: Some(device.ordinal()),
        host: "127.0.0.1".into(),
        // A group of one meets nobody.
        port: 0,
        job: None,
    };
    assert!(launch.device()?.ordinal() == device.ordinal());
    let minute = Duration::from_secs(60);
    match NcclId::new() {
        Ok(_) => {
            let worker = NcclWorker::launched(&launch, device, minute)?;
            let mut values: Vec<f32> = vector(10_000, 1);
            worker.sum_f32(&mut values)?;
            assert_eq!(values, vector(10_000, 1));
            let mut values = [1.5, -2.25];
            worker.sum_f64(&mut values)?;
            assert_eq!(values, [1.5, -2.25]);
        }
        Err(error) => {
            assert!(error.to_string().starts_with("all-reduce: no NCCL"), "{error}");
            let id = NcclId::from_bytes([7; 128]);
            for error in [
                NcclWorker::launched(&launch, device, minute).unwrap_err(),
                NcclWorker::new(device, id, 0, 1, minute).unwrap_err(),
            ] {
                assert!(error.to_string().starts_with("all-reduce: no NCCL"), "{error}");
            }
        }
    }
    Ok(())
}

fn refusals(device: &CudaDevice) -> Outcome {
    let on: Device = device.clone().into();
    let plain = || Pointwise::new(weight(4, 3));
    let named = |error: Error, what: &str| {
        assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
        assert!(error.to_string().contains(what), "{error}");
    };
    let layer = (0..17).fold(plain(), |layer, _| layer.activation(Activation::Tanh));
    named(Params::new(&layer, &on).unwrap_err(), "17 stages");
    let layers = [&on, &Device::cpu()].map(|device| Params::new(&plain(), device));
    let layers = layers.into_iter().collect::<Result<_, _>>()?;
    assert!(matches!(Branches::new(layers), Err(Error::WrongDevice { .. })));
    // A batch of one value per channel, and values that are not finite, leave the statistics.
    let layer = plain().batch_norm(norm(4));
    let mut params = Params::new(&layer, &on)?;
    let one = ArrayD::<f32>::ones(IxDyn(&[1, 3]));
    assert!(matches!(params.forward(&one).unwrap_err(), Error::BatchTooSmall { .. }));
    let nan = ArrayD::from_elem(IxDyn(&[3, 3]), f32::NAN);
    assert!(matches!(params.forward(&nan).unwrap_err(), Error::NonFinite { .. }));
    assert!(params.layer() == &layer, "statistics stay");
    // TF32 is a permission of the products alone.
    let options = Options { math: Math::Tf32, ..Options::default() };
    let mut params = Params::with_options(&layer, &on, options)?;
    let src = random(&[5, 3, 7, 4], 3);
    let (dst, _workspace) = params.forward(&src)?;
    let (exact, _workspace) = Params::new(&layer, &on)?.forward(&src)?;
    assert!(dst.iter().zip(&exact).all(|(a, b)| (a - b).abs() <= 2e-2));
    // Where the tensor cores are worth it they are taken.
    let layer = Pointwise::new(weight(128, 128)).batch_norm(norm(128));
    let tensors = large_tensors(&layer, &[1, 128, 16, 32], false);
    let options = Options { math: Math::Tf32, ..Options::default() };
    let may = run(&layer, &tensors, options, &on)?;
    let exact = run(&layer, &tensors, Options::default(), &on)?;
    assert!(may.dst.iter().zip(&exact.dst).all(|(a, b)| (a - b).abs() <= 2e-2));
    let has_them = device.compute_capability() >= (8, 0);
    assert_eq!(may.dst != exact.dst, has_them, "products forward");
    assert_eq!(may.d_sources != exact.d_sources, has_them, "products backward");
    let weights = [&may, &exact].map(|got| got.grads.get(name::WEIGHT));
    assert_eq!(weights[0] != weights[1], has_them, "products of the gradient by the weight");
    // Seventeen sources are one too many, on the host or on the device.
    let layer = Pointwise::new(weight(4, 17));
    let mut params = Params::new(&layer, &on)?;
    let source = random(&[2, 1, 5], 1);
    let call = (1..17).fold(params.call(&source), |call, _| call.concat(&source));
    named(call.run().unwrap_err(), "17 sources");
    let source = CudaTensor::from_host(device, source.view())?;
    let call = (1..17).fold(params.call(&source), |call, _| call.concat(&source));
    named(call.run().unwrap_err(), "17 sources");
    Ok(())
}

fn updates(device: &CudaDevice) -> Outcome {
    let layer =
        Pointwise::new(weight(24, 20)).bias(vector(24, 2)).batch_norm(norm(24)).residual().relu();
    let plain = Pointwise::new(weight(24, 20)).bias(vector(24, 2)).batch_norm(norm(24)).relu();
    for (layer, residual) in [(layer, true), (plain, false)] {
        let mut params = Params::new(&layer, &device.clone().into())?;
        let prepared = params.prepare()?;
        let clone = prepared.clone();
        let elsewhere = prepared.on(&device.with_new_stream()?)?;
        let src = CudaTensor::from_host(device, random(&[3, 20, 7, 5], 1).view())?;
        let second = CudaTensor::from_host(device, random(&[3, 24, 7, 5], 2).view())?;
        let run = |layer: &pointwise::Prepared| match residual {
            true => layer.call(&src).residual(&second).run(),
            false => layer.forward(&src),
        };
        let before = run(&prepared)?.to_host()?;
        params.visit_mut(|name, _, values| {
            if name == "bn.running_mean" || name == "weight" {
                values.iter_mut().for_each(|x| *x = 0.5 * *x - 0.1);
            }
        });
        let after = run(&params.prepare()?)?.to_host()?;
        assert!(before != after);
        let queued = run(&prepared)?;
        std::thread::scope(|scope| {
            let runs = scope.spawn(|| {
                (0..40).all(|_| {
                    let dst = run(&clone).unwrap().to_host().unwrap();
                    dst == before || dst == after
                })
            });
            for _ in 0..8 {
                prepared.update(&params).unwrap();
            }
            assert!(runs.join().unwrap(), "a call mixed old and new parameters");
        });
        assert!(queued.to_host()? == before, "a call in flight ends as it began");
        assert!(run(&clone)?.to_host()? == after);
        assert!(run(&elsewhere)?.to_host()? == before, "a handle for another stream");
        if !residual {
            let sequence = Sequence::new(vec![prepared.clone()])?;
            params.visit_mut(|_, _, values| values.iter_mut().for_each(|x| *x = 0.75 * x.abs()));
            prepared.update(&params)?;
            let dst = sequence.forward(&src)?.to_host()?;
            assert!(dst == run(&params.prepare()?)?.to_host()? && dst != after, "a sequence");
        }
        let other = Params::new(&Pointwise::new(weight(6, 4)), &device.clone().into())?;
        assert!(matches!(prepared.update(&other).unwrap_err(), Error::Shape { .. }));
    }
    Ok(())
}
