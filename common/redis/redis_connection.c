#include "common/redis/redis_connection.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "common/alloc.h"

#define MAX_PASSWORD_BYTES 1024
#define MAX_ADDRESS_BYTES 512
#define SENTINEL_SCHEME "sentinel://"

static moe_status parse_host(moe_redis_endpoint *out, const char *address, size_t length, moe_error *err) {
    char text[MAX_ADDRESS_BYTES];
    snprintf(text, sizeof text, "%.*s", (int)length, address);
    const char *colon = strrchr(text, ':');
    char *end = NULL;
    long port = colon ? strtol(colon + 1, &end, 10) : 0;
    if (length >= sizeof text || !colon || colon == text || *end || port < 1 || port > 65535)
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "Redis address \"%s\": expected unix:/path, host:port or sentinel://host:port,host:port/master", text);
    bool bracketed = text[0] == '[' && colon > text + 2 && colon[-1] == ']';
    out->host = moe_strndup(text + bracketed, (size_t)(colon - text) - 2 * bracketed);
    out->port = (int)port;
    return out->host ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
}

static moe_status parse_sentinels(moe_redis_connection *c, const char *list, moe_error *err) {
    const char *slash = strrchr(list, '/');
    if (!slash || !slash[1])
        return moe_fail(err, MOE_INVALID_ARGUMENT, "Redis address \"" SENTINEL_SCHEME "%s\": the master's name is missing", list);
    for (const char *at = list; at < slash;) {
        size_t length = strcspn(at, ",/");
        if (c->num_sentinels == MOE_REDIS_MAX_SENTINELS)
            return moe_fail(err, MOE_INVALID_ARGUMENT, "Redis address: more than %d sentinels", MOE_REDIS_MAX_SENTINELS);
        moe_status status = parse_host(&c->sentinels[c->num_sentinels++], at, length, err);
        if (status != MOE_OK) return status;
        at += length + (at[length] == ',');
    }
    if (c->num_sentinels == 0)
        return moe_fail(err, MOE_INVALID_ARGUMENT, "Redis address \"" SENTINEL_SCHEME "%s\": no sentinel is named", list);
    c->master = moe_strdup(slash + 1);
    c->server.host = moe_strdup(slash + 1); /* for messages, until it is known */
    return c->master && c->server.host ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
}

static moe_status parse_address(moe_redis_connection *c, const char *address, moe_error *err) {
    if (strncmp(address, SENTINEL_SCHEME, strlen(SENTINEL_SCHEME)) == 0)
        return parse_sentinels(c, address + strlen(SENTINEL_SCHEME), err);
    if (strncmp(address, "unix:", 5) != 0 || address[5] != '/') return parse_host(&c->server, address, strlen(address), err);
    c->server.host = moe_strdup(address + 5);
    return c->server.host ? MOE_OK : moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
}

