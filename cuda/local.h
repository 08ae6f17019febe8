/* Forward steps whose experts are all on this device: routing, permutation and combination never leave it. */
#pragma once
#include "cuda/layers.h"

/* As local_create, local_free and local_submit of backend.h. */
moe_status moe_cuda_local_create(moe_cuda *cuda, const moe_base *base, moe_expert *const *experts, moe_local **out,
                                 moe_error *err);
void moe_cuda_local_free(moe_local *local); /* NULL is ignored */
void moe_cuda_local_submit(moe_cuda *cuda, const moe_base *base, const moe_local *local, const moe_local_step *step,
                           moe_job *job);
