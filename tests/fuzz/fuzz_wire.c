/* Fuzz target of everything that reads bytes from a peer. The first byte chooses what the rest is:
 *   0  a message, as frames, to a live rpc that serves all methods and has calls outstanding
 *   1  a ForwardRequest and its payload, as frames, to the worker's validator (no CRC in the way)
 *   2  a ForwardResponse and its payload, as frames, to the router's validator
 *   3  two bytes that choose a method and a side, then that method's message, to the unpacker
 * Frames: each a length (u16, little-endian) and its bytes, the last one cut to what is left. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/cursor.h"
#include "common/log.h"
#include "proto/envelope.h"
#include "proto/forward.h"
#include "proto/methods.h"
#include "tests/support/stub_transport.h"

#define MAX_METHODS 64
#define FUZZ_PEER 7
#define OUR_INCARNATION 2001

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool holds) {
    if (!holds) abort();
}

static int take_frames(moe_cursor *c, moe_frame frames[MOE_MAX_FRAMES]) {
    int count = 0;
    while (count < MOE_MAX_FRAMES && c->left >= 2) {
        size_t size = ((const uint8_t *)moe_cursor_take(c, 1))[0];
        size |= (size_t)((const uint8_t *)moe_cursor_take(c, 1))[0] << 8;
        if (size > c->left) size = c->left;
        frames[count].size = size;
        frames[count++].data = moe_cursor_take(c, size);
    }
    return count;
}

/* ---- 0: a live rpc ---- */

static void serve_any(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload, int num_payload) {
    (void)ctx, (void)payload, (void)num_payload;
    check(request != NULL);
    moe_rpc_fail(call, MOE_ABORTED, "fuzzed", NULL);
}

static void count_end(void *ctx, const moe_rpc_reply *reply) { *(int *)ctx += reply->last; }

static void feed(stub_transport *stub, moe_rpc *rpc, const moe_frame *frames, int num_frames) {
    moe_event event = {.kind = MOE_EVENT_MESSAGE, .peer = FUZZ_PEER, .num_frames = num_frames};
    memcpy(event.frames, frames, (size_t)num_frames * sizeof *frames);
    stub_feed(stub, &event);
    check(moe_rpc_step(rpc, 0, NULL) == MOE_OK);
}

static void say_hello(stub_transport *stub, moe_rpc *rpc) {
    moe_envelope_buffers buffers = {0};
    moe_frame frames[MOE_MAX_FRAMES];
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    Moesaic__V1__Hello hello = MOESAIC__V1__HELLO__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__HELLO;
    hello.protocol = MOE_PROTOCOL_VERSION;
    check(moe_envelope_pack(&buffers, &envelope, (ProtobufCMessage *)&hello, NULL, 0, frames, NULL) == MOE_OK);
    feed(stub, rpc, frames, 1);
    moe_envelope_buffers_free(&buffers);
}

/* The fuzzed message may name these calls: ids count from the one that the incarnation determines. */
static void start_calls(moe_rpc *rpc, int *ends) {
    Moesaic__V1__ModelsRequest models = MOESAIC__V1__MODELS_REQUEST__INIT;
    Moesaic__V1__GenerateRequest generate = MOESAIC__V1__GENERATE_REQUEST__INIT;
    check(moe_rpc_call_start(rpc, FUZZ_PEER, "/moesaic.v1.InferenceService/Models", (ProtobufCMessage *)&models, NULL, 0,
                             INT64_MAX, count_end, &ends[0], NULL, NULL) == MOE_OK);
    check(moe_rpc_call_start(rpc, FUZZ_PEER, "/moesaic.v1.InferenceService/Generate", (ProtobufCMessage *)&generate, NULL, 0,
                             INT64_MAX, count_end, &ends[1], NULL, NULL) == MOE_OK);
}

static int list_methods(char names[MAX_METHODS][96], moe_rpc_method rows[MAX_METHODS + 1]) {
    int count = 0;
    for (int s = 0; moe_services[s]; s++) {
        for (unsigned m = 0; m < moe_services[s]->n_methods && count < MAX_METHODS; m++, count++) {
            snprintf(names[count], 96, "/%s/%s", moe_services[s]->name, moe_services[s]->methods[m].name);
            if (rows) rows[count] = (moe_rpc_method){names[count], serve_any, 0};
        }
    }
    return count;
}

