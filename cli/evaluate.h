/* Texts through the serving engine, for their loss (`moesaic eval`) or for what can be watched meanwhile. */
#pragma once
#include <jansson.h>

#include "cli/router_node.h"

#define MOE_EVAL_MAX_TOKENS 1024 /* of a text, end-of-text included */
#define MOE_EVAL_MIN_TOKENS 8    /* shorter texts are skipped */

/* Reads FILE.jsonl, {"domain", "text"} or {"domain", "token_ids"} a line, `limit` texts at most (0: all). *out: an array of them,
 * the caller's. NOT_FOUND, INVALID_ARGUMENT naming the text. */
moe_status moe_texts_read(const char *file, int32_t limit, json_t **out, moe_error *err);

typedef struct moe_evaluation {
    const json_t *texts;
    bool scored;      /* every token but the first is scored; else the texts only pass through the model */
    const char *what; /* a name for the progress line */
} moe_evaluation;

/* Opens a node, passes the texts through its engine and closes it. Each text is tokenized, the end-of-text token appended; token
 * ids are taken as they are, and where there is nothing else the model needs no tokenizer. All are cut at MOE_EVAL_MAX_TOKENS. On a
 * terminal, progress is shown. *out (NULL: not wanted): {"loss", "perplexity", "tokens", "texts", "by_domain": {NAME: {"loss",
 * "tokens"}}, "experts": {"bytes", "device_bytes": what they took on the device at most}, "expert_budget": as in the cluster's status,
 * where there is one}, the caller's. CANCELLED after a signal; the errors of node and engine. */
moe_status moe_evaluate(const moe_router_node_config *node, const moe_evaluation *evaluation, json_t **out, moe_error *err);
