/* A growable byte buffer. Out of memory sets `failed`, later appends do nothing, and the caller checks once at the end. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

typedef struct moe_buf {
    char *data; /* owned; NUL-terminated whenever non-NULL; may be NULL while size is 0 */
    size_t size;
    size_t capacity;
    bool failed;
} moe_buf;

void moe_buf_append(moe_buf *buf, const void *data, size_t size);
void moe_buf_append_text(moe_buf *buf, const char *text);
void moe_buf_printf(moe_buf *buf, const char *format, ...) __attribute__((format(printf, 2, 3)));
void moe_buf_clear(moe_buf *buf); /* size = 0, memory kept */
void moe_buf_free(moe_buf *buf);  /* back to zero; idempotent */

/* The text, never NULL ("" while empty); borrowed until the next call on the buffer. */
const char *moe_buf_text(const moe_buf *buf);
