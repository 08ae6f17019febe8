/* /v1/completions */
#include "router/http/generate.h"
#include "router/http/logprobs.h"
#include "router/http/routes.h"

/* `echo`: the prompt, and its log-probabilities, before what was sampled. */
static bool begin(moe_choice *choice, const moe_output *first) {
    const moe_completion *completion = choice->completion;
    const moe_token_ids *prompt = &choice->prompt->tokens;
    bool good = true;
    if (!completion->params.echo) return true;
    moe_buf_append(&choice->text, choice->prompt->text.data, choice->prompt->text.size);
    for (int32_t i = 0; good && completion->params.sampling.logprobs >= 0 && i < prompt->count; i++) {
        bool known = i > 0 && first->prompt_logprobs && i <= first->num_prompt_logprobs;
        good = moe_completions_add_logprobs(choice, prompt->ids[i], known ? &first->prompt_logprobs[i - 1] : NULL, true);
    }
    return good;
}

static bool add_logprobs(moe_choice *choice, const moe_token_logprobs *logprobs) {
    const moe_completion *completion = choice->completion;
    int32_t id = logprobs->chosen.token_id;
    bool hidden = completion->params.sampling.skip_special_tokens && completion->inference->tokenizer &&
                  moe_tokenizer_is_special(completion->inference->tokenizer, id);
    return moe_completions_add_logprobs(choice, id, logprobs, !hidden);
}

static json_t *stop_reason(const moe_choice *choice) {
    return choice->stop_reason ? json_incref(choice->stop_reason) : json_null();
}

static json_t *delta(moe_choice *choice) {
    json_t *json = json_pack("{s:i, s:o, s:o, s:n}", "index", choice->index, "text", moe_choice_take_text(choice), "logprobs",
                             moe_take_json(&choice->logprobs), "finish_reason");
    return moe_choice_add_token_ids(choice, json);
}

static json_t *finish(moe_choice *choice) {
    return json_pack("{s:i, s:s, s:n, s:o, s:o}", "index", choice->index, "text", "", "logprobs", "finish_reason",
                     moe_finish_reason_json(choice->finish), "stop_reason", stop_reason(choice));
}

static json_t *whole(moe_choice *choice) {
    json_t *json = json_pack("{s:i, s:o, s:o, s:o, s:o}", "index", choice->index, "text", moe_choice_take_text(choice),
                             "logprobs", moe_take_json(&choice->logprobs), "finish_reason",
                             moe_finish_reason_json(choice->finish), "stop_reason", stop_reason(choice));
    return moe_choice_add_token_ids(choice, json);
}

void moe_http_handle_completions(moe_http_exchange *exchange, const char *rest) {
    static const moe_choice_format format = {
        .id_prefix = "cmpl",
        .object = "text_completion",
        .chunk_object = "text_completion",
        .begin = begin,
        .add_logprobs = add_logprobs,
        .delta = delta,
        .finish = finish,
        .whole = whole,
    };
    (void)rest;
    moe_http_complete(exchange, MOE_ENDPOINT_COMPLETIONS, &format);
}
