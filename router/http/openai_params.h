/* The JSON bodies of /v1/chat/completions, /v1/completions, /tokenize and /detokenize: every parameter is one row of the table in
 * openai_params.c. What is unknown, not built, of the wrong type or out of range is a 400 that names the parameter; null is the
 * same as absent. */
#pragma once
#include <jansson.h>

#include "router/http/http_error.h"
#include "router/inference.h"

#define MOE_HTTP_MAX_N 16        /* choices of one prompt */
#define MOE_HTTP_MAX_CHOICES 256 /* of one request: prompts × n */
#define MOE_HTTP_MAX_MESSAGES 4096

typedef enum moe_endpoint {
    MOE_ENDPOINT_CHAT = 1,
    MOE_ENDPOINT_COMPLETIONS = 2,
    MOE_ENDPOINT_TOKENIZE = 4,
    MOE_ENDPOINT_DETOKENIZE = 8
} moe_endpoint;

typedef struct moe_openai_params {
    json_t *body; /* owned; what is borrowed below lives in it */
    moe_endpoint endpoint;
    moe_sampling_params sampling;
    int32_t n, best_of; /* best_of 0: not given */
    bool max_tokens_given, stream, stream_options_given, include_usage, echo, logprobs_wanted, return_token_ids, tokens_as_ids,
        return_token_strings;
    bool add_special_tokens, add_generation_prompt, include_stop_in_output;
    int32_t top_logprobs; /* -1: not given */
    const char *stop[MOE_MAX_STOP_STRINGS];
    int32_t num_stop;
    moe_logit_bias logit_bias[MOE_MAX_LOGIT_BIAS];
    int32_t num_logit_bias;
    json_t *messages;                 /* owned: as the chat template wants them; NULL: none given */
    const json_t *template_variables; /* chat_template_kwargs, borrowed; NULL: none given */
    const json_t *prompt;             /* borrowed; NULL: none given */
    const json_t *tokens;             /* of /detokenize, borrowed */
} moe_openai_params;

/* Parses a body; defaults come from `inference`. False with *error filled. `params` is to be freed in either case. */
bool moe_openai_params_parse(const char *text, size_t size, moe_endpoint endpoint, const moe_inference *inference,
                             moe_openai_params *params, moe_http_error *error);
/* The same from JSON made here (the RPC front's); steals `body`, NULL counts as out of memory. */
bool moe_openai_params_from_json(json_t *body, moe_endpoint endpoint, const moe_inference *inference, moe_openai_params *params,
                                 moe_http_error *error);
void moe_openai_params_free(moe_openai_params *params); /* idempotent */

/* Whether token ids in a JSON array are integers below `vocab`; else 400 naming `param`. */
bool moe_openai_check_token_ids(const json_t *ids, int32_t vocab, const char *param, moe_http_error *error);
