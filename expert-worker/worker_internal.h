/* What the files of the worker share. */
#pragma once
#include "expert-worker/batcher.h"
#include "expert-worker/control.h"
#include "expert-worker/kept_map.h"
#include "expert-worker/layer_runs.h"
#include "expert-worker/worker.h"

#define MOE_WORKER_MAX_ROUTERS 256 /* connections of routers that are counted */

struct moe_worker {
    moe_worker_config config;
    moe_peer routers[MOE_WORKER_MAX_ROUTERS]; /* that are connected */
    int32_t num_routers;
    _Atomic bool leaving;
    moe_rpc *rpc;
    moe_residency *residency; /* NULL: every expert that is held is on the device */
    moe_residency_counts told; /* that answers have reported, or metrics */
    moe_shard shard;
    moe_batcher batcher;
    moe_layer_runs runs; /* of the engine in this process */
    moe_control control;
    moe_kept_map map;

    pthread_mutex_t view_mutex;
    moe_worker_view view; /* guarded by view_mutex */

    pthread_t thread;
    bool has_thread;
    _Atomic bool stop;
};

/* service.c: the methods that the worker serves, for moe_rpc_config; their context is the worker. */
extern const moe_rpc_method moe_worker_methods[];

/* The batcher's answer callback. */
void moe_worker_answer_forward(void *ctx, moe_work *work);

/* The runs' `told`. */
void moe_worker_layer_told(void *ctx, const moe_layer_call *call);

uint64_t moe_worker_progress(void *ctx);
moe_status moe_worker_on_peer_up(void *ctx, const moe_rpc_peer *peer, moe_error *err);
void moe_worker_on_peer_down(void *ctx, const moe_rpc_peer *peer);
