//! What the planner knows of a device, as the driver tells it.

use std::sync::Arc;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::driver::failed;
use super::params::PW_NORM_SHARED_BYTES;
use super::plan::Terms;
use crate::cost::Roof;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What the planner knows of a device.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Facts {
    pub name: String,
    pub compute_capability: (u32, u32),
    pub multiprocessors: u32,
    /// Whether the image has the kernels for tensor cores of sm_80 and later for this device, and
    /// those for tensor cores before.
    pub sm80: bool,
    pub sm75: bool,
    pub l2_bytes: u64,
    pub memory_bytes: u64,
    /// Shared memory of a multiprocessor, and what the driver takes of it beside a block's own.
    pub shared_bytes: u32,
    pub shared_per_block: u32,
    /// Ceilings of arithmetic and memory, computed from clocks and widths.
    pub roof: Roof,
}

impl Facts {
    /// Whether tensor cores multiply what a layer on these terms has.
    pub(crate) fn multiplies(&self, terms: &Terms) -> bool {
        match terms.dtype {
            DType::F32 => terms.tf32 && self.sm80,
            DType::F16 => self.sm80 || self.sm75,
            DType::Bf16 => self.sm80,
        }
    }

    /// Bytes that a block of the norm kernel may keep of its positions, two blocks to a multiprocessor.
    pub(crate) fn norm_room(&self) -> u32 {
        (self.shared_bytes / 2).saturating_sub(self.shared_per_block + PW_NORM_SHARED_BYTES)
    }

    /// The ceilings of products of bytes on tensor cores: those of f32 as many times as data sheets say.
    pub(crate) fn int8_roof(&self) -> Roof {
        let times = match self.compute_capability {
            (7, _) => 16.0,
            (8, 0) => 32.0,
            (8, _) | (12, _) => 8.0,
            _ => 32.0,
        };
        Roof { flops_per_second: times * self.roof.flops_per_second, ..self.roof }
    }

    pub(super) fn of(context: &Arc<CudaContext>) -> Result<Facts> {
        let needed = |attribute| {
            let value = context.attribute(attribute).map_err(failed("cuDeviceGetAttribute"))?;
            Ok::<u32, Error>(u32::try_from(value).unwrap_or(0))
        };
        // Of use for estimates only.
        let optional = |attribute| context.attribute(attribute).map_or(0.0, f64::from);
        let compute_capability = (
            needed(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            needed(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = needed(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1);
        let clock = optional(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE) * 1e3;
        let memory_clock = optional(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) * 1e3;
        let bus = optional(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
        Ok(Facts {
            name: context.name().map_err(failed("cuDeviceGetName"))?,
            compute_capability,
            multiprocessors,
            sm80: false,
            sm75: false,
            l2_bytes: optional(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE) as u64,
            memory_bytes: context.total_mem().map_err(failed("cuDeviceTotalMem"))? as u64,
            shared_bytes: needed(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
            )?,
            shared_per_block: needed(
                Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK,
            )?,
            roof: roof(compute_capability, multiprocessors, clock, memory_clock, bus),
        })
    }
}

/// The ceilings that a data sheet would give. Where the driver does not tell a clock, one that is
/// usual for the chips in question stands in.
fn roof(chip: (u32, u32), multiprocessors: u32, clock: f64, memory_clock: f64, bus: f64) -> Roof {
    let lanes = match chip {
        (7, _) | (8, 0) => 64.0,
        _ => 128.0,
    };
    let clock = if clock > 0.0 { clock } else { 1.5e9 };
    // Two transfers per clock.
    let bytes = 2.0 * memory_clock * bus / 8.0;
    Roof {
        flops_per_second: 2.0 * lanes * f64::from(multiprocessors) * clock,
        bytes_per_second: if bytes > 0.0 { bytes } else { 1e12 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roof_is_positive_whatever_the_driver_tells() {
        let known = roof((9, 0), 132, 1.98e9, 3.201e9, 6144.0);
        assert!((known.flops_per_second / 66.9e12 - 1.0).abs() < 0.01, "{known:?}");
        assert!((known.bytes_per_second / 4.92e12 - 1.0).abs() < 0.01, "{known:?}");
        let unknown = roof((7, 5), 1, 0.0, 0.0, 0.0);
        assert!(unknown.flops_per_second > 0.0 && unknown.bytes_per_second > 0.0);
    }
}
