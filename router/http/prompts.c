#include "router/http/prompts.h"

#include <string.h>

#include "common/alloc.h"
#include "router/http/openai_readers.h"

static bool encode(const moe_inference *inference, const moe_openai_params *params, const char *param, const char *text,
                   size_t size, moe_token_ids *out, moe_http_error *error) {
    moe_error err;
    moe_status status = moe_tokenizer_encode(inference->tokenizer, text, size, params->add_special_tokens, out, &err);
    return status == MOE_OK || moe_http_fail_status(error, status, param, err.message);
}

bool moe_prompt_of_messages(const moe_inference *inference, const moe_openai_params *params, moe_token_ids *out,
                            moe_http_error *error) {
    if (!inference->tokenizer)
        return moe_http_fail(error, 400, "unsupported_parameter", "messages",
                             "This server runs without a tokenizer: send token ids to /v1/completions.");
    if (!inference->chat_template)
        return moe_http_fail(error, 400, "unsupported_parameter", "messages",
                             "The model has no chat template: send the whole prompt to /v1/completions.");
    moe_error err;
    moe_buf text = {0};
    json_t *variables =
        json_pack("{s:O, s:b}", "messages", params->messages, "add_generation_prompt", params->add_generation_prompt);
    bool good = variables || moe_http_fail_memory(error);
    if (good && params->template_variables && json_object_update_missing(variables, (json_t *)params->template_variables) != 0)
        good = moe_http_fail_memory(error);
    moe_status status = good ? moe_chat_template_render(inference->chat_template, variables, &text, &err) : MOE_OK;
    if (status != MOE_OK) good = moe_http_fail_status(error, status, "messages", err.message);
    if (good && text.failed) good = moe_http_fail_memory(error);
    if (good) good = encode(inference, params, "messages", moe_buf_text(&text), text.size, out, error);
    moe_buf_free(&text);
    json_decref(variables);
    return good;
}

static bool copy_ids(const json_t *value, moe_token_ids *out, moe_http_error *error) {
    size_t count = json_array_size(value);
    out->ids = moe_calloc(count, sizeof *out->ids);
    if (!out->ids) return moe_http_fail_memory(error);
    for (size_t i = 0; i < count; i++) {
        int64_t id = 0;
        moe_openai_integer(json_array_get(value, i), &id); /* checked when the parameter was read */
        out->ids[out->count++] = (int32_t)id;
    }
    return true;
}

static bool make_prompt(const moe_inference *inference, const moe_openai_params *params, const json_t *value, moe_prompt *prompt,
                        moe_http_error *error) {
    if (!json_is_string(value)) {
        if (!copy_ids(value, &prompt->tokens, error)) return false;
        if (params->echo && inference->tokenizer)
            moe_tokenizer_decode(inference->tokenizer, prompt->tokens.ids, prompt->tokens.count, false, &prompt->text);
    } else {
        const char *text = json_string_value(value);
        size_t size = json_string_length(value);
        if (!encode(inference, params, "prompt", text, size, &prompt->tokens, error)) return false;
        if (params->echo) moe_buf_append(&prompt->text, text, size);
    }
    return !prompt->text.failed || moe_http_fail_memory(error);
}

static bool check_length(const moe_inference *inference, const moe_openai_params *params, const moe_prompt *prompt,
                         const char *param, moe_http_error *error) {
    int32_t tokens = prompt->tokens.count, limit = inference->max_model_len;
    if (tokens == 0) return moe_http_fail(error, 400, "invalid_value", param, "The prompt has no tokens.");
    if (tokens >= limit)
        return moe_http_fail(error, 400, "context_length_exceeded", param,
                             "The prompt has %d tokens; the model takes %d with the reply's: shorten it.", tokens, limit);
    if (params->max_tokens_given && params->sampling.max_tokens > limit - tokens)
        return moe_http_fail(error, 400, "context_length_exceeded", "max_tokens",
                             "The prompt has %d tokens and %d are asked for; the model takes %d together.", tokens,
                             params->sampling.max_tokens, limit);
    return true;
}

bool moe_prompts_make(const moe_inference *inference, const moe_openai_params *params, moe_prompts *prompts,
                      moe_http_error *error) {
    bool chat = params->endpoint == MOE_ENDPOINT_CHAT;
    const json_t *value = params->prompt;
    /* A list of prompts, not of one prompt's ids. */
    bool several = !chat && json_is_array(value) && !json_is_number(json_array_get(value, 0));
    int32_t count = several ? (int32_t)json_array_size(value) : 1;
    *prompts = (moe_prompts){.list = moe_calloc((size_t)count, sizeof *prompts->list), .count = count};
    if (!prompts->list) return moe_http_fail_memory(error);
    for (int32_t i = 0; i < count; i++) {
        moe_prompt *prompt = &prompts->list[i];
        if (chat) {
            if (!moe_prompt_of_messages(inference, params, &prompt->tokens, error)) return false;
        } else if (!make_prompt(inference, params, several ? json_array_get(value, (size_t)i) : value, prompt, error)) {
            return false;
        }
        if (!check_length(inference, params, prompt, chat ? "messages" : "prompt", error)) return false;
    }
    return true;
}

void moe_prompts_free(moe_prompts *prompts) {
    for (int32_t i = 0; prompts->list && i < prompts->count; i++) {
        moe_free(prompts->list[i].tokens.ids);
        moe_buf_free(&prompts->list[i].text);
    }
    moe_free(prompts->list);
    *prompts = (moe_prompts){0};
}

json_t *moe_token_ids_json(const int32_t *ids, int32_t count) {
    json_t *list = json_array();
    for (int32_t i = 0; i < count; i++) {
        if (json_array_append_new(list, json_integer(ids[i])) == 0) continue;
        json_decref(list);
        return NULL;
    }
    return list;
}
