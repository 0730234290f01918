//! Training on the CPU against the f64 reference, and the reference against finite differences.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use crate::common::{Fixtures, channels_last};
use crate::training::*;
use ndarray::{Array2, Array4, ArrayD, ArrayView4, ArrayViewMut4, Axis, IxDyn, Slice, s};
use pointwise::reference::{self, Inputs};
use pointwise::train::{
    Accumulate, AllReduce, BUCKET, Branches, Grads, Options, Params, Reducer, Statistics,
    ThreadWorker, all_reduce, name,
};
use pointwise::{
    Activation, BatchNorm, Device, Error, LayerNorm, Place, Pointwise, Stage, TensorMut, TensorRef,
    nhwc_mut,
};

#[test]
fn every_case_of_the_fixtures_has_the_references_gradients() {
    let device = Device::cpu();
    let mut failures = Vec::new();
    let mut seen = 0;
    for case in Fixtures::load().cases_and_embedded().iter().filter(|case| trainable(case)) {
        for statistics in [Statistics::Batch, Statistics::Frozen] {
            for last in [false, true] {
                let what = format!("{}, {statistics:?}, channels last {last}", case.name);
                match compare(&case.layer(), &Tensors::of(case, last), statistics, &device) {
                    Ok((err, _)) if err <= 1.0 => seen += 1,
                    Ok((err, at)) => failures.push(format!("{what}: {err:.1}: {at}")),
                    Err(error) => failures.push(format!("{what}: {error}")),
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(seen > 400, "only {seen} runs");
}

/// Layers on shapes that need several blocks, units and parts of every pass.
fn large() -> Vec<(&'static str, Pointwise, Vec<usize>)> {
    let plain = |c_out, c_in| Pointwise::new(weight(c_out, c_in));
    vec![
        ("bn relu", plain(70, 45).batch_norm(norm(70)).relu(), vec![3, 45, 33, 29]),
        ("deep", plain(300, 520).batch_norm(norm(300)).relu6(), vec![2, 520, 5, 9]),
        ("rank 0", plain(40, 30).bias(vector(40, 2)).batch_norm(norm(40)).silu(), vec![700, 30]),
        ("rank 1", plain(33, 17).batch_norm(norm(33)).relu(), vec![1, 17, 5001]),
        ("bits", plain(35, 20).bias(vector(35, 2)).relu(), vec![3, 20, 31, 33]),
        (
            "groups, stride, shuffle, residual",
            plain(48, 12)
                .groups(4)
                .stride(2)
                .batch_norm(norm(48))
                .channel_shuffle(4)
                .residual()
                .leaky_relu(0.1),
            vec![3, 48, 41, 37],
        ),
        (
            "source, gate",
            plain(24, 50).source_batch_norm(norm(50)).source_activation(Activation::Relu).gate(),
            vec![3, 50, 40, 30],
        ),
        (
            "layer norm over all, after a batch norm",
            plain(24, 10).gelu().batch_norm(norm(24)).layer_norm(LayerNorm::over_all()).relu(),
            vec![3, 10, 30, 31],
        ),
    ]
}

#[test]
fn large_layers_have_the_references_gradients() {
    for (what, layer, shape) in large() {
        for last in [false, true] {
            let tensors = large_tensors(&layer, &shape, last);
            let (err, at) = compare(&layer, &tensors, Statistics::Batch, &Device::cpu()).unwrap();
            assert!(err <= 1.0, "{what}, channels last {last}: {err}: {at}");
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for (what, layer, shape) in large() {
        for last in [false, true] {
            let tensors = large_tensors(&layer, &shape, last);
            let bits = |threads: usize| {
                let pool = rayon_pool(threads);
                let device = Device::cpu_with_pool(pool);
                let got = run(&layer, &tensors, Options::default(), &device).unwrap();
                let mut values = got.named();
                got.params.visit(|name, _, x| {
                    values.push((name.into(), x.iter().map(|&x| f64::from(x)).collect()));
                });
                values
            };
            let one = bits(1);
            for threads in [1, 2, 3] {
                assert!(bits(threads) == one, "{what}, channels last {last}, {threads} threads");
            }
        }
    }
}

fn rayon_pool(threads: usize) -> std::sync::Arc<rayon::ThreadPool> {
    std::sync::Arc::new(rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
}

/// `Σ dst · d_dst`, whose gradients a backward pass computes.
fn loss(layer: &Pointwise, inputs: &Inputs<'_>, statistics: Statistics) -> f64 {
    let shape = reference::forward(layer, inputs).unwrap().raw_dim();
    let d_dst = d_dst(ndarray::Dimension::slice(&shape));
    let dst = reference::backward(layer, inputs, statistics, d_dst.view()).unwrap().dst;
    dst.iter().zip(&d_dst).map(|(y, &d)| y * f64::from(d)).sum()
}

#[test]
fn the_references_gradients_are_finite_differences() {
    // Exact in f32 beside values of about one.
    const STEP: f32 = 1.0 / 4096.0;
    let mut compared = 0;
    let cases = Fixtures::load().cases();
    for case in cases.iter().filter(|case| trainable(case) && !case.dst.is_empty()) {
        for statistics in [Statistics::Batch, Statistics::Frozen] {
            let layer = case.layer();
            let d_dst = d_dst(case.dst.shape());
            let got =
                reference::backward(&layer, &case.inputs(), statistics, d_dst.view()).unwrap();
            let all: Vec<f64> = named(&got)[1..].iter().flat_map(|(_, d)| d.clone()).collect();
            let tolerance = 2e-5 * largest(&all).max(1.0);
            let mut check = |what: String, d: f64, difference: &dyn Fn(f32) -> (f64, f32)| {
                let ((above, x1), (below, x0)) = (difference(STEP), difference(-STEP));
                let slope = (above - below) / f64::from(x1 - x0);
                let err = (slope - d).abs();
                assert!(
                    err <= tolerance,
                    "{} {statistics:?} {what}: {d}, by difference {slope}",
                    case.name
                );
                compared += 1;
            };
            for (name, d) in &got.parameters {
                for i in (0..d.len()).step_by(d.len().div_ceil(3)) {
                    check(format!("{name}[{i}]"), d[i], &|step| {
                        let mut params = Params::new(&layer, &Device::cpu()).unwrap();
                        let mut moved = 0.0;
                        params.visit_mut(|other, _, values| {
                            if other == *name {
                                values[i] += step;
                                moved = values[i];
                            }
                        });
                        (loss(params.layer(), &case.inputs(), statistics), moved)
                    });
                }
            }
            let tensors = Tensors::of(case, false);
            for which in 0..tensors.sources.len() + 2 {
                let d: Vec<f64> = match which.checked_sub(tensors.sources.len()) {
                    None => got.d_sources[which].iter().copied().collect(),
                    Some(0) => got.d_residual.iter().flatten().copied().collect(),
                    Some(_) => got.d_gate.iter().flatten().copied().collect(),
                };
                for i in (0..d.len()).step_by(d.len().div_ceil(4).max(1)) {
                    check(format!("tensor {which}, element {i}"), d[i], &|step| {
                        let mut tensors = Tensors::of(case, false);
                        let sources = tensors.sources.len();
                        let tensor = match which.checked_sub(sources) {
                            None => &mut tensors.sources[which],
                            Some(0) => tensors.residual.as_mut().unwrap(),
                            Some(_) => tensors.gate.as_mut().unwrap(),
                        };
                        let x = tensor.iter_mut().nth(i).unwrap();
                        if x.is_finite() {
                            *x += step;
                        }
                        let moved = *x;
                        let inputs = tensors.inputs();
                        // Channels of a residual beside a partial convolution hold NaN.
                        if moved.is_nan() {
                            (step.into(), step)
                        } else {
                            (loss(&layer, &inputs, statistics), moved)
                        }
                    });
                }
            }
        }
    }
    assert!(compared > 3500, "only {compared} gradients");
}

/// A layer with a batch norm, and a batch for it.
fn simple() -> (Pointwise, ArrayD<f32>) {
    let layer = Pointwise::new(weight(6, 5)).bias(vector(6, 2)).batch_norm(norm(6)).relu();
    (layer, random(&[2, 5, 4, 3], 1))
}

fn params(layer: &Pointwise) -> Params {
    Params::new(layer, &Device::cpu()).unwrap()
}

macro_rules! refused {
    ($call:expr, $pattern:pat, $says:expr) => {
        match $call {
            Err(error @ $pattern) => {
                let text = error.to_string();
                assert!(text.contains($says), "{text}");
            }
            other => panic!("{other:?}"),
        }
    };
}

#[test]
fn a_workspace_fits_one_backward_pass_only() {
    let (layer, src) = simple();
    let (mut a, mut b) = (params(&layer), params(&layer));
    let mut grads = a.grads();
    let set = Accumulate::Set;

    let (dst, workspace) = a.forward(&src).unwrap();
    refused!(
        b.backward(&src, workspace, &dst, &mut grads, set),
        Error::Workspace { .. },
        "another"
    );
    let (_, workspace) = a.forward(&src).unwrap();
    a.visit_mut(|_, _, values| values.iter_mut().for_each(|x| *x += 1.0));
    refused!(
        a.backward(&src, workspace, &dst, &mut grads, set),
        Error::Workspace { .. },
        "changed"
    );
    let (_, workspace) = a.forward(&src).unwrap();
    a.update(&grads, |_, _, _| {}).unwrap();
    refused!(
        a.backward(&src, workspace, &dst, &mut grads, set),
        Error::Workspace { .. },
        "changed"
    );
    let other = random(&[2, 5, 4, 4], 1);
    let (_, workspace) = a.forward(&other).unwrap();
    refused!(
        a.backward(&src, workspace, &dst, &mut grads, set),
        Error::Workspace { .. },
        "[[2, 5, 4, 4]], not [[2, 5, 4, 3]]"
    );
    // Two batches may be on their way at a time.
    let (_, first) = b.forward(&src).unwrap();
    let (_, second) = b.forward(&src).unwrap();
    for workspace in [first, second] {
        b.backward(&src, workspace, &dst, &mut grads, set).unwrap();
    }
}

#[test]
fn tensors_of_a_backward_pass_are_checked() {
    let (layer, src) = simple();
    let mut a = params(&layer);
    let mut grads = a.grads();
    let (dst, workspace) = a.forward(&src).unwrap();
    let wrong = random(&[2, 6, 4, 4], 1);
    let set = Accumulate::Set;
    refused!(
        a.backward(&src, workspace, &wrong, &mut grads, set),
        Error::Shape { tensor: "d_dst", .. },
        "[2, 6, 4, 3]"
    );
    let (_, workspace) = a.forward(&src).unwrap();
    let mut others = params(&Pointwise::new(weight(6, 5))).grads();
    refused!(
        a.backward(&src, workspace, &dst, &mut others, set),
        Error::Shape { .. },
        "list of gradients"
    );
    let (_, workspace) = a.forward(&src).unwrap();
    refused!(
        a.backward_call(&src, workspace, &dst).residual(&dst).run(&mut grads),
        Error::UnexpectedInput { .. },
        "residual"
    );
    let mut memory = src.clone();
    let view = unsafe_view(&mut memory);
    let (_, workspace) = a.forward(&view.0).unwrap();
    let mut d_src = view.1;
    refused!(
        a.backward_call(&view.0, workspace, &dst).d_src(&mut d_src).run(&mut grads),
        Error::Aliased { written: "d_src", tensor: "src" },
        "d_src shares memory with src"
    );
    let layer = Pointwise::new(weight(6, 5)).residual();
    let mut b = params(&layer);
    let mut grads = b.grads();
    let (dst, workspace) = b.call(&src).residual(&dst).run().unwrap();
    refused!(
        b.backward(&src, workspace, &dst, &mut grads, set),
        Error::MissingInput { input: "residual" },
        "residual"
    );
}

/// The same memory twice, as C callers may hand it over.
fn unsafe_view(memory: &mut ArrayD<f32>) -> (TensorRef<'_>, TensorMut<'_>) {
    let (shape, strides) = (memory.shape().to_vec(), memory.strides().to_vec());
    let ptr = memory.as_mut_ptr();
    // SAFETY: the call refuses the two before it touches them.
    unsafe {
        (
            TensorRef::from_raw_parts(ptr, Place::Host, &shape, &strides).unwrap(),
            TensorMut::from_raw_parts(ptr, Place::Host, &shape, &strides).unwrap(),
        )
    }
}

#[test]
fn options_are_checked() {
    let (layer, _) = simple();
    let with = |options| Params::with_options(&layer, &Device::cpu(), options);
    let default = Options::default;
    let momentum = Options { momentum: Some(1.5), ..default() };
    refused!(with(momentum), Error::ParameterValue { .. }, "1.5");
    let momentum = Options { momentum: Some(f64::NAN), ..default() };
    refused!(with(momentum), Error::ParameterValue { .. }, "NaN");
    let frozen = Options { frozen: vec!["wieght".into()], ..default() };
    refused!(with(frozen), Error::ParameterValue { .. }, "wieght");
    let rows = Options { frozen_rows: vec![0..1, 3..7], ..default() };
    refused!(with(rows), Error::ParameterValue { .. }, "3..7");
}

#[test]
fn statistics_need_two_finite_values() {
    let (layer, src) = simple();
    let mut a = params(&layer);
    let one = random(&[1, 5, 1, 1], 1);
    refused!(a.forward(&one), Error::BatchTooSmall { .. }, "[1, 5, 1, 1]");
    for bad in [f32::NAN, f32::INFINITY, 1e30] {
        let mut src = src.clone();
        src[[1, 2, 0, 0]] = bad;
        refused!(a.forward(&src), Error::NonFinite { channel: 0, .. }, "of the batch at bn");
    }
    assert_eq!(a.layer(), params(&layer).layer(), "running statistics stay");
    assert_eq!(a.num_batches_tracked(), 0);
    let frozen = Options { statistics: Statistics::Frozen, ..Options::default() };
    a.set_options(frozen).unwrap();
    assert!(a.forward(&one).is_ok(), "frozen statistics need no batch");
}

#[test]
fn running_statistics_may_be_averages_of_all_batches() {
    let (layer, _) = simple();
    let options = Options { momentum: None, ..Options::default() };
    let mut a = Params::with_options(&layer, &Device::cpu(), options).unwrap();
    let mut sums = vec![0.0; 6];
    for seed in 0..4 {
        let src = random(&[3, 5, 7], seed);
        let inputs = Inputs { sources: vec![src.view()], ..Inputs::default() };
        let d = random(&[3, 6, 7], 9);
        let want = reference::backward(&layer, &inputs, Statistics::Batch, d.view()).unwrap();
        let batch = want.statistic(name::RUNNING_MEAN).unwrap();
        sums.iter_mut().zip(batch).for_each(|(sum, x)| *sum += x);
        let _ = a.forward(&src).unwrap();
        let count = f64::from(seed + 1);
        for (&got, sum) in a.get(name::RUNNING_MEAN).unwrap().iter().zip(&sums) {
            let err = (f64::from(got) - sum / count).abs();
            assert!(err <= 1e-6, "{got}, {}", sum / count);
        }
    }
    assert_eq!(a.num_batches_tracked(), 4);
}

#[test]
fn variances_beside_large_means_are_exact() {
    // mean / std = 10^4, through a weight that is one.
    let layer =
        Pointwise::new(Array2::eye(8)).batch_norm(BatchNorm::new(vec![0.0; 8], vec![1.0; 8]));
    for last in [false, true] {
        for shape in [[4, 8, 50, 41], [700, 8, 1, 1], [1, 8, 1, 9001]] {
            let values = random(&shape, 3).mapv(|x| 1e4 + x * 3f32.sqrt());
            let src = if last { channels_last(&values) } else { values.clone() };
            let options = Options { momentum: Some(1.0), ..Options::default() };
            let mut a = Params::with_options(&layer, &Device::cpu(), options).unwrap();
            let _ = a.forward(&src).unwrap();
            for c in 0..8 {
                let x: Vec<f64> =
                    values.index_axis(ndarray::Axis(1), c).iter().map(|&x| f64::from(x)).collect();
                let mean = x.iter().sum::<f64>() / x.len() as f64;
                let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (x.len() - 1) as f64;
                let got = f64::from(a.get(name::RUNNING_VAR).unwrap()[c]);
                let err = (got / var - 1.0).abs();
                assert!(err <= 1e-5, "{shape:?}, channels last {last}: {got}, {var}");
                let got = f64::from(a.get(name::RUNNING_MEAN).unwrap()[c]);
                assert!((got - mean).abs() <= 2e-3, "{shape:?}: {got}, {mean}");
            }
        }
    }
}

#[test]
fn gradients_are_replaced_or_added() {
    let (layer, src) = simple();
    let layer = layer.residual();
    let mut a = params(&layer);
    let residual = random(&[2, 6, 4, 3], 2);
    let d_dst = random(&[2, 6, 4, 3], 3);
    let mut once = None;
    for (accumulate, factor) in [(Accumulate::Set, 1.0), (Accumulate::Add, 2.0)] {
        let mut grads = a.grads();
        let mut d_src = ArrayD::zeros(src.raw_dim());
        let mut d_residual = ArrayD::zeros(residual.raw_dim());
        for _ in 0..2 {
            let (_, workspace) = a.call(&src).residual(&residual).run().unwrap();
            let call = a.backward_call(&src, workspace, &d_dst).residual(&residual);
            let call = call.accumulate(accumulate).accumulate_inputs(accumulate);
            call.d_src(&mut d_src).d_residual(&mut d_residual).run(&mut grads).unwrap();
        }
        let mut all = d_src.iter().chain(&d_residual).copied().collect::<Vec<_>>();
        grads.visit(|_, _, values| all.extend(values));
        let once = once.get_or_insert_with(|| all.clone());
        for (x, once) in all.iter().zip(once) {
            assert!((x - factor * *once).abs() <= 1e-5 * once.abs().max(0.1), "{x}, {once}");
        }
    }
}

#[test]
fn what_is_frozen_stays() {
    let (layer, src) = simple();
    let options = Options {
        frozen: vec![name::BIAS.into(), name::GAMMA.into()],
        frozen_rows: vec![1..3, 5..6],
        ..Options::default()
    };
    let mut a = Params::with_options(&layer, &Device::cpu(), options).unwrap();
    let mut whole = params(&layer);
    let (mut grads, mut all) = (a.grads(), whole.grads());
    for accumulate in [Accumulate::Set, Accumulate::Add] {
        grads.visit_mut(|_, _, values| values.fill(7.0));
        all.visit_mut(|_, _, values| values.fill(7.0));
        let (dst, workspace) = a.forward(&src).unwrap();
        a.backward(&src, workspace, &dst, &mut grads, accumulate).unwrap();
        let (dst, workspace) = whole.forward(&src).unwrap();
        whole.backward(&src, workspace, &dst, &mut all, accumulate).unwrap();
        assert!(grads.get(name::BIAS).unwrap().iter().all(|&x| x == 7.0), "not computed");
        let kept = if accumulate == Accumulate::Set { 0.0 } else { 7.0 };
        let rows = grads.get(name::WEIGHT).unwrap().chunks(5);
        for (i, (row, all)) in rows.zip(all.get(name::WEIGHT).unwrap().chunks(5)).enumerate() {
            match [1, 2, 5].contains(&i) {
                true => assert!(row.iter().all(|&x| x == kept), "row {i}: {row:?}"),
                false => assert_eq!(row, all, "row {i}"),
            }
        }
    }
    let mut visited = Vec::new();
    a.update(&grads, |name, values, _| {
        visited.push(name);
        values.fill(9.0);
    })
    .unwrap();
    assert_eq!(visited, [name::WEIGHT, name::BETA]);
    for (i, row) in a.layer().weight().rows().into_iter().enumerate() {
        let frozen = [1, 2, 5].contains(&i);
        assert_eq!(row.iter().all(|&x| x == 9.0), !frozen, "row {i}");
    }
    assert_eq!(a.get(name::BIAS), params(&layer).get(name::BIAS));
}

#[test]
fn workspaces_hold_what_is_needed_and_say_so_before() {
    let src = random(&[2, 5, 16, 10], 1);
    let plain = || Pointwise::new(weight(6, 5)).bias(vector(6, 2));
    let values = 2 * 6 * 160;
    for (layer, bytes) in [
        (plain(), 0),
        (plain().residual(), 0),
        (plain().relu(), values / 8),
        (plain().residual().relu6(), values / 8),
        (plain().batch_norm(norm(6)).relu(), values * 4),
        (plain().silu(), values * 4),
    ] {
        let mut a = params(&layer);
        let residual = random(&[2, 6, 16, 10], 1);
        let call = a.call(&src);
        let takes = layer.stages().iter().any(|stage| matches!(stage, Stage::Residual));
        let (_, workspace) = if takes { call.residual(&residual) } else { call }.run().unwrap();
        assert_eq!(workspace.bytes(), bytes, "{layer:?}");
        assert_eq!(a.workspace_bytes(src.shape()).unwrap(), bytes);
    }
}

#[test]
fn a_prepared_layer_follows_while_it_runs() {
    let (layer, src) = simple();
    let mut a = params(&layer);
    let prepared = a.prepare().unwrap();
    let before = prepared.forward(&src).unwrap();
    let clone = prepared.clone();
    let _ = a.forward(&src).unwrap();
    a.visit_mut(|name, _, values| {
        if name == name::BIAS {
            values.fill(1.0);
        }
    });
    let after = a.prepare().unwrap().forward(&src).unwrap();
    assert_ne!(before, after);
    std::thread::scope(|scope| {
        let runs = scope.spawn(|| {
            (0..2000).map(|_| clone.forward(&src).unwrap()).all(|dst| dst == before || dst == after)
        });
        for _ in 0..200 {
            prepared.update(&a).unwrap();
        }
        assert!(runs.join().unwrap(), "a call mixed old and new parameters");
    });
    assert_eq!(clone.forward(&src).unwrap(), after);
    let other = params(&Pointwise::new(weight(6, 4)));
    refused!(prepared.update(&other), Error::Shape { .. }, "[6, 4]");
}

#[test]
fn workers_on_shards_are_one_on_the_whole_batch() {
    const WORKERS: usize = 3;
    let layer = Pointwise::new(weight(20, 10))
        .source_batch_norm(norm(10))
        .source_activation(Activation::Relu)
        .batch_norm(norm(20))
        .silu();
    let src = random(&[9, 10, 6, 5], 1);
    let d_dst = random(&[9, 20, 6, 5], 2);
    let mut one = params(&layer);
    let mut grads = one.grads();
    let (_, workspace) = one.forward(&src).unwrap();
    let d_src = one.backward(&src, workspace, &d_dst, &mut grads, Accumulate::Set).unwrap();

    let together = || {
        let group = ThreadWorker::group(WORKERS, Duration::from_secs(60));
        let runs: Vec<_> = std::thread::scope(|scope| {
            let work = |(rank, worker): (usize, ThreadWorker)| {
                let (layer, src, d_dst) = (&layer, &src, &d_dst);
                scope.spawn(move || {
                    // Shards of different sizes.
                    let bounds = [0, 2, 5, 9];
                    let shard = Slice::from(bounds[rank]..bounds[rank + 1]);
                    let src = src.slice_axis(Axis(0), shard);
                    let d_dst = d_dst.slice_axis(Axis(0), shard);
                    let worker: Arc<dyn AllReduce> = Arc::new(worker);
                    let mut params = params(layer);
                    params.set_all_reduce(Some(worker.clone()));
                    let mut grads = params.grads();
                    let (_, workspace) = params.forward(&src).unwrap();
                    let d_src =
                        params.backward(&src, workspace, &d_dst, &mut grads, Accumulate::Set);
                    grads.all_reduce(&*worker).unwrap();
                    (d_src.unwrap(), grads, params.layer().clone())
                })
            };
            let threads: Vec<_> = group.into_iter().enumerate().map(work).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        runs
    };
    let runs = together();
    // Sums of other terms in another order: a few ulp of the largest value.
    let close = |a: f32, b: f32| (a - b).abs() <= 2e-5 * b.abs().max(1.0);
    let shards: Vec<_> = runs.iter().map(|(d_src, ..)| d_src.view()).collect();
    let joined = ndarray::concatenate(Axis(0), &shards).unwrap();
    assert!(joined.iter().zip(&d_src).all(|(&a, &b)| close(a, b)));
    for (_, of_worker, after) in &runs {
        of_worker.visit(|name, _, values| {
            let want = grads.get(name).unwrap();
            let largest = want.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            for (&a, &b) in values.iter().zip(want) {
                assert!((a - b).abs() <= 5e-6 * largest, "{name}: {a}, {b} of {largest}");
            }
        });
        assert_eq!(after, &runs[0].2, "all workers have the same statistics");
        for name in [name::RUNNING_MEAN, name::SRC_RUNNING_VAR] {
            let after = Params::new(after, &Device::cpu()).unwrap();
            let pairs = after.get(name).unwrap().iter().zip(one.get(name).unwrap());
            pairs.for_each(|(&a, &b)| assert!(close(a, b), "{name}: {a}, {b}"));
        }
    }
    assert!(runs == together(), "a fixed number of workers is bitwise repeatable");
}

#[test]
fn a_worker_that_dies_or_stays_away_is_an_error() {
    let mut group = ThreadWorker::group(2, Duration::from_secs(600));
    let (b, a) = (group.pop().unwrap(), group.pop().unwrap());
    let waits = std::thread::spawn(move || a.sum_f32(&mut [1.0]));
    let dies = std::thread::spawn(move || {
        let _b = b;
        panic!("as a test wants it");
    });
    assert!(dies.join().is_err());
    refused!(waits.join().unwrap(), Error::AllReduce { .. }, "worker 1 is gone");

    let group = ThreadWorker::group(2, Duration::from_millis(50));
    refused!(group[0].sum_f64(&mut [1.0]), Error::AllReduce { .. }, "worker 1 did not come");
    refused!(group[1].sum_f64(&mut [1.0]), Error::AllReduce { .. }, "worker 1 did not come");

    let group = ThreadWorker::group(2, Duration::from_secs(600));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| group[0].sum_f64(&mut [1.0, 2.0]));
        refused!(group[1].sum_f64(&mut [1.0]), Error::AllReduce { .. }, "values");
        refused!(first.join().unwrap(), Error::AllReduce { .. }, "values");
    });

    // Two sums of one worker at once, of which one would be lost.
    let group = ThreadWorker::group(2, Duration::from_secs(600));
    std::thread::scope(|scope| {
        let sums = [1.0, 2.0].map(|x| {
            scope.spawn({
                let worker = &group[0];
                move || worker.sum_f64(&mut [x])
            })
        });
        for sum in sums {
            refused!(sum.join().unwrap(), Error::AllReduce { .. }, "worker 0 was asked");
        }
    });

    // Forward: the error comes out of the pass, and the statistics stay.
    let (layer, src) = simple();
    let mut a = params(&layer);
    let worker = ThreadWorker::group(2, Duration::from_secs(600)).swap_remove(0);
    a.set_all_reduce(Some(Arc::new(worker)));
    refused!(a.forward(&src), Error::AllReduce { .. }, "worker 1 is gone");
    assert_eq!(a.layer(), params(&layer).layer());
}

#[test]
fn slopes_of_large_and_infinite_values_are_the_references() {
    check_slopes(&Device::cpu()).unwrap();
}

/// Counts the values of each sum.
#[derive(Debug)]
struct Counted(ThreadWorker, std::sync::Mutex<Vec<usize>>);

impl AllReduce for Counted {
    fn sum_f64(&self, values: &mut [f64]) -> pointwise::Result<()> {
        self.0.sum_f64(values)
    }

    fn sum_f32(&self, values: &mut [f32]) -> pointwise::Result<()> {
        self.1.lock().unwrap().push(values.len());
        self.0.sum_f32(values)
    }
}

#[test]
fn gradients_of_many_layers_are_summed_in_buckets() {
    let (layer, _) = simple();
    let layers =
        [layer, Pointwise::new(weight(9, 7)), Pointwise::new(weight(3, 2)).bias(vec![0.0; 3])];
    let of_worker = |rank: usize| {
        let mut all: Vec<_> = layers.iter().map(|layer| params(layer).grads()).collect();
        let mut seed = 10 * rank as u32;
        for grads in &mut all {
            grads.visit_mut(|_, _, values| {
                seed += 1;
                values.copy_from_slice(&vector(values.len(), seed));
            });
        }
        all
    };
    let flat = |all: &[Grads]| {
        let mut values = Vec::new();
        all.iter().for_each(|grads| grads.visit(|_, _, of| values.extend_from_slice(of)));
        values
    };
    let mut want = flat(&of_worker(0));
    want.iter_mut().zip(flat(&of_worker(1))).for_each(|(a, b)| *a += b);
    let total = want.len();
    assert_eq!(total, 30 + 3 * 6 + 63 + 6 + 3);
    // Smaller than a value, than a tensor, between two of them, exactly all, more than all.
    for bytes in [0, 4, 20, 4 * 63, 4 * 64 + 3, 4 * total, BUCKET] {
        let group = ThreadWorker::group(2, Duration::from_secs(60));
        std::thread::scope(|scope| {
            for (rank, worker) in group.into_iter().enumerate() {
                let (of_worker, flat, want) = (&of_worker, &flat, &want);
                scope.spawn(move || {
                    let worker = Counted(worker, Default::default());
                    let mut all = of_worker(rank);
                    all_reduce(&mut all, &worker, bytes).unwrap();
                    assert_eq!(&flat(&all), want, "buckets of {bytes} bytes");
                    let most = (bytes / 4).clamp(1, total);
                    let sums = worker.1.into_inner().unwrap();
                    let (last, others) = sums.split_last().unwrap();
                    assert!(others.iter().all(|&len| len == most), "{bytes}: {sums:?}");
                    assert_eq!(*last, total - most * others.len(), "{bytes}: {sums:?}");
                    assert!(*last <= most, "{bytes}: {sums:?}");
                });
            }
        });
    }
    let mut all = of_worker(0);
    let worker = ThreadWorker::group(2, Duration::from_secs(60)).swap_remove(0);
    refused!(all_reduce(&mut all, &worker, BUCKET), Error::AllReduce { .. }, "worker 1 is gone");
}

/// What nothing takes that works.
const LONG: Duration = Duration::from_secs(60);

/// Gradients of a few layers, which a seed fills.
fn several_grads(seed: u32) -> Vec<Grads> {
    let (layer, _) = simple();
    let mut all: Vec<_> = [layer, Pointwise::new(weight(9, 7)), Pointwise::new(weight(3, 2))]
        .iter()
        .map(|layer| params(layer).grads())
        .collect();
    for (i, grads) in all.iter_mut().enumerate() {
        grads.visit_mut(|_, _, values| {
            let len = values.len();
            values.copy_from_slice(&vector(len, seed + i as u32));
        });
    }
    all
}

#[test]
fn gradients_are_summed_while_others_are_made() {
    // Smaller than a layer, about one, all of them.
    for bytes in [0, 100, 4 * 63, BUCKET] {
        let [ours, theirs] = [(); 2].map(|()| ThreadWorker::group(2, Duration::from_secs(60)));
        std::thread::scope(|scope| {
            for (rank, (worker, other)) in ours.into_iter().zip(theirs).enumerate() {
                scope.spawn(move || {
                    let reducer = Reducer::new(Arc::new(worker), bytes).unwrap();
                    assert!(reducer.finish().unwrap().is_empty());
                    for step in 0..3 {
                        let mut want = several_grads(100 * step + 10 * rank as u32);
                        for grads in &want {
                            reducer.push(grads.clone());
                            // Sums of another group, as batch norms have them, do not mind.
                            other.sum_f64(&mut [1.0]).unwrap();
                        }
                        all_reduce(&mut want, &other, BUCKET).unwrap();
                        assert_eq!(reducer.finish().unwrap(), want, "buckets of {bytes} bytes");
                    }
                });
            }
        });
    }
}

/// Tells when a sum begins, and ends it when it is told to.
#[derive(Debug)]
struct Gate {
    begun: Mutex<mpsc::Sender<()>>,
    go: Mutex<mpsc::Receiver<()>>,
}

impl Gate {
    /// Beside it, who hears of a sum, and who ends it.
    fn new() -> (Gate, mpsc::Receiver<()>, mpsc::Sender<()>) {
        let ((begun, heard), (end, go)) = (mpsc::channel(), mpsc::channel());
        (Gate { begun: Mutex::new(begun), go: Mutex::new(go) }, heard, end)
    }
}

impl AllReduce for Gate {
    fn sum_f64(&self, _: &mut [f64]) -> Result<(), Error> {
        unreachable!("gradients are f32")
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<(), Error> {
        self.begun.lock().unwrap().send(()).unwrap();
        self.go.lock().unwrap().recv_timeout(LONG).unwrap();
        values.iter_mut().for_each(|x| *x *= 2.0);
        Ok(())
    }
}

#[test]
fn a_full_bucket_is_summed_before_the_last_layer_is_there() {
    let (gate, begun, end) = Gate::new();
    // Of one size, so that each is a bucket.
    let all = [7, 8].map(|seed| several_grads(seed).swap_remove(0));
    let mut bytes = 0;
    all[0].visit(|_, _, values| bytes += size_of_val(values));
    let reducer = Reducer::new(Arc::new(gate), bytes).unwrap();
    let [first, second] = all.clone();
    reducer.push(first);
    begun.recv_timeout(LONG).expect("a sum begins that nobody has asked for");
    reducer.push(second);
    end.send(()).unwrap();
    end.send(()).unwrap();
    let sums = reducer.finish().unwrap();
    let mut want = all.to_vec();
    want.iter_mut().for_each(|grads| grads.scale(2.0));
    assert_eq!(sums, want);
}

#[test]
fn a_reducer_that_is_dropped_waits_for_nobody_and_begins_nothing() {
    let (gate, begun, end) = Gate::new();
    let reducer = Reducer::new(Arc::new(gate), 0).unwrap();
    several_grads(7).into_iter().for_each(|grads| reducer.push(grads));
    begun.recv_timeout(LONG).unwrap();
    // Its sum is under way, and two more wait.
    drop(reducer);
    end.send(()).unwrap();
    // The thread ends, and the gate with it.
    assert_eq!(begun.recv_timeout(LONG), Err(mpsc::RecvTimeoutError::Disconnected));
}

#[derive(Debug)]
struct Panics;

impl AllReduce for Panics {
    fn sum_f64(&self, _: &mut [f64]) -> Result<(), Error> {
        panic!("a worker's own mistake")
    }

    fn sum_f32(&self, _: &mut [f32]) -> Result<(), Error> {
        panic!("a worker's own mistake")
    }
}

#[test]
fn a_sum_that_fails_is_an_error_at_its_end() {
    let mut group = ThreadWorker::group(2, Duration::from_secs(60));
    let left = group.pop();
    let reducer = Reducer::new(Arc::new(group.remove(0)), BUCKET).unwrap();
    several_grads(1).into_iter().for_each(|grads| reducer.push(grads));
    drop(left);
    refused!(reducer.finish(), Error::AllReduce { .. }, "worker 1 is gone");
    assert!(reducer.finish().unwrap().is_empty());

    let mut group = ThreadWorker::group(2, Duration::from_millis(50));
    let _late = group.pop();
    let reducer = Reducer::new(Arc::new(group.remove(0)), 0).unwrap();
    several_grads(1).into_iter().for_each(|grads| reducer.push(grads));
    refused!(reducer.finish(), Error::AllReduce { .. }, "worker 1 did not come within 50ms");

    let reducer = Reducer::new(Arc::new(Panics), 0).unwrap();
    several_grads(1).into_iter().for_each(|grads| reducer.push(grads));
    refused!(
        reducer.finish(),
        Error::AllReduce { .. },
        "panicked in a sum: a worker's own mistake"
    );
}

#[test]
fn slopes_follow_the_reference() {
    // A layer of one channel that hands x on to the activation.
    let between = (-4000..4000).map(|i| i as f32 / 128.0 + 1.0 / 1024.0);
    let kinks = [0.0, -0.0, 3.0, -3.0, 6.0, -0.75, 1.1, 20.0, 1e4, -1e4];
    let x: Vec<f32> = between.chain(kinks).collect();
    let src = ArrayD::from_shape_vec(IxDyn(&[1, 1, x.len()]), x.clone()).unwrap();
    let ones = src.mapv(|_| 1.0);
    for activation in [
        Activation::Relu,
        Activation::Relu6,
        Activation::Clip { lo: -0.75, hi: 1.1 },
        Activation::LeakyRelu { alpha: 0.2 },
        Activation::LeakyRelu { alpha: -0.5 },
        Activation::Elu { alpha: 0.7 },
        Activation::Sigmoid,
        Activation::Tanh,
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::HardSigmoid,
        Activation::HardSwish,
        Activation::Softplus,
        Activation::Mish,
    ] {
        // Alone, of which bits may be enough, and before a step of slope one, of which values are kept.
        let alone = Pointwise::new(Array2::eye(1)).activation(activation);
        for layer in [alone.clone(), alone.prelu(vec![1.0])] {
            let mut a = params(&layer);
            let mut grads = a.grads();
            let (_, workspace) = a.forward(&src).unwrap();
            let d = a.backward(&src, workspace, &ones, &mut grads, Accumulate::Set).unwrap();
            for (&x, &d) in x.iter().zip(&d) {
                let want = reference::slope(activation, f64::from(x));
                let err = (f64::from(d) - want).abs();
                assert!(err <= 2e-6, "{activation:?} at {x}: {d} instead of {want}");
            }
        }
    }
}

#[test]
fn the_references_gradients_are_pytorchs() {
    let fixtures = Fixtures::training();
    let mut compared = 0;
    for case in fixtures.cases() {
        let layer = case.layer();
        let d_dst = fixtures.d_dst(&case.name);
        let got = reference::backward(&layer, &case.inputs(), Statistics::Batch, d_dst.view());
        let got = got.unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let mut check = |what: &str, got: &[f64], want: ArrayD<f64>| {
            assert_eq!(got.len(), want.len(), "{} {what}", case.name);
            for (got, want) in got.iter().zip(&want) {
                let err = (got - want).abs();
                // PyTorch's slope of hard-sigmoid is 1/6 rounded to f32, in f64 too.
                let exact = !case.name.contains("hard_sigmoid");
                let tolerance = if exact { 1e-11 } else { f64::from(f32::EPSILON) };
                assert!(
                    err <= tolerance * want.abs().max(1.0),
                    "{} {what}: {got}, {want}",
                    case.name
                );
            }
            compared += 1;
        };
        let flat = |d: &ArrayD<f64>| d.iter().copied().collect::<Vec<_>>();
        let wide = |tensor: &str| fixtures.wide(&case.name, tensor);
        check("dst", &flat(&got.dst), case.dst.clone());
        for (i, d) in got.d_sources.iter().enumerate() {
            check("d_src", &flat(d), wide(&format!("d_src{i}")).unwrap());
        }
        check("d_weight", got.parameter(name::WEIGHT).unwrap(), wide("d_weight").unwrap());
        for (stage, source) in case
            .source_stages
            .iter()
            .map(|stage| (stage, true))
            .chain(case.stages.iter().map(|stage| (stage, false)))
        {
            let names: &[(&str, &str)] = match (stage.name.as_str(), source) {
                ("bias", _) => &[("bias", name::BIAS)],
                ("affine", _) => &[("scale", name::SRC_SCALE), ("shift", name::SRC_SHIFT)],
                ("batch_norm", false) => &[("gamma", name::GAMMA), ("beta", name::BETA)],
                ("batch_norm", true) => &[("gamma", name::SRC_GAMMA), ("beta", name::SRC_BETA)],
                ("layer_norm" | "layer_norm_all", _) => {
                    &[("gamma", name::LN_GAMMA), ("beta", name::LN_BETA)]
                }
                ("prelu", _) => &[("slope", name::SLOPE)],
                _ => &[],
            };
            for (operand, parameter) in names {
                if let Some(tensor) = stage.name_of(operand) {
                    let want = wide(&format!("d_{tensor}")).unwrap();
                    check(parameter, got.parameter(parameter).unwrap(), want);
                }
            }
            if stage.name == "residual" {
                let want = wide(&format!("d_{}", stage.name_of("residual").unwrap())).unwrap();
                // PyTorch's has the convolved channels only.
                let start = case.partial.as_ref().map_or(0, |range| range.start);
                let d = got.d_residual.as_ref().unwrap();
                let end = start + want.shape()[1];
                check(
                    "d_residual",
                    &flat(&d.slice_axis(Axis(1), Slice::from(start..end)).to_owned()),
                    want,
                );
            }
            if stage.name == "gate" {
                let d = got.d_gate.as_ref().unwrap().clone().into_dyn();
                check("d_gate", &flat(&d), wide("d_gate").unwrap());
            }
            if stage.name == "batch_norm" {
                let count = (case.dst.len() / case.dst.shape()[1]) as f64;
                let names = match source {
                    true => [("mean", name::SRC_RUNNING_MEAN), ("var", name::SRC_RUNNING_VAR)],
                    false => [("mean", name::RUNNING_MEAN), ("var", name::RUNNING_VAR)],
                };
                for (operand, statistic) in names {
                    let before = stage.tensor(operand).unwrap();
                    let unbiased = if operand == "var" { count / (count - 1.0) } else { 1.0 };
                    let after: Vec<f64> = before
                        .iter()
                        .zip(got.statistic(statistic).unwrap())
                        .map(|(&old, batch)| 0.9 * f64::from(old) + 0.1 * batch * unbiased)
                        .collect();
                    let new = format!("new_{}", stage.name_of(operand).unwrap());
                    check(statistic, &after, wide(&new).unwrap());
                }
            }
        }
    }
    assert!(compared > 150, "only {compared} tensors");
}

#[test]
fn nothing_to_train_on_is_no_accident() {
    let norm = || BatchNorm::new(vec![0.0; 4], vec![1.0; 4]).affine(vec![1.0; 4], vec![0.0; 4]);
    let plain = || Pointwise::new(Array2::from_elem((4, 3), 0.5)).batch_norm(norm()).relu();
    for (layer, shape, d_shape) in
        [(plain(), [0, 3, 4, 8], [0, 4, 4, 8]), (plain().stride(2), [2, 3, 0, 8], [2, 4, 0, 4])]
    {
        for reduce in [false, true] {
            let mut a = params(&layer);
            if reduce {
                let group = ThreadWorker::group(1, Duration::MAX);
                a.set_all_reduce(Some(Arc::new(group.into_iter().next().unwrap())));
            }
            let src = ArrayD::<f32>::zeros(IxDyn(&shape));
            let mut grads = a.grads();
            let (dst, workspace) = a.forward(&src).unwrap();
            assert_eq!(dst.shape(), d_shape);
            let d_dst = ArrayD::<f32>::zeros(IxDyn(&d_shape));
            let d_src = a.backward(&src, workspace, &d_dst, &mut grads, Accumulate::Set).unwrap();
            assert_eq!(d_src.shape(), shape);
            assert_eq!(a.layer(), &layer, "running statistics stay");
            grads.visit(|name, _, values| assert!(values.iter().all(|&d| d == 0.0), "{name}"));
        }
    }
}

#[test]
fn a_16_bit_layer_is_not_updated_beyond_its_range() {
    let layer = Pointwise::new(Array2::from_elem((2, 2), 0.5));
    let ready = layer.prepare_as::<pointwise::f16>(&Device::cpu(), Default::default()).unwrap();
    let mut a = params(&layer);
    a.visit_mut(|_, _, values| values.fill(1e5));
    refused!(ready.update(&a), Error::ParameterValue { .. }, "100000");
    let src = ndarray::Array2::from_elem((1, 2), pointwise::f16::ONE);
    let dst = ready.forward(&src).unwrap();
    assert!(dst.iter().all(|&y| y == pointwise::f16::ONE), "as it was");
}

#[test]
fn branches_are_their_layers_and_one_gradient_by_src() {
    for last in [false, true] {
        for shape in [vec![2, 20, 9, 7], vec![3, 20, 33, 29], vec![70, 20], vec![1, 20, 1001]] {
            check_branches(&branches_tensors(&shape, last), &Device::cpu()).unwrap();
        }
    }
}

/// Tensors in the middle of others, backwards; nothing around them is written.
#[test]
fn branches_read_and_write_any_strides() {
    const CANARY: f32 = -77.25;
    let inside = || s![.., 3..23, .., ..;-1];
    let layer = |c_out| Pointwise::new(weight(c_out, 20)).batch_norm(norm(c_out)).silu();
    let (src, d_dst) = (random(&[2, 20, 9, 7], 1), random(&[2, 32, 9, 7], 2));
    let src: Array4<f32> = src.into_dimensionality().unwrap();
    let mut around = Array4::from_elem((2, 27, 9, 7), CANARY);
    around.slice_mut(inside()).assign(&src);
    let run = |src: ArrayView4<'_, f32>, d_src: ArrayViewMut4<'_, f32>| {
        let mut branches = Branches::new(vec![params(&layer(24)), params(&layer(8))]).unwrap();
        let mut grads = branches.grads();
        // Both results are one concatenation, and so is the gradient by them.
        let mut dst = Array4::from_elem((2, 9, 7, 32), f32::NAN);
        let view = nhwc_mut(dst.view_mut());
        let (mut a, mut b) = view.split_at(Axis(1), 24);
        let workspaces = branches.call(&src).run_into(&mut [&mut a, &mut b]).unwrap();
        let (a, b) = d_dst.view().split_at(Axis(1), 24);
        let mut d_src = d_src;
        let call = branches.backward_call(&src, workspaces, &[&a, &b]);
        call.d_src(&mut d_src).run(&mut grads).unwrap();
        (dst, grads)
    };
    let mut want = Array4::from_elem((2, 20, 9, 7), f32::NAN);
    let (dst, grads) = run(src.view(), want.view_mut());
    let mut d_around = Array4::from_elem((2, 27, 9, 7), CANARY);
    let (same, again) = run(around.slice(inside()), d_around.slice_mut(inside()));
    let mut got = d_around.slice_mut(inside());
    let close = |a: &f32, b: &f32| (a - b).abs() <= 1e-5 * b.abs().max(1.0);
    assert!(got.iter().zip(&want).all(|(a, b)| close(a, b)), "d_src");
    assert!(same.iter().zip(&dst).all(|(a, b)| close(a, b)), "dst");
    for (a, b) in again.iter().zip(&grads) {
        a.visit(|name, _, a| {
            let largest = b.get(name).unwrap().iter().fold(0.0f32, |a, b| a.max(b.abs()));
            let pairs = a.iter().zip(b.get(name).unwrap());
            pairs.for_each(|(a, b)| assert!((a - b).abs() <= 1e-5 * largest, "{name}: {a}, {b}"));
        });
    }
    got.fill(CANARY);
    assert!(d_around.iter().all(|&x| x == CANARY), "written beside d_src");
}

#[test]
fn branches_that_do_not_fit_are_refused() {
    refused!(Branches::new(Vec::new()), Error::NoLayers, "no layers");
    let (layer, src) = simple();
    let two = || Branches::new(vec![params(&layer), params(&layer.clone().residual())]).unwrap();
    let residual = random(&[2, 6, 4, 3], 2);
    let forward = |branches: &mut Branches| {
        let (dsts, workspaces) = branches.call(&src).residual(1, &residual).run().unwrap();
        let [a, b] = <[_; 2]>::try_from(dsts).unwrap();
        (a, b, workspaces)
    };

    let mut branches = two();
    refused!(branches.forward(&src), Error::MissingInput { .. }, "residual");
    refused!(
        branches.call(&src).residual(2, &residual).run(),
        Error::ParameterValue { .. },
        "2 of 2"
    );
    let (mut dst, mut other) = (residual.clone(), residual.clone());
    let call = branches.call(&src).residual(1, &residual);
    refused!(call.run_into(&mut [&mut dst]), Error::Shape { .. }, "the list of dsts has shape [1]");
    let (a, b) = unsafe_views(&mut other);
    let (mut a, mut b) = (a, b);
    let call = branches.call(&src).residual(1, &residual);
    refused!(call.run_into(&mut [&mut a, &mut b]), Error::Aliased { .. }, "another branch");

    // A forward pass that fails in one layer moves the statistics of none.
    let mut uneven = Branches::new(vec![params(&layer), params(&Pointwise::new(weight(6, 4)))]);
    let uneven = uneven.as_mut().unwrap();
    refused!(uneven.forward(&src), Error::Channels { .. }, "4");
    let mut bad = params(&layer);
    bad.visit_mut(|name, _, values| {
        if name == name::WEIGHT {
            values.fill(f32::NAN);
        }
    });
    let mut uneven = Branches::new(vec![params(&layer), bad]).unwrap();
    refused!(uneven.forward(&src), Error::NonFinite { .. }, "of the batch at bn");
    assert_eq!(uneven.layers()[0].layer(), params(&layer).layer());
    assert_eq!(uneven.layers()[0].num_batches_tracked(), 0);

    // Backward, nothing is written before everything fits.
    let mut grads = branches.grads();
    grads.iter_mut().for_each(|grads| grads.visit_mut(|_, _, values| values.fill(7.0)));
    let mut d_src = ArrayD::from_elem(src.raw_dim(), 7.0);
    let wrong = random(&[2, 6, 4, 4], 1);
    let (a, b, workspaces) = forward(&mut branches);
    let call = branches.backward_call(&src, workspaces, &[&a, &wrong]).residual(1, &residual);
    let result = call.d_src(&mut d_src).run(&mut grads);
    refused!(result, Error::Shape { tensor: "d_dst", .. }, "[2, 6, 4, 4]");
    let (.., mut workspaces) = forward(&mut branches);
    workspaces.swap(0, 1);
    let call = branches.backward_call(&src, workspaces, &[&a, &b]).residual(1, &residual);
    refused!(call.d_src(&mut d_src).run(&mut grads), Error::Workspace { .. }, "another layer");
    let (.., mut workspaces) = forward(&mut branches);
    workspaces.truncate(1);
    let call = branches.backward_call(&src, workspaces, &[&a, &b]).residual(1, &residual);
    let result = call.d_src(&mut d_src).run(&mut grads);
    refused!(result, Error::Shape { tensor: "the list of workspaces", .. }, "[1], expected [2]");
    let (.., workspaces) = forward(&mut branches);
    let call = branches.backward_call(&src, workspaces, &[&a]).residual(1, &residual);
    let result = call.d_src(&mut d_src).run(&mut grads);
    refused!(result, Error::Shape { tensor: "the list of d_dsts", .. }, "[1], expected [2]");
    let (.., workspaces) = forward(&mut branches);
    let call = branches.backward_call(&src, workspaces, &[&a, &b]).residual(1, &residual);
    let result = call.d_src(&mut d_src).run(&mut grads[..1]);
    refused!(result, Error::Shape { tensor: "the list of grads", .. }, "[1], expected [2]");
    let (.., workspaces) = forward(&mut branches);
    let mut d_residual = b.clone();
    let call = branches.backward_call(&src, workspaces, &[&a, &b]).residual(1, &residual);
    let result = call.d_residual(4, &mut d_residual).run(&mut grads);
    refused!(result, Error::ParameterValue { .. }, "4 of 2");
    // The gradient by the one's residual over the gradient by the other's result.
    let (.., workspaces) = forward(&mut branches);
    let (d_dst, mut d_residual) = unsafe_view(&mut d_residual);
    let call = branches.backward_call(&src, workspaces, &[&d_dst, &b]).residual(1, &residual);
    let result = call.d_src(&mut d_src).d_residual(1, &mut d_residual).run(&mut grads);
    refused!(result, Error::Aliased { .. }, "another branch");
    assert!(d_src.iter().all(|&x| x == 7.0), "nothing is written");
    for grads in &grads {
        grads.visit(|name, _, values| assert!(values.iter().all(|&x| x == 7.0), "{name}"));
    }
    let (.., workspaces) = forward(&mut branches);
    let call = branches.backward_call(&src, workspaces, &[&a, &b]).residual(1, &residual);
    call.run(&mut grads).unwrap();
    assert_eq!(branches.layers()[1].num_batches_tracked(), 8);
    let said = branches.workspace_bytes(src.shape()).unwrap();
    assert_eq!(said, 2 * 4 * residual.len());
}

/// The same memory twice to write, as C callers may hand it over.
fn unsafe_views(memory: &mut ArrayD<f32>) -> (TensorMut<'_>, TensorMut<'_>) {
    let (shape, strides) = (memory.shape().to_vec(), memory.strides().to_vec());
    let ptr = memory.as_mut_ptr();
    // SAFETY: the call refuses the two before it touches them.
    let view = || unsafe { TensorMut::from_raw_parts(ptr, Place::Host, &shape, &strides).unwrap() };
    (view(), view())
}
