#include "training/softmax_kl.h"

#include <math.h>

#include "common/status.h"

typedef float lanes __attribute__((vector_size(MOE_TRAINING_LANES * sizeof(float)), may_alias));

/* A product's factors: y[i, p] = Σ_k a[i · a_row + k · a_col] · b[k, p], summed in the order of k; b and y have rows of `padded`. */
typedef struct factors {
    const float *a, *b;
    int64_t a_row, a_col;
    int32_t depth, padded;
    float *y;
} factors;

#define INLINE static inline __attribute__((always_inline))

/* ROWS (constant) rows from row i and BLOCKS (constant) blocks of lanes from column p. */
INLINE void product_tile(const factors *f, const int ROWS, const int BLOCKS, int32_t i, int32_t p) {
    lanes sum[8][2];
    const float *a = f->a + i * f->a_row, *b = f->b + p;
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < BLOCKS; c++) sum[r][c] = (lanes){0};
    for (int32_t k = 0; k < f->depth; k++, a += f->a_col, b += f->padded)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < BLOCKS; c++) sum[r][c] += a[r * f->a_row] * *(const lanes *)(b + c * MOE_TRAINING_LANES);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < BLOCKS; c++)
            *(lanes *)(f->y + (int64_t)(i + r) * f->padded + p + c * MOE_TRAINING_LANES) = sum[r][c];
}

/* The columns p … of `rows` rows, in tiles of ROWS (constant) rows and then of one. */
INLINE void product_columns(const factors *f, int32_t rows, const int ROWS, const int BLOCKS, int32_t p) {
    int32_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) product_tile(f, ROWS, BLOCKS, i, p);
    for (; i < rows; i++) product_tile(f, 1, BLOCKS, i, p);
}

/* Tiles that the registers of an instruction set hold; the bits do not depend on them. */
#define PRODUCT(name, rows_at_once, blocks_at_once, ...)                                                                         \
    __VA_ARGS__ static void name(const factors *f, int32_t rows) {                                                               \
        int32_t p = 0, step = (blocks_at_once) * MOE_TRAINING_LANES;                                                             \
        for (; p + step <= f->padded; p += step) product_columns(f, rows, rows_at_once, blocks_at_once, p);                      \
        for (; p < f->padded; p += MOE_TRAINING_LANES) product_columns(f, rows, rows_at_once, 1, p);                             \
    }

PRODUCT(product_any, 2, 1, __attribute__((optimize("O3"))))
#if defined(__x86_64__)
PRODUCT(product_avx2, 4, 1, __attribute__((target("avx2"), optimize("O3"))))
PRODUCT(product_avx512, 8, 2, __attribute__((target("avx512f"), optimize("O3"))))
#endif

/* y [rows, P] = a · b with a [rows, depth] read with those strides, b [depth, P] */
static void product(const factors *f, int32_t rows) {
    MOE_ASSERT(f->padded % MOE_TRAINING_LANES == 0);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        product_avx512(f, rows);
        return;
    }
    if (__builtin_cpu_supports("avx2")) {
        product_avx2(f, rows);
        return;
    }
#endif
    product_any(f, rows);
}

void moe_training_linear(const float *x, const float *w, int32_t rows, int32_t hidden, int32_t padded, float *y) {
    product(&(factors){.a = x, .b = w, .a_row = hidden, .a_col = 1, .depth = hidden, .padded = padded, .y = y}, rows);
}

void moe_training_linear_gradient(const float *x, const float *d, int32_t rows, int32_t hidden, int32_t padded, float *g) {
    product(&(factors){.a = x, .b = d, .a_row = 1, .a_col = hidden, .depth = rows, .padded = padded, .y = g}, hidden);
}

/* log Σ exp(x) */
static float log_sum_exp(const float *x, int32_t count) {
    float high = x[0], sum = 0;
    for (int32_t i = 1; i < count; i++) high = x[i] > high ? x[i] : high;
    for (int32_t i = 0; i < count; i++) sum += expf(x[i] - high);
    return high + logf(sum);
}

double moe_training_softmax_kl(const float *target, float *logits, int32_t rows, int32_t outputs, int32_t padded) {
    double loss = 0;
    for (int32_t r = 0; r < rows; r++) {
        const float *t = target + (int64_t)r * padded;
        float *q = logits + (int64_t)r * padded;
        const float t_norm = log_sum_exp(t, outputs), q_norm = log_sum_exp(q, outputs);
        for (int32_t e = 0; e < outputs; e++) {
            const float log_p = t[e] - t_norm, log_q = q[e] - q_norm, p = expf(log_p);
            loss += p * (log_p - log_q);
            q[e] = (expf(log_q) - p) / (float)rows;
        }
        for (int32_t e = outputs; e < padded; e++) q[e] = 0;
    }
    return loss;
}
