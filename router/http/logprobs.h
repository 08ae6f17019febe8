/* Log-probabilities in the two wordings of OpenAI's API. */
#pragma once
#include "router/http/generate.h"

/* Appends to choice->logprobs as {"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}. False: out of memory. */
bool moe_chat_add_logprobs(moe_choice *choice, const moe_token_logprobs *logprobs);

/* Appends to choice->logprobs as {text_offset, token_logprobs, tokens, top_logprobs}; offsets count characters. `logprobs` NULL:
 * a prompt's first token, which has none. `in_text`: the token is part of the choice's text. */
bool moe_completions_add_logprobs(moe_choice *choice, int32_t token_id, const moe_token_logprobs *logprobs, bool in_text);
