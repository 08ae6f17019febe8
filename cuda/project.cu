/* What stands around attention and works on a row alone: the embedding with the rotation's angles, and between the q, k, v
 * product and attention the biases, norms, clamp, rotation and the store into the KV pool. Half a warp takes one head. */
#include "cuda/base_device.cuh"

#define GROUP 16       /* threads of a head */
#define BLOCK_HEADS 16 /* that a block takes at a time */
#define MAX_VALUES 8   /* rotated pairs of a thread: head_dim ≤ 256 */
#define MANY_ROWS 8    /* a multiprocessor, of the projections */

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

/* A head's pairs (i, i + d/2), i = VALUES · lane + v. */
template <int VALUES>
struct head_values {
    float low[VALUES], high[VALUES];
};

/* What one load or store moves. */
template <int VALUES>
struct __align__(2 * VALUES) bf16_values {
    uint16_t bits[VALUES];
};
template <int VALUES>
struct __align__(4 * VALUES) float_values {
    float values[VALUES];
};

/* VALUES numbers by loads as wide as they allow, from a multiple of VALUES on. */
template <int VALUES>
static __device__ __forceinline__ void read_values(const bf16 *from, float (&to)[VALUES]) {
    const bf16_values<VALUES> x = *(const bf16_values<VALUES> *)from;
#pragma unroll
    for (int v = 0; v < VALUES; v++) to[v] = __uint_as_float((uint32_t)x.bits[v] << 16);
}

template <int VALUES>
static __device__ __forceinline__ void read_values(const float *from, float (&to)[VALUES]) {
    constexpr int WIDTH = VALUES < 4 ? VALUES : 4;
#pragma unroll
    for (int v = 0; v < VALUES; v += WIDTH) {
        const float_values<WIDTH> x = *(const float_values<WIDTH> *)(from + v);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) to[v + i] = x.values[i];
    }
}

template <int VALUES>
static __device__ __forceinline__ void write_values(bf16 *to, const float (&from)[VALUES]) {
    bf16_values<VALUES> x;
#pragma unroll
    for (int v = 0; v < VALUES; v++) x.bits[v] = __bfloat16_as_ushort(__float2bfloat16(from[v]));
    *(bf16_values<VALUES> *)to = x;
}

template <int VALUES>
static __device__ __forceinline__ head_values<VALUES> read_head(const bf16 *from, const float *bias, int half, int lane) {
    head_values<VALUES> v = {};
    int i = VALUES * lane;
    if (i >= half) return v;
    read_values(from + i, v.low);
    read_values(from + half + i, v.high);
    if (!bias) return v;
    float low[VALUES], high[VALUES];
    read_values(bias + i, low);
    read_values(bias + half + i, high);
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
        v.low[j] += low[j];
        v.high[j] += high[j];
    }
    return v;
}

/* The sum of squares of a head, in each of its threads; the two heads of a warp may come here apart. */
template <int VALUES>
static __device__ __forceinline__ float squares(const head_values<VALUES> &v) {
    const uint32_t mine = 0xffffu << (threadIdx.x & GROUP);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < VALUES; j++) sum = fmaf(v.low[j], v.low[j], fmaf(v.high[j], v.high[j], sum));
    for (int d = GROUP / 2; d > 0; d >>= 1) sum += __shfl_xor_sync(mine, sum, d);
    return sum;
}

template <int VALUES>
static __device__ __forceinline__ void apply_norm(head_values<VALUES> &v, float scale, const float *weight, int half, int lane) {
    float low[VALUES], high[VALUES];
    int i = VALUES * lane;
    if (i >= half) return;
    read_values(weight + i, low);
    read_values(weight + half + i, high);
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
        v.low[j] = v.low[j] * scale * low[j];
        v.high[j] = v.high[j] * scale * high[j];
    }
}

