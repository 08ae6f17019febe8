/* Every transport keeps the contract of common/transport.h: the same tests over each implementation, then what only one has. */
/* clang-format off */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h> /* needs the three above */
/* clang-format on */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/inproc/inproc.h"
#include "common/random.h"

#define WAIT_NS (20 * MOE_NS_PER_S)    /* for what must happen */
#define QUIET_NS (300 * MOE_NS_PER_MS) /* how long we watch that something does not happen */
#define TURN_NS (2 * MOE_NS_PER_MS)    /* one node's poll while all are pumped */
#define QUEUE_LIMIT_BYTES (INT64_C(1) << 20)
#define MAX_NODES 4
#define MAX_SAVED 16384

typedef struct saved_event {
    moe_event event; /* frames point into owned copies */
    bool misaligned; /* some frame lay at an odd address */
} saved_event;

/* One transport with the events it has reported and a test has not taken yet. */
typedef struct node {
    moe_transport *t;
    saved_event *saved;
    int first, count;
} node;

typedef struct world world;

typedef struct implementation {
    const char *name;
    void (*setup)(world *w);
    void (*teardown)(world *w);
    moe_transport *(*open)(world *w, bool listener);
    bool restricts_bytes_exactly; /* the queue limit counts what the receiver has not polled yet */
} implementation;

struct world {
    const implementation *impl;
    char endpoint[MOE_ENDPOINT_BYTES];
    node nodes[MAX_NODES];
    int num_nodes;
    moe_inproc_hub *hub;
    moe_error err;
};

/* ---- harness ---- */

static void free_saved(saved_event *s) {
    for (int i = 0; i < s->event.num_frames; i++) free((void *)s->event.frames[i].data);
    memset(s, 0, sizeof *s);
}

static void save(node *n, const moe_event *event) {
    assert_true(n->count < MAX_SAVED);
    saved_event *s = &n->saved[(n->first + n->count++) % MAX_SAVED];
    s->event = *event;
    s->misaligned = false;
    for (int i = 0; i < event->num_frames; i++) {
        char *copy = malloc(event->frames[i].size + 1);
        assert_non_null(copy);
        if (event->frames[i].size) memcpy(copy, event->frames[i].data, event->frames[i].size);
        if ((uintptr_t)event->frames[i].data % 2) s->misaligned = true;
        s->event.frames[i].data = copy;
    }
}

static int open_node(world *w, bool listener) {
    int index = -1;
    for (int i = 0; i < MAX_NODES && index < 0; i++) {
        if (!w->nodes[i].t) index = i;
    }
    assert_true(index >= 0);
    node *n = &w->nodes[index];
    n->t = w->impl->open(w, listener);
    n->saved = calloc(MAX_SAVED, sizeof *n->saved);
    assert_non_null(n->saved);
    n->first = n->count = 0;
    return index;
}

static void close_node(world *w, int index) {
    node *n = &w->nodes[index];
    if (n->t) n->t->ops->close(n->t);
    for (; n->count > 0; n->count--) free_saved(&n->saved[n->first++ % MAX_SAVED]);
    free(n->saved);
    memset(n, 0, sizeof *n);
}

static void listen_at(world *w, int index) {
    char bound[MOE_ENDPOINT_BYTES];
    moe_transport *t = w->nodes[index].t;
    moe_status status = t->ops->listen(t, w->endpoint, bound, &w->err);
    if (status != MOE_OK) fail_msg("listen %s: %s", w->endpoint, w->err.message);
    snprintf(w->endpoint, sizeof w->endpoint, "%s", bound);
}

static uint64_t connect_to(world *w, int index) {
    uint64_t link = 0;
    moe_transport *t = w->nodes[index].t;
    moe_status status = t->ops->connect(t, w->endpoint, &link, &w->err);
    if (status != MOE_OK) fail_msg("connect %s: %s", w->endpoint, w->err.message);
    assert_true(link != 0);
    return link;
}

/* Polls one node until it has nothing at hand. */
static void drain(world *w, node *n, int64_t wait_ns) {
    moe_event event;
    int64_t deadline_ns = wait_ns ? moe_now_ns(moe_clock_real()) + wait_ns : 0;
    do {
        if (n->t->ops->poll(n->t, deadline_ns, &event, &w->err) != MOE_OK) fail_msg("poll: %s", w->err.message);
        if (event.kind != MOE_EVENT_NONE) save(n, &event);
        deadline_ns = 0;
    } while (event.kind != MOE_EVENT_NONE);
}

static void pump_except(world *w, int except) {
    for (int i = 0; i < MAX_NODES; i++) {
        if (w->nodes[i].t && i != except) drain(w, &w->nodes[i], TURN_NS);
    }
}

/* Pumps all nodes until node `index` has an event, and gives it; kind NONE when nothing came. The caller frees it. */
static saved_event next_event_within(world *w, int index, int64_t wait_ns) {
    node *n = &w->nodes[index];
    int64_t until_ns = moe_now_ns(moe_clock_real()) + wait_ns;
    while (n->count == 0 && moe_now_ns(moe_clock_real()) < until_ns) pump_except(w, -1);
    saved_event none = {.event = {.kind = MOE_EVENT_NONE}};
    if (n->count == 0) return none;
    n->count--;
    saved_event s = n->saved[n->first];
    n->first = (n->first + 1) % MAX_SAVED;
    return s;
}

