/* Attention of rows that decode: one block for a piece of a row's keys and one key head, all query heads of that key head
 * together, so that keys and values are read once. Scores are computed transposed (keys × heads = K · Q^T), since 8 heads are
 * just the narrow side of the tensor cores' product. Each warp takes every fourth KV block of the piece through a ring of its
 * own in shared memory; warps are added in order at the end. Of each eight pieces of a row the block that ends last adds the
 * eight, and of these sums the last the whole, always in order: which block it is changes nothing. */
#include "cuda/base_device.cuh"

#define WARPS 4
#define STAGES 3
#define PAGE MOE_CUDA_PAGE_TOKENS

static __device__ __forceinline__ moe_cuda_piece read_piece(const moe_cuda_piece *from) {
    moe_cuda_piece p;
    int4 halves[2] = {((const int4 *)from)[0], ((const int4 *)from)[1]};
    memcpy(&p, halves, sizeof p);
    return p;
}

/* One KV block of one key head into a stage: [16][D] keys, then values; 16-byte units exchanged by row, so that eight rows'
 * units of a column lie in different banks. Keys outside [lo, hi) become zeros. */
template <int D>
static __device__ __forceinline__ void load_page(const moe_cuda_attention &a, int32_t block, int32_t head, int32_t key,
                                                 int32_t lo, int32_t hi, uint32_t stage, int lane) {
    const int units = D / 8;
    int64_t at = ((int64_t)block * a.shape.num_kv_heads + head) * PAGE * D;
    const bf16 *keys = (const bf16 *)a.kv.keys + at, *values = (const bf16 *)a.kv.values + at;
#pragma unroll
    for (int i = 0; i < PAGE * units / 32; i++) {
        int index = i * 32 + lane, row = index / units, unit = index % units;
        bool valid = key + row >= lo && key + row < hi;
        uint32_t to = stage + (uint32_t)(row * units + (unit ^ (row & 7))) * 16;
        copy_async(to, keys + row * D + unit * 8, valid);
        copy_async(to + PAGE * D * 2, values + row * D + unit * 8, valid);
    }
}

/* What a warp knows of its keys: per lane two heads (t·2, t·2 + 1 of each eight), all of D in pieces. */
template <int D, int G>
struct warp_state {
    float max[G][2], sum[G][2], out[G][D / 16][4];
};

template <int D, int G>
static __device__ __forceinline__ void attend_page(warp_state<D, G> &s, const uint32_t (&q)[G][D / 16][2], uint32_t stage,
                                                   int32_t key, int32_t lo, int32_t hi, float scale_log2, int lane) {
    const int units = D / 8, matrix = lane / 8, line = lane % 8;
    float scores[G][4];
#pragma unroll
    for (int n = 0; n < G; n++)
        for (int i = 0; i < 4; i++) scores[n][i] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t keys[4];
        int row = line + (matrix & 1) * 8, unit = 2 * k + (matrix >> 1);
        load_matrices(keys, stage + (uint32_t)(row * units + (unit ^ (row & 7))) * 16);
#pragma unroll
        for (int n = 0; n < G; n++) multiply(scores[n], keys, q[n][k][0], q[n][k][1]);
    }
    uint32_t weights[G][2];
    int32_t low_key = key + lane / 4, high_key = low_key + 8;
#pragma unroll
    for (int n = 0; n < G; n++) {
        float scale[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            if (low_key < lo || low_key >= hi) scores[n][c] = -CUDART_INF_F;
            if (high_key < lo || high_key >= hi) scores[n][c + 2] = -CUDART_INF_F;
            float highest = fmaxf(scores[n][c], scores[n][c + 2]);
            for (int d = 4; d < 32; d <<= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, d));
            highest = fmaxf(highest * scale_log2, s.max[n][c]);
            float base = highest == -CUDART_INF_F ? 0 : highest;
            scale[c] = exp2f(s.max[n][c] - base);
            s.max[n][c] = highest;
            scores[n][c] = exp2f(fmaf(scores[n][c], scale_log2, -base));
            scores[n][c + 2] = exp2f(fmaf(scores[n][c + 2], scale_log2, -base));
            s.sum[n][c] = s.sum[n][c] * scale[c] + scores[n][c] + scores[n][c + 2];
        }
        weights[n][0] = transpose_8x8(pack(scores[n][0], scores[n][1]));
        weights[n][1] = transpose_8x8(pack(scores[n][2], scores[n][3]));
