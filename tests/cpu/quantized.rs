//! Layers of 8-bit integers: against ONNX Runtime and PyTorch, against the specification, at the
//! ends of every range, and with bad input.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use crate::counting::allocated;
use ndarray::{Array, Array1, Array2, Array4, ArrayD, Dimension, Ix1, IxDyn, array, s};
use pointwise::quantized::{
    Calibration, DynamicQuantized, ElementType, Int8, Per, PreparedQuantized, QuantizedElement,
    Range,
};
use pointwise::{
    BatchNorm, Device, Element, Error, Pointwise, Quantization, Quantized, bf16, f16, nhwc,
    nhwc_mut, reference,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A sequence that looks random, the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u8 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 56) as u8
    }

    /// From −1 to 1.
    fn real(&mut self) -> f32 {
        let x = u32::from(self.next()) << 8 | u32::from(self.next());
        x as f32 / 32767.5 - 1.0
    }
}

fn integers(file: &SafeTensors<'_>, name: &str) -> (Dtype, ArrayD<i32>) {
    let view = file.tensor(name).expect(name);
    let bytes = view.data();
    let values: Vec<i32> = match view.dtype() {
        Dtype::U8 => bytes.iter().map(|&b| i32::from(b)).collect(),
        Dtype::I8 => bytes.iter().map(|&b| i32::from(b as i8)).collect(),
        Dtype::I32 => {
            bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        dtype => panic!("{name} is {dtype:?}"),
    };
    (view.dtype(), ArrayD::from_shape_vec(view.shape(), values).expect(name))
}

fn reals<D: Dimension>(file: &SafeTensors<'_>, name: &str) -> Array<f32, D> {
    let view = file.tensor(name).expect(name);
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    let values = view.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    ArrayD::from_shape_vec(view.shape(), values).unwrap().into_dimensionality().expect(name)
}

/// The cases of `fixtures/quantized.py`, of a kind.
fn cases(dynamic: bool, each: impl Fn(&SafeTensors<'_>, &Value)) -> usize {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let cases = &metadata.metadata().as_ref().unwrap()["cases"];
    let cases: Vec<Value> = serde_json::from_str(cases).unwrap();
    let cases = cases.iter().filter(|case| case.get("per").is_some() == dynamic);
    cases.map(|case| each(&file, case)).count()
}

/// Runs on integers of the layer's type, and gives those of dst.
fn forward(layer: &PreparedQuantized, int8: Int8, src: &ArrayD<i32>, dst: Int8) -> ArrayD<i32> {
    fn to<O: QuantizedElement + Into<i32>>(
        layer: &PreparedQuantized,
        int8: Int8,
        src: &ArrayD<i32>,
    ) -> ArrayD<i32> {
        let dst: ArrayD<O> = match int8 {
            Int8::U8 => layer.forward(&src.mapv(|q| q as u8)),
            Int8::I8 => layer.forward(&src.mapv(|q| q as i8)),
        }
        .unwrap();
        dst.mapv(Into::into)
    }
    match dst {
        Int8::U8 => to::<u8>(layer, int8, src),
        Int8::I8 => to::<i8>(layer, int8, src),
    }
}

#[test]
fn results_are_those_of_onnx_runtime_and_pytorch() {
    let (elements, unequal) = (Cell::new(0), Cell::new(0));
    let count = cases(false, |file, case| {
        let name = case["name"].as_str().unwrap();
        let tensor = |part: &str| format!("{name}/{part}");
        let quantization = |tensor: &str, dtype: Dtype| Quantization {
            int8: if dtype == Dtype::I8 { Int8::I8 } else { Int8::U8 },
            scale: case[tensor][0].as_f64().unwrap() as f32,
            zero_point: case[tensor][1].as_i64().unwrap() as i32,
        };
        let (src_type, src) = integers(file, &tensor("src"));
        let (dst_type, want) = integers(file, &tensor("dst"));
        let (_, weight) = integers(file, &tensor("weight"));
        let weight = weight.into_dimensionality().unwrap().mapv(|w| w as i8);
        let (_, bias) = integers(file, &tensor("bias"));
        let src_quantization = quantization("src", src_type);
        let mut layer =
            Quantized::new(weight, reals::<Ix1>(file, &tensor("weight_scale")), src_quantization)
                .bias(Array1::from_iter(bias))
                .groups(case["groups"].as_u64().unwrap() as usize)
                .stride(case["stride"].as_u64().unwrap() as usize);
        if case["relu"].as_bool().unwrap() {
            layer = layer.relu();
        }
        if dst_type == Dtype::I32 {
            // Sums, which are small enough for f32 here.
            assert!(want.iter().all(|sum| sum.abs() < 1 << 24));
            let got: ArrayD<f32> =
                layer.prepare(&Device::cpu()).unwrap().forward(&src.mapv(|q| q as u8)).unwrap();
            assert_eq!(got.mapv(|x| x as i32), want, "{name}");
            return;
        }
        let dst = quantization("dst", dst_type);
        let layer = layer.dst(dst);
        let prepared = layer.prepare(&Device::cpu()).unwrap();
        let specified = reference::forward_quantized(&layer, src.view(), None).unwrap();
        for got in [
            forward(&prepared, src_quantization.int8, &src, dst.int8),
            specified.mapv(|q| q as i32),
        ] {
            assert_eq!(got.shape(), want.shape(), "{name}");
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() <= 1, "{name}: {got} instead of {want}");
                unequal.update(|count| count + usize::from(got != want));
                elements.update(|count| count + 1);
            }
            let ends = want.iter().filter(|&&q| q == dst.int8.min() || q == dst.int8.max());
            assert!(ends.count() > 0 || case["relu"] == true, "{name} saturates nowhere");
        }
    });
    assert!(count >= 20, "only {count} cases");
    let (unequal, elements) = (unequal.get(), elements.get());
    assert!(unequal * 1000 <= elements, "{unequal} of {elements} elements differ");
}

