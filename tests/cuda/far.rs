//! Strides of more than 2^31 elements: samples, channels or rows of every tensor in allocations of
//! their own, for a driver that puts those far apart. Every kernel, of every dtype, takes its turns.

use libtest_mimic::Failed;
use ndarray::{Array2, ArrayD, ArrayViewD, Axis};
use pointwise::{
    CudaDevice, CudaTensor, Device, Error, LayerNorm, Place, Pointwise, PrepareOptions,
    Quantization, Quantized, TensorMut, TensorRef, reference,
};

use super::cases::{Case, Held, Value, close, force};
use super::half::unit;
use super::matrix::{Turn, every_kernel};
use super::numbers::Random;
use super::{Outcome, int8};

/// A tensor of two halves along an axis; in one piece, if it has no two there.
struct Far<T> {
    /// In the order of their elements.
    pieces: Vec<CudaTensor<T>>,
    shape: Vec<usize>,
    strides: Vec<isize>,
    axis: usize,
}

impl<T: Held> Far<T> {
    fn new(
        device: &CudaDevice,
        values: ArrayViewD<'_, T>,
        (axis, backwards): (usize, bool),
    ) -> Result<Self, Error> {
        let shape = values.shape().to_vec();
        if shape.get(axis) != Some(&2) {
            let pieces = vec![CudaTensor::from_host(device, values)?];
            let strides = pieces[0].strides().to_vec();
            return Ok(Far { pieces, shape, strides, axis });
        }
        let half =
            |i: usize| CudaTensor::from_host(device, values.slice_axis(Axis(axis), (i..=i).into()));
        // What is allocated first has the lower address.
        let mut pieces = vec![half(usize::from(backwards))?, half(usize::from(!backwards))?];
        if backwards {
            pieces.reverse();
        }
        let bytes = pieces[1].address() as isize - pieces[0].address() as isize;
        let mut strides = pieces[0].strides().to_vec();
        strides[axis] = bytes / size_of::<T>() as isize;
        assert_eq!(backwards, strides[axis] < 0);
        Ok(Far { pieces, shape, strides, axis })
    }

    fn distance(&self) -> usize {
        self.strides[self.axis].unsigned_abs()
    }

    fn place(&self) -> Place {
        Place::Cuda(self.pieces[0].device().ordinal())
    }

    fn view(&self) -> Result<TensorRef<'_, T>, Error> {
        let first = std::ptr::without_provenance(self.pieces[0].address() as usize);
        // SAFETY: the strides lead from one allocation into the other, both borrowed.
        unsafe { TensorRef::from_raw_parts(first, self.place(), &self.shape, &self.strides) }
    }

    fn view_mut(&mut self) -> Result<TensorMut<'_, T>, Error> {
        let first = std::ptr::without_provenance_mut(self.pieces[0].address() as usize);
        // SAFETY: as above, exclusively.
        unsafe { TensorMut::from_raw_parts(first, self.place(), &self.shape, &self.strides) }
    }

    fn read(&self) -> Result<ArrayD<T>, Error> {
        let pieces = self.pieces.iter().map(CudaTensor::to_host).collect::<Result<Vec<_>, _>>()?;
        let pieces: Vec<_> = pieces.iter().map(|piece| piece.view()).collect();
        Ok(ndarray::concatenate(Axis(self.axis), &pieces).unwrap())
    }
}

/// What a layer has beside its convolution.
#[derive(Clone, Copy, Debug, PartialEq)]
enum With {
    Residual,
    Concat,
    Gate,
    /// The channels around the convolution's are copied.
    Partial,
    NormOverChannels,
    NormOverAll,
}

const WITH: [With; 6] = [
    With::Residual,
    With::Concat,
    With::Gate,
    With::Partial,
    With::NormOverChannels,
    With::NormOverAll,
];

/// The axis of which every tensor has two, and whether the first lies behind the second.
const AXES: [(usize, bool); 6] =
    [(0, false), (0, true), (1, false), (1, true), (3, false), (3, true)];

/// A case in which every tensor has two along an axis.
fn case(axis: usize) -> Case {
    match axis {
        0 => Case::new(2, 4, 6, [1, 3, 11]),
        1 => Case::new(3, 2, 2, [1, 3, 11]),
        _ => Case::new(3, 4, 6, [1, 2, 33]),
    }
}

