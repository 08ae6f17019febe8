#include "router/http/exchange.h"

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/http_struct.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/random.h"
#include "router/http/json_text.h"
#include "router/http/server_internal.h"

static struct bufferevent *bufferevent_of(const moe_http_exchange *exchange) {
    return evhttp_connection_get_bufferevent(evhttp_request_get_connection(exchange->request));
}

static void free_exchange(moe_http_exchange *exchange) {
    moe_http_server *server = exchange->server;
    if (exchange->previous)
        exchange->previous->next = exchange->next;
    else
        server->open = exchange->next;
    if (exchange->next) exchange->next->previous = exchange->previous;
    atomic_fetch_sub(&server->in_flight, 1);
    moe_free(exchange);
}

/* The connection goes down before the reply was written out. */
static void on_close(struct evhttp_connection *connection, void *arg) {
    (void)connection;
    moe_http_exchange *exchange = arg;
    struct evhttp_request *request = exchange->request;
    /* evhttp takes a request that is not answered yet off its dying connection and leaves it to us. */
    bool orphaned = !evhttp_request_get_connection(request);
    if (exchange->on_gone && !exchange->replied) exchange->on_gone(exchange);
    free_exchange(exchange);
    if (orphaned) evhttp_request_free(request);
}

/* What evhttp expects of a connection between two requests. */
static void watch_for_requests(struct bufferevent *bev) {
    struct timeval idle = {.tv_sec = MOE_HTTP_IDLE_TIMEOUT_S}, stalled = {.tv_sec = MOE_HTTP_WRITE_TIMEOUT_S};
    bufferevent_set_timeouts(bev, &idle, &stalled);
    bufferevent_setwatermark(bev, EV_READ, 0, MOE_HTTP_MAX_READ_BYTES + MOE_HTTP_MAX_HEADER_BYTES);
}

/* evhttp stops reading while a request is served, and so would not notice that the client left. We read on, without its read
 * callback (which aborts the process on data in this state): data stays in the buffer for the next request, an end of file
 * reaches evhttp's event callback, which closes the connection. Nothing to read is no reason for a time-out meanwhile. */
static void watch_for_close(struct bufferevent *bev) {
    bufferevent_data_cb on_read, on_write;
    bufferevent_event_cb on_event;
    void *arg;
    struct timeval stalled = {.tv_sec = MOE_HTTP_WRITE_TIMEOUT_S};
    bufferevent_getcb(bev, &on_read, &on_write, &on_event, &arg);
    bufferevent_setcb(bev, NULL, on_write, on_event, arg);
    bufferevent_set_timeouts(bev, NULL, &stalled);
    bufferevent_setwatermark(bev, EV_READ, 0, MOE_HTTP_MAX_UNREAD_BYTES);
    bufferevent_enable(bev, EV_READ);
}

static void on_written(struct evhttp_request *request, void *arg) {
    moe_http_exchange *exchange = arg;
    struct evhttp_connection *connection = evhttp_request_get_connection(request);
    evhttp_connection_set_closecb(connection, NULL, NULL);
    watch_for_requests(evhttp_connection_get_bufferevent(connection));
    free_exchange(exchange);
}

/* The client's x-request-id where it is printable ASCII of a decent length, else one of ours. */
static void set_request_id(moe_http_exchange *exchange) {
    const char *given = evhttp_find_header(evhttp_request_get_input_headers(exchange->request), "x-request-id");
    size_t size = given ? strlen(given) : 0;
    bool good = size > 0 && size < sizeof exchange->request_id;
    for (size_t i = 0; good && i < size; i++) good = given[i] > 0x20 && given[i] < 0x7f;
    if (good)
        memcpy(exchange->request_id, given, size + 1);
    else
        snprintf(exchange->request_id, sizeof exchange->request_id, "req-%016llx%016llx",
                 (unsigned long long)moe_random_identity(), (unsigned long long)moe_random_identity());
    moe_http_add_header(exchange, "x-request-id", exchange->request_id);
}

moe_http_exchange *moe_http_exchange_new(moe_http_server *server, struct evhttp_request *request) {
    struct evhttp_connection *connection = evhttp_request_get_connection(request);
    moe_http_exchange *exchange = moe_calloc(1, sizeof *exchange);
    if (!exchange) {
        evhttp_connection_free(connection);
        return NULL;
    }
    exchange->server = server;
    exchange->request = request;
    exchange->next = server->open;
    if (server->open) server->open->previous = exchange;
    server->open = exchange;
    atomic_fetch_add(&server->in_flight, 1);
    evhttp_connection_set_closecb(connection, on_close, exchange);
    evhttp_request_set_on_complete_cb(request, on_written, exchange);
    watch_for_close(evhttp_connection_get_bufferevent(connection));
    set_request_id(exchange);
    return exchange;
}

