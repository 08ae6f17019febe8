#include "common/model/gate.h"

#include <math.h>

void moe_gate_softmax(const float *logits, int32_t count, float *probabilities) {
    float highest = -INFINITY, sum = 0;
    for (int32_t i = 0; i < count; i++) highest = fmaxf(highest, logits[i]);
    for (int32_t i = 0; i < count; i++) sum += probabilities[i] = expf(logits[i] - highest);
    for (int32_t i = 0; i < count; i++) probabilities[i] /= sum;
}

static void choose(const float *logits, int32_t num_experts, int32_t top_k, bool *chosen) {
    for (int32_t j = 0; j < top_k; j++) {
        int32_t best = -1;
        float best_logit = 0;
        for (int32_t e = 0; e < num_experts; e++) {
            float logit = isnan(logits[e]) ? -INFINITY : logits[e];
            if (chosen[e] || (best >= 0 && logit <= best_logit)) continue;
            best = e;
            best_logit = logit;
        }
        chosen[best] = true;
    }
}

void moe_gate_topk(moe_softmax softmax, const float *logits, int32_t num_experts, int32_t top_k, bool norm_topk, int32_t *experts,
                   float *weights) {
    float probabilities[MOE_MAX_EXPERTS], sum = 0;
    bool chosen[MOE_MAX_EXPERTS] = {false};
    MOE_ASSERT(num_experts <= MOE_MAX_EXPERTS && top_k > 0 && top_k <= num_experts);
    choose(logits, num_experts, top_k, chosen);
    softmax(logits, num_experts, probabilities);
    for (int32_t e = 0, j = 0; j < top_k; e++) {
        if (!chosen[e]) continue;
        experts[j] = e;
        weights[j] = probabilities[e];
        sum += probabilities[e];
        j++;
    }
    for (int32_t j = 0; norm_topk && j < top_k; j++) weights[j] /= sum;
}
