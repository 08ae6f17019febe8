#include "expert-worker/known_answer.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "common/random.h"

#define POLL_NS (100 * MOE_NS_PER_US)

static const int32_t rows_of_batch[MOE_KNOWN_ROWS] = {0, 1};

/* Multiples of 1/64 in [-1, 1]: the same values in float32 and bfloat16. */
static float known_value(moe_random *random) { return ((float)moe_random_below(random, 129) - 64.0f) / 64.0f; }

static moe_random seed_of(const moe_model *model, int32_t layer, int32_t expert) {
    return (moe_random){moe_mix64(model->digest ^ moe_mix64(((uint64_t)layer << 32) | (uint32_t)expert))};
}

moe_status moe_known_answer_compute(const moe_ops *reference, const moe_model *model, int32_t layer, int32_t expert,
                                    const moe_ffn_weights *weights, float **out, moe_error *err) {
    size_t count = (size_t)MOE_KNOWN_ROWS * (size_t)model->config.hidden;
    moe_random random = seed_of(model, layer, expert);
    float *x = moe_alloc_aligned(count, sizeof *x);
    *out = moe_alloc_aligned(count, sizeof **out);
    if (!x || !*out) {
        moe_free(x);
        moe_free(*out);
        *out = NULL;
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a known answer");
    }
    for (size_t i = 0; i < count; i++) x[i] = known_value(&random);
    reference->ffn(x, weights, MOE_KNOWN_ROWS, 0, MOE_FFN_BLOCKS, *out);
    moe_free(x);
    return MOE_OK;
}

void moe_known_check_init(moe_known_check *c, moe_backend *backend, moe_transport *transport) {
    *c = (moe_known_check){.backend = backend, .transport = transport};
    pthread_mutex_init(&c->mutex, NULL);
    pthread_cond_init(&c->ended, NULL);
}

static void on_done(moe_job *job) {
    moe_known_check *c = job->owner;
    pthread_mutex_lock(&c->mutex);
    c->job_done = true;
    c->transport->ops->wake(c->transport);
    pthread_cond_signal(&c->ended);
    pthread_mutex_unlock(&c->mutex);
}

static bool job_done(moe_known_check *c) {
    if (c->backend->ops->poll) c->backend->ops->poll(c->backend);
    pthread_mutex_lock(&c->mutex);
    bool done = c->job_done;
    pthread_mutex_unlock(&c->mutex);
    return done;
}

static void release(moe_known_check *c) {
    c->backend->ops->host_free(c->backend, c->x);
    c->backend->ops->host_free(c->backend, c->out);
    moe_free(c->answer);
    c->x = NULL;
    c->out = c->answer = NULL;
    c->running = false;
}

void moe_known_check_close(moe_known_check *c) {
    while (c->running && !job_done(c)) nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    release(c);
    pthread_cond_destroy(&c->ended);
    pthread_mutex_destroy(&c->mutex);
}

static void fill(moe_known_check *c, const moe_model *model) {
    moe_random random = seed_of(model, c->layer, c->expert);
    for (size_t i = 0; i < (size_t)MOE_KNOWN_ROWS * (size_t)c->hidden; i++) {
        float value = known_value(&random);
        if (c->backend->dtype == MOE_BF16)
            ((uint16_t *)c->x)[i] = moe_f32_to_bf16(value);
        else
            ((float *)c->x)[i] = value;
    }
}

moe_status moe_known_check_begin(moe_known_check *c, const moe_model *model, int32_t layer, int32_t expert, moe_expert *loaded,
                                 float *answer, moe_error *err) {
    MOE_ASSERT(!c->running);
    size_t count = (size_t)MOE_KNOWN_ROWS * (size_t)model->config.hidden;
    c->answer = answer;
    c->layer = layer;
    c->expert = expert;
    c->hidden = model->config.hidden;
    c->x = c->backend->ops->host_alloc(c->backend, count * moe_dtype_bytes(c->backend->dtype));
    c->out = c->backend->ops->host_alloc(c->backend, count * sizeof *c->out);
    if (!c->x || !c->out) {
        release(c);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a known-answer batch");
    }
    fill(c, model);
    for (size_t i = 0; i < count; i++) c->out[i] = NAN;
    c->group = (moe_ffn_group){.expert = loaded, .first = 0, .count = MOE_KNOWN_ROWS};
    c->batch = (moe_ffn_batch){.x = c->x,
                               .num_rows = MOE_KNOWN_ROWS,
                               .groups = &c->group,
                               .num_groups = 1,
                               .assignment_rows = rows_of_batch,
                               .num_assignments = MOE_KNOWN_ROWS,
                               .mode = MOE_COMBINE_EXACT,
                               .block_lo = 0,
                               .block_hi = MOE_FFN_BLOCKS,
                               .out = c->out};
    c->job = (moe_job){.done = on_done, .owner = c};
    c->job_done = false;
    c->running = true;
    c->backend->ops->ffn_submit(c->backend, &c->batch, &c->job);
    return MOE_OK;
}

static moe_status judge(const moe_known_check *c, moe_error *err) {
    size_t count = (size_t)MOE_KNOWN_ROWS * (size_t)c->hidden;
    float largest = 0, worst = 0, bound = c->backend->dtype == MOE_BF16 ? MOE_KNOWN_BOUND_BF16 : MOE_KNOWN_BOUND_F32;
    if (c->job.status != MOE_OK) return moe_fail(err, c->job.status, "%s", c->job.message);
    for (size_t i = 0; i < count; i++) {
        float off = fabsf(c->out[i] - c->answer[i]);
        if (!isfinite(off)) off = INFINITY;
        worst = off > worst ? off : worst;
        largest = fabsf(c->answer[i]) > largest ? fabsf(c->answer[i]) : largest;
    }
    if (worst <= bound * largest) return MOE_OK;
    return moe_fail(err, MOE_INTERNAL,
                    "expert %d of MoE layer %d fails its known-answer batch: off by %g where outputs go up to %g", c->expert,
                    c->layer, (double)worst, (double)largest);
}

bool moe_known_check_ended(moe_known_check *c) { return c->running && job_done(c); }

bool moe_known_check_end(moe_known_check *c, moe_status *verdict, moe_error *err) {
    if (!moe_known_check_ended(c)) return false;
    *verdict = judge(c, err);
    release(c);
    return true;
}
