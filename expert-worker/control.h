/* Load and Drop: which experts the worker holds changes a little in each turn of the loop. An expert that is loaded is copied
 * from a peer or read from the checkpoint, packed, checked, and only then held. The loop's thread only. */
#pragma once
#include <sys/queue.h>

#include "common/progress.h"
#include "expert-worker/fetch.h"
#include "expert-worker/loader.h"
#include "proto/rpc.h"

#define MOE_WORKER_MAX_CONTROL_CALLS 256                /* Load and Drop calls that are not answered yet */
#define MOE_WORKER_LOAD_NS_PER_TURN (5 * MOE_NS_PER_MS) /* then calls and pings have their turn; at least one expert a turn */
#define MOE_WORKER_LOADS_PER_TURN 16                    /* experts, whatever the clock says */

TAILQ_HEAD(moe_control_list, moe_control_op);

typedef struct moe_control_config { /* all borrowed */
    moe_shard *shard;
    const moe_clock *clock;
    moe_rpc **rpc; /* there before the first command */
    moe_transport *transport;
    const moe_ops *reference; /* cpu-ref's operations, for known answers; NULL: none */
    const char *worker_id;
    uint64_t incarnation;
    int32_t load_threads;     /* as moe_worker_config */
    int64_t copy_bytes_per_s; /* 0: no limit */
    int32_t max_experts;      /* held at once; 0: no limit */
} moe_control_config;

/* Where the first Load is with its next expert; CLEARS: what an earlier one had begun is thrown away. */
typedef enum moe_load_stage { MOE_LOAD_NEXT, MOE_LOAD_COPIES, MOE_LOAD_PACKS, MOE_LOAD_CHECKS, MOE_LOAD_CLEARS } moe_load_stage;

typedef struct moe_control {
    moe_control_config config;
    moe_shard *shard; /* as in the config, like the next two */
    const moe_clock *clock;
    uint64_t incarnation;
    uint64_t epoch, fence; /* highest seen */
    struct moe_control_list loads, drops;
    int32_t num_calls;
    uint64_t loaded; /* experts that Load calls got, for the progress counter */
    bool serving;    /* the worker's: calls were computed, so that loads are to take one thread and no more */

    moe_load_stage stage;
    moe_fetch fetch;
    moe_loader loader;
    moe_known_check check;
    moe_loader_task checked; /* packed, being checked */
    char defect[256];        /* a known-answer batch that failed; "" while none has */

    /* of the share being loaded, which may take several calls */
    moe_progress progress;
    char label[96]; /* "worker w0 loads" */
    int64_t share_loaded, share_bytes;
} moe_control;

/* RESOURCE_EXHAUSTED. */
moe_status moe_control_init(moe_control *control, const moe_control_config *config, moe_error *err);
void moe_control_close(moe_control *control); /* answers what is left with UNAVAILABLE */

/* A leader with that fence speaks and knows of that epoch. FAILED_PRECONDITION: one with a higher fence was heard already. */
moe_status moe_control_hear(moe_control *control, uint64_t epoch, uint64_t fence, moe_error *err);

/* Handlers. Each answers now or in a later turn. */
void moe_control_on_load(moe_control *control, moe_rpc_call *call, const Moesaic__V1__LoadRequest *request);
void moe_control_on_drop(moe_control *control, moe_rpc_call *call, const Moesaic__V1__DropRequest *request);

/* Takes loads further, answers what is complete. True while there is more to do at once. */
bool moe_control_turn(moe_control *control);
/* Whether a turn would do something without an event: also what ended meanwhile, since a step may take its wake for its own. Of a
 * polled backend's job only turns find out. */
bool moe_control_has_work(moe_control *control);
int64_t moe_control_due_ns(const moe_control *control); /* when a turn is due without an event; INT64_MAX: never */
