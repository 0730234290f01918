//! What the CPU does, as users call it. One binary: each would compile its own copy of the crate's
//! generic code.

#[path = "cpu/allocation.rs"]
mod allocation;
#[path = "common/mod.rs"]
mod common;
#[path = "common/counting.rs"]
mod counting;
#[path = "cpu/errors.rs"]
mod errors;
#[path = "cpu/fixtures.rs"]
mod fixtures;
#[path = "cpu/fp8.rs"]
mod fp8;
#[path = "cpu/properties.rs"]
mod properties;
#[path = "cpu/quantized.rs"]
mod quantized;
#[path = "common/rng.rs"]
mod rng;
#[path = "cpu/semantics.rs"]
mod semantics;
#[path = "cpu/train.rs"]
mod train;
#[path = "cpu/train_half.rs"]
mod train_half;
#[path = "common/training.rs"]
mod training;
#[path = "cpu/tuning.rs"]
mod tuning;
