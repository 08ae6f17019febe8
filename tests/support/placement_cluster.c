#include "tests/support/placement_cluster.h"

#include <stdio.h>
#include <string.h>

#include "common/random.h"
#include "tests/support/test.h"

#define OK(call) assert_int_equal((call), MOE_OK)

void pc_open(pc_cluster *c, int32_t replicas, int32_t initial_workers) {
    moe_clock fake = moe_clock_fake(1000 * MOE_NS_PER_S);
    pc_open_on(c, &fake, replicas, initial_workers);
}

void pc_open_on(pc_cluster *c, const moe_clock *clock, int32_t replicas, int32_t initial_workers) {
    memset(c, 0, sizeof *c);
    c->clock = *clock;
    c->replicas = replicas;
    c->initial_workers = initial_workers;
    c->uuid = "cluster-under-test";
    c->next_incarnation = 100;
    moe_error err;
    OK(moe_memory_hub_new(&c->clock, &c->store_hub, &err));
    OK(moe_inproc_hub_new(&c->clock, 1, &c->hub, &err));
    OK(moe_memory_open(c->store_hub, &c->store, &err));
    for (int32_t w = 0; w < PC_MAX_WORKERS; w++) {
        c->workers[w].model_digest = PC_MODEL;
        c->workers[w].profile = "ref";
    }
}

void pc_close(pc_cluster *c) {
    for (int32_t r = 0; r < PC_MAX_ROUTERS; r++) pc_router_crash(c, r);
    for (int32_t w = 0; w < PC_MAX_WORKERS; w++) pc_worker_crash(c, w);
    c->store->ops->close(c->store);
    moe_inproc_hub_free(&c->hub);
    moe_memory_hub_free(&c->store_hub);
}

/* ---- routers ---- */

static uint64_t hash_of(const moe_placement *p) {
    uint64_t hash = 0;
    for (int32_t w = 0; w < p->num_workers; w++) {
        for (const char *s = p->workers[w].id; *s; s++) hash = moe_mix64(hash ^ (uint64_t)*s);
        hash = moe_mix64(hash ^ p->workers[w].incarnation);
    }
    for (int32_t i = 0; i < p->num_layers * p->num_experts; i++) {
        const moe_placement_entry *e = &p->entries[i];
        hash = moe_mix64(hash ^ e->digest);
        for (int32_t r = 0; r < e->num_replicas; r++) hash = moe_mix64(hash ^ e->replicas[r].worker);
    }
    return hash;
}

static const pc_worker *running(const pc_cluster *c, const moe_placement_worker *worker) {
    for (int32_t w = 0; w < PC_MAX_WORKERS; w++) {
        const pc_worker *candidate = &c->workers[w];
        if (candidate->alive && strcmp(candidate->id, worker->id) == 0) {
            return candidate->incarnation == worker->incarnation ? candidate : NULL;
        }
    }
    return NULL;
}

/* Each expert has a READY replica on a worker that lives, and whoever lives holds what the map says. */
static void check_moving_map(const pc_cluster *c, const moe_placement *p) {
    for (int32_t i = 0; i < PC_LAYERS * PC_EXPERTS; i++) {
        const moe_placement_entry *e = &p->entries[i];
        int32_t live = 0;
        for (int32_t r = 0; r < e->num_replicas; r++) {
            const pc_worker *w = running(c, &p->workers[e->replicas[r].worker]);
            if (!w) continue;
            assert_true(w->held[i]);
            live += e->replicas[r].state == MOE_REPLICA_READY;
        }
        assert_true(live > 0);
        assert_true(e->digest == moe_mix64((uint64_t)i + 1));
    }
}

static void check_map(const pc_cluster *c, const moe_placement *p) {
    assert_true(p->num_layers == PC_LAYERS && p->num_experts == PC_EXPERTS && p->model_digest == PC_MODEL);
    if (c->moving) return; /* checked when it is published */
    for (int32_t i = 0; i < PC_LAYERS * PC_EXPERTS; i++) {
        const moe_placement_entry *e = &p->entries[i];
        assert_int_equal(e->num_replicas, c->replicas);
        assert_true(e->digest == moe_mix64((uint64_t)i + 1)); /* never of a worker whose weights differ */
        for (int32_t r = 0; r < e->num_replicas; r++) {
            assert_true(e->replicas[r].worker < p->num_workers);
            assert_int_equal(e->replicas[r].state, MOE_REPLICA_READY);
            for (int32_t q = 0; q < r; q++) assert_int_not_equal(e->replicas[q].worker, e->replicas[r].worker);
        }
    }
}

