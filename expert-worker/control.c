#include "expert-worker/control.h"

#include <stdio.h>

#include "common/alloc.h"
#include "expert-worker/loaded_list.h"

typedef struct expert_ref {
    int32_t layer, expert;
} expert_ref;

typedef struct moe_control_op {
    TAILQ_ENTRY(moe_control_op) link;
    moe_rpc_call *call;
    size_t count, next; /* next: experts done */
    uint32_t dropped;   /* Drop: experts that were held */
    uint32_t following; /* Load: experts of the share that later calls will ask for */
    expert_ref experts[];
} control_op;

void moe_control_init(moe_control *c, moe_shard *shard, const moe_clock *clock, uint64_t incarnation, const char *worker_id) {
    *c = (moe_control){.shard = shard, .clock = clock, .incarnation = incarnation};
    TAILQ_INIT(&c->loads);
    TAILQ_INIT(&c->drops);
    snprintf(c->label, sizeof c->label, "worker %.64s loads", worker_id);
}

static void end_op(moe_control *c, struct moe_control_list *list, control_op *op) {
    TAILQ_REMOVE(list, op, link);
    c->num_calls--;
    moe_free(op);
}

static void close_list(moe_control *c, struct moe_control_list *list) {
    control_op *op;
    while ((op = TAILQ_FIRST(list))) {
        moe_rpc_fail(op->call, MOE_UNAVAILABLE, "the worker stops", NULL);
        end_op(c, list, op);
    }
}

void moe_control_close(moe_control *c) {
    close_list(c, &c->loads);
    close_list(c, &c->drops);
}

/* What Load and Drop have in common. A command is for one life of a worker and from the newest leader that it has heard of. */
static moe_status check_command(moe_control *c, uint64_t incarnation, uint64_t epoch, uint64_t fence, moe_error *err) {
    if (incarnation != c->incarnation)
        return moe_fail(err, MOE_UNAVAILABLE, "the command is for incarnation %016llx, this worker is %016llx",
                        (unsigned long long)incarnation, (unsigned long long)c->incarnation);
    if (fence < c->fence)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "the command has fence %llu, a leader with fence %llu was heard already",
                        (unsigned long long)fence, (unsigned long long)c->fence);
    if (c->num_calls >= MOE_WORKER_MAX_CONTROL_CALLS)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d Load and Drop calls are waiting", c->num_calls);
    c->fence = fence;
    if (epoch > c->epoch) c->epoch = epoch;
    return MOE_OK;
}

static moe_status copy_experts(const moe_model_config *config, Moesaic__V1__ExpertId *const *ids, size_t count, control_op *op,
                               moe_error *err) {
    for (size_t i = 0; i < count; i++) {
        if (ids[i]->layer >= (uint32_t)config->num_moe_layers || ids[i]->expert >= (uint32_t)config->num_experts)
            return moe_fail(err, MOE_INVALID_ARGUMENT,
                            "no expert %u in MoE layer %u; the model has %d experts in each of %d MoE layers", ids[i]->expert,
                            ids[i]->layer, config->num_experts, config->num_moe_layers);
        op->experts[i] = (expert_ref){.layer = (int32_t)ids[i]->layer, .expert = (int32_t)ids[i]->expert};
    }
    op->count = count;
    return MOE_OK;
}

/* Checks and copies a command and puts it into the list; NULL once it was refused. */
static control_op *begin_op(moe_control *c, struct moe_control_list *list, moe_rpc_call *call, Moesaic__V1__ExpertId *const *ids,
                            size_t count) {
    moe_error err;
    control_op *op = NULL;
    size_t bytes = sizeof *op;
    moe_status status = MOE_OK;
    if (count <= (SIZE_MAX - bytes) / sizeof op->experts[0]) op = moe_calloc(bytes + count * sizeof op->experts[0], 1);
    if (!op) status = moe_fail(&err, MOE_RESOURCE_EXHAUSTED, "out of memory for a list of %zu experts", count);
    if (status == MOE_OK) status = copy_experts(&c->shard->model->config, ids, count, op, &err);
    if (status != MOE_OK) {
        moe_free(op);
        moe_rpc_fail(call, status, err.message, NULL);
        return NULL;
    }
    op->call = call;
    TAILQ_INSERT_TAIL(list, op, link);
    c->num_calls++;
    return op;
}

void moe_control_on_load(moe_control *c, moe_rpc_call *call, const Moesaic__V1__LoadRequest *request) {
    moe_error err;
    moe_status status = check_command(c, request->incarnation, request->epoch, request->fence, &err);
    Moesaic__V1__LoadResponse refusal = MOESAIC__V1__LOAD_RESPONSE__INIT;
    refusal.incarnation = c->incarnation;
    refusal.fence = c->fence;
    if (status == MOE_OK) {
        control_op *op = begin_op(c, &c->loads, call, request->experts, request->n_experts);
        if (op) op->following = request->following;
    } else {
        moe_rpc_fail(call, status, err.message, &refusal.base);
    }
}

/* Answers a Drop whose experts are all free. An expert that a later Load wants again counts as done. */
static void try_end_drop(moe_control *c, control_op *op) {
    for (; op->next < op->count; op->next++)
        if (moe_shard_at(c->shard, op->experts[op->next].layer, op->experts[op->next].expert)->dropping) return;
    Moesaic__V1__DropResponse response = MOESAIC__V1__DROP_RESPONSE__INIT;
    response.dropped = op->dropped;
    moe_rpc_respond(op->call, &response.base, NULL, 0);
    end_op(c, &c->drops, op);
}

