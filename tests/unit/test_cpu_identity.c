/* Bit-identity within a profile: a row's result is the same bits alone or in any batch, chunking, thread count or slice. All
 * instruction paths of `cpu` agree too, as kernels_lanes.h says. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/random.h"
#include "tests/support/cpu_backends.h"
#include "tests/support/reference_driver.h"
#include "tests/support/test.h"

#define ROWS 21 /* more than two of the widest tile, and odd */
#define TOKENS 45
#define CROWD 25 /* sequences */
#define MINE 13  /* one in the middle of them */
#define SCALAR 1 /* index of the first `cpu` path for moe_test_cpu_open */

static const char *const families[] = {"llama_dense", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "switch_decoder"};

static moe_model *open_model(const char *family) {
    char path[512];
    moe_model *model;
    moe_error err;
    snprintf(path, sizeof path, "%s/tests/data/checkpoints/%s", SOURCE_DIR, family);
    if (moe_model_open(path, &model, &err) != MOE_OK) fail_msg("%s", err.message);
    return model;
}

static float *random_floats(uint64_t seed, int64_t count) {
    moe_random r = {.state = seed};
    float *p = calloc((size_t)count, sizeof *p);
    assert_non_null(p);
    for (int64_t i = 0; i < count; i++) p[i] = (float)(2 * moe_random_unit(&r) - 1);
    return p;
}

static void assert_same_bits(const float *a, const float *b, int64_t count, const char *what) {
    for (int64_t i = 0; i < count; i++)
        if (memcmp(&a[i], &b[i], sizeof a[i]) != 0) fail_msg("%s: element %d is %.9g, not %.9g", what, (int)i, a[i], b[i]);
}

/* ---- experts ---- */

/* out [count, H] of rows first … of x through one expert, exact mode. */
static void run_rows(moe_backend *backend, moe_expert *expert, const float *x, int32_t first, int32_t count, int32_t block_lo,
                     int32_t block_hi, float *out) {
    int32_t rows[ROWS];
    moe_ffn_group group = {.expert = expert, .count = count};
    moe_ffn_batch batch = {.x = x,
                           .num_rows = ROWS,
                           .groups = &group,
                           .num_groups = 1,
                           .assignment_rows = rows,
                           .num_assignments = count,
                           .block_lo = block_lo,
                           .block_hi = block_hi,
                           .out = out};
    for (int32_t i = 0; i < count; i++) rows[i] = first + i;
    moe_driver_run_ffn(backend, &batch);
}

static moe_expert *load_expert(moe_backend *backend, const moe_model *model, int32_t expert, int32_t lo, int32_t hi) {
    moe_expert *loaded;
    assert_int_equal(backend->ops->expert_load(backend, moe_model_expert(model, 0, expert), lo, hi, &loaded, NULL), MOE_OK);
    return loaded;
}

static void check_row_batches(moe_backend *backend, const moe_model *model, float *want) {
    int32_t hidden = model->config.hidden;
    float *x = random_floats(1, (int64_t)ROWS * hidden), *got = random_floats(2, (int64_t)ROWS * hidden);
    moe_expert *expert = load_expert(backend, model, 0, 0, MOE_FFN_BLOCKS);
    for (int32_t row = 0; row < ROWS; row++) run_rows(backend, expert, x, row, 1, 0, MOE_FFN_BLOCKS, want + row * hidden);
    for (int32_t count = 2; count <= ROWS; count++)
        for (int32_t first = 0; first + count <= ROWS; first += 3) {
            run_rows(backend, expert, x, first, count, 0, MOE_FFN_BLOCKS, got);
            assert_same_bits(got, want + first * hidden, (int64_t)count * hidden, "rows in a batch");
        }
    backend->ops->expert_free(backend, expert);
    free(x);
    free(got);
}

static void rows_alone_and_in_batches(void **state) {
    moe_model *model = open_model(*state);
    int64_t count = (int64_t)ROWS * model->config.hidden;
    float *first = NULL;
    for (int i = SCALAR; i < MOE_TEST_CPU_BACKENDS; i++) {
        moe_backend *backend = moe_test_cpu_open(i, 2);
        if (!backend) continue;
        float *want = random_floats(3, count);
        check_row_batches(backend, model, want);
        if (first) assert_same_bits(want, first, count, "instruction paths");
        if (first)
            free(want);
        else
            first = want;
        backend->ops->close(backend);
    }
    free(first);
    moe_model_close(&model);
}

