/* --devices: what is read and what is refused. */
#include "cli/device_list.h"
#include "tests/support/test.h"

static void reads(void **state) {
    moe_device_list list;
    (void)state;
    assert_int_equal(moe_device_list_parse("0", &list, NULL), MOE_OK);
    assert_int_equal(list.count, 1);
    assert_int_equal(list.ids[0], 0);
    assert_int_equal(moe_device_list_parse("3,0,63", &list, NULL), MOE_OK);
    assert_int_equal(list.count, 3);
    assert_int_equal(list.ids[0], 3);
    assert_int_equal(list.ids[1], 0);
    assert_int_equal(list.ids[2], 63);
}

static void refuses(void **state) {
    static const char *const bad[] = {"",   ",",   "0,", ",0", "0,,1", "0,1,0", "64",
                                      "-1", "0 1", " 0", "x",  "0x1",  "1.5",   "99999999999999999999"};
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        moe_device_list list;
        moe_error err;
        if (moe_device_list_parse(bad[i], &list, &err) != MOE_INVALID_ARGUMENT) fail_msg("'%s' was read", bad[i]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(reads), cmocka_unit_test(refuses)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
