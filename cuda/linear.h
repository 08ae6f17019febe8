/* Products of the base layers in the bfloat16 profile: the few-row kernel, or cuBLASLt where there are many rows and nothing
 * asks for one order over K. */
#pragma once
#include "cuda/base_kernels.h"
#include "cuda/device.h"

typedef struct moe_cuda_linear moe_cuda_linear;

/* One for each stream: it owns the workspace that its products share. The device is the calling thread's. */
moe_status moe_cuda_linear_open(const moe_cuda_device *device, bool deterministic, moe_cuda_linear **out, moe_error *err);
void moe_cuda_linear_close(moe_cuda_linear *linear); /* NULL is ignored; nothing that it enqueued is running */

/* As moe_cuda_linear_few, by whichever kernel suits the shape. One thread at a time; may be captured. */
cudaError_t moe_cuda_linear_run(moe_cuda_linear *linear, const moe_cuda_queue *queue, const moe_cuda_product *product);
/* The same, always by cuBLASLt. cudaErrorNotSupported where it knows no way. */
cudaError_t moe_cuda_linear_many(moe_cuda_linear *linear, cudaStream_t stream, const moe_cuda_product *product);
