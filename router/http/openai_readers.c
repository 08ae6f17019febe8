#include "router/http/openai_readers.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_LOGIT_BIAS_VALUE 100.0

static const char *type_name(const json_t *value) {
    switch (json_typeof(value)) {
        case JSON_OBJECT:
            return "an object";
        case JSON_ARRAY:
            return "an array";
        case JSON_STRING:
            return "a string";
        case JSON_INTEGER:
            return "an integer";
        case JSON_REAL:
            return "a number";
        case JSON_TRUE:
        case JSON_FALSE:
            return "a boolean";
        default:
            return "null";
    }
}

bool moe_openai_bad_type(moe_http_error *error, const char *param, const char *wanted, const json_t *value) {
    return moe_http_fail(error, 400, "invalid_type", param, "'%s' must be %s, not %s.", param, wanted, type_name(value));
}

bool moe_openai_bad_value(moe_http_error *error, const char *param, const char *wanted) {
    return moe_http_fail(error, 400, "invalid_value", param, "'%s' must be %s.", param, wanted);
}

bool moe_openai_integer(const json_t *value, int64_t *out) {
    if (json_is_integer(value)) {
        *out = json_integer_value(value);
        return true;
    }
    double real = json_is_real(value) ? json_real_value(value) : 0.5;
    if (real != floor(real) || fabs(real) > 0x1p53) return false;
    *out = (int64_t)real;
    return true;
}

bool moe_openai_read_model(moe_openai_params *params, const moe_inference *inference, const char *name, const json_t *value,
                           moe_http_error *error) {
    (void)params;
    if (!json_is_string(value)) return moe_openai_bad_type(error, name, "a string", value);
    if (strcmp(json_string_value(value), inference->model) == 0) return true;
    return moe_http_fail(error, 404, "model_not_found", name, "The model '%.200s' does not exist: this server has '%s'.",
                         json_string_value(value), inference->model);
}

bool moe_openai_read_max_tokens(moe_openai_params *params, const moe_inference *inference, const char *name, const json_t *value,
                                moe_http_error *error) {
    (void)inference;
    int64_t tokens;
    /* 0 is of use for the prompt's own log-probabilities, which only completions echo. */
    int64_t least = params->endpoint == MOE_ENDPOINT_COMPLETIONS ? 0 : 1;
    if (!moe_openai_integer(value, &tokens)) return moe_openai_bad_type(error, name, "an integer", value);
    if (tokens < least || tokens > INT32_MAX) return moe_openai_bad_value(error, name, least ? "at least 1" : "at least 0");
    /* max_completion_tokens is the newer name: it wins over max_tokens whatever their order. */
    if (params->max_tokens_given && strcmp(name, "max_tokens") == 0) return true;
    params->sampling.max_tokens = (int32_t)tokens;
    params->max_tokens_given = true;
    return true;
}

bool moe_openai_read_seed(moe_openai_params *params, const moe_inference *inference, const char *name, const json_t *value,
                          moe_http_error *error) {
    (void)inference;
    int64_t seed;
    if (!moe_openai_integer(value, &seed)) return moe_openai_bad_type(error, name, "an integer", value);
    params->sampling.seed = (uint64_t)seed;
    return true;
}

static bool add_stop(moe_openai_params *params, const char *name, const json_t *value, moe_http_error *error) {
    if (!json_is_string(value)) return moe_openai_bad_type(error, name, "a string or an array of strings", value);
    size_t size = json_string_length(value);
    if (size == 0 || size > MOE_MAX_STOP_STRING_BYTES)
        return moe_http_fail(error, 400, "invalid_value", name, "A string in '%s' must have 1 to %d bytes.", name,
                             MOE_MAX_STOP_STRING_BYTES);
    params->stop[params->num_stop++] = json_string_value(value);
    return true;
}

bool moe_openai_read_stop(moe_openai_params *params, const moe_inference *inference, const char *name, const json_t *value,
                          moe_http_error *error) {
    if (!inference->tokenizer)
        return moe_http_fail(error, 400, "unsupported_parameter", name,
                             "'%s' needs a tokenizer, which this server runs without: use 'stop_token_ids'.", name);
    if (!json_is_array(value)) return add_stop(params, name, value, error);
    if (json_array_size(value) > MOE_MAX_STOP_STRINGS)
        return moe_http_fail(error, 400, "invalid_value", name, "'%s' must have at most %d strings.", name, MOE_MAX_STOP_STRINGS);
    for (size_t i = 0; i < json_array_size(value); i++)
        if (!add_stop(params, name, json_array_get(value, i), error)) return false;
    return true;
}

static bool token_id(const json_t *value, int32_t vocab, const char *param, int32_t *out, moe_http_error *error) {
    int64_t id;
    if (!moe_openai_integer(value, &id)) return moe_openai_bad_type(error, param, "an array of integers", value);
    if (id < 0 || id >= vocab)
        return moe_http_fail(error, 400, "invalid_value", param, "A token id in '%s' is %lld; the vocabulary has 0 to %d.", param,
                             (long long)id, vocab - 1);
    if (out) *out = (int32_t)id;
    return true;
}

bool moe_openai_check_token_ids(const json_t *ids, int32_t vocab, const char *param, moe_http_error *error) {
    for (size_t i = 0; i < json_array_size(ids); i++)
        if (!token_id(json_array_get(ids, i), vocab, param, NULL, error)) return false;
    return true;
}

