/* The transport operations over ZeroMQ: open, close, poll, send, wake. */
#include "common/zmq/zmq_transport.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/zmq/zmq_internal.h"

#define MAX_EVENTS_WITHOUT_WAIT 64 /* then all sockets are asked again, so that a busy one does not hide the others */
#define MAX_EVENTS_PER_LOOK 64     /* epoll takes turns among the descriptors, so none is hidden for long */

moe_status moe_zmq_fail(moe_error *err, const char *what, const char *where) {
    int reason = errno;
    moe_status status = MOE_UNAVAILABLE;
    if (reason == EADDRINUSE) status = MOE_ALREADY_EXISTS;
    if (reason == EACCES || reason == EPERM) status = MOE_PERMISSION_DENIED;
    if (reason == EINVAL || reason == ENODEV || reason == EPROTONOSUPPORT) status = MOE_INVALID_ARGUMENT;
    if (reason == EMFILE || reason == ENFILE || reason == ENOMEM) status = MOE_RESOURCE_EXHAUSTED;
    return moe_fail(err, status, "cannot %s %s: %s", what, where, zmq_strerror(reason));
}

moe_peer moe_zmq_new_peer(zmq_transport *t, int slot) { return ++t->last_number * PEER_SLOTS + (moe_peer)slot; }

static bool zmq_can_reach(const moe_transport *transport, const char *endpoint) {
    (void)transport;
    return strncmp(endpoint, "ipc:", strlen("ipc:")) == 0 || strncmp(endpoint, "tcp:", strlen("tcp:")) == 0;
}

static moe_status zmq_send_op(moe_transport *transport, moe_peer peer, const moe_frame *frames, int num_frames, moe_error *err) {
    zmq_transport *t = (zmq_transport *)transport;
    if (num_frames < 1 || num_frames > MOE_MAX_FRAMES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a message has 1 to %d frames, not %d", MOE_MAX_FRAMES, num_frames);
    }
    int slot = (int)(peer % PEER_SLOTS);
    if (slot >= MOE_ZMQ_MAX_CONNECTIONS) {
        return moe_zmq_send_accepted(t, slot - MOE_ZMQ_MAX_CONNECTIONS, peer, frames, num_frames, err);
    }
    zmq_connection *c = t->connections[slot];
    if (!c || c->state != LINK_UP || c->peer != peer) {
        return moe_fail(err, MOE_UNAVAILABLE, "peer %llu is gone", (unsigned long long)peer);
    }
    c->ready = true;
    return moe_zmq_send_frames(t, c->dealer, c->account, NULL, 0, frames, num_frames, err);
}

/* ---- poll ---- */

/* Sources in turn, beginning after the one that had the last message: 0 the listener, then the connections. */
static bool take_message(zmq_transport *t, int64_t now_ns, moe_event *event) {
    int num_sources = 1 + t->num_connections;
    for (int i = 1; i <= num_sources; i++) {
        int source = (t->cursor + i) % num_sources;
        bool got = false;
        if (source == 0) {
            got = t->listener.router && moe_zmq_listener_receive(t, now_ns, event);
        } else if (t->connections[source - 1]) {
            got = moe_zmq_connection_receive(t, t->connections[source - 1], now_ns, event);
        }
        if (!got) continue;
        t->cursor = source;
        return true;
    }
    return false;
}

/* The next event of those sockets that may have one. */
static bool take_event(zmq_transport *t, int64_t now_ns, moe_event *event) {
    if (t->zap_ready) moe_zmq_auth_answer(t, now_ns);
    t->zap_ready = false;
    if (t->listener.monitor_ready) moe_zmq_listener_read_monitor(t);
    for (int i = 0; i < t->num_connections; i++) {
        zmq_connection *c = t->connections[i];
        if (!c) continue;
        moe_zmq_connection_tick(t, c, now_ns);
        if (moe_zmq_connection_read_monitor(t, c, now_ns, event)) return true;
    }
    if (take_message(t, now_ns, event)) return true;
    return !t->listener.ready && moe_zmq_listener_take_down(t, now_ns, event);
}

static int64_t next_timer_ns(const zmq_transport *t) {
    int64_t next_ns = INT64_MAX;
    for (int i = 0; i < t->num_connections; i++) {
        const zmq_connection *c = t->connections[i];
        if (c && c->state != LINK_UP && c->timer_ns < next_ns) next_ns = c->timer_ns;
    }
    return next_ns;
}

static void drain_wake(int fd) {
    uint64_t count;
    ssize_t got = read(fd, &count, sizeof count);
    (void)got; /* EAGAIN: somebody else's wake was taken with the last one */
}

/* Notes which sockets may have something to receive. A moe_look; a wake or a signal is something, too, and sets t->woken. */
static moe_status look(void *transport, int sleep_ms, bool *any, moe_error *err) {
    zmq_transport *t = transport;
    struct epoll_event events[MAX_EVENTS_PER_LOOK];
    int count = epoll_wait(t->epoll_fd, events, MAX_EVENTS_PER_LOOK, sleep_ms);
    *any = count != 0;
    if (count < 0) t->woken = true;
    if (count < 0) return errno == EINTR ? MOE_OK : moe_zmq_fail(err, "poll", "the sockets");
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr) {
            *(bool *)events[i].data.ptr = true;
        } else {
            drain_wake(t->wake_fd);
            t->woken = true;
        }
    }
    return MOE_OK;
}

