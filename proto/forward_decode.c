/* The validator of the Forward call, both directions. The order is: identity, header fields, exact frame lengths, then contents;
 * nothing is allocated or read before what it depends on holds. */
#include <string.h>

#include "common/alloc.h"
#include "proto/forward.h"

static uint32_t load_u32(const void *array, size_t index) {
    uint32_t value;
    memcpy(&value, (const uint8_t *)array + index * sizeof value, sizeof value);
    return value;
}

static moe_status check_identity(const Moesaic__V1__ForwardRequest *h, const moe_forward_limits *limits, moe_error *err) {
    if (strcmp(h->cluster_uuid, limits->cluster_uuid) != 0) {
        return moe_fail(err, MOE_FAILED_PRECONDITION, "the call is of cluster '%.40s', this worker is of '%.40s'",
                        h->cluster_uuid, limits->cluster_uuid);
    }
    if (h->model_digest != limits->model_digest) {
        return moe_fail(err, MOE_FAILED_PRECONDITION, "the call is of model %016llx, this worker holds %016llx",
                        (unsigned long long)h->model_digest, (unsigned long long)limits->model_digest);
    }
    if (h->incarnation != limits->incarnation) {
        return moe_fail(err, MOE_UNAVAILABLE, "the call was meant for incarnation %016llx, this is its successor %016llx",
                        (unsigned long long)h->incarnation, (unsigned long long)limits->incarnation);
    }
    return MOE_OK;
}

static moe_status check_shape(const Moesaic__V1__ForwardRequest *h, const moe_forward_limits *limits, moe_error *err) {
    if (h->layer >= (uint32_t)limits->num_moe_layers)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "MoE layer %u of %d", h->layer, limits->num_moe_layers);
    if (h->dtype != MOESAIC__V1__DTYPE__FLOAT32 && h->dtype != MOESAIC__V1__DTYPE__BFLOAT16)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "unknown dtype %d", (int)h->dtype);
    if (h->dtype != moe_forward_wire_dtype(limits->dtype)) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s activations, this worker computes in %s; give both the same --dtype",
                        moe_dtype_name(limits->dtype == MOE_F32 ? MOE_BF16 : MOE_F32), moe_dtype_name(limits->dtype));
    }
    if (h->rows < 1 || h->rows > MOE_FORWARD_MAX_ROWS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%u rows, 1 to %d are possible", h->rows, MOE_FORWARD_MAX_ROWS);
    if (h->width != (uint32_t)limits->hidden)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "width %u, the model's hidden size is %d", h->width, limits->hidden);
    uint64_t most = (uint64_t)h->rows * (uint32_t)limits->top_k;
    if (h->assignments < 1 || h->assignments > most) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%u assignments of %u rows, 1 to %llu are possible", h->assignments, h->rows,
                        (unsigned long long)most);
    }
    if (h->block_lo > MOE_FFN_BLOCKS || h->block_hi > MOE_FFN_BLOCKS ||
        !moe_ffn_slice_legal((int32_t)h->block_lo, (int32_t)h->block_hi))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "slice [%u, %u) is not a node of the tree over %d blocks", h->block_lo,
                        h->block_hi, MOE_FFN_BLOCKS);
    if (h->combine != MOESAIC__V1__COMBINE_MODE__EXACT && h->combine != MOESAIC__V1__COMBINE_MODE__PARTIAL)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "unknown combine mode %d", (int)h->combine);
    if (h->n_hint > MOE_FORWARD_MAX_HINTS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%zu hints, at most %d are possible", h->n_hint, MOE_FORWARD_MAX_HINTS);
    for (size_t i = 0; i < h->n_hint; i++) {
        if (h->hint[i] >= (uint32_t)limits->num_experts)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "hint of expert %u of %d", h->hint[i], limits->num_experts);
    }
    return MOE_OK;
}

static moe_status check_frame(const moe_frame *frame, const char *name, size_t rows, size_t width, size_t element_bytes,
                              moe_error *err) {
    size_t count, bytes;
    if (!moe_size_mul(rows, width, &count) || !moe_size_mul(count, element_bytes, &bytes))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%zu x %zu %s overflow", rows, width, name);
    if (frame->size != bytes)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "the frame of %s has %zu bytes, %zu belong to it", name, frame->size, bytes);
    return MOE_OK;
}

