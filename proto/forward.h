/* The Forward call as plain data: encoding, and the one validator of both directions.
 *
 * The validator checks counts, checked products, enum values, expert ids and exact frame lengths against the receiver's own
 * limits before anything is allocated or read. */
#pragma once
#include "common/backend.h"
#include "common/elements.h"
#include "proto/rpc.h"

#define MOE_FORWARD_METHOD "/moesaic.v1.ExpertService/Forward"
#define MOE_PREFETCH_METHOD "/moesaic.v1.ExpertService/Prefetch"
#define MOE_FORWARD_MAX_ROWS 65536
#define MOE_FORWARD_MAX_HINTS 1024

/* What a receiver knows, to check against. */
typedef struct moe_forward_limits {
    int32_t num_moe_layers, num_experts, top_k, hidden;
    uint64_t model_digest;
    const char *cluster_uuid;
    uint64_t incarnation; /* the worker's own */
    moe_dtype dtype;      /* of its numeric profile */
} moe_forward_limits;

typedef struct moe_forward_call {
    uint64_t epoch, incarnation, request_id, step, model_digest;
    uint32_t micro_batch, attempt;
    int32_t layer; /* among MoE layers */
    int32_t rows, assignments;
    int32_t block_lo, block_hi;
    moe_combine_mode combine;
    const char *cluster_uuid; /* when decoded: the limits' */
    int32_t num_hints;
    const uint32_t *hints;
    moe_dtype dtype; /* of the activations: that of caller's and worker's numeric profiles */
    /* payload; when decoded these point into the message (activations possibly unaligned) */
    const void *activations;            /* [rows, hidden] of dtype */
    const int32_t *activation_rows;     /* to send: [rows], which rows of a larger `activations`; NULL: the first ones */
    const uint32_t *assignment_rows;    /* [assignments] */
    const uint32_t *assignment_experts; /* [assignments], strictly ascending by (expert, row) */
    const float *assignment_weights;    /* [assignments]; NULL in exact mode */
} moe_forward_call;

/* What happened in a worker's tiers since its last answer; see ResidencyReport. */
typedef struct moe_forward_residency {
    bool present; /* false: all of the worker's experts are on its device */
    uint64_t hits, late_hits, misses, copied_bytes, wasted_bytes, stall_ns;
    uint64_t host_experts, host_rows, host_ns;
} moe_forward_residency;

/* Adds the experts and bytes that it tells of, of a call of MoE layer `layer`, to this process's metrics. */
void moe_forward_residency_count(const moe_forward_residency *told, int32_t layer);

typedef struct moe_forward_result {
    uint64_t incarnation, epoch, shard_digest, compute_ns, copy_ns, queue_ns;
    moe_dtype dtype; /* of out: moe_expert_output_dtype */
    const void *out; /* exact [assignments, hidden], partial [rows, hidden]; when decoded possibly unaligned */
    moe_forward_residency residency;
} moe_forward_result;

/* Announces experts to a worker; a hint that rides in no Forward call. */
typedef struct moe_prefetch_call {
    uint64_t incarnation, step;
    uint32_t micro_batch;
    int32_t layer; /* of the experts */
    int32_t num_experts; /* at most MOE_FORWARD_MAX_HINTS */
    const uint32_t *experts;
    int32_t num_retired; /* as in PrefetchRequest */
    const uint32_t *retired;
} moe_prefetch_call;
/* on_reply NULL: nothing waits for the answer. */
moe_status moe_prefetch_start(moe_rpc *rpc, moe_peer peer, const moe_prefetch_call *call, int64_t deadline_ns,
                              moe_rpc_on_reply on_reply, void *ctx, moe_error *err);
/* Worker side: OK where the request fits the limits, else INVALID_ARGUMENT, or UNAVAILABLE for another incarnation. */
moe_status moe_prefetch_check(const Moesaic__V1__PrefetchRequest *request, const moe_forward_limits *limits, moe_error *err);

/* Sends the call to `peer`; see moe_rpc_call_start. `width` is the hidden size. Counts and width are positive, partial mode has
 * weights; the worker, not this function, checks the contents. */
moe_status moe_forward_start(moe_rpc *rpc, moe_peer peer, const moe_forward_call *call, int32_t width, int64_t deadline_ns,
                             moe_rpc_on_reply on_reply, void *ctx, uint64_t *call_id, moe_error *err);

/* Worker side: checks a received request. The routing arrays are copied to aligned memory where the message is not aligned;
 * *scratch owns that copy and the hints (moe_free it after the call was used). NaN or infinity in activations or weights is
 * INVALID_ARGUMENT, as is all else that does not fit the limits, activations of another dtype too. A wrong cluster or model is
 * FAILED_PRECONDITION, a wrong incarnation UNAVAILABLE. On error *scratch is NULL. */
moe_status moe_forward_decode(const Moesaic__V1__ForwardRequest *header, const moe_frame *payload, int num_payload,
                              const moe_forward_limits *limits, moe_forward_call *out, void **scratch, moe_error *err);

/* Worker side: answers. `out_rows` is assignments or rows, by mode. */
void moe_forward_respond(moe_rpc_call *call, const moe_forward_result *result, int32_t out_rows, int32_t width);

/* What the answer to a call must be. */
typedef struct moe_forward_expected {
    moe_dtype dtype; /* moe_expert_output_dtype of the call */
    int32_t rows, width;
    uint64_t incarnation; /* that was asked */
} moe_forward_expected;

/* Router side: checks a reply with status OK against the call it answers: dtype, shape, exact length, finite values only (else
 * DATA_LOSS), the worker that was asked (else UNAVAILABLE). Another status is returned as it is. `out->out` points into the
 * reply. */
moe_status moe_forward_decode_reply(const moe_rpc_reply *reply, const moe_forward_expected *expected, moe_forward_result *out,
                                    moe_error *err);

/* The wire's name of an element type that payloads may have. */
static inline Moesaic__V1__DType moe_forward_wire_dtype(moe_dtype dtype) {
    return dtype == MOE_BF16 ? MOESAIC__V1__DTYPE__BFLOAT16 : MOESAIC__V1__DTYPE__FLOAT32;
}
