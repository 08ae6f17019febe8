/* The RPC handlers of a worker: ExpertService, WorkerService, Health. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/random.h"
#include "expert-worker/loaded_list.h"
#include "expert-worker/worker_internal.h"

uint64_t moe_worker_progress(void *ctx) {
    const moe_worker *w = ctx;
    return moe_batcher_progress(&w->batcher) + moe_layer_runs_progress(&w->runs) + w->control.loaded;
}

moe_status moe_worker_on_peer_up(void *ctx, const moe_rpc_peer *peer, moe_error *err) {
    moe_worker *w = ctx;
    bool router = strcmp(peer->claimed_role, "router") == 0;
    if (!router && !peer->cluster_uuid[0]) return MOE_OK; /* of no cluster: it asks for health, and brings nothing */
    if (strcmp(peer->cluster_uuid, w->config.cluster_uuid) != 0)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s belongs to cluster %s, not %s", w->config.id,
                        w->config.cluster_uuid, peer->cluster_uuid);
    if (peer->model_digest != 0 && peer->model_digest != w->config.model->digest)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s has model %016" PRIx64 ", not %016" PRIx64, w->config.id,
                        w->config.model->digest, peer->model_digest);
    const char *own = w->config.backend->ops->profile(w->config.backend);
    if (!moe_profiles_share_dtype(peer->profile, own))
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s computes as %s, not as %s; give both the same --dtype",
                        w->config.id, own, peer->profile);
    for (int32_t i = 0; i < w->num_routers; i++)
        if (w->routers[i] == peer->peer) return MOE_OK;
    if (router && w->num_routers < MOE_WORKER_MAX_ROUTERS)
        w->routers[w->num_routers++] = peer->peer;
    return MOE_OK;
}

void moe_worker_on_peer_down(void *ctx, const moe_rpc_peer *peer) {
    moe_worker *w = ctx;
    for (int32_t i = 0; i < w->num_routers; i++)
        if (w->routers[i] == peer->peer) w->routers[i] = w->routers[--w->num_routers];
}

/* ---- ExpertService ---- */

/* Each answer tells what happened since the one before, whomever that went to: over all routers, and the engine of this process, nothing
 * is lost or counted twice. */
static moe_forward_residency report_residency(moe_worker *w, int64_t stall_ns, int64_t host_ns) {
    if (!w->residency) return (moe_forward_residency){.present = false};
    moe_residency_counts now = moe_residency_counted(w->residency), told = w->told;
    w->told = now;
    return (moe_forward_residency){.present = true,
                                   .hits = now.hits - told.hits,
                                   .late_hits = now.late_hits - told.late_hits,
                                   .misses = now.misses - told.misses,
                                   .copied_bytes = now.copied_bytes - told.copied_bytes,
                                   .wasted_bytes = now.wasted_bytes - told.wasted_bytes,
                                   .stall_ns = (uint64_t)stall_ns,
                                   .host_experts = now.host_experts - told.host_experts,
                                   .host_rows = now.host_rows - told.host_rows,
                                   .host_ns = (uint64_t)host_ns};
}

void moe_worker_answer_forward(void *ctx, moe_work *work) {
    moe_worker *w = ctx;
    if (work->status != MOE_OK) {
        Moesaic__V1__ForwardResponse body = MOESAIC__V1__FORWARD_RESPONSE__INIT;
        body.incarnation = w->config.incarnation;
        body.epoch = w->control.epoch;
        body.not_finite = work->not_finite;
        body.n_not_finite = (size_t)work->num_not_finite;
        moe_rpc_fail(work->call, work->status, work->message, body.n_not_finite ? &body.base : NULL);
        return;
    }
    moe_forward_result result = {
        .incarnation = w->config.incarnation,
        .epoch = w->control.epoch,
        .shard_digest = moe_work_digest(work, &w->shard),
        .compute_ns = (uint64_t)work->compute_ns,
        .copy_ns = (uint64_t)work->copy_ns,
        .queue_ns = (uint64_t)(work->started_ns - work->arrived_ns),
        .dtype = moe_work_out_dtype(work, &w->shard),
        .out = work->out,
        .residency = report_residency(w, work->stall_ns, work->host_ns),
    };
    moe_forward_respond(work->call, &result, moe_work_out_rows(work), w->config.model->config.hidden);
}

