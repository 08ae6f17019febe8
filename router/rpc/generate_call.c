/* InferenceService.Generate: one call, one engine request, a stream item for each of its events. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/alloc.h"
#include "router/http/openai_params.h"
#include "router/http/prompts.h"
#include "router/rpc/rpc_front_internal.h"

typedef struct generate_call {
    moe_rpc_call *call;
    moe_generation *generation;
} generate_call;

/* ---- the request, as the parameters of /v1/completions: one table checks both fronts ---- */

static json_t *ids_json(const uint32_t *ids, size_t count) {
    json_t *list = json_array();
    for (size_t i = 0; i < count; i++) json_array_append_new(list, json_integer(ids[i]));
    return list;
}

static json_t *strings_json(char *const *strings, size_t count) {
    json_t *list = json_array();
    for (size_t i = 0; i < count; i++) json_array_append_new(list, json_string(strings[i]));
    return list;
}

/* proto3 cannot tell a zero from an absent number: where zero is no legal value it stands for "off". */
static void add_sampling(json_t *body, const Moesaic__V1__SamplingParams *s) {
    json_object_set_new(body, "temperature", json_real(s->temperature));
    json_object_set_new(body, "top_p", json_real(s->top_p != 0 ? s->top_p : 1));
    json_object_set_new(body, "top_k", json_integer(s->top_k));
    json_object_set_new(body, "min_p", json_real(s->min_p));
    json_object_set_new(body, "repetition_penalty", json_real(s->repetition_penalty != 0 ? s->repetition_penalty : 1));
    json_object_set_new(body, "presence_penalty", json_real(s->presence_penalty));
    json_object_set_new(body, "frequency_penalty", json_real(s->frequency_penalty));
    json_object_set_new(body, "ignore_eos", json_boolean(s->ignore_eos));
    if (s->has_seed) json_object_set_new(body, "seed", json_integer((json_int_t)s->seed));
    if (s->max_tokens) json_object_set_new(body, "max_tokens", json_integer(s->max_tokens));
    if (s->n_stop) json_object_set_new(body, "stop", strings_json(s->stop, s->n_stop));
    if (s->n_stop_token_ids) json_object_set_new(body, "stop_token_ids", ids_json(s->stop_token_ids, s->n_stop_token_ids));
    if (s->has_logprobs) json_object_set_new(body, "logprobs", json_integer(s->logprobs));
}

/* A number that JSON has no word for (infinity, not-a-number), or a text that is not UTF-8. */
static bool has_unspeakable(const Moesaic__V1__SamplingParams *s) {
    const double numbers[] = {s->temperature,      s->top_p, s->min_p, s->repetition_penalty, s->presence_penalty,
                              s->frequency_penalty};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (!isfinite(numbers[i])) return true;
    for (size_t i = 0; i < s->n_stop; i++) {
        json_t *text = json_string(s->stop[i]);
        json_decref(text);
        if (!text) return true;
    }
    return false;
}

static bool read_request(const moe_inference *inference, const Moesaic__V1__GenerateRequest *request, moe_openai_params *params,
                         moe_http_error *error) {
    const char *model = request->model[0] ? request->model : inference->model;
    json_t *prompt = request->n_prompt_token_ids ? ids_json(request->prompt_token_ids, request->n_prompt_token_ids)
                                                 : json_string(request->prompt);
    json_t *body = prompt ? json_pack("{s:s, s:o}", "model", model, "prompt", prompt) : NULL;
    bool good = body && !(request->sampling && has_unspeakable(request->sampling));
    if (good && request->n_prompt_token_ids && request->prompt[0]) good = false;
    if (!good) {
        json_decref(body);
        return moe_http_fail(
            error, 400, "invalid_value", NULL,
            "The request must have a prompt or prompt_token_ids, not both, with texts in UTF-8 and finite numbers.");
    }
    if (request->sampling) add_sampling(body, request->sampling);
    if (!moe_openai_params_from_json(body, MOE_ENDPOINT_COMPLETIONS, inference, params, error)) return false;
    if (!params->max_tokens_given) params->sampling.max_tokens = inference->max_model_len;
    return true;
}

static moe_status status_of(const moe_http_error *error) {
    switch (error->http_status) {
        case 400:
            return MOE_INVALID_ARGUMENT;
        case 404:
            return MOE_NOT_FOUND;
        case 429:
            return MOE_RESOURCE_EXHAUSTED;
        case 503:
            return MOE_UNAVAILABLE;
        default:
            return MOE_INTERNAL;
    }
}

/* ---- the reply ---- */

static void end(generate_call *generate) {
    moe_generation_cancel(&generate->generation);
    moe_free(generate);
}

static void on_cancel(moe_rpc_call *call) {
    end(call->owner);
    moe_rpc_fail(call, MOE_CANCELLED, "cancelled by the caller", NULL);
}

