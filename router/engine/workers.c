/* The workers that the placement maps name: connections, incarnations, suspicion. */
#include <string.h>

#include "common/alloc.h"
#include "common/elements.h"
#include "common/log.h"
#include "common/metrics.h"
#include "router/engine/internal.h"

static int32_t worker_of_link(const moe_engine *e, const channel *c, uint64_t link) {
    for (int32_t i = 0; i < e->num_workers; i++)
        if (e->workers[i].in_use && &e->channels[e->workers[i].transport] == c && e->workers[i].link == link) return i;
    return -1;
}

static void topology_changed(moe_engine *e) {
    e->topology_version++;
    e->view_dirty = true;
}

moe_status workers_on_peer_up(void *ctx, const moe_rpc_peer *peer, moe_error *err) {
    channel *c = ctx;
    moe_engine *e = c->engine;
    int32_t i = worker_of_link(e, c, peer->link);
    if (i < 0) return moe_fail(err, MOE_FAILED_PRECONDITION, "the router's engine takes no calls");
    engine_worker *w = &e->workers[i];
    if (strcmp(peer->cluster_uuid, e->config.cluster_uuid) != 0)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s at %s belongs to cluster %s, this router to %s", peer->id,
                        w->endpoint, peer->cluster_uuid, e->config.cluster_uuid);
    if (peer->model_digest != e->config.model->digest)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s at %s has another model revision (%016llx, here %016llx)",
                        peer->id, w->endpoint, (unsigned long long)peer->model_digest,
                        (unsigned long long)e->config.model->digest);
    const char *own = e->config.backend->ops->profile(e->config.backend);
    if (!moe_profiles_share_dtype(peer->profile, own))
        return moe_fail(err, MOE_FAILED_PRECONDITION, "worker %s computes as %s, this router as %s; give both the same --dtype",
                        peer->id, peer->profile, own);
    w->up = true;
    w->suspect = false;
    w->owed_ns = w->late_until_ns = 0;
    w->peer = peer->peer;
    w->incarnation = peer->incarnation;
    moe_info("worker %s is up at %s", peer->id, w->endpoint);
    topology_changed(e);
    return MOE_OK;
}

static void note_trouble(moe_engine *e, engine_worker *w) {
    int64_t now = engine_now(e);
    if (!w->id[0] || !moe_quarantine_trouble(&e->quarantine, w->id, now)) return;
    w->quarantined = true;
    moe_metric_add(MOE_METRIC_QUARANTINES, 1);
    moe_warn("worker %s went away or stalled %d times within %lld s: it is quarantined for %lld s", w->id, MOE_FLAP_LIMIT,
             (long long)(MOE_FLAP_WINDOW_NS / MOE_NS_PER_S),
             (long long)((moe_quarantine_until_ns(&e->quarantine, w->id) - now) / MOE_NS_PER_S));
}

void workers_on_peer_down(void *ctx, const moe_rpc_peer *peer) {
    channel *c = ctx;
    int32_t i = worker_of_link(c->engine, c, peer->link);
    if (i < 0) return;
    engine_worker *w = &c->engine->workers[i];
    if (w->up) {
        moe_warn("worker %s at %s went away", w->id, w->endpoint);
        note_trouble(c->engine, w);
    }
    w->up = w->suspect = false;
    topology_changed(c->engine);
}

const moe_rpc_peer *workers_peer(const moe_engine *e, int32_t worker) {
    const engine_worker *w = &e->workers[worker];
    return w->up ? moe_rpc_peer_of(e->channels[w->transport].rpc, w->peer) : NULL;
}

static int64_t progress_at(const moe_engine *e, int32_t worker) {
    const moe_rpc_peer *peer = workers_peer(e, worker);
    return peer ? peer->progress_at_ns : 0;
}

void workers_note_call(moe_engine *e, int32_t worker) {
    engine_worker *w = &e->workers[worker];
    int64_t now = engine_now(e);
    if (now - w->owed_ns > MOE_OWING_GAP_NS || progress_at(e, worker) >= w->owing_ns) w->owing_ns = now;
}

int64_t workers_silent_since(moe_engine *e, int32_t worker, int64_t sent_ns) {
    engine_worker *w = &e->workers[worker];
    int64_t first = w->owing_ns < sent_ns ? w->owing_ns : sent_ns, sign = progress_at(e, worker);
    w->owed_ns = engine_now(e);
    return sign > first ? sign : first;
}