static moe_status check_frames(const Moesaic__V1__ForwardRequest *h, const moe_frame *payload, int num_payload, moe_dtype dtype,
                               moe_error *err) {
    static const char *const names[] = {"activations", "assignment rows", "assignment experts", "assignment weights"};
    int expected = h->combine == MOESAIC__V1__COMBINE_MODE__PARTIAL ? 4 : 3;
    if (num_payload != expected)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%d payload frames, the combine mode needs %d", num_payload, expected);
    moe_status status = check_frame(&payload[0], names[0], h->rows, h->width, moe_dtype_bytes(dtype), err);
    for (int i = 1; i < num_payload && status == MOE_OK; i++)
        status = check_frame(&payload[i], names[i], h->assignments, 1, sizeof(uint32_t), err);
    return status;
}

/* Strictly ascending by (expert, row): no assignment twice, and each expert's are together. */
static moe_status check_assignments(const Moesaic__V1__ForwardRequest *h, const moe_frame *payload, int32_t num_experts,
                                    moe_error *err) {
    uint32_t last_row = 0, last_expert = 0;
    for (size_t i = 0; i < h->assignments; i++) {
        uint32_t row = load_u32(payload[1].data, i), expert = load_u32(payload[2].data, i);
        if (row >= h->rows || expert >= (uint32_t)num_experts)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "assignment %zu: row %u of %u, expert %u of %d", i, row, h->rows, expert,
                            num_experts);
        if (i > 0 && (expert < last_expert || (expert == last_expert && row <= last_row)))
            return moe_fail(err, MOE_INVALID_ARGUMENT, "assignment %zu: (%u, %u) does not ascend after (%u, %u) by (expert, row)",
                            i, expert, row, last_expert, last_row);
        last_row = row;
        last_expert = expert;
    }
    return MOE_OK;
}

static bool frame_finite(const moe_frame *frame, moe_dtype dtype) {
    return moe_elements_finite(frame->data, dtype, frame->size / moe_dtype_bytes(dtype));
}

static moe_status check_finite(const moe_frame *payload, int num_payload, moe_dtype dtype, moe_error *err) {
    if (!frame_finite(&payload[0], dtype)) return moe_fail(err, MOE_INVALID_ARGUMENT, "NaN or infinity in the activations");
    if (num_payload == 4 && !frame_finite(&payload[3], MOE_F32))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "NaN or infinity in the assignment weights");
    return MOE_OK;
}

static bool aligned(const void *data) { return (uintptr_t)data % sizeof(uint32_t) == 0; }

/* Takes `size` bytes of the scratch memory for a copy. */
static const void *copy_to(uint8_t **scratch, const void *data, size_t size) {
    void *copy = *scratch;
    memcpy(copy, data, size);
    *scratch += size;
    return copy;
}

/* Lets `out` point at the arrays, by way of aligned copies where needed. */
static moe_status take_arrays(const Moesaic__V1__ForwardRequest *h, const moe_frame *payload, int num_payload,
                              moe_forward_call *out, void **scratch, moe_error *err) {
    const void *arrays[4] = {payload[0].data, payload[1].data, payload[2].data, num_payload == 4 ? payload[3].data : NULL};
    size_t need = h->n_hint * sizeof(uint32_t);
    for (int i = 1; i < num_payload; i++) need += aligned(arrays[i]) ? 0 : payload[i].size;
    if (need > 0) {
        *scratch = moe_calloc(need, 1);
        if (!*scratch) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for %u assignments", h->assignments);
        uint8_t *rest = *scratch;
        if (h->n_hint > 0) out->hints = copy_to(&rest, h->hint, h->n_hint * sizeof(uint32_t));
        for (int i = 1; i < num_payload; i++)
            if (!aligned(arrays[i])) arrays[i] = copy_to(&rest, arrays[i], payload[i].size);
    }
    out->activations = arrays[0];
    out->assignment_rows = arrays[1];
    out->assignment_experts = arrays[2];
    out->assignment_weights = arrays[3];
    return MOE_OK;
}

