/* Thousands of seeds over the scenarios below; in each seed the faults, their moments and the cluster's size are drawn; in some also
 * how many experts fit the workers' devices and host memory.
 *
 * Oracles: O1, O2 and O4 by sim_check (tests/support/sim_fixture.h): right tokens, one end a request, epochs and maps. No request may
 * fail but those whose router was killed, since each seed has two replicas and one failure at a time. O3 and O5 by the sanitizer
 * builds: after each seed everything is freed.
 *
 * A seed that fails is named with the command that replays it: MOESAIC_SIM_SEED=N runs that seed alone, MOESAIC_SIM_SHOW=1 logs it. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "expert-worker/eviction.h"
#include "tests/support/residency_check.h"
#include "tests/support/sim_fixture.h"
#include "tests/support/test.h"

#if defined(__has_feature)
#define SIM_HAS_TSAN __has_feature(thread_sanitizer)
#else
#define SIM_HAS_TSAN 0
#endif
#if defined(__SANITIZE_THREAD__) || SIM_HAS_TSAN
#define SEEDS 50
#elif defined(__SANITIZE_ADDRESS__)
#define SEEDS 300
#else
#define SEEDS 2000
#endif
#define FULL_FACTOR 10 /* with MOESAIC_TEST_FULL=1 */

#define TOKENS 5
#define LIMIT_NS (120 * MOE_NS_PER_S)
#define REPLAYED_SEEDS 20
#define TIERS_EVERY 6  /* of so many seeds of a scenario, one has workers whose experts do not all fit */
#define NUM_POLICIES 3

typedef enum scenario { KILLS, NETWORK, MIGRATION, ROUTERS, STORE, SCENARIOS } scenario;
static const char *const names[] = {"kills", "network", "migration", "routers", "store"};

static uint64_t running; /* the seed */
static bool ended;       /* the test, well */
static moe_residency_counts tiers_counted;

static void say_replay(void) {
    char line[128];
    int length =
        snprintf(line, sizeof line, "seed %llu (%s) failed; replay: MOESAIC_SIM_SEED=%llu build/release/tests/test_sim_seeds\n",
                 (unsigned long long)running, names[running % SCENARIOS], (unsigned long long)running);
    if (write(STDERR_FILENO, line, (size_t)length) != length) _exit(1);
}

static void on_abort(int number) {
    say_replay();
    signal(number, SIG_DFL);
    raise(number);
}

/* Called by AddressSanitizer before it reports. */
void __asan_on_error(void);
void __asan_on_error(void) { say_replay(); }

static uint64_t below(sim_cluster *sim, uint64_t bound) { return moe_random_below(&sim->random, bound); }
static int64_t ms_below(sim_cluster *sim, uint64_t bound) { return (int64_t)below(sim, bound) * MOE_NS_PER_MS; }

static int32_t some_router(sim_cluster *sim) {
    int32_t at = (int32_t)below(sim, SIM_MAX_ROUTERS);
    while (!sim->routers[at].engine) at = (at + 1) % SIM_MAX_ROUTERS;
    return at;
}

static void submit(sim_cluster *sim, int32_t count) {
    moe_status refused;
    for (int32_t i = 0; i < count; i++)
        assert_true(sim_submit(sim, some_router(sim), sim_fx.prompt, SIM_PROMPT_TOKENS, TOKENS, &refused) >= 0);
}

/* A worker dies, is away for a time, and comes back. */
static void kills(sim_cluster *sim) {
    for (int round = 0; round < 2; round++) {
        int32_t victim = (int32_t)below(sim, (uint64_t)sim->config.workers);
        submit(sim, 2);
        sim_run(sim, (int64_t)below(sim, 10000) * MOE_NS_PER_US);
        sim_kill(sim, victim);
        sim_run(sim, ms_below(sim, 4000));
        submit(sim, 1);
        sim_restart(sim, victim);
        assert_true(sim_run_until_idle(sim, LIMIT_NS));
        assert_true(sim_run_until_healed(sim, LIMIT_NS));
    }
}

/* Messages are lost, doubled, delayed, reordered, and a worker is cut off for a while. */
static void network(sim_cluster *sim) {
    char endpoint[32];
    moe_inproc_faults faults = {.drop = 0.001 * (double)below(sim, 6),
                                .duplicate = 0.02,
                                .reorder = 0.05,
                                .delay_max_ns = (int64_t)below(sim, 3000) * MOE_NS_PER_US};
    snprintf(endpoint, sizeof endpoint, "inproc:w%d", (int)below(sim, (uint64_t)sim->config.workers));
    moe_inproc_set_faults(sim->hub, &faults);
    submit(sim, 3);
    sim_run(sim, (int64_t)below(sim, 10000) * MOE_NS_PER_US);
    moe_inproc_partition(sim->hub, endpoint, true, below(sim, 2));
    submit(sim, 1);
    sim_run(sim, ms_below(sim, 1500));
    moe_inproc_partition(sim->hub, endpoint, false, false);
}

