/* How transports wait for other processes: when the last wait was short, the next one asks again and again, for a bounded time and
 * in turns with whatever else wants the core, before it sleeps: to wake a thread, and a core, takes longer than to yield. */
#pragma once
#include <stdbool.h>

#include "common/clock.h"
#include "common/status.h"

typedef struct moe_adaptive_wait {
    const moe_clock *clock;
    int64_t poll_ns; /* how long a wait may ask before it sleeps; 0: not at all */
    bool pays;       /* the last wait took less than poll_ns */
} moe_adaptive_wait;

/* Looks for something to do, sleeping at most sleep_ms for it (0: not at all); *any tells whether there was. */
typedef moe_status (*moe_look)(void *ctx, int sleep_ms, bool *any, moe_error *err);

/* Looks until there is something, at most until `until_ns`; once where that has passed. `sleep_at_once`: asks only once before it
 * sleeps. Fails as `look` does. */
moe_status moe_wait_adaptively(moe_adaptive_wait *w, int64_t now_ns, int64_t until_ns, bool sleep_at_once, moe_look look, void *ctx,
                               moe_error *err);
