//! `forward_into` allocates nothing after warm-up, as long as no helper is called.

use crate::counting::allocated;
use ndarray::{Array2, ArrayD, IxDyn};
use pointwise::{
    Activation, BatchNorm, Device, LayerNorm, Pointwise, PrepareOptions, Prepared, Sequence,
    TensorMut, TensorRef,
};

/// Allocations of this thread while `f` runs, after it has run before.
fn allocations(mut f: impl FnMut()) -> usize {
    f();
    f();
    let before = allocated();
    (0..3).for_each(|_| f());
    allocated() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Vec::<f32>::with_capacity(10)))), 3);
}

fn weight(c_out: usize, c_in: usize) -> Array2<f32> {
    Array2::from_elem((c_out, c_in), 0.01)
}

fn norm(channels: usize) -> BatchNorm {
    BatchNorm::new(vec![0.1; channels], vec![1.5; channels])
}

const C_IN: usize = 24;
const C_OUT: usize = 36;

/// One layer of each kind, `C_IN` to `C_OUT` channels.
fn layers() -> Vec<(&'static str, Pointwise)> {
    let plain = || Pointwise::new(weight(C_OUT, C_IN));
    let grouped = || Pointwise::new(weight(C_OUT, C_IN / 2)).groups(2);
    let affine = |norm: LayerNorm| norm.affine(vec![1.1; C_OUT], vec![0.1; C_OUT]);
    vec![
        ("bare", plain()),
        ("bias, batch norm, relu", plain().bias(vec![1.0; C_OUT]).batch_norm(norm(C_OUT)).relu()),
        ("gelu", plain().gelu()),
        ("prelu, bias", plain().prelu(vec![0.1; C_OUT]).bias(vec![1.0; C_OUT])),
        ("residual, relu", plain().residual().relu()),
        ("silu, residual", plain().silu().residual()),
        ("gate", plain().gate()),
        (
            "source batch norm, relu, gate, residual",
            plain()
                .source_batch_norm(norm(C_IN))
                .source_activation(Activation::Relu)
                .gate()
                .residual(),
        ),
        ("stride", plain().stride(2)),
        ("stride, source activation", plain().stride(3).source_activation(Activation::Mish)),
        ("layer norm", plain().layer_norm(affine(LayerNorm::over_channels()))),
        ("layer norm over all", plain().layer_norm(affine(LayerNorm::over_all()))),
        (
            "layer norm over all, silu, residual",
            plain().layer_norm(LayerNorm::over_all()).silu().residual(),
        ),
        ("groups", grouped()),
        ("groups, shuffle, residual", grouped().channel_shuffle(4).residual().relu()),
        ("shuffle", plain().channel_shuffle(4)),
        (
            "groups, layer norm, shuffle",
            grouped().layer_norm(LayerNorm::over_channels()).channel_shuffle(3),
        ),
    ]
}

/// A tensor in either memory order.
struct Tensor {
    data: Vec<f32>,
    shape: Vec<usize>,
    strides: Vec<isize>,
}

impl Tensor {
    fn new(shape: &[usize], channels_last: bool) -> Self {
        let array = ArrayD::<f32>::zeros(IxDyn(shape));
        let mut strides = array.strides().to_vec();
        if channels_last {
            strides.iter_mut().skip(2).for_each(|stride| *stride *= shape[1] as isize);
            strides[1] = 1;
        }
        Tensor { data: vec![0.5; array.len()], shape: shape.to_vec(), strides }
    }

    fn view(&self) -> TensorRef<'_> {
        TensorRef::from_slice(&self.data, 0, &self.shape, &self.strides).unwrap()
    }

    fn view_mut(&mut self) -> TensorMut<'_> {
        TensorMut::from_slice(&mut self.data, 0, &self.shape, &self.strides).unwrap()
    }
}

fn check(
    name: &str,
    description: &Pointwise,
    layer: &Prepared,
    src_shape: &[usize],
    failures: &mut Vec<String>,
) {
    let has = |stage: &str| {
        description.stages().iter().any(|s| s.name() == stage)
            || description.source_stages().iter().any(|s| s.name() == stage)
    };
    for (src_last, dst_last) in [(false, false), (true, true), (true, false), (false, true)] {
        let src = Tensor::new(src_shape, src_last);
        let mut dst = Tensor::new(&layer.dst_shape(src_shape).unwrap(), dst_last);
        let residual = has("residual").then(|| Tensor::new(&dst.shape, dst_last));
        let gate = has("gate").then(|| Tensor::new(&[src_shape[0], description.c_in()], false));
        let src = src.view();
        let (residual, gate) =
            (residual.as_ref().map(Tensor::view), gate.as_ref().map(Tensor::view));
        let count = allocations(|| {
            if residual.is_none() && gate.is_none() {
                return layer.forward_into(&src, &mut dst.view_mut()).unwrap();
            }
            let mut call = layer.call(&src);
            if let Some(residual) = &residual {
                call = call.residual(residual);
            }
            if let Some(gate) = &gate {
                call = call.gate(gate);
            }
            call.run_into(&mut dst.view_mut()).unwrap();
        });
        if count > 0 {
            failures.push(format!(
                "{name}, src {src_shape:?} channels {}, dst channels {}: {count} allocations",
                if src_last { "last" } else { "first" },
                if dst_last { "last" } else { "first" },
            ));
        }
    }
}

