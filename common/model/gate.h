/* Top-k routing of one row: what backends on the host and the router's virtual experts share. */
#pragma once
#include "common/model/config.h"

typedef void (*moe_softmax)(const float *logits, int32_t count, float *probabilities);

/* softmax in float32, for whom no profile says otherwise. */
void moe_gate_softmax(const float *logits, int32_t count, float *probabilities);

/* Chooses the top_k largest router logits [num_experts] (ties, and NaN after all else, to the lower expert id; softmax keeps
 * their order) and writes them in ascending expert id with their softmax weights, divided by their sum where norm_topk. */
void moe_gate_topk(moe_softmax softmax, const float *logits, int32_t num_experts, int32_t top_k, bool norm_topk, int32_t *experts,
                   float *weights);
