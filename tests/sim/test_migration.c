/* Experts that move: the controllers of two routers with make-believe workers on one fake clock. Oracles, checked at every map and
 * every Drop (tests/support/placement_cluster.c): each expert has a READY replica on a live worker in every map when it is
 * published, and who lives holds what it says; nothing is dropped that a live router may still route to; the epoch never falls. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/log.h"
#include "common/random.h"
#include "tests/support/placement_cluster.h"
#include "tests/support/test.h"

#define TOTAL (PC_LAYERS * PC_EXPERTS)
#define ROUTERS 2
#define WORKERS 4

static pc_cluster cluster;

static int32_t total_at(const char *id) {
    const moe_placement *map = cluster.routers[pc_leader(&cluster)].map;
    int32_t worker = moe_placement_find_worker(map, id), total = 0;
    for (int32_t i = 0; worker >= 0 && i < TOTAL; i++) total += moe_placement_has(&map->entries[i], worker);
    return total;
}

static void open_cluster(int32_t replicas, int32_t routers, int32_t workers, bool automatic) {
    pc_open(&cluster, replicas, workers);
    cluster.moving = true;
    cluster.balance = (moe_balance_config){.automatic = automatic, .redundant = 4, .dwell_ns = 10 * MOE_NS_PER_S};
    for (int32_t r = 0; r < routers; r++) pc_router_start(&cluster, r);
    for (int32_t w = 0; w < workers; w++) pc_worker_start(&cluster, w);
    pc_run_until(&cluster, pc_tidy, 20000);
}

static void submit(int32_t router, const moe_operation *op, char id[MOE_OPERATION_ID_BYTES]) {
    moe_error err;
    if (moe_controller_submit(cluster.routers[router].controller, op, id, &err) != MOE_OK) fail_msg("%s", err.message);
}

static const moe_operation *find_operation(int32_t router, const char *id) {
    const moe_controller_view *v = pc_view(&cluster, router);
    for (int32_t i = 0; i < v->num_operations; i++)
        if (strcmp(v->operations[i].id, id) == 0) return &v->operations[i];
    return NULL;
}

static char awaited[MOE_OPERATION_ID_BYTES];
static bool operation_finished(pc_cluster *c) {
    for (int32_t r = 0; r < PC_MAX_ROUTERS; r++) {
        if (!c->routers[r].controller) continue;
        const moe_operation *op = find_operation(r, awaited);
        return op && moe_operation_finished(op) && pc_tidy(c);
    }
    return false;
}

static const moe_operation *await(const char *id) {
    snprintf(awaited, sizeof awaited, "%s", id);
    pc_run_until(&cluster, operation_finished, 60000);
    return find_operation(pc_leader(&cluster), id);
}

static moe_operation move_of(int32_t layer, int32_t expert, const char *from, const char *to) {
    moe_operation op = {.kind = MOE_OP_MOVE, .layer = layer, .expert = expert};
    snprintf(op.from, sizeof op.from, "%s", from);
    snprintf(op.to, sizeof op.to, "%s", to);
    return op;
}

/* ---- what operators ask for ---- */

static void test_move_and_replicate(void **state) {
    (void)state;
    char id[MOE_OPERATION_ID_BYTES], again[MOE_OPERATION_ID_BYTES];
    open_cluster(1, ROUTERS, 3, false);
    moe_operation op = move_of(1, 0, "w1", "w2"); /* 40 mod 3 = 1 */
    submit(1, &op, id);
    submit(1, &op, again); /* asking again does nothing more */
    assert_string_equal(id, again);
    const moe_operation *done = await(id);
    assert_true(done->state == MOE_OP_DONE && done->done == 1 && done->total == 1 && done->safe_to_stop && !done->error[0]);
    const moe_placement_entry *e = moe_placement_at(cluster.routers[0].map, 1, 0);
    assert_true(e->num_replicas == 1 && e->replicas[0].worker == 2 && e->replicas[0].state == MOE_REPLICA_READY);
    assert_true(cluster.workers[2].held[PC_EXPERTS] && !cluster.workers[1].held[PC_EXPERTS]);
    assert_int_equal(cluster.routers[0].epoch, 4); /* both READY, source DRAINING, source removed */
    op = (moe_operation){.kind = MOE_OP_REPLICATE, .layer = 1, .expert = 0, .to = "w0"};
    submit(0, &op, id);
    assert_int_equal(await(id)->state, MOE_OP_DONE);
    assert_int_equal(moe_placement_at(cluster.routers[1].map, 1, 0)->num_replicas, 2);
    op.to[0] = '\0'; /* the least loaded: w1, which is the only one left */
    submit(0, &op, id);
    assert_int_equal(await(id)->state, MOE_OP_DONE);
    submit(0, &op, id);
    const moe_operation *failed = await(id);
    assert_true(failed->state == MOE_OP_FAILED && strstr(failed->error, "no worker without a replica has room"));
    pc_close(&cluster);
}

