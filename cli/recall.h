/* How well pre-gates foresee what gates choose: of the experts that tokens were sent to, the part that a pre-gate had among its
 * first k and its first 2k one MoE layer earlier. An observer of an engine under --gating gate with one micro-batch. */
#pragma once
#include "router/engine/engine.h"

#define MOE_RECALL_MAX_SETS 4

typedef struct moe_recall moe_recall;

/* Sets of pre-gates to compare, each [num_moe_layers - 1, E, H] row-major, read only here. */
typedef struct moe_recall_sets {
    int32_t count;
    const float *weights[MOE_RECALL_MAX_SETS];
} moe_recall_sets;

/* RESOURCE_EXHAUSTED. */
moe_status moe_recall_new(const moe_model_config *model, const moe_recall_sets *sets, int32_t max_rows, moe_recall **out,
                          moe_error *err);
void moe_recall_free(moe_recall **recall); /* NULLs; idempotent */

void moe_recall_on_layer(void *recall, const moe_layer_view *view); /* on_layer of the engine */

/* Of set `set`, MoE layer `layer` (1 …), 0 to 1: among its first k (times 1) or 2k (times 2). When the engine has ended. */
double moe_recall_at(const moe_recall *recall, int32_t set, int32_t layer, int32_t times);
