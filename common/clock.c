#include "common/clock.h"

#include <time.h>

static int64_t real_now_ns(const moe_clock *clock) {
    (void)clock;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * MOE_NS_PER_S + t.tv_nsec;
}

static int64_t fake_now_ns(const moe_clock *clock) { return clock->fake_now_ns; }

const moe_clock *moe_clock_real(void) {
    static const moe_clock real = {.now_ns = real_now_ns};
    return &real;
}

moe_clock moe_clock_fake(int64_t start_ns) { return (moe_clock){.now_ns = fake_now_ns, .fake_now_ns = start_ns}; }

int64_t moe_wall_clock_s(void) { return (int64_t)time(NULL); }
