//! A unit's grids: which part of the weight, of src and of dst each one is, and what it fetches ahead.

use std::ops::Range;

use crate::cpu::epilogue::{ChannelAxis, Operand, Steps, TileEpilogue};
use crate::cpu::microkernel::{Grid, Segment, Sizes};
use crate::cpu::pack::{Part, Weights};
use crate::cpu::plan::Run;
use crate::dtype::Element;

/// Positions that src is fetched ahead, at least, where lanes run along them.
const AHEAD: usize = 48;
/// Rows of a panel that src is fetched ahead, where it is copied.
const ROWS_AHEAD: isize = 8;
/// Values of src that are fetched ahead of a tile, at most, where lanes run along channels: more
/// would drive the weight out of the first cache level.
const MOST_AHEAD: usize = 4096;

/// A group's channels at a block of positions: what grids are cut out of.
pub(crate) struct Area<'a, T> {
    pub weights: &'a Weights,
    pub scale: &'a [f32],
    pub bias: &'a [f32],
    pub steps: &'a Steps,
    pub sizes: &'a Sizes,
    pub group: usize,
    /// The layer's index of the group's first channel.
    pub first_channel: usize,
    /// Where src is.
    pub parts: &'a [Part],
    /// Memory to work in.
    pub segments: &'a mut Vec<Segment>,
    pub dst: Operand<'a, *mut T>,
    /// Whether dst is likely not in cache.
    pub far_dst: bool,
    pub residual: Option<Operand<'a, *const T>>,
}

impl<T: Element> Area<'_, T> {
    /// Computes and stores the tiles of channels `channels` of each panel at positions
    /// `positions`, which are a single tile if there are several panels.
    pub(crate) fn grid(
        &mut self,
        axis: ChannelAxis,
        panels: Range<usize>,
        channels: Run,
        positions: Run,
    ) {
        debug_assert!(panels.len() == 1 || positions.tiles == 1);
        let tabled = self.dst.is_tabled() || self.residual.is_some_and(|r| r.is_tabled());
        if tabled && panels.len() * channels.tiles * positions.tiles > 1 {
            for panel in panels {
                for channels in channels.each() {
                    for positions in positions.each() {
                        self.grid(axis, panel..panel + 1, channels, positions);
                    }
                }
            }
            return;
        }
        let weights = self.weights;
        let panel = panels.start;
        let stride = weights.stride(panel) as isize;
        // How far the weight, channels and positions are from tile to tile.
        let (tiles, weight_step, channel_step, position_step) = if panels.len() > 1 {
            (
                [panels.len(), channels.tiles],
                [weights.panel_len() as isize, channels.len as isize],
                [weights.width(), channels.len],
                [0, 0],
            )
        } else {
            (
                [channels.tiles, positions.tiles],
                [channels.len as isize, 0],
                [channels.len, 0],
                [0, positions.len],
            )
        };
        let mut weight = weights.panel(self.group, panel).wrapping_add(channels.first);
        self.segments.clear();
        let mut ahead = 0;
        for part in self.parts {
            let k = part.k;
            let (src, channel, step) = part.tiles(positions.first, positions.len);
            let src_step = position_step.map(|positions| if positions > 0 { step } else { 0 });
            ahead = match axis {
                ChannelAxis::Rows if part.panels.is_some() => ROWS_AHEAD * channel,
                ChannelAxis::Rows => positions.len.max(AHEAD) as isize,
                ChannelAxis::Lanes => {
                    // One source whose positions follow one another without gaps.
                    let whole =
                        self.parts.len() == 1 && channel == 1 && part.position == k as isize;
                    if whole && positions.len * k <= MOST_AHEAD { step } else { 0 }
                }
            };
            self.segments.push(match axis {
                ChannelAxis::Rows => Segment {
                    k,
                    a: weight,
                    a_row: 1,
                    a_k: stride,
                    a_step: weight_step,
                    b: src,
                    b_k: channel,
                    b_step: src_step,
                },
                ChannelAxis::Lanes => Segment {
                    k,
                    a: src,
                    a_row: part.position,
                    a_k: channel,
                    a_step: src_step,
                    b: weight,
                    b_k: stride,
                    b_step: weight_step,
                },
            });
            weight = weight.wrapping_offset(k as isize * stride);
        }
        let epilogue = TileEpilogue {
            axis,
            channel: self.first_channel + panel * weights.width() + channels.first,
            scale: self.scale,
            bias: self.bias,
            steps: self.steps,
            residual: self.residual.map(|r| r.at_positions(positions.first, positions.len)),
            dst: self.dst.at_positions(positions.first, positions.len),
        };
        let (rows, cols) = match axis {
            ChannelAxis::Rows => (channels.len, positions.len),
            ChannelAxis::Lanes => (positions.len, channels.len),
        };
        let grid = Grid {
            rows,
            cols,
            tiles,
            ahead,
            far_dst: self.far_dst,
            segments: self.segments,
            epilogue: T::any(&epilogue),
            channel_step,
            position_step,
        };
        // SAFETY: the layer was prepared for an instruction set that this CPU has; the problem
        // is validated, so that its tensors hold every channel and position of the tiles; dst
        // aliases nothing that is read, and no other unit has these tiles.
        unsafe { (self.sizes.run)(&grid) };
    }
}