static void test_bad_operations_are_refused(void **state) {
    (void)state;
    static const struct {
        moe_operation op;
        const char *why;
    } rows[] = {{{.kind = MOE_OP_MOVE, .layer = 3, .from = "w0", .to = "w1"}, "no expert 0 in MoE layer 3"},
                {{.kind = MOE_OP_MOVE, .expert = -1, .from = "w0", .to = "w1"}, "no expert -1"},
                {{.kind = MOE_OP_MOVE, .from = "w0", .to = "w7"}, "no worker is called 'w7'"},
                {{.kind = MOE_OP_MOVE, .from = "w0", .to = "w0"}, "to itself"},
                {{.kind = MOE_OP_DRAIN, .from = ""}, "no worker is called ''"},
                {{.kind = MOE_OP_REBALANCE, .id = "a b"}, "letters, digits"}};
    char id[MOE_OPERATION_ID_BYTES];
    moe_error err;
    open_cluster(1, 1, 2, false);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        assert_int_equal(moe_controller_submit(cluster.routers[0].controller, &rows[i].op, id, &err), MOE_INVALID_ARGUMENT);
        assert_non_null(strstr(err.message, rows[i].why));
    }
    moe_memory_hub_set_down(cluster.store_hub, true);
    pc_run_ms(&cluster, 2000);
    moe_operation op = {.kind = MOE_OP_REBALANCE};
    assert_int_equal(moe_controller_submit(cluster.routers[0].controller, &op, id, &err), MOE_UNAVAILABLE);
    pc_close(&cluster);
}

static void test_drain_and_rebalance(void **state) {
    (void)state;
    char id[MOE_OPERATION_ID_BYTES], same[MOE_OPERATION_ID_BYTES];
    open_cluster(2, ROUTERS, WORKERS, false);
    moe_operation op = {.kind = MOE_OP_DRAIN, .from = "w1"};
    submit(0, &op, id);
    const moe_operation *done = await(id);
    assert_true(done->state == MOE_OP_DONE && done->safe_to_stop && done->done == done->total && done->done >= TOTAL / 2);
    assert_int_equal(total_at("w1"), 0);
    assert_int_equal(pc_state(&cluster, 0, "w1"), MOE_WORKER_LEAVING);
    submit(0, &op, same); /* of the same process: done already */
    assert_string_equal(id, same);
    op = (moe_operation){.kind = MOE_OP_REBALANCE};
    submit(0, &op, id);
    assert_true(await(id)->done < 20); /* nearly balanced, and the drained worker gets nothing */
    submit(0, &op, id);
    assert_int_equal(await(id)->done, 0);
    assert_int_equal(total_at("w1"), 0);
    pc_worker_crash(&cluster, 1); /* a restarted one is not drained any more */
    pc_run_ms(&cluster, 5000);
    pc_worker_start(&cluster, 1);
    pc_run_ms(&cluster, 3000);
    submit(0, &op, id);
    assert_true(await(id)->done > 0);
    assert_true(total_at("w1") >= TOTAL / WORKERS);
    pc_close(&cluster);
}

