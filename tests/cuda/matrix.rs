//! What every kernel of every dtype has to do, each with a part of it in turn.

use ndarray::{Array2, Array5, ArrayD};
use pointwise::{
    BatchNorm, CudaDevice, CudaTensor, Device, LayerNorm, Math, Pointwise, PrepareOptions,
    Quantization, Quantized, bf16, f16, reference,
};

use super::cases::{
    Case, LAYOUTS, Layout, Placed, Value, chain, close, force, kernels, kernels_of, rounded,
    same_bits,
};
use super::half::unit;
use super::numbers::Random;
use super::tensor_cores;
use super::training::ACTIVATIONS;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("every_kernel_runs_layers_of_networks", networks),
    ("every_kernel_has_every_kind_of_activation", activations),
    ("every_kernel_has_stages_in_random_order", random_stages),
    ("empty_tensors_give_empty_results_in_every_type", empty),
];

/// What is done with a kernel.
pub trait Turn {
    /// On tensors of `T`, with the kernel that the options force, the `i`-th of all.
    fn take<T: Value>(&mut self, i: usize, options: PrepareOptions) -> Outcome;
}

/// Every kernel of real numbers takes its turn.
pub fn every_kernel(device: &CudaDevice, turn: &mut impl Turn) -> Outcome {
    let named = |kernel: &'static str, math| (kernel, PrepareOptions { math, ..force(kernel) });
    let f32s = kernels(device).into_iter().map(|kernel| (kernel, Math::F32));
    let f32s = f32s.chain(tensor_cores::all(device)).map(|(kernel, math)| named(kernel, math));
    let f16s = kernels_of::<f16>(device).into_iter().map(|kernel| named(kernel, Math::F32));
    let bf16s = kernels_of::<bf16>(device).into_iter().map(|kernel| named(kernel, Math::F32));
    let [f32s, f16s, bf16s]: [Vec<_>; 3] = [f32s.collect(), f16s.collect(), bf16s.collect()];
    let all = f32s.iter().chain(&f16s).chain(&bf16s).enumerate();
    for (i, (kernel, options)) in all {
        let options = options.clone();
        let taken = match i {
            i if i < f32s.len() => turn.take::<f32>(i, options),
            i if i < f32s.len() + f16s.len() => turn.take::<f16>(i, options),
            _ => turn.take::<bf16>(i, options),
        };
        taken.map_err(|failed| format!("{kernel}: {}", failed.message().unwrap_or_default()))?;
    }
    Ok(())
}

/// Layers of networks, exact on integers.
struct Networks<'a>(&'a CudaDevice, Random);

impl Turn for Networks<'_> {
    fn take<T: Value>(&mut self, i: usize, options: PrepareOptions) -> Outcome {
        let Networks(device, random) = self;
        let (case, layout) = [
            (Case::new(1, 64, 64, [1, 14, 14]), Layout::First),
            (Case::new(2, 160, 48, [1, 7, 7]), Layout::First),
            (Case::new(2, 48, 160, [1, 7, 7]), Layout::Last),
            (Case::new(1, 24, 16, [1, 28, 28]), Layout::Last),
            (Case::new(5, 320, 100, [1, 1, 1]), Layout::First),
            (Case::new(1, 3, 64, [1, 1, 211]), Layout::First),
            (Case { stride: 2, ..Case::new(1, 32, 64, [1, 13, 13]) }, Layout::Last),
        ][i % 7]
            .clone();
        let (weight, bias) = (random.integers(case.c_out * case.c_in), random.integers(case.c_out));
        let src = Array5::from_shape_simple_fn(case.src_shape(), || random.integer());
        let exact = chain(&case, &weight, &bias, &src).mapv(|x| x.max(0.0));
        let layer = case.layer(weight).bias(bias).relu();
        let layer = layer.prepare_as::<T>(&Device::from(device.clone()), options)?;
        let src = Placed::<T>::filled(device, src.view(), layout);
        let mut dst = Placed::<T>::blank(device, case.dst_shape(), layout);
        layer.forward_into(&src.view(), &mut dst.view_mut())?;
        same_bits(&dst.read(), &rounded::<T>(&exact), &format!("{case:?}"))
    }
}

fn networks(device: &CudaDevice) -> Outcome {
    let mut turns = Networks(device, Random::new(65));
    // What is chosen for each, too.
    for i in 0..7 {
        turns.take::<f32>(i, PrepareOptions::default())?;
        turns.take::<bf16>(i, PrepareOptions::default())?;
    }
    every_kernel(device, &mut turns)
}

/// Operands that every dtype holds, TF32 too; sums of a few are exact.
fn eighths(random: &mut Random, len: usize) -> Vec<f32> {
    random.integers(len).into_iter().map(|x| x / 8.0).collect()
}

/// Runs a layer of 20 channels to 36, in one of all layouts, against the specification.
fn check<T: Value>(
    device: &CudaDevice,
    random: &mut Random,
    options: PrepareOptions,
    (at, tolerance): (usize, f64),
    stages: impl FnOnce(Pointwise, &mut Random) -> Pointwise,
) -> Outcome {
    let case = Case::new(2, 20, 36, [1, 3, 7]);
    let layer = case.layer(eighths(random, case.c_out * case.c_in));
    let layer = stages(layer, random);
    let takes_residual = layer.stages().contains(&pointwise::Stage::Residual);
    let src = Array5::from_shape_vec(case.src_shape(), eighths(random, 2 * 20 * 21))?;
    let residual = rounded::<T>(&random.tensor(case.dst_shape()));
    let inputs = reference::Inputs {
        sources: vec![src.view().into_dyn()],
        residual: takes_residual.then(|| residual.view().into_dyn()),
        gate: None,
    };
    let expected = reference::forward(&layer, &inputs)?;
    let prepared = layer.prepare_as::<T>(&Device::from(device.clone()), options)?;
    let layout = LAYOUTS[at % 8];
    let src = Placed::<T>::filled(device, src.view(), layout);
    let residual = Placed::<T>::filled(device, residual.view(), layout);
    let mut dst = Placed::<T>::blank(device, case.dst_shape(), layout);
    let (src, residual) = (src.view(), residual.view());
    let mut call = prepared.call(&src);
    if takes_residual {
        call = call.residual(&residual);
    }
    call.run_into(&mut dst.view_mut())?;
    let what = format!("{layout:?}, {:?}", layer.stages());
    close(&dst.read().into_dyn(), &expected, tolerance + unit::<T>(), &what)
}