fn check_all(device: &Device, src_shapes: &[&[usize]]) {
    let mut failures = Vec::new();
    for (name, description) in layers() {
        let layer = description.prepare(device).unwrap();
        for src_shape in src_shapes {
            check(name, &description, &layer, src_shape, &mut failures);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn small_layers() {
    check_all(&Device::cpu(), &[&[1, C_IN], &[9, C_IN], &[2, C_IN, 7, 7], &[3, C_IN, 2, 3, 4]]);
}

#[test]
fn large_layers_on_one_thread() {
    check_all(&Device::cpu().threads(1), &[&[2, C_IN, 83, 71], &[4000, C_IN]]);
}

#[test]
fn every_kernel() {
    let mut failures = Vec::new();
    let device = Device::cpu().threads(1);
    for (name, description) in layers() {
        let shape = [2, C_IN, 9, 9];
        for candidate in description.prepare(&device).unwrap().plans(&shape).unwrap() {
            if candidate.verdict.is_err() {
                continue;
            }
            let kernel = Some(candidate.kernel.to_owned());
            let options = PrepareOptions { kernel, ..Default::default() };
            let layer = description.prepare_with(&device, options).unwrap();
            let name = format!("{name} ({})", candidate.kernel);
            check(&name, &description, &layer, &shape, &mut failures);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn tuned_layers() {
    let mut failures = Vec::new();
    let device = Device::cpu().threads(1);
    for (name, description) in layers() {
        let layer = description.prepare(&device).unwrap();
        let shape: &[usize] = &[2, C_IN, 9, 9];
        let tuning = layer
            .tune(&[
                (shape, pointwise::Layout::ChannelsFirst),
                (shape, pointwise::Layout::ChannelsLast),
            ])
            .unwrap();
        check(name, &description, &layer.with_tuning(&tuning), shape, &mut failures);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn partial_convolutions() {
    let mut failures = Vec::new();
    let device = Device::cpu().threads(1);
    for description in [
        Pointwise::new(weight(C_OUT, C_IN)).partial(3..3 + C_IN).relu(),
        Pointwise::new(weight(C_OUT, C_IN)).partial(3..3 + C_IN).stride(2).residual(),
    ] {
        let layer = description.prepare(&device).unwrap();
        for shape in [vec![2, C_IN + 5, 6, 7], vec![1, C_IN + 5, 80, 90], vec![9, C_IN + 5]] {
            check("partial", &description, &layer, &shape, &mut failures);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn arrays_are_viewed_without_allocating() {
    let layer = Pointwise::new(weight(4, 3)).prepare(&Device::cpu()).unwrap();
    let src = ndarray::Array4::<f32>::ones((2, 3, 5, 5));
    let mut dst = ndarray::Array4::<f32>::ones((2, 4, 5, 5));
    assert_eq!(allocations(|| layer.forward_into(&src, &mut dst).unwrap()), 0);
    let last = ndarray::Array4::<f32>::ones((2, 5, 5, 3));
    let last = pointwise::nhwc(last.view());
    assert_eq!(allocations(|| layer.forward_into(&last, &mut dst).unwrap()), 0);
}

#[test]
fn sequences() {
    let device = Device::cpu().threads(1);
    let chain = [
        Pointwise::new(weight(40, 12)).bias(vec![0.1; 40]).silu(),
        Pointwise::new(weight(20, 40)).layer_norm(LayerNorm::over_all()).stride(2),
        Pointwise::new(weight(30, 10)).groups(2).channel_shuffle(3),
        Pointwise::new(weight(8, 30)).source_activation(Activation::Relu),
    ];
    let layers = chain.iter().map(|layer| layer.prepare(&device).unwrap()).collect();
    let sequence = Sequence::new(layers).unwrap();
    for shape in [vec![2, 12, 9, 8], vec![1, 12, 90, 70], vec![50, 12]] {
        for last in [false, true] {
            let src = Tensor::new(&shape, last);
            let mut dst_shape = shape.clone();
            dst_shape[1] = 8;
            dst_shape[2..].iter_mut().for_each(|s| *s = s.div_ceil(2));
            let mut dst = Tensor::new(&dst_shape, last);
            let src = src.view();
            let count = allocations(|| sequence.forward_into(&src, &mut dst.view_mut()).unwrap());
            assert_eq!(count, 0, "{shape:?}");
        }
    }
}

/// A thread that has run a large problem needs nothing for a smaller one, whatever its kind.
#[test]
fn scratch_is_shared_by_layers() {
    let device = Device::cpu().threads(1);
    let layers: Vec<_> = layers()
        .into_iter()
        .filter(|(name, _)| !name.contains("residual") && !name.contains("gate"))
        .map(|(_, layer)| layer.prepare(&device).unwrap())
        .collect();
    let src: Vec<_> = [60, 7].map(|side| Tensor::new(&[1, C_IN, side, side], false)).into();
    let run = |src: &Tensor, layer: &Prepared, dst: &mut Tensor| {
        layer.forward_into(&src.view(), &mut dst.view_mut()).unwrap();
    };
    let mut dst: Vec<Vec<Tensor>> = src
        .iter()
        .map(|src| {
            layers
                .iter()
                .map(|layer| Tensor::new(&layer.dst_shape(&src.shape).unwrap(), false))
                .collect()
        })
        .collect();
    for (layer, dst) in layers.iter().zip(&mut dst[0]) {
        run(&src[0], layer, dst);
    }
    let before = allocated();
    for (src, dst) in src.iter().zip(&mut dst) {
        for (layer, dst) in layers.iter().zip(dst) {
            run(src, layer, dst);
        }
    }
    assert_eq!(allocated() - before, 0);
}
