/* When a worker that keeps failing is quarantined, and for how long. */
#include "router/engine/quarantine.h"

#include <stdio.h>
#include <string.h>

#include "tests/support/test.h"

static moe_quarantine q;

/* Troubles `apart` until one begins a quarantine; how many that took, 0: `most` did not. */
static int troubles_until(const char *id, int64_t *now, int64_t apart, int most) {
    for (int i = 1; i <= most; i++) {
        *now += apart;
        if (moe_quarantine_trouble(&q, id, *now)) return i;
    }
    return 0;
}

static void test_limit_within_the_window(void **state) {
    (void)state;
    memset(&q, 0, sizeof q);
    int64_t now = 1000 * MOE_NS_PER_S;
    assert_int_equal(moe_quarantine_until_ns(&q, "w0"), 0);
    assert_int_equal(troubles_until("w0", &now, MOE_FLAP_WINDOW_NS / (MOE_FLAP_LIMIT - 1) + 1, 50), 0); /* too far apart */
    assert_int_equal(troubles_until("w1", &now, MOE_NS_PER_S, 50), MOE_FLAP_LIMIT);
    assert_int_equal(moe_quarantine_until_ns(&q, "w1"), now + MOE_QUARANTINE_NS);
    assert_int_equal(moe_quarantine_until_ns(&q, "w0"), 0);
}

static void test_grows_and_is_forgotten(void **state) {
    (void)state;
    memset(&q, 0, sizeof q);
    int64_t now = 1000 * MOE_NS_PER_S;
    for (int64_t hold = MOE_QUARANTINE_NS, i = 0; i < 8; i++) {
        assert_int_equal(troubles_until("w", &now, MOE_NS_PER_S, MOE_FLAP_LIMIT), MOE_FLAP_LIMIT);
        assert_int_equal(moe_quarantine_until_ns(&q, "w"), now + hold);
        assert_false(moe_quarantine_trouble(&q, "w", now + 1)); /* it is in quarantine already */
        now += hold + MOE_FLAP_WINDOW_NS;
        hold = 2 * hold < MOE_QUARANTINE_MAX_NS ? 2 * hold : MOE_QUARANTINE_MAX_NS;
    }
    now += MOE_QUARANTINE_FORGET_NS;
    assert_int_equal(troubles_until("w", &now, MOE_NS_PER_S, MOE_FLAP_LIMIT), MOE_FLAP_LIMIT);
    assert_int_equal(moe_quarantine_until_ns(&q, "w"), now + MOE_QUARANTINE_NS);
}

static void test_full_table_forgets_the_quietest(void **state) {
    (void)state;
    char id[32];
    memset(&q, 0, sizeof q);
    int64_t now = 1000 * MOE_NS_PER_S;
    assert_int_equal(troubles_until("first", &now, 1, MOE_FLAP_LIMIT), MOE_FLAP_LIMIT);
    moe_quarantine_trouble(&q, "first", ++now);
    for (int i = 0; i < MOE_PLACEMENT_MAX_WORKERS - 1; i++) {
        snprintf(id, sizeof id, "w%d", i);
        moe_quarantine_trouble(&q, id, now + 1 + i);
    }
    assert_true(moe_quarantine_until_ns(&q, "first") > 0);
    moe_quarantine_trouble(&q, "one more", now + 1000);
    assert_int_equal(moe_quarantine_until_ns(&q, "first"), 0);
    assert_int_equal(q.count, MOE_PLACEMENT_MAX_WORKERS);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_limit_within_the_window), cmocka_unit_test(test_grows_and_is_forgotten),
                                       cmocka_unit_test(test_full_table_forgets_the_quietest)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
