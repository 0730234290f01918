/* All that crosses from Rust to CUDA is defined here and nowhere else: bindgen makes the Rust side
 * of it. Plain C; strides count elements, may be negative or 0, and are 64-bit throughout.
 *
 * A kernel's tensors hold what its name says: f32, f16 or bf16. All that is per channel is f32.
 *
 * Names: the convolution is `groups` products dst[row, position] = sum over depth of
 * weight[row, depth] * src[depth, position]. `rows` and `depth` count the output and input
 * channels of ONE group; a position is one element of a plane of one sample. src is the
 * concatenation of its sources along the channels of all groups. */
#ifndef POINTWISE_PARAMS_H
#define POINTWISE_PARAMS_H

#include <stdint.h>

/* Positions are walked over at most batch + 3 spatial axes. */
#define PW_MAX_AXES 4
/* Tensors that src may be the concatenation of. */
#define PW_MAX_SOURCES 16
/* Steps that travel inside the launch parameters; longer programs continue in memory. */
#define PW_INLINE_STEPS 8
#define PW_INLINE_SOURCE_STEPS 4
/* Rows of packed arrays are padded to a multiple of this, for f32 and for 16 bits. */
#define PW_ROW_ALIGN 4
#define PW_ROW_ALIGN_16BIT 8

/* One elementwise step: on the accumulators, or on src while it is read. */
enum pw_op {
    PW_OP_AFFINE,      /* x * first[channel] + second[channel] */
    PW_OP_PRELU,       /* x >= 0 ? x : first[channel] * x */
    PW_OP_RESIDUAL,    /* x + residual, on the accumulators */
    PW_OP_GATE,        /* x * gate, on src */
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
    PW_OP_MISH,
    PW_OP_LAYER_NORM   /* in training; elsewhere it is no step */
};

struct pw_step {
    enum pw_op op;
    float a;
    float b;
    uint32_t reserved;
    const float *first;  /* [groups][row_pitch]; of a step on src [groups * depth] */
    const float *second;
};

/* How a source is read into shared memory; the planner promises what the name says. The lowest bit
 * says along which axis. VEC8 is for tensor cores on 16 bits, VEC16 for those on bytes. */
enum pw_read {
    PW_READ_POSITIONS,      /* neighbouring threads take neighbouring positions, one element each */
    PW_READ_CHANNELS,       /* neighbouring threads take neighbouring channels, one element each */
    PW_READ_POSITIONS_VEC4, /* 4 positions at once: axes[0] has stride 1 and an extent that 4
                               divides, 4 divides all other strides, data is aligned to 4 elements */
    PW_READ_CHANNELS_VEC4,  /* 4 channels at once: channel is 1, 4 divides depth, begin, end and all
                               other strides, data is aligned to 4 elements */
    PW_READ_POSITIONS_VEC8, /* the same with 8 in place of 4 */
    PW_READ_CHANNELS_VEC8,
    PW_READ_POSITIONS_VEC16,
    PW_READ_CHANNELS_VEC16
};

/* Which code finishes a tile. The first two are short cuts for the programs that networks use most:
 * they need PW_FLAG_DST_VEC4 (and PW_FLAG_RESIDUAL_VEC4), and no maps. */
enum pw_epilogue {
    PW_EPILOGUE_STEPS,        /* run the list of steps */
    PW_EPILOGUE_CLIP,         /* clip to [clip_lo, clip_hi], which may be infinite */
    PW_EPILOGUE_RESIDUAL_CLIP /* add the residual, then clip */
};

/* Access to 4 elements at once along the axis that the kernel's layout makes the fast one (positions
 * for `nchw`, channels for `nhwc`), or to 8 too where both flags are set; the conditions are those of
 * the vector reads of a source. */
enum pw_flags {
    PW_FLAG_DST_VEC4 = 1,
    PW_FLAG_RESIDUAL_VEC4 = 2,
    PW_FLAG_CHANNELS_FAST = 4, /* for kernels which have no layout in their name: norm, copy, bytes */
    PW_FLAG_DST_VEC8 = 8,
    PW_FLAG_RESIDUAL_VEC8 = 16,
    PW_FLAG_DST_F32 = 32 /* dst is f32 whatever the kernel's dtype: what is normalised, or the values of training */
};

