// The stages before or after the convolution, forward and backward, in one pass over their values.
// Nothing between stages is kept: what a derivative needs is computed again from the chain's input.
//
// A block has a few rows and the positions of one chunk. Each of its threads has one row; it sums in
// f32 over its part of the chunk, and these sums are added in f64 and in a fixed order.
#pragma once

#include "../elements.cuh"
#include "../params.h"
#include "../tiles.cuh"
#include "derivatives.cuh"

struct SweepShared {
    float sums[2 * PW_MAX_SUMMED][PW_SWEEP_THREADS];
};

// Where a position lies along strides.
__device__ inline int64_t offset_of(uint32_t position, const uint32_t* extents, uint32_t count,
                                    const int64_t* strides) {
    int64_t offset = 0;
    for (uint32_t axis = 0; axis + 1 < count; ++axis) {
        const uint32_t next = position / extents[axis];
        offset += int64_t(position - next * extents[axis]) * strides[axis];
        position = next;
    }
    return count == 0 ? 0 : offset + int64_t(position) * strides[count - 1];
}

__device__ inline int size_of(pw_element type) { return type == PW_F32 ? 4 : 2; }

// What a launch's tensor holds is known when it runs: every thread takes the same branch.
__device__ inline float load_element(const void* data, int64_t at, pw_element type) {
    switch (type) {
        case PW_F16: return widen(static_cast<const f16*>(data)[at]);
        case PW_BF16: return widen(static_cast<const bf16*>(data)[at]);
        default: return static_cast<const float*>(data)[at];
    }
}
__device__ inline void store_element(void* data, int64_t at, pw_element type, float x) {
    switch (type) {
        case PW_F16: static_cast<f16*>(data)[at] = narrow<f16>(x); break;
        case PW_BF16: static_cast<bf16*>(data)[at] = narrow<bf16>(x); break;
        default: static_cast<float*>(data)[at] = x;
    }
}

// Where a thread's row lies in one tensor.
class RowAt {
public:
    __device__ RowAt(const pw_part& part, uint32_t row, const uint32_t* map) : part(part) {
        const int64_t channel = map != nullptr ? int64_t(__ldg(map + row)) : int64_t(row);
        first = (channel - int64_t(part.begin)) * part.channel;
    }
    __device__ static RowAt of(const pw_part* parts, uint32_t row, const uint32_t* map) {
        while (map == nullptr && row >= parts->end) ++parts;
        return RowAt(*parts, row, map);
    }

    __device__ const int64_t* axes() const { return part.axes; }
    // At an offset along the axes.
    __device__ float load(int64_t offset) const {
        return load_element(part.data, first + offset, part.element);
    }
    __device__ void store(int64_t offset, float x, bool add) const {
        store_element(part.data, first + offset, part.element, add ? load(offset) + x : x);
    }

private:
    const pw_part& part;
    int64_t first;
};

// A chain of stages at one row.
class Stages {
protected:
    __device__ explicit Stages(const pw_sweep& p) : p(p) {}

    const pw_sweep& p;
    uint32_t row;

    __device__ int64_t offset(const RowAt& at, uint32_t position) const {
        return offset_of(position, p.extents, p.axis_count, at.axes());
    }

    __device__ float get(const RowAt& at, uint32_t q) const { return at.load(offset(at, q)); }

    __device__ void put(const RowAt& at, uint32_t q, float x, bool add) const {
        at.store(offset(at, q), x, add);
    }

    __device__ float value(const RowAt& input, uint32_t q, uint32_t stages) const {
        return prefix(get(input, q), q, stages);
    }

    // What reaches a stage.
    __device__ float prefix(float x, uint32_t q, uint32_t stages) const {
#pragma unroll 1
        for (uint32_t i = 0; i < stages; ++i) x = apply(p.stages[i], x, q);
        return x;
    }

    // The gradient by what reaches stage i, x, from that by what leaves it. With kStore the residual's
    // is stored; add takes what the stage sums.
    template <bool kStore, class Add>
    __device__ float through(uint32_t i, float x, float d, uint32_t q, Add add) const {
        const pw_stage& stage = p.stages[i];
        switch (stage.op) {
            case PW_OP_AFFINE: {
                const float from_mean = x - __ldg(stage.first + row);
                add(stage, d, d * from_mean);
                if (stage.mean_d != nullptr) {
                    d -= fmaf(from_mean, __ldg(stage.along + row), __ldg(stage.mean_d + row));
                }
                return d * __ldg(stage.second + row);
            }
            case PW_OP_PRELU:
                add(stage, d, x > 0.f ? 0.f : d * x);
                return x > 0.f ? d : d * __ldg(stage.second + row);
            case PW_OP_RESIDUAL:
                if (kStore && p.d_second.data != nullptr) {
                    put(RowAt(p.d_second, row, p.second_map), q, d, p.flags & PW_SWEEP_ADD_SECOND);
                }
                return d;
            case PW_OP_GATE:
                add(stage, d, d * x);
                return d * second(q);
            case PW_OP_LAYER_NORM: {
                const float at = normalised(stage, x, q);
                add(stage, d, d * at);
                if (stage.second != nullptr) d *= __ldg(stage.second + row);
                const uint32_t unit = q / p.norm_unit;
                const float* const of = stage.mean_d + 2 * int64_t(unit);
                d -= fmaf(at, __ldg(of + 1), __ldg(of));
                return d * __ldg(stage.first + 3 * int64_t(unit) + 1);
            }
            default:
                if (p.bits != nullptr) return bit(q) ? d : d * p.outside;
                return d * activation::slope(stage, x);
        }
    }

