//! The code for each instruction set: a row of [`KERNELS`].

use super::bytes::{self, Strip};
use super::finish::{self, Added, Finish, Stored};
use super::pack::{self, Source};
use super::quantize::{self, Element, Reach};
use super::sums::{self, Dot, MOST_ROWS, Tile};
use crate::cpu::isa::{Isa, Supported};
use crate::cpu::simd::{self, Simd};
use crate::dtype::{bf16, f16};

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
    pub sum: unsafe fn(&Tile, *mut i32),
    /// Sums tiles into bytes: see [`bytes::strip`], and as above.
    pub strip: unsafe fn(&Strip),
    /// See [`sums::chains`].
    pub chains: unsafe fn(usize) -> usize,
    /// By dst's type, of sources of bytes.
    pub finish_u8: FinishFn<u8, u8>,
    pub finish_f32: FinishFn<f32, u8>,
    pub finish_f16: FinishFn<f16, u8>,
    pub finish_bf16: FinishFn<bf16, u8>,
    /// As above, of sources of f32.
    pub finish_real_f32: FinishFn<f32, f32>,
    pub finish_real_f16: FinishFn<f16, f16>,
    pub finish_real_bf16: FinishFn<bf16, bf16>,
    pub pack_u8: Packing<u8>,
    pub pack_f32: Packing<f32>,
}

