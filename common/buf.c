#include "common/buf.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"

static bool reserve(moe_buf *buf, size_t extra) {
    size_t need;
    if (buf->failed) return false;
    if (!moe_size_add(buf->size, extra, &need) || !moe_size_add(need, 1, &need)) return !(buf->failed = true);
    if (need <= buf->capacity) return true;
    size_t capacity = buf->capacity ? buf->capacity : 64;
    while (capacity < need) capacity = capacity > SIZE_MAX / 2 ? need : capacity * 2;
    char *data = moe_realloc(buf->data, capacity, 1);
    if (!data) return !(buf->failed = true);
    buf->data = data;
    buf->capacity = capacity;
    return true;
}

void moe_buf_append(moe_buf *buf, const void *data, size_t size) {
    if (!reserve(buf, size)) return;
    if (size) memcpy(buf->data + buf->size, data, size);
    buf->size += size;
    buf->data[buf->size] = '\0';
}

void moe_buf_append_text(moe_buf *buf, const char *text) { moe_buf_append(buf, text, strlen(text)); }

void moe_buf_printf(moe_buf *buf, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (length < 0 || !reserve(buf, (size_t)length)) return;
    va_start(args, format);
    vsnprintf(buf->data + buf->size, (size_t)length + 1, format, args);
    va_end(args);
    buf->size += (size_t)length;
}

void moe_buf_clear(moe_buf *buf) {
    buf->size = 0;
    buf->failed = false;
    if (buf->data) buf->data[0] = '\0';
}

void moe_buf_free(moe_buf *buf) {
    moe_free(buf->data);
    *buf = (moe_buf){0};
}

const char *moe_buf_text(const moe_buf *buf) { return buf->data ? buf->data : ""; }
