#include "router/http/json_text.h"

#define REAL_DIGITS 9

static int append(const char *data, size_t size, void *out) {
    moe_buf_append(out, data, size);
    return 0;
}

bool moe_json_append(moe_buf *out, const json_t *json) {
    return json && json_dump_callback(json, append, out, JSON_COMPACT | JSON_REAL_PRECISION(REAL_DIGITS)) == 0 && !out->failed;
}
