#include "training/pre_gate.h"

#include <math.h>
#include <pthread.h>

#include "common/alloc.h"
#include "common/random.h"
#include "training/adamw.h"
#include "training/softmax_kl.h"

/* One thread's memory. H = hidden, P = experts padded. */
typedef struct trainer {
    float *x, *next_x;      /* [BATCH, H] */
    float *logits, *target; /* [BATCH, P] */
    float *gate;            /* [H, P] of the next layer */
    float *w, *best, *g;    /* [H, P] */
    moe_adamw adamw;        /* moments [H, P] */
    uint32_t *order;        /* [tokens] */
} trainer;

typedef struct training {
    const moe_pre_gate_config *config;
    int32_t padded;
    float *weights;
    moe_pre_gate_fit *fits;
    pthread_mutex_t lock; /* guards what follows */
    int32_t next_layer;
    int64_t done, total; /* minibatches */
    moe_status status;
    moe_error *err;
} training;

static void trainer_free(trainer *t) {
    void *const owned[] = {t->x, t->next_x, t->logits, t->target, t->gate, t->w, t->best, t->g, t->adamw.m, t->adamw.v, t->order};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
}

static bool trainer_init(trainer *t, const training *all) {
    const moe_pre_gate_config *c = all->config;
    size_t batch = MOE_PRE_GATE_BATCH_TOKENS, hidden = (size_t)c->hidden, matrix = hidden * (size_t)all->padded;
    *t = (trainer){.adamw = {.beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f, .weight_decay = MOE_PRE_GATE_WEIGHT_DECAY}};
    t->x = moe_alloc_aligned(batch * hidden, sizeof *t->x);
    t->next_x = moe_alloc_aligned(batch * hidden, sizeof *t->next_x);
    t->logits = moe_alloc_aligned(batch * (size_t)all->padded, sizeof *t->logits);
    t->target = moe_alloc_aligned(batch * (size_t)all->padded, sizeof *t->target);
    t->gate = moe_alloc_aligned(matrix, sizeof *t->gate);
    t->w = moe_alloc_aligned(matrix, sizeof *t->w);
    t->best = moe_alloc_aligned(matrix, sizeof *t->best);
    t->g = moe_alloc_aligned(matrix, sizeof *t->g);
    t->adamw.m = moe_alloc_aligned(matrix, sizeof *t->adamw.m);
    t->adamw.v = moe_alloc_aligned(matrix, sizeof *t->adamw.v);
    t->order = moe_calloc((size_t)moe_samples_count(c->train), sizeof *t->order);
    return t->x && t->next_x && t->logits && t->target && t->gate && t->w && t->best && t->g && t->adamw.m && t->adamw.v &&
           t->order;
}

/* out [H, P] = in [E, H], transposed and padded. */
static void to_input_major(const training *all, const float *in, float *out) {
    const moe_pre_gate_config *c = all->config;
    for (int32_t h = 0; h < c->hidden; h++)
        for (int32_t e = 0; e < all->padded; e++)
            out[(int64_t)h * all->padded + e] = e < c->num_experts ? in[(int64_t)e * c->hidden + h] : 0;
}

static void to_output_major(const training *all, const float *in, float *out) {
    const moe_pre_gate_config *c = all->config;
    for (int32_t e = 0; e < c->num_experts; e++)
        for (int32_t h = 0; h < c->hidden; h++) out[(int64_t)e * c->hidden + h] = in[(int64_t)h * all->padded + e];
}

/* Sum of the KL over tokens order[0 … rows) (NULL: first … first + rows) of `samples`; t->logits is then the gradient of their
 * mean. */
static double forward(const training *all, trainer *t, const moe_samples *samples, int32_t layer, const uint32_t *order,
                      int64_t first, int32_t rows) {
    const moe_pre_gate_config *c = all->config;
    for (int32_t i = 0; i < rows; i++) {
        int64_t token = order ? order[i] : first + i;
        moe_samples_read(samples, token, layer, t->x + (int64_t)i * c->hidden);
        moe_samples_read(samples, token, layer + 1, t->next_x + (int64_t)i * c->hidden);
    }
    moe_training_linear(t->next_x, t->gate, rows, c->hidden, all->padded, t->target);
    moe_training_linear(t->x, t->w, rows, c->hidden, all->padded, t->logits);
    return moe_training_softmax_kl(t->target, t->logits, rows, c->num_experts, all->padded);
}

static int32_t batch_rows(int64_t left) { return left < MOE_PRE_GATE_BATCH_TOKENS ? (int32_t)left : MOE_PRE_GATE_BATCH_TOKENS; }
static int64_t batches_of(int64_t tokens) { return (tokens + MOE_PRE_GATE_BATCH_TOKENS - 1) / MOE_PRE_GATE_BATCH_TOKENS; }

static double held_out_kl(const training *all, trainer *t, int32_t layer) {
    const moe_samples *samples = all->config->held_out;
    int64_t count = moe_samples_count(samples);
    double sum = 0;
    for (int64_t at = 0; at < count; at += MOE_PRE_GATE_BATCH_TOKENS)
        sum += forward(all, t, samples, layer, NULL, at, batch_rows(count - at));
    return sum / (double)count;
}