/* Finished operations are forgotten, so that there is always room for the next. */
static void test_many_operations(void **state) {
    (void)state;
    char id[MOE_OPERATION_ID_BYTES];
    open_cluster(1, ROUTERS, 2, false);
    for (int i = 0; i < 3 * MOE_MAX_OPERATIONS; i++) {
        moe_operation op = {.kind = MOE_OP_REBALANCE};
        snprintf(op.id, sizeof op.id, "rebalance-%d", i);
        submit(i % ROUTERS, &op, id);
        assert_int_equal(await(id)->state, MOE_OP_DONE);
    }
    assert_true(pc_view(&cluster, 0)->num_operations <= MOE_MAX_OPERATIONS);
    pc_close(&cluster);
}

static bool drain_is_stuck(pc_cluster *c) {
    const moe_operation *drain = find_operation(pc_leader(c), "stuck");
    return drain && strstr(drain->error, "no other worker has room");
}

/* A drain that is done is taken back, and one that can't end, while it still runs. */
static void test_undrain(void **state) {
    (void)state;
    char id[MOE_OPERATION_ID_BYTES], undrain[MOE_OPERATION_ID_BYTES], again[MOE_OPERATION_ID_BYTES];
    open_cluster(1, ROUTERS, 3, false);
    moe_operation op = {.kind = MOE_OP_DRAIN, .from = "w1"}, back = {.kind = MOE_OP_UNDRAIN, .from = "w1"};
    submit(0, &op, id);
    assert_int_equal(await(id)->state, MOE_OP_DONE);
    submit(1, &back, undrain);
    submit(1, &back, again);
    assert_string_equal(undrain, again);
    const moe_operation *done = await(undrain);
    assert_true(done->state == MOE_OP_DONE && done->done == done->total && done->safe_to_stop && !done->error[0]);
    const moe_operation *cancelled = find_operation(pc_leader(&cluster), id);
    assert_true(cancelled->state == MOE_OP_CANCELLED && !cancelled->safe_to_stop && strstr(cancelled->error, undrain));
    assert_true(total_at("w1") >= TOTAL / 3 / 2);
    assert_int_equal(pc_state(&cluster, 0, "w1"), MOE_WORKER_UP);
    submit(0, &back, id); /* of a worker that is not drained: nothing to do */
    assert_int_equal(await(id)->done, 0);
    pc_close(&cluster);
    open_cluster(1, 1, 1, false); /* nobody else is there */
    op = (moe_operation){.kind = MOE_OP_DRAIN, .id = "stuck", .from = "w0"};
    back = (moe_operation){.kind = MOE_OP_UNDRAIN, .from = "w0"};
    submit(0, &op, id);
    pc_run_until(&cluster, drain_is_stuck, 20000);
    submit(0, &back, undrain);
    assert_int_equal(await(undrain)->state, MOE_OP_DONE);
    assert_int_equal(find_operation(0, "stuck")->state, MOE_OP_CANCELLED);
    submit(0, &(moe_operation){.kind = MOE_OP_DRAIN, .from = "w0"}, id); /* a new one, not the one that was cancelled */
    assert_string_not_equal(id, "stuck");
    pc_close(&cluster);
}

/* ---- workers that come and go by themselves ---- */

static bool newcomers_filled(pc_cluster *c) { return pc_tidy(c) && total_at("w2") >= 24 && total_at("w3") >= 24; }
static bool leavers_empty(pc_cluster *c) {
    return pc_tidy(c) && total_at("w0") == 0 && total_at("w2") == 0 && !c->workers[0].held[0];
}

static void test_join_and_leave(void **state) {
    (void)state;
    open_cluster(1, ROUTERS, 2, true);
    pc_worker_start(&cluster, 2);
    pc_worker_start(&cluster, 3);
    pc_run_until(&cluster, newcomers_filled, 20000);
    cluster.workers[0].leaving = cluster.workers[2].leaving = true;
    pc_run_until(&cluster, leavers_empty, 20000);
    pc_worker_crash(&cluster, 0);
    pc_worker_crash(&cluster, 2);
    pc_run_ms(&cluster, 20000);
    assert_true(pc_tidy(&cluster));
    assert_int_equal(cluster.routers[0].map->num_workers, 2); /* they are forgotten */
    pc_close(&cluster);
}

