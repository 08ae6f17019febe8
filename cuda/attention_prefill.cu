/* Attention of prompt rows: flash attention with the tensor-core product of sm_80. A block takes a tile of up to 128 (row, query
 * head) pairs of one key head, so that the query heads of a key head share the keys; keys come in tiles of 64 at absolute
 * multiples of 64, ascending, double-buffered. A pair's result depends on its own row and keys alone: a wholly masked tile of
 * keys changes no bit of it, so any cut of a prompt into chunks and tiles gives the same bits. */
#include "cuda/attention_tile.cuh"

#define WARPS 4
#define QUERIES MOE_CUDA_PREFILL_QUERIES
#define KEYS 64
#define PAGE MOE_CUDA_PAGE_TOKENS

template <int D>
static __device__ __forceinline__ void load_queries(const moe_cuda_attention &a, const tile &t, uint32_t to) {
    const int units = D / 8;
#pragma unroll
    for (int i = 0; i < QUERIES * units / (WARPS * 32); i++) {
        int index = i * WARPS * 32 + (int)threadIdx.x, pair = index / units, unit = index % units;
        int row = pair / t.group;
        bool valid = row < t.rows;
        const bf16 *from = (const bf16 *)a.q + (int64_t)(t.first_row + (valid ? row : 0)) * a.q_stride +
                           (int64_t)(t.kv_head * t.group + pair % t.group) * D + unit * 8;
        copy_async(to + (uint32_t)(pair * units + (unit ^ (pair & 7))) * 16, from, valid);
    }
}

/* Keys [key, key + 64) and their values, [64][D] each; zeros past the tile's last position. */
template <int D>
static __device__ __forceinline__ void load_keys(const moe_cuda_attention &a, const tile &t, const int32_t *table, int32_t key,
                                                 uint32_t to) {
    const int units = D / 8, rows_a_pass = WARPS * 32 / units;
#pragma unroll
    for (int i = 0; i < KEYS / rows_a_pass; i++) {
        int row = i * rows_a_pass + (int)threadIdx.x / units, unit = (int)threadIdx.x % units;
        bool valid = key + row <= t.last_position;
        int64_t block = valid ? table[(key + row) / PAGE] : 0;
        int64_t at = ((block * a.shape.num_kv_heads + t.kv_head) * PAGE + row % PAGE) * D + unit * 8;
        uint32_t dst = to + (uint32_t)(row * units + (unit ^ (row & 7))) * 16;
        copy_async(dst, (const bf16 *)a.kv.keys + at, valid);
        copy_async(dst + KEYS * D * 2, (const bf16 *)a.kv.values + at, valid);
    }
}

template <int D>
struct query_state {
    float out[2][D / 8][4], max[2][2], sum[2][2];
};

/* scores[m][n] = Q K^T of the warp's 32 pairs and 64 keys. */
template <int D>
static __device__ __forceinline__ void score(float (&scores)[2][KEYS / 8][4], uint32_t queries, uint32_t keys, int warp,
                                             int lane) {
    const int units = D / 8, matrix = lane / 8, line = lane % 8;
#pragma unroll
    for (int m = 0; m < 2; m++)
        for (int n = 0; n < KEYS / 8; n++)
            for (int i = 0; i < 4; i++) scores[m][n][i] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t q[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
            int row = warp * 32 + m * 16 + line + (matrix & 1) * 8, unit = 2 * k + (matrix >> 1);
            load_matrices(q[m], queries + (uint32_t)(row * units + (unit ^ (row & 7))) * 16);
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            uint32_t b[4];
            int row = n * 16 + line + (matrix >> 1) * 8, unit = 2 * k + (matrix & 1);
            load_matrices(b, keys + (uint32_t)(row * units + (unit ^ (row & 7))) * 16);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply(scores[m][2 * n], q[m], b[0], b[1]);
                multiply(scores[m][2 * n + 1], q[m], b[2], b[3]);
            }
        }
    }
}

/* scores become weights relative to the new maximum; what was summed before is scaled to it. */
template <int D>
static __device__ __forceinline__ void softmax(query_state<D> &s, float (&scores)[2][KEYS / 8][4], float scale_log2) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = -CUDART_INF_F;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                highest = fmaxf(highest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            highest = fmaxf(highest * scale_log2, s.max[m][half]);
            float base = highest == -CUDART_INF_F ? 0 : highest, sum = 0, scale = exp2f(s.max[m][half] - base);
            s.max[m][half] = highest;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float weight = exp2f(fmaf(scores[m][n][2 * half + c], scale_log2, -base));
                    scores[m][n][2 * half + c] = weight;
                    sum += weight;
                }
            s.sum[m][half] = fmaf(s.sum[m][half], scale, sum);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                s.out[m][n][2 * half] *= scale;
                s.out[m][n][2 * half + 1] *= scale;
            }
        }
}