#[test]
fn results_of_f32_sources_are_those_of_onnx_runtime_and_pytorch() {
    let count = cases(true, |file, case| {
        let name = case["name"].as_str().unwrap();
        let tensor = |part: &str| format!("{name}/{part}");
        let per = match case["per"].as_str().unwrap() {
            "tensor" => Per::Tensor,
            "position" => Per::Position,
            other => panic!("{other}"),
        };
        let (src, want) =
            (reals::<IxDyn>(file, &tensor("src")), reals::<IxDyn>(file, &tensor("dst")));
        let (_, weight) = integers(file, &tensor("weight"));
        let weight: Array2<i8> = weight.into_dimensionality().unwrap().mapv(|w| w as i8);
        let layer = DynamicQuantized::new(weight, reals::<Ix1>(file, &tensor("weight_scale")), per)
            .bias(reals::<Ix1>(file, &tensor("bias")))
            .groups(case["groups"].as_u64().unwrap() as usize)
            .stride(case["stride"].as_u64().unwrap() as usize);
        let got: ArrayD<f32> = layer.prepare(&Device::cpu()).unwrap().forward(&src).unwrap();
        assert_eq!(got.shape(), want.shape(), "{name}");
        let largest = want.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let specified = reference::forward_dynamic(&layer, src.view(), None).unwrap();
        for ((&got, &specified), &want) in got.iter().zip(&specified).zip(&want) {
            // Of a few steps of f32: any other integer is a hundred times as far away.
            let tolerance = 1e-6 * f64::from(largest);
            for got in [got.into(), specified] {
                assert!((got - f64::from(want)).abs() <= tolerance, "{name}: {got}, {want}");
            }
        }
    });
    assert!(count >= 16, "only {count} cases");
}

#[test]
fn results_are_those_of_the_specification() {
    let mut noise = Noise(3);
    let (mut elements, mut unequal) = (0, 0);
    for case in 0..60 {
        let groups = 1 + case % 3;
        let (c_in, c_out) = (groups * (1 + noise.next() as usize / 4), groups * (1 + case));
        let (h, w) = (1 + noise.next() as usize % 12, 1 + noise.next() as usize % 12);
        let stride = 1 + usize::from(case % 5 == 0);
        let quantization = |noise: &mut Noise, scale: f32| {
            let int8 = if noise.next() < 128 { Int8::U8 } else { Int8::I8 };
            let scale = scale * (1.5 + noise.real());
            Quantization { int8, scale, zero_point: int8.min() + i32::from(noise.next()) }
        };
        let weight = Array2::from_shape_simple_fn((c_out, c_in / groups), || noise.next() as i8);
        let scales = Array1::from_shape_simple_fn(c_out, || 0.02 * (1.5 + noise.real()));
        let range = 0.0005 * (c_in as f32 / groups as f32).sqrt() * 100.0;
        let src_quantization = quantization(&mut noise, 0.05);
        let mut layer = Quantized::new(weight, scales, src_quantization)
            .bias(Array1::from_shape_simple_fn(c_out, || i32::from(noise.next()) * 50 - 6000))
            .groups(groups)
            .stride(stride)
            .dst(quantization(&mut noise, range));
        match case % 4 {
            0 => layer = layer.relu(),
            1 => layer = layer.residual(quantization(&mut noise, range)).relu6(),
            2 => layer = layer.clip(-3.0, 2.5).residual(quantization(&mut noise, range)),
            _ => {}
        }
        let dst_type = layer.dst_quantization().unwrap().int8;
        let int8 = layer.src_quantization().int8;
        let draw = |noise: &mut Noise, shape: [usize; 4], int8: Int8| {
            Array4::from_shape_simple_fn(shape, || i32::from(noise.next()) + int8.min())
        };
        let src = draw(&mut noise, [2, c_in, h, w], int8);
        let shape = [2, c_out, h.div_ceil(stride), w.div_ceil(stride)];
        let has_residual = matches!(case % 4, 1 | 2);
        let prepared = layer.prepare(&Device::cpu()).unwrap();
        for residual_type in [Int8::U8, Int8::I8] {
            let residual = draw(&mut noise, shape, residual_type);
            let residual_view = has_residual.then(|| residual.view().into_dyn());
            let want = reference::forward_quantized(&layer, src.view().into_dyn(), residual_view);
            let want = want.unwrap();
            let (bytes, signed) = (src.mapv(|q| q as u8), src.mapv(|q| q as i8));
            let call = match int8 {
                Int8::U8 => prepared.call(&bytes),
                Int8::I8 => prepared.call(&signed),
            };
            let (residual_u8, residual_i8) =
                (residual.mapv(|q| q as u8), residual.mapv(|q| q as i8));
            let call = match (has_residual, residual_type) {
                (false, _) => call,
                (true, Int8::U8) => call.residual(&residual_u8),
                (true, Int8::I8) => call.residual(&residual_i8),
            };
            let got = match dst_type {
                Int8::U8 => call.run::<u8>().map(|dst| dst.mapv(i32::from)),
                Int8::I8 => call.run::<i8>().map(|dst| dst.mapv(i32::from)),
            };
            let got = match got {
                Ok(got) => got,
                // The residual is of the other type.
                Err(Error::ElementType { tensor: "residual", .. }) => continue,
                Err(error) => panic!("case {case}: {error}"),
            };
            for (&got, &want) in got.iter().zip(&want) {
                assert!((f64::from(got) - want).abs() <= 1.0, "case {case}: {got}, {want}");
                unequal += usize::from(f64::from(got) != want);
                elements += 1;
            }
        }
    }
    assert!(elements > 100_000 && unequal * 1000 <= elements, "{unequal} of {elements} differ");
}

/// One channel that passes `src − zero_point`, times `scale`.
fn pass(src: Quantization, scale: f32) -> Quantized {
    Quantized::new(array![[1i8]], vec![scale / src.scale], src)
}

