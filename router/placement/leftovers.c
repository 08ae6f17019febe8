/* What workers hold though no map names it there: what was moved away, and what an abandoned takeover or migration had loaded.
 * Dropped once every live router routes by the newest map. A worker that still computes with an expert frees it afterwards. */
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "router/placement/controller_internal.h"

#define DROP_METHOD "/moesaic.v1.WorkerService/Drop"
#define MAX_DROPS 512 /* experts of one call */
#define DROP_TIMEOUT_NS (30 * MOE_NS_PER_S)

static void on_dropped(void *ctx, const moe_rpc_reply *reply) {
    moe_worker_stats *s = ctx;
    s->dropping = false;
    s->next_ns = 0;
    s->holdings = 0; /* asked for anew before anything is decided on it */
    if (reply->status != MOE_OK) moe_warn("worker %s: dropping experts failed: %s", s->id, reply->message);
}

static void call_drop(moe_controller *c, moe_worker_stats *s, moe_peer peer, const int32_t *experts, int32_t count) {
    Moesaic__V1__DropRequest request = MOESAIC__V1__DROP_REQUEST__INIT;
    Moesaic__V1__ExpertId ids[MAX_DROPS], *pointers[MAX_DROPS];
    moe_error err;
    for (int32_t i = 0; i < count; i++) {
        moesaic__v1__expert_id__init(&ids[i]);
        ids[i].layer = (uint32_t)(experts[i] / c->config.num_experts);
        ids[i].expert = (uint32_t)(experts[i] % c->config.num_experts);
        pointers[i] = &ids[i];
    }
    request.epoch = c->map->epoch;
    request.fence = c->fence;
    request.incarnation = s->incarnation;
    request.experts = pointers;
    request.n_experts = (size_t)count;
    s->dropping = moe_rpc_call_start(c->rpc, peer, DROP_METHOD, &request.base, NULL, 0, moe_controller_now(c) + DROP_TIMEOUT_NS,
                                     on_dropped, s, &s->drop_id, &err) == MOE_OK;
    if (s->dropping) moe_info("worker %s drops %d experts that the map places elsewhere", s->id, count);
}

/* Experts that it holds, that the map does not place on it, and that nobody is about to. */
static int32_t find_leftovers(const moe_controller *c, const moe_member *m, const moe_worker_stats *s, int32_t *experts) {
    int32_t worker = moe_placement_find_worker(c->map, m->identity.id), count = 0;
    for (int32_t i = 0; i < s->num_held && count < MAX_DROPS; i++) {
        int32_t expert = s->held[i];
        bool placed = worker >= 0 && moe_placement_has(&c->map->entries[expert], worker);
        if (!placed && !moe_migration_wants(c, m->identity.id, expert)) experts[count++] = expert;
    }
    return count;
}

/* A process that is about to get a share, or whose predecessor has one. */
static bool in_transit(const moe_controller *c, const moe_member *m) {
    int32_t worker = moe_placement_find_worker(c->map, m->identity.id);
    return moe_jobs_has(&c->jobs, m->identity.id, -1) ||
           (worker >= 0 && c->map->workers[worker].incarnation != m->identity.incarnation);
}

void moe_controller_drop_leftovers(moe_controller *c) {
    int32_t experts[MAX_DROPS];
    if (c->served != c->map || !moe_controller_acknowledged(c)) return;
    for (int32_t i = 0; i < c->num_members; i++) {
        moe_member *m = &c->members[i];
        const moe_rpc_peer *peer = moe_controller_peer_of(c, m, m->identity.incarnation);
        const moe_worker_stats *s = moe_member_stats(m);
        bool informed = s && moe_worker_knows_map(c, s); /* so that it can tell a router where the experts went */
        if (!peer || !informed || s->dropping || !m->registered || in_transit(c, m)) continue;
        int32_t count = find_leftovers(c, m, s, experts);
        if (count) call_drop(c, m->stats, peer->peer, experts, count);
    }
}
