#include "router/placement/operation.h"

#include <string.h>

#include "common/json.h"

static const char *const kind_names[MOE_OP_KINDS] = {"move", "replicate", "drain", "rebalance", "undrain"};
static const char *const state_names[MOE_OP_STATES] = {"pending", "running", "done", "failed", "cancelled"};

const char *moe_operation_kind_name(moe_operation_kind kind) { return kind_names[kind]; }
const char *moe_operation_state_name(moe_operation_state state) { return state_names[state]; }

bool moe_operation_id_valid(const char *id) {
    size_t length = strlen(id);
    return length >= 1 && length < MOE_OPERATION_ID_BYTES &&
           strspn(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == length;
}

bool moe_operation_same(const moe_operation *a, const moe_operation *b) {
    return a->kind == b->kind && a->layer == b->layer && a->expert == b->expert && strcmp(a->from, b->from) == 0 &&
           strcmp(a->to, b->to) == 0 && a->incarnation == b->incarnation;
}

moe_status moe_operation_to_json(const moe_operation *op, moe_buf *out, moe_error *err) {
    moe_buf_clear(out);
    json_t *root = json_pack("{s:s, s:s, s:i, s:i, s:s, s:s, s:o, s:I, s:s, s:s, s:i, s:i, s:b, s:s}", "id", op->id, "kind",
                             kind_names[op->kind], "layer", op->layer, "expert", op->expert, "from", op->from, "to", op->to,
                             "incarnation", moe_json_hex(op->incarnation), "created_ms", (json_int_t)op->created_ms, "state",
                             state_names[op->state], "phase", op->phase, "done", op->done, "total", op->total, "safe_to_stop",
                             op->safe_to_stop, "error", op->error);
    if (moe_json_write(root, out)) return MOE_OK;
    return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "out of memory for the text of an operation");
}

static bool read_name(const json_t *root, const char *key, const char *const *names, int count, int *out) {
    const char *name = json_string_value(json_object_get(root, key));
    for (int i = 0; name && i < count; i++) {
        if (strcmp(names[i], name) != 0) continue;
        *out = i;
        return true;
    }
    return false;
}

static bool read_count(const json_t *root, const char *key, int32_t *out) {
    int64_t value = 0;
    bool ok = moe_json_get_count(root, key, INT32_MAX, &value);
    *out = (int32_t)value;
    return ok;
}

moe_status moe_operation_from_json(const char *text, size_t size, moe_operation *out, moe_error *err) {
    json_t *root = size <= MOE_MAX_OPERATION_BYTES ? json_loadb(text, size, JSON_REJECT_DUPLICATES, NULL) : NULL;
    int kind = 0, state = 0;
    *out = (moe_operation){.layer = 0};
    bool ok = moe_json_get_text(root, "id", out->id, sizeof out->id) && moe_operation_id_valid(out->id) &&
              read_name(root, "kind", kind_names, MOE_OP_KINDS, &kind) &&
              read_name(root, "state", state_names, MOE_OP_STATES, &state) && read_count(root, "layer", &out->layer) &&
              read_count(root, "expert", &out->expert) && moe_json_get_text(root, "from", out->from, sizeof out->from) &&
              moe_json_get_text(root, "to", out->to, sizeof out->to) && moe_json_get_hex(root, "incarnation", &out->incarnation) &&
              moe_json_get_count(root, "created_ms", INT64_MAX, &out->created_ms) &&
              moe_json_get_text(root, "phase", out->phase, sizeof out->phase) && read_count(root, "done", &out->done) &&
              read_count(root, "total", &out->total) && json_is_boolean(json_object_get(root, "safe_to_stop")) &&
              moe_json_get_text(root, "error", out->error, sizeof out->error);
    out->kind = (moe_operation_kind)kind;
    out->state = (moe_operation_state)state;
    out->safe_to_stop = json_is_true(json_object_get(root, "safe_to_stop"));
    json_decref(root);
    return ok ? MOE_OK : moe_fail(err, MOE_INVALID_ARGUMENT, "an operation's text is damaged");
}
