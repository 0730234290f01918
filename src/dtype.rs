//! What tensors hold: f32, f16 or bf16.

use std::fmt;
use std::str::FromStr;

pub use half::{bf16, f16};

use crate::compiled::Compiled;
use crate::compose::Between;
use crate::cpu::Stored;
#[cfg(feature = "cuda")]
use crate::cuda::DeviceElement as Held;
use crate::error::{Error, Result};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 single precision.
    #[default]
    F32,
    /// IEEE 754 half precision: 11 bits of significand, at most 65504.
    F16,
    /// The upper half of an f32: 8 bits of significand, the range of f32.
    Bf16,
}

impl DType {
    /// Every dtype, in no promised order.
    pub const ALL: &'static [DType] = &[DType::F32, DType::F16, DType::Bf16];

    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// The name, as in the names of kernels.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }

    /// The value of this type that is nearest to `x`, ties to even.
    pub(crate) fn round(self, x: f32) -> f32 {
        match self {
            DType::F32 => x,
            DType::F16 => f16::from_f32(x).to_f32(),
            DType::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }
}

/// `f32`, `f16`, `bf16`.
impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    /// # Errors
    /// [`Error::ParameterValue`] for a name that is none of `f32`, `f16`, `bf16`.
    fn from_str(name: &str) -> Result<Self> {
        DType::ALL.iter().copied().find(|dtype| dtype.name() == name).ok_or_else(|| {
            Error::ParameterValue {
                parameter: "dtype".into(),
                value: name.into(),
                expected: "f32, f16 or bf16",
            }
        })
    }
}

/// A type that tensors hold: `f32`, [`struct@f16`] or [`bf16`].
///
/// Sums and all that follows them are f32 whatever the type; a result is rounded once, to the
/// nearest, ties to even.
#[expect(private_bounds, reason = "sealed: a backend has to know the type")]
pub trait Element:
    Compiled + Between + Stored + Held + Copy + Default + fmt::Debug + Send + Sync + 'static
{
    /// The type as a value.
    const DTYPE: DType;

    /// The nearest value, ties to even.
    fn from_f32(x: f32) -> Self;

    /// The same value.
    fn to_f32(self) -> f32;
}

/// What tensors on a device may hold, where there are devices.
#[cfg(not(feature = "cuda"))]
trait Held {}

#[cfg(not(feature = "cuda"))]
impl<T> Held for T {}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32_const(x)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self.to_f32_const()
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for &dtype in DType::ALL {
            assert_eq!(dtype.to_string().parse::<DType>().unwrap(), dtype);
        }
        let error = "fp8".parse::<DType>().unwrap_err().to_string();
        assert_eq!(error, "dtype is fp8, expected f32, f16 or bf16");
    }
}
