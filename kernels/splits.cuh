// The sums of a tile whose depth several blocks share: for problems with too few tiles to fill the
// chip.
#pragma once

#include "tiles.cuh"

template <class Sum>
struct FourSums;
template <>
struct FourSums<float> {
    using Type = float4;
};
template <>
struct FourSums<int32_t> {
    using Type = int4;
};

// Every block leaves its sums in device memory; the last one to arrive adds them, in the order of the
// splits whoever came when, so that results are the same from run to run. True in that block, which
// then holds the whole sums; the others are done. Every thread of the block calls it.
template <class Tile, class Sum, int kSlow, int kFast>
__device__ bool add_up(const pw_fprop& p, const TileAt& tile, Sum (&acc)[kSlow][kFast]) {
    using Four = typename FourSums<Sum>::Type;
    constexpr int kVectors = kSlow * kFast / 4;
    // Threads lie side by side, so that a warp's accesses are whole lines.
    Four* const mine = reinterpret_cast<Four*>(p.partial) +
                       tile.index * (kVectors * Tile::kThreads) + threadIdx.x;
    const int64_t apart = tile.tiles * (kVectors * Tile::kThreads);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const Sum* v = &acc[i * 4 / kFast][i * 4 % kFast];
        mine[tile.split * apart + i * Tile::kThreads] = {v[0], v[1], v[2], v[3]};
    }

    // One thread speaks for the block: what the barrier has ordered before it, its fence makes
    // visible to other blocks before the block counts as arrived; and theirs to this one.
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        __threadfence();
        // The counter returns to 0 with the last block: ready for the next launch.
        last = atomicInc(p.arrived + tile.index, p.splits - 1) == p.splits - 1;
        __threadfence();
    }
    if (!__syncthreads_or(last)) return false;

#pragma unroll
    for (int s = 0; s < kSlow; ++s) {
#pragma unroll
        for (int f = 0; f < kFast; ++f) acc[s][f] = 0;
    }
    // Small tiles have few sums per thread: several splits are then read at once.
    constexpr int kAtOnce = kVectors < 16 ? 16 / kVectors : 1;
#pragma unroll kAtOnce
    for (uint32_t split = 0; split < p.splits; ++split) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            // Past L1, which is not coherent between multiprocessors.
            const Four v = __ldcg(mine + split * apart + i * Tile::kThreads);
            Sum* to = &acc[i * 4 / kFast][i * 4 % kFast];
            to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
        }
    }
    return true;
}