static bool w1_empty(pc_cluster *c) { return pc_tidy(c) && total_at("w1") == 0 && !c->workers[1].held[0]; }
static bool w1_filled(pc_cluster *c) { return pc_tidy(c) && total_at("w1") >= TOTAL / 3; }

/* A rolling restart: a worker that handed everything over comes back under its id before anybody noticed that it was gone. */
static void test_restart_after_leaving(void **state) {
    (void)state;
    open_cluster(2, ROUTERS, 3, true);
    cluster.workers[1].leaving = true;
    pc_run_until(&cluster, w1_empty, 20000);
    pc_worker_crash(&cluster, 1);
    cluster.workers[1].leaving = false;
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, w1_filled, 20000);
    pc_close(&cluster);
}

static bool w3_replaced(pc_cluster *c) {
    return pc_tidy(c) && total_at("w3") == 0 && total_at("w0") + total_at("w1") + total_at("w2") == 2 * TOTAL;
}

/* One that leaves ends before its experts are elsewhere: the others load them at once, also without automatic placement. */
static void test_leaver_that_gives_up(void **state) {
    (void)state;
    open_cluster(2, ROUTERS, WORKERS, false);
    cluster.workers[3].leaving = true;
    pc_run_ms(&cluster, 600);
    assert_true(total_at("w3") > 0);
    assert_int_equal(pc_state(&cluster, 0, "w3"), MOE_WORKER_LEAVING);
    pc_worker_crash(&cluster, 3);
    pc_run_until(&cluster, w3_replaced, 8000); /* less than the 10 s after which the dead are replaced */
    pc_close(&cluster);
}

/* A worker that stays away is replaced by replicas on the others; without automatic placement it is waited for. */
static bool two_replicas(pc_cluster *c) {
    if (!pc_tidy(c)) return false;
    for (int32_t i = 0; i < TOTAL; i++)
        if (c->routers[0].map->entries[i].num_replicas != 2) return false;
    return true;
}

static void test_death_heals(void **state) {
    (void)state;
    open_cluster(2, ROUTERS, 3, true);
    pc_worker_crash(&cluster, 1);
    pc_run_ms(&cluster, 5000);
    assert_true(total_at("w1") > 0);
    pc_run_until(&cluster, two_replicas, 40000);
    assert_int_equal(total_at("w1"), 0);
    pc_close(&cluster);
}

/* A router routes by an old map for a long time: nothing is dropped until it has caught up. */
static void test_slow_router(void **state) {
    (void)state;
    char id[MOE_OPERATION_ID_BYTES];
    open_cluster(1, ROUTERS, 3, false);
    int32_t slow = 1 - pc_leader(&cluster);
    cluster.routers[slow].lag_ns = 5 * MOE_NS_PER_S;
    int64_t began = cluster.clock.fake_now_ns;
    moe_operation op = move_of(0, 0, "w0", "w1");
    submit(0, &op, id);
    await(id);
    assert_true(cluster.clock.fake_now_ns - began >= 10 * MOE_NS_PER_S);
    pc_close(&cluster);
}

/* ---- a router that the store does not answer ---- */

/* It follows the cluster's maps by way of the workers, and is not waited for long. Back at the store it is like the others. */
static void test_router_without_store(void **state) {
    (void)state;
    char id[MOE_OPERATION_ID_BYTES];
    open_cluster(1, ROUTERS, 3, false);
    int32_t leader = pc_leader(&cluster), lost = 1 - leader;
    const pc_router *router = &cluster.routers[lost];
    for (int round = 0; round < 3; round++) {
        pc_router_cut_off(&cluster, lost, true);
        int64_t began = cluster.clock.fake_now_ns;
        moe_operation op = move_of(0, 3 * round, "w0", "w1"); /* 3 round mod 3 = 0 */
        submit(leader, &op, id);
        snprintf(awaited, sizeof awaited, "%s", id);
        while (!cluster.workers[1].held[3 * round] || cluster.workers[0].held[3 * round]) pc_step(&cluster); /* moved */
        assert_true(cluster.clock.fake_now_ns - began < 8 * MOE_NS_PER_S); /* a lease's life, the grace, the move itself */
        pc_run_ms(&cluster, 1000);
        assert_false(pc_view(&cluster, lost)->store_up);
        assert_true(router->epoch == cluster.routers[leader].epoch && router->epoch > 1);
        pc_router_cut_off(&cluster, lost, false);
        pc_run_until(&cluster, operation_finished, 20000);
    }
    pc_close(&cluster);
}

