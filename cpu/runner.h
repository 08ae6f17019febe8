/* Runs submitted jobs one after another, each with parallel loops over the pool: brief ones on the submitter's thread, because
 * waking another one costs more than they do; the others on a thread of its own. */
#pragma once
#include "common/backend.h"
#include "cpu/pool.h"

typedef struct moe_cpu_runner moe_cpu_runner;

/* What a job's work is given. */
typedef struct moe_cpu_run {
    moe_cpu_pool *pool;
    _Atomic uint64_t *progress;
    moe_job *job;
} moe_cpu_run;

/* weights: base layers, a moe_local, or NULL. */
typedef moe_status (*moe_cpu_work)(const moe_cpu_run *run, void *backend, const void *weights, const void *request,
                                   moe_error *err);

/* threads: as in moe_cpu_config. The runner's thread counts as one of them. */
moe_status moe_cpu_runner_open(int32_t threads, moe_cpu_runner **out, moe_error *err);

/* Ends what was submitted, then the threads. NULLs the pointer; idempotent. */
void moe_cpu_runner_close(moe_cpu_runner **runner);

/* Runs work(run, backend, weights, request) and then job->done; any thread, any number of submitters, first come first served.
 * With threads = 0 both happen before this returns, on the caller's thread; so they do for `brief` work when no other job runs or
 * waits. */
void moe_cpu_runner_submit(moe_cpu_runner *runner, moe_cpu_work work, void *backend, const void *weights, const void *request,
                           bool brief, moe_job *job);
