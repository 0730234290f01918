// Correct kernels that the tests run as they are, and with planted faults.
#include <cuda_bf16.h>
#include <stdint.h>

// c[m][n] = a[m][k] * b[k][n], all row-major, in f32: 64x64 tiles, 16 deep, 4x4 per thread.
extern "C" __global__ void __launch_bounds__(256)
gemm_f32(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c,
         int m, int n, int k) {
    __shared__ __align__(16) float tile_a[16][64 + 4];
    __shared__ __align__(16) float tile_b[16][64];
    const int row0 = blockIdx.y * 64, col0 = blockIdx.x * 64;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[4][4] = {};
    for (int k0 = 0; k0 < k; k0 += 16) {
        for (int i = threadIdx.x; i < 16 * 64; i += 256) {
            const int kk = i % 16, row = i / 16;
            const bool inside = row0 + row < m && k0 + kk < k;
            tile_a[kk][row] = inside ? a[(size_t)(row0 + row) * k + k0 + kk] : 0.0f;
        }
        for (int i = threadIdx.x; i < 16 * 64; i += 256) {
            const int kk = i / 64, col = i % 64;
            const bool inside = k0 + kk < k && col0 + col < n;
            tile_b[kk][col] = inside ? b[(size_t)(k0 + kk) * n + col0 + col] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < 16; ++kk) {
            const float4 x = *reinterpret_cast<const float4*>(&tile_a[kk][ty * 4]);
            const float4 y = *reinterpret_cast<const float4*>(&tile_b[kk][tx * 4]);
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(xs[i], ys[j], sum[i][j]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const int row = row0 + ty * 4 + i, col = col0 + tx * 4 + j;
            if (row < m && col < n) c[(size_t)row * n + col] = sum[i][j];
        }
}
