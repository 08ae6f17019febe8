/* The small ops of the base layers: embedding, RMSNorm, rotary, gate, combine, top logits. */
#include "cuda/numbers.cuh"
#include "cuda/simple.h"

#define THREADS 256
#define ROUTE_WARPS 4
#define MAX_EXPERT_WORDS 32 /* 32 experts each: MOE_MAX_EXPERTS */
#define MAX_TOP_K 32

static unsigned blocks_of(int64_t count, int threads) { return (unsigned)((count + threads - 1) / threads); }

/* ---- embedding and conversion ---- */

template <typename W>
static __global__ void embed_kernel(const W *table, const int32_t *ids, int32_t width, float *hidden) {
    const W *from = table + (int64_t)ids[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += THREADS) hidden[(int64_t)blockIdx.x * width + i] = moe_widen(from[i]);
}

extern "C" cudaError_t moe_simple_embed(const moe_cuda_matrix *t, const int32_t *ids, int32_t rows, float *hidden,
                                        cudaStream_t s) {
    if (rows == 0) return cudaSuccess;
    if (t->dtype == MOE_F32)
        embed_kernel<<<rows, THREADS, 0, s>>>(static_cast<const float *>(t->data), ids, t->k, hidden);
    else if (t->dtype == MOE_BF16)
        embed_kernel<<<rows, THREADS, 0, s>>>(static_cast<const moe_bf16 *>(t->data), ids, t->k, hidden);
    else
        embed_kernel<<<rows, THREADS, 0, s>>>(static_cast<const __half *>(t->data), ids, t->k, hidden);
    return cudaGetLastError();
}

template <typename T>
static __global__ void narrow_kernel(const float *from, int64_t count, T *to) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) to[i] = moe_narrow<T>(from[i]);
}

template <typename T>
static __global__ void widen_kernel(const T *from, int64_t count, float *to) {
    int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) to[i] = moe_widen(from[i]);
}

extern "C" cudaError_t moe_simple_narrow(const float *from, int64_t count, moe_dtype dtype, void *to, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    if (dtype == MOE_BF16)
        narrow_kernel<<<blocks_of(count, THREADS), THREADS, 0, stream>>>(from, count, static_cast<moe_bf16 *>(to));
    else
        narrow_kernel<<<blocks_of(count, THREADS), THREADS, 0, stream>>>(from, count, static_cast<float *>(to));
    return cudaGetLastError();
}

extern "C" cudaError_t moe_simple_widen(const void *from, moe_dtype dtype, int64_t count, float *to, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    if (dtype == MOE_BF16)
        widen_kernel<<<blocks_of(count, THREADS), THREADS, 0, stream>>>(static_cast<const moe_bf16 *>(from), count, to);
    else
        widen_kernel<<<blocks_of(count, THREADS), THREADS, 0, stream>>>(static_cast<const float *>(from), count, to);
    return cudaGetLastError();
}

/* ---- RMSNorm ---- */

/* The sum over the block, in every thread: lanes, then warps in order. */
static __device__ float block_sum(float v) {
    __shared__ float warps[THREADS / MOE_WARP];
    v = moe_warp_sum(v);
    if (threadIdx.x % MOE_WARP == 0) warps[threadIdx.x / MOE_WARP] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < THREADS / MOE_WARP; i++) sum += warps[i];
    return sum;
}

template <typename T>
static __global__ void norm_kernel(moe_simple_norm_args a) {
    int64_t row = blockIdx.x / a.group, part = (int64_t)(blockIdx.x % a.group) * a.width;
    const float *x = a.x + (a.row_index ? a.row_index[row] : row) * a.x_stride + part;
    T *y = static_cast<T *>(a.y) + row * a.y_stride + part;
    float squares = 0;
    for (int i = threadIdx.x; i < a.width; i += THREADS) squares = fmaf(x[i], x[i], squares);
    float scale = 1.0f / sqrtf(block_sum(squares) / (float)a.width + a.eps);
    for (int i = threadIdx.x; i < a.width; i += THREADS) y[i] = moe_narrow<T>(x[i] * scale * a.weight[i]);
}

extern "C" cudaError_t moe_simple_rms_norm(const moe_simple_norm_args *a, cudaStream_t stream) {
    if (a->count == 0) return cudaSuccess;
    if (a->y_dtype == MOE_BF16)
        norm_kernel<moe_bf16><<<a->count, THREADS, 0, stream>>>(*a);
    else
        norm_kernel<float><<<a->count, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

/* ---- rotary ---- */

static __global__ void angles_kernel(const int32_t *positions, const float *frequency, int32_t count, int32_t half, float *cosine,
                                     float *sine) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    float angle = (float)positions[i / half] * frequency[i % half];
    cosine[i] = cosf(angle);
    sine[i] = sinf(angle);
}

