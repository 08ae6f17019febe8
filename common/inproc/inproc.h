/* In-process transport: endpoints "inproc:NAME" on a hub. In tests and simulation the hub is also the seeded fault injector. */
#pragma once
#include "common/clock.h"
#include "common/transport.h"

typedef struct moe_inproc_hub moe_inproc_hub;

/* Chances are per message, in [0, 1]. Delays are drawn uniformly from [min, max] and kept in order per direction unless reordered. */
typedef struct moe_inproc_faults {
    double drop, duplicate, reorder;
    int64_t delay_min_ns, delay_max_ns;
} moe_inproc_faults;

/* A hub on a clock. With the real clock, transports may live in different threads and poll sleeps. With a fake clock everything
 * runs in one thread: poll never sleeps, it returns NONE when nothing is due, and moe_inproc_next_due_ns tells how far the owner
 * may advance the clock. Same seed, same calls: same deliveries. */
moe_status moe_inproc_hub_new(const moe_clock *clock, uint64_t seed, moe_inproc_hub **out, moe_error *err);
void moe_inproc_hub_free(moe_inproc_hub **hub); /* after all its transports; NULLs */
moe_status moe_inproc_open(moe_inproc_hub *hub, moe_transport **out, moe_error *err);

void moe_inproc_set_faults(moe_inproc_hub *hub, const moe_inproc_faults *faults); /* for all later messages */
/* Nothing passes between the listener of `endpoint` and its peers while cut; both sides see PEER_DOWN only if `reset`. */
void moe_inproc_partition(moe_inproc_hub *hub, const char *endpoint, bool cut, bool reset);
int64_t moe_inproc_next_due_ns(const moe_inproc_hub *hub); /* INT64_MAX: nothing in flight */
