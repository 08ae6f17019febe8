#include <arpa/inet.h>
#include <errno.h>
#include <event2/bufferevent.h>
#include <event2/bufferevent_ssl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "common/log.h"
#include "router/http/generate.h"
#include "router/http/routes.h"
#include "router/http/server_internal.h"

#define ACCEPT_PAUSE_MS 100
#define LISTEN_BACKLOG 1024

/* Any thread. */
static void wake(void *arg) {
    moe_http_server *server = arg;
    uint64_t one = 1;
    /* It cannot fail but by overflow, and then the loop is awake already. */
    if (write(server->wake_fd, &one, sizeof one) < 0) return;
}

static void on_wake(evutil_socket_t fd, short what, void *arg) {
    (void)what;
    moe_http_server *server = arg;
    uint64_t count;
    if (read((int)fd, &count, sizeof count) < 0 && errno != EAGAIN) moe_warn("HTTP: reading an eventfd: %s", strerror(errno));
    moe_generation_queue_dispatch(server->queue);
    if (atomic_load(&server->stopping)) event_base_loopbreak(server->base);
}

static void on_request(struct evhttp_request *request, void *arg) {
    moe_http_exchange *exchange = moe_http_exchange_new(arg, request);
    if (exchange) moe_http_dispatch(exchange);
}

/* accept failed, most likely for want of descriptors: retried at once it would spin until one is free. */
static void on_accept_error(struct evconnlistener *listener, void *arg) {
    moe_http_server *server = arg;
    struct timeval pause = {.tv_usec = ACCEPT_PAUSE_MS * 1000};
    moe_warn("HTTP: cannot accept a connection: %s", strerror(errno));
    evconnlistener_disable(listener);
    event_add(server->accept_again, &pause);
}

static void on_accept_again(evutil_socket_t fd, short what, void *arg) {
    (void)fd, (void)what;
    evconnlistener_enable(((moe_http_server *)arg)->listener);
}

static void *run_loop(void *arg) {
    moe_http_server *server = arg;
    event_base_loop(server->base, EVLOOP_NO_EXIT_ON_EMPTY);
    return NULL;
}

static moe_status listen_at(moe_http_server *server, const char *host, int port, moe_error *err) {
    char service[16];
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    snprintf(service, sizeof service, "%d", port);
    int failed = getaddrinfo(host, service, &hints, &found);
    if (failed) return moe_fail(err, MOE_INVALID_ARGUMENT, "HTTP: the address %s: %s", host, gai_strerror(failed));
    server->listener =
        evconnlistener_new_bind(server->base, NULL, NULL, LEV_OPT_CLOSE_ON_FREE | LEV_OPT_REUSEABLE | LEV_OPT_CLOSE_ON_EXEC,
                                LISTEN_BACKLOG, found->ai_addr, (int)found->ai_addrlen);
    int reason = errno;
    freeaddrinfo(found);
    if (!server->listener)
        return moe_fail(err, MOE_UNAVAILABLE, "HTTP: cannot listen at %s port %d: %s", host, port, strerror(reason));
    evconnlistener_set_error_cb(server->listener, on_accept_error);
    if (!evhttp_bind_listener(server->http, server->listener)) {
        evconnlistener_free(server->listener);
        server->listener = NULL;
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "HTTP: out of memory");
    }
    /* Connections inherit it: tokens are sent as they come, not when the client has acknowledged those before. */
    int on = 1;
    setsockopt(evconnlistener_get_fd(server->listener), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    if (getsockname(evconnlistener_get_fd(server->listener), (struct sockaddr *)&bound, &size) != 0)
        return moe_fail(err, MOE_INTERNAL, "HTTP: getsockname: %s", strerror(errno));
    server->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                     : ((struct sockaddr_in *)&bound)->sin_port);
    return MOE_OK;
}

/* NULL: out of memory. evhttp then takes a plain one, to which a client's handshake is a bad request. */
static struct bufferevent *make_tls_bufferevent(struct event_base *base, moe_tls *tls) {
    moe_tls_session *session = moe_tls_session_new(tls);
    struct bufferevent *bev =
        session ? bufferevent_openssl_socket_new(base, -1, session, BUFFEREVENT_SSL_ACCEPTING, BEV_OPT_CLOSE_ON_FREE) : NULL;
    if (bev)
        bufferevent_openssl_set_allow_dirty_shutdown(bev, 1); /* clients often just close */
    else
        moe_tls_session_free(&session);
    return bev;
}

/* As evhttp would make it, but a request without end (a chunk's size line, say) stops being read at the limit. */
static struct bufferevent *make_bufferevent(struct event_base *base, void *arg) {
    moe_http_server *server = arg;
    struct bufferevent *bev = server->tls ? make_tls_bufferevent(base, server->tls) : bufferevent_socket_new(base, -1, 0);
    if (bev) bufferevent_setwatermark(bev, EV_READ, 0, MOE_HTTP_MAX_READ_BYTES + MOE_HTTP_MAX_HEADER_BYTES);
    return bev;
}

