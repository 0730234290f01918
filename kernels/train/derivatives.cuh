// The derivatives of the activations: PyTorch's choice where there is none. A NaN passes a gradient on where
// PyTorch's comparisons let it, and an infinity is NaN where its formula has 0 times it.
#pragma once

#include "../steps.cuh"

namespace activation {

__device__ inline float slope(const pw_stage& stage, float x) {
    const float a = stage.a, b = stage.b;
    switch (stage.op) {
        case PW_OP_CLIP: return x <= a || x >= b ? 0.f : 1.f;
        case PW_OP_LEAKY_RELU: return x > 0.f ? 1.f : a;
        case PW_OP_ELU: return x <= 0.f ? a * expf(x) : 1.f;
        case PW_OP_SIGMOID: return sigmoid(x) * sigmoid(-x);
        case PW_OP_TANH: return 4.f * sigmoid(2.f * x) * sigmoid(-2.f * x);
        case PW_OP_SILU: return sigmoid(x) * fmaf(x, sigmoid(-x), 1.f);
        case PW_OP_GELU:
            // The density of the normal distribution.
            return normcdff(x) + x * (0.39894228040143268f * expf(-0.5f * x * x));
        case PW_OP_GELU_TANH: {
            // Beyond 15 it is 0 or 1, and what follows would overflow.
            const float infinite = x - x;
            x = x > 15.f ? 15.f : (x < -15.f ? -15.f : x);
            const float u = 0.79788456080286536f * fmaf(0.044715f * x * x, x, x);
            const float du = 0.79788456080286536f * fmaf(3.f * 0.044715f * x, x, 1.f);
            // 1 - tanh(u)² is 4 sigmoid(2u) sigmoid(-2u).
            return sigmoid(2.f * u) * fmaf(2.f * x * du, sigmoid(-2.f * u), 1.f) + infinite;
        }
        case PW_OP_HARD_SIGMOID: return x <= -3.f || x >= 3.f ? 0.f : 1.f / 6.f;
        case PW_OP_HARD_SWISH: return x <= -3.f ? 0.f : (x < 3.f ? x / 3.f + 0.5f : 1.f);
        case PW_OP_SOFTPLUS: return x > 20.f ? 1.f : sigmoid(x);
        case PW_OP_MISH: {
            if (x > 20.f) return 1.f + (x - x);
            const float e = expf(x);
            const float n = e * (e + 2.f);
            const float tanh = n / (n + 2.f);
            return fmaf(x * sigmoid(x), 4.f * (n + 1.f) / ((n + 2.f) * (n + 2.f)), tanh);
        }
        default: return 1.f;
    }
}

}  // namespace activation
