// Which part of the result a block computes, and where its positions lie in memory.
#pragma once

#include "params.h"

// Offsets in elements of the positions of a tile, relative to each tensor's first element.
// A position's address costs divisions by the extents: they are paid once per tile, here, and
// everything after looks them up.
template <int kPositions>
struct PositionTable {
    int64_t src[kPositions];
    int64_t dst[kPositions];
    int64_t residual[kPositions];
};

// One tile of one group, and the range of input channels that this block sums. Neighbouring blocks
// share positions and differ in output channels, so that src leaves DRAM once and the (small)
// weights stay in L2.
struct TileAt {
    int64_t tiles;     // that cover dst
    int64_t index;     // of this one among them
    uint32_t group;
    uint32_t row;      // first output channel within the group
    int64_t position;  // first position
    uint32_t split;    // which of the blocks that share the tile
    int depth_begin;   // first input channel within the group, a multiple of the slabs' depth
    int depth;         // how many

    template <class Tile>
    static __device__ TileAt of(const pw_fprop& p, int64_t block, Tile) {
        const uint32_t row_tiles = (p.rows + Tile::kRows - 1) / Tile::kRows;
        const int64_t per_column = int64_t(row_tiles) * p.groups;
        TileAt at;
        at.tiles = per_column * ((p.positions + Tile::kPositions - 1) / Tile::kPositions);
        at.split = p.splits > 1 ? uint32_t(block / at.tiles) : 0;
        at.index = block - at.split * at.tiles;
        const int64_t column = at.index / per_column;
        const int64_t rest = at.index - column * per_column;
        at.group = uint32_t(rest / row_tiles);
        at.row = uint32_t(rest - int64_t(at.group) * row_tiles) * Tile::kRows;
        at.position = column * Tile::kPositions;
        at.depth_begin = 0;
        at.depth = p.depth;
        if (p.splits > 1) {
            const uint64_t slabs = (p.depth + Tile::kDepth - 1) / Tile::kDepth;
            const auto first = [&](uint32_t split) {
                return int(slabs * split / p.splits) * Tile::kDepth;
            };
            at.depth_begin = first(at.split);
            at.depth = min(first(at.split + 1), int(p.depth)) - at.depth_begin;
        }
        return at;
    }

    // False in the blocks beyond the last: a grid may hold a few more than are needed.
    __device__ bool exists(const pw_fprop& p) const { return split < p.splits && index < tiles; }
};

// Quotient and remainder of non-negative numbers; the 32-bit division is several times cheaper.
__device__ inline int64_t divide(int64_t value, int64_t by, int64_t& remainder) {
    if (((value | by) >> 32) == 0) {
        const uint32_t q = uint32_t(value) / uint32_t(by);
        remainder = uint32_t(value) - q * uint32_t(by);
        return q;
    }
    const int64_t q = value / by;
    remainder = value - q * by;
    return q;
}

template <int kPositions>
__device__ void fill_positions(PositionTable<kPositions>& table, const pw_fprop& p, int64_t first,
                               int threads) {
    for (int i = threadIdx.x; i < kPositions; i += threads) {
        // Past the end the last position stands in, so that no address is out of bounds.
        int64_t rest = min(first + i, p.positions - 1);
        int64_t src = 0, dst = 0, residual = 0;
        for (uint32_t axis = 0; axis < p.axis_count; ++axis) {
            int64_t at = rest;
            if (axis + 1 < p.axis_count) rest = divide(rest, p.axes[axis].extent, at);
            src += at * p.axes[axis].src;
            dst += at * p.axes[axis].dst;
            residual += at * p.axes[axis].residual;
        }
        table.src[i] = src;
        table.dst[i] = dst;
        table.residual[i] = residual;
    }
}
