/* Inside of the in-process transport. Everything here is guarded by the hub's mutex unless it says otherwise. */
#pragma once
#include <pthread.h>
#include <stdatomic.h>

#include "common/inproc/inproc.h"
#include "common/random.h"

typedef struct inproc_session inproc_session;
typedef struct inproc_transport inproc_transport;

/* One event on the way to one transport; a message's bytes lie behind the struct. */
typedef struct inproc_delivery {
    struct inproc_delivery *previous, *next; /* in the inbox, by due_ns, then order */
    int64_t due_ns;
    uint64_t order;
    inproc_session *session; /* counted */
    int side;                /* the receiving end */
    moe_event_kind kind;
    int64_t cost_bytes; /* of a message, in the receiver's queue */
    int num_frames;
    moe_frame frames[MOE_MAX_FRAMES];
} inproc_delivery;

enum { INPROC_CONNECTOR, INPROC_LISTENER, INPROC_SIDES };

typedef struct inproc_end {
    inproc_transport *transport;    /* NULL once this end is closed: nothing more is delivered to it */
    inproc_session *next;           /* in the transport's list of sessions of this side */
    moe_peer peer;                  /* the number by which this end calls the other */
    bool known;                     /* an event with `peer` has been delivered: PEER_DOWN will be, too */
    int64_t queued_bytes;           /* on the way to this end */
    int64_t last_due_ns;            /* of what is on the way to this end */
    inproc_delivery *down_delivery; /* reserved, so that PEER_DOWN needs no memory; NULL once used */
} inproc_end;

/* One connection between a link and a listener, from PEER_UP to PEER_DOWN. */
struct inproc_session {
    int references;
    bool alive; /* both ends may send */
    uint64_t link;
    inproc_end ends[INPROC_SIDES];
};

/* A connection that was asked for: it has a session while the endpoint is reachable. */
typedef struct inproc_link {
    struct inproc_link *next;
    uint64_t number;
    inproc_session *session; /* borrowed; NULL while not connected */
    int64_t last_due_ns;     /* of the sessions before: the next PEER_UP comes after their PEER_DOWN */
    char endpoint[MOE_ENDPOINT_BYTES];
} inproc_link;

struct inproc_transport {
    moe_transport base;
    moe_inproc_hub *hub;
    inproc_transport *next;             /* in the hub's list */
    inproc_transport *sibling;          /* woken with this one, or NULL */
    pthread_cond_t changed;             /* something was put into the inbox, or woken, or the topology changed */
    bool woken;                         /* by wake, until the next return of poll */
    char listening[MOE_ENDPOINT_BYTES]; /* "" while not listening */
    uint64_t seen_topology;             /* the hub's topology to which the links were last fitted */
    inproc_link *links;
    inproc_session *sessions[INPROC_SIDES]; /* those in which this transport is that side */
    inproc_delivery *first, *last;          /* inbox */
    inproc_delivery *current;               /* whose frames the caller of poll may read; owner's thread only */
};

struct moe_inproc_hub {
    pthread_mutex_t mutex;
    const moe_clock *clock;
    bool sleeps; /* real clock */
    moe_random random;
    moe_inproc_faults faults;
    _Atomic bool misalign; /* this and the next are read without the mutex, too */
    _Atomic int64_t queue_limit_bytes;
    uint64_t last_number; /* of peers and links */
    uint64_t last_order;  /* of deliveries */
    uint64_t topology;    /* counts changes that may let a waiting link connect */
    inproc_transport *transports;
    char cuts[MOE_INPROC_MAX_CUTS][MOE_ENDPOINT_BYTES]; /* "" where free */
};

/* inproc_hub.c */
bool moe_inproc_is_cut(moe_inproc_hub *hub, const char *endpoint);
inproc_transport *moe_inproc_find_listener(moe_inproc_hub *hub, const char *endpoint); /* NULL: none, or cut */
void moe_inproc_topology_changed(moe_inproc_hub *hub);

/* inproc_session.c */

/* Connects a link if its endpoint can be reached; no error if it cannot. */
moe_status moe_inproc_link_connect(inproc_transport *transport, inproc_link *link, moe_error *err);
/* Ends a session: each end still open gets PEER_DOWN, at once (`drop`: what is on the way is lost) or after what is on the way.
 */
void moe_inproc_session_end(inproc_session *session, bool drop);
/* Closes one end, which gets nothing more; the other end gets PEER_DOWN. */
void moe_inproc_end_close(inproc_session *session, int side);
/* The session in which `transport` calls the other end `peer`; NULL when gone. */
inproc_session *moe_inproc_find_session(const inproc_transport *transport, moe_peer peer, int *side);

/* inproc_inbox.c */
void moe_inproc_signal(inproc_transport *transport); /* its poll, and its sibling's, look again */
void moe_inproc_session_release(inproc_session *session);
void moe_inproc_delivery_free(inproc_delivery *delivery); /* NULL is allowed; releases the session */
/* Takes `delivery` into the inbox of session->ends[side] and wakes its owner; due at due_ns, and after all sent before it. */
void moe_inproc_inbox_put(inproc_session *session, int side, inproc_delivery *delivery, int64_t due_ns);
void moe_inproc_inbox_remove(inproc_transport *transport, inproc_delivery *delivery);
/* Frees what is on the way to one end. */
void moe_inproc_inbox_purge(inproc_session *session, int side);
/* Sends a message through the fault injector to session->ends[side]; takes `message`. */
void moe_inproc_inject(inproc_session *session, int side, inproc_delivery *message);
inproc_delivery *moe_inproc_message_new(const moe_frame *frames, int num_frames, bool misalign);
