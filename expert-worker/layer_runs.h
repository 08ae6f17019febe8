/* The worker's side of common/layer_experts.h: layers of micro-batches whose rows are in this process's backend, computed there as their
 * experts come. Several calls at once, each in jobs of its own (layer_run.h); more than MOE_LAYER_RUNS wait for their turn. The engine's
 * thread only; jobs end on any. On the way from step to step no memory is allocated but for rows of the host, which are kept. */
#pragma once
#include "common/clock.h"
#include "common/timeline.h"
#include "common/transport.h"
#include "expert-worker/layer_run.h"

#define MOE_LAYER_RUNS 4

typedef struct moe_layer_runs_config { /* all borrowed */
    moe_shard *shard;
    moe_backend *backend;     /* the engine's */
    moe_backend *host;        /* as in moe_batcher_config */
    moe_transport *transport; /* woken when a job has ended */
    const moe_clock *clock;
    moe_timeline *timeline;  /* passes and stalls are told it; NULL: there is none */
    _Atomic uint64_t *ended; /* counts ended jobs, for whoever polls the backend */
    const char *defect;      /* why this worker must not compute any more; "" while nothing is known */
    /* The call is about to be `ended`, and all of its fields but that are set. */
    void (*told)(void *ctx, const moe_layer_call *call);
    void *ctx;
} moe_layer_runs_config;

typedef struct moe_layer_runs {
    moe_layer_runs_config config;
    moe_layer_run runs[MOE_LAYER_RUNS];
    moe_layer_call *waiting, **waiting_tail;
    pthread_mutex_t mutex; /* of the jobs' ends */
    pthread_cond_t ended;
    uint64_t ticks; /* of jobs that ended, and one each */
    uint64_t calls, rows, compute_ns; /* since the start; rows: one token at one expert */
} moe_layer_runs;

/* RESOURCE_EXHAUSTED. */
moe_status moe_layer_runs_init(moe_layer_runs *runs, const moe_layer_runs_config *config, moe_error *err);
/* Waits for jobs; calls that have not ended do so with UNAVAILABLE. */
void moe_layer_runs_close(moe_layer_runs *runs);

/* For the engine; valid until close. */
moe_layer_experts moe_layer_runs_experts(moe_layer_runs *runs);

/* As moe_layer_experts_ops.turn; polls backends that are polled, once. */
bool moe_layer_runs_turn(moe_layer_runs *runs);
/* Whether a turn has something to do without an event, or to poll. */
bool moe_layer_runs_has_work(const moe_layer_runs *runs);
bool moe_layer_runs_active(const moe_layer_runs *runs); /* there are calls that have not ended */
uint64_t moe_layer_runs_progress(const moe_layer_runs *runs); /* rises while anything is computed */
