/* The plan of one layer of one micro-batch: which worker computes which (row, expert) pair. Pure functions. */
#pragma once
#include "router/placement/placement.h"

/* One token row at one expert. `slot` is where its result goes in [rows, top_k]. */
typedef struct moe_assignment {
    int32_t row, slot, expert;
    float weight;
} moe_assignment;

#define MOE_PLAN_NO_WORKER (-1)
#define MOE_PLAN_MAX_RELIEFS 32 /* experts that change their worker at last, when the busiest is known */

typedef enum moe_plan_fitness {
    MOE_PLAN_UNFIT,
    MOE_PLAN_LAST_RESORT, /* suspect: used only for experts that no fitter worker holds */
    MOE_PLAN_RESERVE,     /* quarantined, or late just now: likewise */
    MOE_PLAN_FIT
} moe_plan_fitness;

typedef enum moe_plan_distance { MOE_PLAN_SAME_PROCESS, MOE_PLAN_SAME_HOST, MOE_PLAN_OTHER_HOST } moe_plan_distance;

typedef struct moe_plan_worker {
    moe_plan_fitness fitness; /* now */
    moe_plan_distance distance;
    double load;  /* rows routed there lately */
    int64_t cost; /* out: of its share of this plan */
} moe_plan_worker;

/* Chooses a replica for every expert that has rows, so that the busiest worker's cost is low. Of an expert's replicas only the
 * fittest count. Experts with one such replica are placed first; then replicated ones, most rows first, each on the holder with
 * the least cost so far, ties to the nearer, then the less loaded worker, then the lower index. At last experts leave the busiest
 * worker as long as that makes the busiest less busy. The same input gives the same plan; O(experts · replicas), and as much
 * again for each relief. rows_of_expert [num_experts]: rows in this layer; workers [num_workers]; chosen [num_experts]: worker
 * index, MOE_PLAN_NO_WORKER where there are no rows or no usable replica; scratch [2 · num_experts] */
void moe_plan_replicas(const moe_placement *placement, int32_t layer, const int32_t *rows_of_expert, moe_placement_cost cost,
                       moe_plan_worker *workers, int32_t *chosen, int32_t *scratch);

/* Sorts by (expert, row), which is the order on the wire. `scratch` has room for count assignments, `counts` for
 * num_experts + 1 numbers. Input must be ascending by row for equal experts, as routing yields it. */
void moe_plan_sort(moe_assignment *assignments, int32_t count, int32_t num_experts, moe_assignment *scratch, int32_t *counts);
