// Layer norm, on what the convolution has left in f32, in dst or beside it: the moments of each position's channels, and
// from these, or from the moments of the whole sample, the normalised values; then the steps that
// follow.
//
// Sums have an order that depends on nothing but the number of channels, whatever the layout and
// wherever a position lies: eight lanes take four channels each in turn, and their sums are added in
// a tree. Sums of squares are those of deviations from the mean, as a second pass knows it.
//
// Moments and values take three passes. Where there is room each thread keeps what it has read of its
// position in shared memory, all of which is asked for at once; nobody else reads it.
#pragma once

#include "../elements.cuh"
#include "../params.h"
#include "../ptx.cuh"
#include "../steps.cuh"
#include "../tiles.cuh"

constexpr int kNormPositions = 32;
constexpr int kNormLanes = 8;
constexpr int kNormThreads = kNormPositions * kNormLanes;
static_assert(4 * kNormLanes == PW_NORM_TURN && 16 * kNormThreads == PW_NORM_TURN_BYTES, "a thread takes four");

struct NormShared {
    // Rows four banks apart, so that lanes side by side meet all of them.
    float sums[kNormLanes][kNormPositions + 4];
    int64_t src[kNormPositions];
    int64_t dst[kNormPositions];
    int64_t residual[kNormPositions];
    int64_t moments[kNormPositions];
};
static_assert(sizeof(NormShared) == PW_NORM_SHARED_BYTES, "params.h says what a block has");

// A mean as the sum of two floats (one would shift every value where the mean is large), and
// 1 / sqrt(variance + eps).
struct Scaling {
    float mean, rest;
    float scale;
};

// T is what dst and residual hold.
template <class T>
class NormPosition {
public:
    __device__ NormPosition(const pw_fprop& p, NormShared& shared, float* room, int64_t first)
        : p(p), shared(shared), room(room) {
        const int t = threadIdx.x;
        if (t < kNormPositions) {
            int64_t src = 0, dst = 0, residual = 0, moments = 0;
            locate(p, min(first + t, p.positions - 1), [&](uint32_t axis, int64_t at) {
                src += at * p.sources[0].axes[axis];
                dst += at * p.axes[axis].dst;
                residual += at * p.axes[axis].residual;
                moments += at * p.axes[axis].moments;
            });
            shared.src[t] = src, shared.dst[t] = dst;
            shared.residual[t] = residual, shared.moments[t] = moments;
        }
        __syncthreads();
        // Neighbouring threads follow the axis along which dst is contiguous.
        const bool channels_fast = p.flags & PW_FLAG_CHANNELS_FAST;
        column = channels_fast ? t / kNormLanes : t % kNormPositions;
        lane = channels_fast ? t % kNormLanes : t / kNormPositions;
        exists = first + column < p.positions;
        if (p.norm.held && exists) hold();
    }

    // Every thread of the block calls it, and gets its position's moments.
    __device__ Scaling of_channels(double& mean, float& deviations) const {
        const float shift = exists ? from(0)[0] : 0.f;
        const float count = float(p.rows);
        const float moved = sum([=](float x) { return x - shift; }) / count;
        deviations = sum([=](float x) { return (x - shift - moved) * (x - shift - moved); });
        mean = double(shift) + double(moved);
        return {shift, moved, 1.f / sqrtf(deviations / count + p.norm.eps)};
    }

    __device__ void write_moments() const {
        double mean;
        float deviations;
        of_channels(mean, deviations);
        if (!exists || lane != 0) return;
        double* const to = p.norm.moments + 2 * shared.moments[column];
        to[0] = mean, to[1] = double(deviations);
    }

    __device__ Scaling of_sample() const {
        const double* const from = p.norm.moments + 2 * shared.moments[column];
        const double mean = from[0];
        const float high = float(mean);
        const float variance = float(from[1] / p.norm.values);
        return {high, float(mean - double(high)), 1.f / sqrtf(variance + p.norm.eps)};
    }

