/* Fuzz target of the shared-memory channel: the input is what a peer does to the memory. Steps, each a byte and its operands:
 * 0: n (u8) lines of the input behind our data, and the head moves over them; 1: the head becomes a u64; 2: the tail of what we
 * write becomes a u64; 3: we send n (u16) × 64 bytes; every step ends with a flush and receives until nothing comes. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/alloc.h"
#include "common/cursor.h"
#include "common/shm/shm_channel.h"
#include "common/shm/shm_transport.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const shm_limits limits = {1 << 20, 4 << 20};
static unsigned char payload[UINT16_MAX * MOE_SHM_LINE_BYTES];
static uint64_t sum; /* so that every byte of every frame is read */

static void check(bool holds) {
    if (!holds) abort();
}

static uint64_t number(moe_cursor *c, size_t bytes) {
    uint64_t value = 0;
    if (c->left < bytes) bytes = c->left;
    const void *at = moe_cursor_take(c, bytes);
    if (bytes) memcpy(&value, at, bytes);
    return value;
}

static void receive_all(shm_channel *c) {
    moe_event event;
    moe_shm_channel_flush(c);
    while (moe_shm_channel_receive(c, &event) == SHM_MESSAGE) {
        check(event.num_frames >= 1 && event.num_frames <= MOE_MAX_FRAMES);
        for (int i = 0; i < event.num_frames; i++) {
            check(event.frames[i].size <= (size_t)limits.max_message_bytes);
            for (size_t b = 0; b < event.frames[i].size; b++) sum += ((const unsigned char *)event.frames[i].data)[b];
        }
        moe_shm_channel_trim(c);
    }
}

static void step(shm_channel *c, moe_cursor *input) {
    uint64_t op = number(input, 1);
    if (op == 0) {
        size_t bytes = (size_t)number(input, 1) * MOE_SHM_LINE_BYTES;
        if (bytes > input->left) bytes = input->left / MOE_SHM_LINE_BYTES * MOE_SHM_LINE_BYTES;
        const unsigned char *from = moe_cursor_take(input, bytes);
        uint64_t head = atomic_load(&c->in.words->head);
        for (size_t i = 0; i < bytes; i++) c->in.data[(head + i) % c->in.size] = from[i];
        atomic_store(&c->in.words->head, head + bytes);
    } else if (op == 1) {
        atomic_store(&c->in.words->head, number(input, 8));
    } else if (op == 2) {
        atomic_store(&c->out.words->tail, number(input, 8));
    } else if (op == 3) {
        const moe_frame frame = {payload, (size_t)number(input, 2) * MOE_SHM_LINE_BYTES};
        moe_shm_channel_send(c, &frame, 1, NULL);
    }
    receive_all(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void *map;
    if (!map) map = mmap(NULL, MOE_SHM_MAP_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    check(map != MAP_FAILED);
    shm_channel c;
    moe_shm_channel_init(&c, &limits, -1, map, false);
    memset((void *)c.in.words, 0, MOE_SHM_WORDS_BYTES);
    memset((void *)c.out.words, 0, MOE_SHM_WORDS_BYTES);
    moe_cursor input = moe_cursor_of(data, size);
    while (input.left) step(&c, &input);
    check(c.queued_bytes >= 0 && c.capacity <= (size_t)limits.max_queued_bytes + MOE_MAX_FRAMES * MOE_SHM_LINE_BYTES);
    moe_shm_channel_close(&c);
    return 0;
}