extern "C" cudaError_t moe_simple_rotary_angles(const int32_t *positions, const float *inverse_frequency, int32_t rows,
                                                int32_t half, float *cosine, float *sine, cudaStream_t stream) {
    int32_t count = rows * half;
    if (count == 0) return cudaSuccess;
    angles_kernel<<<blocks_of(count, THREADS), THREADS, 0, stream>>>(positions, inverse_frequency, count, half, cosine, sine);
    return cudaGetLastError();
}

static __device__ __forceinline__ float clamped(float v, float limit) {
    return limit > 0 ? (v > limit ? limit : v < -limit ? -limit : v) : v;
}

/* Where position `p` of head `head` lies in a layer's keys and values. */
static __device__ __forceinline__ int64_t kv_at(const moe_cuda_kv_layer &kv, const moe_simple_places &p, int sequence,
                                                int position, int head) {
    int64_t block = p.tables[p.table_first[sequence] + position / MOE_CUDA_KV_BLOCK];
    return ((block * kv.kv_heads + head) * MOE_CUDA_KV_BLOCK + position % MOE_CUDA_KV_BLOCK) * kv.head_dim;
}

template <typename T>
static __global__ void project_kernel(moe_simple_project_args a) {
    int d = a.kv.head_dim, half = d / 2, kv_heads = a.kv.kv_heads, rotated = a.heads + kv_heads;
    int64_t row = blockIdx.x;
    int sequence = a.places.sequences[row], position = a.places.positions[row];
    const float *from = a.qkv + row * (rotated + kv_heads) * d;
    for (int i = threadIdx.x; i < rotated * half; i += THREADS) {
        int head = i / half, at = i % half;
        float c = a.cosine[row * half + at], s = a.sine[row * half + at];
        float first = clamped(from[head * d + at], a.clip), second = clamped(from[head * d + at + half], a.clip);
        T *to = head < a.heads ? static_cast<T *>(a.q) + (row * a.heads + head) * d
                               : static_cast<T *>(a.kv.keys) + kv_at(a.kv, a.places, sequence, position, head - a.heads);
        to[at] = moe_narrow<T>(first * c - second * s);
        to[at + half] = moe_narrow<T>(second * c + first * s);
    }
    for (int i = threadIdx.x; i < kv_heads * d; i += THREADS)
        static_cast<T *>(a.kv.values)[kv_at(a.kv, a.places, sequence, position, i / d) + i % d] =
            moe_narrow<T>(clamped(from[rotated * d + i], a.clip));
}

