/* Host memory of the backend for calls, kept from one call to the next: pinned memory is too slow to get for each. The loop's
 * thread only. */
#pragma once
#include "common/backend.h"

#define MOE_BLOCKS_KEPT 16
#define MOE_BLOCKS_KEPT_BYTES ((size_t)256 << 20) /* together */

typedef struct moe_block {
    void *memory;
    size_t bytes;
} moe_block;

typedef struct moe_blocks {
    moe_backend *backend; /* borrowed */
    moe_block kept[MOE_BLOCKS_KEPT];
} moe_blocks;

/* At least `bytes`, as host_alloc gives them; .memory NULL when out of memory. */
moe_block moe_blocks_take(moe_blocks *blocks, size_t bytes);
void moe_blocks_give_back(moe_blocks *blocks, moe_block block);
void moe_blocks_free(moe_blocks *blocks); /* all were given back; idempotent */
