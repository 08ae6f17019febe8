/* A micro-batch between its segments: hidden state, scratch, staging, and a stream of its own. */
#pragma once
#include "cuda/backend.h"
#include "cuda/graphs.h"
#include "cuda/linear.h"
#include "cuda/step.h"

#define MOE_CUDA_LOGITS_BYTES ((size_t)128 << 20) /* of logits that are computed at a time, unless one row has more */

struct moe_rows {
    int32_t max_rows, room, logits_rows; /* room: for max_rows and padding; logits_rows: how many rows of logits `logits` holds */
    bool fast; /* the tensor-core kernels of base_kernels.h have the model's shape, and the profile is theirs */
    cudaStream_t stream;
    void *memory;  /* owned: all device arrays but the buffers at the end; [room, …] each */
    float *hidden; /* [H]: the residual stream */
    void *normed;  /* [H] of dtype: input of a layer's attention or experts; the next segment's shared expert reads it too */
    float *qkv;    /* [(heads + 2 kv) · d]; fast: of dtype */
    void *q, *attention;           /* [heads · d] of dtype */
    void *inner;                   /* [widest dense or shared intermediate, padded] of dtype */
    float *delta;                  /* [H]: output of a dense or shared FFN */
    float *router[2];              /* [E] each: router logits, of which routes come */
    float *shared_logits;          /* [1] */
    float *cosine, *sine;          /* [head_dim / 2]: set by segment 0 */
    int32_t *identity, *all_slots; /* constant: 0, 1, …; top_k, top_k, … */
    void *outputs;                 /* [top_k, H] f32 or dtype: expert outputs to combine */
    moe_route routes[2];           /* [top_k] each */
    float *logits;                 /* [logits_rows, V] */
    int32_t *top_ids;              /* [MOE_MAX_TOP_LOGITS] */
    float *top_logits;             /* [MOE_MAX_TOP_LOGITS] */

    void *top_scratch; /* of the search for the highest logits */
    int32_t *arrivals; /* of attention; zero between launches */

    moe_cuda_step step;      /* set by segment 0 for the whole step */
    moe_cuda_linear *linear; /* NULL unless fast */
    moe_cuda_graphs graphs;

    moe_cuda_buffer step_in, step_device;       /* what segment 0 brings: pinned, and on the device */
    moe_cuda_buffer segment_in, segment_device; /* what each segment brings */
    moe_cuda_buffer outputs_in, out;            /* pinned: expert outputs from pageable memory; results */
    moe_cuda_buffer partial;                    /* of attention over long contexts */
    moe_cuda_buffer experts;                    /* routing and inner products of local steps and of jobs of layer_ffn.c, one at a time */
};

static inline moe_cuda_queue moe_cuda_rows_queue(const moe_cuda *cuda, const moe_rows *rows) {
    return (moe_cuda_queue){.stream = rows->stream,
                            .overlap = cuda->device.arch >= 90,
                            .hopper = cuda->device.arch == 90,
                            .num_sms = cuda->device.num_sms};
}