/* The event's message, in `item`; its arrays in one allocation, to be freed with *memory. False when out of memory. */
static bool make_item(const moe_output *output, Moesaic__V1__GenerateResponse *item, char *text, void **memory) {
    size_t count = (size_t)output->num_tokens, logprobs = output->logprobs ? count : 0;
    size_t bytes =
        logprobs * (sizeof(Moesaic__V1__TokenLogprob) + sizeof(Moesaic__V1__TokenLogprob *)) + count * sizeof(uint32_t);
    Moesaic__V1__TokenLogprob *list = *memory = moe_calloc(1, bytes + 1);
    if (!list) return false;
    Moesaic__V1__TokenLogprob **pointers = (Moesaic__V1__TokenLogprob **)(list + logprobs);
    uint32_t *ids = (uint32_t *)(pointers + logprobs);
    for (size_t i = 0; i < count; i++) ids[i] = (uint32_t)output->token_ids[i];
    for (size_t i = 0; i < logprobs; i++) {
        moesaic__v1__token_logprob__init(&list[i]);
        list[i].token_id = (uint32_t)output->logprobs[i].chosen.token_id;
        list[i].logprob = output->logprobs[i].chosen.logprob;
        pointers[i] = &list[i];
    }
    moesaic__v1__generate_response__init(item);
    item->text = text;
    item->token_ids = ids;
    item->n_token_ids = count;
    item->logprobs = pointers;
    item->n_logprobs = logprobs;
    item->prompt_tokens = (uint32_t)output->prompt_tokens;
    item->completion_tokens = (uint32_t)output->completion_tokens;
    if (output->finish == MOE_FINISH_STOP) item->finish_reason = (char *)"stop";
    if (output->finish == MOE_FINISH_LENGTH) item->finish_reason = (char *)"length";
    return true;
}

void moe_rpc_on_output(void *user, const moe_output *output) {
    generate_call *generate = user;
    moe_rpc_call *call = generate->call;
    bool last = output->finish != MOE_FINISH_NONE, failed = output->finish == MOE_FINISH_ERROR;
    if (last) generate->generation = NULL;
    Moesaic__V1__GenerateResponse item;
    void *memory = NULL;
    char *text = moe_strndup(output->text, output->text_bytes);
    bool made = !failed && text && make_item(output, &item, text, &memory);
    if (made && !last) {
        moe_rpc_stream(call, &item.base);
    } else {
        end(generate);
        if (made)
            moe_rpc_respond(call, &item.base, NULL, 0);
        else if (failed)
            moe_rpc_fail(call, output->status == MOE_OK ? MOE_INTERNAL : output->status, output->message ? output->message : "",
                         NULL);
        else
            moe_rpc_fail(call, MOE_RESOURCE_EXHAUSTED, "out of memory", NULL);
    }
    moe_free(memory);
    moe_free(text);
}

/* ---- start ---- */

static bool admit(const moe_rpc_front *front, moe_http_error *error) {
    moe_error err;
    if (atomic_load(&front->draining))
        return moe_http_fail_status(error, MOE_UNAVAILABLE, NULL, "This router is shutting down: it takes no new requests.");
    moe_status status = moe_inference_admit(front->config.inference, &err);
    return status == MOE_OK || moe_http_fail_status(error, status, NULL, err.message);
}

static moe_status submit(moe_rpc_front *front, generate_call *generate, const moe_openai_params *params, const moe_prompt *prompt,
                         moe_error *err) {
    char id[64];
    snprintf(id, sizeof id, "rpc-%llu-%llu", (unsigned long long)generate->call->peer,
             (unsigned long long)generate->call->call_id);
    moe_request request = {.id = id,
                           .prompt = prompt->tokens.ids,
                           .prompt_tokens = prompt->tokens.count,
                           .sampling = params->sampling,
                           .stop = params->stop,
                           .num_stop = params->num_stop};
    return moe_generation_start(front->queue, &request, generate, &generate->generation, err);
}

/* Admits, checks, tokenizes, submits; the call's status, with *err filled unless OK. */
static moe_status begin(moe_rpc_front *front, generate_call *generate, const Moesaic__V1__GenerateRequest *request,
                        moe_error *err) {
    const moe_inference *inference = front->config.inference;
    moe_http_error error = {0};
    moe_prompts prompts = {0};
    moe_status status;
    moe_openai_params *params = moe_calloc(1, sizeof *params);
    if (!params) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory");
    if (admit(front, &error) && read_request(inference, request, params, &error) &&
        moe_prompts_make(inference, params, &prompts, &error))
        status = submit(front, generate, params, &prompts.list[0], err);
    else
        status = moe_fail(err, status_of(&error), "%s", error.message);
    moe_prompts_free(&prompts);
    moe_openai_params_free(params);
    moe_free(params);
    return status;
}

void moe_rpc_handle_generate(void *ctx, moe_rpc_call *call, const ProtobufCMessage *request, const moe_frame *payload,
                             int num_payload) {
    (void)payload, (void)num_payload;
    moe_error err;
    generate_call *generate = moe_calloc(1, sizeof *generate);
    if (!generate) {
        moe_rpc_fail(call, MOE_RESOURCE_EXHAUSTED, "out of memory", NULL);
        return;
    }
    generate->call = call;
    moe_status status = begin(ctx, generate, (const Moesaic__V1__GenerateRequest *)request, &err);
    if (status == MOE_OK) {
        call->owner = generate;
        call->on_cancel = on_cancel;
        return;
    }
    moe_free(generate);
    moe_rpc_fail(call, status, err.message, NULL);
}
