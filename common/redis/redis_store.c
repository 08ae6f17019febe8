#include "common/redis/redis_store.h"

#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/redis/redis_connection.h"

#define MAX_CLUSTER_BYTES 128
#define INDEX_KEY "keys" /* a set of all our keys, so that list need not scan a Redis that others use too */
#define META_KEY "meta" /* names the newest map */
#define MGET_KEYS 64

typedef struct redis_store {
    moe_store base;
    moe_redis_connection connection;
    bool wait_refused;                  /* ROLE or WAIT failed once: not asked again */
    char prefix[MAX_CLUSTER_BYTES + 8]; /* "moe:{cluster}:"; the braces keep a cluster's keys in one hash slot */
} redis_store;

typedef struct full_key {
    char text[MAX_CLUSTER_BYTES + 8 + MOE_STORE_MAX_KEY_BYTES + 1];
} full_key;

static full_key key_of(const redis_store *r, const char *key) {
    full_key full;
    snprintf(full.text, sizeof full.text, "%s%s", r->prefix, key);
    return full;
}

static moe_redis_argument text(const char *s) { return (moe_redis_argument){s, strlen(s)}; }

static void queue(redis_store *r, const char *command, const char *key) {
    moe_redis_queue(&r->connection, (moe_redis_argument[]){text(command), text(key ? key : "")}, key ? 2 : 1);
}

static moe_status skip(redis_store *r, int type, moe_error *err) {
    redisReply *reply;
    moe_status status = moe_redis_receive(&r->connection, type, false, &reply, err);
    if (!status) freeReplyObject(reply);
    return status;
}

static moe_status check_write(const moe_store_write *write, moe_error *err) {
    size_t length = strlen(write->key);
    if (length == 0 || length > MOE_STORE_MAX_KEY_BYTES || strcmp(write->key, INDEX_KEY) == 0) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a key has 1 to %d bytes and is not \"" INDEX_KEY "\"",
                        MOE_STORE_MAX_KEY_BYTES);
    }
    if (write->value && write->size > (size_t)MOE_STORE_MAX_VALUE_BYTES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: a value of %zu bytes is above the limit of %lld", write->key, write->size,
                        (long long)MOE_STORE_MAX_VALUE_BYTES);
    }
    return MOE_OK;
}

static void queue_write(redis_store *r, const moe_store_write *write, int64_t ttl_ms) {
    full_key key = key_of(r, write->key), index = key_of(r, INDEX_KEY);
    char ttl[24];
    snprintf(ttl, sizeof ttl, "%lld", (long long)ttl_ms);
    if (write->value) {
        moe_redis_argument set[] = {text("SET"), text(key.text), {write->value, write->size}, text("PX"), text(ttl)};
        moe_redis_queue(&r->connection, set, ttl_ms ? 5 : 3);
    } else {
        queue(r, "DEL", key.text);
    }
    moe_redis_argument indexed[] = {text(write->value ? "SADD" : "SREM"), text(index.text), text(write->key)};
    moe_redis_queue(&r->connection, indexed, 3);
}

/* MULTI, the writes with their index entries, EXEC. ABORTED where a watched key changed. ttl_ms 0: no expiry. */
static moe_status commit(redis_store *r, const moe_store_write *writes, int num_writes, int64_t ttl_ms, moe_error *err) {
    queue(r, "MULTI", NULL);
    for (int i = 0; i < num_writes; i++) queue_write(r, &writes[i], ttl_ms);
    queue(r, "EXEC", NULL);
    moe_status status = moe_redis_send(&r->connection, err);
    for (int i = 0; i < 1 + 2 * num_writes && !status; i++) status = skip(r, REDIS_REPLY_STATUS, err); /* OK, QUEUED … */
    redisReply *reply = NULL;
    if (!status) status = moe_redis_receive(&r->connection, REDIS_REPLY_ARRAY, true, &reply, err);
    if (status) return status;
    if (reply->type == REDIS_REPLY_NIL) {
        status = moe_fail(err, MOE_ABORTED, "%s: another wrote at the same time", writes[0].key);
    } else {
        for (size_t i = 0; i < reply->elements && !status; i++) {
            const redisReply *e = reply->element[i];
            if (e->type == REDIS_REPLY_ERROR) status = moe_fail(err, MOE_FAILED_PRECONDITION, "Redis answered: %s", e->str);
        }
        if (status) moe_redis_give_up(&r->connection, status);
    }
    freeReplyObject(reply);
    r->connection.backoff_ns = 0;
    return status;
}

