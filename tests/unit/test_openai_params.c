/* Every parameter of the OpenAI endpoints: what it is read as, and that a wrong one is a 400 that names it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "router/http/openai_params.h"
#include "tests/support/test.h"

#define CHAT MOE_ENDPOINT_CHAT
#define COMPLETIONS MOE_ENDPOINT_COMPLETIONS
#define TOKENIZE MOE_ENDPOINT_TOKENIZE
#define DETOKENIZE MOE_ENDPOINT_DETOKENIZE

/* Parameters are read without looking into the tokenizer: only whether there is one matters. */
static moe_inference inference = {
    .model = "demo",
    .max_model_len = 2048,
    .vocab = 8192,
    .tokenizer = (const moe_tokenizer *)&inference,
    .generation = {.do_sample = true, .temperature = 0.7f, .top_p = 0.9f, .top_k = 40, .repetition_penalty = 1.1f}};

static const char *required(moe_endpoint endpoint) {
    if (endpoint == CHAT) return "\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"}]";
    return endpoint == DETOKENIZE ? "\"tokens\":[1]" : "\"prompt\":\"Hi\"";
}

/* Parses the endpoint's smallest body with `extra` members in front. */
static bool parse(moe_endpoint endpoint, const char *extra, moe_openai_params *params, moe_http_error *error) {
    char body[4096];
    snprintf(body, sizeof body, "{%s%s%s}", extra, *extra ? "," : "", required(endpoint));
    *error = (moe_http_error){0};
    return moe_openai_params_parse(body, strlen(body), endpoint, &inference, params, error);
}

typedef struct bad_row {
    unsigned endpoints;
    const char *extra, *param, *code;
    int status;
} bad_row;

