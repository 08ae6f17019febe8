/* Training of pre-gates: the gradient beside finite differences, AdamW beside its definition in double, sampling, a whole fit. */
#include <math.h>
#include <string.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/random.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"
#include "training/adamw.h"
#include "training/pre_gate.h"
#include "training/softmax_kl.h"

#define HIDDEN 12
#define EXPERTS 19
#define PADDED 32
#define ROWS 7

static float normal(moe_random *random) {
    double radius = sqrt(-2 * log(1 - moe_random_unit(random)));
    return (float)(radius * cos(2 * M_PI * moe_random_unit(random)));
}

static float *random_floats(moe_random *random, size_t count, float scale) {
    float *out = moe_alloc_aligned(count, sizeof *out);
    for (size_t i = 0; i < count; i++) out[i] = scale * normal(random);
    return out;
}

/* Mean KL in double, straight from the definition. */
static double mean_kl(const float *x, const float *w, const float *target) {
    double sum = 0;
    for (int r = 0; r < ROWS; r++) {
        double p[EXPERTS], q[EXPERTS], p_sum = 0, q_sum = 0;
        for (int e = 0; e < EXPERTS; e++) {
            double logit = 0;
            for (int h = 0; h < HIDDEN; h++) logit += (double)x[r * HIDDEN + h] * w[h * PADDED + e];
            p_sum += p[e] = exp((double)target[r * PADDED + e]);
            q_sum += q[e] = exp(logit);
        }
        for (int e = 0; e < EXPERTS; e++) sum += p[e] / p_sum * log(p[e] / p_sum / (q[e] / q_sum));
    }
    return sum / ROWS;
}

static void test_gradient_beside_finite_differences(void **state) {
    (void)state;
    moe_random random = {1};
    float *x = random_floats(&random, ROWS * HIDDEN, 1), *w = random_floats(&random, HIDDEN * PADDED, 0.5f);
    float *target = random_floats(&random, ROWS * PADDED, 2), *y = moe_alloc_aligned(ROWS * PADDED, sizeof *y);
    float *g = moe_alloc_aligned(HIDDEN * PADDED, sizeof *g);
    moe_training_linear(x, w, ROWS, HIDDEN, PADDED, y);
    double kl = moe_training_softmax_kl(target, y, ROWS, EXPERTS, PADDED) / ROWS;
    assert_true(fabs(kl - mean_kl(x, w, target)) < 1e-5 * kl);
    moe_training_linear_gradient(x, y, ROWS, HIDDEN, PADDED, g);
    for (int h = 0; h < HIDDEN; h++)
        for (int e = 0; e < PADDED; e++) {
            float *at = &w[h * PADDED + e], kept = *at;
            *at = kept + 0x1p-8f;
            double above = mean_kl(x, w, target);
            *at = kept - 0x1p-8f;
            double below = mean_kl(x, w, target), slope = (above - below) * 0x1p7;
            *at = kept;
            assert_true(fabs(g[h * PADDED + e] - slope) < 1e-5); /* gradients here are about 0.1; the padding's are 0 */
        }
    float *const owned[] = {x, w, target, y, g};
    for (int i = 0; i < 5; i++) moe_free(owned[i]);
}

/* Whatever tiles there are: each sum in the order of its terms, to the bit. */
static void test_products_bit_by_bit(void **state) {
    enum { MAX_ROWS = 19, DEPTH = 37, MAX_PADDED = 80 };
    (void)state;
    moe_random random = {7};
    float *x = random_floats(&random, MAX_ROWS * DEPTH, 1), *w = random_floats(&random, DEPTH * MAX_PADDED, 1);
    float *d = random_floats(&random, MAX_ROWS * MAX_PADDED, 1), *y = moe_alloc_aligned(DEPTH * MAX_PADDED, sizeof *y);
    for (int32_t rows = 1; rows <= MAX_ROWS; rows++)
        for (int32_t padded = MOE_TRAINING_LANES; padded <= MAX_PADDED; padded += MOE_TRAINING_LANES) {
            moe_training_linear(x, w, rows, DEPTH, padded, y);
            for (int32_t i = 0; i < rows * padded; i++) {
                float sum = 0;
                for (int32_t k = 0; k < DEPTH; k++) sum += x[i / padded * DEPTH + k] * w[k * padded + i % padded];
                assert_memory_equal(&y[i], &sum, sizeof sum);
            }
            moe_training_linear_gradient(x, d, rows, DEPTH, padded, y);
            for (int32_t i = 0; i < DEPTH * padded; i++) {
                float sum = 0;
                for (int32_t k = 0; k < rows; k++) sum += x[k * DEPTH + i / padded] * d[k * padded + i % padded];
                assert_memory_equal(&y[i], &sum, sizeof sum);
            }
        }
    float *const owned[] = {x, w, d, y};
    for (int i = 0; i < 4; i++) moe_free(owned[i]);
}

