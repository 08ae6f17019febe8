/* Layers of micro-batches computed where their rows are, under slots for a part of the experts: streams of forward steps whose logits are
 * bit for bit those of the plain driver, which has every expert; what is submitted when; what is counted; failures. */
#include "expert-worker/layer_runs.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/random.h"
#include "expert-worker/residency_internal.h"
#include "tests/support/cpu_backends.h"
#include "tests/support/polled_backend.h"
#include "tests/support/reference_driver.h"
#include "tests/support/residency_check.h"
#include "tests/support/slow_backend.h"
#include "tests/support/stub_transport.h"
#include "tests/support/test.h"

/* The fixture: hidden 64, 3 MoE layers of 16 experts, 4 a token. */
enum { H = 64, LAYERS = 3, EXPERTS = 16, TOP_K = 4, ALL = LAYERS * EXPERTS };
enum { STREAMS = MOE_LAYER_RUNS + 2, STEPS = 3, MAX_ROWS = 7, MAX_TOKENS = 2 * MOE_KV_BLOCK_TOKENS };
#define START_NS (1000 * MOE_NS_PER_S)
#define MAX_TURNS 200000
#define TURN_NS (50 * MOE_NS_PER_US) /* of waiting for threads; MAX_TURNS of them are 10 s */

/* ---- what is to be computed, and what must come out ---- */

typedef struct story_step {
    int32_t rows, ids[MAX_ROWS], positions[MAX_ROWS];
    int32_t experts[LAYERS][MAX_ROWS * TOP_K];
    float weights[LAYERS][MAX_ROWS * TOP_K];
    float *logits; /* [rows, V] */
} story_step;

typedef struct story {
    story_step steps[STEPS];
} story;

typedef enum front { DIRECT, SLOW, POLLED } front;

typedef struct setup {
    int backend; /* of moe_test_cpu_open */
    int32_t threads;
    front front;
    int32_t slots, images; /* 0: no tiers; 0: as many as experts */
    moe_cold_experts cold;
    bool apart;      /* of a SLOW front: the host is another backend, beside the device */
    double host_ns;  /* of an expert; 0: so much that both are chosen at times */
    int num_streams; /* 0: one */
} setup;

typedef struct rig {
    moe_model *model;
    int32_t vocab;
    moe_backend *real, *backend; /* the worker's is `backend`: real, or a front of it */
    moe_slow_backend slow, host; /* host: where that is another one */
    moe_polled_backend polled;
    stub_transport transport;
    moe_clock clock;
    moe_shard shard;
    moe_residency *residency;
    _Atomic uint64_t ended;
    char defect[8];
    moe_layer_runs runs;
    moe_layer_experts experts;
    moe_base *base;
    int num_told;
    moe_status told; /* of the last */
    story stories[STREAMS];
} rig;

static void all_counts(int32_t counts[MAX_ROWS]) {
    for (int i = 0; i < MAX_ROWS; i++) counts[i] = TOP_K;
}

/* The part of a segment that does not change within a step. */
static moe_segment describe(const story_step *step, moe_rows *rows, moe_kv *kv, const moe_kv_view *view, float *logits) {
    static const int32_t zeros[MAX_ROWS], numbers[MAX_ROWS] = {0, 1, 2, 3, 4, 5, 6};
    return (moe_segment){.num_rows = step->rows,
                         .rows = rows,
                         .kv = kv,
                         .token_ids = step->ids,
                         .positions = step->positions,
                         .sequences = zeros,
                         .views = view,
                         .num_views = 1,
                         .logit_rows = numbers,
                         .num_logit_rows = step->rows,
                         .logits = logits};
}

typedef struct plain_job {
    moe_job job;
    _Atomic bool done;
} plain_job;

static void plain_done(moe_job *job) { atomic_store(&((plain_job *)job)->done, true); }

static void pause_for_threads(void) { nanosleep(&(struct timespec){.tv_nsec = TURN_NS}, NULL); }

static void await(const plain_job *j) {
    for (int i = 0; i < MAX_TURNS && !atomic_load(&j->done); i++) pause_for_threads();
    assert_true(atomic_load(&j->done));
    assert_int_equal(j->job.status, MOE_OK);
}

/* One step with every expert in a job a layer, which tells the routing. */
static void record_step(rig *r, story_step *step, moe_expert *const *handles, moe_rows *rows, moe_kv *kv, const moe_kv_view *view) {
    int32_t counts[MAX_ROWS];
    float *logits = calloc((size_t)(step->rows * r->vocab), sizeof *logits);
    moe_segment s = describe(step, rows, kv, view, logits);
    all_counts(counts);
    for (s.index = 0; s.index <= LAYERS; s.index++) {
        if (s.index > 0) s.combine = (moe_combine){NULL, MOE_F32, step->weights[s.index - 1], counts};
        if (s.index < LAYERS) s.route = (moe_route){step->experts[s.index], step->weights[s.index]};
        s.want_gate = s.index < LAYERS;
        moe_driver_run_segment(r->real, r->base, &s);
        if (s.index == LAYERS) break;
        const moe_layer_ffn ffn = {.rows = rows,
                                   .num_rows = step->rows,
                                   .experts = step->experts[s.index],
                                   .handles = handles + (ptrdiff_t)s.index * EXPERTS};
        plain_job j = {.job = {.done = plain_done}};
        r->real->ops->layer_ffn_submit(r->real, r->base, &ffn, &j.job);
        await(&j);
    }
    assert_memory_equal(logits, step->logits, (size_t)(step->rows * r->vocab) * sizeof *logits);
    free(logits);
}

