// The gradient by the weight on tensor cores, of f16 or bf16, or of f32 rounded to TF32: as in wgrad.cuh,
// with sums in f32. Slabs of d and src, 16 words of positions deep, arrive by asynchronous copies, several
// ahead of those that are multiplied.
#pragma once

#include "../mainloops/mma.cuh"
#include "wgrad.cuh"

// A tile of kRows x kColumns of the weight; a warp has kWarpRows x kWarpColumns of them.
//
// Positions are the instructions' depth. A word is one of them, or two neighbours of 16 bits, and word
// 8s + 4r + t of the 16 of a slab is word 4t + 2s + r, as in MmaTile: of a slab that lies along positions,
// [channel][position], a lane reads four words at once. Of one along channels, [position][channel], it
// reads vectors of V channels, of 16 bits at two neighbouring positions, which it puts together. So element
// g of group j of eight is channel 8j + g along positions, and V (8 (j / V) + g) + j % V along channels.
template <class Element_, int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_>
struct WgradTile {
    using Element = Element_;
    static constexpr int kRows = kRows_;
    static constexpr int kColumns = kColumns_;
    static constexpr int kWarpRows = kWarpRows_;
    static constexpr int kWarpColumns = kWarpColumns_;
    static constexpr int kStages = kStages_;
    static constexpr int kPerWord = 4 / sizeof(Element);
    static constexpr int kPer16Bytes = 16 / sizeof(Element);
    static constexpr int kSlab = 16 * kPerWord;  // two instructions deep
    static constexpr int kRowWarps = kRows / kWarpRows;
    static constexpr int kThreads = 32 * kRowWarps * (kColumns / kWarpColumns);
    // Groups of eight of a warp.
    static constexpr int kRowGroups = kWarpRows / 8;
    static constexpr int kColumnGroups = kWarpColumns / 8;

    static_assert(kRows % 64 == 0 && kColumns % 64 == 0, "a row of a slab along channels fills all banks");
    static_assert(kWarpRows % 32 == 0 && kWarpColumns % 32 == 0, "vectors of four at least");
    static_assert(kThreads >= 2 * kSlab, "a thread has one entry of the tables");

    static __device__ int warp_row() { return int(threadIdx.x) / 32 % kRowWarps * kWarpRows; }
    static __device__ int warp_column() { return int(threadIdx.x) / 32 / kRowWarps * kWarpColumns; }
};

// Where the positions of a slab lie in a tensor. Every fourth or eighth of them is read at once.
template <int kSlab>
class WgradTable {
public:
    __device__ int64_t operator[](int q) const { return offsets[slot(q)]; }
    __device__ int64_t& operator[](int q) { return offsets[slot(q)]; }

private:
    static __device__ int slot(int q) { return q ^ (q >> 4 & 1); }
    int64_t offsets[kSlab];
};

template <class Tile>
struct WgradMmaShared {
    uint4 d[Tile::kStages][Tile::kRows * Tile::kSlab / Tile::kPer16Bytes];
    uint4 src[Tile::kStages][Tile::kColumns * Tile::kSlab / Tile::kPer16Bytes];
    WgradTable<Tile::kSlab> d_at[Tile::kStages];
    WgradTable<Tile::kSlab> src_at[Tile::kStages];
};

// The slabs of one operand, of kChannels channels. Along channels they lie at `channel ^ swizzle(q)`.
template <class Tile, int kChannels, bool kAlongChannels>
class WgradOperand {
    using Element = typename Tile::Element;
    static constexpr int kSlab = Tile::kSlab, kThreads = Tile::kThreads;
    static constexpr int kPer16Bytes = Tile::kPer16Bytes;

public:
    __device__ WgradOperand(const pw_part& part, pw_read read, int64_t first, int count)
        : data(static_cast<const Element*>(part.data) + first * part.channel), stride(part.channel),
          read(read), count(count) {}

    // Starts the copies of a slab of which so many positions exist; what does not exist arrives as zero.
    __device__ void copy(uint4* slab, const WgradTable<kSlab>& at, int positions) const {
        Element* const to = reinterpret_cast<Element*>(slab);
        switch (read) {
            case PW_READ_POSITIONS:
            case PW_READ_CHANNELS: copy_vectors<1>(to, at, positions); break;
            case PW_READ_POSITIONS_VEC4:
            case PW_READ_CHANNELS_VEC4: copy_vectors<4>(to, at, positions); break;
            // f32 has no such reads.
            default: copy_vectors<kPer16Bytes>(to, at, positions);
        }
    }

