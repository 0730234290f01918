// Products on tensor cores: of f16 or bf16, or of f32 rounded to TF32, or as sums of two TF32 values,
// which hold an f32's mantissa but for its last bit; sums in f32. Slabs of weight and src arrive by
// asynchronous copies, several ahead of the one that is multiplied.
#pragma once

#include "../elements.cuh"
#include "../params.h"
#include "../ptx.cuh"
#include "../tiles.cuh"
#include "source.cuh"

// A tile of kRows output channels x kPositions positions; a warp has kWarpRows x kWarpPositions of
// them, in blocks. kChannelsFast is the axis along which dst is contiguous, as for the SIMT tiles.
//
// Which element of a block is which row or column of an instruction's operands is ours to choose,
// as long as both operands and the sums agree. The choice makes whole vectors of everything, and so of
// loads and stores, without a detour through shared memory. With vectors of V elements:
//
//   row 8j + g of the instructions' 8V rows       is output channel Vg + j
//   column 8j + c of their 8V columns             is position 4V (c % 2) + V (c / 2) + j
//   word 8s + 4r + t of the 16 words of a depth   is word 4t + 2s + r of the input channels
//
// A word is what an operand's register holds: one TF32 channel, or two neighbouring 16-bit ones; a
// slab is 16 words deep, two instructions. So one read gives a lane its part of V rows (or of V
// columns, or of four words of depth where src lies along channels), and a thread's sums are vectors
// of V along either axis. Where slabs lie along rows or positions, words of two channels are put
// together from two reads.
template <class Element_, int kParts_, int kRows_, int kPositions_, int kDepth_, int kWarpRows_,
          int kWarpPositions_, int kStages_, bool kChannelsFast_>
struct MmaTile {
    using Element = Element_;              // of the tensors and of the slabs
    static constexpr int kParts = kParts_;  // TF32 values per operand of f32
    static constexpr int kRows = kRows_;
    static constexpr int kPositions = kPositions_;
    static constexpr int kDepth = kDepth_;
    static constexpr int kWarpRows = kWarpRows_;
    static constexpr int kWarpPositions = kWarpPositions_;
    static constexpr int kStages = kStages_;
    static constexpr bool kChannelsFast = kChannelsFast_;
    static constexpr int kRowWarps = kRows / kWarpRows;
    static constexpr int kThreads = 32 * kRowWarps * (kPositions / kWarpPositions);
    static constexpr int kPerWord = 4 / sizeof(Element);
    static constexpr int kPer16Bytes = 16 / sizeof(Element);
    static constexpr int smaller(int a, int b) { return a < b ? a : b; }
    static constexpr int kRowVector = smaller(kPer16Bytes, kWarpRows / 8);
    static constexpr int kPositionVector = smaller(kPer16Bytes, kWarpPositions / 8);
    static constexpr int kVector = kChannelsFast ? kRowVector : kPositionVector;
    // Of a thread: an eighth of the rows and a quarter of the positions of each block.
    static constexpr int kRowSums = kWarpRows / 8;
    static constexpr int kPositionSums = kWarpPositions / 4;
    static constexpr int kSlow = kChannelsFast ? kPositionSums : kRowSums;
    static constexpr int kFast = kChannelsFast ? kRowSums : kPositionSums;

    static_assert(kDepth == 16 * kPerWord, "a slab is two instructions deep");
    static_assert(kRowVector >= 4 && kPositionVector >= 4, "vectors of four at least");
    static_assert(kWarpRows % (8 * kRowVector) == 0 && kWarpPositions % (8 * kPositionVector) == 0,
                  "whole blocks");
    static_assert(kRows >= 64 || sizeof(Element) == 4, "a row of a slab fills all banks");
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
    static __device__ int row_begin() { return warp_row() + kRowVector * lane_group(); }
    static __device__ int position_begin() {
        return warp_position() + kPositionVector * lane_thread();
    }
    static __device__ constexpr int row_offset(int i) {
        return i / kRowVector * 8 * kRowVector + i % kRowVector;
    }
    static __device__ constexpr int position_offset(int i) {
        return i / kPositionVector * 4 * kPositionVector + i % kPositionVector;
    }

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
    // or in row `position ^ swizzle(position)`: the lanes that an access serves at once then meet
    // different banks. A swizzle of a sum of disjoint bits is the exclusive-or of both.
    static __device__ constexpr int lane_of(int k) { return k / kPer16Bytes & 3; }
    static __device__ constexpr int weight_swizzle(int k) { return lane_of(k) * 2 * kPer16Bytes; }
    static __device__ constexpr int src_swizzle(int k) {
        // Reads of 8 bytes serve 16 lanes at once, whose positions leave other bits free.
        return kPositionVector < kPer16Bytes
                   ? (lane_of(k) % 2 + lane_of(k) / 2 * 4) * kPer16Bytes
                   : lane_of(k) * kPer16Bytes;
    }
    static __device__ constexpr int position_swizzle(int position) {
        return position / (4 * kPositionVector) & 1;
    }
};

