// What happens to a tile of accumulators before its only store: bias, then elementwise steps.
#pragma once

#include "../elements.cuh"
#include "../steps.cuh"
#include "../tiles.cuh"

// Finishes one thread's share of the tile, kVector neighbours along the fast axis at a time.
template <class Tile>
class TileWriter {
    using Element = typename Tile::Element;
    static constexpr int kVector = Tile::kVector;
    // The affine stages behind a weight of 16 bits, which is not theirs to change.
    static constexpr bool kScaled = sizeof(Element) == 2;

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

    // kVector elements of the tile, and how many of them exist.
    struct Part {
        int slow, fast;
        int count;
    };
    __device__ Part part(int s, int f) const {
        const int at_slow = slow + Tile::slow_offset(s), at_fast = fast + Tile::fast_offset(f);
        const bool in = at_slow < (Tile::kChannelsFast ? positions : rows);
        return {at_slow, at_fast, in ? (Tile::kChannelsFast ? rows : positions) - at_fast : 0};
    }

    // What the steps ask of them.
    struct Operands {
        const TileWriter& tile;
        const Part& here;
        __device__ void per_channel(float (&to)[kVector], const float* from) const {
            tile.per_channel(to, from, here);
        }
        __device__ void second(float (&to)[kVector]) const { tile.read_residual(to, here); }
    };

    // Along the channels in the outer loop: each channel's bias is read once.
    template <bool kResidual>
    __device__ void write_clipped(float (&acc)[Tile::kSlow][Tile::kFast]) const {
        constexpr int kOuter = Tile::kChannelsFast ? Tile::kFast / kVector : Tile::kSlow;
        constexpr int kInner = Tile::kChannelsFast ? Tile::kSlow : Tile::kFast / kVector;
        float4 biases, scales;
#pragma unroll
        for (int outer = 0; outer < kOuter; ++outer) {
            const int row = Tile::kChannelsFast ? fast + Tile::fast_offset(outer * kVector)
                                                : slow + Tile::slow_offset(outer);
            if (row >= rows) continue;
            float scale[kVector], bias[kVector];
            if (Tile::kChannelsFast) {
                per_channel(bias, p.bias, Part{row, row, kVector});
                if (kScaled) per_channel(scale, p.scale, Part{row, row, kVector});
            } else {
                // Of four rows, which are neighbours, at once.
                if (outer % 4 == 0) {
                    biases = four_channels(p.bias, row);
                    if (kScaled) scales = four_channels(p.scale, row);
                }
                each(bias, [&](float) { return element(biases, outer % 4); });
                if (kScaled) each(scale, [&](float) { return element(scales, outer % 4); });
            }
#pragma unroll
            for (int inner = 0; inner < kInner; ++inner) {
                const int s = Tile::kChannelsFast ? inner : outer;
                const int f = Tile::kChannelsFast ? outer * kVector : inner * kVector;
                const Part here = part(s, f);
                if (here.count <= 0) continue;
                float v[kVector];
#pragma unroll
                for (int i = 0; i < kVector; ++i) {
                    v[i] = kScaled ? fmaf(acc[s][f + i], scale[i], bias[i]) : acc[s][f + i] + bias[i];
                }
                if (kResidual) {
                    float residual[kVector];
                    read_residual_vectors(residual, here, nullptr);
#pragma unroll
                    for (int i = 0; i < kVector; ++i) v[i] += residual[i];
                }
                each(v, [this](float x) { return activation::clip(x, p.clip_lo, p.clip_hi); });
                store_vectors(static_cast<Element*>(p.dst), v, here, nullptr);
            }
        }
    }

    // The accumulators move up as they are finished, so that the code for every kind of step exists
    // once per vector instead of once per accumulator, and no register is addressed by a variable.
    __device__ void write_steps(float (&acc)[Tile::kSlow][Tile::kFast]) const {
#pragma unroll 1
        for (int s = 0; s < Tile::kSlow; ++s) {
#pragma unroll 1
            for (int f = 0; f < Tile::kFast; f += kVector) {
                const Part here = part(s, f);
                float v[kVector];
#pragma unroll
                for (int i = 0; i < kVector; ++i) v[i] = acc[0][i];
                if (here.count > 0) finish(v, here);
#pragma unroll
                for (int i = kVector; i < Tile::kFast; ++i) acc[0][i - kVector] = acc[0][i];
            }
#pragma unroll
            for (int next = 1; next < Tile::kSlow; ++next) {
#pragma unroll
                for (int f = 0; f < Tile::kFast; ++f) acc[next - 1][f] = acc[next][f];
            }
        }
    }

