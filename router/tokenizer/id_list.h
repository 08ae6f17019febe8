/* A growable list of token ids. Out of memory sets `failed`, later appends do nothing, and the caller checks once at the end. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/alloc.h"

typedef struct moe_id_list {
    int32_t *ids; /* owned; moe_free */
    size_t count, capacity;
    bool failed;
} moe_id_list;

static inline void moe_id_list_add(moe_id_list *list, int32_t id) {
    if (list->count == list->capacity && !list->failed) {
        size_t capacity = list->capacity ? list->capacity * 2 : 64;
        int32_t *ids = moe_realloc(list->ids, capacity, sizeof *ids);
        if (ids) {
            list->ids = ids;
            list->capacity = capacity;
        } else {
            list->failed = true;
        }
    }
    if (!list->failed) list->ids[list->count++] = id;
}