struct pw_axis {
    int64_t extent;
    int64_t dst;      /* strides of this axis; those of src are its sources' */
    int64_t residual;
    int64_t gate;
    int64_t moments;
};

/* One of the tensors that src is the concatenation of. */
struct pw_source {
    const void *data;
    int64_t channel;           /* strides of the channel axis and of the axes of the positions */
    int64_t axes[PW_MAX_AXES];
    uint32_t begin;            /* which of src's channels it has */
    uint32_t end;
    enum pw_read read;
    uint32_t reserved;
};

/* Layer norm. Moments are a mean and a sum of squared deviations from it. */
struct pw_norm {
    const float *gamma; /* [row_pitch] */
    const float *beta;
    double *moments;    /* pairs; their strides count pairs */
    double values;      /* behind the moments of a sample */
    float eps;
    uint32_t held;      /* whether the launch brings room for the channels of a block's positions */
};

/* Channels of a turn of the norm kernel, the bytes of a block's values of them, and what it has beside. */
#define PW_NORM_TURN 32
#define PW_NORM_TURN_BYTES 4096
#define PW_NORM_SHARED_BYTES 2176

/* What the norm kernel does with each position of dst. */
enum pw_norm_job {
    PW_NORM_CHANNELS, /* normalise with the moments of its channels, then run the steps */
    PW_NORM_MOMENTS,  /* write the moments of its channels */
    PW_NORM_APPLY     /* normalise with the moments that are there, then run the steps */
};

/* Every kernel of the forward pass takes it; of the groups' weights, the norm kernel knows nothing
 * (it has one group of all rows, and reads f32 from the first source, which may be dst), and the copy
 * kernel copies `rows` channels of the first source; so do those that quantise it. */
struct pw_fprop {
    struct pw_axis axes[PW_MAX_AXES]; /* innermost first */
    struct pw_source sources[PW_MAX_SOURCES];
    int64_t positions;                /* product of the extents */
    int64_t dst_channel;              /* strides of the channel axis */
    int64_t residual_channel;
    int64_t gate_channel;
    const void *weight; /* [groups][depth][row_pitch], 16-byte aligned */
    const float *bias;  /* [groups][row_pitch], 16-byte aligned */
    const float *scale; /* as bias, of 16-bit kernels: sum * scale + bias */
    void *dst;
    const void *residual;
    const void *gate;
    const uint32_t *dst_map;      /* row of all groups -> channel of dst; null where equal */
    const uint32_t *residual_map; /* row of all groups -> channel of the residual */
    const struct pw_step *more_steps; /* those beyond PW_INLINE_STEPS */
    const struct pw_step *more_source_steps;
    float *partial;                   /* [splits][tiles][sums of a tile], where splits > 1 */
    uint32_t *arrived;                /* [tiles], all 0 between launches, where splits > 1 */
    uint32_t groups;
    uint32_t rows;
    uint32_t depth;
    uint32_t row_pitch; /* rows, padded */
    uint32_t axis_count;
    uint32_t source_count;
    uint32_t step_count;
    uint32_t source_step_count;
    enum pw_epilogue epilogue;
    uint32_t flags; /* of enum pw_flags */
    float clip_lo;
    float clip_hi;
    uint32_t splits; /* blocks that share the depth of a tile, each a range of slabs; 1: one has all */
    enum pw_norm_job norm_job;
    struct pw_norm norm;
    struct pw_step steps[PW_INLINE_STEPS];
    struct pw_step source_steps[PW_INLINE_SOURCE_STEPS];
};

/* Moments of neighbours, merged in the order in which they lie: 1024 pairs give one. */
struct pw_merge {
    const double *from; /* [samples][items] */
    double *to;         /* [samples][ceil(items / PW_MERGED)] */
    int64_t items;
    int64_t unit;       /* values behind each item of a sample but the last */
    int64_t values;     /* of a sample */
};
#define PW_MERGED 1024

/* Layers of 8-bit integers, and of floats of 8 bits. */

