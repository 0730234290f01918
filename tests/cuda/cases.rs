//! Every kernel on every shape, layout and list of steps: exactly, where arithmetic allows it.

use ndarray::{Array1, Array2, Array5, ArrayD, ArrayView5, Axis, IxDyn, ShapeBuilder};
use pointwise::quantized::{F8E4M3, F8E5M2};
use pointwise::{
    Activation, BatchNorm, CudaDevice, CudaTensor, Device, DeviceElement, Element, Place,
    Pointwise, PrepareOptions, Prepared, TensorMut, TensorRef, bf16, f16, reference,
};

use super::half::unit;
use super::numbers::Random;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("every_kernel_on_tile_edges_is_one_fma_chain", every_kernel_on_tile_edges::<f32>),
    ("every_f16_kernel_on_tile_edges_is_one_fma_chain", every_kernel_on_tile_edges::<f16>),
    ("every_bf16_kernel_on_tile_edges_is_one_fma_chain", every_kernel_on_tile_edges::<bf16>),
    ("integers_are_exact_in_every_layout", integers_in_every_layout::<f32>),
    ("integers_are_exact_in_every_layout_of_f16", integers_in_every_layout::<f16>),
    ("integers_are_exact_in_every_layout_of_bf16", integers_in_every_layout::<bf16>),
    ("groups_are_convolutions_of_their_own", groups),
    ("strided_convolutions_read_in_place", strides),
    ("steps_in_any_order", steps_in_any_order::<f32>),
    ("steps_in_any_order_on_f16", steps_in_any_order::<f16>),
    ("steps_in_any_order_on_bf16", steps_in_any_order::<bf16>),
    ("channel_shuffle_with_groups", channel_shuffle),
    ("host_arrays_of_every_rank_and_order", host_arrays),
];

/// One problem, its spatial axes always three.
#[derive(Clone, Debug)]
pub struct Case {
    pub n: usize,
    pub c_in: usize,
    pub c_out: usize,
    pub groups: usize,
    pub spatial: [usize; 3],
    pub stride: usize,
}

impl Case {
    pub const fn new(n: usize, c_in: usize, c_out: usize, spatial: [usize; 3]) -> Self {
        Case { n, c_in, c_out, groups: 1, spatial, stride: 1 }
    }

    pub fn src_shape(&self) -> [usize; 5] {
        let [d, h, w] = self.spatial;
        [self.n, self.c_in, d, h, w]
    }

    pub fn dst_shape(&self) -> [usize; 5] {
        let [d, h, w] = self.spatial.map(|len| len.div_ceil(self.stride));
        [self.n, self.c_out, d, h, w]
    }

    pub fn layer(&self, weight: Vec<f32>) -> Pointwise {
        let shape = (self.c_out, self.c_in / self.groups);
        Pointwise::new(Array2::from_shape_vec(shape, weight).unwrap())
            .groups(self.groups)
            .stride(self.stride)
    }
}

/// How a tensor lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    First,
    Last,
    /// Channels first, one element further: nothing is aligned.
    FirstOdd,
    LastOdd,
    /// A range of channels of a tensor with more of them, channels first or last.
    PartOfFirst,
    PartOfLast,
    /// All axes in the opposite order, as Fortran would have them.
    Fortran,
    /// Backwards along every axis.
    Reversed,
}

pub const LAYOUTS: [Layout; 8] = [
    Layout::First,
    Layout::Last,
    Layout::FirstOdd,
    Layout::LastOdd,
    Layout::PartOfFirst,
    Layout::PartOfLast,
    Layout::Fortran,
    Layout::Reversed,
];

impl Layout {
    /// Strides, the offset of the first element, and the size of the memory around it.
    fn of(self, shape: [usize; 5]) -> ([isize; 5], usize, usize) {
        let [n, c, d, h, w] = shape;
        let wider = match self {
            Layout::PartOfFirst | Layout::PartOfLast => [n, c + 5, d, h, w],
            _ => shape,
        };
        let order = match self {
            Layout::Last | Layout::LastOdd | Layout::PartOfLast => [0, 2, 3, 4, 1],
            Layout::Fortran => [4, 3, 2, 1, 0],
            _ => [0, 1, 2, 3, 4],
        };
        let mut strides = [0isize; 5];
        let mut next = 1;
        for axis in order.into_iter().rev() {
            strides[axis] = next;
            next *= wider[axis].max(1) as isize;
        }
        let mut offset = match self {
            Layout::FirstOdd | Layout::LastOdd => 1,
            Layout::PartOfFirst | Layout::PartOfLast => 3 * strides[1] as usize,
            _ => 0,
        };
        let len = next as usize + offset + 1;
        if self == Layout::Reversed {
            for (stride, &n) in strides.iter_mut().zip(&shape) {
                offset += n.saturating_sub(1) * *stride as usize;
                *stride = -*stride;
            }
        }
        (strides, offset, len)
    }
}

