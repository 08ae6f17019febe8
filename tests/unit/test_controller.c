/* The placement controller with make-believe workers on a fake clock: bootstrap, takeover, leader changes, store faults. */
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/buf.h"
#include "common/random.h"
#include "tests/support/placement_cluster.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

static pc_cluster cluster;

static int32_t share_of(const moe_placement *p, int32_t worker) {
    int32_t share = 0;
    for (int32_t i = 0; i < p->num_layers * p->num_experts; i++) share += moe_placement_has(&p->entries[i], worker);
    return share;
}

static int32_t held_by(const pc_worker *w) {
    int32_t held = 0;
    for (int32_t i = 0; i < PC_LAYERS * PC_EXPERTS; i++) held += w->held[i];
    return held;
}

static bool has_epoch_2(pc_cluster *c) { return c->routers[0].epoch >= 2; }

static void start(int32_t replicas, int32_t routers, int32_t workers) {
    pc_open(&cluster, replicas, workers);
    for (int32_t r = 0; r < routers; r++) pc_router_start(&cluster, r);
    for (int32_t w = 0; w < workers; w++) pc_worker_start(&cluster, w);
    pc_run_until(&cluster, pc_settled, 5000);
    assert_int_equal(cluster.routers[0].epoch, 1);
}

/* ---- bootstrap ---- */

static void test_bootstrap(void **state) {
    (void)state;
    for (int32_t workers = 1; workers <= 5; workers++) {
        for (int32_t replicas = 1; replicas <= workers && replicas <= 3; replicas++) {
            pc_open(&cluster, replicas, workers);
            pc_router_start(&cluster, 0);
            for (int32_t w = 0; w < workers - 1; w++) pc_worker_start(&cluster, w);
            pc_run_ms(&cluster, 6000);
            assert_int_equal(cluster.routers[0].num_maps, 0);
            assert_non_null(strstr(pc_view(&cluster, 0)->waiting_for, "waiting for"));
            pc_worker_start(&cluster, workers - 1);
            pc_run_until(&cluster, pc_settled, 1500);
            const moe_placement *map = cluster.routers[0].map;
            assert_true(map->epoch == 1 && map->num_workers == workers && cluster.routers[0].num_maps == 1);
            for (int32_t w = 0; w < workers; w++) {
                assert_string_equal(map->workers[w].id, cluster.workers[w].id);
                assert_int_equal(held_by(&cluster.workers[w]), share_of(map, w));
                assert_int_equal(pc_state(&cluster, 0, cluster.workers[w].id), MOE_WORKER_UP);
                assert_int_equal(cluster.view.workers[w].experts, share_of(map, w));
                assert_int_equal(cluster.view.workers[w].pid, 1000 + w);
            }
            assert_int_equal(cluster.view.min_replicas[PC_LAYERS - 1], replicas);
            assert_true(cluster.view.complete && cluster.view.leading && cluster.view.waiting_for[0] == '\0');
            pc_run_ms(&cluster, 10000); /* and nothing more happens */
            assert_int_equal(cluster.routers[0].num_maps, 1);
            pc_close(&cluster);
        }
    }
}

/* Without a number of workers: room for all replicas, and two quiet seconds. */
static void test_bootstrap_by_capacity(void **state) {
    (void)state;
    pc_open(&cluster, 2, 0);
    for (int32_t w = 0; w < 4; w++) cluster.workers[w].capacity_experts = 80; /* 120 experts, twice: 240 */
    pc_router_start(&cluster, 0);
    pc_worker_start(&cluster, 0);
    pc_worker_start(&cluster, 1);
    pc_run_ms(&cluster, 5000);
    assert_int_equal(cluster.routers[0].num_maps, 0);
    assert_string_equal(pc_view(&cluster, 0)->waiting_for, "the workers have room for 160 of 240 expert replicas");
    pc_worker_start(&cluster, 2);
    pc_run_ms(&cluster, 1500);
    pc_worker_start(&cluster, 3); /* the two seconds begin again */
    pc_run_ms(&cluster, 1500);
    assert_int_equal(cluster.routers[0].num_maps, 0);
    pc_run_until(&cluster, pc_settled, 2000);
    assert_int_equal(cluster.routers[0].map->num_workers, 4);
    pc_close(&cluster);
}

static void test_too_many_replicas(void **state) {
    (void)state;
    pc_open(&cluster, 3, 2);
    moe_controller_config config;
    moe_controller *controller = NULL;
    moe_error err;
    pc_router_config(&cluster, 0, &config);
    assert_int_equal(moe_controller_new(&config, &controller, &err), MOE_INVALID_ARGUMENT);
    assert_string_equal(err.message, "3 replicas of every expert need 3 workers, there will be 2");
    assert_null(controller);
    pc_close(&cluster);
}

