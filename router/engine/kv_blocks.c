#include "router/engine/kv_blocks.h"

#include "common/alloc.h"
#include "common/metrics.h"

moe_status moe_kv_blocks_init(moe_kv_blocks *blocks, int32_t num_blocks, moe_error *err) {
    blocks->free_list = moe_calloc((size_t)num_blocks, sizeof *blocks->free_list);
    if (!blocks->free_list)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the list of %d KV blocks", num_blocks);
    for (int32_t i = 0; i < num_blocks; i++) blocks->free_list[i] = num_blocks - 1 - i;
    blocks->num_free = blocks->num_blocks = num_blocks;
    moe_metric_set(MOE_METRIC_KV_BLOCKS_TOTAL, num_blocks);
    return MOE_OK;
}

void moe_kv_blocks_destroy(moe_kv_blocks *blocks) {
    moe_free(blocks->free_list);
    *blocks = (moe_kv_blocks){0};
}

int32_t moe_kv_blocks_take(moe_kv_blocks *blocks) { return blocks->num_free ? blocks->free_list[--blocks->num_free] : -1; }

void moe_kv_blocks_give(moe_kv_blocks *blocks, int32_t block) {
    MOE_ASSERT(block >= 0 && block < blocks->num_blocks && blocks->num_free < blocks->num_blocks);
    blocks->free_list[blocks->num_free++] = block;
}
