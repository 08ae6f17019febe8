/* One Forward call of a micro-batch: what is sent, how long it may be silent, and what its answer is. What fails becomes orphans of the
 * layer (dispatch.c). */
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "proto/forward.h"
#include "router/engine/internal.h"

void expert_call_orphan(micro_batch *b, const moe_assignment *assignments, int32_t count) {
    if (count == 0) return;
    if (b->num_orphans == 0) b->orphaned_ns = engine_now(b->engine);
    b->orphans_tried_ns = 0;
    for (int32_t i = 0; i < count; i++)
        if (micro_batch_sequence(b, assignments[i].row)->ended == MOE_OK) b->orphans[b->num_orphans++] = assignments[i];
}

void expert_call_release(expert_call *call) {
    call->active = false;
    call->batch->calls_outstanding--;
}

/* A call came to nothing: its work is an orphan, and its worker is left out of this layer's next plans. */
static void call_failed(expert_call *call, const char *why) {
    micro_batch *b = call->batch;
    if (call->primary) {
        hedge_drop(call->primary);
        return;
    }
    hedge_drop(call);
    const engine_worker *w = &b->engine->workers[call->worker];
    snprintf(b->last_failure, sizeof b->last_failure, "worker %s: %.400s", w->id, why);
    b->excluded[call->worker] = true;
    b->attempts++;
    moe_metric_add(MOE_METRIC_EXPERT_RETRIES, 1);
    expert_call_release(call);
    expert_call_orphan(b, call->assignments, call->num_assignments);
}

static void end_call_sequences(const expert_call *call, moe_status status, const char *message) {
    for (int32_t i = 0; i < call->num_assignments; i++)
        scheduler_end(call->batch->engine, micro_batch_sequence(call->batch, call->assignments[i].row), status, message);
}

/* Rows of an answer: one an assignment, or one a token. */
static int32_t out_rows_of(const expert_call *call) {
    return call->batch->engine->config.combine == MOE_COMBINE_EXACT ? call->num_assignments : call->num_rows;
}

static void place_results(const expert_call *call, const void *out) {
    micro_batch *b = call->batch;
    const moe_engine *e = b->engine;
    size_t row_bytes = moe_row_bytes(e->out_dtype, e->model->hidden);
    int64_t top_k = e->model->top_k;
    const uint8_t *from = out;
    bool exact = e->config.combine == MOE_COMBINE_EXACT;
    for (int32_t i = 0; i < out_rows_of(call); i++, from += row_bytes) {
        int64_t slot =
            exact ? call->assignments[i].row * top_k + call->assignments[i].slot : call->rows[i] * top_k + call->row_slots[i];
        memcpy(moe_row_at(b->expert_out, e->out_dtype, e->model->hidden, slot), from, row_bytes);
        if (!exact) b->combine_weights[slot] = 1.0f;
    }
}

static void note_death(micro_batch *b, sequence *seq, int32_t worker) {
    if (seq->death_step != b->step) seq->num_dead = 0;
    seq->death_step = b->step;
    for (int32_t i = 0; i < seq->num_dead; i++)
        if (seq->dead_workers[i] == worker) return;
    if (seq->ended != MOE_OK) return;
    seq->dead_workers[seq->num_dead++] = worker;
    if (seq->num_dead < MOE_POISON_WORKERS) return;
    char message[MOE_ERROR_MESSAGE_BYTES];
    snprintf(message, sizeof message,
             "%d expert workers died while they computed MoE layer %d with this request; it is not tried on another",
             MOE_POISON_WORKERS, b->segment.index);
    moe_metric_add(MOE_METRIC_POISON_REQUESTS, 1);
    moe_warn("request %s: %s", seq->name, message);
    scheduler_end(b->engine, seq, MOE_INTERNAL, message);
}

/* Its worker is gone, and perhaps one of these requests is why: each is charged, once, with the death. */
static void charge_death(const expert_call *call) {
    micro_batch *b = call->batch;
    const moe_rpc_peer *peer = workers_peer(b->engine, call->worker);
    if (peer && peer->incarnation == call->incarnation) return; /* it lives, and refused */
    for (int32_t i = 0; i < call->num_assignments; i++) note_death(b, micro_batch_sequence(b, call->assignments[i].row), call->worker);
}

/* Rows that give NaN or infinity at a sound expert: their requests end, the others' rows are computed again. False where the reply
 * names none. */
