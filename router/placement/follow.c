/* Following: every router reads `meta` again and again, and adopts the map it names where that is newer. */
#include <stdio.h>
#include <string.h>

#include "common/log.h"
#include "common/metrics.h"
#include "router/placement/controller_internal.h"

void moe_controller_store_answered(moe_controller *c, moe_status status, const moe_error *err) {
    bool up = status == MOE_OK || status == MOE_ABORTED;
    if (c->store_known && up == c->store_up) return;
    if (up) {
        if (c->store_known) {
            moe_info("the placement store answers again");
            c->config.new_cluster = false; /* others may have published meanwhile */
        }
        c->contact_ns = moe_controller_now(c);
        c->next_leases_ns = 0;
        c->next_renew_ns = 0;
    } else {
        moe_warn("the placement store does not answer (%s): serving on with the map of epoch %llu", err->message,
                 (unsigned long long)(c->map ? c->map->epoch : 0));
        c->contact_ns = INT64_MAX;
    }
    c->store_known = true;
    c->store_up = up;
    moe_metric_set(MOE_METRIC_REDIS_UP, up);
}

void moe_controller_learn(moe_controller *c, uint64_t epoch, uint64_t fence) {
    if (epoch > c->highest_epoch && epoch <= MOE_MAX_EPOCH) c->highest_epoch = epoch;
    if (fence > c->highest_fence && fence <= MOE_MAX_EPOCH) c->highest_fence = fence;
    if (c->rpc) moe_rpc_set_known(c->rpc, c->highest_epoch, c->highest_fence);
}

void moe_controller_serve(moe_controller *c, moe_placement *map) {
    moe_placement_ref(map);
    moe_placement_unref(&c->served);
    c->served = map;
    if (c->config.on_map) c->config.on_map(c->config.ctx, map);
}

void moe_controller_adopt(moe_controller *c, moe_placement *map, uint64_t digest) {
    moe_controller_note_changes(c, map);
    moe_placement_unref(&c->map);
    c->map = map;
    c->map_digest = digest;
    c->next_renew_ns = 0; /* the leader waits to hear that we route by it */
    c->waiting_for[0] = '\0';
    moe_controller_learn(c, map->epoch, map->fence);
    moe_metric_set(MOE_METRIC_EPOCH, (int64_t)map->epoch);
    moe_info("placement map: epoch %llu, fence %llu, %d workers", (unsigned long long)map->epoch, (unsigned long long)map->fence,
             map->num_workers);
    moe_controller_serve(c, map);
    moe_controller_sync_members(c);
    moe_controller_save_map(c);
}

/* What is in `meta` may be damaged, or another cluster's or model's: then it is left alone, neither followed nor written. */
static moe_status check_meta(const moe_controller *c, const moe_meta *meta, moe_error *err) {
    if (strcmp(meta->uuid, c->cluster_uuid) != 0) {
        return moe_fail(err, MOE_FAILED_PRECONDITION, "the store belongs to cluster %s, this is cluster %s", meta->uuid,
                        c->cluster_uuid);
    }
    if (meta->model_digest != c->config.model_digest) {
        return moe_fail(err, MOE_FAILED_PRECONDITION, "cluster %s serves model %016llx, this router has %016llx", meta->uuid,
                        (unsigned long long)meta->model_digest, (unsigned long long)c->config.model_digest);
    }
    return MOE_OK;
}

moe_status moe_controller_set_meta(moe_controller *c, const char *text, size_t size, moe_error *err) {
    moe_meta meta;
    moe_buf_clear(&c->meta_text);
    moe_buf_append(&c->meta_text, text, size);
    c->meta_found = !c->meta_text.failed;
    if (!c->meta_found) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for meta");
    moe_status status = moe_meta_from_json(text, size, &meta, err);
    if (!status) status = check_meta(c, &meta, err);
    c->meta_foreign = status != MOE_OK;
    if (status) return status;
    c->meta = meta;
    moe_controller_learn(c, meta.epoch, meta.fence);
    c->map_examined = meta.epoch == 0 || (c->map && c->map->epoch == meta.epoch && c->map_digest == meta.map_digest);
    return MOE_OK;
}

