/* Workers in trouble on a virtual clock: defective, flapping, slow, and requests that kill them. The oracles
 * are those of tests/support/sim_fixture.h. */
#include <string.h>

#include "common/metrics.h"
#include "router/engine/quarantine.h"
#include "tests/support/gated_backend.h"
#include "tests/support/sim_fixture.h"
#include "tests/support/test.h"

#define MOE_TEST_POISON_WORKERS 2 /* as the engine: MOE_POISON_WORKERS */
#define LIMIT_NS (60 * MOE_NS_PER_S)

static sim_config base_config(uint64_t seed) {
    sim_config config = sim_fixture_config(seed);
    config.reference = sim_fx.reference->ops->single;
    return config;
}

static const char *defect_of(sim_cluster *sim, int32_t worker) {
    static moe_worker_view view;
    moe_worker_get_view(sim->workers[worker].worker, &view);
    return view.defect;
}

/* A worker whose results are not finite any more, or whose device is lost, finds that out by itself; what it owed goes to others. */
static void test_defective_worker(void **state) {
    (void)state;
    for (int lost = 0; lost < 2; lost++) {
        moe_gated_backend gate;
        sim_config config = base_config(20 + (uint64_t)lost);
        moe_gated_init(&gate, sim_fx.backend);
        config.own_backend[1] = &gate.base;
        sim_cluster *sim = sim_new(&config);
        sim_submit_greedy(sim, 4);
        for (int i = 0; i < 10000 && sim->requests[3].num_tokens < 2; i++) sim_run(sim, 1);
        gate.poison = !lost;
        gate.fail_jobs = lost;
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        sim_check_all_right(sim, 0);
        assert_true(defect_of(sim, 1)[0] != '\0');
        assert_string_equal(defect_of(sim, 0), "");
        gate.poison = gate.fail_jobs = false; /* the process ends, another one starts */
        sim_kill(sim, 1);
        sim_submit_greedy(sim, 4);
        sim_restart(sim, 1);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        assert_true(sim_run_until_healed(sim, LIMIT_NS));
        sim_check_all_right(sim, 0);
        assert_string_equal(defect_of(sim, 1), "");
        sim_free(&sim);
    }
}

/* A sound worker's result that is not finite ends the request that it belongs to, and no other of the same call. */
static void test_value_not_finite_ends_its_request_alone(void **state) {
    (void)state;
    for (int mode = MOE_COMBINE_EXACT; mode <= MOE_COMBINE_PARTIAL; mode++) {
        moe_gated_backend gate;
        sim_config config = base_config(30);
        config.combine = (moe_combine_mode)mode;
        config.workers = config.replicas = 1;
        moe_gated_init(&gate, sim_fx.backend);
        config.own_backend[0] = &gate.base;
        sim_cluster *sim = sim_new(&config);
        sim_submit_greedy(sim, 3);
        for (int i = 0; i < 1000 && sim->requests[2].num_tokens < 2; i++) sim_run(sim, 1);
        gate.poison_next = 1;
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        int failed = 0;
        for (int i = 0; i < 3; i++) {
            const sim_request *r = &sim->requests[i];
            assert_int_equal(r->terminal_events, 1);
            assert_memory_equal(r->tokens, sim_fx.greedy, (size_t)r->num_tokens * sizeof *r->tokens);
            if (r->finish != MOE_FINISH_ERROR) continue;
            failed++;
            assert_int_equal(r->status, MOE_INTERNAL);
            assert_non_null(strstr(r->message, "of MoE layer"));
        }
        assert_int_equal(failed, 1);
        assert_string_equal(defect_of(sim, 0), "");
        sim_free(&sim);
    }
}

/* Both workers that compute a request die in one step: it is not tried on the third. One death alone is survived. */
static void test_poison_request(void **state) {
    (void)state;
    for (int deaths = 1; deaths <= 2; deaths++) {
        sim_config config = base_config(40);
        config.replicas = 3;
        config.micro_batches = 1;
        sim_cluster *sim = sim_new(&config);
        int64_t poison = moe_metric_value(MOE_METRIC_POISON_REQUESTS), calls = moe_metric_value(MOE_METRIC_EXPERT_CALLS);
        moe_inproc_faults slow = {.delay_max_ns = 2 * MOE_NS_PER_MS};
        moe_inproc_set_faults(sim->hub, &slow);
        sim_submit_greedy(sim, 1);
        for (int i = 0; i < 1000 && moe_metric_value(MOE_METRIC_EXPERT_CALLS) < calls + 3; i++) sim_run(sim, 1);
        for (int32_t w = 0; w < deaths; w++) sim_kill(sim, w);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        assert_int_equal(moe_metric_value(MOE_METRIC_POISON_REQUESTS) - poison, deaths == MOE_TEST_POISON_WORKERS);
        if (deaths == MOE_TEST_POISON_WORKERS) {
            assert_int_equal(sim->requests[0].terminal_events, 1);
            assert_int_equal(sim->requests[0].status, MOE_INTERNAL);
            assert_non_null(strstr(sim->requests[0].message, "died"));
        }
        for (int32_t w = 0; w < deaths; w++) sim_restart(sim, w);
        sim_submit_greedy(sim, 2);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        sim_check_all_right(sim, deaths == MOE_TEST_POISON_WORKERS);
        sim_free(&sim);
    }
}

