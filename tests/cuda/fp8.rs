//! Layers of 8-bit floats: exact where sums are, within a bound elsewhere, by every kernel, in every layout
//! and type. On a device that has none, each trial asks for the reason.

use ndarray::{Array2, Array5};
use pointwise::quantized::{F8E4M3, F8E5M2};
use pointwise::quantized::{
    Fp8, Fp8Element, Fp8Quantization, PreparedQuantized, QuantizedElement, QuantizedFp8,
};
use pointwise::{CudaDevice, CudaTensor, Device, Error, PrepareOptions, bf16, f16, reference};

use super::cases::{Case, Held, LAYOUTS, Layout, Placed, force};
use super::int8::ways;
use super::numbers::Random;
use super::tensor_cores;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("fp8_kernels_are_exact_on_integers", |device| on_fp8(device, integers)),
    ("fp8_layers_are_within_the_bound", |device| on_fp8(device, random_layers)),
    ("fp8_saturates_and_keeps_special_values", |device| on_fp8(device, special_values)),
    ("fp8_layers_on_host_arrays_go_through_in_slices", |device| on_fp8(device, host_arrays)),
    ("plans_and_explain_know_fp8", |device| on_fp8(device, plans)),
    ("bad_calls_on_fp8_are_errors_with_their_values", |device| on_fp8(device, bad_calls)),
];

/// Runs a test, or sees that a device without fp8 says why.
pub fn on_fp8(device: &CudaDevice, test: fn(&CudaDevice) -> Outcome) -> Outcome {
    let (major, minor) = device.compute_capability();
    if (major, minor) >= (8, 9) {
        return test(device);
    }
    let layer = QuantizedFp8::new(Array2::from_elem((1, 1), F8E4M3::ONE), vec![1.0], E4M3);
    let error = layer.prepare(&device.clone().into()).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let reason =
        format!("compute capability {major}.{minor}, tensor cores multiply fp8 from 8.9 on");
    assert!(error.to_string().contains(&reason), "{error}");
    Ok(())
}

const E4M3: Fp8Quantization = Fp8Quantization::e4m3(1.0);

trait Float8: Held + Fp8Element {
    fn of(x: f32) -> Self;
    fn real(self) -> f64;
}

impl Float8 for F8E4M3 {
    fn of(x: f32) -> Self {
        F8E4M3::from_f32(x)
    }

    fn real(self) -> f64 {
        self.to_f64()
    }
}

impl Float8 for F8E5M2 {
    fn of(x: f32) -> Self {
        F8E5M2::from_f32(x)
    }

    fn real(self) -> f64 {
        self.to_f64()
    }
}

fn quantization<T: Float8>(scale: f32) -> Fp8Quantization {
    Fp8Quantization { fp8: T::FP8, scale }
}

fn cases() -> impl Iterator<Item = Case> {
    let more = [
        Case::new(1, 336, 40, [1, 1, 97]),
        Case { groups: 2, ..Case::new(1, 2 * 20, 2 * 6, [1, 8, 9]) },
        Case { stride: 2, ..Case::new(1, 16, 70, [3, 5, 8]) },
    ];
    tensor_cores::cases().into_iter().chain(more)
}

fn kernels(gpu: &Device) -> Result<Vec<&'static str>, Error> {
    let layer = QuantizedFp8::new(Array2::from_elem((1, 1), F8E4M3::ONE), vec![1.0], E4M3);
    let plans = layer.prepare(gpu)?.plans(&[1, 1])?;
    Ok(plans.into_iter().map(|plan| plan.kernel).collect())
}

/// Runs a layer from one layout to another.
fn placed<S: Held + QuantizedElement, R: Held + QuantizedElement, O: Held + QuantizedElement>(
    device: &CudaDevice,
    prepared: &PreparedQuantized,
    (src, residual, shape): (&Array5<S>, Option<&Array5<R>>, [usize; 5]),
    [from, beside, to]: [Layout; 3],
) -> Result<Array5<O>, Error> {
    let src = Placed::holding(device, src.view(), from);
    let residual = residual.map(|residual| Placed::holding(device, residual.view(), beside));
    let mut dst = Placed::<O>::blank(device, shape, to);
    let (src, residual) = (src.view(), residual.as_ref().map(Placed::view));
    let mut call = prepared.call(&src);
    if let Some(residual) = &residual {
        call = call.residual(residual);
    }
    call.run_into(&mut dst.view_mut())?;
    Ok(dst.held())
}

