/* Whole steps on a GPU (local_submit) beside segments and expert batches, and beside the CPU: the same numbers step by step,
 * under captured graphs and changing numbers of rows, in both element types. Skipped, with the reason, where there is no GPU. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/random.h"
#include "cpu/cpu.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/reference_driver.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

#define SEQUENCES 20
#define MAX_TOKENS 640
#define MAX_ROWS 300
#define SANITIZED_STEPS 10 /* of a script under compute-sanitizer, which takes a hundred times as long */

static const char *const shapes[] = {
    /* heads share keys 4 to 1; top-k renormalised; norms of each head */
    "{\"model_type\": \"qwen3_moe\", \"hidden_size\": 256, \"intermediate_size\": 256, \"moe_intermediate_size\": 128,"
    " \"num_hidden_layers\": 3, \"num_attention_heads\": 8, \"num_key_value_heads\": 2, \"head_dim\": 128, \"num_experts\": 16,"
    " \"num_experts_per_tok\": 4, \"norm_topk_prob\": true, \"vocab_size\": 2500, \"max_position_embeddings\": 40960,"
    " \"rms_norm_eps\": 1e-6, \"rope_theta\": 1000000.0, \"hidden_act\": \"silu\", \"tie_word_embeddings\": false,"
    " \"mlp_only_layers\": [1], \"initializer_range\": 0.05, \"torch_dtype\": \"bfloat16\"}",
    /* a shared expert with a gate of its own, biases of q, k, v */
    "{\"model_type\": \"qwen2_moe\", \"hidden_size\": 192, \"intermediate_size\": 256, \"moe_intermediate_size\": 64,"
    " \"shared_expert_intermediate_size\": 128, \"num_hidden_layers\": 2, \"num_attention_heads\": 3, \"num_key_value_heads\": 3,"
    " \"num_experts\": 12, \"num_experts_per_tok\": 3, \"norm_topk_prob\": false, \"vocab_size\": 999,"
    " \"max_position_embeddings\": 4096, \"rms_norm_eps\": 1e-6, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\","
    " \"tie_word_embeddings\": true, \"initializer_range\": 0.05, \"torch_dtype\": \"bfloat16\"}",
    /* a sliding window */
    "{\"model_type\": \"mixtral\", \"hidden_size\": 256, \"intermediate_size\": 192, \"num_hidden_layers\": 2,"
    " \"num_attention_heads\": 4, \"num_key_value_heads\": 1, \"num_local_experts\": 8, \"num_experts_per_tok\": 2,"
    " \"sliding_window\": 70, \"vocab_size\": 500, \"max_position_embeddings\": 4096, \"rms_norm_eps\": 1e-5,"
    " \"rope_theta\": 1000000.0, \"hidden_act\": \"silu\", \"tie_word_embeddings\": false, \"initializer_range\": 0.05,"
    " \"torch_dtype\": \"bfloat16\"}",
    /* networks of two matrices, whose width is no multiple of a tile's 128 rows; one expert a token; dense layers between */
    "{\"model_type\": \"switch_decoder\", \"hidden_size\": 256, \"intermediate_size\": 320, \"moe_intermediate_size\": 192,"
    " \"num_hidden_layers\": 4, \"decoder_sparse_step\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 4,"
    " \"num_experts\": 16, \"num_experts_per_tok\": 1, \"vocab_size\": 700, \"max_position_embeddings\": 4096,"
    " \"rms_norm_eps\": 1e-6, \"hidden_act\": \"relu\", \"tie_word_embeddings\": true, \"initializer_range\": 0.05,"
    " \"torch_dtype\": \"bfloat16\"}",
    /* norms over all heads, no renormalisation; head_dim 48: the simple kernels */
    "{\"model_type\": \"olmoe\", \"hidden_size\": 96, \"intermediate_size\": 80, \"num_hidden_layers\": 2,"
    " \"num_attention_heads\": 2, \"num_key_value_heads\": 2, \"num_experts\": 8, \"num_experts_per_tok\": 8,"
    " \"norm_topk_prob\": false, \"vocab_size\": 300, \"max_position_embeddings\": 4096, \"rms_norm_eps\": 1e-5,"
    " \"rope_theta\": 10000.0, \"hidden_act\": \"silu\", \"tie_word_embeddings\": false, \"initializer_range\": 0.05,"
    " \"torch_dtype\": \"bfloat16\"}",
};
#define NUM_SHAPES ((int)(sizeof shapes / sizeof *shapes))

