/* One rpc against a test that plays its peers message by message: every branch of hellos, admission, replies and expiry. */
/* clang-format off */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
/* clang-format on */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/log.h"
#include "common/metrics.h"
#include "proto/envelope.h"
#include "proto/rpc.h"
#include "tests/support/stub_transport.h"

#define CHECK "/moesaic.v1.Health/Check"
#define STATS "/moesaic.v1.WorkerService/Stats"
#define GENERATE "/moesaic.v1.InferenceService/Generate"
#define KIND(name) MOESAIC__V1__MESSAGE_KIND__##name
#define PEER 7
#define LINK 1

typedef struct rig {
    stub_transport stub;
    moe_clock clock;
    moe_rpc *rpc;
    moe_envelope_buffers buffers;
    Moesaic__V1__Envelope *read; /* the envelope last read from what was sent */
    moe_status verdict;          /* of on_peer_up */
    int ups, downs, requests, cancels, replies;
    bool respond_at_once, answer_in_cancel;
    moe_rpc_call *held[8];
    int num_held;
    moe_status last_status;
    bool last_last;
    char last_message[300], down_id[32];
    int32_t last_health;
    int replies_when_down;
    uint64_t progress;
    void (*then)(struct rig *rig); /* what the next on_reply does */
    uint64_t id;
} rig;

static uint64_t progress_of(void *ctx) { return ((rig *)ctx)->progress; }

static moe_status on_peer_up(void *ctx, const moe_rpc_peer *peer, moe_error *err) {
    rig *r = ctx;
    r->ups++;
    assert_non_null(peer->id);
    assert_null(moe_rpc_peer_of(r->rpc, peer->peer)); /* not yet accepted */
    return r->verdict == MOE_OK ? MOE_OK : moe_fail(err, r->verdict, "wrong cluster");
}

static void on_peer_down(void *ctx, const moe_rpc_peer *peer) {
    rig *r = ctx;
    r->downs++;
    r->replies_when_down = r->replies;
    snprintf(r->down_id, sizeof r->down_id, "%s", peer->id);
    assert_null(moe_rpc_peer_of(r->rpc, peer->peer));
}

static void answer_health(moe_rpc_call *call) {
    Moesaic__V1__HealthCheckResponse body = MOESAIC__V1__HEALTH_CHECK_RESPONSE__INIT;
    body.status = MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    moe_rpc_respond(call, (ProtobufCMessage *)&body, NULL, 0);
}

static void on_cancel(moe_rpc_call *call) {
    rig *r = call->owner;
    r->cancels++;
    assert_true(call->cancelled);
    if (r->answer_in_cancel) answer_health(call);
}

static void on_check(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)payload, (void)num_payload;
    rig *r = ctx;
    r->requests++;
    assert_ptr_equal(request->descriptor, &moesaic__v1__health_check_request__descriptor);
    call->owner = r;
    call->on_cancel = on_cancel;
    if (r->respond_at_once)
        answer_health(call);
    else
        r->held[r->num_held++] = call;
}

static void on_generate(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                        int num_payload) {
    (void)request, (void)payload, (void)num_payload;
    rig *r = ctx;
    call->owner = r;
    r->held[r->num_held++] = call;
}

static const moe_rpc_method methods[] = {
    {CHECK, on_check, 1u << MOE_ROLE_ROUTER | 1u << MOE_ROLE_OPERATOR},
    {GENERATE, on_generate, 1u << MOE_ROLE_OPERATOR},
    {0},
};

static moe_rpc_config config_of(rig *r) {
    return (moe_rpc_config){
        .transport = &r->stub.base,
        .clock = &r->clock,
        .hello = {.cluster_uuid = "c1", .role = "router", .id = "r0", .profile = "cpu", .incarnation = 99, .model_digest = 5},
        .methods = methods,
        .ctx = r,
        .progress = progress_of,
        .on_peer_up = on_peer_up,
        .on_peer_down = on_peer_down,
    };
}

static int setup(void **state) {
    rig *r = calloc(1, sizeof *r);
    if (!r) return 1;
    stub_init(&r->stub);
    r->clock = moe_clock_fake(1000 * MOE_NS_PER_S);
    moe_rpc_config config = config_of(r);
    *state = r;
    return moe_rpc_new(&config, &r->rpc, NULL) != MOE_OK;
}

static int teardown(void **state) {
    rig *r = *state;
    moe_rpc_free(&r->rpc);
    moe_rpc_free(&r->rpc);
    stub_close(&r->stub);
    moe_envelope_free(r->read);
    moe_envelope_buffers_free(&r->buffers);
    free(r);
    return 0;
}

static void step(rig *r) { assert_int_equal(moe_rpc_step(r->rpc, 0, NULL), MOE_OK); }

static void advance(rig *r, int64_t ns) {
    r->clock.fake_now_ns += ns;
    step(r);
}

static void event(rig *r, moe_event_kind kind, moe_peer peer, uint64_t link) {
    stub_feed(&r->stub, &(moe_event){.kind = kind, .peer = peer, .link = link});
    step(r);
}

/* The peer sends an envelope with a body. */
static void say(rig *r, moe_peer peer, uint64_t link, moe_role role, Moesaic__V1__Envelope *envelope, const void *body) {
    moe_event message = {.kind = MOE_EVENT_MESSAGE, .peer = peer, .link = link, .role = role, .num_frames = 1};
    assert_int_equal(moe_envelope_pack(&r->buffers, envelope, body, NULL, 0, message.frames, NULL), MOE_OK);
    stub_feed(&r->stub, &message);
    step(r);
}

static Moesaic__V1__Envelope envelope_of(Moesaic__V1__MessageKind kind, uint64_t call_id) {
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    envelope.kind = kind;
    envelope.call_id = call_id;
    return envelope;
}

static void say_hello(rig *r, moe_peer peer, uint64_t link, moe_role role, const char *claimed, uint64_t incarnation,
                      uint32_t protocol) {
    Moesaic__V1__Envelope envelope = envelope_of(KIND(HELLO), 0);
    Moesaic__V1__Hello hello = MOESAIC__V1__HELLO__INIT;
    hello.cluster_uuid = (char *)"c1", hello.role = (char *)claimed, hello.id = (char *)"w0", hello.profile = (char *)"cpu";
    hello.incarnation = incarnation, hello.model_digest = 5, hello.epoch = 3, hello.fence = 4, hello.protocol = protocol;
    say(r, peer, link, role, &envelope, &hello);
}

