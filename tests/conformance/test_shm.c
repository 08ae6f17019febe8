/* What only the shared-memory transport has: rings and their sizes, processes that die in mid-message, and peers that write what no
 * transport of ours would. */
#include "tests/support/test.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/random.h"
#include "common/shm/shm_internal.h"
#include "tests/support/temp_dir.h"

#define WAIT_NS (20 * MOE_NS_PER_S)

typedef struct world {
    moe_test_dir dir;
    char endpoint[MOE_ENDPOINT_BYTES], path[MOE_ENDPOINT_BYTES];
    moe_transport *server, *client;
    uint64_t link;
    moe_peer to_server;
} world;

static int64_t now(void) { return moe_now_ns(moe_clock_real()); }

static moe_transport *open_with(moe_shm_config config) {
    moe_transport *t;
    moe_error err;
    config.clock = moe_clock_real();
    if (moe_shm_open(&config, &t, &err) != MOE_OK) fail_msg("%s", err.message);
    return t;
}

static moe_event poll_once(moe_transport *t, int64_t until_ns) {
    moe_event event;
    moe_error err;
    if (t->ops->poll(t, until_ns, &event, &err) != MOE_OK) fail_msg("%s", err.message);
    return event;
}

/* The next event of one of two transports of this thread, as both are polled in turn. */
static moe_event await(moe_transport *t, moe_transport *other, moe_event_kind kind) {
    int64_t until_ns = now() + WAIT_NS;
    while (now() < until_ns) {
        moe_event event = poll_once(t, now() + (other ? MOE_NS_PER_MS / 5 : MOE_NS_PER_S));
        if (event.kind == kind) return event;
        if (event.kind != MOE_EVENT_NONE) fail_msg("event %d where %d was expected", event.kind, kind);
        if (other) assert_int_equal(poll_once(other, 0).kind, MOE_EVENT_NONE);
    }
    fail_msg("no event %d came", kind);
    return (moe_event){.kind = MOE_EVENT_NONE};
}

static int setup(void **state) {
    world *w = calloc(1, sizeof *w);
    assert_non_null(w);
    w->dir = moe_test_dir_new();
    snprintf(w->path, sizeof w->path, "%.200s/s", w->dir.path);
    snprintf(w->endpoint, sizeof w->endpoint, "shm:%.200s/s", w->dir.path);
    w->server = open_with((moe_shm_config){.linger_ms = 100});
    assert_int_equal(w->server->ops->listen(w->server, w->endpoint, NULL, NULL), MOE_OK);
    *state = w;
    return 0;
}

static void connect_client(world *w) {
    w->client = open_with((moe_shm_config){.linger_ms = 100});
    assert_int_equal(w->client->ops->connect(w->client, w->endpoint, &w->link, NULL), MOE_OK);
    w->to_server = await(w->client, w->server, MOE_EVENT_PEER_UP).peer;
}

static int teardown(void **state) {
    world *w = *state;
    if (w->client) w->client->ops->close(w->client);
    w->server->ops->close(w->server);
    moe_test_dir_free(&w->dir);
    free(w);
    return 0;
}

/* ---- sizes ---- */

static void fill(unsigned char *data, size_t bytes, uint64_t seed) {
    for (size_t i = 0; i < bytes; i += 4093) data[i] = (unsigned char)moe_mix64(seed + i);
    if (bytes) data[bytes - 1] = (unsigned char)seed;
}

static void assert_filled(const unsigned char *data, size_t bytes, uint64_t seed) {
    if (bytes) assert_int_equal(data[bytes - 1], (unsigned char)seed);
    for (size_t i = 0; i + 1 < bytes; i += 4093) assert_int_equal(data[i], (unsigned char)moe_mix64(seed + i));
}

