//! Every size of tile against a scalar loop, exactly: the sums are of small integers, and rounded
//! once.

use super::{Grid, KERNELS, Kernel, Segment, Sizes, TermKind};
use crate::cpu::epilogue::{ChannelAxis, Operand, Steps, Stored, TileEpilogue};
use crate::cpu::isa::Isa;
use crate::cpu::runs;
use crate::dtype::{DType, Element, bf16, f16};
use crate::epilogue::Step;
use crate::stages::Activation;

/// A NaN that no kernel makes: what memory holds where nothing may be written.
const CANARY: f32 = f32::from_bits(0x7fda_5a5a);

/// Memory of an operand.
enum Memory {
    /// Pages between two that fault, so that access beyond either end of the values stops the test.
    Guarded { start: *mut u8, end: *mut u8 },
    /// An allocation of just the values, whose ends a memory checker watches.
    Heap(Vec<u16>),
}

#[cfg(all(target_os = "linux", target_pointer_width = "64", not(miri)))]
impl Memory {
    fn guarded() -> Self {
        const PAGE: usize = 65536; // The largest page that Linux uses.
        const PAGES: usize = 3;
        let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: a fresh mapping, whose first and last page become inaccessible. It lives until
        // the process ends.
        let start = unsafe {
            let (null, len) = (std::ptr::null_mut(), (PAGES + 2) * PAGE);
            let base = libc::mmap(null, len, rights, kind | libc::MAP_ANONYMOUS, -1, 0);
            assert_ne!(base, libc::MAP_FAILED, "mmap failed");
            for guard in [base, base.byte_add((PAGES + 1) * PAGE)] {
                assert_eq!(libc::mprotect(guard, PAGE, libc::PROT_NONE), 0, "mprotect failed");
            }
            base.byte_add(PAGE).cast::<u8>()
        };
        Memory::Guarded { start, end: start.wrapping_byte_add(PAGES * PAGE) }
    }
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64", not(miri))))]
impl Memory {
    fn guarded() -> Self {
        Memory::Heap(Vec::new())
    }
}

impl Memory {
    /// Copies `values` to the start or the end of the memory.
    fn place<T: Element>(&mut self, values: &[T], at_end: bool) -> &mut [T] {
        if values.is_empty() {
            return &mut [];
        }
        let first = match self {
            Memory::Guarded { start, end } => {
                assert!(size_of_val(values) <= end.addr() - start.addr());
                if at_end { end.wrapping_sub(size_of_val(values)) } else { *start }
            }
            Memory::Heap(memory) => {
                *memory = vec![0; size_of_val(values) / 2];
                memory.as_mut_ptr().cast()
            }
        };
        let first = first.cast::<T>();
        assert!(first.is_aligned());
        // SAFETY: the memory is ours, is aligned and holds the values.
        unsafe {
            first.copy_from_nonoverlapping(values.as_ptr(), values.len());
            std::slice::from_raw_parts_mut(first, values.len())
        }
    }
}

/// What holds the operands of a case: bias, dst, residual, scale, then A and B of each segment.
fn memories(memory: impl Fn() -> Memory) -> Vec<Memory> {
    (0..10).map(|_| memory()).collect()
}

/// Small integers, never zero, so that a missing term shows.
fn integer(seed: usize) -> f32 {
    let value = (seed.wrapping_mul(2_654_435_761) >> 7) % 6;
    [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0][value]
}

/// dst or the residual: what its memory holds, and how it is placed in it.
struct Placed<T> {
    values: Vec<T>,
    origin: isize,
    channel_stride: isize,
    position_stride: isize,
    channels: Option<Vec<u32>>,
    positions: Option<Vec<isize>>,
}

/// How dst and the residual are laid out: the strides' order and signs, maps and tables.
const PLACEMENTS: [&str; 8] = [
    "channels first",
    "channels last",
    "no unit stride",
    "negative channel stride",
    "negative position stride",
    "channel map",
    "position table",
    "map and table",
];

impl<T: Element> Placed<T> {
    /// The values run from the first to the last element, with canaries between them.
    fn new(placement: &str, channels: usize, positions: usize) -> Self {
        let (c, p) = (channels as isize, positions as isize);
        let (channel_stride, position_stride) = match placement {
            "channels first" | "channel map" => (p + 3, 1),
            "channels last" | "position table" => (1, c + 2),
            "no unit stride" | "map and table" => (2 * p + 1, 2),
            "negative channel stride" => (-(p + 1), 1),
            "negative position stride" => (1, -(c + 1)),
            _ => unreachable!(),
        };
        let map = (0..channels as u32).map(|c| (c * 5 + 3) % channels as u32);
        let map: Vec<u32> = if channels.is_multiple_of(5) {
            (0..channels as u32).rev().collect()
        } else {
            map.collect()
        };
        let table = (0..p).map(|j| (p - 1 - j) * position_stride.abs()).collect();
        let mut placed = Self {
            values: Vec::new(),
            origin: 0,
            channel_stride,
            position_stride,
            channels: placement.contains("map").then_some(map),
            positions: placement.contains("table").then_some(table),
        };
        let all = || (0..channels).flat_map(|c| (0..positions).map(move |p| (c, p)));
        let low = all().map(|(c, p)| placed.offset(c, p)).min().unwrap_or(0);
        let high = all().map(|(c, p)| placed.offset(c, p)).max().unwrap_or(-1);
        placed.values = vec![T::from_f32(CANARY); (high - low + 1) as usize];
        placed.origin = -low;
        placed
    }

