#include "common/shm/shm_channel.h"

#include <string.h>
#include <sys/socket.h>

#include "common/alloc.h"
#include "common/shm/shm_transport.h"

#define MAGIC 0x4d53484dU      /* "MHSM" */
#define PIECE_BYTES (64 << 10) /* published at a time, so that both sides copy a large message at once */
#define KEPT_BYTES (2 * (size_t)MOE_SHM_RING_BYTES) /* a larger buffer goes back after its message */

/* The header of a message on the ring; sizes beyond num_frames are 0. */
typedef struct shm_header {
    uint32_t magic, num_frames;
    uint32_t sizes[MOE_MAX_FRAMES];
    uint32_t unused[6];
} shm_header;
_Static_assert(sizeof(shm_header) == MOE_SHM_LINE_BYTES, "one line");
_Static_assert(MOE_MAX_MESSAGE_BYTES <= UINT32_MAX, "sizes fit their fields");

/* A message in the form it has on the ring. */
struct shm_queued {
    shm_queued *next;
    size_t bytes, done;
    unsigned char data[];
};

void moe_shm_channel_init(shm_channel *c, const shm_limits *limits, int socket, void *map, bool connecting) {
    unsigned char *at = map;
    shm_ring rings[2];
    for (int i = 0; i < 2; i++) {
        rings[i] = (shm_ring){
            .words = (shm_ring_words *)at, .data = at + MOE_SHM_WORDS_BYTES, .size = MOE_SHM_RING_BYTES};
        at += MOE_SHM_WORDS_BYTES + MOE_SHM_RING_BYTES;
    }
    *c = (shm_channel){.limits = limits, .socket = socket, .out = rings[connecting ? 0 : 1], .in = rings[connecting ? 1 : 0]};
}

void moe_shm_channel_close(shm_channel *c) {
    while (c->first) {
        shm_queued *next = c->first->next;
        moe_free(c->first);
        c->first = next;
    }
    moe_free(c->memory);
    *c = (shm_channel){.limits = c->limits, .socket = -1};
}

/* ---- sending ---- */

static size_t lines(size_t bytes) { return (bytes + MOE_SHM_LINE_BYTES - 1) / MOE_SHM_LINE_BYTES * MOE_SHM_LINE_BYTES; }

static moe_status check_frames(const shm_limits *limits, const moe_frame *frames, int num_frames, size_t *ring_bytes,
                               moe_error *err) {
    if (num_frames < 1 || num_frames > MOE_MAX_FRAMES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a message has 1 to %d frames, not %d", MOE_MAX_FRAMES, num_frames);
    }
    int64_t total = 0;
    *ring_bytes = sizeof(shm_header);
    for (int i = 0; i < num_frames; i++) {
        if (frames[i].size > (size_t)MOE_MAX_MESSAGE_BYTES || (int64_t)frames[i].size > limits->max_message_bytes) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "frame %d of %zu bytes is larger than the limit of %lld", i,
                            frames[i].size, (long long)limits->max_message_bytes);
        }
        total += (int64_t)frames[i].size;
        *ring_bytes += lines(frames[i].size);
    }
    if (total <= limits->max_queued_bytes) return MOE_OK;
    return moe_fail(err, MOE_INVALID_ARGUMENT, "a message of %lld bytes is larger than a peer's queue of %lld",
                    (long long)total, (long long)limits->max_queued_bytes);
}

/* Wakes the other side if it sleeps for what `flag` stands for. */
static void wake_other(shm_channel *c, _Atomic uint32_t *flag) {
    const char wake = 0;
    if (!moe_shm_flag_take(flag)) return;
    ssize_t put = send(c->socket, &wake, sizeof wake, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)put; /* full: it has wakes that it has not taken yet; gone: the hang-up tells */
}

void moe_shm_channel_wake(shm_channel *c) {
    c->owes_wake = false;
    wake_other(c, &c->out.words->consumer_asleep);
}

static shm_header header_of(const moe_frame *frames, int num_frames) {
    shm_header header = {.magic = MAGIC, .num_frames = (uint32_t)num_frames};
    for (int i = 0; i < num_frames; i++) header.sizes[i] = (uint32_t)frames[i].size;
    return header;
}

/* Publishes in pieces; the other side is woken at the end. */
static void write_frame(shm_ring *ring, const moe_frame *frame) {
    for (size_t done = 0, bytes; done < frame->size; done += bytes) {
        const void *from = moe_frame_span(frame, done, &bytes);
        size_t left = PIECE_BYTES - done % PIECE_BYTES; /* pieces are whole lines, rows need not be */
        if (bytes > left) bytes = left;
        moe_shm_ring_write(ring, from, bytes);
        if (bytes == left) moe_shm_ring_publish(ring);
    }
    moe_shm_ring_skip(ring, lines(frame->size) - frame->size);
}

static void write_all(shm_channel *c, const moe_frame *frames, int num_frames) {
    shm_header header = header_of(frames, num_frames);
    moe_shm_ring_write(&c->out, &header, sizeof header);
    for (int i = 0; i < num_frames; i++) write_frame(&c->out, &frames[i]);
    moe_shm_ring_publish(&c->out);
    c->owes_wake = true;
    if (!c->corked) moe_shm_channel_wake(c);
}

