/* The base-layer kernels of the bfloat16 profile against plain arithmetic in double precision, on random paged layouts. Memory
 * that a kernel must not read holds NaN; outputs are poisoned. Skipped, with the reason, where there is no GPU. */
#ifdef MOESAIC_HAS_CUDA
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/random.h"
#include "cpu/cpu.h"
#include "cuda/base_kernels.h"
#include "tests/support/test.h"

#define MAX_ALLOCATIONS 256
#define NAN_BF16 0x7fff

static moe_cuda_queue queue;
static moe_random random_source;
static void *allocations[MAX_ALLOCATIONS]; /* of the device; freed after each test */
static int num_allocations;

#define ok(call) check_call(call, #call, __LINE__)
static void check_call(cudaError_t error, const char *call, int line) {
    if (error != cudaSuccess) fail_msg("line %d: %s: %s", line, call, cudaGetErrorString(error));
}

static void *device_memory(size_t bytes) {
    void *p = NULL;
    assert_true(num_allocations < MAX_ALLOCATIONS);
    ok(cudaMalloc(&p, bytes ? bytes : 1));
    return allocations[num_allocations++] = p;
}

static void *to_device(const void *from, size_t bytes) {
    void *p = device_memory(bytes);
    ok(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    ok(cudaStreamSynchronize(0)); /* from pageable memory it returns once it is staged, and the queue's stream does not wait for it */
    return p;
}

static void from_device(void *to, const void *from, size_t bytes) {
    ok(cudaStreamSynchronize(queue.stream));
    ok(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

static void free_all(void) {
    while (num_allocations > 0) ok(cudaFree(allocations[--num_allocations]));
}

static float uniform(void) { return (float)(2 * moe_random_unit(&random_source) - 1); }
static int32_t below(int32_t n) { return (int32_t)moe_random_below(&random_source, (uint64_t)n); }

static uint16_t *random_bf16(int64_t count, float scale) {
    uint16_t *p = malloc((size_t)count * sizeof *p);
    for (int64_t i = 0; i < count; i++) p[i] = moe_f32_to_bf16(scale * uniform());
    return p;
}

static float *random_f32(int64_t count, float scale) {
    float *p = malloc((size_t)count * sizeof *p);
    for (int64_t i = 0; i < count; i++) p[i] = scale * uniform();
    return p;
}

/* ‖got - want‖ / ‖want‖; a value that is not finite counts as infinite. */
static double error_of(const double *want, const float *got, int64_t count) {
    double difference = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(got[i])) return INFINITY;
        difference += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    return size > 0 ? sqrt(difference / size) : sqrt(difference);
}

static double error_of_bf16(const double *want, const uint16_t *got, int64_t count) {
    float *wide = malloc((size_t)count * sizeof *wide);
    for (int64_t i = 0; i < count; i++) wide[i] = moe_bf16_to_f32(got[i]);
    double error = error_of(want, wide, count);
    free(wide);
    return error;
}

/* ---- attention ---- */

typedef struct span {
    int32_t first_position, rows; /* of one sequence */
} span;

typedef struct layout {
    moe_cuda_attention_shape shape;
    int32_t num_spans, num_rows, num_blocks;
    const span *spans;
    int32_t *positions, *table_at, *tables, *span_of; /* [rows], [rows], all tables, [rows] */
    uint16_t *keys, *values, *q;                      /* the pools, queries [rows, heads, d] */
    moe_cuda_attention args;
    uint16_t *y;
    double *want;
} layout;

static int64_t kv_at(const layout *l, int32_t row, int32_t position, int32_t kv_head) {
    int64_t block = l->tables[l->table_at[row] + position / MOE_CUDA_PAGE_TOKENS];
    return ((block * l->shape.num_kv_heads + kv_head) * MOE_CUDA_PAGE_TOKENS + position % MOE_CUDA_PAGE_TOKENS) *
           l->shape.head_dim;
}

static void make_tables(layout *l) {
    int32_t row = 0, at = 0;
    for (int i = 0; i < l->num_spans; i++) l->num_rows += l->spans[i].rows;
    for (int i = 0; i < l->num_spans; i++)
        l->num_blocks += (l->spans[i].first_position + l->spans[i].rows - 1) / MOE_CUDA_PAGE_TOKENS + 1;
    l->positions = calloc((size_t)l->num_rows, sizeof(int32_t));
    l->table_at = calloc((size_t)l->num_rows, sizeof(int32_t));
    l->span_of = calloc((size_t)l->num_rows, sizeof(int32_t));
    l->tables = calloc((size_t)l->num_blocks, sizeof(int32_t));
    for (int32_t i = 0; i < l->num_blocks; i++) l->tables[i] = i;
    for (int32_t i = l->num_blocks - 1; i > 0; i--) {
        int32_t other = below(i + 1), block = l->tables[i];
        l->tables[i] = l->tables[other];
        l->tables[other] = block;
    }
    for (int i = 0; i < l->num_spans; i++) {
        for (int32_t r = 0; r < l->spans[i].rows; r++, row++) {
            l->positions[row] = l->spans[i].first_position + r;
            l->table_at[row] = at;
            l->span_of[row] = i;
        }
        at += (l->spans[i].first_position + l->spans[i].rows - 1) / MOE_CUDA_PAGE_TOKENS + 1;
    }
}

static void fill_pools(layout *l) {
    int32_t d = l->shape.head_dim;
    int64_t count = (int64_t)l->num_blocks * l->shape.num_kv_heads * MOE_CUDA_PAGE_TOKENS * d;
    l->keys = malloc((size_t)count * 2);
    l->values = malloc((size_t)count * 2);
    for (int64_t i = 0; i < count; i++) l->keys[i] = l->values[i] = NAN_BF16;
    for (int32_t row = 0; row < l->num_rows; row++) {
        if (row + 1 < l->num_rows && l->span_of[row + 1] == l->span_of[row]) continue; /* the last row of a span sees all */
        for (int32_t p = 0; p <= l->positions[row]; p++)
            for (int32_t h = 0; h < l->shape.num_kv_heads; h++)
                for (int32_t i = 0; i < d; i++) {
                    l->keys[kv_at(l, row, p, h) + i] = moe_f32_to_bf16(3 * uniform());
                    l->values[kv_at(l, row, p, h) + i] = moe_f32_to_bf16(uniform());
                }
    }
}

static void reference(layout *l) {
    int32_t d = l->shape.head_dim, heads = l->shape.num_heads, group = heads / l->shape.num_kv_heads;
    l->want = calloc((size_t)l->num_rows * (size_t)heads * (size_t)d, sizeof(double));
    for (int32_t row = 0; row < l->num_rows; row++)
        for (int32_t h = 0; h < heads; h++) {
            int32_t hi = l->positions[row] + 1, lo = l->shape.window && hi > l->shape.window ? hi - l->shape.window : 0;
            const uint16_t *q = l->q + ((int64_t)row * heads + h) * d;
            float query[128];
            double *weights = malloc((size_t)(hi - lo) * sizeof *weights), max = -INFINITY, total = 0;
            double *y = l->want + ((int64_t)row * heads + h) * d;
            for (int32_t i = 0; i < d; i++) query[i] = moe_bf16_to_f32(q[i]);
            for (int32_t p = lo; p < hi; p++) {
                const uint16_t *key = l->keys + kv_at(l, row, p, h / group);
                double dot = 0;
                for (int32_t i = 0; i < d; i++) dot += (double)query[i] * (double)moe_bf16_to_f32(key[i]);
                weights[p - lo] = dot / sqrt(d);
                max = fmax(max, weights[p - lo]);
            }
            for (int32_t p = lo; p < hi; p++) total += weights[p - lo] = exp(weights[p - lo] - max);
            for (int32_t p = lo; p < hi; p++) {
                const uint16_t *value = l->values + kv_at(l, row, p, h / group);
                for (int32_t i = 0; i < d; i++) y[i] += weights[p - lo] / total * (double)moe_bf16_to_f32(value[i]);
            }
            free(weights);
        }
}

static void make_layout(layout *l, const moe_cuda_attention_shape *shape, const span *spans, int num_spans) {
    *l = (layout){.shape = *shape, .spans = spans, .num_spans = num_spans};
    make_tables(l);
    fill_pools(l);
    int64_t width = (int64_t)shape->num_heads * shape->head_dim,
            pool = (int64_t)l->num_blocks * shape->num_kv_heads * 16 * shape->head_dim;
    l->q = random_bf16(l->num_rows * width, 1);
    l->y = malloc((size_t)(l->num_rows * width) * 2);
    reference(l);
    l->args = (moe_cuda_attention){.shape = *shape, .q_stride = width};
    l->args.rows = (moe_cuda_row_inputs){.num_rows = to_device(&l->num_rows, 4),
                                         .positions = to_device(l->positions, (size_t)l->num_rows * 4),
                                         .table_at = to_device(l->table_at, (size_t)l->num_rows * 4),
                                         .tables = to_device(l->tables, (size_t)l->num_blocks * 4)};
    l->args.kv.keys = to_device(l->keys, (size_t)pool * 2);
    l->args.kv.values = to_device(l->values, (size_t)pool * 2);
    l->args.q = to_device(l->q, (size_t)(l->num_rows * width) * 2);
    l->args.y = device_memory((size_t)(l->num_rows * width) * 2);
}

static void free_layout(layout *l) {
    void *memory[] = {l->positions, l->table_at, l->span_of, l->tables, l->keys, l->values, l->q, l->y, l->want};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free_all();
}

/* Launches with room for more than there is. */
static void run_attention(layout *l, const moe_cuda_piece *pieces, const moe_cuda_tile *tiles, int32_t count) {
    size_t bytes = (size_t)l->num_rows * (size_t)l->shape.num_heads * (size_t)l->shape.head_dim * 2;
    ok(cudaMemset(l->args.y, 0xff, bytes));
    ok(cudaStreamSynchronize(0));
    if (pieces) {
        l->args.pieces = to_device(pieces, (size_t)count * sizeof *pieces);
        l->args.num_pieces = to_device(&count, 4);
        l->args.max_pieces = count + 3;
        ok(moe_cuda_attention_decode(&queue, &l->args));
    } else {
        l->args.tiles = to_device(tiles, (size_t)count * sizeof *tiles);
        l->args.num_tiles = to_device(&count, 4);
        l->args.max_tiles = count + 3;
        ok(moe_cuda_attention_prefill(&queue, &l->args));
    }
    from_device(l->y, l->args.y, bytes);
}

static void check_attention(layout *l, const char *what) {
    int64_t count = (int64_t)l->num_rows * l->shape.num_heads * l->shape.head_dim;
    double error = error_of_bf16(l->want, l->y, count);
    if (!(error < 5e-3))
        fail_msg("%s: error %g at heads %d kv %d d %d window %d", what, error, l->shape.num_heads, l->shape.num_kv_heads,
                 l->shape.head_dim, l->shape.window);
}

static int32_t make_pieces(const layout *l, int32_t tokens, moe_cuda_piece *pieces) {
    int32_t count = 0;
    for (int32_t row = 0; row < l->num_rows; row++) {
        int32_t position = l->positions[row];
        int32_t lo = l->shape.window && position + 1 > l->shape.window ? position + 1 - l->shape.window : 0;
        int32_t number = position / tokens - lo / tokens + 1;
        for (int32_t i = 0; i < number; i++) {
            int32_t from = (lo / tokens + i) * tokens, to = from + tokens;
            pieces[count++] = (moe_cuda_piece){.row = row,
                                               .lo = from > lo ? from : lo,
                                               .hi = to < position + 1 ? to : position + 1,
                                               .table_at = l->table_at[row],
                                               .settled = below(position + 1),
                                               .place = i,
                                               .pieces = number};
        }
    }
    return count;
}

static int32_t make_tiles(const layout *l, int32_t most, moe_cuda_tile *tiles) {
    int32_t count = 0;
    for (int32_t row = 0; row < l->num_rows;) {
        int32_t rows = 1;
        while (rows < most && row + rows < l->num_rows && l->span_of[row + rows] == l->span_of[row]) rows++;
        tiles[count++] = (moe_cuda_tile){row, rows, l->positions[row], l->table_at[row]};
        row += rows;
    }
    return count;
}

static void check_layout(const moe_cuda_attention_shape *shape, const span *spans, int num_spans, int32_t tokens) {
    layout l;
    make_layout(&l, shape, spans, num_spans);
    size_t bytes = (size_t)l.num_rows * (size_t)shape->num_heads * (size_t)shape->head_dim * 2;
    size_t counters = (size_t)(l.num_rows * shape->num_kv_heads) * (1 + MOE_CUDA_MAX_PIECES / MOE_CUDA_MERGE);
    moe_cuda_piece *pieces = malloc((size_t)l.num_rows * MOE_CUDA_MAX_PIECES * sizeof *pieces);
    moe_cuda_tile *tiles = malloc((size_t)l.num_rows * sizeof *tiles);
    int32_t count = make_pieces(&l, tokens, pieces), *none = calloc(counters, 4);
    uint16_t *first = malloc(bytes);
    l.args.partial = device_memory((size_t)count * (size_t)shape->num_heads * (size_t)(shape->head_dim + 4) * 4);
    l.args.arrivals = to_device(none, counters * 4);
    for (int turn = 0; turn < 3; turn++) {
        run_attention(&l, pieces, NULL, count);
        check_attention(&l, "decode");
        if (turn) assert_memory_equal(first, l.y, bytes);
        memcpy(first, l.y, bytes);
    }
    int32_t most = moe_cuda_prefill_rows(shape);
    const bool hopper = queue.hopper;
    for (int path = 0; path < 1 + hopper; path++) {
        queue.hopper = path > 0;
        for (int32_t rows = most; rows > 0; rows = rows > 1 ? rows / 3 + 1 - (rows == 2) : 0) {
            count = make_tiles(&l, rows, tiles);
            run_attention(&l, NULL, tiles, count);
            check_attention(&l, path ? "prefill, sm_90" : "prefill");
            if (rows < most) assert_memory_equal(first, l.y, bytes); /* any cut into tiles gives the same bits */
            memcpy(first, l.y, bytes);
        }
    }
    queue.hopper = hopper;
    free(pieces);
    free(tiles);
    free(first);
    free(none);
    free_layout(&l);
}

/* Under compute-sanitizer, which takes a hundred times as long: the layouts of test_attention alone, of every third shape. */
static bool sanitized(void) { return getenv("MOESAIC_TEST_SANITIZER") != NULL; }

static void test_attention(void **state) {
    static const moe_cuda_attention_shape shapes[] = {{32, 4, 128, 0}, {4, 4, 64, 0},   {4, 4, 128, 0},  {16, 4, 128, 100},
                                                      {8, 1, 64, 37},  {14, 2, 128, 0}, {12, 1, 128, 0}, {16, 1, 64, 300}};
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i += sanitized() ? 3 : 1) {
        span spans[] = {{0, 1},           {below(16), 1},      {15, 1},         {16, 1},          {255, 1}, {256, 1},
                        {below(1000), 1}, {0, 33 + below(60)}, {below(700), 1}, {below(300), 70}, {63, 2},  {0, 1},
                        {511, 1},         {200 + below(9), 9}};
        check_layout(&shapes[i], spans, sizeof spans / sizeof *spans, i % 2 ? 64 : 256);
    }
}

static void test_long_context(void **state) {
    static const moe_cuda_attention_shape shapes[] = {{8, 1, 128, 0}, {4, 2, 64, 0}, {8, 1, 128, 1000}};
    (void)state;
    if (sanitized()) skip();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const span spans[] = {{8191, 1}, {8192, 1}, {20000 + below(1000), 3}, {below(300), 1}};
        check_layout(&shapes[i], spans, sizeof spans / sizeof *spans, 512);
    }
}