    /// As [`new`](Self::new), filled.
    fn filled(placement: &str, channels: usize, positions: usize) -> Self {
        let mut placed = Self::new(placement, channels, positions);
        for (c, p) in (0..channels).flat_map(|c| (0..positions).map(move |p| (c, p))) {
            let index = placed.index(c, p);
            placed.values[index] = T::from_f32(integer(index));
        }
        placed
    }

    fn index(&self, channel: usize, position: usize) -> usize {
        (self.origin + self.offset(channel, position)) as usize
    }

    fn offset(&self, channel: usize, position: usize) -> isize {
        let channel = self.channels.as_ref().map_or(channel, |map| map[channel] as usize);
        let offset = match &self.positions {
            Some(table) => table[position],
            None => position as isize * self.position_stride,
        };
        channel as isize * self.channel_stride + offset
    }

    fn operand<P>(&self, ptr: P) -> Operand<'_, P> {
        Operand {
            ptr,
            channel_stride: self.channel_stride,
            position_stride: self.position_stride,
            channels: self.channels.as_deref(),
            positions: self.positions.as_deref(),
        }
    }
}

/// Lists of steps: those that run in registers, and others. All exact on integers.
fn step_lists(channels: usize) -> Vec<Vec<Step>> {
    let relu = || Step::Activation(Activation::Relu);
    let clip = |lo, hi| Step::Activation(Activation::Clip { lo, hi });
    let parameter = |seed| (0..channels).map(|c| integer(c + seed)).collect::<Vec<_>>();
    vec![
        vec![],
        vec![relu()],
        vec![Step::Activation(Activation::Relu6)],
        vec![clip(f32::NEG_INFINITY, 5.0)],
        vec![Step::Residual],
        vec![Step::Residual, clip(-4.0, 9.0)],
        vec![relu(), Step::Residual],
        vec![Step::Affine { scale: parameter(7), shift: parameter(8) }, relu()],
        vec![Step::PRelu { slope: parameter(9) }],
        vec![
            relu(),
            Step::Residual,
            Step::Activation(Activation::LeakyRelu { alpha: 2.0 }),
            Step::Affine { scale: parameter(10), shift: parameter(11) },
        ],
    ]
}

/// One value through the portable vector.
fn through_portable(activation: Activation, x: f32) -> f32 {
    let mut value = [x];
    runs::apply_activation(Isa::Portable.supported().unwrap(), activation, &mut value);
    value[0]
}

