/* Chat messages as OpenAI sends them, made into what chat templates expect: role and one string of content. */
#include <string.h>

#include "common/buf.h"
#include "router/http/openai_readers.h"

typedef struct role_row {
    const char *role, *as;
} role_row;

/* `developer` is OpenAI's newer name for `system`, which is what templates know. */
static const role_row roles[] = {{"system", "system"}, {"developer", "system"}, {"user", "user"}, {"assistant", "assistant"}};

/* Fields that clients send back with an assistant's message of ours; anything in them is not built. */
static const char *const empty_fields[] = {"refusal", "tool_calls", "function_call", "audio", "annotations", "tool_call_id"};

static bool read_role(const json_t *value, const char *param, json_t *out, moe_http_error *error) {
    if (!value) return moe_http_fail(error, 400, "missing_required_parameter", param, "'%s' is required.", param);
    if (!json_is_string(value)) return moe_openai_bad_type(error, param, "a string", value);
    for (size_t i = 0; i < sizeof roles / sizeof roles[0]; i++)
        if (strcmp(json_string_value(value), roles[i].role) == 0)
            return json_object_set_new(out, "role", json_string(roles[i].as)) == 0 || moe_http_fail_memory(error);
    return moe_openai_bad_value(error, param, "\"system\", \"developer\", \"user\" or \"assistant\"");
}

/* One of the parts of an array content. */
static bool read_part(const json_t *part, const char *param, moe_buf *text, moe_http_error *error) {
    if (!json_is_object(part)) return moe_openai_bad_type(error, param, "an object", part);
    const json_t *type = json_object_get(part, "type"), *string = json_object_get(part, "text");
    if (!json_is_string(type) || strcmp(json_string_value(type), "text") != 0)
        return moe_openai_bad_value(error, param, "a part of \"type\": \"text\": this model reads text only");
    if (!json_is_string(string) || json_object_size(part) != 2)
        return moe_openai_bad_value(error, param, "an object of \"type\" and \"text\", a string");
    moe_buf_append(text, json_string_value(string), json_string_length(string));
    return true;
}

static bool read_content(const json_t *value, const char *param, json_t *out, moe_http_error *error) {
    if (json_is_string(value)) return json_object_set(out, "content", (json_t *)value) == 0 || moe_http_fail_memory(error);
    if (!value || json_is_null(value))
        return moe_http_fail(error, 400, "missing_required_parameter", param, "'%s' is required.", param);
    if (!json_is_array(value) || json_array_size(value) == 0)
        return moe_openai_bad_type(error, param, "a string or an array of text parts", value);
    moe_buf text = {0};
    bool good = true;
    for (size_t i = 0; good && i < json_array_size(value); i++) {
        char part[MOE_HTTP_PARAM_BYTES];
        snprintf(part, sizeof part, "%.80s[%zu]", param, i);
        if (i) moe_buf_append_text(&text, "\n");
        good = read_part(json_array_get(value, i), part, &text, error);
    }
    if (good && (text.failed || json_object_set_new(out, "content", json_stringn(moe_buf_text(&text), text.size)) != 0))
        good = moe_http_fail_memory(error);
    moe_buf_free(&text);
    return good;
}

static bool is_empty(const json_t *value) { return json_is_null(value) || (json_is_array(value) && !json_array_size(value)); }

static bool read_field(const char *key, const json_t *value, const char *param, json_t *out, moe_http_error *error) {
    if (strcmp(key, "role") == 0 || strcmp(key, "content") == 0) return true;
    if (strcmp(key, "name") == 0) {
        if (json_is_null(value)) return true;
        if (!json_is_string(value)) return moe_openai_bad_type(error, param, "a string", value);
        return json_object_set(out, "name", (json_t *)value) == 0 || moe_http_fail_memory(error);
    }
    for (size_t i = 0; i < sizeof empty_fields / sizeof empty_fields[0]; i++) {
        if (strcmp(key, empty_fields[i]) != 0) continue;
        if (is_empty(value)) return true;
        return moe_http_fail(error, 400, "unsupported_parameter", param, "'%s' is not supported by this server: leave it out.",
                             param);
    }
    return moe_http_fail(error, 400, "unknown_parameter", param, "'%s' is not a parameter of this endpoint.", param);
}

static bool read_message(const json_t *message, size_t index, json_t *out, moe_http_error *error) {
    char param[MOE_HTTP_PARAM_BYTES];
    snprintf(param, sizeof param, "messages[%zu]", index);
    if (!json_is_object(message)) return moe_openai_bad_type(error, param, "an object", message);
    snprintf(param, sizeof param, "messages[%zu].role", index);
    if (!read_role(json_object_get(message, "role"), param, out, error)) return false;
    snprintf(param, sizeof param, "messages[%zu].content", index);
    if (!read_content(json_object_get(message, "content"), param, out, error)) return false;
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)message, key, value) {
        snprintf(param, sizeof param, "messages[%zu].%.80s", index, key);
        if (!read_field(key, value, param, out, error)) return false;
    }
    return true;
}

bool moe_openai_read_messages(moe_openai_params *params, const moe_inference *inference, const char *name, const json_t *value,
                              moe_http_error *error) {
    (void)inference;
    if (!json_is_array(value)) return moe_openai_bad_type(error, name, "an array", value);
    if (json_array_size(value) == 0 || json_array_size(value) > MOE_HTTP_MAX_MESSAGES)
        return moe_http_fail(error, 400, "invalid_value", name, "'%s' must have 1 to %d messages.", name, MOE_HTTP_MAX_MESSAGES);
    params->messages = json_array();
    for (size_t i = 0; i < json_array_size(value); i++) {
        json_t *message = json_object();
        if (json_array_append_new(params->messages, message) != 0) return moe_http_fail_memory(error);
        if (!read_message(json_array_get(value, i), i, message, error)) return false;
    }
    return true;
}
