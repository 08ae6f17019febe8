/* The bounded reader of protobuf bytes, frame 0, and the method table. */
/* clang-format off */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
/* clang-format on */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/digest.h"
#include "common/random.h"
#include "proto/envelope.h"
#include "proto/methods.h"
#include "proto/rpc.h"

typedef struct bytes {
    uint8_t *data;
    size_t size, capacity;
} bytes;

static void put(bytes *b, const void *data, size_t size) {
    while (b->size + size > b->capacity) {
        b->capacity = b->capacity ? 2 * b->capacity : 256;
        b->data = realloc(b->data, b->capacity);
        assert_non_null(b->data);
    }
    memcpy(b->data + b->size, data, size);
    b->size += size;
}

static void put_varint(bytes *b, uint64_t value) {
    do {
        uint8_t byte = (uint8_t)(value & 0x7f) | (value > 0x7f ? 0x80 : 0);
        put(b, &byte, 1);
    } while (value >>= 7);
}

static void put_field(bytes *b, uint32_t id, unsigned wire_type) { put_varint(b, (uint64_t)id << 3 | wire_type); }

static void put_bytes_field(bytes *b, uint32_t id, const void *data, size_t size) {
    put_field(b, id, 2);
    put_varint(b, size);
    put(b, data, size);
}

/* The check's verdict, and that unpacking agrees and frees all it took. */
static moe_status verdict(const ProtobufCMessageDescriptor *type, bytes *b) {
    moe_error err = {0};
    ProtobufCMessage *message;
    moe_status status = moe_wire_unpack(type, b->data, b->size, &message, &err);
    if (status == MOE_OK)
        assert_non_null(message);
    else
        assert_true(err.message[0] != '\0' && err.code == status);
    assert_true((status == MOE_OK) == (message != NULL));
    moe_wire_free(message);
    free(b->data);
    *b = (bytes){0};
    return status;
}

static void test_round_trip(void **state) {
    (void)state;
    Moesaic__V1__ExpertId id = MOESAIC__V1__EXPERT_ID__INIT;
    Moesaic__V1__LoadedExpert loaded = MOESAIC__V1__LOADED_EXPERT__INIT, *list[3] = {&loaded, &loaded, &loaded};
    Moesaic__V1__StatsResponse stats = MOESAIC__V1__STATS_RESPONSE__INIT, *back;
    id.layer = 3, id.expert = UINT32_MAX;
    loaded.id = &id, loaded.digest = UINT64_C(0x0123456789abcdef), loaded.bytes = UINT64_MAX;
    stats.id = (char *)"w0", stats.n_loaded = 3, stats.loaded = list;
    moe_buf buf = {0};
    assert_int_equal(moe_wire_pack((ProtobufCMessage *)&stats, 1000, &buf, NULL), MOE_OK);
    assert_int_equal(
        moe_wire_unpack(&moesaic__v1__stats_response__descriptor, buf.data, buf.size, (ProtobufCMessage **)&back, NULL), MOE_OK);
    assert_string_equal(back->id, "w0");
    assert_int_equal(back->n_loaded, 3);
    assert_int_equal(back->loaded[2]->id->expert, UINT32_MAX);
    assert_true(back->loaded[1]->digest == loaded.digest && back->loaded[0]->bytes == UINT64_MAX);
    moe_wire_free((ProtobufCMessage *)back);
    assert_int_equal(moe_wire_pack((ProtobufCMessage *)&stats, buf.size - 1, &buf, NULL), MOE_INVALID_ARGUMENT);
    moe_buf_free(&buf);
}

static void test_malformed(void **state) {
    (void)state;
    const ProtobufCMessageDescriptor *envelope = &moesaic__v1__envelope__descriptor;
    bytes b = {0};
    assert_int_equal(verdict(envelope, &b), MOE_OK); /* an empty message */
    put_varint(&b, 0);                               /* field 0 */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x08", 1); /* a tag without its value */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 12); /* a varint of 11 bytes */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x88\x80\x80\x80\x80\x00\x01", 7); /* a tag of 6 bytes */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x0b", 1); /* a group */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x0d\x01\x00\x00\x00", 5); /* kind as fixed32 */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x08\x01\x08\x02", 4); /* kind twice */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x42\x05\x01", 3); /* body longer than the message */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x42\xff\xff\xff\xff\x0f", 6); /* body of 4 GiB */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x52\x01\x80", 3); /* a packed array that ends inside a varint */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put_bytes_field(&b, 3, "a\0b", 3); /* method with a NUL */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\x3a\x03\x0a\x05\x61", 5); /* metadata whose key is longer than it */
    assert_int_equal(verdict(envelope, &b), MOE_INVALID_ARGUMENT);
    put(&b, "\xfa\x7f\x02hi\xf8\x7f\x05", 8); /* unknown fields of two kinds are skipped */
    assert_int_equal(verdict(envelope, &b), MOE_OK);
    put(&b, "\x50\x05\x52\x02\x06\x07\x50\x08", 8); /* repeated scalars, packed and not, mixed */
    assert_int_equal(verdict(envelope, &b), MOE_OK);
}