extern "C" cudaError_t moe_simple_project(const moe_simple_project_args *a, cudaStream_t stream) {
    if (a->rows == 0) return cudaSuccess;
    if (a->kv.dtype == MOE_BF16)
        project_kernel<moe_bf16><<<a->rows, THREADS, 0, stream>>>(*a);
    else
        project_kernel<float><<<a->rows, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

/* ---- gate ---- one warp a row; lane l has the experts l, l + 32, … */

static __global__ void gate_kernel(const float *all_logits, int32_t rows, int32_t num_experts, int32_t top_k, bool norm_topk,
                                   int32_t *experts, float *weights) {
    __shared__ float chosen_weights[ROUTE_WARPS][MAX_TOP_K];
    int lane = threadIdx.x % MOE_WARP, warp = threadIdx.x / MOE_WARP;
    int64_t row = (int64_t)blockIdx.x * ROUTE_WARPS + warp;
    if (row >= rows) return;
    const float *logits = all_logits + row * num_experts;
    float max = -CUDART_INF_F, total = 0;
    for (int e = lane; e < num_experts; e += MOE_WARP) max = fmaxf(max, logits[e]);
    max = moe_warp_max(max);
    for (int e = lane; e < num_experts; e += MOE_WARP) total += expf(logits[e] - max);
    total = moe_warp_sum(total);
    uint32_t chosen = 0; /* bit i: expert 32 i + lane */
    for (int j = 0; j < top_k; j++) {
        float best = -CUDART_INF_F;
        int id = num_experts;
        for (int e = lane, i = 0; e < num_experts; e += MOE_WARP, i++) {
            float logit = isnan(logits[e]) ? -CUDART_INF_F : logits[e];
            if (!(chosen >> i & 1) && (id == num_experts || logit > best)) best = logit, id = e;
        }
        for (int offset = MOE_WARP / 2; offset > 0; offset /= 2) {
            float other = __shfl_xor_sync(0xffffffffu, best, offset);
            int other_id = __shfl_xor_sync(0xffffffffu, id, offset);
            if (other > best || (other == best && other_id < id)) best = other, id = other_id;
        }
        if (id % MOE_WARP == lane) chosen |= 1u << (id / MOE_WARP);
    }
    int written = 0;
    for (int i = 0; i * MOE_WARP < num_experts; i++) {
        bool mine = chosen >> i & 1;
        uint32_t all = __ballot_sync(0xffffffffu, mine);
        int slot = written + __popc(all & ((1u << lane) - 1));
        if (mine) {
            experts[row * top_k + slot] = i * MOE_WARP + lane;
            chosen_weights[warp][slot] = expf(logits[i * MOE_WARP + lane] - max) / total;
        }
        written += __popc(all);
    }
    __syncwarp();
    float sum = 0;
    for (int j = 0; j < top_k; j++) sum += chosen_weights[warp][j];
    if (lane < top_k) weights[row * top_k + lane] = norm_topk ? chosen_weights[warp][lane] / sum : chosen_weights[warp][lane];
}

extern "C" cudaError_t moe_simple_gate_topk(const float *logits, int32_t rows, int32_t num_experts, int32_t top_k, bool norm_topk,
                                            int32_t *experts, float *weights, cudaStream_t stream) {
    if (num_experts > MAX_EXPERT_WORDS * MOE_WARP || top_k > MAX_TOP_K || top_k > num_experts) return cudaErrorInvalidValue;
    if (rows == 0) return cudaSuccess;
    gate_kernel<<<blocks_of(rows, ROUTE_WARPS), ROUTE_WARPS * MOE_WARP, 0, stream>>>(logits, rows, num_experts, top_k, norm_topk,
                                                                                     experts, weights);
    return cudaGetLastError();
}

/* ---- combine ---- */

template <typename T>
static __global__ void combine_kernel(moe_simple_combine_args a) {
    int64_t row = blockIdx.x, h = (int64_t)blockIdx.y * THREADS + threadIdx.x;
    if (h >= a.width) return;
    const T *outputs = static_cast<const T *>(a.outputs) + row * a.top_k * a.width + h;
    float sum = 0;
    int count = a.counts ? a.counts[row] : 0;
    for (int j = 0; j < count; j++) sum = fmaf(a.weights[row * a.top_k + j], moe_widen(outputs[(int64_t)j * a.width]), sum);
    if (a.shared) {
        float scale = a.shared_logits ? 1.0f / (1.0f + expf(-a.shared_logits[row])) : 1.0f;
        sum += scale * a.shared[row * a.width + h];
    }
    a.hidden[row * a.width + h] += sum;
}

extern "C" cudaError_t moe_simple_combine(const moe_simple_combine_args *a, cudaStream_t stream) {
    if (a->rows == 0) return cudaSuccess;
    dim3 grid(a->rows, blocks_of(a->width, THREADS));
    if (a->dtype == MOE_BF16)
        combine_kernel<moe_bf16><<<grid, THREADS, 0, stream>>>(*a);
    else
        combine_kernel<float><<<grid, THREADS, 0, stream>>>(*a);
    return cudaGetLastError();
}

/* ---- top logits ---- a pass over the row for each one */

static __device__ __forceinline__ bool before(float a, int a_id, float b, int b_id) { return a > b || (a == b && a_id < b_id); }

static __global__ void top_kernel(const float *all_logits, int32_t vocab, int32_t count, int32_t *ids, float *top) {
    __shared__ float best_of[THREADS / MOE_WARP];
    __shared__ int id_of[THREADS / MOE_WARP];
    const float *logits = all_logits + (int64_t)blockIdx.x * vocab;
    ids += (int64_t)blockIdx.x * count;
    top += (int64_t)blockIdx.x * count;
    bool finite = true;
    for (int i = threadIdx.x; i < vocab; i += THREADS) finite = finite && isfinite(logits[i]);
    if (!__syncthreads_and(finite)) {
        for (int j = threadIdx.x; j < count; j += THREADS) ids[j] = -1, top[j] = CUDART_NAN_F;
        return;
    }
    float last = CUDART_INF_F;
    int last_id = -1;
    for (int j = 0; j < count; j++) {
        float best = -CUDART_INF_F;
        int id = vocab;
        for (int i = threadIdx.x; i < vocab; i += THREADS)
            if (before(last, last_id, logits[i], i) && before(logits[i], i, best, id)) best = logits[i], id = i;
        for (int offset = MOE_WARP / 2; offset > 0; offset /= 2) {
            float other = __shfl_xor_sync(0xffffffffu, best, offset);
            int other_id = __shfl_xor_sync(0xffffffffu, id, offset);
            if (before(other, other_id, best, id)) best = other, id = other_id;
        }
        if (threadIdx.x % MOE_WARP == 0) best_of[threadIdx.x / MOE_WARP] = best, id_of[threadIdx.x / MOE_WARP] = id;
        __syncthreads();
        for (int w = 0; w < THREADS / MOE_WARP; w++)
            if (before(best_of[w], id_of[w], best, id)) best = best_of[w], id = id_of[w];
        if (threadIdx.x == 0) ids[j] = id, top[j] = best;
        last = best;
        last_id = id;
        __syncthreads();
    }
}

extern "C" cudaError_t moe_simple_logits_top(const float *logits, int32_t rows, int32_t vocab, int32_t count, int32_t *ids,
                                             float *top, cudaStream_t stream) {
    if (rows == 0 || count == 0) return cudaSuccess;
    top_kernel<<<rows, THREADS, 0, stream>>>(logits, vocab, count, ids, top);
    return cudaGetLastError();
}