static void shuffle(uint32_t *order, int64_t count, moe_random *random) {
    for (int64_t i = 0; i < count; i++) order[i] = (uint32_t)i;
    for (int64_t i = count - 1; i > 0; i--) {
        int64_t j = (int64_t)moe_random_below(random, (uint64_t)i + 1);
        uint32_t kept = order[i];
        order[i] = order[j];
        order[j] = kept;
    }
}

static void advance(training *all, int64_t batches) {
    const moe_pre_gate_config *c = all->config;
    if (batches == 0) return;
    pthread_mutex_lock(&all->lock);
    all->done += batches;
    if (c->progress) c->progress(c->progress_ctx, all->done, all->total);
    pthread_mutex_unlock(&all->lock);
}

static void train_epoch(training *all, trainer *t, int32_t layer) {
    const moe_pre_gate_config *c = all->config;
    int64_t count = moe_samples_count(c->train);
    double all_steps = (double)c->epochs * (double)batches_of(count);
    size_t matrix = (size_t)c->hidden * (size_t)all->padded;
    for (int64_t at = 0; at < count; at += MOE_PRE_GATE_BATCH_TOKENS) {
        int32_t rows = batch_rows(count - at);
        forward(all, t, c->train, layer, t->order + at, 0, rows);
        moe_training_linear_gradient(t->x, t->logits, rows, c->hidden, all->padded, t->g);
        float lr = c->lr * (float)(0.5 * (1 + cos(M_PI * (double)t->adamw.steps / all_steps)));
        moe_adamw_step(&t->adamw, t->w, t->g, matrix, lr);
        advance(all, 1);
    }
}

static void train_layer(training *all, trainer *t, int32_t layer) {
    const moe_pre_gate_config *c = all->config;
    size_t gate = (size_t)c->num_experts * (size_t)c->hidden,
           matrix_bytes = (size_t)c->hidden * (size_t)all->padded * sizeof(float);
    moe_pre_gate_fit *fit = &all->fits[layer];
    moe_random random = {.state = moe_mix64(c->seed) + (uint64_t)layer};
    to_input_major(all, c->gates + (size_t)(layer + 1) * gate, t->gate);
    memcpy(t->w, t->gate, matrix_bytes);
    memcpy(t->best, t->w, matrix_bytes);
    memset(t->adamw.m, 0, matrix_bytes);
    memset(t->adamw.v, 0, matrix_bytes);
    t->adamw.steps = 0;
    *fit = (moe_pre_gate_fit){.kl_before = held_out_kl(all, t, layer)};
    fit->kl_after = fit->kl_before;
    int32_t epoch = 0;
    for (; epoch < c->epochs && epoch - fit->epochs < MOE_PRE_GATE_PATIENCE; epoch++) {
        shuffle(t->order, moe_samples_count(c->train), &random);
        train_epoch(all, t, layer);
        double kl = held_out_kl(all, t, layer);
        if (!(kl < fit->kl_after)) continue;
        fit->kl_after = kl;
        fit->epochs = epoch + 1;
        memcpy(t->best, t->w, matrix_bytes);
    }
    advance(all, (c->epochs - epoch) * batches_of(moe_samples_count(c->train)));
    to_output_major(all, t->best, all->weights + (size_t)layer * gate);
}

static int32_t take_layer(training *all) {
    pthread_mutex_lock(&all->lock);
    int32_t layer = all->next_layer + 1 < all->config->num_layers ? all->next_layer++ : -1;
    pthread_mutex_unlock(&all->lock);
    return layer;
}

static void *run(void *ctx) {
    training *all = ctx;
    trainer t;
    if (trainer_init(&t, all)) {
        for (int32_t layer; (layer = take_layer(all)) >= 0;) train_layer(all, &t, layer);
    } else {
        pthread_mutex_lock(&all->lock);
        all->status = moe_fail(all->err, MOE_RESOURCE_EXHAUSTED, "out of memory for training");
        pthread_mutex_unlock(&all->lock);
    }
    trainer_free(&t);
    return NULL;
}

/* A thread that cannot be started is missed, nothing else: this one trains all that is left. */
static void run_threads(training *all, int32_t count) {
    pthread_t *threads = moe_calloc((size_t)count, sizeof *threads);
    int32_t started = 0;
    while (threads && started < count && pthread_create(&threads[started], NULL, run, all) == 0) started++;
    run(all);
    for (int32_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
    moe_free(threads);
}

moe_status moe_pre_gates_train(const moe_pre_gate_config *c, float *weights, moe_pre_gate_fit *fits, moe_error *err) {
    MOE_ASSERT(c->num_layers > 1 && c->num_experts > 0 && c->epochs > 0 && c->threads > 0);
    int64_t count = moe_samples_count(c->train);
    if (count == 0 || moe_samples_count(c->held_out) == 0)
        return moe_fail(err, MOE_FAILED_PRECONDITION, "no tokens to train on, or none held out: more texts are needed");
    if (count > UINT32_MAX) return moe_fail(err, MOE_RESOURCE_EXHAUSTED, "more than 2^32 tokens to train on");
    int32_t layers = c->num_layers - 1;
    training all = {.config = c,
                    .padded = moe_training_padded(c->num_experts),
                    .weights = weights,
                    .fits = fits,
                    .total = layers * c->epochs * batches_of(count),
                    .err = err};
    pthread_mutex_init(&all.lock, NULL);
    run_threads(&all, (c->threads < layers ? c->threads : layers) - 1);
    pthread_mutex_destroy(&all.lock);
    return all.status;
}
