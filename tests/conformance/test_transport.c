/* Every transport keeps the contract of common/transport.h: the same tests over each implementation, then what only one has. */
/* clang-format off */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h> /* needs the three above */
/* clang-format on */

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

#include "common/alloc.h"
#include "common/inproc/inproc.h"
#include "common/joined.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/random.h"
#include "common/shm/shm_transport.h"
#include "common/zmq/zmq_transport.h"

/* libzmq as packaged is not built for the thread sanitizer, which takes its own synchronisation for races. */
#if defined(__SANITIZE_THREAD__)
#define TEST_ZMQ 0
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TEST_ZMQ 0
#endif
#endif
#ifndef TEST_ZMQ
#define TEST_ZMQ 1
#endif

#define WAIT_NS (20 * MOE_NS_PER_S)    /* for what must happen */
#define QUIET_NS (200 * MOE_NS_PER_MS) /* how long we watch that something does not happen */
#define TURN_NS (2 * MOE_NS_PER_MS)    /* one node's poll while all are pumped */
#define INPROC_QUEUE_LIMIT_BYTES (INT64_C(1) << 20)
#define POLL_NS (50 * MOE_NS_PER_MS) /* of the transport that polls */
#define ZMQ_QUEUE_LIMIT_BYTES (INT64_C(20) << 20)
#define KEY_BYTES MOE_CURVE_KEY_BYTES
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
    int64_t queue_limit_bytes;
    bool limit_is_exact; /* nothing beyond it is on the way: no network buffers */
} implementation;

