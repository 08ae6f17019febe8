/* Routers' placement controllers and make-believe workers on one fake clock, one store and one in-process transport, driven step
 * by step. Checks the placement invariants on every map that any router is given. */
#pragma once
#include "common/inproc/inproc.h"
#include "common/memory/memory_store.h"
#include "expert-worker/registry.h"
#include "proto/rpc.h"
#include "router/placement/controller.h"

#define PC_MAX_ROUTERS 4
#define PC_MAX_WORKERS 12
#define PC_LAYERS 3
#define PC_EXPERTS 40 /* more than one Load call holds */
#define PC_MODEL UINT64_C(0x1234)
#define PC_STEP_NS (10 * MOE_NS_PER_MS)

typedef struct pc_cluster pc_cluster;

typedef struct pc_router {
    pc_cluster *cluster;
    moe_store *store;
    moe_transport *transport;
    moe_controller *controller;
    uint64_t epoch, fence;   /* of the newest map given to it in this life */
    uint64_t published_hash; /* of the newest map that was not a rejoin's */
    moe_placement *map;
    int32_t num_maps; /* given, in all */
    /* What its steps route by: the map, but some time later (lag_ns). */
    moe_placement *routed;
    int64_t given_ns, lag_ns;
    bool cut_off; /* from the store */
} pc_router;

typedef struct pc_worker {
    pc_cluster *cluster;
    bool alive;
    char id[MOE_WORKER_ID_BYTES];
    uint64_t incarnation, fence;
    moe_store *store;
    moe_transport *transport;
    moe_rpc *rpc;
    moe_registration *registration;
    bool held[PC_LAYERS * PC_EXPERTS];
    uint64_t rows[PC_LAYERS * PC_EXPERTS], calls[PC_LAYERS * PC_EXPERTS];
    uint64_t holdings;
    bool leaving;
    int32_t loads, drops; /* calls */
    uint64_t map_epoch, map_fence;
    moe_buf map; /* as the leader handed it over */
    /* behaviour, kept over restarts */
    uint64_t digest_salt; /* not 0: its weights differ */
    bool stalls;          /* Load calls wait */
    bool fails;           /* Load calls fail */
    uint64_t first_fence; /* what a fresh process believes to have seen */
    int64_t capacity_experts;
    uint64_t model_digest;
    const char *profile;
    struct {
        moe_rpc_call *call;
        int32_t count, experts[64];
    } waiting[8];
    int32_t num_waiting;
} pc_worker;

struct pc_cluster {
    moe_clock clock;
    moe_memory_hub *store_hub;
    moe_inproc_hub *hub;
    moe_store *store; /* the test's own client */
    int32_t replicas, initial_workers;
    bool new_cluster; /* told to routers that start from now on */
    bool moving;      /* experts move: maps may have more replicas than wanted, or fewer after a death; workers serve Stats and Drop */
    const uint64_t *expert_digests; /* the manifest, likewise; NULL: none */
    moe_balance_config balance; /* told to routers that start from now on */
    bool may_lose_history;
    const char *uuid;
    const char *state_dirs[PC_MAX_ROUTERS]; /* NULL: none */
    uint64_t next_incarnation;
    uint64_t newest_epoch; /* of the maps checked while experts move */
    pc_router routers[PC_MAX_ROUTERS];
    pc_worker workers[PC_MAX_WORKERS];
    moe_controller_view view; /* of the newest pc_view */
};

void pc_open(pc_cluster *c, int32_t replicas, int32_t initial_workers);
void pc_open_on(pc_cluster *c, const moe_clock *clock, int32_t replicas, int32_t initial_workers); /* the clock is copied */
void pc_close(pc_cluster *c);

void pc_router_start(pc_cluster *c, int32_t r);
void pc_router_crash(pc_cluster *c, int32_t r);
void pc_router_cut_off(pc_cluster *c, int32_t r, bool cut_off); /* from the store, alone */
void pc_router_config(pc_cluster *c, int32_t r, moe_controller_config *out); /* opens its store and transport */

void pc_worker_start(pc_cluster *c, int32_t w); /* id "w<w>" at inproc:w<w>, a fresh incarnation */
void pc_worker_crash(pc_cluster *c, int32_t w);
void pc_worker_release(pc_cluster *c, int32_t w); /* answers the waiting Load calls; no more stalling */

void pc_step(pc_cluster *c); /* PC_STEP_NS of everything */
void pc_run_ms(pc_cluster *c, int64_t ms);
/* Steps until `done` holds; the test fails after max_ms of fake time. */
void pc_run_until(pc_cluster *c, bool (*done)(pc_cluster *c), int64_t max_ms);

const moe_controller_view *pc_view(pc_cluster *c, int32_t r);
moe_worker_state pc_state(pc_cluster *c, int32_t r, const char *id);
/* Every running router serves one same map in which every worker runs, registered, and holds its share. */
bool pc_settled(pc_cluster *c);
/* And no worker holds more than its share. */
bool pc_tidy(pc_cluster *c);
int32_t pc_leader(pc_cluster *c); /* -1: none */
/* The replicas of an expert compute so much more, shared evenly. */
void pc_compute(pc_cluster *c, int32_t expert, uint64_t rows, uint64_t calls);
