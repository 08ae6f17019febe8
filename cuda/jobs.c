#include "cuda/jobs.h"

#include <stdio.h>

#include "common/alloc.h"
#include "common/log.h"
#include "cuda/simple.h"

_Static_assert(MOE_CUDA_KV_BLOCK == MOE_KV_BLOCK_TOKENS && MOE_CUDA_FFN_BLOCKS == MOE_FFN_BLOCKS, "simple.h repeats backend.h");

moe_status moe_cuda_jobs_open(moe_cuda_jobs *jobs, moe_error *err) {
    *jobs = (moe_cuda_jobs){0};
    return pthread_mutex_init(&jobs->lock, NULL) == 0 ? MOE_OK : moe_fail(err, MOE_INTERNAL, "no mutex for the GPU's jobs");
}

static void free_slot(moe_cuda_job *slot) {
    for (int m = 0; m < MOE_CUDA_MARKS; m++)
        if (slot->events[m]) cudaEventDestroy(slot->events[m]);
    moe_free(slot);
}

static moe_status new_slot(moe_cuda_job **out, moe_error *err) {
    moe_cuda_job *slot = moe_calloc(1, sizeof *slot);
    moe_status status = slot ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a job");
    for (int m = 0; status == MOE_OK && m < MOE_CUDA_MARKS; m++)
        status = moe_cuda_check(cudaEventCreate(&slot->events[m]), "creating an event", err);
    if (status != MOE_OK && slot) free_slot(slot);
    if (status == MOE_OK) *out = slot;
    return status;
}

/* The first failure stays: a sticky error is the cause of all that follow. */
static void fail_device(moe_cuda_jobs *jobs, const moe_error *why) {
    if (jobs->failure.code != MOE_OK) return;
    jobs->failure = *why;
    jobs->failure.code = MOE_INTERNAL;
    moe_error_log("the GPU has failed and computes no more: %s", why->message);
}

/* A slot for a job that is being submitted: INTERNAL once the device has failed, RESOURCE_EXHAUSTED. */
static moe_status take_slot(moe_cuda_jobs *jobs, moe_job *job, moe_cuda_job **out, moe_error *err) {
    moe_cuda_job *slot = jobs->idle;
    if (jobs->failure.code != MOE_OK) return moe_fail(err, MOE_INTERNAL, "the GPU has failed: %s", jobs->failure.message);
    if (jobs->num_active >= MOE_CUDA_MAX_JOBS)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%d jobs are in flight on this GPU, the most that may be", jobs->num_active);
    if (slot) {
        jobs->idle = slot->next;
    } else {
        moe_status status = new_slot(&slot, err);
        if (status != MOE_OK) return status;
    }
    slot->job = job;
    slot->recorded = slot->passed = 0;
    slot->num_deliveries = slot->num_expert_spans = 0;
    slot->release = NULL;
    slot->status = MOE_OK;
    *out = slot;
    return MOE_OK;
}

cudaError_t moe_cuda_job_mark(moe_cuda_job *job, moe_cuda_mark mark, cudaStream_t stream) {
    job->recorded |= 1u << mark;
    return cudaEventRecord(job->events[mark], stream);
}

void moe_cuda_job_deliver(moe_cuda_job *job, void *to, const void *from, size_t bytes) {
    MOE_ASSERT(job->num_deliveries < MOE_CUDA_MAX_DELIVERIES);
    job->deliveries[job->num_deliveries].to = to;
    job->deliveries[job->num_deliveries].from = from;
    job->deliveries[job->num_deliveries++].bytes = bytes;
}

static void give_back(moe_cuda_jobs *jobs, moe_cuda_job *job) {
    if (job->release) job->release(job->owner, job->resource);
    job->next = jobs->idle;
    jobs->idle = job;
}

static moe_status put_in_flight(moe_cuda_jobs *jobs, moe_job *job, moe_cuda_enqueue enqueue, void *ctx, moe_error *err) {
    moe_cuda_job *slot = NULL;
    moe_status status = take_slot(jobs, job, &slot, err);
    if (status != MOE_OK) return status;
    status = enqueue(ctx, slot, err);
    if (status != MOE_OK) {
        if (err->code != MOE_RESOURCE_EXHAUSTED) fail_device(jobs, err);
        give_back(jobs, slot);
        return status;
    }
    MOE_ASSERT(slot->recorded & 1u << MOE_CUDA_DONE);
    slot->next = jobs->active;
    jobs->active = slot;
    jobs->num_active++;
    return MOE_OK;
}

void moe_cuda_jobs_submit(moe_cuda_jobs *jobs, moe_job *job, moe_cuda_enqueue enqueue, void *ctx) {
    moe_error err = {0};
    pthread_mutex_lock(&jobs->lock);
    moe_status status = put_in_flight(jobs, job, enqueue, ctx, &err);
    pthread_mutex_unlock(&jobs->lock);
    if (status == MOE_OK) return;
    job->status = err.code;
    snprintf(job->message, sizeof job->message, "%.*s", (int)sizeof job->message - 1, err.message);
    job->done(job);
}

