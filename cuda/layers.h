/* The ops of a forward pass as launches on a micro-batch's stream, for segments and local steps alike. In the bfloat16 profile
 * the tensor-core kernels do what they have the shape for, else, and in float32, the simple kernels. */
#pragma once
#include "cuda/rows.h"

/* One segment or step that is being enqueued; the jobs' lock is held. The first failure stays in `status`, and what follows it is
 * not enqueued any more or does no harm. */
typedef struct moe_cuda_pass {
    moe_cuda *cuda;
    const moe_base *base;
    const moe_model_config *config;
    const moe_segment *segment;
    moe_rows *rows;
    moe_cuda_queue queue;
    moe_cuda_job *slot;
    moe_cuda_combine_norm pending; /* what the next norm adds to the hidden state */
    bool direct;                   /* the memory of the activations or logits is pinned */
    size_t out_used;               /* of rows->out */
    moe_status status;
    moe_error *err;
} moe_cuda_pass;

void moe_cuda_pass_did(moe_cuda_pass *p, cudaError_t code, const char *what);
void moe_cuda_pass_mark(moe_cuda_pass *p, moe_cuda_mark mark);

/* Reserves and fills what the step's rows are (rows->step), and enqueues its copy. */
void moe_cuda_pass_begin_step(moe_cuda_pass *p);

/* Runs `record` through the rows' graph cache where that pays, else as it is. */
void moe_cuda_pass_run(moe_cuda_pass *p, const void *local, int32_t segment, uint32_t flags,
                       moe_status (*record)(void *ctx, moe_error *err), void *ctx);

/* hidden = embedding; angles of the rotation. */
void moe_cuda_pass_embed(moe_cuda_pass *p);
/* hidden += what is pending; normed = RMSNorm(hidden), unless weight is NULL. */
void moe_cuda_pass_norm(moe_cuda_pass *p, const float *weight);
/* hidden += attention(normed); its bias may stay pending. */
void moe_cuda_pass_attention(moe_cuda_pass *p, int32_t layer);
/* delta = FFN(normed), which is pending then (a dense layer's, or a shared expert's beside the experts'). */
void moe_cuda_pass_network(moe_cuda_pass *p, const moe_cuda_base_network *network);
/* The shared expert and its gate, pending; nothing where the layer has none. */
void moe_cuda_pass_shared(moe_cuda_pass *p, const moe_cuda_layer *layer);
/* Top-k of gate · normed into rows->routes[which]. `sorted`, where not NULL, has the places for the assignments sorted by expert:
 * true when they were filled, and counted, too. */
bool moe_cuda_pass_route(moe_cuda_pass *p, const moe_cuda_matrix *gate, int which, const moe_cuda_route_few *sorted);

/* Room for `bytes` of results in pinned staging memory, before anything is enqueued. */
void moe_cuda_pass_reserve_out(moe_cuda_pass *p, size_t bytes);
/* A result on its way to the caller: straight where its memory is pinned (direct), else through staging. */
void moe_cuda_pass_give(moe_cuda_pass *p, void *to, const void *from, size_t bytes, bool direct);
/* A result into staging memory alone, which is the job's until it has ended. */
const void *moe_cuda_pass_keep(moe_cuda_pass *p, const void *from, size_t bytes);
/* The outputs of segment M. logit_rows: device. */
size_t moe_cuda_pass_logits_bytes(const moe_cuda_pass *p);
void moe_cuda_pass_logits(moe_cuda_pass *p, const int32_t *logit_rows);