/* A share that does not fit, and a file that names a worker who is not there, are said; both resolve when workers join. */
static void test_bootstrap_waits_for_room(void **state) {
    (void)state;
    pc_open(&cluster, 1, 2);
    cluster.workers[0].capacity_experts = 50;
    pc_router_start(&cluster, 0);
    pc_worker_start(&cluster, 0);
    pc_worker_start(&cluster, 1);
    pc_run_ms(&cluster, 3000);
    assert_int_equal(cluster.routers[0].num_maps, 0);
    assert_string_equal(pc_view(&cluster, 0)->waiting_for, "worker w0 has room for 50 experts, its share is 60");
    pc_worker_start(&cluster, 2);
    pc_run_until(&cluster, pc_settled, 1000);
    pc_close(&cluster);
}

/* The leader dies while workers are loading; the next one finishes, under the next fence. */
static bool all_stalled(pc_cluster *c) { return c->workers[0].num_waiting && c->workers[1].num_waiting; }

static void test_leader_dies_in_bootstrap(void **state) {
    (void)state;
    pc_open(&cluster, 2, 2);
    pc_router_start(&cluster, 0);
    cluster.workers[0].stalls = cluster.workers[1].stalls = true;
    pc_worker_start(&cluster, 0);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, all_stalled, 2000);
    assert_true(pc_view(&cluster, 0)->leading);
    pc_router_start(&cluster, 1);
    pc_run_ms(&cluster, 1000);
    assert_false(pc_view(&cluster, 1)->leading);
    pc_router_crash(&cluster, 0);
    pc_worker_release(&cluster, 0);
    pc_worker_release(&cluster, 1);
    pc_run_ms(&cluster, 1000);
    assert_int_equal(cluster.routers[1].num_maps, 0);
    pc_run_until(&cluster, pc_settled, 5000);
    assert_true(cluster.routers[1].epoch == 1 && cluster.routers[1].fence == 2);
    pc_close(&cluster);
}

static void test_worker_dies_in_bootstrap(void **state) {
    (void)state;
    pc_open(&cluster, 1, 2);
    pc_router_start(&cluster, 0);
    cluster.workers[0].stalls = cluster.workers[1].stalls = true;
    pc_worker_start(&cluster, 0);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, all_stalled, 2000);
    pc_worker_crash(&cluster, 1);
    pc_worker_release(&cluster, 0);
    cluster.workers[1].stalls = false;
    pc_run_ms(&cluster, 5000);
    assert_int_equal(cluster.routers[0].num_maps, 0);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 2000);
    assert_int_equal(cluster.routers[0].epoch, 1);
    pc_close(&cluster);
}

/* ---- takeover ---- */

static void test_takeover_by_same_id(void **state) {
    (void)state;
    start(2, 2, 3);
    uint64_t before = cluster.workers[1].incarnation;
    moe_placement *old = moe_placement_ref(cluster.routers[1].map);
    pc_worker_crash(&cluster, 1);
    pc_run_ms(&cluster, 200);
    assert_int_equal(pc_state(&cluster, 1, "w1"), MOE_WORKER_DOWN);
    assert_int_equal(cluster.view.min_replicas[0], 1);
    assert_true(cluster.view.complete);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 1000); /* at once: the lease of the dead one need not run out */
    const moe_placement *map = cluster.routers[1].map;
    assert_int_equal(map->epoch, 2);
    assert_true(map->workers[1].incarnation != before && map->workers[1].incarnation == cluster.workers[1].incarnation);
    assert_memory_equal(map->entries, old->entries, PC_LAYERS * PC_EXPERTS * sizeof *map->entries);
    assert_int_equal(pc_view(&cluster, 0)->min_replicas[0], 2);
    moe_placement_unref(&old);
    pc_close(&cluster);
}

static void test_takeover_by_another_id(void **state) {
    (void)state;
    start(1, 1, 2);
    pc_worker_start(&cluster, 7);
    pc_run_ms(&cluster, 3000);
    assert_int_equal(cluster.routers[0].epoch, 1);
    assert_int_equal(pc_state(&cluster, 0, "w7"), MOE_WORKER_JOINING);
    pc_worker_crash(&cluster, 0);
    pc_run_ms(&cluster, 2000);
    assert_int_equal(cluster.routers[0].epoch, 1); /* its lease still stands */
    pc_run_until(&cluster, pc_settled, 3000);
    assert_int_equal(cluster.routers[0].epoch, 2);
    assert_string_equal(cluster.routers[0].map->workers[0].id, "w7");
    pc_worker_start(&cluster, 0); /* comes back late: it is the spare now */
    pc_run_ms(&cluster, 3000);
    assert_int_equal(cluster.routers[0].epoch, 2);
    assert_int_equal(pc_state(&cluster, 0, "w0"), MOE_WORKER_JOINING);
    pc_close(&cluster);
}

/* A spare that is busy taking over stops when the dead one's own id comes back first, or dies itself. */
static bool w7_stalled(pc_cluster *c) { return c->workers[7].num_waiting > 0; }

