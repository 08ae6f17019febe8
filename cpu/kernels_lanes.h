/* The kernels of the `cpu` backend over a value of 16 lanes, compiled once for each instruction set: kernels_*.c includes a
 * lanes header and then this file. A lane is one output (or one position, in attention scores), so an output's bits depend on
 * neither the width of the registers nor the number of rows, and all instruction sets give the same bits.
 *
 * A lanes header defines the type `lanes` and lanes_{set, load, load_first, load_bf16, load_f16, store, store_first, fma, add,
 * sub, mul, div, max, min, power_of_two}. max(a, b) and min(a, b) are b where either is NaN. power_of_two takes whole numbers
 * in [-126, 127]; NaN gives any value. It also defines LANES_TARGET, LANES_ISA, and the tile shapes that its registers hold:
 * up to TILE_ROWS_MAX rows (at most 8), with TILE_PANELS(r) panels (1, 2, 4 or 8) for r rows. */
#include <math.h>
#include <string.h>

#include "cpu/kernels.h"
#include "cpu/single.h"

#if defined(__has_feature)
#define HAS_FEATURE(name) __has_feature(name)
#else
#define HAS_FEATURE(name) 0
#endif

#define KERNEL static LANES_TARGET
#define KERNEL_INLINE static inline __attribute__((always_inline)) LANES_TARGET
/* TILE functions take the tile's shape and dtype as parameters: constants, once inlined and unrolled. Not so for lanes that live
 * in memory, nor under the address sanitizer, whose checks of every access would make that minutes of compilation. */
#if defined(LANES_IN_MEMORY) || defined(__SANITIZE_ADDRESS__) || HAS_FEATURE(address_sanitizer)
#define TILE static __attribute__((noinline)) LANES_TARGET
#define UNROLL
#elif defined(__clang__)
#define TILE KERNEL_INLINE
#define UNROLL _Pragma("unroll")
#else
#define TILE KERNEL_INLINE
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define PREFETCH_BYTES 1024 /* ahead of a panel's next weights: one sixth faster where they come from memory */
#define TILE_MAX 24         /* accumulators of the largest tile, panels × rows */
#define TILE_FITS(r) ((r) > TILE_ROWS_MAX || (r)*TILE_PANELS(r) <= TILE_MAX)
_Static_assert(TILE_FITS(1) && TILE_FITS(2) && TILE_FITS(3) && TILE_FITS(4), "TILE_MAX too small");
_Static_assert(TILE_FITS(5) && TILE_FITS(6) && TILE_FITS(7) && TILE_FITS(8), "TILE_MAX too small");

#define ROW_TILE(r, body, ...)                                                                       \
    case r:                                                                                          \
        if (r < TILE_ROWS_MAX) body(TILE_PANELS(r), (r < TILE_ROWS_MAX ? r : 1), row_, __VA_ARGS__); \
        break

/* Calls body(panels, rows, first_row, ...) with constants for the first two, to cover rows [0, count). */
#define FOR_ROW_TILES(count, body, ...)                                         \
    do {                                                                        \
        int32_t row_ = 0, count_ = (count);                                     \
        for (; row_ + TILE_ROWS_MAX <= count_; row_ += TILE_ROWS_MAX)           \
            body(TILE_PANELS(TILE_ROWS_MAX), TILE_ROWS_MAX, row_, __VA_ARGS__); \
        switch (count_ - row_) {                                                \
            ROW_TILE(1, body, __VA_ARGS__);                                     \
            ROW_TILE(2, body, __VA_ARGS__);                                     \
            ROW_TILE(3, body, __VA_ARGS__);                                     \
            ROW_TILE(4, body, __VA_ARGS__);                                     \
            ROW_TILE(5, body, __VA_ARGS__);                                     \
            ROW_TILE(6, body, __VA_ARGS__);                                     \
            ROW_TILE(7, body, __VA_ARGS__);                                     \
            default:                                                            \
                break;                                                          \
        }                                                                       \
    } while (0)

/* Calls body(panels, rows, from, ...) with constants for the first two, to cover panels [at, end), at most P at once. */
#define FOR_PANEL_TILES(P, R, at, end, body, ...)                                       \
    do {                                                                                \
        for (; at + P <= end; at += P) body(P, R, at, __VA_ARGS__);                     \
        if (P > 4 && at + 4 <= end) body((P > 4 ? 4 : 1), R, at, __VA_ARGS__), at += 4; \
        if (P > 2 && at + 2 <= end) body((P > 2 ? 2 : 1), R, at, __VA_ARGS__), at += 2; \
        if (P > 1 && at + 1 <= end) body(1, R, at, __VA_ARGS__), at += 1;               \
    } while (0)

