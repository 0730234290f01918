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

// One tile of one group. Neighbouring blocks share positions and differ in channels, so that src
// leaves DRAM once and the (small) weights stay in L2.
struct TileAt {
    uint32_t group;
    uint32_t row;      // first output channel within the group
    int64_t position;  // first position

    __device__ TileAt(const pw_fprop& p, int64_t index, uint32_t block_rows, uint32_t block_positions) {
        const uint32_t row_tiles = (p.rows + block_rows - 1) / block_rows;
        const int64_t per_column = int64_t(row_tiles) * p.groups;
        const int64_t column = index / per_column;
        const int64_t rest = index - column * per_column;
        group = uint32_t(rest / row_tiles);
        row = uint32_t(rest - int64_t(group) * row_tiles) * block_rows;
        position = column * block_positions;
    }
};

__device__ inline int64_t tile_count(const pw_fprop& p, uint32_t block_rows, uint32_t block_positions) {
    const int64_t row_tiles = (int64_t(p.rows) + block_rows - 1) / block_rows;
    const int64_t columns = (p.positions + block_positions - 1) / block_positions;
    return row_tiles * p.groups * columns;
}

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
