/* Bounded packing and unpacking of protobuf messages.
 *
 * protobuf-c trusts its input: 1 MiB of empty submessages unpacks to 52 MiB, deep nesting overflows the stack, and duplicates of
 * a submessage are merged by recursion. So the bytes are checked against the type's descriptor first, without recursion, and
 * unpacking draws its memory from a budget. */
#pragma once
#include "common/buf.h"
#include "common/status.h"
#include "moesaic.pb-c.h"

#define MOE_WIRE_MAX_DEPTH 8                    /* of nested messages */
#define MOE_WIRE_MAX_FIELDS 262144              /* field occurrences in a message and all its submessages */
#define MOE_WIRE_MAX_UNPACKED_BYTES (32u << 20) /* allocated while one message is unpacked */
#define MOE_WIRE_MAX_TYPE_FIELDS 64             /* fields that a message type may declare */

/* Checks that `size` bytes are a well-formed message of `type` within the limits above: wire types as declared, lengths inside
 * their message, singular fields at most once, no NUL inside strings, packed arrays whole, unknown fields skippable (groups are
 * not). INVALID_ARGUMENT names the type and the byte. Allocates nothing. */
moe_status moe_wire_check(const ProtobufCMessageDescriptor *type, const void *data, size_t size, moe_error *err);

/* moe_wire_check, then unpacks; *out is the caller's, freed by moe_wire_free. RESOURCE_EXHAUSTED: out of memory, or beyond
 * MOE_WIRE_MAX_UNPACKED_BYTES. */
moe_status moe_wire_unpack(const ProtobufCMessageDescriptor *type, const void *data, size_t size, ProtobufCMessage **out,
                           moe_error *err);
void moe_wire_free(ProtobufCMessage *message); /* NULL is allowed */

/* Replaces *out by the packed message. INVALID_ARGUMENT: more than max_bytes; RESOURCE_EXHAUSTED: out of memory. */
moe_status moe_wire_pack(const ProtobufCMessage *message, size_t max_bytes, moe_buf *out, moe_error *err);
