// Products on tensor cores: operands rounded to TF32, or as sums of two TF32 values, which hold an
// f32's mantissa but for its last bit; sums in f32. Slabs of weight and src arrive by
// asynchronous copies, several ahead of the one that is multiplied.
#pragma once

#include "../params.h"
#include "../ptx.cuh"
#include "../tiles.cuh"
#include "source.cuh"

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
template <int kParts_, int kRows_, int kPositions_, int kDepth_, int kWarpRows_, int kWarpPositions_,
          int kStages_, bool kChannelsFast_>
struct MmaTile {
    static constexpr int kParts = kParts_;  // TF32 values per operand
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
    const pw_source& source;
    const PositionTable<Tile::kPositions>& at;
    const float* weight;
    const float* src;
    int left;         // depth that has not been asked for
    int weight_left;  // of it, from this thread's first row on; 0 if its column does not exist
    int weight_to;    // where its first vector goes
    int src_left;     // the same of src
    int to;
    int column;
    int k;            // this thread's first channel of a slab
    int valid;        // positions of the tile that exist

public:
    __device__ SlabCopier(const pw_fprop& p, const TileAt& tile, const Run& run,
                          const PositionTable<Tile::kPositions>& at)
        : p(p), source(*run.source), at(at), left(run.depth) {
        const int t = threadIdx.x;

        const int row = t % kWeightVectors * 4, weight_k = t / kWeightVectors;
        weight_to = weight_k * Tile::kRows + (row ^ Tile::weight_swizzle(weight_k));
        weight_left = tile.row + row < p.row_pitch ? left - weight_k : 0;
        weight = p.weight + (run.input + weight_k) * p.row_pitch + tile.row + row;

        const int64_t rest = p.positions - tile.position;
        valid = rest < Tile::kPositions ? int(rest) : Tile::kPositions;
        switch (source.read) {
            case PW_READ_POSITIONS_VEC4: column = t % kVectors * 4, k = t / kVectors; break;
            case PW_READ_CHANNELS_VEC4: column = t / (kDepth / 4), k = t % (kDepth / 4) * 4; break;
            case PW_READ_POSITIONS: column = t % Tile::kPositions, k = t / Tile::kPositions; break;
            default: column = t / kDepth, k = t % kDepth; break;
        }
        src = source.data + (run.channel + k) * source.channel;
        if (source.read == PW_READ_POSITIONS || source.read == PW_READ_POSITIONS_VEC4) {
            // The last position, which stands in for those past the end, may not be aligned.
            src += at.src[column < valid ? column : 0];
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

    // Runs the steps on this thread's part of a slab that has arrived; `first` is the slab's first
    // channel, `rest` the depth from there on.
    __device__ void transform(float4* src_slab, int64_t first, int rest) {
        float* const slab = reinterpret_cast<float*>(src_slab);
        run_source_steps<kDepth * Tile::kPositions / kThreads, 4>(p, at, first, [&](int i) {
            // As `copy_src` has placed them.
            const bool vectors = source.read == PW_READ_POSITIONS_VEC4 ||
                                 source.read == PW_READ_CHANNELS_VEC4;
            const int vector = vectors ? rotated(i) : 0;
            if (source.read == PW_READ_POSITIONS || source.read == PW_READ_POSITIONS_VEC4) {
                const int deeper = vectors ? i / 4 * kVectorStep : i * kScalarStep;
                float* const here = slab + (to ^ Tile::src_swizzle(deeper)) +
                                    deeper * Tile::kPositions + vector;
                const bool exists = column < valid && k + deeper < rest;
                return SlabElement{here, k + deeper, column + vector, exists};
            }
            const int across = vectors ? i / 4 * kDeepStep : i * kDeepScalarStep;
            float* const here = slab + (to ^ Tile::position_swizzle(across) * kDepth) +
                                across * kDepth + vector;
            const bool exists = column + across < valid && k < rest;
            return SlabElement{here, k + vector, column + across, exists};
        });
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
        switch (source.read) {
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
            src += kStep * source.channel;
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
        src += kDepth * source.channel;
    }
};

// Calls put(s, r, j, x) for this lane's element x of src in group j of eight columns, at step s and in
// half r of the depth.
template <class Tile, bool kAlongChannels, class Put>
__device__ void read_columns(const float4* slab, Put put) {
    constexpr int kCount = Tile::kWarpPositions / 8;
    const int g = Tile::lane_group(), t = Tile::lane_thread();
    const int first = Tile::warp_position() + (g & 1) * 16 + (g >> 1) * 4;
    if (kAlongChannels) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const int position = (first ^ Tile::position_swizzle(first) ^ j % 4) + j / 4 * 32;
            const float4 v = slab[position * (Tile::kDepth / 4) + t];
            put(0, 0, j, v.x), put(0, 1, j, v.y), put(1, 0, j, v.z), put(1, 1, j, v.w);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = (4 * t + i) * Tile::kPositions + (first ^ Tile::src_swizzle(4 * t));
#pragma unroll
            for (int j = 0; j < kCount; j += 4) {
                const float4 v = slab[row / 4 + j * 2];
                put(i / 2, i % 2, j, v.x), put(i / 2, i % 2, j + 1, v.y);
                put(i / 2, i % 2, j + 2, v.z), put(i / 2, i % 2, j + 3, v.w);
            }
        }
    }
}

// This lane's elements of the weight at step s and in half r of the depth: channels 4g + j of a block.
template <class Tile>
__device__ float4 read_rows(const float4* slab, int block, int s, int r) {
    const int t = Tile::lane_thread();
    const int first = Tile::row_begin() ^ Tile::weight_swizzle(4 * t);
    return slab[((4 * t + 2 * s + r) * Tile::kRows + first) / 4 + block * 8];
}

// acc += weight * src over one slab, in TF32. The weights were rounded when they were packed.
template <class Tile, bool kAlongChannels>
__device__ void multiply_rounded(const float4* weight, const float4* src,
                                 float (&acc)[Tile::kSlow][Tile::kFast]) {
    constexpr int kCount = Tile::kWarpPositions / 8;
    uint32_t columns[2][kCount][2];
    read_columns<Tile, kAlongChannels>(src, [&](int s, int r, int j, float x) {
        columns[s][j][r] = ptx::round_tf32(x);
    });
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int block = 0; block < Tile::kWarpRows / 32; ++block) {
            const float4 v = read_rows<Tile>(weight, block, s, 0);
            const float4 w = read_rows<Tile>(weight, block, s, 1);
            const uint32_t rows[2][4] = {{__float_as_uint(v.x), __float_as_uint(v.y),
                                          __float_as_uint(w.x), __float_as_uint(w.y)},
                                         {__float_as_uint(v.z), __float_as_uint(v.w),
                                          __float_as_uint(w.z), __float_as_uint(w.w)}};
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int row = block * 4 + pair * 2;
#pragma unroll
                for (int j = 0; j < kCount; ++j) {
                    const int position = j / 4 * 8 + j % 4;
                    ptx::mma_tf32(Tile::sum(acc, row, position), Tile::sum(acc, row, position + 4),
                                  Tile::sum(acc, row + 1, position),
                                  Tile::sum(acc, row + 1, position + 4), rows[pair], columns[s][j]);
                }
            }
        }
    }
}

