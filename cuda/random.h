/* Generated weights (common/generated.h) made where they are used: in device memory. */
#pragma once
#include <cuda_runtime_api.h>

#include "common/tensor.h"

/* Rows [row_lo, row_lo + rows) and columns [col_lo, col_lo + width) of a generated tensor become rows of `stride` elements of
 * `dtype` (the rest of a row is zero). Row i lands at row i / run · run_stride + i % run. */
typedef struct moe_cuda_random {
    moe_generator generator;
    moe_dtype stored, dtype; /* an element is rounded to the tensor's own type, then to `dtype` */
    int64_t cols;            /* of the tensor */
    int64_t row_lo, rows, col_lo, width;
    int64_t stride, run, run_stride;
    void *to; /* device */
} moe_cuda_random;

#ifdef __cplusplus
extern "C"
#endif
    cudaError_t
    moe_cuda_random_fill(const moe_cuda_random *args, cudaStream_t stream); /* asynchronous; the same bits as moe_tensor_read */
