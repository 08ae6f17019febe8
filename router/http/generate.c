#include "router/http/generate.h"

#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "common/random.h"
#include "router/http/server_internal.h"
#include "router/http/sse.h"

#define SYSTEM_FINGERPRINT "moesaic-" MOESAIC_VERSION
#define FINGERPRINT_BYTES 128

static void free_completion(moe_completion *completion) {
    for (int32_t i = 0; completion->choices && i < completion->num_choices; i++) {
        moe_choice *choice = &completion->choices[i];
        moe_generation_cancel(&choice->generation);
        moe_buf_free(&choice->text);
        json_decref(choice->token_ids);
        json_decref(choice->logprobs);
        json_decref(choice->stop_reason);
    }
    moe_free(completion->choices);
    moe_prompts_free(&completion->prompts);
    moe_openai_params_free(&completion->params);
    moe_free(completion);
}

static void on_gone(moe_http_exchange *exchange) { free_completion(exchange->owner); }

/* Ends everything with an error: as the reply where nothing was sent yet, else as the stream's last event. */
static void fail(moe_completion *completion, const moe_http_error *error) {
    moe_http_exchange *exchange = completion->exchange;
    exchange->on_gone = NULL;
    free_completion(completion);
    if (!exchange->streaming)
        moe_http_reply_error(exchange, error);
    else if (moe_sse_send(exchange, moe_http_error_json(error)))
        moe_http_stream_end(exchange);
}

static void fail_memory(moe_completion *completion) {
    moe_http_error error;
    moe_http_fail_memory(&error);
    fail(completion, &error);
}

/* ---- JSON ---- */

json_t *moe_finish_reason_json(moe_finish_reason reason) {
    if (reason == MOE_FINISH_STOP) return json_string("stop");
    return reason == MOE_FINISH_LENGTH ? json_string("length") : json_null();
}

json_t *moe_choice_take_text(moe_choice *choice) {
    json_t *text = choice->text.failed ? NULL : json_stringn(moe_buf_text(&choice->text), choice->text.size);
    moe_buf_clear(&choice->text);
    return text;
}

json_t *moe_take_json(json_t **member) {
    json_t *taken = *member ? *member : json_null();
    *member = NULL;
    return taken;
}

json_t *moe_choice_add_token_ids(moe_choice *choice, json_t *json) {
    const moe_token_ids *prompt = &choice->prompt->tokens;
    if (!choice->completion->params.return_token_ids) return json;
    if (!choice->prompt_ids_given && !choice->completion->format->prompt_ids_on_top)
        json_object_set_new(json, "prompt_token_ids", moe_token_ids_json(prompt->ids, prompt->count));
    json_t *ids = choice->token_ids ? choice->token_ids : json_array();
    choice->token_ids = NULL;
    choice->prompt_ids_given = true;
    json_object_set_new(json, "token_ids", ids);
    return json;
}

static json_t *usage_json(const moe_completion *completion) {
    json_int_t prompt = 0, completed = 0;
    for (int32_t i = 0; i < completion->prompts.count; i++) prompt += completion->prompts.list[i].tokens.count;
    for (int32_t i = 0; i < completion->num_choices; i++) completed += completion->choices[i].completion_tokens;
    return json_pack("{s:I, s:I, s:I}", "prompt_tokens", prompt, "completion_tokens", completed, "total_tokens",
                     prompt + completed);
}

/* Steals `choices` and `usage` (NULL: left out). */
static json_t *body_json(const moe_completion *completion, const char *object, json_t *choices, json_t *usage, bool prompt_ids) {
    const char *lossy = completion->inference->lossy;
    char fingerprint[FINGERPRINT_BYTES];
    snprintf(fingerprint, sizeof fingerprint, SYSTEM_FINGERPRINT "%s%s", lossy ? "-" : "", lossy ? lossy : "");
    json_t *body = json_pack("{s:s, s:s, s:I, s:s, s:s, s:o}", "id", completion->id, "object", object, "created",
                             (json_int_t)completion->created_s, "model", completion->inference->model, "system_fingerprint",
                             fingerprint, "choices", choices);
    if (usage) json_object_set_new(body, "usage", usage);
    if (prompt_ids && completion->format->prompt_ids_on_top && completion->params.return_token_ids)
        json_object_set_new(body, "prompt_token_ids",
                            moe_token_ids_json(completion->prompts.list[0].tokens.ids, completion->prompts.list[0].tokens.count));
    return body;
}

