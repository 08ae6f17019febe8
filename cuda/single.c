/* Single operations on host memory over the kernels of a profile: the op table. Synchronous; on the thread's current device. */
#include <math.h>

#include "common/alloc.h"
#include "cuda/backend.h"

#define MAX_ARRAYS 16

/* One operation: its device arrays, freed at its end. */
typedef struct op {
    moe_cuda_device device;
    moe_cuda_upload upload;
    moe_dtype dtype;
    void *arrays[MAX_ARRAYS];
    int num_arrays;
} op;

static void must(moe_status status) { MOE_ASSERT(status == MOE_OK); }
static void ran(cudaError_t code) { MOE_ASSERT(code == cudaSuccess); }

static op begin(moe_dtype dtype) {
    op o = {.dtype = dtype};
    int index = 0;
    ran(cudaGetDevice(&index));
    must(moe_cuda_device_open(index, &o.device, NULL));
    return o;
}

static void *array(op *o, int64_t bytes) {
    void *memory;
    MOE_ASSERT(o->num_arrays < MAX_ARRAYS);
    must(moe_cuda_device_alloc(&o->device, (size_t)bytes, "an operation", "", &memory, NULL));
    ran(cudaMemset(memory, 0xff, (size_t)(bytes ? bytes : 1))); /* NaN, so that a place that is not written shows */
    ran(cudaStreamSynchronize(NULL));                           /* the upload's stream does not wait for this one */
    return o->arrays[o->num_arrays++] = memory;
}

static void *copied(op *o, const void *from, int64_t bytes) {
    void *memory = array(o, bytes);
    ran(cudaMemcpy(memory, from, (size_t)bytes, cudaMemcpyHostToDevice));
    return memory;
}

/* float32 from the host in the profile's type. */
static void *activations(op *o, const float *from, int64_t count) {
    void *wide = copied(o, from, count * 4), *narrow;
    if (o->dtype == MOE_F32) return wide;
    narrow = array(o, count * 2);
    ran(moe_simple_narrow(wide, count, o->dtype, narrow, NULL));
    return narrow;
}

static void give(op *o, const void *from, moe_dtype dtype, int64_t count, float *to) {
    void *wide = array(o, count * 4);
    ran(moe_simple_widen(from, dtype, count, wide, NULL));
    ran(cudaMemcpy(to, wide, (size_t)count * 4, cudaMemcpyDeviceToHost));
}

static void end(op *o) {
    ran(cudaDeviceSynchronize());
    for (int i = 0; i < o->num_arrays; i++) moe_cuda_device_free(o->arrays[i]);
    if (o->upload.device) moe_cuda_upload_close(&o->upload);
}

static moe_cuda_upload *uploader(op *o) {
    if (!o->upload.device) must(moe_cuda_upload_open(&o->device, &o->upload, NULL));
    return &o->upload;
}

static moe_cuda_matrix matrix(op *o, const moe_tensor *t, moe_dtype dtype) {
    moe_cuda_matrix m = {.dtype = dtype, .n = (int32_t)t->rows, .k = (int32_t)t->cols};
    moe_cuda_plane plane = {.tensor = t, .row_hi = t->rows, .col_hi = t->cols, .dtype = dtype, .stride = t->cols};
    plane.run = plane.run_stride = 1;
    plane.to = m.data = array(o, t->rows * t->cols * (int64_t)moe_dtype_bytes(dtype));
    must(moe_cuda_upload_plane(uploader(o), &plane, NULL));
    must(moe_cuda_upload_finish(&o->upload, NULL));
    return m;
}

static moe_cuda_matrix weights(op *o, const moe_tensor *t) { return matrix(o, t, moe_cuda_weight_dtype(o->dtype, t->dtype)); }

static void embed(moe_dtype dtype, const moe_tensor *table, const int32_t *ids, int32_t rows, float *y) {
    op o = begin(dtype);
    moe_cuda_matrix m = weights(&o, table);
    float *out = array(&o, (int64_t)rows * m.k * 4);
    ran(moe_simple_embed(&m, copied(&o, ids, (int64_t)rows * 4), rows, out, NULL));
    give(&o, out, MOE_F32, (int64_t)rows * m.k, y);
    end(&o);
}