    // This lane's words [s][r] of each group of eight channels from `first` on.
    template <int kGroups>
    static __device__ void words(uint32_t (&to)[2][2][kGroups], const uint4* slab, int first) {
        const int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
        if constexpr (kAlongChannels) {
            constexpr int kVector = vector<kGroups>();
            const auto* const from = reinterpret_cast<const Element*>(slab);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < kGroups; j += kVector) {
                    uint32_t some[kVector];
                    const int k = kPer16Bytes * t;
                    const int column = (first + kVector * g) ^ swizzle(k);
                    read_words<kChannels>(some, from, k + Tile::kPerWord * i, column + 8 * j);
#pragma unroll
                    for (int n = 0; n < kVector; ++n) to[i / 2][i % 2][j + n] = some[n];
                }
            }
        } else {
#pragma unroll
            for (int j = 0; j < kGroups; ++j) {
                const uint4 v = slab[(first + 8 * j + g) * 4 + t];
                to[0][0][j] = v.x, to[0][1][j] = v.y, to[1][0][j] = v.z, to[1][1][j] = v.w;
            }
        }
        if constexpr (sizeof(Element) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < kGroups; ++j) {
                    uint32_t& word = to[i / 2][i % 2][j];
                    word = ptx::round_number_to_tf32(__uint_as_float(word));
                }
            }
        }
    }

    // Which channel element g of group j is.
    template <int kGroups>
    static __device__ int channel(int j, int g) {
        constexpr int kVector = vector<kGroups>();
        return kAlongChannels ? kVector * (j / kVector * 8 + g) + j % kVector : 8 * j + g;
    }

private:
    const Element* data;
    int64_t stride;
    pw_read read;
    int count;

    template <int kGroups>
    static __device__ constexpr int vector() { return kGroups < 8 ? 4 : kPer16Bytes; }
    static __device__ int swizzle(int q) { return (q / kPer16Bytes & 3) * 2 * kPer16Bytes; }

    template <int kWidth>
    __device__ void copy_vectors(Element* slab, const WgradTable<kSlab>& at, int positions) const {
        // Neighbouring threads take neighbours along the axis of the slab's rows.
        constexpr int kVectors = (kAlongChannels ? kChannels : kSlab) / kWidth;
        constexpr int kStep = kThreads / kVectors;
        constexpr int kTurns = (kAlongChannels ? kSlab : kChannels) / kStep;
        static_assert(kThreads % kVectors == 0 && kTurns >= 1, "a thread keeps its column");
        // Addresses would not fit the registers of the loop over slabs.
        const int thread = ptx::opaque(threadIdx.x);
        const int fast = thread % kVectors * kWidth, slow = thread / kVectors;
        // Single elements of 16 bits pass through registers, of which there are not enough for all.
        constexpr bool kAsynchronous = kWidth * sizeof(Element) >= 4;
        constexpr int kAtOnce = kAsynchronous ? kTurns : 4;
#pragma unroll kAtOnce
        for (int i = 0; i < kTurns; ++i) {
            const int other = slow + i * kStep;
            const int c = kAlongChannels ? fast : other, q = kAlongChannels ? other : fast;
            Element* const to = slab + (kAlongChannels ? q * kChannels + (c ^ swizzle(q)) : c * kSlab + q);
            const bool in = c < count && q < positions;
            // The last position, which stands in for those past the end, may not be aligned.
            const Element* const from = in ? data + c * stride + at[q] : data;
            if constexpr (kAsynchronous) {
                ptx::copy_async<kWidth * int(sizeof(Element))>(to, from, in);
            } else {
                *to = in ? load_one(from) : Element{0};
            }
        }
    }
};