static void send_through(world *w, unsigned char *data, size_t bytes) {
    fill(data, bytes, bytes);
    const moe_frame frames[2] = {{data, bytes}, {"tail", 4}};
    assert_int_equal(w->client->ops->send(w->client, w->to_server, frames, 2, NULL), MOE_OK);
    moe_event event = await(w->server, w->client, MOE_EVENT_MESSAGE);
    assert_int_equal(event.num_frames, 2);
    assert_int_equal(event.frames[0].size, bytes);
    assert_int_equal((uintptr_t)event.frames[0].data % MOE_SHM_LINE_BYTES, 0);
    assert_int_equal((uintptr_t)event.frames[1].data % MOE_SHM_LINE_BYTES, 0);
    assert_filled(event.frames[0].data, bytes, bytes);
    assert_memory_equal(event.frames[1].data, "tail", 4);
}

/* Around every size at which the way changes: a line, a piece, the ring, several rings, the largest frame. */
static void test_sizes(void **state) {
    world *w = *state;
    static const size_t around[] = {2 * MOE_SHM_LINE_BYTES, 64 << 10, MOE_SHM_RING_BYTES - 128, MOE_SHM_RING_BYTES,
                                    3 * MOE_SHM_RING_BYTES};
    unsigned char *data = malloc((size_t)MOE_MAX_MESSAGE_BYTES);
    assert_non_null(data);
    connect_client(w);
    send_through(w, data, 0);
    for (size_t i = 0; i < sizeof around / sizeof *around; i++)
        for (int off = -65; off <= 65; off += off == -1 || off == 0 ? 1 : 64) send_through(w, data, around[i] + (size_t)off);
    send_through(w, data, (size_t)MOE_MAX_MESSAGE_BYTES);
    send_through(w, data, 1);
    free(data);
}

/* ---- many messages ---- */

#define MANY 5000

static size_t size_of(uint32_t i) { return 4 + (i % 97 == 0 ? MOE_SHM_RING_BYTES / 3 : moe_mix64(i) % 3000); }

/* Sends MANY messages and takes as many, which must come in order. False: something went wrong. */
static bool exchange_many(moe_transport *t, moe_peer peer, unsigned char *data) {
    uint32_t sent = 0, taken = 0, value;
    while (sent < MANY || taken < MANY) {
        moe_event event;
        memcpy(data, &sent, sizeof sent);
        const moe_frame frame = {data, size_of(sent)};
        bool full = false;
        if (sent < MANY && peer) {
            moe_status status = t->ops->send(t, peer, &frame, 1, NULL);
            if (status != MOE_OK && status != MOE_RESOURCE_EXHAUSTED) return false;
            full = status != MOE_OK;
            sent += !full;
        }
        bool wait = taken < MANY && (sent == MANY || !peer);
        if (t->ops->poll(t, wait ? now() + WAIT_NS : full ? now() + MOE_NS_PER_MS : 0, &event, NULL) != MOE_OK) return false;
        if (event.kind == MOE_EVENT_NONE && wait) return false;
        if (event.kind != MOE_EVENT_MESSAGE) continue;
        memcpy(&value, event.frames[0].data, sizeof value);
        if (value != taken || event.frames[0].size != size_of(taken)) return false;
        taken++;
        peer = event.peer;
    }
    return true;
}

/* Closes the transport, which lingers until the client has taken all: what does not fit the ring waits in this process. */
static void *many_server(void *transport) {
    static char good;
    moe_transport *t = transport;
    unsigned char *data = calloc(1, MOE_SHM_RING_BYTES);
    bool came = data && exchange_many(t, 0, data);
    free(data);
    t->ops->close(t);
    return came ? &good : NULL;
}

