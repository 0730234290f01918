//! A span per call, for those who watch: feature `tracing`.

use tracing::span::EnteredSpan;
use tracing::{Level, debug_span, enabled};

use crate::cost::Cost;

/// What a span tells of its call.
pub(crate) struct Told {
    pub kernel: &'static str,
    pub problem: String,
    pub cost: Cost,
}

/// Begins a span at level `DEBUG`, target and name `pointwise`, with the fields `kernel`,
/// `problem`, `macs` and `bytes`; it ends when the result goes. Nothing is asked where nobody
/// watches.
pub(crate) fn enter(tell: impl FnOnce() -> Told) -> Option<EnteredSpan> {
    enabled!(target: "pointwise", Level::DEBUG).then(|| {
        let Told { kernel, problem, cost } = tell();
        let (macs, bytes) = (cost.macs, cost.bytes());
        debug_span!(target: "pointwise", "pointwise", kernel, problem, macs, bytes).entered()
    })
}
