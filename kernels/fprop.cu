// The forward pass: fprop_{dtype}_{isa}_{rows}x{positions}x{depth}_{layout of dst}, and what may go
// before and after it.
#include "copy.cuh"
#include "epilogues/bytes.cuh"
#include "epilogues/steps.cuh"
#include "mainloops/mma.cuh"
#include "mainloops/simt.cuh"
#include "norms/layer_norm.cuh"
#include "quantize.cuh"
#include "splits.cuh"
#include "train/kernels.cuh"

template <class Tile, class Shared>
__device__ void fprop(const pw_fprop& p, Shared& shared) {
    // The planner spreads more blocks than the x axis holds over y.
    const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
    const TileAt tile = TileAt::of(p, block, Tile());
    if (!tile.exists(p)) return;
    // What follows the main loop reads this copy, so that the loop's registers need not hold it.
    if (threadIdx.x == 0) shared.tile = tile;
    fill_positions<true>(shared.at, p, p.sources[0], tile.position, Tile::kThreads);
    __syncthreads();
    float acc[Tile::kSlow][Tile::kFast];
#pragma unroll
    for (int s = 0; s < Tile::kSlow; ++s) {
#pragma unroll
        for (int f = 0; f < Tile::kFast; ++f) acc[s][f] = 0.f;
    }
    // The sources of a concatenation one after another, each in slabs of its own.
#pragma unroll 1
    for (uint32_t s = 0; s < p.source_count; ++s) {
        const Run run = shared.tile.run(p, s);
        if (run.depth == 0) continue;
        if (s > 0) {
            // Nobody reads the slabs and the positions of the source before any more.
            __syncthreads();
            fill_positions<false>(shared.at, p, *run.source, shared.tile.position, Tile::kThreads);
            __syncthreads();
        }
        mainloop<Tile>(p, shared.tile, run, shared, acc);
    }
    finish_sums<Tile>(p, shared.tile, shared, acc);
    if (p.splits > 1 && !add_up<Tile>(p, shared.tile, acc)) return;
    TileWriter<Tile>(p, shared.tile, shared.at).write(acc);
}

#define PW_SIMT(dtype, element, layout, channels_fast, rows, positions, depth, slow, fast, blocks, \
                bytes)                                                                             \
    extern "C" __global__ void __launch_bounds__((rows) * (positions) / ((slow) * (fast)), blocks) \
        fprop_##dtype##_simt_##rows##x##positions##x##depth##_##layout(                            \
            const __grid_constant__ pw_fprop p) {                                                  \
        using Tile = SimtTile<element, rows, positions, depth, slow, fast, channels_fast>;         \
        static_assert(sizeof(SimtShared<Tile>) == (bytes), "kernels.def says how much a block has"); \
        __shared__ SimtShared<Tile> shared;                                                        \
        fprop<Tile>(p, shared);                                                                    \
    }
#define PW_FPROP_F32_SIMT(...)                      \
    PW_SIMT(f32, float, nchw, false, __VA_ARGS__)   \
    PW_SIMT(f32, float, nhwc, true, __VA_ARGS__)
#define PW_FPROP_16BIT_SIMT(...)                  \
    PW_SIMT(f16, f16, nchw, false, __VA_ARGS__)   \
    PW_SIMT(f16, f16, nhwc, true, __VA_ARGS__)    \
    PW_SIMT(bf16, bf16, nchw, false, __VA_ARGS__) \
    PW_SIMT(bf16, bf16, nhwc, true, __VA_ARGS__)

#define PW_COPY(dtype, element)                                                                  \
    extern "C" __global__ void __launch_bounds__(kCopyThreads)                                   \
        copy_##dtype##_32x64(const __grid_constant__ pw_fprop p) {                               \
        __shared__ CopyShared<element> shared;                                                   \
        copy_channels(p, shared, int64_t(blockIdx.y) * gridDim.x + blockIdx.x);                  \
    }
PW_COPY(f32, float)
// Bits of any kind.
PW_COPY(b16, f16)

