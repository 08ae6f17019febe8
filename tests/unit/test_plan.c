/* The plan: which replica computes which expert, and the order on the wire. */
#include <string.h>

#include "common/random.h"
#include "router/engine/plan.h"
#include "tests/support/test.h"

#define EXPERTS 16
#define WORKERS 4
#define NONE MOE_PLAN_UNFIT
#define FIT MOE_PLAN_FIT
#define COST ((moe_placement_cost){8, 1})

static moe_plan_worker workers[WORKERS]; /* of the newest plan */

static void plan(const moe_placement *p, const int32_t *rows, const moe_plan_fitness fitness[WORKERS], int32_t *chosen) {
    int32_t scratch[2 * EXPERTS];
    memset(workers, 0, sizeof workers);
    for (int w = 0; w < WORKERS; w++) workers[w].fitness = fitness[w];
    moe_plan_replicas(p, 0, rows, COST, workers, chosen, scratch);
}

static moe_placement *map_of(const int replicas[EXPERTS][3]) {
    moe_placement *p = moe_placement_new(1, EXPERTS, WORKERS);
    for (int e = 0; e < EXPERTS; e++)
        for (int r = 0; r < 3 && replicas[e][r] >= 0; r++)
            moe_placement_at(p, 0, e)->replicas[moe_placement_at(p, 0, e)->num_replicas++] =
                (moe_replica){(uint16_t)replicas[e][r], MOE_REPLICA_READY};
    return p;
}

static void test_unusable_workers_get_nothing(void **state) {
    (void)state;
    int replicas[EXPERTS][3];
    for (int e = 0; e < EXPERTS; e++) replicas[e][0] = e % WORKERS, replicas[e][1] = (e + 1) % WORKERS, replicas[e][2] = -1;
    moe_placement *p = map_of(replicas);
    int32_t rows[EXPERTS], chosen[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) rows[e] = e % 3;
    moe_plan_fitness usable[WORKERS] = {FIT, NONE, FIT, FIT};
    plan(p, rows, usable, chosen);
    for (int e = 0; e < EXPERTS; e++) {
        if (rows[e] == 0) {
            assert_int_equal(chosen[e], MOE_PLAN_NO_WORKER);
            continue;
        }
        assert_true(chosen[e] == replicas[e][0] || chosen[e] == replicas[e][1]);
        assert_int_not_equal(chosen[e], 1);
    }
    moe_plan_fitness none[WORKERS] = {NONE, NONE, FIT, FIT};
    plan(p, rows, none, chosen);
    assert_int_equal(chosen[4], MOE_PLAN_NO_WORKER); /* expert 4 lives on 0 and 1 only */
    moe_placement_unref(&p);
}

/* A source that drains serves only those who have nobody else. */
static void test_draining_replicas_come_last(void **state) {
    (void)state;
    int replicas[EXPERTS][3];
    for (int e = 0; e < EXPERTS; e++) replicas[e][0] = 0, replicas[e][1] = 1, replicas[e][2] = -1;
    moe_placement *p = map_of(replicas);
    int32_t rows[EXPERTS], chosen[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) rows[e] = 1, moe_placement_at(p, 0, e)->replicas[0].state = MOE_REPLICA_DRAINING;
    moe_plan_fitness all[WORKERS] = {FIT, FIT, FIT, FIT}, without[WORKERS] = {FIT, NONE, FIT, FIT};
    plan(p, rows, all, chosen);
    for (int e = 0; e < EXPERTS; e++) assert_int_equal(chosen[e], 1);
    plan(p, rows, without, chosen);
    for (int e = 0; e < EXPERTS; e++) assert_int_equal(chosen[e], 0);
    moe_placement_unref(&p);
}