    __device__ void finish(const Scaling& by) const {
        if (!exists) return;
#pragma unroll 1
        for (uint32_t row = lane * 4; row < p.rows; row += 4 * kNormLanes) {
            float v[4], gamma[4], beta[4];
            const Operands at{*this, row};
            read(v, row);
            at.per_channel(gamma, p.norm.gamma);
            at.per_channel(beta, p.norm.beta);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v[i] = fmaf((v[i] - by.mean - by.rest) * by.scale, gamma[i], beta[i]);
            }
            run_steps(p.steps, p.more_steps, p.step_count, v, at);
            write(v, row);
        }
    }

private:
    const pw_fprop& p;
    NormShared& shared;
    float* room;
    int column, lane;
    bool exists;

    // What the steps ask of four neighbouring channels.
    struct Operands {
        const NormPosition& position;
        uint32_t row;
        // Arrays are padded to whole vectors.
        __device__ void per_channel(float (&to)[4], const float* from) const {
            const float4 v = __ldg(reinterpret_cast<const float4*>(from + row));
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
        __device__ void second(float (&to)[4]) const { position.read_residual(to, row); }
    };

    __device__ static int64_t channel(uint32_t row, const uint32_t* map) {
        return map != nullptr ? int64_t(__ldg(map + row)) : int64_t(row);
    }
    // The convolution has written to the channels of dst.
    __device__ const float* from(uint32_t row) const {
        const pw_source& source = p.sources[0];
        return static_cast<const float*>(source.data) + shared.src[column] +
               channel(row, p.dst_map) * source.channel;
    }
    __device__ T* to(uint32_t row) const {
        return static_cast<T*>(p.dst) + shared.dst[column] +
               channel(row, p.dst_map) * p.dst_channel;
    }

    __device__ bool reads_vectors() const { return p.sources[0].read == PW_READ_CHANNELS_VEC4; }

    // Where this thread keeps the values from a row on: neighbouring threads side by side, vectors or
    // single values as they are read.
    __device__ float* kept(uint32_t row) const { return room + row / PW_NORM_TURN * (4 * kNormThreads); }
    __device__ float* kept_vector(uint32_t row) const { return kept(row) + 4 * threadIdx.x; }
    __device__ float* kept_value(uint32_t row, int i) const {
        return kept(row) + i * kNormThreads + threadIdx.x;
    }

    __device__ void hold() const {
#if __CUDA_ARCH__ >= 800
#pragma unroll 1
        for (uint32_t row = lane * 4; row < p.rows; row += PW_NORM_TURN) {
            if (reads_vectors()) {
                ptx::copy_async<16>(kept_vector(row), from(row), true);
                continue;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool in = row + i < p.rows;
                ptx::copy_async<4>(kept_value(row, i), from(in ? row + i : row), in);
            }
        }
        ptx::commit();
        ptx::wait<0>();
#else
#pragma unroll 4
        for (uint32_t row = lane * 4; row < p.rows; row += PW_NORM_TURN) {
            float v[4];
            load(v, row);
            if (reads_vectors()) {
                store_vector(kept_vector(row), v);
                continue;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) *kept_value(row, i) = v[i];
        }
#endif
    }

    __device__ void load(float (&to)[4], uint32_t row) const {
        if (reads_vectors()) return load_vector<false>(to, from(row));
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = row + i < p.rows ? *from(row + i) : 0.f;
    }

    __device__ void read(float (&to)[4], uint32_t row) const {
        if (!p.norm.held) return load(to, row);
        if (reads_vectors()) return load_vector<false>(to, kept_vector(row));
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = *kept_value(row, i);
    }

    __device__ void write(const float (&v)[4], uint32_t row) const {
        if (p.flags & PW_FLAG_DST_VEC4) return store_vector(to(row), v);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (row + i < p.rows) *to(row + i) = narrow<T>(v[i]);
        }
    }

    __device__ void read_residual(float (&to)[4], uint32_t row) const {
        const T* const from = static_cast<const T*>(p.residual) + shared.residual[column];
        if (p.flags & PW_FLAG_RESIDUAL_VEC4) {
            return load_vector<false>(
                to, from + channel(row, p.residual_map) * p.residual_channel);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool in = row + i < p.rows;
            to[i] = in ? widen(from[channel(row + i, p.residual_map) * p.residual_channel]) : 0.f;
        }
    }

    // The sum of f over this position's channels.
    template <class Function>
    __device__ float sum(Function f) const {
        float sums[4] = {0.f, 0.f, 0.f, 0.f};
        if (exists) {
#pragma unroll 1
            for (uint32_t row = lane * 4; row < p.rows; row += 4 * kNormLanes) {
                float v[4];
                read(v, row);
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[i] += row + i < p.rows ? f(v[i]) : 0.f;
            }
        }
        shared.sums[lane][column] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        __syncthreads();
        const auto of = [&](int lane) { return shared.sums[lane][column]; };
        const float all = ((of(0) + of(1)) + (of(2) + of(3))) + ((of(4) + of(5)) + (of(6) + of(7)));
        __syncthreads();
        return all;
    }
};