/* Reads the index-th message sent, and that it went to `peer`. */
static Moesaic__V1__Envelope *sent(rig *r, int index, moe_peer peer) {
    stub_message *message = stub_sent(&r->stub, index);
    assert_non_null(message);
    assert_true(message->peer == peer);
    moe_envelope_free(r->read);
    assert_int_equal(moe_envelope_open(message->frames, message->num_frames, &r->read, NULL), MOE_OK);
    return r->read;
}

static void greet_link(rig *r) {
    event(r, MOE_EVENT_PEER_UP, PEER, LINK);
    say_hello(r, PEER, LINK, MOE_ROLE_LOCAL, "worker", 11, MOE_PROTOCOL_VERSION);
    assert_int_equal(r->ups, 1);
    stub_forget(&r->stub);
}

static void greet_accepted(rig *r, moe_peer peer, moe_role role, const char *claimed) {
    say_hello(r, peer, 0, role, claimed, 11, MOE_PROTOCOL_VERSION);
    assert_non_null(moe_rpc_peer_of(r->rpc, peer));
    stub_forget(&r->stub);
}

static void on_reply(void *ctx, const moe_rpc_reply *reply) {
    rig *r = ctx;
    r->replies++;
    r->last_status = reply->status;
    r->last_last = reply->last;
    assert_non_null(reply->message);
    assert_true(reply->status != MOE_OK || reply->body);
    snprintf(r->last_message, sizeof r->last_message, "%s", reply->message);
    if (reply->body && reply->body->descriptor == &moesaic__v1__health_check_response__descriptor)
        r->last_health = (int32_t)((const Moesaic__V1__HealthCheckResponse *)reply->body)->status;
    void (*then)(rig *) = r->then;
    r->then = NULL;
    if (then) then(r);
}

static moe_status start_check(rig *r, moe_peer peer, int64_t timeout_ns, uint64_t *id) {
    Moesaic__V1__HealthCheckRequest request = MOESAIC__V1__HEALTH_CHECK_REQUEST__INIT;
    int64_t deadline_ns = timeout_ns == INT64_MAX ? INT64_MAX : r->clock.fake_now_ns + timeout_ns;
    return moe_rpc_call_start(r->rpc, peer, CHECK, (ProtobufCMessage *)&request, NULL, 0, deadline_ns, on_reply, r, id, NULL);
}

static uint64_t start_generate(rig *r) {
    Moesaic__V1__GenerateRequest request = MOESAIC__V1__GENERATE_REQUEST__INIT;
    uint64_t id;
    assert_int_equal(
        moe_rpc_call_start(r->rpc, PEER, GENERATE, (ProtobufCMessage *)&request, NULL, 0, INT64_MAX, on_reply, r, &id, NULL),
        MOE_OK);
    return id;
}

static void say_response(rig *r, moe_peer peer, uint64_t id, moe_status status, uint32_t item) {
    Moesaic__V1__Envelope envelope = envelope_of(KIND(RESPONSE), id);
    Moesaic__V1__HealthCheckResponse body = MOESAIC__V1__HEALTH_CHECK_RESPONSE__INIT;
    body.status = MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
    envelope.status = status, envelope.message = (char *)"why", envelope.item = item;
    say(r, peer, LINK, MOE_ROLE_LOCAL, &envelope, status == MOE_OK ? &body : NULL);
}

static void say_request(rig *r, moe_peer peer, moe_role role, uint64_t id, const char *method, uint64_t timeout_us) {
    Moesaic__V1__Envelope envelope = envelope_of(KIND(REQUEST), id);
    envelope.method = (char *)method, envelope.timeout_us = timeout_us;
    say(r, peer, 0, role, &envelope, NULL);
}

/* ---- hellos ---- */

static void test_hello_as_client(void **state) {
    rig *r = *state;
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == INT64_MAX);
    event(r, MOE_EVENT_PEER_UP, PEER, LINK);
    Moesaic__V1__Envelope *envelope = sent(r, 0, PEER);
    assert_int_equal(envelope->kind, KIND(HELLO));
    ProtobufCMessage *message;
    assert_int_equal(moe_wire_unpack(&moesaic__v1__hello__descriptor, envelope->body.data, envelope->body.len, &message, NULL),
                     MOE_OK);
    Moesaic__V1__Hello *hello = (Moesaic__V1__Hello *)message;
    assert_string_equal(hello->id, "r0");
    assert_string_equal(hello->cluster_uuid, "c1");
    assert_true(hello->incarnation == 99 && hello->protocol == MOE_PROTOCOL_VERSION);
    moe_wire_free(message);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_UNAVAILABLE); /* no hello yet */
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == r->clock.fake_now_ns + MOE_RPC_HELLO_INTERVAL_NS);
    advance(r, MOE_RPC_HELLO_INTERVAL_NS); /* lost: it is repeated */
    assert_int_equal(sent(r, 1, PEER)->kind, KIND(HELLO));
    assert_null(moe_rpc_peer_of_link(r->rpc, LINK));
    say_hello(r, PEER, LINK, MOE_ROLE_LOCAL, "worker", 11, MOE_PROTOCOL_VERSION);
    const moe_rpc_peer *peer = moe_rpc_peer_of_link(r->rpc, LINK);
    assert_non_null(peer);
    assert_ptr_equal(peer, moe_rpc_peer_of(r->rpc, PEER));
    assert_string_equal(peer->id, "w0");
    assert_string_equal(peer->claimed_role, "worker");
    assert_true(peer->incarnation == 11 && peer->epoch == 3 && peer->fence == 4 && peer->model_digest == 5 && peer->link == LINK);
    say_hello(r, PEER, LINK, MOE_ROLE_LOCAL, "worker", 11, MOE_PROTOCOL_VERSION); /* its answer to our second hello */
    assert_int_equal(r->ups, 1);
    assert_int_equal(r->stub.num_sent, 2); /* a hello that came over our connection is not answered */
    advance(r, 10 * MOE_RPC_HELLO_INTERVAL_NS);
    assert_int_equal(r->stub.num_sent, 2);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == INT64_MAX);
    event(r, MOE_EVENT_PEER_DOWN, PEER, LINK);
    assert_int_equal(r->downs, 1);
    assert_string_equal(r->down_id, "w0");
    event(r, MOE_EVENT_PEER_DOWN, PEER, LINK);
    assert_int_equal(r->downs, 1);
}

