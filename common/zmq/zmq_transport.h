/* ZeroMQ transport: endpoints "ipc:///path" and "tcp://host:port", the only code that uses libzmq.
 *
 * ipc endpoints are unauthenticated: the socket file is made with mode 0700, so only this user reaches it, with MOE_ROLE_LOCAL.
 * tcp endpoints always use CURVE. Whom a connection expects at the other end is part of the endpoint:
 * "tcp://host:port?role=router"; without "?role=" a worker. What listen returns in `bound` has the listener's own role in it, so
 * it can be connected to as is.
 *
 * A connection is one DEALER socket for one network connection with a fresh random routing id. When it breaks, the socket is
 * closed with all that was queued and a new one is opened, so nothing queued for a peer can reach its successor. libzmq aborts
 * the process when out of memory. */
#pragma once
#include "common/clock.h"
#include "common/transport.h"

#define MOE_CURVE_KEY_BYTES 41 /* Z85 text and NUL */

#define MOE_ZMQ_MAX_CONNECTIONS 256 /* of one transport, made by connect */
#define MOE_ZMQ_MAX_ACCEPTED \
    4096 /* peers that connected to us; beyond, the longest silent one gets PEER_DOWN, the newcomer's message is lost */
#define MOE_ZMQ_SEND_QUEUE_MESSAGES 4096   /* per peer, on top of the byte limit: then RESOURCE_EXHAUSTED */
#define MOE_ZMQ_RECEIVE_QUEUE_MESSAGES 256 /* per peer, not yet polled: then the network pushes back on the sender */
#define MOE_ZMQ_HANDSHAKE_TIMEOUT_MS 5000
#define MOE_ZMQ_HEARTBEAT_MS 1000   /* a peer whose network thread is silent for three of these is down */
#define MOE_ZMQ_POLL_US 500         /* of `--poll-us -1`, where the cores allow it: some waits for a layer's experts */
#define MOE_ZMQ_RECONNECT_MIN_MS 50 /* doubles with each failed attempt */
#define MOE_ZMQ_RECONNECT_MAX_MS 1000

/* CURVE keys of this process and whom it lets in. A tcp endpoint without keys is refused, both to listen and to connect. */
typedef struct moe_curve_keys {
    char public_key[MOE_CURVE_KEY_BYTES], secret_key[MOE_CURVE_KEY_BYTES];
    char role_keys[MOE_ROLE_COUNT][MOE_CURVE_KEY_BYTES]; /* public key of each role; "" for none: that role is not let in */
} moe_curve_keys;

typedef struct moe_zmq_config {
    const moe_clock *clock;     /* the real clock */
    const moe_curve_keys *keys; /* copied; NULL: ipc only */
    int64_t linger_ms;          /* at close */
    int64_t poll_ns; /* how long a wait may poll before it sleeps; it does while the waits are shorter than this. 0: never */
    int64_t handshake_timeout_ms, heartbeat_ms; /* 0: defaults */
    int64_t max_message_bytes;                  /* 0: MOE_MAX_MESSAGE_BYTES. A peer that sends a larger frame is disconnected */
    int64_t max_queued_bytes;                   /* 0: MOE_MAX_PEER_QUEUED_BYTES */
    int max_accepted; /* 0: MOE_ZMQ_MAX_ACCEPTED. Beyond, the longest silent peer gets PEER_DOWN and the newcomer\'s message is
                         lost */
} moe_zmq_config;

/* A transport with one network thread. Handshakes of tcp peers are decided inside poll. RESOURCE_EXHAUSTED: memory, descriptors.
 */
moe_status moe_zmq_open(const moe_zmq_config *config, moe_transport **out, moe_error *err);

/* A fresh key pair, Z85. */
moe_status moe_curve_keypair(char public_key[MOE_CURVE_KEY_BYTES], char secret_key[MOE_CURVE_KEY_BYTES], moe_error *err);
/* Key files as `moesaic keygen DIR` writes them: DIR/{router,worker,operator}.key (mode 0600: public and secret) and .pub, in the
 * format of czmq's certificates (ZPL). Makes DIR (mode 0700) if needed. ALREADY_EXISTS, and nothing written, when any is there.
 */
moe_status moe_curve_keys_write(const char *dir, moe_error *err);
/* Reads our own role's pair and the public keys of all roles present. A key file that others may read is refused
 * (PERMISSION_DENIED); NOT_FOUND without our own pair; INVALID_ARGUMENT for a file that holds no such keys. */
moe_status moe_curve_keys_read(const char *dir, moe_role role, moe_curve_keys *out, moe_error *err);
