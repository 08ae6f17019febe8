/* A peer that is up: messages both ways, wakes, and its end. */
#include <errno.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/log.h"
#include "common/metrics.h"
#include "common/shm/shm_internal.h"

void moe_shm_peer_up(shm_transport *t, shm_peer *p, void *map) {
    p->map = map;
    p->state = PEER_UP;
    p->number = ++t->last_number * PEER_SLOTS + (moe_peer)p->slot;
    moe_shm_channel_init(&p->channel, &t->limits, p->fd, map, p->link != 0);
}

void moe_shm_peer_drop(shm_transport *t, shm_peer *p) {
    if (t->held == p) { /* the caller may still read the event's frames */
        t->orphan = p->channel.memory;
        p->channel.memory = NULL;
        t->held = NULL;
    }
    moe_shm_channel_close(&p->channel);
    if (p->map) munmap(p->map, MOE_SHM_MAP_BYTES);
    if (p->fd >= 0) close(p->fd); /* which ends its watch, too */
    p->map = NULL;
    p->fd = -1;
    p->number = 0;
    p->known = p->readable = false;
}

/* What is in the rings can still be read; nothing is sent any more. */
static void begin_ending(shm_peer *p) {
    if (p->state == PEER_UP) p->state = PEER_ENDING;
}

void moe_shm_peer_drain_socket(shm_peer *p) {
    char wakes[64];
    p->readable = false;
    ssize_t got = recv(p->fd, wakes, sizeof wakes, MSG_DONTWAIT); /* if there are more, epoll tells again */
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) begin_ending(p);
}

void moe_shm_peer_flush(shm_peer *p) {
    if (p->state == PEER_UP && p->channel.first) moe_shm_channel_flush(&p->channel);
}

static bool is_broken(const shm_peer *p) { return p->channel.in.broken || p->channel.out.broken; }

static void give_down(shm_peer *p, moe_event *event, bool *got) {
    *event = (moe_event){.kind = MOE_EVENT_PEER_DOWN, .peer = p->number, .link = p->link};
    p->state = PEER_ENDED;
    *got = true;
}

moe_status moe_shm_peer_receive(shm_peer *p, moe_event *event, bool *got, moe_error *err) {
    *got = false;
    if (p->state != PEER_UP && p->state != PEER_ENDING) return MOE_OK;
    shm_received received = is_broken(p) ? SHM_BROKEN : moe_shm_channel_receive(&p->channel, event);
    if (received == SHM_NO_MEMORY)
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a message of %zu bytes", p->channel.wanted);
    if (received == SHM_MESSAGE) {
        event->kind = MOE_EVENT_MESSAGE;
        event->peer = p->number;
        event->link = p->link;
        p->known = *got = true;
    } else if (received == SHM_BROKEN) {
        moe_metric_add(MOE_METRIC_BAD_MESSAGES, 1);
        moe_warn("a peer in shared memory (%s) wrote what is no message: dropped",
                 p->link ? p->address.sun_path : "that connected here");
        give_down(p, event, got);
    } else if (p->state == PEER_ENDING) {
        give_down(p, event, got);
    }
    return MOE_OK;
}

bool moe_shm_peer_ready(shm_peer *p) {
    if (p->state == PEER_ENDING || p->state == PEER_ENDED) return true;
    if (p->state != PEER_UP) return false;
    shm_channel *c = &p->channel;
    bool arrived = moe_shm_ring_filled(&c->in) > 0, room = c->first && moe_shm_ring_room(&c->out) > 0;
    return arrived || room || is_broken(p);
}

bool moe_shm_peer_sleep(shm_peer *p, int core) {
    if (p->state == PEER_UP) {
        uint32_t asleep = 1 + (uint32_t)core;
        atomic_store(&p->channel.in.words->consumer_asleep, asleep);
        if (p->channel.first) atomic_store(&p->channel.out.words->producer_asleep, asleep);
    }
    return !moe_shm_peer_ready(p);
}

void moe_shm_peer_rise(shm_peer *p) {
    if (p->state != PEER_UP) return;
    atomic_store_explicit(&p->channel.in.words->consumer_asleep, 0, memory_order_relaxed);
    if (p->channel.first) atomic_store_explicit(&p->channel.out.words->producer_asleep, 0, memory_order_relaxed);
}
