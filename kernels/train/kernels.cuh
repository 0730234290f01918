// The kernels of training beside fprop's, which multiply for dgrad as well.
#pragma once

#include "norm.cuh"
#include "sweep.cuh"
#include "wgrad.cuh"

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

extern "C" __global__ void __launch_bounds__(PW_WGRAD_THREADS)
    wgrad_sum_f32_256(const __grid_constant__ pw_wgrad_sum p) {
    sum_splits(p, blockIdx.x);
}