template <class Tile>
struct MmaShared {
    uint4 weight[Tile::kStages][Tile::kDepth * Tile::kRows / Tile::kPer16Bytes];
    uint4 src[Tile::kStages][Tile::kDepth * Tile::kPositions / Tile::kPer16Bytes];
    PositionTable<Tile::kPositions> at;
    TileAt tile;
};

// Starts the copies of one slab after another: everything beyond the end of an axis arrives as zero.
// kAlongChannels is what `reads_channels` says of the source.
template <class Tile, bool kAlongChannels>
class SlabCopier {
    using Element = typename Tile::Element;
    static constexpr int kDepth = Tile::kDepth, kThreads = Tile::kThreads;
    // Threads side by side take neighbours, a thread every kStep-th row of them.
    static constexpr int kWeightVectors = Tile::kRows / Tile::kPer16Bytes;
    static constexpr int kWeightStep = kThreads / kWeightVectors;
    // With kWidth elements at once.
    template <int kWidth>
    static constexpr int kDeeper = kThreads / (Tile::kPositions / kWidth);
    template <int kWidth>
    static constexpr int kAcross = kThreads / (kDepth / kWidth);

    const pw_fprop& p;
    const pw_source& source;
    const PositionTable<Tile::kPositions>& at;
    const Element* weight;
    const Element* src;
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

        const int row = t % kWeightVectors * Tile::kPer16Bytes, weight_k = t / kWeightVectors;
        weight_to = weight_k * Tile::kRows + (row ^ Tile::weight_swizzle(weight_k));
        weight_left = tile.row + row < p.row_pitch ? left - weight_k : 0;
        weight = static_cast<const Element*>(p.weight) + (run.input + weight_k) * p.row_pitch +
                 tile.row + row;

        const int64_t rest = p.positions - tile.position;
        valid = rest < Tile::kPositions ? int(rest) : Tile::kPositions;
        by_width([&](auto width) {
            constexpr int kWidth = decltype(width)::value;
            if (kAlongChannels) {
                column = t / (kDepth / kWidth), k = t % (kDepth / kWidth) * kWidth;
            } else {
                constexpr int kVectors = Tile::kPositions / kWidth;
                column = t % kVectors * kWidth, k = t / kVectors;
            }
        });
        src = static_cast<const Element*>(source.data) + (run.channel + k) * source.channel;
        if (kAlongChannels) {
            src_left = left - k;
            to = (column ^ Tile::position_swizzle(column)) * kDepth + k;
        } else {
            // The last position, which stands in for those past the end, may not be aligned.
            src += at.src[column < valid ? column : 0];
            src_left = column < valid ? left - k : 0;
            to = k * Tile::kPositions + (column ^ Tile::src_swizzle(k));
        }
    }

    // Starts the next slab's copies, if there is one, and closes their group.
    __device__ void next(uint4* weight_slab, uint4* src_slab) {
        if (left > 0) {
            copy_weight(reinterpret_cast<Element*>(weight_slab));
            copy_src(reinterpret_cast<Element*>(src_slab));
            left -= kDepth, weight_left -= kDepth, src_left -= kDepth;
        }
        ptx::commit();
    }

    // Runs the steps on this thread's part of a slab that has arrived; `first` is the slab's first
    // channel, `rest` the depth from there on.
    __device__ void transform(uint4* src_slab, int64_t first, int rest) {
        Element* const slab = reinterpret_cast<Element*>(src_slab);
        constexpr int kElements = kDepth * Tile::kPositions / kThreads;
        run_source_steps<Element, kElements, 4>(p, at, first, [&](int i) {
            // As `copy_src` has placed them.
            int across, deeper, vector;
            by_width([&](auto width) {
                constexpr int kWidth = decltype(width)::value;
                vector = kWidth > 1 ? rotated<Element, kWidth>(i) : 0;
                across = i / kWidth * kAcross<kWidth>, deeper = i / kWidth * kDeeper<kWidth>;
            });
            if (kAlongChannels) {
                Element* const here = slab + (to ^ Tile::position_swizzle(across) * kDepth) +
                                      across * kDepth + vector;
                const bool exists = column + across < valid && k < rest;
                return SlabElement<Element>{here, k + vector, column + across, exists};
            }
            Element* const here =
                slab + (to ^ Tile::src_swizzle(deeper)) + deeper * Tile::kPositions + vector;
            const bool exists = column < valid && k + deeper < rest;
            return SlabElement<Element>{here, k + deeper, column + vector, exists};
        });
    }

