#include "tests/support/stub_transport.h"

#include <stdlib.h>
#include <string.h>

/* Odd addresses, so that a reader that assumes alignment is caught by the sanitizer. */
static moe_frame copy_frame(moe_frame frame) {
    char *memory = malloc(frame.size + 1);
    if (!memory) abort();
    if (frame.size) memcpy(memory + 1, frame.data, frame.size);
    return (moe_frame){.data = memory + 1, .size = frame.size};
}

static void free_frames(moe_frame *frames, int num_frames) {
    for (int i = 0; i < num_frames; i++) free((char *)frames[i].data - 1);
}

static moe_status stub_send(moe_transport *t, moe_peer peer, const moe_frame *frames, int num_frames, moe_error *err) {
    stub_transport *stub = (stub_transport *)t;
    if (stub->send_status != MOE_OK) return moe_fail(err, stub->send_status, "the stub refuses");
    if (stub->num_sent == STUB_MAX_SENT) abort();
    stub_message *message = &stub->sent[stub->num_sent++];
    *message = (stub_message){.peer = peer, .num_frames = num_frames};
    for (int i = 0; i < num_frames; i++) message->frames[i] = copy_frame(frames[i]);
    return MOE_OK;
}

static moe_status stub_poll(moe_transport *t, int64_t deadline_ns, moe_event *event, moe_error *err) {
    (void)deadline_ns, (void)err;
    stub_transport *stub = (stub_transport *)t;
    free_frames(stub->current.frames, stub->current.num_frames);
    stub->current = (moe_event){.kind = MOE_EVENT_NONE};
    if (stub->num_events > 0) {
        stub->current = stub->events[stub->first_event];
        stub->first_event = (stub->first_event + 1) % STUB_MAX_EVENTS;
        stub->num_events--;
    }
    *event = stub->current;
    return MOE_OK;
}

static bool stub_can_reach(const moe_transport *t, const char *endpoint) {
    (void)t, (void)endpoint;
    return true;
}

static moe_status stub_listen(moe_transport *t, const char *endpoint, char *bound, moe_error *err) {
    (void)t, (void)err;
    strcpy(bound, endpoint);
    return MOE_OK;
}

static moe_status stub_connect(moe_transport *t, const char *endpoint, uint64_t *link, moe_error *err) {
    (void)t, (void)endpoint, (void)err;
    *link = 1;
    return MOE_OK;
}

static void stub_disconnect(moe_transport *t, uint64_t link) { (void)t, (void)link; }
static void stub_wake(moe_transport *t) { (void)t; }
static void stub_close_op(moe_transport *t) { stub_close((stub_transport *)t); }

void stub_init(stub_transport *stub) {
    static const moe_transport_ops ops = {.name = "stub",
                                          .close = stub_close_op,
                                          .can_reach = stub_can_reach,
                                          .listen = stub_listen,
                                          .connect = stub_connect,
                                          .disconnect = stub_disconnect,
                                          .send = stub_send,
                                          .poll = stub_poll,
                                          .wake = stub_wake};
    *stub = (stub_transport){.base.ops = &ops};
}

void stub_feed(stub_transport *stub, const moe_event *event) {
    if (stub->num_events == STUB_MAX_EVENTS) abort();
    moe_event *slot = &stub->events[(stub->first_event + stub->num_events++) % STUB_MAX_EVENTS];
    *slot = *event;
    for (int i = 0; i < event->num_frames; i++) slot->frames[i] = copy_frame(event->frames[i]);
}

stub_message *stub_sent(stub_transport *stub, int index) { return index < stub->num_sent ? &stub->sent[index] : NULL; }

void stub_forget(stub_transport *stub) {
    for (int i = 0; i < stub->num_sent; i++) free_frames(stub->sent[i].frames, stub->sent[i].num_frames);
    stub->num_sent = 0;
}

void stub_close(stub_transport *stub) {
    stub_forget(stub);
    free_frames(stub->current.frames, stub->current.num_frames);
    stub->current = (moe_event){0};
    for (; stub->num_events > 0; stub->num_events--) {
        moe_event *event = &stub->events[stub->first_event];
        free_frames(event->frames, event->num_frames);
        stub->first_event = (stub->first_event + 1) % STUB_MAX_EVENTS;
    }
}
