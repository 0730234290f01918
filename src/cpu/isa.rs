//! Which instruction set a CPU kernel is compiled for, and the proof that this CPU has it.

use std::sync::OnceLock;

use crate::error::Error;

/// The environment variable that forces an instruction set.
pub(crate) const ISA_VARIABLE: &str = "POINTWISE_CPU_ISA";

/// An instruction set that kernels are compiled for, from the weakest to the strongest.
///
/// This is only a name; [`Supported`] is the proof that the CPU has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Isa {
    /// What every CPU of the target has: SSE2 on x86-64, NEON (through LLVM) on aarch64.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, VL, DQ and BW.
    Avx512,
}

/// An [`Isa`] that this CPU has. There is no other way to make one than to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Supported(Isa);

impl Isa {
    /// Every instruction set, from the weakest to the strongest.
    pub(crate) const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// The name in kernel names and in `POINTWISE_CPU_ISA`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// The proof that this CPU has the instruction set, if it has it.
    pub(crate) fn supported(self) -> Option<Supported> {
        self.available().then_some(Supported(self))
    }

    /// The strongest instruction set of this CPU, or the one that `POINTWISE_CPU_ISA` forces.
    ///
    /// The variable is read once per process. An unknown name and an instruction set that this
    /// CPU lacks are errors: a forced choice is never replaced silently.
    ///
    /// # Errors
    /// [`Error::Environment`] for one that is forced and unknown, or not there.
    pub(crate) fn detect() -> crate::error::Result<Supported> {
        static DETECTED: OnceLock<Result<Supported, (String, String)>> = OnceLock::new();
        let detected = DETECTED.get_or_init(|| {
            let forced = std::env::var_os(ISA_VARIABLE);
            let forced = forced.as_deref().map(|name| name.to_string_lossy());
            choose(forced.as_deref())
                .map_err(|reason| (forced.as_deref().unwrap_or_default().to_owned(), reason))
        });
        detected.clone().map_err(|(value, reason)| Error::Environment {
            variable: ISA_VARIABLE,
            value,
            reason,
        })
    }

    /// Whether this CPU multiplies pairs of bf16 with this instruction set: AVX512-BF16.
    pub(crate) fn multiplies_pairs(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let there = is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        let there = false;
        self == Isa::Avx512 && self.available() && there
    }

    #[cfg(target_arch = "x86_64")]
    fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn available(self) -> bool {
        self == Isa::Portable
    }
}

impl Supported {
    /// The instruction set without the proof.
    pub(crate) const fn isa(self) -> Isa {
        self.0
    }

    /// Every instruction set of this CPU, from the weakest to the strongest.
    pub(crate) fn all() -> impl Iterator<Item = Supported> {
        Isa::ALL.into_iter().filter_map(Isa::supported)
    }
}

/// The forced instruction set, or the strongest one; an empty name forces nothing.
fn choose(forced: Option<&str>) -> Result<Supported, String> {
    let Some(name) = forced.filter(|name| !name.is_empty()) else {
        return Ok(Supported::all().last().expect("the portable instruction set is always there"));
    };
    let isa = Isa::ALL
        .into_iter()
        .find(|isa| isa.name() == name)
        .ok_or_else(|| format!("{name:?} is not one of {}", Isa::ALL.map(Isa::name).join(", ")))?;
    isa.supported().ok_or_else(|| {
        let have: Vec<_> = Supported::all().map(|have| have.isa().name()).collect();
        format!("this CPU has no {name} (it has {})", have.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn required_instruction_sets_are_there() {
        let required = std::env::var("POINTWISE_REQUIRE").unwrap_or_default();
        for isa in required
            .split(',')
            .filter_map(|name| Isa::ALL.into_iter().find(|isa| isa.name() == name))
        {
            assert!(isa.supported().is_some(), "this CPU has no {}", isa.name());
        }
    }

    #[test]
    fn nothing_forced_takes_the_strongest() {
        for forced in [None, Some("")] {
            assert_eq!(choose(forced).unwrap().isa(), Supported::all().last().unwrap().isa());
        }
    }

    #[test]
    fn a_forced_name_is_obeyed_or_refused() {
        for isa in Isa::ALL {
            match (choose(Some(isa.name())), isa.supported()) {
                (Ok(chosen), Some(_)) => assert_eq!(chosen.isa(), isa),
                (Err(why), None) => assert!(why.contains(isa.name()), "{why}"),
                (chosen, supported) => panic!("{isa:?}: {chosen:?}, {supported:?}"),
            }
        }
        let why = choose(Some("sse9")).unwrap_err();
        assert!(why.contains("sse9") && why.contains("avx512"), "{why}");
    }
}