static void test_newcomer_dies(void **state) {
    (void)state;
    start(1, 1, 2);
    cluster.workers[7].stalls = true;
    pc_worker_start(&cluster, 7);
    pc_worker_crash(&cluster, 0);
    pc_run_until(&cluster, w7_stalled, 6000);
    pc_worker_crash(&cluster, 7);
    pc_worker_start(&cluster, 8);
    pc_run_until(&cluster, pc_settled, 6000);
    assert_string_equal(cluster.routers[0].map->workers[0].id, "w8");
    assert_int_equal(cluster.routers[0].epoch, 2);
    pc_close(&cluster);
}

static void test_two_die_at_once(void **state) {
    (void)state;
    start(2, 1, 4);
    pc_worker_crash(&cluster, 0);
    pc_worker_crash(&cluster, 3);
    pc_worker_start(&cluster, 5);
    pc_worker_start(&cluster, 6);
    pc_run_until(&cluster, pc_settled, 8000);
    assert_int_equal(cluster.routers[0].epoch, 3);
    assert_string_equal(cluster.routers[0].map->workers[0].id, "w5");
    assert_string_equal(cluster.routers[0].map->workers[3].id, "w6");
    pc_close(&cluster);
}

/* ---- what is refused ---- */

static void test_digest_mismatch(void **state) {
    (void)state;
    pc_open(&cluster, 2, 2);
    pc_router_start(&cluster, 0);
    cluster.workers[1].digest_salt = 1;
    pc_worker_start(&cluster, 0);
    pc_worker_start(&cluster, 1);
    pc_run_ms(&cluster, 4000);
    assert_int_equal(cluster.routers[0].num_maps, 0);
    assert_int_equal(pc_state(&cluster, 0, "w1"), MOE_WORKER_REFUSED);
    pc_worker_start(&cluster, 2);
    pc_run_until(&cluster, pc_settled, 1000);
    assert_string_equal(cluster.routers[0].map->workers[1].id, "w2");

    cluster.workers[3].digest_salt = 1; /* at takeover too: the map knows the digests */
    pc_worker_start(&cluster, 3);
    pc_worker_crash(&cluster, 0);
    pc_run_ms(&cluster, 5000);
    assert_int_equal(pc_state(&cluster, 0, "w3"), MOE_WORKER_REFUSED);
    assert_int_equal(cluster.routers[0].epoch, 1);
    cluster.workers[0].digest_salt = 0;
    pc_worker_start(&cluster, 0);
    pc_run_until(&cluster, pc_settled, 1000);
    assert_int_equal(cluster.routers[0].epoch, 2);
    pc_close(&cluster);
}

/* With a manifest the first worker is refused, too; a map of other weights that is in the store is published over. */
static void test_manifest(void **state) {
    (void)state;
    uint64_t digests[PC_LAYERS * PC_EXPERTS];
    for (int i = 0; i < PC_LAYERS * PC_EXPERTS; i++) digests[i] = moe_mix64((uint64_t)i + 1);
    pc_open(&cluster, 1, 1);
    cluster.expert_digests = digests;
    cluster.workers[0].digest_salt = 1;
    pc_router_start(&cluster, 0);
    pc_worker_start(&cluster, 0);
    pc_run_ms(&cluster, 4000);
    assert_int_equal(cluster.routers[0].num_maps, 0);
    assert_int_equal(pc_state(&cluster, 0, "w0"), MOE_WORKER_REFUSED);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 2000);
    assert_string_equal(cluster.routers[0].map->workers[0].id, "w1");
    assert_int_equal(cluster.routers[0].epoch, 1);

    uint64_t bad = digests[7]; /* the operator finds that the map was made with a bad copy of an expert */
    digests[7] = bad ^ 1;
    pc_router_crash(&cluster, 0);
    pc_run_ms(&cluster, 5000);
    pc_router_start(&cluster, 0);
    pc_run_ms(&cluster, 5000);
    assert_int_equal(cluster.routers[0].map == NULL, 1);
    assert_int_equal(pc_state(&cluster, 0, "w1"), MOE_WORKER_REFUSED);
    pc_close(&cluster);
}

static void test_other_model_and_profile(void **state) {
    (void)state;
    pc_open(&cluster, 1, 1);
    cluster.workers[0].model_digest = PC_MODEL + 1;
    cluster.workers[2].profile = "other";
    pc_router_start(&cluster, 0);
    pc_worker_start(&cluster, 0);
    pc_run_ms(&cluster, 2000);
    assert_int_equal(cluster.routers[0].num_maps, 0);
    assert_int_equal(pc_state(&cluster, 0, "w0"), MOE_WORKER_REFUSED);
    pc_close(&cluster);

    start(1, 1, 2);
    cluster.workers[2].profile = "other";
    pc_worker_start(&cluster, 2);
    pc_worker_crash(&cluster, 0);
    pc_run_ms(&cluster, 6000);
    assert_int_equal(cluster.routers[0].epoch, 1);
    assert_int_equal(pc_state(&cluster, 0, "w2"), MOE_WORKER_REFUSED);
    pc_worker_start(&cluster, 3);
    pc_run_until(&cluster, pc_settled, 1000);
    assert_string_equal(cluster.routers[0].map->workers[0].id, "w3");
    pc_close(&cluster);
}

