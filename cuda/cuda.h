/* The backend for NVIDIA GPUs (compute capability 8.0 and later). One backend is one device; several may be open in a process.
 * Any thread may submit and poll; jobs end inside `poll`. */
#pragma once
#include "common/backend.h"

typedef struct moe_cuda_config {
    int32_t device;        /* number of the GPU, as the driver counts those visible */
    moe_dtype dtype;       /* of activations, KV cache and payloads: MOE_F32 or MOE_BF16 */
    bool deterministic;    /* one kernel and one order over K for a row, whatever the batch */
    const char *tune_file; /* measured thresholds between kernels (`bench --tune` writes it); NULL: those built in */
} moe_cuda_config;

/* The caller closes *out through its ops. UNAVAILABLE: no driver, or no GPU; INVALID_ARGUMENT: no such device, or a dtype that is
 * not computed with; FAILED_PRECONDITION: a GPU that is too old. Reads MOESAIC_CUDA_ARCH: "sm80" keeps newer GPUs on the code for
 * compute capability 8.0. */
moe_status moe_cuda_open(const moe_cuda_config *config, moe_backend **out, moe_error *err);

/* How many GPUs this process can see. UNAVAILABLE as above, never 0. */
moe_status moe_cuda_device_count(int32_t *out, moe_error *err);

/* The name by which every process on every machine knows this GPU: "GPU-" and its UUID, as nvidia-smi shows it. UNAVAILABLE. */
moe_status moe_cuda_device_name(int32_t device, char *out, size_t size, moe_error *err);

/* Measures on config->device which kernels are best for `num_experts` experts of this shape, with gate matrices (moe_ffn_gated)
 * or without, at how many rows, and puts that into the file config->tune_file, in place of what it says of this shape. Blocks for
 * seconds. Errors as of moe_cuda_open for the device; INVALID_ARGUMENT: a shape for which there is nothing to choose, or a file
 * that is no such table; RESOURCE_EXHAUSTED. */
moe_status moe_cuda_tune_experts(const moe_cuda_config *config, int32_t hidden, int32_t intermediate, bool gated,
                                 int32_t num_experts, moe_error *err);
