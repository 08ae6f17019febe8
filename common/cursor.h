/* The one bounded reader for bytes that come from outside. A read past the end sets `bad` and yields zero; the caller
 * checks `bad` once at the end. Comparisons are of the form `n > left`, which cannot overflow. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct moe_cursor {
    const uint8_t *at;
    size_t left; /* bytes */
    bool bad;
} moe_cursor;

static inline moe_cursor moe_cursor_of(const void *data, size_t size) {
    return (moe_cursor){.at = (const uint8_t *)data, .left = size};
}

/* `size` bytes at the cursor (borrowed from the input), or NULL with `bad` set. */
static inline const void *moe_cursor_take(moe_cursor *c, size_t size) {
    if (c->bad || size > c->left) {
        c->bad = true;
        return NULL;
    }
    const void *taken = c->at;
    c->at += size;
    c->left -= size;
    return taken;
}

/* Little-endian integers of any alignment (the hosts supported are little-endian). */
static inline uint32_t moe_cursor_u32(moe_cursor *c) {
    uint32_t value = 0;
    const void *p = moe_cursor_take(c, sizeof value);
    if (p) memcpy(&value, p, sizeof value);
    return value;
}

static inline uint64_t moe_cursor_u64(moe_cursor *c) {
    uint64_t value = 0;
    const void *p = moe_cursor_take(c, sizeof value);
    if (p) memcpy(&value, p, sizeof value);
    return value;
}
