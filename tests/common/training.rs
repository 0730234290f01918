//! A layer trained for a step on any device, compared with the f64 reference.

use ndarray::{Array2, ArrayD, Dimension, IxDyn};
use pointwise::reference::{self, Gradients, Inputs};
use pointwise::train::{Accumulate, Branches, Grads, Options, Params, Statistics, name};
use pointwise::{Activation, AsTensor, BatchNorm, Device, Pointwise, SourceStage, Stage};

use super::common::{Case, channels_last};

/// A gradient that looks like nothing else: no two channels or positions alike.
pub fn d_dst(shape: &[usize]) -> ArrayD<f32> {
    let mut next = 0u32;
    ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (next >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// Everything that a run gives.
pub struct Got {
    pub dst: ArrayD<f32>,
    pub d_sources: Vec<ArrayD<f32>>,
    pub d_residual: Option<ArrayD<f32>>,
    pub d_gate: Option<ArrayD<f32>>,
    pub grads: Grads,
    pub params: Params,
}

pub struct Tensors {
    pub sources: Vec<ArrayD<f32>>,
    pub residual: Option<ArrayD<f32>>,
    pub gate: Option<ArrayD<f32>>,
}

impl Tensors {
    pub fn of(case: &Case, last: bool) -> Self {
        let order = |t: &ArrayD<f32>| if last { channels_last(t) } else { t.clone() };
        Tensors {
            sources: case.sources.iter().map(order).collect(),
            residual: case.residual().map(order),
            gate: case.gate().cloned(),
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            sources: self.sources.iter().map(|t| t.view()).collect(),
            residual: self.residual.as_ref().map(|t| t.view()),
            gate: self.gate.as_ref().map(|t| t.view()),
        }
    }
}

pub fn run(
    layer: &Pointwise,
    tensors: &Tensors,
    options: Options,
    device: &Device,
) -> pointwise::Result<Got> {
    let mut params = Params::with_options(layer, device, options)?;
    let mut grads = params.grads();
    let (first, more) = tensors.sources.split_first().unwrap();
    let mut call = params.call(first);
    for source in more {
        call = call.concat(source);
    }
    if let Some(residual) = &tensors.residual {
        call = call.residual(residual);
    }
    if let Some(gate) = &tensors.gate {
        call = call.gate(gate);
    }
    let (dst, workspace) = call.run()?;
    let d_dst = d_dst(dst.shape());
    let nans = |t: &ArrayD<f32>| t.mapv(|_| f32::NAN);
    let mut d_sources: Vec<_> = tensors.sources.iter().map(nans).collect();
    let mut d_residual = tensors.residual.as_ref().map(nans);
    let mut d_gate = tensors.gate.as_ref().map(nans);
    grads.visit_mut(|_, _, values| values.fill(f32::NAN));
    let mut call = params.backward_call(first, workspace, &d_dst);
    for source in more {
        call = call.concat(source);
    }
    for d in &mut d_sources {
        call = call.d_src(d);
    }
    if let (Some(residual), Some(d)) = (&tensors.residual, &mut d_residual) {
        call = call.residual(residual).d_residual(d);
    }
    if let (Some(gate), Some(d)) = (&tensors.gate, &mut d_gate) {
        call = call.gate(gate).d_gate(d);
    }
    call.run(&mut grads)?;
    Ok(Got { dst, d_sources, d_residual, d_gate, grads, params })
}

pub fn largest<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    values.into_iter().fold(0.0, |a, b| a.max(b.abs()))
}

/// The values of a result under their names, in f64.
pub fn named(want: &Gradients) -> Vec<(String, Vec<f64>)> {
    let flat = |t: &ArrayD<f64>| t.iter().copied().collect::<Vec<_>>();
    let mut all = vec![("dst".into(), flat(&want.dst))];
    let sources = want.d_sources.iter().enumerate();
    all.extend(sources.map(|(i, d)| (format!("d_src{i}"), flat(d))));
    all.extend(want.d_residual.iter().map(|d| ("d_residual".into(), flat(d))));
    all.extend(want.d_gate.iter().map(|d| ("d_gate".into(), d.iter().copied().collect())));
    all.extend(want.parameters.iter().map(|(name, values)| (name.to_string(), values.clone())));
    all
}

impl Got {
    pub fn named(&self) -> Vec<(String, Vec<f64>)> {
        let wide = |t: &ArrayD<f32>| t.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let mut all = vec![("dst".into(), wide(&self.dst))];
        let sources = self.d_sources.iter().enumerate();
        all.extend(sources.map(|(i, d)| (format!("d_src{i}"), wide(d))));
        all.extend(self.d_residual.iter().map(|d| ("d_residual".into(), wide(d))));
        all.extend(self.d_gate.iter().map(|d| ("d_gate".into(), wide(d))));
        self.grads.visit(|name, _, values| {
            all.push((name.into(), values.iter().map(|&x| f64::from(x)).collect()));
        });
        all
    }
}

/// The largest error in units of what rounding may do, and what has it.
///
/// A gradient is a chain of sums of `terms` products in all, each of which may be off by that many
/// halves of an ulp of its largest term. A normalisation takes away what is common to all values,
/// so that sums may cancel: their terms are as large as those of `uncancelled`, the gradients with
/// the same statistics, but frozen.
pub fn worst(
    got: &[(String, Vec<f64>)],
    want: &Gradients,
    uncancelled: &Gradients,
    terms: usize,
    steepest: f64,
) -> (f64, String) {
    let (want, uncancelled) = (named(want), named(uncancelled));
    let find = |all: &[(String, Vec<f64>)], name: &str| {
        all.iter().find(|(other, _)| other == name).map(|(_, values)| values.clone())
    };
    let mut worst = (0.0, String::new());
    assert_eq!(got.len(), want.len(), "everything is compared");
    for (name, got) in got {
        let want = find(&want, name).unwrap_or_else(|| panic!("the reference has no {name}"));
        assert_eq!(got.len(), want.len(), "{name}");
        let terms_of = find(&uncancelled, name).unwrap_or_default();
        let scale = largest(&want).max(largest(&terms_of)) * steepest;
        let unit = f64::from(f32::EPSILON) * terms as f64 * scale;
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let err = if got == want { 0.0 } else { (got - want).abs() / unit };
            // NaN is the worst of all.
            if err > worst.0 || err.is_nan() {
                let err = if err.is_nan() { f64::INFINITY } else { err };
                worst = (err, format!("{name}[{i}] = {got} instead of {want}"));
            }
        }
    }
    worst
}

