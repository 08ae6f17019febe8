#include "router/http/http_error.h"

#include <stdio.h>

bool moe_http_fail(moe_http_error *error, int http_status, const char *code, const char *param, const char *format, ...) {
    va_list args;
    va_start(args, format);
    error->http_status = http_status;
    error->code = code;
    snprintf(error->param, sizeof error->param, "%s", param ? param : "");
    vsnprintf(error->message, sizeof error->message, format, args);
    va_end(args);
    return false;
}

bool moe_http_fail_memory(moe_http_error *error) {
    return moe_http_fail(error, 500, "out_of_memory", NULL, "The server is out of memory.");
}

typedef struct status_row {
    moe_status status;
    int http_status;
    const char *code;
} status_row;

bool moe_http_fail_status(moe_http_error *error, moe_status status, const char *param, const char *message) {
    static const status_row rows[] = {
        {MOE_INVALID_ARGUMENT, 400, "invalid_value"},         {MOE_OUT_OF_RANGE, 400, "invalid_value"},
        {MOE_UNIMPLEMENTED, 400, "unsupported_value"},        {MOE_NOT_FOUND, 404, "not_found"},
        {MOE_RESOURCE_EXHAUSTED, 429, "rate_limit_exceeded"}, {MOE_UNAVAILABLE, 503, "service_unavailable"},
        {MOE_DEADLINE_EXCEEDED, 504, "deadline_exceeded"},    {MOE_CANCELLED, 503, "cancelled"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if (rows[i].status == status) return moe_http_fail(error, rows[i].http_status, rows[i].code, param, "%s", message);
    return moe_http_fail(error, 500, "internal_error", param, "%s", message);
}

static const char *type_of(int http_status) {
    if (http_status == 429) return "rate_limit_error";
    if (http_status == 401) return "authentication_error";
    return http_status < 500 ? "invalid_request_error" : "server_error";
}

/* A message may hold bytes of the client's own, cut in the middle of a character. */
static json_t *lossy_string(const char *text) {
    json_t *string = json_string(text);
    if (string) return string;
    char ascii[MOE_ERROR_MESSAGE_BYTES];
    size_t i = 0;
    for (; text[i] && i < sizeof ascii - 1; i++) ascii[i] = (unsigned char)text[i] < 0x80 ? text[i] : '?';
    ascii[i] = '\0';
    return json_string(ascii);
}

json_t *moe_http_error_json(const moe_http_error *error) {
    return json_pack("{s:{s:o, s:s, s:o, s:s?}}", "error", "message", lossy_string(error->message), "type",
                     type_of(error->http_status), "param", error->param[0] ? lossy_string(error->param) : json_null(), "code",
                     error->code);
}
