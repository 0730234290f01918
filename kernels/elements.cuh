// What tensors hold, and their way to f32 and back. Arithmetic is f32; a result is rounded once, to the
// nearest, ties to even.
#pragma once

#include <stdint.h>

#include "ptx.cuh"

struct f16 {
    uint16_t bits;
    static constexpr bool kIsBf16 = false;
};
struct bf16 {
    uint16_t bits;
    static constexpr bool kIsBf16 = true;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(f16 x) { return ptx::widen_f16(x.bits); }
__device__ inline float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline f16 narrow<f16>(float x) { return {ptx::narrow_f16(x)}; }
template <>
__device__ inline bf16 narrow<bf16>(float x) { return {ptx::narrow_bf16(x)}; }

// The nearest integer, ties to even, of an f32 that an i16 holds; right modulo 256.
__device__ inline uint32_t nearest_integer(float x) { return __float_as_uint(__fadd_rn(x, 12582912.f)); }

// Two neighbours in a 32-bit word, the first in its lower half.
template <class T>
__device__ T half_of(uint32_t word, int i) {
    return {uint16_t(i == 0 ? word : word >> 16)};
}
template <class T>
__device__ uint32_t pair_of(float first, float second);
template <>
__device__ inline uint32_t pair_of<f16>(float first, float second) { return ptx::narrow_f16x2(first, second); }
template <>
__device__ inline uint32_t pair_of<bf16>(float first, float second) { return ptx::narrow_bf16x2(first, second); }

// One element through the read-only cache.
__device__ inline float load_one(const float* from) { return __ldg(from); }
template <class T>
__device__ T load_one(const T* from) {
    return {__ldg(&from->bits)};
}

// kCount neighbours, 8 or 16 aligned bytes; those of a constant tensor through the read-only cache.
template <bool kConstant, int kCount>
__device__ void load_vector(float (&to)[kCount], const float* from) {
    static_assert(kCount == 4, "16 bytes");
    const float4* const vector = reinterpret_cast<const float4*>(from);
    const float4 v = kConstant ? __ldg(vector) : *vector;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
template <bool kConstant, int kCount, class T>
__device__ void load_vector(float (&to)[kCount], const T* from) {
    static_assert(kCount == 4 || kCount == 8, "8 or 16 bytes");
    uint32_t words[kCount / 2];
    if constexpr (kCount == 4) {
        const uint2* const vector = reinterpret_cast<const uint2*>(from);
        const uint2 v = kConstant ? __ldg(vector) : *vector;
        words[0] = v.x, words[1] = v.y;
    } else {
        const uint4* const vector = reinterpret_cast<const uint4*>(from);
        const uint4 v = kConstant ? __ldg(vector) : *vector;
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = widen(half_of<T>(words[i / 2], i % 2));
}

template <int kCount>
__device__ void store_vector(float* to, const float (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        reinterpret_cast<float4*>(to)[i / 4] = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
}
template <class T, int kCount>
__device__ void store_vector(T* to, const float (&v)[kCount]) {
    static_assert(kCount == 4 || kCount == 8, "8 or 16 bytes");
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) words[i] = pair_of<T>(v[2 * i], v[2 * i + 1]);
    if constexpr (kCount == 4) {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
