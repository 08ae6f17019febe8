/* The prompts of one request as token ids. */
#pragma once
#include "router/http/openai_params.h"

typedef struct moe_prompt {
    moe_token_ids tokens; /* owned */
    moe_buf text;         /* what `echo` gives back; filled only for that */
} moe_prompt;

typedef struct moe_prompts {
    moe_prompt *list; /* owned */
    int32_t count;
} moe_prompts;

/* By params->endpoint: renders and encodes the messages, or encodes the prompts (ids are taken as they are). False with *error
 * filled: no template or tokenizer, what the template raised, an empty prompt, more tokens than the model's length allows.
 * `prompts` is to be freed in either case. */
bool moe_prompts_make(const moe_inference *inference, const moe_openai_params *params, moe_prompts *prompts,
                      moe_http_error *error);
void moe_prompts_free(moe_prompts *prompts); /* idempotent */

/* The ids of the messages by the model's chat template; also for /tokenize. Caller owns out->ids. */
bool moe_prompt_of_messages(const moe_inference *inference, const moe_openai_params *params, moe_token_ids *out,
                            moe_http_error *error);

/* A JSON array of the ids; NULL when out of memory. */
json_t *moe_token_ids_json(const int32_t *ids, int32_t count);
