#include "cli/router_node.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cluster_status.h"
#include "cli/worker_node.h"
#include "common/alloc.h"
#include "common/inproc/inproc.h"
#include "common/log.h"
#include "common/memory/memory_store.h"
#include "common/model/expert_digests.h"
#include "common/random.h"
#include "router/http/server.h"
#include "router/rpc/rpc_front.h"

#define MOE_SUSPECT_AFTER_NS (300 * MOE_NS_PER_MS)
#define MOE_CALL_TIMEOUT_NS (60 * MOE_NS_PER_S)
#define MOE_EMBEDDED_ENDPOINT "inproc:w0"
#define MOE_WORKER_MAX_QUEUED_CALLS 1024
#define MOE_WORKER_MAX_BATCH_ROWS 16384

struct moe_router_node {
    moe_router_node_config config;
    char served_name[MOE_MODEL_NAME_BYTES];
    char lossy[64]; /* "": replies are the whole model's */
    char host[64];
    char cluster_uuid[MOE_UUID_BYTES];
    uint64_t incarnation;
    moe_model *model;
    moe_tokenizer *tokenizer;
    moe_chat_template *chat_template;
    moe_backend *backend, *cold_host; /* cold_host: the host of moe_worker_config */
    moe_inproc_hub *hub; /* embedded only, as the next two */
    moe_memory_hub *memory;
    moe_worker_node *worker;
    moe_transport *engine_transport, *controller_transport, *rpc_transport;
    moe_store *store;
    uint64_t *expert_digests;   /* NULL: there is no manifest */
    moe_controller *controller; /* NULL for a dense model: there is nothing to place */
    moe_engine *engine;
    moe_inference inference;
    moe_cluster_reporter *reporter;
    pthread_mutex_t map_mutex;
    moe_placement *map; /* newest; guarded by map_mutex, as the next */
    bool takes_maps;    /* the engine and the reporter are there */
    moe_http_server *http;
    moe_rpc_front *rpc;
};

/* With map_mutex held. */
static void deliver_map(moe_router_node *n) {
    if (!n->map || !n->takes_maps) return;
    moe_cluster_reporter_set_map(n->reporter, n->map);
    moe_engine_set_placement(n->engine, n->map);
}

static void on_map(void *ctx, moe_placement *map) {
    moe_router_node *n = ctx;
    moe_placement_ref(map);
    pthread_mutex_lock(&n->map_mutex);
    moe_placement_unref(&n->map);
    n->map = map;
    deliver_map(n);
    pthread_mutex_unlock(&n->map_mutex);
}

/* Before there is an engine, nothing is routed by any map. */
static uint64_t routing_epoch(void *ctx) {
    moe_router_node *n = ctx;
    pthread_mutex_lock(&n->map_mutex);
    uint64_t epoch = n->takes_maps ? moe_engine_routing_epoch(n->engine) : n->map ? n->map->epoch : 0;
    pthread_mutex_unlock(&n->map_mutex);
    return epoch;
}

static void on_not_held(void *ctx) {
    moe_router_node *n = ctx;
    moe_controller_hurry(n->controller);
}

static void take_maps(moe_router_node *n) {
    pthread_mutex_lock(&n->map_mutex);
    n->takes_maps = true;
    deliver_map(n);
    pthread_mutex_unlock(&n->map_mutex);
}

/* --served-model-name, else the folder's name. */
static moe_status name_model(moe_router_node *n, moe_error *err) {
    char path[PATH_MAX];
    if (!realpath(n->config.source.dir, path))
        return moe_fail(err, MOE_NOT_FOUND, "cannot find %s: %s", n->config.source.dir, strerror(errno));
    const char *slash = strrchr(path, '/');
    const char *name = n->config.served_name ? n->config.served_name : slash && slash[1] ? slash + 1 : path;
    if (strlen(name) >= sizeof n->served_name)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "the model's name is too long: %s", name);
    memcpy(n->served_name, name, strlen(name) + 1);
    return MOE_OK;
}

