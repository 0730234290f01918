// Products in f32 on the ordinary FMA units, of tensors of any dtype, exact: one chain of fused multiply-adds per element, over
// depth in rising order, whatever the tile. So results do not depend on the tile chosen.
#pragma once

#include "../params.h"
#include "../tiles.cuh"
#include "source.cuh"

// A tile of kRows output channels x kPositions positions, kDepth deep. Threads hold kSlow x kFast
// accumulators, where the fast axis is the one along which dst is contiguous: positions if
// kChannelsFast is false (NCHW), channels if it is true (NHWC).
//
// A warp covers 8 * kFast x 4 * kSlow elements; a thread's elements come in fours, 32 (fast) or
// 16 (slow) apart, so that its reads of shared memory and its stores are whole vectors.
template <class Element_, int kRows_, int kPositions_, int kDepth_, int kSlow_, int kFast_,
          bool kChannelsFast_>
struct SimtTile {
    using Element = Element_;  // of the tensors; slabs are f32
    static constexpr int kRows = kRows_;
    static constexpr int kPositions = kPositions_;
    static constexpr int kDepth = kDepth_;
    static constexpr int kSlow = kSlow_;
    static constexpr int kFast = kFast_;
    static constexpr bool kChannelsFast = kChannelsFast_;
    static constexpr int kThreads = kRows * kPositions / (kSlow * kFast);
    static constexpr int kVector = 4;  // neighbours along the fast axis
    static constexpr int kFastExtent = kChannelsFast ? kRows : kPositions;
    static constexpr int kSlowExtent = kChannelsFast ? kPositions : kRows;
    static constexpr int kWarpFast = 8 * kFast;
    static constexpr int kWarpSlow = 4 * kSlow;
    static constexpr int kSrcLoads = kPositions * kDepth / kThreads;
    static constexpr int kWeightLoads = kRows * kDepth / kThreads / 4;

    static_assert(kFast % 4 == 0 && kSlow % 4 == 0, "elements come in vectors of four");
    static_assert(kFastExtent % kWarpFast == 0 && kSlowExtent % kWarpSlow == 0, "whole warps");
    static_assert(kDepth == 8 || kDepth == 16, "the swizzle knows these depths");
    static_assert(kSrcLoads % 4 == 0 && kWeightLoads > 0, "every thread loads whole vectors");
    static_assert(kThreads % (kPositions / 4) == 0 && kThreads % (kRows / 4) == 0 &&
                      kThreads % kPositions == 0,
                  "a thread keeps its column while it loads");

    // Where this thread's elements lie in the tile. In each half of a warp, pairs of lanes share
    // the fast coordinate: a 128-bit shared read then takes the fewest passes.
    static __device__ int fast_begin() {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        return warp % (kFastExtent / kWarpFast) * kWarpFast + ((lane >> 1) & 7) * 4;
    }
    static __device__ int slow_begin() {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        return warp / (kFastExtent / kWarpFast) * kWarpSlow + ((lane & 1) | ((lane >> 4) << 1)) * 4;
    }
    static __device__ constexpr int fast_offset(int i) { return i / 4 * 32 + i % 4; }
    static __device__ constexpr int slow_offset(int i) { return i / 4 * 16 + i % 4; }

    // Position `column` of row k of the src tile is stored at column `column ^ swizzle(k)`: rows
    // then start in different banks, so that both ways of writing the tile (along positions, and
    // along channels, which transposes it) and the reads of the product are free of conflicts.
    static __device__ constexpr int swizzle(int k) {
        return kDepth == 8 ? k << 2 : (((k >> 2) << 1) ^ (k & 1) ^ ((k & 2) << 1)) << 2;
    }
};

template <class Tile>
struct SimtShared {
    alignas(16) float weight[2][Tile::kDepth][Tile::kRows];
    alignas(16) float src[2][Tile::kDepth][Tile::kPositions];
    PositionTable<Tile::kPositions> at;
    TileAt tile;
};

template <class T>
__device__ float4 load4(const T* from) {
    float v[4];
    load_vector<true>(v, from);
    return make_float4(v[0], v[1], v[2], v[3]);
}

