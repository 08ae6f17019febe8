#include "router/http/logprobs.h"

#include <math.h>

#define LOWEST_LOGPROB (-9999.0) /* JSON has no infinity; the number is vLLM's */

static double finite_logprob(float logprob) { return logprob > LOWEST_LOGPROB ? (double)logprob : LOWEST_LOGPROB; }

/* A token as text: its bytes, ill-formed parts replaced; "token_id:7" where asked for or without a tokenizer. */
static json_t *token_json(const moe_completion *completion, int32_t id) {
    const moe_tokenizer *tokenizer = completion->inference->tokenizer;
    moe_buf text = {0};
    if (!tokenizer || completion->params.tokens_as_ids)
        moe_buf_printf(&text, "token_id:%d", id);
    else
        moe_tokenizer_decode(tokenizer, &id, 1, false, &text);
    json_t *json = text.failed ? NULL : json_stringn(moe_buf_text(&text), text.size);
    moe_buf_free(&text);
    return json;
}

/* The token's raw bytes; null without a tokenizer. */
static json_t *bytes_json(const moe_completion *completion, int32_t id) {
    moe_buf bytes = {0};
    if (!completion->inference->tokenizer) return json_null();
    moe_tokenizer_token_bytes(completion->inference->tokenizer, id, &bytes);
    json_t *json = bytes.failed ? NULL : json_array();
    for (size_t i = 0; json && i < bytes.size; i++) json_array_append_new(json, json_integer((unsigned char)bytes.data[i]));
    moe_buf_free(&bytes);
    return json;
}

static json_t *chat_token(const moe_completion *completion, const moe_logprob *logprob) {
    return json_pack("{s:o, s:f, s:o}", "token", token_json(completion, logprob->token_id), "logprob",
                     finite_logprob(logprob->logprob), "bytes", bytes_json(completion, logprob->token_id));
}

bool moe_chat_add_logprobs(moe_choice *choice, const moe_token_logprobs *logprobs) {
    const moe_completion *completion = choice->completion;
    if (!choice->logprobs) choice->logprobs = json_pack("{s:[], s:n}", "content", "refusal");
    json_t *token = chat_token(completion, &logprobs->chosen), *top = json_array();
    bool good = true;
    for (int32_t i = 0; i < logprobs->num_top; i++)
        good &= json_array_append_new(top, chat_token(completion, &logprobs->top[i])) == 0;
    good &= json_object_set_new(token, "top_logprobs", top) == 0;
    return json_array_append_new(json_object_get(choice->logprobs, "content"), token) == 0 && good;
}

/* Characters that a token's bytes begin: all bytes but UTF-8's continuations. */
static int64_t characters_begun(const moe_completion *completion, int32_t id) {
    moe_buf bytes = {0};
    int64_t count = 0;
    if (!completion->inference->tokenizer) return 0;
    moe_tokenizer_token_bytes(completion->inference->tokenizer, id, &bytes);
    for (size_t i = 0; i < bytes.size; i++) count += ((unsigned char)bytes.data[i] & 0xc0) != 0x80;
    moe_buf_free(&bytes);
    return count;
}

/* {token: logprob}: the likeliest, and the chosen one where it is not among them. */
static json_t *top_object(const moe_completion *completion, const moe_token_logprobs *logprobs) {
    json_t *top = json_object();
    for (int32_t i = -1; i < logprobs->num_top; i++) {
        const moe_logprob *one = i < 0 ? &logprobs->chosen : &logprobs->top[i];
        json_t *key = token_json(completion, one->token_id);
        /* Several ids may read alike; the first, which is the chosen or likelier one, stays. */
        if (key && !json_object_get(top, json_string_value(key)))
            json_object_set_new(top, json_string_value(key), json_real(finite_logprob(one->logprob)));
        json_decref(key);
    }
    return top;
}

bool moe_completions_add_logprobs(moe_choice *choice, int32_t token_id, const moe_token_logprobs *logprobs, bool in_text) {
    const moe_completion *completion = choice->completion;
    if (!choice->logprobs)
        choice->logprobs = json_pack("{s:[], s:[], s:[], s:[]}", "text_offset", "token_logprobs", "tokens", "top_logprobs");
    json_t *json = choice->logprobs, *top = json_null();
    if (logprobs && completion->params.sampling.logprobs > 0) top = top_object(completion, logprobs);
    int failed = json_array_append_new(json_object_get(json, "text_offset"), json_integer(choice->text_offset));
    failed |= json_array_append_new(json_object_get(json, "token_logprobs"),
                                    logprobs ? json_real(finite_logprob(logprobs->chosen.logprob)) : json_null());
    failed |= json_array_append_new(json_object_get(json, "tokens"), token_json(completion, token_id));
    failed |= json_array_append_new(json_object_get(json, "top_logprobs"), top);
    if (in_text) choice->text_offset += characters_begun(completion, token_id);
    return !failed;
}
