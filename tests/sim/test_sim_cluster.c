/* The cluster on a virtual clock; the oracles are those of tests/support/sim_fixture.h. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/metrics.h"
#include "cpu/cpu.h"
#include "tests/support/polled_backend.h"
#include "tests/support/sim_fixture.h"
#include "tests/support/test.h"

#define REQUESTS 12

static void test_every_shape_gives_the_same_tokens(void **state) {
    (void)state;
    static const struct {
        int32_t workers, replicas, micro_batches, degree, rows, kv_blocks;
        moe_combine_mode combine;
        moe_placement_kind layout;
        moe_gating gating;
    } shapes[] = {{1, 1, 1, 1, 512, 128, MOE_COMBINE_EXACT, MOE_PLACEMENT_BALANCED, MOE_GATING_GATE},
                  {2, 1, 2, 5, 64, 128, MOE_COMBINE_EXACT, MOE_PLACEMENT_RANDOM, MOE_GATING_HINT},
                  {3, 2, 2, 2, 7, 128, MOE_COMBINE_EXACT, MOE_PLACEMENT_RANDOM, MOE_GATING_GATE},
                  {3, 3, 3, 0, 33, 17, MOE_COMBINE_EXACT, MOE_PLACEMENT_BALANCED, MOE_GATING_GATE}, /* few blocks: preemption */
                  {4, 2, 2, 128, 16, 40, MOE_COMBINE_PARTIAL, MOE_PLACEMENT_RANDOM, MOE_GATING_HINT}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        sim_config config = sim_fixture_config(i);
        config.workers = shapes[i].workers;
        config.replicas = shapes[i].replicas;
        config.micro_batches = shapes[i].micro_batches;
        config.pipeline_degree = shapes[i].degree;
        config.max_num_batched_tokens = shapes[i].rows;
        config.num_kv_blocks = shapes[i].kv_blocks;
        config.combine = shapes[i].combine;
        config.layout = shapes[i].layout;
        config.gating = shapes[i].gating;
        sim_cluster *sim = sim_new(&config);
        sim_submit_greedy(sim, REQUESTS);
        assert_true(sim_run_until_idle(sim, 60 * MOE_NS_PER_S));
        assert_int_equal(sim_check(sim, 0), REQUESTS);
        sim_free(&sim);
    }
}

/* A worker dies at a seeded moment and comes back later; with two replicas no request may fail. */
static void test_kills_with_two_replicas(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 40; seed++) {
        sim_config config = sim_fixture_config(seed);
        sim_cluster *sim = sim_new(&config);
        for (int round = 0; round < 3; round++) {
            int32_t victim = (int32_t)moe_random_below(&sim->random, 3);
            sim_submit_greedy(sim, 4);
            sim_run(sim, (int64_t)moe_random_below(&sim->random, 30) * MOE_NS_PER_MS);
            sim_kill(sim, victim);
            sim_run(sim, (int64_t)moe_random_below(&sim->random, 4000) * MOE_NS_PER_MS);
            sim_submit_greedy(sim, 4);
            sim_restart(sim, victim);
            assert_true(sim_run_until_idle(sim, 60 * MOE_NS_PER_S));
            assert_true(sim_run_until_healed(sim, 60 * MOE_NS_PER_S));
        }
        assert_int_equal(sim_check(sim, 0), sim->num_requests);
        sim_free(&sim);
    }
}

/* One replica: requests may fail with UNAVAILABLE while a worker is gone, none hangs, and all is well after it returns. */
static void test_one_replica_fails_cleanly_and_returns(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 10; seed++) {
        sim_config config = sim_fixture_config(seed);
        config.workers = 2;
        config.replicas = 1;
        sim_cluster *sim = sim_new(&config);
        sim_submit_greedy(sim, 4);
        sim_run(sim, (int64_t)moe_random_below(&sim->random, 10) * MOE_NS_PER_MS);
        sim_kill(sim, 1);
        sim_submit_greedy(sim, 4);
        assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
        assert_true(sim_check(sim, 0) <= 4); /* those submitted after the kill have no replica to go to */
        sim_restart(sim, 1);
        assert_true(sim_run_until_healed(sim, 60 * MOE_NS_PER_S));
        int before = sim_check(sim, 0);
        sim_submit_greedy(sim, 4);
        assert_true(sim_run_until_idle(sim, 60 * MOE_NS_PER_S));
        assert_int_equal(sim_check(sim, 0), before + 4);
        sim_free(&sim);
    }
}