moe_status moe_controller_check_map(const moe_controller *c, const moe_placement *p, moe_error *err) {
    const moe_controller_config *config = &c->config;
    if (p->model_digest != config->model_digest || p->num_layers != config->num_moe_layers || p->num_experts != config->num_experts)
        return moe_fail(err, MOE_DATA_LOSS, "its model or shape is another");
    for (int32_t i = 0; config->expert_digests && i < p->num_layers * p->num_experts; i++) {
        uint64_t named = p->entries[i].digest;
        if (named && named != config->expert_digests[i])
            return moe_fail(err, MOE_DATA_LOSS, "it names layer %d expert %d with digest %016llx, the manifest with %016llx",
                            i / p->num_experts, i % p->num_experts, (unsigned long long)named,
                            (unsigned long long)config->expert_digests[i]);
    }
    return MOE_OK;
}

static moe_status parse_map(const moe_controller *c, const moe_buf *text, moe_placement **out, moe_error *err) {
    if (moe_text_digest(moe_buf_text(text), text->size) != c->meta.map_digest) {
        return moe_fail(err, MOE_DATA_LOSS, "it does not have the digest that meta states");
    }
    moe_status status = moe_placement_from_json(moe_buf_text(text), text->size, out, err);
    if (status) return status;
    status = (*out)->epoch == c->meta.epoch ? moe_controller_check_map(c, *out, err)
                                            : moe_fail(err, MOE_DATA_LOSS, "its epoch is another");
    if (status) moe_placement_unref(out);
    return status;
}

/* Reads the map that meta names. An older one than ours, or a damaged one, is left for the leader to publish over. */
static void examine_map(moe_controller *c) {
    char key[32];
    moe_buf text = {0};
    bool found;
    moe_error err = {0};
    snprintf(key, sizeof key, "map:%llu", (unsigned long long)c->meta.epoch);
    moe_status status = moe_controller_store(c)->ops->get(moe_controller_store(c), key, &text, &found, &err);
    moe_controller_store_answered(c, status, &err);
    if (!status) {
        c->map_examined = true;
        moe_placement *map = NULL;
        status = found ? parse_map(c, &text, &map, &err) : moe_fail(&err, MOE_DATA_LOSS, "it is missing");
        if (status) {
            moe_error_log("placement map %s of the store is refused: %s", key, err.message);
        } else if (moe_placement_newer(map, c->map)) {
            moe_controller_adopt(c, map, c->meta.map_digest);
        } else {
            moe_warn("the store's placement map is older than ours (epoch %llu, ours %llu)", (unsigned long long)map->epoch,
                     (unsigned long long)c->map->epoch);
            moe_placement_unref(&map);
        }
    }
    moe_buf_free(&text);
}

static void meta_gone(moe_controller *c) {
    if (c->meta_found) {
        moe_warn("the placement store came back empty");
        c->config.new_cluster = false;
        c->contact_ns = moe_controller_now(c);
        c->next_renew_ns = 0;
    }
    c->meta_found = false;
    c->meta_foreign = false;
    c->meta = (moe_meta){0};
    c->map_examined = true;
    moe_buf_clear(&c->meta_text);
    if (c->leading) moe_controller_lost_lead(c, "meta is gone");
}

static void meta_read(moe_controller *c, const moe_buf *text) {
    bool same =
        c->meta_found && c->meta_text.size == text->size && memcmp(moe_buf_text(&c->meta_text), text->data, text->size) == 0;
    if (!same) {
        moe_error err;
        moe_status status = moe_controller_set_meta(c, moe_buf_text(text), text->size, &err);
        if (status) moe_error_log("the placement store's meta is not followed: %s", err.message);
    }
    bool ours = !c->meta_foreign && c->meta.fence == c->fence && strcmp(c->meta.leader, c->lease_value) == 0;
    if (c->leading && !ours) moe_controller_lost_lead(c, "another router leads");
    if (c->meta_found && !c->meta_foreign && !c->map_examined) examine_map(c);
}

void moe_controller_follow(moe_controller *c) {
    moe_buf text = {0};
    bool found = false;
    moe_error err = {0};
    moe_status status = moe_controller_store(c)->ops->get(moe_controller_store(c), "meta", &text, &found, &err);
    moe_controller_store_answered(c, status, &err);
    if (!status && !found) meta_gone(c);
    if (!status && found) meta_read(c, &text);
    moe_buf_free(&text);
}
