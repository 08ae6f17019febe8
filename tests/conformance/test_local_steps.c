/* Local steps and the highest logits, on every backend: a whole step in one job gives the bits of segments and expert batches,
 * and the highest logits are those of all logits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/random.h"
#include "tests/support/cpu_backends.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/reference_driver.h"
#include "tests/support/test.h"

#define TOKENS 60
#define SEQUENCES 3
#define MAX_ROWS 16

/* Steps of random rows of three sequences; the same for every driver. */
typedef struct script {
    moe_random random;
    int32_t lengths[SEQUENCES];
    int32_t ids[MAX_ROWS], sequences[MAX_ROWS], rows;
} script;

static bool next_step(script *s, int32_t vocab) {
    s->rows = 0;
    for (int32_t seq = 0; seq < SEQUENCES; seq++) {
        int32_t more = (int32_t)moe_random_below(&s->random, 1 + MAX_ROWS / SEQUENCES);
        for (int32_t i = 0; i < more && s->lengths[seq] < TOKENS; i++, s->lengths[seq]++) {
            s->ids[s->rows] = (int32_t)moe_random_below(&s->random, (uint64_t)vocab);
            s->sequences[s->rows++] = seq;
        }
    }
    return s->rows > 0;
}

static moe_driver *open_driver(moe_backend *backend, const moe_model *model, bool pre_gate, bool local) {
    moe_driver_options options = {
        .pre_gate = pre_gate, .num_sequences = SEQUENCES, .max_tokens = TOKENS, .max_rows = MAX_ROWS, .local = local};
    return moe_driver_open(backend, model, &options);
}

/* By descending logit, of equal ones the lower id first. */
static void check_top(const float *logits, int32_t vocab, int32_t n, const int32_t *ids, const float *top) {
    for (int32_t j = 0; j < n; j++) {
        assert_in_range(ids[j], 0, vocab - 1);
        assert_true(top[j] == logits[ids[j]]);
        if (j > 0) assert_true(top[j - 1] > top[j] || (top[j - 1] == top[j] && ids[j - 1] < ids[j]));
    }
    for (int32_t i = 0; i < vocab; i++) {
        bool listed = false;
        for (int32_t j = 0; j < n; j++) listed = listed || ids[j] == i;
        if (!listed) assert_true(logits[i] < top[n - 1] || (logits[i] == top[n - 1] && i > ids[n - 1]));
    }
}

static void check_expert_rows(const moe_model_config *c, const int32_t *expert_rows, int32_t rows) {
    for (int32_t layer = 0; layer < c->num_moe_layers; layer++) {
        int32_t sum = 0;
        for (int32_t e = 0; e < c->num_experts; e++) {
            assert_in_range(expert_rows[layer * c->num_experts + e], 0, rows);
            sum += expert_rows[layer * c->num_experts + e];
        }
        assert_int_equal(sum, rows * c->top_k);
    }
}

static void compare(moe_backend *backend, const moe_model *model, bool pre_gate, int32_t steps) {
    const moe_model_config *c = &model->config;
    moe_driver *segments = open_driver(backend, model, pre_gate, false), *local = open_driver(backend, model, pre_gate, true);
    size_t count = (size_t)MAX_ROWS * (size_t)c->vocab;
    float *want = calloc(count, sizeof *want), *got = calloc(count, sizeof *got), top[MAX_ROWS * MOE_MAX_TOP_LOGITS];
    int32_t ids[MAX_ROWS * MOE_MAX_TOP_LOGITS];
    int32_t *expert_rows = calloc((size_t)c->num_moe_layers * (size_t)c->num_experts + 1, sizeof *expert_rows);
    script s = {.random = {.state = 9}};
    for (int32_t step = 0; step < steps && next_step(&s, c->vocab); step++) {
        static const int32_t nums[] = {1, 2, 20, MOE_MAX_TOP_LOGITS, 0};
        int32_t n = nums[step % 5] < c->vocab ? nums[step % 5] : c->vocab;
        bool all = n == 0 || step % 3 == 0; /* logits beside the highest, or the highest alone */
        memset(got, 0xee, count * sizeof *got);
        memset(expert_rows, 0xee, (size_t)c->num_moe_layers * (size_t)c->num_experts * sizeof *expert_rows);
        moe_driver_wanted wanted = {all ? got : NULL, n, ids, step % 2 ? expert_rows : NULL, top};
        moe_driver_step(segments, s.ids, s.sequences, s.rows, want);
        moe_driver_step_for(local, s.ids, s.sequences, s.rows, &wanted);
        if (all) assert_memory_equal(want, got, (size_t)s.rows * (size_t)c->vocab * sizeof *want);
        for (int32_t r = 0; r < s.rows && n > 0; r++)
            check_top(want + (int64_t)r * c->vocab, c->vocab, n, ids + r * n, top + r * n);
        if (step % 2) check_expert_rows(c, expert_rows, s.rows);
    }
    free(want);
    free(got);
    free(expert_rows);
    moe_driver_close(segments);
    moe_driver_close(local);
}

static moe_model *open_model(const char *path) {
    moe_model *model;
    moe_error err;
    if (moe_model_open(path, &model, &err) != MOE_OK) fail_msg("%s: %s", path, err.message);
    return model;
}

/* Deterministic: a profile in which bits do not depend on how a step is cut. */
static void compare_cuda(const moe_model *model, bool pre_gate) {
    if (model->config.num_moe_layers == 0) {
        print_message("not tested on CUDA: a model without experts, which has no local steps there\n");
        return;
    }
    for (int i = 0; i < 2; i++) {
        moe_backend *backend = moe_test_cuda_open(i ? MOE_BF16 : MOE_F32, true);
        if (!backend) return;
        if (backend->ops->local_submit)
            compare(backend, model, pre_gate, 12);
        else
            print_message("not tested: %s has no local steps\n", backend->ops->profile(backend));
        backend->ops->close(backend);
    }
}

static void fixture(void **state) {
    char path[512];
    snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s", SOURCE_DIR, (const char *)*state);
    moe_model *model = open_model(path);
    for (int i = 0; i < 4 * MOE_TEST_CPU_BACKENDS; i++) {
        moe_backend *backend = moe_test_cpu_open_dtype(i / 4, i % 2 * 2, i / 2 % 2 ? MOE_BF16 : MOE_F32);
        if (!backend) continue;
        compare(backend, model, false, INT32_MAX);
        backend->ops->close(backend);
    }
    compare_cuda(model, false);
    moe_model_close(&model);
}

/* It has pre-gates. */
static void demo(void **state) {
    moe_model *model = open_model(SOURCE_DIR "/models/demo");
    (void)state;
    for (int i = 0; i < 4; i++) {
        moe_backend *backend = moe_test_cpu_open_dtype(2, 2, i / 2 ? MOE_BF16 : MOE_F32);
        if (!backend) skip();
        compare(backend, model, i % 2, 12);
        backend->ops->close(backend);
    }
    compare_cuda(model, false);
    compare_cuda(model, true);
    moe_model_close(&model);
}

int main(void) {
    static const char *const families[] = {"llama_dense", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"};
    struct CMUnitTest tests[1 + sizeof families / sizeof *families] = {cmocka_unit_test(demo)};
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        tests[1 + i] =
            (struct CMUnitTest){.name = families[i], .test_func = fixture, .initial_state = (void *)(uintptr_t)families[i]};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