static void test_failing_newcomer(void **state) {
    (void)state;
    start(1, 1, 2);
    cluster.workers[5].fails = true;
    pc_worker_start(&cluster, 5);
    pc_worker_start(&cluster, 6);
    pc_worker_crash(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 12000);
    assert_string_equal(cluster.routers[0].map->workers[1].id, "w6");
    assert_int_equal(pc_state(&cluster, 0, "w5"), MOE_WORKER_REFUSED);
    assert_int_equal(cluster.workers[5].loads, 5);
    pc_close(&cluster);
}

/* Workers that have heard of a higher fence than the store knows, because the store and all routers were lost. */
static void test_lost_fence(void **state) {
    (void)state;
    pc_open(&cluster, 1, 2);
    cluster.workers[0].first_fence = 17;
    cluster.workers[1].first_fence = 40;
    pc_router_start(&cluster, 0);
    pc_worker_start(&cluster, 0);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 5000);
    assert_true(cluster.routers[0].epoch == 1 && cluster.routers[0].fence == 41);
    pc_close(&cluster);
}

/* Damaged leases are ignored; a damaged or another cluster's meta is left alone. */
static void test_damaged_keys(void **state) {
    (void)state;
    moe_error err;
    start(1, 1, 2);
    moe_store *s = cluster.store;
    static const char *const damaged[] = {"", "{", "[]", "{\"id\":\"x\"}", "{\"id\":7}", "nonsense", "{\"id\":\"w0\"}"};
    for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
        assert_int_equal(s->ops->put_lease(s, "worker:x", damaged[i], strlen(damaged[i]), 1000, &err), MOE_OK);
        assert_int_equal(s->ops->put_lease(s, "router:x", damaged[i], strlen(damaged[i]), 1000, &err), MOE_OK);
        pc_run_ms(&cluster, 500);
        assert_int_equal(pc_view(&cluster, 0)->num_workers, 2);
        assert_int_equal(cluster.view.num_routers, 1);
    }
    moe_buf meta = {0};
    bool found;
    assert_int_equal(s->ops->get(s, "meta", &meta, &found, &err), MOE_OK);
    static const char another[] =
        "{\"uuid\":\"another\",\"epoch\":9,\"fence\":9,\"leader\":\"x\",\"map_digest\":\"0000000000000001\","
        "\"model_digest\":\"0000000000001234\",\"replicas\":1}";
    static const char *const foreign[] = {"{", "{}", another};
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        moe_store_write write = {"meta", foreign[i], strlen(foreign[i])};
        const char *expected = i ? foreign[i - 1] : moe_buf_text(&meta);
        assert_int_equal(s->ops->compare_and_set(s, "meta", expected, strlen(expected), &write, 1, &err), MOE_OK);
        pc_run_ms(&cluster, 2000);
        assert_false(pc_view(&cluster, 0)->leading);
        moe_buf now = {0};
        assert_int_equal(s->ops->get(s, "meta", &now, &found, &err), MOE_OK);
        assert_string_equal(moe_buf_text(&now), foreign[i]);
        moe_buf_free(&now);
    }
    assert_int_equal(cluster.routers[0].epoch, 1);
    moe_store_write removal = {.key = "meta"}; /* an operator clears it: the cluster publishes what it serves */
    assert_int_equal(s->ops->compare_and_set(s, "meta", foreign[2], strlen(foreign[2]), &removal, 1, &err), MOE_OK);
    pc_run_until(&cluster, has_epoch_2, 5000);
    moe_buf_free(&meta);
    pc_close(&cluster);
}

/* ---- store faults ---- */

static void test_store_down_and_up(void **state) {
    (void)state;
    start(1, 2, 2);
    moe_memory_hub_set_down(cluster.store_hub, true);
    pc_run_ms(&cluster, 20000); /* far longer than any lease */
    assert_false(pc_view(&cluster, 0)->store_up);
    assert_true(cluster.view.complete);
    moe_memory_hub_set_down(cluster.store_hub, false);
    pc_run_ms(&cluster, 8000);
    assert_true(pc_view(&cluster, 0)->store_up);
    for (int32_t r = 0; r < 2; r++) assert_true(cluster.routers[r].epoch == 1 && cluster.routers[r].num_maps == 1);
    pc_close(&cluster);
}