static void test_bombs(void **state) {
    (void)state;
    bytes b = {0};
    for (int i = 0; i < 1 << 19; i++) put_bytes_field(&b, 4, "", 0); /* 1 MiB of empty ExpertIds */
    assert_int_equal(verdict(&moesaic__v1__load_request__descriptor, &b), MOE_INVALID_ARGUMENT);
    for (int i = 0; i < MOE_WIRE_MAX_FIELDS; i++) put_bytes_field(&b, 4, "", 0); /* as many as are allowed: 20 MiB of structs */
    assert_int_equal(verdict(&moesaic__v1__load_request__descriptor, &b), MOE_OK);
    for (int i = 0; i <= MOE_WIRE_MAX_FIELDS; i++) put_bytes_field(&b, 4, "", 0); /* one more */
    assert_int_equal(verdict(&moesaic__v1__load_request__descriptor, &b), MOE_INVALID_ARGUMENT);
    for (int i = 0; i < MOE_WIRE_MAX_FIELDS; i++) put(&b, "\xfa\x7f\x00", 3); /* as many unknown fields */
    assert_int_equal(verdict(&moesaic__v1__stats_request__descriptor, &b), MOE_OK);
    for (int i = 0; i < MOE_WIRE_MAX_FIELDS; i++) put_bytes_field(&b, 1, "", 0); /* WorkerStatus: 120 bytes each */
    assert_int_equal(verdict(&moesaic__v1__workers_response__descriptor, &b), MOE_RESOURCE_EXHAUSTED);
    for (int i = 0; i < 5 << 20; i++) put(&b, "\x01", 1); /* 5 Mi varints of one byte unpack to 40 MiB */
    bytes packed = {0};
    put_bytes_field(&packed, 10, b.data, b.size);
    free(b.data);
    assert_int_equal(verdict(&moesaic__v1__envelope__descriptor, &packed), MOE_RESOURCE_EXHAUSTED);
}

/* moesaic.proto nests nowhere near the limit, so the depth is tested on a type that contains itself. */
static void test_nesting(void **state) {
    (void)state;
    static ProtobufCFieldDescriptor field;
    static const ProtobufCIntRange ranges[] = {{1, 0}, {0, 1}};
    static ProtobufCMessageDescriptor self;
    field = (ProtobufCFieldDescriptor){
        .name = "self", .id = 1, .label = PROTOBUF_C_LABEL_REPEATED, .type = PROTOBUF_C_TYPE_MESSAGE, .descriptor = &self};
    self = (ProtobufCMessageDescriptor){.magic = PROTOBUF_C__MESSAGE_DESCRIPTOR_MAGIC,
                                        .name = "Self",
                                        .short_name = "Self",
                                        .n_fields = 1,
                                        .fields = &field,
                                        .n_field_ranges = 1,
                                        .field_ranges = ranges};
    for (int depth = 1; depth < 20000; depth = depth < MOE_WIRE_MAX_DEPTH ? depth + 1 : depth * 4) {
        bytes inner = {0};
        for (int i = 1; i < depth; i++) {
            bytes outer = {0};
            put_bytes_field(&outer, 1, inner.data ? (void *)inner.data : "", inner.size);
            free(inner.data);
            inner = outer;
        }
        moe_status status = moe_wire_check(&self, inner.data, inner.size, NULL);
        assert_int_equal(status, depth <= MOE_WIRE_MAX_DEPTH ? MOE_OK : MOE_INVALID_ARGUMENT);
        free(inner.data);
    }
}

