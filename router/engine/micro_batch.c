/* The forward step of one micro-batch as a state machine: segment → gate → dispatch → … → logits → sampling. */
#include <string.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/metrics.h"
#include "router/engine/internal.h"

static void job_done(moe_job *job) {
    micro_batch *b = job->owner;
    moe_engine *e = b->engine;
    bool inside_submit = pthread_equal(pthread_self(), b->submitter);
    atomic_fetch_add(&e->jobs_ended, 1);
    atomic_store(&b->job_done, true); /* from here on the engine may use `b` anew */
    if (!inside_submit) moe_rpc_wake(e->channels[0].rpc);
}

static bool route_alloc(moe_route *route, size_t count) {
    route->experts = moe_calloc(count, sizeof *route->experts);
    route->weights = moe_calloc(count, sizeof *route->weights);
    return route->experts && route->weights;
}

static void route_free(moe_route *route) {
    moe_free(route->experts);
    moe_free(route->weights);
}

moe_status micro_batch_init(moe_engine *e, micro_batch *b, int32_t index, moe_error *err) {
    size_t rows = (size_t)e->config.max_num_batched_tokens, seqs = (size_t)e->config.max_num_seqs;
    size_t top_k = (size_t)(e->model->top_k ? e->model->top_k : 1);
    moe_backend *backend = e->config.backend;
    b->engine = e;
    b->index = index;
    b->max_calls = 2 * MOE_PLACEMENT_MAX_WORKERS;
    b->seqs = moe_calloc(seqs, sizeof *b->seqs);
    b->request_ids = moe_calloc(seqs, sizeof *b->request_ids);
    b->views = moe_calloc(seqs, sizeof *b->views);
    b->token_ids = moe_calloc(rows, sizeof *b->token_ids);
    b->positions = moe_calloc(rows, sizeof *b->positions);
    b->row_seq = moe_calloc(rows, sizeof *b->row_seq);
    b->logit_rows = moe_calloc((size_t)e->max_logit_rows, sizeof *b->logit_rows);
    b->activations = backend->ops->host_alloc(backend, rows * moe_row_bytes(e->dtype, e->model->hidden));
    b->expert_out = backend->ops->host_alloc(backend, rows * top_k * moe_row_bytes(e->out_dtype, e->model->hidden));
    b->combine_weights = moe_calloc(rows * top_k, sizeof *b->combine_weights);
    b->combine_counts = moe_calloc(rows, sizeof *b->combine_counts);
    size_t router_bytes = rows * moe_row_bytes(MOE_F32, e->model->num_experts);
    if (e->virtual) b->gate_logits = backend->ops->host_alloc(backend, router_bytes);
    if (e->virtual) b->next_logits = backend->ops->host_alloc(backend, router_bytes);
    b->logits = backend->ops->host_alloc(backend, (size_t)e->max_logit_rows * moe_row_bytes(MOE_F32, e->model->vocab));
    size_t tops = (size_t)e->max_logit_rows * MOE_MAX_TOP_LOGITS;
    b->top_ids = backend->ops->host_alloc(backend, tops * sizeof *b->top_ids);
    b->top_logits = backend->ops->host_alloc(backend, tops * sizeof *b->top_logits);
    size_t experts = e->config.local_experts ? (size_t)e->model->num_moe_layers * (size_t)e->model->num_experts : 0;
    if (experts) b->expert_rows = backend->ops->host_alloc(backend, experts * sizeof *b->expert_rows);
    b->calls = moe_calloc((size_t)b->max_calls, sizeof *b->calls);
    b->orphans = moe_calloc(rows * top_k, sizeof *b->orphans);
    bool routes = route_alloc(&b->route, rows * top_k) && route_alloc(&b->next_route, rows * top_k) &&
                  route_alloc(&b->spare_route, rows * top_k);
    if (!routes || !b->seqs || !b->request_ids || !b->views || !b->token_ids || !b->positions || !b->row_seq || !b->logit_rows ||
        !b->activations || !b->expert_out || !b->combine_weights || !b->combine_counts || !b->logits || !b->top_ids ||
        !b->top_logits || (experts && !b->expert_rows) || (e->virtual && (!b->gate_logits || !b->next_logits)) || !b->calls || !b->orphans)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a micro-batch of %zu rows", rows);
    return backend->ops->rows_create(backend, e->base, (int32_t)rows, &b->segment.rows, err);
}

