/* A batch whose experts are not all on the device: computed in passes, each of the experts that are there by then, so that copies of
 * the others go on beside it. The rows that come out have the bits of a batch computed at once. The loop's thread only. */
#pragma once
#include "expert-worker/batch.h"
#include "expert-worker/residency.h"

typedef struct moe_passes {
    moe_batch *batch; /* NULL: none is under way */
    moe_shard *shard;
    bool split;     /* its first pass was not all of it */
    bool out;       /* a pass is with the backend */
    int32_t num_left; /* groups that no pass has taken */
    int32_t num_taken; /* groups of the newest pass */
    moe_ffn_batch ffn; /* of it, where split */
} moe_passes;

/* An assembled batch begins: its experts are needed from now on. RESOURCE_EXHAUSTED: nothing has begun. */
moe_status moe_passes_begin(moe_passes *passes, moe_batch *batch, moe_shard *shard, moe_error *err);
/* What can be computed now, for ffn_submit; NULL: nothing, copies are waited for. RESOURCE_EXHAUSTED: give the batch up. */
moe_status moe_passes_next(moe_passes *passes, const moe_ffn_batch **out, moe_error *err);
/* The pass has ended well. True when it was the last: the batch's results are in its `ffn.out`, passes->batch is NULL again. */
bool moe_passes_ended(moe_passes *passes);
/* Lets go of what is still needed; the pass under way, if any, has ended. Idempotent. */
void moe_passes_give_up(moe_passes *passes);