static const int32_t block_numbers[] = {1, 0};
static const moe_kv_view view = {.blocks = block_numbers, .num_blocks = 2};

static void record_story(rig *r, story *st, moe_driver *driver, moe_expert *const *handles, uint64_t seed) {
    static const int32_t zeros[MAX_ROWS];
    moe_random random = {seed};
    moe_rows *rows;
    moe_kv *kv;
    int32_t position = 0;
    assert_int_equal(r->real->ops->rows_create(r->real, r->base, MAX_ROWS, &rows, NULL), MOE_OK);
    assert_int_equal(r->real->ops->kv_create(r->real, r->base, 2, &kv, NULL), MOE_OK);
    moe_driver_truncate(driver, 0, 0);
    for (int n = 0; n < STEPS; n++) {
        story_step *step = &st->steps[n];
        step->rows = n == 1 ? 1 : 1 + (int32_t)moe_random_below(&random, MAX_ROWS);
        step->logits = calloc((size_t)(step->rows * r->vocab), sizeof *step->logits);
        for (int32_t i = 0; i < step->rows; i++) {
            step->ids[i] = (int32_t)moe_random_below(&random, (uint64_t)r->vocab);
            step->positions[i] = position++;
        }
        moe_driver_step(driver, step->ids, zeros, step->rows, step->logits);
        record_step(r, step, handles, rows, kv, &view);
    }
    r->real->ops->kv_free(r->real, kv);
    r->real->ops->rows_free(r->real, rows);
}

static void record(rig *r, int num_streams) {
    const moe_driver_options options = {.combine = MOE_COMBINE_EXACT, .num_sequences = 1, .max_tokens = MAX_TOKENS, .max_rows = MAX_ROWS};
    moe_driver *driver = moe_driver_open(r->real, r->model, &options);
    moe_expert *handles[ALL];
    for (int i = 0; i < ALL; i++)
        assert_int_equal(r->real->ops->expert_load(r->real, &r->model->experts[i], 0, MOE_FFN_BLOCKS, &handles[i], NULL), MOE_OK);
    for (int i = 0; i < num_streams; i++) record_story(r, &r->stories[i], driver, handles, 100 + (uint64_t)i);
    for (int i = 0; i < ALL; i++) r->real->ops->expert_free(r->real, handles[i]);
    moe_driver_close(driver);
}

/* ---- the worker's side ---- */

static void told(void *ctx, const moe_layer_call *call) {
    rig *r = ctx;
    assert_false(call->ended);
    r->num_told++;
    r->told = call->status;
}

/* As control does it with a loaded expert. */
static void hold(rig *r, int32_t layer, int32_t expert) {
    const moe_ffn_weights *weights = moe_model_expert(r->model, layer, expert);
    moe_held_expert loaded = {.digest = 1, .bytes = 1};
    if (!r->residency) {
        assert_int_equal(r->real->ops->expert_load(r->real, weights, 0, MOE_FFN_BLOCKS, &loaded.handle, NULL), MOE_OK);
        moe_shard_adopt(&r->shard, layer, expert, &loaded);
        return;
    }
    moe_image *image = moe_residency_take_image(r->residency);
    if (image) {
        if (!image->memory) image->memory = moe_image_pool_take(image->pool);
        r->real->ops->expert_pack(r->real, weights, 0, MOE_FFN_BLOCKS, image->memory);
    }
    moe_shard_adopt(&r->shard, layer, expert, &loaded);
    moe_residency_hold(r->residency, layer, expert, image);
}

static moe_backend *host_of(rig *r, const setup *s) { return s->apart ? &r->host.base : r->backend; }

/* The two backends have the same images: nothing is to be told. */
static void no_layout(const moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, moe_image_layout *out) {
    (void)b;
    (void)weights;
    (void)lo;
    (void)hi;
    memset(out, 0, sizeof *out);
}

static moe_status same_images(moe_backend *b, const moe_ffn_weights *weights, int32_t lo, int32_t hi, const moe_image_layout *layout,
                              int32_t count, moe_host_experts **out, moe_error *err) {
    moe_backend *real = ((moe_slow_backend *)b)->real;
    (void)layout;
    return real->ops->host_experts_create(real, weights, lo, hi, NULL, count, out, err);
}

static void make_fronts(rig *r, const setup *s) {
    moe_slow_init(&r->slow, r->real);
    moe_slow_init(&r->host, r->real);
    r->slow.ops.expert_layout = no_layout;
    r->host.ops.host_experts_create = same_images;
    moe_polled_init(&r->polled, r->real, 2);
    r->backend = s->front == SLOW ? &r->slow.base : s->front == POLLED ? &r->polled.base : r->real;
}

static void make_residency(rig *r, const setup *s) {
    moe_error err;
    const moe_residency_config config = {
        .model = r->model,
        .backend = r->backend,
        .host = host_of(r, s),
        .transport = &r->transport.base,
        .ended = &r->ended,
        .tiers = {.device = {.part = (double)s->slots / ALL},
                  .host = {.part = (double)s->images / ALL},
                  .eviction = "hint-aware",
                  .cold = s->cold,
                  .costs = {.copy_byte_ns = 1, .device = {100, 10}, .host = {s->host_ns > 0 ? s->host_ns : 30000, 100}},
                  .threaded = s->threads > 0}};
    if (moe_residency_new(&config, &r->residency, &err) != MOE_OK) fail_msg("%s", err.message);
    r->shard.residency = r->residency;
}

