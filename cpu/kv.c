#include "common/alloc.h"
#include "common/elements.h"
#include "cpu/base.h"

static moe_cpu_kv_layer shape_of(const moe_model_config *c, moe_dtype dtype) {
    moe_cpu_kv_layer shape = {.dtype = dtype, .kv_heads = c->num_kv_heads, .head_dim = c->head_dim};
    int64_t head_bytes = (int64_t)c->num_kv_heads * MOE_KV_BLOCK_TOKENS * (int64_t)moe_dtype_bytes(dtype);
    shape.padded_dim = (c->head_dim + MOE_CPU_LANES - 1) / MOE_CPU_LANES * MOE_CPU_LANES;
    shape.key_block_bytes = head_bytes * c->head_dim;
    shape.value_block_bytes = head_bytes * shape.padded_dim;
    return shape;
}

int64_t moe_cpu_kv_block_bytes(const moe_model_config *config, moe_dtype dtype) {
    moe_cpu_kv_layer shape = shape_of(config, dtype);
    return (shape.key_block_bytes + shape.value_block_bytes) * config->num_layers;
}

moe_status moe_cpu_kv_create(const moe_model_config *config, moe_dtype dtype, int32_t num_blocks, moe_kv **out, moe_error *err) {
    moe_kv *kv = moe_calloc(1, sizeof *kv);
    size_t bytes = 0;
    bool fits = num_blocks > 0 && moe_size_mul((size_t)num_blocks, (size_t)moe_cpu_kv_block_bytes(config, dtype), &bytes) &&
                moe_size_add(bytes, MOE_ALIGNMENT_BYTES, &bytes);
    *out = NULL;
    /* moe_calloc and not moe_alloc_aligned: a large pool's pages stay untouched until they are used */
    if (kv && fits) kv->memory = moe_calloc(bytes, 1);
    if (!kv || !kv->memory) {
        moe_cpu_kv_free(kv);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for %d KV blocks (%zu bytes)", num_blocks, bytes);
    }
    uintptr_t aligned = ((uintptr_t)kv->memory + MOE_ALIGNMENT_BYTES - 1) / MOE_ALIGNMENT_BYTES * MOE_ALIGNMENT_BYTES;
    kv->num_blocks = num_blocks;
    kv->num_layers = config->num_layers;
    kv->shape = shape_of(config, dtype);
    kv->shape.keys = (uint8_t *)aligned;
    kv->shape.values = kv->shape.keys + kv->shape.key_block_bytes * num_blocks * config->num_layers;
    *out = kv;
    return MOE_OK;
}

void moe_cpu_kv_free(moe_kv *kv) {
    if (kv) moe_free(kv->memory);
    moe_free(kv);
}

moe_cpu_kv_layer moe_cpu_kv_layer_of(const moe_kv *kv, int32_t layer) {
    moe_cpu_kv_layer at = kv->shape;
    MOE_ASSERT(layer >= 0 && layer < kv->num_layers);
    at.keys += at.key_block_bytes * kv->num_blocks * layer;
    at.values += at.value_block_bytes * kv->num_blocks * layer;
    return at;
}

void moe_cpu_kv_store(const moe_cpu_kv_layer *kv, const int32_t *blocks, int32_t position, const float *keys,
                      const float *values) {
    int64_t block = blocks[position / MOE_KV_BLOCK_TOKENS], slot = position % MOE_KV_BLOCK_TOKENS;
    uint8_t *key = kv->keys + block * kv->key_block_bytes, *value = kv->values + block * kv->value_block_bytes;
    int32_t width = kv->kv_heads * kv->head_dim;
    if (kv->dtype == MOE_BF16)
        for (int32_t i = 0; i < width; i++)
            ((uint16_t *)(void *)key)[slot + (int64_t)i * MOE_KV_BLOCK_TOKENS] = moe_f32_to_bf16(keys[i]);
    else
        for (int32_t i = 0; i < width; i++) ((float *)(void *)key)[slot + (int64_t)i * MOE_KV_BLOCK_TOKENS] = keys[i];
    for (int64_t head = 0; head < kv->kv_heads; head++)
        moe_elements_narrow(values + head * kv->head_dim, kv->dtype, (size_t)kv->head_dim,
                            moe_row_at(value, kv->dtype, kv->padded_dim, head * MOE_KV_BLOCK_TOKENS + slot));
}