/* Both ways at once, between threads whose polls sleep, with limits so small that both queues are full at times. */
static void test_many_both_ways(void **state) {
    world *w = *state;
    unsigned char *data = calloc(1, MOE_SHM_RING_BYTES);
    assert_non_null(data);
    for (int polling = 0; polling < 2; polling++) {
        moe_shm_config config = {
            .linger_ms = 20000, .poll_ns = polling ? MOE_NS_PER_MS : 0, .max_queued_bytes = MOE_SHM_RING_BYTES};
        char endpoint[MOE_ENDPOINT_BYTES + 8];
        snprintf(endpoint, sizeof endpoint, "%s-%d", w->endpoint, polling);
        moe_transport *server = open_with(config), *client = open_with(config);
        assert_int_equal(server->ops->listen(server, endpoint, NULL, NULL), MOE_OK);
        pthread_t thread;
        assert_int_equal(pthread_create(&thread, NULL, many_server, server), 0);
        uint64_t link;
        assert_int_equal(client->ops->connect(client, endpoint, &link, NULL), MOE_OK);
        moe_peer peer = await(client, NULL, MOE_EVENT_PEER_UP).peer;
        assert_true(exchange_many(client, peer, data));
        client->ops->close(client); /* lingers until the server has taken all */
        void *good;
        pthread_join(thread, &good);
        assert_non_null(good);
    }
    free(data);
}

/* ---- processes that die ---- */

/* A child that is killed while the larger part of its message is still in its memory: what came is no message. */
static void test_killed_in_mid_message(void **state) {
    world *w = *state;
    size_t bytes = (size_t)8 * MOE_SHM_RING_BYTES;
    char *data = calloc(1, bytes);
    assert_non_null(data);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        moe_transport *t = open_with((moe_shm_config){.linger_ms = 100});
        uint64_t link;
        if (t->ops->connect(t, w->endpoint, &link, NULL) != MOE_OK) _exit(1);
        for (;;) {
            moe_event event = poll_once(t, now() + WAIT_NS);
            if (event.kind == MOE_EVENT_NONE) _exit(1);
            const moe_frame whole = {"whole", 5}, large = {data, bytes};
            if (event.kind != MOE_EVENT_PEER_UP) continue;
            t->ops->send(t, event.peer, &whole, 1, NULL);
            t->ops->send(t, event.peer, &large, 1, NULL);
            kill(getpid(), SIGKILL);
        }
    }
    moe_event event = await(w->server, NULL, MOE_EVENT_MESSAGE);
    moe_peer peer = event.peer;
    assert_int_equal(event.frames[0].size, 5);
    assert_int_equal(await(w->server, NULL, MOE_EVENT_PEER_DOWN).peer, peer);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    free(data);
}

/* ---- peers that are none of ours ---- */