static void turns_until_filled(rig *r, int32_t slots) {
    r->slow.at_once = true;
    for (int i = 0; i < MAX_TURNS && moe_residency_resident(r->residency) < slots; i++) {
        if (r->backend->ops->poll) r->backend->ops->poll(r->backend);
        moe_residency_turn(r->residency);
        if (r->backend == r->real) pause_for_threads();
    }
    assert_int_equal(moe_residency_resident(r->residency), slots);
    r->slow.at_once = false;
}

/* False where this machine lacks the backend. Slots are filled with the first experts, copies then end as the front has it. */
static bool rig_open(rig *r, const setup *s) {
    memset(r, 0, sizeof *r);
    r->real = moe_test_cpu_open(s->backend, s->threads);
    if (!r->real) return false;
    assert_int_equal(moe_model_open(SOURCE_DIR "/tests/data/checkpoints/qwen3_moe", &r->model, NULL), MOE_OK);
    r->vocab = r->model->config.vocab;
    make_fronts(r, s);
    stub_init(&r->transport);
    r->clock = moe_clock_fake(START_NS);
    assert_int_equal(r->real->ops->base_load(r->real, r->model, NULL, NULL, &r->base, NULL), MOE_OK);
    record(r, s->num_streams ? s->num_streams : 1);
    assert_int_equal(moe_shard_init(&r->shard, r->model, r->backend, NULL), MOE_OK);
    if (s->slots) make_residency(r, s);
    const moe_layer_runs_config config = {.shard = &r->shard,
                                          .backend = r->backend,
                                          .host = s->cold == MOE_COLD_FETCH ? NULL : host_of(r, s),
                                          .transport = &r->transport.base,
                                          .clock = &r->clock,
                                          .ended = &r->ended,
                                          .defect = r->defect,
                                          .told = told,
                                          .ctx = r};
    assert_int_equal(moe_layer_runs_init(&r->runs, &config, NULL), MOE_OK);
    r->experts = moe_layer_runs_experts(&r->runs);
    assert_false(r->experts.ops->ready(r->experts.ctx));
    for (int i = 0; i < ALL; i++) {
        hold(r, i / EXPERTS, i % EXPERTS);
        if (r->residency && i % EXPERTS == EXPERTS - 1) moe_residency_held_all(r->residency); /* the first layer is on the device */
    }
    assert_true(r->experts.ops->ready(r->experts.ctx));
    assert_int_equal(r->experts.ops->wants_activations(r->experts.ctx), s->cold != MOE_COLD_FETCH);
    if (s->slots) turns_until_filled(r, s->slots);
    return true;
}

static void rig_close(rig *r) {
    moe_slow_hurry(&r->slow);
    moe_slow_hurry(&r->host);
    moe_layer_runs_close(&r->runs);
    assert_false(moe_layer_runs_active(&r->runs));
    moe_shard_free(&r->shard); /* asserts that nothing is in use, also of the residency */
    moe_residency_free(&r->residency);
    for (int i = 0; i < STREAMS; i++)
        for (int n = 0; n < STEPS; n++) free(r->stories[i].steps[n].logits);
    r->real->ops->base_free(r->real, r->base);
    r->real->ops->close(r->real);
    stub_close(&r->transport);
    moe_model_close(&r->model);
}

static bool turn(rig *r) { return r->experts.ops->turn(r->experts.ctx); }

/* ---- the engine's side: a micro-batch that goes through a story ---- */

typedef struct stream {
    rig *rig;
    const story *story;
    uint64_t number;
    bool ahead;        /* routes are known: layers begin before their segments have ended, segments follow what was submitted */
    bool foretells;    /* of each layer the one behind, as the layer begins */
    moe_rows *rows;
    moe_kv *kv;
    int step;          /* STEPS: it has come to its end */
    int segment;       /* submitted last; -1: none of this step */
    bool begun;        /* the call of that segment's layer */
    bool late;         /* activations are not given before this is false */
    int32_t counts[MAX_ROWS];
    moe_segment segments[LAYERS + 1];
    plain_job jobs[LAYERS + 1];
    moe_layer_call calls[LAYERS];
    float *activations[LAYERS]; /* [MAX_ROWS, H] */
    float *logits;
} stream;

static moe_backend *segments_of(rig *r) { return r->backend == &r->polled.base ? r->backend : r->real; }

static void stream_open(stream *s, rig *r, int number, bool ahead) {
    *s = (stream){.rig = r, .story = &r->stories[number], .number = (uint64_t)number, .ahead = ahead, .segment = -1};
    all_counts(s->counts);
    assert_int_equal(r->real->ops->rows_create(r->real, r->base, MAX_ROWS, &s->rows, NULL), MOE_OK);
    assert_int_equal(r->real->ops->kv_create(r->real, r->base, 2, &s->kv, NULL), MOE_OK);
    for (int i = 0; i < LAYERS; i++) s->activations[i] = moe_alloc_aligned(MAX_ROWS * H, sizeof(float));
    s->logits = calloc((size_t)(MAX_ROWS * r->vocab), sizeof *s->logits);
}