static moe_status open_model(moe_router_node *n, moe_error *err) {
    moe_status status = moe_model_source_open(&n->config.source, &n->model, err);
    if (status == MOE_OK) status = name_model(n, err);
    if (status != MOE_OK) return status;
    if (!n->config.skip_tokenizer) {
        status = moe_tokenizer_load(n->config.source.dir, &n->tokenizer, err);
        if (status == MOE_NOT_FOUND)
            moe_fail_prefix(err, status, "give token ids alone (--skip-tokenizer-init; \"token_ids\" in --data), or");
        if (status != MOE_OK) return status;
        status = moe_chat_template_load(n->config.source.dir, n->config.chat_template_fallback, &n->chat_template, err);
        if (status == MOE_NOT_FOUND) moe_warn("no chat: %s", err->message);
        if (status != MOE_OK && status != MOE_NOT_FOUND) return status;
    }
    return moe_backend_open(&n->config.backend, &n->backend, err);
}

static moe_status open_embedded(moe_router_node *n, moe_error *err) {
    moe_transport *transport = NULL;
    moe_store *store = NULL;
    moe_status status = moe_inproc_hub_new(moe_clock_real(), 0, &n->hub, err);
    if (status == MOE_OK) status = moe_memory_hub_new(moe_clock_real(), &n->memory, err);
    if (status == MOE_OK) status = moe_inproc_open(n->hub, &n->engine_transport, err);
    if (status == MOE_OK) status = moe_inproc_open(n->hub, &n->controller_transport, err);
    if (status == MOE_OK) status = moe_memory_open(n->memory, &n->store, err);
    if (status == MOE_OK) status = moe_inproc_open_beside(n->engine_transport, &transport, err);
    if (status == MOE_OK) status = moe_memory_open(n->memory, &store, err);
    if (status == MOE_OK && n->config.tiers.cold != MOE_COLD_FETCH)
        status = moe_host_backend_open(&n->config.backend, n->backend, &n->cold_host, err);
    if (status != MOE_OK || n->model->config.num_moe_layers == 0) {
        if (store) store->ops->close(store);
        if (transport) transport->ops->close(transport);
        return status;
    }
    moe_worker_node_config worker = {.model = n->model,
                                     .backend = n->backend,
                                     .host = n->cold_host,
                                     .transport = transport,
                                     .store = store,
                                     .listen = MOE_EMBEDDED_ENDPOINT,
                                     .public_key = "",
                                     .id = "w0",
                                     .cluster_uuid = n->cluster_uuid,
                                     .max_queued_calls = MOE_WORKER_MAX_QUEUED_CALLS,
                                     .max_batch_rows = MOE_WORKER_MAX_BATCH_ROWS,
                                     .tiers = n->config.tiers,
                                     .timeline = n->config.timeline,
                                     .threads = n->config.backend.threads,
                                     .stepped = true};
    return moe_worker_node_open(&worker, &n->worker, err);
}

static moe_status open_remote(moe_router_node *n, moe_error *err) {
    moe_status status = moe_network_open(n->config.keys_dir, MOE_ROLE_ROUTER, n->config.poll_us, &n->engine_transport, err);
    if (status == MOE_OK) status = moe_network_open(n->config.keys_dir, MOE_ROLE_ROUTER, 0, &n->controller_transport, err);
    if (status == MOE_OK) status = moe_store_open(&n->config.store, &n->store, err);
    return status;
}

/* The manifest that was named, or the one beside the checkpoint where there is one. */
static moe_status read_expert_digests(moe_router_node *n, moe_error *err) {
    const moe_router_node_config *c = &n->config;
    const moe_model_config *m = &n->model->config;
    char beside[PATH_MAX];
    snprintf(beside, sizeof beside, "%s/" MOE_EXPERT_DIGESTS_FILE, c->source.dir);
    if (!c->expert_digests && (c->embedded || c->source.dummy)) return MOE_OK;
    const char *path = c->expert_digests ? c->expert_digests : beside;
    moe_status status =
        moe_expert_digests_read(path, n->model->digest, m->num_moe_layers, m->num_experts, &n->expert_digests, err);
    if (status == MOE_NOT_FOUND && !c->expert_digests) return MOE_OK;
    if (status == MOE_OK) moe_info("expert digests are held against %s", path);
    return status;
}

