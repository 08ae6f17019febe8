/* The worker's side of the registry: keeps the lease worker:<id> in the store while the worker lives, so that routers find it.
 *
 * The lease's value does not change during a worker's life, so that renewing can be conditional (take_lease): a process that was
 * replaced by a newer one of the same id can never push that one out. A store that does not answer stops nothing: the worker
 * serves on and registers again once the store is back. One thread at a time. */
#pragma once
#include "common/clock.h"
#include "common/random.h"
#include "common/store.h"

#define MOE_WORKER_LEASE_TTL_MS 3000
#define MOE_WORKER_LEASE_RENEW_NS (500 * MOE_NS_PER_MS)

/* The uuid of the cluster that uses this store, as its first router wrote it into `meta`. NOT_FOUND while none did. */
moe_status moe_registry_cluster_uuid(moe_store *store, char uuid[MOE_UUID_BYTES], moe_error *err);

typedef struct moe_registration moe_registration;

typedef struct moe_registration_config {
    moe_store *store; /* borrowed; used by the registration alone */
    const moe_clock *clock;
    const char *id;         /* stable name: 1 to 63 of A-Z a-z 0-9 . _ - */
    const char *endpoint;   /* at which it listens */
    const char *public_key; /* CURVE, Z85; "" for none */
    const char *host, *profile;
    uint64_t incarnation, model_digest;
    int64_t pid;
    int64_t capacity_experts; /* how many fit; 0: no limit */
    int64_t expert_ns, row_ns; /* as moe_calibrate measured; 0: it did not */
} moe_registration_config;

/* Strings are copied. INVALID_ARGUMENT: a bad id. */
moe_status moe_registration_new(const moe_registration_config *config, moe_registration **out, moe_error *err);
void moe_registration_free(moe_registration **registration); /* stops; the lease is left to expire; NULLs; idempotent */

/* Registers, or renews where that is due. Blocks for the store's time-out at most. ABORTED: a newer process has this id. */
moe_status moe_registration_step(moe_registration *registration, moe_error *err);
int64_t moe_registration_next_ns(const moe_registration *registration); /* when step has something to do */

/* Clean shutdown: takes the lease back, unless a newer process has it. Not while the thread runs. */
moe_status moe_registration_leave(moe_registration *registration, moe_error *err);

moe_status moe_registration_start(moe_registration *registration, moe_error *err); /* step in a thread of its own; real clock */
void moe_registration_stop(moe_registration *registration);                        /* joins the thread; idempotent */
