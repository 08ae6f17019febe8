/* What is asked about the server itself: health, version, metrics, the cluster's status. */
#include "common/metrics.h"
#include "router/http/routes.h"
#include "router/http/server_internal.h"

void moe_http_handle_health(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    moe_http_reply_json(exchange, 200, json_pack("{s:s}", "status", "ok"));
}

void moe_http_handle_readiness(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    const moe_inference *inference = exchange->server->inference;
    moe_inference_view view;
    inference->ops->view(inference->ctx, &view);
    bool draining = atomic_load(&exchange->server->draining), ready = view.ready && !draining;
    if (!ready) moe_http_add_header(exchange, "Retry-After", MOE_HTTP_RETRY_AFTER_S);
    moe_http_reply_json(exchange, ready ? 200 : 503, json_pack("{s:b, s:b}", "ready", ready, "draining", draining));
}

void moe_http_handle_version(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    moe_http_reply_json(exchange, 200, json_pack("{s:s}", "version", MOESAIC_VERSION));
}

static void reply_text(moe_http_exchange *exchange, const char *content_type, const moe_buf *text) {
    if (text->failed)
        moe_http_reply_json(exchange, 500, NULL);
    else
        moe_http_reply(exchange, 200, content_type, moe_buf_text(text), text->size);
}

void moe_http_handle_metrics(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    moe_buf text = {0};
    moe_metrics_render(&text);
    if (exchange->server->vllm_metrics) moe_metrics_render_vllm(exchange->server->inference->model, &text);
    reply_text(exchange, "text/plain; version=0.0.4; charset=utf-8", &text);
    moe_buf_free(&text);
}

static void reply_status_error(moe_http_exchange *exchange, moe_status status, const char *message) {
    moe_http_error error;
    moe_http_fail_status(&error, status, NULL, message);
    moe_http_reply_error(exchange, &error);
}

void moe_http_handle_cluster_status(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    const moe_cluster_view *cluster = exchange->server->cluster;
    moe_cluster_status answer = {0};
    moe_error err;
    moe_status status = cluster ? cluster->status(cluster->ctx, &answer, &err)
                                : moe_fail(&err, MOE_NOT_FOUND, "This server has no cluster to tell about.");
    if (status == MOE_OK)
        moe_http_reply_json(exchange, 200, moe_cluster_status_to_json(&answer));
    else
        reply_status_error(exchange, status, err.message);
    moe_cluster_status_free(&answer);
}

void moe_http_handle_debug_experts(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    const moe_cluster_view *cluster = exchange->server->cluster;
    moe_buf json = {0};
    moe_error err;
    moe_status status = cluster && cluster->experts ? cluster->experts(cluster->ctx, &json, &err)
                                                    : moe_fail(&err, MOE_NOT_FOUND, "This server knows of no expert loads.");
    if (status == MOE_OK)
        reply_text(exchange, "application/json", &json);
    else
        reply_status_error(exchange, status, err.message);
    moe_buf_free(&json);
}