/// What tensors of tests hold.
pub trait Held: DeviceElement {
    /// Where nothing may be written, it must stay: a NaN that no result is, or some byte.
    const CANARY: Self;

    fn same(self, other: Self) -> bool;
}

/// Real numbers.
pub trait Value: Element + Held {}

macro_rules! value {
    ($type:ident, $canary:literal) => {
        impl Held for $type {
            const CANARY: Self = $type::from_bits($canary);

            fn same(self, other: Self) -> bool {
                self.to_bits() == other.to_bits()
            }
        }

        impl Value for $type {}
    };
}

value!(f32, 0x7FC0_BEEF);
value!(f16, 0x7EEF);
value!(bf16, 0x7FEF);

macro_rules! byte {
    ($type:ident, $canary:literal) => {
        impl Held for $type {
            const CANARY: Self = $canary;

            fn same(self, other: Self) -> bool {
                self == other
            }
        }
    };
}

byte!(u8, 0xA5);
byte!(i8, 0x5A);

macro_rules! float8 {
    ($type:ident, $canary:literal) => {
        impl Held for $type {
            const CANARY: Self = $type::from_bits($canary);

            fn same(self, other: Self) -> bool {
                self.to_bits() == other.to_bits()
            }
        }
    };
}

float8!(F8E4M3, 0xFF);
float8!(F8E5M2, 0xFD);

/// The nearest values that tensors of `T` hold.
pub fn rounded<T: Value>(values: &Array5<f32>) -> Array5<f32> {
    values.mapv(|x| T::from_f32(x).to_f32())
}

/// A tensor inside a larger piece of device memory.
pub struct Placed<T = f32> {
    memory: CudaTensor<T>,
    shape: [usize; 5],
    strides: [isize; 5],
    offset: usize,
}

impl<T: Held> Placed<T> {
    /// Canaries everywhere.
    pub fn blank(device: &CudaDevice, shape: [usize; 5], layout: Layout) -> Self {
        let (strides, offset, len) = layout.of(shape);
        let host = Array1::from_elem(len, T::CANARY);
        let memory = CudaTensor::from_host(device, host.view()).unwrap();
        Placed { memory, shape, strides, offset }
    }

    /// These values, canaries around them.
    pub fn holding(device: &CudaDevice, values: ArrayView5<'_, T>, layout: Layout) -> Self {
        let shape = values.shape().try_into().unwrap();
        let (strides, offset, len) = layout.of(shape);
        let mut host = Array1::from_elem(len, T::CANARY);
        for (index, &value) in values.indexed_iter() {
            host[offset.wrapping_add_signed(at(index, &strides))] = value;
        }
        let memory = CudaTensor::from_host(device, host.view()).unwrap();
        Placed { memory, shape, strides, offset }
    }

    fn address(&self) -> usize {
        self.memory.address() as usize + self.offset * size_of::<T>()
    }

    fn place(&self) -> Place {
        Place::Cuda(self.memory.device().ordinal())
    }

    pub fn view(&self) -> TensorRef<'_, T> {
        let ptr = std::ptr::without_provenance(self.address());
        // SAFETY: the layout stays within `memory`, which is borrowed.
        unsafe { TensorRef::from_raw_parts(ptr, self.place(), &self.shape, &self.strides) }.unwrap()
    }

    pub fn view_mut(&mut self) -> TensorMut<'_, T> {
        let ptr = std::ptr::without_provenance_mut(self.address());
        // SAFETY: as above, exclusively.
        unsafe { TensorMut::from_raw_parts(ptr, self.place(), &self.shape, &self.strides) }.unwrap()
    }

    /// The values, after a check that nothing around them has changed.
    pub fn held(&self) -> Array5<T> {
        let mut host = self.memory.to_host().unwrap();
        let mut values = Array5::from_elem(self.shape, T::CANARY);
        for (index, value) in values.indexed_iter_mut() {
            let slot = &mut host[self.offset.wrapping_add_signed(at(index, &self.strides))];
            *value = std::mem::replace(slot, T::CANARY);
        }
        let touched = host.iter().filter(|value| !value.same(T::CANARY)).count();
        assert_eq!(touched, 0, "{touched} elements around the result were written");
        values
    }
}

