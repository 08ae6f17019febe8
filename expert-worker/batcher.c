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
    b->lanes[MOE_PASS_DEVICE] = (moe_batcher_lane){.batcher = b, .backend = config->backend};
    b->lanes[MOE_PASS_HOST] = (moe_batcher_lane){.batcher = b, .backend = config->host};
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
    moe_batcher_lane *lane = job->owner;
    moe_batcher *b = lane->batcher;
    /* The wake is inside the lock, so that whoever sees `done` may free batcher and transport. */
    pthread_mutex_lock(&b->mutex);
    lane->done = true;
    atomic_fetch_add(&b->jobs_ended, 1);
    if (!pthread_equal(pthread_self(), lane->submitter)) b->config.transport->ops->wake(b->config.transport);
    pthread_cond_signal(&b->ended);
    pthread_mutex_unlock(&b->mutex);
}

static bool job_done(moe_batcher_lane *lane) {
    pthread_mutex_lock(&lane->batcher->mutex);
    bool done = lane->done;
    pthread_mutex_unlock(&lane->batcher->mutex);
    return done;
}

static bool busy(const moe_batcher *b) { return b->lanes[MOE_PASS_DEVICE].busy || b->lanes[MOE_PASS_HOST].busy; }

/* Two backends compute side by side, one takes turns. */
static int64_t batch_compute_ns(const moe_batcher *b) {
    int64_t device_ns = b->lanes[MOE_PASS_DEVICE].compute_ns, host_ns = b->lanes[MOE_PASS_HOST].compute_ns;
    if (b->config.host == b->config.backend) return device_ns + host_ns;
    return device_ns > host_ns ? device_ns : host_ns;
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
    int32_t all = batch->assignments;
    while ((w = TAILQ_FIRST(&batch->works))) {
        moe_batch_remove(batch, w);
        double share = (double)w->assignments / all; /* calls of one layer may be in one batch, or in several */
        w->compute_ns = (int64_t)(share * (double)batch_compute_ns(b));
        w->host_ns = b->lanes[MOE_PASS_HOST].compute_ns;
        w->copy_ns = (int64_t)(share * (double)b->batch_copy_ns);
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

static int32_t running_layer(const moe_batcher *b) { return TAILQ_FIRST(&b->batches[b->running].works)->layer; }

static void submit(moe_batcher_lane *lane, const moe_ffn_batch *ffn) {
    lane->busy = true;
    lane->submitter = pthread_self(); /* this and the next: no job of this lane, so no other thread */
    lane->done = false;
    lane->began_ns = moe_timeline_now(lane->batcher->config.timeline);
    lane->submitted_ns = moe_now_ns(lane->batcher->config.clock);
    lane->experts = ffn->num_groups;
    lane->rows = ffn->num_assignments;
    lane->job = (moe_job){.done = on_job_done, .owner = lane};
    lane->backend->ops->ffn_submit(lane->backend, ffn, &lane->job);
}

/* Ends the running batch without results; nothing of it is with a backend. */
static void fail_running(moe_batcher *b) {
    moe_passes_give_up(&b->passes);
    b->stalled_since_ns = 0;
    b->under_way = false;
    answer_batch(b, &b->batches[b->running], b->failure.code, b->failure.message, b->failure.code == MOE_INTERNAL);
}

static void deliver_running(moe_batcher *b) {
    moe_error err;
    moe_batch *batch = &b->batches[b->running];
    moe_work *w;
    TAILQ_FOREACH(w, &batch->works, link) {
        moe_metric_observe_ns(MOE_METRIC_WORKER_COMPUTE, batch_compute_ns(b));
        moe_metric_observe_ns(MOE_METRIC_WORKER_COPY, b->batch_copy_ns);
    }
    b->compute_ns += (uint64_t)batch_compute_ns(b);
    b->stall_ns += (uint64_t)b->batch_stall_ns;
    b->under_way = false;
    moe_status status = moe_batch_deliver(batch, b->config.shard, &err);
    answer_batch(b, batch, status, status == MOE_OK ? "" : err.message, status == MOE_OK);
}

/* Submits what is ready of the running batch to the lanes that are free. */
static void start_passes(moe_batcher *b) {
    const moe_ffn_batch *ffn;
    const moe_error *lost = moe_residency_failure(b->config.shard->residency);
    if (lost && b->failure.code == MOE_OK) b->failure = *lost;
    for (int place = 0; place < MOE_PASS_PLACES && b->failure.code == MOE_OK; place++) {
        moe_batcher_lane *lane = &b->lanes[place];
        if (lane->busy || !lane->backend) continue;
        if (moe_passes_next(&b->passes, (moe_pass_place)place, &ffn, &b->failure) == MOE_OK && ffn) submit(lane, ffn);
    }
}

/* The time in which nothing of the batch is computed counts as stalled; now_ns: before what is ready was submitted, which may have
 * been computed inside its submission. */
static void watch_stall(moe_batcher *b, int64_t now_ns) {
    if (!busy(b)) {
        if (!b->stalled_since_ns) b->stalled_since_ns = now_ns;
        return;
    }
    if (b->stalled_since_ns) {
        b->batch_stall_ns += now_ns - b->stalled_since_ns;
        moe_timeline_span(b->config.timeline, MOE_TIMELINE_STALL, running_layer(b), 0, b->stalled_since_ns, now_ns);
    }
    b->stalled_since_ns = 0;
}

/* Takes the next batch into work, where there is one. */
static void begin_next(moe_batcher *b) {
    moe_batch *next = &b->batches[b->next];
    remove_dead(b, next);
    assemble_next(b);
    if (moe_batch_empty(next)) return;
    b->num_queued -= next->num_works;
    b->running = b->next;
    b->next = 1 - b->running;
    b->under_way = true;
    b->failure = (moe_error){.code = MOE_OK};
    b->lanes[MOE_PASS_DEVICE].compute_ns = b->lanes[MOE_PASS_HOST].compute_ns = 0;
    b->batch_copy_ns = b->batch_stall_ns = 0;
    observe_start(b, next);
    if (!b->config.shard->residency)
        submit(&b->lanes[MOE_PASS_DEVICE], &next->ffn);
    else if (moe_passes_begin(&b->passes, next, b->config.shard, &b->failure) == MOE_OK)
        moe_residency_turn(b->config.shard->residency); /* its copies before those for later */
}

static void observe_costs(moe_batcher *b, const moe_batcher_lane *lane) {
    moe_cold_costs *costs = moe_residency_costs(b->config.shard->residency);
    moe_cold_compute *cost = lane == &b->lanes[MOE_PASS_HOST] ? &costs->host : &costs->device;
    moe_cold_observe_compute(cost, lane->experts, lane->rows, lane->job.compute_ns);
    if (b->config.host == b->config.backend)
        costs->host = costs->device = *cost; /* what is copied is computed no faster */
    else if (cost == &costs->host)
        moe_cold_observe_fixed(&costs->host_job_ns, moe_now_ns(b->config.clock) - lane->submitted_ns - lane->job.compute_ns);
}

static void end_job(moe_batcher *b, moe_batcher_lane *lane) {
    moe_timeline_kind kind = lane == &b->lanes[MOE_PASS_HOST] ? MOE_TIMELINE_HOST : MOE_TIMELINE_PASS;
    lane->busy = false;
    moe_timeline_add(b->config.timeline, kind, running_layer(b), lane->experts, lane->began_ns);
    b->ticks += atomic_load(&lane->job.progress) + 1;
    lane->compute_ns += lane->job.compute_ns;
    b->batch_copy_ns += lane->job.copy_ns;
    if (lane->job.status != MOE_OK) {
        if (b->failure.code == MOE_OK) moe_fail(&b->failure, lane->job.status, "%s", lane->job.message);
    } else if (b->passes.batch) {
        observe_costs(b, lane);
        moe_passes_ended(&b->passes, (moe_pass_place)(lane - b->lanes));
    }
}

/* Takes in the jobs that have ended, and ends the batch where they were its last. True where there were any. */
static bool end_jobs(moe_batcher *b) {
    bool any = false;
    for (int place = 0; place < MOE_PASS_PLACES; place++) {
        moe_batcher_lane *lane = &b->lanes[place];
        if (!lane->busy || !job_done(lane)) continue;
        end_job(b, lane);
        any = true;
    }
    if (!b->under_way || busy(b)) return any;
    if (b->failure.code != MOE_OK)
        fail_running(b);
    else if (any && !b->passes.batch)
        deliver_running(b);
    return any;
}

bool moe_batcher_polls(const moe_batcher *b) {
    const moe_residency *residency = b->config.shard->residency;
    const moe_batcher_lane *host = &b->lanes[MOE_PASS_HOST];
    bool outstanding = b->lanes[MOE_PASS_DEVICE].busy || (residency && moe_residency_copying(residency));
    return (outstanding && b->config.backend->ops->poll) || (host->busy && host->backend->ops->poll) || moe_recheck_polls(&b->recheck);
}

bool moe_batcher_can_start(const moe_batcher *b) {
    moe_residency *residency = b->config.shard->residency;
    if (residency && moe_residency_has_work(residency)) return true;
    return !b->under_way && b->num_queued > 0;
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

/* Begins what can begin. True where something has ended inside its submission, or copies are to begin: there may be more to do. */
static bool start(moe_batcher *b) {
    if (!b->under_way) begin_next(b);
    if (!b->under_way) return false;
    bool wants_copies = false;
    if (b->passes.batch) {
        int64_t now_ns = moe_now_ns(b->config.clock);
        start_passes(b);
        watch_stall(b, now_ns);
        wants_copies = b->passes.groups.wants_copies;
        b->passes.groups.wants_copies = false;
    }
    return (end_jobs(b) || wants_copies) && b->under_way;
}

static void poll_lanes(moe_batcher *b) {
    moe_residency *residency = b->config.shard->residency;
    moe_batcher_lane *device = &b->lanes[MOE_PASS_DEVICE], *host = &b->lanes[MOE_PASS_HOST];
    bool copying = residency && moe_residency_copying(residency);
    if (device->busy || (b->under_way && copying))
        moe_backend_poll(device->backend, &b->jobs_ended);
    else if (copying && device->backend->ops->poll) /* for later, or for an engine in this process, which has jobs of its own */
        device->backend->ops->poll(device->backend);
    if (host->busy && host->backend != device->backend) moe_backend_poll(host->backend, &b->jobs_ended);
}

bool moe_batcher_turn(moe_batcher *b) {
    moe_residency *residency = b->config.shard->residency;
    poll_lanes(b);
    if (residency) moe_residency_turn(residency);
    end_jobs(b);
    moe_recheck_turn(&b->recheck);
    if (moe_batcher_defect(b)[0]) refuse_queued(b);
    fill_next(b);
    if (busy(b)) assemble_next(b);
    while (start(b)) moe_residency_turn(residency);
    moe_recheck_turn(&b->recheck);
    return moe_batcher_polls(b) || moe_batcher_can_start(b);
}

uint64_t moe_batcher_progress(const moe_batcher *b) {
    uint64_t ticks = b->ticks;
    for (int place = 0; place < MOE_PASS_PLACES; place++)
        if (b->lanes[place].busy) ticks += atomic_load(&b->lanes[place].job.progress);
    return ticks;
}

static void wait_for_job(moe_batcher_lane *lane) {
    moe_batcher *b = lane->batcher;
    while (!job_done(lane) && moe_backend_poll(lane->backend, &b->jobs_ended)) continue;
    pthread_mutex_lock(&b->mutex);
    while (!lane->done) pthread_cond_wait(&b->ended, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
}

void moe_batcher_close(moe_batcher *b) {
    for (int place = 0; place < MOE_PASS_PLACES; place++)
        if (b->lanes[place].busy) wait_for_job(&b->lanes[place]);
    end_jobs(b);
    if (b->under_way) {
        moe_fail(&b->failure, MOE_UNAVAILABLE, "the worker stops");
        fail_running(b);
    }
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
