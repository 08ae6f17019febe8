/* The expert kernels' threshold table: lookup, and its file. Needs no GPU. */
#include <stdio.h>
#include <string.h>

#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#ifdef MOESAIC_HAS_CUDA
#include "cuda/tune.h"

static void test_tune_file(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    char path[300];
    moe_cuda_tune tune = {0}, back;
    moe_error err;
    snprintf(path, sizeof path, "%s/tune", dir.path);
    assert_int_equal(moe_cuda_tune_read(path, &back, &err), MOE_NOT_FOUND);
    assert_int_equal(moe_cuda_tune_add(&tune, &(moe_cuda_tune_row){2048, 768, {1, 2, 3}}, &err), MOE_OK);
    assert_int_equal(moe_cuda_tune_add(&tune, &(moe_cuda_tune_row){4096, 64, {0, 0, 1000}}, &err), MOE_OK);
    assert_int_equal(moe_cuda_tune_add(&tune, &(moe_cuda_tune_row){2048, 768, {4, 8, 16}}, &err), MOE_OK);
    assert_int_equal(tune.count, 2);
    assert_int_equal(moe_cuda_tune_write(path, &tune, &err), MOE_OK);
    assert_int_equal(moe_cuda_tune_read(path, &back, &err), MOE_OK);
    assert_int_equal(back.count, 2);
    assert_memory_equal(back.rows, tune.rows, 2 * sizeof *tune.rows);
    assert_int_equal(moe_cuda_tune_tile(&back, 2048, 768, 4 * 128, 128), 32);
    assert_int_equal(moe_cuda_tune_tile(&back, 2048, 768, 4 * 128 + 1, 128), 64);
    assert_int_equal(moe_cuda_tune_tile(&back, 2048, 768, 17 * 128, 128), 256);
    assert_int_equal(moe_cuda_tune_tile(&back, 2048, 768, 8, 128), 32);
    assert_int_equal(moe_cuda_tune_tile(&back, 4096, 64, 1000, 1), 128);
    assert_int_equal(moe_cuda_tune_tile(NULL, 1, 1, 1, 1), 32);
    const char *const bads[] = {"1 2 3 4\n", "0 2 3 4 5\n", "1 2 5 4 6\n", "1 2 3 4 5 6\n", "a\n", NULL};
    for (const char *const *bad = bads; *bad; bad++) {
        char text[64];
        moe_test_write_file(&dir, "tune", text, (size_t)snprintf(text, sizeof text, "# shapes\n\n%s", *bad));
        assert_int_equal(moe_cuda_tune_read(path, &back, &err), MOE_INVALID_ARGUMENT);
        assert_non_null(strstr(err.message, ":3:"));
        assert_int_equal(back.count, 0);
    }
    moe_test_dir_free(&dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_tune_file)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#else
int main(void) {
    printf("skipped: built without CUDA\n");
    return 77;
}
#endif