void moe_worker_layer_told(void *ctx, const moe_layer_call *call) {
    const moe_forward_residency told = report_residency(ctx, call->stall_ns, call->host_ns);
    if (told.present) moe_forward_residency_count(&told, call->layer);
}

/* Refuses a call that needs experts which are not here, and names them. */
static void refuse_not_held(moe_worker *w, moe_rpc_call *call, const moe_forward_call *forward) {
    uint32_t not_held[MOE_MAX_EXPERTS];
    char message[128];
    Moesaic__V1__ForwardResponse body = MOESAIC__V1__FORWARD_RESPONSE__INIT;
    for (int32_t a = 0; a < forward->assignments; a++) {
        uint32_t expert = forward->assignment_experts[a];
        bool repeated = a > 0 && forward->assignment_experts[a - 1] == expert;
        if (!repeated && !moe_shard_holds(&w->shard, forward->layer, (int32_t)expert)) not_held[body.n_not_held++] = expert;
    }
    body.not_held = not_held;
    body.incarnation = w->config.incarnation;
    body.epoch = w->control.epoch;
    snprintf(message, sizeof message, "worker %.64s does not hold expert %u of MoE layer %d", w->config.id, not_held[0],
             forward->layer);
    moe_rpc_fail(call, MOE_FAILED_PRECONDITION, message, &body.base);
}

static bool holds_all(const moe_worker *w, const moe_forward_call *forward) {
    for (int32_t a = 0; a < forward->assignments; a++)
        if (!moe_shard_holds(&w->shard, forward->layer, (int32_t)forward->assignment_experts[a])) return false;
    return true;
}

/* An answer that could not be sent is not computed. */
static bool answer_fits(const moe_forward_call *forward, int32_t hidden) {
    int64_t rows = forward->combine == MOE_COMBINE_EXACT ? forward->assignments : forward->rows;
    return rows * (int64_t)moe_row_bytes(moe_expert_output_dtype(forward->combine, forward->dtype), hidden) <=
           MOE_MAX_MESSAGE_BYTES;
}

/* Tells forward steps apart, also those of different routers. */
static uint64_t step_of(const moe_rpc_call *call, uint64_t step, uint32_t micro_batch) {
    return moe_mix64(step ^ moe_mix64(call->peer ^ moe_mix64(micro_batch)));
}

/* Experts that the step will probably want of this worker in `layer`. */
static void take_hints(moe_worker *w, uint64_t step, int32_t layer, const uint32_t *experts, size_t count) {
    if (layer >= w->config.model->config.num_moe_layers) return;
    for (size_t i = 0; i < count; i++) moe_residency_hint(w->residency, step, layer, (int32_t)experts[i]);
}

static void queue_forward(moe_worker *w, moe_rpc_call *call, const moe_forward_call *forward) {
    moe_error err;
    uint64_t step = step_of(call, forward->step, forward->micro_batch);
    moe_status status = moe_batcher_add(&w->batcher, forward, call, &err);
    /* The call's experts are expected by now, so that their copies go on; what else was announced is not copied further. */
    if (w->residency) moe_residency_reached(w->residency, step, forward->layer);
    if (status != MOE_OK)
        moe_rpc_fail(call, err.code, err.message, NULL);
    else if (w->residency)
        take_hints(w, step, forward->layer + 1, forward->hints, (size_t)forward->num_hints);
}

static void accept_forward(moe_worker *w, moe_rpc_call *call, const moe_forward_call *forward) {
    if (forward->epoch > w->control.epoch) w->control.epoch = forward->epoch;
    if (!holds_all(w, forward))
        refuse_not_held(w, call, forward);
    else if (!answer_fits(forward, w->config.model->config.hidden))
        moe_rpc_fail(call, MOE_INVALID_ARGUMENT, "the answer would not fit one message; send fewer rows in a call", NULL);
    else
        queue_forward(w, call, forward);
}

static moe_forward_limits limits_of(const moe_worker *w) {
    const moe_model_config *model = &w->config.model->config;
    return (moe_forward_limits){.num_moe_layers = model->num_moe_layers,
                                .num_experts = model->num_experts,
                                .top_k = model->top_k,
                                .hidden = model->hidden,
                                .model_digest = w->config.model->digest,
                                .cluster_uuid = w->config.cluster_uuid,
                                .incarnation = w->config.incarnation,
                                .dtype = w->config.backend->dtype};
}

