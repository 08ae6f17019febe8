#include "router/placement/policy.h"

#include <stdio.h>
#include <string.h>

#include "common/alloc.h"

#define SPREAD_SHARE 0.02    /* of the layer's mean cost, added to every expert's */
#define LEAST_GAIN 0.25      /* of the hysteresis, as a part of the mean: what a balance step must bring */
#define REPLICA_PRICE 0.02   /* of the mean: by how much a new replica must beat a move, since it takes memory */
#define SETTLED 0.5          /* of the hysteresis: where balancing ends */

typedef struct plan {
    const moe_policy_config *config;
    const moe_policy_input *in;
    int32_t num_layers, num_experts, num_workers;
    moe_placement_entry *entries; /* [layers, experts]: as after the steps so far */
    int32_t *totals;              /* [workers]: replicas in all */
    double *expert_cost;          /* [experts], of the layer at work */
    double *cost;                 /* [workers], of the layer at work */
    int32_t *held;                /* [workers]: replicas in the layer at work */
    int32_t num_held, accepting;  /* replicas in the layer at work; workers that accept */
    bool idle;                    /* the layer at work has too little load to judge by */
    moe_policy_step *steps;
    int32_t max_steps, num_steps;
} plan;

static moe_placement_entry *at(const plan *p, int32_t layer, int32_t expert) {
    return &p->entries[(int64_t)layer * p->num_experts + expert];
}

static moe_policy_worker_state state_of(const plan *p, int32_t worker) { return p->in->workers[worker].state; }

static bool has_room(const plan *p, int32_t worker) { return p->totals[worker] < p->in->workers[worker].room; }

/* Replicas that stay. */
static int32_t lasting(const plan *p, const moe_placement_entry *e) {
    int32_t count = 0;
    for (int32_t r = 0; r < e->num_replicas; r++) count += state_of(p, e->replicas[r].worker) <= MOE_POLICY_AWAY;
    return count;
}

static double share(const plan *p, int32_t layer, int32_t expert) {
    int32_t replicas = lasting(p, at(p, layer, expert));
    return p->expert_cost[expert] / (replicas ? replicas : 1);
}

/* ---- one layer's costs ---- */

static void cost_experts(plan *p, int32_t layer) {
    const moe_policy_load *loads = &p->in->loads[(int64_t)layer * p->num_experts];
    double total = 0, rows = 0;
    for (int32_t e = 0; e < p->num_experts; e++) rows += loads[e].rows;
    p->idle = rows <= p->config->min_rows;
    for (int32_t e = 0; e < p->num_experts && !p->idle; e++) {
        p->expert_cost[e] = p->config->alpha * loads[e].calls + p->config->beta * loads[e].rows;
        total += p->expert_cost[e];
    }
    double spread = total > 0 ? SPREAD_SHARE * total / p->num_experts : 1;
    for (int32_t e = 0; e < p->num_experts; e++) p->expert_cost[e] = (p->idle ? 0 : p->expert_cost[e]) + spread;
}

static void cost_workers(plan *p, int32_t layer) {
    memset(p->cost, 0, (size_t)p->num_workers * sizeof *p->cost);
    memset(p->held, 0, (size_t)p->num_workers * sizeof *p->held);
    p->num_held = 0;
    for (int32_t e = 0; e < p->num_experts; e++) {
        const moe_placement_entry *entry = at(p, layer, e);
        double each = share(p, layer, e);
        for (int32_t r = 0; r < entry->num_replicas; r++) {
            int32_t w = entry->replicas[r].worker;
            p->held[w]++;
            p->num_held++;
            if (state_of(p, w) <= MOE_POLICY_AWAY) p->cost[w] += each;
        }
    }
}

/* Over the accepting workers; false where there is none. */
static bool mean_and_busiest(const plan *p, double *mean, int32_t *busiest) {
    double total = 0;
    int32_t count = 0;
    *busiest = MOE_POLICY_NOBODY;
    for (int32_t w = 0; w < p->num_workers; w++) {
        if (state_of(p, w) != MOE_POLICY_ACCEPTS) continue;
        total += p->cost[w];
        count++;
        if (*busiest < 0 || p->cost[w] > p->cost[*busiest]) *busiest = w;
    }
    *mean = count ? total / count : 0;
    return count > 0 && *mean > 0;
}

