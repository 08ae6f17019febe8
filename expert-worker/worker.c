#include "expert-worker/worker.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "expert-worker/worker_internal.h"

#define MAX_WAIT_NS (100 * MOE_NS_PER_MS)   /* of the worker's own thread; wake ends it earlier */
#define FAILED_STEP_NS (10 * MOE_NS_PER_MS) /* pause after a failure of the transport, so that it is not a busy loop */

static moe_status make_rpc(moe_worker *w, moe_error *err) {
    const moe_worker_config *c = &w->config;
    const moe_rpc_config config = {
        .transport = c->transport,
        .clock = c->clock,
        .hello = {.cluster_uuid = c->cluster_uuid,
                  .role = "worker",
                  .id = c->id,
                  .profile = c->backend->ops->profile(c->backend),
                  .incarnation = c->incarnation,
                  .model_digest = c->model->digest},
        .methods = moe_worker_methods,
        .ctx = w,
        .progress = moe_worker_progress,
        .on_peer_up = moe_worker_on_peer_up,
        .on_peer_down = moe_worker_on_peer_down,
    };
    return moe_rpc_new(&config, &w->rpc, err);
}

static moe_status make_control(moe_worker *w, moe_error *err) {
    const moe_worker_config *c = &w->config;
    const moe_control_config control = {.shard = &w->shard,
                                        .clock = c->clock,
                                        .rpc = &w->rpc,
                                        .transport = c->transport,
                                        .reference = c->reference,
                                        .worker_id = c->id,
                                        .incarnation = c->incarnation,
                                        .load_threads = c->load_threads,
                                        .copy_bytes_per_s = c->copy_bytes_per_s,
                                        .max_experts = c->max_experts};
    moe_status status = moe_control_init(&w->control, &control, err);
    w->control.epoch = c->known_epoch;
    w->control.fence = c->known_fence;
    return status;
}

static moe_status make_residency(moe_worker *w, moe_error *err) {
    const moe_worker_config *c = &w->config;
    const moe_residency_config residency = {.model = c->model,
                                            .backend = c->backend,
                                            .host = c->host,
                                            .transport = c->transport,
                                            .ended = &w->batcher.jobs_ended,
                                            .tiers = c->tiers,
                                            .timeline = c->timeline};
    const moe_model_config *model = &c->model->config;
    moe_status budget = moe_expert_budget_given(c->tiers.budget) ? moe_expert_budget_check(c->tiers.budget, model, err) : MOE_OK;
    if (budget != MOE_OK) return budget;
    if (!moe_tiers_wanted(&c->tiers, model)) {
        if (c->tiers.cold != MOE_COLD_FETCH)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "--cold-experts: needs --device-memory; without it every expert is on the device");
        if (!moe_memory_limited(c->tiers.host)) return MOE_OK;
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "--host-memory: needs --device-memory or --expert-budget; without it no expert is kept in host memory");
    }
    moe_status status = moe_residency_new(&residency, &w->residency, err);
    w->shard.residency = w->residency;
    return status;
}

static moe_status make_runs(moe_worker *w, moe_error *err) {
    const moe_worker_config *c = &w->config;
    const moe_layer_runs_config runs = {.shard = &w->shard,
                                        .backend = c->backend,
                                        .host = w->batcher.config.host,
                                        .transport = c->transport,
                                        .clock = c->clock,
                                        .timeline = c->timeline,
                                        .ended = &w->batcher.jobs_ended,
                                        .defect = moe_batcher_defect(&w->batcher),
                                        .told = moe_worker_layer_told,
                                        .ctx = w};
    return moe_layer_runs_init(&w->runs, &runs, err);
}

/* What computes and serves, on shard and residency. */
static moe_status make_service(moe_worker *w, moe_error *err) {
    moe_status status = make_runs(w, err);
    if (status != MOE_OK) return status;
    status = make_control(w, err);
    if (status == MOE_OK) {
        status = make_rpc(w, err);
        if (status != MOE_OK) moe_control_close(&w->control);
    }
    if (status != MOE_OK) moe_layer_runs_close(&w->runs);
    return status;
}

