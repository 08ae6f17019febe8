/* JSON values as compact text. */
#pragma once
#include <jansson.h>

#include "common/buf.h"

/* Appends `json`, without line breaks, reals with the 9 digits that restore a float. False (and nothing to be relied on in `out`)
 * when json is NULL or memory ran out. */
bool moe_json_append(moe_buf *out, const json_t *json);
