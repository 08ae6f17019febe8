/* Kernels of the `cpu` backend beside this machine's measured bounds: GB/s of weights or keys and values read, GFLOP/s.
 *
 * usage: bench_cpu_kernels [threads] [isa]; by default 1 and every path that the machine has.
 * Weights are cycled through more memory than the caches hold, as in decoding a model that fills the machine. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/alloc.h"
#include "common/clock.h"
#include "cpu/ffn.h"
#include "cpu/isa.h"
#include "cpu/segment.h"

#define COLD_BYTES (INT64_C(1) << 30) /* beyond the last-level cache */
#define READ_BYTES (INT64_C(16) << 20)
#define READ_STREAMS 8 /* several at once keep more lines on their way than one */
#define READ_AHEAD_LINES 16
#define MEASURE_NS (400 * MOE_NS_PER_MS)
#define FMA_ROUNDS 10000
#define FMA_CHAINS 12 /* enough to hide the latency of two units */

typedef struct bench {
    const moe_cpu_isa *isa;
    moe_cpu_run run;
    int32_t threads;
    double gigabytes_s, gigaflops; /* measured bounds of this machine with these threads; 0: not measured */
} bench;

static void *allocate(int64_t bytes) {
    void *memory = moe_alloc_aligned((size_t)bytes, 1);
    MOE_ASSERT(memory);
    return memory;
}

/* Calls fn(ctx, i) with i = 0, 1, … for MEASURE_NS; nanoseconds of the fastest call, so that other work on the machine does
 * not count. */
static double time_calls(void (*fn)(void *ctx, int64_t i), void *ctx) {
    int64_t start_ns = moe_now_ns(moe_clock_real()), best_ns = INT64_MAX, now_ns = start_ns;
    for (int64_t i = 0; now_ns - start_ns < MEASURE_NS || i < 3; i++) {
        int64_t before_ns = now_ns;
        fn(ctx, i);
        now_ns = moe_now_ns(moe_clock_real());
        if (now_ns - before_ns < best_ns) best_ns = now_ns - before_ns;
    }
    return (double)best_ns;
}

/* ---- bounds ---- */

typedef struct bound {
    const bench *b;
    const uint64_t *memory, *at;
    double (*fma)(void);
    _Atomic uint64_t sink;
} bound;

typedef uint64_t line __attribute__((vector_size(64)));

