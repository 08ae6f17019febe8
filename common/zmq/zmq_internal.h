/* Inside of the ZeroMQ transport. Everything belongs to the transport's thread unless it says otherwise. */
#pragma once
#include <stdatomic.h>
#include <zmq.h>

#include "common/adaptive_wait.h"
#include "common/zmq/zmq_transport.h"

/* A peer's number is serial × PEER_SLOTS + slot: the slot is found without a search and the serial never comes again.
 * Slots of connections come first, then those of accepted peers. */
#define PEER_SLOTS (MOE_ZMQ_MAX_CONNECTIONS + MOE_ZMQ_MAX_ACCEPTED)
#define MAX_ROUTING_ID_BYTES 255
#define MOE_ZMQ_KEPT_FRAMES 2 /* of a peer */

/* Bytes handed to libzmq for one peer and not yet written to the network. Counted: libzmq's thread gives back each frame. */
typedef struct zmq_account {
    _Atomic int64_t queued_bytes;
    _Atomic int64_t references;
    struct zmq_outgoing *_Atomic kept[MOE_ZMQ_KEPT_FRAMES]; /* large frames that were sent, for the next ones; NULL: none */
} zmq_account;

typedef struct zmq_endpoint {
    char address[MOE_ENDPOINT_BYTES]; /* as libzmq takes it */
    bool tcp;
    moe_role role; /* expected at the other end; LOCAL for ipc */
} zmq_endpoint;

typedef enum zmq_link_state {
    LINK_WAITING,    /* no socket; the next attempt is at timer_ns */
    LINK_CONNECTING, /* given up at timer_ns */
    LINK_UP,         /* handshake done, PEER_UP reported */
    LINK_DRAINING    /* broken; what had arrived is reported before PEER_DOWN, until timer_ns at least */
} zmq_link_state;

typedef struct zmq_connection {
    uint64_t link;
    int slot;
    zmq_endpoint endpoint;
    zmq_link_state state;
    int64_t timer_ns, backoff_ns;
    void *dealer, *monitor;
    bool ready, monitor_ready; /* may have something to receive */
    bool told_refusal;         /* logged once until the next success */
    moe_peer peer;             /* 0 while not up */
    zmq_account *account;
} zmq_connection;

typedef enum zmq_accepted_state {
    ACCEPTED_LIVE,
    ACCEPTED_CLOSING, /* its connection has ended; PEER_DOWN is due once the socket is drained */
    ACCEPTED_DEAD     /* reported; kept for a while, so that late messages are not taken for a new peer's */
} zmq_accepted_state;

typedef struct zmq_accepted {
    zmq_accepted_state state;
    moe_peer peer;
    int fd;              /* of its connection */
    int64_t heard_at_ns; /* last message; DEAD: when it was reported */
    zmq_account *account;
    size_t routing_id_bytes;
    unsigned char routing_id[MAX_ROUTING_ID_BYTES];
} zmq_accepted;

typedef struct zmq_listener {
    void *router, *monitor;
    bool tcp;
    char socket_file[MOE_ENDPOINT_BYTES]; /* made by us: "" for none; libzmq leaves it behind */
    bool ready, monitor_ready;
    int num_accepted; /* slots ever used */
    int num_closing;
    zmq_accepted *accepted; /* [max_accepted] */
} zmq_listener;

typedef struct zmq_transport {
    moe_transport base;
    moe_zmq_config config; /* defaults filled in; keys is NULL or &keys */
    moe_curve_keys keys;
    void *context;
    void *zap; /* answers libzmq's questions about clients of a tcp listener; NULL before the first */
    bool zap_ready;
    int64_t refusal_logged_ns;
    int wake_fd;
    int epoll_fd;         /* of wake_fd and the descriptors of all watched sockets */
    moe_adaptive_wait wait;
    bool woken; /* by wake or a signal, in this poll */
    uint64_t last_number; /* serials of peers, links, monitors */
    zmq_listener listener;
    zmq_connection *connections[MOE_ZMQ_MAX_CONNECTIONS]; /* by slot; NULL where free */
    int num_connections;                                  /* slots ever used */
    int cursor;                                           /* the source that was last received from */
    int events_since_wait;
    zmq_msg_t held[MOE_MAX_FRAMES]; /* the frames of the last event */
    int num_held;
} zmq_transport;

