/* The base layers' weights, the KV pool, and the state of a micro-batch, in device memory. */
#pragma once
#include "cuda/expert.h"
#include "cuda/simple.h"

/* A network that is the only group of an FFN: `tables` in device memory holds the addresses of gate_up, down and tail. */
typedef struct moe_cuda_base_network {
    moe_cuda_network network;
    const void **tables;
} moe_cuda_base_network;

typedef struct moe_cuda_layer {
    float *input_norm, *post_norm;
    float *q_norm, *k_norm;         /* NULL unless config.qk_norm */
    float *qkv_bias, *o_bias;       /* NULL where the family has none */
    moe_cuda_matrix qkv, o;         /* [(heads + 2 kv) · d, H], [H, heads · d] */
    moe_cuda_matrix gate, pre_gate; /* [E, H] or absent */
    moe_cuda_matrix shared_gate;    /* [1, H] or absent */
    moe_cuda_base_network dense, shared;
} moe_cuda_layer;

struct moe_base {
    const moe_model *model; /* borrowed */
    moe_cuda_layer *layers;
    moe_cuda_matrix embed, lm_head; /* one where they are tied */
    float *final_norm, *inverse_frequency;
    void *memory; /* device; all of the above */
};

moe_status moe_cuda_base_load(moe_cuda_upload *upload, moe_dtype profile, const moe_model *model,
                              void (*progress)(void *ctx, double fraction), void *ctx, moe_base **out, moe_error *err);
void moe_cuda_base_free(moe_base *base); /* NULL is ignored */

/* Keys and values, each [layer][block][kv head][16 positions][head_dim] of the profile's dtype. */
struct moe_kv {
    moe_dtype dtype;
    int32_t num_blocks, num_layers, kv_heads, head_dim;
    uint8_t *keys, *values;
};

int64_t moe_cuda_kv_block_bytes(const moe_model_config *config, moe_dtype dtype);
moe_status moe_cuda_kv_create(const moe_cuda_device *device, moe_dtype dtype, const moe_model_config *config, int32_t num_blocks,
                              moe_kv **out, moe_error *err);
void moe_cuda_kv_free(moe_kv *kv); /* NULL is ignored */
moe_cuda_kv_layer moe_cuda_kv_layer_of(const moe_kv *kv, int32_t layer);
