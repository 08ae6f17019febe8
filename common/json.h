/* Reading and writing the small JSON texts of our own (leases, maps, meta): strict readers, and writing into a moe_buf. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"

/* Appends `root` as compact text and drops the caller's reference to it. False: root is NULL or out of memory. */
bool moe_json_write(json_t *root, moe_buf *out);

/* 64 bits as 16 lower-case hex digits: JSON's numbers do not hold them. NULL when out of memory. */
json_t *moe_json_hex(uint64_t value);
bool moe_json_read_hex(const json_t *value, uint64_t *out);

/* Members of an object (NULL is allowed, as is a value that is no object); false: absent, of another type, or beyond the limit.
 */
bool moe_json_get_hex(const json_t *object, const char *key, uint64_t *out);
bool moe_json_get_count(const json_t *object, const char *key, int64_t limit, int64_t *out);     /* 0 to limit */
bool moe_json_get_text(const json_t *object, const char *key, char *out, size_t capacity_bytes); /* with its NUL; no NUL within */
