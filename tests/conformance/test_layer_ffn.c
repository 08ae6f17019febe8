/* Routed experts computed on a micro-batch where it is (layer_ffn_submit), on every backend: the logits of expert batches whose
 * outputs the host hands back, whoever computes which expert in how many jobs, and whatever is submitted before they end. */
#include <math.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/random.h"
#include "tests/support/cpu_backends.h"
#include "tests/support/cuda_backends.h"
#include "tests/support/polled_backend.h"
#include "tests/support/reference_driver.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test.h"

enum { SEQUENCES = 4, SHORT = 10, LONG = 360, MAX_ROWS = SEQUENCES * LONG, STEPS = 9, MAX_JOBS = 4 };
enum { TOKENS = LONG + 88, PAGES = TOKENS / MOE_KV_BLOCK_TOKENS };
#define MAX_WAIT_SECONDS 120

/* ---- steps of random rows: prompts first, then decoding, then chunks of prompts among rows that decode ---- */

typedef struct step {
    int32_t ids[MAX_ROWS], sequences[MAX_ROWS], rows;
} step;

static void make_script(step script[STEPS], int32_t vocab, int32_t prompt_tokens) {
    moe_random random = {.state = 21};
    for (int32_t i = 0; i < STEPS; i++)
        for (int32_t sequence = 0; sequence < SEQUENCES; sequence++) {
            int32_t rows = i == 0 ? prompt_tokens : i < 5 ? (sequence + i) % 3 > 0 : 1 + (sequence == i % 4) * 20;
            for (int32_t r = 0; r < rows; r++) {
                script[i].ids[script[i].rows] = (int32_t)moe_random_below(&random, (uint64_t)vocab);
                script[i].sequences[script[i].rows++] = sequence;
            }
        }
}

/* ---- jobs ---- */

typedef struct pending {
    moe_job job;
    sem_t done;
} pending;

static void post(moe_job *job) { sem_post(job->owner); }

static moe_job *begin(pending *p) {
    p->job = (moe_job){.done = post, .owner = &p->done, .status = MOE_INTERNAL, .compute_ns = -1};
    sem_init(&p->done, 0, 0);
    return &p->job;
}

static void await(moe_backend *backend, pending *p) {
    struct timespec until, now;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += MAX_WAIT_SECONDS;
    while (backend->ops->poll ? sem_trywait(&p->done) : sem_timedwait(&p->done, &until)) {
        if (backend->ops->poll) backend->ops->poll(backend);
        clock_gettime(CLOCK_REALTIME, &now);
        MOE_ASSERT(now.tv_sec <= until.tv_sec);
    }
    sem_destroy(&p->done);
    if (p->job.status != MOE_OK) fprintf(stderr, "%s\n", p->job.message);
    MOE_ASSERT(p->job.status == MOE_OK);
}

/* ---- a model on a backend ---- */

typedef struct layer_job {
    moe_layer_ffn ffn;
    pending pending;
    moe_expert **handles; /* [num_experts] */
    int32_t *given_slots; /* [slots] */
    float *given;         /* [slots, H] */
} layer_job;

/* How layers are computed. All draw what they leave open at random, layer by layer. */
typedef struct variant {
    const char *name;
    bool split; /* experts and given slots fall to several jobs, some of which may have none */
    bool given; /* of some layers, expert batches compute some experts, and the outputs are given */
    bool host;  /* of some layers, expert batches compute all, and the host hands the next segment their outputs */
    bool ahead; /* the next segment is submitted before the layer's jobs have ended */
} variant;

/* What is compared, and how closely. */
typedef struct comparison {
    bool pre_gate, own; /* own: every expert has memory of its own; else every second one is in a slot */
    int32_t prompt_tokens; /* of each sequence, in the first step */
    double bound;          /* 0: the same bits; else of the relative error */
} comparison;

