#include "cuda/bring.h"

#include <stdint.h>

namespace {

constexpr int kThreads = 256, kBlocks = 64, kInFlight = 4;  // loads of a thread that are on the way over the link at once

// `units` of each row, `total` in all. A block takes kInFlight tiles of kThreads units at a time: neighbours read neighbouring units.
template <class T>
__global__ void __launch_bounds__(kThreads) bring_kernel(T *to, const T *from, uint32_t pitch, uint32_t units, uint32_t total) {
    for (uint32_t tile = blockIdx.x * kInFlight * kThreads; tile < total; tile += gridDim.x * kInFlight * kThreads) {
        T value[kInFlight];
        uint32_t at[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; i++) {
            uint32_t unit = tile + i * kThreads + threadIdx.x;
            at[i] = unit / units * pitch + unit % units;
            if (unit < total) value[i] = __ldcv(from + at[i]);  // the host writes behind the caches' back
        }
#pragma unroll
        for (int i = 0; i < kInFlight; i++)
            if (tile + i * kThreads + threadIdx.x < total) to[at[i]] = value[i];
    }
}

template <class T>
cudaError_t launch(void *to, const void *from, size_t pitch, size_t bytes, size_t rows, cudaStream_t stream) {
    uint32_t units = (uint32_t)(bytes / sizeof(T)), total = (uint32_t)rows * units, each = kInFlight * kThreads;
    uint32_t blocks = (total + each - 1) / each;
    bring_kernel<T><<<blocks < kBlocks ? blocks : kBlocks, kThreads, 0, stream>>>(static_cast<T *>(to), static_cast<const T *>(from),
                                                                                  (uint32_t)(pitch / sizeof(T)), units, total);
    return cudaGetLastError();
}

// Row i of `units` units goes to row places[i].
template <class T>
__global__ void __launch_bounds__(kThreads) places_kernel(T *to, const T *from, const int32_t *places, uint64_t units, uint64_t total) {
    for (uint64_t tile = (uint64_t)blockIdx.x * kInFlight * kThreads; tile < total; tile += (uint64_t)gridDim.x * kInFlight * kThreads) {
        T value[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; i++) {
            uint64_t unit = tile + i * kThreads + threadIdx.x;
            if (unit < total) value[i] = __ldcv(from + unit);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; i++) {
            uint64_t unit = tile + i * kThreads + threadIdx.x;
            if (unit < total) to[(uint64_t)places[unit / units] * units + unit % units] = value[i];
        }
    }
}

template <class T>
cudaError_t launch_places(float *to, const float *from, const int32_t *places, size_t rows, size_t width, cudaStream_t stream) {
    uint64_t units = width * sizeof(float) / sizeof(T), total = rows * units, each = kInFlight * kThreads;
    uint64_t blocks = (total + each - 1) / each;
    places_kernel<T><<<(unsigned)(blocks < kBlocks ? blocks : kBlocks), kThreads, 0, stream>>>(
        reinterpret_cast<T *>(to), reinterpret_cast<const T *>(from), places, units, total);
    return cudaGetLastError();
}

}  // namespace

cudaError_t moe_cuda_bring_to_places(float *to, const float *from, const int32_t *places, size_t rows, size_t width, cudaStream_t stream) {
    if (rows * width == 0) return cudaSuccess;
    uintptr_t sizes = (uintptr_t)to | (uintptr_t)from | width * sizeof(float);
    if (sizes % sizeof(uint4) == 0) return launch_places<uint4>(to, from, places, rows, width, stream);
    return launch_places<float>(to, from, places, rows, width, stream);
}

cudaError_t moe_cuda_bring_rows(void *to, const void *from, size_t pitch, size_t bytes, size_t rows, cudaStream_t stream) {
    if (bytes * rows == 0) return cudaSuccess;
    if (bytes * rows > MOE_CUDA_BRING_BYTES)
        return bytes == pitch ? cudaMemcpyAsync(to, from, rows * bytes, cudaMemcpyHostToDevice, stream)
                              : cudaMemcpy2DAsync(to, pitch, from, pitch, bytes, rows, cudaMemcpyHostToDevice, stream);
    uintptr_t sizes = (uintptr_t)to | (uintptr_t)from | pitch | bytes;
    if (sizes % sizeof(uint4) == 0) return launch<uint4>(to, from, pitch, bytes, rows, stream);
    if (sizes % sizeof(uint32_t) == 0) return launch<uint32_t>(to, from, pitch, bytes, rows, stream);
    return launch<uint8_t>(to, from, pitch, bytes, rows, stream);
}

cudaError_t moe_cuda_bring(void *to, const void *from, size_t bytes, cudaStream_t stream) {
    return moe_cuda_bring_rows(to, from, bytes, bytes, 1, stream);
}
