/* Errors as OpenAI's API words them: {"error": {"message", "type", "param", "code"}}. */
#pragma once
#include <jansson.h>

#include "common/status.h"

#define MOE_HTTP_PARAM_BYTES 128
#define MOE_HTTP_RETRY_AFTER_S "1" /* for 429 and 503 */

typedef struct moe_http_error {
    int http_status;                  /* 0: none */
    const char *code;                 /* literal; NULL: null */
    char param[MOE_HTTP_PARAM_BYTES]; /* "": null */
    char message[MOE_ERROR_MESSAGE_BYTES];
} moe_http_error;

/* Fills *error and returns false, so that a check can end with `return moe_http_fail(…)`. `param` may be NULL. */
bool moe_http_fail(moe_http_error *error, int http_status, const char *code, const char *param, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
bool moe_http_fail_memory(moe_http_error *error); /* 500: out of memory */

/* An engine's status as HTTP's: INVALID_ARGUMENT 400, NOT_FOUND 404, RESOURCE_EXHAUSTED 429, UNAVAILABLE 503,
 * DEADLINE_EXCEEDED 504, anything else 500. Returns false. */
bool moe_http_fail_status(moe_http_error *error, moe_status status, const char *param, const char *message);

/* The body; NULL when out of memory. The caller owns the reference. */
json_t *moe_http_error_json(const moe_http_error *error);