#define PW_NORM(dtype, element)                                                                  \
    extern "C" __global__ void __launch_bounds__(kNormThreads)                                   \
        norm_##dtype##_8x32(const __grid_constant__ pw_fprop p) {                                \
        __shared__ NormShared shared;                                                            \
        extern __shared__ float4 brought[];                                                      \
        float* const room = reinterpret_cast<float*>(brought);                                   \
        layer_norm<element>(p, shared, room, int64_t(blockIdx.y) * gridDim.x + blockIdx.x);      \
    }
PW_NORM(f32, float)
PW_NORM(f16, f16)
PW_NORM(bf16, bf16)

extern "C" __global__ void __launch_bounds__(kMergeThreads)
    norm_merge_f64_1024(const __grid_constant__ pw_merge p) {
    __shared__ Moments shared[kMergeThreads];
    merge_moments(p, shared);
}

#define PW_QUANTIZE(name, job)                                                                   \
    extern "C" __global__ void __launch_bounds__(kQuantizeThreads)                               \
        name##_f32_8x32(const __grid_constant__ pw_fprop p) {                                    \
        __shared__ QuantizeShared shared;                                                        \
        const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;                      \
        if (block * kQuantizePositions < p.positions) QuantizeBlock(p, shared, block).job();     \
    }
PW_QUANTIZE(reach, widen)
PW_QUANTIZE(quantize, quantize)

// More shared memory than a kernel may declare: the launch brings it.
#define PW_MMA(name, element, parts, layout, channels_fast, rows, positions, depth, warp_rows,   \
               warp_positions, stages, blocks, bytes)                                            \
    extern "C" __global__ void __launch_bounds__(                                                \
        32 * (rows) / (warp_rows) * (positions) / (warp_positions), blocks)                      \
        fprop_##name##_##rows##x##positions##x##depth##_##layout(                                \
            const __grid_constant__ pw_fprop p) {                                                \
        using Tile = MmaTile<element, parts, rows, positions, depth, warp_rows, warp_positions,  \
                             stages, channels_fast>;                                             \
        static_assert(sizeof(MmaShared<Tile>) == (bytes), "kernels.def says how much a launch brings"); \
        extern __shared__ float4 brought[];                                                      \
        fprop<Tile>(p, *reinterpret_cast<MmaShared<Tile>*>(brought));                            \
    }
// A warp's part is longer along the axis of the stores.
#define PW_16BIT(name, element, rows, positions, depth, warp_slow, warp_fast, ...)               \
    PW_MMA(name, element, 1, nchw, false, rows, positions, depth, warp_slow, warp_fast, __VA_ARGS__) \
    PW_MMA(name, element, 1, nhwc, true, rows, positions, depth, warp_fast, warp_slow, __VA_ARGS__)

#define PW_FPROP_TF32_MMA(...)
#define PW_FPROP_F32_MMA(...)
#define PW_FPROP_16BIT_MMA(...)
#define PW_FPROP_F16_MMA_SM75(...)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#undef PW_FPROP_TF32_MMA
#define PW_FPROP_TF32_MMA(...)                              \
    PW_MMA(tf32_sm80, float, 1, nchw, false, __VA_ARGS__)   \
    PW_MMA(tf32_sm80, float, 1, nhwc, true, __VA_ARGS__)
#undef PW_FPROP_F32_MMA
#define PW_FPROP_F32_MMA(...)                              \
    PW_MMA(f32_sm80, float, 2, nchw, false, __VA_ARGS__)   \
    PW_MMA(f32_sm80, float, 2, nhwc, true, __VA_ARGS__)
#undef PW_FPROP_16BIT_MMA
#define PW_FPROP_16BIT_MMA(...)          \
    PW_16BIT(f16_sm80, f16, __VA_ARGS__) \
    PW_16BIT(bf16_sm80, bf16, __VA_ARGS__)
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
#undef PW_FPROP_F16_MMA_SM75
#define PW_FPROP_F16_MMA_SM75(...) PW_16BIT(f16_sm75, f16, __VA_ARGS__)
#endif

#define PW_INT8(...) PW_BYTE_KERNEL(i8_mma, false, __VA_ARGS__)
// Of an image of its own.
#define PW_FP8(...)

#include "kernels.def"
