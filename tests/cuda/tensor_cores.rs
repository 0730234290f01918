//! TF32 on tensor cores: exact where the arithmetic is, rounded to the nearest where it is not.

use ndarray::{Array2, Array3, Array5, s};
use pointwise::{CudaDevice, Device, Error, Math, Pointwise, PrepareOptions, reference};

use super::cases::{Case, Layout, Placed, chain, in_layouts, same_bits};
use super::numbers::Random;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("tf32_kernels_are_exact_on_integers", integers),
    ("tf32_operands_are_rounded_to_the_nearest", rounding),
    ("three_products_of_tf32_are_as_accurate_as_f32", three_products),
    ("tf32_kernels_run_every_kind_of_step_and_share_sums", steps),
    ("tf32_keeps_special_values_in_their_place", special_values),
    ("tf32_results_need_not_depend_on_the_batch", batch_invariance),
    ("tf32_is_a_permission", permission),
];

fn tf32(kernel: Option<String>) -> PrepareOptions {
    PrepareOptions { math: Math::Tf32, kernel, ..PrepareOptions::default() }
}

/// The kernels on tensor cores; none on a chip without TF32.
fn kernels(device: &CudaDevice) -> Vec<&'static str> {
    let layer = Pointwise::new(Array2::ones((1, 1)));
    let layer = layer.prepare_with(&device.clone().into(), tf32(None)).unwrap();
    let plans = layer.plans(&[1, 1]).unwrap().into_iter();
    let usable = plans.filter(|plan| plan.verdict.is_ok()).map(|plan| plan.kernel);
    usable.filter(|kernel| kernel.starts_with("fprop_tf32_")).collect()
}

/// Those that compute in f32, in parts; they run only by name.
pub fn in_parts(device: &CudaDevice) -> Vec<&'static str> {
    if device.compute_capability() < (8, 0) {
        return Vec::new();
    }
    let layer = Pointwise::new(Array2::ones((1, 1))).prepare(&device.clone().into()).unwrap();
    let plans = layer.plans(&[1, 1]).unwrap().into_iter().map(|plan| plan.kernel);
    plans.filter(|kernel| kernel.starts_with("fprop_f32_sm80_")).collect()
}

/// All of them, and what they need.
pub fn all(device: &CudaDevice) -> Vec<(&'static str, Math)> {
    let rounded = kernels(device).into_iter().map(|kernel| (kernel, Math::Tf32));
    rounded.chain(in_parts(device).into_iter().map(|kernel| (kernel, Math::F32))).collect()
}

fn force(kernel: &str, math: Math) -> PrepareOptions {
    PrepareOptions { math, kernel: Some(kernel.into()), ..PrepareOptions::default() }
}

/// Around the tiles' edges, aligned and not.
pub fn cases() -> [Case; 11] {
    [
        Case::new(1, 1, 1, [1, 1, 1]),
        Case::new(2, 7, 31, [1, 1, 33]),
        Case::new(1, 16, 32, [1, 4, 8]),
        Case::new(1, 17, 33, [1, 1, 31]),
        Case::new(2, 48, 64, [1, 8, 8]),
        Case::new(3, 15, 65, [1, 5, 13]),
        Case::new(1, 81, 129, [1, 3, 43]),
        Case::new(2, 100, 260, [2, 4, 20]),
        Case { groups: 3, ..Case::new(2, 3 * 17, 3 * 35, [1, 5, 7]) },
        Case { groups: 2, ..Case::new(1, 2 * 64, 2 * 32, [1, 8, 12]) },
        Case { stride: 2, ..Case::new(2, 40, 36, [1, 9, 16]) },
    ]
}

fn integers(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(41);
    for (i, case) in cases().iter().enumerate() {
        let weight = random.integers(case.c_out * case.c_in / case.groups);
        let bias = random.integers(case.c_out);
        let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
        let expected = chain(case, &weight, &bias, &src);
        let layer = case.layer(weight).bias(bias);
        for (j, (kernel, math)) in all(device).into_iter().enumerate() {
            let prepared = layer.prepare_with(&device.clone().into(), force(kernel, math))?;
            in_layouts(device, &prepared, (case, &src, &expected), (i, j), kernel)?;
        }
    }
    Ok(())
}

/// Makes of a TF32 a number of which it is the nearest, and which is cut to another one.
pub const ALMOST_TF32: f32 = 1.0 - 1.0 / 8192.0;

/// The nearest value with 10 bits of mantissa, ties away from zero.
pub fn nearest(x: f32) -> f32 {
    let unit = 2f32.powi(x.abs().log2().floor() as i32 - 10);
    (x / unit).round() * unit
}