template <class T>
__device__ void layer_norm(const pw_fprop& p, NormShared& shared, float* room, int64_t block) {
    const int64_t first = block * kNormPositions;
    if (first >= p.positions) return;
    const NormPosition<T> position(p, shared, room, first);
    switch (p.norm_job) {
        case PW_NORM_CHANNELS: {
            double mean;
            float deviations;
            position.finish(position.of_channels(mean, deviations));
            break;
        }
        case PW_NORM_MOMENTS: position.write_moments(); break;
        case PW_NORM_APPLY: position.finish(position.of_sample()); break;
    }
}

// Mean and sum of squared deviations of some values.
struct Moments {
    double count, mean, deviations;

    // Of both sets of values together (Chan, Golub and LeVeque 1979).
    __device__ void merge(const Moments& other) {
        if (other.count == 0.0) return;
        const double all = count + other.count;
        const double delta = other.mean - mean;
        mean += delta * (other.count / all);
        deviations += other.deviations + delta * delta * (count * other.count / all);
        count = all;
    }
};

constexpr int kMergeThreads = 256;
constexpr int kMergedByThread = PW_MERGED / kMergeThreads;

// Each thread merges neighbours in their order, then pairs of threads do, nearest first.
__device__ inline void merge_moments(const pw_merge& p, Moments (&shared)[kMergeThreads]) {
    const int64_t blocks = (p.items + PW_MERGED - 1) / PW_MERGED;
    const int64_t sample = blockIdx.x / blocks, part = blockIdx.x % blocks;
    const double* const from = p.from + 2 * sample * p.items;
    Moments mine{0.0, 0.0, 0.0};
#pragma unroll 1
    for (int i = 0; i < kMergedByThread; ++i) {
        const int64_t item = part * PW_MERGED + threadIdx.x * kMergedByThread + i;
        if (item >= p.items) break;
        const int64_t count = min(p.unit, p.values - item * p.unit);
        const Moments next{double(count), from[2 * item], from[2 * item + 1]};
        if (i == 0) {
            mine = next;
        } else {
            mine.merge(next);
        }
    }
    shared[threadIdx.x] = mine;
#pragma unroll 1
    for (int apart = 1; apart < kMergeThreads; apart *= 2) {
        __syncthreads();
        if (threadIdx.x % (2 * apart) == 0) shared[threadIdx.x].merge(shared[threadIdx.x + apart]);
    }
    if (threadIdx.x == 0) {
        double* const to = p.to + 2 * (sample * blocks + part);
        to[0] = shared[0].mean, to[1] = shared[0].deviations;
    }
}
