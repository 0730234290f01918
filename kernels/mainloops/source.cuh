// Steps on src, applied to a slab in shared memory by the threads that have brought it there, each to
// its own elements: before the barrier that shows the slab to the others.
#pragma once

#include "../elements.cuh"
#include "../ptx.cuh"
#include "../steps.cuh"
#include "../tiles.cuh"

// One element of a slab. Where it does not exist (beyond the end of an axis) it is 0, and stays so.
template <class T>
struct SlabElement {
    T* value;
    int k;       // which channel of the slab
    int column;  // which position of the tile
    bool exists;
};

// Where kCount of them lie, of one source. T is what tensors hold.
template <class T, int kCount, int kPositions>
struct SourceOperands {
    const pw_fprop& p;
    const PositionTable<kPositions>& at;
    int64_t first;       // the slab's first channel among those of all groups
    int k[kCount];
    int column[kCount];

    __device__ void per_channel(float (&to)[kCount], const float* from) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) to[i] = __ldg(from + first + k[i]);
    }
    __device__ void second(float (&to)[kCount]) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const T* const gate = static_cast<const T*>(p.gate);
            to[i] = widen(load_one(gate + at.gate[column[i]] + (first + k[i]) * p.gate_channel));
        }
    }
};

template <class T>
__device__ void put(const SlabElement<T>& element, float v) {
    *element.value = narrow<T>(v);
}

// Which of kWidth neighbours in shared memory a thread takes in turn i: each quarter of a warp begins with
// another word of them, so that a warp's accesses meet all banks.
template <class T, int kWidth = 4>
__device__ int rotated(int i) {
    return (i + (threadIdx.x >> 3) * int(4 / sizeof(T))) & (kWidth - 1);
}

// `first` is the slab's first channel; element(i) one of this thread's kElements, of which kAtOnce are
// in registers. T is what tensors hold.
template <class T, int kElements, int kAtOnce, int kPositions, class Element>
__device__ void run_source_steps(const pw_fprop& p, const PositionTable<kPositions>& at,
                                 int64_t first, Element element) {
    static_assert(kElements % kAtOnce == 0, "whole turns");
#pragma unroll 1
    for (int i = ptx::opaque(0); i < kElements; i += kAtOnce) {
        float v[kAtOnce];
        SourceOperands<T, kAtOnce, kPositions> operands{p, at, first};
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const auto e = element(i + j);
            v[j] = widen(*e.value);
            // The first stands in for those that do not exist: it does.
            operands.k[j] = e.exists ? e.k : 0;
            operands.column[j] = e.exists ? e.column : 0;
        }
        run_steps(p.source_steps, p.more_source_steps, p.source_step_count, v, operands);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const auto e = element(i + j);
            if (e.exists) put(e, v[j]);
        }
    }
}

// One element of an f32 src as the convolution takes it, wherever it lies: slow, for what is rare.
template <int kPositions>
__device__ float source_value(const pw_fprop& p, const PositionTable<kPositions>& at,
                              int64_t position, int column, int64_t channel) {
    uint32_t s = 0;
    while (channel >= p.sources[s].end) ++s;
    const pw_source& source = p.sources[s];
    int64_t offset = (channel - source.begin) * source.channel;
    locate(p, position, [&](uint32_t axis, int64_t at) { offset += at * source.axes[axis]; });
    float v[1] = {static_cast<const float*>(source.data)[offset]};
    const SourceOperands<float, 1, kPositions> operands{p, at, channel, {0}, {column}};
    run_steps(p.source_steps, p.more_source_steps, p.source_step_count, v, operands);
    return v[0];
}