/// Layouts that every one is among in some case.
fn layouts(at: usize) -> [[Layout; 3]; 6] {
    let (first, last) = (Layout::First, Layout::Last);
    let other = |i: usize| LAYOUTS[i % 8];
    [
        [first; 3],
        [last; 3],
        [first, last, last],
        [last, first, first],
        [other(at), other(3 * at + 1), other(3 * at + 1)],
        [other(at + 3), other(5 * at + 2), other(3 * at + 4)],
    ]
}

fn integers(device: &CudaDevice) -> Outcome {
    fn check<W: Float8, S: Float8, R: Float8, O: Held + QuantizedElement>(
        device: &CudaDevice,
        random: &mut Random,
        (case, i): (&Case, usize),
        dst: Option<Fp8Quantization>,
    ) -> Outcome {
        let gpu = Device::from(device.clone());
        let shape = (case.c_out, case.c_in / case.groups);
        let weight = Array2::from_shape_simple_fn(shape, || W::of(random.integer()));
        let scale: Vec<f32> = (0..case.c_out).map(|c| 2f32.powi(c as i32 % 4 - 3)).collect();
        let layer = QuantizedFp8::new(weight, scale, quantization::<S>(0.25))
            .bias(random.integers(case.c_out))
            .groups(case.groups)
            .stride(case.stride);
        let layer = match i % 3 {
            0 => layer.clip(-20.0, 30.0),
            _ => layer.clip(-9.0, 70.0).residual(quantization::<R>(0.5)).relu(),
        };
        let layer = if let Some(dst) = dst { layer.dst(dst) } else { layer };
        let src = Array5::from_shape_simple_fn(case.src_shape(), || S::of(random.integer()));
        let residual = Array5::from_shape_simple_fn(case.dst_shape(), || R::of(random.integer()));
        let residual = (i % 3 != 0).then_some(&residual);
        let on_cpu = layer.prepare(&Device::cpu())?;
        let mut call = on_cpu.call(&src);
        if let Some(residual) = residual {
            call = call.residual(residual);
        }
        let expected: Array5<O> = call.run()?.into_dimensionality()?;
        for way in ways(kernels(&gpu)?, shape.1, i) {
            let prepared = layer.prepare_with(&gpu, force(&way))?;
            for layouts in layouts(i) {
                let tensors = (&src, residual, case.dst_shape());
                let got: Array5<O> = placed(device, &prepared, tensors, layouts)?;
                let mut both = got.indexed_iter().zip(&expected);
                if let Some(((index, _), _)) = both.find(|((_, got), x)| !got.same(**x)) {
                    let what = format!("{way}, {case:?}, {layouts:?}, {:?}", layer.weight().0);
                    return Err(format!("{what}: wrong at {index:?}").into());
                }
            }
        }
        Ok(())
    }
    let mut random = Random::new(111);
    let r = &mut random;
    let (e4m3, e5m2) = (Some(Fp8Quantization::e4m3(0.25)), Some(Fp8Quantization::e5m2(0.5)));
    for (i, case) in cases().enumerate() {
        let case = (&case, i);
        match i % 7 {
            0 => check::<F8E4M3, F8E4M3, F8E4M3, F8E4M3>(device, r, case, e4m3)?,
            1 => check::<F8E4M3, F8E5M2, F8E5M2, F8E5M2>(device, r, case, e5m2)?,
            2 => check::<F8E5M2, F8E4M3, F8E4M3, F8E5M2>(device, r, case, e5m2)?,
            3 => check::<F8E5M2, F8E5M2, F8E5M2, F8E4M3>(device, r, case, e4m3)?,
            4 => check::<F8E4M3, F8E5M2, F8E4M3, f32>(device, r, case, None)?,
            5 => check::<F8E5M2, F8E4M3, F8E5M2, f16>(device, r, case, None)?,
            _ => check::<F8E4M3, F8E4M3, F8E5M2, bf16>(device, r, case, None)?,
        }
    }
    Ok(())
}