moe_status moe_redis_connection_init(moe_redis_connection *c, const moe_redis_config *config, moe_error *err) {
    *c = (moe_redis_connection){.timeout_ns = config->timeout_ms * MOE_NS_PER_MS, .random = {moe_random_identity()}};
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

static void close_context(moe_redis_connection *c) {
    if (c->context) redisFree(c->context);
    c->context = NULL;
}

static void disconnect(moe_redis_connection *c) {
    close_context(c);
    moe_buf_clear(&c->batch);
}

void moe_redis_connection_close(moe_redis_connection *c) {
    disconnect(c);
    moe_buf_free(&c->batch);
    moe_free(c->server.host);
    for (int i = 0; i < c->num_sentinels; i++) moe_free(c->sentinels[i].host);
    moe_free(c->master);
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
    /* Half to all of it: those who lost the same server do not come back to it all at once. */
    int64_t wait_ns = c->backoff_ns - (int64_t)moe_random_below(&c->random, (uint64_t)c->backoff_ns / 2);
    c->retry_at_ns = moe_now_ns(moe_clock_real()) + wait_ns;
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
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: sending failed: %s", c->server.host, strerror(errno));
        }
        if (sent > 0) {
            data += sent;
            size -= (size_t)sent;
        }
        if (size && moe_now_ns(moe_clock_real()) >= deadline) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: sending timed out", c->server.host);
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
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: bad reply: %s", c->server.host, c->context->errstr);
        }
        if (reply) {
            *out = reply;
            return MOE_OK;
        }
        if (c->context->reader->len > (size_t)MOE_REDIS_MAX_REPLY_BYTES) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: a reply above %lld bytes is refused", c->server.host,
                            (long long)MOE_REDIS_MAX_REPLY_BYTES);
        }
        if (moe_now_ns(moe_clock_real()) >= deadline) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: no reply within %lld ms", c->server.host,
                            (long long)(c->timeout_ns / MOE_NS_PER_MS));
        }
        if (redisBufferRead(c->context) != REDIS_OK) {
            return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: reading failed: %s", c->server.host, c->context->errstr);
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
        return moe_fail(err, error_status(reply->str), "Redis at %s answered: %s", c->server.host, reply->str);
    }
    return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: a reply of type %d where %d was expected", c->server.host, reply->type, type);
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

/* One command with its reply, ahead of what the caller has queued. */
static moe_status run_ahead(moe_redis_connection *c, const moe_redis_argument *arguments, int num_arguments, int type,
                            redisReply **out, moe_error *err) {
    moe_buf commands = c->batch;
    c->batch = (moe_buf){0};
    moe_redis_queue(c, arguments, num_arguments);
    moe_status status =
        c->batch.failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory") : send_all(c, c->batch.data, c->batch.size, err);
    if (c->batch.data) explicit_bzero(c->batch.data, c->batch.size); /* it may hold a password */
    moe_buf_free(&c->batch);
    c->batch = commands;
    if (status == MOE_OK) status = read_reply(c, out, err);
    if (status != MOE_OK) return status;
    status = check_reply(c, *out, type, false, err);
    if (status != MOE_OK) freeReplyObject(*out);
    return status;
}

static moe_status authenticate(moe_redis_connection *c, moe_error *err) {
    char password[MAX_PASSWORD_BYTES];
    moe_status status = read_password(c->password_file, password, err);
    if (status) return status;
    moe_redis_argument arguments[3] = {{"AUTH", 4}};
    redisReply *reply;
    int n = 1;
    if (c->username) arguments[n++] = (moe_redis_argument){c->username, strlen(c->username)};
    arguments[n++] = (moe_redis_argument){password, strlen(password)};
    status = run_ahead(c, arguments, n, REDIS_REPLY_STATUS, &reply, err);
    explicit_bzero(password, sizeof password);
    if (status == MOE_OK) freeReplyObject(reply);
    return status;
}

/* A hostile count must not become an allocation. */
static void *create_bounded_array(const redisReadTask *task, int elements) {
    if (elements > MOE_REDIS_MAX_REPLY_ELEMENTS) return NULL;
    return ((const moe_redis_connection *)task->privdata)->create_array(task, elements);
}

static moe_status open_context(moe_redis_connection *c, const moe_redis_endpoint *to, moe_error *err) {
    struct timeval timeout = {.tv_sec = c->timeout_ns / MOE_NS_PER_S, .tv_usec = c->timeout_ns % MOE_NS_PER_S / MOE_NS_PER_US};
    c->context = to->port ? redisConnectWithTimeout(to->host, to->port, timeout) : redisConnectUnixWithTimeout(to->host, timeout);
    if (!c->context) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (c->context->err || redisSetTimeout(c->context, timeout) != REDIS_OK) {
        return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s: %s", to->host, c->context->errstr);
    }
    if (to->port) redisEnableKeepAlive(c->context);
    redisReader *reader = c->context->reader;
    c->reply_functions = *reader->fn;
    c->create_array = c->reply_functions.createArray;
    c->reply_functions.createArray = create_bounded_array;
    reader->fn = &c->reply_functions;
    reader->privdata = c;
    return MOE_OK;
}

