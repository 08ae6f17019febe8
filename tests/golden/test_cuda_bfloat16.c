/* The bfloat16 profile of CUDA, judged as the design says: teacher-forced logits beside transformers' (fixtures) and beside the
 * float32 profile of the CPU (demo model), by the relative error of a text's logits. Skipped where there is no GPU. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpu/cpu.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/reference_driver.h"
#include "tests/support/test.h"

#define MAX_IDS 256
#define RELATIVE_ERROR 3e-2

static int32_t read_ids(const json_t *array, int32_t *ids) {
    int32_t count = (int32_t)json_array_size(array);
    assert_in_range(count, 1, MAX_IDS);
    for (int32_t i = 0; i < count; i++) ids[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return count;
}

/* Logits [num_ids, V] of a text, all in one step; closes the backend. The caller frees them. */
static float *run_text(moe_backend *backend, const moe_model *model, moe_combine_mode combine, const int32_t *ids,
                       int32_t num_ids) {
    moe_driver_options options = {.combine = combine, .num_sequences = 1, .max_tokens = MAX_IDS, .max_rows = MAX_IDS};
    moe_driver *driver = moe_driver_open(backend, model, &options);
    float *logits = calloc((size_t)num_ids * (size_t)model->config.vocab, sizeof *logits);
    assert_non_null(logits);
    moe_driver_prefill(driver, ids, num_ids, MAX_IDS, logits);
    moe_driver_close(driver);
    backend->ops->close(backend);
    return logits;
}

/* Over all rows given, as the design's bound is meant: where two experts are as good as tied for a row, rounding can choose the
 * other one, and that row alone may be further off. */
typedef struct distance {
    double error, norm, worst; /* sums of squares; the relative error of the worst row */
} distance;

static void add_row(distance *d, const float *got, const double *want, int32_t count) {
    double error = 0, norm = 0;
    for (int32_t i = 0; i < count; i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        norm += want[i] * want[i];
    }
    d->error += error;
    d->norm += norm;
    if (!(sqrt(error / norm) <= d->worst)) d->worst = sqrt(error / norm);
}

static void check(const distance *d, const char *what) {
    double whole = sqrt(d->error / d->norm);
    printf("figure: %s: relative error of the logits %.4f, of the worst row %.4f\n", what, whole, d->worst);
    if (!(whole < RELATIVE_ERROR)) fail_msg("%s: %.3g", what, whole);
}

static void fixture(void **state) {
    char path[512];
    double want[4096];
    distance far[2] = {{.error = 0}, {.error = 0}};
    moe_model *model;
    moe_error err;
    moe_backend *backend = moe_test_cuda_open(MOE_BF16, false);
    if (!backend) skip();
    snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s", SOURCE_DIR, (const char *)*state);
    if (moe_model_open(path, &model, &err) != MOE_OK) fail_msg("%s", err.message);
    snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s/expected.json", SOURCE_DIR, (const char *)*state);
    json_t *expected = json_load_file(path, 0, NULL), *row;
    assert_non_null(expected);
    int32_t ids[MAX_IDS], num_ids = read_ids(json_object_get(expected, "ids"), ids), vocab = model->config.vocab;
    assert_in_range(vocab, 1, 4096);
    for (int mode = 0; mode < 2; mode++) {
        if (mode) backend = moe_test_cuda_open(MOE_BF16, true);
        float *logits = run_text(backend, model, mode ? MOE_COMBINE_PARTIAL : MOE_COMBINE_EXACT, ids, num_ids);
        const char *position;
        json_object_foreach(json_object_get(expected, "logits_every_8th_position"), position, row) {
            for (int32_t i = 0; i < vocab; i++) want[i] = json_number_value(json_array_get(row, (size_t)i));
            add_row(&far[mode], logits + (int64_t)atoi(position) * vocab, want, vocab);
        }
        free(logits);
    }
    check(&far[0], "exact");
    check(&far[1], "partial, deterministic");
    json_decref(expected);
    moe_model_close(&model);
}

/* Prompt and greedy continuation of each golden, given as one text. */
static void demo(void **state) {
    moe_model *model;
    moe_backend *backend = moe_test_cuda_open(MOE_BF16, false), *cpu;
    double *want;
    (void)state;
    if (!backend) skip();
    json_t *golden = json_load_file(SOURCE_DIR "/models/demo/golden.json", 0, NULL);
    assert_non_null(golden);
    assert_int_equal(moe_model_open(SOURCE_DIR "/models/demo", &model, NULL), MOE_OK);
    int32_t vocab = model->config.vocab;
    want = calloc((size_t)vocab, sizeof *want);
    const json_t *cases = json_object_get(golden, "cases");
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *one = json_array_get(cases, i);
        int32_t ids[MAX_IDS], num_ids = read_ids(json_object_get(one, "ids"), ids);
        num_ids += read_ids(json_object_get(one, "greedy"), ids + num_ids);
        if (!backend) backend = moe_test_cuda_open(MOE_BF16, false);
        assert_int_equal(moe_cpu_open(&(moe_cpu_config){.threads = 4}, &cpu, NULL), MOE_OK);
        distance far = {.error = 0};
        float *narrow = run_text(backend, model, MOE_COMBINE_EXACT, ids, num_ids);
        float *wide = run_text(cpu, model, MOE_COMBINE_EXACT, ids, num_ids);
        backend = NULL;
        for (int32_t r = 0; r < num_ids; r++) {
            for (int32_t t = 0; t < vocab; t++) want[t] = wide[(int64_t)r * vocab + t];
            add_row(&far, narrow + (int64_t)r * vocab, want, vocab);
        }
        check(&far, "a text of the demo model");
        free(narrow);
        free(wide);
    }
    free(want);
    moe_model_close(&model);
    json_decref(golden);
}

int main(void) {
    static const char *const families[] = {"llama_dense", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"};
    struct CMUnitTest tests[1 + sizeof families / sizeof *families] = {cmocka_unit_test(demo)};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        tests[1 + i] =
            (struct CMUnitTest){.name = families[i], .test_func = fixture, .initial_state = (void *)(uintptr_t)families[i]};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
