/* One chat or text completion: its choices, each an engine request, from the first token to the reply's last byte. What the two
 * endpoints word differently is their moe_choice_format. */
#pragma once
#include "router/generation.h"
#include "router/http/exchange.h"
#include "router/http/openai_params.h"
#include "router/http/prompts.h"

#define MOE_COMPLETION_ID_BYTES 64

typedef struct moe_completion moe_completion;

typedef struct moe_choice {
    moe_completion *completion;
    int32_t index; /* in the reply; choices of one prompt stand together */
    const moe_prompt *prompt;
    moe_generation *generation; /* NULL once it has ended */
    bool begun;                 /* had its first event */
    bool prompt_ids_given;      /* to the client */
    /* What the client was not given yet: all of it without streaming. */
    moe_buf text;
    json_t *token_ids;   /* array, where asked for, else NULL */
    json_t *logprobs;    /* as its format builds it, where asked for, else NULL */
    int64_t text_offset; /* characters of the text before the next token */
    moe_finish_reason finish;
    json_t *stop_reason; /* the stop string or token that ended it, or null */
    int32_t completion_tokens;
} moe_choice;

typedef struct moe_choice_format {
    const char *id_prefix, *object, *chunk_object;
    /* The first event: what stands before the sampled tokens. May be NULL. False: out of memory. */
    bool (*begin)(moe_choice *choice, const moe_output *first);
    /* One sampled token's log-probabilities, into choice->logprobs. False: out of memory. */
    bool (*add_logprobs)(moe_choice *choice, const moe_token_logprobs *logprobs);
    json_t *(*role)(moe_choice *choice);   /* the chunk before a choice's first; NULL: there is none */
    json_t *(*delta)(moe_choice *choice);  /* a chunk with what is new; takes it from the choice */
    json_t *(*finish)(moe_choice *choice); /* the last chunk */
    json_t *(*whole)(moe_choice *choice);  /* without streaming; takes it from the choice */
    bool prompt_ids_on_top;                /* where return_token_ids puts the prompt's: beside `choices`, or in each choice */
} moe_choice_format;

struct moe_completion {
    moe_http_exchange *exchange;
    const moe_inference *inference;
    const moe_choice_format *format;
    moe_openai_params params;
    moe_prompts prompts;
    moe_choice *choices;
    int32_t num_choices, num_unfinished;
    char id[MOE_COMPLETION_ID_BYTES];
    int64_t created_s; /* wall clock */
};

/* Admits, parses, tokenizes, starts the choices; or answers why not. */
void moe_http_complete(moe_http_exchange *exchange, moe_endpoint endpoint, const moe_choice_format *format);

/* The server's moe_generation_queue calls it; `user` is a moe_choice. */
void moe_http_on_output(void *user, const moe_output *output);

/* "stop", "length", or null while it goes on. New reference. */
json_t *moe_finish_reason_json(moe_finish_reason reason);
/* Takes the choice's text as a JSON string; "" where there is none. */
json_t *moe_choice_take_text(moe_choice *choice);
/* Takes a member of the choice; null where there is none. */
json_t *moe_take_json(json_t **member);
/* Adds token_ids, and the first time prompt_token_ids, where asked for (vLLM's return_token_ids). Passes `json` through. */
json_t *moe_choice_add_token_ids(moe_choice *choice, json_t *json);
