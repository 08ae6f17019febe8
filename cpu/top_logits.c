#include "cpu/top_logits.h"

#include "common/elements.h"

#define BLOCK 256 /* logits looked at together: most blocks of a row hold none of its highest */
#define LANES 16  /* maxima kept side by side, so that the compiler can use vectors */

static float highest(const float *x, int32_t count) {
    float lane[LANES];
    int32_t i = 0;
    for (int l = 0; l < LANES; l++) lane[l] = x[0];
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
    for (; i < count; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    for (int l = 1; l < LANES; l++) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
    return lane[0];
}

/* Ids come in ascending order, so that a logit goes behind its equals. */
static void insert(int32_t id, float logit, int32_t held, int32_t n, int32_t *ids, float *top) {
    int32_t at = held < n ? held : n - 1;
    for (; at > 0 && top[at - 1] < logit; at--) {
        ids[at] = ids[at - 1];
        top[at] = top[at - 1];
    }
    ids[at] = id;
    top[at] = logit;
}

void moe_cpu_top_logits(const float *logits, int32_t count, int32_t n, int32_t *ids, float *top) {
    int32_t held = 0;
    for (int32_t first = 0; first < count; first += BLOCK) {
        int32_t size = count - first < BLOCK ? count - first : BLOCK;
        if (!moe_elements_finite(logits + first, MOE_F32, (size_t)size)) {
            for (int32_t j = 0; j < n; j++) ids[j] = -1;
            return;
        }
        if (held == n && highest(logits + first, size) <= top[n - 1]) continue;
        for (int32_t i = first; i < first + size; i++) {
            if (held == n && logits[i] <= top[n - 1]) continue;
            insert(i, logits[i], held, n, ids, top);
            held += held < n;
        }
    }
}
