//! Initial weights: Xavier and Kaiming, uniform and normal, by PyTorch's formulas.
//!
//! For a weight `[c_out, c_in / groups]`, `fan_in = c_in / groups` and `fan_out = c_out`, as
//! [`torch.nn.init`](https://pytorch.org/docs/stable/nn.init.html) computes them from its shape.
//! A seed always gives the same weights; they are not the values that PyTorch draws.
//!
//! ```
//! use pointwise::init::{Fan, Init, Nonlinearity};
//! let init = Init::KaimingNormal { fan: Fan::Out, nonlinearity: Nonlinearity::Relu };
//! let weight = init.weight(256, 64, 42)?;
//! assert_eq!(weight.dim(), (256, 64));
//! assert!((init.std(256, 64) - (2.0f64 / 256.0).sqrt()).abs() < 1e-12);
//! # Ok::<(), pointwise::Error>(())
//! ```

use ndarray::{Array1, Array2};

use crate::error::{Error, Result};
use crate::tensor::checked_product;

/// Which side of the weight keeps its variance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fan {
    /// The forward pass: `c_in / groups`.
    #[default]
    In,
    /// The backward pass: `c_out`.
    Out,
}

/// What follows the layer, for the gain that it calls for.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Nonlinearity {
    /// Gain 1.
    Linear,
    /// Gain 1.
    Sigmoid,
    /// Gain 5/3.
    Tanh,
    /// Gain √2.
    Relu,
    /// Gain √(2 / (1 + alpha²)).
    LeakyRelu {
        /// Slope of the negative side; PyTorch's default is 0.01, and √5 for the weights of its
        /// convolutions.
        alpha: f64,
    },
    /// Gain 3/4.
    Selu,
}

impl Nonlinearity {
    /// `torch.nn.init.calculate_gain`.
    pub fn gain(self) -> f64 {
        match self {
            Nonlinearity::Linear | Nonlinearity::Sigmoid => 1.0,
            Nonlinearity::Tanh => 5.0 / 3.0,
            Nonlinearity::Relu => 2.0f64.sqrt(),
            Nonlinearity::LeakyRelu { alpha } => (2.0 / (1.0 + alpha * alpha)).sqrt(),
            Nonlinearity::Selu => 0.75,
        }
    }
}

/// A distribution of initial weights.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Init {
    /// Uniform with `std = gain · √(2 / (fan_in + fan_out))` (Glorot and Bengio 2010).
    XavierUniform {
        /// Factor of the standard deviation.
        gain: f64,
    },
    /// Normal with `std = gain · √(2 / (fan_in + fan_out))`.
    XavierNormal {
        /// Factor of the standard deviation.
        gain: f64,
    },
    /// Uniform with `std = gain / √fan` (He et al. 2015).
    KaimingUniform {
        /// Which fan.
        fan: Fan,
        /// What gives the gain.
        nonlinearity: Nonlinearity,
    },
    /// Normal with `std = gain / √fan`.
    KaimingNormal {
        /// Which fan.
        fan: Fan,
        /// What gives the gain.
        nonlinearity: Nonlinearity,
    },
}

impl Init {
    /// What PyTorch gives `nn.Conv2d` and `nn.Linear` unless told otherwise: uniform with bound
    /// `1 / √fan_in`.
    pub fn pytorch_default() -> Self {
        Init::KaimingUniform {
            fan: Fan::In,
            nonlinearity: Nonlinearity::LeakyRelu { alpha: 5.0f64.sqrt() },
        }
    }

    /// The standard deviation for a weight `[c_out, c_in_per_group]`.
    pub fn std(&self, c_out: usize, c_in_per_group: usize) -> f64 {
        let (fan_in, fan_out) = (c_in_per_group as f64, c_out as f64);
        match *self {
            Init::XavierUniform { gain } | Init::XavierNormal { gain } => {
                gain * (2.0 / (fan_in + fan_out)).sqrt()
            }
            Init::KaimingUniform { fan, nonlinearity }
            | Init::KaimingNormal { fan, nonlinearity } => {
                let fan = match fan {
                    Fan::In => fan_in,
                    Fan::Out => fan_out,
                };
                nonlinearity.gain() / fan.sqrt()
            }
        }
    }

    /// The bound of a uniform distribution, `√3 · std`; `None` for a normal one.
    pub fn bound(&self, c_out: usize, c_in_per_group: usize) -> Option<f64> {
        match self {
            Init::XavierUniform { .. } | Init::KaimingUniform { .. } => {
                Some(3.0f64.sqrt() * self.std(c_out, c_in_per_group))
            }
            Init::XavierNormal { .. } | Init::KaimingNormal { .. } => None,
        }
    }