/// Runs one kernel: how far elements are apart at least.
fn run<T: Value>(
    device: &CudaDevice,
    random: &mut Random,
    options: PrepareOptions,
    (at, with): ((usize, bool), With),
) -> Result<usize, Failed> {
    let case = case(at.0);
    let (c_in, c_out) = match with {
        With::Concat => (2 * case.c_in, case.c_out),
        With::Partial => (case.c_in / 2, case.c_out / 2),
        _ => (case.c_in, case.c_out),
    };
    let weight = Array2::from_shape_vec((c_out, c_in), random.integers(c_out * c_in))?;
    let layer = Pointwise::new(weight);
    let layer = match with {
        With::Residual | With::Concat => layer.residual().relu(),
        With::Gate => layer.gate().relu(),
        With::Partial => layer.partial(case.c_in - c_in..case.c_in).relu(),
        With::NormOverChannels => layer.layer_norm(LayerNorm::over_channels()).residual(),
        With::NormOverAll => layer.layer_norm(LayerNorm::over_all()).residual(),
    };
    let mut integers = |shape: &[usize]| ArrayD::from_shape_simple_fn(shape, || random.integer());
    let mut sources = vec![integers(&case.src_shape())];
    if with == With::Concat {
        sources.push(integers(&case.src_shape()));
    }
    let dst_shape = layer.prepare(&Device::cpu())?.dst_shape(&joined(&sources))?;
    let residual = (!matches!(with, With::Gate | With::Partial)).then(|| integers(&dst_shape));
    let gate = (with == With::Gate).then(|| integers(&[case.n, c_in]));
    let inputs = reference::Inputs {
        sources: sources.iter().map(|values| values.view()).collect(),
        residual: residual.as_ref().map(|values| values.view()),
        gate: gate.as_ref().map(|values| values.view()),
    };
    let expected = reference::forward(&layer, &inputs)?;

    let far = |values: &ArrayD<f32>| Far::<T>::new(device, values.mapv(T::from_f32).view(), at);
    let sources = sources.iter().map(far).collect::<Result<Vec<_>, _>>()?;
    let residual = residual.as_ref().map(far).transpose()?;
    let gate = gate.as_ref().map(far).transpose()?;
    let blank = ArrayD::from_elem(&dst_shape[..], T::CANARY);
    let mut dst = Far::new(device, blank.view(), at)?;
    let views = sources.iter().map(Far::view).collect::<Result<Vec<_>, _>>()?;
    let residual = residual.as_ref().map(Far::view).transpose()?;
    let gate = gate.as_ref().map(Far::view).transpose()?;
    let prepared = layer.prepare_as::<T>(&Device::from(device.clone()), options)?;
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
    call.run_into(&mut dst.view_mut()?)?;
    let norm = matches!(with, With::NormOverChannels | With::NormOverAll);
    let tolerance = unit::<T>() + if norm { 1e-5 } else { 0.0 };
    close(&dst.read()?.mapv(T::to_f32), &expected, tolerance, &format!("{with:?}, {at:?}"))?;
    Ok(sources[0].distance().min(dst.distance()))
}

fn joined(sources: &[ArrayD<f32>]) -> Vec<usize> {
    let mut shape = sources[0].shape().to_vec();
    shape[1] *= sources.len();
    shape
}

/// As [`run`], of 8-bit integers: the CPU's bytes.
fn run_int8(
    device: &CudaDevice,
    random: &mut Random,
    kernel: &str,
    at: (usize, bool),
) -> Result<usize, Failed> {
    let case = case(at.0);
    let weight = Array2::from_shape_simple_fn((case.c_out, case.c_in), || random.integer() as i8);
    let to = Quantization::u8(0.25, 100);
    let layer = Quantized::new(weight, vec![0.05; case.c_out], Quantization::u8(0.5, 3));
    let layer = layer.residual(to).relu().dst(to);
    let mut bytes = |shape: [usize; 5]| {
        ArrayD::from_shape_simple_fn(&shape[..], || (random.uniform() * 256.0) as u8)
    };
    let (src, residual) = (bytes(case.src_shape()), bytes(case.dst_shape()));
    let on_cpu = layer.prepare(&Device::cpu())?;
    let expected = on_cpu.call(&src).residual(&residual).run::<u8>()?;

    let prepared = layer.prepare_with(&Device::from(device.clone()), force(kernel))?;
    let src = Far::new(device, src.view(), at)?;
    let residual = Far::new(device, residual.view(), at)?;
    let blank = ArrayD::from_elem(&case.dst_shape()[..], u8::CANARY);
    let mut dst = Far::new(device, blank.view(), at)?;
    let (from, beside) = (src.view()?, residual.view()?);
    prepared.call(&from).residual(&beside).run_into(&mut dst.view_mut()?)?;
    match dst.read()? == expected {
        true => Ok(src.distance().min(dst.distance())),
        false => Err(format!("wrong, {at:?}").into()),
    }
}

struct Turns<'a> {
    device: &'a CudaDevice,
    random: Random,
    nearest: usize,
    /// Layers along axes.
    met: [[bool; WITH.len()]; AXES.len()],
}

impl Turn for Turns<'_> {
    fn take<T: Value>(&mut self, i: usize, options: PrepareOptions) -> Outcome {
        for turn in 0..2 {
            let (axis, with) = ((i + turn) % AXES.len(), (i + i / 6 + 4 * turn) % WITH.len());
            self.met[axis][with] = true;
            let what = (AXES[axis], WITH[with]);
            let distance = run::<T>(self.device, &mut self.random, options.clone(), what)?;
            self.nearest = self.nearest.min(distance);
        }
        Ok(())
    }
}

/// Two turns of every kernel; all together they meet every layer along every axis.
pub fn far_apart(device: &CudaDevice) -> Result<String, Error> {
    let met = [[false; WITH.len()]; AXES.len()];
    let mut turns = Turns { device, random: Random::new(9), nearest: usize::MAX, met };
    if let Err(failed) = every_kernel(device, &mut turns) {
        return Ok(failed.message().unwrap_or_default().into());
    }
    let Turns { mut random, mut nearest, met, .. } = turns;
    if met.iter().flatten().any(|met| !met) {
        return Ok(format!("not every layer along every axis: {met:?}"));
    }
    for (i, kernel) in int8::kernels(&Device::from(device.clone()))?.into_iter().enumerate() {
        for turn in 0..2 {
            match run_int8(device, &mut random, kernel, AXES[(i + 3 * turn) % AXES.len()]) {
                Ok(distance) => nearest = nearest.min(distance),
                Err(failed) => return Ok(format!("{kernel}: {}", failed.message().unwrap_or(""))),
            }
        }
    }
    Ok(format!("right, at least 2^{} elements apart", nearest.ilog2()))
}
