/* The plan: which replica computes which expert, and the order on the wire. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "common/random.h"
#include "router/engine/plan.h"

#define EXPERTS 16
#define WORKERS 4
#define NONE MOE_PLAN_UNFIT
#define FIT MOE_PLAN_FIT

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
    int64_t cost[WORKERS];
    for (int e = 0; e < EXPERTS; e++) rows[e] = e % 3;
    uint8_t usable[WORKERS] = {FIT, NONE, FIT, FIT};
    moe_plan_replicas(p, 0, rows, usable, chosen, cost);
    for (int e = 0; e < EXPERTS; e++) {
        if (rows[e] == 0) {
            assert_int_equal(chosen[e], MOE_PLAN_NO_WORKER);
            continue;
        }
        assert_true(chosen[e] == replicas[e][0] || chosen[e] == replicas[e][1]);
        assert_int_not_equal(chosen[e], 1);
    }
    uint8_t none[WORKERS] = {NONE, NONE, FIT, FIT};
    moe_plan_replicas(p, 0, rows, none, chosen, cost);
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
    int64_t cost[WORKERS];
    for (int e = 0; e < EXPERTS; e++) rows[e] = 1, moe_placement_at(p, 0, e)->replicas[0].state = MOE_REPLICA_DRAINING;
    uint8_t all[WORKERS] = {FIT, FIT, FIT, FIT}, without[WORKERS] = {FIT, NONE, FIT, FIT};
    moe_plan_replicas(p, 0, rows, all, chosen, cost);
    for (int e = 0; e < EXPERTS; e++) assert_int_equal(chosen[e], 1);
    moe_plan_replicas(p, 0, rows, without, chosen, cost);
    for (int e = 0; e < EXPERTS; e++) assert_int_equal(chosen[e], 0);
    moe_placement_unref(&p);
}

static void test_loading_replicas_are_not_used(void **state) {
    (void)state;
    int replicas[EXPERTS][3];
    for (int e = 0; e < EXPERTS; e++) replicas[e][0] = 0, replicas[e][1] = 1, replicas[e][2] = -1;
    moe_placement *p = map_of(replicas);
    int32_t rows[EXPERTS] = {5}, chosen[EXPERTS];
    int64_t cost[WORKERS];
    uint8_t usable[WORKERS] = {FIT, FIT, FIT, FIT};
    moe_placement_at(p, 0, 0)->replicas[0].state = MOE_REPLICA_LOADING;
    moe_plan_replicas(p, 0, rows, usable, chosen, cost);
    assert_int_equal(chosen[0], 1);
    moe_placement_unref(&p);
}

static void test_suspects_are_a_last_resort(void **state) {
    (void)state;
    int replicas[EXPERTS][3];
    for (int e = 0; e < EXPERTS; e++) replicas[e][0] = 0, replicas[e][1] = e ? 1 : 2, replicas[e][2] = -1;
    moe_placement *p = map_of(replicas);
    int32_t rows[EXPERTS] = {5, 7}, chosen[EXPERTS];
    int64_t cost[WORKERS];
    uint8_t fitness[WORKERS] = {MOE_PLAN_LAST_RESORT, FIT, NONE, FIT};
    moe_plan_replicas(p, 0, rows, fitness, chosen, cost);
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
    uint8_t usable[WORKERS] = {FIT, FIT, FIT, NONE};
    moe_random random = {7};
    for (int round = 0; round < 200; round++) {
        int32_t rows[EXPERTS], chosen[EXPERTS], again[EXPERTS], share[WORKERS] = {0};
        int64_t cost[WORKERS];
        for (int e = 0; e < EXPERTS; e++) rows[e] = (int32_t)moe_random_below(&random, 2);
        moe_plan_replicas(p, 0, rows, usable, chosen, cost);
        moe_plan_replicas(p, 0, rows, usable, again, cost);
        assert_memory_equal(chosen, again, sizeof chosen);
        for (int e = 0; e < EXPERTS; e++)
            if (chosen[e] >= 0) share[chosen[e]]++;
        int most = 0, least = EXPERTS;
        for (int w = 0; w < 3; w++) most = share[w] > most ? share[w] : most, least = share[w] < least ? share[w] : least;
        assert_true(most - least <= 1);
    }
    moe_placement_unref(&p);
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
        cmocka_unit_test(test_suspects_are_a_last_resort), cmocka_unit_test(test_distinct_experts_are_balanced),
        cmocka_unit_test(test_sort_orders_by_expert_then_row)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