struct world {
    const implementation *impl;
    char endpoint[MOE_ENDPOINT_BYTES];
    node nodes[MAX_NODES];
    int num_nodes;
    moe_inproc_hub *hub;
    char folder[64];                     /* zmq: of this test */
    moe_curve_keys keys[MOE_ROLE_COUNT]; /* zmq tcp: of a process in each role */
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

static void pump_for(world *w, int except, int64_t ns) {
    int64_t until_ns = moe_now_ns(moe_clock_real()) + ns;
    while (moe_now_ns(moe_clock_real()) < until_ns) pump_except(w, except);
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

/* Frames gathered from rows, of odd and of even sizes, larger than a piece and than a ring; the large ones twice, so that what a
 * transport keeps of the first serves the second. */
static void test_gathered_frames(void **state) {
    enum { DATA_ROWS = 256, MOST_ROWS = 5000 };
    static const struct {
        size_t row_bytes;
        int32_t count;
    } shapes[] = {{1, 1}, {7, 3}, {100, MOST_ROWS}, {64, 2048}, {4096, 3000}, {4096, 2999}, {4099, 2500}, {4099, 256}};
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    int32_t *rows = malloc(MOST_ROWS * sizeof *rows);
    uint8_t *data = malloc(DATA_ROWS * 4099);
    assert_true(rows && data);
    for (size_t i = 0; i < DATA_ROWS * 4099; i++) data[i] = (uint8_t)moe_mix64(i);
    if (w->hub) moe_inproc_set_queue_limit(w->hub, MOE_MAX_PEER_QUEUED_BYTES);
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        size_t row_bytes = shapes[s].row_bytes, size = row_bytes * (size_t)shapes[s].count;
        for (int32_t i = 0; i < shapes[s].count; i++) rows[i] = (int32_t)(moe_mix64((uint64_t)i + s) % DATA_ROWS);
        const moe_frame frames[3] = {{"head", 4}, {data, size, rows, row_bytes}, {"tail", 4}};
        assert_int_equal(t->ops->send(t, p.to_server, frames, 3, &w->err), MOE_OK);
        saved_event e = expect(w, p.server, MOE_EVENT_MESSAGE);
        assert_int_equal(e.event.num_frames, 3);
        assert_int_equal(e.event.frames[1].size, size);
        for (int32_t i = 0; i < shapes[s].count; i++) {
            const uint8_t *got = (const uint8_t *)e.event.frames[1].data + (size_t)i * row_bytes;
            assert_int_equal(memcmp(got, data + (size_t)rows[i] * row_bytes, row_bytes), 0);
        }
        assert_memory_equal(e.event.frames[2].data, "tail", 4);
        free_saved(&e);
    }
    free(rows);
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
    /* time enough for the network to find the successor behind the back of a client that does not poll */
    pump_for(w, p.client, QUIET_NS);
    for (int i = 0; i < 50; i++) try_send(w, p.client, p.to_server, "stale, late");
    pump_for(w, p.client, QUIET_NS / 4);
    assert_int_equal(w->nodes[successor].count, 0);
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
    uint32_t accepted = 0;
    moe_status status = MOE_OK;
    while (status == MOE_OK && accepted < 8192) {
        data[0] = data[size / 4 - 1] = accepted;
        const moe_frame frames[2] = {{"head", 4}, {data, size}};
        status = t->ops->send(t, p.to_server, frames, 2, &w->err);
        accepted += status == MOE_OK;
    }
    assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
    assert_true(accepted >= w->impl->queue_limit_bytes / (int64_t)size - 1);
    if (w->impl->limit_is_exact) assert_true(accepted <= w->impl->queue_limit_bytes / (int64_t)size);
    for (uint32_t i = 0; i < accepted; i++) {
        saved_event s = expect(w, p.server, MOE_EVENT_MESSAGE);
        uint32_t head, tail;
        memcpy(&head, s.event.frames[1].data, 4);
        memcpy(&tail, (const char *)s.event.frames[1].data + size - 4, 4);
        assert_int_equal(head, i);
        assert_int_equal(tail, i);
        free_saved(&s);
    }
    /* the room has come back */
    const moe_frame again = {data, size};
    for (uint32_t i = 0; i < accepted / 2; i++) assert_int_equal(t->ops->send(t, p.to_server, &again, 1, &w->err), MOE_OK);
    for (uint32_t i = 0; i < accepted / 2; i++) {
        saved_event s = expect(w, p.server, MOE_EVENT_MESSAGE);
        assert_int_equal(s.event.frames[0].size, size);
        free_saved(&s);
    }
    /* what could never fit is not a matter of waiting */
    const moe_frame never = {data, (size_t)w->impl->queue_limit_bytes + 1};
    assert_int_equal(t->ops->send(t, p.to_server, &never, 1, &w->err), MOE_INVALID_ARGUMENT);
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
    moe_inproc_set_queue_limit(w->hub, INPROC_QUEUE_LIMIT_BYTES);
    snprintf(w->endpoint, sizeof w->endpoint, "inproc:worker-0");
}

static void inproc_teardown(world *w) { moe_inproc_hub_free(&w->hub); }

static moe_transport *inproc_open(world *w, bool listener) {
    (void)listener;
    moe_transport *t;
    assert_int_equal(moe_inproc_open(w->hub, &t, &w->err), MOE_OK);
    return t;
}

static const implementation inproc = {"inproc", inproc_setup, inproc_teardown, inproc_open, INPROC_QUEUE_LIMIT_BYTES, true};

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

/* ---- zmq: other processes, keys, files ---- */

static void ipc_setup(world *w) {
    snprintf(w->folder, sizeof w->folder, "/tmp/moe-transport-XXXXXX");
    assert_non_null(mkdtemp(w->folder));
    snprintf(w->endpoint, sizeof w->endpoint, "ipc://%s/worker.sock", w->folder);
}

static void ipc_teardown(world *w) {
    char path[128];
    snprintf(path, sizeof path, "%s/worker.sock", w->folder);
    unlink(path);
    assert_int_equal(rmdir(w->folder), 0);
}

static void tcp_setup(world *w) {
    snprintf(w->endpoint, sizeof w->endpoint, "tcp://127.0.0.1:0");
    for (int role = MOE_ROLE_LOCAL + 1; role < MOE_ROLE_COUNT; role++) {
        moe_curve_keys *own = &w->keys[role];
        assert_int_equal(moe_curve_keypair(own->public_key, own->secret_key, &w->err), MOE_OK);
        for (int other = 0; other < MOE_ROLE_COUNT; other++) memcpy(w->keys[other].role_keys[role], own->public_key, KEY_BYTES);
    }
}

static void tcp_teardown(world *w) { (void)w; }

static moe_zmq_config zmq_config(const moe_curve_keys *keys) {
    return (moe_zmq_config){.clock = moe_clock_real(), .keys = keys, .linger_ms = 100, .max_queued_bytes = ZMQ_QUEUE_LIMIT_BYTES};
}

static moe_transport *open_zmq(const moe_zmq_config *config) {
    moe_transport *t;
    moe_error err;
    if (moe_zmq_open(config, &t, &err) != MOE_OK) fail_msg("open: %s", err.message);
    return t;
}

static moe_transport *ipc_open(world *w, bool listener) {
    (void)w;
    (void)listener;
    moe_zmq_config config = zmq_config(NULL);
    return open_zmq(&config);
}

static moe_transport *polling_open(world *w, bool listener) {
    (void)w;
    (void)listener;
    moe_zmq_config config = zmq_config(NULL);
    config.poll_ns = POLL_NS;
    return open_zmq(&config);
}

static moe_transport *tcp_open(world *w, bool listener) {
    moe_zmq_config config = zmq_config(&w->keys[listener ? MOE_ROLE_WORKER : MOE_ROLE_ROUTER]);
    return open_zmq(&config);
}

static const implementation zmq_ipc = {"zmq-ipc", ipc_setup, ipc_teardown, ipc_open, ZMQ_QUEUE_LIMIT_BYTES, false};
static const implementation zmq_polling = {"zmq-polling", ipc_setup, ipc_teardown, polling_open, ZMQ_QUEUE_LIMIT_BYTES, false};
static const implementation zmq_tcp = {"zmq-tcp", tcp_setup, tcp_teardown, tcp_open, ZMQ_QUEUE_LIMIT_BYTES, false};

/* ---- shared memory ---- */

static void shm_setup(world *w) {
    ipc_setup(w);
    snprintf(w->endpoint, sizeof w->endpoint, "shm:%s/worker.sock", w->folder);
}

static moe_transport *open_shm(int64_t poll_ns) {
    moe_transport *t;
    moe_error err;
    const moe_shm_config config = {
        .clock = moe_clock_real(), .linger_ms = 100, .max_queued_bytes = ZMQ_QUEUE_LIMIT_BYTES, .poll_ns = poll_ns};
    if (moe_shm_open(&config, &t, &err) != MOE_OK) fail_msg("open: %s", err.message);
    return t;
}

static moe_transport *shm_open_sleeping(world *w, bool listener) {
    (void)w;
    (void)listener;
    return open_shm(0);
}

static moe_transport *shm_open_polling(world *w, bool listener) {
    (void)w;
    (void)listener;
    return open_shm(POLL_NS);
}

static const implementation shm = {"shm", shm_setup, ipc_teardown, shm_open_sleeping, ZMQ_QUEUE_LIMIT_BYTES, false};
static const implementation shm_polling = {"shm-polling", shm_setup, ipc_teardown, shm_open_polling, ZMQ_QUEUE_LIMIT_BYTES, false};

/* ---- two as one: both parts in use, the endpoint under test belongs to either ---- */

static moe_transport *open_joined(world *w, bool near_under_test) {
    static int serial;
    moe_transport *t;
    char other[MOE_ENDPOINT_BYTES];
    moe_zmq_config config = zmq_config(NULL);
    if (moe_joined_open(open_shm(0), open_zmq(&config), moe_clock_real(), &t, &w->err) != MOE_OK) fail_msg("%s", w->err.message);
    snprintf(other, sizeof other, "%s%s/%d.sock", near_under_test ? "ipc://" : "shm:", w->folder, serial++);
    uint64_t link; /* nobody listens there: it goes on trying */
    assert_int_equal(t->ops->connect(t, other, &link, &w->err), MOE_OK);
    return t;
}

static moe_transport *near_open(world *w, bool listener) {
    (void)listener;
    return open_joined(w, true);
}

static moe_transport *far_open(world *w, bool listener) {
    (void)listener;
    return open_joined(w, false);
}

static const implementation joined_near = {"joined-near", shm_setup, ipc_teardown, near_open, ZMQ_QUEUE_LIMIT_BYTES, false};
static const implementation joined_far = {"joined-far", ipc_setup, ipc_teardown, far_open, ZMQ_QUEUE_LIMIT_BYTES, false};

/* One listener at both kinds of endpoint, with a client at each: the numbers of peers do not meet. */
static void test_both_parts(void **state) {
    world *w = *state;
    char second[MOE_ENDPOINT_BYTES];
    int server = open_node(w, true), clients[2];
    moe_transport *t = w->nodes[server].t;
    listen_at(w, server);
    snprintf(second, sizeof second, "ipc://%s/second.sock", w->folder);
    assert_int_equal(t->ops->listen(t, second, NULL, &w->err), MOE_OK);
    moe_peer to_server[2], to_client[2];
    for (int i = 0; i < 2; i++) {
        if (i == 1) snprintf(w->endpoint, sizeof w->endpoint, "%s", second);
        clients[i] = open_node(w, false);
        to_server[i] = expect_up(w, clients[i], connect_to(w, clients[i]));
        send_text(w, clients[i], to_server[i], "hello");
        to_client[i] = expect_text(w, server, "hello");
    }
    assert_true(to_client[0] != to_client[1]);
    for (int i = 0; i < 20; i++) {
        send_text(w, server, to_client[1], "to the second");
        send_text(w, server, to_client[0], "to the first");
        expect_text(w, clients[0], "to the first");
        expect_text(w, clients[1], "to the second");
    }
}

/* ---- in other processes ---- */

/* A node on a configuration of its own. */
static int open_node_with(world *w, const moe_zmq_config *config) {
    int index = open_node(w, false);
    w->nodes[index].t->ops->close(w->nodes[index].t);
    w->nodes[index].t = open_zmq(config);
    return index;
}

/* In the child: echoes what it is sent until it is killed. Says where it listens through the pipe. */
_Noreturn static void child_echo(world *w, int out) {
    moe_transport *t = w->impl->open(w, true);
    char bound[MOE_ENDPOINT_BYTES] = "";
    if (t->ops->listen(t, w->endpoint, bound, NULL) != MOE_OK || write(out, bound, sizeof bound) != sizeof bound) _exit(1);
    int64_t until_ns = moe_now_ns(moe_clock_real()) + 2 * WAIT_NS;
    while (moe_now_ns(moe_clock_real()) < until_ns) {
        moe_event event;
        if (t->ops->poll(t, until_ns, &event, NULL) != MOE_OK) _exit(1);
        if (event.kind == MOE_EVENT_MESSAGE) t->ops->send(t, event.peer, event.frames, event.num_frames, NULL);
    }
    _exit(0);
}

static pid_t start_echo(world *w) {
    int ends[2];
    char bound[MOE_ENDPOINT_BYTES];
    assert_int_equal(pipe(ends), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) child_echo(w, ends[1]);
    close(ends[1]);
    assert_int_equal(read(ends[0], bound, sizeof bound), sizeof bound);
    close(ends[0]);
    snprintf(w->endpoint, sizeof w->endpoint, "%s", bound);
    return pid;
}

static void kill_child(pid_t pid) {
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

/* What a wait in which nothing comes costs this thread. */
static int64_t cpu_ns_of_idle_wait(world *w, int index) {
    struct timespec before, after;
    moe_event event;
    moe_transport *t = w->nodes[index].t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    assert_int_equal(t->ops->poll(t, moe_now_ns(moe_clock_real()) + 2 * POLL_NS, &event, &w->err), MOE_OK);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    assert_int_equal(event.kind, MOE_EVENT_NONE);
    return (after.tv_sec - before.tv_sec) * MOE_NS_PER_S + after.tv_nsec - before.tv_nsec;
}

/* After an answer that came fast a wait polls; after one in vain it sleeps at once. */
static void test_polls_while_it_pays(void **state) {
    world *w = *state;
    pid_t pid = start_echo(w);
    int client = open_node(w, false);
    uint64_t link = connect_to(w, client);
    moe_peer peer = expect_up(w, client, link);
    bool polled = false;
    for (int i = 0; i < 1000 && !polled; i++) { /* on a busy machine the echo may take longer than POLL_NS */
        send_text(w, client, peer, "echo");
        assert_int_equal(expect_text(w, client, "echo"), peer);
        polled = cpu_ns_of_idle_wait(w, client) >= POLL_NS / 20;
    }
    assert_true(polled);
    assert_true(cpu_ns_of_idle_wait(w, client) < POLL_NS / 20);
    kill_child(pid);
}

static void test_listener_process_dies(void **state) {
    world *w = *state;
    pid_t pid = start_echo(w);
    int client = open_node(w, false);
    uint64_t link = connect_to(w, client);
    moe_peer before = 0;
    for (int life = 0; life < 3; life++) {
        moe_peer peer = expect_up(w, client, link);
        assert_true(peer != before);
        send_text(w, client, peer, "echo");
        assert_int_equal(expect_text(w, client, "echo"), peer);
        kill_child(pid);
        for (int i = 0; i < 20; i++) try_send(w, client, peer, "stale");
        saved_event s = expect(w, client, MOE_EVENT_PEER_DOWN);
        assert_int_equal(s.event.peer, peer);
        assert_int_equal(try_send(w, client, peer, "stale"), MOE_UNAVAILABLE);
        before = peer;
        /* ipc: over the socket file that the dead process left behind. A successor that echoed a stale message would be seen
         * above, before the fresh one. */
        if (life < 2) pid = start_echo(w);
    }
}

/* A process that stands still keeps its connections; only the missing heartbeats tell. */
static void test_stopped_process(void **state) {
    world *w = *state;
    pid_t pid = start_echo(w);
    moe_zmq_config config = zmq_config(w->keys[MOE_ROLE_ROUTER].public_key[0] ? &w->keys[MOE_ROLE_ROUTER] : NULL);
    config.heartbeat_ms = 100;
    int client = open_node_with(w, &config);
    uint64_t link = connect_to(w, client);
    moe_peer peer = expect_up(w, client, link);
    send_text(w, client, peer, "echo");
    expect_text(w, client, "echo");
    assert_int_equal(kill(pid, SIGSTOP), 0);
    saved_event s = expect(w, client, MOE_EVENT_PEER_DOWN);
    assert_int_equal(s.event.peer, peer);
    assert_int_equal(kill(pid, SIGCONT), 0);
    peer = expect_up(w, client, link);
    send_text(w, client, peer, "echo");
    expect_text(w, client, "echo");
    kill_child(pid);
}

_Noreturn static void child_client(world *w) {
    moe_transport *t = w->impl->open(w, false);
    uint64_t link;
    if (t->ops->connect(t, w->endpoint, &link, NULL) != MOE_OK) _exit(1);
    int64_t until_ns = moe_now_ns(moe_clock_real()) + 2 * WAIT_NS;
    const moe_frame frames[2] = {{"from the child", 14}, {"tail", 4}};
    while (moe_now_ns(moe_clock_real()) < until_ns) {
        moe_event event;
        if (t->ops->poll(t, until_ns, &event, NULL) != MOE_OK) _exit(1);
        if (event.kind == MOE_EVENT_PEER_UP) t->ops->send(t, event.peer, frames, 2, NULL);
    }
    _exit(0);
}

static void test_client_process_dies(void **state) {
    world *w = *state;
    int server = open_node(w, true);
    listen_at(w, server);
    for (int life = 0; life < 3; life++) {
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) child_client(w);
        moe_peer peer = expect_text(w, server, "from the child");
        kill_child(pid);
        saved_event s = expect(w, server, MOE_EVENT_PEER_DOWN);
        assert_int_equal(s.event.peer, peer);
        assert_int_equal(try_send(w, server, peer, "x"), MOE_UNAVAILABLE);
    }
}

/* A frame beyond the receiver's limit ends the connection; it must not vanish without a sign. */
static void test_receiver_limit(void **state) {
    world *w = *state;
    moe_zmq_config config = zmq_config(w->keys[MOE_ROLE_WORKER].public_key[0] ? &w->keys[MOE_ROLE_WORKER] : NULL);
    config.max_message_bytes = 65536;
    int server = open_node_with(w, &config);
    listen_at(w, server);
    int client = open_node(w, false);
    uint64_t link = connect_to(w, client);
    moe_peer peer = expect_up(w, client, link);
    static const char block[1 << 20];
    moe_transport *t = w->nodes[client].t;
    const moe_frame fits = {block, 65536}, too_large = {block, sizeof block};
    assert_int_equal(t->ops->send(t, peer, &fits, 1, &w->err), MOE_OK);
    saved_event s = expect(w, server, MOE_EVENT_MESSAGE);
    assert_int_equal(s.event.frames[0].size, 65536);
    free_saved(&s);
    assert_int_equal(t->ops->send(t, peer, &too_large, 1, &w->err), MOE_OK);
    s = expect(w, client, MOE_EVENT_PEER_DOWN);
    assert_int_equal(s.event.peer, peer);
    peer = expect_up(w, client, link);
    expect(w, server, MOE_EVENT_PEER_DOWN);
    send_text(w, client, peer, "fresh");
    moe_peer back = expect_text(w, server, "fresh");
    moe_transport *small = w->nodes[server].t;
    assert_int_equal(small->ops->send(small, back, &too_large, 1, &w->err), MOE_INVALID_ARGUMENT);
    send_text(w, server, back, "within");
    expect_text(w, client, "within");
}

/* A client that speaks ZeroMQ but not our way: no message with too many frames gets through, and the connection is kept. */
static void test_too_many_frames(void **state) {
    world *w = *state;
    int server = open_node(w, true);
    listen_at(w, server);
    int64_t bad_before = moe_metric_value(MOE_METRIC_BAD_MESSAGES);
    void *context = zmq_ctx_new(), *dealer = zmq_socket(context, ZMQ_DEALER);
    assert_int_equal(zmq_connect(dealer, w->endpoint), 0);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 3 * MOE_MAX_FRAMES; i++) assert_int_equal(zmq_send(dealer, "f", 1, ZMQ_SNDMORE), 1);
        assert_int_equal(zmq_send(dealer, "f", 1, 0), 1);
    }
    zmq_send(dealer, "good", 4, ZMQ_SNDMORE);
    zmq_send(dealer, "tail", 4, 0);
    expect_text(w, server, "good");
    assert_int_equal(moe_metric_value(MOE_METRIC_BAD_MESSAGES) - bad_before, 3);
    int zero = 0;
    zmq_setsockopt(dealer, ZMQ_LINGER, &zero, sizeof zero);
    zmq_close(dealer);
    zmq_ctx_term(context);
}

