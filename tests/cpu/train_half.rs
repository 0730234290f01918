//! Training on tensors of f16 and bf16 on the CPU: bitwise what f32's passes give, rounded once, exact
//! where the arithmetic is, and against the f64 reference.

use crate::common::Fixtures;
use crate::training::{
    Got, Tensors, d_dst, large_tensors, largest, named, norm, random, terms, trainable, vector,
    weight, with_statistics,
};
use ndarray::{Array2, ArrayD, ArrayViewD, ArrayViewMutD, Axis, Dimension, IxDyn, Slice};
use pointwise::reference::{self, Gradients};
use pointwise::train::{Accumulate, Branches, Options, Params, Statistics, name};
use pointwise::{
    Activation, AsTensor, DType, Device, Element, Error, LayerNorm, Pointwise, Stage, bf16, f16,
};

/// Runs a check in both types.
macro_rules! in_both {
    ($($test:ident: $check:ident;)*) => {$(
        #[test]
        fn $test() {
            $check::<f16>();
            $check::<bf16>();
        }
    )*};
}

in_both! {
    every_case_of_the_fixtures_has_the_references_gradients: fixtures;
    several_blocks_and_units_have_the_references_gradients: blocks;
    passes_are_those_of_f32_rounded_once: rounded_once;
    integers_are_summed_exactly: integers;
    branches_are_their_layers: branches;
    gradients_of_a_scaled_loss_are_scaled: loss_scale;
    workspaces_are_as_large_as_in_f32: workspaces;
    nothing_to_train_on_is_no_accident: nothing;
}

/// The values that T holds.
fn nearest<T: Element>(tensor: &ArrayD<f32>) -> ArrayD<f32> {
    tensor.mapv(|x| T::from_f32(x).to_f32())
}

fn held<T: Element>(tensors: &Tensors) -> Tensors {
    Tensors {
        sources: tensors.sources.iter().map(nearest::<T>).collect(),
        residual: tensors.residual.as_ref().map(nearest::<T>),
        gate: tensors.gate.as_ref().map(nearest::<T>),
    }
}

/// How a test has its tensors in memory.
#[derive(Clone, Copy, PartialEq)]
enum Memory {
    Dense,
    /// Inside of larger arrays, the last axis backwards.
    Framed,
}

/// Where tensors inside of larger arrays have nothing of theirs: a value of every type.
const CANARY: f32 = -77.0;
const FRAME: usize = 2;

/// A tensor of T in memory.
struct Stored<T>(ArrayD<T>, Memory);

impl<T: Element> Stored<T> {
    fn new(values: &ArrayD<f32>, memory: Memory) -> Self {
        let Memory::Framed = memory else { return Stored(values.mapv(T::from_f32), memory) };
        let shape: Vec<_> = values.shape().iter().map(|len| len + 2 * FRAME).collect();
        let mut stored =
            Stored(ArrayD::from_elem(IxDyn(&shape), T::from_f32(CANARY)), Memory::Framed);
        stored.view_mut().zip_mut_with(values, |to, &x| *to = T::from_f32(x));
        stored
    }

    fn slice(axis: Axis, len: usize, rank: usize) -> Slice {
        let (first, end) = (FRAME as isize, (len - FRAME) as isize);
        Slice::new(first, Some(end), if axis.index() + 1 == rank { -1 } else { 1 })
    }

    fn view(&self) -> ArrayViewD<'_, T> {
        let rank = self.0.ndim();
        match self.1 {
            Memory::Dense => self.0.view(),
            Memory::Framed => self.0.slice_each_axis(|axis| Self::slice(axis.axis, axis.len, rank)),
        }
    }

    fn view_mut(&mut self) -> ArrayViewMutD<'_, T> {
        let rank = self.0.ndim();
        match self.1 {
            Memory::Dense => self.0.view_mut(),
            Memory::Framed => {
                self.0.slice_each_axis_mut(|axis| Self::slice(axis.axis, axis.len, rank))
            }
        }
    }

    /// The values, widened; nothing around them has been written.
    fn values(mut self) -> ArrayD<f32> {
        let values = self.view().mapv(T::to_f32);
        if self.1 == Memory::Framed {
            self.view_mut().fill(T::from_f32(CANARY));
            assert!(self.0.iter().all(|x| x.to_f32() == CANARY), "written beside a tensor");
        }
        values
    }
}

