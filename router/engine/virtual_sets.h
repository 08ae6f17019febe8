/* Virtual sets (SwapMoE, Kong et al., 2023): of each MoE layer the experts that tokens may be routed to, how important each expert
 * is, and which swap would make the sets better. Pure: no clock, no random numbers; the same calls give the same sets. One thread.
 *
 * An expert's importance is load × gate weight × output norm: the sum of the weights that the layer's own gate, left alone, gave it
 * over the tokens that have passed, old tokens counting less, times the mean L2 norm of what it returned, where that is known. Of
 * different layers, importances compare as parts of their layer's sum. */
#pragma once
#include "common/backend.h"
#include "common/model/expert_budget.h"

#define MOE_VIRTUAL_HALF_LIFE_ROWS 4096 /* after so many tokens of a layer a token counts half */
#define MOE_VIRTUAL_WARM_UP_ROWS 64     /* of a layer, before one of its experts comes in */
#define MOE_VIRTUAL_HYSTERESIS 0.25     /* the newcomer must be worth so much more than who leaves, as a part of that one's worth, */
#define MOE_VIRTUAL_LEAST_GAIN 0.05     /* and so much of a layer's mean expert */

typedef struct moe_virtual_sets moe_virtual_sets;

typedef struct moe_virtual_expert {
    int32_t layer, expert;
} moe_virtual_expert;

/* One expert for another. Where the budget is one for all layers they may be of different ones. */
typedef struct moe_virtual_swap {
    moe_virtual_expert comes, leaves;
} moe_virtual_swap;

/* The budget was checked. Sets are empty until they are placed. RESOURCE_EXHAUSTED. */
moe_status moe_virtual_sets_new(const moe_model_config *model, moe_expert_budget budget, moe_virtual_sets **out, moe_error *err);
void moe_virtual_sets_free(moe_virtual_sets **sets); /* NULLs; idempotent */

/* Where experts live: home[layer, expert] in [0, num_homes). Each home has room for the budget's part of what it holds, and swaps
 * keep to that. The first call makes the first sets, which are even over layers and homes; later ones change no set. */
#define MOE_VIRTUAL_MAX_HOMES 1024
void moe_virtual_sets_place(moe_virtual_sets *sets, const int32_t *home, int32_t num_homes);

int32_t moe_virtual_sets_size(const moe_virtual_sets *sets, int32_t layer);
bool moe_virtual_sets_has(const moe_virtual_sets *sets, int32_t layer, int32_t expert);

/* What a layer's gate chose of all experts, for `rows` tokens. */
void moe_virtual_sets_chosen(moe_virtual_sets *sets, int32_t layer, const moe_route *route, int32_t rows);
/* The L2 norm of one row that the expert returned. */
void moe_virtual_sets_returned(moe_virtual_sets *sets, int32_t layer, int32_t expert, double norm);

/* Routes among the layer's set: top_k and weights by the family's rule, as if there were no other experts. logits [rows,
 * num_experts] of the whole gate. `out` [rows, top_k] is left alone where the set is the whole layer. */
void moe_virtual_sets_route(const moe_virtual_sets *sets, int32_t layer, const float *logits, int32_t rows, moe_route out);

/* The swap that gains most; false where none gains enough. It does nothing by itself. */
bool moe_virtual_sets_propose(const moe_virtual_sets *sets, moe_virtual_swap *out);
/* Does it. comes is outside, leaves is inside. */
void moe_virtual_sets_swap(moe_virtual_sets *sets, const moe_virtual_swap *swap);