static int raw_socket(const world *w) {
    struct sockaddr_un address;
    moe_error err;
    assert_int_equal(moe_shm_parse_endpoint(w->endpoint, &address, &err), MOE_OK);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

/* The server hangs up, without an event. */
static void assert_turned_away(world *w, int fd) {
    char byte[64];
    int64_t until_ns = now() + WAIT_NS;
    ssize_t got = -1;
    while (got < 0 && now() < until_ns) {
        assert_int_equal(poll_once(w->server, now() + MOE_NS_PER_MS).kind, MOE_EVENT_NONE);
        got = recv(fd, byte, sizeof byte, MSG_DONTWAIT);
    }
    assert_int_equal(got, 0);
    close(fd);
}

static int memory_of(off_t bytes, int seals) {
    int memory = memfd_create("test", MFD_ALLOW_SEALING | MFD_CLOEXEC);
    assert_true(memory >= 0);
    assert_int_equal(ftruncate(memory, bytes), 0);
    if (seals) assert_int_equal(fcntl(memory, F_ADD_SEALS, seals), 0);
    return memory;
}

static void greet_with(world *w, int memory) {
    int fd = raw_socket(w);
    assert_true(moe_shm_greet(fd, memory));
    if (memory >= 0) close(memory);
    assert_turned_away(w, fd);
}

static void test_bad_greetings(void **state) {
    world *w = *state;
    int fd = raw_socket(w);
    assert_int_equal(send(fd, "hello", 5, 0), 5);
    assert_turned_away(w, fd);
    close(raw_socket(w)); /* says nothing, and goes */
    greet_with(w, -1);
    greet_with(w, memory_of((off_t)MOE_SHM_MAP_BYTES, 0));
    greet_with(w, memory_of((off_t)MOE_SHM_MAP_BYTES, F_SEAL_GROW));
    greet_with(w, memory_of((off_t)MOE_SHM_MAP_BYTES - 4096, F_SEAL_SHRINK | F_SEAL_GROW));
    greet_with(w, memory_of(0, F_SEAL_SHRINK | F_SEAL_GROW));
    int plain = open("/dev/null", O_RDWR | O_CLOEXEC);
    greet_with(w, plain);
    connect_client(w);
}

/* A peer that has greeted properly; its memory is ours to spoil. */
static int raw_peer(world *w, shm_channel *channel) {
    static const shm_limits limits = {MOE_MAX_MESSAGE_BYTES, MOE_MAX_PEER_QUEUED_BYTES};
    void *map;
    int fd = raw_socket(w), memory = moe_shm_memory_new(&map), none;
    assert_true(memory >= 0 && moe_shm_greet(fd, memory));
    close(memory);
    int64_t until_ns = now() + WAIT_NS;
    shm_greeting answer = GREETING_NONE;
    while (answer == GREETING_NONE && now() < until_ns) {
        assert_int_equal(poll_once(w->server, now() + MOE_NS_PER_MS).kind, MOE_EVENT_NONE);
        answer = moe_shm_read_greeting(fd, &none);
    }
    assert_int_equal(answer, GREETING_GOOD);
    moe_shm_channel_init(channel, &limits, fd, map, true);
    const moe_frame hello = {"hello", 5};
    assert_int_equal(moe_shm_channel_send(channel, &hello, 1, NULL), MOE_OK);
    await(w->server, NULL, MOE_EVENT_MESSAGE);
    return fd;
}

enum { HEAD_FAR, HEAD_BACK, HEAD_ODD, TAIL_FAR, NO_MAGIC, NO_FRAMES, MANY_FRAMES, HUGE_FRAME, HUGE_SUM, SPOILS };

/* Writes nonsense and wakes the server, which must drop the peer: PEER_DOWN, counted, and no event before. */
static void spoil(world *w, int how) {
    static const uint32_t headers[][16] = {[NO_MAGIC] = {1, 1, 5},
                                           [NO_FRAMES] = {0x4d53484d, 0},
                                           [MANY_FRAMES] = {0x4d53484d, MOE_MAX_FRAMES + 1},
                                           [HUGE_FRAME] = {0x4d53484d, 1, MOE_MAX_MESSAGE_BYTES + 1},
                                           [HUGE_SUM] = {0x4d53484d, 5, 1 << 28, 1 << 28, 1 << 28, 1 << 28, 1 << 28}};
    shm_channel c;
    int64_t bad = moe_metric_value(MOE_METRIC_BAD_MESSAGES);
    int fd = raw_peer(w, &c);
    uint64_t head = atomic_load(&c.out.words->head);
    if (how == HEAD_FAR) head += MOE_SHM_RING_BYTES + MOE_SHM_LINE_BYTES;
    if (how == HEAD_BACK) head -= MOE_SHM_LINE_BYTES;
    if (how == HEAD_ODD) head += 1;
    if (how == TAIL_FAR) atomic_store(&c.in.words->tail, 1 << 20);
    if (how >= NO_MAGIC) moe_shm_ring_write(&c.out, headers[how], sizeof headers[how]);
    if (how >= NO_MAGIC) head = c.out.own;
    atomic_store(&c.out.words->head, head);
    if (how == TAIL_FAR) { /* seen when the server next asks for room */
        shm_transport *t = (shm_transport *)w->server;
        moe_peer number = t->peers[t->cursor]->number;
        const moe_frame frame = {"x", 1};
        assert_int_equal(w->server->ops->send(w->server, number, &frame, 1, NULL), MOE_OK);
    }
    assert_int_equal(send(fd, "", 1, MSG_NOSIGNAL), 1);
    await(w->server, NULL, MOE_EVENT_PEER_DOWN);
    assert_int_equal(moe_metric_value(MOE_METRIC_BAD_MESSAGES), bad + 1);
    assert_turned_away(w, fd);
    munmap((void *)c.out.words, MOE_SHM_MAP_BYTES);
    moe_shm_channel_close(&c);
}

static void test_nonsense(void **state) {
    world *w = *state;
    for (int how = 0; how < SPOILS; how++) spoil(w, how);
    connect_client(w);
    unsigned char data[64];
    send_through(w, data, sizeof data);
}

/* ---- limits ---- */

static void test_accepted_limit(void **state) {
    world *w = *state;
    char endpoint[MOE_ENDPOINT_BYTES + 8];
    snprintf(endpoint, sizeof endpoint, "%s-small", w->endpoint);
    moe_transport *small = open_with((moe_shm_config){.max_accepted = 1});
    assert_int_equal(small->ops->listen(small, endpoint, NULL, NULL), MOE_OK);
    uint64_t first, second;
    w->client = open_with((moe_shm_config){.linger_ms = 0});
    assert_int_equal(w->client->ops->connect(w->client, endpoint, &first, NULL), MOE_OK);
    assert_int_equal(await(w->client, small, MOE_EVENT_PEER_UP).link, first);
    assert_int_equal(w->client->ops->connect(w->client, endpoint, &second, NULL), MOE_OK);
    int64_t until_ns = now() + 200 * MOE_NS_PER_MS;
    while (now() < until_ns) {
        assert_int_equal(poll_once(w->client, now() + MOE_NS_PER_MS).kind, MOE_EVENT_NONE);
        assert_int_equal(poll_once(small, 0).kind, MOE_EVENT_NONE);
    }
    w->client->ops->disconnect(w->client, first);
    assert_int_equal(await(w->client, small, MOE_EVENT_PEER_UP).link, second);
    small->ops->close(small);
}

/* A frame beyond the receiver's limit ends the connection; it must not vanish without a sign. */
static void test_receiver_limit(void **state) {
    world *w = *state;
    char endpoint[MOE_ENDPOINT_BYTES + 8];
    snprintf(endpoint, sizeof endpoint, "%s-small", w->endpoint);
    moe_transport *small = open_with((moe_shm_config){.max_message_bytes = 1000});
    assert_int_equal(small->ops->listen(small, endpoint, NULL, NULL), MOE_OK);
    w->client = open_with((moe_shm_config){.linger_ms = 0});
    assert_int_equal(w->client->ops->connect(w->client, endpoint, &w->link, NULL), MOE_OK);
    moe_peer peer = await(w->client, small, MOE_EVENT_PEER_UP).peer;
    static const char data[1001];
    const moe_frame fits = {data, 1000}, large = {data, 1001};
    assert_int_equal(w->client->ops->send(w->client, peer, &fits, 1, NULL), MOE_OK);
    assert_int_equal(w->client->ops->send(w->client, peer, &large, 1, NULL), MOE_OK);
    moe_peer back = await(small, NULL, MOE_EVENT_MESSAGE).peer;
    assert_int_equal(small->ops->send(small, back, &large, 1, NULL), MOE_INVALID_ARGUMENT);
    assert_int_equal(await(small, NULL, MOE_EVENT_PEER_DOWN).peer, back);
    assert_int_equal(await(w->client, small, MOE_EVENT_PEER_DOWN).peer, peer);
    assert_true(await(w->client, small, MOE_EVENT_PEER_UP).peer != peer);
    small->ops->close(small);
}

/* Each allocation fails in turn: an error each time, and nothing lost but the call. */
static void test_out_of_memory(void **state) {
    world *w = *state;
    moe_transport *t;
    moe_event event;
    const moe_shm_config config = {.clock = moe_clock_real()};
    moe_alloc_fail_after(1);
    assert_int_equal(moe_shm_open(&config, &t, NULL), MOE_RESOURCE_EXHAUSTED);
    connect_client(w);
    moe_alloc_fail_after(1);
    assert_int_equal(w->client->ops->connect(w->client, w->endpoint, &w->link, NULL), MOE_RESOURCE_EXHAUSTED);
    static const char large[MOE_SHM_RING_BYTES];
    const moe_frame small = {"small", 5}, queued = {large, sizeof large};
    moe_alloc_fail_after(1);
    assert_int_equal(w->client->ops->send(w->client, w->to_server, &queued, 1, NULL), MOE_RESOURCE_EXHAUSTED);
    moe_alloc_fail_after(0);
    assert_int_equal(w->client->ops->send(w->client, w->to_server, &small, 1, NULL), MOE_OK);
    moe_alloc_fail_after(1);
    assert_int_equal(w->server->ops->poll(w->server, now() + WAIT_NS, &event, NULL), MOE_RESOURCE_EXHAUSTED);
    moe_alloc_fail_after(0);
    event = await(w->server, NULL, MOE_EVENT_MESSAGE);
    assert_int_equal(event.frames[0].size, 5);
    assert_memory_equal(event.frames[0].data, "small", 5);
}

/* An event's frames live until the next poll, also when their connection ends before. */
static void test_frames_outlive_disconnect(void **state) {
    world *w = *state;
    connect_client(w);
    const moe_frame hello = {"hello", 5}, answer = {"answer", 6};
    assert_int_equal(w->client->ops->send(w->client, w->to_server, &hello, 1, NULL), MOE_OK);
    moe_peer back = await(w->server, w->client, MOE_EVENT_MESSAGE).peer;
    assert_int_equal(w->server->ops->send(w->server, back, &answer, 1, NULL), MOE_OK);
    moe_event event = await(w->client, NULL, MOE_EVENT_MESSAGE);
    w->client->ops->disconnect(w->client, w->link);
    assert_memory_equal(event.frames[0].data, "answer", 6);
}

static void test_socket_file(void **state) {
    world *w = *state;
    struct stat file;
    assert_int_equal(stat(w->path, &file), 0);
    assert_true(S_ISSOCK(file.st_mode));
    assert_int_equal(file.st_mode & 0077, 0);
    w->server->ops->close(w->server);
    assert_int_not_equal(stat(w->path, &file), 0);

    /* left behind by a process that died */
    struct sockaddr_un address;
    moe_error err;
    assert_int_equal(moe_shm_parse_endpoint(w->endpoint, &address, &err), MOE_OK);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    close(fd);
    w->server = open_with((moe_shm_config){.linger_ms = 0});
    assert_int_equal(w->server->ops->listen(w->server, w->endpoint, NULL, &err), MOE_OK);
    connect_client(w);

    /* no socket: not ours to remove */
    char plain[MOE_ENDPOINT_BYTES + 8], endpoint[MOE_ENDPOINT_BYTES + 16];
    snprintf(plain, sizeof plain, "%s-plain", w->path);
    snprintf(endpoint, sizeof endpoint, "shm:%s", plain);
    fd = open(plain, O_CREAT | O_WRONLY | O_EXCL, 0600);
    assert_true(fd >= 0);
    close(fd);
    moe_transport *t = open_with((moe_shm_config){.linger_ms = 0});
    assert_int_equal(t->ops->listen(t, endpoint, NULL, &err), MOE_ALREADY_EXISTS);
    assert_int_equal(stat(plain, &file), 0);
    assert_int_equal(t->ops->listen(t, "shm:relative", NULL, &err), MOE_INVALID_ARGUMENT);
    assert_int_equal(t->ops->listen(t, "shm:/no/such/folder/s", NULL, &err), MOE_UNAVAILABLE);
    t->ops->close(t);
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void) {
    moe_log_init(MOE_LOG_OFF, "test");
    const struct CMUnitTest tests[] = {
        CASE(test_sizes),         CASE(test_many_both_ways),   CASE(test_killed_in_mid_message),
        CASE(test_bad_greetings), CASE(test_nonsense),         CASE(test_accepted_limit),
        CASE(test_receiver_limit), CASE(test_out_of_memory),   CASE(test_frames_outlive_disconnect),
        CASE(test_socket_file),
    };
    return cmocka_run_group_tests_name("shared memory", tests, NULL, NULL);
}