/* Waits until something may be received, at most until `until_ns`. */
static moe_status wait_ready(zmq_transport *t, int64_t until_ns, int64_t now_ns, moe_error *err) {
    t->events_since_wait = 0;
    return moe_wait_adaptively(&t->wait, now_ns, until_ns, t->base.computing, look, t, err);
}

static moe_status zmq_poll_op(moe_transport *transport, int64_t deadline_ns, moe_event *event, moe_error *err) {
    zmq_transport *t = (zmq_transport *)transport;
    moe_zmq_release_held(t);
    *event = (moe_event){.kind = MOE_EVENT_NONE};
    t->woken = false;
    if (t->events_since_wait >= MAX_EVENTS_WITHOUT_WAIT) {
        moe_status status = wait_ready(t, 0, 0, err);
        if (status != MOE_OK) return status;
    }
    bool last = t->woken;
    for (;;) {
        int64_t now_ns = moe_now_ns(t->config.clock);
        if (take_event(t, now_ns, event)) {
            t->events_since_wait++;
            return MOE_OK;
        }
        if (last) return MOE_OK;
        int64_t timer_ns = next_timer_ns(t);
        moe_status status = wait_ready(t, timer_ns < deadline_ns ? timer_ns : deadline_ns, now_ns, err);
        if (status != MOE_OK) return status;
        last = t->woken || moe_now_ns(t->config.clock) >= deadline_ns;
    }
}

static int64_t zmq_rest(moe_transport *transport, int *descriptor) {
    zmq_transport *t = (zmq_transport *)transport;
    if (descriptor) *descriptor = t->epoll_fd;
    return next_timer_ns(t);
}

static void zmq_wake(moe_transport *transport) {
    const uint64_t one = 1;
    ssize_t put = write(((zmq_transport *)transport)->wake_fd, &one, sizeof one);
    (void)put; /* EAGAIN: 2^64 wakes are waiting already */
}

/* ---- open and close ---- */

static void zmq_close_op(moe_transport *transport) {
    zmq_transport *t = (zmq_transport *)transport;
    moe_zmq_release_held(t);
    for (int i = 0; i < t->num_connections; i++) {
        if (t->connections[i]) moe_zmq_connection_close(t, t->connections[i], t->config.linger_ms);
    }
    moe_zmq_listener_close(t);
    if (t->zap) zmq_close(t->zap);
    while (t->context && zmq_ctx_term(t->context) != 0 && errno == EINTR) continue;
    if (t->epoll_fd >= 0) close(t->epoll_fd);
    if (t->wake_fd >= 0) close(t->wake_fd);
    explicit_bzero(&t->keys, sizeof t->keys);
    moe_free(t);
}

static const moe_transport_ops zmq_ops = {
    .name = "zmq",
    .close = zmq_close_op,
    .can_reach = zmq_can_reach,
    .listen = moe_zmq_listen,
    .connect = moe_zmq_connect,
    .disconnect = moe_zmq_disconnect,
    .send = zmq_send_op,
    .poll = zmq_poll_op,
    .wake = zmq_wake,
    .rest = zmq_rest,
};

static int64_t value_or(int64_t value, int64_t otherwise) { return value ? value : otherwise; }

moe_status moe_zmq_open(const moe_zmq_config *config, moe_transport **out, moe_error *err) {
    *out = NULL;
    if (config->linger_ms < 0 || config->poll_ns < 0 || config->handshake_timeout_ms < 0 || config->heartbeat_ms < 0 ||
        config->max_queued_bytes < 0 || config->max_message_bytes < 0 || config->max_message_bytes > MOE_MAX_MESSAGE_BYTES ||
        config->max_accepted < 0 || config->max_accepted > MOE_ZMQ_MAX_ACCEPTED) {
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "zmq transport: a limit is negative, or beyond %lld bytes of a message or %d accepted peers",
                        (long long)MOE_MAX_MESSAGE_BYTES, MOE_ZMQ_MAX_ACCEPTED);
    }
    zmq_transport *t = moe_calloc(1, sizeof *t);
    if (!t) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "zmq transport: out of memory");
    t->base.ops = &zmq_ops;
    t->config = *config;
    t->wait = (moe_adaptive_wait){.clock = config->clock, .poll_ns = config->poll_ns};
    if (config->keys) t->keys = *config->keys;
    t->config.keys = config->keys ? &t->keys : NULL;
    t->config.handshake_timeout_ms = value_or(config->handshake_timeout_ms, MOE_ZMQ_HANDSHAKE_TIMEOUT_MS);
    t->config.heartbeat_ms = value_or(config->heartbeat_ms, MOE_ZMQ_HEARTBEAT_MS);
    t->config.max_message_bytes = value_or(config->max_message_bytes, MOE_MAX_MESSAGE_BYTES);
    t->config.max_queued_bytes = value_or(config->max_queued_bytes, MOE_MAX_PEER_QUEUED_BYTES);
    if (!config->max_accepted) t->config.max_accepted = MOE_ZMQ_MAX_ACCEPTED;
    t->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wake = {.events = EPOLLIN};
    bool watched = t->wake_fd >= 0 && t->epoll_fd >= 0 && epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, t->wake_fd, &wake) == 0;
    t->context = watched ? zmq_ctx_new() : NULL;
    if (!t->context) {
        moe_status status = moe_zmq_fail(err, "open", "the zmq transport");
        zmq_close_op(&t->base);
        return status;
    }
    *out = &t->base;
    return MOE_OK;
}