static void read_share(void *ctx, int32_t index, int32_t thread) {
    bound *bo = ctx;
    int64_t stride = READ_BYTES / 64 / bo->b->threads / READ_STREAMS;
    const line *p = (const line *)(const void *)bo->at + stride * READ_STREAMS * index;
    line sum = {0};
    (void)thread;
    for (int64_t i = 0; i < stride; i++)
        for (int64_t j = 0; j < READ_STREAMS; j++) {
            __builtin_prefetch(&p[j * stride + i + READ_AHEAD_LINES]);
            sum ^= p[j * stride + i];
        }
    bo->sink ^= sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

static void read_memory(void *ctx, int64_t i) {
    bound *bo = ctx;
    bo->at = bo->memory + i % (COLD_BYTES / READ_BYTES) * READ_BYTES / 8;
    moe_cpu_parallel_for(bo->b->run.pool, bo->b->threads, read_share, bo, NULL);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static double fma_avx2(void) {
    __m256 acc[FMA_CHAINS], x = _mm256_set1_ps(0.999f);
    float out[8];
    for (int i = 0; i < FMA_CHAINS; i++) acc[i] = _mm256_set1_ps((float)i);
    for (int round = 0; round < FMA_ROUNDS; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < FMA_CHAINS; i++) acc[i] = _mm256_fmadd_ps(acc[i], x, x);
    }
    for (int i = 1; i < FMA_CHAINS; i++) acc[0] = _mm256_add_ps(acc[0], acc[i]);
    _mm256_storeu_ps(out, acc[0]);
    return out[0];
}

__attribute__((target("avx512f"))) static double fma_avx512(void) {
    __m512 acc[FMA_CHAINS], x = _mm512_set1_ps(0.999f);
    float out[16];
    for (int i = 0; i < FMA_CHAINS; i++) acc[i] = _mm512_set1_ps((float)i);
    for (int round = 0; round < FMA_ROUNDS; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < FMA_CHAINS; i++) acc[i] = _mm512_fmadd_ps(acc[i], x, x);
    }
    for (int i = 1; i < FMA_CHAINS; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    _mm512_storeu_ps(out, acc[0]);
    return out[0];
}
#endif

static void fma_share(void *ctx, int32_t index, int32_t thread) {
    bound *bo = ctx;
    (void)index;
    (void)thread;
    bo->sink ^= (uint64_t)bo->fma();
}

static void run_fma(void *ctx, int64_t i) {
    bound *bo = ctx;
    (void)i;
    moe_cpu_parallel_for(bo->b->run.pool, bo->b->threads, fma_share, bo, NULL);
}

static void measure_bounds(bench *b) {
    bound bo = {.b = b};
    void *memory = allocate(COLD_BYTES);
    int32_t width = 0;
    bo.memory = memory;
    b->gigabytes_s = (double)READ_BYTES / time_calls(read_memory, &bo);
    moe_free(memory);
#if defined(__x86_64__)
    if (strcmp(b->isa->name, "avx2") == 0) bo.fma = fma_avx2, width = 8;
    if (strcmp(b->isa->name, "avx512") == 0) bo.fma = fma_avx512, width = 16;
#endif
    if (bo.fma) b->gigaflops = 2.0 * width * FMA_CHAINS * FMA_ROUNDS * b->threads / time_calls(run_fma, &bo);
    printf("\n%s, %d threads: reading memory %.1f GB/s, FMA %.0f GFLOP/s\n", b->isa->name, b->threads, b->gigabytes_s,
           b->gigaflops);
}

static void report(const bench *b, const char *what, double ns, double bytes, double flops) {
    printf("  %-44s %9.1f us  %7.1f GB/s (%3.0f %%)", what, ns / 1e3, bytes / ns, 100 * bytes / ns / b->gigabytes_s);
    printf("  %7.1f GFLOP/s", flops / ns);
    if (b->gigaflops > 0) printf(" (%3.0f %%)", 100 * flops / ns / b->gigaflops);
    printf("\n");
}

/* ---- linear ---- */

typedef struct linear_bench {
    const bench *b;
    moe_cpu_matrix *weights; /* copies that fill COLD_BYTES */
    int64_t copies;
    float *x, *y;
    int32_t rows;
} linear_bench;

static void run_linear(void *ctx, int64_t i) {
    linear_bench *l = ctx;
    moe_cpu_linear_run(l->b->isa->kernels, &l->b->run, &l->weights[i % l->copies], NULL, l->x, l->rows, l->y);
}

static void bench_linear(const bench *b, moe_dtype dtype, int32_t n, int32_t k) {
    static const int32_t row_counts[] = {1, 2, 4, 8, 64};
    int64_t bytes = (int64_t)n * k * (int64_t)moe_dtype_bytes(dtype);
    linear_bench l = {.b = b, .copies = COLD_BYTES / bytes};
    l.weights = calloc((size_t)l.copies, sizeof *l.weights);
    l.x = allocate((int64_t)64 * k * 4);
    l.y = allocate((int64_t)64 * n * 4);
    for (int64_t i = 0; i < l.copies; i++)
        l.weights[i] = (moe_cpu_matrix){.data = allocate(bytes), .dtype = dtype, .n = n, .k = k, .panel = MOE_CPU_LANES};
    for (int i = 0; i < 5; i++) {
        char what[64];
        l.rows = row_counts[i];
        snprintf(what, sizeof what, "linear %s [%d, %d], %d rows", moe_dtype_name(dtype), n, k, l.rows);
        report(b, what, time_calls(run_linear, &l), (double)bytes, 2.0 * n * k * l.rows);
    }
    for (int64_t i = 0; i < l.copies; i++) moe_free(l.weights[i].data);
    free(l.weights);
    moe_free(l.x);
    moe_free(l.y);
}

/* ---- experts ---- */

typedef struct ffn_bench {
    const bench *b;
    moe_cpu_ffn *experts;
    int64_t copies;
    moe_cpu_ffn_part part;
} ffn_bench;

static void run_ffn(void *ctx, int64_t i) {
    ffn_bench *f = ctx;
    f->part.ffn = &f->experts[i % f->copies];
    moe_cpu_ffn_run(f->b->isa->kernels, &f->b->run, &f->part, 1);
}

static void bench_ffn(const bench *b, int32_t hidden, int32_t width) {
    static const int32_t row_counts[] = {1, 4, 32};
    int64_t bytes = 3 * (int64_t)hidden * width * 2;
    ffn_bench f = {.b = b, .copies = COLD_BYTES / bytes};
    moe_ffn_weights w = {.gate = {.dtype = MOE_BF16, .rows = width, .cols = hidden}};
    void *data = allocate((int64_t)hidden * width * 2);
    w.gate.data = data;
    w.up = w.down = w.gate;
    w.down.rows = hidden;
    w.down.cols = width;
    f.experts = calloc((size_t)f.copies, sizeof *f.experts);
    for (int64_t i = 0; i < f.copies; i++)
        MOE_ASSERT(moe_cpu_ffn_load(b->isa->kernels, &w, 0, MOE_FFN_BLOCKS, &f.experts[i], NULL) == MOE_OK);
    float *memory = allocate((int64_t)32 * 2 * (hidden + width) * 4);
    f.part = (moe_cpu_ffn_part){.x = memory, .inner = memory + 32 * hidden, .up = memory + 32 * (hidden + width)};
    f.part.y = memory + 32 * (hidden + 2 * width);
    f.part.block_hi = MOE_FFN_BLOCKS;
    for (int i = 0; i < 3; i++) {
        char what[64];
        f.part.rows = row_counts[i];
        snprintf(what, sizeof what, "expert bfloat16 %d x %d, %d rows", hidden, width, f.part.rows);
        report(b, what, time_calls(run_ffn, &f), (double)bytes, 6.0 * hidden * width * f.part.rows);
    }
    for (int64_t i = 0; i < f.copies; i++) moe_cpu_ffn_free(&f.experts[i]);
    free(f.experts);
    moe_free(memory);
    moe_free(data);
}

/* ---- attention ---- one sequence, one thread */

typedef struct attention_bench {
    const bench *b;
    moe_cpu_attention args;
    int32_t kv_heads;
} attention_bench;

static void run_attention(void *ctx, int64_t i) {
    attention_bench *a = ctx;
    (void)i;
    for (a->args.kv_head = 0; a->args.kv_head < a->kv_heads; a->args.kv_head++) a->b->isa->kernels->attend(&a->args);
}

static void bench_attention(const bench *b, int32_t context, int32_t rows, int32_t heads, int32_t kv_heads, int32_t dim) {
    int32_t blocks = context / MOE_KV_BLOCK_TOKENS;
    int64_t block_floats = (int64_t)kv_heads * dim * MOE_KV_BLOCK_TOKENS;
    moe_cpu_kv_layer kv = {
        .key_block_bytes = 4 * block_floats, .value_block_bytes = 4 * block_floats, .kv_heads = kv_heads, .head_dim = dim};
    kv.padded_dim = dim;
    kv.keys = allocate(block_floats * blocks * 4);
    kv.values = allocate(block_floats * blocks * 4);
    int32_t *table = allocate((int64_t)blocks * 4), *positions = allocate((int64_t)rows * 4);
    for (int32_t i = 0; i < blocks; i++) table[i] = i;
    for (int32_t i = 0; i < rows; i++) positions[i] = context - rows + i;
    attention_bench a = {
        .b = b, .kv_heads = kv_heads, .args = {.kv = &kv, .blocks = table, .positions = positions, .rows = rows}};
    a.args.heads_per_kv = heads / kv_heads;
    a.args.q_stride = a.args.y_stride = (int64_t)heads * dim;
    a.args.q = allocate((int64_t)rows * heads * dim * 4);
    a.args.y = allocate((int64_t)rows * heads * dim * 4);
    a.args.scale = 1;
    a.args.scratch_positions = context;
    a.args.scratch = allocate((int64_t)MOE_CPU_ATTENTION_QUERIES * (context + dim) * 4);
    char what[64];
    snprintf(what, sizeof what, "attention %d rows, context %d, %d/%d x %d", rows, context, heads, kv_heads, dim);
    report(b, what, time_calls(run_attention, &a), 2.0 * (double)block_floats * blocks * 4, 4.0 * heads * dim * context * rows);
    void *const owned[] = {kv.keys, kv.values, table, positions, (void *)(uintptr_t)a.args.q, a.args.y, a.args.scratch};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) moe_free(owned[i]);
}