private:
    template <int kValue>
    struct Constant {
        static constexpr int value = kValue;
    };

    // Calls f with how many elements a thread takes at once.
    template <class Function>
    __device__ void by_width(Function f) const {
        switch (source.read) {
            case PW_READ_POSITIONS:
            case PW_READ_CHANNELS: f(Constant<1>()); break;
            case PW_READ_POSITIONS_VEC4:
            case PW_READ_CHANNELS_VEC4: f(Constant<4>()); break;
            // f32 has no such reads.
            default: f(Constant<Tile::kPer16Bytes>());
        }
    }

    __device__ void copy_weight(Element* slab) {
#pragma unroll
        for (int i = 0; i < kDepth; i += kWeightStep) {
            Element* const here = slab + (weight_to ^ Tile::weight_swizzle(i)) + i * Tile::kRows;
            ptx::copy_async<16>(here, weight, i < weight_left);
            weight += int64_t(kWeightStep) * p.row_pitch;
        }
    }

    __device__ void copy_src(Element* slab) {
        by_width([&](auto width) {
            constexpr int kWidth = decltype(width)::value;
            if constexpr (kAlongChannels) {
                along_channels<kWidth>(slab);
            } else {
                along_positions<kWidth>(slab);
            }
        });
    }

    // One element of 16 bits is less than an asynchronous copy takes.
    template <int kWidth>
    __device__ void copy(Element* here, const Element* from, bool in) {
        constexpr int kBytes = kWidth * sizeof(Element);
        if constexpr (kBytes >= 4) {
            ptx::copy_async<kBytes>(here, from, in);
        } else {
            *here = in ? load_one(from) : Element{0};
        }
    }

    template <int kWidth>
    __device__ void along_positions(Element* slab) {
        constexpr int kStep = kDeeper<kWidth>;
#pragma unroll
        for (int i = 0; i < kDepth; i += kStep) {
            Element* const here = slab + (to ^ Tile::src_swizzle(i)) + i * Tile::kPositions;
            copy<kWidth>(here, src, i < src_left);
            src += kStep * source.channel;
        }
    }

    template <int kWidth>
    __device__ void along_channels(Element* slab) {
        constexpr int kStep = kAcross<kWidth>;
        // Elements of 16 bits pass through registers, of which there are not enough for all.
        constexpr int kAtOnce = kWidth * sizeof(Element) < 4 ? 8 : Tile::kPositions;
#pragma unroll kAtOnce
        for (int i = 0; i < Tile::kPositions; i += kStep) {
            const bool in = column + i < valid && src_left > 0;
            Element* const here = slab + (to ^ Tile::position_swizzle(i) * kDepth) + i * kDepth;
            copy<kWidth>(here, src + at.src[column + i], in);
        }
        src += kDepth * source.channel;
    }
};

