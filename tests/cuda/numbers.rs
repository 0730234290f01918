//! Accuracy, special values, and the numbers that tests are made of.

use ndarray::{Array2, Array3, Array5};
use pointwise::{Activation, CudaDevice, CudaTensor, Pointwise, PrepareOptions, reference};

use super::cases::kernels;
use super::training::ACTIVATIONS;
use super::{OnDevice, Outcome};

pub const TRIALS: &[OnDevice] = &[
    ("activations_follow_the_formula_everywhere", activations),
    ("special_values_stay_where_they_are", special_values),
    ("random_layers_are_within_the_bound", random_layers),
    ("results_do_not_depend_on_the_batch", batch_invariance),
];

/// SplitMix64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Any 32 bits.
    pub fn word(&mut self) -> u32 {
        (self.next() >> 32) as u32
    }

    /// In `[0, 1)`.
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// From -4 to 4: sums of hundreds of products are exact in f32.
    pub fn integer(&mut self) -> f32 {
        (self.next() % 9) as f32 - 4.0
    }

    pub fn integers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.integer()).collect()
    }

    /// About normally distributed.
    pub fn normal(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (0..4).map(|_| self.uniform() - 0.5).sum::<f32>() * 1.7).collect()
    }

    pub fn tensor(&mut self, shape: [usize; 5]) -> Array5<f32> {
        Array5::from_shape_vec(shape, self.normal(shape.iter().product())).unwrap()
    }
}

/// `activation(x)` for each value, on the device and in f64.
fn applied(
    device: &CudaDevice,
    activation: Activation,
    values: &[f32],
) -> Result<Vec<(f32, f32, f64)>, pointwise::Error> {
    let layer = Pointwise::new(Array2::ones((1, 1))).activation(activation);
    let src = Array3::from_shape_vec((1, 1, values.len()), values.to_vec()).unwrap();
    let inputs = reference::Inputs { sources: vec![src.view().into_dyn()], ..Default::default() };
    let expected = reference::forward(&layer, &inputs)?;
    let src = CudaTensor::from_host(device, src.view())?;
    let got = layer.prepare(&device.clone().into())?.forward(&src)?.to_host()?;
    let both = got.iter().zip(&expected);
    Ok(values.iter().zip(both).map(|(&x, (&got, &expected))| (x, got, expected)).collect())
}

fn activations(device: &CudaDevice) -> Outcome {
    let mut values: Vec<f32> = (-600..=600).map(|i| i as f32 / 64.0).collect();
    for exponent in -38..=38 {
        let x = 10f32.powi(exponent);
        values.extend([x, -x, 3.3 * x, -3.3 * x]);
    }
    values.extend([
        20.0f32.next_down(),
        20.0,
        20.0f32.next_up(),
        -87.0,
        88.0,
        -88.7,
        -100.0,
        -103.0,
    ]);
    for activation in ACTIVATIONS {
        for (x, got, expected) in applied(device, activation, &values)? {
            // Relative to the value, in units of its last place; one such unit of the argument is
            // forgiven where the function is steep (the tails of the exponentials).
            let unit = f64::from(f32::EPSILON) * expected.abs() * (1.0 + f64::from(x).abs() / 4.0);
            // The specification's own sums cancel in the far tails.
            let unit = unit + f64::EPSILON * f64::from(x).abs() + f64::from(f32::MIN_POSITIVE);
            let error = (f64::from(got) - expected).abs();
            if !(error <= 8.0 * unit) {
                return Err(format!("{activation:?}({x}) = {got}, expected {expected}").into());
            }
        }
    }
    Ok(())
}

fn special_values(device: &CudaDevice) -> Outcome {
    for activation in ACTIVATIONS {
        let values = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0];
        for (x, got, expected) in applied(device, activation, &values)? {
            let same = if expected.is_nan() {
                got.is_nan()
            } else {
                (f64::from(got) - expected).abs() <= 1e-7 || f64::from(got) == expected
            };
            if !same {
                return Err(format!("{activation:?}({x}) = {got}, expected {expected}").into());
            }
        }
    }
    // A NaN stays in its position, and padding never meets an infinity.
    for kernel in kernels(device) {
        let options =
            pointwise::PrepareOptions { kernel: Some(kernel.into()), ..Default::default() };
        let layer = Pointwise::new(Array2::ones((5, 3))).relu();
        let layer = layer.prepare_with(&device.clone().into(), options)?;
        let mut src = Array3::<f32>::ones((1, 3, 70));
        src[[0, 1, 33]] = f32::NAN;
        src[[0, 2, 69]] = f32::INFINITY;
        let dst = layer.forward(&src)?;
        for ((_, c, p), &value) in dst.indexed_iter() {
            let fits = match p {
                33 => value.is_nan(),
                69 => value == f32::INFINITY,
                _ => value == 3.0,
            };
            assert!(fits, "{kernel}: channel {c}, position {p}: {value}");
        }
    }
    Ok(())
}

fn random_layers(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(11);
    for (n, c_in, c_out, positions) in [(2, 200, 70, 50), (1, 511, 33, 97), (3, 64, 130, 64)] {
        let weight = Array2::from_shape_vec((c_out, c_in), random.normal(c_out * c_in)).unwrap();
        let bias = random.normal(c_out);
        let layer = Pointwise::new(weight.clone()).bias(bias);
        let src = Array3::from_shape_vec((n, c_in, positions), random.normal(n * c_in * positions));
        let src = src.unwrap();
        let inputs =
            reference::Inputs { sources: vec![src.view().into_dyn()], ..Default::default() };
        let expected = reference::forward(&layer, &inputs)?;
        let got = layer.prepare(&device.clone().into())?.forward(&src)?;
        let largest =
            |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |a, b| a.max(b.abs()));
        let products = largest(&mut weight.iter().copied()) * largest(&mut src.iter().copied());
        let epsilon = f64::from(f32::EPSILON);
        let bound = f64::from(products) * c_in as f64 * epsilon
            + epsilon * expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        for ((_, &got), &expected) in got.indexed_iter().zip(&expected) {
            if !((f64::from(got) - expected).abs() <= bound) {
                return Err(format!("[{c_out}, {c_in}]: {got}, expected {expected}").into());
            }
        }
    }
    Ok(())
}

fn batch_invariance(device: &CudaDevice) -> Outcome {
    let mut random = Random::new(12);
    let weight = Array2::from_shape_vec((40, 30), random.normal(1200)).unwrap();
    let options = PrepareOptions { batch_invariant: true, ..PrepareOptions::default() };
    let layer = Pointwise::new(weight).silu().prepare_with(&device.clone().into(), options)?;
    let src = Array3::from_shape_vec((6, 30, 49), random.normal(6 * 30 * 49)).unwrap();
    let together = layer.forward(&src)?;
    for sample in 0..6 {
        let alone = layer.forward(&src.slice(ndarray::s![sample..sample + 1, .., ..]))?;
        let same = together.slice(ndarray::s![sample..sample + 1, .., ..]);
        assert!(alone.iter().zip(same).all(|(a, b)| a.to_bits() == b.to_bits()), "{sample}");
    }
    Ok(())
}
