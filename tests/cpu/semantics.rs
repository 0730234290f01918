//! What a result means: NaN and infinities, empty tensors, repeatability, memory order, types,
//! what a call costs, and that what is put together equals its parts.

use std::sync::Arc;

use crate::rng::Rng;
use ndarray::{
    ArcArray, Array, Array1, Array2, Array3, Array4, Array5, ArrayD, ArrayView2, ArrayView4, Axis,
    CowArray, Dimension, Ix4, IxDyn, s,
};
use pointwise::{
    Activation, AsTensor, BatchNorm, Branches, BranchesCall, Call, Device, Element, Error,
    LayerNorm, Layout, Pointwise, PrepareOptions, Prepared, Sequence, Stage, TensorMut, TensorRef,
    bf16, f16, nhwc, nhwc_mut, reference,
};

const INF: f32 = f32::INFINITY;
const NAN: f32 = f32::NAN;

/// Layers and tensors of values between -1 and 1.
struct Random(Rng);

impl Random {
    fn float(&mut self) -> f32 {
        self.0.float(-1.0, 1.0)
    }

    fn array<D: Dimension>(&mut self, shape: impl ndarray::ShapeBuilder<Dim = D>) -> Array<f32, D> {
        Array::from_shape_simple_fn(shape, || self.float())
    }

    fn vector(&mut self, len: usize) -> Array1<f32> {
        self.array(len)
    }

    fn layer(&mut self, c_out: usize, c_in: usize) -> Pointwise {
        Pointwise::new(self.array((c_out, c_in)))
    }

    fn batch_norm(&mut self, channels: usize) -> BatchNorm {
        let var = self.vector(channels).mapv(|x| x * x + 0.5);
        BatchNorm::new(self.vector(channels), var)
            .affine(self.vector(channels), self.vector(channels))
    }

    fn layer_norm(&mut self, norm: LayerNorm, channels: usize) -> LayerNorm {
        norm.affine(self.vector(channels), self.vector(channels))
    }
}

fn cpu(layer: Pointwise) -> Prepared {
    layer.prepare(&Device::cpu()).unwrap()
}

fn cpu_as<T: Element>(layer: &Pointwise) -> Prepared<T> {
    layer.prepare_as(&Device::cpu(), PrepareOptions::default()).unwrap()
}

/// Tests that check the same in every dtype.
macro_rules! in_every_dtype {
    ($($(#[$doc:meta])* $name:ident = $check:ident;)*) => {$(
        $(#[$doc])*
        #[test]
        fn $name() {
            $check::<f32>();
            $check::<f16>();
            $check::<bf16>();
        }
    )*};
}

in_every_dtype! {
    infinities_follow_the_formula = infinities;
    /// A NaN in src reaches every output that depends on it, and no other one.
    nan_goes_where_it_must_and_nowhere_else = nan_goes;
    /// NaN from the second tensor of a call, or from a parameter.
    nan_of_a_residual_a_gate_or_a_parameter = nan_of_others;
    bits_repeat_from_run_to_run_and_for_any_threads = bits_repeat;
    a_sample_does_not_depend_on_its_batch = samples;
}

/// The layer, once for each kernel of this CPU.
fn every_kernel<T: Element>(layer: &Pointwise) -> Vec<(&'static str, Prepared<T>)> {
    let candidates = cpu_as::<T>(layer).plans(&[1, layer.c_in()]).unwrap();
    let usable = candidates.into_iter().filter(|candidate| candidate.verdict.is_ok());
    let prepare = usable.map(|candidate| {
        let kernel = Some(candidate.kernel.to_owned());
        let options = PrepareOptions { kernel, ..Default::default() };
        (candidate.kernel, layer.prepare_as(&Device::cpu(), options).unwrap())
    });
    prepare.collect()
}

#[track_caller]
fn assert_same_bits<'a, T: Element>(
    a: impl IntoIterator<Item = &'a T>,
    b: impl IntoIterator<Item = &'a T>,
    what: &str,
) {
    let (a, b): (Vec<_>, Vec<_>) = (a.into_iter().collect(), b.into_iter().collect());
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let (a, b) = (a.to_f32(), b.to_f32());
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {i} is {a} and {b}");
    }
}

/// Every activation with what PyTorch's formula gives at -Inf and at +Inf.
fn activations() -> Vec<(Activation, f32, f32)> {
    vec![
        (Activation::Relu, 0.0, INF),
        (Activation::Relu6, 0.0, 6.0),
        (Activation::Clip { lo: -2.0, hi: 3.0 }, -2.0, 3.0),
        (Activation::Clip { lo: -INF, hi: 3.0 }, -INF, 3.0),
        (Activation::Clip { lo: -2.0, hi: INF }, -2.0, INF),
        (Activation::LeakyRelu { alpha: 0.1 }, -INF, INF),
        (Activation::LeakyRelu { alpha: 0.0 }, NAN, INF),
        (Activation::LeakyRelu { alpha: -0.5 }, INF, INF),
        (Activation::Elu { alpha: 1.5 }, -1.5, INF),
        (Activation::Elu { alpha: -2.0 }, 2.0, INF),
        (Activation::Sigmoid, 0.0, 1.0),
        (Activation::Tanh, -1.0, 1.0),
        (Activation::Silu, NAN, INF),
        (Activation::Gelu, NAN, INF),
        (Activation::GeluTanh, NAN, INF),
        (Activation::HardSigmoid, 0.0, 1.0),
        (Activation::HardSwish, NAN, INF),
        (Activation::Softplus, 0.0, INF),
        (Activation::Mish, NAN, INF),
    ]
}

