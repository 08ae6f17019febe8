/* Dispatch of one layer of one micro-batch: its rows go out in chunks, of each the plan becomes one Forward call per worker; what fails
 * becomes an orphan, which is planned again while other replicas, a newer map or a returning worker can take it. An expert is
 * never skipped: where no replica comes in time, the sequences that need it end with UNAVAILABLE. */
#include <stdio.h>
#include <string.h>

#include "common/elements.h"
#include "common/metrics.h"
#include "proto/forward.h"
#include "router/engine/internal.h"

void dispatch_choose(const micro_batch *b, const moe_assignment *assignments, int32_t count,
                     moe_plan_fitness (*fitness)(const void *ctx, int32_t placed), const void *ctx) {
    const moe_engine *e = b->engine;
    const plan_scratch *s = &e->scratch;
    const moe_placement *p = b->map->placement;
    memset(s->rows_of_expert, 0, (size_t)e->model->num_experts * sizeof *s->rows_of_expert);
    for (int32_t i = 0; i < count; i++) s->rows_of_expert[assignments[i].expert]++;
    for (int32_t w = 0; w < p->num_workers; w++)
        s->workers[w] = (moe_plan_worker){.fitness = fitness(ctx, w),
                                          .distance = workers_distance(e, b->map, w),
                                          .load = b->map->worker[w] >= 0 ? e->worker_loads[b->map->worker[w]] : 0};
    moe_plan_replicas(p, b->segment.index, s->rows_of_expert, b->map->cost, s->workers, s->chosen, s->order);
}

/* For ordinary calls: not on workers that have failed one in this layer. */
static moe_plan_fitness usual_fitness(const void *ctx, int32_t placed) {
    const micro_batch *b = ctx;
    int32_t worker = b->map->worker[placed];
    return worker >= 0 && b->excluded[worker] ? MOE_PLAN_UNFIT : workers_fitness(b->engine, b->map, placed);
}

/* Plans `count` assignments (sorted by expert and row, in scratch->assignments) over the usable workers and sends the calls. */
static void plan_and_send(micro_batch *b, int32_t count) {
    moe_engine *e = b->engine;
    plan_scratch *s = &e->scratch;
    const moe_placement *p = b->map->placement;
    dispatch_choose(b, s->assignments, count, usual_fitness, b);
    view_add_loads(e, b->segment.index, b->map, s->rows_of_expert, s->chosen);
    for (int32_t i = 0; i < e->config.num_transports; i++) moe_rpc_cork(e->channels[i].rpc);
    for (int32_t w = MOE_PLAN_NO_WORKER; w < p->num_workers; w++) {
        int32_t taken = 0;
        for (int32_t i = 0; i < count; i++)
            if (s->chosen[s->assignments[i].expert] == w) s->sorted[taken++] = s->assignments[i];
        if (taken == 0) continue;
        if (w == MOE_PLAN_NO_WORKER)
            expert_call_orphan(b, s->sorted, taken);
        else
            expert_call_start(b, w, s->sorted, taken, NULL);
    }
    for (int32_t i = 0; i < e->config.num_transports; i++) moe_rpc_uncork(e->channels[i].rpc);
}

static bool is_called(const micro_batch *b, int32_t worker) {
    for (int32_t i = 0; i < b->max_calls && b->calls_outstanding > 0; i++)
        if (b->calls[i].active && b->calls[i].worker == worker) return true;
    return false;
}

/* Hints for workers with tiers that get no call of this layer, with which hints ride. */
static void send_prefetches(micro_batch *b) {
    moe_engine *e = b->engine;
    moe_error err;
    for (int32_t placed = 0; b->have_next_route && placed < b->map->placement->num_workers; placed++) {
        int32_t worker = b->map->worker[placed];
        if (!workers_up(e, b->map, placed) || !e->workers[worker].has_tiers || is_called(b, worker)) continue;
        const moe_prefetch_call call = {.incarnation = e->workers[worker].incarnation,
                                        .step = b->step,
                                        .micro_batch = (uint32_t)b->index,
                                        .layer = b->segment.index + 1,
                                        .num_experts = expert_call_hints(b, placed, b->segment.index + 1),
                                        .experts = e->scratch.hints};
        if (call.num_experts == 0) continue;
        const engine_worker *w = &e->workers[worker];
        if (moe_prefetch_start(e->channels[w->transport].rpc, w->peer, &call, engine_now(e) + e->config.call_timeout_ns, NULL, NULL,
                               &err) == MOE_OK)
            moe_metric_add(MOE_METRIC_PREFETCHES, 1);
    }
}

