/* Whole steps on a GPU of a model with random weights: decode at batch 1, 64 and 256 behind prompts of 128 tokens, prompts of
 * 2048 and 8192, beside the bound: for decoding the bytes of weights touched and of keys and values over the measured copy
 * bandwidth, for prompts the sum over products of max(bytes / bandwidth, operations / measured dense rate). usage:
 * bench_cuda_step [model directory = models/shapes/qwen3-30b-a3b] [layers = 0: all] [bandwidth GB/s] [dense TFLOP/s] */
#include <stdio.h>
#ifdef MOESAIC_HAS_CUDA
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/clock.h"
#include "common/random.h"
#include "cuda/cuda.h"

#define PROMPT 128
#define DECODE_STEPS 24
#define WARM_STEPS 4
#define MAX_SEQUENCES 256
#define MAX_PROMPT 8192

typedef struct bench {
    moe_backend *backend;
    moe_model *model;
    moe_base *base;
    moe_expert **experts;
    moe_local *local;
    moe_kv *kv;
    moe_rows *rows;
    moe_kv_view views[MAX_SEQUENCES];
    double bytes_s, flop_s;
    int32_t *expert_rows;
} bench;

static void check(moe_status status, const moe_error *err) {
    if (status == MOE_OK) return;
    fprintf(stderr, "%s\n", err->message);
    exit(1);
}

static void *array(int64_t count, size_t size) {
    void *p = moe_calloc((size_t)count, size);
    MOE_ASSERT(p);
    return p;
}

static void open_bench(bench *b, const char *dir, int32_t layers) {
    moe_cuda_config config = {.dtype = MOE_BF16};
    moe_dummy_options options = {.seed = 1, .num_layers = layers};
    int32_t pages = MAX_PROMPT / MOE_KV_BLOCK_TOKENS, all = MAX_SEQUENCES * (PROMPT + 64) / MOE_KV_BLOCK_TOKENS + pages;
    moe_error err;
    check(moe_cuda_open(&config, &b->backend, &err), &err);
    const moe_backend_ops *ops = b->backend->ops;
    check(moe_model_open_dummy(dir, &options, &b->model, &err), &err);
    const moe_model_config *c = &b->model->config;
    int32_t experts = c->num_moe_layers * c->num_experts;
    check(ops->base_load(b->backend, b->model, NULL, NULL, &b->base, &err), &err);
    b->experts = array(experts, sizeof *b->experts);
    b->expert_rows = array(experts, sizeof(int32_t));
    for (int32_t i = 0; i < experts; i++)
        check(ops->expert_load(b->backend, &b->model->experts[i], 0, MOE_FFN_BLOCKS, &b->experts[i], &err), &err);
    check(ops->local_create(b->backend, b->base, b->experts, &b->local, &err), &err);
    check(ops->kv_create(b->backend, b->base, all, &b->kv, &err), &err);
    check(ops->rows_create(b->backend, b->base, MAX_PROMPT, &b->rows, &err), &err);
    for (int32_t s = 0, next = 0; s < MAX_SEQUENCES; s++) {
        int32_t count = s == 0 ? pages : (PROMPT + 64) / MOE_KV_BLOCK_TOKENS, *blocks = array(count, sizeof *blocks);
        for (int32_t i = 0; i < count; i++) blocks[i] = next++;
        b->views[s] = (moe_kv_view){.blocks = blocks, .num_blocks = count};
    }
}

static void finished(moe_job *job) { *(volatile bool *)job->owner = true; }

/* Row i: a random token at positions[i] of sequences[i]; the top logit of the last row of each sequence. Device nanoseconds;
 * *wall_ns: until the result is here. */
static int64_t run_step(bench *b, const int32_t *positions, const int32_t *sequences, int32_t rows, int64_t *wall_ns) {
    static moe_random random = {.state = 3};
    int32_t *ids = array(rows, 4), *logit_rows = array(rows, 4), *top = array(rows, 4), wanted = 0;
    float *values = array(rows, 4);
    volatile bool done = false;
    moe_job job = {.done = finished, .owner = (void *)(uintptr_t)&done};
    for (int32_t i = 0; i < rows; i++) {
        ids[i] = (int32_t)moe_random_below(&random, (uint64_t)b->model->config.vocab);
        if (i + 1 == rows || sequences[i + 1] != sequences[i]) logit_rows[wanted++] = i;
    }
    moe_local_step step = {.segment = {.num_rows = rows,
                                       .rows = b->rows,
                                       .kv = b->kv,
                                       .token_ids = ids,
                                       .positions = positions,
                                       .sequences = sequences,
                                       .views = b->views,
                                       .num_views = MAX_SEQUENCES,
                                       .logit_rows = logit_rows,
                                       .num_logit_rows = wanted,
                                       .num_top = 1,
                                       .top_ids = top,
                                       .top_logits = values},
                           .expert_rows = b->expert_rows};
    int64_t begin_ns = moe_now_ns(moe_clock_real());
    b->backend->ops->local_submit(b->backend, b->base, b->local, &step, &job);
    while (!done) b->backend->ops->poll(b->backend);
    *wall_ns = moe_now_ns(moe_clock_real()) - begin_ns;
    if (job.status != MOE_OK || top[0] < 0) {
        fprintf(stderr, "%s\n", job.status != MOE_OK ? job.message : "logits that are not finite");
        exit(1);
    }
    moe_free(ids);
    moe_free(logit_rows);
    moe_free(top);
    moe_free(values);
    return job.compute_ns;
}

/* ---- bounds ---- */

