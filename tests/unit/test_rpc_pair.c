/* Processes that call each other over the inproc transport: whole conversations, restarts, faults, threads. */
/* clang-format off */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
/* clang-format on */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/inproc/inproc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "common/random.h"
#include "common/shm/shm_transport.h"
#include "common/zmq/zmq_transport.h"
#include "proto/rpc.h"
#include "tests/support/temp_dir.h"

#define CHECK "/moesaic.v1.Health/Check"
#define TOKENIZE "/moesaic.v1.InferenceService/Tokenize"
#define GENERATE "/moesaic.v1.InferenceService/Generate"
#define ENDPOINT "inproc:server"
#define MAX_HELD 64
#define MAX_ROUNDS 200000 /* of stepping until something holds */

typedef struct node {
    moe_transport *transport;
    moe_rpc *rpc;
    uint64_t link;
    int ups, downs, requests, cancels;
    moe_rpc_call *held[MAX_HELD];
    int num_held;
    uint64_t progress;
    const char *refuse;
} node;

typedef struct world {
    moe_clock clock;
    moe_inproc_hub *hub;
    bool shm; /* where there is no hub: shared memory, else zmq */
    node server, client;
} world;

typedef struct outcome {
    int replies, ends; /* callbacks, and those that were the last */
    moe_status status;
    uint32_t tokens[64];
    int num_tokens;
    bool wrong_payload;
    uint64_t id;
} outcome;

static uint64_t progress_of(void *ctx) { return ++((node *)ctx)->progress; }

static moe_status on_up(void *ctx, const moe_rpc_peer *peer, moe_error *err) {
    (void)peer;
    node *n = ctx;
    if (n->refuse) return moe_fail(err, MOE_FAILED_PRECONDITION, "%s", n->refuse);
    n->ups++;
    return MOE_OK;
}

static void on_down(void *ctx, const moe_rpc_peer *peer) {
    (void)peer;
    ((node *)ctx)->downs++;
}

static void on_cancel(moe_rpc_call *call) {
    node *n = call->owner;
    n->cancels++;
    for (int i = 0; i < n->num_held; i++)
        if (n->held[i] == call) n->held[i] = n->held[--n->num_held];
    moe_rpc_fail(call, MOE_CANCELLED, "cancelled", NULL);
}

static void hold(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)request, (void)payload, (void)num_payload;
    node *n = ctx;
    n->requests++;
    assert_in_range(n->num_held, 0, MAX_HELD - 1);
    n->held[n->num_held++] = call;
    call->owner = n;
    call->on_cancel = on_cancel;
}

/* Answers with the text's bytes as tokens, and with the payload frames as they came, in reverse order. */
static void echo(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    node *n = ctx;
    n->requests++;
    const Moesaic__V1__TokenizeRequest *in = (const Moesaic__V1__TokenizeRequest *)request;
    uint32_t tokens[64];
    moe_frame back[MOE_MAX_FRAMES];
    Moesaic__V1__TokenizeResponse out = MOESAIC__V1__TOKENIZE_RESPONSE__INIT;
    for (; in->text[out.n_token_ids] && out.n_token_ids < 64; out.n_token_ids++)
        tokens[out.n_token_ids] = (unsigned char)in->text[out.n_token_ids];
    out.token_ids = tokens;
    for (int i = 0; i < num_payload; i++) back[i] = payload[num_payload - 1 - i];
    moe_rpc_respond(call, (ProtobufCMessage *)&out, back, num_payload);
}

static void generate(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)payload, (void)num_payload;
    ((node *)ctx)->requests++;
    const Moesaic__V1__GenerateRequest *in = (const Moesaic__V1__GenerateRequest *)request;
    Moesaic__V1__GenerateResponse item = MOESAIC__V1__GENERATE_RESPONSE__INIT;
    for (size_t i = 0; i < in->n_prompt_token_ids; i++) {
        item.n_token_ids = 1, item.token_ids = &in->prompt_token_ids[i];
        moe_rpc_stream(call, (ProtobufCMessage *)&item);
    }
    item.n_token_ids = 0, item.finish_reason = (char *)"stop";
    moe_rpc_respond(call, (ProtobufCMessage *)&item, NULL, 0);
}