static void fuzz_rpc(moe_cursor *c) {
    char names[MAX_METHODS][96];
    moe_rpc_method rows[MAX_METHODS + 1] = {0};
    list_methods(names, rows);
    static stub_transport stub;
    stub_init(&stub);
    moe_clock clock = moe_clock_fake(0);
    moe_rpc *rpc;
    moe_rpc_config config = {
        .transport = &stub.base,
        .clock = &clock,
        .hello = {.cluster_uuid = "c", .role = "router", .id = "r0", .profile = "", .incarnation = OUR_INCARNATION},
        .methods = rows,
    };
    check(moe_rpc_new(&config, &rpc, NULL) == MOE_OK);
    say_hello(&stub, rpc);
    int ends[2] = {0};
    start_calls(rpc, ends);
    moe_frame frames[MOE_MAX_FRAMES];
    int num_frames = take_frames(c, frames);
    feed(&stub, rpc, frames, num_frames);
    feed(&stub, rpc, frames, num_frames); /* and as a duplicate */
    moe_rpc_free(&rpc);
    check(ends[0] == 1 && ends[1] == 1);
    stub_close(&stub);
}

/* ---- 1, 2: Forward ---- */

static ProtobufCMessage *unpack(const ProtobufCMessageDescriptor *type, const moe_frame *frame) {
    ProtobufCMessage *message;
    moe_wire_unpack(type, frame->data, frame->size, &message, NULL);
    return message;
}

/* As a worker of that dtype decodes it. */
static void decode_forward_request(const ProtobufCMessage *header, const moe_frame *payload, int num_payload, moe_dtype dtype) {
    const moe_forward_limits limits = {
        .num_moe_layers = 4, .num_experts = 8, .top_k = 2, .hidden = 4, .cluster_uuid = "", .dtype = dtype};
    moe_forward_call call;
    void *scratch;
    if (moe_forward_decode((const Moesaic__V1__ForwardRequest *)header, payload, num_payload, &limits, &call, &scratch, NULL) ==
        MOE_OK) {
        check(call.layer < 4 && call.rows > 0 && call.assignments > 0 && call.num_hints <= MOE_FORWARD_MAX_HINTS);
        check(moe_elements_finite(call.activations, dtype, (size_t)call.rows * 4)); /* and all of them can be read */
        for (int32_t i = 0; i < call.assignments; i++)
            check(call.assignment_rows[i] < (uint32_t)call.rows && call.assignment_experts[i] < 8);
        for (int32_t i = 0; i < call.num_hints; i++) check(call.hints[i] < 8);
        for (int32_t i = 0; call.assignment_weights && i < call.assignments; i++)
            check(call.assignment_weights[i] - call.assignment_weights[i] == 0); /* finite */
    }
    moe_free(scratch);
}

static void fuzz_forward_request(moe_cursor *c) {
    moe_frame frames[MOE_MAX_FRAMES];
    int num_frames = take_frames(c, frames);
    ProtobufCMessage *header = num_frames > 0 ? unpack(&moesaic__v1__forward_request__descriptor, &frames[0]) : NULL;
    if (!header) return;
    decode_forward_request(header, frames + 1, num_frames - 1, MOE_F32);
    decode_forward_request(header, frames + 1, num_frames - 1, MOE_BF16);
    moe_wire_free(header);
}

static void fuzz_forward_response(moe_cursor *c) {
    moe_frame frames[MOE_MAX_FRAMES];
    int num_frames = take_frames(c, frames);
    ProtobufCMessage *body = num_frames > 0 ? unpack(&moesaic__v1__forward_response__descriptor, &frames[0]) : NULL;
    if (!body) return;
    moe_rpc_reply reply = {.message = "", .last = true, .body = body, .payload = frames + 1, .num_payload = num_frames - 1};
    moe_forward_result result;
    if (moe_forward_decode_reply(&reply, &(moe_forward_expected){MOE_F32, 2, 4, 0}, &result, NULL) == MOE_OK) {
        float last;
        memcpy(&last, (const uint8_t *)result.out + 7 * sizeof last, sizeof last);
        check(last - last == 0);
    }
    moe_wire_free(body);
}

/* ---- 3: any message ---- */

static void fuzz_message(moe_cursor *c) {
    char names[MAX_METHODS][96];
    int count = list_methods(names, NULL);
    const uint8_t *choice = moe_cursor_take(c, 2);
    moe_method method;
    if (!choice) return;
    check(moe_method_find(names[choice[0] % count], &method));
    moe_frame frame = {.data = c->at, .size = c->left};
    ProtobufCMessage *message = unpack(choice[1] & 1 ? method.response : method.request, &frame);
    moe_buf packed = {0};
    if (message) check(moe_wire_pack(message, SIZE_MAX, &packed, NULL) == MOE_OK); /* what was read can be written */
    moe_buf_free(&packed);
    moe_wire_free(message);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*const targets[])(moe_cursor *) = {fuzz_rpc, fuzz_forward_request, fuzz_forward_response, fuzz_message};
    moe_log_init(MOE_LOG_OFF, "fuzz");
    if (size == 0) return 0;
    moe_cursor c = moe_cursor_of(data + 1, size - 1);
    targets[data[0] % 4](&c);
    return 0;
}
