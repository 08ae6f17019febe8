/* The listening ROUTER socket and the peers that connected to it. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/socket_file.h"
#include "common/zmq/zmq_internal.h"

#define DEAD_KEPT_NS MOE_NS_PER_S /* far longer than a message can lie between libzmq's network thread and poll */

/* ---- listening ---- */

static moe_status bind_endpoint(zmq_listener *l, const zmq_endpoint *endpoint, moe_error *err) {
    if (!endpoint->tcp) { /* libzmq unlinks whatever has the name before it binds */
        moe_status status = moe_socket_file_check(endpoint->address + strlen("ipc://"), err);
        if (status != MOE_OK) return status;
    }
    if (strchr(endpoint->address, '[')) moe_zmq_set_int(l->router, ZMQ_IPV6, 1);
    /* The file is made inside zmq_bind, so that its mode is right from the first moment on. */
    mode_t before = umask(0077);
    int rc = zmq_bind(l->router, endpoint->address);
    int reason = errno;
    umask(before);
    errno = reason;
    if (rc != 0) return moe_zmq_fail(err, "listen at", endpoint->address);
    if (!endpoint->tcp) snprintf(l->socket_file, sizeof l->socket_file, "%s", endpoint->address + strlen("ipc://"));
    return MOE_OK;
}

/* The address in use, with our own role where a connecter would not assume it. */
static void fill_bound(const zmq_transport *t, const zmq_endpoint *endpoint, char *bound) {
    char address[MOE_ENDPOINT_BYTES] = "";
    size_t size = sizeof address;
    zmq_getsockopt(t->listener.router, ZMQ_LAST_ENDPOINT, address, &size);
    const char *query = "", *role = "";
    for (int i = MOE_ROLE_LOCAL + 1; endpoint->tcp && i < MOE_ROLE_COUNT; i++) {
        if (i == MOE_ROLE_WORKER || strcmp(t->keys.role_keys[i], t->keys.public_key) != 0) continue;
        query = "?role=";
        role = moe_zmq_role_name((moe_role)i);
    }
    snprintf(bound, MOE_ENDPOINT_BYTES, "%.*s%s%s", MOE_ENDPOINT_BYTES - 32, address, query, role);
}

static moe_status open_listener(zmq_transport *t, const zmq_endpoint *endpoint, moe_error *err) {
    zmq_listener *l = &t->listener;
    l->tcp = endpoint->tcp;
    l->accepted = moe_calloc((size_t)t->config.max_accepted, sizeof *l->accepted);
    if (!l->accepted) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s: out of memory", endpoint->address);
    l->router = moe_zmq_socket_new(t, ZMQ_ROUTER);
    if (!l->router) return moe_zmq_fail(err, "open a socket for", endpoint->address);
    moe_status status = endpoint->tcp ? moe_zmq_auth_server(t, l->router, err) : MOE_OK;
    if (status != MOE_OK) return moe_fail_prefix(err, status, "listen %s", endpoint->address);
    l->monitor = moe_zmq_monitor_new(t, l->router, ZMQ_EVENT_DISCONNECTED);
    if (!l->monitor || !moe_zmq_watch(t, l->monitor, &l->monitor_ready)) return moe_zmq_fail(err, "monitor", endpoint->address);
    status = bind_endpoint(l, endpoint, err);
    if (status == MOE_OK && !moe_zmq_watch(t, l->router, &l->ready)) status = moe_zmq_fail(err, "watch", endpoint->address);
    return status;
}

moe_status moe_zmq_listen(moe_transport *transport, const char *text, char *bound, moe_error *err) {
    zmq_transport *t = (zmq_transport *)transport;
    zmq_endpoint endpoint;
    moe_status status = moe_zmq_parse_endpoint(text, &endpoint, err);
    if (status != MOE_OK) return status;
    if (t->listener.router) return moe_fail(err, MOE_FAILED_PRECONDITION, "%s: this transport already listens", endpoint.address);
    status = open_listener(t, &endpoint, err);
    if (status != MOE_OK) {
        moe_zmq_listener_close(t);
    } else if (bound) {
        fill_bound(t, &endpoint, bound);
    }
    return status;
}

void moe_zmq_listener_close(zmq_transport *t) {
    zmq_listener *l = &t->listener;
    /* Before the socket ends: after that, the name may be a successor's. */
    if (l->socket_file[0]) unlink(l->socket_file);
    moe_zmq_socket_close(t, l->router, l->monitor, t->config.linger_ms);
    for (int i = 0; i < l->num_accepted; i++) moe_zmq_account_release(l->accepted[i].account);
    moe_free(l->accepted);
    *l = (zmq_listener){.router = NULL};
}

/* ---- accepted peers ---- */

static void begin_closing(zmq_listener *l, zmq_accepted *a) {
    if (a->state != ACCEPTED_LIVE) return;
    a->state = ACCEPTED_CLOSING;
    l->num_closing++;
}

void moe_zmq_listener_read_monitor(zmq_transport *t) {
    zmq_listener *l = &t->listener;
    int fd;
    while (moe_zmq_monitor_read(l->monitor, &fd)) {
        for (int i = 0; i < l->num_accepted; i++) {
            if (l->accepted[i].fd == fd) begin_closing(l, &l->accepted[i]);
        }
    }
    l->monitor_ready = false;
}

static void report_down(zmq_listener *l, zmq_accepted *a, int64_t now_ns, moe_event *event) {
    *event = (moe_event){.kind = MOE_EVENT_PEER_DOWN, .peer = a->peer};
    moe_zmq_account_release(a->account);
    a->account = NULL;
    a->peer = 0;
    a->state = ACCEPTED_DEAD;
    a->heard_at_ns = now_ns;
    l->num_closing--;
}