static const moe_rpc_method methods[] = {{CHECK, hold, 0}, {TOKENIZE, echo, 0}, {GENERATE, generate, 0}, {0}};

static void node_open(world *w, node *n, const moe_clock *clock, const char *id, uint64_t incarnation) {
    if (w->hub)
        assert_int_equal(moe_inproc_open(w->hub, &n->transport, NULL), MOE_OK);
    else if (w->shm)
        assert_int_equal(moe_shm_open(&(moe_shm_config){.clock = clock}, &n->transport, NULL), MOE_OK);
    else
        assert_int_equal(moe_zmq_open(&(moe_zmq_config){.clock = clock}, &n->transport, NULL), MOE_OK);
    moe_rpc_config config = {.transport = n->transport,
                             .clock = clock,
                             .hello = {.cluster_uuid = "c", .role = "x", .id = id, .profile = "", .incarnation = incarnation},
                             .methods = methods,
                             .ctx = n,
                             .progress = progress_of,
                             .on_peer_up = on_up,
                             .on_peer_down = on_down};
    assert_int_equal(moe_rpc_new(&config, &n->rpc, NULL), MOE_OK);
}

static void node_close(node *n) {
    moe_rpc_free(&n->rpc);
    if (n->transport) n->transport->ops->close(n->transport);
    *n = (node){0};
}

static void listen_at(node *n, const char *endpoint) {
    char bound[MOE_ENDPOINT_BYTES];
    assert_int_equal(n->transport->ops->listen(n->transport, endpoint, bound, NULL), MOE_OK);
}

static int setup(void **state) {
    world *w = calloc(1, sizeof *w);
    if (!w) return 1;
    w->clock = moe_clock_fake(MOE_NS_PER_S);
    *state = w;
    assert_int_equal(moe_inproc_hub_new(&w->clock, 42, &w->hub, NULL), MOE_OK);
    node_open(w, &w->server, &w->clock, "server", 1001);
    node_open(w, &w->client, &w->clock, "client", 2001);
    listen_at(&w->server, ENDPOINT);
    assert_int_equal(moe_rpc_connect(w->client.rpc, ENDPOINT, &w->client.link, NULL), MOE_OK);
    return 0;
}

static int teardown(void **state) {
    world *w = *state;
    node_close(&w->client);
    node_close(&w->server);
    moe_inproc_hub_free(&w->hub);
    free(w);
    return 0;
}

static void step_all(world *w) {
    if (w->server.rpc) assert_int_equal(moe_rpc_step(w->server.rpc, 0, NULL), MOE_OK);
    if (w->client.rpc) assert_int_equal(moe_rpc_step(w->client.rpc, 0, NULL), MOE_OK);
}

static int64_t earlier(int64_t a, int64_t b) { return a < b ? a : b; }

/* Lets time pass until until_ns, from one event to the next. */
static void run_until(world *w, int64_t until_ns) {
    for (int round = 0; round < MAX_ROUNDS; round++) {
        step_all(w);
        int64_t next_ns = earlier(until_ns, moe_inproc_next_due_ns(w->hub));
        if (w->server.rpc) next_ns = earlier(next_ns, moe_rpc_next_deadline_ns(w->server.rpc));
        if (w->client.rpc) next_ns = earlier(next_ns, moe_rpc_next_deadline_ns(w->client.rpc));
        if (next_ns > w->clock.fake_now_ns)
            w->clock.fake_now_ns = next_ns;
        else if (w->clock.fake_now_ns >= until_ns)
            return;
    }
    fail_msg("the world does not come to rest");
}

static void run_for(world *w, int64_t ns) { run_until(w, w->clock.fake_now_ns + ns); }

static moe_peer server_peer(const world *w) {
    const moe_rpc_peer *peer = moe_rpc_peer_of_link(w->client.rpc, w->client.link);
    return peer ? peer->peer : 0;
}