// kCount elements at column `column` of row k of a slab, and of the row behind it where words hold two,
// as kCount words.
template <int kWidth, class Element, int kCount>
__device__ void read_words(uint32_t (&to)[kCount], const Element* slab, int k, int column) {
    const Element* const from = slab + k * kWidth + column;
    if constexpr (sizeof(Element) == 4) {
        static_assert(kCount == 4, "16 bytes");
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
        uint32_t first[kCount / 2], second[kCount / 2];
        const auto read = [](uint32_t(&words)[kCount / 2], const Element* from) {
            if constexpr (kCount == 4) {
                const uint2 v = *reinterpret_cast<const uint2*>(from);
                words[0] = v.x, words[1] = v.y;
            } else {
                const uint4 v = *reinterpret_cast<const uint4*>(from);
                words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
            }
        };
        read(first, from), read(second, from + kWidth);
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            to[2 * i] = ptx::lower_halves(first[i], second[i]);
            to[2 * i + 1] = ptx::upper_halves(first[i], second[i]);
        }
    }
}

// Calls put(s, r, j, x) for this lane's word x of src in group j of eight columns, at step s and in
// half r of the depth.
template <class Tile, bool kAlongChannels, class Put>
__device__ void read_columns(const uint4* slab, Put put) {
    constexpr int kCount = Tile::kWarpPositions / 8, kVector = Tile::kPositionVector;
    const int g = Tile::lane_group(), t = Tile::lane_thread();
    const int first = Tile::warp_position() + (g & 1) * 4 * kVector + (g >> 1) * kVector;
    if (kAlongChannels) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const int position = (first ^ Tile::position_swizzle(first) ^ j % kVector) +
                                 j / kVector * 8 * kVector;
            const uint4 v = slab[position * 4 + t];
            put(0, 0, j, v.x), put(0, 1, j, v.y), put(1, 0, j, v.z), put(1, 1, j, v.w);
        }
    } else {
        const auto* const src = reinterpret_cast<const typename Tile::Element*>(slab);
        const int k = Tile::kPer16Bytes * t;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < kCount; j += kVector) {
                uint32_t words[kVector];
                read_words<Tile::kPositions>(words, src, k + i * Tile::kPerWord,
                                             (first ^ Tile::src_swizzle(k)) + j * 8);
#pragma unroll
                for (int n = 0; n < kVector; ++n) put(i / 2, i % 2, j + n, words[n]);
            }
        }
    }
}

// This lane's words of the weight at step s and in half r of the depth, of the channels of a block.
template <class Tile>
__device__ void read_rows(uint32_t (&to)[Tile::kRowVector], const uint4* slab, int block, int s, int r) {
    const int k = Tile::kPer16Bytes * Tile::lane_thread();
    const int first = Tile::row_begin() ^ Tile::weight_swizzle(k);
    read_words<Tile::kRows>(to, reinterpret_cast<const typename Tile::Element*>(slab),
                            k + (2 * s + r) * Tile::kPerWord, first + block * 8 * Tile::kRowVector);
}

// c += a * b; operands of f32 are bits of TF32.
template <class Element>
__device__ void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                             const uint32_t (&b)[2]) {
    if constexpr (sizeof(Element) == 4) {
        ptx::mma_tf32(c0, c1, c2, c3, a, b);
    } else if constexpr (Element::kIsBf16) {
        ptx::mma_bf16(c0, c1, c2, c3, a, b);
    } else {
        ptx::mma_f16(c0, c1, c2, c3, a, b);
    }
}

