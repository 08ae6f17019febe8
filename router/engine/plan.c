#include "router/engine/plan.h"

#include <string.h>

/* What a plan is made of. */
typedef struct plan {
    const moe_placement_entry *entries; /* [num_experts], of the layer */
    const int32_t *rows_of_expert;
    moe_placement_cost cost;
    moe_plan_worker *workers;
    int32_t *chosen;
    int32_t num_experts, num_workers;
} plan;

/* A replica that drains is left alone where another one can do the work. */
static moe_plan_fitness replica_fitness(const plan *p, const moe_replica *replica) {
    moe_plan_fitness fitness = p->workers[replica->worker].fitness;
    if (replica->state == MOE_REPLICA_LOADING) return MOE_PLAN_UNFIT;
    return replica->state == MOE_REPLICA_DRAINING && fitness == MOE_PLAN_FIT ? MOE_PLAN_LAST_RESORT : fitness;
}

/* Of two workers, elements of one array, the one to give an expert to. */
static bool better(const moe_plan_worker *a, const moe_plan_worker *b) {
    if (a->cost != b->cost) return a->cost < b->cost;
    if (a->distance != b->distance) return a->distance < b->distance;
    if (a->load != b->load) return a->load < b->load;
    return a < b;
}

/* Number of replicas on the fittest workers, and the best of them. */
static int fittest_replicas(const plan *p, int32_t expert, int32_t *best) {
    const moe_placement_entry *entry = &p->entries[expert];
    moe_plan_fitness fittest = MOE_PLAN_UNFIT;
    int count = 0;
    *best = MOE_PLAN_NO_WORKER;
    for (int r = 0; r < entry->num_replicas; r++) {
        int32_t w = entry->replicas[r].worker;
        moe_plan_fitness fitness = replica_fitness(p, &entry->replicas[r]);
        if (fitness == MOE_PLAN_UNFIT || fitness < fittest) continue;
        count = fitness > fittest ? 1 : count + 1;
        if (fitness > fittest || better(&p->workers[w], &p->workers[*best])) *best = w;
        fittest = fitness;
    }
    return count;
}

static int64_t cost_of(const plan *p, int32_t expert) { return p->cost.per_expert + p->cost.per_row * p->rows_of_expert[expert]; }

static void place(plan *p, int32_t expert, int32_t worker) {
    p->chosen[expert] = worker;
    if (worker >= 0) p->workers[worker].cost += cost_of(p, expert);
}

/* Sorts experts by rows, most first, equal ones as they come: two passes of a radix sort, which is exact up to 65535 rows and
 * good enough above. `from` and `to` [count] each; the result is in `from`. */
static void sort_by_rows(const int32_t *rows_of_expert, int32_t *from, int32_t *to, int32_t count) {
    for (int shift = 0; shift <= 8; shift += 8) {
        int32_t starts[257] = {0};
        for (int32_t i = 0; i < count; i++) starts[256 - (rows_of_expert[from[i]] >> shift & 255)]++;
        for (int k = 1; k <= 256; k++) starts[k] += starts[k - 1];
        for (int32_t i = 0; i < count; i++) to[starts[255 - (rows_of_expert[from[i]] >> shift & 255)]++] = from[i];
        int32_t *kept = from;
        from = to;
        to = kept;
    }
}

/* A search for a chain of moves that makes the busiest worker less busy and no other one as busy. */
typedef struct relief {
    int32_t first[MOE_PLACEMENT_MAX_WORKERS]; /* an expert placed there; the others follow by `next` */
    int32_t gets[MOE_PLACEMENT_MAX_WORKERS];  /* the expert that the chain brings here; UNSEEN: not reached */
    int32_t from[MOE_PLACEMENT_MAX_WORKERS];  /* whence */
    int32_t queue[MOE_PLACEMENT_MAX_WORKERS], head, tail;
} relief;

enum { UNSEEN = -2, NO_EXPERT = -1 };

static void list_by_worker(const plan *p, relief *s, int32_t *next) {
    for (int32_t w = 0; w < p->num_workers; w++) s->first[w] = NO_EXPERT, s->gets[w] = UNSEEN;
    for (int32_t e = 0; e < p->num_experts; e++) {
        if (p->chosen[e] < 0) continue;
        next[e] = s->first[p->chosen[e]];
        s->first[p->chosen[e]] = e;
    }
}