moe_status moe_forward_decode(const Moesaic__V1__ForwardRequest *header, const moe_frame *payload, int num_payload,
                              const moe_forward_limits *limits, moe_forward_call *out, void **scratch, moe_error *err) {
    *scratch = NULL;
    moe_status status = check_identity(header, limits, err);
    if (status == MOE_OK) status = check_shape(header, limits, err);
    if (status == MOE_OK) status = check_frames(header, payload, num_payload, limits->dtype, err);
    if (status == MOE_OK) status = check_assignments(header, payload, limits->num_experts, err);
    if (status == MOE_OK) status = check_finite(payload, num_payload, limits->dtype, err);
    if (status != MOE_OK) return status;
    *out = (moe_forward_call){
        .epoch = header->epoch,
        .incarnation = header->incarnation,
        .request_id = header->request_id,
        .step = header->step,
        .model_digest = header->model_digest,
        .micro_batch = header->micro_batch,
        .attempt = header->attempt,
        .layer = (int32_t)header->layer,
        .rows = (int32_t)header->rows,
        .assignments = (int32_t)header->assignments,
        .block_lo = (int32_t)header->block_lo,
        .block_hi = (int32_t)header->block_hi,
        .combine = num_payload == 4 ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT,
        .cluster_uuid = limits->cluster_uuid,
        .num_hints = (int32_t)header->n_hint,
        .dtype = limits->dtype,
    };
    return take_arrays(header, payload, num_payload, out, scratch, err);
}

moe_status moe_forward_decode_reply(const moe_rpc_reply *reply, const moe_forward_expected *want, moe_forward_result *out,
                                    moe_error *err) {
    if (reply->status != MOE_OK) return moe_fail(err, reply->status, "%s", reply->message);
    MOE_ASSERT(reply->body && reply->body->descriptor == &moesaic__v1__forward_response__descriptor);
    const Moesaic__V1__ForwardResponse *h = (const Moesaic__V1__ForwardResponse *)reply->body;
    if (h->incarnation != want->incarnation) {
        return moe_fail(err, MOE_UNAVAILABLE, "answered by incarnation %016llx, %016llx was asked",
                        (unsigned long long)h->incarnation, (unsigned long long)want->incarnation);
    }
    if (h->dtype != moe_forward_wire_dtype(want->dtype) || h->rows != (uint32_t)want->rows || h->width != (uint32_t)want->width) {
        return moe_fail(err, MOE_DATA_LOSS, "a result of dtype %d, %u x %u; %s, %d x %d were asked for", (int)h->dtype, h->rows,
                        h->width, moe_dtype_name(want->dtype), want->rows, want->width);
    }
    if (reply->num_payload != 1) return moe_fail(err, MOE_DATA_LOSS, "a result in %d frames, not one", reply->num_payload);
    moe_status status = check_frame(&reply->payload[0], "results", h->rows, h->width, moe_dtype_bytes(want->dtype), err);
    if (status != MOE_OK) return moe_fail_prefix(err, MOE_DATA_LOSS, "a broken result");
    if (!frame_finite(&reply->payload[0], want->dtype))
        return moe_fail(err, MOE_DATA_LOSS, "NaN or infinity in a result of incarnation %016llx",
                        (unsigned long long)want->incarnation);
    *out = (moe_forward_result){
        .incarnation = h->incarnation,
        .epoch = h->epoch,
        .shard_digest = h->shard_digest,
        .compute_ns = h->compute_ns,
        .copy_ns = h->copy_ns,
        .queue_ns = h->queue_ns,
        .dtype = want->dtype,
        .out = reply->payload[0].data,
    };
    if (h->residency)
        out->residency = (moe_forward_residency){true,
                                                 h->residency->hits,
                                                 h->residency->late_hits,
                                                 h->residency->misses,
                                                 h->residency->copied_bytes,
                                                 h->residency->wasted_bytes,
                                                 h->residency->stall_ns,
                                                 h->residency->host_experts,
                                                 h->residency->host_rows,
                                                 h->residency->host_ns};
    return MOE_OK;
}

moe_status moe_prefetch_check(const Moesaic__V1__PrefetchRequest *r, const moe_forward_limits *limits, moe_error *err) {
    if (r->incarnation != limits->incarnation)
        return moe_fail(err, MOE_UNAVAILABLE, "the call is for another incarnation of this worker");
    if (r->layer >= (uint32_t)limits->num_moe_layers)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "MoE layer %u of %d", r->layer, limits->num_moe_layers);
    if (r->n_expert > MOE_FORWARD_MAX_HINTS || r->n_retired > MOE_FORWARD_MAX_HINTS)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%zu hints and %zu retired experts, at most %d of each are possible", r->n_expert,
                        r->n_retired, MOE_FORWARD_MAX_HINTS);
    for (size_t i = 0; i < r->n_expert; i++)
        if (r->expert[i] >= (uint32_t)limits->num_experts)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "hint of expert %u of %d", r->expert[i], limits->num_experts);
    for (size_t i = 0; i < r->n_retired; i++)
        if (r->retired[i] >= (uint32_t)limits->num_experts)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "expert %u of %d is retired", r->retired[i], limits->num_experts);
    return MOE_OK;
}
