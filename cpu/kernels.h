/* The ops that a CPU implementation provides. The composition above them (segment.c, ffn.c, single.c) is written once.
 * Implementations: kernels_ref.c (the oracle), and kernels_lanes.h compiled for scalar, AVX2 and AVX-512 code.
 *
 * Orders that all implementations keep, so that a row's bits depend on that row alone:
 *   linear      y[n] = the tree sum over K blocks of (chain over k of fma(w[n,k], x[k], acc), from 0), + bias[n]
 *   linear_rows y[n] = the tree sum over K blocks of the lane sum over the block's k of fma(w[n,k], x[k], ·), lanes from its first k
 *   tree sum    of 1, 2, 4 or 8 values: neighbours first, ((b0+b1)+(b2+b3))+((b4+b5)+(b6+b7))
 *   lane sum    of a vector: lane l of 16 adds the elements l, l+16, …; then lane i += lane i+8, i+4, i+2, i+1
 *   attention   scores: chain over head_dim; softmax: maximum, then lane sum over positions aligned to absolute multiples
 *               of 16; values: chain over ascending positions; then one division by the softmax sum */
#pragma once
#include "common/backend.h"

#define MOE_CPU_LANES 16            /* outputs in a panel, and lanes of every lane sum */
#define MOE_CPU_ATTENTION_QUERIES 8 /* (row, head) pairs that share loads of keys and values */

/* W [n, k] in an implementation's own layout: panels of `panel` outputs, [n / panel, k, panel], the last one zero-padded. Or, with `run`,
 * another's: outputs row by row, as moe_image_matrix says. */
typedef struct moe_cpu_matrix {
    void *data; /* owned; NULL: absent */
    moe_dtype dtype;
    int32_t n, k, panel;
    int32_t run;
    int64_t run_bytes, row_bytes;
} moe_cpu_matrix;

/* y[r, n] = x[r, :] · W[n, :] (+ bias[n]) for n in [n_lo, n_hi); n_lo is a multiple of MOE_CPU_LANES. */
typedef struct moe_cpu_linear {
    const moe_cpu_matrix *w;
    const float *bias; /* [w->n] or NULL */
    const float *x;    /* [rows, x_stride]; column k of W meets element k of a row */
    float *y;          /* [rows, y_stride]; output n lands at element n of a row */
    int64_t x_stride, y_stride;
    int32_t rows, n_lo, n_hi;
    const int32_t *k_bounds; /* [num_blocks + 1]: block b of K is [k_bounds[b], k_bounds[b + 1]) */
    int32_t num_blocks;      /* 1, 2, 4 or 8 */
} moe_cpu_linear;

/* One layer of a KV pool. A block's keys are [kv_heads][head_dim][16], its values [kv_heads][16][padded_dim]. */
typedef struct moe_cpu_kv_layer {
    uint8_t *keys, *values;
    moe_dtype dtype; /* of both: MOE_F32 or MOE_BF16 */
    int64_t key_block_bytes, value_block_bytes;
    int32_t kv_heads, head_dim, padded_dim; /* padded_dim: head_dim rounded up to MOE_CPU_LANES */
} moe_cpu_kv_layer;

/* Attention of the query heads of one key head, for rows of one sequence. */
typedef struct moe_cpu_attention {
    const moe_cpu_kv_layer *kv;
    const int32_t *blocks;    /* the sequence's block table */
    const int32_t *positions; /* [rows], ascending */
    const float *q;           /* query (row, head) at q + row · q_stride + head · head_dim */
    float *y;                 /* likewise with y_stride */
    int64_t q_stride, y_stride;
    int32_t rows, kv_head, heads_per_kv;
    int32_t window; /* 0: none */
    float scale;
    float *scratch;            /* MOE_CPU_ATTENTION_QUERIES × (scratch_positions + padded_dim) floats, 64-byte aligned */
    int64_t scratch_positions; /* a multiple of 16, at least the last position + 1 */
} moe_cpu_attention;

/* y[h] += (chain over j of fma(weights[j], outputs[j, h], acc) from 0) + shared_scale · shared[h]. */
typedef struct moe_cpu_combine {
    const void *outputs;  /* [count, hidden] */
    moe_dtype dtype;      /* of outputs: MOE_F32 or MOE_BF16 */
    const float *weights; /* [count] */
    int32_t count, hidden;
    const float *shared; /* [hidden] or NULL */
    float shared_scale;
    float *y; /* [hidden] */
} moe_cpu_combine;

typedef struct moe_cpu_kernels {
    const char *isa;    /* "ref", "scalar", "avx2", "avx512" */
    int32_t panel;      /* outputs in a panel of packed matrices */
    bool widen_weights; /* keep weights as f32 instead of as stored */

    void (*linear)(const moe_cpu_linear *args);      /* of panels */
    void (*linear_rows)(const moe_cpu_linear *args); /* of rows; no bias */
    /* y = x · weight / sqrt(mean(x²) + eps); one row; y may be x */
    void (*rms_norm)(const float *x, const float *weight, float eps, int32_t width, float *y);
    /* one row x [heads, head_dim], in place; cosine and sine [head_dim / 2] */
    void (*rotate)(float *x, const float *cosine, const float *sine, int32_t heads, int32_t head_dim);
    void (*attend)(const moe_cpu_attention *args);
    /* gate[i] = gate[i] / (1 + exp(-gate[i])) · up[i] */
    void (*silu_mul)(float *gate, const float *up, int32_t count);
    /* x[i] = x[i] < 0 ? 0 : x[i]; NaN stays */
    void (*relu)(float *x, int32_t count);
    float (*sigmoid)(float x);
    /* probabilities[i] = exp(logits[i] - max) / lane sum; one row */
    void (*softmax)(const float *logits, int32_t count, float *probabilities);
    void (*combine)(const moe_cpu_combine *args);
    /* y[i] = fma(weight, x[i], y[i]) */
    void (*accumulate)(float weight, const float *x, int32_t count, float *y);
    /* x[i] to [-limit, limit]; NaN stays */
    void (*clamp)(float *x, float limit, int32_t count);
} moe_cpu_kernels;

extern const moe_cpu_kernels moe_cpu_kernels_ref, moe_cpu_kernels_scalar;
#if defined(__x86_64__)
extern const moe_cpu_kernels moe_cpu_kernels_avx2, moe_cpu_kernels_avx512;
#endif
