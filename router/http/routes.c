#include "router/http/routes.h"

#include <string.h>
#include <strings.h>

#include "router/http/server_internal.h"

typedef struct route {
    const char *path; /* one that ends in "/" matches everything below it */
    enum evhttp_cmd_type method;
    bool open; /* needs no key */
    moe_http_handler handler;
} route;

static const route routes[] = {
    {"/v1/chat/completions", EVHTTP_REQ_POST, false, moe_http_handle_chat},
    {"/v1/completions", EVHTTP_REQ_POST, false, moe_http_handle_completions},
    {"/v1/models", EVHTTP_REQ_GET, false, moe_http_handle_models},
    {"/v1/models/", EVHTTP_REQ_GET, false, moe_http_handle_model},
    {"/tokenize", EVHTTP_REQ_POST, false, moe_http_handle_tokenize},
    {"/detokenize", EVHTTP_REQ_POST, false, moe_http_handle_detokenize},
    {"/health", EVHTTP_REQ_GET, true, moe_http_handle_health},
    {"/liveness", EVHTTP_REQ_GET, true, moe_http_handle_health},
    {"/readiness", EVHTTP_REQ_GET, true, moe_http_handle_readiness},
    {"/version", EVHTTP_REQ_GET, false, moe_http_handle_version},
    {"/metrics", EVHTTP_REQ_GET, true, moe_http_handle_metrics},
    {"/cluster/status", EVHTTP_REQ_GET, false, moe_http_handle_cluster_status},
    {"/debug/experts", EVHTTP_REQ_GET, false, moe_http_handle_debug_experts},
};

static const route *find_route(const char *path, const char **rest) {
    for (size_t i = 0; i < sizeof routes / sizeof routes[0]; i++) {
        size_t size = strlen(routes[i].path);
        bool below = routes[i].path[size - 1] == '/';
        *rest = "";
        if (!below && strcmp(path, routes[i].path) == 0) return &routes[i];
        if (!below || strncmp(path, routes[i].path, size) != 0 || !path[size]) continue;
        *rest = path + size;
        return &routes[i];
    }
    return NULL;
}

/* In time that depends on the given key only. */
static bool same_key(const char *key, const char *given) {
    size_t key_size = strlen(key), given_size = strlen(given);
    unsigned difference = key_size != given_size;
    for (size_t i = 0; i < given_size; i++) difference |= (unsigned)(unsigned char)(given[i] ^ key[key_size ? i % key_size : 0]);
    return difference == 0;
}

static bool authorized(const moe_http_exchange *exchange) {
    static const char scheme[] = "Bearer ";
    const char *key = exchange->server->api_key;
    const char *given = evhttp_find_header(evhttp_request_get_input_headers(exchange->request), "Authorization");
    if (!key) return true;
    return given && strncasecmp(given, scheme, strlen(scheme)) == 0 && same_key(key, given + strlen(scheme));
}

static bool check_content_type(const moe_http_exchange *exchange, moe_http_error *error) {
    static const char json[] = "application/json";
    const char *type = evhttp_find_header(evhttp_request_get_input_headers(exchange->request), "Content-Type");
    if (!type) return true;
    const char *end = type + strlen(json);
    if (strncasecmp(type, json, strlen(json)) == 0 && (!*end || *end == ';' || *end == ' ')) return true;
    return moe_http_fail(error, 415, "unsupported_media_type", NULL,
                         "The body's Content-Type is \"%.100s\"; only \"application/json\" is understood.", type);
}

static const char *allowed_methods(const route *found) {
    return found->method == EVHTTP_REQ_POST ? "POST, OPTIONS" : "GET, HEAD, OPTIONS";
}

static void refuse_method(moe_http_exchange *exchange, const route *found, const char *path) {
    moe_http_error error;
    moe_http_add_header(exchange, "Allow", allowed_methods(found));
    moe_http_fail(&error, 405, "method_not_allowed", NULL, "%.200s answers %s only.", path, allowed_methods(found));
    moe_http_reply_error(exchange, &error);
}

void moe_http_dispatch(moe_http_exchange *exchange) {
    const char *path = evhttp_uri_get_path(evhttp_request_get_evhttp_uri(exchange->request)), *rest;
    enum evhttp_cmd_type method = evhttp_request_get_command(exchange->request);
    moe_http_error error;
    if (!path || !*path) path = "/";
    const route *found = find_route(path, &rest);
    if (!found) {
        moe_http_fail(&error, 404, "unknown_url", NULL, "There is nothing at %.200s.", path);
        moe_http_reply_error(exchange, &error);
        return;
    }
    if (method == EVHTTP_REQ_OPTIONS) {
        moe_http_add_header(exchange, "Allow", allowed_methods(found));
        moe_http_reply(exchange, 204, NULL, NULL, 0);
        return;
    }
    if (method != found->method && !(method == EVHTTP_REQ_HEAD && found->method == EVHTTP_REQ_GET)) {
        refuse_method(exchange, found, path);
        return;
    }
    if (!found->open && !authorized(exchange)) {
        moe_http_add_header(exchange, "WWW-Authenticate", "Bearer");
        moe_http_fail(&error, 401, "invalid_api_key", NULL, "This server wants its API key: send \"Authorization: Bearer KEY\".");
        moe_http_reply_error(exchange, &error);
        return;
    }
    if (method == EVHTTP_REQ_POST && !check_content_type(exchange, &error)) {
        moe_http_reply_error(exchange, &error);
        return;
    }
    found->handler(exchange, rest);
}
