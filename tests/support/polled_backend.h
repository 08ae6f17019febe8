/* A backend in front of another whose jobs end only when it is polled, as those of a GPU: each takes a number of polls, in the
 * order of submission. One thread. */
#pragma once
#include "common/backend.h"

#define MOE_POLLED_MAX_JOBS 32

typedef struct moe_polled_job {
    moe_job *job;
    moe_base *base;
    moe_local *local;           /* with `step` */
    const moe_segment *segment; /* one of these five */
    const moe_ffn_batch *batch; /* */
    const moe_layer_ffn *layer; /* */
    const moe_local_step *step; /* */
    const moe_slot_fill *fill;  /* */
} moe_polled_job;

typedef struct moe_polled_backend {
    moe_backend base; /* what engine and worker get */
    moe_backend_ops ops;
    moe_backend *real; /* borrowed; threads 0 */
    moe_polled_job jobs[MOE_POLLED_MAX_JOBS];
    int num_jobs;
    int polls_a_job, polls_left; /* until the first of `jobs` ends */
    int64_t num_polls, num_ended, num_local, num_layers;
    int64_t spoil_local; /* the n-th local step with logits (1: the next): its first row is not finite; 0: none */
} moe_polled_backend;

/* polls_a_job ≥ 1. `real` stays open longer. */
void moe_polled_init(moe_polled_backend *polled, moe_backend *real, int polls_a_job);