#pragma unroll
        for (int m = 0; m < D / 16; m++)
            for (int i = 0; i < 4; i++) s.out[n][m][i] *= scale[i & 1];
    }
#pragma unroll
    for (int m = 0; m < D / 16; m++) {
        uint32_t values[4];
        int row = line + (matrix >> 1) * 8, unit = 2 * m + (matrix & 1);
        load_matrices_transposed(values, stage + PAGE * D * 2 + (uint32_t)(row * units + (unit ^ (row & 7))) * 16);
#pragma unroll
        for (int n = 0; n < G; n++) multiply(s.out[n][m], values, weights[n][0], weights[n][1]);
    }
}

/* The queries as the narrow operand: head = lane / 4 of each eight, dimensions from (lane % 4) · 2 on. */
template <int D, int G>
static __device__ __forceinline__ void read_queries(const moe_cuda_attention &a, int32_t row, int32_t first_head, int32_t group,
                                                    int lane, uint32_t (&q)[G][D / 16][2]) {
    const bf16 *from = (const bf16 *)a.q + row * a.q_stride + (int64_t)first_head * D;
#pragma unroll
    for (int n = 0; n < G; n++) {
        int head = n * 8 + lane / 4;
        const bf16 *at = from + head * D + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            for (int i = 0; i < 2; i++) {
                uint32_t bits = 0;
                if (head < group) memcpy(&bits, at + k * 16 + i * 8, sizeof bits);
                q[n][k][i] = bits;
            }
    }
}

/* The warp's keys of the piece: KV blocks warp, warp + WARPS, … from the first on. Those that earlier steps stored may be on
 * their way before the step's own keys are there: `early` says that wait_for_predecessor is still to be called. */
template <int D, int G>
static __device__ __forceinline__ void attend_piece(const moe_cuda_attention &a, const moe_cuda_piece &p, int32_t kv_head,
                                                    int32_t group, uint32_t ring, int warp, int lane, bool early,
                                                    warp_state<D, G> &s) {
    const uint32_t stage_bytes = 2 * PAGE * D * 2;
    const float scale_log2 = rsqrtf((float)D) * 1.44269504088896f;
    const int32_t *table = a.rows.tables + p.table_at;
    int32_t page = p.lo / PAGE + warp, end = (p.hi + PAGE - 1) / PAGE;
    uint32_t q[G][D / 16][2];
    if (early) {
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) {
            int32_t ahead = page + i * WARPS;
            if (ahead < end && (ahead + 1) * PAGE <= p.settled)
                load_page<D>(a, table[ahead], kv_head, ahead * PAGE, p.lo, p.hi, ring + i * stage_bytes, lane);
        }
        wait_for_predecessor();
    }
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        int32_t ahead = page + i * WARPS;
        if (ahead < end && !(early && (ahead + 1) * PAGE <= p.settled))
            load_page<D>(a, table[ahead], kv_head, ahead * PAGE, p.lo, p.hi, ring + i * stage_bytes, lane);
        copy_commit();
    }
    read_queries<D, G>(a, p.row, kv_head * group, group, lane, q);
    for (int stage = 0; page < end; page += WARPS, stage = (stage + 1) % STAGES) {
        int32_t ahead = page + (STAGES - 1) * WARPS;
        copy_wait<STAGES - 2>();
        __syncwarp();
        if (ahead < end)
            load_page<D>(a, table[ahead], kv_head, ahead * PAGE, p.lo, p.hi, ring + (stage + STAGES - 1) % STAGES * stage_bytes,
                         lane);
        copy_commit();
        attend_page<D, G>(s, q, ring + stage * stage_bytes, page * PAGE, p.lo, p.hi, scale_log2, lane);
        __syncwarp();
    }
    copy_wait<0>();
    for (int n = 0; n < G; n++)
        for (int c = 0; c < 2; c++)
            for (int d = 4; d < 32; d <<= 1) s.sum[n][c] += __shfl_xor_sync(~0u, s.sum[n][c], d);
}

