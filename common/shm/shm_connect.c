/* Connections: the side that makes the memory, hands it over, and reconnects. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/shm/shm_internal.h"

void moe_shm_connection_lost(shm_transport *t, shm_peer *p, int64_t now_ns) {
    moe_shm_peer_drop(t, p);
    p->state = PEER_WAITING;
    p->timer_ns = now_ns + p->backoff_ns;
    p->backoff_ns *= 2;
    if (p->backoff_ns > MOE_SHM_RECONNECT_MAX_MS * MOE_NS_PER_MS) p->backoff_ns = MOE_SHM_RECONNECT_MAX_MS * MOE_NS_PER_MS;
}

/* Connects and greets; what has no listener yet is no error. */
static moe_status open_connection(shm_transport *t, shm_peer *p, moe_error *err) {
    const char *path = p->address.sun_path;
    p->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (p->fd < 0) return moe_shm_fail(err, "open a socket for", path);
    if (connect(p->fd, (const struct sockaddr *)&p->address, sizeof p->address) != 0) return MOE_OK;
    if (!moe_shm_same_user(p->fd)) {
        moe_debug("%s belongs to another user", path);
        return MOE_OK;
    }
    int memory = moe_shm_memory_new(&p->map);
    if (memory < 0) return moe_shm_fail(err, "make shared memory for", path);
    bool greeted = moe_shm_greet(p->fd, memory);
    close(memory);
    if (!greeted) return MOE_OK;
    if (!moe_shm_watch(t, p->fd, p->slot)) return moe_shm_fail(err, "watch", path);
    p->state = PEER_GREETING;
    return MOE_OK;
}

static moe_status attempt(shm_transport *t, shm_peer *p, int64_t now_ns, moe_error *err) {
    moe_status status = open_connection(t, p, err);
    if (p->state == PEER_GREETING) {
        p->timer_ns = now_ns + MOE_SHM_HANDSHAKE_TIMEOUT_MS * MOE_NS_PER_MS;
    } else {
        moe_shm_connection_lost(t, p, now_ns);
    }
    return status;
}

moe_status moe_shm_connect(moe_transport *transport, const char *endpoint, uint64_t *link, moe_error *err) {
    shm_transport *t = (shm_transport *)transport;
    struct sockaddr_un address;
    int slot = 0;
    moe_status status = moe_shm_parse_endpoint(endpoint, &address, err);
    if (status != MOE_OK) return status;
    while (slot < MOE_SHM_MAX_CONNECTIONS && t->peers[slot]) slot++;
    if (slot == MOE_SHM_MAX_CONNECTIONS) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "connect %.64s: there are %d connections already", endpoint, slot);
    }
    shm_peer *p = moe_calloc(1, sizeof *p);
    if (!p) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "connect %.64s: out of memory", endpoint);
    *p = (shm_peer){.slot = slot,
                    .state = PEER_WAITING,
                    .link = ++t->last_number,
                    .fd = -1,
                    .backoff_ns = MOE_SHM_RECONNECT_MIN_MS * MOE_NS_PER_MS,
                    .address = address};
    status = attempt(t, p, moe_now_ns(t->config.clock), err);
    if (status != MOE_OK) {
        moe_shm_peer_drop(t, p);
        moe_free(p);
        return status;
    }
    t->peers[slot] = p;
    if (slot >= t->num_connections) t->num_connections = slot + 1;
    *link = p->link;
    return MOE_OK;
}

void moe_shm_disconnect(moe_transport *transport, uint64_t link) {
    shm_transport *t = (shm_transport *)transport;
    for (int slot = 0; slot < t->num_connections; slot++) {
        shm_peer *p = t->peers[slot];
        if (!p || p->link != link) continue;
        moe_shm_peer_flush(p);
        moe_shm_peer_drop(t, p);
        moe_free(p);
        t->peers[slot] = NULL;
        return;
    }
}

/* True: the other side has answered. */
static bool take_answer(shm_transport *t, shm_peer *p, int64_t now_ns) {
    int memory = -1;
    shm_greeting greeting = p->readable ? moe_shm_read_greeting(p->fd, &memory) : GREETING_NONE;
    p->readable = false;
    if (memory >= 0) close(memory);
    if (greeting == GREETING_GOOD) return true;
    if (greeting == GREETING_BAD || now_ns >= p->timer_ns) moe_shm_connection_lost(t, p, now_ns);
    return false;
}

bool moe_shm_connection_tick(shm_transport *t, shm_peer *p, int64_t now_ns, moe_event *event) {
    moe_error err;
    if (p->state == PEER_ENDED) moe_shm_connection_lost(t, p, now_ns);
    if (p->state == PEER_WAITING && now_ns >= p->timer_ns && attempt(t, p, now_ns, &err) != MOE_OK) moe_debug("%s", err.message);
    if (p->state != PEER_GREETING || !take_answer(t, p, now_ns)) return false;
    p->backoff_ns = MOE_SHM_RECONNECT_MIN_MS * MOE_NS_PER_MS;
    moe_shm_peer_up(t, p, p->map);
    p->known = true;
    *event = (moe_event){.kind = MOE_EVENT_PEER_UP, .peer = p->number, .link = p->link};
    return true;
}
