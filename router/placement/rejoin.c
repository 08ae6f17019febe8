/* While the store is down no map can be published, but a worker of the map that restarts comes back at its old endpoint, and its
 * hello tells the new incarnation. Each router then lets it load its share again and serves from a copy of the map with the new
 * incarnation in it, under the same epoch and fence: the same experts at the same worker id, verified against the map's digests.
 * Once the store is back, the leader publishes that copy as the next epoch. */
#include <string.h>

#include "common/log.h"
#include "router/placement/controller_internal.h"

static bool has_job(const moe_jobs *jobs, int32_t worker) {
    for (int32_t i = 0; i < jobs->count; i++) {
        if (jobs->items[i]->worker == worker) return true;
    }
    return false;
}

static void serve_rejoined(moe_controller *c, const moe_load_job *job) {
    moe_placement *next = moe_placement_copy(c->served);
    if (!next) return;
    if (!moe_job_agrees(job, next)) {
        moe_member *m = moe_controller_member(c, job->id);
        if (m) moe_member_refuse(m, job->incarnation, "its copy of an expert differs");
    } else {
        next->workers[job->worker].incarnation = job->incarnation;
        moe_info("worker %s serves again while the store is down, as incarnation %016llx", job->id,
                 (unsigned long long)job->incarnation);
        moe_controller_serve(c, next);
    }
    moe_placement_unref(&next);
}

/* The restarted process behind the control connection of a worker of the map, or NULL. */
static const moe_rpc_peer *restarted(moe_controller *c, int32_t worker) {
    const moe_placement_worker *w = &c->served->workers[worker];
    const moe_member *m = moe_controller_member(c, w->id);
    const moe_rpc_peer *peer = m && m->link ? moe_rpc_peer_of_link(c->rpc, m->link) : NULL;
    bool fresh = peer && strcmp(peer->id, w->id) == 0 && peer->incarnation != w->incarnation;
    return fresh && peer->incarnation != m->refused_incarnation ? peer : NULL;
}

void moe_controller_rejoin(moe_controller *c) {
    if (c->store_up || !c->store_known || !c->served) {
        moe_jobs_clear(&c->rejoins);
        return;
    }
    for (int32_t i = c->rejoins.count - 1; i >= 0; i--) {
        const moe_load_job *job = c->rejoins.items[i];
        const moe_rpc_peer *peer = restarted(c, job->worker);
        bool holds = peer && peer->incarnation == job->incarnation;
        if (holds && moe_load_job_done(job)) serve_rejoined(c, job);
        if (!holds || moe_load_job_done(job)) moe_jobs_remove(&c->rejoins, i);
    }
    for (int32_t w = 0; w < c->served->num_workers; w++) {
        const moe_rpc_peer *peer = has_job(&c->rejoins, w) ? NULL : restarted(c, w);
        if (peer) moe_jobs_add_share(&c->rejoins, c, c->served, w, peer->id, peer->incarnation);
    }
    moe_jobs_step(&c->rejoins, c);
}
