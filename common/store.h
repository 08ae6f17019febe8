/* The placement store: registry, leases, maps. Implementations: common/memory, common/redis.
 *
 * Keys are relative; an implementation adds the cluster's prefix ("moe:{cluster}:"). Calls block, for at most the configured
 * time-out, so they are made from control threads, never from the token path. UNAVAILABLE: the store did not answer (a write
 * may or may not have happened). One thread at a time. */
#pragma once
#include <stdint.h>

#include "common/buf.h"
#include "common/status.h"

#define MOE_STORE_MAX_KEY_BYTES 256
#define MOE_STORE_MAX_VALUE_BYTES (INT64_C(64) << 20)

typedef struct moe_store moe_store;

typedef struct moe_store_write {
    const char *key;
    const char *value; /* NULL deletes the key */
    size_t size;
} moe_store_write;

typedef struct moe_store_ops {
    const char *name;
    void (*close)(moe_store *s);
    /* *found tells whether the key exists; the value replaces what is in `value`. */
    moe_status (*get)(moe_store *s, const char *key, moe_buf *value, bool *found, moe_error *err);
    /* Calls `each` for every key that begins with `prefix`, in no order; key and value are borrowed for the call, which must not
     * use the store. */
    moe_status (*list)(moe_store *s, const char *prefix, void (*each)(void *ctx, const char *key, const char *value, size_t size),
                       void *ctx, moe_error *err);
    /* Sets a key that vanishes ttl_ms after its last put. */
    moe_status (*put_lease)(moe_store *s, const char *key, const char *value, size_t size, int64_t ttl_ms, moe_error *err);
    /* As put_lease, but only where the key does not exist or already has this very value; ABORTED where another has it. */
    moe_status (*take_lease)(moe_store *s, const char *key, const char *value, size_t size, int64_t ttl_ms, moe_error *err);
    moe_status (*remove)(moe_store *s, const char *key, moe_error *err);
    /* Atomically: if `guard` has exactly the value `expected` (NULL: does not exist), applies all writes; else ABORTED. */
    moe_status (*compare_and_set)(moe_store *s, const char *guard, const char *expected, size_t expected_size,
                                  const moe_store_write *writes, int num_writes, moe_error *err);
} moe_store_ops;

struct moe_store {
    const moe_store_ops *ops;
};
