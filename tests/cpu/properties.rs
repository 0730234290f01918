//! Random layers on random shapes and strides, in every dtype, against the f64 reference.

use crate::rng::Rng;
use ndarray::{Array2, ArrayD, ArrayViewD, ArrayViewMutD, Axis, IxDyn, Slice};
use pointwise::init::Init;
use pointwise::{
    Activation, BatchNorm, DType, Device, Element, LayerNorm, Pointwise, PrepareOptions,
    SourceStage, Stage, TensorMut, bf16, f16, reference,
};
use proptest::prelude::*;
use std::sync::{Arc, LazyLock};

/// A tensor inside a larger one: axes in random memory order, gaps, steps of either sign.
struct Strided<T = f32> {
    data: ArrayD<T>,
    order: Vec<usize>,
    slices: Vec<Slice>,
}

impl Strided {
    fn new(rng: &mut Rng, shape: &[usize], fill: f32) -> Self {
        let mut order: Vec<usize> = (0..shape.len()).collect();
        match rng.below(4) {
            0 => {}
            1 => order[1..].rotate_left(1),
            _ => (1..order.len()).rev().for_each(|i| order.swap(i, rng.below(i + 1))),
        }
        let plain = rng.chance(60);
        let mut slices = vec![Slice::new(0, None, 1); shape.len()];
        let mut outer = vec![0; shape.len()];
        for (axis, &len) in shape.iter().enumerate() {
            if plain || len == 0 {
                outer[axis] = len;
                continue;
            }
            let (before, after) = (rng.below(3), rng.below(3));
            let step = rng.pick(&[1, 1, 2, 3, -1, -2]);
            let span = (len - 1) * isize::unsigned_abs(step) + 1;
            outer[axis] = before + span + after;
            slices[axis] = Slice::new(before as isize, Some((before + span) as isize), step);
        }
        let memory: Vec<usize> = order.iter().map(|&axis| outer[axis]).collect();
        Strided { data: ArrayD::from_elem(IxDyn(&memory), fill), order, slices }
    }

    fn random(rng: &mut Rng, shape: &[usize]) -> Self {
        let mut tensor = Self::new(rng, shape, f32::NAN);
        tensor.view_mut().iter_mut().for_each(|x| *x = rng.float(-1.0, 1.0));
        tensor
    }

    /// The same tensor of another type, to whose values it is rounded.
    fn rounded<T: Element>(self) -> Strided<T> {
        let Strided { data, order, slices } = self;
        Strided { data: data.mapv(T::from_f32), order, slices }
    }
}

impl<T> Strided<T> {
    fn inverse(&self) -> Vec<usize> {
        let mut inverse = vec![0; self.order.len()];
        self.order.iter().enumerate().for_each(|(i, &axis)| inverse[axis] = i);
        inverse
    }

    fn view(&self) -> ArrayViewD<'_, T> {
        let mut view = self.data.view().permuted_axes(IxDyn(&self.inverse()));
        self.slices
            .iter()
            .enumerate()
            .for_each(|(i, &slice)| view.slice_axis_inplace(Axis(i), slice));
        view
    }

    fn view_mut(&mut self) -> ArrayViewMutD<'_, T> {
        let inverse = self.inverse();
        let mut view = self.data.view_mut().permuted_axes(IxDyn(&inverse));
        self.slices
            .iter()
            .enumerate()
            .for_each(|(i, &slice)| view.slice_axis_inplace(Axis(i), slice));
        view
    }
}

fn activation(rng: &mut Rng) -> Activation {
    rng.pick(&[
        Activation::Relu,
        Activation::Relu6,
        Activation::Clip { lo: -0.5, hi: 0.75 },
        Activation::LeakyRelu { alpha: 0.1 },
        Activation::Elu { alpha: 0.5 },
        Activation::Sigmoid,
        Activation::Tanh,
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::HardSigmoid,
        Activation::HardSwish,
        Activation::Softplus,
        Activation::Mish,
    ])
}