bool moe_http_body(moe_http_exchange *exchange, const char **text, size_t *size, moe_http_error *error) {
    struct evbuffer *body = evhttp_request_get_input_buffer(exchange->request);
    *size = evbuffer_get_length(body);
    *text = "";
    if (*size > MOE_HTTP_MAX_BODY_BYTES)
        return moe_http_fail(error, 413, "request_too_large", NULL, "The request body has %zu bytes; the limit is %lld.", *size,
                             (long long)MOE_HTTP_MAX_BODY_BYTES);
    if (*size && !(*text = (const char *)evbuffer_pullup(body, -1))) return moe_http_fail_memory(error);
    return true;
}

void moe_http_add_header(moe_http_exchange *exchange, const char *name, const char *value) {
    evhttp_add_header(evhttp_request_get_output_headers(exchange->request), name, value);
}

void moe_http_reply(moe_http_exchange *exchange, int status, const char *content_type, const void *body, size_t size) {
    bool head = evhttp_request_get_command(exchange->request) == EVHTTP_REQ_HEAD;
    struct evbuffer *buffer = evbuffer_new();
    if (!buffer || (size && !head && evbuffer_add(buffer, body, size) != 0)) {
        if (buffer) evbuffer_free(buffer);
        moe_http_abort(exchange);
        return;
    }
    if (content_type) moe_http_add_header(exchange, "Content-Type", content_type);
    if (head) { /* evhttp leaves it out where it sends no body */
        char length[32];
        snprintf(length, sizeof length, "%zu", size);
        moe_http_add_header(exchange, "Content-Length", length);
    }
    exchange->replied = true;
    /* evhttp knows the other phrases */
    evhttp_send_reply(exchange->request, status, status == 429 ? "Too Many Requests" : NULL, buffer);
    evbuffer_free(buffer);
}

void moe_http_reply_json(moe_http_exchange *exchange, int status, json_t *json) {
    static const char no_memory[] =
        "{\"error\":{\"message\":\"The server is out of "
        "memory.\",\"type\":\"server_error\",\"param\":null,\"code\":\"out_of_memory\"}}";
    moe_buf text = {0};
    if (moe_json_append(&text, json))
        moe_http_reply(exchange, status, "application/json", text.data, text.size);
    else
        moe_http_reply(exchange, 500, "application/json", no_memory, strlen(no_memory));
    json_decref(json);
    moe_buf_free(&text);
}

void moe_http_reply_error(moe_http_exchange *exchange, const moe_http_error *error) {
    if (error->http_status == 429 || error->http_status == 503)
        moe_http_add_header(exchange, "Retry-After", MOE_HTTP_RETRY_AFTER_S);
    moe_http_reply_json(exchange, error->http_status, moe_http_error_json(error));
}

void moe_http_stream_begin(moe_http_exchange *exchange, const char *content_type) {
    /* An HTTP/1.0 client gets the stream up to the end of the connection; evhttp would promise "Content-Length: 0" if it asked
     * for keep-alive. */
    if (exchange->request->minor == 0) evhttp_remove_header(evhttp_request_get_input_headers(exchange->request), "Connection");
    moe_http_add_header(exchange, "Content-Type", content_type);
    moe_http_add_header(exchange, "Cache-Control", "no-cache");
    exchange->streaming = true;
    evhttp_send_reply_start(exchange->request, 200, NULL);
}

bool moe_http_stream_add(moe_http_exchange *exchange, const void *data, size_t size) {
    struct evbuffer *buffer = evbuffer_new();
    bool added = buffer && evbuffer_add(buffer, data, size) == 0;
    if (added) {
        evhttp_send_reply_chunk(exchange->request, buffer);
        added = evbuffer_get_length(bufferevent_get_output(bufferevent_of(exchange))) <= MOE_HTTP_MAX_UNSENT_BYTES;
    }
    if (buffer) evbuffer_free(buffer);
    if (!added) moe_http_cut_off(exchange);
    return added;
}

void moe_http_stream_end(moe_http_exchange *exchange) {
    exchange->replied = true;
    evhttp_send_reply_end(exchange->request);
}

void moe_http_cut_off(moe_http_exchange *exchange) {
    evhttp_connection_free(evhttp_request_get_connection(exchange->request)); /* calls on_close */
}

void moe_http_abort(moe_http_exchange *exchange) {
    exchange->on_gone = NULL;
    moe_http_cut_off(exchange);
}
