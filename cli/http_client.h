/* The HTTP client of `moesaic status` and `moesaic chat`: one request a connection, blocking, bounded. */
#pragma once
#include "common/buf.h"
#include "common/status.h"

#define MOE_HTTP_CLIENT_MAX_HEAD_BYTES ((size_t)64 << 10)
#define MOE_HTTP_CLIENT_MAX_BODY_BYTES ((size_t)64 << 20) /* of an answer that is collected */

typedef struct moe_http_call {
    const char *url;    /* "http[s]://host[:port]", a path behind it is put before `path` */
    const char *ca_file; /* https: as of moe_tls_client */
    bool any_host;      /* https: a trusted certificate is enough, whichever host it names */
    const char *path;   /* "/v1/models" */
    const char *key;    /* sent as a Bearer token; NULL: none */
    const char *body;   /* JSON to POST; NULL: GET */
    int64_t silence_ns; /* longest wait for a connection and for each next byte */
    int cancel_fd;      /* the call ends with CANCELLED once it is readable; -1: none */
    /* Receives the body of a 200 answer as it comes (borrowed); another status than OK ends the call with it. NULL: collect it.
     */
    moe_status (*on_data)(void *ctx, const char *data, size_t size, moe_error *err);
    void *ctx;
} moe_http_call;

/* *http_status is set once an answer began. `body` receives what on_data does not. UNAVAILABLE: nobody there, or the connection
 * broke; DEADLINE_EXCEEDED; CANCELLED; INVALID_ARGUMENT: the URL; DATA_LOSS: not HTTP, or too long; UNAUTHENTICATED: the server's
 * certificate; errors of moe_tls_client. Any thread. */
moe_status moe_http_run(const moe_http_call *call, int *http_status, moe_buf *body, moe_error *err);

/* The text of an OpenAI error body, or the whole body where it is none; into out (cut to fit). */
void moe_http_error_text(const char *body, char *out, size_t size);
