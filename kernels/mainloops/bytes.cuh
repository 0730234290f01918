// Products of bytes on tensor cores: of integers, with exact sums in i32, or of floats, with sums in f32.
// Slabs of weight and src lie along the
// depth, four channels to a word, as the instructions take them: weights and channels-last sources
// arrive by asynchronous copies, several slabs ahead; others pass through registers, where words of
// four positions become words of four channels.
#pragma once

#include "../elements.cuh"
#include "../params.h"
#include "../ptx.cuh"
#include "../tiles.cuh"

// What products of bytes are summed in: an i32, or an f32 where the bytes are floats.
template <bool kFloats>
struct SumOf {
    using Type = int32_t;
};
template <>
struct SumOf<true> {
    using Type = float;
};

// A tile of kRows output channels x kPositions positions, of which a warp has kWarpRows x
// kWarpPositions in blocks of 16 x 8.
template <bool kFloats_, int kRows_, int kPositions_, int kDepth_, int kWarpRows_, int kWarpPositions_,
          int kStages_>
struct ByteTile {
    static constexpr bool kFloats = kFloats_;
    using Sum = typename SumOf<kFloats>::Type;
    static constexpr int kRows = kRows_;
    static constexpr int kPositions = kPositions_;
    static constexpr int kDepth = kDepth_;
    static constexpr int kWarpRows = kWarpRows_;
    static constexpr int kWarpPositions = kWarpPositions_;
    static constexpr int kStages = kStages_;
    static constexpr int kRowWarps = kRows / kWarpRows;
    static constexpr int kThreads = 32 * kRowWarps * (kPositions / kWarpPositions);
    static constexpr int kRowBlocks = kWarpRows / 16;
    static constexpr int kPositionBlocks = kWarpPositions / 8;

    static_assert(kDepth == 64, "a slab is four vectors of 16 bytes deep: two instructions");
    static_assert(kRows % kWarpRows == 0 && kPositions % kWarpPositions == 0, "whole warps");
    static_assert(kWarpRows % 16 == 0 && kWarpPositions % 8 == 0, "whole blocks");
    static_assert((kWarpRows & (kWarpRows - 1)) == 0 && (kPositions & (kPositions - 1)) == 0,
                  "the epilogue divides by them");
    static_assert(kRows * 4 % kThreads == 0 && kPositions * 4 % kThreads == 0 && kPositions % 32 == 0,
                  "every thread loads as much");

    static __device__ int lane_group() { return threadIdx.x >> 2 & 7; }
    static __device__ int lane_thread() { return threadIdx.x & 3; }
    static __device__ int warp_row() { return int(threadIdx.x) / 32 % kRowWarps * kWarpRows; }
    static __device__ int warp_position() {
        return int(threadIdx.x) / 32 / kRowWarps * kWarpPositions;
    }

    // Where vector v of four lies in a slab, of row (or position) i: the lanes that an access serves at
    // once, neighbours along i or every fourth along it, then meet all banks.
    static __device__ constexpr int at(int i, int v) {
        return (i ^ (i >> 2 & 1)) * 4 + (v ^ (i >> 3 & 3));
    }
};

template <class Tile>
struct ByteSlabs {
    uint4 weight[Tile::kStages][Tile::kRows * 4];
    uint4 src[Tile::kStages][Tile::kPositions * 4];
};

// A warp row's sums, the slower of both axes in rows of whole vectors; the padding lets the lanes of
// an instruction's results meet all banks.
template <class Tile>
union ByteSums {
    typename Tile::Sum by_row[Tile::kWarpRows][Tile::kPositions + 8];
    typename Tile::Sum by_position[Tile::kPositions][Tile::kWarpRows + 4];
};

template <class Tile>
struct ByteShared {
    // Sums take the place of slabs that nobody reads any more.
    union {
        ByteSlabs<Tile> slabs;
        ByteSums<Tile> sums;
    };
    PositionTable<Tile::kPositions> at;
    TileAt tile;
};

