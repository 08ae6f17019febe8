/* The plan of one layer of one micro-batch: which worker computes which (row, expert) pair. Pure functions. */
#pragma once
#include "router/placement/placement.h"

/* Cost of a worker's share: α per distinct expert (its weights are read once) + β per row. */
#define MOE_PLAN_COST_PER_EXPERT 8
#define MOE_PLAN_COST_PER_ROW 1

/* One token row at one expert. `slot` is where its result goes in [rows, top_k]. */
typedef struct moe_assignment {
    int32_t row, slot, expert;
    float weight;
} moe_assignment;

#define MOE_PLAN_NO_WORKER (-1)

typedef enum moe_plan_fitness {
    MOE_PLAN_UNFIT,
    MOE_PLAN_LAST_RESORT, /* suspect: used only for experts that no fitter worker holds */
    MOE_PLAN_RESERVE,     /* quarantined, or late just now: likewise */
    MOE_PLAN_FIT
} moe_plan_fitness;

/* Chooses a replica for every expert that has rows. Of an expert's replicas only the fittest count. Experts with one such replica
 * are placed first; then replicated ones, most rows first, each on the holder with the least cost so far, ties to the lower
 * worker index: deterministic. rows_of_expert [num_experts]: rows in this layer fitness [num_workers]: moe_plan_fitness of each
 * worker now chosen [num_experts]: worker index; MOE_PLAN_NO_WORKER where there are no rows or no usable replica cost
 * [num_workers]: scratch */
void moe_plan_replicas(const moe_placement *placement, int32_t layer, const int32_t *rows_of_expert, const uint8_t *fitness,
                       int32_t *chosen, int64_t *cost);

/* Sorts by (expert, row), which is the order on the wire. `scratch` has room for count assignments, `counts` for
 * num_experts + 1 numbers. Input must be ascending by row for equal experts, as routing yields it. */
void moe_plan_sort(moe_assignment *assignments, int32_t count, int32_t num_experts, moe_assignment *scratch, int32_t *counts);
