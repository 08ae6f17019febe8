/* `moesaic router`: one router of a cluster, until a signal ends it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/node_options.h"
#include "cli/secret_option.h"
#include "cli/signals.h"
#include "cli/worker_node.h"
#include "common/failpoint.h"
#include "common/log.h"

#define POLL_NS (50 * MOE_NS_PER_MS)

/* `id` and `api_key` are what the config borrows. */
static moe_status read_options(const moe_options *o, char *id, size_t id_size, char api_key[MOE_SECRET_BYTES],
                               moe_router_node_config *c, moe_error *err) {
    moe_status status = moe_engine_options(o, c, err);
    c->gating = moe_gating_option(o);
    if (status == MOE_OK) status = moe_dummy_routing_option(o, &c->dummy_routing, err);
    if (status != MOE_OK) return status;
    c->served_name = moe_option_text(o, "served-model-name");
    c->skip_tokenizer = moe_option_bool(o, "skip-tokenizer-init");
    c->chat_template_fallback = moe_option_text(o, "chat-template-fallback");
    c->store = (moe_store_address){moe_option_text(o, "store"), moe_option_text(o, "redis-username"),
                                   moe_option_text(o, "redis-password-file"), moe_option_text(o, "cluster-name")};
    c->embedded = c->store.address == NULL;
    c->keys_dir = moe_option_text(o, "keys");
    c->replicas = (int32_t)moe_option_int(o, "replicas");
    c->initial_workers = (int32_t)moe_option_int(o, "initial-workers");
    c->state_dir = moe_option_text(o, "state-dir");
    c->expert_digests = moe_option_text(o, "expert-digests");
    c->http_host = moe_option_text(o, "host");
    c->http_port = (int32_t)moe_option_int(o, "port");
    c->ssl_certfile = moe_option_text(o, "ssl-certfile");
    c->ssl_keyfile = moe_option_text(o, "ssl-keyfile");
    if (c->ssl_keyfile && !c->ssl_certfile)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--ssl-keyfile %s: --ssl-certfile is missing", c->ssl_keyfile);
    c->vllm_metrics = strcmp(moe_option_text(o, "metrics-compat"), "vllm") == 0;
    c->rpc_listen = moe_option_text(o, "listen");
    c->run_dir = getenv("MOESAIC_SERVE_RUN_DIR"); /* told by `serve` to its own router, as is the uuid */
    c->cluster_uuid = getenv("MOESAIC_SERVE_CLUSTER_UUID");
    c->new_cluster = getenv("MOESAIC_SERVE_NEW_CLUSTER") != NULL; /* the first router of a new store, not one started again */
    if (moe_option_text(o, "id"))
        snprintf(id, id_size, "%s", moe_option_text(o, "id"));
    else
        moe_default_id("router", id, id_size);
    c->id = id;
    if (c->embedded && c->replicas > 1)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--replicas %d: without --store the experts live in this process, once",
                        c->replicas);
    c->balance = moe_balance_options(o);
    status = moe_secret_option(o, "api-key", api_key, &c->api_key, err);
    return status == MOE_OK ? moe_placement_option(o, c, err) : status;
}

/* Serves until a signal, then lets requests end until `drain_ns` or a second signal. */
static void serve_until_signal(moe_router_node *node, int64_t drain_ns) {
    bool ready = false, signalled = false;
    while (!signalled) {
        signalled = moe_signals_wait(POLL_NS);
        if (ready || !moe_router_node_ready(node)) continue;
        ready = true;
        moe_info("ready: http port %d", moe_router_node_http_port(node));
    }
    moe_info("draining; a second signal stops at once");
    moe_router_node_drain(node);
    for (int64_t left = drain_ns; left > 0 && !moe_router_node_idle(node); left -= POLL_NS)
        if (moe_signals_wait(POLL_NS)) break;
}

int moe_command_router(const moe_options *o) {
    moe_router_node_config config = {0};
    moe_router_node *node;
    moe_error err;
    char id[MOE_WORKER_ID_BYTES], api_key[MOE_SECRET_BYTES];
    moe_signals_block();
    moe_status status = read_options(o, id, sizeof id, api_key, &config, &err);
    if (status == MOE_OK) moe_failpoints_open(config.id);
    if (status == MOE_OK) status = moe_router_node_open(&config, &node, &err);
    if (status != MOE_OK) return moe_command_failed(&err);
    serve_until_signal(node, moe_option_ns(o, "shutdown-timeout"));
    moe_router_node_close(&node);
    return 0;
}
