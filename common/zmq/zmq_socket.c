/* Endpoints, socket options and monitors: what listeners and connections share. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/un.h>

#include "common/zmq/zmq_internal.h"

#define CURVE_OVERHEAD_BYTES 64 /* of an encrypted frame, counted by ZMQ_MAXMSGSIZE; rounded up */
#define LISTEN_BACKLOG 512
#define HEARTBEATS_MISSED 3
#define MAX_HEARTBEAT_TTL_MS 6553500 /* of libzmq: 16 bits of tenths of a second */

static moe_status parse_role(char *address, zmq_endpoint *out, moe_error *err) {
    char *query = strchr(address, '?');
    out->role = MOE_ROLE_WORKER;
    if (!query) return MOE_OK;
    *query++ = '\0';
    if (strncmp(query, "role=", strlen("role=")) == 0 && moe_zmq_role_parse(query + strlen("role="), &out->role)) return MOE_OK;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "%s: \"?%.32s\" is not \"?role=worker\", \"?role=router\" or \"?role=operator\"",
                    address, query);
}

moe_status moe_zmq_parse_endpoint(const char *text, zmq_endpoint *out, moe_error *err) {
    out->tcp = strncmp(text, "tcp://", strlen("tcp://")) == 0;
    bool ipc = strncmp(text, "ipc:///", strlen("ipc:///")) == 0;
    if ((!out->tcp && !ipc) || strlen(text) >= sizeof out->address) {
        return moe_fail(err, MOE_INVALID_ARGUMENT,
                        "endpoint \"%.64s\": want \"ipc:///path\" or \"tcp://host:port\" of less than %d bytes", text,
                        MOE_ENDPOINT_BYTES);
    }
    snprintf(out->address, sizeof out->address, "%s", text);
    out->role = MOE_ROLE_LOCAL;
    if (out->tcp) return parse_role(out->address, out, err);
    size_t room = sizeof((struct sockaddr_un *)NULL)->sun_path;
    if (strlen(text) - strlen("ipc://") >= room) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%.64s…: a unix socket's path has less than %zu bytes; use a shorter folder",
                        text, room);
    }
    return MOE_OK;
}

bool moe_zmq_set_int(void *socket, int option, int64_t value) {
    int narrow = value > INT32_MAX ? INT32_MAX : (int)value;
    return zmq_setsockopt(socket, option, &narrow, sizeof narrow) == 0;
}

void *moe_zmq_socket_new(zmq_transport *t, int type) {
    void *socket = zmq_socket(t->context, type);
    if (!socket) return NULL;
    int64_t largest = t->config.max_message_bytes + CURVE_OVERHEAD_BYTES;
    int64_t silence_ms = t->config.heartbeat_ms * HEARTBEATS_MISSED;
    if (silence_ms > MAX_HEARTBEAT_TTL_MS) silence_ms = MAX_HEARTBEAT_TTL_MS;
    bool set = zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &largest, sizeof largest) == 0 &&
               moe_zmq_set_int(socket, ZMQ_SNDHWM, MOE_ZMQ_SEND_QUEUE_MESSAGES) &&
               moe_zmq_set_int(socket, ZMQ_RCVHWM, MOE_ZMQ_RECEIVE_QUEUE_MESSAGES) &&
               moe_zmq_set_int(socket, ZMQ_LINGER, t->config.linger_ms) &&
               moe_zmq_set_int(socket, ZMQ_HANDSHAKE_IVL, t->config.handshake_timeout_ms) &&
               moe_zmq_set_int(socket, ZMQ_HEARTBEAT_IVL, t->config.heartbeat_ms) &&
               moe_zmq_set_int(socket, ZMQ_HEARTBEAT_TIMEOUT, silence_ms) &&
               moe_zmq_set_int(socket, ZMQ_HEARTBEAT_TTL, silence_ms);
    if (set && type == ZMQ_ROUTER) {
        set = moe_zmq_set_int(socket, ZMQ_ROUTER_MANDATORY, 1) && moe_zmq_set_int(socket, ZMQ_BACKLOG, LISTEN_BACKLOG);
    } else if (set) {
        /* One socket, one network connection: libzmq must not reconnect by itself (see zmq_transport.h). */
        set = moe_zmq_set_int(socket, ZMQ_RECONNECT_IVL, -1) && moe_zmq_set_int(socket, ZMQ_IMMEDIATE, 1) &&
              moe_zmq_set_int(socket, ZMQ_CONNECT_TIMEOUT, t->config.handshake_timeout_ms);
    }
    if (set) return socket;
    int reason = errno;
    zmq_close(socket);
    errno = reason;
    return NULL;
}

void *moe_zmq_monitor_new(zmq_transport *t, void *socket, int events) {
    char address[64];
    snprintf(address, sizeof address, "inproc://monitor-%llu", (unsigned long long)++t->last_number);
    if (zmq_socket_monitor(socket, address, events) != 0) return NULL;
    void *monitor = zmq_socket(t->context, ZMQ_PAIR);
    /* Without a limit: libzmq's only network thread would wait in a full monitor. */
    if (monitor && moe_zmq_set_int(monitor, ZMQ_RCVHWM, 0) && moe_zmq_set_int(monitor, ZMQ_LINGER, 0) &&
        zmq_connect(monitor, address) == 0) {
        return monitor;
    }
    int reason = errno;
    zmq_socket_monitor(socket, NULL, 0);
    if (monitor) zmq_close(monitor);
    errno = reason;
    return NULL;
}

/* libzmq's descriptor of a socket says that the socket has something to do, not that it has a message: it falls silent once the
 * socket was asked for a message and had none. */
static int descriptor_of(void *socket) {
    int fd = -1;
    size_t size = sizeof fd;
    return zmq_getsockopt(socket, ZMQ_FD, &fd, &size) == 0 ? fd : -1;
}

bool moe_zmq_watch(zmq_transport *t, void *socket, bool *ready) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = ready};
    *ready = true; /* what came before is not signalled any more */
    return epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, descriptor_of(socket), &event) == 0;
}

void moe_zmq_socket_close(zmq_transport *t, void *socket, void *monitor, int64_t linger_ms) {
    /* libzmq closes the descriptors later, on a thread of its own. */
    if (socket) epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, descriptor_of(socket), NULL);
    if (monitor) epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, descriptor_of(monitor), NULL);
    if (socket) {
        /* The monitor first: libzmq would wait for a reader of an open monitor that nobody reads. */
        zmq_socket_monitor(socket, NULL, 0);
        moe_zmq_set_int(socket, ZMQ_LINGER, linger_ms);
        zmq_close(socket);
    }
    if (monitor) zmq_close(monitor);
}

int moe_zmq_monitor_read(void *monitor, int *value) {
    zmq_msg_t part;
    zmq_msg_init(&part);
    int event = 0;
    if (zmq_msg_recv(&part, monitor, ZMQ_DONTWAIT) >= 0) {
        /* first part: 16 bits of event number, 32 bits of value; second part: the address */
        uint16_t number = 0;
        uint32_t bits = 0;
        if (zmq_msg_size(&part) >= sizeof number + sizeof bits) {
            memcpy(&number, zmq_msg_data(&part), sizeof number);
            memcpy(&bits, (char *)zmq_msg_data(&part) + sizeof number, sizeof bits);
        }
        event = number;
        *value = (int)bits;
        while (zmq_msg_more(&part) && zmq_msg_recv(&part, monitor, ZMQ_DONTWAIT) >= 0) continue;
    }
    zmq_msg_close(&part);
    return event;
}
