/* The Forward call: encoding, and the validator of both directions field by field. */
/* clang-format off */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
/* clang-format on */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/inproc/inproc.h"
#include "common/log.h"
#include "common/random.h"
#include "proto/forward.h"
#include "proto/wire.h"

#define ROWS 3
#define WIDTH 70 /* more than one block of the finiteness check, and not a multiple of it */
#define ASSIGNMENTS 5
#define EXPERTS 8

static const moe_forward_limits limits = {.num_moe_layers = 4,
                                          .num_experts = EXPERTS,
                                          .top_k = 2,
                                          .hidden = WIDTH,
                                          .model_digest = 0xabcd,
                                          .cluster_uuid = "uuid",
                                          .incarnation = 77};

/* A valid request, kept apart so that a test spoils one thing. */
typedef struct sample {
    Moesaic__V1__ForwardRequest header;
    float activations[ROWS * WIDTH];
    uint32_t rows[ASSIGNMENTS], experts[ASSIGNMENTS], hints[2];
    float weights[ASSIGNMENTS];
    moe_frame payload[4];
    int num_payload;
} sample;

static void sample_init(sample *s, moe_combine_mode mode) {
    static const uint32_t rows[ASSIGNMENTS] = {0, 2, 1, 0, 2}, experts[ASSIGNMENTS] = {0, 0, 3, 7, 7};
    *s = (sample){.header = MOESAIC__V1__FORWARD_REQUEST__INIT, .hints = {7, 0}};
    for (int i = 0; i < ROWS * WIDTH; i++) s->activations[i] = (float)i - 100.5f;
    memcpy(s->rows, rows, sizeof rows);
    memcpy(s->experts, experts, sizeof experts);
    for (int i = 0; i < ASSIGNMENTS; i++) s->weights[i] = 0.25f * (float)i;
    Moesaic__V1__ForwardRequest *h = &s->header;
    h->cluster_uuid = (char *)"uuid", h->epoch = 9, h->incarnation = 77, h->request_id = 5, h->step = 6, h->micro_batch = 1;
    h->attempt = 2, h->layer = 3, h->dtype = MOESAIC__V1__DTYPE__FLOAT32, h->rows = ROWS, h->width = WIDTH;
    h->assignments = ASSIGNMENTS, h->block_lo = 0, h->block_hi = MOE_FFN_BLOCKS, h->model_digest = 0xabcd;
    h->combine = mode == MOE_COMBINE_EXACT ? MOESAIC__V1__COMBINE_MODE__EXACT : MOESAIC__V1__COMBINE_MODE__PARTIAL;
    h->n_hint = 2, h->hint = s->hints;
    s->payload[0] = (moe_frame){s->activations, sizeof s->activations};
    s->payload[1] = (moe_frame){s->rows, sizeof s->rows};
    s->payload[2] = (moe_frame){s->experts, sizeof s->experts};
    s->payload[3] = (moe_frame){s->weights, sizeof s->weights};
    s->num_payload = mode == MOE_COMBINE_EXACT ? 3 : 4;
}

static moe_status decode(const sample *s) {
    moe_forward_call call;
    moe_error err = {0};
    void *scratch;
    moe_status status = moe_forward_decode(&s->header, s->payload, s->num_payload, &limits, &call, &scratch, &err);
    assert_true(status == MOE_OK || (!scratch && err.code == status && err.message[0]));
    moe_free(scratch);
    return status;
}

static void test_decode_valid(void **state) {
    (void)state;
    for (int mode = MOE_COMBINE_EXACT; mode <= MOE_COMBINE_PARTIAL; mode++) {
        sample s;
        moe_forward_call call;
        void *scratch;
        sample_init(&s, (moe_combine_mode)mode);
        assert_int_equal(moe_forward_decode(&s.header, s.payload, s.num_payload, &limits, &call, &scratch, NULL), MOE_OK);
        assert_true(call.epoch == 9 && call.incarnation == 77 && call.request_id == 5 && call.step == 6 && call.micro_batch == 1);
        assert_true(call.attempt == 2 && call.layer == 3 && call.rows == ROWS && call.assignments == ASSIGNMENTS);
        assert_true(call.block_lo == 0 && call.block_hi == MOE_FFN_BLOCKS && (int)call.combine == mode &&
                    call.model_digest == 0xabcd);
        assert_string_equal(call.cluster_uuid, "uuid");
        assert_true(call.num_hints == 2 && call.hints != s.hints && call.hints[0] == 7 && call.hints[1] == 0);
        assert_ptr_equal(call.activations, s.activations);
        assert_ptr_equal(call.assignment_rows, s.rows); /* aligned: used in place */
        assert_ptr_equal(call.assignment_experts, s.experts);
        assert_ptr_equal(call.assignment_weights, mode == MOE_COMBINE_PARTIAL ? s.weights : NULL);
        moe_free(scratch);
        s.header.n_hint = 0;
        assert_int_equal(moe_forward_decode(&s.header, s.payload, s.num_payload, &limits, &call, &scratch, NULL), MOE_OK);
        assert_null(scratch); /* nothing to copy */
    }
}