static void count_experts(const micro_batch *b) {
    const moe_engine *e = b->engine;
    int32_t distinct = 0;
    bool *seen = memset(e->scratch.hinted, 0, (size_t)e->model->num_experts * sizeof *e->scratch.hinted);
    for (int64_t i = 0; i < (int64_t)b->num_rows * e->model->top_k; i++) {
        distinct += !seen[b->route.experts[i]];
        seen[b->route.experts[i]] = true;
    }
    moe_metric_observe_count(MOE_METRIC_LAYER_EXPERTS, distinct);
}

/* What a layer of the micro-batch sends and gets back. */
static int64_t layer_bytes(const micro_batch *b) {
    const moe_engine *e = b->engine;
    int32_t outputs = e->config.combine == MOE_COMBINE_EXACT ? e->model->top_k : 1;
    return b->num_rows * (int64_t)(moe_row_bytes(e->dtype, e->model->hidden) +
                                   (size_t)outputs * moe_row_bytes(e->out_dtype, e->model->hidden));
}

/* A worker in this process computes when the engine does not; one with tiers would copy its experts for each chunk. */
static bool chunks_may_pay(const micro_batch *b) {
    const moe_engine *e = b->engine;
    if (e->config.step_local_worker) return false;
    for (int32_t w = 0; w < b->map->placement->num_workers; w++)
        if (b->map->worker[w] >= 0 && e->workers[b->map->worker[w]].has_tiers) return false;
    return true;
}

static void choose_degree(micro_batch *b) {
    const moe_engine *e = b->engine;
    b->tuned = e->config.pipeline_degree == 0 && chunks_may_pay(b);
    if (b->tuned)
        b->degree = moe_pipeline_degree(&e->pipeline, layer_bytes(b));
    else
        b->degree = e->config.pipeline_degree ? e->config.pipeline_degree : 1;
    b->chunk_rows = (b->num_rows + b->degree - 1) / b->degree; /* few rows may make fewer chunks */
}

/* The assignments of rows [first, end) into scratch->assignments. A row that is not finite ends its sequence. */
static int32_t gather_assignments(micro_batch *b, int32_t first, int32_t end) {
    moe_engine *e = b->engine;
    int32_t top_k = e->model->top_k, count = 0;
    bool exact = e->config.combine == MOE_COMBINE_EXACT;
    for (int32_t t = first; t < end; t++) {
        const void *row = moe_row_at(b->activations, e->dtype, e->model->hidden, t);
        if (!moe_elements_finite(row, e->dtype, (size_t)e->model->hidden))
            scheduler_end(e, micro_batch_sequence(b, t), MOE_INTERNAL, "the model produced a value that is not finite");
        bool live = micro_batch_sequence(b, t)->ended == MOE_OK;
        b->combine_counts[t] = live ? top_k : 0;
        for (int32_t j = 0; j < top_k; j++) {
            int64_t at = (int64_t)t * top_k + j;
            b->combine_weights[at] = exact ? b->route.weights[at] : 0.0f;
            if (live)
                e->scratch.assignments[count++] = (moe_assignment){t, j, b->route.experts[at], b->route.weights[at]};
        }
    }
    return count;
}

static void send_chunk(micro_batch *b) {
    moe_engine *e = b->engine;
    plan_scratch *s = &e->scratch;
    int64_t began = engine_now(e);
    int32_t first = b->next_row, rows = b->num_rows - first;
    b->next_row += rows < b->chunk_rows ? rows : b->chunk_rows;
    int32_t count = gather_assignments(b, first, b->next_row);
    moe_plan_sort(s->assignments, count, e->model->num_experts, s->sorted, s->counts);
    plan_and_send(b, count);
    if (micro_batch_first_chunk(b)) send_prefetches(b);
    b->plan_ns += engine_now(e) - began;
}

bool dispatch_can_send(const micro_batch *b) {
    int32_t workers = b->map ? b->map->placement->num_workers : 0;
    return b->state == BATCH_EXPERTS && b->next_row < b->num_rows &&
           b->calls_outstanding <= (MOE_CHUNKS_IN_FLIGHT - 1) * workers && b->calls_outstanding + workers <= b->max_calls;
}

void dispatch_begin(micro_batch *b) {
    memset(b->excluded, 0, sizeof b->excluded);
    memset(b->expert_ns, 0, sizeof b->expert_ns);
    memset(b->copy_ns, 0, sizeof b->copy_ns);
    b->attempts = 0;
    b->plan_ns = b->stall_ns = b->host_ns = 0;
    b->has_tiers = false;
    b->num_orphans = 0;
    b->last_failure[0] = '\0';
    b->next_row = 0;
    b->stage_began_ns = engine_now(b->engine);
    count_experts(b);
    choose_degree(b);
    send_chunk(b);
}

bool dispatch_done(const micro_batch *b) {
    return b->calls_outstanding == 0 && b->num_orphans == 0 && b->next_row == b->num_rows;
}

