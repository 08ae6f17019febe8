/* A model's shape and arithmetic, read from a Hugging Face config.json by the family's table row. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"

#define MOE_MAX_LAYERS 512
#define MOE_MAX_EXPERTS 1024 /* per layer */
#define MOE_MAX_TOP_K 32
#define MOE_MAX_EOS 16

typedef enum moe_gate_kind {
    MOE_GATE_SOFTMAX_TOPK /* softmax over all experts in f32, then top-k; norm_topk renormalises the k weights to sum 1 */
} moe_gate_kind;

typedef enum moe_qk_norm {
    MOE_QK_NORM_NONE,
    MOE_QK_NORM_HEAD, /* RMSNorm over each head's head_dim, weight [head_dim] (Qwen3) */
    MOE_QK_NORM_FULL  /* RMSNorm over the whole projected vector, weight [heads × head_dim] (OLMoE) */
} moe_qk_norm;

typedef struct moe_family moe_family; /* common/model/family.h */

typedef struct moe_model_config {
    const moe_family *family;
    int32_t num_layers, hidden, num_heads, num_kv_heads, head_dim, vocab;
    int32_t dense_intermediate;  /* width of a dense layer's FFN; 0 where every layer has experts */
    int32_t expert_intermediate; /* width of one expert */
    int32_t shared_intermediate; /* width of the shared expert; 0 for none */
    bool shared_gated;           /* the shared expert's output is scaled by sigmoid(shared_gate · x) */
    int32_t num_experts, top_k;  /* 0, 0 for a dense model */
    moe_gate_kind gate_kind;
    bool norm_topk;
    moe_qk_norm qk_norm;
    bool qkv_bias, o_bias;
    float rms_eps, rope_theta;
    float clip_qkv;         /* clamp of q, k, v to ±clip after the projections (and norms, before rotary); 0 for none */
    int32_t sliding_window; /* a query at p sees keys in (p - window, p]; 0 for none */
    bool tied_embeddings;
    int32_t max_positions; /* max_position_embeddings */
    bool layer_is_moe[MOE_MAX_LAYERS];
    int32_t num_moe_layers;
    int32_t moe_layers[MOE_MAX_LAYERS]; /* layer numbers of the MoE layers, ascending */
} moe_model_config;

/* Defaults for requests, from generation_config.json (absent file or key: the neutral value). */
typedef struct moe_generation_config {
    bool do_sample;           /* false: greedy */
    float temperature, top_p; /* 1.0 where absent */
    float min_p;              /* 0: off */
    int32_t top_k;            /* 0: off */
    float repetition_penalty; /* 1.0 where absent */
    int32_t eos_ids[MOE_MAX_EOS];
    int32_t num_eos; /* from generation_config.json, else from config.json */
} moe_generation_config;

/* Reads DIR/config.json. Every value is range-checked; an unknown model_type is refused by name, with those known.
 * Settings that would change the arithmetic and are not built (rope scaling kinds, activations other than the family's, …) are
 * refused by name too, never ignored. NOT_FOUND, INVALID_ARGUMENT or UNIMPLEMENTED with the key's name. */
moe_status moe_model_config_read(const char *dir, moe_model_config *out, moe_error *err);

/* Leaves the first num_layers layers. OUT_OF_RANGE unless 1 … config->num_layers. */
moe_status moe_model_config_cut(moe_model_config *config, int32_t num_layers, moe_error *err);

/* Reads DIR/generation_config.json and the eos ids of DIR/config.json. A missing generation_config.json is no error. */
moe_status moe_generation_config_read(const char *dir, moe_generation_config *out, moe_error *err);
