/* Runs submitted jobs one after another on a thread of its own, each with parallel loops over the pool. */
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

typedef moe_status (*moe_cpu_work)(const moe_cpu_run *run, void *backend, const void *base, const void *request, moe_error *err);

/* threads: as in moe_cpu_config. The runner's thread counts as one of them. */
moe_status moe_cpu_runner_open(int32_t threads, moe_cpu_runner **out, moe_error *err);

/* Ends what was submitted, then the threads. NULLs the pointer; idempotent. */
void moe_cpu_runner_close(moe_cpu_runner **runner);

/* Runs work(run, backend, base, request) and then job->done; any thread, any number of submitters, first come first served.
 * With threads = 0 both happen before this returns, on the caller's thread. */
void moe_cpu_runner_submit(moe_cpu_runner *runner, moe_cpu_work work, void *backend, const void *base, const void *request,
                           moe_job *job);