static bool send_chunk(moe_completion *completion, json_t *choice, bool prompt_ids) {
    json_t *usage = completion->params.include_usage ? json_null() : NULL;
    json_t *body = body_json(completion, completion->format->chunk_object, json_pack("[o]", choice), usage, prompt_ids);
    return moe_sse_send(completion->exchange, body);
}

/* ---- events ---- */

/* False when out of memory. */
static bool take_output(moe_choice *choice, const moe_output *output) {
    const moe_completion *completion = choice->completion;
    bool good = true;
    if (!choice->begun && completion->format->begin) good = completion->format->begin(choice, output);
    moe_buf_append(&choice->text, output->text, output->text_bytes);
    choice->completion_tokens = output->completion_tokens;
    for (int32_t i = 0; good && completion->params.return_token_ids && i < output->num_tokens; i++) {
        if (!choice->token_ids) choice->token_ids = json_array();
        good = json_array_append_new(choice->token_ids, json_integer(output->token_ids[i])) == 0;
    }
    for (int32_t i = 0; good && output->logprobs && i < output->num_tokens; i++)
        good = completion->format->add_logprobs(choice, &output->logprobs[i]);
    choice->finish = output->finish;
    if (output->stop_reason)
        choice->stop_reason = json_string(output->stop_reason);
    else if (output->finish == MOE_FINISH_STOP && output->stop_token_id >= 0)
        choice->stop_reason = json_integer(output->stop_token_id);
    return good && !choice->text.failed;
}

/* The chunks that an event is worth. False when the exchange, and with it the completion, is gone. */
static bool stream_choice(moe_choice *choice, bool first) {
    moe_completion *completion = choice->completion;
    const moe_choice_format *format = completion->format;
    bool news = choice->text.size || choice->token_ids || choice->logprobs;
    if (!completion->exchange->streaming) moe_http_stream_begin(completion->exchange, MOE_SSE_CONTENT_TYPE);
    if (first && format->role && !send_chunk(completion, format->role(choice), true)) return false;
    if (news && !send_chunk(completion, format->delta(choice), false)) return false;
    return choice->finish == MOE_FINISH_NONE || send_chunk(completion, format->finish(choice), false);
}

static void reply_whole(moe_completion *completion) {
    moe_http_exchange *exchange = completion->exchange;
    json_t *choices = json_array();
    for (int32_t i = 0; i < completion->num_choices; i++)
        json_array_append_new(choices, completion->format->whole(&completion->choices[i]));
    bool complete = json_array_size(choices) == (size_t)completion->num_choices;
    json_t *body = body_json(completion, completion->format->object, choices, usage_json(completion), true);
    if (!complete) {
        json_decref(body);
        body = NULL;
    }
    exchange->on_gone = NULL;
    free_completion(completion);
    moe_http_reply_json(exchange, 200, body);
}

static void end_stream(moe_completion *completion) {
    moe_http_exchange *exchange = completion->exchange;
    if (completion->params.include_usage) {
        json_t *body = body_json(completion, completion->format->chunk_object, json_array(), usage_json(completion), false);
        if (!moe_sse_send(exchange, body)) return;
    }
    if (!moe_sse_send_done(exchange)) return;
    exchange->on_gone = NULL;
    free_completion(completion);
    moe_http_stream_end(exchange);
}

void moe_http_on_output(void *user, const moe_output *output) {
    moe_choice *choice = user;
    moe_completion *completion = choice->completion;
    moe_http_error error;
    if (output->finish != MOE_FINISH_NONE) choice->generation = NULL;
    if (output->finish == MOE_FINISH_ERROR && output->status == MOE_CANCELLED) {
        moe_http_cut_off(completion->exchange); /* by the server's own end: there is nobody to take a reply */
        return;
    }
    if (output->finish == MOE_FINISH_ERROR) {
        moe_http_fail_status(&error, output->status, NULL, output->message ? output->message : "The request failed.");
        fail(completion, &error);
        return;
    }
    bool first = !choice->begun;
    if (!take_output(choice, output)) {
        fail_memory(completion);
        return;
    }
    choice->begun = true;
    if (completion->params.stream && !stream_choice(choice, first)) return;
    if (output->finish == MOE_FINISH_NONE || --completion->num_unfinished > 0) return;
    if (completion->params.stream)
        end_stream(completion);
    else
        reply_whole(completion);
}