/* A node of the tree equals the sum of its two halves, whether the halves come from the whole expert or from slices of it. */
static void check_node(moe_backend *backend, const moe_model *model, moe_expert *whole, const float *x, int32_t lo, int32_t hi) {
    int32_t hidden = model->config.hidden, middle = (lo + hi) / 2;
    int64_t count = (int64_t)ROWS * hidden;
    float *parts[4];
    for (int i = 0; i < 4; i++) parts[i] = random_floats(4, count);
    moe_expert *left = load_expert(backend, model, 0, lo, middle), *right = load_expert(backend, model, 0, middle, hi);
    run_rows(backend, whole, x, 0, ROWS, lo, hi, parts[0]);
    run_rows(backend, left, x, 0, ROWS, lo, middle, parts[1]);
    run_rows(backend, right, x, 0, ROWS, middle, hi, parts[2]);
    run_rows(backend, whole, x, 0, ROWS, middle, hi, parts[3]);
    assert_same_bits(parts[3], parts[2], count, "a slice of the whole and the slice alone");
    for (int64_t i = 0; i < count; i++) parts[1][i] += parts[2][i];
    assert_same_bits(parts[1], parts[0], count, "halves added");
    for (int i = 0; i < 4; i++) free(parts[i]);
    backend->ops->expert_free(backend, left);
    backend->ops->expert_free(backend, right);
}

static void slices_added_in_tree_order(void **state) {
    moe_model *model = open_model(*state);
    float *x = random_floats(5, (int64_t)ROWS * model->config.hidden);
    for (int i = 0; i < MOE_TEST_CPU_BACKENDS; i++) {
        moe_backend *backend = moe_test_cpu_open(i, 2);
        if (!backend) continue;
        moe_expert *whole = load_expert(backend, model, 0, 0, MOE_FFN_BLOCKS);
        for (int32_t size = MOE_FFN_BLOCKS; size >= 2; size /= 2)
            for (int32_t lo = 0; lo < MOE_FFN_BLOCKS; lo += size) check_node(backend, model, whole, x, lo, lo + size);
        backend->ops->expert_free(backend, whole);
        backend->ops->close(backend);
    }
    free(x);
    moe_model_close(&model);
}

/* Experts 0, 1, 2 over overlapping rows in one batch (one group empty); a NaN row stays its own affair. */
static void check_merged(moe_backend *backend, const moe_model *model) {
    enum { ASSIGNMENTS = 12 };
    const int32_t rows[ASSIGNMENTS] = {0, 2, 4, 6, 8, 1, 2, 3, 4, 5, 6, 20}, hidden = model->config.hidden;
    float *x = random_floats(6, (int64_t)ROWS * hidden), *got = random_floats(7, (int64_t)ROWS * hidden), *want,
          weights[ASSIGNMENTS];
    moe_expert *experts[3];
    for (int32_t e = 0; e < 3; e++) experts[e] = load_expert(backend, model, e, 0, MOE_FFN_BLOCKS);
    const moe_ffn_group groups[] = {{experts[0], 0, 5}, {experts[1], 5, 0}, {experts[2], 5, 7}};
    want = random_floats(8, ASSIGNMENTS * hidden);
    for (int32_t a = 0; a < ASSIGNMENTS; a++)
        run_rows(backend, a < 5 ? experts[0] : experts[2], x, rows[a], 1, 0, MOE_FFN_BLOCKS, want + a * hidden);
    x[8 * hidden + 3] = NAN; /* row 8 is assignment 4 */
    moe_ffn_batch batch = {.x = x, .num_rows = ROWS, .groups = groups, .num_groups = 3, .assignment_rows = rows};
    batch.assignment_weights = weights;
    batch.num_assignments = ASSIGNMENTS;
    batch.block_hi = MOE_FFN_BLOCKS;
    batch.out = got;
    moe_driver_run_ffn(backend, &batch);
    assert_same_bits(got, want, 4 * hidden, "merged batch, before the NaN row");
    assert_same_bits(got + 5 * hidden, want + 5 * hidden, 7 * hidden, "merged batch, after the NaN row");
    for (int32_t i = 0; i < hidden; i++) assert_true(isnan(got[4 * hidden + i]));
    batch.mode = MOE_COMBINE_PARTIAL;
    for (int32_t a = 0; a < ASSIGNMENTS; a++) weights[a] = 0.1f * (float)(a + 1);
    moe_driver_run_ffn(backend, &batch);
    for (int32_t row = 0; row < ROWS; row++) {
        float sum[1024] = {0};
        for (int32_t a = 0; a < ASSIGNMENTS; a++)
            for (int32_t i = 0; rows[a] == row && i < hidden; i++) sum[i] = fmaf(weights[a], want[a * hidden + i], sum[i]);
        if (row != 8) assert_same_bits(got + row * hidden, sum, hidden, "partial sums");
    }
    for (int32_t e = 0; e < 3; e++) backend->ops->expert_free(backend, experts[e]);
    free(x);
    free(got);
    free(want);
}