void micro_batch_destroy(micro_batch *b) {
    moe_engine *e = b->engine;
    if (!e) return;
    if (b->segment.rows) e->config.backend->ops->rows_free(e->config.backend, b->segment.rows);
    for (int32_t i = 0; b->calls && i < b->max_calls; i++) {
        moe_free(b->calls[i].assignments);
        moe_free(b->calls[i].rows);
        moe_free(b->calls[i].row_slots);
    }
    route_free(&b->route);
    route_free(&b->next_route);
    route_free(&b->spare_route);
    void *const owned[] = {b->seqs,      b->request_ids, b->views,           b->token_ids,      b->positions,
                           b->row_seq,   b->logit_rows,  b->combine_weights, b->combine_counts, b->calls,
                           b->orphans};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
    void *const of_backend[] = {b->activations, b->expert_out, b->logits, b->top_ids, b->top_logits, b->expert_rows,
                                 b->gate_logits, b->next_logits};
    for (size_t i = 0; i < sizeof of_backend / sizeof *of_backend; i++)
        e->config.backend->ops->host_free(e->config.backend, of_backend[i]);
}

/* What segment s must route, by gating mode. */
static moe_route_source next_source(const moe_engine *e) {
    switch (e->config.gating) {
        case MOE_GATING_PRE_GATE:
            return MOE_ROUTE_PRE_GATE;
        case MOE_GATING_HINT:
            return e->config.model->has_pre_gates ? MOE_ROUTE_PRE_GATE : MOE_ROUTE_NEXT_GATE;
        default:
            return MOE_ROUTE_NONE;
    }
}

/* What all segments of a step have in common. */
static void describe_step(micro_batch *b) {
    moe_engine *e = b->engine;
    moe_segment *s = &b->segment;
    s->num_rows = b->num_rows;
    s->kv = e->kv;
    s->token_ids = b->token_ids;
    s->positions = b->positions;
    s->sequences = b->row_seq;
    s->views = b->views;
    s->num_views = b->num_seqs;
    s->combine = (moe_combine){b->expert_out, e->out_dtype, b->combine_weights, b->combine_counts};
    s->activations = b->activations;
    s->logit_rows = b->logit_rows;
    s->num_logit_rows = b->num_logit_rows;
    s->logits = b->num_top ? NULL : b->logits;
    s->num_top = b->num_top;
    s->top_ids = b->top_ids;
    s->top_logits = b->top_logits;
}

static void begin_job(micro_batch *b, micro_batch_state state) {
    b->job = (moe_job){.done = job_done, .owner = b};
    b->stage_began_ns = engine_now(b->engine);
    b->state = state;
    b->submitter = pthread_self();
    atomic_store(&b->job_done, false);
}

static void submit_segment(micro_batch *b, int32_t index) {
    moe_engine *e = b->engine;
    moe_segment *s = &b->segment;
    bool last_moe = index >= e->model->num_moe_layers - 1;
    s->index = index;
    s->want_gate = e->config.gating != MOE_GATING_PRE_GATE || index == 0;
    s->route = b->route;
    s->want_next = last_moe ? MOE_ROUTE_NONE : next_source(e);
    s->next = b->spare_route;
    s->gate_logits = b->gate_logits;
    s->next_logits = b->next_logits;
    if (b->in_place && index > 0) s->combine.weights = b->route.weights;
    begin_job(b, BATCH_SEGMENT);
    e->config.backend->ops->segment_submit(e->config.backend, e->base, s, &b->job);
    if (b->in_place) in_place_segment_submitted(b);
}

static void submit_local(micro_batch *b) {
    moe_engine *e = b->engine;
    b->local = (moe_local_step){
        .segment = b->segment, .pre_gate = e->config.gating == MOE_GATING_PRE_GATE, .expert_rows = b->expert_rows};
    begin_job(b, BATCH_LOCAL);
    e->config.backend->ops->local_submit(e->config.backend, e->base, e->local, &b->local, &b->job);
}

void micro_batch_begin(micro_batch *b) {
    moe_engine *e = b->engine;
    b->step = ++e->next_step;
    b->have_next_route = false;
    if (e->map) b->map = placed_map_ref(e->map);
    moe_metric_observe_count(MOE_METRIC_STEP_TOKENS, b->num_rows);
    describe_step(b);
    b->in_place = false;
    if (local_step_ready(e)) {
        submit_local(b);
        return;
    }
    b->in_place = in_place_ready(e);
    if (b->in_place) in_place_describe(b);
    submit_segment(b, 0);
}

