/* From accepted calls to computed ones: a bounded queue, one batch that the backend computes, one that is assembled meanwhile.
 * The loop's thread only; the backend's completion is the only thing that other threads touch. */
#pragma once
#include <pthread.h>

#include "expert-worker/passes.h"
#include "expert-worker/recheck.h"

typedef struct moe_batcher_config {
    moe_shard *shard;         /* borrowed, as all here */
    moe_backend *backend;     /* */
    moe_backend *host;        /* computes cold experts, where the residency has them computed; may be `backend`; else NULL */
    moe_transport *transport; /* woken when a job has ended */
    const moe_clock *clock;
    const moe_ops *reference; /* cpu-ref's operations, to check doubtful results; NULL: they are not */
    bool threaded;            /* checks may use a thread of their own */
    int32_t max_queued_calls, max_batch_rows;
    moe_timeline *timeline;   /* passes and stalls are told it; NULL: there is none */
    /* The call came to its end: `status`, `message`, `out` and `compute_ns` are set. Called by turn and close,
     * and where a queued call is cancelled. */
    void (*answer)(void *ctx, moe_work *work);
    void *ctx;
} moe_batcher_config;

/* Where one job of the running batch is computed at a time. */
typedef struct moe_batcher_lane {
    struct moe_batcher *batcher;
    moe_backend *backend;
    bool busy; /* the running batch, or a pass of it, is with the backend */
    moe_job job;
    int32_t experts, rows; /* of the job */
    int64_t began_ns;      /* the job, where there is a timeline */
    int64_t submitted_ns;
    bool done;           /* guarded by the batcher's mutex */
    pthread_t submitter; /* of the job: needs no wake for what is done inside the submission */
    int64_t compute_ns;  /* of the running batch, in all its passes */
} moe_batcher_lane;

typedef struct moe_batcher {
    moe_batcher_config config;
    struct moe_work_list queue;
    int32_t num_queued; /* in the queue and in the next batch */
    moe_batch batches[2];
    moe_blocks blocks; /* of the calls */
    int running, next; /* indices into batches */
    bool under_way; /* batches[running] is computed, or waits for copies */
    moe_batcher_lane lanes[MOE_PASS_PLACES];
    moe_passes passes; /* of batches[running], where there is a residency; with no lane busy it waits for copies */
    moe_error failure; /* of batches[running], which ends when no lane is busy any more */
    int64_t stalled_since_ns; /* 0: it does not wait */
    int64_t batch_copy_ns, batch_stall_ns; /* of batches[running], in all its passes */
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    _Atomic uint64_t jobs_ended;

    moe_recheck recheck;
    uint64_t ticks; /* of jobs that ended, and one each */
    uint64_t calls, rows, compute_ns, stall_ns, expired;
} moe_batcher;

/* RESOURCE_EXHAUSTED. */
moe_status moe_batcher_init(moe_batcher *batcher, const moe_batcher_config *config, moe_error *err);
/* Waits for the running job and answers its calls, answers those in the queue with UNAVAILABLE, frees. */
void moe_batcher_close(moe_batcher *batcher);

/* Queues a decoded call whose experts are all held. When its client no longer waits (call->on_cancel, which this sets) it is
 * answered at once where it is in the queue, else when its batch ends or would begin. RESOURCE_EXHAUSTED: the queue is full, or
 * out of memory; the call is the caller's to answer then. */
moe_status moe_batcher_add(moe_batcher *batcher, const moe_forward_call *decoded, moe_rpc_call *call, moe_error *err);

/* Answers what has ended, begins what can begin. True where there is more to do at once. */
bool moe_batcher_turn(moe_batcher *batcher);

/* Whether a turn has something to begin without an event: calls wait and nothing is computed or copied for. */
bool moe_batcher_can_start(const moe_batcher *batcher);
/* Its job ends only when the backend is polled: the loop must not sleep. */
bool moe_batcher_polls(const moe_batcher *batcher);

/* Why this worker must not compute any more; "" where nothing is known against it. Calls end with UNAVAILABLE from then on. */
static inline const char *moe_batcher_defect(const moe_batcher *b) { return b->recheck.defect; }

/* Rises while anything is computed, and not when calls end because nobody waits for them. */
uint64_t moe_batcher_progress(const moe_batcher *batcher);
