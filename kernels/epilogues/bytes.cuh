// From sums to dst: scaled, added to the residual, clipped, rounded and stored, in the order and with the
// roundings of the CPU, so that results are the same bits where sums are. Sums pass through shared memory,
// from which threads take neighbours along the axis along which dst is contiguous, whichever it is.
#pragma once

#include "../elements.cuh"
#include "../mainloops/bytes.cuh"
#include "../params.h"
#include "../splits.cuh"
#include "../tiles.cuh"

// Bounds keep NaN.
__device__ inline float clip_between(float x, float lo, float hi) {
    x = lo > x ? lo : x;
    return hi < x ? hi : x;
}

template <class Tile>
class ByteWriter {
    using Sum = typename Tile::Sum;

public:
    __device__ ByteWriter(const pw_bytes& p, ByteShared<Tile>& shared)
        : p(p), f(p.fprop), shared(shared), channels_fast(p.fprop.flags & PW_FLAG_CHANNELS_FAST) {
        const TileAt& tile = shared.tile;
        rows = min(int(f.rows - tile.row), Tile::kRows);
        positions = int(min(f.positions - tile.position, int64_t(Tile::kPositions)));
        first_channel = int64_t(tile.group) * f.rows + tile.row;
    }

    // One row of warps after another: their sums take the place of slabs.
    __device__ void write(const Sum (&acc)[Tile::kRowBlocks][Tile::kPositionBlocks][4]) const {
        const uint32_t vectors =
            f.residual != nullptr ? PW_FLAG_DST_VEC4 | PW_FLAG_RESIDUAL_VEC4 : PW_FLAG_DST_VEC4;
#pragma unroll 1
        for (int row = 0; row < rows; row += Tile::kWarpRows) {
            if (row > 0) __syncthreads();
            if (Tile::warp_row() == row) put(acc);
            __syncthreads();
            if ((f.flags & vectors) == vectors) {
                finish<4>(row);
            } else {
                finish<1>(row);
            }
        }
    }

private:
    const pw_bytes& p;
    const pw_fprop& f;
    ByteShared<Tile>& shared;
    const bool channels_fast;
    int rows, positions;    // how much of the tile lies within the tensor
    int64_t first_channel;  // the tile's among those of all groups

    struct alignas(8) Two {
        Sum first, second;
    };

