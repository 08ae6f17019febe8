/* Lists of cores, shares of them, and what a process may run on. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cores.h"
#include "tests/support/test.h"

static cpu_set_t before; /* what the test may run on */

static int keep(void **state) {
    (void)state;
    return sched_getaffinity(0, sizeof before, &before);
}

static int give_back(void **state) {
    (void)state;
    return sched_setaffinity(0, sizeof before, &before);
}

static void test_mistakes(void **state) {
    (void)state;
    static const char *const lists[] = {"", ",", "0,", "-1", "1-0", "0-", "x", "0 ", "99999", "0-99999", "0;1"};
    moe_error err;
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        assert_int_equal(moe_cores_restrict(lists[i], &err), MOE_INVALID_ARGUMENT);
        assert_int_equal(moe_cores_count(), CPU_COUNT(&before));
    }
}

/* Every core belongs to one share, and the shares differ by one core at most. */
static void test_shares(void **state) {
    (void)state;
    int32_t cores = moe_cores_count();
    char list[MOE_CORES_TEXT_BYTES];
    for (int32_t count = 1; count <= cores; count++) {
        cpu_set_t all;
        CPU_ZERO(&all);
        for (int32_t i = 0; i < count; i++) {
            assert_true(moe_cores_share(i, count, list));
            assert_int_equal(moe_cores_restrict(list, NULL), MOE_OK);
            cpu_set_t share;
            assert_int_equal(sched_getaffinity(0, sizeof share, &share), 0);
            assert_in_range(CPU_COUNT(&share), cores / count, (cores + count - 1) / count);
            CPU_OR(&all, &all, &share);
            assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
        }
        assert_true(CPU_EQUAL(&all, &before));
    }
    assert_false(moe_cores_share(0, cores + 1, list));
    assert_string_equal(list, "");
}

static void test_ranges(void **state) {
    (void)state;
    size_t first = 0;
    while (!CPU_ISSET(first, &before)) first++;
    char list[64];
    snprintf(list, sizeof list, "%zu-%zu,%zu", first, first, first);
    assert_int_equal(moe_cores_restrict(list, NULL), MOE_OK);
    assert_int_equal(moe_cores_count(), 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_mistakes, keep, give_back),
        cmocka_unit_test_setup_teardown(test_shares, keep, give_back),
        cmocka_unit_test_setup_teardown(test_ranges, keep, give_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
