/* Engine events, from the engine's thread to a front's. A front has one moe_generation_queue; each engine request of the front is
 * a moe_generation on it. The engine's thread copies an event, queues it and wakes the front, and never waits. */
#pragma once
#include "router/inference.h"

#define MOE_GENERATION_MAX_QUEUED_BYTES (INT64_C(64) << 20) /* of one generation, not yet seen by its front */

typedef struct moe_generation moe_generation;
typedef struct moe_generation_queue moe_generation_queue;

typedef struct moe_generation_queue_config {
    const moe_inference *inference; /* borrowed */
    /* Front's thread, from moe_generation_queue_dispatch: one event, in the engine's order, borrowed for the call. The event with
     * finish != NONE is the last; the generation is gone after it. Events that the bound or a lack of memory lost end the
     * generation with ERROR and RESOURCE_EXHAUSTED. */
    void (*on_output)(void *user, const moe_output *output);
    void (*wake)(void *ctx); /* any thread, must not block: makes the front call dispatch */
    void *wake_ctx;
} moe_generation_queue_config;

moe_status moe_generation_queue_new(const moe_generation_queue_config *config, moe_generation_queue **out, moe_error *err);
/* Front's thread. Cancels what still runs, whose last events are then dropped: neither callback is called any more. NULLs;
 * idempotent. The engine may outlive the queue. */
void moe_generation_queue_free(moe_generation_queue **queue);
/* Front's thread: calls on_output for everything queued. Generations may be started and cancelled from inside on_output. */
void moe_generation_queue_dispatch(moe_generation_queue *queue);

/* Front's thread: submits to the engine; errors as moe_engine_submit's. *out lives until its last event or cancel. */
moe_status moe_generation_start(moe_generation_queue *queue, const moe_request *request, void *user, moe_generation **out,
                                moe_error *err);
/* Front's thread: the engine stops working on it, on_output is not called for it any more. NULLs; NULL is allowed. */
void moe_generation_cancel(moe_generation **generation);