    __device__ void put(const Sum (&acc)[Tile::kRowBlocks][Tile::kPositionBlocks][4]) const {
        const int g = Tile::lane_group(), t = Tile::lane_thread();
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
            for (int j = 0; j < Tile::kPositionBlocks; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = 16 * i + 8 * half + g;
                    const int position = Tile::warp_position() + 8 * j + 2 * t;
                    const Sum first = acc[i][j][2 * half], second = acc[i][j][2 * half + 1];
                    if (channels_fast) {
                        shared.sums.by_position[position][row] = first;
                        shared.sums.by_position[position + 1][row] = second;
                    } else {
                        *reinterpret_cast<Two*>(&shared.sums.by_row[row][position]) = {first, second};
                    }
                }
            }
        }
    }

    // The sums of a row of warps, kWidth neighbours at a time.
    template <int kWidth>
    __device__ void finish(int first_row) const {
        // Both are powers of two.
        const int vectors = (channels_fast ? Tile::kWarpRows : Tile::kPositions) / kWidth;
        const int shift = 31 - __clz(vectors);
#pragma unroll 1
        for (int i = threadIdx.x; i < Tile::kWarpRows * Tile::kPositions / kWidth; i += Tile::kThreads) {
            const int fast = (i & (vectors - 1)) * kWidth, slow = i >> shift;
            const int row = first_row + (channels_fast ? fast : slow);
            const int position = channels_fast ? slow : fast;
            // Vectors are whole, or of one.
            if (row >= rows || position >= positions) continue;
            const Sum* const from = channels_fast ? &shared.sums.by_position[slow][fast]
                                                      : &shared.sums.by_row[slow][fast];
            float v[kWidth];
            scaled(v, from, row, position);
            if (f.residual != nullptr) {
                float residual[kWidth];
                read_residual(residual, row, position);
#pragma unroll
                for (int n = 0; n < kWidth; ++n) {
                    v[n] = __fadd_rn(clip_between(v[n], p.before_lo, p.before_hi), residual[n]);
                }
            }
#pragma unroll
            for (int n = 0; n < kWidth; ++n) v[n] = clip_between(v[n], p.lo, p.hi);
            store(v, row, position);
        }
    }

    template <int kWidth>
    __device__ void scaled(float (&v)[kWidth], const Sum* sums, int row, int position) const {
        const int64_t channel = first_channel + row;
        Sum sum[kWidth];
        neighbours(sum, sums);
        float scale[kWidth], shift[kWidth];
        per_channel(scale, p.scale + channel);
        if constexpr (Tile::kFloats) {
            per_channel(shift, p.shift + channel);
#pragma unroll
            for (int n = 0; n < kWidth; ++n) v[n] = __fadd_rn(__fmul_rn(sum[n], scale[n]), shift[n]);
        } else {
            const bool quantized = f.gate != nullptr;
            int32_t offset[kWidth];
            per_channel(offset, p.offset + channel);
            if (quantized) per_channel(shift, p.shift + channel);
#pragma unroll
            for (int n = 0; n < kWidth; ++n) {
                if (!quantized) {
                    v[n] = __fmul_rn(__int2float_rn(int32_t(uint32_t(sum[n]) + uint32_t(offset[n]))), scale[n]);
                } else {
                    const pw_quantization* const q = static_cast<const pw_quantization*>(f.gate) +
                                                     shared.at.gate[channels_fast ? position : position + n];
                    const uint32_t beyond = uint32_t(__ldg(&q->zero_point)) * uint32_t(offset[n]);
                    const float x = __int2float_rn(int32_t(uint32_t(sum[n]) - beyond));
                    v[n] = __fadd_rn(__fmul_rn(x, __fmul_rn(__ldg(&q->scale), scale[n])), shift[n]);
                }
            }
        }
    }

    static __device__ void neighbours(Sum (&to)[1], const Sum* from) { to[0] = *from; }
    static __device__ void neighbours(Sum (&to)[4], const Sum* from) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        memcpy(to, &v, sizeof(v));
    }

    // Of the channels of a vector, whose first is at `from`.
    template <class T>
    __device__ void per_channel(T (&to)[1], const T* from) const {
        to[0] = __ldg(from);
    }
    template <class T>
    __device__ void per_channel(T (&to)[4], const T* from) const {
        if (channels_fast) {
            const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
            memcpy(to, &v, sizeof(v));
        } else {
            to[0] = to[1] = to[2] = to[3] = __ldg(from);
        }
    }

    template <class Positions>
    __device__ int64_t offset(const Positions& at, int64_t stride, int row, int position) const {
        return at[position] + (first_channel + row) * stride;
    }

    template <int kWidth>
    __device__ void read_residual(float (&to)[kWidth], int row, int position) const {
        const int64_t at = offset(shared.at.residual, f.residual_channel, row, position);
        switch (p.residual_type) {
            case PW_BYTES:
            case PW_E4M3:
            case PW_E5M2: {
                uint32_t bytes;
                const uint8_t* const from = static_cast<const uint8_t*>(f.residual) + at;
                if constexpr (kWidth == 4) {
                    bytes = *reinterpret_cast<const uint32_t*>(from);
                } else {
                    bytes = *from;
                }
#pragma unroll
                for (int n = 0; n < kWidth; ++n) to[n] = __fmul_rn(number(bytes, n), p.residual_scale);
                break;
            }
            case PW_F32: read_real(to, static_cast<const float*>(f.residual) + at); break;
            case PW_F16: read_real(to, static_cast<const f16*>(f.residual) + at); break;
            default: read_real(to, static_cast<const bf16*>(f.residual) + at);
        }
    }
    // What a byte of the residual stands for, in steps of its scale.
    __device__ float number(uint32_t bytes, int n) const {
        if constexpr (Tile::kFloats) {
            const uint16_t pair = uint16_t(bytes >> 16 * (n / 2));
            const uint32_t halves =
                p.residual_type == PW_E4M3 ? ptx::widen_e4m3x2(pair) : ptx::widen_e5m2x2(pair);
            return widen(half_of<f16>(halves, n % 2));
        } else {
            const int byte = int((bytes >> 8 * n & 0xff) ^ p.residual_flip);
            return __int2float_rn(byte - p.residual_zero_point);
        }
    }
    template <class T>
    static __device__ void read_real(float (&to)[1], const T* from) { to[0] = widen(*from); }
    template <class T>
    static __device__ void read_real(float (&to)[4], const T* from) { load_vector<false>(to, from); }

    template <int kWidth>
    __device__ void store(const float (&v)[kWidth], int row, int position) const {
        const int64_t at = offset(shared.at.dst, f.dst_channel, row, position);
        switch (p.dst_type) {
            case PW_BYTES:
            case PW_E4M3:
            case PW_E5M2: {
                uint8_t* const to = static_cast<uint8_t*>(f.dst) + at;
                if constexpr (kWidth == 4) {
                    *reinterpret_cast<uint32_t*>(to) =
                        ptx::lower_halves(pair(v[0], v[1]), pair(v[2], v[3]));
                } else {
                    *to = uint8_t(pair(v[0], v[0]));
                }
                break;
            }
            case PW_F32: store_real(static_cast<float*>(f.dst) + at, v); break;
            case PW_F16: store_real(static_cast<f16*>(f.dst) + at, v); break;
            default: store_real(static_cast<bf16*>(f.dst) + at, v);
        }
    }
    // Two bytes of dst in the lower half of a word.
    __device__ uint32_t pair(float first, float second) const {
        if constexpr (Tile::kFloats) {
            return p.dst_type == PW_E4M3 ? ptx::narrow_e4m3x2(first, second)
                                         : ptx::narrow_e5m2x2(first, second);
        } else {
            const uint32_t zero_point = uint32_t(p.zero_point);
            return __byte_perm(nearest_integer(first) + zero_point, nearest_integer(second) + zero_point,
                               0x0040);
        }
    }
    template <class T>
    static __device__ void store_real(T* to, const float (&v)[1]) { *to = narrow<T>(v[0]); }
    template <class T>
    static __device__ void store_real(T* to, const float (&v)[4]) { store_vector(to, v); }
};

