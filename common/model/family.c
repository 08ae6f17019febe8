#include "common/model/family.h"

#include <string.h>

/* The tensors that Qwen2-MoE, Qwen3-MoE and OLMoE name alike. */
#define MLP_EXPERT_KEYS                                                                                                          \
    .gate_key = "mlp.gate.weight", .pre_gate_key = "mlp.pre_gate.weight", .expert_gate_key = "mlp.experts.{E}.gate_proj.weight", \
    .expert_up_key = "mlp.experts.{E}.up_proj.weight", .expert_down_key = "mlp.experts.{E}.down_proj.weight",                    \
    .packed_gate_up_key = "mlp.experts.gate_up_proj", .packed_down_key = "mlp.experts.down_proj"

/* The dense networks that all families with SwiGLU name alike. */
#define DENSE_KEYS \
    .dense_gate_proj_key = "mlp.gate_proj.weight", .dense_up_key = "mlp.up_proj.weight", .dense_down_key = "mlp.down_proj.weight"

/* Rotary frequencies that older versions of transformers saved; they follow from rope_theta. */
#define IGNORED_BUFFERS .ignored_suffixes = {"rotary_emb.inv_freq"}

static const moe_family families[] = {
    {
        .model_type = "qwen3_moe",
        .num_experts_keys = {"num_experts", "num_local_experts"},
        .expert_intermediate_keys = {"moe_intermediate_size"},
        .gate_kind = MOE_GATE_SOFTMAX_TOPK,
        .qk_norm = MOE_QK_NORM_HEAD,
        .attention_bias_key = "attention_bias",
        .o_bias = true,
        .dense_layers = true,
        .rope_theta_default = 10000,
        MLP_EXPERT_KEYS,
        DENSE_KEYS,
        IGNORED_BUFFERS,
    },
    {
        .model_type = "qwen2_moe",
        .num_experts_keys = {"num_experts", "num_local_experts"},
        .expert_intermediate_keys = {"moe_intermediate_size"},
        .shared_intermediate_keys = {"shared_expert_intermediate_size"},
        .gate_kind = MOE_GATE_SOFTMAX_TOPK,
        .attention_bias_key = "qkv_bias",
        .qkv_bias_default = true,
        .shared_gated = true,
        .dense_layers = true,
        .rope_theta_default = 10000,
        MLP_EXPERT_KEYS,
        .shared_gate_proj_key = "mlp.shared_expert.gate_proj.weight",
        .shared_up_key = "mlp.shared_expert.up_proj.weight",
        .shared_down_key = "mlp.shared_expert.down_proj.weight",
        .shared_expert_gate_key = "mlp.shared_expert_gate.weight",
        DENSE_KEYS,
        IGNORED_BUFFERS,
    },
    {
        .model_type = "mixtral",
        .num_experts_keys = {"num_local_experts", "num_experts"},
        .expert_intermediate_keys = {"intermediate_size"},
        .gate_kind = MOE_GATE_SOFTMAX_TOPK,
        .norm_topk_default = true,
        .sliding_window = true,
        .rope_theta_default = 1000000,
        .gate_key = "block_sparse_moe.gate.weight",
        .pre_gate_key = "mlp.pre_gate.weight",
        .expert_gate_key = "block_sparse_moe.experts.{E}.w1.weight",
        .expert_up_key = "block_sparse_moe.experts.{E}.w3.weight",
        .expert_down_key = "block_sparse_moe.experts.{E}.w2.weight",
        .packed_gate_up_key = "mlp.experts.gate_up_proj",
        .packed_down_key = "mlp.experts.down_proj",
        .packed_gate_key = "mlp.gate.weight",
        IGNORED_BUFFERS,
    },
    {
        .model_type = "olmoe",
        .num_experts_keys = {"num_experts", "num_local_experts"},
        .expert_intermediate_keys = {"intermediate_size"},
        .gate_kind = MOE_GATE_SOFTMAX_TOPK,
        .qk_norm = MOE_QK_NORM_FULL,
        .attention_bias_key = "attention_bias",
        .o_bias = true,
        .rope_theta_default = 10000,
        MLP_EXPERT_KEYS,
        IGNORED_BUFFERS,
    },
    {
        .model_type = "llama",
        .attention_bias_key = "attention_bias",
        .o_bias = true,
        .rope_theta_default = 10000,
        DENSE_KEYS,
        IGNORED_BUFFERS,
    },
    /* Not a family of Hugging Face's: decoder-only models with Switch Transformers' experts, which are encoder-decoder there.
     * Attention and norms are llama's; every feed-forward network, of dense layers too, is down · relu(up · x); one expert a
     * token in every decoder_sparse_step-th layer, its output times its softmax probability. No expert has a capacity: no row is
     * dropped. */
    {
        .model_type = "switch_decoder",
        .num_experts_keys = {"num_experts"},
        .expert_intermediate_keys = {"moe_intermediate_size"},
        .gate_kind = MOE_GATE_SOFTMAX_TOPK,
        .relu = true,
        .dense_layers = true,
        .rope_theta_default = 10000,
        .gate_key = "mlp.router.classifier.weight",
        .pre_gate_key = "mlp.pre_gate.weight",
        .expert_up_key = "mlp.experts.{E}.wi.weight",
        .expert_down_key = "mlp.experts.{E}.wo.weight",
        .dense_up_key = "mlp.wi.weight",
        .dense_down_key = "mlp.wo.weight",
    },
};

const moe_family *moe_family_table(int *count) {
    *count = (int)(sizeof families / sizeof families[0]);
    return families;
}

const moe_family *moe_family_find(const char *model_type) {
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++)
        if (strcmp(families[i].model_type, model_type) == 0) return &families[i];
    return NULL;
}
