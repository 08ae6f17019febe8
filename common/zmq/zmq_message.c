/* Frames in and out of libzmq, and the count of bytes it still holds for a peer. */
#include <errno.h>
#include <string.h>

#include "common/alloc.h"
#include "common/metrics.h"
#include "common/zmq/zmq_internal.h"

/* One frame on its way out; room for its bytes follows. Memory of megabytes is new to the process each time it is allocated, and
 * the kernel then clears it page by page, which takes longer than copying a frame into it: so a peer's last large frames are
 * kept. */
typedef struct zmq_outgoing {
    zmq_account *account;
    size_t size, room;
} outgoing;

#define KEPT_MIN_BYTES ((size_t)1 << 20)
#define KEPT_MAX_BYTES ((size_t)64 << 20)

zmq_account *moe_zmq_account_new(void) {
    zmq_account *account = moe_calloc(1, sizeof *account);
    if (account) atomic_init(&account->references, 1);
    return account;
}

void moe_zmq_account_release(zmq_account *account) {
    if (!account || atomic_fetch_sub(&account->references, 1) != 1) return;
    for (int i = 0; i < MOE_ZMQ_KEPT_FRAMES; i++) moe_free(atomic_load(&account->kept[i]));
    moe_free(account);
}

static bool is_kept_size(size_t room) { return room >= KEPT_MIN_BYTES && room <= KEPT_MAX_BYTES; }

/* Any thread. */
static void give_back(zmq_account *account, outgoing *frame) {
    for (int i = 0; i < MOE_ZMQ_KEPT_FRAMES && is_kept_size(frame->room); i++) {
        outgoing *none = NULL;
        if (atomic_compare_exchange_strong(&account->kept[i], &none, frame)) return;
    }
    moe_free(frame);
}

/* A kept frame with room for `size` bytes, or a new one. What is too small goes: it would only be in the way. */
static outgoing *take(zmq_account *account, size_t size) {
    for (int i = 0; i < MOE_ZMQ_KEPT_FRAMES && is_kept_size(size); i++) {
        outgoing *frame = atomic_exchange(&account->kept[i], NULL);
        if (frame && frame->room >= size) return frame;
        moe_free(frame);
    }
    size_t room = is_kept_size(size + size / 8) ? size + size / 8 : size, total; /* the next one may be a little larger */
    outgoing *frame = moe_size_add(sizeof *frame, room, &total) ? moe_realloc(NULL, 1, total) : NULL;
    if (frame) frame->room = room;
    return frame;
}

/* Called by libzmq's thread once the frame is on the network or dropped. */
static void frame_done(void *data, void *hint) {
    (void)data;
    outgoing *frame = hint;
    zmq_account *account = frame->account;
    atomic_fetch_sub(&account->queued_bytes, (int64_t)frame->size);
    give_back(account, frame);
    moe_zmq_account_release(account);
}

static bool frame_init(zmq_msg_t *message, zmq_account *account, const moe_frame *from) {
    if (from->size == 0) return zmq_msg_init(message) == 0;
    outgoing *frame = take(account, from->size);
    if (!frame) return false;
    frame->account = account;
    frame->size = from->size;
    moe_frame_copy(from, frame + 1);
    atomic_fetch_add(&account->references, 1);
    atomic_fetch_add(&account->queued_bytes, (int64_t)from->size);
    if (zmq_msg_init_data(message, frame + 1, from->size, frame_done, frame) == 0) return true;
    frame_done(frame + 1, frame);
    return false;
}

static void close_all(zmq_msg_t *messages, int count) {
    for (int i = 0; i < count; i++) zmq_msg_close(&messages[i]);
}

/* Sends the first part of a message. libzmq looks for new pipes and freed room only now and then unless asked for its events,
 * so a refusal counts only after asking. */
static int send_first(void *socket, zmq_msg_t *part, int flags) {
    int rc = zmq_msg_send(part, socket, flags);
    if (rc >= 0 || errno != EAGAIN) return rc;
    int events;
    size_t size = sizeof events;
    zmq_getsockopt(socket, ZMQ_EVENTS, &events, &size);
    return zmq_msg_send(part, socket, flags);
}

