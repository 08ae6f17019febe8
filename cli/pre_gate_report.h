/* What pre-gates are worth on texts: recall of the gates' choices by layer, loss and perplexity where they decide. */
#pragma once
#include <jansson.h>

#include "cli/recall.h"
#include "cli/router_node.h"
#include "common/buf.h"

typedef struct moe_pre_gate_set {
    const char *name;     /* heading of its columns */
    const char *file;     /* moe_model_source.pre_gates */
    const float *weights; /* [num_moe_layers - 1, E, H] */
} moe_pre_gate_set;

/* Passes the texts through the model once by its gates, and once by each set's pre-gates, and appends a table to `out`. */
moe_status moe_pre_gate_report(const moe_router_node_config *node, const moe_model_config *model, const json_t *texts,
                               const moe_pre_gate_set *sets, int32_t num_sets, moe_buf *out, moe_error *err);
