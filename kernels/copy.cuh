// Channels that pass through: a copy between any two layouts, whole lines on both sides.
#pragma once

#include "elements.cuh"
#include "params.h"
#include "tiles.cuh"

constexpr int kCopyPositions = 64;
constexpr int kCopyChannels = 32;
constexpr int kCopyThreads = 256;

template <class T>
struct CopyShared {
    // One word more per row than there are positions: reads and writes across then meet all banks.
    T values[kCopyChannels][kCopyPositions + 4 / sizeof(T)];
    PositionTable<kCopyPositions> at;
};

// Calls move(channel, column) for this thread's part of a tile; neighbours follow one axis.
template <class Move>
__device__ void walk_tile(bool channels_fast, int channels, int columns, Move move) {
    const int t = threadIdx.x;
    const int channel = channels_fast ? t % kCopyChannels : t / kCopyPositions;
    const int column = channels_fast ? t / kCopyChannels : t % kCopyPositions;
    const int deeper = channels_fast ? kCopyChannels : kCopyThreads / kCopyPositions;
    const int across = channels_fast ? kCopyThreads / kCopyChannels : kCopyPositions;
#pragma unroll 8
    for (int i = 0; i < kCopyChannels * kCopyPositions / kCopyThreads; ++i) {
        const int c = channels_fast ? channel : channel + i * deeper;
        const int p = channels_fast ? column + i * across : column;
        if (c < channels && p < columns) move(c, p);
    }
}

template <class T>
__device__ void copy_channels(const pw_fprop& p, CopyShared<T>& shared, int64_t block) {
    const pw_source& source = p.sources[0];
    const int64_t channel_tiles = (p.rows + kCopyChannels - 1) / kCopyChannels;
    const int64_t first = block / channel_tiles * kCopyPositions;
    const int64_t channel = block % channel_tiles * kCopyChannels;
    if (first >= p.positions) return;
    fill_positions<true>(shared.at, p, source, first, kCopyThreads);
    __syncthreads();
    const int columns = int(min(int64_t(kCopyPositions), p.positions - first));
    const int channels = int(min(int64_t(kCopyChannels), p.rows - channel));
    const T* const from = static_cast<const T*>(source.data);
    T* const to = static_cast<T*>(p.dst);
    walk_tile(reads_channels(source), channels, columns, [&](int c, int column) {
        shared.values[c][column] =
            load_one(from + (channel + c) * source.channel + shared.at.src[column]);
    });
    __syncthreads();
    walk_tile(p.flags & PW_FLAG_CHANNELS_FAST, channels, columns, [&](int c, int column) {
        to[(channel + c) * p.dst_channel + shared.at.dst[column]] = shared.values[c][column];
    });
}
