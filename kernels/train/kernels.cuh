// The kernels of training beside fprop's, which multiply for dgrad as well.
#pragma once

#include "sweep.cuh"
#include "wgrad.cuh"

// The planner spreads more blocks than the x axis holds over y.
__device__ inline int64_t this_block() { return int64_t(blockIdx.y) * gridDim.x + blockIdx.x; }

extern "C" __global__ void __launch_bounds__(kSweepThreads)
    train_moments_f32_32x8(const __grid_constant__ pw_sweep p) {
    __shared__ SweepShared shared;
    Sweep(p, shared, blockIdx.x).moments();
}

extern "C" __global__ void __launch_bounds__(kSweepThreads)
    train_forward_f32_32x8(const __grid_constant__ pw_sweep p) {
    __shared__ SweepShared shared;
    Sweep(p, shared, blockIdx.x).forward();
}

extern "C" __global__ void __launch_bounds__(kSweepThreads)
    train_sums_f32_32x8(const __grid_constant__ pw_sweep p) {
    __shared__ SweepShared shared;
    Sweep(p, shared, blockIdx.x).backward<false>();
}

extern "C" __global__ void __launch_bounds__(kSweepThreads)
    train_backward_f32_32x8(const __grid_constant__ pw_sweep p) {
    __shared__ SweepShared shared;
    Sweep(p, shared, blockIdx.x).backward<true>();
}

extern "C" __global__ void __launch_bounds__(kSweepThreads)
    train_bits_f32_256(const __grid_constant__ pw_sweep p) {
    __shared__ uint8_t shared[kSweepThreads];
    keep_bits(p, shared, this_block());
}

extern "C" __global__ void __launch_bounds__(kSweepThreads)
    train_sum_f64_8x32(const __grid_constant__ pw_sum p) {
    __shared__ double shared[kSweepThreads];
    sum_items(p, shared, this_block());
}

extern "C" __global__ void __launch_bounds__(kWgradThreads)
    wgrad_f32_simt_64x64x16(const __grid_constant__ pw_wgrad p) {
    __shared__ WgradShared shared;
    wgrad(p, shared, this_block());
}

extern "C" __global__ void __launch_bounds__(kWgradThreads)
    wgrad_sum_f32_256(const __grid_constant__ pw_wgrad_sum p) {
    sum_splits(p, this_block());
}
