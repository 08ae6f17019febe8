#include "expert-worker/layer_runs.h"

#include <stdio.h>

#include "common/metrics.h"

/* ---- jobs ---- */

/* The wake is inside the lock, so that whoever saw `done` and took the lock may free runs and transport. */
static void on_job_done(moe_job *job) {
    moe_run_job *j = job->owner;
    moe_layer_runs *runs = j->owner;
    bool inside = pthread_equal(pthread_self(), j->submitter); /* the submission, or a poll: a turn follows */
    pthread_mutex_lock(&runs->mutex);
    atomic_fetch_add(runs->config.ended, 1);
    atomic_store(&j->done, true);
    if (!inside) runs->config.transport->ops->wake(runs->config.transport);
    pthread_cond_signal(&runs->ended);
    pthread_mutex_unlock(&runs->mutex);
}

static bool other_on_host(const moe_layer_runs *runs, const moe_layer_run *run) {
    for (int i = 0; i < MOE_LAYER_RUNS; i++)
        if (&runs->runs[i] != run && runs->runs[i].jobs[MOE_RUN_HOST].out) return true;
    return false;
}

static void submit(moe_layer_runs *runs, const moe_layer_run *run, moe_run_job *j) {
    bool host = j->place == MOE_PASS_HOST;
    moe_backend *backend = host ? runs->config.host : runs->config.backend;
    j->owner = runs;
    j->submitter = pthread_self();
    j->began_ns = moe_now_ns(runs->config.clock);
    j->queued = host && other_on_host(runs, run);
    j->job = (moe_job){.done = on_job_done, .owner = j};
    atomic_store(&j->done, false);
    if (host)
        backend->ops->ffn_submit(backend, &j->batch, &j->job);
    else
        backend->ops->layer_ffn_submit(backend, run->call->base, &j->ffn, &j->job);
}

static void fail(moe_layer_call *call, moe_status status, const char *message) {
    if (call->status != MOE_OK) return;
    call->status = status;
    snprintf(call->message, sizeof call->message, "%.250s", message);
}

static void observe_costs(const moe_layer_runs *runs, const moe_run_job *j) {
    if (!runs->config.shard->residency) return;
    moe_cold_costs *costs = moe_residency_costs(runs->config.shard->residency);
    moe_cold_compute *cost = j->place == MOE_PASS_HOST ? &costs->host : &costs->device;
    moe_cold_observe_compute(cost, j->experts, j->rows, j->job.compute_ns);
    if (runs->config.host == runs->config.backend) {
        costs->host = costs->device = *cost; /* what is copied is computed no faster */
        return;
    }
    if (j->place == MOE_PASS_HOST && !j->queued)
        moe_cold_observe_fixed(&costs->host_job_ns, moe_now_ns(runs->config.clock) - j->began_ns - j->job.compute_ns);
    if (j->place == MOE_PASS_DEVICE && j->experts == 0) moe_cold_observe_fixed(&costs->host_rows_ns, j->job.compute_ns);
}

/* A pass may have waited for the layer's segment, or for the pass before: shown is the time that it was computed. */
static void note(const moe_layer_runs *runs, moe_layer_run *run, const moe_run_job *j) {
    bool host = j->place == MOE_PASS_HOST;
    int64_t now_ns = moe_now_ns(runs->config.clock), began_ns = now_ns - j->job.compute_ns;
    if (began_ns < j->began_ns) began_ns = j->began_ns;
    if (!host && began_ns < run->shown_ns) began_ns = run->shown_ns;
    if (!host) run->shown_ns = now_ns;
    moe_timeline_span(runs->config.timeline, host ? MOE_TIMELINE_HOST : MOE_TIMELINE_PASS, run->call->layer, j->experts, began_ns, now_ns);
}

static void end_job(moe_layer_runs *runs, moe_layer_run *run, moe_run_job *j) {
    moe_layer_call *call = run->call;
    note(runs, run, j);
    runs->ticks += atomic_load(&j->job.progress) + 1;
    *(j->place == MOE_PASS_HOST ? &call->host_ns : &call->expert_ns) += j->job.compute_ns;
    if (j->job.status != MOE_OK)
        fail(call, j->job.status, j->job.message);
    else
        observe_costs(runs, j);
    moe_layer_run_job_ended(run, j);
}

