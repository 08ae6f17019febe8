#include "proto/map.h"

#include "common/alloc.h"
#include "common/random.h"

#define FIRST_BUCKETS 64

static moe_map_node **bucket_of(const moe_map *map, uint64_t a, uint64_t b) {
    return &map->buckets[moe_mix64(moe_mix64(a) ^ b) & (map->num_buckets - 1)];
}

moe_status moe_map_init(moe_map *map, moe_error *err) {
    *map = (moe_map){.buckets = moe_calloc(FIRST_BUCKETS, sizeof *map->buckets), .num_buckets = FIRST_BUCKETS};
    return map->buckets ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a call table");
}

void moe_map_free(moe_map *map) {
    moe_free(map->buckets);
    *map = (moe_map){0};
}

static void link_node(moe_map *map, moe_map_node *node) {
    moe_map_node **bucket = bucket_of(map, node->a, node->b);
    node->next = *bucket;
    *bucket = node;
}

static void grow(moe_map *map) {
    moe_map old = *map;
    moe_map_node **wider = moe_calloc(2 * old.num_buckets, sizeof *wider);
    if (!wider) return;
    map->buckets = wider;
    map->num_buckets = 2 * old.num_buckets;
    for (size_t i = 0; i < old.num_buckets; i++) {
        for (moe_map_node *node = old.buckets[i], *next; node; node = next) {
            next = node->next;
            link_node(map, node);
        }
    }
    moe_free(old.buckets);
}

void moe_map_insert(moe_map *map, moe_map_node *node, uint64_t a, uint64_t b) {
    if (map->count >= map->num_buckets) grow(map);
    node->a = a;
    node->b = b;
    link_node(map, node);
    map->count++;
}

moe_map_node *moe_map_find(const moe_map *map, uint64_t a, uint64_t b) {
    moe_map_node *node = *bucket_of(map, a, b);
    while (node && (node->a != a || node->b != b)) node = node->next;
    return node;
}

void moe_map_remove(moe_map *map, moe_map_node *node) {
    moe_map_node **at = bucket_of(map, node->a, node->b);
    while (*at && *at != node) at = &(*at)->next;
    MOE_ASSERT(*at);
    *at = node->next;
    map->count--;
}