static void reach(relief *s, int32_t worker, int32_t expert, int32_t from) {
    s->gets[worker] = expert;
    s->from[worker] = from;
    s->queue[s->tail++] = worker;
}

static void carry_out(plan *p, const relief *s, int32_t last) {
    for (int32_t w = last; s->gets[w] != NO_EXPERT; w = s->from[w]) {
        p->workers[s->from[w]].cost -= cost_of(p, s->gets[w]);
        place(p, s->gets[w], w);
    }
}

/* Breadth-first, so that each worker and each replica is met once: one of the busiest worker's experts goes to another fit
 * holder, which passes on one of its own, and so on, until one has room. False where no such chain is found. `next` [num_experts]
 * is scratch. */
static bool relieve(plan *p, int32_t busiest, int32_t *next) {
    relief s = {.head = 0};
    int64_t limit = p->workers[busiest].cost;
    list_by_worker(p, &s, next);
    reach(&s, busiest, NO_EXPERT, busiest);
    while (s.head < s.tail) {
        int32_t giver = s.queue[s.head++];
        int64_t cost = p->workers[giver].cost + (giver == busiest ? 0 : cost_of(p, s.gets[giver]));
        for (int32_t e = s.first[giver]; e >= 0; e = next[e]) {
            const moe_placement_entry *entry = &p->entries[e];
            for (int r = 0; r < entry->num_replicas && cost - cost_of(p, e) < limit; r++) {
                int32_t taker = entry->replicas[r].worker;
                if (s.gets[taker] != UNSEEN || replica_fitness(p, &entry->replicas[r]) != MOE_PLAN_FIT) continue;
                reach(&s, taker, e, giver);
                if (p->workers[taker].cost + cost_of(p, e) >= limit) continue;
                carry_out(p, &s, taker);
                return true;
            }
        }
    }
    return false;
}

static int32_t busiest_worker(const plan *p) {
    int32_t busiest = 0;
    for (int32_t w = 1; w < p->num_workers; w++)
        if (p->workers[w].cost > p->workers[busiest].cost) busiest = w;
    return busiest;
}

void moe_plan_replicas(const moe_placement *placement, int32_t layer, const int32_t *rows_of_expert, moe_placement_cost cost,
                       moe_plan_worker *workers, int32_t *chosen, int32_t *scratch) {
    plan p = {.entries = moe_placement_at(placement, layer, 0),
              .rows_of_expert = rows_of_expert,
              .cost = cost,
              .workers = workers,
              .chosen = chosen,
              .num_experts = placement->num_experts,
              .num_workers = placement->num_workers};
    int32_t worker, num_replicated = 0;
    for (int32_t w = 0; w < p.num_workers; w++) workers[w].cost = 0;
    for (int32_t e = 0; e < p.num_experts; e++) {
        chosen[e] = MOE_PLAN_NO_WORKER;
        int replicas = rows_of_expert[e] ? fittest_replicas(&p, e, &worker) : 0;
        if (replicas == 1) place(&p, e, worker);
        if (replicas > 1) scratch[num_replicated++] = e;
    }
    sort_by_rows(rows_of_expert, scratch, scratch + p.num_experts, num_replicated);
    for (int32_t i = 0; i < num_replicated; i++) {
        fittest_replicas(&p, scratch[i], &worker);
        place(&p, scratch[i], worker);
    }
    for (int i = 0; i < MOE_PLAN_MAX_RELIEFS && num_replicated && relieve(&p, busiest_worker(&p), scratch); i++) continue;
}

void moe_plan_sort(moe_assignment *assignments, int32_t count, int32_t num_experts, moe_assignment *scratch, int32_t *counts) {
    memset(counts, 0, (size_t)(num_experts + 1) * sizeof *counts);
    for (int32_t i = 0; i < count; i++) counts[assignments[i].expert + 1]++;
    for (int32_t e = 0; e < num_experts; e++) counts[e + 1] += counts[e];
    for (int32_t i = 0; i < count; i++) scratch[counts[assignments[i].expert]++] = assignments[i];
    memcpy(assignments, scratch, (size_t)count * sizeof *assignments);
}
