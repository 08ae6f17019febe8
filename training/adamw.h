/* AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019). */
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef struct moe_adamw {
    float beta1, beta2, epsilon;
    float weight_decay; /* a step takes lr · weight_decay of a weight away */
    int64_t steps;      /* so far */
    float *m, *v;       /* [count] moments of the gradient, zero at first; the caller's */
} moe_adamw;

/* One step over w [count] with gradient g [count] and learning rate lr. */
void moe_adamw_step(moe_adamw *adamw, float *w, const float *g, size_t count, float lr);