/* zmq_transport.c */
moe_status moe_zmq_fail(moe_error *err, const char *what, const char *where); /* from errno */
moe_peer moe_zmq_new_peer(zmq_transport *t, int slot);

/* zmq_socket.c: options and monitors that listeners and connections share */
moe_status moe_zmq_parse_endpoint(const char *text, zmq_endpoint *out, moe_error *err);
/* A socket with the transport's limits set, not yet bound or connected; NULL and errno on failure. */
void *moe_zmq_socket_new(zmq_transport *t, int type);
bool moe_zmq_set_int(void *socket, int option, int64_t value);         /* int options; false and errno on failure */
void *moe_zmq_monitor_new(zmq_transport *t, void *socket, int events); /* NULL and errno on failure */
/* From now on poll sets *ready when the socket may have something to receive. It must stay set until the socket was asked and had
 * nothing, and be set after each send, because that too may take the signal. False and errno on failure. */
bool moe_zmq_watch(zmq_transport *t, void *socket, bool *ready);
/* Closes both, at most linger_ms after; either may be NULL. */
void moe_zmq_socket_close(zmq_transport *t, void *socket, void *monitor, int64_t linger_ms);
/* Next event of a monitor: its number, or 0 for none; *value is what libzmq's documentation says of that event. */
int moe_zmq_monitor_read(void *monitor, int *value);

/* zmq_message.c */
zmq_account *moe_zmq_account_new(void);
void moe_zmq_account_release(zmq_account *account); /* any thread; NULL is allowed */
/* Sends frames, behind the routing id if there is one. EHOSTUNREACH gives UNAVAILABLE. */
moe_status moe_zmq_send_frames(zmq_transport *t, void *socket, zmq_account *account, const void *routing_id,
                               size_t routing_id_bytes, const moe_frame *frames, int num_frames, moe_error *err);
typedef enum zmq_received { RECEIVED_NOTHING, RECEIVED_MESSAGE, RECEIVED_BAD } zmq_received;
/* Receives one message into t->held, after its routing id if wanted. BAD: one with too many frames or none was thrown away. */
zmq_received moe_zmq_receive(zmq_transport *t, void *socket, zmq_msg_t *routing_id);
void moe_zmq_release_held(zmq_transport *t);
void moe_zmq_fill_frames(zmq_transport *t, moe_event *event);

/* zmq_listen.c */
moe_status moe_zmq_listen(moe_transport *transport, const char *endpoint, char *bound, moe_error *err);
void moe_zmq_listener_close(zmq_transport *t);
void moe_zmq_listener_read_monitor(zmq_transport *t);
bool moe_zmq_listener_receive(zmq_transport *t, int64_t now_ns, moe_event *event);   /* false: nothing */
bool moe_zmq_listener_take_down(zmq_transport *t, int64_t now_ns, moe_event *event); /* a PEER_DOWN that is due */
moe_status moe_zmq_send_accepted(zmq_transport *t, int index, moe_peer peer, const moe_frame *frames, int num_frames,
                                 moe_error *err);

/* zmq_connect.c */
moe_status moe_zmq_connect(moe_transport *transport, const char *endpoint, uint64_t *link, moe_error *err);
void moe_zmq_disconnect(moe_transport *transport, uint64_t link);
void moe_zmq_connection_close(zmq_transport *t, zmq_connection *connection, int64_t linger_ms);
void moe_zmq_connection_tick(zmq_transport *t, zmq_connection *connection, int64_t now_ns); /* what timer_ns is for */
bool moe_zmq_connection_read_monitor(zmq_transport *t, zmq_connection *connection, int64_t now_ns, moe_event *event);
bool moe_zmq_connection_receive(zmq_transport *t, zmq_connection *connection, int64_t now_ns, moe_event *event);

/* zmq_auth.c */
const char *moe_zmq_role_name(moe_role role); /* "router", …; "" for LOCAL */
bool moe_zmq_role_parse(const char *name, moe_role *out);
moe_status moe_zmq_auth_server(zmq_transport *t, void *socket, moe_error *err);                  /* before bind */
moe_status moe_zmq_auth_client(zmq_transport *t, void *socket, moe_role server, moe_error *err); /* before connect */
void moe_zmq_auth_answer(zmq_transport *t, int64_t now_ns);                                      /* all waiting handshakes */
