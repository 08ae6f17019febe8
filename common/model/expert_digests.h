/* The manifest of expert digests: what `moesaic digest` writes beforehand, so that a worker whose copy of an expert differs is
 * refused even where it is the first to report one.
 *   {"model_digest": "…", "experts": [["…", …], …]}   by MoE layer and expert: moe_expert_digest as 16 hex digits */
#pragma once
#include <stdint.h>

#include "common/status.h"

#define MOE_EXPERT_DIGESTS_FILE "expert-digests.json" /* its name beside a checkpoint */

/* digests [layers, experts]. Replaces the file at once, by renaming. UNAVAILABLE, RESOURCE_EXHAUSTED. */
moe_status moe_expert_digests_write(const char *path, uint64_t model_digest, int32_t layers, int32_t experts,
                                    const uint64_t *digests, moe_error *err);

/* The caller owns *out [layers, experts]. NOT_FOUND: no such file. FAILED_PRECONDITION: of another model. DATA_LOSS: damaged,
 * with what is wrong. RESOURCE_EXHAUSTED. */
moe_status moe_expert_digests_read(const char *path, uint64_t model_digest, int32_t layers, int32_t experts, uint64_t **out,
                                   moe_error *err);
