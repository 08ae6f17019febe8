/* Expert outputs, shared expert and residual, and the RMSNorm that follows, in one pass over a row. */
#include "cuda/base_device.cuh"

#define MAX_THREADS 512

static __device__ __forceinline__ float4 read_four(const void *from, moe_dtype dtype, int64_t at) {
    if (dtype == MOE_F32) return *(const float4 *)((const float *)from + at);
    uint2 bits = *(const uint2 *)((const bf16 *)from + at);
    return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u), __uint_as_float(bits.y << 16),
                       __uint_as_float(bits.y & 0xffff0000u));
}

static __device__ __forceinline__ void add_four(float4 &sum, float weight, float4 x) {
    sum.x = fmaf(weight, x.x, sum.x);
    sum.y = fmaf(weight, x.y, sum.y);
    sum.z = fmaf(weight, x.z, sum.z);
    sum.w = fmaf(weight, x.w, sum.w);
}

/* Rounded product, then rounded sum, as the CPU does. */
static __device__ __forceinline__ float scaled_plus(float sum, float scale, float x) {
    return __fadd_rn(sum, __fmul_rn(scale, x));
}

/* The row's moe(t) and shared expert at elements [i, i + 4), to be added to the residual. */
static __device__ __forceinline__ float4 expert_sum(const moe_cuda_combine_norm &a, int64_t row, int32_t count,
                                                    float shared_scale, int32_t i) {
    float4 sum = make_float4(0, 0, 0, 0);
    for (int32_t first = 0; first < count; first += 8) {
        float4 x[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (first + j < count) x[j] = read_four(a.outputs, a.outputs_dtype, (row * a.top_k + first + j) * a.width + i);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (first + j < count) add_four(sum, a.weights ? a.weights[row * a.top_k + first + j] : 1.0f, x[j]);
    }
    if (a.shared) {
        float4 x = read_four(a.shared, MOE_F32, row * a.width + i);
        sum.x = scaled_plus(sum.x, shared_scale, x.x);
        sum.y = scaled_plus(sum.y, shared_scale, x.y);
        sum.z = scaled_plus(sum.z, shared_scale, x.z);
        sum.w = scaled_plus(sum.w, shared_scale, x.w);
    }
    return sum;
}

/* The same in every thread; adds warps in order. */
static __device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[MAX_THREADS / 32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) sum += sums[i];
    return sum;
}

/* VALUES: fours of elements a thread. EXPERTS: whether there are outputs of experts; without them a block takes so few registers
 * that rows enough are in flight. */
template <int VALUES, bool EXPERTS>
static __global__ void __launch_bounds__(MAX_THREADS, VALUES <= 2 ? 2 : 1) combine_norm_kernel(const moe_cuda_combine_norm a) {
    int64_t row = blockIdx.x, from;
    float4 x[VALUES];
    float squares = 0;
    let_successor_start();
    wait_for_predecessor();
    if (a.began && row == 0 && threadIdx.x == 0) *a.began = device_clock_ns();
    if (a.num_rows && row >= *a.num_rows) return;
    from = a.row_of ? a.row_of[row] : row;
    int32_t count = !a.outputs ? 0 : a.counts ? a.counts[row] : a.top_k;
    bool adds = !a.row_of && (EXPERTS || a.bias);
    float shared_scale = a.shared && a.shared_logit ? 1.0f / (1.0f + expf(-a.shared_logit[row])) : 1.0f;
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
        int32_t i = (v * (int32_t)blockDim.x + (int32_t)threadIdx.x) * 4;
        x[v] = make_float4(0, 0, 0, 0);
        if (i >= a.width) continue;
        float4 *hidden = (float4 *)(a.hidden + from * a.width + i);
        x[v] = *hidden;
        if (adds) {
            if (a.bias) add_four(x[v], 1.0f, *(const float4 *)(a.bias + i));
            if (EXPERTS) add_four(x[v], 1.0f, expert_sum(a, row, count, shared_scale, i));
            *hidden = x[v];
        }
        squares = fmaf(x[v].x, x[v].x, fmaf(x[v].y, x[v].y, fmaf(x[v].z, x[v].z, fmaf(x[v].w, x[v].w, squares))));
    }
    if (!a.norm) return;
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)a.width + a.eps);
#pragma unroll
    for (int v = 0; v < VALUES; v++) {
        int32_t i = (v * (int32_t)blockDim.x + (int32_t)threadIdx.x) * 4;
        if (i >= a.width) continue;
        float4 w = *(const float4 *)(a.norm + i);
        uint2 bits =
            make_uint2(pack(x[v].x * scale * w.x, x[v].y * scale * w.y), pack(x[v].z * scale * w.z, x[v].w * scale * w.w));
        *(uint2 *)((bf16 *)a.normed + row * a.width + i) = bits;
    }
}

template <bool EXPERTS>
static cudaError_t start(const moe_cuda_queue *q, const moe_cuda_combine_norm *a) {
    int threads = a->width / 4 < MAX_THREADS ? (a->width / 4 + 31) / 32 * 32 : MAX_THREADS, fours = a->width / 4;
    dim3 grid((unsigned)a->max_rows);
    if (a->width % 4 != 0 || fours > 8 * threads) return cudaErrorInvalidValue;
    if (fours <= threads) return launch(q, combine_norm_kernel<1, EXPERTS>, grid, threads, 0, *a);
    if (fours <= 2 * threads) return launch(q, combine_norm_kernel<2, EXPERTS>, grid, threads, 0, *a);
    if (fours <= 4 * threads) return launch(q, combine_norm_kernel<4, EXPERTS>, grid, threads, 0, *a);
    return launch(q, combine_norm_kernel<8, EXPERTS>, grid, threads, 0, *a);
}

extern "C" cudaError_t moe_cuda_combine_norm_rows(const moe_cuda_queue *q, const moe_cuda_combine_norm *a) {
    return a->outputs || a->shared ? start<true>(q, a) : start<false>(q, a);
}
