#include "proto/envelope.h"

#include "common/cursor.h"
#include "common/digest.h"
#include "proto/rpc.h"

#define PEEK_BYTES 32 /* more than the kind and the call id take */

static size_t header_limit(int num_payload) { return num_payload > 0 ? MOE_RPC_MAX_HEADER_BYTES : MOE_RPC_MAX_CONTROL_BYTES; }

static moe_status check_payload(const Moesaic__V1__Envelope *envelope, const moe_frame *payload, int num_payload,
                                moe_error *err) {
    if (envelope->n_payload_bytes != (size_t)num_payload) {
        return moe_fail(err, MOE_DATA_LOSS, "the header names %zu payload frames, %d came", envelope->n_payload_bytes,
                        num_payload);
    }
    uint32_t crc = 0;
    for (int i = 0; i < num_payload; i++) {
        if (envelope->payload_bytes[i] != payload[i].size) {
            return moe_fail(err, MOE_DATA_LOSS, "payload frame %d has %zu bytes, its header says %llu", i, payload[i].size,
                            (unsigned long long)envelope->payload_bytes[i]);
        }
        crc = moe_crc32c(crc, payload[i].data, payload[i].size);
    }
    if (crc != envelope->payload_crc32c) {
        return moe_fail(err, MOE_DATA_LOSS, "the payload's CRC32C is %08x, its header says %08x", crc, envelope->payload_crc32c);
    }
    return MOE_OK;
}

moe_status moe_envelope_open(const moe_frame *frames, int num_frames, Moesaic__V1__Envelope **out, moe_error *err) {
    *out = NULL;
    if (num_frames < 1) return moe_fail(err, MOE_INVALID_ARGUMENT, "a message without frames");
    size_t limit = header_limit(num_frames - 1);
    if (frames[0].size > limit) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "a header of %zu bytes is over the limit of %zu", frames[0].size, limit);
    }
    ProtobufCMessage *message;
    moe_status status = moe_wire_unpack(&moesaic__v1__envelope__descriptor, frames[0].data, frames[0].size, &message, err);
    if (status != MOE_OK) return status;
    Moesaic__V1__Envelope *envelope = (Moesaic__V1__Envelope *)message;
    if (envelope->kind < MOESAIC__V1__MESSAGE_KIND__HELLO || envelope->kind > MOESAIC__V1__MESSAGE_KIND__PONG)
        status = moe_fail(err, MOE_INVALID_ARGUMENT, "a message of unknown kind %d", (int)envelope->kind);
    else
        status = check_payload(envelope, frames + 1, num_frames - 1, err);
    if (status == MOE_OK)
        *out = envelope;
    else
        moe_envelope_free(envelope);
    return status;
}

void moe_envelope_free(Moesaic__V1__Envelope *envelope) { moe_wire_free((ProtobufCMessage *)envelope); }

static uint64_t peek_varint(moe_cursor *c) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        const uint8_t *byte = moe_cursor_take(c, 1);
        if (!byte) return 0;
        value |= (uint64_t)(*byte & 0x7f) << shift;
        if (!(*byte & 0x80)) return value;
    }
    c->bad = true;
    return 0;
}

void moe_envelope_peek(const moe_frame *frames, int num_frames, Moesaic__V1__MessageKind *kind, uint64_t *call_id) {
    *kind = MOESAIC__V1__MESSAGE_KIND__MESSAGE_KIND_UNSPECIFIED;
    *call_id = 0;
    if (num_frames < 1) return;
    moe_cursor c = moe_cursor_of(frames[0].data, frames[0].size < PEEK_BYTES ? frames[0].size : PEEK_BYTES);
    if (peek_varint(&c) != (1 << 3 | PROTOBUF_C_WIRE_TYPE_VARINT)) return;
    uint64_t kind_value = peek_varint(&c);
    if (peek_varint(&c) != (2 << 3 | PROTOBUF_C_WIRE_TYPE_VARINT)) return;
    uint64_t id = peek_varint(&c);
    if (c.bad || kind_value > MOESAIC__V1__MESSAGE_KIND__PONG) return;
    *kind = (Moesaic__V1__MessageKind)kind_value;
    *call_id = id;
}

static uint32_t frame_crc(uint32_t crc, const moe_frame *frame) {
    for (size_t at = 0, bytes; at < frame->size; at += bytes) {
        const void *data = moe_frame_span(frame, at, &bytes);
        crc = moe_crc32c(crc, data, bytes);
    }
    return crc;
}

void moe_envelope_buffers_free(moe_envelope_buffers *buffers) {
    moe_buf_free(&buffers->body);
    moe_buf_free(&buffers->header);
}

moe_status moe_envelope_pack(moe_envelope_buffers *buffers, Moesaic__V1__Envelope *envelope, const ProtobufCMessage *body,
                             const moe_frame *payload, int num_payload, moe_frame frames[MOE_MAX_FRAMES], moe_error *err) {
    if (num_payload < 0 || num_payload > MOE_RPC_MAX_PAYLOAD_FRAMES) {
        return moe_fail(err, MOE_INVALID_ARGUMENT, "%d payload frames, at most %d are possible", num_payload,
                        MOE_RPC_MAX_PAYLOAD_FRAMES);
    }
    size_t limit = header_limit(num_payload);
    if (body) {
        moe_status status = moe_wire_pack(body, limit, &buffers->body, err);
        if (status != MOE_OK) return status;
        envelope->body = (ProtobufCBinaryData){.len = buffers->body.size, .data = (uint8_t *)buffers->body.data};
    }
    uint64_t lengths[MOE_RPC_MAX_PAYLOAD_FRAMES];
    for (int i = 0; i < num_payload; i++) {
        lengths[i] = payload[i].size;
        envelope->payload_crc32c = frame_crc(envelope->payload_crc32c, &payload[i]);
        frames[i + 1] = payload[i];
    }
    envelope->n_payload_bytes = (size_t)num_payload;
    envelope->payload_bytes = lengths;
    moe_status status = moe_wire_pack((ProtobufCMessage *)envelope, limit, &buffers->header, err);
    envelope->n_payload_bytes = 0;
    envelope->payload_bytes = NULL;
    frames[0] = (moe_frame){.data = buffers->header.data, .size = buffers->header.size};
    return status;
}