static bool end_not_finite(expert_call *call, const moe_rpc_reply *reply) {
    micro_batch *b = call->batch;
    const Moesaic__V1__ForwardResponse *body = (const Moesaic__V1__ForwardResponse *)reply->body;
    if (reply->status != MOE_INTERNAL || !body || body->n_not_finite == 0) return false;
    for (size_t i = 0; i < body->n_not_finite; i++)
        if (body->not_finite[i] >= (uint32_t)call->num_rows) return false;
    if (call->primary) return false; /* the slow call will name them, too */
    hedge_drop(call);
    for (size_t i = 0; i < body->n_not_finite; i++)
        scheduler_end(b->engine, micro_batch_sequence(b, call->rows[body->not_finite[i]]), MOE_INTERNAL, reply->message);
    expert_call_release(call);
    expert_call_orphan(b, call->assignments, call->num_assignments);
    return true;
}

static void note_residency(micro_batch *b, engine_worker *w, const moe_forward_residency *r) {
    w->has_tiers = r->present;
    if (!r->present) return;
    b->has_tiers = true;
    if ((int64_t)r->stall_ns > b->stall_ns) b->stall_ns = (int64_t)r->stall_ns;
    if ((int64_t)r->host_ns > b->host_ns) b->host_ns = (int64_t)r->host_ns;
    moe_forward_residency_count(r, b->segment.index);
}

/* A worker lacks what the map says it has: the map is old. */
static void note_not_held(const moe_engine *e, const moe_rpc_reply *reply) {
    const Moesaic__V1__ForwardResponse *body = (const Moesaic__V1__ForwardResponse *)reply->body;
    if (reply->status == MOE_FAILED_PRECONDITION && body && body->n_not_held && e->config.on_not_held)
        e->config.on_not_held(e->config.on_not_held_ctx);
}

static void on_reply(void *ctx, const moe_rpc_reply *reply) {
    expert_call *call = ctx;
    micro_batch *b = call->batch;
    moe_engine *e = b->engine;
    if (reply->status == MOE_DEADLINE_EXCEEDED && !call->primary) {
        hedge_drop(call);
        end_call_sequences(call, MOE_UNAVAILABLE, "an expert worker did not answer within the call's deadline");
        expert_call_release(call);
        return;
    }
    if (reply->status != MOE_OK) {
        e->workers[call->worker].owed_ns = 0; /* it answers, or is gone */
        note_not_held(e, reply);
        if (reply->status == MOE_UNAVAILABLE) charge_death(call);
        if (!end_not_finite(call, reply)) call_failed(call, reply->message);
        return;
    }
    const moe_forward_expected expected = {e->out_dtype, out_rows_of(call), e->model->hidden, call->incarnation};
    moe_forward_result result;
    moe_error err;
    if (moe_forward_decode_reply(reply, &expected, &result, &err) != MOE_OK) {
        call_failed(call, err.message);
        return;
    }
    if (call->digest && result.shard_digest != call->digest) {
        call_failed(call, "it computed with other weights than the placement map names (digest mismatch)");
        return;
    }
    engine_worker *w = &e->workers[call->worker];
    int64_t took = engine_now(e) - call->sent_ns;
    w->call_ns = w->call_ns ? (7 * w->call_ns + took) / 8 : took;
    w->call_rows = w->call_rows > 0 ? (7 * w->call_rows + call->num_assignments) / 8 : call->num_assignments;
    moe_metric_add(MOE_METRIC_EXPERT_CALL_BYTES_RECEIVED,
                   expected.rows * (int64_t)moe_row_bytes(expected.dtype, e->model->hidden));
    int64_t compute_ns = result.compute_ns < (uint64_t)took ? (int64_t)result.compute_ns : took;
    b->expert_ns[call->worker] += compute_ns;
    int64_t copy_ns = result.copy_ns < (uint64_t)(took - compute_ns) ? (int64_t)result.copy_ns : took - compute_ns;
    b->copy_ns[call->worker] += copy_ns;
    note_residency(b, w, &result.residency);
    if (!call->primary) hedge_drop(call);
    place_results(call, result.out);
    if (e->virtual && e->config.combine == MOE_COMBINE_EXACT) virtual_experts_answered(call, result.out);
    if (call->primary)
        hedge_answered(call);
    else
        expert_call_release(call);
}

/* A free call with room for `count` assignments; NULL when out of memory or when all calls are active (the work waits as
 * orphans). */
