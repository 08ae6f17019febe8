/* The arithmetic of training a linear softmax classifier towards another's distribution. Matrices of weights are stored
 * input-major, [H, P] with P outputs, a multiple of MOE_TRAINING_LANES (others are padded with zero columns), so that sums run
 * over rows of them. All memory is 64-byte aligned and the caller's; nothing is allocated. */
#pragma once
#include <stdint.h>

#define MOE_TRAINING_LANES 16

static inline int32_t moe_training_padded(int32_t outputs) {
    return (outputs + MOE_TRAINING_LANES - 1) / MOE_TRAINING_LANES * MOE_TRAINING_LANES;
}

/* y [rows, P] = x [rows, H] · w [H, P] */
void moe_training_linear(const float *x, const float *w, int32_t rows, int32_t hidden, int32_t padded, float *y);

/* g [H, P] = x^T · d, with x [rows, H], d [rows, P] */
void moe_training_linear_gradient(const float *x, const float *d, int32_t rows, int32_t hidden, int32_t padded, float *g);

/* Returns the sum over the rows of KL(softmax(target) ‖ softmax(logits)) in nats; target and logits [rows, P], of each row the
 * first `outputs`. Leaves in `logits` the gradient of the mean over the rows, (softmax(logits) - softmax(target)) / rows, and 0
 * in padding. */
double moe_training_softmax_kl(const float *target, float *logits, int32_t rows, int32_t outputs, int32_t padded);
