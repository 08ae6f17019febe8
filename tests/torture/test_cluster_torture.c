/* A cluster that is refused what it needs: every allocation of a request's whole way failed in turn, a full disk under the map's
 * snapshot, and every length to which that file can be cut. Requests end once and with the right tokens, or with an error; the
 * next one is served. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/alloc.h"
#include "tests/support/sim_fixture.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define TOKENS 2              /* of a request here: prefill and a decode step */
#define MAX_ALLOCATIONS 20000 /* of one request and what happens beside; far above what there are */
#define LIMIT_NS (60 * MOE_NS_PER_S)

static sim_config base_config(void) {
    sim_config config = sim_fixture_config(3);
    config.workers = 2;
    config.micro_batches = 1;
    config.num_kv_blocks = 32;
    config.starved = true;
    return config;
}

/* One request, alone. True where it got its tokens; else it was refused or ended with an error. */
static bool request(sim_cluster *sim) {
    moe_status refused;
    sim->num_requests = 0;
    memset(&sim->requests[0], 0, sizeof sim->requests[0]);
    if (sim_submit(sim, 0, sim_fx.prompt, SIM_PROMPT_TOKENS, TOKENS, &refused) < 0) {
        assert_int_equal(refused, MOE_RESOURCE_EXHAUSTED);
        return false;
    }
    assert_true(sim_run_until_idle(sim, LIMIT_NS));
    const sim_request *r = &sim->requests[0];
    assert_int_equal(r->terminal_events, 1);
    assert_memory_equal(r->tokens, sim_fx.greedy, (size_t)r->num_tokens * sizeof *r->tokens);
    if (r->finish == MOE_FINISH_ERROR) return false;
    assert_int_equal(r->num_tokens, TOKENS);
    return true;
}

static void test_every_allocation_fails_once(void **state) {
    (void)state;
    sim_config config = base_config();
    sim_cluster *sim = sim_new(&config);
    int survived = 0, failed = 0;
    for (int64_t n = 1;; n++) {
        assert_true(n < MAX_ALLOCATIONS);
        int64_t before = moe_alloc_count();
        moe_alloc_fail_after(n);
        bool ok = request(sim);
        bool reached = moe_alloc_count() - before >= n;
        moe_alloc_fail_after(0);
        survived += ok;
        failed += !ok;
        assert_true(sim_run_until_healed(sim, LIMIT_NS));
        if (!request(sim)) fail_msg("the request after a failure of allocation %d failed: %s", (int)n, sim->requests[0].message);
        if (!reached) break;
    }
    assert_true(survived > 0 && failed > 0 && survived + failed > 50);
    sim_free(&sim);
}

/* ---- the snapshot of the map ---- */

static uint64_t saved_epoch(const char *path) {
    size_t size;
    char *text = moe_test_read_file(path, &size);
    moe_placement *map = NULL;
    moe_error err;
    const char *line = memchr(text, '\n', size);
    assert_non_null(line);
    assert_int_equal(moe_placement_from_json(line + 1, size - (size_t)(line + 1 - text), &map, &err), MOE_OK);
    uint64_t epoch = map->epoch;
    moe_placement_unref(&map);
    free(text);
    return epoch;
}

static void next_epoch(sim_cluster *sim) {
    uint64_t before = sim->newest_epoch;
    sim_kill(sim, 1);
    sim_run(sim, 100 * MOE_NS_PER_MS);
    sim_restart(sim, 1);
    for (int i = 0; i < 1000 && sim->newest_epoch == before; i++) sim_run(sim, 20 * MOE_NS_PER_MS);
    assert_true(sim->newest_epoch > before);
    assert_true(sim_run_until_healed(sim, LIMIT_NS));
}

/* The disk is full (the new file is /dev/full): the old snapshot stays whole, serving goes on, the next map is saved again. */
static void test_full_disk(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    char path[300], fresh[300];
    snprintf(path, sizeof path, "%s/placement.json", dir.path);
    snprintf(fresh, sizeof fresh, "%s/placement.json.new-r0", dir.path);
    sim_config config = base_config();
    config.state_dir = dir.path;
    sim_cluster *sim = sim_new(&config);
    uint64_t first = sim->newest_epoch;
    assert_int_equal(saved_epoch(path), first);
    assert_int_equal(symlink("/dev/full", fresh), 0);
    next_epoch(sim);
    assert_int_equal(saved_epoch(path), first);
    assert_true(request(sim));
    assert_int_equal(unlink(fresh), 0);
    next_epoch(sim);
    assert_int_equal(saved_epoch(path), sim->newest_epoch);
    sim_free(&sim);
    moe_test_dir_free(&dir);
}

/* A snapshot cut short anywhere is noticed: a router that starts with it serves the right map. */
static void test_cut_snapshot(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    char path[300];
    size_t size;
    snprintf(path, sizeof path, "%s/placement.json", dir.path);
    sim_config config = base_config();
    config.state_dir = dir.path;
    sim_cluster *sim = sim_new(&config);
    char *whole = moe_test_read_file(path, &size);
    for (size_t length = 0; length <= size; length = length == size ? size + 1 : length + 37 < size ? length + 37 : size) {
        moe_test_write_file(&dir, "placement.json", whole, length);
        sim_stop_router(sim, 0, false);
        sim_start_router(sim, 0);
        assert_true(sim_run_until_healed(sim, LIMIT_NS));
        assert_true(request(sim));
        assert_false(sim->map_incomplete || sim->epoch_fell);
    }
    free(whole);
    sim_free(&sim);
    moe_test_dir_free(&dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_allocation_fails_once), cmocka_unit_test(test_full_disk),
                                       cmocka_unit_test(test_cut_snapshot)};
    return cmocka_run_group_tests(tests, sim_fixture_open, sim_fixture_close);
}
