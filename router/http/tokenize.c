/* /tokenize and /detokenize, in vLLM's wording */
#include <string.h>

#include "common/alloc.h"
#include "router/http/openai_readers.h"
#include "router/http/prompts.h"
#include "router/http/routes.h"
#include "router/http/server_internal.h"

static bool parse(moe_http_exchange *exchange, moe_endpoint endpoint, moe_openai_params *params, moe_http_error *error) {
    const char *text;
    size_t size;
    const moe_inference *inference = exchange->server->inference;
    if (!inference->tokenizer)
        return moe_http_fail(error, 400, "unsupported_parameter", NULL, "This server runs without a tokenizer.");
    return moe_http_body(exchange, &text, &size, error) &&
           moe_openai_params_parse(text, size, endpoint, inference, params, error);
}

static json_t *strings_json(const moe_inference *inference, const moe_token_ids *tokens) {
    json_t *list = json_array();
    for (int32_t i = 0; i < tokens->count; i++) {
        const char *spelling = moe_tokenizer_token(inference->tokenizer, tokens->ids[i]);
        json_array_append_new(list, json_string(spelling ? spelling : ""));
    }
    return list;
}

static bool encode(const moe_inference *inference, const moe_openai_params *params, moe_token_ids *tokens,
                   moe_http_error *error) {
    moe_error err;
    if (params->messages) return moe_prompt_of_messages(inference, params, tokens, error);
    moe_status status = moe_tokenizer_encode(inference->tokenizer, json_string_value(params->prompt),
                                             json_string_length(params->prompt), params->add_special_tokens, tokens, &err);
    return status == MOE_OK || moe_http_fail_status(error, status, "prompt", err.message);
}

void moe_http_handle_tokenize(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    const moe_inference *inference = exchange->server->inference;
    moe_openai_params params = {0};
    moe_token_ids tokens = {0};
    moe_http_error error;
    if (parse(exchange, MOE_ENDPOINT_TOKENIZE, &params, &error) && encode(inference, &params, &tokens, &error)) {
        json_t *strings = params.return_token_strings ? strings_json(inference, &tokens) : json_null();
        moe_http_reply_json(
            exchange, 200,
            json_pack("{s:i, s:i, s:o, s:o}", "count", (int)tokens.count, "max_model_len", (int)inference->max_model_len,
                      "tokens", moe_token_ids_json(tokens.ids, tokens.count), "token_strs", strings));
    } else {
        moe_http_reply_error(exchange, &error);
    }
    moe_free(tokens.ids);
    moe_openai_params_free(&params);
}

/* The text that the ids stand for; false when out of memory. */
static bool decode(const moe_inference *inference, const json_t *ids, moe_buf *text, moe_http_error *error) {
    int32_t count = (int32_t)json_array_size(ids);
    int32_t *list = moe_calloc((size_t)count + 1, sizeof *list);
    if (!list) return moe_http_fail_memory(error);
    for (int32_t i = 0; i < count; i++) {
        int64_t id = 0;
        moe_openai_integer(json_array_get(ids, (size_t)i), &id); /* checked when the parameter was read */
        list[i] = (int32_t)id;
    }
    moe_tokenizer_decode(inference->tokenizer, list, count, false, text);
    moe_free(list);
    return !text->failed || moe_http_fail_memory(error);
}

void moe_http_handle_detokenize(moe_http_exchange *exchange, const char *rest) {
    (void)rest;
    moe_openai_params params = {0};
    moe_buf text = {0};
    moe_http_error error;
    if (parse(exchange, MOE_ENDPOINT_DETOKENIZE, &params, &error) &&
        decode(exchange->server->inference, params.tokens, &text, &error))
        moe_http_reply_json(exchange, 200, json_pack("{s:o}", "prompt", json_stringn(moe_buf_text(&text), text.size)));
    else
        moe_http_reply_error(exchange, &error);
    moe_buf_free(&text);
    moe_openai_params_free(&params);
}
