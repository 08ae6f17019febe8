/* --devices auto: GPUs that are shared out by leases, over the memory store with a fake clock. Over a real Redis the same leases are
 * tested by tests/conformance/test_store.c, which has a worker's user take one. */
#include <string.h>

#include "cli/device_lease.h"
#include "common/log.h"
#include "common/memory/memory_store.h"
#include "tests/support/test.h"

#define WORKERS 3
#define DEVICES 2

static const moe_device_name names[DEVICES] = {"GPU-a", "GPU-b"};

typedef struct fixture {
    moe_clock clock;
    moe_memory_hub *hub;
    moe_store *stores[WORKERS];
    moe_device_lease leases[WORKERS];
    moe_error err;
} fixture;

static fixture f;

static int setup(void **state) {
    (void)state;
    f = (fixture){.clock = moe_clock_fake(1)};
    moe_log_init(MOE_LOG_ERROR, "test");
    assert_int_equal(moe_memory_hub_new(&f.clock, &f.hub, &f.err), MOE_OK);
    for (int i = 0; i < WORKERS; i++) assert_int_equal(moe_memory_open(f.hub, &f.stores[i], &f.err), MOE_OK);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    for (int i = 0; i < WORKERS; i++) f.stores[i]->ops->close(f.stores[i]);
    moe_memory_hub_free(&f.hub);
    return 0;
}

static moe_status take(int worker, const char *id) {
    return moe_device_lease_take(f.stores[worker], &f.clock, names, DEVICES, id, &f.leases[worker], &f.err);
}

static void pass_s(int seconds, int kept) { /* the first `kept` workers live on */
    for (int s = 0; s < seconds; s++) {
        f.clock.fake_now_ns += MOE_NS_PER_S;
        for (int i = 0; i < kept; i++) moe_device_lease_keep(&f.leases[i]);
    }
}

static void each_worker_gets_its_own(void **state) {
    (void)state;
    assert_int_equal(take(0, "w0"), MOE_OK);
    assert_int_equal(take(1, "w1"), MOE_OK);
    assert_int_equal(f.leases[0].device, 0);
    assert_int_equal(f.leases[1].device, 1);
    pass_s(60, 2); /* kept far beyond their time to live */
    assert_int_equal(take(2, "w2"), MOE_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(f.err.message, "all 2 GPUs"));
    moe_device_lease_release(&f.leases[0]);
    moe_device_lease_release(&f.leases[0]);
    assert_int_equal(take(2, "w2"), MOE_OK);
    assert_int_equal(f.leases[2].device, 0);
}

static void a_dead_workers_becomes_free(void **state) {
    (void)state;
    assert_int_equal(take(0, "w0"), MOE_OK);
    assert_int_equal(take(1, "w1"), MOE_OK);
    pass_s(MOE_DEVICE_LEASE_TTL_MS / 1000 - 1, 1);
    assert_int_equal(take(2, "w2"), MOE_RESOURCE_EXHAUSTED);
    pass_s(2, 1);
    assert_int_equal(take(2, "w2"), MOE_OK);
    assert_int_equal(f.leases[2].device, 1);
}

static void one_that_starts_again_gets_its_own_back(void **state) {
    (void)state;
    assert_int_equal(take(0, "w0"), MOE_OK);
    assert_int_equal(take(1, "w1"), MOE_OK);
    moe_device_lease_release(&f.leases[0]);
    assert_int_equal(take(1, "w1"), MOE_OK); /* killed and started again, with GPU 0 free, too */
    assert_int_equal(f.leases[1].device, 1);
}

static void an_outage_of_the_store_is_survived(void **state) {
    (void)state;
    assert_int_equal(take(0, "w0"), MOE_OK);
    moe_memory_hub_set_down(f.hub, true);
    assert_int_equal(take(1, "w1"), MOE_UNAVAILABLE);
    pass_s(5, 1);
    moe_memory_hub_set_down(f.hub, false);
    moe_memory_hub_wipe(f.hub); /* it came back empty */
    pass_s(2, 1);
    assert_int_equal(take(1, "w1"), MOE_OK);
    assert_int_equal(f.leases[1].device, 1);
    moe_memory_hub_wipe(f.hub); /* once more, and another is quicker: both go on, and neither frees the other's */
    assert_int_equal(take(2, "w2"), MOE_OK);
    assert_int_equal(f.leases[2].device, 0);
    pass_s(2, 1);
    moe_device_lease_release(&f.leases[0]);
    assert_int_equal(take(0, "w3"), MOE_OK);
    assert_int_equal(f.leases[0].device, 1);
}

static void a_zeroed_lease_is_nothing(void **state) {
    (void)state;
    moe_device_lease none = {.store = NULL};
    moe_device_lease_keep(&none);
    moe_device_lease_release(&none);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(each_worker_gets_its_own, setup, teardown),
        cmocka_unit_test_setup_teardown(a_dead_workers_becomes_free, setup, teardown),
        cmocka_unit_test_setup_teardown(one_that_starts_again_gets_its_own_back, setup, teardown),
        cmocka_unit_test_setup_teardown(an_outage_of_the_store_is_survived, setup, teardown),
        cmocka_unit_test(a_zeroed_lease_is_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