static moe_model *open_model(int shape) {
    const moe_dummy_options options = {.seed = 11};
    moe_model *model;
    moe_error err;
    if (shape == NUM_SHAPES) {
        if (moe_model_open(SOURCE_DIR "/models/demo", &model, &err) != MOE_OK) fail_msg("%s", err.message);
        return model;
    }
    moe_test_dir dir = moe_test_dir_new();
    moe_test_write_file(&dir, "config.json", shapes[shape], strlen(shapes[shape]));
    if (moe_model_open_dummy(dir.path, &options, &model, &err) != MOE_OK) fail_msg("%s", err.message);
    moe_test_dir_free(&dir);
    return model;
}

static void *array(int64_t count, size_t size) {
    void *p = calloc((size_t)(count > 0 ? count : 1), size);
    assert_non_null(p);
    return p;
}

/* ---- a model with all its experts in one backend ---- */

typedef struct machine {
    moe_backend *backend;
    const moe_model *model;
    moe_base *base;
    moe_expert **experts;
    moe_local *local;
    moe_kv *kv;
    moe_rows *rows;
    moe_kv_view views[SEQUENCES];
    int32_t *blocks, lengths[SEQUENCES];
    int32_t *expert_rows;
} machine;

static void open_machine(machine *m, moe_backend *backend, const moe_model *model, int32_t max_tokens, int32_t max_rows) {
    const moe_model_config *c = &model->config;
    int32_t pages = (max_tokens + MOE_KV_BLOCK_TOKENS - 1) / MOE_KV_BLOCK_TOKENS, experts = c->num_moe_layers * c->num_experts;
    moe_error err;
    *m = (machine){.backend = backend, .model = model, .experts = array(experts, sizeof(moe_expert *))};
    m->blocks = array(pages * SEQUENCES, sizeof(int32_t));
    m->expert_rows = array(experts, sizeof(int32_t));
    assert_int_equal(backend->ops->base_load(backend, model, NULL, NULL, &m->base, NULL), MOE_OK);
    for (int32_t i = 0; i < experts; i++)
        assert_int_equal(backend->ops->expert_load(backend, &model->experts[i], 0, MOE_FFN_BLOCKS, &m->experts[i], NULL), MOE_OK);
    if (backend->ops->local_create(backend, m->base, m->experts, &m->local, &err) != MOE_OK) fail_msg("%s", err.message);
    assert_int_equal(backend->ops->kv_create(backend, m->base, pages * SEQUENCES, &m->kv, NULL), MOE_OK);
    assert_int_equal(backend->ops->rows_create(backend, m->base, max_rows, &m->rows, NULL), MOE_OK);
    for (int32_t s = 0; s < SEQUENCES; s++) {
        for (int32_t b = 0; b < pages; b++) m->blocks[s * pages + b] = b * SEQUENCES + (s + b) % SEQUENCES;
        m->views[s] = (moe_kv_view){.blocks = m->blocks + s * pages, .num_blocks = pages};
    }
}

static void close_machine(machine *m) {
    const moe_backend_ops *ops = m->backend->ops;
    ops->local_free(m->backend, m->local);
    for (int32_t i = 0; i < m->model->config.num_moe_layers * m->model->config.num_experts; i++)
        ops->expert_free(m->backend, m->experts[i]);
    ops->rows_free(m->backend, m->rows);
    ops->kv_free(m->backend, m->kv);
    ops->base_free(m->backend, m->base);
    ops->close(m->backend);
    free(m->experts);
    free(m->blocks);
    free(m->expert_rows);
}

static void finished(moe_job *job) { *(volatile bool *)job->owner = true; }

