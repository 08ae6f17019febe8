#include "cpu/single.h"

#include "common/alloc.h"
#include "common/elements.h"
#include "common/model/gate.h"
#include "cpu/base.h"
#include "cpu/matrix.h"
#include "cpu/segment.h"

static float *floats(int64_t count) {
    float *memory = moe_alloc_aligned((size_t)count, sizeof(float));
    MOE_ASSERT(memory);
    return memory;
}

void moe_cpu_single_embed(const moe_tensor *table, const int32_t *ids, int32_t rows, float *y) {
    for (int32_t row = 0; row < rows; row++)
        moe_tensor_read_f32(table, ids[row] * table->cols, table->cols, y + row * table->cols);
}

void moe_cpu_single_rms_norm(const moe_cpu_kernels *kernels, const float *x, const moe_tensor *weight, float eps, int32_t rows,
                             int32_t width, float *y) {
    float *wide = floats(width);
    moe_tensor_read_f32(weight, 0, width, wide);
    for (int64_t row = 0; row < rows; row++) kernels->rms_norm(x + row * width, wide, eps, width, y + row * width);
    moe_free(wide);
}

void moe_cpu_single_linear(const moe_cpu_kernels *kernels, const float *x, const moe_tensor *w, const moe_tensor *bias,
                           int32_t rows, float *y) {
    moe_cpu_matrix matrix;
    float *wide = NULL;
    MOE_ASSERT(moe_cpu_matrix_pack_one(kernels, w, &matrix, NULL) == MOE_OK);
    if (bias) MOE_ASSERT(moe_cpu_vector_read(bias, 1, &wide, NULL) == MOE_OK);
    moe_cpu_linear_run(kernels, &(moe_cpu_run){0}, &matrix, wide, x, rows, y);
    moe_cpu_matrix_free(&matrix);
    moe_free(wide);
}

void moe_cpu_single_rotary(const moe_cpu_kernels *kernels, float *x, const int32_t *positions, float theta, int32_t rows,
                           int32_t heads, int32_t head_dim) {
    int32_t half = head_dim / 2;
    float *frequency = floats(3 * half), *cosine = frequency + half, *sine = cosine + half;
    moe_cpu_inverse_frequency(theta, head_dim, frequency);
    for (int64_t row = 0; row < rows; row++) {
        moe_cpu_rotary_angles(frequency, head_dim, positions[row], cosine, sine);
        kernels->rotate(x + row * heads * head_dim, cosine, sine, heads, head_dim);
    }
    moe_free(frequency);
}

void moe_cpu_single_attention(const moe_cpu_kernels *kernels, const float *q, const float *k, const float *v, int32_t first,
                              int32_t rows, int32_t heads, int32_t kv_heads, int32_t head_dim, int32_t window, float *y) {
    const moe_model_config config = {.num_layers = 1, .num_kv_heads = kv_heads, .head_dim = head_dim};
    int32_t positions = first + rows, num_blocks = (positions + MOE_KV_BLOCK_TOKENS - 1) / MOE_KV_BLOCK_TOKENS;
    int32_t *table = moe_calloc((size_t)(num_blocks + rows), sizeof *table), *row_positions = table + num_blocks;
    moe_kv *kv;
    MOE_ASSERT(table && moe_cpu_kv_create(&config, MOE_F32, num_blocks, &kv, NULL) == MOE_OK);
    moe_cpu_kv_layer layer = moe_cpu_kv_layer_of(kv, 0);
    int64_t kv_width = (int64_t)kv_heads * head_dim, scratch_positions = (int64_t)num_blocks * MOE_KV_BLOCK_TOKENS;
    for (int32_t i = 0; i < num_blocks; i++) table[i] = num_blocks - 1 - i; /* any order will do */
    for (int32_t i = 0; i < rows; i++) row_positions[i] = first + i;
    for (int32_t i = 0; i < positions; i++) moe_cpu_kv_store(&layer, table, i, k + i * kv_width, v + i * kv_width);
    float *scratch = floats(MOE_CPU_ATTENTION_QUERIES * (scratch_positions + layer.padded_dim));
    moe_cpu_attention args = {.kv = &layer, .blocks = table, .positions = row_positions, .q = q, .y = y, .rows = rows};
    args.q_stride = args.y_stride = (int64_t)heads * head_dim;
    args.heads_per_kv = heads / kv_heads;
    args.window = window;
    args.scale = 1.0f / __builtin_sqrtf((float)head_dim);
    args.scratch = scratch;
    args.scratch_positions = scratch_positions;
    for (args.kv_head = 0; args.kv_head < kv_heads; args.kv_head++) kernels->attend(&args);
    moe_free(scratch);
    moe_cpu_kv_free(kv);
    moe_free(table);
}

void moe_cpu_single_gate_topk(const moe_cpu_kernels *kernels, const float *logits, int32_t rows, int32_t num_experts,
                              int32_t top_k, bool norm_topk, moe_route out) {
    for (int64_t row = 0; row < rows; row++)
        moe_gate_topk(kernels->softmax, logits + row * num_experts, num_experts, top_k, norm_topk, out.experts + row * top_k,
                      out.weights + row * top_k);
}

void moe_cpu_single_combine(const moe_cpu_kernels *kernels, const moe_combine *c, int32_t rows, int32_t top_k, int32_t hidden,
                            float *y) {
    const uint8_t *outputs = c->outputs;
    int64_t slots_bytes = top_k * (int64_t)moe_row_bytes(c->dtype, hidden);
    for (int64_t row = 0; row < rows; row++) {
        moe_cpu_combine args = {.outputs = outputs + row * slots_bytes, .dtype = c->dtype, .weights = c->weights + row * top_k};
        args.count = c->counts[row];
        args.hidden = hidden;
        args.y = y + row * hidden;
        kernels->combine(&args);
    }
}

void moe_cpu_single_ffn(const moe_cpu_kernels *kernels, const float *x, const moe_ffn_weights *w, int32_t rows, int32_t block_lo,
                        int32_t block_hi, float *y) {
    moe_cpu_ffn ffn;
    MOE_ASSERT(moe_cpu_ffn_load(kernels, w, block_lo, block_hi, &ffn, NULL) == MOE_OK);
    int64_t width = ffn.up.n;
    float *inner = floats(2 * rows * width + 1);
    moe_cpu_ffn_part part = {.ffn = &ffn, .x = x, .inner = inner, .up = inner + rows * width, .y = y, .rows = rows};
    part.block_lo = block_lo;
    part.block_hi = block_hi;
    moe_cpu_ffn_run(kernels, &(moe_cpu_run){0}, &part, 1);
    moe_free(inner);
    moe_cpu_ffn_free(&ffn);
}