/* A head's state is D outputs, maximum and sum, and room for maximum and sum of a state that takes its place.
 * shared: [WARPS][G · 8][D + 4] */
template <int D, int G>
static __device__ __forceinline__ void share_state(const warp_state<D, G> &s, float *shared, int lane) {
    int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < G; n++)
        for (int c = 0; c < 2; c++) {
            float *head = shared + (n * 8 + t * 2 + c) * (D + 4);
#pragma unroll
            for (int m = 0; m < D / 16; m++) {
                head[m * 16 + g] = s.out[n][m][c];
                head[m * 16 + g + 8] = s.out[n][m][c + 2];
            }
            if (g == 0) {
                head[D] = s.max[n][c];
                head[D + 1] = s.sum[n][c];
            }
        }
}

/* Adds `count` ≤ MOE_CUDA_MERGE states of each head, `stride` floats apart, in order: into `to` as a state, or divided by the sum
 * into y. A thread takes four elements of a head at a time, all states' loads on their way together. Maximum and sum are read at
 * `ends_from` and written at `ends_to`, so that a state may take the place of the first that it adds. */
template <int D>
static __device__ __forceinline__ void add_states(const float *states, int64_t stride, int32_t count, int32_t group,
                                                  int ends_from, float *to, int ends_to, bf16 *y) {
    for (int i = threadIdx.x; i < group * D / 4; i += WARPS * 32) {
        const float *head = states + i / (D / 4) * (D + 4);
        int d = i % (D / 4) * 4;
        float4 out[MOE_CUDA_MERGE], sum = make_float4(0, 0, 0, 0);
        float2 ends[MOE_CUDA_MERGE];
        float highest = -CUDART_INF_F, total = 0;
#pragma unroll
        for (int j = 0; j < MOE_CUDA_MERGE; j++) {
            out[j] = make_float4(0, 0, 0, 0);
            ends[j] = make_float2(-CUDART_INF_F, 0);
            if (j >= count) continue;
            out[j] = *(const float4 *)(head + j * stride + d);
            ends[j] = *(const float2 *)(head + j * stride + ends_from);
        }
#pragma unroll
        for (int j = 0; j < MOE_CUDA_MERGE; j++) highest = fmaxf(highest, ends[j].x);
        float base = highest == -CUDART_INF_F ? 0 : highest;
#pragma unroll
        for (int j = 0; j < MOE_CUDA_MERGE; j++) {
            float scale = exp2f(ends[j].x - base);
            total = fmaf(ends[j].y, scale, total);
            sum.x = fmaf(out[j].x, scale, sum.x);
            sum.y = fmaf(out[j].y, scale, sum.y);
            sum.z = fmaf(out[j].z, scale, sum.z);
            sum.w = fmaf(out[j].w, scale, sum.w);
        }
        if (y) {
            uint2 bits = make_uint2(pack(sum.x / total, sum.y / total), pack(sum.z / total, sum.w / total));
            *(uint2 *)(y + i * 4) = bits;
            continue;
        }
        *(float4 *)(to + i / (D / 4) * (D + 4) + d) = sum;
        if (d == 0) *(float2 *)(to + i / (D / 4) * (D + 4) + ends_to) = make_float2(highest, total);
    }
}

/* Whether the calling block is the last of `count` to come here; the counter is zero again then. What the others wrote before is
 * visible to it. */
static __device__ __forceinline__ bool last_to_arrive(int32_t *counter, int32_t count) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(counter, 1) == count - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

