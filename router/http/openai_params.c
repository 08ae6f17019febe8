#include "router/http/openai_params.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "router/http/openai_readers.h"

#define CHAT MOE_ENDPOINT_CHAT
#define COMPLETIONS MOE_ENDPOINT_COMPLETIONS
#define TOKENIZE MOE_ENDPOINT_TOKENIZE
#define DETOKENIZE MOE_ENDPOINT_DETOKENIZE
#define GENERATE (CHAT | COMPLETIONS)
#define ALL (GENERATE | TOKENIZE | DETOKENIZE)

typedef enum param_kind {
    NUMBER,  /* float at `offset`, in [min, max], or (min, max] with `above` */
    INTEGER, /* int32 at `offset`, in [min, max] */
    FLAG,    /* bool at `offset` */
    TEXT,    /* a string, accepted and of no effect */
    READER,  /* read by `reader` */
    NEUTRAL  /* not built: only the values listed in `neutral`, a JSON array, which ask for nothing */
} param_kind;

typedef struct param_row {
    const char *name;
    unsigned endpoints;
    param_kind kind;
    size_t offset;
    double min, max;
    bool above;
    moe_openai_reader reader;
    const char *neutral;
} param_row;

#define AT(member) .offset = offsetof(moe_openai_params, member)

static const param_row rows[] = {
    {"model", ALL, READER, .reader = moe_openai_read_model},
    {"messages", CHAT | TOKENIZE, READER, .reader = moe_openai_read_messages},
    {"prompt", COMPLETIONS | TOKENIZE, READER, .reader = moe_openai_read_prompt},
    {"tokens", DETOKENIZE, READER, .reader = moe_openai_read_tokens},
    {"max_tokens", GENERATE, READER, .reader = moe_openai_read_max_tokens},
    {"max_completion_tokens", CHAT, READER, .reader = moe_openai_read_max_tokens},
    {"temperature", GENERATE, NUMBER, AT(sampling.temperature), .min = 0, .max = 2},
    {"top_p", GENERATE, NUMBER, AT(sampling.top_p), .min = 0, .max = 1, .above = true},
    {"top_k", GENERATE, INTEGER, AT(sampling.top_k), .min = -1, .max = INT32_MAX},
    {"min_p", GENERATE, NUMBER, AT(sampling.min_p), .min = 0, .max = 1},
    {"repetition_penalty", GENERATE, NUMBER, AT(sampling.repetition_penalty), .min = 0, .max = 100, .above = true},
    {"presence_penalty", GENERATE, NUMBER, AT(sampling.presence_penalty), .min = -2, .max = 2},
    {"frequency_penalty", GENERATE, NUMBER, AT(sampling.frequency_penalty), .min = -2, .max = 2},
    {"n", GENERATE, INTEGER, AT(n), .min = 1, .max = MOE_HTTP_MAX_N},
    {"best_of", COMPLETIONS, INTEGER, AT(best_of), .min = 1, .max = MOE_HTTP_MAX_N},
    {"seed", GENERATE, READER, .reader = moe_openai_read_seed},
    {"stop", GENERATE, READER, .reader = moe_openai_read_stop},
    {"stop_token_ids", GENERATE, READER, .reader = moe_openai_read_stop_token_ids},
    {"min_tokens", GENERATE, INTEGER, AT(sampling.min_tokens), .min = 0, .max = INT32_MAX},
    {"ignore_eos", GENERATE, FLAG, AT(sampling.ignore_eos)},
    {"skip_special_tokens", GENERATE, FLAG, AT(sampling.skip_special_tokens)},
    {"include_stop_str_in_output", GENERATE, FLAG, AT(include_stop_in_output)},
    {"logit_bias", GENERATE, READER, .reader = moe_openai_read_logit_bias},
    {"logprobs", CHAT, FLAG, AT(logprobs_wanted)},
    {"top_logprobs", CHAT, INTEGER, AT(top_logprobs), .min = 0, .max = MOE_MAX_LOGPROBS},
    {"logprobs", COMPLETIONS, INTEGER, AT(sampling.logprobs), .min = 0, .max = MOE_MAX_LOGPROBS},
    {"echo", COMPLETIONS, FLAG, AT(echo)},
    {"stream", GENERATE, FLAG, AT(stream)},
    {"stream_options", GENERATE, READER, .reader = moe_openai_read_stream_options},
    {"return_token_ids", GENERATE, FLAG, AT(return_token_ids)},
    {"return_tokens_as_token_ids", GENERATE, FLAG, AT(tokens_as_ids)},
    {"return_token_strs", TOKENIZE, FLAG, AT(return_token_strings)},
    {"add_special_tokens", GENERATE | TOKENIZE, FLAG, AT(add_special_tokens)},
    {"add_generation_prompt", CHAT | TOKENIZE, FLAG, AT(add_generation_prompt)},
    {"chat_template_kwargs", CHAT | TOKENIZE, READER, .reader = moe_openai_read_template_variables},
    {"user", GENERATE, TEXT, .neutral = NULL},
    {"safety_identifier", GENERATE, TEXT, .neutral = NULL},
    {"prompt_cache_key", GENERATE, TEXT, .neutral = NULL},
    {"store", GENERATE, NEUTRAL, .neutral = "[false]"},
    {"service_tier", GENERATE, NEUTRAL, .neutral = "[\"auto\", \"default\"]"},
    {"response_format", GENERATE, NEUTRAL, .neutral = "[{\"type\": \"text\"}]"},
    {"modalities", CHAT, NEUTRAL, .neutral = "[[\"text\"]]"},
    {"tool_choice", CHAT | TOKENIZE, NEUTRAL, .neutral = "[\"none\"]"},
    {"function_call", CHAT, NEUTRAL, .neutral = "[\"none\"]"},
    {"suffix", COMPLETIONS, NEUTRAL, .neutral = "[\"\"]"},
    {"use_beam_search", GENERATE, NEUTRAL, .neutral = "[false]"},
    {"length_penalty", GENERATE, NEUTRAL, .neutral = "[1, 1.0]"},
    {"spaces_between_special_tokens", GENERATE, NEUTRAL, .neutral = "[true]"},
    {"continue_final_message", CHAT | TOKENIZE, NEUTRAL, .neutral = "[false]"},
    {"priority", GENERATE, NEUTRAL, .neutral = "[0]"},
    {"metadata", GENERATE, NEUTRAL, .neutral = "[]"},
    {"tools", CHAT | TOKENIZE, NEUTRAL, .neutral = "[]"},
    {"functions", CHAT, NEUTRAL, .neutral = "[]"},
    {"parallel_tool_calls", CHAT, NEUTRAL, .neutral = "[]"},
    {"audio", CHAT, NEUTRAL, .neutral = "[]"},
    {"prediction", CHAT, NEUTRAL, .neutral = "[]"},
    {"reasoning_effort", CHAT, NEUTRAL, .neutral = "[]"},
    {"verbosity", CHAT, NEUTRAL, .neutral = "[]"},
    {"web_search_options", CHAT, NEUTRAL, .neutral = "[]"},
    {"documents", CHAT, NEUTRAL, .neutral = "[]"},
    {"chat_template", CHAT | TOKENIZE, NEUTRAL, .neutral = "[]"},
    {"prompt_logprobs", GENERATE, NEUTRAL, .neutral = "[]"},
    {"truncate_prompt_tokens", GENERATE, NEUTRAL, .neutral = "[]"},
};

