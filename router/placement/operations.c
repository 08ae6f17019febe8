/* What operators ask for: taken by any router, kept in the store, carried out by the leader (migrate.c). */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "common/log.h"
#include "router/placement/controller_internal.h"

static void key_of(const moe_operation *op, char key[64]) { snprintf(key, 64, "op:%s", op->id); }

static bool before(const moe_operation *a, const moe_operation *b) {
    return a->created_ms != b->created_ms ? a->created_ms < b->created_ms : strcmp(a->id, b->id) < 0;
}

static void on_operation(void *ctx, const char *key, const char *value, size_t size) {
    moe_controller *c = ctx;
    moe_operation op;
    moe_error err;
    bool ok = moe_operation_from_json(value, size, &op, &err) == MOE_OK && strcmp(op.id, key + strlen("op:")) == 0 &&
              op.layer < c->config.num_moe_layers && op.expert < c->config.num_experts;
    int32_t count = c->num_operations < MOE_MAX_OPERATIONS ? c->num_operations : MOE_MAX_OPERATIONS - 1;
    if (!ok || (count < c->num_operations && !before(&op, &c->operations[count]))) return; /* too many: the oldest come first */
    int32_t at = count;
    while (at > 0 && before(&op, &c->operations[at - 1])) at--;
    memmove(&c->operations[at + 1], &c->operations[at], (size_t)(count - at) * sizeof op);
    c->operations[at] = op;
    c->num_operations = count + 1;
}

void moe_controller_list_operations(moe_controller *c) {
    moe_error err = {0};
    c->num_operations = 0;
    moe_status status = moe_controller_store(c)->ops->list(moe_controller_store(c), "op:", on_operation, c, &err);
    moe_controller_store_answered(c, status, &err);
}

moe_operation *moe_controller_current_operation(moe_controller *c) {
    for (int32_t i = 0; i < c->num_operations; i++)
        if (!moe_operation_finished(&c->operations[i])) return &c->operations[i];
    return NULL;
}

void moe_operation_save(moe_controller *c, const moe_operation *op) {
    moe_buf text = {0};
    moe_error err = {0};
    char key[64];
    key_of(op, key);
    moe_status status = moe_operation_to_json(op, &text, &err);
    const moe_store_write write = {.key = key, .value = text.data, .size = text.size};
    if (status == MOE_OK) status = moe_controller_write(c, &write, 1, &err);
    if (status != MOE_OK) moe_warn("operation %s could not be noted: %s", op->id, err.message);
    moe_buf_free(&text);
}

/* A drain that is done stays as long as its worker, which it keeps empty. */
static bool in_force(moe_controller *c, const moe_operation *op) {
    const moe_member *m = op->kind == MOE_OP_DRAIN && op->state == MOE_OP_DONE ? moe_controller_member(c, op->from) : NULL;
    return !moe_operation_finished(op) || (m && m->registered && m->identity.incarnation == op->incarnation);
}

void moe_controller_forget_operations(moe_controller *c) {
    for (int32_t i = 0; i < c->num_operations && c->num_operations > MOE_MAX_OPERATIONS / 2; i++) {
        moe_error err;
        char key[64];
        if (in_force(c, &c->operations[i])) continue;
        key_of(&c->operations[i], key);
        const moe_store_write removal = {.key = key};
        if (moe_controller_write(c, &removal, 1, &err) != MOE_OK) return;
        memmove(&c->operations[i], &c->operations[i + 1], (size_t)(--c->num_operations - i) * sizeof *c->operations);
        return; /* one a pass */
    }
}

/* Undrains end the drains of their worker that were asked for before them, whatever these are waiting for. What is being moved when
 * its drain is cancelled still moves. */
void moe_controller_cancel_drains(moe_controller *c) {
    for (int32_t i = 0; i < c->num_operations; i++) {
        const moe_operation *undrain = &c->operations[i];
        if (undrain->kind != MOE_OP_UNDRAIN || moe_operation_finished(undrain)) continue;
        for (int32_t k = 0; k < i; k++) {
            moe_operation *drain = &c->operations[k];
            if (drain->kind != MOE_OP_DRAIN || drain->state > MOE_OP_DONE || strcmp(drain->from, undrain->from) != 0) continue;
            drain->state = MOE_OP_CANCELLED;
            drain->safe_to_stop = false;
            snprintf(drain->error, sizeof drain->error, "cancelled by %s", undrain->id);
            moe_info("placement: operation %s (drain of %s) is %s", drain->id, drain->from, drain->error);
            moe_operation_save(c, drain);
        }
    }
}

/* ---- asking ---- */

static const moe_controller_worker_view *find_worker(const moe_controller_view *v, const char *id) {
    for (int32_t i = 0; i < v->num_workers; i++)
        if (strcmp(v->workers[i].id, id) == 0) return &v->workers[i];
    return NULL;
}

static moe_status check_worker(const moe_controller_view *v, const char *id, moe_error *err) {
    return find_worker(v, id) ? MOE_OK : moe_fail(err, MOE_INVALID_ARGUMENT, "no worker is called '%.64s'", id);
}

