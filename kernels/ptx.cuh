// The instructions that CUDA C++ has no name for, one thin wrapper each.
#pragma once

#include <stdint.h>

#include "params.h"

namespace ptx {

// The same number, of which the compiler knows nothing: what is computed of it stays where it is
// written, instead of in a register from before a loop on.
__device__ inline int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Copies kBytes from global to shared memory in the background; where `in` is false, writes zeros
// and reads nothing. Both addresses are aligned to kBytes. Before sm_80 it is done when it returns.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool in) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what the instruction takes");
#if __CUDA_ARCH__ >= 800
    const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
    const int read = in ? kBytes : 0;
    if (kBytes == 16) {
        // Past L1: nothing of it is read twice by a block.
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(read),
                     "n"(kBytes)
                     : "memory");
    }
#else
    if constexpr (kBytes == 16) {
        *static_cast<uint4*>(shared) =
            in ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
    } else if constexpr (kBytes == 8) {
        *static_cast<uint2*>(shared) = in ? __ldg(static_cast<const uint2*>(global)) : make_uint2(0, 0);
    } else {
        *static_cast<uint32_t*>(shared) = in ? __ldg(static_cast<const uint32_t*>(global)) : 0;
    }
#endif
}

// Closes a group of this thread's copies.
__device__ inline void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups, the latest, are under way.
template <int kPending>
__device__ inline void wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// To the nearest TF32, ties away from zero, as the bits of an f32. sm_80.
__device__ inline uint32_t round_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// The same, of which a NaN stays one: of its bits those that count may be an infinity's.
__device__ inline uint32_t round_number_to_tf32(float x) { return x == x ? round_tf32(x) : 0x7FFFFFFF; }

// c += a * b, [16, 8] * [8, 8] of TF32 (the low 13 bits of an operand do not count). sm_80.
// With g = lane / 4 and t = lane % 4, a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4),
// b holds (t, g), (t + 4, g), and c holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ inline void mma_tf32(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                                const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An f16's bits as an f32, and the nearest f16's.
__device__ inline float widen_f16(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ inline uint16_t narrow_f16(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// The nearest bf16's bits; a NaN stays one.
__device__ inline uint16_t narrow_bf16(float x) {
#if __CUDA_ARCH__ >= 800
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7FFF : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#endif
}

// Two of them, the first in the lower half.
__device__ inline uint32_t narrow_f16x2(float first, float second) {
#if __CUDA_ARCH__ >= 800
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
#else
    return narrow_f16(first) | uint32_t(narrow_f16(second)) << 16;
#endif
}
__device__ inline uint32_t narrow_bf16x2(float first, float second) {
#if __CUDA_ARCH__ >= 800
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
#else
    return narrow_bf16(first) | uint32_t(narrow_bf16(second)) << 16;
#endif
}

// The lower halves of two words, and the upper ones.
__device__ inline uint32_t lower_halves(uint32_t first, uint32_t second) {
    return __byte_perm(first, second, 0x5410);
}
__device__ inline uint32_t upper_halves(uint32_t first, uint32_t second) {
    return __byte_perm(first, second, 0x7632);
}

// c += a * b, [16, 16] * [16, 8], of pairs of f16 or bf16 along the depth, the first in the lower half.
// With g = lane / 4 and t = lane % 4, a holds (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), b
// holds (2t, g), (2t + 8, g), each with its neighbour, and c is as above. Before sm_80 f16 takes
// two instructions of half the depth; bf16 has none.
__device__ inline void mma_f16(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                               const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}
__device__ inline void mma_bf16(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                                const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a * b, [16, 32] * [32, 8], of i8 and of bytes that are i8 or u8: exact, modulo 2^32. As above with
// four neighbours along the depth in place of two, a holding (g, 4t), (g + 8, 4t), (g, 4t + 16),
// (g + 8, 4t + 16). Before sm_80 it takes four instructions of half the rows and half the depth.
template <bool kSigned>
__device__ inline void mma_i8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    if constexpr (kSigned) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int32_t &first = c[i % 2 * 2], &second = c[i % 2 * 2 + 1];
        if constexpr (kSigned) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(first), "+r"(second)
                : "r"(a[i]), "r"(b[i / 2]));
        } else {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.u8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(first), "+r"(second)
                : "r"(a[i]), "r"(b[i / 2]));
        }
    }
#endif
}

// The same of floats of 8 bits, which of them the operands' names say, with sums in f32. sm_89.
template <pw_operands kOperands>
__device__ inline void mma_fp8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define PW_MMA_FP8(types)                                                                         \
    asm("mma.sync.aligned.m16n8k32.row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
        "{%8, %9}, {%0, %1, %2, %3};"                                                              \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if constexpr (kOperands == PW_E4M3_E4M3) {
        PW_MMA_FP8("e4m3.e4m3");
    } else if constexpr (kOperands == PW_E4M3_E5M2) {
        PW_MMA_FP8("e4m3.e5m2");
    } else if constexpr (kOperands == PW_E5M2_E4M3) {
        PW_MMA_FP8("e5m2.e4m3");
    } else {
        static_assert(kOperands == PW_E5M2_E5M2, "floats of 8 bits");
        PW_MMA_FP8("e5m2.e5m2");
    }
#undef PW_MMA_FP8
}

// Two floats of 8 bits, the first in the lower byte: the nearest, ties to even, or the greatest for what
// is beyond it; a NaN stays one. sm_89.
__device__ inline uint16_t narrow_e4m3x2(float first, float second) {
    uint16_t bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(second), "f"(first));
    return bits;
}
__device__ inline uint16_t narrow_e5m2x2(float first, float second) {
    uint16_t bits;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(second), "f"(first));
    return bits;
}

// Their values, as two f16. sm_89.
__device__ inline uint32_t widen_e4m3x2(uint16_t bits) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(bits));
    return halves;
}
__device__ inline uint32_t widen_e5m2x2(uint16_t bits) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(bits));
    return halves;
}

}  // namespace ptx