/* Appends token ids[i] to sequence sequences[i]; logits [rows, V] of all rows, or, num_top > 0, the top logits alone. */
static void run_step(machine *m, const int32_t *ids, const int32_t *sequences, int32_t rows, float *logits, int32_t num_top,
                     int32_t *top) {
    int32_t *positions = array(rows, sizeof(int32_t)), *all = array(rows, sizeof(int32_t));
    float *values = array(rows * num_top, sizeof(float));
    const moe_model_config *c = &m->model->config;
    volatile bool done = false;
    moe_job job = {.done = finished, .owner = (void *)(uintptr_t)&done};
    for (int32_t i = 0; i < rows; i++) {
        positions[i] = m->lengths[sequences[i]]++;
        all[i] = i;
    }
    moe_local_step step = {.segment = {.num_rows = rows,
                                       .rows = m->rows,
                                       .kv = m->kv,
                                       .token_ids = ids,
                                       .positions = positions,
                                       .sequences = sequences,
                                       .views = m->views,
                                       .num_views = SEQUENCES,
                                       .logit_rows = all,
                                       .num_logit_rows = rows,
                                       .logits = logits,
                                       .num_top = num_top,
                                       .top_ids = top,
                                       .top_logits = values},
                           .expert_rows = m->expert_rows};
    m->backend->ops->local_submit(m->backend, m->base, m->local, &step, &job);
    while (!done) m->backend->ops->poll(m->backend);
    if (job.status != MOE_OK) fail_msg("%s", job.message);
    bool timed = m->backend->dtype == MOE_BF16 && c->hidden % 64 == 0 && (c->head_dim == 64 || c->head_dim == 128);
    assert_true(job.expert_ns >= timed && job.expert_ns < job.compute_ns);
    for (int32_t layer = 0; layer < c->num_moe_layers; layer++) {
        int32_t sum = 0;
        for (int32_t e = 0; e < c->num_experts; e++) sum += m->expert_rows[layer * c->num_experts + e];
        assert_int_equal(sum, rows * c->top_k);
    }
    free(positions);
    free(all);
    free(values);
}

/* ---- a script of steps: prompts in chunks, then decoding by changing crowds ---- */

typedef struct script {
    int32_t num_steps, counts[64];
    int32_t ids[64][MAX_ROWS], sequences[64][MAX_ROWS];
} script;

static void add_rows(script *s, moe_random *random, int32_t vocab, int32_t sequence, int32_t rows) {
    int32_t step = s->num_steps - 1;
    for (int32_t i = 0; i < rows; i++, s->counts[step]++) {
        s->ids[step][s->counts[step]] = (int32_t)moe_random_below(random, (uint64_t)vocab);
        s->sequences[step][s->counts[step]] = sequence;
    }
}

static script *make_script(int32_t vocab) {
    script *s = array(1, sizeof *s);
    moe_random random = {.state = 5};
    const int32_t crowds[] = {1, 2, 5, 1, 8, 9, 20, 3, 20, 9, 1, 2, 20, 17, 1, 1, 5, 5};
    s->num_steps = 1;
    add_rows(s, &random, vocab, 0, 290); /* a long prompt, then more of it beside others */
    s->num_steps++;
    add_rows(s, &random, vocab, 0, 100);
    for (int32_t i = 1; i < SEQUENCES; i++) add_rows(s, &random, vocab, i, i % 7 == 0 ? 30 : 1 + i % 4);
    for (int turn = 0; turn < 2; turn++)
        for (size_t i = 0; i < sizeof crowds / sizeof *crowds; i++) {
            s->num_steps++;
            for (int32_t j = 0; j < crowds[i]; j++) add_rows(s, &random, vocab, j, 1);
        }
    s->num_steps++; /* a chunk of a prompt among rows that decode */
    for (int32_t i = 0; i < SEQUENCES; i++) add_rows(s, &random, vocab, i, i == 4 ? 40 : i == 9 ? 5 : 1);
    return s;
}

