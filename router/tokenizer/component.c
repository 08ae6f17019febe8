#include "router/tokenizer/component.h"

#include <string.h>

static bool is_sequence(const json_t *json) { return strcmp(moe_json_type(json), "Sequence") == 0; }

static moe_status load_one(const moe_component_table *table, const json_t *json, void *out, moe_error *err) {
    for (size_t i = 0; i < table->num_rows; i++)
        if (strcmp(table->rows[i].type, moe_json_type(json)) == 0) return table->rows[i].load(json, out, err);
    return moe_fail(err, MOE_UNIMPLEMENTED, "type '%s' is not supported", moe_json_type(json));
}

moe_status moe_component_load(const moe_component_table *table, const json_t *json, void *out, moe_error *err) {
    const json_t *parts = json_object_get(json, table->sequence_key), *part;
    size_t i;
    if (!is_sequence(json)) return load_one(table, json, out, err);
    if (!json_is_array(parts)) return moe_fail(err, MOE_INVALID_ARGUMENT, "'%s' is not an array", table->sequence_key);
    json_array_foreach((json_t *)parts, i, part) {
        if (is_sequence(part)) return moe_fail(err, MOE_UNIMPLEMENTED, "a Sequence inside a Sequence is not supported");
        moe_status status = load_one(table, part, out, err);
        if (status != MOE_OK) return status;
    }
    return MOE_OK;
}
