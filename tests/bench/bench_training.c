/* The arithmetic of training pre-gates (training/), one thread: time of each part of a minibatch, GFLOP/s of the products, and what
 * an epoch of a layer would take.
 *
 * usage: bench_training [hidden experts tokens]; by default a model of 2048 and 128, and 500000 tokens. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "common/random.h"
#include "common/status.h"
#include "training/adamw.h"
#include "training/softmax_kl.h"

#define BATCH 256 /* MOE_PRE_GATE_BATCH_TOKENS */
#define MEASURE_NS (500 * MOE_NS_PER_MS)

typedef struct bench {
    int32_t hidden, experts, padded;
    float *x, *w, *target, *logits, *gradient;
    moe_adamw adamw;
} bench;

static void linear(bench *b) { moe_training_linear(b->x, b->w, BATCH, b->hidden, b->padded, b->logits); }
static void gradient(bench *b) { moe_training_linear_gradient(b->x, b->logits, BATCH, b->hidden, b->padded, b->gradient); }
static void softmax(bench *b) { moe_training_softmax_kl(b->target, b->logits, BATCH, b->experts, b->padded); }
static void adamw(bench *b) { moe_adamw_step(&b->adamw, b->w, b->gradient, (size_t)b->hidden * (size_t)b->padded, 1e-6f); }

/* The fastest of several. */
static double milliseconds(void (*part)(bench *), bench *b) {
    int64_t end = moe_now_ns(moe_clock_real()) + MEASURE_NS, best = INT64_MAX;
    for (int64_t before = 0, now = moe_now_ns(moe_clock_real()); now < end;) {
        before = now;
        part(b);
        now = moe_now_ns(moe_clock_real());
        if (now - before < best) best = now - before;
    }
    return (double)best / 1e6;
}

static float *floats(size_t rows, size_t cols, moe_random *random) {
    float *out = moe_alloc_aligned(rows * cols, sizeof *out);
    MOE_ASSERT(out);
    for (size_t i = 0; random && i < rows * cols; i++) out[i] = (float)(moe_random_unit(random) * 2 - 1) * 0.05f;
    return out;
}

int main(int argc, char **argv) {
    bench b = {.hidden = argc == 4 ? atoi(argv[1]) : 2048, .experts = argc == 4 ? atoi(argv[2]) : 128};
    int64_t tokens = argc == 4 ? atoll(argv[3]) : 500000;
    moe_random random = {1};
    if ((argc != 1 && argc != 4) || b.hidden < 1 || b.experts < 1 || tokens < 1) {
        fprintf(stderr, "usage: bench_training [hidden experts tokens]\n");
        return 2;
    }
    b.padded = moe_training_padded(b.experts);
    size_t hidden = (size_t)b.hidden, padded = (size_t)b.padded;
    b.x = floats(BATCH, hidden, &random);
    b.w = floats(hidden, padded, &random);
    b.target = floats(BATCH, padded, &random);
    b.logits = floats(BATCH, padded, &random);
    b.gradient = floats(hidden, padded, &random);
    b.adamw = (moe_adamw){.beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f, .m = floats(hidden, padded, NULL), .v = floats(hidden, padded, NULL)};
    double flop = 2.0 * BATCH * (double)hidden * (double)padded, forward = milliseconds(linear, &b), backward = milliseconds(gradient, &b),
           kl = milliseconds(softmax, &b), step = milliseconds(adamw, &b), all = 2 * forward + backward + kl + step;
    printf("a minibatch of %d tokens, hidden %d, %d experts:\n", BATCH, b.hidden, b.experts);
    printf("two forward products %.2f ms (%.1f GFLOP/s), gradient %.2f ms (%.1f GFLOP/s), softmax and KL %.2f ms, AdamW %.2f ms\n",
           2 * forward, flop / forward / 1e6, backward, flop / backward / 1e6, kl, step);
    printf("%.2f ms in all; an epoch over %lld tokens %.1f s a layer and thread\n", all, (long long)tokens,
           all / 1e3 * (double)((tokens + BATCH - 1) / BATCH));
    float *const owned[] = {b.x, b.w, b.target, b.logits, b.gradient, b.adamw.m, b.adamw.v};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
    return 0;
}