#[test]
fn halves_go_to_the_even_neighbour_and_the_ends_saturate() {
    let src = Array2::from_shape_fn((1, 1), |_| 0u8);
    let all: Vec<u8> = (0..=255).collect();
    for (src_zero_point, dst_zero_point) in [(128, 128), (0, 0), (255, 255), (0, 255), (3, 200)] {
        // Steps of a half; of 16, which leave the range.
        for scale in [0.5f32, 16.0] {
            let layer = pass(Quantization::u8(1.0, src_zero_point), scale)
                .dst(Quantization::u8(1.0, dst_zero_point))
                .prepare(&Device::cpu())
                .unwrap();
            for &q in &all {
                let dst: Array2<u8> = layer.forward(&src.mapv(|_| q)).unwrap();
                let real = f64::from(scale) * f64::from(i32::from(q) - src_zero_point);
                let want = real.round_ties_even() + f64::from(dst_zero_point);
                assert_eq!(f64::from(dst[[0, 0]]), want.clamp(0.0, 255.0), "{q} · {scale}");
            }
            // Many at once take other code.
            let many = Array2::from_shape_vec((256, 1), all.clone()).unwrap();
            let dst: Array2<u8> = layer.forward(&many).unwrap();
            for (&q, &got) in all.iter().zip(&dst) {
                let real = f64::from(scale) * f64::from(i32::from(q) - src_zero_point);
                let want = real.round_ties_even() + f64::from(dst_zero_point);
                assert_eq!(f64::from(got), want.clamp(0.0, 255.0), "{q} · {scale}");
            }
        }
    }
    // Sums whose f32 is beyond the bytes by far, in both directions.
    let layer = Quantized::new(array![[127i8], [-127]], vec![1e30, 1e30], Quantization::u8(1e3, 0));
    let layer = layer.dst(Quantization::i8(1e-3, 5)).prepare(&Device::cpu()).unwrap();
    let dst: Array2<i8> = layer.forward(&array![[255u8]]).unwrap();
    assert_eq!(dst, array![[127i8, -128]]);
}

#[test]
fn clips_are_of_real_numbers() {
    let src = Array2::from_shape_fn((256, 1), |(q, _)| q as u8);
    let identity = || pass(Quantization::u8(0.1, 128), 0.1);
    let run = |layer: Quantized| -> Vec<f32> {
        let dst: Array2<f32> = layer.prepare(&Device::cpu()).unwrap().forward(&src).unwrap();
        dst.iter().copied().collect()
    };
    let bare = run(identity());
    let want = |f: &dyn Fn(f32) -> f32| bare.iter().map(|&x| f(x)).collect::<Vec<_>>();
    assert_eq!(run(identity().relu()), want(&|x| x.max(0.0)));
    assert_eq!(run(identity().relu6()), want(&|x| x.clamp(0.0, 6.0)));
    assert_eq!(run(identity().clip(-1.0, 2.0).relu()), want(&|x| x.clamp(0.0, 2.0)));
    assert_eq!(run(identity().relu().clip(-5.0, -1.0)), want(&|_| -1.0));
    let dst: Array2<u8> = identity()
        .relu6()
        .dst(Quantization::u8(0.05, 10))
        .prepare(&Device::cpu())
        .unwrap()
        .forward(&src)
        .unwrap();
    assert_eq!((dst.iter().min(), dst.iter().max()), (Some(&10), Some(&130)));
}

#[test]
fn results_do_not_depend_on_threads_layouts_and_ranks() {
    let mut noise = Noise(11);
    let (c_in, c_out, side) = (96, 200, 40);
    let weight = Array2::from_shape_simple_fn((c_out, c_in), || noise.next() as i8);
    let layer = Quantized::new(weight, vec![0.01; c_out], Quantization::u8(0.02, 120))
        .relu()
        .dst(Quantization::u8(0.7, 3));
    let src = Array4::from_shape_simple_fn((3, c_in, side, side), || noise.next());
    let last = src.view().permuted_axes([0, 2, 3, 1]).as_standard_layout().to_owned();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let devices = [Device::cpu().threads(1), Device::cpu(), Device::cpu_with_pool(Arc::new(pool))];
    let first: Array4<u8> = layer.prepare(&devices[0]).unwrap().forward(&src).unwrap();
    assert!(first.iter().any(|&q| q != first[[0, 0, 0, 0]]));
    for device in &devices {
        let layer = layer.prepare(device).unwrap();
        for _ in 0..3 {
            assert_eq!(layer.forward::<_, u8, _>(&src).unwrap(), first);
            let mut dst = Array4::<u8>::from_elem((3, side, side, c_out + 7), 77);
            layer
                .forward_into(
                    &nhwc(last.view()),
                    &mut nhwc_mut(dst.slice_mut(s![.., .., .., 4..c_out + 4])),
                )
                .unwrap();
            assert_eq!(nhwc(dst.slice(s![.., .., .., 4..c_out + 4])), first);
            assert!(dst.slice(s![.., .., .., ..4]).iter().all(|&q| q == 77));
            assert!(dst.slice(s![.., .., .., -3..]).iter().all(|&q| q == 77));
        }
        let flat = last.to_shape((3 * side * side, c_in)).unwrap();
        let dst: Array2<u8> = layer.forward(&flat).unwrap();
        let want = first.view().permuted_axes([0, 2, 3, 1]).as_standard_layout().to_owned();
        assert_eq!(dst, want.to_shape((3 * side * side, c_out)).unwrap());
    }
}

#[test]
fn the_memory_order_is_the_sources() {
    let layer = Quantized::new(Array2::<i8>::ones((6, 4)), vec![1.0; 6], Quantization::u8(1.0, 0));
    let layer = layer.prepare(&Device::cpu()).unwrap();
    let last = Array4::<u8>::ones((2, 5, 3, 4));
    let dst: Array4<f32> = layer.forward(&nhwc(last.view())).unwrap();
    assert_eq!((dst.shape(), dst.strides()), (&[2, 6, 5, 3][..], &[90, 1, 18, 6][..]));
    assert_eq!(layer.dst_shape(&[7, 4, 1]).unwrap(), [7, 6, 1]);
    for shape in [&[0, 4, 5, 5][..], &[2, 4, 0, 5]] {
        let empty: ArrayD<f32> = layer.forward(&ArrayD::<u8>::zeros(shape)).unwrap();
        assert!(empty.is_empty() && empty.shape()[1] == 6);
    }
}

