/* Load and Drop: which experts the worker holds changes a little in each turn of the loop. The loop's thread only. */
#pragma once
#include <sys/queue.h>

#include "common/progress.h"
#include "expert-worker/shard.h"
#include "proto/rpc.h"

#define MOE_WORKER_MAX_CONTROL_CALLS 256                /* Load and Drop calls that are not answered yet */
#define MOE_WORKER_LOAD_NS_PER_TURN (5 * MOE_NS_PER_MS) /* then calls and pings have their turn; at least one expert a turn */
#define MOE_WORKER_LOADS_PER_TURN 16                    /* experts, whatever the clock says */

TAILQ_HEAD(moe_control_list, moe_control_op);

typedef struct moe_control {
    moe_shard *shard;       /* borrowed */
    const moe_clock *clock; /* borrowed */
    uint64_t incarnation;
    uint64_t epoch, fence; /* highest seen */
    struct moe_control_list loads, drops;
    int32_t num_calls;
    uint64_t loaded; /* experts that Load calls got, for the progress counter */

    /* of the share being loaded, which may take several calls */
    moe_progress progress;
    char label[96]; /* "worker w0 loads" */
    int64_t share_loaded, share_bytes;
} moe_control;

void moe_control_init(moe_control *control, moe_shard *shard, const moe_clock *clock, uint64_t incarnation,
                      const char *worker_id);
void moe_control_close(moe_control *control); /* answers what is left with UNAVAILABLE */

/* Handlers. Each answers now or in a later turn. */
void moe_control_on_load(moe_control *control, moe_rpc_call *call, const Moesaic__V1__LoadRequest *request);
void moe_control_on_drop(moe_control *control, moe_rpc_call *call, const Moesaic__V1__DropRequest *request);

/* Loads some experts, answers what is complete. True while experts wait to be loaded. */
bool moe_control_turn(moe_control *control);