/* A spare that registers first after an outage does not get the share of a worker that lives. */
static void test_no_false_takeover(void **state) {
    (void)state;
    start(1, 1, 2);
    moe_memory_hub_set_down(cluster.store_hub, true);
    pc_run_ms(&cluster, 10000);
    moe_memory_hub_wipe(cluster.store_hub);
    moe_memory_hub_set_down(cluster.store_hub, false);
    pc_worker_start(&cluster, 9);
    pc_run_ms(&cluster, 10000);
    assert_int_equal(cluster.routers[0].epoch, 2); /* published again, unchanged */
    assert_string_equal(cluster.routers[0].map->workers[0].id, "w0");
    assert_string_equal(cluster.routers[0].map->workers[1].id, "w1");
    assert_int_equal(pc_state(&cluster, 0, "w9"), MOE_WORKER_JOINING);
    pc_close(&cluster);
}

static void test_store_wiped(void **state) {
    (void)state;
    start(1, 2, 2);
    pc_worker_crash(&cluster, 0);
    pc_worker_start(&cluster, 0);
    pc_run_until(&cluster, has_epoch_2, 2000);
    pc_run_until(&cluster, pc_settled, 1000);
    uint64_t fence = cluster.routers[0].fence;
    moe_memory_hub_wipe(cluster.store_hub);
    pc_run_ms(&cluster, 6000);
    assert_true(pc_settled(&cluster));
    assert_true(cluster.routers[0].epoch == 3 && cluster.routers[1].epoch == 3);
    assert_true(cluster.routers[0].fence > fence);
    pc_close(&cluster);
}

/* A router that was told that the cluster is new publishes as soon as the experts are loaded; one that was not, or saw the store
 * lose data, first listens whether another router knows a map. */
static void test_new_cluster_does_not_listen(void **state) {
    (void)state;
    for (int row = 0; row < 3; row++) {
        pc_open(&cluster, 1, 2);
        cluster.new_cluster = row > 0;
        pc_router_start(&cluster, 0);
        pc_worker_start(&cluster, 0);
        pc_run_ms(&cluster, 3000);
        if (row != 1) moe_memory_hub_wipe(cluster.store_hub);
        pc_run_ms(&cluster, 110); /* the next poll */
        pc_worker_start(&cluster, 1);
        pc_run_ms(&cluster, 900);
        assert_int_equal(cluster.routers[0].epoch, row == 1 ? 1 : 0);
        pc_run_until(&cluster, pc_settled, 3000);
        assert_int_equal(cluster.routers[0].epoch, 1);
        pc_close(&cluster);
    }
}

static char old_meta[1024], old_map[1 << 16];

static void copy_key(const char *key, char *out, size_t capacity) {
    moe_buf value = {0};
    bool found;
    moe_error err;
    assert_int_equal(cluster.store->ops->get(cluster.store, key, &value, &found, &err), MOE_OK);
    assert_true(found && value.size < capacity);
    memcpy(out, value.data, value.size + 1);
    moe_buf_free(&value);
}

/* The store comes back with the data of an earlier time (a failover to a replica that lagged). */
static void test_store_older(void **state) {
    (void)state;
    start(1, 2, 2);
    copy_key("meta", old_meta, sizeof old_meta);
    copy_key("map:1", old_map, sizeof old_map);
    for (int i = 0; i < 2; i++) {
        pc_worker_crash(&cluster, 1);
        pc_worker_start(&cluster, 1);
        pc_run_until(&cluster, has_epoch_2, 2000);
        pc_run_until(&cluster, pc_settled, 2000);
    }
    assert_int_equal(cluster.routers[0].epoch, 3);
    moe_memory_hub_wipe(cluster.store_hub);
    moe_store_write writes[] = {{"meta", old_meta, strlen(old_meta)}, {"map:1", old_map, strlen(old_map)}};
    moe_error err;
    assert_int_equal(cluster.store->ops->compare_and_set(cluster.store, "meta", NULL, 0, writes, 2, &err), MOE_OK);
    pc_run_ms(&cluster, 6000);
    assert_true(pc_settled(&cluster));
    assert_int_equal(cluster.routers[1].epoch, 4);
    pc_close(&cluster);
}

/* The map that meta names is lost or damaged: whoever serves it publishes it again; a router that knows none waits for that. */
static void test_map_lost(void **state) {
    (void)state;
    start(1, 1, 2);
    moe_error err;
    moe_store *s = cluster.store;
    assert_int_equal(s->ops->remove(s, "map:1", &err), MOE_OK);
    pc_router_start(&cluster, 1); /* does not know the map */
    pc_run_ms(&cluster, 1000);
    assert_int_equal(cluster.routers[1].num_maps, 0);
    pc_router_crash(&cluster, 0); /* nobody knows it: a new layout, above the epoch that was */
    pc_run_until(&cluster, pc_settled, 6000);
    assert_int_equal(cluster.routers[1].epoch, 2);
    pc_close(&cluster);
}