static void test_hello_as_server(void **state) {
    rig *r = *state;
    say_request(r, PEER, MOE_ROLE_LOCAL, 1, CHECK, 0); /* before the hello */
    assert_int_equal(sent(r, 0, PEER)->status, MOE_UNAUTHENTICATED);
    assert_int_equal(r->requests, 0);
    stub_forget(&r->stub);
    say_hello(r, PEER, 0, MOE_ROLE_LOCAL, "router", 11, MOE_PROTOCOL_VERSION);
    assert_int_equal(sent(r, 0, PEER)->kind, KIND(HELLO));
    assert_int_equal(r->read->status, MOE_OK);
    assert_int_equal(r->ups, 1);
    say_hello(r, PEER, 0, MOE_ROLE_LOCAL, "router", 11, MOE_PROTOCOL_VERSION); /* our answer was lost: answered again */
    assert_int_equal(sent(r, 1, PEER)->kind, KIND(HELLO));
    assert_int_equal(r->ups, 1);
    say_hello(r, PEER, 0, MOE_ROLE_LOCAL, "router", 12, MOE_PROTOCOL_VERSION); /* another process behind the connection */
    assert_int_equal(r->ups, 2);
    assert_int_equal(r->downs, 1);
    assert_true(moe_rpc_peer_of(r->rpc, PEER)->incarnation == 12);
}

static void test_hello_refused_by_us(void **state) {
    rig *r = *state;
    r->verdict = MOE_FAILED_PRECONDITION;
    say_hello(r, PEER, 0, MOE_ROLE_LOCAL, "router", 11, MOE_PROTOCOL_VERSION);
    assert_int_equal(sent(r, 0, PEER)->kind, KIND(HELLO));
    assert_int_equal(r->read->status, MOE_FAILED_PRECONDITION);
    assert_string_equal(r->read->message, "wrong cluster");
    assert_null(moe_rpc_peer_of(r->rpc, PEER));
    say_request(r, PEER, MOE_ROLE_LOCAL, 1, CHECK, 0);
    assert_int_equal(sent(r, 1, PEER)->status, MOE_FAILED_PRECONDITION);
    assert_string_equal(r->read->message, "wrong cluster");
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_FAILED_PRECONDITION);
    event(r, MOE_EVENT_PEER_DOWN, PEER, 0);
    assert_int_equal(r->downs, 0); /* it never was up */
    assert_int_equal(r->requests, 0);
}

static void test_hello_refused_by_them(void **state) {
    rig *r = *state;
    event(r, MOE_EVENT_PEER_UP, PEER, LINK);
    Moesaic__V1__Envelope envelope = envelope_of(KIND(HELLO), 0);
    Moesaic__V1__Hello hello = MOESAIC__V1__HELLO__INIT;
    hello.protocol = MOE_PROTOCOL_VERSION, hello.incarnation = 11;
    envelope.status = MOE_PERMISSION_DENIED, envelope.message = (char *)"another cluster";
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &envelope, &hello);
    assert_int_equal(r->ups, 0);
    assert_null(moe_rpc_peer_of_link(r->rpc, LINK));
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_PERMISSION_DENIED);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == INT64_MAX); /* not asked again */
}

static void test_hello_bad(void **state) {
    rig *r = *state;
    say_hello(r, PEER, 0, MOE_ROLE_LOCAL, "router", 11, MOE_PROTOCOL_VERSION + 1);
    assert_int_equal(sent(r, 0, PEER)->status, MOE_FAILED_PRECONDITION);
    assert_non_null(strstr(r->read->message, "protocol version 2"));
    say_hello(r, PEER + 1, 0, MOE_ROLE_WORKER, "router", 11, MOE_PROTOCOL_VERSION); /* a worker's key, a router's claim */
    assert_int_equal(sent(r, 1, PEER + 1)->status, MOE_PERMISSION_DENIED);
    say_hello(r, PEER + 2, 0, MOE_ROLE_ROUTER, "router", 11, MOE_PROTOCOL_VERSION);
    assert_int_equal(sent(r, 2, PEER + 2)->status, MOE_OK);
    char text[MOE_RPC_MAX_HELLO_TEXT_BYTES + 2];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    say_hello(r, PEER + 3, 0, MOE_ROLE_LOCAL, text, 11, MOE_PROTOCOL_VERSION);
    assert_int_equal(sent(r, 3, PEER + 3)->status, MOE_INVALID_ARGUMENT);
    say_hello(r, PEER + 4, 0, MOE_ROLE_LOCAL, "a\nb", 11, MOE_PROTOCOL_VERSION);
    assert_int_equal(sent(r, 4, PEER + 4)->status, MOE_INVALID_ARGUMENT);
    Moesaic__V1__Envelope envelope = envelope_of(KIND(HELLO), 0);
    envelope.body = (ProtobufCBinaryData){.len = 1, .data = (uint8_t *)"\x08"};
    say(r, PEER + 5, 0, MOE_ROLE_LOCAL, &envelope, NULL);
    assert_int_equal(sent(r, 5, PEER + 5)->status, MOE_INVALID_ARGUMENT);
    say_hello(r, PEER + 6, 99, MOE_ROLE_LOCAL, "worker", 11, MOE_PROTOCOL_VERSION); /* on a connection given up */
    assert_int_equal(r->stub.num_sent, 6);
    assert_null(moe_rpc_peer_of_link(r->rpc, 99));
    assert_int_equal(r->ups, 1);
}

