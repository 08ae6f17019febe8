/* The decoder of a tokenizer.json, worked out at load into the bytes that each token stands for. */
#pragma once
#include <jansson.h>

#include "router/tokenizer/vocab.h"

#define MOE_DECODER_MAX_STEPS 16
#define MOE_DECODER_MAX_BYTES (512u << 20) /* of all tokens together */

typedef struct moe_decoder {
    moe_buf bytes;
    uint32_t *offsets; /* [num_entries + 1]: token i stands for bytes[offsets[i] … offsets[i + 1]) */
    int strip_first;   /* the ASCII byte that is left out where the whole text begins with it, or -1 */
} moe_decoder;

/* `json`: the "decoder" field. UNIMPLEMENTED naming the type or option; a tokenizer without a decoder is refused too. */
moe_status moe_decoder_load(const json_t *json, const moe_vocab *vocab, moe_decoder *out, moe_error *err);
void moe_decoder_free(moe_decoder *decoder);
