/* What other threads ask of the engine: submissions, cancellations, new maps. Taken over once a step. */
#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "router/engine/internal.h"

static void wake(moe_engine *e) { moe_rpc_wake(e->channels[0].rpc); }

static moe_status check_request(const moe_engine *e, const moe_request *r, moe_error *err) {
    if (r->prompt_tokens < 1) return moe_fail(err, MOE_INVALID_ARGUMENT, "the prompt has no tokens");
    int32_t room = e->config.max_model_len - (r->sampling.max_tokens > 0 ? 1 : 0);
    if (r->prompt_tokens > room)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "the prompt has %d tokens; this model's maximum context length is %d",
                        r->prompt_tokens, e->config.max_model_len);
    for (int32_t i = 0; i < r->prompt_tokens; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= e->model->vocab)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "token id %d at position %d of the prompt is outside the vocabulary of %d",
                            r->prompt[i], i, e->model->vocab);
    return MOE_OK;
}

/* With the lock held. */
static moe_status enqueue(moe_engine *e, sequence *seq, moe_error *err) {
    if (e->draining) return moe_fail(err, MOE_UNAVAILABLE, "the server is shutting down");
    if (e->model->num_moe_layers && e->view.epoch == 0 && !e->new_placement)
        return moe_fail(err, MOE_UNAVAILABLE, "no expert workers have been placed yet");
    if (e->num_queued >= e->config.max_waiting)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d requests are waiting already (--max-waiting)", e->num_queued);
    seq->id = ++e->next_id;
    *e->inbox_tail = seq;
    e->inbox_tail = &seq->next;
    e->num_queued++;
    return MOE_OK;
}

moe_status moe_engine_submit(moe_engine *e, const moe_request *request, moe_on_output on_output, void *ctx, uint64_t *id,
                             moe_error *err) {
    sequence *seq;
    moe_status status = check_request(e, request, err);
    if (status == MOE_OK) status = sequence_new(e, request, &seq, err);
    if (status != MOE_OK) return status;
    seq->on_output = on_output;
    seq->ctx = ctx;
    pthread_mutex_lock(&e->lock);
    status = enqueue(e, seq, err);
    if (status == MOE_OK && id) *id = seq->id; /* before the engine may end the request */
    pthread_mutex_unlock(&e->lock);
    if (status == MOE_OK)
        wake(e);
    else {
        moe_metric_add(MOE_METRIC_REQUESTS_REJECTED, 1);
        sequence_free(&seq);
    }
    return status;
}

void moe_engine_cancel(moe_engine *e, uint64_t id) {
    pthread_mutex_lock(&e->lock);
    if (e->num_cancels == e->max_cancels) {
        int32_t room = e->max_cancels ? 2 * e->max_cancels : 64;
        uint64_t *cancels = moe_realloc(e->cancels, (size_t)room, sizeof *cancels);
        if (cancels) {
            e->cancels = cancels;
            e->max_cancels = room;
        }
    }
    if (e->num_cancels < e->max_cancels)
        e->cancels[e->num_cancels++] = id;
    else
        moe_warn("out of memory: request %llu runs on although it was cancelled", (unsigned long long)id);
    pthread_mutex_unlock(&e->lock);
    wake(e);
}

void moe_engine_set_placement(moe_engine *e, moe_placement *placement) {
    pthread_mutex_lock(&e->lock);
    moe_placement *replaced = e->new_placement;
    e->new_placement = moe_placement_ref(placement);
    pthread_mutex_unlock(&e->lock);
    moe_placement_unref(&replaced);
    wake(e);
}

void moe_engine_drain(moe_engine *e) {
    pthread_mutex_lock(&e->lock);
    e->draining = true;
    pthread_mutex_unlock(&e->lock);
}

static sequence *find(const sequence_list *list, uint64_t id) {
    for (int32_t i = 0; i < list->count; i++)
        if (list->items[i]->id == id) return list->items[i];
    return NULL;
}

static void cancel_one(moe_engine *e, uint64_t id) {
    sequence *seq = find(&e->running, id);
    if (!seq) seq = find(&e->waiting, id);
    if (seq) scheduler_end(e, seq, MOE_CANCELLED, "cancelled by the client");
}

void inbox_take(moe_engine *e) {
    pthread_mutex_lock(&e->lock);
    sequence *seq = e->inbox;
    e->inbox = NULL;
    e->inbox_tail = &e->inbox;
    moe_placement *placement = e->new_placement;
    e->new_placement = NULL;
    while (seq) {
        sequence *next = seq->next;
        sequence_list_push(&e->waiting, seq, false);
        seq = next;
    }
    for (int32_t i = 0; i < e->num_cancels; i++) cancel_one(e, e->cancels[i]);
    e->num_cancels = 0;
    pthread_mutex_unlock(&e->lock);
    if (placement) workers_adopt(e, placement);
}