/// The layer with the statistics of a batch as its running ones.
pub fn with_statistics(layer: &Pointwise, of: &Gradients) -> Pointwise {
    let mut params = Params::new(layer, &Device::cpu()).unwrap();
    params.visit_mut(|name, _, values| {
        if let Some(batch) = of.statistic(name) {
            let batch = batch.iter().map(|&x| x as f32);
            values.iter_mut().zip(batch).filter(|(_, b)| b.is_finite()).for_each(|(x, b)| *x = b);
        }
    });
    params.layer().clone()
}

pub fn trainable(case: &Case) -> bool {
    case.repeated_stage().is_none() && !case.name.starts_with("not_finite")
}

/// Compares a run with the reference; the error as [`worst`] counts it.
pub fn compare(
    layer: &Pointwise,
    tensors: &Tensors,
    statistics: Statistics,
    device: &Device,
) -> pointwise::Result<(f64, String)> {
    let options = Options { statistics, ..Options::default() };
    let got = run(layer, tensors, options, device)?;
    error_of(&got, layer, tensors, statistics, device)
}

/// The error of what a run of a layer gave.
pub fn error_of(
    got: &Got,
    layer: &Pointwise,
    tensors: &Tensors,
    statistics: Statistics,
    device: &Device,
) -> pointwise::Result<(f64, String)> {
    let inputs = tensors.inputs();
    let d_dst = d_dst(got.dst.shape());
    let want = reference::backward(layer, &inputs, statistics, d_dst.view())?;
    let frozen = with_statistics(layer, &want);
    let uncancelled = reference::backward(&frozen, &inputs, Statistics::Frozen, d_dst.view())?;
    let positions = got.dst.len() / got.dst.shape()[1].max(1);
    let terms = terms(layer, got.dst.shape());
    // One channel has no deviation: its layer norm divides by the root of eps.
    let alone = layer.c_out() == 1
        && layer.stages().iter().any(|stage| matches!(stage, Stage::LayerNorm(_)));
    let steepest = if alone { 1e-5f64.sqrt().recip() } else { 1.0 };
    let worst = worst(&got.named(), &want, &uncancelled, terms, steepest);

    // The running statistics.
    let count = positions as f64;
    for (mean, var) in
        [(name::RUNNING_MEAN, name::RUNNING_VAR), (name::SRC_RUNNING_MEAN, name::SRC_RUNNING_VAR)]
    {
        let before = Params::new(layer, device)?;
        for name in [mean, var] {
            let (Some(before), Some(after)) = (before.get(name), got.params.get(name)) else {
                continue;
            };
            let unbiased = if name == var { count / (count - 1.0) } else { 1.0 };
            for (c, (&before, &after)) in before.iter().zip(after).enumerate() {
                let expected = match want.statistic(name).filter(|_| count > 0.0) {
                    Some(batch) => 0.9 * f64::from(before) + 0.1 * batch[c] * unbiased,
                    None => f64::from(before),
                };
                let err = (f64::from(after) - expected).abs();
                assert!(err <= 1e-5 * expected.abs().max(1.0), "{name}[{c}]: {after}, {expected}");
            }
        }
    }
    Ok(worst)
}

