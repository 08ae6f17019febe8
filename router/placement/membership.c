/* Membership: the leases of workers and routers, and a control connection to every worker that is registered or in the map. */
#include <string.h>

#include "common/alloc.h"
#include "common/json.h"
#include "common/log.h"
#include "router/placement/controller_internal.h"

moe_member *moe_controller_member(moe_controller *c, const char *id) {
    for (int32_t i = 0; i < c->num_members; i++) {
        if (strcmp(c->members[i].identity.id, id) == 0) return &c->members[i];
    }
    return NULL;
}

bool moe_member_alive(const moe_member *m, uint64_t incarnation) {
    return m && m->registered && m->identity.incarnation == incarnation;
}

void moe_member_refuse(moe_member *m, uint64_t incarnation, const char *why) {
    if (m->refused_incarnation != incarnation) moe_error_log("worker %s is refused until it restarts: %s", m->identity.id, why);
    m->refused_incarnation = incarnation;
}

bool moe_member_available(const moe_controller *c, const moe_member *m) {
    return m->registered && !moe_member_refused(m) && moe_controller_peer_of(c, m, m->identity.incarnation);
}

bool moe_controller_serves(moe_controller *c, const moe_placement *map, int32_t worker) {
    const moe_placement_worker *w = &map->workers[worker];
    const moe_member *m = moe_controller_member(c, w->id);
    return m && m->identity.incarnation == w->incarnation && moe_member_available(c, m);
}

const moe_rpc_peer *moe_controller_peer_of(const moe_controller *c, const moe_member *m, uint64_t incarnation) {
    const moe_rpc_peer *peer = m->link ? moe_rpc_peer_of_link(c->rpc, m->link) : NULL;
    return peer && peer->incarnation == incarnation && strcmp(peer->id, m->identity.id) == 0 ? peer : NULL;
}

static void disconnect(moe_controller *c, moe_member *m) {
    if (m->link) moe_rpc_disconnect(c->rpc, m->link);
    m->link = 0;
}

/* By id, numbers within compared as numbers (w2 before w10). NULL: the table is full. */
static moe_member *insert_member(moe_controller *c, const char *id) {
    if (c->num_members == MOE_PLACEMENT_MAX_WORKERS) return NULL;
    int32_t at = 0;
    while (at < c->num_members && strverscmp(c->members[at].identity.id, id) < 0) at++;
    memmove(&c->members[at + 1], &c->members[at], (size_t)(c->num_members++ - at) * sizeof *c->members);
    c->members[at] = (moe_member){0};
    return &c->members[at];
}

static void remove_member(moe_controller *c, int32_t index) {
    disconnect(c, &c->members[index]);
    moe_worker_stats_free(&c->members[index].stats);
    memmove(&c->members[index], &c->members[index + 1], (size_t)(--c->num_members - index) * sizeof *c->members);
}

/* ---- leases as text ---- */

static bool parse_worker(const char *id, const char *text, size_t size, moe_member *out) {
    json_t *root = size <= MOE_MAX_LEASE_BYTES ? json_loadb(text, size, JSON_REJECT_DUPLICATES, NULL) : NULL;
    *out = (moe_member){0};
    bool ok = moe_json_get_text(root, "id", out->identity.id, sizeof out->identity.id) && strcmp(out->identity.id, id) == 0 &&
              moe_json_get_hex(root, "incarnation", &out->identity.incarnation) &&
              moe_json_get_text(root, "endpoint", out->identity.endpoint, sizeof out->identity.endpoint) &&
              out->identity.endpoint[0] &&
              moe_json_get_text(root, "public_key", out->identity.public_key, sizeof out->identity.public_key) &&
              moe_json_get_text(root, "host", out->host, sizeof out->host) &&
              moe_json_get_text(root, "profile", out->profile, sizeof out->profile) &&
              moe_json_get_count(root, "pid", INT64_MAX, &out->pid) &&
              moe_json_get_count(root, "capacity_experts", INT64_MAX, &out->capacity_experts) &&
              moe_json_get_hex(root, "model_digest", &out->model_digest);
    moe_json_get_count(root, "expert_ns", MOE_COST_MAX_NS, &out->identity.cost.per_expert); /* not told by older workers */
    moe_json_get_count(root, "row_ns", MOE_COST_MAX_NS, &out->identity.cost.per_row);
    json_decref(root);
    return ok;
}

/* ---- workers ---- */