/* ---- projections ---- */

typedef struct project_case {
    moe_cuda_attention_shape shape;
    bool norm, full, bias;
    float clip;
} project_case;

static void project_reference(const project_case *c, const uint16_t *qkv, const float *bias, const float *norms, float eps,
                              int32_t position, const float *frequency, double *out) {
    int32_t d = c->shape.head_dim, q = c->shape.num_heads, kv = c->shape.num_kv_heads, rotated = q + kv;
    for (int32_t i = 0; i < (q + 2 * kv) * d; i++) out[i] = (double)moe_bf16_to_f32(qkv[i]) + (c->bias ? (double)bias[i] : 0);
    for (int32_t h = 0; c->norm && h < rotated; h++) {
        int32_t first = !c->full ? h : h < q ? 0 : q, count = !c->full ? 1 : h < q ? q : kv;
        double squares = 0;
        for (int32_t i = first * d; i < (first + count) * d; i++) {
            double x = (double)moe_bf16_to_f32(qkv[i]) + (c->bias ? (double)bias[i] : 0);
            squares += x * x;
        }
        for (int32_t i = 0; i < d; i++) out[h * d + i] *= (double)norms[h * d + i] / sqrt(squares / (count * d) + (double)eps);
    }
    for (int32_t i = 0; c->clip > 0 && i < (q + 2 * kv) * d; i++) out[i] = fmax(fmin(out[i], (double)c->clip), -(double)c->clip);
    for (int32_t h = 0; h < rotated; h++)
        for (int32_t i = 0; i < d / 2; i++) {
            double angle = (double)((float)position * frequency[i]), a = out[h * d + i], b = out[h * d + i + d / 2];
            out[h * d + i] = a * cos(angle) - b * sin(angle);
            out[h * d + i + d / 2] = b * cos(angle) + a * sin(angle);
        }
}

