#include "router/engine/plan.h"

#include <string.h>

/* A replica that drains is left alone where another one can do the work. */
static uint8_t replica_fitness(const moe_replica *replica, const uint8_t *fitness) {
    if (replica->state == MOE_REPLICA_LOADING) return MOE_PLAN_UNFIT;
    bool drains = replica->state == MOE_REPLICA_DRAINING && fitness[replica->worker] == MOE_PLAN_FIT;
    return drains ? MOE_PLAN_LAST_RESORT : fitness[replica->worker];
}

/* Number of replicas on the fittest workers, and the cheapest of them (ties: lower worker index). */
static int best_replicas(const moe_placement_entry *entry, const uint8_t *fitness, const int64_t *cost, int32_t *cheapest) {
    int count = 0;
    uint8_t fittest = MOE_PLAN_UNFIT;
    *cheapest = MOE_PLAN_NO_WORKER;
    for (int r = 0; r < entry->num_replicas; r++) {
        int32_t w = entry->replicas[r].worker;
        uint8_t fit = replica_fitness(&entry->replicas[r], fitness);
        if (fit == MOE_PLAN_UNFIT || fit < fittest) continue;
        if (fit > fittest) {
            fittest = fit;
            count = 0;
            *cheapest = MOE_PLAN_NO_WORKER;
        }
        count++;
        if (*cheapest < 0 || cost[w] < cost[*cheapest] || (cost[w] == cost[*cheapest] && w < *cheapest)) *cheapest = w;
    }
    return count;
}

static void place(int32_t expert, int32_t worker, int32_t rows, int32_t *chosen, int64_t *cost) {
    chosen[expert] = worker;
    if (worker >= 0) cost[worker] += MOE_PLAN_COST_PER_EXPERT + (int64_t)MOE_PLAN_COST_PER_ROW * rows;
}

#define UNPLACED (-2)

static int32_t busiest_unplaced(const int32_t *rows_of_expert, const int32_t *chosen, int32_t num_experts) {
    int32_t best = -1;
    for (int32_t e = 0; e < num_experts; e++)
        if (chosen[e] == UNPLACED && (best < 0 || rows_of_expert[e] > rows_of_expert[best])) best = e;
    return best;
}

void moe_plan_replicas(const moe_placement *placement, int32_t layer, const int32_t *rows_of_expert, const uint8_t *fitness,
                       int32_t *chosen, int64_t *cost) {
    int32_t worker;
    memset(cost, 0, (size_t)placement->num_workers * sizeof *cost);
    for (int32_t e = 0; e < placement->num_experts; e++) {
        chosen[e] = MOE_PLAN_NO_WORKER;
        if (rows_of_expert[e] == 0) continue;
        int replicas = best_replicas(moe_placement_at(placement, layer, e), fitness, cost, &worker);
        if (replicas == 1) place(e, worker, rows_of_expert[e], chosen, cost);
        if (replicas > 1) chosen[e] = UNPLACED;
    }
    for (int32_t e; (e = busiest_unplaced(rows_of_expert, chosen, placement->num_experts)) >= 0;) {
        best_replicas(moe_placement_at(placement, layer, e), fitness, cost, &worker);
        place(e, worker, rows_of_expert[e], chosen, cost);
    }
}

void moe_plan_sort(moe_assignment *assignments, int32_t count, int32_t num_experts, moe_assignment *scratch, int32_t *counts) {
    memset(counts, 0, (size_t)(num_experts + 1) * sizeof *counts);
    for (int32_t i = 0; i < count; i++) counts[assignments[i].expert + 1]++;
    for (int32_t e = 0; e < num_experts; e++) counts[e + 1] += counts[e];
    for (int32_t i = 0; i < count; i++) scratch[counts[assignments[i].expert]++] = assignments[i];
    memcpy(assignments, scratch, (size_t)count * sizeof *assignments);
}
