#include "expert-worker/batcher.h"

#include <stdio.h>

#include "common/alloc.h"
#include "common/backend_poll.h"
#include "common/failpoint.h"
#include "common/metrics.h"

#define MOE_BATCHER_DEFECTIVE "this worker is defective and leaves the cluster"

static void finish(moe_batcher *b, moe_work *w) {
    b->calls++;
    b->config.answer(b->config.ctx, w);
    moe_work_free(w, b->config.shard, &b->blocks);
}

static void judged(void *ctx, moe_work *w) { finish(ctx, w); }

moe_status moe_batcher_init(moe_batcher *b, const moe_batcher_config *config, moe_error *err) {
    int32_t num_experts = config->shard->model->config.num_experts;
    *b = (moe_batcher){.config = *config, .blocks = {.backend = config->backend}, .next = 1};
    TAILQ_INIT(&b->queue);
    const moe_recheck_config recheck = {.shard = config->shard,
                                        .backend = config->backend,
                                        .transport = config->transport,
                                        .reference = config->reference,
                                        .threaded = config->threaded,
                                        .judged = judged,
                                        .ctx = b};
    moe_recheck_init(&b->recheck, &recheck);
    pthread_mutex_init(&b->mutex, NULL);
    pthread_cond_init(&b->ended, NULL);
    moe_status status = moe_batch_init(&b->batches[0], config->backend, num_experts, err);
    if (status == MOE_OK) status = moe_batch_init(&b->batches[1], config->backend, num_experts, err);
    if (status != MOE_OK) moe_batcher_close(b);
    return status;
}

static void fail(moe_batcher *b, moe_work *w, moe_status status, const char *message) {
    w->status = status;
    snprintf(w->message, sizeof w->message, "%s", message);
    finish(b, w);
}

static void take_from_queue(moe_batcher *b, moe_work *w) {
    TAILQ_REMOVE(&b->queue, w, link);
    w->queued = false;
}

static bool is_dead(const moe_batcher *b, const moe_work *w) {
    return w->call->cancelled || w->call->deadline_ns <= moe_now_ns(b->config.clock);
}

/* A call that was never computed ends because nobody waits for it. */
static void bury(moe_batcher *b, moe_work *w) {
    b->num_queued--;
    if (w->call->deadline_ns <= moe_now_ns(b->config.clock)) {
        b->expired++;
        moe_metric_add(MOE_METRIC_WORKER_EXPIRED, 1);
        fail(b, w, MOE_DEADLINE_EXCEEDED, "the deadline passed before the computation began");
    } else {
        fail(b, w, MOE_CANCELLED, "cancelled by the caller");
    }
}

static void on_cancel(moe_rpc_call *call) {
    moe_work *w = call->owner;
    if (!w->queued) return;
    take_from_queue(w->batcher, w);
    bury(w->batcher, w);
}

moe_status moe_batcher_add(moe_batcher *b, const moe_forward_call *decoded, moe_rpc_call *call, moe_error *err) {
    if (moe_batcher_defect(b)[0]) return moe_fail(err, MOE_UNAVAILABLE, MOE_BATCHER_DEFECTIVE);
    if (b->num_queued >= b->config.max_queued_calls)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d calls are queued, the most that this worker takes", b->num_queued);
    moe_work *w = moe_work_new(decoded, call, b->config.shard, &b->blocks, moe_now_ns(b->config.clock));
    if (!w) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a call of %d rows", decoded->rows);
    call->owner = w;
    call->on_cancel = on_cancel;
    w->batcher = b;
    w->queued = true;
    TAILQ_INSERT_TAIL(&b->queue, w, link);
    b->num_queued++;
    return MOE_OK;
}

static void on_job_done(moe_job *job) {
    moe_batcher *b = job->owner;
    /* The wake is inside the lock, so that whoever sees job_done may free batcher and transport. */
    pthread_mutex_lock(&b->mutex);
    b->job_done = true;
    atomic_fetch_add(&b->jobs_ended, 1);
    if (!pthread_equal(pthread_self(), b->submitter)) b->config.transport->ops->wake(b->config.transport);
    pthread_cond_signal(&b->ended);
    pthread_mutex_unlock(&b->mutex);
}

static bool job_done(moe_batcher *b) {
    pthread_mutex_lock(&b->mutex);
    bool done = b->job_done;
    pthread_mutex_unlock(&b->mutex);
    return done;
}

/* Moves what fits from the queue into the next batch, in order: the first alike call that is too large ends it. */
static void fill_next(moe_batcher *b) {
    moe_batch *next = &b->batches[b->next];
    moe_work *w, *following;
    for (w = TAILQ_FIRST(&b->queue); w && next->assignments < b->config.max_batch_rows; w = following) {
        following = TAILQ_NEXT(w, link);
        if (is_dead(b, w)) {
            take_from_queue(b, w);
            bury(b, w);
        } else if (moe_batch_fits(next, w, b->config.max_batch_rows)) {
            take_from_queue(b, w);
            moe_batch_add(next, w);
        } else if (moe_batch_fits(next, w, INT32_MAX)) {
            return;
        }
    }
}