static const param_row *find_row(const char *name, moe_endpoint endpoint) {
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        if ((rows[i].endpoints & endpoint) && strcmp(rows[i].name, name) == 0) return &rows[i];
    return NULL;
}

static bool read_number(void *at, const param_row *row, const json_t *value, moe_http_error *error) {
    char wanted[96];
    if (!json_is_number(value)) return moe_openai_bad_type(error, row->name, "a number", value);
    double number = json_number_value(value);
    if (isfinite(number) && (row->above ? number > row->min : number >= row->min) && number <= row->max) {
        *(float *)at = (float)number;
        return true;
    }
    snprintf(wanted, sizeof wanted, row->above ? "above %g and at most %g" : "from %g to %g", row->min, row->max);
    return moe_openai_bad_value(error, row->name, wanted);
}

static bool read_integer(void *at, const param_row *row, const json_t *value, moe_http_error *error) {
    char wanted[96];
    int64_t number;
    if (!moe_openai_integer(value, &number)) return moe_openai_bad_type(error, row->name, "an integer", value);
    if ((double)number >= row->min && (double)number <= row->max) {
        *(int32_t *)at = (int32_t)number;
        return true;
    }
    snprintf(wanted, sizeof wanted, "from %.0f to %.0f", row->min, row->max);
    return moe_openai_bad_value(error, row->name, wanted);
}

static bool read_neutral(const param_row *row, const json_t *value, moe_http_error *error) {
    json_t *neutral = json_loads(row->neutral, 0, NULL);
    bool found = false;
    for (size_t i = 0; i < json_array_size(neutral); i++) found |= json_equal(json_array_get(neutral, i), value) != 0;
    json_decref(neutral);
    if (found) return true;
    return moe_http_fail(error, 400, "unsupported_parameter", row->name, "'%s' is not supported by this server: leave it out.",
                         row->name);
}

