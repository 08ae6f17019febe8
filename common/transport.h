/* Message transport between peers, by endpoint. Implementations: common/inproc (also the seeded fault injector), common/shm
 * (processes of one host), common/zmq; common/joined.h makes one of two.
 *
 * A transport belongs to one thread; only `wake` may be called from others. A transport may listen at one endpoint, connect
 * to any number, or both. Peers are numbered by the transport: a number is never used again within a process, so a reply to
 * a peer that went away fails and never reaches its successor. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "common/status.h"

#define MOE_MAX_FRAMES 8                              /* of one message */
#define MOE_MAX_MESSAGE_BYTES (INT64_C(256) << 20)    /* of one frame; a larger one is refused by send */
#define MOE_MAX_PEER_QUEUED_BYTES (INT64_C(1) << 30)  /* not yet handed to the network, per peer: then RESOURCE_EXHAUSTED */
#define MOE_ENDPOINT_BYTES 256

typedef uint64_t moe_peer; /* 0: none */

/* Who the peer proved to be. LOCAL: an unauthenticated endpoint (inproc; shm, ipc in a folder of mode 0700): may do anything. */
typedef enum moe_role { MOE_ROLE_LOCAL, MOE_ROLE_ROUTER, MOE_ROLE_WORKER, MOE_ROLE_OPERATOR, MOE_ROLE_COUNT } moe_role;

typedef struct moe_frame {
    const void *data; /* aligned to 16 bytes or not: see the receiver */
    size_t size;
    /* Of frames to send alone. NULL: `size` bytes of data. Else the frame is gathered: row rows[0] of data, then row rows[1], …,
     * of row_bytes each, size in all. */
    const int32_t *rows;
    size_t row_bytes;
} moe_frame;

/* The bytes of a frame from `offset` < size on that lie together, *bytes of them. */
static inline const void *moe_frame_span(const moe_frame *frame, size_t offset, size_t *bytes) {
    size_t row = frame->rows ? offset / frame->row_bytes : 0, in_row = frame->rows ? offset % frame->row_bytes : offset;
    *bytes = frame->rows ? frame->row_bytes - in_row : frame->size - offset;
    return (const uint8_t *)frame->data + (frame->rows ? (size_t)frame->rows[row] * frame->row_bytes : 0) + in_row;
}

/* All of them, to `to`. */
static inline void moe_frame_copy(const moe_frame *frame, void *to) {
    for (size_t at = 0, bytes; at < frame->size; at += bytes) {
        const void *from = moe_frame_span(frame, at, &bytes);
        memcpy((uint8_t *)to + at, from, bytes);
    }
}

typedef enum moe_event_kind {
    MOE_EVENT_NONE,     /* the deadline passed or wake was called */
    MOE_EVENT_MESSAGE,  /* `peer` sent `frames` */
    MOE_EVENT_PEER_UP,  /* a connected endpoint is reachable (again: with a new peer number) */
    MOE_EVENT_PEER_DOWN /* the peer went away; what was queued for it is lost. Always sent for connected peers; for accepted
                           ones where the implementation can tell */
} moe_event_kind;

typedef struct moe_event {
    moe_event_kind kind;
    moe_peer peer;
    moe_role role;   /* the peer's, for messages */
    uint64_t link;   /* PEER_UP, PEER_DOWN, MESSAGE on a connection of ours: the number that connect returned; else 0 */
    int num_frames;
    moe_frame frames[MOE_MAX_FRAMES]; /* valid until the next poll or close; copy what must live longer */
} moe_event;

typedef struct moe_transport moe_transport;

typedef struct moe_transport_ops {
    const char *name;
    void (*close)(moe_transport *t); /* drops what is queued after at most the configured linger; frees */
    /* True when this transport can reach an endpoint of that form ("inproc:…", "shm:…", "ipc:…", "tcp:…"). */
    bool (*can_reach)(const moe_transport *t, const char *endpoint);
    /* Listens; `bound` (MOE_ENDPOINT_BYTES) receives the address in use (tcp port 0 is filled in). */
    moe_status (*listen)(moe_transport *t, const char *endpoint, char *bound, moe_error *err);
    /* Begins to connect, and reconnects by itself until disconnect. *link is the connection's number; a peer number comes
     * with each PEER_UP. */
    moe_status (*connect)(moe_transport *t, const char *endpoint, uint64_t *link, moe_error *err);
    void (*disconnect)(moe_transport *t, uint64_t link); /* no PEER_DOWN follows */
    /* Sends frames, all or none; they are copied before return. UNAVAILABLE: the peer is gone. RESOURCE_EXHAUSTED: its queue
     * is full, nothing was sent. INVALID_ARGUMENT: too many frames or too large. Never blocks. */
    moe_status (*send)(moe_transport *t, moe_peer peer, const moe_frame *frames, int num_frames, moe_error *err);
    /* Waits for the next event, at most until deadline_ns on the transport's clock (0: do not wait). */
    moe_status (*poll)(moe_transport *t, int64_t deadline_ns, moe_event *event, moe_error *err);
    void (*wake)(moe_transport *t); /* any thread: makes the current or next poll return */
    /* Wakes those to whom something was sent while corked; poll does so, too. NULL: send never leaves that to be done. */
    void (*flush)(moe_transport *t);
    /* The last two are for common/joined.h; NULL where a transport cannot be joined so. */

    /* Until when poll, which has just said NONE, has nothing to do of itself; until then *descriptor (unless NULL) becomes readable
     * when it has, and stays so until it is polled. */
    int64_t (*rest)(moe_transport *t, int *descriptor);
    bool (*watch)(moe_transport *t, int descriptor); /* from now on poll also returns when that is readable; false: errno says why */
} moe_transport_ops;

struct moe_transport {
    const moe_transport_ops *ops;
    bool computing; /* set by the owner: its process computes on other threads meanwhile, so that poll takes no core from them */
    bool corked;    /* set by the owner around sends to several peers: waking them may wait for flush, so that the first one does not
                       take this core before the last one's message has left */
};