static const bad_row bad_rows[] = {
    /* types */
    {CHAT | COMPLETIONS, "\"model\":1", "model", "invalid_type", 400},
    {CHAT | COMPLETIONS | TOKENIZE | DETOKENIZE, "\"model\":\"gpt-4\"", "model", "model_not_found", 404},
    {CHAT | COMPLETIONS, "\"temperature\":\"hot\"", "temperature", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"temperature\":true", "temperature", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"temperature\":[1]", "temperature", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"top_p\":\"1\"", "top_p", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"top_k\":1.5", "top_k", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"min_p\":{}", "min_p", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"repetition_penalty\":\"x\"", "repetition_penalty", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"presence_penalty\":false", "presence_penalty", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"frequency_penalty\":[]", "frequency_penalty", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"max_tokens\":\"10\"", "max_tokens", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"max_tokens\":1.5", "max_tokens", "invalid_type", 400},
    {CHAT, "\"max_completion_tokens\":true", "max_completion_tokens", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"n\":\"1\"", "n", "invalid_type", 400},
    {COMPLETIONS, "\"best_of\":1.5", "best_of", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"seed\":\"x\"", "seed", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"seed\":0.5", "seed", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"stop\":1", "stop", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"stop\":[\"a\",1]", "stop", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"stop_token_ids\":5", "stop_token_ids", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"stop_token_ids\":[\"5\"]", "stop_token_ids", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"min_tokens\":\"1\"", "min_tokens", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"ignore_eos\":1", "ignore_eos", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"skip_special_tokens\":\"no\"", "skip_special_tokens", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"include_stop_str_in_output\":0", "include_stop_str_in_output", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"logit_bias\":[]", "logit_bias", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"logit_bias\":{\"5\":\"x\"}", "logit_bias", "invalid_type", 400},
    {CHAT, "\"logprobs\":1", "logprobs", "invalid_type", 400},
    {COMPLETIONS, "\"logprobs\":true", "logprobs", "invalid_type", 400},
    {CHAT, "\"logprobs\":true,\"top_logprobs\":\"2\"", "top_logprobs", "invalid_type", 400},
    {COMPLETIONS, "\"echo\":1", "echo", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"stream\":\"yes\"", "stream", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"stream\":true,\"stream_options\":true", "stream_options", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"stream\":true,\"stream_options\":{\"include_usage\":1}", "stream_options.include_usage",
     "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"return_token_ids\":\"x\"", "return_token_ids", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"return_tokens_as_token_ids\":1", "return_tokens_as_token_ids", "invalid_type", 400},
    {TOKENIZE, "\"return_token_strs\":1", "return_token_strs", "invalid_type", 400},
    {CHAT | COMPLETIONS | TOKENIZE, "\"add_special_tokens\":1", "add_special_tokens", "invalid_type", 400},
    {CHAT | TOKENIZE, "\"add_generation_prompt\":1", "add_generation_prompt", "invalid_type", 400},
    {CHAT | TOKENIZE, "\"chat_template_kwargs\":[]", "chat_template_kwargs", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"user\":5", "user", "invalid_type", 400},
    /* ranges */
    {CHAT | COMPLETIONS, "\"temperature\":-0.1", "temperature", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"temperature\":2.1", "temperature", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"top_p\":0", "top_p", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"top_p\":1.01", "top_p", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"top_k\":-2", "top_k", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"top_k\":4294967296", "top_k", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"min_p\":1.5", "min_p", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"repetition_penalty\":0", "repetition_penalty", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"presence_penalty\":2.5", "presence_penalty", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"frequency_penalty\":-2.5", "frequency_penalty", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"max_tokens\":-1", "max_tokens", "invalid_value", 400},
    {CHAT, "\"max_tokens\":0", "max_tokens", "invalid_value", 400},
    {CHAT, "\"max_completion_tokens\":0", "max_completion_tokens", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"max_tokens\":1e300", "max_tokens", "invalid_type", 400},
    {CHAT | COMPLETIONS, "\"n\":0", "n", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"n\":17", "n", "invalid_value", 400},
    {COMPLETIONS, "\"n\":2,\"best_of\":3", "best_of", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"stop\":\"\"", "stop", "invalid_value", 400},
    {CHAT | COMPLETIONS,
     "\"stop\":[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\",\"0\",\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\"]", "stop",
     "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"stop_token_ids\":[8192]", "stop_token_ids", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"stop_token_ids\":[-1]", "stop_token_ids", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"min_tokens\":-1", "min_tokens", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"min_tokens\":5,\"max_tokens\":4", "min_tokens", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"logit_bias\":{\"5\":101}", "logit_bias", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"logit_bias\":{\"8192\":1}", "logit_bias", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"logit_bias\":{\"-1\":1}", "logit_bias", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"logit_bias\":{\"5x\":1}", "logit_bias", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"logit_bias\":{\"\":1}", "logit_bias", "invalid_value", 400},
    {CHAT, "\"logprobs\":true,\"top_logprobs\":21", "top_logprobs", "invalid_value", 400},
    {CHAT, "\"top_logprobs\":2", "top_logprobs", "invalid_value", 400},
    {COMPLETIONS, "\"logprobs\":21", "logprobs", "invalid_value", 400},
    {CHAT | COMPLETIONS, "\"stream_options\":{\"include_usage\":true}", "stream_options", "invalid_value", 400},
    /* unknown, and known but not built */
    {CHAT | COMPLETIONS | TOKENIZE | DETOKENIZE, "\"frobnicate\":1", "frobnicate", "unknown_parameter", 400},
    {CHAT | COMPLETIONS, "\"Temperature\":1", "Temperature", "unknown_parameter", 400},
    {CHAT, "\"echo\":true", "echo", "unknown_parameter", 400},
    {CHAT, "\"best_of\":1", "best_of", "unknown_parameter", 400},
    {COMPLETIONS, "\"top_logprobs\":1", "top_logprobs", "unknown_parameter", 400},
    {COMPLETIONS, "\"messages\":[]", "messages", "unknown_parameter", 400},
    {CHAT | COMPLETIONS, "\"stream\":true,\"stream_options\":{\"x\":true}", "stream_options.x", "unknown_parameter", 400},
    {CHAT | COMPLETIONS, "\"stream\":true,\"stream_options\":{\"continuous_usage_stats\":true}",
     "stream_options.continuous_usage_stats", "unsupported_parameter", 400},
    {CHAT, "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]", "tools", "unsupported_parameter", 400},
    {CHAT, "\"tools\":[]", "tools", "unsupported_parameter", 400},
    {CHAT, "\"tool_choice\":\"auto\"", "tool_choice", "unsupported_parameter", 400},
    {CHAT, "\"functions\":[]", "functions", "unsupported_parameter", 400},
    {CHAT, "\"function_call\":\"auto\"", "function_call", "unsupported_parameter", 400},
    {CHAT | COMPLETIONS, "\"response_format\":{\"type\":\"json_object\"}", "response_format", "unsupported_parameter", 400},
    {CHAT, "\"parallel_tool_calls\":true", "parallel_tool_calls", "unsupported_parameter", 400},
    {CHAT, "\"modalities\":[\"text\",\"audio\"]", "modalities", "unsupported_parameter", 400},
    {CHAT, "\"audio\":{}", "audio", "unsupported_parameter", 400},
    {CHAT, "\"prediction\":{}", "prediction", "unsupported_parameter", 400},
    {CHAT, "\"reasoning_effort\":\"low\"", "reasoning_effort", "unsupported_parameter", 400},
    {CHAT, "\"verbosity\":\"low\"", "verbosity", "unsupported_parameter", 400},
    {CHAT, "\"web_search_options\":{}", "web_search_options", "unsupported_parameter", 400},
    {CHAT, "\"chat_template\":\"x\"", "chat_template", "unsupported_parameter", 400},
    {CHAT, "\"documents\":[]", "documents", "unsupported_parameter", 400},
    {CHAT, "\"continue_final_message\":true", "continue_final_message", "unsupported_parameter", 400},
    {CHAT | COMPLETIONS, "\"store\":true", "store", "unsupported_parameter", 400},
    {CHAT | COMPLETIONS, "\"metadata\":{\"a\":\"b\"}", "metadata", "unsupported_parameter", 400},
    {CHAT | COMPLETIONS, "\"service_tier\":\"flex\"", "service_tier", "unsupported_parameter", 400},
    {CHAT | COMPLETIONS, "\"use_beam_search\":true", "use_beam_search", "unsupported_parameter", 400},
    {CHAT | COMPLETIONS, "\"length_penalty\":0.5", "length_penalty", "unsupported_parameter", 400},
    {CHAT | COMPLETIONS, "\"prompt_logprobs\":1", "prompt_logprobs", "unsupported_parameter", 400},
    {CHAT | COMPLETIONS, "\"truncate_prompt_tokens\":1", "truncate_prompt_tokens", "unsupported_parameter", 400},
    {COMPLETIONS, "\"suffix\":\"end\"", "suffix", "unsupported_parameter", 400},
};

