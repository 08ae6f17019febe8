/* `moesaic worker`: one expert worker of a cluster, until a signal ends it. */
#include <stdio.h>
#include <string.h>

#include "cli/cluster_file.h"
#include "cli/commands.h"
#include "cli/node_options.h"
#include "cli/signals.h"
#include "cli/worker_node.h"
#include "common/log.h"
#include "common/zmq/zmq_transport.h"
#include "expert-worker/registry.h"

typedef struct worker_settings {
    moe_cluster_file file; /* of --cluster; all "" without it */
    char id[MOE_WORKER_ID_BYTES];
    char listen[PATH_MAX];
    const char *model_dir, *keys_dir;
    moe_store_address store;
} worker_settings;

static const char *given(const char *option, const char *from_file) { return option ? option : *from_file ? from_file : NULL; }

/* Options come first; what they leave open, the run folder of --cluster answers. */
static moe_status read_options(const moe_options *o, worker_settings *s, moe_error *err) {
    const char *cluster = moe_option_text(o, "cluster"), *listen = moe_option_text(o, "listen");
    moe_status status = cluster ? moe_cluster_file_read(cluster, &s->file, NULL, err) : MOE_OK;
    if (status != MOE_OK) return status;
    if (moe_option_text(o, "id"))
        snprintf(s->id, sizeof s->id, "%s", moe_option_text(o, "id"));
    else
        moe_default_id("worker", s->id, sizeof s->id);
    s->model_dir = given(moe_options_positional(o), s->file.model);
    s->keys_dir = given(moe_option_text(o, "keys"), s->file.keys);
    s->store = (moe_store_address){given(moe_option_text(o, "store"), s->file.redis), moe_option_text(o, "redis-username"),
                                   moe_option_text(o, "redis-password-file"), moe_option_text(o, "cluster-name")};
    if (listen)
        snprintf(s->listen, sizeof s->listen, "%s", listen);
    else if (strncmp(s->file.listen, "tcp:", 4) == 0)
        snprintf(s->listen, sizeof s->listen, "%s", s->file.listen);
    else if (cluster)
        snprintf(s->listen, sizeof s->listen, "ipc://%.3900s/%s.sock", s->file.run_dir, s->id);
    if (!s->model_dir) return moe_fail(err, MOE_INVALID_ARGUMENT, "worker needs MODEL, or --cluster DIR");
    if (!s->store.address) return moe_fail(err, MOE_INVALID_ARGUMENT, "worker needs --store ADDRESS, or --cluster DIR");
    if (!s->listen[0]) return moe_fail(err, MOE_INVALID_ARGUMENT, "worker needs --listen ENDPOINT, or --cluster DIR");
    return MOE_OK;
}

/* The cluster's uuid: of the run folder, else of the store's meta, which the first router writes. */
static moe_status find_cluster(const worker_settings *s, moe_store *store, char uuid[MOE_UUID_BYTES], moe_error *err) {
    bool told = false;
    if (s->file.uuid[0]) {
        memcpy(uuid, s->file.uuid, MOE_UUID_BYTES);
        return MOE_OK;
    }
    for (;;) {
        moe_status status = moe_registry_cluster_uuid(store, uuid, err);
        if (status == MOE_OK) return MOE_OK;
        if (status != MOE_NOT_FOUND && status != MOE_UNAVAILABLE) return status;
        if (!told) moe_info("waiting for the cluster at %s: %s", s->store.address, err->message);
        told = true;
        if (moe_signals_wait(200 * MOE_NS_PER_MS)) return moe_fail(err, MOE_CANCELLED, "stopped before the cluster was found");
    }
}

static moe_status run(const moe_options *o, worker_settings *s, moe_model *model, moe_backend *backend, moe_error *err) {
    moe_curve_keys keys = {.public_key = ""};
    char uuid[MOE_UUID_BYTES];
    moe_store *store;
    moe_transport *transport;
    moe_worker_node *node;
    moe_status status = s->keys_dir ? moe_curve_keys_read(s->keys_dir, MOE_ROLE_WORKER, &keys, err) : MOE_OK;
    if (status == MOE_OK) status = moe_store_open(&s->store, &store, err);
    if (status != MOE_OK) return status;
    status = find_cluster(s, store, uuid, err);
    if (status == MOE_OK) status = moe_network_open(s->keys_dir, MOE_ROLE_WORKER, &transport, err);
    if (status != MOE_OK) {
        store->ops->close(store);
        return status;
    }
    moe_worker_node_config config = {.model = model,
                                     .backend = backend,
                                     .transport = transport,
                                     .store = store,
                                     .listen = s->listen,
                                     .advertise = moe_option_text(o, "advertise"),
                                     .public_key = keys.public_key,
                                     .id = s->id,
                                     .cluster_uuid = uuid,
                                     .max_queued_calls = (int32_t)moe_option_int(o, "max-queued-calls"),
                                     .max_batch_rows = (int32_t)moe_option_int(o, "max-batch-rows")};
    status = moe_worker_node_open(&config, &node, err);
    if (status != MOE_OK) return status;
    while (!moe_signals_wait(MOE_NS_PER_S)) continue;
    moe_info("leaving");
    moe_worker_node_close(&node);
    return MOE_OK;
}

int moe_command_worker(const moe_options *o) {
    worker_settings s = {0};
    moe_model *model = NULL;
    moe_backend *backend = NULL;
    moe_error err;
    moe_signals_block();
    moe_status status = read_options(o, &s, &err);
    if (status == MOE_OK) status = moe_model_open(s.model_dir, &model, &err);
    moe_backend_config config = {.name = moe_option_text(o, "backend"), .threads = moe_threads_option(o)};
    if (status == MOE_OK) status = moe_backend_open(&config, &backend, &err);
    if (status == MOE_OK) status = run(o, &s, model, backend, &err);
    if (backend) backend->ops->close(backend);
    moe_model_close(&model);
    return status == MOE_OK || status == MOE_CANCELLED ? 0 : moe_command_failed(&err);
}