template <class Tile, bool kChannelsOfD, bool kChannelsOfSrc>
__device__ void wgrad_mma_in(const pw_wgrad& p, const WgradAt<Tile::kRows, Tile::kColumns>& at,
                             WgradMmaShared<Tile>& shared) {
    using D = WgradOperand<Tile, Tile::kRows, kChannelsOfD>;
    using Src = WgradOperand<Tile, Tile::kColumns, kChannelsOfSrc>;
    constexpr int kRowGroups = Tile::kRowGroups, kColumnGroups = Tile::kColumnGroups;
    constexpr int kStages = Tile::kStages, kSlab = Tile::kSlab;
    const D d(p.d, p.d_read, int64_t(at.group) * p.rows + at.row, p.rows - at.row);
    const Src src(p.src, p.src_read, int64_t(at.group) * p.depth + at.column, p.depth - at.column);

    // Of the slab that begins with a position, into stage `to` of the tables.
    const auto fill = [&](int to, uint32_t first) {
        const int t = threadIdx.x;
        if (t >= 2 * kSlab) return;
        const uint32_t position = min(first + t % kSlab, p.positions - 1);
        const pw_part& part = t < kSlab ? p.d : p.src;
        const int64_t offset = offset_of(position, p.extents, p.axis_count, part.axes);
        (t < kSlab ? shared.d_at : shared.src_at)[to][t % kSlab] = offset;
    };
    const auto copy = [&](int stage, uint32_t first) {
        if (first < at.end) {
            const int positions = int(min(at.end - first, uint32_t(kSlab)));
            d.copy(shared.d[stage], shared.d_at[stage], positions);
            src.copy(shared.src[stage], shared.src_at[stage], positions);
        }
        ptx::commit();
    };

#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) fill(stage, at.begin + stage * kSlab);
    __syncthreads();
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) copy(stage, at.begin + stage * kSlab);

    float acc[kRowGroups][kColumnGroups][2] = {};
    int read = 0, write = kStages - 1;
#pragma unroll 1
    for (uint32_t first = at.begin; first < at.end; first += kSlab) {
        // This slab is there for every thread, and every thread is done with the one before, whose
        // place the next copies take.
        ptx::wait<kStages - 2>();
        __syncthreads();
        copy(write, first + (kStages - 1) * kSlab);
        // Nobody reads this stage's table any more: its slab has arrived.
        fill(read, first + kStages * kSlab);
        uint32_t rows[2][2][kRowGroups], columns[2][2][kColumnGroups];
        D::words(rows, shared.d[read], Tile::warp_row());
        Src::words(columns, shared.src[read], Tile::warp_column());
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int i = 0; i < kRowGroups; i += 2) {
                const uint32_t a[4] = {rows[s][0][i], rows[s][0][i + 1], rows[s][1][i], rows[s][1][i + 1]};
#pragma unroll
                for (int j = 0; j < kColumnGroups; ++j) {
                    const uint32_t b[2] = {columns[s][0][j], columns[s][1][j]};
                    multiply_add<typename Tile::Element>(acc[i][j][0], acc[i][j][1], acc[i + 1][j][0],
                                                         acc[i + 1][j][1], a, b);
                }
            }
        }
        write = read;
        read = read + 1 < kStages ? read + 1 : 0;
    }

    const int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < kRowGroups; ++i) {
        const uint32_t row = at.row + Tile::warp_row() + D::template channel<kRowGroups>(i, g);
        float* const to = at.to(p, row);
#pragma unroll
        for (int j = 0; j < kColumnGroups; ++j) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const uint32_t column = at.column + Tile::warp_column() +
                                        Src::template channel<kColumnGroups>(j, 2 * t + n);
                if (row < p.rows && column < p.depth) to[column] = acc[i][j][n];
            }
        }
    }
}

template <class Tile>
__device__ void wgrad_mma(const pw_wgrad& p, WgradMmaShared<Tile>& shared, int64_t block) {
    const auto at = WgradAt<Tile::kRows, Tile::kColumns>::of(p, block);
    if (!at.exists) return;
    if (along_channels(p.d_read)) {
        if (along_channels(p.src_read)) {
            wgrad_mma_in<Tile, true, true>(p, at, shared);
        } else {
            wgrad_mma_in<Tile, true, false>(p, at, shared);
        }
    } else if (along_channels(p.src_read)) {
        wgrad_mma_in<Tile, false, true>(p, at, shared);
    } else {
        wgrad_mma_in<Tile, false, false>(p, at, shared);
    }
}
