#include "proto/wire.h"

#include <string.h>

#include "common/alloc.h"
#include "common/cursor.h"

/* Longer encodings are refused by protobuf-c for tags and lengths; varint values have at most 64 bits. */
#define MAX_TAG_BYTES 5
#define MAX_VALUE_BYTES 10

static uint64_t take_varint(moe_cursor *c, int max_bytes) {
    uint64_t value = 0;
    for (int i = 0; i < max_bytes; i++) {
        const uint8_t *byte = moe_cursor_take(c, 1);
        if (!byte) return 0;
        value |= (uint64_t)(*byte & 0x7f) << (7 * i);
        if (!(*byte & 0x80)) return value;
    }
    c->bad = true;
    return 0;
}

static const ProtobufCFieldDescriptor *find_field(const ProtobufCMessageDescriptor *type, uint64_t id, unsigned *index) {
    for (unsigned i = 0; i < type->n_fields; i++) {
        if (type->fields[i].id != id) continue;
        *index = i;
        return &type->fields[i];
    }
    return NULL;
}

static ProtobufCWireType wire_type_of(ProtobufCType type) {
    switch (type) {
        case PROTOBUF_C_TYPE_SFIXED32:
        case PROTOBUF_C_TYPE_FIXED32:
        case PROTOBUF_C_TYPE_FLOAT:
            return PROTOBUF_C_WIRE_TYPE_32BIT;
        case PROTOBUF_C_TYPE_SFIXED64:
        case PROTOBUF_C_TYPE_FIXED64:
        case PROTOBUF_C_TYPE_DOUBLE:
            return PROTOBUF_C_WIRE_TYPE_64BIT;
        case PROTOBUF_C_TYPE_STRING:
        case PROTOBUF_C_TYPE_BYTES:
        case PROTOBUF_C_TYPE_MESSAGE:
            return PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED;
        default:
            return PROTOBUF_C_WIRE_TYPE_VARINT;
    }
}

/* A packed array of scalars of the wire type: whole elements only. */
static bool packed_array_valid(ProtobufCWireType element, moe_cursor array) {
    if (element == PROTOBUF_C_WIRE_TYPE_32BIT) return array.left % 4 == 0;
    if (element == PROTOBUF_C_WIRE_TYPE_64BIT) return array.left % 8 == 0;
    while (array.left > 0 && !array.bad) take_varint(&array, MAX_VALUE_BYTES);
    return !array.bad;
}

typedef struct level {
    const ProtobufCMessageDescriptor *type;
    moe_cursor rest; /* of this message, behind the submessage being checked */
    uint64_t seen;   /* bit per declared field */
} level;

typedef struct checker {
    level levels[MOE_WIRE_MAX_DEPTH];
    int depth;
    size_t fields;
    const char *problem; /* NULL while all is well */
} checker;

static bool wrong(checker *c, const char *problem) {
    c->problem = problem;
    return false;
}

static bool check_known_length(checker *c, const ProtobufCFieldDescriptor *field, moe_cursor value) {
    ProtobufCWireType declared = wire_type_of(field->type);
    if (declared != PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED)
        return packed_array_valid(declared, value) || wrong(c, "a broken packed array");
    if (field->type == PROTOBUF_C_TYPE_STRING && value.left > 0 && memchr(value.at, 0, value.left))
        return wrong(c, "a NUL byte in a string");
    if (field->type != PROTOBUF_C_TYPE_MESSAGE) return true;
    if (c->depth == MOE_WIRE_MAX_DEPTH) return wrong(c, "too deep nesting");
    c->levels[c->depth++] = (level){.type = field->descriptor, .rest = value};
    return true;
}

/* The wire type must be the declared one, or an array of it; a singular field may occur once. */
static bool check_occurrence(checker *c, level *at, const ProtobufCFieldDescriptor *field, unsigned index, unsigned wire_type) {
    bool repeated = field->label == PROTOBUF_C_LABEL_REPEATED;
    unsigned declared = wire_type_of(field->type);
    if (wire_type != declared && !(repeated && wire_type == PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED))
        return wrong(c, "a field with another wire type than declared");
    if (!repeated && (at->seen >> index & 1)) return wrong(c, "a singular field twice");
    at->seen |= UINT64_C(1) << index;
    return true;
}

