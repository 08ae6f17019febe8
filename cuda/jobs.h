/* Jobs in flight: their events, and what is left to do on the host when they have ended. Nothing here waits but close. */
#pragma once
#include <pthread.h>

#include "cuda/device.h"

#define MOE_CUDA_MAX_JOBS 256     /* in flight on one backend */
#define MOE_CUDA_MAX_DELIVERIES 8 /* copies out of staging memory that end a job */

/* Events of a job, in stream order; a job records those that it has. Each that has passed is a tick of progress. */
typedef enum moe_cuda_mark {
    MOE_CUDA_START,    /* of an expert batch: the copies of its inputs begin */
    MOE_CUDA_BEGIN,    /* the inputs are on the device */
    MOE_CUDA_COMBINED, /* of a segment */
    MOE_CUDA_LAYERS,   /* of the last segment: logits follow */
    MOE_CUDA_END,      /* computed */
    MOE_CUDA_DONE,     /* the outputs are in host memory; every job has it */
    MOE_CUDA_MARKS
} moe_cuda_mark;

typedef struct moe_cuda_job {
    moe_job *job;
    cudaEvent_t events[MOE_CUDA_MARKS];
    uint32_t recorded, passed; /* bits of marks */
    struct {
        void *to;
        const void *from; /* staging memory */
        size_t bytes;
    } deliveries[MOE_CUDA_MAX_DELIVERIES];
    int32_t num_deliveries;
    const uint64_t (*expert_spans)[2]; /* staging memory: when each layer's experts began and ended, in ns; NULL: it is not known */
    int32_t num_expert_spans;
    void (*release)(void *owner, void *resource); /* may be NULL: called under the lock after the deliveries */
    void *owner, *resource;
    moe_status status;
    struct moe_cuda_job *next;
} moe_cuda_job;

typedef struct moe_cuda_jobs {
    pthread_mutex_t lock; /* of all below, and of every enqueueing: whoever submits holds it from begin to end */
    moe_cuda_job *active, *idle;
    int32_t num_active;
    moe_error failure; /* code not OK: the device has failed, and no job runs any more */
} moe_cuda_jobs;

moe_status moe_cuda_jobs_open(moe_cuda_jobs *jobs, moe_error *err);
void moe_cuda_jobs_close(moe_cuda_jobs *jobs); /* waits for the device and ends what was submitted */

/* Enqueues a job's work on its streams, MOE_CUDA_DONE marked last. The lock is held. */
typedef moe_status (*moe_cuda_enqueue)(void *ctx, moe_cuda_job *slot, moe_error *err);

/* A job in flight with what `enqueue` makes of it; takes the lock. Where that fails, nothing is in flight and done is called with the
 * reason: INTERNAL once the device has failed, for good with any code of `enqueue` but RESOURCE_EXHAUSTED. */
void moe_cuda_jobs_submit(moe_cuda_jobs *jobs, moe_job *job, moe_cuda_enqueue enqueue, void *ctx);

/* For `enqueue`. */
cudaError_t moe_cuda_job_mark(moe_cuda_job *job, moe_cuda_mark mark, cudaStream_t stream);
/* What poll copies to the submitter's memory at the end. */
void moe_cuda_job_deliver(moe_cuda_job *job, void *to, const void *from, size_t bytes);

/* As moe_backend_ops.poll; takes the lock, calls done without it. */
bool moe_cuda_jobs_poll(moe_cuda_jobs *jobs);