static void test_peer_table_full(void **state) {
    rig *r = *state;
    for (uint64_t peer = 1; peer <= MOE_RPC_MAX_PEERS; peer++) {
        greet_accepted(r, peer, MOE_ROLE_LOCAL, "operator");
        r->clock.fake_now_ns += MOE_NS_PER_MS;
    }
    say_hello(r, 10000, 0, MOE_ROLE_LOCAL, "operator", 1, MOE_PROTOCOL_VERSION);
    assert_int_equal(sent(r, 0, 10000)->status, MOE_RESOURCE_EXHAUSTED); /* nobody is silent long enough */
    stub_forget(&r->stub);
    r->clock.fake_now_ns += MOE_RPC_PEER_IDLE_NS;
    Moesaic__V1__Envelope ping = envelope_of(KIND(PING), 0);
    say(r, 1, 0, MOE_ROLE_LOCAL, &ping, NULL); /* the first of them is heard again */
    assert_int_equal(sent(r, 0, 1)->kind, KIND(PONG));
    say_hello(r, 10000, 0, MOE_ROLE_LOCAL, "operator", 1, MOE_PROTOCOL_VERSION);
    assert_non_null(moe_rpc_peer_of(r->rpc, 10000));
    assert_non_null(moe_rpc_peer_of(r->rpc, 1));
    assert_null(moe_rpc_peer_of(r->rpc, 2));
    assert_int_equal(r->downs, 1);
}

/* ---- serving ---- */

static void test_admission(void **state) {
    rig *r = *state;
    r->respond_at_once = true;
    greet_accepted(r, 1, MOE_ROLE_LOCAL, "whoever");
    greet_accepted(r, 2, MOE_ROLE_ROUTER, "router");
    greet_accepted(r, 3, MOE_ROLE_WORKER, "worker");
    say_request(r, 1, MOE_ROLE_LOCAL, 1, CHECK, 0);
    assert_int_equal(sent(r, 0, 1)->status, MOE_OK);
    assert_int_equal(r->read->kind, KIND(RESPONSE));
    assert_true(r->read->call_id == 1);
    say_request(r, 2, MOE_ROLE_ROUTER, 1, CHECK, 0);
    assert_int_equal(sent(r, 1, 2)->status, MOE_OK);
    say_request(r, 3, MOE_ROLE_WORKER, 1, CHECK, 0);
    assert_int_equal(sent(r, 2, 3)->status, MOE_PERMISSION_DENIED);
    say_request(r, 2, MOE_ROLE_ROUTER, 2, STATS, 0); /* exists, is not served here */
    assert_int_equal(sent(r, 3, 2)->status, MOE_UNIMPLEMENTED);
    say_request(r, 2, MOE_ROLE_ROUTER, 3, "/no/such", 0);
    assert_int_equal(sent(r, 4, 2)->status, MOE_UNIMPLEMENTED);
    Moesaic__V1__Envelope envelope = envelope_of(KIND(REQUEST), 4);
    envelope.method = (char *)CHECK, envelope.body = (ProtobufCBinaryData){.len = 2, .data = (uint8_t *)"\x0a\x05"};
    say(r, 2, 0, MOE_ROLE_ROUTER, &envelope, NULL);
    assert_int_equal(sent(r, 5, 2)->status, MOE_INVALID_ARGUMENT);
    assert_int_equal(r->requests, 2);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == INT64_MAX);
}

static void test_bad_messages_are_answered(void **state) {
    rig *r = *state;
    greet_accepted(r, PEER, MOE_ROLE_LOCAL, "router");
    int64_t bad = moe_metric_value(MOE_METRIC_BAD_MESSAGES);
    moe_event message = {.kind = MOE_EVENT_MESSAGE, .peer = PEER, .num_frames = 2};
    Moesaic__V1__Envelope envelope = envelope_of(KIND(REQUEST), 5);
    moe_frame payload = {"abcd", 4};
    envelope.method = (char *)CHECK;
    assert_int_equal(moe_envelope_pack(&r->buffers, &envelope, NULL, &payload, 1, message.frames, NULL), MOE_OK);
    message.frames[1] = (moe_frame){"abce", 4}; /* a flipped bit */
    stub_feed(&r->stub, &message);
    message.frames[1] = (moe_frame){"abc", 3};
    stub_feed(&r->stub, &message);
    message.num_frames = 1; /* its payload is missing */
    stub_feed(&r->stub, &message);
    char *large = calloc(1, MOE_RPC_MAX_HEADER_BYTES + 1);
    assert_non_null(large);
    memcpy(large, message.frames[0].data, message.frames[0].size);
    message.frames[0] = (moe_frame){large, MOE_RPC_MAX_HEADER_BYTES + 1};
    message.num_frames = 2;
    stub_feed(&r->stub, &message);
    message.num_frames = 1;
    message.frames[0] = (moe_frame){"garbage", 7};
    stub_feed(&r->stub, &message);
    message.num_frames = 0;
    stub_feed(&r->stub, &message);
    step(r);
    const moe_status expected[] = {MOE_DATA_LOSS, MOE_DATA_LOSS, MOE_DATA_LOSS, MOE_INVALID_ARGUMENT};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(sent(r, i, PEER)->status, expected[i]);
        assert_true(r->read->call_id == 5);
    }
    assert_int_equal(r->stub.num_sent, 4); /* garbage names no call */
    assert_int_equal(moe_metric_value(MOE_METRIC_BAD_MESSAGES) - bad, 6);
    r->respond_at_once = true;
    say_request(r, PEER, MOE_ROLE_LOCAL, 6, CHECK, 0); /* the connection was kept */
    assert_int_equal(sent(r, 4, PEER)->status, MOE_OK);
    free(large);
}

