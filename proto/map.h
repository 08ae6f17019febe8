/* An intrusive hash map from pairs of 64-bit numbers, chained. Inserting never fails: where the bucket array cannot grow for
 * want of memory, chains get longer. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef struct moe_map_node {
    struct moe_map_node *next;
    uint64_t a, b; /* the key */
} moe_map_node;

typedef struct moe_map {
    moe_map_node **buckets; /* owned; a power of two of them */
    size_t num_buckets;
    size_t count;
} moe_map;

/* RESOURCE_EXHAUSTED when out of memory. */
moe_status moe_map_init(moe_map *map, moe_error *err);
void moe_map_free(moe_map *map); /* not the nodes, which are their owners'; idempotent */

/* The key must not be in the map. The node stays in place until it is removed. */
void moe_map_insert(moe_map *map, moe_map_node *node, uint64_t a, uint64_t b);
moe_map_node *moe_map_find(const moe_map *map, uint64_t a, uint64_t b); /* NULL: not there */
void moe_map_remove(moe_map *map, moe_map_node *node);                  /* must be in the map */
