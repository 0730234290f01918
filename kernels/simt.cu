// The forward pass in f32 on any chip: fprop_f32_simt_{rows}x{positions}x{depth}_{layout of dst}.
#include "epilogues/steps.cuh"
#include "mainloops/simt.cuh"

template <class Tile>
__device__ void fprop(const pw_fprop& p) {
    __shared__ SimtShared<Tile> shared;
    // The planner spreads more blocks than the x axis holds over y.
    const int64_t index = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
    if (index >= tile_count(p, Tile::kRows, Tile::kPositions)) return;
    const TileAt tile(p, index, Tile::kRows, Tile::kPositions);
    fill_positions(shared.at, p, tile.position, Tile::kThreads);
    __syncthreads();
    float acc[Tile::kSlow][Tile::kFast];
    simt_mainloop<Tile>(p, tile, shared, acc);
    TileWriter<Tile>(p, tile, shared.at).write(acc);
}

#define PW_INSTANCE(layout, channels_fast, rows, positions, depth, slow, fast, blocks)           \
    extern "C" __global__ void __launch_bounds__((rows) * (positions) / ((slow) * (fast)), blocks) \
        fprop_f32_simt_##rows##x##positions##x##depth##_##layout(                                \
            const __grid_constant__ pw_fprop p) {                                                \
        fprop<SimtTile<rows, positions, depth, slow, fast, channels_fast>>(p);                   \
    }
#define PW_FPROP_F32_SIMT(...)              \
    PW_INSTANCE(nchw, false, __VA_ARGS__)   \
    PW_INSTANCE(nhwc, true, __VA_ARGS__)

#include "kernels.def"