/// Products that the sums of a layer's passes have in all.
pub fn terms(layer: &Pointwise, dst: &[usize]) -> usize {
    layer.c_in() + layer.c_out() + dst.iter().product::<usize>() / dst[1].max(1)
}

/// Layers for one source of 20 channels, of every kind of gradient by src: straight to where it belongs,
/// through source stages, of some channels, of some positions.
pub fn branches() -> Vec<Pointwise> {
    let plain = |c_out, c_in| Pointwise::new(weight(c_out, c_in));
    vec![
        plain(24, 20).batch_norm(norm(24)).relu(),
        plain(12, 20).stride(2).bias(vector(12, 2)).relu6(),
        plain(8, 20)
            .source_batch_norm(norm(20))
            .source_activation(Activation::Relu)
            .gate()
            .bias(vector(8, 2))
            .residual()
            .silu(),
        plain(6, 6).partial(3..9).batch_norm(norm(6)).residual(),
        plain(10, 5).groups(2).partial(5..15).stride(2),
    ]
}

/// What branches on one source give, the sum of their gradients by it first.
pub struct Together {
    pub d_src: ArrayD<f32>,
    /// Without a gradient by the source.
    pub of_layers: Vec<Got>,
}

/// What branches take.
pub fn branches_tensors(shape: &[usize], last: bool) -> Vec<Tensors> {
    branches().iter().map(|layer| large_tensors(layer, shape, last)).collect()
}

/// Runs branches into gradients that begin with what `before` has, or NaN.
pub fn run_branches(
    tensors: &[Tensors],
    device: &Device,
    before: Option<&Together>,
) -> pointwise::Result<Together> {
    let layers = branches().iter().map(|l| Params::new(l, device)).collect::<Result<_, _>>()?;
    let mut branches = Branches::new(layers)?;
    let mut grads = branches.grads();
    let src = &tensors[0].sources[0];
    let mut call = branches.call(src);
    for (i, of_layer) in tensors.iter().enumerate() {
        if let Some(residual) = &of_layer.residual {
            call = call.residual(i, residual);
        }
        if let Some(gate) = &of_layer.gate {
            call = call.gate(i, gate);
        }
    }
    let (dsts, workspaces) = call.run()?;
    let d_dsts: Vec<_> = dsts.iter().map(|dst| d_dst(dst.shape())).collect();
    let d_dsts: Vec<_> = d_dsts.iter().map(|d| d as &dyn AsTensor).collect();
    let nans = |t: &ArrayD<f32>| t.mapv(|_| f32::NAN);
    let mut d_src = before.map_or_else(|| nans(src), |before| before.d_src.clone());
    let mut d_seconds: Vec<[Option<ArrayD<f32>>; 2]> = match before {
        Some(before) => {
            before.of_layers.iter().map(|g| [g.d_residual.clone(), g.d_gate.clone()]).collect()
        }
        None => {
            tensors.iter().map(|t| [&t.residual, &t.gate].map(|t| t.as_ref().map(nans))).collect()
        }
    };
    for (i, grads) in grads.iter_mut().enumerate() {
        match before {
            Some(before) => *grads = before.of_layers[i].grads.clone(),
            None => grads.visit_mut(|_, _, values| values.fill(f32::NAN)),
        }
    }
    let accumulate = if before.is_some() { Accumulate::Add } else { Accumulate::Set };
    let mut call = branches.backward_call(src, workspaces, &d_dsts).d_src(&mut d_src);
    call = call.accumulate(accumulate).accumulate_inputs(accumulate);
    for (i, (of_layer, d)) in tensors.iter().zip(&mut d_seconds).enumerate() {
        let [d_residual, d_gate] = d;
        if let (Some(residual), Some(d)) = (&of_layer.residual, d_residual) {
            call = call.residual(i, residual).d_residual(i, d);
        }
        if let (Some(gate), Some(d)) = (&of_layer.gate, d_gate) {
            call = call.gate(i, gate).d_gate(i, d);
        }
    }
    call.run(&mut grads)?;
    let of_layers = dsts.into_iter().zip(d_seconds).zip(grads).zip(branches.into_layers());
    let of_layers = of_layers.map(|(((dst, [d_residual, d_gate]), grads), params)| Got {
        dst,
        d_sources: Vec::new(),
        d_residual,
        d_gate,
        grads,
        params,
    });
    Ok(Together { d_src, of_layers: of_layers.collect() })
}