/* ---- load ---- */

static bool is_replicated(pc_cluster *c) { return pc_tidy(c) && moe_placement_at(c->routers[0].map, 0, 4)->num_replicas > 1; }

/* A hot expert is replicated; when all of its traffic ends, the layout stays. */
static void test_hot_expert(void **state) {
    (void)state;
    open_cluster(1, ROUTERS, WORKERS, true);
    for (int second = 0; second < 30 && !is_replicated(&cluster); second++) {
        for (int32_t e = 0; e < PC_EXPERTS; e++) pc_compute(&cluster, e, e == 4 ? 3000 : 60, e == 4 ? 30 : 1);
        pc_run_ms(&cluster, 1000);
    }
    assert_true(is_replicated(&cluster));
    pc_run_ms(&cluster, 20000);
    uint64_t epoch = cluster.routers[0].epoch;
    pc_run_ms(&cluster, 600000);
    assert_true(cluster.routers[0].epoch == epoch);
    pc_close(&cluster);
}

/* ---- the crash matrix ---- */

enum { LEADER, ROUTER, SOURCE, DESTINATION, STORE_DOWN, STORE_LOST, STORE_AND_LEADER_LOST, VICTIMS };
static const char *const victim_names[] = {"leader", "router", "source", "destination", "store down", "store lost", "store and leader lost"};
static const char *const phases[] = {"copy", "publish", "switch", "drain", "remove", "drop"};

static bool in_phase(const char *phase) {
    int32_t leader = pc_leader(&cluster);
    if (leader < 0) return false;
    const char *text = pc_view(&cluster, leader)->migration, *at = strrchr(text, ' ');
    return at && strcmp(at + 1, phase) == 0;
}

static void strike(int victim, moe_random *random) {
    int64_t away_ms = 100 + (int64_t)moe_random_below(random, 8000);
    int32_t leader = pc_leader(&cluster), router = victim == LEADER ? leader : 1 - leader;
    switch (victim) {
        case LEADER:
        case ROUTER:
            pc_router_crash(&cluster, router);
            pc_run_ms(&cluster, away_ms);
            pc_router_start(&cluster, router);
            break;
        case SOURCE:
        case DESTINATION:
            pc_worker_crash(&cluster, victim == SOURCE ? 0 : 2);
            pc_run_ms(&cluster, away_ms);
            pc_worker_start(&cluster, victim == SOURCE ? 0 : 2);
            break;
        case STORE_DOWN:
            moe_memory_hub_set_down(cluster.store_hub, true);
            pc_run_ms(&cluster, away_ms);
            moe_memory_hub_set_down(cluster.store_hub, false);
            break;
        case STORE_AND_LEADER_LOST: /* nobody is left who knows of the migration */
            moe_memory_hub_wipe(cluster.store_hub);
            pc_router_crash(&cluster, leader);
            pc_run_ms(&cluster, away_ms);
            pc_router_start(&cluster, leader);
            break;
        default:
            moe_memory_hub_wipe(cluster.store_hub);
            break;
    }
}

static bool healed(pc_cluster *c) {
    if (!pc_tidy(c)) return false;
    for (int32_t i = 0; i < TOTAL; i++) {
        const moe_placement_entry *e = &c->routers[0].map->entries[i];
        for (int32_t r = 0; r < e->num_replicas; r++)
            if (e->replicas[r].state != MOE_REPLICA_READY) return false;
        if (e->num_replicas < 2) return false;
    }
    return true;
}

