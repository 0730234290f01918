// c[m][n] = a[m][k] * b[k][n] in bf16 with f32 sums: cp.async double buffer, ldmatrix, mma.
#include <cuda_bf16.h>
#include <stdint.h>

__device__ __forceinline__ void copy16(uint32_t dst, const void* src, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes));
}

// k and n are multiples of 8. 64x64 tiles, 32 deep, four warps of 32x32.
extern "C" __global__ void __launch_bounds__(128)
gemm_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, __nv_bfloat16* c, int m, int n, int k) {
    extern __shared__ __align__(16) unsigned char memory[];
    constexpr int pitch_a = 40, pitch_b = 72, stage = 64 * pitch_a + 32 * pitch_b;
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(memory);
    const int row0 = blockIdx.y * 64, col0 = blockIdx.x * 64;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int wr = warp / 2 * 32, wc = warp % 2 * 32;

    auto fill = [&](int buffer, int k0) {
        const uint32_t to = base + buffer * stage * 2;
        for (int i = threadIdx.x; i < 64 * 4; i += 128) {
            const int row = i / 4, kk = i % 4 * 8;
            const bool inside = row0 + row < m && k0 + kk < k;
            copy16(to + (row * pitch_a + kk) * 2,
                   inside ? a + (size_t)(row0 + row) * k + k0 + kk : a, inside ? 16 : 0);
        }
        for (int i = threadIdx.x; i < 32 * 8; i += 128) {
            const int kk = i / 8, col = i % 8 * 8;
            const bool inside = k0 + kk < k && col0 + col < n;
            copy16(to + (64 * pitch_a + kk * pitch_b + col) * 2,
                   inside ? b + (size_t)(k0 + kk) * n + col0 + col : b, inside ? 16 : 0);
        }
        asm volatile("cp.async.commit_group;");
    };

    float sum[2][4][4] = {};
    const int steps = (k + 31) / 32;
    fill(0, 0);
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            fill((step + 1) % 2, (step + 1) * 32);
            asm volatile("cp.async.wait_group 1;");
        } else {
            asm volatile("cp.async.wait_group 0;");
        }
        __syncthreads();
        const uint32_t from = base + step % 2 * stage * 2;
#pragma unroll
        for (int kk = 0; kk < 32; kk += 16) {
            uint32_t x[2][4], y[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t p = from + ((wr + i * 16 + lane % 16) * pitch_a + kk + lane / 16 * 8) * 2;
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3]) : "r"(p));
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t p = from + (64 * pitch_a + (kk + lane % 16) * pitch_b + wc + j * 16 + lane / 16 * 8) * 2;
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(y[j][0]), "=r"(y[j][1]), "=r"(y[j][2]), "=r"(y[j][3]) : "r"(p));
            }
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                        : "+f"(sum[i][j][0]), "+f"(sum[i][j][1]), "+f"(sum[i][j][2]), "+f"(sum[i][j][3])
                        : "r"(x[i][0]), "r"(x[i][1]), "r"(x[i][2]), "r"(x[i][3]),
                          "r"(y[j / 2][j % 2 * 2]), "r"(y[j / 2][j % 2 * 2 + 1]));
        }
        __syncthreads();
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
            for (int half = 0; half < 2; ++half) {
                const int row = row0 + wr + i * 16 + lane / 4 + half * 8;
                const int col = col0 + wc + j * 8 + lane % 4 * 2;
                if (row < m && col < n)
                    *reinterpret_cast<__nv_bfloat162*>(c + (size_t)row * n + col) =
                        __floats2bfloat162_rn(sum[i][j][half * 2], sum[i][j][half * 2 + 1]);
            }
}
