//! What a call tells those who watch: a span of `tracing`, a range of NVTX, or both.

#[cfg(feature = "tracing")]
use tracing::{Level, debug_span, enabled, span::EnteredSpan};

use crate::problem::Work;

/// What is told of a call.
pub(crate) struct Told {
    pub kernel: &'static str,
    pub problem: String,
    pub macs: usize,
    pub bytes: usize,
}

impl Told {
    /// Of a layer's call on elements of this size.
    pub(crate) fn of(kernel: &'static str, work: &Work, size: usize) -> Self {
        let bytes = work.cost(0, size).bytes();
        Told { kernel, problem: work.to_string(), macs: work.macs(), bytes }
    }
}

/// A call that is watched, until this goes.
pub(crate) struct Watched {
    #[cfg(feature = "tracing")]
    _span: Option<EnteredSpan>,
    #[cfg(feature = "nvtx")]
    _range: Option<nvtx::Range>,
}

/// Begins a span at level `DEBUG`, target and name `pointwise`, with the fields `kernel`, `problem`,
/// `macs` and `bytes`, and a range of the NVTX domain `pointwise` whose message says the same. Nothing
/// is asked where nobody watches.
pub(crate) fn enter(tell: impl FnOnce() -> Told) -> Option<Watched> {
    #[cfg(feature = "tracing")]
    let spans = enabled!(target: "pointwise", Level::DEBUG);
    #[cfg(not(feature = "tracing"))]
    let spans = false;
    #[cfg(feature = "nvtx")]
    let domain = nvtx::domain();
    #[cfg(feature = "nvtx")]
    let ranges = domain.is_some();
    #[cfg(not(feature = "nvtx"))]
    let ranges = false;
    (spans || ranges).then(|| {
        #[cfg_attr(not(any(feature = "tracing", feature = "nvtx")), expect(unused_variables))]
        let Told { kernel, problem, macs, bytes } = tell();
        Watched {
            #[cfg(feature = "tracing")]
            _span: spans.then(|| {
                debug_span!(target: "pointwise", "pointwise", kernel, problem, macs, bytes)
                    .entered()
            }),
            #[cfg(feature = "nvtx")]
            _range: domain.map(|domain| {
                domain.enter(format!("{kernel}: {problem}, {macs} MACs, {bytes} bytes"))
            }),
        }
    })
}

#[cfg(feature = "nvtx")]
mod nvtx {
    use std::ffi::CString;
    use std::marker::PhantomData;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicPtr, Ordering};

    use nvtx_sys::ffi;

    pub(super) struct Domain(AtomicPtr<ffi::nvtxDomainRegistration>);

    /// Until it goes, on the thread that has entered it.
    pub(super) struct Range(&'static Domain, PhantomData<*const ()>);

    /// The domain `pointwise`, if a tool is there to see it.
    pub(super) fn domain() -> Option<&'static Domain> {
        static DOMAIN: OnceLock<Domain> = OnceLock::new();
        let domain = DOMAIN.get_or_init(|| {
            // SAFETY: the name ends with a zero. Without a tool, nothing happens and null returns.
            let handle = unsafe { ffi::nvtxDomainCreateA(c"pointwise".as_ptr()) };
            Domain(AtomicPtr::new(handle))
        });
        (!domain.handle().is_null()).then_some(domain)
    }

    impl Domain {
        fn handle(&self) -> ffi::nvtxDomainHandle_t {
            self.0.load(Ordering::Relaxed)
        }

        pub(super) fn enter(&'static self, message: String) -> Range {
            let message = CString::new(message).unwrap_or_default();
            let attributes = ffi::nvtxEventAttributes_t {
                version: ffi::NVTX_VERSION as u16,
                size: size_of::<ffi::nvtxEventAttributes_t>() as u16,
                category: 0,
                colorType: 0,
                color: 0,
                payloadType: ffi::nvtxPayloadType_t::NVTX_PAYLOAD_UNKNOWN as i32,
                reserved0: 0,
                payload: ffi::nvtxEventAttributes_v2_payload_t { ullValue: 0 },
                messageType: ffi::nvtxMessageType_t::NVTX_MESSAGE_TYPE_ASCII as i32,
                message: ffi::nvtxMessageValue_t { ascii: message.as_ptr() },
            };
            // SAFETY: the domain lives as long as the process; a tool copies what it keeps of the
            // attributes and their message, which ends with a zero.
            unsafe { ffi::nvtxDomainRangePushEx(self.handle(), &attributes) };
            Range(self, PhantomData)
        }
    }

    impl Drop for Range {
        fn drop(&mut self) {
            // SAFETY: this thread has pushed a range that nobody else pops.
            unsafe { ffi::nvtxDomainRangePop(self.0.handle()) };
        }
    }
}
