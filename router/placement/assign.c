/* What the leader does: the first layout of a cluster, and the takeover of a dead worker's share by a newcomer. Nothing here
 * needs to be remembered beyond `meta` and the map: a next leader looks at both and at the leases, and does what is missing. */
#include <stdio.h>
#include <string.h>

#include "common/log.h"
#include "router/placement/controller_internal.h"

static void wait_for(moe_controller *c, const char *what) {
    if (strncmp(c->waiting_for, what, sizeof c->waiting_for - 1) == 0) return;
    snprintf(c->waiting_for, sizeof c->waiting_for, "%.*s", (int)sizeof c->waiting_for - 1, what);
    moe_info("no placement map yet: %s", what);
}

/* ---- bootstrap ---- */

static int32_t total_experts(const moe_controller *c) { return c->config.num_moe_layers * c->config.num_experts; }

int64_t moe_member_capacity(const moe_controller *c, const moe_member *m) {
    return m->capacity_experts && m->capacity_experts < total_experts(c) ? m->capacity_experts : total_experts(c);
}

/* Replicas of an expert must compute alike, so a cluster begins with one numeric profile: that of its first worker by id. */
static void refuse_other_profiles(moe_controller *c) {
    const moe_member *first = NULL;
    for (int32_t i = 0; i < c->num_members; i++) {
        moe_member *m = &c->members[i];
        if (!moe_member_available(c, m)) continue;
        if (!first) first = m;
        if (strcmp(m->profile, first->profile) != 0)
            moe_member_refuse(m, m->identity.incarnation, "its numeric profile is not that of the other workers");
    }
}

static bool bootstrap_due(moe_controller *c) {
    char text[200];
    int32_t workers = 0;
    int64_t room = 0, needed = (int64_t)c->config.replicas * total_experts(c);
    refuse_other_profiles(c);
    for (int32_t i = 0; i < c->num_members; i++) {
        if (!moe_member_available(c, &c->members[i])) continue;
        workers++;
        room += moe_member_capacity(c, &c->members[i]);
    }
    int32_t wanted = c->config.initial_workers ? c->config.initial_workers : c->config.replicas;
    if (workers < wanted) {
        snprintf(text, sizeof text, "waiting for %d workers, %d are there", wanted, workers);
    } else if (room < needed) {
        snprintf(text, sizeof text, "the workers have room for %lld of %lld expert replicas", (long long)room, (long long)needed);
    } else if (!c->config.initial_workers && moe_controller_now(c) - c->last_join_ns < MOE_BOOTSTRAP_QUIET_NS) {
        snprintf(text, sizeof text, "waiting whether more workers join");
    } else {
        return true;
    }
    wait_for(c, text);
    return false;
}

static moe_placement *place_members(const moe_controller *c) {
    int32_t workers = 0;
    for (int32_t i = 0; i < c->num_members; i++) workers += moe_member_available(c, &c->members[i]);
    moe_placement *plan = moe_placement_new(c->config.num_moe_layers, c->config.num_experts, workers);
    if (!plan) return NULL;
    plan->model_digest = c->config.model_digest;
    for (int32_t i = 0; c->config.expert_digests && i < total_experts(c); i++) plan->entries[i].digest = c->config.expert_digests[i];
    workers = 0;
    for (int32_t i = 0; i < c->num_members; i++) {
        if (moe_member_available(c, &c->members[i])) plan->workers[workers++] = c->members[i].identity;
    }
    return plan;
}

static moe_status add_jobs(moe_controller *c, moe_placement *plan, moe_error *err) {
    for (int32_t w = 0; w < plan->num_workers; w++) {
        const moe_placement_worker *worker = &plan->workers[w];
        if (!moe_jobs_add_share(&c->jobs, c, plan, w, worker->id, worker->incarnation)) {
            return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the layout");
        }
        int64_t room = moe_member_capacity(c, moe_controller_member(c, worker->id));
        if (c->jobs.items[w]->num_experts > room) {
            return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "worker %s has room for %lld experts, its share is %d", worker->id,
                            (long long)room, c->jobs.items[w]->num_experts);
        }
    }
    return MOE_OK;
}