/// What `steps` make of a sum, by the scalar definition.
fn expected(mut x: f32, steps: &[Step], channel: usize, residual: f32) -> f32 {
    for step in steps {
        x = match step {
            Step::Affine { scale, shift } => x * scale[channel] + shift[channel],
            Step::PRelu { slope } => {
                if x >= 0.0 {
                    x
                } else {
                    x * slope[channel]
                }
            }
            Step::Residual => x + residual,
            Step::Activation(activation) => through_portable(*activation, x),
        };
    }
    x
}

/// Lengths of the segments of k.
const SEGMENTS: [&[usize]; 8] = [&[], &[0], &[1], &[2], &[7], &[64], &[3, 5], &[0, 4, 1]];

struct Case<'a> {
    sizes: &'a Sizes,
    rows: usize,
    cols: usize,
    /// Tiles along A and along B.
    tiles: [usize; 2],
    /// Whether the tiles along A are the outer ones.
    a_outer: bool,
    axis: ChannelAxis,
    dst: &'a str,
    residual: &'a str,
    steps: &'a [Step],
    segments: &'a [usize],
    strides: usize,
    /// Whether operands lie at the end of their memory, or at its start.
    at_end: bool,
}

impl Case<'_> {
    /// The layer has channels before the tile's, and none after.
    const FIRST_CHANNEL: usize = 2;

    fn check<T: Element>(&self, memories: &mut [Memory]) -> Result<(), String> {
        let tabled = |placement: &str| placement.contains("map") || placement.contains("table");
        let single = tabled(self.dst) || tabled(self.residual);
        let [along_a, along_b] = if single { [1, 1] } else { self.tiles };
        // Rows and lanes of the whole grid.
        let (rows, cols) = (self.rows * along_a, self.cols * along_b);
        let along = |a: isize, b: isize| if self.a_outer { [a, b] } else { [b, a] };
        let channels_are_rows = self.axis == ChannelAxis::Rows;
        let channels = Self::FIRST_CHANNEL + if channels_are_rows { rows } else { cols };
        let positions = if channels_are_rows { cols } else { rows };
        let dst = Placed::<T>::new(self.dst, channels, positions);
        let residual = Placed::<T>::filled(self.residual, channels, positions);
        let (four, mut memories) = memories.split_at_mut(4);
        let [bias_memory, dst_memory, residual_memory, scale_memory] = four else { unreachable!() };
        let bias: Vec<f32> = (0..channels).map(|c| integer(c + 1000)).collect();
        let bias = &*bias_memory.place(&bias, self.at_end);
        let scale: Vec<f32> = match T::DTYPE {
            DType::F32 => Vec::new(),
            _ => (0..channels).map(|c| integer(c + 2000)).collect(),
        };
        let scale = &*scale_memory.place(&scale, self.at_end);
        let values = if self.sizes.terms == TermKind::F32 { 1 } else { 2 };

        let mut sums = vec![0.0f32; rows * cols];
        let mut segments = Vec::new();
        for (s, &k) in self.segments.iter().enumerate() {
            let a_value = |m: usize, k: usize| integer(m * 91 + k * 7 + s * 1003);
            let b_value = |k: usize, j: usize| integer(j * 57 + k * 11 + s * 2003);
            let a_term = |m: usize, k: usize| self.term(k, |k| a_value(m, k));
            let b_term = |k: usize, j: usize| self.term(k, |k| b_value(k, j));
            // Forwards and backwards; nothing follows the last value used. Where channels are
            // rows, A is the packed weight.
            let (a_row, a_k, b_k) = match (channels_are_rows, self.strides) {
                (true, 0) => (1, rows as isize, cols as isize),
                (true, _) => (1, rows as isize + 5, -(cols as isize) - 2),
                (false, 0) => (k as isize + 3, 1, cols as isize),
                (false, 1) => (1, rows as isize + 1, cols as isize),
                (false, _) => (-(k as isize + 1), -1, cols as isize + 8),
            };
            let lay_out = |outer: usize,
                           outer_stride: isize,
                           inner: usize,
                           inner_stride: isize,
                           value: &dyn Fn(usize, usize) -> f32| {
                let offset =
                    |o: usize, i: usize| o as isize * outer_stride + i as isize * inner_stride;
                let all = || (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i)));
                let low = all().map(|(o, i)| offset(o, i)).min().unwrap_or(0);
                let high = all().map(|(o, i)| offset(o, i)).max().unwrap_or(-1);
                let mut memory = vec![f32::NAN; (high - low + 1) as usize];
                for (o, i) in all() {
                    memory[(offset(o, i) - low) as usize] = value(o, i);
                }
                (memory, -low)
            };
            let (a, a_origin) = lay_out(rows, a_row, k, a_k, &a_term);
            let (b, b_origin) = lay_out(k, b_k, cols, 1, &b_term);
            let (two, rest) = memories.split_at_mut(2);
            memories = rest;
            let [a_memory, b_memory] = two else { unreachable!() };
            segments.push(Segment {
                k,
                a: a_memory.place(&a, self.at_end).as_ptr().wrapping_offset(a_origin),
                a_row,
                a_k,
                a_step: along(self.rows as isize * a_row, 0),
                b: b_memory.place(&b, self.at_end).as_ptr().wrapping_offset(b_origin),
                b_k,
                b_step: along(0, self.cols as isize),
            });
            for m in 0..rows {
                for j in 0..cols {
                    for k in 0..values * k {
                        sums[m * cols + j] += a_value(m, k) * b_value(k, j);
                    }
                }
            }
        }

        let mut want = dst.values.clone();
        for m in 0..rows {
            for j in 0..cols {
                let (row, position) = if channels_are_rows { (m, j) } else { (j, m) };
                let channel = Self::FIRST_CHANNEL + row;
                let add = residual.values[residual.index(channel, position)].to_f32();
                let scale = scale.get(channel).unwrap_or(&1.0);
                let sum = sums[m * cols + j] * scale + bias[channel];
                let x = expected(sum, self.steps, channel, add);
                want[dst.index(channel, position)] = T::from_f32(x);
            }
        }

        // Canaries lie where no page guards dst.
        const FENCE: usize = 64;
        let fences = if self.at_end { [FENCE, 0] } else { [0, FENCE] };
        let canary = T::from_f32(CANARY);
        let fence = [canary; FENCE];
        let fenced = [&fence[..fences[0]], &want, &fence[..fences[1]]].concat();
        let blank = vec![canary; fenced.len()];
        let memory = dst_memory.place(&blank, self.at_end);
        let origin = fences[0] as isize + dst.origin;
        let residual_values = residual_memory.place(&residual.values, self.at_end).as_ptr();
        let steps = Steps::new(self.steps.to_vec());
        let epilogue = TileEpilogue {
            axis: self.axis,
            channel: Self::FIRST_CHANNEL,
            scale,
            bias,
            steps: &steps,
            residual: self
                .steps
                .contains(&Step::Residual)
                .then(|| residual.operand(residual_values.wrapping_offset(residual.origin))),
            dst: dst.operand(memory.as_mut_ptr().wrapping_offset(origin)),
        };
        let rows_step = along(self.rows as isize, 0).map(|step| step as usize);
        let cols_step = along(0, self.cols as isize).map(|step| step as usize);
        let grid = Grid {
            rows: self.rows,
            cols: self.cols,
            tiles: along(along_a as isize, along_b as isize).map(|tiles| tiles as usize),
            ahead: 64,
            far_dst: true,
            segments: &segments,
            epilogue: T::any(&epilogue),
            channel_step: if channels_are_rows { rows_step } else { cols_step },
            position_step: if channels_are_rows { cols_step } else { rows_step },
        };
        // SAFETY: the test asked whether the CPU has the ISA; the operands cover the grid.
        unsafe { (self.sizes.run)(&grid) };
        for (i, (got, want)) in memory.iter().zip(&fenced).enumerate() {
            let (got, want) = (got.to_f32(), want.to_f32());
            let same = if want.is_nan() { got.to_bits() == want.to_bits() } else { got == want };
            if !same {
                let at = i as isize - origin;
                return Err(format!("{self:?}, {}: dst[{at}] is {got}, not {want}", T::DTYPE));
            }
        }
        Ok(())
    }

    /// What A or B holds at `k`: a value, or a pair of them.
    fn term(&self, k: usize, value: impl Fn(usize) -> f32) -> f32 {
        let bits = |k: usize| u32::from(bf16::from_f32(value(k)).to_bits());
        match self.sizes.terms {
            TermKind::F32 => value(k),
            TermKind::Bf16Pair => f32::from_bits(bits(2 * k) | bits(2 * k + 1) << 16),
        }
    }

    /// Checks the types that are stored by a way of their own, all of them or one in turn.
    fn check_types(&self, count: usize, memories: &mut [Memory]) -> Result<(), String> {
        if self.sizes.terms == TermKind::Bf16Pair && !count.is_multiple_of(4) {
            return self.check::<bf16>(memories);
        }
        match count % 4 {
            2 => self.check::<f16>(memories),
            3 => self.check::<bf16>(memories),
            _ => self.check::<f32>(memories),
        }
    }
}