KERNEL_INLINE lanes load_some(const float *p, int32_t count) { return count >= 16 ? lanes_load(p) : lanes_load_first(p, count); }

KERNEL_INLINE void store_some(float *p, lanes a, int32_t count) {
    if (count >= 16)
        lanes_store(p, a);
    else
        lanes_store_first(p, a, count);
}

TILE lanes load_weights(moe_dtype dtype, const uint8_t *p) {
    if (dtype == MOE_BF16) return lanes_load_bf16((const uint16_t *)(const void *)p);
    if (dtype == MOE_F16) return lanes_load_f16((const uint16_t *)(const void *)p);
    return lanes_load((const float *)(const void *)p);
}

/* The inner loop of everything: acc[p, r] = chain over k of fma(panel[p][k, lane], x[r][k], acc[p, r]).
 * P, R and dtype are constants; panels[p] advances by k_stride elements a step. What is read after panels[p] lies `next_bytes`
 * beyond its end. */
TILE void chain(const int P, const int R, const moe_dtype dtype, const uint8_t *const *panels, int64_t k_stride,
                const float *const *x, int32_t k_count, int64_t next_bytes, bool from_zero, lanes *acc) {
    const int64_t step = k_stride * (dtype == MOE_F32 ? 4 : 2);
    lanes sum[TILE_MAX];
    UNROLL for (int i = 0; i < P * R; i++) sum[i] = from_zero ? lanes_set(0) : acc[i];
    int32_t k = 0, ahead = PREFETCH_BYTES / (int32_t)step;
    for (int part = 0; part < 2; part++) {
        const int32_t end = part == 0 ? k_count - ahead : k_count;
        const int64_t prefetch = PREFETCH_BYTES + (part == 0 ? 0 : next_bytes);
        for (; k < end; k++) {
            lanes w[TILE_MAX];
            UNROLL for (int p = 0; p < P; p++) {
                __builtin_prefetch(panels[p] + k * step + prefetch);
                w[p] = load_weights(dtype, panels[p] + k * step);
            }
            UNROLL for (int r = 0; r < R; r++) {
                lanes value = lanes_set(x[r][k]);
                UNROLL for (int p = 0; p < P; p++) sum[p * R + r] = lanes_fma(w[p], value, sum[p * R + r]);
            }
        }
    }
    UNROLL for (int i = 0; i < P * R; i++) acc[i] = sum[i];
}

/* Over a panel of keys or values: its dtype is known when it runs. */
TILE void kv_chain(const int P, const int R, const moe_cpu_kv_layer *kv, const uint8_t *const *panels, int64_t k_stride,
                   const float *const *x, int32_t k_count, bool from_zero, lanes *acc) {
    if (kv->dtype == MOE_BF16)
        chain(P, R, MOE_BF16, panels, k_stride, x, k_count, 0, from_zero, acc);
    else
        chain(P, R, MOE_F32, panels, k_stride, x, k_count, 0, from_zero, acc);
}