/* A worker of the map restarts while the store is down: each router lets it in by its hello. */
static void test_rejoin_without_store(void **state) {
    (void)state;
    start(1, 2, 2);
    moe_memory_hub_set_down(cluster.store_hub, true);
    pc_run_ms(&cluster, 1000);
    pc_worker_crash(&cluster, 1);
    pc_run_ms(&cluster, 500);
    assert_false(pc_view(&cluster, 0)->complete);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 2000);
    for (int32_t r = 0; r < 2; r++) {
        assert_int_equal(cluster.routers[r].epoch, 1);
        assert_true(cluster.routers[r].map->workers[1].incarnation == cluster.workers[1].incarnation);
        assert_int_equal(pc_state(&cluster, r, "w1"), MOE_WORKER_UP);
    }
    moe_memory_hub_set_down(cluster.store_hub, false);
    pc_run_ms(&cluster, 6000);
    assert_true(pc_settled(&cluster));
    assert_int_equal(cluster.routers[0].epoch, 2);
    pc_close(&cluster);
}

/* ... but not one whose weights differ. */
static void test_rejoin_checks_digests(void **state) {
    (void)state;
    start(1, 1, 2);
    moe_memory_hub_set_down(cluster.store_hub, true);
    pc_run_ms(&cluster, 1000);
    pc_worker_crash(&cluster, 1);
    cluster.workers[1].digest_salt = 3;
    pc_worker_start(&cluster, 1);
    pc_run_ms(&cluster, 5000);
    assert_int_equal(cluster.routers[0].num_maps, 1);
    assert_false(pc_view(&cluster, 0)->complete);
    assert_int_equal(cluster.workers[1].loads, 2); /* asked once, in two chunks */
    pc_worker_crash(&cluster, 1);
    cluster.workers[1].digest_salt = 0;
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 1000);
    pc_close(&cluster);
}

/* ---- threads ---- */

static void test_threads(void **state) {
    (void)state;
    moe_controller_config config;
    moe_error err;
    pc_open_on(&cluster, moe_clock_real(), 1, 1);
    pc_router_config(&cluster, 0, &config);
    assert_int_equal(moe_controller_new(&config, &cluster.routers[0].controller, &err), MOE_OK);
    assert_int_equal(moe_controller_start(cluster.routers[0].controller, &err), MOE_OK);
    pc_worker_start(&cluster, 0);
    assert_int_equal(moe_registration_start(cluster.workers[0].registration, &err), MOE_OK);
    int64_t deadline = moe_now_ns(moe_clock_real()) + 20 * MOE_NS_PER_S;
    while (!pc_view(&cluster, 0)->complete) {
        assert_true(moe_now_ns(moe_clock_real()) < deadline);
        assert_int_equal(moe_rpc_step(cluster.workers[0].rpc, moe_now_ns(moe_clock_real()) + 10 * MOE_NS_PER_MS, &err), MOE_OK);
    }
    moe_controller_stop(cluster.routers[0].controller);
    moe_controller_stop(cluster.routers[0].controller);
    moe_controller_resign(cluster.routers[0].controller);
    moe_registration_stop(cluster.workers[0].registration);
    assert_int_equal(moe_registration_leave(cluster.workers[0].registration, &err), MOE_OK);
    assert_int_equal(cluster.routers[0].epoch, 1);
    pc_close(&cluster);
}

/* ---- leaders ---- */

static bool r1_leads(pc_cluster *c) { return pc_view(c, 1)->leading; }

static void test_leader_changes(void **state) {
    (void)state;
    start(1, 2, 2);
    assert_true(pc_view(&cluster, 0)->leading);
    assert_false(pc_view(&cluster, 1)->leading);
    assert_true(cluster.view.num_routers == 2 && cluster.view.routers[0].leader && !cluster.view.routers[1].leader);
    moe_controller_resign(cluster.routers[0].controller);
    pc_router_crash(&cluster, 0);
    pc_run_until(&cluster, r1_leads, 1000); /* resigned: at once */
    pc_router_start(&cluster, 0);
    pc_run_ms(&cluster, 1000);
    pc_router_crash(&cluster, 1);
    pc_run_ms(&cluster, 2000);
    assert_false(pc_view(&cluster, 0)->leading); /* crashed: once the lease ran out */
    pc_run_ms(&cluster, 2000);
    assert_true(pc_view(&cluster, 0)->leading);
    pc_worker_crash(&cluster, 1);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 2000);
    assert_true(cluster.routers[0].epoch == 2 && cluster.routers[0].fence == 3);
    pc_close(&cluster);
}

