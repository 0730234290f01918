// What happens to a tile of accumulators before its only store: bias, then elementwise steps.
#pragma once

#include "../steps.cuh"
#include "../tiles.cuh"

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

    // What the steps ask of four elements.
    struct Operands {
        const TileWriter& tile;
        const Four& here;
        __device__ void per_channel(float (&to)[4], const float* from) const {
            tile.per_channel(to, from, here);
        }
        __device__ void second(float (&to)[4]) const { tile.read_residual(to, here); }
    };

    // Along the channels in the outer loop: each channel's bias is read once.
    template <bool kResidual>
    __device__ void write_clipped(float (&acc)[Tile::kSlow][Tile::kFast]) const {
        constexpr int kOuter = Tile::kChannelsFast ? Tile::kFast / 4 : Tile::kSlow;
        constexpr int kInner = Tile::kChannelsFast ? Tile::kSlow : Tile::kFast / 4;
#pragma unroll
        for (int outer = 0; outer < kOuter; ++outer) {
            const int row = Tile::kChannelsFast ? fast + Tile::fast_offset(outer * 4)
                                                : slow + Tile::slow_offset(outer);
            if (row >= rows) continue;
            float bias[4];
            per_channel(bias, p.bias, Four{row, row, 4});
#pragma unroll
            for (int inner = 0; inner < kInner; ++inner) {
                const int s = Tile::kChannelsFast ? inner : outer;
                const int f = Tile::kChannelsFast ? outer * 4 : inner * 4;
                const Four here = four(s, f);
                if (here.count <= 0) continue;
                float v[4] = {acc[s][f], acc[s][f + 1], acc[s][f + 2], acc[s][f + 3]};
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] += bias[i];
                if (kResidual) {
                    float residual[4];
                    read_residual_vector(residual, here, nullptr);
#pragma unroll
                    for (int i = 0; i < 4; ++i) v[i] += residual[i];
                }
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
        run_steps(p.steps, p.more_steps, p.step_count, v, Operands{*this, here});
        if (p.flags & PW_FLAG_DST_VEC4) {
            store_vector(v, here, p.dst_map);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i < here.count) p.dst[offset(here, i, at.dst, p.dst_channel, p.dst_map)] = v[i];
            }
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

    // The residual is read once: nothing is gained by the read-only cache.
    __device__ void read_residual_vector(float (&to)[4], const Four& here,
                                         const uint32_t* map) const {
        const int64_t from = offset(here, 0, at.residual, p.residual_channel, map);
        const float4 r = *reinterpret_cast<const float4*>(p.residual + from);
        to[0] = r.x, to[1] = r.y, to[2] = r.z, to[3] = r.w;
    }
    __device__ void read_residual(float (&to)[4], const Four& here) const {
        if (p.flags & PW_FLAG_RESIDUAL_VEC4) {
            return read_residual_vector(to, here, p.residual_map);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            to[i] = i < here.count
                        ? p.residual[offset(here, i, at.residual, p.residual_channel,
                                            p.residual_map)]
                        : 0.f;
        }
    }

    __device__ void store_vector(const float (&v)[4], const Four& here, const uint32_t* map) const {
        float* to = p.dst + offset(here, 0, at.dst, p.dst_channel, map);
        *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    }
};