// A tile from its first byte to its last.
template <class Tile>
__device__ void fprop_bytes(const pw_bytes& p, ByteShared<Tile>& shared) {
    const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
    const TileAt tile = TileAt::of(p.fprop, block, Tile());
    if (!tile.exists(p.fprop)) return;
    if (threadIdx.x == 0) shared.tile = tile;
    fill_positions<true>(shared.at, p.fprop, p.fprop.sources[0], tile.position, Tile::kThreads);
    __syncthreads();
    typename Tile::Sum acc[Tile::kRowBlocks][Tile::kPositionBlocks][4] = {};
    sum_bytes<Tile>(p, shared.tile, shared, acc);
    if (p.fprop.splits > 1) {
        using Rows = typename Tile::Sum[Tile::kRowBlocks][Tile::kPositionBlocks * 4];
        if (!add_up<Tile>(p.fprop, shared.tile, reinterpret_cast<Rows&>(acc))) return;
    }
    ByteWriter<Tile>(p, shared).write(acc);
}

#define PW_BYTE_KERNEL(name, floats, rows, positions, depth, warp_rows, warp_positions, stages, blocks, bytes) \
    extern "C" __global__ void __launch_bounds__(                                                \
        32 * (rows) / (warp_rows) * (positions) / (warp_positions), blocks)                      \
        fprop_##name##_##rows##x##positions##x##depth(const __grid_constant__ pw_bytes p) {      \
        using Tile =                                                                             \
            ByteTile<floats, rows, positions, depth, warp_rows, warp_positions, stages>;         \
        static_assert(sizeof(ByteShared<Tile>) == (bytes), "kernels.def says how much a launch brings"); \
        extern __shared__ float4 brought[];                                                      \
        fprop_bytes<Tile>(p, *reinterpret_cast<ByteShared<Tile>*>(brought));                     \
    }
