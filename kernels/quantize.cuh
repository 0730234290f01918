// Sources of f32 as bytes: how far values reach, the scales and zero points that follow, and the bytes
// that these make. The arithmetic is the CPU's (`src/cpu/int8/quantize.rs`), and so are the results.
//
// A source's positions are those of the launch; `rows` channels of it are read. The residual is the
// reach of what shares a quantisation, a pair of i32 for each; without it, each position's channels do.
// The gate is the quantisation of each position.
#pragma once

#include "elements.cuh"
#include "params.h"
#include "tiles.cuh"

constexpr int kQuantizePositions = 32;
constexpr int kQuantizeThreads = 256;

// How far values lie from zero: the bits of the greatest, and of the negated least, both as f32 and not
// below zero. Bits are in the order of the numbers, and those of NaN above all.
struct Reach {
    int32_t above, below;
};

struct QuantizeShared {
    PositionTable<kQuantizePositions> at;
    Reach reach[kQuantizePositions];
    pw_quantization by[kQuantizePositions];
};

__device__ inline pw_quantization quantization_of(const Reach& reach) {
    const float above = __int_as_float(reach.above), below = __int_as_float(reach.below);
    const float range = __fadd_rn(above, below), infinity = __int_as_float(0x7f800000);
    float scale = __fdiv_rn(range, 255.f);
    if (scale == infinity) scale = __fadd_rn(__fdiv_rn(above, 255.f), __fdiv_rn(below, 255.f));
    if (range == 0.f) {
        scale = 1.f;
    } else if (scale < infinity) {
        scale = scale < 1.17549435e-38f ? 1.17549435e-38f : scale;
    } else {
        // Of values that are not finite.
        scale = __int_as_float(0x7fc00000);
    }
    float zero_point = __fdiv_rn(below, scale);
    zero_point = zero_point < 255.f ? zero_point : 255.f;
    return {scale, int32_t(nearest_integer(zero_point) & 0xff)};
}

__device__ inline uint32_t byte_of(float x, const pw_quantization& by) {
    const float zero = float(by.zero_point);
    float steps = __fdiv_rn(x, by.scale);
    steps = steps > -zero ? steps : -zero;
    steps = steps < 255.f - zero ? steps : 255.f - zero;
    return (nearest_integer(steps) + uint32_t(by.zero_point)) & 0xff;
}

// A block's positions. Neighbouring threads follow the axis along which the source is contiguous.
class QuantizeBlock {
public:
    __device__ QuantizeBlock(const pw_fprop& p, QuantizeShared& shared, int64_t block)
        : p(p), source(p.sources[0]), shared(shared), first(block * kQuantizePositions) {
        fill_positions<true>(shared.at, p, source, first, kQuantizeThreads);
        if (threadIdx.x < kQuantizePositions) shared.reach[threadIdx.x] = {0, 0};
        __syncthreads();
    }

    // Widens the reach of what the positions belong to.
    __device__ void widen() const {
        find();
        const int t = threadIdx.x;
        if (t >= kQuantizePositions || first + t >= p.positions) return;
        int32_t* const to = static_cast<int32_t*>(const_cast<void*>(p.residual)) +
                            2 * shared.at.residual[t];
        atomicMax(to, shared.reach[t].above);
        atomicMax(to + 1, shared.reach[t].below);
    }

    __device__ void quantize() const {
        if (p.residual == nullptr) find();
        const int t = threadIdx.x;
        if (t < kQuantizePositions && first + t < p.positions) {
            Reach reach = shared.reach[t];
            if (p.residual != nullptr) {
                const int32_t* const from =
                    static_cast<const int32_t*>(p.residual) + 2 * shared.at.residual[t];
                reach = {from[0], from[1]};
            }
            shared.by[t] = quantization_of(reach);
            static_cast<pw_quantization*>(const_cast<void*>(p.gate))[shared.at.gate[t]] = shared.by[t];
        }
        __syncthreads();
        // Rows of bytes are padded to whole words.
        each((p.rows + 3) / 4, [&](int position, uint32_t word) {
            const float* const from = at(position);
            uint32_t bytes = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t channel = 4 * word + i;
                if (channel >= p.rows) continue;
                bytes |= byte_of(__ldg(from + channel * source.channel), shared.by[position]) << 8 * i;
            }
            uint8_t* const to = static_cast<uint8_t*>(p.dst) + shared.at.dst[position];
            reinterpret_cast<uint32_t*>(to)[word] = bytes;
        });
    }

private:
    const pw_fprop& p;
    const pw_source& source;
    QuantizeShared& shared;
    const int64_t first;

    __device__ const float* at(int position) const {
        return static_cast<const float*>(source.data) + shared.at.src[position];
    }

    // Calls f(position, i) for all of the block's positions and i < count, each once.
    template <class Function>
    __device__ void each(uint32_t count, Function f) const {
        const bool channels = reads_channels(source);
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        for (int position = channels ? warp : lane; position < kQuantizePositions;
             position += channels ? kQuantizeThreads / 32 : kQuantizePositions) {
            if (first + position >= p.positions) continue;
            const uint32_t step = channels ? 32 : kQuantizeThreads / 32;
#pragma unroll 4
            for (uint32_t i = channels ? lane : warp; i < count; i += step) f(position, i);
        }
    }

    // The reach of each position.
    __device__ void find() const {
        Reach mine = {0, 0};
        int last = -1;
        const auto leave = [&] {
            if (last < 0) return;
            atomicMax(&shared.reach[last].above, mine.above);
            atomicMax(&shared.reach[last].below, mine.below);
        };
        each(p.rows, [&](int position, uint32_t channel) {
            if (position != last) {
                leave();
                last = position, mine = {0, 0};
            }
            const float x = __ldg(at(position) + channel * source.channel);
            mine.above = max(mine.above, __float_as_int(x));
            mine.below = max(mine.below, __float_as_int(-x));
        });
        leave();
        __syncthreads();
    }
};
