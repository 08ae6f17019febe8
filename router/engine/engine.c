/* Making, running and freeing an engine. */
#include <math.h>
#include <string.h>

#include "common/alloc.h"
#include "common/backend_poll.h"
#include "common/elements.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/progress.h"
#include "router/engine/internal.h"

static moe_status check_config(const moe_engine_config *c, moe_error *err) {
    if (c->gating == MOE_GATING_PRE_GATE && !c->model->has_pre_gates)
        return moe_fail(err, MOE_FAILED_PRECONDITION,
                        "--gating pre-gate: this checkpoint has no pre-gates; `moesaic train-pregate` makes them");
    if (moe_expert_budget_given(c->expert_budget) && c->dummy_routing.on)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--expert-budget routes by what gates think of experts, which --dummy-routing replaces");
    if (c->num_kv_blocks < moe_kv_blocks_for(c->max_model_len))
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "%d KV blocks of %d tokens cannot hold one sequence of --max-model-len %d tokens (%d blocks)",
                        c->num_kv_blocks, MOE_KV_BLOCK_TOKENS, c->max_model_len, moe_kv_blocks_for(c->max_model_len));
    MOE_ASSERT(c->num_transports > 0 && c->max_num_seqs > 0 && c->max_num_batched_tokens > 0 && c->micro_batches > 0);
    return MOE_OK;
}

static moe_status scratch_init(moe_engine *e, moe_error *err) {
    plan_scratch *s = &e->scratch;
    size_t rows = (size_t)e->config.max_num_batched_tokens, experts = (size_t)e->model->num_experts;
    size_t slots = rows * (size_t)(e->model->top_k ? e->model->top_k : 1);
    s->assignments = moe_calloc(slots, sizeof *s->assignments);
    s->sorted = moe_calloc(slots, sizeof *s->sorted);
    s->counts = moe_calloc(experts + 1, sizeof *s->counts);
    s->rows_of_expert = moe_calloc(experts, sizeof *s->rows_of_expert);
    s->chosen = moe_calloc(experts, sizeof *s->chosen);
    s->order = moe_calloc(2 * experts, sizeof *s->order);
    s->workers = moe_calloc(MOE_PLACEMENT_MAX_WORKERS, sizeof *s->workers);
    s->local_row = moe_calloc(rows, sizeof *s->local_row);
    s->message_rows = moe_calloc(slots, sizeof *s->message_rows);
    s->message_experts = moe_calloc(slots, sizeof *s->message_experts);
    s->message_weights = moe_calloc(slots, sizeof *s->message_weights);
    s->hints = moe_calloc(experts, sizeof *s->hints);
    s->hinted = moe_calloc(experts, sizeof *s->hinted);
    if (!s->assignments || !s->sorted || !s->counts || !s->rows_of_expert || !s->chosen || !s->order || !s->workers ||
        !s->local_row || !s->message_rows || !s->message_experts || !s->message_weights || !s->hints || !s->hinted)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for planning %zu rows", rows);
    return MOE_OK;
}

static void scratch_free(plan_scratch *s) {
    void *const owned[] = {s->assignments,     s->sorted,  s->counts,    s->rows_of_expert, s->chosen,
                           s->order,           s->workers, s->local_row, s->message_rows,   s->message_experts,
                           s->message_weights, s->hints,   s->hinted};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
}