/// A step on tensors of `T`, which holds the values of `tensors`, with a gradient by dst that `G` holds.
/// Gradients are added to those of `before`.
fn step<T: Element, G: Element>(
    layer: &Pointwise,
    tensors: &Tensors,
    options: Options,
    device: &Device,
    memory: Memory,
    before: Option<&Got>,
) -> pointwise::Result<Got> {
    let stored = |t: &ArrayD<f32>| Stored::<T>::new(t, memory);
    let sources: Vec<_> = tensors.sources.iter().map(stored).collect();
    let (residual, gate) =
        (tensors.residual.as_ref().map(stored), tensors.gate.as_ref().map(stored));
    let views: Vec<_> = sources.iter().map(Stored::view).collect();
    let residual_view = residual.as_ref().map(Stored::view);
    let gate_view = gate.as_ref().map(Stored::view);
    let (first, more) = views.split_first().unwrap();

    let mut params = Params::with_options(layer, device, options)?;
    let mut grads = before.map_or_else(|| params.grads(), |before| before.grads.clone());
    let shape = {
        let inputs = tensors.inputs();
        reference::forward(layer, &inputs)?.raw_dim()
    };
    // In the memory order of the first source.
    let mut dst = match memory {
        Memory::Dense => {
            let like = pointwise::Source::allocate(first, shape.slice())?;
            Stored(like, memory)
        }
        Memory::Framed => stored(&ArrayD::from_elem(shape, f32::NAN)),
    };
    let mut call = params.call(first);
    for source in more {
        call = call.concat(source);
    }
    if let Some(residual) = &residual_view {
        call = call.residual(residual);
    }
    if let Some(gate) = &gate_view {
        call = call.gate(gate);
    }
    let workspace = call.run_into(&mut dst.view_mut())?;

    let d_dst = stored(&nearest::<G>(&d_dst(dst.view().shape())));
    let d_dst = d_dst.view();
    let begun = |like: &ArrayD<f32>, before: Option<&ArrayD<f32>>| match before {
        Some(before) => stored(before),
        None => stored(&like.mapv(|_| f32::NAN)),
    };
    let mut d_sources: Vec<_> = tensors
        .sources
        .iter()
        .enumerate()
        .map(|(i, like)| begun(like, before.map(|before| &before.d_sources[i])))
        .collect();
    let mut d_residual = tensors
        .residual
        .as_ref()
        .map(|like| begun(like, before.and_then(|before| before.d_residual.as_ref())));
    let mut d_gate = tensors
        .gate
        .as_ref()
        .map(|like| begun(like, before.and_then(|before| before.d_gate.as_ref())));
    let accumulate = if before.is_some() { Accumulate::Add } else { Accumulate::Set };
    {
        let mut to_sources: Vec<_> = d_sources.iter_mut().map(Stored::view_mut).collect();
        let mut to_residual = d_residual.as_mut().map(Stored::view_mut);
        let mut to_gate = d_gate.as_mut().map(Stored::view_mut);
        let call = params.backward_call(first, workspace, &d_dst);
        let mut call = call.accumulate(accumulate).accumulate_inputs(accumulate);
        for source in more {
            call = call.concat(source);
        }
        for d in &mut to_sources {
            call = call.d_src(d);
        }
        if let (Some(residual), Some(d)) = (&residual_view, &mut to_residual) {
            call = call.residual(residual).d_residual(d);
        }
        if let (Some(gate), Some(d)) = (&gate_view, &mut to_gate) {
            call = call.gate(gate).d_gate(d);
        }
        call.run(&mut grads)?;
    }
    Ok(Got {
        dst: dst.values(),
        d_sources: d_sources.into_iter().map(Stored::values).collect(),
        d_residual: d_residual.map(Stored::values),
        d_gate: d_gate.map(Stored::values),
        grads,
        params,
    })
}

