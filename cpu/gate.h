/* Top-k routing of one row. */
#pragma once
#include "cpu/kernels.h"

/* Chooses the top_k largest router logits [num_experts] (ties, and NaN after all else, to the lower expert id; softmax keeps
 * their order) and writes them in ascending expert id with their softmax weights, divided by their sum where norm_topk. */
void moe_cpu_gate_topk(const moe_cpu_kernels *kernels, const float *logits, int32_t num_experts, int32_t top_k, bool norm_topk,
                       int32_t *experts, float *weights);