static moe_status make_parts(moe_worker *w, moe_error *err) {
    const moe_worker_config *c = &w->config;
    const moe_batcher_config batcher = {.shard = &w->shard,
                                        .backend = c->backend,
                                        .host = c->tiers.cold == MOE_COLD_FETCH ? NULL : c->host,
                                        .transport = c->transport,
                                        .clock = c->clock,
                                        .max_queued_calls = c->max_queued_calls,
                                        .max_batch_rows = c->max_batch_rows,
                                        .reference = c->reference,
                                        .threaded = c->load_threads > 0,
                                        .timeline = c->timeline,
                                        .answer = moe_worker_answer_forward,
                                        .ctx = w};
    moe_status status = moe_shard_init(&w->shard, c->model, c->backend, err);
    if (status != MOE_OK) return status;
    status = make_residency(w, err);
    if (status != MOE_OK) {
        moe_shard_free(&w->shard);
        return status;
    }
    status = moe_batcher_init(&w->batcher, &batcher, err);
    if (status == MOE_OK) {
        status = make_service(w, err);
        if (status != MOE_OK) moe_batcher_close(&w->batcher);
    }
    if (status != MOE_OK) {
        moe_shard_free(&w->shard);
        moe_residency_free(&w->residency);
    }
    return status;
}

/* By differences, since a process may have several workers. */
static void publish_metrics(const moe_worker_view *before, const moe_worker_view *now) {
    moe_metric_add(MOE_METRIC_WORKER_EXPERTS, now->experts - before->experts);
    moe_metric_add(MOE_METRIC_WORKER_WEIGHT_BYTES, now->weight_bytes - before->weight_bytes);
    moe_metric_add(MOE_METRIC_WORKER_QUEUED, now->queued_calls - before->queued_calls);
    moe_metric_add(MOE_METRIC_WORKER_ROUTERS, now->routers - before->routers);
}

static void publish_view(moe_worker *w) {
    pthread_mutex_lock(&w->view_mutex);
    moe_worker_view before = w->view;
    w->view = (moe_worker_view){.experts = w->shard.num_held,
                                .routers = w->num_routers,
                                .weight_bytes = w->shard.bytes,
                                .device_bytes = w->residency ? moe_residency_device_bytes(w->residency) : w->shard.bytes,
                                .rows = w->batcher.rows + w->runs.rows,
                                .queued_calls = w->batcher.num_queued,
                                .epoch = w->control.epoch,
                                .fence = w->control.fence};
    snprintf(w->view.defect, sizeof w->view.defect, "%s", moe_batcher_defect(&w->batcher));
    publish_metrics(&before, &w->view);
    pthread_mutex_unlock(&w->view_mutex);
}

moe_status moe_worker_new(const moe_worker_config *config, moe_worker **out, moe_error *err) {
    if (config->max_queued_calls < 1 || config->max_batch_rows < 1)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "worker: max_queued_calls %d and max_batch_rows %d must be at least 1",
                        config->max_queued_calls, config->max_batch_rows);
    moe_worker *w = moe_calloc(1, sizeof *w);
    if (!w) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the worker");
    w->config = *config;
    moe_status status = make_parts(w, err);
    if (status != MOE_OK) {
        moe_free(w);
        return status;
    }
    pthread_mutex_init(&w->view_mutex, NULL);
    moe_rpc_set_known(w->rpc, w->control.epoch, w->control.fence);
    publish_view(w);
    *out = w;
    return MOE_OK;
}