typedef struct machine {
    moe_backend *backend;
    const moe_model *model;
    const variant *variant;
    bool pre_gate;
    moe_random random;
    moe_base *base;
    moe_kv *kv;
    moe_rows *rows;
    moe_expert **experts; /* [num_moe_layers, num_experts] */
    moe_slots *slots;     /* of every second of these; NULL: none */
    int32_t blocks[SEQUENCES][PAGES], lengths[SEQUENCES], positions[MAX_ROWS], counts[MAX_ROWS], all[MAX_ROWS];
    moe_kv_view views[SEQUENCES];
    moe_route routes[3]; /* of layer i: i % 3 */
    void *activations;
    float *outputs;      /* [slots, H], for combine */
    moe_ffn_group *groups;
    int32_t *batch_slots, *batch_rows; /* [slots]: of an expert batch, by expert */
    float *batch_out;                  /* [slots, H] */
    moe_segment segments[2];           /* index % 2 */
    pending segment_jobs[2];
    layer_job jobs[MAX_JOBS];
    int num_jobs; /* submitted and not awaited */
    bool *away;   /* [num_experts]: expert batches compute them for this layer */
} machine;

static void *array(int64_t count, size_t size) {
    void *memory = moe_alloc_aligned((size_t)(count > 0 ? count : 1), size);
    MOE_ASSERT(memory);
    return memory;
}

/* The expert in a slot, copied there from its image. */
static moe_expert *fill_slot(machine *m, int32_t index, const moe_ffn_weights *weights, void *image) {
    const moe_backend_ops *ops = m->backend->ops;
    pending p;
    moe_slot_fill fill = {.slot = ops->slot(m->slots, index), .image = image};
    fill.bytes = ops->expert_size(m->backend, weights, 0, MOE_FFN_BLOCKS).image_bytes;
    ops->expert_pack(m->backend, weights, 0, MOE_FFN_BLOCKS, image);
    ops->slot_fill_submit(m->backend, &fill, begin(&p));
    await(m->backend, &p);
    return fill.slot;
}

static void load_experts(machine *m, bool with_slots) {
    const moe_backend_ops *ops = m->backend->ops;
    const moe_ffn_weights *weights = m->model->experts;
    int32_t count = m->model->config.num_moe_layers * m->model->config.num_experts;
    void *image = NULL;
    m->experts = array(count, sizeof(moe_expert *));
    if (with_slots) {
        image = ops->host_alloc(m->backend, (size_t)ops->expert_size(m->backend, weights, 0, MOE_FFN_BLOCKS).image_bytes);
        MOE_ASSERT(image && ops->slots_create(m->backend, weights, 0, MOE_FFN_BLOCKS, count / 2, &m->slots, NULL) == MOE_OK);
    }
    for (int32_t i = 0; i < count; i++)
        if (with_slots && i % 2)
            m->experts[i] = fill_slot(m, i / 2, &weights[i], image);
        else
            MOE_ASSERT(ops->expert_load(m->backend, &weights[i], 0, MOE_FFN_BLOCKS, &m->experts[i], NULL) == MOE_OK);
    ops->host_free(m->backend, image);
}

static void open_machine(machine *m, moe_backend *backend, const moe_model *model, const comparison *setup) {
    const moe_model_config *c = &model->config;
    const moe_backend_ops *ops = backend->ops;
    int32_t max_rows = SEQUENCES * (setup->prompt_tokens > SHORT ? setup->prompt_tokens : SHORT);
    int64_t slots = max_rows * c->top_k;
    *m = (machine){.backend = backend, .model = model, .pre_gate = setup->pre_gate, .random = {.state = 4}};
    MOE_ASSERT(ops->base_load(backend, model, NULL, NULL, &m->base, NULL) == MOE_OK);
    MOE_ASSERT(ops->kv_create(backend, m->base, PAGES * SEQUENCES, &m->kv, NULL) == MOE_OK);
    MOE_ASSERT(ops->rows_create(backend, m->base, max_rows, &m->rows, NULL) == MOE_OK);
    load_experts(m, !setup->own);
    for (int32_t s = 0; s < SEQUENCES; s++) {
        for (int32_t b = 0; b < PAGES; b++) m->blocks[s][b] = b * SEQUENCES + s;
        m->views[s] = (moe_kv_view){m->blocks[s], PAGES};
    }
    for (int32_t row = 0; row < MAX_ROWS; row++) m->all[row] = row, m->counts[row] = c->top_k;
    for (int i = 0; i < 3; i++) m->routes[i] = (moe_route){array(slots, sizeof(int32_t)), array(slots, sizeof(float))};
    m->activations = array(max_rows, moe_row_bytes(backend->dtype, c->hidden));
    m->outputs = array(slots * c->hidden, sizeof(float));
    m->groups = array(c->num_experts, sizeof *m->groups);
    m->batch_slots = array(slots, sizeof(int32_t));
    m->batch_rows = array(slots, sizeof(int32_t));
    m->batch_out = array(slots * c->hidden, sizeof(float));
    m->away = array(c->num_experts, sizeof(bool));
    for (int i = 0; i < MAX_JOBS; i++) {
        m->jobs[i].handles = array(c->num_experts, sizeof(moe_expert *));
        m->jobs[i].given_slots = array(slots, sizeof(int32_t));
        m->jobs[i].given = array(slots * c->hidden, sizeof(float));
    }
}

