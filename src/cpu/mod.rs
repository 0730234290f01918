//! The CPU backend.
#![allow(dead_code, reason = "called by the blocked loops")]

pub(crate) mod epilogue;
pub(crate) mod isa;
pub(crate) mod math;
pub(crate) mod microkernel;
pub(crate) mod runs;
pub(crate) mod simd;
