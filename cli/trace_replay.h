/* What a worker with fewer slots than experts would do on a routing trace: its own eviction policies, with copies that take no
 * time. `requests` texts are decoded at once, a token of each in a step; one that ends is followed by the next.
 *
 * At a layer, experts that are in a slot are hits; the others are copied in. While the layer computes, what is foretold of the
 * next one is copied in (under hint and pre-gate), unless that would evict what is needed now or foretold. */
#pragma once
#include "cli/trace.h"
#include "router/engine/engine.h"

typedef struct moe_replay_config {
    moe_gating gating;
    const char *policy;
    double part;      /* of all experts that have a slot */
    int32_t requests; /* at least 1 */
} moe_replay_config;

typedef struct moe_replay_result {
    int32_t slots;
    int64_t tokens, uses, hits;    /* an expert that several tokens of a step want counts once */
    int64_t copies, wasted_copies; /* wasted: evicted unused */
} moe_replay_result;

/* The slots of a part: at least top_k + 1, at most all experts. */
int32_t moe_replay_slots(const moe_trace *trace, double part);

/* FAILED_PRECONDITION: pre-gates, which the trace lacks; INVALID_ARGUMENT: the policy; RESOURCE_EXHAUSTED. */
moe_status moe_replay(const moe_trace *trace, const moe_replay_config *config, moe_replay_result *out, moe_error *err);