static void on_forward(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                       int num_payload) {
    moe_worker *w = ctx;
    const moe_forward_limits limits = limits_of(w);
    moe_forward_call forward;
    moe_error err;
    void *scratch = NULL;
    moe_status status =
        moe_forward_decode((const Moesaic__V1__ForwardRequest *)request, payload, num_payload, &limits, &forward, &scratch, &err);
    if (status == MOE_OK)
        accept_forward(w, call, &forward);
    else
        moe_rpc_fail(call, status, err.message, NULL);
    moe_free(scratch);
}

/* Which of the experts are on the device, whole. Returns how many; `resident` has room for all. */
static size_t find_resident(const moe_worker *w, int32_t layer, const uint32_t *experts, size_t count, uint32_t *resident) {
    size_t found = 0;
    for (size_t i = 0; i < count; i++) {
        int32_t expert = (int32_t)experts[i];
        if (moe_shard_holds(&w->shard, layer, expert) && (!w->residency || moe_residency_has(w->residency, layer, expert)))
            resident[found++] = experts[i];
    }
    return found;
}

/* The step has passed the layer before without this worker, or a router wants to know when an expert is here. */
static void on_prefetch(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                        int num_payload) {
    (void)payload;
    (void)num_payload;
    moe_worker *w = ctx;
    const Moesaic__V1__PrefetchRequest *r = (const Moesaic__V1__PrefetchRequest *)request;
    const moe_forward_limits limits = limits_of(w);
    moe_error err;
    if (moe_prefetch_check(r, &limits, &err) != MOE_OK) {
        moe_rpc_fail(call, err.code, err.message, NULL);
        return;
    }
    uint64_t step = step_of(call, r->step, r->micro_batch);
    /* What is asked for beside experts that retire stays announced: it is of a step that has not been told of before. */
    int32_t passed = r->n_retired ? limits.num_moe_layers - 1 : (int32_t)r->layer - 1;
    if (w->residency && passed >= 0) moe_residency_reached(w->residency, step, passed);
    if (w->residency) take_hints(w, step, (int32_t)r->layer, r->expert, r->n_expert);
    for (size_t i = 0; w->residency && i < r->n_retired; i++)
        moe_residency_retire(w->residency, (int32_t)r->layer, (int32_t)r->retired[i]);
    uint32_t resident[MOE_FORWARD_MAX_HINTS];
    Moesaic__V1__PrefetchResponse response = MOESAIC__V1__PREFETCH_RESPONSE__INIT;
    response.resident = resident;
    response.n_resident = find_resident(w, (int32_t)r->layer, r->expert, r->n_expert, resident);
    moe_rpc_respond(call, &response.base, NULL, 0);
}

/* ---- WorkerService ---- */

static void on_load(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)payload;
    (void)num_payload;
    moe_control_on_load(&((moe_worker *)ctx)->control, call, (const Moesaic__V1__LoadRequest *)request);
}

static void on_drop(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)payload;
    (void)num_payload;
    moe_control_on_drop(&((moe_worker *)ctx)->control, call, (const Moesaic__V1__DropRequest *)request);
}

/* Copies [offset, offset + size) of an expert's canonical bytes; offset and size are multiples of 4. */
static void read_canonical(const moe_ffn_weights *w, int64_t offset, int64_t size, uint8_t *out) {
    const moe_tensor *const tensors[] = {&w->gate, &w->up, &w->down};
    for (int i = 0; i < 3 && size > 0; i++) {
        int64_t bytes = (int64_t)moe_tensor_bytes(tensors[i]), each = (int64_t)moe_dtype_bytes(tensors[i]->dtype);
        if (offset < bytes) {
            int64_t part = bytes - offset < size ? bytes - offset : size;
            moe_tensor_read(tensors[i], offset / each, part / each, out);
            out += part;
            size -= part;
            offset += part;
        }
        offset -= bytes;
    }
}

