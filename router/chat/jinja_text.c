#include <string.h>

#include "router/chat/jinja_value.h"

bool moe_jinja_text_is(jinja_text text, const char *literal) {
    return strlen(literal) == text.size && memcmp(text.data, literal, text.size) == 0;
}

bool moe_jinja_text_equal(jinja_text a, jinja_text b) {
    return a.size == b.size && (a.size == 0 || memcmp(a.data, b.data, a.size) == 0);
}

/* Bytes of the sequence that starts with `lead`; 0 for a byte that starts none. */
static size_t sequence_bytes(unsigned char lead) {
    if (lead < 0x80) return 1;
    if (lead >= 0xc2 && lead < 0xe0) return 2;
    if (lead >= 0xe0 && lead < 0xf0) return 3;
    return lead >= 0xf0 && lead < 0xf5 ? 4 : 0;
}

bool moe_jinja_utf8_valid(const char *data, size_t size) {
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    for (size_t at = 0; at < size;) {
        size_t bytes = sequence_bytes((unsigned char)data[at]);
        if (bytes == 0 || bytes > size - at) return false;
        for (size_t i = 1; i < bytes; i++)
            if (((unsigned char)data[at + i] & 0xc0) != 0x80) return false;
        uint32_t c = moe_jinja_utf8_next(data, size, &at);
        if (c < least[bytes] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return false;
    }
    return true;
}

uint32_t moe_jinja_utf8_next(const char *data, size_t size, size_t *at) {
    unsigned char lead = (unsigned char)data[*at];
    size_t bytes = sequence_bytes(lead);
    if (bytes <= 1 || bytes > size - *at) {
        *at += 1;
        return lead;
    }
    uint32_t c = lead & (0xffu >> (bytes + 1));
    for (size_t i = 1; i < bytes; i++) c = c << 6 | ((unsigned char)data[*at + i] & 0x3f);
    *at += bytes;
    return c;
}

size_t moe_jinja_utf8_put(char out[4], uint32_t c) {
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    size_t bytes = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char marks[5] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = bytes - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(marks[bytes] | c);
    return bytes;
}

size_t moe_jinja_utf8_length(jinja_text text) {
    size_t length = 0;
    for (size_t i = 0; i < text.size; i++) length += ((unsigned char)text.data[i] & 0xc0) != 0x80;
    return length;
}

size_t moe_jinja_utf8_offset(jinja_text text, size_t index) {
    size_t at = 0;
    while (index > 0 && at < text.size) {
        moe_jinja_utf8_next(text.data, text.size, &at);
        index--;
    }
    return at;
}

bool moe_jinja_is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

static bool strips(uint32_t c, const jinja_text *chars) {
    if (!chars) return moe_jinja_is_space(c);
    for (size_t at = 0; at < chars->size;)
        if (moe_jinja_utf8_next(chars->data, chars->size, &at) == c) return true;
    return false;
}

jinja_text moe_jinja_strip(jinja_text text, const jinja_text *chars, bool left, bool right) {
    while (left && text.size > 0) {
        size_t next = 0;
        if (!strips(moe_jinja_utf8_next(text.data, text.size, &next), chars)) break;
        text.data += next;
        text.size -= next;
    }
    while (right && text.size > 0) {
        size_t last = text.size - 1;
        while (last > 0 && ((unsigned char)text.data[last] & 0xc0) == 0x80) last--;
        size_t at = last;
        if (!strips(moe_jinja_utf8_next(text.data, text.size, &at), chars)) break;
        text.size = last;
    }
    return text;
}

size_t moe_jinja_find(jinja_text text, jinja_text needle, size_t from) {
    if (from > text.size) return SIZE_MAX;
    if (needle.size == 0) return from;
    const char *found = memmem(text.data + from, text.size - from, needle.data, needle.size);
    return found ? (size_t)(found - text.data) : SIZE_MAX;
}

static bool breaks_line(uint32_t c) {
    return (c >= 10 && c <= 13) || (c >= 28 && c <= 30) || c == 0x85 || c == 0x2028 || c == 0x2029;
}

size_t moe_jinja_line_end(jinja_text text, size_t at, size_t *next) {
    for (*next = at; at < text.size; at = *next) {
        if (!breaks_line(moe_jinja_utf8_next(text.data, text.size, next))) continue;
        if (text.data[at] == '\r' && *next < text.size && text.data[*next] == '\n') (*next)++;
        break;
    }
    return at;
}
