/* The base layers' packed weights, the KV pool, and the hidden state of a micro-batch. */
#pragma once
#include "cpu/ffn.h"

typedef struct moe_cpu_layer {
    float *input_norm, *post_norm;
    float *q_norm, *k_norm;        /* NULL unless config.qk_norm */
    float *qkv_bias, *o_bias;      /* NULL where the family has none */
    moe_cpu_matrix qkv, o;         /* [(heads + 2 kv) · d, H], [H, heads · d] */
    moe_cpu_matrix gate, pre_gate; /* [E, H] or absent */
    moe_cpu_matrix shared_gate;    /* [1, H] or absent */
    moe_cpu_ffn dense, shared;     /* absent where gate.data is NULL */
} moe_cpu_layer;

struct moe_base {
    const moe_model *model; /* borrowed: configuration, and the embedding table in the checkpoint's map */
    moe_cpu_layer *layers;
    float *final_norm;
    moe_cpu_matrix lm_head;
    float *inverse_frequency; /* [head_dim / 2] */
};

struct moe_kv {
    int32_t num_blocks, num_layers;
    moe_cpu_kv_layer shape; /* keys and values of layer 0 */
    void *memory;           /* owned */
};

/* Rows of one sequence whose attention is computed together. */
typedef struct moe_cpu_row_span {
    int32_t first, count;
} moe_cpu_row_span;

/* All buffers are [max_rows, …] and belong to the segment that runs, but for `hidden`, `normed` and `outputs`, which the next reads. */
struct moe_rows {
    int32_t max_rows;
    float *hidden;            /* [H]: the residual stream */
    float *normed;            /* [H]: input of a layer's attention or experts; of these, values that fit the backend's dtype */
    float *qkv;               /* [(heads + 2 kv) · d] */
    float *attention;         /* [heads · d] */
    float *delta;             /* [H]: output of an attention or FFN before it is added */
    float *inner, *up;        /* [widest dense or shared intermediate] */
    float *router;            /* [E]: router logits */
    float *cosine, *sine;     /* [head_dim / 2]: set by segment 0 */
    void *memory;             /* owned: all of the above */
    moe_cpu_row_span *spans;  /* [max_rows], owned */
    float *attention_scratch; /* owned; grows with the context */
    size_t attention_floats;
    float *logits; /* owned; [logit rows, V] where the caller wants the highest alone; grows */
    size_t logits_floats;
    float *outputs; /* owned; [top_k, H] of routed experts; NULL until a job on these rows fills them */
};

moe_status moe_cpu_base_load(const moe_cpu_kernels *kernels, const moe_model *model, void (*progress)(void *ctx, double fraction),
                             void *ctx, moe_base **out, moe_error *err);
void moe_cpu_base_free(moe_base *base); /* NULL is allowed */

/* dtype: of keys and values, MOE_F32 or MOE_BF16. */
int64_t moe_cpu_kv_block_bytes(const moe_model_config *config, moe_dtype dtype);
moe_status moe_cpu_kv_create(const moe_model_config *config, moe_dtype dtype, int32_t num_blocks, moe_kv **out, moe_error *err);
void moe_cpu_kv_free(moe_kv *kv); /* NULL is allowed */
moe_cpu_kv_layer moe_cpu_kv_layer_of(const moe_kv *kv, int32_t layer);

/* Stores keys and values [kv_heads · head_dim] at a position, in the pool's dtype. Positions of one block may be stored by
 * several threads. */
void moe_cpu_kv_store(const moe_cpu_kv_layer *kv, const int32_t *blocks, int32_t position, const float *keys,
                      const float *values);

moe_status moe_cpu_rows_create(const moe_model_config *config, int32_t max_rows, moe_rows **out, moe_error *err);
/* Makes `outputs`, where there are none. RESOURCE_EXHAUSTED. */
moe_status moe_cpu_rows_reserve_outputs(moe_rows *rows, const moe_model_config *config, moe_error *err);
void moe_cpu_rows_free(moe_rows *rows); /* NULL is allowed */

/* The rows from `first` on as a micro-batch of its own, on the same memory; attention_scratch is the whole's. */
moe_rows moe_cpu_rows_from(const moe_rows *rows, const moe_model_config *config, int32_t first);

/* theta^(-2i / head_dim), in float32 as transformers computes it; out [head_dim / 2]. */
void moe_cpu_inverse_frequency(float theta, int32_t head_dim, float *out);
/* cosine and sine [head_dim / 2] of position · inverse_frequency. */
void moe_cpu_rotary_angles(const float *inverse_frequency, int32_t head_dim, int32_t position, float *cosine, float *sine);