static void drop_plan(moe_controller *c) {
    moe_jobs_clear(&c->jobs);
    moe_placement_unref(&c->plan);
}

static void make_plan(moe_controller *c) {
    const moe_controller_config *config = &c->config;
    moe_error err = {0};
    drop_plan(c);
    c->plan = place_members(c);
    moe_status status =
        c->plan ? moe_placement_layout(c->plan, config->layout, config->layout_seed, config->layout_file, config->replicas, &err)
                : moe_fail(&err, MOE_RESOURCE_EXHAUSTED, "out of memory for the layout");
    if (!status) status = add_jobs(c, c->plan, &err);
    if (status) {
        drop_plan(c);
        wait_for(c, err.message);
    } else {
        wait_for(c, "workers are loading their experts");
    }
}

static bool plan_holds(moe_controller *c) {
    for (int32_t w = 0; w < c->plan->num_workers; w++) {
        const moe_member *m = moe_controller_member(c, c->plan->workers[w].id);
        if (!moe_member_alive(m, c->plan->workers[w].incarnation) || moe_member_refused(m)) return false;
    }
    return true;
}

/* The manifest's digest of an expert counts, or else the first that is reported; a worker that reports another is refused, and the
 * layout is made again. */
static void finish_plan(moe_controller *c) {
    moe_error err = {0};
    for (int32_t i = 0; i < c->jobs.count; i++) {
        if (!moe_load_job_done(c->jobs.items[i])) return;
    }
    if (!c->config.new_cluster && moe_controller_now(c) < c->contact_ns + MOE_BOOTSTRAP_LISTEN_NS) return;
    for (int32_t i = 0; i < c->jobs.count; i++) {
        if (moe_job_agrees(c->jobs.items[i], c->plan)) continue;
        const moe_load_job *job = c->jobs.items[i];
        moe_member_refuse(moe_controller_member(c, job->id), job->incarnation, "its copy of an expert differs");
        drop_plan(c);
        return;
    }
    moe_placement *plan = moe_placement_ref(c->plan);
    if (moe_controller_publish(c, plan, &err) == MOE_OK) drop_plan(c);
    moe_placement_unref(&plan);
}

static void bootstrap(moe_controller *c) {
    if (c->plan && !plan_holds(c)) drop_plan(c);
    if (!c->plan && bootstrap_due(c)) make_plan(c);
    if (c->plan) finish_plan(c);
}

/* ---- takeover ---- */

static bool dead(moe_controller *c, int32_t worker) {
    const moe_placement_worker *w = &c->map->workers[worker];
    const moe_member *m = moe_controller_member(c, w->id);
    if (m && m->registered) return m->identity.incarnation != w->incarnation;
    return moe_controller_now(c) >= moe_controller_trusted_at(c);
}

bool moe_member_profile_fits(moe_controller *c, const moe_member *newcomer) {
    for (int32_t w = 0; w < c->map->num_workers; w++) {
        const moe_member *m = moe_controller_member(c, c->map->workers[w].id);
        if (moe_member_alive(m, c->map->workers[w].incarnation) && strcmp(m->profile, newcomer->profile) != 0) return false;
    }
    return true;
}

static int32_t share_of(const moe_placement *map, int32_t worker) {
    int32_t share = 0;
    for (int32_t i = 0; i < map->num_layers * map->num_experts; i++) share += moe_placement_has(&map->entries[i], worker);
    return share;
}

/* The same id first (it comes back to its own share), else any worker that is in no share. */
static moe_member *find_newcomer(moe_controller *c, int32_t worker) {
    moe_member *same = moe_controller_member(c, c->map->workers[worker].id);
    if (same && moe_member_available(c, same)) return same;
    int32_t share = share_of(c->map, worker);
    for (int32_t i = 0; i < c->num_members; i++) {
        moe_member *m = &c->members[i];
        bool free = moe_member_available(c, m) && moe_placement_find_worker(c->map, m->identity.id) < 0 &&
                    !moe_jobs_has(&c->jobs, m->identity.id, -1) && !moe_member_leaves(c, m);
        if (free && moe_member_capacity(c, m) >= share) return m;
    }
    return NULL;
}

