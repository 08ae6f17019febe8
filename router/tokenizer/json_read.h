/* Typed reads of tokenizer.json: an absent or null field takes its default, a field of another type is refused by name. */
#pragma once
#include <jansson.h>

#include "common/status.h"

moe_status moe_json_bool(const json_t *object, const char *key, bool fallback, bool *out, moe_error *err);
moe_status moe_json_int(const json_t *object, const char *key, int64_t least, int64_t most, int64_t *out, moe_error *err);
/* *out borrowed; NULL where absent or null. */
moe_status moe_json_text(const json_t *object, const char *key, const char **out, moe_error *err);

/* The "type" of a component, or "" where it has none. Borrowed. */
const char *moe_json_type(const json_t *object);

/* One spelling that a pattern field has: {"String": …} or {"Regex": …}. *out borrowed. */
moe_status moe_json_pattern(const json_t *object, const char **out, size_t *size, bool *literal, moe_error *err);
