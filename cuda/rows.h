/* A micro-batch between its segments: hidden state, scratch, staging, and a stream of its own. */
#pragma once
#include "cuda/backend.h"

#define MOE_CUDA_LOGITS_BYTES ((size_t)128 << 20) /* of logits that are computed at a time, unless one row has more */

struct moe_rows {
    int32_t max_rows, logits_rows; /* logits_rows: how many rows of logits `logits` holds */
    cudaStream_t stream;
    void *memory;  /* owned: all device arrays but the buffers at the end; [max_rows, …] each */
    float *hidden; /* [H]: the residual stream */
    void *normed;  /* [H] of dtype: input of a layer's attention or experts; the next segment's shared expert reads it too */
    float *qkv;    /* [(heads + 2 kv) · d] */
    void *q, *attention;           /* [heads · d] of dtype */
    void *inner;                   /* [widest dense or shared intermediate, padded] of dtype */
    float *delta;                  /* [H]: output of a dense or shared FFN */
    float *router, *shared_logits; /* [E], [1] */
    float *cosine, *sine;          /* [head_dim / 2]: set by segment 0 */
    int32_t *identity;             /* 0, 1, …: constant */
    void *outputs;                 /* [top_k, H] f32 or dtype: expert outputs to combine */
    void *routes[2];               /* [top_k] experts of all rows, then their weights */
    float *logits;                 /* [logits_rows, V] */
    int32_t *top_ids;              /* [MOE_MAX_TOP_LOGITS] */
    float *top_logits;             /* [MOE_MAX_TOP_LOGITS] */

    /* set by segment 0 for the whole step */
    moe_simple_places places;
    const int32_t *whole; /* [2]: 0, number of rows; the only group of a dense FFN */

    moe_cuda_buffer step_in, step_device;       /* what segment 0 brings: pinned, and on the device */
    moe_cuda_buffer segment_in, segment_device; /* what each segment brings */
    moe_cuda_buffer outputs_in, out;            /* pinned: expert outputs from pageable memory; results */
};
