/* What an operator asks of a cluster: served as JSON on /cluster/status and as ClusterService.Status. */
#pragma once
#include <jansson.h>

#include "common/buf.h"
#include "common/status.h"
#include "common/transport.h"
#include "router/placement/controller.h"

#define MOE_STATUS_NAME_BYTES 256

typedef struct moe_worker_status {
    char id[MOE_STATUS_NAME_BYTES];
    uint64_t pid; /* 0: unknown */
    char host[MOE_STATUS_NAME_BYTES];
    char endpoint[MOE_ENDPOINT_BYTES];
    char profile[MOE_STATUS_NAME_BYTES]; /* numeric */
    const char *state;                   /* literal: "up", "suspect", "down", "joining" */
    uint32_t experts;                    /* replicas it holds, over all layers */
    uint32_t quarantine_s;               /* left of its quarantine by this router; 0: in none */
    double load;                         /* share of the expert rows routed, decayed: 0 … 1 */
    uint64_t incarnation;
} moe_worker_status;

typedef struct moe_router_status {
    char id[MOE_STATUS_NAME_BYTES];
    uint64_t pid;
    char host[MOE_STATUS_NAME_BYTES];
    const char *state; /* literal: "up", "draining" */
    bool leader;
} moe_router_status;

typedef struct moe_layer_status { /* one MoE layer */
    double max_over_mean;         /* of the expert rows by worker */
    uint32_t min_replicas;        /* the least READY replicas of any of its experts */
    double cost_max_over_mean;    /* of the placement policy's cost by worker; 0: not known */
    double hint_recall;           /* of its experts, the part that a hint had named; -1: there were no hints */
    uint32_t virtual_experts;     /* that tokens may be routed to under an expert budget; 0: there is none */
} moe_layer_status;

/* What this router's calls met in workers whose experts do not all fit their devices. */
typedef struct moe_residency_status {
    uint64_t hits, late_hits, misses, copied_bytes, wasted_bytes, host_experts;
} moe_residency_status;

/* Under an expert budget: what this router's gates would have chosen, and what of it tokens could be routed to. */
typedef struct moe_expert_budget_status {
    char budget[64];        /* "25", in percent, or "4-per-layer"; "": there is none */
    uint64_t experts, of;   /* that tokens may be routed to, of all layers together */
    uint64_t swaps;
    double choices_held, weight_held; /* parts, the latter by gate weight */
} moe_expert_budget_status;

typedef struct moe_cluster_status {
    uint64_t epoch;
    bool ready;
    char model[MOE_STATUS_NAME_BYTES];
    char cluster_uuid[64];
    uint32_t replicas; /* wanted */
    bool redis_used, redis_up;
    uint64_t redis_pid; /* 0: not started by `serve` */
    int32_t num_workers, num_routers, num_layers;
    moe_worker_status *workers; /* owned, as the next two */
    moe_router_status *routers;
    moe_layer_status *layers;
    moe_residency_status residency;
    moe_expert_budget_status expert_budget;
    int32_t num_operations;
    moe_operation operations[MOE_MAX_OPERATIONS]; /* newest last */
    char migration[160];                          /* moves under way, where this router leads */
    uint64_t moves;                               /* that it has brought to an end as the leader */
    uint64_t expert_ns, row_ns; /* what placement reckons with for a distinct expert and a row; 8 and 1: not measured */
} moe_cluster_status;

/* Zeroed arrays of those lengths, replacing what was there. RESOURCE_EXHAUSTED when out of memory. */
moe_status moe_cluster_status_resize(moe_cluster_status *status, int32_t num_workers, int32_t num_routers, int32_t num_layers,
                                     moe_error *err);
void moe_cluster_status_free(moe_cluster_status *status); /* the arrays; back to zero; idempotent */

/* {"budget", "experts", "of", "swaps", "choices_held", "weight_held"}; as the next. */
json_t *moe_expert_budget_status_json(const moe_expert_budget_status *status);
/* The JSON object that `moesaic status` prints; NULL when out of memory. The caller owns the reference. */
json_t *moe_cluster_status_to_json(const moe_cluster_status *status);

/* Who can tell; functions: any front's thread, must not block. */
typedef struct moe_cluster_view {
    void *ctx;
    moe_status (*status)(void *ctx, moe_cluster_status *out, moe_error *err); /* `out` comes zeroed; the caller frees it */
    moe_status (*experts)(void *ctx, moe_buf *json, moe_error *err);          /* loads by layer and expert; NULL: not known */
    /* What the placement policy would do: at most MOE_VIEW_MAX_STEPS steps. */
    moe_status (*plan)(void *ctx, moe_step_view *steps, int32_t *num_steps, uint64_t *epoch, moe_error *err);
    /* As moe_controller_submit. */
    moe_status (*submit)(void *ctx, const moe_operation *wanted, char id[MOE_OPERATION_ID_BYTES], moe_error *err);
} moe_cluster_view;