/* Messages are lost, doubled, delayed and reordered; a worker is cut off for a while: with two replicas all comes through. */
static void test_bad_network(void **state) {
    (void)state;
    for (uint64_t seed = 0; seed < 40; seed++) {
        sim_config config = sim_fixture_config(1000 + seed);
        sim_cluster *sim = sim_new(&config);
        moe_inproc_faults faults = {
            .drop = 0.002 * (double)(seed % 4), .duplicate = 0.02, .reorder = 0.05, .delay_max_ns = 2 * MOE_NS_PER_MS};
        moe_inproc_set_faults(sim->hub, &faults);
        sim_submit_greedy(sim, 4);
        sim_run(sim, 20 * MOE_NS_PER_MS);
        moe_inproc_partition(sim->hub, "inproc:w1", true, seed % 2 == 0);
        sim_submit_greedy(sim, 4);
        sim_run(sim, 1500 * MOE_NS_PER_MS);
        moe_inproc_partition(sim->hub, "inproc:w1", false, false);
        assert_true(sim_run_until_idle(sim, 120 * MOE_NS_PER_S));
        assert_int_equal(sim_check(sim, 0), sim->num_requests);
        sim_free(&sim);
    }
}

static void test_store_outage_is_not_noticed(void **state) {
    (void)state;
    sim_config config = sim_fixture_config(5);
    sim_cluster *sim = sim_new(&config);
    moe_memory_hub_set_down(sim->memory, true);
    sim_submit_greedy(sim, 4);
    assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
    sim_kill(sim, 2);
    sim_submit_greedy(sim, 4);
    assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
    moe_memory_hub_wipe(sim->memory);
    moe_memory_hub_set_down(sim->memory, false);
    sim_restart(sim, 2);
    assert_true(sim_run_until_healed(sim, 60 * MOE_NS_PER_S));
    sim_submit_greedy(sim, 4);
    assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
    assert_int_equal(sim_check(sim, 0), 12);
    sim_free(&sim);
}

/* The store loses everything and the only router dies: the workers' hellos tell the new one what had been published. */
static void test_epoch_survives_store_and_router(void **state) {
    (void)state;
    sim_config config = sim_fixture_config(8);
    sim_cluster *sim = sim_new(&config);
    sim_kill(sim, 0);
    sim_restart(sim, 0);
    assert_true(sim_run_until_healed(sim, 60 * MOE_NS_PER_S));
    sim_submit_greedy(sim, 2);
    assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
    uint64_t before = sim->newest_epoch;
    assert_true(before >= 2);
    moe_memory_hub_wipe(sim->memory);
    sim_stop_router(sim, 0, false);
    sim_start_router(sim, 0);
    assert_true(sim_run_until_healed(sim, 60 * MOE_NS_PER_S));
    assert_true(sim->newest_epoch > before);
    sim_submit_greedy(sim, 2);
    assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
    assert_int_equal(sim_check(sim, 0), 4);
    sim_free(&sim);
}

static void test_cancel_ends_a_request_at_once(void **state) {
    (void)state;
    sim_config config = sim_fixture_config(6);
    sim_cluster *sim = sim_new(&config);
    sim_submit_greedy(sim, 2);
    for (int32_t i = 0; i < 1000 && sim->requests[0].num_tokens == 0; i++) sim_run(sim, 1); /* a step each */
    assert_in_range(sim->requests[0].num_tokens, 1, SIM_GREEDY_TOKENS - 1);
    moe_engine_cancel(sim->routers[0].engine, sim->requests[0].id);
    sim_run(sim, 50 * MOE_NS_PER_MS);
    assert_int_equal(sim->requests[0].terminal_events, 1);
    assert_int_equal(sim->requests[0].status, MOE_CANCELLED);
    assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
    assert_int_equal(sim->requests[1].num_tokens, SIM_GREEDY_TOKENS);
    assert_memory_equal(sim->requests[1].tokens, sim_fx.greedy, sizeof sim_fx.greedy);
    sim_free(&sim);
}

/* The same seed gives the same history, event for event. */
static void test_a_seed_replays_exactly(void **state) {
    (void)state;
    int64_t ended[2];
    for (int run = 0; run < 2; run++) {
        sim_config config = sim_fixture_config(77);
        sim_cluster *sim = sim_new(&config);
        moe_inproc_faults faults = {.drop = 0.01, .duplicate = 0.02, .reorder = 0.05, .delay_max_ns = 3 * MOE_NS_PER_MS};
        moe_inproc_set_faults(sim->hub, &faults);
        sim_submit_greedy(sim, 6);
        assert_true(sim_run_until_idle(sim, 120 * MOE_NS_PER_S));
        ended[run] = sim->clock.fake_now_ns;
        sim_check(sim, 0);
        sim_free(&sim);
    }
    assert_int_equal(ended[0], ended[1]);
}

