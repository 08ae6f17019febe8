/* The placement controller with real workers (cpu-ref, the qwen3_moe fixture) in process on a fake clock. */
#include <stdio.h>
#include <string.h>

#include "common/inproc/inproc.h"
#include "common/memory/memory_store.h"
#include "cpu/cpu.h"
#include "expert-worker/registry.h"
#include "expert-worker/worker.h"
#include "router/placement/controller.h"
#include "tests/support/test.h"

#define CHECKPOINT SOURCE_DIR "/tests/data/checkpoints/qwen3_moe"
#define UUID "6f1c2a52-8f2e-4b6e-9a51-0a4f9c1b2d3e"
#define WORKERS 2
#define STEP_NS (5 * MOE_NS_PER_MS)
#define OK(call) assert_int_equal((call), MOE_OK)

typedef struct worker {
    moe_store *store;
    moe_transport *transport;
    moe_worker *worker;
    moe_registration *registration;
} worker;

static struct {
    moe_clock clock;
    moe_memory_hub *store_hub;
    moe_inproc_hub *hub;
    moe_model *model;
    moe_backend *backend;
    uint64_t incarnations;
    worker workers[WORKERS];
    moe_store *router_store;
    moe_transport *router_transport;
    moe_controller *controller;
    moe_placement *map;
    moe_controller_view view;
} sim;

static void on_map(void *ctx, moe_placement *map) {
    (void)ctx;
    moe_placement_unref(&sim.map);
    sim.map = moe_placement_ref(map);
}

static void start_worker(int i) {
    worker *w = &sim.workers[i];
    char id[16], endpoint[32], bound[MOE_ENDPOINT_BYTES];
    moe_error err;
    snprintf(id, sizeof id, "w%d", i);
    snprintf(endpoint, sizeof endpoint, "inproc:w%d", i);
    uint64_t incarnation = ++sim.incarnations;
    OK(moe_memory_open(sim.store_hub, &w->store, &err));
    OK(moe_inproc_open(sim.hub, &w->transport, &err));
    OK(w->transport->ops->listen(w->transport, endpoint, bound, &err));
    moe_worker_config config = {.model = sim.model,
                                .backend = sim.backend,
                                .transport = w->transport,
                                .clock = &sim.clock,
                                .cluster_uuid = UUID,
                                .id = i ? "w1" : "w0",
                                .incarnation = incarnation,
                                .max_queued_calls = 64,
                                .max_batch_rows = 256};
    OK(moe_worker_new(&config, &w->worker, &err));
    moe_registration_config registration = {.store = w->store,
                                            .clock = &sim.clock,
                                            .id = id,
                                            .endpoint = bound,
                                            .public_key = "",
                                            .host = "here",
                                            .profile = "cpu-ref",
                                            .incarnation = incarnation,
                                            .model_digest = sim.model->digest};
    OK(moe_registration_new(&registration, &w->registration, &err));
}

static void stop_worker(int i) {
    worker *w = &sim.workers[i];
    moe_registration_free(&w->registration);
    moe_worker_free(&w->worker);
    w->transport->ops->close(w->transport);
    w->store->ops->close(w->store);
}

static void start_router(int32_t replicas) {
    moe_error err;
    OK(moe_memory_open(sim.store_hub, &sim.router_store, &err));
    OK(moe_inproc_open(sim.hub, &sim.router_transport, &err));
    moe_controller_config config = {.store = sim.router_store,
                                    .transport = sim.router_transport,
                                    .clock = &sim.clock,
                                    .cluster_uuid = UUID,
                                    .id = "r0",
                                    .endpoint = "",
                                    .host = "here",
                                    .incarnation = ++sim.incarnations,
                                    .model_digest = sim.model->digest,
                                    .num_moe_layers = sim.model->config.num_moe_layers,
                                    .num_experts = sim.model->config.num_experts,
                                    .replicas = replicas,
                                    .initial_workers = WORKERS,
                                    .on_map = on_map};
    OK(moe_controller_new(&config, &sim.controller, &err));
}

