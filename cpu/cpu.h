/* The CPU backends. `cpu-ref` is the oracle: plain scalar C, slow and obvious. `cpu` is SIMD by run-time dispatch with threads.
 * Several threads may submit to one backend; jobs run one after another. close ends what was submitted. */
#pragma once
#include "common/backend.h"

typedef struct moe_cpu_config {
    int32_t threads; /* compute threads; 0: jobs run inside submit, on the caller's thread (simulation, tests) */
    bool background; /* expert batches never run on the submitter's thread, which has a device to look after */
    moe_dtype dtype; /* MOE_F32 or MOE_BF16: of activations handed out, keys, values and partial sums; all sums are f32 */
    const char *isa; /* "auto", "avx2", "avx512", "scalar"; NULL reads MOESAIC_CPU_ISA, else auto. Unknown or missing: refused */
} moe_cpu_config;

moe_status moe_cpu_open(const moe_cpu_config *config, moe_backend **out, moe_error *err);
moe_status moe_cpu_ref_open(const moe_cpu_config *config, moe_backend **out, moe_error *err);
