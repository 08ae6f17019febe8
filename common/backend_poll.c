#include "common/backend_poll.h"

bool moe_backend_poll(moe_backend *backend, const _Atomic uint64_t *ended) {
    if (!backend->ops->poll) return false;
    uint64_t before = atomic_load(ended);
    int64_t until_ns = moe_now_ns(moe_clock_real()) + MOE_POLL_SPIN_NS;
    while (backend->ops->poll(backend) && atomic_load(ended) == before)
        if (moe_now_ns(moe_clock_real()) >= until_ns) break;
    return true;
}
