#include "cli/http_client.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/tls.h"

#define MAX_HOST_BYTES 256
#define READ_BYTES 16384

typedef struct target {
    bool tls;
    char host[MAX_HOST_BYTES], port[8];
    const char *prefix; /* path of the URL, without a trailing slash */
    int prefix_bytes;
} target;

typedef struct connection {
    int fd;
    moe_tls_session *session; /* NULL: plain */
} connection;

/* How the end of a body is known. */
typedef enum framing { UNTIL_CLOSE, BY_LENGTH, CHUNKED } framing;

typedef struct answer {
    int status;
    framing framing;
    size_t left; /* bytes of the body (BY_LENGTH) or of the chunk (CHUNKED) still to come */
    bool in_chunk, ended;
    moe_buf pending; /* received and not yet used */
    size_t collected;
} answer;

/* ---- URL ---- */

static moe_status bad_url(const char *url, moe_error *err) {
    return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is not a URL of the form http://host:port or https://host:port", url);
}

static moe_status parse_url(const char *url, target *out, moe_error *err) {
    static const char *const schemes[] = {"http://", "https://"};
    out->tls = strncasecmp(url, schemes[1], strlen(schemes[1])) == 0;
    const char *scheme = schemes[out->tls], *at = url + strlen(scheme);
    if (strncasecmp(url, scheme, strlen(scheme)) != 0) return bad_url(url, err);
    bool bracketed = *at == '['; /* an IPv6 address */
    at += bracketed;
    size_t host = strcspn(at, bracketed ? "]" : ":/");
    if (host == 0 || host >= sizeof out->host || (bracketed && at[host] != ']')) return bad_url(url, err);
    memcpy(out->host, at, host);
    out->host[host] = '\0';
    at += host + bracketed;
    size_t digits = *at == ':' ? strspn(at + 1, "0123456789") : 0;
    if (digits >= sizeof out->port - 1) return bad_url(url, err);
    snprintf(out->port, sizeof out->port, "%d", out->tls ? 443 : 80);
    if (digits > 0) {
        memcpy(out->port, at + 1, digits);
        out->port[digits] = '\0';
        at += 1 + digits;
    }
    if (*at != '\0' && *at != '/') return bad_url(url, err);
    out->prefix = at;
    out->prefix_bytes = (int)strlen(at);
    while (out->prefix_bytes > 0 && at[out->prefix_bytes - 1] == '/') out->prefix_bytes--;
    return MOE_OK;
}

/* ---- socket ---- */

/* Waits until fd is ready for `events`. */
static moe_status await(const moe_http_call *call, int fd, short events, moe_error *err) {
    const moe_clock *clock = moe_clock_real();
    int64_t deadline_ns = moe_now_ns(clock) + call->silence_ns;
    for (;;) {
        struct pollfd fds[2] = {{fd, events, 0}, {call->cancel_fd, POLLIN, 0}};
        int64_t left_ns = deadline_ns - moe_now_ns(clock);
        int ready = left_ns <= 0 ? 0 : poll(fds, 2, (int)(left_ns / MOE_NS_PER_MS + 1));
        if (ready < 0 && errno != EINTR) return moe_fail(err, MOE_UNAVAILABLE, "poll: %s", strerror(errno));
        if (ready == 0)
            return moe_fail(err, MOE_DEADLINE_EXCEEDED, "%s: no answer in %lld s", call->url,
                            (long long)(call->silence_ns / MOE_NS_PER_S));
        if (ready > 0 && fds[1].revents) return moe_fail(err, MOE_CANCELLED, "cancelled");
        if (ready > 0 && fds[0].revents) return MOE_OK;
    }
}

static moe_status finish_connect(const moe_http_call *call, int fd, moe_error *err) {
    int failure = 0;
    socklen_t size = sizeof failure;
    moe_status status = await(call, fd, POLLOUT, err);
    if (status != MOE_OK) return status;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &size) != 0) failure = errno;
    if (failure) return moe_fail(err, MOE_UNAVAILABLE, "cannot connect to %s: %s", call->url, strerror(failure));
    return MOE_OK;
}