#[test]
fn nothing_is_allocated_once_warm() {
    for c_in in [32, 33] {
        let weight = Array2::<i8>::ones((40, c_in));
        let layer = Quantized::new(weight, vec![1.0; 40], Quantization::u8(1.0, 0))
            .residual(Quantization::u8(1.0, 0))
            .dst(Quantization::u8(1.0, 0))
            .prepare(&Device::cpu().threads(1))
            .unwrap();
        let src = Array4::<u8>::ones((2, c_in, 9, 9));
        let residual = Array4::<u8>::ones((2, 40, 9, 9));
        let mut dst = Array4::<u8>::zeros((2, 40, 9, 9));
        let mut run = || layer.call(&src).residual(&residual).run_into(&mut dst).unwrap();
        run();
        let before = allocated();
        (0..3).for_each(|_| run());
        assert_eq!(allocated() - before, 0);

        let (src, residual) = (src.mapv(f32::from), residual.mapv(f32::from));
        let mut dst = Array4::<f32>::zeros((2, 40, 9, 9));
        for per in [Per::Tensor, Per::Sample, Per::Position] {
            let weight = Array2::<i8>::ones((40, c_in));
            let layer = DynamicQuantized::new(weight, vec![1.0; 40], per).residual();
            let layer = layer.prepare(&Device::cpu().threads(1)).unwrap();
            let mut run = || layer.call(&src).residual(&residual).run_into(&mut dst).unwrap();
            run();
            let before = allocated();
            (0..3).for_each(|_| run());
            assert_eq!(allocated() - before, 0);
        }
    }
}

#[test]
fn a_layer_is_shared_between_threads() {
    fn shared<T: Send + Sync>(_: &T) {}
    let layer = Quantized::new(array![[1i8]], vec![1.0], Quantization::u8(1.0, 0));
    shared(&layer);
    shared(&layer.prepare(&Device::cpu()).unwrap());
}

#[test]
fn bad_descriptions_are_errors_with_their_values() {
    let weight = || Array2::<i8>::from_elem((2, 3), 1);
    let layer = || Quantized::new(weight(), vec![1.0, 1.0], Quantization::u8(1.0, 0));
    let refused = |layer: Quantized| layer.prepare(&Device::cpu()).unwrap_err();
    let value = |layer: Quantized| match refused(layer) {
        Error::ParameterValue { parameter, value, .. } => format!("{parameter} {value}"),
        error => panic!("{error}"),
    };
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let q = |scale| Quantization::u8(scale, 0);
        assert_eq!(
            value(Quantized::new(weight(), vec![1.0, 1.0], q(scale))),
            format!("src's scale {scale}")
        );
        assert_eq!(value(layer().dst(q(scale))), format!("dst's scale {scale}"));
        assert_eq!(value(layer().residual(q(scale))), format!("residual's scale {scale}"));
        let bad = Quantized::new(weight(), vec![1.0, scale], q(1.0));
        assert_eq!(value(bad), format!("weight_scale[1] {scale}"));
    }
    for zero_point in [-1, 256, i32::MIN] {
        let q = Quantization::u8(1.0, zero_point);
        assert_eq!(value(layer().dst(q)), format!("dst's zero point {zero_point}"));
    }
    for zero_point in [-129, 128, i32::MAX] {
        let q = Quantization::i8(1.0, zero_point);
        assert_eq!(value(layer().residual(q)), format!("residual's zero point {zero_point}"));
    }
    let overflow = Quantized::new(weight(), vec![1e30, 1.0], Quantization::u8(1e30, 0));
    assert!(value(overflow).starts_with("src's scale times weight_scale[0]"));
    assert_eq!(value(layer().clip(1.0, -1.0)), "clip 1, -1");
    assert_eq!(value(layer().clip(f32::NAN, 1.0)), "clip NaN, 1");
    assert_eq!(value(layer().clip(5.0, 3.0).relu6()), "clip 5, 3");
    assert_eq!(value(layer().stride(0)), "stride 0");
    assert!(matches!(
        refused(layer().bias(vec![1])),
        Error::ParameterLength { parameter: "bias", expected: 2, got: 1 }
    ));
    assert!(matches!(
        refused(Quantized::new(weight(), vec![1.0], Quantization::u8(1.0, 0))),
        Error::ParameterLength { parameter: "weight_scale", expected: 2, got: 1 }
    ));
    assert!(matches!(refused(layer().groups(3)), Error::Groups { groups: 3, channels: 2, .. }));
    assert!(matches!(refused(layer().groups(0)), Error::Groups { groups: 0, .. }));
    let empty = Quantized::new(Array2::zeros((0, 3)), Array1::zeros(0), Quantization::u8(1.0, 0));
    assert!(matches!(refused(empty), Error::NoChannels { tensor: "weight", .. }));
}

#[test]
fn sums_that_may_not_fit_are_errors() {
    let layer = |k: usize, w: i8, zero_point| {
        let weight = Array2::from_elem((2, k), w);
        Quantized::new(weight, vec![1.0, 1.0], Quantization::u8(1.0, zero_point))
    };
    // 2^31 − 1 = 66 311 · 127 · 255 + 1 912.
    assert!(layer(66_311, 127, 0).check().is_ok());
    assert!(layer(66_311, 127, 0).bias(vec![0, 1_912]).check().is_ok());
    let error = layer(66_311, 127, 0).bias(vec![0, 1_913]).check().unwrap_err();
    assert!(matches!(
        error,
        Error::SumOverflow { channel: 1, sum: 2_147_483_648, terms: 66_311, bias: 1_913 }
    ));
    let error = layer(66_312, 127, 0).check().unwrap_err();
    assert!(matches!(error, Error::SumOverflow { channel: 0, bias: 0, .. }), "{error}");
    // A bias does not make up for sums that overflow before it is added.
    assert!(layer(66_312, 127, 0).bias(vec![-100_000, -100_000]).check().is_err());
    assert!(layer(66_312, 127, 255).check().is_err());
    assert!(layer(100_000, 127, 128).check().is_ok());
    assert!(layer(3, 0, 0).bias(vec![i32::MIN, i32::MAX]).check().is_ok());
}