/* Sends and takes the parts; false with errno set when refused. */
static bool send_parts(void *socket, zmq_msg_t *parts, int count) {
    for (int i = 0; i < count; i++) {
        int flags = ZMQ_DONTWAIT | (i + 1 < count ? ZMQ_SNDMORE : 0);
        int rc = i == 0 ? send_first(socket, &parts[i], flags) : zmq_msg_send(&parts[i], socket, flags);
        if (rc >= 0) continue;
        /* Room for the whole message was there at the first part, so later only the end of the connection refuses one. */
        int reason = i == 0 ? errno : EHOSTUNREACH;
        close_all(parts + i, count - i);
        errno = reason;
        return false;
    }
    return true;
}

static moe_status check_frames(const zmq_transport *t, const zmq_account *account, const moe_frame *frames, int num_frames,
                               moe_error *err) {
    int64_t total = 0, limit = t->config.max_queued_bytes, queued = atomic_load(&account->queued_bytes);
    for (int i = 0; i < num_frames; i++) {
        if (frames[i].size > (size_t)t->config.max_message_bytes) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "frame %d of %zu bytes is larger than the limit of %lld", i,
                            frames[i].size, (long long)t->config.max_message_bytes);
        }
        total += (int64_t)frames[i].size;
    }
    if (total > limit) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a message of %lld bytes is larger than a peer's queue of %lld",
                        (long long)total, (long long)limit);
    }
    if (total > limit - queued) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "the peer's queue is full (%lld of %lld bytes)", (long long)queued,
                        (long long)limit);
    }
    return MOE_OK;
}

moe_status moe_zmq_send_frames(zmq_transport *t, void *socket, zmq_account *account, const void *routing_id,
                               size_t routing_id_bytes, const moe_frame *frames, int num_frames, moe_error *err) {
    moe_status status = check_frames(t, account, frames, num_frames, err);
    if (status != MOE_OK) return status;
    zmq_msg_t parts[MOE_MAX_FRAMES + 1];
    int count = 0;
    bool made = true;
    if (routing_id) {
        made = zmq_msg_init_size(&parts[0], routing_id_bytes) == 0;
        if (made) memcpy(zmq_msg_data(&parts[count++]), routing_id, routing_id_bytes);
    }
    for (int i = 0; made && i < num_frames; i++) {
        made = frame_init(&parts[count], account, &frames[i]);
        count += made;
    }
    if (!made) {
        close_all(parts, count);
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a message");
    }
    if (send_parts(socket, parts, count)) return MOE_OK;
    if (errno == EAGAIN) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "the peer's queue is full (%d messages)", MOE_ZMQ_SEND_QUEUE_MESSAGES);
    }
    return moe_fail(err, MOE_UNAVAILABLE, "the peer is gone (%s)", zmq_strerror(errno));
}

void moe_zmq_release_held(zmq_transport *t) {
    close_all(t->held, t->num_held);
    t->num_held = 0;
}

void moe_zmq_fill_frames(zmq_transport *t, moe_event *event) {
    event->num_frames = t->num_held;
    for (int i = 0; i < t->num_held; i++) {
        event->frames[i] = (moe_frame){.data = zmq_msg_data(&t->held[i]), .size = zmq_msg_size(&t->held[i])};
    }
}

static void discard_rest(void *socket) {
    int more = 1;
    while (more) {
        zmq_msg_t part;
        zmq_msg_init(&part);
        more = zmq_msg_recv(&part, socket, ZMQ_DONTWAIT) >= 0 && zmq_msg_more(&part);
        zmq_msg_close(&part);
    }
}

zmq_received moe_zmq_receive(zmq_transport *t, void *socket, zmq_msg_t *routing_id) {
    bool more = true;
    if (routing_id) {
        if (zmq_msg_recv(routing_id, socket, ZMQ_DONTWAIT) < 0) return RECEIVED_NOTHING;
        more = zmq_msg_more(routing_id);
    }
    while (more && t->num_held < MOE_MAX_FRAMES) {
        zmq_msg_t *part = &t->held[t->num_held];
        zmq_msg_init(part);
        if (zmq_msg_recv(part, socket, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(part);
            if (!routing_id && t->num_held == 0) return RECEIVED_NOTHING;
            break;
        }
        t->num_held++;
        more = zmq_msg_more(part);
    }
    if (t->num_held > 0 && !more) return RECEIVED_MESSAGE;
    if (more) discard_rest(socket);
    moe_zmq_release_held(t);
    moe_metric_add(MOE_METRIC_BAD_MESSAGES, 1);
    return RECEIVED_BAD;
}
