/* The placement map: which workers hold which experts. Immutable once made, reference-counted, shared between threads; a forward
 * step uses one map from its first layer to its last. */
#pragma once
#include <stdatomic.h>

#include "common/buf.h"
#include "common/status.h"
#include "common/transport.h"

#define MOE_PLACEMENT_MAX_WORKERS 256
#define MOE_PLACEMENT_MAX_REPLICAS 8
#define MOE_WORKER_ID_BYTES 64
#define MOE_MAX_EPOCH (INT64_MAX / 2) /* of fences too; what a peer claims beyond it is not believed */

typedef enum moe_replica_state { MOE_REPLICA_LOADING, MOE_REPLICA_READY, MOE_REPLICA_DRAINING } moe_replica_state;

typedef struct moe_replica {
    uint16_t worker; /* index into workers */
    uint8_t state;   /* moe_replica_state */
} moe_replica;

/* Cost of a share of a layer: per distinct expert (its weights are read once) and per row. */
typedef struct moe_placement_cost {
    int64_t per_expert, per_row; /* ns, MOE_COST_MAX_NS at most */
} moe_placement_cost;

#define MOE_COST_MAX_NS (INT64_C(1000000000000))
/* Where no worker has measured it: a guess in no unit. */
#define MOE_COST_DEFAULT ((moe_placement_cost){8, 1})

typedef struct moe_placement_worker {
    char id[MOE_WORKER_ID_BYTES];
    uint64_t incarnation;
    char endpoint[MOE_ENDPOINT_BYTES];
    char public_key[41];     /* CURVE, Z85; "" for none */
    moe_placement_cost cost; /* as it measured at its start; per_row 0: it did not */
} moe_placement_worker;

typedef struct moe_placement_entry { /* one (MoE layer, expert) */
    uint64_t digest;                 /* of the expert's weights; 0 while unknown */
    uint8_t num_replicas;
    moe_replica replicas[MOE_PLACEMENT_MAX_REPLICAS];
} moe_placement_entry;

typedef struct moe_placement {
    _Atomic int32_t references;
    uint64_t epoch, fence, model_digest;
    int32_t num_layers, num_experts; /* MoE layers */
    int32_t num_workers;
    moe_placement_worker *workers;
    moe_placement_entry *entries; /* [num_layers, num_experts] */
} moe_placement;

/* A map without replicas; one reference, the caller's. NULL when out of memory. */
moe_placement *moe_placement_new(int32_t num_layers, int32_t num_experts, int32_t num_workers);
moe_placement *moe_placement_ref(moe_placement *placement);
void moe_placement_unref(moe_placement **placement); /* NULLs; NULL is allowed */
/* A deep copy with one reference, to be changed before it is shared; NULL when out of memory. */
moe_placement *moe_placement_copy(const moe_placement *placement);

/* What plans and policy reckon with: the medians of what the map's workers measured, since all have one numeric profile, and one
 * that measured while its machine was busy should not get less work for it. MOE_COST_DEFAULT where none did. */
moe_placement_cost moe_placement_unit_cost(const moe_placement *p);

/* By epoch, then fence; anything is newer than NULL. */
static inline bool moe_placement_newer(const moe_placement *a, const moe_placement *b) {
    return !b || a->epoch > b->epoch || (a->epoch == b->epoch && a->fence > b->fence);
}

int32_t moe_placement_find_worker(const moe_placement *p, const char *id); /* its index, or -1 */
bool moe_placement_has(const moe_placement_entry *entry, int32_t worker);  /* whether one of the replicas is there */

/* Changes to a map that is not shared yet. */
int32_t moe_placement_add_worker(moe_placement *p, const moe_placement_worker *worker); /* its index; -1: no memory or room */
void moe_placement_remove_worker(moe_placement *p, int32_t worker);                     /* it has no replica */
void moe_placement_add_replica(moe_placement_entry *entry, int32_t worker, moe_replica_state state); /* there is room */
void moe_placement_remove_replica(moe_placement_entry *entry, int32_t worker);          /* nothing where it has none */
moe_replica *moe_placement_replica(moe_placement_entry *entry, int32_t worker);         /* NULL: none */

static inline moe_placement_entry *moe_placement_at(const moe_placement *p, int32_t layer, int32_t expert) {
    return &p->entries[(int64_t)layer * p->num_experts + expert];
}

/* JSON, as stored under map:<epoch> and on disk; parse checks every field against the limits above. */
moe_status moe_placement_to_json(const moe_placement *p, moe_buf *out, moe_error *err);
moe_status moe_placement_from_json(const char *text, size_t size, moe_placement **out, moe_error *err);

/* How experts are laid out over workers at bootstrap. */
typedef enum moe_placement_kind { MOE_PLACEMENT_BALANCED, MOE_PLACEMENT_RANDOM, MOE_PLACEMENT_FILE } moe_placement_kind;

/* Fills the replicas of `p` (all READY) with `replicas` distinct workers for every expert.
 *   BALANCED: replica r of expert e of layer l goes to worker ((l E + e) R + r) mod W: in every layer, and in all, the workers'
 *             shares are within one of each other
 *   RANDOM:   a seeded shuffle with every expert on `replicas` distinct workers and worker totals within one of each other
 *   FILE:     the file at that path holds {"layers": [[["w0","w1"], …], …]}: worker ids by layer and expert, at least `replicas`
 * INVALID_ARGUMENT: replicas above the number of workers, or what is wrong in the file. */
moe_status moe_placement_layout(moe_placement *p, moe_placement_kind kind, uint64_t seed, const char *file, int32_t replicas,
                                moe_error *err);