static void stream_close(stream *s) {
    s->rig->real->ops->rows_free(s->rig->real, s->rows);
    s->rig->real->ops->kv_free(s->rig->real, s->kv);
    for (int i = 0; i < LAYERS; i++) moe_free(s->activations[i]);
    free(s->logits);
}

static const story_step *step_of(const stream *s) { return &s->story->steps[s->step]; }
static uint64_t step_number(const stream *s) { return s->number * STEPS + (uint64_t)s->step; }

static void submit_segment(stream *s, int index) {
    const story_step *step = step_of(s);
    moe_segment *segment = &s->segments[index];
    *segment = describe(step, s->rows, s->kv, &view, s->logits);
    segment->index = index;
    if (index > 0) segment->combine = (moe_combine){NULL, MOE_F32, step->weights[index - 1], s->counts};
    if (index < LAYERS) segment->activations = s->activations[index];
    s->segment = index;
    s->begun = false;
    s->jobs[index] = (plain_job){.job = {.done = plain_done}};
    moe_backend *backend = segments_of(s->rig);
    backend->ops->segment_submit(backend, s->rig->base, segment, &s->jobs[index].job);
}

static void foretell(stream *s, int layer) {
    uint32_t experts[MAX_ROWS * TOP_K];
    int32_t count = step_of(s)->rows * TOP_K;
    for (int32_t i = 0; i < count; i++) experts[i] = (uint32_t)step_of(s)->experts[layer][i];
    s->rig->experts.ops->foretell(s->rig->experts.ctx, step_number(s), layer, experts, count);
}

static void begin_layer(stream *s) {
    moe_layer_call *call = &s->calls[s->segment];
    memset(call, 0x5a, sizeof *call); /* what the caller leaves is nobody's business */
    call->base = s->rig->base;
    call->step = step_number(s);
    call->layer = s->segment;
    call->num_rows = step_of(s)->rows;
    call->rows = s->rows;
    call->experts = step_of(s)->experts[s->segment];
    call->activations = NULL;
    call->given_ns = 0;
    s->begun = true;
    s->rig->experts.ops->begin(s->rig->experts.ctx, call);
    if (s->foretells && s->segment + 1 < LAYERS) foretell(s, s->segment + 1);
}

static bool segment_ended(const stream *s) { return atomic_load(&s->jobs[s->segment].done); }

/* As soon as its segment has ended. */
static bool give(stream *s) {
    moe_layer_call *call = &s->calls[s->segment];
    if (s->segment == LAYERS || !s->begun || call->ended || call->given_ns || !segment_ended(s) || s->late) return false;
    call->activations = s->activations[s->segment];
    call->given_ns = moe_now_ns(&s->rig->clock);
    return true;
}

static bool all_ended(const stream *s) {
    for (int i = 0; i < LAYERS; i++)
        if (!s->calls[i].ended) return false;
    return true;
}

static bool end_step(stream *s) {
    const story_step *step = step_of(s);
    if (!segment_ended(s) || !all_ended(s)) return false;
    for (int i = 0; i <= LAYERS; i++) assert_int_equal(s->jobs[i].job.status, MOE_OK);
    for (int i = 0; i < LAYERS; i++) assert_int_equal(s->calls[i].status, MOE_OK);
    assert_memory_equal(s->logits, step->logits, (size_t)(step->rows * s->rig->vocab) * sizeof *s->logits);
    s->segment = -1;
    s->step++;
    return true;
}

/* What a micro-batch does next, where it can. */
static bool advance(stream *s) {
    if (s->step == STEPS) return false;
    if (s->segment < 0) {
        submit_segment(s, 0);
        return true;
    }
    if (s->segment == LAYERS) return end_step(s);
    bool moved = give(s);
    if (!s->begun) {
        if (!s->ahead && !segment_ended(s)) return moved;
        begin_layer(s);
        return true;
    }
    const moe_layer_call *call = &s->calls[s->segment];
    if (call->status != MOE_OK) return moved;
    if (call->ended) assert_true(call->submitted);
    if (!(s->ahead ? call->submitted : call->ended)) return moved;
    submit_segment(s, s->segment + 1);
    return true;
}

static bool all_over(const stream *streams, int count) {
    for (int i = 0; i < count; i++)
        if (streams[i].step < STEPS) return false;
    return true;
}

/* Until all streams have come to their ends. */
static void run_streams(rig *r, stream *streams, int count) {
    int i = 0;
    for (; i < MAX_TURNS && !all_over(streams, count); i++) {
        bool moved = false;
        for (int k = 0; k < count; k++) moved |= advance(&streams[k]);
        moved |= turn(r);
        if (r->backend->ops->poll) r->backend->ops->poll(r->backend);
        if (!moved && r->backend == r->real) pause_for_threads();
    }
    assert_true(all_over(streams, count));
    assert_int_equal(r->num_told, count * STEPS * LAYERS);
    assert_false(moe_layer_runs_active(&r->runs));
    if (r->residency && r->backend != r->real) residency_check(r->residency);
}