/// The reference's gradient by the source of branches, and how far rounding may be off.
pub struct SumOfBranches {
    d_src: ArrayD<f64>,
    tolerance: f64,
}

impl SumOfBranches {
    pub fn of(layers: &[Pointwise], tensors: &[Tensors]) -> pointwise::Result<Self> {
        let mut d_src = ArrayD::zeros(tensors[0].sources[0].raw_dim());
        let mut tolerance = 0.0;
        for (layer, tensors) in layers.iter().zip(tensors) {
            let inputs = tensors.inputs();
            let dst = layer.prepare(&Device::cpu())?.dst_shape(tensors.sources[0].shape())?;
            let d = d_dst(&dst);
            let want = reference::backward(layer, &inputs, Statistics::Batch, d.view())?;
            let frozen = with_statistics(layer, &want);
            let terms_of = reference::backward(&frozen, &inputs, Statistics::Frozen, d.view())?;
            let scale = largest(&want.d_sources[0]).max(largest(&terms_of.d_sources[0]));
            tolerance += f64::from(f32::EPSILON) * terms(layer, &dst) as f64 * scale;
            d_src += &want.d_sources[0];
        }
        Ok(SumOfBranches { d_src, tolerance })
    }

    /// That a gradient is this one, so many times.
    pub fn check(&self, what: &str, d_src: &ArrayD<f32>, times: f64) {
        assert_eq!(d_src.shape(), self.d_src.shape(), "{what}");
        for ((at, &want), &got) in self.d_src.indexed_iter().zip(d_src) {
            let err = (f64::from(got) - times * want).abs();
            let most = times * self.tolerance;
            assert!(err <= most, "{what}{:?}: {got}, {}", at.slice(), times * want);
        }
    }
}

/// Checks branches against each layer run for itself, whose gradients by src are then added, and that
/// sum against the reference's.
pub fn check_branches(tensors: &[Tensors], device: &Device) -> pointwise::Result<()> {
    let got = run_branches(tensors, device, None)?;
    let more = run_branches(tensors, device, Some(&got))?;
    let again = run_branches(tensors, device, None)?;
    let twice = |t: &Option<ArrayD<f32>>| t.as_ref().map(|t| t.mapv(|x| 2.0 * x));
    for (i, layer) in branches().iter().enumerate() {
        let (of_layer, more) = (&got.of_layers[i], &more.of_layers[i]);
        let alone = run(layer, &tensors[i], Options::default(), device)?;
        assert!(of_layer.dst == alone.dst && of_layer.grads == alone.grads, "branch {i}");
        assert!(of_layer.d_residual == alone.d_residual, "branch {i}: d_residual");
        assert!(of_layer.d_gate == alone.d_gate, "branch {i}: d_gate");
        assert!(of_layer.params.layer() == alone.params.layer(), "branch {i}: statistics");
        more.grads.visit(|name, _, values| {
            let once = alone.grads.get(name).unwrap();
            let largest = once.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            let mut pairs = values.iter().zip(once);
            let close = pairs.all(|(x, once)| (x - 2.0 * once).abs() <= 1e-5 * largest);
            assert!(close, "branch {i}: {name} added");
        });
        assert!(more.d_residual == twice(&alone.d_residual), "branch {i}: d_residual added");
        assert!(more.d_gate == twice(&alone.d_gate), "branch {i}: d_gate added");

        let (err, at) = error_of(&alone, layer, &tensors[i], Statistics::Batch, device)?;
        assert!(err <= 1.0, "branch {i}: {err}: {at}");
    }
    let want = SumOfBranches::of(&branches(), tensors)?;
    want.check("d_src", &got.d_src, 1.0);
    want.check("d_src added", &more.d_src, 2.0);
    assert!(again.d_src == got.d_src, "the same bits from run to run");
    Ok(())
}

