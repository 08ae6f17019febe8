/* JSON files of a checkpoint, and typed, range-checked access to their keys. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"

#define MOE_JSON_MAX_CONFIG_BYTES ((size_t)4 << 20)

/* Reads a whole file that holds one JSON object without duplicate keys. The caller owns *out (json_decref). NOT_FOUND where
 * there is no such file, INVALID_ARGUMENT for one that is too large or not such an object, RESOURCE_EXHAUSTED. */
moe_status moe_json_read_file(const char *path, size_t max_bytes, json_t **out, moe_error *err);

/* The same for text in memory; `name` is for messages. */
moe_status moe_json_read_text(const char *text, size_t size, const char *name, json_t **out, moe_error *err);

/* A reader of one object's keys. The first failure stays in `status` and *err, later reads return their fallback, and the
 * caller checks `status` once at the end. An absent key and a null are the same. */
typedef struct moe_fields {
    const json_t *object; /* borrowed */
    const char *name;     /* for messages, borrowed */
    moe_status status;
    moe_error *err;
} moe_fields;

/* The value of a key; NULL where absent or null. */
const json_t *moe_fields_get(const moe_fields *f, const char *key);

/* A number in [low, high]; `fallback` where the key is absent. */
int64_t moe_fields_integer(moe_fields *f, const char *key, int64_t low, int64_t high, int64_t fallback);
double moe_fields_number(moe_fields *f, const char *key, double low, double high, double fallback);
bool moe_fields_bool(moe_fields *f, const char *key, bool fallback);
const char *moe_fields_text(moe_fields *f, const char *key, const char *fallback); /* borrowed from the object */

/* An integer in [low, high] that must be there. */
int64_t moe_fields_required(moe_fields *f, const char *key, int64_t low, int64_t high);

/* Records a failure, unless there is one already. */
void moe_fields_fail(moe_fields *f, moe_status code, const char *format, ...) __attribute__((format(printf, 3, 4)));