static void update_member(moe_controller *c, moe_member *m, const moe_member *lease) {
    bool same = m->identity.incarnation == lease->identity.incarnation;
    if (strcmp(m->identity.endpoint, lease->identity.endpoint) != 0) disconnect(c, m);
    if (!same || !m->registered) {
        c->last_join_ns = moe_controller_now(c);
        moe_info("worker %s has registered: incarnation %016llx at %s", lease->identity.id,
                 (unsigned long long)lease->identity.incarnation, lease->identity.endpoint);
    }
    uint64_t link = m->link, refused_incarnation = m->refused_incarnation;
    int64_t linked_ns = m->linked_ns, gone_ns = m->gone_ns;
    moe_worker_stats *stats = m->stats;
    *m = *lease;
    m->stats = stats;
    m->gone_ns = gone_ns;
    m->link = link;
    m->linked_ns = linked_ns;
    m->refused_incarnation = refused_incarnation;
    m->registered = m->seen = true;
    if (m->model_digest != c->config.model_digest) {
        moe_member_refuse(m, m->identity.incarnation, "it has another revision of the model");
    }
}

static void on_worker_lease(void *ctx, const char *key, const char *value, size_t size) {
    moe_controller *c = ctx;
    const char *id = key + strlen("worker:");
    moe_member lease;
    if (!parse_worker(id, value, size, &lease)) {
        moe_debug("the lease %s is damaged and ignored", key);
        return;
    }
    moe_member *m = moe_controller_member(c, id);
    if (!m) m = insert_member(c, id);
    if (m) update_member(c, m, &lease);
}

void moe_controller_list_workers(moe_controller *c) {
    moe_error err = {0};
    for (int32_t i = 0; i < c->num_members; i++) c->members[i].seen = false;
    moe_status status = moe_controller_store(c)->ops->list(moe_controller_store(c), "worker:", on_worker_lease, c, &err);
    moe_controller_store_answered(c, status, &err);
    if (status) return; /* what was listed before stands */
    for (int32_t i = 0; i < c->num_members; i++) {
        moe_member *m = &c->members[i];
        if (m->registered && !m->seen) moe_warn("worker %s: its lease is gone", m->identity.id);
        m->registered = m->seen;
    }
    moe_controller_sync_members(c);
}

static void connect_member(moe_controller *c, moe_member *m) {
    moe_error err = {0};
    moe_status status = moe_rpc_connect(c->rpc, m->identity.endpoint, &m->link, &err);
    m->linked_ns = moe_controller_now(c);
    if (status == MOE_OK) return;
    m->link = 0;
    if (status != MOE_RESOURCE_EXHAUSTED) moe_member_refuse(m, m->identity.incarnation, err.message);
}

/* A hello may have been refused for a reason that has passed, such as want of memory. */
static void watch_link(moe_controller *c, moe_member *m) {
    if (moe_rpc_peer_of_link(c->rpc, m->link)) {
        m->linked_ns = moe_controller_now(c);
    } else if (moe_controller_now(c) - m->linked_ns >= MOE_RECONNECT_NS) {
        disconnect(c, m);
    }
}

void moe_controller_sync_members(moe_controller *c) {
    for (int32_t w = 0; c->map && w < c->map->num_workers; w++) {
        const moe_placement_worker *worker = &c->map->workers[w];
        moe_member *m = moe_controller_member(c, worker->id);
        if (m || !(m = insert_member(c, worker->id))) continue;
        m->identity = *worker;
        m->model_digest = c->config.model_digest;
    }
    for (int32_t i = c->num_members - 1; i >= 0; i--) {
        moe_member *m = &c->members[i];
        if (m->link) watch_link(c, m);
        bool wanted = m->registered || (c->map && moe_placement_find_worker(c->map, m->identity.id) >= 0);
        if (!wanted) {
            remove_member(c, i);
        } else if (!m->link && !moe_member_refused(m)) {
            connect_member(c, m);
        }
    }
}

/* ---- routers ---- */

