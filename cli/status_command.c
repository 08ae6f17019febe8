/* `moesaic status`: what /cluster/status says, as a table or as JSON. */
#include <stdio.h>

#include "cli/commands.h"
#include "cli/http_client.h"
#include "cli/secret_option.h"
#include "cli/status_text.h"
#include "common/alloc.h"
#include "common/clock.h"

#define SILENCE_NS (10 * MOE_NS_PER_S)

/* Fetches and parses; *status is the caller's. */
static moe_status fetch(const moe_options *options, json_t **status, moe_error *err) {
    char key[MOE_SECRET_BYTES];
    moe_http_call call = {.url = moe_option_text(options, "url"),
                          .ca_file = moe_option_text(options, "ssl-ca-certs"),
                          .path = "/cluster/status",
                          .silence_ns = SILENCE_NS,
                          .cancel_fd = -1};
    moe_buf body = {0};
    int http_status;
    char text[MOE_ERROR_MESSAGE_BYTES / 2];
    moe_status result = moe_secret_option(options, "client-key", key, &call.key, err);
    if (result == MOE_OK) result = moe_http_run(&call, &http_status, &body, err);
    if (result == MOE_OK && http_status != 200) {
        moe_http_error_text(moe_buf_text(&body), text, sizeof text);
        result = moe_fail(err, MOE_FAILED_PRECONDITION, "%s%s: HTTP %d: %s", call.url, call.path, http_status, text);
    }
    *status = result == MOE_OK ? json_loads(moe_buf_text(&body), 0, NULL) : NULL;
    if (result == MOE_OK && !json_is_object(*status))
        result = moe_fail(err, MOE_DATA_LOSS, "%s%s: the answer is not a JSON object", call.url, call.path);
    moe_buf_free(&body);
    return result;
}

static int print(const json_t *status, bool as_json) {
    moe_buf out = {0};
    char *text = as_json ? json_dumps(status, JSON_INDENT(2)) : NULL;
    if (text) moe_buf_printf(&out, "%s\n", text);
    if (!as_json) moe_status_text(status, &out);
    moe_free(text);
    bool failed = out.failed || out.size == 0 || fwrite(out.data, 1, out.size, stdout) != out.size || fflush(stdout) != 0;
    moe_buf_free(&out);
    return failed;
}

int moe_command_status(const moe_options *options) {
    moe_error err;
    json_t *status = NULL;
    int result = 1;
    if (fetch(options, &status, &err) == MOE_OK)
        result = print(status, moe_option_bool(options, "json"));
    else
        fprintf(stderr, "moesaic: %s\n", err.message);
    json_decref(status);
    return result;
}