/* How many of the experts that the gate chose had been predicted one layer ahead. */
static void count_hints(const micro_batch *b) {
    int32_t top_k = b->engine->model->top_k;
    int64_t found = 0;
    for (int32_t t = 0; t < b->num_rows; t++)
        for (int32_t j = 0; j < top_k; j++)
            for (int32_t i = 0; i < top_k; i++)
                found += b->route.experts[(int64_t)t * top_k + j] == b->next_route.experts[(int64_t)t * top_k + i];
    moe_metric_add(MOE_METRIC_HINT_EXPERTS, (int64_t)b->num_rows * top_k);
    moe_metric_add(MOE_METRIC_HINT_EXPERTS_FOUND, found);
    atomic_fetch_add(&b->engine->hints_made[b->segment.index], (int64_t)b->num_rows * top_k);
    atomic_fetch_add(&b->engine->hints_found[b->segment.index], found);
}

static void swap_routes(moe_route *a, moe_route *b) {
    moe_route kept = *a;
    *a = *b;
    *b = kept;
}

/* After the segment of MoE layer s: `route` is what this layer uses, `next_route` what is known of the next. */
static void settle_routes(micro_batch *b) {
    moe_gating gating = b->engine->config.gating;
    if (b->engine->dummy_routing) dummy_routing_apply(b);
    if (b->engine->virtual) virtual_experts_settle(b);
    if (gating == MOE_GATING_PRE_GATE && b->segment.index > 0) swap_routes(&b->route, &b->next_route);
    if (gating == MOE_GATING_HINT && b->have_next_route) count_hints(b);
    b->have_next_route = b->segment.want_next != MOE_ROUTE_NONE;
    if (b->have_next_route) swap_routes(&b->next_route, &b->spare_route);
}

static void show_layer(micro_batch *b) {
    const moe_engine_config *config = &b->engine->config;
    if (!config->on_layer) return;
    for (int32_t i = 0; i < b->num_seqs; i++) b->request_ids[i] = b->seqs[i].seq->id;
    const moe_layer_view view = {.layer = b->segment.index,
                                 .num_rows = b->num_rows,
                                 .positions = b->positions,
                                 .sequences = b->row_seq,
                                 .requests = b->request_ids,
                                 .activations = b->activations,
                                 .dtype = b->engine->dtype,
                                 .route = &b->route,
                                 .next = b->have_next_route ? &b->next_route : NULL};
    config->on_layer(config->on_layer_ctx, &view);
}

static void finish(micro_batch *b, bool computed) {
    moe_engine *e = b->engine;
    int64_t began = engine_now(e);
    for (int32_t i = 0; i < b->num_seqs; i++) {
        batch_sequence *bs = &b->seqs[i];
        sequence *seq = bs->seq;
        seq->in_flight = NULL;
        if (!computed || seq->ended != MOE_OK) continue;
        const logit_rows rows = {.count = bs->num_logits,
                                 .logits = b->num_top ? NULL : b->logits + (int64_t)bs->first_logit * e->model->vocab,
                                 .num_top = b->num_top,
                                 .top_ids = b->top_ids + (int64_t)bs->first_logit * b->num_top,
                                 .top_logits = b->top_logits + (int64_t)bs->first_logit * b->num_top};
        if (!sequence_advance(e, seq, bs->num_rows, &rows)) continue;
        sequence_list_remove(&e->running, seq);
        sequence_release_blocks(e, seq);
        sequence_free(&seq);
    }
    if (computed) moe_metric_observe_ns(MOE_METRIC_STAGE_SAMPLE, engine_now(e) - began);
    placed_map_unref(e, &b->map);
    b->state = BATCH_IDLE;
}

static bool all_ended(const micro_batch *b) {
    for (int32_t i = 0; i < b->num_seqs; i++)
        if (b->seqs[i].seq->ended == MOE_OK) return false;
    return true;
}

/* Attention is what the compute threads spent but for combine and logits; hand-off is the time beside: waiting for these threads,
 * and for the engine to see that they are done. */
