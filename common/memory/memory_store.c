#include "common/memory/memory_store.h"

#include <pthread.h>
#include <string.h>

#include "common/alloc.h"

typedef struct entry {
    char *key, *value;
    size_t size;
    int64_t expires_ns; /* INT64_MAX: never */
} entry;

struct moe_memory_hub {
    pthread_mutex_t mutex;
    const moe_clock *clock;
    entry *entries; /* unordered */
    size_t count, capacity;
    bool down;
};

typedef struct memory_store {
    moe_store base;
    moe_memory_hub *hub;
} memory_store;

static void entry_clear(entry *e) {
    moe_free(e->key);
    moe_free(e->value);
    *e = (entry){0};
}

static void hub_delete(moe_memory_hub *hub, entry *e) {
    entry_clear(e);
    *e = hub->entries[--hub->count];
}

static void hub_expire(moe_memory_hub *hub) {
    int64_t now = moe_now_ns(hub->clock);
    for (size_t i = 0; i < hub->count;) {
        if (hub->entries[i].expires_ns <= now) {
            hub_delete(hub, &hub->entries[i]);
        } else {
            i++;
        }
    }
}

static entry *hub_find(moe_memory_hub *hub, const char *key) {
    for (size_t i = 0; i < hub->count; i++) {
        if (strcmp(hub->entries[i].key, key) == 0) return &hub->entries[i];
    }
    return NULL;
}

static bool hub_reserve(moe_memory_hub *hub, size_t extra) {
    size_t capacity = hub->capacity ? hub->capacity : 16;
    while (capacity < hub->count + extra) capacity *= 2;
    if (capacity == hub->capacity) return true;
    entry *grown = moe_realloc(hub->entries, capacity, sizeof *grown);
    if (!grown) return false;
    hub->entries = grown;
    hub->capacity = capacity;
    return true;
}

static bool entry_make(entry *e, const char *key, const char *value, size_t size, int64_t expires_ns) {
    *e = (entry){.key = moe_strdup(key), .value = moe_strndup(value, size), .size = size, .expires_ns = expires_ns};
    if (e->key && e->value) return true;
    entry_clear(e);
    return false;
}

/* Takes over `made`. The room was reserved before. */
static void hub_put(moe_memory_hub *hub, entry *made) {
    entry *old = hub_find(hub, made->key);
    if (old) {
        entry_clear(old);
        *old = *made;
    } else {
        hub->entries[hub->count++] = *made;
    }
}

/* Locks the hub; on success the caller unlocks. */
static moe_status hub_enter(moe_store *s, moe_memory_hub **out, moe_error *err) {
    moe_memory_hub *hub = ((memory_store *)s)->hub;
    pthread_mutex_lock(&hub->mutex);
    if (hub->down) {
        pthread_mutex_unlock(&hub->mutex);
        return moe_fail(err, MOE_UNAVAILABLE, "the in-memory store is down");
    }
    hub_expire(hub);
    *out = hub;
    return MOE_OK;
}

static moe_status check_sizes(const char *key, size_t size, moe_error *err) {
    if (key[0] == '\0' || strlen(key) > MOE_STORE_MAX_KEY_BYTES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a key has 1 to %d bytes", MOE_STORE_MAX_KEY_BYTES);
    }
    if (size > (size_t)MOE_STORE_MAX_VALUE_BYTES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: a value of %zu bytes is above the limit of %lld", key, size,
                        (long long)MOE_STORE_MAX_VALUE_BYTES);
    }
    return MOE_OK;
}

static void memory_close(moe_store *s) { moe_free(s); }

static moe_status memory_get(moe_store *s, const char *key, moe_buf *value, bool *found, moe_error *err) {
    moe_memory_hub *hub;
    moe_status status = hub_enter(s, &hub, err);
    if (status) return status;
    const entry *e = hub_find(hub, key);
    moe_buf_clear(value);
    if (e) moe_buf_append(value, e->value, e->size);
    *found = e != NULL;
    if (value->failed) status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory while reading %s", key);
    pthread_mutex_unlock(&hub->mutex);
    return status;
}

static moe_status memory_list(moe_store *s, const char *prefix,
                              void (*each)(void *ctx, const char *key, const char *value, size_t size), void *ctx,
                              moe_error *err) {
    moe_memory_hub *hub;
    moe_status status = hub_enter(s, &hub, err);
    if (status) return status;
    for (size_t i = 0; i < hub->count; i++) {
        const entry *e = &hub->entries[i];
        if (strncmp(e->key, prefix, strlen(prefix)) == 0) each(ctx, e->key, e->value, e->size);
    }
    pthread_mutex_unlock(&hub->mutex);
    return MOE_OK;
}

