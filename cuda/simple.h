/* The simple kernels: every shape, both element types, one order over K for a row whatever the batch. They are the CUDA backend's
 * float32 profile, and what the tensor-core kernels are held against.
 *
 * A launcher enqueues on the stream and returns the launch's error: it allocates nothing, waits for nothing, and may be captured
 * into a graph. All pointers are to device memory. Activations are of `dtype` (float32 or bfloat16); weights are of any stored
 * type beside float32 activations, and bfloat16 beside bfloat16. Sums are float32.
 *
 * linear, ffn: lane l of a warp adds elements 8l..8l+7, 8(l+32).. of K (one element a step where K is no multiple of 8), then the
 * lanes are added at distances 16, 8, 4, 2, 1. */
#pragma once
#include <cuda_runtime_api.h>

#include "common/tensor.h"

/* common/backend.h in short, which C++ cannot read (jobs.c checks that they agree). */
#define MOE_CUDA_KV_BLOCK 16
#define MOE_CUDA_FFN_BLOCKS 8

#ifdef __cplusplus
extern "C" {
#endif

/* W [n, k], row-major. data NULL: absent. */
typedef struct moe_cuda_matrix {
    void *data;
    moe_dtype dtype;
    int32_t n, k;
} moe_cuda_matrix;

/* hidden [rows, table.k] f32 = table[ids[r], :] */
cudaError_t moe_simple_embed(const moe_cuda_matrix *table, const int32_t *ids, int32_t rows, float *hidden, cudaStream_t stream);

/* cosine, sine [rows, half] of positions[r] · inverse_frequency[i], the angle in float32 */
cudaError_t moe_simple_rotary_angles(const int32_t *positions, const float *inverse_frequency, int32_t rows, int32_t half,
                                     float *cosine, float *sine, cudaStream_t stream);

/* y = x · weight / sqrt(mean(x²) + eps) over `count` vectors of `width`: vector v of x begins at (row(v / group) · x_stride +
 * v % group · width), of y at (v / group · y_stride + v % group · width); row(i) = row_index ? row_index[i] : i. y may be x. */
typedef struct moe_simple_norm_args {
    const float *x, *weight;
    const int32_t *row_index;
    void *y;
    moe_dtype y_dtype;
    int64_t x_stride, y_stride;
    int32_t count, width, group;
    float eps;
} moe_simple_norm_args;
cudaError_t moe_simple_rms_norm(const moe_simple_norm_args *args, cudaStream_t stream);

/* y [rows, w.n] f32 = x [rows, w.k] @ w^T (+ bias); with accumulate, y += that */
typedef struct moe_simple_linear_args {
    moe_cuda_matrix w;
    const float *bias; /* [n] or NULL */
    const void *x;
    moe_dtype x_dtype;
    float *y;
    int32_t rows;
    bool accumulate;
} moe_simple_linear_args;
cudaError_t moe_simple_linear(const moe_simple_linear_args *args, cudaStream_t stream);

/* One layer of a KV pool: keys and values [block][kv_heads][16][head_dim] of dtype. */
typedef struct moe_cuda_kv_layer {
    void *keys, *values;
    moe_dtype dtype;
    int32_t kv_heads, head_dim;
} moe_cuda_kv_layer;

/* Which sequence and position each row is at, and the blocks of the sequences: those of view v are tables[table_first[v] …). */
typedef struct moe_simple_places {
    const int32_t *positions, *sequences; /* [rows] */
    const int32_t *table_first, *tables;
} moe_simple_places;

/* Rows of qkv [rows, (heads + 2 kv_heads) · d] f32: clamp to ±clip (0: none), rotation of q and k, q to `q` [rows, heads · d] of
 * the KV's dtype, k and v into the pool. */
typedef struct moe_simple_project_args {
    const float *qkv, *cosine, *sine;
    moe_cuda_kv_layer kv;
    moe_simple_places places;
    void *q;
    int32_t rows, heads;
    float clip;
} moe_simple_project_args;
cudaError_t moe_simple_project(const moe_simple_project_args *args, cudaStream_t stream);

/* Causal attention: y [rows, heads · d] of each row over its sequence's positions up to its own, `window` back (0: all). A row's
 * KV blocks go to four warps by absolute block number, whose softmax sums are merged in order. head_dim at most 1024. */
typedef struct moe_simple_attention_args {
    const void *q;
    void *y;
    moe_cuda_kv_layer kv; /* q and y are of its dtype */
    moe_simple_places places;
    int32_t rows, heads, window;
    float scale;
} moe_simple_attention_args;
cudaError_t moe_simple_attention(const moe_simple_attention_args *args, cudaStream_t stream);

/* Top-k of router logits [rows, num_experts]: experts in ascending order, softmax weights, divided by their sum where norm_topk.
 * Ties, and NaN after all else, to the lower id. */
cudaError_t moe_simple_gate_topk(const float *logits, int32_t rows, int32_t num_experts, int32_t top_k, bool norm_topk,
                                 int32_t *experts, float *weights, cudaStream_t stream);

/* hidden[r, :] += (chain over j < counts[r] of fma(weights[r, j], outputs[r, j, :]) from 0) + scale · shared[r, :], where scale
 * is sigmoid(shared_logits[r]), or 1 where that is NULL. shared NULL: none. */
typedef struct moe_simple_combine_args {
    const void *outputs; /* [rows, top_k, width] */
    moe_dtype dtype;
    const float *weights;  /* [rows, top_k] */
    const int32_t *counts; /* [rows]; NULL: 0 everywhere */
    const float *shared, *shared_logits;
    float *hidden;
    int32_t rows, top_k, width;
} moe_simple_combine_args;
cudaError_t moe_simple_combine(const moe_simple_combine_args *args, cudaStream_t stream);

/* The `count` highest of each row of logits [rows, vocab], as moe_segment.top_ids has them; NaN as the logits of a bad row. */
cudaError_t moe_simple_logits_top(const float *logits, int32_t rows, int32_t vocab, int32_t count, int32_t *ids, float *top,
                                  cudaStream_t stream);

/* ---- expert FFN over assignments sorted by expert (group) ----
 * Group g has the assignments expert_first[g] … expert_first[g + 1); assignment a reads row sorted_rows[a] of x. All groups share
 * one shape: gate_up [2 · padded, hidden] in groups of 8 rows (gate, up, gate, …), or, not `gated`, up alone, [padded, hidden];
 * down [hidden, padded], where `padded` is the slice's width rounded up to 8. */
typedef struct moe_simple_ffn_args {
    const void *x; /* [rows, hidden] of dtype */
    moe_dtype dtype, weight_dtype;
    int32_t hidden, width, padded; /* width: of the slice [slice_lo, slice_hi) */
    int32_t intermediate;          /* of the whole network */
    int32_t slice_lo;              /* the first block that is held */
    int32_t block_lo, block_hi;    /* blocks to be computed */
    bool gated;
    int32_t num_groups, num_assignments;
    const int32_t *expert_first;              /* [num_groups + 1] */
    const int32_t *sorted_rows;               /* [num_assignments] */
    const int32_t *slot_of;                   /* [num_assignments]: row of y; NULL: the assignment's own number */
    const void *const *gate_up, *const *down; /* [num_groups] */
    void *inner; /* [num_assignments, padded] of dtype: silu(gate · x) ⊙ (up · x), or relu(up · x) */
    float *y;                                 /* [num_assignments, hidden] */
} moe_simple_ffn_args;
cudaError_t moe_simple_ffn_gate_up(const moe_simple_ffn_args *args, cudaStream_t stream);
/* The blocks of K are summed one by one and added as a binary tree, as MOE_FFN_BLOCKS says. */
cudaError_t moe_simple_ffn_down(const moe_simple_ffn_args *args, cudaStream_t stream);

/* out [rows, width] of dtype = chain over i in [row_first[r], row_first[r + 1]) of fma(weights[a], y[a, :]), a = row_items[i] */
typedef struct moe_simple_sum_args {
    const float *y, *weights;
    const int32_t *row_first, *row_items;
    void *out;
    moe_dtype dtype;
    int32_t rows, width;
} moe_simple_sum_args;
cudaError_t moe_simple_sum_rows(const moe_simple_sum_args *args, cudaStream_t stream);

/* to [count] of `dtype` = from [count] f32 */
cudaError_t moe_simple_narrow(const float *from, int64_t count, moe_dtype dtype, void *to, cudaStream_t stream);
cudaError_t moe_simple_widen(const void *from, moe_dtype dtype, int64_t count, float *to, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
