/* The family table: what differs between model families, as data. A family is added by one row in family.c. */
#pragma once
#include "common/model/config.h"

struct moe_family {
    const char *model_type; /* config.json's model_type */

    /* config.json keys that differ by family; a NULL-terminated list, tried in order (nulls in the file are skipped). */
    const char *num_experts_keys[4];         /* all NULL: a dense family */
    const char *expert_intermediate_keys[3]; /* */
    const char *shared_intermediate_keys[3];

    moe_gate_kind gate_kind;
    bool norm_topk_default; /* where norm_topk_prob is absent */
    moe_qk_norm qk_norm;
    const char *attention_bias_key; /* config.json's switch for the biases of q, k, v; NULL: the family has none */
    bool qkv_bias_default;          /* where that key is absent */
    bool o_bias;                    /* the switch covers the output projection too */
    bool shared_gated;
    bool relu; /* networks are down · relu(up · x), two matrices, and hidden_act is "relu"; else SwiGLU and "silu" */
    bool dense_layers;        /* decoder_sparse_step and mlp_only_layers make some layers dense, of width intermediate_size */
    bool sliding_window;      /* a non-null sliding_window applies to every layer */
    float rope_theta_default; /* where rope_theta is absent */

    /* Tensor names below "model.layers.{L}."; {E} stands for the expert. Where networks have two matrices, no *_gate_proj_key and
     * no expert_gate_key. */
    const char *gate_key, *pre_gate_key;
    const char *expert_gate_key, *expert_up_key, *expert_down_key;
    const char *dense_gate_proj_key, *dense_up_key, *dense_down_key;
    /* [E, 2I, H] (gate rows first) and [E, H, I]; tried where per-expert keys are absent. packed_gate_key is then the gate's
     * key (NULL: gate_key). These are the module names that transformers 5 saves with save_original_format=False. */
    const char *packed_gate_up_key, *packed_down_key, *packed_gate_key;
    const char *shared_gate_proj_key, *shared_up_key, *shared_down_key, *shared_expert_gate_key;

    const char *ignored_suffixes[4]; /* tensors that may be present and are not used, by the end of their name */
};

/* The row for a model_type, or NULL. */
const moe_family *moe_family_find(const char *model_type);

/* All rows, for messages and tests; *count receives their number. */
const moe_family *moe_family_table(int *count);
