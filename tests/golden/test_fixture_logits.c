/* Every family's tiny checkpoint against transformers (switch_decoder: against numpy, tests/tools/make_switch_checkpoint.py):
 * logits at six positions, 24 greedy tokens. */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>

#include "tests/support/cpu_backends.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/reference_driver.h"
#include "tests/support/test.h"

#define MAX_IDS 128
#define RELATIVE_ERROR 1e-3

typedef struct fixture {
    moe_model *model;
    json_t *expected;
    int32_t ids[MAX_IDS], num_ids;
} fixture;

static int32_t read_ids(const json_t *array, int32_t *ids) {
    int32_t count = (int32_t)json_array_size(array);
    assert_in_range(count, 1, MAX_IDS);
    for (int32_t i = 0; i < count; i++) ids[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return count;
}

static fixture open_fixture(const char *family) {
    char path[512];
    fixture f = {0};
    moe_error err;
    snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s", SOURCE_DIR, family);
    if (moe_model_open(path, &f.model, &err) != MOE_OK) fail_msg("%s: %s", family, err.message);
    snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s/expected.json", SOURCE_DIR, family);
    f.expected = json_load_file(path, 0, NULL);
    assert_non_null(f.expected);
    f.num_ids = read_ids(json_object_get(f.expected, "ids"), f.ids);
    return f;
}

static void close_fixture(fixture *f) {
    json_decref(f->expected);
    moe_model_close(&f->model);
}

static void check_logits(const fixture *f, const float *logits, const char *profile) {
    const json_t *positions = json_object_get(f->expected, "logits_every_8th_position");
    int32_t vocab = f->model->config.vocab, checked = 0;
    const char *position;
    json_t *row;
    json_object_foreach((json_t *)(uintptr_t)positions, position, row) {
        const float *got = logits + (int64_t)atoi(position) * vocab;
        double error = 0, norm = 0;
        assert_int_equal(json_array_size(row), vocab);
        for (int32_t i = 0; i < vocab; i++) {
            double want = json_number_value(json_array_get(row, (size_t)i));
            error += (got[i] - want) * (got[i] - want);
            norm += want * want;
        }
        if (!(sqrt(error / norm) < RELATIVE_ERROR))
            fail_msg("%s, position %s: relative error %.3g", profile, position, sqrt(error / norm));
        checked++;
    }
    assert_int_equal(checked, 6);
}

static void check_greedy(const fixture *f, moe_driver *driver, float *logits, const char *profile) {
    int32_t want[MAX_IDS], count = read_ids(json_object_get(f->expected, "greedy"), want), vocab = f->model->config.vocab;
    int32_t token = moe_driver_argmax(logits + (int64_t)(f->num_ids - 1) * vocab, vocab);
    for (int32_t i = 0; i < count; i++) {
        if (token != want[i]) fail_msg("%s, greedy token %d is %d, not %d", profile, i, token, want[i]);
        moe_driver_prefill(driver, &token, 1, 1, logits);
        token = moe_driver_argmax(logits, vocab);
    }
}

static void check_backend(const fixture *f, moe_backend *backend, moe_combine_mode combine) {
    float *logits = calloc((size_t)MAX_IDS * (size_t)f->model->config.vocab, sizeof *logits);
    moe_driver_options options = {.combine = combine, .num_sequences = 1, .max_tokens = 2 * MAX_IDS, .max_rows = MAX_IDS};
    moe_driver *driver = moe_driver_open(backend, f->model, &options);
    moe_driver_prefill(driver, f->ids, f->num_ids, MAX_IDS, logits);
    check_logits(f, logits, backend->ops->profile(backend));
    check_greedy(f, driver, logits, backend->ops->profile(backend));
    moe_driver_close(driver);
    backend->ops->close(backend);
    free(logits);
}

static void run_fixture(void **state) {
    fixture f = open_fixture(*state);
    for (int b = 0; b < 2 * MOE_TEST_CPU_BACKENDS; b++) {
        moe_backend *backend = moe_test_cpu_open(b / 2, b % 2 * 2);
        if (backend) check_backend(&f, backend, b % 2 ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT);
    }
    close_fixture(&f);
}

static void run_fixture_on_cuda(void **state) {
    for (int b = 0; b < 4; b++) {
        moe_backend *backend = moe_test_cuda_open(MOE_F32, b / 2);
        if (!backend) skip();
        fixture f = open_fixture(*state);
        check_backend(&f, backend, b % 2 ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT);
        close_fixture(&f);
    }
}

int main(void) {
    static const char *const families[] = {"llama_dense", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "switch_decoder"};
    enum { FAMILIES = sizeof families / sizeof *families };
    struct CMUnitTest tests[2 * FAMILIES];
    char names[FAMILIES][32];
    for (size_t i = 0; i < FAMILIES; i++) {
        snprintf(names[i], sizeof names[i], "cuda, %s", families[i]);
        tests[i] =
            (struct CMUnitTest){.name = families[i], .test_func = run_fixture, .initial_state = (void *)(uintptr_t)families[i]};
        tests[FAMILIES + i] = tests[i];
        tests[FAMILIES + i].name = names[i];
        tests[FAMILIES + i].test_func = run_fixture_on_cuda;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