static void test_adamw_beside_its_definition(void **state) {
    (void)state;
    enum { COUNT = 5, STEPS = 50 };
    moe_random random = {2};
    float w[COUNT], m[COUNT] = {0}, v[COUNT] = {0};
    double want[COUNT], dm[COUNT] = {0}, dv[COUNT] = {0};
    moe_adamw adamw = {.beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f, .weight_decay = 0.1f, .m = m, .v = v};
    for (int i = 0; i < COUNT; i++) want[i] = w[i] = normal(&random);
    for (int step = 1; step <= STEPS; step++) {
        float g[COUNT];
        double lr = 0.01 * step;
        for (int i = 0; i < COUNT; i++) {
            g[i] = normal(&random);
            dm[i] = 0.9 * dm[i] + 0.1 * g[i];
            dv[i] = 0.999 * dv[i] + 0.001 * g[i] * g[i];
            double update = dm[i] / (1 - pow(0.9, step)) / (sqrt(dv[i] / (1 - pow(0.999, step))) + 1e-8);
            want[i] = want[i] - lr * 0.1 * want[i] - lr * update;
        }
        moe_adamw_step(&adamw, w, g, COUNT, (float)lr);
    }
    assert_int_equal(adamw.steps, STEPS);
    for (int i = 0; i < COUNT; i++) assert_true(fabs(w[i] - want[i]) < 1e-4);
}

static moe_samples *new_samples(const moe_test_dir *dir, int32_t layers, int64_t tokens) {
    moe_samples_config config = {
        .dir = dir->path, .num_layers = layers, .hidden = HIDDEN, .max_bytes = tokens * layers * HIDDEN * 2, .seed = 3};
    moe_samples *samples;
    moe_error err;
    if (moe_samples_new(&config, &samples, &err) != MOE_OK) fail_msg("%s", err.message);
    return samples;
}

/* Of more tokens than there is room for, every kept one is whole, and all have the same chance. */
static void test_reservoir(void **state) {
    (void)state;
    enum { TOKENS = 4000, ROOM = 500, STEP = 40 };
    moe_test_dir dir;
    dir = moe_test_dir_new();
    moe_samples *samples = new_samples(&dir, 2, ROOM);
    moe_error err;
    uint16_t x[STEP * HIDDEN];
    for (int first = 0; first < TOKENS; first += STEP) {
        assert_int_equal(moe_samples_begin(samples, STEP, &err), MOE_OK);
        for (int32_t layer = 0; layer < 2; layer++) {
            for (int i = 0; i < STEP * HIDDEN; i++) {
                float value = (float)((first + i / HIDDEN) / (layer ? 64 : 1) % 64);
                x[i] = moe_f32_to_bf16(value);
            }
            moe_samples_put(samples, layer, x, MOE_BF16);
        }
    }
    assert_int_equal(moe_samples_count(samples), ROOM);
    assert_int_equal(moe_samples_seen(samples), TOKENS);
    double mean = 0;
    for (int64_t i = 0; i < ROOM; i++) {
        float low[HIDDEN], high[HIDDEN];
        moe_samples_read(samples, i, 0, low);
        moe_samples_read(samples, i, 1, high);
        for (int h = 1; h < HIDDEN; h++) assert_true(low[h] == low[0] && high[h] == high[0]);
        mean += (64 * high[0] + low[0]) / ROOM;
    }
    assert_true(fabs(mean / (TOKENS / 2) - 1) < 0.08); /* three deviations of the mean of 500 of them */
    moe_samples_free(&samples);
    moe_samples_free(&samples);
    moe_test_dir_free(&dir);
}

/* Fits two layers whose router logits are a fixed matrix times those of the layer before, so that a perfect pre-gate exists. */
#define LAYERS 3
typedef struct problem {
    moe_test_dir dir;
    float *gates, *mix[LAYERS - 1]; /* x of layer L + 1 = x of layer L · mix[L] */
    moe_samples *train, *held_out;
} problem;

static moe_samples *make_samples(problem *p, int64_t tokens, moe_random *random) {
    moe_samples *samples = new_samples(&p->dir, LAYERS, tokens);
    moe_error err;
    for (int64_t i = 0; i < tokens; i++) {
        float x[HIDDEN], next[HIDDEN];
        for (int h = 0; h < HIDDEN; h++) x[h] = normal(random);
        assert_int_equal(moe_samples_begin(samples, 1, &err), MOE_OK);
        for (int32_t layer = 0; layer < LAYERS; layer++) {
            moe_samples_put(samples, layer, x, MOE_F32);
            for (int h = 0; h < HIDDEN && layer + 1 < LAYERS; h++) {
                next[h] = 0;
                for (int k = 0; k < HIDDEN; k++) next[h] += x[k] * p->mix[layer][k * HIDDEN + h];
            }
            memcpy(x, next, sizeof x);
        }
    }
    return samples;
}