/* Room for two accepted peers and a third comes: the longest silent one is given up. */
static void test_accepted_limit(void **state) {
    world *w = *state;
    moe_zmq_config config = zmq_config(NULL);
    config.max_accepted = 2;
    int server = open_node_with(w, &config);
    listen_at(w, server);
    int clients[3];
    moe_peer to_server[3], to_client[3];
    for (int i = 0; i < 3; i++) {
        clients[i] = open_node(w, false);
        to_server[i] = expect_up(w, clients[i], connect_to(w, clients[i]));
    }
    for (int i = 0; i < 2; i++) {
        send_text(w, clients[i], to_server[i], "hello");
        to_client[i] = expect_text(w, server, "hello");
    }
    send_text(w, clients[2], to_server[2], "lost");
    saved_event s = expect(w, server, MOE_EVENT_PEER_DOWN);
    assert_int_equal(s.event.peer, to_client[0]);
    send_text(w, clients[2], to_server[2], "hello");
    to_client[2] = expect_text(w, server, "hello");
    for (int i = 1; i < 3; i++) {
        send_text(w, server, to_client[i], "welcome");
        expect_text(w, clients[i], "welcome");
    }
    assert_int_equal(try_send(w, server, to_client[0], "x"), MOE_UNAVAILABLE);
}

