/* A batch: calls of one layer, combine mode and slice, merged into one job for the backend. The loop's thread only. */
#pragma once
#include "expert-worker/work.h"

#define MOE_BATCH_KEPT_BYTES ((size_t)64 << 20) /* of each kind of memory, from one batch to the next */

typedef struct moe_batch_memory {
    void *memory;
    size_t bytes;
} moe_batch_memory;

enum {
    MOE_BATCH_X,
    MOE_BATCH_OUT,
    MOE_BATCH_ANSWERS,
    MOE_BATCH_GROUPS,
    MOE_BATCH_ROWS,
    MOE_BATCH_WEIGHTS,
    MOE_BATCH_POSITIONS,
    MOE_BATCH_EXPERTS, /* of the groups */
    MOE_BATCH_DONE,    /* this and the next: of a batch computed in passes (passes.h) */
    MOE_BATCH_PASS_GROUPS, /* of the device's pass, as the next two */
    MOE_BATCH_PASS_ROWS,
    MOE_BATCH_PASS_OUT,
    MOE_BATCH_HOST_GROUPS, /* the same of the host's, in the same order */
    MOE_BATCH_HOST_ROWS,
    MOE_BATCH_HOST_OUT,
    MOE_BATCH_COLD, /* groups of which it is open where they are computed */
    MOE_BATCH_EXACT,
    MOE_BATCH_SUMS,
    MOE_BATCH_PARTS
};

typedef struct moe_batch {
    moe_backend *backend; /* borrowed; whose memory the parts are */
    struct moe_work_list works;
    int32_t num_works, rows, assignments;
    bool assembled; /* `ffn` is that of `works` */
    moe_ffn_batch ffn;

    moe_batch_memory parts[MOE_BATCH_PARTS]; /* each grows with what was needed */
    int32_t *first_of;                       /* [num_experts + 1] */
} moe_batch;

/* RESOURCE_EXHAUSTED. */
moe_status moe_batch_init(moe_batch *batch, moe_backend *backend, int32_t num_experts, moe_error *err);
void moe_batch_free(moe_batch *batch); /* it is empty; idempotent */

static inline bool moe_batch_empty(const moe_batch *batch) { return batch->num_works == 0; }

/* Whether the call can be merged into the batch: alike, and both assignments and rows within `most` (any call fits an empty
 * batch). */
bool moe_batch_fits(const moe_batch *batch, const moe_work *work, int32_t most);
void moe_batch_add(moe_batch *batch, moe_work *work);
void moe_batch_remove(moe_batch *batch, moe_work *work);

/* After the last call was removed: gives back the memory that only an uncommonly large batch needs. */
void moe_batch_trim(moe_batch *batch);

/* Builds `ffn`: assignments by expert, within one by call and row, so that each expert's weights are read once. A call of its
 * own is used where it lies. RESOURCE_EXHAUSTED. */
moe_status moe_batch_assemble(moe_batch *batch, const moe_shard *shard, moe_error *err);

/* Makes a part at least count × size bytes, from the backend's host memory; what was in it is lost when it grows. False when out of
 * memory. */
bool moe_batch_reserve(moe_batch *batch, int part, int32_t count, size_t size);

/* After the computation: sets each call's `out` to its own rows in its own order. RESOURCE_EXHAUSTED. */
moe_status moe_batch_deliver(moe_batch *batch, const moe_shard *shard, moe_error *err);
