#include "router/tokenizer/json_read.h"

static const json_t *field(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return json_is_null(value) ? NULL : value;
}

moe_status moe_json_bool(const json_t *object, const char *key, bool fallback, bool *out, moe_error *err) {
    const json_t *value = field(object, key);
    if (value && !json_is_boolean(value)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is not true or false", key);
    *out = value ? json_is_true(value) : fallback;
    return MOE_OK;
}

moe_status moe_json_int(const json_t *object, const char *key, int64_t least, int64_t most, int64_t *out, moe_error *err) {
    const json_t *value = field(object, key);
    if (!json_is_integer(value)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is not a whole number", key);
    *out = json_integer_value(value);
    if (*out < least || *out > most)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is %lld, outside %lld … %lld", key, (long long)*out, (long long)least,
                        (long long)most);
    return MOE_OK;
}

moe_status moe_json_text(const json_t *object, const char *key, const char **out, moe_error *err) {
    const json_t *value = field(object, key);
    if (value && !json_is_string(value)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is not a text", key);
    *out = json_string_value(value);
    return MOE_OK;
}

const char *moe_json_type(const json_t *object) {
    const char *type = json_string_value(json_object_get(object, "type"));
    return type ? type : "";
}

moe_status moe_json_pattern(const json_t *object, const char **out, size_t *size, bool *literal, moe_error *err) {
    const json_t *pattern = json_object_get(object, "pattern");
    const json_t *text = json_object_get(pattern, "String");
    *literal = text != NULL;
    if (!text) text = json_object_get(pattern, "Regex");
    if (!json_is_string(text)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'pattern' is neither a String nor a Regex");
    *out = json_string_value(text);
    *size = json_string_length(text);
    return MOE_OK;
}
