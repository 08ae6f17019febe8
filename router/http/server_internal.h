/* The server's own state, for the files of this folder. */
#pragma once
#include <event2/event.h>
#include <event2/http.h>
#include <event2/listener.h>
#include <pthread.h>
#include <stdatomic.h>

#include "common/tls.h"
#include "router/generation.h"
#include "router/http/exchange.h"
#include "router/http/server.h"

struct moe_http_server {
    const moe_inference *inference;
    const moe_cluster_view *cluster; /* may be NULL */
    char *api_key;                   /* owned; NULL: open */
    moe_tls *tls;                    /* owned; NULL: plain HTTP */
    bool vllm_metrics;
    int port;
    int64_t started_s; /* wall clock, for `created` of models */
    struct event_base *base;
    struct evhttp *http;
    struct evconnlistener *listener; /* owned by http */
    struct event *wake_event;        /* wake_fd is readable: drain the queue, look at `stopping` */
    struct event *accept_again;      /* a pause after accept failed for want of descriptors */
    int wake_fd;
    moe_generation_queue *queue;
    moe_http_exchange *open; /* all exchanges; server's thread */
    pthread_t thread;
    bool thread_runs;
    _Atomic bool draining, stopping;
    _Atomic int in_flight;
};
