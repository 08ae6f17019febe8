/* A router with all that it stands on: model, tokenizer, engine, controller, fronts; with `embedded`, an expert worker in the
 * same process too. Used by `moesaic router`, and without fronts by `moesaic eval`. */
#pragma once
#include "cli/implementations.h"
#include "expert-worker/residency.h"
#include "router/engine/engine.h"
#include "router/inference.h"
#include "router/placement/controller.h"

typedef struct moe_router_node moe_router_node;

typedef struct moe_router_node_config {
    moe_model_source source;
    moe_backend_config backend;
    const char *served_name; /* NULL: the folder's name */
    bool skip_tokenizer;
    const char *chat_template_fallback; /* NULL: none */

    bool embedded;            /* the experts live in this process; store and keys_dir are not used */
    moe_store_address store;  /* where not embedded */
    const char *keys_dir;     /* CURVE keys; NULL: no tcp */
    const char *cluster_uuid; /* ""; that of the store's cluster, made where there is none */
    const char *run_dir;      /* of the `serve` that started this router, else NULL */
    const char *id;

    moe_gating gating;
    moe_dummy_routing_spec dummy_routing; /* of generated weights */
    moe_combine_mode combine;
    int32_t max_num_seqs, max_num_batched_tokens, max_model_len, max_waiting;
    moe_tier_options tiers; /* its budget: of the experts that tokens are routed to; the rest where embedded: of the experts */
    bool local_steps;      /* where embedded: a forward step is one job of the backend, where it can be */
    int32_t micro_batches; /* 0: 1 where embedded, else 2 */
    int32_t pipeline_degree; /* as in moe_engine_config */
    int64_t kv_cache_bytes;
    int64_t replica_wait_ns;
    int64_t poll_us; /* how long the engine polls for its workers' messages before it sleeps */
    int32_t replicas, initial_workers;
    const char *expert_digests; /* manifest; NULL: the one beside the checkpoint, where it is there */
    bool new_cluster; /* as in moe_controller_config */
    moe_balance_config balance;
    moe_placement_kind layout;
    uint64_t layout_seed;
    const char *layout_file, *state_dir;

    const char *http_host; /* NULL: no HTTP front */
    int32_t http_port;
    const char *api_key;
    const char *ssl_certfile, *ssl_keyfile; /* as of moe_http_config */
    bool vllm_metrics;
    const char *rpc_listen; /* endpoint; NULL: no RPC front */

    moe_timeline *timeline; /* where embedded: of the engine and its worker; borrowed; NULL: none is kept */
    void (*on_layer)(void *ctx, const moe_layer_view *view); /* as in moe_engine_config; NULL: nobody looks */
    void *on_layer_ctx;
} moe_router_node_config;

/* Opens and starts everything; returns while workers may still be joining. The config's strings must outlive the node. */
moe_status moe_router_node_open(const moe_router_node_config *config, moe_router_node **out, moe_error *err);
void moe_router_node_close(moe_router_node **node); /* NULLs; idempotent */

/* What can change while nothing is in flight, with nothing loaded again. */
typedef struct moe_router_node_setting {
    moe_gating gating;
    moe_dummy_routing_spec dummy_routing;
    moe_memory_limit device; /* of an embedded worker with tiers, as in `tiers`; no limit: it stays as it is */
    moe_cold_experts cold;   /* with a limit; FETCH where the node was opened with FETCH */
} moe_router_node_setting;
/* Blocks; *copy_bytes_per_s (may be NULL) as of moe_residency_resize, 0 where the slots stay. After a failure the node is to be
 * closed. */
moe_status moe_router_node_set(moe_router_node *node, const moe_router_node_setting *setting, double *copy_bytes_per_s, moe_error *err);

/* Of the device, or of the machine. */
moe_status moe_router_node_memory(moe_router_node *node, moe_memory_info *out, moe_error *err);

void moe_router_node_drain(moe_router_node *node); /* no new requests */
bool moe_router_node_idle(moe_router_node *node);  /* nothing in flight */
bool moe_router_node_ready(moe_router_node *node);
int32_t moe_router_node_http_port(const moe_router_node *node);
moe_engine *moe_router_node_engine(moe_router_node *node);
const moe_inference *moe_router_node_inference(const moe_router_node *node);
const moe_model *moe_router_node_model(const moe_router_node *node);
int64_t moe_router_node_kv_token_bytes(const moe_router_node *node); /* keys and values of a token in all layers */
/* Where embedded: as moe_worker_node_memory; else 0, 0. */
void moe_router_node_expert_memory(moe_router_node *node, int64_t *weight_bytes, int64_t *device_bytes);
/* Why it is not ready yet, for progress lines. */
void moe_router_node_waiting_for(moe_router_node *node, char *text, size_t size);
