/* A whole cluster in one thread on a virtual clock: routers (engine and controller each), workers, store, network with seeded
 * faults. The same seed gives the same history, of which a hash is kept: every output, map, start and end, with its time. */
#pragma once
#include "common/inproc/inproc.h"
#include "common/memory/memory_store.h"
#include "common/random.h"
#include "expert-worker/registry.h"
#include "expert-worker/worker.h"
#include "router/engine/engine.h"
#include "router/placement/controller.h"
#include "tests/support/slow_backend.h"

#define SIM_MAX_WORKERS 8
#define SIM_MAX_ROUTERS 3
#define SIM_MAX_REQUESTS 256
#define SIM_MAX_TOKENS 64

typedef struct sim_worker {
    moe_transport *transport;
    moe_store *store;
    moe_worker *worker; /* NULL: dead */
    moe_registration *registration;
    char id[16], endpoint[32];
    moe_slow_backend slow; /* with tiers, in front of its backend */
} sim_worker;

typedef struct sim_router {
    struct sim_cluster *sim;
    moe_transport *engine_transport, *controller_transport;
    moe_store *store;
    moe_controller *controller; /* NULL, as the engine: not there */
    moe_engine *engine;
    char id[16];
    uint64_t epoch; /* highest of the maps given to it, over its restarts */
} sim_router;

/* One request and what came of it. */
typedef struct sim_request {
    struct sim_cluster *sim;
    int32_t router;
    bool abandoned; /* its router went away while it was live */
    uint64_t id;
    int32_t tokens[SIM_MAX_TOKENS];
    int32_t num_tokens, max_tokens;
    int32_t terminal_events; /* oracle O2: exactly one */
    moe_finish_reason finish;
    moe_status status;
    char message[MOE_ERROR_MESSAGE_BYTES];
} sim_request;

typedef struct sim_config {
    uint64_t seed;
    const moe_model *model;
    moe_backend *backend;                      /* threads 0 */
    moe_backend *worker_backend;               /* of the workers; NULL: the same */
    moe_backend *own_backend[SIM_MAX_WORKERS]; /* of one worker; NULL: as above */
    const moe_ops *reference;                  /* of the workers' known-answer batches; NULL: none */
    int64_t boot_ns;                           /* 0: until the first map is in use; else so long, whatever comes of it */
    int32_t routers;                           /* at first; 0: 1 */
    bool new_cluster;                          /* the routers need not listen for an older map before the first */
    moe_balance_config balance;
    int32_t workers, replicas, micro_batches, max_num_batched_tokens, num_kv_blocks;
    int32_t pipeline_degree; /* as in moe_engine_config */
    moe_gating gating;
    moe_combine_mode combine;
    moe_expert_budget budget; /* of the routers, and what the workers' devices hold; none: everything */
    moe_placement_kind layout;
    const char *state_dir; /* of the router; NULL: none */
    bool starved;          /* steps may fail for want of memory, and go on afterwards */
    const moe_tier_options *tiers; /* [workers]: those with a device limit have slots, into which copies take a while, as their
                                    * batches do; NULL: none has */
    bool local;            /* local steps with the experts of the only worker, which is never killed */
} sim_config;

typedef struct sim_cluster {
    sim_config config;
    moe_clock clock;
    moe_random random, dice; /* dice: of copies and batches that end */
    char uuid[MOE_UUID_BYTES];
    moe_inproc_hub *hub;
    moe_memory_hub *memory;
    sim_worker workers[SIM_MAX_WORKERS];
    sim_router routers[SIM_MAX_ROUTERS];
    uint64_t newest_epoch;
    bool epoch_fell;     /* oracle O4: never, for any router */
    bool map_incomplete; /* oracle O4: a published map without a READY replica for some expert */
    sim_request requests[SIM_MAX_REQUESTS];
    int32_t num_requests, num_live;
    uint64_t history; /* hash of it so far */
    moe_residency_counts tiers; /* of the workers that have ended */
} sim_cluster;

/* Aborts the test on failure to build. The cluster is returned when its first map is in use. */
sim_cluster *sim_new(const sim_config *config);
void sim_free(sim_cluster **sim);

/* Runs everything for `ns` of virtual time. */
void sim_run(sim_cluster *sim, int64_t ns);
/* Runs until all requests ended; false when that took more than `limit_ns` of virtual time. */
bool sim_run_until_idle(sim_cluster *sim, int64_t limit_ns);
/* Runs until every expert has `replicas` live READY replicas, as every router sees it. */
bool sim_run_until_healed(sim_cluster *sim, int64_t limit_ns);

/* A router dies with all it knows, or (`resigns`) goes as it does after SIGTERM; its live requests are abandoned. Nothing where
 * it is not there. */
void sim_stop_router(sim_cluster *sim, int32_t router, bool resigns);
void sim_start_router(sim_cluster *sim, int32_t router); /* nothing where it is there */

void sim_kill(sim_cluster *sim, int32_t worker);
void sim_restart(sim_cluster *sim, int32_t worker);

/* Submits a greedy request to a router that is there; returns its index, or -1 where the engine refused it (status in *refused).
 */
int32_t sim_submit(sim_cluster *sim, int32_t router, const int32_t *prompt, int32_t prompt_tokens, int32_t max_tokens,
                   moe_status *refused);
