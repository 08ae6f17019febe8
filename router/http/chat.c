/* /v1/chat/completions */
#include "router/http/generate.h"
#include "router/http/logprobs.h"
#include "router/http/routes.h"

static json_t *stop_reason(const moe_choice *choice) {
    return choice->stop_reason ? json_incref(choice->stop_reason) : json_null();
}

static json_t *role(moe_choice *choice) {
    return json_pack("{s:i, s:{s:s, s:s}, s:n, s:n}", "index", choice->index, "delta", "role", "assistant", "content", "",
                     "logprobs", "finish_reason");
}

static json_t *delta(moe_choice *choice) {
    json_t *json = json_pack("{s:i, s:{s:o}, s:o, s:n}", "index", choice->index, "delta", "content", moe_choice_take_text(choice),
                             "logprobs", moe_take_json(&choice->logprobs), "finish_reason");
    return moe_choice_add_token_ids(choice, json);
}

static json_t *finish(moe_choice *choice) {
    return json_pack("{s:i, s:{}, s:n, s:o, s:o}", "index", choice->index, "delta", "logprobs", "finish_reason",
                     moe_finish_reason_json(choice->finish), "stop_reason", stop_reason(choice));
}

static json_t *whole(moe_choice *choice) {
    json_t *json = json_pack("{s:i, s:{s:s, s:o, s:n}, s:o, s:o, s:o}", "index", choice->index, "message", "role", "assistant",
                             "content", moe_choice_take_text(choice), "refusal", "logprobs", moe_take_json(&choice->logprobs),
                             "finish_reason", moe_finish_reason_json(choice->finish), "stop_reason", stop_reason(choice));
    return moe_choice_add_token_ids(choice, json);
}

void moe_http_handle_chat(moe_http_exchange *exchange, const char *rest) {
    static const moe_choice_format format = {
        .id_prefix = "chatcmpl",
        .object = "chat.completion",
        .chunk_object = "chat.completion.chunk",
        .add_logprobs = moe_chat_add_logprobs,
        .role = role,
        .delta = delta,
        .finish = finish,
        .whole = whole,
        .prompt_ids_on_top = true,
    };
    (void)rest;
    moe_http_complete(exchange, MOE_ENDPOINT_CHAT, &format);
}