static void test_loading_replicas_are_not_used(void **state) {
    (void)state;
    int replicas[EXPERTS][3];
    for (int e = 0; e < EXPERTS; e++) replicas[e][0] = 0, replicas[e][1] = 1, replicas[e][2] = -1;
    moe_placement *p = map_of(replicas);
    int32_t rows[EXPERTS] = {5}, chosen[EXPERTS];
    moe_plan_fitness usable[WORKERS] = {FIT, FIT, FIT, FIT};
    moe_placement_at(p, 0, 0)->replicas[0].state = MOE_REPLICA_LOADING;
    plan(p, rows, usable, chosen);
    assert_int_equal(chosen[0], 1);
    moe_placement_unref(&p);
}

static void test_suspects_are_a_last_resort(void **state) {
    (void)state;
    int replicas[EXPERTS][3];
    for (int e = 0; e < EXPERTS; e++) replicas[e][0] = 0, replicas[e][1] = e ? 1 : 2, replicas[e][2] = -1;
    moe_placement *p = map_of(replicas);
    int32_t rows[EXPERTS] = {5, 7}, chosen[EXPERTS];
    moe_plan_fitness fitness[WORKERS] = {MOE_PLAN_LAST_RESORT, FIT, NONE, FIT};
    plan(p, rows, fitness, chosen);
    assert_int_equal(chosen[0], 0); /* its other replica is gone */
    assert_int_equal(chosen[1], 1);
    moe_placement_unref(&p);
}

/* With every expert on every worker the busiest worker has at most one expert more than the idlest. */
static void test_distinct_experts_are_balanced(void **state) {
    (void)state;
    int replicas[EXPERTS][3];
    for (int e = 0; e < EXPERTS; e++) replicas[e][0] = 0, replicas[e][1] = 1, replicas[e][2] = 2;
    moe_placement *p = map_of(replicas);
    moe_plan_fitness usable[WORKERS] = {FIT, FIT, FIT, NONE};
    moe_random random = {7};
    for (int round = 0; round < 200; round++) {
        int32_t rows[EXPERTS], chosen[EXPERTS], again[EXPERTS], share[WORKERS] = {0};
            for (int e = 0; e < EXPERTS; e++) rows[e] = (int32_t)moe_random_below(&random, 2);
        plan(p, rows, usable, chosen);
        plan(p, rows, usable, again);
        assert_memory_equal(chosen, again, sizeof chosen);
        for (int e = 0; e < EXPERTS; e++)
            if (chosen[e] >= 0) share[chosen[e]]++;
        int most = 0, least = EXPERTS;
        for (int w = 0; w < 3; w++) most = share[w] > most ? share[w] : most, least = share[w] < least ? share[w] : least;
        assert_true(most - least <= 1);
    }
    moe_placement_unref(&p);
}

/* Equal costs: the nearer worker, then the less loaded one, then the lower index. */
static void test_ties(void **state) {
    (void)state;
    static const struct {
        moe_plan_worker workers[2];
        int32_t chosen;
    } rows_of[] = {
        {{{.distance = MOE_PLAN_OTHER_HOST}, {.distance = MOE_PLAN_SAME_HOST, .load = 9}}, 1},
        {{{.distance = MOE_PLAN_SAME_PROCESS, .load = 9}, {.distance = MOE_PLAN_SAME_HOST}}, 0},
        {{{.load = 2}, {.load = 1}}, 1},
        {{{.load = 1}, {.load = 1}}, 0},
    };
    moe_placement *p = moe_placement_new(1, 1, 2);
    moe_placement_add_replica(p->entries, 1, MOE_REPLICA_READY);
    moe_placement_add_replica(p->entries, 0, MOE_REPLICA_READY);
    for (size_t i = 0; i < sizeof rows_of / sizeof *rows_of; i++) {
        moe_plan_worker two[2] = {rows_of[i].workers[0], rows_of[i].workers[1]};
        int32_t rows = 3, chosen, scratch[2];
        two[0].fitness = two[1].fitness = FIT;
        moe_plan_replicas(p, 0, &rows, COST, two, &chosen, scratch);
        assert_int_equal(chosen, rows_of[i].chosen);
        assert_int_equal(two[chosen].cost, 8 + 3);
        assert_int_equal(two[1 - chosen].cost, 0);
    }
    moe_placement_unref(&p);
}

