//! Layer norm: a block of positions that stays in cache, `[positions][channels]` in row order.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::epilogue::Operand;
use crate::cpu::isa::Supported;
use crate::cpu::runs;
use crate::dtype::Element;
use crate::epilogue::{Norm, Step};
use crate::moments::Moments;

impl Moments {
    /// Of the values at hand, in two passes.
    pub(crate) fn of(isa: Supported, values: &[f32]) -> Self {
        let count = values.len() as f64;
        // Deviations are taken from about the mean; their own mean is what that is off.
        let about = (runs::sum(isa, values) / count) as f32;
        let [sum, squares] = runs::sum_deviations(isa, about, values);
        let off = sum / count;
        let deviations = squares - count * off * off;
        Moments { count, mean: f64::from(about) + off, deviations: keep_nan_max_zero(deviations) }
    }
}

fn keep_nan_max_zero(x: f64) -> f64 {
    if x < 0.0 { 0.0 } else { x }
}

/// A place for the moments of one unit, written by whichever thread runs it.
#[derive(Debug, Default)]
pub(crate) struct Slot([AtomicU64; 3]);

impl Slot {
    pub(crate) fn set(&self, moments: Moments) {
        for (slot, value) in self.0.iter().zip([moments.count, moments.mean, moments.deviations]) {
            slot.store(value.to_bits(), Ordering::Release);
        }
    }

    pub(crate) fn get(&self) -> Moments {
        let [count, mean, deviations] =
            [0, 1, 2].map(|i| f64::from_bits(self.0[i].load(Ordering::Acquire)));
        Moments { count, mean, deviations }
    }
}

/// What happens to a position once its moments are known.
pub(crate) struct Finish<'a> {
    pub isa: Supported,
    pub norm: &'a Norm,
    pub steps: &'a [Step],
    pub residual: Option<Operand<'a, *const f32>>,
}

impl Finish<'_> {
    /// Normalises one position's channels and runs the steps behind the normalisation; `spare`
    /// has room for a row.
    ///
    /// # Safety
    /// The residual is readable at every channel of `position`, if a step asks for it.
    pub(crate) unsafe fn run(
        &self,
        moments: Moments,
        position: usize,
        row: &mut [f32],
        spare: &mut [f32],
    ) {
        let isa = self.isa;
        // The mean in two parts: rounding it would shift every value where it is large.
        let mean = moments.mean as f32;
        let rest = (moments.mean - f64::from(mean)) as f32;
        let scale = moments.scale(self.norm.eps);
        runs::normalize(isa, mean, 1.0, row);
        runs::apply_affine(isa, scale, -rest * scale, row);
        runs::apply_affine_lanes(isa, &self.norm.gamma, &self.norm.beta, row);
        for step in self.steps {
            match step {
                Step::Affine { scale, shift } => runs::apply_affine_lanes(isa, scale, shift, row),
                Step::Activation(activation) => runs::apply_activation(isa, *activation, row),
                Step::PRelu { slope } => runs::apply_prelu_lanes(isa, slope, row),
                Step::Residual => {
                    let residual =
                        self.residual.expect("a residual step comes with a residual tensor");
                    for (channel, value) in spare.iter_mut().enumerate() {
                        // SAFETY: the caller's promise.
                        *value = unsafe { *residual.ptr.offset(residual.at(channel, position)) };
                    }
                    runs::add_lanes(isa, spare, row);
                }
            }
        }
    }
}

/// Copies a block to dst, rounded to what that holds.
///
/// # Safety
/// `dst` is writable at every channel and position of the block.
pub(crate) unsafe fn store<T: Element>(
    isa: Supported,
    block: &[f32],
    channels: usize,
    dst: &Operand<'_, *mut T>,
) {
    let positions = block.len() / channels;
    // SAFETY: the caller's promise.
    unsafe {
        if dst.channel_stride == 1 && dst.channels.is_none() {
            for (p, row) in block.chunks_exact(channels).enumerate() {
                let to = std::slice::from_raw_parts_mut(dst.ptr.offset(dst.at(0, p)), channels);
                runs::narrow(isa, row, to);
            }
        } else {
            for c in 0..channels {
                for p in 0..positions {
                    *dst.ptr.offset(dst.at(c, p)) = T::from_f32(block[p * channels + c]);
                }
            }
        }
    }
}

/// Copies dst, or a residual, to a block.
///
/// # Safety
/// `from` is readable at every channel and position of the block.
pub(crate) unsafe fn load<T: Element>(
    block: &mut [f32],
    channels: usize,
    from: &Operand<'_, *const T>,
) {
    for c in 0..channels {
        for (p, row) in block.chunks_exact_mut(channels).enumerate() {
            // SAFETY: the caller's promise.
            row[c] = unsafe { *from.ptr.offset(from.at(c, p)) }.to_f32();
        }
    }
}

#[cfg(test)]
mod tests {
    use approx::{assert_abs_diff_eq, assert_relative_eq};

    use super::*;

    #[test]
    fn moments_are_stable_and_merge() {
        for isa in Supported::all() {
            let values: Vec<f32> = (0..5000).map(|i| 1e4 + (i % 7) as f32).collect();
            let whole = Moments::of(isa, &values);
            let mean: f64 = values.iter().map(|&x| f64::from(x)).sum::<f64>() / 5000.0;
            let var: f64 =
                values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 5000.0;
            let parts = values.chunks(777).map(|part| Moments::of(isa, part));
            let merged = parts.fold(Moments::default(), Moments::merge);
            for moments in [whole, merged] {
                assert_abs_diff_eq!(moments.mean, mean, epsilon = 1e-5);
                assert_relative_eq!(moments.deviations / 5000.0, var, max_relative = 1e-5);
            }
        }
    }
}