    /// A weight `[c_out, c_in_per_group]`, the same for the same seed.
    ///
    /// # Errors
    /// [`Error::NoChannels`] for a weight without channels, [`Error::TooLarge`] if memory does not
    /// hold it, [`Error::ParameterValue`] for a gain that is not finite.
    pub fn weight(&self, c_out: usize, c_in_per_group: usize, seed: u64) -> Result<Array2<f32>> {
        if c_out == 0 || c_in_per_group == 0 {
            return Err(Error::NoChannels { tensor: "weight", shape: vec![c_out, c_in_per_group] });
        }
        let mut values = room("a weight", &[c_out, c_in_per_group])?;
        let std = self.std(c_out, c_in_per_group);
        if !std.is_finite() {
            return Err(Error::ParameterValue {
                parameter: "the initial standard deviation".into(),
                value: std.to_string(),
                expected: "a finite number",
            });
        }
        let mut random = SplitMix64(seed);
        let draw = || match self.bound(c_out, c_in_per_group) {
            Some(bound) => (bound * (2.0 * random.uniform() - 1.0)) as f32,
            None => (std * random.normal()) as f32,
        };
        values.extend(std::iter::repeat_with(draw).take(c_out * c_in_per_group));
        Ok(Array2::from_shape_vec((c_out, c_in_per_group), values).expect("as many as drawn"))
    }
}

/// PyTorch's initial bias of `nn.Conv2d` and `nn.Linear`: `[c_out]`, uniform with bound
/// `1 / √fan_in`.
///
/// # Errors
/// [`Error::NoChannels`] if there are no channels, [`Error::TooLarge`] if memory does not hold it.
pub fn bias(c_out: usize, c_in_per_group: usize, seed: u64) -> Result<Array1<f32>> {
    if c_out == 0 || c_in_per_group == 0 {
        return Err(Error::NoChannels { tensor: "bias", shape: vec![c_out, c_in_per_group] });
    }
    let mut values = room("a bias", &[c_out])?;
    let bound = 1.0 / (c_in_per_group as f64).sqrt();
    // Another stream than the weight's, which a layer often draws with the same seed.
    let mut random = SplitMix64(SplitMix64(seed).next());
    let draw = || (bound * (2.0 * random.uniform() - 1.0)) as f32;
    values.extend(std::iter::repeat_with(draw).take(c_out));
    Ok(values.into())
}

/// An empty vector that holds a tensor of this shape.
fn room(what: &'static str, shape: &[usize]) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    values
        .try_reserve_exact(checked_product(what, shape)?)
        .map_err(|_| Error::TooLarge { what, sizes: shape.to_vec() })?;
    Ok(values)
}

/// The generator of Steele, Lea and Flood (2014): small, and fixed for ever, which the seeds of a
/// library need more than quality beyond this.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller 1958).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use approx::{assert_abs_diff_eq, assert_relative_eq};

    use super::*;

    #[test]
    fn draws_have_the_stated_spread() {
        let kaiming = |fan| Init::KaimingNormal { fan, nonlinearity: Nonlinearity::Relu };
        for init in [
            Init::XavierUniform { gain: 2.0 },
            Init::XavierNormal { gain: 0.5 },
            Init::pytorch_default(),
            kaiming(Fan::In),
            kaiming(Fan::Out),
        ] {
            let weight = init.weight(300, 200, 7).unwrap();
            let std = init.std(300, 200);
            let values: Vec<f64> = weight.iter().map(|&w| f64::from(w)).collect();
            let mean = values.iter().sum::<f64>() / 60_000.0;
            let var = values.iter().map(|w| (w - mean).powi(2)).sum::<f64>() / 60_000.0;
            assert_abs_diff_eq!(mean, 0.0, epsilon = 0.02 * std);
            assert_relative_eq!(var.sqrt(), std, max_relative = 0.02);
            if let Some(bound) = init.bound(300, 200) {
                let largest = values.iter().fold(0.0f64, |m, w| m.max(w.abs()));
                assert_relative_eq!(largest, bound, max_relative = 1e-3);
                assert!(largest <= bound * (1.0 + f64::from(f32::EPSILON)), "{init:?}: {largest}");
            }
            assert_eq!(weight, init.weight(300, 200, 7).unwrap());
            assert_ne!(weight, init.weight(300, 200, 8).unwrap());
        }
        assert_relative_eq!(Init::pytorch_default().bound(9, 16).unwrap(), 0.25);
        assert!(matches!(Init::pytorch_default().weight(0, 3, 1), Err(Error::NoChannels { .. })));
    }
}