/// How far a result may be from f64's: sums of `k` products, none above `largest`, and what follows them,
/// in f32; then half a step of dst's type.
fn bound(layer: &QuantizedFp8, largest: f64, exact: f64, greatest: f64) -> f64 {
    let k = layer.weight().1.ncols() as f64;
    let eps = f64::from(f32::EPSILON);
    let in_f32 = largest * k * eps + 4.0 * greatest * eps;
    let Some(dst) = layer.dst_quantization() else { return in_f32 };
    let (mantissa, least) = match dst.fp8 {
        Fp8::E4M3 => (3, -6),
        Fp8::E5M2 => (2, -14),
    };
    let exponent = ((exact.abs() + in_f32).log2().floor() as i32).max(least);
    in_f32 + 2f64.powi(exponent - mantissa - 1)
}

fn random_layers(device: &CudaDevice) -> Outcome {
    fn check<W: Float8, S: Float8, O: Held + QuantizedElement>(
        device: &CudaDevice,
        random: &mut Random,
        (case, i): (&Case, usize),
        (dst, real): (Option<Fp8Quantization>, fn(O) -> f64),
    ) -> Result<f64, super::Failed> {
        let gpu = Device::from(device.clone());
        let shape = (case.c_out, case.c_in / case.groups);
        let values = random.normal(shape.0 * shape.1);
        let weight = Array2::from_shape_vec(shape, values)?.mapv(|x| W::of(50.0 * x));
        let scale: Vec<f32> = (0..case.c_out)
            .map(|_| (0.5 + random.uniform()) / 50.0 / (shape.1 as f32).sqrt())
            .collect();
        let layer = QuantizedFp8::new(weight.clone(), scale, quantization::<S>(0.013))
            .bias(random.normal(case.c_out))
            .groups(case.groups)
            .stride(case.stride);
        let layer = if let Some(dst) = dst { layer.dst(dst) } else { layer };
        let src = random.tensor(case.src_shape()).mapv(|x| S::of(x / 0.013));
        let exact = reference::forward_fp8(&layer, src.mapv(S::real).view().into_dyn(), None)?;
        let greatest = exact.iter().fold(0.0f64, |greatest, x| greatest.max(x.abs()));
        let all = |largest: f64, x: f64| largest.max(x.abs());
        let scale = layer.weight_scale().iter().map(|&x| f64::from(x)).fold(0.0, all) * 0.013;
        let largest = weight.iter().map(|w| w.real()).fold(0.0, all)
            * src.iter().map(|x| x.real()).fold(0.0, all)
            * scale
            / dst.map_or(1.0, |dst| f64::from(dst.scale));
        let mut worst = 0.0f64;
        for way in ways(kernels(&gpu)?, shape.1, i) {
            let prepared = layer.prepare_with(&gpu, force(&way))?;
            for layouts in [[LAYOUTS[i % 2]; 3], [LAYOUTS[1 - i % 2], LAYOUTS[0], LAYOUTS[i % 8]]] {
                let tensors = (&src, None::<&Array5<S>>, case.dst_shape());
                let got: Array5<O> = placed(device, &prepared, tensors, layouts)?;
                for (got, &exact) in got.iter().zip(&exact) {
                    let (error, bound) =
                        ((real(*got) - exact).abs(), bound(&layer, largest, exact, greatest));
                    assert!(error <= bound, "{way}, {case:?}: {} for {exact}", real(*got));
                    worst = worst.max(error / bound);
                }
            }
        }
        Ok(worst)
    }
    let mut random = Random::new(112);
    let r = &mut random;
    let e4m3 = (Some(Fp8Quantization::e4m3(0.02)), F8E4M3::real as fn(F8E4M3) -> f64);
    let e5m2 = (Some(Fp8Quantization::e5m2(0.02)), F8E5M2::real as fn(F8E5M2) -> f64);
    let f32 = (None, f64::from as fn(f32) -> f64);
    let mut worst = [0.0f64; 2];
    for (i, case) in cases().enumerate() {
        let case = (&case, i);
        let (of, found) = match i % 4 {
            0 => (0, check::<F8E4M3, F8E4M3, f32>(device, r, case, f32)?),
            1 => (1, check::<F8E4M3, F8E4M3, F8E4M3>(device, r, case, e4m3)?),
            2 => (1, check::<F8E5M2, F8E4M3, F8E5M2>(device, r, case, e5m2)?),
            _ => (0, check::<F8E4M3, F8E5M2, f32>(device, r, case, f32)?),
        };
        worst[of] = worst[of].max(found);
    }
    println!("fp8: at most {:.3} of the bound to f32, {:.3} to fp8", worst[0], worst[1]);
    Ok(())
}

