/* The RPC front's own state, for the files of this folder. */
#pragma once
#include <pthread.h>
#include <stdatomic.h>

#include "router/generation.h"
#include "router/rpc/rpc_front.h"

struct moe_rpc_front {
    moe_rpc_front_config config;
    moe_rpc *rpc;
    moe_generation_queue *queue;
    pthread_t thread;
    bool thread_runs;
    _Atomic bool draining, stopping;
};

/* Handlers; `ctx` is the front. */
void moe_rpc_handle_generate(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                             int num_payload);
void moe_rpc_handle_tokenize(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                             int num_payload);
void moe_rpc_handle_models(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);
void moe_rpc_handle_status(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);
void moe_rpc_handle_workers(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                            int num_payload);
void moe_rpc_handle_plan(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);
void moe_rpc_handle_move(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);
void moe_rpc_handle_replicate(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);
void moe_rpc_handle_drain(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);
void moe_rpc_handle_undrain(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);
void moe_rpc_handle_rebalance(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);
void moe_rpc_handle_health(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload);

/* The queue's callback; `user` is what moe_rpc_handle_generate started it with. */
void moe_rpc_on_output(void *user, const moe_output *output);
