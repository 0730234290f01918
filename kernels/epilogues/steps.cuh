// What happens to a tile of accumulators before its only store: bias, then elementwise steps.
#pragma once

#include "../params.h"
#include "../tiles.cuh"

// PyTorch's formulas, in forms that keep their relative accuracy in the tails. NaN passes through
// each: comparisons are written so that it falls to a branch that returns it (fminf and fmaxf would
// drop it).
namespace activation {

__device__ inline float clip(float x, float lo, float hi) { return x < lo ? lo : (x > hi ? hi : x); }

__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    const float r = 1.f / (1.f + e);
    return x >= 0.f ? r : e * r;
}

__device__ inline float gelu_tanh(float x) {
    // (1 + tanh(u)) / 2 is sigmoid(2u), without the cancellation.
    const float u = 0.79788456080286536f * fmaf(0.044715f * x * x, x, x);
    return x * sigmoid(2.f * u);
}

__device__ inline float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

__device__ inline float mish(float x) {
    // tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2).
    const float e = expf(x);
    const float n = e * (e + 2.f);
    return x > 20.f ? x : x * (n / (n + 2.f));
}

}  // namespace activation

// Finishes one thread's share of the tile, four neighbours along the fast axis at a time.
template <class Tile>
class TileWriter {
public:
    __device__ TileWriter(const pw_fprop& p, const TileAt& tile,
                          const PositionTable<Tile::kPositions>& at)
        : p(p), at(at), fast(Tile::fast_begin()), slow(Tile::slow_begin()) {
        const int64_t left = p.positions - tile.position;
        positions = left < Tile::kPositions ? int(left) : Tile::kPositions;
        rows = p.rows - tile.row < Tile::kRows ? int(p.rows - tile.row) : Tile::kRows;
        packed = int64_t(tile.group) * p.row_pitch + tile.row;
        first_channel = int64_t(tile.group) * p.rows + tile.row;
    }

    __device__ void write(float (&acc)[Tile::kSlow][Tile::kFast]) const {
        switch (p.epilogue) {
            case PW_EPILOGUE_CLIP: write_clipped<false>(acc); break;
            case PW_EPILOGUE_RESIDUAL_CLIP: write_clipped<true>(acc); break;
            default: write_steps(acc);
        }
    }

private:
    const pw_fprop& p;
    const PositionTable<Tile::kPositions>& at;
    int fast, slow;         // where this thread's elements begin in the tile
    int rows, positions;    // how much of the tile lies within the tensor
    int64_t packed;         // the tile's first channel in arrays that are packed like the weights
    int64_t first_channel;  // and among the channels of all groups

    // Four elements of the tile, and which of them exist.
    struct Four {
        int slow, fast;
        int count;
    };
    __device__ Four four(int s, int f) const {
        const int at_slow = slow + Tile::slow_offset(s), at_fast = fast + Tile::fast_offset(f);
        const bool in = at_slow < (Tile::kChannelsFast ? positions : rows);
        return {at_slow, at_fast, in ? (Tile::kChannelsFast ? rows : positions) - at_fast : 0};
    }

    template <bool kResidual>
    __device__ void write_clipped(float (&acc)[Tile::kSlow][Tile::kFast]) const {
#pragma unroll
        for (int s = 0; s < Tile::kSlow; ++s) {
#pragma unroll
            for (int f = 0; f < Tile::kFast; f += 4) {
                const Four here = four(s, f);
                if (here.count <= 0) continue;
                float v[4] = {acc[s][f], acc[s][f + 1], acc[s][f + 2], acc[s][f + 3]};
                add_bias(v, here);
                if (kResidual) add_residual_vector(v, here, nullptr);
                each(v, [this](float x) { return activation::clip(x, p.clip_lo, p.clip_hi); });
                store_vector(v, here, nullptr);
            }
        }
    }

    // The accumulators move up as they are finished, so that the code for every kind of step exists
    // four times instead of once per accumulator, and no register is addressed by a variable.
    __device__ void write_steps(float (&acc)[Tile::kSlow][Tile::kFast]) const {
#pragma unroll 1
        for (int s = 0; s < Tile::kSlow; ++s) {
#pragma unroll 1
            for (int f = 0; f < Tile::kFast; f += 4) {
                const Four here = four(s, f);
                float v[4] = {acc[0][0], acc[0][1], acc[0][2], acc[0][3]};
                if (here.count > 0) finish(v, here);
#pragma unroll
                for (int i = 4; i < Tile::kFast; ++i) acc[0][i - 4] = acc[0][i];
            }
#pragma unroll
            for (int next = 1; next < Tile::kSlow; ++next) {
#pragma unroll
                for (int f = 0; f < Tile::kFast; ++f) acc[next - 1][f] = acc[next][f];
            }
        }
    }