static void on_reply(void *ctx, const moe_rpc_reply *reply) {
    outcome *o = ctx;
    o->replies++;
    o->ends += reply->last;
    o->status = reply->status;
    if (!reply->body) return;
    if (reply->body->descriptor == &moesaic__v1__generate_response__descriptor) {
        const Moesaic__V1__GenerateResponse *item = (const Moesaic__V1__GenerateResponse *)reply->body;
        for (size_t i = 0; i < item->n_token_ids && o->num_tokens < 64; i++) o->tokens[o->num_tokens++] = item->token_ids[i];
    }
    if (reply->body->descriptor == &moesaic__v1__tokenize_response__descriptor) {
        const Moesaic__V1__TokenizeResponse *body = (const Moesaic__V1__TokenizeResponse *)reply->body;
        for (size_t i = 0; i < body->n_token_ids && o->num_tokens < 64; i++) o->tokens[o->num_tokens++] = body->token_ids[i];
        o->wrong_payload = reply->num_payload != 2 || reply->payload[1].size != 3 || reply->payload[0].size != 1000 ||
                           memcmp(reply->payload[1].data, "abc", 3) != 0 || ((const char *)reply->payload[0].data)[999] != 'z';
    }
}

static moe_status start_echo(world *w, moe_peer peer, outcome *o, int64_t timeout_ns) {
    static char large[1000];
    memset(large, 'z', sizeof large);
    moe_frame payload[2] = {{"abc", 3}, {large, sizeof large}};
    Moesaic__V1__TokenizeRequest request = MOESAIC__V1__TOKENIZE_REQUEST__INIT;
    request.text = (char *)"hi";
    return moe_rpc_call_start(w->client.rpc, peer, TOKENIZE, (ProtobufCMessage *)&request, payload, 2,
                              w->clock.fake_now_ns + timeout_ns, on_reply, o, &o->id, NULL);
}

static moe_status start_generate(world *w, moe_peer peer, outcome *o, uint32_t count, int64_t timeout_ns) {
    uint32_t tokens[64];
    for (uint32_t i = 0; i < count; i++) tokens[i] = 100 + i;
    Moesaic__V1__GenerateRequest request = MOESAIC__V1__GENERATE_REQUEST__INIT;
    request.n_prompt_token_ids = count, request.prompt_token_ids = tokens;
    return moe_rpc_call_start(w->client.rpc, peer, GENERATE, (ProtobufCMessage *)&request, NULL, 0,
                              w->clock.fake_now_ns + timeout_ns, on_reply, o, &o->id, NULL);
}

static moe_status start_held(node *from, moe_peer peer, outcome *o, int64_t deadline_ns) {
    Moesaic__V1__HealthCheckRequest request = MOESAIC__V1__HEALTH_CHECK_REQUEST__INIT;
    return moe_rpc_call_start(from->rpc, peer, CHECK, (ProtobufCMessage *)&request, NULL, 0, deadline_ns, on_reply, o, &o->id,
                              NULL);
}

static void test_unary_and_stream(void **state) {
    world *w = *state;
    run_for(w, MOE_NS_PER_MS);
    assert_int_equal(w->client.ups, 1);
    assert_int_equal(w->server.ups, 1);
    outcome unary = {0}, stream = {0};
    assert_int_equal(start_echo(w, server_peer(w), &unary, MOE_NS_PER_S), MOE_OK);
    assert_int_equal(start_generate(w, server_peer(w), &stream, 40, MOE_NS_PER_S), MOE_OK);
    run_for(w, 10 * MOE_NS_PER_MS);
    assert_true(unary.replies == 1 && unary.ends == 1 && unary.status == MOE_OK && !unary.wrong_payload);
    assert_true(unary.num_tokens == 2 && unary.tokens[0] == 'h' && unary.tokens[1] == 'i');
    assert_true(stream.replies == 41 && stream.ends == 1 && stream.num_tokens == 40);
    for (uint32_t i = 0; i < 40; i++) assert_int_equal(stream.tokens[i], 100 + i);
    assert_true(moe_rpc_next_deadline_ns(w->client.rpc) == INT64_MAX && moe_rpc_next_deadline_ns(w->server.rpc) == INT64_MAX);
}