static saved_event expect(world *w, int index, moe_event_kind kind) {
    saved_event s = next_event_within(w, index, WAIT_NS);
    if (s.event.kind != kind) fail_msg("node %d: event %d where %d was expected", index, s.event.kind, kind);
    return s;
}

static moe_peer expect_up(world *w, int index, uint64_t link) {
    saved_event s = expect(w, index, MOE_EVENT_PEER_UP);
    assert_int_equal(s.event.link, link);
    assert_true(s.event.peer != 0);
    return s.event.peer;
}

static moe_status try_send(world *w, int index, moe_peer peer, const char *text) {
    moe_transport *t = w->nodes[index].t;
    moe_frame frames[2] = {{text, strlen(text)}, {"tail", 4}};
    return t->ops->send(t, peer, frames, 2, &w->err);
}

static void send_text(world *w, int index, moe_peer peer, const char *text) {
    if (try_send(w, index, peer, text) != MOE_OK) fail_msg("send \"%s\": %s", text, w->err.message);
}

/* Expects a message made by send_text and gives its sender. */
static moe_peer expect_text(world *w, int index, const char *text) {
    saved_event s = expect(w, index, MOE_EVENT_MESSAGE);
    assert_int_equal(s.event.num_frames, 2);
    assert_int_equal(s.event.frames[0].size, strlen(text));
    assert_memory_equal(s.event.frames[0].data, text, strlen(text));
    assert_memory_equal(s.event.frames[1].data, "tail", 4);
    moe_peer peer = s.event.peer;
    assert_true(peer != 0);
    free_saved(&s);
    return peer;
}

typedef struct pair {
    int server, client;
    uint64_t link;
    moe_peer to_server;
} pair;

static pair connected_pair(world *w) {
    pair p;
    p.server = open_node(w, true);
    listen_at(w, p.server);
    p.client = open_node(w, false);
    p.link = connect_to(w, p.client);
    p.to_server = expect_up(w, p.client, p.link);
    return p;
}

static int setup(void **state) {
    const implementation *impl = *state;
    world *w = calloc(1, sizeof *w);
    assert_non_null(w);
    w->impl = impl;
    impl->setup(w);
    *state = w;
    return 0;
}

static int teardown(void **state) {
    world *w = *state;
    for (int i = 0; i < MAX_NODES; i++) close_node(w, i);
    w->impl->teardown(w);
    free(w);
    return 0;
}

/* ---- over every implementation ---- */

static void test_echo(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    send_text(w, p.client, p.to_server, "ping");
    saved_event s = expect(w, p.server, MOE_EVENT_MESSAGE);
    assert_int_equal(s.event.link, 0);
    moe_peer to_client = s.event.peer;
    free_saved(&s);
    send_text(w, p.server, to_client, "pong");
    s = expect(w, p.client, MOE_EVENT_MESSAGE);
    assert_int_equal(s.event.link, p.link);
    assert_int_equal(s.event.peer, p.to_server);
    assert_memory_equal(s.event.frames[0].data, "pong", 4);
    free_saved(&s);
    /* the number stays while the connection does */
    send_text(w, p.client, p.to_server, "again");
    assert_int_equal(expect_text(w, p.server, "again"), to_client);
}

