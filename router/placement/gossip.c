/* Maps by way of the workers: each keeps the newest map's text. The leader hands it to them (SetMap), and to whoever is told to drop an
 * expert before the Drop; a router that the store does not answer asks them for a newer one than its own (GetMap), at once where a
 * worker lacks an expert that its map names. Which map a worker keeps is in its Stats. */
#include "common/log.h"
#include "common/store.h"
#include "router/placement/controller_internal.h"

#define SET_MAP_METHOD "/moesaic.v1.WorkerService/SetMap"
#define GET_MAP_METHOD "/moesaic.v1.WorkerService/GetMap"
#define MAP_TIMEOUT_NS (5 * MOE_NS_PER_S)

/* Whether the worker keeps a newer map than ours (1), ours (0) or an older one or none (-1). */
static int compare(const moe_controller *c, const moe_worker_stats *s) {
    uint64_t epoch = c->map ? c->map->epoch : 0, fence = c->map ? c->map->fence : 0;
    if (s->map_epoch != epoch) return s->map_epoch > epoch ? 1 : -1;
    return s->map_fence == fence ? 0 : s->map_fence > fence ? 1 : -1;
}

bool moe_worker_knows_map(const moe_controller *c, const moe_worker_stats *s) { return compare(c, s) >= 0; }

static void try_later(moe_worker_stats *s) { s->exchange_at_ns = moe_controller_now(s->controller) + MOE_POLL_STATS_NS; }

static void on_set(void *ctx, const moe_rpc_reply *reply) {
    moe_worker_stats *s = ctx;
    s->exchanging = false;
    if (reply->status == MOE_OK) {
        s->map_epoch = s->sent_epoch;
        s->map_fence = s->sent_fence;
    } else {
        moe_debug("worker %s does not take the map: %s", s->id, reply->message);
        try_later(s);
    }
}

/* The map's text, made once for all workers. */
static bool make_text(moe_controller *c) {
    moe_error err;
    if (c->map_text.size && c->map_text_epoch == c->map->epoch && c->map_text_fence == c->map->fence) return true;
    c->map_text_epoch = c->map->epoch;
    c->map_text_fence = c->map->fence;
    if (moe_placement_to_json(c->map, &c->map_text, &err) == MOE_OK) return true;
    moe_buf_free(&c->map_text);
    return false;
}

static void hand_over(moe_controller *c, moe_worker_stats *s, moe_peer peer) {
    moe_error err;
    Moesaic__V1__SetMapRequest request = MOESAIC__V1__SET_MAP_REQUEST__INIT;
    if (!make_text(c)) return;
    const moe_frame frame = {c->map_text.data, c->map_text.size};
    request.fence = c->fence;
    request.map_epoch = s->sent_epoch = c->map->epoch;
    request.map_fence = s->sent_fence = c->map->fence;
    s->exchanging = moe_rpc_call_start(c->rpc, peer, SET_MAP_METHOD, &request.base, &frame, 1, moe_controller_now(c) + MAP_TIMEOUT_NS,
                                       on_set, s, &s->exchange_id, &err) == MOE_OK;
}

static moe_status read_map(const moe_controller *c, const moe_frame *text, moe_placement **out, moe_error *err) {
    moe_status status = moe_placement_from_json(text->data, text->size, out, err);
    if (status != MOE_OK) return status;
    status = moe_controller_check_map(c, *out, err);
    if (status != MOE_OK) moe_placement_unref(out);
    return status;
}

static void on_got(void *ctx, const moe_rpc_reply *reply) {
    moe_worker_stats *s = ctx;
    moe_controller *c = s->controller;
    moe_placement *map = NULL;
    moe_error err;
    s->exchanging = false;
    try_later(s); /* unless it helps */
    if (reply->status != MOE_OK || reply->num_payload != 1 || c->store_up) return;
    const moe_frame *text = &reply->payload[0];
    if (read_map(c, text, &map, &err) != MOE_OK) {
        moe_warn("the placement map that worker %s keeps is refused: %s", s->id, err.message);
    } else if (moe_placement_newer(map, c->map)) {
        moe_info("worker %s has a newer placement map", s->id);
        s->exchange_at_ns = 0;
        moe_jobs_clear(&c->rejoins); /* they were for the map before */
        moe_controller_adopt(c, map, moe_text_digest(text->data, text->size));
    } else {
        moe_placement_unref(&map);
    }
}

static void ask_for(moe_controller *c, moe_worker_stats *s, moe_peer peer) {
    moe_error err;
    Moesaic__V1__GetMapRequest request = MOESAIC__V1__GET_MAP_REQUEST__INIT;
    s->exchanging = moe_rpc_call_start(c->rpc, peer, GET_MAP_METHOD, &request.base, NULL, 0, moe_controller_now(c) + MAP_TIMEOUT_NS,
                                       on_got, s, &s->exchange_id, &err) == MOE_OK;
}

void moe_controller_exchange_maps(moe_controller *c) {
    int64_t now = moe_controller_now(c);
    for (int32_t i = 0; i < c->num_members; i++) {
        moe_member *m = &c->members[i];
        const moe_rpc_peer *peer = moe_controller_peer_of(c, m, m->identity.incarnation);
        const moe_worker_stats *told = moe_member_stats(m);
        if (!peer || !told || told->exchanging || now < told->exchange_at_ns) continue;
        int newer = compare(c, told);
        if (newer < 0 && moe_controller_may_write(c))
            hand_over(c, m->stats, peer->peer);
        else if (newer > 0 && c->store_known && !c->store_up)
            ask_for(c, m->stats, peer->peer);
    }
}

void moe_controller_hurry(moe_controller *c) {
    atomic_store(&c->hurried, true);
    moe_rpc_wake(c->rpc);
}

void moe_controller_take_hurry(moe_controller *c) {
    if (!atomic_exchange(&c->hurried, false)) return;
    c->next_meta_ns = 0;
    for (int32_t i = 0; i < c->num_members; i++)
        if (c->members[i].stats) c->members[i].stats->next_ns = 0;
}
