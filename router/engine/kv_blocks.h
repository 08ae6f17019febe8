/* Which KV blocks are free. Blocks are interchangeable; the lowest free number is not promised. One thread. */
#pragma once
#include "common/backend.h"

typedef struct moe_kv_blocks {
    int32_t *free_list; /* stack of free block numbers */
    int32_t num_free, num_blocks;
} moe_kv_blocks;

moe_status moe_kv_blocks_init(moe_kv_blocks *blocks, int32_t num_blocks, moe_error *err);
void moe_kv_blocks_destroy(moe_kv_blocks *blocks);

/* A free block's number, or -1. */
int32_t moe_kv_blocks_take(moe_kv_blocks *blocks);
void moe_kv_blocks_give(moe_kv_blocks *blocks, int32_t block);

/* Blocks that hold `tokens` positions. */
static inline int32_t moe_kv_blocks_for(int32_t tokens) { return (tokens + MOE_KV_BLOCK_TOKENS - 1) / MOE_KV_BLOCK_TOKENS; }