/* ---- start ---- */

/* The n choices of a prompt draw from streams of their own; the first is what n = 1 gives. */
static uint64_t choice_seed(uint64_t seed, int32_t i) { return i == 0 ? seed : moe_mix64(seed ^ moe_mix64((uint64_t)i)); }

static moe_status start_choice(moe_completion *completion, int32_t index, moe_error *err) {
    const moe_openai_params *params = &completion->params;
    moe_choice *choice = &completion->choices[index];
    choice->completion = completion;
    choice->index = index;
    choice->prompt = &completion->prompts.list[index / params->n];
    moe_request request = {
        .id = completion->exchange->request_id,
        .prompt = choice->prompt->tokens.ids,
        .prompt_tokens = choice->prompt->tokens.count,
        .sampling = params->sampling,
        .stop = params->stop,
        .num_stop = params->num_stop,
        .include_stop_in_output = params->include_stop_in_output,
        .logit_bias = params->logit_bias,
        .num_logit_bias = params->num_logit_bias,
    };
    request.sampling.seed = choice_seed(params->sampling.seed, index % params->n);
    return moe_generation_start(completion->exchange->server->queue, &request, choice, &choice->generation, err);
}

static bool start_choices(moe_completion *completion, moe_http_error *error) {
    moe_error err;
    int32_t count = completion->prompts.count * completion->params.n;
    if (count > MOE_HTTP_MAX_CHOICES)
        return moe_http_fail(error, 400, "invalid_value", "n", "%d prompts of %d choices are too many: the limit is %d choices.",
                             completion->prompts.count, completion->params.n, MOE_HTTP_MAX_CHOICES);
    completion->choices = moe_calloc((size_t)count, sizeof *completion->choices);
    if (!completion->choices) return moe_http_fail_memory(error);
    completion->num_choices = completion->num_unfinished = count;
    for (int32_t i = 0; i < count; i++) {
        moe_status status = start_choice(completion, i, &err);
        if (status != MOE_OK) return moe_http_fail_status(error, status, NULL, err.message);
    }
    return true;
}

static bool admit(const moe_http_exchange *exchange, moe_http_error *error) {
    moe_error err;
    if (atomic_load(&exchange->server->draining))
        return moe_http_fail_status(error, MOE_UNAVAILABLE, NULL, "This server is shutting down: it takes no new requests.");
    moe_status status = moe_inference_admit(exchange->server->inference, &err);
    return status == MOE_OK || moe_http_fail_status(error, status, NULL, err.message);
}

void moe_http_complete(moe_http_exchange *exchange, moe_endpoint endpoint, const moe_choice_format *format) {
    moe_http_error error = {0};
    const char *text;
    size_t size;
    /* Before anything of the request is read, so that refusing costs next to nothing. */
    moe_completion *completion = admit(exchange, &error) ? moe_calloc(1, sizeof *completion) : NULL;
    if (!completion) {
        if (!error.http_status) moe_http_fail_memory(&error);
        moe_http_reply_error(exchange, &error);
        return;
    }
    completion->exchange = exchange;
    completion->inference = exchange->server->inference;
    completion->format = format;
    completion->created_s = moe_wall_clock_s();
    snprintf(completion->id, sizeof completion->id, "%s-%016llx%016llx", format->id_prefix,
             (unsigned long long)moe_random_identity(), (unsigned long long)moe_random_identity());
    exchange->owner = completion;
    exchange->on_gone = on_gone;
    bool good = moe_http_body(exchange, &text, &size, &error) &&
                moe_openai_params_parse(text, size, endpoint, completion->inference, &completion->params, &error) &&
                moe_prompts_make(completion->inference, &completion->params, &completion->prompts, &error) &&
                start_choices(completion, &error);
    if (!good) fail(completion, &error);
}