static void merged_batches(void **state) {
    moe_model *model = open_model("qwen3_moe");
    (void)state;
    for (int i = 0; i < MOE_TEST_CPU_BACKENDS; i++)
        for (int32_t threads = 0; threads < 3; threads++) {
            moe_backend *backend = moe_test_cpu_open(i, threads);
            if (!backend) continue;
            check_merged(backend, model);
            backend->ops->close(backend);
        }
    moe_model_close(&model);
}

/* ---- whole models ---- */

static void fill_tokens(int32_t *ids, uint64_t seed, int32_t vocab) {
    moe_random r = {.state = seed};
    for (int32_t i = 0; i < TOKENS; i++) ids[i] = (int32_t)moe_random_below(&r, (uint64_t)vocab);
}

/* Three sequences side by side in steps of uneven shares; sequence 1 holds `ids`; its logits go to `logits`. */
static void run_mixed(moe_driver *driver, const int32_t *ids, const int32_t *others, int32_t vocab, float *logits) {
    static const int32_t shares[] = {3, 1, 9, 2, 16, 5, 9}; /* sum TOKENS */
    int32_t done = 0, tokens[64], sequences[64];
    float *all = random_floats(9, (int64_t)64 * vocab);
    for (int32_t step = 0; step < 7; step++) {
        int32_t rows = 0, mine;
        for (int32_t i = 0; i < 7 - step; i++, rows++) tokens[rows] = others[i], sequences[rows] = 0;
        mine = rows;
        for (int32_t i = 0; i < shares[step]; i++, rows++) tokens[rows] = ids[done + i], sequences[rows] = 1;
        for (int32_t i = 0; i < 2; i++, rows++) tokens[rows] = others[7 + i], sequences[rows] = 2;
        moe_driver_step(driver, tokens, sequences, rows, all);
        memcpy(logits + (int64_t)done * vocab, all + (int64_t)mine * vocab, (size_t)shares[step] * (size_t)vocab * sizeof *all);
        done += shares[step];
    }
    assert_int_equal(done, TOKENS);
    free(all);
}

/* CROWD sequences decode together, enough for each thread to take rows of its own; sequence MINE holds `ids`, and the one before
 * it has two rows a step. */
static void run_crowd(moe_driver *driver, const int32_t *ids, const int32_t *others, int32_t vocab, float *logits) {
    int32_t tokens[CROWD + 1], sequences[CROWD + 1];
    float *all = random_floats(14, (int64_t)(CROWD + 1) * vocab);
    for (int32_t step = 0; step < TOKENS; step++) {
        int32_t rows = 0, mine = 0;
        for (int32_t i = 0; i < CROWD; i++) {
            if (i == MINE) mine = rows;
            for (int32_t j = 0; j < (i == MINE - 1 && step < 8 ? 2 : 1); j++, rows++) {
                tokens[rows] = i == MINE ? ids[step] : others[(step + i + j) % TOKENS];
                sequences[rows] = i;
            }
        }
        moe_driver_step(driver, tokens, sequences, rows, all);
        memcpy(logits + (int64_t)step * vocab, all + (int64_t)mine * vocab, (size_t)vocab * sizeof *all);
    }
    free(all);
}

