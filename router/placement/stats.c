/* What workers tell of themselves: every router asks all of them now and then, so that each knows the whole cluster's loads, and a
 * next leader goes on with them. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "router/placement/controller_internal.h"

#define STATS_METHOD "/moesaic.v1.WorkerService/Stats"

static size_t total_experts(const moe_controller *c) {
    return (size_t)c->config.num_moe_layers * (size_t)c->config.num_experts;
}

void moe_worker_stats_free(moe_worker_stats **stats) {
    moe_worker_stats *s = *stats;
    *stats = NULL;
    if (!s) return;
    if (s->calling) moe_rpc_cancel(s->controller->rpc, s->call_id);
    if (s->dropping) moe_rpc_cancel(s->controller->rpc, s->drop_id);
    if (s->exchanging) moe_rpc_cancel(s->controller->rpc, s->exchange_id);
    moe_free(s->held);
    moe_free(s->rows);
    moe_free(s->calls);
    moe_free(s);
}

static moe_worker_stats *stats_new(moe_controller *c, const char *id) {
    moe_worker_stats *s = moe_calloc(1, sizeof *s);
    if (!s) return NULL;
    s->controller = c;
    snprintf(s->id, sizeof s->id, "%s", id);
    s->held = moe_calloc(total_experts(c), sizeof *s->held);
    s->rows = moe_calloc(total_experts(c), sizeof *s->rows);
    s->calls = moe_calloc(total_experts(c), sizeof *s->calls);
    if (!s->held || !s->rows || !s->calls) moe_worker_stats_free(&s);
    return s;
}

const moe_worker_stats *moe_member_stats(const moe_member *m) {
    const moe_worker_stats *s = m->stats;
    return s && s->holdings && s->incarnation == m->identity.incarnation ? s : NULL;
}

bool moe_stats_holds(const moe_worker_stats *s, int32_t expert) {
    int32_t lo = 0, hi = s->num_held;
    while (lo < hi) {
        int32_t mid = lo + (hi - lo) / 2;
        if (s->held[mid] < expert)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < s->num_held && s->held[lo] == expert;
}

/* Loads decay as time goes on. */
static void decay_loads(moe_controller *c, int64_t now) {
    double factor = exp2(-(double)(now - c->loads_ns) / (double)c->config.balance.load_half_life_ns);
    for (size_t i = 0; i < total_experts(c); i++) {
        c->loads[i].rows *= factor;
        c->loads[i].calls *= factor;
    }
    c->loads_ns = now;
}

/* Strictly ascending and of the model; what is no longer held begins at 0 when it comes back. */
static bool take_list(moe_worker_stats *s, const Moesaic__V1__StatsResponse *r) {
    const moe_controller_config *config = &s->controller->config;
    int64_t last = -1;
    for (size_t i = 0; i < r->n_loaded; i++) {
        const Moesaic__V1__ExpertId *id = r->loaded[i]->id;
        if (!id || id->layer >= (uint32_t)config->num_moe_layers || id->expert >= (uint32_t)config->num_experts) return false;
        int64_t at = (int64_t)id->layer * config->num_experts + id->expert;
        if (at <= last) return false;
        last = at;
    }
    for (int32_t i = 0, k = 0; i < s->num_held; i++) {
        while (k < (int32_t)r->n_loaded &&
               (int32_t)(r->loaded[k]->id->layer * (uint32_t)config->num_experts + r->loaded[k]->id->expert) < s->held[i])
            k++;
        bool still = k < (int32_t)r->n_loaded &&
                     (int32_t)(r->loaded[k]->id->layer * (uint32_t)config->num_experts + r->loaded[k]->id->expert) == s->held[i];
        if (!still) s->rows[s->held[i]] = s->calls[s->held[i]] = 0;
    }
    for (size_t i = 0; i < r->n_loaded; i++)
        s->held[i] = (int32_t)(r->loaded[i]->id->layer * (uint32_t)config->num_experts + r->loaded[i]->id->expert);
    s->num_held = (int32_t)r->n_loaded;
    return true;
}

static double grown(uint64_t *counter, uint64_t now) {
    uint64_t by = now >= *counter ? now - *counter : now;
    *counter = now;
    return (double)by;
}

static bool take_stats(moe_worker_stats *s, const Moesaic__V1__StatsResponse *r, uint64_t incarnation) {
    moe_controller *c = s->controller;
    bool first = s->incarnation != incarnation;
    if (first) s->holdings = 0;
    if (r->incarnation != incarnation || r->holdings == 0 || r->n_loaded_rows != r->n_loaded_calls) return false;
    if (s->holdings != r->holdings) {
        s->holdings = 0;
        if (!take_list(s, r)) return false;
    }
    if (r->n_loaded_rows != (size_t)s->num_held) return false;
    decay_loads(c, moe_controller_now(c));
    for (int32_t i = 0; i < s->num_held; i++) {
        double rows = grown(&s->rows[s->held[i]], r->loaded_rows[i]), calls = grown(&s->calls[s->held[i]], r->loaded_calls[i]);
        if (first) continue; /* whatever it computed before we knew it */
        c->loads[s->held[i]].rows += rows;
        c->loads[s->held[i]].calls += calls;
    }
    s->incarnation = incarnation;
    s->holdings = r->holdings;
    s->leaving = r->leaving;
    s->map_epoch = r->map_epoch;
    s->map_fence = r->map_fence;
    s->as_of_ns = s->asked_ns;
    return true;
}

static void on_stats(void *ctx, const moe_rpc_reply *reply) {
    moe_worker_stats *s = ctx;
    const moe_member *m = moe_controller_member(s->controller, s->id);
    s->calling = false;
    if (reply->status != MOE_OK || !reply->body || !m) return;
    if (take_stats(s, (const Moesaic__V1__StatsResponse *)reply->body, m->identity.incarnation)) return;
    s->holdings = 0;
    moe_debug("worker %s: its stats make no sense and are asked for again", s->id);
}

static void ask(moe_controller *c, moe_member *m, moe_peer peer, int64_t now) {
    moe_error err;
    moe_worker_stats *s = m->stats;
    Moesaic__V1__StatsRequest request = MOESAIC__V1__STATS_REQUEST__INIT;
    request.known_holdings = s->incarnation == m->identity.incarnation ? s->holdings : 0;
    bool busy = c->leading && c->migration.phase != MOE_MIGRATION_NONE;
    s->next_ns = now + (busy ? MOE_POLL_BUSY_NS : MOE_POLL_STATS_NS);
    s->asked_ns = now;
    s->calling = moe_rpc_call_start(c->rpc, peer, STATS_METHOD, &request.base, NULL, 0, now + MOE_STATS_TIMEOUT_NS, on_stats, s,
                                    &s->call_id, &err) == MOE_OK;
}

void moe_controller_poll_stats(moe_controller *c) {
    int64_t now = moe_controller_now(c);
    for (int32_t i = 0; i < c->num_members; i++) {
        moe_member *m = &c->members[i];
        const moe_rpc_peer *peer = moe_controller_peer_of(c, m, m->identity.incarnation);
        if (!peer) continue;
        if (!m->stats && !(m->stats = stats_new(c, m->identity.id))) continue;
        if (!m->stats->calling && now >= m->stats->next_ns) ask(c, m, peer->peer, now);
    }
}
