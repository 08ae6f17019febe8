#include "common/alloc.h"
#include "cuda/base.h"

static int64_t layer_block_elements(const moe_model_config *c) {
    return (int64_t)c->num_kv_heads * c->head_dim * MOE_KV_BLOCK_TOKENS;
}

int64_t moe_cuda_kv_block_bytes(const moe_model_config *c, moe_dtype dtype) {
    return 2 * layer_block_elements(c) * c->num_layers * (int64_t)moe_dtype_bytes(dtype);
}

moe_status moe_cuda_kv_create(const moe_cuda_device *device, moe_dtype dtype, const moe_model_config *config, int32_t num_blocks,
                              moe_kv **out, moe_error *err) {
    moe_kv *kv = moe_calloc(1, sizeof *kv);
    size_t bytes = 0;
    void *memory = NULL;
    moe_status status = MOE_OK;
    *out = NULL;
    if (!kv) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the KV cache");
    if (num_blocks <= 0 || !moe_size_mul((size_t)num_blocks, (size_t)moe_cuda_kv_block_bytes(config, dtype), &bytes))
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "a KV cache of %d blocks", num_blocks);
    if (status == MOE_OK) status = moe_cuda_device_alloc(device, bytes, "the KV cache", "lower --kv-cache-memory", &memory, err);
    if (status == MOE_OK) status = moe_cuda_check(cudaMemset(memory, 0, bytes), "clearing the KV cache", err);
    /* micro-batches have streams of their own, which do not wait for this one */
    if (status == MOE_OK) status = moe_cuda_check(cudaStreamSynchronize(NULL), "clearing the KV cache", err);
    *kv = (moe_kv){.dtype = dtype, .num_blocks = num_blocks, .num_layers = config->num_layers};
    kv->kv_heads = config->num_kv_heads;
    kv->head_dim = config->head_dim;
    kv->keys = memory;
    kv->values = memory ? kv->keys + bytes / 2 : NULL;
    if (status == MOE_OK)
        *out = kv;
    else
        moe_cuda_kv_free(kv);
    return status;
}

void moe_cuda_kv_free(moe_kv *kv) {
    if (kv) moe_cuda_device_free(kv->keys);
    moe_free(kv);
}

moe_cuda_kv_layer moe_cuda_kv_layer_of(const moe_kv *kv, int32_t layer) {
    size_t at = (size_t)layer * (size_t)kv->num_blocks * (size_t)kv->kv_heads * (size_t)kv->head_dim * MOE_KV_BLOCK_TOKENS *
                moe_dtype_bytes(kv->dtype);
    MOE_ASSERT(layer >= 0 && layer < kv->num_layers);
    return (moe_cuda_kv_layer){
        .keys = kv->keys + at, .values = kv->values + at, .dtype = kv->dtype, .kv_heads = kv->kv_heads, .head_dim = kv->head_dim};
}