static void test_served_deadline_and_cancel(void **state) {
    rig *r = *state;
    greet_accepted(r, PEER, MOE_ROLE_LOCAL, "router");
    int64_t start_ns = r->clock.fake_now_ns;
    say_request(r, PEER, MOE_ROLE_LOCAL, 1, CHECK, 5000);
    say_request(r, PEER, MOE_ROLE_LOCAL, 1, CHECK, 5000); /* duplicated on the way: served once */
    assert_int_equal(r->requests, 1);
    moe_rpc_call *call = r->held[0];
    assert_true(call->deadline_ns == start_ns + 5000 * MOE_NS_PER_US && call->call_id == 1 && call->peer == PEER);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == call->deadline_ns);
    advance(r, 5000 * MOE_NS_PER_US - 1);
    assert_false(call->cancelled);
    advance(r, 1);
    assert_true(call->cancelled);
    assert_int_equal(r->cancels, 1);
    advance(r, MOE_NS_PER_S);
    assert_int_equal(r->cancels, 1);
    Moesaic__V1__Envelope late = envelope_of(KIND(CANCEL), 1); /* of a call that is cancelled and not yet answered */
    say(r, PEER, 0, MOE_ROLE_LOCAL, &late, NULL);
    assert_int_equal(r->cancels, 1);
    answer_health(call);
    assert_int_equal(r->stub.num_sent, 0);

    say_request(r, PEER, MOE_ROLE_LOCAL, 2, CHECK, 0);
    say_request(r, PEER, MOE_ROLE_LOCAL, 3, CHECK, UINT64_MAX);
    say_request(r, PEER, MOE_ROLE_LOCAL, 4, CHECK, INT64_MAX / 1000);
    for (int i = 1; i < 4; i++) assert_true(r->held[i]->deadline_ns == INT64_MAX);
    Moesaic__V1__Envelope cancel = envelope_of(KIND(CANCEL), 2);
    r->answer_in_cancel = true;
    say(r, PEER + 1, 0, MOE_ROLE_LOCAL, &cancel, NULL); /* another peer's call of that id */
    assert_int_equal(r->cancels, 1);
    say(r, PEER, 0, MOE_ROLE_LOCAL, &cancel, NULL);
    assert_int_equal(r->cancels, 2);
    say(r, PEER, 0, MOE_ROLE_LOCAL, &cancel, NULL); /* gone */
    assert_int_equal(r->cancels, 2);
    event(r, MOE_EVENT_PEER_DOWN, PEER, 0); /* cancels the other two */
    assert_int_equal(r->cancels, 4);
    assert_int_equal(r->downs, 1);
    assert_int_equal(r->stub.num_sent, 0);
}

static void test_free_with_held_calls(void **state) {
    rig *r = *state;
    greet_accepted(r, PEER, MOE_ROLE_LOCAL, "router");
    say_request(r, PEER, MOE_ROLE_LOCAL, 1, CHECK, 0);
    r->answer_in_cancel = true;
    say_request(r, PEER, MOE_ROLE_LOCAL, 2, CHECK, 1);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_OK);
    moe_rpc_free(&r->rpc);
    assert_null(r->rpc);
    assert_int_equal(r->cancels, 2);
    assert_int_equal(r->replies, 1);
    assert_int_equal(r->last_status, MOE_CANCELLED);
}

static void test_answers_that_cannot_be_sent(void **state) {
    rig *r = *state;
    greet_accepted(r, PEER, MOE_ROLE_LOCAL, "operator");
    int64_t dropped = moe_metric_value(MOE_METRIC_REPLIES_DROPPED);
    say_request(r, PEER, MOE_ROLE_LOCAL, 1, CHECK, 0);
    r->stub.send_status = MOE_RESOURCE_EXHAUSTED;
    answer_health(r->held[0]);
    r->stub.send_status = MOE_OK;
    assert_int_equal(moe_metric_value(MOE_METRIC_REPLIES_DROPPED) - dropped, 1);

    say_request(r, PEER, MOE_ROLE_LOCAL, 2, GENERATE, 0);
    moe_rpc_call *call = r->held[1];
    Moesaic__V1__GenerateResponse item = MOESAIC__V1__GENERATE_RESPONSE__INIT;
    moe_rpc_stream(call, (ProtobufCMessage *)&item);
    r->stub.send_status = MOE_RESOURCE_EXHAUSTED;
    moe_rpc_stream(call, (ProtobufCMessage *)&item);
    r->stub.send_status = MOE_OK;
    moe_rpc_stream(call, (ProtobufCMessage *)&item); /* a hole before it: not sent */
    assert_int_equal(r->stub.num_sent, 1);
    moe_rpc_respond(call, (ProtobufCMessage *)&item, NULL, 0);
    assert_int_equal(sent(r, 1, PEER)->status, MOE_RESOURCE_EXHAUSTED);

    say_request(r, PEER, MOE_ROLE_LOCAL, 3, GENERATE, 0);
    char *text = calloc(1, MOE_RPC_MAX_CONTROL_BYTES + 1);
    assert_non_null(text);
    item.text = memset(text, 'x', MOE_RPC_MAX_CONTROL_BYTES);
    moe_rpc_respond(r->held[2], (ProtobufCMessage *)&item, NULL, 0);
    assert_int_equal(sent(r, 2, PEER)->status, MOE_RESOURCE_EXHAUSTED);
    assert_non_null(strstr(r->read->message, "over the limit"));
    free(text);
}

/* ---- calling ---- */

static void test_unary_call(void **state) {
    rig *r = *state;
    greet_link(r);
    uint64_t id;
    assert_int_equal(start_check(r, PEER, 1500, &id), MOE_OK);
    Moesaic__V1__Envelope *request = sent(r, 0, PEER);
    assert_int_equal(request->kind, KIND(REQUEST));
    assert_string_equal(request->method, CHECK);
    assert_true(request->timeout_us == 2 && request->call_id == id); /* rounded up */
    assert_int_equal(r->replies, 0);
    int64_t stale = moe_metric_value(MOE_METRIC_STALE_REPLIES);
    say_response(r, PEER + 1, id, MOE_OK, 0); /* another peer's */
    say_response(r, PEER, id + 1, MOE_OK, 0);
    assert_int_equal(r->replies, 0);
    say_response(r, PEER, id, MOE_OK, 0);
    assert_int_equal(r->replies, 1);
    assert_true(r->last_status == MOE_OK && r->last_last);
    assert_int_equal(r->last_health, MOESAIC__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING);
    say_response(r, PEER, id, MOE_OK, 0); /* twice */
    assert_int_equal(r->replies, 1);
    assert_int_equal(moe_metric_value(MOE_METRIC_STALE_REPLIES) - stale, 3);
    assert_int_equal(start_check(r, PEER, INT64_MAX, &id), MOE_OK);
    assert_true(sent(r, 1, PEER)->timeout_us == 0);
    say_response(r, PEER, id, MOE_NOT_FOUND, 0);
    assert_int_equal(r->last_status, MOE_NOT_FOUND);
    assert_string_equal(r->last_message, "why");
    assert_int_equal(start_check(r, PEER, INT64_MAX, &id), MOE_OK);
    say_response(r, PEER, id, (moe_status)200, 0);
    assert_int_equal(r->last_status, MOE_UNKNOWN);
}