static void test_decode_unaligned(void **state) {
    (void)state;
    sample s;
    moe_forward_call call;
    void *scratch;
    sample_init(&s, MOE_COMBINE_PARTIAL);
    char *odd[4];
    for (int i = 0; i < 4; i++) {
        odd[i] = malloc(s.payload[i].size + 1);
        assert_non_null(odd[i]);
        memcpy(odd[i] + 1, s.payload[i].data, s.payload[i].size);
        s.payload[i].data = odd[i] + 1;
    }
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 4, &limits, &call, &scratch, NULL), MOE_OK);
    assert_ptr_equal(call.activations, odd[0] + 1);
    assert_memory_equal(call.assignment_rows, s.rows, sizeof s.rows);
    assert_memory_equal(call.assignment_experts, s.experts, sizeof s.experts);
    assert_memory_equal(call.assignment_weights, s.weights, sizeof s.weights);
    assert_memory_equal(call.hints, s.hints, sizeof s.hints);
    assert_true((uintptr_t)call.assignment_rows % 4 == 0 && (uintptr_t)call.assignment_weights % 4 == 0);
    moe_free(scratch);
    moe_alloc_fail_after(1);
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 4, &limits, &call, &scratch, NULL), MOE_RESOURCE_EXHAUSTED);
    moe_alloc_fail_after(0);
    assert_null(scratch);
    for (int i = 0; i < 4; i++) free(odd[i]);
}

#define SPOIL(expected, mode, ...)                  \
    do {                                            \
        sample s;                                   \
        sample_init(&s, mode);                      \
        Moesaic__V1__ForwardRequest *h = &s.header; \
        (void)h;                                    \
        __VA_ARGS__;                                \
        assert_int_equal(decode(&s), expected);     \
    } while (0)
#define EXACT MOE_COMBINE_EXACT
#define PARTIAL MOE_COMBINE_PARTIAL

static void test_identity(void **state) {
    (void)state;
    SPOIL(MOE_OK, EXACT, );
    SPOIL(MOE_FAILED_PRECONDITION, EXACT, h->cluster_uuid = (char *)"uuie");
    SPOIL(MOE_FAILED_PRECONDITION, EXACT, h->cluster_uuid = (char *)"");
    SPOIL(MOE_FAILED_PRECONDITION, EXACT, h->model_digest ^= 1);
    SPOIL(MOE_UNAVAILABLE, EXACT, h->incarnation = 76);
}

static void test_header_fields(void **state) {
    (void)state;
    static uint32_t many[MOE_FORWARD_MAX_HINTS + 1];
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->layer = 4);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->layer = UINT32_MAX);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->dtype = MOESAIC__V1__DTYPE__BFLOAT16);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->dtype = MOESAIC__V1__DTYPE__DTYPE_UNSPECIFIED);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->dtype = (Moesaic__V1__DType)-7);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->rows = 0);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->rows = ROWS + 1);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->rows = ROWS - 1);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->rows = MOE_FORWARD_MAX_ROWS + 1);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->rows = UINT32_MAX);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->width = WIDTH + 1);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->width = UINT32_MAX);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->assignments = 0);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->assignments = ASSIGNMENTS - 1);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->assignments = ASSIGNMENTS + 1);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->assignments = ROWS * 2 + 1);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->assignments = UINT32_MAX);
    SPOIL(MOE_OK, EXACT, (h->block_lo = 4, h->block_hi = 6));
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, (h->block_lo = 3, h->block_hi = 5));
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, (h->block_lo = 8, h->block_hi = 8));
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, (h->block_lo = 0, h->block_hi = 16));
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, (h->block_lo = UINT32_MAX, h->block_hi = 0));
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, (h->block_lo = UINT32_C(0x80000000), h->block_hi = 8));
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->combine = MOESAIC__V1__COMBINE_MODE__COMBINE_UNSPECIFIED);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, h->combine = (Moesaic__V1__CombineMode)3);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.hints[1] = EXPERTS);
    SPOIL(MOE_OK, EXACT, (h->hint = many, h->n_hint = MOE_FORWARD_MAX_HINTS));
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, (h->hint = many, h->n_hint = MOE_FORWARD_MAX_HINTS + 1));
}

