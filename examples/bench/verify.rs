//! Whether a result is right.

use ndarray::{ArrayViewD, Axis};
use pointwise::{Activation, DType, Element, Pointwise, Stage};

/// How much a result may differ from the reference: the design's bound
/// `max|weight| · max|src| · K · eps_acc + eps_out · max|result|`, of sums of K products in f32.
pub fn tolerance(
    layer: &Pointwise,
    src: ArrayViewD<'_, f32>,
    expected: ArrayViewD<'_, f64>,
    dtype: DType,
) -> f64 {
    let eps = f64::from(f32::EPSILON);
    // Functions that are not made of comparisons are within 4 ulp.
    let smooth = |stage: &Stage| {
        let exact = [Activation::Relu, Activation::Relu6].map(Stage::Activation);
        matches!(stage, Stage::Activation(_)) && !exact.contains(stage)
    };
    let eps_out = match dtype {
        DType::F16 => 2f64.powi(-10),
        DType::Bf16 => 2f64.powi(-7),
        _ if layer.stages().iter().any(smooth) => 4.0 * eps,
        _ => eps,
    };
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |m, x| x.abs().max(m));
    let weight = largest(&mut layer.weight().iter().copied().map(f64::from));
    let src = largest(&mut src.iter().copied().map(f64::from));
    let products = layer.weight().ncols() as f64;
    weight * src * products * eps + eps_out * largest(&mut expected.iter().copied())
}

/// How far the values of a result are from the reference's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Errors {
    /// The largest, as a multiple of the tolerance; infinite where a value is not a number.
    pub max: f64,
    /// All of them together: multiples of the tolerance, or steps of integers.
    pub sum: f64,
    /// Values that are not equal to the reference's.
    pub unequal: usize,
    pub values: usize,
}

impl Errors {
    fn add(&mut self, error: f64) {
        // A maximum would pass over NaN.
        self.max = if error.is_nan() { f64::INFINITY } else { error.max(self.max) };
        self.sum += error;
        self.unequal += usize::from(error != 0.0);
        self.values += 1;
    }

    /// Of several results.
    pub fn of_all(all: impl Iterator<Item = Errors>) -> Errors {
        all.fold(Errors::default(), |a, b| Errors {
            max: a.max.max(b.max),
            sum: a.sum + b.sum,
            unequal: a.unequal + b.unequal,
            values: a.values + b.values,
        })
    }
}

/// The errors as multiples of the tolerance of what is expected.
///
/// `expected` holds the first samples, of which the others are repetitions in the same order.
pub fn errors<T: Element>(
    expected: ArrayViewD<'_, f64>,
    result: ArrayViewD<'_, T>,
    tolerance: impl Fn(f64) -> f64,
) -> Errors {
    let distinct = expected.len_of(Axis(0));
    let mut errors = Errors::default();
    for (i, sample) in result.axis_iter(Axis(0)).enumerate() {
        for (want, got) in expected.index_axis(Axis(0), i % distinct).iter().zip(sample) {
            let error = (want - f64::from(got.to_f32())).abs();
            // Equal values are right even where nothing is tolerated.
            errors.add(if error == 0.0 { 0.0 } else { error / tolerance(*want) });
        }
    }
    errors
}

/// The same of integers, of which none may be off by more than a step, and one of 1000 (or a single
/// one) by a step.
pub fn errors_of_integers(expected: ArrayViewD<'_, f64>, result: ArrayViewD<'_, u8>) -> Errors {
    let distinct = expected.len_of(Axis(0));
    let mut errors = Errors::default();
    for (i, sample) in result.axis_iter(Axis(0)).enumerate() {
        for (want, &got) in expected.index_axis(Axis(0), i % distinct).iter().zip(sample) {
            errors.add((want - f64::from(got)).abs());
        }
    }
    let most = (result.len() / 1000).max(1);
    errors.max = errors.max.max(errors.unequal as f64 / most as f64);
    errors
}