/// See [`finish::finish`].
pub(crate) type FinishFn<T, R> = unsafe fn(&Finish<'_, T, R>);

/// How a block of src is packed.
#[derive(Debug)]
pub(crate) struct Packing<S: Element> {
    /// See [`pack::rows`].
    pub rows: unsafe fn(&Source<'_, S>, &mut [u32]),
    /// See [`pack::panels`].
    pub panels: unsafe fn(&Source<'_, S>, usize, &mut [u32]),
    /// See [`quantize::ranges`].
    pub ranges: unsafe fn(&Source<'_, S>, &mut [Reach]),
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
    ($(#[$features:meta])? $kernel:ident = $name:literal, $isa:expr, if $extra:expr, $group:literal channels of $dot:ty, $vector:ty, $pick:ident {
        $($nv:literal: [$($rows:literal)*];)*
    }) => {
        #[allow(non_snake_case, reason = "named as the kernel is")]
        mod $pick {
            use super::*;

            $(#[$features])?
            unsafe fn tile<const R: usize, const NV: usize, const WEIGHT_IS_A: bool>(
                tile: &Tile,
                out: *mut i32,
            ) {
                // SAFETY: the caller's promises; this function has the target features.
                unsafe { sums::tile::<$dot, R, NV, WEIGHT_IS_A>(tile, out) }
            }

            static TILES: [&[[unsafe fn(&Tile, *mut i32); 2]]; [$($nv),*].len()] = [
                $(&[$([tile::<$rows, $nv, false>, tile::<$rows, $nv, true>]),*]),*
            ];

            pub(super) unsafe fn sum(tile: &Tile, out: *mut i32) {
                let run = TILES[tile.vectors - 1][tile.rows - 1][usize::from(tile.weight_is_a)];
                // SAFETY: the caller's promises.
                unsafe { run(tile, out) }
            }

            $(#[$features])?
            unsafe fn strip_of<const R: usize, const NV: usize, const WEIGHT_IS_A: bool>(
                strip: &Strip,
            ) {
                // SAFETY: as above.
                unsafe { bytes::strip::<$dot, R, NV, WEIGHT_IS_A>(strip) }
            }

            static STRIPS: [&[[unsafe fn(&Strip); 2]]; [$($nv),*].len()] = [
                $(&[$([strip_of::<$rows, $nv, false>, strip_of::<$rows, $nv, true>]),*]),*
            ];

            pub(super) unsafe fn strip(strip: &Strip) {
                let tile = &strip.tile;
                let run = STRIPS[tile.vectors - 1][tile.rows - 1][usize::from(tile.weight_is_a)];
                // SAFETY: as above.
                unsafe { run(strip) }
            }

            $(#[$features])?
            pub(super) unsafe fn chains(rounds: usize) -> usize {
                // SAFETY: as above.
                unsafe { sums::chains::<$dot>(rounds) }
            }

            $(#[$features])?
            pub(super) unsafe fn finish<T: Stored, R: Added>(tile: &Finish<'_, T, R>) {
                // SAFETY: as above.
                unsafe { finish::finish::<$vector, T, R>(tile) }
            }

            $(#[$features])?
            pub(super) unsafe fn rows<S: Element>(source: &Source<'_, S>, out: &mut [u32]) {
                // SAFETY: as above.
                unsafe { pack::rows::<S, $group>(source, out) }
            }

            $(#[$features])?
            pub(super) unsafe fn panels<S: Element>(
                source: &Source<'_, S>,
                width: usize,
                out: &mut [u32],
            ) {
                // SAFETY: as above.
                unsafe { pack::panels::<S, $group>(source, width, out) }
            }

            $(#[$features])?
            pub(super) unsafe fn ranges<S: Element>(source: &Source<'_, S>, ranges: &mut [Reach]) {
                // SAFETY: as above.
                unsafe { quantize::ranges(source, ranges) }
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
            strip: $pick::strip,
            chains: $pick::chains,
            finish_u8: $pick::finish,
            finish_f32: $pick::finish,
            finish_f16: $pick::finish,
            finish_bf16: $pick::finish,
            finish_real_f32: $pick::finish,
            finish_real_f16: $pick::finish,
            finish_real_bf16: $pick::finish,
            pack_u8: Packing { rows: $pick::rows, panels: $pick::panels, ranges: $pick::ranges },
            pack_f32: Packing { rows: $pick::rows, panels: $pick::panels, ranges: $pick::ranges },
        };
        const _: () = assert!($([$($rows),*].len() <= MOST_ROWS)&&*);
        const _: () = assert!(finish::CHUNK.is_multiple_of(<$vector as Simd>::LANES));
        const _: () = {
            let widest = [$([$($rows),*].len()),*].len() * <$dot as Dot>::LANES;
            assert!(widest <= sums::SUMS_STRIDE && pack::PANEL.is_multiple_of(widest));
            assert!($group == 2 || $group == 4);
        };
    };
}

#[cfg(target_arch = "x86_64")]
kernel! {
    PORTABLE = "fprop_i8_portable_4x8", Isa::Portable, if true, 2 channels of sums::Sse2Pairs, simd::Baseline, portable {
        1: [1 2 3 4];
        2: [1 2 3 4];
    }
}

#[cfg(not(target_arch = "x86_64"))]
kernel! {
    PORTABLE = "fprop_i8_portable_4x8", Isa::Portable, if true, 2 channels of sums::Pairs8, simd::Baseline, portable {
        1: [1 2 3 4];
    }
}

#[cfg(target_arch = "x86_64")]
kernel! {
    #[target_feature(enable = "avx2,fma,f16c")]
    AVX2 = "fprop_i8_avx2_6x16", Isa::Avx2, if true, 2 channels of sums::Avx2Pairs, simd::avx2::F32x8, avx2 {
        1: [1 2 3 4 5 6];
        2: [1 2 3 4 5 6];
    }
}

#[cfg(target_arch = "x86_64")]
kernel! {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw")]
    AVX512 = "fprop_i8_avx512_12x32", Isa::Avx512, if true, 2 channels of sums::Avx512Pairs, simd::avx512::F32x16, avx512 {
        1: [1 2 3 4 5 6 7 8 9 10 11 12];
        2: [1 2 3 4 5 6 7 8 9 10 11 12];
    }
}

#[cfg(target_arch = "x86_64")]
kernel! {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512dq,avx512bw,avx512vnni")]
    VNNI = "fprop_i8_avx512vnni_6x64", Isa::Avx512, if is_x86_feature_detected!("avx512vnni"), 4 channels of sums::Vnni, simd::avx512::F32x16, vnni {
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