static void bench_isa(const char *name, int32_t threads) {
    bench b = {.threads = threads};
    moe_error err;
    if (moe_cpu_isa_find(name, &b.isa, &err) != MOE_OK || moe_cpu_pool_open(threads - 1, &b.run.pool, &err) != MOE_OK) {
        printf("%s: %s\n", name, err.message);
        return;
    }
    measure_bounds(&b);
    bench_linear(&b, MOE_BF16, 1024, 2048);
    bench_linear(&b, MOE_F32, 1024, 2048);
    bench_linear(&b, MOE_F16, 1024, 2048);
    bench_ffn(&b, 2048, 768);
    bench_ffn(&b, 256, 192);
    bench_attention(&b, 4096, 1, 32, 4, 128);
    bench_attention(&b, 4096, 8, 32, 4, 128);
    bench_attention(&b, 512, 8, 4, 2, 64);
    moe_cpu_pool_close(&b.run.pool);
}

int main(int argc, char **argv) {
    static const char *const isas[] = {"avx512", "avx2", "scalar"};
    int32_t threads = argc > 1 ? atoi(argv[1]) : 1;
    for (int i = 0; i < 3; i++)
        if (argc <= 2 || strcmp(argv[2], isas[i]) == 0) bench_isa(isas[i], threads > 0 ? threads : 1);
    return 0;
}
