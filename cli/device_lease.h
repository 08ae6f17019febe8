/* --devices auto: each expert worker takes one GPU of its machine that no other worker of the cluster has, by a lease in the store,
 * so that containers which see all GPUs spread over them. */
#pragma once
#include "common/clock.h"
#include "common/store.h"
#include "router/placement/placement.h"

#define MOE_DEVICE_LEASE_TTL_MS 10000 /* after which the GPU of a worker that died is free */
#define MOE_DEVICE_LEASE_RENEW_NS MOE_NS_PER_S
#define MOE_DEVICE_NAME_BYTES 48

typedef char moe_device_name[MOE_DEVICE_NAME_BYTES]; /* no other GPU of any machine has it: "GPU-" and its UUID */

typedef struct moe_device_lease {
    moe_store *store; /* borrowed; used by the lease alone; NULL: nothing is held */
    const moe_clock *clock;
    int32_t device; /* index among the names */
    char key[MOE_DEVICE_NAME_BYTES + 8], holder[MOE_WORKER_ID_BYTES];
    int64_t next_ns;
    moe_status last;
} moe_device_lease;

/* Takes one of `count` devices for `holder` (a worker's id): the one that it has already, as a worker that was started again under
 * its id, else the first that is free. RESOURCE_EXHAUSTED: others have all of them; errors of the store. Blocks for the store. */
moe_status moe_device_lease_take(moe_store *store, const moe_clock *clock, const moe_device_name *names, int32_t count,
                                 const char *holder, moe_device_lease *out, moe_error *err);
/* Renews the lease when that is due; blocks for the store's time-out at most. While the store does not answer, the worker computes on;
 * afterwards it takes the device again, and only warns where another has come in between. */
void moe_device_lease_keep(moe_device_lease *lease);
/* Frees the device, unless another has it. Idempotent; nothing for a zeroed lease. */
void moe_device_lease_release(moe_device_lease *lease);