static moe_status open_controller(moe_router_node *n, moe_error *err) {
    const moe_router_node_config *c = &n->config;
    if (n->model->config.num_moe_layers == 0) return MOE_OK;
    moe_balance_config balance = c->balance;
    if (c->embedded) balance.automatic = false;
    moe_controller_config config = {.store = n->store,
                                    .transport = n->controller_transport,
                                    .clock = moe_clock_real(),
                                    .cluster_uuid = n->cluster_uuid,
                                    .id = c->id,
                                    .endpoint = c->rpc_listen ? c->rpc_listen : "",
                                    .host = n->host,
                                    .incarnation = n->incarnation,
                                    .model_digest = n->model->digest,
                                    .pid = getpid(),
                                    .num_moe_layers = n->model->config.num_moe_layers,
                                    .num_experts = n->model->config.num_experts,
                                    .replicas = c->embedded ? 1 : c->replicas,
                                    .initial_workers = c->embedded ? 1 : c->initial_workers,
                                    .new_cluster = c->embedded || c->new_cluster,
                                    .layout = c->embedded ? MOE_PLACEMENT_BALANCED : c->layout,
                                    .layout_seed = c->layout_seed,
                                    .layout_file = c->layout_file,
                                    .expert_digests = n->expert_digests,
                                    .state_dir = c->state_dir,
                                    .balance = balance,
                                    .routing_epoch = routing_epoch,
                                    .on_map = on_map,
                                    .ctx = n};
    moe_status status = moe_controller_new(&config, &n->controller, err);
    if (status == MOE_OK) snprintf(n->cluster_uuid, sizeof n->cluster_uuid, "%s", moe_controller_cluster_uuid(n->controller));
    return status;
}

static int32_t kv_blocks(const moe_router_node *n, int32_t max_model_len) {
    int64_t each = n->backend->ops->kv_block_bytes(n->backend, &n->model->config);
    int64_t blocks = n->config.kv_cache_bytes / each;
    int64_t most = (int64_t)n->config.max_num_seqs * ((max_model_len + MOE_KV_BLOCK_TOKENS - 1) / MOE_KV_BLOCK_TOKENS);
    if (blocks > most) blocks = most;
    return blocks < INT32_MAX ? (int32_t)blocks : INT32_MAX;
}

/* A second micro-batch hides the wait for other processes; with the experts in this one it only makes batches smaller. */
static int32_t micro_batches(const moe_router_node *n) {
    return n->config.micro_batches ? n->config.micro_batches : n->config.embedded ? 1 : 2;
}

static bool step_local_worker(void *worker) { return moe_worker_node_step(worker); }
static moe_expert *const *local_experts(void *worker) { return moe_worker_node_lend_experts(worker); }

static moe_status open_engine(moe_router_node *n, moe_error *err) {
    const moe_router_node_config *c = &n->config;
    int32_t longest = c->max_model_len ? c->max_model_len : n->model->config.max_positions;
    if (longest > n->model->config.max_positions)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "--max-model-len %d: this model has positions for %d tokens", longest,
                        n->model->config.max_positions);
    moe_layer_experts layer_experts = {.ops = NULL};
    if (n->worker && c->local_steps) layer_experts = moe_worker_node_layer_experts(n->worker);
    moe_engine_config config = {.model = n->model,
                                .backend = n->backend,
                                .transports = &n->engine_transport,
                                .num_transports = 1,
                                .clock = moe_clock_real(),
                                .tokenizer = n->tokenizer,
                                .cluster_uuid = n->cluster_uuid,
                                .id = c->id,
                                .incarnation = n->incarnation,
                                .gating = c->gating,
                                .dummy_routing = c->dummy_routing,
                                .combine = c->combine,
                                .expert_budget = c->tiers.budget,
                                .max_num_seqs = c->max_num_seqs,
                                .max_num_batched_tokens = c->max_num_batched_tokens,
                                .max_model_len = longest,
                                .max_waiting = c->max_waiting,
                                .micro_batches = micro_batches(n),
                                .pipeline_degree = c->pipeline_degree,
                                .num_kv_blocks = kv_blocks(n, longest),
                                .replica_wait_ns = c->replica_wait_ns,
                                .call_timeout_ns = MOE_CALL_TIMEOUT_NS,
                                .suspect_after_ns = MOE_SUSPECT_AFTER_NS,
                                .step_local_worker = n->worker ? step_local_worker : NULL,
                                .local_experts = n->worker && c->local_steps ? local_experts : NULL,
                                .local_worker = n->worker,
                                .layer_experts = layer_experts,
                                .timeline = c->timeline,
                                .on_layer = c->on_layer,
                                .on_layer_ctx = c->on_layer_ctx,
                                .on_not_held = on_not_held,
                                .on_not_held_ctx = n};
    moe_status status = moe_engine_new(&config, &n->engine, err);
    if (status != MOE_OK) return status;
    if (moe_expert_budget_given(c->tiers.budget)) {
        char name[MOE_EXPERT_BUDGET_NAME_BYTES];
        moe_expert_budget_name(c->tiers.budget, name);
        snprintf(n->lossy, sizeof n->lossy, "budget%s", name);
    }
    n->inference = (moe_inference){.ops = moe_inference_engine_ops(),
                                   .ctx = n->engine,
                                   .model = n->served_name,
                                   .max_model_len = longest,
                                   .vocab = n->model->config.vocab,
                                   .max_waiting = c->max_waiting,
                                   .tokenizer = n->tokenizer,
                                   .chat_template = n->chat_template,
                                   .generation = n->model->generation,
                                   .lossy = n->lossy[0] ? n->lossy : NULL};
    return moe_engine_start(n->engine, err);
}