#[test]
fn bad_calls_are_errors_with_their_values() {
    let bare = Quantized::new(Array2::<i8>::ones((2, 3)), vec![1.0, 1.0], Quantization::u8(1.0, 0));
    let layer = bare.prepare(&Device::cpu()).unwrap();
    let src = Array4::<u8>::zeros((1, 3, 4, 4));
    let mut dst = Array4::<f32>::zeros((1, 2, 4, 4));
    let got = layer.forward_into(&src.mapv(|q| q as i8), &mut dst).unwrap_err();
    assert!(matches!(got, Error::ElementType { tensor: "src", expected: "u8", got: "i8" }));
    let got = layer.forward_into(&src, &mut dst.mapv(|q| q as u8)).unwrap_err();
    assert!(matches!(got, Error::ElementType { tensor: "dst", expected: "f32", got: "u8" }));
    let got = layer.forward::<u8, f32, _>(&Array4::zeros((1, 4, 4, 4))).unwrap_err();
    assert!(matches!(got, Error::Channels { weight: 3, src: 4, groups: 1 }));
    let got = layer.forward_into(&src, &mut Array4::<f32>::zeros((1, 3, 4, 4))).unwrap_err();
    assert!(matches!(got, Error::Shape { tensor: "dst", .. }));
    let residual = Array4::<u8>::zeros((1, 2, 4, 4));
    let got = layer.call(&src).residual(&residual).run_into(&mut dst).unwrap_err();
    assert!(matches!(got, Error::UnexpectedInput { input: "residual" }));
    assert!(layer.forward::<u8, f32, _>(&ndarray::Array1::<u8>::zeros(3)).is_err());

    let layer = bare.residual(Quantization::u8(1.0, 0)).dst(Quantization::u8(1.0, 0));
    let layer = layer.prepare(&Device::cpu()).unwrap();
    let got = layer.forward::<u8, u8, _>(&src).unwrap_err();
    assert!(matches!(got, Error::MissingInput { input: "residual" }));
    let got = layer.call(&src).residual(&residual.mapv(|q| q as i8)).run::<u8>().unwrap_err();
    assert!(matches!(got, Error::ElementType { tensor: "residual", expected: "u8", got: "i8" }));
    let got = layer.call(&src).residual(&src).run::<u8>().unwrap_err();
    assert!(matches!(got, Error::Shape { tensor: "residual", .. }));
    assert_eq!(layer.call(&src).residual(&residual).run::<u8>().unwrap().shape(), [1, 2, 4, 4]);

    // In place, and bytes of an f32 result.
    let layer = Quantized::new(array![[1i8]], vec![1.0], Quantization::u8(1.0, 0));
    let mut memory = vec![0f32; 8];
    // SAFETY: memory that lives as long, of which any bits are valid.
    let bytes = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), 32) };
    let src = pointwise::TensorRef::from_slice(bytes, 31, &[1, 1], &[1, 1]).unwrap();
    let mut dst = pointwise::TensorMut::from_slice(&mut memory, 7, &[1, 1], &[1, 1]).unwrap();
    let layer = layer.prepare(&Device::cpu()).unwrap();
    let got = layer.forward_into(&src, &mut dst).unwrap_err();
    assert!(matches!(got, Error::Aliased { tensor: "src", .. }), "{got}");
}

