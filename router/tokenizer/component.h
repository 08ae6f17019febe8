/* The components of tokenizer.json (normalizer, pre_tokenizer, post_processor, decoder) are objects with a "type", or a Sequence
 * of such. One table a component says how each type is loaded. */
#pragma once
#include "router/tokenizer/json_read.h"

typedef struct moe_component_row {
    const char *type;
    moe_status (*load)(const json_t *json, void *out, moe_error *err); /* out: what the component is loaded into */
} moe_component_row;

typedef struct moe_component_table {
    const char *sequence_key; /* where a Sequence has its parts */
    const moe_component_row *rows;
    size_t num_rows;
} moe_component_table;

/* Loads `json` by the row of its type; the parts of a Sequence one after another. UNIMPLEMENTED names an unknown type. */
moe_status moe_component_load(const moe_component_table *table, const json_t *json, void *out, moe_error *err);