static void observe_segment(const micro_batch *b) {
    const moe_job *job = &b->job;
    int64_t attention_ns = job->compute_ns - job->combine_ns - job->logits_ns;
    int64_t beside_ns = engine_now(b->engine) - b->stage_began_ns - job->compute_ns - (b->in_place ? in_place_before_ns(b) : 0);
    moe_metric_observe_ns(MOE_METRIC_STAGE_HANDOFF, beside_ns > 0 ? beside_ns : 0);
    if (b->segment.index > 0) moe_metric_observe_ns(MOE_METRIC_STAGE_COMBINE, job->combine_ns);
    if (b->segment.index < b->engine->model->num_moe_layers)
        moe_metric_observe_ns(MOE_METRIC_STAGE_ATTENTION, attention_ns);
    else
        moe_metric_observe_ns(MOE_METRIC_STAGE_LOGITS, attention_ns + job->logits_ns);
}

static void end_if_failed(micro_batch *b) {
    if (b->job.status == MOE_OK) return;
    for (int32_t i = 0; i < b->num_seqs; i++) scheduler_end(b->engine, b->seqs[i].seq, b->job.status, b->job.message);
}

static void local_finished(micro_batch *b) {
    local_step_observe(b);
    end_if_failed(b);
    finish(b, !all_ended(b));
}

/* Nobody wants its results any more, or there will be none. */
static void leave(micro_batch *b) {
    if (b->in_place && !in_place_ended(b)) {
        in_place_leave(b);
        b->state = BATCH_LEAVING;
    } else {
        finish(b, false);
    }
}

static void segment_finished(micro_batch *b) {
    moe_engine *e = b->engine;
    observe_segment(b);
    moe_timeline_add(e->config.timeline, MOE_TIMELINE_SEGMENT, b->segment.index, b->num_rows, b->stage_began_ns);
    end_if_failed(b);
    if (all_ended(b)) {
        leave(b);
    } else if (b->segment.index == e->model->num_moe_layers) {
        finish(b, true);
    } else {
        settle_routes(b);
        show_layer(b);
        if (b->in_place) {
            in_place_segment_ended(b);
            return;
        }
        b->state = BATCH_EXPERTS;
        dispatch_begin(b);
    }
}

/* The experts of the layer are with the backend: the next segment goes behind them. */
static void go_on_in_place(micro_batch *b) {
    moe_metric_observe_ns(MOE_METRIC_STAGE_WAIT, engine_now(b->engine) - b->stage_began_ns);
    in_place_fail(b);
    if (all_ended(b))
        leave(b);
    else
        submit_segment(b, b->segment.index + 1);
}

static void dispatched(micro_batch *b) {
    dispatch_observe(b);
    if (!all_ended(b)) submit_segment(b, b->segment.index + 1); /* else the next turn ends it */
}

bool micro_batch_can_advance(const micro_batch *b) {
    switch (b->state) {
        case BATCH_SEGMENT:
            return atomic_load(&b->job_done) && (!b->in_place || in_place_before_ended(b));
        case BATCH_LOCAL:
            return atomic_load(&b->job_done);
        case BATCH_IN_PLACE:
            return in_place_submitted(b);
        case BATCH_LEAVING:
            return in_place_ended(b);
        default:
            return false; /* others wake the engine */
    }
}

bool micro_batch_advance(micro_batch *b) {
    moe_engine *e = b->engine;
    switch (b->state) {
        case BATCH_IDLE:
            if (!scheduler_fill(e, b)) return false;
            micro_batch_begin(b);
            return true;
        case BATCH_SEGMENT:
            if (!atomic_load(&b->job_done) || (b->in_place && !in_place_settled(b))) return false;
            segment_finished(b);
            return true;
        case BATCH_IN_PLACE:
            if (!in_place_submitted(b)) return false;
            go_on_in_place(b);
            return true;
        case BATCH_LEAVING:
            if (!in_place_ended(b)) return false;
            finish(b, false);
            return true;
        case BATCH_LOCAL:
            if (!atomic_load(&b->job_done)) return false;
            local_finished(b);
            return true;
        case BATCH_EXPERTS:
            if (all_ended(b)) {
                dispatch_cancel(b);
                finish(b, false);
                return true;
            }
            dispatch_tick(b, engine_now(e));
            if (!dispatch_done(b)) return false;
            dispatched(b);
            return true;
    }
    return false;
}
