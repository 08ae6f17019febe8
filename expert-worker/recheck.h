/* A result that is not finite, or a batch that failed: is it the request, or is this worker broken? The calls concerned are held
 * back while the known-answer batch of their experts is computed again, by the reference and by the backend. Right: the request
 * is to blame, its call names the rows. Wrong, or the backend fails: the worker is defective and computes nothing any more.
 * The loop's thread only, but for the reference's computation. */
#pragma once
#include "expert-worker/known_answer.h"
#include "expert-worker/work.h"
#include "expert-worker/worker.h"

#define MOE_RECHECK_MAX_WORKS 16   /* held back at once; more are answered without a verdict */
#define MOE_RECHECK_MAX_EXPERTS 16 /* checked for one call */

typedef struct moe_recheck_config { /* all borrowed */
    moe_shard *shard;
    moe_backend *backend;
    moe_transport *transport; /* woken when there is something to do */
    const moe_ops *reference; /* NULL: nothing is checked, the request is blamed */
    bool threaded;            /* the reference computes in a thread of its own */
    void (*judged)(void *ctx, moe_work *work); /* answer it; the batcher's */
    void *ctx;
} moe_recheck_config;

typedef enum moe_recheck_stage { MOE_RECHECK_IDLE, MOE_RECHECK_REFERENCE, MOE_RECHECK_BACKEND } moe_recheck_stage;

typedef struct moe_recheck {
    moe_recheck_config config;
    struct moe_work_list works;
    int num_works;
    moe_recheck_stage stage;
    int32_t experts[MOE_RECHECK_MAX_EXPERTS]; /* of the first work */
    int num_experts, next_expert;
    bool needs; /* the next expert, of the residency */
    moe_known_check check;
    pthread_t thread;
    bool has_thread;
    _Atomic bool answered; /* the reference has computed: what follows is ours again */
    float *answer;
    moe_status answer_status;
    char defect[MOE_WORKER_DEFECT_BYTES]; /* "" while nothing is known against this worker */
} moe_recheck;

void moe_recheck_init(moe_recheck *recheck, const moe_recheck_config *config);
void moe_recheck_close(moe_recheck *recheck); /* waits for what is under way, hands the works to `judged` */

/* Takes over a work whose status is INTERNAL; false where it is not to be held back. */
bool moe_recheck_add(moe_recheck *recheck, moe_work *work);
void moe_recheck_turn(moe_recheck *recheck);

/* The worker is defective for a reason found elsewhere; the first reason stays. */
void moe_recheck_condemn(moe_recheck *recheck, const char *reason);
static inline bool moe_recheck_polls(const moe_recheck *r) {
    return r->stage == MOE_RECHECK_BACKEND && r->config.backend->ops->poll;
}