fn special_values(device: &CudaDevice) -> Outcome {
    fn check<S: Float8, O: Float8>(device: &CudaDevice, values: &[(f32, f32)]) -> Outcome {
        let gpu = Device::from(device.clone());
        let weight = Array2::from_shape_fn((5, 3), |(_, k)| S::of(if k == 0 { 1.0 } else { 0.0 }));
        let mut src = Array5::from_elem([1, 3, 1, 1, values.len() + 5], S::of(0.0));
        for (i, &(x, _)) in values.iter().enumerate() {
            src[[0, 0, 0, 0, i]] = S::of(x);
        }
        let layer = QuantizedFp8::new(weight, vec![1.0], quantization::<S>(64.0));
        let layer = layer.dst(quantization::<O>(1.0));
        let on_cpu = layer.prepare(&Device::cpu())?.forward::<S, O, _>(&src)?;
        for kernel in kernels(&gpu)? {
            let prepared = layer.prepare_with(&gpu, force(kernel))?;
            for layout in LAYOUTS {
                let shape = on_cpu.shape().try_into()?;
                let tensors = (&src, None::<&Array5<S>>, shape);
                let got: Array5<O> = placed(device, &prepared, tensors, [layout; 3])?;
                for c in 0..5 {
                    for (i, &(x, expected)) in values.iter().enumerate() {
                        for got in [got[[0, c, 0, 0, i]], on_cpu[[0, c, 0, 0, i]]] {
                            let got = got.real() as f32;
                            let same = got == expected || got.is_nan() && expected.is_nan();
                            assert!(same, "{kernel}, {layout:?}: {got} of {x}, not {expected}");
                        }
                    }
                    // A NaN stays at its position.
                    assert!((0..5).all(|i| got[[0, c, 0, 0, values.len() + i]].real() == 0.0));
                }
            }
        }
        Ok(())
    }
    // Times 64; ties, and what is beyond the ends.
    let common = [(0.0, 0.0), (f32::NAN, f32::NAN), (1.0, 64.0), (-2.0, -128.0)];
    let to_e4m3 = [(6.5, 416.0), (-7.0, -448.0), (7.5, 448.0), (-448.0, -448.0)];
    check::<F8E4M3, F8E4M3>(device, &[common, to_e4m3].concat())?;
    let to_e5m2 = [(448.0, 28672.0), (-448.0, -28672.0), (9.0, 512.0), (11.0, 768.0)];
    check::<F8E4M3, F8E5M2>(device, &[common, to_e5m2].concat())?;
    // Infinities saturate.
    let infinite = |x: f32| F8E5M2::from_bits(if x > 0.0 { 0x7c } else { 0xfc });
    let weight = Array2::from_elem((1, 1), F8E5M2::ONE);
    let layer = QuantizedFp8::new(weight, vec![1.0], Fp8Quantization::e5m2(1.0));
    let mut src = Array2::from_elem((3, 1), infinite(1.0));
    src[[1, 0]] = infinite(-1.0);
    src[[2, 0]] = F8E5M2::from_f32(57344.0);
    // Channels beyond the last are no factor, in whichever order src lies.
    for layout in LAYOUTS {
        for k in [1, 3, 17] {
            let weight = Array2::from_elem((1, k), F8E5M2::ONE);
            let layer = QuantizedFp8::new(weight, vec![1.0], Fp8Quantization::e5m2(1.0));
            let src = Array5::from_elem([1, k, 1, 2, 4], infinite(1.0));
            let tensors = (&src, None::<&Array5<F8E5M2>>, [1, 1, 1, 2, 4]);
            let prepared = layer.prepare(&device.clone().into())?;
            let got: Array5<f32> = placed(device, &prepared, tensors, [layout; 3])?;
            assert!(got.iter().all(|&x| x == f32::INFINITY), "{k} channels, {layout:?}: {got}");
        }
    }
    for on in [Device::cpu(), device.clone().into()] {
        let real: Array2<f32> = layer.prepare(&on)?.forward(&src)?;
        assert!(real.iter().eq(&[f32::INFINITY, f32::NEG_INFINITY, 57344.0]), "{real}");
        let e4m3 = layer.clone().dst(E4M3).prepare(&on)?.forward::<_, F8E4M3, _>(&src)?;
        assert!(e4m3.iter().map(|x| x.to_f32()).eq([448.0, -448.0, 448.0]), "{e4m3:?}");
        let e5m2 = layer.clone().dst(Fp8Quantization::e5m2(1.0)).prepare(&on)?;
        let e5m2: Array2<F8E5M2> = e5m2.forward(&src)?;
        assert!(e5m2.iter().map(|x| x.to_f32()).eq([57344.0, -57344.0, 57344.0]), "{e5m2:?}");
    }
    Ok(())
}