static bool check_field(checker *c) {
    level *at = &c->levels[c->depth - 1];
    if (++c->fields > MOE_WIRE_MAX_FIELDS) return wrong(c, "too many fields");
    uint64_t tag = take_varint(&at->rest, MAX_TAG_BYTES);
    unsigned wire_type = tag & 7, index = 0;
    if (at->rest.bad || tag >> 3 == 0 || tag > UINT32_MAX) return wrong(c, "a broken field tag");
    const ProtobufCFieldDescriptor *field = find_field(at->type, tag >> 3, &index);
    if (field && !check_occurrence(c, at, field, index, wire_type)) return false;
    moe_cursor value = {0};
    switch (wire_type) {
        case PROTOBUF_C_WIRE_TYPE_VARINT:
            take_varint(&at->rest, MAX_VALUE_BYTES);
            break;
        case PROTOBUF_C_WIRE_TYPE_64BIT:
            moe_cursor_take(&at->rest, 8);
            break;
        case PROTOBUF_C_WIRE_TYPE_32BIT:
            moe_cursor_take(&at->rest, 4);
            break;
        case PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED:
            value.left = take_varint(&at->rest, MAX_TAG_BYTES);
            value.at = moe_cursor_take(&at->rest, value.left);
            break;
        default:
            return wrong(c, "an unknown wire type");
    }
    if (at->rest.bad) return wrong(c, "a field beyond the end");
    return !field || wire_type != PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED || check_known_length(c, field, value);
}

moe_status moe_wire_check(const ProtobufCMessageDescriptor *type, const void *data, size_t size, moe_error *err) {
    checker c = {.levels[0] = {.type = type, .rest = moe_cursor_of(data, size)}, .depth = 1};
    while (c.depth > 0) {
        level *at = &c.levels[c.depth - 1];
        MOE_ASSERT(at->type->n_fields <= MOE_WIRE_MAX_TYPE_FIELDS);
        if (at->rest.left == 0) {
            c.depth--;
        } else if (!check_field(&c)) {
            return moe_fail(err, MOE_INVALID_ARGUMENT, "malformed %s (%zu bytes): %s at byte %td of %s", type->short_name, size,
                            c.problem, at->rest.at - (const uint8_t *)data, at->type->short_name);
        }
    }
    return MOE_OK;
}

typedef struct budget {
    size_t left;
    bool exhausted;
} budget;

static void *budget_alloc(void *data, size_t size) {
    budget *b = data;
    void *memory = NULL;
    if (size <= b->left) memory = moe_calloc(size, 1);
    if (memory)
        b->left -= size;
    else
        b->exhausted = true;
    return memory;
}

static void budget_free(void *data, void *memory) {
    (void)data;
    moe_free(memory);
}

moe_status moe_wire_unpack(const ProtobufCMessageDescriptor *type, const void *data, size_t size, ProtobufCMessage **out,
                           moe_error *err) {
    *out = NULL;
    moe_status status = moe_wire_check(type, data, size, err);
    if (status != MOE_OK) return status;
    budget b = {.left = MOE_WIRE_MAX_UNPACKED_BYTES};
    ProtobufCAllocator allocator = {.alloc = budget_alloc, .free = budget_free, .allocator_data = &b};
    *out = protobuf_c_message_unpack(type, &allocator, size, data);
    if (*out) return MOE_OK;
    if (b.exhausted) {
        return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "%s of %zu bytes needs more than %u bytes unpacked, or memory is short",
                        type->short_name, size, MOE_WIRE_MAX_UNPACKED_BYTES);
    }
    return moe_fail(err, MOE_INVALID_ARGUMENT, "malformed %s (%zu bytes)", type->short_name, size);
}

void moe_wire_free(ProtobufCMessage *message) {
    ProtobufCAllocator allocator = {.alloc = budget_alloc, .free = budget_free};
    if (message) protobuf_c_message_free_unpacked(message, &allocator);
}

moe_status moe_wire_pack(const ProtobufCMessage *message, size_t max_bytes, moe_buf *out, moe_error *err) {
    moe_buf_clear(out);
    size_t size = protobuf_c_message_get_packed_size(message);
    if (size > max_bytes) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%s of %zu bytes is over the limit of %zu", message->descriptor->short_name,
                        size, max_bytes);
    }
    if (out->capacity < size + 1) {
        char *data = moe_realloc(out->data, size + 1, 1);
        if (!data) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for a message of %zu bytes", size);
        out->data = data;
        out->capacity = size + 1;
    }
    out->size = protobuf_c_message_pack(message, (uint8_t *)out->data);
    out->data[out->size] = '\0';
    return MOE_OK;
}