impl<T: Value> Placed<T> {
    /// The values, rounded to the nearest.
    pub fn filled(device: &CudaDevice, values: ArrayView5<'_, f32>, layout: Layout) -> Self {
        Placed::holding(device, values.mapv(T::from_f32).view(), layout)
    }

    /// As [`held`](Self::held), in f32.
    pub fn read(&self) -> Array5<f32> {
        self.held().mapv(T::to_f32)
    }
}

fn at(index: (usize, usize, usize, usize, usize), strides: &[isize; 5]) -> isize {
    let index = [index.0, index.1, index.2, index.3, index.4];
    index.iter().zip(strides).map(|(&i, stride)| i as isize * stride).sum()
}

/// The kernels that compute in f32.
pub fn kernels(device: &CudaDevice) -> Vec<&'static str> {
    kernels_of::<f32>(device)
}

/// Those for tensors of `T` that run without further permission.
pub fn kernels_of<T: Value>(device: &CudaDevice) -> Vec<&'static str> {
    let layer = Pointwise::new(Array2::ones((1, 1)));
    let layer = layer.prepare_as::<T>(&device.clone().into(), PrepareOptions::default()).unwrap();
    let plans = layer.plans(&[1, 1]).unwrap().into_iter();
    plans.filter(|candidate| candidate.verdict.is_ok()).map(|candidate| candidate.kernel).collect()
}

pub fn force(kernel: &str) -> PrepareOptions {
    PrepareOptions { kernel: Some(kernel.into()), ..PrepareOptions::default() }
}

pub fn same_bits(got: &Array5<f32>, expected: &Array5<f32>, what: &str) -> Outcome {
    let wrong = got.indexed_iter().find(|(index, value)| {
        value.to_bits() != expected[*index].to_bits() && (**value, expected[*index]) != (0.0, 0.0)
    });
    match wrong {
        Some((index, value)) => {
            Err(format!("{what}: at {index:?} got {value}, expected {}", expected[index]).into())
        }
        None => Ok(()),
    }
}

/// The kernels promise one chain of fused multiply-adds over rising depth, whatever the tile.
pub fn chain(case: &Case, weight: &[f32], bias: &[f32], src: &Array5<f32>) -> Array5<f32> {
    let (rows, k) = (case.c_out / case.groups, case.c_in / case.groups);
    Array5::from_shape_fn(case.dst_shape(), |(n, c, d, h, w)| {
        let s = case.stride;
        let sum = (0..k).fold(0.0f32, |sum, i| {
            weight[c * k + i].mul_add(src[[n, c / rows * k + i, d * s, h * s, w * s]], sum)
        });
        sum + bias[c]
    })
}

/// Runs a case, its src and the bits that it must give, in the common layouts, and over a table of
/// cases and kernels, whose place `at` is, in every other pair too.
pub fn in_layouts<T: Value>(
    device: &CudaDevice,
    layer: &Prepared<T>,
    (case, src, expected): (&Case, &Array5<f32>, &Array5<f32>),
    at: (usize, usize),
    kernel: &str,
) -> Outcome {
    let (first, last) = (Layout::First, Layout::Last);
    let other = (LAYOUTS[(at.0 + at.1) % 8], LAYOUTS[(at.0 + 3 * at.1 + 1) % 8]);
    for layouts in [(first, first), (last, last), (first, last), (last, first), other] {
        let src = Placed::<T>::filled(device, src.view(), layouts.0);
        let mut dst = Placed::<T>::blank(device, case.dst_shape(), layouts.1);
        layer.forward_into(&src.view(), &mut dst.view_mut())?;
        same_bits(&dst.read(), expected, &format!("{kernel}, {case:?}, {layouts:?}"))?;
    }
    Ok(())
}