static moe_status connect_one(const moe_http_call *call, const struct addrinfo *address, int *out, moe_error *err) {
    int fd = socket(address->ai_family, address->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, address->ai_protocol);
    if (fd < 0) return moe_fail(err, MOE_UNAVAILABLE, "socket: %s", strerror(errno));
    moe_status status = MOE_OK;
    if (connect(fd, address->ai_addr, address->ai_addrlen) != 0)
        status = errno == EINPROGRESS ? finish_connect(call, fd, err)
                                      : moe_fail(err, MOE_UNAVAILABLE, "cannot connect to %s: %s", call->url, strerror(errno));
    if (status == MOE_OK)
        *out = fd;
    else
        close(fd);
    return status;
}

static moe_status connect_to(const moe_http_call *call, const target *to, int *fd, moe_error *err) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *addresses = NULL;
    int failure = getaddrinfo(to->host, to->port, &hints, &addresses);
    if (failure) return moe_fail(err, MOE_UNAVAILABLE, "%s: %s", to->host, gai_strerror(failure));
    moe_status status = MOE_UNAVAILABLE;
    for (const struct addrinfo *a = addresses; a && status == MOE_UNAVAILABLE; a = a->ai_next)
        status = connect_one(call, a, fd, err);
    freeaddrinfo(addresses);
    return status;
}

/* send and recv of either kind: bytes, 0 at the end, or -1: with *wait the events to wait for, else with *err. */
static ssize_t plain_outcome(const moe_http_call *call, ssize_t done, short events, short *wait, moe_error *err) {
    *wait = done < 0 && (errno == EAGAIN || errno == EINTR) ? events : 0;
    if (done < 0 && !*wait) moe_fail(err, MOE_UNAVAILABLE, "%s: %s", call->url, strerror(errno));
    return done;
}

static ssize_t send_some(const moe_http_call *call, const connection *c, const char *data, size_t size, short *wait, moe_error *err) {
    if (c->session) return moe_tls_send(c->session, data, size, wait, err);
    return plain_outcome(call, send(c->fd, data, size, MSG_NOSIGNAL), POLLOUT, wait, err);
}

static ssize_t receive_some(const moe_http_call *call, const connection *c, char *data, size_t size, short *wait, moe_error *err) {
    if (c->session) return moe_tls_recv(c->session, data, size, wait, err);
    return plain_outcome(call, recv(c->fd, data, size, 0), POLLIN, wait, err);
}