static expert_call *take_call(micro_batch *b, int32_t count) {
    expert_call *call = b->calls;
    while (call < b->calls + b->max_calls && call->active) call++;
    if (call == b->calls + b->max_calls) return NULL;
    if (call->capacity < count) {
        moe_assignment *assignments = moe_realloc(call->assignments, (size_t)count, sizeof *assignments);
        if (assignments) call->assignments = assignments;
        int32_t *rows = moe_realloc(call->rows, (size_t)count, sizeof *rows);
        if (rows) call->rows = rows;
        int32_t *row_slots = moe_realloc(call->row_slots, (size_t)count, sizeof *row_slots);
        if (row_slots) call->row_slots = row_slots;
        if (!assignments || !rows || !row_slots) return NULL;
        call->capacity = count;
    }
    return call;
}

/* Experts of the next MoE layer that this micro-batch will probably want and that the worker holds. */
int32_t expert_call_hints(const micro_batch *b, int32_t placed, int32_t next_layer) {
    const moe_engine *e = b->engine;
    const plan_scratch *s = &e->scratch;
    if (!b->have_next_route || !micro_batch_first_chunk(b) || next_layer >= e->model->num_moe_layers) return 0;
    memset(s->hinted, 0, (size_t)e->model->num_experts * sizeof *s->hinted);
    for (int64_t i = 0; i < (int64_t)b->num_rows * e->model->top_k; i++) s->hinted[b->next_route.experts[i]] = true;
    int32_t count = 0;
    for (int32_t x = 0; x < e->model->num_experts && count < MOE_FORWARD_MAX_HINTS; x++) {
        const moe_placement_entry *entry = moe_placement_at(b->map->placement, next_layer, x);
        for (int r = 0; s->hinted[x] && r < entry->num_replicas; r++) {
            if (entry->replicas[r].worker != placed) continue;
            s->hints[count++] = (uint32_t)x;
            break;
        }
    }
    return count;
}

/* Numbers the rows that a call needs (each once, ascending) and gathers the message's small arrays into scratch. The rows
 * themselves go from the activations into the message. */
static void build_message(const micro_batch *b, expert_call *call, plan_scratch *s) {
    int32_t first = b->num_rows, end = 0; /* a chunk's rows lie together */
    for (int32_t i = 0; i < call->num_assignments; i++) {
        int32_t row = call->assignments[i].row;
        first = row < first ? row : first;
        end = row >= end ? row + 1 : end;
    }
    for (int32_t t = first; t < end; t++) s->local_row[t] = -1;
    for (int32_t i = 0; i < call->num_assignments; i++) s->local_row[call->assignments[i].row] = 0;
    call->num_rows = 0;
    for (int32_t t = first; t < end; t++) {
        if (s->local_row[t] < 0) continue;
        call->row_slots[call->num_rows] = -1;
        call->rows[call->num_rows] = t;
        s->local_row[t] = call->num_rows++;
    }
    call->digest = 0;
    bool all_known = true;
    for (int32_t i = 0; i < call->num_assignments; i++) {
        const moe_assignment *a = &call->assignments[i];
        int32_t local = s->local_row[a->row];
        if (call->row_slots[local] < 0) call->row_slots[local] = a->slot;
        s->message_rows[i] = (uint32_t)local;
        s->message_experts[i] = (uint32_t)a->expert;
        s->message_weights[i] = a->weight;
        if (i > 0 && a->expert == call->assignments[i - 1].expert) continue;
        uint64_t digest = moe_placement_at(b->map->placement, b->segment.index, a->expert)->digest;
        call->digest ^= digest;
        all_known = all_known && digest;
    }
    if (!all_known) call->digest = 0;
}

