#include "cli/operator_client.h"

#include "cli/cluster_file.h"
#include "common/clock.h"

#define CALL_TIMEOUT_NS (10 * MOE_NS_PER_S)
#define STEP_NS (100 * MOE_NS_PER_MS)

static moe_status connect(moe_operator_client *c, const char *endpoint, const char *keys, moe_error *err) {
    moe_status status = moe_network_open(keys, MOE_ROLE_OPERATOR, 0, &c->transport, err);
    if (status != MOE_OK) return status;
    const moe_rpc_config config = {.transport = c->transport,
                                   .clock = moe_clock_real(),
                                   .hello = {.cluster_uuid = "",
                                             .role = "operator",
                                             .id = "moesaic",
                                             .profile = "",
                                             .incarnation = moe_random_identity()}};
    status = moe_rpc_new(&config, &c->rpc, err);
    if (status == MOE_OK) status = moe_rpc_connect(c->rpc, endpoint, &c->link, err);
    int64_t until = moe_now_ns(config.clock) + CALL_TIMEOUT_NS;
    while (status == MOE_OK && !moe_rpc_peer_of_link(c->rpc, c->link)) {
        int64_t now = moe_now_ns(config.clock);
        if (now >= until) return moe_fail(err, MOE_UNAVAILABLE, "no router answers at %s", endpoint);
        status = moe_rpc_step(c->rpc, now + STEP_NS, err);
    }
    return status;
}

moe_status moe_operator_open(const moe_options *o, moe_operator_client *c, moe_error *err) {
    const char *dir = moe_option_text(o, "cluster"), *endpoint = moe_option_text(o, "router"), *keys = moe_option_text(o, "keys");
    static moe_cluster_file file; /* large, and one per process */
    *c = (moe_operator_client){.link = 0};
    moe_status status = dir ? moe_cluster_file_read(dir, &file, NULL, err) : MOE_OK;
    if (status != MOE_OK) return status;
    if (dir && !endpoint) endpoint = file.router;
    if (dir && !keys && file.keys[0]) keys = file.keys;
    if (!endpoint) return moe_fail(err, MOE_INVALID_ARGUMENT, "which cluster? Give --cluster RUN_DIR or --router ENDPOINT");
    return connect(c, endpoint, keys, err);
}

void moe_operator_close(moe_operator_client *c) {
    moe_rpc_free(&c->rpc);
    if (c->transport) c->transport->ops->close(c->transport);
    c->transport = NULL;
}

typedef struct answer {
    bool ended;
    moe_status status;
    moe_error *err;
    void (*on_response)(void *ctx, const ProtobufCMessage *response);
    void *ctx;
} answer;

static void on_reply(void *ctx, const moe_rpc_reply *reply) {
    answer *a = ctx;
    a->ended = reply->last;
    a->status = reply->status == MOE_OK ? MOE_OK : moe_fail(a->err, reply->status, "%s", reply->message);
    if (reply->status == MOE_OK && reply->body) a->on_response(a->ctx, reply->body);
}

moe_status moe_operator_call(moe_operator_client *c, const char *method, const ProtobufCMessage *request,
                             void (*on_response)(void *ctx, const ProtobufCMessage *response), void *ctx, moe_error *err) {
    answer a = {.err = err, .on_response = on_response, .ctx = ctx};
    const moe_rpc_peer *peer = moe_rpc_peer_of_link(c->rpc, c->link);
    if (!peer) return moe_fail(err, MOE_UNAVAILABLE, "the router went away");
    int64_t deadline = moe_now_ns(moe_clock_real()) + CALL_TIMEOUT_NS;
    moe_status status = moe_rpc_call_start(c->rpc, peer->peer, method, request, NULL, 0, deadline, on_reply, &a, NULL, err);
    while (status == MOE_OK && !a.ended) status = moe_rpc_step(c->rpc, moe_now_ns(moe_clock_real()) + STEP_NS, err);
    return status == MOE_OK ? a.status : status;
}
