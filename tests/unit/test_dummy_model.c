/* Models of generated weights: what the elements are, that they follow from name and seed alone, digests, and that the CPU
 * backends agree on them. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/model/model.h"
#include "cpu/cpu.h"
#include "tests/support/reference_driver.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define FIXTURES SOURCE_DIR "/tests/data/checkpoints/"
#define TOKENS 24

static moe_model *open_dummy(const char *dir, uint64_t seed, int32_t num_layers) {
    moe_model *m = NULL;
    moe_error err = {0};
    if (moe_model_open_dummy(dir, &(moe_dummy_options){seed, num_layers}, &m, &err) != MOE_OK)
        fail_msg("%s: %s", dir, err.message);
    return m;
}

/* A folder with nothing but a config.json. */
static moe_test_dir config_alone(const char *text) {
    moe_test_dir dir = moe_test_dir_new();
    moe_test_write_file(&dir, "config.json", text, strlen(text));
    return dir;
}

#define TINY                                                                                                             \
    "\"model_type\": \"qwen2_moe\", \"hidden_size\": 32, \"num_attention_heads\": 2, \"num_hidden_layers\": 3, "         \
    "\"rms_norm_eps\": 1e-6, \"num_experts\": 4, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 24, "            \
    "\"shared_expert_intermediate_size\": 40, \"intermediate_size\": 48, \"vocab_size\": 50, \"mlp_only_layers\": [1], " \
    "\"max_position_embeddings\": 64"

/* ---- elements ---- */

/* The generator written once more, from its description, with Python's answers for the first elements of two streams:
 *   mix(x): SplitMix64's output function; u = (mix(seed + (i + 1)·0x9e3779b97f4a7c15) >> 40) - 2^23) / 2^23 */
static void elements_are_as_described(void **state) {
    static const struct {
        uint64_t seed;
        int64_t first;
        int32_t top24[4];
    } streams[] = {
        {1, 0, {9505325, 12512141, 16290722, 7455110}},
        {UINT64_C(0xfedcba9876543210), INT64_C(1) << 33, {5937794, 10513104, 587742, 9785327}},
    };
    (void)state;
    for (size_t s = 0; s < sizeof streams / sizeof *streams; s++) {
        moe_generator g = {.seed = streams[s].seed, .first = streams[s].first, .center = 0, .half_width = 1};
        for (int i = 0; i < 4; i++) assert_true(moe_generated_f32(&g, i) == (float)(streams[s].top24[i] - (1 << 23)) * 0x1p-23f);
        g.center = 1, g.half_width = 0;
        assert_true(moe_generated_f32(&g, 5) == 1.0f);
    }
}