static moe_status lease(moe_store *s, const char *key, const char *value, size_t size, int64_t ttl_ms, bool only_own,
                        moe_error *err) {
    moe_status status = check_sizes(key, size, err);
    if (status) return status;
    if (ttl_ms <= 0) return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: a lease needs a positive time to live", key);
    moe_memory_hub *hub;
    if ((status = hub_enter(s, &hub, err))) return status;
    const entry *held = hub_find(hub, key);
    entry made;
    if (only_own && held && (held->size != size || memcmp(held->value, value, size) != 0)) {
        status = moe_fail(err, MOE_ABORTED, "%s is held by another", key);
    } else if (!hub_reserve(hub, 1) || !entry_make(&made, key, value, size, moe_now_ns(hub->clock) + ttl_ms * MOE_NS_PER_MS)) {
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory while writing %s", key);
    } else {
        hub_put(hub, &made);
    }
    pthread_mutex_unlock(&hub->mutex);
    return status;
}

static moe_status memory_put_lease(moe_store *s, const char *key, const char *value, size_t size, int64_t ttl_ms,
                                   moe_error *err) {
    return lease(s, key, value, size, ttl_ms, false, err);
}

static moe_status memory_take_lease(moe_store *s, const char *key, const char *value, size_t size, int64_t ttl_ms,
                                    moe_error *err) {
    return lease(s, key, value, size, ttl_ms, true, err);
}

static moe_status memory_remove(moe_store *s, const char *key, moe_error *err) {
    moe_memory_hub *hub;
    moe_status status = hub_enter(s, &hub, err);
    if (status) return status;
    entry *e = hub_find(hub, key);
    if (e) hub_delete(hub, e);
    pthread_mutex_unlock(&hub->mutex);
    return MOE_OK;
}

/* All copies are made before the first is applied, so that running out of memory changes nothing. */
static bool apply(moe_memory_hub *hub, const moe_store_write *writes, int num_writes) {
    entry *made = moe_calloc((size_t)num_writes, sizeof *made);
    bool ok = made && hub_reserve(hub, (size_t)num_writes);
    for (int i = 0; ok && i < num_writes; i++) {
        if (writes[i].value) ok = entry_make(&made[i], writes[i].key, writes[i].value, writes[i].size, INT64_MAX);
    }
    for (int i = 0; made && i < num_writes; i++) {
        entry *old = ok && !writes[i].value ? hub_find(hub, writes[i].key) : NULL;
        if (old) hub_delete(hub, old);
        if (ok && made[i].key) hub_put(hub, &made[i]);
        if (!ok) entry_clear(&made[i]);
    }
    moe_free(made);
    return ok;
}

static moe_status memory_compare_and_set(moe_store *s, const char *guard, const char *expected, size_t expected_size,
                                         const moe_store_write *writes, int num_writes, moe_error *err) {
    moe_status status = MOE_OK;
    for (int i = 0; i < num_writes && !status; i++)
        status = check_sizes(writes[i].key, writes[i].value ? writes[i].size : 0, err);
    if (status) return status;
    moe_memory_hub *hub;
    if ((status = hub_enter(s, &hub, err))) return status;
    const entry *e = hub_find(hub, guard);
    bool same = expected ? e && e->size == expected_size && memcmp(e->value, expected, expected_size) == 0 : e == NULL;
    if (!same) {
        status = moe_fail(err, MOE_ABORTED, "%s has changed", guard);
    } else if (!apply(hub, writes, num_writes)) {
        status = moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory while writing under %s", guard);
    }
    pthread_mutex_unlock(&hub->mutex);
    return status;
}

static const moe_store_ops memory_ops = {.name = "memory",
                                         .close = memory_close,
                                         .get = memory_get,
                                         .list = memory_list,
                                         .put_lease = memory_put_lease,
                                         .take_lease = memory_take_lease,
                                         .remove = memory_remove,
                                         .compare_and_set = memory_compare_and_set};

moe_status moe_memory_hub_new(const moe_clock *clock, moe_memory_hub **out, moe_error *err) {
    moe_memory_hub *hub = moe_calloc(1, sizeof *hub);
    if (!hub) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the in-memory store");
    pthread_mutex_init(&hub->mutex, NULL);
    hub->clock = clock;
    *out = hub;
    return MOE_OK;
}

void moe_memory_hub_free(moe_memory_hub **hub) {
    if (!*hub) return;
    moe_memory_hub_wipe(*hub);
    pthread_mutex_destroy(&(*hub)->mutex);
    moe_free((*hub)->entries);
    moe_free(*hub);
    *hub = NULL;
}

moe_status moe_memory_open(moe_memory_hub *hub, moe_store **out, moe_error *err) {
    memory_store *store = moe_calloc(1, sizeof *store);
    if (!store) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the in-memory store");
    *store = (memory_store){.base.ops = &memory_ops, .hub = hub};
    *out = &store->base;
    return MOE_OK;
}

void moe_memory_hub_set_down(moe_memory_hub *hub, bool down) {
    pthread_mutex_lock(&hub->mutex);
    hub->down = down;
    pthread_mutex_unlock(&hub->mutex);
}

void moe_memory_hub_wipe(moe_memory_hub *hub) {
    pthread_mutex_lock(&hub->mutex);
    while (hub->count) hub_delete(hub, &hub->entries[hub->count - 1]);
    pthread_mutex_unlock(&hub->mutex);
}
