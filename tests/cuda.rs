//! The CUDA backend on whatever device there is: a GPU, or the stand-in driver
//! (`tests/emulator/run cargo test --features cuda`). Without either, every trial is listed as
//! ignored with the reason; `POINTWISE_REQUIRE=cuda` makes that a failure.

#![allow(clippy::neg_cmp_op_on_partial_ord, reason = "a comparison that NaN passes is a bug")]

#[path = "cuda/cases.rs"]
mod cases;
#[path = "cuda/compose.rs"]
mod compose;
#[path = "common/counting.rs"]
mod counting;
#[path = "cuda/driver.rs"]
mod driver;
#[path = "cuda/far.rs"]
mod far;
#[path = "cuda/faults.rs"]
mod faults;
#[path = "common/mod.rs"]
mod fixtures;
#[path = "cuda/fp8.rs"]
mod fp8;
#[path = "cuda/golden.rs"]
mod golden;
#[path = "cuda/half.rs"]
mod half;
#[path = "cuda/host.rs"]
mod host;
#[path = "cuda/int8.rs"]
mod int8;
#[path = "cuda/matrix.rs"]
mod matrix;
#[path = "cuda/numbers.rs"]
mod numbers;
#[path = "cuda/operator.rs"]
mod operator;
#[path = "cuda/planted.rs"]
mod planted;
#[path = "cuda/splits.rs"]
mod splits;
#[path = "cuda/streams.rs"]
mod streams;
#[path = "cuda/tensor_cores.rs"]
mod tensor_cores;
#[path = "cuda/traffic.rs"]
mod traffic;
#[path = "cuda/train.rs"]
mod train;
#[path = "cuda/train_half.rs"]
mod train_half;
#[path = "common/training.rs"]
mod training;
#[path = "cuda/tuning.rs"]
mod tuning;

use fixtures as common;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use pointwise::CudaDevice;

/// What a trial returns: an error is a failure.
type Outcome = Result<(), Failed>;

/// A trial that needs a device.
type OnDevice = (&'static str, fn(&CudaDevice) -> Outcome);

fn main() -> ExitCode {
    if let Ok(what) = std::env::var(driver::CHILD) {
        return driver::child(&what);
    }
    let device = CudaDevice::open(0).map_err(|error| error.to_string());
    let required = std::env::var("POINTWISE_REQUIRE")
        .is_ok_and(|list| list.split(',').any(|wanted| wanted.trim() == "cuda"));

    let mut trials = Vec::new();
    let anywhere = [
        cases::TRIALS,
        matrix::TRIALS,
        numbers::TRIALS,
        splits::TRIALS,
        streams::TRIALS,
        host::TRIALS,
        compose::TRIALS,
        operator::TRIALS,
        tensor_cores::TRIALS,
        half::TRIALS,
        int8::TRIALS,
        fp8::TRIALS,
        golden::TRIALS,
        train::TRIALS,
        train_half::TRIALS,
        tuning::TRIALS,
        driver::TRIALS,
    ]
    .concat();
    let anywhere = anywhere.into_iter().map(|trial| (trial, false));
    let stand_in = [
        driver::STAND_IN_TRIALS,
        faults::STAND_IN_TRIALS,
        planted::STAND_IN_TRIALS,
        traffic::STAND_IN_TRIALS,
    ]
    .concat();
    let stand_in = stand_in.into_iter().map(|trial| (trial, true));
    for ((name, run), needs_stand_in) in anywhere.chain(stand_in) {
        trials.push(match device.clone() {
            Ok(device) if needs_stand_in && !driver::is_stand_in(&device) => {
                Trial::test(name, || Err("needs the stand-in driver".into()))
                    .with_kind("needs the stand-in driver")
                    .with_ignored_flag(true)
            }
            Ok(device) => Trial::test(name, move || run(&device)),
            Err(reason) if required => Trial::test(name, move || {
                Err(format!("POINTWISE_REQUIRE=cuda, but: {reason}").into())
            }),
            Err(reason) => Trial::test(name, || Ok(())).with_kind(reason).with_ignored_flag(true),
        });
    }
    trials.push(Trial::test("without_a_usable_driver_there_is_a_reason", driver::no_driver));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
