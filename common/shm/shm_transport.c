/* The transport operations over shared memory: open, close, poll, send, wake. */
#include "common/shm/shm_transport.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/shm/shm_internal.h"

#define POLLS_WITHOUT_LOOK 64 /* then the sockets are asked, too, so that full rings do not hide them */
#define MAX_EVENTS_PER_LOOK 64
#define LINGER_STEP_NS MOE_NS_PER_MS

moe_status moe_shm_fail(moe_error *err, const char *what, const char *where) {
    int reason = errno;
    moe_status status = MOE_UNAVAILABLE;
    if (reason == EADDRINUSE) status = MOE_ALREADY_EXISTS;
    if (reason == EACCES || reason == EPERM) status = MOE_PERMISSION_DENIED;
    if (reason == EMFILE || reason == ENFILE || reason == ENOMEM || reason == ENOSPC) status = MOE_RESOURCE_EXHAUSTED;
    return moe_fail(err, status, "cannot %s %s: %s", what, where, strerror(reason));
}

bool moe_shm_watch(shm_transport *t, int fd, int slot) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)slot};
    return epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0;
}

shm_peer *moe_shm_next_peer(const shm_transport *t, int *slot) {
    for (; *slot < MOE_SHM_MAX_CONNECTIONS + t->num_accepted; ++*slot) {
        if (*slot == t->num_connections) *slot = MOE_SHM_MAX_CONNECTIONS;
        if (*slot < PEER_SLOTS && t->peers[*slot]) return t->peers[(*slot)++];
    }
    return NULL;
}

static bool shm_can_reach(const moe_transport *transport, const char *endpoint) {
    (void)transport;
    return strncmp(endpoint, "shm:", strlen("shm:")) == 0;
}

static moe_status shm_send_op(moe_transport *transport, moe_peer peer, const moe_frame *frames, int num_frames, moe_error *err) {
    shm_transport *t = (shm_transport *)transport;
    shm_peer *p = t->peers[peer % PEER_SLOTS];
    if (!p || p->state != PEER_UP || p->number != peer) {
        return moe_fail(err, MOE_UNAVAILABLE, "peer %llu is gone", (unsigned long long)peer);
    }
    p->channel.corked = transport->corked;
    moe_status status = moe_shm_channel_send(&p->channel, frames, num_frames, err);
    t->owes_wakes = t->owes_wakes || p->channel.owes_wake;
    return status;
}

static bool sleeps_on(const shm_channel *c, int core) {
    return atomic_load_explicit(&c->out.words->consumer_asleep, memory_order_relaxed) == 1 + (uint32_t)core;
}

/* Those that sleep on other cores first: one of this core may run at once in our place. */
static void shm_flush_op(moe_transport *transport) {
    shm_transport *t = (shm_transport *)transport;
    if (!t->owes_wakes) return;
    t->owes_wakes = false;
    int core = sched_getcpu();
    for (int here = 0; here <= 1; here++) {
        int slot = 0;
        for (shm_peer *p; (p = moe_shm_next_peer(t, &slot));) {
            bool wake = p->state == PEER_UP && p->channel.owes_wake && (here || !sleeps_on(&p->channel, core));
            if (wake) moe_shm_channel_wake(&p->channel);
        }
    }
}

/* ---- poll ---- */

static void forget(shm_transport *t, shm_peer *p) {
    moe_shm_peer_drop(t, p);
    t->peers[p->slot] = NULL;
    moe_free(p);
}

/* Greetings, attempts, hang-ups and queues of one peer. True: *event is PEER_UP. */
static bool tend(shm_transport *t, shm_peer *p, int64_t now_ns, moe_event *event) {
    bool up = false;
    if (p->readable && p->state == PEER_UP) moe_shm_peer_drain_socket(p);
    moe_shm_peer_flush(p);
    if (p->link) {
        up = moe_shm_connection_tick(t, p, now_ns, event);
    } else {
        moe_shm_accepted_tick(t, p, now_ns);
        if (p->state == PEER_ENDED) forget(t, p);
    }
    return up;
}

/* Peers in turn, beginning after the one that had the last message. PEER_DOWN of a peer that nobody has heard of is not reported. */
static moe_status take_message(shm_transport *t, moe_event *event, bool *got, moe_error *err) {
    *got = false;
    for (int round = 0; round < 2; round++) {
        int slot = round == 0 ? t->cursor + 1 : 0, end = round == 0 ? PEER_SLOTS : t->cursor + 1;
        for (shm_peer *p; (p = moe_shm_next_peer(t, &slot)) && p->slot < end;) {
            *event = (moe_event){.kind = MOE_EVENT_NONE};
            moe_status status = moe_shm_peer_receive(p, event, got, err);
            if (status != MOE_OK) return status;
            *got = *got && p->known;
            if (!*got) continue;
            t->cursor = p->slot;
            if (event->kind == MOE_EVENT_MESSAGE) t->held = p;
            return MOE_OK;
        }
    }
    return MOE_OK;
}

