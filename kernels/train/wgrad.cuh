// The gradient by the weight: products of d and src, summed over positions. Several blocks may share
// the positions of a tile, each a range of them; their sums are added in the order of the ranges.
#pragma once

#include "../params.h"
#include "sweep.cuh"

// A tile of kRows x kColumns of a group's weight, and the range of positions that a block sums.
template <int kRows, int kColumns>
struct WgradAt {
    bool exists;
    int64_t split;
    uint32_t group;
    uint32_t row;
    uint32_t column;
    uint32_t begin;
    uint32_t end;

    static __device__ WgradAt of(const pw_wgrad& p, int64_t block) {
        const uint32_t row_tiles = (p.rows + kRows - 1) / kRows;
        const uint32_t column_tiles = (p.depth + kColumns - 1) / kColumns;
        const int64_t per_group = int64_t(row_tiles) * column_tiles;
        WgradAt at;
        at.split = block / (per_group * p.groups);
        at.exists = at.split < p.splits;
        const int64_t rest = block - at.split * (per_group * p.groups);
        at.group = uint32_t(rest / per_group);
        const uint32_t tile = uint32_t(rest - at.group * per_group);
        at.row = tile / column_tiles * kRows;
        at.column = tile % column_tiles * kColumns;
        at.begin = uint32_t(at.split) * p.chunk;
        at.end = min(at.begin + p.chunk, p.positions);
        return at;
    }

    // Where a row of the group lies among the sums of its split.
    __device__ float* to(const pw_wgrad& p, uint32_t row) const {
        return p.to + ((split * p.groups + group) * p.rows + row) * p.depth;
    }
};

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
    __device__ SlabOf(const pw_part& part, pw_read read, int64_t first, int count)
        : data(static_cast<const char*>(part.data) + size_of(part.element) * (first * part.channel)),
          stride(part.channel), type(part.element), count(count) {
        const int t = threadIdx.x;
        const bool channels_fast = along_channels(read);
        channel = channels_fast ? t % PW_WGRAD_TILE : t / PW_WGRAD_SLAB;
        position = channels_fast ? t / PW_WGRAD_TILE : t % PW_WGRAD_SLAB;
        deeper = channels_fast ? 0 : PW_WGRAD_THREADS / PW_WGRAD_SLAB;
        across = channels_fast ? PW_WGRAD_THREADS / PW_WGRAD_TILE : 0;
    }
    __device__ void load(const int64_t (&at)[PW_WGRAD_SLAB], int positions) {
        switch (type) {
            case PW_F16: load_as<f16>(at, positions); break;
            case PW_BF16: load_as<bf16>(at, positions); break;
            default: load_as<float>(at, positions);
        }
    }
    __device__ void store(float (&to)[PW_WGRAD_SLAB][PW_WGRAD_TILE + 4]) const {
#pragma unroll
        for (int i = 0; i < kWgradSide; ++i) to[position + i * across][channel + i * deeper] = v[i];
    }

private:
    const char* data;
    int64_t stride;
    pw_element type;
    int count, channel, position, deeper, across;
    float v[kWgradSide];

    template <class T>
    __device__ void load_as(const int64_t (&at)[PW_WGRAD_SLAB], int positions) {
        const T* const from = reinterpret_cast<const T*>(data);
#pragma unroll
        for (int i = 0; i < kWgradSide; ++i) {
            const int c = channel + i * deeper, q = position + i * across;
            v[i] = c < count && q < positions ? widen(from[c * stride + at[q]]) : 0.f;
        }
    }
};

__device__ inline void wgrad(const pw_wgrad& p, WgradShared& shared, int64_t block) {
    const auto at = WgradAt<PW_WGRAD_TILE, PW_WGRAD_TILE>::of(p, block);
    if (!at.exists) return;
    SlabOf d(p.d, p.d_read, int64_t(at.group) * p.rows + at.row, p.rows - at.row);
    SlabOf src(p.src, p.src_read, int64_t(at.group) * p.depth + at.column, p.depth - at.column);
    const auto fill = [&](int buffer, uint32_t first) {
        if (threadIdx.x >= PW_WGRAD_SLAB) return;
        const uint32_t position = min(first + threadIdx.x, p.positions - 1);
        const auto offset = [&](const pw_part& part) {
            return offset_of(position, p.extents, p.axis_count, part.axes);
        };
        shared.d_at[buffer][threadIdx.x] = offset(p.d);
        shared.src_at[buffer][threadIdx.x] = offset(p.src);
    };
    float acc[kWgradSide][kWgradSide] = {};
    const int r = threadIdx.x / 16 * kWgradSide, c = threadIdx.x % 16 * kWgradSide;
    fill(0, at.begin);
    int buffer = 0;
#pragma unroll 1
    for (uint32_t first = at.begin; first < at.end; first += PW_WGRAD_SLAB, buffer ^= 1) {
        __syncthreads();
        const int positions = int(min(at.end - first, uint32_t(PW_WGRAD_SLAB)));
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
#pragma unroll
    for (int i = 0; i < kWgradSide; ++i) {
        const uint32_t row = at.row + r + i;
#pragma unroll
        for (int j = 0; j < kWgradSide; ++j) {
            const uint32_t column = at.column + c + j;
            if (row < p.rows && column < p.depth) at.to(p, row)[column] = acc[i][j];
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
