/* Attention of prompt rows on Hopper, head_dim 128: as attention_prefill.cu, with warpgroup products. A block stays for many
 * tiles of 128 (row, query head) pairs. One warpgroup fetches queries, and keys and values 128 positions at a time; two attend to
 * 64 of the pairs each. They take turns with the tensor cores, so that one weighs its scores while the other's products run; and
 * a warpgroup's product of the next keys is queued before that of its values, which goes on while it weighs. */
#include "cuda/base_device.cuh"

#include "cuda/attention_tile.cuh"
#include "cuda/sm90.cuh"

#define D 128
#define GROUP 128 /* threads of a warpgroup */
#define CONSUMERS 2
#define THREADS (GROUP * (CONSUMERS + 1))
#define FETCH_REGISTERS 56
#define ATTEND_REGISTERS 224 /* 128 · 56 + 256 · 224 ≤ 65536 */
#define KEYS 128
#define STAGES 2
#define HALF_BYTES (128 * 128) /* 128 rows of 64 elements */
#define TILE_BYTES (2 * HALF_BYTES)
#define RING_BYTES (STAGES * TILE_BYTES)
#define RINGS 3 /* queries, keys, values */
#define BARRIERS_AT (RINGS * RING_BYTES)
#define SHARED_BYTES (BARRIERS_AT + RINGS * 2 * STAGES * 8)

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* Buffers that go round between the fetching warpgroup and the others, as either side sees them: which is next, and the parity of
 * its barriers' phase. */
struct ring {
    uint32_t data, barriers;
    int stage, parity;
    __device__ __forceinline__ ring(uint32_t memory, int index)
        : data(memory + (uint32_t)index * RING_BYTES),
          barriers(memory + BARRIERS_AT + (uint32_t)index * 2 * STAGES * 8),
          stage(0),
          parity(0) {}
    __device__ __forceinline__ uint32_t buffer() const { return data + (uint32_t)stage * TILE_BYTES; }
    __device__ __forceinline__ uint32_t full() const { return barriers + 8 * (uint32_t)stage; }
    __device__ __forceinline__ uint32_t empty() const { return barriers + 8 * (uint32_t)(STAGES + stage); }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    /* fetching side: the next buffer, once nobody reads it any more; then that this thread's copies into it are on their way */
    __device__ __forceinline__ uint32_t claim() const {
        moe_sm90::barrier_wait(empty(), (uint32_t)parity ^ 1);
        return buffer();
    }
    __device__ __forceinline__ void sent() {
        moe_sm90::barrier_arrive_copied(full());
        advance();
    }
    /* attending side: the next buffer, once it is filled; then that this warp reads it no more */
    __device__ __forceinline__ uint32_t receive() const {
        moe_sm90::barrier_wait(full(), (uint32_t)parity);
        moe_sm90::fence_async_shared();
        return buffer();
    }
    __device__ __forceinline__ void release() {
        if (threadIdx.x % 32 == 0) moe_sm90::barrier_arrive(empty());
        advance();
    }
};

