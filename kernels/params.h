/* All that crosses from Rust to CUDA is defined here and nowhere else: bindgen makes the Rust side
 * of it. Plain C; strides count elements, may be negative or 0, and are 64-bit throughout.
 *
 * Names: the convolution is `groups` products dst[row, position] = sum over depth of
 * weight[row, depth] * src[depth, position]. `rows` and `depth` count the output and input
 * channels of ONE group; a position is one element of a plane of one sample. */
#ifndef POINTWISE_PARAMS_H
#define POINTWISE_PARAMS_H

#include <stdint.h>

/* Positions are walked over at most batch + 3 spatial axes. */
#define PW_MAX_AXES 4
/* Steps that travel inside the launch parameters; longer programs continue in memory. */
#define PW_INLINE_STEPS 8
/* Rows of packed arrays are padded to a multiple of this. */
#define PW_ROW_ALIGN 4

/* One elementwise step on the accumulators. */
enum pw_op {
    PW_OP_AFFINE,      /* x * first[row] + second[row] */
    PW_OP_PRELU,       /* x >= 0 ? x : first[row] * x */
    PW_OP_RESIDUAL,    /* x + residual */
    PW_OP_CLIP,        /* min(max(x, a), b), ReLU and ReLU6 too */
    PW_OP_LEAKY_RELU,  /* x >= 0 ? x : a * x */
    PW_OP_ELU,         /* x > 0 ? x : a * (exp(x) - 1) */
    PW_OP_SIGMOID,
    PW_OP_TANH,
    PW_OP_SILU,
    PW_OP_GELU,
    PW_OP_GELU_TANH,
    PW_OP_HARD_SIGMOID,
    PW_OP_HARD_SWISH,
    PW_OP_SOFTPLUS,
    PW_OP_MISH
};

struct pw_step {
    enum pw_op op;
    float a;
    float b;
    uint32_t reserved;
    const float *first;  /* [groups][row_pitch] */
    const float *second; /* [groups][row_pitch] */
};

/* How src is read into shared memory; the planner promises what the name says. */
enum pw_read {
    PW_READ_POSITIONS,      /* neighbouring threads take neighbouring positions, one float each */
    PW_READ_CHANNELS,       /* neighbouring threads take neighbouring channels, one float each */
    PW_READ_POSITIONS_VEC4, /* 4 positions at once: axes[0] has src stride 1 and an extent that 4
                               divides, 4 divides all other strides, src is 16-byte aligned */
    PW_READ_CHANNELS_VEC4   /* 4 channels at once: src_channel is 1, 4 divides depth and all other
                               strides, src is 16-byte aligned */
};

/* Which code finishes a tile. The first two are short cuts for the programs that networks use most:
 * they need PW_FLAG_DST_VEC4 (and PW_FLAG_RESIDUAL_VEC4), and no maps. */
enum pw_epilogue {
    PW_EPILOGUE_STEPS,        /* run the list of steps */
    PW_EPILOGUE_CLIP,         /* clip to [clip_lo, clip_hi], which may be infinite */
    PW_EPILOGUE_RESIDUAL_CLIP /* add the residual, then clip */
};

/* 128-bit access along the axis that the kernel's layout makes the fast one (positions for `nchw`,
 * channels for `nhwc`); the conditions are those of the vector reads of src. */
enum pw_flags {
    PW_FLAG_DST_VEC4 = 1,
    PW_FLAG_RESIDUAL_VEC4 = 2
};

struct pw_axis {
    int64_t extent;
    int64_t src;      /* strides of this axis */
    int64_t dst;
    int64_t residual;
};

struct pw_fprop {
    struct pw_axis axes[PW_MAX_AXES]; /* innermost first */
    int64_t positions;                /* product of the extents */
    int64_t src_channel;              /* strides of the channel axis */
    int64_t dst_channel;
    int64_t residual_channel;
    const float *src;
    const float *weight; /* [groups][depth][row_pitch], 16-byte aligned */
    const float *bias;   /* [groups][row_pitch], 16-byte aligned */
    float *dst;
    const float *residual;
    const uint32_t *dst_map;      /* row of all groups -> channel of dst; null where equal */
    const uint32_t *residual_map; /* row of all groups -> channel of the residual */
    const struct pw_step *more_steps; /* those beyond PW_INLINE_STEPS */
    float *partial;                   /* [splits][tiles][sums of a tile], where splits > 1 */
    uint32_t *arrived;                /* [tiles], all 0 between launches, where splits > 1 */
    uint32_t groups;
    uint32_t rows;
    uint32_t depth;
    uint32_t row_pitch; /* rows, padded to a multiple of PW_ROW_ALIGN */
    uint32_t axis_count;
    uint32_t step_count;
    enum pw_read read;
    enum pw_epilogue epilogue;
    uint32_t flags; /* of enum pw_flags */
    float clip_lo;
    float clip_hi;
    uint32_t splits; /* blocks that share the depth of a tile, each a range of slabs; 1: one has all */
    struct pw_step steps[PW_INLINE_STEPS];
};

#ifdef __cplusplus
static_assert(sizeof(struct pw_step) == 32, "pw_step is laid out as Rust believes");
static_assert(sizeof(struct pw_axis) == 32, "pw_axis is laid out as Rust believes");
static_assert(sizeof(struct pw_fprop) == 544, "pw_fprop is laid out as Rust believes");
#endif

#endif
