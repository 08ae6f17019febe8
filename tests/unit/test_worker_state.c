/* What a worker remembers from one start to the next. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cli/worker_state.h"
#include "common/log.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define UUID "6f1c2a52-8f2e-4b6e-9a51-0a4f9c1b2d3e"
#define OTHER "00000000-0000-4000-8000-000000000001"

static void expect(const moe_test_dir *dir, const char *uuid, uint64_t epoch, uint64_t fence) {
    moe_worker_memory got = moe_worker_state_read(dir->path, "w0", uuid);
    assert_true(got.epoch == epoch && got.fence == fence);
}

static void test_written_and_read(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    moe_error err;
    expect(&dir, UUID, 0, 0);
    assert_int_equal(moe_worker_state_write(dir.path, "w0", UUID, (moe_worker_memory){7, 3}, &err), MOE_OK);
    expect(&dir, UUID, 7, 3);
    assert_int_equal(moe_worker_state_write(dir.path, "w0", UUID, (moe_worker_memory){UINT64_MAX, 4}, &err), MOE_OK);
    expect(&dir, UUID, UINT64_MAX, 4);
    expect(&dir, OTHER, 0, 0);
    moe_test_dir_free(&dir);
}

static void test_damaged(void **state) {
    (void)state;
    static const char whole[] = UUID " 12 34\n";
    moe_test_dir dir = moe_test_dir_new();
    for (size_t length = 0; length < sizeof whole - 1; length++) {
        moe_test_write_file(&dir, "worker-w0.state", whole, length);
        expect(&dir, UUID, 0, 0);
    }
    moe_test_write_file(&dir, "worker-w0.state", whole, sizeof whole - 1);
    expect(&dir, UUID, 12, 34);
    moe_test_dir_free(&dir);
}

static void test_full_disk(void **state) {
    (void)state;
    char fresh[300];
    moe_test_dir dir = moe_test_dir_new();
    moe_error err;
    assert_int_equal(moe_worker_state_write(dir.path, "w0", UUID, (moe_worker_memory){1, 1}, &err), MOE_OK);
    snprintf(fresh, sizeof fresh, "%s/worker-w0.state.new", dir.path);
    assert_int_equal(symlink("/dev/full", fresh), 0);
    assert_int_equal(moe_worker_state_write(dir.path, "w0", UUID, (moe_worker_memory){2, 2}, &err), MOE_UNAVAILABLE);
    expect(&dir, UUID, 1, 1);
    assert_int_equal(moe_worker_state_write("/nonexistent", "w0", UUID, (moe_worker_memory){2, 2}, &err), MOE_UNAVAILABLE);
    assert_int_equal(moe_worker_state_write(dir.path, "../w0", UUID, (moe_worker_memory){2, 2}, &err), MOE_INVALID_ARGUMENT);
    assert_int_equal(unlink(fresh), 0);
    moe_test_dir_free(&dir);
}

int main(void) {
    moe_log_init(MOE_LOG_OFF, "test");
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_written_and_read), cmocka_unit_test(test_damaged),
                                       cmocka_unit_test(test_full_disk)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