// acc += weight * src over one slab, in TF32 or 16 bits. TF32 weights were rounded when they were packed.
template <class Tile, bool kAlongChannels>
__device__ void multiply_whole(const uint4* weight, const uint4* src,
                               float (&acc)[Tile::kSlow][Tile::kFast]) {
    using Element = typename Tile::Element;
    constexpr int kCount = Tile::kWarpPositions / 8;
    constexpr int kRowVector = Tile::kRowVector, kPositionVector = Tile::kPositionVector;
    uint32_t columns[2][kCount][2];
    read_columns<Tile, kAlongChannels>(src, [&](int s, int r, int j, uint32_t x) {
        columns[s][j][r] = x;
        if (sizeof(Element) == 4) columns[s][j][r] = ptx::round_number_to_tf32(__uint_as_float(x));
    });
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int block = 0; block < Tile::kWarpRows / (8 * kRowVector); ++block) {
            uint32_t halves[2][kRowVector];
            read_rows<Tile>(halves[0], weight, block, s, 0);
            read_rows<Tile>(halves[1], weight, block, s, 1);
#pragma unroll
            for (int i = 0; i < kRowVector; i += 2) {
                const uint32_t rows[4] = {halves[0][i], halves[0][i + 1], halves[1][i],
                                          halves[1][i + 1]};
                const int row = block * kRowVector + i;
#pragma unroll
                for (int j = 0; j < kCount; ++j) {
                    const int position = j / kPositionVector * 2 * kPositionVector + j % kPositionVector;
                    const int other = position + kPositionVector;
                    multiply_add<Element>(Tile::sum(acc, row, position), Tile::sum(acc, row, other),
                                          Tile::sum(acc, row + 1, position),
                                          Tile::sum(acc, row + 1, other), rows, columns[s][j]);
                }
            }
        }
    }
}

// acc += weight * src over one slab of f32: each operand is a sum of two TF32 values, of whose four
// products the smallest is below f32's precision. Tensor cores do not round their sums to the nearest,
// so these span one slab only and are then added as f32.
template <class Tile, bool kAlongChannels>
__device__ void multiply_in_parts(const uint4* weight, const uint4* src,
                                  float (&acc)[Tile::kSlow][Tile::kFast]) {
    constexpr int kCount = Tile::kWarpPositions / 8;
    uint32_t high[2][kCount][2], low[2][kCount][2];
    read_columns<Tile, kAlongChannels>(src, [&](int s, int r, int j, uint32_t x) {
        high[s][j][r] = ptx::round_tf32(__uint_as_float(x));
        low[s][j][r] = ptx::round_tf32(__uint_as_float(x) - __uint_as_float(high[s][j][r]));
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
                uint32_t halves[2][4];
                read_rows<Tile>(halves[0], weight, block, s, 0);
                read_rows<Tile>(halves[1], weight, block, s, 1);
                uint32_t row_high[4], row_low[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float row = __uint_as_float(halves[i / 2][2 * pair + i % 2]);
                    row_high[i] = ptx::round_tf32(row);
                    row_low[i] = ptx::round_tf32(row - __uint_as_float(row_high[i]));
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
            const float* weight =
                static_cast<const float*>(p.weight) + first * p.row_pitch + tile.row + channel;
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

template <class Tile, bool kAlongChannels>
__device__ void sum_slabs(const pw_fprop& p, const TileAt& tile, const Run& run,
                          MmaShared<Tile>& shared, float (&acc)[Tile::kSlow][Tile::kFast]) {
    SlabCopier<Tile, kAlongChannels> copier(p, tile, run, shared.at);
    // Not unrolled: the copies' code, a part for each way to read, is most of a kernel's.
#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
        copier.next(shared.weight[stage], shared.src[stage]);
    }
    int read = 0, write = Tile::kStages - 1;
#pragma unroll 1
    for (int done = 0; done < run.depth; done += Tile::kDepth) {
        // This slab is there for every thread, and every thread is done with the one before, whose
        // place the next copies take.
        ptx::wait<Tile::kStages - 2>();
        if (p.source_step_count > 0) {
            copier.transform(shared.src[read], run.input + done, run.depth - done);
        }
        __syncthreads();
        copier.next(shared.weight[write], shared.src[write]);
        if constexpr (Tile::kParts == 1) {
            multiply_whole<Tile, kAlongChannels>(shared.weight[read], shared.src[read], acc);
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
    if (reads_channels(*run.source)) {
        sum_slabs<Tile, true>(p, tile, run, shared, acc);
    } else {
        sum_slabs<Tile, false>(p, tile, run, shared, acc);
    }
}

// What is left to do once the whole depth is summed.
template <class Tile>
__device__ void finish_sums(const pw_fprop& p, const TileAt& tile, MmaShared<Tile>& shared,
                            float (&acc)[Tile::kSlow][Tile::kFast]) {
    if constexpr (Tile::kParts > 1) repair<Tile>(p, tile, shared.at, acc);
}
