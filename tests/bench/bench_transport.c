/* Echo round trips over each transport: p50 and p99 in microseconds, and payload bytes per second both ways together.
 *
 * inproc: two threads; shm, and zmq over ipc and over tcp with CURVE on the loopback: two processes. One message in flight: a header frame
 * of 64 bytes and a payload frame. Then exchanges: one message to each of N workers in processes of their own, until all have
 * answered: what a layer costs beside its computation. Usage: bench_transport [ROUND_TRIPS [WORKERS [SENT RECEIVED]]], by default
 * 4000 (fewer for large payloads), 2 workers, and the bytes of a layer of the demo model: 1024 sent to each (one row), 1024
 * received from each (one expert's row). */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/inproc/inproc.h"
#include "common/shm/shm_transport.h"
#include "common/zmq/zmq_transport.h"

#define DEFAULT_ROUND_TRIPS 4000
#define MAX_ROUND_TRIPS 1000000
#define WARM_UP_ROUND_TRIPS 200
#define LARGE_BYTES (64 * 1024) /* payloads from here on get a tenth of the round trips */
#define HEADER_BYTES 64
#define MAX_WORKERS 64
#define DEFAULT_WORKERS 2
#define DEFAULT_ROW_BYTES 1024
#define SILENCE_NS (30 * MOE_NS_PER_S)

static const size_t payload_bytes[] = {512, 4096, 65536, 1 << 20};
#define NUM_PAYLOADS (sizeof payload_bytes / sizeof payload_bytes[0])

static _Noreturn void die(const char *what, const char *why) {
    fprintf(stderr, "bench_transport: %s: %s\n", what, why);
    exit(1);
}

static void check(moe_status status, const char *what, const moe_error *err) {
    if (status != MOE_OK) die(what, err->message);
}

/* Waits for the next event of that kind; others are passed over. */
static void await(moe_transport *t, moe_event_kind kind, moe_event *event) {
    moe_error err;
    do {
        check(t->ops->poll(t, moe_now_ns(moe_clock_real()) + SILENCE_NS, event, &err), "poll", &err);
        if (event->kind == MOE_EVENT_NONE) die("poll", "the other side is silent");
    } while (event->kind != kind);
}

/* Answers with the header and `bytes` of payload (0: with what came) until a message of one frame comes. */
static void answer(moe_transport *t, size_t bytes) {
    char *payload = calloc(1, bytes + 1);
    if (!payload) die("echo", "out of memory");
    for (;;) {
        moe_event event;
        moe_error err;
        await(t, MOE_EVENT_MESSAGE, &event);
        if (event.num_frames == 1) break;
        if (bytes) event.frames[1] = (moe_frame){payload, bytes};
        check(t->ops->send(t, event.peer, event.frames, event.num_frames, &err), "echo", &err);
    }
    free(payload);
}

static void *echo(void *transport) {
    answer(transport, 0);
    return NULL;
}

