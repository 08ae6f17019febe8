#include "training/adamw.h"

#include <math.h>

typedef struct update {
    float beta1, beta2, correct1, correct2, epsilon, decay, lr;
} update;

static inline __attribute__((always_inline)) void step(update u, float *restrict w, float *restrict m, float *restrict v,
                                                       const float *restrict g, size_t count) {
    for (size_t i = 0; i < count; i++) {
        m[i] = u.beta1 * m[i] + (1 - u.beta1) * g[i];
        v[i] = u.beta2 * v[i] + (1 - u.beta2) * g[i] * g[i];
        const float change = m[i] / u.correct1 / (sqrtf(v[i] / u.correct2) + u.epsilon);
        w[i] -= u.lr * (change + u.decay * w[i]);
    }
}

/* The same bits by every instruction set: no sum, and nothing is fused. */
#define STEP(name, ...)                                                                                              \
    __VA_ARGS__ static void name(update u, float *w, float *m, float *v, const float *g, size_t count) {             \
        step(u, w, m, v, g, count);                                                                                  \
    }
STEP(step_any, __attribute__((optimize("O3"))))
#if defined(__x86_64__)
STEP(step_avx2, __attribute__((target("avx2"), optimize("O3"))))
STEP(step_avx512, __attribute__((target("avx512f,prefer-vector-width=512"), optimize("O3"))))
#endif

void moe_adamw_step(moe_adamw *a, float *w, const float *g, size_t count, float lr) {
    a->steps++;
    const update u = {.beta1 = a->beta1,
                      .beta2 = a->beta2,
                      .correct1 = (float)(1 - pow(a->beta1, (double)a->steps)),
                      .correct2 = (float)(1 - pow(a->beta2, (double)a->steps)),
                      .epsilon = a->epsilon,
                      .decay = a->weight_decay,
                      .lr = lr};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        step_avx512(u, w, a->m, a->v, g, count);
        return;
    }
    if (__builtin_cpu_supports("avx2")) {
        step_avx2(u, w, a->m, a->v, g, count);
        return;
    }
#endif
    step_any(u, w, a->m, a->v, g, count);
}