static double max_over_mean(const plan *p) {
    double mean;
    int32_t busiest;
    return mean_and_busiest(p, &mean, &busiest) ? p->cost[busiest] / mean : 1;
}

/* ---- steps ---- */

static void add_replica(plan *p, moe_placement_entry *e, int32_t worker) {
    moe_placement_add_replica(e, worker, MOE_REPLICA_READY);
    p->totals[worker]++;
}

static void drop_replica(plan *p, moe_placement_entry *e, int32_t worker) {
    moe_placement_remove_replica(e, worker);
    p->totals[worker]--;
}

static void take_step(plan *p, int32_t layer, int32_t expert, int32_t to, int32_t from, moe_policy_reason reason) {
    moe_placement_entry *e = at(p, layer, expert);
    moe_policy_step *step = &p->steps[p->num_steps++];
    *step = (moe_policy_step){.layer = layer, .expert = expert, .to = to, .from = from, .reason = reason};
    step->before = max_over_mean(p);
    if (to >= 0) add_replica(p, e, to);
    if (from >= 0) drop_replica(p, e, from);
    cost_workers(p, layer);
    step->after = max_over_mean(p);
}

/* The accepting worker without a replica of the expert and with room whose cost in the layer is least; then least full, then
 * first. */
static int32_t least_loaded(const plan *p, const moe_placement_entry *e) {
    int32_t best = MOE_POLICY_NOBODY;
    for (int32_t w = 0; w < p->num_workers; w++) {
        if (state_of(p, w) != MOE_POLICY_ACCEPTS || !has_room(p, w) || moe_placement_has(e, w)) continue;
        bool better =
            best < 0 || p->cost[w] < p->cost[best] || (p->cost[w] == p->cost[best] && p->totals[w] < p->totals[best]);
        if (better) best = w;
    }
    return best;
}

/* ---- what safety asks ---- */

static int32_t find_replica(const plan *p, const moe_placement_entry *e, moe_policy_worker_state state) {
    for (int32_t r = 0; r < e->num_replicas; r++)
        if (state_of(p, e->replicas[r].worker) == state) return e->replicas[r].worker;
    return MOE_POLICY_NOBODY;
}

/* A replica that must go; the dead first. */
static int32_t find_doomed(const plan *p, const moe_placement_entry *e, moe_policy_reason *reason) {
    int32_t worker = find_replica(p, e, MOE_POLICY_DEAD);
    *reason = MOE_POLICY_WORKER_DEAD;
    if (worker >= 0) return worker;
    worker = find_replica(p, e, MOE_POLICY_LEAVES);
    *reason = worker >= 0 ? MOE_POLICY_WORKER_LEAVES : MOE_POLICY_TOO_FEW;
    return worker;
}

/* One more replica that stays, in place of a doomed one where there is one. False: nobody can take it. */
static bool add_lasting(plan *p, int32_t layer, int32_t expert) {
    moe_placement_entry *e = at(p, layer, expert);
    moe_policy_reason reason;
    int32_t to = e->num_replicas < MOE_PLACEMENT_MAX_REPLICAS ? least_loaded(p, e) : MOE_POLICY_NOBODY;
    int32_t from = find_doomed(p, e, &reason);
    if (to >= 0) take_step(p, layer, expert, to, from, reason);
    return to >= 0;
}

static void secure_expert(plan *p, int32_t layer, int32_t expert, int32_t wanted) {
    moe_placement_entry *e = at(p, layer, expert);
    moe_policy_reason reason;
    while (p->num_steps < p->max_steps && lasting(p, e) < wanted)
        if (!add_lasting(p, layer, expert)) return;
    while (p->num_steps < p->max_steps && lasting(p, e) >= wanted && lasting(p, e) > 0) {
        int32_t from = find_doomed(p, e, &reason);
        if (from < 0) return;
        take_step(p, layer, expert, MOE_POLICY_NOBODY, from, reason);
    }
}

/* The costliest first, so that they are packed while there is most choice. */
static int32_t next_costliest(const plan *p, const bool *done) {
    int32_t best = -1;
    for (int32_t e = 0; e < p->num_experts; e++)
        if (!done[e] && (best < 0 || p->expert_cost[e] > p->expert_cost[best])) best = e;
    return best;
}

