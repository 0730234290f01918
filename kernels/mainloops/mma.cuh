// Products on tensor cores: operands rounded to TF32, sums in f32. Slabs of weight and src arrive by
// asynchronous copies, several ahead of the one that is multiplied.
#pragma once

#include "../params.h"
#include "../ptx.cuh"
#include "../tiles.cuh"

// A tile of kRows output channels x kPositions positions; a warp has kWarpRows x kWarpPositions of
// them, in blocks of 32 x 32. kChannelsFast is the axis along which dst is contiguous, as for the
// SIMT tiles.
//
// Which element of a block is which row or column of an instruction's operands is ours to choose,
// as long as both operands and the sums agree. The choice makes whole vectors of everything:
//
//   row 8j + g of the instructions' 32 rows   is output channel 4g + j
//   column 8j + c of their 32 columns         is position 16 (c % 2) + 4 (c / 2) + j
//   depth 8s + 4r + t of their 16             is input channel 4t + 2s + r
//
// So one 128-bit read gives a lane its part of four rows (or of four columns, or of four depths
// where src lies along channels), and a thread's sums are vectors of four along either axis.
template <int kRows_, int kPositions_, int kDepth_, int kWarpRows_, int kWarpPositions_, int kStages_,
          bool kChannelsFast_>
struct MmaTile {
    static constexpr int kRows = kRows_;
    static constexpr int kPositions = kPositions_;
    static constexpr int kDepth = kDepth_;
    static constexpr int kWarpRows = kWarpRows_;
    static constexpr int kWarpPositions = kWarpPositions_;
    static constexpr int kStages = kStages_;
    static constexpr bool kChannelsFast = kChannelsFast_;
    static constexpr int kRowWarps = kRows / kWarpRows;
    static constexpr int kThreads = 32 * kRowWarps * (kPositions / kWarpPositions);
    // Of a thread: 4 of the rows and 8 of the positions of each block.
    static constexpr int kRowSums = kWarpRows / 8;
    static constexpr int kPositionSums = kWarpPositions / 4;
    static constexpr int kSlow = kChannelsFast ? kPositionSums : kRowSums;
    static constexpr int kFast = kChannelsFast ? kRowSums : kPositionSums;

    static_assert(kDepth == 16, "a slab is two instructions deep");
    static_assert(kWarpRows % 32 == 0 && kWarpPositions % 32 == 0, "whole blocks");
    static_assert(kRows % kWarpRows == 0 && kPositions % kWarpPositions == 0, "whole warps");
    static_assert(kThreads % (kRows / 4) == 0 && kThreads % kPositions == 0 && kThreads >= 128,
                  "a thread keeps its column while it loads");

    static __device__ int lane_group() { return threadIdx.x >> 2 & 7; }
    static __device__ int lane_thread() { return threadIdx.x & 3; }
    static __device__ int warp_row() { return int(threadIdx.x) / 32 % kRowWarps * kWarpRows; }
    static __device__ int warp_position() {
        return int(threadIdx.x) / 32 / kRowWarps * kWarpPositions;
    }

    // Where this thread's sums lie in the tile.
    static __device__ int row_begin() { return warp_row() + 4 * lane_group(); }
    static __device__ int position_begin() { return warp_position() + 4 * lane_thread(); }
    static __device__ constexpr int row_offset(int i) { return i / 4 * 32 + i % 4; }
    static __device__ constexpr int position_offset(int i) { return i / 4 * 16 + i % 4; }

    static __device__ int fast_begin() { return kChannelsFast ? row_begin() : position_begin(); }
    static __device__ int slow_begin() { return kChannelsFast ? position_begin() : row_begin(); }
    static __device__ constexpr int fast_offset(int i) {
        return kChannelsFast ? row_offset(i) : position_offset(i);
    }
    static __device__ constexpr int slow_offset(int i) {
        return kChannelsFast ? position_offset(i) : row_offset(i);
    }
    static __device__ float& sum(float (&acc)[kSlow][kFast], int row, int position) {
        return kChannelsFast ? acc[position][row] : acc[row][position];
    }

    // Slabs are [kDepth][kRows] of weight, and of src [kDepth][kPositions] where it is read along
    // positions, [kPositions][kDepth] where along channels. Elements lie at `column ^ swizzle(k)`,
    // or in row `position ^ swizzle(position)`: the eight lanes of a 128-bit access then meet eight
    // different groups of banks. A swizzle of a sum of disjoint bits is the exclusive-or of both.
    static __device__ constexpr int weight_swizzle(int k) { return (k >> 2 & 3) << 3; }
    static __device__ constexpr int src_swizzle(int k) { return (k >> 2 & 3) << 2; }
    static __device__ constexpr int position_swizzle(int position) { return position >> 4 & 1; }
};

template <class Tile>
struct MmaShared {
    float4 weight[Tile::kStages][Tile::kDepth * Tile::kRows / 4];
    float4 src[Tile::kStages][Tile::kDepth * Tile::kPositions / 4];
    PositionTable<Tile::kPositions> at;
    TileAt tile;
};