static void test_bad_parameters_are_named(void **state) {
    (void)state;
    static const moe_endpoint endpoints[] = {CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE};
    for (size_t i = 0; i < sizeof bad_rows / sizeof bad_rows[0]; i++)
        for (size_t e = 0; e < 4; e++) {
            const bad_row *row = &bad_rows[i];
            moe_openai_params params;
            moe_http_error error;
            if (!(row->endpoints & endpoints[e])) continue;
            if (parse(endpoints[e], row->extra, &params, &error)) fail_msg("accepted: %s", row->extra);
            if (error.http_status != row->status || strcmp(error.param, row->param) || strcmp(error.code, row->code))
                fail_msg("%s: %d '%s' %s, %s", row->extra, error.http_status, error.param, error.code, error.message);
            if (!strstr(error.message, row->param) && row->status != 404) fail_msg("not named: %s", error.message);
            moe_openai_params_free(&params);
        }
}

static void test_neutral_values_and_null_are_accepted(void **state) {
    (void)state;
    static const struct {
        unsigned endpoints;
        const char *extra;
    } rows[] = {
        {CHAT,
         "\"tools\":null,\"tool_choice\":\"none\",\"functions\":null,\"function_call\":\"none\",\"parallel_tool_calls\":null"},
        {CHAT | COMPLETIONS, "\"response_format\":{\"type\":\"text\"},\"user\":\"me\",\"store\":false,\"metadata\":null"},
        {CHAT | COMPLETIONS, "\"temperature\":null,\"top_p\":null,\"n\":null,\"stop\":null,\"seed\":null,\"max_tokens\":null"},
        {CHAT | COMPLETIONS,
         "\"logit_bias\":null,\"logprobs\":null,\"stream\":null,\"stream_options\":null,\"presence_penalty\":null"},
        {CHAT, "\"modalities\":[\"text\"],\"service_tier\":\"auto\",\"top_logprobs\":null,\"model\":\"demo\""},
        {CHAT | COMPLETIONS, "\"stream\":true,\"stream_options\":{\"include_usage\":false,\"include_obfuscation\":false}"},
        {COMPLETIONS, "\"suffix\":null,\"best_of\":1,\"n\":1,\"length_penalty\":1.0,\"use_beam_search\":false,\"model\":null"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        for (int e = 0; e < 2; e++) {
            moe_openai_params params;
            moe_http_error error;
            if (!(rows[i].endpoints & (e ? COMPLETIONS : CHAT))) continue;
            if (!parse(e ? COMPLETIONS : CHAT, rows[i].extra, &params, &error)) fail_msg("%s: %s", rows[i].extra, error.message);
            moe_openai_params_free(&params);
        }
}

static void test_defaults(void **state) {
    (void)state;
    moe_openai_params params;
    moe_http_error error;
    assert_true(parse(CHAT, "", &params, &error));
    const moe_sampling_params *s = &params.sampling;
    assert_true(s->temperature == 0.7f && s->top_p == 0.9f && s->top_k == 40 && s->repetition_penalty == 1.1f && s->min_p == 0);
    assert_true(s->presence_penalty == 0 && s->frequency_penalty == 0 && s->skip_special_tokens && !s->ignore_eos);
    assert_true(s->max_tokens == 2048 && !params.max_tokens_given && s->min_tokens == 0 && s->logprobs == -1);
    assert_true(s->prompt_logprobs == -1 && params.n == 1 && !params.stream && params.add_generation_prompt);
    assert_true(!params.add_special_tokens && !params.include_usage && !params.return_token_ids);
    uint64_t seed = s->seed;
    moe_openai_params_free(&params);
    assert_true(parse(COMPLETIONS, "", &params, &error));
    assert_true(params.sampling.max_tokens == 16 && params.add_special_tokens && params.sampling.seed != seed);
    moe_openai_params_free(&params);
    inference.generation.do_sample = false;
    assert_true(parse(CHAT, "", &params, &error));
    assert_true(params.sampling.temperature == 0);
    moe_openai_params_free(&params);
    assert_true(parse(CHAT, "\"temperature\":1", &params, &error));
    assert_true(params.sampling.temperature == 1);
    moe_openai_params_free(&params);
    inference.generation.do_sample = true;
}

static void test_values_are_read(void **state) {
    (void)state;
    moe_openai_params p;
    moe_http_error error;
    assert_true(
        parse(CHAT,
              "\"model\":\"demo\",\"temperature\":0,\"top_p\":0.5,\"top_k\":-1,\"min_p\":0.25,\"repetition_penalty\":1.5,"
              "\"presence_penalty\":-2,\"frequency_penalty\":2,\"n\":16,\"seed\":-1,\"max_tokens\":7,\"min_tokens\":3,"
              "\"stop\":[\"a\",\"bc\"],\"stop_token_ids\":[5,8191],\"logit_bias\":{\"0\":-100,\"17\":2.5},\"logprobs\":true,"
              "\"top_logprobs\":20,\"stream\":true,\"stream_options\":{\"include_usage\":true},\"ignore_eos\":true,"
              "\"skip_special_tokens\":false,\"include_stop_str_in_output\":true,\"return_token_ids\":true,"
              "\"add_generation_prompt\":false,\"chat_template_kwargs\":{\"x\":1}",
              &p, &error));
    const moe_sampling_params *s = &p.sampling;
    assert_true(s->temperature == 0 && s->top_p == 0.5f && s->top_k == 0 && s->min_p == 0.25f && s->repetition_penalty == 1.5f);
    assert_true(s->presence_penalty == -2 && s->frequency_penalty == 2 && p.n == 16 && s->seed == UINT64_MAX);
    assert_true(s->max_tokens == 7 && p.max_tokens_given && s->min_tokens == 3 && s->ignore_eos && !s->skip_special_tokens);
    assert_int_equal(p.num_stop, 2);
    assert_string_equal(p.stop[0], "a");
    assert_string_equal(p.stop[1], "bc");
    assert_true(s->num_stop_token_ids == 2 && s->stop_token_ids[0] == 5 && s->stop_token_ids[1] == 8191);
    assert_true(p.num_logit_bias == 2 && p.logit_bias[0].token_id == 0 && p.logit_bias[0].bias == -100);
    assert_true(p.logit_bias[1].token_id == 17 && p.logit_bias[1].bias == 2.5f);
    assert_true(s->logprobs == 20 && p.stream && p.include_usage && p.include_stop_in_output && p.return_token_ids);
    assert_true(!p.add_generation_prompt && json_object_size(p.template_variables) == 1);
    moe_openai_params_free(&p);
    assert_true(
        parse(CHAT, "\"logprobs\":true,\"stop\":\"x\",\"top_k\":3.0,\"max_tokens\":5,\"max_completion_tokens\":6", &p, &error));
    assert_true(p.sampling.logprobs == 0 && p.num_stop == 1 && p.sampling.top_k == 3 && p.sampling.max_tokens == 6);
    moe_openai_params_free(&p);
    assert_true(parse(CHAT, "\"max_completion_tokens\":6,\"max_tokens\":5", &p, &error));
    assert_true(p.sampling.max_tokens == 6);
    moe_openai_params_free(&p);
    assert_true(parse(COMPLETIONS, "\"logprobs\":3,\"echo\":true,\"max_tokens\":0,\"n\":2,\"best_of\":2", &p, &error));
    assert_true(p.sampling.logprobs == 3 && p.sampling.prompt_logprobs == 3 && p.echo && p.sampling.max_tokens == 0 && p.n == 2);
    moe_openai_params_free(&p);
}

static void test_malformed_bodies(void **state) {
    (void)state;
    static const char *const rows[] = {"",
                                       " ",
                                       "{",
                                       "[]",
                                       "\"x\"",
                                       "17",
                                       "null",
                                       "{\"n\":1,}",
                                       "{\"n\":1,\"n\":2}",
                                       "{'n':1}",
                                       "{\"a\":\"\xff\"}",
                                       "{\"a\":\"\\u0000\"}",
                                       "{\"n\":99999999999999999999}",
                                       "{\"n\":1} x"};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        moe_openai_params params;
        moe_http_error error;
        assert_false(moe_openai_params_parse(rows[i], strlen(rows[i]), CHAT, &inference, &params, &error));
        assert_int_equal(error.http_status, 400);
        assert_string_equal(error.code, "invalid_json");
        moe_openai_params_free(&params);
    }
    char deep[8192];
    memset(deep, '[', sizeof deep);
    moe_openai_params params;
    moe_http_error error;
    assert_false(moe_openai_params_parse(deep, sizeof deep, CHAT, &inference, &params, &error));
    moe_openai_params_free(&params);
}

typedef struct body_row {
    moe_endpoint endpoint;
    const char *body, *param, *code;
} body_row;

static void test_bad_messages_and_prompts_are_named(void **state) {
    (void)state;
    static const body_row rows[] = {
        {CHAT, "{}", "messages", "missing_required_parameter"},
        {CHAT, "{\"messages\":null}", "messages", "missing_required_parameter"},
        {CHAT, "{\"messages\":[]}", "messages", "invalid_value"},
        {CHAT, "{\"messages\":\"Hi\"}", "messages", "invalid_type"},
        {CHAT, "{\"messages\":[\"Hi\"]}", "messages[0]", "invalid_type"},
        {CHAT, "{\"messages\":[{\"content\":\"Hi\"}]}", "messages[0].role", "missing_required_parameter"},
        {CHAT, "{\"messages\":[{\"role\":7,\"content\":\"Hi\"}]}", "messages[0].role", "invalid_type"},
        {CHAT, "{\"messages\":[{\"role\":\"tool\",\"content\":\"Hi\"}]}", "messages[0].role", "invalid_value"},
        {CHAT, "{\"messages\":[{\"role\":\"user\"}]}", "messages[0].content", "missing_required_parameter"},
        {CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":null}]}", "messages[0].content", "missing_required_parameter"},
        {CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":5}]}", "messages[0].content", "invalid_type"},
        {CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":[]}]}", "messages[0].content", "invalid_type"},
        {CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":[5]}]}", "messages[0].content[0]", "invalid_type"},
        {CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]}]}",
         "messages[0].content[0]", "invalid_value"},
        {CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":5}]}]}", "messages[0].content[0]",
         "invalid_value"},
        {CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\"},{\"role\":\"user\",\"content\":\"Hi\",\"x\":1}]}",
         "messages[1].x", "unknown_parameter"},
        {CHAT, "{\"messages\":[{\"role\":\"user\",\"content\":\"Hi\",\"name\":1}]}", "messages[0].name", "invalid_type"},
        {CHAT, "{\"messages\":[{\"role\":\"assistant\",\"content\":\"Hi\",\"tool_calls\":[{}]}]}", "messages[0].tool_calls",
         "unsupported_parameter"},
        {COMPLETIONS, "{}", "prompt", "missing_required_parameter"},
        {COMPLETIONS, "{\"prompt\":5}", "prompt", "invalid_type"},
        {COMPLETIONS, "{\"prompt\":{}}", "prompt", "invalid_type"},
        {COMPLETIONS, "{\"prompt\":[]}", "prompt", "invalid_value"},
        {COMPLETIONS, "{\"prompt\":[[]]}", "prompt", "invalid_type"},
        {COMPLETIONS, "{\"prompt\":[true]}", "prompt", "invalid_type"},
        {COMPLETIONS, "{\"prompt\":[1,\"x\"]}", "prompt", "invalid_type"},
        {COMPLETIONS, "{\"prompt\":[\"x\",1]}", "prompt", "invalid_type"},
        {COMPLETIONS, "{\"prompt\":[1.5]}", "prompt", "invalid_type"},
        {COMPLETIONS, "{\"prompt\":[-1]}", "prompt", "invalid_value"},
        {COMPLETIONS, "{\"prompt\":[8192]}", "prompt", "invalid_value"},
        {COMPLETIONS, "{\"prompt\":[[1],[8192]]}", "prompt", "invalid_value"},
        {TOKENIZE, "{}", "prompt", "missing_required_parameter"},
        {TOKENIZE, "{\"prompt\":[1]}", "prompt", "invalid_type"},
        {DETOKENIZE, "{}", "tokens", "missing_required_parameter"},
        {DETOKENIZE, "{\"tokens\":\"x\"}", "tokens", "invalid_type"},
        {DETOKENIZE, "{\"tokens\":[\"x\"]}", "tokens", "invalid_type"},
        {DETOKENIZE, "{\"tokens\":[9999]}", "tokens", "invalid_value"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        moe_openai_params params;
        moe_http_error error = {0};
        if (moe_openai_params_parse(rows[i].body, strlen(rows[i].body), rows[i].endpoint, &inference, &params, &error))
            fail_msg("accepted: %s", rows[i].body);
        if (error.http_status != 400 || strcmp(error.param, rows[i].param) || strcmp(error.code, rows[i].code))
            fail_msg("%s: %d '%s' %s, %s", rows[i].body, error.http_status, error.param, error.code, error.message);
        moe_openai_params_free(&params);
    }
}

