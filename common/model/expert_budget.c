#include "common/model/expert_budget.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROUNDING 1e-6 /* a third of 96 experts is 32, however the third was written */

moe_status moe_expert_budget_parse(const char *text, moe_expert_budget *out, moe_error *err) {
    char *end;
    double number = strtod(text, &end);
    bool percent = end != text && strcmp(end, "%") == 0;
    *out = (moe_expert_budget){0};
    if (percent && number > 0 && number <= 100) {
        out->part = number / 100;
        return MOE_OK;
    }
    if (end != text && *end == '\0' && number >= 1 && number <= MOE_MAX_EXPERTS && number == floor(number)) {
        out->per_layer = (int32_t)number;
        return MOE_OK;
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT,
                    "--expert-budget: '%s' is neither a percentage of the experts, such as 25%% (at most 100%%), nor a number of experts "
                    "in each layer, such as 8",
                    text);
}

void moe_expert_budget_name(moe_expert_budget budget, char name[MOE_EXPERT_BUDGET_NAME_BYTES]) {
    if (budget.per_layer)
        snprintf(name, MOE_EXPERT_BUDGET_NAME_BYTES, "%d-per-layer", budget.per_layer);
    else
        snprintf(name, MOE_EXPERT_BUDGET_NAME_BYTES, "%.6g", 100 * budget.part);
}

moe_status moe_expert_budget_check(moe_expert_budget budget, const moe_model_config *m, moe_error *err) {
    if (m->num_moe_layers == 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--expert-budget: this model has no experts");
    if (budget.per_layer > m->num_experts)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--expert-budget %d: a layer of this model has %d experts; at most %d, or 100%%",
                        budget.per_layer, m->num_experts, m->num_experts);
    if (moe_expert_budget_count(budget, m) >= m->num_moe_layers * m->top_k) return MOE_OK;
    char name[MOE_EXPERT_BUDGET_NAME_BYTES];
    double least = ceil(1e4 * m->top_k / m->num_experts) / 100; /* percent */
    moe_expert_budget_name(budget, name);
    return moe_fail(err, MOE_INVALID_ARGUMENT,
                    "--expert-budget: %s%s is too little, for each of %d layers needs the %d experts of a token: at least %g%%, or %d",
                    name, budget.per_layer ? "" : "%", m->num_moe_layers, m->top_k, least, m->top_k);
}

int32_t moe_expert_budget_count(moe_expert_budget budget, const moe_model_config *m) {
    if (budget.per_layer) return budget.per_layer * m->num_moe_layers;
    return (int32_t)floor(budget.part * m->num_moe_layers * m->num_experts + ROUNDING);
}

double moe_expert_budget_part(moe_expert_budget budget, const moe_model_config *m) {
    return budget.per_layer ? (double)budget.per_layer / m->num_experts : budget.part;
}