fn host_arrays(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(113);
    let gpu = Device::from(device.clone());
    for case in [
        Case::new(3, 40, 24, [1, 6, 11]),
        Case { stride: 2, ..Case::new(2, 24, 12, [1, 9, 7]) },
        Case::new(2, 12, 7, [1, 1, 1]),
    ] {
        let weight =
            Array2::from_shape_vec((case.c_out, case.c_in), random.normal(case.c_out * case.c_in))?;
        let layer = QuantizedFp8::new(weight.mapv(F8E4M3::from_f32), vec![0.7], E4M3)
            .bias(random.normal(case.c_out))
            .stride(case.stride)
            .residual(Fp8Quantization::e5m2(0.3))
            .relu()
            .dst(Fp8Quantization::e4m3(0.05));
        let src = random.tensor(case.src_shape()).mapv(F8E4M3::from_f32);
        let residual = random.tensor(case.dst_shape()).mapv(F8E5M2::from_f32);
        // The CPU's, but for sums on both sides of a tie.
        let on_cpu = layer.prepare(&Device::cpu())?;
        let on_cpu = on_cpu.call(&src).residual(&residual).run::<F8E4M3>()?;
        let mut expected = None;
        for slice_bytes in [1 << 24, 2000, 0] {
            let slice_bytes = Some(slice_bytes);
            let options = PrepareOptions { slice_bytes, ..PrepareOptions::default() };
            let prepared = layer.prepare_with(&gpu, options)?;
            let got = prepared.call(&src).residual(&residual).run::<F8E4M3>()?;
            let got = got.mapv(|x| x.to_bits());
            let beside = got.iter().zip(&on_cpu);
            let differ =
                beside.filter(|(a, b)| **a != b.to_bits()).map(|(a, b)| a.abs_diff(b.to_bits()));
            let differ: Vec<u8> = differ.collect();
            assert!(
                differ.len() * 100 <= got.len() && differ.iter().all(|&d| d == 1),
                "{differ:?}"
            );
            let expected = expected.get_or_insert_with(|| got.clone());
            assert!(got == *expected, "{case:?} in slices of {slice_bytes:?} bytes");
        }
        let on_device = CudaTensor::from_host(device, src.view())?;
        let beside = CudaTensor::from_host(device, residual.view())?;
        let mut dst = CudaTensor::<F8E4M3>::zeros(device, &case.dst_shape())?;
        layer.prepare(&gpu)?.call(&on_device).residual(&beside).run_into(&mut dst)?;
        assert!(dst.to_host()?.mapv(|x| x.to_bits()) == expected.unwrap_or_default());
    }
    Ok(())
}