template <int D>
static __device__ __forceinline__ void add_values(query_state<D> &s, const float (&weights)[2][KEYS / 8][4], uint32_t values,
                                                  int lane) {
    const int units = D / 8, matrix = lane / 8, line = lane % 8;
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        uint32_t p[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
            p[m][0] = pack(weights[m][2 * k][0], weights[m][2 * k][1]);
            p[m][1] = pack(weights[m][2 * k][2], weights[m][2 * k][3]);
            p[m][2] = pack(weights[m][2 * k + 1][0], weights[m][2 * k + 1][1]);
            p[m][3] = pack(weights[m][2 * k + 1][2], weights[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            int row = k * 16 + line + (matrix & 1) * 8, unit = 2 * n + (matrix >> 1);
            load_matrices_transposed(b, values + (uint32_t)(row * units + (unit ^ (row & 7))) * 16);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply(s.out[m][2 * n], p[m], b[0], b[1]);
                multiply(s.out[m][2 * n + 1], p[m], b[2], b[3]);
            }
        }
    }
}

/* Keys that a pair does not see get the score -inf. positions: of the lane's four pairs. */
static __device__ __forceinline__ void mask(float (&scores)[2][KEYS / 8][4], const int32_t (&positions)[2][2], int32_t key,
                                            int32_t window, int lane) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int32_t at = key + n * 8 + lane % 4 * 2 + (i & 1), position = positions[m][i / 2];
                if (at > position || (window > 0 && at <= position - window)) scores[m][n][i] = -CUDART_INF_F;
            }
}

template <int D>
static __device__ __forceinline__ void write_out(const moe_cuda_attention &a, const tile &t, query_state<D> &s, int warp,
                                                 int lane) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = s.sum[m][half];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            int pair = warp * 32 + m * 16 + half * 8 + lane / 4, row = pair / t.group;
            if (row >= t.rows) continue;
            bf16 *y = (bf16 *)a.y + ((int64_t)(t.first_row + row) * a.shape.num_heads + t.kv_head * t.group + pair % t.group) * D;
            float scale = 1.0f / sum;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                uint32_t bits = pack(s.out[m][n][2 * half] * scale, s.out[m][n][2 * half + 1] * scale);
                memcpy(y + n * 8 + lane % 4 * 2, &bits, sizeof bits);
            }
        }
}

template <int D>
static __global__ void __launch_bounds__(WARPS * 32, 2) prefill_kernel(const moe_cuda_attention a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, item = blockIdx.y;
    const uint32_t queries = shared_address(memory), keys = queries + QUERIES * D * 2, stage_bytes = 2 * KEYS * D * 2;
    const float scale_log2 = rsqrtf((float)D) * 1.44269504088896f;
    let_successor_start();
    wait_for_predecessor();
    if (item >= *a.num_tiles) return;
    const tile t = read_tile(a, item, blockIdx.x);
    const int32_t *table = a.rows.tables + t.table_at;
    int32_t positions[2][2];
    for (int i = 0; i < 4; i++)
        positions[i / 2][i % 2] = t.first_position + min((warp * 32 + i * 8 + lane / 4) / t.group, t.rows - 1);
    int32_t lowest = a.shape.window > 0 ? max(t.first_position + 1 - a.shape.window, 0) : 0;
    int32_t key = lowest / KEYS * KEYS, stage = 0;
    query_state<D> s = {};
    for (int i = 0; i < 4; i++) s.max[i / 2][i % 2] = -CUDART_INF_F;
    load_queries<D>(a, t, queries);
    load_keys<D>(a, t, table, key, keys);
    copy_commit();
    for (; key <= t.last_position; key += KEYS, stage ^= 1) {
        copy_wait<0>();
        __syncthreads(); /* this tile has come, and the other buffer is read to its end */
        if (key + KEYS <= t.last_position) load_keys<D>(a, t, table, key + KEYS, keys + (stage ^ 1) * stage_bytes);
        copy_commit();
        float scores[2][KEYS / 8][4];
        score<D>(scores, queries, keys + stage * stage_bytes, warp, lane);
        bool whole = key + KEYS - 1 <= t.first_position && (a.shape.window <= 0 || key > t.last_position - a.shape.window);
        if (!whole) mask(scores, positions, key, a.shape.window, lane);
        softmax<D>(s, scores, scale_log2);
        add_values<D>(s, scores, keys + stage * stage_bytes + KEYS * D * 2, lane);
    }
    write_out<D>(a, t, s, warp, lane);
}

template <int D>
static cudaError_t start(const moe_cuda_queue *q, const moe_cuda_attention *a) {
    size_t shared_bytes = (size_t)(QUERIES + 4 * KEYS) * D * 2;
    return launch(q, prefill_kernel<D>, dim3((unsigned)a->shape.num_kv_heads, (unsigned)a->max_tiles), WARPS * 32, shared_bytes,
                  *a);
}

extern "C" cudaError_t moe_cuda_attention_prefill(const moe_cuda_queue *q, const moe_cuda_attention *a) {
    if (!moe_cuda_attention_supported(&a->shape)) return cudaErrorInvalidValue;
    if (a->shape.head_dim == 128 && q->hopper) return moe_cuda_attention_prefill_sm90(q, a);
    return a->shape.head_dim == 128 ? start<128>(q, a) : start<64>(q, a);
}