static void problem_make(problem *p) {
    moe_random random = {4};
    p->dir = moe_test_dir_new();
    p->gates = random_floats(&random, LAYERS * EXPERTS * HIDDEN, 0.5f);
    for (int i = 0; i < LAYERS - 1; i++) p->mix[i] = random_floats(&random, HIDDEN * HIDDEN, 0.3f);
    p->train = make_samples(p, 4000, &random);
    p->held_out = make_samples(p, 300, &random);
}

static void problem_free(problem *p) {
    moe_samples_free(&p->train);
    moe_samples_free(&p->held_out);
    for (int i = 0; i < LAYERS - 1; i++) moe_free(p->mix[i]);
    moe_free(p->gates);
    moe_test_dir_free(&p->dir);
}

static int64_t batches_done, batches_total;
static void on_progress(void *ctx, int64_t done, int64_t total) {
    (void)ctx;
    assert_true(done > batches_done && done <= total);
    batches_done = done;
    batches_total = total;
}

static float *fit(const problem *p, int32_t threads, uint64_t seed, moe_pre_gate_fit fits[LAYERS - 1]) {
    moe_pre_gate_config config = {.num_layers = LAYERS,
                                  .num_experts = EXPERTS,
                                  .hidden = HIDDEN,
                                  .gates = p->gates,
                                  .train = p->train,
                                  .held_out = p->held_out,
                                  .epochs = 30,
                                  .threads = threads,
                                  .lr = 0.02f,
                                  .seed = seed,
                                  .progress = on_progress};
    float *weights = moe_alloc_aligned((LAYERS - 1) * EXPERTS * HIDDEN, sizeof *weights);
    moe_error err;
    batches_done = 0;
    assert_int_equal(moe_pre_gates_train(&config, weights, fits, &err), MOE_OK);
    assert_int_equal(batches_done, batches_total);
    return weights;
}

static void test_fit(void **state) {
    (void)state;
    problem p;
    moe_pre_gate_fit fits[LAYERS - 1], again[LAYERS - 1];
    problem_make(&p);
    float *weights = fit(&p, 1, 5, fits), *same = fit(&p, 3, 5, again), *other = fit(&p, 1, 6, again);
    for (int i = 0; i < LAYERS - 1; i++) {
        assert_true(fits[i].kl_before > 0.3);
        assert_true(fits[i].kl_after < 0.01 * fits[i].kl_before); /* what is left is bfloat16 of the samples */
        assert_true(fits[i].epochs > 1 && fits[i].epochs <= 30);
    }
    size_t bytes = (LAYERS - 1) * EXPERTS * HIDDEN * sizeof *weights;
    assert_memory_equal(weights, same, bytes);      /* threads change nothing, */
    assert_memory_not_equal(weights, other, bytes); /* the seed does */
    moe_free(weights);
    moe_free(same);
    moe_free(other);
    problem_free(&p);
}

static void test_nothing_to_train_on(void **state) {
    (void)state;
    moe_test_dir dir;
    dir = moe_test_dir_new();
    moe_samples *empty = new_samples(&dir, LAYERS, 10);
    moe_pre_gate_config config = {.num_layers = LAYERS,
                                  .num_experts = EXPERTS,
                                  .hidden = HIDDEN,
                                  .train = empty,
                                  .held_out = empty,
                                  .epochs = 1,
                                  .threads = 1};
    moe_error err;
    assert_int_equal(moe_pre_gates_train(&config, NULL, NULL, &err), MOE_FAILED_PRECONDITION);
    moe_samples_config tiny = {.dir = dir.path, .num_layers = LAYERS, .hidden = HIDDEN, .max_bytes = LAYERS * HIDDEN * 2 - 1};
    assert_int_equal(moe_samples_new(&tiny, &(moe_samples *){NULL}, &err), MOE_INVALID_ARGUMENT);
    tiny = (moe_samples_config){.dir = "/no such folder", .num_layers = 1, .hidden = 1, .max_bytes = 2};
    assert_int_equal(moe_samples_new(&tiny, &(moe_samples *){NULL}, &err), MOE_PERMISSION_DENIED);
    moe_samples_free(&empty);
    moe_test_dir_free(&dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradient_beside_finite_differences),
        cmocka_unit_test(test_products_bit_by_bit),
        cmocka_unit_test(test_adamw_beside_its_definition),
        cmocka_unit_test(test_reservoir),
        cmocka_unit_test(test_fit),
        cmocka_unit_test(test_nothing_to_train_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
