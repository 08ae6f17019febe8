/* The RPC front: InferenceService, ClusterService and Health over the engine, on a transport and in a thread of its own. */
#pragma once
#include "proto/rpc.h"
#include "router/inference.h"
#include "router/status.h"

typedef struct moe_rpc_front moe_rpc_front;

typedef struct moe_rpc_front_config {
    moe_transport *transport; /* borrowed: listening already; the front's thread's from start to stop */
    const moe_clock *clock;
    moe_rpc_hello hello;
    const moe_inference *inference;
    const moe_cluster_view *cluster; /* NULL: ClusterService answers UNIMPLEMENTED */
} moe_rpc_front_config;              /* all that it points to is borrowed for the front's life */

moe_status moe_rpc_front_start(const moe_rpc_front_config *config, moe_rpc_front **out, moe_error *err);
/* Any thread: from now on Generate is answered UNAVAILABLE and Health says NOT_SERVING; calls in flight go on. */
void moe_rpc_front_drain(moe_rpc_front *front);
/* Cancels what is in flight, ends the thread, frees. NULLs; idempotent. Call it before the engine is freed. */
void moe_rpc_front_stop(moe_rpc_front **front);