/* What a tensor holds; PW_BYTES are integers. */
enum pw_element { PW_BYTES, PW_F32, PW_F16, PW_BF16, PW_E4M3, PW_E5M2 };

/* What weight and src hold. */
enum pw_operands { PW_I8_U8, PW_I8_I8, PW_E4M3_E4M3, PW_E4M3_E5M2, PW_E5M2_E4M3, PW_E5M2_E5M2 };

/* Scale and zero point of the values at a position. */
struct pw_quantization {
    float scale;
    int32_t zero_point;
};

/* With integers of src: x = (sum(w * src) + offset) * scale. With integers that were real numbers, of
 * which each position has a quantisation (s, z): x = (sum(w * src) - z * offset) * (s * scale) + shift.
 * With floats: x = sum(w * src) * scale + shift. Then clipped to `before`, plus the residual, clipped to
 * [lo, hi]; as an integer, rounded, plus the zero point. Each operation rounds once.
 *
 * Of `fprop`, the tensors, their axes and the letters count; src has one source. Its gate, if there is
 * one, is the quantisation of each position. */
struct pw_bytes {
    struct pw_fprop fprop; /* weight: [groups * rows][depth_pitch], 16-byte aligned, its padding 0 */
    const int32_t *offset; /* [groups * rows], and so are the next two; 16-byte aligned; not read with floats */
    const float *scale;
    const float *shift;
    enum pw_element dst_type;
    enum pw_element residual_type;
    uint32_t depth_pitch; /* depth, padded to a multiple of 16 */
    enum pw_operands operands;
    float before_lo;
    float before_hi;
    float lo;
    float hi;
    int32_t zero_point;          /* of dst's bytes */
    uint32_t residual_flip;      /* 128 where bytes of the residual are i8: makes them unsigned */
    int32_t residual_zero_point; /* of the unsigned byte */
    float residual_scale;
};

/* Training. Tensors that such a launch reads or writes, of `rows` rows (the channels that a chain of
 * stages stands at) at all positions; positions are numbered sample by sample, and fewer than 2^31. */

/* Tensors that rows may be the concatenation of. */
#define PW_MAX_PARTS 16
/* Stages before or after the convolution. */
#define PW_MAX_STAGES 16
/* Of these, the ones whose parameters have gradients. */
#define PW_MAX_SUMMED 4
/* pw_stage.sums of one whose parameters have none. */
#define PW_NOT_SUMMED 255

/* A block's threads, and its rows where neighbouring threads take rows, and where positions. */
#define PW_SWEEP_THREADS 256
#define PW_SWEEP_WIDE 32
#define PW_SWEEP_NARROW 8
/* Positions of a block that sums over all rows of each. */
#define PW_SWEEP_POSITIONS 32
/* Threads that add up one sum. */
#define PW_SUM_LANES 32
/* The gradient by the weight: a block's threads, its rows and columns, and the positions that it
 * multiplies at a time. */
#define PW_WGRAD_THREADS 256
#define PW_WGRAD_TILE 64
#define PW_WGRAD_SLAB 16

struct pw_part {
    void *data;
    int64_t channel;            /* strides of the channel axis and of the axes of the positions */
    int64_t axes[PW_MAX_AXES];
    uint32_t begin;             /* the rows that it has */
    uint32_t end;
    enum pw_element element;      /* PW_F32, PW_F16 or PW_BF16 */
    uint32_t reserved;
};

/* One stage, its arrays per row. PW_OP_AFFINE is (x - first) * second + third, PW_OP_PRELU has slopes
 * `second`. PW_OP_LAYER_NORM is ((x - mean) * inv + rest) * second + third, without the last two where
 * they are null; per norm_unit positions `first` has mean, inv and rest, `mean_d` the two numbers that
 * others have in mean_d and along; a is its eps. */
struct pw_stage {
    enum pw_op op;
    float a;
    float b;
    uint32_t sums;       /* which pair of sums is its: of d, and of d * (x - first) (PReLU: d * x, x < 0;
                            layer norm: d * what it normalises x to) */
    const float *first;
    const float *second;
    const float *third;
    const float *mean_d; /* backward through statistics of the batch, or null: d - mean_d - (x - first) * along */
    const float *along;
};

