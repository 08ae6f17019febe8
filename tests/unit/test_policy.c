/* The placement policy: properties over seeds. After every step the map is valid; what safety asks comes first; balance settles
 * and stays; traffic that alternates moves nothing back and forth. */
#include <stdio.h>
#include <string.h>

#include "common/clock.h"
#include "common/random.h"
#include "router/placement/policy.h"
#include "tests/support/test.h"

#define LAYERS 3
#define EXPERTS 32
#define TOTAL (LAYERS * EXPERTS)
#define MAX_WORKERS 12
#define MAX_STEPS 512
#define DWELL_NS (30 * MOE_NS_PER_S)

typedef struct world {
    moe_placement *map; /* with all workers, those that join, too */
    int32_t num_workers;
    moe_policy_worker workers[MAX_WORKERS];
    moe_policy_load loads[TOTAL];
    int64_t changed_ns[TOTAL];
    int64_t now_ns;
    moe_policy_config config;
    moe_policy_step steps[MAX_STEPS];
    int32_t num_steps;
} world;

static world w;

static int32_t total_at(int32_t worker) {
    int32_t total = 0;
    for (int32_t i = 0; i < TOTAL; i++) total += moe_placement_has(&w.map->entries[i], worker);
    return total;
}

static void make(int32_t laid_out, int32_t workers, int32_t replicas) {
    moe_error err;
    memset(&w, 0, sizeof w);
    moe_placement *first = moe_placement_new(LAYERS, EXPERTS, laid_out);
    assert_int_equal(moe_placement_layout(first, MOE_PLACEMENT_BALANCED, 0, NULL, replicas, &err), MOE_OK);
    w.map = moe_placement_new(LAYERS, EXPERTS, workers);
    memcpy(w.map->entries, first->entries, TOTAL * sizeof *first->entries);
    moe_placement_unref(&first);
    w.num_workers = workers;
    w.now_ns = 1000 * MOE_NS_PER_S;
    for (int32_t i = 0; i < workers; i++) w.workers[i] = (moe_policy_worker){MOE_POLICY_ACCEPTS, INT32_MAX};
    w.config = (moe_policy_config){
        .replicas = replicas, .redundant = 8, .alpha = 8, .beta = 1, .hysteresis = 0.1, .dwell_ns = DWELL_NS, .min_rows = 10};
}

static void skew(moe_random *random, double exponent) {
    for (int32_t i = 0; i < TOTAL; i++) {
        double u = moe_random_unit(random), load = 1;
        for (double k = exponent; k > 0; k--) load *= u;
        w.loads[i] = (moe_policy_load){.rows = 1000 * load, .calls = 20 * load};
    }
}

static int32_t live_replicas(const moe_placement_entry *e) {
    int32_t live = 0;
    for (int32_t r = 0; r < e->num_replicas; r++) live += w.workers[e->replicas[r].worker].state != MOE_POLICY_DEAD;
    return live;
}

/* Plans, and takes every step while checking it. */
static int32_t run(int32_t max_steps) {
    moe_error err;
    moe_policy_input in = {w.map, w.num_workers, w.workers, w.loads, w.changed_ns, w.now_ns, true, false};
    assert_int_equal(moe_policy_plan(&w.config, &in, w.steps, max_steps, &w.num_steps, &err), MOE_OK);
    assert_true(w.num_steps <= max_steps);
    for (int32_t i = 0; i < w.num_steps; i++) {
        const moe_policy_step *s = &w.steps[i];
        moe_placement_entry *e = moe_placement_at(w.map, s->layer, s->expert);
        if (s->to >= 0) {
            assert_int_equal(w.workers[s->to].state, MOE_POLICY_ACCEPTS);
            assert_false(moe_placement_has(e, s->to));
            assert_true(total_at(s->to) < w.workers[s->to].room);
            assert_true(e->num_replicas < MOE_PLACEMENT_MAX_REPLICAS);
            e->replicas[e->num_replicas++] = (moe_replica){(uint16_t)s->to, MOE_REPLICA_READY};
        }
        if (s->from >= 0) {
            int32_t r = 0;
            while (r < e->num_replicas && e->replicas[r].worker != s->from) r++;
            assert_true(r < e->num_replicas);
            e->replicas[r] = e->replicas[--e->num_replicas];
        }
        assert_true(live_replicas(e) > 0);
        w.changed_ns[s->layer * EXPERTS + s->expert] = w.now_ns;
    }
    return w.num_steps;
}