static void close_machine(machine *m) {
    const moe_backend_ops *ops = m->backend->ops;
    int32_t count = m->model->config.num_moe_layers * m->model->config.num_experts;
    for (int32_t i = 0; i < count; i++)
        if (!m->slots || i % 2 == 0) ops->expert_free(m->backend, m->experts[i]);
    if (m->slots) ops->slots_free(m->backend, m->slots);
    ops->rows_free(m->backend, m->rows);
    ops->kv_free(m->backend, m->kv);
    ops->base_free(m->backend, m->base);
    for (int i = 0; i < 3; i++) moe_free(m->routes[i].experts), moe_free(m->routes[i].weights);
    for (int i = 0; i < MAX_JOBS; i++) moe_free(m->jobs[i].handles), moe_free(m->jobs[i].given_slots), moe_free(m->jobs[i].given);
    void *const arrays[] = {m->experts, m->activations, m->outputs, m->groups, m->batch_slots, m->batch_rows, m->batch_out, m->away};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) moe_free(arrays[i]);
}

/* ---- a layer ---- */

/* The slots of experts that are away, computed from the activations that the segment has handed out: batch_slots, batch_out.
 * Returns how many. */
static int32_t run_batch(machine *m, int32_t layer, int32_t rows) {
    const moe_model_config *c = &m->model->config;
    const moe_route *route = &m->routes[layer % 3];
    moe_ffn_batch batch = {.x = m->activations,
                           .num_rows = rows,
                           .groups = m->groups,
                           .assignment_rows = m->batch_rows,
                           .mode = MOE_COMBINE_EXACT,
                           .block_hi = MOE_FFN_BLOCKS,
                           .out = m->batch_out};
    for (int32_t e = 0; e < c->num_experts; e++) {
        int32_t first = batch.num_assignments;
        for (int32_t s = 0; s < rows * c->top_k && m->away[e]; s++) {
            if (route->experts[s] != e) continue;
            m->batch_slots[batch.num_assignments] = s;
            m->batch_rows[batch.num_assignments++] = s / c->top_k;
        }
        if (batch.num_assignments > first)
            m->groups[batch.num_groups++] =
                (moe_ffn_group){m->experts[layer * c->num_experts + e], first, batch.num_assignments - first};
    }
    if (batch.num_assignments > 0) moe_driver_run_ffn(m->backend, &batch);
    return batch.num_assignments;
}

static void submit_layer(machine *m, int32_t layer, int32_t rows) {
    const moe_model_config *c = &m->model->config;
    int32_t given = run_batch(m, layer, rows), num_jobs = m->variant->split ? 2 + layer % (MAX_JOBS - 1) : 1;
    size_t row_floats = (size_t)c->hidden;
    for (int i = 0; i < num_jobs; i++) {
        memset(m->jobs[i].handles, 0, (size_t)c->num_experts * sizeof(moe_expert *));
        m->jobs[i].ffn = (moe_layer_ffn){.rows = m->rows,
                                         .num_rows = rows,
                                         .experts = m->routes[layer % 3].experts,
                                         .handles = m->jobs[i].handles,
                                         .given_slots = m->jobs[i].given_slots,
                                         .given = m->jobs[i].given};
    }
    for (int32_t e = 0; e < c->num_experts; e++) {
        layer_job *job = &m->jobs[moe_random_below(&m->random, (uint64_t)num_jobs)];
        if (!m->away[e]) job->handles[e] = m->experts[layer * c->num_experts + e];
    }
    for (int32_t i = 0; i < given; i++) {
        layer_job *job = &m->jobs[moe_random_below(&m->random, (uint64_t)num_jobs)];
        memcpy(job->given + (size_t)job->ffn.num_given * row_floats, m->batch_out + (size_t)i * row_floats, row_floats * sizeof(float));
        job->given_slots[job->ffn.num_given++] = m->batch_slots[i];
    }
    for (m->num_jobs = 0; m->num_jobs < num_jobs; m->num_jobs++) {
        layer_job *job = &m->jobs[m->num_jobs];
        m->backend->ops->layer_ffn_submit(m->backend, m->base, &job->ffn, begin(&job->pending));
    }
}

