/* Forward steps with every expert here: segments and expert batches one after another in one job. */
#pragma once
#include "cpu/segment.h"

struct moe_local {
    const moe_base *base; /* borrowed */
    moe_expert **experts; /* [num_moe_layers, num_experts]; the table is owned, the experts are borrowed */
};

/* RESOURCE_EXHAUSTED. */
moe_status moe_cpu_local_create(const moe_base *base, moe_expert *const *experts, moe_local **out, moe_error *err);
void moe_cpu_local_free(moe_local *local); /* NULL is allowed */

/* What a local step is made of, beside the step itself. */
typedef struct moe_cpu_local_run {
    const moe_cpu_kernels *kernels;
    moe_dtype dtype; /* of the backend */
    moe_cpu_scratch_list *scratch;
    const moe_local *local;
} moe_cpu_local_run;

/* Runs a step as backend.h defines it. RESOURCE_EXHAUSTED. */
moe_status moe_cpu_local_step(const moe_cpu_local_run *local, const moe_cpu_run *run, const moe_local_step *step, moe_error *err);

/* About how many multiply-adds a step takes. */
int64_t moe_cpu_local_multiply_adds(const moe_local *local, const moe_local_step *step);