static void check_project(const project_case *c) {
    enum { ROWS = 5, BLOCKS = 8 };
    int32_t d = c->shape.head_dim, q = c->shape.num_heads, kv = c->shape.num_kv_heads, width = (q + 2 * kv) * d, half = d / 2;
    int32_t positions[ROWS] = {0, 15, 16, 77, 40}, table_at[ROWS] = {0, 0, 0, 0, 5}, tables[BLOCKS] = {3, 0, 7, 1, 6, 2, 5, 4};
    int32_t num_rows = ROWS - 1, ids[ROWS] = {1, 0, 2, 2, 1};
    size_t pool = (size_t)BLOCKS * (size_t)kv * 16 * (size_t)d;
    uint16_t *qkv = random_bf16(ROWS * width, 2), *got = malloc((size_t)(ROWS * width) * 2), *keys = malloc(pool * 2),
             *values = malloc(pool * 2);
    float *bias = random_f32(width, 1), *norms = random_f32((q + kv) * d, 2), frequency[128], *table = random_f32(3 * width, 1);
    double *want = malloc((size_t)width * sizeof *want);
    for (int32_t h = 0; !c->full && h < q + kv; h++) memcpy(norms + h * d, norms + (h < q ? 0 : q * d), (size_t)d * 4);
    for (int32_t i = 0; i < half; i++) frequency[i] = 1.0f / powf(10000, (float)(2 * i) / (float)d);
    moe_cuda_project a = {.shape = c->shape, .full_norm = c->full, .eps = 1e-6f, .clip = c->clip, .max_rows = ROWS};
    a.rows = (moe_cuda_row_inputs){.num_rows = to_device(&num_rows, 4), .token_ids = to_device(ids, sizeof ids)};
    a.rows.positions = to_device(positions, sizeof positions);
    a.rows.table_at = to_device(table_at, sizeof table_at);
    a.rows.tables = to_device(tables, sizeof tables);
    a.qkv = to_device(qkv, (size_t)(ROWS * width) * 2);
    memset(keys, 0xff, pool * 2);
    a.kv.keys = to_device(keys, pool * 2);
    a.kv.values = to_device(keys, pool * 2);
    if (c->bias) a.bias = to_device(bias, (size_t)width * 4);
    if (c->norm) a.q_norm = to_device(norms, (size_t)(q * d) * 4);
    if (c->norm) a.k_norm = to_device(norms + q * d, (size_t)(kv * d) * 4);
    moe_cuda_embed e = {
        .rows = a.rows, .table = to_device(table, (size_t)(3 * width) * 4), .table_dtype = MOE_F32, .max_rows = ROWS};
    e.inverse_frequency = to_device(frequency, (size_t)half * 4);
    e.hidden = device_memory((size_t)(ROWS * width) * 4);
    a.cosine = e.cosine = device_memory((size_t)(ROWS * half) * 4);
    a.sine = e.sine = device_memory((size_t)(ROWS * half) * 4);
    e.width = width;
    e.half_dim = half;
    ok(moe_cuda_embed_rows(&queue, &e));
    ok(moe_cuda_project_rows(&queue, &a));
    from_device(got, a.qkv, (size_t)(ROWS * width) * 2);
    from_device(keys, a.kv.keys, pool * 2);
    from_device(values, a.kv.values, pool * 2);
    float *hidden = malloc((size_t)(ROWS * width) * 4);
    from_device(hidden, e.hidden, (size_t)(ROWS * width) * 4);
    for (int32_t row = 0; row < num_rows; row++) {
        project_reference(c, qkv + row * width, bias, norms, a.eps, positions[row], frequency, want);
        int32_t block = tables[table_at[row] + positions[row] / 16];
        for (int32_t h = 0; h < kv; h++) {
            int64_t at = (((int64_t)block * kv + h) * 16 + positions[row] % 16) * d;
            memcpy(got + row * width + (q + h) * d, keys + at, (size_t)d * 2);
            memcpy(got + row * width + (q + kv + h) * d, values + at, (size_t)d * 2);
        }
        assert_true(error_of_bf16(want, got + row * width, width) < 4e-3);
        assert_memory_equal(hidden + row * width, table + ids[row] * width, (size_t)width * 4);
    }
    assert_memory_equal(got + num_rows * width, qkv + num_rows * width, (size_t)width * 2); /* padding */
    int64_t written = 0;
    for (size_t i = 0; i < pool; i++) written += (keys[i] != 0xffff) + (values[i] != 0xffff);
    assert_true(written <= 2 * num_rows * kv * d);
    void *memory[] = {qkv, got, keys, values, bias, norms, table, want, hidden};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free_all();
}