static void await_layer(machine *m) {
    for (int i = 0; i < m->num_jobs; i++) {
        await(m->backend, &m->jobs[i].pending);
        MOE_ASSERT(m->jobs[i].pending.job.compute_ns >= 0);
    }
    m->num_jobs = 0;
}

/* Who computes the experts of a layer. */
typedef enum where { HERE, HERE_AND_AWAY, HOST } where;

static where draw_where(machine *m) {
    where place = HERE;
    if (m->variant->given && moe_random_below(&m->random, 3) > 0) place = HERE_AND_AWAY;
    if (m->variant->host && moe_random_below(&m->random, 3) == 0) place = HOST;
    for (int32_t e = 0; e < m->model->config.num_experts; e++)
        m->away[e] = place == HOST || (place == HERE_AND_AWAY && moe_random_below(&m->random, 3) == 0);
    return place;
}

static void run_on_host(machine *m, int32_t layer, int32_t rows) {
    size_t row_floats = (size_t)m->model->config.hidden;
    int32_t count = run_batch(m, layer, rows);
    MOE_ASSERT(count == rows * m->model->config.top_k);
    for (int32_t i = 0; i < count; i++)
        memcpy(m->outputs + (size_t)m->batch_slots[i] * row_floats, m->batch_out + (size_t)i * row_floats, row_floats * sizeof(float));
}

/* ---- a step ---- */

/* logits [rows, V], of every row. */
static void run_step(machine *m, const step *in, float *logits) {
    const moe_model_config *c = &m->model->config;
    where here = HERE, before;
    for (int32_t i = 0; i < in->rows; i++) {
        m->positions[i] = m->lengths[in->sequences[i]]++;
        MOE_ASSERT(m->positions[i] < TOKENS);
    }
    for (int32_t index = 0; index <= c->num_moe_layers; index++) {
        moe_segment *s = &m->segments[index % 2];
        before = here;
        here = draw_where(m);
        *s = (moe_segment){.index = index, .num_rows = in->rows, .rows = m->rows, .kv = m->kv, .token_ids = in->ids};
        s->positions = m->positions;
        s->sequences = in->sequences;
        s->views = m->views;
        s->num_views = SEQUENCES;
        s->combine = (moe_combine){before == HOST ? m->outputs : NULL, MOE_F32, m->routes[(index + 2) % 3].weights, m->counts};
        if (here != HERE) s->activations = m->activations;
        s->want_gate = !m->pre_gate || index == 0;
        s->want_next = m->pre_gate && index + 1 < c->num_moe_layers ? MOE_ROUTE_PRE_GATE : MOE_ROUTE_NONE;
        s->route = m->routes[index % 3];
        s->next = m->routes[(index + 1) % 3];
        s->logit_rows = m->all;
        s->num_logit_rows = in->rows;
        s->logits = logits;
        memset(m->activations, 0xff, (size_t)in->rows * moe_row_bytes(m->backend->dtype, c->hidden));
        m->backend->ops->segment_submit(m->backend, m->base, s, begin(&m->segment_jobs[index % 2]));
        await_layer(m);
        await(m->backend, &m->segment_jobs[index % 2]);
        if (index == c->num_moe_layers) continue;
        if (here == HOST)
            run_on_host(m, index, in->rows);
        else
            submit_layer(m, index, in->rows);
        if (!m->variant->ahead) await_layer(m);
    }
}

/* ---- comparison ---- */

static const variant variants[] = {{"one job"},
                                   {"several jobs, given", .split = true, .given = true},
                                   {"ahead", .ahead = true},
                                   {"all of it", .split = true, .given = true, .host = true, .ahead = true}};