KERNEL_INLINE float lane_sum(lanes a) {
    float v[16];
    lanes_store(v, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

/* Rounds to a whole number, ties to even, for |x| < 2^22. */
KERNEL_INLINE lanes whole(lanes x) { return lanes_sub(lanes_add(x, lanes_set(0x1.8p23f)), lanes_set(0x1.8p23f)); }

/* exp(x), within 2 ulp: x = n·ln 2 + r, exp(r) by Cephes' polynomial, 2^n in two factors so that subnormal results round
 * once. NaN stays NaN. */
KERNEL_INLINE lanes exponential(lanes x) {
    x = lanes_max(lanes_set(-104.0f), lanes_min(lanes_set(89.0f), x));
    lanes n = whole(lanes_mul(x, lanes_set(1.44269504088896341f)));
    lanes r = lanes_fma(n, lanes_set(-0.693359375f), x);
    r = lanes_fma(n, lanes_set(2.12194440e-4f), r);
    lanes p = lanes_set(1.9875691500e-4f);
    p = lanes_fma(p, r, lanes_set(1.3981999507e-3f));
    p = lanes_fma(p, r, lanes_set(8.3334519073e-3f));
    p = lanes_fma(p, r, lanes_set(4.1665795894e-2f));
    p = lanes_fma(p, r, lanes_set(1.6666665459e-1f));
    p = lanes_fma(p, r, lanes_set(5.0000001201e-1f));
    p = lanes_add(lanes_fma(p, lanes_mul(r, r), r), lanes_set(1.0f));
    lanes half = whole(lanes_mul(n, lanes_set(0.5f)));
    return lanes_mul(lanes_mul(p, lanes_power_of_two(half)), lanes_power_of_two(lanes_sub(n, half)));
}

KERNEL_INLINE lanes sigmoid_lanes(lanes x) {
    lanes one = lanes_set(1.0f);
    return lanes_div(one, lanes_add(one, exponential(lanes_sub(lanes_set(0), x))));
}

/* ---- linear ---- */

TILE void linear_tile(const int P, const int R, int32_t panel, const moe_dtype dtype, const moe_cpu_linear *a, int32_t row) {
    const int64_t panel_bytes = (int64_t)a->w->k * 16 * (dtype == MOE_F32 ? 4 : 2);
    lanes sums[MOE_FFN_BLOCKS][TILE_MAX];
    for (int32_t b = 0; b < a->num_blocks; b++) {
        int32_t k = a->k_bounds[b];
        const int64_t next_bytes =
            b + 1 < a->num_blocks ? 0 : (P - 1) * panel_bytes; /* the next tile's panel, or this one's rest */
        const uint8_t *panels[TILE_MAX];
        const float *x[TILE_MAX];
        UNROLL for (int p = 0; p < P; p++) panels[p] =
            (const uint8_t *)a->w->data + (panel + p) * panel_bytes + (int64_t)k * 16 * (dtype == MOE_F32 ? 4 : 2);
        UNROLL for (int r = 0; r < R; r++) x[r] = a->x + (row + r) * a->x_stride + k;
        chain(P, R, dtype, panels, 16, x, a->k_bounds[b + 1] - k, next_bytes, true, sums[b]);
    }
    for (int32_t step = 1; step < a->num_blocks; step *= 2)
        for (int32_t b = 0; b < a->num_blocks; b += 2 * step)
            for (int i = 0; i < P * R; i++) sums[b][i] = lanes_add(sums[b][i], sums[b + step][i]);
    for (int p = 0; p < P; p++) {
        int32_t n = (panel + p) * 16, count = a->n_hi - n;
        lanes bias = lanes_set(0);
        if (a->bias) bias = load_some(a->bias + n, count);
        for (int r = 0; r < R; r++) {
            lanes sum = sums[0][p * R + r];
            store_some(a->y + (row + r) * a->y_stride + n, a->bias ? lanes_add(sum, bias) : sum, count);
        }
    }
}

TILE void linear_rows(const int P, const int R, int32_t row, const moe_dtype dtype, const moe_cpu_linear *a) {
    int32_t panel = a->n_lo / 16, end = (a->n_hi + 15) / 16;
    FOR_PANEL_TILES(P, R, panel, end, linear_tile, dtype, a, row);
}

KERNEL void linear_f32(const moe_cpu_linear *a) { FOR_ROW_TILES(a->rows, linear_rows, MOE_F32, a); }
KERNEL void linear_bf16(const moe_cpu_linear *a) { FOR_ROW_TILES(a->rows, linear_rows, MOE_BF16, a); }
KERNEL void linear_f16(const moe_cpu_linear *a) { FOR_ROW_TILES(a->rows, linear_rows, MOE_F16, a); }

KERNEL void linear(const moe_cpu_linear *a) {
    if (a->w->dtype == MOE_BF16)
        linear_bf16(a);
    else if (a->w->dtype == MOE_F16)
        linear_f16(a);
    else
        linear_f32(a);
}

/* ---- linear, weights row by row ---- */

/* The first `count` weights from p on, zero behind them. */
TILE lanes load_first_weights(moe_dtype dtype, const uint8_t *p, int32_t count) {
    uint32_t padded[16] = {0};
    memcpy(padded, p, (size_t)count * (dtype == MOE_F32 ? 4 : 2));
    return load_weights(dtype, (const uint8_t *)padded);
}

/* P outputs of R rows over one block of K: sums[p, r]. */
TILE void dots(const int P, const int R, const moe_dtype dtype, const uint8_t *const *w, const float *const *x, int32_t count,
               float *sums) {
    const int64_t bytes = dtype == MOE_F32 ? 4 : 2;
    lanes acc[TILE_MAX];
    int32_t k = 0;
    UNROLL for (int i = 0; i < P * R; i++) acc[i] = lanes_set(0);
    for (; k + 16 <= count; k += 16) {
        lanes v[TILE_MAX];
        UNROLL for (int p = 0; p < P; p++) v[p] = load_weights(dtype, w[p] + k * bytes);
        UNROLL for (int r = 0; r < R; r++) {
            lanes value = lanes_load(x[r] + k);
            UNROLL for (int p = 0; p < P; p++) acc[p * R + r] = lanes_fma(v[p], value, acc[p * R + r]);
        }
    }
    for (int p = 0; p < P && k < count; p++) {
        lanes v = load_first_weights(dtype, w[p] + k * bytes, count - k);
        for (int r = 0; r < R; r++) acc[p * R + r] = lanes_fma(v, lanes_load_first(x[r] + k, count - k), acc[p * R + r]);
    }
    for (int i = 0; i < P * R; i++) sums[i] = lane_sum(acc[i]);
}

TILE void rows_tile(const int P, const int R, int32_t n, const moe_dtype dtype, const moe_cpu_linear *a, int32_t row) {
    float sums[MOE_FFN_BLOCKS][TILE_MAX];
    for (int32_t b = 0; b < a->num_blocks; b++) {
        int32_t k = a->k_bounds[b];
        const uint8_t *w[TILE_MAX];
        const float *x[TILE_MAX];
        for (int p = 0; p < P; p++)
            w[p] = (const uint8_t *)a->w->data + (n + p) / a->w->run * a->w->run_bytes + (n + p) % a->w->run * a->w->row_bytes +
                   (int64_t)k * (dtype == MOE_F32 ? 4 : 2);
        for (int r = 0; r < R; r++) x[r] = a->x + (row + r) * a->x_stride + k;
        dots(P, R, dtype, w, x, a->k_bounds[b + 1] - k, sums[b]);
    }
    for (int32_t step = 1; step < a->num_blocks; step *= 2)
        for (int32_t b = 0; b < a->num_blocks; b += 2 * step)
            for (int i = 0; i < P * R; i++) sums[b][i] += sums[b + step][i];
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) a->y[(row + r) * a->y_stride + n + p] = sums[0][p * R + r];
}

TILE void rows_of_outputs(const int P, const int R, int32_t row, const moe_dtype dtype, const moe_cpu_linear *a) {
    int32_t n = a->n_lo;
    FOR_PANEL_TILES(P, R, n, a->n_hi, rows_tile, dtype, a, row);
}

KERNEL void linear_rows_f32(const moe_cpu_linear *a) { FOR_ROW_TILES(a->rows, rows_of_outputs, MOE_F32, a); }
KERNEL void linear_rows_bf16(const moe_cpu_linear *a) { FOR_ROW_TILES(a->rows, rows_of_outputs, MOE_BF16, a); }
KERNEL void linear_rows_f16(const moe_cpu_linear *a) { FOR_ROW_TILES(a->rows, rows_of_outputs, MOE_F16, a); }

KERNEL void linear_of_rows(const moe_cpu_linear *a) {
    if (a->w->dtype == MOE_BF16)
        linear_rows_bf16(a);
    else if (a->w->dtype == MOE_F16)
        linear_rows_f16(a);
    else
        linear_rows_f32(a);
}

/* ---- attention ---- */

/* Up to MOE_CPU_ATTENTION_QUERIES queries of one key head; score i of a query belongs to position first_block · 16 + i. */
typedef struct query_tile {
    const moe_cpu_attention *a;
    int32_t count, first_block, num_blocks;
    const float *q[MOE_CPU_ATTENTION_QUERIES];
    float *y[MOE_CPU_ATTENTION_QUERIES];
    float *scores[MOE_CPU_ATTENTION_QUERIES];
    float *sums[MOE_CPU_ATTENTION_QUERIES];                               /* [padded_dim] */
    int32_t lo[MOE_CPU_ATTENTION_QUERIES], hi[MOE_CPU_ATTENTION_QUERIES]; /* sees positions [lo, hi) */
} query_tile;

KERNEL query_tile query_tile_make(const moe_cpu_attention *a, int32_t first) {
    query_tile t = {.a = a, .count = a->rows * a->heads_per_kv - first};
    if (t.count > MOE_CPU_ATTENTION_QUERIES) t.count = MOE_CPU_ATTENTION_QUERIES;
    for (int32_t i = 0; i < t.count; i++) {
        int32_t row = (first + i) / a->heads_per_kv, head = a->kv_head * a->heads_per_kv + (first + i) % a->heads_per_kv;
        t.q[i] = a->q + row * a->q_stride + (int64_t)head * a->kv->head_dim;
        t.y[i] = a->y + row * a->y_stride + (int64_t)head * a->kv->head_dim;
        t.scores[i] = a->scratch + i * (a->scratch_positions + a->kv->padded_dim);
        t.sums[i] = t.scores[i] + a->scratch_positions;
        t.hi[i] = a->positions[row] + 1;
        t.lo[i] = a->window && t.hi[i] > a->window ? t.hi[i] - a->window : 0;
    }
    t.first_block = t.lo[0] / MOE_KV_BLOCK_TOKENS;
    t.num_blocks = (t.hi[t.count - 1] - 1) / MOE_KV_BLOCK_TOKENS + 1 - t.first_block;
    return t;
}

/* scores[q][16 (block + p) …] = q · K of P blocks, for R queries */
TILE void scores_tile(const int P, const int R, int32_t block, int32_t query, const query_tile *t) {
    const moe_cpu_attention *a = t->a;
    const uint8_t *keys[TILE_MAX];
    const float *q[TILE_MAX];
    lanes acc[TILE_MAX];
    UNROLL for (int p = 0; p < P; p++) keys[p] =
        a->kv->keys + a->blocks[t->first_block + block + p] * a->kv->key_block_bytes +
        (int64_t)a->kv_head * a->kv->head_dim * 16 * (int64_t)moe_dtype_bytes(a->kv->dtype);
    UNROLL for (int r = 0; r < R; r++) q[r] = t->q[query + r];
    kv_chain(P, R, a->kv, keys, 16, q, a->kv->head_dim, true, acc);
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++)
            lanes_store(t->scores[query + r] + (block + p) * 16, lanes_mul(acc[p * R + r], lanes_set(a->scale)));
}

