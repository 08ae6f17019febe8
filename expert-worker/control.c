#include "expert-worker/control.h"

#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/failpoint.h"
#include "common/log.h"
#include "expert-worker/loaded_list.h"
#include "expert-worker/residency.h"

typedef struct expert_ref {
    int32_t layer, expert;
    uint64_t digest; /* Load: the one it must have; 0: any */
} expert_ref;

typedef struct moe_control_op {
    TAILQ_ENTRY(moe_control_op) link;
    moe_rpc_call *call;
    size_t count, next;              /* next: experts done */
    size_t begun;                    /* Load: [next, begun) are the loader's, in this order */
    uint32_t dropped;                /* Drop: experts that were held */
    uint32_t following;              /* Load: experts of the share that later calls will ask for */
    bool verify;                     /* Load: with a known-answer batch */
    char source[MOE_ENDPOINT_BYTES]; /* Load: the worker to copy from; "": the checkpoint */
    uint64_t source_incarnation;
    expert_ref experts[];
} control_op;

moe_status moe_control_init(moe_control *c, const moe_control_config *config, moe_error *err) {
    *c = (moe_control){.config = *config, .shard = config->shard, .clock = config->clock, .incarnation = config->incarnation};
    const moe_loader_config loader = {.model = c->shard->model,
                                      .backend = c->shard->backend,
                                      .reference = config->reference,
                                      .transport = config->transport,
                                      .threads = config->load_threads,
                                      .tiers = c->shard->residency != NULL};
    TAILQ_INIT(&c->loads);
    TAILQ_INIT(&c->drops);
    snprintf(c->label, sizeof c->label, "worker %.64s loads", config->worker_id);
    moe_fetch_init(&c->fetch, config->rpc, c->clock, config->copy_bytes_per_s);
    moe_known_check_init(&c->check, c->shard->backend, config->transport);
    moe_status status = moe_loader_init(&c->loader, &loader, err);
    if (status != MOE_OK) moe_known_check_close(&c->check);
    return status;
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

static void discard(moe_control *c, moe_loader_task *task) {
    moe_residency_return_image(task->image);
    task->image = NULL;
    moe_loader_discard(&c->loader, task);
}

void moe_control_close(moe_control *c) {
    close_list(c, &c->loads);
    close_list(c, &c->drops);
    moe_fetch_close(&c->fetch);
    moe_loader_close(&c->loader);
    moe_known_check_close(&c->check);
    discard(c, &c->checked);
}

moe_status moe_control_hear(moe_control *c, uint64_t epoch, uint64_t fence, moe_error *err) {
    if (fence < c->fence)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "the command has fence %llu, a leader with fence %llu was heard already",
                        (unsigned long long)fence, (unsigned long long)c->fence);
    c->fence = fence;
    if (epoch > c->epoch) c->epoch = epoch;
    return MOE_OK;
}