/// What rounding a value to a type changes of it at most: half a unit in its last place, or in that of
/// the smallest normal value.
fn rounding<T: Element>(x: f64) -> f64 {
    match T::DTYPE {
        DType::F16 => (2f64.powi(-11) * x.abs()).max(2f64.powi(-25)),
        DType::Bf16 => 2f64.powi(-8) * x.abs(),
        _ => 0.0,
    }
}

/// Whether a run's error is within what sums in f32 are allowed ([`training::worst`] has the rule) and
/// one rounding of what T holds.
fn check<T: Element>(
    got: &Got,
    layer: &Pointwise,
    tensors: &Tensors,
    statistics: Statistics,
) -> Result<(), String> {
    let inputs = tensors.inputs();
    let d_dst = nearest::<T>(&d_dst(got.dst.shape()));
    let backward = |layer: &Pointwise, statistics| -> Result<Gradients, String> {
        reference::backward(layer, &inputs, statistics, d_dst.view()).map_err(|e| e.to_string())
    };
    let want = backward(layer, statistics)?;
    let uncancelled = named(&backward(&with_statistics(layer, &want), Statistics::Frozen)?);
    let terms = terms(layer, got.dst.shape()) as f64;
    // One channel has no deviation: its layer norm divides by the root of eps.
    let normalised = layer.stages().iter().any(|stage| matches!(stage, Stage::LayerNorm(_)));
    let alone = layer.c_out() == 1 && normalised;
    let steepest = if alone { 1e-5f64.sqrt().recip() } else { 1.0 };
    let (got, want) = (got.named(), named(&want));
    assert_eq!(got.len(), want.len(), "everything is compared");
    for (name, got) in got {
        let find = |all: &[(String, Vec<f64>)]| {
            all.iter().find(|(other, _)| *other == name).map(|(_, values)| values.clone())
        };
        let want = find(&want).ok_or_else(|| format!("the reference has no {name}"))?;
        let terms_of = find(&uncancelled).unwrap_or_default();
        let scale = largest(&want).max(largest(&terms_of)) * steepest;
        let unit = f64::from(f32::EPSILON) * terms * scale;
        // What is not of a tensor is of a parameter, and f32.
        let held = name == "dst" || name.starts_with("d_");
        for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
            let most = unit + if held { rounding::<T>(want.abs() + unit) } else { 0.0 };
            // NaN is close to nothing.
            let close = got == want || (got - want).abs() <= most;
            if !close {
                return Err(format!(
                    "{name}[{i}] = {got} instead of {want}, allowed are {most:.1e}"
                ));
            }
        }
    }
    Ok(())
}