static double imbalance(int32_t layer) {
    moe_policy_input in = {w.map, w.num_workers, w.workers, w.loads, w.changed_ns, w.now_ns, true, false};
    return moe_policy_imbalance(&w.config, &in, layer, NULL);
}

static void assert_replicas(int32_t least) {
    for (int32_t i = 0; i < TOTAL; i++) {
        int32_t lasting = 0;
        for (int32_t r = 0; r < w.map->entries[i].num_replicas; r++)
            lasting += w.workers[w.map->entries[i].replicas[r].worker].state <= MOE_POLICY_AWAY;
        assert_true(lasting >= least);
        assert_int_equal(lasting, w.map->entries[i].num_replicas);
    }
}

/* ---- balance ---- */

static void test_even_load_needs_nothing(void **state) {
    (void)state;
    make(4, 4, 2);
    assert_int_equal(run(MAX_STEPS), 0); /* no load at all */
    for (int32_t i = 0; i < TOTAL; i++) w.loads[i] = (moe_policy_load){.rows = 50, .calls = 5};
    assert_int_equal(run(MAX_STEPS), 0);
    moe_placement_unref(&w.map);
}

/* Skewed loads, of which no expert is more than a worker's fair share: the aim is reached, and then nothing more happens. */
static void test_skew_settles(void **state) {
    (void)state;
    double sum = 0, worst_before = 0;
    int32_t cases = 0;
    for (uint64_t seed = 1; seed <= 200; seed++) {
        moe_random random = {seed};
        make(4, 4, 1 + (int32_t)(seed % 2));
        skew(&random, 1 + (double)(seed % 4));
        for (int32_t l = 0; l < LAYERS; l++) worst_before = imbalance(l) > worst_before ? imbalance(l) : worst_before;
        int32_t steps = run(MAX_STEPS);
        assert_true(steps <= LAYERS * EXPERTS);
        for (int32_t l = 0; l < LAYERS; l++, cases++) sum += imbalance(l) - 1;
        w.now_ns += 10 * DWELL_NS;
        assert_int_equal(run(MAX_STEPS), 0);
        assert_replicas(w.config.replicas);
        moe_placement_unref(&w.map);
    }
    assert_true(worst_before > 1.5);
    assert_true(sum / cases < 0.10); /* on average within the hysteresis */
}

/* An expert hotter than a worker's fair share is replicated, within the number of redundant replicas. */
static void test_hot_expert_is_replicated(void **state) {
    (void)state;
    make(4, 4, 1);
    for (int32_t e = 0; e < EXPERTS; e++) w.loads[e] = (moe_policy_load){.rows = e == 5 ? 3000 : 100, .calls = e == 5 ? 30 : 1};
    double before = imbalance(0);
    run(MAX_STEPS);
    assert_true(moe_placement_at(w.map, 0, 5)->num_replicas >= 2);
    assert_true(before > 1.8 && imbalance(0) < 1.15);
    int32_t extra = 0;
    for (int32_t e = 0; e < EXPERTS; e++) extra += moe_placement_at(w.map, 0, e)->num_replicas - 1;
    assert_true(extra <= w.config.redundant);
    moe_placement_unref(&w.map);
}