/* Random bytes and random changes of valid ones: what the check passes, protobuf-c must read; nothing leaks or overruns. */
static void test_mutations(void **state) {
    (void)state;
    moe_random random = {.state = 7};
    Moesaic__V1__Metadata pair = MOESAIC__V1__METADATA__INIT, *pairs[2] = {&pair, &pair};
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    uint64_t lengths[3] = {1, 300, UINT64_MAX};
    pair.key = (char *)"key", pair.value = (char *)"value";
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__REQUEST, envelope.call_id = 77,
    envelope.method = (char *)"/moesaic.v1.Health/Check";
    envelope.n_metadata = 2, envelope.metadata = pairs, envelope.n_payload_bytes = 3, envelope.payload_bytes = lengths;
    envelope.body = (ProtobufCBinaryData){.len = 5, .data = (uint8_t *)"hello"};
    moe_buf buf = {0};
    assert_int_equal(moe_wire_pack((ProtobufCMessage *)&envelope, 4096, &buf, NULL), MOE_OK);
    int passed = 0;
    for (int round = 0; round < 20000; round++) {
        size_t size = round % 4 == 0 ? moe_random_below(&random, 64) : moe_random_below(&random, buf.size + 1);
        uint8_t *exact = malloc(size ? size : 1); /* no larger, so that the sanitizer sees a read beyond */
        assert_non_null(exact);
        for (size_t i = 0; i < size; i++) exact[i] = round % 4 == 0 ? (uint8_t)moe_random_next(&random) : (uint8_t)buf.data[i];
        for (uint64_t n = moe_random_below(&random, 4); n > 0 && size > 0; n--)
            exact[moe_random_below(&random, size)] = (uint8_t)moe_random_next(&random);
        ProtobufCMessage *message;
        moe_status status = moe_wire_unpack(&moesaic__v1__envelope__descriptor, exact, size, &message, NULL);
        assert_true(status == MOE_OK || status == MOE_INVALID_ARGUMENT);
        assert_int_equal(status, moe_wire_check(&moesaic__v1__envelope__descriptor, exact, size, NULL));
        passed += status == MOE_OK;
        moe_wire_free(message);
        moe_frame frame = {.data = exact, .size = size};
        Moesaic__V1__Envelope *opened;
        Moesaic__V1__MessageKind kind;
        uint64_t call_id;
        moe_envelope_open(&frame, 1, &opened, NULL);
        moe_envelope_free(opened);
        moe_envelope_peek(&frame, 1, &kind, &call_id);
        free(exact);
    }
    assert_in_range(passed, 100, 19900);
    moe_buf_free(&buf);
}

static void test_every_allocation_fails(void **state) {
    (void)state;
    bytes b = {0};
    put_bytes_field(&b, 1, "w0", 2);
    for (int i = 0; i < 4; i++) put_bytes_field(&b, 10, "\x0a\x04\x08\x01\x10\x02", 6);
    put(&b, "\xfa\x7f\x02hi", 5);
    int64_t before = moe_alloc_count();
    ProtobufCMessage *message;
    assert_int_equal(moe_wire_unpack(&moesaic__v1__stats_response__descriptor, b.data, b.size, &message, NULL), MOE_OK);
    moe_wire_free(message);
    int64_t allocations = moe_alloc_count() - before;
    assert_in_range(allocations, 5, 100);
    for (int64_t i = 1; i <= allocations; i++) {
        moe_alloc_fail_after(i);
        moe_status status = moe_wire_unpack(&moesaic__v1__stats_response__descriptor, b.data, b.size, &message, NULL);
        moe_alloc_fail_after(0);
        assert_int_equal(status, MOE_RESOURCE_EXHAUSTED);
        assert_null(message);
    }
    free(b.data);
}

/* ---- frame 0 and what follows ---- */

static void pack_data_call(moe_envelope_buffers *buffers, moe_frame frames[MOE_MAX_FRAMES]) {
    static const uint8_t first[5] = {1, 2, 3, 4, 5};
    static const moe_frame payload[2] = {{first, 5}, {"", 0}};
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT;
    Moesaic__V1__StatsRequest body = MOESAIC__V1__STATS_REQUEST__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__REQUEST;
    envelope.call_id = UINT64_C(0xfedcba9876543210);
    assert_int_equal(moe_envelope_pack(buffers, &envelope, (ProtobufCMessage *)&body, payload, 2, frames, NULL), MOE_OK);
}

/* CRC32C bit by bit, as RFC 3720 has it; its check value; and lengths around those at which lanes begin and end. */
static void test_crc32c(void **state) {
    enum { MOST = 4000 };
    uint8_t text[MOST + 8];
    (void)state;
    assert_int_equal(moe_crc32c(0, "123456789", 9), 0xe3069283u);
    for (size_t i = 0; i < sizeof text; i++) text[i] = (uint8_t)moe_mix64(i);
    for (size_t offset = 0; offset < 8; offset += 3) {
        uint32_t crc = 12345;
        assert_int_equal(moe_crc32c(crc, text + offset, 0), crc);
        for (size_t size = 1; size <= MOST; size++) {
            crc = ~crc ^ text[offset + size - 1];
            for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
            crc = ~crc;
            if (size < 40 || size % 61 == 0 || size % 512 < 2) assert_int_equal(moe_crc32c(12345, text + offset, size), crc);
        }
    }
}