impl std::fmt::Debug for Case<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {:?} {}x{} {:?}, {:?} tiles, A outer {}, dst {}, residual {}, {:?}, k {:?}, strides {}",
            self.sizes.isa.name(),
            self.sizes.terms,
            self.rows,
            self.cols,
            self.axis,
            self.tiles,
            self.a_outer,
            self.dst,
            self.residual,
            self.steps,
            self.segments,
            self.strides,
        )
    }
}

/// The sizes of each instruction set of this CPU.
fn supported_sizes() -> impl Iterator<Item = &'static Sizes> {
    let mut all: Vec<&Sizes> = Vec::new();
    for kernel in KERNELS {
        if all.iter().any(|sizes| std::ptr::eq(*sizes, kernel.sizes)) {
            continue;
        }
        match kernel.sizes.unavailable() {
            None => all.push(kernel.sizes),
            Some(reason) => eprintln!("skipped: {} ({reason})", kernel.name),
        }
    }
    all.into_iter()
}

/// Every number of rows and lanes that fits into registers.
fn tile_sizes(sizes: &Sizes) -> impl Iterator<Item = (usize, usize)> {
    let most = sizes.most_rows.last().unwrap().0;
    (1..=most).flat_map(|cols| (1..=sizes.rows(cols)).map(move |rows| (rows, cols)))
}