void moe_control_on_drop(moe_control *c, moe_rpc_call *call, const Moesaic__V1__DropRequest *request) {
    moe_error err;
    moe_status status = check_command(c, request->incarnation, request->epoch, request->fence, &err);
    if (status != MOE_OK) {
        moe_rpc_fail(call, status, err.message, NULL);
        return;
    }
    control_op *op = begin_op(c, &c->drops, call, request->experts, request->n_experts);
    for (size_t i = 0; op && i < op->count; i++) {
        op->dropped += moe_shard_holds(c->shard, op->experts[i].layer, op->experts[i].expert);
        moe_shard_drop(c->shard, op->experts[i].layer, op->experts[i].expert);
    }
    if (op) try_end_drop(c, op);
}

static void answer_load(const moe_control *c, const control_op *op) {
    Moesaic__V1__LoadResponse response = MOESAIC__V1__LOAD_RESPONSE__INIT;
    moe_loaded_list list;
    if (moe_loaded_list_init(&list, op->count)) {
        for (size_t i = 0; i < op->count; i++) moe_loaded_list_add(&list, c->shard, op->experts[i].layer, op->experts[i].expert);
        response.incarnation = c->incarnation;
        response.fence = c->fence;
        response.n_loaded = list.count;
        response.loaded = list.pointers;
        moe_rpc_respond(op->call, &response.base, NULL, 0);
    } else {
        moe_rpc_fail(op->call, MOE_RESOURCE_EXHAUSTED, "out of memory for the answer; the experts are loaded", NULL);
    }
    moe_loaded_list_free(&list);
}

/* A Drop that came between the turns of a long Load wins over what was loaded before it. */
static bool still_held(const moe_control *c, const control_op *op) {
    for (size_t i = 0; i < op->count; i++)
        if (!moe_shard_holds(c->shard, op->experts[i].layer, op->experts[i].expert)) return false;
    return true;
}

static int64_t expert_bytes(const moe_control *c, const expert_ref *e) {
    const moe_ffn_weights *w = moe_model_expert(c->shard->model, e->layer, e->expert);
    return (int64_t)(moe_tensor_bytes(&w->gate) + moe_tensor_bytes(&w->up) + moe_tensor_bytes(&w->down));
}

/* A share whose controller dies between two calls has no end; what another one asks for next is counted on. */
static void show_progress(moe_control *c, const control_op *op) {
    if (!c->progress.running) {
        moe_progress_begin(&c->progress, c->label, "experts", c->clock);
        c->share_loaded = c->share_bytes = 0;
    }
    c->share_loaded++;
    c->share_bytes += expert_bytes(c, &op->experts[op->next]);
    int64_t left = (int64_t)(op->count - op->next) - 1 + op->following;
    moe_progress_update(&c->progress, c->share_loaded, c->share_loaded + left, c->share_bytes);
    if (left == 0) moe_progress_end(&c->progress);
}

static void end_load(moe_control *c, control_op *op) {
    if (still_held(c, op))
        answer_load(c, op);
    else
        moe_rpc_fail(op->call, MOE_ABORTED, "some of the experts were dropped again while others were loaded", NULL);
    end_op(c, &c->loads, op);
}

static void fail_load(moe_control *c, control_op *op, const moe_error *why) {
    moe_error err;
    const expert_ref *e = &op->experts[op->next];
    moe_progress_end(&c->progress);
    moe_fail(&err, why->code,
             "expert %d of MoE layer %d (%lld bytes in the checkpoint) was not loaded: %.200s; %zu of %zu experts of this "
             "call are loaded and stay, %lld bytes are in use",
             e->expert, e->layer, (long long)expert_bytes(c, e), why->message, op->next, op->count, (long long)c->shard->bytes);
    moe_rpc_fail(op->call, err.code, err.message, NULL);
    end_op(c, &c->loads, op);
}

/* Takes the first Load one expert further. */
static void advance_load(moe_control *c) {
    moe_error err;
    control_op *op = TAILQ_FIRST(&c->loads);
    if (op->call->cancelled) {
        moe_rpc_fail(op->call, MOE_CANCELLED, "cancelled by the caller", NULL);
        end_op(c, &c->loads, op);
        return;
    }
    if (op->next < op->count) {
        const expert_ref *e = &op->experts[op->next];
        if (op->next + 1 < op->count) /* the disk works while this one is hashed and packed */
            moe_model_expert_will_need(c->shard->model, moe_model_expert(c->shard->model, e[1].layer, e[1].expert));
        if (moe_shard_load(c->shard, e->layer, e->expert, &err) != MOE_OK) {
            fail_load(c, op, &err);
            return;
        }
        show_progress(c, op);
        c->loaded++;
        op->next++;
    }
    if (op->next == op->count) end_load(c, op);
}

bool moe_control_turn(moe_control *c) {
    int64_t end_ns = moe_now_ns(c->clock) + MOE_WORKER_LOAD_NS_PER_TURN;
    for (int i = 0; i < MOE_WORKER_LOADS_PER_TURN && !TAILQ_EMPTY(&c->loads); i++) {
        advance_load(c);
        if (moe_now_ns(c->clock) >= end_ns) break;
    }
    control_op *op, *following;
    for (op = TAILQ_FIRST(&c->drops); op; op = following) {
        following = TAILQ_NEXT(op, link);
        try_end_drop(c, op);
    }
    return !TAILQ_EMPTY(&c->loads);
}