static void test_frames(void **state) {
    (void)state;
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.num_payload = 4);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.num_payload = 2);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.num_payload = 0);
    SPOIL(MOE_INVALID_ARGUMENT, PARTIAL, s.num_payload = 3);
    for (int i = 0; i < 4; i++) {
        SPOIL(MOE_INVALID_ARGUMENT, PARTIAL, s.payload[i].size--);
        SPOIL(MOE_INVALID_ARGUMENT, PARTIAL, s.payload[i].size -= 4);
        SPOIL(MOE_INVALID_ARGUMENT, PARTIAL, s.payload[i].size = 0);
        SPOIL(MOE_INVALID_ARGUMENT, PARTIAL, s.payload[i].size++);
    }
}

static void test_assignments(void **state) {
    (void)state;
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.rows[4] = ROWS);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.rows[4] = UINT32_MAX);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.experts[4] = EXPERTS);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.experts[4] = UINT32_MAX);
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.rows[1] = 0);    /* the same assignment twice */
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.rows[4] = 0);    /* twice, at the end */
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.rows[0] = 2);    /* rows of an expert descend */
    SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.experts[0] = 3); /* experts descend */
    SPOIL(MOE_OK, EXACT, s.experts[2] = 1);
}

static void test_not_finite(void **state) {
    (void)state;
    const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    for (int b = 0; b < 4; b++) {
        for (int i = 0; i < ROWS * WIDTH; i++) SPOIL(MOE_INVALID_ARGUMENT, EXACT, s.activations[i] = bad[b]);
        for (int i = 0; i < ASSIGNMENTS; i++) SPOIL(MOE_INVALID_ARGUMENT, PARTIAL, s.weights[i] = bad[b]);
    }
    SPOIL(MOE_OK, PARTIAL, (s.activations[0] = 0x1.fffffep127f, s.activations[1] = -0.0f, s.weights[0] = 0x1p-149f));
    SPOIL(MOE_OK, EXACT, s.weights[0] = NAN); /* not sent in exact mode */
}

/* A worker of the bfloat16 profile: half the bytes, the same checks. */
static void test_bfloat16(void **state) {
    (void)state;
    static const uint16_t bad[] = {0x7f80, 0xff80, 0x7fc0, 0xff81};
    moe_forward_limits narrow = limits;
    narrow.dtype = MOE_BF16;
    sample s;
    uint16_t activations[ROWS * WIDTH];
    moe_forward_call call;
    moe_error err;
    void *scratch;
    sample_init(&s, MOE_COMBINE_EXACT);
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 3, &narrow, &call, &scratch, &err), MOE_INVALID_ARGUMENT);
    assert_non_null(strstr(err.message, "float32 activations, this worker computes in bfloat16"));
    s.header.dtype = MOESAIC__V1__DTYPE__BFLOAT16;
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 3, &narrow, &call, &scratch, NULL), MOE_INVALID_ARGUMENT);
    moe_elements_narrow(s.activations, MOE_BF16, ROWS * WIDTH, activations);
    s.payload[0] = (moe_frame){activations, sizeof activations};
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 3, &narrow, &call, &scratch, NULL), MOE_OK);
    assert_int_equal(call.dtype, MOE_BF16);
    assert_ptr_equal(call.activations, activations);
    moe_free(scratch);
    for (int b = 0; b < 4; b++)
        for (int i = 0; i < ROWS * WIDTH; i++) {
            uint16_t kept = activations[i];
            activations[i] = bad[b];
            assert_int_equal(moe_forward_decode(&s.header, s.payload, 3, &narrow, &call, &scratch, NULL), MOE_INVALID_ARGUMENT);
            activations[i] = kept;
        }
    activations[0] = 0x7f7f, activations[1] = 0xff7f, activations[2] = 0x8000; /* the largest, the least, -0 */
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 3, &narrow, &call, &scratch, NULL), MOE_OK);
    moe_free(scratch);
}