static bool has_ended(const moe_run_job *j) { return j->out && atomic_load(&j->done); }

static bool any_ended(const moe_layer_runs *runs) {
    for (int i = 0; i < MOE_LAYER_RUNS; i++)
        for (int k = 0; k < MOE_RUN_JOBS; k++)
            if (has_ended(&runs->runs[i].jobs[k])) return true;
    return false;
}

/* ---- calls ---- */

static void end_call(moe_layer_runs *runs, moe_layer_call *call) {
    moe_metric_observe_ns(MOE_METRIC_WORKER_COMPUTE, call->expert_ns);
    runs->calls++;
    runs->compute_ns += (uint64_t)call->expert_ns;
    runs->config.told(runs->config.ctx, call);
    call->ended = true;
}

static void observe_start(moe_layer_runs *runs, const moe_layer_run *run) {
    int32_t assignments = run->call->num_rows * runs->config.shard->model->config.top_k;
    moe_metric_observe_count(MOE_METRIC_WORKER_BATCH_ROWS, assignments);
    moe_metric_observe_count(MOE_METRIC_WORKER_BATCH_EXPERTS, run->groups.count);
    moe_metric_add(MOE_METRIC_WORKER_ROWS, assignments);
    runs->rows += (uint64_t)assignments;
}

/* It has been computed, or has failed and nothing of it is out. */
static bool is_over(const moe_layer_run *run) {
    return !moe_layer_run_busy(run) && (run->call->status != MOE_OK || run->call->submitted);
}

/* Takes in the run's jobs that have ended, and ends its call where it is over. */
static void take_in(moe_layer_runs *runs, moe_layer_run *run) {
    moe_layer_call *call = run->call;
    for (int k = 0; k < MOE_RUN_JOBS; k++)
        if (has_ended(&run->jobs[k])) end_job(runs, run, &run->jobs[k]);
    if (!is_over(run)) return;
    moe_layer_run_end(run);
    end_call(runs, call);
}

/* Calls that wait begin where runs are free. */
static void begin_waiting(moe_layer_runs *runs) {
    moe_residency *residency = runs->config.shard->residency;
    for (int i = 0; i < MOE_LAYER_RUNS && runs->waiting; i++) {
        moe_error err;
        moe_layer_run *run = &runs->runs[i];
        moe_layer_call *call = runs->waiting;
        if (run->call) continue;
        runs->waiting = call->next;
        if (!runs->waiting) runs->waiting_tail = &runs->waiting;
        if (moe_layer_run_begin(run, call, &err) == MOE_OK) {
            observe_start(runs, run);
            if (residency) moe_residency_turn(residency); /* its copies before those for later */
        } else {
            fail(call, err.code, err.message);
            end_call(runs, call);
        }
    }
}

/* The time in which nothing of the call is computed counts as stalled, from when there was something to compute. now_ns: before what
 * is ready was submitted, which may have been computed inside its submission. */
static void watch_stall(const moe_layer_runs *runs, moe_layer_run *run, int64_t now_ns) {
    moe_layer_call *call = run->call;
    if (!moe_layer_run_busy(run)) {
        if (!run->stalled_since_ns) run->stalled_since_ns = now_ns;
        return;
    }
    int64_t from_ns = run->stalled_since_ns > call->given_ns ? run->stalled_since_ns : call->given_ns;
    if (run->stalled_since_ns && call->given_ns && from_ns < now_ns) {
        call->stall_ns += now_ns - from_ns;
        moe_timeline_span(runs->config.timeline, MOE_TIMELINE_STALL, call->layer, 0, from_ns, now_ns);
    }
    run->stalled_since_ns = 0;
}

