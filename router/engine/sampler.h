/* From a row of logits to the next token. Greedy, or drawn by a counter-based generator from (seed, output index), so that a
 * request's tokens do not depend on what else runs. One thread per sampler (scratch memory); no allocation while sampling. */
#pragma once
#include "common/backend.h"
#include "router/engine/request.h"

typedef struct moe_sampler moe_sampler;

moe_status moe_sampler_new(int32_t vocab, moe_sampler **out, moe_error *err);
void moe_sampler_free(moe_sampler **sampler); /* NULLs; idempotent */

typedef struct moe_sample_input {
    const float *logits; /* [vocab], raw; left as they are. NULL: only the highest are known, as a moe_segment gives them: */
    const int32_t *top_ids;
    const float *top_logits;
    int32_t num_top; /* at least moe_sampler_num_top, or all tokens */
    const moe_sampling_params *params;
    const moe_logit_bias *logit_bias;
    int32_t num_logit_bias;
    const int32_t *tokens;          /* prompt, then output */
    int32_t num_prompt, num_tokens; /* the token sampled is output number num_tokens - num_prompt */
    const int32_t *eos_ids;         /* with params->stop_token_ids banned until min_tokens */
    int32_t num_eos;
} moe_sample_input;

/* How many of a row's highest logits decide the next token; 0: all are needed. Reads all of `input` but the logits. */
int32_t moe_sampler_num_top(const moe_sample_input *input);

/* Order: logit_bias, min_tokens ban, repetition penalty (prompt and output), presence and frequency penalties (output), then
 * greedy (lowest id wins ties) or temperature, top-k, top-p, min-p and a draw. *logprobs is filled where params->logprobs >= 0,
 * from the raw logits. The tokens given must be in the vocabulary. INTERNAL where a logit is NaN or infinite, or no token is
 * left; INVALID_ARGUMENT where logit_bias names a token that does not exist. O(vocab) on average, whatever is asked for. The
 * highest logits alone give exactly the token that all of them give. */
moe_status moe_sampler_sample(moe_sampler *sampler, const moe_sample_input *input, int32_t *token, moe_token_logprobs *logprobs,
                              moe_error *err);

/* The log-probability and rank of `target`, and the `num_top` likeliest tokens (0 … MOE_MAX_LOGPROBS), from raw logits. Of equal
 * ones the lower id ranks first. INTERNAL as above. */
moe_status moe_sampler_logprobs(moe_sampler *sampler, const float *logits, int32_t target, int32_t num_top,
                                moe_token_logprobs *out, moe_error *err);