// Copies a slab of weights, kDepth deep, through registers into shared memory.
template <class Tile>
struct WeightLoader {
    static constexpr int kVectors = Tile::kRows / 4;
    static constexpr int kStep = Tile::kThreads / kVectors;

    const typename Tile::Element* from;
    int row, k;
    bool inside;
    float4 stage[Tile::kWeightLoads];

    __device__ WeightLoader(const pw_fprop& p, const TileAt& tile, const Run& run) {
        row = threadIdx.x % kVectors * 4;
        k = threadIdx.x / kVectors;
        inside = tile.row + row < p.row_pitch;
        from = static_cast<const typename Tile::Element*>(p.weight) + (run.input + k) * p.row_pitch +
               tile.row + row;
    }

    // `left` is how much depth is left, this slab included.
    __device__ void load(const pw_fprop& p, int left) {
#pragma unroll
        for (int i = 0; i < Tile::kWeightLoads; ++i) {
            const bool in = inside && k + i * kStep < left;
            stage[i] = in ? load4(from) : make_float4(0.f, 0.f, 0.f, 0.f);
            from += int64_t(kStep) * p.row_pitch;
        }
    }

    __device__ void store(float (&to)[Tile::kDepth][Tile::kRows]) const {
#pragma unroll
        for (int i = 0; i < Tile::kWeightLoads; ++i) {
            *reinterpret_cast<float4*>(&to[k + i * kStep][row]) = stage[i];
        }
    }
};

// Copies a slab of src, kDepth deep, through registers into shared memory, in one of four ways
// that differ in which axis neighbouring threads follow and how much each takes at once. A thread
// starts at (k, column) and goes on in steps that are powers of two, so steps and swizzles alike
// are exclusive-ors of constants on one shared address.
template <class Tile>
struct SrcLoader {
    // Along positions: vectors, or single floats, per row of the tile, and rows per pass.
    static constexpr int kVectors = Tile::kPositions / 4;
    static constexpr int kVectorStep = Tile::kThreads / kVectors;
    static constexpr int kScalarStep = Tile::kThreads / Tile::kPositions;
    // Along channels: vectors per position, and positions per pass.
    static constexpr int kDeep = Tile::kDepth / 4;
    static constexpr int kDeepStep = Tile::kThreads / kDeep;
    // Along channels, single floats: a warp takes 8 channels of 4 positions.
    static constexpr int kPasses = Tile::kDepth / 8;
    static constexpr int kPassStep = Tile::kThreads / 8;

    const pw_source& source;
    const typename Tile::Element* from;
    int column, k;
    int valid;  // positions of the tile that exist
    int to;     // where (k, column) is stored
    float stage[Tile::kSrcLoads];

    __device__ SrcLoader(const pw_fprop& p, const TileAt& tile, const Run& run,
                         const PositionTable<Tile::kPositions>& at)
        : source(*run.source) {
        const int t = threadIdx.x;
        const int64_t left = p.positions - tile.position;
        valid = left < Tile::kPositions ? int(left) : Tile::kPositions;
        switch (source.read) {
            case PW_READ_POSITIONS_VEC4: column = t % kVectors * 4, k = t / kVectors; break;
            case PW_READ_CHANNELS_VEC4: column = t / kDeep, k = t % kDeep * 4; break;
            case PW_READ_POSITIONS: column = t % Tile::kPositions, k = t / Tile::kPositions; break;
            default: column = t / 8, k = t % 8; break;
        }
        to = k * Tile::kPositions + (column ^ Tile::swizzle(k));
        from = static_cast<const typename Tile::Element*>(source.data) +
               (run.channel + k) * source.channel;
        if (source.read == PW_READ_POSITIONS || source.read == PW_READ_POSITIONS_VEC4) {
            from += at.src[column];
        }
    }