static void set_limits(struct evhttp *http) {
    evhttp_set_allowed_methods(http, EVHTTP_REQ_GET | EVHTTP_REQ_POST | EVHTTP_REQ_HEAD | EVHTTP_REQ_PUT | EVHTTP_REQ_DELETE |
                                         EVHTTP_REQ_OPTIONS | EVHTTP_REQ_TRACE | EVHTTP_REQ_CONNECT | EVHTTP_REQ_PATCH);
    evhttp_set_max_headers_size(http, MOE_HTTP_MAX_HEADER_BYTES);
    evhttp_set_max_body_size(http, MOE_HTTP_MAX_READ_BYTES);
    evhttp_set_timeout(http, MOE_HTTP_IDLE_TIMEOUT_S);
    evhttp_set_flags(http, EVHTTP_SERVER_LINGERING_CLOSE); /* so that a 413 is read before the connection is reset */
    evhttp_set_default_content_type(http, NULL);
}

static moe_status make_loop(moe_http_server *server, moe_error *err) {
    server->base = event_base_new();
    server->http = server->base ? evhttp_new(server->base) : NULL;
    server->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (!server->http || server->wake_fd < 0) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "HTTP: cannot make an event loop");
    server->wake_event = event_new(server->base, server->wake_fd, EV_READ | EV_PERSIST, on_wake, server);
    server->accept_again = evtimer_new(server->base, on_accept_again, server);
    if (!server->wake_event || !server->accept_again || event_add(server->wake_event, NULL) != 0)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "HTTP: cannot make an event");
    set_limits(server->http);
    evhttp_set_bevcb(server->http, make_bufferevent, server);
    evhttp_set_gencb(server->http, on_request, server);
    return MOE_OK;
}

/* Signals are the main thread's; SIGPIPE, which writing to a closed connection raises, is nobody's. */
static moe_status start_thread(moe_http_server *server, moe_error *err) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&server->thread, NULL, run_loop, server);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "HTTP: cannot start a thread: %s", strerror(failed));
    server->thread_runs = true;
    return MOE_OK;
}

static moe_status start(moe_http_server *server, const moe_http_config *config, moe_error *err) {
    server->inference = config->inference;
    server->vllm_metrics = config->vllm_metrics;
    server->cluster = config->cluster;
    server->started_s = moe_wall_clock_s();
    server->wake_fd = -1;
    if (config->api_key && config->api_key[0] && !(server->api_key = moe_strdup(config->api_key)))
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "HTTP: out of memory");
    moe_generation_queue_config queue = {
        .inference = config->inference, .on_output = moe_http_on_output, .wake = wake, .wake_ctx = server};
    const char *key = config->ssl_keyfile ? config->ssl_keyfile : config->ssl_certfile;
    moe_status status = config->ssl_certfile ? moe_tls_server(config->ssl_certfile, key, &server->tls, err) : MOE_OK;
    if (status == MOE_OK) status = make_loop(server, err);
    if (status == MOE_OK) status = moe_generation_queue_new(&queue, &server->queue, err);
    if (status == MOE_OK) status = listen_at(server, config->host, config->port, err);
    if (status == MOE_OK) status = start_thread(server, err);
    return status;
}

moe_status moe_http_server_start(const moe_http_config *config, moe_http_server **out, moe_error *err) {
    *out = moe_calloc(1, sizeof **out);
    if (!*out) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "HTTP: out of memory");
    moe_status status = start(*out, config, err);
    if (status != MOE_OK) moe_http_server_stop(out);
    return status;
}

int moe_http_server_port(const moe_http_server *server) { return server->port; }
void moe_http_server_drain(moe_http_server *server) { atomic_store(&server->draining, true); }
int moe_http_server_in_flight(const moe_http_server *server) { return atomic_load(&server->in_flight); }

void moe_http_server_stop(moe_http_server **server) {
    moe_http_server *s = *server;
    *server = NULL;
    if (!s) return;
    if (s->thread_runs) {
        atomic_store(&s->stopping, true);
        wake(s);
        pthread_join(s->thread, NULL);
    }
    if (s->http) evhttp_free(s->http); /* closes every connection, which cancels what its client waited for */
    moe_generation_queue_free(&s->queue);
    if (s->wake_event) event_free(s->wake_event);
    if (s->accept_again) event_free(s->accept_again);
    if (s->base) event_base_free(s->base);
    if (s->wake_fd >= 0) close(s->wake_fd);
    moe_tls_free(&s->tls);
    moe_free(s->api_key);
    moe_free(s);
}