#[test]
fn quantized_layers_are_close_to_the_layers_that_they_come_from() {
    let mut noise = Noise(21);
    let (c_in, c_out) = (48, 40);
    let weight = Array2::from_shape_simple_fn((c_out, c_in), || noise.real());
    let vector = |noise: &mut Noise, base: f32| -> Vec<f32> {
        (0..c_out).map(|_| base + noise.real() / 2.0).collect()
    };
    let norm = BatchNorm::new(vector(&mut noise, 0.0), vector(&mut noise, 1.0))
        .affine(vector(&mut noise, 1.0), vector(&mut noise, 0.0));
    let layer = Pointwise::new(weight).batch_norm(norm).residual().relu();
    let src = Array4::from_shape_simple_fn((2, c_in, 9, 9), || noise.real() * 2.0).into_dyn();
    let residual = Array4::from_shape_simple_fn((2, c_out, 9, 9), || noise.real() * 3.0).into_dyn();
    let mut calibration = Calibration::new();
    let empty = Quantized::from_layer(&layer, &calibration, Range::MinMax, Int8::U8);
    assert!(matches!(empty, Err(Error::ParameterValue { .. })));
    calibration.observe(&layer, src.view(), Some(residual.view())).unwrap();
    let inputs = reference::Inputs {
        sources: vec![src.view()],
        residual: Some(residual.view()),
        gate: None,
    };
    let want = reference::forward(&layer, &inputs).unwrap();
    let largest = want.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
    for int8 in [Int8::U8, Int8::I8] {
        let quantized = Quantized::from_layer(&layer, &calibration, Range::MinMax, int8).unwrap();
        assert_eq!(quantized.weight().iter().map(|w| w.unsigned_abs()).max(), Some(127));
        let dst = quantized.dst_quantization().unwrap();
        let to_integers = |x: &ArrayD<f32>, q: Quantization| x.mapv(|x| q.quantize(x));
        let residual_quantization = {
            // That of values between −3 and 3.
            let q = Quantization { int8, scale: 6.0 / 255.0, zero_point: int8.min() + 128 };
            Quantization { scale: 6.0 / 255.0, ..q }
        };
        let quantized = quantized.residual(residual_quantization);
        let got = reference::forward_quantized(
            &quantized,
            to_integers(&src, quantized.src_quantization()).view(),
            Some(to_integers(&residual, residual_quantization).view()),
        )
        .unwrap();
        let error = got
            .iter()
            .zip(&want)
            .map(|(&q, &want)| (f64::from(dst.dequantize(q as i32)) - want).abs())
            .fold(0.0f64, f64::max);
        assert!(error <= 0.03 * largest, "{error} of {largest}");
        // Zero stands for itself, and ReLU's results begin at it.
        assert_eq!(dst.zero_point, int8.min());

        let part = Quantized::from_layer(&layer, &calibration, Range::Percentile(99.0), int8);
        assert!(part.unwrap().src_quantization().scale < quantized.src_quantization().scale);
    }
    for percentile in [50.0, 100.5, f32::NAN] {
        let range = Range::Percentile(percentile);
        let refused = Quantized::from_layer(&layer, &calibration, range, Int8::U8);
        assert!(matches!(refused, Err(Error::ParameterValue { .. })));
    }
    let refused = |layer: &Pointwise| match Quantized::from_layer(
        layer,
        &calibration,
        Range::MinMax,
        Int8::U8,
    ) {
        Err(Error::Unsupported { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&layer.clone().gelu()), "gelu");
    assert_eq!(refused(&layer.clone().channel_shuffle(4)), "a channel shuffle");
}

#[test]
fn quantization_rounds_and_saturates() {
    let q = Quantization::i8(0.5, 3);
    assert_eq!([0.25, 0.75, -0.25, 1e9, -1e9].map(|x| q.quantize(x)), [3, 5, 3, 127, -128]);
    assert_eq!(q.quantize(f32::NAN), 3);
    assert_eq!([3, 5, -128].map(|x| q.dequantize(x)), [0.0, 1.0, -65.5]);
    assert_eq!([u8::TYPE.name(), i8::TYPE.name(), bf16::TYPE.name()], ["u8", "i8", "bf16"]);
    assert_eq!(i8::TYPE, ElementType::Int8(Int8::I8));
}

/// A layer, its source and residual, whose rows reach differently far.
fn dynamic_case(
    noise: &mut Noise,
    [n, c_in, c_out, h, w, groups, stride]: [usize; 7],
    per: Per,
) -> (DynamicQuantized, Array4<f32>, Array4<f32>) {
    let weight = Array2::from_shape_simple_fn((c_out, c_in / groups), || noise.next() as i8);
    let scales = Array1::from_shape_simple_fn(c_out, || 0.01 * (1.5 + noise.real()));
    let bias = Array1::from_shape_simple_fn(c_out, || noise.real());
    let layer = DynamicQuantized::new(weight, scales, per).bias(bias).groups(groups).stride(stride);
    let mut src = Array4::from_shape_simple_fn((n, c_in, h, w), || noise.real());
    for (i, mut sample) in src.outer_iter_mut().enumerate() {
        for mut row in sample.axis_iter_mut(ndarray::Axis(2)) {
            let (scale, shift) = (1.0 + 3.0 * noise.real().powi(2), noise.real());
            row.mapv_inplace(|x| x * scale * (1 + i) as f32 + shift);
        }
    }
    let shape = (n, c_out, h.div_ceil(stride), w.div_ceil(stride));
    let residual = Array4::from_shape_simple_fn(shape, || noise.real());
    (layer, src, residual)
}

#[test]
fn sources_of_f32_give_what_the_specification_says() {
    let mut noise = Noise(5);
    let shapes = [
        [2, 16, 24, 5, 7, 1, 1],
        [1, 67, 33, 9, 9, 1, 1],
        [3, 24, 36, 6, 5, 3, 2],
        [2, 130, 70, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 5, 200, 20, 20, 1, 3],
        [40, 64, 66, 1, 3, 2, 1],
        [1, 512, 96, 23, 23, 1, 1],
        [0, 8, 8, 3, 3, 1, 1],
        [2, 8, 8, 0, 3, 1, 1],
    ];
    for shape in shapes {
        for per in [Per::Tensor, Per::Sample, Per::Position] {
            let (layer, src, residual) = dynamic_case(&mut noise, shape, per);
            let layer = layer.clip(-2.0, 3.0).residual().clip(-2.5, f32::INFINITY);
            let want = reference::forward_dynamic(
                &layer,
                src.view().into_dyn(),
                Some(residual.view().into_dyn()),
            )
            .unwrap();
            let last = src.view().permuted_axes([0, 2, 3, 1]).as_standard_layout().to_owned();
            let mut first = None;
            for device in [Device::cpu().threads(1), Device::cpu()] {
                let layer = layer.prepare(&device).unwrap();
                for src in [src.view(), nhwc(last.view()), src.slice(s![.., .., ..;-1, ..])] {
                    let turned = src.strides()[2] < 0;
                    let residual = if turned {
                        residual.slice(s![.., .., ..;-1, ..])
                    } else {
                        residual.view()
                    };
                    // Rows that a stride skips from the end are others than from the front.
                    if turned && (shape[3] % shape[6] != 1 % shape[6]) {
                        continue;
                    }
                    let got = layer.call(&src).residual(&residual).run::<f32>().unwrap();
                    let got =
                        if turned { got.slice_move(s![.., .., ..;-1, ..]).into_dyn() } else { got };
                    assert_eq!(got.shape(), want.shape());
                    for (&got, want) in got.iter().zip(&want) {
                        let err = (f64::from(got) - want).abs();
                        assert!(
                            err <= 1e-5 * want.abs().max(1.0),
                            "{shape:?} {per:?}: {got}, {want}"
                        );
                    }
                    let got = got.as_standard_layout().to_owned();
                    assert_eq!(*first.get_or_insert_with(|| got.clone()), got, "{shape:?} {per:?}");
                }
            }
        }
    }
}

#[test]
fn real_results_are_those_of_f32_rounded_once() {
    fn check<T: QuantizedElement + Element>(noise: &mut Noise) {
        let (layer, src, residual) = dynamic_case(noise, [2, 40, 70, 7, 7, 1, 1], Per::Position);
        let added = residual.mapv(T::from_f32);
        let layer = layer.residual().relu().prepare(&Device::cpu()).unwrap();
        let widened = added.mapv(T::to_f32);
        let want = layer.call(&src).residual(&widened).run::<f32>().unwrap();
        let got = layer.call(&src).residual(&added).run::<T>().unwrap();
        assert_eq!(got.mapv(T::to_f32), want.mapv(|x| T::from_f32(x).to_f32()));
        let error = layer.call(&src).residual(&added).run::<f32>().unwrap_err();
        assert!(matches!(error, Error::ElementType { tensor: "residual", .. }));

        // Of integers, too.
        let weight = Array2::from_shape_simple_fn((70, 40), || noise.next() as i8);
        let layer = Quantized::new(weight, vec![0.013; 70], Quantization::u8(0.1, 7))
            .residual(Quantization::i8(0.3, 5))
            .prepare(&Device::cpu())
            .unwrap();
        for last in [false, true] {
            let src = Array4::from_shape_simple_fn((1, 7, 7, 40), || noise.next());
            let residual = Array4::from_shape_simple_fn((1, 7, 7, 70), || noise.next() as i8);
            let (src, residual) = (nhwc(src.view()), nhwc(residual.view()));
            let (src, residual) = match last {
                true => (src.to_owned(), residual.to_owned()),
                false => {
                    (src.as_standard_layout().to_owned(), residual.as_standard_layout().to_owned())
                }
            };
            let want = layer.call(&src).residual(&residual).run::<f32>().unwrap();
            let got = layer.call(&src).residual(&residual).run::<T>().unwrap();
            assert_eq!(got.mapv(T::to_f32), want.mapv(|x| T::from_f32(x).to_f32()));
        }
    }
    let mut noise = Noise(8);
    check::<f16>(&mut noise);
    check::<bf16>(&mut noise);
}

#[test]
fn the_ends_of_f32_have_quantisations() {
    // Halves, so that a step beyond the greatest does not overflow.
    let run = |src: Array2<f32>, per| -> Array2<f32> {
        let c = src.ncols();
        let weight = Array2::from_shape_fn((c, c), |(i, j)| i8::from(i == j));
        let layer = DynamicQuantized::new(weight, vec![0.5; c], per);
        let dst: Array2<f32> = layer.prepare(&Device::cpu()).unwrap().forward(&src).unwrap();
        let want = reference::forward_dynamic(&layer, src.view().into_dyn(), None).unwrap();
        for (&got, &want) in dst.iter().zip(&want) {
            let err = (f64::from(got) - want).abs();
            assert!(got.is_nan() && want.is_nan() || err <= 1e-6 * want.abs(), "{got}, {want}");
        }
        dst
    };
    let (max, tiny) = (f32::MAX, f32::from_bits(3));
    let rows = array![
        [0.0, -0.0, 0.0],
        [max, -max, 0.0],
        [tiny, -tiny, 0.0],
        [5.0, 5.0, 5.0],
        [-1.0, -2.0, -3.0]
    ];
    let dst = run(rows, Per::Position);
    assert_eq!(dst.row(0), array![0.0, 0.0, 0.0]);
    assert!(dst.row(1).iter().all(|x| x.is_finite()) && dst[[1, 0]] > 0.49 * max);
    assert_eq!(dst.row(2), array![0.0, 0.0, 0.0]);
    assert!(dst.row(3).iter().all(|&x| x == 2.5));
    assert_eq!(dst[[4, 2]], -1.5);
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let src = array![[1.0, 2.0, 3.0], [1.0, bad, 3.0]];
        let dst = run(src.clone(), Per::Position);
        assert!(dst.row(0).iter().all(|x| x.is_finite()));
        assert!(dst.row(1).iter().all(|x| x.is_nan()), "{bad}: {dst}");
        assert!(run(src, Per::Tensor).iter().all(|x| x.is_nan()), "{bad}");
        // Through clips, too.
        let layer = DynamicQuantized::new(array![[1i8]], vec![1.0], Per::Position).relu6();
        let dst: Array2<f32> =
            layer.prepare(&Device::cpu()).unwrap().forward(&array![[bad]]).unwrap();
        assert!(dst[[0, 0]].is_nan());
    }
}