static moe_status take_event(shm_transport *t, int64_t now_ns, moe_event *event, bool *got, moe_error *err) {
    if (t->listener.fd >= 0) moe_shm_listener_accept(t, now_ns);
    int slot = 0;
    *got = true;
    for (shm_peer *p; (p = moe_shm_next_peer(t, &slot));)
        if (tend(t, p, now_ns, event)) return MOE_OK;
    return take_message(t, event, got, err);
}

static int64_t next_timer_ns(const shm_transport *t) {
    int64_t next_ns = t->listener.retry_ns ? t->listener.retry_ns : INT64_MAX;
    int slot = 0;
    for (shm_peer *p; (p = moe_shm_next_peer(t, &slot));)
        if ((p->state == PEER_WAITING || p->state == PEER_GREETING) && p->timer_ns < next_ns) next_ns = p->timer_ns;
    return next_ns;
}

static bool take_wake(shm_transport *t) {
    if (!atomic_load(&t->woken)) return false;
    atomic_store(&t->woken, false);
    t->interrupted = true;
    return true;
}

/* Notes which sockets have something; true when any has. */
static moe_status look_at_sockets(shm_transport *t, int sleep_ms, bool *any, moe_error *err) {
    struct epoll_event events[MAX_EVENTS_PER_LOOK];
    int count = epoll_wait(t->epoll_fd, events, MAX_EVENTS_PER_LOOK, sleep_ms);
    t->polls_since_look = 0;
    *any = count != 0;
    if (count < 0) t->interrupted = true;
    if (count < 0) return errno == EINTR ? MOE_OK : moe_shm_fail(err, "poll", "the sockets");
    for (int i = 0; i < count; i++) {
        uint64_t slot = events[i].data.u64;
        if (slot == SLOT_LISTENER) t->listener.readable = true;
        if (slot == SLOT_WATCHED) t->interrupted = true;
        if (slot < PEER_SLOTS && t->peers[slot]) t->peers[slot]->readable = true;
    }
    return MOE_OK;
}

/* Sleeps until a socket or a wake has something; not at all where a ring has. */
static moe_status sleep_on_sockets(shm_transport *t, int sleep_ms, bool *any, moe_error *err) {
    bool idle = true;
    int slot = 0, core = sched_getcpu();
    atomic_store(&t->asleep, true);
    for (shm_peer *p; (p = moe_shm_next_peer(t, &slot));) idle = moe_shm_peer_sleep(p, core) && idle;
    idle = !atomic_load(&t->woken) && idle;
    moe_status status = look_at_sockets(t, idle ? sleep_ms : 0, any, err);
    atomic_store_explicit(&t->asleep, false, memory_order_relaxed);
    slot = 0;
    for (shm_peer *p; (p = moe_shm_next_peer(t, &slot));) moe_shm_peer_rise(p);
    *any = take_wake(t) || !idle || *any;
    return status;
}

/* A moe_look. The rings are asked by memory alone; a ring that has something, or has got room again, is something. */
static moe_status look(void *transport, int sleep_ms, bool *any, moe_error *err) {
    shm_transport *t = transport;
    if (sleep_ms > 0) return sleep_on_sockets(t, sleep_ms, any, err);
    int slot = 0;
    *any = take_wake(t);
    for (shm_peer *p; !*any && (p = moe_shm_next_peer(t, &slot));) *any = moe_shm_peer_ready(p);
    return *any ? MOE_OK : look_at_sockets(t, 0, any, err);
}

/* The last event's frames are given up. */
static void release_frames(shm_transport *t) {
    if (t->held) moe_shm_channel_trim(&t->held->channel);
    moe_free(t->orphan);
    t->held = NULL;
    t->orphan = NULL;
}

static moe_status shm_poll_op(moe_transport *transport, int64_t deadline_ns, moe_event *event, moe_error *err) {
    shm_transport *t = (shm_transport *)transport;
    bool got;
    release_frames(t);
    shm_flush_op(transport);
    t->interrupted = false;
    if (++t->polls_since_look >= POLLS_WITHOUT_LOOK) {
        moe_status status = look_at_sockets(t, 0, &got, err);
        if (status != MOE_OK) return status;
    }
    for (bool last = false;;) {
        int64_t now_ns = moe_now_ns(t->config.clock);
        moe_status status = take_event(t, now_ns, event, &got, err);
        if (status != MOE_OK || got) return status;
        *event = (moe_event){.kind = MOE_EVENT_NONE};
        if (last) return MOE_OK;
        int64_t timer_ns = next_timer_ns(t), until_ns = timer_ns < deadline_ns ? timer_ns : deadline_ns;
        status = moe_wait_adaptively(&t->wait, now_ns, until_ns, t->base.computing, look, t, err);
        if (status != MOE_OK) return status;
        last = t->interrupted || moe_now_ns(t->config.clock) >= deadline_ns;
    }
}

