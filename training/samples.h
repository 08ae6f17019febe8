/* What the MoE layers of a model were given for many tokens: the data that pre-gates are trained on. Kept in bfloat16 in a file
 * that has no name, so that it may be larger than memory and is gone with the process. Where more tokens come than it takes, what
 * stays is a uniform sample of all (reservoir sampling, Vitter 1985). Written by one thread; then read by any. */
#pragma once
#include "common/status.h"
#include "common/tensor.h"

typedef struct moe_samples moe_samples;

typedef struct moe_samples_config {
    const char *dir; /* where the file is */
    int32_t num_layers, hidden;
    int64_t max_bytes; /* of the file */
    uint64_t seed;     /* of the choice */
} moe_samples_config;

/* INVALID_ARGUMENT (max_bytes has no room for one token), PERMISSION_DENIED (dir), RESOURCE_EXHAUSTED. */
moe_status moe_samples_new(const moe_samples_config *config, moe_samples **out, moe_error *err);
void moe_samples_free(moe_samples **samples); /* NULLs; idempotent */

/* `rows` more tokens begin; what they gave to each layer follows. RESOURCE_EXHAUSTED: memory or the disk is full. */
moe_status moe_samples_begin(moe_samples *samples, int32_t rows, moe_error *err);
/* x [rows, hidden] of dtype float32 or bfloat16, of the rows of the last begin. */
void moe_samples_put(moe_samples *samples, int32_t layer, const void *x, moe_dtype dtype);

int64_t moe_samples_count(const moe_samples *samples); /* tokens kept */
int64_t moe_samples_seen(const moe_samples *samples);  /* tokens that came */
/* out [hidden] = what token `row` of [0, count) gave to `layer`. */
void moe_samples_read(const moe_samples *samples, int64_t row, int32_t layer, float *out);