static void test_server_calls_client(void **state) {
    world *w = *state;
    run_for(w, MOE_NS_PER_MS);
    moe_peer client = 0; /* the server's number for it: found through a call that it makes */
    outcome out = {0}, back = {0};
    assert_int_equal(start_held(&w->client, server_peer(w), &out, INT64_MAX), MOE_OK);
    run_for(w, MOE_NS_PER_MS);
    assert_int_equal(w->server.num_held, 1);
    client = w->server.held[0]->peer;
    assert_string_equal(moe_rpc_peer_of(w->server.rpc, client)->id, "client");
    assert_int_equal(start_held(&w->server, client, &back, INT64_MAX), MOE_OK);
    run_for(w, MOE_NS_PER_MS);
    moe_rpc_fail(w->client.held[0], MOE_ABORTED, "no", NULL);
    moe_rpc_fail(w->server.held[0], MOE_NOT_FOUND, "no", NULL);
    w->client.num_held = w->server.num_held = 0;
    run_for(w, MOE_NS_PER_MS);
    assert_true(back.ends == 1 && back.status == MOE_ABORTED);
    assert_true(out.ends == 1 && out.status == MOE_NOT_FOUND);
}

static void test_cancel_and_deadlines(void **state) {
    world *w = *state;
    run_for(w, MOE_NS_PER_MS);
    outcome cancelled = {0}, expired = {0};
    assert_int_equal(start_held(&w->client, server_peer(w), &cancelled, INT64_MAX), MOE_OK);
    assert_int_equal(start_held(&w->client, server_peer(w), &expired, w->clock.fake_now_ns + 50 * MOE_NS_PER_MS), MOE_OK);
    run_for(w, 10 * MOE_NS_PER_MS);
    assert_int_equal(w->server.num_held, 2);
    moe_rpc_cancel(w->client.rpc, cancelled.id);
    run_for(w, 10 * MOE_NS_PER_MS);
    assert_int_equal(w->server.cancels, 1);
    run_for(w, 100 * MOE_NS_PER_MS);
    assert_int_equal(w->server.cancels, 2); /* by the server's own clock */
    assert_int_equal(cancelled.replies, 0);
    assert_true(expired.ends == 1 && expired.status == MOE_DEADLINE_EXCEEDED);
}

static void test_progress_over_pings(void **state) {
    world *w = *state;
    run_for(w, MOE_NS_PER_MS);
    outcome o = {0};
    assert_int_equal(start_held(&w->client, server_peer(w), &o, INT64_MAX), MOE_OK);
    run_for(w, 1000 * MOE_NS_PER_MS);
    const moe_rpc_peer *peer = moe_rpc_peer_of_link(w->client.rpc, w->client.link);
    assert_in_range(peer->progress, 9, 12); /* the server counts PONGs */
    assert_true(w->clock.fake_now_ns - peer->progress_at_ns <= MOE_RPC_PING_INTERVAL_NS);
    moe_inproc_partition(w->hub, ENDPOINT, true, false); /* silence without a reset shows as missing progress */
    int64_t cut_at_ns = w->clock.fake_now_ns;
    run_for(w, 1000 * MOE_NS_PER_MS);
    assert_true(peer->progress_at_ns <= cut_at_ns && peer->heard_at_ns <= cut_at_ns);
    assert_int_equal(o.ends, 0);
}

static void test_server_restart(void **state) {
    world *w = *state;
    run_for(w, MOE_NS_PER_MS);
    outcome before = {0}, after = {0};
    moe_peer old = server_peer(w);
    assert_int_equal(start_held(&w->client, old, &before, INT64_MAX), MOE_OK);
    run_for(w, MOE_NS_PER_MS);
    node_close(&w->server);
    run_for(w, MOE_NS_PER_MS);
    assert_true(before.ends == 1 && before.status == MOE_UNAVAILABLE);
    assert_int_equal(w->client.downs, 1);
    assert_int_equal(start_echo(w, old, &after, MOE_NS_PER_S), MOE_UNAVAILABLE);
    node_open(w, &w->server, &w->clock, "server", 1002);
    listen_at(&w->server, ENDPOINT);
    run_for(w, 100 * MOE_NS_PER_MS);
    assert_int_equal(w->client.ups, 2);
    moe_peer successor = server_peer(w);
    assert_true(successor != 0 && successor != old);
    assert_true(moe_rpc_peer_of_link(w->client.rpc, w->client.link)->incarnation == 1002);
    assert_int_equal(start_echo(w, old, &after, MOE_NS_PER_S), MOE_UNAVAILABLE);
    assert_int_equal(start_echo(w, successor, &after, MOE_NS_PER_S), MOE_OK);
    run_for(w, 10 * MOE_NS_PER_MS);
    assert_true(after.ends == 1 && after.status == MOE_OK && !after.wrong_payload);
    assert_int_equal(before.ends, 1);
    assert_int_equal(w->server.num_held, 0);
}

