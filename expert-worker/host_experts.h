/* The handles by which a host backend computes experts from the images of a worker's device backend. */
#pragma once
#include "common/backend.h"

/* `count` whole experts shaped like `weights`; freed by the host's host_experts_free. INVALID_ARGUMENT: the host cannot compute from
 * such images; RESOURCE_EXHAUSTED. */
moe_status moe_host_experts_create(moe_backend *backend, moe_backend *host, const moe_ffn_weights *weights, int32_t count,
                                   moe_host_experts **out, moe_error *err);
