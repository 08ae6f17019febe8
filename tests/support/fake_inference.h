/* An engine that plays a script, from a thread of its own: what the fronts are tested against. */
#pragma once
#include <pthread.h>

#include "router/inference.h"

#define FAKE_MAX_REQUESTS 512
#define FAKE_MAX_PROMPT_TOKENS 4096

typedef struct fake_request { /* as submitted, for the test to look at */
    uint64_t id;
    char request_id[160];
    int32_t prompt[FAKE_MAX_PROMPT_TOKENS];
    int32_t prompt_tokens;
    moe_sampling_params sampling;
    char stop[MOE_MAX_STOP_STRINGS][64];
    int32_t num_stop;
    moe_logit_bias logit_bias[8];
    int32_t num_logit_bias;
    bool include_stop_in_output;
    /* the engine's side */
    moe_on_output on_output;
    void *output_ctx;
    int32_t sent;
    bool cancelled, ended;
} fake_request;

typedef struct fake_step { /* one event of every request */
    const char *text;
    int32_t token_id; /* -1: none */
} fake_step;

typedef struct fake_inference {
    moe_inference inference; /* for the front */
    /* The script; set before requests come. */
    const fake_step *steps;
    int32_t num_steps;
    int32_t repeat;           /* the steps are played that many times */
    moe_finish_reason finish; /* of the closing event */
    moe_status fail_status;   /* with finish ERROR */
    const char *fail_message, *stop_reason;
    int32_t stop_token_id;
    moe_status submit_status; /* what submit answers; MOE_OK takes the request */
    int32_t refuse_from;      /* submissions from that many on get RESOURCE_EXHAUSTED; 0: none */
    moe_inference_view view;
    /* Under the mutex. */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t thread;
    int64_t permits; /* events that may still be sent; INT64_MAX: no end */
    bool stopping;
    int32_t num_requests, num_cancelled, num_ended;
    fake_request *requests; /* [FAKE_MAX_REQUESTS] */
} fake_inference;

/* Default: the steps "Hello", ",", " world" once, finish STOP, no limit of permits; tokenizer and template from model_dir. */
void fake_inference_start(fake_inference *fake, const char *model_dir);
void fake_inference_stop(fake_inference *fake); /* ends what is live with CANCELLED */

void fake_inference_permit(fake_inference *fake, int64_t events); /* sets the permits */
/* Waits for all requests to end, then forgets them. */
void fake_inference_reset(fake_inference *fake);
/* Waits, at most 10 s, then fails the test. */
void fake_inference_await(fake_inference *fake, const int32_t *counter, int32_t value);