/* What SENTINEL get-master-addr-by-name tells becomes the server. */
static moe_status take_master(moe_redis_connection *c, const redisReply *reply, moe_error *err) {
    bool two = reply->elements == 2 && reply->element[0]->type == REDIS_REPLY_STRING && reply->element[1]->type == REDIS_REPLY_STRING;
    char *end = NULL;
    long port = two ? strtol(reply->element[1]->str, &end, 10) : 0;
    if (port < 1 || port > 65535 || *end)
        return moe_fail(err, MOE_UNAVAILABLE, "a sentinel gave no usable address of master %s", c->master);
    char *host = moe_strdup(reply->element[0]->str);
    if (!host) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    moe_free(c->server.host);
    c->server = (moe_redis_endpoint){host, (int)port};
    return MOE_OK;
}

static moe_status ask_sentinel(moe_redis_connection *c, const moe_redis_endpoint *sentinel, moe_error *err) {
    static const char subcommand[] = "get-master-addr-by-name";
    const moe_redis_argument arguments[] = {
        {"SENTINEL", 8}, {subcommand, sizeof subcommand - 1}, {c->master, strlen(c->master)}};
    redisReply *reply;
    moe_status status = open_context(c, sentinel, err);
    if (status == MOE_OK) status = run_ahead(c, arguments, 3, REDIS_REPLY_ARRAY, &reply, err);
    if (status == MOE_OK) {
        status = take_master(c, reply, err);
        freeReplyObject(reply);
    }
    close_context(c);
    return status;
}

/* The first sentinel that answers is asked first next time. */
static moe_status find_master(moe_redis_connection *c, moe_error *err) {
    moe_status status = MOE_OK;
    for (int i = 0; i < c->num_sentinels; i++) {
        status = ask_sentinel(c, &c->sentinels[c->next_sentinel], err);
        if (status == MOE_OK) return MOE_OK;
        c->next_sentinel = (c->next_sentinel + 1) % c->num_sentinels;
    }
    return status;
}

/* A sentinel may not know yet that the master has changed; what was one may have become a replica. */
static moe_status check_is_master(moe_redis_connection *c, moe_error *err) {
    const moe_redis_argument role = {"ROLE", 4};
    redisReply *reply;
    moe_status status = run_ahead(c, &role, 1, REDIS_REPLY_ARRAY, &reply, err);
    if (status != MOE_OK) return status;
    const redisReply *first = reply->elements ? reply->element[0] : NULL;
    if (!first || first->type != REDIS_REPLY_STRING || strcmp(first->str, "master") != 0)
        status = moe_fail(err, MOE_UNAVAILABLE, "Redis at %s:%d is no master", c->server.host, c->server.port);
    freeReplyObject(reply);
    return status;
}

static moe_status connect_now(moe_redis_connection *c, moe_error *err) {
    moe_status status = c->num_sentinels ? find_master(c, err) : MOE_OK;
    if (status == MOE_OK) status = open_context(c, &c->server, err);
    if (status == MOE_OK && c->password_file) status = authenticate(c, err);
    if (status == MOE_OK && c->num_sentinels) status = check_is_master(c, err);
    return status;
}

/* Reconnecting starts from scratch: redisReconnect would restore neither AUTH nor the functions above. */
static moe_status ensure_connected(moe_redis_connection *c, moe_error *err) {
    if (c->context) return MOE_OK;
    if (moe_now_ns(moe_clock_real()) < c->retry_at_ns) {
        moe_buf_clear(&c->batch);
        return moe_fail(err, MOE_UNAVAILABLE, "Redis at %s did not answer; waiting before the next attempt", c->server.host);
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