/* What Load and Drop have in common. A command is for one life of a worker and from the newest leader that it has heard of. */
static moe_status check_command(moe_control *c, uint64_t incarnation, uint64_t epoch, uint64_t fence, moe_error *err) {
    if (incarnation != c->incarnation)
        return moe_fail(err, MOE_UNAVAILABLE, "the command is for incarnation %016llx, this worker is %016llx",
                        (unsigned long long)incarnation, (unsigned long long)c->incarnation);
    if (c->num_calls >= MOE_WORKER_MAX_CONTROL_CALLS)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d Load and Drop calls are waiting", c->num_calls);
    return moe_control_hear(c, epoch, fence, err);
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

static void take_load_fields(control_op *op, const Moesaic__V1__LoadRequest *request) {
    op->following = request->following;
    op->verify = request->verify;
    op->source_incarnation = request->source_incarnation;
    snprintf(op->source, sizeof op->source, "%s", request->source_endpoint);
    for (size_t i = 0; i < op->count && i < request->n_digests; i++) op->experts[i].digest = request->digests[i];
}

void moe_control_on_load(moe_control *c, moe_rpc_call *call, const Moesaic__V1__LoadRequest *request) {
    moe_error err;
    moe_status status = check_command(c, request->incarnation, request->epoch, request->fence, &err);
    Moesaic__V1__LoadResponse refusal = MOESAIC__V1__LOAD_RESPONSE__INIT;
    refusal.incarnation = c->incarnation;
    refusal.fence = c->fence;
    if (status == MOE_OK) {
        control_op *op = begin_op(c, &c->loads, call, request->experts, request->n_experts);
        if (op) take_load_fields(op, request);
        moe_failpoint(MOE_FAILPOINT_LOAD_BEGIN);
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
    if (response.dropped > 0) moe_alloc_give_back();
}

void moe_control_on_drop(moe_control *c, moe_rpc_call *call, const Moesaic__V1__DropRequest *request) {
    moe_error err;
    moe_status status = check_command(c, request->incarnation, request->epoch, request->fence, &err);
    if (status != MOE_OK) {
        moe_rpc_fail(call, status, err.message, NULL);
        return;
    }
    moe_failpoint(MOE_FAILPOINT_DROP);
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
    return moe_expert_canonical_bytes(moe_model_expert(c->shard->model, e->layer, e->expert));
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

/* The call was answered. Experts that were begun for it alone are thrown away when they are ready. */
static void forget_load(moe_control *c, control_op *op) {
    end_op(c, &c->loads, op);
    c->stage = moe_loader_idle(&c->loader) ? MOE_LOAD_NEXT : MOE_LOAD_CLEARS;
}

static bool clear(moe_control *c) {
    while (moe_loader_take(&c->loader, &c->checked)) discard(c, &c->checked);
    if (!moe_loader_idle(&c->loader)) return false;
    c->stage = MOE_LOAD_NEXT;
    return true;
}

static void end_load(moe_control *c, control_op *op) {
    moe_failpoint(MOE_FAILPOINT_LOAD_END);
    if (still_held(c, op))
        answer_load(c, op);
    else
        moe_rpc_fail(op->call, MOE_ABORTED, "some of the experts were dropped again while others were loaded", NULL);
    forget_load(c, op);
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
    forget_load(c, op);
}

static void got_expert(moe_control *c, control_op *op) {
    c->stage = MOE_LOAD_NEXT;
    show_progress(c, op);
    c->loaded++;
    op->next++;
    if (op->next == op->count && op->following == 0 && c->shard->residency) moe_residency_held_all(c->shard->residency);
}

static bool lost_expert(moe_control *c, control_op *op, const moe_error *why) {
    fail_load(c, op, why);
    return true;
}

static bool too_many(const moe_control *c, size_t more) {
    return c->config.max_experts && (size_t)c->shard->num_held + more >= (size_t)c->config.max_experts;
}

/* Hands the first expert that the loader does not have to it. */
static void pack_one(moe_control *c, control_op *op, uint8_t *copied) {
    const expert_ref *e = &op->experts[op->begun++];
    moe_failpoint(MOE_FAILPOINT_LOAD_PACK);
    const moe_loader_task task = {.layer = e->layer,
                                  .expert = e->expert,
                                  .image = c->shard->residency ? moe_residency_take_image(c->shard->residency) : NULL,
                                  .copied = copied,
                                  .expected = e->digest,
                                  .verify = op->verify};
    moe_loader_start(&c->loader, &task);
}

static bool begun(const control_op *op, const expert_ref *e) {
    for (size_t i = op->next; i < op->begun; i++)
        if (op->experts[i].layer == e->layer && op->experts[i].expert == e->expert) return true;
    return false;
}

/* The first share of a worker, of which nothing is asked yet, is packed by as many threads as there are. */
static void pack_ahead(moe_control *c, control_op *op) {
    if (c->serving || op->verify || op->source[0]) return;
    while (op->begun < op->count && moe_loader_has_room(&c->loader)) {
        const expert_ref *e = &op->experts[op->begun];
        if (moe_shard_at(c->shard, e->layer, e->expert)->held || begun(op, e) || too_many(c, op->begun - op->next)) return;
        pack_one(c, op, NULL);
    }
}

static void start_packing(moe_control *c, control_op *op, uint8_t *copied) {
    c->stage = MOE_LOAD_PACKS;
    if (op->begun <= op->next) {
        op->begun = op->next;
        pack_one(c, op, copied);
    }
    pack_ahead(c, op);
    if (op->begun < op->count) /* the disk works while these are hashed and packed */
        moe_model_expert_will_need(c->shard->model, moe_model_expert(c->shard->model, op->experts[op->begun].layer,
                                                                     op->experts[op->begun].expert));
}

static bool begin_expert(moe_control *c, control_op *op) {
    moe_error err;
    const expert_ref *e = &op->experts[op->next];
    if (op->call->cancelled) {
        moe_rpc_fail(op->call, MOE_CANCELLED, "cancelled by the caller", NULL);
        forget_load(c, op);
    } else if (op->next == op->count) {
        end_load(c, op);
    } else if (moe_shard_keep(c->shard, e->layer, e->expert)) {
        uint64_t digest = moe_shard_at(c->shard, e->layer, e->expert)->digest;
        if (!e->digest || e->digest == digest) {
            got_expert(c, op);
        } else {
            moe_fail(&err, MOE_DATA_LOSS, "its digest is %016llx, the cluster's is %016llx", (unsigned long long)digest,
                     (unsigned long long)e->digest);
            fail_load(c, op, &err);
        }
    } else if (too_many(c, 0)) {
        moe_fail(&err, MOE_RESOURCE_EXHAUSTED, "this worker takes at most %d experts", c->config.max_experts);
        fail_load(c, op, &err);
    } else if (op->source[0] && !c->shard->residency && !moe_ffn_generated(moe_model_expert(c->shard->model, e->layer, e->expert))) {
        moe_failpoint(MOE_FAILPOINT_LOAD_COPY);
        c->stage = MOE_LOAD_COPIES;
        moe_fetch_begin(&c->fetch, op->source, op->source_incarnation, e->layer, e->expert, e->digest, expert_bytes(c, e));
    } else {
        start_packing(c, op, NULL);
    }
    return true;
}

/* The checkpoint has what the peer could not give. */
static bool copy_expert(moe_control *c, control_op *op) {
    moe_fetch_state state = moe_fetch_turn(&c->fetch);
    if (state == MOE_FETCH_RUNNING && !op->call->cancelled) return false;
    if (state == MOE_FETCH_DONE) {
        start_packing(c, op, moe_fetch_take(&c->fetch));
    } else {
        if (state == MOE_FETCH_FAILED)
            moe_warn("expert %d of MoE layer %d could not be copied from %s, the checkpoint is read: %s",
                     op->experts[op->next].expert, op->experts[op->next].layer, op->source, c->fetch.error.message);
        moe_fetch_close(&c->fetch);
        start_packing(c, op, NULL);
    }
    return true;
}

/* With tiers the checkpoint serves again and again, and the image that was packed is the expert's first. */
static void adopt(moe_control *c, control_op *op, moe_loader_task *task) {
    moe_held_expert loaded = task->loaded;
    if (c->shard->residency) loaded.handle = NULL; /* it served for the check alone */
    moe_shard_adopt(c->shard, task->layer, task->expert, &loaded);
    if (c->shard->residency)
        moe_residency_hold(c->shard->residency, task->layer, task->expert, task->image);
    else
        task->loaded.handle = NULL;
    task->image = NULL;
    moe_loader_discard(&c->loader, task);
    got_expert(c, op);
}

static bool pack_expert(moe_control *c, control_op *op) {
    moe_error err;
    if (!moe_loader_take(&c->loader, &c->checked)) return false;
    moe_loader_task *task = &c->checked;
    if (task->status != MOE_OK) {
        discard(c, task);
        return lost_expert(c, op, &task->error);
    }
    if (!task->answer) {
        adopt(c, op, task);
        return true;
    }
    float *answer = task->answer;
    task->answer = NULL;
    moe_failpoint(MOE_FAILPOINT_LOAD_CHECK);
    c->stage = MOE_LOAD_CHECKS;
    if (moe_known_check_begin(&c->check, c->shard->model, task->layer, task->expert, task->loaded.handle, answer, &err) == MOE_OK)
        return true;
    discard(c, task);
    return lost_expert(c, op, &err);
}

static bool check_expert(moe_control *c, control_op *op) {
    moe_error err;
    moe_status verdict;
    if (!moe_known_check_end(&c->check, &verdict, &err)) return false;
    if (verdict == MOE_OK) {
        adopt(c, op, &c->checked);
        return true;
    }
    if (verdict == MOE_INTERNAL) snprintf(c->defect, sizeof c->defect, "%.250s", err.message);
    discard(c, &c->checked);
    return lost_expert(c, op, &err);
}

/* Takes the first Load a step further; false where that must wait for something. */
static bool advance_load(moe_control *c) {
    control_op *op = TAILQ_FIRST(&c->loads);
    switch (c->stage) {
        case MOE_LOAD_NEXT:
            return begin_expert(c, op);
        case MOE_LOAD_COPIES:
            return copy_expert(c, op);
        case MOE_LOAD_PACKS:
            return pack_expert(c, op);
        case MOE_LOAD_CHECKS:
            return check_expert(c, op);
        case MOE_LOAD_CLEARS:
            return clear(c);
    }
    return false;
}

bool moe_control_has_work(moe_control *c) {
    if (c->stage == MOE_LOAD_CLEARS) return moe_loader_done(&c->loader);
    if (TAILQ_EMPTY(&c->loads)) return false;
    if (c->stage == MOE_LOAD_PACKS) return moe_loader_done(&c->loader);
    if (c->stage == MOE_LOAD_CHECKS) return c->shard->backend->ops->poll || moe_known_check_ended(&c->check);
    return c->stage == MOE_LOAD_NEXT;
}

bool moe_control_turn(moe_control *c) {
    int64_t end_ns = moe_now_ns(c->clock) + MOE_WORKER_LOAD_NS_PER_TURN;
    uint64_t last = c->loaded + MOE_WORKER_LOADS_PER_TURN;
    if (c->stage == MOE_LOAD_CLEARS) clear(c);
    bool more = !TAILQ_EMPTY(&c->loads);
    while (more && c->loaded < last) {
        more = advance_load(c) && !TAILQ_EMPTY(&c->loads);
        if (moe_now_ns(c->clock) >= end_ns) break;
    }
    if (TAILQ_EMPTY(&c->loads) && c->fetch.link) moe_fetch_disconnect(&c->fetch);
    control_op *op, *following;
    for (op = TAILQ_FIRST(&c->drops); op; op = following) {
        following = TAILQ_NEXT(op, link);
        try_end_drop(c, op);
    }
    return more || moe_control_has_work(c);
}

int64_t moe_control_due_ns(const moe_control *c) { return c->stage == MOE_LOAD_COPIES ? moe_fetch_due_ns(&c->fetch) : INT64_MAX; }
