#include "router/rpc/rpc_front_internal.h"

#include <signal.h>
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"

#define OPERATOR (1u << MOE_ROLE_OPERATOR)
#define ANYONE (OPERATOR | 1u << MOE_ROLE_ROUTER | 1u << MOE_ROLE_WORKER)

static const moe_rpc_method methods[] = {
    {"/moesaic.v1.InferenceService/Generate", moe_rpc_handle_generate, OPERATOR},
    {"/moesaic.v1.InferenceService/Tokenize", moe_rpc_handle_tokenize, OPERATOR},
    {"/moesaic.v1.InferenceService/Models", moe_rpc_handle_models, OPERATOR},
    {"/moesaic.v1.ClusterService/Status", moe_rpc_handle_status, OPERATOR},
    {"/moesaic.v1.ClusterService/Workers", moe_rpc_handle_workers, OPERATOR},
    {"/moesaic.v1.ClusterService/Plan", moe_rpc_handle_plan, OPERATOR},
    {"/moesaic.v1.ClusterService/Move", moe_rpc_handle_move, OPERATOR},
    {"/moesaic.v1.ClusterService/Replicate", moe_rpc_handle_replicate, OPERATOR},
    {"/moesaic.v1.ClusterService/Drain", moe_rpc_handle_drain, OPERATOR},
    {"/moesaic.v1.ClusterService/Undrain", moe_rpc_handle_undrain, OPERATOR},
    {"/moesaic.v1.ClusterService/Rebalance", moe_rpc_handle_rebalance, OPERATOR},
    {"/moesaic.v1.Health/Check", moe_rpc_handle_health, ANYONE},
    {0},
};

/* Any thread, also while the rpc is being freed: it goes to the transport, which outlives the front. */
static void wake(void *ctx) {
    moe_transport *transport = ((moe_rpc_front *)ctx)->config.transport;
    transport->ops->wake(transport);
}

static void *run(void *arg) {
    moe_rpc_front *front = arg;
    moe_error err;
    while (!atomic_load(&front->stopping)) {
        if (moe_rpc_step(front->rpc, INT64_MAX, &err) != MOE_OK) {
            moe_error_log("RPC front: its transport failed and it stops serving: %s", err.message);
            break;
        }
        moe_generation_queue_dispatch(front->queue);
    }
    return NULL;
}

static moe_status start(moe_rpc_front *front, moe_error *err) {
    moe_generation_queue_config queue = {
        .inference = front->config.inference, .on_output = moe_rpc_on_output, .wake = wake, .wake_ctx = front};
    moe_rpc_config rpc = {.transport = front->config.transport,
                          .clock = front->config.clock,
                          .hello = front->config.hello,
                          .methods = methods,
                          .ctx = front};
    sigset_t all, before;
    moe_status status = moe_generation_queue_new(&queue, &front->queue, err);
    if (status == MOE_OK) status = moe_rpc_new(&rpc, &front->rpc, err);
    if (status != MOE_OK) return status;
    sigfillset(&all); /* signals are the main thread's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&front->thread, NULL, run, front);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    front->thread_runs = !failed;
    return failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "RPC front: cannot start a thread: %s", strerror(failed)) : MOE_OK;
}

moe_status moe_rpc_front_start(const moe_rpc_front_config *config, moe_rpc_front **out, moe_error *err) {
    *out = moe_calloc(1, sizeof **out);
    if (!*out) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "RPC front: out of memory");
    (*out)->config = *config;
    moe_status status = start(*out, err);
    if (status != MOE_OK) moe_rpc_front_stop(out);
    return status;
}

void moe_rpc_front_drain(moe_rpc_front *front) { atomic_store(&front->draining, true); }

void moe_rpc_front_stop(moe_rpc_front **front) {
    moe_rpc_front *f = *front;
    *front = NULL;
    if (!f) return;
    if (f->thread_runs) {
        atomic_store(&f->stopping, true);
        wake(f);
        pthread_join(f->thread, NULL);
    }
    moe_rpc_free(&f->rpc); /* cancels the calls served, and with them their generations */
    moe_generation_queue_free(&f->queue);
    moe_free(f);
}
