/* One HTTP request and its reply, on the server's thread. Made for every request; gone when the reply was written out or the
 * client went away, whichever comes first.
 *
 * A handler answers with exactly one of: moe_http_reply*, or moe_http_stream_begin … moe_http_stream_end, or moe_http_abort; at
 * once or later. One that answers later sets `on_gone`, which is called when the client goes away before that, and after which
 * the exchange must not be touched. */
#pragma once
#include <event2/http.h>

#include "common/buf.h"
#include "router/http/http_error.h"
#include "router/http/server.h"

#define MOE_HTTP_REQUEST_ID_BYTES 129
#define MOE_HTTP_MAX_BODY_BYTES (INT64_C(8) << 20)  /* of a request: beyond it, 413 */
#define MOE_HTTP_MAX_READ_BYTES (INT64_C(32) << 20) /* beyond it the connection's own 413, before the body was read */
#define MOE_HTTP_MAX_HEADER_BYTES (64 * 1024)
#define MOE_HTTP_MAX_UNREAD_BYTES (64 * 1024)        /* pipelined behind a request being served; then reading pauses */
#define MOE_HTTP_MAX_UNSENT_BYTES (INT64_C(8) << 20) /* of a streamed reply, not taken by a slow reader; then it is cut off */
#define MOE_HTTP_IDLE_TIMEOUT_S 60                   /* a connection without a request, or with an unfinished one */
#define MOE_HTTP_WRITE_TIMEOUT_S 60                  /* a reader that takes nothing */

typedef struct moe_http_exchange {
    moe_http_server *server;
    struct evhttp_request *request;
    char request_id[MOE_HTTP_REQUEST_ID_BYTES];
    bool replied;   /* nothing more will be added to the reply */
    bool streaming; /* its head was sent */
    void *owner;    /* the handler's */
    void (*on_gone)(struct moe_http_exchange *exchange);
    struct moe_http_exchange *previous, *next; /* the server's list of open exchanges */
} moe_http_exchange;

/* Takes a request that evhttp read completely: watches for the client going away, sets x-request-id. NULL (and the connection is
 * closed) when out of memory. */
moe_http_exchange *moe_http_exchange_new(moe_http_server *server, struct evhttp_request *request);

/* The request's body as text (borrowed until the reply), or 413. */
bool moe_http_body(moe_http_exchange *exchange, const char **text, size_t *size, moe_http_error *error);

void moe_http_reply(moe_http_exchange *exchange, int status, const char *content_type, const void *body, size_t size);
/* Steals the reference to `json`; NULL means out of memory and is answered so. */
void moe_http_reply_json(moe_http_exchange *exchange, int status, json_t *json);
void moe_http_reply_error(moe_http_exchange *exchange, const moe_http_error *error);
void moe_http_add_header(moe_http_exchange *exchange, const char *name, const char *value); /* before the reply */

/* Streaming. `add` returns false when the exchange is gone: the reader was too slow and was cut off, on_gone was called. */
void moe_http_stream_begin(moe_http_exchange *exchange, const char *content_type);
bool moe_http_stream_add(moe_http_exchange *exchange, const void *data, size_t size);
void moe_http_stream_end(moe_http_exchange *exchange);

/* Closes the connection without (the rest of) a reply; the exchange is gone. `cut_off` calls on_gone first, `abort` does not. */
void moe_http_cut_off(moe_http_exchange *exchange);
void moe_http_abort(moe_http_exchange *exchange);
