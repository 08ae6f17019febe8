/* Which handler answers which method and path. A new endpoint is one row in routes.c and one handler. */
#pragma once
#include "router/http/exchange.h"

/* Each handler answers its exchange (see exchange.h). `rest` is what follows the row's path where that ends in "/" (still
 * percent-encoded), else "". */
typedef void (*moe_http_handler)(moe_http_exchange *exchange, const char *rest);

void moe_http_handle_chat(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_completions(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_models(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_model(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_tokenize(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_detokenize(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_health(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_readiness(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_version(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_metrics(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_cluster_status(moe_http_exchange *exchange, const char *rest);
void moe_http_handle_debug_experts(moe_http_exchange *exchange, const char *rest);

/* Finds the row, checks method and key, calls the handler or answers 401, 404, 405, or OPTIONS. */
void moe_http_dispatch(moe_http_exchange *exchange);
