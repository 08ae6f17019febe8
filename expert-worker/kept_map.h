/* The newest placement map as the leader handed it over, kept for routers that do not reach the store. The worker does not read it.
 * The loop's thread only. */
#pragma once
#include "common/buf.h"
#include "common/transport.h"

#define MOE_KEPT_MAP_MAX_BYTES ((size_t)64 << 20)

typedef struct moe_kept_map {
    uint64_t epoch, fence; /* 0: none */
    moe_buf text;
} moe_kept_map;

/* Keeps a copy where it is newer; an older one changes nothing. INVALID_ARGUMENT: it is empty or too large; RESOURCE_EXHAUSTED. */
moe_status moe_kept_map_put(moe_kept_map *kept, uint64_t epoch, uint64_t fence, const moe_frame *text, moe_error *err);
void moe_kept_map_free(moe_kept_map *kept); /* idempotent */
