/* The weights of a model of which there is only a config.json. Internal to common/model. */
#pragma once
#include "common/digest.h"
#include "common/status.h"
#include "common/tensor.h"

typedef struct moe_dummy {
    uint64_t seed;
    moe_dtype dtype;  /* config.json's dtype or torch_dtype; bfloat16 where there is none */
    float half_width; /* of the matrices: their standard deviation is config.json's initializer_range, 0.02 where absent */
    moe_sha256 *sha;  /* of all tensors made so far */
} moe_dummy;

typedef enum moe_dummy_role { MOE_DUMMY_MATRIX, MOE_DUMMY_NORM, MOE_DUMMY_BIAS } moe_dummy_role;

/* Reads DIR/config.json. After OK, moe_dummy_end is due. As moe_model_config_read; RESOURCE_EXHAUSTED. */
moe_status moe_dummy_begin(const char *dir, uint64_t seed, moe_dummy *out, moe_error *err);

/* A tensor whose elements follow from its name and the seed: matrices are uniform around 0, norms 1, biases 0. */
moe_tensor moe_dummy_tensor(moe_dummy *dummy, const char *name, moe_dummy_role role, int64_t rows, int64_t cols);

/* The model's digest: SHA-256, first 8 bytes, over the seed and each tensor's name, generator, dtype and shape, in the order in
 * which they were made. */
uint64_t moe_dummy_end(moe_dummy *dummy);

/* Adds what a generated tensor's elements follow from, in place of these elements. */
void moe_dummy_digest_tensor(moe_sha256 *sha, const moe_tensor *tensor);