void moe_worker_free(moe_worker **worker) {
    moe_worker *w = *worker;
    if (!w) return;
    moe_worker_stop(w);
    moe_layer_runs_close(&w->runs);
    moe_batcher_close(&w->batcher);
    moe_control_close(&w->control);
    moe_rpc_free(&w->rpc);
    moe_kept_map_free(&w->map);
    moe_shard_free(&w->shard);
    moe_residency_free(&w->residency);
    publish_metrics(&w->view, &(moe_worker_view){0});
    pthread_mutex_destroy(&w->view_mutex);
    moe_free(w);
    *worker = NULL;
}

static bool turn(moe_worker *w) {
    bool more = moe_batcher_turn(&w->batcher);
    return (moe_layer_runs_active(&w->runs) && moe_layer_runs_turn(&w->runs)) || more;
}

moe_status moe_worker_step(moe_worker *w, int64_t deadline_ns, moe_error *err) {
    bool more = turn(w);
    w->control.serving = w->batcher.rows + w->runs.rows > 0;
    more |= moe_control_turn(&w->control);
    if (w->control.defect[0]) moe_recheck_condemn(&w->batcher.recheck, w->control.defect);
    moe_rpc_set_known(w->rpc, w->control.epoch, w->control.fence);
    w->config.transport->computing = w->batcher.under_way || moe_layer_runs_active(&w->runs);
    int64_t due_ns = moe_control_due_ns(&w->control);
    if (due_ns < deadline_ns) deadline_ns = due_ns;
    moe_status status = moe_rpc_step(w->rpc, more ? 0 : deadline_ns, err);
    turn(w);
    publish_view(w);
    return status;
}

void moe_worker_leave(moe_worker *w) { atomic_store(&w->leaving, true); }

void moe_worker_get_view(moe_worker *w, moe_worker_view *out) {
    pthread_mutex_lock(&w->view_mutex);
    *out = w->view;
    pthread_mutex_unlock(&w->view_mutex);
}

moe_status moe_worker_resize(moe_worker *w, moe_memory_limit device, moe_cold_experts cold, double *copy_bytes_per_s,
                             moe_error *err) {
    MOE_ASSERT(w->residency && !w->has_thread);
    return moe_residency_resize(w->residency, device, cold, copy_bytes_per_s, err);
}

moe_cold_costs moe_worker_cold_costs(const moe_worker *w) {
    bool chooses = w->residency && moe_residency_cold(w->residency) == MOE_COLD_AUTO;
    return chooses ? *moe_residency_costs(w->residency) : (moe_cold_costs){.copy_byte_ns = 0};
}

moe_expert *const *moe_worker_lend_experts(moe_worker *w) { return moe_shard_lend(&w->shard); }

moe_layer_experts moe_worker_layer_experts(moe_worker *w) {
    MOE_ASSERT(!w->has_thread);
    return moe_layer_runs_experts(&w->runs);
}

bool moe_worker_has_work(moe_worker *w) {
    return moe_control_has_work(&w->control) || moe_layer_runs_has_work(&w->runs) || moe_batcher_polls(&w->batcher) ||
           moe_batcher_can_start(&w->batcher);
}

static void *run(void *ctx) {
    moe_worker *w = ctx;
    moe_error err;
    while (!atomic_load(&w->stop)) {
        if (moe_worker_step(w, moe_now_ns(w->config.clock) + MAX_WAIT_NS, &err) == MOE_OK) continue;
        moe_error_log("worker %s: %s", w->config.id, err.message);
        nanosleep(&(struct timespec){.tv_nsec = FAILED_STEP_NS}, NULL);
    }
    return NULL;
}

moe_status moe_worker_start(moe_worker *w, moe_error *err) {
    MOE_ASSERT(!w->has_thread);
    atomic_store(&w->stop, false);
    int failed = pthread_create(&w->thread, NULL, run, w);
    if (failed) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "could not start the worker's thread: %s", strerror(failed));
    w->has_thread = true;
    return MOE_OK;
}

void moe_worker_stop(moe_worker *w) {
    if (!w->has_thread) return;
    atomic_store(&w->stop, true);
    moe_rpc_wake(w->rpc);
    pthread_join(w->thread, NULL);
    w->has_thread = false;
}