/* The epoch never falls for any observer, and two observers of one epoch and fence see one map, but for what rejoined without
 * the store: that is between them and their control connections. (Where the store loses all and the routers that knew are dead,
 * those that start again from disk may meet with two histories; then it is enough that they agree in the end.) */
static void on_map(void *ctx, moe_placement *map) {
    pc_router *r = ctx;
    pc_cluster *c = r->cluster;
    assert_true(map->epoch > r->epoch || (map->epoch == r->epoch && map->fence >= r->fence));
    check_map(c, map);
    if (c->moving && map->epoch > c->newest_epoch) { /* the first to see it has just published it */
        check_moving_map(c, map);
        c->newest_epoch = map->epoch;
    }
    r->given_ns = c->clock.fake_now_ns;
    bool rejoin = r->map && map->epoch == r->epoch && map->fence == r->fence;
    if (!rejoin) r->published_hash = hash_of(map);
    r->epoch = map->epoch;
    r->fence = map->fence;
    r->num_maps++;
    moe_placement_unref(&r->map);
    r->map = moe_placement_ref(map);
    for (int32_t i = 0; i < PC_MAX_ROUTERS; i++) {
        const pc_router *other = &c->routers[i];
        if (!c->may_lose_history && other->map && other->epoch == r->epoch && other->fence == r->fence) {
            assert_true(other->published_hash == r->published_hash);
        }
    }
}

static uint64_t routing_epoch(void *ctx) {
    const pc_router *r = ctx;
    return r->routed ? r->routed->epoch : 0;
}

static void route(pc_cluster *c, pc_router *r) {
    if (!r->map || r->routed == r->map || (r->routed && c->clock.fake_now_ns - r->given_ns < r->lag_ns)) return;
    moe_placement_unref(&r->routed);
    r->routed = moe_placement_ref(r->map);
}

void pc_router_config(pc_cluster *c, int32_t r, moe_controller_config *out) {
    static const char *const ids[PC_MAX_ROUTERS] = {"r0", "r1", "r2", "r3"};
    pc_router *router = &c->routers[r];
    moe_error err;
    router->cluster = c;
    router->epoch = router->fence = 0;
    OK(moe_memory_open(c->store_hub, &router->store, &err));
    OK(moe_inproc_open(c->hub, &router->transport, &err));
    *out = (moe_controller_config){.store = router->store,
                                   .transport = router->transport,
                                   .clock = &c->clock,
                                   .cluster_uuid = c->uuid,
                                   .id = ids[r],
                                   .endpoint = "",
                                   .host = "here",
                                   .incarnation = ++c->next_incarnation,
                                   .pid = 7,
                                   .model_digest = PC_MODEL,
                                   .num_moe_layers = PC_LAYERS,
                                   .num_experts = PC_EXPERTS,
                                   .replicas = c->replicas,
                                   .initial_workers = c->initial_workers,
                                   .new_cluster = c->new_cluster,
                                   .layout = MOE_PLACEMENT_BALANCED,
                                   .expert_digests = c->expert_digests,
                                   .state_dir = c->state_dirs[r],
                                   .balance = c->balance,
                                   .routing_epoch = c->moving ? routing_epoch : NULL,
                                   .on_map = on_map,
                                   .ctx = router};
}

void pc_router_start(pc_cluster *c, int32_t r) {
    moe_controller_config config;
    moe_error err;
    pc_router_config(c, r, &config);
    OK(moe_controller_new(&config, &c->routers[r].controller, &err));
}

void pc_router_crash(pc_cluster *c, int32_t r) {
    pc_router *router = &c->routers[r];
    if (!router->store) return;
    moe_controller_free(&router->controller);
    router->transport->ops->close(router->transport);
    router->store->ops->close(router->store);
    router->store = NULL;
    moe_placement_unref(&router->map);
    moe_placement_unref(&router->routed);
}

static moe_status no_get(moe_store *s, const char *key, moe_buf *value, bool *found, moe_error *err) {
    (void)s, (void)key, (void)value, (void)found;
    return moe_fail(err, MOE_UNAVAILABLE, "cut off");
}

/* A controller asks for nothing more while meta cannot be read. */
void pc_router_cut_off(pc_cluster *c, int32_t r, bool cut_off) {
    static moe_store_ops cut;
    cut = *c->store->ops;
    cut.get = no_get;
    c->routers[r].store->ops = cut_off ? &cut : c->store->ops;
    c->routers[r].cut_off = cut_off;
}