static moe_status open_fronts(moe_router_node *n, moe_error *err) {
    const moe_router_node_config *c = &n->config;
    moe_status status = MOE_OK;
    const moe_cluster_view *view = moe_cluster_reporter_view(n->reporter);
    if (c->rpc_listen) {
        char bound[MOE_ENDPOINT_BYTES];
        status = moe_network_open(c->keys_dir, MOE_ROLE_ROUTER, 0, &n->rpc_transport, err);
        if (status == MOE_OK) status = n->rpc_transport->ops->listen(n->rpc_transport, c->rpc_listen, bound, err);
        moe_rpc_front_config front = {.transport = n->rpc_transport,
                                      .clock = moe_clock_real(),
                                      .hello = {.cluster_uuid = n->cluster_uuid,
                                                .role = "router",
                                                .id = c->id,
                                                .profile = "",
                                                .incarnation = n->incarnation,
                                                .model_digest = n->model->digest},
                                      .inference = &n->inference,
                                      .cluster = view};
        if (status == MOE_OK) status = moe_rpc_front_start(&front, &n->rpc, err);
    }
    if (status == MOE_OK && c->http_host) {
        moe_http_config http = {.host = c->http_host,
                                .port = c->http_port,
                                .api_key = c->api_key,
                                .ssl_certfile = c->ssl_certfile,
                                .ssl_keyfile = c->ssl_keyfile,
                                .vllm_metrics = c->vllm_metrics,
                                .inference = &n->inference,
                                .cluster = view};
        status = moe_http_server_start(&http, &n->http, err);
    }
    return status;
}

/* The controller runs first, so that workers load their experts while this process packs the base weights. */
static moe_status open_all(moe_router_node *n, moe_error *err) {
    moe_status status = open_model(n, err);
    if (status != MOE_OK) return status;
    if (n->config.embedded || n->model->config.num_moe_layers == 0) moe_uuid_make(n->cluster_uuid);
    if (n->config.cluster_uuid) snprintf(n->cluster_uuid, sizeof n->cluster_uuid, "%s", n->config.cluster_uuid);
    status = n->config.embedded ? open_embedded(n, err) : open_remote(n, err);
    if (status == MOE_OK) status = read_expert_digests(n, err);
    if (status == MOE_OK) status = open_controller(n, err);
    if (status == MOE_OK && n->controller) status = moe_controller_start(n->controller, err);
    if (status == MOE_OK) status = open_engine(n, err);
    moe_cluster_reporter_config reporter = {.engine = n->engine,
                                            .controller = n->controller,
                                            .model = n->model,
                                            .served_name = n->served_name,
                                            .cluster_uuid = n->cluster_uuid,
                                            .expert_budget = n->config.tiers.budget,
                                            .redis_used = !n->config.embedded,
                                            .run_dir = n->config.run_dir};
    if (status == MOE_OK) status = moe_cluster_reporter_new(&reporter, &n->reporter, err);
    if (status == MOE_OK) take_maps(n);
    if (status == MOE_OK) status = open_fronts(n, err);
    return status;
}

moe_status moe_router_node_open(const moe_router_node_config *config, moe_router_node **out, moe_error *err) {
    moe_router_node *n = *out = moe_calloc(1, sizeof *n);
    if (!n) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    pthread_mutex_init(&n->map_mutex, NULL);
    n->config = *config;
    n->incarnation = moe_random_identity();
    moe_host_name(n->host, sizeof n->host);
    moe_status status = open_all(n, err);
    if (status != MOE_OK) moe_router_node_close(out);
    return status;
}

