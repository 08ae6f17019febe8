/* The table that `moesaic status` prints. */
#pragma once
#include <jansson.h>

#include "common/buf.h"

/* From the JSON of /cluster/status; missing members show as "-". */
void moe_status_text(const json_t *status, moe_buf *out);