static bool healed_and_answered(pc_cluster *c) {
    int32_t leader = healed(c) ? pc_leader(c) : -1;
    const moe_operation *op = leader >= 0 ? find_operation(leader, awaited) : NULL;
    return op && moe_operation_finished(op);
}

/* w0's experts go elsewhere (a drain: batches of many moves), or one expert moves from w0 to w2. Returns whether it was struck. */
static bool run_cell(int victim, const char *phase, uint64_t seed) {
    moe_random random = {moe_mix64(seed)};
    char id[MOE_OPERATION_ID_BYTES];
    bool struck = false;
    open_cluster(2, ROUTERS, WORKERS, seed % 2);
    for (int32_t r = 0; r < ROUTERS; r++)
        cluster.routers[r].lag_ns = (int64_t)moe_random_below(&random, 300) * MOE_NS_PER_MS;
    moe_operation op = move_of(0, 0, "w0", "w2"); /* (0 + r) mod 4: w0 and w1 have it */
    if (seed % 3 == 0) op = (moe_operation){.kind = MOE_OP_DRAIN, .from = "w0"};
    submit(0, &op, id);
    uint64_t later = moe_random_below(&random, 4);
    for (int i = 0; i < 2000 && !struck; i++) {
        pc_step(&cluster);
        if (!in_phase(phase)) continue;
        for (uint64_t k = 0; k < later; k++) pc_step(&cluster);
        strike(victim, &random);
        struck = true;
    }
    pc_run_ms(&cluster, 2000); /* the failed are noticed */
    snprintf(awaited, sizeof awaited, "%s", id);
    pc_run_until(&cluster, victim >= STORE_LOST ? healed : healed_and_answered, 120000);
    pc_run_ms(&cluster, 3000);
    pc_run_until(&cluster, healed, 120000); /* and stays so */
    pc_close(&cluster);
    return struck;
}

static void test_crash_matrix(void **state) {
    (void)state;
    const char *full = getenv("MOESAIC_TEST_FULL"), *one = getenv("MOESAIC_SIM_SEED");
    uint64_t seeds = full && strcmp(full, "1") == 0 ? 60 : 6;
    int32_t cells = 0, struck = 0;
    for (int victim = 0; victim < VICTIMS; victim++) {
        for (size_t p = 0; p < sizeof phases / sizeof *phases; p++) {
            int32_t hits = 0;
            for (uint64_t seed = 1; seed <= seeds; seed++, cells++) {
                if (one && seed != strtoull(one, NULL, 10)) continue;
                if (getenv("MOESAIC_SIM_SHOW")) print_message("%s, %s, seed %d\n", victim_names[victim], phases[p], (int)seed);
                hits += run_cell(victim, phases[p], seed);
            }
            struck += hits;
            if (!one && hits == 0) fail_msg("no seed struck the %s in phase %s", victim_names[victim], phases[p]);
        }
    }
    print_message("figure: migration crash matrix: %d runs, %d struck in the phase meant, all invariants held\n", cells, struck);
}

static int quiet(void **state) {
    (void)state;
    if (!getenv("MOESAIC_SIM_SHOW")) moe_log_init(MOE_LOG_ERROR, "sim");
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_move_and_replicate), cmocka_unit_test(test_bad_operations_are_refused),
        cmocka_unit_test(test_drain_and_rebalance), cmocka_unit_test(test_undrain),
        cmocka_unit_test(test_many_operations),
        cmocka_unit_test(test_join_and_leave),      cmocka_unit_test(test_leaver_that_gives_up),
        cmocka_unit_test(test_restart_after_leaving),
        cmocka_unit_test(test_death_heals),         cmocka_unit_test(test_slow_router),
        cmocka_unit_test(test_router_without_store), cmocka_unit_test(test_hot_expert),
        cmocka_unit_test(test_crash_matrix),
    };
    return cmocka_run_group_tests(tests, quiet, NULL);
}