/* ---- workers ---- */

static void answer(pc_worker *w, moe_rpc_call *call, const int32_t *experts, int32_t count) {
    Moesaic__V1__LoadedExpert loaded[64], *pointers[64];
    Moesaic__V1__ExpertId ids[64];
    Moesaic__V1__LoadResponse response = MOESAIC__V1__LOAD_RESPONSE__INIT;
    for (int32_t i = 0; i < count; i++) {
        moesaic__v1__expert_id__init(&ids[i]);
        moesaic__v1__loaded_expert__init(&loaded[i]);
        ids[i].layer = (uint32_t)(experts[i] / PC_EXPERTS);
        ids[i].expert = (uint32_t)(experts[i] % PC_EXPERTS);
        loaded[i].id = &ids[i];
        loaded[i].digest = moe_mix64((uint64_t)experts[i] + 1) ^ w->digest_salt;
        pointers[i] = &loaded[i];
        if (!w->held[experts[i]]) w->holdings++, w->rows[experts[i]] = w->calls[experts[i]] = 0;
        w->held[experts[i]] = true;
    }
    response.loaded = pointers;
    response.n_loaded = (size_t)count;
    response.incarnation = w->incarnation;
    response.fence = w->fence;
    moe_rpc_respond(call, &response.base, NULL, 0);
}

static void on_load(void *ctx, moe_rpc_call *call, const ProtobufCMessage *message, const moe_frame *payload, int num_payload) {
    (void)payload;
    (void)num_payload;
    pc_worker *w = ctx;
    const Moesaic__V1__LoadRequest *request = (const Moesaic__V1__LoadRequest *)message;
    Moesaic__V1__LoadResponse refusal = MOESAIC__V1__LOAD_RESPONSE__INIT;
    int32_t experts[64], count = (int32_t)request->n_experts;
    w->loads++;
    refusal.fence = w->fence;
    if (request->incarnation != w->incarnation) {
        moe_rpc_fail(call, MOE_UNAVAILABLE, "another incarnation", NULL);
    } else if (request->fence < w->fence) {
        moe_rpc_fail(call, MOE_FAILED_PRECONDITION, "a lower fence", &refusal.base);
    } else if (w->fails) {
        moe_rpc_fail(call, MOE_RESOURCE_EXHAUSTED, "no memory", NULL);
    } else {
        w->fence = request->fence;
        assert_true(count <= 64);
        for (int32_t i = 0; i < count; i++)
            experts[i] = (int32_t)(request->experts[i]->layer * PC_EXPERTS + request->experts[i]->expert);
        if (!w->stalls) {
            answer(w, call, experts, count);
        } else {
            assert_true(w->num_waiting < 8);
            w->waiting[w->num_waiting].call = call;
            w->waiting[w->num_waiting].count = count;
            memcpy(w->waiting[w->num_waiting++].experts, experts, sizeof experts);
        }
    }
}

static void on_stats(void *ctx, moe_rpc_call *call, const ProtobufCMessage *message, const moe_frame *payload, int num_payload) {
    (void)payload;
    (void)num_payload;
    enum { ALL = PC_LAYERS * PC_EXPERTS };
    pc_worker *w = ctx;
    Moesaic__V1__LoadedExpert loaded[ALL], *pointers[ALL];
    Moesaic__V1__ExpertId ids[ALL];
    uint64_t rows[ALL], calls[ALL];
    Moesaic__V1__StatsResponse response = MOESAIC__V1__STATS_RESPONSE__INIT;
    size_t count = 0;
    for (int32_t i = 0; i < ALL; i++) {
        if (!w->held[i]) continue;
        moesaic__v1__expert_id__init(&ids[count]);
        moesaic__v1__loaded_expert__init(&loaded[count]);
        ids[count].layer = (uint32_t)(i / PC_EXPERTS);
        ids[count].expert = (uint32_t)(i % PC_EXPERTS);
        loaded[count].id = &ids[count];
        pointers[count] = &loaded[count];
        rows[count] = w->rows[i];
        calls[count++] = w->calls[i];
    }
    response.incarnation = w->incarnation;
    response.holdings = w->holdings;
    response.leaving = w->leaving;
    response.map_epoch = w->map_epoch;
    response.map_fence = w->map_fence;
    response.loaded = pointers;
    response.n_loaded = ((const Moesaic__V1__StatsRequest *)message)->known_holdings == w->holdings ? 0 : count;
    response.loaded_rows = rows;
    response.loaded_calls = calls;
    response.n_loaded_rows = response.n_loaded_calls = count;
    moe_rpc_respond(call, &response.base, NULL, 0);
}