/* The block's i-th item. Every other round goes backwards, since the tiles of a round get shorter from its first to its last. */
static __device__ __forceinline__ int32_t item_at(int32_t i) {
    return i * (int32_t)gridDim.x + (int32_t)(i % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

static __device__ __forceinline__ tile read_item(const moe_cuda_attention &a, int32_t item) {
    return read_tile(a, item / a.shape.num_kv_heads, item % a.shape.num_kv_heads);
}

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

/* ---- the fetching warpgroup ---- */

static __device__ __forceinline__ void load_queries(const moe_cuda_attention &a, const tile &t, uint32_t to) {
    const int thread = (int)threadIdx.x % GROUP, unit = thread % 16;
#pragma unroll
    for (int i = 0; i < MOE_CUDA_PREFILL_QUERIES * 16 / GROUP; i++) {
        int pair = i * (GROUP / 16) + thread / 16, row = pair / t.group;
        bool valid = row < t.rows;
        const bf16 *from = (const bf16 *)a.q + (int64_t)(t.first_row + (valid ? row : 0)) * a.q_stride +
                           (int64_t)(t.kv_head * t.group + pair % t.group) * D + unit * 8;
        copy_async(to + place(pair, unit), from, valid);
    }
}

/* Keys or values at positions [key, key + 128); zeros past the tile's last position. */
static __device__ __forceinline__ void load_keys(const moe_cuda_attention &a, const tile &t, const void *pool, int32_t key,
                                                 uint32_t to) {
    const int thread = (int)threadIdx.x % GROUP, unit = thread % 16;
    const int32_t *table = a.rows.tables + t.table_at + key / MOE_CUDA_PAGE_TOKENS;
    const bf16 *head = (const bf16 *)pool + t.kv_head * (MOE_CUDA_PAGE_TOKENS * D) + thread / 16 * D + unit * 8;
    const int64_t block_elements = (int64_t)a.shape.num_kv_heads * (MOE_CUDA_PAGE_TOKENS * D);
#pragma unroll
    for (int i = 0; i < KEYS / MOE_CUDA_PAGE_TOKENS; i++) {
        int64_t at = key + i * MOE_CUDA_PAGE_TOKENS <= t.last_position ? table[i] * block_elements : 0;
#pragma unroll
        for (int j = 0; j < MOE_CUDA_PAGE_TOKENS; j += GROUP / 16) { /* 8 rows a turn */
            int row = i * MOE_CUDA_PAGE_TOKENS + j + thread / 16;
            copy_async(to + place(row, unit), head + at + j * D, key + row <= t.last_position);
        }
    }
}

static __device__ __forceinline__ int32_t first_key(const moe_cuda_attention &a, const tile &t) {
    int32_t window = a.shape.window;
    return window > 0 ? max(t.first_position + 1 - window, 0) / KEYS * KEYS : 0;
}

static __device__ __forceinline__ void fetch(const moe_cuda_attention &a, uint32_t memory, int32_t num_items) {
    ring queries(memory, 0), keys(memory, 1), values(memory, 2);
    for (int32_t i = 0; item_at(i) < num_items; i++) {
        const tile t = read_item(a, item_at(i));
        int32_t key = first_key(a, t);
        load_queries(a, t, queries.claim());
        queries.sent();
        load_keys(a, t, a.kv.keys, key, keys.claim());
        keys.sent();
        for (; key <= t.last_position; key += KEYS) { /* in the order in which they are used */
            if (key + KEYS <= t.last_position) {
                load_keys(a, t, a.kv.keys, key + KEYS, keys.claim());
                keys.sent();
            }
            load_keys(a, t, a.kv.values, key, values.claim());
            values.sent();
        }
    }
}

/* ---- the attending warpgroups ---- */

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

static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* scores become exp2(scores · scale_log2 - the row's highest so far). */
static __device__ __forceinline__ void weigh(float (&scores)[64], row_sums &s, float scale_log2) {
    float highest[2] = {scores[0], scores[2]}, base[2], sum[2] = {0, 0};
#pragma unroll
    for (int i = 1; i < 64; i++) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], scores[i]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], 1));
        highest[half] = fmaxf(highest[half], __shfl_xor_sync(~0u, highest[half], 2));
        highest[half] = fmaxf(highest[half] * scale_log2, s.max[half]);
        base[half] = highest[half] == -CUDART_INF_F ? 0 : highest[half];
        s.scale[half] = exp2_fast(s.max[half] - base[half]);
        s.max[half] = highest[half];
    }
#pragma unroll
    for (int i = 0; i < 64; i++) {
        scores[i] = exp2_fast(fmaf(scores[i], scale_log2, -base[i / 2 % 2]));
        sum[i / 2 % 2] += scores[i];
    }
#pragma unroll
    for (int half = 0; half < 2; half++) s.sum[half] = fmaf(s.sum[half], s.scale[half], sum[half]);
}

/* The weights as an operand from registers. */
static __device__ __forceinline__ void pack_weights(uint32_t (&weights)[KEYS / 16][4], const float (&scores)[64]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1]);
}

/* Word i of lane j of four lanes in a row goes to word j of lane i. */
static __device__ __forceinline__ void turn_four(uint32_t (&w)[4], int lane) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t got = __shfl_xor_sync(~0u, lane & 1 ? w[i] : w[i + 1], 1);
        (lane & 1 ? w[i] : w[i + 1]) = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t got = __shfl_xor_sync(~0u, lane & 2 ? w[i] : w[i + 2], 2);
        (lane & 2 ? w[i] : w[i + 2]) = got;
    }
}

static __device__ __forceinline__ void write_out(const moe_cuda_attention &a, const tile &t, const float (&out)[64],
                                                 const row_sums &s, int warp, int lane) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = s.sum[half];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        int pair = warp * 16 + half * 8 + lane / 4, row = pair / t.group;
        bf16 *y = (bf16 *)a.y + ((int64_t)(t.first_row + row) * a.shape.num_heads + t.kv_head * t.group + pair % t.group) * D;
        float scale = 1.0f / sum;