fn rounding(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(42);
    for (n, c_in, c_out, positions) in [(2, 200, 70, 52), (1, 511, 33, 97), (3, 64, 130, 64)] {
        let weight = Array2::from_shape_vec((c_out, c_in), random.normal(c_out * c_in)).unwrap();
        let src = Array3::from_shape_vec((n, c_in, positions), random.normal(n * c_in * positions));
        let src = src.unwrap();
        // What is left are the errors of sums in f32, far below those of operands cut off instead.
        let rounded = src.mapv(nearest);
        let inputs =
            reference::Inputs { sources: vec![rounded.view().into_dyn()], ..Default::default() };
        let expected = reference::forward(&Pointwise::new(weight.mapv(nearest)), &inputs)?;
        let largest = |values: &mut dyn Iterator<Item = &f32>| {
            values.fold(0.0f64, |most, x| most.max(f64::from(x.abs())))
        };
        let epsilon = f64::from(f32::EPSILON);
        let bound = largest(&mut weight.iter()) * largest(&mut src.iter()) * c_in as f64 * epsilon
            + epsilon * expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        for kernel in kernels(device) {
            let layer = Pointwise::new(weight.clone());
            let layer = layer.prepare_with(&device.clone().into(), tf32(Some(kernel.into())))?;
            let got = layer.forward(&src)?;
            for ((_, &got), &expected) in got.indexed_iter().zip(&expected) {
                if !((f64::from(got) - expected).abs() <= bound) {
                    return Err(format!("{kernel}: {got}, expected {expected}").into());
                }
            }
        }
    }
    Ok(())
}

fn three_products(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(45);
    for (n, c_in, c_out, positions) in [(2, 200, 70, 52), (1, 1023, 33, 97), (3, 64, 130, 64)] {
        let weight = random.normal(c_out * c_in);
        let case = Case::new(n, c_in, c_out, [1, 1, positions]);
        let src = random.tensor(case.src_shape());
        let layer = case.layer(weight.clone());
        let inputs =
            reference::Inputs { sources: vec![src.view().into_dyn()], ..Default::default() };
        let expected = reference::forward(&layer, &inputs)?;
        let worst = |got: &Array5<f32>| {
            let errors = got.iter().zip(&expected).map(|(&x, y)| (f64::from(x) - y).abs());
            errors.fold(0.0, |most: f64, error| if error <= most { most } else { error })
        };
        let naive = worst(&chain(&case, &weight, &vec![0.0; c_out], &src));
        for kernel in in_parts(device) {
            for layout in [Layout::First, Layout::Last] {
                let prepared =
                    layer.prepare_with(&device.clone().into(), force(kernel, Math::F32))?;
                let src = Placed::filled(device, src.view(), layout);
                let mut dst = Placed::blank(device, case.dst_shape(), layout);
                prepared.forward_into(&src.view(), &mut dst.view_mut())?;
                let error = worst(&dst.read());
                if !(error <= 2.0 * naive) {
                    return Err(format!("{kernel}: error {error:e}, a chain's {naive:e}").into());
                }
            }
        }
    }
    // What has no finite part is computed anew, in every split.
    for kernel in in_parts(device) {
        for splits in ["", "/2"] {
            let layer = Pointwise::new(Array2::from_elem((3, 40), 0.5f32));
            let options = force(&format!("{kernel}{splits}"), Math::F32);
            let layer = layer.prepare_with(&device.clone().into(), options)?;
            let mut src = Array3::<f32>::ones((2, 40, 50));
            src[[0, 7, 20]] = f32::MAX;
            src[[1, 39, 49]] = f32::NEG_INFINITY;
            for ((n, _, p), &value) in layer.forward(&src)?.indexed_iter() {
                let right = match (n, p) {
                    (0, 20) => f32::MAX * 0.5,
                    (1, 49) => f32::NEG_INFINITY,
                    _ => 20.0,
                };
                assert!(value == right, "{kernel}{splits}: {n}, {p}: {value}");
            }
        }
    }
    Ok(())
}

fn steps(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(43);
    let case = Case::new(2, 70, 40, [1, 4, 9]);
    let slope = random.integers(case.c_out);
    let bare = case.layer(random.integers(case.c_out * case.c_in)).bias(random.integers(40));
    let lists = [
        bare.clone().residual().relu(),
        bare.clone().clip(-30.0, 60.0),
        bare.residual().prelu(slope).clip(-40.0, 50.0),
    ];
    let src = Array5::from_shape_fn(case.src_shape(), |_| random.integer());
    let residual = Array5::from_shape_fn(case.dst_shape(), |_| random.integer());
    for (i, layer) in lists.iter().enumerate() {
        let on_cpu = layer.prepare(&Device::cpu())?;
        let call = on_cpu.call(&src);
        let expected = if i == 1 { call.run()? } else { call.residual(&residual).run()? };
        for (kernel, math) in all(device) {
            for splits in ["", "/3"] {
                let options = force(&format!("{kernel}{splits}"), math);
                let prepared = layer.prepare_with(&device.clone().into(), options)?;
                for layout in [Layout::First, Layout::Last, Layout::PartOfLast] {
                    let src = Placed::filled(device, src.view(), layout);
                    let residual = Placed::filled(device, residual.view(), layout);
                    let mut dst = Placed::blank(device, case.dst_shape(), layout);
                    let (src, residual) = (src.view(), residual.view());
                    let call = prepared.call(&src);
                    let call = if i == 1 { call } else { call.residual(&residual) };
                    call.run_into(&mut dst.view_mut())?;
                    let what = format!("list {i}, {kernel}{splits}, {layout:?}");
                    same_bits(&dst.read(), &expected, &what)?;
                }
            }
        }
    }
    Ok(())
}

