/* Deliveries: making them, ordering them by due time, and the fault injector. */
#include <string.h>

#include "common/alloc.h"
#include "common/inproc/inproc_internal.h"

#define FRAME_ALIGNMENT_BYTES 16
#define MAX_MISALIGNMENT_BYTES 7

static size_t frame_room_bytes(size_t size, bool *fits) {
    size_t room;
    *fits = moe_size_add(size, FRAME_ALIGNMENT_BYTES + MAX_MISALIGNMENT_BYTES, &room) && *fits;
    return *fits ? room / FRAME_ALIGNMENT_BYTES * FRAME_ALIGNMENT_BYTES : 0;
}

inproc_delivery *moe_inproc_message_new(const moe_frame *frames, int num_frames, bool misalign) {
    bool fits = true;
    size_t header = frame_room_bytes(sizeof(inproc_delivery), &fits), total = header;
    for (int i = 0; i < num_frames; i++) fits = moe_size_add(total, frame_room_bytes(frames[i].size, &fits), &total) && fits;
    inproc_delivery *message = fits ? moe_realloc(NULL, 1, total) : NULL;
    if (!message) return NULL;
    memset(message, 0, sizeof *message);
    message->kind = MOE_EVENT_MESSAGE;
    message->num_frames = num_frames;
    message->cost_bytes = (int64_t)total;
    char *at = (char *)message + header;
    for (int i = 0; i < num_frames; i++) {
        char *data = at + (misalign ? 1 + 2 * (i % 4) : 0);
        moe_frame_copy(&frames[i], data);
        message->frames[i] = (moe_frame){.data = data, .size = frames[i].size};
        at += frame_room_bytes(frames[i].size, &fits);
    }
    return message;
}

void moe_inproc_session_release(inproc_session *session) {
    if (--session->references > 0) return;
    for (int side = 0; side < INPROC_SIDES; side++) moe_free(session->ends[side].down_delivery);
    moe_free(session);
}

void moe_inproc_delivery_free(inproc_delivery *delivery) {
    if (!delivery) return;
    if (delivery->session) moe_inproc_session_release(delivery->session);
    moe_free(delivery);
}

static bool comes_before(const inproc_delivery *a, const inproc_delivery *b) {
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->order < b->order;
}

static void link_delivery(inproc_transport *to, inproc_delivery *delivery) {
    inproc_delivery *after = to->last;
    while (after && comes_before(delivery, after)) after = after->previous;
    delivery->previous = after;
    delivery->next = after ? after->next : to->first;
    *(after ? &after->next : &to->first) = delivery;
    *(delivery->next ? &delivery->next->previous : &to->last) = delivery;
}

static void unlink_delivery(inproc_transport *to, inproc_delivery *delivery) {
    *(delivery->previous ? &delivery->previous->next : &to->first) = delivery->next;
    *(delivery->next ? &delivery->next->previous : &to->last) = delivery->previous;
}

void moe_inproc_signal(inproc_transport *transport) {
    pthread_cond_signal(&transport->changed);
    if (!transport->sibling) return;
    transport->sibling->woken = true;
    pthread_cond_signal(&transport->sibling->changed);
}

void moe_inproc_inbox_put(inproc_session *session, int side, inproc_delivery *delivery, int64_t due_ns) {
    inproc_end *end = &session->ends[side];
    if (due_ns > end->last_due_ns) end->last_due_ns = due_ns;
    delivery->due_ns = end->last_due_ns;
    delivery->order = ++end->transport->hub->last_order;
    delivery->session = session;
    delivery->side = side;
    session->references++;
    end->queued_bytes += delivery->cost_bytes;
    link_delivery(end->transport, delivery);
    moe_inproc_signal(end->transport);
}

void moe_inproc_inbox_remove(inproc_transport *transport, inproc_delivery *delivery) {
    unlink_delivery(transport, delivery);
    delivery->session->ends[delivery->side].queued_bytes -= delivery->cost_bytes;
}

void moe_inproc_inbox_purge(inproc_session *session, int side) {
    inproc_end *end = &session->ends[side];
    inproc_delivery *next;
    for (inproc_delivery *delivery = end->transport->first; delivery; delivery = next) {
        next = delivery->next;
        if (delivery->session != session || delivery->side != side) continue;
        moe_inproc_inbox_remove(end->transport, delivery);
        moe_inproc_delivery_free(delivery);
    }
    end->last_due_ns = 0;
}

static int64_t draw_delay_ns(moe_inproc_hub *hub) {
    double span = (double)(hub->faults.delay_max_ns - hub->faults.delay_min_ns);
    return hub->faults.delay_min_ns + (int64_t)(moe_random_unit(&hub->random) * span);
}

static bool same_direction(const inproc_delivery *a, const inproc_delivery *b) {
    return a != b && a->kind == MOE_EVENT_MESSAGE && a->session == b->session && a->side == b->side;
}

/* Lets `message` change places with a random one of its direction, `chosen` in [0, 1). */
static void swap_with_random(inproc_transport *to, inproc_delivery *message, double chosen) {
    int64_t candidates = 0;
    for (const inproc_delivery *d = to->first; d; d = d->next) candidates += same_direction(d, message);
    int64_t index = (int64_t)(chosen * (double)candidates);
    inproc_delivery *other = to->first;
    while (other && (!same_direction(other, message) || index-- > 0)) other = other->next;
    if (!other) return;
    int64_t due_ns = message->due_ns;
    uint64_t order = message->order;
    unlink_delivery(to, message);
    unlink_delivery(to, other);
    message->due_ns = other->due_ns;
    message->order = other->order;
    other->due_ns = due_ns;
    other->order = order;
    link_delivery(to, message);
    link_delivery(to, other);
}

void moe_inproc_inject(inproc_session *session, int side, inproc_delivery *message) {
    inproc_transport *to = session->ends[side].transport;
    moe_inproc_hub *hub = to->hub;
    /* Every message draws the same amount, so that one message's fate does not change the draws of the next. */
    double drop = moe_random_unit(&hub->random), duplicate = moe_random_unit(&hub->random);
    double reorder = moe_random_unit(&hub->random), place = moe_random_unit(&hub->random);
    int64_t delay_ns = draw_delay_ns(hub), second_delay_ns = draw_delay_ns(hub);
    if (drop < hub->faults.drop || moe_inproc_is_cut(hub, session->ends[INPROC_LISTENER].transport->listening)) {
        moe_inproc_delivery_free(message);
        return;
    }
    int64_t now_ns = moe_now_ns(hub->clock);
    moe_inproc_inbox_put(session, side, message, now_ns + delay_ns);
    if (reorder < hub->faults.reorder) swap_with_random(to, message, place);
    if (duplicate < hub->faults.duplicate) {
        inproc_delivery *copy = moe_inproc_message_new(message->frames, message->num_frames, true);
        if (copy) moe_inproc_inbox_put(session, side, copy, now_ns + second_delay_ns);
    }
}