static int64_t longest(const int64_t ns[MOE_PLACEMENT_MAX_WORKERS], int32_t num_workers) {
    int64_t most = 0;
    for (int32_t w = 0; w < num_workers; w++) most = ns[w] > most ? ns[w] : most;
    return most;
}

void dispatch_observe(const micro_batch *b) {
    moe_engine *e = b->engine;
    int64_t took_ns = engine_now(e) - b->stage_began_ns;
    moe_metric_observe_ns(MOE_METRIC_STAGE_PLAN, b->plan_ns);
    moe_metric_observe_ns(MOE_METRIC_STAGE_WAIT, took_ns - b->plan_ns);
    moe_metric_observe_ns(MOE_METRIC_STAGE_EXPERT, longest(b->expert_ns, e->num_workers));
    moe_metric_observe_ns(MOE_METRIC_STAGE_COPY, longest(b->copy_ns, e->num_workers));
    moe_metric_observe_count(MOE_METRIC_PIPELINE_DEGREE, (b->num_rows + b->chunk_rows - 1) / b->chunk_rows);
    if (b->has_tiers) moe_metric_observe_ns(MOE_METRIC_STAGE_STALL, b->stall_ns);
    if (b->has_tiers && b->segment.index == 0) moe_metric_observe_ns(MOE_METRIC_FIRST_STALL, b->stall_ns);
    if (b->has_tiers) moe_metric_observe_ns(MOE_METRIC_STAGE_HOST, b->host_ns);
    if (b->tuned && b->attempts == 0)
        moe_pipeline_observe(&e->pipeline, layer_bytes(b), b->degree, took_ns);
}

static void retry_orphans(micro_batch *b, int64_t now) {
    moe_engine *e = b->engine;
    bool changed = b->orphan_version != e->topology_version;
    bool due = b->orphans_tried_ns != 0 && now - b->orphans_tried_ns >= MOE_ORPHAN_RETRY_NS;
    if (b->orphans_tried_ns != 0 && !changed && !due) return;
    if (changed || due) memset(b->excluded, 0, sizeof b->excluded);
    if (b->map != e->map) {
        placed_map_unref(e, &b->map);
        b->map = placed_map_ref(e->map);
    }
    int32_t count = b->num_orphans;
    int64_t orphaned_ns = b->orphaned_ns;
    memcpy(e->scratch.assignments, b->orphans, (size_t)count * sizeof *b->orphans);
    moe_plan_sort(e->scratch.assignments, count, e->model->num_experts, e->scratch.sorted, e->scratch.counts);
    b->num_orphans = 0;
    plan_and_send(b, count);
    b->orphaned_ns = orphaned_ns; /* the wait counts from when they were first without a replica */
    b->orphans_tried_ns = now;
    b->orphan_version = e->topology_version;
}

static void give_up_orphans(micro_batch *b) {
    for (int32_t i = 0; i < b->num_orphans; i++) {
        const moe_assignment *a = &b->orphans[i];
        char message[MOE_ERROR_MESSAGE_BYTES];
        snprintf(message, sizeof message, "no live replica of expert %d of MoE layer %d%s%.300s", a->expert, b->segment.index,
                 b->last_failure[0] ? "; last failure: " : "", b->last_failure);
        scheduler_end(b->engine, micro_batch_sequence(b, a->row), MOE_UNAVAILABLE, message);
    }
    b->num_orphans = 0;
}

/* Orphans of sequences that ended meanwhile need no answer. */
static void drop_ended_orphans(micro_batch *b) {
    int32_t kept = 0;
    for (int32_t i = 0; i < b->num_orphans; i++)
        if (micro_batch_sequence(b, b->orphans[i].row)->ended == MOE_OK) b->orphans[kept++] = b->orphans[i];
    b->num_orphans = kept;
}

void dispatch_tick(micro_batch *b, int64_t now) {
    for (int32_t i = 0; i < b->max_calls && b->calls_outstanding; i++)
        if (b->calls[i].active) {
            hedge_tick(&b->calls[i], now);
            expert_call_tick(&b->calls[i], now);
        }
    if (dispatch_can_send(b)) send_chunk(b);
    drop_ended_orphans(b);
    if (b->num_orphans == 0) return;
    retry_orphans(b, now);
    if (b->num_orphans && now - b->orphaned_ns >= b->engine->config.replica_wait_ns) give_up_orphans(b);
}

void dispatch_cancel(micro_batch *b) {
    for (int32_t i = 0; i < b->max_calls; i++) {
        expert_call *call = &b->calls[i];
        if (!call->active) continue;
        if (!call->answered)
            moe_rpc_cancel(b->engine->channels[b->engine->workers[call->worker].transport].rpc, call->rpc_call);
        call->hedge_parts = 0;
        expert_call_release(call);
    }
    b->num_orphans = 0;
    b->next_row = b->num_rows;
}