/* Relative error of all logits of a step. */
static double distance(const float *want, const float *got, int64_t count) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < count; i++) {
        error += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    return sqrt(error / norm);
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Of the rows' relative errors the middle one: where two experts are as good as tied for a row of random weights, rounding
 * chooses the other one, and that row says nothing of the arithmetic. */
static double typical_distance(const float *want, const float *got, int32_t rows, int32_t vocab) {
    double errors[MAX_ROWS];
    for (int32_t i = 0; i < rows; i++) errors[i] = distance(want + (int64_t)i * vocab, got + (int64_t)i * vocab, vocab);
    qsort(errors, (size_t)rows, sizeof *errors, by_size);
    return errors[rows / 2];
}

static bool sanitized(void) { return getenv("MOESAIC_TEST_SANITIZER") != NULL; }

/* Steps beside segments in exact mode, bit for bit, and beside the CPU in float32: in float32 all rows of a step together, in
 * bfloat16 the middle row of a crowd (and no step as far off as unrelated logits, whose distance is 1.4). */
static void check_script(moe_dtype dtype, bool deterministic, int shape, double bound) {
    moe_backend *backend = moe_test_cuda_open(dtype, deterministic), *reference = NULL;
    if (!backend) skip();
    moe_cpu_config config = {0};
    moe_model *model = open_model(shape);
    int32_t vocab = model->config.vocab, top[MAX_ROWS];
    script *s = make_script(vocab);
    float *got = array((int64_t)MAX_ROWS * vocab, sizeof(float)), *want = array((int64_t)MAX_ROWS * vocab, sizeof(float));
    double worst = 0;
    machine m;
    assert_int_equal(moe_cpu_open(&config, &reference, NULL), MOE_OK);
    moe_driver_options options = {.num_sequences = SEQUENCES, .max_tokens = MAX_TOKENS, .max_rows = MAX_ROWS};
    moe_driver *by_segments = moe_driver_open(backend, model, &options), *on_cpu = moe_driver_open(reference, model, &options);
    open_machine(&m, backend, model, MAX_TOKENS, MAX_ROWS);
    int32_t num_steps = sanitized() ? SANITIZED_STEPS : s->num_steps;
    for (int32_t i = 0; i < num_steps; i++) {
        int64_t count = (int64_t)s->counts[i] * vocab;
        run_step(&m, s->ids[i], s->sequences[i], s->counts[i], got, 1, top);
        moe_driver_step(by_segments, s->ids[i], s->sequences[i], s->counts[i], want);
        if (memcmp(want, got, (size_t)count * sizeof(float)) != 0)
            fail_msg("shape %d, step %d of %d rows: segments give other bits (distance %g)", shape, i, s->counts[i],
                     distance(want, got, count));
        for (int32_t row = 0; row < s->counts[i]; row++)
            assert_int_equal(top[row], moe_driver_argmax(got + (int64_t)row * vocab, vocab));
        moe_driver_step(on_cpu, s->ids[i], s->sequences[i], s->counts[i], want);
        double error = distance(want, got, count), typical = typical_distance(want, got, s->counts[i], vocab);
        bool near = dtype == MOE_F32 ? error < bound : error < 1 && (s->counts[i] <= 8 || typical < bound);
        if (!near)
            fail_msg("shape %d, step %d of %d rows: distance %g to the CPU, of the middle row %g", shape, i, s->counts[i], error,
                     typical);
        worst = error > worst ? error : worst;
    }
    printf("figure: shape %d, %s%s: worst distance of a step to the CPU %.2e\n", shape, moe_dtype_name(dtype),
           deterministic ? ", deterministic" : "", worst);
    moe_driver_close(by_segments);
    moe_driver_close(on_cpu);
    close_machine(&m);
    reference->ops->close(reference);
    moe_model_close(&model);
    free(got);
    free(want);
    free(s);
}

static void test_float32(void **state) {
    (void)state;
    for (int shape = 0; shape <= NUM_SHAPES; shape++) check_script(MOE_F32, false, shape, 1e-5);
}

static void test_bfloat16(void **state) {
    (void)state;
    for (int shape = 0; shape <= (sanitized() ? 0 : NUM_SHAPES); shape++) check_script(MOE_BF16, false, shape, 3e-2);
    check_script(MOE_BF16, true, 0, 3e-2);
    if (!sanitized()) check_script(MOE_BF16, true, NUM_SHAPES, 3e-2);
}

/* Skips the test, before it makes anything, where there is no GPU. */
static void need_gpu(void) {
    moe_backend *backend = moe_test_cuda_open(MOE_BF16, false);
    if (!backend) skip();
    backend->ops->close(backend);
}

/* ---- one row, any batch ---- */

/* Under --deterministic a row's logits do not depend on who computes beside it nor on how its prompt was cut. */
static void test_identity(void **state) {
    enum { TOKENS = 200 };
    (void)state;
    need_gpu();
    moe_model *model = open_model(0);
    int32_t vocab = model->config.vocab, ids[TOKENS], one[TOKENS] = {0};
    moe_random random = {.state = 9};
    float *want = array((int64_t)TOKENS * vocab, sizeof(float)), *got = array((int64_t)MAX_ROWS * vocab, sizeof(float));
    for (int32_t i = 0; i < TOKENS; i++) ids[i] = (int32_t)moe_random_below(&random, (uint64_t)vocab);
    const int32_t chunks[] = {TOKENS, 1, 7, 64, 33};
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
        moe_backend *backend = moe_test_cuda_open(MOE_BF16, true);
        assert_non_null(backend);
        machine m;
        open_machine(&m, backend, model, MAX_TOKENS, MAX_ROWS);
        for (int32_t at = 0, rows; at < TOKENS; at += rows) {
            int32_t crowd_ids[MAX_ROWS], crowd[MAX_ROWS], others = (int32_t)(c * 3 % 8);
            rows = chunks[c] < TOKENS - at ? chunks[c] : TOKENS - at;
            memcpy(crowd_ids, ids + at, (size_t)rows * sizeof *ids);
            memcpy(crowd, one, (size_t)rows * sizeof *one);
            for (int32_t i = 0; i < others; i++) {
                crowd_ids[rows + i] = (int32_t)moe_random_below(&random, (uint64_t)vocab);
                crowd[rows + i] = 1 + i;
            }
            run_step(&m, crowd_ids, crowd, rows + others, got, 0, NULL);
            if (c == 0)
                memcpy(want, got, (size_t)rows * (size_t)vocab * sizeof(float));
            else if (memcmp(want + (int64_t)at * vocab, got, (size_t)rows * (size_t)vocab * sizeof(float)) != 0)
                fail_msg("chunks of %d, at %d: other bits", chunks[c], at);
        }
        close_machine(&m);
    }
    moe_model_close(&model);
    free(want);
    free(got);
}

