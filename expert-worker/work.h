/* One accepted Forward call: its own copy of the routing and the activations, from arrival to answer. */
#pragma once
#include <sys/queue.h>

#include "expert-worker/blocks.h"
#include "expert-worker/shard.h"
#include "proto/forward.h"

typedef struct moe_work {
    TAILQ_ENTRY(moe_work) link; /* in the queue or in a batch */
    moe_rpc_call *call;
    struct moe_batcher *batcher; /* that it is in */
    int32_t layer, rows, assignments, block_lo, block_hi;
    moe_combine_mode mode;
    int64_t arrived_ns, started_ns;
    bool queued;              /* in the queue; else in a batch */
    moe_block block;          /* owned: x and the arrays below */
    void *x;                  /* [rows, H] of the backend's dtype, 64-byte aligned */
    const int32_t *row_of;    /* [assignments] */
    const int32_t *expert_of; /* [assignments], ascending */
    const float *weight_of;   /* [assignments]; NULL in exact mode */

    /* the outcome */
    moe_status status;
    char message[128]; /* where status is not OK */
    uint32_t *not_finite; /* [num_not_finite] ascending rows of the call that gave what is not finite; owned */
    int32_t num_not_finite;
    const void *out;   /* exact [assignments, H], partial [rows, H] of moe_work_out_dtype; borrowed from the batch */
    int64_t compute_ns, copy_ns;           /* this call's share, by assignments, of its batch's */
    int64_t stall_ns;                      /* of the batch: nothing could be computed before a copy had ended */
    int64_t host_ns; /* of the batch, in its computation or beside it: cold experts, by the host */
} moe_work;

TAILQ_HEAD(moe_work_list, moe_work);

/* Copies a decoded call (once: what arrives is unaligned and goes with the message) and takes its experts, all held, into use.
 * NULL when out of memory. */
moe_work *moe_work_new(const moe_forward_call *decoded, moe_rpc_call *call, moe_shard *shard, moe_blocks *blocks, int64_t now_ns);
void moe_work_free(moe_work *work, moe_shard *shard, moe_blocks *blocks); /* lets go of the experts */

/* The first assignment behind `first` that is of another expert. */
static inline int32_t moe_work_group_end(const moe_work *work, int32_t first) {
    int32_t end = first + 1;
    while (end < work->assignments && work->expert_of[end] == work->expert_of[first]) end++;
    return end;
}

/* Exclusive or of the digests of the call's experts. */
uint64_t moe_work_digest(const moe_work *work, const moe_shard *shard);

/* Rows that the answer has. */
static inline int32_t moe_work_out_rows(const moe_work *work) {
    return work->mode == MOE_COMBINE_EXACT ? work->assignments : work->rows;
}

static inline moe_dtype moe_work_out_dtype(const moe_work *work, const moe_shard *shard) {
    return moe_expert_output_dtype(work->mode, shard->backend->dtype);
}

/* Sets the status to INTERNAL, naming layer and expert, where a computed row is not finite, and lists such rows (none when out of
 * memory). */
void moe_work_check_finite(moe_work *work, const moe_shard *shard);
