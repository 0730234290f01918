// Each wrapper of kernels/ptx.cuh on one record per lane: eight words in (ten for a product), four
// words out. golden.rs makes the records. ptx.sh makes the PTX beside this file of it.

#include "../../../kernels/ptx.cuh"

namespace golden {

struct Scalars {
    uint32_t words[8];
};

struct Fragments {
    uint32_t a[4];
    uint32_t b[2];
    uint32_t c[4];
};

struct Result {
    uint32_t words[4];
};

__device__ int lane() { return blockIdx.x * 32 + threadIdx.x; }

template <typename Product>
__device__ void multiply(const Fragments* in, Result* out, Product product) {
    const Fragments& x = in[lane()];
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(x.c[i]);
    product(c[0], c[1], c[2], c[3], x.a, x.b);
    for (int i = 0; i < 4; ++i) out[lane()].words[i] = __float_as_uint(c[i]);
}

template <bool kSigned>
__device__ void multiply_bytes(const Fragments* in, Result* out) {
    const Fragments& x = in[lane()];
    int32_t c[4];
    for (int i = 0; i < 4; ++i) c[i] = int32_t(x.c[i]);
    ptx::mma_i8<kSigned>(c, x.a, x.b);
    for (int i = 0; i < 4; ++i) out[lane()].words[i] = uint32_t(c[i]);
}

// The first word says whether to copy at all; the record's last 16 bytes are copied.
template <int kBytes>
__device__ void copy(const Scalars* in, Result* out) {
    __shared__ __align__(16) Result staged[32];
    Result& mine = staged[threadIdx.x];
    mine = {{~0u, ~0u, ~0u, ~0u}};
    for (int at = 0; at < 4; at += kBytes / 4) {
        ptx::copy_async<kBytes>(&mine.words[at], &in[lane()].words[4 + at], in[lane()].words[0] & 1);
    }
    ptx::commit();
    ptx::wait<0>();
    out[lane()] = mine;
}

}  // namespace golden

using namespace golden;

#define WRAPPER(name, Record) \
    extern "C" __global__ void __launch_bounds__(32) name(const Record* __restrict__ in, Result* __restrict__ out)

WRAPPER(copy_async_4, Scalars) { copy<4>(in, out); }
WRAPPER(copy_async_8, Scalars) { copy<8>(in, out); }
WRAPPER(copy_async_16, Scalars) { copy<16>(in, out); }

WRAPPER(convert, Scalars) {
    const uint32_t(&x)[8] = in[lane()].words;
    const float first = __uint_as_float(x[0]), second = __uint_as_float(x[1]);
    out[lane()].words[0] = ptx::narrow_f16(first) | uint32_t(ptx::narrow_bf16(first)) << 16;
    out[lane()].words[1] = ptx::narrow_f16x2(first, second);
    out[lane()].words[2] = ptx::narrow_bf16x2(first, second);
    out[lane()].words[3] = __float_as_uint(ptx::widen_f16(uint16_t(x[2])));
}

WRAPPER(halves, Scalars) {
    const uint32_t(&x)[8] = in[lane()].words;
    out[lane()].words[0] = ptx::lower_halves(x[0], x[1]);
    out[lane()].words[1] = ptx::upper_halves(x[0], x[1]);
}

WRAPPER(mma_f16, Fragments) {
    multiply(in, out, [](float& c0, float& c1, float& c2, float& c3, const uint32_t(&a)[4],
                         const uint32_t(&b)[2]) { ptx::mma_f16(c0, c1, c2, c3, a, b); });
}

WRAPPER(mma_s8, Fragments) { multiply_bytes<true>(in, out); }
WRAPPER(mma_u8, Fragments) { multiply_bytes<false>(in, out); }

#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
WRAPPER(round_tf32, Scalars) {
    for (int i = 0; i < 4; ++i) out[lane()].words[i] = ptx::round_tf32(__uint_as_float(in[lane()].words[i]));
}

WRAPPER(mma_tf32, Fragments) {
    multiply(in, out, [](float& c0, float& c1, float& c2, float& c3, const uint32_t(&a)[4],
                         const uint32_t(&b)[2]) { ptx::mma_tf32(c0, c1, c2, c3, a, b); });
}

WRAPPER(mma_bf16, Fragments) {
    multiply(in, out, [](float& c0, float& c1, float& c2, float& c3, const uint32_t(&a)[4],
                         const uint32_t(&b)[2]) { ptx::mma_bf16(c0, c1, c2, c3, a, b); });
}
#endif
