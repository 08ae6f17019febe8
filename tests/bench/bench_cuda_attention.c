/* Kernels of the base layers on a GPU, bfloat16, the shape of qwen3-30b-a3b, beside measured bounds: GB/s of keys, values or
 * weights read beside a device copy, TFLOP/s of prompt attention beside a dense product. Medians over replays of graphs; data is
 * rotated through more memory than the second-level cache holds. usage: bench_cuda_attention */
#include <stdio.h>
#ifdef MOESAIC_HAS_CUDA
#include <stdlib.h>
#include <string.h>

#include "common/alloc.h"
#include "common/random.h"
#include "cuda/base_kernels.h"
#include "cuda/linear.h"

#define HIDDEN 2048
#define HEADS 32
#define KV_HEADS 4
#define HEAD_DIM 128
#define EXPERTS 128
#define TOP_K 8
#define VOCAB 151936
#define REPEATS 15
#define MAX_COPIES 64
#define ROTATE_BYTES ((int64_t)192 << 20) /* several times the second-level cache */

static moe_cuda_queue queue;
static moe_cuda_device device;
static moe_cuda_linear *linear;
static double copy_gb_s, dense_tflop_s;

static void ok(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

static void *device_memory(int64_t bytes) {
    void *p;
    ok(cudaMalloc(&p, (size_t)bytes), "cudaMalloc");
    return p;
}

static void *to_device(const void *from, int64_t bytes) {
    void *p = device_memory(bytes);
    ok(cudaMemcpy(p, from, (size_t)bytes, cudaMemcpyHostToDevice), "copy");
    ok(cudaStreamSynchronize(0), "copy"); /* the queue's stream does not wait for this one */
    return p;
}

/* Random bfloat16 numbers below 1: one MiB of them, repeated. */
static void *random_bf16(int64_t count) {
    enum { PIECE = 1 << 19 };
    static uint16_t piece[PIECE];
    moe_random random = {.state = 3};
    uint8_t *p = device_memory(count * 2);
    for (int i = 0; i < PIECE; i++) piece[i] = moe_f32_to_bf16((float)(2 * moe_random_unit(&random) - 1));
    for (int64_t at = 0; at < count * 2; at += sizeof piece) {
        size_t bytes = count * 2 - at < (int64_t)sizeof piece ? (size_t)(count * 2 - at) : sizeof piece;
        ok(cudaMemcpy(p + at, piece, bytes, cudaMemcpyHostToDevice), "copy");
    }
    return p;
}

static void *zeros(int64_t bytes) {
    void *p = device_memory(bytes);
    ok(cudaMemset(p, 0, (size_t)bytes), "cudaMemset");
    ok(cudaStreamSynchronize(0), "cudaMemset");
    return p;
}

static int by_time(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median microseconds of one of `copies` calls run(ctx, 0 … copies - 1), captured into a graph. */
static double time_us(cudaError_t (*run)(void *ctx, int i), void *ctx, int copies) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t begin, end;
    float times[REPEATS];
    ok(run(ctx, 0), "launch"); /* plans of cuBLASLt are made outside the capture */
    ok(cudaStreamSynchronize(queue.stream), "run");
    ok(cudaStreamBeginCapture(queue.stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < copies; i++) ok(run(ctx, i), "captured launch");
    ok(cudaStreamEndCapture(queue.stream, &graph), "end of capture");
    ok(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    ok(cudaEventCreate(&begin), "event");
    ok(cudaEventCreate(&end), "event");
    for (int i = -2; i < REPEATS; i++) {
        ok(cudaEventRecord(begin, queue.stream), "record");
        ok(cudaGraphLaunch(exec, queue.stream), "graph");
        ok(cudaEventRecord(end, queue.stream), "record");
        ok(cudaEventSynchronize(end), "run");
        float ms;
        ok(cudaEventElapsedTime(&ms, begin, end), "time");
        if (i >= 0) times[i] = ms;
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    qsort(times, REPEATS, sizeof *times, by_time);
    return (double)times[REPEATS / 2] * 1e3 / copies;
}

/* ---- bounds ---- */

typedef struct copy_case {
    uint8_t *from, *to;
} copy_case;

static cudaError_t run_copy(void *ctx, int i) {
    copy_case *c = ctx;
    (void)i;
    return cudaMemcpyAsync(c->to, c->from, (size_t)1 << 30, cudaMemcpyDeviceToDevice, queue.stream);
}

typedef struct product_case {
    moe_cuda_product product;
    int64_t weight_elements;
    bool many;
} product_case;

static cudaError_t run_product(void *ctx, int i) {
    product_case *c = ctx;
    moe_cuda_product a = c->product;
    a.w = (const uint16_t *)a.w + c->weight_elements * i;
    return c->many ? moe_cuda_linear_many(linear, queue.stream, &a) : moe_cuda_linear_few(&queue, &a);
}

static void measure_bounds(void) {
    copy_case c = {.from = random_bf16(1 << 29), .to = device_memory(1 << 30)};
    copy_gb_s = 2.0 * (1 << 30) / time_us(run_copy, &c, 4) / 1e3;
    cudaFree(c.from);
    cudaFree(c.to);
    product_case p = {.many = true, .product = {.rows = 8192, .n = 8192, .k = 8192}};
    p.product.w = random_bf16(8192 * 8192);
    p.product.x = random_bf16(8192 * 8192);
    p.product.y = device_memory((int64_t)8192 * 8192 * 2);
    dense_tflop_s = 2.0 * 8192 * 8192 * 8192 / time_us(run_product, &p, 3) / 1e6;
    cudaFree((void *)p.product.w);
    cudaFree((void *)p.product.x);
    cudaFree(p.product.y);
    printf("device copy %.0f GB/s, dense bf16 product %.0f TFLOP/s\n", copy_gb_s, dense_tflop_s);
}

/* ---- products ---- */

static void bench_product(const char *name, int32_t n, int32_t k, moe_cuda_out out) {
    static const int32_t rows[] = {1, 4, 8, 16, 32, 64, 128, 256};
    int64_t bytes = (int64_t)n * k * 2, copies = ROTATE_BYTES / bytes + 1;
    product_case c = {.weight_elements = (int64_t)n * k, .product = {.n = n, .k = k, .out = out}};
    if (copies > MAX_COPIES) copies = MAX_COPIES;
    c.product.w = random_bf16(copies * c.weight_elements);
    c.product.x = random_bf16((int64_t)256 * k);
    c.product.y = zeros((int64_t)256 * n * 4);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        c.product.rows = rows[i];
        c.many = false;
        double few_us = time_us(run_product, &c, (int)copies);
        c.many = true;
        double many_us = time_us(run_product, &c, (int)copies);
        printf("%-8s %6d × %5d, %3d rows: few %7.1f us %5.0f GB/s (%3.0f %%), cuBLASLt %7.1f us %5.0f GB/s\n", name, n, k,
               rows[i], few_us, (double)bytes / few_us / 1e3, (double)bytes / few_us / 10 / copy_gb_s, many_us,
               (double)bytes / many_us / 1e3);
    }
    cudaFree((void *)c.product.w);
    cudaFree((void *)c.product.x);
    cudaFree(c.product.y);
}

/* ---- attention ---- */

typedef struct attention_case {
    moe_cuda_attention args;
    int64_t pool_elements; /* of one layer */
    bool decode;
} attention_case;

static cudaError_t run_attention(void *ctx, int i) {
    attention_case *c = ctx;
    moe_cuda_attention a = c->args;
    a.kv.keys = (uint16_t *)a.kv.keys + c->pool_elements * 2 * i;
    a.kv.values = (uint16_t *)a.kv.keys + c->pool_elements;
    return c->decode ? moe_cuda_attention_decode(&queue, &a) : moe_cuda_attention_prefill(&queue, &a);
}

/* As the step does: pieces short enough to fill the GPU a few times over. */
static int32_t piece_tokens(int32_t sequences, int32_t context) {
    int32_t tokens = MOE_CUDA_PIECE_TOKENS;
    while (((context + tokens - 1) / tokens) * sequences * KV_HEADS > 8 * device.num_sms ||
           (context + tokens - 1) / tokens > MOE_CUDA_MAX_PIECES)
        tokens *= 2;
    return tokens < context ? tokens : context;
}

/* `sequences` rows at position `context` - 1 each, or one sequence of `context` rows. */
static void bench_attention(bool decode, int32_t sequences, int32_t context) {
    int32_t pages = (context + 15) / 16, num_rows = decode ? sequences : context, count = 0,
            tile = MOE_CUDA_PREFILL_QUERIES / (HEADS / KV_HEADS);
    int32_t *positions = malloc((size_t)num_rows * 4), *table_at = malloc((size_t)num_rows * 4),
            tokens = piece_tokens(sequences, context);
    int32_t *tables = malloc((size_t)(sequences * pages) * 4);
    moe_cuda_piece *pieces = malloc((size_t)num_rows * MOE_CUDA_MAX_PIECES * sizeof *pieces);
    moe_cuda_tile *tiles = malloc((size_t)num_rows * sizeof *tiles);
    for (int32_t i = 0; i < sequences * pages; i++) tables[i] = (int32_t)((int64_t)i * 7919 % (sequences * pages));
    for (int32_t r = 0; r < num_rows; r++) {
        positions[r] = decode ? context - 1 : r;
        table_at[r] = decode ? r * pages : 0;
        for (int32_t i = 0, number = (context + tokens - 1) / tokens; decode && i < number; i++) {
            int32_t hi = (i + 1) * tokens < context ? (i + 1) * tokens : context;
            pieces[count++] = (moe_cuda_piece){.row = r,
                                               .lo = i * tokens,
                                               .hi = hi,
                                               .table_at = r * pages,
                                               .settled = context - 1,
                                               .place = i,
                                               .pieces = number};
        }
    }
    for (int32_t first = decode ? -1 : (num_rows - 1) / tile * tile; first >= 0; first -= tile)
        tiles[count++] = (moe_cuda_tile){first, num_rows - first < tile ? num_rows - first : tile, first, 0};
    attention_case c = {.decode = decode, .pool_elements = (int64_t)sequences * pages * KV_HEADS * 16 * HEAD_DIM};
    int64_t bytes = (int64_t)sequences * context * KV_HEADS * HEAD_DIM * 4, copies = decode ? ROTATE_BYTES / bytes + 1 : 3;
    if (copies > MAX_COPIES) copies = MAX_COPIES;
    c.args.shape = (moe_cuda_attention_shape){HEADS, KV_HEADS, HEAD_DIM, 0};
    c.args.rows = (moe_cuda_row_inputs){.num_rows = to_device(&num_rows, 4), .positions = to_device(positions, num_rows * 4)};
    c.args.rows.table_at = to_device(table_at, num_rows * 4);
    c.args.rows.tables = to_device(tables, sequences * pages * 4);
    c.args.kv.keys = random_bf16(c.pool_elements * 2 * copies);
    c.args.q = random_bf16((int64_t)num_rows * HEADS * HEAD_DIM);
    c.args.y = device_memory((int64_t)num_rows * HEADS * HEAD_DIM * 2);
    c.args.q_stride = HEADS * HEAD_DIM;
    c.args.num_pieces = c.args.num_tiles = to_device(&count, 4);
    c.args.max_pieces = c.args.max_tiles = count;
    if (decode)
        c.args.pieces = to_device(pieces, count * (int64_t)sizeof *pieces);
    else
        c.args.tiles = to_device(tiles, count * (int64_t)sizeof *tiles);
    c.args.partial = device_memory((int64_t)(decode ? count : 1) * HEADS * (HEAD_DIM + 4) * 4);
    c.args.arrivals = zeros((int64_t)num_rows * KV_HEADS * 4 * (1 + MOE_CUDA_MAX_PIECES / MOE_CUDA_MERGE));
    double us = time_us(run_attention, &c, (int)copies), flop = 4.0 * HEADS * HEAD_DIM * (double)context * (context + 1) / 2;
    if (decode)
        printf("decode   %3d sequences of %6d, pieces of %5d: %8.1f us %5.0f GB/s (%3.0f %%)\n", sequences, context, tokens, us,
               (double)bytes / us / 1e3, (double)bytes / us / 10 / copy_gb_s);
    else
        printf("prefill  %d tokens: %8.1f us %5.0f TFLOP/s (%3.0f %%)\n", context, us, flop / us / 1e6,
               flop / us / 1e4 / dense_tflop_s);
    const void *memory[] = {
        c.args.rows.num_rows, c.args.rows.positions, c.args.rows.table_at, c.args.rows.tables, c.args.kv.keys, c.args.q, c.args.y,
        c.args.pieces,        c.args.tiles,          c.args.num_pieces,    c.args.partial,     c.args.arrivals};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) cudaFree((void *)memory[i]);
    free(positions);
    free(table_at);
    free(tables);
    free(pieces);
    free(tiles);
}

/* ---- the small kernels ---- */

typedef struct small_case {
    moe_cuda_combine_norm combine;
    moe_cuda_gate gate;
    moe_cuda_project project;
    moe_cuda_logits_top top;
} small_case;

static cudaError_t run_combine(void *ctx, int i) {
    return (void)i, moe_cuda_combine_norm_rows(&queue, &((small_case *)ctx)->combine);
}
static cudaError_t run_gate(void *ctx, int i) { return (void)i, moe_cuda_gate_topk(&queue, &((small_case *)ctx)->gate); }
static cudaError_t run_project(void *ctx, int i) { return (void)i, moe_cuda_project_rows(&queue, &((small_case *)ctx)->project); }
static cudaError_t run_top(void *ctx, int i) { return (void)i, moe_cuda_logits_top_rows(&queue, &((small_case *)ctx)->top); }

static void bench_small(int32_t rows) {
    int32_t *places = calloc((size_t)rows, 4), *one_page = calloc((size_t)rows, 4);
    small_case c = {.combine = {.max_rows = rows, .width = HIDDEN, .top_k = TOP_K, .eps = 1e-6f}};
    for (int32_t r = 0; r < rows; r++) one_page[r] = r;
    c.combine.hidden = zeros((int64_t)rows * HIDDEN * 4);
    c.combine.outputs = zeros((int64_t)rows * TOP_K * HIDDEN * 4);
    c.combine.weights = zeros((int64_t)rows * TOP_K * 4);
    c.combine.norm = zeros(HIDDEN * 4);
    c.combine.normed = zeros((int64_t)rows * HIDDEN * 2);
    c.gate = (moe_cuda_gate){.max_rows = rows, .num_experts = EXPERTS, .top_k = TOP_K, .norm_topk = true};
    c.gate.logits = zeros((int64_t)rows * EXPERTS * 4);
    c.gate.experts = zeros((int64_t)rows * TOP_K * 4);
    c.gate.weights = zeros((int64_t)rows * TOP_K * 4);
    c.project = (moe_cuda_project){.shape = {HEADS, KV_HEADS, HEAD_DIM, 0}, .max_rows = rows, .eps = 1e-6f};
    c.project.rows = (moe_cuda_row_inputs){.num_rows = to_device(&rows, 4), .positions = to_device(places, rows * 4)};
    c.project.rows.table_at = to_device(one_page, rows * 4);
    c.project.rows.tables = to_device(one_page, rows * 4);
    c.project.kv.keys = zeros((int64_t)rows * KV_HEADS * 16 * HEAD_DIM * 2);
    c.project.kv.values = zeros((int64_t)rows * KV_HEADS * 16 * HEAD_DIM * 2);
    c.project.qkv = zeros((int64_t)rows * (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2);
    c.project.q_norm = c.project.k_norm = zeros(HEAD_DIM * 4);
    c.project.cosine = c.project.sine = zeros((int64_t)rows * HEAD_DIM * 2);
    double combine_us = time_us(run_combine, &c, 20), gate_us = time_us(run_gate, &c, 20),
           project_us = time_us(run_project, &c, 20);
    printf("%4d rows: combine + norm %6.1f us, gate %5.1f us, project %5.1f us", rows, combine_us, gate_us, project_us);
    if (rows <= 256) {
        c.top =
            (moe_cuda_logits_top){.rows = rows, .vocab = VOCAB, .num_top = 1, .logits = random_bf16((int64_t)rows * VOCAB * 2)};
        c.top.ids = zeros((int64_t)rows * 64 * 4);
        c.top.values = zeros((int64_t)rows * 64 * 4);
        c.top.scratch = zeros((int64_t)moe_cuda_logits_top_scratch(rows, VOCAB, 64));
        double one_us = time_us(run_top, &c, 3);
        c.top.num_top = 64;
        printf(", top logit %6.1f us, 64 top logits %6.1f us", one_us, time_us(run_top, &c, 3));
    }
    printf("\n");
    free(places);
    free(one_page);
}

int main(void) {
    moe_error error;
    int32_t count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        printf("skipped: no GPU here\n");
        return 0;
    }
    if (moe_cuda_device_open(0, &device, &error) != MOE_OK || moe_cuda_linear_open(&device, false, &linear, &error) != MOE_OK) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    queue = (moe_cuda_queue){.overlap = device.arch >= 90, .hopper = device.arch == 90, .num_sms = device.num_sms};
    ok(cudaStreamCreateWithFlags(&queue.stream, cudaStreamNonBlocking), "stream");
    measure_bounds();
    bench_product("qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, MOE_CUDA_OUT_BF16);
    bench_product("o", HIDDEN, HEADS * HEAD_DIM, MOE_CUDA_OUT_F32_ADD);
    bench_product("gate", EXPERTS, HIDDEN, MOE_CUDA_OUT_F32);
    bench_product("lm_head", VOCAB, HIDDEN, MOE_CUDA_OUT_F32);
    static const int32_t decodes[][2] = {{1, 256}, {1, 8192}, {1, 65536}, {64, 256}, {64, 2048}, {256, 256}, {256, 1024}};
    for (size_t i = 0; i < sizeof decodes / sizeof *decodes; i++) bench_attention(true, decodes[i][0], decodes[i][1]);
    bench_attention(false, 1, 2048);
    bench_attention(false, 1, 8192);
    bench_small(1);
    bench_small(64);
    bench_small(256);
    bench_small(8192);
    moe_cuda_linear_close(linear);
    return 0;
}
#else
int main(void) {
    printf("skipped: built without CUDA\n");
    return 0;
}
#endif