static int by_value(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void measure(const char *name, moe_transport *t, moe_peer peer, size_t bytes, int round_trips) {
    char header[HEADER_BYTES] = {0};
    char *payload = calloc(1, bytes);
    int64_t *times_ns = calloc((size_t)round_trips, sizeof *times_ns), total_ns = 0;
    if (!payload || !times_ns) die(name, "out of memory");
    const moe_frame frames[2] = {{header, sizeof header}, {payload, bytes}};
    for (int i = -WARM_UP_ROUND_TRIPS; i < round_trips; i++) {
        moe_event event;
        moe_error err;
        int64_t start_ns = moe_now_ns(moe_clock_real());
        check(t->ops->send(t, peer, frames, 2, &err), "send", &err);
        await(t, MOE_EVENT_MESSAGE, &event);
        if (event.num_frames != 2 || event.frames[1].size != bytes) die(name, "the echo is not what was sent");
        if (i >= 0) total_ns += times_ns[i] = moe_now_ns(moe_clock_real()) - start_ns;
    }
    qsort(times_ns, (size_t)round_trips, sizeof *times_ns, by_value);
    printf("%-10s %9zu %8d %10.1f %10.1f %10.1f\n", name, bytes, round_trips, (double)times_ns[round_trips / 2] / 1e3,
           (double)times_ns[(int64_t)round_trips * 99 / 100] / 1e3, 2e3 * (double)bytes * round_trips / (double)total_ns);
    fflush(stdout);
    free(payload);
    free(times_ns);
}

/* Connects, measures every size, and tells the echo to end. */
static void measure_all(const char *name, moe_transport *t, const char *endpoint, int round_trips) {
    moe_error err;
    moe_event event;
    uint64_t link;
    check(t->ops->connect(t, endpoint, &link, &err), "connect", &err);
    await(t, MOE_EVENT_PEER_UP, &event);
    moe_peer peer = event.peer;
    for (size_t i = 0; i < NUM_PAYLOADS; i++) {
        int count = payload_bytes[i] >= LARGE_BYTES ? (round_trips + 9) / 10 : round_trips;
        measure(name, t, peer, payload_bytes[i], count);
    }
    const moe_frame end = {"end", 3};
    check(t->ops->send(t, peer, &end, 1, &err), "send", &err);
}

static void bench_inproc(int round_trips) {
    moe_error err;
    moe_inproc_hub *hub;
    moe_transport *server, *client;
    pthread_t thread;
    check(moe_inproc_hub_new(moe_clock_real(), 1, &hub, &err), "hub", &err);
    check(moe_inproc_open(hub, &server, &err), "open", &err);
    check(moe_inproc_open(hub, &client, &err), "open", &err);
    check(server->ops->listen(server, "inproc:echo", NULL, &err), "listen", &err);
    if (pthread_create(&thread, NULL, echo, server) != 0) die("inproc", "no thread");
    measure_all("inproc", client, "inproc:echo", round_trips);
    pthread_join(thread, NULL);
    client->ops->close(client);
    server->ops->close(server);
    moe_inproc_hub_free(&hub);
}

/* For an endpoint. The side that asks polls as a router does by itself; the one that answers as a worker on few cores: not at all. */
static moe_transport *open_for(const char *endpoint, const moe_curve_keys *keys, int64_t poll_us) {
    moe_error err;
    moe_transport *t;
    const moe_shm_config shm = {.clock = moe_clock_real(), .linger_ms = 1000, .poll_ns = poll_us * MOE_NS_PER_US};
    if (strncmp(endpoint, "shm:", 4) == 0) {
        check(moe_shm_open(&shm, &t, &err), "open", &err);
        return t;
    }
    const moe_zmq_config config = {
        .clock = moe_clock_real(), .keys = keys, .linger_ms = 1000, .poll_ns = poll_us * MOE_NS_PER_US};
    check(moe_zmq_open(&config, &t, &err), "open", &err);
    return t;
}

static _Noreturn void echo_process(const char *endpoint, const moe_curve_keys *keys, size_t bytes, int out) {
    moe_error err;
    char bound[MOE_ENDPOINT_BYTES] = "";
    moe_transport *t = open_for(endpoint, keys, 0);
    check(t->ops->listen(t, endpoint, bound, &err), "listen", &err);
    if (write(out, bound, sizeof bound) != sizeof bound) die("echo", "the parent is gone");
    answer(t, bytes);
    t->ops->close(t);
    _exit(0);
}

/* A process that answers at `endpoint`; `bound` receives where. */
static pid_t start_echo(const char *endpoint, const moe_curve_keys *keys, size_t bytes, char bound[MOE_ENDPOINT_BYTES]) {
    int ends[2];
    if (pipe(ends) != 0) die(endpoint, "no pipe");
    pid_t pid = fork();
    if (pid < 0) die(endpoint, "cannot fork");
    if (pid == 0) echo_process(endpoint, keys, bytes, ends[1]);
    close(ends[1]);
    if (read(ends[0], bound, MOE_ENDPOINT_BYTES) != MOE_ENDPOINT_BYTES) die(endpoint, "the echo process did not start");
    close(ends[0]);
    return pid;
}

static void await_exit(pid_t pid) {
    int status;
    if (waitpid(pid, &status, 0) != pid || status != 0) die("echo", "its process failed");
}

static void bench_processes(const char *name, const char *endpoint, const moe_curve_keys *server, const moe_curve_keys *client,
                      int round_trips) {
    char bound[MOE_ENDPOINT_BYTES];
    pid_t pid = start_echo(endpoint, server, 0, bound);
    moe_transport *t = open_for(endpoint, client, MOE_ZMQ_POLL_US);
    measure_all(name, t, bound, round_trips);
    t->ops->close(t);
    await_exit(pid);
}

/* ---- exchanges ---- */

typedef struct exchange {
    int workers, round_trips;
    size_t sent, received; /* payload bytes to and from each worker */
} exchange;

static int64_t exchange_once(moe_transport *t, const moe_peer *peers, const exchange *x, const moe_frame frames[2]) {
    moe_error err;
    moe_event event;
    int64_t start_ns = moe_now_ns(moe_clock_real());
    for (int w = 0; w < x->workers; w++) check(t->ops->send(t, peers[w], frames, 2, &err), "send", &err);
    for (int w = 0; w < x->workers; w++) {
        await(t, MOE_EVENT_MESSAGE, &event);
        if (event.num_frames != 2 || event.frames[1].size != x->received) die("exchange", "the answer is not what was asked for");
    }
    return moe_now_ns(moe_clock_real()) - start_ns;
}

static void measure_exchange(const char *name, moe_transport *t, const moe_peer *peers, const exchange *x) {
    char header[HEADER_BYTES] = {0}, *payload = calloc(1, x->sent + 1);
    int64_t *times_ns = calloc((size_t)x->round_trips, sizeof *times_ns);
    if (!payload || !times_ns) die(name, "out of memory");
    const moe_frame frames[2] = {{header, sizeof header}, {payload, x->sent}}, end = {"end", 3};
    for (int i = -WARM_UP_ROUND_TRIPS; i < x->round_trips; i++) {
        int64_t took_ns = exchange_once(t, peers, x, frames);
        if (i >= 0) times_ns[i] = took_ns;
    }
    qsort(times_ns, (size_t)x->round_trips, sizeof *times_ns, by_value);
    printf("%-10s %9d %9zu %9zu %10.1f %10.1f\n", name, x->workers, x->sent, x->received,
           (double)times_ns[x->round_trips / 2] / 1e3, (double)times_ns[(int64_t)x->round_trips * 99 / 100] / 1e3);
    fflush(stdout);
    moe_error err;
    for (int w = 0; w < x->workers; w++) check(t->ops->send(t, peers[w], &end, 1, &err), "send", &err);
    free(payload);
    free(times_ns);
}

/* Where the endpoint is a file the worker's number is put behind `endpoint`. */
static void bench_exchange(const char *name, const char *endpoint, const moe_curve_keys *server, const moe_curve_keys *client,
                           const exchange *x) {
    pid_t pids[MAX_WORKERS];
    moe_peer peers[MAX_WORKERS];
    char bound[MAX_WORKERS][MOE_ENDPOINT_BYTES];
    for (int w = 0; w < x->workers; w++) {
        char own[MOE_ENDPOINT_BYTES];
        if (strncmp(endpoint, "tcp:", 4) == 0)
            snprintf(own, sizeof own, "%s", endpoint);
        else
            snprintf(own, sizeof own, "%.200s%d", endpoint, w);
        pids[w] = start_echo(own, server, x->received, bound[w]);
    }
    moe_transport *t = open_for(endpoint, client, MOE_ZMQ_POLL_US);
    for (int w = 0; w < x->workers; w++) {
        moe_error err;
        moe_event event;
        uint64_t link;
        check(t->ops->connect(t, bound[w], &link, &err), "connect", &err);
        await(t, MOE_EVENT_PEER_UP, &event);
        peers[w] = event.peer;
    }
    measure_exchange(name, t, peers, x);
    t->ops->close(t);
    for (int w = 0; w < x->workers; w++) await_exit(pids[w]);
}

int main(int argc, char **argv) {
    int round_trips = argc > 1 ? atoi(argv[1]) : DEFAULT_ROUND_TRIPS;
    if (round_trips < 1 || round_trips > MAX_ROUND_TRIPS) die("ROUND_TRIPS", "1 to 1000000");
    exchange x = {.round_trips = round_trips, .sent = DEFAULT_ROW_BYTES, .received = DEFAULT_ROW_BYTES};
    x.workers = argc > 2 ? atoi(argv[2]) : DEFAULT_WORKERS;
    if (x.workers < 1 || x.workers > MAX_WORKERS) die("WORKERS", "1 to 64");
    if (argc > 4) {
        x.sent = strtoul(argv[3], NULL, 10);
        x.received = strtoul(argv[4], NULL, 10);
    }
    printf("%-10s %9s %8s %10s %10s %10s\n", "transport", "bytes", "trips", "p50 us", "p99 us", "MB/s");
    bench_inproc(round_trips);

    char folder[] = "/tmp/moe-bench-XXXXXX", endpoint[MOE_ENDPOINT_BYTES], shm[MOE_ENDPOINT_BYTES];
    if (!mkdtemp(folder)) die("mkdtemp", "cannot make a folder");
    snprintf(shm, sizeof shm, "shm:%s/shm.sock", folder);
    bench_processes("shm", shm, NULL, NULL, round_trips);
    snprintf(endpoint, sizeof endpoint, "ipc://%s/echo.sock", folder);
    bench_processes("ipc", endpoint, NULL, NULL, round_trips);

    moe_error err;
    moe_curve_keys worker = {.public_key = ""}, router = {.public_key = ""};
    check(moe_curve_keypair(worker.public_key, worker.secret_key, &err), "keys", &err);
    check(moe_curve_keypair(router.public_key, router.secret_key, &err), "keys", &err);
    memcpy(worker.role_keys[MOE_ROLE_ROUTER], router.public_key, MOE_CURVE_KEY_BYTES);
    memcpy(router.role_keys[MOE_ROLE_WORKER], worker.public_key, MOE_CURVE_KEY_BYTES);
    bench_processes("tcp+curve", "tcp://127.0.0.1:0", &worker, &router, round_trips);

    printf("\n%-10s %9s %9s %9s %10s %10s\n", "exchange", "workers", "sent", "received", "p50 us", "p99 us");
    bench_exchange("shm", shm, NULL, NULL, &x);
    bench_exchange("ipc", endpoint, NULL, NULL, &x);
    bench_exchange("tcp+curve", "tcp://127.0.0.1:0", &worker, &router, &x);
    rmdir(folder);
    return 0;
}
