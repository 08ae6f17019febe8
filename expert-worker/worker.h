/* An expert worker: holds experts, computes Forward calls. A single-threaded loop (`step`) over its own transport; compute runs
 * in the backend and completes through the transport's wake. */
#pragma once
#include "common/layer_experts.h"
#include "expert-worker/residency.h"
#include "proto/rpc.h"

#define MOE_WORKER_DEFECT_BYTES 384

typedef struct moe_worker moe_worker;

typedef struct moe_worker_config {
    const moe_model *model; /* borrowed */
    moe_backend *host; /* computes cold experts; may be `backend`; borrowed; NULL where tiers.cold is FETCH */
    moe_backend *backend; /* borrowed; not shared with a router's engine in the same process unless it is thread-safe to submit */
    moe_transport *transport; /* borrowed; already listening */
    const moe_clock *clock;
    const char *cluster_uuid, *id;
    uint64_t incarnation;
    int32_t max_queued_calls; /* more are refused with RESOURCE_EXHAUSTED */
    int32_t max_batch_rows;   /* assignments of calls merged into one batch; a call with more is a batch of its own */
    const moe_ops *reference; /* cpu-ref's operations, for known-answer batches; borrowed; NULL: none are computed */
    int32_t load_threads;     /* pack experts: all of them until the first call was computed, then one at a time; 0: that happens
                               * in step, as the simulation needs. MOE_LOADER_MAX_THREADS at most */
    int64_t copy_bytes_per_s; /* of what it copies from other workers; 0: no limit */
    int32_t max_experts;      /* held at once; 0: no limit */
    moe_tier_options tiers;   /* where the experts' weights live */
    moe_timeline *timeline;   /* borrowed, of the thread that steps the worker; NULL: none is kept */
    uint64_t known_epoch, known_fence; /* the highest of an earlier life, which its hellos tell; 0: none */
} moe_worker_config;

/* A worker that holds no experts yet. INVALID_ARGUMENT (limits below 1, or below what works), RESOURCE_EXHAUSTED. */
moe_status moe_worker_new(const moe_worker_config *config, moe_worker **out, moe_error *err);
/* Stops, waits for the running batch and answers it, answers what is queued with UNAVAILABLE, ends calls of layers; NULLs; idempotent. */
void moe_worker_free(moe_worker **worker);

/* Handles what arrived, starts and finishes batches, loads some of the experts asked for; waits at most until deadline_ns when
 * idle. Fails only where the transport does. */
moe_status moe_worker_step(moe_worker *worker, int64_t deadline_ns, moe_error *err);
/* Of the thread that calls step: true when a step has something to do without a new event. */
bool moe_worker_has_work(moe_worker *worker);
/* Of a worker with tiers that no thread steps now and no call waits at: as moe_residency_resize. */
moe_status moe_worker_resize(moe_worker *worker, moe_memory_limit device, moe_cold_experts cold, double *copy_bytes_per_s,
                             moe_error *err);
/* Of a worker that no thread steps now: what it has learnt of cold experts, where it chooses by costs; all 0 elsewhere. */
moe_cold_costs moe_worker_cold_costs(const moe_worker *worker);
/* Of the thread that calls step: the table [num_moe_layers, num_experts] of the experts, for local steps; NULL where not all are
 * held. Once it was lent, no expert is freed before the worker is, dropped or not, and the borrower must be gone by then. */
moe_expert *const *moe_worker_lend_experts(moe_worker *worker);
/* Of a worker that no thread steps: for an engine on the thread that calls step, whose backend is the worker's own. Until the worker is
 * freed; that waits for jobs of calls that have not ended, so their rows must still be there. */
moe_layer_experts moe_worker_layer_experts(moe_worker *worker);
moe_status moe_worker_start(moe_worker *worker, moe_error *err); /* step in a thread of its own; RESOURCE_EXHAUSTED */
void moe_worker_stop(moe_worker *worker);                        /* joins that thread; idempotent */

/* Any thread: from now on Stats says that it leaves, so that the cluster's leader takes its experts elsewhere. */
void moe_worker_leave(moe_worker *worker);

/* Any thread. */
typedef struct moe_worker_view {
    int32_t experts; /* loaded */
    int32_t routers; /* connected to it */
    int64_t weight_bytes; /* of the held experts */
    int64_t device_bytes; /* what they take of the device: as much, or the slots of its tiers */
    uint64_t rows;
    int32_t queued_calls;
    uint64_t epoch, fence; /* the highest seen */
    char defect[MOE_WORKER_DEFECT_BYTES]; /* why it must leave the cluster; "" where it is sound */
} moe_worker_view;
void moe_worker_get_view(moe_worker *worker, moe_worker_view *out);