fn every_kernel_on_tile_edges<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(1);
    let edges = [
        Case::new(1, 1, 1, [1, 1, 1]),
        Case::new(2, 7, 31, [1, 1, 33]),
        Case::new(1, 8, 32, [1, 4, 8]),
        Case::new(1, 9, 33, [1, 1, 31]),
        Case::new(3, 15, 63, [1, 5, 13]),
        Case::new(2, 16, 64, [1, 8, 8]),
        Case::new(1, 17, 65, [1, 1, 127]),
        Case::new(1, 20, 127, [1, 3, 43]),
        Case::new(4, 33, 129, [2, 4, 4]),
    ];
    for (i, case) in edges.iter().enumerate() {
        let weight = random.normal(case.c_out * case.c_in);
        let weight: Vec<f32> = weight.into_iter().map(|x| T::from_f32(x).to_f32()).collect();
        let bias = random.normal(case.c_out);
        let src = rounded::<T>(&random.tensor(case.src_shape()));
        let expected = rounded::<T>(&chain(case, &weight, &bias, &src));
        let layer = case.layer(weight).bias(bias);
        let simt = kernels_of::<T>(device).into_iter().filter(|kernel| kernel.contains("_simt_"));
        for (j, kernel) in simt.enumerate() {
            let prepared = layer.prepare_as::<T>(&device.clone().into(), force(kernel))?;
            in_layouts(device, &prepared, (case, &src, &expected), (i, j), kernel)?;
        }
    }
    Ok(())
}

fn integers_in_every_layout<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(2);
    let case = Case { groups: 2, ..Case::new(2, 24, 40, [2, 3, 4]) };
    let weight = random.integers(case.c_out * case.c_in / case.groups);
    let bias = random.integers(case.c_out);
    let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
    let residual = Array5::from_shape_fn(case.dst_shape(), |_| random.integer());
    let sums = chain(&case, &weight, &bias, &src) + &residual;
    let expected = rounded::<T>(&sums.mapv(|x| x.clamp(-20.0, 30.0)));
    let layer = case.layer(weight).bias(bias).residual().clip(-20.0, 30.0);
    let prepare = |kernel: &&str| layer.prepare_as::<T>(&device.clone().into(), force(kernel));
    let layers = kernels_of::<T>(device).iter().map(prepare).collect::<Result<Vec<_>, _>>()?;
    for (i, &from) in LAYOUTS.iter().enumerate() {
        for (j, &to) in LAYOUTS.iter().enumerate() {
            let beside = if i == j { to } else { LAYOUTS[(i * 3 + j) % 8] };
            let src = Placed::<T>::filled(device, src.view(), from);
            let residual = Placed::<T>::filled(device, residual.view(), beside);
            let mut dst = Placed::<T>::blank(device, case.dst_shape(), to);
            let (src, residual) = (src.view(), residual.view());
            for layer in [&layers[(i + j) % layers.len()], &layers[(i * j + 3) % layers.len()]] {
                layer.call(&src).residual(&residual).run_into(&mut dst.view_mut())?;
                same_bits(&dst.read(), &expected, &format!("{from:?} + {beside:?} to {to:?}"))?;
            }
        }
    }
    Ok(())
}

/// Groups, and the channels in and out of each.
pub const GROUPS: [(usize, usize, usize); 5] =
    [(3, 1, 1), (7, 5, 3), (2, 17, 35), (4, 8, 32), (130, 1, 2)];

/// Two calls of each.
pub fn groups(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(4);
    for (groups, per_in, per_out) in GROUPS {
        for layout in [Layout::First, Layout::Last] {
            let spatial = [1, 3, 5];
            let case = Case { groups, ..Case::new(2, groups * per_in, groups * per_out, spatial) };
            let weight = random.normal(case.c_out * per_in);
            let bias = random.normal(case.c_out);
            let src = random.tensor(case.src_shape());
            let expected = chain(&case, &weight, &bias, &src);
            let layer = case.layer(weight).bias(bias).prepare(&device.clone().into())?;
            let src = Placed::filled(device, src.view(), layout);
            let mut dst = Placed::blank(device, case.dst_shape(), layout);
            layer.forward_into(&src.view(), &mut dst.view_mut())?;
            same_bits(&dst.read(), &expected, &format!("{case:?} {layout:?}"))?;
        }
    }
    Ok(())
}