static void on_router_lease(void *ctx, const char *key, const char *value, size_t size) {
    moe_controller *c = ctx;
    moe_controller_router_view r = {0};
    char uuid[MOE_UUID_BYTES];
    int64_t epoch, fence, known_fence, routing_epoch;
    json_t *root = size <= MOE_MAX_LEASE_BYTES ? json_loadb(value, size, JSON_REJECT_DUPLICATES, NULL) : NULL;
    bool ok = moe_json_get_text(root, "id", r.id, sizeof r.id) && strcmp(r.id, key + strlen("router:")) == 0 &&
              moe_json_get_hex(root, "incarnation", &r.incarnation) &&
              moe_json_get_text(root, "endpoint", r.endpoint, sizeof r.endpoint) &&
              moe_json_get_text(root, "host", r.host, sizeof r.host) && moe_json_get_count(root, "pid", INT64_MAX, &r.pid) &&
              moe_json_get_count(root, "epoch", MOE_MAX_EPOCH, &epoch) &&
              moe_json_get_count(root, "fence", MOE_MAX_EPOCH, &fence) && moe_json_get_hex(root, "map_digest", &r.map_digest) &&
              moe_json_get_count(root, "known_fence", MOE_MAX_EPOCH, &known_fence) &&
              moe_json_get_count(root, "routing_epoch", MOE_MAX_EPOCH, &routing_epoch) &&
              moe_json_get_text(root, "uuid", uuid, sizeof uuid) && strcmp(uuid, c->cluster_uuid) == 0;
    json_decref(root);
    if (!ok || c->num_routers == MOE_MAX_ROUTERS) return;
    r.epoch = (uint64_t)epoch;
    r.fence = (uint64_t)fence;
    r.routing_epoch = (uint64_t)routing_epoch;
    moe_controller_learn(c, r.epoch, (uint64_t)known_fence);
    if (c->map && r.epoch == c->map->epoch && r.fence == c->map->fence && r.map_digest != c->map_digest) c->map_disputed = true;
    int32_t at = 0;
    while (at < c->num_routers && strverscmp(c->routers[at].id, r.id) < 0) at++;
    memmove(&c->routers[at + 1], &c->routers[at], (size_t)(c->num_routers++ - at) * sizeof *c->routers);
    c->routers[at] = r;
}

static bool is_self(const moe_controller *c, const moe_controller_router_view *r) {
    return strcmp(r->id, c->config.id) == 0 && r->incarnation == c->config.incarnation;
}

/* A router without a map routes nothing. */
static bool routes_by(const moe_controller_router_view *r, uint64_t epoch) { return r->epoch == 0 || r->routing_epoch >= epoch; }

/* Routers that are no longer listed and had not acknowledged our map: they may be dead, or route on without the store. */
static void note_lost_routers(moe_controller *c, const moe_controller_router_view *before, int32_t count) {
    for (int32_t i = 0; c->map && i < count; i++) {
        bool listed = is_self(c, &before[i]) || routes_by(&before[i], c->map->epoch);
        for (int32_t k = 0; k < c->num_routers && !listed; k++)
            listed = strcmp(before[i].id, c->routers[k].id) == 0 && before[i].incarnation == c->routers[k].incarnation;
        if (!listed) c->router_lost_ns = moe_controller_now(c);
    }
}

void moe_controller_list_routers(moe_controller *c) {
    moe_error err = {0};
    moe_controller_router_view *before = moe_calloc(MOE_MAX_ROUTERS, sizeof *before);
    int32_t count = c->num_routers;
    if (!before) return; /* the next listing finds them */
    memcpy(before, c->routers, (size_t)count * sizeof *before);
    c->num_routers = 0;
    c->map_disputed = false;
    moe_status status = moe_controller_store(c)->ops->list(moe_controller_store(c), "router:", on_router_lease, c, &err);
    moe_controller_store_answered(c, status, &err);
    if (status == MOE_OK) {
        note_lost_routers(c, before, count);
    } else {
        memcpy(c->routers, before, (size_t)count * sizeof *before);
        c->num_routers = count;
    }
    moe_free(before);
}

uint64_t moe_controller_routing_epoch(const moe_controller *c) {
    if (c->config.routing_epoch) return c->config.routing_epoch(c->config.ctx);
    return c->map ? c->map->epoch : 0;
}

bool moe_controller_acknowledged(const moe_controller *c) {
    if (!c->map || moe_controller_routing_epoch(c) < c->map->epoch) return false;
    if (c->router_lost_ns != INT64_MIN && moe_controller_now(c) - c->router_lost_ns < MOE_ROUTER_GRACE_NS) return false;
    for (int32_t i = 0; i < c->num_routers; i++)
        if (!is_self(c, &c->routers[i]) && !routes_by(&c->routers[i], c->map->epoch)) return false;
    return true;
}
