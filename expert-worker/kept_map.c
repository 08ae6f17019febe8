#include "expert-worker/kept_map.h"

moe_status moe_kept_map_put(moe_kept_map *kept, uint64_t epoch, uint64_t fence, const moe_frame *text, moe_error *err) {
    if (text->size == 0 || text->size > MOE_KEPT_MAP_MAX_BYTES)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a placement map of %zu bytes; 1 to %zu are possible", text->size,
                        MOE_KEPT_MAP_MAX_BYTES);
    if (epoch < kept->epoch || (epoch == kept->epoch && fence <= kept->fence)) return MOE_OK;
    moe_buf copy = {0};
    moe_buf_append(&copy, text->data, text->size);
    if (copy.failed) {
        moe_buf_free(&copy);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a placement map of %zu bytes", text->size);
    }
    moe_buf_free(&kept->text);
    *kept = (moe_kept_map){.epoch = epoch, .fence = fence, .text = copy};
    return MOE_OK;
}

void moe_kept_map_free(moe_kept_map *kept) {
    moe_buf_free(&kept->text);
    *kept = (moe_kept_map){0};
}