fn batch_norm(rng: &mut Rng, channels: usize) -> BatchNorm {
    let norm =
        BatchNorm::new(rng.vector(channels, -1.0, 1.0), rng.vector(channels, 0.2, 2.0)).eps(1e-3);
    if rng.chance(30) {
        return norm;
    }
    norm.affine(rng.vector(channels, -1.5, 1.5), rng.vector(channels, -1.0, 1.0))
}

struct Case {
    layer: Pointwise,
    sources: Vec<Strided>,
    residual: Option<Strided>,
    gate: Option<Strided>,
    dst: Strided,
    /// How much an error of a sum can grow on its way through the stages.
    growth: f64,
    /// One of the kernels that accept it, or the planner's choice.
    kernel: Option<usize>,
    threads: usize,
}

/// As many threads on any machine.
static POOL: LazyLock<Arc<rayon::ThreadPool>> =
    LazyLock::new(|| Arc::new(rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap()));

/// A case whose weight a type holds.
fn case<T: Element>(seed: u64) -> Case {
    let rng = &mut Rng(seed);
    let n = rng.pick(&[0, 1, 1, 1, 2, 3]);
    let spatial: Vec<usize> =
        (0..rng.below(4)).map(|_| rng.pick(&[0, 1, 2, 3, 5, 7, 8, 9, 14, 19])).collect();
    let mut spatial =
        if rng.chance(90) { spatial.iter().map(|&s| s.max(1)).collect() } else { spatial };
    // The time that a case takes grows with its positions, what it can find hardly does.
    while spatial.iter().product::<usize>() > 600 {
        spatial.pop();
    }
    let groups = rng.pick(&[1, 1, 1, 2, 3]);
    let k = rng.pick(&[1, 2, 3, 7, 16, 33, 100]);
    let rows = rng.pick(&[1, 2, 4, 8, 15, 20, 24, 33, 40, 48, 65, 72, 96]);
    let (c_in, c_out) = (k * groups, rows * groups);
    let stride = rng.pick(&[1, 1, 1, 2, 3]);
    let weight = Array2::from_shape_fn((c_out, k), |_| rng.float(-1.0, 1.0) / (k as f32).sqrt());
    let weight = weight.mapv(|w| T::from_f32(w).to_f32());
    let mut layer = Pointwise::new(weight).groups(groups).stride(stride);
    let mut growth = 1.0;

    let mut total = c_in;
    if rng.chance(20) {
        let start = rng.below(4);
        total = start + c_in + rng.below(4);
        layer = layer.partial(start..start + c_in);
    }
    let mut used = Vec::new();
    for _ in 0..rng.pick(&[0, 0, 0, 1, 2, 3]) {
        let stage = match rng.below(4) {
            0 => SourceStage::BatchNorm(batch_norm(rng, c_in)),
            1 => SourceStage::Affine {
                scale: rng.vector(c_in, -1.5, 1.5),
                shift: rng.vector(c_in, -1.0, 1.0),
            },
            2 => SourceStage::Gate,
            _ => SourceStage::Activation(activation(rng)),
        };
        if !used.contains(&stage.name()) {
            used.push(stage.name());
            layer = layer.source_stage(stage);
            growth *= 2.0;
        }
    }
    let gated = used.contains(&"gate");
    used.clear();
    for _ in 0..rng.below(6) {
        let stage = match rng.below(9) {
            0 => Stage::Bias(rng.vector(c_out, -1.0, 1.0)),
            1 => Stage::BatchNorm(batch_norm(rng, c_out)),
            2 => Stage::PRelu({
                let len = if rng.chance(30) { 1 } else { c_out };
                rng.vector(len, -0.5, 1.0)
            }),
            3 => Stage::Residual,
            4 => {
                let norm =
                    if rng.chance(50) { LayerNorm::over_channels() } else { LayerNorm::over_all() };
                Stage::LayerNorm(
                    norm.eps(0.1)
                        .affine(rng.vector(c_out, -1.5, 1.5), rng.vector(c_out, -1.0, 1.0)),
                )
            }
            5 => {
                let divisors: Vec<usize> = (1..=c_out).filter(|g| c_out % g == 0).collect();
                Stage::ChannelShuffle { groups: rng.pick(&divisors) }
            }
            _ => Stage::Activation(activation(rng)),
        };
        if !used.contains(&stage.name()) {
            used.push(stage.name());
            growth *= match stage {
                Stage::BatchNorm(_) => 4.0,
                Stage::LayerNorm(_) => 10.0,
                Stage::Activation(_) => 1.5,
                _ => 1.0,
            };
            layer = layer.stage(stage);
        }
    }

    let shape = |channels: usize, stride: usize| {
        let spatial = spatial.iter().map(|s: &usize| s.div_ceil(stride));
        [n, channels].into_iter().chain(spatial).collect::<Vec<_>>()
    };
    let mut sources = Vec::new();
    let mut rest = total;
    while rest > 0 {
        let channels = if rng.chance(80) { rest } else { 1 + rng.below(rest) };
        sources.push(Strided::random(rng, &shape(channels, 1)));
        rest -= channels;
    }
    let dst_shape = shape(total - c_in + c_out, stride);
    let residual = used.contains(&"residual").then(|| Strided::random(rng, &dst_shape));
    let gate = gated.then(|| Strided::random(rng, &[n, c_in]));
    let dst = Strided::new(rng, &dst_shape, f32::NAN);
    let kernel = rng.chance(50).then(|| rng.below(1000));
    let threads = rng.pick(&[1, 1, 1, 3]);
    Case { layer, sources, residual, gate, dst, growth, kernel, threads }
}

