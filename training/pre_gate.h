/* Training of pre-gates: matrices that tell from what layer L's gate is given which experts layer L + 1 will choose (Hwang et
 * al., "Pre-gated MoE", ISCA 2024). Each is fitted to the next gate's distribution over the experts by the mean of KL(gate ‖
 * pre-gate), with AdamW on shuffled minibatches; the learning rate falls to 0 along a half cosine. What has the least KL on
 * held-out tokens stays. The result follows from samples, settings and seed, not from the number of threads. */
#pragma once
#include "training/samples.h"

#define MOE_PRE_GATE_BATCH_TOKENS 256
#define MOE_PRE_GATE_WEIGHT_DECAY 0.01f
#define MOE_PRE_GATE_PATIENCE 3 /* epochs without a better held-out KL, after which a layer is done */

typedef struct moe_pre_gate_config {
    int32_t num_layers, num_experts, hidden; /* MoE layers, as in the samples; at least 2 */
    const float *gates;                      /* [num_layers, num_experts, hidden], the model's */
    const moe_samples *train, *held_out;
    int32_t epochs, threads;
    float lr;
    uint64_t seed;
    void (*progress)(void *ctx, int64_t done,
                     int64_t total); /* minibatches; one thread at a time, not always the same; may be NULL */
    void *progress_ctx;
} moe_pre_gate_config;

typedef struct moe_pre_gate_fit {
    double kl_before,
        kl_after;   /* nats on the held-out tokens: of the next layer's gate, from which training starts; of what stayed */
    int32_t epochs; /* until then */
} moe_pre_gate_fit;

/* weights [num_layers - 1, num_experts, hidden], fits [num_layers - 1], the caller's. FAILED_PRECONDITION (no tokens in a set),
 * RESOURCE_EXHAUSTED. Blocks. */
moe_status moe_pre_gates_train(const moe_pre_gate_config *config, float *weights, moe_pre_gate_fit *fits, moe_error *err);
