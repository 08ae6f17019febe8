/* The HTTP listener of `moesaic worker`: /metrics in Prometheus's text format, /health and /liveness. Unlike a router's front it has
 * no key, so it shows numbers alone; a thread of its own serves it. */
#pragma once
#include "common/status.h"

typedef struct moe_metrics_server moe_metrics_server;

/* Listens at host (an address) and port (0: any free one) and starts the thread. UNAVAILABLE: the address cannot be had;
 * RESOURCE_EXHAUSTED. Free with moe_metrics_server_stop. */
moe_status moe_metrics_server_start(const char *host, int port, moe_metrics_server **out, moe_error *err);
int moe_metrics_server_port(const moe_metrics_server *server);
void moe_metrics_server_stop(moe_metrics_server **server); /* joins the thread; NULLs; idempotent */