/* NaN stays. */
static __device__ __forceinline__ float clamp(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

template <int VALUES>
static __device__ __forceinline__ void rotate(head_values<VALUES> &v, const head_values<VALUES> &cosine_sine) {
#pragma unroll
    for (int j = 0; j < VALUES; j++) {
        float first = v.low[j], second = v.high[j], cosine = cosine_sine.low[j], sine = cosine_sine.high[j];
        v.low[j] = first * cosine - second * sine;
        v.high[j] = second * cosine + first * sine;
    }
}

/* 1 / root mean square of the row's whole q (scales[0]) and k (scales[1]); squares are added head by head, in order. */
template <int VALUES>
static __device__ void full_norm_scales(const moe_cuda_project &a, const bf16 *row, float *head_squares, float *scales) {
    int lane = threadIdx.x % GROUP, d = a.shape.head_dim, heads = a.shape.num_heads + a.shape.num_kv_heads;
    for (int head = threadIdx.x / GROUP; head < heads; head += BLOCK_HEADS) {
        float sum = squares(read_head<VALUES>(row + head * d, a.bias ? a.bias + head * d : NULL, d / 2, lane));
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

/* Where a row's keys and values go, and its rotation. */
template <int VALUES>
struct row_place {
    int64_t block;
    int32_t offset; /* in the block, in positions */
    head_values<VALUES> cosine_sine;
};

template <int VALUES>
static __device__ __forceinline__ row_place<VALUES> read_place(const moe_cuda_project &a, int row, int half, int lane) {
    row_place<VALUES> place = {};
    int32_t position = a.rows.positions[row];
    if (VALUES * lane < half) {
        read_values(a.cosine + (int64_t)row * half + VALUES * lane, place.cosine_sine.low);
        read_values(a.sine + (int64_t)row * half + VALUES * lane, place.cosine_sine.high);
    }
    place.block = a.rows.tables[a.rows.table_at[row] + position / MOE_CUDA_PAGE_TOKENS];
    place.offset = position % MOE_CUDA_PAGE_TOKENS;
    return place;
}

template <int VALUES>
static __global__ void __launch_bounds__(BLOCK_HEADS *GROUP) project_kernel(const moe_cuda_project a) {
    extern __shared__ float head_squares[];
    __shared__ float scales[2];
    const int lane = threadIdx.x % GROUP, d = a.shape.head_dim, half = d / 2, row = blockIdx.x;
    const int q_heads = a.shape.num_heads, kv_heads = a.shape.num_kv_heads, heads = q_heads + 2 * kv_heads;
    let_successor_start();
    wait_for_predecessor();
    /* the first head's values, of padding too, are on their way while positions and tables are read */
    bf16 *values = (bf16 *)a.qkv + (int64_t)row * heads * d;
    int head = (int)blockIdx.y * BLOCK_HEADS + (int)threadIdx.x / GROUP;
    head_values<VALUES> v = {};
    if (head < heads) v = read_head<VALUES>(values + head * d, a.bias ? a.bias + head * d : NULL, half, lane);
    if (row >= *a.rows.num_rows) return;
    if (a.full_norm) full_norm_scales<VALUES>(a, values, head_squares, scales);
    const row_place<VALUES> place = read_place<VALUES>(a, row, half, lane);
    for (int next; head < heads; head = next) {
        bool is_query = head < q_heads, is_value = head >= q_heads + kv_heads;
        int kv_head = is_value ? head - q_heads - kv_heads : head - q_heads;
        head_values<VALUES> following = {};
        next = head + (int)gridDim.y * BLOCK_HEADS;
        if (next < heads) following = read_head<VALUES>(values + next * d, a.bias ? a.bias + next * d : NULL, half, lane);
        const float *norm = is_value ? NULL : is_query ? a.q_norm : a.k_norm;
        if (norm && a.full_norm)
            apply_norm(v, scales[is_query ? 0 : 1], norm + (is_query ? head : kv_head) * d, half, lane);
        else if (norm)
            apply_norm(v, 1.0f / sqrtf(squares(v) / (float)d + a.eps), norm, half, lane);
        for (int j = 0; a.clip > 0 && j < VALUES; j++) {
            v.low[j] = clamp(v.low[j], a.clip);
            v.high[j] = clamp(v.high[j], a.clip);
        }
        if (!is_value) rotate(v, place.cosine_sine);
        int64_t at = ((place.block * kv_heads + kv_head) * MOE_CUDA_PAGE_TOKENS + place.offset) * d;
        bf16 *to = is_query ? values + head * d : (bf16 *)(is_value ? a.kv.values : a.kv.keys) + at;
        if (VALUES * lane < half) {
            write_values(to + VALUES * lane, v.low);
            write_values(to + half + VALUES * lane, v.high);
        }
        v = following;
    }
}

extern "C" cudaError_t moe_cuda_project_rows(const moe_cuda_queue *q, const moe_cuda_project *a) {
    int heads = a->shape.num_heads + 2 * a->shape.num_kv_heads, half = a->shape.head_dim / 2;
    int values = half <= GROUP ? 1 : half <= 2 * GROUP ? 2 : half <= 4 * GROUP ? 4 : 8, threads = BLOCK_HEADS * GROUP;
    /* many rows: a block for each, which reads a head ahead; few: several blocks */
    bool whole_rows = a->full_norm || a->max_rows >= MANY_ROWS * q->num_sms;
    dim3 grid((unsigned)a->max_rows, whole_rows ? 1 : (unsigned)((heads + BLOCK_HEADS - 1) / BLOCK_HEADS));
    size_t shared_bytes = a->full_norm ? (size_t)heads * sizeof(float) : 0;
    if (half > MAX_VALUES * GROUP || half % values != 0) return cudaErrorInvalidValue;
    if (values == 1) return launch(q, project_kernel<1>, grid, threads, shared_bytes, *a);
    if (values == 2) return launch(q, project_kernel<2>, grid, threads, shared_bytes, *a);
    if (values == 4) return launch(q, project_kernel<4>, grid, threads, shared_bytes, *a);
    return launch(q, project_kernel<MAX_VALUES>, grid, threads, shared_bytes, *a);
}