static void test_roles(void **state) {
    world *w = *state;
    int server = open_node(w, true);
    listen_at(w, server);
    for (int role = MOE_ROLE_LOCAL + 1; role < MOE_ROLE_COUNT; role++) {
        moe_zmq_config config = zmq_config(&w->keys[role]);
        int client = open_node_with(w, &config);
        uint64_t link = connect_to(w, client);
        saved_event s = expect(w, client, MOE_EVENT_PEER_UP);
        assert_int_equal(s.event.role, MOE_ROLE_WORKER);
        assert_int_equal(s.event.link, link);
        send_text(w, client, s.event.peer, "who am I");
        s = expect(w, server, MOE_EVENT_MESSAGE);
        assert_int_equal(s.event.role, role);
        free_saved(&s);
        close_node(w, client);
        expect(w, server, MOE_EVENT_PEER_DOWN);
    }
    /* a router's endpoint says so, and is connected to as listen gave it */
    moe_zmq_config config = zmq_config(&w->keys[MOE_ROLE_ROUTER]);
    int router = open_node_with(w, &config);
    snprintf(w->endpoint, sizeof w->endpoint, "tcp://127.0.0.1:0");
    listen_at(w, router);
    assert_non_null(strstr(w->endpoint, "?role=router"));
    config = zmq_config(&w->keys[MOE_ROLE_OPERATOR]);
    int client = open_node_with(w, &config);
    connect_to(w, client);
    saved_event s = expect(w, client, MOE_EVENT_PEER_UP);
    assert_int_equal(s.event.role, MOE_ROLE_ROUTER);
}