static moe_status send_all(const moe_http_call *call, const connection *c, const moe_buf *text, moe_error *err) {
    for (size_t at = 0; at < text->size;) {
        short wait;
        ssize_t sent = send_some(call, c, text->data + at, text->size - at, &wait, err);
        if (sent < 0 && !wait) return err->code;
        if (sent == 0) return moe_fail(err, MOE_UNAVAILABLE, "%s closed the connection", call->url);
        if (sent > 0) at += (size_t)sent;
        moe_status status = wait ? await(call, c->fd, wait, err) : MOE_OK;
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}

/* Appends what has come to `pending`; *closed at the end of the connection. */
static moe_status receive(const moe_http_call *call, const connection *c, moe_buf *pending, bool *closed, moe_error *err) {
    char block[READ_BYTES];
    for (;;) {
        short wait;
        ssize_t got = receive_some(call, c, block, sizeof block, &wait, err);
        if (got < 0 && !wait) return err->code;
        moe_status status = wait ? await(call, c->fd, wait, err) : MOE_OK;
        if (status != MOE_OK) return status;
        if (wait) continue;
        *closed = got == 0;
        moe_buf_append(pending, block, (size_t)got);
        return pending->failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory") : MOE_OK;
    }
}

/* ---- the answer ---- */

static void drop_front(moe_buf *buf, size_t size) {
    if (size) memmove(buf->data, buf->data + size, buf->size - size + 1); /* and the NUL */
    buf->size -= size;
}

static moe_status not_http(const moe_http_call *call, const char *what, moe_error *err) {
    return moe_fail(err, MOE_DATA_LOSS, "%s does not answer in HTTP: %s", call->url, what);
}

/* A number in the base without sign or blanks, ended by one of `ends`. */
static bool parse_size(const char *text, int base, const char *ends, size_t *out) {
    char *end;
    if (!strchr("0123456789abcdefABCDEF", *text) || !*text) return false;
    errno = 0;
    unsigned long long value = strtoull(text, &end, base);
    *out = (size_t)value;
    return errno == 0 && value <= SIZE_MAX / 2 && strchr(ends, *end);
}

static moe_status read_header(const moe_http_call *call, const char *line, answer *a, moe_error *err) {
    static const char length[] = "content-length:", encoding[] = "transfer-encoding:";
    if (strncasecmp(line, length, sizeof length - 1) == 0 && a->framing != CHUNKED) {
        const char *digits = line + sizeof length - 1;
        digits += strspn(digits, " \t");
        if (!parse_size(digits, 10, "\r \t", &a->left)) return not_http(call, "a bad Content-Length", err);
        a->framing = BY_LENGTH;
    } else if (strncasecmp(line, encoding, sizeof encoding - 1) == 0) {
        if (!strcasestr(line, "chunked")) return not_http(call, "an unknown Transfer-Encoding", err);
        a->framing = CHUNKED;
        a->left = 0;
    }
    return MOE_OK;
}

/* Takes the status line and headers from `pending` once they are whole; status stays 0 until then. */
static moe_status read_head(const moe_http_call *call, answer *a, moe_error *err) {
    const char *end = a->pending.size ? strstr(a->pending.data, "\r\n\r\n") : NULL;
    if (!end) {
        bool bad = a->pending.size >= 5 && strncmp(a->pending.data, "HTTP/", 5) != 0;
        if (bad || a->pending.size > MOE_HTTP_CLIENT_MAX_HEAD_BYTES)
            return not_http(call, bad ? "another protocol" : "too long a head", err);
        return MOE_OK;
    }
    size_t number;
    const char *blank = strncmp(a->pending.data, "HTTP/1.", 7) == 0 ? strchr(a->pending.data, ' ') : NULL;
    if (!blank || blank > end || !parse_size(blank + 1, 10, " \r", &number) || number < 100 || number > 599)
        return not_http(call, "a bad status line", err);
    moe_status status = MOE_OK;
    for (const char *line = strstr(a->pending.data, "\r\n"); status == MOE_OK && line < end; line = strstr(line + 2, "\r\n"))
        status = read_header(call, line + 2, a, err);
    a->status = number >= 200 ? (int)number : 0; /* 1xx: another head follows */
    drop_front(&a->pending, (size_t)(end - a->pending.data) + 4);
    return status;
}

static moe_status deliver(const moe_http_call *call, answer *a, size_t size, moe_buf *body, moe_error *err) {
    moe_status status = MOE_OK;
    if (call->on_data && a->status == 200) {
        status = call->on_data(call->ctx, a->pending.data, size, err);
    } else if (size > MOE_HTTP_CLIENT_MAX_BODY_BYTES - a->collected) {
        status =
            moe_fail(err, MOE_DATA_LOSS, "%s: the answer is longer than %zu bytes", call->url, MOE_HTTP_CLIENT_MAX_BODY_BYTES);
    } else {
        moe_buf_append(body, a->pending.data, size);
        a->collected += size;
        if (body->failed) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    drop_front(&a->pending, size);
    return status;
}

/* "1f4\r\n" before each chunk, "\r\n" behind it; *more is false until enough has come. */
static moe_status read_chunk_line(const moe_http_call *call, answer *a, bool *more, moe_error *err) {
    const char *end = a->pending.size ? strstr(a->pending.data, "\r\n") : NULL;
    *more = end != NULL;
    if (!end) return a->pending.size > MOE_HTTP_CLIENT_MAX_HEAD_BYTES ? not_http(call, "a bad chunk", err) : MOE_OK;
    if (a->in_chunk) { /* the line break behind the chunk */
        if (end != a->pending.data) return not_http(call, "a bad chunk", err);
        a->in_chunk = false;
    } else {
        if (!parse_size(a->pending.data, 16, "\r; \t", &a->left)) return not_http(call, "a bad chunk size", err);
        a->in_chunk = true;
        a->ended = a->left == 0;
    }
    drop_front(&a->pending, (size_t)(end - a->pending.data) + 2);
    return MOE_OK;
}

/* Uses up what is pending. */
static moe_status read_body(const moe_http_call *call, answer *a, moe_buf *body, moe_error *err) {
    moe_status status = MOE_OK;
    for (bool more = true; more && !a->ended && status == MOE_OK;) {
        size_t size = a->pending.size;
        if (a->framing != UNTIL_CLOSE && size > a->left) size = a->left;
        if (size > 0) {
            status = deliver(call, a, size, body, err);
            if (a->framing != UNTIL_CLOSE) a->left -= size;
        } else if (a->framing == CHUNKED && a->left == 0) {
            status = read_chunk_line(call, a, &more, err);
        } else {
            more = false;
        }
        if (a->framing == BY_LENGTH && a->left == 0) a->ended = true;
    }
    return status;
}

static moe_status read_answer(const moe_http_call *call, const connection *c, int *http_status, moe_buf *body, moe_error *err) {
    answer a = {0};
    moe_status status = MOE_OK;
    for (bool closed = false; !a.ended && status == MOE_OK;) {
        status = receive(call, c, &a.pending, &closed, err);
        if (status == MOE_OK && a.status == 0) status = read_head(call, &a, err);
        *http_status = a.status;
        if (status == MOE_OK && a.status != 0) status = read_body(call, &a, body, err);
        if (status != MOE_OK || !closed || a.ended) continue;
        if (a.status == 0 || a.framing != UNTIL_CLOSE)
            status = moe_fail(err, MOE_UNAVAILABLE, "%s closed the connection before the end of its answer", call->url);
        break;
    }
    moe_buf_free(&a.pending);
    return status;
}

static void write_request(const moe_http_call *call, const target *to, moe_buf *out) {
    bool ipv6 = strchr(to->host, ':') != NULL;
    moe_buf_printf(out, "%s %.*s%s HTTP/1.1\r\nHost: %s%s%s:%s\r\nConnection: close\r\nUser-Agent: moesaic/%s\r\n",
                   call->body ? "POST" : "GET", to->prefix_bytes, to->prefix, call->path, ipv6 ? "[" : "", to->host,
                   ipv6 ? "]" : "", to->port, MOESAIC_VERSION);
    if (call->key) moe_buf_printf(out, "Authorization: Bearer %s\r\n", call->key);
    if (call->body) moe_buf_printf(out, "Content-Type: application/json\r\nContent-Length: %zu\r\n", strlen(call->body));
    moe_buf_append_text(out, "\r\n");
    if (call->body) moe_buf_append_text(out, call->body);
}

static moe_status open_connection(const moe_http_call *call, const target *to, connection *c, moe_error *err) {
    moe_tls *tls = NULL;
    if (to->tls) signal(SIGPIPE, SIG_IGN); /* OpenSSL's writes raise it where the server has gone */
    moe_status status = to->tls ? moe_tls_client(call->ca_file, &tls, err) : MOE_OK;
    if (status == MOE_OK) status = connect_to(call, to, &c->fd, err);
    if (status == MOE_OK && tls) status = moe_tls_connect(tls, c->fd, call->any_host ? NULL : to->host, &c->session, err);
    moe_tls_free(&tls);
    return status;
}

moe_status moe_http_run(const moe_http_call *call, int *http_status, moe_buf *body, moe_error *err) {
    target to;
    connection c = {.fd = -1};
    moe_buf request = {0};
    *http_status = 0;
    moe_status status = parse_url(call->url, &to, err);
    if (status != MOE_OK) return status;
    write_request(call, &to, &request);
    if (request.failed) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (status == MOE_OK) status = open_connection(call, &to, &c, err);
    if (status == MOE_OK) status = send_all(call, &c, &request, err);
    if (status == MOE_OK) status = read_answer(call, &c, http_status, body, err);
    moe_tls_session_free(&c.session);
    if (c.fd >= 0) close(c.fd);
    moe_buf_free(&request);
    return status;
}

void moe_http_error_text(const char *body, char *out, size_t size) {
    json_t *root = json_loads(body, 0, NULL);
    const char *message = json_string_value(json_object_get(json_object_get(root, "error"), "message"));
    snprintf(out, size, "%s", message ? message : body);
    json_decref(root);
}
