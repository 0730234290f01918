//! The kernels there are, and which of them runs a problem: pure functions of the problem's letters
//! and the device's facts.

use super::facts::Facts;
use super::scratch::Need;
use crate::dtype::DType;

/// What a kernel multiplies with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// The FMA units: f32 products, exact but for the rounding of their sums.
    Simt,
    /// Tensor cores: operands rounded to TF32, f32 sums.
    Tf32,
    /// Tensor cores: operands as sums of two TF32 values, three products for one, f32 sums.
    Tf32x3,
    /// Tensor cores: operands of 16 bits, f32 sums.
    Pairs,
    /// The same, before asynchronous copies: f16 only, and not compiled for later chips.
    PairsSm75,
}

impl Family {
    /// The first compute capability that has it.
    pub(crate) fn oldest(self) -> (u32, u32) {
        match self {
            Family::Simt | Family::PairsSm75 => (7, 5),
            Family::Tf32 | Family::Tf32x3 | Family::Pairs => (8, 0),
        }
    }
}

/// A kernel of `kernels/kernels.def`, which says what the numbers mean.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// `fprop_{dtype}_{isa}_{rows}x{positions}x{depth}_{layout}`, also its symbol.
    pub name: &'static str,
    pub family: Family,
    /// What its tensors hold.
    pub dtype: DType,
    pub tile: Tile,
    /// A thread's share of the tile.
    pub slow: u32,
    pub fast: u32,
    /// Neighbours along the fast axis that it stores at once.
    pub vector: u32,
    pub threads: u32,
    /// Whether it stores along channels (NHWC) instead of positions (NCHW).
    pub channels_fast: bool,
}

/// A kernel for layers of 8-bit integers (on every chip) or of fp8, likewise; for dst in either layout.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ByteKernel {
    /// `fprop_i8_mma_{rows}x{positions}x{depth}` or `fprop_fp8_sm89_…`, also its symbol.
    pub name: &'static str,
    pub tile: Tile,
    pub threads: u32,
}

