#include "cli/device_lease.h"

#include <stdio.h>
#include <string.h>

#include "common/log.h"

static moe_status take(moe_device_lease *l, moe_error *err) {
    return l->store->ops->take_lease(l->store, l->key, l->holder, strlen(l->holder), MOE_DEVICE_LEASE_TTL_MS, err);
}

static moe_status is_held(const moe_device_lease *l, bool *held, moe_error *err) {
    moe_buf value = {0};
    bool found;
    moe_status status = l->store->ops->get(l->store, l->key, &value, &found, err);
    *held = status == MOE_OK && found && strcmp(moe_buf_text(&value), l->holder) == 0;
    moe_buf_free(&value);
    return status;
}

/* The first device of those that may be taken; ABORTED where there is none. */
static moe_status take_first(moe_device_lease *l, const moe_device_name *names, int32_t count, bool only_own, moe_error *err) {
    moe_status status = MOE_ABORTED;
    for (int32_t i = 0; i < count && status == MOE_ABORTED; i++) {
        bool held = true;
        l->device = i;
        snprintf(l->key, sizeof l->key, "device:%s", names[i]);
        moe_status asked = only_own ? is_held(l, &held, err) : MOE_OK;
        if (asked != MOE_OK) return asked;
        if (held) status = take(l, err);
    }
    return status;
}

moe_status moe_device_lease_take(moe_store *store, const moe_clock *clock, const moe_device_name *names, int32_t count,
                                 const char *holder, moe_device_lease *out, moe_error *err) {
    moe_device_lease l = {.store = store, .clock = clock, .last = MOE_OK};
    *out = (moe_device_lease){.store = NULL};
    if (strlen(holder) >= sizeof l.holder) return moe_fail(err, MOE_INVALID_ARGUMENT, "worker id \"%s\" is too long", holder);
    memcpy(l.holder, holder, strlen(holder) + 1);
    moe_status status = take_first(&l, names, count, true, err);
    if (status == MOE_ABORTED) status = take_first(&l, names, count, false, err);
    if (status == MOE_ABORTED)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "--devices auto: other workers have all %d GPUs of this machine", count);
    if (status != MOE_OK) return status;
    l.next_ns = moe_now_ns(clock) + MOE_DEVICE_LEASE_RENEW_NS;
    *out = l;
    return MOE_OK;
}

void moe_device_lease_keep(moe_device_lease *l) {
    moe_error err = {0};
    if (!l->store || moe_now_ns(l->clock) < l->next_ns) return;
    moe_status status = take(l, &err);
    if (status == MOE_ABORTED && l->last != MOE_ABORTED)
        moe_warn("%s: another worker has taken this GPU while the store could not be reached; both use it now", l->key);
    else if (status != MOE_OK && l->last == MOE_OK)
        moe_warn("renewing %s failed: %s; trying again", l->key, err.message);
    l->last = status;
    l->next_ns = moe_now_ns(l->clock) + MOE_DEVICE_LEASE_RENEW_NS;
}

void moe_device_lease_release(moe_device_lease *l) {
    bool held = false;
    moe_error err;
    if (l->store && is_held(l, &held, &err) == MOE_OK && held) l->store->ops->remove(l->store, l->key, &err);
    l->store = NULL;
}
