/* The demo model against golden.json (transformers in float64): top-10 logits and greedy continuations, both gatings. */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>

#include "tests/support/cpu_backends.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/reference_driver.h"
#include "tests/support/test.h"

#define MAX_IDS 256
#define ABSOLUTE_ERROR 1e-3
#define BACKENDS (MOE_TEST_CPU_BACKENDS + 1) /* the last one: cuda, in float32 */
/* Greedy tokens of each case, by backend: few for those without SIMD. */
static const int32_t greedy_tokens[BACKENDS] = {4, 1, MAX_IDS, MAX_IDS, MAX_IDS};

static moe_model *model;
static json_t *golden;

static int32_t read_ids(const json_t *array, int32_t *ids) {
    int32_t count = (int32_t)json_array_size(array);
    assert_in_range(count, 1, MAX_IDS);
    for (int32_t i = 0; i < count; i++) ids[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return count;
}

static const json_t *field(const json_t *golden_case, bool pre_gate, const char *name) {
    char key[64];
    snprintf(key, sizeof key, "%s%s", pre_gate ? "pre_gate_" : "", name);
    const json_t *value = json_object_get(golden_case, key);
    assert_non_null(value);
    return value;
}

static void check_top(const json_t *golden_case, bool pre_gate, const float *logits, const char *profile) {
    const json_t *want = field(golden_case, pre_gate, "top_logits");
    int32_t ids[MAX_IDS], count = read_ids(field(golden_case, pre_gate, "top_ids"), ids);
    assert_int_equal(count, 10);
    for (int32_t i = 0; i < count; i++) {
        double expected = json_number_value(json_array_get(want, (size_t)i));
        if (!(fabs(logits[ids[i]] - expected) < ABSOLUTE_ERROR))
            fail_msg("%s: logit of token %d is %.6f, not %.6f", profile, ids[i], logits[ids[i]], expected);
    }
}

static void check_case(moe_driver *driver, const json_t *golden_case, bool pre_gate, int32_t max_tokens, float *logits,
                       const char *profile) {
    int32_t ids[MAX_IDS], num_ids = read_ids(json_object_get(golden_case, "ids"), ids), vocab = model->config.vocab;
    int32_t want[MAX_IDS], count = read_ids(field(golden_case, pre_gate, "greedy"), want);
    moe_driver_truncate(driver, 0, 0);
    moe_driver_prefill(driver, ids, num_ids, MAX_IDS, logits);
    const float *last = logits + (int64_t)(num_ids - 1) * vocab;
    check_top(golden_case, pre_gate, last, profile);
    int32_t token = moe_driver_argmax(last, vocab);
    for (int32_t i = 0; i < count && i < max_tokens; i++) {
        if (token != want[i]) fail_msg("%s, greedy token %d is %d, not %d", profile, i, token, want[i]);
        moe_driver_prefill(driver, &token, 1, 1, logits);
        token = moe_driver_argmax(logits, vocab);
    }
}

static void run_backend(int index, bool pre_gate) {
    moe_backend *backend = index < MOE_TEST_CPU_BACKENDS ? moe_test_cpu_open(index, 2) : moe_test_cuda_open(MOE_F32, false);
    if (!backend) skip();
    moe_driver_options options = {.pre_gate = pre_gate, .num_sequences = 1, .max_tokens = 2 * MAX_IDS, .max_rows = MAX_IDS};
    moe_driver *driver = moe_driver_open(backend, model, &options);
    float *logits = calloc((size_t)MAX_IDS * (size_t)model->config.vocab, sizeof *logits);
    const json_t *cases = json_object_get(golden, "cases");
    assert_int_equal(json_array_size(cases), 8);
    for (size_t i = 0; i < 8; i++)
        check_case(driver, json_array_get(cases, i), pre_gate, greedy_tokens[index], logits, backend->ops->profile(backend));
    free(logits);
    moe_driver_close(driver);
    backend->ops->close(backend);
}

static void run(void **state) {
    int index = (int)(intptr_t)*state;
    run_backend(index / 2, index % 2);
}

static int open_demo(void **state) {
    moe_error err;
    (void)state;
    golden = json_load_file(SOURCE_DIR "/models/demo/golden.json", 0, NULL);
    return golden && moe_model_open(SOURCE_DIR "/models/demo", &model, &err) == MOE_OK ? 0 : -1;
}

static int close_demo(void **state) {
    (void)state;
    moe_model_close(&model);
    json_decref(golden);
    return 0;
}

int main(void) {
    static const char *const names[2 * BACKENDS] = {"cpu-ref, gate", "cpu-ref, pre-gate", "scalar, gate", "scalar, pre-gate",
                                                    "avx2, gate",    "avx2, pre-gate",    "avx512, gate", "avx512, pre-gate",
                                                    "cuda, gate",    "cuda, pre-gate"};
    struct CMUnitTest tests[2 * BACKENDS];
    for (intptr_t i = 0; i < 2 * BACKENDS; i++)
        tests[i] = (struct CMUnitTest){.name = names[i], .test_func = run, .initial_state = (void *)i};
    return cmocka_run_group_tests(tests, open_demo, close_demo);
}
