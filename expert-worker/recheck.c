#include "expert-worker/recheck.h"

#include <signal.h>
#include <stdio.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "expert-worker/residency.h"

void moe_recheck_init(moe_recheck *r, const moe_recheck_config *config) {
    *r = (moe_recheck){.config = *config};
    TAILQ_INIT(&r->works);
    moe_known_check_init(&r->check, config->backend, config->transport);
}

void moe_recheck_condemn(moe_recheck *r, const char *reason) {
    if (r->defect[0]) return;
    snprintf(r->defect, sizeof r->defect, "%s", reason);
    moe_metric_add(MOE_METRIC_WORKER_DEFECTS, 1);
    moe_error_log("this worker is defective and computes nothing any more: %s", r->defect);
}

static void end_first(moe_recheck *r, bool blame_request) {
    moe_work *w = TAILQ_FIRST(&r->works);
    TAILQ_REMOVE(&r->works, w, link);
    r->num_works--;
    r->stage = MOE_RECHECK_IDLE;
    if (!blame_request) w->num_not_finite = 0;
    r->config.judged(r->config.ctx, w);
}

bool moe_recheck_add(moe_recheck *r, moe_work *w) {
    if (!r->config.reference) return false;
    if (r->defect[0] || r->num_works == MOE_RECHECK_MAX_WORKS) {
        w->num_not_finite = 0; /* no verdict: another replica may know better */
        return false;
    }
    TAILQ_INSERT_TAIL(&r->works, w, link);
    r->num_works++;
    return true;
}

static bool is_not_finite(const moe_work *w, int32_t row) {
    int32_t lo = 0, hi = w->num_not_finite;
    while (lo < hi) {
        int32_t middle = lo + (hi - lo) / 2;
        if (w->not_finite[middle] < (uint32_t)row)
            lo = middle + 1;
        else
            hi = middle;
    }
    return lo < w->num_not_finite && w->not_finite[lo] == (uint32_t)row;
}

/* The experts that had a part in rows that are not finite; of a failed batch the first one. */
static void collect_experts(moe_recheck *r, const moe_work *w) {
    r->num_experts = r->next_expert = 0;
    for (int32_t a = 0; a < w->assignments && r->num_experts < MOE_RECHECK_MAX_EXPERTS; a++) {
        bool concerned = w->num_not_finite == 0 || is_not_finite(w, w->row_of[a]);
        if (!concerned || (r->num_experts && r->experts[r->num_experts - 1] == w->expert_of[a])) continue;
        r->experts[r->num_experts++] = w->expert_of[a];
        if (w->num_not_finite == 0) return;
    }
}

static void *compute_reference(void *ctx) {
    moe_recheck *r = ctx;
    const moe_work *w = TAILQ_FIRST(&r->works);
    const moe_model *model = r->config.shard->model;
    const moe_ffn_weights *weights = moe_model_expert(model, w->layer, r->experts[r->next_expert]);
    moe_error err;
    r->answer_status = moe_known_answer_compute(r->config.reference, model, w->layer, r->experts[r->next_expert], weights,
                                                &r->answer, &err);
    moe_model_expert_release(model, weights);
    atomic_store(&r->answered, true);
    if (r->config.threaded) r->config.transport->ops->wake(r->config.transport);
    return NULL;
}

static void start_reference(moe_recheck *r) {
    r->stage = MOE_RECHECK_REFERENCE;
    atomic_store(&r->answered, false);
    if (r->config.threaded) {
        sigset_t all, before;
        sigfillset(&all); /* signals are the main thread's */
        pthread_sigmask(SIG_SETMASK, &all, &before);
        r->has_thread = pthread_create(&r->thread, NULL, compute_reference, r) == 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (!r->has_thread) compute_reference(r);
}

/* The expert that the backend is to check; NULL while it is on its way to the device. */
static moe_expert *checked_expert(moe_recheck *r) {
    const moe_work *w = TAILQ_FIRST(&r->works);
    moe_shard *shard = r->config.shard;
    int32_t expert = r->experts[r->next_expert];
    if (!shard->residency) return moe_shard_at(shard, w->layer, expert)->handle;
    if (!r->needs) moe_residency_need(shard->residency, w->layer, expert);
    r->needs = true;
    return moe_residency_acquire(shard->residency, w->layer, expert);
}

static void let_go(moe_recheck *r, bool acquired) {
    const moe_work *w = TAILQ_FIRST(&r->works);
    moe_residency *residency = r->config.shard->residency;
    if (!r->needs) return;
    r->needs = false;
    if (acquired) moe_residency_release(residency, w->layer, r->experts[r->next_expert]);
    moe_residency_unneed(residency, w->layer, r->experts[r->next_expert]);
}

/* The device no longer takes copies. */
static bool condemn_if_lost(moe_recheck *r) {
    const moe_residency *residency = r->config.shard->residency;
    const moe_error *lost = residency ? moe_residency_failure(residency) : NULL;
    if (!lost) return false;
    let_go(r, false);
    moe_recheck_condemn(r, lost->message);
    moe_free(r->answer);
    r->answer = NULL;
    end_first(r, false);
    return true;
}

static void start_backend(moe_recheck *r) {
    const moe_work *w = TAILQ_FIRST(&r->works);
    int32_t expert = r->experts[r->next_expert];
    moe_error err;
    if (r->has_thread) pthread_join(r->thread, NULL);
    r->has_thread = false;
    if (condemn_if_lost(r)) return;
    moe_expert *loaded = checked_expert(r);
    if (!loaded) return;
    float *answer = r->answer;
    r->answer = NULL;
    if (r->answer_status != MOE_OK ||
        moe_known_check_begin(&r->check, r->config.shard->model, w->layer, expert, loaded, answer, &err) != MOE_OK) {
        let_go(r, true);
        end_first(r, false); /* no memory for a check: no verdict */
    } else {
        r->stage = MOE_RECHECK_BACKEND;
    }
}

static void take_verdict(moe_recheck *r) {
    moe_error err;
    moe_status verdict;
    if (!moe_known_check_end(&r->check, &verdict, &err)) return;
    let_go(r, true);
    if (verdict == MOE_INTERNAL) moe_recheck_condemn(r, err.message);
    if (verdict != MOE_OK) {
        end_first(r, false);
    } else if (++r->next_expert < r->num_experts) {
        start_reference(r);
    } else {
        moe_info("the known-answer batch is right: %s", TAILQ_FIRST(&r->works)->message);
        end_first(r, true);
    }
}

void moe_recheck_turn(moe_recheck *r) {
    if (r->stage == MOE_RECHECK_BACKEND) take_verdict(r);
    while (r->defect[0] && r->num_works && r->stage == MOE_RECHECK_IDLE) end_first(r, false);
    if (r->stage == MOE_RECHECK_IDLE && r->num_works) {
        collect_experts(r, TAILQ_FIRST(&r->works));
        start_reference(r);
    }
    if (r->stage == MOE_RECHECK_REFERENCE && atomic_load(&r->answered)) start_backend(r);
}

void moe_recheck_close(moe_recheck *r) {
    if (r->has_thread) pthread_join(r->thread, NULL);
    r->has_thread = false;
    moe_free(r->answer);
    r->answer = NULL;
    bool acquired = r->stage == MOE_RECHECK_BACKEND;
    moe_known_check_close(&r->check);
    let_go(r, acquired);
    while (r->num_works) end_first(r, false);
}
