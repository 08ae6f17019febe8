/* The router's core: continuous batching, forward steps over expert workers, sampling. A single-threaded state machine
 * (`step`), driven by a thread in production and by the virtual clock in the simulation. */
#pragma once
#include "common/backend.h"
#include "common/layer_experts.h"
#include "common/model/expert_budget.h"
#include "common/timeline.h"
#include "proto/rpc.h"
#include "router/engine/dummy_routing.h"
#include "router/engine/request.h"
#include "router/placement/placement.h"

typedef struct moe_engine moe_engine;

typedef enum moe_gating { MOE_GATING_GATE, MOE_GATING_HINT, MOE_GATING_PRE_GATE } moe_gating;

/* What one MoE layer of a forward step was given and how it was routed. Borrowed for the duration of the call. */
typedef struct moe_layer_view {
    int32_t layer; /* 0 … num_moe_layers - 1, in this order for one micro-batch */
    int32_t num_rows;
    const int32_t *positions; /* [num_rows]: of the token in its request; a preempted request's come again */
    const int32_t *sequences; /* [num_rows]: index into requests */
    const uint64_t *requests; /* ids, as moe_engine_submit gave them: 1, 2, … in the order of submission */
    const void *activations;  /* [num_rows, H] of dtype: what gate, pre-gate and experts are given */
    moe_dtype dtype;
    const moe_route *route; /* what this layer uses */
    const moe_route *next;  /* predicted (hint) or decided (pre-gate) for the next MoE layer; NULL: nothing is */
} moe_layer_view;

typedef struct moe_engine_config {
    const moe_model *model;           /* borrowed */
    moe_backend *backend;             /* borrowed */
    moe_transport *const *transports; /* borrowed; asked in order whether they can reach a worker's endpoint; transports[0] is the
                                         one slept on: completions and submissions wake it */
    int32_t num_transports;
    const moe_clock *clock;
    const moe_tokenizer *tokenizer; /* borrowed; NULL: no text (--skip-tokenizer-init) */
    const char *cluster_uuid, *id;
    uint64_t incarnation;
    moe_gating gating;
    moe_dummy_routing_spec dummy_routing; /* where it is on, instead of what gates choose; then there are no local steps */
    moe_combine_mode combine;
    moe_expert_budget expert_budget; /* none: every expert may be chosen. With one there are no local steps */
    int32_t max_num_seqs;           /* running at once */
    int32_t max_num_batched_tokens; /* rows of one micro-batch */
    int32_t max_model_len;          /* tokens, prompt and output */
    int32_t max_waiting;            /* queued requests; more are refused with RESOURCE_EXHAUSTED */
    int32_t micro_batches;          /* in flight at once */
    int32_t pipeline_degree;        /* a layer goes to the workers in so many chunks of rows; 0: as pays */
    int32_t num_kv_blocks;
    int64_t replica_wait_ns;  /* how long a step waits when an expert has no live replica */
    int64_t call_timeout_ns;  /* budget of one layer's expert calls, retries included */
    int64_t suspect_after_ns; /* silence of a worker with calls outstanding */
    /* Of a worker in this process without a thread of its own (NULL: there is none): called in each step, before it sleeps; true
     * when it has more to do at once. What arrives for it must wake transports[0]. */
    bool (*step_local_worker)(void *ctx);
    /* The table [num_moe_layers, num_experts] of that worker's experts, NULL where it does not hold all of them; for local steps.
     * Called on the engine's thread. Table and experts stay until the engine was freed. NULL: layers are always sent to the
     * worker one by one. */
    moe_expert *const *(*local_experts)(void *ctx);
    void *local_worker;
    /* That worker's experts, layer by layer, on micro-batches where they are: where whole local steps are not possible. ops NULL: layers
     * are always sent to the worker as messages. */
    moe_layer_experts layer_experts;
    /* NULL, or called on the engine's thread after the routing of every layer; then there are no local steps. With one micro-batch
     * the calls of a forward step stand together. */
    void (*on_layer)(void *ctx, const moe_layer_view *view);
    void *on_layer_ctx;
    moe_timeline *timeline; /* borrowed; NULL: none is kept */
    void (*on_not_held)(void *ctx); /* a worker lacks an expert that the map names: a newer map is wanted; NULL: nobody is told */
    void *on_not_held_ctx;
} moe_engine_config;

moe_status moe_engine_new(const moe_engine_config *config, moe_engine **out, moe_error *err);
void moe_engine_free(moe_engine **engine); /* every live request ends with CANCELLED first; NULLs; idempotent */

/* Without a thread and without requests: other routing from now on. Errors as of moe_engine_new; then nothing has changed. */
moe_status moe_engine_reroute(moe_engine *engine, moe_gating gating, const moe_dummy_routing_spec *dummy, moe_error *err);

/* Any thread. Queues a request; on_output is then called until its last event (not from inside this function). The request is
 * checked: prompt of 1 … max_model_len - 1 tokens, ids in the vocabulary (INVALID_ARGUMENT); RESOURCE_EXHAUSTED when the queue is
 * full; UNAVAILABLE while there is no placement map or the engine drains. */
moe_status moe_engine_submit(moe_engine *engine, const moe_request *request, moe_on_output on_output, void *ctx, uint64_t *id,
                             moe_error *err);
/* Any thread. The request ends with CANCELLED within one step; unknown or ended ids are ignored. */
void moe_engine_cancel(moe_engine *engine, uint64_t id);

/* Any thread. Adopts a newer map (see placement.h); steps that began keep the one they began with. */
void moe_engine_set_placement(moe_engine *engine, moe_placement *placement);
/* Any thread. The oldest epoch that a step under way routes by, or that of the newest map; 0 before the first. */
uint64_t moe_engine_routing_epoch(const moe_engine *engine);

/* Any thread: no new requests from now on; those accepted go on. */
void moe_engine_drain(moe_engine *engine);

/* Engine thread: handles what arrived and advances all micro-batches; waits at most until deadline_ns when idle. */
moe_status moe_engine_step(moe_engine *engine, int64_t deadline_ns, moe_error *err);
/* Runs step in a thread of its own until moe_engine_stop. */
moe_status moe_engine_start(moe_engine *engine, moe_error *err);
void moe_engine_stop(moe_engine *engine);

/* What the engine sees of the cluster; any thread. */
typedef struct moe_engine_worker_view {
    char id[64];
    uint64_t incarnation;
    bool up, suspect;
    int64_t quarantine_ns; /* left of its quarantine; 0: it is in none */
    double load; /* expert rows routed to it, decayed (half-life 60 s) */
} moe_engine_worker_view;

typedef struct moe_engine_view {
    uint64_t epoch;
    bool ready; /* has a map in which every expert has a connected replica */
    int32_t running, waiting;
    int32_t num_workers;
    moe_engine_worker_view workers[MOE_PLACEMENT_MAX_WORKERS];
} moe_engine_view;
void moe_engine_get_view(moe_engine *engine, moe_engine_view *out);

/* loads[moe_layer * num_experts + expert]: decayed expert rows; any thread. */
void moe_engine_get_loads(moe_engine *engine, double *loads);

/* Of the experts that a MoE layer's gate chose where there was a hint one layer before (--gating hint), the part that the hint had
 * named, since the start; -1 while there was none. Any thread. */
double moe_engine_hint_recall(const moe_engine *engine, int32_t layer);
/* The size of a MoE layer's virtual set; 0 without an expert budget, and before the first step. Any thread. */
int32_t moe_engine_virtual_size(const moe_engine *engine, int32_t layer);
