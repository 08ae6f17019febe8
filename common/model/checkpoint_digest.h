/* The digest of an opened checkpoint. Internal to common/model. */
#pragma once
#include "common/model/model.h"
#include "common/model/safetensors.h"

/* SHA-256, first 8 bytes, over each tensor in the order of names: name, NUL, dtype's name, NUL, number of dimensions and the
 * dimensions (i64 little-endian), and for the first and the last tensor of each kind the first MOE_DIGEST_SAMPLE_BYTES of its
 * bytes. Names that are alike but for runs of digits are of one kind. The split into shards does not matter.
 * RESOURCE_EXHAUSTED. */
moe_status moe_checkpoint_digest(const moe_safetensors *checkpoint, uint64_t *out, moe_error *err);
