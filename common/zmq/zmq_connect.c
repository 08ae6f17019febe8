/* Connections: one DEALER socket for one network connection; we reconnect, libzmq never does. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/random.h"
#include "common/zmq/zmq_internal.h"

#define MONITORED_EVENTS                                                                                                \
    (ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_CLOSED | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL | \
     ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH)
#define DRAIN_NS                                                                                                  \
    (5 * MOE_NS_PER_MS) /* libzmq reports the end of a connection a moment before it hands over its last messages \
                         */

static void close_sockets(zmq_transport *t, zmq_connection *c, int64_t linger_ms) {
    moe_zmq_socket_close(t, c->dealer, c->monitor, linger_ms);
    moe_zmq_account_release(c->account);
    c->dealer = c->monitor = NULL;
    c->account = NULL;
    c->peer = 0;
    c->ready = c->monitor_ready = false;
}

static moe_status set_routing_id(void *dealer, const char *where, moe_error *err) {
    /* libzmq keeps ids that begin with a zero byte for itself */
    unsigned char id[1 + 2 * sizeof(uint64_t)] = {1};
    for (size_t i = 0; i < 2; i++) {
        uint64_t bits = moe_random_identity();
        memcpy(id + 1 + i * sizeof bits, &bits, sizeof bits);
    }
    return zmq_setsockopt(dealer, ZMQ_ROUTING_ID, id, sizeof id) == 0 ? MOE_OK : moe_zmq_fail(err, "name a socket for", where);
}

static moe_status open_sockets(zmq_transport *t, zmq_connection *c, moe_error *err) {
    const char *address = c->endpoint.address;
    c->account = moe_zmq_account_new();
    if (!c->account) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "connect %s: out of memory", address);
    c->dealer = moe_zmq_socket_new(t, ZMQ_DEALER);
    if (!c->dealer) return moe_zmq_fail(err, "open a socket for", address);
    moe_status status = set_routing_id(c->dealer, address, err);
    if (status != MOE_OK) return status;
    if (c->endpoint.tcp) {
        status = moe_zmq_auth_client(t, c->dealer, c->endpoint.role, err);
        if (status != MOE_OK) return moe_fail_prefix(err, status, "connect %s", address);
    }
    if (strchr(address, '[')) moe_zmq_set_int(c->dealer, ZMQ_IPV6, 1);
    c->monitor = moe_zmq_monitor_new(t, c->dealer, MONITORED_EVENTS);
    if (!c->monitor || !moe_zmq_watch(t, c->monitor, &c->monitor_ready)) return moe_zmq_fail(err, "monitor", address);
    return zmq_connect(c->dealer, address) == 0 ? MOE_OK : moe_zmq_fail(err, "connect", address);
}

static void wait_before_next(zmq_transport *t, zmq_connection *c, int64_t now_ns) {
    close_sockets(t, c, 0);
    c->state = LINK_WAITING;
    c->timer_ns = now_ns + c->backoff_ns;
    c->backoff_ns *= 2;
    if (c->backoff_ns > MOE_ZMQ_RECONNECT_MAX_MS * MOE_NS_PER_MS) c->backoff_ns = MOE_ZMQ_RECONNECT_MAX_MS * MOE_NS_PER_MS;
}

/* One attempt; OK means that libzmq is at it. */
static moe_status attempt(zmq_transport *t, zmq_connection *c, int64_t now_ns, moe_error *err) {
    moe_status status = open_sockets(t, c, err);
    if (status != MOE_OK) {
        wait_before_next(t, c, now_ns);
        return status;
    }
    c->state = LINK_CONNECTING;
    /* The network and the handshake have this time-out each; beyond both, libzmq has not told of a failure (as with a host name
     * that cannot be resolved). */
    c->timer_ns = now_ns + (2 * t->config.handshake_timeout_ms + MOE_ZMQ_RECONNECT_MAX_MS) * MOE_NS_PER_MS;
    return MOE_OK;
}

moe_status moe_zmq_connect(moe_transport *transport, const char *endpoint, uint64_t *link, moe_error *err) {
    zmq_transport *t = (zmq_transport *)transport;
    int slot = 0;
    while (slot < MOE_ZMQ_MAX_CONNECTIONS && t->connections[slot]) slot++;
    if (slot == MOE_ZMQ_MAX_CONNECTIONS) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "connect %.64s: there are %d connections already", endpoint, slot);
    }
    zmq_connection *c = moe_calloc(1, sizeof *c);
    if (!c) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "connect %.64s: out of memory", endpoint);
    c->backoff_ns = MOE_ZMQ_RECONNECT_MIN_MS * MOE_NS_PER_MS;
    c->slot = slot;
    c->link = ++t->last_number;
    moe_status status = moe_zmq_parse_endpoint(endpoint, &c->endpoint, err);
    if (status == MOE_OK) status = attempt(t, c, moe_now_ns(t->config.clock), err);
    if (status != MOE_OK) {
        moe_free(c);
        return status;
    }
    t->connections[slot] = c;
    if (slot >= t->num_connections) t->num_connections = slot + 1;
    *link = c->link;
    return MOE_OK;
}

