/* A store in Redis (5 or later), by hiredis: WATCH/MULTI/EXEC, no scripting. The only code that uses hiredis.
 *
 * Where the server has replicas, a compare-and-set of the cluster's `meta` waits for one of them, MOE_REDIS_WAIT_MS at most, so that
 * what was published outlives the primary. One that does not answer in time is logged, no more: what a failover loses is published
 * again by the leader.
 *
 * Beside the keys written it keeps their names in the set "keys" (under the cluster's prefix), which `list` reads: a scan would
 * walk everything that others keep in the same Redis. A call blocks for a few times the time-out at worst. */
#pragma once
#include "common/store.h"

#define MOE_REDIS_WAIT_MS 200

typedef struct moe_redis_config {
    const char *address;       /* "unix:/path", "host:port", or "sentinel://host:port,host:port/master-name" */
    const char *username;      /* ACL user; NULL: default user */
    const char *password_file; /* first line; NULL: none */
    const char *cluster;       /* key prefix "moe:{cluster}:", braces included: a cluster is one hash slot */
    int64_t timeout_ms;        /* of connect and of each command */
} moe_redis_config;

/* Opens lazily: the first call connects; after a failure later calls reconnect with back-off (AUTH is sent again). */
moe_status moe_redis_open(const moe_redis_config *config, moe_store **out, moe_error *err);
