/* Which resident expert makes room for another: eviction policies. Pure data structures, one thread, no clock of their own.
 *
 * Experts are numbered by the caller (layer · num_experts + expert, say), slots too. Time is a count of the caller's that never
 * falls and rises with the work done (batches computed, say), so that idle time ages nothing. */
#pragma once
#include "common/status.h"

/* Settings that suit a caller whose time is the batches (a layer of a step) that a worker computed. */
#define MOE_EVICTION_HALF_LIFE_BATCHES 1024
#define MOE_EVICTION_HINT_BATCHES 256 /* after which a step is not expected any more */

#define MOE_EVICTION_MAX_HINTS 8192 /* that wait for their layer; a further one takes the place of the oldest */

typedef struct moe_eviction moe_eviction;

typedef struct moe_eviction_config {
    const char *policy;
    int32_t num_experts; /* in all layers, alike in each, those of the first layer first */
    int32_t num_layers;  /* forward steps pass through them in turn */
    int64_t half_life;   /* of a use's weight in lfu-decay and hint-aware, > 0, in the caller's time */
} moe_eviction_config;

/* Name and one-line description of policy `index`; NULL beyond the last. */
const char *moe_eviction_policy_name(int32_t index);
const char *moe_eviction_policy_about(int32_t index);
#define MOE_EVICTION_POLICIES "lru|lfu-decay|hint-aware" /* as the choices of an option */

/* INVALID_ARGUMENT (no such policy; the message names all), RESOURCE_EXHAUSTED. */
moe_status moe_eviction_new(const moe_eviction_config *config, moe_eviction **out, moe_error *err);
void moe_eviction_free(moe_eviction **eviction); /* NULLs; idempotent */

/* The expert came into a slot: by a miss, or ahead of its use. */
void moe_eviction_loaded(moe_eviction *eviction, int32_t expert, int64_t now);

/* A batch used the expert. Once a batch, however many rows: a miss costs one copy for all of them. Uses of a layer's experts at one
 * time are of one batch. */
void moe_eviction_used(moe_eviction *eviction, int32_t expert, int64_t now);

/* Nobody will want the expert soon, but for calls that are on their way: it goes first, under every policy, until a hint announces it
 * or it is loaded again. */
void moe_eviction_retired(moe_eviction *eviction, int32_t expert);

/* A hint announces that `step` will probably want the expert when its layer runs. `step` is any number that tells the forward
 * steps under way apart. The announcement ends with moe_eviction_ran of that step, or at time `until`, should that step never
 * come. */
void moe_eviction_hinted(moe_eviction *eviction, int32_t expert, uint64_t step, int64_t until);
/* `step` runs the layer whose experts end at first + count; what it was to want of [first, first + count) is announced no more. */
void moe_eviction_ran(moe_eviction *eviction, uint64_t step, int32_t first, int32_t count, int64_t now);
/* Whether a hint announces the expert; under every policy. */
bool moe_eviction_announced(const moe_eviction *eviction, int32_t expert);

/* Whether `cold`, which is in no slot, was used so much more than the resident `other` that a swap pays, and is not undone by the next
 * use: half as often again under the policies that count uses (hint-aware: by so much more of its layer's batches); last used a quarter of
 * a half-life later under lru. */
bool moe_eviction_hotter(const moe_eviction *eviction, int32_t cold, int32_t other);

/* By which experts of one layer compare: the higher, the more or the later it was used; the lowest there is: never. */
double moe_eviction_rank(const moe_eviction *eviction, int32_t expert);

/* The slot of [0, num_slots) to empty, -1: none may be; of equals the first. expert_in [num_slots]: the expert of each, -1: it must stay
 * (it is empty, or being filled); may_go is asked of slots alone that would be the best so far. hint-aware names an announced expert only
 * where all that may go are announced; moe_eviction_announced tells a caller that would then rather not load. Looks at each slot once. */
int32_t moe_eviction_victim(const moe_eviction *eviction, const int32_t *expert_in, int32_t num_slots,
                            bool (*may_go)(void *ctx, int32_t slot), void *ctx);
