//! Which kernel runs a problem, and why.

use std::fmt;

use crate::cost::{Cost, Roof};
use crate::error::{Error, Result};

/// The environment variable that forces a kernel.
pub(crate) const KERNEL_VARIABLE: &str = "POINTWISE_KERNEL";

/// What a kernel says to a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Candidate {
    /// The kernel's name: `{pass}_{dtype}_{isa}_{tile}`.
    pub kernel: &'static str,
    /// How it would run the problem, or why it cannot.
    pub verdict: Result<String, String>,
}

/// How a call of a prepared layer would run: [`Display`](fmt::Display) is the readable form.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Explanation {
    /// The device.
    pub device: String,
    /// The problem in one line.
    pub problem: String,
    /// The kernel that would run.
    pub kernel: &'static str,
    /// How, and why it was chosen.
    pub reason: String,
    /// Parameters, work and traffic.
    pub cost: Cost,
    /// The machine's ceilings for this problem.
    pub roof: Roof,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = if self.roof.compute_bound(&self.cost) { "compute" } else { "memory" };
        writeln!(f, "problem   {} on {}", self.problem, self.device)?;
        writeln!(f, "kernel    {}: {}", self.kernel, self.reason)?;
        writeln!(f, "cost      {}", self.cost)?;
        write!(
            f,
            "roofline  {bound}-bound: {:.1} GFLOP/s, {:.1} GB/s, at least {:.1} µs",
            self.roof.flops_per_second / 1e9,
            self.roof.bytes_per_second / 1e9,
            self.roof.seconds(&self.cost) * 1e6
        )
    }
}

/// What a user asks for by name: the option, else `POINTWISE_KERNEL`.
pub(crate) fn wanted_kernel(option: Option<&str>) -> Option<String> {
    let variable =
        std::env::var_os(KERNEL_VARIABLE).map(|name| name.to_string_lossy().into_owned());
    let option = option.map(str::to_owned).filter(|name| !name.is_empty());
    option.or(variable).filter(|name| !name.is_empty())
}

/// The kernel that a user forces, checked against the names that the device has.
///
/// # Errors
/// [`Error::Kernel`] if the device has no kernel of that name.
pub(crate) fn forced_kernel(
    option: Option<&str>,
    names: &[&'static str],
) -> Result<Option<&'static str>> {
    let Some(wanted) = wanted_kernel(option) else {
        return Ok(None);
    };
    match names.iter().find(|name| **name == wanted) {
        Some(name) => Ok(Some(name)),
        None => Err(Error::Kernel {
            kernel: wanted,
            reason: format!("this device has {}", names.join(", ")),
        }),
    }
}
