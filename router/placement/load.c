/* Load jobs: a worker is told, chunk by chunk, to load the experts of a share, and reports their digests. */
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "router/placement/controller_internal.h"

#define LOAD_METHOD "/moesaic.v1.WorkerService/Load"

static void job_free(moe_load_job *job) {
    if (job->calling) moe_rpc_cancel(job->controller->rpc, job->call_id);
    moe_free(job->experts);
    moe_free(job->digests);
    moe_free(job);
}

void moe_jobs_remove(moe_jobs *jobs, int32_t index) {
    job_free(jobs->items[index]);
    jobs->items[index] = jobs->items[--jobs->count];
}

void moe_jobs_clear(moe_jobs *jobs) {
    while (jobs->count) moe_jobs_remove(jobs, jobs->count - 1);
}

bool moe_jobs_add_share(moe_jobs *jobs, moe_controller *c, const moe_placement *map, int32_t worker, const char *id,
                        uint64_t incarnation) {
    int32_t total = map->num_layers * map->num_experts;
    moe_load_job *job = moe_calloc(1, sizeof *job);
    if (job) {
        job->controller = c;
        job->experts = moe_calloc((size_t)total, sizeof *job->experts);
        job->digests = moe_calloc((size_t)total, sizeof *job->digests);
    }
    if (!job || !job->experts || !job->digests || jobs->count == MOE_PLACEMENT_MAX_WORKERS) {
        if (job) job_free(job);
        return false;
    }
    snprintf(job->id, sizeof job->id, "%s", id);
    job->incarnation = incarnation;
    job->worker = worker;
    job->epoch = c->highest_epoch;
    job->fence = c->leading ? c->fence : c->highest_fence;
    for (int32_t i = 0; i < total; i++) {
        if (moe_placement_has(&map->entries[i], worker)) job->experts[job->num_experts++] = i;
    }
    jobs->items[jobs->count++] = job;
    return true;
}

/* Exactly the experts of the chunk, each once, by the incarnation that was asked, with a digest. */
static moe_status take_report(moe_load_job *job, const Moesaic__V1__LoadResponse *report, moe_error *err) {
    int32_t experts_per_layer = job->controller->config.num_experts, chunk = job->num_experts - job->num_loaded;
    if (chunk > MOE_LOAD_CHUNK_EXPERTS) chunk = MOE_LOAD_CHUNK_EXPERTS;
    uint64_t found[MOE_LOAD_CHUNK_EXPERTS] = {0};
    if (report->incarnation != job->incarnation || report->n_loaded != (size_t)chunk) {
        return moe_fail(err, MOE_INTERNAL, "it reports %zu experts where %d were asked for, or is another process",
                        report->n_loaded, chunk);
    }
    for (size_t i = 0; i < report->n_loaded; i++) {
        const Moesaic__V1__LoadedExpert *loaded = report->loaded[i];
        int32_t at = 0;
        while (at < chunk &&
               !(loaded->id && (int64_t)loaded->id->layer == job->experts[job->num_loaded + at] / experts_per_layer &&
                 (int64_t)loaded->id->expert == job->experts[job->num_loaded + at] % experts_per_layer)) {
            at++;
        }
        if (at == chunk || found[at] || loaded->digest == 0) {
            return moe_fail(err, MOE_INTERNAL, "it reports an expert that was not asked for, one twice, or no digest");
        }
        found[at] = loaded->digest;
    }
    memcpy(job->digests + job->num_loaded, found, (size_t)chunk * sizeof *found);
    job->num_loaded += chunk;
    return MOE_OK;
}