static void run_all(const setup *given, bool ahead, bool foretells) {
    rig r;
    stream streams[STREAMS];
    setup s = *given;
    if (!s.num_streams) s.num_streams = STREAMS;
    if (!rig_open(&r, &s)) return;
    r.slow.at_once = true;
    for (int i = 0; i < s.num_streams; i++) {
        stream_open(&streams[i], &r, i, ahead);
        streams[i].foretells = foretells;
    }
    run_streams(&r, streams, s.num_streams);
    if (r.residency) {
        moe_residency_counts c = moe_residency_counted(r.residency);
        assert_true(c.hits + c.late_hits + c.misses > 0);
        assert_true(s.cold == MOE_COLD_FETCH ? c.host_experts == 0 : true);
        if (s.cold == MOE_COLD_HOST && s.front != DIRECT) assert_true(c.host_experts > 0 && c.host_rows >= c.host_experts);
    }
    for (int i = 0; i < s.num_streams; i++) stream_close(&streams[i]);
    rig_close(&r);
}

/* ---- tests ---- */

static void every_expert_resident(void **state) {
    (void)state;
    for (int backend = 0; backend < MOE_TEST_CPU_BACKENDS; backend++)
        for (front f = DIRECT; f <= POLLED; f++) run_all(&(setup){.backend = backend, .front = f}, f != SLOW, false);
}

static void tiers(void **state) {
    (void)state;
    for (int backend = 0; backend < MOE_TEST_CPU_BACKENDS; backend++)
        for (moe_cold_experts cold = MOE_COLD_FETCH; cold <= MOE_COLD_AUTO; cold++)
            for (front f = DIRECT; f <= POLLED; f++)
                run_all(&(setup){.backend = backend,
                                 .front = f,
                                 .slots = TOP_K + 1 + backend,
                                 .images = 12 * backend,
                                 .cold = cold,
                                 .apart = f == SLOW && backend > 1},
                        f != SLOW, backend & 1);
}

/* Segments, jobs and copies in threads. */
static void threads(void **state) {
    (void)state;
    for (int ahead = 0; ahead < 2; ahead++) {
        run_all(&(setup){.backend = 1, .threads = 2}, ahead, false);
        for (moe_cold_experts cold = MOE_COLD_FETCH; cold <= MOE_COLD_AUTO; cold++)
            run_all(&(setup){.backend = 1, .threads = 2, .slots = 8, .images = ahead ? 9 : 0, .cold = cold}, ahead, ahead);
    }
}

/* One thing that may happen next. */
static void do_something(rig *r, stream *streams, int count, moe_random *random) {
    stream *s = &streams[moe_random_below(random, (uint64_t)count)];
    switch (moe_random_below(random, 6)) {
        case 0:
            if (r->slow.num_fills) moe_slow_end(&r->slow);
            break;
        case 1:
            if (r->slow.num_batches) moe_slow_end_batch(&r->slow);
            if (r->host.num_batches && moe_random_below(random, 2)) moe_slow_end_batch(&r->host);
            break;
        case 2:
            turn(r);
            break;
        case 3:
            s->late = !s->late;
            break;
        default:
            advance(s);
    }
    r->clock.fake_now_ns += (int64_t)moe_random_below(random, 1000);
}

static void in_any_order(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 60; seed++) {
        rig r;
        stream streams[STREAMS];
        moe_random random = {seed};
        const setup s = {.front = SLOW,
                         .slots = TOP_K + 1 + (int32_t)moe_random_below(&random, 12),
                         .images = moe_random_below(&random, 2) ? 2 + (int32_t)moe_random_below(&random, 20) : 0,
                         .cold = (moe_cold_experts)moe_random_below(&random, 3),
                         .apart = moe_random_below(&random, 2),
                         .num_streams = 1 + (int)moe_random_below(&random, STREAMS)};
        assert_true(rig_open(&r, &s));
        r.slow.slow_batches = r.host.slow_batches = true;
        for (int i = 0; i < s.num_streams; i++) {
            stream_open(&streams[i], &r, i, false);
            streams[i].foretells = moe_random_below(&random, 2);
        }
        for (int i = 0; i < MAX_TURNS && !all_over(streams, s.num_streams); i++) {
            do_something(&r, streams, s.num_streams, &random);
            if (i % 16 == 0) residency_check(r.residency);
        }
        if (!all_over(streams, s.num_streams)) fail_msg("seed %d stands still", (int)seed);
        assert_int_equal(r.num_told, s.num_streams * STEPS * LAYERS);
        for (int i = 0; i < s.num_streams; i++) stream_close(&streams[i]);
        rig_close(&r);
    }
}

/* ---- one call, seen closely ---- */

/* Of the distinct experts that a layer of a step routes to: those below `end`. */
static int32_t distinct_below(const story_step *step, int layer, int32_t end) {
    bool seen[EXPERTS] = {false};
    int32_t count = 0;
    for (int32_t i = 0; i < step->rows * TOP_K; i++) {
        int32_t e = step->experts[layer][i];
        count += e < end && !seen[e];
        seen[e] = true;
    }
    return count;
}

/* A stream whose first layer wants some of the experts that are in slots (the first of layer 0) and some that are not, and not more than
 * fit. Its first segment has ended. */
static void open_mixed(rig *r, stream *s, int32_t slots) {
    int found = 0;
    for (; found < STREAMS; found++) {
        int32_t warm = distinct_below(&r->stories[found].steps[0], 0, slots);
        int32_t all = distinct_below(&r->stories[found].steps[0], 0, EXPERTS);
        if (warm > 0 && all > warm + 1 && all <= slots) break;
    }
    assert_true(found < STREAMS);
    stream_open(s, r, found, false);
    assert_true(advance(s));
    assert_true(segment_ended(s));
}

