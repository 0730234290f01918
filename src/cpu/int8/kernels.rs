//! The code for each instruction set: a row of [`KERNELS`].

use super::finish::{self, Finish};
use super::pack::{self, Source};
use super::sums::{self, Dot, MOST_ROWS, Tile};
use crate::cpu::isa::{Isa, Supported};

/// What runs a layer on an instruction set.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// `{pass}_{dtype}_{isa}_{mr}x{nr}`.
    pub name: &'static str,
    pub isa: Isa,
    /// Whether the CPU has what the kernel needs beyond `isa`.
    extra: fn() -> bool,
    /// Input channels of a word: 4 bytes, or 2 integers of 16 bits.
    pub group: usize,
    /// Sums of a vector.
    pub lanes: usize,
    /// The most rows of a tile of 1, 2, … vectors.
    pub rows: &'static [usize],
    /// Sums a tile: see [`sums::tile`]; rows and vectors are as `rows` says, neither is zero.
    pub sum: unsafe fn(&Tile),
    /// See [`finish::finish`].
    pub finish_bytes: unsafe fn(&Finish<u8>),
    /// As above.
    pub finish_f32: unsafe fn(&Finish<f32>),
    /// See [`pack::rows`].
    pub pack_rows: unsafe fn(&Source<'_>, &mut [u32]),
    /// See [`pack::panels`].
    pub pack_panels: unsafe fn(&Source<'_>, usize, &mut [u32]),
}

impl Kernel {
    /// The best kernel of an instruction set.
    pub(crate) fn of(isa: Supported) -> &'static Kernel {
        let kernel =
            KERNELS.iter().rev().find(|kernel| kernel.isa == isa.isa() && (kernel.extra)());
        kernel.expect("every instruction set has a kernel without further needs")
    }

    /// Whether this CPU can run it.
    pub(crate) fn supported(&self) -> bool {
        self.isa.supported().is_some() && (self.extra)()
    }

    /// The most lanes of a tile.
    pub(crate) fn widest(&self) -> usize {
        self.lanes * self.rows.len()
    }

    /// The most rows of a tile of so many lanes.
    pub(crate) fn most_rows(&self, lanes: usize) -> usize {
        self.rows[lanes.div_ceil(self.lanes) - 1]
    }
}