#define NUM_VARIANTS (sizeof variants / sizeof *variants)

/* What the rows of a script must give. */
typedef struct expected {
    step script[STEPS];
    float *logits[STEPS]; /* [rows, V] */
    int32_t vocab;
    double bound;
    bool narrow;  /* of bfloat16 */
} expected;

static expected *make_expected(moe_backend *backend, const moe_model *model, const comparison *setup) {
    moe_driver_options options = {
        .pre_gate = setup->pre_gate, .num_sequences = SEQUENCES, .max_tokens = TOKENS, .max_rows = MAX_ROWS, .combine = MOE_COMBINE_EXACT};
    moe_driver *driver = moe_driver_open(backend, model, &options);
    expected *want = array(1, sizeof *want);
    want->vocab = model->config.vocab;
    want->bound = setup->bound;
    want->narrow = backend->dtype == MOE_BF16;
    make_script(want->script, want->vocab, setup->prompt_tokens);
    for (int i = 0; i < STEPS; i++) {
        const step *s = &want->script[i];
        want->logits[i] = array((int64_t)s->rows * want->vocab, sizeof(float));
        moe_driver_step(driver, s->ids, s->sequences, s->rows, want->logits[i]);
    }
    moe_driver_close(driver);
    return want;
}

static void free_expected(expected *want) {
    for (int i = 0; i < STEPS; i++) moe_free(want->logits[i]);
    moe_free(want);
}

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

/* Within a bound all rows of a small step count, of a crowd the middle one: where two experts are as good as tied, rounding chooses
 * the other one, and that row says nothing of the arithmetic. But no step is as far off as unrelated logits, whose distance is 1.4. */
static bool good(const expected *want, int i, const float *got) {
    const float *logits = want->logits[i];
    int32_t rows = want->script[i].rows, few = want->narrow ? 8 : SEQUENCES * SHORT;
    double errors[MAX_ROWS];
    if (want->bound == 0) return memcmp(logits, got, (size_t)rows * (size_t)want->vocab * sizeof(float)) == 0;
    double all = distance(logits, got, (int64_t)rows * want->vocab);
    if (rows <= few) return all < (want->narrow ? 1 : want->bound);
    for (int32_t r = 0; r < rows; r++)
        errors[r] = distance(logits + (int64_t)r * want->vocab, got + (int64_t)r * want->vocab, want->vocab);
    qsort(errors, (size_t)rows, sizeof *errors, by_size);
    return all < 1 && errors[rows / 2] < want->bound;
}

/* The first step that is not as expected, or -1. */
static int run_script(machine *m, const variant *how, const expected *want) {
    int wrong = -1;
    m->variant = how;
    memset(m->lengths, 0, sizeof m->lengths);
    for (int i = 0; i < STEPS && wrong < 0; i++) {
        size_t count = (size_t)want->script[i].rows * (size_t)want->vocab;
        float *got = array((int64_t)count, sizeof(float));
        memset(got, 0xff, count * sizeof(float));
        run_step(m, &want->script[i], got);
        if (!good(want, i, got)) wrong = i;
        moe_free(got);
    }
    return wrong;
}

static void compare(moe_backend *backend, const moe_model *model, const comparison setup) {
    expected *want = make_expected(backend, model, &setup);
    machine *m = array(1, sizeof *m);
    open_machine(m, backend, model, &setup);
    for (size_t v = 0; v < NUM_VARIANTS; v++) {
        int wrong = run_script(m, &variants[v], want);
        if (wrong >= 0)
            fail_msg("%s, %s: step %d gives other logits than expert batches", backend->ops->profile(backend), variants[v].name, wrong);
    }
    close_machine(m);
    moe_free(m);
    free_expected(want);
}

/* ---- two micro-batches at once, each with a thread that submits ---- */

typedef struct submitter {
    machine machine;
    const variant *variant;
    const expected *want;
    pthread_t thread;
    int wrong;
} submitter;

static void *submit(void *ctx) {
    submitter *s = ctx;
    s->wrong = run_script(&s->machine, s->variant, s->want);
    return NULL;
}