    __device__ void load(const PositionTable<Tile::kPositions>& at, int left) {
        switch (source.read) {
            case PW_READ_POSITIONS_VEC4:
#pragma unroll
                for (int i = 0; i < Tile::kSrcLoads / 4; ++i) {
                    const bool in = column < valid && k + i * kVectorStep < left;
                    put(i, in ? load4(from) : zero());
                    from += kVectorStep * source.channel;
                }
                break;
            case PW_READ_CHANNELS_VEC4:
#pragma unroll
                for (int i = 0; i < Tile::kSrcLoads / 4; ++i) {
                    const int c = column + i * kDeepStep;
                    put(i, c < valid && k < left ? load4(from + at.src[c]) : zero());
                }
                from += Tile::kDepth;
                break;
            case PW_READ_POSITIONS:
#pragma unroll
                for (int i = 0; i < Tile::kSrcLoads; ++i) {
                    const bool in = column < valid && k + i * kScalarStep < left;
                    stage[i] = in ? widen(load_one(from)) : 0.f;
                    from += kScalarStep * source.channel;
                }
                break;
            default:
#pragma unroll
                for (int i = 0; i < Tile::kSrcLoads; ++i) {
                    constexpr int kColumns = Tile::kSrcLoads / kPasses;
                    const int c = column + i % kColumns * kPassStep;
                    const bool in = c < valid && k + i / kColumns * 8 < left;
                    stage[i] = in ? widen(load_one(from + at.src[c])) : 0.f;
                    if (i % kColumns == kColumns - 1) from += 8 * source.channel;
                }
        }
    }

    __device__ void store(float (&slab)[Tile::kDepth][Tile::kPositions]) const {
        switch (source.read) {
            case PW_READ_POSITIONS_VEC4:
#pragma unroll
                for (int i = 0; i < Tile::kSrcLoads / 4; ++i) {
                    *reinterpret_cast<float4*>(place(slab, i * kVectorStep, 0)) =
                        make_float4(stage[4 * i], stage[4 * i + 1], stage[4 * i + 2], stage[4 * i + 3]);
                }
                break;
            case PW_READ_CHANNELS_VEC4:
#pragma unroll
                for (int i = 0; i < Tile::kSrcLoads; ++i) {
                    *place(slab, i % 4, i / 4 * kDeepStep) = stage[i];
                }
                break;
            case PW_READ_POSITIONS:
#pragma unroll
                for (int i = 0; i < Tile::kSrcLoads; ++i) *place(slab, i * kScalarStep, 0) = stage[i];
                break;
            default:
#pragma unroll
                for (int i = 0; i < Tile::kSrcLoads; ++i) {
                    constexpr int kColumns = Tile::kSrcLoads / kPasses;
                    *place(slab, i / kColumns * 8, i % kColumns * kPassStep) = stage[i];
                }
        }
    }

    // Runs the steps on what was stored; `first` is the slab's first channel.
    __device__ void transform(const pw_fprop& p, const PositionTable<Tile::kPositions>& at,
                              float (&slab)[Tile::kDepth][Tile::kPositions], int64_t first,
                              int left) const {
        // More than two at once would not fit into registers beside the largest tile's sums.
        using T = typename Tile::Element;
        run_source_steps<T, Tile::kSrcLoads, 2>(p, at, first, [&](int i) {
            // As in `store`.
            constexpr int kColumns = Tile::kSrcLoads / kPasses;
            int deeper, across, vector = 0;
            switch (source.read) {
                case PW_READ_POSITIONS_VEC4:
                    deeper = i / 4 * kVectorStep, across = 0, vector = rotated<float>(i);
                    break;
                case PW_READ_CHANNELS_VEC4: deeper = i % 4, across = i / 4 * kDeepStep; break;
                case PW_READ_POSITIONS: deeper = i * kScalarStep, across = 0; break;
                default: deeper = i / kColumns * 8, across = i % kColumns * kPassStep;
            }
            const bool exists = column + across < valid && k + deeper < left;
            return SlabElement<float>{place(slab, deeper, across) + vector, k + deeper,
                               column + across + vector, exists};
        });
    }

private:
    static __device__ float4 zero() { return make_float4(0.f, 0.f, 0.f, 0.f); }
    __device__ void put(int i, float4 v) {
        stage[4 * i] = v.x, stage[4 * i + 1] = v.y, stage[4 * i + 2] = v.z, stage[4 * i + 3] = v.w;
    }
    // Where (k + deeper, column + across) is stored.
    __device__ float* place(float (&slab)[Tile::kDepth][Tile::kPositions], int deeper, int across) const {
        return &slab[deeper][0] + (to ^ (across ^ Tile::swizzle(deeper)));
    }
};