static void rms_norm(moe_dtype dtype, const float *x, const moe_tensor *weight, float eps, int32_t rows, int32_t width,
                     float *y) {
    op o = begin(dtype);
    int64_t count = (int64_t)rows * width;
    moe_simple_norm_args args = {.x = copied(&o, x, count * 4), .weight = matrix(&o, weight, MOE_F32).data, .y_dtype = dtype};
    args.y = array(&o, count * 4);
    args.x_stride = args.y_stride = args.width = width;
    args.count = rows;
    args.group = 1;
    args.eps = eps;
    ran(moe_simple_rms_norm(&args, NULL));
    give(&o, args.y, dtype, count, y);
    end(&o);
}

static void linear(moe_dtype dtype, const float *x, const moe_tensor *w, const moe_tensor *bias, int32_t rows, float *y) {
    op o = begin(dtype);
    moe_simple_linear_args args = {.w = weights(&o, w), .x = activations(&o, x, rows * w->cols), .x_dtype = dtype, .rows = rows};
    if (bias) args.bias = matrix(&o, bias, MOE_F32).data;
    args.y = array(&o, rows * w->rows * 4);
    ran(moe_simple_linear(&args, NULL));
    give(&o, args.y, MOE_F32, rows * w->rows, y);
    end(&o);
}

static void rotary(moe_dtype dtype, float *x, const int32_t *positions, float theta, int32_t rows, int32_t heads,
                   int32_t head_dim) {
    op o = begin(dtype);
    int32_t half = head_dim / 2, zero = 0;
    int64_t count = (int64_t)rows * heads * head_dim;
    float *frequency = moe_calloc((size_t)half, sizeof *frequency);
    MOE_ASSERT(frequency);
    for (int32_t i = 0; i < half; i++) frequency[i] = 1.0f / powf(theta, (float)(2 * i) / (float)head_dim);
    int32_t *device_positions = copied(&o, positions, (int64_t)rows * 4), *sequences = array(&o, (int64_t)rows * 4);
    float *cosine = array(&o, (int64_t)rows * half * 4), *sine = array(&o, (int64_t)rows * half * 4);
    ran(cudaMemset(sequences, 0, (size_t)rows * 4));
    ran(moe_simple_rotary_angles(device_positions, copied(&o, frequency, half * 4), rows, half, cosine, sine, NULL));
    moe_simple_project_args args = {
        .qkv = copied(&o, x, count * 4), .cosine = cosine, .sine = sine, .rows = rows, .heads = heads};
    args.kv = (moe_cuda_kv_layer){.dtype = dtype, .head_dim = head_dim}; /* no keys and values */
    args.places = (moe_simple_places){.positions = device_positions, .sequences = sequences};
    args.places.table_first = args.places.tables = copied(&o, &zero, 4);
    args.q = array(&o, count * 4);
    ran(moe_simple_project(&args, NULL));
    give(&o, args.q, dtype, count, x);
    moe_free(frequency);
    end(&o);
}

/* Keys or values [positions, kv_heads, d] as a pool of blocks in the order of `table`, on the device. */
static void *pool_of(op *o, const float *x, const int32_t *table, int32_t positions, int32_t kv_heads, int32_t head_dim) {
    int64_t blocks = (positions + MOE_KV_BLOCK_TOKENS - 1) / MOE_KV_BLOCK_TOKENS;
    int64_t count = blocks * kv_heads * MOE_KV_BLOCK_TOKENS * head_dim;
    float *pool = moe_calloc((size_t)count, sizeof *pool);
    MOE_ASSERT(pool);
    for (int64_t i = 0; i < count; i++) pool[i] = NAN; /* what no query sees */
    for (int64_t p = 0; p < positions; p++)
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t row = (table[p / MOE_KV_BLOCK_TOKENS] * kv_heads + h) * MOE_KV_BLOCK_TOKENS + p % MOE_KV_BLOCK_TOKENS;
            memcpy(pool + row * head_dim, x + (p * kv_heads + h) * head_dim, (size_t)head_dim * sizeof *pool);
        }
    void *device = activations(o, pool, count);
    moe_free(pool);
    return device;
}