// acc += weight * src over one slab: each operand is a sum of two TF32 values, of whose four products
// the smallest is below f32's precision. Tensor cores do not round their sums to the nearest, so
// these span one slab only and are then added as f32.
template <class Tile, bool kAlongChannels>
__device__ void multiply_in_parts(const float4* weight, const float4* src,
                                  float (&acc)[Tile::kSlow][Tile::kFast]) {
    constexpr int kCount = Tile::kWarpPositions / 8;
    uint32_t high[2][kCount][2], low[2][kCount][2];
    read_columns<Tile, kAlongChannels>(src, [&](int s, int r, int j, float x) {
        high[s][j][r] = ptx::round_tf32(x);
        low[s][j][r] = ptx::round_tf32(x - __uint_as_float(high[s][j][r]));
    });
#pragma unroll
    for (int block = 0; block < Tile::kWarpRows / 32; ++block) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            float sums[kCount][4];
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.f;
            }
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const float4 v = read_rows<Tile>(weight, block, s, 0);
                const float4 w = read_rows<Tile>(weight, block, s, 1);
                const float rows[4] = {pair == 0 ? v.x : v.z, pair == 0 ? v.y : v.w,
                                       pair == 0 ? w.x : w.z, pair == 0 ? w.y : w.w};
                uint32_t row_high[4], row_low[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    row_high[i] = ptx::round_tf32(rows[i]);
                    row_low[i] = ptx::round_tf32(rows[i] - __uint_as_float(row_high[i]));
                }
#pragma unroll
                for (int j = 0; j < kCount; ++j) {
                    float(&c)[4] = sums[j];
                    ptx::mma_tf32(c[0], c[1], c[2], c[3], row_low, high[s][j]);
                    ptx::mma_tf32(c[0], c[1], c[2], c[3], row_high, low[s][j]);
                    ptx::mma_tf32(c[0], c[1], c[2], c[3], row_high, high[s][j]);
                }
            }
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    Tile::sum(acc, block * 4 + pair * 2 + i / 2,
                              j / 4 * 8 + j % 4 + i % 2 * 4) += sums[j][i];
                }
            }
        }
    }
}

