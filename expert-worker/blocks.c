#include "expert-worker/blocks.h"

static void release(moe_blocks *b, moe_block *block) {
    b->backend->ops->host_free(b->backend, block->memory);
    *block = (moe_block){.memory = NULL};
}

moe_block moe_blocks_take(moe_blocks *b, size_t bytes) {
    moe_block *best = NULL;
    for (int i = 0; i < MOE_BLOCKS_KEPT; i++) {
        moe_block *k = &b->kept[i];
        if (k->memory && k->bytes >= bytes && (!best || k->bytes < best->bytes)) best = k;
    }
    if (!best) return (moe_block){b->backend->ops->host_alloc(b->backend, bytes), bytes};
    moe_block taken = *best;
    *best = (moe_block){.memory = NULL};
    return taken;
}

/* A larger block takes the place of the smallest, as long as all together are not too much. */
void moe_blocks_give_back(moe_blocks *b, moe_block block) {
    moe_block *smallest = &b->kept[0];
    size_t total = block.bytes;
    for (int i = 0; i < MOE_BLOCKS_KEPT; i++) {
        total += b->kept[i].bytes;
        if (b->kept[i].bytes < smallest->bytes) smallest = &b->kept[i];
    }
    if (total - smallest->bytes > MOE_BLOCKS_KEPT_BYTES || block.bytes <= smallest->bytes) {
        release(b, &block);
        return;
    }
    if (smallest->memory) release(b, smallest);
    *smallest = block;
}

void moe_blocks_free(moe_blocks *b) {
    for (int i = 0; i < MOE_BLOCKS_KEPT; i++)
        if (b->kept[i].memory) release(b, &b->kept[i]);
}