/* The bfloat16 profile: half the bytes, and the same tokens wherever the experts are. */
static void test_bfloat16(void **state) {
    (void)state;
    moe_backend *backend;
    moe_error err;
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.dtype = MOE_BF16}, &backend, &err), MOE_OK);
    for (int mode = MOE_COMBINE_EXACT; mode <= MOE_COMBINE_PARTIAL; mode++) {
        int64_t sent[3], received[3];
        int32_t tokens[2][SIM_GREEDY_TOKENS];
        for (int run = 0; run < 3; run++) { /* float32, bfloat16, bfloat16 with all experts at one worker */
            sim_config config = sim_fixture_config(5);
            config.combine = (moe_combine_mode)mode;
            config.replicas = 1;
            if (run > 0) config.backend = backend;
            if (run == 2) config.workers = 1;
            sim_cluster *sim = sim_new(&config);
            sent[run] = moe_metric_value(MOE_METRIC_EXPERT_CALL_BYTES_SENT);
            received[run] = moe_metric_value(MOE_METRIC_EXPERT_CALL_BYTES_RECEIVED);
            sim_submit_greedy(sim, 1);
            assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
            sent[run] = moe_metric_value(MOE_METRIC_EXPERT_CALL_BYTES_SENT) - sent[run];
            received[run] = moe_metric_value(MOE_METRIC_EXPERT_CALL_BYTES_RECEIVED) - received[run];
            assert_int_equal(sim->requests[0].num_tokens, SIM_GREEDY_TOKENS);
            if (run > 0) memcpy(tokens[run - 1], sim->requests[0].tokens, sizeof tokens[0]);
            sim_free(&sim);
        }
        assert_true(sent[0] > 0 && received[0] > 0 && sent[2] < sent[1]);
        if (mode == MOE_COMBINE_EXACT) { /* tokens, and with them routes, may differ between profiles: rows out do not */
            assert_int_equal(received[0], received[1]);
            assert_memory_equal(tokens[0], tokens[1], sizeof tokens[0]);
        } else {
            assert_in_range(received[0], received[1] * 19 / 10, received[1] * 21 / 10);
        }
        assert_in_range(sent[0], sent[1] * 19 / 10, sent[1] * 21 / 10);
    }
    backend->ops->close(backend);
}

/* Jobs that end only when they are polled, of router and workers, also while all is being taken down. */
static void test_polled_backend(void **state) {
    (void)state;
    static const int polls[] = {1, 2, 50};
    for (int i = 0; i < 3; i++) {
        moe_polled_backend polled;
        sim_config config = sim_fixture_config(9);
        moe_polled_init(&polled, sim_fx.backend, polls[i]);
        config.backend = &polled.base;
        sim_cluster *sim = sim_new(&config);
        sim_submit_greedy(sim, REQUESTS);
        assert_true(sim_run_until_idle(sim, 60 * MOE_NS_PER_S));
        assert_int_equal(sim_check(sim, 0), REQUESTS);
        assert_true(polled.num_ended > SIM_GREEDY_TOKENS && polled.num_polls >= polled.num_ended * polls[i]);
        sim_submit_greedy(sim, REQUESTS);
        for (int n = 0; n < 20 || polled.num_jobs == 0; n++) sim_run(sim, 1); /* a step each */
        sim_free(&sim);
        assert_int_equal(polled.num_jobs, 0);
    }
}

/* How the rows of each layer fall on its experts: loads decay with time, shares do not. */
static void expert_shares(const sim_cluster *sim, double *shares) {
    const moe_model_config *c = &sim->config.model->config;
    moe_engine_get_loads(sim->routers[0].engine, shares);
    for (int32_t l = 0; l < c->num_moe_layers; l++) {
        double sum = 0;
        for (int32_t e = 0; e < c->num_experts; e++) sum += shares[l * c->num_experts + e];
        assert_true(sum > 0);
        for (int32_t e = 0; e < c->num_experts; e++) shares[l * c->num_experts + e] /= sum;
    }
}