static void attention(moe_dtype dtype, const float *q, const float *k, const float *v, int32_t first, int32_t rows, int32_t heads,
                      int32_t kv_heads, int32_t head_dim, int32_t window, float *y) {
    op o = begin(dtype);
    int32_t positions = first + rows, num_blocks = (positions + MOE_KV_BLOCK_TOKENS - 1) / MOE_KV_BLOCK_TOKENS, zero = 0;
    int64_t count = (int64_t)rows * heads * head_dim;
    int32_t *table = moe_calloc((size_t)(num_blocks + 2 * rows), sizeof *table), *at = table + num_blocks, *sequences = at + rows;
    MOE_ASSERT(table);
    for (int32_t i = 0; i < num_blocks; i++) table[i] = num_blocks - 1 - i; /* any order will do */
    for (int32_t i = 0; i < rows; i++) at[i] = first + i;
    moe_simple_attention_args args = {.q = activations(&o, q, count), .rows = rows, .heads = heads, .window = window};
    args.kv = (moe_cuda_kv_layer){.dtype = dtype, .kv_heads = kv_heads, .head_dim = head_dim};
    args.kv.keys = pool_of(&o, k, table, positions, kv_heads, head_dim);
    args.kv.values = pool_of(&o, v, table, positions, kv_heads, head_dim);
    args.places = (moe_simple_places){.positions = copied(&o, at, (int64_t)rows * 4), .table_first = copied(&o, &zero, 4)};
    args.places.sequences = copied(&o, sequences, (int64_t)rows * 4);
    args.places.tables = copied(&o, table, (int64_t)num_blocks * 4);
    args.scale = 1.0f / sqrtf((float)head_dim);
    args.y = array(&o, count * 4);
    ran(moe_simple_attention(&args, NULL));
    give(&o, args.y, dtype, count, y);
    moe_free(table);
    end(&o);
}

/* Router logits are float32 in every profile. */
static void gate_topk(const float *logits, int32_t rows, int32_t num_experts, int32_t top_k, moe_gate_kind kind, bool norm_topk,
                      moe_route out) {
    op o = begin(MOE_F32);
    int64_t bytes = (int64_t)rows * top_k * 4;
    int32_t *experts = array(&o, bytes);
    float *out_weights = array(&o, bytes);
    MOE_ASSERT(kind == MOE_GATE_SOFTMAX_TOPK);
    ran(moe_simple_gate_topk(copied(&o, logits, (int64_t)rows * num_experts * 4), rows, num_experts, top_k, norm_topk, experts,
                             out_weights, NULL));
    ran(cudaMemcpy(out.experts, experts, (size_t)bytes, cudaMemcpyDeviceToHost));
    ran(cudaMemcpy(out.weights, out_weights, (size_t)bytes, cudaMemcpyDeviceToHost));
    end(&o);
}

/* The residual is float32 in every profile; the outputs are of c->dtype. */
static void combine(const moe_combine *c, int32_t rows, int32_t top_k, int32_t hidden, float *y) {
    op o = begin(MOE_F32);
    int64_t slots = (int64_t)rows * top_k, count = (int64_t)rows * hidden;
    moe_simple_combine_args args = {.dtype = c->dtype, .rows = rows, .top_k = top_k, .width = hidden};
    args.outputs = copied(&o, c->outputs, slots * hidden * (int64_t)moe_dtype_bytes(c->dtype));
    args.weights = copied(&o, c->weights, slots * 4);
    args.counts = copied(&o, c->counts, (int64_t)rows * 4);
    args.hidden = copied(&o, y, count * 4);
    ran(moe_simple_combine(&args, NULL));
    give(&o, args.hidden, MOE_F32, count, y);
    end(&o);
}