static void test_more_assignments_than_top_k(void **state) {
    (void)state;
    moe_forward_limits top1 = limits;
    top1.top_k = 1;
    sample s;
    moe_forward_call call;
    void *scratch;
    sample_init(&s, EXACT); /* 5 assignments of 3 rows */
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 3, &top1, &call, &scratch, NULL), MOE_INVALID_ARGUMENT);
    assert_null(scratch);
}

/* Overflowing products with a receiver whose own limits are as large as they get. */
static void test_overflow(void **state) {
    (void)state;
    const moe_forward_limits large = {.num_moe_layers = INT32_MAX,
                                      .num_experts = INT32_MAX,
                                      .top_k = INT32_MAX,
                                      .hidden = INT32_MAX,
                                      .model_digest = 0xabcd,
                                      .cluster_uuid = "uuid",
                                      .incarnation = 77};
    sample s;
    moe_forward_call call;
    void *scratch;
    sample_init(&s, EXACT);
    s.header.rows = MOE_FORWARD_MAX_ROWS, s.header.width = INT32_MAX, s.header.assignments = UINT32_MAX;
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 3, &large, &call, &scratch, NULL), MOE_INVALID_ARGUMENT);
    s.payload[0].size = (size_t)(uint32_t)(MOE_FORWARD_MAX_ROWS * UINT64_C(0x7fffffff) * 4); /* the product cut to 32 bits */
    assert_int_equal(moe_forward_decode(&s.header, s.payload, 3, &large, &call, &scratch, NULL), MOE_INVALID_ARGUMENT);
    Moesaic__V1__ForwardResponse response = MOESAIC__V1__FORWARD_RESPONSE__INIT;
    response.dtype = MOESAIC__V1__DTYPE__FLOAT32, response.rows = INT32_MAX, response.width = INT32_MAX;
    moe_frame frame = {"", 0}; /* 2^31-1 squared, times 4, cut to 64 bits is not 0, but near */
    moe_rpc_reply reply = {.message = "", .body = (ProtobufCMessage *)&response, .payload = &frame, .num_payload = 1};
    moe_forward_result result;
    assert_int_equal(moe_forward_decode_reply(&reply, &(moe_forward_expected){MOE_F32, INT32_MAX, INT32_MAX, 0}, &result, NULL),
                     MOE_DATA_LOSS);
}

/* Any change of a byte, in frames of exactly the size that they had: never a read beyond, never a crash, a value or an error. */
static void test_mutations(void **state) {
    (void)state;
    sample base;
    sample_init(&base, PARTIAL);
    moe_buf packed = {0};
    assert_int_equal(moe_wire_pack((ProtobufCMessage *)&base.header, 65536, &packed, NULL), MOE_OK);
    moe_random random = {.state = 11};
    int ok = 0, refused = 0;
    for (int round = 0; round < 20000; round++) {
        moe_frame frames[5] = {{packed.data, packed.size}, base.payload[0], base.payload[1], base.payload[2], base.payload[3]};
        uint8_t *copies[5];
        for (int i = 0; i < 5; i++) {
            size_t cut = moe_random_below(&random, 8) == 0 ? moe_random_below(&random, frames[i].size + 1) : 0;
            size_t size = frames[i].size - cut;
            copies[i] = malloc(size ? size : 1);
            assert_non_null(copies[i]);
            memcpy(copies[i], frames[i].data, size);
            if (moe_random_below(&random, 3) == 0 && size > 0)
                copies[i][moe_random_below(&random, size)] ^= (uint8_t)(1 << moe_random_below(&random, 8));
            frames[i] = (moe_frame){copies[i], size};
        }
        ProtobufCMessage *header;
        moe_status status =
            moe_wire_unpack(&moesaic__v1__forward_request__descriptor, frames[0].data, frames[0].size, &header, NULL);
        if (status == MOE_OK) {
            moe_forward_call call;
            void *scratch;
            status = moe_forward_decode((Moesaic__V1__ForwardRequest *)header, frames + 1, 3 + (int)moe_random_below(&random, 2),
                                        &limits, &call, &scratch, NULL);
            if (status == MOE_OK) assert_true(call.rows == ROWS && call.assignment_experts[ASSIGNMENTS - 1] < EXPERTS);
            moe_free(scratch);
        }
        moe_wire_free(header);
        for (int i = 0; i < 5; i++) free(copies[i]);
        ok += status == MOE_OK;
        refused += status != MOE_OK;
    }
    assert_in_range(ok, 100, 19000);
    assert_in_range(refused, 1000, 19900);
    moe_buf_free(&packed);
}