static moe_status check_fetch(const moe_worker *w, const Moesaic__V1__FetchRequest *r, moe_error *err) {
    const moe_model_config *model = &w->config.model->config;
    if (r->incarnation != w->config.incarnation)
        return moe_fail(err, MOE_UNAVAILABLE, "the call is for another incarnation of worker %s", w->config.id);
    if (r->layer >= (uint32_t)model->num_moe_layers || r->expert >= (uint32_t)model->num_experts)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "no expert %u in MoE layer %u", r->expert, r->layer);
    if (!moe_shard_holds(&w->shard, (int32_t)r->layer, (int32_t)r->expert))
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s does not hold expert %u of MoE layer %u", w->config.id, r->expert,
                        r->layer);
    int64_t total = moe_expert_canonical_bytes(moe_model_expert(w->config.model, (int32_t)r->layer, (int32_t)r->expert));
    if (r->offset >= (uint64_t)total || r->offset % 4 || r->max_bytes == 0 || r->max_bytes % 4)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a piece of %u bytes at %" PRIu64 " of %" PRId64 " is not possible", r->max_bytes,
                        r->offset, total);
    return MOE_OK;
}

static void on_fetch(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)payload;
    (void)num_payload;
    const moe_worker *w = ctx;
    const Moesaic__V1__FetchRequest *r = (const Moesaic__V1__FetchRequest *)request;
    moe_error err;
    if (check_fetch(w, r, &err) != MOE_OK) {
        moe_rpc_fail(call, err.code, err.message, NULL);
        return;
    }
    const moe_ffn_weights *weights = moe_model_expert(w->config.model, (int32_t)r->layer, (int32_t)r->expert);
    int64_t total = moe_expert_canonical_bytes(weights), size = total - (int64_t)r->offset;
    if (size > (int64_t)r->max_bytes) size = (int64_t)r->max_bytes;
    if (size > MOE_FETCH_PIECE_BYTES) size = MOE_FETCH_PIECE_BYTES;
    uint8_t *bytes = moe_calloc((size_t)size, 1);
    if (!bytes) {
        moe_rpc_fail(call, MOE_RESOURCE_EXHAUSTED, "out of memory for a piece of an expert", NULL);
        return;
    }
    read_canonical(weights, (int64_t)r->offset, size, bytes);
    if ((int64_t)r->offset + size == total) moe_model_expert_release(w->config.model, weights);
    Moesaic__V1__FetchResponse response = MOESAIC__V1__FETCH_RESPONSE__INIT;
    const moe_frame frame = {bytes, (size_t)size};
    response.incarnation = w->config.incarnation;
    response.digest = moe_shard_at(&w->shard, (int32_t)r->layer, (int32_t)r->expert)->digest;
    response.total_bytes = (uint64_t)total;
    moe_rpc_respond(call, &response.base, &frame, 1);
    moe_free(bytes);
}

static void fill_stats(const moe_worker *w, Moesaic__V1__StatsResponse *s) {
    s->id = (char *)w->config.id;
    s->incarnation = w->config.incarnation;
    s->progress = moe_worker_progress((void *)w);
    s->queued_calls = (uint32_t)w->batcher.num_queued;
    s->calls = w->batcher.calls + w->runs.calls;
    s->rows = w->batcher.rows + w->runs.rows;
    s->compute_ns = w->batcher.compute_ns + w->runs.compute_ns;
    s->expired = w->batcher.expired;
    s->weight_bytes = (uint64_t)w->shard.bytes;
    s->holdings = w->shard.holdings;
    s->leaving = atomic_load(&w->leaving);
    s->map_epoch = w->map.epoch;
    s->map_fence = w->map.fence;
}

/* The held experts with their counts, by layer and expert. */
static void list_held(const moe_worker *w, moe_loaded_list *list, uint64_t *rows, uint64_t *calls) {
    const moe_model_config *model = &w->config.model->config;
    for (int32_t layer = 0; layer < model->num_moe_layers; layer++) {
        for (int32_t expert = 0; expert < model->num_experts; expert++) {
            if (!moe_shard_holds(&w->shard, layer, expert)) continue;
            rows[list->count] = moe_shard_at(&w->shard, layer, expert)->rows;
            calls[list->count] = moe_shard_at(&w->shard, layer, expert)->calls;
            moe_loaded_list_add(list, &w->shard, layer, expert);
        }
    }
}