/// A value that no layer here computes.
const CANARY: f32 = 12345.678;

fn check(seed: u64) -> Result<(), TestCaseError> {
    match seed % 4 {
        0 => check_as::<f16>(seed),
        1 => check_as::<bf16>(seed),
        _ => check_as::<f32>(seed),
    }
}

/// What rounding a value to a type changes of it, at most, relative to it.
fn unit<T: Element>() -> f64 {
    match T::DTYPE {
        DType::F16 => 2f64.powi(-11),
        DType::Bf16 => 2f64.powi(-8),
        _ => 0.0, // Part of what sums are allowed.
    }
}

fn check_as<T: Element>(seed: u64) -> Result<(), TestCaseError> {
    let Case { layer, sources, residual, gate, dst, growth, kernel, threads } = case::<T>(seed);
    let sources: Vec<_> = sources.into_iter().map(Strided::rounded::<T>).collect();
    let residual = residual.map(Strided::rounded::<T>);
    let gate = gate.map(Strided::rounded::<T>);
    let mut dst = dst.rounded::<T>();
    let views: Vec<_> = sources.iter().map(Strided::view).collect();
    let (residual, gate) = (residual.as_ref().map(Strided::view), gate.as_ref().map(Strided::view));
    let widened = |view: &ArrayViewD<'_, T>| view.mapv(T::to_f32);
    let wide: Vec<_> = views.iter().map(widened).collect();
    let (wide_residual, wide_gate) = (residual.as_ref().map(widened), gate.as_ref().map(widened));
    let inputs = reference::Inputs {
        sources: wide.iter().map(|source| source.view()).collect(),
        residual: wide_residual.as_ref().map(|residual| residual.view()),
        gate: wide_gate.as_ref().map(|gate| gate.view()),
    };
    let expected = reference::forward(&layer, &inputs).unwrap();

    let device = Device::cpu_with_pool(POOL.clone()).threads(threads);
    let mut prepared = layer.prepare_as::<T>(&device, Default::default()).unwrap();
    let kernel = kernel.map(|i| {
        let mut shape = wide[0].shape().to_vec();
        shape[1] = wide.iter().map(|source| source.shape()[1]).sum();
        let mut plans = prepared.plans(&shape).unwrap();
        plans.retain(|plan| plan.verdict.is_ok());
        plans[i % plans.len()].kernel
    });
    if kernel.is_some() {
        let options = PrepareOptions { kernel: kernel.map(str::to_owned), ..Default::default() };
        prepared = layer.prepare_as(&device, options).unwrap();
    }
    let call = || {
        let mut call = prepared.call(&views[0]);
        for more in &views[1..] {
            call = call.concat(more);
        }
        if let Some(residual) = &residual {
            call = call.residual(residual);
        }
        if let Some(gate) = &gate {
            call = call.gate(gate);
        }
        call
    };
    let allocated = call().run().unwrap();
    let canary = T::from_f32(CANARY);
    dst.data.fill(canary);
    dst.view_mut().fill(T::from_f32(f32::NAN));
    call().run_into(&mut dst.view_mut()).unwrap();

    // The design's bound for the sums, carried through the stages, and the rounding of the result.
    let k = layer.weight().ncols() as f64;
    let product = f64::from(layer.weight().iter().fold(0.0f32, |m, w| m.max(w.abs()))) * 4.0;
    let largest = expected.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    let tolerance = f64::from(f32::EPSILON) * growth * (product * k + 4.0 * largest);
    let tolerance = tolerance + unit::<T>() * (largest + tolerance);
    prop_assert_eq!(allocated.shape(), expected.shape());
    for result in [allocated.view(), dst.view()] {
        for ((index, &want), &got) in expected.indexed_iter().zip(result) {
            let got = got.to_f32();
            let err = (f64::from(got) - want).abs();
            prop_assert!(
                err <= tolerance,
                "{}, {layer:?}, kernel {kernel:?}, {threads} threads, at {index:?}: {got} instead of \
                 {want}, {err:e} > {tolerance:e}",
                T::DTYPE
            );
        }
    }
    let bits = |x: &T| x.to_f32().to_bits();
    prop_assert!(allocated.iter().zip(dst.view().iter()).all(|(a, b)| bits(a) == bits(b)));
    let written = dst.view().len();
    let canaries = dst.data.iter().filter(|x| bits(x) == bits(&canary)).count();
    prop_assert_eq!(canaries, dst.data.len() - written, "something beside dst was written");
    Ok(())
}