/// A kernel: its name and instruction set, and every tile by its vectors and rows.
macro_rules! kernel {
    ($(#[$features:meta])? $kernel:ident = $name:literal, $isa:expr, if $extra:expr, $group:literal channels of $dot:ty, $pick:ident {
        $($nv:literal: [$($rows:literal)*];)*
    }) => {
        #[allow(non_snake_case, reason = "named as the kernel is")]
        mod $pick {
            use super::*;

            $(#[$features])?
            unsafe fn tile<const R: usize, const NV: usize, const WEIGHT_IS_A: bool>(tile: &Tile) {
                // SAFETY: the caller's promises; this function has the target features.
                unsafe { sums::tile::<$dot, R, NV, WEIGHT_IS_A>(tile) }
            }

            static TILES: [&[[unsafe fn(&Tile); 2]]; [$($nv),*].len()] = [
                $(&[$([tile::<$rows, $nv, false>, tile::<$rows, $nv, true>]),*]),*
            ];

            pub(super) unsafe fn sum(tile: &Tile) {
                let run = TILES[tile.vectors - 1][tile.rows - 1][usize::from(tile.weight_is_a)];
                // SAFETY: the caller's promises.
                unsafe { run(tile) }
            }

            $(#[$features])?
            pub(super) unsafe fn finish_bytes(tile: &Finish<u8>) {
                // SAFETY: as above.
                unsafe {
                    match tile.residual {
                        None => finish::finish::<u8, false>(tile),
                        Some(_) => finish::finish::<u8, true>(tile),
                    }
                }
            }

            $(#[$features])?
            pub(super) unsafe fn finish_f32(tile: &Finish<f32>) {
                // SAFETY: as above.
                unsafe {
                    match tile.residual {
                        None => finish::finish::<f32, false>(tile),
                        Some(_) => finish::finish::<f32, true>(tile),
                    }
                }
            }

            $(#[$features])?
            pub(super) unsafe fn pack_rows(source: &Source<'_>, out: &mut [u32]) {
                // SAFETY: as above.
                unsafe { pack::rows::<$group>(source, out) }
            }

            $(#[$features])?
            pub(super) unsafe fn pack_panels(source: &Source<'_>, width: usize, out: &mut [u32]) {
                // SAFETY: as above.
                unsafe { pack::panels::<$group>(source, width, out) }
            }
        }

        static $kernel: Kernel = Kernel {
            name: $name,
            isa: $isa,
            extra: || $extra,
            group: $group,
            lanes: <$dot as Dot>::LANES,
            rows: &[$([$($rows),*].len()),*],
            sum: $pick::sum,
            finish_bytes: $pick::finish_bytes,
            finish_f32: $pick::finish_f32,
            pack_rows: $pick::pack_rows,
            pack_panels: $pick::pack_panels,
        };
        const _: () = assert!($([$($rows),*].len() <= MOST_ROWS)&&*);
        const _: () = {
            let widest = [$([$($rows),*].len()),*].len() * <$dot as Dot>::LANES;
            assert!(widest <= sums::SUMS_STRIDE && pack::PANEL.is_multiple_of(widest));
            assert!($group == 2 || $group == 4);
        };
    };
}

#[cfg(target_arch = "x86_64")]
kernel! {
    PORTABLE = "fprop_i8_portable_4x8", Isa::Portable, if true, 2 channels of sums::Sse2Pairs, portable {
        1: [1 2 3 4];
        2: [1 2 3 4];
    }
}

#[cfg(not(target_arch = "x86_64"))]
kernel! {
    PORTABLE = "fprop_i8_portable_4x8", Isa::Portable, if true, 2 channels of sums::Pairs8, portable {
        1: [1 2 3 4];
    }
}

#[cfg(target_arch = "x86_64")]
kernel! {
    #[target_feature(enable = "avx2,fma")]
    AVX2 = "fprop_i8_avx2_6x16", Isa::Avx2, if true, 2 channels of sums::Avx2Pairs, avx2 {
        1: [1 2 3 4 5 6];
        2: [1 2 3 4 5 6];
    }
}

#[cfg(target_arch = "x86_64")]
kernel! {
    #[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512dq,avx512bw")]
    AVX512 = "fprop_i8_avx512_12x32", Isa::Avx512, if true, 2 channels of sums::Avx512Pairs, avx512 {
        1: [1 2 3 4 5 6 7 8 9 10 11 12];
        2: [1 2 3 4 5 6 7 8 9 10 11 12];
    }
}

#[cfg(target_arch = "x86_64")]
kernel! {
    #[target_feature(enable = "avx2,fma,avx512f,avx512vl,avx512dq,avx512bw,avx512vnni")]
    VNNI = "fprop_i8_avx512vnni_6x64", Isa::Avx512, if is_x86_feature_detected!("avx512vnni"), 4 channels of sums::Vnni, vnni {
        1: [1 2 3 4 5 6 7 8 9 10 11 12 13 14];
        2: [1 2 3 4 5 6 7 8 9 10 11 12];
        3: [1 2 3 4 5 6 7 8 9];
        4: [1 2 3 4 5 6];
    }
}

/// Every kernel, those of an instruction set from the weakest to the strongest. A new one is a row
/// here; tests iterate over this table.
pub(crate) static KERNELS: &[&Kernel] = &[
    &PORTABLE,
    #[cfg(target_arch = "x86_64")]
    &AVX2,
    #[cfg(target_arch = "x86_64")]
    &AVX512,
    #[cfg(target_arch = "x86_64")]
    &VNNI,
];
