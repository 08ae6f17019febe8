/* cuBLASLt is found and has every function that is called, without a GPU. Left out where the library is not installed. */
#include "tests/support/test.h"

#ifdef MOESAIC_HAS_CUDA
#include "cuda/cublas_lt.h"

static void all_functions(void **state) {
    const moe_cublas_lt *lt, *again;
    moe_error err;
    (void)state;
    if (moe_cublas_lt_load(&lt, &err) != MOE_OK) {
        assert_int_equal(err.code, MOE_UNAVAILABLE);
        print_message("skipped: %s\n", err.message);
        skip();
    }
    assert_int_equal(moe_cublas_lt_load(&again, &err), MOE_OK);
    assert_ptr_equal(lt, again);
#define CHECK(name) assert_non_null(lt->name);
    MOE_CUBLAS_LT_FUNCTIONS(CHECK)
}
#else
static void all_functions(void **state) {
    (void)state;
    print_message("skipped: this build has no CUDA backend\n");
    skip();
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_functions)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