bool expert_call_start(micro_batch *b, int32_t placed, const moe_assignment *assignments, int32_t count, expert_call *primary) {
    moe_engine *e = b->engine;
    plan_scratch *s = &e->scratch;
    expert_call *call = take_call(b, count);
    if (!call) {
        if (!primary) expert_call_orphan(b, assignments, count);
        return false;
    }
    int32_t worker = b->map->worker[placed];
    const engine_worker *w = &e->workers[worker];
    call->batch = b;
    call->active = true;
    call->blamed = call->hedged = call->answered = false;
    call->hedge_parts = call->parts_answered = 0;
    call->primary = primary;
    if (primary)
        primary->hedge_parts++;
    else
        hedge_earn(e, count);
    call->worker = worker;
    call->incarnation = w->incarnation;
    call->sent_ns = engine_now(e);
    call->num_assignments = count;
    memcpy(call->assignments, assignments, (size_t)count * sizeof *assignments);
    build_message(b, call, s);
    b->calls_outstanding++;
    workers_note_call(e, worker);
    bool exact = e->config.combine == MOE_COMBINE_EXACT;
    moe_forward_call message = {.epoch = b->map->placement->epoch,
                                .incarnation = w->incarnation,
                                .request_id = b->seqs[0].seq->id,
                                .step = b->step,
                                .model_digest = e->config.model->digest,
                                .micro_batch = (uint32_t)b->index,
                                .attempt = b->attempts,
                                .layer = b->segment.index,
                                .rows = call->num_rows,
                                .assignments = count,
                                .block_lo = 0,
                                .block_hi = MOE_FFN_BLOCKS,
                                .combine = e->config.combine,
                                .cluster_uuid = e->config.cluster_uuid,
                                .hints = s->hints,
                                .num_hints = expert_call_hints(b, placed, b->segment.index + 1),
                                .dtype = e->dtype,
                                .activations = b->activations,
                                .activation_rows = call->rows,
                                .assignment_rows = s->message_rows,
                                .assignment_experts = s->message_experts,
                                .assignment_weights = exact ? NULL : s->message_weights};
    moe_error err;
    moe_status status = moe_forward_start(e->channels[w->transport].rpc, w->peer, &message, e->model->hidden,
                                          call->sent_ns + e->config.call_timeout_ns, on_reply, call, &call->rpc_call, &err);
    moe_metric_add(MOE_METRIC_EXPERT_CALLS, 1);
    moe_metric_add(MOE_METRIC_EXPERT_CALL_BYTES_SENT, call->num_rows * (int64_t)moe_row_bytes(e->dtype, e->model->hidden));
    if (status == MOE_OK) return true;
    call->answered = true; /* there is no call to cancel */
    call_failed(call, err.message);
    return false;
}

/* Every assignment of a call could go to another replica that is not suspect. */
static bool has_alternatives(const expert_call *call) {
    const micro_batch *b = call->batch;
    const moe_engine *e = b->engine;
    for (int32_t i = 0; i < call->num_assignments; i++) {
        const moe_placement_entry *entry = moe_placement_at(b->map->placement, b->segment.index, call->assignments[i].expert);
        bool other = false;
        for (int r = 0; r < entry->num_replicas && !other; r++) {
            int32_t worker = b->map->worker[entry->replicas[r].worker];
            other = worker != call->worker && entry->replicas[r].state != MOE_REPLICA_LOADING &&
                    workers_fitness(e, b->map, entry->replicas[r].worker) >= MOE_PLAN_RESERVE && !b->excluded[worker];
        }
        if (!other) return false;
    }
    return true;
}

/* How long a call's rows may be on a slow wire: a message is seen when all of it is here, and no sign of progress overtakes it. */
static int64_t transfer_ns(const expert_call *call) {
    const moe_engine *e = call->batch->engine;
    double there = (double)call->num_rows * (double)moe_row_bytes(e->dtype, e->model->hidden),
           back = (double)out_rows_of(call) * (double)moe_row_bytes(e->out_dtype, e->model->hidden);
    return (int64_t)((there + back) * (double)MOE_NS_PER_S / MOE_SLOW_WIRE_BYTES_PER_S);
}

/* A worker that makes no progress while it owes us a result is suspect; what others can do is taken from it. */
void expert_call_tick(expert_call *call, int64_t now) {
    moe_engine *e = call->batch->engine;
    if (call->answered) return;
    const engine_worker *w = &e->workers[call->worker];
    const moe_rpc_peer *peer = workers_peer(e, call->worker);
    if (!peer || peer->incarnation != call->incarnation) return; /* the RPC ends this call by itself */
    int64_t limit = MOE_SUSPECT_JOB_FACTOR * w->call_ns;
    if (limit < e->config.suspect_after_ns) limit = e->config.suspect_after_ns;
    limit += transfer_ns(call);
    if (now - workers_silent_since(e, call->worker, call->sent_ns) > limit && !call->blamed) {
        call->blamed = true;
        workers_suspect(e, call->worker);
    }
    if (!call->blamed || !has_alternatives(call)) return;
    moe_rpc_cancel(e->channels[w->transport].rpc, call->rpc_call);
    call_failed(call, "no progress");
}
