/* A batch whose experts are not all on the device: computed in passes, each of the experts that are there by then, so that copies of
 * the others go on beside it, and beside that by the host, from images, where cold experts are the host's. At most one pass is with
 * each of the two at once. The rows that come out have the bits of a batch computed at once where the host's bits are the device's. The
 * loop's thread only. */
#pragma once
#include "expert-worker/batch.h"
#include "expert-worker/groups.h"

typedef struct moe_pass {
    bool out;          /* it is with the backend */
    int32_t num_taken; /* groups of it */
    moe_ffn_batch ffn; /* where the batch is split */
} moe_pass;

typedef struct moe_passes {
    moe_batch *batch; /* NULL: none is under way */
    moe_shard *shard;
    bool split;        /* its first pass was not all of it */
    moe_groups groups; /* of the batch */
    moe_pass pass[MOE_PASS_PLACES]; /* the newest of each */
} moe_passes;

/* An assembled batch begins: its experts are needed from now on, in slots or as images. RESOURCE_EXHAUSTED: nothing has begun. */
moe_status moe_passes_begin(moe_passes *passes, moe_batch *batch, moe_shard *shard, moe_error *err);
/* What can be computed there now, for ffn_submit; NULL: nothing, copies or images are waited for. No pass is out there.
 * RESOURCE_EXHAUSTED: give the batch up, once the other place's pass has ended. */
moe_status moe_passes_next(moe_passes *passes, moe_pass_place place, const moe_ffn_batch **out, moe_error *err);
/* The pass there has ended well. True when it was the last: the batch's results are in its `ffn.out`, passes->batch is NULL again. */
bool moe_passes_ended(moe_passes *passes, moe_pass_place place);
/* Lets go of what is still needed; no pass is with a backend any more. Idempotent. */
void moe_passes_give_up(moe_passes *passes);
