#include "common/adaptive_wait.h"

#include <limits.h>
#include <sched.h>

static int timeout_ms(int64_t until_ns, int64_t now_ns) {
    if (until_ns <= now_ns) return 0;
    int64_t ms = (until_ns - now_ns) / MOE_NS_PER_MS;
    return ms >= INT_MAX ? INT_MAX : (int)ms + ((until_ns - now_ns) % MOE_NS_PER_MS != 0);
}

moe_status moe_wait_adaptively(moe_adaptive_wait *w, int64_t now_ns, int64_t until_ns, bool sleep_at_once, moe_look look, void *ctx,
                               moe_error *err) {
    bool any;
    moe_status status = look(ctx, 0, &any, err);
    if (status != MOE_OK || any || until_ns <= now_ns) return status;
    int64_t began_ns = now_ns, ask_until_ns = w->pays && !sleep_at_once ? now_ns + w->poll_ns : now_ns;
    if (ask_until_ns > until_ns) ask_until_ns = until_ns;
    while (!any && status == MOE_OK && now_ns < ask_until_ns) {
        sched_yield();
        status = look(ctx, 0, &any, err);
        now_ns = moe_now_ns(w->clock);
    }
    if (!any && status == MOE_OK && now_ns < until_ns) status = look(ctx, timeout_ms(until_ns, now_ns), &any, err);
    w->pays = any && moe_now_ns(w->clock) - began_ns <= w->poll_ns;
    return status;
}
