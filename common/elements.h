/* Rows of activations, keys, values and expert outputs, whose element type is float32 or bfloat16. */
#pragma once
#include "common/tensor.h"

static inline size_t moe_row_bytes(moe_dtype dtype, int32_t width) { return (size_t)width * moe_dtype_bytes(dtype); }

/* Row `row` of [rows, width]. */
static inline void *moe_row_at(void *rows, moe_dtype dtype, int32_t width, int64_t row) {
    return (uint8_t *)rows + (size_t)row * moe_row_bytes(dtype, width);
}

/* True where none of `count` elements, at any address, is NaN or infinite. dtype: MOE_F32 or MOE_BF16. */
bool moe_elements_finite(const void *elements, moe_dtype dtype, size_t count);

/* out[i] = x[i], rounded to nearest even where dtype is MOE_BF16. */
void moe_elements_narrow(const float *x, moe_dtype dtype, size_t count, void *out);

/* out[i] = x[i] as f32. */
void moe_elements_widen(const void *x, moe_dtype dtype, size_t count, float *out);

/* x[i] = the value that narrowing and widening leaves of it. */
void moe_elements_round(float *x, moe_dtype dtype, size_t count);

/* sum[i] = fma(weight, x[i], sum[i]). */
void moe_elements_accumulate(float weight, const float *x, size_t count, float *sum);

/* Whether two numeric profiles ("cpu/avx512/float32") name the same element type; an empty profile goes with any. */
bool moe_profiles_share_dtype(const char *a, const char *b);
