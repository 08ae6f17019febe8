/* Hedging: where a call takes much longer than calls of its size usually do, other replicas are asked for the same rows, within a
 * budget. A hedge is one call or several that together cover the slow one. All of its parts or the slow call: who is first
 * complete wins, what the other side has placed is taken back, its calls are cancelled, and late answers are dropped by id. */
#include <string.h>

#include "common/metrics.h"
#include "router/engine/internal.h"

void hedge_earn(moe_engine *e, int32_t rows) {
    e->hedge_rows += MOE_HEDGE_BUDGET * rows;
    if (e->hedge_rows > MOE_HEDGE_BURST_ROWS) e->hedge_rows = MOE_HEDGE_BURST_ROWS;
}

/* Larger calls take longer: the usual time is scaled up by how much this one is above the usual size. */
static int64_t due_ns(const expert_call *call) {
    const engine_worker *w = &call->batch->engine->workers[call->worker];
    if (w->call_ns == 0) return INT64_MAX; /* nothing is known of it yet */
    double size = w->call_rows > 0 ? call->num_assignments / w->call_rows : 1;
    double expected = (double)w->call_ns * (size > 1 ? size : 1);
    int64_t wait = (int64_t)(MOE_HEDGE_FACTOR * expected);
    return call->sent_ns + (wait > MOE_HEDGE_AFTER_NS ? wait : MOE_HEDGE_AFTER_NS);
}

static bool may_hedge(const expert_call *call) {
    return call->active && !call->primary && !call->hedged && call->batch->engine->hedge_rows >= call->num_assignments;
}

int64_t hedge_next_ns(const micro_batch *b) {
    int64_t next = INT64_MAX;
    if (b->state != BATCH_EXPERTS) return next;
    for (int32_t i = 0, left = b->calls_outstanding; i < b->max_calls && left; i++) {
        left -= b->calls[i].active;
        if (may_hedge(&b->calls[i]) && due_ns(&b->calls[i]) < next) next = due_ns(&b->calls[i]);
    }
    return next;
}

/* For the parts of a hedge: other workers that do well. */
static moe_plan_fitness fitness_for_hedge(const void *ctx, int32_t placed) {
    const expert_call *call = ctx;
    const micro_batch *b = call->batch;
    int32_t worker = b->map->worker[placed];
    bool usable = worker >= 0 && worker != call->worker && !b->excluded[worker];
    return usable && workers_fitness(b->engine, b->map, placed) == MOE_PLAN_FIT ? MOE_PLAN_FIT : MOE_PLAN_UNFIT;
}

/* Chooses other replicas for all experts of the call. False where there are none for some of them. */
static bool choose(const expert_call *call, const plan_scratch *s) {
    dispatch_choose(call->batch, call->assignments, call->num_assignments, fitness_for_hedge, call);
    for (int32_t i = 0; i < call->num_assignments; i++)
        if (s->chosen[call->assignments[i].expert] == MOE_PLAN_NO_WORKER) return false;
    return true;
}

static void begin(expert_call *call) {
    micro_batch *b = call->batch;
    moe_engine *e = b->engine;
    plan_scratch *s = &e->scratch;
    call->hedged = true;
    if (!choose(call, s)) return;
    e->hedge_rows -= call->num_assignments;
    moe_metric_add(MOE_METRIC_HEDGES, 1);
    for (int32_t w = 0; w < b->map->placement->num_workers; w++) {
        int32_t taken = 0;
        for (int32_t i = 0; i < call->num_assignments; i++)
            if (s->chosen[call->assignments[i].expert] == w) s->sorted[taken++] = call->assignments[i];
        if (taken && !expert_call_start(b, w, s->sorted, taken, call)) {
            hedge_drop(call);
            return;
        }
    }
}

void hedge_tick(expert_call *call, int64_t now) {
    if (may_hedge(call) && now >= due_ns(call)) begin(call);
}

/* Ends a part; what it had placed no longer counts (under exact combine the same bits come to the same slots). */
static void end_part(expert_call *part) {
    micro_batch *b = part->batch;
    moe_engine *e = b->engine;
    if (!part->answered)
        moe_rpc_cancel(e->channels[e->workers[part->worker].transport].rpc, part->rpc_call);
    else if (e->config.combine == MOE_COMBINE_PARTIAL)
        for (int32_t i = 0; i < part->num_rows; i++)
            b->combine_weights[part->rows[i] * (int64_t)e->model->top_k + part->row_slots[i]] = 0.0f;
    expert_call_release(part);
}

void hedge_drop(expert_call *call) {
    micro_batch *b = call->batch;
    for (int32_t i = 0; call->hedge_parts && i < b->max_calls; i++) {
        if (!b->calls[i].active || b->calls[i].primary != call) continue;
        call->hedge_parts--;
        end_part(&b->calls[i]);
    }
    MOE_ASSERT(call->hedge_parts == 0);
    call->parts_answered = 0;
}

void hedge_answered(expert_call *part) {
    expert_call *call = part->primary;
    micro_batch *b = call->batch;
    moe_engine *e = b->engine;
    part->answered = true;
    if (++call->parts_answered < call->hedge_parts) return;
    moe_metric_add(MOE_METRIC_HEDGES_WON, 1);
    workers_note_late(e, call->worker, call->sent_ns);
    moe_rpc_cancel(e->channels[e->workers[call->worker].transport].rpc, call->rpc_call);
    for (int32_t i = 0; i < b->max_calls; i++)
        if (b->calls[i].active && b->calls[i].primary == call) expert_call_release(&b->calls[i]);
    call->hedge_parts = 0;
    expert_call_release(call);
}
