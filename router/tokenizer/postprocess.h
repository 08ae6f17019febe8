/* The post-processor of a tokenizer.json: special tokens before and after the encoded text. */
#pragma once
#include <jansson.h>

#include "router/tokenizer/id_list.h"
#include "router/tokenizer/vocab.h"

#define MOE_POSTPROCESSOR_MAX_IDS 64 /* on either side */

typedef struct moe_postprocessor {
    int32_t before[MOE_POSTPROCESSOR_MAX_IDS], after[MOE_POSTPROCESSOR_MAX_IDS];
    int num_before, num_after;
} moe_postprocessor;

/* `json`: the "post_processor" field, NULL or null for none. UNIMPLEMENTED naming the type; INVALID_ARGUMENT. */
moe_status moe_postprocessor_load(const json_t *json, const moe_vocab *vocab, moe_postprocessor *out, moe_error *err);
