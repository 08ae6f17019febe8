/* The experts of this process on micro-batches where they are: no messages, no payloads; though not every expert may be on the device.
 * The router's engine calls, expert-worker/layer_runs.h computes. All on the engine's thread. */
#pragma once
#include "common/backend.h"

/* One MoE layer of a micro-batch. The caller's; in place until `ended`. */
typedef struct moe_layer_call {
    /* set by the caller before `begin` */
    moe_base *base; /* the model's base layers, as layer_ffn_submit wants them */
    uint64_t step; /* tells forward steps apart */
    int32_t layer; /* MoE layer */
    int32_t num_rows;
    moe_rows *rows;
    const int32_t *experts; /* [num_rows, top_k], as in moe_layer_ffn; stays until ended */
    /* What the layer's experts are given, [num_rows, H] of the backend's dtype, host: where `wants_activations`, as soon as the
     * layer's segment has ended; it may be set after begin. NULL until then. */
    const void *activations;
    int64_t given_ns; /* when that segment was seen to have ended: waits count as stalls from then on; 0: it has not yet */

    /* set by the other side, perhaps inside `begin` */
    bool submitted; /* everything is with the backend: the next segment may be submitted */
    bool ended;     /* and has been computed, or failed; nothing refers to the call any more */
    moe_status status; /* not OK: the layer's outputs are of no use. May be set long before `ended`; then `submitted` never is */
    int64_t expert_ns, stall_ns, host_ns; /* once ended: computation of the device, waits for experts, computation of the host */
    char message[256];
    struct moe_layer_call *next; /* while it waits for its turn; the other side's */
} moe_layer_call;

typedef struct moe_layer_experts_ops {
    /* Whether calls can be made: every expert is held by this process. May change from one step to the next, not within one. */
    bool (*ready)(void *ctx);
    /* Whether calls need `activations`. */
    bool (*wants_activations)(void *ctx);
    /* `step` will probably want these experts of the layer. Nothing where all are on the device. */
    void (*foretell)(void *ctx, uint64_t step, int32_t layer, const uint32_t *experts, int32_t count);
    /* The layer's segment was submitted, not more: the call begins. Experts are computed as they come, by `turn`. */
    void (*begin)(void *ctx, moe_layer_call *call);
    /* Takes in what ended, begins what can begin. True: there is more to do at once, do not sleep. */
    bool (*turn)(void *ctx);
} moe_layer_experts_ops;

typedef struct moe_layer_experts {
    const moe_layer_experts_ops *ops;
    void *ctx;
} moe_layer_experts;