/* The busiest worker's cost in the best of all plans: every choice of replicas is tried. */
static int64_t best_possible(const moe_placement *p, const int32_t *rows, int32_t expert, int64_t *cost, int64_t best) {
    if (expert == p->num_experts) {
        int64_t most = 0;
        for (int32_t w = 0; w < p->num_workers; w++) most = cost[w] > most ? cost[w] : most;
        return most < best ? most : best;
    }
    const moe_placement_entry *e = &p->entries[expert];
    int64_t each = COST.per_expert + COST.per_row * rows[expert];
    for (int r = 0; r < (rows[expert] ? e->num_replicas : 1); r++) {
        int64_t *at = &cost[e->replicas[r].worker], before = *at;
        if (rows[expert]) *at += each;
        if (*at < best) best = best_possible(p, rows, expert + 1, cost, best);
        *at = before;
    }
    return best;
}

/* Small cases against the best of all plans. */
static void test_near_the_optimum(void **state) {
    (void)state;
    enum { CASES = 2000 };
    static const moe_plan_fitness all[WORKERS] = {FIT, FIT, FIT, FIT};
    moe_random random = {21};
    double sum = 0, worst = 0;
    int optimal = 0;
    for (int i = 0; i < CASES; i++) {
        moe_placement *p = moe_placement_new(1, 12, WORKERS);
        int32_t rows[EXPERTS] = {0}, chosen[EXPERTS];
        for (int e = 0; e < p->num_experts; e++) {
            int32_t replicas = 1 + (int32_t)moe_random_below(&random, 3), first = (int32_t)moe_random_below(&random, WORKERS);
            int32_t stride = 1 + 2 * (int32_t)moe_random_below(&random, 2);
            for (int32_t r = 0; r < replicas; r++)
                moe_placement_add_replica(&p->entries[e], (first + r * stride) % WORKERS, MOE_REPLICA_READY);
            rows[e] = (int32_t)moe_random_below(&random, i % 2 ? 6 : 60);
        }
        plan(p, rows, all, chosen);
        int64_t cost[WORKERS] = {0}, most = 0;
        for (int w = 0; w < WORKERS; w++) most = workers[w].cost > most ? workers[w].cost : most;
        int64_t best = best_possible(p, rows, 0, cost, INT64_MAX);
        assert_true(best <= most);
        double ratio = (double)most / (double)best;
        optimal += most == best;
        sum += ratio;
        worst = ratio > worst ? ratio : worst;
        moe_placement_unref(&p);
    }
    print_message("figure: replica choice over %d small cases: busiest worker at the optimum in %d %%, %.3f of it on average, "
                  "%.2f at worst\n", CASES, 100 * optimal / CASES, sum / CASES, worst);
    assert_true(sum / CASES < 1.04 && worst < 1.3);
}

static void test_sort_orders_by_expert_then_row(void **state) {
    (void)state;
    enum { ROWS = 40, TOP_K = 3, COUNT = ROWS * TOP_K };
    moe_assignment a[COUNT], scratch[COUNT];
    int32_t counts[EXPERTS + 1];
    moe_random random = {3};
    for (int i = 0; i < COUNT; i++)
        a[i] = (moe_assignment){i / TOP_K, i % TOP_K, (int32_t)moe_random_below(&random, 5) + 5 * (i % TOP_K), 0.5f};
    moe_plan_sort(a, COUNT, EXPERTS, scratch, counts);
    for (int i = 1; i < COUNT; i++)
        assert_true(a[i - 1].expert < a[i].expert || (a[i - 1].expert == a[i].expert && a[i - 1].row < a[i].row));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unusable_workers_get_nothing), cmocka_unit_test(test_draining_replicas_come_last),
        cmocka_unit_test(test_loading_replicas_are_not_used),
        cmocka_unit_test(test_suspects_are_a_last_resort), cmocka_unit_test(test_distinct_experts_are_balanced), cmocka_unit_test(test_ties),
        cmocka_unit_test(test_near_the_optimum),
        cmocka_unit_test(test_sort_orders_by_expert_then_row)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