#pragma unroll
        for (int n = 0; n < 16; n += 4) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) w[i] = pack(out[4 * (n + i) + 2 * half] * scale, out[4 * (n + i) + 2 * half + 1] * scale);
            turn_four(w, lane);
            if (row < t.rows) *(uint4 *)(y + (n + lane % 4) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

/* Whether every pair of the tile sees all keys of [key, key + 128). */
static __device__ __forceinline__ bool sees_all(const tile &t, int32_t key, int32_t window) {
    return key + KEYS - 1 <= t.first_position && (window <= 0 || key > t.last_position - window);
}

/* An attending thread, from tile to tile. */
struct attending {
    ring queries, keys, values;
    int warpgroup, warp, lane;
    float scale_log2;
};

/* One tile. Its j-th values are multiplied while the scores of its keys j + 1 are computed and weighed. */
static __device__ __forceinline__ void attend(const moe_cuda_attention &a, const tile &t, attending &w) {
    const int32_t window = a.shape.window;
    int32_t positions[2], key = first_key(a, t);
    for (int i = 0; i < 2; i++) positions[i] = t.first_position + min((w.warp * 16 + i * 8 + w.lane / 4) / t.group, t.rows - 1);
    row_sums s = {{-CUDART_INF_F, -CUDART_INF_F}, {0, 0}, {1, 1}};
    float out[64] = {}, scores[64];
    uint32_t weights[KEYS / 16][4];
    const uint32_t queries = w.queries.receive() + (uint32_t)w.warpgroup * 64 * 128;
    pin(scores);
    start_scores(scores, queries, w.keys.receive());
    moe_sm90::wgmma_wait<0>();
    pin(scores);
    w.keys.release();
    if (!sees_all(t, key, window)) mask(scores, positions, key, window, w.lane);
    weigh(scores, s, w.scale_log2);
    pack_weights(weights, scores);
    for (; key + KEYS <= t.last_position; key += KEYS) {
        uint32_t keys = w.keys.receive();
        moe_sm90::take_turn(w.warpgroup);
        pin(scores);
        pin(out);
        pin(weights);
        start_scores(scores, queries, keys);
        start_values(out, weights, w.values.receive());
        moe_sm90::give_turn(w.warpgroup);
        moe_sm90::wgmma_wait<1>(); /* the scores; the values go on */
        pin(scores);
        w.keys.release();
        if (!sees_all(t, key + KEYS, window)) mask(scores, positions, key + KEYS, window, w.lane);
        weigh(scores, s, w.scale_log2);
        moe_sm90::wgmma_wait<0>();
        pin(out);
        pin(weights);
        w.values.release();
#pragma unroll
        for (int i = 0; i < 64; i++) out[i] *= s.scale[i / 2 % 2];
        pack_weights(weights, scores);
    }
    w.queries.release();
    pin(out);
    pin(weights);
    start_values(out, weights, w.values.receive());
    moe_sm90::wgmma_wait<0>();
    pin(out);
    w.values.release();
    write_out(a, t, out, s, w.warp, w.lane);
}

static __device__ __forceinline__ void attend_all(const moe_cuda_attention &a, uint32_t memory, int32_t num_items) {
    const int warpgroup = __shfl_sync(~0u, (int)threadIdx.x / GROUP, 0);
    attending w = {ring(memory, 0),
                   ring(memory, 1),
                   ring(memory, 2),
                   warpgroup,
                   (int)threadIdx.x / 32,
                   (int)threadIdx.x % 32,
                   rsqrtf((float)D) * 1.44269504088896f};
    if (warpgroup == 1) moe_sm90::give_turn(warpgroup); /* the first turn is the other's */
    tile t = {};
    if (item_at(0) < num_items) t = read_item(a, item_at(0));
    for (int32_t i = 0; item_at(i) < num_items; i++) {
        tile next = t; /* read early, so that it is here when it is wanted */
        if (item_at(i + 1) < num_items) next = read_item(a, item_at(i + 1));
        attend(a, t, w);
        t = next;
    }
    if (warpgroup == 0) moe_sm90::take_turn(warpgroup); /* which the other has given */
}
#endif

static __global__ void __launch_bounds__(THREADS, 1) prefill_sm90_kernel(const moe_cuda_attention a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t memory = shared_address(shared);
    let_successor_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < RINGS * 2 * STAGES; i++) /* of a ring: `full`, every fetching thread; `empty`, every attending warp */
            moe_sm90::barrier_init(memory + BARRIERS_AT + 8 * (uint32_t)i, i / STAGES % 2 == 0 ? GROUP : CONSUMERS * GROUP / 32);
        moe_sm90::fence_barrier_init();
    }
    __syncthreads();
    wait_for_predecessor();
    const int32_t num_items = min(*a.num_tiles, a.max_tiles) * a.shape.num_kv_heads;
    if (threadIdx.x >= CONSUMERS * GROUP) {
        moe_sm90::registers_fewer<FETCH_REGISTERS>();
        fetch(a, memory, num_items);
    } else {
        moe_sm90::registers_more<ATTEND_REGISTERS>();
        attend_all(a, memory, num_items);
    }
#endif
}

extern "C" cudaError_t moe_cuda_attention_prefill_sm90(const moe_cuda_queue *q, const moe_cuda_attention *a) {
    int64_t items = (int64_t)a->max_tiles * a->shape.num_kv_heads;
    return launch(q, prefill_sm90_kernel, dim3((unsigned)(items < q->num_sms ? items : q->num_sms)), THREADS, SHARED_BYTES, *a);
}