    // What a layer norm makes of x, before its gamma and beta.
    __device__ float normalised(const pw_stage& stage, float x, uint32_t q) const {
        const float* const of = stage.first + 3 * int64_t(q / p.norm_unit);
        return fmaf(x - __ldg(of), __ldg(of + 1), __ldg(of + 2));
    }

private:
    __device__ float second(uint32_t q) const {
        return get(RowAt(p.second, row, p.second_map), q);
    }

    // What activations ask of a value's place: nothing.
    struct Nowhere {
        __device__ void per_channel(float (&)[1], const float*) const {}
        __device__ void second(float (&)[1]) const {}
    };

    __device__ float apply(const pw_stage& stage, float x, uint32_t q) const {
        switch (stage.op) {
            case PW_OP_AFFINE:
                return fmaf(x - __ldg(stage.first + row), __ldg(stage.second + row),
                            __ldg(stage.third + row));
            case PW_OP_PRELU: return x >= 0.f ? x : __ldg(stage.second + row) * x;
            case PW_OP_RESIDUAL: return x + second(q);
            case PW_OP_GATE: return x * second(q);
            case PW_OP_LAYER_NORM: {
                const float at = normalised(stage, x, q);
                if (stage.second == nullptr) return at;
                return fmaf(at, __ldg(stage.second + row), __ldg(stage.third + row));
            }
            default: {
                float v[1] = {x};
                run_step(pw_step{stage.op, stage.a, stage.b}, v, Nowhere());
                return v[0];
            }
        }
    }

    __device__ bool bit(uint32_t q) const {
        const bool wide = p.flags & PW_SWEEP_CHANNELS_FAST;
        const int64_t at = wide ? int64_t(q) * p.rows + row : int64_t(row) * p.positions + q;
        return __ldg(p.bits + at / 32) >> (at % 32) & 1;
    }
};

class Sweep : Stages {
public:
    __device__ Sweep(const pw_sweep& p, SweepShared& shared, uint32_t block)
        : Stages(p), shared(shared) {
        const int t = threadIdx.x;
        const bool wide = p.flags & PW_SWEEP_CHANNELS_FAST;
        const uint32_t height = wide ? PW_SWEEP_WIDE : PW_SWEEP_NARROW;
        lanes = PW_SWEEP_THREADS / height;
        local = wide ? t % PW_SWEEP_WIDE : t / (PW_SWEEP_THREADS / PW_SWEEP_NARROW);
        lane = wide ? t / PW_SWEEP_WIDE : t % (PW_SWEEP_THREADS / PW_SWEEP_NARROW);
        const uint32_t row_tiles = (p.rows + height - 1) / height;
        chunk = block / row_tiles;
        row = (block - chunk * row_tiles) * height + local;
        const uint32_t in_group = (p.group + p.chunk - 1) / p.chunk;
        chunks = p.positions / p.group * in_group;
        const uint32_t group = chunk / in_group;
        begin = group * p.group + (chunk - group * in_group) * p.chunk;
        end = min(begin + p.chunk, (group + 1) * p.group);
        exists = chunk < chunks && row < p.rows;
    }

    // The mean of what reaches a stage, and the sum of squared deviations from it.
    __device__ void moments() {
        float shift = 0.f, sum = 0.f;
        if (exists) {
            const RowAt input = RowAt::of(p.inputs, row, nullptr);
            shift = value(input, begin, p.stage_count);
            for (uint32_t q = begin + lane; q < end; q += lanes) {
                sum += value(input, q, p.stage_count) - shift;
            }
        }
        shared.sums[0][threadIdx.x] = sum;
        __syncthreads();
        const double count = double(end - begin);
        const double moved = total(0) / count;
        const float about = float(moved);
        float squares = 0.f, off = 0.f;
        if (exists) {
            const RowAt input = RowAt::of(p.inputs, row, nullptr);
            for (uint32_t q = begin + lane; q < end; q += lanes) {
                const float x = value(input, q, p.stage_count) - shift - about;
                squares += x * x;
                off += x;
            }
        }
        shared.sums[1][threadIdx.x] = squares;
        shared.sums[2][threadIdx.x] = off;
        __syncthreads();
        if (!exists || lane != 0) return;
        // The deviations' own mean is what rounding has put the mean off.
        const double rest = total(2);
        double deviations = total(1) - rest * rest / count;
        if (deviations < 0.0) deviations = 0.0;
        double* const to = p.sums + 2 * (int64_t(row) * chunks + chunk);
        to[0] = double(shift) + double(about) + rest / count;
        to[1] = deviations;
    }