static void test_client_gone_cancels(void **state) {
    world *w = *state;
    run_for(w, MOE_NS_PER_MS);
    outcome o = {0};
    assert_int_equal(start_held(&w->client, server_peer(w), &o, INT64_MAX), MOE_OK);
    run_for(w, MOE_NS_PER_MS);
    node_close(&w->client);
    assert_true(o.ends == 1 && o.status == MOE_CANCELLED);
    run_for(w, MOE_NS_PER_MS);
    assert_int_equal(w->server.cancels, 1);
    assert_int_equal(w->server.downs, 1);
}

static void test_refused(void **state) {
    world *w = *state;
    w->server.refuse = "another cluster";
    run_for(w, 5 * MOE_NS_PER_S);
    assert_int_equal(server_peer(w), 0);
    assert_int_equal(w->client.ups + w->server.ups, 0);
    assert_true(moe_rpc_next_deadline_ns(w->client.rpc) == INT64_MAX);
}

static void test_full_queue(void **state) {
    world *w = *state;
    run_for(w, MOE_NS_PER_MS);
    moe_inproc_set_queue_limit(w->hub, 10000);
    outcome outcomes[20] = {0};
    int started = 0;
    for (int i = 0; i < 20; i++) {
        moe_status status = start_echo(w, server_peer(w), &outcomes[i], MOE_NS_PER_S);
        assert_true(status == MOE_OK || status == MOE_RESOURCE_EXHAUSTED);
        started += status == MOE_OK;
    }
    assert_in_range(started, 1, 19);
    run_for(w, 2 * MOE_NS_PER_S);
    int ended = 0;
    for (int i = 0; i < 20; i++) ended += outcomes[i].ends;
    assert_int_equal(ended, started);
}

/* Drops, duplicates, delays and reorderings: every call ends exactly once, and what succeeded has the whole right answer. */
static void test_faults(void **state) {
    world *w = *state;
    enum { CALLS = 400 };
    static outcome outcomes[CALLS];
    memset(outcomes, 0, sizeof outcomes);
    moe_inproc_faults faults = {
        .drop = 0.1, .duplicate = 0.1, .reorder = 0.1, .delay_min_ns = MOE_NS_PER_US, .delay_max_ns = 5 * MOE_NS_PER_MS};
    moe_inproc_set_faults(w->hub, &faults);
    moe_random random = {.state = 3};
    run_for(w, 30 * MOE_NS_PER_S); /* hellos are repeated until they pass */
    assert_true(server_peer(w) != 0);
    bool started[CALLS], cancelled[CALLS];
    for (int i = 0; i < CALLS; i++) {
        int64_t timeout_ns = (int64_t)moe_random_below(&random, 40) * MOE_NS_PER_MS;
        moe_status status = i % 2 ? start_echo(w, server_peer(w), &outcomes[i], timeout_ns)
                                  : start_generate(w, server_peer(w), &outcomes[i], 5, timeout_ns);
        started[i] = status == MOE_OK;
        cancelled[i] = false;
        run_for(w, (int64_t)moe_random_below(&random, 3) * MOE_NS_PER_MS);
        if (moe_random_below(&random, 10) == 0 && started[i] && outcomes[i].ends == 0) {
            moe_rpc_cancel(w->client.rpc, outcomes[i].id);
            cancelled[i] = true;
        }
    }
    run_for(w, 10 * MOE_NS_PER_S);
    int good = 0, bad = 0;
    for (int i = 0; i < CALLS; i++) {
        const outcome *o = &outcomes[i];
        assert_int_equal(o->ends, started[i] && !cancelled[i]);
        if (o->ends == 0) continue;
        bool ok = o->status == MOE_OK;
        if (ok && i % 2) assert_true(o->replies == 1 && o->num_tokens == 2 && !o->wrong_payload);
        if (ok && i % 2 == 0) {
            assert_true(o->replies == 6 && o->num_tokens == 5);
            for (uint32_t t = 0; t < 5; t++) assert_int_equal(o->tokens[t], 100 + t);
        }
        if (!ok) assert_true(o->status == MOE_DEADLINE_EXCEEDED || o->status == MOE_DATA_LOSS);
        good += ok, bad += !ok;
    }
    assert_in_range(good, 50, CALLS);
    assert_in_range(bad, 10, CALLS);
    assert_true(moe_rpc_next_deadline_ns(w->client.rpc) == INT64_MAX);
}