fn infinities<T: Element>() {
    let mut failures = Vec::new();
    for (activation, low, high) in activations() {
        for (x, want) in [(-INF, low), (INF, high)] {
            let same = |got: f32| got == want || got.is_nan() && want.is_nan();
            let specified = reference::activate(activation, f64::from(x)) as f32;
            if !same(specified) {
                failures.push(format!("reference {activation:?}({x}) is {specified}, not {want}"));
            }
            // One channel, so that nothing but the value itself enters its sum; a list that runs
            // in registers, and one that does not.
            let layer = Pointwise::new(Array2::ones((1, 1)));
            for layer in [
                layer.clone().activation(activation),
                layer.clone().source_activation(activation),
                layer.relu6().residual().activation(activation),
            ] {
                let source = Array4::from_elem((2, 1, 5, 7), T::from_f32(x));
                for (kernel, prepared) in every_kernel::<T>(&layer) {
                    let mut call = prepared.call(&source);
                    if layer.stages().len() > 1 {
                        call = call.residual(&source);
                    }
                    let dst = call.run().unwrap().mapv(T::to_f32);
                    if let Some(got) = dst.iter().find(|&&got| !same(got)) {
                        failures.push(format!("{kernel} {activation:?}({x}) is {got}, not {want}"));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn nan_goes<T: Element>() {
    let rng = &mut Random(Rng(1));
    let (rows, k, n, h, w) = (19, 6, 3, 5, 7);
    let base = rng.layer(2 * rows, k).groups(2);
    let mut layers = vec![("bare".to_owned(), base.clone())];
    for (activation, ..) in activations() {
        let name = format!("{activation:?}");
        layers.push((name.clone(), base.clone().bias(rng.vector(2 * rows)).activation(activation)));
        layers.push((format!("source {name}"), base.clone().source_activation(activation)));
        let late = base.clone().sigmoid().batch_norm(rng.batch_norm(2 * rows));
        layers.push((format!("late {name}"), late.activation(activation)));
        layers.push((format!("{name}, residual"), base.clone().activation(activation).residual()));
    }
    layers.push(("prelu".into(), base.clone().prelu(rng.vector(2 * rows))));
    layers.push(("prelu 0".into(), base.clone().prelu(vec![0.0])));
    layers.push(("relu, residual, relu".into(), base.clone().relu().residual().relu()));
    let normed = base.clone().relu().layer_norm(LayerNorm::over_channels()).relu6();
    layers.push(("norm over channels".into(), normed));
    let normed = base.clone().relu().layer_norm(LayerNorm::over_all()).relu6();
    layers.push(("norm over all".into(), normed));
    layers.push(("shuffle".into(), base.clone().relu().channel_shuffle(2)));
    layers.push(("gate".into(), base.clone().source_activation(Activation::Relu).gate()));

    let source = rng.array((n, 2 * k, h, w)).mapv(T::from_f32);
    let residual = rng.array((n, 2 * rows, h, w)).mapv(T::from_f32);
    let gate = rng.array((n, 2 * k)).mapv(T::from_f32);
    let (sample, channel, y, x) = (1, k + 2, 2, 3);
    let mut poisoned = source.clone();
    poisoned[[sample, channel, y, x]] = T::from_f32(NAN);
    let mut failures = Vec::new();
    for (name, layer) in &layers {
        let has = |stage: &str| layer.stages().iter().any(|s| s.name() == stage);
        for (kernel, prepared) in every_kernel::<T>(layer) {
            for last in [false, true] {
                let run = |source: &Array4<T>| {
                    let ordered = if last { channels_last(source) } else { source.clone() };
                    let mut call = prepared.call(&ordered);
                    if has("residual") {
                        call = call.residual(&residual);
                    }
                    if name == "gate" {
                        call = call.gate(&gate);
                    }
                    call.run().unwrap().mapv(T::to_f32)
                };
                let (clean, dirty) = (run(&source), run(&poisoned));
                for (index, &got) in dirty.indexed_iter() {
                    // With two groups, the second one's rows are the odd channels of a shuffle.
                    let in_group =
                        if has("channel_shuffle") { index.1 % 2 == 1 } else { index.1 >= rows };
                    let reached = index.0 == sample
                        && (has("layer_norm")
                            && (name == "norm over all" || (index.2, index.3) == (y, x))
                            || in_group && (index.2, index.3) == (y, x));
                    let clean = clean[index];
                    if clean.is_nan() || got.is_nan() != reached {
                        failures.push(format!("{kernel} {name} last {last} {index:?}: {got}"));
                        break;
                    }
                    if !reached && got.to_bits() != clean.to_bits() {
                        failures.push(format!("{kernel} {name} {index:?}: {got}, not {clean}"));
                        break;
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn nan_of_others<T: Element>() {
    let rng = &mut Random(Rng(2));
    let nan = T::from_f32(NAN);
    let source = rng.array((2, 4, 3, 3)).mapv(T::from_f32);
    let mut residual = rng.array((2, 6, 3, 3)).mapv(T::from_f32);
    residual[[1, 2, 0, 1]] = nan;
    let layer = cpu_as::<T>(&rng.layer(6, 4).residual().relu());
    let dst = layer.call(&source).residual(&residual).run().unwrap().mapv(T::to_f32);
    let nans: Vec<_> = dst.indexed_iter().filter(|(_, x)| x.is_nan()).map(|(i, _)| i).collect();
    assert_eq!(nans, [(1, 2, 0, 1)]);
    let mut gate = rng.array((2, 4)).mapv(T::from_f32);
    gate[[0, 3]] = nan;
    let layer = cpu_as::<T>(&rng.layer(6, 4).gate().relu());
    let dst = layer.call(&source).gate(&gate).run().unwrap().mapv(T::to_f32);
    assert!(dst.indexed_iter().all(|((n, ..), x)| x.is_nan() == (n == 0)));
    let mut weight = rng.array((6, 4));
    weight[[5, 0]] = NAN;
    let layer = cpu_as::<T>(&Pointwise::new(weight).bias(rng.vector(6)).relu6());
    let dst = layer.forward(&source).unwrap().mapv(T::to_f32);
    assert!(dst.indexed_iter().all(|((_, c, ..), x)| x.is_nan() == (c == 5)));
}

fn channels_last<T: Element>(of: &Array4<T>) -> Array4<T> {
    let (n, c, h, w) = of.dim();
    let mut to = Array4::from_elem((n, h, w, c), T::default());
    nhwc_mut(to.view_mut()).assign(of);
    to.permuted_axes([0, 3, 1, 2])
}

#[test]
fn empty_tensors_give_empty_tensors() {
    let rng = &mut Random(Rng(3));
    let layers = [
        rng.layer(5, 3),
        rng.layer(5, 3).bias(vec![1.0; 5]).relu(),
        rng.layer(5, 3).residual().gelu(),
        rng.layer(5, 3).gate().source_activation(Activation::Silu),
        rng.layer(5, 3).layer_norm(LayerNorm::over_channels()),
        rng.layer(5, 3).layer_norm(LayerNorm::over_all()),
        rng.layer(5, 3).stride(2).channel_shuffle(5),
    ];
    for (src, dst, strided) in [
        (vec![0, 3], vec![0, 5], vec![0, 5]),
        (vec![0, 3, 7], vec![0, 5, 7], vec![0, 5, 4]),
        (vec![2, 3, 0], vec![2, 5, 0], vec![2, 5, 0]),
        (vec![0, 3, 4, 5], vec![0, 5, 4, 5], vec![0, 5, 2, 3]),
        (vec![2, 3, 4, 0], vec![2, 5, 4, 0], vec![2, 5, 2, 0]),
        (vec![2, 3, 0, 4], vec![2, 5, 0, 4], vec![2, 5, 0, 2]),
        (vec![1, 3, 2, 0, 2], vec![1, 5, 2, 0, 2], vec![1, 5, 1, 0, 1]),
        (vec![0, 3, 0, 0, 0], vec![0, 5, 0, 0, 0], vec![0, 5, 0, 0, 0]),
    ] {
        let source = ArrayD::<f32>::zeros(IxDyn(&src));
        let gate = Array2::<f32>::zeros((src[0], 3));
        for layer in &layers {
            let has = |name: &str| layer.stages().iter().any(|stage| stage.name() == name);
            let want = if has("channel_shuffle") { &strided } else { &dst };
            let residual = ArrayD::<f32>::zeros(IxDyn(want));
            let prepared = cpu(layer.clone());
            let call = || {
                let call = prepared.call(&source);
                let call = if has("residual") { call.residual(&residual) } else { call };
                if layer.source_stages().is_empty() { call } else { call.gate(&gate) }
            };
            assert_eq!(call().run().unwrap().shape(), want, "{layer:?}");
            let mut into = ArrayD::<f32>::zeros(IxDyn(want));
            call().run_into(&mut into).unwrap();
            assert_eq!(prepared.dst_shape(&src).unwrap(), *want);
            assert_eq!(prepared.cost(&src).unwrap().macs, 0);
            assert!(!prepared.explain(&src).unwrap().to_string().is_empty());
        }
        let both = Branches::new(vec![cpu(layers[0].clone()), cpu(layers[5].clone())]).unwrap();
        for result in both.forward(&source).unwrap() {
            assert_eq!(result.shape(), dst);
        }
        let chain = Sequence::new(vec![cpu(layers[0].clone()), cpu(rng.layer(4, 5))]).unwrap();
        let result = chain.forward(&source).unwrap();
        assert_eq!((result.shape()[1], result.len()), (4, 0));
    }
    let none = cpu(rng.layer(5, 3)).forward(&Array4::zeros((0, 3, 8, 8))).unwrap();
    assert_eq!(none.dim(), (0, 5, 8, 8));
}

/// Layers of many kinds, 24 to 40 channels; all that a call takes is src.
fn kinds(rng: &mut Random) -> Vec<(&'static str, Pointwise)> {
    let over_all = rng.layer_norm(LayerNorm::over_all(), 40);
    vec![
        ("relu", rng.layer(40, 24).bias(rng.vector(40)).relu()),
        ("silu", rng.layer(40, 24).batch_norm(rng.batch_norm(40)).silu()),
        ("stride", rng.layer(40, 24).stride(2).gelu()),
        (
            "source",
            rng.layer(40, 24)
                .source_batch_norm(rng.batch_norm(24))
                .source_activation(Activation::Relu),
        ),
        ("groups", rng.layer(40, 6).groups(4).channel_shuffle(4).prelu(rng.vector(40))),
        ("partial", rng.layer(30, 14).partial(3..17).tanh()),
        ("norm", rng.layer(40, 24).layer_norm(LayerNorm::over_channels()).mish()),
        ("norm over all", rng.layer(40, 24).relu().layer_norm(over_all).bias(rng.vector(40))),
        (
            "norm over all, partial",
            rng.layer(40, 8).partial(0..8).layer_norm(LayerNorm::over_all()),
        ),
    ]
}

fn bits_repeat<T: Element>() {
    let rng = &mut Random(Rng(4));
    let pool = |threads: usize| {
        Arc::new(rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
    };
    let devices = [
        Device::cpu(),
        Device::cpu().threads(2),
        Device::cpu_with_pool(pool(1)),
        Device::cpu_with_pool(pool(3)),
        Device::cpu_with_pool(pool(7)).threads(4),
    ];
    for (name, layer) in kinds(rng) {
        let prepare = |device: &Device| layer.prepare_as::<T>(device, Default::default()).unwrap();
        let serial = prepare(&Device::cpu().threads(1));
        for shape in [[1, 24, 97, 61], [5, 24, 47, 33]] {
            let first = rng.array((shape[0], shape[1], shape[2], shape[3])).mapv(T::from_f32);
            for source in [channels_last(&first), first] {
                let want = serial.forward(&source).unwrap();
                assert!(want.iter().all(|x| x.to_f32().is_finite()));
                for device in &devices {
                    let prepared = prepare(device);
                    for _ in 0..2 {
                        let got = prepared.forward(&source).unwrap();
                        assert_same_bits(&want, &got, &format!("{name} on {device}"));
                    }
                }
            }
        }
    }
}

fn samples<T: Element>() {
    let rng = &mut Random(Rng(5));
    for (name, layer) in kinds(rng) {
        let prepared = cpu_as::<T>(&layer);
        for shape in [(6, 24, 1, 1), (5, 24, 7, 7), (3, 24, 31, 29), (9, 24, 4, 8)] {
            let first = rng.array(shape).mapv(T::from_f32);
            for source in [channels_last(&first), first] {
                let together = prepared.forward(&source).unwrap();
                for sample in 0..shape.0 {
                    let alone = source.slice(s![sample..sample + 1, .., .., ..]);
                    let alone = prepared.forward(&alone).unwrap();
                    let in_batch = together.slice(s![sample..sample + 1, .., .., ..]);
                    assert_same_bits(&alone, in_batch, &format!("{name} {shape:?} {sample}"));
                }
            }
        }
    }
}

#[test]
fn a_result_has_its_source_s_memory_order() {
    let rng = &mut Random(Rng(6));
    let layer = cpu(rng.layer(7, 3));
    let first = rng.array((2, 3, 4, 5));
    let want = layer.forward(&first).unwrap();
    assert_eq!(want.strides(), [140, 20, 5, 1]);
    let last = layer.forward(&channels_last(&first)).unwrap();
    assert_eq!(last.strides(), [140, 1, 35, 7]);
    assert_same_bits(&want, &last, "channels last");
    // A view in a larger tensor gives a compact result in its order; other orders are kept too.
    let view = first.slice(s![.., .., 1..3, ..;2]);
    assert_eq!(layer.forward(&view).unwrap().strides(), [42, 6, 3, 1]);
    let turned = first.view().permuted_axes([0, 1, 3, 2]);
    assert_eq!(layer.forward(&turned).unwrap().strides(), [140, 20, 1, 5]);
    let wide = cpu(rng.layer(7, 3).stride(2));
    assert_eq!(wide.forward(&channels_last(&first)).unwrap().strides(), [42, 1, 21, 7]);
    let line = rng.array((2, 9, 3));
    assert_eq!(layer.forward(&nhwc(line.view())).unwrap().strides(), [63, 1, 7]);
    let volume = rng.array((1, 2, 3, 4, 3));
    let dst = layer.forward(&nhwc(volume.view())).unwrap();
    assert_eq!((dst.shape(), &dst.strides()[1..]), (&[1, 7, 2, 3, 4][..], &[1, 84, 28, 7][..]));
    // The first of several sources decides.
    let concat = cpu(rng.layer(7, 6));
    let dst = concat.call(&channels_last(&first)).concat(&first).run().unwrap();
    assert_eq!(dst.strides(), [140, 1, 35, 7]);
    let sequence = Sequence::new(vec![layer.clone(), cpu(rng.layer(2, 7))]).unwrap();
    assert_eq!(sequence.forward(&channels_last(&first)).unwrap().strides(), [40, 1, 10, 2]);
    let branches = Branches::new(vec![layer.clone(), layer]).unwrap();
    for dst in branches.forward(&channels_last(&first)).unwrap() {
        assert_eq!(dst.strides(), [140, 1, 35, 7]);
    }
}

#[test]
fn dimension_types_are_kept() {
    let layer = cpu(Pointwise::new(Array2::ones((4, 3))));
    let two: Array2<f32> = layer.forward(&Array2::ones((5, 3))).unwrap();
    let three: Array3<f32> = layer.forward(&Array3::ones((1, 3, 5))).unwrap();
    let four: Array4<f32> = layer.forward(&Array4::ones((1, 3, 5, 2))).unwrap();
    let five: Array5<f32> = layer.forward(&Array5::ones((1, 3, 5, 2, 2))).unwrap();
    let dynamic: ArrayD<f32> = layer.forward(&ArrayD::ones(IxDyn(&[1, 3, 6]))).unwrap();
    let shapes = [two.shape(), three.shape(), four.shape(), five.shape(), dynamic.shape()];
    assert_eq!(shapes.map(|shape| shape[1]), [4; 5]);

    let array = Array4::<f32>::ones((1, 3, 5, 2));
    let last = Array4::<f32>::ones((1, 5, 2, 3));
    let results: [Array4<f32>; 6] = [
        layer.forward(&array.view()).unwrap(),
        layer.forward(&nhwc(last.view())).unwrap(),
        layer.forward(&&array).unwrap(),
        layer.forward(&&*array).unwrap(),
        layer.forward(&CowArray::from(array.view())).unwrap(),
        layer.forward(&ArcArray::<f32, Ix4>::ones((1, 3, 5, 2))).unwrap(),
    ];
    assert!(results.iter().all(|dst| dst == four));
    let raw: ArrayD<f32> = layer.forward(&array.as_tensor().unwrap()).unwrap();
    assert_eq!(raw, four.clone().into_dyn());
    let branches = Branches::new(vec![layer.clone()]).unwrap();
    let of_branches: Vec<Array4<f32>> = branches.forward(&array).unwrap();
    let of_sequence: Array4<f32> = Sequence::new(vec![layer]).unwrap().forward(&array).unwrap();
    assert!(of_branches[0] == four && of_sequence == four);
}

#[test]
fn costs_by_hand() {
    // 24 weights and 4 biases; 2 samples of 15 positions; 4 bytes a value.
    let layer = cpu(Pointwise::new(Array2::ones((4, 6))).bias(vec![1.0; 4]).relu());
    let cost = layer.cost(&[2, 6, 3, 5]).unwrap();
    assert_eq!(cost.parameters, 28);
    assert_eq!(cost.macs, 2 * 15 * 4 * 6);
    assert_eq!(cost.flops(), 1440.0);
    assert_eq!((cost.src_bytes, cost.weight_bytes), (720, 112));
    assert_eq!((cost.dst_bytes, cost.residual_bytes), (480, 0));
    assert_eq!(cost.bytes(), 1312);
    assert_eq!(cost.intensity(), 1440.0 / 1312.0);
    let explanation = layer.explain(&[2, 6, 3, 5]).unwrap();
    assert_eq!(explanation.problem, "n 2, 6 -> 4 channels, 3x5 positions");
    assert_eq!(explanation.cost, cost);
    let text = explanation.to_string();
    for part in [explanation.kernel, "720 MACs", "28 parameters", "1312 bytes", "1.1 flop/byte"] {
        assert!(text.contains(part), "{text}");
    }
    let roof = explanation.roof;
    assert!(roof.flops_per_second > 1e6 && roof.bytes_per_second > 1e6, "{roof:?}");
    let seconds = (1440.0 / roof.flops_per_second).max(1312.0 / roof.bytes_per_second);
    assert_eq!(roof.seconds(&cost), seconds);
    assert_eq!(roof.compute_bound(&cost), seconds == 1440.0 / roof.flops_per_second);

    // Two groups of 3 to 4 channels, every second position of 5x5, a gate, a residual, a slope.
    let layer = cpu(Pointwise::new(Array2::ones((8, 3)))
        .groups(2)
        .stride(2)
        .gate()
        .residual()
        .prelu(vec![0.1; 8]));
    let cost = layer.cost(&[3, 6, 5, 5]).unwrap();
    assert_eq!(cost.parameters, 24 + 8 + 8);
    assert_eq!(cost.macs, 3 * 9 * 8 * 3);
    assert_eq!(cost.src_bytes, 3 * 9 * 6 * 4 + 3 * 6 * 4);
    assert_eq!(cost.weight_bytes, (24 + 8) * 4);
    assert_eq!((cost.dst_bytes, cost.residual_bytes), (864, 864));
    let explanation = layer.explain_in(&[3, 6, 5, 5], Layout::ChannelsLast).unwrap();
    assert_eq!(explanation.problem, "n 3, 6 -> 8 channels, 3x3 positions, 2 groups");

    // In 16 bits everything is half as large, but for parameters per channel.
    let half = cpu_as::<bf16>(&Pointwise::new(Array2::ones((4, 6))).bias(vec![1.0; 4]));
    let cost = half.cost(&[2, 6, 3, 5]).unwrap();
    assert_eq!((cost.src_bytes, cost.weight_bytes, cost.dst_bytes), (360, 48 + 16, 240));

    // What passes through is read and written, but not multiplied.
    let layer = cpu(Pointwise::new(Array2::ones((5, 3))).partial(2..5));
    let cost = layer.cost(&[1, 10, 7]).unwrap();
    assert_eq!(cost.macs, 7 * 5 * 3);
    assert_eq!((cost.src_bytes, cost.dst_bytes), (10 * 7 * 4, 12 * 7 * 4));
}

#[test]
fn plans_list_every_kernel_once_the_chosen_one_first() {
    plans_list::<f32>();
    plans_list::<f16>();
    plans_list::<bf16>();
}

fn plans_list<T: Element>() {
    let layer = Pointwise::new(Array2::ones((4, 6)));
    let prepared = cpu_as::<T>(&layer);
    for layout in [Layout::ChannelsFirst, Layout::ChannelsLast] {
        let plans = prepared.plans_in(&[2, 6, 7, 7], layout).unwrap();
        let explanation = prepared.explain_in(&[2, 6, 7, 7], layout).unwrap();
        assert_eq!(plans[0].kernel, explanation.kernel);
        assert!(explanation.reason.starts_with(plans[0].verdict.as_ref().unwrap()));
        let mut names: Vec<_> = plans.iter().map(|candidate| candidate.kernel).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), plans.len());
        for name in names {
            let parts: Vec<_> = name.split('_').collect();
            assert!(parts.len() == 4 && parts[..2] == ["fprop", T::DTYPE.name()], "{name}");
        }
    }
    for (kernel, prepared) in every_kernel::<T>(&layer) {
        assert_eq!(prepared.plans(&[2, 6, 7, 7]).unwrap()[0].kernel, kernel);
        let reason = prepared.explain(&[2, 6, 7, 7]).unwrap().reason;
        assert!(reason.ends_with("forced"), "{reason}");
    }
}

#[test]
fn what_is_shared_between_threads_may_be() {
    fn shared<T: Send + Sync + Clone + std::fmt::Debug>() {}
    shared::<Pointwise>();
    shared::<Prepared>();
    shared::<Prepared<bf16>>();
    shared::<Device>();
    shared::<Branches>();
    shared::<Sequence>();
    shared::<TensorRef<'_>>();
    fn sent<T: Send + Sync>() {}
    sent::<TensorMut<'_>>();
    sent::<Error>();
    sent::<Call<'_, Array4<f32>>>();
    sent::<BranchesCall<'_, Array4<f32>>>();
    fn error<T: std::error::Error + 'static>() {}
    error::<Error>();
}

#[test]
fn many_threads_share_a_layer() {
    let rng = &mut Random(Rng(7));
    for (name, layer) in kinds(rng) {
        let prepared = cpu(layer);
        let sources: Vec<_> = (0..4).map(|i| rng.array((1 + i, 24, 23, 31))).collect();
        let want: Vec<_> = sources.iter().map(|src| prepared.forward(src).unwrap()).collect();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (prepared, sources, want) = (prepared.clone(), &sources, &want);
                scope.spawn(move || {
                    for round in 0..6 {
                        let i = (thread + round) % sources.len();
                        let got = prepared.forward(&sources[i]).unwrap();
                        assert_same_bits(&want[i], &got, name);
                    }
                });
            }
        });
    }
}

/// Calls from the workers of a pool, whose helpers may be other such callers.
#[test]
fn calls_inside_a_pool() {
    use rayon::prelude::*;
    let rng = &mut Random(Rng(8));
    let layers: Vec<_> =
        kinds(rng).into_iter().filter(|(name, _)| !name.contains("partial")).collect();
    let source = rng.array((2, 24, 61, 53));
    let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap());
    for device in [Device::cpu(), Device::cpu_with_pool(pool.clone())] {
        for (name, layer) in &layers {
            let Ok(layer) = layer.prepare(&device) else { panic!("{name}") };
            if layer.dst_shape(source.shape()).is_err() {
                continue;
            }
            let want = layer.forward(&source).unwrap();
            let back = cpu(rng.layer(24, want.shape()[1]));
            let sequence = Sequence::new(vec![layer.clone(), back]).unwrap();
            let chained = sequence.forward(&source).unwrap();
            pool.install(|| {
                (0..12).into_par_iter().for_each(|_| {
                    assert_same_bits(&want, &layer.forward(&source).unwrap(), name);
                    assert_same_bits(&chained, &sequence.forward(&source).unwrap(), name);
                });
            });
        }
    }
}

#[test]
fn a_sequence_equals_its_layers_one_by_one() {
    let rng = &mut Random(Rng(9));
    let layers = [
        rng.layer(50, 12).bias(rng.vector(50)).silu(),
        rng.layer(20, 50).layer_norm(LayerNorm::over_all()).stride(2),
        rng.layer(33, 10).partial(5..15).gelu(),
        rng.layer(9, 43).source_activation(Activation::Relu),
        rng.layer(64, 3).partial(6..9).channel_shuffle(4),
    ]
    .map(cpu);
    for count in 1..=layers.len() {
        let sequence = Sequence::new(layers[..count].to_vec()).unwrap();
        assert_eq!(sequence.layers().len(), count);
        for shape in [(2, 12, 9, 8), (1, 12, 1, 1), (1, 12, 70, 53), (3, 12, 7, 7)] {
            let first = rng.array(shape);
            for source in [channels_last(&first), first] {
                let mut want = source.clone();
                for layer in &layers[..count] {
                    want = layer.forward(&want).unwrap();
                }
                for _ in 0..2 {
                    let got = sequence.forward(&source).unwrap();
                    assert_eq!(got.shape(), want.shape());
                    assert_same_bits(&want, &got, &format!("{count} layers, {shape:?}"));
                }
                let mut into = Array4::from_elem(want.raw_dim(), NAN).reversed_axes();
                let mut into = into.view_mut().reversed_axes();
                sequence.forward_into(&source, &mut into).unwrap();
                assert_same_bits(&want, &into, &format!("{count} layers, {shape:?} into"));
            }
        }
    }
}

#[test]
fn branches_equal_their_layers_one_by_one() {
    let rng = &mut Random(Rng(10));
    let mut layers: Vec<_> = kinds(rng).into_iter().map(|(_, layer)| layer).collect();
    layers.push(rng.layer(8, 24).residual().relu());
    layers.push(rng.layer(8, 24).gate());
    let device = Device::cpu();
    let prepared: Vec<_> = layers.iter().map(|layer| layer.prepare(&device).unwrap()).collect();
    // Layers of several devices run one after another, each on its own.
    let devices = [Device::cpu(), Device::cpu().threads(1)];
    let mixed = layers.iter().zip(devices.iter().cycle());
    let mixed: Vec<_> = mixed.map(|(layer, device)| layer.prepare(device).unwrap()).collect();
    let (with_residual, with_gate) = (layers.len() - 2, layers.len() - 1);
    for shape in [(1, 24, 7, 7), (2, 24, 56, 41), (3, 24, 1, 1), (2, 24, 19, 20)] {
        let first = rng.array(shape);
        let residual = rng.array((shape.0, 8, shape.2, shape.3));
        let gate = rng.array((shape.0, 24));
        for source in [channels_last(&first), first] {
            let single = |i: usize| {
                let call = prepared[i].call(&source);
                let call = if i == with_residual { call.residual(&residual) } else { call };
                let call = if i == with_gate { call.gate(&gate) } else { call };
                call.run().unwrap()
            };
            for branches in [&prepared, &mixed] {
                let branches = Branches::new(branches.clone()).unwrap();
                let call = branches.call(&source).residual(with_residual, &residual);
                let together = call.gate(with_gate, &gate).run().unwrap();
                for (i, got) in together.iter().enumerate() {
                    let what = format!("{shape:?} {:?}", layers[i].stages());
                    assert_same_bits(&single(i), got, &what);
                }
            }
            // Each pair with the kinds of its neighbour, in both orders.
            for (i, j) in (0..with_residual).flat_map(|i| [(i, (i + 1) % with_residual), (i, 7)]) {
                let pair = vec![prepared[j].clone(), prepared[i].clone()];
                let pair = Branches::new(pair).unwrap().forward(&source).unwrap();
                assert_same_bits(&single(j), &pair[0], &format!("{shape:?} {j} with {i}"));
                assert_same_bits(&single(i), &pair[1], &format!("{shape:?} {i} with {j}"));
            }
        }
    }
}

#[test]
fn branches_write_into_one_concatenation() {
    let rng = &mut Random(Rng(11));
    let widths = [16, 3, 33];
    let layers: Vec<_> = widths.iter().map(|&c| cpu(rng.layer(c, 20).relu())).collect();
    let source = rng.array((2, 20, 9, 7));
    let want: Vec<_> = layers.iter().map(|layer| layer.forward(&source).unwrap()).collect();
    let want: Vec<_> = want.iter().map(|dst| dst.view()).collect();
    let want = ndarray::concatenate(Axis(1), &want).unwrap();
    let branches = Branches::new(layers).unwrap();
    let mut first = Array4::from_elem((2, 52, 9, 7), NAN);
    let mut last = Array4::from_elem((2, 9, 7, 52), NAN);
    for whole in [first.view_mut(), nhwc_mut(last.view_mut())] {
        let (mut a, rest) = whole.split_at(Axis(1), widths[0]);
        let (mut b, mut c) = rest.split_at(Axis(1), widths[1]);
        branches.call(&source).run_into(&mut [&mut a, &mut b, &mut c]).unwrap();
    }
    assert_same_bits(&want, &first, "channels first");
    assert_same_bits(&want, nhwc(last.view()), "channels last");
}

#[test]
fn a_shuffle_is_a_permutation_by_hand() {
    let rng = &mut Random(Rng(12));
    // Torch: view(groups, c / groups), transposed, flattened.
    let shuffled = |dst: &Array4<f32>, groups: usize| {
        let per_group = dst.shape()[1] / groups;
        let from: Vec<_> =
            (0..dst.shape()[1]).map(|c| c % groups * per_group + c / groups).collect();
        dst.select(Axis(1), &from)
    };
    // [0 1 2 3 4 5] in 2 groups is [0 3 1 4 2 5].
    let six = Array4::from_shape_fn((1, 6, 1, 1), |(_, c, ..)| c as f32);
    let eye = cpu(Pointwise::new(Array2::eye(6)).channel_shuffle(2)).forward(&six).unwrap();
    assert_eq!(eye.into_raw_vec_and_offset().0, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    for groups in [1, 2, 4] {
        for shuffle in [1, 2, 3, 4, 6, 12, 24] {
            for (n, side) in [(2, 7), (1, 16), (3, 1)] {
                let base = rng.layer(24, 12 / groups).groups(groups).bias(rng.vector(24));
                let source = rng.array((n, 12, side, side));
                let residual = rng.array((n, 24, side, side));
                let plain = cpu(base.clone().silu()).forward(&source).unwrap();
                let what = format!("{groups} groups, shuffle {shuffle}, {n} x {side}");
                for (kernel, layer) in
                    every_kernel::<f32>(&base.clone().silu().channel_shuffle(shuffle))
                {
                    // Kernels differ in the bits of an activation; each agrees with itself.
                    let options =
                        PrepareOptions { kernel: Some(kernel.into()), ..Default::default() };
                    let plain = base.clone().silu().prepare_with(&Device::cpu(), options).unwrap();
                    let plain = plain.forward(&source).unwrap();
                    let got = layer.forward(&source).unwrap();
                    assert_same_bits(&shuffled(&plain, shuffle), &got, &what);
                }
                // Parameters and the residual behind the shuffle count shuffled channels.
                let slope = rng.vector(24);
                let layer = base.clone().silu().channel_shuffle(shuffle).residual();
                let got = cpu(layer).call(&source).residual(&residual).run().unwrap();
                assert_same_bits(&(shuffled(&plain, shuffle) + &residual), &got, &what);
                let layer = base.clone().silu().residual().channel_shuffle(shuffle);
                let got = cpu(layer).call(&source).residual(&residual).run().unwrap();
                assert_same_bits(&shuffled(&(&plain + &residual), shuffle), &got, &what);
                let layer = base.clone().silu().channel_shuffle(shuffle).prelu(slope.clone());
                let mut want = shuffled(&plain, shuffle);
                for ((_, c, ..), x) in want.indexed_iter_mut() {
                    *x = if *x >= 0.0 { *x } else { *x * slope[c] };
                }
                assert_same_bits(&want, &cpu(layer).forward(&source).unwrap(), &what);
            }
        }
    }
}

/// DenseNet: each layer reads the channels in front of those that it appends to.
#[test]
fn a_dense_block_grows_in_place() {
    let rng = &mut Random(Rng(13));
    let (start, growth, layers, n, h, w) = (10, 6, 4, 2, 9, 11);
    let total = start + growth * layers;
    let source = rng.array((n, start, h, w));
    let mut first = Array4::from_elem((n, total, h, w), NAN);
    let mut last = Array4::from_elem((n, h, w, total), NAN);
    first.slice_mut(s![.., ..start, .., ..]).assign(&source);
    nhwc_mut(last.view_mut()).slice_mut(s![.., ..start, .., ..]).assign(&source);
    let mut grown = source;
    for i in 0..layers {
        let c_in = start + growth * i;
        let layer = cpu(rng
            .layer(growth, c_in)
            .source_batch_norm(rng.batch_norm(c_in))
            .source_activation(Activation::Relu));
        let appended = layer.forward(&grown).unwrap();
        for whole in [first.view_mut(), nhwc_mut(last.view_mut())] {
            let (read, rest) = whole.split_at(Axis(1), c_in);
            let (mut write, _) = rest.split_at(Axis(1), growth);
            layer.forward_into(&read, &mut write).unwrap();
        }
        // The concatenation itself may be read as two sources, too.
        let (a, b) = grown.view().split_at(Axis(1), c_in / 2);
        assert_same_bits(&appended, &layer.call(&a).concat(&b).run().unwrap(), "two sources");
        grown = ndarray::concatenate![Axis(1), grown, appended];
    }
    assert_same_bits(&grown, &first, "channels first");
    assert_same_bits(&grown, nhwc(last.view()), "channels last");
}

/// Ranges of one tensor's channels share nothing, however large the tensor is.
#[test]
fn ranges_of_large_tensors_are_no_alias() {
    let layer = cpu(Pointwise::new(Array2::ones((2, 3))));
    let pair = Branches::new(vec![layer.clone(), layer.clone()]).unwrap();
    for (n, h, w) in [(1, 224, 224), (3, 56, 56), (40, 14, 14), (2, 1, 20_001), (20_001, 1, 1)] {
        let mut first = Array4::<f32>::ones((n, 9, h, w));
        let mut last = Array4::<f32>::ones((n, h, w, 9));
        let mut turned = Array4::<f32>::ones((n, h, w, 9));
        turned.invert_axis(Axis(1));
        turned.invert_axis(Axis(2));
        let wholes = [first.view_mut(), nhwc_mut(last.view_mut()), nhwc_mut(turned.view_mut())];
        for whole in wholes {
            let (mut a, rest) = whole.split_at(Axis(1), 3);
            let (mut b, c) = rest.split_at(Axis(1), 2);
            let (read, _) = c.split_at(Axis(1), 3);
            layer.forward_into(&read, &mut b).unwrap();
            let mut two = a.slice_mut(s![.., 1.., .., ..]);
            pair.call(&read).run_into(&mut [&mut b, &mut two]).unwrap();
            assert!(b.iter().chain(&two).all(|&x| x == 3.0));
        }
    }
}

/// Strided views, reversed and broadcast ones, are read where they are.
#[test]
fn any_view_is_its_values() {
    let rng = &mut Random(Rng(14));
    let layer = cpu(rng.layer(5, 4).bias(rng.vector(5)).relu());
    let whole = rng.array((3, 9, 8, 10));
    let line = whole.slice(s![0..1, ..4, ..1, ..]);
    let views: [ArrayView4<'_, f32>; 4] = [
        whole.slice(s![..;-1, 1..9;2, ..;-1, ..;3]),
        whole.slice(s![.., 5..9;1, ..;-3, ..;-1]),
        whole.slice(s![1..2, ..4, .., 3..4]),
        line.broadcast((6, 4, 5, 10)).unwrap(),
    ];
    for view in views {
        let packed = view.as_standard_layout().into_owned();
        let want = layer.forward(&packed).unwrap();
        assert_same_bits(&want, &layer.forward(&view).unwrap(), "a view");
        let mut into = Array4::from_elem((want.dim().0, 7, want.dim().2 * 2, want.dim().3), NAN);
        let mut part = into.slice_mut(s![.., 1..6, ..;-2, ..]);
        layer.forward_into(&view, &mut part).unwrap();
        assert_same_bits(&want, &part, "into a view");
        let untouched = into.iter().filter(|x| x.is_nan()).count();
        assert_eq!(untouched, into.len() - want.len());
    }
    let row = rng.array(4);
    let rows: ArrayView2<'_, f32> = row.broadcast((6, 4)).unwrap();
    let dst = layer.forward(&rows).unwrap();
    assert!(dst.outer_iter().all(|r| r == dst.row(0)));
}

#[cfg(feature = "serde")]
#[test]
fn a_description_survives_serialisation() {
    let rng = &mut Random(Rng(15));
    let layer = rng
        .layer(8, 3)
        .groups(2)
        .stride(2)
        .partial(1..7)
        .source_affine(rng.vector(6), rng.vector(6))
        .source_batch_norm(rng.batch_norm(6))
        .source_activation(Activation::Clip { lo: -1.0, hi: 2.5 })
        .source_activation(Activation::Clip { lo: f32::NEG_INFINITY, hi: 2.0 })
        .clip(-0.5, f32::INFINITY)
        .gate()
        .bias(rng.vector(8))
        .batch_norm(rng.batch_norm(8).eps(1e-3))
        .leaky_relu(0.25)
        .elu(1.5)
        .prelu(rng.vector(8))
        .residual()
        .layer_norm(rng.layer_norm(LayerNorm::over_all().eps(1e-4), 8))
        .channel_shuffle(4)
        .gelu_tanh();
    let text = serde_json::to_string(&layer).unwrap();
    let back: Pointwise = serde_json::from_str(&text).unwrap();
    assert_eq!(back, layer);
    back.check().unwrap();
    // Text is no better checked than code: what is wrong with it is found by `check`.
    let bad: Pointwise =
        serde_json::from_str(&text.replace("\"groups\":2", "\"groups\":3")).unwrap();
    assert!(matches!(bad.check(), Err(Error::Groups { groups: 3, .. })));
}

#[test]
fn a_description_tells_what_it_was_given() {
    let layer = Pointwise::new(Array2::ones((8, 3))).groups(2).bias(vec![1.0; 8]).relu().gate();
    assert_eq!((layer.c_out(), layer.c_in(), layer.weight().dim()), (8, 6, (8, 3)));
    assert_eq!(layer.stages().iter().map(Stage::name).collect::<Vec<_>>(), ["bias", "relu"]);
    assert_eq!(layer.source_stages()[0].name(), "gate");
    let prepared = cpu(layer);
    assert!(prepared.device().to_string().starts_with("cpu ("));
    assert_eq!(prepared.dst_shape(&[2, 6, 5]).unwrap(), [2, 8, 5]);
}

#[test]
fn borrowed_arrays_need_no_second_borrow() {
    fn last_layer(x: &ndarray::ArrayRef<f32, ndarray::Ix4>) -> pointwise::Result<Array4<f32>> {
        Pointwise::new(Array2::ones((2, 3))).prepare(&Device::cpu())?.forward(x)
    }
    assert_eq!(
        last_layer(&Array4::ones((1, 3, 2, 2))).unwrap(),
        Array4::from_elem((1, 2, 2, 2), 3.0)
    );
}

/// Units of one call share a copy of src where it is not read in place; those of the next one must
/// not find it.
#[test]
fn every_call_reads_its_own_source() {
    let weight = Array2::from_shape_fn((2048, 128), |(row, k)| ((row * 7 + k) % 5) as f32 - 2.0);
    let layer = Pointwise::new(weight).stride(2);
    let (one, two) = (Device::cpu().threads(1), Device::cpu().threads(2));
    let (alone, shared) = (layer.prepare(&one).unwrap(), layer.prepare(&two).unwrap());
    for call in 0..6 {
        let src = Array4::from_shape_fn((2, 128, 8, 8), |(n, c, h, w)| {
            ((n * 3 + c * 5 + h * 11 + w + call) % 7) as f32 - 3.0
        });
        assert_eq!(shared.forward(&src).unwrap(), alone.forward(&src).unwrap(), "call {call}");
    }
}