bool moe_zmq_listener_take_down(zmq_transport *t, int64_t now_ns, moe_event *event) {
    zmq_listener *l = &t->listener;
    for (int i = 0; l->num_closing > 0 && i < l->num_accepted; i++) {
        if (l->accepted[i].state != ACCEPTED_CLOSING) continue;
        report_down(l, &l->accepted[i], now_ns, event);
        return true;
    }
    return false;
}

static zmq_accepted *find_accepted(zmq_listener *l, const void *routing_id, size_t bytes) {
    for (int i = 0; i < l->num_accepted; i++) {
        zmq_accepted *a = &l->accepted[i];
        if (a->routing_id_bytes == bytes && memcmp(a->routing_id, routing_id, bytes) == 0) return a;
    }
    return NULL;
}

static zmq_accepted *longest_silent(zmq_listener *l, zmq_accepted_state state) {
    zmq_accepted *oldest = NULL;
    for (int i = 0; i < l->num_accepted; i++) {
        zmq_accepted *a = &l->accepted[i];
        if (a->state == state && (!oldest || a->heard_at_ns < oldest->heard_at_ns)) oldest = a;
    }
    return oldest;
}

/* A slot whose peer is long dead, else one never used, else a dead one. NULL when all are in use. */
static zmq_accepted *find_slot(zmq_listener *l, int limit, int64_t now_ns) {
    zmq_accepted *dead = longest_silent(l, ACCEPTED_DEAD);
    bool reusable = dead && (now_ns - dead->heard_at_ns > DEAD_KEPT_NS || l->num_accepted == limit);
    if (reusable) return dead;
    return l->num_accepted < limit ? &l->accepted[l->num_accepted] : NULL;
}

static zmq_accepted *add_accepted(zmq_transport *t, const void *routing_id, size_t bytes, int fd, int64_t now_ns) {
    zmq_listener *l = &t->listener;
    /* A descriptor's number comes again: what ended before this peer began must be known before its number is noted. */
    moe_zmq_listener_read_monitor(t);
    zmq_accepted *a = find_slot(l, t->config.max_accepted, now_ns);
    zmq_account *account = a ? moe_zmq_account_new() : NULL;
    if (!account) return NULL;
    int index = (int)(a - l->accepted);
    if (index == l->num_accepted) l->num_accepted++;
    *a = (zmq_accepted){.state = ACCEPTED_LIVE, .fd = fd, .account = account, .routing_id_bytes = bytes};
    memcpy(a->routing_id, routing_id, bytes);
    a->peer = moe_zmq_new_peer(t, MOE_ZMQ_MAX_CONNECTIONS + index);
    return a;
}

/* The peer behind a message; NULL when the message must be dropped: it is from a connection that has been reported down, or there
 * is no room (then the longest silent peer is given up, which makes room for the sender's next message). */
static zmq_accepted *peer_of_message(zmq_transport *t, zmq_msg_t *routing_id, int64_t now_ns) {
    const void *id = zmq_msg_data(routing_id);
    size_t bytes = zmq_msg_size(routing_id);
    int fd = zmq_msg_get(&t->held[0], ZMQ_SRCFD);
    zmq_accepted *a = find_accepted(&t->listener, id, bytes);
    if (a) return a->state != ACCEPTED_DEAD && a->fd == fd ? a : NULL;
    a = add_accepted(t, id, bytes, fd, now_ns);
    zmq_accepted *given_up = a ? NULL : longest_silent(&t->listener, ACCEPTED_LIVE);
    if (given_up) begin_closing(&t->listener, given_up);
    return a;
}

/* tcp: as the ZAP handler said when the connection was made. */
static bool role_of_message(zmq_transport *t, moe_role *role) {
    *role = MOE_ROLE_LOCAL;
    if (!t->listener.tcp) return true;
    const char *user = zmq_msg_gets(&t->held[0], "User-Id");
    return user && moe_zmq_role_parse(user, role);
}

static bool receive_one(zmq_transport *t, zmq_msg_t *routing_id, int64_t now_ns, moe_event *event) {
    moe_role role;
    zmq_accepted *a = role_of_message(t, &role) ? peer_of_message(t, routing_id, now_ns) : NULL;
    if (!a) {
        moe_zmq_release_held(t);
        return false;
    }
    a->heard_at_ns = now_ns;
    *event = (moe_event){.kind = MOE_EVENT_MESSAGE, .peer = a->peer, .role = role};
    moe_zmq_fill_frames(t, event);
    return true;
}

bool moe_zmq_listener_receive(zmq_transport *t, int64_t now_ns, moe_event *event) {
    zmq_msg_t routing_id;
    zmq_msg_init(&routing_id);
    bool got = false;
    while (!got && t->listener.ready) {
        zmq_received received = moe_zmq_receive(t, t->listener.router, &routing_id);
        if (received == RECEIVED_NOTHING) t->listener.ready = false;
        if (received == RECEIVED_MESSAGE) got = receive_one(t, &routing_id, now_ns, event);
    }
    zmq_msg_close(&routing_id);
    return got;
}

moe_status moe_zmq_send_accepted(zmq_transport *t, int index, moe_peer peer, const moe_frame *frames, int num_frames,
                                 moe_error *err) {
    zmq_accepted *a = index < t->listener.num_accepted ? &t->listener.accepted[index] : NULL;
    if (!a || a->peer != peer || a->state != ACCEPTED_LIVE) {
        return moe_fail(err, MOE_UNAVAILABLE, "peer %llu is gone", (unsigned long long)peer);
    }
    moe_status status =
        moe_zmq_send_frames(t, t->listener.router, a->account, a->routing_id, a->routing_id_bytes, frames, num_frames, err);
    t->listener.ready = true;
    if (status == MOE_UNAVAILABLE) begin_closing(&t->listener, a);
    return status;
}
