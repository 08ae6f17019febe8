/* Messages over a pair of rings. On a ring a message is a header line, then its frames, each padded to whole lines. A message that
 * fits the ring goes there at once; else it is queued in our memory and leaves in pieces as there is room. What arrives is copied
 * into our memory before anybody looks at it. */
#pragma once
#include "common/shm/shm_ring.h"
#include "common/transport.h"

typedef struct shm_queued shm_queued;

typedef struct shm_limits {
    int64_t max_message_bytes, max_queued_bytes;
} shm_limits;

typedef struct shm_channel {
    const shm_limits *limits;
    int socket;     /* borrowed: a byte on it wakes the other side */
    bool corked;    /* send leaves waking the other side to the caller: */
    bool owes_wake; /* it has */
    shm_ring out, in;
    shm_queued *first, *last; /* what the ring had no room for */
    int64_t queued_bytes;
    int num_frames; /* of the message that is arriving or was given last; 0: none */
    size_t sizes[MOE_MAX_FRAMES];
    size_t wanted, got;    /* its bytes on the ring behind the header */
    unsigned char *memory, *buffer; /* as allocated; [capacity] of it, aligned to lines */
    size_t capacity;
} shm_channel;

/* Each side's memory: words and data of both rings. */
#define MOE_SHM_WORDS_BYTES 4096
#define MOE_SHM_MAP_BYTES (2 * (MOE_SHM_WORDS_BYTES + (size_t)MOE_SHM_RING_BYTES))
/* `map` is zeroed memory of MOE_SHM_MAP_BYTES that both sides share; limits and socket are borrowed. The connecting side writes
 * the first ring. */
void moe_shm_channel_init(shm_channel *c, const shm_limits *limits, int socket, void *map, bool connecting);
void moe_shm_channel_close(shm_channel *c); /* drops what is queued; the shared memory stays */

/* As of moe_transport_ops, for a peer that is there. */
moe_status moe_shm_channel_send(shm_channel *c, const moe_frame *frames, int num_frames, moe_error *err);
void moe_shm_channel_wake(shm_channel *c);  /* the other side, if it sleeps and there is something for it */
void moe_shm_channel_flush(shm_channel *c); /* moves what is queued into the ring as far as there is room */

typedef enum shm_received { SHM_NOTHING, SHM_MESSAGE, SHM_BROKEN, SHM_NO_MEMORY } shm_received;
/* Copies what arrived. MESSAGE: event->frames are valid until the next receive. BROKEN: the other side wrote nonsense; nothing more
 * is to be had. NO_MEMORY: may be called again. */
shm_received moe_shm_channel_receive(shm_channel *c, moe_event *event);
/* Gives a large buffer back; frames are invalid after. */
void moe_shm_channel_trim(shm_channel *c);
