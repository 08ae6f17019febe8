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
    bool qkv_bias_default; /* where qkv_bias/attention_bias are absent */
    bool shared_gated;

    /* Tensor names below "model.layers.{L}."; {E} stands for the expert. */
    const char *gate_key, *pre_gate_key;
    const char *expert_gate_key, *expert_up_key, *expert_down_key;
    const char *packed_gate_up_key, *packed_down_key; /* [E, 2I, H] and [E, H, I]; tried where per-expert keys are absent */
    const char *shared_gate_proj_key, *shared_up_key, *shared_down_key, *shared_expert_gate_key;

    const char *ignored_suffixes[4]; /* tensors that may be present and are not used, by the end of their name */
};

/* The row for a model_type, or NULL. */
const moe_family *moe_family_find(const char *model_type);

/* All rows, for messages and tests; *count receives their number. */
const moe_family *moe_family_table(int *count);