fn plans(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let weight = Array2::from_elem((512, 512), F8E4M3::ONE);
    let layer = QuantizedFp8::new(weight, vec![1.0], E4M3);
    let prepared = layer.prepare(&gpu)?;
    for shape in [[32, 512, 28, 28], [1, 512, 1, 1]] {
        let plans = prepared.plans(&shape)?;
        let ours = |kernel: &str| kernel.starts_with("fprop_fp8_sm89_");
        assert!(plans.len() >= 2 && plans.iter().all(|plan| ours(plan.kernel)));
        let explanation = prepared.explain(&shape)?;
        assert_eq!(plans[0].kernel, explanation.kernel);
        assert_eq!(explanation.cost, prepared.cost(&shape)?);
        for plan in plans {
            let forced = layer.prepare_with(&gpu, force(plan.kernel))?.explain(&shape)?;
            assert_eq!(forced.kernel, plan.kernel);
            assert!(forced.reason.starts_with("forced; "), "{forced}");
        }
    }
    let cost = prepared.cost(&[32, 512, 28, 28])?;
    let positions = 32 * 28 * 28;
    assert_eq!((cost.src_bytes, cost.dst_bytes), (512 * positions, 4 * 512 * positions));
    assert_eq!(prepared.kernel(), prepared.explain(&[32, 512, 28, 28])?.kernel);
    // Sums of floats depend on how many blocks share them, and that on the batch.
    let layer = QuantizedFp8::new(Array2::from_elem((512, 4096), F8E4M3::ONE), vec![1.0], E4M3);
    for (batch_invariant, shared) in [(false, true), (true, false)] {
        let options = PrepareOptions { batch_invariant, ..PrepareOptions::default() };
        let few = layer.prepare_with(&gpu, options)?.explain(&[1, 4096, 7, 7])?;
        assert_eq!(few.reason.contains(", each shared by "), shared, "{few}");
    }
    Ok(())
}

fn bad_calls(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let weight = Array2::from_elem((3, 2), F8E4M3::ONE);
    let layer = QuantizedFp8::new(weight, vec![1.0; 3], E4M3);
    let error = layer.prepare_with(&gpu, force("fprop_i8_mma_64x64x64")).unwrap_err();
    assert!(error.to_string().contains("this device has fprop_fp8_sm89_"), "{error}");
    let prepared = layer.prepare(&gpu)?;
    let src = CudaTensor::<F8E4M3>::zeros(device, &[1, 2, 3, 3])?;
    let error = prepared.forward_cuda::<F8E4M3, F8E4M3>(&src).unwrap_err();
    assert_eq!(error.to_string(), "dst has elements of type e4m3, the layer has f32");
    let other = CudaTensor::<F8E5M2>::zeros(device, &[1, 2, 3, 3])?;
    let error = prepared.forward_cuda::<F8E5M2, f32>(&other).unwrap_err();
    assert!(matches!(error, Error::ElementType { tensor: "src", .. }), "{error}");
    let bytes = CudaTensor::<u8>::zeros(device, &[1, 2, 3, 3])?;
    let error = prepared.forward_cuda::<u8, f32>(&bytes).unwrap_err();
    assert!(matches!(error, Error::ElementType { tensor: "src", .. }), "{error}");
    // On a stream of its own, which outlives the layer that it is of.
    let beside = layer.prepare(&gpu)?.on(&device.with_new_stream()?)?;
    let ones = Array5::from_elem([1, 2, 1, 3, 3], F8E4M3::ONE);
    let ones = CudaTensor::from_host(device, ones.view())?;
    let sums = beside.forward_cuda::<F8E4M3, f32>(&ones)?.to_host()?;
    assert!(sums.iter().all(|&x| x == 2.0), "{sums}");
    // Nothing to do.
    let none = Array5::from_elem([0, 2, 1, 3, 3], F8E4M3::ONE);
    assert_eq!(prepared.forward::<_, f32, _>(&none)?.shape(), [0, 3, 1, 3, 3]);
    Ok(())
}
