/* The Forward call's sending side: calls and answers. */
#include "proto/forward.h"

#include "common/metrics.h"

static Moesaic__V1__CombineMode wire_mode(moe_combine_mode mode) {
    return mode == MOE_COMBINE_PARTIAL ? MOESAIC__V1__COMBINE_MODE__PARTIAL : MOESAIC__V1__COMBINE_MODE__EXACT;
}

moe_status moe_forward_start(moe_rpc *rpc, moe_peer peer, const moe_forward_call *call, int32_t width, int64_t deadline_ns,
                             moe_rpc_on_reply on_reply, void *ctx, uint64_t *call_id, moe_error *err) {
    MOE_ASSERT(call->rows > 0 && call->assignments > 0 && width > 0 && call->num_hints >= 0);
    Moesaic__V1__ForwardRequest header = MOESAIC__V1__FORWARD_REQUEST__INIT;
    header.cluster_uuid = (char *)call->cluster_uuid;
    header.epoch = call->epoch;
    header.incarnation = call->incarnation;
    header.request_id = call->request_id;
    header.step = call->step;
    header.micro_batch = call->micro_batch;
    header.attempt = call->attempt;
    header.layer = (uint32_t)call->layer;
    header.dtype = moe_forward_wire_dtype(call->dtype);
    header.rows = (uint32_t)call->rows;
    header.width = (uint32_t)width;
    header.assignments = (uint32_t)call->assignments;
    header.block_lo = (uint32_t)call->block_lo;
    header.block_hi = (uint32_t)call->block_hi;
    header.combine = wire_mode(call->combine);
    header.model_digest = call->model_digest;
    header.n_hint = (size_t)call->num_hints;
    header.hint = (uint32_t *)call->hints;
    size_t rows = (size_t)call->rows, assignments = (size_t)call->assignments, row_bytes = moe_row_bytes(call->dtype, width);
    const moe_frame payload[4] = {
        {call->activations, rows * row_bytes, call->activation_rows, row_bytes},
        {.data = call->assignment_rows, .size = assignments * sizeof(uint32_t)},
        {.data = call->assignment_experts, .size = assignments * sizeof(uint32_t)},
        {.data = call->assignment_weights, .size = assignments * sizeof(float)},
    };
    int num_payload = call->combine == MOE_COMBINE_PARTIAL ? 4 : 3;
    return moe_rpc_call_start(rpc, peer, MOE_FORWARD_METHOD, (const ProtobufCMessage *)&header, payload, num_payload, deadline_ns,
                              on_reply, ctx, call_id, err);
}

void moe_forward_respond(moe_rpc_call *call, const moe_forward_result *result, int32_t out_rows, int32_t width) {
    MOE_ASSERT(out_rows > 0 && width > 0);
    Moesaic__V1__ForwardResponse header = MOESAIC__V1__FORWARD_RESPONSE__INIT;
    header.incarnation = result->incarnation;
    header.epoch = result->epoch;
    header.shard_digest = result->shard_digest;
    header.dtype = moe_forward_wire_dtype(result->dtype);
    header.rows = (uint32_t)out_rows;
    header.width = (uint32_t)width;
    header.compute_ns = result->compute_ns;
    header.copy_ns = result->copy_ns;
    header.queue_ns = result->queue_ns;
    Moesaic__V1__ResidencyReport residency = MOESAIC__V1__RESIDENCY_REPORT__INIT;
    residency.hits = result->residency.hits;
    residency.late_hits = result->residency.late_hits;
    residency.misses = result->residency.misses;
    residency.copied_bytes = result->residency.copied_bytes;
    residency.wasted_bytes = result->residency.wasted_bytes;
    residency.stall_ns = result->residency.stall_ns;
    residency.host_experts = result->residency.host_experts;
    residency.host_rows = result->residency.host_rows;
    residency.host_ns = result->residency.host_ns;
    if (result->residency.present) header.residency = &residency;
    const moe_frame payload = {.data = result->out, .size = (size_t)out_rows * moe_row_bytes(result->dtype, width)};
    moe_rpc_respond(call, (const ProtobufCMessage *)&header, &payload, 1);
}

static void ignore_reply(void *ctx, const moe_rpc_reply *reply) {
    (void)ctx;
    (void)reply;
}

moe_status moe_prefetch_start(moe_rpc *rpc, moe_peer peer, const moe_prefetch_call *call, int64_t deadline_ns,
                              moe_rpc_on_reply on_reply, void *ctx, moe_error *err) {
    Moesaic__V1__PrefetchRequest request = MOESAIC__V1__PREFETCH_REQUEST__INIT;
    request.incarnation = call->incarnation;
    request.step = call->step;
    request.micro_batch = call->micro_batch;
    request.layer = (uint32_t)call->layer;
    request.n_expert = (size_t)call->num_experts;
    request.expert = (uint32_t *)(uintptr_t)call->experts;
    request.n_retired = (size_t)call->num_retired;
    request.retired = (uint32_t *)(uintptr_t)call->retired;
    return moe_rpc_call_start(rpc, peer, MOE_PREFETCH_METHOD, (const ProtobufCMessage *)&request, NULL, 0, deadline_ns,
                              on_reply ? on_reply : ignore_reply, ctx, NULL, err);
}

void moe_forward_residency_count(const moe_forward_residency *told, int32_t layer) {
    moe_metric_add(MOE_METRIC_EXPERT_HITS, (int64_t)told->hits);
    moe_metric_add(MOE_METRIC_EXPERT_LATE_HITS, (int64_t)told->late_hits);
    moe_metric_add(MOE_METRIC_EXPERT_MISSES, (int64_t)told->misses);
    if (layer == 0) moe_metric_add(MOE_METRIC_EXPERT_FIRST_MISSES, (int64_t)told->misses);
    moe_metric_add(MOE_METRIC_EXPERT_COPIED_BYTES, (int64_t)told->copied_bytes);
    moe_metric_add(MOE_METRIC_EXPERT_WASTED_BYTES, (int64_t)told->wasted_bytes);
    moe_metric_add(MOE_METRIC_EXPERT_HOST, (int64_t)told->host_experts);
    moe_metric_add(MOE_METRIC_EXPERT_HOST_ROWS, (int64_t)told->host_rows);
}
