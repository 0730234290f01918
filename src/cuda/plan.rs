//! The kernels there are, and which of them runs a problem: pure functions of the problem's letters
//! and the device's facts.

use super::device::Facts;

/// A kernel of `kernels/kernels.def`, which says what the numbers mean.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// `fprop_f32_simt_{rows}x{positions}x{depth}_{layout}`, also its symbol.
    pub name: &'static str,
    /// Output channels of a tile.
    pub rows: u32,
    pub positions: u32,
    pub depth: u32,
    /// A thread's share of the tile.
    pub slow: u32,
    pub fast: u32,
    pub threads: u32,
    pub blocks_per_sm: u32,
    /// Whether it stores along channels (NHWC) instead of positions (NCHW).
    pub channels_fast: bool,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

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

impl Kernel {
    /// Tiles that cover a problem; saturates, which the grid then refuses.
    pub(crate) fn tiles(&self, problem: &Letters) -> u64 {
        let rows = u64::from(problem.rows.div_ceil(self.rows));
        let positions = problem.positions.div_ceil(u64::from(self.positions));
        rows.saturating_mul(u64::from(problem.groups)).saturating_mul(positions)
    }

    /// The grid that holds this many blocks, or a few more; `None` if none does.
    pub(crate) fn grid(tiles: u64) -> Option<(u32, u32)> {
        let y = tiles.div_ceil(GRID.0).max(1);
        let x = tiles.div_ceil(y).max(1);
        (y <= GRID.1).then_some((x as u32, y as u32))
    }

    /// The time that the busiest multiprocessor needs, in units that compare kernels.
    ///
    /// A tile costs its products, padding included, and they run the slower, the more operands a
    /// thread reads from shared memory per product; then come its first reads, which nothing hides,
    /// and its stores, which touch a sector per element if they go across the memory order. A
    /// multiprocessor works on `blocks_per_sm` tiles at a time, and a last round of fewer leaves it
    /// waiting: that takes three quarters of a full one at least. The weights are those that lose
    /// least over the layers of `benches/layers.csv` on an H100.
    fn estimate(&self, problem: &Letters, facts: &Facts) -> f64 {
        let tiles = self.tiles(problem).div_ceil(u64::from(facts.multiprocessors));
        let at_once = u64::from(self.blocks_per_sm);
        let last = match tiles % at_once {
            0 => 0.0,
            tiles => (tiles as f64).max(0.75 * at_once as f64),
        };
        let tiles = (tiles / at_once * at_once) as f64 + last;
        let (slow, fast) = (f64::from(self.slow), f64::from(self.fast));
        let product = 1.0 + (slow + fast) / (slow * fast);
        let depth = f64::from(problem.depth.div_ceil(self.depth) * self.depth);
        let ends = if self.channels_fast == problem.channels_fast { 72.0 } else { 128.0 };
        tiles * f64::from(self.rows * self.positions) * (depth * product + ends)
    }
}

/// The kernel for a problem: the forced one, or the one with the least estimate. The index is one
/// of [`KERNELS`].
pub(crate) fn choose(problem: &Letters, facts: &Facts, forced: Option<&str>) -> usize {
    let is_forced = |&kernel: &usize| Some(KERNELS[kernel].name) == forced;
    let estimate = |kernel: usize| KERNELS[kernel].estimate(problem, facts);
    let all = 0..KERNELS.len();
    // The first of equals, as in the sorted list.
    let best = || all.clone().min_by(|&a, &b| estimate(a).total_cmp(&estimate(b)));
    all.clone().find(is_forced).or_else(best).unwrap_or(0)
}

/// All kernels, the best first.
pub(crate) fn ranked(problem: &Letters, facts: &Facts) -> Vec<usize> {
    let mut order: Vec<usize> = (0..KERNELS.len()).collect();
    let cost: Vec<f64> = KERNELS.iter().map(|kernel| kernel.estimate(problem, facts)).collect();
    order.sort_by(|&a, &b| cost[a].total_cmp(&cost[b]));
    order
}

/// How a kernel would run a problem, in words.
pub(crate) fn describe(kernel: &Kernel, problem: &Letters, facts: &Facts) -> String {
    let tiles = kernel.tiles(problem);
    let used = problem.rows as f64 * problem.positions as f64 * f64::from(problem.groups)
        / (tiles as f64 * f64::from(kernel.rows * kernel.positions)).max(1.0);
    let along = if kernel.channels_fast { "channels" } else { "positions" };
    format!(
        "{tiles} tiles of {} channels x {} positions on {} multiprocessors, {:.0} % of them \
         filled, stores along {along}",
        kernel.rows,
        kernel.positions,
        facts.multiprocessors,
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
            l2_bytes: 40 << 20,
            memory_bytes: 40 << 30,
            roof: Roof { flops_per_second: 1.95e13, bytes_per_second: 1.5e12 },
        }
    }

    fn chosen(rows: u32, depth: u32, positions: u64, channels_fast: bool) -> &'static str {
        let problem = Letters { groups: 1, rows, depth, positions, channels_fast };
        KERNELS[choose(&problem, &facts(), None)].name
    }

    #[test]
    fn names_follow_the_grammar_and_say_what_the_kernel_is() {
        for kernel in KERNELS {
            let layout = if kernel.channels_fast { "nhwc" } else { "nchw" };
            let (c, p, d) = (kernel.rows, kernel.positions, kernel.depth);
            assert_eq!(kernel.name, format!("fprop_f32_simt_{c}x{p}x{d}_{layout}"));
            assert_eq!(kernel.threads * kernel.slow * kernel.fast, c * p);
            assert!(kernel.threads % 32 == 0 && kernel.threads * kernel.blocks_per_sm <= 2048);
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
            assert_eq!(choose(&problem, &facts(), Some(kernel.name)), index);
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
