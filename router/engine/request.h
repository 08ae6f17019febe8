/* What the fronts (HTTP, RPC) ask of the engine, and what comes back. */
#pragma once
#include "common/status.h"
#include "router/tokenizer/tokenizer.h"

#define MOE_MAX_STOP_STRINGS 16
#define MOE_MAX_STOP_STRING_BYTES 1024
#define MOE_MAX_LOGPROBS 20
#define MOE_MAX_LOGIT_BIAS 1024
#define MOE_MAX_EOS_AND_STOPS 64

typedef struct moe_logit_bias {
    int32_t token_id;
    float bias;
} moe_logit_bias;

typedef struct moe_sampling_params {
    float temperature;                         /* 0: greedy */
    float top_p;                               /* (0, 1]; 1: off */
    int32_t top_k;                             /* 0: off */
    float min_p;                               /* [0, 1]; 0: off */
    float repetition_penalty;                  /* > 0; 1: off; over prompt and output tokens */
    float presence_penalty, frequency_penalty; /* [-2, 2]; over output tokens */
    uint64_t seed;                             /* always set: the front draws one where the client gave none */
    int32_t max_tokens;                        /* ≥ 0; the engine lowers it to what the model's length allows */
    int32_t min_tokens;                        /* eos and stops are not taken before that many */
    bool ignore_eos;
    int32_t stop_token_ids[MOE_MAX_EOS_AND_STOPS]; /* besides the model's eos ids */
    int32_t num_stop_token_ids;
    int32_t logprobs;        /* -1: none; n: the chosen token's and the n likeliest (at most MOE_MAX_LOGPROBS) */
    int32_t prompt_logprobs; /* likewise for every prompt token but the first */
    bool skip_special_tokens;
} moe_sampling_params;

/* Borrowed for the call of moe_engine_submit, which copies what it keeps. */
typedef struct moe_request {
    const char *id; /* x-request-id, for logs */
    const int32_t *prompt;
    int32_t prompt_tokens;
    moe_sampling_params sampling;
    const char *const *stop; /* stop strings */
    int32_t num_stop;
    bool include_stop_in_output;
    const moe_logit_bias *logit_bias;
    int32_t num_logit_bias;
} moe_request;

typedef enum moe_finish_reason { MOE_FINISH_NONE, MOE_FINISH_STOP, MOE_FINISH_LENGTH, MOE_FINISH_ERROR } moe_finish_reason;

/* ln of the softmax of the raw logits (before penalties and temperature), as vLLM reports. */
typedef struct moe_logprob {
    int32_t token_id;
    float logprob;
    int32_t rank; /* 1: likeliest */
} moe_logprob;

typedef struct moe_token_logprobs {
    moe_logprob chosen;
    int32_t num_top;
    moe_logprob top[MOE_MAX_LOGPROBS]; /* likeliest first */
} moe_token_logprobs;

/* One event of a request; borrowed for the callback. Exactly one event has finish != NONE, and it is the last. */
typedef struct moe_output {
    const char *text; /* whole UTF-8 characters that became certain with this event; "" often; text held back for a possible stop
                         string comes later or never */
    size_t text_bytes;
    const int32_t *token_ids; /* sampled tokens that this event adds (usually one; none in a closing event) */
    int32_t num_tokens;
    const moe_token_logprobs *logprobs; /* [num_tokens] where asked for, else NULL */
    const moe_token_logprobs
        *prompt_logprobs; /* [prompt_tokens - 1] for prompt tokens 1 …, in the first event only, where asked for */
    int32_t num_prompt_logprobs;
    moe_finish_reason finish;
    moe_status status; /* with finish ERROR: UNAVAILABLE (no replica left), CANCELLED, RESOURCE_EXHAUSTED, … */
    const char *message;
    const char *stop_reason;                  /* the stop string that ended it, or NULL */
    int32_t stop_token_id;                    /* the stop token that ended it, or -1 */
    int32_t prompt_tokens, completion_tokens; /* so far */
} moe_output;

/* Called on the engine's thread; must not block. */
typedef void (*moe_on_output)(void *ctx, const moe_output *output);