static void test_project(void **state) {
    static const project_case cases[] = {{{32, 4, 128, 0}, true, false, false, 0}, {{16, 16, 128, 0}, true, true, false, 1.5f},
                                         {{4, 2, 64, 0}, false, false, true, 0},   {{6, 2, 80, 0}, true, true, true, 0.8f},
                                         {{4, 4, 32, 0}, true, false, false, 0},   {{2, 1, 256, 0}, true, false, true, 0}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_project(&cases[i]);
    const int32_t num_sms = queue.num_sms;
    queue.num_sms = 0; /* as with many rows */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_project(&cases[i]);
    queue.num_sms = num_sms;
}

/* ---- gate, combine, logits ---- */

static void check_gate(moe_backend *reference_backend, int32_t experts, int32_t top_k, bool norm) {
    enum { ROWS = 37 };
    int32_t *want_ids = calloc((size_t)(ROWS * top_k), 4), *got_ids = calloc((size_t)(ROWS * top_k), 4);
    float *want = calloc((size_t)(ROWS * top_k), 4), *got = calloc((size_t)(ROWS * top_k), 4),
          *logits = random_f32(ROWS * experts, 4);
    int32_t num_rows = ROWS;
    for (int32_t i = experts; i < 6 * experts; i++) logits[i] = (float)below(3); /* ties */
    for (int32_t i = 0; i < experts; i++) logits[i] = i % 2 ? 0.0f : -0.0f;
    if (experts > 2) logits[7 * experts + 1] = NAN;
    reference_backend->ops->single->gate_topk(logits, ROWS, experts, top_k, MOE_GATE_SOFTMAX_TOPK, norm,
                                              (moe_route){want_ids, want});
    moe_cuda_gate a = {
        .num_rows = to_device(&num_rows, 4), .max_rows = ROWS + 3, .num_experts = experts, .top_k = top_k, .norm_topk = norm};
    a.logits = to_device(logits, (size_t)(ROWS * experts) * 4);
    a.experts = device_memory((size_t)((ROWS + 3) * top_k) * 4);
    a.weights = device_memory((size_t)((ROWS + 3) * top_k) * 4);
    ok(moe_cuda_gate_topk(&queue, &a));
    for (int32_t i = 0; i < 3 * top_k; i++) {
        int32_t padding;
        from_device(&padding, a.experts + ROWS * top_k + i, 4);
        assert_int_equal(padding, -1);
    }
    from_device(got_ids, a.experts, (size_t)(ROWS * top_k) * 4);
    from_device(got, a.weights, (size_t)(ROWS * top_k) * 4);
    assert_memory_equal(want_ids, got_ids, (size_t)(ROWS * top_k) * 4);
    for (int32_t i = 0; i < ROWS * top_k; i++)
        assert_true(isnan(want[i]) ? isnan(got[i]) : fabsf(want[i] - got[i]) <= 2e-6f * fabsf(want[i]) + 1e-9f);
    void *memory[] = {want_ids, got_ids, want, got, logits};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free_all();
}

static void test_gate(void **state) {
    moe_cpu_config config = {0};
    moe_backend *reference_backend = NULL;
    (void)state;
    assert_int_equal(moe_cpu_ref_open(&config, &reference_backend, NULL), MOE_OK);
    check_gate(reference_backend, 128, 8, true);
    check_gate(reference_backend, 128, 8, false);
    check_gate(reference_backend, 64, 8, false);
    check_gate(reference_backend, 8, 2, true);
    check_gate(reference_backend, 1, 1, true);
    check_gate(reference_backend, 60, 4, false);
    check_gate(reference_backend, 200, 32, true);
    check_gate(reference_backend, 512, 10, true);
    check_gate(reference_backend, 1000, 6, false);
    reference_backend->ops->close(reference_backend);
}

static void check_combine(int32_t width, int32_t top_k, bool shared, moe_dtype dtype) {
    enum { ROWS = 6 };
    int32_t counts[ROWS] = {top_k, 0, 1, top_k, top_k - 1, top_k}, num_rows = ROWS - 1, row_of[2] = {3, 0};
    int64_t total = (int64_t)ROWS * width;
    float *hidden = random_f32(total, 1), *outputs = random_f32(total * top_k, 1), *weights = random_f32(ROWS * top_k, 1);
    float *logits = random_f32(ROWS, 2), *norm = random_f32(width, 2), *bias = random_f32(width, 1),
          *got = malloc((size_t)total * 4), *extra = random_f32(total, 1);
    uint16_t *narrow = random_bf16(total * top_k, 1), *normed = malloc((size_t)total * 2);
    double *want = malloc((size_t)width * sizeof *want);
    for (int64_t i = 0; dtype == MOE_BF16 && i < total * top_k; i++) outputs[i] = moe_bf16_to_f32(narrow[i]);
    moe_cuda_combine_norm a = {
        .num_rows = to_device(&num_rows, 4), .max_rows = ROWS, .width = width, .top_k = top_k, .eps = 1e-6f};
    a.hidden = to_device(hidden, (size_t)total * 4);
    a.outputs =
        dtype == MOE_F32 ? to_device(outputs, (size_t)(total * top_k) * 4) : to_device(narrow, (size_t)(total * top_k) * 2);
    a.outputs_dtype = dtype;
    a.weights = to_device(weights, (size_t)(ROWS * top_k) * 4);
    a.counts = to_device(counts, sizeof counts);
    if (shared) a.shared = to_device(extra, (size_t)total * 4);
    if (shared) a.shared_logit = to_device(logits, ROWS * 4);
    if (shared) a.bias = to_device(bias, (size_t)width * 4);
    a.norm = to_device(norm, (size_t)width * 4);
    a.normed = device_memory((size_t)total * 2);
    ok(moe_cuda_combine_norm_rows(&queue, &a));
    from_device(got, a.hidden, (size_t)total * 4);
    from_device(normed, a.normed, (size_t)total * 2);
    for (int32_t row = 0; row < num_rows; row++) {
        double squares = 0;
        for (int32_t i = 0; i < width; i++) {
            float sum = 0, *x = hidden + (int64_t)row * width + i;
            for (int32_t j = 0; j < counts[row]; j++)
                sum = fmaf(weights[row * top_k + j], outputs[((int64_t)row * top_k + j) * width + i], sum);
            if (shared) {
                float scaled = 1.0f / (1.0f + expf(-logits[row])) * extra[(int64_t)row * width + i];
                sum += scaled;
                *x += bias[i];
            }
            *x += sum;
            assert_true(fabsf(*x - got[(int64_t)row * width + i]) <= (shared ? 2e-6f : 0));
            squares += (double)*x * (double)*x;
        }
        for (int32_t i = 0; i < width; i++)
            want[i] = (double)hidden[(int64_t)row * width + i] * (double)norm[i] / sqrt(squares / width + 1e-6);
        assert_true(error_of_bf16(want, normed + (int64_t)row * width, width) < 3e-3);
    }
    assert_memory_equal(got + (int64_t)num_rows * width, hidden + (int64_t)num_rows * width, (size_t)width * 4); /* padding */
    a.row_of = to_device(row_of, sizeof row_of);
    a.num_rows = NULL;
    a.max_rows = 2;
    ok(moe_cuda_combine_norm_rows(&queue, &a));
    uint16_t *picked = malloc((size_t)(2 * width) * 2);
    from_device(picked, a.normed, (size_t)(2 * width) * 2);
    assert_memory_equal(picked, normed + 3 * (int64_t)width, (size_t)width * 2);
    assert_memory_equal(picked + width, normed, (size_t)width * 2);
    void *memory[] = {hidden, outputs, weights, logits, norm, bias, got, narrow, extra, normed, want, picked};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free_all();
}

static void test_combine(void **state) {
    (void)state;
    check_combine(2048, 8, false, MOE_F32);
    check_combine(4096, 2, true, MOE_F32);
    check_combine(64, 10, true, MOE_BF16);
    check_combine(5120, 8, false, MOE_BF16);
    check_combine(12288, 9, true, MOE_F32);
}

static void check_logits(int32_t vocab, int32_t num_top) {
    enum { ROWS = 4 };
    float *logits = random_f32((int64_t)ROWS * vocab, 5), *got = malloc((size_t)(ROWS * num_top) * 4);
    int32_t *ids = malloc((size_t)(ROWS * num_top) * 4);
    bool *taken = calloc((size_t)vocab, 1);
    for (int32_t i = 0; i < vocab; i++) logits[vocab + i] = i % 5 ? -0.0f : (float)(below(2) * 0);
    logits[2 * vocab + below(vocab)] = vocab % 2 ? NAN : INFINITY;
    moe_cuda_logits_top a = {
        .logits = to_device(logits, (size_t)ROWS * (size_t)vocab * 4), .rows = ROWS, .vocab = vocab, .num_top = num_top};
    a.ids = device_memory((size_t)(ROWS * num_top) * 4);
    a.values = device_memory((size_t)(ROWS * num_top) * 4);
    a.scratch = device_memory(moe_cuda_logits_top_scratch(ROWS, vocab, num_top));
    ok(moe_cuda_logits_top_rows(&queue, &a));
    from_device(ids, a.ids, (size_t)(ROWS * num_top) * 4);
    from_device(got, a.values, (size_t)(ROWS * num_top) * 4);
    for (int32_t row = 0; row < ROWS; row++) {
        memset(taken, 0, (size_t)vocab);
        for (int32_t j = 0; j < num_top; j++) {
            int32_t best = -1;
            for (int32_t i = 0; row != 2 && i < vocab; i++)
                if (!taken[i] && (best < 0 || logits[row * vocab + i] > logits[row * vocab + best])) best = i;
            assert_int_equal(ids[row * num_top + j], best);
            if (best < 0) continue;
            taken[best] = true;
            assert_true(got[row * num_top + j] == logits[row * vocab + best]);
        }
    }
    free(logits);
    free(got);
    free(ids);
    free(taken);
    free_all();
}

static void test_logits_top(void **state) {
    (void)state;
    check_logits(151936, 1);
    check_logits(151936, 64);
    check_logits(300000, 64); /* more than one pass of the merge */
    check_logits(2049, 20);
    check_logits(50, 50);
    check_logits(1, 1);
}

/* ---- products ---- */

static void check_linear(int32_t n, int32_t k, moe_cuda_out out) {
    static const int32_t counts[] = {1, 3, 8, 9, 16, 17, 33, 64, 65, 130};
    enum { MOST = 130 };
    uint16_t *w = random_bf16((int64_t)n * k, 1), *x = random_bf16((int64_t)MOST * k, 1);
    float *before = random_f32((int64_t)MOST * n, 1), *got = malloc((size_t)(MOST * n) * 4),
          *first = malloc((size_t)(MOST * n) * 4);
    double *want = calloc((size_t)(MOST * n), sizeof *want);
    for (int32_t r = 0; r < MOST; r++)
        for (int32_t o = 0; o < n; o++) {
            double sum = out == MOE_CUDA_OUT_F32_ADD ? (double)before[r * n + o] : 0;
            for (int32_t i = 0; i < k; i++)
                sum += (double)moe_bf16_to_f32(w[(int64_t)o * k + i]) * (double)moe_bf16_to_f32(x[(int64_t)r * k + i]);
            want[(int64_t)r * n + o] = sum;
        }
    size_t element = out == MOE_CUDA_OUT_BF16 ? 2 : 4;
    moe_cuda_product a = {
        .w = to_device(w, (size_t)n * (size_t)k * 2), .x = to_device(x, (size_t)(MOST * k) * 2), .n = n, .k = k, .out = out};
    a.y = device_memory((size_t)(MOST * n) * 4);
    for (int c = (int)(sizeof counts / sizeof *counts) - 1; c >= 0; c--) {
        size_t bytes = (size_t)(counts[c] * n) * element;
        if (out == MOE_CUDA_OUT_F32_ADD)
            ok(cudaMemcpy(a.y, before, (size_t)(MOST * n) * 4, cudaMemcpyHostToDevice));
        else
            ok(cudaMemset(a.y, 0xff, (size_t)(MOST * n) * 4));
        ok(cudaStreamSynchronize(0));
        a.rows = counts[c];
        ok(moe_cuda_linear_few(&queue, &a));
        from_device(got, a.y, bytes);
        double error =
            out == MOE_CUDA_OUT_BF16 ? error_of_bf16(want, (uint16_t *)got, counts[c] * n) : error_of(want, got, counts[c] * n);
        assert_true(error < (out == MOE_CUDA_OUT_BF16 ? 3e-3 : 3e-6));
        if (counts[c] == MOST) memcpy(first, got, bytes);
        assert_memory_equal(first, got, bytes); /* a row's bits are its own, whatever the batch */
    }
    void *memory[] = {w, x, before, got, first, want};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free_all();
}

static void test_linear_few(void **state) {
    (void)state;
    check_linear(200, 64, MOE_CUDA_OUT_F32);
    check_linear(96, 2048, MOE_CUDA_OUT_BF16);
    check_linear(131, 4096, MOE_CUDA_OUT_F32_ADD);
    check_linear(16, 1088, MOE_CUDA_OUT_F32);
}

static int open_queue(void **state) {
    (void)state;
    struct cudaDeviceProp p;
    ok(cudaGetDeviceProperties(&p, 0));
    queue = (moe_cuda_queue){.overlap = p.major >= 9, .hopper = p.major == 9 && p.minor == 0, .num_sms = p.multiProcessorCount};
    ok(cudaStreamCreateWithFlags(&queue.stream, cudaStreamNonBlocking));
    random_source.state = 7;
    return 0;
}

static int close_queue(void **state) {
    (void)state;
    ok(cudaStreamDestroy(queue.stream));
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_attention), cmocka_unit_test(test_long_context),
                                       cmocka_unit_test(test_project),   cmocka_unit_test(test_gate),
                                       cmocka_unit_test(test_combine),   cmocka_unit_test(test_logits_top),
                                       cmocka_unit_test(test_linear_few)};
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        printf("skipped: no GPU here (%s)\n", cudaGetErrorString(error));
        return 77;
    }
    return cmocka_run_group_tests(tests, open_queue, close_queue);
}
#else
#include <stdio.h>
int main(void) {
    printf("skipped: built without CUDA\n");
    return 77;
}
#endif
