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

}  // namespace

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
