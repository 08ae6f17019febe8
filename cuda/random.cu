#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/random.h"

#define THREADS 256
#define MAX_BLOCKS_X 16
#define MAX_BLOCKS_Y 4096

static __device__ float as_stored(float value, moe_dtype stored) {
    if (stored == MOE_BF16) return __bfloat162float(__float2bfloat16_rn(value));
    if (stored == MOE_F16) return __half2float(__float2half_rn(value));
    return value;
}

static __device__ void put(float *to, float value) { *to = value; }
static __device__ void put(__nv_bfloat16 *to, float value) { *to = __float2bfloat16_rn(value); }
static __device__ void put(__half *to, float value) { *to = __float2half_rn(value); }

template <typename T>
static __global__ void fill(moe_cuda_random a) {
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
        T *to = (T *)a.to + (row / a.run * a.run_stride + row % a.run) * a.stride;
        int64_t first = (a.row_lo + row) * a.cols + a.col_lo;
        for (int64_t col = blockIdx.x * (int64_t)THREADS + threadIdx.x; col < a.stride; col += gridDim.x * (int64_t)THREADS)
            put(to + col, col < a.width ? as_stored(moe_generated_f32(&a.generator, first + col), a.stored) : 0.0f);
    }
}

static unsigned blocks(int64_t wanted, int64_t most) { return (unsigned)(wanted < 1 ? 1 : wanted < most ? wanted : most); }

extern "C" cudaError_t moe_cuda_random_fill(const moe_cuda_random *args, cudaStream_t stream) {
    dim3 grid(blocks((args->stride + THREADS - 1) / THREADS, MAX_BLOCKS_X), blocks(args->rows, MAX_BLOCKS_Y));
    if (args->rows == 0 || args->stride == 0) return cudaSuccess;
    if (args->dtype == MOE_BF16)
        fill<__nv_bfloat16><<<grid, THREADS, 0, stream>>>(*args);
    else if (args->dtype == MOE_F16)
        fill<__half><<<grid, THREADS, 0, stream>>>(*args);
    else
        fill<float><<<grid, THREADS, 0, stream>>>(*args);
    return cudaGetLastError();
}