static void test_uuid_from_meta(void **state) {
    (void)state;
    pc_open(&cluster, 1, 1);
    cluster.uuid = "";
    pc_router_start(&cluster, 0);
    pc_router_start(&cluster, 1);
    const char *uuid = moe_controller_cluster_uuid(cluster.routers[0].controller);
    assert_int_equal(strlen(uuid), MOE_UUID_BYTES - 1);
    assert_string_equal(uuid, moe_controller_cluster_uuid(cluster.routers[1].controller));
    cluster.uuid = uuid;
    pc_worker_start(&cluster, 0);
    pc_run_until(&cluster, pc_settled, 2000);
    pc_close(&cluster);
}

static void test_map_from_disk(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    pc_open(&cluster, 1, 2);
    cluster.state_dirs[0] = dir.path;
    pc_router_start(&cluster, 0);
    pc_worker_start(&cluster, 0);
    pc_worker_start(&cluster, 1);
    pc_run_until(&cluster, pc_settled, 3000);
    pc_router_crash(&cluster, 0);
    moe_memory_hub_set_down(cluster.store_hub, true);
    pc_router_start(&cluster, 0);
    pc_run_until(&cluster, pc_settled, 200);
    assert_int_equal(cluster.routers[0].epoch, 1);
    moe_memory_hub_set_down(cluster.store_hub, false);
    pc_run_ms(&cluster, 6000);
    assert_true(cluster.routers[0].epoch == 1 && pc_settled(&cluster)); /* the store has the same map: nothing to publish */
    pc_router_crash(&cluster, 0);
    moe_test_write_file(&dir, "placement.json", "cluster-under-test\n{}", 21);
    pc_router_start(&cluster, 0); /* damaged: ignored */
    pc_run_until(&cluster, pc_settled, 1000);
    pc_close(&cluster);
    moe_test_dir_free(&dir);
}

/* ---- everything at once ---- */

static void random_fault(moe_random *random) {
    int32_t w = (int32_t)moe_random_below(random, 6), r = (int32_t)moe_random_below(random, 3);
    switch (moe_random_below(random, 10)) {
        case 0:
        case 1:
        case 2:
            pc_worker_crash(&cluster, w);
            break;
        case 3:
        case 4:
            pc_router_crash(&cluster, r);
            break;
        case 5:
            moe_memory_hub_set_down(cluster.store_hub, moe_random_below(random, 2));
            break;
        case 6:
            moe_memory_hub_wipe(cluster.store_hub);
            break;
        default:
            if (!cluster.workers[w].alive) pc_worker_start(&cluster, w);
            if (!cluster.routers[r].store) pc_router_start(&cluster, r);
    }
}

static void run_seed(uint64_t seed, const moe_test_dir *dirs) {
    moe_random random = {.state = seed};
    moe_inproc_faults faults = {.delay_min_ns = 0, .delay_max_ns = 40 * MOE_NS_PER_MS};
    pc_open(&cluster, 2, 4);
    cluster.may_lose_history = true;
    for (int32_t r = 0; r < 3; r++) {
        cluster.state_dirs[r] = dirs[r].path;
        pc_router_start(&cluster, r);
    }
    for (int32_t w = 0; w < 4; w++) pc_worker_start(&cluster, w);
    pc_run_until(&cluster, pc_settled, 5000);
    moe_inproc_set_faults(cluster.hub, &faults);
    for (int32_t i = 0; i < 60; i++) {
        random_fault(&random);
        pc_run_ms(&cluster, (int64_t)moe_random_below(&random, 1500));
    }
    moe_memory_hub_set_down(cluster.store_hub, false);
    for (int32_t w = 0; w < 6; w++) {
        if (!cluster.workers[w].alive) pc_worker_start(&cluster, w);
    }
    for (int32_t r = 0; r < 3; r++) {
        if (!cluster.routers[r].store) pc_router_start(&cluster, r);
    }
    pc_run_until(&cluster, pc_settled, 20000);
    pc_run_ms(&cluster, 10000);
    assert_true(pc_settled(&cluster));
    uint64_t epoch = cluster.routers[0].epoch;
    pc_run_ms(&cluster, 10000); /* and there is peace */
    assert_true(epoch == cluster.routers[0].epoch && pc_settled(&cluster));
    pc_close(&cluster);
}

static void test_random_faults(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 12; seed++) {
        print_message("seed %d\n", (int)seed);
        moe_test_dir dirs[3];
        for (int r = 0; r < 3; r++) dirs[r] = moe_test_dir_new();
        run_seed(seed, dirs);
        for (int r = 0; r < 3; r++) moe_test_dir_free(&dirs[r]);
    }
}