static void secure_layer(plan *p, int32_t layer, int32_t wanted, bool *done) {
    moe_policy_reason reason;
    for (int32_t e = 0; e < p->num_experts; e++) {
        const moe_placement_entry *entry = at(p, layer, e);
        done[e] = lasting(p, entry) >= wanted && find_doomed(p, entry, &reason) < 0;
    }
    int32_t e = next_costliest(p, done);
    if (e < 0) return;
    cost_workers(p, layer);
    for (; e >= 0 && p->num_steps < p->max_steps; e = next_costliest(p, done)) {
        secure_expert(p, layer, e, wanted);
        done[e] = true;
    }
}

/* Experts that only dead or leaving workers have get a first lasting replica before any other gets its second: whoever leaves may
 * run out of time. */
static void rescue(plan *p, int32_t layer) {
    bool costs_known = false;
    for (int32_t e = 0; e < p->num_experts && p->num_steps < p->max_steps; e++) {
        if (lasting(p, at(p, layer, e)) > 0) continue;
        if (!costs_known) cost_workers(p, layer);
        costs_known = true;
        if (!add_lasting(p, layer, e)) return;
    }
}

static void secure(plan *p, bool *done) {
    int32_t wanted = p->config->replicas < p->accepting ? p->config->replicas : p->accepting;
    for (int32_t l = 0; l < p->num_layers && p->num_steps < p->max_steps; l++) {
        cost_experts(p, l);
        rescue(p, l);
    }
    for (int32_t l = 0; l < p->num_layers && p->num_steps < p->max_steps; l++) {
        cost_experts(p, l);
        secure_layer(p, l, wanted, done);
    }
}

/* ---- balance ---- */

typedef struct candidate {
    int32_t expert, to, from, cold; /* cold: an expert that gives up a replica first, or NOBODY */
    double gain;
} candidate;

/* As one that has just joined. */
static bool is_underfilled(const plan *p, int32_t worker) {
    return state_of(p, worker) == MOE_POLICY_ACCEPTS && 2 * p->held[worker] * p->accepting < p->num_held;
}

static bool may_change(const plan *p, int32_t layer, int32_t expert, int32_t to) {
    int64_t changed = p->in->changed_ns[(int64_t)layer * p->num_experts + expert];
    return is_underfilled(p, to) || p->in->now_ns - changed >= p->config->dwell_ns;
}

/* The step's worth: how much lower the higher of the two workers' costs becomes. */
static double gain_of(const plan *p, int32_t from, int32_t to, double from_after, double to_after) {
    double before = p->cost[from] > p->cost[to] ? p->cost[from] : p->cost[to];
    return before - (from_after > to_after ? from_after : to_after);
}

static void try_move(const plan *p, int32_t layer, int32_t expert, int32_t from, candidate *best) {
    int32_t to = least_loaded(p, at(p, layer, expert));
    if (to < 0 || !may_change(p, layer, expert, to)) return;
    double each = share(p, layer, expert), gain = gain_of(p, from, to, p->cost[from] - each, p->cost[to] + each);
    if (gain > best->gain) *best = (candidate){expert, to, from, MOE_POLICY_NOBODY, gain};
}

static int32_t extra_replicas(const plan *p, int32_t layer) {
    int32_t extra = 0;
    for (int32_t e = 0; e < p->num_experts; e++) {
        int32_t above = lasting(p, at(p, layer, e)) - p->config->replicas;
        extra += above > 0 ? above : 0;
    }
    return extra;
}

/* The expert with replicas above R whose load per replica, after one went, is least, and below `limit`. */
static int32_t coldest_extra(const plan *p, int32_t layer, double limit) {
    int32_t coldest = MOE_POLICY_NOBODY;
    for (int32_t e = 0; e < p->num_experts; e++) {
        int32_t replicas = lasting(p, at(p, layer, e));
        int64_t changed = p->in->changed_ns[(int64_t)layer * p->num_experts + e];
        if (replicas <= p->config->replicas || p->in->now_ns - changed < p->config->dwell_ns) continue;
        double after = p->expert_cost[e] / (replicas - 1);
        if (after >= limit) continue;
        limit = after;
        coldest = e;
    }
    return coldest;
}