/* Watches `key` and reads it; *reply is a string or nil. */
static moe_status watch(redis_store *r, const char *key, redisReply **reply, moe_error *err) {
    full_key full = key_of(r, key);
    queue(r, "WATCH", full.text);
    queue(r, "GET", full.text);
    moe_status status = moe_redis_send(&r->connection, err);
    if (!status) status = skip(r, REDIS_REPLY_STATUS, err);
    if (!status) status = moe_redis_receive(&r->connection, REDIS_REPLY_STRING, true, reply, err);
    return status;
}

static moe_status unwatch(redis_store *r, const char *key, moe_error *err) {
    queue(r, "UNWATCH", NULL);
    moe_status status = moe_redis_send(&r->connection, err);
    if (!status) status = skip(r, REDIS_REPLY_STATUS, err);
    return status ? status : moe_fail(err, MOE_ABORTED, "%s has another value", key);
}

static bool has_value(const redisReply *reply, const char *value, size_t size) {
    return reply->type == REDIS_REPLY_STRING && reply->len == size && memcmp(reply->str, value, size) == 0;
}

static void redis_close(moe_store *s) {
    redis_store *r = (redis_store *)s;
    moe_redis_connection_close(&r->connection);
    moe_free(r);
}

static moe_status redis_get(moe_store *s, const char *key, moe_buf *value, bool *found, moe_error *err) {
    redis_store *r = (redis_store *)s;
    full_key full = key_of(r, key);
    queue(r, "GET", full.text);
    moe_status status = moe_redis_send(&r->connection, err);
    redisReply *reply;
    if (!status) status = moe_redis_receive(&r->connection, REDIS_REPLY_STRING, true, &reply, err);
    if (status) return status;
    r->connection.backoff_ns = 0;
    *found = reply->type == REDIS_REPLY_STRING;
    moe_buf_clear(value);
    if (*found) moe_buf_append(value, reply->str, reply->len);
    freeReplyObject(reply);
    return value->failed ? moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory while reading %s", key) : MOE_OK;
}

static moe_status check_lease(const moe_store_write *write, int64_t ttl_ms, moe_error *err) {
    if (ttl_ms <= 0) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: a lease needs a positive time to live", write->key);
    return check_write(write, err);
}

static moe_status redis_put_lease(moe_store *s, const char *key, const char *value, size_t size, int64_t ttl_ms, moe_error *err) {
    moe_store_write write = {.key = key, .value = value, .size = size};
    moe_status status = check_lease(&write, ttl_ms, err);
    return status ? status : commit((redis_store *)s, &write, 1, ttl_ms, err);
}

static moe_status redis_take_lease(moe_store *s, const char *key, const char *value, size_t size, int64_t ttl_ms,
                                   moe_error *err) {
    redis_store *r = (redis_store *)s;
    moe_store_write write = {.key = key, .value = value, .size = size};
    redisReply *reply;
    moe_status status = check_lease(&write, ttl_ms, err);
    if (!status) status = watch(r, key, &reply, err);
    if (status) return status;
    bool free_or_own = reply->type == REDIS_REPLY_NIL || has_value(reply, value, size);
    freeReplyObject(reply);
    return free_or_own ? commit(r, &write, 1, ttl_ms, err) : unwatch(r, key, err);
}