/// What a block of a kernel computes, and what it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Output channels.
    pub rows: u32,
    pub positions: u32,
    /// Of a slab: the input channels that are summed at once.
    pub depth: u32,
    /// Blocks of a multiprocessor that the kernel's registers are for.
    pub blocks_per_sm: u32,
    /// Shared memory of a block.
    pub shared_bytes: u32,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The kernels that go before or after those of [`KERNELS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Helper {
    /// Copies channels that pass through, of 32 bits.
    Copy,
    /// Of 16 bits.
    CopyHalf,
    /// Layer norm of what a convolution has left, to each dtype.
    Norm,
    NormF16,
    NormBf16,
    /// Moments of neighbours as one.
    Merge,
    /// How far values reach that share a quantisation.
    Reach,
    /// Bytes of values.
    Quantize,
}

impl Helper {
    pub(super) const ALL: [Helper; 8] = [
        Helper::Copy,
        Helper::CopyHalf,
        Helper::Norm,
        Helper::NormF16,
        Helper::NormBf16,
        Helper::Merge,
        Helper::Reach,
        Helper::Quantize,
    ];
    pub(super) const THREADS: u32 = 256;
    /// Channels of a block of [`Helper::Copy`].
    pub(super) const COPY_CHANNELS: u64 = 32;

    pub(super) fn copy(dtype: DType) -> Helper {
        match dtype {
            DType::F32 => Helper::Copy,
            DType::F16 | DType::Bf16 => Helper::CopyHalf,
        }
    }

    pub(super) fn norm(dtype: DType) -> Helper {
        match dtype {
            DType::F32 => Helper::Norm,
            DType::F16 => Helper::NormF16,
            DType::Bf16 => Helper::NormBf16,
        }
    }

    pub(super) fn is_norm(self) -> bool {
        matches!(self, Helper::Norm | Helper::NormF16 | Helper::NormBf16)
    }

    /// Also its symbol.
    pub(super) fn name(self) -> &'static str {
        match self {
            Helper::Copy => "copy_f32_32x64",
            Helper::CopyHalf => "copy_b16_32x64",
            Helper::Norm => "norm_f32_8x32",
            Helper::NormF16 => "norm_f16_8x32",
            Helper::NormBf16 => "norm_bf16_8x32",
            Helper::Merge => "norm_merge_f64_1024",
            Helper::Reach => "reach_f32_8x32",
            Helper::Quantize => "quantize_f32_8x32",
        }
    }

    /// Positions of a block; the moments that one takes.
    pub(super) fn positions(self) -> u64 {
        match self {
            Helper::Copy | Helper::CopyHalf => 64,
            Helper::Norm | Helper::NormF16 | Helper::NormBf16 => 32,
            Helper::Reach | Helper::Quantize => 32,
            Helper::Merge => 1024,
        }
    }
}

/// The kernels of training beside those of [`KERNELS`], which multiply for dgrad as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Training {
    /// Moments of what reaches a batch norm.
    Moments,
    /// A chain of stages on their input.
    Forward,
    /// The sums of a batch norm's backward pass.
    Sums,
    /// A chain's gradients, and their sums.
    Backward,
    /// Sums over the rows of positions: a layer norm's statistics, or those of its gradient.
    Norm,
    /// Which values lie inside bounds.
    Bits,
    /// Sums of neighbours.
    Sum,
    /// Gradients by the weight.
    Wgrad,
    /// The same on tensor cores, of 16 bits or TF32, by a small and by a large tile.
    WgradF16,
    WgradF16Large,
    WgradBf16,
    WgradBf16Large,
    WgradTf32,
    WgradTf32Large,
    /// Those of several splits as one.
    WgradSum,
}

impl Training {
    pub(super) const ALL: [Training; 15] = [
        Training::Moments,
        Training::Forward,
        Training::Sums,
        Training::Backward,
        Training::Norm,
        Training::Bits,
        Training::Sum,
        Training::Wgrad,
        Training::WgradF16,
        Training::WgradF16Large,
        Training::WgradBf16,
        Training::WgradBf16Large,
        Training::WgradTf32,
        Training::WgradTf32Large,
        Training::WgradSum,
    ];

    /// The oldest chip that has it.
    pub(super) fn oldest(self) -> (u32, u32) {
        match self {
            Training::WgradBf16
            | Training::WgradBf16Large
            | Training::WgradTf32
            | Training::WgradTf32Large => (8, 0),
            _ => (0, 0),
        }
    }

    /// Of a block.
    pub(super) fn threads(self) -> u32 {
        match self {
            Training::WgradF16 | Training::WgradBf16 | Training::WgradTf32 => 128,
            _ => Helper::THREADS,
        }
    }

    /// Shared memory that a launch brings.
    pub(super) fn shared_bytes(self) -> u32 {
        match self {
            Training::WgradF16 | Training::WgradBf16 => 34816,
            Training::WgradF16Large | Training::WgradBf16Large => 50688,
            Training::WgradTf32 => 33792,
            Training::WgradTf32Large => 49920,
            _ => 0,
        }
    }

    /// Also its symbol.
    pub(super) fn name(self) -> &'static str {
        match self {
            Training::Moments => "train_moments_f32_32x8",
            Training::Forward => "train_forward_f32_32x8",
            Training::Sums => "train_sums_f32_32x8",
            Training::Backward => "train_backward_f32_32x8",
            Training::Norm => "train_norm_f32_8x32",
            Training::Bits => "train_bits_f32_256",
            Training::Sum => "train_sum_f64_8x32",
            Training::Wgrad => "wgrad_f32_simt_64x64x16",
            Training::WgradF16 => "wgrad_f16_mma_64x64x32",
            Training::WgradF16Large => "wgrad_f16_mma_128x128x32",
            Training::WgradBf16 => "wgrad_bf16_mma_64x64x32",
            Training::WgradBf16Large => "wgrad_bf16_mma_128x128x32",
            Training::WgradTf32 => "wgrad_tf32_mma_64x64x16",
            Training::WgradTf32Large => "wgrad_tf32_mma_128x128x16",
            Training::WgradSum => "wgrad_sum_f32_256",
        }
    }
}

impl Tile {
    /// Tiles that cover a problem; saturates, which the grid then refuses.
    pub(crate) fn count(&self, problem: &Letters) -> u64 {
        let rows = u64::from(problem.rows.div_ceil(self.rows));
        let positions = problem.positions.div_ceil(u64::from(self.positions));
        rows.saturating_mul(u64::from(problem.groups)).saturating_mul(positions)
    }

    /// Outputs.
    fn area(&self) -> f64 {
        f64::from(self.rows * self.positions)
    }

    /// What blocks that share tiles leave for one another; `None` if no memory holds it.
    pub(crate) fn scratch(&self, problem: &Letters, splits: u32) -> Option<Need> {
        if splits == 1 {
            return Some(Need::default());
        }
        let tiles = usize::try_from(self.count(problem)).ok()?;
        let area = (self.rows * self.positions) as usize;
        let sums = tiles.checked_mul(area)?.checked_mul(splits as usize)?;
        // Addresses and paddings must fit, too.
        (sums < usize::MAX / 16).then_some(Need { sums, tiles })
    }

    /// How deep the sums are, in slabs; no split has less than one.
    pub(crate) fn slabs(&self, problem: &Letters) -> u32 {
        problem.depth.div_ceil(self.depth)
    }

    /// How many blocks a multiprocessor works on at a time: as many as it has registers for, but no
    /// more than its shared memory holds, of which the driver takes a part for each.
    fn at_once(&self, facts: &Facts) -> u64 {
        let bytes = self.shared_bytes + facts.shared_per_block;
        let fit = facts.shared_bytes / bytes.max(1);
        self.blocks_per_sm.min(fit).max(1).into()
    }

    /// In how many splits a problem may run: one, unless blocks may `share` tiles, which they do only where
    /// all of them run at once.
    fn splits(
        &self,
        problem: &Letters,
        facts: &Facts,
        share: bool,
    ) -> impl Iterator<Item = u32> + use<> {
        let room = u64::from(facts.multiprocessors) * self.at_once(facts);
        let most = (room / self.count(problem).max(1)).min(self.slabs(problem).into()).max(1);
        let most = if share { most } else { 1 };
        SPLITS.into_iter().take_while(move |&splits| u64::from(splits) <= most)
    }

    /// The number of splits that is asked for, as far as there are slabs, or else the one of
    /// [`splits`](Self::splits) with the least estimate; and its estimate.
    fn best_splits(
        &self,
        problem: &Letters,
        facts: &Facts,
        (asked, share): (Option<u32>, bool),
        estimate: impl Fn(u32) -> f64,
    ) -> (u32, f64) {
        if let Some(splits) = asked {
            let splits = splits.min(self.slabs(problem)).max(1);
            return (splits, estimate(splits));
        }
        let costs = self.splits(problem, facts, share).map(|splits| (splits, estimate(splits)));
        // The first of equals.
        costs.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((1, f64::INFINITY))
    }

    /// The blocks of the busiest multiprocessor, which works on [`at_once`](Self::at_once) of them at a
    /// time: a last round of fewer leaves it waiting, and counts as `least` of a full one at least.
    fn busiest(&self, problem: &Letters, splits: u32, facts: &Facts, least: f64) -> f64 {
        let blocks = self.count(problem).saturating_mul(u64::from(splits));
        let blocks = blocks.div_ceil(u64::from(facts.multiprocessors));
        let at_once = self.at_once(facts);
        let last = match blocks % at_once {
            0 => 0.0,
            blocks => (blocks as f64).max(least * at_once as f64),
        };
        (blocks / at_once * at_once) as f64 + last
    }

    /// How a problem would run, in words.
    pub(crate) fn describe(&self, problem: &Letters, splits: u32, facts: &Facts) -> String {
        let shared = match splits {
            1 => String::new(),
            splits => format!(", each shared by {splits} blocks of {} slabs", {
                let slabs = self.slabs(problem);
                if slabs.is_multiple_of(splits) {
                    (slabs / splits).to_string()
                } else {
                    format!("{} or {}", slabs / splits, slabs / splits + 1)
                }
            }),
        };
        format!(
            "{} tiles of {} channels x {} positions{shared} on {} multiprocessors",
            self.count(problem),
            self.rows,
            self.positions,
            facts.multiprocessors,
        )
    }
}

/// What it costs that so many blocks share a tile: for each of its outputs, which every block writes and the
/// last one reads `per_split`, and once, for waiting for memory a few times.
fn sharing(splits: u32, per_split: f64) -> (f64, f64) {
    match splits {
        1 => (0.0, 0.0),
        splits => (8.0 + per_split * f64::from(splits), 3e5),
    }
}

/// In how many splits the channels of a tile may be summed.
const SPLITS: [u32; 10] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];

/// The largest grid along x and along y.
const GRID: (u64, u64) = (i32::MAX as u64, 65_535);

/// A problem as the choice sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Letters {
    pub groups: u32,
    /// Output channels per group.
    pub rows: u32,
    /// Input channels per group.
    pub depth: u32,
    /// Of all samples.
    pub positions: u64,
    /// Whether dst's channels lie closer together than its positions.
    pub channels_fast: bool,
}

/// What the choice must heed besides the problem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Sums must not depend on how many positions there are.
    pub batch_invariant: bool,
    /// What the tensors hold.
    pub dtype: DType,
    /// Operands may be rounded to TF32.
    pub tf32: bool,
    pub forced: Option<Forced>,
}

/// What a user asks for by name: `kernel`, or `kernel/splits`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forced {
    pub kernel: &'static str,
    pub splits: Option<u32>,
}

impl Forced {
    /// One of the kernels of these names.
    ///
    /// # Errors
    /// The reason, if there is no such kernel or no such number.
    pub(crate) fn parse(text: &str, names: &[&'static str]) -> Result<Forced, String> {
        let (name, splits) = match text.split_once('/') {
            Some((name, splits)) => (name, Some(splits)),
            None => (text, None),
        };
        let number = |text: &str| text.parse().ok().filter(|&n: &u32| n > 0);
        let splits = match splits.map(number) {
            Some(None) => return Err("what follows the / is how many blocks share a sum".into()),
            Some(splits) => splits,
            None => None,
        };
        match names.iter().find(|known| **known == name) {
            Some(kernel) => Ok(Forced { kernel, splits }),
            None => Err(format!("this device has {}", names.join(", "))),
        }
    }
}

/// A kernel, an index of [`KERNELS`] or of those for bytes, and how many blocks share the depth of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub kernel: usize,
    pub splits: u32,
}

impl Kernel {
    /// The shared memory that a launch brings: on the FMA units kernels declare theirs.
    pub(crate) fn brought_bytes(&self) -> u32 {
        if self.family == Family::Simt { 0 } else { self.tile.shared_bytes }
    }

    /// The grid that holds this many blocks, or a few more; `None` if none does.
    pub(crate) fn grid(tiles: u64) -> Option<(u32, u32)> {
        let y = tiles.div_ceil(GRID.0).max(1);
        let x = tiles.div_ceil(y).max(1);
        (y <= GRID.1).then_some((x as u32, y as u32))
    }

    /// Why this kernel cannot run a layer, whatever the problem: words for who asks, as every call
    /// looks whether there are any.
    pub(crate) fn refusal(&self, facts: &Facts, terms: &Terms) -> Option<fn(&Facts) -> String> {
        let forced = terms.forced.is_some_and(|forced| forced.kernel == self.name);
        if self.dtype != terms.dtype {
            return Some(match self.dtype {
                DType::F32 => |_| "it takes tensors of f32".into(),
                DType::F16 => |_| "it takes tensors of f16".into(),
                DType::Bf16 => |_| "it takes tensors of bf16".into(),
            });
        }
        match self.family {
            Family::Tf32 if !terms.tf32 => {
                Some(|_| "it rounds operands to TF32, which needs Math::Tf32".into())
            }
            Family::Tf32 | Family::Tf32x3 if !facts.sm80 => Some(no_tf32),
            Family::Tf32x3 if terms.tf32 => Some(|_| {
                "its three products gain nothing over one of weights rounded to TF32".into()
            }),
            // Tensor cores do not say how they round.
            Family::Tf32x3 if !forced => Some(|_| {
                "it runs only where its name asks for it: no GPU has shown it to be faster".into()
            }),
            Family::Pairs if !facts.sm80 => Some(|facts| {
                let (major, minor) = facts.compute_capability;
                format!("not on compute capability {major}.{minor} in this build, it is for 8.0 on")
            }),
            Family::PairsSm75 if !facts.sm75 => {
                Some(|_| "it is for chips before compute capability 8.0".into())
            }
            Family::Simt if facts.multiplies(terms) && terms.batch_invariant && !forced => {
                Some(|_| {
                    "its sums are not those of the tensor cores, and must not depend on the batch"
                        .into()
                })
            }
            _ => None,
        }
    }

    /// Whether it can read eight elements of a source at once.
    pub(crate) fn reads_eight(&self) -> bool {
        matches!(self.family, Family::Pairs | Family::PairsSm75)
    }

    /// The time that the busiest multiprocessor needs, in units that compare kernels: products of
    /// one lane.
    ///
    /// A tile costs its products, padding included, and they run the slower, the more operands a
    /// thread reads from shared memory per product; then come its first reads, which nothing hides,
    /// and its stores, which touch a sector per element if they go across the memory order. The weights of
    /// kernels on the FMA units and of 16 bits are those that lose least over the layers of
    /// `benches/layers.csv` on an H100.
    ///
    /// Where blocks share a tile, each has its part of the depth. The weights of that, but for 16 bits, and
    /// those of TF32 are computed from latencies and bandwidths, and not measured.
    fn estimate(&self, problem: &Letters, splits: u32, facts: &Facts) -> f64 {
        let least = match self.family {
            Family::Simt | Family::Pairs => 0.75,
            _ => 0.3,
        };
        let tiles = self.tile.busiest(problem, splits, facts, least);
        let product = match self.family {
            Family::Simt => {
                let (slow, fast) = (f64::from(self.slow), f64::from(self.fast));
                1.0 + (slow + fast) / (slow * fast)
            }
            // Tensor cores outrun shared memory and L2, which then set the pace.
            family => {
                let (rows, positions) = (f64::from(self.tile.rows), f64::from(self.tile.positions));
                let (products, traffic) = match family {
                    Family::Tf32x3 => (0.6, 16.0),
                    Family::Pairs => (0.1, 8.0),
                    // One product of TF32; or copies that wait.
                    _ => (0.2, 16.0),
                };
                products + traffic * (1.0 / rows + 1.0 / positions)
            }
        };
        let depth = f64::from(self.tile.slabs(problem).div_ceil(splits) * self.tile.depth);
        let ends = match (self.family, self.channels_fast == problem.channels_fast) {
            (Family::Pairs, true) => 10.0,
            (Family::Pairs, false) => 40.0,
            (_, true) => 72.0,
            (_, false) => 128.0,
        };
        let per_split = if self.family == Family::Pairs { 16.0 } else { 8.0 };
        let (sharing, waiting) = sharing(splits, per_split);
        tiles * self.tile.area() * (depth * product + ends + sharing) + waiting
    }

    /// In how many splits it may run a problem.
    fn splits(
        &self,
        problem: &Letters,
        facts: &Facts,
        terms: &Terms,
    ) -> impl Iterator<Item = u32> + use<> {
        self.tile.splits(problem, facts, !terms.batch_invariant)
    }

    /// The number of splits with the least estimate, and that.
    fn best_splits(&self, problem: &Letters, facts: &Facts, terms: &Terms) -> (u32, f64) {
        let forced = terms.forced.filter(|forced| forced.kernel == self.name);
        let asked = forced.and_then(|forced| forced.splits);
        let estimate = |splits| self.estimate(problem, splits, facts);
        self.tile.best_splits(problem, facts, (asked, !terms.batch_invariant), estimate)
    }
}

impl ByteKernel {
    /// As [`Kernel::estimate`], with weights computed from data sheets: operands are a quarter of
    /// f32's, sums that blocks share are as large as those of 16 bits.
    fn estimate(&self, problem: &Letters, splits: u32, facts: &Facts) -> f64 {
        let tiles = self.tile.busiest(problem, splits, facts, 0.3);
        let (rows, positions) = (f64::from(self.tile.rows), f64::from(self.tile.positions));
        let product = 0.05 + 4.0 * (1.0 / rows + 1.0 / positions);
        let depth = f64::from(self.tile.slabs(problem).div_ceil(splits) * self.tile.depth);
        let (sharing, waiting) = sharing(splits, 16.0);
        tiles * self.tile.area() * (depth * product + 72.0 + sharing) + waiting
    }
}

/// How a problem runs on kernels for bytes: as forced, or with the least estimate. `share` says whether
/// blocks may share sums unasked.
pub(crate) fn choose_bytes(
    kernels: &[ByteKernel],
    problem: &Letters,
    facts: &Facts,
    forced: Option<Forced>,
    share: bool,
) -> Choice {
    let takes = |kernel: &ByteKernel| forced.is_none_or(|forced| forced.kernel == kernel.name);
    let kernels = kernels.iter().enumerate().filter(|(_, kernel)| takes(kernel));
    let asked = forced.and_then(|forced| forced.splits);
    let costs = kernels.map(|(index, kernel)| {
        let estimate = |splits| kernel.estimate(problem, splits, facts);
        let (splits, cost) = kernel.tile.best_splits(problem, facts, (asked, share), estimate);
        (Choice { kernel: index, splits }, cost)
    });
    // The first of equals.
    let best = costs.min_by(|a, b| a.1.total_cmp(&b.1));
    best.map_or(Choice { kernel: 0, splits: 1 }, |(choice, _)| choice)
}

/// How a problem runs: on the forced kernel, or on the one with the least estimate.
pub(crate) fn choose(problem: &Letters, facts: &Facts, terms: &Terms) -> Choice {
    let forced = |kernel: &Kernel| terms.forced.is_some_and(|forced| forced.kernel == kernel.name);
    // There is one for every dtype that refuses no problem.
    let mut best = (Choice { kernel: 0, splits: 1 }, f64::INFINITY);
    for (index, kernel) in KERNELS.iter().enumerate() {
        if kernel.refusal(facts, terms).is_some() {
            continue;
        }
        let (splits, cost) = kernel.best_splits(problem, facts, terms);
        let choice = Choice { kernel: index, splits };
        if forced(kernel) {
            return choice;
        }
        // The first of equals, as in the sorted list.
        if cost < best.1 {
            best = (choice, cost);
        }
    }
    best.0
}

/// Every way in which a problem may run, but for kernels that refuse it.
pub(crate) fn allowed(problem: &Letters, facts: &Facts, terms: &Terms) -> Vec<Choice> {
    let kernels = KERNELS.iter().enumerate();
    kernels
        .filter(|(_, kernel)| kernel.refusal(facts, terms).is_none())
        .flat_map(|(index, kernel)| {
            let splits = kernel.splits(problem, facts, terms);
            splits.map(move |splits| Choice { kernel: index, splits })
        })
        .collect()
}

/// All kernels for these tensors, the best first, those that refuse the layer last.
pub(crate) fn ranked(problem: &Letters, facts: &Facts, terms: &Terms) -> Vec<Choice> {
    let kernels = KERNELS.iter().enumerate().filter(|(_, kernel)| kernel.dtype == terms.dtype);
    let costs = kernels.map(|(index, kernel)| match kernel.refusal(facts, terms) {
        Some(_) => (index, (1, f64::INFINITY)),
        None => (index, kernel.best_splits(problem, facts, terms)),
    });
    let mut all: Vec<(Choice, f64)> =
        costs.map(|(kernel, (splits, cost))| (Choice { kernel, splits }, cost)).collect();
    all.sort_by(|a, b| a.1.total_cmp(&b.1));
    all.into_iter().map(|(choice, _)| choice).collect()
}

/// Why a device multiplies in f32 although TF32 would do.
pub(crate) fn no_tf32(facts: &Facts) -> String {
    let (major, minor) = facts.compute_capability;
    if facts.compute_capability < Family::Tf32.oldest() {
        format!("no TF32 on compute capability {major}.{minor}, tensor cores have it from 8.0 on")
    } else {
        "no TF32 kernels in this build: POINTWISE_CUDA_ARCHS names older chips only".into()
    }
}

/// How a kernel would run a problem, in words.
pub(crate) fn describe(choice: Choice, problem: &Letters, facts: &Facts) -> String {
    let kernel = &KERNELS[choice.kernel];
    let used = problem.rows as f64 * problem.positions as f64 * f64::from(problem.groups)
        / (kernel.tile.count(problem) as f64 * kernel.tile.area()).max(1.0);
    let along = if kernel.channels_fast { "channels" } else { "positions" };
    format!(
        "{}, {:.0} % of them filled, stores along {along}",
        kernel.tile.describe(problem, choice.splits, facts),
        used * 100.0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::Roof;

    fn facts() -> Facts {
        Facts {
            name: "test".into(),
            compute_capability: (8, 0),
            multiprocessors: 108,
            sm75: false,
            sm80: true,
            l2_bytes: 40 << 20,
            memory_bytes: 40 << 30,
            shared_bytes: 164 << 10,
            shared_per_block: 1 << 10,
            roof: Roof { flops_per_second: 1.95e13, bytes_per_second: 1.5e12 },
        }
    }

    fn chosen(rows: u32, depth: u32, positions: u64, channels_fast: bool) -> &'static str {
        let problem = Letters { groups: 1, rows, depth, positions, channels_fast };
        KERNELS[choose(&problem, &facts(), &Terms::default()).kernel].name
    }

    fn splits(rows: u32, depth: u32, positions: u64, batch_invariant: bool) -> u32 {
        let problem = Letters { groups: 1, rows, depth, positions, channels_fast: false };
        choose(&problem, &facts(), &Terms { batch_invariant, ..Terms::default() }).splits
    }

    #[test]
    fn blocks_share_tiles_where_there_are_few_of_them_and_sums_are_deep() {
        assert!((8..=32).contains(&splits(512, 2048, 49, false)), "resnet50 s4.c1b at n = 1");
        assert!(splits(24, 512, 196, false) > 1, "googlenet 4b.5x5r at n = 1");
        assert_eq!(splits(512, 2048, 49, true), 1);
        assert!(splits(512, 2048, 32 * 49, false) > 1, "resnet50 s4.c1b at n = 32");
        assert_eq!(splits(512, 2048, 32 * 784, false), 1);
        assert_eq!(splits(64, 64, 3136, false), 1);
        assert_eq!(splits(1, 1, 1, false), 1);
    }

    #[test]
    fn a_forced_number_of_splits_is_taken_as_far_as_there_are_slabs() {
        let name = KERNELS[0].name;
        let parse = |text: &str| Forced::parse(text, &[KERNELS[1].name, name]);
        let forced = parse(&format!("{name}/5"));
        assert_eq!(forced, Ok(Forced { kernel: name, splits: Some(5) }));
        let terms = Terms { batch_invariant: true, forced: forced.ok(), ..Terms::default() };
        let problem =
            |depth| Letters { groups: 1, rows: 9, depth, positions: 1 << 20, channels_fast: false };
        let splits = |depth| choose(&problem(depth), &facts(), &terms).splits;
        let slab = KERNELS[0].tile.depth;
        assert_eq!([1, 2 * slab, 2 * slab + 1, 100 * slab].map(splits), [1, 2, 3, 5]);
        assert_eq!(parse(name), Ok(Forced { kernel: name, splits: None }));
        for wrong in ["", "fprop", "/2", &format!("{name}/"), &format!("{name}/0")] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_follow_the_grammar_and_say_what_the_kernel_is() {
        for kernel in KERNELS {
            let layout = if kernel.channels_fast { "nhwc" } else { "nchw" };
            let Tile { rows: c, positions: p, depth: d, blocks_per_sm, .. } = kernel.tile;
            let isa = match kernel.family {
                Family::Simt => format!("{}_simt", kernel.dtype),
                Family::Tf32 => "tf32_sm80".into(),
                Family::Tf32x3 => "f32_sm80".into(),
                Family::Pairs => format!("{}_sm80", kernel.dtype),
                Family::PairsSm75 => "f16_sm75".into(),
            };
            assert_eq!(kernel.name, format!("fprop_{isa}_{c}x{p}x{d}_{layout}"));
            assert_eq!(kernel.threads * kernel.slow * kernel.fast, c * p);
            assert!(kernel.threads % 32 == 0 && kernel.threads * blocks_per_sm <= 2048);
        }
        let mut names: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), KERNELS.len());
    }

    #[test]
    fn large_problems_take_large_tiles_and_small_ones_small_tiles() {
        assert_eq!(chosen(512, 512, 64 * 3136, false), "fprop_f32_simt_128x128x8_nchw");
        assert_eq!(chosen(512, 512, 64 * 3136, true), "fprop_f32_simt_128x128x8_nhwc");
        assert_eq!(chosen(16, 32, 64 * 12544, true), "fprop_f32_simt_32x128x16_nhwc");
        assert_eq!(chosen(1000, 1280, 1, true), "fprop_f32_simt_32x32x16_nhwc");
        assert_eq!(chosen(256, 64, 49, false), "fprop_f32_simt_32x32x16_nchw");
    }

    #[test]
    fn a_forced_kernel_is_taken_whatever_the_estimate() {
        let problem = Letters { groups: 1, rows: 1, depth: 1, positions: 1, channels_fast: true };
        for (index, kernel) in KERNELS.iter().enumerate() {
            let forced = Some(Forced { kernel: kernel.name, splits: None });
            let tf32 = kernel.family == Family::Tf32;
            let terms = Terms { forced, tf32, dtype: kernel.dtype, ..Terms::default() };
            let facts = Facts { sm75: kernel.family == Family::PairsSm75, ..facts() };
            assert_eq!(choose(&problem, &facts, &terms), Choice { kernel: index, splits: 1 });
        }
    }

    #[test]
    fn tensor_cores_run_where_they_may_and_gain() {
        let family = |facts: &Facts, terms: &Terms, depth| {
            let problem =
                Letters { groups: 1, rows: 512, depth, positions: 1 << 16, channels_fast: false };
            KERNELS[choose(&problem, facts, terms).kernel].family
        };
        let may = Terms { tf32: true, ..Terms::default() };
        assert_eq!(family(&facts(), &may, 512), Family::Tf32);
        assert_eq!(family(&facts(), &Terms::default(), 512), Family::Simt);
        let older = Facts { compute_capability: (7, 5), sm80: false, sm75: true, ..facts() };
        assert_eq!(family(&older, &may, 512), Family::Simt);
        assert!(no_tf32(&older).contains("7.5"));
        // Sums that must not depend on the batch come from one family.
        let invariant = Terms { batch_invariant: true, ..may };
        // A few positions are not too few for them.
        let few = |depth| {
            let problem =
                Letters { groups: 1, rows: 512, depth, positions: 49, channels_fast: false };
            choose(&problem, &facts(), &may)
        };
        assert!(KERNELS[few(2048).kernel].family == Family::Tf32 && few(2048).splits > 1);
        for positions in [1, 49, 1 << 20] {
            let problem = Letters { groups: 1, rows: 4, depth: 3, positions, channels_fast: true };
            let choice = choose(&problem, &facts(), &invariant);
            assert_eq!((KERNELS[choice.kernel].family, choice.splits), (Family::Tf32, 1));
        }
    }

    #[test]
    fn tensors_of_16_bits_run_on_tensor_cores_where_there_are_some() {
        let problem =
            Letters { groups: 1, rows: 512, depth: 512, positions: 49, channels_fast: true };
        let older = Facts { compute_capability: (7, 5), sm80: false, sm75: true, ..facts() };
        let without = Facts { sm75: false, ..older.clone() };
        let family = |facts: &Facts, dtype, batch_invariant| {
            let terms = Terms { dtype, batch_invariant, ..Terms::default() };
            let kernel = &KERNELS[choose(&problem, facts, &terms).kernel];
            assert_eq!(kernel.dtype, dtype);
            kernel.family
        };
        for invariant in [false, true] {
            assert_eq!(family(&facts(), DType::F16, invariant), Family::Pairs);
            assert_eq!(family(&facts(), DType::Bf16, invariant), Family::Pairs);
            assert_eq!(family(&older, DType::F16, invariant), Family::PairsSm75);
            assert_eq!(family(&older, DType::Bf16, invariant), Family::Simt);
            assert_eq!(family(&without, DType::F16, invariant), Family::Simt);
        }
    }

    #[test]
    fn kernels_share_a_multiprocessor_as_its_shared_memory_allows() {
        let facts = |kib: u32, shared_per_block| Facts {
            multiprocessors: 40,
            shared_bytes: kib << 10,
            shared_per_block,
            ..facts()
        };
        let [turing, ampere, ada, hopper] =
            [facts(64, 0), facts(164, 1024), facts(100, 1024), facts(228, 1024)];
        let of_family = |family, dtype| {
            let kernels = KERNELS.iter().filter(move |kernel| {
                (kernel.family, kernel.dtype, kernel.channels_fast) == (family, dtype, false)
            });
            kernels.map(|kernel| kernel.tile).collect()
        };
        let of_bytes = |kernels: &[ByteKernel]| kernels.iter().map(|kernel| kernel.tile).collect();
        let now = |tiles: &Vec<Tile>, facts: &Facts| -> Vec<u64> {
            tiles.iter().map(|tile| tile.at_once(facts)).collect()
        };
        let tf32 = of_family(Family::Tf32, DType::F32);
        // 45 KiB a block, of 164.
        assert_eq!(now(&tf32, &ampere), [2, 3, 3, 4]);
        assert_eq!(now(&tf32, &ada), [1, 1, 2, 2]);
        assert_eq!(now(&tf32, &hopper), [2, 3, 4, 4]);
        let simt = of_family(Family::Simt, DType::F32);
        assert_eq!(now(&simt, &turing), [2, 3, 2, 7]);
        assert_eq!(now(&simt, &ada), [2, 4, 3, 8]);
        assert_eq!(now(&of_family(Family::PairsSm75, DType::F16), &turing), [1, 3]);
        let (int8, fp8) = (of_bytes(INT8_KERNELS), of_bytes(FP8_KERNELS));
        assert_eq!(now(&int8, &turing), [1, 1]);
        assert_eq!(now(&int8, &ampere), [2, 4]);
        assert_eq!(now(&int8, &ada), [1, 2]);
        assert_eq!(now(&fp8, &ada), [1, 2]);
        assert_eq!(now(&fp8, &hopper), [1, 3]);
        // Blocks share a tile only where all of them run at once.
        let problem =
            Letters { groups: 1, rows: 1, depth: 1 << 15, positions: 1, channels_fast: false };
        let most = |kernel: &Kernel, facts: &Facts| {
            let facts = Facts { multiprocessors: 4, ..facts.clone() };
            let terms = Terms { dtype: kernel.dtype, ..Terms::default() };
            kernel.splits(&problem, &facts, &terms).max().unwrap_or(0)
        };
        for facts in [&turing, &ampere, &ada, &hopper] {
            for kernel in KERNELS {
                let blocks = most(kernel, facts).div_ceil(4);
                let bytes = blocks * (kernel.tile.shared_bytes + facts.shared_per_block);
                assert!(blocks == 1 || bytes <= facts.shared_bytes, "{} {facts:?}", kernel.name);
            }
        }
        let large = KERNELS.iter().find(|kernel| kernel.family == Family::Tf32);
        assert_eq!(large.map(|kernel| [&ada, &ampere].map(|on| most(kernel, on))), Some([4, 8]));
        // Two large tiles on the busiest multiprocessor, or five small ones: the last of these has it for
        // itself, which costs nothing where there is no room for four.
        let problem =
            Letters { groups: 1, rows: 128, depth: 1 << 15, positions: 6000, channels_fast: false };
        let chosen = |facts: &Facts| {
            let choice = choose_bytes(INT8_KERNELS, &problem, facts, None, true);
            assert_eq!(choice.splits, 1);
            INT8_KERNELS[choice.kernel].name
        };
        assert_eq!(chosen(&turing), "fprop_i8_mma_64x64x64");
        assert_eq!(chosen(&ampere), "fprop_i8_mma_128x128x64");
    }

    #[test]
    fn deep_sums_of_bytes_with_few_tiles_are_shared() {
        let problem =
            Letters { groups: 1, rows: 512, depth: 2048, positions: 49, channels_fast: false };
        let choose = |forced, share| choose_bytes(INT8_KERNELS, &problem, &facts(), forced, share);
        let splits = choose(None, true).splits;
        assert!((2..=8).contains(&splits), "resnet50 s4.c1b at n = 1: {splits}");
        assert_eq!(choose(None, false).splits, 1);
        for (index, kernel) in INT8_KERNELS.iter().enumerate() {
            let forced = |splits| Some(Forced { kernel: kernel.name, splits });
            // 32 slabs.
            for (asked, splits) in [(1, 1), (5, 5), (100, 32)] {
                let choice = choose(forced(Some(asked)), false);
                assert_eq!(choice, Choice { kernel: index, splits });
            }
            assert_eq!(choose(forced(None), false), Choice { kernel: index, splits: 1 });
        }
    }

    #[test]
    fn grids_hold_every_tile_and_stay_within_the_limits() {
        for tiles in [1, 2, 65_536, GRID.0, GRID.0 + 1, 3 * GRID.0 + 7, GRID.0 * GRID.1] {
            let (x, y) = Kernel::grid(tiles).unwrap();
            assert!(u64::from(x) <= GRID.0 && u64::from(y) <= GRID.1);
            let blocks = u64::from(x) * u64::from(y);
            assert!(blocks >= tiles && blocks - tiles < u64::from(y), "{tiles}: {x} x {y}");
        }
        assert_eq!(Kernel::grid(u64::MAX), None);
    }
}
