/* Paged causal attention, a block of four warps for each (row, query head): a warp takes every fourth KV block of the sequence by
 * absolute number, with a running softmax; the warps' sums are merged in order. */
#include "cuda/numbers.cuh"
#include "cuda/simple.h"

#define WARPS 4

/* A warp's part of the softmax: running maximum and sum (the same in every lane), and DIMS outputs a lane. */
template <int DIMS>
struct partial {
    float max, sum, values[DIMS];
};

/* exp(v - max); nothing for -inf also where nothing larger has been seen. NaN stays NaN. */
static __device__ __forceinline__ float weight_of(float v, float max) { return v == -CUDART_INF_F ? 0.0f : expf(v - max); }

/* Adds positions [first, end) ∩ the block that begins at `base`. Two lanes share the dot product of a position. */
template <typename T, int DIMS>
static __device__ void add_block(const T *keys, const T *values, const float *q, int d, float scale, int first, int count,
                                 int lane, partial<DIMS> &p) {
    int j = lane / 2;
    bool seen = j >= first && j < count;
    float dot = 0;
    for (int i = lane % 2; seen && i < d; i += 2) dot = fmaf(moe_widen(keys[j * d + i]), q[i], dot);
    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
    float score = seen ? dot * scale : -CUDART_INF_F, max = fmaxf(p.max, moe_warp_max(score));
    float keep = p.max == max ? 1.0f : weight_of(p.max, max), weight = seen ? weight_of(score, max) : 0.0f;
    p.sum = p.sum * keep + moe_warp_sum(lane % 2 == 0 ? weight : 0.0f);
    p.max = max;
#pragma unroll
    for (int i = 0; i < DIMS; i++) p.values[i] *= keep;
    for (int k = first; k < count; k++) {
        float w = __shfl_sync(0xffffffffu, weight, 2 * k);
#pragma unroll
        for (int i = 0; i < DIMS; i++)
            if (i * MOE_WARP + lane < d) p.values[i] = fmaf(moe_widen(values[k * d + i * MOE_WARP + lane]), w, p.values[i]);
    }
}

template <typename T, int DIMS>
static __global__ void attention_kernel(moe_simple_attention_args a) {
    extern __shared__ float shared[]; /* q [d], then of each warp: max, sum, values [d] */
    int d = a.kv.head_dim, lane = threadIdx.x % MOE_WARP, warp = threadIdx.x / MOE_WARP;
    int64_t row = blockIdx.x, head = blockIdx.y, at = (row * a.heads + head) * d;
    float *q = shared, *sums = shared + d;
    for (int i = threadIdx.x; i < d; i += WARPS * MOE_WARP) q[i] = moe_widen(static_cast<const T *>(a.q)[at + i]);
    __syncthreads();
    int end = a.places.positions[row] + 1, begin = a.window && end > a.window ? end - a.window : 0;
    const int32_t *table = a.places.tables + a.places.table_first[a.places.sequences[row]];
    int64_t kv_head = head / (a.heads / a.kv.kv_heads);
    partial<DIMS> p = {.max = -CUDART_INF_F, .sum = 0, .values = {0}};
    for (int block = begin / MOE_CUDA_KV_BLOCK / WARPS * WARPS + warp; block * MOE_CUDA_KV_BLOCK < end; block += WARPS) {
        int base = block * MOE_CUDA_KV_BLOCK;
        if (base + MOE_CUDA_KV_BLOCK <= begin) continue;
        int64_t from = ((int64_t)table[block] * a.kv.kv_heads + kv_head) * MOE_CUDA_KV_BLOCK * d;
        add_block<T, DIMS>(static_cast<const T *>(a.kv.keys) + from, static_cast<const T *>(a.kv.values) + from, q, d, a.scale,
                           max(begin - base, 0), min(end - base, MOE_CUDA_KV_BLOCK), lane, p);
    }
    float *mine = sums + warp * (d + 2);
    if (lane == 0) mine[0] = p.max, mine[1] = p.sum;
#pragma unroll
    for (int i = 0; i < DIMS; i++)
        if (i * MOE_WARP + lane < d) mine[2 + i * MOE_WARP + lane] = p.values[i];
    __syncthreads();
    float max = -CUDART_INF_F, keep[WARPS], total = 0;
    for (int w = 0; w < WARPS; w++) max = fmaxf(max, sums[w * (d + 2)]);
    for (int w = 0; w < WARPS; w++) {
        float warp_max = sums[w * (d + 2)];
        keep[w] = warp_max == max ? 1.0f : weight_of(warp_max, max);
        total += sums[w * (d + 2) + 1] * keep[w];
    }
    for (int i = threadIdx.x; i < d; i += WARPS * MOE_WARP) {
        float value = 0;
        for (int w = 0; w < WARPS; w++) value += sums[w * (d + 2) + 2 + i] * keep[w];
        static_cast<T *>(a.y)[at + i] = moe_narrow<T>(value / total);
    }
}

template <typename T, int DIMS>
static void launch(const moe_simple_attention_args *a, cudaStream_t stream) {
    size_t bytes = (size_t)(a->kv.head_dim + WARPS * (a->kv.head_dim + 2)) * sizeof(float);
    attention_kernel<T, DIMS><<<dim3(a->rows, a->heads), WARPS * MOE_WARP, bytes, stream>>>(*a);
}

template <typename T>
static void launch_of(const moe_simple_attention_args *a, cudaStream_t stream) {
    if (a->kv.head_dim <= 4 * MOE_WARP)
        launch<T, 4>(a, stream);
    else
        launch<T, 32>(a, stream);
}

extern "C" cudaError_t moe_simple_attention(const moe_simple_attention_args *a, cudaStream_t stream) {
    if (a->kv.head_dim > 32 * MOE_WARP) return cudaErrorInvalidValue;
    if (a->rows == 0) return cudaSuccess;
    if (a->kv.dtype == MOE_BF16)
        launch_of<moe_bf16>(a, stream);
    else
        launch_of<float>(a, stream);
    return cudaGetLastError();
}