/* ---- replies ---- */

typedef struct result_sample {
    Moesaic__V1__ForwardResponse header;
    float out[ASSIGNMENTS * WIDTH];
    moe_frame payload[2];
    moe_rpc_reply reply;
} result_sample;

static const moe_forward_expected expected_reply = {MOE_F32, ASSIGNMENTS, WIDTH, 77};

static void result_init(result_sample *s) {
    *s = (result_sample){.header = MOESAIC__V1__FORWARD_RESPONSE__INIT};
    for (int i = 0; i < ASSIGNMENTS * WIDTH; i++) s->out[i] = (float)i;
    Moesaic__V1__ForwardResponse *h = &s->header;
    h->incarnation = 77, h->epoch = 9, h->shard_digest = 123, h->dtype = MOESAIC__V1__DTYPE__FLOAT32;
    h->rows = ASSIGNMENTS, h->width = WIDTH, h->compute_ns = 10, h->queue_ns = 20, h->copy_ns = 30;
    s->payload[0] = (moe_frame){s->out, sizeof s->out};
    s->reply =
        (moe_rpc_reply){.message = "", .last = true, .body = (ProtobufCMessage *)h, .payload = s->payload, .num_payload = 1};
}

#define SPOIL_REPLY(expected, ...)                                                                   \
    do {                                                                                             \
        result_sample s;                                                                             \
        moe_forward_result out;                                                                      \
        result_init(&s);                                                                             \
        __VA_ARGS__;                                                                                 \
        assert_int_equal(moe_forward_decode_reply(&s.reply, &expected_reply, &out, NULL), expected); \
    } while (0)

static void test_reply(void **state) {
    (void)state;
    result_sample s;
    moe_forward_result out;
    result_init(&s);
    assert_int_equal(moe_forward_decode_reply(&s.reply, &expected_reply, &out, NULL), MOE_OK);
    assert_true(out.incarnation == 77 && out.epoch == 9 && out.shard_digest == 123 && out.compute_ns == 10 && out.queue_ns == 20);
    assert_int_equal(out.copy_ns, 30);
    assert_ptr_equal(out.out, s.out);
    moe_error err = {0};
    s.payload[0].size = 4;
    assert_int_equal(moe_forward_decode_reply(&s.reply, &expected_reply, &out, &err), MOE_DATA_LOSS);
    assert_int_equal(err.code, MOE_DATA_LOSS);
}

static void test_spoiled_replies(void **state) {
    (void)state;
    SPOIL_REPLY(MOE_UNAVAILABLE, s.header.incarnation = 78);
    SPOIL_REPLY(MOE_NOT_FOUND, (s.reply.status = MOE_NOT_FOUND, s.reply.body = NULL));
    SPOIL_REPLY(MOE_DATA_LOSS, s.header.dtype = MOESAIC__V1__DTYPE__BFLOAT16);
    SPOIL_REPLY(MOE_DATA_LOSS, s.header.rows--);
    SPOIL_REPLY(MOE_DATA_LOSS, s.header.rows = UINT32_MAX);
    SPOIL_REPLY(MOE_DATA_LOSS, s.header.width++);
    SPOIL_REPLY(MOE_DATA_LOSS, s.reply.num_payload = 0);
    SPOIL_REPLY(MOE_DATA_LOSS, s.reply.num_payload = 2);
    SPOIL_REPLY(MOE_DATA_LOSS, s.payload[0].size--);
    SPOIL_REPLY(MOE_DATA_LOSS, s.payload[0].size += 4);
    SPOIL_REPLY(MOE_DATA_LOSS, s.out[ASSIGNMENTS * WIDTH - 1] = NAN);
    SPOIL_REPLY(MOE_DATA_LOSS, s.out[0] = -INFINITY);
}