static moe_status queue(shm_channel *c, const moe_frame *frames, int num_frames, size_t ring_bytes, moe_error *err) {
    int64_t limit = c->limits->max_queued_bytes;
    if (c->queued_bytes > 0 && (int64_t)ring_bytes > limit - c->queued_bytes) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "the peer's queue is full (%lld of %lld bytes)", (long long)c->queued_bytes,
                        (long long)limit);
    }
    shm_queued *message = moe_realloc(NULL, 1, sizeof *message + ring_bytes);
    if (!message) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a message");
    shm_header header = header_of(frames, num_frames);
    *message = (shm_queued){.bytes = ring_bytes};
    memcpy(message->data, &header, sizeof header);
    size_t at = sizeof header;
    for (int i = 0; i < num_frames; i++) {
        size_t padded = lines(frames[i].size);
        if (padded) memset(message->data + at + padded - MOE_SHM_LINE_BYTES, 0, MOE_SHM_LINE_BYTES); /* nothing of ours leaks */
        moe_frame_copy(&frames[i], message->data + at);
        at += padded;
    }
    if (c->first) {
        c->last->next = message;
    } else {
        c->first = message;
    }
    c->last = message;
    c->queued_bytes += (int64_t)ring_bytes;
    moe_shm_channel_flush(c);
    return MOE_OK;
}

moe_status moe_shm_channel_send(shm_channel *c, const moe_frame *frames, int num_frames, moe_error *err) {
    size_t ring_bytes = 0;
    moe_status status = check_frames(c->limits, frames, num_frames, &ring_bytes, err);
    if (status != MOE_OK) return status;
    if (c->first || ring_bytes > moe_shm_ring_room(&c->out)) return queue(c, frames, num_frames, ring_bytes, err);
    write_all(c, frames, num_frames);
    return MOE_OK;
}

void moe_shm_channel_flush(shm_channel *c) {
    bool moved = false;
    for (size_t room = 0; c->first && (room || (room = moe_shm_ring_room(&c->out)) > 0);) {
        shm_queued *message = c->first;
        size_t bytes = message->bytes - message->done;
        if (bytes > room) bytes = room;
        if (bytes > PIECE_BYTES) bytes = PIECE_BYTES;
        moe_shm_ring_write(&c->out, message->data + message->done, bytes);
        moe_shm_ring_publish(&c->out);
        message->done += bytes;
        room -= bytes;
        moved = true;
        if (message->done < message->bytes) continue;
        c->first = message->next;
        c->queued_bytes -= (int64_t)message->bytes;
        moe_free(message);
    }
    if (moved) moe_shm_channel_wake(c);
}

/* ---- receiving ---- */

/* True when the header is one that send could have written. */
static bool take_header(shm_channel *c, const shm_header *header) {
    int64_t total = 0;
    if (header->magic != MAGIC || header->num_frames < 1 || header->num_frames > MOE_MAX_FRAMES) return false;
    c->wanted = c->got = 0;
    for (uint32_t i = 0; i < header->num_frames; i++) {
        if (header->sizes[i] > c->limits->max_message_bytes) return false;
        total += header->sizes[i];
        c->sizes[i] = header->sizes[i];
        c->wanted += lines(header->sizes[i]);
    }
    c->num_frames = (int)header->num_frames;
    return total <= c->limits->max_queued_bytes;
}

static bool reserve(shm_channel *c) {
    if (c->wanted <= c->capacity) return true;
    size_t capacity = c->wanted < KEPT_BYTES / 2 ? 2 * c->wanted : c->wanted;
    unsigned char *larger = moe_realloc(NULL, 1, capacity + MOE_SHM_LINE_BYTES);
    if (!larger) return false;
    moe_free(c->memory); /* nothing is in it: a message begins with got == 0 */
    c->memory = larger;
    c->buffer = larger + MOE_SHM_LINE_BYTES - (uintptr_t)larger % MOE_SHM_LINE_BYTES;
    c->capacity = capacity;
    return true;
}

static void give(shm_channel *c, moe_event *event) {
    size_t at = 0;
    event->num_frames = c->num_frames;
    for (int i = 0; i < c->num_frames; i++) {
        event->frames[i] = (moe_frame){c->buffer + at, c->sizes[i]};
        at += lines(c->sizes[i]);
    }
    c->num_frames = 0;
}

/* Copies what has come of the message that is arriving; the room is given back as it gets free, and whoever waits for some is woken
 * when half of the ring is. */
static void take_pieces(shm_channel *c, size_t filled) {
    while (c->got < c->wanted && filled > 0) {
        size_t bytes = c->wanted - c->got < filled ? c->wanted - c->got : filled;
        if (bytes > PIECE_BYTES) bytes = PIECE_BYTES;
        moe_shm_ring_read(&c->in, c->buffer + c->got, bytes);
        moe_shm_ring_release(&c->in);
        c->got += bytes;
        filled -= bytes;
        if (filled <= MOE_SHM_RING_BYTES / 2) wake_other(c, &c->in.words->producer_asleep);
        if (filled == 0) filled = moe_shm_ring_filled(&c->in); /* more may have come meanwhile */
    }
}

shm_received moe_shm_channel_receive(shm_channel *c, moe_event *event) {
    size_t filled = moe_shm_ring_filled(&c->in);
    if (c->in.broken) return SHM_BROKEN;
    if (c->num_frames == 0) {
        shm_header header;
        if (filled < sizeof header) return SHM_NOTHING;
        moe_shm_ring_read(&c->in, &header, sizeof header);
        filled -= sizeof header;
        c->in.broken = !take_header(c, &header);
        if (c->in.broken) return SHM_BROKEN;
        if (c->wanted == 0) moe_shm_ring_release(&c->in);
    }
    if (c->got == 0 && !reserve(c)) return SHM_NO_MEMORY;
    take_pieces(c, filled);
    if (c->in.broken) return SHM_BROKEN;
    if (c->got < c->wanted) return SHM_NOTHING;
    give(c, event);
    return SHM_MESSAGE;
}

void moe_shm_channel_trim(shm_channel *c) {
    if (c->num_frames || c->capacity <= KEPT_BYTES) return;
    moe_free(c->memory);
    c->memory = c->buffer = NULL;
    c->capacity = 0;
}
