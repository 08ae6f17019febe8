/* One GPU: opening, memory, and the errors of its calls. */
#pragma once
#include <cuda_runtime_api.h>

#include "common/backend.h"

#define MOE_CUDA_ALIGNMENT 256 /* of every tensor in device memory */

typedef struct moe_cuda_device {
    int32_t index;
    int32_t arch; /* of the code to run: 90 for 9.0; 80 with MOESAIC_CUDA_ARCH=sm80 */
    int32_t num_sms;
    int64_t total_bytes;
} moe_cuda_device;

/* Makes the device the calling thread's. UNAVAILABLE, INVALID_ARGUMENT, FAILED_PRECONDITION as moe_cuda_open. */
moe_status moe_cuda_device_open(int32_t index, moe_cuda_device *out, moe_error *err);

/* Every entry point of the backend begins with this: the current device is the thread's. */
void moe_cuda_device_use(const moe_cuda_device *device);

/* OK, or INTERNAL with the CUDA text: what the call was to do, and why it failed. */
moe_status moe_cuda_check(cudaError_t code, const char *what, moe_error *err);

/* Aligned to MOE_CUDA_ALIGNMENT, not cleared. RESOURCE_EXHAUSTED: how much `what` needed, how much is free, and `advice`. May
 * wait for the device: not on the step path but when a buffer grows. */
moe_status moe_cuda_device_alloc(const moe_cuda_device *device, size_t bytes, const char *what, const char *advice, void **out,
                                 moe_error *err);
void moe_cuda_device_free(void *memory); /* NULL is ignored; waits for the device */

/* Pinned host memory, of use to every device. */
moe_status moe_cuda_pinned_alloc(size_t bytes, const char *what, void **out, moe_error *err);
void moe_cuda_pinned_free(void *memory); /* NULL is ignored */

/* Whether copies of this host memory are asynchronous: pinned by any allocator of this process. */
bool moe_cuda_is_pinned(const void *memory);

/* A buffer that grows to the largest size asked for, in powers of two. Its content is lost when it grows; nothing may use it
 * then. */
typedef struct moe_cuda_buffer {
    void *memory;
    size_t bytes;
    bool pinned; /* host memory; else the device's */
} moe_cuda_buffer;
moe_status moe_cuda_buffer_reserve(const moe_cuda_device *device, moe_cuda_buffer *buffer, size_t bytes, const char *what,
                                   const char *advice, moe_error *err);
void moe_cuda_buffer_free(moe_cuda_buffer *buffer); /* idempotent */

/* Lays several arrays into one allocation: with memory NULL it only counts. Takes return aligned places in order. */
typedef struct moe_cuda_arena {
    uint8_t *memory;
    size_t used;
} moe_cuda_arena;
static inline void *moe_cuda_arena_take(moe_cuda_arena *arena, size_t bytes) {
    void *at = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += (bytes + MOE_CUDA_ALIGNMENT - 1) / MOE_CUDA_ALIGNMENT * MOE_CUDA_ALIGNMENT;
    return at;
}