template <int D, int G>
static __device__ __forceinline__ void finish_piece(const moe_cuda_attention &a, const moe_cuda_piece &p, int32_t item,
                                                    int32_t kv_head, int32_t group, const float *shared) {
    const int64_t head_at = (int64_t)kv_head * group * (D + 4), stride = (int64_t)a.shape.num_heads * (D + 4);
    bf16 *y = (bf16 *)a.y + ((int64_t)p.row * a.shape.num_heads + kv_head * group) * D;
    float *first = a.partial + (item - p.place) * stride + head_at; /* of the row's pieces */
    add_states<D>(shared, G * 8 * (D + 4), WARPS, group, D, first + p.place * stride, D, p.pieces == 1 ? y : NULL);
    if (p.pieces == 1) return;
    int32_t groups = (p.pieces + MOE_CUDA_MERGE - 1) / MOE_CUDA_MERGE, mine = p.place / MOE_CUDA_MERGE;
    int32_t *arrivals =
        a.arrivals + ((int64_t)p.row * a.shape.num_kv_heads + kv_head) * (1 + MOE_CUDA_MAX_PIECES / MOE_CUDA_MERGE);
    int32_t members = min(p.pieces - mine * MOE_CUDA_MERGE, MOE_CUDA_MERGE);
    float *sum = first + mine * MOE_CUDA_MERGE * stride;
    if (!last_to_arrive(arrivals + 1 + mine, members)) return;
    if (groups > 1) {
        add_states<D>(sum, stride, members, group, D, sum, D + 2, NULL);
        if (!last_to_arrive(arrivals, groups)) return;
        add_states<D>(first, MOE_CUDA_MERGE * stride, groups, group, D + 2, NULL, 0, y);
    } else {
        add_states<D>(sum, stride, members, group, D, NULL, 0, y);
    }
}

template <int D, int G>
static __global__ void __launch_bounds__(WARPS * 32) decode_kernel(const moe_cuda_attention a) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y,
              group = a.shape.num_heads / a.shape.num_kv_heads;
    const uint32_t ring = shared_address(memory) + (uint32_t)(warp * STAGES * 2 * PAGE * D * 2);
    bool early = true;
    let_successor_start();
    int32_t items = min(*a.num_pieces, a.max_pieces);
    for (int32_t item = blockIdx.x; item < items; item += gridDim.x, early = false) {
        moe_cuda_piece p = read_piece(&a.pieces[item]);
        warp_state<D, G> s = {};
        for (int n = 0; n < G; n++) s.max[n][0] = s.max[n][1] = -CUDART_INF_F;
        attend_piece<D, G>(a, p, kv_head, group, ring, warp, lane, early, s);
        __syncthreads(); /* the rings are read to their end: their memory takes the states */
        share_state<D, G>(s, (float *)memory + warp * G * 8 * (D + 4), lane);
        __syncthreads();
        finish_piece<D, G>(a, p, item, kv_head, group, (const float *)memory);
        __syncthreads();
    }
    if (early) wait_for_predecessor();
}

template <int D, int G>
static cudaError_t start(const moe_cuda_queue *q, const moe_cuda_attention *a) {
    const size_t ring_bytes = (size_t)WARPS * STAGES * 2 * PAGE * D * 2,
                 state_bytes = (size_t)WARPS * G * 8 * (D + 4) * sizeof(float);
    int32_t blocks = 2 * q->num_sms / a->shape.num_kv_heads + 1;
    if (blocks > a->max_pieces) blocks = a->max_pieces;
    return launch(q, decode_kernel<D, G>, dim3((unsigned)blocks, (unsigned)a->shape.num_kv_heads), WARPS * 32,
                  ring_bytes > state_bytes ? ring_bytes : state_bytes, *a);
}

extern "C" bool moe_cuda_attention_supported(const moe_cuda_attention_shape *shape) {
    return (shape->head_dim == 64 || shape->head_dim == 128) && shape->num_heads % shape->num_kv_heads == 0 &&
           shape->num_heads / shape->num_kv_heads <= MOE_CUDA_MAX_GROUP;
}

extern "C" cudaError_t moe_cuda_attention_decode(const moe_cuda_queue *q, const moe_cuda_attention *a) {
    if (!moe_cuda_attention_supported(&a->shape)) return cudaErrorInvalidValue;
    bool wide = a->shape.num_heads / a->shape.num_kv_heads > 8;
    if (a->shape.head_dim == 128) return wide ? start<128, 2>(q, a) : start<128, 1>(q, a);
    return wide ? start<64, 2>(q, a) : start<64, 1>(q, a);
}
