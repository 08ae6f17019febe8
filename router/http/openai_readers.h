/* Readers of the parameters that are more than a number, a flag or a string. Each checks `value` (never null) and fills `params`.
 */
#pragma once
#include "router/http/openai_params.h"

typedef bool (*moe_openai_reader)(moe_openai_params *params, const moe_inference *inference, const char *name,
                                  const json_t *value, moe_http_error *error);

bool moe_openai_read_model(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_messages(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_prompt(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_tokens(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_max_tokens(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_seed(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_stop(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_stop_token_ids(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_logit_bias(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_stream_options(moe_openai_params *, const moe_inference *, const char *, const json_t *, moe_http_error *);
bool moe_openai_read_template_variables(moe_openai_params *, const moe_inference *, const char *, const json_t *,
                                        moe_http_error *);

/* 400s in one wording. `wanted` completes "… must be". */
bool moe_openai_bad_type(moe_http_error *error, const char *param, const char *wanted, const json_t *value);
bool moe_openai_bad_value(moe_http_error *error, const char *param, const char *wanted);

/* An integer, also one written as 3.0; false where it is none or does not fit. */
bool moe_openai_integer(const json_t *value, int64_t *out);