#[test]
fn every_size_is_exact_with_every_epilogue_and_placement() {
    sweep(&mut memories(Memory::guarded));
}

/// The same where a memory checker sees both ends of every operand, and what is uninitialised.
#[test]
#[ignore = "for valgrind: see .ci/run"]
fn every_size_on_the_heap() {
    sweep(&mut memories(|| Memory::Heap(Vec::new())));
}

fn sweep(memories: &mut [Memory]) {
    for sizes in supported_sizes() {
        let mut count = 0;
        for (rows, cols) in tile_sizes(sizes) {
            for axis in [ChannelAxis::Rows, ChannelAxis::Lanes] {
                for dst in PLACEMENTS {
                    for steps in step_lists(Case::FIRST_CHANNEL + 3 * rows.max(cols)) {
                        let case = Case {
                            sizes,
                            rows,
                            cols,
                            tiles: [1 + count % 11 % 3, 1 + count % 17 % 3],
                            a_outer: count % 13 % 2 == 0,
                            axis,
                            dst,
                            residual: if count % 3 == 0 {
                                PLACEMENTS[count / 3 % PLACEMENTS.len()]
                            } else {
                                dst
                            },
                            steps: &steps,
                            segments: SEGMENTS[count / 2 % SEGMENTS.len()],
                            strides: count / 5 % 3,
                            at_end: count % 7 % 2 == 0,
                        };
                        case.check_types(count / 7, memories).unwrap();
                        count += 1;
                    }
                }
            }
        }
        eprintln!("{}, {:?}: {count} grids", sizes.isa.name(), sizes.terms);
    }
}