template <int kCount>
__device__ void read_vectors(float (&to)[kCount], const float* row, int column, int swizzle, int apart) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
        const float4 v = *reinterpret_cast<const float4*>(row + ((column + i * apart) ^ swizzle));
        to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
}

// acc += weight * src over one slab.
template <class Tile>
__device__ void multiply(const float (&weight)[Tile::kDepth][Tile::kRows],
                         const float (&src)[Tile::kDepth][Tile::kPositions],
                         float (&acc)[Tile::kSlow][Tile::kFast]) {
    const int fast = Tile::fast_begin(), slow = Tile::slow_begin();
#pragma unroll
    for (int k = 0; k < Tile::kDepth; ++k) {
        float a[Tile::kSlow], b[Tile::kFast];
        if (Tile::kChannelsFast) {
            read_vectors(a, src[k], slow, Tile::swizzle(k), 16);
            read_vectors(b, weight[k], fast, 0, 32);
        } else {
            read_vectors(a, weight[k], slow, 0, 16);
            read_vectors(b, src[k], fast, Tile::swizzle(k), 32);
        }
#pragma unroll
        for (int s = 0; s < Tile::kSlow; ++s) {
#pragma unroll
            for (int f = 0; f < Tile::kFast; ++f) acc[s][f] = fmaf(a[s], b[f], acc[s][f]);
        }
    }
}

template <class Tile, bool kSteps>
__device__ void sum_slabs(const pw_fprop& p, const TileAt& tile, const Run& run,
                          SimtShared<Tile>& shared, float (&acc)[Tile::kSlow][Tile::kFast]) {
    WeightLoader<Tile> weight(p, tile, run);
    SrcLoader<Tile> src(p, tile, run, shared.at);

    // Global reads of the next slab are in flight while this one is multiplied; two buffers make
    // one barrier per slab enough. The first turn only reads.
    int left = run.depth;
    for (int buffer = 1;; buffer ^= 1) {
        const bool more = left > 0;
        if (more) {
            weight.load(p, left);
            src.load(shared.at, left);
        }
        if (left != run.depth) {
            multiply<Tile>(shared.weight[buffer], shared.src[buffer], acc);
        }
        if (more) {
            weight.store(shared.weight[buffer ^ 1]);
            src.store(shared.src[buffer ^ 1]);
            if (kSteps && p.source_step_count > 0) {
                // Computed anew, so that the loop's registers need not hold it.
                const int64_t first = tile.first_input(p, *run.source) + (run.depth - left);
                src.transform(p, shared.at, shared.src[buffer ^ 1], first, left);
            }
        }
        __syncthreads();
        if (!more) break;
        left -= Tile::kDepth;
    }
}

// Adds the products of some channels of one tile. Every thread of the block calls it after the
// position table is filled and visible; the shared slabs are free again when it returns. A layer
// without steps on src has a loop that knows of none, but in large tiles, where ptxas would spill
// registers of two loops.
template <class Tile>
__device__ void mainloop(const pw_fprop& p, const TileAt& tile, const Run& run,
                         SimtShared<Tile>& shared, float (&acc)[Tile::kSlow][Tile::kFast]) {
    if (Tile::kSlow * Tile::kFast < 32 && p.source_step_count == 0) {
        sum_slabs<Tile, false>(p, tile, run, shared, acc);
    } else {
        sum_slabs<Tile, true>(p, tile, run, shared, acc);
    }
}

// What is left to do once the whole depth is summed: nothing.
template <class Tile>
__device__ void finish_sums(const pw_fprop&, const TileAt&, SimtShared<Tile>&,
                            float (&)[Tile::kSlow][Tile::kFast]) {}
