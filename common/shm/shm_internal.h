/* Inside of the shared-memory transport. Everything belongs to the transport's thread but `woken`, `asleep` and `wake_fd`. */
#pragma once
#include <sys/un.h>

#include "common/adaptive_wait.h"
#include "common/shm/shm_channel.h"
#include "common/shm/shm_transport.h"

/* A peer's number is serial × PEER_SLOTS + slot: the slot is found without a search and the serial never comes again.
 * Slots of connections come first, then those of accepted peers. */
#define PEER_SLOTS (MOE_SHM_MAX_CONNECTIONS + MOE_SHM_MAX_ACCEPTED)

typedef enum shm_peer_state {
    PEER_WAITING,  /* a connection without a socket; the next attempt is at timer_ns */
    PEER_GREETING, /* the other side's greeting is due until timer_ns */
    PEER_UP,
    PEER_ENDING, /* hung up: what had arrived is reported before PEER_DOWN */
    PEER_ENDED   /* PEER_DOWN was reported, or need not be */
} shm_peer_state;

/* A connection of ours, or a peer that connected to us. */
typedef struct shm_peer {
    int slot;
    shm_peer_state state;
    uint64_t link;   /* 0: accepted */
    moe_peer number; /* 0 while not up */
    bool known;      /* an event with the number was reported: PEER_DOWN will be, too */
    bool readable;   /* the socket has something */
    int fd;          /* -1: none */
    void *map;       /* NULL: none */
    shm_channel channel;
    int64_t timer_ns, backoff_ns;  /* connections; timer_ns of accepted ones while greeting */
    struct sockaddr_un address;    /* connections */
} shm_peer;

typedef struct shm_listener {
    int fd; /* -1: none */
    bool readable;
    int64_t retry_ns; /* not watched until then, for want of descriptors or memory; 0: watched */
    struct sockaddr_un address;
} shm_listener;

typedef struct shm_transport {
    moe_transport base;
    moe_shm_config config; /* defaults filled in */
    shm_limits limits;
    int epoll_fd, wake_fd;
    _Atomic bool woken, asleep; /* any thread: wake was called; the owner sleeps, or is about to */
    bool interrupted;           /* by wake, a signal or the watched descriptor, in this poll */
    moe_adaptive_wait wait;
    uint64_t last_number; /* serials of peers and links */
    shm_listener listener;
    shm_peer *peers[PEER_SLOTS]; /* NULL where free */
    int num_connections, num_accepted; /* slots ever used of either kind */
    int cursor;                        /* the slot that was last received from */
    int polls_since_look;
    bool owes_wakes; /* some peers' channels do */
    shm_peer *held;        /* whose frames the last event shows */
    unsigned char *orphan; /* those frames, where the peer was dropped since */
} shm_transport;

/* Every peer there is, in order of slots. */
shm_peer *moe_shm_next_peer(const shm_transport *t, int *slot); /* from *slot on; NULL at the end; *slot is behind the one found */

/* shm_transport.c */
moe_status moe_shm_fail(moe_error *err, const char *what, const char *where); /* from errno */
bool moe_shm_watch(shm_transport *t, int fd, int slot);                       /* false and errno on failure */
#define SLOT_LISTENER PEER_SLOTS
#define SLOT_WAKE (PEER_SLOTS + 1)
#define SLOT_WATCHED (PEER_SLOTS + 2) /* another transport's descriptor */

/* shm_socket.c: the unix socket, and what passes over it */
moe_status moe_shm_parse_endpoint(const char *text, struct sockaddr_un *out, moe_error *err);
bool moe_shm_same_user(int fd);
/* A fresh sealed memfd of MOE_SHM_MAP_BYTES, mapped; -1 and errno on failure. */
int moe_shm_memory_new(void **map);
/* Maps a memfd that a peer sent: NULL unless it has our size and cannot shrink. */
void *moe_shm_memory_map(int memory);
bool moe_shm_greet(int fd, int memory);           /* memory -1: an answer without one; false: the other side is gone */
typedef enum shm_greeting { GREETING_NONE, GREETING_GOOD, GREETING_BAD } shm_greeting;
shm_greeting moe_shm_read_greeting(int fd, int *memory); /* *memory: -1 or a descriptor that is the caller's */

/* shm_peer.c */
void moe_shm_peer_up(shm_transport *t, shm_peer *p, void *map); /* takes the map */
void moe_shm_peer_drop(shm_transport *t, shm_peer *p);          /* closes socket and memory */
void moe_shm_peer_drain_socket(shm_peer *p);                    /* takes wakes; notices a hang-up */
void moe_shm_peer_flush(shm_peer *p);
/* A message, or PEER_DOWN once there are no more or after nonsense; *got false: neither. */
moe_status moe_shm_peer_receive(shm_peer *p, moe_event *event, bool *got, moe_error *err);
bool moe_shm_peer_ready(shm_peer *p); /* there is something to do for it */
/* Says that we are about to sleep on that core; false: it is ready. */
bool moe_shm_peer_sleep(shm_peer *p, int core);
void moe_shm_peer_rise(shm_peer *p);

/* shm_listen.c */
moe_status moe_shm_listen(moe_transport *transport, const char *endpoint, char *bound, moe_error *err);
void moe_shm_listener_close(shm_transport *t);
void moe_shm_listener_accept(shm_transport *t, int64_t now_ns);
void moe_shm_accepted_tick(shm_transport *t, shm_peer *p, int64_t now_ns); /* greeting or its time-out */

/* shm_connect.c */
moe_status moe_shm_connect(moe_transport *transport, const char *endpoint, uint64_t *link, moe_error *err);
void moe_shm_disconnect(moe_transport *transport, uint64_t link);
/* Attempts, greetings, time-outs; true: *event is PEER_UP. */
bool moe_shm_connection_tick(shm_transport *t, shm_peer *p, int64_t now_ns, moe_event *event);
void moe_shm_connection_lost(shm_transport *t, shm_peer *p, int64_t now_ns); /* drops it; tries again after a while */
