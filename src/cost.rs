//! What a layer costs, before it runs, and what a machine could do at best.

use std::fmt;

use crate::cpu;

/// Parameters, work and least traffic of one call in f32.
///
/// Traffic counts every tensor once: what a fused pass must move if nothing is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cost {
    /// Values of the folded layer: weight, bias and what the remaining steps use per channel.
    pub parameters: usize,
    /// Multiply-accumulates of the convolution.
    pub macs: usize,
    /// Bytes of the sources that are read (every `stride`-th position), gate included.
    pub src_bytes: usize,
    /// Bytes of the folded weight and bias.
    pub weight_bytes: usize,
    /// Bytes of the result that are written.
    pub dst_bytes: usize,
    /// Bytes of the residual that are read.
    pub residual_bytes: usize,
}

impl Cost {
    /// Floating-point operations: two per multiply-accumulate.
    pub fn flops(&self) -> f64 {
        2.0 * self.macs as f64
    }

    /// Bytes moved if every tensor is touched once.
    pub fn bytes(&self) -> usize {
        [self.weight_bytes, self.dst_bytes, self.residual_bytes]
            .into_iter()
            .fold(self.src_bytes, usize::saturating_add)
    }

    /// Arithmetic intensity in flops per byte.
    pub fn intensity(&self) -> f64 {
        self.flops() / self.bytes().max(1) as f64
    }
}

/// A machine's two ceilings for one problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roof {
    /// Fused multiply-adds count two.
    pub flops_per_second: f64,
    /// Of the memory level that holds the problem.
    pub bytes_per_second: f64,
}

impl Roof {
    /// The least time in seconds that a call of this cost can take.
    pub fn seconds(&self, cost: &Cost) -> f64 {
        (cost.flops() / self.flops_per_second).max(cost.bytes() as f64 / self.bytes_per_second)
    }

    /// The higher of two measurements, each ceiling by itself.
    pub fn max(self, other: Roof) -> Roof {
        Roof {
            flops_per_second: self.flops_per_second.max(other.flops_per_second),
            bytes_per_second: self.bytes_per_second.max(other.bytes_per_second),
        }
    }

    /// Whether arithmetic, not memory, is the ceiling.
    pub fn compute_bound(&self, cost: &Cost) -> bool {
        cost.flops() / self.flops_per_second >= cost.bytes() as f64 / self.bytes_per_second
    }
}

/// Measures a device's ceilings, as often as one likes: [`Device::roof_meter`] makes it.
///
/// A machine's clock moves, and a virtual machine's neighbours come and go. A fraction of the roof
/// means something when samples of the roof are taken in between the timings that it is compared
/// with, and the highest of them is the roof.
///
/// ```
/// use pointwise::Device;
/// let meter = Device::cpu().threads(1).roof_meter(1 << 20)?;
/// let roof = (1..5).fold(meter.sample(), |roof, _| roof.max(meter.sample()));
/// println!("{:.0} GFLOP/s, {:.0} GB/s", roof.flops_per_second / 1e9, roof.bytes_per_second / 1e9);
/// # assert!(roof.flops_per_second > 0.0 && roof.bytes_per_second > 0.0);
/// # Ok::<(), pointwise::Error>(())
/// ```
///
/// [`Device::roof_meter`]: crate::Device::roof_meter
#[derive(Debug)]
pub struct RoofMeter {
    kind: MeterKind,
}

#[derive(Debug)]
enum MeterKind {
    Cpu(cpu::Meter),
    #[cfg(feature = "cuda")]
    Computed(Roof),
}

impl RoofMeter {
    pub(crate) fn cpu(meter: cpu::Meter) -> Self {
        RoofMeter { kind: MeterKind::Cpu(meter) }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn computed(roof: Roof) -> Self {
        RoofMeter { kind: MeterKind::Computed(roof) }
    }

    /// The ceilings now.
    ///
    /// On the CPU measured, on all of the device's threads at once and with the strongest
    /// instruction set of the machine, whichever is forced: multiply-adds in registers (fused where
    /// that instruction set can), and reading the given number of bytes over and over. It takes one
    /// or two milliseconds; some tens where no cache holds the bytes, or where threads have to wait
    /// for cores. On CUDA computed, from clocks and widths.
    pub fn sample(&self) -> Roof {
        match &self.kind {
            MeterKind::Cpu(meter) => meter.sample(),
            #[cfg(feature = "cuda")]
            MeterKind::Computed(roof) => *roof,
        }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} parameters, {} MACs, {} bytes (src {}, weight {}, dst {}, residual {}), {:.1} flop/byte",
            self.parameters,
            self.macs,
            self.bytes(),
            self.src_bytes,
            self.weight_bytes,
            self.dst_bytes,
            self.residual_bytes,
            self.intensity()
        )
    }
}
