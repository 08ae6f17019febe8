/* The one way from the host to the device for weights: in pinned pieces, converted where the device's type is another. */
#pragma once
#include <pthread.h>

#include "cuda/device.h"

#define MOE_CUDA_UPLOAD_BYTES \
    ((size_t)8 << 20) /* of a staging piece; two of them, so that filling one overlaps copying the other */

typedef struct moe_cuda_upload {
    const moe_cuda_device *device;
    pthread_mutex_t lock; /* one loader at a time */
    cudaStream_t stream;
    void *staging[2]; /* pinned */
    cudaEvent_t copied[2];
    int turn;
} moe_cuda_upload;

moe_status moe_cuda_upload_open(const moe_cuda_device *device, moe_cuda_upload *out, moe_error *err);
void moe_cuda_upload_close(moe_cuda_upload *upload);

/* A matrix on its way: rows [row_lo, row_hi) and columns [col_lo, col_hi) of the tensor become rows of `stride` elements of
 * `dtype` (the rest of a row is zero). Row i lands at row i / run · run_stride + i % run: run = run_stride for plain matrices, 8
 * and 16 for the interleaved gate and up. */
typedef struct moe_cuda_plane {
    const moe_tensor *tensor;
    int64_t row_lo, row_hi, col_lo, col_hi;
    moe_dtype dtype;
    int64_t stride, run, run_stride;
    void *to;
} moe_cuda_plane;

/* Both enqueue; the device has it all after moe_cuda_upload_finish, which waits. The three are called with the lock held. */
moe_status moe_cuda_upload_plane(moe_cuda_upload *upload, const moe_cuda_plane *plane, moe_error *err);
moe_status moe_cuda_upload_bytes(moe_cuda_upload *upload, void *to, const void *from, size_t bytes, moe_error *err);
moe_status moe_cuda_upload_finish(moe_cuda_upload *upload, moe_error *err);

/* The same into host memory at plane->to, by the calling thread alone; no lock is needed. */
void moe_cuda_plane_pack(const moe_cuda_plane *plane);

/* In a profile of `dtype`, the type that a weight stored as `stored` has on the device: bfloat16 beside bfloat16, else as stored.
 */
static inline moe_dtype moe_cuda_weight_dtype(moe_dtype profile, moe_dtype stored) {
    return profile == MOE_BF16 ? MOE_BF16 : stored;
}
