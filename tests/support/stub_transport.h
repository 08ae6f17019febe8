/* A transport whose other side is the test: it feeds events and reads what was sent. One thread, never waits. */
#pragma once
#include "common/transport.h"

#define STUB_MAX_EVENTS 64
#define STUB_MAX_SENT 512

typedef struct stub_message {
    moe_peer peer;
    int num_frames;
    moe_frame frames[MOE_MAX_FRAMES]; /* owned copies */
} stub_message;

typedef struct stub_transport {
    moe_transport base;
    moe_event events[STUB_MAX_EVENTS]; /* their frames are copies too */
    int first_event, num_events;
    stub_message sent[STUB_MAX_SENT];
    int num_sent;
    moe_status send_status; /* what send returns; OK records the message */
    moe_event current;      /* given out by the last poll */
} stub_transport;

void stub_init(stub_transport *stub);
void stub_close(stub_transport *stub); /* frees all copies */

/* Queues an event; its frames are copied, each at an address that is not aligned. */
void stub_feed(stub_transport *stub, const moe_event *event);
/* The index-th message sent since stub_forget, or NULL. */
stub_message *stub_sent(stub_transport *stub, int index);
void stub_forget(stub_transport *stub); /* forgets all that was sent */