void moe_zmq_connection_close(zmq_transport *t, zmq_connection *c, int64_t linger_ms) {
    close_sockets(t, c, linger_ms);
    t->connections[c->slot] = NULL;
    moe_free(c);
}

void moe_zmq_disconnect(moe_transport *transport, uint64_t link) {
    zmq_transport *t = (zmq_transport *)transport;
    for (int i = 0; i < t->num_connections; i++) {
        zmq_connection *c = t->connections[i];
        if (!c || c->link != link) continue;
        moe_zmq_connection_close(t, c, t->config.linger_ms);
        return;
    }
}

void moe_zmq_connection_tick(zmq_transport *t, zmq_connection *c, int64_t now_ns) {
    if (c->state == LINK_UP || now_ns < c->timer_ns) return;
    if (c->state == LINK_WAITING) {
        moe_error err;
        if (attempt(t, c, now_ns, &err) != MOE_OK) moe_debug("%s", err.message);
    } else if (c->state == LINK_CONNECTING) {
        wait_before_next(t, c, now_ns);
    } else {
        c->ready = true; /* a last look, then PEER_DOWN */
    }
}

static void log_refusal(zmq_connection *c, int event) {
    bool refused = event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH || event == ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL;
    if (!refused || c->told_refusal) return;
    c->told_refusal = true;
    moe_warn("%s: the handshake was refused: the key folder of one side lacks the other's key, or no Moesaic %s listens there",
             c->endpoint.address, c->endpoint.tcp ? moe_zmq_role_name(c->endpoint.role) : "process");
}

/* False: out of descriptors; the connection is given up and made again later. */
static bool begin_up(zmq_transport *t, zmq_connection *c, int64_t now_ns, moe_event *event) {
    if (!moe_zmq_watch(t, c->dealer, &c->ready)) {
        wait_before_next(t, c, now_ns);
        return false;
    }
    c->state = LINK_UP;
    c->told_refusal = false;
    c->backoff_ns = MOE_ZMQ_RECONNECT_MIN_MS * MOE_NS_PER_MS;
    c->peer = moe_zmq_new_peer(t, c->slot);
    *event = (moe_event){.kind = MOE_EVENT_PEER_UP, .peer = c->peer, .role = c->endpoint.role, .link = c->link};
    return true;
}

bool moe_zmq_connection_read_monitor(zmq_transport *t, zmq_connection *c, int64_t now_ns, moe_event *event) {
    while (c->monitor_ready) {
        int value, number = moe_zmq_monitor_read(c->monitor, &value);
        if (!number) {
            c->monitor_ready = false;
        } else if (number == ZMQ_EVENT_HANDSHAKE_SUCCEEDED && c->state == LINK_CONNECTING) {
            if (begin_up(t, c, now_ns, event)) return true;
        } else if (c->state == LINK_CONNECTING) {
            log_refusal(c, number);
            wait_before_next(t, c, now_ns);
        } else if (number == ZMQ_EVENT_DISCONNECTED && c->state == LINK_UP) {
            c->state = LINK_DRAINING;
            c->ready = true;
            c->timer_ns = now_ns + DRAIN_NS;
        }
    }
    return false;
}

bool moe_zmq_connection_receive(zmq_transport *t, zmq_connection *c, int64_t now_ns, moe_event *event) {
    while (c->ready) {
        zmq_received received = moe_zmq_receive(t, c->dealer, NULL);
        if (received == RECEIVED_MESSAGE) {
            *event = (moe_event){.kind = MOE_EVENT_MESSAGE, .peer = c->peer, .role = c->endpoint.role, .link = c->link};
            moe_zmq_fill_frames(t, event);
            return true;
        }
        if (received == RECEIVED_NOTHING) c->ready = false;
    }
    if (c->state != LINK_DRAINING || now_ns < c->timer_ns) return false;
    *event = (moe_event){.kind = MOE_EVENT_PEER_DOWN, .peer = c->peer, .role = c->endpoint.role, .link = c->link};
    wait_before_next(t, c, now_ns);
    return true;
}