static void open_one(rig *r, stream *s, moe_cold_experts cold) {
    const setup given = {.front = SLOW, .slots = 10, .cold = cold, .host_ns = 1e9, .num_streams = STREAMS};
    assert_true(rig_open(r, &given));
    r->slow.slow_batches = true;
    open_mixed(r, s, given.slots);
    r->slow.layers_submitted = 0;
}

/* Up to its logits, which are compared. */
static void finish_step(stream *s) {
    moe_slow_hurry(&s->rig->slow);
    for (int i = 0; i < 100 && s->step == 0; i++) {
        turn(s->rig);
        advance(s);
    }
    assert_int_equal(s->step, 1);
}

static void close_one(rig *r, stream *s) {
    stream_close(s);
    rig_close(r);
}

/* Slots that jobs read. */
static int32_t in_use(const rig *r) {
    int32_t count = 0;
    for (int32_t i = 0; i < r->residency->num_slots; i++) count += r->residency->slot[i].users > 0;
    return count;
}

/* What is ready goes at once; then, while that is out, only what ends the call. */
static void submitted_as_early_as_possible(void **state) {
    (void)state;
    rig r;
    stream s;
    open_one(&r, &s, MOE_COLD_FETCH);
    int32_t cold = distinct_below(s.story->steps, 0, EXPERTS) - distinct_below(s.story->steps, 0, 10);
    begin_layer(&s);
    moe_layer_call *call = &s.calls[0];
    for (int32_t i = 0; i < cold; i++) {
        assert_int_equal(r.slow.layers_submitted, 1);
        assert_false(call->submitted);
        moe_slow_end(&r.slow);
        turn(&r);
    }
    assert_int_equal(r.slow.num_batches, 2);
    assert_true(call->submitted && !call->ended);
    assert_int_equal(in_use(&r), distinct_below(s.story->steps, 0, EXPERTS));
    moe_slow_end_batch(&r.slow);
    turn(&r);
    assert_false(call->ended);
    assert_int_equal(in_use(&r), cold);
    moe_slow_end_batch(&r.slow);
    turn(&r);
    assert_true(call->ended);
    assert_int_equal(in_use(&r), 0);
    assert_int_equal(call->status, MOE_OK);
    moe_residency_counts c = moe_residency_counted(r.residency);
    assert_int_equal(c.hits, distinct_below(s.story->steps, 0, 10));
    assert_int_equal(c.misses, cold);
    finish_step(&s);
    close_one(&r, &s);
}

/* What was foretold is a hit once it has come, a late hit before; and a call of hits alone is one job. */
static void foretold(void **state) {
    (void)state;
    for (int come = 0; come < 2; come++) {
        rig r;
        stream s;
        assert_true(rig_open(&r, &(setup){.front = SLOW, .slots = 40}));
        stream_open(&s, &r, 0, false);
        foretell(&s, 2); /* in no slot yet */
        int32_t wanted = distinct_below(s.story->steps, 2, EXPERTS), warm = distinct_below(s.story->steps, 2, 40 - 2 * EXPERTS);
        assert_true(wanted > warm && r.slow.num_fills > 0);
        r.slow.at_once = come;
        while (come && r.slow.num_fills) moe_slow_end(&r.slow);
        turn(&r);
        moe_layer_call *call = &s.calls[2];
        submit_segment(&s, 0); /* so that there are inputs */
        s.segment = 2;
        begin_layer(&s);
        assert_int_equal(r.slow.layers_submitted, come || 2 * warm >= wanted || MOE_LAYER_RUN_SLOT_PARTS * warm >= 40);
        assert_int_equal(call->ended, come);
        moe_residency_counts c = moe_residency_counted(r.residency);
        assert_int_equal(c.hits, come ? wanted : warm);
        assert_int_equal(c.late_hits, come ? 0 : wanted - warm);
        assert_int_equal(c.misses, 0);
        moe_slow_hurry(&r.slow);
        turn(&r);
        assert_true(call->ended);
        /* only what made room, of what was there unasked */
        int64_t wasted = (int64_t)moe_residency_counted(r.residency).wasted_bytes;
        assert_int_equal(wasted, (wanted - warm) * moe_residency_image_bytes(r.residency));
        close_one(&r, &s);
    }
}

/* Copies that were announced go on while it cannot be chosen yet where their experts are computed; those that have come are the device's. */
static void announced_goes_on(void **state) {
    (void)state;
    rig r;
    stream s;
    assert_true(rig_open(&r, &(setup){.front = SLOW, .slots = 40, .cold = MOE_COLD_AUTO, .apart = true}));
    stream_open(&s, &r, 0, false);
    int32_t cold = distinct_below(s.story->steps, 2, EXPERTS) - distinct_below(s.story->steps, 2, 40 - 2 * EXPERTS);
    assert_true(cold > MOE_RESIDENCY_PIECES);
    foretell(&s, 2);
    submit_segment(&s, 0); /* so that there are inputs */
    s.segment = 2;
    begin_layer(&s);
    const moe_layer_call *call = &s.calls[2];
    for (int32_t i = 0; i < cold; i++) {
        assert_true(r.slow.num_fills > 0 && !call->submitted);
        moe_slow_end(&r.slow);
        turn(&r);
    }
    assert_true(call->ended && call->status == MOE_OK);
    assert_int_equal(moe_residency_counted(r.residency).host_experts, 0);
    close_one(&r, &s);
}

