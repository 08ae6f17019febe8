/* What stands around attention and works on a row alone: the embedding with the rotation's angles, and between the q, k, v
 * product and attention the biases, norms, clamp, rotation and the store into the KV pool. A warp takes one head. */
#include "cuda/base_device.cuh"

#define WARPS 8
#define MAX_PAIRS 4 /* rotated pairs of a lane: head_dim ≤ 256 */

/* ---- embedding ---- */

static __device__ __forceinline__ float table_value(const void *table, moe_dtype dtype, int64_t at) {
    if (dtype == MOE_F32) return ((const float *)table)[at];
    if (dtype == MOE_BF16) return __bfloat162float(((const bf16 *)table)[at]);
    return __half2float(((const __half *)table)[at]);
}

static __global__ void embed_kernel(const moe_cuda_embed a) {
    int32_t row = blockIdx.x;
    let_successor_start();
    wait_for_predecessor();
    if (row >= *a.rows.num_rows) return;
    int64_t from = (int64_t)a.rows.token_ids[row] * a.width;
    for (int32_t i = threadIdx.x; i < a.width; i += blockDim.x)
        a.hidden[(int64_t)row * a.width + i] = table_value(a.table, a.table_dtype, from + i);
    float position = (float)a.rows.positions[row];
    for (int32_t i = threadIdx.x; i < a.half_dim; i += blockDim.x) {
        float angle = position * a.inverse_frequency[i], sine, cosine;
        sincosf(angle, &sine, &cosine);
        a.cosine[(int64_t)row * a.half_dim + i] = cosine;
        a.sine[(int64_t)row * a.half_dim + i] = sine;
    }
}

extern "C" cudaError_t moe_cuda_embed_rows(const moe_cuda_queue *q, const moe_cuda_embed *a) {
    return launch(q, embed_kernel, dim3((unsigned)a->max_rows), 256, 0, *a);
}

/* ---- projections ---- */

/* A head's pairs (i, i + d/2), i = lane + 32 p. */
template <int PAIRS>
struct head_values {
    float low[PAIRS], high[PAIRS];
};

template <int PAIRS>
static __device__ __forceinline__ head_values<PAIRS> read_head(const bf16 *from, const float *bias, int half, int lane) {
    head_values<PAIRS> v;
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        int i = lane + 32 * p;
        v.low[p] = v.high[p] = 0;
        if (i >= half) continue;
        v.low[p] = __bfloat162float(from[i]);
        v.high[p] = __bfloat162float(from[i + half]);
        if (bias) {
            v.low[p] += bias[i];
            v.high[p] += bias[i + half];
        }
    }
    return v;
}

template <int PAIRS>
static __device__ __forceinline__ float squares(const head_values<PAIRS> &v) {
    float sum = 0;
#pragma unroll
    for (int p = 0; p < PAIRS; p++) sum = fmaf(v.low[p], v.low[p], fmaf(v.high[p], v.high[p], sum));
    return warp_sum(sum);
}

template <int PAIRS>
static __device__ __forceinline__ void apply_norm(head_values<PAIRS> &v, float scale, const float *weight, int half, int lane) {
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        int i = lane + 32 * p;
        if (i >= half) continue;
        v.low[p] = v.low[p] * scale * weight[i];
        v.high[p] = v.high[p] * scale * weight[i + half];
    }
}

/* NaN stays. */
static __device__ __forceinline__ float clamp(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

template <int PAIRS>
static __device__ __forceinline__ void write_head(bf16 *to, const head_values<PAIRS> &v, int half, int lane) {
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        int i = lane + 32 * p;
        if (i >= half) continue;
        to[i] = __float2bfloat16(v.low[p]);
        to[i + half] = __float2bfloat16(v.high[p]);
    }
}

template <int PAIRS>
static __device__ __forceinline__ void rotate(head_values<PAIRS> &v, const float *cosine, const float *sine, int half, int lane) {
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        int i = lane + 32 * p;
        if (i >= half) continue;
        float first = v.low[p], second = v.high[p];
        v.low[p] = first * cosine[i] - second * sine[i];
        v.high[p] = second * cosine[i] + first * sine[i];
    }
}