static void half_precision_rounds_to_nearest_even(void **state) {
    (void)state;
    for (uint32_t bits = 0; bits < 1 << 16; bits++) {
        float value = moe_f16_to_f32((uint16_t)bits);
        if (isnan(value))
            assert_true((moe_f32_to_f16(value) & 0x7fff) > 0x7c00);
        else
            assert_int_equal(moe_f32_to_f16(value), bits);
        if ((bits & 0x7fff) >= 0x7bff || (bits & 0x7fff) == 0) continue; /* the last finite one, infinity, NaN; zero */
        float next = moe_f16_to_f32((uint16_t)(bits + 1)), middle = value / 2 + next / 2;
        assert_int_equal(moe_f32_to_f16(middle), bits + (bits & 1));
        assert_int_equal(moe_f32_to_f16(nextafterf(middle, value)), bits);
        assert_int_equal(moe_f32_to_f16(nextafterf(middle, next)), bits + 1);
    }
    assert_int_equal(moe_f32_to_f16(65519.996f), 0x7bff);
    assert_int_equal(moe_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(moe_f32_to_f16(-1e30f), 0xfc00);
    assert_int_equal(moe_f32_to_f16(1e-30f), 0);
}

static void reads_agree(void **state) {
    (void)state;
    for (moe_dtype dtype = 0; dtype < MOE_DTYPE_COUNT; dtype++) {
        moe_tensor t = {.dtype = dtype, .rows = 7, .cols = 33, .generated = {.seed = 77, .half_width = 0.05f}};
        uint8_t stored[7 * 33 * 4 + 1];
        float wide[7 * 33], again[7 * 33];
        moe_tensor_read(&t, 0, 7 * 33, stored + 1);
        moe_tensor mapped = {.data = stored + 1, .dtype = dtype, .rows = 7, .cols = 33};
        moe_tensor_read_f32(&t, 0, 7 * 33, wide);
        for (int i = 0; i < 7 * 33; i++) { /* one by one, as the formula says */
            float value = moe_generated_f32(&t.generated, i);
            if (dtype == MOE_BF16) value = moe_bf16_to_f32(moe_f32_to_bf16(value));
            if (dtype == MOE_F16) value = moe_f16_to_f32(moe_f32_to_f16(value));
            assert_memory_equal(&wide[i], &value, sizeof value);
        }
        moe_tensor_read_f32(&mapped, 0, 7 * 33, again);
        assert_memory_equal(wide, again, sizeof wide);
        moe_tensor rows = moe_tensor_rows(&t, 2, 5), mapped_rows = moe_tensor_rows(&mapped, 2, 5);
        assert_int_equal(rows.rows, 3);
        moe_tensor_read_f32(&rows, 4, 90, again);
        assert_memory_equal(again, wide + 2 * 33 + 4, 90 * sizeof(float));
        moe_tensor_read_f32(&mapped_rows, 4, 90, again);
        assert_memory_equal(again, wide + 2 * 33 + 4, 90 * sizeof(float));
    }
}

/* ---- models ---- */

static void expect_spread(const moe_tensor *t, double mean, double deviation) {
    int64_t count = t->rows * t->cols;
    float *values = malloc((size_t)count * sizeof *values);
    double sum = 0, squares = 0;
    assert_non_null(values);
    moe_tensor_read_f32(t, 0, count, values);
    for (int64_t i = 0; i < count; i++) sum += values[i];
    for (int64_t i = 0; i < count; i++) squares += (values[i] - sum / (double)count) * (values[i] - sum / (double)count);
    double tolerance = deviation * 5 / sqrt((double)count);
    assert_true(fabs(sum / (double)count - mean) <= tolerance);
    assert_true(fabs(sqrt(squares / (double)count) - deviation) <= tolerance);
    free(values);
}

static void fills_a_config(void **state) {
    moe_test_dir dir = config_alone("{" TINY "}");
    moe_model *m = open_dummy(dir.path, 0, 0);
    (void)state;
    assert_null(m->checkpoint);
    assert_int_equal(m->config.num_layers, 3);
    assert_int_equal(m->config.num_moe_layers, 2);
    assert_int_equal(m->embed.dtype, MOE_BF16);
    expect_spread(&m->embed, 0, 0.02);
    expect_spread(&m->lm_head, 0, 0.02);
    expect_spread(&m->layers[2].q, 0, 0.02);
    expect_spread(&m->layers[2].q_bias, 0, 0);
    expect_spread(&m->layers[1].dense.down, 0, 0.02);
    expect_spread(&m->layers[0].shared.up, 0, 0.02);
    expect_spread(&m->final_norm, 1, 0);
    for (int e = 0; e < 4; e++) expect_spread(&moe_model_expert(m, 1, e)->gate, 0, 0.02);
    int64_t hidden = 32, attention = 4 * hidden * hidden + 3 * hidden, shared = 3 * 40 * hidden + hidden, gate = 4 * hidden;
    assert_int_equal(moe_model_base_bytes(m),
                     2 * (2 * 50 * hidden + hidden + 3 * (attention + 2 * hidden) + 2 * (shared + gate) + 3 * 48 * hidden));
    moe_model_layer_will_need(m, &m->layers[0]); /* nothing to read */
    moe_model_layer_release(m, &m->layers[0]);
    moe_model_close(&m);
    moe_test_dir_free(&dir);

    dir = config_alone("{" TINY ", \"dtype\": \"float16\", \"initializer_range\": 0.5, \"tie_word_embeddings\": true}");
    m = open_dummy(dir.path, 0, 0);
    assert_int_equal(m->embed.dtype, MOE_F16);
    assert_int_equal(m->lm_head.generated.seed, m->embed.generated.seed);
    expect_spread(&m->layers[0].k, 0, 0.5);
    moe_model_close(&m);
    moe_test_dir_free(&dir);
}

/* The sizes of Switch-Base-128's experts: two matrices, and nothing generated in place of a third. */
static void fills_experts_without_gates(void **state) {
    moe_model *m = open_dummy(SOURCE_DIR "/models/shapes/switch-base-128", 1, 2);
    (void)state;
    assert_true(m->config.num_moe_layers == 1 && m->config.num_experts == 128);
    for (int32_t i = 0; i < 2; i++) {
        const moe_ffn_weights *w = i ? &m->layers[0].dense : moe_model_expert(m, 0, 127);
        assert_true(moe_ffn_generated(w) && !moe_ffn_gated(w));
        assert_true(w->up.rows == 3072 && w->up.cols == 768 && w->down.rows == 768 && w->down.cols == 3072);
    }
    expect_spread(&moe_model_expert(m, 0, 5)->up, 0, 0.02);
    moe_model_close(&m);
}

static uint64_t expert_digest(const moe_model *m, int32_t layer, int32_t expert) {
    uint64_t digest = 0;
    assert_int_equal(moe_expert_digest(moe_model_expert(m, layer, expert), &digest, NULL), MOE_OK);
    return digest;
}

static void follows_from_name_and_seed(void **state) {
    moe_model *a = open_dummy(FIXTURES "qwen3_moe", 5, 0), *b = open_dummy(FIXTURES "qwen3_moe", 5, 0),
              *other = open_dummy(FIXTURES "qwen3_moe", 6, 0), *cut = open_dummy(FIXTURES "qwen3_moe", 5, 2), *stored;
    const moe_tensor *same[] = {&a->embed, &b->embed},
                     *different[] = {&other->embed, &a->lm_head, &a->layers[0].q, &a->layers[1].q};
    float wide[64], again[64];
    (void)state;
    assert_int_equal(moe_model_open(FIXTURES "qwen3_moe", &stored, NULL), MOE_OK);
    moe_tensor_read_f32(same[0], 0, 64, wide);
    moe_tensor_read_f32(same[1], 0, 64, again);
    assert_memory_equal(wide, again, sizeof wide);
    for (size_t i = 0; i < sizeof different / sizeof *different; i++) {
        moe_tensor_read_f32(different[i], 0, 64, again);
        assert_memory_not_equal(wide, again, sizeof wide);
    }
    assert_true(a->digest == b->digest && a->digest != other->digest && a->digest != cut->digest && a->digest != stored->digest);
    assert_true(expert_digest(a, 1, 3) == expert_digest(b, 1, 3) && expert_digest(a, 1, 3) == expert_digest(cut, 1, 3));
    assert_true(expert_digest(a, 1, 3) != expert_digest(other, 1, 3) && expert_digest(a, 1, 3) != expert_digest(a, 1, 2));
    assert_true(expert_digest(a, 1, 3) != expert_digest(a, 0, 3) && expert_digest(a, 1, 3) != expert_digest(stored, 1, 3));
    assert_int_equal(cut->config.num_layers, 2);
    assert_int_equal(cut->config.num_moe_layers, 2);
    moe_model *const all[] = {a, b, other, cut, stored};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) moe_model_close(&(moe_model *){all[i]});
}

