/* Frame 0 of every message, and the one check of a whole message. */
#pragma once
#include "common/transport.h"
#include "proto/wire.h"

#define MOE_RPC_MAX_PAYLOAD_FRAMES (MOE_MAX_FRAMES - 1)

/* Checks everything that holds for any message before its parts are used: at least one frame, frame 0's size (64 KiB with
 * payload frames behind it, else MOE_RPC_MAX_CONTROL_BYTES), a well-formed envelope of a known kind (INVALID_ARGUMENT), the
 * payload frames' number, lengths and CRC32C (DATA_LOSS). *out is freed by moe_envelope_free and NULL on error. */
moe_status moe_envelope_open(const moe_frame *frames, int num_frames, Moesaic__V1__Envelope **out, moe_error *err);
void moe_envelope_free(Moesaic__V1__Envelope *envelope); /* NULL is allowed */

/* What a message that moe_envelope_open refused says it was: kind and call id where frame 0 begins with them as every packed
 * envelope does, else 0. Allocates nothing. */
void moe_envelope_peek(const moe_frame *frames, int num_frames, Moesaic__V1__MessageKind *kind, uint64_t *call_id);

/* Buffers that packing reuses from message to message. */
typedef struct moe_envelope_buffers {
    moe_buf body, header;
} moe_envelope_buffers;
void moe_envelope_buffers_free(moe_envelope_buffers *buffers);

/* Packs `envelope` with `body` (may be NULL) and what describes the payload; frames[0] then points into `buffers`, the others
 * at the payload, and num_payload + 1 frames are to be sent. INVALID_ARGUMENT: too many frames, or a header over its limit;
 * RESOURCE_EXHAUSTED: out of memory. */
moe_status moe_envelope_pack(moe_envelope_buffers *buffers, Moesaic__V1__Envelope *envelope, const ProtobufCMessage *body,
                             const moe_frame *payload, int num_payload, moe_frame frames[MOE_MAX_FRAMES], moe_error *err);