TILE void scores_rows(const int P, const int R, int32_t query, const query_tile *t) {
    int32_t block = 0;
    FOR_PANEL_TILES(P, R, block, t->num_blocks, scores_tile, query, t);
}

/* s[0 … count) becomes exp(s - max); returns the lane sum. count is a multiple of 16. */
KERNEL float exp_and_sum(float *s, int32_t count) {
    lanes max = lanes_set(-INFINITY), sum = lanes_set(0);
    for (int32_t i = 0; i < count; i += 16) max = lanes_max(max, lanes_load(s + i));
    float v[16];
    lanes_store(v, max);
    for (int i = 1; i < 16; i++) v[0] = v[0] > v[i] ? v[0] : v[i];
    max = lanes_set(v[0]);
    for (int32_t i = 0; i < count; i += 16) {
        lanes e = exponential(lanes_sub(lanes_load(s + i), max));
        lanes_store(s + i, e);
        sum = lanes_add(sum, e);
    }
    return lane_sum(sum);
}

/* Positions outside [lo, hi) get weight 0, whatever the block holds there. Returns the softmax sum of query i. */
KERNEL float softmax_scores(const query_tile *t, int32_t i) {
    int32_t base = t->first_block * 16, start = t->lo[i] / 16 * 16 - base, end = (t->hi[i] + 15) / 16 * 16 - base;
    float *s = t->scores[i];
    for (int32_t j = start; j < t->lo[i] - base; j++) s[j] = -INFINITY;
    for (int32_t j = t->hi[i] - base; j < end; j++) s[j] = -INFINITY;
    return exp_and_sum(s + start, end - start);
}

