#include "training/adamw.h"

#include <math.h>

void moe_adamw_step(moe_adamw *a, float *w, const float *g, size_t count, float lr) {
    a->steps++;
    const float correct1 = (float)(1 - pow(a->beta1, (double)a->steps)), correct2 = (float)(1 - pow(a->beta2, (double)a->steps));
    for (size_t i = 0; i < count; i++) {
        a->m[i] = a->beta1 * a->m[i] + (1 - a->beta1) * g[i];
        a->v[i] = a->beta2 * a->v[i] + (1 - a->beta2) * g[i] * g[i];
        const float step = a->m[i] / correct1 / (sqrtf(a->v[i] / correct2) + a->epsilon);
        w[i] -= lr * (step + a->weight_decay * w[i]);
    }
}