static void shm_wake(moe_transport *transport) {
    shm_transport *t = (shm_transport *)transport;
    const uint64_t one = 1;
    atomic_store(&t->woken, true);
    if (!atomic_load(&t->asleep)) return;
    ssize_t put = write(t->wake_fd, &one, sizeof one);
    (void)put; /* EAGAIN: 2^64 wakes are waiting already */
}

static bool shm_watch_op(moe_transport *transport, int descriptor) {
    return moe_shm_watch((shm_transport *)transport, descriptor, SLOT_WATCHED);
}

/* ---- open and close ---- */

/* Waits until the peers have taken what was queued for them, or the time is up. */
static void linger(shm_transport *t) {
    int64_t until_ns = moe_now_ns(t->config.clock) + t->config.linger_ms * MOE_NS_PER_MS;
    for (;;) {
        int slot = 0;
        bool queued = false;
        for (shm_peer *p; (p = moe_shm_next_peer(t, &slot));) {
            if (p->state != PEER_UP) continue;
            moe_shm_peer_flush(p);
            moe_shm_peer_drain_socket(p);
            queued = queued || (p->state == PEER_UP && p->channel.first && !p->channel.out.broken);
        }
        if (!queued || moe_now_ns(t->config.clock) >= until_ns) return;
        const struct timespec step = {.tv_nsec = LINGER_STEP_NS};
        nanosleep(&step, NULL);
    }
}

static void shm_close_op(moe_transport *transport) {
    shm_transport *t = (shm_transport *)transport;
    shm_flush_op(transport);
    linger(t);
    release_frames(t);
    moe_shm_listener_close(t);
    int slot = 0;
    for (shm_peer *p; (p = moe_shm_next_peer(t, &slot));) forget(t, p);
    if (t->epoll_fd >= 0) close(t->epoll_fd);
    if (t->wake_fd >= 0) close(t->wake_fd);
    moe_free(t);
}

static const moe_transport_ops shm_ops = {
    .name = "shm",
    .close = shm_close_op,
    .can_reach = shm_can_reach,
    .listen = moe_shm_listen,
    .connect = moe_shm_connect,
    .disconnect = moe_shm_disconnect,
    .send = shm_send_op,
    .poll = shm_poll_op,
    .wake = shm_wake,
    .flush = shm_flush_op,
    .watch = shm_watch_op,
};

moe_status moe_shm_open(const moe_shm_config *config, moe_transport **out, moe_error *err) {
    *out = NULL;
    if (config->linger_ms < 0 || config->poll_ns < 0 || config->max_queued_bytes < 0 || config->max_message_bytes < 0 ||
        config->max_message_bytes > MOE_MAX_MESSAGE_BYTES || config->max_accepted < 0 ||
        config->max_accepted > MOE_SHM_MAX_ACCEPTED) {
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "shm transport: a limit is negative, or beyond %lld bytes of a message or %d accepted peers",
                        (long long)MOE_MAX_MESSAGE_BYTES, MOE_SHM_MAX_ACCEPTED);
    }
    shm_transport *t = moe_calloc(1, sizeof *t);
    if (!t) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "shm transport: out of memory");
    t->base.ops = &shm_ops;
    t->config = *config;
    if (!config->max_accepted) t->config.max_accepted = MOE_SHM_MAX_ACCEPTED;
    t->limits = (shm_limits){config->max_message_bytes ? config->max_message_bytes : MOE_MAX_MESSAGE_BYTES,
                             config->max_queued_bytes ? config->max_queued_bytes : MOE_MAX_PEER_QUEUED_BYTES};
    t->wait = (moe_adaptive_wait){.clock = config->clock, .poll_ns = config->poll_ns};
    t->listener.fd = -1;
    t->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    /* Edge-triggered: each write is told of once, and nobody need read the count. */
    struct epoll_event wake = {.events = EPOLLIN | EPOLLET, .data.u64 = SLOT_WAKE};
    if (t->wake_fd < 0 || t->epoll_fd < 0 || epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, t->wake_fd, &wake) != 0) {
        moe_status status = moe_shm_fail(err, "open", "the shm transport");
        shm_close_op(&t->base);
        return status;
    }
    *out = &t->base;
    return MOE_OK;
}
