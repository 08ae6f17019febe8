/* ClusterService's calls about where experts are: what the policy would do, and what operators ask for. */
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "router/rpc/rpc_front_internal.h"

static void respond_plan(moe_rpc_call *call, const moe_step_view *steps, int32_t count, uint64_t epoch) {
    Moesaic__V1__PlanResponse response = MOESAIC__V1__PLAN_RESPONSE__INIT;
    Moesaic__V1__PlanStep messages[MOE_VIEW_MAX_STEPS], *pointers[MOE_VIEW_MAX_STEPS];
    for (int32_t i = 0; i < count; i++) {
        moesaic__v1__plan_step__init(&messages[i]);
        messages[i].layer = (uint32_t)steps[i].layer;
        messages[i].expert = (uint32_t)steps[i].expert;
        messages[i].from = (char *)steps[i].from;
        messages[i].to = (char *)steps[i].to;
        messages[i].text = (char *)steps[i].text;
        pointers[i] = &messages[i];
    }
    response.steps = pointers;
    response.n_steps = (size_t)count;
    response.epoch = epoch;
    moe_rpc_respond(call, &response.base, NULL, 0);
}

void moe_rpc_handle_plan(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                         int num_payload) {
    (void)request, (void)payload, (void)num_payload;
    const moe_cluster_view *cluster = ((moe_rpc_front *)ctx)->config.cluster;
    moe_step_view *steps = moe_calloc(MOE_VIEW_MAX_STEPS, sizeof *steps);
    int32_t count = 0;
    uint64_t epoch = 0;
    moe_error err;
    moe_status status = !steps                       ? moe_fail(&err, MOE_RESOURCE_EXHAUSTED, "out of memory")
                        : !cluster || !cluster->plan ? moe_fail(&err, MOE_UNIMPLEMENTED, "this router places no experts")
                                                     : cluster->plan(cluster->ctx, steps, &count, &epoch, &err);
    if (status == MOE_OK)
        respond_plan(call, steps, count, epoch);
    else
        moe_rpc_fail(call, status, err.message, NULL);
    moe_free(steps);
}

static bool fits(const char *text, size_t capacity) { return strlen(text) < capacity; }

static moe_status read_operation(const Moesaic__V1__OperationRequest *r, moe_operation *op, moe_error *err) {
    if (!fits(r->id, sizeof op->id) || !fits(r->from, sizeof op->from) || !fits(r->to, sizeof op->to) || r->layer > INT32_MAX ||
        r->expert > INT32_MAX)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "an id or a worker's name is too long, or a number too large");
    snprintf(op->id, sizeof op->id, "%s", r->id);
    snprintf(op->from, sizeof op->from, "%s", r->from);
    snprintf(op->to, sizeof op->to, "%s", r->to);
    op->layer = (int32_t)r->layer;
    op->expert = (int32_t)r->expert;
    return MOE_OK;
}

static void handle(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, moe_operation_kind kind) {
    const moe_cluster_view *cluster = ((moe_rpc_front *)ctx)->config.cluster;
    moe_operation op = {.kind = kind};
    char id[MOE_OPERATION_ID_BYTES];
    moe_error err;
    moe_status status = read_operation((const Moesaic__V1__OperationRequest *)request, &op, &err);
    if (status == MOE_OK && (!cluster || !cluster->submit))
        status = moe_fail(&err, MOE_UNIMPLEMENTED, "this router places no experts");
    if (status == MOE_OK) status = cluster->submit(cluster->ctx, &op, id, &err);
    if (status == MOE_OK) {
        Moesaic__V1__OperationResponse response = MOESAIC__V1__OPERATION_RESPONSE__INIT;
        response.id = id;
        moe_rpc_respond(call, &response.base, NULL, 0);
    } else {
        moe_rpc_fail(call, status, err.message, NULL);
    }
}

void moe_rpc_handle_move(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload) {
    (void)payload, (void)num_payload;
    handle(ctx, call, request, MOE_OP_MOVE);
}

void moe_rpc_handle_replicate(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload) {
    (void)payload, (void)num_payload;
    handle(ctx, call, request, MOE_OP_REPLICATE);
}

void moe_rpc_handle_drain(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload) {
    (void)payload, (void)num_payload;
    handle(ctx, call, request, MOE_OP_DRAIN);
}

void moe_rpc_handle_undrain(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload) {
    (void)payload, (void)num_payload;
    handle(ctx, call, request, MOE_OP_UNDRAIN);
}

void moe_rpc_handle_rebalance(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                           int num_payload) {
    (void)payload, (void)num_payload;
    handle(ctx, call, request, MOE_OP_REBALANCE);
}
