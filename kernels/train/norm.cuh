// A layer norm in training: the sums over the rows of each position that its statistics and its gradient
// are made of. What is done with them, row by row, is the sweep's.
//
// A block has PW_SWEEP_POSITIONS positions, a thread every so many rows of one. It sums in f32, and
// these sums are added in f64 and in a fixed order.
#pragma once

#include "sweep.cuh"

constexpr int kNormSweepLanes = PW_SWEEP_THREADS / PW_SWEEP_POSITIONS;

struct NormSweepShared {
    // Rows four banks apart, so that lanes side by side meet all of them.
    float sums[2][kNormSweepLanes][PW_SWEEP_POSITIONS + 4];
};

class NormSweep : Stages {
public:
    __device__ NormSweep(const pw_sweep& p, NormSweepShared& shared, uint32_t block)
        : Stages(p), shared(shared) {
        const int t = threadIdx.x;
        const bool wide = p.flags & PW_SWEEP_CHANNELS_FAST;
        column = wide ? t / kNormSweepLanes : t % PW_SWEEP_POSITIONS;
        lane = wide ? t % kNormSweepLanes : t / PW_SWEEP_POSITIONS;
        q = block * PW_SWEEP_POSITIONS + column;
        exists = q < p.positions;
    }

    // Without a gradient: statistics of what reaches the stage behind the last one. With one: the means
    // that the gradient by what reaches first_stage takes away.
    __device__ void run() {
        if (p.d.data == nullptr) {
            moments();
        } else {
            sums();
        }
    }

private:
    NormSweepShared& shared;
    int column, lane;
    uint32_t q;
    bool exists;

    __device__ void moments() {
        float about = 0.f, squares = 0.f, off = 0.f;
        const double count = double(p.rows);
        double rest = 0.0;
        // First the mean, as well as f32 knows it, then what it is off, and deviations from it.
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
            about = float(rest / count);
            squares = off = 0.f;
            if (exists) {
                for (row = lane; row < p.rows; row += kNormSweepLanes) {
                    const RowAt input = RowAt::of(p.inputs, row, nullptr);
                    const float x = value(input, q, p.stage_count) - about;
                    off += x;
                    squares += x * x;
                }
            }
            share(off, squares);
            rest = total(0);
        }
        if (!exists || lane != 0) return;
        const double mean = double(about) + rest / count;
        double deviations = total(1) - rest * rest / count;
        if (deviations < 0.0) deviations = 0.0;
        if (p.of_norm == nullptr) {
            p.sums[2 * int64_t(q)] = mean;
            p.sums[2 * int64_t(q) + 1] = deviations;
            return;
        }
        const float high = float(mean);
        const float inv = float(1.0 / sqrt(deviations / count + double(p.stages[p.stage_count].a)));
        float* const to = p.of_norm + 3 * int64_t(q);
        to[0] = high;
        to[1] = inv;
        to[2] = -float(mean - double(high)) * inv;
    }

    __device__ void sums() {
        float ones = 0.f, products = 0.f;
        const auto nothing = [](const pw_stage&, float, float) {};
        if (exists) {
            for (row = lane; row < p.rows; row += kNormSweepLanes) {
                const RowAt input = RowAt::of(p.inputs, row, nullptr), d_at(p.d, row, p.map);
                const float x = get(input, q);
                float d = get(d_at, q);
                for (uint32_t i = p.stage_count; i-- > p.first_stage;) {
                    const float reaches = prefix(x, q, i);
                    if (i > p.first_stage) {
                        d = through<false>(i, reaches, d, q, nothing);
                        continue;
                    }
                    const pw_stage& norm = p.stages[i];
                    if (norm.second != nullptr) d *= __ldg(norm.second + row);
                    ones += d;
                    products += d * normalised(norm, reaches, q);
                }
            }
        }
        share(ones, products);
        if (!exists || lane != 0) return;
        if (p.of_norm == nullptr) {
            p.sums[q] = total(0);
            p.sums[int64_t(p.positions) + q] = total(1);
            return;
        }
        p.of_norm[2 * int64_t(q)] = float(total(0) / double(p.rows));
        p.of_norm[2 * int64_t(q) + 1] = float(total(1) / double(p.rows));
    }

    // Every thread of the block calls it.
    __device__ void share(float first, float second) {
        __syncthreads();
        shared.sums[0][lane][column] = first;
        shared.sums[1][lane][column] = second;
        __syncthreads();
    }

    // Of the threads that have this one's position.
    __device__ double total(int which) const {
        double sum = 0.0;
        for (int i = 0; i < kNormSweepLanes; ++i) sum += double(shared.sums[which][i][column]);
        return sum;
    }
};
