/* The compute threads of a CPU backend, and parallel loops over them. */
#pragma once
#include <stdatomic.h>
#include <stdint.h>

#include "common/status.h"

typedef struct moe_cpu_pool moe_cpu_pool;

/* Starts `helpers` threads that help the caller of moe_cpu_parallel_for; 0 starts none. */
moe_status moe_cpu_pool_open(int32_t helpers, moe_cpu_pool **out, moe_error *err);
void moe_cpu_pool_close(moe_cpu_pool **pool); /* NULLs the pointer; idempotent; no loop may be running */

/* Threads that run a loop's tasks, the caller included. */
int32_t moe_cpu_pool_threads(const moe_cpu_pool *pool);

/* Calls task(ctx, index, thread) for every index in [0, count), in no order, and returns when all have ended. thread is in
 * [0, moe_cpu_pool_threads). *progress (may be NULL) is incremented after each task. One caller at a time where there are
 * helpers; any number of callers where there are none. */
void moe_cpu_parallel_for(moe_cpu_pool *pool, int32_t count, void (*task)(void *ctx, int32_t index, int32_t thread), void *ctx,
                          _Atomic uint64_t *progress);