static void close_transport(moe_transport *t) {
    if (t) t->ops->close(t);
}

void moe_router_node_close(moe_router_node **node) {
    moe_router_node *n = *node;
    *node = NULL;
    if (!n) return;
    moe_http_server_stop(&n->http);
    moe_rpc_front_stop(&n->rpc);
    close_transport(n->rpc_transport);
    if (n->controller) {
        moe_controller_stop(n->controller);
        moe_controller_resign(n->controller);
    }
    moe_engine_free(&n->engine);
    moe_controller_free(&n->controller);
    moe_free(n->expert_digests);
    moe_cluster_reporter_free(&n->reporter);
    moe_worker_node_close(&n->worker);
    close_transport(n->engine_transport);
    close_transport(n->controller_transport);
    if (n->store) n->store->ops->close(n->store);
    moe_memory_hub_free(&n->memory);
    moe_inproc_hub_free(&n->hub);
    moe_host_backend_close(&n->cold_host, n->backend);
    if (n->backend) n->backend->ops->close(n->backend);
    moe_chat_template_free(&n->chat_template);
    moe_tokenizer_free(&n->tokenizer);
    moe_model_close(&n->model);
    moe_placement_unref(&n->map);
    pthread_mutex_destroy(&n->map_mutex);
    moe_free(n);
}

moe_status moe_router_node_set(moe_router_node *n, const moe_router_node_setting *s, double *copy_bytes_per_s, moe_error *err) {
    double rate = 0;
    moe_engine_stop(n->engine); /* it steps the worker, too */
    moe_status status = moe_engine_reroute(n->engine, s->gating, &s->dummy_routing, err);
    if (status == MOE_OK && moe_memory_limited(s->device)) status = moe_worker_node_resize(n->worker, s->device, s->cold, &rate, err);
    if (copy_bytes_per_s) *copy_bytes_per_s = rate;
    return status == MOE_OK ? moe_engine_start(n->engine, err) : status;
}

moe_status moe_router_node_memory(moe_router_node *n, moe_memory_info *out, moe_error *err) {
    return n->backend->ops->memory_info(n->backend, out, err);
}

void moe_router_node_drain(moe_router_node *n) {
    if (n->http) moe_http_server_drain(n->http);
    if (n->rpc) moe_rpc_front_drain(n->rpc);
    moe_engine_drain(n->engine);
}

static void engine_load(moe_router_node *n, bool *ready, int32_t *requests) {
    moe_engine_view *view = moe_calloc(1, sizeof *view);
    *ready = false;
    *requests = 0;
    if (!view) return;
    moe_engine_get_view(n->engine, view);
    *ready = view->ready;
    *requests = view->running + view->waiting;
    moe_free(view);
}

bool moe_router_node_idle(moe_router_node *n) {
    bool ready;
    int32_t requests;
    engine_load(n, &ready, &requests);
    return requests == 0 && (!n->http || moe_http_server_in_flight(n->http) == 0);
}

bool moe_router_node_ready(moe_router_node *n) {
    bool ready;
    int32_t requests;
    engine_load(n, &ready, &requests);
    return ready;
}

int32_t moe_router_node_http_port(const moe_router_node *n) { return n->http ? moe_http_server_port(n->http) : 0; }
moe_engine *moe_router_node_engine(moe_router_node *n) { return n->engine; }
const moe_model *moe_router_node_model(const moe_router_node *n) { return n->model; }

int64_t moe_router_node_kv_token_bytes(const moe_router_node *n) {
    return n->backend->ops->kv_block_bytes(n->backend, &n->model->config) / MOE_KV_BLOCK_TOKENS;
}

void moe_router_node_expert_memory(moe_router_node *n, int64_t *weight_bytes, int64_t *device_bytes) {
    *weight_bytes = *device_bytes = 0;
    if (n->worker) moe_worker_node_memory(n->worker, weight_bytes, device_bytes);
}

const moe_inference *moe_router_node_inference(const moe_router_node *n) { return &n->inference; }

void moe_router_node_waiting_for(moe_router_node *n, char *text, size_t size) {
    moe_controller_view *view = moe_calloc(1, sizeof *view);
    text[0] = '\0';
    if (!view || !n->controller) {
        moe_free(view);
        return;
    }
    moe_controller_get_view(n->controller, view);
    snprintf(text, size, "%s", view->waiting_for[0] ? view->waiting_for : "connections to the expert workers");
    moe_free(view);
}