// Starts the copies of one slab after another: everything beyond the end of an axis arrives as zero.
template <class Tile>
class SlabCopier {
    static constexpr int kDepth = Tile::kDepth, kThreads = Tile::kThreads;
    // Threads side by side take neighbours, a thread every kStep-th row of them.
    static constexpr int kWeightVectors = Tile::kRows / 4;
    static constexpr int kWeightStep = kThreads / kWeightVectors;
    static constexpr int kVectors = Tile::kPositions / 4;
    static constexpr int kVectorStep = kThreads / kVectors;
    static constexpr int kScalarStep = kThreads / Tile::kPositions;
    static constexpr int kDeepStep = kThreads / (kDepth / 4);
    static constexpr int kDeepScalarStep = kThreads / kDepth;

    const pw_fprop& p;
    const PositionTable<Tile::kPositions>& at;
    const float* weight;
    const float* src;
    int left;         // depth that has not been asked for
    int weight_left;  // of it, from this thread's first row on; 0 if its column does not exist
    int weight_to;    // where its first vector goes
    int src_left;     // the same of src
    int to;
    int column;
    int valid;        // positions of the tile that exist

public:
    __device__ SlabCopier(const pw_fprop& p, const TileAt& tile,
                          const PositionTable<Tile::kPositions>& at)
        : p(p), at(at), left(tile.depth) {
        const int t = threadIdx.x;
        const int64_t first = int64_t(tile.group) * p.depth + tile.depth_begin;

        const int row = t % kWeightVectors * 4, weight_k = t / kWeightVectors;
        weight_to = weight_k * Tile::kRows + (row ^ Tile::weight_swizzle(weight_k));
        weight_left = tile.row + row < p.row_pitch ? left - weight_k : 0;
        weight = p.weight + (first + weight_k) * p.row_pitch + tile.row + row;

        const int64_t rest = p.positions - tile.position;
        valid = rest < Tile::kPositions ? int(rest) : Tile::kPositions;
        int k;
        switch (p.read) {
            case PW_READ_POSITIONS_VEC4: column = t % kVectors * 4, k = t / kVectors; break;
            case PW_READ_CHANNELS_VEC4: column = t / (kDepth / 4), k = t % (kDepth / 4) * 4; break;
            case PW_READ_POSITIONS: column = t % Tile::kPositions, k = t / Tile::kPositions; break;
            default: column = t / kDepth, k = t % kDepth; break;
        }
        src = p.src + (first + k) * p.src_channel;
        if (p.read == PW_READ_POSITIONS || p.read == PW_READ_POSITIONS_VEC4) {
            src += at.src[column];
            src_left = column < valid ? left - k : 0;
            to = k * Tile::kPositions + (column ^ Tile::src_swizzle(k));
        } else {
            src_left = left - k;
            to = (column ^ Tile::position_swizzle(column)) * kDepth + k;
        }
    }

    // Starts the next slab's copies, if there is one, and closes their group.
    __device__ void next(float4* weight_slab, float4* src_slab) {
        if (left > 0) {
            copy_weight(reinterpret_cast<float*>(weight_slab));
            copy_src(reinterpret_cast<float*>(src_slab));
            left -= kDepth, weight_left -= kDepth, src_left -= kDepth;
        }
        ptx::commit();
    }

private:
    __device__ void copy_weight(float* slab) {
#pragma unroll
        for (int i = 0; i < kDepth; i += kWeightStep) {
            float* const here = slab + (weight_to ^ Tile::weight_swizzle(i)) + i * Tile::kRows;
            ptx::copy_async<16>(here, weight, i < weight_left);
            weight += int64_t(kWeightStep) * p.row_pitch;
        }
    }

    __device__ void copy_src(float* slab) {
        switch (p.read) {
            case PW_READ_POSITIONS_VEC4: along_positions<16, kVectorStep>(slab); break;
            case PW_READ_POSITIONS: along_positions<4, kScalarStep>(slab); break;
            case PW_READ_CHANNELS_VEC4: along_channels<16, kDeepStep>(slab); break;
            default: along_channels<4, kDeepScalarStep>(slab);
        }
    }

    template <int kBytes, int kStep>
    __device__ void along_positions(float* slab) {
#pragma unroll
        for (int i = 0; i < kDepth; i += kStep) {
            float* const here = slab + (to ^ Tile::src_swizzle(i)) + i * Tile::kPositions;
            ptx::copy_async<kBytes>(here, src, i < src_left);
            src += kStep * p.src_channel;
        }
    }

    template <int kBytes, int kStep>
    __device__ void along_channels(float* slab) {
#pragma unroll
        for (int i = 0; i < Tile::kPositions; i += kStep) {
            const bool in = column + i < valid && src_left > 0;
            float* const here = slab + (to ^ Tile::position_swizzle(i) * kDepth) + i * kDepth;
            ptx::copy_async<kBytes>(here, src + at.src[column + i], in);
        }
        src += kDepth * p.src_channel;
    }
};