static void test_call_deadline_and_cancel(void **state) {
    rig *r = *state;
    greet_link(r);
    uint64_t late, cancelled, expired;
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_MS, &late), MOE_OK);
    assert_int_equal(start_check(r, PEER, 5 * MOE_NS_PER_MS, &cancelled), MOE_OK);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == r->clock.fake_now_ns + MOE_NS_PER_MS);
    advance(r, MOE_NS_PER_MS);
    assert_int_equal(r->replies, 1);
    assert_true(r->last_status == MOE_DEADLINE_EXCEEDED && r->last_last);
    say_response(r, PEER, late, MOE_OK, 0);
    assert_int_equal(r->replies, 1);
    stub_forget(&r->stub);
    moe_rpc_cancel(r->rpc, cancelled);
    assert_int_equal(sent(r, 0, PEER)->kind, KIND(CANCEL));
    assert_true(r->read->call_id == cancelled);
    moe_rpc_cancel(r->rpc, cancelled);
    moe_rpc_cancel(r->rpc, 12345);
    say_response(r, PEER, cancelled, MOE_OK, 0);
    advance(r, 10 * MOE_NS_PER_MS);
    assert_int_equal(r->replies, 1);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == INT64_MAX);
    stub_forget(&r->stub);
    assert_int_equal(start_check(r, PEER, 0, &expired), MOE_OK); /* not sent, ends in the next step */
    assert_int_equal(r->replies, 1);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == r->clock.fake_now_ns);
    step(r);
    assert_int_equal(r->replies, 2);
    assert_int_equal(r->last_status, MOE_DEADLINE_EXCEEDED);
    assert_int_equal(start_check(r, PEER, -5, &expired), MOE_OK);
    moe_rpc_cancel(r->rpc, expired); /* decided, not yet told */
    step(r);
    assert_int_equal(r->replies, 2);
    assert_int_equal(r->stub.num_sent, 0);
}

static void test_call_fails_at_once(void **state) {
    rig *r = *state;
    Moesaic__V1__HealthCheckRequest request = MOESAIC__V1__HEALTH_CHECK_REQUEST__INIT;
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_UNAVAILABLE);
    greet_link(r);
    assert_int_equal(
        moe_rpc_call_start(r->rpc, PEER, "/no/such", (ProtobufCMessage *)&request, NULL, 0, INT64_MAX, on_reply, r, NULL, NULL),
        MOE_INVALID_ARGUMENT);
    r->stub.send_status = MOE_RESOURCE_EXHAUSTED;
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_RESOURCE_EXHAUSTED);
    r->stub.send_status = MOE_OK;
    moe_alloc_fail_after(1);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_RESOURCE_EXHAUSTED);
    moe_alloc_fail_after(0);
    advance(r, 2 * MOE_NS_PER_S);
    assert_int_equal(r->replies, 0);
    assert_int_equal(r->stub.num_sent, 0); /* no ping either: nothing is outstanding */
}

static void start_again(rig *r) {
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &r->id), MOE_UNAVAILABLE); /* while its peer goes down */
}

static void test_peer_down_ends_calls(void **state) {
    rig *r = *state;
    greet_link(r);
    uint64_t id;
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &id), MOE_OK);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_OK);
    r->then = start_again;
    event(r, MOE_EVENT_PEER_DOWN, PEER, LINK);
    assert_int_equal(r->replies, 2);
    assert_int_equal(r->last_status, MOE_UNAVAILABLE);
    assert_int_equal(r->replies_when_down, 2); /* all calls ended before on_peer_down */
    /* its successor on the same link: a reply to the old id finds no call */
    event(r, MOE_EVENT_PEER_UP, PEER + 1, LINK);
    say_hello(r, PEER + 1, LINK, MOE_ROLE_LOCAL, "worker", 12, MOE_PROTOCOL_VERSION);
    say_response(r, PEER + 1, id, MOE_OK, 0);
    assert_int_equal(r->replies, 2);
    /* a PEER_UP without a PEER_DOWN before it */
    assert_int_equal(start_check(r, PEER + 1, MOE_NS_PER_S, NULL), MOE_OK);
    event(r, MOE_EVENT_PEER_UP, PEER + 2, LINK);
    assert_int_equal(r->replies, 3);
    assert_int_equal(r->downs, 2);
    assert_null(moe_rpc_peer_of_link(r->rpc, LINK));
}

static void disconnect_now(rig *r) { moe_rpc_disconnect(r->rpc, LINK); }

static void test_disconnect(void **state) {
    rig *r = *state;
    greet_link(r);
    uint64_t id;
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &id), MOE_OK);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_OK);
    r->then = disconnect_now; /* from inside the first call's callback: the second one ends too */
    say_response(r, PEER, id, MOE_OK, 0);
    assert_int_equal(r->replies, 2);
    assert_int_equal(r->last_status, MOE_UNAVAILABLE);
    assert_int_equal(r->downs, 0);
    assert_null(moe_rpc_peer_of_link(r->rpc, LINK));
    moe_rpc_disconnect(r->rpc, LINK);
    event(r, MOE_EVENT_PEER_UP, PEER + 1, LINK + 1);
    moe_rpc_disconnect(r->rpc, LINK + 1); /* before its hello came */
    step(r);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == INT64_MAX);
}

static void cancel_and_start(rig *r) {
    moe_rpc_cancel(r->rpc, r->id); /* itself: ended already, or a stream that goes on */
    assert_int_equal(start_check(r, PEER, -1, NULL), MOE_OK);
    r->then = cancel_and_start; /* for ever: one a step at most */
}

static void test_callbacks_may_call(void **state) {
    rig *r = *state;
    greet_link(r);
    for (int i = 0; i < 200; i++) assert_int_equal(start_check(r, PEER, MOE_NS_PER_MS, &r->id), MOE_OK);
    stub_forget(&r->stub);
    r->then = cancel_and_start;
    advance(r, MOE_NS_PER_MS);
    assert_in_range(r->replies, 199, 600);
    int before = r->replies;
    step(r);
    assert_in_range(r->replies, before + 1, before + 800);
    r->then = NULL;
    step(r);
    step(r);
    before = r->replies;
    step(r);
    assert_int_equal(r->replies, before);
}

