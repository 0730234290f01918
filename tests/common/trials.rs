//! Trials that are listed as ignored, with the reason, where what they need is missing.

use libtest_mimic::{Completion, Failed, Trial};
use pointwise::Device;

/// What a trial cannot do without: its name in `POINTWISE_REQUIRE`, and why it is not there.
pub struct Missing(pub &'static str, pub String);

/// A trial that is ignored, with the reason, where `need` has none of what it wants, unless
/// `POINTWISE_REQUIRE` demands it.
pub fn trial<T: 'static>(
    name: &str,
    need: impl FnOnce() -> Result<T, Missing> + Send + 'static,
    run: impl FnOnce(T) -> Result<(), Failed> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match need() {
        Ok(value) => run(value).map(|()| Completion::Completed),
        Err(Missing(what, reason)) => {
            let required = std::env::var("POINTWISE_REQUIRE").unwrap_or_default();
            if required.split([',', '|', ' ']).any(|required| required == what) {
                return Err(format!("POINTWISE_REQUIRE={required}, but {reason}").into());
            }
            Ok(Completion::ignored_with(reason))
        }
    })
}

/// The first CUDA device.
pub fn cuda() -> Result<Device, Missing> {
    Device::cuda(0).map_err(|error| Missing("cuda", error.to_string()))
}
