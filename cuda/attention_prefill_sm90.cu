/* Attention of prompt rows on Hopper, head_dim 128: as attention_prefill.cu, with warpgroup products. Two warpgroups of 64 (row,
 * query head) pairs each share key tiles of 128. While a warpgroup weighs the scores of one tile, the other's products run, and
 * its own product of the next tile's keys is already queued behind its values'. */
#include "cuda/base_device.cuh"

#include "cuda/attention_tile.cuh"
#include "cuda/sm90.cuh"

#define D 128
#define THREADS 256
#define KEYS 128
#define HALF_BYTES (128 * 128) /* 128 rows of 64 elements */
#define TILE_BYTES (2 * HALF_BYTES)

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* d [64, 128] += a [64, 16] · b [16 keys, 128]: a in registers, b with its columns consecutive in memory. */
static __device__ __forceinline__ void multiply_values(float *d, const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MOE_REGS_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
        : MOE_ACC_32(0), MOE_ACC_32(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* Values [key][64 d] in two halves, 128-byte swizzle: 8 keys to an atom (stride 1024), the next 64 columns one half further. */
static __device__ __forceinline__ uint64_t values_descriptor(uint32_t shared) {
    return (uint64_t)((shared & 0x3ffff) >> 4) | (uint64_t)(HALF_BYTES >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}

/* Where 16-byte unit `unit` of row `row` lies: two halves of 64 columns, units exchanged by row. */
static __device__ __forceinline__ uint32_t place(int row, int unit) {
    return (uint32_t)((unit >> 3) * HALF_BYTES + row * 128 + ((unit & 7) ^ (row & 7)) * 16);
}

static __device__ __forceinline__ void load_queries(const moe_cuda_attention &a, const tile &t, uint32_t to) {
#pragma unroll
    for (int i = 0; i < MOE_CUDA_PREFILL_QUERIES * 16 / THREADS; i++) {
        int pair = i * (THREADS / 16) + (int)threadIdx.x / 16, unit = (int)threadIdx.x % 16, row = pair / t.group;
        bool valid = row < t.rows;
        const bf16 *from = (const bf16 *)a.q + (int64_t)(t.first_row + (valid ? row : 0)) * a.q_stride +
                           (int64_t)(t.kv_head * t.group + pair % t.group) * D + unit * 8;
        copy_async(to + place(pair, unit), from, valid);
    }
}

/* Keys or values at positions [key, key + 128); zeros past the tile's last position. */
static __device__ __forceinline__ void load_keys(const moe_cuda_attention &a, const tile &t, const int32_t *table,
                                                 const void *pool, int32_t key, uint32_t to) {
#pragma unroll
    for (int i = 0; i < KEYS * 16 / THREADS; i++) {
        int row = i * (THREADS / 16) + (int)threadIdx.x / 16, unit = (int)threadIdx.x % 16;
        bool valid = key + row <= t.last_position;
        int64_t block = valid ? table[key / MOE_CUDA_PAGE_TOKENS + i] : 0; /* 16 rows a turn: one KV block */
        const bf16 *from =
            (const bf16 *)pool + ((block * a.shape.num_kv_heads + t.kv_head) * MOE_CUDA_PAGE_TOKENS + row % 16) * D + unit * 8;
        copy_async(to + place(row, unit), from, valid);
    }
}

/* scores = Q K^T of the warpgroup's 64 pairs, in the background. */
static __device__ __forceinline__ void start_scores(float (&scores)[64], uint32_t queries, uint32_t keys) {
    moe_sm90::wgmma_begin();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t at = (uint32_t)(k / 4 * HALF_BYTES + k % 4 * 32);
        moe_sm90::wgmma<128>(scores, moe_sm90::descriptor(queries + at, 1024), moe_sm90::descriptor(keys + at, 1024), k > 0);
    }
    moe_sm90::wgmma_commit();
}

/* out += weights · V, in the background. */
static __device__ __forceinline__ void start_values(float (&out)[64], const uint32_t (&weights)[KEYS / 16][4], uint32_t values) {
    moe_sm90::wgmma_begin();
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) multiply_values(out, weights[k], values_descriptor(values + (uint32_t)k * 16 * 128));
    moe_sm90::wgmma_commit();
}

/* Keeps the compiler from moving what it does with accumulators past the products that run in the background. */
static __device__ __forceinline__ void pin(float (&registers)[64]) {
#pragma unroll
    for (int i = 0; i < 64; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

static __device__ __forceinline__ void pin(uint32_t (&registers)[KEYS / 16][4]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}

struct row_sums {
    float max[2], sum[2], scale[2]; /* scale: what the outputs so far are to be multiplied by */
};

static __device__ __forceinline__ void mask(float (&scores)[64], const int32_t (&positions)[2], int32_t key, int32_t window,
                                            int lane) {
#pragma unroll
    for (int i = 0; i < 64; i++) {
        int32_t at = key + i / 4 * 8 + lane % 4 * 2 + (i & 1), position = positions[i / 2 % 2];
        if (at > position || (window > 0 && at <= position - window)) scores[i] = -CUDART_INF_F;
    }
}

static __device__ __forceinline__ void weigh(float (&scores)[64], uint32_t (&weights)[KEYS / 16][4], row_sums &s,
                                             float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float highest = -CUDART_INF_F;
#pragma unroll
        for (int n = 0; n < 16; n++) highest = fmaxf(highest, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        highest = fmaxf(highest * scale_log2, s.max[half]);
        float base = highest == -CUDART_INF_F ? 0 : highest, sum = 0;
        s.scale[half] = exp2f(s.max[half] - base);
        s.max[half] = highest;
#pragma unroll
        for (int n = 0; n < 16; n++) {
            float low = exp2f(fmaf(scores[4 * n + 2 * half], scale_log2, -base)),
                  high = exp2f(fmaf(scores[4 * n + 2 * half + 1], scale_log2, -base));
            sum += low + high;
            weights[n / 2][n % 2 * 2 + half] = pack(low, high);
        }
        s.sum[half] = fmaf(s.sum[half], s.scale[half], sum);
    }
}

static __device__ __forceinline__ void write_out(const moe_cuda_attention &a, const tile &t, const float (&out)[64], row_sums &s,
                                                 int warp, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = s.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        int pair = warp * 16 + half * 8 + lane / 4, row = pair / t.group;
        if (row >= t.rows) continue;
        bf16 *y = (bf16 *)a.y + ((int64_t)(t.first_row + row) * a.shape.num_heads + t.kv_head * t.group + pair % t.group) * D;
        float scale = 1.0f / sum;
#pragma unroll
        for (int n = 0; n < 16; n++) {
            uint32_t bits = pack(out[4 * n + 2 * half] * scale, out[4 * n + 2 * half + 1] * scale);
            memcpy(y + n * 8 + lane % 4 * 2, &bits, sizeof bits);
        }
    }
}

/* Whether every pair of the tile sees all keys of [key, key + 128). */
static __device__ __forceinline__ bool sees_all(const tile &t, int32_t key, int32_t window) {
    return key + KEYS - 1 <= t.first_position && (window <= 0 || key > t.last_position - window);
}

static __device__ __forceinline__ void arrived() {
    copy_wait<0>();
    moe_sm90::fence_async_shared();
    __syncthreads();
}

/* Buffers: queries, two of keys, two of values. Tile j's values are multiplied while tile j + 1's scores are computed and
 * weighed. */
static __device__ __forceinline__ void attend(const moe_cuda_attention &a, const tile &t, uint32_t memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t queries = memory + (uint32_t)(threadIdx.x / 128) * 64 * 128, keys = memory + TILE_BYTES,
                   values = memory + 3 * TILE_BYTES;
    const float scale_log2 = rsqrtf((float)D) * 1.44269504088896f;
    const int32_t *table = a.rows.tables + a.rows.table_at[t.first_row];
    const int32_t window = a.shape.window, lowest = window > 0 ? max(t.first_position + 1 - window, 0) : 0;
    int32_t positions[2], key = lowest / KEYS * KEYS, stage = 0;
    for (int i = 0; i < 2; i++) positions[i] = t.first_position + min((warp * 16 + i * 8 + lane / 4) / t.group, t.rows - 1);
    row_sums s = {{-CUDART_INF_F, -CUDART_INF_F}, {0, 0}, {1, 1}};
    float out[64] = {}, scores[64];
    uint32_t weights[KEYS / 16][4], next[KEYS / 16][4];
    load_queries(a, t, memory);
    load_keys(a, t, table, a.kv.keys, key, keys);
    copy_commit();
    arrived();
    load_keys(a, t, table, a.kv.values, key, values);
    if (key + KEYS <= t.last_position) load_keys(a, t, table, a.kv.keys, key + KEYS, keys + TILE_BYTES);
    copy_commit();
    pin(scores);
    start_scores(scores, queries, keys);
    moe_sm90::wgmma_wait<0>();
    pin(scores);
    if (!sees_all(t, key, window)) mask(scores, positions, key, window, lane);
    weigh(scores, weights, s, scale_log2);
    for (; key + KEYS <= t.last_position; key += KEYS, stage ^= 1) {
        arrived(); /* this tile's values and the next keys; nobody reads the other buffers any more */
        load_keys(a, t, table, a.kv.values, key + KEYS, values + (uint32_t)(stage ^ 1) * TILE_BYTES);
        if (key + 2 * KEYS <= t.last_position)
            load_keys(a, t, table, a.kv.keys, key + 2 * KEYS, keys + (uint32_t)stage * TILE_BYTES);
        copy_commit();
        pin(scores);
        pin(out);
        pin(weights);
        start_scores(scores, queries, keys + (uint32_t)(stage ^ 1) * TILE_BYTES);
        start_values(out, weights, values + (uint32_t)stage * TILE_BYTES);
        moe_sm90::wgmma_wait<1>(); /* the next tile's scores; this one's values go on */
        pin(scores);
        if (!sees_all(t, key + KEYS, window)) mask(scores, positions, key + KEYS, window, lane);
        weigh(scores, next, s, scale_log2);
        moe_sm90::wgmma_wait<0>();
        pin(out);
        pin(weights);
        pin(next);
#pragma unroll
        for (int i = 0; i < 64; i++) out[i] *= s.scale[i / 2 % 2];
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) weights[i / 4][i % 4] = next[i / 4][i % 4];
    }
    arrived();
    pin(out);
    pin(weights);
    start_values(out, weights, values + (uint32_t)stage * TILE_BYTES);
    moe_sm90::wgmma_wait<0>();
    pin(out);
    write_out(a, t, out, s, warp, lane);
}
#endif

static __global__ void __launch_bounds__(THREADS, 1) prefill_sm90_kernel(const moe_cuda_attention a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t memory[];
    let_successor_start();
    wait_for_predecessor();
    if ((int32_t)blockIdx.y >= *a.num_tiles) return;
    attend(a, read_tile(a, blockIdx.y, blockIdx.x), shared_address(memory));
#endif
}

extern "C" cudaError_t moe_cuda_attention_prefill_sm90(const moe_cuda_queue *q, const moe_cuda_attention *a) {
    return launch(q, prefill_sm90_kernel, dim3((unsigned)a->shape.num_kv_heads, (unsigned)a->max_tiles), THREADS, 5 * TILE_BYTES,
                  *a);
}