static void ask_to_move(sim_cluster *sim) {
    char id[MOE_OPERATION_ID_BYTES];
    moe_error err;
    moe_operation op = {.kind = MOE_OP_REBALANCE};
    uint64_t kind = below(sim, 3);
    if (kind) {
        op.kind = kind == 1 ? MOE_OP_DRAIN : MOE_OP_REPLICATE;
        op.layer = (int32_t)below(sim, (uint64_t)sim_fx.model->config.num_moe_layers);
        op.expert = (int32_t)below(sim, (uint64_t)sim_fx.model->config.num_experts);
        if (kind == 1) snprintf(op.from, sizeof op.from, "w%d", (int)below(sim, (uint64_t)sim->config.workers));
    }
    assert_int_equal(moe_controller_submit(sim->routers[some_router(sim)].controller, &op, id, &err), MOE_OK);
}

/* Experts move on request and by themselves while a worker or router dies, or the store is gone for a time. */
static void migration(sim_cluster *sim) {
    int32_t victim = (int32_t)below(sim, (uint64_t)sim->config.workers);
    submit(sim, 2);
    ask_to_move(sim);
    sim_run(sim, ms_below(sim, 600));
    switch (below(sim, 3)) {
        case 0:
            sim_kill(sim, victim);
            sim_run(sim, ms_below(sim, 5000));
            sim_restart(sim, victim);
            break;
        case 1:
            victim = some_router(sim);
            sim_stop_router(sim, victim, false);
            sim_run(sim, ms_below(sim, 5000));
            sim_start_router(sim, victim);
            break;
        default:
            moe_memory_hub_set_down(sim->memory, true);
            sim_run(sim, ms_below(sim, 3000));
            moe_memory_hub_set_down(sim->memory, false);
    }
    assert_true(sim_run_until_healed(sim, LIMIT_NS));
    submit(sim, 1);
}

/* Routers join, leave when their requests have ended, and die with live requests; one is always there. */
static void routers(sim_cluster *sim) {
    for (int round = 0; round < 3; round++) {
        int32_t joins = (int32_t)below(sim, SIM_MAX_ROUTERS), goes;
        submit(sim, 1);
        sim_start_router(sim, joins);
        sim_run(sim, ms_below(sim, 30));
        bool dies = below(sim, 2);
        goes = some_router(sim);
        if (!dies) assert_true(sim_run_until_idle(sim, LIMIT_NS));
        sim_stop_router(sim, goes, !dies);
        sim_run(sim, ms_below(sim, 200));
        sim_start_router(sim, (goes + 1) % SIM_MAX_ROUTERS);
        assert_true(sim_run_until_healed(sim, LIMIT_NS));
        submit(sim, 1);
    }
}

/* The store is down, or loses everything, while a worker dies. */
static void store(sim_cluster *sim) {
    int32_t victim = (int32_t)below(sim, (uint64_t)sim->config.workers);
    submit(sim, 2);
    moe_memory_hub_set_down(sim->memory, true);
    sim_run(sim, ms_below(sim, 2000));
    submit(sim, 1);
    sim_kill(sim, victim);
    sim_run(sim, ms_below(sim, 2000));
    submit(sim, 1);
    if (below(sim, 2)) moe_memory_hub_wipe(sim->memory);
    moe_memory_hub_set_down(sim->memory, false);
    sim_run(sim, ms_below(sim, 1000));
    sim_restart(sim, victim);
}

/* Workers whose experts do not all fit: slots and images for some, with hints or without. Some workers hold all. */
static void draw_tiers(moe_random *random, sim_config *config, moe_tier_options *tiers) {
    const moe_model_config *m = &sim_fx.model->config;
    int32_t all = m->num_moe_layers * m->num_experts, least = m->top_k + MOE_RESIDENCY_SPARE_SLOTS;
    config->gating = moe_random_below(random, 3) ? MOE_GATING_HINT : MOE_GATING_GATE;
    for (int32_t i = 0; i < config->workers; i++) {
        int32_t slots = least + (int32_t)moe_random_below(random, (uint64_t)(all - least) / 2),
                images = MOE_RESIDENCY_MIN_IMAGES + (int32_t)moe_random_below(random, (uint64_t)all / 2);
        tiers[i] = (moe_tier_options){.device.part = (double)slots / all, .piece_bytes = 1024 << moe_random_below(random, 6)};
        if (moe_random_below(random, 2)) tiers[i].host.part = (double)images / all;
        tiers[i].cold = (moe_cold_experts)moe_random_below(random, MOE_COLD_AUTO + 1);
        tiers[i].eviction = moe_eviction_policy_name((int32_t)moe_random_below(random, NUM_POLICIES));
        if (moe_random_below(random, 4) == 0) tiers[i].device.part = 0;
    }
    config->tiers = tiers;
}