/* Whole steps in one job: the same tokens and loads as over messages, and no message. */
static void test_local_steps(void **state) {
    (void)state;
    double shares[2][256];
    assert_in_range(sim_fx.model->config.num_moe_layers * sim_fx.model->config.num_experts, 1, 256);
    for (int i = 0; i < 4; i++) {
        moe_polled_backend polled;
        sim_config config = sim_fixture_config(10);
        config.workers = config.replicas = 1;
        config.local = i > 0;
        config.max_num_batched_tokens = i == 2 ? 7 : 64;
        config.micro_batches = i == 2 ? 1 : 2;
        config.gating = i == 3 ? MOE_GATING_HINT : MOE_GATING_GATE; /* hints are counted between segments */
        moe_polled_init(&polled, sim_fx.backend, 2);
        config.backend = &polled.base;
        sim_cluster *sim = sim_new(&config);
        int64_t calls = moe_metric_value(MOE_METRIC_EXPERT_CALLS);
        sim_submit_greedy(sim, REQUESTS);
        assert_true(sim_run_until_idle(sim, 60 * MOE_NS_PER_S));
        assert_int_equal(sim_check(sim, 0), REQUESTS);
        bool local = i == 1 || i == 2;
        assert_int_equal(moe_metric_value(MOE_METRIC_EXPERT_CALLS) == calls, local);
        assert_int_equal(polled.num_local > 0, local);
        expert_shares(sim, shares[i > 0]);
        for (int e = 0; i == 1 && e < sim_fx.model->config.num_moe_layers * sim_fx.model->config.num_experts; e++)
            assert_true(fabs(shares[0][e] - shares[1][e]) < 1e-3);
        sim_free(&sim);
    }
}

/* A row that is not finite ends its own request alone; a cancelled request ends with its step. */
static void test_local_step_failures(void **state) {
    (void)state;
    moe_polled_backend polled;
    sim_config config = sim_fixture_config(11);
    config.workers = config.replicas = config.micro_batches = 1;
    config.local = true;
    moe_polled_init(&polled, sim_fx.backend, 2);
    config.backend = &polled.base;
    sim_cluster *sim = sim_new(&config);
    polled.spoil_local = 5;
    sim_submit_greedy(sim, 3);
    for (int32_t i = 0; i < 1000 && sim->requests[2].num_tokens < 2; i++) sim_run(sim, 1);
    moe_engine_cancel(sim->routers[0].engine, sim->requests[2].id);
    assert_true(sim_run_until_idle(sim, 60 * MOE_NS_PER_S));
    assert_int_equal(sim->requests[0].finish, MOE_FINISH_ERROR);
    assert_int_equal(sim->requests[0].status, MOE_INTERNAL);
    assert_non_null(strstr(sim->requests[0].message, "not finite"));
    assert_in_range(sim->requests[0].num_tokens, 1, SIM_GREEDY_TOKENS - 1);
    assert_int_equal(sim->requests[1].num_tokens, SIM_GREEDY_TOKENS);
    assert_memory_equal(sim->requests[1].tokens, sim_fx.greedy, sizeof sim_fx.greedy);
    assert_int_equal(sim->requests[2].status, MOE_CANCELLED);
    assert_in_range(sim->requests[2].num_tokens, 2, 4);
    sim_free(&sim);
}

static void test_profiles_are_not_mixed(void **state) {
    (void)state;
    sim_config config = sim_fixture_config(8);
    moe_error err;
    moe_status refused;
    config.boot_ns = 5 * MOE_NS_PER_S;
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.dtype = MOE_BF16}, &config.worker_backend, &err), MOE_OK);
    sim_cluster *sim = sim_new(&config);
    moe_engine_view *view = calloc(1, sizeof *view);
    moe_engine_get_view(sim->routers[0].engine, view);
    assert_false(view->ready);
    for (int32_t i = 0; i < view->num_workers; i++) assert_false(view->workers[i].up);
    if (sim_submit(sim, 0, sim_fx.prompt, SIM_PROMPT_TOKENS, SIM_GREEDY_TOKENS, &refused) >= 0) {
        assert_true(sim_run_until_idle(sim, 30 * MOE_NS_PER_S));
        assert_int_equal(sim->requests[0].finish, MOE_FINISH_ERROR);
        assert_int_equal(sim->requests[0].num_tokens, 0);
    }
    free(view);
    sim_free(&sim);
    config.worker_backend->ops->close(config.worker_backend);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_shape_gives_the_same_tokens),
                                       cmocka_unit_test(test_kills_with_two_replicas),
                                       cmocka_unit_test(test_one_replica_fails_cleanly_and_returns),
                                       cmocka_unit_test(test_bad_network),
                                       cmocka_unit_test(test_store_outage_is_not_noticed),
                                       cmocka_unit_test(test_epoch_survives_store_and_router),
                                       cmocka_unit_test(test_cancel_ends_a_request_at_once),
                                       cmocka_unit_test(test_a_seed_replays_exactly),
                                       cmocka_unit_test(test_bfloat16),
                                       cmocka_unit_test(test_profiles_are_not_mixed),
                                       cmocka_unit_test(test_polled_backend),
                                       cmocka_unit_test(test_local_steps),
                                       cmocka_unit_test(test_local_step_failures)};
    return cmocka_run_group_tests(tests, sim_fixture_open, sim_fixture_close);
}
