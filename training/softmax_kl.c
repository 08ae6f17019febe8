#include "training/softmax_kl.h"

#include <math.h>

#include "common/status.h"

typedef float lanes __attribute__((vector_size(MOE_TRAINING_LANES * sizeof(float)), may_alias));

#define TILE 4 /* rows of the result at once, that share what is read of the other factor */

/* y[i, block] = Σ_k a[i · a_row + k · a_col] · b[k, block], for TILE rows i and one block of lanes; b and y have rows of
 * `padded`. */
static void product_tile(const float *a, int64_t a_row, int64_t a_col, const float *b, int32_t depth, int32_t padded, float *y) {
    lanes sum[TILE] = {{0}};
    for (int32_t k = 0; k < depth; k++) {
        const lanes row = *(const lanes *)(b + (int64_t)k * padded);
        for (int i = 0; i < TILE; i++) sum[i] += a[i * a_row + k * a_col] * row;
    }
    for (int i = 0; i < TILE; i++) *(lanes *)(y + (int64_t)i * padded) = sum[i];
}

static void product_row(const float *a, int64_t a_col, const float *b, int32_t depth, int32_t padded, float *y) {
    lanes sum = {0};
    for (int32_t k = 0; k < depth; k++) sum += a[k * a_col] * *(const lanes *)(b + (int64_t)k * padded);
    *(lanes *)y = sum;
}

/* y [rows, P] = a · b with a [rows, depth] read with those strides, b [depth, P] */
static void product(const float *a, int64_t a_row, int64_t a_col, const float *b, int32_t rows, int32_t depth, int32_t padded,
                    float *y) {
    MOE_ASSERT(padded % MOE_TRAINING_LANES == 0);
    for (int32_t block = 0; block < padded; block += MOE_TRAINING_LANES) {
        int32_t i = 0;
        for (; i + TILE <= rows; i += TILE)
            product_tile(a + i * a_row, a_row, a_col, b + block, depth, padded, y + (int64_t)i * padded + block);
        for (; i < rows; i++) product_row(a + i * a_row, a_col, b + block, depth, padded, y + (int64_t)i * padded + block);
    }
}

void moe_training_linear(const float *x, const float *w, int32_t rows, int32_t hidden, int32_t padded, float *y) {
    product(x, hidden, 1, w, rows, hidden, padded, y);
}

void moe_training_linear_gradient(const float *x, const float *d, int32_t rows, int32_t hidden, int32_t padded, float *g) {
    product(x, 1, hidden, d, hidden, rows, padded, g);
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
