/* The placement controller. Every router runs one: it follows the cluster's map and hands each new one to the engine. One of
 * them, the leader, also writes: it lays out a new cluster, and gives a dead worker's share to a newcomer.
 *
 * Store keys: `meta` {uuid, epoch, fence, leader, map digest, model digest, replicas}; immutable `map:<epoch>`; leases
 * `worker:<id>`, `router:<id>`, `leader`. Whoever takes the leader lease raises the fence in `meta`; every write is a
 * compare-and-set on the text of `meta`, so that one who lost the lead without noticing writes nothing. Nothing here is on the
 * token path: without the store, routers serve on with the map they have. */
#pragma once
#include "common/clock.h"
#include "common/random.h"
#include "common/store.h"
#include "common/transport.h"
#include "router/placement/operation.h"
#include "router/placement/policy.h"

#define MOE_HOST_BYTES 128
#define MOE_PROFILE_BYTES 128
#define MOE_MAX_ROUTERS 64
#define MOE_VIEW_MAX_LAYERS 512
#define MOE_ROUTER_LEASE_TTL_MS 3000

#define MOE_VIEW_MAX_STEPS 64

typedef struct moe_controller moe_controller;

typedef enum moe_copy_from { MOE_COPY_AUTO, MOE_COPY_FILE, MOE_COPY_PEER } moe_copy_from;

/* How experts move. A number of 0 takes the default in brackets. */
typedef struct moe_balance_config {
    bool automatic;              /* balance, and replace what dead workers held; else only leaving workers hand over */
    int64_t interval_ns;         /* [5 s] between two looks at the balance */
    int64_t dwell_ns;            /* [30 s] in which an expert that moved stays */
    int64_t load_half_life_ns;   /* [30 s] of the loads */
    int64_t heal_after_ns;       /* [10 s] a worker gone for so long is replaced by replicas on others */
    double hysteresis;           /* [0.1] see moe_policy_config */
    int32_t redundant;           /* replicas above the wanted ones, in a layer */
    int32_t max_moves;           /* [16] at once, MOE_MIGRATION_MAX_MOVES at most */
    moe_copy_from copy_from;     /* AUTO: from a peer where that is on another host than every holder, else the checkpoint */
} moe_balance_config;

typedef struct moe_controller_config {
    moe_store *store;         /* borrowed; used by the controller alone */
    moe_transport *transport; /* borrowed; of its own, for control connections to workers; need not listen */
    const moe_clock *clock;
    const char *cluster_uuid;         /* ""; that of the cluster's meta, which is made where there is none */
    const char *id, *endpoint, *host; /* this router's; endpoint "" where it serves no RPC */
    uint64_t incarnation, model_digest;
    int64_t pid;
    int32_t num_moe_layers, num_experts;
    int32_t replicas;        /* wanted of every expert, 1 to MOE_PLACEMENT_MAX_REPLICAS */
    int32_t initial_workers; /* epoch 1 waits for so many; 0: for room for all replicas, and 2 s without a join */
    bool new_cluster;        /* nobody can know a map of it yet: the first is published without listening for one */
    moe_placement_kind layout;
    uint64_t layout_seed;
    const char *layout_file;                       /* NULL unless layout is FILE */
    /* [num_moe_layers, num_experts], borrowed: what workers must report. NULL: what is first reported counts. */
    const uint64_t *expert_digests;
    const char *state_dir;                         /* the newest map is kept there for a start without the store; NULL: nowhere */
    moe_balance_config balance;
    /* The oldest epoch that a step under way routes by; NULL: that of the map given last. On the controller's thread. */
    uint64_t (*routing_epoch)(void *ctx);
    void (*on_map)(void *ctx, moe_placement *map); /* a map to serve from now on, borrowed; on the controller's thread */
    void *ctx;
} moe_controller_config;

/* Strings are copied. With cluster_uuid "" it asks the store (blocks; UNAVAILABLE where that does not answer).
 * INVALID_ARGUMENT: replicas above initial_workers or out of range. FAILED_PRECONDITION: meta is of another model. */
moe_status moe_controller_new(const moe_controller_config *config, moe_controller **out, moe_error *err);
void moe_controller_free(moe_controller **controller); /* stops; leases are left to expire; NULLs; idempotent */

const char *moe_controller_cluster_uuid(const moe_controller *controller); /* any thread; lives as long as the controller */