static void on_set_map(void *ctx, moe_rpc_call *call, const ProtobufCMessage *message, const moe_frame *payload, int num_payload) {
    pc_worker *w = ctx;
    const Moesaic__V1__SetMapRequest *request = (const Moesaic__V1__SetMapRequest *)message;
    const Moesaic__V1__SetMapResponse response = MOESAIC__V1__SET_MAP_RESPONSE__INIT;
    assert_int_equal(num_payload, 1);
    if (request->fence < w->fence) {
        moe_rpc_fail(call, MOE_FAILED_PRECONDITION, "a lower fence", NULL);
        return;
    }
    w->fence = request->fence;
    w->map_epoch = request->map_epoch;
    w->map_fence = request->map_fence;
    moe_buf_clear(&w->map);
    moe_buf_append(&w->map, payload[0].data, payload[0].size);
    moe_rpc_respond(call, &response.base, NULL, 0);
}

static void on_get_map(void *ctx, moe_rpc_call *call, const ProtobufCMessage *message, const moe_frame *payload, int num_payload) {
    (void)message;
    (void)payload;
    (void)num_payload;
    const pc_worker *w = ctx;
    const moe_frame frame = {w->map.data, w->map.size};
    Moesaic__V1__GetMapResponse response = MOESAIC__V1__GET_MAP_RESPONSE__INIT;
    response.map_epoch = w->map_epoch;
    response.map_fence = w->map_fence;
    moe_rpc_respond(call, &response.base, &frame, w->map.size ? 1 : 0);
}

/* Oracle: what is dropped is elsewhere in the map that the worker keeps, so that it can say where. */
static void check_informed(const pc_worker *w, int32_t expert) {
    moe_placement *map = NULL;
    moe_error err;
    OK(moe_placement_from_json(moe_buf_text(&w->map), w->map.size, &map, &err));
    int32_t worker = moe_placement_find_worker(map, w->id);
    assert_true(map->epoch == w->map_epoch && map->fence == w->map_fence);
    assert_true(map->entries[expert].num_replicas > 0 && (worker < 0 || !moe_placement_has(&map->entries[expert], worker)));
    moe_placement_unref(&map);
}

/* Oracle: nothing is dropped that a live router may still ask for. One that is cut off from the store is not waited for: the
 * worker tells it (check_informed). */
static void check_drop(const pc_worker *w, int32_t expert) {
    for (int32_t r = 0; r < PC_MAX_ROUTERS; r++) {
        const pc_router *router = &w->cluster->routers[r];
        if (!router->controller || !router->routed || router->cut_off) continue;
        int32_t worker = moe_placement_find_worker(router->routed, w->id);
        bool routed = worker >= 0 && router->routed->workers[worker].incarnation == w->incarnation &&
                      moe_placement_has(&router->routed->entries[expert], worker);
        if (routed) fail_msg("expert %d is dropped by %s, router %d routes there", expert, w->id, r);
    }
}

static void on_drop(void *ctx, moe_rpc_call *call, const ProtobufCMessage *message, const moe_frame *payload, int num_payload) {
    (void)payload;
    (void)num_payload;
    pc_worker *w = ctx;
    const Moesaic__V1__DropRequest *request = (const Moesaic__V1__DropRequest *)message;
    Moesaic__V1__DropResponse response = MOESAIC__V1__DROP_RESPONSE__INIT;
    w->drops++;
    if (request->incarnation != w->incarnation || request->fence < w->fence) {
        moe_rpc_fail(call, MOE_FAILED_PRECONDITION, "another incarnation or a lower fence", NULL);
        return;
    }
    w->fence = request->fence;
    for (size_t i = 0; i < request->n_experts; i++) {
        int32_t expert = (int32_t)(request->experts[i]->layer * PC_EXPERTS + request->experts[i]->expert);
        check_drop(w, expert);
        check_informed(w, expert);
        if (w->held[expert]) w->holdings++;
        w->held[expert] = false;
    }
    moe_rpc_respond(call, &response.base, NULL, 0);
}