/* Every allocation of a bootstrap, a takeover and a lost store fails once; the cluster gets over each. */
static void test_out_of_memory(void **state) {
    (void)state;
    int64_t failed = 0;
    for (int64_t n = 1, more = 1; more; n += 1 + n / 16) {
        pc_open(&cluster, 1, 2);
        pc_router_start(&cluster, 0);
        pc_worker_start(&cluster, 0);
        pc_worker_start(&cluster, 1);
        int64_t before = moe_alloc_count();
        moe_alloc_fail_after(n);
        pc_run_ms(&cluster, 4000);
        moe_alloc_fail_after(0);
        more = moe_alloc_count() - before >= n;
        failed += more;
        pc_run_until(&cluster, pc_settled, 10000);
        before = moe_alloc_count();
        pc_worker_crash(&cluster, 0);
        pc_worker_start(&cluster, 0);
        moe_memory_hub_wipe(cluster.store_hub);
        moe_alloc_fail_after(n);
        pc_run_ms(&cluster, 4000);
        moe_alloc_fail_after(0);
        more = more || moe_alloc_count() - before >= n;
        pc_run_until(&cluster, pc_settled, 10000);
        assert_true(cluster.routers[0].epoch >= 2);
        pc_close(&cluster);
    }
    assert_true(failed > 50);
}

/* ---- registration ---- */

static void test_registration(void **state) {
    (void)state;
    pc_open(&cluster, 1, 1);
    moe_registration_config config = {.store = cluster.store,
                                      .clock = &cluster.clock,
                                      .id = "w\"0",
                                      .endpoint = "e",
                                      .public_key = "",
                                      .host = "",
                                      .profile = "",
                                      .incarnation = 1};
    moe_registration *old = NULL, *fresh = NULL;
    moe_error err;
    assert_int_equal(moe_registration_new(&config, &old, &err), MOE_INVALID_ARGUMENT);
    config.id = "w0";
    assert_int_equal(moe_registration_new(&config, &old, &err), MOE_OK);
    config.incarnation = 2;
    assert_int_equal(moe_registration_new(&config, &fresh, &err), MOE_OK);
    assert_int_equal(moe_registration_step(old, &err), MOE_OK);
    assert_int_equal(moe_registration_step(fresh, &err), MOE_OK);
    char lease[1024];
    copy_key("worker:w0", lease, sizeof lease);
    assert_non_null(strstr(lease, "\"incarnation\":\"0000000000000002\""));
    cluster.clock.fake_now_ns = moe_registration_next_ns(old);
    assert_int_equal(moe_registration_step(old, &err), MOE_ABORTED); /* never pushes the newer one out */
    assert_int_equal(moe_registration_leave(old, &err), MOE_OK);
    copy_key("worker:w0", lease, sizeof lease);
    assert_non_null(strstr(lease, "\"incarnation\":\"0000000000000002\""));
    moe_memory_hub_set_down(cluster.store_hub, true);
    cluster.clock.fake_now_ns = moe_registration_next_ns(fresh);
    assert_int_equal(moe_registration_step(fresh, &err), MOE_UNAVAILABLE);
    moe_memory_hub_wipe(cluster.store_hub);
    moe_memory_hub_set_down(cluster.store_hub, false);
    cluster.clock.fake_now_ns = moe_registration_next_ns(fresh);
    assert_int_equal(moe_registration_step(fresh, &err), MOE_OK);
    copy_key("worker:w0", lease, sizeof lease);
    assert_int_equal(moe_registration_leave(fresh, &err), MOE_OK);
    moe_buf value = {0};
    bool found = true;
    assert_int_equal(cluster.store->ops->get(cluster.store, "worker:w0", &value, &found, &err), MOE_OK);
    assert_false(found);
    moe_buf_free(&value);
    moe_registration_free(&old);
    moe_registration_free(&fresh);
    pc_close(&cluster);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bootstrap),
        cmocka_unit_test(test_bootstrap_by_capacity),
        cmocka_unit_test(test_too_many_replicas),
        cmocka_unit_test(test_bootstrap_waits_for_room),
        cmocka_unit_test(test_leader_dies_in_bootstrap),
        cmocka_unit_test(test_worker_dies_in_bootstrap),
        cmocka_unit_test(test_takeover_by_same_id),
        cmocka_unit_test(test_takeover_by_another_id),
        cmocka_unit_test(test_newcomer_dies),
        cmocka_unit_test(test_two_die_at_once),
        cmocka_unit_test(test_digest_mismatch), cmocka_unit_test(test_manifest),
        cmocka_unit_test(test_other_model_and_profile),
        cmocka_unit_test(test_failing_newcomer),
        cmocka_unit_test(test_lost_fence),
        cmocka_unit_test(test_damaged_keys),
        cmocka_unit_test(test_store_down_and_up),
        cmocka_unit_test(test_no_false_takeover),
        cmocka_unit_test(test_store_wiped),
        cmocka_unit_test(test_new_cluster_does_not_listen),
        cmocka_unit_test(test_store_older),
        cmocka_unit_test(test_map_lost),
        cmocka_unit_test(test_rejoin_without_store),
        cmocka_unit_test(test_rejoin_checks_digests),
        cmocka_unit_test(test_leader_changes),
        cmocka_unit_test(test_uuid_from_meta),
        cmocka_unit_test(test_map_from_disk),
        cmocka_unit_test(test_random_faults),
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_registration),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