static void test_frame_counts(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    moe_frame frames[MOE_MAX_FRAMES + 1];
    for (int i = 0; i <= MOE_MAX_FRAMES; i++) frames[i] = (moe_frame){"frames", (size_t)i % 7};
    assert_int_equal(t->ops->send(t, p.to_server, frames, 0, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->send(t, p.to_server, frames, MOE_MAX_FRAMES + 1, &w->err), MOE_INVALID_ARGUMENT);
    for (int count = 1; count <= MOE_MAX_FRAMES; count++) {
        assert_int_equal(t->ops->send(t, p.to_server, frames, count, &w->err), MOE_OK);
        saved_event s = expect(w, p.server, MOE_EVENT_MESSAGE);
        assert_int_equal(s.event.num_frames, count);
        for (int i = 0; i < count; i++) {
            assert_int_equal(s.event.frames[i].size, i % 7);
            assert_memory_equal(s.event.frames[i].data, "frames", (size_t)i % 7);
        }
        free_saved(&s);
    }
}

static void test_empty_frames(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    const moe_frame frames[3] = {{NULL, 0}, {"abc", 3}, {NULL, 0}};
    assert_int_equal(t->ops->send(t, p.to_server, frames, 3, &w->err), MOE_OK);
    assert_int_equal(t->ops->send(t, p.to_server, frames, 1, &w->err), MOE_OK);
    saved_event s = expect(w, p.server, MOE_EVENT_MESSAGE);
    assert_int_equal(s.event.num_frames, 3);
    assert_int_equal(s.event.frames[0].size, 0);
    assert_memory_equal(s.event.frames[1].data, "abc", 3);
    assert_int_equal(s.event.frames[2].size, 0);
    free_saved(&s);
    s = expect(w, p.server, MOE_EVENT_MESSAGE);
    assert_int_equal(s.event.num_frames, 1);
    assert_int_equal(s.event.frames[0].size, 0);
    free_saved(&s);
}

static void test_big_frames(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    size_t size = (size_t)16 << 20;
    uint64_t *data = malloc(size);
    assert_non_null(data);
    for (size_t i = 0; i < size / 8; i++) data[i] = moe_mix64(i);
    if (w->hub) moe_inproc_set_queue_limit(w->hub, MOE_MAX_PEER_QUEUED_BYTES);
    const moe_frame frames[3] = {{"head", 4}, {data, size}, {(char *)data + 3, 12345}};
    assert_int_equal(t->ops->send(t, p.to_server, frames, 3, &w->err), MOE_OK);
    saved_event s = expect(w, p.server, MOE_EVENT_MESSAGE);
    assert_int_equal(s.event.frames[1].size, size);
    assert_int_equal(memcmp(s.event.frames[1].data, data, size), 0);
    assert_int_equal(memcmp(s.event.frames[2].data, (char *)data + 3, 12345), 0);
    free_saved(&s);
    free(data);
}

static void test_oversize_refused(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    /* the size alone must refuse it: there is no such memory */
    const moe_frame frames[2] = {{"head", 4}, {"x", (size_t)MOE_MAX_MESSAGE_BYTES + 1}};
    assert_int_equal(t->ops->send(t, p.to_server, frames, 2, &w->err), MOE_INVALID_ARGUMENT);
    const moe_frame absurd[1] = {{"x", SIZE_MAX}};
    assert_int_equal(t->ops->send(t, p.to_server, absurd, 1, &w->err), MOE_INVALID_ARGUMENT);
    send_text(w, p.client, p.to_server, "still works");
    expect_text(w, p.server, "still works");
}

static void test_unknown_peer(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    assert_int_equal(try_send(w, p.client, 0, "x"), MOE_UNAVAILABLE);
    assert_int_equal(try_send(w, p.client, p.to_server + 1000000, "x"), MOE_UNAVAILABLE);
    assert_int_equal(try_send(w, p.server, p.to_server + 1000000, "x"), MOE_UNAVAILABLE);
}

/* A listener goes away with messages queued for it, and another comes at the same endpoint. */
static void test_restart(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    send_text(w, p.client, p.to_server, "first");
    moe_peer old_client = expect_text(w, p.server, "first");
    send_text(w, p.server, old_client, "last words");
    expect_text(w, p.client, "last words");
    for (int i = 0; i < 50; i++) send_text(w, p.client, p.to_server, "stale, before");
    close_node(w, p.server);
    for (int i = 0; i < 50; i++) try_send(w, p.client, p.to_server, "stale, after");
    int successor = open_node(w, true);
    listen_at(w, successor);
    for (int i = 0; i < 50; i++) try_send(w, p.client, p.to_server, "stale, late");
    saved_event s = expect(w, p.client, MOE_EVENT_PEER_DOWN);
    assert_int_equal(s.event.peer, p.to_server);
    assert_int_equal(s.event.link, p.link);
    moe_peer to_successor = expect_up(w, p.client, p.link);
    assert_true(to_successor != p.to_server);
    assert_int_equal(try_send(w, p.client, p.to_server, "stale, at last"), MOE_UNAVAILABLE);
    send_text(w, p.client, to_successor, "fresh");
    moe_peer new_client = expect_text(w, successor, "fresh");
    send_text(w, successor, new_client, "welcome");
    assert_int_equal(expect_text(w, p.client, "welcome"), to_successor);
}

static void test_connect_before_listen(void **state) {
    world *w = *state;
    /* a first listener fixes the endpoint (tcp: the port) and goes */
    int first = open_node(w, true);
    listen_at(w, first);
    close_node(w, first);
    int client = open_node(w, false);
    uint64_t link = connect_to(w, client);
    saved_event s = next_event_within(w, client, QUIET_NS);
    assert_int_equal(s.event.kind, MOE_EVENT_NONE);
    int server = open_node(w, true);
    listen_at(w, server);
    moe_peer to_server = expect_up(w, client, link);
    send_text(w, client, to_server, "hello");
    expect_text(w, server, "hello");
}

/* The receiver does not poll: send must refuse at the limit, and all that was accepted must arrive in order. */
static void test_queue_limit(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    size_t size = 65536;
    uint32_t *data = calloc(1, size);
    assert_non_null(data);
    if (w->hub) moe_inproc_set_queue_limit(w->hub, QUEUE_LIMIT_BYTES);
    uint32_t accepted = 0;
    moe_status status = MOE_OK;
    while (status == MOE_OK && accepted < 8192) {
        data[0] = data[size / 4 - 1] = accepted;
        const moe_frame frames[2] = {{"head", 4}, {data, size}};
        status = t->ops->send(t, p.to_server, frames, 2, &w->err);
        accepted += status == MOE_OK;
    }
    assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
    assert_true(accepted >= QUEUE_LIMIT_BYTES / (int64_t)size - 1);
    if (w->impl->restricts_bytes_exactly) assert_true(accepted <= QUEUE_LIMIT_BYTES / (int64_t)size);
    for (uint32_t i = 0; i < accepted; i++) {
        saved_event s = expect(w, p.server, MOE_EVENT_MESSAGE);
        uint32_t head, tail;
        memcpy(&head, s.event.frames[1].data, 4);
        memcpy(&tail, (const char *)s.event.frames[1].data + size - 4, 4);
        assert_int_equal(head, i);
        assert_int_equal(tail, i);
        free_saved(&s);
    }
    send_text(w, p.client, p.to_server, "room again");
    expect_text(w, p.server, "room again");
    free(data);
}

static void test_close_with_sends_pending(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    static const char block[65536];
    const moe_frame frames[1] = {{block, sizeof block}};
    int accepted = 0;
    while (accepted < 256 && t->ops->send(t, p.to_server, frames, 1, &w->err) == MOE_OK) accepted++;
    assert_true(accepted > 0);
    int64_t before_ns = moe_now_ns(moe_clock_real());
    close_node(w, p.client);
    assert_true(moe_now_ns(moe_clock_real()) - before_ns < 2 * MOE_NS_PER_S);
    before_ns = moe_now_ns(moe_clock_real());
    close_node(w, p.server);
    assert_true(moe_now_ns(moe_clock_real()) - before_ns < 2 * MOE_NS_PER_S);
}

static void *wake_it(void *transport) {
    moe_transport *t = transport;
    t->ops->wake(t);
    return NULL;
}

static void test_wake(void **state) {
    world *w = *state;
    int server = open_node(w, true);
    listen_at(w, server);
    moe_transport *t = w->nodes[server].t;
    moe_event event;
    /* wakes before the poll count once */
    for (int i = 0; i < 100; i++) t->ops->wake(t);
    int64_t before_ns = moe_now_ns(moe_clock_real());
    assert_int_equal(t->ops->poll(t, before_ns + WAIT_NS, &event, &w->err), MOE_OK);
    assert_int_equal(event.kind, MOE_EVENT_NONE);
    assert_true(moe_now_ns(moe_clock_real()) - before_ns < WAIT_NS / 2);
    before_ns = moe_now_ns(moe_clock_real());
    assert_int_equal(t->ops->poll(t, before_ns + 30 * MOE_NS_PER_MS, &event, &w->err), MOE_OK);
    assert_int_equal(event.kind, MOE_EVENT_NONE);
    assert_true(moe_now_ns(moe_clock_real()) - before_ns >= 30 * MOE_NS_PER_MS);
    /* from another thread, before or during the poll */
    for (int i = 0; i < 20; i++) {
        pthread_t thread;
        before_ns = moe_now_ns(moe_clock_real());
        assert_int_equal(pthread_create(&thread, NULL, wake_it, t), 0);
        assert_int_equal(t->ops->poll(t, before_ns + WAIT_NS, &event, &w->err), MOE_OK);
        assert_int_equal(event.kind, MOE_EVENT_NONE);
        assert_true(moe_now_ns(moe_clock_real()) - before_ns < WAIT_NS / 2);
        pthread_join(thread, NULL);
    }
}

static void test_poll_deadline(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    moe_event event;
    int64_t before_ns = moe_now_ns(moe_clock_real());
    assert_int_equal(t->ops->poll(t, 0, &event, &w->err), MOE_OK);
    assert_int_equal(event.kind, MOE_EVENT_NONE);
    assert_int_equal(t->ops->poll(t, before_ns + 50 * MOE_NS_PER_MS, &event, &w->err), MOE_OK);
    assert_int_equal(event.kind, MOE_EVENT_NONE);
    assert_true(moe_now_ns(moe_clock_real()) - before_ns >= 50 * MOE_NS_PER_MS);
}

static void test_two_clients(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    int second = open_node(w, false);
    uint64_t link = connect_to(w, second);
    moe_peer second_to_server = expect_up(w, second, link);
    send_text(w, p.client, p.to_server, "from one");
    moe_peer one = expect_text(w, p.server, "from one");
    send_text(w, second, second_to_server, "from two");
    moe_peer two = expect_text(w, p.server, "from two");
    assert_true(one != two);
    for (int i = 0; i < 20; i++) {
        send_text(w, p.server, two, "to two");
        send_text(w, p.server, one, "to one");
    }
    for (int i = 0; i < 20; i++) {
        expect_text(w, p.client, "to one");
        expect_text(w, second, "to two");
    }
}

static void test_disconnect(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    send_text(w, p.client, p.to_server, "hello");
    moe_peer to_client = expect_text(w, p.server, "hello");
    send_text(w, p.server, to_client, "too late");
    t->ops->disconnect(t, p.link);
    t->ops->disconnect(t, p.link); /* unknown links are ignored */
    assert_int_equal(try_send(w, p.client, p.to_server, "x"), MOE_UNAVAILABLE);
    saved_event s = expect(w, p.server, MOE_EVENT_PEER_DOWN);
    assert_int_equal(s.event.peer, to_client);
    assert_int_equal(s.event.link, 0);
    assert_int_equal(try_send(w, p.server, to_client, "x"), MOE_UNAVAILABLE);
    s = next_event_within(w, p.client, QUIET_NS);
    assert_int_equal(s.event.kind, MOE_EVENT_NONE);
    /* the same transport may connect again */
    uint64_t link = connect_to(w, p.client);
    assert_true(link != p.link);
    moe_peer peer = expect_up(w, p.client, link);
    assert_true(peer != p.to_server);
    send_text(w, p.client, peer, "back");
    assert_true(expect_text(w, p.server, "back") != to_client);
}

static void test_client_closes(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    send_text(w, p.client, p.to_server, "hello");
    moe_peer to_client = expect_text(w, p.server, "hello");
    close_node(w, p.client);
    saved_event s = expect(w, p.server, MOE_EVENT_PEER_DOWN);
    assert_int_equal(s.event.peer, to_client);
    assert_int_equal(try_send(w, p.server, to_client, "x"), MOE_UNAVAILABLE);
}

/* Frames of odd sizes, so that later ones lie anywhere; copied out by memcpy only (run under UBSan). */
static void test_alignment(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    char data[256];
    for (int i = 0; i < 256; i++) data[i] = (char)(i * 37);
    for (size_t shift = 0; shift < 16; shift++) {
        const moe_frame frames[4] = {{data, 1 + shift}, {data + shift, 3 + shift}, {data + 1, 100 + shift}, {data + shift, 64}};
        assert_int_equal(t->ops->send(t, p.to_server, frames, 4, &w->err), MOE_OK);
        saved_event s = expect(w, p.server, MOE_EVENT_MESSAGE);
        assert_int_equal(s.event.num_frames, 4);
        for (int i = 0; i < 4; i++) {
            assert_int_equal(s.event.frames[i].size, frames[i].size);
            assert_memory_equal(s.event.frames[i].data, frames[i].data, frames[i].size);
        }
        free_saved(&s);
    }
}

static void test_bad_endpoints(void **state) {
    world *w = *state;
    int node_index = open_node(w, true);
    moe_transport *t = w->nodes[node_index].t;
    char bound[MOE_ENDPOINT_BYTES], longest[2 * MOE_ENDPOINT_BYTES];
    uint64_t link;
    assert_false(t->ops->can_reach(t, "carrier-pigeon:home"));
    assert_true(t->ops->can_reach(t, w->endpoint));
    assert_int_equal(t->ops->connect(t, "carrier-pigeon:home", &link, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->listen(t, "", bound, &w->err), MOE_INVALID_ARGUMENT);
    snprintf(longest, sizeof longest, "%s", w->endpoint);
    memset(longest + strlen(longest), 'x', sizeof longest - strlen(longest) - 1);
    longest[sizeof longest - 1] = '\0';
    assert_int_equal(t->ops->listen(t, longest, bound, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->connect(t, longest, &link, &w->err), MOE_INVALID_ARGUMENT);
    listen_at(w, node_index);
    assert_int_equal(t->ops->listen(t, w->endpoint, bound, &w->err), MOE_FAILED_PRECONDITION);
    int other = open_node(w, true);
    t = w->nodes[other].t;
    assert_int_equal(t->ops->listen(t, w->endpoint, bound, &w->err), MOE_ALREADY_EXISTS);
}

/* ---- inproc: in threads, and the fault injector ---- */

static void inproc_setup(world *w) {
    assert_int_equal(moe_inproc_hub_new(moe_clock_real(), 1, &w->hub, &w->err), MOE_OK);
    snprintf(w->endpoint, sizeof w->endpoint, "inproc:worker-0");
}

static void inproc_teardown(world *w) { moe_inproc_hub_free(&w->hub); }

static moe_transport *inproc_open(world *w, bool listener) {
    (void)listener;
    moe_transport *t;
    assert_int_equal(moe_inproc_open(w->hub, &t, &w->err), MOE_OK);
    return t;
}

static const implementation inproc = {"inproc", inproc_setup, inproc_teardown, inproc_open, true};

#define ECHOES 2000

static void *echo_server(void *transport) {
    moe_transport *t = transport;
    moe_event event;
    for (int echoed = 0; echoed < ECHOES;) {
        if (t->ops->poll(t, moe_now_ns(moe_clock_real()) + WAIT_NS, &event, NULL) != MOE_OK) return NULL;
        if (event.kind == MOE_EVENT_NONE) return NULL;
        if (event.kind != MOE_EVENT_MESSAGE) continue;
        if (t->ops->send(t, event.peer, event.frames, event.num_frames, NULL) != MOE_OK) return NULL;
        echoed++;
    }
    return t;
}

static void test_inproc_threads(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, echo_server, w->nodes[p.server].t), 0);
    for (int i = 0; i < ECHOES; i++) {
        const moe_frame frame = {&i, sizeof i};
        assert_int_equal(t->ops->send(t, p.to_server, &frame, 1, &w->err), MOE_OK);
        moe_event event;
        assert_int_equal(t->ops->poll(t, moe_now_ns(moe_clock_real()) + WAIT_NS, &event, &w->err), MOE_OK);
        assert_int_equal(event.kind, MOE_EVENT_MESSAGE);
        assert_memory_equal(event.frames[0].data, &i, sizeof i);
    }
    void *result;
    pthread_join(thread, &result);
    assert_non_null(result);
}

/* A server and a client on a virtual clock. */
typedef struct sim {
    moe_clock clock;
    moe_inproc_hub *hub;
    moe_transport *server, *client;
    uint64_t link;
    moe_peer to_server;
} sim;

static moe_event poll_now(moe_transport *t) {
    moe_event event;
    assert_int_equal(t->ops->poll(t, INT64_MAX, &event, NULL), MOE_OK);
    return event;
}

static void sim_open(sim *s, uint64_t seed) {
    s->clock = moe_clock_fake(1000);
    assert_int_equal(moe_inproc_hub_new(&s->clock, seed, &s->hub, NULL), MOE_OK);
    assert_int_equal(moe_inproc_open(s->hub, &s->server, NULL), MOE_OK);
    assert_int_equal(moe_inproc_open(s->hub, &s->client, NULL), MOE_OK);
    assert_int_equal(s->server->ops->listen(s->server, "inproc:a", NULL, NULL), MOE_OK);
    assert_int_equal(s->client->ops->connect(s->client, "inproc:a", &s->link, NULL), MOE_OK);
    moe_event event = poll_now(s->client);
    assert_int_equal(event.kind, MOE_EVENT_PEER_UP);
    s->to_server = event.peer;
}

static void sim_close(sim *s) {
    s->client->ops->close(s->client);
    s->server->ops->close(s->server);
    moe_inproc_hub_free(&s->hub);
}

static moe_status sim_send(sim *s, uint32_t value) {
    const moe_frame frames[2] = {{&value, sizeof value}, {"payload", 7}};
    return s->client->ops->send(s->client, s->to_server, frames, 2, NULL);
}

#define FAULT_MESSAGES 4000

typedef struct delivered {
    uint32_t values[2 * FAULT_MESSAGES];
    int64_t at_ns[2 * FAULT_MESSAGES];
    int count;
} delivered;

/* Sends FAULT_MESSAGES one microsecond apart and records what arrives when. */
static void run_faults(uint64_t seed, const moe_inproc_faults *faults, delivered *out) {
    sim s;
    sim_open(&s, seed);
    moe_inproc_set_faults(s.hub, faults);
    out->count = 0;
    uint32_t sent = 0;
    while (sent < FAULT_MESSAGES || moe_inproc_next_due_ns(s.hub) != INT64_MAX) {
        int64_t due_ns = moe_inproc_next_due_ns(s.hub), next_send_ns = 1000 + 1000 * (int64_t)(sent + 1);
        if (sent < FAULT_MESSAGES && next_send_ns <= due_ns) {
            s.clock.fake_now_ns = next_send_ns;
            assert_int_equal(sim_send(&s, sent++), MOE_OK);
            continue;
        }
        assert_true(due_ns >= s.clock.fake_now_ns);
        s.clock.fake_now_ns = due_ns;
        for (moe_event event = poll_now(s.server); event.kind != MOE_EVENT_NONE; event = poll_now(s.server)) {
            assert_int_equal(event.kind, MOE_EVENT_MESSAGE);
            assert_true(out->count < 2 * FAULT_MESSAGES);
            assert_int_equal((uintptr_t)event.frames[0].data % 2, 1);
            assert_int_equal((uintptr_t)event.frames[1].data % 2, 1);
            assert_memory_equal(event.frames[1].data, "payload", 7);
            memcpy(&out->values[out->count], event.frames[0].data, 4);
            out->at_ns[out->count++] = due_ns;
        }
    }
    sim_close(&s);
}

static void test_faults_by_seed(void **state) {
    (void)state;
    static const moe_inproc_faults faults = {
        .drop = 0.1, .duplicate = 0.1, .reorder = 0.1, .delay_min_ns = 10, .delay_max_ns = 50000};
    delivered *runs = calloc(3, sizeof *runs);
    assert_non_null(runs);
    run_faults(7, &faults, &runs[0]);
    run_faults(7, &faults, &runs[1]);
    run_faults(8, &faults, &runs[2]);
    assert_int_equal(runs[0].count, runs[1].count);
    assert_memory_equal(runs[0].values, runs[1].values, sizeof runs[0].values);
    assert_memory_equal(runs[0].at_ns, runs[1].at_ns, sizeof runs[0].at_ns);
    assert_int_not_equal(memcmp(runs[0].values, runs[2].values, sizeof runs[0].values), 0);
    free(runs);
}

/* Chances within six standard deviations of a binomial of FAULT_MESSAGES draws. */
static void assert_about(int count, double chance) {
    double expected = chance * FAULT_MESSAGES, variance = expected * (1 - chance);
    double off = count - expected;
    if (off * off > 36 * variance) fail_msg("%d of %d for a chance of %g", count, FAULT_MESSAGES, chance);
}

static void test_fault_rates(void **state) {
    (void)state;
    delivered *run = calloc(1, sizeof *run);
    assert_non_null(run);
    run_faults(1, &(moe_inproc_faults){.drop = 0.2}, run);
    assert_about(FAULT_MESSAGES - run->count, 0.2);
    for (int i = 1; i < run->count; i++) assert_true(run->values[i] > run->values[i - 1]);

    run_faults(2, &(moe_inproc_faults){.duplicate = 0.3}, run);
    assert_about(run->count - FAULT_MESSAGES, 0.3);
    for (int i = 1; i < run->count; i++) assert_true(run->values[i] - run->values[i - 1] <= 1);

    const moe_inproc_faults delay = {.delay_min_ns = 5000, .delay_max_ns = 9000};
    run_faults(3, &delay, run);
    assert_int_equal(run->count, FAULT_MESSAGES);
    for (int i = 0; i < run->count; i++) {
        int64_t delay_ns = run->at_ns[i] - (1000 + 1000 * ((int64_t)i + 1));
        assert_int_equal(run->values[i], i);
        assert_true(delay_ns >= 5000 && delay_ns <= 9000);
    }

    run_faults(4, &(moe_inproc_faults){.reorder = 0.25, .delay_min_ns = 5000, .delay_max_ns = 5000}, run);
    assert_int_equal(run->count, FAULT_MESSAGES);
    int moved = 0;
    for (int i = 0; i < run->count; i++) moved += run->values[i] != (uint32_t)i;
    assert_in_range(moved, FAULT_MESSAGES / 5, FAULT_MESSAGES / 2);
    free(run);
}

static void test_fake_clock_never_sleeps(void **state) {
    (void)state;
    sim s;
    sim_open(&s, 1);
    assert_int_equal(moe_inproc_next_due_ns(s.hub), INT64_MAX);
    assert_int_equal(poll_now(s.server).kind, MOE_EVENT_NONE);
    moe_inproc_set_faults(s.hub, &(moe_inproc_faults){.delay_min_ns = 500, .delay_max_ns = 500});
    assert_int_equal(sim_send(&s, 1), MOE_OK);
    assert_int_equal(moe_inproc_next_due_ns(s.hub), 1500);
    assert_int_equal(poll_now(s.server).kind, MOE_EVENT_NONE);
    s.clock.fake_now_ns = 1499;
    assert_int_equal(poll_now(s.server).kind, MOE_EVENT_NONE);
    s.clock.fake_now_ns = 1500;
    assert_int_equal(poll_now(s.server).kind, MOE_EVENT_MESSAGE);
    /* what a peer sent before it closed arrives before its PEER_DOWN */
    assert_int_equal(sim_send(&s, 2), MOE_OK);
    s.client->ops->disconnect(s.client, s.link);
    assert_int_equal(poll_now(s.server).kind, MOE_EVENT_NONE);
    s.clock.fake_now_ns = 2000;
    assert_int_equal(poll_now(s.server).kind, MOE_EVENT_MESSAGE);
    assert_int_equal(poll_now(s.server).kind, MOE_EVENT_PEER_DOWN);
    assert_int_equal(moe_inproc_next_due_ns(s.hub), INT64_MAX);
    sim_close(&s);
}

static void test_frames_are_aligned_without_faults(void **state) {
    (void)state;
    sim s;
    sim_open(&s, 1);
    assert_int_equal(sim_send(&s, 1), MOE_OK);
    moe_event event = poll_now(s.server);
    assert_int_equal((uintptr_t)event.frames[0].data % 16, 0);
    assert_int_equal((uintptr_t)event.frames[1].data % 16, 0);
    sim_close(&s);
}

static void test_partition(void **state) {
    (void)state;
    sim s;
    sim_open(&s, 1);
    assert_int_equal(sim_send(&s, 1), MOE_OK);
    moe_event event = poll_now(s.server);
    assert_int_equal(event.kind, MOE_EVENT_MESSAGE);
    moe_peer to_client = event.peer;

    /* silent: messages are lost both ways, the connection stays */
    assert_int_equal(sim_send(&s, 2), MOE_OK);
    moe_inproc_partition(s.hub, "inproc:a", true, false);
    assert_int_equal(sim_send(&s, 3), MOE_OK);
    const moe_frame frame = {"x", 1};
    assert_int_equal(s.server->ops->send(s.server, to_client, &frame, 1, NULL), MOE_OK);
    assert_int_equal(poll_now(s.server).kind, MOE_EVENT_NONE);
    assert_int_equal(poll_now(s.client).kind, MOE_EVENT_NONE);
    assert_int_equal(moe_inproc_next_due_ns(s.hub), INT64_MAX);
    moe_inproc_partition(s.hub, "inproc:a", false, false);
    assert_int_equal(sim_send(&s, 4), MOE_OK);
    event = poll_now(s.server);
    assert_int_equal(event.kind, MOE_EVENT_MESSAGE);
    assert_int_equal(event.peer, to_client);
    assert_int_equal(*(const char *)event.frames[0].data, 4);

    /* with reset: both sides see it, nobody comes up while cut, and the old numbers are dead after healing */
    assert_int_equal(sim_send(&s, 5), MOE_OK);
    moe_inproc_partition(s.hub, "inproc:a", true, true);
    event = poll_now(s.server);
    assert_int_equal(event.kind, MOE_EVENT_PEER_DOWN);
    assert_int_equal(event.peer, to_client);
    event = poll_now(s.client);
    assert_int_equal(event.kind, MOE_EVENT_PEER_DOWN);
    assert_int_equal(event.peer, s.to_server);
    assert_int_equal(poll_now(s.client).kind, MOE_EVENT_NONE);
    assert_int_equal(moe_inproc_next_due_ns(s.hub), INT64_MAX);
    moe_inproc_partition(s.hub, "inproc:a", false, false);
    assert_true(moe_inproc_next_due_ns(s.hub) <= s.clock.fake_now_ns);
    event = poll_now(s.client);
    assert_int_equal(event.kind, MOE_EVENT_PEER_UP);
    assert_int_equal(sim_send(&s, 6), MOE_UNAVAILABLE);
    assert_true(event.peer != s.to_server);
    s.to_server = event.peer;
    assert_int_equal(sim_send(&s, 7), MOE_OK);
    event = poll_now(s.server);
    assert_int_equal(event.kind, MOE_EVENT_MESSAGE);
    assert_int_equal(*(const char *)event.frames[0].data, 7);
    sim_close(&s);
}

/* Each allocation of opening, connecting and sending fails in turn: an error each time, nothing lost but the call. */
static void test_inproc_out_of_memory(void **state) {
    (void)state;
    for (int64_t countdown = 1;; countdown++) {
        assert_true(countdown < 100);
        sim s = {.clock = moe_clock_fake(0)};
        moe_alloc_fail_after(countdown);
        moe_status status = moe_inproc_hub_new(&s.clock, 1, &s.hub, NULL);
        if (status == MOE_OK) status = moe_inproc_open(s.hub, &s.server, NULL);
        if (status == MOE_OK) status = moe_inproc_open(s.hub, &s.client, NULL);
        if (status == MOE_OK) status = s.client->ops->connect(s.client, "inproc:a", &s.link, NULL);
        if (status == MOE_OK) status = s.server->ops->listen(s.server, "inproc:a", NULL, NULL);
        moe_event event = {.kind = MOE_EVENT_NONE};
        if (status == MOE_OK) status = s.client->ops->poll(s.client, 0, &event, NULL);
        s.to_server = event.peer;
        if (status == MOE_OK) status = sim_send(&s, 1);
        moe_alloc_fail_after(0);
        if (status != MOE_OK) assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        if (s.client) s.client->ops->close(s.client);
        if (s.server) s.server->ops->close(s.server);
        moe_inproc_hub_free(&s.hub);
        if (status == MOE_OK) break;
    }
}

/* ---- */

typedef struct named_test {
    const char *name;
    CMUnitTestFunction function;
} named_test;

static const named_test every[] = {
    {"echo", test_echo},
    {"frame_counts", test_frame_counts},
    {"empty_frames", test_empty_frames},
    {"big_frames", test_big_frames},
    {"oversize_refused", test_oversize_refused},
    {"unknown_peer", test_unknown_peer},
    {"restart", test_restart},
    {"connect_before_listen", test_connect_before_listen},
    {"queue_limit", test_queue_limit},
    {"close_with_sends_pending", test_close_with_sends_pending},
    {"wake", test_wake},
    {"poll_deadline", test_poll_deadline},
    {"two_clients", test_two_clients},
    {"disconnect", test_disconnect},
    {"client_closes", test_client_closes},
    {"alignment", test_alignment},
    {"bad_endpoints", test_bad_endpoints},
};
#define NUM_EVERY (sizeof every / sizeof every[0])

static int run_every(const implementation *impl) {
    static char names[NUM_EVERY][64];
    struct CMUnitTest tests[NUM_EVERY];
    for (size_t i = 0; i < NUM_EVERY; i++) {
        snprintf(names[i], sizeof names[i], "%s/%s", impl->name, every[i].name);
        tests[i] = (struct CMUnitTest){names[i], every[i].function, setup, teardown, (void *)impl};
    }
    return _cmocka_run_group_tests(impl->name, tests, NUM_EVERY, NULL, NULL);
}

static int run_inproc(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate_setup_teardown(test_inproc_threads, setup, teardown, (void *)&inproc),
        cmocka_unit_test(test_faults_by_seed),
        cmocka_unit_test(test_fault_rates),
        cmocka_unit_test(test_fake_clock_never_sleeps),
        cmocka_unit_test(test_frames_are_aligned_without_faults),
        cmocka_unit_test(test_partition),
        cmocka_unit_test(test_inproc_out_of_memory),
    };
    return cmocka_run_group_tests_name("inproc only", tests, NULL, NULL);
}

int main(void) {
    int failed = run_every(&inproc);
    failed += run_inproc();
    return failed;
}