/* What the host computes is not copied as well, but for copies that had begun; and what its job costs beside computing is learnt. */
static void left_to_the_host(void **state) {
    (void)state;
    rig r;
    stream s;
    assert_true(rig_open(&r, &(setup){.front = SLOW, .slots = 40, .cold = MOE_COLD_AUTO, .apart = true, .host_ns = 1e-3}));
    stream_open(&s, &r, 0, false);
    int32_t cold = distinct_below(s.story->steps, 2, EXPERTS) - distinct_below(s.story->steps, 2, 40 - 2 * EXPERTS);
    assert_true(cold > MOE_RESIDENCY_PIECES);
    int64_t before = r.slow.fills_ended;
    r.host.slow_batches = true;
    moe_residency_costs(r.residency)->host.row_ns = 1e-3;
    foretell(&s, 2);
    submit_segment(&s, 0); /* so that there are inputs */
    s.segment = 2;
    begin_layer(&s);
    s.calls[2].activations = s.activations[0];
    turn(&r);
    assert_int_equal(r.host.num_batches, 1);
    assert_int_equal(r.host.batches[0]->num_groups, cold);
    while (r.slow.num_fills) {
        moe_slow_end(&r.slow);
        turn(&r);
    }
    assert_int_equal(r.slow.fills_ended - before, MOE_RESIDENCY_PIECES);
    r.clock.fake_now_ns += INT64_C(1000000000000);
    moe_slow_end_batch(&r.host);
    turn(&r);
    assert_true(s.calls[2].ended && s.calls[2].status == MOE_OK);
    assert_true(moe_residency_costs(r.residency)->host_job_ns == 50e3 / 16);
    close_one(&r, &s);
}

/* The host waits for what its experts are given, the device does not; its rows go with the last job. */
static void begun_before_its_inputs(void **state) {
    (void)state;
    rig r;
    stream s;
    open_one(&r, &s, MOE_COLD_HOST);
    const story_step *step = s.story->steps;
    int32_t cold = 0;
    for (int32_t i = 0; i < step->rows * TOP_K; i++) cold += step->experts[0][i] >= 10;
    begin_layer(&s);
    moe_layer_call *call = &s.calls[0];
    assert_int_equal(r.slow.num_batches, 1);
    moe_slow_end_batch(&r.slow);
    turn(&r);
    assert_int_equal(r.slow.num_batches, 0);
    assert_true(give(&s));
    turn(&r);
    assert_int_equal(r.slow.num_batches, 1);
    assert_non_null(r.slow.batches[0]);
    assert_int_equal(r.slow.batches[0]->num_assignments, cold);
    assert_false(call->submitted);
    moe_slow_end_batch(&r.slow);
    turn(&r);
    assert_int_equal(r.slow.num_batches, 1);
    assert_int_equal(r.slow.layers[0]->num_given, cold);
    assert_true(call->submitted && !call->ended);
    assert_int_equal(r.slow.fills_ended, 10); /* as it was at first */
    finish_step(&s);
    close_one(&r, &s);
}

/* Where that is chosen by costs, it is chosen when the host could begin; what is to be copied then is copied at once. */
static void chosen_with_its_inputs(void **state) {
    (void)state;
    rig r;
    stream s;
    open_one(&r, &s, MOE_COLD_AUTO);
    begin_layer(&s);
    turn(&r);
    assert_int_equal(r.slow.num_fills, 0);
    assert_true(give(&s));
    turn(&r);
    assert_true(r.slow.num_fills > 0);
    assert_int_equal(moe_residency_counted(r.residency).host_experts, 0);
    finish_step(&s);
    close_one(&r, &s);
}

static void *no_memory(moe_backend *b, size_t bytes) {
    (void)b;
    (void)bytes;
    return NULL;
}

/* Where there is no room for the host's rows, experts are copied. */
static void no_room_for_the_host(void **state) {
    (void)state;
    rig r;
    stream s;
    open_one(&r, &s, MOE_COLD_HOST);
    r.slow.ops.host_alloc = no_memory;
    finish_step(&s);
    assert_int_equal(moe_residency_counted(r.residency).host_experts, 0);
    close_one(&r, &s);
}