static void compare_threads(moe_backend *backend, const moe_model *model) {
    enum { THREADS = 2 };
    const comparison setup = {.prompt_tokens = SHORT};
    expected *want = make_expected(backend, model, &setup);
    submitter *s = array(THREADS, sizeof *s);
    for (int i = 0; i < THREADS; i++) {
        open_machine(&s[i].machine, backend, model, &setup);
        s[i].variant = &variants[NUM_VARIANTS - 1 - (size_t)i];
        s[i].machine.random.state += (uint64_t)i;
        s[i].want = want;
    }
    for (int i = 0; i < THREADS; i++) assert_int_equal(pthread_create(&s[i].thread, NULL, submit, &s[i]), 0);
    for (int i = 0; i < THREADS; i++) pthread_join(s[i].thread, NULL);
    for (int i = 0; i < THREADS; i++) {
        if (s[i].wrong >= 0)
            fail_msg("%s, thread %d: step %d gives other logits", backend->ops->profile(backend), i, s[i].wrong);
        close_machine(&s[i].machine);
    }
    moe_free(s);
    free_expected(want);
}

/* ---- models and backends ---- */

static moe_model *open_model(const char *folder, const char *name) {
    char path[512];
    moe_model *model;
    moe_error err;
    snprintf(path, sizeof path, "%s/%s/%s", SOURCE_DIR, folder, name);
    if (moe_model_open(path, &model, &err) != MOE_OK) fail_msg("%s: %s", path, err.message);
    return model;
}

static moe_model *open_fixture(const char *name) { return open_model("tests/data/checkpoints", name); }

/* Shared experts with a gate, a dense layer between, and widths for which a GPU has its fast kernels. */
static moe_model *open_wide(void) {
    static const char config[] =
        "{\"model_type\": \"qwen2_moe\", \"hidden_size\": 192, \"intermediate_size\": 256, \"moe_intermediate_size\": 64,"
        " \"shared_expert_intermediate_size\": 128, \"num_hidden_layers\": 4, \"num_attention_heads\": 3, \"num_key_value_heads\": 3,"
        " \"num_experts\": 12, \"num_experts_per_tok\": 3, \"norm_topk_prob\": false, \"vocab_size\": 499, \"mlp_only_layers\": [1],"
        " \"max_position_embeddings\": 4096, \"rms_norm_eps\": 1e-6, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\","
        " \"tie_word_embeddings\": true, \"initializer_range\": 0.05, \"torch_dtype\": \"bfloat16\"}";
    const moe_dummy_options options = {.seed = 11};
    moe_model *model;
    moe_error err;
    moe_test_dir dir = moe_test_dir_new();
    moe_test_write_file(&dir, "config.json", config, strlen(config));
    if (moe_model_open_dummy(dir.path, &options, &model, &err) != MOE_OK) fail_msg("%s", err.message);
    moe_test_dir_free(&dir);
    return model;
}

static void fixture_on_cpu(void **state) {
    moe_model *model = open_fixture(*state);
    for (int i = 0; i < 2 * MOE_TEST_CPU_BACKENDS; i++) {
        moe_backend *backend = moe_test_cpu_open_dtype(i / 2, i % 2 * 2, (i + i / 2) % 2 ? MOE_BF16 : MOE_F32);
        if (!backend) continue;
        compare(backend, model, (comparison){.prompt_tokens = SHORT});
        backend->ops->close(backend);
    }
    moe_model_close(&model);
}

/* Expert jobs run on the backend's thread, the segments after them are brief enough for the submitter's: and yet wait. */
static void in_order(void **state) {
    moe_model *model = open_fixture("qwen2_moe");
    moe_backend *backend;
    (void)state;
    const moe_cpu_config config = {.threads = 2, .background = true, .dtype = MOE_F32, .isa = "auto"};
    assert_int_equal(moe_cpu_open(&config, &backend, NULL), MOE_OK);
    compare(backend, model, (comparison){.prompt_tokens = SHORT});
    compare_threads(backend, model);
    backend->ops->close(backend);
    moe_model_close(&model);
}

static void when_polled(void **state) {
    moe_model *model = open_fixture("mixtral");
    moe_backend *real = moe_test_cpu_open(1, 0);
    moe_polled_backend polled;
    (void)state;
    moe_polled_init(&polled, real, 3);
    compare(&polled.base, model, (comparison){.own = true, .prompt_tokens = SHORT});
    assert_true(polled.num_layers > STEPS);
    real->ops->close(real);
    moe_model_close(&model);
}

