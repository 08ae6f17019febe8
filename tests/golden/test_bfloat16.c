/* The bfloat16 profile of the CPU backends, judged as the design says: teacher-forced logits beside those of the references and
 * of the float32 profile. Within the profile, bits do not depend on chunks or instruction paths. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/support/cpu_backends.h"
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

/* |got - want| / |want| */
static double relative_error(const float *got, const float *want, int64_t count) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        error += (got[i] - want[i]) * (double)(got[i] - want[i]);
        norm += want[i] * (double)want[i];
    }
    return sqrt(error / norm);
}

/* Logits [num_ids, V] of a text, `chunk` tokens a step. The caller frees them. */
static float *run_text(int index, moe_dtype dtype, moe_combine_mode combine, const moe_model *model, const int32_t *ids,
                       int32_t num_ids, int32_t chunk) {
    moe_backend *backend = moe_test_cpu_open_dtype(index, 2, dtype);
    if (!backend) return NULL;
    moe_driver_options options = {.combine = combine, .num_sequences = 1, .max_tokens = MAX_IDS, .max_rows = MAX_IDS};
    moe_driver *driver = moe_driver_open(backend, model, &options);
    float *logits = calloc((size_t)num_ids * (size_t)model->config.vocab, sizeof *logits);
    assert_non_null(logits);
    moe_driver_prefill(driver, ids, num_ids, chunk, logits);
    moe_driver_close(driver);
    backend->ops->close(backend);
    return logits;
}

/* Over all positions of the text, as the design's bound is meant: where two experts are as good as tied for a row, rounding can
 * choose the other one, and that row alone may be further off. */
static void check_text(const moe_model *model, const float *got, const float *want, int32_t rows, const char *what) {
    int32_t vocab = model->config.vocab;
    double whole = relative_error(got, want, (int64_t)rows * vocab), worst = 0;
    for (int32_t r = 0; r < rows; r++) {
        double error = relative_error(got + (int64_t)r * vocab, want + (int64_t)r * vocab, vocab);
        if (!(error <= worst)) worst = error;
    }
    printf("figure: %s: relative error of the logits %.4f, of the worst row %.4f\n", what, whole, worst);
    if (!(whole < RELATIVE_ERROR)) fail_msg("%s: %.3g", what, whole);
}

/* Prompt and greedy continuation of each golden, given as one text. */
static void demo(void **state) {
    moe_model *model;
    moe_error err;
    (void)state;
    json_t *golden = json_load_file(SOURCE_DIR "/models/demo/golden.json", 0, NULL);
    assert_non_null(golden);
    assert_int_equal(moe_model_open(SOURCE_DIR "/models/demo", &model, &err), MOE_OK);
    const json_t *cases = json_object_get(golden, "cases");
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *one = json_array_get(cases, i);
        int32_t ids[MAX_IDS], top[MAX_IDS], num_prompt = read_ids(json_object_get(one, "ids"), ids);
        int32_t num_ids = num_prompt + read_ids(json_object_get(one, "greedy"), ids + num_prompt), vocab = model->config.vocab;
        float *narrow = run_text(2, MOE_BF16, MOE_COMBINE_EXACT, model, ids, num_ids, MAX_IDS);
        float *wide = run_text(2, MOE_F32, MOE_COMBINE_EXACT, model, ids, num_ids, MAX_IDS);
        if (!narrow || !wide) skip();
        check_text(model, narrow, wide, num_ids, json_string_value(json_object_get(one, "prompt")));
        assert_int_equal(read_ids(json_object_get(one, "top_ids"), top), 10);
        float want[10], got[10];
        for (size_t t = 0; t < 10; t++) {
            want[t] = (float)json_number_value(json_array_get(json_object_get(one, "top_logits"), t));
            got[t] = narrow[(int64_t)(num_prompt - 1) * vocab + top[t]];
        }
        printf("figure: the ten golden logits: %.4f\n", relative_error(got, want, 10));
        assert_true(relative_error(got, want, 10) < RELATIVE_ERROR);
        free(narrow);
        free(wide);
    }
    moe_model_close(&model);
    json_decref(golden);
}

static void fixture(void **state) {
    const char *family = *state;
    char path[512];
    moe_model *model;
    moe_error err;
    snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s", SOURCE_DIR, family);
    if (moe_model_open(path, &model, &err) != MOE_OK) fail_msg("%s: %s", family, err.message);
    snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s/expected.json", SOURCE_DIR, family);
    json_t *expected = json_load_file(path, 0, NULL);
    assert_non_null(expected);
    int32_t ids[MAX_IDS], num_ids = read_ids(json_object_get(expected, "ids"), ids);
    size_t bytes = (size_t)num_ids * (size_t)model->config.vocab * sizeof(float);
    float *wide = run_text(0, MOE_F32, MOE_COMBINE_EXACT, model, ids, num_ids, MAX_IDS);
    float *simd = NULL; /* of the first instruction path of `cpu` */
    for (int index = 0; index < MOE_TEST_CPU_BACKENDS; index++) {
        char what[128];
        float *exact = run_text(index, MOE_BF16, MOE_COMBINE_EXACT, model, ids, num_ids, MAX_IDS);
        float *chunked = run_text(index, MOE_BF16, MOE_COMBINE_EXACT, model, ids, num_ids, 7);
        float *partial = run_text(index, MOE_BF16, MOE_COMBINE_PARTIAL, model, ids, num_ids, MAX_IDS);
        if (!exact) continue;
        snprintf(what, sizeof what, "%s, backend %d, exact", family, index);
        check_text(model, exact, wide, num_ids, what);
        snprintf(what, sizeof what, "%s, backend %d, partial", family, index);
        check_text(model, partial, wide, num_ids, what);
        assert_memory_equal(exact, chunked, bytes);
        assert_true(memcmp(exact, wide, bytes) != 0); /* it does round */
        if (simd) assert_memory_equal(exact, simd, bytes);
        free(chunked);
        free(partial);
        if (index > 0 && !simd)
            simd = exact;
        else
            free(exact);
    }
    free(simd);
    free(wide);
    json_decref(expected);
    moe_model_close(&model);
}

static void half_the_memory(void **state) {
    const moe_model_config config = {.num_layers = 3, .num_kv_heads = 2, .head_dim = 24};
    (void)state;
    moe_backend *narrow = moe_test_cpu_open_dtype(0, 0, MOE_BF16), *wide = moe_test_cpu_open(0, 0), *none;
    assert_int_equal(2 * narrow->ops->kv_block_bytes(narrow, &config), wide->ops->kv_block_bytes(wide, &config));
    assert_string_equal(narrow->ops->profile(narrow), "cpu-ref/ref/bfloat16");
    assert_int_equal(moe_cpu_open(&(moe_cpu_config){.dtype = MOE_F16}, &none, NULL), MOE_INVALID_ARGUMENT);
    narrow->ops->close(narrow);
    wide->ops->close(wide);
}

int main(void) {
    static const char *const families[] = {"llama_dense", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"};
    struct CMUnitTest tests[2 + sizeof families / sizeof *families] = {cmocka_unit_test(half_the_memory), cmocka_unit_test(demo)};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        tests[2 + i] =
            (struct CMUnitTest){.name = families[i], .test_func = fixture, .initial_state = (void *)(uintptr_t)families[i]};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