fn fixtures<T: Element>() {
    let device = Device::cpu();
    let mut failures = Vec::new();
    let mut seen = 0;
    for case in Fixtures::load().cases_and_embedded().iter().filter(|case| trainable(case)) {
        for statistics in [Statistics::Batch, Statistics::Frozen] {
            for last in [false, true] {
                let what = format!("{}, {statistics:?}, channels last {last}", case.name);
                let (layer, tensors) = (case.layer(), held::<T>(&Tensors::of(case, last)));
                let options = Options { statistics, ..Options::default() };
                let got = step::<T, T>(&layer, &tensors, options, &device, Memory::Dense, None);
                match got.map(|got| check::<T>(&got, &layer, &tensors, statistics)) {
                    Ok(Ok(())) => seen += 1,
                    Ok(Err(at)) => failures.push(format!("{what}: {at}")),
                    Err(error) => failures.push(format!("{what}: {error}")),
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(seen > 400, "only {seen} runs");
}

/// Layers of every path through a pass, on shapes that need several blocks, units and parts.
fn layers() -> Vec<(&'static str, Pointwise, Vec<usize>)> {
    let plain = |c_out, c_in| Pointwise::new(weight(c_out, c_in));
    vec![
        ("values", plain(35, 20).batch_norm(norm(35)).silu(), vec![2, 20, 31, 33]),
        ("bits", plain(35, 20).bias(vector(35, 2)).residual().relu6(), vec![2, 20, 31, 33]),
        ("nothing", plain(35, 20).bias(vector(35, 2)).residual(), vec![1, 20, 1001]),
        ("rank 0", plain(40, 30).bias(vector(40, 2)).batch_norm(norm(40)).gelu(), vec![300, 30]),
        (
            "groups, stride, shuffle",
            plain(48, 12)
                .groups(4)
                .stride(2)
                .batch_norm(norm(48))
                .channel_shuffle(4)
                .residual()
                .leaky_relu(0.1),
            vec![2, 48, 21, 19],
        ),
        (
            "source, gate",
            plain(24, 30).source_batch_norm(norm(30)).source_activation(Activation::Relu).gate(),
            vec![3, 30, 20, 15],
        ),
        ("partial", plain(6, 6).partial(3..9).stride(2).bias(vector(6, 2)), vec![2, 20, 17, 9]),
        (
            "partial, values",
            plain(6, 6).partial(3..9).batch_norm(norm(6)).residual().tanh(),
            vec![2, 20, 17, 9],
        ),
        (
            "layer norm over all",
            plain(24, 10).gelu().layer_norm(LayerNorm::over_all()).relu(),
            vec![2, 10, 20, 21],
        ),
        (
            "layer norm, rank 3",
            plain(24, 10).layer_norm(LayerNorm::over_channels()),
            vec![2, 10, 3, 5, 7],
        ),
    ]
}

fn blocks<T: Element>() {
    let fused = || Pointwise::new(weight(70, 45)).batch_norm(norm(70)).relu();
    let fused = [("batch norm and relu", fused(), vec![2, 45, 33, 29])];
    for (what, layer, shape) in layers().into_iter().chain(fused) {
        for last in [false, true] {
            let tensors = held::<T>(&large_tensors(&layer, &shape, last));
            let mut one = None;
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let device = Device::cpu_with_pool(std::sync::Arc::new(pool));
                let options = Options::default();
                let got = step::<T, T>(&layer, &tensors, options, &device, Memory::Dense, None);
                let got = got.unwrap();
                let Some(one) = &one else {
                    check::<T>(&got, &layer, &tensors, Statistics::Batch)
                        .unwrap_or_else(|at| panic!("{what}, channels last {last}: {at}"));
                    one = Some(got);
                    continue;
                };
                assert!(got.named() == one.named(), "{what}, channels last {last}: {threads}");
                assert!(got.params.layer() == one.params.layer(), "{what}: statistics");
            }
        }
    }
}

fn rounded_once<T: Element>() {
    let device = Device::cpu();
    for (what, layer, shape) in layers() {
        for (last, memory) in
            [(false, Memory::Dense), (true, Memory::Dense), (false, Memory::Framed)]
        {
            let what = format!("{what}, channels last {last}, dense {}", memory == Memory::Dense);
            let tensors = held::<T>(&large_tensors(&layer, &shape, last));
            let run = |before| {
                let options = Options::default;
                let half =
                    step::<T, T>(&layer, &tensors, options(), &device, memory, before).unwrap();
                let wide = step::<f32, T>(&layer, &tensors, options(), &device, memory, before);
                let wide = wide.unwrap();
                let pairs = [(&half.dst, &wide.dst)];
                let pairs = pairs.into_iter().chain(half.d_sources.iter().zip(&wide.d_sources));
                let pairs = pairs.chain(half.d_residual.iter().zip(&wide.d_residual));
                for (half, wide) in pairs.chain(half.d_gate.iter().zip(&wide.d_gate)) {
                    let same = half.iter().zip(&nearest::<T>(wide)).all(|(a, b)| a == b);
                    assert!(half.shape() == wide.shape() && same, "{what}");
                }
                assert!(half.grads == wide.grads, "{what}: gradients of parameters");
                assert!(half.params.layer() == wide.params.layer(), "{what}: statistics");
                half
            };
            let once = run(None);
            run(Some(&once));
        }
    }
}

/// Small integers that look like nothing else.
fn small(shape: &[usize], seed: u32, most: f32) -> ArrayD<f32> {
    random(shape, seed).mapv(|x| (x * (most + 0.99)).trunc())
}

fn integers<T: Element>() {
    let device = Device::cpu();
    let plain = |c_out: usize, c_in: usize| {
        let weight = small(&[c_out, c_in], 7, 1.0);
        Pointwise::new(weight.into_dimensionality::<ndarray::Ix2>().unwrap())
    };
    let bias = |len| small(&[len], 3, 3.0).iter().copied().collect::<Vec<_>>();
    for (layer, shapes) in [
        (plain(19, 23).bias(bias(19)).relu(), vec![vec![2, 23, 7, 7]]),
        (plain(16, 8).groups(2).stride(2).bias(bias(16)), vec![vec![1, 16, 9, 17]]),
        (plain(7, 5).partial(3..8).residual(), vec![vec![3, 11, 21]]),
        (plain(33, 17).residual().relu(), vec![vec![40, 5], vec![40, 12]]),
        (plain(9, 12).gate().bias(bias(9)), vec![vec![2, 12, 4, 3, 5]]),
    ] {
        for last in [false, true] {
            let all: usize = shapes.iter().map(|shape| shape[1]).sum();
            let mut whole = shapes[0].clone();
            whole[1] = all;
            let mut tensors = large_tensors(&layer, &whole, last);
            let order = |t: ArrayD<f32>| if last { crate::common::channels_last(&t) } else { t };
            tensors.sources = shapes.iter().map(|shape| order(small(shape, 1, 2.0))).collect();
            tensors.residual = tensors.residual.map(|t| order(small(t.shape(), 2, 3.0)));
            tensors.gate = tensors.gate.map(|t| small(t.shape(), 5, 2.0));
            let dst = reference::forward(&layer, &tensors.inputs()).unwrap();
            let d_dst = small(dst.shape(), 9, 2.0);
            let got = with_gradient::<T>(&layer, &tensors, &d_dst, &device);
            let want =
                reference::backward(&layer, &tensors.inputs(), Statistics::Batch, d_dst.view());
            let want = named(&want.unwrap());
            for (name, got) in got {
                let (_, want) = want.iter().find(|(other, _)| *other == name).unwrap();
                assert!(got == *want, "{name}, channels last {last}: {layer:?}");
            }
        }
    }
}

/// What a step with this gradient by dst gives, under its names: dst, and what backward writes.
fn with_gradient<T: Element>(
    layer: &Pointwise,
    tensors: &Tensors,
    d_dst: &ArrayD<f32>,
    device: &Device,
) -> Vec<(String, Vec<f64>)> {
    let of = |t: &ArrayD<f32>| t.mapv(T::from_f32);
    let sources: Vec<_> = tensors.sources.iter().map(of).collect();
    let (residual, gate) = (tensors.residual.as_ref().map(of), tensors.gate.as_ref().map(of));
    let d_dst = of(d_dst);
    let mut params = Params::new(layer, device).unwrap();
    let mut grads = params.grads();
    let (first, more) = sources.split_first().unwrap();
    let mut call = params.call(first);
    for source in more {
        call = call.concat(source);
    }
    if let Some(residual) = &residual {
        call = call.residual(residual);
    }
    if let Some(gate) = &gate {
        call = call.gate(gate);
    }
    let (dst, workspace) = call.run().unwrap();
    let mut d_sources = sources.clone();
    let (mut d_residual, mut d_gate) = (residual.clone(), gate.clone());
    let mut call = params.backward_call(first, workspace, &d_dst);
    for source in more {
        call = call.concat(source);
    }
    for d in &mut d_sources {
        call = call.d_src(d);
    }
    if let (Some(residual), Some(d)) = (&residual, &mut d_residual) {
        call = call.residual(residual).d_residual(d);
    }
    if let (Some(gate), Some(d)) = (&gate, &mut d_gate) {
        call = call.gate(gate).d_gate(d);
    }
    call.run(&mut grads).unwrap();
    let wide = |t: ArrayD<T>| t.mapv(T::to_f32);
    let d_sources = d_sources.into_iter().map(wide).collect();
    let (d_residual, d_gate) = (d_residual.map(wide), d_gate.map(wide));
    Got { dst: wide(dst), d_sources, d_residual, d_gate, grads, params }.named()
}

/// Each branch gives what it gives by itself; their gradients by the source are added in order, each
/// sum rounded.
fn branches<T: Element>() {
    let device = Device::cpu();
    let plain = |c_out| Pointwise::new(weight(c_out, 20));
    let layers = [
        plain(24).batch_norm(norm(24)).relu(),
        plain(12).stride(2).bias(vector(12, 2)).relu6(),
        plain(8).source_activation(Activation::Relu).bias(vector(8, 2)).silu(),
    ];
    let src = random(&[2, 20, 9, 7], 1).mapv(T::from_f32);
    let params = || layers.iter().map(|layer| Params::new(layer, &device).unwrap());
    let mut together = Branches::new(params().collect()).unwrap();
    let mut grads = together.grads();
    let (dsts, workspaces) = together.forward(&src).unwrap();
    let d_dsts: Vec<_> = dsts.iter().map(|dst| d_dst(dst.shape()).mapv(T::from_f32)).collect();
    let views: Vec<_> = d_dsts.iter().map(|d| d as &dyn AsTensor<T>).collect();
    let d_src = together.backward(&src, workspaces, &views, &mut grads, Accumulate::Set).unwrap();

    let mut sum = src.clone();
    for (i, mut params) in params().enumerate() {
        let mut alone = params.grads();
        let (dst, workspace) = params.forward(&src).unwrap();
        let wide = |t: &ArrayD<T>| t.mapv(T::to_f32);
        assert!(wide(&dst) == wide(&dsts[i]), "branch {i}: dst");
        let accumulate = if i == 0 { Accumulate::Set } else { Accumulate::Add };
        let call = params.backward_call(&src, workspace, &d_dsts[i]).accumulate_inputs(accumulate);
        call.d_src(&mut sum).run(&mut alone).unwrap();
        assert!(alone == grads[i], "branch {i}: gradients");
        assert!(params.layer() == together.layers()[i].layer(), "branch {i}: statistics");
    }
    assert!(sum.mapv(T::to_f32) == d_src.mapv(T::to_f32), "d_src");
}

/// A loss times a power of two has gradients times the same, bit for bit, where none is subnormal; one
/// that is too large is seen in the gradients.
fn loss_scale<T: Element>() {
    const SCALE: f32 = 256.0;
    let layer = Pointwise::new(weight(24, 20)).bias(vector(24, 2)).batch_norm(norm(24)).silu();
    let mut params = Params::new(&layer, &Device::cpu()).unwrap();
    let src = random(&[2, 20, 15, 11], 1).mapv(T::from_f32);
    let gradient = nearest::<T>(&random(&[2, 24, 15, 11], 3).mapv(|x| x / 64.0));
    let mut run = |scale: f32| {
        let mut grads = params.grads();
        let d_dst = gradient.mapv(|x| T::from_f32(x * scale));
        let (_, workspace) = params.forward(&src).unwrap();
        let set = Accumulate::Set;
        let d_src = params.backward(&src, workspace, &d_dst, &mut grads, set).unwrap();
        (d_src.mapv(T::to_f32), grads)
    };
    let (d_src, grads) = run(1.0);
    let (scaled, mut scaled_grads) = run(SCALE);
    assert!(grads.is_finite() && scaled_grads.is_finite());
    // The smallest normal values of f16, and of bf16, which are f32's.
    let smallest = if T::DTYPE == DType::F16 { 2f32.powi(-14) } else { f32::MIN_POSITIVE };
    let mut compared = 0;
    for (&d, &scaled) in d_src.iter().zip(&scaled).filter(|(d, _)| d.abs() >= smallest) {
        assert_eq!(d * SCALE, scaled);
        compared += 1;
    }
    assert!(compared > 1000, "only {compared} of {}", d_src.len());
    scaled_grads.scale(1.0 / SCALE);
    assert!(scaled_grads == grads);
    // Beyond the range of the type, where nothing else is.
    let (_, grads) = run(2f32.powi(if T::DTYPE == DType::F16 { 24 } else { 120 }) * SCALE * 256.0);
    assert!(!grads.is_finite(), "{grads:?}");
}

fn workspaces<T: Element>() {
    let src = random(&[2, 5, 16, 10], 1).mapv(T::from_f32);
    let plain = || Pointwise::new(weight(6, 5)).bias(vector(6, 2));
    let values = 2 * 6 * 160;
    for (layer, bytes) in [
        (plain(), 0),
        (plain().relu(), values / 8),
        (plain().batch_norm(norm(6)).relu(), values * 4),
    ] {
        let mut params = Params::new(&layer, &Device::cpu()).unwrap();
        let (_, workspace) = params.forward(&src).unwrap();
        assert_eq!(workspace.bytes(), bytes, "{layer:?}");
        assert_eq!(params.workspace_bytes(src.shape()).unwrap(), bytes);
    }
}

fn nothing<T: Element>() {
    let layer = Pointwise::new(Array2::from_elem((4, 3), 0.5)).batch_norm(norm(4)).relu();
    let mut params = Params::new(&layer, &Device::cpu()).unwrap();
    let src = ArrayD::<T>::default(IxDyn(&[0, 3, 4, 8]));
    let mut grads = params.grads();
    let (dst, workspace) = params.forward(&src).unwrap();
    let d_src = params.backward(&src, workspace, &dst, &mut grads, Accumulate::Set).unwrap();
    assert_eq!((dst.shape(), d_src.shape()), (&[0, 4, 4, 8][..], &[0, 3, 4, 8][..]));
    grads.visit(|name, _, values| assert!(values.iter().all(|&d| d == 0.0), "{name}"));
}

#[test]
fn a_workspace_fits_tensors_of_its_type_only() {
    let layer = Pointwise::new(weight(6, 5)).batch_norm(norm(6));
    let mut params = Params::new(&layer, &Device::cpu()).unwrap();
    let mut grads = params.grads();
    let src = random(&[2, 5, 4, 3], 1);
    let (_, workspace) = params.forward(&src.mapv(bf16::from_f32)).unwrap();
    let d_dst = ArrayD::<f16>::default(IxDyn(&[2, 6, 4, 3]));
    let src = src.mapv(f16::from_f32);
    let error = params.backward(&src, workspace, &d_dst, &mut grads, Accumulate::Set).unwrap_err();
    assert!(matches!(error, Error::Workspace { .. }), "{error:?}");
    assert!(error.to_string().contains("tensors of bf16, not f16"), "{error}");
    assert!(params.get(name::RUNNING_MEAN).is_some_and(|mean| mean.iter().any(|&x| x != 0.0)));
}