void workers_note_late(moe_engine *e, int32_t worker, int64_t sent_ns) {
    if (progress_at(e, worker) <= sent_ns) e->workers[worker].late_until_ns = engine_now(e) + MOE_LATE_HOLD_NS;
}

static bool advanced_since_suspected(const moe_engine *e, int32_t worker) {
    const moe_rpc_peer *peer = workers_peer(e, worker);
    return peer && peer->progress_at_ns > e->workers[worker].suspected_ns;
}

void workers_suspect(moe_engine *e, int32_t worker) {
    engine_worker *w = &e->workers[worker];
    if (w->suspect) return;
    bool no_better = w->hold_ns && !advanced_since_suspected(e, worker);
    w->hold_ns = !no_better                                 ? MOE_SUSPECT_HOLD_NS
                 : 2 * w->hold_ns < MOE_SUSPECT_HOLD_MAX_NS ? 2 * w->hold_ns
                                                            : MOE_SUSPECT_HOLD_MAX_NS;
    w->suspect = true;
    w->suspected_ns = engine_now(e);
    moe_metric_add(MOE_METRIC_PEERS_SUSPECTED, 1);
    moe_warn("worker %s at %s makes no progress; its work goes to other replicas", w->id, w->endpoint);
    note_trouble(e, w);
    topology_changed(e);
}

void workers_forgive(moe_engine *e, int64_t now) {
    for (int32_t i = 0; i < e->num_workers; i++) {
        engine_worker *w = &e->workers[i];
        if (w->quarantined && now >= moe_quarantine_until_ns(&e->quarantine, w->id)) {
            w->quarantined = false;
            moe_info("worker %s is out of quarantine", w->id);
            topology_changed(e);
        }
        if (!w->suspect || (!advanced_since_suspected(e, i) && now - w->suspected_ns < w->hold_ns)) continue;
        w->suspect = false;
        moe_info("worker %s at %s is given work again", w->id, w->endpoint);
        topology_changed(e);
    }
}

/* The entry for an endpoint, connected; -1 where no transport reaches it or the table is full. */
static int32_t worker_connect(moe_engine *e, const moe_placement_worker *pw) {
    int32_t slot = -1;
    for (int32_t i = 0; i < e->num_workers; i++) {
        if (e->workers[i].in_use && strcmp(e->workers[i].endpoint, pw->endpoint) == 0) return i;
        if (!e->workers[i].in_use && slot < 0) slot = i;
    }
    if (slot < 0 && e->num_workers < MOE_PLACEMENT_MAX_WORKERS) slot = e->num_workers;
    if (slot < 0) return -1;
    for (int32_t t = 0; t < e->config.num_transports; t++) {
        moe_transport *transport = e->channels[t].transport;
        if (!transport->ops->can_reach(transport, pw->endpoint)) continue;
        engine_worker w = {.transport = t, .in_use = true};
        moe_error err;
        if (moe_rpc_connect(e->channels[t].rpc, pw->endpoint, &w.link, &err) != MOE_OK) {
            moe_warn("cannot connect to worker %s: %s", pw->id, err.message);
            return -1;
        }
        memcpy(w.endpoint, pw->endpoint, sizeof w.endpoint);
        e->workers[slot] = w;
        if (slot == e->num_workers) e->num_workers++;
        return slot;
    }
    moe_warn("no transport reaches worker %s at %s", pw->id, pw->endpoint);
    return -1;
}

placed_map *placed_map_ref(placed_map *map) {
    map->references++;
    return map;
}

static bool map_names(const placed_map *map, int32_t worker) {
    if (!map) return false;
    for (int32_t i = 0; i < map->placement->num_workers; i++)
        if (map->worker[i] == worker) return true;
    return false;
}

/* Disconnects workers that neither the newest map nor a micro-batch's map names. */
static void note_routing_epoch(moe_engine *e) {
    uint64_t oldest = e->map ? e->map->placement->epoch : 0;
    for (int32_t b = 0; b < e->config.micro_batches; b++)
        if (e->batches[b].map && e->batches[b].map->placement->epoch < oldest) oldest = e->batches[b].map->placement->epoch;
    atomic_store(&e->routing_epoch, oldest);
}

