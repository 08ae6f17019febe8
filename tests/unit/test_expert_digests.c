/* The manifest of expert digests: written, read, and refused where it is another model's or damaged. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/model/expert_digests.h"
#include "common/random.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define LAYERS 2
#define EXPERTS 3
#define MODEL UINT64_C(0xfedcba9876543210)

static void test_round_trip(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    char path[300];
    uint64_t digests[LAYERS * EXPERTS], *read = NULL;
    moe_error err;
    snprintf(path, sizeof path, "%s/" MOE_EXPERT_DIGESTS_FILE, dir.path);
    assert_int_equal(moe_expert_digests_read(path, MODEL, LAYERS, EXPERTS, &read, &err), MOE_NOT_FOUND);
    for (uint64_t turn = 0; turn < 2; turn++) { /* the second replaces the first */
        for (uint64_t i = 0; i < LAYERS * EXPERTS; i++) digests[i] = moe_mix64(10 * turn + i);
        assert_int_equal(moe_expert_digests_write(path, MODEL, LAYERS, EXPERTS, digests, &err), MOE_OK);
        assert_int_equal(moe_expert_digests_read(path, MODEL, LAYERS, EXPERTS, &read, &err), MOE_OK);
        assert_memory_equal(read, digests, sizeof digests);
        moe_free(read);
    }
    assert_int_equal(moe_expert_digests_read(path, MODEL + 1, LAYERS, EXPERTS, &read, &err), MOE_FAILED_PRECONDITION);
    assert_non_null(strstr(err.message, "moesaic digest"));
    assert_int_equal(moe_expert_digests_read(path, MODEL, LAYERS + 1, EXPERTS, &read, &err), MOE_DATA_LOSS);
    assert_int_equal(moe_expert_digests_read(path, MODEL, LAYERS, EXPERTS - 1, &read, &err), MOE_DATA_LOSS);
    assert_int_equal(moe_expert_digests_write("/nonexistent/file", MODEL, LAYERS, EXPERTS, digests, &err), MOE_UNAVAILABLE);
    moe_test_dir_free(&dir);
}

/* Every prefix of the file, and every byte of it replaced. */
static void test_damaged(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    char path[300];
    uint64_t digests[LAYERS * EXPERTS] = {1, 2, 3, 4, 5, 6}, *read = NULL;
    size_t size;
    moe_error err;
    snprintf(path, sizeof path, "%s/m", dir.path);
    assert_int_equal(moe_expert_digests_write(path, MODEL, LAYERS, EXPERTS, digests, &err), MOE_OK);
    char *text = moe_test_read_file(path, &size);
    for (size_t i = 0; i < size; i++) {
        moe_test_write_file(&dir, "m", text, i);
        assert_int_equal(moe_expert_digests_read(path, MODEL, LAYERS, EXPERTS, &read, &err), MOE_DATA_LOSS);
        char kept = text[i];
        text[i] = '?';
        moe_test_write_file(&dir, "m", text, size);
        moe_status status = moe_expert_digests_read(path, MODEL, LAYERS, EXPERTS, &read, &err);
        assert_true(status == MOE_DATA_LOSS);
        text[i] = kept;
    }
    free(text);
    moe_test_dir_free(&dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_round_trip), cmocka_unit_test(test_damaged)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
