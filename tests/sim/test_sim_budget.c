/* Expert budgets on a virtual clock: swaps never stall a step, a whole budget changes nothing, and what dies meanwhile breaks
 * nothing. */
#include <stdlib.h>

#include "common/metrics.h"
#include "tests/support/sim_fixture.h"
#include "tests/support/slow_backend.h"
#include "tests/support/test.h"

#define LIMIT_NS (60 * MOE_NS_PER_S)
#define ROUNDS 60

static moe_slow_backend slow;

static int64_t came_late(void) { return moe_metric_value(MOE_METRIC_EXPERT_MISSES) + moe_metric_value(MOE_METRIC_EXPERT_LATE_HITS); }
static int64_t swaps(void) { return moe_metric_value(MOE_METRIC_VIRTUAL_SWAPS); }

static sim_config budget_config(uint64_t seed, double part) {
    sim_config config = sim_fixture_config(seed);
    config.workers = 2;
    config.replicas = 1;
    config.worker_backend = &slow.base;
    config.budget = (moe_expert_budget){.part = part};
    return config;
}

/* Requests of a theme: prompts of tokens from a narrow range. */
static void submit_theme(sim_cluster *sim, int32_t theme, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        int32_t prompt[SIM_PROMPT_TOKENS];
        moe_status refused;
        for (int32_t t = 0; t < SIM_PROMPT_TOKENS; t++) prompt[t] = theme + (int32_t)moe_random_below(&sim->random, 6);
        assert_true(sim_submit(sim, 0, prompt, SIM_PROMPT_TOKENS, SIM_GREEDY_TOKENS, &refused) >= 0);
    }
}

static void serve_theme(sim_cluster *sim, int32_t theme) {
    submit_theme(sim, theme, 2);
    assert_true(sim_run_until_idle(sim, LIMIT_NS));
}

static void check_all_ended_well(const sim_cluster *sim) {
    for (int32_t i = 0; i < sim->num_requests; i++) {
        assert_int_equal(sim->requests[i].terminal_events, 1);
        assert_int_equal(sim->requests[i].finish, MOE_FINISH_LENGTH);
        assert_int_equal(sim->requests[i].num_tokens, SIM_GREEDY_TOKENS);
    }
}

/* With the first sets on the devices every expert of every call is there, whatever is swapped. While the link to the devices stands
 * still, swaps do, and nothing else. */
static void test_swaps_never_stall(void **state) {
    (void)state;
    moe_slow_init(&slow, sim_fx.backend);
    slow.at_once = true;
    const sim_config config = budget_config(1, 0.5);
    sim_cluster *sim = sim_new(&config);
    serve_theme(sim, 10);
    int64_t late = came_late(), before = swaps();
    assert_true(moe_metric_value(MOE_METRIC_EXPERT_HITS) > 0);
    for (int32_t theme = 10; theme < 70 && swaps() < before + 10; theme += 5) serve_theme(sim, theme);
    assert_true(swaps() >= before + 10);
    assert_int_equal(came_late(), late);

    slow.at_once = false;
    int32_t rounds = 0;
    int64_t ended = slow.fills_ended;
    while (slow.num_fills == 0 && rounds++ < ROUNDS) serve_theme(sim, 80);
    assert_true(slow.num_fills > 0); /* a newcomer is on its way */
    before = swaps();
    for (int32_t theme = 0; theme < 60; theme += 10) serve_theme(sim, theme);
    assert_int_equal(swaps(), before);
    assert_int_equal(slow.fills_ended, ended);
    assert_int_equal(came_late(), late);

    slow.at_once = true;
    while (slow.num_fills > 0) moe_slow_end(&slow);
    serve_theme(sim, 30);
    assert_true(swaps() > before);
    assert_int_equal(came_late(), late);
    check_all_ended_well(sim);
    sim_free(&sim);
}

static void test_the_whole_budget_changes_nothing(void **state) {
    (void)state;
    moe_slow_init(&slow, sim_fx.backend);
    sim_config config = budget_config(2, 1);
    for (config.gating = MOE_GATING_GATE; config.gating <= MOE_GATING_HINT; config.gating++) {
        sim_cluster *sim = sim_new(&config);
        sim_submit_greedy(sim, 6);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        assert_int_equal(sim_check(sim, 0), 6);
        sim_free(&sim);
    }
}

static void test_the_least_that_works(void **state) {
    (void)state;
    moe_slow_init(&slow, sim_fx.backend);
    slow.at_once = true;
    sim_config config = budget_config(3, 0.25);
    for (int combine = 0; combine < 2; combine++) {
        config.combine = combine ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT;
        config.gating = combine ? MOE_GATING_HINT : MOE_GATING_GATE;
        sim_cluster *sim = sim_new(&config);
        for (int32_t theme = 0; theme < 40; theme += 10) serve_theme(sim, theme);
        check_all_ended_well(sim);
        for (int32_t layer = 0; layer < sim_fx.model->config.num_moe_layers; layer++) /* there is none to spare */
            assert_int_equal(moe_engine_virtual_size(sim->routers[0].engine, layer), sim_fx.model->config.top_k);
        sim_free(&sim);
    }
}

/* Workers die while their answers are awaited; experts move; with two replicas no request fails. */
static void test_deaths_meanwhile(void **state) {
    (void)state;
    moe_slow_init(&slow, sim_fx.backend);
    slow.at_once = true;
    for (uint64_t seed = 0; seed < 12; seed++) {
        sim_config config = budget_config(100 + seed, 0.5);
        config.workers = 3;
        config.replicas = 2;
        config.routers = 2;
        sim_cluster *sim = sim_new(&config);
        for (int round = 0; round < 3; round++) {
            int32_t victim = (int32_t)moe_random_below(&sim->random, 3), theme = (int32_t)moe_random_below(&sim->random, 80);
            submit_theme(sim, theme, 4);
            sim_run(sim, (int64_t)moe_random_below(&sim->random, 30) * MOE_NS_PER_MS);
            sim_kill(sim, victim);
            sim_run(sim, (int64_t)moe_random_below(&sim->random, 2000) * MOE_NS_PER_MS);
            submit_theme(sim, theme, 4);
            sim_restart(sim, victim);
            assert_true(sim_run_until_idle(sim, LIMIT_NS));
            assert_true(sim_run_until_healed(sim, LIMIT_NS));
        }
        check_all_ended_well(sim);
        sim_free(&sim);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_swaps_never_stall),
        cmocka_unit_test(test_the_whole_budget_changes_nothing),
        cmocka_unit_test(test_the_least_that_works),
        cmocka_unit_test(test_deaths_meanwhile),
    };
    return cmocka_run_group_tests(tests, sim_fixture_open, sim_fixture_close);
}