void pc_worker_release(pc_cluster *c, int32_t i) {
    pc_worker *w = &c->workers[i];
    for (int32_t n = 0; n < w->num_waiting; n++) answer(w, w->waiting[n].call, w->waiting[n].experts, w->waiting[n].count);
    w->num_waiting = 0;
    w->stalls = false;
}

void pc_worker_start(pc_cluster *c, int32_t i) {
    static const moe_rpc_method methods[] = {
        {.method = "/moesaic.v1.WorkerService/Load", .handler = on_load, .roles = 1u << MOE_ROLE_ROUTER}, {0}};
    static const moe_rpc_method moving_methods[] = {
        {.method = "/moesaic.v1.WorkerService/Load", .handler = on_load, .roles = 1u << MOE_ROLE_ROUTER},
        {.method = "/moesaic.v1.WorkerService/Stats", .handler = on_stats, .roles = 1u << MOE_ROLE_ROUTER},
        {.method = "/moesaic.v1.WorkerService/Drop", .handler = on_drop, .roles = 1u << MOE_ROLE_ROUTER},
        {.method = "/moesaic.v1.WorkerService/SetMap", .handler = on_set_map, .roles = 1u << MOE_ROLE_ROUTER},
        {.method = "/moesaic.v1.WorkerService/GetMap", .handler = on_get_map, .roles = 1u << MOE_ROLE_ROUTER},
        {0}};
    pc_worker *w = &c->workers[i];
    char endpoint[MOE_ENDPOINT_BYTES], bound[MOE_ENDPOINT_BYTES];
    moe_error err;
    assert_false(w->alive);
    w->cluster = c;
    w->alive = true;
    w->loads = w->drops = 0;
    w->holdings = 1;
    w->leaving = false;
    w->map_epoch = w->map_fence = 0;
    w->fence = w->first_fence;
    memset(w->held, 0, sizeof w->held);
    snprintf(w->id, sizeof w->id, "w%d", i);
    snprintf(endpoint, sizeof endpoint, "inproc:w%d", i);
    w->incarnation = ++c->next_incarnation;
    OK(moe_memory_open(c->store_hub, &w->store, &err));
    OK(moe_inproc_open(c->hub, &w->transport, &err));
    OK(w->transport->ops->listen(w->transport, endpoint, bound, &err));
    moe_rpc_config rpc = {.transport = w->transport,
                          .clock = &c->clock,
                          .hello = {.cluster_uuid = c->uuid,
                                    .role = "worker",
                                    .id = w->id,
                                    .profile = w->profile,
                                    .incarnation = w->incarnation,
                                    .model_digest = w->model_digest},
                          .methods = c->moving ? moving_methods : methods,
                          .ctx = w};
    OK(moe_rpc_new(&rpc, &w->rpc, &err));
    moe_registration_config registration = {.store = w->store,
                                            .clock = &c->clock,
                                            .id = w->id,
                                            .endpoint = bound,
                                            .public_key = "",
                                            .host = "here",
                                            .profile = w->profile,
                                            .incarnation = w->incarnation,
                                            .model_digest = w->model_digest,
                                            .pid = 1000 + i,
                                            .capacity_experts = w->capacity_experts};
    OK(moe_registration_new(&registration, &w->registration, &err));
}

void pc_worker_crash(pc_cluster *c, int32_t i) {
    pc_worker *w = &c->workers[i];
    if (!w->alive) return;
    for (int32_t n = 0; n < w->num_waiting; n++) moe_rpc_fail(w->waiting[n].call, MOE_UNAVAILABLE, "stops", NULL);
    w->num_waiting = 0;
    moe_registration_free(&w->registration);
    moe_rpc_free(&w->rpc);
    moe_buf_free(&w->map);
    w->transport->ops->close(w->transport);
    w->store->ops->close(w->store);
    w->alive = false;
}

/* ---- time ---- */

/* Running out of memory is survived; only the tests that bring it about see it. */
static void check_step(moe_status status) { assert_true(status == MOE_OK || status == MOE_RESOURCE_EXHAUSTED); }

void pc_step(pc_cluster *c) {
    moe_error err;
    c->clock.fake_now_ns += PC_STEP_NS;
    for (int32_t w = 0; w < PC_MAX_WORKERS; w++) {
        if (!c->workers[w].alive) continue;
        moe_registration_step(c->workers[w].registration, &err);
        check_step(moe_rpc_step(c->workers[w].rpc, 0, &err));
    }
    for (int32_t r = 0; r < PC_MAX_ROUTERS; r++) {
        if (!c->routers[r].controller) continue;
        route(c, &c->routers[r]);
        check_step(moe_controller_step(c->routers[r].controller, 0, &err));
    }
}

