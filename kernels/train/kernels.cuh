// The kernels of training beside fprop's, which multiply for dgrad as well.
#pragma once

#include "norm.cuh"
#include "sweep.cuh"
#include "wgrad.cuh"
#include "wgrad_mma.cuh"

extern "C" __global__ void __launch_bounds__(PW_SWEEP_THREADS)
    train_moments_f32_32x8(const __grid_constant__ pw_sweep p) {
    __shared__ SweepShared shared;
    Sweep(p, shared, blockIdx.x).moments();
}

extern "C" __global__ void __launch_bounds__(PW_SWEEP_THREADS)
    train_forward_f32_32x8(const __grid_constant__ pw_sweep p) {
    __shared__ SweepShared shared;
    Sweep(p, shared, blockIdx.x).forward();
}

extern "C" __global__ void __launch_bounds__(PW_SWEEP_THREADS)
    train_sums_f32_32x8(const __grid_constant__ pw_sweep p) {
    __shared__ SweepShared shared;
    Sweep(p, shared, blockIdx.x).backward<false>();
}

extern "C" __global__ void __launch_bounds__(PW_SWEEP_THREADS)
    train_backward_f32_32x8(const __grid_constant__ pw_sweep p) {
    __shared__ SweepShared shared;
    Sweep(p, shared, blockIdx.x).backward<true>();
}

extern "C" __global__ void __launch_bounds__(PW_SWEEP_THREADS)
    train_norm_f32_8x32(const __grid_constant__ pw_sweep p) {
    __shared__ NormSweepShared shared;
    NormSweep(p, shared, blockIdx.x).run();
}

extern "C" __global__ void __launch_bounds__(PW_SWEEP_THREADS)
    train_bits_f32_256(const __grid_constant__ pw_sweep p) {
    __shared__ uint8_t shared[PW_SWEEP_THREADS];
    keep_bits(p, shared, blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(PW_SWEEP_THREADS)
    train_sum_f64_8x32(const __grid_constant__ pw_sum p) {
    __shared__ double shared[PW_SWEEP_THREADS];
    sum_items(p, shared, blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(PW_WGRAD_THREADS)
    wgrad_f32_simt_64x64x16(const __grid_constant__ pw_wgrad p) {
    __shared__ WgradShared shared;
    wgrad(p, shared, blockIdx.x);
}

// wgrad_{dtype}_{isa}_{rows}x{columns}x{positions}. As of fprop, a launch brings the shared memory.
#define PW_WGRAD_MMA(dtype, element, rows, columns, depth, warp_rows, warp_columns, stages, blocks, bytes) \
    extern "C" __global__ void __launch_bounds__(                                                 \
        32 * (rows) / (warp_rows) * (columns) / (warp_columns), blocks)                           \
        wgrad_##dtype##_mma_##rows##x##columns##x##depth(const __grid_constant__ pw_wgrad p) {     \
        using Tile = WgradTile<element, rows, columns, warp_rows, warp_columns, stages>;           \
        static_assert(Tile::kSlab == (depth), "wgrad.rs says how deep a slab is");                  \
        static_assert(sizeof(WgradMmaShared<Tile>) == (bytes), "plan.rs says how much a launch brings"); \
        extern __shared__ float4 brought[];                                                       \
        wgrad_mma<Tile>(p, *reinterpret_cast<WgradMmaShared<Tile>*>(brought), blockIdx.x);         \
    }
PW_WGRAD_MMA(f16, f16, 64, 64, 32, 32, 32, 4, 4, 34816)
PW_WGRAD_MMA(f16, f16, 128, 128, 32, 64, 32, 3, 1, 50688)
// Before sm_80 neither has an instruction.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
PW_WGRAD_MMA(bf16, bf16, 64, 64, 32, 32, 32, 4, 4, 34816)
PW_WGRAD_MMA(bf16, bf16, 128, 128, 32, 64, 32, 3, 1, 50688)
PW_WGRAD_MMA(tf32, float, 64, 64, 16, 32, 32, 4, 4, 33792)
PW_WGRAD_MMA(tf32, float, 128, 128, 16, 64, 32, 3, 1, 49920)
#endif

extern "C" __global__ void __launch_bounds__(PW_WGRAD_THREADS)
    wgrad_sum_f32_256(const __grid_constant__ pw_wgrad_sum p) {
    sum_splits(p, blockIdx.x);
}