// The columns of src of one warp: `of[s][r]` has, for step s and half r of the depth, this lane's
// element of each group of eight columns.
template <class Tile, bool kAlongChannels>
struct Columns {
    static constexpr int kCount = Tile::kWarpPositions / 8;
    uint32_t of[2][2][kCount];

    __device__ void read(const float4* slab) {
        const int g = Tile::lane_group(), t = Tile::lane_thread();
        const int first = Tile::warp_position() + (g & 1) * 16 + (g >> 1) * 4;
        if (kAlongChannels) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                const int position = (first ^ Tile::position_swizzle(first) ^ j % 4) + j / 4 * 32;
                const float4 v = slab[position * (Tile::kDepth / 4) + t];
                of[0][0][j] = ptx::round_tf32(v.x), of[0][1][j] = ptx::round_tf32(v.y);
                of[1][0][j] = ptx::round_tf32(v.z), of[1][1][j] = ptx::round_tf32(v.w);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int k = 4 * t + i;
                const int row = k * Tile::kPositions + (first ^ Tile::src_swizzle(4 * t));
#pragma unroll
                for (int j = 0; j < kCount; j += 4) {
                    const float4 v = slab[row / 4 + j * 2];
                    uint32_t(&to)[kCount] = of[i / 2][i % 2];
                    to[j] = ptx::round_tf32(v.x), to[j + 1] = ptx::round_tf32(v.y);
                    to[j + 2] = ptx::round_tf32(v.z), to[j + 3] = ptx::round_tf32(v.w);
                }
            }
        }
    }
};

// acc += weight * src over one slab. The weights were rounded when they were packed.
template <class Tile, bool kAlongChannels>
__device__ void multiply(const float4* weight, const float4* src,
                         float (&acc)[Tile::kSlow][Tile::kFast]) {
    Columns<Tile, kAlongChannels> columns;
    columns.read(src);
    const int t = Tile::lane_thread();
    const int first = Tile::row_begin() ^ Tile::weight_swizzle(4 * t);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int block = 0; block < Tile::kWarpRows / 32; ++block) {
            // [half of the depth][channel 4g + j]
            uint32_t rows[2][4];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int k = 4 * t + 2 * s + r;
                const float4 v = weight[(k * Tile::kRows + first) / 4 + block * 8];
                rows[r][0] = __float_as_uint(v.x), rows[r][1] = __float_as_uint(v.y);
                rows[r][2] = __float_as_uint(v.z), rows[r][3] = __float_as_uint(v.w);
            }
#pragma unroll
            for (int pair = 0; pair < 4; pair += 2) {
                const uint32_t a[4] = {rows[0][pair], rows[0][pair + 1], rows[1][pair],
                                       rows[1][pair + 1]};
                const int row = block * 4 + pair;
#pragma unroll
                for (int j = 0; j < columns.kCount; ++j) {
                    const uint32_t b[2] = {columns.of[s][0][j], columns.of[s][1][j]};
                    const int position = j / 4 * 8 + j % 4;
                    ptx::mma_tf32(Tile::sum(acc, row, position), Tile::sum(acc, row, position + 4),
                                  Tile::sum(acc, row + 1, position),
                                  Tile::sum(acc, row + 1, position + 4), a, b);
                }
            }
        }
    }
}

template <class Tile, bool kAlongChannels>
__device__ void sum_slabs(const pw_fprop& p, const TileAt& tile, MmaShared<Tile>& shared,
                          float (&acc)[Tile::kSlow][Tile::kFast]) {
    SlabCopier<Tile> copier(p, tile, shared.at);
#pragma unroll
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
        copier.next(shared.weight[stage], shared.src[stage]);
    }
    int read = 0, write = Tile::kStages - 1;
#pragma unroll 1
    for (int done = 0; done < tile.depth; done += Tile::kDepth) {
        // This slab is there for every thread, and every thread is done with the one before, whose
        // place the next copies take.
        ptx::wait<Tile::kStages - 2>();
        __syncthreads();
        copier.next(shared.weight[write], shared.src[write]);
        multiply<Tile, kAlongChannels>(shared.weight[read], shared.src[read], acc);
        write = read;
        read = read + 1 < Tile::kStages ? read + 1 : 0;
    }
}

// Sums this block's products of one tile. Every thread of the block calls it after the position
// table is filled and visible.
template <class Tile>
__device__ void mainloop(const pw_fprop& p, const TileAt& tile, MmaShared<Tile>& shared,
                         float (&acc)[Tile::kSlow][Tile::kFast]) {
#pragma unroll
    for (int s = 0; s < Tile::kSlow; ++s) {
#pragma unroll
        for (int f = 0; f < Tile::kFast; ++f) acc[s][f] = 0.f;
    }
    if (p.read == PW_READ_CHANNELS || p.read == PW_READ_CHANNELS_VEC4) {
        sum_slabs<Tile, true>(p, tile, shared, acc);
    } else {
        sum_slabs<Tile, false>(p, tile, shared, acc);
    }
}
