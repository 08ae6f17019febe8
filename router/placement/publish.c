#include <stdio.h>
#include <string.h>

#include "common/failpoint.h"
#include "common/log.h"
#include "router/placement/controller_internal.h"

/* One transaction: meta names the new map, the map itself, and one map that nobody needs any more goes. */
static moe_status write_map(moe_controller *c, uint64_t epoch, const moe_buf *map_text, const moe_buf *meta_text,
                            moe_error *err) {
    char key[32], old_key[32];
    snprintf(key, sizeof key, "map:%llu", (unsigned long long)epoch);
    moe_store_write writes[3] = {{.key = "meta", .value = meta_text->data, .size = meta_text->size},
                                 {.key = key, .value = map_text->data, .size = map_text->size}};
    int num_writes = 2;
    if (epoch > MOE_KEPT_MAPS) {
        snprintf(old_key, sizeof old_key, "map:%llu", (unsigned long long)(epoch - MOE_KEPT_MAPS));
        writes[num_writes++] = (moe_store_write){.key = old_key};
    }
    moe_store *store = moe_controller_store(c);
    moe_status status =
        store->ops->compare_and_set(store, "meta", moe_buf_text(&c->meta_text), c->meta_text.size, writes, num_writes, err);
    moe_controller_store_answered(c, status, err);
    return status;
}

moe_status moe_controller_publish(moe_controller *c, moe_placement *next, moe_error *err) {
    MOE_ASSERT(c->leading && c->meta_found);
    moe_buf map_text = {0}, meta_text = {0};
    next->epoch = c->highest_epoch + 1;
    next->fence = c->fence;
    moe_status status = moe_placement_to_json(next, &map_text, err);
    moe_meta meta = c->meta;
    meta.epoch = next->epoch;
    if (!status && !(meta.map_digest = moe_text_digest(map_text.data, map_text.size))) {
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a digest");
    }
    if (!status) status = moe_meta_to_json(&meta, &meta_text, err);
    if (!status) status = write_map(c, next->epoch, &map_text, &meta_text, err);
    if (!status) {
        moe_failpoint(MOE_FAILPOINT_MAP_WRITTEN);
        moe_controller_adopt(c, moe_placement_ref(next), meta.map_digest);
        status = moe_controller_set_meta(c, meta_text.data, meta_text.size, err);
    } else {
        moe_warn("publishing placement epoch %llu failed: %s", (unsigned long long)next->epoch, err->message);
        c->next_meta_ns = 0; /* it may have been written: look */
    }
    moe_buf_free(&map_text);
    moe_buf_free(&meta_text);
    return status;
}

moe_status moe_controller_write(moe_controller *c, const moe_store_write *writes, int count, moe_error *err) {
    moe_store *store = moe_controller_store(c);
    moe_status status =
        store->ops->compare_and_set(store, "meta", moe_buf_text(&c->meta_text), c->meta_text.size, writes, count, err);
    moe_controller_store_answered(c, status, err);
    if (status) c->next_meta_ns = 0;
    return status;
}