/* The hash of the seed's history. */
static uint64_t run_seed(uint64_t seed) {
    static void (*const scenarios[])(sim_cluster *) = {kills, network, migration, routers, store};
    moe_random random = {moe_mix64(seed + 1)};
    moe_tier_options tiers[SIM_MAX_WORKERS];
    running = seed;
    sim_config config = sim_fixture_config(seed);
    config.new_cluster = true;
    config.workers = 3 + (int32_t)moe_random_below(&random, 2);
    config.routers = seed % SCENARIOS == ROUTERS || seed % SCENARIOS == MIGRATION ? 2 : 1;
    config.pipeline_degree = (int32_t)(seed / SCENARIOS % 3) * 2;
    config.layout = moe_random_below(&random, 2) ? MOE_PLACEMENT_RANDOM : MOE_PLACEMENT_BALANCED;
    config.balance = (moe_balance_config){
        .automatic = seed % SCENARIOS == MIGRATION, .interval_ns = MOE_NS_PER_S, .dwell_ns = MOE_NS_PER_S, .redundant = 2};
    if (seed / SCENARIOS % TIERS_EVERY == TIERS_EVERY - 1) draw_tiers(&random, &config, tiers);
    sim_cluster *sim = sim_new(&config);
    scenarios[seed % SCENARIOS](sim);
    assert_true(sim_run_until_idle(sim, LIMIT_NS));
    moe_inproc_set_faults(sim->hub, &(moe_inproc_faults){0});
    assert_true(sim_run_until_healed(sim, LIMIT_NS));
    submit(sim, 1);
    assert_true(sim_run_until_idle(sim, LIMIT_NS));
    int32_t abandoned = 0;
    for (int32_t i = 0; i < sim->num_requests; i++) abandoned += sim->requests[i].abandoned;
    assert_int_equal(sim_check(sim, 0) + abandoned, sim->num_requests);
    uint64_t history = sim->history;
    for (int32_t i = 0; i < config.workers; i++) sim_kill(sim, i);
    residency_counts_add(&tiers_counted, &sim->tiers);
    sim_free(&sim);
    return history;
}

static uint64_t seeds(void) {
    const char *full = getenv("MOESAIC_TEST_FULL");
    return full && strcmp(full, "1") == 0 ? SEEDS * FULL_FACTOR : SEEDS;
}

static void test_seeds(void **state) {
    (void)state;
    const char *one = getenv("MOESAIC_SIM_SEED");
    int64_t began = moe_now_ns(moe_clock_real());
    if (one) {
        print_message("seed %s: history %016llx\n", one, (unsigned long long)run_seed(strtoull(one, NULL, 10)));
        ended = true;
        return;
    }
    for (uint64_t seed = 0; seed < seeds(); seed++) run_seed(seed);
    double seconds = (double)(moe_now_ns(moe_clock_real()) - began) / 1e9;
    print_message("figure: simulation: %llu seeds, %.0f a second, all oracles held\n", (unsigned long long)seeds(),
                  (double)seeds() / seconds);
    const moe_residency_counts *c = &tiers_counted;
    print_message("figure: of them, tiers: %llu hits, %llu late, %llu misses; %llu MB copied, %llu MB in vain; %llu packed again; %llu on hosts\n",
                  (unsigned long long)c->hits, (unsigned long long)c->late_hits, (unsigned long long)c->misses,
                  (unsigned long long)c->copied_bytes >> 20, (unsigned long long)c->wasted_bytes >> 20, (unsigned long long)c->packed,
                  (unsigned long long)c->host_experts);
    assert_true(c->hits && c->late_hits && c->misses && c->wasted_bytes && c->packed && c->host_experts); /* all of it happened */
    ended = true;
}

/* The same seed gives the same history, event for event; another one another. */
static void test_replay(void **state) {
    (void)state;
    uint64_t before = 0;
    for (uint64_t seed = 0; seed < REPLAYED_SEEDS && !getenv("MOESAIC_SIM_SEED"); seed++) {
        uint64_t first = run_seed(seed), second = run_seed(seed);
        assert_true(first == second && first != before);
        before = first;
    }
    ended = true;
}

static int set_up(void **state) {
    signal(SIGABRT, on_abort);
    return sim_fixture_open(state);
}

/* Also after a failed assertion, which leaves the test function before it says that it has ended. */
static int tear_down_test(void **state) {
    (void)state;
    if (!ended) say_replay();
    ended = false;
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test_teardown(test_replay, tear_down_test),
                                       cmocka_unit_test_teardown(test_seeds, tear_down_test)};
    return cmocka_run_group_tests(tests, set_up, sim_fixture_close);
}
