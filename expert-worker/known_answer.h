/* The known-answer batch: seeded rows through one expert, computed by the reference (cpu-ref) from the canonical bytes and by the
 * backend from its packed copy. What a loaded copy gets wrong (layout, memory, device) shows here before any request meets it. */
#pragma once
#include <pthread.h>

#include "common/backend.h"
#include "common/transport.h"

#define MOE_KNOWN_ROWS 2
/* How far a backend's outputs may be from the reference's, as a part of the largest of them. The op table bounds the error by
 * 3e-7 of the sum of the terms' sizes in float32; with the cancellation in a down projection that is some hundred times less
 * than this. bfloat16: the bound of docs/architecture.md. A copy that is wrong is off by about 1. */
#define MOE_KNOWN_BOUND_F32 1e-3f
#define MOE_KNOWN_BOUND_BF16 3e-2f

/* The reference's answer, [MOE_KNOWN_ROWS, H]; the caller owns *out. Any thread; takes the time of a plain computation.
 * RESOURCE_EXHAUSTED. */
moe_status moe_known_answer_compute(const moe_ops *reference, const moe_model *model, int32_t layer, int32_t expert,
                                    const moe_ffn_weights *weights, float **out, moe_error *err);

/* The backend's side: one job at a time, on the thread that submits to the backend. */
typedef struct moe_known_check {
    moe_backend *backend;     /* borrowed */
    moe_transport *transport; /* borrowed; woken when the job has ended */
    bool running;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    bool job_done; /* guarded by mutex */
    moe_job job;
    moe_ffn_group group;
    moe_ffn_batch batch;
    void *x; /* [MOE_KNOWN_ROWS, H] of the backend's dtype */
    float *out, *answer;
    int32_t hidden, layer, expert;
} moe_known_check;

void moe_known_check_init(moe_known_check *check, moe_backend *backend, moe_transport *transport);
void moe_known_check_close(moe_known_check *check); /* waits for the job under way */
/* Submits the batch. Takes over `answer`. `expert` stays until the check has ended. RESOURCE_EXHAUSTED. */
moe_status moe_known_check_begin(moe_known_check *check, const moe_model *model, int32_t layer, int32_t expert,
                                 moe_expert *loaded, float *answer, moe_error *err);
/* Whether moe_known_check_end has something to tell. */
bool moe_known_check_ended(moe_known_check *check);
/* True when it has ended: *verdict OK, INTERNAL where an output is off by more than the bound, or the job's error. */
bool moe_known_check_end(moe_known_check *check, moe_status *verdict, moe_error *err);