/* Does what is due, then waits for messages of the control connections at most until deadline_ns (0: not at all). Blocks in
 * store calls for their time-outs. Fails only where the transport does; after RESOURCE_EXHAUSTED it can go on. */
moe_status moe_controller_step(moe_controller *controller, int64_t deadline_ns, moe_error *err);

/* Any thread: a worker lacked an expert that the map names. Looks for a newer map at once, in the store and at the workers. */
void moe_controller_hurry(moe_controller *controller);

/* Clean shutdown: gives the leader and router leases back, so that another router leads at once. Not while the thread runs. */
void moe_controller_resign(moe_controller *controller);

moe_status moe_controller_start(moe_controller *controller, moe_error *err); /* step in a thread of its own; real clock */
void moe_controller_stop(moe_controller *controller);                        /* joins the thread; idempotent */

/* UP: in the map, registered and connected. DOWN: in the map, but not so. JOINING: registered, not (yet) in the map as this
 * incarnation. REFUSED: registered with another model or profile, or its copy of an expert differs. */
typedef enum moe_worker_state {
    MOE_WORKER_UP,
    MOE_WORKER_DOWN,
    MOE_WORKER_JOINING,
    MOE_WORKER_REFUSED,
    MOE_WORKER_LEAVING /* up, but its experts go elsewhere: it was told to stop, or is drained */
} moe_worker_state;
const char *moe_worker_state_name(moe_worker_state state); /* "up", "down", "joining", "refused", "leaving" */

typedef struct moe_controller_worker_view {
    char id[MOE_WORKER_ID_BYTES], endpoint[MOE_ENDPOINT_BYTES], host[MOE_HOST_BYTES], profile[MOE_PROFILE_BYTES];
    uint64_t incarnation;
    int64_t pid;
    moe_worker_state state;
    int32_t experts; /* replicas that the map places on it; of a joining one, those loaded so far */
} moe_controller_worker_view;

typedef struct moe_step_view { /* a step of the policy */
    int32_t layer, expert;
    char from[MOE_WORKER_ID_BYTES], to[MOE_WORKER_ID_BYTES]; /* "": none */
    char text[256];
} moe_step_view;

typedef struct moe_controller_router_view {
    char id[MOE_WORKER_ID_BYTES], endpoint[MOE_ENDPOINT_BYTES], host[MOE_HOST_BYTES];
    uint64_t incarnation, epoch, fence, map_digest; /* of the map it serves; 0 before the first */
    uint64_t routing_epoch;                         /* the oldest that its steps route by */
    int64_t pid;
    bool leader;
} moe_controller_router_view;

typedef struct moe_controller_view {
    uint64_t epoch, fence;  /* of the map in use; 0 before the first */
    bool store_up, leading; /* this router leads */
    bool complete;          /* every expert has a READY replica on a worker that is UP */
    int32_t replicas;       /* wanted */
    int32_t num_workers, num_routers, num_layers;
    char waiting_for[256];                                         /* why there is no map yet; "" once there is */
    moe_controller_worker_view workers[MOE_PLACEMENT_MAX_WORKERS]; /* by id */
    moe_controller_router_view routers[MOE_MAX_ROUTERS];           /* by id */
    int32_t min_replicas[MOE_VIEW_MAX_LAYERS]; /* by MoE layer: the fewest READY replicas on UP workers that any expert has */
    double imbalance[MOE_VIEW_MAX_LAYERS];     /* by MoE layer: max over mean of the cost by worker; 0: not known yet */
    int32_t num_steps;                         /* what the policy would do now */
    moe_step_view steps[MOE_VIEW_MAX_STEPS];
    int32_t num_operations; /* newest last */
    moe_operation operations[MOE_MAX_OPERATIONS];
    char migration[160]; /* the moves under way and their phase; "": none. Known to the leader alone */
    uint64_t moves;      /* that this router has brought to an end as the leader */
} moe_controller_view;
void moe_controller_get_view(moe_controller *controller, moe_controller_view *out); /* any thread; some 300 KB: not on a stack */

/* Asks for an operation; any thread. Its id is the caller's, or made here where that is ""; the id of an unfinished operation that
 * asks for the same is returned instead, so that asking again does no harm. INVALID_ARGUMENT naming what is wrong, UNAVAILABLE
 * while there is no map or the store is down, RESOURCE_EXHAUSTED. */
moe_status moe_controller_submit(moe_controller *controller, const moe_operation *wanted, char id[MOE_OPERATION_ID_BYTES],
                                 moe_error *err);
