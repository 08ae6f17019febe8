/* A backend in front of another whose copies into slots end only when the test says so, in its order, and are counted; so do expert
 * batches and layers' jobs, where it asks for that. Neither reads or writes before it ends. One thread. */
#pragma once
#include "common/backend.h"

#define MOE_SLOW_MAX_FILLS 16
#define MOE_SLOW_MAX_BATCHES 16

typedef struct moe_slow_backend {
    moe_backend base; /* what the worker gets */
    moe_backend_ops ops;
    moe_backend *real; /* borrowed; threads 0 */
    const moe_slot_fill *fills[MOE_SLOW_MAX_FILLS]; /* outstanding, in the order of submission */
    moe_job *jobs[MOE_SLOW_MAX_FILLS];
    int num_fills;
    int64_t fills_ended, packed;
    const moe_ffn_batch *batches[MOE_SLOW_MAX_BATCHES]; /* NULL: it is a layer's job */
    const moe_layer_ffn *layers[MOE_SLOW_MAX_BATCHES];
    moe_base *bases[MOE_SLOW_MAX_BATCHES]; /* of a layer's job */
    moe_job *batch_jobs[MOE_SLOW_MAX_BATCHES];
    int num_batches;
    int64_t layers_submitted;
    bool slow_batches; /* else they end inside the submission */
    bool at_once;   /* copies end inside the submission */
    bool fail_next; /* the next copy ends with INTERNAL */
    bool fail_next_batch; /* the next of the slow batches does */
} moe_slow_backend;

void moe_slow_init(moe_slow_backend *slow, moe_backend *real);
void moe_slow_end(moe_slow_backend *slow); /* the copy submitted first of those outstanding; there is one */
void moe_slow_end_batch(moe_slow_backend *slow); /* likewise */
void moe_slow_hurry(moe_slow_backend *slow); /* ends all; from now on everything ends inside its submission */