/* sums[q] += weights[q][from, to) · V for P panels of 16 dims of R queries; positions [from, to) lie in one block. */
TILE void values_tile(const int P, const int R, int32_t panel, int32_t query, const query_tile *t, int32_t from, int32_t to) {
    const int32_t dim = panel * 16;
    const moe_cpu_kv_layer *kv = t->a->kv;
    const int64_t element_bytes = (int64_t)moe_dtype_bytes(kv->dtype);
    const uint8_t *block = kv->values + t->a->blocks[from / 16] * kv->value_block_bytes +
                           ((int64_t)t->a->kv_head * 16 + from % 16) * kv->padded_dim * element_bytes;
    const uint8_t *panels[TILE_MAX];
    const float *weights[TILE_MAX];
    lanes acc[TILE_MAX];
    UNROLL for (int p = 0; p < P; p++) panels[p] = block + (dim + 16 * p) * element_bytes;
    UNROLL for (int r = 0; r < R; r++) weights[r] = t->scores[query + r] + from - t->first_block * 16;
    UNROLL for (int p = 0; p < P; p++) {
        UNROLL for (int r = 0; r < R; r++) acc[p * R + r] = lanes_load(t->sums[query + r] + dim + 16 * p);
    }
    kv_chain(P, R, kv, panels, kv->padded_dim, weights, to - from, false, acc);
    UNROLL for (int p = 0; p < P; p++) {
        UNROLL for (int r = 0; r < R; r++) lanes_store(t->sums[query + r] + dim + 16 * p, acc[p * R + r]);
    }
}