/* Seconds of a product of `rows` rows with a bf16 matrix of `elements`. */
static double product_s(const bench *b, double rows, double elements) {
    double memory = 2 * elements / b->bytes_s, compute = 2 * rows * elements / b->flop_s;
    return memory > compute ? memory : compute;
}

/* Of the step that ran last: experts by their numbers of rows; keys: positions that rows attend to, in all. */
static double bound_s(const bench *b, int32_t rows, int32_t logit_rows, double kv_tokens, double keys) {
    const moe_model_config *c = &b->model->config;
    double q = (double)c->num_heads * c->head_dim, kv = (double)c->num_kv_heads * c->head_dim, hidden = c->hidden;
    double memory = kv_tokens * kv * 4 / b->bytes_s, compute = keys * q * 4 / b->flop_s,
           attention = memory > compute ? memory : compute;
    double seconds = product_s(b, logit_rows, hidden * c->vocab);
    for (int32_t layer = 0; layer < c->num_layers; layer++) {
        seconds += product_s(b, rows, hidden * (2 * q + 2 * kv)) + attention;
        if (!c->layer_is_moe[layer]) seconds += product_s(b, rows, 3 * hidden * c->dense_intermediate);
    }
    for (int32_t i = 0; i < c->num_moe_layers * c->num_experts; i++)
        if (b->expert_rows[i] > 0) seconds += product_s(b, b->expert_rows[i], 3 * hidden * c->expert_intermediate);
    return seconds;
}

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void bench_decode(bench *b, int32_t batch) {
    int32_t *positions = array(MAX_PROMPT, 4), *sequences = array(MAX_PROMPT, 4);
    int64_t device_ns[DECODE_STEPS], wall_ns[DECODE_STEPS], ignored;
    double bound = 0;
    for (int32_t first = 0; first < batch; first += MAX_PROMPT / PROMPT) {
        int32_t rows = 0;
        for (int32_t s = first; s < batch && s < first + MAX_PROMPT / PROMPT; s++)
            for (int32_t i = 0; i < PROMPT; i++, rows++) {
                positions[rows] = i;
                sequences[rows] = s;
            }
        run_step(b, positions, sequences, rows, &ignored);
    }
    for (int32_t step = -WARM_STEPS; step < DECODE_STEPS; step++) {
        int32_t at = PROMPT + step + WARM_STEPS;
        for (int32_t s = 0; s < batch; s++) {
            positions[s] = at;
            sequences[s] = s;
        }
        int64_t wall, device = run_step(b, positions, sequences, batch, &wall);
        if (step < 0) continue;
        device_ns[step] = device;
        wall_ns[step] = wall;
        bound += bound_s(b, batch, batch, (double)batch * (at + 1), (double)batch * (at + 1)) / DECODE_STEPS;
    }
    qsort(device_ns, DECODE_STEPS, sizeof *device_ns, by_size);
    qsort(wall_ns, DECODE_STEPS, sizeof *wall_ns, by_size);
    double device_ms = (double)device_ns[DECODE_STEPS / 2] / 1e6, wall_ms = (double)wall_ns[DECODE_STEPS / 2] / 1e6;
    printf(
        "decode  %4d sequences: %8.3f ms a step on the device, %8.3f in all, %8.0f tokens/s; bound %7.3f ms, reached %3.0f %%\n",
        batch, device_ms, wall_ms, batch / wall_ms * 1e3, bound * 1e3, bound * 1e5 / wall_ms);
    moe_free(positions);
    moe_free(sequences);
}

static void bench_prompt(bench *b, int32_t tokens) {
    int32_t *positions = array(tokens, 4), *sequences = array(tokens, 4);
    int64_t device_ns[5], wall_ns[5];
    for (int32_t i = 0; i < tokens; i++) positions[i] = i;
    for (int i = -2; i < 5; i++) {
        int64_t wall, device = run_step(b, positions, sequences, tokens, &wall);
        if (i >= 0) device_ns[i] = device;
        if (i >= 0) wall_ns[i] = wall;
    }
    qsort(device_ns, 5, sizeof *device_ns, by_size);
    qsort(wall_ns, 5, sizeof *wall_ns, by_size);
    double bound = bound_s(b, tokens, 1, tokens, (double)tokens * (tokens + 1) / 2), wall_ms = (double)wall_ns[2] / 1e6;
    printf(
        "prompt  %4d tokens:    %8.3f ms a step on the device, %8.3f in all, %8.0f tokens/s; bound %7.3f ms, reached %3.0f %%\n",
        tokens, (double)device_ns[2] / 1e6, wall_ms, tokens / wall_ms * 1e3, bound * 1e3, bound * 1e5 / wall_ms);
    moe_free(positions);
    moe_free(sequences);
}

int main(int argc, char **argv) {
    static bench b;
    int32_t count;
    moe_error err;
    if (moe_cuda_device_count(&count, &err) != MOE_OK) {
        printf("skipped: %s\n", err.message);
        return 0;
    }
    b.bytes_s = (argc > 3 ? strtod(argv[3], NULL) : 3000) * 1e9;
    b.flop_s = (argc > 4 ? strtod(argv[4], NULL) : 798) * 1e12;
    open_bench(&b, argc > 1 ? argv[1] : SOURCE_DIR "/models/shapes/qwen3-30b-a3b",
               argc > 2 ? (int32_t)strtol(argv[2], NULL, 10) : 0);
    bench_decode(&b, 1);
    bench_decode(&b, 64);
    bench_decode(&b, 256);
    bench_prompt(&b, 2048);
    bench_prompt(&b, 8192);
    return 0; /* the driver frees what the process held */
}
#else
int main(void) {
    printf("skipped: built without CUDA\n");
    return 0;
}
#endif