    __device__ void forward() const {
        if (!exists) return;
        const bool some = p.input_count > 0;
        const RowAt input = some ? RowAt::of(p.inputs, row, nullptr) : RowAt(p.second, 0, nullptr);
        const RowAt output = RowAt::of(p.outputs, row, p.map);
        for (uint32_t q = begin + lane; q < end; q += lanes) {
            const float x = some ? value(input, q, p.stage_count) : 0.f;
            put(output, q, x, p.flags & PW_SWEEP_ADD);
        }
    }

    // From the gradient by the chain's result down to its first_stage. With kStore that stage is
    // passed through as well, and what comes out is stored; without, it is only summed.
    template <bool kStore>
    __device__ void backward() {
        for (uint32_t s = 0; s < 2 * p.summed; ++s) shared.sums[s][threadIdx.x] = 0.f;
        if (exists) {
            const bool some = p.input_count > 0;
            const RowAt input =
                some ? RowAt::of(p.inputs, row, nullptr) : RowAt(p.d, row, p.map);
            const RowAt d_at(p.d, row, p.map);
            const auto add = [this](const pw_stage& stage, float one, float product) {
                if (stage.sums == PW_NOT_SUMMED) return;
                shared.sums[2 * stage.sums][threadIdx.x] += one;
                shared.sums[2 * stage.sums + 1][threadIdx.x] += product;
            };
            for (uint32_t q = begin + lane; q < end; q += lanes) {
                float d = get(d_at, q);
                const float x = some ? get(input, q) : 0.f;
                for (uint32_t i = p.stage_count; i-- > p.first_stage;) {
                    d = through<kStore>(i, some ? prefix(x, q, i) : 0.f, d, q, add);
                }
                if (kStore && p.output_count > 0) {
                    put(RowAt::of(p.outputs, row, nullptr), q, d, p.flags & PW_SWEEP_ADD);
                }
            }
        }
        __syncthreads();
        if (!exists) return;
        for (uint32_t s = lane; s < 2 * p.summed; s += lanes) {
            p.sums[(int64_t(s) * p.rows + row) * chunks + chunk] = total(s);
        }
    }

private:
    SweepShared& shared;
    int lanes, lane, local;
    uint32_t chunk, chunks, begin, end;
    bool exists;

    // Of the threads that have this one's row.
    __device__ double total(int s) const {
        const bool wide = p.flags & PW_SWEEP_CHANNELS_FAST;
        double sum = 0.0;
        for (int i = 0; i < lanes; ++i) {
            sum += double(shared.sums[s][wide ? i * PW_SWEEP_WIDE + local : local * lanes + i]);
        }
        return sum;
    }
};

// Bits of which values lie inside the bounds, each block as many as it has threads.
__device__ inline void keep_bits(const pw_sweep& p, uint8_t (&shared)[PW_SWEEP_THREADS],
                                 int64_t block) {
    const int64_t all = int64_t(p.positions) * p.rows;
    const int64_t at = block * PW_SWEEP_THREADS + threadIdx.x;
    bool set = false;
    if (at < all) {
        int64_t row, q;
        if (p.flags & PW_SWEEP_CHANNELS_FAST) {
            q = divide(at, p.rows, row);
        } else {
            row = divide(at, p.positions, q);
        }
        const RowAt input(p.inputs[0], uint32_t(row), p.map);
        const float x = input.load(offset_of(uint32_t(q), p.extents, p.axis_count, input.axes()));
        // NaN is inside: it passes a gradient on.
        set = !(x <= p.lo || x >= p.hi);
    }
    shared[threadIdx.x] = set;
    __syncthreads();
    if (threadIdx.x < PW_SWEEP_THREADS / 32 && at - threadIdx.x + 32 * threadIdx.x < all) {
        uint32_t word = 0;
        for (int i = 0; i < 32; ++i) word |= uint32_t(shared[32 * threadIdx.x + i]) << i;
        p.bits[block * (PW_SWEEP_THREADS / 32) + threadIdx.x] = word;
    }
}

// PW_SUM_LANES threads per output: each adds every so many items, then neighbours are added.
__device__ inline void sum_items(const pw_sum& p, double (&shared)[PW_SWEEP_THREADS],
                                 int64_t block) {
    const int64_t output = block * (PW_SWEEP_THREADS / PW_SUM_LANES) + threadIdx.x / PW_SUM_LANES;
    const int lane = threadIdx.x % PW_SUM_LANES;
    double sum = 0.0;
    if (output < p.outputs) {
        for (int64_t i = lane; i < p.items; i += PW_SUM_LANES) sum += p.from[output * p.items + i];
    }
    shared[threadIdx.x] = sum;
    for (int apart = 1; apart < PW_SUM_LANES; apart *= 2) {
        __syncthreads();
        if (lane % (2 * apart) == 0) shared[threadIdx.x] += shared[threadIdx.x + apart];
    }
    if (output >= p.outputs || lane != 0) return;
    p.to[output] = shared[threadIdx.x];
    if (p.to_f32 != nullptr) p.to_f32[output] = float(shared[threadIdx.x]);
}