static void remove_dead(moe_batcher *b, moe_batch *batch) {
    moe_work *w, *following;
    for (w = TAILQ_FIRST(&batch->works); w; w = following) {
        following = TAILQ_NEXT(w, link);
        if (!is_dead(b, w)) continue;
        moe_batch_remove(batch, w);
        bury(b, w);
    }
}

static void set_failed(moe_work *w, moe_status status, const char *message) {
    w->status = status;
    snprintf(w->message, sizeof w->message, "%s", message);
}

/* Ends all calls of a batch with its outcome; what throws doubt on this worker is looked into first. */
static void answer_batch(moe_batcher *b, moe_batch *batch, moe_status status, const char *message, bool doubtful) {
    moe_work *w;
    while ((w = TAILQ_FIRST(&batch->works))) {
        moe_batch_remove(batch, w);
        w->compute_ns = b->batch_compute_ns;
        w->copy_ns = b->batch_copy_ns;
        w->stall_ns = b->batch_stall_ns;
        if (status == MOE_OK)
            moe_work_check_finite(w, b->config.shard);
        else
            set_failed(w, status, message);
        bool look = w->status != MOE_OK && doubtful;
        if (status != MOE_OK) doubtful = false; /* one call of a failed batch stands for all */
        if (!look || !moe_recheck_add(&b->recheck, w)) finish(b, w);
    }
    moe_batch_trim(batch);
}

static void assemble_next(moe_batcher *b) {
    moe_error err;
    moe_batch *next = &b->batches[b->next];
    if (moe_batch_empty(next) || next->assembled) return;
    if (moe_batch_assemble(next, b->config.shard, &err) == MOE_OK) return;
    b->num_queued -= next->num_works;
    answer_batch(b, next, err.code, err.message, false);
}

static void observe_start(moe_batcher *b, const moe_batch *batch) {
    int64_t now_ns = moe_now_ns(b->config.clock);
    moe_work *w;
    TAILQ_FOREACH(w, &batch->works, link) {
        w->started_ns = now_ns;
        moe_metric_observe_ns(MOE_METRIC_WORKER_QUEUE, now_ns - w->arrived_ns);
    }
    moe_metric_observe_count(MOE_METRIC_WORKER_BATCH_ROWS, batch->assignments);
    moe_metric_observe_count(MOE_METRIC_WORKER_BATCH_EXPERTS, batch->ffn.num_groups);
    moe_metric_add(MOE_METRIC_WORKER_ROWS, batch->assignments);
    b->rows += (uint64_t)batch->assignments;
}

static void submit(moe_batcher *b, const moe_ffn_batch *ffn) {
    b->busy = true;
    b->submitter = pthread_self(); /* this and the next: no job, so no other thread */
    b->job_done = false;
    b->job.done = on_job_done;
    b->job.owner = b;
    b->job.compute_ns = b->job.copy_ns = 0;
    atomic_store(&b->job.progress, 0);
    b->config.backend->ops->ffn_submit(b->config.backend, ffn, &b->job);
}

/* Ends the running batch, whose passes were given up, without results. */
static void fail_running(moe_batcher *b, moe_status status, const char *message) {
    moe_passes_give_up(&b->passes);
    b->stalled_since_ns = 0;
    answer_batch(b, &b->batches[b->running], status, message, status == MOE_INTERNAL);
}

/* Submits what is ready of the running batch; the time until something is counts as stalled. */
static void start_pass(moe_batcher *b) {
    const moe_ffn_batch *ffn;
    moe_error err;
    int64_t now_ns = moe_now_ns(b->config.clock);
    const moe_error *lost = moe_residency_failure(b->config.shard->residency);
    if (lost) {
        fail_running(b, lost->code, lost->message);
        return;
    }
    if (moe_passes_next(&b->passes, &ffn, &err) != MOE_OK) {
        fail_running(b, err.code, err.message);
        return;
    }
    if (!ffn) {
        if (!b->stalled_since_ns) b->stalled_since_ns = now_ns;
        return;
    }
    if (b->stalled_since_ns) b->batch_stall_ns += now_ns - b->stalled_since_ns;
    b->stalled_since_ns = 0;
    submit(b, ffn);
}

static void start_next(moe_batcher *b) {
    moe_batch *next = &b->batches[b->next];
    moe_error err;
    remove_dead(b, next);
    assemble_next(b);
    if (moe_batch_empty(next)) return;
    b->num_queued -= next->num_works;
    b->running = b->next;
    b->next = 1 - b->running;
    b->batch_compute_ns = b->batch_copy_ns = b->batch_stall_ns = 0;
    observe_start(b, next);
    if (!b->config.shard->residency) {
        submit(b, &next->ffn);
    } else if (moe_passes_begin(&b->passes, next, b->config.shard, &err) == MOE_OK) {
        moe_residency_turn(b->config.shard->residency); /* its copies before those for later */
        start_pass(b);
    } else {
        fail_running(b, err.code, err.message);
    }
}

