/* /v1/models */
#include <ctype.h>
#include <string.h>

#include "router/http/routes.h"
#include "router/http/server_internal.h"

static json_t *model_json(const moe_http_server *server) {
    const moe_inference *inference = server->inference;
    return json_pack("{s:s, s:s, s:I, s:s, s:s, s:n, s:i}", "id", inference->model, "object", "model", "created",
                     (json_int_t)server->started_s, "owned_by", "moesaic", "root", inference->model, "parent", "max_model_len",
                     inference->max_model_len);
}

void moe_http_handle_models(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    moe_http_reply_json(exchange, 200, json_pack("{s:s, s:[o]}", "object", "list", "data", model_json(exchange->server)));
}

/* Whether `path`, percent-encoded, spells `name`. */
static bool spells(const char *path, const char *name) {
    for (; *path; path++, name++) {
        char c = *path;
        if (c == '%') {
            const char *digits = "0123456789abcdef", *high = path[1] ? strchr(digits, tolower((unsigned char)path[1])) : NULL;
            const char *low = high && path[2] ? strchr(digits, tolower((unsigned char)path[2])) : NULL;
            if (!low) return false;
            c = (char)((high - digits) * 16 + (low - digits));
            path += 2;
        }
        if (!c || c != *name) return false;
    }
    return !*name;
}

void moe_http_handle_model(moe_http_exchange *exchange, const char *rest) {
    moe_http_error error;
    const char *model = exchange->server->inference->model;
    if (spells(rest, model)) {
        moe_http_reply_json(exchange, 200, model_json(exchange->server));
        return;
    }
    moe_http_fail(&error, 404, "model_not_found", "model", "The model '%.200s' does not exist: this server has '%s'.", rest,
                  model);
    moe_http_reply_error(exchange, &error);
}