#[test]
fn what_shares_a_quantisation_is_as_it_says() {
    let mut noise = Noise(12);
    let shape = [3, 12, 20, 4, 5, 1, 2];
    for per in [Per::Tensor, Per::Sample, Per::Position] {
        let (layer, mut src, _) = dynamic_case(&mut noise, shape, per);
        let layer = layer.prepare(&Device::cpu()).unwrap();
        let before: Array4<f32> = layer.forward(&src).unwrap();
        // A position that the stride skips, of the second sample.
        src[[1, 3, 1, 1]] = 1e3;
        let after: Array4<f32> = layer.forward(&src).unwrap();
        let changed =
            [0, 1, 2].map(|i| before.slice(s![i, .., .., ..]) != after.slice(s![i, .., .., ..]));
        let want = match per {
            Per::Tensor => [true; 3],
            Per::Sample => [false, true, false],
            Per::Position => [false; 3],
        };
        assert_eq!(changed, want, "{per:?}");
        // One that it keeps.
        src[[1, 3, 2, 2]] = 1e3;
        let last: Array4<f32> = layer.forward(&src).unwrap();
        if per == Per::Position {
            for ((i, c, y, x), &value) in last.indexed_iter() {
                let same = value == after[[i, c, y, x]];
                assert_eq!(same, (i, y, x) != (1, 1, 1), "{i} {c} {y} {x}");
            }
        }
    }
}

#[test]
fn bad_dynamic_layers_and_calls_are_errors_with_their_values() {
    let weight = || Array2::<i8>::from_elem((2, 3), 1);
    let layer = || DynamicQuantized::new(weight(), vec![1.0, 1.0], Per::Position);
    let value = |layer: DynamicQuantized| match layer.prepare(&Device::cpu()).unwrap_err() {
        Error::ParameterValue { parameter, value, .. } => format!("{parameter} {value}"),
        error => panic!("{error}"),
    };
    assert_eq!(value(layer().bias(vec![0.0, f32::NAN])), "bias[1] NaN");
    assert_eq!(value(layer().clip(1.0, -1.0)), "clip 1, -1");
    assert_eq!(value(layer().stride(0)), "stride 0");
    let zero = DynamicQuantized::new(weight(), vec![1.0, 0.0], Per::Tensor);
    assert_eq!(value(zero), "weight_scale[1] 0");
    assert!(matches!(layer().groups(3).check(), Err(Error::Groups { groups: 3, .. })));
    assert!(matches!(
        layer().bias(vec![1.0]).check(),
        Err(Error::ParameterLength { parameter: "bias", expected: 2, got: 1 })
    ));
    let long =
        |k| DynamicQuantized::new(Array2::<i8>::from_elem((1, k), -127), vec![1.0], Per::Tensor);
    assert!(long(66_311).check().is_ok());
    assert!(matches!(long(66_312).check(), Err(Error::SumOverflow { channel: 0, bias: 0, .. })));

    let prepared = layer().prepare(&Device::cpu()).unwrap();
    let src = Array2::<f32>::zeros((4, 3));
    let error = prepared.forward::<u8, f32, _>(&src.mapv(|_| 0u8)).unwrap_err();
    assert!(matches!(error, Error::ElementType { tensor: "src", expected: "f32", got: "u8" }));
    let error = prepared.forward::<f32, u8, _>(&src).unwrap_err();
    assert!(matches!(error, Error::ElementType { tensor: "dst", expected: "f32", got: "u8" }));
    let error = prepared.forward::<f32, f32, _>(&Array2::zeros((4, 4))).unwrap_err();
    assert!(matches!(error, Error::Channels { weight: 3, src: 4, groups: 1 }));
    let added = Array2::<f32>::zeros((4, 2));
    let error = prepared.call(&src).residual(&added).run::<f32>().unwrap_err();
    assert!(matches!(error, Error::UnexpectedInput { input: "residual" }));
    let error = layer().residual().prepare(&Device::cpu()).unwrap().forward::<_, f32, _>(&src);
    assert!(matches!(error, Err(Error::MissingInput { input: "residual" })));
}