static moe_status redis_remove(moe_store *s, const char *key, moe_error *err) {
    moe_store_write write = {.key = key};
    moe_status status = check_write(&write, err);
    return status ? status : commit((redis_store *)s, &write, 1, 0, err);
}

/* Replicas that are connected to the server. */
static moe_status count_replicas(redis_store *r, size_t *count, moe_error *err) {
    redisReply *reply = NULL;
    queue(r, "ROLE", NULL);
    moe_status status = moe_redis_send(&r->connection, err);
    if (!status) status = moe_redis_receive(&r->connection, REDIS_REPLY_ARRAY, false, &reply, err);
    if (status) return status;
    bool primary = reply->elements == 3 && reply->element[2]->type == REDIS_REPLY_ARRAY; /* master, offset, replicas */
    *count = primary ? reply->element[2]->elements : 0;
    freeReplyObject(reply);
    return MOE_OK;
}

static moe_status wait_for_replica(redis_store *r, int64_t *confirmed, moe_error *err) {
    char limit[24];
    redisReply *reply = NULL;
    snprintf(limit, sizeof limit, "%d", MOE_REDIS_WAIT_MS);
    moe_redis_queue(&r->connection, (moe_redis_argument[]){text("WAIT"), text("1"), text(limit)}, 3);
    moe_status status = moe_redis_send(&r->connection, err);
    if (!status) status = moe_redis_receive(&r->connection, REDIS_REPLY_INTEGER, false, &reply, err);
    if (status) return status;
    *confirmed = reply->integer;
    freeReplyObject(reply);
    return MOE_OK;
}

/* What was just written is on a replica, too, where there are any. It is written either way, so no failure here is the caller's. */
static void confirm(redis_store *r) {
    size_t replicas = 0;
    int64_t confirmed = 1;
    moe_error err;
    if (r->wait_refused) return;
    moe_status status = count_replicas(r, &replicas, &err);
    if (!status && replicas) status = wait_for_replica(r, &confirmed, &err);
    r->wait_refused = status != MOE_OK && status != MOE_UNAVAILABLE;
    if (status)
        moe_warn("whether a Redis replica has the newest map is not known: %s", err.message);
    else if (confirmed == 0)
        moe_warn("no Redis replica confirmed the newest map within %d ms; should the primary fail now, the leader publishes it again",
                 MOE_REDIS_WAIT_MS);
}

static moe_status redis_compare_and_set(moe_store *s, const char *guard, const char *expected, size_t expected_size,
                                        const moe_store_write *writes, int num_writes, moe_error *err) {
    redis_store *r = (redis_store *)s;
    moe_status status = MOE_OK;
    for (int i = 0; i < num_writes && !status; i++) status = check_write(&writes[i], err);
    redisReply *reply;
    if (!status) status = watch(r, guard, &reply, err);
    if (status) return status;
    bool same = expected ? has_value(reply, expected, expected_size) : reply->type == REDIS_REPLY_NIL;
    freeReplyObject(reply);
    if (!same) return unwatch(r, guard, err);
    status = commit(r, writes, num_writes, 0, err);
    if (status == MOE_OK && strcmp(guard, META_KEY) == 0) confirm(r);
    return status;
}

/* Takes a key whose lease ran out off the index, unless it was written again meanwhile. */
static moe_status forget(redis_store *r, const char *key, moe_error *err) {
    moe_store_write write = {.key = key};
    moe_status status = redis_compare_and_set(&r->base, key, NULL, 0, &write, 1, err);
    return status == MOE_ABORTED ? MOE_OK : status;
}

typedef struct listing {
    void (*each)(void *ctx, const char *key, const char *value, size_t size);
    void *ctx;
    const char *keys[MGET_KEYS];
    int count;
    const char *stale[MGET_KEYS]; /* of these; the rest is left for the next list */
    int num_stale;
} listing;