/* The heat goes elsewhere: the replicas above R follow it and never exceed their number. */
static void test_heat_wanders(void **state) {
    (void)state;
    make(4, 4, 1);
    w.config.redundant = 3;
    for (int32_t hot = 0; hot < EXPERTS; hot++) {
        for (int32_t e = 0; e < EXPERTS; e++) w.loads[e] = (moe_policy_load){.rows = e == hot ? 3000 : 100, .calls = 1};
        w.now_ns += 2 * DWELL_NS;
        run(MAX_STEPS);
        int32_t extra = 0;
        for (int32_t e = 0; e < EXPERTS; e++) extra += moe_placement_at(w.map, 0, e)->num_replicas - 1;
        assert_true(extra <= 3);
        assert_true(moe_placement_at(w.map, 0, hot)->num_replicas >= 2);
    }
    moe_placement_unref(&w.map);
}

/* Two kinds of traffic in turn, every 5 s, loads that decay with a half-life of 60 s, a plan every 2 s: an expert's replicas
 * change at most once a dwell, and after a while not at all. */
static void test_alternating_traffic_does_not_thrash(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        moe_random random = {seed};
        moe_policy_load traffic[2][TOTAL];
        int32_t late_steps = 0, steps = 0;
        make(4, 4, 1);
        for (int k = 0; k < 2; k++) {
            skew(&random, 4);
            memcpy(traffic[k], w.loads, sizeof w.loads);
        }
        memset(w.loads, 0, sizeof w.loads);
        for (int second = 0; second < 600; second++) {
            const moe_policy_load *now = traffic[second / 5 % 2];
            for (int32_t i = 0; i < TOTAL; i++) {
                w.loads[i].rows = 0.98851 * w.loads[i].rows + now[i].rows;
                w.loads[i].calls = 0.98851 * w.loads[i].calls + now[i].calls;
            }
            w.now_ns += MOE_NS_PER_S;
            if (second % 2 || second < 4) continue;
            int32_t taken = run(16);
            steps += taken;
            if (second >= 300) late_steps += taken;
        }
        assert_true(steps <= 2 * TOTAL);
        assert_true(late_steps <= 4);
        moe_placement_unref(&w.map);
    }
}

static void test_dwell_holds(void **state) {
    (void)state;
    moe_random random = {7};
    make(4, 4, 1);
    skew(&random, 4);
    for (int32_t i = 0; i < TOTAL; i++) w.changed_ns[i] = w.now_ns - DWELL_NS / 2;
    assert_int_equal(run(MAX_STEPS), 0);
    w.now_ns += DWELL_NS / 2;
    assert_true(run(MAX_STEPS) > 0);
    moe_placement_unref(&w.map);
}

static void test_number_of_steps_is_bounded(void **state) {
    (void)state;
    moe_random random = {3};
    make(4, 4, 1);
    skew(&random, 4);
    int32_t total = 0, rounds = 0, taken;
    while ((taken = run(3)) > 0) {
        assert_true(taken <= 3 && ++rounds < 100);
        total += taken;
        w.now_ns += DWELL_NS;
    }
    assert_true(total > 3);
    moe_placement_unref(&w.map);
}

/* ---- workers that come and go ---- */

/* A newcomer gets a fair part of every layer at once, though the experts have just been placed. */
static void test_newcomers_are_filled(void **state) {
    (void)state;
    make(1, 4, 1);
    for (int32_t i = 0; i < TOTAL; i++) w.changed_ns[i] = 0;
    run(MAX_STEPS);
    for (int32_t i = 0; i < 4; i++) assert_true(total_at(i) >= TOTAL / 4 - 3 && total_at(i) <= TOTAL / 4 + 3);
    assert_replicas(1);
    moe_placement_unref(&w.map);
}

