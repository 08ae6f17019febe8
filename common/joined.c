#include "common/joined.h"

#include <stdatomic.h>

#include "common/alloc.h"

enum { NEAR, FAR, PARTS };

/* Numbers of peers and links are those of the part × PARTS + the part. */
typedef struct joined {
    moe_transport base;
    const moe_clock *clock;
    moe_transport *parts[PARTS];
    _Atomic bool used[PARTS]; /* it listens or has connected; set by the owner, read by any thread */
    _Atomic bool woken;       /* counts while both are used: then no part's own end of a wait tells */
    int first;                /* the part that is asked first, in turns */
} joined;

static int part_for(const joined *j, const char *endpoint) {
    int part = 0;
    while (part < PARTS && !j->parts[part]->ops->can_reach(j->parts[part], endpoint)) part++;
    return part;
}

static bool joined_can_reach(const moe_transport *transport, const char *endpoint) {
    return part_for((const joined *)transport, endpoint) < PARTS;
}

/* A wake just before may have gone to the other part, so this one's next wait is cut short. */
static void use(joined *j, int part) {
    if (j->used[part]) return;
    j->used[part] = true;
    j->parts[part]->ops->wake(j->parts[part]);
}

static moe_status unreachable(const char *endpoint, moe_error *err) {
    return moe_fail(err, MOE_INVALID_ARGUMENT, "endpoint \"%.64s\": want \"shm:/path\", \"ipc:///path\" or \"tcp://host:port\"",
                    endpoint);
}

static moe_status joined_listen(moe_transport *transport, const char *endpoint, char *bound, moe_error *err) {
    joined *j = (joined *)transport;
    int part = part_for(j, endpoint);
    if (part == PARTS) return unreachable(endpoint, err);
    moe_status status = j->parts[part]->ops->listen(j->parts[part], endpoint, bound, err);
    if (status == MOE_OK) use(j, part);
    return status;
}

static moe_status joined_connect(moe_transport *transport, const char *endpoint, uint64_t *link, moe_error *err) {
    joined *j = (joined *)transport;
    int part = part_for(j, endpoint);
    if (part == PARTS) return unreachable(endpoint, err);
    moe_status status = j->parts[part]->ops->connect(j->parts[part], endpoint, link, err);
    if (status != MOE_OK) return status;
    *link = *link * PARTS + (uint64_t)part;
    use(j, part);
    return MOE_OK;
}

static void joined_disconnect(moe_transport *transport, uint64_t link) {
    moe_transport *part = ((joined *)transport)->parts[link % PARTS];
    part->ops->disconnect(part, link / PARTS);
}

static moe_status joined_send(moe_transport *transport, moe_peer peer, const moe_frame *frames, int num_frames, moe_error *err) {
    moe_transport *part = ((joined *)transport)->parts[peer % PARTS];
    part->corked = transport->corked;
    return part->ops->send(part, peer / PARTS, frames, num_frames, err);
}

static moe_status poll_part(joined *j, int part, int64_t deadline_ns, moe_event *event, moe_error *err) {
    moe_transport *t = j->parts[part];
    t->computing = j->base.computing;
    moe_status status = t->ops->poll(t, deadline_ns, event, err);
    if (status != MOE_OK || event->kind == MOE_EVENT_NONE) return status;
    event->peer = event->peer * PARTS + (moe_peer)part;
    if (event->link) event->link = event->link * PARTS + (uint64_t)part;
    return MOE_OK;
}

static void joined_flush(moe_transport *transport) {
    joined *j = (joined *)transport;
    for (int part = 0; part < PARTS; part++)
        if (j->parts[part]->ops->flush) j->parts[part]->ops->flush(j->parts[part]);
}

/* What is there already. */
static moe_status ask_both(joined *j, moe_event *event, moe_error *err) {
    moe_status status = MOE_OK;
    event->kind = MOE_EVENT_NONE;
    j->first = !j->first;
    for (int i = 0; i < PARTS && status == MOE_OK && event->kind == MOE_EVENT_NONE; i++)
        status = poll_part(j, i ^ j->first, 0, event, err);
    return status;
}

/* The near part sleeps for both. */
static moe_status poll_both(joined *j, int64_t deadline_ns, moe_event *event, moe_error *err) {
    for (;;) {
        moe_status status = ask_both(j, event, err);
        if (status != MOE_OK || event->kind != MOE_EVENT_NONE) return status;
        if (atomic_exchange(&j->woken, false) || moe_now_ns(j->clock) >= deadline_ns) return MOE_OK;
        int64_t far_ns = j->parts[FAR]->ops->rest(j->parts[FAR], NULL);
        status = poll_part(j, NEAR, far_ns < deadline_ns ? far_ns : deadline_ns, event, err);
        if (status != MOE_OK || event->kind != MOE_EVENT_NONE) return status;
    }
}

static moe_status joined_poll(moe_transport *transport, int64_t deadline_ns, moe_event *event, moe_error *err) {
    joined *j = (joined *)transport;
    if (j->used[NEAR] && j->used[FAR]) return poll_both(j, deadline_ns, event, err);
    return poll_part(j, j->used[FAR] ? FAR : NEAR, deadline_ns, event, err);
}

static void joined_wake(moe_transport *transport) {
    joined *j = (joined *)transport;
    j->woken = true;
    moe_transport *sleeper = j->parts[j->used[FAR] && !j->used[NEAR] ? FAR : NEAR];
    sleeper->ops->wake(sleeper);
}

static void joined_close(moe_transport *transport) {
    joined *j = (joined *)transport;
    for (int part = 0; part < PARTS; part++) j->parts[part]->ops->close(j->parts[part]);
    moe_free(j);
}

static const moe_transport_ops joined_ops = {
    .name = "joined",
    .close = joined_close,
    .can_reach = joined_can_reach,
    .listen = joined_listen,
    .connect = joined_connect,
    .disconnect = joined_disconnect,
    .send = joined_send,
    .poll = joined_poll,
    .flush = joined_flush,
    .wake = joined_wake,
};

moe_status moe_joined_open(moe_transport *near, moe_transport *far, const moe_clock *clock, moe_transport **out, moe_error *err) {
    int descriptor = -1;
    *out = NULL;
    far->ops->rest(far, &descriptor);
    joined *j = near->ops->watch(near, descriptor) ? moe_calloc(1, sizeof *j) : NULL;
    if (!j) {
        near->ops->close(near);
        far->ops->close(far);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory or descriptors for a transport");
    }
    *j = (joined){.base = {.ops = &joined_ops}, .clock = clock, .parts = {near, far}};
    *out = &j->base;
    return MOE_OK;
}