/* Of the busiest worker's experts the hottest by load per replica. */
static void try_replica(const plan *p, int32_t layer, int32_t busiest, double price, candidate *best) {
    int32_t hot = MOE_POLICY_NOBODY, cold = MOE_POLICY_NOBODY;
    for (int32_t e = 0; e < p->num_experts; e++) {
        bool here = moe_placement_has(at(p, layer, e), busiest);
        if (here && (hot < 0 || share(p, layer, e) > share(p, layer, hot))) hot = e;
    }
    if (hot < 0 || at(p, layer, hot)->num_replicas == MOE_PLACEMENT_MAX_REPLICAS) return;
    int32_t to = least_loaded(p, at(p, layer, hot)), replicas = lasting(p, at(p, layer, hot));
    if (to < 0 || !may_change(p, layer, hot, to)) return;
    double now = share(p, layer, hot), each = p->expert_cost[hot] / (replicas + 1);
    if (extra_replicas(p, layer) >= p->config->redundant && (cold = coldest_extra(p, layer, each)) < 0) return;
    double gain = gain_of(p, busiest, to, p->cost[busiest] - now + each, p->cost[to] + each) - price;
    if (gain > best->gain) *best = (candidate){hot, to, MOE_POLICY_NOBODY, cold, gain};
}

static int32_t busiest_holder(const plan *p, const moe_placement_entry *e) {
    int32_t busiest = MOE_POLICY_NOBODY;
    for (int32_t r = 0; r < e->num_replicas; r++) {
        int32_t w = e->replicas[r].worker;
        if (state_of(p, w) == MOE_POLICY_ACCEPTS && (busiest < 0 || p->cost[w] > p->cost[busiest])) busiest = w;
    }
    return busiest;
}

/* One step of the layer; false where nothing helps any more. */
static bool balance_step(plan *p, int32_t layer) {
    double mean, limit = p->config->hysteresis;
    int32_t busiest;
    if (!mean_and_busiest(p, &mean, &busiest) || p->cost[busiest] <= mean * (1 + SETTLED * limit)) return false;
    candidate best = {.expert = MOE_POLICY_NOBODY, .gain = LEAST_GAIN * limit * mean};
    for (int32_t e = 0; e < p->num_experts; e++)
        if (moe_placement_has(at(p, layer, e), busiest)) try_move(p, layer, e, busiest, &best);
    try_replica(p, layer, busiest, REPLICA_PRICE * mean, &best);
    if (best.expert < 0) return false;
    if (best.cold >= 0) {
        if (p->num_steps + 2 > p->max_steps) return false;
        int32_t from = busiest_holder(p, at(p, layer, best.cold));
        if (from < 0) return false;
        take_step(p, layer, best.cold, MOE_POLICY_NOBODY, from, MOE_POLICY_COLD);
    }
    take_step(p, layer, best.expert, best.to, best.from, best.from >= 0 ? MOE_POLICY_BUSY : MOE_POLICY_HOT);
    return true;
}

/* Of the layer at work. What was laid out for a load that has ended may well have one expert on a worker, but not none. */
static bool may_balance(const plan *p) {
    bool may = !p->idle || p->in->even_idle;
    for (int32_t w = 0; w < p->num_workers && !may; w++) may = is_underfilled(p, w) && p->held[w] == 0 && has_room(p, w);
    return may;
}

static void balance(plan *p, bool *done) {
    memset(done, 0, (size_t)p->num_layers * sizeof *done);
    while (p->num_steps < p->max_steps) {
        int32_t worst = -1;
        double most = 1 + p->config->hysteresis;
        for (int32_t l = 0; l < p->num_layers; l++) {
            if (done[l]) continue;
            cost_experts(p, l);
            cost_workers(p, l);
            double imbalance = max_over_mean(p);
            done[l] = imbalance <= 1 + p->config->hysteresis || !may_balance(p);
            if (!done[l] && imbalance > most) {
                most = imbalance;
                worst = l;
            }
        }
        if (worst < 0) return;
        cost_experts(p, worst);
        cost_workers(p, worst);
        while (p->num_steps < p->max_steps && balance_step(p, worst)) continue;
        done[worst] = true;
    }
}

/* ---- */