static void test_leaving_worker_hands_over(void **state) {
    (void)state;
    for (int32_t replicas = 1; replicas <= 2; replicas++) {
        moe_random random = {11};
        make(4, 4, replicas);
        skew(&random, 2);
        for (int32_t i = 0; i < TOTAL; i++) w.changed_ns[i] = w.now_ns; /* dwell stops none of this */
        w.workers[1].state = MOE_POLICY_LEAVES;
        w.workers[3].state = MOE_POLICY_LEAVES;
        run(MAX_STEPS);
        assert_int_equal(total_at(1) + total_at(3), 0);
        assert_replicas(replicas);
        w.workers[2].state = MOE_POLICY_LEAVES; /* fewer workers than R: the last one holds all, and serves */
        run(MAX_STEPS);
        assert_int_equal(total_at(0), TOTAL);
        w.workers[0].state = MOE_POLICY_LEAVES; /* nowhere to go: nothing happens */
        assert_int_equal(run(MAX_STEPS), 0);
        moe_placement_unref(&w.map);
    }
}

static void test_dead_and_away(void **state) {
    (void)state;
    make(4, 4, 2);
    w.workers[1].state = MOE_POLICY_AWAY;
    assert_int_equal(run(MAX_STEPS), 0); /* it may come back */
    w.workers[1].state = MOE_POLICY_DEAD;
    run(MAX_STEPS);
    assert_int_equal(total_at(1), 0);
    assert_replicas(2);
    moe_placement_unref(&w.map);
}

static void test_memory_limits(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 50; seed++) {
        moe_random random = {seed};
        make(3, 5, 2);
        skew(&random, 4);
        for (int32_t i = 0; i < 5; i++) w.workers[i].room = 64 + (int32_t)moe_random_below(&random, 16);
        w.workers[seed % 3].state = MOE_POLICY_LEAVES;
        for (int round = 0; round < 4; round++) {
            run(MAX_STEPS); /* checks the room at every step */
            w.now_ns += 2 * DWELL_NS;
        }
        assert_int_equal(total_at((int32_t)(seed % 3)), 0);
        assert_replicas(2);
        moe_placement_unref(&w.map);
    }
    make(3, 3, 1); /* no room: what cannot be placed stays where it is */
    for (int32_t i = 0; i < 3; i++) w.workers[i].room = TOTAL / 3;
    w.workers[0].state = MOE_POLICY_LEAVES;
    assert_int_equal(run(MAX_STEPS), 0);
    moe_placement_unref(&w.map);
}

static void test_text(void **state) {
    (void)state;
    const char *const ids[] = {"w0", "w1"};
    char text[256];
    moe_policy_step_text(&(moe_policy_step){1, 3, 1, 0, MOE_POLICY_BUSY, 1.5, 1.25}, ids, text, sizeof text);
    assert_string_equal(text, "layer 1 expert 3: move from w0 to w1: its worker is the busiest of the layer (busiest over mean "
                              "1.50 to 1.25)");
    moe_policy_step_text(&(moe_policy_step){0, 0, 1, -1, MOE_POLICY_HOT, 2, 1}, ids, text, sizeof text);
    assert_non_null(strstr(text, "add a replica at w1"));
    moe_policy_step_text(&(moe_policy_step){0, 0, -1, 0, MOE_POLICY_COLD, 1, 1}, ids, text, sizeof text);
    assert_non_null(strstr(text, "drop the replica at w0"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_even_load_needs_nothing),
        cmocka_unit_test(test_skew_settles),
        cmocka_unit_test(test_hot_expert_is_replicated),
        cmocka_unit_test(test_heat_wanders),
        cmocka_unit_test(test_alternating_traffic_does_not_thrash),
        cmocka_unit_test(test_dwell_holds),
        cmocka_unit_test(test_number_of_steps_is_bounded),
        cmocka_unit_test(test_newcomers_are_filled),
        cmocka_unit_test(test_leaving_worker_hands_over),
        cmocka_unit_test(test_dead_and_away),
        cmocka_unit_test(test_memory_limits),
        cmocka_unit_test(test_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
