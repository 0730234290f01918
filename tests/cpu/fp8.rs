//! Layers of 8-bit floats: against PyTorch, against the specification, at the ends of the range, and with
//! bad input. On CUDA: `cuda/fp8.rs`.

use std::path::Path;

use ndarray::{Array1, Array2, Array4, Array5, ArrayD, Axis, Dimension, array, s};
use pointwise::quantized::{
    Calibration, F8E4M3, F8E5M2, Fp8, Fp8Element, Fp8Quantization, PreparedQuantized,
    QuantizedElement, QuantizedFp8, Range,
};
use pointwise::{
    BatchNorm, Device, Error, Pointwise, PrepareOptions, bf16, f16, nhwc, nhwc_mut, reference,
};
use safetensors::SafeTensors;
use serde_json::Value;

/// A sequence that looks random, the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as u32
    }

    /// From −1 to 1.
    fn real(&mut self) -> f32 {
        self.next() as f32 / (1 << 23) as f32 - 1.0
    }

    /// From -4 to 4.
    fn integer(&mut self) -> f32 {
        (self.next() % 9) as f32 - 4.0
    }
}

trait Float8: Fp8Element + std::fmt::Debug {
    fn of(x: f32) -> Self;
    fn of_bits(bits: u8) -> Self;
    fn real(self) -> f64;
}

macro_rules! float8 {
    ($($type:ty)*) => {$(
        impl Float8 for $type {
            fn of(x: f32) -> Self {
                <$type>::from_f32(x)
            }

            fn of_bits(bits: u8) -> Self {
                <$type>::from_bits(bits)
            }

            fn real(self) -> f64 {
                self.to_f64()
            }
        }
    )*};
}
float8!(F8E4M3 F8E5M2);

fn quantization<T: Float8>(scale: f32) -> Fp8Quantization {
    Fp8Quantization { fp8: T::FP8, scale }
}

/// The magnitudes of a type, in order: each from its neighbour.
fn magnitudes(fp8: Fp8) -> Vec<f64> {
    let (each, least, count) = match fp8 {
        Fp8::E4M3 => (8, -9, 0x7f),
        Fp8::E5M2 => (4, -16, 0x7c),
    };
    let (mut values, mut step) = (vec![0.0], 2f64.powi(least));
    for bits in 1..count {
        values.push(values[bits - 1] + step);
        // Subnormal numbers and the first normal ones are as far apart.
        if bits > each && bits % each == 0 {
            step *= 2.0;
        }
    }
    assert_eq!(values.last(), Some(&f64::from(fp8.max())));
    values
}

#[test]
fn numbers_are_rounded_to_the_nearest_and_saturate() {
    for fp8 in [Fp8::E4M3, Fp8::E5M2] {
        let values = magnitudes(fp8);
        let unit = Fp8Quantization { fp8, scale: 1.0 };
        for bits in 0..=255u8 {
            let magnitude = usize::from(bits & 0x7f);
            let x = f64::from(unit.dequantize(bits));
            assert_eq!(
                x.is_sign_negative() && !x.is_nan(),
                bits > 0x7f && !x.is_nan(),
                "{bits:#x}"
            );
            match values.get(magnitude) {
                Some(&value) => assert_eq!(x.abs(), value, "{fp8} {bits:#x}"),
                None if fp8 == Fp8::E5M2 && magnitude == 0x7c => assert!(x.is_infinite()),
                None => assert!(x.is_nan(), "{fp8} {bits:#x}: {x}"),
            }
        }
        let check = |x: f32, expected: usize| {
            for (x, sign) in [(x, 0), (-x, 0x80)] {
                assert_eq!(unit.quantize(x), expected as u8 | sign, "{fp8}: {x}");
            }
        };
        for (i, pair) in values.windows(2).enumerate() {
            let middle = ((pair[0] + pair[1]) / 2.0) as f32;
            check(pair[0] as f32, i);
            check(middle.next_down(), i);
            check(middle, i + i % 2);
            check(middle.next_up(), i + 1);
        }
        for x in [fp8.max(), fp8.max().next_up(), fp8.max() * 1.2, 1e30, f32::INFINITY] {
            check(x, values.len() - 1);
        }
        assert!(unit.dequantize(unit.quantize(f32::NAN)).is_nan());
        let scaled = Fp8Quantization { fp8, scale: 0.25 };
        assert_eq!(scaled.dequantize(scaled.quantize(3.0)), 3.0);
    }
}