static void expect_refused(const char *config, int32_t num_layers, moe_status code, const char *what) {
    moe_test_dir dir = config_alone(config);
    moe_model *m = NULL;
    moe_error err = {0};
    moe_status status = moe_model_open_dummy(dir.path, &(moe_dummy_options){0, num_layers}, &m, &err);
    if (status != code || !strstr(err.message, what) || m)
        fail_msg("%d, \"%s\"; expected %d, \"%s\"", status, err.message, code, what);
    moe_test_dir_free(&dir);
}

static void refusals(void **state) {
    (void)state;
    expect_refused("{" TINY ", \"torch_dtype\": \"int8\"}", 0, MOE_UNIMPLEMENTED, "int8");
    expect_refused("{" TINY ", \"initializer_range\": -1}", 0, MOE_INVALID_ARGUMENT, "initializer_range");
    expect_refused("{" TINY "}", 4, MOE_OUT_OF_RANGE, "it has 3");
    expect_refused("{" TINY "}", -1, MOE_OUT_OF_RANGE, "-1");
    expect_refused("{\"model_type\": \"llama\"}", 0, MOE_INVALID_ARGUMENT, "num_hidden_layers");
}

/* ---- backends ---- */

static float *logits_of(moe_backend *backend, const moe_model *model) {
    moe_driver_options options = {.num_sequences = 1, .max_tokens = TOKENS, .max_rows = 8, .combine = MOE_COMBINE_EXACT};
    moe_driver *driver = moe_driver_open(backend, model, &options);
    float *logits = malloc((size_t)TOKENS * (size_t)model->config.vocab * sizeof *logits);
    int32_t ids[TOKENS];
    assert_non_null(logits);
    for (int32_t i = 0; i < TOKENS; i++) ids[i] = i * 13 % model->config.vocab;
    moe_driver_prefill(driver, ids, TOKENS, 8, logits);
    moe_driver_close(driver);
    return logits;
}

static void cpu_backends_agree(void **state) {
    static const char *const fixtures[] = {FIXTURES "qwen3_moe", FIXTURES "qwen2_moe", FIXTURES "mixtral", FIXTURES "llama_dense",
                                           FIXTURES "switch_decoder"};
    (void)state;
    for (size_t f = 0; f < sizeof fixtures / sizeof *fixtures; f++) {
        moe_model *model = open_dummy(fixtures[f], 9, 0);
        moe_backend *reference, *cpu;
        assert_int_equal(moe_cpu_ref_open(&(moe_cpu_config){.threads = 1}, &reference, NULL), MOE_OK);
        assert_int_equal(moe_cpu_open(&(moe_cpu_config){.threads = 1}, &cpu, NULL), MOE_OK);
        float *want = logits_of(reference, model), *got = logits_of(cpu, model);
        double most = 0, error = 0;
        for (int64_t i = 0; i < (int64_t)TOKENS * model->config.vocab; i++) {
            assert_true(isfinite(want[i]) && isfinite(got[i]));
            most = fmax(most, fabs(want[i]));
            error = fmax(error, fabs((double)want[i] - got[i]));
        }
        if (most < 1e-3 || error > 1e-4 * most) fail_msg("%s: logits up to %g, apart by %g", fixtures[f], most, error);
        free(want);
        free(got);
        reference->ops->close(reference);
        cpu->ops->close(cpu);
        moe_model_close(&model);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(elements_are_as_described),
        cmocka_unit_test(half_precision_rounds_to_nearest_even),
        cmocka_unit_test(reads_agree),
        cmocka_unit_test(fills_a_config),
        cmocka_unit_test(fills_experts_without_gates),
        cmocka_unit_test(follows_from_name_and_seed),
        cmocka_unit_test(refusals),
        cmocka_unit_test(cpu_backends_agree),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
