#include <stdio.h>
#include <string.h>

#include "router/placement/controller_internal.h"

const char *moe_worker_state_name(moe_worker_state state) {
    static const char *const names[] = {"up", "down", "joining", "refused", "leaving"};
    return (unsigned)state < sizeof names / sizeof *names ? names[state] : "unknown";
}

/* Serving its share of the map: connected as the map's incarnation and, as far as the store can tell, registered. */
static bool is_up(moe_controller *c, int32_t worker) {
    const moe_placement_worker *w = &c->served->workers[worker];
    const moe_member *m = moe_controller_member(c, w->id);
    if (!m || !moe_controller_peer_of(c, m, w->incarnation)) return false;
    return !c->store_up || m->registered || moe_controller_now(c) < moe_controller_trusted_at(c);
}

static int32_t loaded_by(const moe_jobs *jobs, const char *id) {
    for (int32_t i = 0; i < jobs->count; i++) {
        if (strcmp(jobs->items[i]->id, id) == 0) return jobs->items[i]->num_loaded;
    }
    return 0;
}

static void view_worker(moe_controller *c, const moe_member *m, const bool *up, const int32_t *shares) {
    moe_controller_worker_view *v = &c->view.workers[c->view.num_workers++];
    int32_t worker = c->served ? moe_placement_find_worker(c->served, m->identity.id) : -1;
    bool in_map = worker >= 0 && (c->served->workers[worker].incarnation == m->identity.incarnation || !m->registered);
    snprintf(v->id, sizeof v->id, "%s", m->identity.id);
    snprintf(v->endpoint, sizeof v->endpoint, "%s", m->identity.endpoint);
    snprintf(v->host, sizeof v->host, "%s", m->host);
    snprintf(v->profile, sizeof v->profile, "%s", m->profile);
    v->incarnation = m->identity.incarnation;
    v->pid = m->pid;
    v->state = worker >= 0 && up[worker] ? MOE_WORKER_UP
               : moe_member_refused(m)   ? MOE_WORKER_REFUSED
               : in_map                  ? MOE_WORKER_DOWN
                                         : MOE_WORKER_JOINING;
    if (v->state == MOE_WORKER_UP && moe_member_leaves(c, m)) v->state = MOE_WORKER_LEAVING;
    v->experts = in_map || (worker >= 0 && up[worker]) ? shares[worker] : loaded_by(&c->jobs, m->identity.id);
}

static void view_routers(moe_controller *c) {
    moe_controller_view *v = &c->view;
    memcpy(v->routers, c->routers, (size_t)c->num_routers * sizeof *c->routers);
    v->num_routers = c->num_routers;
    bool self = false;
    for (int32_t i = 0; i < v->num_routers; i++) {
        moe_controller_router_view *r = &v->routers[i];
        char leader[MOE_LEADER_BYTES];
        moe_controller_lease_value(leader, r->id, r->incarnation);
        r->leader = strcmp(leader, c->meta.leader) == 0;
        self = self || strcmp(r->id, c->config.id) == 0;
    }
    if (self || v->num_routers == MOE_MAX_ROUTERS) return;
    moe_controller_router_view *r = &v->routers[v->num_routers++];
    *r = (moe_controller_router_view){.incarnation = c->config.incarnation,
                                      .epoch = c->map ? c->map->epoch : 0,
                                      .fence = c->map ? c->map->fence : 0,
                                      .map_digest = c->map ? c->map_digest : 0,
                                      .routing_epoch = moe_controller_routing_epoch(c),
                                      .pid = c->config.pid,
                                      .leader = c->leading};
    snprintf(r->id, sizeof r->id, "%s", c->config.id);
    snprintf(r->endpoint, sizeof r->endpoint, "%s", c->config.endpoint);
    snprintf(r->host, sizeof r->host, "%s", c->config.host);
}

static void view_layers(moe_controller *c, const bool *up, int32_t *shares) {
    const moe_placement *map = c->served;
    c->view.num_layers = map->num_layers;
    c->view.complete = true;
    for (int32_t l = 0; l < map->num_layers; l++) {
        c->view.min_replicas[l] = MOE_PLACEMENT_MAX_REPLICAS;
        for (int32_t e = 0; e < map->num_experts; e++) {
            const moe_placement_entry *entry = moe_placement_at(map, l, e);
            int32_t ready = 0;
            for (int32_t r = 0; r < entry->num_replicas; r++) {
                shares[entry->replicas[r].worker]++;
                ready += entry->replicas[r].state == MOE_REPLICA_READY && up[entry->replicas[r].worker];
            }
            if (ready < c->view.min_replicas[l]) c->view.min_replicas[l] = ready;
        }
        if (c->view.min_replicas[l] == 0) c->view.complete = false;
    }
}

static void view_moves(moe_controller *c) {
    const moe_migration *g = &c->migration;
    moe_controller_view *v = &c->view;
    const char *phase = moe_migration_phase_name(g->phase);
    v->moves = c->moves;
    v->migration[0] = '\0';
    if (g->count)
        snprintf(v->migration, sizeof v->migration, "%s: %d moves in MoE layer %d: %s", g->id, g->count, g->moves[0].layer, phase);
    v->num_operations = c->num_operations;
    memcpy(v->operations, c->operations, (size_t)c->num_operations * sizeof *c->operations);
    for (int32_t i = 0; i < v->num_operations; i++)
        if (g->count && strcmp(v->operations[i].id, g->id) == 0)
            snprintf(v->operations[i].phase, sizeof v->operations[i].phase, "%s", phase);
    for (int32_t i = 0; i < c->num_submitted && v->num_operations < MOE_MAX_OPERATIONS; i++)
        v->operations[v->num_operations++] = c->submitted[i];
}

void moe_controller_update_view(moe_controller *c) {
    bool up[MOE_PLACEMENT_MAX_WORKERS] = {0};
    int32_t shares[MOE_PLACEMENT_MAX_WORKERS] = {0};
    moe_controller_view *v = &c->view;
    pthread_mutex_lock(&c->view_mutex);
    v->epoch = c->map ? c->map->epoch : 0;
    v->fence = c->map ? c->map->fence : 0;
    v->store_up = c->store_up;
    v->leading = c->leading;
    v->replicas = c->config.replicas;
    v->num_workers = v->num_layers = 0;
    v->complete = false;
    snprintf(v->waiting_for, sizeof v->waiting_for, "%s", c->waiting_for);
    for (int32_t w = 0; c->served && w < c->served->num_workers; w++) up[w] = is_up(c, w);
    if (c->served) view_layers(c, up, shares);
    for (int32_t i = 0; i < c->num_members; i++) view_worker(c, &c->members[i], up, shares);
    view_routers(c);
    view_moves(c);
    pthread_mutex_unlock(&c->view_mutex);
}

void moe_controller_get_view(moe_controller *c, moe_controller_view *out) {
    pthread_mutex_lock(&c->view_mutex);
    *out = c->view;
    pthread_mutex_unlock(&c->view_mutex);
}
