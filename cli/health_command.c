/* `moesaic health ROLE`: whether the router or worker of this machine serves, or the whole cluster is as it should be, for health
 * checks of containers and units and for rolling changes. It reads the same options and environment as the process that it asks,
 * and needs no shell tools. */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/http_client.h"
#include "cli/implementations.h"
#include "cli/secret_option.h"
#include "common/clock.h"
#include "common/random.h"
#include "proto/rpc.h"

#define HEALTH_TIMEOUT_NS (3 * MOE_NS_PER_S)
#define HEALTH_METHOD "/moesaic.v1.Health/Check"

/* An address that stands for all of a machine's is asked on loopback. */
static const char *reachable(const char *host) {
    static const char *const all[] = {"0.0.0.0", "*", "::", "[::]"};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strcmp(host, all[i]) == 0) return "127.0.0.1";
    return host;
}

/* The body of a 200 answer of this machine's router; the caller frees it in any case. */
static moe_status get(const moe_options *o, const char *path, const char *key, moe_buf *body, moe_error *err) {
    char url[512], text[MOE_ERROR_MESSAGE_BYTES / 2];
    int http_status = 0;
    const char *certificate = moe_option_text(o, "ssl-certfile");
    snprintf(url, sizeof url, "http%s://%.400s:%d", certificate ? "s" : "", reachable(moe_option_text(o, "host")),
             (int)moe_option_int(o, "port"));
    moe_http_call call = {.url = url,
                          .ca_file = certificate,
                          .any_host = true, /* by the very certificate, which names the service, not this machine's loopback */
                          .path = path,
                          .key = key,
                          .silence_ns = HEALTH_TIMEOUT_NS,
                          .cancel_fd = -1};
    moe_status status = moe_http_run(&call, &http_status, body, err);
    if (status != MOE_OK || http_status == 200) return status;
    moe_http_error_text(moe_buf_text(body), text, sizeof text);
    return moe_fail(err, MOE_UNAVAILABLE, "%s%s: HTTP %d: %s", url, path, http_status, text);
}

static moe_status check_router(const moe_options *o, moe_error *err) {
    moe_buf body = {0};
    moe_status status = get(o, moe_option_bool(o, "live") ? "/liveness" : "/readiness", NULL, &body, err);
    moe_buf_free(&body);
    return status;
}

static moe_status judge_cluster(const json_t *cluster, moe_error *err) {
    const json_t *layers = json_object_get(cluster, "layers"), *redis = json_object_get(cluster, "redis"), *item;
    json_int_t wanted = json_integer_value(json_object_get(cluster, "replicas"));
    size_t i;
    if (!json_is_true(json_object_get(cluster, "ready"))) return moe_fail(err, MOE_UNAVAILABLE, "the cluster is not ready");
    if (json_is_true(json_object_get(redis, "used")) && !json_is_true(json_object_get(redis, "up")))
        return moe_fail(err, MOE_UNAVAILABLE, "Redis does not answer");
    json_array_foreach(layers, i, item) {
        int replicas = (int)json_integer_value(json_object_get(item, "min_replicas"));
        if (replicas < wanted)
            return moe_fail(err, MOE_UNAVAILABLE, "an expert of MoE layer %d has %d ready replicas of %d", (int)i, replicas,
                            (int)wanted);
    }
    json_array_foreach(json_object_get(cluster, "workers"), i, item) {
        const char *state = json_string_value(json_object_get(item, "state"));
        if (state && strcmp(state, "suspect") == 0)
            return moe_fail(err, MOE_UNAVAILABLE, "worker %s is suspect", json_string_value(json_object_get(item, "id")));
    }
    return MOE_OK;
}

/* Every expert has as many READY replicas as wanted, Redis answers, no worker is suspect: a machine may be taken away. */
static moe_status check_cluster(const moe_options *o, moe_error *err) {
    char text[MOE_SECRET_BYTES];
    const char *key;
    moe_buf body = {0};
    moe_status status = moe_secret_option(o, "client-key", text, &key, err);
    if (status == MOE_OK) status = get(o, "/cluster/status", key, &body, err);
    json_t *cluster = status == MOE_OK ? json_loads(moe_buf_text(&body), 0, NULL) : NULL;
    if (status == MOE_OK)
        status = cluster ? judge_cluster(cluster, err) : moe_fail(err, MOE_DATA_LOSS, "/cluster/status is not JSON");
    json_decref(cluster);
    moe_buf_free(&body);
    return status;
}

typedef struct health_answer {
    bool ended, serving;
    moe_error error;
} health_answer;