static void stop_router(void) {
    moe_controller_free(&sim.controller);
    sim.router_transport->ops->close(sim.router_transport);
    sim.router_store->ops->close(sim.router_store);
    moe_placement_unref(&sim.map);
}

static void open_sim(int32_t replicas) {
    moe_error err;
    memset(&sim, 0, sizeof sim);
    sim.clock = moe_clock_fake(1000 * MOE_NS_PER_S);
    OK(moe_model_open(CHECKPOINT, &sim.model, &err));
    OK(moe_cpu_ref_open(&(moe_cpu_config){.threads = 0}, &sim.backend, &err));
    OK(moe_memory_hub_new(&sim.clock, &sim.store_hub, &err));
    OK(moe_inproc_hub_new(&sim.clock, 1, &sim.hub, &err));
    for (int i = 0; i < WORKERS; i++) start_worker(i);
    start_router(replicas);
}

static void close_sim(void) {
    stop_router();
    for (int i = 0; i < WORKERS; i++) stop_worker(i);
    moe_inproc_hub_free(&sim.hub);
    moe_memory_hub_free(&sim.store_hub);
    sim.backend->ops->close(sim.backend);
    moe_model_close(&sim.model);
}

static void run_until_epoch(uint64_t epoch) {
    for (int i = 0; i < 4000; i++) {
        moe_error err;
        moe_controller_get_view(sim.controller, &sim.view);
        if (sim.view.epoch == epoch && sim.view.complete) return;
        sim.clock.fake_now_ns += STEP_NS;
        for (int w = 0; w < WORKERS; w++) {
            OK(moe_registration_step(sim.workers[w].registration, &err));
            OK(moe_worker_step(sim.workers[w].worker, 0, &err));
        }
        OK(moe_controller_step(sim.controller, 0, &err));
    }
    fail_msg("epoch %d, waiting for: %s", (int)sim.view.epoch, sim.view.waiting_for);
}

/* The map's digests are those of the checkpoint, and every worker holds what the map says. */
static void check_cluster(int32_t replicas) {
    int32_t held = 0, total = sim.model->config.num_moe_layers * sim.model->config.num_experts;
    for (int32_t i = 0; i < total; i++) {
        uint64_t digest;
        OK(moe_expert_digest(&sim.model->experts[i], &digest, NULL));
        assert_true(sim.map->entries[i].digest == digest);
    }
    for (int w = 0; w < WORKERS; w++) {
        moe_worker_view view;
        moe_worker_get_view(sim.workers[w].worker, &view);
        assert_int_equal(sim.view.workers[w].experts, view.experts);
        held += view.experts;
    }
    assert_int_equal(held, replicas * total);
    assert_int_equal(sim.view.min_replicas[0], replicas);
}

static void test_bootstrap_and_takeover(void **state) {
    (void)state;
    for (int32_t replicas = 1; replicas <= 2; replicas++) {
        open_sim(replicas);
        run_until_epoch(1);
        check_cluster(replicas);
        stop_worker(1);
        start_worker(1);
        run_until_epoch(2);
        check_cluster(replicas);
        close_sim();
    }
}

/* The workers live on while the store loses everything and the only router, which knew the fence, is replaced. */
static void test_lost_fence(void **state) {
    (void)state;
    open_sim(1);
    run_until_epoch(1);
    stop_router(); /* leaves its lease: the next one leads with fence 2 once that ran out */
    start_router(1);
    stop_worker(1);
    start_worker(1);
    run_until_epoch(2);
    assert_int_equal(sim.map->fence, 2);
    stop_router();
    moe_memory_hub_wipe(sim.store_hub);
    start_router(1);
    run_until_epoch(2); /* the workers tell the epoch of their last Load and their fence: epoch 2 again, under a higher fence */
    assert_int_equal(sim.map->fence, 3);
    close_sim();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bootstrap_and_takeover),
        cmocka_unit_test(test_lost_fence),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