static void start_takeovers(moe_controller *c) {
    for (int32_t w = 0; w < c->map->num_workers; w++) {
        if (!dead(c, w) || moe_jobs_has(&c->jobs, "", w) || share_of(c->map, w) == 0) continue;
        moe_member *m = find_newcomer(c, w);
        if (!m) continue;
        if (!moe_member_profile_fits(c, m)) {
            moe_member_refuse(m, m->identity.incarnation, "its numeric profile is not that of the other workers");
            continue;
        }
        if (!moe_jobs_add_share(&c->jobs, c, c->map, w, m->identity.id, m->identity.incarnation)) return;
        moe_info("worker %s (%016llx) takes over the share of worker %s (%016llx): %d experts", m->identity.id,
                 (unsigned long long)m->identity.incarnation, c->map->workers[w].id,
                 (unsigned long long)c->map->workers[w].incarnation, c->jobs.items[c->jobs.count - 1]->num_experts);
    }
}

/* Drops what no longer makes sense: the newcomer has gone or was refused, or the one it replaces is alive after all. */
static void drop_stale_takeovers(moe_controller *c) {
    for (int32_t i = c->jobs.count - 1; i >= 0; i--) {
        const moe_load_job *job = c->jobs.items[i];
        const moe_member *m = moe_controller_member(c, job->id);
        bool holds = moe_member_alive(m, job->incarnation) && moe_member_available(c, m) && dead(c, job->worker);
        if (!holds || !moe_job_covers_share(job, c->map)) moe_jobs_remove(&c->jobs, i); /* experts may have moved meanwhile */
    }
}

static void publish_takeover(moe_controller *c, int32_t index) {
    const moe_load_job *job = c->jobs.items[index];
    moe_member *m = moe_controller_member(c, job->id);
    moe_placement *next = moe_placement_copy(c->map);
    moe_error err = {0};
    if (!next) return; /* tried again at the next pass */
    if (!moe_job_agrees(job, next)) {
        moe_member_refuse(m, m->identity.incarnation, "its copy of an expert differs");
        moe_jobs_remove(&c->jobs, index);
    } else {
        next->workers[job->worker] = m->identity;
        for (int32_t i = 0; i < job->num_experts; i++) {
            moe_placement_entry *entry = &next->entries[job->experts[i]];
            for (int32_t r = 0; r < entry->num_replicas; r++) {
                if (entry->replicas[r].worker == job->worker) entry->replicas[r].state = MOE_REPLICA_READY;
            }
        }
        if (moe_controller_publish(c, next, &err) == MOE_OK) moe_jobs_remove(&c->jobs, index);
    }
    moe_placement_unref(&next);
}

/* True where it published. */
static bool takeover(moe_controller *c) {
    drop_stale_takeovers(c);
    for (int32_t i = 0; i < c->jobs.count; i++) {
        if (!moe_load_job_done(c->jobs.items[i])) continue;
        publish_takeover(c, i);
        return true; /* one write a pass: the next sees what became of it */
    }
    start_takeovers(c);
    return false;
}

/* The store lost our map or has an older or damaged one, someone knows a higher epoch or another map under ours, or workers
 * rejoined while the store was down: what we serve becomes the newest map. */
static bool must_republish(const moe_controller *c) {
    return c->meta.epoch != c->map->epoch || c->meta.map_digest != c->map_digest || c->highest_epoch > c->map->epoch ||
           c->served != c->map || c->map_disputed;
}

static void republish(moe_controller *c) {
    moe_error err = {0};
    moe_placement *next = moe_placement_copy(c->served);
    if (!next) return;
    moe_jobs_clear(&c->jobs);
    moe_info("publishing the placement map again: ours has epoch %llu, the store's %llu, the highest known is %llu",
             (unsigned long long)c->map->epoch, (unsigned long long)c->meta.epoch, (unsigned long long)c->highest_epoch);
    moe_controller_publish(c, next, &err);
    moe_placement_unref(&next);
}

void moe_controller_assign(moe_controller *c) {
    if (!c->map_examined) return;
    if (!c->map) {
        bootstrap(c);
    } else if (must_republish(c)) {
        republish(c);
    } else if (!takeover(c)) {
        moe_controller_migrate(c);
    }
}