    __device__ void finish(float (&v)[kVector], const Part& here) const {
        add_bias(v, here);
        run_steps(p.steps, p.more_steps, p.step_count, v, Operands{*this, here});
        if (kScaled && p.flags & PW_FLAG_DST_F32) {
            store(static_cast<float*>(p.dst), v, here);
        } else {
            store(static_cast<Element*>(p.dst), v, here);
        }
    }

    template <class T>
    __device__ void store(T* dst, const float (&v)[kVector], const Part& here) const {
        if (p.flags & PW_FLAG_DST_VEC4) return store_vectors(dst, v, here, p.dst_map);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (i < here.count) {
                dst[offset(here, i, at.dst, p.dst_channel, p.dst_map)] = narrow<T>(v[i]);
            }
        }
    }

    __device__ float4 four_channels(const float* from, int row) const {
        return __ldg(reinterpret_cast<const float4*>(from + packed + row));
    }
    static __device__ float element(const float4& v, int i) {
        return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
    }

    // The values of these elements' channels in an array packed like the rows of the weights.
    __device__ void per_channel(float (&to)[kVector], const float* from, const Part& here) const {
        if (Tile::kChannelsFast) {
#pragma unroll
            for (int i = 0; i < kVector; i += 4) {
                const float4 v = four_channels(from, here.fast + i);
                to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
            }
        } else {
            const float v = __ldg(from + packed + here.slow);
#pragma unroll
            for (int i = 0; i < kVector; ++i) to[i] = v;
        }
    }

    __device__ void add_bias(float (&v)[kVector], const Part& here) const {
        float scale[kVector], bias[kVector];
        per_channel(bias, p.bias, here);
        if (kScaled) per_channel(scale, p.scale, here);
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = kScaled ? fmaf(v[i], scale[i], bias[i]) : v[i] + bias[i];
    }

    // A tensor's channel of a row of this tile.
    __device__ int64_t channel(int row, const uint32_t* map) const {
        const int64_t own = first_channel + row;
        return map != nullptr ? int64_t(__ldg(map + own)) : own;
    }

    // Where element i of a part lies in a tensor.
    template <class Positions>
    __device__ int64_t offset(const Part& here, int i, const Positions& position, int64_t stride,
                              const uint32_t* map) const {
        return Tile::kChannelsFast ? position[here.slow] + channel(here.fast + i, map) * stride
                                   : position[here.fast + i] + channel(here.slow, map) * stride;
    }

    // The residual is read once: nothing is gained by the read-only cache.
    __device__ void read_residual_vectors(float (&to)[kVector], const Part& here,
                                          const uint32_t* map) const {
        const Element* const residual = static_cast<const Element*>(p.residual);
        const auto from = [&](int i) {
            return residual + offset(here, i, at.residual, p.residual_channel, map);
        };
        if (kVector == 4 || p.flags & PW_FLAG_RESIDUAL_VEC8) {
            return load_vector<false>(to, from(0));
        }
        if constexpr (kVector > 4) {
#pragma unroll
            for (int i = 0; i < kVector; i += 4) {
                float four[4] = {0.f, 0.f, 0.f, 0.f};
                if (i < here.count) load_vector<false>(four, from(i));
                to[i] = four[0], to[i + 1] = four[1], to[i + 2] = four[2], to[i + 3] = four[3];
            }
        }
    }
    __device__ void read_residual(float (&to)[kVector], const Part& here) const {
        if (p.flags & PW_FLAG_RESIDUAL_VEC4) {
            return read_residual_vectors(to, here, p.residual_map);
        }
        const Element* const residual = static_cast<const Element*>(p.residual);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            to[i] = i < here.count ? widen(residual[offset(here, i, at.residual, p.residual_channel,
                                                           p.residual_map)])
                                   : 0.f;
        }
    }

    template <class T>
    __device__ void store_vectors(T* dst, const float (&v)[kVector], const Part& here,
                                  const uint32_t* map) const {
        const auto to = [&](int i) { return dst + offset(here, i, at.dst, p.dst_channel, map); };
        if (kVector == 4 || p.flags & PW_FLAG_DST_VEC8) return store_vector(to(0), v);
        if constexpr (kVector > 4) {
#pragma unroll
            for (int i = 0; i < kVector; i += 4) {
                const float four[4] = {v[i], v[i + 1], v[i + 2], v[i + 3]};
                if (i < here.count) store_vector(to(i), four);
            }
        }
    }
};
