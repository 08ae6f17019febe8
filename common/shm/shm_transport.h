/* Shared-memory transport between processes of one host and one user: endpoints "shm:/path".
 *
 * A listener owns a unix socket at the path, made with mode 0700. A connecting peer hands over a sealed memfd that holds one byte
 * ring for each direction; after that the socket carries only wakes, for a side that sleeps, and its hang-up is PEER_DOWN. Both
 * sides must be of the same user (SO_PEERCRED), and have MOE_ROLE_LOCAL. What the other side writes into the shared memory is
 * copied out once and checked before it is used: a peer that writes nonsense is dropped and counted as a bad message.
 *
 * There is no network thread: messages that did not fit the ring leave in the owner's own polls. A process that stands still keeps
 * its connections. */
#pragma once
#include "common/clock.h"
#include "common/transport.h"

#define MOE_SHM_RING_BYTES (2 << 20) /* of one direction of a connection; larger messages pass through it in pieces */
#define MOE_SHM_MAX_CONNECTIONS 256  /* of one transport, made by connect */
#define MOE_SHM_MAX_ACCEPTED 1024    /* peers that connected to us; a further one is turned away and tries again */
#define MOE_SHM_HANDSHAKE_TIMEOUT_MS 5000
#define MOE_SHM_RECONNECT_MIN_MS 50 /* doubles with each failed attempt */
#define MOE_SHM_RECONNECT_MAX_MS 1000

typedef struct moe_shm_config {
    const moe_clock *clock; /* the real clock */
    int64_t linger_ms;      /* at close */
    int64_t poll_ns;           /* how long a wait may ask before it sleeps; it does while the waits are shorter than this. 0: never */
    int64_t max_message_bytes; /* 0: MOE_MAX_MESSAGE_BYTES. A peer that sends a larger frame is dropped */
    int64_t max_queued_bytes;  /* 0: MOE_MAX_PEER_QUEUED_BYTES; beyond the ring, whatever fits that is not counted */
    int max_accepted;          /* 0: MOE_SHM_MAX_ACCEPTED */
} moe_shm_config;

/* RESOURCE_EXHAUSTED: memory, descriptors; also of connect and, for memory to receive into, of poll, which can be called again. */
moe_status moe_shm_open(const moe_shm_config *config, moe_transport **out, moe_error *err);