static const moe_engine_worker_view *view_of(sim_cluster *sim, int32_t worker) {
    static moe_engine_view view;
    moe_engine_get_view(sim->routers[0].engine, &view);
    for (int32_t i = 0; i < view.num_workers; i++)
        if (strcmp(view.workers[i].id, sim->workers[worker].id) == 0) return &view.workers[i];
    return NULL;
}

/* A worker that dies again and again gets no work while others can do it, and serves again afterwards. */
static void test_flapping_worker(void **state) {
    (void)state;
    sim_config config = base_config(50);
    sim_cluster *sim = sim_new(&config);
    for (int i = 0; i < MOE_FLAP_LIMIT; i++) {
        sim_submit_greedy(sim, 2);
        sim_run(sim, 10 * MOE_NS_PER_MS);
        sim_kill(sim, 1);
        sim_run(sim, 200 * MOE_NS_PER_MS);
        sim_restart(sim, 1);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        assert_true(sim_run_until_healed(sim, LIMIT_NS));
        assert_int_equal(view_of(sim, 1)->quarantine_ns > 0, i == MOE_FLAP_LIMIT - 1);
    }
    uint64_t rows[2];
    moe_worker_view view;
    for (int i = 0; i < 2; i++) {
        moe_worker_get_view(sim->workers[1].worker, &view);
        rows[i] = view.rows;
        sim_submit_greedy(sim, 2);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
    }
    assert_int_equal(rows[0], rows[1]);
    sim_kill(sim, 0); /* what only it holds now, it computes */
    sim_submit_greedy(sim, 2);
    assert_true(sim_run_until_idle(sim, LIMIT_NS));
    moe_worker_get_view(sim->workers[1].worker, &view);
    assert_true(view.rows > rows[1]);
    sim_restart(sim, 0);
    sim_run(sim, MOE_QUARANTINE_NS);
    assert_int_equal(view_of(sim, 1)->quarantine_ns, 0);
    sim_check_all_right(sim, 0);
    sim_free(&sim);
}

/* A worker falls silent: other replicas are asked long before it is suspected, within the budget; the tokens stay the same. */
static void test_hedges(void **state) {
    (void)state;
    for (int mode = MOE_COMBINE_EXACT; mode <= MOE_COMBINE_PARTIAL; mode++) {
        for (uint64_t seed = 60; seed < 70; seed++) {
            sim_config config = base_config(seed);
            config.combine = (moe_combine_mode)mode;
            config.replicas = seed % 2 ? 2 : 3;
            sim_cluster *sim = sim_new(&config);
            sim_submit_greedy(sim, 8); /* earns the budget */
            assert_true(sim_run_until_idle(sim, LIMIT_NS));
            sim_submit_greedy(sim, 4);
            for (int i = 0; i < 10000 && sim->requests[11].num_tokens < 2; i++) sim_run(sim, 1);
            int64_t hedges = moe_metric_value(MOE_METRIC_HEDGES), won = moe_metric_value(MOE_METRIC_HEDGES_WON);
            int64_t suspected = moe_metric_value(MOE_METRIC_PEERS_SUSPECTED);
            moe_inproc_partition(sim->hub, "inproc:w1", true, false);
            sim_run(sim, 150 * MOE_NS_PER_MS);
            assert_true(moe_metric_value(MOE_METRIC_HEDGES) > hedges);
            assert_true(moe_metric_value(MOE_METRIC_HEDGES_WON) > won);
            assert_int_equal(moe_metric_value(MOE_METRIC_PEERS_SUSPECTED), suspected);
            moe_inproc_faults faults = {.duplicate = 0.05, .reorder = 0.05, .delay_max_ns = 40 * MOE_NS_PER_MS};
            moe_inproc_set_faults(sim->hub, &faults);
            moe_inproc_partition(sim->hub, "inproc:w1", false, false);
            sim_submit_greedy(sim, 4);
            assert_true(sim_run_until_idle(sim, LIMIT_NS));
            sim_check_all_right(sim, 0);
            sim_free(&sim);
        }
    }
}

/* Hedges answer for a worker that makes no progress: it is suspected in time all the same, and its silence costs few hedges. */
static void test_silence_is_seen_through_hedges(void **state) {
    (void)state;
    for (uint64_t seed = 80; seed < 90; seed++) {
        sim_config config = sim_fixture_config(seed);
        sim_cluster *sim = sim_new(&config);
        sim_submit_greedy(sim, 8);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        int64_t suspected = moe_metric_value(MOE_METRIC_PEERS_SUSPECTED), hedges = moe_metric_value(MOE_METRIC_HEDGES);
        moe_inproc_partition(sim->hub, "inproc:w1", true, false);
        for (int i = 0; i < 50; i++) {
            sim_submit_greedy(sim, 1);
            sim_run(sim, 10 * MOE_NS_PER_MS);
        }
        assert_true(moe_metric_value(MOE_METRIC_PEERS_SUSPECTED) > suspected);
        assert_true(moe_metric_value(MOE_METRIC_HEDGES) - hedges <= 20); /* of 2 micro-batches, one each 75 ms, and a margin */
        moe_inproc_partition(sim->hub, "inproc:w1", false, false);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        sim_check_all_right(sim, 0);
        sim_free(&sim);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defective_worker), cmocka_unit_test(test_value_not_finite_ends_its_request_alone),
        cmocka_unit_test(test_poison_request),   cmocka_unit_test(test_flapping_worker),
        cmocka_unit_test(test_hedges),           cmocka_unit_test(test_silence_is_seen_through_hedges),
    };
    return cmocka_run_group_tests(tests, sim_fixture_open, sim_fixture_close);
}
