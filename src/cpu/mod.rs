//! The CPU backend: `plan` chooses a kernel and how a problem is cut, `gemm` runs the loops over it,
//! `area` cuts grids of tiles out of a unit, `pack` lays weights (and, where it pays, src) out for the
//! microkernels, `norm` normalises a block of positions, `threads` spreads units over a pool, `roof`
//! measures the machine's ceilings, `tune` measures kernels, `train` has the passes of training, `int8`
//! layers of 8-bit integers, `fp8` those of 8-bit floats. Everything that depends on the instruction set is, for the others, in `microkernel`, `epilogue`, `runs` and `math`, written over one vector type
//! in `simd`.

mod area;
mod epilogue;
pub(crate) mod fp8;
mod gemm;
pub(crate) mod int8;
mod isa;
mod math;
mod microkernel;
mod norm;
mod pack;
mod plan;
mod roof;
mod runs;
mod simd;
mod threads;
pub(crate) mod train;
mod tune;

pub(crate) use epilogue::Stored;
pub(crate) use gemm::{Layer, run};
pub(crate) use roof::{Meter, Products};
pub(crate) use threads::CpuDevice;
use threads::Disjoint;
pub(crate) use tune::tune;