/* Partial sums of the bfloat16 profile. */
static void test_bfloat16_reply(void **state) {
    (void)state;
    const moe_forward_expected narrow = {MOE_BF16, ASSIGNMENTS, WIDTH, 77};
    result_sample s;
    uint16_t sums[ASSIGNMENTS * WIDTH] = {0};
    moe_forward_result out;
    result_init(&s);
    assert_int_equal(moe_forward_decode_reply(&s.reply, &narrow, &out, NULL), MOE_DATA_LOSS);
    s.header.dtype = MOESAIC__V1__DTYPE__BFLOAT16;
    assert_int_equal(moe_forward_decode_reply(&s.reply, &narrow, &out, NULL), MOE_DATA_LOSS);
    s.payload[0] = (moe_frame){sums, sizeof sums};
    assert_int_equal(moe_forward_decode_reply(&s.reply, &narrow, &out, NULL), MOE_OK);
    assert_true(out.dtype == MOE_BF16 && out.out == sums);
    sums[ASSIGNMENTS * WIDTH - 1] = 0x7f80;
    assert_int_equal(moe_forward_decode_reply(&s.reply, &narrow, &out, NULL), MOE_DATA_LOSS);
}

/* ---- over the wire, both modes ---- */

typedef struct wire_world {
    moe_clock clock;
    moe_inproc_hub *hub;
    moe_transport *transports[2];
    moe_rpc *worker, *router;
    int served, replies;
    moe_combine_mode mode;
    bool not_held;
    moe_status status;
} wire_world;

/* "Computes" out row a = its index + the weight, so that each value is known. */
static void serve_forward(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                          int num_payload) {
    wire_world *w = ctx;
    moe_forward_call in;
    moe_error err;
    void *scratch;
    static float out[ASSIGNMENTS * WIDTH];
    w->served++;
    if (w->not_held) {
        uint32_t experts[2] = {3, 7};
        Moesaic__V1__ForwardResponse body = MOESAIC__V1__FORWARD_RESPONSE__INIT;
        body.n_not_held = 2, body.not_held = experts, body.epoch = 10;
        moe_rpc_fail(call, MOE_FAILED_PRECONDITION, "not held", (ProtobufCMessage *)&body);
        return;
    }
    moe_status status =
        moe_forward_decode((const Moesaic__V1__ForwardRequest *)request, payload, num_payload, &limits, &in, &scratch, &err);
    if (status != MOE_OK) {
        moe_rpc_fail(call, status, err.message, NULL);
        return;
    }
    assert_true(in.combine == w->mode && in.num_hints == 1 && in.hints[0] == 5);
    float first;
    memcpy(&first, in.activations, sizeof first);
    assert_true(first == -100.5f);
    int32_t rows = w->mode == MOE_COMBINE_EXACT ? in.assignments : in.rows;
    for (int32_t i = 0; i < rows * WIDTH; i++)
        out[i] = (float)(i / WIDTH) + (w->mode == MOE_COMBINE_PARTIAL ? in.assignment_weights[1] : 0);
    moe_forward_respond(call, &(moe_forward_result){.incarnation = 77, .epoch = 9, .shard_digest = 1, .out = out}, rows, WIDTH);
    moe_free(scratch);
}

static void on_forward_reply(void *ctx, const moe_rpc_reply *reply) {
    wire_world *w = ctx;
    moe_forward_result result;
    int32_t rows = w->mode == MOE_COMBINE_EXACT ? ASSIGNMENTS : ROWS;
    w->replies++;
    w->status = moe_forward_decode_reply(reply, &(moe_forward_expected){MOE_F32, rows, WIDTH, 77}, &result, NULL);
    if (w->not_held) {
        const Moesaic__V1__ForwardResponse *body = (const Moesaic__V1__ForwardResponse *)reply->body;
        assert_true(body && body->n_not_held == 2 && body->not_held[1] == 7 && body->epoch == 10);
    }
    if (w->status != MOE_OK) return;
    for (int32_t i = 0; i < rows * WIDTH; i++) {
        float value;
        memcpy(&value, (const char *)result.out + (size_t)i * sizeof value, sizeof value);
        assert_true(value == (float)(i / WIDTH) + (w->mode == MOE_COMBINE_PARTIAL ? 0.25f : 0));
    }
}

static void run(wire_world *w) {
    for (int i = 0; i < 200; i++) {
        assert_int_equal(moe_rpc_step(w->worker, 0, NULL), MOE_OK);
        assert_int_equal(moe_rpc_step(w->router, 0, NULL), MOE_OK);
        int64_t due_ns = moe_inproc_next_due_ns(w->hub);
        if (due_ns != INT64_MAX && due_ns > w->clock.fake_now_ns) w->clock.fake_now_ns = due_ns;
    }
}

