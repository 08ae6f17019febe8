/* Element types, and tensors as a checkpoint stores them (borrowed views) or as a generator makes them. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "common/generated.h"

typedef enum moe_dtype { MOE_F32, MOE_BF16, MOE_F16, MOE_DTYPE_COUNT } moe_dtype;

static inline size_t moe_dtype_bytes(moe_dtype dtype) { return dtype == MOE_F32 ? 4 : 2; }
const char *moe_dtype_name(moe_dtype dtype); /* "float32", "bfloat16", "float16" */

/* A row-major matrix [rows, cols], or a vector as [1, cols]. Its elements are either in memory (`data`: borrowed, perhaps
 * unaligned) or generated (data NULL; each rounded to dtype): read them by moe_tensor_read and moe_tensor_read_f32, which know
 * both. Neither: absent. */
typedef struct moe_tensor {
    const void *data;
    moe_dtype dtype;
    int64_t rows, cols;
    moe_generator generated;
} moe_tensor;

static inline bool moe_tensor_present(const moe_tensor *t) { return t->data != NULL || t->generated.seed != 0; }
static inline size_t moe_tensor_bytes(const moe_tensor *t) {
    return (size_t)t->rows * (size_t)t->cols * moe_dtype_bytes(t->dtype);
}

static inline float moe_bf16_to_f32(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t moe_f32_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float moe_f16_to_f32(uint16_t bits);
uint16_t moe_f32_to_f16(float value); /* round to nearest even; beyond the range: infinity; NaN stays NaN */

/* out[0..count) = elements [first, first + count) of a tensor's flat row-major elements, of its own dtype. out may be unaligned.
 */
void moe_tensor_read(const moe_tensor *t, int64_t first, int64_t count, void *out);

/* The same, widened to f32. */
void moe_tensor_read_f32(const moe_tensor *t, int64_t first, int64_t count, float *out);

/* The rows [lo, hi) of a tensor, borrowed. */
moe_tensor moe_tensor_rows(const moe_tensor *t, int64_t lo, int64_t hi);
