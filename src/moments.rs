//! Mean and variance of values that come in parts.

/// Mean and sum of squared deviations of some values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Moments {
    pub count: f64,
    pub mean: f64,
    pub deviations: f64,
}

impl Moments {
    /// Of both sets of values together (Chan, Golub and LeVeque 1979).
    pub(crate) fn merge(self, other: Moments) -> Self {
        let count = self.count + other.count;
        if count == 0.0 {
            return self;
        }
        let delta = other.mean - self.mean;
        Moments {
            count,
            mean: self.mean + delta * (other.count / count),
            deviations: self.deviations
                + other.deviations
                + delta * delta * (self.count * other.count / count),
        }
    }

    /// `1 / sqrt(biased variance + eps)`.
    pub(crate) fn scale(&self, eps: f32) -> f32 {
        (1.0 / (self.deviations / self.count + f64::from(eps)).sqrt()) as f32
    }
}
