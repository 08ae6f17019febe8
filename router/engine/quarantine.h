/* Workers that come and go, or stall, again and again are given work only where no other replica can do it, for a time that grows
 * with each relapse. Known by their ids, so that a restart at another endpoint is not forgotten. One thread. */
#pragma once
#include <stdbool.h>

#include "common/clock.h"
#include "router/placement/placement.h"

#define MOE_FLAP_LIMIT 5                           /* connections lost and suspicions, within: */
#define MOE_FLAP_WINDOW_NS (60 * MOE_NS_PER_S)     /* then the worker is quarantined, for: */
#define MOE_QUARANTINE_NS (10 * MOE_NS_PER_S)      /* doubled each time, up to: */
#define MOE_QUARANTINE_MAX_NS (300 * MOE_NS_PER_S) /* */
#define MOE_QUARANTINE_FORGET_NS (600 * MOE_NS_PER_S) /* without relapse after its end, the next begins short again */

typedef struct moe_quarantine_entry {
    char id[MOE_WORKER_ID_BYTES];
    int64_t troubles_ns[MOE_FLAP_LIMIT]; /* a ring: when the last ones were; 0: none */
    int next;                            /* the oldest of them */
    int64_t hold_ns, until_ns;           /* of the last quarantine; 0: there was none */
} moe_quarantine_entry;

typedef struct moe_quarantine {
    moe_quarantine_entry entries[MOE_PLACEMENT_MAX_WORKERS];
    int count;
} moe_quarantine;

/* A connection was lost or progress was missed. True where that begins a quarantine. */
bool moe_quarantine_trouble(moe_quarantine *quarantine, const char *id, int64_t now_ns);
/* When the worker's quarantine ends or ended; 0 where there was none. */
int64_t moe_quarantine_until_ns(const moe_quarantine *quarantine, const char *id);
