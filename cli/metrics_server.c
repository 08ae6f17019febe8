#include "cli/metrics_server.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/event.h>
#include <event2/http.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/metrics.h"

#define IDLE_TIMEOUT_S 30 /* of a connection without a request, or with an unfinished one */
#define MAX_HEADER_BYTES 8192
#define MAX_BODY_BYTES 1024 /* nothing here takes one */

struct moe_metrics_server {
    struct event_base *base;
    struct evhttp *http;
    struct event *stop_event; /* stop_fd is readable */
    int stop_fd, port;
    pthread_t thread;
    bool thread_runs;
};

static void reply(struct evhttp_request *request, const char *type, const char *text, size_t size) {
    struct evbuffer *body = evbuffer_new();
    evhttp_add_header(evhttp_request_get_output_headers(request), "Content-Type", type);
    if (body && evbuffer_add(body, text, size) == 0)
        evhttp_send_reply(request, HTTP_OK, NULL, body);
    else
        evhttp_send_error(request, HTTP_INTERNAL, NULL);
    if (body) evbuffer_free(body);
}

static void on_metrics(struct evhttp_request *request, void *arg) {
    (void)arg;
    moe_buf text = {0};
    moe_metrics_render_worker(&text);
    if (text.failed)
        evhttp_send_error(request, HTTP_INTERNAL, NULL);
    else
        reply(request, "text/plain; version=0.0.4; charset=utf-8", moe_buf_text(&text), text.size);
    moe_buf_free(&text);
}

static void on_health(struct evhttp_request *request, void *arg) {
    static const char ok[] = "{\"status\":\"ok\"}";
    (void)arg;
    reply(request, "application/json", ok, sizeof ok - 1);
}

static void on_stop(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    event_base_loopbreak(arg);
}

static void *run_loop(void *arg) {
    event_base_dispatch(((moe_metrics_server *)arg)->base);
    return NULL;
}

static moe_status listen_at(moe_metrics_server *s, const char *host, int port, moe_error *err) {
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    errno = 0;
    struct evhttp_bound_socket *socket = evhttp_bind_socket_with_handle(s->http, host, (uint16_t)port);
    if (!socket)
        return moe_fail(err, MOE_UNAVAILABLE, "metrics: cannot listen at %s port %d: %s", host, port,
                        errno ? strerror(errno) : "not an address of this machine");
    if (getsockname(evhttp_bound_socket_get_fd(socket), (struct sockaddr *)&bound, &size) != 0)
        return moe_fail(err, MOE_INTERNAL, "metrics: getsockname: %s", strerror(errno));
    s->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                : ((struct sockaddr_in *)&bound)->sin_port);
    return MOE_OK;
}

static moe_status make_loop(moe_metrics_server *s, moe_error *err) {
    s->stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    s->base = event_base_new();
    s->http = s->base ? evhttp_new(s->base) : NULL;
    s->stop_event = s->base && s->stop_fd >= 0 ? event_new(s->base, s->stop_fd, EV_READ, on_stop, s->base) : NULL;
    if (!s->http || !s->stop_event || event_add(s->stop_event, NULL) != 0)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "metrics: cannot make an event loop");
    evhttp_set_allowed_methods(s->http, EVHTTP_REQ_GET | EVHTTP_REQ_HEAD);
    evhttp_set_max_headers_size(s->http, MAX_HEADER_BYTES);
    evhttp_set_max_body_size(s->http, MAX_BODY_BYTES);
    evhttp_set_timeout(s->http, IDLE_TIMEOUT_S);
    evhttp_set_cb(s->http, "/metrics", on_metrics, s);
    evhttp_set_cb(s->http, "/health", on_health, s);
    evhttp_set_cb(s->http, "/liveness", on_health, s);
    return MOE_OK;
}

/* Signals are the main thread's. */
static moe_status start_thread(moe_metrics_server *s, moe_error *err) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&s->thread, NULL, run_loop, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "metrics: cannot start a thread: %s", strerror(failed));
    s->thread_runs = true;
    return MOE_OK;
}

moe_status moe_metrics_server_start(const char *host, int port, moe_metrics_server **out, moe_error *err) {
    moe_metrics_server *s = *out = moe_calloc(1, sizeof *s);
    if (!s) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "metrics: out of memory");
    s->stop_fd = -1;
    moe_status status = make_loop(s, err);
    if (status == MOE_OK) status = listen_at(s, host, port, err);
    if (status == MOE_OK) status = start_thread(s, err);
    if (status != MOE_OK) moe_metrics_server_stop(out);
    return status;
}

int moe_metrics_server_port(const moe_metrics_server *server) { return server->port; }

void moe_metrics_server_stop(moe_metrics_server **server) {
    moe_metrics_server *s = *server;
    *server = NULL;
    if (!s) return;
    if (s->thread_runs) {
        eventfd_write(s->stop_fd, 1); /* it cannot fail: nothing else is written to it */
        pthread_join(s->thread, NULL);
    }
    if (s->http) evhttp_free(s->http);
    if (s->stop_event) event_free(s->stop_event);
    if (s->base) event_base_free(s->base);
    if (s->stop_fd >= 0) close(s->stop_fd);
    moe_free(s);
}
