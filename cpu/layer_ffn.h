/* Routed experts on rows where they are: from what a segment left in a moe_rows to what the next one combines. */
#pragma once
#include "cpu/base.h"

/* Runs a job as backend.h defines it. RESOURCE_EXHAUSTED. */
moe_status moe_cpu_layer_ffn(const moe_cpu_kernels *kernels, moe_cpu_scratch_list *scratch, const moe_cpu_run *run,
                             const moe_model_config *config, const moe_layer_ffn *ffn, moe_error *err);

/* About how many multiply-adds a job takes. */
int64_t moe_cpu_layer_ffn_multiply_adds(const moe_model_config *config, const moe_layer_ffn *ffn);