static moe_status plan_init(plan *p, const moe_policy_config *config, const moe_policy_input *in, moe_error *err) {
    const moe_placement *map = in->map;
    size_t total = (size_t)map->num_layers * (size_t)map->num_experts;
    *p = (plan){.config = config,
                .in = in,
                .num_layers = map->num_layers,
                .num_experts = map->num_experts,
                .num_workers = in->num_workers};
    p->entries = moe_calloc(total, sizeof *p->entries);
    p->totals = moe_calloc((size_t)in->num_workers, sizeof *p->totals);
    p->expert_cost = moe_calloc((size_t)map->num_experts, sizeof *p->expert_cost);
    p->cost = moe_calloc((size_t)in->num_workers, sizeof *p->cost);
    p->held = moe_calloc((size_t)in->num_workers, sizeof *p->held);
    if (!p->entries || !p->totals || !p->expert_cost || !p->cost || !p->held)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for planning the placement");
    for (int32_t w = 0; w < p->num_workers; w++) p->accepting += state_of(p, w) == MOE_POLICY_ACCEPTS;
    memcpy(p->entries, map->entries, total * sizeof *p->entries);
    for (size_t i = 0; i < total; i++)
        for (int32_t r = 0; r < map->entries[i].num_replicas; r++) p->totals[map->entries[i].replicas[r].worker]++;
    return MOE_OK;
}

static void plan_free(plan *p) {
    moe_free(p->entries);
    moe_free(p->totals);
    moe_free(p->expert_cost);
    moe_free(p->cost);
    moe_free(p->held);
}

moe_status moe_policy_plan(const moe_policy_config *config, const moe_policy_input *input, moe_policy_step *steps,
                           int32_t max_steps, int32_t *num_steps, moe_error *err) {
    plan p;
    MOE_ASSERT(input->num_workers >= input->map->num_workers && input->num_workers <= MOE_PLACEMENT_MAX_WORKERS);
    int32_t most = input->map->num_layers > input->map->num_experts ? input->map->num_layers : input->map->num_experts;
    bool *done = moe_calloc((size_t)most, sizeof *done);
    *num_steps = 0;
    moe_status status = plan_init(&p, config, input, err);
    if (status == MOE_OK && !done) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for planning the placement");
    if (status == MOE_OK) {
        p.steps = steps;
        p.max_steps = max_steps;
        secure(&p, done);
        if (input->balance) balance(&p, done);
        *num_steps = p.num_steps;
    }
    plan_free(&p);
    moe_free(done);
    return status;
}

double moe_policy_imbalance(const moe_policy_config *config, const moe_policy_input *input, int32_t layer, double *cost) {
    plan p;
    moe_error ignored;
    double imbalance = 0;
    if (plan_init(&p, config, input, &ignored) == MOE_OK) {
        cost_experts(&p, layer);
        cost_workers(&p, layer);
        imbalance = max_over_mean(&p);
        if (cost) memcpy(cost, p.cost, (size_t)p.num_workers * sizeof *cost);
    }
    plan_free(&p);
    return imbalance;
}

void moe_policy_step_text(const moe_policy_step *s, const char *const *ids, char *text, size_t size) {
    static const char *const reasons[] = {
        [MOE_POLICY_TOO_FEW] = "it has fewer replicas than are wanted", [MOE_POLICY_WORKER_LEAVES] = "its worker leaves",
        [MOE_POLICY_WORKER_DEAD] = "its worker is gone",                [MOE_POLICY_BUSY] = "its worker is the busiest of the layer",
        [MOE_POLICY_HOT] = "it is the hottest of the busiest worker",   [MOE_POLICY_COLD] = "a hotter expert needs the replica"};
    char what[2 * MOE_WORKER_ID_BYTES + 32];
    if (s->to >= 0 && s->from >= 0)
        snprintf(what, sizeof what, "move from %s to %s", ids[s->from], ids[s->to]);
    else if (s->to >= 0)
        snprintf(what, sizeof what, "add a replica at %s", ids[s->to]);
    else
        snprintf(what, sizeof what, "drop the replica at %s", ids[s->from]);
    snprintf(text, size, "layer %d expert %d: %s: %s (busiest over mean %.2f to %.2f)", s->layer, s->expert, what,
             reasons[s->reason], s->before, s->after);
}