/* A long prompt, then decoding: the kernels for prompts and for decoding, in one piece and in many, agree. */
static void test_long_context(void **state) {
    enum { PROMPT = 9000, DECODED = 6, CHUNK = 1500 };
    (void)state;
    need_gpu();
    moe_model *model = open_model(0);
    int32_t vocab = model->config.vocab, *ids = array(PROMPT + DECODED, sizeof(int32_t)),
            *one = array(PROMPT + DECODED, sizeof(int32_t));
    float *logits = array((int64_t)CHUNK * vocab, sizeof(float)), *decoded = array((int64_t)DECODED * vocab, sizeof(float));
    moe_random random = {.state = 21};
    machine m;
    moe_backend *backend = moe_test_cuda_open(MOE_BF16, false);
    assert_non_null(backend);
    for (int32_t i = 0; i < PROMPT + DECODED; i++) ids[i] = (int32_t)moe_random_below(&random, (uint64_t)vocab);
    open_machine(&m, backend, model, PROMPT + CHUNK, CHUNK);
    for (int32_t at = 0; at < PROMPT; at += CHUNK) run_step(&m, ids + at, one, CHUNK, logits, 0, NULL);
    for (int32_t i = 0; i < DECODED; i++) run_step(&m, ids + PROMPT + i, one, 1, decoded + (int64_t)i * vocab, 0, NULL);
    m.lengths[0] = PROMPT - 20; /* the same tokens again as the end of a prompt */
    run_step(&m, ids + PROMPT - 20, one, 20 + DECODED, logits, 0, NULL);
    double error = distance(logits + (int64_t)20 * vocab, decoded, (int64_t)DECODED * vocab);
    printf("figure: decoding at %d beside the same rows as a prompt: distance %.2e\n", PROMPT, error);
    assert_true(error < 3e-2);
    close_machine(&m);
    moe_model_close(&model);
    free(ids);
    free(one);
    free(logits);
    free(decoded);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_float32), cmocka_unit_test(test_bfloat16),
                                       cmocka_unit_test(test_identity), cmocka_unit_test(test_long_context)};
    if (getenv("MOESAIC_TEST_FILTER"))
        cmocka_set_test_filter(getenv("MOESAIC_TEST_FILTER")); /* "test_bfloat16": under compute-sanitizer */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
