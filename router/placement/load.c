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
    moe_free(job->sources);
    moe_free(job);
}

void moe_jobs_remove(moe_jobs *jobs, int32_t index) {
    job_free(jobs->items[index]);
    jobs->items[index] = jobs->items[--jobs->count];
}

void moe_jobs_clear(moe_jobs *jobs) {
    while (jobs->count) moe_jobs_remove(jobs, jobs->count - 1);
}

bool moe_jobs_has(const moe_jobs *jobs, const char *id, int32_t worker) {
    for (int32_t i = 0; i < jobs->count; i++)
        if (strcmp(jobs->items[i]->id, id) == 0 || (worker >= 0 && jobs->items[i]->worker == worker)) return true;
    return false;
}

/* A job without experts yet, and room for `total`; NULL: out of memory. */
static moe_load_job *job_new(moe_jobs *jobs, moe_controller *c, int32_t total, const char *id, uint64_t incarnation) {
    moe_load_job *job = moe_calloc(1, sizeof *job);
    if (job) {
        job->controller = c;
        job->experts = moe_calloc((size_t)total, sizeof *job->experts);
        job->digests = moe_calloc((size_t)total, sizeof *job->digests);
    }
    if (!job || !job->experts || !job->digests || jobs->count == MOE_PLACEMENT_MAX_WORKERS) {
        if (job) job_free(job);
        return NULL;
    }
    snprintf(job->id, sizeof job->id, "%s", id);
    job->incarnation = incarnation;
    job->worker = -1;
    job->epoch = c->highest_epoch;
    job->fence = c->leading ? c->fence : c->highest_fence;
    jobs->items[jobs->count++] = job;
    return job;
}

bool moe_jobs_add_share(moe_jobs *jobs, moe_controller *c, const moe_placement *map, int32_t worker, const char *id,
                        uint64_t incarnation) {
    int32_t total = map->num_layers * map->num_experts;
    moe_load_job *job = job_new(jobs, c, total, id, incarnation);
    if (!job) return false;
    job->worker = worker;
    for (int32_t i = 0; i < total; i++) {
        if (moe_placement_has(&map->entries[i], worker)) job->experts[job->num_experts++] = i;
    }
    return true;
}

/* Whom to copy an expert from: AUTO reads the checkpoint where a holder's machine is the destination's, whose memory has its pages
 * already. */
static int32_t choose_source(moe_controller *c, const moe_member *to, int32_t expert) {
    const moe_placement_entry *e = &c->map->entries[expert];
    int32_t source = -1;
    if (c->config.balance.copy_from == MOE_COPY_FILE) return -1;
    for (int32_t r = 0; r < e->num_replicas; r++) {
        int32_t w = e->replicas[r].worker;
        if (!moe_controller_serves(c, c->map, w)) continue;
        bool same_host = strcmp(moe_controller_member(c, c->map->workers[w].id)->host, to->host) == 0;
        if (same_host && c->config.balance.copy_from == MOE_COPY_AUTO) return -1;
        if (source < 0) source = w;
    }
    return source;
}

bool moe_jobs_add_experts(moe_jobs *jobs, moe_controller *c, const moe_member *to, const int32_t *experts, int32_t count) {
    moe_load_job *job = job_new(jobs, c, count, to->identity.id, to->identity.incarnation);
    if (!job) return false;
    job->sources = moe_calloc((size_t)count, sizeof *job->sources);
    if (!job->sources) {
        moe_jobs_remove(jobs, jobs->count - 1);
        return false;
    }
    memcpy(job->experts, experts, (size_t)count * sizeof *experts);
    job->num_experts = count;
    for (int32_t i = 0; i < count; i++) job->sources[i] = choose_source(c, to, experts[i]);
    return true;
}

bool moe_job_covers_share(const moe_load_job *job, const moe_placement *map) {
    int32_t at = 0;
    for (int32_t i = 0; i < map->num_layers * map->num_experts; i++) {
        if (!moe_placement_has(&map->entries[i], job->worker)) continue;
        while (at < job->num_experts && job->experts[at] < i) at++;
        if (at == job->num_experts || job->experts[at] != i) return false;
    }
    return true;
}