/* Watches that `client` stays shut out and `server` hears nothing, then that the server is well. */
static void assert_shut_out(world *w, int client, int server) {
    pump_for(w, -1, QUIET_NS);
    assert_int_equal(w->nodes[client].count, 0);
    assert_int_equal(w->nodes[server].count, 0);
    int good = open_node(w, false);
    uint64_t link = connect_to(w, good);
    moe_peer peer = expect_up(w, good, link);
    send_text(w, good, peer, "well");
    expect_text(w, server, "well");
    assert_int_equal(w->nodes[client].count, 0);
    close_node(w, good);
    expect(w, server, MOE_EVENT_PEER_DOWN);
}

static void test_wrong_keys(void **state) {
    world *w = *state;
    int server = open_node(w, true);
    listen_at(w, server);
    moe_curve_keys stranger = w->keys[MOE_ROLE_ROUTER], *router = &w->keys[MOE_ROLE_ROUTER];

    /* a key of no role */
    assert_int_equal(moe_curve_keypair(stranger.public_key, stranger.secret_key, &w->err), MOE_OK);
    moe_zmq_config config = zmq_config(&stranger);
    int client = open_node_with(w, &config);
    connect_to(w, client);
    assert_shut_out(w, client, server);
    close_node(w, client);

    /* a role's public key without its secret key */
    memcpy(stranger.public_key, router->public_key, KEY_BYTES);
    config = zmq_config(&stranger);
    client = open_node_with(w, &config);
    connect_to(w, client);
    assert_shut_out(w, client, server);
    close_node(w, client);

    /* the right key, for another server than the one that answers */
    stranger = *router;
    memcpy(stranger.role_keys[MOE_ROLE_WORKER], router->public_key, KEY_BYTES);
    config = zmq_config(&stranger);
    client = open_node_with(w, &config);
    connect_to(w, client);
    assert_shut_out(w, client, server);
    close_node(w, client);

    /* no CURVE at all */
    void *context = zmq_ctx_new(), *dealer = zmq_socket(context, ZMQ_DEALER);
    assert_int_equal(zmq_connect(dealer, w->endpoint), 0);
    zmq_send(dealer, "plain", 5, ZMQ_DONTWAIT);
    assert_shut_out(w, server == 0 ? 1 : 0, server);
    int zero = 0;
    zmq_setsockopt(dealer, ZMQ_LINGER, &zero, sizeof zero);
    zmq_close(dealer);
    zmq_ctx_term(context);
}