/* ---- real threads, real clock ---- */

typedef struct server_thread {
    node node;
    atomic_bool stop;
} server_thread;

static void *serve(void *arg) {
    server_thread *s = arg;
    while (!atomic_load(&s->stop)) {
        if (moe_rpc_step(s->node.rpc, moe_now_ns(moe_clock_real()) + 10 * MOE_NS_PER_S, NULL) != MOE_OK) break;
    }
    return NULL;
}

/* Calls between two threads over the transports of `w`: a hub, or what `w` says where there is none. */
static void call_across_threads(world w, const char *endpoint) {
    enum { CALLS = 2000, WINDOW = 64 };
    server_thread server = {0};
    pthread_t thread;
    static outcome outcomes[CALLS];
    memset(outcomes, 0, sizeof outcomes);
    node_open(&w, &server.node, moe_clock_real(), "server", 1);
    node_open(&w, &w.client, moe_clock_real(), "client", 2);
    listen_at(&server.node, endpoint);
    assert_int_equal(moe_rpc_connect(w.client.rpc, endpoint, &w.client.link, NULL), MOE_OK);
    assert_int_equal(pthread_create(&thread, NULL, serve, &server), 0);
    int started = 0, ended = 0;
    for (int round = 0; round < MAX_ROUNDS && ended < CALLS; round++) {
        w.clock.fake_now_ns = moe_now_ns(moe_clock_real()); /* start_echo counts its timeout from here */
        while (server_peer(&w) && started < CALLS && started - ended < WINDOW) {
            assert_int_equal(start_echo(&w, server_peer(&w), &outcomes[started], 30 * MOE_NS_PER_S), MOE_OK);
            started++;
        }
        assert_int_equal(moe_rpc_step(w.client.rpc, moe_now_ns(moe_clock_real()) + 10 * MOE_NS_PER_S, NULL), MOE_OK);
        for (ended = 0; ended < started && outcomes[ended].ends; ended++) continue;
    }
    assert_int_equal(ended, CALLS);
    for (int i = 0; i < CALLS; i++)
        assert_true(outcomes[i].ends == 1 && outcomes[i].status == MOE_OK && !outcomes[i].wrong_payload);
    atomic_store(&server.stop, true);
    moe_rpc_wake(server.node.rpc);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(server.node.requests, CALLS);
    node_close(&w.client);
    node_close(&server.node);
}

static void test_threads_over_inproc(void **state) {
    (void)state;
    world w = {0};
    assert_int_equal(moe_inproc_hub_new(moe_clock_real(), 1, &w.hub, NULL), MOE_OK);
    call_across_threads(w, ENDPOINT);
    moe_inproc_hub_free(&w.hub);
}

static void test_threads_over_ipc(void **state) {
    (void)state;
    if (getenv("MOESAIC_TEST_INPROC_ONLY")) skip(); /* libzmq is not built for the thread sanitizer */
    moe_test_dir dir = moe_test_dir_new();
    char endpoint[sizeof dir.path + 16];
    snprintf(endpoint, sizeof endpoint, "ipc://%s/server", dir.path);
    call_across_threads((world){0}, endpoint);
    moe_test_dir_free(&dir);
}

static void test_threads_over_shm(void **state) {
    (void)state;
    moe_test_dir dir = moe_test_dir_new();
    char endpoint[sizeof dir.path + 16];
    snprintf(endpoint, sizeof endpoint, "shm:%s/server", dir.path);
    call_across_threads((world){.shm = true}, endpoint);
    moe_test_dir_free(&dir);
}

int main(void) {
    moe_log_init(MOE_LOG_OFF, "test");
#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_unary_and_stream),
        T(test_server_calls_client),
        T(test_cancel_and_deadlines),
        T(test_progress_over_pings),
        T(test_server_restart),
        T(test_client_gone_cancels),
        T(test_refused),
        T(test_full_queue),
        T(test_faults),
        cmocka_unit_test(test_threads_over_inproc),
        cmocka_unit_test(test_threads_over_ipc),
        cmocka_unit_test(test_threads_over_shm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