/* Counts the events that have passed; true when the job has ended. */
static bool advance(moe_cuda_jobs *jobs, moe_cuda_job *job) {
    moe_error why;
    for (int m = 0; m < MOE_CUDA_MARKS; m++) {
        if (!(job->recorded & ~job->passed & 1u << m)) continue;
        cudaError_t code = cudaEventQuery(job->events[m]);
        if (code == cudaErrorNotReady) return false;
        if (code != cudaSuccess) {
            moe_cuda_check(code, "a kernel or a copy failed", &why);
            fail_device(jobs, &why);
            return true;
        }
        job->passed |= 1u << m;
        atomic_fetch_add_explicit(&job->job->progress, 1, memory_order_relaxed);
    }
    return true;
}

/* Time between two marks; 0 where either is missing. */
static int64_t elapsed_ns(const moe_cuda_job *job, moe_cuda_mark from, moe_cuda_mark to) {
    float ms = 0;
    uint32_t both = 1u << from | 1u << to;
    if ((job->passed & both) != both || cudaEventElapsedTime(&ms, job->events[from], job->events[to]) != cudaSuccess) return 0;
    return (int64_t)((double)ms * 1e6);
}

/* The job's last copies and figures; without the lock. */
static void finish(const moe_cuda_job *slot, const moe_error *failure) {
    moe_job *job = slot->job;
    job->status = slot->status;
    if (slot->status != MOE_OK) {
        snprintf(job->message, sizeof job->message, "%.*s", (int)sizeof job->message - 1, failure->message);
        return;
    }
    for (int32_t i = 0; i < slot->num_deliveries; i++)
        memcpy(slot->deliveries[i].to, slot->deliveries[i].from, slot->deliveries[i].bytes);
    job->compute_ns = elapsed_ns(slot, MOE_CUDA_BEGIN, MOE_CUDA_END);
    job->copy_ns = slot->passed & 1u << MOE_CUDA_BEGIN
                       ? elapsed_ns(slot, MOE_CUDA_START, MOE_CUDA_BEGIN) + elapsed_ns(slot, MOE_CUDA_END, MOE_CUDA_DONE)
                       : elapsed_ns(slot, MOE_CUDA_START, MOE_CUDA_DONE);
    job->combine_ns = elapsed_ns(slot, MOE_CUDA_BEGIN, MOE_CUDA_COMBINED);
    job->logits_ns = elapsed_ns(slot, MOE_CUDA_LAYERS, MOE_CUDA_END);
    job->expert_ns = 0;
    for (int32_t i = 0; i < slot->num_expert_spans; i++)
        job->expert_ns += (int64_t)(slot->expert_spans[i][1] - slot->expert_spans[i][0]);
}

/* Takes the ended jobs off the list of those in flight. */
static moe_cuda_job *take_ended(moe_cuda_jobs *jobs) {
    moe_cuda_job *ended = NULL;
    for (moe_cuda_job **at = &jobs->active; *at;) {
        moe_cuda_job *job = *at;
        if (jobs->failure.code == MOE_OK && !advance(jobs, job)) {
            at = &job->next;
            continue;
        }
        if (jobs->failure.code != MOE_OK) job->status = MOE_INTERNAL;
        *at = job->next;
        job->next = ended;
        ended = job;
    }
    return ended;
}

bool moe_cuda_jobs_poll(moe_cuda_jobs *jobs) {
    pthread_mutex_lock(&jobs->lock);
    moe_cuda_job *ended = take_ended(jobs);
    moe_error failure = jobs->failure;
    pthread_mutex_unlock(&jobs->lock);
    while (ended) {
        moe_cuda_job *slot = ended;
        moe_job *job = slot->job;
        ended = slot->next;
        finish(slot, &failure);
        pthread_mutex_lock(&jobs->lock);
        jobs->num_active--;
        give_back(jobs, slot);
        pthread_mutex_unlock(&jobs->lock);
        job->done(job); /* may submit again */
    }
    pthread_mutex_lock(&jobs->lock);
    bool outstanding = jobs->num_active > 0;
    pthread_mutex_unlock(&jobs->lock);
    return outstanding;
}

void moe_cuda_jobs_close(moe_cuda_jobs *jobs) {
    cudaDeviceSynchronize();
    while (moe_cuda_jobs_poll(jobs)) cudaDeviceSynchronize();
    while (jobs->idle) {
        moe_cuda_job *slot = jobs->idle;
        jobs->idle = slot->next;
        free_slot(slot);
    }
    pthread_mutex_destroy(&jobs->lock);
}