static void ffn(moe_dtype dtype, const float *x, const moe_ffn_weights *w, int32_t rows, int32_t block_lo, int32_t block_hi,
                float *y) {
    op o = begin(dtype);
    moe_cuda_network_shape shape = moe_cuda_network_shape_of(w, block_lo, block_hi, dtype);
    moe_cuda_network n = moe_cuda_network_at(&shape, array(&o, (int64_t)moe_cuda_network_bytes(&shape)));
    const void *const tables[3] = {n.gate_up, n.down, n.tail};
    const int32_t whole[2] = {0, rows};
    int32_t *identity = moe_calloc((size_t)rows, sizeof *identity);
    moe_cuda_expert_device device;
    MOE_ASSERT(identity);
    for (int32_t i = 0; i < rows; i++) identity[i] = i;
    ran(moe_cuda_expert_device_open(o.device.arch == 80, &device));
    must(moe_cuda_network_upload(uploader(&o), &n, w, NULL));
    must(moe_cuda_upload_finish(&o.upload, NULL));
    const void *const *device_tables = copied(&o, tables, sizeof tables);
    moe_cuda_groups group = {.device = &device, .shape = &shape, .dtype = dtype, .block_lo = block_lo, .block_hi = block_hi};
    group.num_groups = 1;
    group.num_assignments = rows;
    group.expert_first = copied(&o, whole, sizeof whole);
    group.sorted_rows = copied(&o, identity, (int64_t)rows * 4);
    group.gate_up = device_tables;
    group.down = device_tables + 1;
    group.maps = device_tables + 2;
    group.x = activations(&o, x, (int64_t)rows * shape.hidden);
    group.inner = array(&o, (int64_t)rows * (shape.padded ? shape.padded : 1) * 4);
    group.y = array(&o, (int64_t)rows * shape.hidden * 4);
    ran(moe_cuda_groups_run(&group, NULL));
    give(&o, group.y, MOE_F32, (int64_t)rows * shape.hidden, y);
    moe_free(identity);
    end(&o);
}

/* The operations of a profile. */
#define SINGLE_OPS(name, dtype)                                                                                                 \
    static void name##_embed(const moe_tensor *table, const int32_t *ids, int32_t rows, float *y) {                             \
        embed(dtype, table, ids, rows, y);                                                                                      \
    }                                                                                                                           \
    static void name##_rms_norm(const float *x, const moe_tensor *weight, float eps, int32_t rows, int32_t width, float *y) {   \
        rms_norm(dtype, x, weight, eps, rows, width, y);                                                                        \
    }                                                                                                                           \
    static void name##_linear(const float *x, const moe_tensor *w, const moe_tensor *bias, int32_t rows, float *y) {            \
        linear(dtype, x, w, bias, rows, y);                                                                                     \
    }                                                                                                                           \
    static void name##_rotary(float *x, const int32_t *positions, float theta, int32_t rows, int32_t heads, int32_t head_dim) { \
        rotary(dtype, x, positions, theta, rows, heads, head_dim);                                                              \
    }                                                                                                                           \
    static void name##_attention(const float *q, const float *k, const float *v, int32_t first, int32_t rows, int32_t heads,    \
                                 int32_t kv_heads, int32_t head_dim, int32_t window, float *y) {                                \
        attention(dtype, q, k, v, first, rows, heads, kv_heads, head_dim, window, y);                                           \
    }                                                                                                                           \
    static void name##_ffn(const float *x, const moe_ffn_weights *w, int32_t rows, int32_t block_lo, int32_t block_hi,          \
                           float *y) {                                                                                          \
        ffn(dtype, x, w, rows, block_lo, block_hi, y);                                                                          \
    }                                                                                                                           \
    const moe_ops moe_cuda_single_##name = {                                                                                    \
        .embed = name##_embed,                                                                                                  \
        .rms_norm = name##_rms_norm,                                                                                            \
        .linear = name##_linear,                                                                                                \
        .rotary = name##_rotary,                                                                                                \
        .attention = name##_attention,                                                                                          \
        .gate_topk = gate_topk,                                                                                                 \
        .combine = combine,                                                                                                     \
        .ffn = name##_ffn,                                                                                                      \
    };
SINGLE_OPS(f32, MOE_F32)
SINGLE_OPS(bf16, MOE_BF16)
