// The instructions that CUDA C++ has no name for, one thin wrapper each.
#pragma once

#include <stdint.h>

namespace ptx {

// The same number, of which the compiler knows nothing: what is computed of it stays where it is
// written, instead of in a register from before a loop on.
__device__ inline int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Copies kBytes from global to shared memory in the background; where `in` is false, writes zeros
// and reads nothing. Both addresses are aligned to kBytes. sm_80.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global, bool in) {
    static_assert(kBytes == 4 || kBytes == 16, "a float, or four");
    const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
    const int read = in ? kBytes : 0;
    if (kBytes == 16) {
        // Past L1: nothing of it is read twice by a block.
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(read)
                     : "memory");
    }
}

// Closes a group of this thread's copies.
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups, the latest, are under way.
template <int kPending>
__device__ inline void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// To the nearest TF32, ties away from zero, as the bits of an f32. sm_80.
__device__ inline uint32_t round_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

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

}  // namespace ptx