static void test_stream(void **state) {
    rig *r = *state;
    greet_link(r);
    uint64_t id = start_generate(r);
    stub_forget(&r->stub);
    Moesaic__V1__GenerateResponse body = MOESAIC__V1__GENERATE_RESPONSE__INIT;
    Moesaic__V1__Envelope item = envelope_of(KIND(STREAM_ITEM), id);
    for (uint32_t i = 0; i < 3; i++) {
        item.item = i;
        say(r, PEER, LINK, MOE_ROLE_LOCAL, &item, &body);
        assert_true(r->last_status == MOE_OK && !r->last_last);
        item.item = i;
        say(r, PEER, LINK, MOE_ROLE_LOCAL, &item, &body); /* duplicated */
        assert_int_equal(r->replies, (int)i + 1);
    }
    Moesaic__V1__Envelope end = envelope_of(KIND(RESPONSE), id);
    end.item = 3;
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &end, &body);
    assert_true(r->replies == 4 && r->last_last && r->last_status == MOE_OK);
    assert_int_equal(r->stub.num_sent, 0);

    id = start_generate(r); /* an item is lost */
    item = envelope_of(KIND(STREAM_ITEM), id), item.item = 1;
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &item, &body);
    assert_true(r->replies == 5 && r->last_last && r->last_status == MOE_DATA_LOSS);
    assert_int_equal(sent(r, 1, PEER)->kind, KIND(CANCEL));
    id = start_generate(r); /* the last item is lost */
    end = envelope_of(KIND(RESPONSE), id), end.item = 1;
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &end, &body);
    assert_int_equal(r->last_status, MOE_DATA_LOSS);
    id = start_generate(r); /* an error ends a stream wherever it is */
    end = envelope_of(KIND(RESPONSE), id), end.item = 9, end.status = MOE_ABORTED;
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &end, NULL);
    assert_int_equal(r->last_status, MOE_ABORTED);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &id), MOE_OK); /* an item for a unary call */
    item = envelope_of(KIND(STREAM_ITEM), id);
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &item, &body);
    assert_true(r->last_last && r->last_status == MOE_DATA_LOSS);
    r->id = start_generate(r); /* cancelled from inside its own item */
    r->then = cancel_and_start;
    item = envelope_of(KIND(STREAM_ITEM), r->id);
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &item, &body);
    r->then = NULL;
    step(r);
}

static void test_damaged_replies(void **state) {
    rig *r = *state;
    greet_link(r);
    uint64_t id;
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &id), MOE_OK);
    moe_event message = {.kind = MOE_EVENT_MESSAGE, .peer = PEER, .link = LINK, .num_frames = 2};
    Moesaic__V1__Envelope envelope = envelope_of(KIND(RESPONSE), id);
    moe_frame payload = {"abcd", 4};
    assert_int_equal(moe_envelope_pack(&r->buffers, &envelope, NULL, &payload, 1, message.frames, NULL), MOE_OK);
    message.frames[1] = (moe_frame){"abce", 4};
    stub_feed(&r->stub, &message);
    step(r);
    assert_true(r->replies == 1 && r->last_last && r->last_status == MOE_DATA_LOSS);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &id), MOE_OK);
    envelope = envelope_of(KIND(RESPONSE), id);
    envelope.body = (ProtobufCBinaryData){.len = 2, .data = (uint8_t *)"\x0a\x05"};
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &envelope, NULL);
    assert_true(r->replies == 2 && r->last_status == MOE_DATA_LOSS);
}

static void test_ping_and_progress(void **state) {
    rig *r = *state;
    greet_link(r);
    uint64_t id;
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &id), MOE_OK);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == r->clock.fake_now_ns + MOE_RPC_PING_INTERVAL_NS);
    advance(r, MOE_RPC_PING_INTERVAL_NS - 1);
    uint64_t second; /* a call in between does not put the ping off */
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &second), MOE_OK);
    moe_rpc_cancel(r->rpc, second);
    stub_forget(&r->stub);
    advance(r, 1);
    assert_int_equal(sent(r, 0, PEER)->kind, KIND(PING));
    advance(r, MOE_RPC_PING_INTERVAL_NS);
    assert_int_equal(r->stub.num_sent, 2);
    const moe_rpc_peer *peer = moe_rpc_peer_of(r->rpc, PEER);
    int64_t quiet_since = peer->progress_at_ns;
    Moesaic__V1__Envelope pong = envelope_of(KIND(PONG), 0);
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &pong, NULL); /* alive, no progress */
    assert_true(peer->progress_at_ns == quiet_since && peer->heard_at_ns == r->clock.fake_now_ns);
    pong.progress = 5;
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &pong, NULL);
    assert_true(peer->progress == 5 && peer->progress_at_ns == r->clock.fake_now_ns);
    r->clock.fake_now_ns += 10;
    pong.progress = 4; /* overtaken */
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &pong, NULL);
    assert_true(peer->progress == 5 && peer->progress_at_ns == r->clock.fake_now_ns - 10);
    say_response(r, PEER, id, MOE_OK, 0);
    stub_forget(&r->stub);
    advance(r, MOE_NS_PER_S);
    assert_int_equal(r->stub.num_sent, 0); /* nothing outstanding, no ping */
    r->progress = 77;
    Moesaic__V1__Envelope ping = envelope_of(KIND(PING), 0);
    say(r, PEER, LINK, MOE_ROLE_LOCAL, &ping, NULL);
    assert_true(sent(r, 0, PEER)->kind == KIND(PONG) && r->read->progress == 77);
    say(r, PEER + 9, LINK, MOE_ROLE_LOCAL, &ping, NULL); /* a stranger's */
    assert_int_equal(r->stub.num_sent, 1);
}

static void test_config_checked(void **state) {
    rig *r = *state;
    moe_rpc *rpc;
    moe_error err;
    moe_rpc_config config = config_of(r);
    const moe_rpc_method wrong[] = {{"/moesaic.v1.Health/Chek", on_check, 0}, {0}};
    config.methods = wrong;
    assert_int_equal(moe_rpc_new(&config, &rpc, &err), MOE_INVALID_ARGUMENT);
    config.methods = NULL;
    for (int i = 1; i <= 5; i++) {
        moe_alloc_fail_after(i);
        assert_int_equal(moe_rpc_new(&config, &rpc, &err), MOE_RESOURCE_EXHAUSTED);
        assert_null(rpc);
    }
    moe_alloc_fail_after(0);
}

