/* In-process transport: endpoints "inproc:NAME" on a hub. In tests and simulation the hub is also the seeded fault injector. */
#pragma once
#include "common/clock.h"
#include "common/transport.h"

#define MOE_INPROC_MAX_CUTS 64 /* endpoints partitioned at one time */

typedef struct moe_inproc_hub moe_inproc_hub;

/* Chances are per message, in [0, 1]. Delays are drawn uniformly from [min, max] and kept in order per direction unless
 * reordered: a reordered message changes places with a random one of its direction that is still on the way (without one, nothing
 * happens). While any of these is set, received frames lie at odd addresses; else they are aligned to 16 bytes. */
typedef struct moe_inproc_faults {
    double drop, duplicate, reorder;
    int64_t delay_min_ns, delay_max_ns;
} moe_inproc_faults;

/* A hub on a clock. With the real clock, transports may live in different threads and poll sleeps. With a fake clock everything
 * runs in one thread: poll never sleeps, it returns NONE when nothing is due, and moe_inproc_next_due_ns tells how far the owner
 * may advance the clock. Same seed, same calls: same deliveries. */
moe_status moe_inproc_hub_new(const moe_clock *clock, uint64_t seed, moe_inproc_hub **out, moe_error *err);
void moe_inproc_hub_free(moe_inproc_hub **hub); /* after all its transports; NULLs */

/* A transport on the hub; closed by ops->close. A connected peer comes UP when its endpoint has a listener, and goes DOWN, after
 * the messages it had sent, when the listener closes. An accepted peer that has sent something goes DOWN when it closes or
 * disconnects. RESOURCE_EXHAUSTED from poll: out of memory while connecting; the next poll tries again. */
moe_status moe_inproc_open(moe_inproc_hub *hub, moe_transport **out, moe_error *err);

/* A transport for the same thread as `sibling`'s: whatever wakes its poll wakes the sibling's, too, so that one sleep covers both.
 * `sibling` must outlive it. */
moe_status moe_inproc_open_beside(moe_transport *sibling, moe_transport **out, moe_error *err);

/* The functions below may be called from any thread. */

void moe_inproc_set_faults(moe_inproc_hub *hub, const moe_inproc_faults *faults); /* for all later messages */
/* Bytes on the way to one peer beyond which send answers RESOURCE_EXHAUSTED, for all later messages; at first
 * MOE_MAX_PEER_QUEUED_BYTES. A message counts its frames and a fixed overhead. */
void moe_inproc_set_queue_limit(moe_inproc_hub *hub, int64_t limit_bytes);
/* Nothing passes between the listener of `endpoint` and its peers while cut: messages on the way or sent meanwhile are lost and
 * nobody comes UP. Both sides see PEER_DOWN only if `reset`. With cut false: heals; `reset` then breaks the connections once. */
void moe_inproc_partition(moe_inproc_hub *hub, const char *endpoint, bool cut, bool reset);
/* When the next event of any transport is due; not after the present if a poll would return one now. INT64_MAX: nothing in
 * flight. */
int64_t moe_inproc_next_due_ns(moe_inproc_hub *hub);
