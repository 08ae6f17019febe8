#include "cuda/device.h"

#include <stdio.h>
#include <stdlib.h>

#include "cuda/cuda.h"

#define MIN_ARCH 80
#define MIN_BUFFER_BYTES ((size_t)64 << 10)
#define MAX_DOUBLING_BYTES ((size_t)256 << 20) /* above it buffers grow by this */

moe_status moe_cuda_check(cudaError_t code, const char *what, moe_error *err) {
    if (code == cudaSuccess) return MOE_OK;
    return moe_fail(err, MOE_INTERNAL, "%s: %s (%s)", what, cudaGetErrorString(code), cudaGetErrorName(code));
}

moe_status moe_cuda_device_count(int32_t *out, moe_error *err) {
    int count = 0, driver = 0;
    cudaError_t code = cudaGetDeviceCount(&count);
    *out = 0;
    cudaGetLastError(); /* a missing device is no error of later calls */
    if (code == cudaSuccess && count > 0) {
        *out = count;
        return MOE_OK;
    }
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return moe_fail(err, MOE_UNAVAILABLE, "no NVIDIA driver (libcuda.so.1) on this machine");
    if (code == cudaErrorInsufficientDriver)
        return moe_fail(err, MOE_UNAVAILABLE, "the NVIDIA driver is too old: it serves CUDA %d.%d, this program needs %d.%d",
                        driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return moe_fail(err, MOE_UNAVAILABLE, "no NVIDIA GPU to be seen (%s); check nvidia-smi and CUDA_VISIBLE_DEVICES",
                    code == cudaSuccess ? "count 0" : cudaGetErrorString(code));
}

moe_status moe_cuda_device_name(int32_t device, char *out, size_t size, moe_error *err) {
    struct cudaDeviceProp p;
    cudaError_t code = cudaGetDeviceProperties(&p, device);
    if (code != cudaSuccess) return moe_fail(err, MOE_UNAVAILABLE, "GPU %d: its UUID: %s", device, cudaGetErrorString(code));
    int used = snprintf(out, size, "GPU-");
    for (size_t i = 0; i < sizeof p.uuid.bytes; i++) { /* 8-4-4-4-12 digits */
        const char *dash = i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "";
        used += snprintf(out + used, size - (size_t)used, "%s%02x", dash, (unsigned char)p.uuid.bytes[i]);
    }
    return MOE_OK;
}

moe_status moe_cuda_device_open(int32_t index, moe_cuda_device *out, moe_error *err) {
    struct cudaDeviceProp p;
    const char *path = getenv("MOESAIC_CUDA_ARCH");
    int32_t count;
    moe_status status = moe_cuda_device_count(&count, err);
    if (status != MOE_OK) return status;
    if (index < 0 || index >= count)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "GPU %d does not exist: this machine has %d, numbered from 0", index, count);
    if (path && *path && strcmp(path, "sm80") != 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "MOESAIC_CUDA_ARCH is '%s'; sm80 or nothing", path);
    status = moe_cuda_check(cudaSetDevice(index), "choosing the GPU", err);
    if (status == MOE_OK) status = moe_cuda_check(cudaGetDeviceProperties(&p, index), "reading the GPU's properties", err);
    if (status != MOE_OK) return moe_fail(err, MOE_UNAVAILABLE, "GPU %d cannot be used: %s", index, err ? err->message : "");
    *out = (moe_cuda_device){.index = index, .arch = p.major * 10 + p.minor, .num_sms = p.multiProcessorCount};
    out->total_bytes = (int64_t)p.totalGlobalMem;
    if (out->arch < MIN_ARCH)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "GPU %d (%s) has compute capability %d.%d; 8.0 or later is needed", index,
                        p.name, p.major, p.minor);
    if (path && *path) out->arch = MIN_ARCH;
    return MOE_OK;
}

void moe_cuda_device_use(const moe_cuda_device *device) { cudaSetDevice(device->index); }

moe_status moe_cuda_device_alloc(const moe_cuda_device *device, size_t bytes, const char *what, const char *advice, void **out,
                                 moe_error *err) {
    size_t free_bytes = 0, total_bytes = 0;
    cudaError_t code = cudaMalloc(out, bytes ? bytes : 1);
    if (code == cudaSuccess) return MOE_OK;
    *out = NULL;
    if (code != cudaErrorMemoryAllocation) return moe_cuda_check(code, what, err);
    cudaGetLastError(); /* running out of memory is no error of later calls */
    cudaMemGetInfo(&free_bytes, &total_bytes);
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory on GPU %d: %s needs %.1f MiB, %.1f of %.1f MiB are free; %s",
                    device->index, what, (double)bytes / 1048576, (double)free_bytes / 1048576, (double)total_bytes / 1048576,
                    advice);
}

void moe_cuda_device_free(void *memory) {
    if (memory) cudaFree(memory);
}

moe_status moe_cuda_pinned_alloc(size_t bytes, const char *what, void **out, moe_error *err) {
    cudaError_t code = cudaHostAlloc(out, bytes ? bytes : 1, cudaHostAllocPortable);
    if (code == cudaSuccess) return MOE_OK;
    *out = NULL;
    if (code != cudaErrorMemoryAllocation) return moe_cuda_check(code, what, err);
    cudaGetLastError();
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED,
                    "%s: %.1f MiB of host memory cannot be pinned; free some, or raise the memory "
                    "limit of this process",
                    what, (double)bytes / 1048576);
}

void moe_cuda_pinned_free(void *memory) {
    if (memory) cudaFreeHost(memory);
}

bool moe_cuda_is_pinned(const void *memory) {
    struct cudaPointerAttributes a;
    if (cudaPointerGetAttributes(&a, memory) == cudaSuccess) return a.type == cudaMemoryTypeHost;
    cudaGetLastError();
    return false;
}

static size_t grown(size_t bytes) {
    size_t size = MIN_BUFFER_BYTES;
    if (bytes > MAX_DOUBLING_BYTES) return (bytes + MAX_DOUBLING_BYTES - 1) / MAX_DOUBLING_BYTES * MAX_DOUBLING_BYTES;
    while (size < bytes) size *= 2;
    return size;
}

moe_status moe_cuda_buffer_reserve(const moe_cuda_device *device, moe_cuda_buffer *buffer, size_t bytes, const char *what,
                                   const char *advice, moe_error *err) {
    if (bytes <= buffer->bytes) return MOE_OK;
    moe_cuda_buffer_free(buffer);
    size_t size = grown(bytes);
    moe_status status = buffer->pinned ? moe_cuda_pinned_alloc(size, what, &buffer->memory, err)
                                       : moe_cuda_device_alloc(device, size, what, advice, &buffer->memory, err);
    if (status == MOE_OK) buffer->bytes = size;
    return status;
}

void moe_cuda_buffer_free(moe_cuda_buffer *buffer) {
    if (buffer->pinned)
        moe_cuda_pinned_free(buffer->memory);
    else
        moe_cuda_device_free(buffer->memory);
    buffer->memory = NULL;
    buffer->bytes = 0;
}