static void check_crowd(const moe_model *model, int index, int32_t threads, const int32_t *ids, const int32_t *others,
                        const float *want) {
    int32_t vocab = model->config.vocab;
    moe_backend *backend = moe_test_cpu_open(index, threads);
    if (!backend) return;
    moe_driver_options options = {.num_sequences = CROWD, .max_tokens = 64, .max_rows = CROWD + 1};
    moe_driver *driver = moe_driver_open(backend, model, &options);
    float *got = random_floats(15, (int64_t)TOKENS * vocab);
    run_crowd(driver, ids, others, vocab, got);
    assert_same_bits(got, want, (int64_t)TOKENS * vocab, "in a crowd");
    free(got);
    moe_driver_close(driver);
    backend->ops->close(backend);
}

static void check_model(const moe_model *model, int index, int32_t threads, const int32_t *ids, const int32_t *others,
                        const float *want) {
    static const int32_t chunks[] = {1, 7, 16, TOKENS};
    int32_t vocab = model->config.vocab;
    moe_backend *backend = moe_test_cpu_open(index, threads);
    if (!backend) return;
    moe_driver_options options = {.num_sequences = 3, .max_tokens = 64, .max_rows = 64};
    moe_driver *driver = moe_driver_open(backend, model, &options);
    float *got = random_floats(10, (int64_t)TOKENS * vocab);
    for (int c = 0; c < 4; c++) {
        moe_driver_prefill(driver, ids, TOKENS, chunks[c], got);
        assert_same_bits(got, want, (int64_t)TOKENS * vocab, "chunked prefill");
        moe_driver_truncate(driver, 0, 0);
    }
    run_mixed(driver, ids, others, vocab, got);
    assert_same_bits(got, want, (int64_t)TOKENS * vocab, "beside other sequences");
    free(got);
    moe_driver_close(driver);
    backend->ops->close(backend);
}

static void chunks_batches_and_threads(void **state) {
    moe_model *model = open_model(*state);
    int32_t ids[TOKENS], others[TOKENS], vocab = model->config.vocab;
    float *want = random_floats(11, (int64_t)TOKENS * vocab);
    moe_driver_options options = {.num_sequences = 1, .max_tokens = 64, .max_rows = TOKENS};
    fill_tokens(ids, 12, vocab);
    fill_tokens(others, 13, vocab);
    moe_backend *backend = moe_test_cpu_open(SCALAR, 0);
    moe_driver *driver = moe_driver_open(backend, model, &options);
    moe_driver_prefill(driver, ids, TOKENS, TOKENS, want);
    moe_driver_close(driver);
    backend->ops->close(backend);
    check_model(model, SCALAR, 2, ids, others, want);
    for (int i = SCALAR + 1; i < MOE_TEST_CPU_BACKENDS; i++)
        for (int32_t threads = 0; threads < 4; threads++) {
            check_model(model, i, threads, ids, others, want);
            check_crowd(model, i, threads, ids, others, want);
        }
    free(want);
    moe_model_close(&model);
}

int main(void) {
    enum { FIRST = 5, FAMILIES = sizeof families / sizeof *families };
    static const char gated[] = "mixtral", odd[] = "qwen2_moe" /* width 48: blocks of 6 */, two_matrices[] = "switch_decoder";
    struct CMUnitTest tests[FIRST + FAMILIES] = {
        cmocka_unit_test_prestate(rows_alone_and_in_batches, (void *)(uintptr_t)gated),
        cmocka_unit_test_prestate(rows_alone_and_in_batches, (void *)(uintptr_t)two_matrices),
        cmocka_unit_test_prestate(slices_added_in_tree_order, (void *)(uintptr_t)odd),
        cmocka_unit_test_prestate(slices_added_in_tree_order, (void *)(uintptr_t)two_matrices),
        cmocka_unit_test(merged_batches),
    };
    for (size_t i = 0; i < FAMILIES; i++)
        tests[FIRST + i] = (struct CMUnitTest){
            .name = families[i], .test_func = chunks_batches_and_threads, .initial_state = (void *)(uintptr_t)families[i]};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
