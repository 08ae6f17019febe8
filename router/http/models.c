/* /v1/models */
#include <event2/buffer.h>
#include <stdlib.h>
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

void moe_http_handle_model(moe_http_exchange *exchange, const char *rest) {
    moe_http_error error;
    char *name = evhttp_uridecode(rest, 0, NULL);
    bool known = name && strcmp(name, exchange->server->inference->model) == 0;
    if (known) {
        moe_http_reply_json(exchange, 200, model_json(exchange->server));
    } else {
        moe_http_fail(&error, 404, "model_not_found", "model", "The model '%.200s' does not exist: this server has '%s'.",
                      name ? name : rest, exchange->server->inference->model);
        moe_http_reply_error(exchange, &error);
    }
    free(name); /* libevent's own */
}
