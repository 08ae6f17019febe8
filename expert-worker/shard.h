/* Which experts this worker holds. The loop's thread only. */
#pragma once
#include "common/backend.h"

typedef struct moe_held_expert {
    bool held;
    moe_expert *handle; /* NULL: not held, or where the residency has it */
    uint64_t digest;    /* moe_expert_digest of the checkpoint's bytes */
    int64_t bytes;      /* of the packed weights */
    int32_t users;      /* accepted calls that need it: it is not freed while there are any */
    bool dropping;      /* freed when the last user lets go; no longer held for new calls */
    uint64_t rows, calls; /* that it computed since its load */
} moe_held_expert;

struct moe_residency;

typedef struct moe_shard {
    const moe_model *model;   /* borrowed */
    moe_backend *backend;     /* borrowed */
    moe_held_expert *experts; /* [num_moe_layers, num_experts] */
    int32_t num_held;
    int64_t bytes;     /* of the experts that are not freed yet */
    uint64_t holdings; /* rises whenever what it holds changes; never 0 */
    moe_expert **lent; /* [num_moe_layers, num_experts], owned; NULL until moe_shard_lend */
    struct moe_residency *residency; /* borrowed; NULL: every held expert has a handle of its own */
} moe_shard;

/* RESOURCE_EXHAUSTED. */
moe_status moe_shard_init(moe_shard *shard, const moe_model *model, moe_backend *backend, moe_error *err);
void moe_shard_free(moe_shard *shard); /* there are no users any more; idempotent */

static inline moe_held_expert *moe_shard_at(const moe_shard *shard, int32_t layer, int32_t expert) {
    return &shard->experts[(int64_t)layer * shard->model->config.num_experts + expert];
}

/* Whether a new call may use it. */
static inline bool moe_shard_holds(const moe_shard *shard, int32_t layer, int32_t expert) {
    const moe_held_expert *held = moe_shard_at(shard, layer, expert);
    return held->held && !held->dropping;
}

/* Calls off a pending drop. True where the expert is held then. */
bool moe_shard_keep(moe_shard *shard, int32_t layer, int32_t expert);

/* Takes over a loaded expert (handle, digest, bytes), which is not there yet. With a residency it has no handle, and
 * moe_residency_hold follows. */
void moe_shard_adopt(moe_shard *shard, int32_t layer, int32_t expert, const moe_held_expert *loaded);

/* Frees the expert, or marks it to be freed by its last user. Nothing where it is not held. */
void moe_shard_drop(moe_shard *shard, int32_t layer, int32_t expert);

/* The handles of all experts; NULL where one is not held, where there is a residency,
 * or when out of memory. From then on none is freed before the shard. */
moe_expert *const *moe_shard_lend(moe_shard *shard);

/* A call that needs the held expert for `rows` rows begins, and ends. */
void moe_shard_use(moe_shard *shard, int32_t layer, int32_t expert, int32_t rows);
void moe_shard_release(moe_shard *shard, int32_t layer, int32_t expert);