/* Nothing of a call is computed: a stall from when its segment has ended. */
static void stalls(void **state) {
    (void)state;
    static const struct {
        int64_t given_ns; /* the segment's end, from the call's beginning; 0: later than anything here */
        int64_t stall_ns; /* of 8 ms of waiting */
    } cases[] = {{-1, 8 * MOE_NS_PER_MS}, {3 * MOE_NS_PER_MS, 5 * MOE_NS_PER_MS}, {0, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rig r;
        stream s;
        open_one(&r, &s, MOE_COLD_FETCH);
        r.slow.slow_batches = false;
        begin_layer(&s);
        moe_layer_call *call = &s.calls[0];
        r.clock.fake_now_ns += 3 * MOE_NS_PER_MS;
        turn(&r);
        if (cases[i].given_ns) call->given_ns = START_NS + cases[i].given_ns;
        r.clock.fake_now_ns += 5 * MOE_NS_PER_MS;
        r.slow.at_once = true;
        while (r.slow.num_fills) moe_slow_end(&r.slow);
        turn(&r);
        assert_true(call->ended);
        assert_int_equal(call->stall_ns, cases[i].stall_ns);
        close_one(&r, &s);
    }
}

/* A copy that fails ends calls that have anything left to submit, once nothing of them is out. */
static void failed_copy(void **state) {
    (void)state;
    rig r;
    stream s;
    open_one(&r, &s, MOE_COLD_FETCH);
    begin_layer(&s);
    moe_layer_call *call = &s.calls[0];
    r.slow.fail_next = true;
    moe_slow_end(&r.slow);
    turn(&r);
    assert_int_equal(call->status, MOE_INTERNAL);
    assert_non_null(strstr(call->message, "the link is gone"));
    assert_false(call->ended);
    moe_slow_end_batch(&r.slow);
    turn(&r);
    assert_true(call->ended && !call->submitted);
    assert_int_equal(r.told, MOE_INTERNAL);
    begin_layer(&s); /* the tiers are of no more use */
    assert_true(call->ended && !call->submitted);
    assert_int_equal(call->status, MOE_INTERNAL);
    close_one(&r, &s);
}

/* A job that fails ends its call, and no other. */
static void failed_job(void **state) {
    (void)state;
    for (moe_cold_experts cold = MOE_COLD_FETCH; cold <= MOE_COLD_HOST; cold++) {
        rig r;
        stream s;
        open_one(&r, &s, cold);
        begin_layer(&s);
        give(&s);
        turn(&r);
        moe_layer_call *call = &s.calls[0];
        bool host = cold == MOE_COLD_HOST;
        assert_int_equal(r.slow.num_batches, host ? 2 : 1);
        if (host) moe_slow_end_batch(&r.slow);
        r.slow.fail_next_batch = true;
        moe_slow_end_batch(&r.slow);
        turn(&r);
        assert_true(call->ended && !call->submitted);
        assert_int_equal(call->status, MOE_INTERNAL);
        assert_non_null(strstr(call->message, "the computation failed"));
        residency_check(r.residency);
        moe_slow_hurry(&r.slow);
        r.num_told = 0;
        stream again;
        stream_open(&again, &r, 1, false);
        run_streams(&r, &again, 1);
        stream_close(&again);
        close_one(&r, &s);
    }
}

static void not_held(void **state) {
    (void)state;
    rig r;
    stream s;
    open_one(&r, &s, MOE_COLD_FETCH);
    const moe_layer_experts e = r.experts;
    memcpy(r.defect, "broken", 7);
    assert_false(e.ops->ready(e.ctx));
    r.defect[0] = '\0';
    assert_true(e.ops->ready(e.ctx));
    moe_shard_drop(&r.shard, 0, s.story->steps[0].experts[0][0]);
    assert_false(e.ops->ready(e.ctx));
    begin_layer(&s);
    assert_true(s.calls[0].ended && !s.calls[0].submitted);
    assert_int_equal(s.calls[0].status, MOE_UNAVAILABLE);
    moe_residency_counts c = moe_residency_counted(r.residency);
    assert_int_equal(c.hits + c.misses + c.late_hits, 0);
    close_one(&r, &s);
}

/* With the worker end the calls: those whose jobs run, those that wait for copies, and for their turn. */
static void closed_under_way(void **state) {
    (void)state;
    for (moe_cold_experts cold = MOE_COLD_FETCH; cold <= MOE_COLD_HOST; cold++) {
        rig r;
        stream streams[STREAMS];
        assert_true(rig_open(&r, &(setup){.backend = 1, .threads = 2, .slots = 8, .cold = cold, .num_streams = STREAMS}));
        for (int i = 0; i < STREAMS; i++) {
            stream_open(&streams[i], &r, i, false);
            assert_true(advance(&streams[i]));
            await(&streams[i].jobs[0]);
        }
        for (int i = 0; i < STREAMS; i++) begin_layer(&streams[i]);
        moe_layer_runs_close(&r.runs);
        for (int i = 0; i < STREAMS; i++) {
            const moe_layer_call *call = &streams[i].calls[0];
            assert_true(call->ended);
            assert_int_equal(call->status, call->submitted ? MOE_OK : MOE_UNAVAILABLE);
        }
        assert_int_equal(r.num_told, STREAMS);
        for (int i = 0; i < STREAMS; i++) stream_close(&streams[i]);
        assert_int_equal(moe_layer_runs_init(&r.runs, &(moe_layer_runs_config){.shard = &r.shard, .backend = r.backend}, NULL), MOE_OK);
        rig_close(&r);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_expert_resident),
        cmocka_unit_test(tiers),
        cmocka_unit_test(threads),
        cmocka_unit_test(in_any_order),
        cmocka_unit_test(submitted_as_early_as_possible),
        cmocka_unit_test(foretold),
        cmocka_unit_test(announced_goes_on),
        cmocka_unit_test(left_to_the_host),
        cmocka_unit_test(begun_before_its_inputs),
        cmocka_unit_test(chosen_with_its_inputs),
        cmocka_unit_test(no_room_for_the_host),
        cmocka_unit_test(stalls),
        cmocka_unit_test(failed_copy),
        cmocka_unit_test(failed_job),
        cmocka_unit_test(not_held),
        cmocka_unit_test(closed_under_way),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