bool moe_openai_read_stop_token_ids(moe_openai_params *params, const moe_inference *inference, const char *name,
                                    const json_t *value, moe_http_error *error) {
    moe_sampling_params *sampling = &params->sampling;
    if (!json_is_array(value)) return moe_openai_bad_type(error, name, "an array of integers", value);
    if (json_array_size(value) > MOE_MAX_EOS_AND_STOPS)
        return moe_http_fail(error, 400, "invalid_value", name, "'%s' must have at most %d ids.", name, MOE_MAX_EOS_AND_STOPS);
    for (size_t i = 0; i < json_array_size(value); i++) {
        if (!token_id(json_array_get(value, i), inference->vocab, name, &sampling->stop_token_ids[i], error)) return false;
        sampling->num_stop_token_ids++;
    }
    return true;
}

static bool bias_key(const char *key, int32_t vocab, int32_t *out) {
    char *end;
    errno = 0;
    long id = strtol(key, &end, 10);
    if (key[0] < '0' || key[0] > '9' || *end || errno || id >= vocab) return false;
    *out = (int32_t)id;
    return true;
}

bool moe_openai_read_logit_bias(moe_openai_params *params, const moe_inference *inference, const char *name, const json_t *value,
                                moe_http_error *error) {
    if (!json_is_object(value)) return moe_openai_bad_type(error, name, "an object of token ids and numbers", value);
    if (json_object_size(value) > MOE_MAX_LOGIT_BIAS)
        return moe_http_fail(error, 400, "invalid_value", name, "'%s' must have at most %d entries.", name, MOE_MAX_LOGIT_BIAS);
    const char *key;
    json_t *number;
    json_object_foreach((json_t *)value, key, number) {
        moe_logit_bias *bias = &params->logit_bias[params->num_logit_bias];
        if (!bias_key(key, inference->vocab, &bias->token_id))
            return moe_http_fail(error, 400, "invalid_value", name,
                                 "'%.50s' in '%s' is not a token id: the vocabulary has 0 to %d.", key, name,
                                 inference->vocab - 1);
        if (!json_is_number(number)) return moe_openai_bad_type(error, name, "an object of token ids and numbers", number);
        if (!(fabs(json_number_value(number)) <= MAX_LOGIT_BIAS_VALUE))
            return moe_http_fail(error, 400, "invalid_value", name, "A bias in '%s' must be from -100 to 100.", name);
        bias->bias = (float)json_number_value(number);
        params->num_logit_bias++;
    }
    return true;
}

bool moe_openai_read_stream_options(moe_openai_params *params, const moe_inference *inference, const char *name,
                                    const json_t *value, moe_http_error *error) {
    (void)inference;
    if (!json_is_object(value)) return moe_openai_bad_type(error, name, "an object", value);
    const char *key;
    json_t *option;
    params->stream_options_given = true;
    json_object_foreach((json_t *)value, key, option) {
        char param[MOE_HTTP_PARAM_BYTES];
        snprintf(param, sizeof param, "%s.%.80s", name, key);
        bool usage = strcmp(key, "include_usage") == 0;
        /* Options whose `false` asks for nothing. */
        bool off = strcmp(key, "continuous_usage_stats") == 0 || strcmp(key, "include_obfuscation") == 0;
        if (json_is_null(option)) continue;
        if (!usage && !off)
            return moe_http_fail(error, 400, "unknown_parameter", param, "'%s' is not a parameter of this endpoint.", param);
        if (!json_is_boolean(option)) return moe_openai_bad_type(error, param, "a boolean", option);
        if (off && json_is_true(option))
            return moe_http_fail(error, 400, "unsupported_parameter", param,
                                 "'%s' is not supported by this server: leave it out.", param);
        if (usage) params->include_usage = json_is_true(option);
    }
    return true;
}

bool moe_openai_read_template_variables(moe_openai_params *params, const moe_inference *inference, const char *name,
                                        const json_t *value, moe_http_error *error) {
    (void)inference;
    if (!json_is_object(value)) return moe_openai_bad_type(error, name, "an object", value);
    params->template_variables = value;
    return true;
}

static bool is_token_list(const json_t *value) { return json_is_array(value) && json_is_number(json_array_get(value, 0)); }

/* One prompt: text, or token ids. */
static bool check_prompt(const moe_inference *inference, const char *name, const json_t *value, moe_http_error *error) {
    if (json_is_string(value)) {
        if (!inference->tokenizer)
            return moe_http_fail(error, 400, "unsupported_value", name,
                                 "'%s' must be token ids: this server runs without a tokenizer.", name);
        return true;
    }
    if (is_token_list(value)) return moe_openai_check_token_ids(value, inference->vocab, name, error);
    return moe_openai_bad_type(error, name, "a string, token ids, or an array of either", value);
}

bool moe_openai_read_prompt(moe_openai_params *params, const moe_inference *inference, const char *name, const json_t *value,
                            moe_http_error *error) {
    params->prompt = value;
    if (params->endpoint == MOE_ENDPOINT_TOKENIZE)
        return json_is_string(value) || moe_openai_bad_type(error, name, "a string", value);
    if (json_is_string(value) || is_token_list(value)) return check_prompt(inference, name, value, error);
    if (!json_is_array(value)) return moe_openai_bad_type(error, name, "a string, token ids, or an array of either", value);
    if (json_array_size(value) == 0 || json_array_size(value) > MOE_HTTP_MAX_CHOICES)
        return moe_http_fail(error, 400, "invalid_value", name, "'%s' must have 1 to %d prompts.", name, MOE_HTTP_MAX_CHOICES);
    for (size_t i = 0; i < json_array_size(value); i++)
        if (!check_prompt(inference, name, json_array_get(value, i), error)) return false;
    return true;
}

bool moe_openai_read_tokens(moe_openai_params *params, const moe_inference *inference, const char *name, const json_t *value,
                            moe_http_error *error) {
    if (!json_is_array(value)) return moe_openai_bad_type(error, name, "an array of integers", value);
    params->tokens = value;
    return moe_openai_check_token_ids(value, inference->vocab, name, error);
}