TILE void values_rows(const int P, const int R, int32_t row, const query_tile *t, int32_t query, int32_t from, int32_t to) {
    int32_t panel = 0;
    FOR_PANEL_TILES(P, R, panel, t->a->kv->padded_dim / 16, values_tile, query + row, t, from, to);
}

KERNEL void values_range(const query_tile *t, int32_t query, int32_t count, int32_t from, int32_t to) {
    while (from < to) {
        int32_t end = from / 16 * 16 + 16 < to ? from / 16 * 16 + 16 : to;
        FOR_ROW_TILES(count, values_rows, t, query, from, end);
        from = end;
    }
}

/* Positions that only some of the queries see are added for those alone: 0 · NaN of a position not seen must not come in. */
KERNEL void attend_tile(const query_tile *t) {
    int32_t last = t->count - 1, shared_lo = t->lo[last], shared_hi = t->hi[0];
    if (shared_hi < shared_lo) shared_hi = shared_lo;
    float totals[MOE_CPU_ATTENTION_QUERIES];
    FOR_ROW_TILES(t->count, scores_rows, t);
    for (int32_t i = 0; i <= last; i++) {
        totals[i] = softmax_scores(t, i);
        for (int32_t dim = 0; dim < t->a->kv->padded_dim; dim += 16) lanes_store(t->sums[i] + dim, lanes_set(0));
        values_range(t, i, 1, t->lo[i], t->hi[i] < shared_lo ? t->hi[i] : shared_lo);
    }
    values_range(t, 0, t->count, shared_lo, shared_hi);
    for (int32_t i = 0; i <= last; i++) {
        values_range(t, i, 1, t->lo[i] > shared_hi ? t->lo[i] : shared_hi, t->hi[i]);
        for (int32_t dim = 0; dim < t->a->kv->head_dim; dim += 16)
            store_some(t->y[i] + dim, lanes_div(lanes_load(t->sums[i] + dim), lanes_set(totals[i])), t->a->kv->head_dim - dim);
    }
}

KERNEL void attend(const moe_cpu_attention *a) {
    for (int32_t first = 0; first < a->rows * a->heads_per_kv; first += MOE_CPU_ATTENTION_QUERIES) {
        query_tile t = query_tile_make(a, first);
        attend_tile(&t);
    }
}

/* ---- by element or by row ---- */

KERNEL void rms_norm(const float *x, const float *weight, float eps, int32_t width, float *y) {
    lanes squares = lanes_set(0);
    for (int32_t i = 0; i < width; i += 16) {
        lanes v = load_some(x + i, width - i);
        squares = lanes_fma(v, v, squares);
    }
    lanes scale = lanes_set(1.0f / __builtin_sqrtf(lane_sum(squares) / (float)width + eps));
    for (int32_t i = 0; i < width; i += 16) {
        lanes v = lanes_mul(load_some(x + i, width - i), scale);
        store_some(y + i, lanes_mul(v, load_some(weight + i, width - i)), width - i);
    }
}

