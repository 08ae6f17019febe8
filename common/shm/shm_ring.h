/* One end of a ring of bytes in shared memory: one producer, one consumer, in different processes. The other end's word is read
 * once for each question; it must stay within the ring, at whole lines, and never go back, or the end is broken for good. Each end
 * keeps its own position to itself, so that nothing the other side writes can move it. */
#pragma once
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MOE_SHM_LINE_BYTES 64 /* positions are multiples of it */

/* In shared memory; each word has one writer but for the flags, which the sleeper sets and either side clears. */
typedef struct shm_ring_words {
    _Alignas(MOE_SHM_LINE_BYTES) _Atomic uint64_t head; /* bytes ever produced */
    _Alignas(MOE_SHM_LINE_BYTES) _Atomic uint64_t tail; /* bytes ever consumed */
    /* 0: awake; else 1 + the core on which it sleeps */
    _Alignas(MOE_SHM_LINE_BYTES) _Atomic uint32_t consumer_asleep;
    _Alignas(MOE_SHM_LINE_BYTES) _Atomic uint32_t producer_asleep; /* for want of room */
} shm_ring_words;

typedef struct shm_ring {
    shm_ring_words *words;
    unsigned char *data; /* [size] */
    size_t size;         /* a power of two */
    uint64_t own, seen;  /* our word, and the other side's as last read */
    bool broken;         /* the other side wrote what cannot be; nothing is read or written any more */
} shm_ring;

/* Producer: bytes that can be written now. */
size_t moe_shm_ring_room(shm_ring *ring);
/* Writes `bytes` <= room behind what was written last; the other side sees it after publish. */
void moe_shm_ring_write(shm_ring *ring, const void *from, size_t bytes);
void moe_shm_ring_skip(shm_ring *ring, size_t bytes); /* as write, of whatever lies there */
void moe_shm_ring_publish(shm_ring *ring);

/* Consumer: bytes that can be read now. */
size_t moe_shm_ring_filled(shm_ring *ring);
/* Reads `bytes` <= filled; the other side gets the room after release. */
void moe_shm_ring_read(shm_ring *ring, void *to, size_t bytes);
void moe_shm_ring_release(shm_ring *ring);

/* Clears the flag of a side that sleeps, or is about to; true: it was set, so the side must be woken. */
bool moe_shm_flag_take(_Atomic uint32_t *flag);
