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

/// The largest error as a multiple of the tolerance; infinite where a value is not a number.
///
/// `expected` holds the first samples, of which the others are repetitions in the same order.
pub fn error<T: Element>(
    expected: ArrayViewD<'_, f64>,
    result: ArrayViewD<'_, T>,
    tolerance: f64,
) -> f64 {
    let distinct = expected.len_of(Axis(0));
    let mut largest = 0.0f64;
    for (i, sample) in result.axis_iter(Axis(0)).enumerate() {
        for (want, got) in expected.index_axis(Axis(0), i % distinct).iter().zip(sample) {
            let error = (want - f64::from(got.to_f32())).abs();
            // Equal values are right even where nothing is tolerated.
            let error = if error == 0.0 { 0.0 } else { error / tolerance };
            // A maximum would pass over NaN.
            largest = if error.is_nan() { f64::INFINITY } else { error.max(largest) };
        }
    }
    largest
}

/// The same of integers, of which none may be off by more than a step, and one of 1000 (or a single
/// one) by a step.
pub fn error_of_integers(expected: ArrayViewD<'_, f64>, result: ArrayViewD<'_, u8>) -> f64 {
    let distinct = expected.len_of(Axis(0));
    let (mut largest, mut unequal) = (0.0f64, 0usize);
    for (i, sample) in result.axis_iter(Axis(0)).enumerate() {
        for (want, &got) in expected.index_axis(Axis(0), i % distinct).iter().zip(sample) {
            let error = (want - f64::from(got)).abs();
            unequal += usize::from(error != 0.0);
            largest = if error.is_nan() { f64::INFINITY } else { error.max(largest) };
        }
    }
    largest.max(unequal as f64 / (result.len() / 1000).max(1) as f64)
}
