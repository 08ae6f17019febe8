/* The listening socket and the peers that connect to it. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/shm/shm_internal.h"
#include "common/socket_file.h"

#define BACKLOG 512
#define MAX_ACCEPTED_AT_ONCE 16
#define RETRY_NS (50 * MOE_NS_PER_MS) /* after a lack of descriptors or memory */

/* ---- listening ---- */

static moe_status bind_socket(shm_listener *l, moe_error *err) {
    const char *path = l->address.sun_path;
    moe_status status = moe_socket_file_check(path, err);
    if (status != MOE_OK) return status;
    unlink(path);
    /* The file is made inside bind, so that its mode is right from the first moment on. */
    mode_t before = umask(0077);
    int rc = bind(l->fd, (const struct sockaddr *)&l->address, sizeof l->address);
    int reason = errno;
    umask(before);
    errno = reason;
    return rc == 0 ? MOE_OK : moe_shm_fail(err, "listen at", path);
}

moe_status moe_shm_listen(moe_transport *transport, const char *endpoint, char *bound, moe_error *err) {
    shm_transport *t = (shm_transport *)transport;
    shm_listener l = {.fd = -1};
    moe_status status = moe_shm_parse_endpoint(endpoint, &l.address, err);
    if (status != MOE_OK) return status;
    const char *path = l.address.sun_path;
    if (t->listener.fd >= 0) return moe_fail(err, MOE_FAILED_PRECONDITION, "%s: this transport already listens", endpoint);
    l.fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (l.fd < 0) return moe_shm_fail(err, "open a socket for", path);
    status = bind_socket(&l, err);
    if (status != MOE_OK) {
        close(l.fd);
        return status;
    }
    t->listener = l;
    if (listen(l.fd, BACKLOG) != 0 || !moe_shm_watch(t, l.fd, SLOT_LISTENER)) {
        status = moe_shm_fail(err, "listen at", path);
        moe_shm_listener_close(t);
        return status;
    }
    if (bound) snprintf(bound, MOE_ENDPOINT_BYTES, "%s", endpoint);
    return MOE_OK;
}

void moe_shm_listener_close(shm_transport *t) {
    shm_listener *l = &t->listener;
    if (l->fd < 0) return;
    unlink(l->address.sun_path); /* before the socket ends: after that, the name may be a successor's */
    close(l->fd);
    *l = (shm_listener){.fd = -1};
}

/* ---- accepting ---- */

static void watch_listener(shm_transport *t, bool on) {
    struct epoll_event event = {.events = on ? EPOLLIN : 0, .data.u64 = SLOT_LISTENER};
    epoll_ctl(t->epoll_fd, EPOLL_CTL_MOD, t->listener.fd, &event);
}

static int free_slot(const shm_transport *t) {
    int end = MOE_SHM_MAX_CONNECTIONS + t->config.max_accepted;
    for (int slot = MOE_SHM_MAX_CONNECTIONS; slot < end; slot++)
        if (!t->peers[slot]) return slot;
    return -1;
}

/* Takes the descriptor; a peer for which there is no room, or of another user, sees a hang-up and tries again later. */
static void add_accepted(shm_transport *t, int fd, int64_t now_ns) {
    int slot = free_slot(t);
    shm_peer *p = slot >= 0 && moe_shm_same_user(fd) ? moe_calloc(1, sizeof *p) : NULL;
    if (!p || !moe_shm_watch(t, fd, slot)) {
        moe_free(p);
        close(fd);
        return;
    }
    *p = (shm_peer){.slot = slot,
                    .state = PEER_GREETING,
                    .fd = fd,
                    .timer_ns = now_ns + MOE_SHM_HANDSHAKE_TIMEOUT_MS * MOE_NS_PER_MS};
    t->peers[slot] = p;
    int used = slot + 1 - MOE_SHM_MAX_CONNECTIONS;
    if (used > t->num_accepted) t->num_accepted = used;
}

void moe_shm_listener_accept(shm_transport *t, int64_t now_ns) {
    shm_listener *l = &t->listener;
    if (l->retry_ns && now_ns >= l->retry_ns) {
        l->retry_ns = 0;
        watch_listener(t, true);
    }
    if (!l->readable) return;
    l->readable = false;
    for (int i = 0; i < MAX_ACCEPTED_AT_ONCE; i++) {
        int fd = accept4(l->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            add_accepted(t, fd, now_ns);
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
            moe_warn("cannot accept a peer at %s: %s", l->address.sun_path, strerror(errno));
            l->retry_ns = now_ns + RETRY_NS;
            watch_listener(t, false);
            return;
        } else if (errno != EINTR && errno != ECONNABORTED) {
            return;
        }
    }
}

void moe_shm_accepted_tick(shm_transport *t, shm_peer *p, int64_t now_ns) {
    int memory = -1;
    if (p->state != PEER_GREETING) return;
    shm_greeting greeting = p->readable ? moe_shm_read_greeting(p->fd, &memory) : GREETING_NONE;
    p->readable = false;
    void *map = greeting == GREETING_GOOD && memory >= 0 ? moe_shm_memory_map(memory) : NULL;
    if (memory >= 0) close(memory);
    if (map && moe_shm_greet(p->fd, -1)) {
        moe_shm_peer_up(t, p, map);
        return;
    }
    if (map) munmap(map, MOE_SHM_MAP_BYTES);
    if (map || greeting != GREETING_NONE || now_ns >= p->timer_ns) p->state = PEER_ENDED;
}