/* Exactly the experts of the chunk, each once, by the incarnation that was asked, with a digest. */
static moe_status take_report(moe_load_job *job, const Moesaic__V1__LoadResponse *report, moe_error *err) {
    int32_t experts_per_layer = job->controller->config.num_experts, chunk = job->chunk;
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
    if (answered && ++job->refusals == MOE_LOAD_MAX_REFUSALS && m && !job->sources)
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

/* What a migration asks for beyond a share's load. The map may have changed since the source was chosen. */
static void add_source(const moe_load_job *job, Moesaic__V1__LoadRequest *request, uint64_t *digests) {
    const moe_placement *map = job->controller->map;
    int32_t source = job->sources[job->num_loaded];
    request->verify = true;
    request->digests = digests;
    request->n_digests = request->n_experts;
    if (source < 0 || source >= map->num_workers || !moe_controller_serves(job->controller, map, source)) return;
    request->source_endpoint = map->workers[source].endpoint;
    request->source_incarnation = map->workers[source].incarnation;
}

static void start_chunk(moe_load_job *job, moe_peer peer) {
    moe_controller *c = job->controller;
    Moesaic__V1__ExpertId ids[MOE_LOAD_CHUNK_EXPERTS], *pointers[MOE_LOAD_CHUNK_EXPERTS];
    uint64_t digests[MOE_LOAD_CHUNK_EXPERTS];
    Moesaic__V1__LoadRequest request;
    moesaic__v1__load_request__init(&request);
    request.epoch = job->epoch;
    request.fence = job->fence;
    request.incarnation = job->incarnation;
    request.experts = pointers;
    for (int32_t i = job->num_loaded; i < job->num_experts && request.n_experts < MOE_LOAD_CHUNK_EXPERTS; i++) {
        if (job->sources && job->sources[i] != job->sources[job->num_loaded]) break; /* one source a call */
        digests[request.n_experts] = job->sources ? c->map->entries[job->experts[i]].digest : 0;
        Moesaic__V1__ExpertId *id = &ids[request.n_experts];
        moesaic__v1__expert_id__init(id);
        id->layer = (uint32_t)(job->experts[i] / c->config.num_experts);
        id->expert = (uint32_t)(job->experts[i] % c->config.num_experts);
        pointers[request.n_experts++] = id;
    }
    job->chunk = (int32_t)request.n_experts;
    if (job->sources) add_source(job, &request, digests);
    request.following = (uint32_t)(job->num_experts - job->num_loaded) - (uint32_t)request.n_experts;
    moe_error err = {0};
    int64_t deadline = moe_controller_now(c) + MOE_LOAD_TIMEOUT_NS;
    moe_status status =
        moe_rpc_call_start(c->rpc, peer, LOAD_METHOD, &request.base, NULL, 0, deadline, on_loaded, job, &job->call_id, &err);
    job->calling = status == MOE_OK;
    job->called_ns = moe_controller_now(c);
    if (status) job_failed(job, status, err.message);
}

/* A call that was lost, or a worker that gets nowhere: asked again, which does no harm; what it has loaded stays. */
static void end_silent_call(moe_load_job *job, const moe_rpc_peer *peer, int64_t now) {
    int64_t since = peer && peer->progress_at_ns > job->called_ns ? peer->progress_at_ns : job->called_ns;
    if (now - since < MOE_LOAD_SILENCE_NS) return;
    moe_rpc_cancel(job->controller->rpc, job->call_id);
    job->calling = false;
}

void moe_jobs_step(moe_jobs *jobs, moe_controller *c) {
    int64_t now = moe_controller_now(c);
    for (int32_t i = 0; i < jobs->count; i++) {
        moe_load_job *job = jobs->items[i];
        if (moe_load_job_done(job) || now < job->retry_at_ns) continue;
        const moe_member *m = moe_controller_member(c, job->id);
        const moe_rpc_peer *peer =
            m && m->refused_incarnation != job->incarnation ? moe_controller_peer_of(c, m, job->incarnation) : NULL;
        if (job->calling) end_silent_call(job, peer, now);
        if (peer && !job->calling) start_chunk(job, peer->peer);
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