static void test_messages_are_made_plain(void **state) {
    (void)state;
    static const char body[] =
        "{\"messages\":[{\"role\":\"developer\",\"content\":\"Be brief.\"},"
        "{\"role\":\"user\",\"name\":\"ann\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\",\"text\":\"b\"}]}"
        ","
        "{\"role\":\"assistant\",\"content\":\"c\",\"refusal\":null,\"tool_calls\":[],\"annotations\":[]}]}";
    json_t *wanted = json_loads(
        "[{\"role\":\"system\",\"content\":\"Be brief.\"},"
        "{\"role\":\"user\",\"name\":\"ann\",\"content\":\"a\\nb\"},{\"role\":\"assistant\",\"content\":\"c\"}]",
        0, NULL);
    moe_openai_params params;
    moe_http_error error;
    assert_true(moe_openai_params_parse(body, strlen(body), CHAT, &inference, &params, &error));
    assert_true(json_equal(params.messages, wanted));
    json_decref(wanted);
    moe_openai_params_free(&params);
}

static void test_without_tokenizer(void **state) {
    (void)state;
    const moe_tokenizer *tokenizer = inference.tokenizer;
    moe_openai_params params;
    moe_http_error error;
    inference.tokenizer = NULL;
    assert_false(parse(COMPLETIONS, "", &params, &error));
    assert_string_equal(error.param, "prompt");
    moe_openai_params_free(&params);
    static const char ids[] = "{\"prompt\":[1,2]}", stop[] = "{\"stop\":\"x\",\"prompt\":[1,2]}";
    assert_true(moe_openai_params_parse(ids, strlen(ids), COMPLETIONS, &inference, &params, &error));
    moe_openai_params_free(&params);
    assert_false(moe_openai_params_parse(stop, strlen(stop), COMPLETIONS, &inference, &params, &error));
    assert_string_equal(error.param, "stop");
    moe_openai_params_free(&params);
    inference.tokenizer = tokenizer;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_parameters_are_named),
        cmocka_unit_test(test_neutral_values_and_null_are_accepted),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_values_are_read),
        cmocka_unit_test(test_malformed_bodies),
        cmocka_unit_test(test_bad_messages_and_prompts_are_named),
        cmocka_unit_test(test_messages_are_made_plain),
        cmocka_unit_test(test_without_tokenizer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