/* With view_mutex held. */
static moe_status check_wanted(const moe_controller *c, const moe_operation *op, moe_error *err) {
    const moe_controller_view *v = &c->view;
    moe_status status = MOE_OK;
    if (!v->store_up) return moe_fail(err, MOE_UNAVAILABLE, "Redis does not answer: no expert moves until it does");
    if (v->epoch == 0) return moe_fail(err, MOE_UNAVAILABLE, "there is no placement map yet");
    if (op->id[0] && !moe_operation_id_valid(op->id))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "an operation's id has 1 to %d letters, digits, '.', '_' or '-'",
                        MOE_OPERATION_ID_BYTES - 1);
    bool one_expert = op->kind == MOE_OP_MOVE || op->kind == MOE_OP_REPLICATE;
    if (one_expert && (op->layer < 0 || op->layer >= c->config.num_moe_layers || op->expert < 0 || op->expert >= c->config.num_experts))
        return moe_fail(err, MOE_INVALID_ARGUMENT, "no expert %d in MoE layer %d; the model has %d experts in each of %d MoE layers",
                        op->expert, op->layer, c->config.num_experts, c->config.num_moe_layers);
    bool one_worker = op->kind == MOE_OP_DRAIN || op->kind == MOE_OP_UNDRAIN;
    if (op->kind == MOE_OP_MOVE || one_worker) status = check_worker(v, op->from, err);
    if (status == MOE_OK && (op->kind == MOE_OP_MOVE || op->to[0])) status = check_worker(v, op->to, err);
    if (status == MOE_OK && op->kind == MOE_OP_MOVE && strcmp(op->from, op->to) == 0)
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "the expert cannot be moved from %s to itself", op->from);
    if (status == MOE_OK && c->num_submitted == MOE_MAX_OPERATIONS)
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d operations are waiting", c->num_submitted);
    return status;
}

/* With view_mutex held. */
static const moe_operation *find_same(const moe_controller *c, const moe_operation *op) {
    for (int32_t i = 0; i < c->num_submitted; i++)
        if (op->id[0] ? strcmp(op->id, c->submitted[i].id) == 0 : moe_operation_same(op, &c->submitted[i])) return &c->submitted[i];
    for (int32_t i = 0; i < c->view.num_operations; i++) {
        const moe_operation *known = &c->view.operations[i];
        bool drained = known->kind == MOE_OP_DRAIN && known->state == MOE_OP_DONE;
        if (op->id[0] ? strcmp(op->id, known->id) == 0
                      : (!moe_operation_finished(known) || drained) && moe_operation_same(op, known))
            return known;
    }
    return NULL;
}

static int64_t wall_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

moe_status moe_controller_submit(moe_controller *c, const moe_operation *wanted, char id[MOE_OPERATION_ID_BYTES], moe_error *err) {
    moe_operation op = *wanted;
    pthread_mutex_lock(&c->view_mutex);
    moe_status status = check_wanted(c, &op, err);
    if (status == MOE_OK) {
        if (op.kind == MOE_OP_DRAIN || op.kind == MOE_OP_UNDRAIN) op.incarnation = find_worker(&c->view, op.from)->incarnation;
        const moe_operation *same = find_same(c, &op);
        if (same) {
            memcpy(id, same->id, MOE_OPERATION_ID_BYTES);
        } else {
            if (!op.id[0]) snprintf(op.id, sizeof op.id, "%s-%08llx", moe_operation_kind_name(op.kind),
                                    (unsigned long long)moe_random_identity() & 0xffffffff);
            op.created_ms = wall_ms();
            op.state = MOE_OP_PENDING;
            op.safe_to_stop = op.kind != MOE_OP_DRAIN;
            c->submitted[c->num_submitted++] = op;
            memcpy(id, op.id, sizeof op.id);
        }
    }
    pthread_mutex_unlock(&c->view_mutex);
    if (status == MOE_OK) moe_rpc_wake(c->rpc);
    return status;
}

/* One that is in the store already stays as it is. What could not be written is tried again. */
void moe_controller_store_submitted(moe_controller *c) {
    moe_store *store = moe_controller_store(c);
    while (c->store_up) {
        pthread_mutex_lock(&c->view_mutex);
        bool any = c->num_submitted > 0;
        moe_operation op = c->submitted[0];
        pthread_mutex_unlock(&c->view_mutex);
        if (!any) return;
        moe_buf text = {0};
        moe_error err = {0};
        char key[64];
        key_of(&op, key);
        moe_status status = moe_operation_to_json(&op, &text, &err);
        const moe_store_write write = {.key = key, .value = text.data, .size = text.size};
        if (status == MOE_OK) status = store->ops->compare_and_set(store, key, NULL, 0, &write, 1, &err);
        moe_controller_store_answered(c, status, &err);
        moe_buf_free(&text);
        if (status != MOE_OK && status != MOE_ABORTED) return;
        c->next_leases_ns = 0;
        pthread_mutex_lock(&c->view_mutex);
        memmove(&c->submitted[0], &c->submitted[1], (size_t)--c->num_submitted * sizeof op);
        if (c->view.num_operations < MOE_MAX_OPERATIONS && status == MOE_OK) c->view.operations[c->view.num_operations++] = op;
        pthread_mutex_unlock(&c->view_mutex);
    }
}