fn special_values(device: &CudaDevice) -> Outcome {
    for (kernel, math) in all(device) {
        let layer = Pointwise::new(Array2::ones((5, 3))).relu();
        let layer = layer.prepare_with(&device.clone().into(), force(kernel, math))?;
        let mut src = Array3::<f32>::ones((1, 3, 70));
        src[[0, 1, 33]] = f32::from_bits(0x7FFF_FFFF);
        src[[0, 0, 34]] = f32::from_bits(0x7F80_0001);
        src[[0, 2, 69]] = f32::INFINITY;
        for ((_, c, p), &value) in layer.forward(&src)?.indexed_iter() {
            let fits = match p {
                33 | 34 => value.is_nan(),
                69 => value == f32::INFINITY,
                _ => value == 3.0,
            };
            assert!(fits, "{kernel}: channel {c}, position {p}: {value}");
        }
        // A weight that is no number stays one, and in its channel.
        let mut weight = Array2::<f32>::ones((5, 3));
        weight[[4, 1]] = f32::from_bits(0x7F80_0001);
        let layer = Pointwise::new(weight);
        let layer = layer.prepare_with(&device.clone().into(), force(kernel, math))?;
        for ((_, c, _), &value) in layer.forward(&Array3::<f32>::ones((1, 3, 9)))?.indexed_iter() {
            assert!(if c == 4 { value.is_nan() } else { value == 3.0 }, "{kernel}: {c}: {value}");
        }
    }
    Ok(())
}

fn batch_invariance(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(44);
    let weight = Array2::from_shape_vec((40, 600), random.normal(40 * 600)).unwrap();
    let options = PrepareOptions { batch_invariant: true, ..tf32(None) };
    let prepared = Pointwise::new(weight).prepare_with(&device.clone().into(), options)?;
    let src = Array3::from_shape_vec((40, 600, 49), random.normal(40 * 600 * 49)).unwrap();
    let together = prepared.forward(&src)?;
    for sample in [0, 17, 39] {
        let alone = prepared.forward(&src.slice(s![sample..sample + 1, .., ..]))?;
        let same = together.slice(s![sample..sample + 1, .., ..]);
        assert!(alone.iter().zip(same).all(|(a, b)| a.to_bits() == b.to_bits()), "{sample}");
    }
    Ok(())
}

fn permission(device: &CudaDevice) -> Outcome {
    let gpu = Device::from(device.clone());
    let layer = Pointwise::new(Array2::<f32>::ones((512, 512)));
    let shape = [32, 512, 28, 28];
    let may = layer.prepare_with(&gpu, tf32(None))?.explain(&shape)?;
    let exact = layer.prepare(&gpu)?;
    assert!(exact.explain(&shape)?.kernel.starts_with("fprop_f32_simt_"));
    let plans = exact.plans(&shape)?;
    let refused = plans.iter().filter(|plan| plan.kernel.starts_with("fprop_tf32_"));
    assert!(refused.clone().count() > 0 && refused.clone().all(|plan| plan.verdict.is_err()));
    for kernel in in_parts(device) {
        let error = layer.prepare_with(&gpu, tf32(Some(kernel.into()))).unwrap_err().to_string();
        assert!(error.contains("gain nothing"), "{error}");
        let verdict = plans.iter().find(|plan| plan.kernel == kernel).map(|plan| &plan.verdict);
        assert!(
            matches!(verdict, Some(Err(why)) if why.contains("name asks for it")),
            "{verdict:?}"
        );
    }
    for plan in refused {
        let options = PrepareOptions { kernel: Some(plan.kernel.into()), ..Default::default() };
        let error = layer.prepare_with(&gpu, options).unwrap_err();
        let fits = matches!(&error, Error::Kernel { reason, .. } if reason.contains("TF32"));
        assert!(fits, "{error}");
        if device.compute_capability() < (8, 0) {
            let error = layer.prepare_with(&gpu, tf32(Some(plan.kernel.into()))).unwrap_err();
            assert!(error.to_string().contains("no TF32 on compute capability"), "{error}");
        }
    }
    if device.compute_capability() < (8, 0) {
        assert!(may.kernel.starts_with("fprop_f32_simt_"), "{may}");
        assert!(may.reason.contains("no TF32 on compute capability 7.5"), "{may}");
    } else {
        assert!(may.kernel.starts_with("fprop_tf32_sm80_"), "{may}");
    }
    Ok(())
}