fn strides(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(5);
    for (stride, spatial) in [(2, [1, 8, 8]), (2, [3, 5, 7]), (3, [1, 7, 10]), (5, [1, 1, 4])] {
        for layout in [Layout::First, Layout::Last, Layout::Fortran, Layout::Reversed] {
            let case = Case { stride, ..Case::new(2, 12, 20, spatial) };
            let weight = random.normal(case.c_out * case.c_in);
            let bias = random.normal(case.c_out);
            let src = random.tensor(case.src_shape());
            let expected = chain(&case, &weight, &bias, &src);
            let layer = case.layer(weight).bias(bias).prepare(&device.clone().into())?;
            let src = Placed::filled(device, src.view(), layout);
            let mut dst = Placed::blank(device, case.dst_shape(), Layout::First);
            layer.forward_into(&src.view(), &mut dst.view_mut())?;
            same_bits(&dst.read(), &expected, &format!("{case:?} {layout:?}"))?;
        }
    }
    Ok(())
}

fn norm(random: &mut Random, channels: usize) -> BatchNorm {
    let mean = random.normal(channels);
    let variance: Vec<f32> = random.normal(channels).iter().map(|x| x * x + 0.1).collect();
    let (gamma, beta) = (random.normal(channels), random.normal(channels));
    BatchNorm::new(mean, variance).affine(gamma, beta).eps(1e-3)
}

fn steps_in_any_order<T: Value>(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(6);
    let c = 36;
    let norm = |random: &mut Random| norm(random, c);
    type Stages = fn(Pointwise, BatchNorm, Vec<f32>) -> Pointwise;
    let lists: [(&str, Stages); 9] = [
        ("none", |layer, _, _| layer),
        ("bias, bn, relu", |layer, norm, bias| layer.bias(bias).batch_norm(norm).relu()),
        ("bn, residual, relu", |layer, norm, _| layer.batch_norm(norm).residual().relu()),
        ("relu6, residual", |layer, _, _| layer.relu6().residual()),
        ("relu, bn, residual, silu", |layer, norm, _| {
            layer.relu().batch_norm(norm).residual().silu()
        }),
        ("residual, prelu, bn, gelu", |layer, norm, slope| {
            layer.residual().prelu(slope).batch_norm(norm).gelu()
        }),
        ("prelu, residual", |layer, _, slope| layer.prelu(slope).residual()),
        ("hard_swish, bn, bias, tanh", |layer, norm, bias| {
            layer.hard_swish().batch_norm(norm).bias(bias).tanh()
        }),
        ("twelve steps", |layer, norm, slope| {
            let layer = layer.leaky_relu(0.3).elu(0.7).batch_norm(norm).softplus().residual();
            let layer = layer.mish().leaky_relu(0.9).sigmoid().prelu(slope).clip(-2.0, 2.0);
            layer.hard_sigmoid().activation(Activation::GeluTanh)
        }),
    ];
    let kernels = kernels_of::<T>(device);
    let layouts = [
        ([1, 4, 9], Layout::First),
        ([1, 5, 5], Layout::Last),
        ([1, 3, 7], Layout::FirstOdd),
        ([1, 2, 70], Layout::PartOfLast),
    ];
    for (i, (name, stages)) in lists.into_iter().enumerate() {
        for (j, (spatial, layout)) in layouts.into_iter().enumerate() {
            let case = Case::new(2, 10, c, spatial);
            let weight = random.normal(case.c_out * case.c_in);
            let bare = case.layer(weight.into_iter().map(|x| T::from_f32(x).to_f32()).collect());
            let layer = stages(bare, norm(&mut random), random.normal(c));
            let src = rounded::<T>(&random.tensor(case.src_shape()));
            let residual = rounded::<T>(&random.tensor(case.dst_shape()));
            let with_residual = name.contains("residual") || name.contains("twelve");
            let inputs = reference::Inputs {
                sources: vec![src.view().into_dyn()],
                residual: with_residual.then(|| residual.view().into_dyn()),
                gate: None,
            };
            let expected = reference::forward(&layer, &inputs)?;
            let forced = force(kernels[(3 * i + j) % kernels.len()]);
            let prepared = layer.prepare_as::<T>(&device.clone().into(), forced)?;
            let src = Placed::<T>::filled(device, src.view(), layout);
            let residual = Placed::<T>::filled(device, residual.view(), layout);
            let mut dst = Placed::<T>::blank(device, case.dst_shape(), layout);
            let (src, residual) = (src.view(), residual.view());
            let call = prepared.call(&src);
            let call = if with_residual { call.residual(&residual) } else { call };
            call.run_into(&mut dst.view_mut())?;
            let tolerance = 1e-5 + unit::<T>();
            close(&dst.read().into_dyn(), &expected, tolerance, &format!("{name}, {layout:?}"))?;
        }
    }
    Ok(())
}

