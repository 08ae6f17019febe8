#include "common/redis/redis_connection.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "common/alloc.h"

#define MAX_PASSWORD_BYTES 1024

static moe_status parse_address(moe_redis_connection *c, const char *address, moe_error *err) {
    if (strncmp(address, "unix:", 5) == 0 && address[5] == '/') {
        c->host = moe_strdup(address + 5);
    } else {
        const char *colon = strrchr(address, ':');
        char *end = NULL;
        long port = colon ? strtol(colon + 1, &end, 10) : 0;
        if (!colon || colon == address || *end || port < 1 || port > 65535) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "Redis address \"%s\": expected unix:/path or host:port", address);
        }
        bool bracketed = address[0] == '[' && colon > address + 2 && colon[-1] == ']';
        c->host = moe_strndup(address + bracketed, (size_t)(colon - address) - 2 * bracketed);
        c->port = (int)port;
    }
    return c->host ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
}

moe_status moe_redis_connection_init(moe_redis_connection *c, const moe_redis_config *config, moe_error *err) {
    *c = (moe_redis_connection){.timeout_ns = config->timeout_ms * MOE_NS_PER_MS};
    if (config->timeout_ms <= 0) return moe_fail(err, MOE_INVALID_ARGUMENT, "the Redis time-out must be positive");
    moe_status status = parse_address(c, config->address, err);
    if (status) return status;
    if (config->username) c->username = moe_strdup(config->username);
    if (config->password_file) c->password_file = moe_strdup(config->password_file);
    if ((config->username && !c->username) || (config->password_file && !c->password_file)) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    }
    return MOE_OK;
}

static void disconnect(moe_redis_connection *c) {
    if (c->context) redisFree(c->context);
    c->context = NULL;
    moe_buf_clear(&c->batch);
}

void moe_redis_connection_close(moe_redis_connection *c) {
    disconnect(c);
    moe_buf_free(&c->batch);
    moe_free(c->host);
    moe_free(c->username);
    moe_free(c->password_file);
    *c = (moe_redis_connection){0};
}

moe_status moe_redis_give_up(moe_redis_connection *c, moe_status status) {
    disconnect(c);
    int64_t doubled = 2 * c->backoff_ns;
    c->backoff_ns = doubled < MOE_REDIS_FIRST_BACKOFF_NS ? MOE_REDIS_FIRST_BACKOFF_NS
                    : doubled > MOE_REDIS_MAX_BACKOFF_NS ? MOE_REDIS_MAX_BACKOFF_NS
                                                         : doubled;
    c->retry_at_ns = moe_now_ns(moe_clock_real()) + c->backoff_ns;
    return status;
}

void moe_redis_queue(moe_redis_connection *c, const moe_redis_argument *arguments, int num_arguments) {
    MOE_ASSERT(num_arguments <= MOE_REDIS_MAX_ARGUMENTS);
    moe_buf_printf(&c->batch, "*%d\r\n", num_arguments);
    for (int i = 0; i < num_arguments; i++) {
        moe_buf_printf(&c->batch, "$%zu\r\n", arguments[i].size);
        moe_buf_append(&c->batch, arguments[i].data, arguments[i].size);
        moe_buf_append(&c->batch, "\r\n", 2);
    }
}

/* Not redisBufferWrite: it raises SIGPIPE where the server has gone. */
static moe_status send_all(moe_redis_connection *c, const char *data, size_t size, moe_error *err) {
    int64_t deadline = moe_now_ns(moe_clock_real()) + c->timeout_ns;
    while (size) {
        ssize_t sent = send(c->context->fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: sending failed: %s", c->host, strerror(errno));
        }
        if (sent > 0) {
            data += sent;
            size -= (size_t)sent;
        }
        if (size && moe_now_ns(moe_clock_real()) >= deadline) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: sending timed out", c->host);
        }
    }
    return MOE_OK;
}

/* Until a whole reply is there; hiredis's own loop has neither a total deadline nor a bound on the size. */
static moe_status read_reply(moe_redis_connection *c, redisReply **out, moe_error *err) {
    int64_t deadline = moe_now_ns(moe_clock_real()) + c->timeout_ns;
    for (;;) {
        void *reply = NULL;
        if (redisGetReplyFromReader(c->context, &reply) != REDIS_OK) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: bad reply: %s", c->host, c->context->errstr);
        }
        if (reply) {
            *out = reply;
            return MOE_OK;
        }
        if (c->context->reader->len > (size_t)MOE_REDIS_MAX_REPLY_BYTES) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: a reply above %lld bytes is refused", c->host,
                            (long long)MOE_REDIS_MAX_REPLY_BYTES);
        }
        if (moe_now_ns(moe_clock_real()) >= deadline) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: no reply within %lld ms", c->host,
                            (long long)(c->timeout_ns / MOE_NS_PER_MS));
        }
        if (redisBufferRead(c->context) != REDIS_OK) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: reading failed: %s", c->host, c->context->errstr);
        }
    }
}

