/* Loss of a model over texts, through the serving engine: what `moesaic eval` computes. */
#pragma once
#include <jansson.h>

#include "router/inference.h"

#define MOE_EVAL_MAX_TOKENS 1024 /* of a text, end-of-text included */
#define MOE_EVAL_MIN_TOKENS 8    /* shorter texts are skipped */

/* Reads FILE.jsonl ({"domain", "text"} a line), tokenizes each text, appends the end-of-text token, cuts at MOE_EVAL_MAX_TOKENS
 * and scores every token but the first. `limit` texts at most (0: all). `progress` (may be NULL) is called with texts done and in
 * all. *out: {"loss", "perplexity", "tokens", "texts", "by_domain": {NAME: {"loss", "tokens"}}}, owned by the caller. */
moe_status moe_evaluate(const moe_inference *inference, const char *file, int32_t limit,
                        void (*progress)(void *ctx, int32_t done, int32_t total), void *ctx, json_t **out, moe_error *err);
