//! A stand-in for the CUDA driver that runs kernels on the CPU by interpreting their PTX.
//!
//! Built as `libcuda.so.1` and put on the library path, it lets an unmodified program find a GPU.
//! The way through it: [`driver`] receives the calls, [`fatbin`] finds the PTX, [`parse`] reads it,
//! [`decode`] turns it into [`isa`], [`exec`] runs it with [`alu`], [`mma`] and [`async_copy`], while [`memory`]
//! and [`races`] watch every access.

#![deny(missing_docs, unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod alu;
pub mod async_copy;
pub mod counters;
pub mod decode;
pub mod driver;
pub mod exec;
pub mod fatbin;
pub mod float;
pub mod isa;
pub mod liveness;
pub mod memory;
pub mod mma;
pub mod parse;
pub mod races;
pub mod rng;
