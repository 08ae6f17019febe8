/* From sampled tokens to what the client sees: detokenized text, stop strings and tokens, the reason it ended. */
#pragma once
#include "router/engine/request.h"

typedef struct moe_output_processor moe_output_processor;

typedef struct moe_output_config { /* borrowed for the call of new, except the tokenizer, eos_ids and sampling, which must outlive
                                      it */
    const moe_tokenizer *tokenizer; /* NULL: no text, no stop strings */
    const moe_sampling_params *sampling;
    const int32_t *eos_ids;
    int32_t num_eos;
    const char *const *stop;
    int32_t num_stop;
    bool include_stop_in_output;
} moe_output_config;

/* INVALID_ARGUMENT for stop strings without a tokenizer, for empty ones and for more or longer ones than the limits in request.h.
 */
moe_status moe_output_processor_new(const moe_output_config *config, moe_output_processor **out, moe_error *err);
void moe_output_processor_free(moe_output_processor **processor); /* NULLs; idempotent */

/* Takes one sampled token and fills text, token_ids, finish (STOP on eos, a stop token or a stop string; LENGTH at max_tokens),
 * stop_reason and stop_token_id of *out, zeroing the rest. What *out points to is valid until the next feed. Text that could
 * still become a stop string is held back; at the end it is either dropped with the stop string or emitted. Of several stop
 * strings the one that is complete first ends the text. An eos or stop token adds no text unless include_stop_in_output (and,
 * where it is special, not skip_special_tokens). Stop strings and tokens are taken only behind min_tokens. An error of memory
 * ends with finish ERROR and RESOURCE_EXHAUSTED. */
void moe_output_processor_feed(moe_output_processor *processor, int32_t token, moe_output *out);