fn reals<D: Dimension>(file: &SafeTensors<'_>, name: &str) -> ndarray::Array<f32, D> {
    let view = file.tensor(name).expect(name);
    let values = view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    ArrayD::from_shape_vec(view.shape(), values).unwrap().into_dimensionality().expect(name)
}

#[test]
fn results_are_pytorchs() {
    fn check<S: Float8, W: Float8, O: Float8>(file: &SafeTensors<'_>, i: usize) {
        let name = |what: &str| format!("{i}.{what}");
        let bits = |what: &str| {
            let view = file.tensor(&name(what)).unwrap();
            Array2::from_shape_vec((view.shape()[0], view.shape()[1]), view.data().to_vec())
                .unwrap()
        };
        let one = |what: &str| reals::<ndarray::Ix1>(file, &name(what))[0];
        let layer = QuantizedFp8::new(
            bits("weight").mapv(W::of_bits),
            vec![one("weight_scale")],
            quantization::<S>(one("src_scale")),
        );
        let layer = layer.bias(reals::<ndarray::Ix1>(file, &name("bias")));
        let src = bits("src").mapv(S::of_bits);
        let real: Array2<f32> = layer.prepare(&Device::cpu()).unwrap().forward(&src).unwrap();
        let expected = reals::<ndarray::Ix2>(file, &name("real"));
        let greatest = expected.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
        for (got, expected) in real.iter().zip(&expected) {
            assert!((got - expected).abs() <= 2e-6 * greatest, "{i}: {got}, not {expected}");
        }
        // Numbers differ where those of f32 lie on both sides of a tie: by one step, and seldom.
        let layer = layer.dst(quantization::<O>(one("dst_scale")));
        let got: Array2<O> = layer.prepare(&Device::cpu()).unwrap().forward(&src).unwrap();
        let expected = bits("dst").mapv(O::of_bits);
        let differ =
            got.iter().zip(&expected).filter(|(got, expected)| got.bits() != expected.bits());
        let differ: Vec<_> = differ.collect();
        assert!(differ.len() * 200 <= got.len(), "{i}: {} of {}", differ.len(), got.len());
        assert!(differ.iter().all(|(got, expected)| got.bits().abs_diff(expected.bits()) == 1));
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fp8.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for fp8 in [Fp8::E4M3, Fp8::E5M2] {
        let values = reals::<ndarray::Ix1>(&file, &format!("values.{fp8}"));
        for (bits, &expected) in values.iter().enumerate() {
            let got = Fp8Quantization { fp8, scale: 1.0 }.dequantize(bits as u8);
            assert!(got == expected || got.is_nan() && expected.is_nan(), "{fp8} {bits:#x}");
        }
    }
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let cases = &metadata.metadata().as_ref().unwrap()["cases"];
    let cases: Vec<Value> = serde_json::from_str(cases).unwrap();
    for (i, case) in cases.iter().enumerate() {
        match ["src", "weight", "dst"].map(|what| case[what].as_str().unwrap()) {
            ["e4m3", "e4m3", "e4m3"] => check::<F8E4M3, F8E4M3, F8E4M3>(&file, i),
            ["e5m2", "e4m3", "e4m3"] => check::<F8E5M2, F8E4M3, F8E4M3>(&file, i),
            ["e4m3", "e5m2", "e5m2"] => check::<F8E4M3, F8E5M2, F8E5M2>(&file, i),
            ["e4m3", "e4m3", "e5m2"] => check::<F8E4M3, F8E4M3, F8E5M2>(&file, i),
            types => panic!("{types:?}"),
        }
    }
    assert_eq!(cases.len(), 4);
}

/// Small integers and scales that are powers of two, so that nothing but the last step rounds.
#[test]
fn integers_are_exact_in_every_layout() {
    fn check<W: Float8, S: Float8, R: Float8, O: QuantizedElement>(
        noise: &mut Noise,
        dst: Option<Fp8Quantization>,
        narrow: fn(f64) -> O,
        same: fn(O, O) -> bool,
    ) {
        for (groups, k, rows, stride, spatial) in [
            (1, 1, 1, 1, [1, 1, 1]),
            (1, 7, 33, 1, [1, 5, 7]),
            (1, 48, 16, 2, [2, 5, 8]),
            (3, 17, 5, 1, [1, 3, 9]),
            (5, 2, 1, 3, [4, 4, 4]),
        ] {
            let weight =
                Array2::from_shape_simple_fn((groups * rows, k), || W::of(noise.integer()));
            let scale: Vec<f32> = (0..groups * rows).map(|c| 2f32.powi(c as i32 % 4 - 3)).collect();
            let bias: Array1<f32> = (0..groups * rows).map(|_| noise.integer()).collect();
            let layer = QuantizedFp8::new(weight, scale, quantization::<S>(0.25))
                .bias(bias)
                .clip(-9.0, 70.0)
                .residual(quantization::<R>(0.5))
                .relu()
                .groups(groups)
                .stride(stride);
            let layer = if let Some(dst) = dst { layer.dst(dst) } else { layer };
            let [d, h, w] = spatial;
            let src =
                Array5::from_shape_simple_fn((2, d, h, w, groups * k), || S::of(noise.integer()));
            let src = nhwc(src.view());
            let [d, h, w] = spatial.map(|len| len.div_ceil(stride));
            let shape = (2, groups * rows, d, h, w);
            let residual = Array5::from_shape_simple_fn(shape, || R::of(noise.integer()));
            let beside = residual.mapv(R::real);
            let expected = reference::forward_fp8(
                &layer,
                src.mapv(S::real).view().into_dyn(),
                Some(beside.view().into_dyn()),
            )
            .unwrap();
            let expected = expected.mapv(narrow);
            let equal = |got: ArrayD<O>| got.iter().zip(&expected).all(|(&a, &b)| same(a, b));

            let prepared = layer.prepare(&Device::cpu()).unwrap();
            let last = prepared.call(&src).residual(&residual).run::<O>().unwrap();
            assert!(equal(last), "channels last, {shape:?}");
            let first = src.as_standard_layout().into_owned();
            let got = prepared.call(&first).residual(&residual).run::<O>().unwrap();
            assert!(equal(got), "channels first, {shape:?}");
            // Backwards, a range of channels, and a dst among others, which stay as they are.
            let mut wide = Array5::from_elem((2, d, h, w, groups * rows + 3), O::default());
            let mut back = first.clone();
            (0..5).for_each(|axis| back.invert_axis(Axis(axis)));
            let mut src = back.as_standard_layout().into_owned();
            (0..5).for_each(|axis| src.invert_axis(Axis(axis)));
            let mut part = nhwc_mut(wide.slice_mut(s![.., .., .., .., 1..=groups * rows]));
            prepared.call(&src).residual(&residual).run_into(&mut part).unwrap();
            assert!(equal(part.to_owned().into_dyn()), "backwards, {shape:?}");
            for beside in [0, groups * rows + 1, groups * rows + 2] {
                let beside = wide.index_axis(Axis(4), beside);
                assert!(beside.iter().all(|&x| same(x, O::default())), "canaries");
            }
        }
    }
    let mut noise = Noise(1);
    let n = &mut noise;
    let (e4m3, e5m2) = (Some(Fp8Quantization::e4m3(0.25)), Some(Fp8Quantization::e5m2(0.5)));
    let to_e4m3 = |x: f64| F8E4M3::from_bits(Fp8Quantization::e4m3(1.0).quantize(x as f32));
    let to_e5m2 = |x: f64| F8E5M2::from_bits(Fp8Quantization::e5m2(1.0).quantize(x as f32));
    check::<F8E4M3, F8E4M3, F8E4M3, _>(n, e4m3, to_e4m3, |a, b| a.to_bits() == b.to_bits());
    check::<F8E4M3, F8E5M2, F8E5M2, _>(n, e5m2, to_e5m2, |a, b| a.to_bits() == b.to_bits());
    check::<F8E5M2, F8E4M3, F8E5M2, f32>(n, None, |x| x as f32, |a, b| a == b);
    check::<F8E5M2, F8E5M2, F8E4M3, f16>(n, None, f16::from_f64, |a, b| a == b);
    check::<F8E4M3, F8E4M3, F8E4M3, bf16>(n, None, bf16::from_f64, |a, b| a == b);
}

/// Errors against f64 within those of f32 sums, on every kernel of f32 that this CPU has.
#[test]
fn random_layers_are_within_the_bound() {
    let mut noise = Noise(2);
    for (k, rows, positions) in [(3, 5, 40), (64, 24, 49), (513, 33, 20)] {
        let weight = Array2::from_shape_simple_fn((rows, k), || F8E4M3::of(300.0 * noise.real()));
        let scale: Vec<f32> = (0..rows).map(|_| (1.0 + noise.real() / 2.0) / 100.0).collect();
        let bias: Array1<f32> = (0..rows).map(|_| noise.real()).collect();
        let src = Array2::from_shape_simple_fn((positions, k), || F8E5M2::of(noise.real()));
        let layer = QuantizedFp8::new(weight.clone(), scale, Fp8Quantization::e5m2(0.3)).bias(bias);
        let exact =
            reference::forward_fp8(&layer, src.mapv(F8E5M2::real).view().into_dyn(), None).unwrap();
        let largest = 320.0 * 1.0 * 0.3 * 0.015;
        let greatest = exact.iter().fold(0.0f64, |greatest, x| greatest.max(x.abs()));
        let eps = f64::from(f32::EPSILON);
        let bound = largest * k as f64 * eps + 4.0 * greatest * eps;
        let prepared = layer.prepare(&Device::cpu()).unwrap();
        for plan in prepared.plans(&[positions, k]).unwrap() {
            let options = PrepareOptions { kernel: Some(plan.kernel.into()), ..Default::default() };
            if plan.verdict.is_err() {
                continue;
            }
            let forced = layer.prepare_with(&Device::cpu(), options).unwrap();
            assert_eq!(forced.explain(&[positions, k]).unwrap().kernel, plan.kernel);
            let got: Array2<f32> = forced.forward(&src).unwrap();
            for (&got, &exact) in got.iter().zip(&exact) {
                assert!((f64::from(got) - exact).abs() <= bound, "{}: {got}, {exact}", plan.kernel);
            }
        }
    }
}

#[test]
fn what_is_beyond_the_ends_saturates_and_nan_stays() {
    let weight = array![[1.0f32], [-1.0]].mapv(F8E5M2::from_f32);
    let layer = QuantizedFp8::new(weight, vec![1.0; 2], Fp8Quantization::e5m2(1.0));
    let src = [0x7c, 0xfc, 0x7d, 0x7b, 0x00].map(F8E5M2::from_bits);
    let src = Array4::from_shape_vec((1, 1, 1, 5), src.to_vec()).unwrap();
    let prepare = |layer: &QuantizedFp8| layer.prepare(&Device::cpu()).unwrap();
    let real: Array4<f32> = prepare(&layer).forward(&src).unwrap();
    let infinity = f32::INFINITY;
    let same = |got: &f32, expected: f32| *got == expected || got.is_nan() && expected.is_nan();
    let expected = [infinity, -infinity, f32::NAN, 57344.0, 0.0];
    for (i, &x) in expected.iter().enumerate() {
        assert!(same(&real[[0, 0, 0, i]], x) && same(&real[[0, 1, 0, i]], -x), "{real}");
    }
    let e4m3: Array4<F8E4M3> =
        prepare(&layer.clone().dst(Fp8Quantization::e4m3(2.0))).forward(&src).unwrap();
    let e4m3 = e4m3.mapv(|x| x.to_f32());
    for (i, x) in [448.0, -448.0, f32::NAN, 448.0, 0.0].into_iter().enumerate() {
        assert!(same(&e4m3[[0, 0, 0, i]], x) && same(&e4m3[[0, 1, 0, i]], -x), "{e4m3}");
    }
    // Bounds keep NaN, and cut infinities.
    let clipped: Array4<f32> = prepare(&layer.clip(-3.0, 5.0)).forward(&src).unwrap();
    for (i, x) in [5.0, -3.0, f32::NAN, 5.0, 0.0].into_iter().enumerate() {
        assert!(same(&clipped[[0, 0, 0, i]], x), "{clipped}");
    }
    let e4m3_nan = Array2::from_elem((1, 1), F8E4M3::from_bits(0xff));
    let layer = QuantizedFp8::new(e4m3_nan, vec![1.0], Fp8Quantization::e5m2(1.0)).relu();
    let got: Array4<f32> = prepare(&layer).forward(&src).unwrap();
    assert!(got.iter().all(|x| x.is_nan()), "{got}");
}

#[test]
fn bad_descriptions_are_errors_with_their_values() {
    let weight = || Array2::from_elem((2, 3), F8E4M3::ONE);
    let unit = Fp8Quantization::e4m3(1.0);
    let layer = |scale: f32| QuantizedFp8::new(weight(), vec![scale; 2], unit);
    let says = |layer: QuantizedFp8, text: &str| {
        let error = layer.prepare(&Device::cpu()).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        says(layer(scale), &format!("weight_scale[0] is {scale}"));
        let quantization = Fp8Quantization::e5m2(scale);
        says(QuantizedFp8::new(weight(), vec![1.0; 2], quantization), "src's scale is");
        says(layer(1.0).dst(quantization), &format!("dst's scale is {scale}, expected a finite"));
        says(layer(1.0).residual(quantization), "residual's scale is");
    }
    says(layer(1e30).dst(Fp8Quantization::e4m3(1e-30)), "weight_scale[0] over dst's scale is inf");
    let tiny = Fp8Quantization::e4m3(1e-30);
    says(layer(1e-3).residual(Fp8Quantization::e4m3(1e8)).dst(tiny), "the residual's scale over");
    says(layer(1.0).bias(vec![0.0, f32::NAN]), "bias[1] is NaN, expected a finite number");
    says(layer(1e-3).bias(vec![1e30, 0.0]).dst(tiny), "bias[0] over dst's scale is inf");
    says(layer(1.0).bias(vec![0.0; 3]), "bias");
    says(QuantizedFp8::new(weight(), vec![1.0; 3], unit), "weight_scale");
    says(layer(1.0).clip(2.0, 1.0), "clip is 2, 1");
    says(layer(1.0).groups(3), "groups");
    says(layer(1.0).stride(0), "stride is 0");
    let none = Array2::from_elem((0, 3), F8E4M3::ONE);
    says(QuantizedFp8::new(none, vec![], unit), "weight");
}

#[test]
fn bad_calls_are_errors_with_their_values() {
    let weight = Array2::from_elem((2, 3), F8E4M3::ONE);
    let layer = QuantizedFp8::new(weight, vec![1.0], Fp8Quantization::e4m3(1.0));
    let prepared = layer.prepare(&Device::cpu()).unwrap();
    let src = Array4::from_elem((1, 3, 2, 2), F8E4M3::ONE);
    let fails = |result: Result<Array4<F8E4M3>, Error>| result.unwrap_err();
    let error = fails(prepared.forward(&src));
    assert_eq!(error.to_string(), "dst has elements of type e4m3, the layer has f32");
    let other = Array4::from_elem((1, 3, 2, 2), F8E5M2::ONE);
    let error = prepared.forward::<_, f32, _>(&other).unwrap_err();
    assert_eq!(error.to_string(), "src has elements of type e5m2, the layer has e4m3");
    let error = prepared.forward::<_, f32, _>(&Array4::from_elem((1, 3, 2, 2), 1u8)).unwrap_err();
    assert!(matches!(error, Error::ElementType { tensor: "src", .. }), "{error}");
    let narrow = Array4::from_elem((1, 4, 2, 2), F8E4M3::ONE);
    assert!(prepared.forward::<_, f32, _>(&narrow).is_err() && prepared.explain(&[1, 4]).is_err());
    let error = prepared.call(&src).residual(&src).run::<f32>().unwrap_err();
    assert!(matches!(error, Error::UnexpectedInput { .. }), "{error}");
    let quantised = layer.dst(Fp8Quantization::e4m3(1.0)).residual(Fp8Quantization::e5m2(1.0));
    let quantised = quantised.prepare(&Device::cpu()).unwrap();
    let error = fails(quantised.forward(&src));
    assert!(matches!(error, Error::MissingInput { .. }), "{error}");
    let beside = Array4::from_elem((1, 2, 2, 2), F8E4M3::ONE);
    let error = quantised.call(&src).residual(&beside).run::<F8E4M3>().unwrap_err();
    assert!(matches!(error, Error::ElementType { tensor: "residual", .. }), "{error}");
    // dst among the source's memory.
    let mut both = Array4::from_elem((1, 5, 2, 2), F8E4M3::ONE);
    let (ptr, strides) = (both.as_mut_ptr(), [20, 4, 2, 1]);
    let place = pointwise::Place::Host;
    // SAFETY: within `both`; the call refuses to run.
    let error = unsafe {
        let src =
            pointwise::TensorRef::from_raw_parts(ptr, place, &[1, 3, 2, 2], &strides).unwrap();
        let to = ptr.add(8);
        let mut dst =
            pointwise::TensorMut::from_raw_parts(to, place, &[1, 2, 2, 2], &strides).unwrap();
        let layer = QuantizedFp8::new(
            Array2::from_elem((2, 3), F8E4M3::ONE),
            vec![1.0],
            Fp8Quantization::e4m3(1.0),
        );
        let layer = layer.dst(Fp8Quantization::e4m3(1.0)).prepare(&Device::cpu()).unwrap();
        layer.forward_into(&src, &mut dst).unwrap_err()
    };
    assert!(matches!(error, Error::Aliased { tensor: "src", .. }), "{error}");
    let none = Array4::from_elem((0, 3, 2, 2), F8E4M3::ONE);
    assert_eq!(prepared.forward::<_, f32, _>(&none).unwrap().shape(), [0, 2, 2, 2]);
}

#[test]
fn an_f32_layer_becomes_one_of_fp8() {
    let mut noise = Noise(3);
    let real = |noise: &mut Noise, count: usize| -> Vec<f32> {
        (0..count).map(|_| noise.real()).collect()
    };
    let weight = Array2::from_shape_vec((24, 40), real(&mut noise, 24 * 40)).unwrap();
    let (mean, gamma, beta) = (real(&mut noise, 24), real(&mut noise, 24), real(&mut noise, 24));
    let layer = Pointwise::new(weight)
        .bias(real(&mut noise, 24))
        .batch_norm(BatchNorm::new(mean, vec![0.7; 24]).affine(gamma, beta))
        .residual()
        .relu6();
    let src = Array4::from_shape_simple_fn((2, 40, 5, 7), || noise.real());
    let residual = Array4::from_shape_simple_fn((2, 24, 5, 7), || noise.real());
    let exact = layer.prepare(&Device::cpu()).unwrap();
    let exact = exact.call(&src).residual(&residual).run().unwrap();
    let mut calibration = Calibration::new();
    calibration.observe(&layer, src.view().into_dyn(), Some(residual.view().into_dyn())).unwrap();
    // The largest magnitudes become the greatest numbers; errors are those of 3 and 2 bits of mantissa.
    for (weight, activations, tolerance) in
        [(Fp8::E4M3, Fp8::E4M3, 0.06), (Fp8::E4M3, Fp8::E5M2, 0.12), (Fp8::E5M2, Fp8::E4M3, 0.12)]
    {
        let fp8 =
            QuantizedFp8::from_layer(&layer, &calibration, Range::MinMax, weight, activations)
                .unwrap();
        assert_eq!((fp8.weight().0, fp8.weight_scale().len()), (weight, 24));
        let magnitude = |values: &Array4<f32>| values.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        let of_src = fp8.src_quantization();
        assert_eq!((of_src.fp8, of_src.scale), (activations, magnitude(&src) / activations.max()));
        for row in fp8.weight().1.outer_iter() {
            let greatest = Fp8Quantization { fp8: weight, scale: 1.0 }.quantize(f32::INFINITY);
            assert!(row.iter().any(|bits| bits & 0x7f == greatest), "a weight is the greatest");
        }
        let fp8 = fp8.dequantized();
        let prepared = fp8.prepare(&Device::cpu()).unwrap();
        let got = match activations {
            Fp8::E4M3 => run::<F8E4M3>(&prepared, &fp8, &src, &residual),
            Fp8::E5M2 => run::<F8E5M2>(&prepared, &fp8, &src, &residual),
        };
        let worst = got.iter().zip(&exact).map(|(a, b)| (a - b).abs());
        let worst = worst.fold(0.0f32, |a, b| if b > a || b.is_nan() { b } else { a });
        assert!(worst <= tolerance * 6.0, "{weight}, {activations}: {worst}");
    }
    let narrower = QuantizedFp8::from_layer(
        &layer,
        &calibration,
        Range::Percentile(90.0),
        Fp8::E4M3,
        Fp8::E4M3,
    );
    assert!(narrower.unwrap().src_quantization().scale < 0.95 / 448.0);
    let nothing = Calibration::new();
    let error = QuantizedFp8::from_layer(&layer, &nothing, Range::MinMax, Fp8::E4M3, Fp8::E4M3);
    assert!(matches!(error, Err(Error::ParameterValue { .. })));
    let shuffled = layer.channel_shuffle(4);
    let error =
        QuantizedFp8::from_layer(&shuffled, &calibration, Range::MinMax, Fp8::E4M3, Fp8::E4M3)
            .unwrap_err();
    assert_eq!(error.to_string(), "a layer of fp8 does not support a channel shuffle");
}

/// Quantises the tensors of a call as the layer says, and runs it.
fn run<T: Float8>(
    prepared: &PreparedQuantized,
    layer: &QuantizedFp8,
    src: &Array4<f32>,
    residual: &Array4<f32>,
) -> ArrayD<f32> {
    let scaled = |values: &Array4<f32>, quantization: Fp8Quantization| {
        values.mapv(|x| T::of(x / quantization.scale))
    };
    let src = scaled(src, layer.src_quantization());
    let residual = scaled(residual, layer.residual_quantization().unwrap());
    prepared.call(&src).residual(&residual).run().unwrap()
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let mut noise = Noise(4);
    let weight = Array2::from_shape_simple_fn((160, 96), || F8E4M3::of(noise.real()));
    let layer = QuantizedFp8::new(weight, vec![0.3], Fp8Quantization::e4m3(0.7))
        .dst(Fp8Quantization::e4m3(0.01));
    let src = Array4::from_shape_simple_fn((3, 96, 14, 14), || F8E4M3::of(noise.real()));
    let bits = |device: &Device| {
        let dst: Array4<F8E4M3> = layer.prepare(device).unwrap().forward(&src).unwrap();
        dst.mapv(|x| x.to_bits())
    };
    assert_eq!(bits(&Device::cpu()), bits(&Device::cpu().threads(1)));
}

#[test]
fn costs_by_hand() {
    // Two groups of 3 to 2 channels, every second position of 5x4.
    let weight = Array2::from_elem((4, 3), F8E4M3::ONE);
    let unit = Fp8Quantization::e4m3(1.0);
    let layer = QuantizedFp8::new(weight, vec![1.0], unit).groups(2).stride(2).residual(unit);
    let outputs = 3 * 3 * 2;
    let cost = layer.prepare(&Device::cpu()).unwrap().cost(&[3, 6, 5, 4]).unwrap();
    assert_eq!((cost.parameters, cost.macs), (12 + 2 * 4, outputs * 4 * 3));
    assert_eq!((cost.src_bytes, cost.weight_bytes), (outputs * 6, 12 + 2 * 4 * 4));
    assert_eq!((cost.dst_bytes, cost.residual_bytes), (outputs * 4 * 4, outputs * 4));
    let prepared = layer.prepare(&Device::cpu()).unwrap();
    let explanation = prepared.explain(&[3, 6, 5, 4]).unwrap();
    assert_eq!(explanation.kernel, prepared.plans(&[3, 6, 5, 4]).unwrap()[0].kernel);
    assert!(explanation.reason.starts_with("widened to f32; "), "{explanation}");
    assert!(prepared.kernel().starts_with("fprop_f32_"), "{}", prepared.kernel());
}

#[cfg(feature = "serde")]
#[test]
fn descriptions_are_data() {
    let weight = Array2::from_elem((2, 3), F8E5M2::from_f32(1.5));
    let layer = QuantizedFp8::new(weight, vec![0.5; 2], Fp8Quantization::e4m3(0.1)).relu();
    for layer in [layer.clone(), layer.bias(vec![1.0, 2.0]).dst(Fp8Quantization::e5m2(3.0))] {
        let text = serde_json::to_string(&layer).unwrap();
        assert_eq!(serde_json::from_str::<QuantizedFp8>(&text).unwrap(), layer, "{text}");
    }
}
