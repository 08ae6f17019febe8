/* `moesaic placement plan`, `move`, `replicate`, `drain`, `undrain`, `rebalance`: asked of a router by ClusterService. The leader
 * carries an operation out; this process only watches it, and may be stopped and asked again. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "cli/commands.h"
#include "cli/node_options.h"
#include "cli/operator_client.h"
#include "common/clock.h"
#include "router/placement/operation.h"

#define SERVICE "/moesaic.v1.ClusterService/"
#define WATCH_NS (200 * MOE_NS_PER_MS)

static void print_plan(void *ctx, const ProtobufCMessage *message) {
    const Moesaic__V1__PlanResponse *plan = (const Moesaic__V1__PlanResponse *)message;
    (void)ctx;
    printf("epoch %llu: %zu steps\n", (unsigned long long)plan->epoch, plan->n_steps);
    for (size_t i = 0; i < plan->n_steps; i++) printf("%s\n", plan->steps[i]->text);
}

int moe_command_placement(const moe_options *o) {
    moe_operator_client client;
    moe_error err;
    Moesaic__V1__PlanRequest request = MOESAIC__V1__PLAN_REQUEST__INIT;
    if (strcmp(moe_options_positional(o), "plan") != 0) {
        moe_fail(&err, MOE_INVALID_ARGUMENT, "placement: '%s' is not known; there is `placement plan`", moe_options_positional(o));
        return moe_command_failed(&err);
    }
    moe_status status = moe_operator_open(o, &client, &err);
    if (status == MOE_OK) status = moe_operator_call(&client, SERVICE "Plan", &request.base, print_plan, NULL, &err);
    moe_operator_close(&client);
    return status == MOE_OK ? 0 : moe_command_failed(&err);
}

/* ---- operations ---- */

typedef struct watch {
    char id[MOE_OPERATION_ID_BYTES];
    bool seen, finished, failed;
    char line[512]; /* as last printed */
} watch;

static void keep_id(void *ctx, const ProtobufCMessage *message) {
    snprintf(((watch *)ctx)->id, MOE_OPERATION_ID_BYTES, "%s", ((const Moesaic__V1__OperationResponse *)message)->id);
}

static void show(watch *w, const Moesaic__V1__Operation *op) {
    char line[512];
    snprintf(line, sizeof line, "%s: %s%s%s, %u of %u moves, %s to stop%s%.200s", op->id, op->state, op->phase[0] ? ", " : "",
             op->phase, op->done, op->total, op->safe_to_stop ? "safe" : "not safe", op->error[0] ? ": " : "", op->error);
    if (strcmp(line, w->line) == 0) return;
    printf("%s\n", line);
    fflush(stdout);
    memcpy(w->line, line, sizeof line);
}

static void look(void *ctx, const ProtobufCMessage *message) {
    watch *w = ctx;
    const Moesaic__V1__StatusResponse *status = (const Moesaic__V1__StatusResponse *)message;
    for (size_t i = 0; i < status->n_operations; i++) {
        const Moesaic__V1__Operation *op = status->operations[i];
        if (strcmp(op->id, w->id) != 0) continue;
        show(w, op);
        w->failed = strcmp(op->state, moe_operation_state_name(MOE_OP_FAILED)) == 0 ||
                    strcmp(op->state, moe_operation_state_name(MOE_OP_CANCELLED)) == 0;
        w->finished = w->failed || strcmp(op->state, moe_operation_state_name(MOE_OP_DONE)) == 0;
    }
}

/* Until it has ended; time that runs out ends the watching alone. */
static moe_status watch_operation(moe_operator_client *client, watch *w, int64_t wait_ns, moe_error *err) {
    int64_t until = moe_now_ns(moe_clock_real()) + wait_ns;
    Moesaic__V1__StatusRequest request = MOESAIC__V1__STATUS_REQUEST__INIT;
    while (!w->finished) {
        moe_status status = moe_operator_call(client, SERVICE "Status", &request.base, look, w, err);
        if (status != MOE_OK) return status;
        if (w->finished) break;
        if (moe_now_ns(moe_clock_real()) >= until)
            return moe_fail(err, MOE_DEADLINE_EXCEEDED, "%s goes on; `moesaic status` shows it", w->id);
        nanosleep(&(struct timespec){.tv_nsec = WATCH_NS}, NULL);
    }
    return w->failed ? moe_fail(err, MOE_ABORTED, "%s did not succeed", w->id) : MOE_OK;
}

static int operate(const moe_options *o, const char *method, Moesaic__V1__OperationRequest *request) {
    moe_operator_client client;
    moe_error err;
    watch w = {.id = ""};
    int64_t wait_ns = moe_option_ns(o, "wait");
    if (moe_option_text(o, "operation")) request->id = (char *)moe_option_text(o, "operation");
    moe_status status = moe_operator_open(o, &client, &err);
    if (status == MOE_OK) status = moe_operator_call(&client, method, &request->base, keep_id, &w, &err);
    if (status == MOE_OK && wait_ns == 0) printf("%s\n", w.id);
    if (status == MOE_OK && wait_ns > 0) status = watch_operation(&client, &w, wait_ns, &err);
    moe_operator_close(&client);
    return status == MOE_OK ? 0 : moe_command_failed(&err);
}

static int missing(const char *what) {
    moe_error err;
    moe_fail(&err, MOE_INVALID_ARGUMENT, "%s", what);
    return moe_command_failed(&err);
}

int moe_command_move(const moe_options *o) {
    Moesaic__V1__OperationRequest request = MOESAIC__V1__OPERATION_REQUEST__INIT;
    bool whole = moe_option_given(o, "layer") && moe_option_given(o, "expert") && moe_option_text(o, "from") && moe_option_text(o, "to");
    if (!whole) return missing("move needs --layer L --expert E --from WORKER --to WORKER");
    request.layer = (uint32_t)moe_option_int(o, "layer");
    request.expert = (uint32_t)moe_option_int(o, "expert");
    request.from = (char *)moe_option_text(o, "from");
    request.to = (char *)moe_option_text(o, "to");
    return operate(o, SERVICE "Move", &request);
}

int moe_command_replicate(const moe_options *o) {
    Moesaic__V1__OperationRequest request = MOESAIC__V1__OPERATION_REQUEST__INIT;
    if (!moe_option_given(o, "layer") || !moe_option_given(o, "expert"))
        return missing("replicate needs --layer L --expert E, and may be given --to WORKER");
    request.layer = (uint32_t)moe_option_int(o, "layer");
    request.expert = (uint32_t)moe_option_int(o, "expert");
    if (moe_option_text(o, "to")) request.to = (char *)moe_option_text(o, "to");
    return operate(o, SERVICE "Replicate", &request);
}

int moe_command_drain(const moe_options *o) {
    Moesaic__V1__OperationRequest request = MOESAIC__V1__OPERATION_REQUEST__INIT;
    request.from = (char *)moe_options_positional(o);
    return operate(o, SERVICE "Drain", &request);
}

int moe_command_undrain(const moe_options *o) {
    Moesaic__V1__OperationRequest request = MOESAIC__V1__OPERATION_REQUEST__INIT;
    request.from = (char *)moe_options_positional(o);
    return operate(o, SERVICE "Undrain", &request);
}

int moe_command_rebalance(const moe_options *o) {
    Moesaic__V1__OperationRequest request = MOESAIC__V1__OPERATION_REQUEST__INIT;
    return operate(o, SERVICE "Rebalance", &request);
}
