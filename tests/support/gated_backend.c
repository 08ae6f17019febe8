#include "tests/support/gated_backend.h"

#include <math.h>
#include <stdio.h>

static moe_gated_backend *gate_of(moe_backend *backend) { return (moe_gated_backend *)backend; }

static const char *profile(const moe_backend *backend) {
    const moe_gated_backend *gate = (const moe_gated_backend *)backend;
    return gate->real->ops->profile(gate->real);
}

static moe_status expert_load(moe_backend *backend, const moe_ffn_weights *weights, int32_t lo, int32_t hi, moe_expert **out,
                              moe_error *err) {
    moe_gated_backend *gate = gate_of(backend);
    if (gate->fail_load > 0 && --gate->fail_load == 0)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "no memory left on the device");
    gate->num_loads++;
    return gate->real->ops->expert_load(gate->real, weights, lo, hi, out, err);
}

static void expert_free(moe_backend *backend, moe_expert *expert) {
    gate_of(backend)->num_frees++;
    gate_of(backend)->real->ops->expert_free(gate_of(backend)->real, expert);
}

typedef struct inner_job {
    moe_job job;
    bool ended;
} inner_job;

static void inner_done(moe_job *job) { ((inner_job *)job)->ended = true; }

/* The real backend computes inside submit (it has no threads), so that the result can be changed before the worker sees it. */
static void run(moe_gated_backend *gate, const moe_ffn_batch *batch, moe_job *job) {
    inner_job inner = {.job = {.done = inner_done}};
    gate->real->ops->ffn_submit(gate->real, batch, &inner.job);
    MOE_ASSERT(inner.ended);
    float *out = batch->out;
    if (gate->poison || gate->poison_next > 0) out[0] = INFINITY;
    gate->poison_next -= gate->poison_next > 0;
    job->status = gate->fail_jobs ? MOE_INTERNAL : inner.job.status;
    if (gate->fail_jobs) snprintf(job->message, sizeof job->message, "the device is gone");
    job->compute_ns = inner.job.compute_ns;
    atomic_store(&job->progress, atomic_load(&inner.job.progress));
    job->done(job);
}

static void ffn_submit(moe_backend *backend, const moe_ffn_batch *batch, moe_job *job) {
    moe_gated_backend *gate = gate_of(backend);
    gate->num_batches++;
    gate->last_assignments = batch->num_assignments;
    gate->last_groups = batch->num_groups;
    if (!gate->hold) {
        run(gate, batch, job);
        return;
    }
    MOE_ASSERT(!gate->waiting);
    gate->waiting = batch;
    gate->waiting_job = job;
}

void moe_gated_release(moe_gated_backend *gate) {
    const moe_ffn_batch *batch = gate->waiting;
    MOE_ASSERT(batch);
    gate->waiting = NULL;
    run(gate, batch, gate->waiting_job);
}

void moe_gated_init(moe_gated_backend *gate, moe_backend *real) {
    *gate = (moe_gated_backend){.real = real, .ops = *real->ops};
    gate->ops.profile = profile;
    gate->ops.expert_load = expert_load;
    gate->ops.expert_free = expert_free;
    gate->ops.ffn_submit = ffn_submit;
    gate->base.ops = &gate->ops;
    gate->base.dtype = real->dtype;
}
