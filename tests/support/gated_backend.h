/* A backend in front of another that a test holds back, watches and breaks: jobs wait until the test lets them run (on the test's
 * thread), loads fail on demand, results are poisoned. Experts only. */
#pragma once
#include "common/backend.h"

typedef struct moe_gated_backend {
    moe_backend base; /* what the worker gets */
    moe_backend_ops ops;
    moe_backend *real; /* borrowed */
    bool hold;         /* jobs wait for moe_gated_release */
    bool poison;       /* the first value of every result becomes infinite */
    int poison_next;   /* so many batches to come are poisoned, too */
    bool fail_jobs;    /* every job ends with INTERNAL, as after the loss of a device */
    int fail_load;     /* the n-th load from now fails (1: the next); 0: none */

    const moe_ffn_batch *waiting; /* the job held back, or NULL */
    moe_job *waiting_job;
    int num_batches;                       /* submitted so far */
    int32_t last_assignments, last_groups; /* of the newest */
    int num_loads, num_frees;
} moe_gated_backend;

void moe_gated_init(moe_gated_backend *gate, moe_backend *real);
void moe_gated_release(moe_gated_backend *gate); /* runs the job that is held back; there is one */