// Brings one slab after another: everything beyond the end of an axis is zero, in the weight; in src,
// any integer will do beyond the last channel, as it meets a zero; not any float, as it may be infinite.
template <class Tile>
class ByteCopier {
    static constexpr int kThreads = Tile::kThreads;
    // Words of four channels x four positions that pass through a thread's registers, per slab.
    static constexpr int kUnits = Tile::kPositions * 4 / kThreads;

    const pw_bytes& p;
    const pw_source& source;
    const PositionTable<Tile::kPositions>& at;
    const uint8_t* weight;  // of the tile's first row, from the block's first channel on
    const uint8_t* src;     // of its first channel
    const int& depth;       // channels that the block sums, in shared memory: registers are short
    int rows, valid;        // rows and positions of the tile that exist
    int next_k = 0;         // the slab to be asked for
    int k = 0;              // of the slab in registers
    uint32_t words[kUnits][4];

public:
    __device__ ByteCopier(const pw_bytes& p, const TileAt& tile,
                          const PositionTable<Tile::kPositions>& at)
        : p(p), source(p.fprop.sources[0]), at(at), depth(tile.depth) {
        const pw_fprop& f = p.fprop;
        const int64_t first = int64_t(tile.group) * f.rows + tile.row;
        weight = static_cast<const uint8_t*>(f.weight) + first * p.depth_pitch + tile.depth_begin;
        const int64_t channel = int64_t(tile.group) * f.depth + tile.depth_begin;
        src = static_cast<const uint8_t*>(source.data) + channel * source.channel;
        rows = min(int(f.rows - tile.row), Tile::kRows);
        valid = int(min(f.positions - tile.position, int64_t(Tile::kPositions)));
    }

    // Starts the next slab's copies, if there is one, and closes their group; what goes through
    // registers is on its way to them.
    __device__ void next(uint4* weight_slab, uint4* src_slab) {
        k = next_k;
        if (k < depth) {
            copy_weight(weight_slab);
            if (asynchronous()) {
                copy_src(src_slab);
            } else {
                fetch();
            }
            next_k += Tile::kDepth;
        }
        ptx::commit();
    }