void pc_run_ms(pc_cluster *c, int64_t ms) {
    for (int64_t end = c->clock.fake_now_ns + ms * MOE_NS_PER_MS; c->clock.fake_now_ns < end;) pc_step(c);
}

void pc_run_until(pc_cluster *c, bool (*done)(pc_cluster *c), int64_t max_ms) {
    int64_t end = c->clock.fake_now_ns + max_ms * MOE_NS_PER_MS;
    while (!done(c)) {
        if (c->clock.fake_now_ns >= end) {
            const moe_controller_view *v = pc_view(c, 0);
            print_message("router 0: epoch %d, store %d, leads %d, waits for: %s\n", (int)v->epoch, v->store_up, v->leading,
                          v->waiting_for);
            for (int32_t i = 0; i < v->num_workers; i++)
                print_message("  %s: %s, %d experts\n", v->workers[i].id, moe_worker_state_name(v->workers[i].state),
                              v->workers[i].experts);
            fail_msg("not done after %d ms", (int)max_ms);
        }
        pc_step(c);
    }
}

const moe_controller_view *pc_view(pc_cluster *c, int32_t r) {
    if (c->routers[r].controller) moe_controller_get_view(c->routers[r].controller, &c->view);
    return &c->view;
}

moe_worker_state pc_state(pc_cluster *c, int32_t r, const char *id) {
    const moe_controller_view *v = pc_view(c, r);
    for (int32_t i = 0; i < v->num_workers; i++) {
        if (strcmp(v->workers[i].id, id) == 0) return v->workers[i].state;
    }
    fail_msg("no worker %s in the view of router %d", id, r);
    return MOE_WORKER_DOWN;
}

static bool holds_share(const pc_cluster *c, const moe_placement *map) {
    for (int32_t w = 0; w < map->num_workers; w++) {
        const pc_worker *worker = running(c, &map->workers[w]);
        if (!worker) return false;
        for (int32_t i = 0; i < PC_LAYERS * PC_EXPERTS; i++) {
            if (moe_placement_has(&map->entries[i], w) && !worker->held[i]) return false;
        }
    }
    return true;
}

bool pc_settled(pc_cluster *c) {
    const moe_placement *first = NULL;
    for (int32_t r = 0; r < PC_MAX_ROUTERS; r++) {
        if (!c->routers[r].controller) continue;
        const moe_placement *map = c->routers[r].map;
        if (!map || (first && hash_of(map) != hash_of(first)) || !holds_share(c, map)) return false;
        if (!pc_view(c, r)->complete) return false;
        first = map;
    }
    return first != NULL;
}

bool pc_tidy(pc_cluster *c) {
    if (!pc_settled(c)) return false;
    int32_t leader = pc_leader(c);
    if (leader < 0 || pc_view(c, leader)->migration[0]) return false;
    const moe_placement *map = c->routers[leader].map;
    for (int32_t i = 0; i < PC_MAX_WORKERS; i++) {
        const pc_worker *w = &c->workers[i];
        int32_t worker = w->alive ? moe_placement_find_worker(map, w->id) : -1;
        for (int32_t e = 0; w->alive && e < PC_LAYERS * PC_EXPERTS; e++)
            if (w->held[e] && (worker < 0 || !moe_placement_has(&map->entries[e], worker))) return false;
    }
    return true;
}

int32_t pc_leader(pc_cluster *c) {
    for (int32_t r = 0; r < PC_MAX_ROUTERS; r++)
        if (c->routers[r].controller && pc_view(c, r)->leading) return r;
    return -1;
}

void pc_compute(pc_cluster *c, int32_t expert, uint64_t rows, uint64_t calls) {
    int32_t leader = pc_leader(c);
    const moe_placement *map = leader < 0 ? NULL : c->routers[leader].map;
    int32_t replicas = map ? map->entries[expert].num_replicas : 0;
    for (int32_t r = 0; r < replicas; r++) {
        for (int32_t i = 0; i < PC_MAX_WORKERS; i++) {
            pc_worker *w = &c->workers[i];
            if (!w->alive || strcmp(w->id, map->workers[map->entries[expert].replicas[r].worker].id) != 0) continue;
            w->rows[expert] += rows / (uint64_t)replicas;
            w->calls[expert] += (calls + (uint64_t)replicas - 1) / (uint64_t)replicas;
        }
    }
}