    __device__ void finish(float (&v)[4], const Four& here) const {
        add_bias(v, here);
#pragma unroll 1
        for (uint32_t i = 0; i < p.step_count; ++i) {
            pw_step step;
            if (i < PW_INLINE_STEPS) {
                step = p.steps[i];
            } else {
                step = p.more_steps[i - PW_INLINE_STEPS];
            }
            run(step, v, here);
        }
        if (p.flags & PW_FLAG_DST_VEC4) {
            store_vector(v, here, p.dst_map);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i < here.count) p.dst[offset(here, i, at.dst, p.dst_channel, p.dst_map)] = v[i];
            }
        }
    }

    template <class Function>
    static __device__ void each(float (&v)[4], Function function) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = function(v[i]);
    }

    __device__ void run(const pw_step& step, float (&v)[4], const Four& here) const {
        const float a = step.a, b = step.b;
        switch (step.op) {
            case PW_OP_AFFINE: {
                float scale[4], shift[4];
                per_channel(scale, step.first, here);
                per_channel(shift, step.second, here);
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] = fmaf(v[i], scale[i], shift[i]);
                break;
            }
            case PW_OP_PRELU: {
                float slope[4];
                per_channel(slope, step.first, here);
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] = v[i] >= 0.f ? v[i] : slope[i] * v[i];
                break;
            }
            case PW_OP_RESIDUAL: add_residual(v, here); break;
            case PW_OP_CLIP: each(v, [=](float x) { return activation::clip(x, a, b); }); break;
            case PW_OP_LEAKY_RELU: each(v, [=](float x) { return x >= 0.f ? x : a * x; }); break;
            case PW_OP_ELU: each(v, [=](float x) { return x > 0.f ? x : a * expm1f(x); }); break;
            case PW_OP_SIGMOID: each(v, [](float x) { return activation::sigmoid(x); }); break;
            case PW_OP_TANH: each(v, [](float x) { return tanhf(x); }); break;
            case PW_OP_SILU: each(v, [](float x) { return x * activation::sigmoid(x); }); break;
            case PW_OP_GELU: each(v, [](float x) { return x * normcdff(x); }); break;
            case PW_OP_GELU_TANH: each(v, [](float x) { return activation::gelu_tanh(x); }); break;
            case PW_OP_HARD_SIGMOID:
                each(v, [](float x) { return activation::clip(x + 3.f, 0.f, 6.f) / 6.f; });
                break;
            case PW_OP_HARD_SWISH:
                each(v, [](float x) { return x * (activation::clip(x + 3.f, 0.f, 6.f) / 6.f); });
                break;
            case PW_OP_SOFTPLUS: each(v, [](float x) { return activation::softplus(x); }); break;
            case PW_OP_MISH: each(v, [](float x) { return activation::mish(x); }); break;
        }
    }

    // The values of these elements' channels in an array packed like the rows of the weights.
    __device__ void per_channel(float (&to)[4], const float* from, const Four& here) const {
        if (Tile::kChannelsFast) {
            const float4 v = __ldg(reinterpret_cast<const float4*>(from + packed + here.fast));
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else {
            to[0] = to[1] = to[2] = to[3] = __ldg(from + packed + here.slow);
        }
    }

    __device__ void add_bias(float (&v)[4], const Four& here) const {
        float bias[4];
        per_channel(bias, p.bias, here);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] += bias[i];
    }

    // A tensor's channel of a row of this tile.
    __device__ int64_t channel(int row, const uint32_t* map) const {
        const int64_t own = first_channel + row;
        return map != nullptr ? int64_t(__ldg(map + own)) : own;
    }

    // Where element i of four lies in a tensor.
    __device__ int64_t offset(const Four& here, int i, const int64_t* position, int64_t stride,
                              const uint32_t* map) const {
        return Tile::kChannelsFast ? position[here.slow] + channel(here.fast + i, map) * stride
                                   : position[here.fast + i] + channel(here.slow, map) * stride;
    }

    // Reads of the residual do not pass through the read-only cache: it may be dst itself.
    __device__ void add_residual_vector(float (&v)[4], const Four& here,
                                        const uint32_t* map) const {
        const int64_t from = offset(here, 0, at.residual, p.residual_channel, map);
        const float4 r = *reinterpret_cast<const float4*>(p.residual + from);
        v[0] += r.x, v[1] += r.y, v[2] += r.z, v[3] += r.w;
    }
    __device__ void add_residual(float (&v)[4], const Four& here) const {
        if (p.flags & PW_FLAG_RESIDUAL_VEC4) return add_residual_vector(v, here, p.residual_map);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i >= here.count) break;
            v[i] += p.residual[offset(here, i, at.residual, p.residual_channel, p.residual_map)];
        }
    }

    __device__ void store_vector(const float (&v)[4], const Four& here, const uint32_t* map) const {
        float* to = p.dst + offset(here, 0, at.dst, p.dst_channel, map);
        *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    }
};
