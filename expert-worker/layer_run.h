/* One MoE layer of one micro-batch, computed where its rows are: in passes of the device, each with the experts that are in slots by
 * then, and beside them by the host, from images, where cold experts are the host's; its rows go with a pass of the device. Which
 * jobs there are to submit, and what their ends mean; layer_runs.h submits them. The engine's thread only. */
#pragma once
#include <pthread.h>

#include "common/layer_experts.h"
#include "expert-worker/groups.h"
#include "expert-worker/shard.h"

#define MOE_LAYER_RUN_SLOT_PARTS 4 /* a pass need not wait for more experts than this part of the slots */
#define MOE_LAYER_RUN_KEPT_BYTES ((size_t)64 << 20) /* of memory for the host's rows, from one call to the next */

enum { MOE_RUN_PASS, MOE_RUN_LAST_PASS, MOE_RUN_HOST, MOE_RUN_JOBS };

typedef struct moe_run_job {
    struct moe_layer_run *run;
    moe_pass_place place;
    bool out; /* it is with the backend */
    int32_t experts, rows;

    moe_layer_ffn ffn;    /* of the device's */
    moe_expert **handles; /* [num_experts], as `ffn` has them */
    moe_ffn_batch batch;  /* of the host's */
    moe_ffn_group *taken; /* [num_experts], as `batch` has them */

    /* the submitter's */
    void *owner;
    moe_job job;
    _Atomic bool done;
    pthread_t submitter;
    int64_t began_ns;
    bool queued; /* behind another call's job of the host */
} moe_run_job;

/* What the host computed of a call: a row for each assignment, in the order in which it did. */
typedef struct moe_host_rows {
    void *memory; /* of the device backend, capacity × (a row, and two numbers) */
    size_t bytes;
    int32_t capacity;
    float *out;           /* [capacity, H] */
    int32_t *slots, *row; /* [capacity] */
    int32_t computed;     /* by jobs that have ended */
    int32_t given;        /* of those: that passes of the device have */
} moe_host_rows;

typedef struct moe_layer_run {
    moe_shard *shard;     /* borrowed, as the next two */
    moe_backend *device;  /* the engine's */
    moe_backend *host;    /* computes cold experts, where the residency has them computed; may be `device`; else NULL */
    moe_layer_call *call; /* NULL: none */
    moe_groups groups;    /* of the call */
    moe_run_job jobs[MOE_RUN_JOBS];
    moe_host_rows host_rows;

    /* [num_experts] each */
    int32_t *cursor; /* by expert: scratch */
    int32_t *experts;
    moe_ffn_group *group;
    moe_cold_group *cold;
    uint8_t *states;

    /* the submitter's */
    int64_t stalled_since_ns; /* 0: it does not wait */
    int64_t shown_ns;         /* until when the timeline shows the device's passes */
} moe_layer_run;

/* What the residency knows a step of such calls by: calls that come as messages have steps, too. */
uint64_t moe_layer_run_step(uint64_t step);

/* RESOURCE_EXHAUSTED. After a failure, too, free it. */
moe_status moe_layer_run_init(moe_layer_run *run, moe_shard *shard, moe_backend *device, moe_backend *host, moe_error *err);
void moe_layer_run_free(moe_layer_run *run); /* there is no call */

/* The call begins: its experts are in use, expected and needed. UNAVAILABLE: one is not held, and nothing has begun. */
moe_status moe_layer_run_begin(moe_layer_run *run, moe_layer_call *call, moe_error *err);
/* A job there, with what is ready; NULL: there is none to submit now. It is `out` from now on. */
moe_run_job *moe_layer_run_next(moe_layer_run *run, moe_pass_place place);
void moe_layer_run_job_ended(moe_layer_run *run, moe_run_job *job); /* however it did; job->job tells */
/* Whether any of its jobs is out; whether no more will be submitted, since all that there is to compute is in passes of the device. */
bool moe_layer_run_busy(const moe_layer_run *run);
bool moe_layer_run_submitted(const moe_layer_run *run);
/* The call has ended, or is given up; no job is out. Lets go of its experts. */
void moe_layer_run_end(moe_layer_run *run);
