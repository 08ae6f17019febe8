/* What a worker measures of its backend: sensible figures from every CPU backend and from one that is polled, an error from one
 * whose jobs fail. */
#include "cpu/cpu.h"
#include "expert-worker/calibrate.h"
#include "tests/support/cpu_backends.h"
#include "tests/support/gated_backend.h"
#include "tests/support/polled_backend.h"
#include "tests/support/test.h"

#define FIXTURES SOURCE_DIR "/tests/data/checkpoints/"
#define MOST_NS (INT64_C(1000000000)) /* an expert of the fixture takes microseconds */

static void check(moe_backend *backend, const moe_model *model) {
    moe_calibration cost;
    moe_error err;
    assert_int_equal(moe_calibrate(backend, model, &cost, &err), MOE_OK);
    assert_in_range(cost.expert_ns, 0, MOST_NS);
    assert_in_range(cost.row_ns, 1, MOST_NS);
}

static void test_backends(void **state) {
    moe_model *model;
    moe_error err;
    moe_polled_backend polled;
    moe_gated_backend gated;
    moe_calibration cost;
    assert_int_equal(moe_model_open(*state, &model, &err), MOE_OK);
    for (int i = 0; i < MOE_TEST_CPU_BACKENDS; i++) {
        for (int dtype = MOE_F32; dtype <= MOE_BF16; dtype++) {
            moe_backend *backend = moe_test_cpu_open_dtype(i, 0, (moe_dtype)dtype);
            if (!backend) continue;
            check(backend, model);
            moe_polled_init(&polled, backend, 3);
            check(&polled.base, model);
            moe_gated_init(&gated, backend);
            gated.fail_jobs = true;
            assert_int_not_equal(moe_calibrate(&gated.base, model, &cost, &err), MOE_OK);
            backend->ops->close(backend);
        }
    }
    moe_model_close(&model);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test_prestate(test_backends, FIXTURES "qwen3_moe"),
                                       cmocka_unit_test_prestate(test_backends, FIXTURES "switch_decoder")};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