static bool read_row(moe_openai_params *params, const moe_inference *inference, const param_row *row, const json_t *value,
                     moe_http_error *error) {
    void *at = (char *)params + row->offset;
    switch (row->kind) {
        case NUMBER:
            return read_number(at, row, value, error);
        case INTEGER:
            return read_integer(at, row, value, error);
        case FLAG:
            if (!json_is_boolean(value)) return moe_openai_bad_type(error, row->name, "a boolean", value);
            *(bool *)at = json_is_true(value);
            return true;
        case TEXT:
            return json_is_string(value) || moe_openai_bad_type(error, row->name, "a string", value);
        case READER:
            return row->reader(params, inference, row->name, value, error);
        case NEUTRAL:
            return read_neutral(row, value, error);
    }
    return false;
}

static bool require(bool given, const char *name, moe_http_error *error) {
    return given || moe_http_fail(error, 400, "missing_required_parameter", name, "'%s' is required.", name);
}

/* What one parameter says about another, once all are read. */
static bool check_together(moe_openai_params *params, moe_http_error *error) {
    moe_sampling_params *sampling = &params->sampling;
    if (params->endpoint == MOE_ENDPOINT_CHAT && !require(params->messages, "messages", error)) return false;
    if (params->endpoint == MOE_ENDPOINT_COMPLETIONS && !require(params->prompt, "prompt", error)) return false;
    if (params->endpoint == MOE_ENDPOINT_DETOKENIZE && !require(params->tokens, "tokens", error)) return false;
    if (params->endpoint == MOE_ENDPOINT_TOKENIZE && !require(params->prompt || params->messages, "prompt", error)) return false;
    if (params->top_logprobs >= 0 && !params->logprobs_wanted)
        return moe_openai_bad_value(error, "top_logprobs", "given together with 'logprobs': true");
    if (params->best_of && params->best_of != params->n) return moe_openai_bad_value(error, "best_of", "equal to 'n'");
    if (params->stream_options_given && !params->stream)
        return moe_openai_bad_value(error, "stream_options", "given together with 'stream': true");
    if (params->max_tokens_given && sampling->min_tokens > sampling->max_tokens)
        return moe_openai_bad_value(error, "min_tokens", "at most 'max_tokens'");
    if (params->logprobs_wanted) sampling->logprobs = params->top_logprobs > 0 ? params->top_logprobs : 0;
    if (params->echo) sampling->prompt_logprobs = sampling->logprobs;
    if (sampling->top_k < 0) sampling->top_k = 0;
    return true;
}

static void set_defaults(moe_openai_params *params, moe_endpoint endpoint, const moe_inference *inference) {
    memset(params, 0, sizeof *params);
    params->endpoint = endpoint;
    moe_inference_default_sampling(inference, &params->sampling);
    if (endpoint == MOE_ENDPOINT_COMPLETIONS) params->sampling.max_tokens = 16;
    params->n = 1;
    params->top_logprobs = -1;
    params->add_special_tokens = endpoint != MOE_ENDPOINT_CHAT; /* a chat template writes them itself */
    params->add_generation_prompt = true;
}

static bool read_rows(moe_openai_params *params, const moe_inference *inference, moe_http_error *error) {
    const char *name;
    json_t *value;
    json_object_foreach(params->body, name, value) {
        const param_row *row = find_row(name, params->endpoint);
        if (!row)
            return moe_http_fail(error, 400, "unknown_parameter", name, "'%.100s' is not a parameter of this endpoint.", name);
        if (!json_is_null(value) && !read_row(params, inference, row, value, error)) return false;
    }
    return check_together(params, error);
}

bool moe_openai_params_from_json(json_t *body, moe_endpoint endpoint, const moe_inference *inference, moe_openai_params *params,
                                 moe_http_error *error) {
    set_defaults(params, endpoint, inference);
    params->body = body;
    return body ? read_rows(params, inference, error) : moe_http_fail_memory(error);
}

bool moe_openai_params_parse(const char *text, size_t size, moe_endpoint endpoint, const moe_inference *inference,
                             moe_openai_params *params, moe_http_error *error) {
    json_error_t where;
    set_defaults(params, endpoint, inference);
    params->body = json_loadb(text, size, JSON_REJECT_DUPLICATES, &where);
    if (!params->body)
        return moe_http_fail(error, 400, "invalid_json", NULL, "The body is not JSON: line %d, column %d: %s", where.line,
                             where.column, where.text);
    if (!json_is_object(params->body)) return moe_http_fail(error, 400, "invalid_json", NULL, "The body must be a JSON object.");
    return read_rows(params, inference, error);
}

void moe_openai_params_free(moe_openai_params *params) {
    json_decref(params->body);
    json_decref(params->messages);
    params->body = params->messages = NULL;
}