enum pw_sweep_flags {
    PW_SWEEP_CHANNELS_FAST = 1, /* neighbouring threads take neighbouring rows, else positions */
    PW_SWEEP_ADD = 2,           /* to what the outputs hold */
    PW_SWEEP_ADD_SECOND = 4     /* to what d_second holds */
};

/* One pass over the values of a chain of stages. A block has the positions of one chunk; what it sums
 * is merged in the order of the chunks. */
struct pw_sweep {
    uint32_t extents[PW_MAX_AXES];        /* innermost first */
    struct pw_part inputs[PW_MAX_PARTS];  /* the chain's; none: no stage asks for its values, or zeros */
    struct pw_part outputs[PW_MAX_PARTS]; /* where the result goes, or the gradient by the input; or none */
    struct pw_part second;                /* residual or gate */
    struct pw_part d;                     /* the gradient by the chain's result */
    struct pw_part d_second;              /* where the gradient by the residual goes, or null */
    const uint32_t *map;        /* row -> channel of the chain's result and its gradient; null: equal */
    const uint32_t *second_map; /* row -> channel of the residual */
    uint32_t *bits;             /* of the last activation, in the order of the fast axis, or null */
    float outside;              /* its slope where a bit is clear */
    float lo, hi;               /* where bits are set: within these bounds, which are outside */
    uint32_t flags;             /* of enum pw_sweep_flags */
    double *sums;               /* moments [rows][chunks] in pairs, or sums [2 * summed][rows][chunks]; for a
                                   layer norm over all, moments or sums of positions */
    float *of_norm;             /* what a layer norm over channels has in its arrays */
    uint32_t positions;
    uint32_t group;             /* positions that chunks do not cross the ends of */
    uint32_t chunk;             /* positions of a chunk */
    uint32_t rows;
    uint32_t axis_count;
    uint32_t input_count;
    uint32_t output_count;
    uint32_t stage_count;
    uint32_t first_stage;       /* of a backward pass: where it ends */
    uint32_t summed;
    uint32_t norm_unit;         /* positions that share a layer norm's statistics: 1, or a sample's */
    uint32_t reserved;
    struct pw_stage stages[PW_MAX_STAGES];
};

/* Sums of neighbours: [outputs][items] to [outputs]. */
struct pw_sum {
    const double *from;
    double *to;
    float *to_f32; /* or null */
    int64_t outputs;
    int64_t items;
};

/* d_weight[row, k] = sum over positions of d[row, position] * src[k, position], of each group. */
struct pw_wgrad {
    uint32_t extents[PW_MAX_AXES]; /* innermost first */
    struct pw_part d;
    struct pw_part src;
    float *to;                    /* [splits][groups * rows][depth] */
    uint32_t positions;
    uint32_t chunk;               /* positions of a split, a multiple of a slab's */
    uint32_t axis_count;
    uint32_t groups;
    uint32_t rows;                /* of a group */
    uint32_t depth;
    uint32_t splits;
    enum pw_read d_read;          /* with the conditions of a source's, for channels: of a group's */
    enum pw_read src_read;
    uint32_t reserved;
};

/* The sums of splits, in their order. */
struct pw_wgrad_sum {
    const float *from; /* [splits][values] */
    float *to;
    int64_t values;
    uint32_t splits;
    uint32_t reserved;
};

#ifdef __cplusplus
static_assert(sizeof(struct pw_step) == 32, "pw_step is laid out as Rust believes");
static_assert(sizeof(struct pw_axis) == 40, "pw_axis is laid out as Rust believes");
static_assert(sizeof(struct pw_source) == 64, "pw_source is laid out as Rust believes");
static_assert(sizeof(struct pw_part) == 64, "pw_part is laid out as Rust believes");
static_assert(sizeof(struct pw_stage) == 56, "pw_stage is laid out as Rust believes");
static_assert(sizeof(struct pw_sweep) <= 4000, "launch parameters have 4 KiB");
static_assert(sizeof(struct pw_fprop) == 1792, "pw_fprop is laid out as Rust believes");
static_assert(sizeof(struct pw_bytes) == 1864, "pw_bytes is laid out as Rust believes");
#endif

#endif