pub const ACTIVATIONS: [Activation; 14] = [
    Activation::Relu,
    Activation::Relu6,
    Activation::Clip { lo: -0.5, hi: 2.0 },
    Activation::LeakyRelu { alpha: 0.01 },
    Activation::Elu { alpha: 1.5 },
    Activation::Sigmoid,
    Activation::Tanh,
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::HardSigmoid,
    Activation::HardSwish,
    Activation::Softplus,
    Activation::Mish,
];

/// That gradients through smooth activations of large and of infinite values are the reference's.
pub fn check_slopes(device: &Device) -> Result<(), String> {
    const X: [f32; 12] = [
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        1e14,
        -1e14,
        1e30,
        -1e30,
        16.0,
        -16.0,
        120.0,
        -120.0,
        0.5,
    ];
    let smooth = |activation: &Activation| {
        !matches!(activation.name(), "relu" | "relu6" | "clip" | "leaky_relu" | "hard_sigmoid")
    };
    for activation in ACTIVATIONS.into_iter().filter(smooth) {
        let layer = Pointwise::new(Array2::ones((1, 1))).activation(activation);
        let src = Array2::from_shape_vec((X.len(), 1), X.to_vec()).unwrap();
        let mut params = Params::new(&layer, device).unwrap();
        let (dst, workspace) = params.forward(&src).unwrap();
        let (mut d_src, d_dst) = (src.clone(), Array2::<f32>::ones(dst.dim()));
        let call = params.backward_call(&src, workspace, &d_dst).d_src(&mut d_src);
        call.run(&mut params.grads()).unwrap();
        for (&got, x) in d_src.iter().zip(X) {
            let want = reference::slope(activation, x.into());
            if !((f64::from(got) - want).abs() <= 1e-5 || got.is_nan() && want.is_nan()) {
                return Err(format!("{activation:?} at {x}: {got}, expected {want}"));
            }
        }
    }
    Ok(())
}

/// Values in -1..1 that look like nothing else.
pub fn random(shape: &[usize], seed: u32) -> ArrayD<f32> {
    let mut next = seed.wrapping_mul(2_654_435_761);
    ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (next >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

pub fn vector(len: usize, seed: u32) -> Vec<f32> {
    random(&[len], seed).iter().copied().collect()
}

pub fn weight(rows: usize, k: usize) -> Array2<f32> {
    random(&[rows, k], 7).into_dimensionality().unwrap() / (k as f32).sqrt()
}

pub fn norm(channels: usize) -> BatchNorm {
    BatchNorm::new(vec![0.0; channels], vec![1.0; channels]).affine(
        vector(channels, 3).iter().map(|x| x + 1.5).collect::<Vec<_>>(),
        vector(channels, 4),
    )
}

pub fn large_tensors(layer: &Pointwise, shape: &[usize], last: bool) -> Tensors {
    let order = |t: ArrayD<f32>| if last { channels_last(&t) } else { t };
    let dst = layer.prepare(&Device::cpu()).unwrap().dst_shape(shape).unwrap();
    let residual = layer.stages().iter().any(|stage| matches!(stage, Stage::Residual));
    let gate = layer.source_stages().iter().any(|stage| matches!(stage, SourceStage::Gate));
    Tensors {
        sources: vec![order(random(shape, 1))],
        residual: residual.then(|| order(random(&dst, 2))),
        gate: gate.then(|| random(&[shape[0], shape[1]], 5)),
    }
}