static void test_envelope(void **state) {
    (void)state;
    moe_envelope_buffers buffers = {0};
    moe_frame frames[MOE_MAX_FRAMES];
    Moesaic__V1__Envelope *envelope;
    Moesaic__V1__MessageKind kind;
    uint64_t call_id;
    pack_data_call(&buffers, frames);
    assert_int_equal(moe_envelope_open(frames, 3, &envelope, NULL), MOE_OK);
    assert_int_equal(envelope->payload_crc32c, moe_crc32c(0, "\1\2\3\4\5", 5));
    moe_envelope_free(envelope);
    moe_envelope_peek(frames, 3, &kind, &call_id);
    assert_int_equal(kind, MOESAIC__V1__MESSAGE_KIND__REQUEST);
    assert_true(call_id == UINT64_C(0xfedcba9876543210));

    uint8_t flipped[5] = {1, 2, 3, 4, 4};
    frames[1].data = flipped;
    assert_int_equal(moe_envelope_open(frames, 3, &envelope, NULL), MOE_DATA_LOSS);
    assert_null(envelope);
    pack_data_call(&buffers, frames);
    frames[1].size = 4;
    assert_int_equal(moe_envelope_open(frames, 3, &envelope, NULL), MOE_DATA_LOSS);
    pack_data_call(&buffers, frames);
    frames[2] = (moe_frame){(const uint8_t *)frames[1].data + 4, 1}; /* the same bytes and CRC, divided elsewhere */
    frames[1].size = 4;
    assert_int_equal(moe_envelope_open(frames, 3, &envelope, NULL), MOE_DATA_LOSS);
    pack_data_call(&buffers, frames);
    assert_int_equal(moe_envelope_open(frames, 2, &envelope, NULL), MOE_DATA_LOSS); /* a frame is missing */
    assert_int_equal(moe_envelope_open(frames, 1, &envelope, NULL), MOE_DATA_LOSS);
    frames[3] = frames[2];
    assert_int_equal(moe_envelope_open(frames, 4, &envelope, NULL), MOE_DATA_LOSS); /* one too many */
    assert_int_equal(moe_envelope_open(frames, 0, &envelope, NULL), MOE_INVALID_ARGUMENT);
    moe_frame unknown_kind = {"\x08\x08", 2}, no_kind = {"\x10\x01", 2};
    assert_int_equal(moe_envelope_open(&unknown_kind, 1, &envelope, NULL), MOE_INVALID_ARGUMENT);
    assert_int_equal(moe_envelope_open(&no_kind, 1, &envelope, NULL), MOE_INVALID_ARGUMENT);
    moe_envelope_peek(&no_kind, 1, &kind, &call_id);
    assert_true(kind == 0 && call_id == 0);
    moe_envelope_buffers_free(&buffers);
}

static void test_header_limits(void **state) {
    (void)state;
    moe_envelope_buffers buffers = {0};
    moe_frame frames[MOE_MAX_FRAMES], payload[MOE_MAX_FRAMES] = {{"x", 1}};
    Moesaic__V1__Envelope envelope = MOESAIC__V1__ENVELOPE__INIT, *opened;
    Moesaic__V1__TokenizeRequest body = MOESAIC__V1__TOKENIZE_REQUEST__INIT;
    envelope.kind = MOESAIC__V1__MESSAGE_KIND__REQUEST;
    char *text = calloc(MOE_RPC_MAX_CONTROL_BYTES + 1, 1);
    assert_non_null(text);
    body.text = memset(text, 'a', MOE_RPC_MAX_HEADER_BYTES);
    ProtobufCMessage *message = (ProtobufCMessage *)&body;
    assert_int_equal(moe_envelope_pack(&buffers, &envelope, message, payload, 1, frames, NULL), MOE_INVALID_ARGUMENT);
    assert_int_equal(moe_envelope_pack(&buffers, &envelope, message, NULL, 0, frames, NULL), MOE_OK);
    assert_int_equal(moe_envelope_open(frames, 1, &opened, NULL), MOE_OK);
    moe_envelope_free(opened);
    frames[1] = payload[0];
    assert_int_equal(moe_envelope_open(frames, 2, &opened, NULL), MOE_INVALID_ARGUMENT); /* received: the same limit */
    memset(text, 'a', MOE_RPC_MAX_CONTROL_BYTES);
    assert_int_equal(moe_envelope_pack(&buffers, &envelope, message, NULL, 0, frames, NULL), MOE_INVALID_ARGUMENT);
    moe_frame large = {text, MOE_RPC_MAX_CONTROL_BYTES + 1};
    assert_int_equal(moe_envelope_open(&large, 1, &opened, NULL), MOE_INVALID_ARGUMENT);
    assert_int_equal(moe_envelope_pack(&buffers, &envelope, NULL, payload, MOE_MAX_FRAMES, frames, NULL), MOE_INVALID_ARGUMENT);
    free(text);
    moe_envelope_buffers_free(&buffers);
}

