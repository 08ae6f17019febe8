/* Monotonic time in nanoseconds, fakeable for the simulation and for tests. */
#pragma once
#include <stdint.h>

#define MOE_NS_PER_US INT64_C(1000)
#define MOE_NS_PER_MS INT64_C(1000000)
#define MOE_NS_PER_S INT64_C(1000000000)

typedef struct moe_clock {
    int64_t (*now_ns)(const struct moe_clock *clock);
    int64_t fake_now_ns; /* used by the fake clock only; its owner advances it */
} moe_clock;

/* CLOCK_MONOTONIC; shared, immutable, any thread. */
const moe_clock *moe_clock_real(void);

/* A clock that stands at fake_now_ns until its owner changes it; one thread. */
moe_clock moe_clock_fake(int64_t start_ns);

static inline int64_t moe_now_ns(const moe_clock *clock) { return clock->now_ns(clock); }

/* Seconds since 1970, for `created` fields and file names only, never for time-outs. */
int64_t moe_wall_clock_s(void);
