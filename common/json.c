#include "common/json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEX_DIGITS 16

static int append(const char *data, size_t size, void *out) {
    moe_buf_append(out, data, size);
    return 0;
}

bool moe_json_write(json_t *root, moe_buf *out) {
    bool ok = root && json_dump_callback(root, append, out, JSON_COMPACT) == 0 && !out->failed;
    json_decref(root);
    return ok;
}

json_t *moe_json_hex(uint64_t value) {
    char text[HEX_DIGITS + 1];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)value);
    return json_string(text);
}

bool moe_json_read_hex(const json_t *value, uint64_t *out) {
    const char *text = json_string_value(value);
    if (!text || strlen(text) != HEX_DIGITS || strspn(text, "0123456789abcdef") != HEX_DIGITS) return false;
    *out = strtoull(text, NULL, 16);
    return true;
}

bool moe_json_get_hex(const json_t *object, const char *key, uint64_t *out) {
    return moe_json_read_hex(json_object_get(object, key), out);
}

bool moe_json_get_count(const json_t *object, const char *key, int64_t limit, int64_t *out) {
    const json_t *value = json_object_get(object, key);
    if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) > limit) return false;
    *out = json_integer_value(value);
    return true;
}

bool moe_json_get_text(const json_t *object, const char *key, char *out, size_t capacity_bytes) {
    const json_t *value = json_object_get(object, key);
    size_t length = json_string_length(value);
    if (!json_is_string(value) || length >= capacity_bytes || strlen(json_string_value(value)) != length) return false;
    memcpy(out, json_string_value(value), length + 1);
    return true;
}