static moe_status list_chunk(redis_store *r, listing *l, moe_error *err) {
    if (l->count == 0) return MOE_OK;
    full_key full[MGET_KEYS];
    moe_redis_argument arguments[1 + MGET_KEYS] = {text("MGET")};
    for (int i = 0; i < l->count; i++) {
        full[i] = key_of(r, l->keys[i]);
        arguments[1 + i] = text(full[i].text);
    }
    moe_redis_queue(&r->connection, arguments, 1 + l->count);
    moe_status status = moe_redis_send(&r->connection, err);
    redisReply *reply = NULL;
    if (!status) status = moe_redis_receive(&r->connection, REDIS_REPLY_ARRAY, false, &reply, err);
    if (status) return status;
    if (reply->elements != (size_t)l->count) {
        status = moe_redis_give_up(&r->connection,
                                   moe_fail(err, MOE_UNAVAILABLE, "Redis: MGET of %d keys gave %zu", l->count, reply->elements));
    }
    for (int i = 0; i < l->count && !status; i++) {
        const redisReply *e = reply->element[i];
        if (e->type == REDIS_REPLY_STRING) {
            l->each(l->ctx, l->keys[i], e->str, e->len);
        } else if (l->num_stale < MGET_KEYS) {
            l->stale[l->num_stale++] = l->keys[i];
        }
    }
    l->count = 0;
    freeReplyObject(reply);
    return status;
}

static moe_status redis_list(moe_store *s, const char *prefix,
                             void (*each)(void *ctx, const char *key, const char *value, size_t size), void *ctx,
                             moe_error *err) {
    redis_store *r = (redis_store *)s;
    full_key index = key_of(r, INDEX_KEY);
    queue(r, "SMEMBERS", index.text);
    moe_status status = moe_redis_send(&r->connection, err);
    redisReply *keys = NULL;
    if (!status) status = moe_redis_receive(&r->connection, REDIS_REPLY_ARRAY, false, &keys, err);
    if (status) return status;
    r->connection.backoff_ns = 0;
    listing l = {.each = each, .ctx = ctx};
    for (size_t i = 0; i < keys->elements && !status; i++) {
        const redisReply *key = keys->element[i];
        bool ours = key->type == REDIS_REPLY_STRING && key->len <= MOE_STORE_MAX_KEY_BYTES && strlen(key->str) == key->len;
        if (!ours || strncmp(key->str, prefix, strlen(prefix)) != 0) continue;
        l.keys[l.count++] = key->str;
        if (l.count == MGET_KEYS) status = list_chunk(r, &l, err);
    }
    if (!status) status = list_chunk(r, &l, err);
    for (int i = 0; i < l.num_stale && !status; i++) status = forget(r, l.stale[i], err);
    freeReplyObject(keys);
    return status;
}

static const moe_store_ops redis_ops = {.name = "redis",
                                        .close = redis_close,
                                        .get = redis_get,
                                        .list = redis_list,
                                        .put_lease = redis_put_lease,
                                        .take_lease = redis_take_lease,
                                        .remove = redis_remove,
                                        .compare_and_set = redis_compare_and_set};

moe_status moe_redis_open(const moe_redis_config *config, moe_store **out, moe_error *err) {
    size_t length = strlen(config->cluster);
    if (length == 0 || length > MAX_CLUSTER_BYTES || strpbrk(config->cluster, "{}")) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "cluster name \"%.*s\": expected 1 to %d bytes without braces",
                        MAX_CLUSTER_BYTES, config->cluster, MAX_CLUSTER_BYTES);
    }
    redis_store *r = moe_calloc(1, sizeof *r);
    if (!r) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the Redis store");
    r->base.ops = &redis_ops;
    snprintf(r->prefix, sizeof r->prefix, "moe:{%s}:", config->cluster);
    moe_status status = moe_redis_connection_init(&r->connection, config, err);
    if (status) {
        redis_close(&r->base);
        return status;
    }
    *out = &r->base;
    return MOE_OK;
}