/* 1 / root mean square of the row's whole q (scales[0]) and k (scales[1]); squares are added head by head, in order. */
template <int PAIRS>
static __device__ void full_norm_scales(const moe_cuda_project &a, const bf16 *row, float *head_squares, float *scales) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = a.shape.head_dim, heads = a.shape.num_heads + a.shape.num_kv_heads;
    for (int head = warp; head < heads; head += WARPS) {
        float sum = squares(read_head<PAIRS>(row + head * d, a.bias ? a.bias + head * d : NULL, d / 2, lane));
        if (lane == 0) head_squares[head] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        int first = threadIdx.x == 0 ? 0 : a.shape.num_heads, count = threadIdx.x == 0 ? a.shape.num_heads : a.shape.num_kv_heads;
        float sum = 0;
        for (int i = 0; i < count; i++) sum += head_squares[first + i];
        scales[threadIdx.x] = 1.0f / sqrtf(sum / (float)(count * d) + a.eps);
    }
    __syncthreads();
}

template <int PAIRS>
static __global__ void __launch_bounds__(WARPS * 32) project_kernel(const moe_cuda_project a) {
    extern __shared__ float head_squares[];
    __shared__ float scales[2];
    const int lane = threadIdx.x % 32, d = a.shape.head_dim, half = d / 2, row = blockIdx.x;
    const int q_heads = a.shape.num_heads, kv_heads = a.shape.num_kv_heads, heads = q_heads + 2 * kv_heads;
    let_successor_start();
    wait_for_predecessor();
    /* the first head's values, of padding too, are on their way while positions and tables are read */
    bf16 *values = (bf16 *)a.qkv + (int64_t)row * heads * d;
    int head = (int)blockIdx.y * WARPS + (int)threadIdx.x / 32;
    head_values<PAIRS> v = {};
    if (head < heads) v = read_head<PAIRS>(values + head * d, a.bias ? a.bias + head * d : NULL, half, lane);
    if (row >= *a.rows.num_rows) return;
    if (a.full_norm) full_norm_scales<PAIRS>(a, values, head_squares, scales);
    int32_t position = a.rows.positions[row], block = a.rows.tables[a.rows.table_at[row] + position / MOE_CUDA_PAGE_TOKENS];
    for (bool first = true; head < heads; head += (int)gridDim.y * WARPS, first = false) {
        bool is_query = head < q_heads, is_value = head >= q_heads + kv_heads;
        int kv_head = is_value ? head - q_heads - kv_heads : head - q_heads;
        if (!first) v = read_head<PAIRS>(values + head * d, a.bias ? a.bias + head * d : NULL, half, lane);
        const float *norm = is_value ? NULL : is_query ? a.q_norm : a.k_norm;
        if (norm && a.full_norm)
            apply_norm(v, scales[is_query ? 0 : 1], norm + (is_query ? head : kv_head) * d, half, lane);
        else if (norm)
            apply_norm(v, 1.0f / sqrtf(squares(v) / (float)d + a.eps), norm, half, lane);
        for (int p = 0; a.clip > 0 && p < PAIRS; p++) {
            v.low[p] = clamp(v.low[p], a.clip);
            v.high[p] = clamp(v.high[p], a.clip);
        }
        if (!is_value) rotate(v, a.cosine + (int64_t)row * half, a.sine + (int64_t)row * half, half, lane);
        int64_t at = (((int64_t)block * kv_heads + kv_head) * MOE_CUDA_PAGE_TOKENS + position % MOE_CUDA_PAGE_TOKENS) * d;
        write_head(is_query ? values + head * d : (bf16 *)(is_value ? a.kv.values : a.kv.keys) + at, v, half, lane);
    }
}

extern "C" cudaError_t moe_cuda_project_rows(const moe_cuda_queue *q, const moe_cuda_project *a) {
    int heads = a->shape.num_heads + 2 * a->shape.num_kv_heads, half = a->shape.head_dim / 2;
    unsigned groups = a->full_norm ? 1 : (unsigned)((heads + WARPS - 1) / WARPS);
    dim3 grid((unsigned)a->max_rows, groups);
    size_t shared_bytes = a->full_norm ? (size_t)heads * sizeof(float) : 0;
    if (half > 32 * MAX_PAIRS) return cudaErrorInvalidValue;
    if (half <= 32) return launch(q, project_kernel<1>, grid, WARPS * 32, shared_bytes, *a);
    if (half <= 64) return launch(q, project_kernel<2>, grid, WARPS * 32, shared_bytes, *a);
    return launch(q, project_kernel<MAX_PAIRS>, grid, WARPS * 32, shared_bytes, *a);
}