/// `PROPTEST_CASES` sets the number of cases.
fn config() -> ProptestConfig {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => config,
        None => ProptestConfig { cases: 3000, ..config },
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_layer_agrees_with_the_reference(seed: u64) {
        check(seed)?;
    }
}

#[test]
fn results_do_not_depend_on_threads_or_pool() {
    let src = Strided::random(&mut Rng(1), &[3, 70, 31, 29]);
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap());
    let norm = LayerNorm::over_all().eps(1e-5);
    let weight = |k: usize| Init::pytorch_default().weight(90, k, 3).unwrap();
    let layers = [
        Pointwise::new(weight(70)).bias(vec![0.3; 90]).silu(),
        Pointwise::new(weight(70)).gelu().layer_norm(norm).relu(),
        Pointwise::new(weight(35)).groups(2).source_activation(Activation::Mish).stride(2),
    ];
    for layer in layers {
        let serial =
            layer.prepare(&Device::cpu().threads(1)).unwrap().forward(&src.view()).unwrap();
        for device in [
            Device::cpu(),
            Device::cpu_with_pool(pool.clone()),
            Device::cpu_with_pool(pool.clone()).threads(3),
        ] {
            let prepared = layer.prepare(&device).unwrap();
            for _ in 0..3 {
                let result = prepared.forward(&src.view()).unwrap();
                assert!(
                    serial.iter().zip(&result).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{device}"
                );
            }
            let inside = pool.install(|| prepared.forward(&src.view()).unwrap());
            assert_eq!(serial, inside);
        }
    }
}

#[test]
fn raw_views_need_no_ndarray() {
    let src: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let mut dst = vec![f32::NAN; 12];
    let layer =
        Pointwise::new(ndarray::array![[0.0, 1.0], [1.0, 0.0]]).prepare(&Device::cpu()).unwrap();
    let view = pointwise::TensorRef::from_slice(&src, 0, &[1, 2, 6], &[12, 6, 1]).unwrap();
    let mut out = TensorMut::from_slice(&mut dst, 1, &[1, 2, 6], &[12, -1, 2]).unwrap();
    layer.forward_into(&view, &mut out).unwrap();
    assert_eq!(dst, [0.0, 6.0, 1.0, 7.0, 2.0, 8.0, 3.0, 9.0, 4.0, 10.0, 5.0, 11.0]);
}
