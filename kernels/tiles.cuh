// Which part of the result a block computes, and where its positions lie in memory.
#pragma once

#include "params.h"

// Offsets in elements of the positions of a tile, relative to each tensor's first element.
// A position's address costs divisions by the extents: they are paid once per tile, here, and
// everything after looks them up.
template <int kPositions>
struct PositionTable {
    // Those that the lanes of an epilogue look up, every fourth or eighth: they are in different banks.
    class Spread {
    public:
        __device__ int64_t operator[](int i) const { return offsets[slot(i)]; }
        __device__ int64_t& operator[](int i) { return offsets[slot(i)]; }

    private:
        static __device__ int slot(int i) { return i ^ (i >> 4 & 3); }
        int64_t offsets[kPositions];
    };

    int64_t src[kPositions];  // in the source that is being read
    Spread dst;
    Spread residual;
    int64_t gate[kPositions];
};

// Whether neighbouring threads take neighbouring channels.
__device__ inline bool along_channels(pw_read read) {
    static_assert(PW_READ_CHANNELS % 2 == 1 && PW_READ_CHANNELS_VEC4 % 2 == 1 &&
                      PW_READ_CHANNELS_VEC8 % 2 == 1 && PW_READ_CHANNELS_VEC16 % 2 == 1,
                  "the lowest bit says so");
    return read % 2 == 1;
}
__device__ inline bool reads_channels(const pw_source& source) { return along_channels(source.read); }

// Neighbouring input channels of a tile that one source has.
struct Run {
    const pw_source* source;
    int64_t channel;  // the first of them among the source's
    int64_t input;    // and among the channels of all groups, as in the weight's [groups][depth]
    int depth;        // how many
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

    // The first input channel, among those of all groups, that this block sums and a source has.
    __device__ int64_t first_input(const pw_fprop& p, const pw_source& source) const {
        return max(int64_t(group) * p.depth + depth_begin, int64_t(source.begin));
    }

    // The part of source s that this block sums; its depth is 0 if there is none.
    __device__ Run run(const pw_fprop& p, uint32_t s) const {
        const pw_source& source = p.sources[s];
        const int64_t from = first_input(p, source);
        const int64_t to = min(int64_t(group) * p.depth + depth_begin + depth, int64_t(source.end));
        return {&source, from - source.begin, from, to > from ? int(to - from) : 0};
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

// Calls put(axis, at) with where a position is along each axis.
template <class Put>
__device__ void locate(const pw_fprop& p, int64_t position, Put put) {
    for (uint32_t axis = 0; axis < p.axis_count; ++axis) {
        int64_t at = position;
        if (axis + 1 < p.axis_count) position = divide(position, p.axes[axis].extent, at);
        put(axis, at);
    }
}

// The offsets of a tile's positions in one source; with kAll, in all the other tensors too.
template <bool kAll, int kPositions>
__device__ void fill_positions(PositionTable<kPositions>& table, const pw_fprop& p,
                               const pw_source& source, int64_t first, int threads) {
    for (int i = threadIdx.x; i < kPositions; i += threads) {
        int64_t src = 0, dst = 0, residual = 0, gate = 0;
        // Past the end the last position stands in, so that no address is out of bounds.
        locate(p, min(first + i, p.positions - 1), [&](uint32_t axis, int64_t at) {
            src += at * source.axes[axis];
            if (kAll) {
                dst += at * p.axes[axis].dst;
                residual += at * p.axes[axis].residual;
                gate += at * p.axes[axis].gate;
            }
        });
        table.src[i] = src;
        if (kAll) {
            table.dst[i] = dst;
            table.residual[i] = residual;
            table.gate[i] = gate;
        }
    }
}