/* ---- the method table against moesaic.proto ---- */

static char *read_proto(void) {
    FILE *file = fopen(SOURCE_DIR "/proto/moesaic.proto", "rb");
    assert_non_null(file);
    char *text = calloc(1, 1 << 20);
    assert_non_null(text);
    size_t size = fread(text, 1, (1 << 20) - 1, file);
    assert_in_range(size, 1000, (1 << 20) - 2);
    fclose(file);
    return text;
}

static bool in_table(const char *name) {
    for (int i = 0; moe_streaming_methods[i]; i++)
        if (strcmp(moe_streaming_methods[i], name) == 0) return true;
    return false;
}

static void test_methods_against_proto(void **state) {
    (void)state;
    char *text = read_proto(), service[100] = "";
    int methods = 0, streaming = 0;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        char method[100], request[100], response[120], full[300];
        sscanf(line, "service %99[A-Za-z0-9]", service);
        if (sscanf(line, " rpc %99[A-Za-z0-9](%99[A-Za-z0-9]) returns (%119[A-Za-z0-9 ])", method, request, response) != 3)
            continue;
        bool stream = strncmp(response, "stream ", 7) == 0;
        snprintf(full, sizeof full, "/moesaic.v1.%s/%s", service, method);
        moe_method found;
        assert_true(moe_method_find(full, &found));
        assert_string_equal(found.request->short_name, request);
        assert_string_equal(found.response->short_name, stream ? response + 7 : response);
        assert_int_equal(found.server_streaming, stream);
        assert_int_equal(in_table(full), stream);
        methods++;
        streaming += stream;
    }
    free(text);
    int declared = 0, rows = 0;
    for (int i = 0; moe_services[i]; i++) declared += (int)moe_services[i]->n_methods;
    while (moe_streaming_methods[rows]) rows++;
    assert_int_equal(methods, declared); /* every service is in the list, every method was read above */
    assert_int_equal(streaming, rows);
    assert_in_range(methods, 10, 100);
    moe_method none;
    const char *const unknown[] = {"",
                                   "/",
                                   "Forward",
                                   "/moesaic.v1.ExpertService",
                                   "/moesaic.v1.ExpertService/",
                                   "/moesaic.v1.ExpertService/forward",
                                   "/moesaic.v1.Expert/Forward",
                                   "/moesaic.v1.ExpertServices/Forward",
                                   "//Forward"};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) assert_false(moe_method_find(unknown[i], &none));
}

/* The deepest nesting of the types in moesaic.proto, found by walking the descriptors: the limit must leave room. */
static int depth_of(const ProtobufCMessageDescriptor *type, int level) {
    assert_in_range(level, 0, MOE_WIRE_MAX_DEPTH); /* also: no recursive message */
    assert_in_range(type->n_fields, 0, MOE_WIRE_MAX_TYPE_FIELDS);
    int deepest = level;
    for (unsigned i = 0; i < type->n_fields; i++) {
        if (type->fields[i].type != PROTOBUF_C_TYPE_MESSAGE) continue;
        int below = depth_of(type->fields[i].descriptor, level + 1);
        if (below > deepest) deepest = below;
    }
    return deepest;
}

static void test_types_within_limits(void **state) {
    (void)state;
    int deepest = depth_of(&moesaic__v1__envelope__descriptor, 1);
    for (int i = 0; moe_services[i]; i++) {
        for (unsigned m = 0; m < moe_services[i]->n_methods; m++) {
            int in = depth_of(moe_services[i]->methods[m].input, 1), out = depth_of(moe_services[i]->methods[m].output, 1);
            if (in > deepest) deepest = in;
            if (out > deepest) deepest = out;
        }
    }
    assert_in_range(deepest, 2, MOE_WIRE_MAX_DEPTH);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_malformed),
        cmocka_unit_test(test_bombs),
        cmocka_unit_test(test_nesting),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_every_allocation_fails),
        cmocka_unit_test(test_crc32c),
        cmocka_unit_test(test_envelope),
        cmocka_unit_test(test_header_limits),
        cmocka_unit_test(test_methods_against_proto),
        cmocka_unit_test(test_types_within_limits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
