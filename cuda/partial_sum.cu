// The weighted sum of each row's expert outputs, in ascending slot order: what a worker sends back in partial mode.
#include <cuda_bf16.h>

#include "cuda/expert_kernels.h"

namespace {

constexpr int kThreads = 256;

// One thread: 4 features of one row.
template <bool F32>
__global__ void __launch_bounds__(kThreads) partial_sum_kernel(const moe_cuda_partial_sum p) {
    int f = (blockIdx.x * kThreads + threadIdx.x) * 4, row = blockIdx.y;
    if (f >= p.hidden) return;
    int count = p.counts ? p.counts[row] : p.top_k;
    const float *weights = p.weights + (int64_t)row * p.top_k;
    const float *y = p.y + (int64_t)row * p.top_k * p.hidden + f;
    float4 sum = {0, 0, 0, 0};
#pragma unroll 4
    for (int j = 0; j < count; j++) {
        float w = weights[j];
        float4 v = __ldcs(reinterpret_cast<const float4 *>(y + (int64_t)j * p.hidden));
        sum = {fmaf(w, v.x, sum.x), fmaf(w, v.y, sum.y), fmaf(w, v.z, sum.z), fmaf(w, v.w, sum.w)};
    }
    int64_t at = (int64_t)row * p.hidden + f;
    if (F32) {
        *reinterpret_cast<float4 *>(static_cast<float *>(p.out) + at) = sum;
    } else {
        __nv_bfloat162 *out = reinterpret_cast<__nv_bfloat162 *>(static_cast<__nv_bfloat16 *>(p.out) + at);
        out[0] = __floats2bfloat162_rn(sum.x, sum.y);
        out[1] = __floats2bfloat162_rn(sum.z, sum.w);
    }
}

}  // namespace

cudaError_t moe_cuda_partial_sum_run(const moe_cuda_partial_sum *args, cudaStream_t stream) {
    dim3 grid((unsigned)((args->hidden / 4 + kThreads - 1) / kThreads), (unsigned)args->rows);
    if (args->out_f32)
        partial_sum_kernel<true><<<grid, kThreads, 0, stream>>>(*args);
    else
        partial_sum_kernel<false><<<grid, kThreads, 0, stream>>>(*args);
    return cudaGetLastError();
}
