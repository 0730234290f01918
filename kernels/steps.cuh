// Elementwise steps, on a few values at a time.
#pragma once

#include "params.h"

// PyTorch's formulas, in forms that keep their relative accuracy in the tails. NaN passes through
// each: comparisons are written so that it falls to a branch that returns it (fminf and fmaxf would
// drop it).
namespace activation {

__device__ inline float clip(float x, float lo, float hi) { return x < lo ? lo : (x > hi ? hi : x); }

__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    const float r = 1.f / (1.f + e);
    return x >= 0.f ? r : e * r;
}

__device__ inline float gelu_tanh(float x) {
    // (1 + tanh(u)) / 2 is sigmoid(2u), without the cancellation.
    const float u = 0.79788456080286536f * fmaf(0.044715f * x * x, x, x);
    return x * sigmoid(2.f * u);
}

__device__ inline float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

__device__ inline float mish(float x) {
    // tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2).
    const float e = expf(x);
    const float n = e * (e + 2.f);
    return x > 20.f ? x : x * (n / (n + 2.f));
}

}  // namespace activation

template <int kCount, class Function>
__device__ void each(float (&v)[kCount], Function function) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = function(v[i]);
}

// `at` knows where the values are: at.per_channel(to, array) gives what an array holds for their
// channels, at.second(to) the second tensor's values, residual or gate.
template <int kCount, class At>
__device__ void run_step(const pw_step& step, float (&v)[kCount], const At& at) {
    const float a = step.a, b = step.b;
    switch (step.op) {
        case PW_OP_AFFINE: {
            float scale[kCount], shift[kCount];
            at.per_channel(scale, step.first);
            at.per_channel(shift, step.second);
#pragma unroll
            for (int i = 0; i < kCount; ++i) v[i] = fmaf(v[i], scale[i], shift[i]);
            break;
        }
        case PW_OP_PRELU: {
            float slope[kCount];
            at.per_channel(slope, step.first);
#pragma unroll
            for (int i = 0; i < kCount; ++i) v[i] = v[i] >= 0.f ? v[i] : slope[i] * v[i];
            break;
        }
        case PW_OP_RESIDUAL:
        case PW_OP_GATE: {
            float other[kCount];
            at.second(other);
            const bool gate = step.op == PW_OP_GATE;
#pragma unroll
            for (int i = 0; i < kCount; ++i) v[i] = gate ? v[i] * other[i] : v[i] + other[i];
            break;
        }
        case PW_OP_CLIP: each(v, [=](float x) { return activation::clip(x, a, b); }); break;
        case PW_OP_LEAKY_RELU: each(v, [=](float x) { return x >= 0.f ? x : a * x; }); break;
        case PW_OP_ELU: each(v, [=](float x) { return x > 0.f ? x : a * expm1f(x); }); break;
        case PW_OP_SIGMOID: each(v, [](float x) { return activation::sigmoid(x); }); break;
        case PW_OP_TANH: each(v, [](float x) { return tanhf(x); }); break;
        case PW_OP_SILU: each(v, [](float x) { return x * activation::sigmoid(x); }); break;
        case PW_OP_GELU: each(v, [](float x) { return x * normcdff(x); }); break;
        case PW_OP_GELU_TANH: each(v, [](float x) { return activation::gelu_tanh(x); }); break;
        case PW_OP_HARD_SIGMOID:
            each(v, [](float x) { return activation::clip(x + 3.f, 0.f, 6.f) / 6.f; });
            break;
        case PW_OP_HARD_SWISH:
            each(v, [](float x) { return x * (activation::clip(x + 3.f, 0.f, 6.f) / 6.f); });
            break;
        case PW_OP_SOFTPLUS: each(v, [](float x) { return activation::softplus(x); }); break;
        case PW_OP_MISH: each(v, [](float x) { return activation::mish(x); }); break;
    }
}

template <int kInline, int kCount, class At>
__device__ void run_steps(const pw_step (&steps)[kInline], const pw_step* more, uint32_t count,
                          float (&v)[kCount], const At& at) {
#pragma unroll 1
    for (uint32_t i = 0; i < count; ++i) {
        pw_step step;
        if (i < kInline) {
            step = steps[i];
        } else {
            step = more[i - kInline];
        }
        run_step(step, v, at);
    }
}