static void on_stats(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)payload;
    (void)num_payload;
    const moe_worker *w = ctx;
    Moesaic__V1__StatsResponse response = MOESAIC__V1__STATS_RESPONSE__INIT;
    moe_loaded_list list;
    size_t held = (size_t)w->shard.num_held;
    uint64_t *counts = moe_calloc(2 * held + 1, sizeof *counts);
    if (moe_loaded_list_init(&list, held) && counts) {
        list_held(w, &list, counts, counts + held);
        fill_stats(w, &response);
        response.loaded_rows = counts;
        response.loaded_calls = counts + held;
        response.n_loaded_rows = response.n_loaded_calls = list.count;
        bool known = ((const Moesaic__V1__StatsRequest *)request)->known_holdings == w->shard.holdings;
        response.n_loaded = known ? 0 : list.count;
        response.loaded = list.pointers;
        moe_rpc_respond(call, &response.base, NULL, 0);
    } else {
        moe_rpc_fail(call, MOE_RESOURCE_EXHAUSTED, "out of memory for the list of experts", NULL);
    }
    moe_loaded_list_free(&list);
    moe_free(counts);
}

/* The map is kept whatever is in it: who asks for it checks it. */
static void on_set_map(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    moe_worker *w = ctx;
    const Moesaic__V1__SetMapRequest *r = (const Moesaic__V1__SetMapRequest *)request;
    const Moesaic__V1__SetMapResponse response = MOESAIC__V1__SET_MAP_RESPONSE__INIT;
    moe_error err;
    moe_status status = num_payload == 1 ? moe_control_hear(&w->control, r->map_epoch, r->fence, &err)
                                         : moe_fail(&err, MOE_INVALID_ARGUMENT, "one map is needed, not %d", num_payload);
    if (status == MOE_OK) status = moe_kept_map_put(&w->map, r->map_epoch, r->map_fence, &payload[0], &err);
    if (status == MOE_OK)
        moe_rpc_respond(call, &response.base, NULL, 0);
    else
        moe_rpc_fail(call, status, err.message, NULL);
}

static void on_get_map(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)request;
    (void)payload;
    (void)num_payload;
    const moe_worker *w = ctx;
    Moesaic__V1__GetMapResponse response = MOESAIC__V1__GET_MAP_RESPONSE__INIT;
    const moe_frame frame = {w->map.text.data, w->map.text.size};
    response.map_epoch = w->map.epoch;
    response.map_fence = w->map.fence;
    moe_rpc_respond(call, &response.base, &frame, w->map.text.size ? 1 : 0);
}

/* ---- Health ---- */

/* As grpc.health.v1: an unknown service is NOT_FOUND, "" is the whole process. */
static void on_health(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)ctx;
    (void)payload;
    (void)num_payload;
    static const char *const services[] = {"", "moesaic.v1.ExpertService", "moesaic.v1.WorkerService", "moesaic.v1.Health"};
    const char *service = ((const Moesaic__V1__HealthCheckRequest *)request)->service;
    Moesaic__V1__HealthCheckResponse response = MOESAIC__V1__HEALTH_CHECK_RESPONSE__INIT;
    response.status = MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    for (size_t i = 0; i < sizeof services / sizeof *services; i++) {
        if (strcmp(service, services[i]) != 0) continue;
        moe_rpc_respond(call, &response.base, NULL, 0);
        return;
    }
    moe_rpc_fail(call, MOE_NOT_FOUND, "this process does not serve that service", NULL);
}

#define ROUTERS (1u << MOE_ROLE_ROUTER)
#define CONTROLLERS (ROUTERS | 1u << MOE_ROLE_OPERATOR)
#define ALL_ROLES (CONTROLLERS | 1u << MOE_ROLE_WORKER)

const moe_rpc_method moe_worker_methods[] = {
    {MOE_FORWARD_METHOD, on_forward, ROUTERS},
    {MOE_PREFETCH_METHOD, on_prefetch, ROUTERS},
    {"/moesaic.v1.WorkerService/Load", on_load, CONTROLLERS},
    {"/moesaic.v1.WorkerService/Drop", on_drop, CONTROLLERS},
    {"/moesaic.v1.WorkerService/Fetch", on_fetch, 1u << MOE_ROLE_WORKER},
    {"/moesaic.v1.WorkerService/Stats", on_stats, ALL_ROLES},
    {"/moesaic.v1.WorkerService/SetMap", on_set_map, ROUTERS},
    {"/moesaic.v1.WorkerService/GetMap", on_get_map, ROUTERS},
    {"/moesaic.v1.Health/Check", on_health, ALL_ROLES},
    {NULL, NULL, 0},
};