    // Puts it where `next` was told.
    __device__ void store(uint4* src_slab) const {
        if (asynchronous() || k >= depth) return;
        uint32_t* const slab = reinterpret_cast<uint32_t*>(src_slab);
        const bool channels = reads_channels(source);
#pragma unroll
        for (int n = 0; n < kUnits; ++n) {
            const Unit unit = this->unit(n);
            const uint32_t(&w)[4] = words[n];
            uint32_t turned[4];
            const uint32_t low[2] = {__byte_perm(w[0], w[1], 0x5140), __byte_perm(w[2], w[3], 0x5140)};
            const uint32_t high[2] = {__byte_perm(w[0], w[1], 0x7362), __byte_perm(w[2], w[3], 0x7362)};
            turned[0] = ptx::lower_halves(low[0], low[1]), turned[1] = ptx::upper_halves(low[0], low[1]);
            turned[2] = ptx::lower_halves(high[0], high[1]);
            turned[3] = ptx::upper_halves(high[0], high[1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                slab[Tile::at(unit.position + i, unit.k / 16) * 4 + unit.k / 4 % 4] =
                    channels ? w[i] : turned[i];
            }
        }
    }

private:
    __device__ bool asynchronous() const { return source.read == PW_READ_CHANNELS_VEC16; }

    // Where four channels and four positions begin: 32 positions side by side, or all channels of a
    // slab.
    struct Unit {
        int position, k;
    };
    __device__ Unit unit(int n) const {
        const int i = int(threadIdx.x) + n * kThreads;
        if (reads_channels(source)) return {i / 16 * 4, i % 16 * 4};
        constexpr int kAcross = Tile::kPositions / 32;
        const int warp = i / 32;
        return {(warp % kAcross * 8 + i % 8) * 4, (warp / kAcross * 4 + i % 32 / 8) * 4};
    }

    __device__ void copy_weight(uint4* slab) const {
#pragma unroll
        for (int i = threadIdx.x; i < Tile::kRows * 4; i += kThreads) {
            const int row = i / 4, v = i % 4;
            const bool in = row < rows && k + 16 * v < depth;
            const uint8_t* const from = weight + int64_t(row) * p.depth_pitch + k + 16 * v;
            ptx::copy_async<16>(slab + Tile::at(row, v), in ? from : weight, in);
        }
    }

    __device__ void copy_src(uint4* slab) const {
#pragma unroll
        for (int i = threadIdx.x; i < Tile::kPositions * 4; i += kThreads) {
            const int position = i / 4, v = i % 4;
            const bool in = position < valid && k + 16 * v < depth;
            const uint8_t* const from = src + at.src[position] + k + 16 * v;
            ptx::copy_async<16>(slab + Tile::at(position, v), in ? from : src, in);
        }
    }

    // Words of four channels of a position, or of four positions of a channel.
    __device__ void fetch() {
        switch (source.read) {
            case PW_READ_CHANNELS_VEC4:
            case PW_READ_CHANNELS_VEC8:
                each_word([&](const Unit& unit, const uint8_t*, int i) {
                    const uint8_t* const from = src + at.src[unit.position + i] + k + unit.k;
                    return __ldg(reinterpret_cast<const uint32_t*>(from));
                });
                break;
            case PW_READ_POSITIONS_VEC4:
            case PW_READ_POSITIONS_VEC8:
            case PW_READ_POSITIONS_VEC16:
                each_word([&](const Unit& unit, const uint8_t* first, int i) -> uint32_t {
                    if (leaves_out(unit.k + i)) return 0;
                    return __ldg(reinterpret_cast<const uint32_t*>(first + channel(unit.k + i)));
                });
                break;
            default:
                each_word([&](const Unit& unit, const uint8_t*, int i) {
                    // More would spill in kernels of floats.
                    constexpr int kAtOnce = Tile::kFloats ? 2 : 4;
                    const bool channels = reads_channels(source);
                    uint32_t word = 0;
#pragma unroll kAtOnce
                    for (int j = 0; j < 4; ++j) {
                        const int position = unit.position + (channels ? i : j);
                        const int of_slab = unit.k + (channels ? j : i);
                        if (leaves_out(of_slab)) continue;
                        const int64_t offset = at.src[position] + channel(of_slab);
                        word |= uint32_t(__ldg(src + offset)) << 8 * j;
                    }
                    return word;
                });
        }
    }

    // Whether a channel of the slab is to be zero.
    __device__ bool leaves_out(int of_slab) const {
        return Tile::kFloats && k + of_slab >= depth;
    }

    // A channel of the slab; the last stands in for those beyond the end.
    __device__ int64_t channel(int of_slab) const {
        return min(k + of_slab, depth - 1) * source.channel;
    }

    template <class Read>
    __device__ void each_word(Read read) {
#pragma unroll
        for (int n = 0; n < kUnits; ++n) {
            const Unit unit = this->unit(n);
            const bool in = unit.position < valid && k + unit.k < depth;
            // Positions beyond the end have a place in the table.
            const uint8_t* const first = src + at.src[unit.position];
#pragma unroll
            for (int i = 0; i < 4; ++i) words[n][i] = in ? read(unit, first, i) : 0;
        }
    }
};

// sum += a row of blocks of the weight times one of src, over one slab: two instructions.
template <pw_operands kOperands>
__device__ void add_products(int32_t (&sum)[4], const uint32_t (&rows)[2][4], const uint4& v) {
    ptx::mma_i8<kOperands == PW_I8_I8>(sum, rows[0], {v.x, v.y});
    ptx::mma_i8<kOperands == PW_I8_I8>(sum, rows[1], {v.z, v.w});
}
// Some tensor cores keep 14 bits of a sum of such products (the DeepSeek-V3 report says so of H800): they
// sum a slab and no more.
template <pw_operands kOperands>
__device__ void add_products(float (&sum)[4], const uint32_t (&rows)[2][4], const uint4& v) {
    float slab[4] = {};
    ptx::mma_fp8<kOperands>(slab, rows[0], {v.x, v.y});
    ptx::mma_fp8<kOperands>(slab, rows[1], {v.z, v.w});
#pragma unroll
    for (int n = 0; n < 4; ++n) sum[n] += slab[n];
}

// acc += weight * src over one slab.
template <class Tile, pw_operands kOperands>
__device__ void multiply_bytes(const uint4* weight, const uint4* src,
                               typename Tile::Sum (&acc)[Tile::kRowBlocks][Tile::kPositionBlocks][4]) {
    const int g = Tile::lane_group(), t = Tile::lane_thread();
    uint4 columns[Tile::kPositionBlocks];
#pragma unroll
    for (int j = 0; j < Tile::kPositionBlocks; ++j) {
        columns[j] = src[Tile::at(Tile::warp_position() + 8 * j + g, t)];
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) {
        const int row = Tile::warp_row() + 16 * i + g;
        const uint4 upper = weight[Tile::at(row, t)], lower = weight[Tile::at(row + 8, t)];
        // Which channels of a slab an instruction takes as its own is free, if both operands agree.
        const uint32_t rows[2][4] = {{upper.x, lower.x, upper.y, lower.y},
                                     {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
        for (int j = 0; j < Tile::kPositionBlocks; ++j) {
            add_products<kOperands>(acc[i][j], rows, columns[j]);
        }
    }
}

template <class Tile>
__device__ void multiply_bytes(pw_operands operands, const uint4* weight, const uint4* src,
                               typename Tile::Sum (&acc)[Tile::kRowBlocks][Tile::kPositionBlocks][4]) {
    if constexpr (Tile::kFloats) {
        switch (operands) {
            case PW_E4M3_E4M3: multiply_bytes<Tile, PW_E4M3_E4M3>(weight, src, acc); break;
            case PW_E4M3_E5M2: multiply_bytes<Tile, PW_E4M3_E5M2>(weight, src, acc); break;
            case PW_E5M2_E4M3: multiply_bytes<Tile, PW_E5M2_E4M3>(weight, src, acc); break;
            default: multiply_bytes<Tile, PW_E5M2_E5M2>(weight, src, acc);
        }
    } else if (operands == PW_I8_I8) {
        multiply_bytes<Tile, PW_I8_I8>(weight, src, acc);
    } else {
        multiply_bytes<Tile, PW_I8_U8>(weight, src, acc);
    }
}

// The products of the block's channels of one tile. Every thread of the block calls it after the position
// table is filled and visible; nobody reads the slabs any more when it returns.
template <class Tile>
__device__ void sum_bytes(const pw_bytes& p, const TileAt& tile, ByteShared<Tile>& shared,
                          typename Tile::Sum (&acc)[Tile::kRowBlocks][Tile::kPositionBlocks][4]) {
    ByteSlabs<Tile>& slabs = shared.slabs;
    ByteCopier<Tile> copier(p, tile, shared.at);
#pragma unroll
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
        copier.next(slabs.weight[stage], slabs.src[stage]);
        copier.store(slabs.src[stage]);
    }
    int read = 0, write = Tile::kStages - 1;
#pragma unroll 1
    for (int done = 0; done < tile.depth; done += Tile::kDepth) {
        // This slab is there for every thread, and every thread is done with the one before, whose
        // place the next one takes.
        ptx::wait<Tile::kStages - 2>();
        __syncthreads();
        copier.next(slabs.weight[write], slabs.src[write]);
        multiply_bytes<Tile>(p.operands, slabs.weight[read], slabs.src[read], acc);
        copier.store(slabs.src[write]);
        write = read;
        read = read + 1 < Tile::kStages ? read + 1 : 0;
    }
    __syncthreads();
}