/* The demo has pre-gates. Long prompts: more assignments than the host of a GPU sorts. */
static void larger(moe_backend *backend, const moe_model *demo, const moe_model *wide, double bound) {
    compare(backend, demo, (comparison){.prompt_tokens = SHORT, .bound = bound});
    compare(backend, demo, (comparison){.pre_gate = true, .prompt_tokens = SHORT, .bound = bound});
    compare(backend, wide, (comparison){.prompt_tokens = SHORT, .bound = bound});
    compare(backend, wide, (comparison){.prompt_tokens = LONG, .bound = bound});
}

static void larger_on_cpu(void **state) {
    moe_model *demo = open_model("models", "demo"), *wide = open_wide();
    (void)state;
    for (int i = 0; i < 2; i++) {
        moe_backend *backend = moe_test_cpu_open_dtype(2, 2, i ? MOE_BF16 : MOE_F32);
        if (!backend) skip();
        larger(backend, demo, wide, 0);
        compare_threads(backend, wide);
        backend->ops->close(backend);
    }
    moe_model_close(&demo);
    moe_model_close(&wide);
}

/* NULL: this machine cannot. */
static moe_backend *open_cuda(moe_dtype dtype, bool deterministic) {
    moe_backend *backend = moe_test_cuda_open(dtype, deterministic);
    if (!backend || backend->ops->layer_ffn_submit) return backend;
    printf("not tested: %s computes no experts on a micro-batch\n", backend->ops->profile(backend));
    backend->ops->close(backend);
    return NULL;
}

enum { FIXTURES = 5 };
static const char *const fixtures[FIXTURES] = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "switch_decoder"};

/* Deterministic: the same bits however a batch is cut. Else within the bounds that local steps have to the CPU. Under
 * compute-sanitizer, which takes a hundred times as long: one fixture in two of the profiles, one with experts of two matrices, and
 * a larger batch, which the device sorts (not under racecheck, the slowest by far: test_cuda_ffn.c sorts there). */
static void on_cuda(void **state) {
    const char *sanitizer = getenv("MOESAIC_TEST_SANITIZER");
    const bool sanitized = sanitizer != NULL;
    (void)state;
    for (int i = 0; i < 4; i += sanitized ? 3 : 1) {
        bool deterministic = i % 2 == 0, bf16 = i / 2;
        double bound = deterministic ? 0 : bf16 ? 3e-2 : 1e-5;
        moe_backend *backend = open_cuda(bf16 ? MOE_BF16 : MOE_F32, deterministic);
        if (!backend) skip();
        for (int f = 0; f < FIXTURES; f += sanitized ? (bf16 ? FIXTURES : FIXTURES - 1) : 1) {
            moe_model *model = open_fixture(fixtures[f]);
            compare(backend, model, (comparison){.prompt_tokens = SHORT, .bound = bound});
            moe_model_close(&model);
        }
        moe_model *demo = open_model("models", "demo"), *wide = open_wide();
        if (!sanitized)
            larger(backend, demo, wide, bound);
        else if (bf16 && strcmp(sanitizer, "racecheck") != 0)
            compare(backend, wide, (comparison){.prompt_tokens = LONG, .bound = bound});
        if (deterministic && !sanitized) compare_threads(backend, wide);
        moe_model_close(&demo);
        moe_model_close(&wide);
        backend->ops->close(backend);
    }
}

int main(void) {
    enum { OTHERS = 4 };
    struct CMUnitTest tests[OTHERS + FIXTURES] = {cmocka_unit_test(in_order), cmocka_unit_test(when_polled),
                                                  cmocka_unit_test(larger_on_cpu), cmocka_unit_test(on_cuda)};
    for (int i = 0; i < FIXTURES; i++)
        tests[OTHERS + i] = (struct CMUnitTest){
            .name = fixtures[i], .test_func = fixture_on_cpu, .initial_state = (void *)(uintptr_t)fixtures[i]};
    if (getenv("MOESAIC_TEST_FILTER")) cmocka_set_test_filter(getenv("MOESAIC_TEST_FILTER")); /* "on_cuda": under compute-sanitizer */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