KERNEL void rotate(float *x, const float *cosine, const float *sine, int32_t heads, int32_t head_dim) {
    int32_t half = head_dim / 2;
    for (int32_t head = 0; head < heads; head++, x += head_dim)
        for (int32_t i = 0; i < half; i += 16) {
            lanes a = load_some(x + i, half - i), b = load_some(x + half + i, half - i);
            lanes c = load_some(cosine + i, half - i), s = load_some(sine + i, half - i);
            store_some(x + i, lanes_sub(lanes_mul(a, c), lanes_mul(b, s)), half - i);
            store_some(x + half + i, lanes_add(lanes_mul(b, c), lanes_mul(a, s)), half - i);
        }
}

KERNEL void silu_mul(float *gate, const float *up, int32_t count) {
    for (int32_t i = 0; i < count; i += 16) {
        lanes g = load_some(gate + i, count - i);
        lanes denominator = lanes_add(lanes_set(1.0f), exponential(lanes_sub(lanes_set(0), g)));
        store_some(gate + i, lanes_mul(lanes_div(g, denominator), load_some(up + i, count - i)), count - i);
    }
}

KERNEL float sigmoid(float x) {
    float out;
    lanes_store_first(&out, sigmoid_lanes(lanes_set(x)), 1);
    return out;
}

KERNEL void softmax(const float *logits, int32_t count, float *probabilities) {
    float padded[(MOE_MAX_EXPERTS + 15) / 16 * 16];
    int32_t padded_count = (count + 15) / 16 * 16;
    MOE_ASSERT(count > 0 && count <= MOE_MAX_EXPERTS);
    for (int32_t i = 0; i < padded_count; i++) padded[i] = i < count ? logits[i] : -INFINITY;
    lanes sum = lanes_set(exp_and_sum(padded, padded_count));
    for (int32_t i = 0; i < count; i += 16) store_some(probabilities + i, lanes_div(lanes_load(padded + i), sum), count - i);
}

/* Elements [at, at + count) of an array of that dtype, count ≤ 16. */
KERNEL_INLINE lanes load_some_of(moe_dtype dtype, const void *elements, int64_t at, int32_t count) {
    if (dtype == MOE_F32) return load_some((const float *)elements + at, count);
    const uint16_t *narrow = (const uint16_t *)elements + at;
    if (count >= 16) return lanes_load_bf16(narrow);
    uint16_t padded[16] = {0};
    memcpy(padded, narrow, (size_t)count * sizeof *padded);
    return lanes_load_bf16(padded);
}

KERNEL void combine(const moe_cpu_combine *a) {
    for (int32_t h = 0; h < a->hidden; h += 16) {
        int32_t count = a->hidden - h;
        lanes acc = lanes_set(0);
        for (int32_t j = 0; j < a->count; j++)
            acc = lanes_fma(lanes_set(a->weights[j]), load_some_of(a->dtype, a->outputs, (int64_t)j * a->hidden + h, count), acc);
        if (a->shared) acc = lanes_add(acc, lanes_mul(lanes_set(a->shared_scale), load_some(a->shared + h, count)));
        store_some(a->y + h, lanes_add(load_some(a->y + h, count), acc), count);
    }
}

KERNEL void accumulate(float weight, const float *x, int32_t count, float *y) {
    for (int32_t i = 0; i < count; i += 16) {
        lanes sum = lanes_fma(lanes_set(weight), load_some(x + i, count - i), load_some(y + i, count - i));
        store_some(y + i, sum, count - i);
    }
}

KERNEL void relu(float *x, int32_t count) {
    for (int32_t i = 0; i < count; i += 16) store_some(x + i, lanes_max(lanes_set(0), load_some(x + i, count - i)), count - i);
}

KERNEL void clamp(float *x, float limit, int32_t count) {
    for (int32_t i = 0; i < count; i += 16) {
        lanes v = lanes_min(lanes_set(limit), load_some(x + i, count - i));
        store_some(x + i, lanes_max(lanes_set(-limit), v), count - i);
    }
}

/* The initialiser of a moe_cpu_kernels. */
#define LANES_KERNELS                                                                                                         \
    {                                                                                                                         \
        .isa = LANES_ISA, .panel = MOE_CPU_LANES, .linear = linear, .linear_rows = linear_of_rows, .rms_norm = rms_norm,      \
        .rotate = rotate, .attend = attend, .silu_mul = silu_mul, .sigmoid = sigmoid, .softmax = softmax, .combine = combine, \
        .accumulate = accumulate, .relu = relu, .clamp = clamp,                                                               \
    }