/// Within `tolerance` of the value or of 1, whichever is larger; NaN is never close.
pub fn close(got: &ArrayD<f32>, expected: &ArrayD<f64>, tolerance: f64, what: &str) -> Outcome {
    assert_eq!(got.shape(), expected.shape());
    let wrong = got.indexed_iter().find(|(index, value)| {
        let expected = expected[index];
        let error = (f64::from(**value) - expected).abs();
        !(error <= tolerance * expected.abs().max(1.0))
    });
    match wrong {
        Some((index, value)) => {
            Err(format!("{what}: at {index:?} got {value}, expected {}", expected[&index]).into())
        }
        None => Ok(()),
    }
}

fn channel_shuffle(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(7);
    for groups in [1, 3] {
        for layout in [Layout::First, Layout::Last] {
            let case = Case { groups, ..Case::new(2, 12, 24, [1, 4, 4]) };
            let slope = random.integers(case.c_out);
            let layer = case.layer(random.integers(case.c_out * case.c_in / groups)).residual();
            let layer = layer.channel_shuffle(4).prelu(slope);
            let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
            let residual = Array5::from_shape_fn(case.dst_shape(), |_| random.integer());
            let inputs = reference::Inputs {
                sources: vec![src.view().into_dyn()],
                residual: Some(residual.view().into_dyn()),
                gate: None,
            };
            let expected = reference::forward(&layer, &inputs)?;
            let prepared = layer.prepare(&device.clone().into())?;
            let src = Placed::filled(device, src.view(), layout);
            let residual = Placed::filled(device, residual.view(), layout);
            let mut dst = Placed::blank(device, case.dst_shape(), layout);
            let (src, residual) = (src.view(), residual.view());
            prepared.call(&src).residual(&residual).run_into(&mut dst.view_mut())?;
            close(&dst.read().into_dyn(), &expected, 0.0, &format!("{groups} {layout:?}"))?;
        }
    }
    Ok(())
}

fn host_arrays(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(8);
    let weight = Array2::from_shape_vec((5, 6), random.integers(30)).unwrap();
    let layer = Pointwise::new(weight).stride(2).residual().relu();
    let (cpu, gpu) = (layer.prepare(&Device::cpu())?, layer.prepare(&device.clone().into())?);
    for spatial in [&[][..], &[7], &[4, 5], &[3, 4, 2]] {
        let src_shape = [&[2, 6], spatial].concat();
        let dst_shape = cpu.dst_shape(&src_shape)?;
        for fortran in [false, true] {
            let mut filled = |shape: &[usize]| {
                let mut array = ArrayD::zeros(IxDyn(shape).set_f(fortran));
                array.mapv_inplace(|_: f32| random.integer());
                array
            };
            let (mut src, residual) = (filled(&src_shape), filled(&dst_shape));
            if src.ndim() > 2 {
                src.invert_axis(Axis(2));
            }
            let on_cpu = cpu.call(&src).residual(&residual).run()?;
            let on_gpu = gpu.call(&src).residual(&residual).run()?;
            assert_eq!(on_gpu, on_cpu, "{src_shape:?}");
            assert_eq!(on_gpu.strides(), on_cpu.strides(), "{src_shape:?}");

            // Through a tensor on the device, and into every second element of the host's.
            let on_device = CudaTensor::from_host(device, src.view())?;
            assert_eq!(on_device.to_host()?, src);
            let beside = CudaTensor::from_host(device, residual.view())?;
            let dst = gpu.call(&on_device).residual(&beside).run()?;
            assert_eq!(dst.to_host()?, on_cpu, "{src_shape:?}");
            let mut wide =
                ArrayD::from_elem(IxDyn(&[dst_shape.clone(), vec![2]].concat()), -1.0f32);
            let mut half = wide.index_axis_mut(Axis(dst_shape.len()), 1);
            gpu.call(&src).residual(&residual).run_into(&mut half)?;
            assert_eq!(half, on_cpu);
            assert!(wide.index_axis(Axis(dst_shape.len()), 0).iter().all(|&x| x == -1.0));
        }
    }
    Ok(())
}