static void start_jobs(moe_layer_runs *runs, moe_layer_run *run) {
    static const moe_pass_place places[] = {MOE_PASS_DEVICE, MOE_PASS_HOST};
    moe_residency *residency = runs->config.shard->residency;
    const moe_error *lost = residency ? moe_residency_failure(residency) : NULL;
    if (lost && !run->call->submitted) fail(run->call, lost->code, lost->message);
    if (run->call->status != MOE_OK || run->call->submitted) return;
    int64_t now_ns = moe_now_ns(runs->config.clock);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        moe_run_job *j = moe_layer_run_next(run, places[i]);
        if (j) submit(runs, run, j);
    }
    watch_stall(runs, run, now_ns);
    run->call->submitted = moe_layer_run_submitted(run);
}

static void for_calls(moe_layer_runs *runs, void (*what)(moe_layer_runs *, moe_layer_run *)) {
    for (int i = 0; i < MOE_LAYER_RUNS; i++)
        if (runs->runs[i].call) what(runs, &runs->runs[i]);
}

/* Whether a call can begin, has come to its end, or wants copies that it did not want before. */
static bool can_go_on(const moe_layer_runs *runs) {
    for (int i = 0; i < MOE_LAYER_RUNS; i++) {
        const moe_layer_run *run = &runs->runs[i];
        if (run->call ? is_over(run) || run->groups.wants_copies : runs->waiting != NULL) return true;
    }
    return false;
}

static void clear_wants(moe_layer_runs *runs, moe_layer_run *run) {
    (void)runs;
    run->groups.wants_copies = false;
}

/* Ends, begins and submits until nothing more has ended inside its submission. */
static void advance(moe_layer_runs *runs) {
    moe_residency *residency = runs->config.shard->residency;
    do {
        for_calls(runs, clear_wants);
        if (residency) moe_residency_turn(residency);
        for_calls(runs, take_in);
        begin_waiting(runs);
        for_calls(runs, start_jobs);
    } while (any_ended(runs) || can_go_on(runs));
}

/* ---- polled backends ---- */

static bool is_out(const moe_layer_runs *runs, moe_pass_place place) {
    for (int i = 0; i < MOE_LAYER_RUNS; i++)
        for (int k = 0; k < MOE_RUN_JOBS; k++)
            if (runs->runs[i].jobs[k].out && runs->runs[i].jobs[k].place == place) return true;
    return false;
}

/* Whether jobs or copies of calls are with a backend that is polled. */
static bool polls(const moe_layer_runs *runs, moe_pass_place place) {
    const moe_residency *residency = runs->config.shard->residency;
    const moe_backend *backend = place == MOE_PASS_HOST ? runs->config.host : runs->config.backend;
    bool copying = place == MOE_PASS_DEVICE && residency && moe_residency_copying(residency);
    return backend && backend->ops->poll && (is_out(runs, place) || copying);
}

static void poll(const moe_layer_runs *runs) {
    moe_backend *device = runs->config.backend, *host = runs->config.host;
    if (polls(runs, MOE_PASS_DEVICE)) device->ops->poll(device);
    if (polls(runs, MOE_PASS_HOST)) host->ops->poll(host);
}

/* ---- the engine's side ---- */

static bool ready(void *ctx) {
    const moe_layer_runs *runs = ctx;
    const moe_model_config *model = &runs->config.shard->model->config;
    return !runs->config.defect[0] && runs->config.shard->num_held == model->num_moe_layers * model->num_experts;
}

static bool wants_activations(void *ctx) {
    const moe_layer_runs *runs = ctx;
    const moe_residency *residency = runs->config.shard->residency;
    return residency && runs->config.host && moe_residency_cold(residency) != MOE_COLD_FETCH;
}

static void foretell(void *ctx, uint64_t step, int32_t layer, const uint32_t *experts, int32_t count) {
    const moe_layer_runs *runs = ctx;
    moe_residency *residency = runs->config.shard->residency;
    if (!residency) return;
    for (int32_t i = 0; i < count; i++) moe_residency_hint(residency, moe_layer_run_step(step), layer, (int32_t)experts[i]);
    moe_residency_turn(residency);
}