struct Activations<'a>(&'a CudaDevice, Random, Vec<usize>);

impl Turn for Activations<'_> {
    fn take<T: Value>(&mut self, i: usize, options: PrepareOptions) -> Outcome {
        let Activations(device, random, met) = self;
        for turn in 0..2 {
            let of_all = (i + 5 * turn) % ACTIVATIONS.len();
            met[of_all] += 1;
            let options = options.clone();
            check::<T>(device, random, options, (i + turn, 1e-6), |layer, random| {
                layer.bias(random.normal(36)).activation(ACTIVATIONS[of_all])
            })?;
        }
        Ok(())
    }
}

fn activations(device: &CudaDevice) -> Outcome {
    let met = vec![0; ACTIVATIONS.len()];
    let mut turns = Activations(device, Random::new(66), met);
    every_kernel(device, &mut turns)?;
    assert!(turns.2.iter().all(|&met| met > 0), "{:?}", turns.2);
    Ok(())
}

struct RandomStages<'a>(&'a CudaDevice, Random);

impl Turn for RandomStages<'_> {
    fn take<T: Value>(&mut self, i: usize, options: PrepareOptions) -> Outcome {
        let RandomStages(device, random) = self;
        for turn in 0..3 {
            let options = options.clone();
            // What scales a weight first would be rounded to TF32 with it.
            let tf32 = options.math == Math::Tf32;
            check::<T>(device, random, options, (i + 3 * turn, 2e-5), |layer, random| {
                stages(if tf32 { layer.leaky_relu(0.5) } else { layer }, random, turn)
            })?;
        }
        Ok(())
    }
}

/// Up to six stages; the last two of three turns have a layer norm among them.
fn stages(mut layer: Pointwise, random: &mut Random, turn: usize) -> Pointwise {
    let mut below = |n: usize| (random.uniform() * n as f32) as usize;
    let count = 2 + below(5);
    let norm_at = (turn > 0).then(|| below(count));
    // A layer has only activations more than once.
    let mut kinds = [0, 1, 2, 3, 4, 4, 4];
    for i in 1..kinds.len() {
        kinds.swap(i, below(i + 1));
    }
    for (at, &kind) in kinds[..count].iter().enumerate() {
        if norm_at == Some(at) {
            let norm = [LayerNorm::over_channels(), LayerNorm::over_all()][turn - 1].clone();
            let norm = norm.affine(random.normal(36), random.normal(36)).eps(1e-3);
            layer = layer.layer_norm(norm);
        }
        layer = match kind {
            0 => layer.bias(random.normal(36)),
            1 => {
                let variance = random.normal(36).iter().map(|x| x * x + 0.5).collect::<Vec<_>>();
                let norm = BatchNorm::new(random.normal(36), variance);
                layer.batch_norm(norm.affine(random.normal(36), random.normal(36)))
            }
            2 => layer.prelu(random.normal(36)),
            3 => layer.residual(),
            _ => {
                let of_all = (random.uniform() * ACTIVATIONS.len() as f32) as usize;
                layer.activation(ACTIVATIONS[of_all])
            }
        };
    }
    layer
}

fn random_stages(device: &CudaDevice) -> Outcome {
    every_kernel(device, &mut RandomStages(device, Random::new(67)))
}

fn empty(device: &CudaDevice) -> Outcome {
    fn of<T: Value>(device: &CudaDevice) -> Outcome {
        let layer = Pointwise::new(Array2::ones((3, 2)));
        let layer = layer.prepare_as::<T>(&Device::from(device.clone()), Default::default())?;
        for shape in [[0, 2, 4, 4], [2, 2, 0, 4]] {
            let expected = [shape[0], 3, shape[2], shape[3]];
            let src = CudaTensor::<T>::zeros(device, &shape)?;
            assert_eq!(layer.forward(&src)?.to_host()?.shape(), expected);
            let host = ArrayD::<T>::default(&shape[..]);
            assert_eq!(layer.forward(&host)?.shape(), expected);
        }
        Ok(())
    }
    of::<f32>(device)?;
    of::<f16>(device)?;
    of::<bf16>(device)?;
    let layer = Quantized::new(Array2::ones((3, 2)), vec![1.0; 3], Quantization::u8(1.0, 0));
    let layer = layer.dst(Quantization::u8(1.0, 0)).prepare(&Device::from(device.clone()))?;
    for shape in [[0, 2, 4, 4], [2, 2, 0, 4]] {
        let expected = [shape[0], 3, shape[2], shape[3]];
        let src = CudaTensor::<u8>::zeros(device, &shape)?;
        let mut dst = CudaTensor::<u8>::zeros(device, &expected)?;
        layer.call(&src).run_into(&mut dst)?;
        let host = ArrayD::<u8>::default(&shape[..]);
        assert_eq!(layer.call(&host).run::<u8>()?.shape(), expected);
    }
    Ok(())
}