#[test]
fn activations_reach_every_lane() {
    let mut memories = memories(Memory::guarded);
    let steps = [Step::Activation(Activation::HardSwish), Step::Residual];
    for sizes in supported_sizes() {
        for (rows, cols) in tile_sizes(sizes).filter(|(rows, cols)| (rows + cols) % 5 == 0) {
            for (axis, dst) in [ChannelAxis::Rows, ChannelAxis::Lanes]
                .into_iter()
                .flat_map(|axis| PLACEMENTS.map(|dst| (axis, dst)))
            {
                let case = Case {
                    sizes,
                    rows,
                    cols,
                    tiles: [1, 2],
                    a_outer: true,
                    axis,
                    dst,
                    residual: dst,
                    steps: &steps,
                    segments: &[2],
                    strides: 0,
                    at_end: true,
                };
                case.check_types(rows + cols / 5, &mut memories).unwrap();
            }
        }
    }
}

/// The order of the sum is that of k alone: every tile that covers a value computes the same bits.
#[test]
fn a_value_does_not_depend_on_its_tile() {
    let k = 97;
    let wild = |seed: usize| ((seed * 7919 % 1009) as f32 - 504.0) * 0.001_37;
    let steps = Steps::new(vec![]);
    for sizes in supported_sizes() {
        let wild = |seed: usize| match sizes.terms {
            TermKind::F32 => wild(seed),
            // Both halves are values.
            TermKind::Bf16Pair => {
                let bits = bf16::from_f32(wild(seed)).to_bits();
                f32::from_bits(u32::from(bits) << 16 | u32::from(bits ^ 0x8021))
            }
        };
        let a: Vec<f32> = (0..k * 64).map(wild).collect();
        let b: Vec<f32> = (0..k * 64).map(|i| wild(i + 13)).collect();
        let run = |rows: usize, cols: usize, first_row: usize, first_lane: usize| {
            let mut dst = vec![f32::NAN; 64 * 64];
            let epilogue = TileEpilogue {
                axis: ChannelAxis::Rows,
                channel: 0,
                scale: &[],
                bias: &[0.0; 64],
                steps: &steps,
                residual: None,
                dst: Operand {
                    ptr: dst.as_mut_ptr(),
                    channel_stride: 64,
                    position_stride: 1,
                    channels: None,
                    positions: None,
                },
            };
            let segment = Segment {
                k,
                a: a[first_row..].as_ptr(),
                a_row: 1,
                a_k: 64,
                a_step: [0, 0],
                b: b[first_lane..].as_ptr(),
                b_k: 64,
                b_step: [0, 0],
            };
            let grid = Grid {
                rows,
                cols,
                tiles: [1, 1],
                ahead: 0,
                far_dst: false,
                segments: &[segment],
                epilogue: f32::any(&epilogue),
                channel_step: [0, 0],
                position_step: [0, 0],
            };
            // SAFETY: the ISA was checked, and the operands cover the tile.
            unsafe { (sizes.run)(&grid) };
            dst
        };
        for &(cols, rows) in sizes.most_rows {
            let whole = run(rows, cols, 0, 0);
            for (row, lane) in (0..rows).flat_map(|row| (0..cols).map(move |lane| (row, lane))) {
                let alone = run(1, 1, row, lane)[0];
                assert_eq!(alone.to_bits(), whole[row * 64 + lane].to_bits(), "{sizes:?}");
            }
        }
    }
}

#[test]
fn kernels_are_named_by_their_tile_which_fits_into_registers() {
    for Kernel { name, dtype, mr, nr, sizes } in KERNELS {
        // Kernels of AVX-512 that multiply another type than they store are named apart.
        let wide = sizes.isa == Isa::Avx512 && *dtype != DType::F32;
        let f = if wide && sizes.terms == TermKind::F32 { "f" } else { "" };
        assert_eq!(*name, format!("fprop_{dtype}_{}{f}_{mr}x{nr}", sizes.isa.name()));
        assert!(*mr <= sizes.rows(*nr), "{name}");
    }
}