static moe_status error_status(const char *text) {
    static const struct {
        const char *prefix;
        moe_status status;
    } table[] = {{"NOAUTH", MOE_UNAUTHENTICATED}, {"WRONGPASS", MOE_UNAUTHENTICATED}, {"NOPERM", MOE_PERMISSION_DENIED},
                 {"LOADING", MOE_UNAVAILABLE},    {"MASTERDOWN", MOE_UNAVAILABLE},    {"READONLY", MOE_UNAVAILABLE},
                 {"OOM", MOE_UNAVAILABLE},        {"BUSY", MOE_UNAVAILABLE},          {"CLUSTERDOWN", MOE_UNAVAILABLE},
                 {"MISCONF", MOE_UNAVAILABLE}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (strncmp(text, table[i].prefix, strlen(table[i].prefix)) == 0) return table[i].status;
    }
    return MOE_FAILED_PRECONDITION;
}

static moe_status check_reply(const moe_redis_connection *c, const redisReply *reply, int type, bool or_nil, moe_error *err) {
    if (reply->type == type || (or_nil && reply->type == REDIS_REPLY_NIL)) return MOE_OK;
    if (reply->type == REDIS_REPLY_ERROR) {
        return moe_fail(err, error_status(reply->str), "Redis at %s answered: %s", c->host, reply->str);
    }
    return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: a reply of type %d where %d was expected", c->host, reply->type, type);
}

moe_status moe_redis_receive(moe_redis_connection *c, int type, bool or_nil, redisReply **out, moe_error *err) {
    redisReply *reply;
    moe_status status = read_reply(c, &reply, err);
    if (!status && (status = check_reply(c, reply, type, or_nil, err))) freeReplyObject(reply);
    if (status) return moe_redis_give_up(c, status);
    *out = reply;
    return MOE_OK;
}

static moe_status read_password(const char *path, char password[MAX_PASSWORD_BYTES], moe_error *err) {
    FILE *file = fopen(path, "re");
    if (!file) return moe_fail(err, MOE_UNAUTHENTICATED, "Redis password file %s: %s", path, strerror(errno));
    bool read = fgets(password, MAX_PASSWORD_BYTES, file) != NULL;
    fclose(file);
    if (read) password[strcspn(password, "\r\n")] = '\0';
    if (!read || !password[0]) return moe_fail(err, MOE_UNAUTHENTICATED, "Redis password file %s: its first line is empty", path);
    return MOE_OK;
}

static moe_status authenticate(moe_redis_connection *c, moe_error *err) {
    char password[MAX_PASSWORD_BYTES];
    moe_status status = read_password(c->password_file, password, err);
    if (status) return status;
    moe_redis_argument arguments[3] = {{"AUTH", 4}};
    int n = 1;
    if (c->username) arguments[n++] = (moe_redis_argument){c->username, strlen(c->username)};
    arguments[n++] = (moe_redis_argument){password, strlen(password)};
    moe_buf commands = c->batch; /* what the caller has queued waits until we are let in */
    c->batch = (moe_buf){0};
    moe_redis_queue(c, arguments, n);
    status =
        c->batch.failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory") : send_all(c, c->batch.data, c->batch.size, err);
    explicit_bzero(password, sizeof password);
    if (c->batch.data) explicit_bzero(c->batch.data, c->batch.size);
    moe_buf_free(&c->batch);
    c->batch = commands;
    redisReply *reply;
    if (!status) status = read_reply(c, &reply, err);
    if (status) return status;
    status = check_reply(c, reply, REDIS_REPLY_STATUS, false, err);
    freeReplyObject(reply);
    return status;
}

/* A hostile count must not become an allocation. */
static void *create_bounded_array(const redisReadTask *task, int elements) {
    if (elements > MOE_REDIS_MAX_REPLY_ELEMENTS) return NULL;
    return ((const moe_redis_connection *)task->privdata)->create_array(task, elements);
}

static moe_status connect_now(moe_redis_connection *c, moe_error *err) {
    struct timeval timeout = {.tv_sec = c->timeout_ns / MOE_NS_PER_S, .tv_usec = c->timeout_ns % MOE_NS_PER_S / MOE_NS_PER_US};
    c->context = c->port ? redisConnectWithTimeout(c->host, c->port, timeout) : redisConnectUnixWithTimeout(c->host, timeout);
    if (!c->context) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (c->context->err || redisSetTimeout(c->context, timeout) != REDIS_OK) {
        return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: %s", c->host, c->context->errstr);
    }
    if (c->port) redisEnableKeepAlive(c->context);
    redisReader *reader = c->context->reader;
    c->reply_functions = *reader->fn;
    c->create_array = c->reply_functions.createArray;
    c->reply_functions.createArray = create_bounded_array;
    reader->fn = &c->reply_functions;
    reader->privdata = c;
    return c->password_file ? authenticate(c, err) : MOE_OK;
}

/* Reconnecting starts from scratch: redisReconnect would restore neither AUTH nor the functions above. */
static moe_status ensure_connected(moe_redis_connection *c, moe_error *err) {
    if (c->context) return MOE_OK;
    if (moe_now_ns(moe_clock_real()) < c->retry_at_ns) {
        moe_buf_clear(&c->batch);
        return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s did not answer; waiting before the next attempt", c->host);
    }
    moe_status status = connect_now(c, err);
    return status ? moe_redis_give_up(c, status) : MOE_OK;
}

moe_status moe_redis_send(moe_redis_connection *c, moe_error *err) {
    moe_status status = ensure_connected(c, err);
    if (status) return status;
    status = c->batch.failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a Redis command")
                             : send_all(c, c->batch.data, c->batch.size, err);
    if (status) return moe_redis_give_up(c, status);
    moe_buf_clear(&c->batch);
    return MOE_OK;
}
