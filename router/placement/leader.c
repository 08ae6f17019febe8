/* Leadership. The leader lease only keeps routers from getting in each other's way; safety is the fence: taking the lead raises
 * it in `meta`, and every later write expects `meta` as this leader last wrote or read it. */
#include <stdio.h>
#include <string.h>

#include "common/json.h"
#include "common/log.h"
#include "router/placement/controller_internal.h"

#define LEASE_MARGIN_NS MOE_RENEW_NS /* before the lease runs out in the store, we count it as run out */

bool moe_controller_may_write(const moe_controller *c) {
    return c->leading && c->store_up && !c->meta_foreign && moe_controller_now(c) < c->lease_until_ns;
}

void moe_controller_lost_lead(moe_controller *c, const char *why) {
    moe_info("router %s no longer leads: %s", c->config.id, why);
    c->leading = false;
    moe_jobs_clear(&c->jobs);
    moe_migration_forget(c);
    c->migration_known = false;
    moe_placement_unref(&c->plan);
}

static void put_router_lease(moe_controller *c) {
    const moe_placement *map = c->map;
    moe_buf text = {0};
    uint64_t routing_epoch = moe_controller_routing_epoch(c);
    json_t *root = json_pack("{s:s, s:o, s:s, s:s, s:I, s:s, s:I, s:I, s:o, s:I, s:I}", "id", c->config.id, "incarnation",
                             moe_json_hex(c->config.incarnation), "endpoint", c->config.endpoint, "host", c->config.host, "pid",
                             (json_int_t)c->config.pid, "uuid", c->cluster_uuid, "epoch", (json_int_t)(map ? map->epoch : 0),
                             "fence", (json_int_t)(map ? map->fence : 0), "map_digest", moe_json_hex(map ? c->map_digest : 0),
                             "known_fence", (json_int_t)c->highest_fence, "routing_epoch", (json_int_t)routing_epoch);
    if (moe_json_write(root, &text)) {
        char key[MOE_WORKER_ID_BYTES + 8];
        moe_error err = {0};
        moe_store *store = moe_controller_store(c);
        snprintf(key, sizeof key, "router:%s", c->config.id);
        moe_status status = store->ops->put_lease(store, key, text.data, text.size, MOE_ROUTER_LEASE_TTL_MS, &err);
        moe_controller_store_answered(c, status, &err);
        if (status == MOE_OK) c->leased_epoch = routing_epoch;
    }
    moe_buf_free(&text);
}

/* Raises the fence over everything known and puts our name beside it; makes `meta` where there is none. */
static void claim_lead(moe_controller *c) {
    moe_meta next = c->meta;
    moe_buf text = {0};
    moe_error err = {0};
    snprintf(next.uuid, sizeof next.uuid, "%s", c->cluster_uuid);
    snprintf(next.leader, sizeof next.leader, "%s", c->lease_value);
    next.model_digest = c->config.model_digest;
    next.replicas = c->config.replicas;
    next.fence = c->highest_fence + 1;
    moe_status status = moe_meta_to_json(&next, &text, &err);
    if (!status) {
        moe_store_write write = {.key = "meta", .value = text.data, .size = text.size};
        moe_store *store = moe_controller_store(c);
        const char *expected = c->meta_found ? moe_buf_text(&c->meta_text) : NULL;
        status = store->ops->compare_and_set(store, "meta", expected, c->meta_text.size, &write, 1, &err);
        moe_controller_store_answered(c, status, &err);
    }
    if (!status) status = moe_controller_set_meta(c, text.data, text.size, &err);
    if (status) {
        c->next_meta_ns = 0; /* someone else wrote: look before trying again */
    } else {
        moe_jobs_clear(&c->jobs); /* their calls carried another fence */
        moe_migration_forget(c);
        c->migration_known = false;
        moe_placement_unref(&c->plan);
        c->leading = true;
        c->fence = next.fence;
        moe_info("router %s leads, with fence %llu", c->config.id, (unsigned long long)c->fence);
    }
    moe_buf_free(&text);
}

static void give_back(moe_controller *c, const char *key, const char *value) {
    moe_store *store = moe_controller_store(c);
    moe_store_write removal = {.key = key};
    moe_error err = {0};
    if (value) {
        store->ops->compare_and_set(store, key, value, strlen(value), &removal, 1, &err);
    } else {
        store->ops->remove(store, key, &err);
    }
}

/* After the store lost data, a router may know a newer map than the store and we do: it should lead. */
static bool other_knows_more(const moe_controller *c) {
    uint64_t epoch = c->map ? c->map->epoch : 0, fence = c->map ? c->map->fence : 0;
    for (int32_t i = 0; i < c->num_routers; i++) {
        const moe_controller_router_view *r = &c->routers[i];
        if (r->epoch > epoch || (r->epoch == epoch && r->fence > fence)) return true;
    }
    return false;
}

static void yield_lead(moe_controller *c) {
    if (c->lease_until_ns) give_back(c, "leader", c->lease_value);
    if (c->leading) moe_controller_lost_lead(c, "another router has a newer map");
    c->lease_until_ns = 0;
}

void moe_controller_renew(moe_controller *c) {
    moe_error err = {0};
    moe_store *store = moe_controller_store(c);
    int64_t now = moe_controller_now(c);
    put_router_lease(c);
    if (c->meta_foreign || !c->store_up) return;
    if (other_knows_more(c)) {
        yield_lead(c);
        return;
    }
    moe_status status =
        store->ops->take_lease(store, "leader", c->lease_value, strlen(c->lease_value), MOE_ROUTER_LEASE_TTL_MS, &err);
    moe_controller_store_answered(c, status, &err);
    if (status == MOE_OK) {
        c->lease_until_ns = now + MOE_ROUTER_LEASE_TTL_MS * MOE_NS_PER_MS - LEASE_MARGIN_NS;
        if (!c->leading || c->highest_fence > c->fence) claim_lead(c);
    } else if (status == MOE_ABORTED) {
        c->lease_until_ns = 0;
        if (c->leading) moe_controller_lost_lead(c, "another router holds the lease");
    }
}

void moe_controller_resign(moe_controller *c) {
    char key[MOE_WORKER_ID_BYTES + 8];
    snprintf(key, sizeof key, "router:%s", c->config.id);
    give_back(c, key, NULL);
    give_back(c, "leader", c->lease_value);
    if (c->leading) moe_controller_lost_lead(c, "it resigns");
    c->lease_until_ns = 0;
}