static moe_status channels_open(moe_engine *e, moe_error *err) {
    e->channels = moe_calloc((size_t)e->config.num_transports, sizeof *e->channels);
    if (!e->channels) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    for (int32_t i = 0; i < e->config.num_transports; i++) {
        channel *c = &e->channels[i];
        c->engine = e;
        c->transport = e->config.transports[i];
        moe_rpc_config config = {.transport = c->transport,
                                 .clock = e->config.clock,
                                 .hello = {.cluster_uuid = e->config.cluster_uuid,
                                           .role = "router",
                                           .id = e->config.id,
                                           .profile = e->config.backend->ops->profile(e->config.backend),
                                           .incarnation = e->config.incarnation,
                                           .model_digest = e->config.model->digest},
                                 .ctx = c,
                                 .on_peer_up = workers_on_peer_up,
                                 .on_peer_down = workers_on_peer_down};
        moe_status status = moe_rpc_new(&config, &c->rpc, err);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}

static int32_t logit_rows_for(const moe_engine *e) {
    int64_t rows = MOE_ENGINE_LOGITS_BYTES / ((int64_t)e->model->vocab * (int64_t)sizeof(float));
    if (rows < e->config.max_num_seqs) rows = e->config.max_num_seqs;
    return rows < e->config.max_num_batched_tokens ? (int32_t)rows : e->config.max_num_batched_tokens;
}

typedef struct packing {
    moe_progress progress;
    int64_t layers, bytes;
} packing;

static void show_packing(void *ctx, double fraction) {
    packing *p = ctx;
    moe_progress_update(&p->progress, llround(fraction * (double)p->layers), p->layers, (int64_t)((double)p->bytes * fraction));
}

static moe_status load_base(moe_engine *e, moe_error *err) {
    packing p = {.layers = e->model->num_layers, .bytes = moe_model_base_bytes(e->config.model)};
    moe_progress_begin(&p.progress, "packing base weights", "layers", e->config.clock);
    moe_status status = e->config.backend->ops->base_load(e->config.backend, e->config.model, show_packing, &p, &e->base, err);
    moe_progress_end(&p.progress);
    return status;
}

/* *out is NULL where gates choose. */
static moe_status open_dummy_routing(const moe_engine *e, const moe_dummy_routing_spec *spec, moe_dummy_routing **out, moe_error *err) {
    *out = NULL;
    if (!spec->on || e->model->num_moe_layers == 0) return MOE_OK;
    return moe_dummy_routing_new(spec, e->model->num_moe_layers, e->model->num_experts, e->model->top_k, out, err);
}

static moe_status engine_init(moe_engine *e, moe_error *err) {
    moe_backend *backend = e->config.backend;
    e->max_logit_rows = logit_rows_for(e);
    e->loads = moe_calloc((size_t)e->model->num_moe_layers * (size_t)e->model->num_experts, sizeof *e->loads);
    e->worker_loads = moe_calloc(MOE_PLACEMENT_MAX_WORKERS, sizeof *e->worker_loads);
    e->batches = moe_calloc((size_t)e->config.micro_batches, sizeof *e->batches);
    size_t live = (size_t)e->config.max_num_seqs + (size_t)e->config.max_waiting;
    e->running.items = moe_calloc(live, sizeof *e->running.items);
    e->waiting.items = moe_calloc(live, sizeof *e->waiting.items);
    e->hints_made = moe_calloc((size_t)e->model->num_moe_layers, sizeof *e->hints_made);
    e->hints_found = moe_calloc((size_t)e->model->num_moe_layers, sizeof *e->hints_found);
    if (!e->hints_made || !e->hints_found || !e->loads || !e->worker_loads || !e->batches || !e->running.items || !e->waiting.items)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    e->running.capacity = e->waiting.capacity = (int32_t)live;
    moe_status status = load_base(e, err);
    if (status == MOE_OK) status = virtual_experts_new(e, &e->virtual, err);
    if (status == MOE_OK) status = backend->ops->kv_create(backend, e->base, e->config.num_kv_blocks, &e->kv, err);
    if (status == MOE_OK) status = moe_kv_blocks_init(&e->blocks, e->config.num_kv_blocks, err);
    if (status == MOE_OK) status = moe_sampler_new(e->model->vocab, &e->sampler, err);
    if (status == MOE_OK) status = scratch_init(e, err);
    if (status == MOE_OK) status = open_dummy_routing(e, &e->config.dummy_routing, &e->dummy_routing, err);
    for (int32_t i = 0; status == MOE_OK && i < e->config.micro_batches; i++)
        status = micro_batch_init(e, &e->batches[i], i, err);
    if (status == MOE_OK) status = channels_open(e, err);
    return status;
}

moe_status moe_engine_new(const moe_engine_config *config, moe_engine **out, moe_error *err) {
    *out = NULL;
    moe_status status = check_config(config, err);
    if (status != MOE_OK) return status;
    moe_engine *e = moe_calloc(1, sizeof *e);
    if (!e) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    e->config = *config;
    e->model = &config->model->config;
    e->dtype = config->backend->dtype;
    e->out_dtype = moe_expert_output_dtype(config->combine, e->dtype);
    e->inbox_tail = &e->inbox;
    e->load_epoch_ns = engine_now(e);
    e->view_dirty = true;
    moe_pipeline_init(&e->pipeline);
    pthread_mutex_init(&e->lock, NULL);
    status = engine_init(e, err);
    if (status != MOE_OK) moe_engine_free(&e);
    *out = e;
    return status;
}

moe_status moe_engine_reroute(moe_engine *e, moe_gating gating, const moe_dummy_routing_spec *dummy, moe_error *err) {
    moe_engine_config config = e->config;
    moe_dummy_routing *routing;
    MOE_ASSERT(!e->started && e->running.count == 0 && e->waiting.count == 0);
    config.gating = gating;
    config.dummy_routing = *dummy;
    moe_status status = check_config(&config, err);
    if (status == MOE_OK) status = open_dummy_routing(e, dummy, &routing, err);
    if (status != MOE_OK) return status;
    moe_dummy_routing_free(&e->dummy_routing);
    e->dummy_routing = routing;
    e->config = config;
    return MOE_OK;
}

static bool job_outstanding(const micro_batch *b) {
    return (b->state == BATCH_SEGMENT || b->state == BATCH_LOCAL) && !atomic_load(&b->job_done);
}

/* Where the backend is polled and has jobs of ours: lets them end. True: the step must not sleep. */
static bool poll_jobs(moe_engine *e) {
    bool outstanding = false;
    for (int32_t i = 0; i < e->config.micro_batches; i++) outstanding = outstanding || job_outstanding(&e->batches[i]);
    if (!outstanding || !e->local_work) return outstanding && moe_backend_poll(e->config.backend, &e->jobs_ended);
    return e->config.backend->ops->poll && e->config.backend->ops->poll(e->config.backend); /* the local worker's may end first */
}

/* Jobs that are under way must end before their memory goes. With every call cancelled only the router's own are left. */
static void await_jobs(moe_engine *e) {
    for (int32_t i = 0; e->channels && i < e->config.micro_batches; i++) {
        micro_batch *b = &e->batches[i];
        while (job_outstanding(b))
            if (!poll_jobs(e) && moe_rpc_step(e->channels[0].rpc, engine_now(e) + MOE_ENGINE_IDLE_NS, NULL) != MOE_OK) break;
        if (b->state == BATCH_EXPERTS) dispatch_cancel(b);
        in_place_await(b);
        placed_map_unref(e, &b->map);
        b->state = BATCH_IDLE;
    }
}

static void close_all(moe_engine *e, sequence_list *list) {
    while (list->count) {
        sequence *seq = list->items[list->count - 1];
        sequence_list_remove(list, seq);
        sequence_close(e, seq, MOE_CANCELLED, "the server stopped");
    }
}

void moe_engine_free(moe_engine **engine) {
    moe_engine *e = *engine;
    *engine = NULL;
    if (!e) return;
    moe_engine_stop(e);
    if (e->batches) await_jobs(e);
    inbox_take(e);
    close_all(e, &e->running);
    close_all(e, &e->waiting);
    placed_map_unref(e, &e->map);
    for (int32_t i = 0; e->channels && i < e->config.num_transports; i++) moe_rpc_free(&e->channels[i].rpc);
    for (int32_t i = 0; e->batches && i < e->config.micro_batches; i++) micro_batch_destroy(&e->batches[i]);
    virtual_experts_free(&e->virtual);
    scratch_free(&e->scratch);
    moe_dummy_routing_free(&e->dummy_routing);
    moe_sampler_free(&e->sampler);
    moe_kv_blocks_destroy(&e->blocks);
    if (e->local) e->config.backend->ops->local_free(e->config.backend, e->local);
    if (e->kv) e->config.backend->ops->kv_free(e->config.backend, e->kv);
    if (e->base) e->config.backend->ops->base_free(e->config.backend, e->base);
    void *const owned[] = {e->loads,    e->worker_loads, e->batches, e->running.items, e->waiting.items,
                           e->channels, e->cancels,      (void *)e->hints_made, (void *)e->hints_found};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
    pthread_mutex_destroy(&e->lock);
    moe_free(e);
}

static bool advance_all(moe_engine *e) {
    bool moved = false;
    int64_t in_flight = 0;
    for (int32_t i = 0; i < e->config.micro_batches; i++) {
        moved = micro_batch_advance(&e->batches[i]) || moved;
        in_flight += e->batches[i].state != BATCH_IDLE;
    }
    scheduler_reap(e);
    moe_metric_set(MOE_METRIC_MICRO_BATCHES, in_flight);
    return moved;
}

/* How long this step may sleep: a while when only timers matter, not at all past the caller's deadline. */
static int64_t sleep_until(const moe_engine *e, int64_t deadline_ns) {
    if (e->local_work) return 0;
    int64_t until = deadline_ns;
    bool busy = e->config.num_transports > 1;
    for (int32_t i = 0; i < e->config.micro_batches; i++) {
        if (dispatch_can_send(&e->batches[i])) return 0;
        busy = busy || e->batches[i].state == BATCH_EXPERTS;
    }
    for (int32_t i = 0; i < e->config.micro_batches; i++) {
        int64_t hedge = hedge_next_ns(&e->batches[i]);
        if (hedge < until) until = hedge;
    }
    int64_t tick = engine_now(e) + (e->config.num_transports > 1 ? MOE_NS_PER_MS : MOE_ORPHAN_RETRY_NS);
    if (busy && tick < until) until = tick;
    return until;
}

static bool computing(const moe_engine *e) {
    for (int32_t i = 0; i < e->config.micro_batches; i++)
        if (e->batches[i].state != BATCH_IDLE && e->batches[i].state != BATCH_EXPERTS) return true;
    return false;
}

moe_status moe_engine_step(moe_engine *e, int64_t deadline_ns, moe_error *err) {
    moe_status status = MOE_OK;
    e->channels[0].transport->computing = computing(e);
    int64_t until_ns = poll_jobs(e) ? 0 : sleep_until(e, deadline_ns);
    for (int32_t i = 0; i < e->config.num_transports && status == MOE_OK; i++)
        status = moe_rpc_step(e->channels[i].rpc, i == 0 ? until_ns : 0, err);
    workers_forgive(e, engine_now(e));
    /* Steps may end inside their submission, one after another: requests come and go between them all the same. */
    bool moved;
    do {
        inbox_take(e);
        moved = advance_all(e);
        view_refresh(e, engine_now(e));
        if (moved || !e->config.step_local_worker) continue;
        e->local_work = e->config.step_local_worker(e->config.local_worker);
        for (int32_t i = 0; i < e->config.micro_batches; i++) moved = moved || micro_batch_can_advance(&e->batches[i]);
    } while (moved);
    return status;
}

static void *engine_thread(void *ctx) {
    moe_engine *e = ctx;
    moe_error err;
    while (!atomic_load(&e->stopping))
        if (moe_engine_step(e, engine_now(e) + MOE_ENGINE_IDLE_NS, &err) != MOE_OK) moe_error_log("engine: %s", err.message);
    return NULL;
}

moe_status moe_engine_start(moe_engine *e, moe_error *err) {
    atomic_store(&e->stopping, false);
    if (pthread_create(&e->thread, NULL, engine_thread, e) != 0)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "cannot start the engine's thread");
    e->started = true;
    return MOE_OK;
}

void moe_engine_stop(moe_engine *e) {
    if (!e->started) return;
    atomic_store(&e->stopping, true);
    moe_rpc_wake(e->channels[0].rpc);
    pthread_join(e->thread, NULL);
    e->started = false;
}