#[test]
fn a_dynamic_layer_is_close_to_the_layer_that_it_comes_from() {
    let mut noise = Noise(31);
    let (c_in, c_out) = (64, 48);
    let weight = Array2::from_shape_simple_fn((c_out, c_in), || noise.real());
    let bias = Array1::from_shape_simple_fn(c_out, || noise.real() * 10.0);
    let layer = Pointwise::new(weight).bias(bias).residual().relu6();
    let src = Array4::from_shape_simple_fn((2, c_in, 9, 9), || noise.real()).into_dyn();
    let residual = Array4::from_shape_simple_fn((2, c_out, 9, 9), || noise.real()).into_dyn();
    let inputs = reference::Inputs {
        sources: vec![src.view()],
        residual: Some(residual.view()),
        gate: None,
    };
    let want = reference::forward(&layer, &inputs).unwrap();
    for per in [Per::Tensor, Per::Sample, Per::Position] {
        let dynamic = DynamicQuantized::from_layer(&layer, per).unwrap();
        let dynamic = dynamic.prepare(&Device::cpu()).unwrap();
        let got = dynamic.call(&src).residual(&residual).run::<f32>().unwrap();
        let error = got.iter().zip(&want).map(|(&x, y)| (f64::from(x) - y).abs());
        let error = error.fold(0.0f64, |a, b| if b > a || b.is_nan() { b } else { a });
        assert!(error <= 0.1, "{error}");
    }
    let shuffled = DynamicQuantized::from_layer(&layer.channel_shuffle(4), Per::Tensor);
    assert!(matches!(shuffled, Err(Error::Unsupported { .. })));
}

#[cfg(feature = "serde")]
#[test]
fn descriptions_are_data() {
    let bare = Quantized::new(Array2::<i8>::ones((2, 3)), vec![0.5; 2], Quantization::u8(0.1, 3));
    for layer in [
        bare.clone(),
        bare.clone().relu(),
        bare.clone().clip(-1.0, 2.0).dst(Quantization::i8(0.2, -4)),
    ] {
        let text = serde_json::to_string(&layer).unwrap();
        assert_eq!(serde_json::from_str::<Quantized>(&text).unwrap(), layer, "{text}");
    }
    let layer = DynamicQuantized::new(Array2::<i8>::ones((2, 3)), vec![0.5; 2], Per::Sample).relu();
    let text = serde_json::to_string(&layer).unwrap();
    assert_eq!(serde_json::from_str::<DynamicQuantized>(&text).unwrap(), layer, "{text}");
}

#[test]
fn costs_by_hand() {
    // Two groups of 3 to 2 channels, every second position of 5x4.
    let weight = || Array2::from_elem((4, 3), 1i8);
    let quantization = Quantization::u8(0.5, 3);
    let layer = Quantized::new(weight(), vec![1.0; 4], quantization)
        .groups(2)
        .stride(2)
        .residual(quantization);
    let shape = [3, 6, 5, 4];
    let outputs = 3 * 3 * 2;
    let of = |layer: &Quantized| layer.prepare(&Device::cpu()).unwrap().cost(&shape).unwrap();
    let cost = of(&layer.clone().dst(quantization));
    assert_eq!((cost.parameters, cost.macs), (12 + 2 * 4, outputs * 4 * 3));
    assert_eq!((cost.src_bytes, cost.weight_bytes), (outputs * 6, 12 + 2 * 4 * 4));
    assert_eq!((cost.dst_bytes, cost.residual_bytes), (outputs * 4, outputs * 4));
    // Real results, beside a residual of integers.
    let cost = of(&layer);
    assert_eq!((cost.dst_bytes, cost.residual_bytes), (outputs * 4 * 4, outputs * 4));

    for (per, positions) in [(Per::Tensor, 3 * 20), (Per::Sample, 3 * 20), (Per::Position, outputs)]
    {
        let layer =
            DynamicQuantized::new(weight(), vec![1.0; 4], per).groups(2).stride(2).residual();
        let cost = layer.prepare(&Device::cpu()).unwrap().cost(&shape).unwrap();
        assert_eq!(cost.macs, outputs * 4 * 3);
        assert_eq!((cost.src_bytes, cost.weight_bytes), (positions * 6 * 4, 12 + 3 * 4 * 4));
        assert_eq!((cost.dst_bytes, cost.residual_bytes), (outputs * 4 * 4, outputs * 4 * 4));
    }
}

#[test]
fn plans_and_explain_name_the_kernel_that_runs() {
    let layer = Quantized::new(Array2::ones((3, 2)), vec![1.0; 3], Quantization::u8(1.0, 0));
    let prepared = layer.prepare(&Device::cpu()).unwrap();
    let plans = prepared.plans(&[1, 2, 5, 5]).unwrap();
    assert_eq!(plans[0].kernel, prepared.kernel());
    assert!(plans[0].verdict.is_ok(), "{plans:?}");
    // Every kernel is listed, those too that this CPU cannot run.
    assert!(plans.len() >= if cfg!(target_arch = "x86_64") { 4 } else { 1 }, "{plans:?}");
    let explanation = prepared.explain(&[1, 2, 5, 5]).unwrap();
    assert_eq!(explanation.kernel, prepared.kernel());
    assert_eq!(explanation.cost, prepared.cost(&[1, 2, 5, 5]).unwrap());
    assert!(explanation.to_string().contains("1x2x5x5 -> 1x3x5x5 on cpu"), "{explanation}");
    assert!(prepared.plans(&[1, 3, 5, 5]).is_err() && prepared.explain(&[1, 3, 5, 5]).is_err());
}