static void end_running(moe_batcher *b) {
    moe_error err;
    moe_batch *batch = &b->batches[b->running];
    moe_status status = b->job.status;
    b->busy = false;
    b->ticks += atomic_load(&b->job.progress) + 1;
    b->batch_compute_ns += b->job.compute_ns;
    b->batch_copy_ns += b->job.copy_ns;
    b->compute_ns += (uint64_t)b->job.compute_ns;
    if (status != MOE_OK) {
        fail_running(b, status, b->job.message);
        return;
    }
    if (b->passes.batch && !moe_passes_ended(&b->passes)) return;
    moe_work *w;
    TAILQ_FOREACH(w, &batch->works, link) {
        moe_metric_observe_ns(MOE_METRIC_WORKER_COMPUTE, b->batch_compute_ns);
        moe_metric_observe_ns(MOE_METRIC_WORKER_COPY, b->batch_copy_ns);
    }
    b->stall_ns += (uint64_t)b->batch_stall_ns;
    status = moe_batch_deliver(batch, b->config.shard, &err);
    answer_batch(b, batch, status, status == MOE_OK ? "" : err.message, status == MOE_OK);
}

bool moe_batcher_polls(const moe_batcher *b) {
    const moe_residency *residency = b->config.shard->residency;
    bool outstanding = b->busy || (residency && moe_residency_copying(residency));
    return (outstanding && b->config.backend->ops->poll) || moe_recheck_polls(&b->recheck);
}

bool moe_batcher_can_start(const moe_batcher *b) {
    moe_residency *residency = b->config.shard->residency;
    if (residency && moe_residency_has_work(residency)) return true;
    return !b->busy && !b->passes.batch && b->num_queued > 0;
}

/* What is still queued when the worker turns out to be defective goes to other replicas. */
static void refuse_queued(moe_batcher *b) {
    moe_work *w;
    while ((w = TAILQ_FIRST(&b->queue))) {
        take_from_queue(b, w);
        b->num_queued--;
        fail(b, w, MOE_UNAVAILABLE, MOE_BATCHER_DEFECTIVE);
    }
    b->num_queued -= b->batches[b->next].num_works;
    answer_batch(b, &b->batches[b->next], MOE_UNAVAILABLE, MOE_BATCHER_DEFECTIVE, false);
}

/* Begins what can begin; false where something is computed, or waits for copies. */
static bool start(moe_batcher *b) {
    if (b->busy) return false;
    if (b->passes.batch)
        start_pass(b);
    else
        start_next(b);
    if (!b->busy || !job_done(b)) return false;
    end_running(b); /* it was computed inside the submission */
    return b->passes.batch != NULL;
}

bool moe_batcher_turn(moe_batcher *b) {
    moe_residency *residency = b->config.shard->residency;
    if (b->busy || (residency && moe_residency_copying(residency))) moe_backend_poll(b->config.backend, &b->jobs_ended);
    if (residency) moe_residency_turn(residency);
    if (b->busy && job_done(b)) end_running(b);
    moe_recheck_turn(&b->recheck);
    if (moe_batcher_defect(b)[0]) refuse_queued(b);
    fill_next(b);
    if (b->busy) {
        assemble_next(b);
        return moe_batcher_polls(b);
    }
    while (start(b)) moe_residency_turn(residency);
    moe_recheck_turn(&b->recheck);
    return moe_batcher_polls(b) || moe_batcher_can_start(b);
}

uint64_t moe_batcher_progress(const moe_batcher *b) {
    return b->ticks + (b->busy ? atomic_load(&b->job.progress) : 0);
}

static void wait_for_job(moe_batcher *b) {
    while (!job_done(b) && moe_backend_poll(b->config.backend, &b->jobs_ended)) continue;
    pthread_mutex_lock(&b->mutex);
    while (!b->job_done) pthread_cond_wait(&b->ended, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
}

void moe_batcher_close(moe_batcher *b) {
    if (b->busy) {
        wait_for_job(b);
        end_running(b);
    }
    if (b->passes.batch) fail_running(b, MOE_UNAVAILABLE, "the worker stops");
    moe_recheck_close(&b->recheck);
    answer_batch(b, &b->batches[b->next], MOE_UNAVAILABLE, "the worker stops", false);
    moe_work *w;
    while ((w = TAILQ_FIRST(&b->queue))) {
        take_from_queue(b, w);
        fail(b, w, MOE_UNAVAILABLE, "the worker stops");
    }
    for (int i = 0; i < 2; i++) moe_batch_free(&b->batches[i]);
    moe_blocks_free(&b->blocks);
    pthread_cond_destroy(&b->ended);
    pthread_mutex_destroy(&b->mutex);
}
