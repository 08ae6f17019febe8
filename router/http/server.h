/* The HTTP front: OpenAI's API over an engine, one thread with its own event loop (libevent). */
#pragma once
#include "router/inference.h"
#include "router/status.h"

typedef struct moe_http_server moe_http_server;

typedef struct moe_http_config {
    const char *host;    /* address to listen at */
    int port;            /* 0: any free one */
    const char *api_key; /* NULL or "": open; else required as a Bearer token, but for health and metrics */
    const char *ssl_certfile, *ssl_keyfile; /* PEM; NULL: plain HTTP; a certificate without a key: the key is in its file */
    bool vllm_metrics;   /* /metrics also has vLLM's names */
    const moe_inference *inference;
    const moe_cluster_view *cluster; /* NULL: /cluster/status and /debug/experts are not served */
} moe_http_config;                   /* strings copied; the rest borrowed for the server's life */

/* Listens and starts the thread. UNAVAILABLE when the address cannot be had; INVALID_ARGUMENT when it is none; errors of
 * moe_tls_server. */
moe_status moe_http_server_start(const moe_http_config *config, moe_http_server **out, moe_error *err);
int moe_http_server_port(const moe_http_server *server); /* any thread */

/* Any thread: from now on new generations are answered 503 and /readiness says so; those in flight go on. */
void moe_http_server_drain(moe_http_server *server);
/* Any thread: requests whose reply is not written out yet. */
int moe_http_server_in_flight(const moe_http_server *server);

/* Cancels what is in flight, closes all connections, ends the thread, frees. Not from the server's own thread. NULLs;
 * idempotent. Call it before the engine is freed. */
void moe_http_server_stop(moe_http_server **server);