/* A role without a key in the listener's folder is not let in, whoever has that key elsewhere. */
static void test_role_not_listed(void **state) {
    world *w = *state;
    moe_curve_keys only_routers = w->keys[MOE_ROLE_WORKER];
    only_routers.role_keys[MOE_ROLE_OPERATOR][0] = '\0';
    moe_zmq_config config = zmq_config(&only_routers);
    int server = open_node_with(w, &config);
    listen_at(w, server);
    config = zmq_config(&w->keys[MOE_ROLE_OPERATOR]);
    int client = open_node_with(w, &config);
    connect_to(w, client);
    assert_shut_out(w, client, server);
}

static void test_tcp_needs_keys(void **state) {
    world *w = *state;
    moe_zmq_config config = zmq_config(NULL);
    moe_transport *t = open_zmq(&config);
    uint64_t link;
    assert_int_equal(t->ops->listen(t, "tcp://127.0.0.1:0", NULL, &w->err), MOE_FAILED_PRECONDITION);
    assert_non_null(strstr(w->err.message, "keygen"));
    assert_int_equal(t->ops->connect(t, "tcp://127.0.0.1:9", &link, &w->err), MOE_FAILED_PRECONDITION);
    assert_non_null(strstr(w->err.message, "keygen"));
    t->ops->close(t);
    moe_curve_keys lone = w->keys[MOE_ROLE_ROUTER];
    lone.role_keys[MOE_ROLE_WORKER][0] = '\0';
    config = zmq_config(&lone);
    t = open_zmq(&config);
    assert_int_equal(t->ops->connect(t, "tcp://127.0.0.1:9", &link, &w->err), MOE_FAILED_PRECONDITION);
    assert_non_null(strstr(w->err.message, "worker"));
    assert_int_equal(t->ops->connect(t, "tcp://127.0.0.1:9?role=king", &link, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->connect(t, "tcp://127.0.0.1:9?roles", &link, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->connect(t, "tcp://127.0.0.1:9?role=router", &link, &w->err), MOE_OK);
    assert_int_equal(t->ops->connect(t, "tcp://nowhere?role=router", &link, &w->err), MOE_INVALID_ARGUMENT);
    t->ops->close(t);
}

static void test_ipc_socket_file(void **state) {
    world *w = *state;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char *path = address.sun_path;
    snprintf(path, sizeof address.sun_path, "%s", w->endpoint + strlen("ipc://"));
    int server = open_node(w, true);
    listen_at(w, server);
    struct stat file;
    assert_int_equal(stat(path, &file), 0);
    assert_true(S_ISSOCK(file.st_mode));
    assert_int_equal(file.st_mode & 0077, 0);
    close_node(w, server);
    assert_int_not_equal(stat(path, &file), 0);

    /* left behind by a process that died */
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    close(fd);
    server = open_node(w, true);
    listen_at(w, server);
    close_node(w, server);

    /* no socket: not ours to remove */
    fd = open(path, O_CREAT | O_WRONLY | O_EXCL, 0600);
    assert_true(fd >= 0);
    close(fd);
    server = open_node(w, true);
    moe_transport *t = w->nodes[server].t;
    assert_int_equal(t->ops->listen(t, w->endpoint, NULL, &w->err), MOE_ALREADY_EXISTS);
    assert_int_equal(stat(path, &file), 0);
    unlink(path);
    /* after a failure the transport can still listen */
    listen_at(w, server);
    char longest[MOE_ENDPOINT_BYTES];
    snprintf(longest, sizeof longest, "ipc:///%0120d", 0);
    server = open_node(w, true);
    t = w->nodes[server].t;
    assert_int_equal(t->ops->listen(t, longest, NULL, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->listen(t, "ipc://@abstract", NULL, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->listen(t, "ipc://*", NULL, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->listen(t, "ipc:///no/such/folder/x.sock", NULL, &w->err), MOE_UNAVAILABLE);
}

static void rewrite_file(const char *folder, const char *name, mode_t mode, const char *text) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
    assert_int_equal(chmod(path, mode), 0);
}

static void remove_keys(const char *folder) {
    static const char *const names[] = {"router.key", "router.pub", "worker.key", "worker.pub", "operator.key", "operator.pub"};
    char path[128];
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        unlink(path);
    }
    rmdir(folder);
}

static void test_key_files(void **state) {
    world *w = *state;
    char folder[96], path[128];
    snprintf(folder, sizeof folder, "%s/keys", w->folder);
    moe_curve_keys router, worker;
    assert_int_equal(moe_curve_keys_read(folder, MOE_ROLE_ROUTER, &router, &w->err), MOE_NOT_FOUND);
    if (moe_curve_keys_write(folder, &w->err) != MOE_OK) fail_msg("%s", w->err.message);
    struct stat file;
    assert_int_equal(stat(folder, &file), 0);
    assert_int_equal(file.st_mode & 0777, 0700);
    snprintf(path, sizeof path, "%s/router.key", folder);
    assert_int_equal(stat(path, &file), 0);
    assert_int_equal(file.st_mode & 0777, 0600);
    if (moe_curve_keys_read(folder, MOE_ROLE_ROUTER, &router, &w->err) != MOE_OK) fail_msg("%s", w->err.message);
    if (moe_curve_keys_read(folder, MOE_ROLE_WORKER, &worker, &w->err) != MOE_OK) fail_msg("%s", w->err.message);
    char derived[KEY_BYTES];
    assert_int_equal(zmq_curve_public(derived, router.secret_key), 0);
    assert_string_equal(derived, router.public_key);
    assert_string_equal(router.role_keys[MOE_ROLE_ROUTER], router.public_key);
    assert_string_equal(router.role_keys[MOE_ROLE_WORKER], worker.public_key);
    assert_string_equal(worker.role_keys[MOE_ROLE_ROUTER], router.public_key);
    assert_string_not_equal(router.public_key, worker.public_key);
    assert_string_equal(router.role_keys[MOE_ROLE_LOCAL], "");

    assert_int_equal(moe_curve_keys_write(folder, &w->err), MOE_ALREADY_EXISTS);
    assert_int_equal(moe_curve_keys_read(folder, MOE_ROLE_LOCAL, &router, &w->err), MOE_INVALID_ARGUMENT);
    assert_int_equal(chmod(path, 0640), 0);
    assert_int_equal(moe_curve_keys_read(folder, MOE_ROLE_ROUTER, &router, &w->err), MOE_PERMISSION_DENIED);
    assert_non_null(strstr(w->err.message, "router.key"));
    assert_string_equal(router.secret_key, "");
    assert_int_equal(chmod(path, 0604), 0);
    assert_int_equal(moe_curve_keys_read(folder, MOE_ROLE_ROUTER, &router, &w->err), MOE_PERMISSION_DENIED);
    rewrite_file(folder, "router.key", 0600, "curve\n    public-key = \"short\"\n");
    assert_int_equal(moe_curve_keys_read(folder, MOE_ROLE_ROUTER, &router, &w->err), MOE_INVALID_ARGUMENT);
    char text[512];
    snprintf(text, sizeof text, "curve\n    public-key = \"%s\"\n    secret-key = \"%s\"\n", worker.role_keys[MOE_ROLE_ROUTER],
             worker.secret_key);
    rewrite_file(folder, "router.key", 0600, text);
    assert_int_equal(moe_curve_keys_read(folder, MOE_ROLE_ROUTER, &router, &w->err), MOE_INVALID_ARGUMENT);
    snprintf(path, sizeof path, "%s/router.pub", folder);
    unlink(path);
    assert_int_equal(moe_curve_keys_read(folder, MOE_ROLE_WORKER, &worker, &w->err), MOE_OK);
    assert_string_equal(worker.role_keys[MOE_ROLE_ROUTER], "");
    remove_keys(folder);
}

/* Each of our own allocations fails in turn; libzmq's own are not ours to fail. */
static void test_zmq_out_of_memory(void **state) {
    world *w = *state;
    pair p = connected_pair(w);
    moe_transport *t = w->nodes[p.client].t;
    const moe_frame frames[2] = {{"one", 3}, {"two", 3}};
    for (int64_t countdown = 1; countdown <= 2; countdown++) {
        moe_alloc_fail_after(countdown);
        assert_int_equal(t->ops->send(t, p.to_server, frames, 2, &w->err), MOE_RESOURCE_EXHAUSTED);
    }
    uint64_t link;
    for (int64_t countdown = 1; countdown <= 2; countdown++) {
        moe_alloc_fail_after(countdown);
        assert_int_equal(t->ops->connect(t, w->endpoint, &link, &w->err), MOE_RESOURCE_EXHAUSTED);
    }
    moe_alloc_fail_after(0);
    send_text(w, p.client, p.to_server, "well");
    expect_text(w, p.server, "well");
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
    {"gathered_frames", test_gathered_frames},
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

#define ON(impl, test) \
    { #impl "/" #test, test, setup, teardown, (void *)&(impl) }

static int run_shm(void) {
    const struct CMUnitTest tests[] = {
        ON(shm, test_listener_process_dies),
        ON(shm, test_client_process_dies),
        ON(shm_polling, test_polls_while_it_pays),
    };
    return cmocka_run_group_tests_name("shm only", tests, NULL, NULL);
}

static int run_joined(void) {
    const struct CMUnitTest tests[] = {ON(joined_near, test_both_parts), ON(joined_far, test_listener_process_dies)};
    return cmocka_run_group_tests_name("joined only", tests, NULL, NULL);
}

static int run_zmq(void) {
    const struct CMUnitTest tests[] = {
        ON(zmq_ipc, test_listener_process_dies),
        ON(zmq_tcp, test_listener_process_dies),
        ON(zmq_polling, test_polls_while_it_pays),
        ON(zmq_ipc, test_stopped_process),
        ON(zmq_tcp, test_stopped_process),
        ON(zmq_ipc, test_client_process_dies),
        ON(zmq_tcp, test_client_process_dies),
        ON(zmq_ipc, test_receiver_limit),
        ON(zmq_tcp, test_receiver_limit),
        ON(zmq_ipc, test_too_many_frames),
        ON(zmq_ipc, test_accepted_limit),
        ON(zmq_tcp, test_roles),
        ON(zmq_tcp, test_wrong_keys),
        ON(zmq_tcp, test_role_not_listed),
        ON(zmq_tcp, test_tcp_needs_keys),
        ON(zmq_ipc, test_ipc_socket_file),
        ON(zmq_ipc, test_key_files),
        ON(zmq_ipc, test_zmq_out_of_memory),
    };
    return cmocka_run_group_tests_name("zmq only", tests, NULL, NULL);
}

int main(void) {
    moe_log_init(MOE_LOG_ERROR, "test");
    int failed = run_every(&inproc) + run_inproc() + run_every(&shm) + run_every(&shm_polling) + run_shm();
    if (TEST_ZMQ) failed += run_every(&zmq_ipc) + run_every(&zmq_polling) + run_every(&zmq_tcp) + run_zmq();
    if (TEST_ZMQ) failed += run_every(&joined_near) + run_every(&joined_far) + run_joined();
    return failed;
}
