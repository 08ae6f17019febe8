/* An expert budget: how many of the experts tokens may be routed to (`--expert-budget`; docs/pre-gating.md, "Virtual experts"). */
#pragma once
#include <stddef.h>

#include "common/model/config.h"

/* A part of the experts of all layers, or a number in each layer. Both 0: there is no budget. */
typedef struct moe_expert_budget {
    double part; /* (0, 1] */
    int32_t per_layer;
} moe_expert_budget;

static inline bool moe_expert_budget_given(moe_expert_budget budget) { return budget.part > 0 || budget.per_layer > 0; }

/* "25%" or "4". INVALID_ARGUMENT for all else, 0 and more than 100 % too. */
moe_status moe_expert_budget_parse(const char *text, moe_expert_budget *out, moe_error *err);
/* The other way round, without the sign: "25", "37.5", "4-per-layer". */
#define MOE_EXPERT_BUDGET_NAME_BYTES 48
void moe_expert_budget_name(moe_expert_budget budget, char name[MOE_EXPERT_BUDGET_NAME_BYTES]);

/* INVALID_ARGUMENT, with the least that works, unless every layer can have top_k experts, and has so many at all. */
moe_status moe_expert_budget_check(moe_expert_budget budget, const moe_model_config *model, moe_error *err);

/* Of a budget that was checked: how many experts of all layers it allows, and the part of them. */
int32_t moe_expert_budget_count(moe_expert_budget budget, const moe_model_config *model);
double moe_expert_budget_part(moe_expert_budget budget, const moe_model_config *model);