static moe_status forward(wire_world *w, moe_peer peer, uint64_t incarnation) {
    sample s;
    sample_init(&s, w->mode);
    uint32_t hint = 5;
    moe_forward_call call = {.epoch = 9,
                             .incarnation = incarnation,
                             .model_digest = 0xabcd,
                             .layer = 1,
                             .rows = ROWS,
                             .assignments = ASSIGNMENTS,
                             .block_hi = MOE_FFN_BLOCKS,
                             .combine = w->mode,
                             .cluster_uuid = "uuid",
                             .num_hints = 1,
                             .hints = &hint,
                             .activations = s.activations,
                             .assignment_rows = s.rows,
                             .assignment_experts = s.experts,
                             .assignment_weights = s.weights};
    assert_int_equal(moe_forward_start(w->router, peer, &call, WIDTH, INT64_MAX, on_forward_reply, w, NULL, NULL), MOE_OK);
    int before = w->replies;
    run(w);
    assert_int_equal(w->replies, before + 1);
    return w->status;
}

static void test_over_the_wire(void **state) {
    (void)state;
    wire_world w = {.clock = moe_clock_fake(0)};
    static const moe_rpc_method methods[] = {{MOE_FORWARD_METHOD, serve_forward, 1u << MOE_ROLE_ROUTER}, {0}};
    char bound[MOE_ENDPOINT_BYTES];
    uint64_t link;
    assert_int_equal(moe_inproc_hub_new(&w.clock, 5, &w.hub, NULL), MOE_OK);
    for (int i = 0; i < 2; i++) assert_int_equal(moe_inproc_open(w.hub, &w.transports[i], NULL), MOE_OK);
    moe_rpc_config config = {.transport = w.transports[0],
                             .clock = &w.clock,
                             .hello = {.cluster_uuid = "uuid", .role = "worker", .id = "w0", .profile = "", .incarnation = 77},
                             .methods = methods,
                             .ctx = &w};
    assert_int_equal(moe_rpc_new(&config, &w.worker, NULL), MOE_OK);
    config.transport = w.transports[1], config.methods = NULL, config.hello.role = "router";
    assert_int_equal(moe_rpc_new(&config, &w.router, NULL), MOE_OK);
    assert_int_equal(w.transports[0]->ops->listen(w.transports[0], "inproc:w0", bound, NULL), MOE_OK);
    assert_int_equal(moe_rpc_connect(w.router, "inproc:w0", &link, NULL), MOE_OK);
    run(&w);
    assert_non_null(moe_rpc_peer_of_link(w.router, link));
    moe_peer peer = moe_rpc_peer_of_link(w.router, link)->peer;
    for (int unaligned = 0; unaligned < 2; unaligned++) {
        moe_inproc_faults faults = {.delay_min_ns = 1, .delay_max_ns = 2}; /* any fault makes received frames unaligned */
        if (unaligned) moe_inproc_set_faults(w.hub, &faults);
        w.mode = EXACT;
        assert_int_equal(forward(&w, peer, 77), MOE_OK);
        w.mode = PARTIAL;
        assert_int_equal(forward(&w, peer, 77), MOE_OK);
    }
    assert_int_equal(forward(&w, peer, 76), MOE_UNAVAILABLE);
    w.not_held = true;
    assert_int_equal(forward(&w, peer, 77), MOE_FAILED_PRECONDITION);
    assert_int_equal(w.served, 6);
    moe_rpc_free(&w.router);
    moe_rpc_free(&w.worker);
    for (int i = 0; i < 2; i++) w.transports[i]->ops->close(w.transports[i]);
    moe_inproc_hub_free(&w.hub);
}

int main(void) {
    moe_log_init(MOE_LOG_OFF, "test");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decode_valid),
        cmocka_unit_test(test_decode_unaligned),
        cmocka_unit_test(test_identity),
        cmocka_unit_test(test_header_fields),
        cmocka_unit_test(test_frames),
        cmocka_unit_test(test_assignments),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_bfloat16),
        cmocka_unit_test(test_more_assignments_than_top_k),
        cmocka_unit_test(test_overflow),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_reply),
        cmocka_unit_test(test_bfloat16_reply),
        cmocka_unit_test(test_spoiled_replies),
        cmocka_unit_test(test_over_the_wire),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