uint64_t moe_engine_routing_epoch(const moe_engine *e) { return atomic_load(&e->routing_epoch); }

static void workers_retire(moe_engine *e) {
    for (int32_t w = 0; w < e->num_workers; w++) {
        bool named = map_names(e->map, w);
        for (int32_t b = 0; b < e->config.micro_batches; b++) named = named || map_names(e->batches[b].map, w);
        if (named || !e->workers[w].in_use) continue;
        moe_rpc_disconnect(e->channels[e->workers[w].transport].rpc, e->workers[w].link);
        e->workers[w] = (engine_worker){0};
        e->worker_loads[w] = 0;
    }
}

void placed_map_unref(moe_engine *e, placed_map **map) {
    placed_map *m = *map;
    *map = NULL;
    if (!m || --m->references > 0) return;
    moe_placement_unref(&m->placement);
    moe_free(m->worker);
    moe_free(m);
    workers_retire(e);
    note_routing_epoch(e);
}

void workers_adopt(moe_engine *e, moe_placement *placement) {
    const moe_placement *old = e->map ? e->map->placement : NULL;
    /* The same epoch and fence again: the controller let a worker rejoin on its own while the store was down. */
    bool newer = !old || placement->epoch > old->epoch ||
                 (placement->epoch == old->epoch && placement->fence >= old->fence && placement != old);
    placed_map *map = newer ? moe_calloc(1, sizeof *map) : NULL;
    if (map) map->worker = moe_calloc((size_t)placement->num_workers, sizeof *map->worker);
    if (!map || !map->worker) {
        moe_free(map);
        moe_placement_unref(&placement);
        return; /* an older map, or no memory: the next poll of the controller brings it again */
    }
    map->references = 1;
    map->placement = placement;
    map->cost = moe_placement_unit_cost(placement);
    for (int32_t i = 0; i < placement->num_workers; i++) {
        map->worker[i] = worker_connect(e, &placement->workers[i]);
        if (map->worker[i] < 0) continue;
        engine_worker *w = &e->workers[map->worker[i]];
        memcpy(w->id, placement->workers[i].id, MOE_WORKER_ID_BYTES);
        w->quarantined = moe_quarantine_until_ns(&e->quarantine, w->id) > engine_now(e);
    }
    placed_map *previous = e->map;
    e->map = map;
    placed_map_unref(e, &previous);
    note_routing_epoch(e);
    moe_info("placement map of epoch %llu: %d workers", (unsigned long long)placement->epoch, placement->num_workers);
    moe_metric_set(MOE_METRIC_EPOCH, (int64_t)placement->epoch);
    for (int32_t i = 0; i < e->config.num_transports; i++)
        moe_rpc_set_known(e->channels[i].rpc, placement->epoch, placement->fence);
    topology_changed(e);
}

bool workers_up(const moe_engine *e, const placed_map *map, int32_t placed) {
    if (map->worker[placed] < 0) return false;
    const engine_worker *w = &e->workers[map->worker[placed]];
    return w->up && w->incarnation == map->placement->workers[placed].incarnation;
}

/* The transport tells: inproc is this process, shm and ipc this host. */
moe_plan_distance workers_distance(const moe_engine *e, const placed_map *map, int32_t placed) {
    if (map->worker[placed] < 0) return MOE_PLAN_OTHER_HOST;
    const char *endpoint = e->workers[map->worker[placed]].endpoint;
    return strncmp(endpoint, "inproc:", 7) == 0 ? MOE_PLAN_SAME_PROCESS
           : strncmp(endpoint, "shm:", 4) == 0 || strncmp(endpoint, "ipc:", 4) == 0 ? MOE_PLAN_SAME_HOST
                                                                                    : MOE_PLAN_OTHER_HOST;
}

moe_plan_fitness workers_fitness(const moe_engine *e, const placed_map *map, int32_t placed) {
    if (!workers_up(e, map, placed)) return MOE_PLAN_UNFIT;
    const engine_worker *w = &e->workers[map->worker[placed]];
    bool late = w->late_until_ns && engine_now(e) < w->late_until_ns;
    return w->suspect ? MOE_PLAN_LAST_RESORT : w->quarantined || late ? MOE_PLAN_RESERVE : MOE_PLAN_FIT;
}
