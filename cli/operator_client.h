/* A router's RPC front as an operator calls it: one connection, unary calls one after another. */
#pragma once
#include "cli/implementations.h"
#include "common/options.h"
#include "proto/rpc.h"

typedef struct moe_operator_client {
    moe_transport *transport;
    moe_rpc *rpc;
    uint64_t link;
} moe_operator_client;

/* Connects to the router of --cluster DIR, or to --router ENDPOINT with --keys; waits for its hello. INVALID_ARGUMENT,
 * UNAVAILABLE. Close it in any case. */
moe_status moe_operator_open(const moe_options *options, moe_operator_client *client, moe_error *err);
void moe_operator_close(moe_operator_client *client); /* idempotent */

/* Calls and waits; `on_response` is given the response of an OK answer, borrowed. The error is the call's own. */
moe_status moe_operator_call(moe_operator_client *client, const char *method, const ProtobufCMessage *request,
                             void (*on_response)(void *ctx, const ProtobufCMessage *response), void *ctx, moe_error *err);