static void begin(void *ctx, moe_layer_call *call) {
    moe_layer_runs *runs = ctx;
    call->submitted = call->ended = false;
    call->status = MOE_OK;
    call->message[0] = '\0';
    call->expert_ns = call->stall_ns = call->host_ns = 0;
    call->next = NULL;
    *runs->waiting_tail = call;
    runs->waiting_tail = &call->next;
    advance(runs);
}

static bool turn(void *ctx) { return moe_layer_runs_turn(ctx); }

moe_layer_experts moe_layer_runs_experts(moe_layer_runs *runs) {
    static const moe_layer_experts_ops ops = {
        .ready = ready, .wants_activations = wants_activations, .foretell = foretell, .begin = begin, .turn = turn};
    return (moe_layer_experts){&ops, runs};
}

/* ---- the worker's side ---- */

moe_status moe_layer_runs_init(moe_layer_runs *runs, const moe_layer_runs_config *config, moe_error *err) {
    *runs = (moe_layer_runs){.config = *config};
    runs->waiting_tail = &runs->waiting;
    pthread_mutex_init(&runs->mutex, NULL);
    pthread_cond_init(&runs->ended, NULL);
    moe_status status = MOE_OK;
    for (int i = 0; i < MOE_LAYER_RUNS && status == MOE_OK; i++)
        status = moe_layer_run_init(&runs->runs[i], config->shard, config->backend, config->host, err);
    if (status != MOE_OK) moe_layer_runs_close(runs);
    return status;
}

bool moe_layer_runs_active(const moe_layer_runs *runs) {
    for (int i = 0; i < MOE_LAYER_RUNS; i++)
        if (runs->runs[i].call) return true;
    return runs->waiting != NULL;
}

bool moe_layer_runs_has_work(const moe_layer_runs *runs) {
    moe_residency *residency = runs->config.shard->residency;
    return any_ended(runs) || polls(runs, MOE_PASS_DEVICE) || polls(runs, MOE_PASS_HOST) ||
           (residency && moe_residency_has_work(residency));
}

bool moe_layer_runs_turn(moe_layer_runs *runs) {
    poll(runs);
    advance(runs);
    return moe_layer_runs_has_work(runs);
}

uint64_t moe_layer_runs_progress(const moe_layer_runs *runs) {
    uint64_t ticks = runs->ticks;
    for (int i = 0; i < MOE_LAYER_RUNS; i++)
        for (int k = 0; k < MOE_RUN_JOBS; k++)
            if (runs->runs[i].jobs[k].out) ticks += atomic_load(&runs->runs[i].jobs[k].job.progress);
    return ticks;
}

static void wait_for(moe_layer_runs *runs, const moe_run_job *j) {
    moe_backend *backend = j->place == MOE_PASS_HOST ? runs->config.host : runs->config.backend;
    while (backend->ops->poll && !atomic_load(&j->done)) backend->ops->poll(backend);
    pthread_mutex_lock(&runs->mutex);
    while (!atomic_load(&j->done)) pthread_cond_wait(&runs->ended, &runs->mutex);
    pthread_mutex_unlock(&runs->mutex);
}

static void give_up(moe_layer_runs *runs, moe_layer_run *run) {
    if (!run->call->submitted) fail(run->call, MOE_UNAVAILABLE, "the worker stops");
    for (int k = 0; k < MOE_RUN_JOBS; k++)
        if (run->jobs[k].out) wait_for(runs, &run->jobs[k]);
    take_in(runs, run);
}

void moe_layer_runs_close(moe_layer_runs *runs) {
    for_calls(runs, give_up);
    for (moe_layer_call *call = runs->waiting; call; call = runs->waiting) {
        runs->waiting = call->next;
        fail(call, MOE_UNAVAILABLE, "the worker stops");
        end_call(runs, call);
    }
    for (int i = 0; i < MOE_LAYER_RUNS; i++) moe_layer_run_free(&runs->runs[i]);
    pthread_cond_destroy(&runs->ended);
    pthread_mutex_destroy(&runs->mutex);
}
