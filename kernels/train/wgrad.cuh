// The gradient by the weight: products of d and src, summed over positions. Several blocks may share
// the positions of a tile, each a range of them; their sums are added in the order of the ranges.
#pragma once

#include "../params.h"
#include "sweep.cuh"

// Rows and columns of a thread.
constexpr int kWgradSide = 4;

struct WgradShared {
    // One vector more than a tile has: threads that store along a column then meet other banks.
    alignas(16) float d[PW_WGRAD_SLAB][PW_WGRAD_TILE + 4];
    alignas(16) float src[PW_WGRAD_SLAB][PW_WGRAD_TILE + 4];
    int64_t d_at[2][PW_WGRAD_SLAB];
    int64_t src_at[2][PW_WGRAD_SLAB];
};

// What a thread brings of one operand's slab: a tile's channels at some positions.
class SlabOf {
public:
    __device__ SlabOf(const pw_part& part, bool channels_fast, int64_t first, int count)
        : data(part.data + first * part.channel), stride(part.channel), count(count) {
        const int t = threadIdx.x;
        channel = channels_fast ? t % PW_WGRAD_TILE : t / PW_WGRAD_SLAB;
        position = channels_fast ? t / PW_WGRAD_TILE : t % PW_WGRAD_SLAB;
        deeper = channels_fast ? 0 : PW_WGRAD_THREADS / PW_WGRAD_SLAB;
        across = channels_fast ? PW_WGRAD_THREADS / PW_WGRAD_TILE : 0;
    }
    __device__ void load(const int64_t (&at)[PW_WGRAD_SLAB], int positions) {
#pragma unroll
        for (int i = 0; i < kWgradSide; ++i) {
            const int c = channel + i * deeper, q = position + i * across;
            v[i] = c < count && q < positions ? data[c * stride + at[q]] : 0.f;
        }
    }
    __device__ void store(float (&to)[PW_WGRAD_SLAB][PW_WGRAD_TILE + 4]) const {
#pragma unroll
        for (int i = 0; i < kWgradSide; ++i) to[position + i * across][channel + i * deeper] = v[i];
    }

private:
    const float* data;
    int64_t stride;
    int count, channel, position, deeper, across;
    float v[kWgradSide];
};

__device__ inline void wgrad(const pw_wgrad& p, WgradShared& shared, int64_t block) {
    const uint32_t row_tiles = (p.rows + PW_WGRAD_TILE - 1) / PW_WGRAD_TILE;
    const uint32_t depth_tiles = (p.depth + PW_WGRAD_TILE - 1) / PW_WGRAD_TILE;
    const int64_t tiles = int64_t(row_tiles) * depth_tiles * p.groups;
    const int64_t split = block / tiles;
    if (split >= p.splits) return;
    int64_t rest = block - split * tiles;
    const uint32_t group = uint32_t(rest / (row_tiles * depth_tiles));
    rest -= int64_t(group) * (row_tiles * depth_tiles);
    const int row = int(rest / depth_tiles) * PW_WGRAD_TILE;
    const int k = int(rest % depth_tiles) * PW_WGRAD_TILE;
    const uint32_t begin = uint32_t(split) * p.chunk;
    const uint32_t end = min(begin + p.chunk, p.positions);

    SlabOf d(p.d, p.d_channels_fast, int64_t(group) * p.rows + row, p.rows - row);
    SlabOf src(p.src, p.src_channels_fast, int64_t(group) * p.depth + k, p.depth - k);
    const auto fill = [&](int buffer, uint32_t first) {
        if (threadIdx.x >= PW_WGRAD_SLAB) return;
        const uint32_t position = min(first + threadIdx.x, p.positions - 1);
        const auto at = [&](const pw_part& part) {
            return offset_of(position, p.extents, p.axis_count, part.axes);
        };
        shared.d_at[buffer][threadIdx.x] = at(p.d), shared.src_at[buffer][threadIdx.x] = at(p.src);
    };
    float acc[kWgradSide][kWgradSide] = {};
    const int r = threadIdx.x / 16 * kWgradSide, c = threadIdx.x % 16 * kWgradSide;
    fill(0, begin);
    int buffer = 0;
#pragma unroll 1
    for (uint32_t first = begin; first < end; first += PW_WGRAD_SLAB, buffer ^= 1) {
        __syncthreads();
        const int positions = int(min(end - first, uint32_t(PW_WGRAD_SLAB)));
        d.load(shared.d_at[buffer], positions);
        src.load(shared.src_at[buffer], positions);
        d.store(shared.d);
        src.store(shared.src);
        fill(buffer ^ 1, first + PW_WGRAD_SLAB);
        __syncthreads();
#pragma unroll
        for (int q = 0; q < PW_WGRAD_SLAB; ++q) {
            const float4 a = *reinterpret_cast<const float4*>(&shared.d[q][r]);
            const float4 b = *reinterpret_cast<const float4*>(&shared.src[q][c]);
            const float rows[kWgradSide] = {a.x, a.y, a.z, a.w};
            const float columns[kWgradSide] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < kWgradSide; ++i) {
#pragma unroll
                for (int j = 0; j < kWgradSide; ++j) {
                    acc[i][j] = fmaf(rows[i], columns[j], acc[i][j]);
                }
            }
        }
    }
    float* const to = p.to + split * (int64_t(p.groups) * p.rows * p.depth);
#pragma unroll
    for (int i = 0; i < kWgradSide; ++i) {
#pragma unroll
        for (int j = 0; j < kWgradSide; ++j) {
            if (row + r + i < p.rows && k + c + j < p.depth) {
                to[(int64_t(group) * p.rows + row + r + i) * p.depth + k + c + j] = acc[i][j];
            }
        }
    }
}

__device__ inline void sum_splits(const pw_wgrad_sum& p, int64_t block) {
    const int64_t at = block * PW_WGRAD_THREADS + threadIdx.x;
    if (at >= p.values) return;
    double sum = 0.0;
    for (uint32_t split = 0; split < p.splits; ++split) sum += double(p.from[split * p.values + at]);
    p.to[at] = float(sum);
}
