//! What a layer costs, before it runs.

use std::fmt;

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

    /// Whether arithmetic, not memory, is the ceiling.
    pub fn compute_bound(&self, cost: &Cost) -> bool {
        cost.flops() / self.flops_per_second >= cost.bytes() as f64 / self.bytes_per_second
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