// Sums over parts are NaN where an operand is infinite, or so large that its part is: those that are
// not finite are computed anew, one multiply-add after another.
template <class Tile>
__device__ void repair(const pw_fprop& p, const TileAt& tile,
                       const PositionTable<Tile::kPositions>& at,
                       float (&acc)[Tile::kSlow][Tile::kFast]) {
    float zero = 0.f;
#pragma unroll
    for (int i = 0; i < Tile::kSlow * Tile::kFast; ++i) {
        zero = fmaf(acc[i / Tile::kFast][i % Tile::kFast], 0.f, zero);
    }
    if (zero == 0.f) return;
    const int64_t first = int64_t(tile.group) * p.depth + tile.depth_begin;
#pragma unroll 1
    for (int row = 0; row < Tile::kRowSums; ++row) {
#pragma unroll 1
        for (int position = 0; position < Tile::kPositionSums; ++position) {
            const int channel = Tile::row_begin() + Tile::row_offset(row);
            const int column = Tile::position_begin() + Tile::position_offset(position);
            if (tile.row + channel >= p.rows || tile.position + column >= p.positions) continue;
            bool fits = true;
#pragma unroll
            for (int i = 0; i < Tile::kRowSums; ++i) {
#pragma unroll
                for (int j = 0; j < Tile::kPositionSums; ++j) {
                    if (i == row && j == position) fits = isfinite(Tile::sum(acc, i, j));
                }
            }
            if (fits) continue;
            const float* weight = p.weight + first * p.row_pitch + tile.row + channel;
            float sum = 0.f;
#pragma unroll 1
            for (int k = 0; k < tile.depth; ++k) {
                const float x = source_value(p, at, tile.position + column, column, first + k);
                sum = fmaf(weight[int64_t(k) * p.row_pitch], x, sum);
            }
#pragma unroll
            for (int i = 0; i < Tile::kRowSums; ++i) {
#pragma unroll
                for (int j = 0; j < Tile::kPositionSums; ++j) {
                    if (i == row && j == position) Tile::sum(acc, i, j) = sum;
                }
            }
        }
    }
}

template <class Tile, bool kAlongChannels, bool kSteps>
__device__ void sum_slabs(const pw_fprop& p, const TileAt& tile, const Run& run,
                          MmaShared<Tile>& shared, float (&acc)[Tile::kSlow][Tile::kFast]) {
    SlabCopier<Tile> copier(p, tile, run, shared.at);
#pragma unroll
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
        copier.next(shared.weight[stage], shared.src[stage]);
    }
    int read = 0, write = Tile::kStages - 1;
#pragma unroll 1
    for (int done = 0; done < run.depth; done += Tile::kDepth) {
        // This slab is there for every thread, and every thread is done with the one before, whose
        // place the next copies take.
        ptx::wait<Tile::kStages - 2>();
        if (kSteps) {
            copier.transform(shared.src[read], run.input + done, run.depth - done);
        }
        __syncthreads();
        copier.next(shared.weight[write], shared.src[write]);
        if (Tile::kParts == 1) {
            multiply_rounded<Tile, kAlongChannels>(shared.weight[read], shared.src[read], acc);
        } else {
            multiply_in_parts<Tile, kAlongChannels>(shared.weight[read], shared.src[read], acc);
        }
        write = read;
        read = read + 1 < Tile::kStages ? read + 1 : 0;
    }
}

// Adds the products of some channels of one tile. Every thread of the block calls it after the
// position table is filled and visible.
template <class Tile>
__device__ void mainloop(const pw_fprop& p, const TileAt& tile, const Run& run,
                         MmaShared<Tile>& shared, float (&acc)[Tile::kSlow][Tile::kFast]) {
    const bool along_channels =
        run.source->read == PW_READ_CHANNELS || run.source->read == PW_READ_CHANNELS_VEC4;
    if (p.source_step_count == 0) {
        if (along_channels) {
            sum_slabs<Tile, true, false>(p, tile, run, shared, acc);
        } else {
            sum_slabs<Tile, false, false>(p, tile, run, shared, acc);
        }
    } else if (along_channels) {
        sum_slabs<Tile, true, true>(p, tile, run, shared, acc);
    } else {
        sum_slabs<Tile, false, true>(p, tile, run, shared, acc);
    }
}

// What is left to do once the whole depth is summed.
template <class Tile>
__device__ void finish_sums(const pw_fprop& p, const TileAt& tile, MmaShared<Tile>& shared,
                            float (&acc)[Tile::kSlow][Tile::kFast]) {
    if (Tile::kParts > 1) repair<Tile>(p, tile, shared.at, acc);
}