static void job_failed(moe_load_job *job, moe_status status, const char *message) {
    moe_controller *c = job->controller;
    bool outbid = c->leading && c->highest_fence > c->fence; /* then the lead is claimed anew */
    bool answered = status != MOE_UNAVAILABLE && status != MOE_DEADLINE_EXCEEDED && status != MOE_CANCELLED && !outbid;
    job->backoff_ns = job->backoff_ns ? 2 * job->backoff_ns : MOE_LOAD_FIRST_BACKOFF_NS;
    if (job->backoff_ns > MOE_LOAD_MAX_BACKOFF_NS) job->backoff_ns = MOE_LOAD_MAX_BACKOFF_NS;
    job->retry_at_ns = moe_controller_now(c) + job->backoff_ns;
    moe_warn("worker %s: loading experts failed: %s: %s", job->id, moe_status_name(status), message);
    moe_member *m = moe_controller_member(c, job->id);
    if (answered && ++job->refusals == MOE_LOAD_MAX_REFUSALS && m)
        moe_member_refuse(m, job->incarnation, "it fails to load its experts");
}

static void on_loaded(void *ctx, const moe_rpc_reply *reply) {
    moe_load_job *job = ctx;
    moe_error err = {0};
    const Moesaic__V1__LoadResponse *report = (const Moesaic__V1__LoadResponse *)reply->body;
    job->calling = false;
    if (report) moe_controller_learn(job->controller, 0, report->fence);
    if (reply->status != MOE_OK) {
        job_failed(job, reply->status, reply->message);
        return;
    }
    moe_status status = take_report(job, report, &err);
    if (status) {
        job_failed(job, status, err.message);
    } else {
        job->backoff_ns = 0;
        if (moe_load_job_done(job)) moe_info("worker %s has loaded %d experts", job->id, job->num_experts);
    }
}

static void start_chunk(moe_load_job *job, moe_peer peer) {
    moe_controller *c = job->controller;
    Moesaic__V1__ExpertId ids[MOE_LOAD_CHUNK_EXPERTS], *pointers[MOE_LOAD_CHUNK_EXPERTS];
    Moesaic__V1__LoadRequest request;
    moesaic__v1__load_request__init(&request);
    request.epoch = job->epoch;
    request.fence = job->fence;
    request.incarnation = job->incarnation;
    request.experts = pointers;
    for (int32_t i = job->num_loaded; i < job->num_experts && request.n_experts < MOE_LOAD_CHUNK_EXPERTS; i++) {
        Moesaic__V1__ExpertId *id = &ids[request.n_experts];
        moesaic__v1__expert_id__init(id);
        id->layer = (uint32_t)(job->experts[i] / c->config.num_experts);
        id->expert = (uint32_t)(job->experts[i] % c->config.num_experts);
        pointers[request.n_experts++] = id;
    }
    request.following = (uint32_t)(job->num_experts - job->num_loaded) - (uint32_t)request.n_experts;
    moe_error err = {0};
    int64_t deadline = moe_controller_now(c) + MOE_LOAD_TIMEOUT_NS;
    moe_status status =
        moe_rpc_call_start(c->rpc, peer, LOAD_METHOD, &request.base, NULL, 0, deadline, on_loaded, job, &job->call_id, &err);
    job->calling = status == MOE_OK;
    if (status) job_failed(job, status, err.message);
}

void moe_jobs_step(moe_jobs *jobs, moe_controller *c) {
    int64_t now = moe_controller_now(c);
    for (int32_t i = 0; i < jobs->count; i++) {
        moe_load_job *job = jobs->items[i];
        if (job->calling || moe_load_job_done(job) || now < job->retry_at_ns) continue;
        const moe_member *m = moe_controller_member(c, job->id);
        const moe_rpc_peer *peer =
            m && m->refused_incarnation != job->incarnation ? moe_controller_peer_of(c, m, job->incarnation) : NULL;
        if (peer) start_chunk(job, peer->peer);
    }
}

bool moe_job_agrees(const moe_load_job *job, moe_placement *map) {
    for (int32_t i = 0; i < job->num_experts; i++) {
        uint64_t *known = &map->entries[job->experts[i]].digest;
        if (*known && *known != job->digests[i]) {
            moe_error_log("worker %s: layer %d expert %d has digest %016llx, the cluster's is %016llx", job->id,
                          job->experts[i] / map->num_experts, job->experts[i] % map->num_experts,
                          (unsigned long long)job->digests[i], (unsigned long long)*known);
            return false;
        }
        *known = job->digests[i];
    }
    return true;
}