/* A restarted process counts its calls from elsewhere, so that no answer meant for the process before it finds a call. */
static void test_call_ids_differ_between_incarnations(void **state) {
    rig *r = *state;
    uint64_t first, second;
    greet_link(r);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &first), MOE_OK);
    moe_rpc_free(&r->rpc);
    moe_rpc_config config = config_of(r);
    config.hello.incarnation++;
    assert_int_equal(moe_rpc_new(&config, &r->rpc, NULL), MOE_OK);
    r->ups = 0;
    greet_link(r);
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, &second), MOE_OK);
    assert_true((first > second ? first - second : second - first) > 1000 * 1000);
}

static void test_tables_full(void **state) {
    rig *r = *state;
    greet_link(r);
    greet_accepted(r, PEER + 1, MOE_ROLE_LOCAL, "router");
    for (int i = 0; i < MOE_RPC_MAX_CALLS; i++) {
        assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_OK);
        stub_forget(&r->stub);
        r->num_held = 0; /* the rpc frees them */
        say_request(r, PEER + 1, MOE_ROLE_LOCAL, (uint64_t)i, CHECK, 1000 + (uint64_t)i);
    }
    assert_int_equal(start_check(r, PEER, MOE_NS_PER_S, NULL), MOE_RESOURCE_EXHAUSTED);
    say_request(r, PEER + 1, MOE_ROLE_LOCAL, UINT64_MAX, CHECK, 0);
    assert_int_equal(sent(r, 0, PEER + 1)->status, MOE_RESOURCE_EXHAUSTED);
    assert_int_equal(r->requests, MOE_RPC_MAX_CALLS);
    advance(r, 1500 * MOE_NS_PER_US); /* some of the served calls expire, the others' deadlines stay in force */
    assert_int_equal(r->cancels, 501);
    assert_true(moe_rpc_next_deadline_ns(r->rpc) == r->clock.fake_now_ns + MOE_NS_PER_US);
    advance(r, MOE_NS_PER_S);
    assert_int_equal(r->cancels, MOE_RPC_MAX_CALLS);
    assert_int_equal(r->replies, MOE_RPC_MAX_CALLS);
}

static void test_hello_without_means(void **state) {
    rig *r = *state;
    r->stub.send_status = MOE_RESOURCE_EXHAUSTED; /* the first hello does not get out: repeated */
    event(r, MOE_EVENT_PEER_UP, PEER, LINK);
    r->stub.send_status = MOE_OK;
    assert_int_equal(r->stub.num_sent, 0);
    advance(r, MOE_RPC_HELLO_INTERVAL_NS);
    assert_int_equal(sent(r, 0, PEER)->kind, KIND(HELLO));
    stub_feed(&r->stub, &(moe_event){.kind = MOE_EVENT_PEER_UP, .peer = PEER + 1, .link = LINK + 1});
    moe_alloc_fail_after(1);
    step(r);
    moe_alloc_fail_after(0);
    assert_int_equal(r->stub.num_sent, 1);
    say_hello(r, PEER + 1, LINK + 1, MOE_ROLE_LOCAL, "worker", 1, MOE_PROTOCOL_VERSION);
    assert_null(moe_rpc_peer_of_link(r->rpc, LINK + 1));
    r->stub.send_status = MOE_UNAVAILABLE; /* a refusal that finds its peer gone */
    int64_t dropped = moe_metric_value(MOE_METRIC_REPLIES_DROPPED);
    say_request(r, PEER + 9, MOE_ROLE_LOCAL, 1, CHECK, 0);
    assert_int_equal(moe_metric_value(MOE_METRIC_REPLIES_DROPPED) - dropped, 1);
}

/* Every allocation of a whole conversation fails in turn: each call still ends at most once and nothing leaks or crashes. */
static void test_every_allocation_fails(void **state) {
    rig *r = *state;
    int failed_starts = 0;
    greet_link(r);
    r->respond_at_once = true;
    for (int i = 1; i < 60; i++) {
        uint64_t id = 0;
        int before = r->replies;
        moe_alloc_fail_after(i);
        moe_status status = start_check(r, PEER, MOE_NS_PER_S, &id);
        moe_alloc_fail_after(0);
        if (status != MOE_OK) {
            failed_starts++;
            continue;
        }
        moe_event message = {.kind = MOE_EVENT_MESSAGE, .peer = PEER, .link = LINK, .num_frames = 1};
        Moesaic__V1__Envelope response = envelope_of(KIND(RESPONSE), id);
        Moesaic__V1__HealthCheckResponse body = MOESAIC__V1__HEALTH_CHECK_RESPONSE__INIT;
        assert_int_equal(moe_envelope_pack(&r->buffers, &response, (ProtobufCMessage *)&body, NULL, 0, message.frames, NULL),
                         MOE_OK);
        stub_feed(&r->stub, &message);
        Moesaic__V1__Envelope request = envelope_of(KIND(REQUEST), 1000 + (uint64_t)i);
        request.method = (char *)CHECK;
        assert_int_equal(moe_envelope_pack(&r->buffers, &request, NULL, NULL, 0, message.frames, NULL), MOE_OK);
        message.link = 0;
        stub_feed(&r->stub, &message);
        moe_alloc_fail_after(i);
        step(r);
        moe_alloc_fail_after(0);
        assert_int_equal(r->replies, before + 1);
        stub_forget(&r->stub);
    }
    assert_int_equal(failed_starts, 1);
}

int main(void) {
    moe_log_init(MOE_LOG_OFF, "test");
#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(test_hello_as_client),
        T(test_hello_as_server),
        T(test_hello_refused_by_us),
        T(test_hello_refused_by_them),
        T(test_hello_bad),
        T(test_peer_table_full),
        T(test_admission),
        T(test_bad_messages_are_answered),
        T(test_served_deadline_and_cancel),
        T(test_free_with_held_calls),
        T(test_answers_that_cannot_be_sent),
        T(test_unary_call),
        T(test_call_deadline_and_cancel),
        T(test_call_fails_at_once),
        T(test_peer_down_ends_calls),
        T(test_disconnect),
        T(test_callbacks_may_call),
        T(test_stream),
        T(test_damaged_replies),
        T(test_ping_and_progress),
        T(test_config_checked),
        T(test_call_ids_differ_between_incarnations),
        T(test_tables_full),
        T(test_hello_without_means),
        T(test_every_allocation_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
