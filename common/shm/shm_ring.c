/* Stores of positions and flags, and the loads that follow them, are sequentially consistent: of a side that says it sleeps and then
 * looks once more, and one that publishes and then looks whether anybody sleeps, at least one sees the other's word. */
#include "common/shm/shm_ring.h"

#include <string.h>

static size_t fail(shm_ring *ring) {
    ring->broken = true;
    return 0;
}

size_t moe_shm_ring_room(shm_ring *ring) {
    if (ring->broken) return 0;
    uint64_t tail = atomic_load(&ring->words->tail);
    /* not between what it was and our head, or between lines */
    if (tail - ring->seen > ring->own - ring->seen || tail % MOE_SHM_LINE_BYTES) return fail(ring);
    ring->seen = tail;
    return ring->size - (size_t)(ring->own - tail);
}

size_t moe_shm_ring_filled(shm_ring *ring) {
    if (ring->broken) return 0;
    uint64_t head = atomic_load(&ring->words->head);
    bool back = head - ring->own < ring->seen - ring->own;
    if (head - ring->own > ring->size || back || head % MOE_SHM_LINE_BYTES) return fail(ring);
    ring->seen = head;
    return (size_t)(head - ring->own);
}

/* The part of `bytes` from our position on that lies before the ring's end. */
static size_t before_end(const shm_ring *ring, size_t bytes) {
    size_t left = ring->size - (size_t)(ring->own & (ring->size - 1));
    return bytes < left ? bytes : left;
}

void moe_shm_ring_write(shm_ring *ring, const void *from, size_t bytes) {
    size_t first = before_end(ring, bytes);
    if (first) memcpy(ring->data + (ring->own & (ring->size - 1)), from, first);
    if (first < bytes) memcpy(ring->data, (const unsigned char *)from + first, bytes - first);
    ring->own += bytes;
}

void moe_shm_ring_skip(shm_ring *ring, size_t bytes) { ring->own += bytes; }

void moe_shm_ring_publish(shm_ring *ring) { atomic_store(&ring->words->head, ring->own); }

void moe_shm_ring_read(shm_ring *ring, void *to, size_t bytes) {
    size_t first = before_end(ring, bytes);
    if (first) memcpy(to, ring->data + (ring->own & (ring->size - 1)), first);
    if (first < bytes) memcpy((unsigned char *)to + first, ring->data, bytes - first);
    ring->own += bytes;
}

void moe_shm_ring_release(shm_ring *ring) { atomic_store(&ring->words->tail, ring->own); }

bool moe_shm_flag_take(_Atomic uint32_t *flag) { return atomic_load(flag) && atomic_exchange(flag, 0); }