static void on_answer(void *ctx, const moe_rpc_reply *reply) {
    health_answer *a = ctx;
    const Moesaic__V1__HealthCheckResponse *body = (const Moesaic__V1__HealthCheckResponse *)reply->body;
    a->ended = true;
    a->serving = reply->status == MOE_OK && body->status == MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    if (!a->serving) moe_fail(&a->error, reply->status == MOE_OK ? MOE_UNAVAILABLE : reply->status, "%.300s", reply->message);
}

/* The endpoint that a worker listens at, as one to connect to. */
static moe_status worker_endpoint(const char *listen, char endpoint[MOE_ENDPOINT_BYTES], moe_error *err) {
    char host[MOE_ENDPOINT_BYTES];
    const char *port = listen ? strrchr(listen, ':') : NULL;
    if (!port) return moe_fail(err, MOE_INVALID_ARGUMENT, "health worker needs --listen ENDPOINT, as the worker has it");
    if (strncmp(listen, "tcp://", 6) != 0) {
        snprintf(endpoint, MOE_ENDPOINT_BYTES, "%.200s", listen);
        return MOE_OK;
    }
    snprintf(host, sizeof host, "%.*s", port > listen + 6 ? (int)(port - listen - 6) : 0, listen + 6);
    snprintf(endpoint, MOE_ENDPOINT_BYTES, "tcp://%.200s%.16s", reachable(host), port);
    return MOE_OK;
}

/* Hello and one call, which the worker's own loop answers. */
static moe_status ask(moe_rpc *rpc, const char *endpoint, moe_error *err) {
    const moe_clock *clock = moe_clock_real();
    int64_t until = moe_now_ns(clock) + HEALTH_TIMEOUT_NS;
    uint64_t link;
    bool called = false;
    health_answer answer = {0};
    Moesaic__V1__HealthCheckRequest request = MOESAIC__V1__HEALTH_CHECK_REQUEST__INIT;
    moe_status status = moe_rpc_connect(rpc, endpoint, &link, err);
    while (status == MOE_OK && !answer.ended) {
        const moe_rpc_peer *peer = called ? NULL : moe_rpc_peer_of_link(rpc, link);
        if (peer) {
            status = moe_rpc_call_start(rpc, peer->peer, HEALTH_METHOD, &request.base, NULL, 0, until, on_answer, &answer, NULL, err);
            called = true;
        } else if (!called && moe_now_ns(clock) >= until) {
            status = moe_fail(err, MOE_UNAVAILABLE, "%s: no answer within %d s", endpoint, (int)(HEALTH_TIMEOUT_NS / MOE_NS_PER_S));
        }
        if (status == MOE_OK) status = moe_rpc_step(rpc, moe_now_ns(clock) + 50 * MOE_NS_PER_MS, err);
    }
    if (status == MOE_OK && !answer.serving) *err = answer.error;
    return status == MOE_OK && !answer.serving ? answer.error.code : status;
}

static moe_status check_worker(const moe_options *o, moe_error *err) {
    char endpoint[MOE_ENDPOINT_BYTES];
    moe_transport *transport = NULL;
    moe_rpc *rpc = NULL;
    moe_status status = worker_endpoint(moe_option_text(o, "listen"), endpoint, err);
    if (status == MOE_OK) status = moe_network_open(moe_option_text(o, "keys"), MOE_ROLE_WORKER, 0, &transport, err);
    if (status != MOE_OK) return status;
    moe_rpc_config config = {.transport = transport,
                             .clock = moe_clock_real(),
                             .hello = {.cluster_uuid = "",
                                       .role = "worker",
                                       .id = "health",
                                       .profile = "",
                                       .incarnation = moe_random_identity()}};
    status = moe_rpc_new(&config, &rpc, err);
    if (status == MOE_OK) status = ask(rpc, endpoint, err);
    moe_rpc_free(&rpc);
    transport->ops->close(transport);
    return status;
}

int moe_command_health(const moe_options *o) {
    moe_error err;
    const char *role = moe_options_positional(o);
    moe_status status;
    if (strcmp(role, "router") == 0)
        status = check_router(o, &err);
    else if (strcmp(role, "worker") == 0)
        status = check_worker(o, &err);
    else if (strcmp(role, "cluster") == 0)
        status = check_cluster(o, &err);
    else
        status = moe_fail(&err, MOE_INVALID_ARGUMENT, "health: '%s' is none of router, worker, cluster", role);
    if (status == MOE_OK) return 0;
    fprintf(stderr, "moesaic: %s\n", err.message);
    return status == MOE_INVALID_ARGUMENT ? 2 : 1;
}
